"""Needles in a long clip: a few frames show a digit, all others a shape; a question asks for one digit by its colour.

A frame is one cell, 16 × 16 pixels, which a model of the recipe `needle` reads as one visual token. Digits of a clip
have colours of their own; shapes come in all colours, so neither "a digit" nor "red" alone tells the frame that "which
digit is red ?" is about. Guessing gives 1 in 10, and naming one of the clip's digits 1 in `NEEDLES`.
Every document is a function of (seed, split, index); see `GlyphSource`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .document import Document, Text, Video, chat_document
from .drawing import CELL, COLOURS, DIGITS, SHAPES, Glyph, draw_cells

if TYPE_CHECKING:
    from .glyphs import GlyphSource

NEEDLES = 4  # digits of a clip that is asked about in an evaluation


@dataclass(frozen=True)
class Haystack:
    """A haystack of shapes with some digits in it.

    Attributes:
        glyphs: what each frame shows.
        frames: uint8 [frames, 16, 16, 3].
        needles: numbers of the frames that show a digit, in an order that tells nothing.
    """

    glyphs: tuple[Glyph, ...]
    frames: np.ndarray
    needles: tuple[int, ...]


def haystack(
    rng: np.random.Generator, split: str, frames: int, needles: int = NEEDLES, place: int | None = None
) -> Haystack:
    """A clip with `needles` different digits of different colours in frames anywhere.

    Args:
        place: number of the frame that shows the first of them; drawn, too, when None.

    Raises:
        ValueError: there are more needles than frames or colours, or none; or there is no such frame.
    """
    most = min(frames, len(COLOURS))
    if not 1 <= needles <= most:
        raise ValueError(f"needles is {needles} in {frames} frames; accepted: 1 to {most}, each of its own colour")
    if place is not None and not 0 <= place < frames:
        raise ValueError(f"place is {place} in {frames} frames; accepted: 0 to {frames - 1}")
    colours = list(COLOURS)
    kinds, shades = rng.integers(len(SHAPES), size=frames), rng.integers(len(colours), size=frames)
    glyphs = [Glyph(SHAPES[kind], colours[shade]) for kind, shade in zip(kinds, shades, strict=True)]
    places = rng.permutation(frames).tolist()
    if place is not None:
        places = [place, *(other for other in places if other != place)]
    places = places[:needles]
    kinds, shades = rng.permutation(len(DIGITS))[:needles], rng.permutation(len(colours))[:needles]
    for place, kind, shade in zip(places, kinds, shades, strict=True):
        glyphs[place] = Glyph(DIGITS[kind], colours[shade])
    return Haystack(tuple(glyphs), _one_column(glyphs, split, rng), tuple(places))


def without_first(clip: Haystack, rng: np.random.Generator, split: str) -> Haystack:
    """The same frames, but for that of the first needle, which shows a shape of its colour instead."""
    first, *others = clip.needles
    shape = Glyph(SHAPES[rng.integers(len(SHAPES))], clip.glyphs[first].colour)
    frames = clip.frames.copy()
    frames[first] = _one_column([shape], split, rng)[0]
    return Haystack((*clip.glyphs[:first], shape, *clip.glyphs[first + 1 :]), frames, tuple(others))


def needle_question(needle: Glyph) -> tuple[str, str]:
    """What is asked for a needle, and the true answer."""
    return f"which digit is {needle.colour} ?", str(needle)


def _one_column(glyphs: list[Glyph], split: str, rng: np.random.Generator) -> np.ndarray:
    """Frames of one glyph each, uint8 [frames, CELL, CELL, 3]."""
    return draw_cells(glyphs, 1, split, rng).reshape(len(glyphs), CELL, CELL, 3)


def _needle_regions(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A clip and what each of its frames shows, three of four a digit: for the region-text objective."""
    colours = list(COLOURS)
    glyphs = []
    for _ in range(int(rng.integers(source.frames[0], source.frames[1] + 1))):
        kinds = DIGITS if rng.random() < 0.75 else SHAPES
        glyphs.append(Glyph(kinds[rng.integers(len(kinds))], colours[rng.integers(len(colours))]))
    texts = (Text(str(glyph), loss=True) for glyph in glyphs)
    return Document(key, (Video(_one_column(glyphs, source.split, rng)), *texts))


def _needles_chat(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A clip and a question about each of its needles, as many as `turns` says."""
    frames = int(rng.integers(source.frames[0], source.frames[1] + 1))
    needles = min(int(rng.integers(source.turns[0], source.turns[1] + 1)), frames, len(COLOURS))
    clip = haystack(rng, source.split, frames, needles)
    messages: list[dict] = []
    for place in clip.needles:
        question, answer = needle_question(clip.glyphs[place])
        content: list[dict] = [] if messages else [{"type": "video"}]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    return chat_document(key, messages, [Video(clip.frames)], source.processor)


NEEDLE_KIND_BUILDERS = {"needle_regions": _needle_regions, "needles_chat": _needles_chat}
