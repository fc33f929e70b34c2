"""What a prefill costs: visual tokens that each layer processes, operations, bytes of the KV cache.

Operations come in two ways: by the formula that the papers give their figures in, and as this package and
transformers compute them, from which a benchmark predicts a speed-up.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from .base import Prefill, Pruner


@dataclass(frozen=True)
class Decoder:
    """Sizes of an LLM with grouped-query attention and gated MLPs.

    Attributes:
        windows: of each layer's attention, in tokens; None where it sees all before.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    windows: tuple[int | None, ...]

    @classmethod
    def from_config(cls, config: Any) -> "Decoder":
        """Reads the configuration of a model or of its LLM.

        Raises:
            ValueError: it lacks a size, or its layers are others (experts, latent attention, state spaces).
        """
        text = config.get_text_config(decoder=True)
        sizes = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "vocab_size")
        if lacking := [name for name in sizes if not isinstance(getattr(text, name, None), int)]:
            raise ValueError(f"text_config {text.model_type} has no {', '.join(lacking)}; accepted: LLMs as Llama's")
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank"):
            if getattr(text, name, None):
                raise ValueError(
                    f"text_config {text.model_type} has {name} {getattr(text, name)}; accepted: LLMs with "
                    "grouped-query attention and one gated MLP a layer"
                )
        heads = text.num_attention_heads
        window = getattr(text, "sliding_window", None)
        kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
        accepted = {"full_attention": None, "sliding_attention": window}
        if unknown := sorted(set(kinds) - set(accepted)):
            raise ValueError(f"text_config {text.model_type} has layers {unknown}; accepted: {', '.join(accepted)}")
        return cls(
            width=text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            inner=text.intermediate_size,
            vocabulary=text.vocab_size,
            windows=tuple(accepted[kind] for kind in kinds),
        )

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def linear_flops(self) -> float:
        """Operations of a layer's weights for a token."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2.0 * (attention + 3 * self.width * self.inner)

    @property
    def row_flops(self) -> float:
        """Operations of q·k in all heads for a pair of tokens; a layer's attention takes as many again for p·v."""
        return 2.0 * self.heads * self.head_dim


@dataclass(frozen=True)
class Cost:
    """What a prefill costs, all samples together.

    Attributes:
        visual: visual tokens that each layer processes.
        paper_flops: multiply-adds by the papers' formula.
        flops: operations, two a multiply-add, as computed.
        kv_bytes: of the tokens that this prefill adds to the KV cache.
    """

    visual: tuple[int, ...]
    paper_flops: float
    flops: float
    kv_bytes: int

    @property
    def mean_visual(self) -> float:
        """Visual tokens that a layer processes, the mean over the layers: "processed visual tokens"."""
        return sum(self.visual) / len(self.visual)


@dataclass(frozen=True)
class Summary:
    """A prefill against the same one with nothing dropped."""

    pruned: Cost
    full: Cost

    @property
    def speed_up(self) -> float:
        """What the operations say."""
        return self.full.flops / self.pruned.flops

    def lines(self) -> tuple[str, str]:
        """For people: visual tokens by layer; means, operations and KV cache against unpruned."""
        runs, first = [], 0
        for count, layers in groupby(self.pruned.visual):
            last = first + len(list(layers)) - 1
            runs.append(f"{count} in layer{f's {first}-{last}' if last > first else f' {first}'}")
            first = last + 1
        pruned, full = self.pruned, self.full
        against = ", ".join(
            f"{name} {_units(value, unit)} of {_units(whole, unit)} ({value / whole:.1%})" if whole else f"{name} 0"
            for name, value, whole, unit in (
                ("processed visual tokens (mean)", pruned.mean_visual, full.mean_visual, ""),
                ("prefill", pruned.flops, full.flops, "FLOPs"),
                ("KV cache", pruned.kv_bytes, full.kv_bytes, "B"),
            )
        )
        return f"visual tokens: {', '.join(runs)}", against


def summary(
    config: Any, prefill: Prefill, methods: Iterable[object] = (), dtype: torch.dtype = torch.bfloat16
) -> Summary:
    """Costs of a prefill, and of the same one unpruned.

    Args:
        config: of the model or its LLM.
        methods: what dropped; the scoring of those inside the LLM is counted, others score nothing there.
        dtype: of the KV cache.

    Raises:
        ValueError: as `Decoder.from_config`; or the prefill has other layers than the LLM.
    """
    decoder = Decoder.from_config(config)
    return Summary(cost(decoder, prefill, methods, dtype), cost(decoder, unpruned(prefill), (), dtype))


def unpruned(prefill: Prefill) -> Prefill:
    """The same prefill with nothing dropped."""
    return replace(prefill, visual=(prefill.given,) * len(prefill.visual), stages=())


def cost(
    decoder: Decoder, prefill: Prefill, methods: Iterable[object] = (), dtype: torch.dtype = torch.bfloat16
) -> Cost:
    """Everything of one prefill; arguments as of `summary`."""
    if len(prefill.visual) != decoder.layers:
        raise ValueError(f"the prefill has {len(prefill.visual)} layers; accepted: the LLM's {decoder.layers}")
    return Cost(
        tuple(sum(layer) for layer in prefill.visual),
        paper_flops(decoder, prefill),
        prefill_flops(decoder, prefill)
        + sum(scoring_flops(decoder, prefill, m) for m in methods if isinstance(m, Pruner)),
        kv_bytes(decoder, prefill, dtype),
    )


def paper_flops(decoder: Decoder, prefill: Prefill) -> float:
    """By 4nd² + 2n²d + 3ndm a layer: n tokens, text too, width d, MLP of width m; multiply-adds, attention not causal.

    FastV (arXiv 2403.06764, section 4) has 2ndm, for an MLP without gate; with one it is 3ndm, as in PyramidDrop
    (arXiv 2410.17247, section 3.3) and SparseVLM (arXiv 2410.04417).
    """
    d, m = decoder.width, decoder.inner
    return sum(4.0 * n * d**2 + 2.0 * n**2 * d + 3.0 * n * d * m for layer in _tokens(prefill) for n in layer)


def prefill_flops(decoder: Decoder, prefill: Prefill) -> float:
    """Operations of the LLM's layers, and of its head for each sample's last token.

    Two a multiply-add; causal attention that skips what no token sees; no padding; norms, softmax and activations left
    out. Tokens that are in the KV cache from earlier turns count at full length.
    """
    total = 2.0 * decoder.width * decoder.vocabulary * len(prefill.text)
    for layer, window in zip(_tokens(prefill), decoder.windows, strict=True):
        for tokens, past in zip(layer, prefill.past, strict=True):
            total += decoder.linear_flops * tokens + 2 * decoder.row_flops * _pairs(tokens, past, window)
    return total


def scoring_flops(decoder: Decoder, prefill: Prefill, method: Pruner) -> float:
    """Operations of a method's scores: rater rows, and keys and the raters' queries where a layer is asked beforehand.

    Where a method chooses raters among the text, all of it is counted as raters, which is the most that can be.
    """
    if method.scored_by == "nothing":
        return 0.0
    total, tokens = 0.0, _tokens(prefill)
    chooses = type(method).raters is not Pruner.raters
    for sample, (text, past) in enumerate(zip(prefill.text, prefill.past, strict=True)):
        if not prefill.given[sample]:
            continue
        raters = max(1, text) if chooses else 1
        if chooses:
            total += 2.0 * decoder.width * text * prefill.given[sample]
        for layer in method.stages:
            keys = tokens[layer - 1][sample]
            total += decoder.row_flops * raters * (keys + past)
            if method.scored_by == "own":
                total += 2.0 * decoder.width * decoder.head_dim * (decoder.kv_heads * keys + decoder.heads * raters)
    return total


def kv_bytes(decoder: Decoder, prefill: Prefill, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of keys and values that the prefill adds to the cache: what each layer processes, it keeps."""
    each = 2 * decoder.kv_heads * decoder.head_dim * dtype.itemsize
    return each * sum(sum(layer) for layer in _tokens(prefill))


def _tokens(prefill: Prefill) -> list[list[int]]:
    """[layers][samples], text and visual tokens."""
    return [[text + seen for text, seen in zip(prefill.text, layer, strict=True)] for layer in prefill.visual]


def _pairs(tokens: int, past: int, window: int | None) -> int:
    """Pairs of a new token and one that it attends to: itself and those before, at most `window`."""
    near = tokens if window is None else max(0, min(tokens, window - past))  # that see everything before them
    return near * past + near * (near + 1) // 2 + (tokens - near) * (window or 0)


def _units(value: float, unit: str) -> str:
    for step in ("", "k", "M", "G", "T", "P"):
        if value < 1000 or step == "P":
            break
        value /= 1000
    return f"{value:.4g}{' ' if step + unit else ''}{step}{unit}"
