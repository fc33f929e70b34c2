"""The attention function that a decoder under sequence parallelism calls.

transformers finds it by name; what it has to know of the ranks and the pack comes with each call of the decoder, in the
keyword `sequence`, so that a layer that activation checkpointing runs again finds the same. Position ids and rotary
embeddings are the model's business: queries and keys come rotated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..decoder import attention_config, decoder_of
from .exchange import gather_heads, scatter_heads
from .plan import SequencePlan
from .ring import RingLayout, ring_attention
from .topology import ParallelError, Topology, check_heads

ATTENTION = "sequence_parallel"


class Attending(Protocol):
    """What the keyword `sequence` of a decoder's call holds."""

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention of this rank's queries to the keys of all ranks.

        Args:
            module: the attention layer.
            query: [1, heads, tokens, head_dim].
            key, value: [1, kv_heads, tokens, head_dim].
            scaling: of the scores.

        Returns:
            [1, tokens, heads, head_dim].
        """
        ...


@dataclass(frozen=True)
class SharedSequence:
    """A pack of documents whose tokens all ranks of a sequence group share: attention in two dimensions.

    Within a row heads are exchanged for tokens, then keys and values go round the ring, then tokens for heads. Where
    there are fewer heads of keys and values than ranks in a row, they are repeated so often that each rank gets one.

    Attributes:
        plan: of the pack.
        topology: of the ranks.
        device: where they compute.
    """

    plan: SequencePlan
    topology: Topology
    device: torch.device

    @cached_property
    def layout(self) -> RingLayout:
        return RingLayout.of(self.plan, self.device)

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """See `Attending`."""
        ulysses = self.topology.ulysses
        kv_heads = key.shape[1]
        if kv_heads % ulysses:
            key, value = (states.repeat_interleave(ulysses // kv_heads, dim=1) for states in (key, value))
        # [tokens, groups of heads, heads, head_dim] each; together they take one exchange.
        parts = [states[0].transpose(0, 1).unflatten(1, (ulysses, -1)) for states in (query, key, value)]
        sizes = [part.shape[2] for part in parts]
        query, key, value = scatter_heads(torch.cat(parts, dim=2), self.topology.ulysses_group).split(sizes, dim=1)
        out = ring_attention(query, key, value, self.layout, scaling, self.topology.ring_group)
        return gather_heads(out, self.topology.ulysses_group)[None]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequence: Attending | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it."""
    if sequence is None:
        raise ParallelError("the decoder was called without sequence=; accepted: what says who holds which token")
    unknown = {
        "attention_mask": attention_mask,
        "sliding_window": options.get("sliding_window"),
        "softcap": options.get("softcap"),
        "s_aux": options.get("s_aux"),
        "dropout": dropout or None,
        "output_attentions": options.get("output_attentions") or None,
    }
    if given := [name for name, value in unknown.items() if value is not None]:
        raise ParallelError(f"attention with {', '.join(given)}; accepted under sequence parallelism: without")
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings are in fp32 there, attention is not
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (states.to(dtype) for states in (query, key, value))
    return sequence.attend(module, query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


# Without a name in the registry of masks, so that none is made; collectives are nothing to compile.
ALL_ATTENTION_FUNCTIONS.register(ATTENTION, torch.compiler.disable(_attention))


@contextmanager
def sequence_attention(model: PreTrainedModel, ulysses: int = 1) -> Iterator[None]:
    """Lets a model's decoder attend as the keyword `sequence` says; the vision tower keeps its own attention.

    Args:
        model: with a decoder of full attention and rotary positions.
        ulysses: ranks of a row, which share the heads.

    Raises:
        ParallelError: the heads can't be shared so.
        ValueError: the decoder is of another kind.
    """
    config = attention_config(decoder_of(model))
    check_heads(config, ulysses)
    own = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = own
