"""VTC-CLS: as FasterVLM, the CLS token's attention summed over several layers.

[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs (2024), https://arxiv.org/abs/2412.05819.
"""

from dataclasses import dataclass

from .base import check_keep
from .towers import Choice, TowerPruner, VisualMap, best_of_tiles


@dataclass(frozen=True)
class VTCCLS(TowerPruner):
    """Ranks by the CLS token's attention, head mean, summed over the layers from `start` to the one that is projected.

    Attributes:
        keep: fraction of each tile's tokens that is kept, in raster order.
        start: the first layer, 0-based; None: half-way to the one that is projected (11 of LLaVA-1.5's 22).
        reindex: the LLM's positions are contiguous, as in the paper.

    Raises:
        ValueError: a field is out of range.
    """

    keep: float = 0.25
    start: int | None = None
    reindex: bool = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.start is not None and self.start < 0:
            raise ValueError(f"start is {self.start}; accepted: a layer's number, from 0 on")

    def layers(self, read: int) -> tuple[int, ...]:
        start = read // 2 if self.start is None else self.start
        if start > read:
            raise ValueError(f"start is {start}; this tower's layer {read} is projected; accepted: 0 to {read}")
        return tuple(range(start, read + 1))

    def choose(self, image: VisualMap) -> Choice:
        return Choice(best_of_tiles(image.attention.sum(0), image, self.keep))
