"""LOOK-M: text stays before images, and what is evicted is merged into what stays.

LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference (EMNLP 2024 Findings),
https://arxiv.org/abs/2406.18139, "Text-Prior KV Pairs Eviction" and "KV Pairs Merging Strategies".
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch.nn import functional as F

from .base import Eviction, Seen
from .budget import Budgeted, highest, latest, part_of
from .scores import received_attention

SIMILARITIES_AT_ONCE = 1 << 24  # bounds the memory: numbers that are held at a time (64 MiB in float32)

Merge = Literal["averaged", "pivotal", "weighted", "none"]


@dataclass(frozen=True)
class LookM(Budgeted):
    """After a prefill, once: in each KV head, the latest of its columns and those of the others that rate highest.

    A column's rating is the softmax attention from all queries of the prompt, averaged over the heads that share a KV
    head; text has the head's highest rating on top, so that images go first. Only columns that the prefill added are
    evicted.

    Attributes:
        keep: fraction of a prefill's columns that is kept; the paper's is 0.2.
        tokens: columns of a prefill that are kept; None: `keep` says it.
        recent: part of the budget that goes to the latest columns, rounded, halves to even; the paper's is one half.
        merge: how an evicted key and value enter those kept whose key is nearest by cosine: see `merged`.

    Raises:
        ValueError: a field is out of range; in use, nobody told which tokens are visual.
    """

    keep: float = 0.2
    recent: float = 0.5
    merge: Merge = "pivotal"
    needs_visual: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_part("recent")
        if self.merge not in get_args(Merge):
            raise ValueError(f"merge is {self.merge!r}; accepted: {', '.join(get_args(Merge))}")

    def evict(self, seen: Seen) -> Eviction | None:
        if seen.new <= (self.tokens or 0) or not seen.is_prefill:
            return None
        if seen.visual is None:
            raise ValueError(
                "nobody told which tokens are visual, as look-m must know; accepted: foveate.reduce(model, kv=...), or "
                "KVCache.see before each prompt"
            )
        start = seen.first_new
        slots = seen.slots[:, :, start:]  # [batch, 1 | kv_heads, new]
        live = slots >= 0
        text = live & ~seen.visual[:, None].expand(-1, slots.shape[1], -1).gather(2, slots.clamp(min=0))
        ratings = received_attention(seen)[:, :, start:]
        ratings = ratings + text * ratings.amax(-1, keepdim=True)
        budget = self.budget(live.sum(-1))
        recent = latest(live, part_of(budget, self.recent))
        keep = live & highest(ratings.masked_fill(recent, torch.inf).masked_fill(~live, -torch.inf), budget)
        if self.merge == "none":
            return Eviction(keep, start)
        keys, values = merged(*seen.store.dense(start), keep, live & ~keep, self.merge)
        return Eviction(keep, start, keys, values)


def merged(
    keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor, evicted: torch.Tensor, how: Merge
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges each evicted key and value into those kept whose key is nearest by cosine.

    With L evicted x_i that have the same nearest kept one c, at cosines s_i:
    averaged: (c + Σ x_i) / (L + 1); pivotal: (c + Σ (x_i + c) / 2) / (L + 1); weighted: (c + Σ s_i x_i) / (L + 1).

    Args:
        keys, values: [batch, kv_heads, columns, head_dim].
        keep, evicted: bool [batch, kv_heads, columns], disjoint.

    Returns:
        Keys and values of all columns, new where something was merged.
    """
    dtype = torch.promote_types(keys.dtype, torch.float32)
    kept, is_kept = _columns(keep)
    gone, is_gone = _columns(evicted)
    if not gone.shape[2]:
        return keys, values
    anchors = F.normalize(_take(keys, kept).to(dtype), dim=-1)
    best, nearest = [], []  # [batch, kv_heads, evicted]
    for some in gone.split(max(1, SIMILARITIES_AT_ONCE // kept.numel()), dim=2):
        similarity = F.normalize(_take(keys, some).to(dtype), dim=-1) @ anchors.mT
        value, index = similarity.masked_fill(~is_kept[:, :, None], -torch.inf).max(-1)
        best.append(value)
        nearest.append(index)
    into, similarity = torch.cat(nearest, dim=2), torch.cat(best, dim=2)
    weight = {"averaged": torch.ones_like(similarity), "pivotal": torch.full_like(similarity, 0.5)}
    share = weight.get(how, similarity) * is_gone
    count = torch.zeros_like(anchors[..., 0]).scatter_add(2, into, is_gone.to(dtype))  # L, [batch, kv_heads, kept]
    own = 1 + count / 2 if how == "pivotal" else torch.ones_like(count)
    new = []
    for states in (keys, values):
        old = _take(states, kept)
        mixed = old.to(dtype) * own[..., None]
        mixed.scatter_add_(
            2, into[..., None].expand(-1, -1, -1, states.shape[3]), _take(states, gone) * share[..., None]
        )
        mixed = torch.where((is_kept & (count > 0))[..., None], (mixed / (count + 1)[..., None]).to(states.dtype), old)
        new.append(states.scatter(2, kept[..., None].expand_as(mixed), mixed))
    return new[0], new[1]


def _columns(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the chosen columns, int64 [batch, kv_heads, most], and which of them count; the rest is filled up."""
    counts = chosen.sum(-1, keepdim=True)
    order = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :, : int(counts.max())]
    return order, torch.arange(order.shape[2], device=order.device) < counts


def _take(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return states.gather(2, columns[..., None].expand(-1, -1, -1, states.shape[3]))
