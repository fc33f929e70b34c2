"""PyramidDrop: visual tokens are dropped in stages, more of them the deeper the layer.

PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction (CVPR 2025),
https://arxiv.org/abs/2410.17247, section 3.2.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .base import Pruner, Selection, Sight, check_keep, check_layers


@dataclass(frozen=True)
class PyramidDrop(Pruner):
    """Ranks by what a stage's first layer would attend to, averaged over heads, from the last prompt token.

    Attributes:
        layers: the first layer that reads fewer visual tokens, of each stage; the paper's are 8, 16, 24 of 32.
        keep: fraction of the prompt's visual tokens that each stage leaves, rounded down; it never rises.
        reindex: kept tokens get contiguous positions, as in the paper; otherwise they keep their own.

    Raises:
        ValueError: a field is out of range.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    reindex: bool = True
    scored_by: ClassVar[Literal["previous", "own", "nothing"]] = "own"

    def __post_init__(self) -> None:
        check_layers(self.layers)
        for keep in self.keep:
            check_keep(keep)
        if len(self.keep) != len(self.layers) or sorted(self.keep, reverse=True) != list(self.keep):
            raise ValueError(f"keep is {self.keep}; accepted: {len(self.layers)} fractions, none above the one before")

    @property
    def stages(self) -> tuple[int, ...]:
        return self.layers

    @property
    def reindexes(self) -> bool:
        return self.reindex

    def select(self, stage: int, sight: Sight) -> Selection:
        assert sight.attention is not None
        scores = sight.attention.head_mean()[-1]  # [visual]
        kept = min(int(sight.total * self.keep[stage]), len(scores))
        return Selection(scores.topk(kept).indices.sort().values)
