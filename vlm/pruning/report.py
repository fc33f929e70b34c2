"""What a reduction saved, for people and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .base import Prefill
from .costs import Summary, summary
from .parse import method_text
from .session import Reduction


def mean_visual_tokens(prefills: Sequence[Prefill]) -> tuple[float, float]:
    """Visual tokens of a sample, and how many of them a layer processed: means over samples that have any, and layers.

    Merged tokens are counted too.
    """
    samples = [
        (given, sum(layer[sample] for layer in prefill.visual) / len(prefill.visual))
        for prefill in prefills
        for sample, given in enumerate(prefill.given)
        if given
    ]
    if not samples:
        return 0.0, 0.0
    given, processed = (sum(values) / len(samples) for values in zip(*samples, strict=True))
    return given, processed


def cost_lines(reduction: Reduction, since: int = 0) -> list[str]:
    """Of each prefill from number `since` on: visual tokens by layer; means, FLOPs and KV bytes against unpruned."""
    told: list[str] = []
    for prefill in reduction.prefills[since:]:
        costs = _summary(reduction, prefill)
        given, processed = mean_visual_tokens([prefill])
        told += costs.lines() if costs else [f"processed visual tokens (mean) {processed:.4g} of {given:.4g}"]
    return told


def costs_of_first(reduction: Reduction) -> dict[str, Any]:
    """The methods, and of the first prefill visual tokens by layer, FLOPs and bytes of KV cache, pruned and not.

    Only the methods where no visual tokens were read; no costs of an LLM that `costs.py` does not know.
    """
    told: dict[str, Any] = {"methods": [method_text(method) for method in reduction.methods]}
    costs = _summary(reduction, reduction.prefills[0]) if reduction.prefills else None
    if costs:
        for name, cost in (("pruned", costs.pruned), ("full", costs.full)):
            told[name] = asdict(cost) | {"mean_visual": cost.mean_visual}
    return told


def _summary(reduction: Reduction, prefill: Prefill) -> Summary | None:
    model = reduction.architecture.model
    try:
        return summary(model.config, prefill, reduction.methods, model.dtype)
    except ValueError:  # an LLM of other layers, whose costs are not known
        return None
