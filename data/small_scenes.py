"""Scenes of 2 × 2 cells, a visual token each: the pictures of docs/text_retention.md.

Every document is a function of (seed, split, index); see `GlyphSource`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .document import Document, Image, Part, Text, chat_document
from .drawing import COLOURS, DIGITS, SHAPES, Glyph, draw_cells

if TYPE_CHECKING:
    from .glyphs import GlyphSource

CELLS = ("a1", "b1", "a2", "b2")  # raster order


@dataclass(frozen=True)
class SmallScene:
    """What stands in the four cells, all of them different, and the picture of it (uint8 [32, 32, 3])."""

    cells: tuple[Glyph, ...]
    picture: np.ndarray

    @property
    def caption(self) -> str:
        """Every cell in raster order, as the texts of category `scenes` have it."""
        return " ; ".join(f"{cell} {glyph}" for cell, glyph in zip(CELLS, self.cells, strict=True)) + " ."


def small_scene(rng: np.random.Generator, split: str) -> SmallScene:
    """A scene of digits and shapes, half and half in the mean, each kind once at most."""
    kinds: list[str] = []
    while len(kinds) < len(CELLS):
        some = DIGITS if rng.random() < 0.5 else SHAPES
        kind = some[rng.integers(len(some))]
        if kind not in kinds:
            kinds.append(kind)
    glyphs = tuple(Glyph(kind, list(COLOURS)[rng.integers(len(COLOURS))]) for kind in kinds)
    return SmallScene(glyphs, draw_cells(glyphs, 2, split, rng))


def _what_at(scene: SmallScene, cell: int) -> tuple[str, str, str]:
    return f"what is at {CELLS[cell]} ?", CELLS[cell], scene.cells[cell].kind


def _colour_at(scene: SmallScene, cell: int) -> tuple[str, str, str]:
    return f"what colour is at {CELLS[cell]} ?", CELLS[cell], scene.cells[cell].colour


# About a cell: what is asked, what the answer is about, which it says first, and what only the picture tells.
SMALL_SCENE_QUESTIONS = {"what_at": _what_at, "colour_at": _colour_at}


def _regions(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """For the region-text objective."""
    scene = small_scene(rng, source.split)
    texts = (Text(f"{cell} {glyph}", loss=True) for cell, glyph in zip(CELLS, scene.cells, strict=True))
    return Document(key, (Image(scene.picture), *texts))


def _captions(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    scene = small_scene(rng, source.split)
    return Document(key, (Image(scene.picture), Text(scene.caption + source.processor.tokenizer.eos_token, loss=True)))


def _interleaved(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A page of several pictures, each before its text; loss on all text."""
    parts: list[Part] = []
    for _ in range(int(rng.integers(source.images[0], source.images[1] + 1))):
        scene = small_scene(rng, source.split)
        parts += [Image(scene.picture), Text(scene.caption, loss=True)]
    return Document(key, (*parts, Text(source.processor.tokenizer.eos_token, loss=True)))


def _chat(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A question about each cell, in random order."""
    scene = small_scene(rng, source.split)
    messages: list[dict] = []
    for cell in rng.permutation(len(CELLS)):
        question, subject, fact = list(SMALL_SCENE_QUESTIONS.values())[rng.integers(2)](scene, int(cell))
        content: list[dict] = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": f"{subject} {fact}"})
    return chat_document(key, messages, [Image(scene.picture)], source.processor)


SMALL_SCENE_KIND_BUILDERS = {
    "small_regions": _regions,
    "small_captions": _captions,
    "small_interleaved": _interleaved,
    "small_chat": _chat,
}
