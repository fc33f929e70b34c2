"""HiRED: a fixed budget of visual tokens, spread over an image's tiles by where its content is.

HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models (AAAI 2025),
https://arxiv.org/abs/2408.10945.
"""

import math
from dataclasses import dataclass

import torch

from .base import check_keep
from .towers import Choice, TowerPruner, VisualMap, best


@dataclass(frozen=True)
class HiRED(TowerPruner):
    """Spreads the budget by the CLS token's attention in the tower's first layer; ranks by that in the layer projected.

    Where no tile shows the whole image besides others, the fraction `keep` of every tile is kept.

    Attributes:
        keep: fraction of an image's tokens that is kept, the paper's token budget (0.2, 0.4).
        alpha: share of the budget that the tile of the whole image has.
        strips: parts of the whole image stand for tiles as in the published program: strips of consecutive tokens.
            Otherwise they are the rectangles that the tiles show.
        reindex: the LLM's positions are contiguous, as in the paper.

    Raises:
        ValueError: a field is out of range.
    """

    keep: float = 0.2
    alpha: float = 0.5
    strips: bool = False
    reindex: bool = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; accepted: 0 to 1")

    def layers(self, read: int) -> tuple[int, ...]:
        return (0, read)

    def choose(self, image: VisualMap) -> Choice:
        tiles, (first, last) = image.tiles(), image.attention
        budgets = {tile: int(len(columns) * self.keep) for tile, columns in tiles.items()}
        if image.cut is not None and len(tiles) > 1:
            whole, count = image.cut.whole, math.prod(image.cut.grid)
            total = int(sum(map(len, tiles.values())) * self.keep)
            part = parts(image.cut.cells, image.cut.grid, self.strips).to(first.device)
            shares = share_budget(first[tiles[whole]], part, count, total, self.alpha)
            budgets = dict(zip([whole, *(tile for tile in range(count + 1) if tile != whole)], shares, strict=True))
        chosen = [columns[best(last[columns], budgets[tile])] for tile, columns in tiles.items()]
        return Choice(torch.cat(chosen).sort().values if chosen else image.tile[:0])


def parts(cells: tuple[int, int], grid: tuple[int, int], strips: bool) -> torch.Tensor:
    """The part that each token of a map falls in where it is cut in a grid of equal parts, in raster order.

    Args:
        cells: (rows, columns) of the map.
        grid: (rows, columns) of the parts.
        strips: parts are strips of consecutive tokens instead.

    Returns:
        [tokens] int64.
    """
    if strips:
        return torch.arange(math.prod(cells)) * math.prod(grid) // math.prod(cells)
    rows, columns = ((2 * torch.arange(n) + 1) * k // (2 * n) for n, k in zip(cells, grid, strict=True))
    return (rows[:, None] * grid[1] + columns).flatten()


def share_budget(scores: torch.Tensor, part: torch.Tensor, count: int, total: int, alpha: float) -> list[int]:
    """Budgets of the whole image and of its tiles.

    Args:
        scores: [tokens] of the whole image in the first layer.
        part: [tokens] int64, which tile's part of the image each of them is.
        count: tiles besides the whole image.
        total: tokens to keep.
        alpha: see `HiRED`.

    Returns:
        1 + count numbers of tokens; the tiles' are in proportion to their share of the best of the scores.
    """
    whole = min(int(total * alpha), len(scores))
    top = best(scores, int(len(scores) * (1 - alpha)))
    found = part[top].bincount(minlength=count).tolist()
    return [whole, *(number * (total - whole) // max(1, len(top)) for number in found)]
