"""SnapKV: what the prompt's last tokens look at is kept, head by head.

SnapKV: LLM Knows What You are Looking for Before Generation (NeurIPS 2024), https://arxiv.org/abs/2404.14469,
section 4.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from .base import Eviction, Seen
from .budget import Budgeted, highest, latest
from .scores import received_attention


@dataclass(frozen=True)
class SnapKV(Budgeted):
    """After a prefill: the columns that the observation window votes for, and the window.

    Votes are softmax attention of the window's queries, summed, and averaged over the heads that share a KV head. They
    are pooled over neighbouring columns, so that details around a chosen one stay with it. Only columns that the
    prefill added are evicted; rows that have no more of them than the window keep all.

    Attributes:
        keep: fraction of a prefill's columns that is kept, the window among them.
        tokens: columns of a prefill that are kept, the window among them: the paper's capacity; None: `keep` says it.
        window: columns of the observation window, which always stay.
        kernel: columns over which votes are pooled, an odd number.
        pooling: `mean`, as in the published code's defaults, or `max`.

    Raises:
        ValueError: a field is out of range.
    """

    window: int = 32
    kernel: int = 7
    pooling: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window is {self.window}; accepted: at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}; accepted: an odd number")
        if self.pooling not in ("mean", "max"):
            raise ValueError(f"pooling is {self.pooling!r}; accepted: mean, max")

    def evict(self, seen: Seen) -> Eviction | None:
        if seen.new <= max(self.window, self.tokens or 0) or not seen.is_prefill:
            return None
        start = seen.first_new
        live = seen.slots[:, :, start:] >= 0  # [batch, 1 | kv_heads, new]
        window = latest(live, self.window)
        votes = received_attention(seen, self.window)[:, :, start:]
        votes = self.pooled(votes.masked_fill(window | ~live, 0))
        votes = votes.masked_fill(window, torch.inf).masked_fill(~live, -torch.inf)
        count = live.sum(-1)
        return Eviction(live & highest(votes, torch.maximum(self.budget(count), count.clamp(max=self.window))), start)

    def pooled(self, votes: torch.Tensor) -> torch.Tensor:
        """Votes [batch, kv_heads, columns] over neighbours, of which there are none beyond the ends."""
        pool = F.avg_pool1d if self.pooling == "mean" else F.max_pool1d
        return pool(votes, self.kernel, stride=1, padding=self.kernel // 2)
