"""Images to tiles, and how many tokens a tile becomes.

The plain scheme: every image is resized to one tile, aspect ratio not kept (VILA's `resize`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image


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


def to_tiles(images: Sequence[Image.Image | np.ndarray], size: tuple[int, int], resample: int) -> np.ndarray:
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
