"""Images to tiles and back, and how many tokens an image becomes, told from its size alone.

`Tiling` plans and cuts. The schemes:

- `resize`: one tile; the aspect ratio is not kept (VILA, arXiv 2312.07533).
- `s2`: the square image at several scales, each cut in tiles; every scale's features are area-pooled to one tile's grid
  and concatenated in channels (S², arXiv 2403.13043, section 3).
- `dynamic-s2`: likewise, but the largest scale keeps the aspect ratio, and its grid is the one that is read (NVILA,
  arXiv 2412.04468, section 2.1).
- `tiles`: a grid of tiles near the image's aspect ratio, then a thumbnail (InternVL 1.5, arXiv 2404.16821,
  section 3.3).
- `anyres`: a base tile, then an unpadded grid with newlines (LLaVA-NeXT, LLaVA-OneVision); see `anyres.py`.
- `native`: the image at its own aspect ratio, and size within bounds, cut in patches (NaViT, arXiv 2307.06304;
  Qwen2-VL, arXiv 2409.12191, section 2.1).

`split_tiles` and `merge_tiles` go from one map to its tiles and back; `merge_scales` makes one map of several scales.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from .anyres import FITS, GRIDS, fit_image, image_tokens, pick_grid
from .anyres import cut as cut_anyres

TILINGS = ("resize", "s2", "dynamic-s2", "tiles", "anyres", "native")

Grid = tuple[int, int]  # (rows, columns)
Array = TypeVar("Array", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class ImagePlan:
    """What an image becomes.

    Attributes:
        levels: (rows, columns) of the tiles of each level, in the order of `pixel_values`.
        tile: (height, width) of a tile in pixels; with tiling `native` a tile is a patch.
        grid: (rows, columns) of the level whose tokens are read.
        tokens: how many tokens the LLM reads.
    """

    levels: tuple[Grid, ...]
    tile: tuple[int, int]
    grid: Grid
    tokens: int

    @property
    def tiles(self) -> int:
        """Tiles of all levels."""
        return sum(rows * columns for rows, columns in self.levels)


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Args:
        scheme: one of `TILINGS`.
        tile: (height, width) of a tile in pixels; not used by `native`.
        patch_size: side of the tower's patches in pixels.
        r: side of the square of patches that becomes one token.
        prefix_tokens: CLS and register tokens of a tile that the model keeps; `resize` and `tiles` alone have room
            for them.
        scales: sides of the scales in tiles, the first 1; `s2` and `dynamic-s2` alone.
        min_tiles, max_tiles: bounds of the grid, `tiles` and `dynamic-s2` alone; the latter's minimum is the number of
            tiles of its largest scale's square, or of the largest square that `max_tiles` allows.
        thumbnail: `tiles` alone: a grid of several tiles is followed by the whole image in one.
        anyres_grids: grids that an image may have, `anyres` alone; all of up to 6 x 6 tiles when empty.
        anyres_max_tiles: tiles' worth of tokens above which the map is shrunk, `anyres` alone; None for any number.
        min_patches, max_patches: bounds of the patches of an image, `native` alone. The upper one always holds, the
            lower where a map of the image's aspect ratio lies between.
        tokens_per_tile: tokens of each tile where the projector has a fixed number of them; None: one for each r×r
            square of patches, which are padded right and below.
        fit: how `resize` makes an image a tile, see `anyres.fit_image`.
        background: RGB that `fit` pads with.
        aspect: width / height that `lower` keeps as it shrinks the tile; the tile's own when None.

    Raises:
        ValueError: a field has a value that is not accepted; the message names the field.
    """

    scheme: str
    tile: tuple[int, int]
    patch_size: int
    r: int
    prefix_tokens: int = 0
    scales: tuple[int, ...] = ()
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    anyres_grids: tuple[Grid, ...] = ()
    anyres_max_tiles: int | None = 9
    min_patches: int = 16
    max_patches: int = 4096
    tokens_per_tile: int | None = None
    fit: str = "stretch"
    background: tuple[int, int, int] = (0, 0, 0)
    aspect: float | None = None

    def __post_init__(self) -> None:
        if self.scheme not in TILINGS:
            raise ValueError(f"scheme is {self.scheme!r}; accepted: {', '.join(TILINGS)}")
        for name in ("patch_size", "r", "min_tiles", "max_tiles", "min_patches", "max_patches"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("tokens_per_tile", "anyres_max_tiles"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more, or None")
        fits = len(self.tile) == 2 and min(self.tile) >= self.patch_size
        self._require("tile", fits, f"(height, width), each at least patch_size {self.patch_size}")
        if self.scheme in ("s2", "dynamic-s2"):
            rising = all(a < b for a, b in pairwise(self.scales))
            self._require("scales", self.scales[:1] == (1,) and rising, "rising multiples of a tile, the first 1")
        else:
            self._require("scales", not self.scales, f"none with scheme {self.scheme!r}")
        if self.scheme in ("resize", "tiles"):
            self._require("prefix_tokens", self.prefix_tokens >= 0, "0 or more")
        else:
            self._require("prefix_tokens", self.prefix_tokens == 0, f"0 with scheme {self.scheme!r}, which makes maps")
        if self.scheme == "anyres":
            self._require("r", self.r == 1, "1 with scheme 'anyres'")
            self._require("tokens_per_tile", self.tokens_per_tile is None, "None with scheme 'anyres'")
        if self.scheme == "native":
            self._require("max_patches", self.max_patches >= self.r**2, f"at least r² = {self.r**2}, one token")
            self._require("min_patches", self.min_patches <= self.max_patches, f"1 to max_patches {self.max_patches}")
        grids = all(rows >= 1 and columns >= 1 for rows, columns in self.anyres_grids)
        self._require("anyres_grids", grids, "(rows, columns), each at least 1")
        self._require("min_tiles", self.min_tiles <= self.max_tiles, f"1 to max_tiles {self.max_tiles}")
        self._require("fit", self.fit in FITS, ", ".join(FITS))

    def _require(self, name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {accepted}")

    def plan(self, height: int, width: int) -> ImagePlan:
        """What an image of height × width pixels becomes; exact, without its pixels.

        Raises:
            ValueError: a side is under one pixel.
        """
        if height < 1 or width < 1:
            raise ValueError(f"image size is {height}x{width}; accepted: at least 1x1 pixels")
        if self.scheme == "anyres":
            grid = pick_grid((height, width), self.anyres_grids or GRIDS, self.tile)
            tokens = image_tokens((height, width), grid, self.cells, self.anyres_max_tiles)
            return ImagePlan(((1, 1), grid), self.tile, grid, tokens)
        if self.scheme == "native":
            grid = self._native_grid(height, width)
            tokens = self.tokens_per_tile or grid[0] * grid[1] // self.r**2
            return ImagePlan((grid,), (self.patch_size, self.patch_size), grid, tokens)
        grid = self._grid(height, width)
        levels = grid_levels(self.scheme, grid, self.scales, self.thumbnail)
        read = grid[0] * grid[1] + (len(levels) - 1 if self.scheme == "tiles" else 0)
        return ImagePlan(levels, self.tile, grid, read * self._tile_tokens())

    def cut(self, image: Image.Image | np.ndarray, plan: ImagePlan, resample: int) -> np.ndarray:
        """Resizes an image to each level of its plan and cuts it.

        Args:
            image: RGB image, PIL or uint8 [height, width, 3].
            plan: what `plan` gave for its size.
            resample: PIL's resampling filter.

        Returns:
            uint8 [plan.tiles, *plan.tile, 3], the levels in order, each in raster order.
        """
        if self.scheme == "anyres":
            return cut_anyres(_as_pil(image), plan.grid, plan.tile, resample)
        if self.scheme == "resize" and self.fit != "stretch":
            return to_tiles(
                [fit_image(_as_pil(image), plan.tile, self.fit, resample, self.background)], plan.tile, resample
            )
        tiles = np.empty((plan.tiles, *plan.tile, 3), dtype=np.uint8)
        start = 0
        for rows, columns in plan.levels:
            end = start + rows * columns
            size = (rows * plan.tile[0], columns * plan.tile[1])
            tiles[start:end] = split_tiles(to_tiles([image], size, resample)[0], (rows, columns))
            start = end
        return tiles

    def lower(self) -> "Tiling | None":
        """The next lower resolution, None where no tokens can be saved.

        `tiles`, `dynamic-s2` and `anyres` first lose their largest grids. Then, and with `resize` and `s2`, the tile's
        shorter side shrinks by one token, its aspect ratio kept as nearly as possible. `native` loses a tenth of its
        patches. No image has more tokens afterwards (`anyres`: unless its map is no longer shrunk).
        """
        if self.scheme == "native":
            most = self.max_patches // self.r**2  # tokens
            if self.tokens_per_tile is not None or most == 1:
                return None
            fewer = max(1, int(0.9 * most)) * self.r**2
            return replace(self, max_patches=fewer, min_patches=min(self.min_patches, fewer))
        if self.scheme in ("tiles", "dynamic-s2") and self.max_tiles > 1:
            fewer = self.max_tiles - 1
            least = self.min_tiles if self.min_tiles <= fewer else math.isqrt(fewer) ** 2
            return replace(self, max_tiles=fewer, min_tiles=least)
        if self.scheme == "anyres":
            most = max(map(math.prod, self.anyres_grids or GRIDS))
            smaller = tuple(grid for grid in self.anyres_grids or GRIDS if math.prod(grid) < most)
            if smaller:
                return replace(self, anyres_grids=smaller)
        rows, columns = self.cells
        if self.tokens_per_tile is not None or rows * columns == 1:
            return None
        aspect = self.aspect or self.tile[1] / self.tile[0]
        if min(rows, columns) == 1:
            rows, columns = max(1, rows - 1), max(1, columns - 1)
        elif rows <= columns:
            rows, columns = rows - 1, max(1, round((rows - 1) * aspect))
        else:
            rows, columns = max(1, round((columns - 1) / aspect)), columns - 1
        cell = self.patch_size * self.r
        return replace(self, tile=(rows * cell, columns * cell), aspect=aspect)

    @property
    def cells(self) -> Grid:
        """Rows and columns of a tile's tokens, prefix tokens apart."""
        side = self.patch_size
        return -(-(self.tile[0] // side) // self.r), -(-(self.tile[1] // side) // self.r)

    def _tile_tokens(self) -> int:
        if self.tokens_per_tile is not None:
            return self.tokens_per_tile
        return tokens_per_tile(self.tile, self.patch_size, self.r, self.prefix_tokens)

    def _grid(self, height: int, width: int) -> Grid:
        """Rows and columns of the tiles that are read."""
        if self.scheme in ("resize", "s2"):
            return 1, 1
        least = self.min_tiles
        if self.scheme == "dynamic-s2":  # as many as the largest scale has, or the largest square that may be
            least = min(self.scales[-1], math.isqrt(self.max_tiles)) ** 2
        return closest_grid(height, width, self.tile, least, self.max_tiles)

    def _native_grid(self, height: int, width: int) -> Grid:
        """Rows and columns of patches, multiples of r, as Qwen2-VL sizes images; no ratio is too extreme."""
        cell = self.patch_size * self.r
        least, most = -(-self.min_patches // self.r**2), self.max_patches // self.r**2  # in tokens
        rows, columns = max(1, round(height / cell)), max(1, round(width / cell))
        if rows * columns < least:  # the ceilings of √(least · height / width) and of its inverse
            rows = math.isqrt((least * height - 1) // width) + 1
            columns = math.isqrt((least * width - 1) // height) + 1
        if rows * columns > most:  # the floors; the longer side of a strip that is one token wide can still be too long
            rows = min(most, max(1, math.isqrt(most * height // width)))
            columns = min(most, max(1, math.isqrt(most * width // height)))
        return rows * self.r, columns * self.r


@lru_cache(maxsize=256)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """All (rows, columns) of min_tiles to max_tiles tiles, those of fewer tiles and of fewer columns first."""
    grids = [
        (tiles // columns, columns)
        for tiles in range(min_tiles, max_tiles + 1)
        for columns in range(1, tiles + 1)
        if tiles % columns == 0
    ]
    return tuple(grids)


def closest_grid(height: int, width: int, tile: tuple[int, int], min_tiles: int, max_tiles: int) -> Grid:
    """The grid of tiles whose aspect ratio (width / height) is closest to the image's (InternVL 1.5, section 3.3).

    Of several that are as close, the smallest; a larger one if the image has more than half as many pixels as it.

    Args:
        height, width: of the image in pixels.
        tile: (height, width) of a tile in pixels.
        min_tiles, max_tiles: bounds of the number of tiles.

    Returns:
        (rows, columns).
    """
    aspect, best, closest = width / height, (1, 1), math.inf
    for rows, columns in candidate_grids(min_tiles, max_tiles):
        difference = abs(aspect - columns * tile[1] / (rows * tile[0]))
        enough = height * width > 0.5 * tile[0] * tile[1] * rows * columns
        if difference < closest or (difference == closest and enough):
            best, closest = (rows, columns), difference
    return best


def grid_levels(scheme: str, grid: Grid, scales: Sequence[int] = (), thumbnail: bool = True) -> tuple[Grid, ...]:
    """The levels (rows, columns) of an image's tiles, in the order of `pixel_values`.

    Args:
        scheme: `resize`, `s2`, `dynamic-s2`, `tiles` or `native`.
        grid: (rows, columns) of the level that is read.
        scales: of `s2` and `dynamic-s2`, in tiles.
        thumbnail: of `tiles`.
    """
    if scheme == "s2":
        return tuple((scale, scale) for scale in scales)
    if scheme == "dynamic-s2":
        return (*((scale, scale) for scale in scales[:-1]), grid)
    if scheme == "tiles" and thumbnail and grid != (1, 1):
        return grid, (1, 1)
    return (grid,)


def split_tiles(x: Array, grid: Grid) -> Array:
    """Cuts a map [rows·h, columns·w, C] in tiles in raster order, [rows·columns, h, w, C].

    Args:
        x: pixels or features, numpy or torch.
        grid: (rows, columns).

    Raises:
        ValueError: the map can't be cut in that many equal tiles.
    """
    rows, columns = grid
    height, width, channels = x.shape
    if height % rows or width % columns:
        raise ValueError(f"a map of {height}x{width} can't be cut in {rows}x{columns} equal tiles")
    h, w = height // rows, width // columns
    return x.reshape(rows, h, columns, w, channels).swapaxes(1, 2).reshape(rows * columns, h, w, channels)


def merge_tiles(x: Array, grid: Grid) -> Array:
    """The inverse of `split_tiles`: [rows·columns, h, w, C] to [rows·h, columns·w, C].

    Raises:
        ValueError: there are not rows·columns tiles.
    """
    rows, columns = grid
    tiles, h, w, channels = x.shape
    if tiles != rows * columns:
        raise ValueError(f"{tiles} tiles can't fill a grid of {rows}x{columns}")
    return x.reshape(rows, columns, h, w, channels).swapaxes(1, 2).reshape(rows * h, columns * w, channels)


def merge_scales(features: torch.Tensor, levels: Sequence[Grid], grid: Grid) -> torch.Tensor:
    """Makes one map of an image's scales, and cuts it in blocks of a tile's size (S², section 3; NVILA, section 2.1).

    Each level's tiles become a map, every map is area-pooled to the size of `grid`'s, their channels are concatenated.

    Args:
        features: [tiles of all levels, h, w, C].
        levels: (rows, columns) of each level, in order.
        grid: (rows, columns) of the blocks; (1, 1) for `s2`, the largest level's for `dynamic-s2`.

    Returns:
        [blocks, h, w, C·len(levels)], blocks in raster order.

    Raises:
        ValueError: the number of tiles is not that of the levels.
    """
    tiles, h, w, _ = features.shape
    counts = [rows * columns for rows, columns in levels]
    if tiles != sum(counts):
        raise ValueError(f"features holds {tiles} tiles; levels {tuple(levels)} have {sum(counts)}")
    size = (grid[0] * h, grid[1] * w)
    maps = []
    for part, level in zip(features.split(counts), levels, strict=True):
        one = merge_tiles(part, level)  # [height, width, C]
        if one.shape[:2] != size:
            one = torch.nn.functional.adaptive_avg_pool2d(one.permute(2, 0, 1), size).permute(1, 2, 0)
        maps.append(one)
    return split_tiles(torch.cat(maps, dim=-1), grid)


def tokens_per_tile(size: tuple[int, int], patch_size: int, downsample_factor: int, prefix_tokens: int = 0) -> int:
    """LLM tokens of a tile: ⌈h / r⌉ · ⌈w / r⌉ for h × w patches, plus the prefix tokens that the model keeps.

    Args:
        size: (height, width) in pixels.
        patch_size: side of a patch in pixels.
        downsample_factor: r of the projector, 1 without downsampling.
        prefix_tokens: CLS and register tokens kept (feature selection `full`).
    """
    rows, columns = size[0] // patch_size, size[1] // patch_size
    return -(-rows // downsample_factor) * -(-columns // downsample_factor) + prefix_tokens


def to_tiles(
    images: Sequence[Image.Image | np.ndarray] | np.ndarray, size: tuple[int, int], resample: int
) -> np.ndarray:
    """Resizes each image to one tile; an image of that size already is taken as it is.

    Args:
        images: RGB images, PIL or uint8 [height, width, 3].
        size: (height, width) of a tile.
        resample: PIL's resampling filter.

    Returns:
        uint8 [tiles, height, width, 3].
    """
    tiles = np.empty((len(images), *size, 3), dtype=np.uint8)
    for tile, image in zip(tiles, images, strict=True):
        if isinstance(image, np.ndarray):
            if image.shape[:2] == size:
                tile[:] = image
                continue
            image = Image.fromarray(image)
        tile[:] = np.asarray(image if image.size == size[::-1] else image.resize(size[::-1], resample))
    return tiles


def normalise(tiles: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [tiles, height, width, 3] to float32 [tiles, 3, height, width], (x / 255 - mean) / std by channel."""
    scale = (1 / (255 * torch.tensor(std, dtype=torch.float32))).numpy()
    shift = (-torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)).numpy()
    pixels = np.empty((len(tiles), 3, *tiles.shape[1:3]), dtype=np.float32)
    for tile, normalised in zip(tiles, pixels, strict=True):
        for channel, out in enumerate(normalised):  # one at a time stays in the CPU's cache: four times as fast
            out[:] = tile[..., channel]
            out *= scale[channel]
            out += shift[channel]
    return torch.from_numpy(pixels)


def normalise_tensor(tiles: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """As `normalise`, to the same bits on a CPU, of a tensor where it is: on a GPU a quarter is copied to it."""
    deviation = torch.tensor(std, dtype=torch.float32)
    scale, shift = 1 / (255 * deviation), -torch.tensor(mean, dtype=torch.float32) / deviation
    pixels = tiles.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.mul_(scale.to(tiles.device)[:, None, None]).add_(shift.to(tiles.device)[:, None, None])


def _as_pil(image: Image.Image | np.ndarray) -> Image.Image:
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image
