"""H2O: the tokens that received most attention so far, and the latest ones.

H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (NeurIPS 2023),
https://arxiv.org/abs/2306.14048, section 4, algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Eviction, Seen
from .budget import Budgeted, highest, latest, part_of
from .scores import received_attention


@dataclass(frozen=True)
class H2O(Budgeted):
    """After every pass, in each KV head: heavy hitters and the latest columns, as many as the prompts' budget.

    A column's score is the softmax attention that it received from all queries that saw it, averaged over the heads
    that share a KV head. The budget grows with prompts, not with generated tokens: each of these evicts one.

    Attributes:
        keep: fraction of the prompts' columns that is kept; the paper's is 0.2.
        tokens: columns that are kept, the paper's k; None: `keep` says it.
        recent: part of the budget that goes to the latest columns, rounded, halves to even; the paper's is one half.

    Raises:
        ValueError: a field is out of range.
    """

    keep: float = 0.2
    recent: float = 0.5
    evicts_in_decode: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_part("recent")

    def evict(self, seen: Seen) -> Eviction:
        scores = received_attention(seen)
        if seen.scores is not None:
            scores[:, :, : seen.first_new] += seen.scores
        live = seen.slots >= 0  # [batch, 1 | kv_heads, columns]
        if seen.is_prefill or "prompt" not in seen.memory:
            came = live[:, 0, seen.first_new :].sum(-1)
            seen.memory["prompt"] = seen.memory.get("prompt", 0) + came  # [batch], columns of all prompts
        if seen.store.columns <= (self.tokens or 0):
            return Eviction(scores=scores)
        budget = self.budget(seen.memory["prompt"] if self.tokens is None else live[:, 0].sum(-1))[:, None]
        recent = latest(live, part_of(budget, self.recent))
        wanted = scores.masked_fill(recent, torch.inf).masked_fill(~live, -torch.inf)
        return Eviction(live & highest(wanted, budget), scores=scores)
