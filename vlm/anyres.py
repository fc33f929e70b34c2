"""AnyRes: an image as one low-resolution tile, then a grid of tiles that keeps its aspect ratio.

LLaVA-NeXT's way ("LLaVA-NeXT: Improved reasoning, OCR, and world knowledge", 2024) and LLaVA-OneVision's (arXiv
2408.03326, section 3.2). Of a list of grids the one is taken that keeps most of the image's pixels. The
image is resized into the grid, its aspect ratio kept, and padded; after the projector the padding is cut off again, and
a learned newline ends each row of the map. OneVision shrinks a map of more than `max_tiles` tiles' worth of tokens, and
pools video frames 2×2.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

# LLaVA-OneVision's grids, (rows, columns) of tiles
GRIDS = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))
FITS = ("stretch", "crop", "pad")


def pick_grid(size: tuple[int, int], grids: Sequence[tuple[int, int]], tile: tuple[int, int]) -> tuple[int, int]:
    """The grid that keeps most pixels of an image, and of such the one with the least area left over.

    Args:
        size: (height, width) of the image in pixels.
        grids: (rows, columns) in tiles; the first wins where several are equally good.
        tile: (height, width) of a tile in pixels.
    """
    height, width = size

    def quality(grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid[0] * tile[0], grid[1] * tile[1]
        scale = min(columns / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - rows * columns

    rows, columns = max(grids, key=quality)
    return rows, columns


def cut(image: Image.Image, grid: tuple[int, int], tile: tuple[int, int], resample: int) -> np.ndarray:
    """The tiles of an RGB image: the whole image stretched to one, then those of the grid in raster order.

    Args:
        image: any size.
        grid: (rows, columns) in tiles.
        tile: (height, width) in pixels.
        resample: PIL's resampling filter.

    Returns:
        uint8 [1 + rows · columns, height, width, 3]; the image stands in the middle of the grid, on black.
    """
    (rows, columns), (height, width) = grid, tile
    inner = _inner_size((image.height, image.width), (rows * height, columns * width))
    canvas = np.zeros((rows * height, columns * width, 3), dtype=np.uint8)
    top, left = (canvas.shape[0] - inner[0]) // 2, (canvas.shape[1] - inner[1]) // 2
    canvas[top : top + inner[0], left : left + inner[1]] = _resized(image, inner, resample)
    tiles = canvas.reshape(rows, height, columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
    return np.concatenate([_resized(image, tile, resample)[None], tiles])


def image_tokens(size: tuple[int, int], grid: tuple[int, int], cells: tuple[int, int], max_tiles: int | None) -> int:
    """LLM tokens of an image: its base tile's, and those of the map with a newline after each row.

    Args:
        size: (height, width) of the image in pixels.
        grid: (rows, columns) in tiles.
        cells: (rows, columns) of one tile in tokens.
        max_tiles: tiles' worth of tokens that the map may have before it is shrunk; None for any number.
    """
    _, (rows, columns) = map_cells(size, grid, cells, max_tiles)
    return cells[0] * cells[1] + rows * (columns + 1)


def map_cells(
    size: tuple[int, int], grid: tuple[int, int], cells: tuple[int, int], max_tiles: int | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What becomes of a grid's cells: (rows above and below, columns left and right) that are cut off as padding, and
    (rows, columns) of the map after that.

    Args:
        size, grid, cells, max_tiles: see `image_tokens`.
    """
    top, left = _padding(size, (grid[0] * cells[0], grid[1] * cells[1]))
    inner = (grid[0] * cells[0] - 2 * top, grid[1] * cells[1] - 2 * left)
    return (top, left), _shrunk(inner, cells, max_tiles)


def pack(
    features: torch.Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    newline: torch.Tensor,
    cells: tuple[int, int],
    max_tiles: int | None,
) -> torch.Tensor:
    """The projected features of one image's tiles to what the LLM reads, [tokens, D].

    Args:
        features: [1 + rows · columns tiles, tokens of a tile, D], in the order of `cut`.
        grid, size, cells, max_tiles: see `image_tokens`.
        newline: [D], put after each row of the map.
    """
    base, dim = features[0], features.shape[-1]
    tiles = features[1:].reshape(*grid, *cells, dim).transpose(1, 2)  # [rows, cells, columns, cells, D]
    whole = tiles.reshape(grid[0] * cells[0], grid[1] * cells[1], dim)
    (top, left), (rows, columns) = map_cells(size, grid, cells, max_tiles)
    whole = whole[top : whole.shape[0] - top, left : whole.shape[1] - left]  # [rows, columns, D]
    if (rows, columns) != tuple(whole.shape[:2]):
        whole = _bilinear(whole.unsqueeze(0), (rows, columns)).squeeze(0)
    ends = newline.to(whole).expand(rows, 1, dim)
    return torch.cat([base, torch.cat([whole, ends], dim=1).flatten(0, 1)])


def video_tokens(frames: int, cells: tuple[int, int]) -> int:
    """LLM tokens of a video: ⌈rows / 2⌉ · ⌈columns / 2⌉ a frame, and one newline."""
    return frames * -(-cells[0] // 2) * -(-cells[1] // 2) + 1


def pool_frames(features: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    """Halves rows and columns of frames' projected features bilinearly: [frames, tokens, D] to [frames, tokens', D]."""
    frames = features.unflatten(1, cells)  # [frames, rows, columns, D]
    return _bilinear(frames, (-(-cells[0] // 2), -(-cells[1] // 2))).flatten(1, 2)


def pack_video(features: torch.Tensor, newline: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    """The projected features of one video's frames [frames, tokens, D] to what the LLM reads, [tokens', D].

    Each frame is halved (`pool_frames`); one newline [D] ends the video.
    """
    pooled = pool_frames(features, cells)
    return torch.cat([pooled.flatten(0, 1), newline.to(pooled).unsqueeze(0)])


def fit_image(
    image: Image.Image, size: tuple[int, int], fit: str, resample: int, background: tuple[int, int, int]
) -> Image.Image:
    """An RGB image as one tile of `size` (height, width).

    Args:
        image: any size.
        size: of the tile in pixels.
        fit: `stretch`, aspect ratio not kept; `crop`, resized until it covers the tile, of which the middle is cut
            (CLIP, LLaVA-1.5 in transformers); `pad`, on a square of the background's colour, then resized (LLaVA-1.5's
            own code, VILA's `pad`).
        resample: PIL's resampling filter.
        background: RGB, `pad` alone; the towers' mean colour.

    Raises:
        ValueError: `fit` isn't one of `FITS`.
    """
    (height, width), (h, w) = (image.height, image.width), size
    if fit == "stretch":
        return image.resize((w, h), resample)
    if fit == "crop":
        inner = (h, int(h * width / height)) if h * width >= w * height else (int(w * height / width), w)
        top, left = (inner[0] - h) // 2, (inner[1] - w) // 2
        return image.resize(inner[::-1], resample).crop((left, top, left + w, top + h))
    if fit == "pad":
        side = max(height, width)
        square = Image.new("RGB", (side, side), background)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square.resize((w, h), resample)
    raise ValueError(f"fit is {fit!r}; accepted: {', '.join(FITS)}")


def _inner_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) of an image's aspect ratio within a canvas, rounded up."""
    (height, width), (rows, columns) = size, canvas
    by_width, by_height = columns / width, rows / height
    if by_width < by_height:
        return min(math.ceil(height * by_width), rows), columns
    return rows, min(math.ceil(width * by_height), columns)


def _padding(size: tuple[int, int], cells: Sequence[int]) -> tuple[int, int]:
    """(rows above and below, columns left and right) of a map of (rows, columns) cells that an image leaves empty."""
    (height, width), (rows, columns) = size, cells
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def _shrunk(cells: Sequence[int], tile_cells: tuple[int, int], max_tiles: int | None) -> tuple[int, int]:
    """The (rows, columns) of a map after it is shrunk to about `max_tiles` tiles' worth of tokens."""
    rows, columns = cells
    if max_tiles is not None:
        ratio = math.sqrt(rows * columns / (max_tiles * tile_cells[0] * tile_cells[1]))
        if ratio > 1.1:
            return int(rows // ratio), int(columns // ratio)
    return rows, columns


def _bilinear(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes [maps, rows, columns, D] to `size` (rows, columns)."""
    return nn.functional.interpolate(maps.permute(0, 3, 1, 2), size=size, mode="bilinear").permute(0, 2, 3, 1)


def _resized(image: Image.Image, size: tuple[int, int], resample: int) -> np.ndarray:
    return np.asarray(image if (image.height, image.width) == size else image.resize(size[::-1], resample))
