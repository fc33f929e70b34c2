"""Real handwritten digits and drawn shapes, coloured, drawn into cells: what the embedded data's pictures are made of.

The digits are scikit-learn's `load_digits` (1,797 images of 8 × 8), split *by digit image*.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw
from sklearn.datasets import load_digits

from .fine_glyphs import COLOURS

SPLITS = ("train", "dev", "test")
CELL = 16  # pixels
GLYPH = 13  # pixels that a glyph fills at most
DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
KINDS = DIGITS + SHAPES


@cache
def digit_masks(split: str) -> dict[str, np.ndarray]:
    """Digit → its images in a split, float32 [images, GLYPH, GLYPH] in [0, 1]; 70 / 10 / 20 % by digit image."""
    data = load_digits()
    order = np.random.default_rng(20240131).permutation(len(data.images))
    train, dev = int(0.7 * len(order)), int(0.8 * len(order))
    chosen = {"train": order[:train], "dev": order[train:dev], "test": order[dev:]}[split]
    masks: dict[str, list[np.ndarray]] = {digit: [] for digit in DIGITS}
    for i in chosen:
        small = PILImage.fromarray((data.images[i] * (255 / 16)).astype(np.uint8))
        large = np.asarray(small.resize((GLYPH, GLYPH), PILImage.Resampling.BICUBIC), dtype=np.float32) / 255
        masks[str(data.target[i])].append(large)
    return {digit: np.stack(images) for digit, images in masks.items()}


@cache
def shape_mask(shape: str) -> np.ndarray:
    """A shape drawn large and reduced, float32 [GLYPH, GLYPH] in [0, 1]."""
    n = GLYPH * 8
    image = PILImage.new("L", (n, n))
    draw = ImageDraw.Draw(image)
    lo, hi, mid, bar = n * 0.06, n * 0.94, n / 2, n * 0.14
    if shape == "circle":
        draw.ellipse((lo, lo, hi, hi), fill=255)
    elif shape == "square":
        draw.rectangle((lo, lo, hi, hi), fill=255)
    elif shape == "triangle":
        draw.polygon([(mid, lo), (hi, hi), (lo, hi)], fill=255)
    elif shape == "cross":
        draw.rectangle((mid - bar, lo, mid + bar, hi), fill=255)
        draw.rectangle((lo, mid - bar, hi, mid + bar), fill=255)
    elif shape == "ring":
        draw.ellipse((lo, lo, hi, hi), outline=255, width=int(n * 0.17))
    else:
        draw.polygon([(mid, lo), (hi, mid), (mid, hi), (lo, mid)], fill=255)
    return np.asarray(image.resize((GLYPH, GLYPH), PILImage.Resampling.BOX), dtype=np.float32) / 255


@dataclass(frozen=True)
class Glyph:
    """A digit or shape in a colour."""

    kind: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


def draw_cells(cells: Sequence[Glyph | None], columns: int, split: str, rng: np.random.Generator) -> np.ndarray:
    """Draws glyphs on a noisy dark ground, each shifted and shaded a little.

    Args:
        cells: what each cell holds, raster order, whole rows.
        columns: cells in a row.
        split: whose digit images are used.
        rng: draws images, shifts, shades and noise.

    Returns:
        uint8 [rows · CELL, columns · CELL, 3].
    """
    height, width = len(cells) // columns * CELL, columns * CELL
    canvas = rng.normal(rng.uniform(15, 55), 10, (height, width, 3)).astype(np.float32)
    shifts = rng.integers(0, CELL - GLYPH + 1, (len(cells), 2))
    shades = rng.uniform(0.8, 1.0, len(cells))
    for i, glyph in enumerate(cells):
        if glyph is None:
            continue
        if glyph.kind in DIGITS:
            images = digit_masks(split)[glyph.kind]
            mask = images[rng.integers(len(images))]
        else:
            mask = shape_mask(glyph.kind)
        top, left = (i // columns) * CELL + shifts[i, 0], (i % columns) * CELL + shifts[i, 1]
        patch = canvas[top : top + GLYPH, left : left + GLYPH]
        patch += mask[..., None] * (np.float32(shades[i]) * np.array(COLOURS[glyph.colour], np.float32) - patch)
    return canvas.clip(0, 255).astype(np.uint8)
