"""Episodes of novel labels: their structure, where loss falls, and what training never shows."""

from collections import Counter

import numpy as np
import pytest

from foveate.data import episodes
from foveate.data.document import Document, Image, Text
from foveate.data.drawing import COLOURS
from foveate.data.encoding import IGNORE, encode
from foveate.data.episodes import CLASSES, KEYS, NAMES, NEW_CLASSES, NEW_NAMES, class_masks, draw_classes
from foveate.data.glyphs import WORDS, GlyphSource, glyph_tokenizer
from foveate.vlm.processor import FoveateProcessor


@pytest.fixture(scope="module")
def processor() -> FoveateProcessor:
    return FoveateProcessor(
        glyph_tokenizer("episodes"), image_size=(16, 16), patch_size=8, chat_template=episodes.EPISODE_TEMPLATE
    )


def source(kind: str, processor: FoveateProcessor, split: str = "train", **options) -> GlyphSource:
    return GlyphSource(kind, processor, split, **({"objects": (2, 8), "turns": (16, 16)} | options))


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The classes of each document that is made from now on."""
    classes: list[tuple[str, ...]] = []
    real = episodes.draw_classes

    def recording(some, split, rng):
        classes.append(tuple(some))
        return real(some, split, rng)

    monkeypatch.setattr(episodes, "draw_classes", recording)
    return classes


def named(document: Document) -> list[str]:
    return [part.text.strip() for part in document.parts if isinstance(part, Text)]


def test_there_are_41_classes_of_which_eight_are_new() -> None:
    assert len(set(CLASSES)) == 41 and len(NEW_CLASSES) == len(NEW_NAMES) == 8
    assert set(NEW_CLASSES) < set(CLASSES)
    assert len({*NAMES, *KEYS, *CLASSES, *COLOURS}) == len(NAMES) + len(KEYS) + len(CLASSES) + len(COLOURS)


def test_every_word_is_one_token_and_the_quickstarts_words_are_what_they_were(processor: FoveateProcessor) -> None:
    for word in episodes.EPISODE_WORDS:
        ids = processor.tokenizer(f" {word} ")["input_ids"]
        assert len(ids) == 1 and ids != [processor.tokenizer.unk_token_id]
    assert not {"bamep", *KEYS} & set(WORDS)
    assert len(glyph_tokenizer()) == 6 + len(dict.fromkeys(WORDS))


def test_an_episode_is_permutations_of_its_classes_each_with_one_name(
    processor: FoveateProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes, ways = drawn(monkeypatch), []
    for index in range(40):
        *names, end = named(source("image_episodes", processor).document(index))
        shown = classes[-1]
        assert end == "<|end|>" and len(shown) == len(names) == 16
        pairs = set(zip(shown, names, strict=True))
        ways.append(len(pairs))
        assert len({name for _, name in pairs}) == len({one for one, _ in pairs}) == len(pairs)
        for start in range(0, 16, len(pairs)):
            block = shown[start : start + len(pairs)]
            assert len(set(block)) == len(block)  # a permutation, the last one cut
    assert set(ways) == set(range(2, 9))


def test_names_and_order_are_drawn_anew_in_each_document(
    processor: FoveateProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = drawn(monkeypatch)
    of_class: dict[str, set[str]] = {}
    orders = set()
    for index in range(60):
        names = named(source("image_episodes", processor, objects=(3, 3)).document(index))[:-1]
        for one, name in zip(classes[-1], names, strict=True):
            of_class.setdefault(one, set()).add(name)
        orders.add(tuple(classes[-1].index(one) for one in classes[-1]))
    assert min(len(names) for one, names in of_class.items()) > 1
    assert len(orders) > 40


def test_loss_falls_on_names_after_their_class_was_seen_and_on_the_end_alone(processor: FoveateProcessor) -> None:
    for kind in ("image_episodes", "text_episodes"):
        sample = encode(source(kind, processor).document(3), processor)
        ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
        assert len(ids) == 33 and ids[-1] == labels[-1] == processor.tokenizer.eos_token_id
        seen: set[int] = set()
        for place in range(16):
            key, name = ids[2 * place], ids[2 * place + 1]
            assert labels[2 * place] == IGNORE
            assert labels[2 * place + 1] == (name if name in seen else IGNORE), (key, place)
            seen.add(name)


def test_training_shows_no_new_class_no_new_name_and_no_held_out_picture(
    processor: FoveateProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = drawn(monkeypatch)
    words: Counter[str] = Counter()
    for kind in ("image_episodes", "image_captions", "episode_regions"):
        for index in range(100):
            words.update(" ".join(named(source(kind, processor, frames=(8, 8)).document(index))).split())
    shown = {one for some in classes for one in some}
    assert shown == set(CLASSES) - set(NEW_CLASSES)
    assert not (set(NEW_CLASSES) | set(NEW_NAMES)) & set(words)
    for name in CLASSES:
        train, dev, test = (class_masks(name, split) for split in ("train", "dev", "test"))
        held_out = np.concatenate([dev, test])
        same = (train[:, None] == held_out[None]).all(axis=(2, 3))
        assert not same.any() and len(test) >= 8, name


def test_new_names_do_stand_in_texts(processor: FoveateProcessor) -> None:
    words = {word for i in range(60) for word in named(source("text_episodes", processor).document(i))}
    assert set(NEW_NAMES) < words


def test_facts_never_change_and_nothing_in_a_document_repeats(processor: FoveateProcessor) -> None:
    known: dict[str, str] = {}
    for split in ("train", "test"):
        for index in range(40):
            *words, end = named(source("text_facts", processor, split).document(index))
            assert end == "<|end|>" and len(set(words)) == len(words) == 32
            for key, name in zip(words[::2], words[1::2], strict=True):
                assert known.setdefault(key, name) == name
    assert len(set(known.values())) == len(known) == 48


def test_repeats_go_over_the_same_words_with_loss_from_the_second_time(processor: FoveateProcessor) -> None:
    periods = set()
    for index in range(120):
        sample = encode(source("text_repeats", processor, objects=(2, 16)).document(index), processor)
        ids, labels = sample.input_ids, sample.labels
        period = int((labels == IGNORE).sum())
        periods.add(period)
        assert len(ids) == 32 and (labels[period:] == ids[period:]).all()
        assert (ids[period:] == ids[:-period]).all()
    assert periods == set(range(2, 17))


def test_a_caption_tells_the_pictures_colour_and_class(
    processor: FoveateProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = drawn(monkeypatch)
    for index in range(30):
        document = source("image_captions", processor).document(index)
        colour, name, end = named(document)[0].split()
        assert (name,) == classes[-1] and end == "<|end|>"
        [image] = [part.source for part in document.parts if isinstance(part, Image)]
        bright = image.reshape(-1, 3)[np.argsort(image.reshape(-1, 3).max(1))[-10:]].mean(0)
        likeness = {one: np.dot(rgb, bright) / np.linalg.norm(rgb) for one, rgb in COLOURS.items()}
        assert max(likeness, key=likeness.get) == colour


def test_classes_look_different_and_each_picture_is_its_own() -> None:
    means = np.stack([class_masks(name, "train").mean(0).ravel() for name in CLASSES])
    distance = np.linalg.norm(means[:, None] - means[None], axis=2) + 99 * np.eye(41)
    assert distance.min() > 1.0
    twice = draw_classes(["a", "a"], "test", np.random.default_rng(0)).pixels
    assert twice.shape == (2, 16, 16, 3) and (twice[0] != twice[1]).any()
    with pytest.raises(ValueError, match="class is 'o'; accepted: 0, 1"):
        class_masks("o", "test")


def test_the_chat_template_renders_examples_as_the_document_that_training_reads(processor: FoveateProcessor) -> None:
    document = source("image_episodes", processor).document(0)
    messages = [
        message
        for name in named(document)[:-1]
        for message in ({"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": name})
    ]
    rendered = processor.apply_chat_template(messages)
    assert processor.tokenizer(rendered)["input_ids"] == encode(document, processor).input_ids[:-1].tolist()
