"""FasterVLM: the patches that the vision tower's CLS token looks at most.

[CLS] Attention is All You Need for Training-Free Visual Token Pruning (2024), https://arxiv.org/abs/2412.01818.
"""

from dataclasses import dataclass

from .base import check_keep
from .towers import Choice, TowerPruner, VisualMap, best_of_tiles


@dataclass(frozen=True)
class FasterVLM(TowerPruner):
    """Ranks by the CLS token's attention, head mean, in the layer whose output is projected (of 24 the 23rd in LLaVA).

    Attributes:
        keep: fraction of each tile's tokens that is kept (the paper's 1 - R: 0.5, 0.25, 0.1, 0.05), in raster order.
        reindex: the LLM's positions are contiguous, as in the paper.

    Raises:
        ValueError: a field is out of range.
    """

    keep: float = 0.25
    reindex: bool = True

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def choose(self, image: VisualMap) -> Choice:
        return Choice(best_of_tiles(image.attention[0], image, self.keep))
