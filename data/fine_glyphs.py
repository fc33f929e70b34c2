"""Scenes and clips of digits in thin strokes: at a low resolution their colours and places can be told, they can't.

A scene has 256 × 256 pixels and nine cells, each with a digit that is 12 pixels high in strokes of 2, as a
seven-segment display shows it: many digits differ by one stroke. A cell is cut in 6 × 6 slots, the digit stands in any.
Shifts, turns, sizes, shades and noise are random, so splits differ in their seeds alone. Every document is a function
of (seed, split, index); see `GlyphSource`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PILImage

from .document import Document, Image, Text, Video, chat_document

if TYPE_CHECKING:
    from .glyphs import GlyphSource

SCENE = 256  # pixels a scene is wide and high
SIDE = 3  # cells a scene is wide and high
CELLS = tuple(f"{column}{row}" for row in range(1, SIDE + 1) for column in "abc")  # raster order
SLOTS = 6  # a cell is wide and high
SLOT = SCENE / (SIDE * SLOTS)  # pixels
STROKE, WIDTH, HEIGHT = 2.0, 6.0, 10.0  # pixels: of a stroke, and between the middles of outer strokes
FINENESS = 8  # points a pixel, at which the distance to a digit's strokes is kept
WHOLE_SCENES = 0.25  # of the pictures that a tower is warmed up on
MOMENTS = 32  # frames of a clip's full rate

# Segments a to g of a display, from (x, y) to (x, y) in half widths and half heights, and those of each digit.
SEGMENTS = {
    "a": ((-1, -1), (1, -1)), "b": ((1, -1), (1, 0)), "c": ((1, 0), (1, 1)), "d": ((-1, 1), (1, 1)),
    "e": ((-1, 0), (-1, 1)), "f": ((-1, -1), (-1, 0)), "g": ((-1, 0), (1, 0)),
}  # fmt: skip
DIGITS = {
    "0": "abcdef", "1": "bc", "2": "abdeg", "3": "abcdg", "4": "bcfg", "5": "acdfg", "6": "acdefg", "7": "abc",
    "8": "abcdefg", "9": "abcdfg",
}  # fmt: skip
COLOURS = {
    "red": (235, 50, 40),
    "green": (40, 200, 60),
    "blue": (70, 110, 255),
    "yellow": (240, 220, 40),
    "cyan": (40, 215, 220),
    "magenta": (230, 60, 220),
}


@dataclass(frozen=True)
class FineGlyph:
    """A digit in a colour; `x` and `y` its middle in pixels, `angle` in radians, `scale` in relation to `HEIGHT`."""

    kind: str
    colour: str
    x: float
    y: float
    angle: float = 0.0
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.kind} {self.colour}"

    @property
    def reach(self) -> tuple[float, float]:
        """Half the width and height of the box that holds it, in pixels."""
        w, h = (0.5 * self.scale * (side + STROKE) for side in (WIDTH, HEIGHT))
        sin, cos = abs(np.sin(self.angle)), abs(np.cos(self.angle))
        return w * cos + h * sin, w * sin + h * cos


def draw(glyphs: Sequence[FineGlyph], size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws digits on a noisy dark ground, uint8 [size, size, 3]."""
    noise = rng.standard_normal((size, size, 1), dtype=np.float32)
    canvas = np.repeat(np.float32(10) * noise + np.float32(rng.uniform(15, 55)), 3, axis=2)
    for glyph in glyphs:
        reach = int(np.ceil(max(glyph.reach))) + 1
        top, left = max(0, int(glyph.y) - reach), max(0, int(glyph.x) - reach)
        patch = canvas[top : int(glyph.y) + reach + 1, left : int(glyph.x) + reach + 1]
        cover = _coverage(glyph, *np.mgrid[top : top + patch.shape[0], left : left + patch.shape[1]])
        shade = np.float32(rng.uniform(0.8, 1.0))
        patch += cover[..., None] * (shade * np.array(COLOURS[glyph.colour], np.float32) - patch)
    return canvas.clip(0, 255).astype(np.uint8)


def _coverage(glyph: FineGlyph, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """How far each pixel is covered by the strokes, float32 in [0, 1], of the shape of `rows` and `columns`."""
    dx, dy = (columns + 0.5 - glyph.x) / glyph.scale, (rows + 0.5 - glyph.y) / glyph.scale
    sin, cos = np.sin(glyph.angle), np.cos(glyph.angle)
    field = _distances(glyph.kind)
    x = ((cos * dx + sin * dy) * FINENESS).astype(np.int32) + field.shape[1] // 2
    y = ((cos * dy - sin * dx) * FINENESS).astype(np.int32) + field.shape[0] // 2
    distances = field[y.clip(0, field.shape[0] - 1), x.clip(0, field.shape[1] - 1)]
    return (np.float32(0.5 * glyph.scale * STROKE + 0.5) - np.float32(glyph.scale) * distances).clip(0, 1)


@cache
def _distances(kind: str) -> np.ndarray:
    """Pixels to the middle of a digit's nearest stroke, float32, at points `FINENESS` a pixel; its middle in theirs."""
    n = int(HEIGHT * FINENESS)
    y, x = np.mgrid[-n : n + 1, -n : n + 1] / FINENESS
    distances = []
    for segment in DIGITS[kind]:
        (x0, y0), (x1, y1) = np.array(SEGMENTS[segment]) * (WIDTH / 2, HEIGHT / 2)  # upright or level
        gap_x = np.maximum(np.maximum(min(x0, x1) - x, x - max(x0, x1)), 0)
        gap_y = np.maximum(np.maximum(min(y0, y1) - y, y - max(y0, y1)), 0)
        distances.append(np.hypot(gap_x, gap_y))
    return np.min(distances, axis=0).astype(np.float32)


@dataclass(frozen=True)
class FineScene:
    """What stands in the 3 × 3 cells, and the picture of it (uint8 [256, 256, 3])."""

    cells: tuple[FineGlyph, ...]
    picture: np.ndarray


def fine_scene(rng: np.random.Generator) -> FineScene:
    """A scene with a digit in any slot of each cell."""
    slots = rng.integers(SLOTS, size=(SIDE * SIDE, 2))
    glyphs = [
        random_glyph(rng, SLOT, i // SIDE * SLOTS + row, i % SIDE * SLOTS + column)
        for i, (row, column) in enumerate(slots.tolist())
    ]
    return FineScene(tuple(glyphs), draw(glyphs, SCENE, rng))


def close_scene(rng: np.random.Generator, side: int) -> FineScene:
    """Nine cells in a picture of `side` pixels, whose digits are as large as in a fine scene's tiles at full size."""
    per_cell = SLOTS // SIDE
    at = rng.integers(per_cell, size=(SIDE * SIDE, 2)).tolist()
    glyphs = [
        random_glyph(rng, side / SLOTS, i // SIDE * per_cell + row, i % SIDE * per_cell + column)
        for i, (row, column) in enumerate(at)
    ]
    return FineScene(tuple(glyphs), draw(glyphs, side, rng))


def random_glyph(rng: np.random.Generator, slot: float, row: int, column: int, kind: str | None = None) -> FineGlyph:
    """A digit, any by default, anywhere within the slot of a row and column; slots are so many pixels wide and high."""
    kind = kind or list(DIGITS)[rng.integers(len(DIGITS))]
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    glyph = FineGlyph(kind, colour, 0, 0, rng.uniform(-0.1, 0.1), slot / SLOT * rng.uniform(0.9, 1.05))
    x, y = (rng.uniform(min(reach, slot / 2), max(slot - reach, slot / 2)) for reach in glyph.reach)
    return FineGlyph(kind, colour, column * slot + x, row * slot + y, glyph.angle, glyph.scale)


@dataclass(frozen=True)
class FineClip:
    """Frames at the full rate (uint8 [MOMENTS, side, side, 3]), and the digit that each shows."""

    glyphs: tuple[FineGlyph, ...]
    frames: np.ndarray


def fine_clip(rng: np.random.Generator, side: int, shown: int = 8) -> FineClip:
    """A clip of digits that differ, one after the other, each for some frames: at least one.

    A frame is as a tile of a scene at its full size: 6 × 6 slots.
    """
    ends = np.sort(rng.permutation(MOMENTS - 1)[: shown - 1]) + 1
    lengths = np.diff([0, *ends.tolist(), MOMENTS]).tolist()
    glyphs: list[FineGlyph] = []
    for kind, length in zip(rng.permutation(list(DIGITS)).tolist(), lengths, strict=False):
        row, column = rng.integers(SLOTS, size=2).tolist()
        glyphs += [random_glyph(rng, side / SLOTS, row, column, kind)] * length
    return FineClip(tuple(glyphs), np.stack([draw([glyph], side, rng) for glyph in glyphs]))


def _fine_regions(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A tile of 6 × 6 patches and, patch by patch, what stands there: it stands in for what a pretrained tower knows.

    One of four is a whole scene at a low resolution, of which each patch's cell and the colour of its digit are told.
    The others are full of digits as large as the tiles of a high resolution show them, one a patch; of half of them the
    digits alone are told, of the others the cell and colour too, as if the tile were a scene.
    """
    side = source.processor.image_size[0]
    if rng.random() < WHOLE_SCENES:
        scene = fine_scene(rng)
        picture = np.asarray(PILImage.fromarray(scene.picture).resize((side, side), PILImage.Resampling.BICUBIC))
        patch = SCENE / SLOTS
        colours = {(int(glyph.y // patch), int(glyph.x // patch)): glyph.colour for glyph in scene.cells}
        texts = [f"{_place(*at)} {colours.get(at, 'nothing')}" for at in np.ndindex(SLOTS, SLOTS)]
    else:
        filled = rng.random((SLOTS, SLOTS)) < rng.uniform(0.2, 1.0)
        glyphs = {at: random_glyph(rng, side / SLOTS, *at) for at in np.ndindex(SLOTS, SLOTS) if filled[at]}
        picture = draw(list(glyphs.values()), side, rng)
        if rng.random() < 0.5:
            texts = [glyphs[at].kind if at in glyphs else "nothing" for at in np.ndindex(SLOTS, SLOTS)]
        else:
            texts = [f"{_place(*at)} {glyphs.get(at, 'nothing')}" for at in np.ndindex(SLOTS, SLOTS)]
    return Document(key, (Image(picture), *(Text(text, loss=True) for text in texts)))


def _place(row: int, column: int) -> str:
    """The cell of a patch of a tile of 6 × 6."""
    return CELLS[row * SIDE // SLOTS * SIDE + column * SIDE // SLOTS]


def _fine_scene_regions(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A scene and, token by token of the square grid that the model makes of it, the cell and the digit in the token.

    Of half of the scenes the digits alone are told. Grids of 18, 9, 6 or 3 tokens a side fit: a token has one cell.

    Raises:
        ValueError: the model's tokens are no square grid.
    """
    scene = fine_scene(rng)
    tokens = source.processor.plan_image((SCENE, SCENE)).tokens
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{key}: a scene becomes {tokens} tokens; accepted: a square grid, as 324, 81 or 36")
    seen = {(int(glyph.y * side / SCENE), int(glyph.x * side / SCENE)): glyph for glyph in scene.cells}
    placed = rng.random() < 0.5
    texts = []
    for row, column in np.ndindex(side, side):
        glyph, place = seen.get((row, column)), CELLS[row * SIDE // side * SIDE + column * SIDE // side]
        texts.append(f"{place} {glyph or 'nothing'}" if placed else glyph.kind if glyph else "nothing")
    return Document(key, (Image(scene.picture), *(Text(text, loss=True) for text in texts)))


def _fine_frame_regions(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A picture like a clip's frame, but with several digits, and the digit in each of its 2 × 2 quarters.

    Of half of them the colours are not told.
    """
    side, half = source.processor.image_size[0], SLOTS // 2
    quarters = [at for at in np.ndindex(2, 2) if rng.random() < 0.6]
    slots = rng.integers(half, size=(len(quarters), 2)).tolist()
    glyphs = {
        (row, column): random_glyph(rng, side / SLOTS, row * half + r, column * half + c)
        for (row, column), (r, c) in zip(quarters, slots, strict=True)
    }
    coloured = rng.random() < 0.5
    words = {at: str(glyph) if coloured else glyph.kind for at, glyph in glyphs.items()}
    texts = (Text(words.get(at, "nothing"), loss=True) for at in np.ndindex(2, 2))
    return Document(key, (Image(draw(list(glyphs.values()), side, rng)), *texts))


def _fine_caption(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    return _caption(fine_scene(rng), rng, key)


def _close_caption(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    return _caption(close_scene(rng, source.processor.image_size[0]), rng, key)


def _caption(scene: FineScene, rng: np.random.Generator, key: str) -> Document:
    """Every digit with its place and colour, in random order; places are given, the rest is predicted."""
    parts: list[Image | Text] = [Image(scene.picture)]
    for i in rng.permutation(len(CELLS)):
        parts += [Text(f"{CELLS[i]} "), Text(f"{scene.cells[i]} ; ", loss=True)]
    return Document(key, (*parts, Text("<|end|>")))


def scene_question(scene: FineScene, cell: int) -> tuple[str, str]:
    """What is asked about a cell, and the true answer."""
    return f"what is at {CELLS[cell]} ?", f"{CELLS[cell]} {scene.cells[cell]}"


def clip_questions(clip: FineClip) -> dict[str, str]:
    """What is asked about a clip, and the true answers."""
    return {f"what colour is the {g.kind} ?": str(g) for g in clip.glyphs}


def _fine_chat(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    return _chat(fine_scene(rng), source, rng, key)


def _close_chat(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    return _chat(close_scene(rng, source.processor.image_size[0]), source, rng, key)


def _chat(scene: FineScene, source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A question about each cell, in random order."""
    turns = [scene_question(scene, i) for i in rng.permutation(len(CELLS))]
    return chat_document(key, _messages(turns, "image"), [Image(scene.picture)], source.processor)


def _fine_clip_chat(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """Frames taken evenly from a clip, and questions about the digits that they show."""
    clip = fine_clip(rng, source.processor.video_size[0])
    count = int(rng.integers(source.frames[0], min(source.frames[1], MOMENTS) + 1))
    taken = np.linspace(0, MOMENTS - 1, count).round().astype(int)
    asked = clip_questions(FineClip(tuple(clip.glyphs[i] for i in taken), clip.frames))
    turns = [list(asked.items())[i] for i in rng.permutation(len(asked))]
    return chat_document(key, _messages(turns, "video"), [Video(clip.frames[taken])], source.processor)


def _messages(turns: list[tuple[str, str]], medium: str) -> list[dict]:
    """Questions and answers as a conversation; the medium stands before the first."""
    messages: list[dict] = []
    for question, answer in turns:
        content: list[dict] = [] if messages else [{"type": medium}]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    return messages


FINE_KIND_BUILDERS = {
    "fine_regions": _fine_regions,
    "fine_scene_regions": _fine_scene_regions,
    "fine_frame_regions": _fine_frame_regions,
    "close_captions": _close_caption,
    "close_chat": _close_chat,
    "fine_captions": _fine_caption,
    "fine_chat": _fine_chat,
    "fine_clip_chat": _fine_clip_chat,
}
