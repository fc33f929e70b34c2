"""The generated language: its entropy, its splits, and the small scenes that it speaks of."""

import itertools
import math
import re
from collections import Counter
from functools import partial

import numpy as np
import pytest

from foveate.data import sentences as language
from foveate.data.document import Image, Text
from foveate.data.drawing import COLOURS, KINDS, SPLITS
from foveate.data.encoding import encode
from foveate.data.glyphs import CHAT_TEMPLATE, WORDS, GlyphSource, glyph_tokenizer
from foveate.data.sentences import CATEGORIES, FACTS, Category, Draws, Sentences, draw_sentences, held_out, sentences
from foveate.data.small_scenes import CELLS, SMALL_SCENE_KIND_BUILDERS, small_scene
from foveate.vlm.processor import FoveateProcessor


@pytest.fixture(scope="module")
def speaker() -> FoveateProcessor:
    return FoveateProcessor(
        glyph_tokenizer("sentences"), image_size=(32, 32), patch_size=8, chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="module")
def test_texts() -> list[Sentences]:
    return list(held_out(500))


# Entropy


def every_text(category: str) -> dict[str, float]:
    """Text → probability, summed over all ways to draw it: the tree of draws, walked through from end to end."""
    found: dict[str, float] = {}
    fixed: list[int] = []
    while True:
        path: list[tuple[int, int]] = []  # of each draw: what was taken, of how many
        text = sentences(category, Draws(partial(follow, fixed, path))).text
        found[text] = found.get(text, 0.0) + math.prod(1 / n for _, n in path)
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return found
        fixed = [taken for taken, _ in path[:-1]] + [path[-1][0] + 1]


def follow(fixed: list[int], path: list[tuple[int, int]], n: int) -> int:
    """What `fixed` says for the next draw, or else the first; it is put down in `path`."""
    path.append((fixed[len(path)] if len(path) < len(fixed) else 0, n))
    return path[-1][0]


SMALL = {  # a language small enough to be listed
    "PEOPLE": ("ann", "ben", "carl"),
    "ADJECTIVES": ("old", "small"),
    "NOUNS": {name: language.NOUNS[name] for name in ("bird", "wolf")},
    "DIGITS": ("0", "5", "9"),
    "COPIED": ("rome", "cat"),
    "COLOURS": {"red": 0, "blue": 0},
    "KINDS": ("7", "ring"),
}


@pytest.mark.parametrize("category", CATEGORIES)
def test_log_likelihood_is_that_of_all_ways_to_draw_a_text(category: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(language, name, value)
    items = (1,) if category == "scenes" else (1, 2)
    monkeypatch.setitem(CATEGORIES, category, Category(CATEGORIES[category].item, items))
    listed = every_text(category)
    assert 10 < len(listed) < 5000
    assert math.isclose(sum(listed.values()), 1)
    rng = np.random.default_rng(0)
    seen: Counter[str] = Counter()
    for _ in range(2000):
        made = sentences(category, Draws(lambda n: int(rng.integers(n))))
        assert math.isclose(math.exp(made.log_likelihood), listed[made.text], rel_tol=1e-12)
        seen[made.text] += 1
    entropy = -sum(p * math.log(p) for p in listed.values())
    drawn = -sum(count * math.log(listed[text]) for text, count in seen.items()) / 2000
    spread = math.sqrt(sum(p * (math.log(p) + entropy) ** 2 for p in listed.values()) / 2000)
    assert abs(drawn - entropy) <= 4 * spread + 1e-9


def test_log_likelihood_of_a_known_text() -> None:
    """Three of 2, 3 or 4 items, and in each a person of 16: nothing else is drawn."""
    picked = iter([1, 0, 5, 5])
    made = sentences("facts", Draws(lambda n: next(picked)))
    told = [f"{name} lives in {{}} , has a {{}} and wears {{}} .".format(*FACTS[name]) for name in ("ann", "fred")]
    assert made.text == f"facts : {told[0]} {told[1]} {told[1]}"
    assert math.isclose(made.log_likelihood, -math.log(3) - 3 * math.log(16))


# What is true in it


def items(texts: list[Sentences], category: str) -> list[str]:
    return [
        item
        for text in texts
        if text.category == category
        for item in text.text.removeprefix(f"{category} : ").removesuffix(" .").split(" . ")
    ]


def test_sums_counting_and_copies_are_right(test_texts: list[Sentences]) -> None:
    for item in items(test_texts, "sums"):
        terms, total = item.split(" = ")
        assert sum(map(int, terms.split(" + "))) == int(total.replace(" ", ""))
    for item in items(test_texts, "counting"):
        _, step, _, *numbers = item.split()
        assert len(numbers) == 6
        assert {(int(b) - int(a)) % 10 for a, b in itertools.pairwise(numbers)} == {int(step)}
    for item in items(test_texts, "copying"):
        first, second = item.split(" again ")
        assert first == second


def test_verbs_agree_with_the_first_noun(test_texts: list[Sentences]) -> None:
    forms = {noun: verb for one, many, does, do in language.NOUNS.values() for noun, verb in ((one, does), (many, do))}
    numbers = set()
    for item in items(test_texts, "agreement"):
        _, noun, _, _, _, other, verb = item.split()
        assert forms[noun] == verb
        numbers.add((noun in [many for _, many, _, _ in language.NOUNS.values()], other.endswith(("s", "ren"))))
    assert len(numbers) == 4  # the nearer noun says nothing about the number


def test_facts_never_change(test_texts: list[Sentences]) -> None:
    told = {item.split()[0]: item for item in items(test_texts, "facts")}
    assert all(told[item.split()[0]] == item for item in items(test_texts, "facts"))
    assert len(told) == len(FACTS)


def test_scenes_are_told_twice(test_texts: list[Sentences]) -> None:
    for text in (text.text for text in test_texts if text.category == "scenes"):
        first, second = text.removeprefix("scenes : ").removesuffix(" .").split(" . again ")
        assert first == second
        assert tuple(phrase[:2] for phrase in first.split(" ; ")) == CELLS


# Splits


def test_no_text_is_in_two_splits_whatever_the_seed(speaker: FoveateProcessor) -> None:
    drawn = {split: {text.text for seed in (0, 1) for text in held_out(150, split, seed)} for split in SPLITS}
    assert all(len(texts) > 250 for texts in drawn.values())
    assert not any(drawn[a] & drawn[b] for a, b in itertools.combinations(SPLITS, 2))
    trained = {
        GlyphSource("sentences", speaker, seed=seed).document(index).parts[0].text  # type: ignore[union-attr]
        for seed in (0, 1)
        for index in range(300)
    }
    assert not trained & {text + "<|end|>" for text in drawn["test"] | drawn["dev"]}


def test_the_splits_have_their_shares() -> None:
    rng = np.random.default_rng(0)
    counts = Counter(sentences("sums", Draws(lambda n: int(rng.integers(n)))).split for _ in range(4000))
    assert {split: round(counts[split] / 4000, 1) for split in SPLITS} == {"train": 0.8, "dev": 0.1, "test": 0.1}


def test_held_out_texts_are_the_same_again_and_differ() -> None:
    texts = list(held_out(100))
    assert texts == list(held_out(100))
    assert len({text.text for text in texts}) == 100
    assert texts != list(held_out(100, seed=1))
    assert {text.split for text in texts} == {"test"}
    assert {text.category for text in texts} == set(CATEGORIES)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"split is 'valid'; accepted: train, dev, test"):
        next(held_out(1, "valid"))
    with pytest.raises(ValueError, match=r"category is 'verse'; accepted: facts, "):
        sentences("verse", Draws(lambda n: 0))


# Documents


def test_a_document_is_one_text_with_loss_on_all_of_it(speaker: FoveateProcessor) -> None:
    source = GlyphSource("sentences", speaker, seed=3)
    drawn = draw_sentences(source.rng(4), "train")
    (part,) = source.document(4).parts
    assert part == Text(drawn.text + "<|end|>", loss=True)
    sample = encode(source.document(4), speaker)
    assert sample.loss_tokens == sample.tokens - 1 == len(drawn.text.split())


def test_every_word_is_known_and_the_image_tasks_words_keep_their_ids(speaker: FoveateProcessor) -> None:
    for kind in ("sentences", *SMALL_SCENE_KIND_BUILDERS):
        for index in range(60):
            for part in GlyphSource(kind, speaker).document(index).parts:
                if isinstance(part, Text):
                    assert speaker.tokenizer.unk_token_id not in speaker.tokenizer.encode(part.text), part.text
    older = glyph_tokenizer()
    assert older.convert_tokens_to_ids(list(WORDS)) == glyph_tokenizer("sentences").convert_tokens_to_ids(list(WORDS))


# Small scenes


def test_small_scenes_show_what_they_say() -> None:
    for index in range(40):
        scene = small_scene(np.random.default_rng(index), "test")
        assert scene.picture.shape == (32, 32, 3)
        assert len({glyph.kind for glyph in scene.cells}) == 4
        for i, glyph in enumerate(scene.cells):
            patch = scene.picture[16 * (i // 2) :, 16 * (i % 2) :][:16, :16].astype(float).reshape(-1, 3)
            bright = patch[patch.sum(1).argsort()[-8:]].mean(0)
            shown = min(COLOURS, key=lambda name: float(np.abs(bright / bright.max() * 255 - COLOURS[name]).sum()))
            assert shown == glyph.colour


def test_small_captions_and_questions_are_about_their_scene(speaker: FoveateProcessor) -> None:
    for index in range(30):
        image, caption = GlyphSource("small_captions", speaker).document(index).parts
        assert isinstance(image, Image) and isinstance(caption, Text) and caption.loss
        said = [phrase.split() for phrase in caption.text.removesuffix(" .<|end|>").split(" ; ")]
        assert tuple(cell for cell, _, _ in said) == CELLS
        assert all(colour in COLOURS and kind in KINDS for _, colour, kind in said)
        image, *turns = GlyphSource("small_interleaved", speaker, images=(2, 3)).document(index).parts[:-1]
        assert 1 + len(turns) in (4, 6)
    scene = small_scene(GlyphSource("small_chat", speaker).rng(7), "train")
    parts = GlyphSource("small_chat", speaker).document(7).parts
    answers = [part.text for part in parts if isinstance(part, Text) and part.loss]
    questions = [part.text for part in parts if isinstance(part, Text) and not part.loss and "?" in part.text]
    assert len(answers) == len(questions) == 4
    asked = set()
    for question, answer in zip(questions, answers, strict=True):
        words, said = re.sub(r"<\|\w+\|>", "", question).split(), answer.removesuffix("<|end|>")
        glyph = scene.cells[CELLS.index(words[-2])]
        assert said == f"{words[-2]} {glyph.colour if 'colour' in words else glyph.kind}"
        asked.add("colour" in words)
    assert asked == {True, False}


@pytest.mark.parametrize("kind", ["sentences", *SMALL_SCENE_KIND_BUILDERS])
def test_documents_depend_on_seed_split_and_index_alone(speaker: FoveateProcessor, kind: str) -> None:
    def made(seed: int, split: str, index: int) -> str:
        parts = GlyphSource(kind, speaker, split=split, seed=seed).document(index).parts
        return repr([part.text if isinstance(part, Text) else part.source.tobytes() for part in parts])

    assert made(0, "train", 5) == made(0, "train", 5)
    assert len({made(0, "train", 5), made(1, "train", 5), made(0, "test", 5), made(0, "train", 6)}) == 4
