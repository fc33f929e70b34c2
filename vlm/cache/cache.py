"""`KVCache`: a KV cache for `generate`, kept as a text such as `snapkv:keep=0.25+int4` says."""

from functools import partial
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from ..decoder import attention_config, decoder_of
from .layer import Attention, KVLayer
from .parse import KVSpec, parse_kv


class KVCache(Cache):
    """A KV cache of Foveate's own model, or of a stock transformers LLM or VLM with full attention in each layer.

        model.generate(**inputs, past_key_values=KVCache(model, "int4"))

    To be filled by one sequence, or batch of them, and continued in later turns, as a DynamicCache.

    Args:
        model: whose keys and values are kept.
        kv: what keeps them, evicts them and selects them; a text is parsed by `parse_kv`.

    Attributes:
        spec: what it was made from.

    Raises:
        ValueError: the text is wrong, or can't work on this model; the message says what is accepted.
    """

    def __init__(self, model: PreTrainedModel, kv: "KVSpec | str"):
        self.spec = parse_kv(kv) if isinstance(kv, str) else kv
        decoder = decoder_of(model)
        for part in (self.spec.policy, self.spec.duo):
            if part is not None:
                part.check(decoder)
        self.attention = Attention(attention_config(decoder), getattr(decoder.rotary_emb, "inv_freq", None))
        layers: Any = [self._layer(number) for number in range(len(decoder.layers))]
        super().__init__(layers=layers)
        self.layers: Any

    def _layer(self, number: int) -> Any:
        spec, policy = self.spec, self.spec.policy
        make = partial(spec.store.make, 0 if policy is None else policy.sinks)
        if spec.duo is not None:
            return spec.duo.layer(number, self.attention, make)
        return KVLayer(number, self.attention, make, policy, spec.selector)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated for keys and values; `report.costs` tells more."""
        return sum(layer.nbytes for layer in self.layers)

    def see(self, visual: torch.Tensor) -> None:
        """Tells which of the tokens that come next are visual, bool [batch, tokens]; `foveate.reduce` does it."""
        known = self.attention.visual
        unseen = self.get_seq_length() - (0 if known is None else known.shape[1])  # generated: text
        parts = [known, visual.new_zeros(len(visual), unseen), visual]
        self.attention.visual = torch.cat([part for part in parts if part is not None], dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens from all layers, or from none.

        Raises:
            RuntimeError: something that would have to come back was evicted or packed.
        """
        for layer in self.layers:
            layer.check_crop(-tokens_to_remove)
        for layer in self.layers:
            layer.crop(tokens_to_remove)
        if self.attention.visual is not None:
            self.attention.visual = self.attention.visual[:, : self.get_seq_length()]
