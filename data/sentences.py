"""Generated text with something to remember in it, whose entropy is known: for what a VLM keeps of its LLM's language.

A document is a heading, which names its category, some items of it, and the end. What can be known is not random: facts
about people that never change, which verb goes with which noun and in which number, sums, counting, copying, and what a
described scene shows where. The rest is drawn evenly, and the draws of a text can be told from it, so the
log-likelihood that a reader who knows everything gives it is exact: what a model's loss can't fall below.

Documents are split by a hash of their text: one of the split `test` is never drawn in `train`, whatever the seed. What
a hash decides can't be learned, so the likelihood is that of the whole language, not of the split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .document import Document, Text
from .drawing import COLOURS, DIGITS, KINDS, SPLITS
from .small_scenes import CELLS, SMALL_SCENE_KIND_BUILDERS

if TYPE_CHECKING:
    from .glyphs import GlyphSource

T = TypeVar("T")
SHARES = {"train": 0.8, "dev": 0.1, "test": 0.1}  # of all texts there are

PEOPLE = (
    "ann", "ben", "carl", "dora", "emma", "fred", "gina", "hans", "ida", "jack", "kate", "leo", "mia", "nora", "otto",
    "paul",
)  # fmt: skip
TOWNS = ("rome", "paris", "oslo", "cairo", "lima", "delhi", "tokyo", "quito")
PETS = ("cat", "dog", "horse", "goat", "duck", "snake", "mouse", "frog")
NOUNS = {  # one, many, what it does, what they do
    "bird": ("bird", "birds", "sings", "sing"),
    "child": ("child", "children", "plays", "play"),
    "farmer": ("farmer", "farmers", "digs", "dig"),
    "fish": ("carp", "carps", "swims", "swim"),
    "tree": ("tree", "trees", "grows", "grow"),
    "wolf": ("wolf", "wolves", "howls", "howl"),
    "baker": ("baker", "bakers", "bakes", "bake"),
    "river": ("river", "rivers", "flows", "flow"),
}
ADJECTIVES = ("old", "small", "quiet", "tall")
COPIED = (*TOWNS, *PETS)


def _facts() -> dict[str, tuple[str, str, str]]:
    """Person → town, pet and colour: drawn once, the same for every seed."""
    rng = np.random.default_rng(20231212)
    return {
        person: tuple(str(values[rng.integers(len(values))]) for values in (TOWNS, PETS, tuple(COLOURS)))  # type: ignore[misc]
        for person in PEOPLE
    }


FACTS = _facts()


class Draws:
    """The draws that a text is made of, each even, and their log-likelihood.

    Args:
        pick: gives a number below the one it is called with.
    """

    def __init__(self, pick: Callable[[int], int]):
        self.pick, self.log_likelihood = pick, 0.0

    def one(self, options: Sequence[T]) -> T:
        """One of the options."""
        self.log_likelihood -= math.log(len(options))
        return options[self.pick(len(options))]


def _fact(draws: Draws) -> str:
    person = draws.one(PEOPLE)
    town, pet, colour = FACTS[person]
    return f"{person} lives in {town} , has a {pet} and wears {colour} ."


def _agreement(draws: Draws) -> str:
    """The verb agrees with the first noun, whatever stands between (Linzen et al., arXiv 1611.01368)."""
    one, many, does, do = draws.one(list(NOUNS.values()))
    plural = draws.one((False, True))
    other = draws.one(list(NOUNS.values()))[draws.one((0, 1))]
    adjective = draws.one(ADJECTIVES)
    return f"the {many if plural else one} near the {adjective} {other} {do if plural else does} ."


def _sum(draws: Draws) -> str:
    first, second = int(draws.one(DIGITS)), int(draws.one(DIGITS))
    return f"{first} + {second} = {' '.join(str(first + second))} ."


def _counting(draws: Draws) -> str:
    """Six numbers, each so much more than the one before; of 10 and more the last digit."""
    step, start = draws.one((1, 2, 3)), int(draws.one(DIGITS))
    numbers = " ".join(str((start + step * i) % 10) for i in range(6))
    return f"by {step} from {numbers} ."


def _copy(draws: Draws) -> str:
    words = " ".join(draws.one(COPIED) for _ in range(draws.one((2, 3, 4))))
    return f"{words} again {words} ."


def _scene(draws: Draws) -> str:
    """What stands in four cells, told twice: what `small_scenes` shows in pictures."""
    told = " ; ".join(f"{cell} {draws.one(tuple(COLOURS))} {draws.one(KINDS)}" for cell in CELLS)
    return f"{told} . again {told} ."


@dataclass(frozen=True)
class Category:
    """Texts of one category: an item, and how many a text may have."""

    item: Callable[[Draws], str]
    items: tuple[int, ...]


CATEGORIES = {
    "facts": Category(_fact, (2, 3, 4)),
    "agreement": Category(_agreement, (3, 4, 5)),
    "sums": Category(_sum, (4, 5, 6)),
    "counting": Category(_counting, (3, 4)),
    "copying": Category(_copy, (2, 3, 4)),
    "scenes": Category(_scene, (1,)),
}


@dataclass(frozen=True)
class Sentences:
    """A text.

    Attributes:
        category: one of `CATEGORIES`, its first word.
        text: words with a space between; the end of text is not among them.
        log_likelihood: of all words but the first, and of the end, in nats, for a reader who knows the language.
    """

    category: str
    text: str
    log_likelihood: float

    @property
    def split(self) -> str:
        """The split that the text belongs to, by its hash."""
        place = int.from_bytes(blake2b(self.text.encode(), digest_size=6).digest()) / 2**48
        for name, share in SHARES.items():
            place -= share
            if place < 0:
                return name
        return SPLITS[-1]


def sentences(category: str, draws: Draws) -> Sentences:
    """A text of a category, of whatever split.

    Raises:
        ValueError: no such category.
    """
    if category not in CATEGORIES:
        raise ValueError(f"category is {category!r}; accepted: {', '.join(CATEGORIES)}")
    made = CATEGORIES[category]
    items = [made.item(draws) for _ in range(draws.one(made.items))]
    return Sentences(category, " ".join((category, ":", *items)), draws.log_likelihood)


def draw_sentences(rng: np.random.Generator, split: str) -> Sentences:
    """A text of a split, its category drawn evenly."""
    category = list(CATEGORIES)[rng.integers(len(CATEGORIES))]
    while True:
        made = sentences(category, Draws(lambda n: int(rng.integers(n))))
        if made.split == split:
            return made


def held_out(n: int, split: str = "test", seed: int = 0) -> Iterator[Sentences]:
    """n different texts to measure with; the same for the same seed and split.

    Raises:
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}")
    seen: set[str] = set()
    for index in count():
        if len(seen) == n:
            return
        made = draw_sentences(np.random.default_rng([41, seed, SPLITS.index(split), index]), split)
        if made.text not in seen:
            seen.add(made.text)
            yield made


def _sentences(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """Text alone; loss on all of it."""
    text = draw_sentences(rng, source.split).text
    return Document(key, (Text(text + source.processor.tokenizer.eos_token, loss=True),))


SENTENCE_WORDS = (
    *CATEGORIES, ":", *PEOPLE, *TOWNS, *PETS, *(word for forms in NOUNS.values() for word in forms), *ADJECTIVES,
    "lives", "wears", "near", "by", "from", "again", "+", "=",
)  # fmt: skip
SENTENCE_KIND_BUILDERS = {"sentences": _sentences, **SMALL_SCENE_KIND_BUILDERS}
