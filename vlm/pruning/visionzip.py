"""VisionZip: the patches that the vision tower looks at most, and a few tokens that the rest is merged into.

VisionZip: Longer is Better but Not Necessary in Vision Language Models (CVPR 2025), https://arxiv.org/abs/2412.04467.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import check_keep
from .towers import Choice, TowerPruner, VisualMap, best, budget


@dataclass(frozen=True)
class VisionZip(TowerPruner):
    """Keeps dominant tokens by the CLS token's attention (without one: the attention received) and merges the others.

    Where columns are tower tokens in one run (LLaVA-1.5), the CLS token is the first of the dominant ones, as in the
    paper. A tile of no more tokens than its budget stays as it is.

    Attributes:
        dominant: of each tile, the CLS token counted; the paper's pairs are 54 + 10, 108 + 20 and 162 + 30 of 576.
        contextual: merged tokens of each tile.
        keep: fraction of each tile's tokens that is kept; `dominant` and `contextual` are then its proportions.
        reindex: the LLM's positions are contiguous, and a tile's tokens stand in the paper's order: CLS, dominant,
            contextual. Otherwise each stays at its place, a merged one at that of the token that the others went into.

    Raises:
        ValueError: a field is out of range.
    """

    wants_keys: ClassVar[bool] = True
    dominant: int = 54
    contextual: int = 10
    keep: float | None = None
    reindex: bool = True

    def __post_init__(self) -> None:
        if self.dominant < 1 or self.contextual < 0:
            raise ValueError(f"dominant, contextual are {self.dominant}, {self.contextual}; accepted: at least 1 and 0")
        if self.keep is not None:
            check_keep(self.keep)

    def choose(self, image: VisualMap) -> Choice:
        assert image.keys is not None
        keep, source = [image.tile[:0]], [image.tile[:0]]
        into = torch.full_like(image.tile, -1)
        for columns in image.tiles().values():
            dominant, contextual = self.counts(len(columns))
            if dominant + contextual >= len(columns):
                keep.append(columns)
                source.append(columns)
                continue
            one_run = bool(columns[-1] - columns[0] + 1 == len(columns))
            cls = int(image.gives_cls and one_run and dominant > 0)
            kept, targets, members, assigned = zip_tokens(
                image.attention[0, columns], image.keys[columns], dominant - cls, contextual
            )
            into[columns[members]] = columns[targets[assigned]] if len(targets) else -1
            order, free = torch.cat([kept, targets]), members[:cls]  # the CLS token takes a dropped one's place
            places = torch.cat([free, order])
            sources = torch.cat([torch.full_like(free, -1), columns[order]])
            if self.reindex and one_run:
                places = places.sort().values
            keep.append(columns[places])
            source.append(sources)
        kept = torch.cat(keep)
        order = kept.argsort()
        return Choice(kept[order], into, torch.cat(source)[order])

    def counts(self, tokens: int) -> tuple[int, int]:
        """(dominant, contextual) of a tile of so many tokens."""
        if self.keep is None:
            return self.dominant, self.contextual
        total = budget(tokens, self.keep)
        contextual = min(max(0, total - 1), round(total * self.contextual / (self.dominant + self.contextual)))
        return total - contextual, contextual


def zip_tokens(
    scores: torch.Tensor, keys: torch.Tensor, dominant: int, contextual: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chooses dominant tokens, targets at regular steps through the rest, and the nearest target of each other one.

    Args:
        scores: [tokens].
        keys: [tokens, head_dim].
        dominant: how many are taken by score.
        contextual: how many targets there are, at most.

    Returns:
        Dominant tokens [dominant] and targets [contextual], ascending; the other tokens [rest], ascending, and the
        index of the target whose keys each is most like (cosine), [rest].
    """
    top = best(scores, dominant)
    is_rest = torch.ones_like(scores, dtype=torch.bool)
    is_rest[top] = False
    rest = is_rest.nonzero()[:, 0]
    if not contextual:
        return top, rest[:0], rest, rest[:0]
    step = max(1, len(rest) // contextual)
    is_target = torch.zeros_like(rest, dtype=torch.bool)
    is_target[: step * contextual : step] = True
    targets, others = rest[is_target], rest[~is_target]
    directions = torch.nn.functional.normalize(keys, dim=-1)
    return top, targets, others, (directions[others] @ directions[targets].T).argmax(-1)
