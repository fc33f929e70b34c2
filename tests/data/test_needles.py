"""Needles in clips: what a clip shows, what is asked about it, and that nothing else tells the answer."""

from collections import Counter

import numpy as np
import pytest

from foveate.data.document import Text, Video
from foveate.data.drawing import COLOURS
from foveate.data.encoding import encode
from foveate.data.glyphs import CHAT_TEMPLATE, GlyphSource, glyph_tokenizer
from foveate.data.needles import Haystack, haystack, needle_question, without_first
from foveate.vlm.processor import FoveateProcessor


@pytest.fixture(scope="module")
def processor() -> FoveateProcessor:
    return FoveateProcessor(
        glyph_tokenizer(), image_size=(16, 16), video_size=(16, 16), patch_size=8, chat_template=CHAT_TEMPLATE,
        frame_separator="",
    )  # fmt: skip


def clips(n: int, frames: int = 40) -> list[Haystack]:
    return [haystack(np.random.default_rng([3, i]), "train", frames) for i in range(n)]


def shown_colour(frame: np.ndarray) -> str:
    """The colour of a frame's brightest pixels."""
    pixels = frame.reshape(-1, 3).astype(float)
    bright = pixels[np.argsort(pixels.max(axis=1))[-20:]].mean(axis=0)
    return max(COLOURS, key=lambda name: np.dot(COLOURS[name], bright) / np.linalg.norm(COLOURS[name]))


def test_frames_show_what_they_are_said_to() -> None:
    for clip in clips(3):
        assert clip.frames.shape == (40, 16, 16, 3)
        assert [shown_colour(frame) for frame in clip.frames] == [glyph.colour for glyph in clip.glyphs]


def test_four_digits_of_four_colours_stand_anywhere_among_shapes() -> None:
    places: Counter[int] = Counter()
    for clip in clips(200):
        digits = [i for i, glyph in enumerate(clip.glyphs) if glyph.kind.isdigit()]
        assert sorted(clip.needles) == digits
        assert len({clip.glyphs[i].kind for i in digits}) == len({clip.glyphs[i].colour for i in digits}) == 4
        places.update(clip.needles[:1])
    assert len(places) > 36
    assert max(places.values()) < 16  # 5 expected


def test_the_colour_alone_does_not_tell_the_frame() -> None:
    for clip in clips(20):
        colour = clip.glyphs[clip.needles[0]].colour
        assert sum(glyph.colour == colour for glyph in clip.glyphs) > 1


def test_a_question_is_answered_by_one_digit() -> None:
    for clip in clips(20):
        question, answer = needle_question(clip.glyphs[clip.needles[0]])
        colour, digit = answer.split()
        assert question == f"which digit is {colour} ?"
        assert [g.kind for g in clip.glyphs if g.colour == colour and g.kind.isdigit()] == [digit]


def test_needles_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="needles is 4 in 3 frames; accepted: 1 to 3"):
        haystack(np.random.default_rng(0), "train", 3)
    with pytest.raises(ValueError, match="accepted: 1 to 6"):
        haystack(np.random.default_rng(0), "train", 30, needles=7)
    for place in (-1, 30):
        with pytest.raises(ValueError, match=f"place is {place} in 30 frames; accepted: 0 to 29"):
            haystack(np.random.default_rng(0), "train", 30, place=place)


def test_the_first_needle_stands_where_it_is_put_and_the_others_anywhere() -> None:
    others: Counter[int] = Counter()
    for i in range(200):
        clip = haystack(np.random.default_rng([5, i]), "train", 40, place=7)
        assert clip.needles[0] == 7 and len(set(clip.needles)) == 4
        assert sorted(clip.needles) == [i for i, glyph in enumerate(clip.glyphs) if glyph.kind.isdigit()]
        others.update(clip.needles[1:])
    assert len(others) == 39 and max(others.values()) < 32  # 15 expected


def test_without_its_first_needle_a_clip_differs_in_that_frame_alone() -> None:
    for i, clip in enumerate(clips(20)):
        without = without_first(clip, np.random.default_rng(i), "train")
        first, *rest = clip.needles
        assert without.needles == tuple(rest)
        assert [n for n in range(40) if (clip.frames[n] != without.frames[n]).any()] == [first]
        old, new = clip.glyphs[first], without.glyphs[first]
        assert new.colour == old.colour == shown_colour(without.frames[first]) and not new.kind.isdigit()
        assert sum(a != b for a, b in zip(clip.glyphs, without.glyphs, strict=True)) == 1


def test_chats_ask_for_each_needle_once_and_train_the_answers(processor: FoveateProcessor) -> None:
    source = GlyphSource("needles_chat", processor, frames=(20, 30), turns=(2, 5))
    lengths = set()
    for index in range(20):
        document = source.document(index)
        [video] = [part for part in document.parts if isinstance(part, Video)]
        said = [part.text for part in document.parts if isinstance(part, Text) and part.loss]
        text = "".join(part.text for part in document.parts if isinstance(part, Text))
        colours = [answer.split()[0] for answer in said]
        assert 2 <= len(set(colours)) == len(said) <= 5
        assert [f"which digit is {colour} ?" in text for colour in colours] == [True] * len(colours)
        sample = encode(document, processor)
        assert sample.loss_tokens == 3 * len(said)  # colour, digit, end
        assert sample.tokens == len(video.source) + len(said) * (1 + 5 + 1 + 3)  # a token a frame
        lengths.add(len(video.source))
    assert min(lengths) >= 20 and max(lengths) <= 30 and len(lengths) > 3


def test_regions_tell_each_frame(processor: FoveateProcessor) -> None:
    document = GlyphSource("needle_regions", processor, frames=(12, 12)).document(0)
    video, *texts = document.parts
    assert isinstance(video, Video) and len(texts) == len(video.source) == 12
    assert [text.text.split()[0] for text in texts if isinstance(text, Text)] == [
        shown_colour(frame) for frame in video.source
    ]
