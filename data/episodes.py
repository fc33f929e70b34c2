"""Episodes of novel labels: pictures and names that mean something in one document only, for in-context learning.

A document is pictures and names in turn, `<image> bamep <image> dutul <image> bamep …`: which class of pictures has
which name is drawn anew for each document, so a name can be told from the document's earlier pairs alone. Classes come
as random permutations, one after the other, so that a repetition is as likely far back as near. There are 41 classes:
handwritten digits, shapes and letters lying on their side, each in any colour, which no name depends on. Eight of the
classes and eight of the names are never in an image document of training.

Beside them: text alone, with words in the place of pictures (`text_episodes`), and sequences that repeat; pairs of a
picture and its caption ("red 7"), which is the same in every document; and `text_facts`, the control whose words keep
their names in all documents, so that nothing can be learnt from the context.
The setting is Flamingo's and Frozen's open-ended classification (arXiv 2106.13884, section 4.3); that names change from
document to document is what makes learning in context pay (arXiv 2205.05055, section 3).
Every document is a function of (seed, split, index); see `GlyphSource`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from ..vlm.processor import CONTENT_MACRO
from .document import Document, Image, Part, Text, Video
from .drawing import CELL, COLOURS, DIGITS, GLYPH, SHAPES, SPLITS, digit_masks, shape_mask

if TYPE_CHECKING:
    from .glyphs import GlyphSource

LETTERS = tuple("abcdefghijklmnpqrstuvwxyz")  # no o, which lies on its side as it stands
CLASSES = (*DIGITS, *SHAPES, *LETTERS)
NEW_CLASSES = CLASSES[4::5]  # 4, 9, ring and five letters: never in an image document of training
KNOWN_CLASSES = tuple(name for name in CLASSES if name not in NEW_CLASSES)
ONSETS, CODAS = ("ba", "du", "fi", "go", "ke", "lo"), ("dak", "mep", "nif", "rob", "tul", "wug", "zin", "pel")
NAMES = tuple(onset + coda for onset in ONSETS for coda in CODAS)
NEW_NAMES = NAMES[-8:]  # in texts, never beside a picture in training
KNOWN_NAMES = NAMES[:-8]
KEYS = tuple(
    onset + coda for onset in ("cha", "she", "thi", "kwo", "plu", "gra", "sme", "tri") for coda in CODAS
)  # what has a name in texts
EPISODE_WORDS = (*COLOURS, *CLASSES, *NAMES, *KEYS)
VARIANTS = {"train": 24, "dev": 8, "test": 8}  # drawings of a shape or letter, each turned and shrunk a little

# A conversation is the bare document: what the user shows, what the assistant calls it, and so on.
EPISODE_TEMPLATE = (
    CONTENT_MACRO
    + """
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- ' ' -}}{%- generation -%}{{- content(message) -}}{%- endgeneration -%}{{- ' ' -}}
{%- else -%}{{- content(message) -}}{%- endif -%}
{%- endfor -%}"""
)


@cache
def class_masks(name: str, split: str) -> np.ndarray:
    """A class's pictures in a split, float32 [pictures, GLYPH, GLYPH] in [0, 1]; no two splits share one.

    Raises:
        ValueError: no such class.
    """
    if name not in CLASSES:
        raise ValueError(f"class is {name!r}; accepted: {', '.join(CLASSES)}")
    if name in DIGITS:
        return digit_masks(split)[name]
    rng = np.random.default_rng([41, CLASSES.index(name), SPLITS.index(split)])
    base = _letter_mask(name) if name in LETTERS else shape_mask(name)
    image = PILImage.fromarray((base * 255).astype(np.uint8))
    drawn = []
    for _ in range(VARIANTS[split]):
        side = int(rng.integers(10, GLYPH + 1))
        turned = image.resize((side, side), PILImage.Resampling.BICUBIC).rotate(
            float(rng.uniform(-12, 12)), PILImage.Resampling.BICUBIC
        )
        canvas = np.zeros((GLYPH, GLYPH), np.float32)
        at = (GLYPH - side) // 2
        canvas[at : at + side, at : at + side] = np.asarray(turned, np.float32) / 255
        drawn.append(canvas)
    return np.stack(drawn)


def _letter_mask(letter: str) -> np.ndarray:
    """A capital letter lying on its right side, float32 [GLYPH, GLYPH] in [0, 1]."""
    font = ImageFont.load_default(96)
    canvas = PILImage.new("L", (160, 160))
    ImageDraw.Draw(canvas).text((20, 10), letter.upper(), fill=255, font=font, stroke_width=3, stroke_fill=255)
    cut = canvas.crop(canvas.getbbox()).rotate(-90, expand=True)
    side = max(cut.size)
    square = PILImage.new("L", (side, side))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    small = square.resize((GLYPH, GLYPH), PILImage.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


@dataclass(frozen=True)
class Pictures:
    """Pictures of one glyph each: uint8 [pictures, CELL, CELL, 3], and the colour of each glyph."""

    pixels: np.ndarray
    colours: tuple[str, ...]


def draw_classes(classes: Sequence[str], split: str, rng: np.random.Generator) -> Pictures:
    """Draws a picture of each class, in a random colour, shade and place, on a noisy dark ground."""
    n, names = len(classes), list(COLOURS)
    ground = rng.standard_normal((n, CELL, CELL, 3), dtype=np.float32) * 10 + rng.uniform(15, 55, (n, 1, 1, 1))
    shifts = rng.integers(0, CELL - GLYPH + 1, (n, 2)).tolist()
    colours = rng.integers(len(names), size=n)
    shades = rng.uniform(0.8, 1.0, (n, 1))
    paint = np.array(list(COLOURS.values()))[colours] * shades  # [n, 3]
    cover = np.zeros((n, CELL, CELL, 1), np.float32)  # of the glyph, in [0, 1]
    for i, (name, pick, (top, left)) in enumerate(zip(classes, rng.random(n).tolist(), shifts, strict=True)):
        masks = class_masks(name, split)
        cover[i, top : top + GLYPH, left : left + GLYPH, 0] = masks[int(pick * len(masks))]
    canvas = ground + cover * (paint[:, None, None] - ground)
    return Pictures(canvas.clip(0, 255).astype(np.uint8), tuple(names[c] for c in colours))


def permuted(ways: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Random permutations of 0 … ways - 1, one after the other, cut to `length`; int64 [length]."""
    rounds = [rng.permutation(ways) for _ in range(-(-length // ways))]
    return np.concatenate([*rounds, np.empty(0, np.int64)])[:length]


@dataclass(frozen=True)
class Episode:
    """Which key stands at each place, and what it is called.

    Attributes:
        order: number of the key at each place, int64 [pairs].
        keys: classes or words, all different.
        names: of each key, all different.
    """

    order: np.ndarray
    keys: tuple[str, ...]
    names: tuple[str, ...]


def draw_episode(rng: np.random.Generator, keys: Sequence[str], names: Sequence[str], ways: int, pairs: int) -> Episode:
    """An episode of so many pairs of `ways` of the keys, each with one of the names."""
    chosen = [keys[i] for i in rng.permutation(len(keys))[:ways]]
    called = [names[i] for i in rng.permutation(len(names))[:ways]]
    return Episode(permuted(ways, pairs, rng), tuple(chosen), tuple(called))


def _document(key: str, episode: Episode, shown: Sequence[Part]) -> Document:
    """Keys as they are shown, each before its name; loss on a name wherever the key was seen before, and on the end."""
    parts: list[Part] = []
    seen: set[int] = set()
    for number, part in zip(episode.order.tolist(), shown, strict=True):
        parts += [part, Text(f" {episode.names[number]} ", loss=number in seen)]
        seen.add(number)
    return Document(key, (*parts, Text("<|end|>", loss=True)))


def _size(source: GlyphSource, rng: np.random.Generator) -> tuple[int, int]:
    """Keys and pairs of an episode."""
    ways, pairs = (int(rng.integers(low, high + 1)) for low, high in (source.objects, source.turns))
    return ways, pairs


def _image_episodes(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    episode = draw_episode(rng, KNOWN_CLASSES, KNOWN_NAMES, *_size(source, rng))
    pictures = draw_classes([episode.keys[i] for i in episode.order], source.split, rng).pixels
    return _document(key, episode, [Image(picture) for picture in pictures])


def _text_episodes(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    episode = draw_episode(rng, KEYS, NAMES, *_size(source, rng))
    return _document(key, episode, [Text(episode.keys[i]) for i in episode.order])


def _text_facts(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """Keys that differ, each before its name, which is the same in all documents; loss on all names."""
    pairs = _size(source, rng)[1]
    parts: list[Part] = []
    for i in rng.permutation(len(NAMES))[:pairs]:
        parts += [Text(KEYS[i]), Text(f" {NAMES[i * 5 % len(NAMES)]} ", loss=True)]
    return Document(key, (*parts, Text("<|end|>", loss=True)))


def _text_repeats(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """Some random words, as many as an episode has keys, over and over; loss from their first repetition on."""
    period, pairs = _size(source, rng)
    words = (*KEYS, *NAMES)
    once = [words[i] for i in rng.integers(len(words), size=period)]
    repeated = [once[i % period] for i in range(period, max(2 * pairs, period + 1))]
    return Document(key, (Text(" ".join(once) + " "), Text(" ".join(repeated), loss=True)))


def _image_captions(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """One picture and its caption, which a picture has in every document."""
    name = KNOWN_CLASSES[rng.integers(len(KNOWN_CLASSES))]
    picture = draw_classes([name], source.split, rng)
    return Document(key, (Image(picture.pixels[0]), Text(f" {picture.colours[0]} {name} <|end|>", loss=True)))


def _episode_regions(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A clip of pictures, and each one's caption: for the region-text objective."""
    frames = int(rng.integers(source.frames[0], source.frames[1] + 1))
    classes = [KNOWN_CLASSES[i] for i in rng.integers(len(KNOWN_CLASSES), size=frames)]
    pictures = draw_classes(classes, source.split, rng)
    texts = (Text(f"{colour} {name}", loss=True) for colour, name in zip(pictures.colours, classes, strict=True))
    return Document(key, (Video(pictures.pixels), *texts))


EPISODE_KIND_BUILDERS = {
    "image_episodes": _image_episodes,
    "text_episodes": _text_episodes,
    "text_facts": _text_facts,
    "text_repeats": _text_repeats,
    "image_captions": _image_captions,
    "episode_regions": _episode_regions,
}
