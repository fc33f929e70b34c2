"""How many columns a policy keeps, and which: what rates highest, and what came last."""

from dataclasses import dataclass

import torch

from .base import Policy


@dataclass(frozen=True)
class Budgeted(Policy):
    """A policy that keeps a fraction of a prompt's columns, or a number of them.

    Attributes:
        keep: fraction of each row's columns that is kept, rounded, halves to even; at least one column is.
        tokens: columns that are kept, whatever the prompt's length; None: `keep` says it.

    Raises:
        ValueError: a field is out of range.
    """

    keep: float = 0.25
    tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; accepted: a fraction above 0, up to 1")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; accepted: at least 1, or none")

    def check_part(self, name: str) -> None:
        """Raises ValueError unless the field of that name is a part of the budget."""
        part = getattr(self, name)
        if not 0 <= part <= 1:
            raise ValueError(f"{name} is {part}; accepted: a fraction from 0 to 1")

    def budget(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns to keep of so many, int64 of the same shape."""
        if self.tokens is not None:
            return columns.clamp(max=self.tokens)
        return part_of(columns, self.keep).clamp(min=1)


def part_of(counts: torch.Tensor, part: float) -> torch.Tensor:
    """A fraction of whole numbers, int64; halves are rounded to even."""
    return (counts.double() * part).round().long()


def highest(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Where the highest of the last dim are, the first of equal ones.

    Args:
        scores: [..., columns].
        counts: int64 [...], broadcast: how many.

    Returns:
        bool [..., columns].
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = torch.arange(scores.shape[-1], device=scores.device) < counts[..., None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, ranked.expand_as(order))


def latest(live: torch.Tensor, counts: torch.Tensor | int) -> torch.Tensor:
    """Where the last live columns are.

    Args:
        live: bool [..., columns], False at holes.
        counts: int64 [...], broadcast: how many.

    Returns:
        bool [..., columns].
    """
    if isinstance(counts, torch.Tensor):
        counts = counts[..., None]
    behind = live.sum(-1, keepdim=True) - live.cumsum(-1)  # live columns after each
    return live & (behind < counts)
