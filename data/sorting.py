"""Scenes of eight rows, and questions whose answers each depend on a whole row: what tells pruning methods apart.

A scene has 8 × 4 cells, all full: 32 visual tokens where a cell is one. "What is in row 3 ?" is answered with the row's
four glyphs from left to right, "what does row 3 have ?" with the same four *sorted*: digits, then shapes, in the order
of `KINDS`. A word of a sorted answer can be told only with all four cells in view, and the cells are looked at again
for each word, so an answer tells whether a method keeps what is needed; a single look-up does not.
Every document is a function of (seed, split, index); see `GlyphSource`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .document import Document, Image, Text, chat_document
from .drawing import COLOURS, KINDS, Glyph, draw_cells

if TYPE_CHECKING:
    from .glyphs import GlyphSource

ROWS, COLUMNS = 8, 4  # cells
ROW_NAMES = ("a1", "b1", "c1", "d1", "a2", "b2", "c2", "d2")  # top to bottom; digits name what stands in cells


@dataclass(frozen=True)
class RowScene:
    """What stands in the 8 × 4 cells, in raster order, and the picture of it (uint8 [128, 64, 3])."""

    cells: tuple[Glyph, ...]
    picture: np.ndarray

    def row(self, row: int) -> tuple[Glyph, ...]:
        """The glyphs of a row, from 0, from left to right."""
        return self.cells[row * COLUMNS : (row + 1) * COLUMNS]


def row_scene(rng: np.random.Generator, split: str) -> RowScene:
    """A scene whose rows hold four different kinds each, in any colours."""
    colours = list(COLOURS)
    cells = [
        Glyph(KINDS[kind], colours[rng.integers(len(colours))])
        for _ in range(ROWS)
        for kind in rng.permutation(len(KINDS))[:COLUMNS]
    ]
    return RowScene(tuple(cells), draw_cells(cells, COLUMNS, split, rng))


def read_row(scene: RowScene, row: int, colours: bool = True) -> tuple[str, str]:
    """What is asked for a row from left to right, and the true answer; rows count from 0."""
    return f"what is in row {ROW_NAMES[row]} ?", _told(scene.row(row), colours)


def sort_row(scene: RowScene, row: int, colours: bool = True) -> tuple[str, str]:
    """What is asked for a row in the order of `KINDS`, and the true answer."""
    glyphs = sorted(scene.row(row), key=lambda glyph: KINDS.index(glyph.kind))
    return f"what does row {ROW_NAMES[row]} have ?", _told(glyphs, colours)


def _told(glyphs: Sequence[Glyph], colours: bool) -> str:
    return " ".join(str(glyph) if colours else glyph.kind for glyph in glyphs)


def _row_regions(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A scene and, cell by cell, its row and what stands in it: for the region-text objective."""
    scene = row_scene(rng, source.split)
    texts = (Text(f"{ROW_NAMES[i // COLUMNS]} {glyph.kind}", loss=True) for i, glyph in enumerate(scene.cells))
    return Document(key, (Image(scene.picture), *texts))


def _row_captions(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A scene and its rows from left to right, each after its name, in random order; no colours."""
    scene = row_scene(rng, source.split)
    parts: list[Image | Text] = [Image(scene.picture)]
    for row in rng.permutation(ROWS).tolist():
        parts += [Text(f"{ROW_NAMES[row]} "), Text(f"{read_row(scene, row, colours=False)[1]} ; ", loss=True)]
    return Document(key, (*parts, Text("<|end|>")))


def _kind_chat(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    return _chat(source, rng, key, colours=False)


def _row_chat(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    return _chat(source, rng, key, colours=True)


def _chat(source: GlyphSource, rng: np.random.Generator, key: str, colours: bool) -> Document:
    """Questions about rows that differ, each read or sorted: an answer never stands in the conversation already."""
    scene = row_scene(rng, source.split)
    turns = min(ROWS, int(rng.integers(source.turns[0], source.turns[1] + 1)))
    messages: list[dict] = []
    for row in rng.permutation(ROWS)[:turns].tolist():
        question, said = (read_row, sort_row)[rng.integers(2)](scene, row, colours)
        content: list[dict] = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": said})
    return chat_document(key, messages, [Image(scene.picture)], source.processor)


SORTING_KIND_BUILDERS = {
    "row_regions": _row_regions,
    "row_captions": _row_captions,
    "row_kind_chat": _kind_chat,
    "row_chat": _row_chat,
}
