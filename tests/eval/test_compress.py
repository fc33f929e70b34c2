"""Scores, tables and items of the scale-then-compress experiment, on answers and results that are written by hand."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.data.glyphs import CHAT_TEMPLATE, FRAME_SEPARATOR, glyph_tokenizer
from foveate.eval import compress
from foveate.eval.compress import (
    Measured,
    Score,
    as_json,
    clip_items,
    clips,
    gain_kept,
    images_table,
    over_seeds,
    picture,
    scene_items,
    score_clips,
    score_scenes,
    videos_table,
)
from foveate.vlm.media import sample_indices
from foveate.vlm.processor import FoveateProcessor


@pytest.fixture(scope="module")
def processor() -> FoveateProcessor:
    return FoveateProcessor(
        glyph_tokenizer(), image_size=(84, 84), patch_size=14, chat_template=CHAT_TEMPLATE,
        frame_separator=FRAME_SEPARATOR,
    )  # fmt: skip


def test_items_are_the_same_again_and_differ_by_split_and_seed() -> None:
    def made(split: str, seed: int) -> list[tuple[str, bytes]]:
        return [(item.question.answer, item.media.tobytes()) for item in scene_items(3, split, seed)]

    assert made("test", 0) == made("test", 0)
    assert len({made(split, seed)[0] for split in ("dev", "test") for seed in (0, 1)}) == 4


def test_clips_frames_are_those_that_a_reader_of_videos_takes() -> None:
    made = clips(2, 84)
    for frames in (4, 8, 16, 32):
        times = np.arange(32) / 8
        taken = sample_indices(times, num_frames=frames, fps=None, max_frames=2048)
        for (clip, question), item in zip(made, clip_items(made, frames), strict=True):
            assert np.array_equal(item.media, clip.frames[taken])
            assert item.question == question


def test_scores_count_digits_and_colours_apart(processor: FoveateProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(model: Any, processor: Any, items: list, max_new_tokens: int) -> list[str]:
        said = []
        for item in items:
            place, digit, colour = item.question.answer.split()
            wrong_digit, wrong_colour = str((int(digit) + 1) % 10), "red" if colour != "red" else "blue"
            answers = [
                f"{place} {digit} {colour}", f"{place} {wrong_digit} {colour}", f"{place} {digit} {wrong_colour}",
                f"c9 {digit} {colour}", "",
            ]  # fmt: skip
            said.append(answers[len(said) % 5])
        return said

    monkeypatch.setattr(compress, "answer", answer)
    scores = score_scenes(None, processor, 20, batch=5)
    assert scores == {"digit": Score(8, 20), "colour": Score(8, 20)}


def test_clip_answers_are_right_as_a_whole(processor: FoveateProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def answer(model: Any, processor: Any, items: list, max_new_tokens: int) -> list[str]:
        seen.extend(item.media.shape for item in items)
        return [item.question.answer if i % 2 else "7 nothing" for i, item in enumerate(items)]

    monkeypatch.setattr(compress, "answer", answer)
    assert score_clips(None, processor, clips(6, 84), 8, batch=4) == Score(3, 6)
    assert seen == [(8, 84, 84, 3)] * 6


MEASURED = [
    Measured("low", 0, 36, {"digit": Score(20, 100), "colour": Score(99, 100)}, 10),
    Measured("low", 1, 36, {"digit": Score(40, 100), "colour": Score(97, 100)}, 20),
    Measured("scaled", 0, 324, {"digit": Score(90, 100), "colour": Score(100, 100)}, 100),
    Measured("scaled + 3x3", 0, 36, {"digit": Score(84, 100), "colour": Score(100, 100)}, 30),
    Measured("video, 4 frames, pool 1", 0, 16, {"colour": Score(50, 100)}, 60),
    Measured("video, 8 frames, pool 2", 0, 16, {"colour": Score(75, 100)}, 60),
    Measured("video, 8 frames, pool 1", 0, 32, {"colour": Score(80, 100)}, 60),
    Measured("video, 4 frames, pool 2", 0, 8, {"colour": Score(45, 100)}, 60),
]


def test_seeds_are_counted_together_and_the_gain_is_a_part_of_scaling_s() -> None:
    variants = as_json(MEASURED)
    low, high = variants[0]["results"][0]["low"], variants[0]["results"][0]["high"]
    assert (low, high) == pytest.approx((0.1334, 0.2888), abs=1e-4)  # Wilson's interval of 20 of 100
    rows = over_seeds(variants)
    assert rows["low"] == {"tokens": 36, "seconds": 15, "seeds": 2, "digit": Score(60, 200), "colour": Score(196, 200)}
    assert gain_kept(rows, "scaled + 3x3") == pytest.approx((0.84 - 0.3) / (0.9 - 0.3))
    assert gain_kept(rows, "scaled") == 1 and gain_kept(rows, "low") == 0


def test_tables_hold_each_variant_once() -> None:
    lines = images_table(as_json(MEASURED)).splitlines()
    assert len(lines) == 2 + 3
    assert lines[2].startswith("| low | 36 | **0.300** |") and lines[2].endswith("| 0.980 | 2 | 15 s |")
    assert "| 90 % |" in lines[4]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in videos_table(as_json(MEASURED)).split("\n")
    ]
    assert table[0][1:] == ["4 frames", "8 frames"]
    assert table[2:] == [
        ["1", "**0.500** (16 tokens)", "**0.800** (32 tokens)"],
        ["2", "**0.450** (8 tokens)", "**0.750** (16 tokens)"],
    ]


def test_picture_is_a_png() -> None:
    assert Image.open(io.BytesIO(picture(as_json(MEASURED)))).width > 800
