"""`foveate eval --task haystack`: what the clips show at which depth, what counts as found, controls, grid, files."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from foveate.data.drawing import COLOURS, Glyph
from foveate.data.needles import needle_question
from foveate.eval import haystack, needle_grid
from foveate.eval.haystack import (
    ALL,
    NO_CLIP,
    OTHER,
    TAKEN_OUT,
    HaystackItem,
    Row,
    evaluate_haystack,
    fraction,
    haystack_items,
    picture,
    search,
    summary,
)
from foveate.eval.results import find
from foveate.eval.statistics import mcnemar, wilson_interval
from foveate.vlm.cache.parse import parse_kv
from foveate.vlm.media import load_video, probe_video
from foveate.vlm.parallel.topology import Topology
from foveate.vlm.pruning import parse_method


def items(n: int = 2, frames: int = 12, depths: int = 4, **more: Any) -> list[HaystackItem]:
    return list(haystack_items(n, frames, depths, **more))


def shown_colour(frame: np.ndarray) -> str:
    """The colour of a frame's brightest pixels."""
    pixels = frame.reshape(-1, 3).astype(float)
    bright = pixels[np.argsort(pixels.max(axis=1))[-20:]].mean(axis=0)
    return max(COLOURS, key=lambda name: np.dot(COLOURS[name], bright) / np.linalg.norm(COLOURS[name]))


# Items


def test_the_same_arguments_give_the_same_clips_and_others_do_not() -> None:
    first = items()
    assert first == items()
    assert items(1) == first[:4]  # fewer questions a cell are the first ones
    for changed in (items(split="dev"), items(seed=1), items(needles=3), items(frames=13)):
        assert not {one.clip for one in changed} & {one.clip for one in first}


def test_depths_take_turns_from_the_first_frame_to_the_last() -> None:
    assert [(one.depth, one.place) for one in items(1, 12, 4)] == [(0, 0), (1 / 3, 4), (2 / 3, 7), (1, 11)]
    assert [one.place for one in items(1, 8, 8)] == list(range(8))
    assert [one.place for one in items(2, 64, 3)] == [0, 32, 63] * 2


def test_the_decoded_frame_at_the_depth_is_what_is_asked_for() -> None:
    """Without the needle the clip is another in that frame alone, of the same colour."""
    for one, without in zip(items(3, 16, 4), items(3, 16, 4, taken_out=True), strict=True):
        info = probe_video(one.clip)
        assert (info.codec, info.frames, info.width, info.height) == ("h264", 16, 128, 128)
        colour, digit = one.answer.split()
        assert one.question == f"which digit is {colour} ?" and digit.isdigit()
        assert (without.question, without.answer, without.place) == (one.question, one.answer, one.place)
        frames, absent = (load_video(clip, num_frames=16, size=(16, 16)).frames for clip in (one.clip, without.clip))
        assert frames.shape == absent.shape == (16, 16, 16, 3)
        assert shown_colour(frames[one.place]) == shown_colour(absent[one.place]) == colour
        differences = np.abs(frames.astype(float) - absent).mean(axis=(1, 2, 3))
        assert differences.argmax() == one.place
        assert differences[one.place] > 3 * np.delete(differences, one.place).max()


def test_needles_of_a_clip_have_colours_and_digits_of_their_own() -> None:
    for one in items(4, 24, 3, needles=6):
        words = [answer.split() for answer in one.needles]
        assert one.needles[0] == one.answer and len(words) == 6
        assert len({colour for colour, _ in words}) == len({digit for _, digit in words}) == 6
    assert all(one.needles == (one.answer,) for one in items(needles=1))


def test_several_groups_share_the_questions_out() -> None:
    whole = items(3)
    parts = [items(3, topology=Topology(size=2, rank=rank)) for rank in range(2)]
    assert [parts[i % 2][i // 2] for i in range(12)] == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 3}, "frames is 3 with 4 depths and 4 needles; accepted: 4 to 2048"),
        ({"frames": 2049}, "frames is 2049 .*accepted: 4 to 2048"),
        ({"depths": 1}, "depths is 1; accepted: 2 or more"),
        ({"needles": 7}, "needles is 7 in 12 frames; accepted: 1 to 6"),
        ({"n": 0}, "n is 0; accepted: 1 or more"),
        ({"split": "none"}, "split is 'none'; accepted: train, dev, test"),
    ],
)
def test_grids_that_can_not_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        items(**arguments)
    with pytest.raises(ValueError, match="frames is empty"):
        evaluate_haystack(None, None, None, 1, "dev", Console(quiet=True), frames=[])  # type: ignore[arg-type]


# What is found


class Oracle:
    """Stands in for the model's conversations: says what it is told to, about the clip or about nothing."""

    def __init__(self, say: Any):
        self.say, self.asked = say, []

    def __call__(self, model: Any, processor: Any, media: Any = ()) -> Any:
        self.media = media
        return self

    def ask(self, question: str, max_new_tokens: int) -> Any:
        assert max_new_tokens == 3
        self.asked.append((question, bool(self.media)))
        return type("Answer", (), {"text": self.say(question, self.media), "visual_tokens": 12})

    cache = None


def test_a_grid_is_what_was_said_cell_by_cell(
    needle_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an answerer that fails at one depth, names another needle at another, and guesses where it sees nothing."""
    model, processor = needle_model
    n, depths, lengths = 3, 4, (6, 12)
    truth = {one.clip: one for frames in lengths for one in haystack_items(n, frames, depths, "dev")}
    guess = {needle_question(Glyph("0", colour))[0]: f"{colour} 7" for colour in COLOURS}

    def say(question: str, media: Any) -> str:
        if not media:
            return guess[question]
        one = truth.get(media[0].source)
        if one is None:
            return guess[question]  # the needle is not in it
        assert media[0].num_frames == one.frames
        wrong = {0: "black circle", 2: f"red {one.needles[1][-1]}"} if one.frames == 12 else {}
        return wrong.get(round(one.depth * 3), one.answer)

    monkeypatch.setattr(haystack, "Chat", Oracle(say))
    monkeypatch.setattr(haystack, "costs", lambda cache: type("Costs", (), {"bytes": 1000}))
    Oracle.cache = object()  # type: ignore[assignment]
    printed = io.StringIO()
    console = Console(file=printed, width=150)
    rows = evaluate_haystack(
        model, processor, tmp_path, n, "dev", console, kv=parse_kv("int4"), frames=[12, 6], depths=depths
    )
    assert [row.frames for row in rows] == [6, 12]
    assert rows[0].cells == [1, 1, 1, 1] and rows[1].cells == [0, 1, 0, 1]
    assert sum(rows[1].other) == n and sum(rows[0].other) == 0
    guessed = [one.answer.endswith(" 7") for one in truth.values()]
    assert [one for row in rows for one in row.blind] == guessed
    lacking = [one for frames in lengths for one in haystack_items(1, frames, depths, "dev")]
    assert [one for row in rows for one in row.absent] == [one.answer.endswith(" 7") for one in lacking]

    written = json.loads((tmp_path / "metrics.json").read_text())
    assert (
        "--task haystack --frames 6 --frames 12 --depths 4 --needles 4 --n 3 --split dev --kv int4"
        in written["command"]
    )
    whole = find(written["results"], ALL)
    assert (whole["value"], whole["n"]) == (18 / 24, 24) and [whole["low"], whole["high"]] == [*wilson_interval(18, 24)]
    assert find(written["results"], NO_CLIP)["value"] == pytest.approx(sum(guessed) / 24)
    assert find(written["results"], TAKEN_OUT)["n"] == 8
    row = written["rows"][1]
    assert [find(row["results"], f"depth {depth}")["value"] for depth in ("0.00", "0.33", "0.67", "1.00")] == [
        0,
        1,
        0,
        1,
    ]
    assert find(row["results"], OTHER)["value"] == 0.25 and row["right"] == "0101" * 3
    assert written["answers"]["12"][0] == "black circle"
    text = printed.getvalue()
    assert re.search(r"12  0\.00  1\.00  0\.00  1\.00  0\.500  \[0\.254, 0\.746\]  n=12", text)
    with Image.open(tmp_path / "haystack.png") as drawn:
        assert drawn.format == "PNG" and drawn.width > 200


def test_a_model_is_asked_as_foveate_ask_does(needle_model: Any) -> None:
    """All frames of the file are read; what is said is `generate`'s, of the pixels that decoding gives."""
    model, processor = needle_model
    [one, *_] = items(1, 12, 4)
    row = search(model, processor, [one], 12, 1, {one.question: one.answer})
    inputs = processor(
        text=processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": one.question}]}],
            add_generation_prompt=True,
        ),
        videos=[load_video(one.clip, num_frames=12, size=(16, 16)).frames], add_special_tokens=False,
        return_tensors="pt",
    )  # fmt: skip
    said = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert row.said == (processor.tokenizer.decode(said, skip_special_tokens=True).strip(),)
    assert row.visual == 12 and row.blind == (True,) and row.right == (row.said[0] == one.answer,)


def test_reductions_hold_while_it_is_asked(needle_model: Any) -> None:
    model, processor = needle_model
    rows = {}
    for prune, kv in (("", ""), ("random:layer=1,keep=0.5", ""), ("", "int4:group=4,residual=4")):
        methods, spec = [parse_method(prune)] if prune else [], parse_kv(kv) if kv else None
        [rows[prune or kv]] = evaluate_haystack(
            model, processor, None, 1, "dev", Console(quiet=True), methods, spec, frames=[12], depths=3
        )
    full, pruned, packed = rows.values()
    assert (full.visual, pruned.visual, packed.visual) == (12, 9, 12)  # of two layers one reads half
    assert packed.kv_bytes < full.kv_bytes and pruned.kv_bytes < full.kv_bytes


def test_groups_that_share_questions_find_what_one_finds(needle_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups, one after the other, with their answers exchanged by hand."""
    model, processor = needle_model
    unseen = {needle_question(Glyph("0", colour))[0]: "" for colour in COLOURS}
    whole = search(model, processor, items(2, 12, 3), 12, 3, unseen)
    parts: list[Any] = []

    def exchanged(found: list[Any], topology: Topology) -> list[Any]:
        parts.append(list(found))
        return [one for pair in zip(*parts, strict=True) for one in pair]

    monkeypatch.setattr(haystack, "joined", exchanged)
    groups = [Topology(size=2, rank=rank) for rank in range(2)]
    _, both = (
        search(model, processor, items(2, 12, 3, topology=group), 12, 3, unseen, topology=group) for group in groups
    )
    assert both == whole


# What is published


def row(frames: int, right: str, depths: int = 2) -> dict[str, Any]:
    flags = tuple(flag == "1" for flag in right)
    none = (False,) * len(flags)
    return Row(
        frames, depths, ("",) * len(flags), flags, none, flags[::-1], 5e3, frames / 2, absent=(True, False)
    ).as_json()


def test_controls_are_counted_over_all_rows() -> None:
    whole, blind, absent = summary([row(8, "1110"), row(16, "10")])
    assert (whole["value"], whole["n"], blind["value"], blind["n"]) == (4 / 6, 6, 4 / 6, 6)
    assert (absent["value"], absent["n"], absent["unit"]) == (0.5, 4, "fraction")


def point(name: str, rows: list[dict[str, Any]], needles: int = 4) -> dict[str, Any]:
    setting = needle_grid.Setting(name, (64,), needles=needles)
    written = [{"depths": 2, "command": "foveate eval", "rows": [one]} for one in rows]
    return needle_grid.point(setting, 0, written)


def test_settings_are_compared_on_the_questions_that_both_have() -> None:
    points = [point(needle_grid.FULL, [row(64, "11111101")]), point("pruned", [row(64, "0110")])]
    needle_grid.compare(points)
    told = find(points[1]["rows"][0]["results"], needle_grid.COMPARED)
    paired = mcnemar([False, True, True, False], [True] * 4)
    assert (told["value"], told["n"], told["p"]) == (-0.5, 4, 0.5) and (told["low"], told["high"]) == (
        paired.low, paired.high,
    )  # fmt: skip
    assert len(points[0]["rows"][0]["results"]) + 1 == len(points[1]["rows"][0]["results"])


def test_tables_tell_what_the_results_hold() -> None:
    points = [point(needle_grid.FULL, [row(64, "1110"), row(512, "1111")]), point("pruned", [row(64, "0110")])]
    points.append(point(needle_grid.SINGLE, [row(64, "1111")], needles=1))
    for one in (points[0], points[2]):
        one["results"].append(fraction(needle_grid.TAKEN_OUT_SHORT, [True, False]))
    needle_grid.compare(points)
    made = needle_grid.tables({"points": points})
    grid = made["grid"].splitlines()
    assert grid[2].startswith(
        "| 64 | **0.750** (0.301 – 0.954), n = 4 | **1.000** (0.510 – 1.000), n = 4 | 0.000 | 5 |"
    )
    assert grid[3].startswith("| 512 | **1.000** (0.510 – 1.000), n = 4 | | 0.000 | 5 |")
    settings = made["settings"].splitlines()
    assert len(settings) == 4  # 512 frames are not among those compared
    assert settings[3].startswith("| pruned | 64 | **0.500** (0.150 – 0.850), n = 4 | **-0.250**")
    assert settings[3].endswith("| 1 | 5 | 32 |")
    assert made["controls"].splitlines()[2].split("|")[2:5] == [
        " **0.875** (0.529 – 0.978), n = 8 ", " **0.500** (0.150 – 0.850), n = 4 ",
        " **0.500** (0.095 – 0.905), n = 2 ",
    ]  # fmt: skip


def test_the_picture_shows_each_cell_in_its_colour() -> None:
    """Cells at the right places: of two grids only the deep half of one column was found."""
    found, lost = row(64, "0101"), row(128, "1111")
    with Image.open(io.BytesIO(picture([("a", {"rows": [found, lost]})]))) as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    green = (pixels[..., 1] > pixels[..., 0] + 40) & (pixels[..., 1] > pixels[..., 2] + 40)
    red = (pixels[..., 0] > pixels[..., 1] + 80) & (pixels[..., 0] > pixels[..., 2] + 80)
    whole = slice(0, int(pixels.shape[1] * 0.75))  # without the colour bar
    rows, columns = np.nonzero(red[:, whole])
    greens = np.nonzero(green[:, whole])
    assert rows.mean() < greens[0].mean() and columns.mean() < greens[1].mean()  # above on the left
    assert 2 < green[:, whole].sum() / red[:, whole].sum() < 4  # three cells of four
