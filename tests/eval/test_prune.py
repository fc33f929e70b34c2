"""Questions, scores, statistics and tables of the comparison of pruning methods."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.data.drawing import COLOURS
from foveate.eval import prune
from foveate.eval.glyphs import answer
from foveate.eval.prune import FULL, Measured, Setting
from foveate.vlm.pruning import Prefill, parse_method
from foveate.vlm.pruning.base import Stage

ROOT = Path(__file__).parents[2]
NAMES = ["a1", "b1", "c1", "d1", "a2", "b2", "c2", "d2"]  # of rows, from the top


def measured(curve: str, keep: float, seed: int, right: list[int], draw: int = 0, words: int = 8) -> Measured:
    return Measured(Setting(curve, keep, curve, 3, draw), seed, tuple(right), words, 0.5, 20.0, 0.7)


# Questions and scores


def test_items_ask_for_rows_that_the_pictures_show() -> None:
    items = prune.row_items(12, "test", 3)
    rows = set()
    for item in items:
        assert isinstance(item.media, np.ndarray)
        [name] = [word for word in item.question.text.split() if word in NAMES]
        row = NAMES.index(name)
        rows.add(row)
        assert item.question.cell == 4 * row
        shown = []
        for column in range(4):
            cell = item.media[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].reshape(-1, 3).astype(float)
            bright = cell[np.argsort(cell.max(axis=1))[-20:]].mean(axis=0)
            shown.append(max(COLOURS, key=lambda c: np.dot(COLOURS[c], bright) / np.linalg.norm(COLOURS[c])))
        assert sorted(item.question.answer.split()[::2]) == sorted(shown)
    assert len(rows) > 4


def test_items_are_the_same_again_and_differ_by_split_and_seed() -> None:
    def made(split: str, seed: int) -> list[tuple[str, bytes]]:
        return [(item.question.answer, item.media.tobytes()) for item in prune.row_items(3, split, seed)]

    assert made("test", 0) == made("test", 0)
    assert len({made(split, seed)[0] for split in ("train", "dev", "test") for seed in (0, 1)}) == 6
    with pytest.raises(ValueError, match="split is 'tset'; accepted: train, dev, test"):
        prune.row_items(1, "tset")


@pytest.mark.parametrize(("said", "right"), [("red 3 blue 7", 4), ("red 3 blue", 3), ("3 red blue 7 red", 2),
                                             ("", 0), ("blue 3 red 7", 2)])  # fmt: skip
def test_words_are_right_at_their_place(said: str, right: int) -> None:
    assert prune.right_words(said, "red 3 blue 7") == right


def test_recall_counts_the_tokens_of_the_row_that_the_last_stage_kept() -> None:
    early = Stage(1, (torch.arange(32), torch.arange(32)), (0, 0))
    late = Stage(3, (torch.tensor([3, 4, 5, 8]), torch.tensor([28, 29, 30, 31])), (0, 0))
    prefill = Prefill((0, 0), (9, 9), (32, 32), ((32, 32),) * 4, (early, late))
    assert prune._recall([prefill], [4, 28]) == pytest.approx((2 / 4 + 4 / 4) / 2)
    assert prune._recall([prefill, prefill], [0, 0, 8, 24]) == pytest.approx((1 + 0 + 1 + 0) / 16)


def test_settings_name_methods_that_keep_what_they_say() -> None:
    layers = {"fastv": 3, "sparsevlm": 3, "sparsevlm+": 3, "pyramiddrop": 2}
    made = prune.settings(layers, 32, keeps=(0.5, 0.25), draws=2)
    assert len({(one.curve, one.layer, one.keep, one.draw) for one in made}) == len(made)
    assert {(one.curve, one.layer) for one in made} == {
        ("full", 0), ("nothing", 2), ("nothing", 3), *layers.items(), ("fastv", 1),
        *((control, layer) for control in ("random", "lowest") for layer in (1, 2, 3)),
        *((name, 0) for name in ("visionzip", "fastervlm", "vtc-cls", "hired")),
    }  # fmt: skip
    assert sorted(one.draw for one in made if (one.curve, one.layer, one.keep) == ("random", 2, 0.5)) == [0, 1]
    for one in made[1:]:
        method: Any = parse_method(one.method)
        assert one.method.partition(":")[0] == ("fastv" if one.curve == "nothing" else one.curve)
        if one.layer:
            assert method.stages == (one.layer,)
        if one.curve == "random":
            assert method.seed == one.draw


def test_a_setting_is_measured_under_its_method(
    row_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = row_model
    items = prune.row_items(6)
    said = answer(model, processor, items, max_new_tokens=9)
    right = tuple(prune.right_words(a, item.question.answer) for a, item in zip(said, items, strict=True))
    full = prune.measure(model, processor, items, FULL, 0, batch=4)
    assert (full.right, full.words, full.visual, full.flops) == (right, 8, 32, 1)
    assert prune.measure(model, processor, items, Setting("fastv", 1.0, "fastv:layer=3,keep=1", 3), 0).right == right
    # Three of four layers read 32 visual tokens, the last one what is kept.
    counts = {"random:layer=3,keep=0.25": 8, "fastv:layer=3,keep=0": 0, "sparsevlm+:tokens=16,layers=2,per=0": 16}
    for method, kept in counts.items():
        one = prune.measure(model, processor, items, Setting("x", 0.5, method, 3), 0, batch=4)
        assert one.visual == (3 * 32 + kept) / 4
        assert 0.5 < one.flops < 1 and 0 <= one.recall <= 1 and (kept or not one.recall)
    half = prune.measure(model, processor, items, Setting("fastervlm", 0.5, "fastervlm:keep=0.5"), 0)
    assert half.visual == 16

    first = prune.measure_once(tmp_path, model, processor, items, FULL, 0)
    assert first == full
    monkeypatch.setattr(prune, "measure", None)  # not run again
    assert prune.measure_once(tmp_path, model, processor, items, FULL, 0) == first
    with pytest.raises(TypeError):  # but for other questions
        prune.measure_once(tmp_path, model, processor, items[:5], FULL, 0)


# Results


def test_points_put_draws_and_seeds_together() -> None:
    everything = [
        Measured(FULL, 0, (8, 8, 4, 8), 8, 1.0, 32.0, 1.0), Measured(FULL, 1, (8, 8, 8, 8), 8, 1.0, 32.0, 1.0),
        measured("random", 0.5, 0, [8, 0, 0, 0], draw=0), measured("random", 0.5, 0, [8, 8, 0, 0], draw=1),
        measured("random", 0.5, 1, [4, 4, 4, 4], draw=0), measured("random", 0.5, 1, [8, 4, 4, 4], draw=1),
    ]  # fmt: skip
    full, random = prune.as_json(everything)
    assert (random["curve"], random["layer"], random["keep"]) == ("random", 3, 0.5)
    words, exact = random["results"]
    of_seeds = [(8 + 16) / 64, (16 + 20) / 64]
    assert random["seeds"] == {"0": pytest.approx(of_seeds[0]), "1": pytest.approx(of_seeds[1])}
    assert words["value"] == pytest.approx(np.mean(of_seeds))
    assert words["n"] == exact["n"] == 8
    assert words["ratio"] == pytest.approx(np.mean(of_seeds) / ((28 / 32 + 1) / 2))
    assert exact["value"] == pytest.approx((3 / 8 + 1 / 8) / 2)
    assert words["low"] < words["value"] < words["high"]
    assert (full["curve"], full["results"][0]["ratio"]) == ("full", 1)

    everything += [measured("fastv", 0.5, seed, [8, 6, 6, 8]) for seed in (0, 1)]
    everything += [measured("lowest", 0.5, seed, [8, 6, 6, 7]) for seed in (0, 1)]
    told = prune.kept_and_tests(everything, "fastv", 3)
    assert [one["value"] for one in told] == pytest.approx([(28 / 32) / (15 / 16), 28 / 32 - 60 / 128, 1 / 32])
    assert told[1]["p"] < 0.05 < told[2]["p"]
    page = prune.tests_table(told)
    assert page.splitlines()[0] == "| | of full | above random | above lowest |"
    assert "| fastv, K = 3, 50% | **93.3%** (" in page and "| **+0.406** (" in page and ", p = 0.0" in page


def test_k_is_the_smallest_layer_where_enough_is_kept() -> None:
    def dev(layer: int, curve: str, half: int, quarter: int) -> list[Measured]:
        return [
            Measured(Setting(curve, keep, "", layer), 0, (right,) * 10, 100, 1.0, 1.0, 1.0)
            for keep, right in ((0.5, half), (0.25, quarter))
        ]

    full = [Measured(FULL, 0, (90,) * 10, 100, 1.0, 1.0, 1.0)]
    fastv = dev(1, "fastv", 30, 20) + dev(2, "fastv", 88, 90) + dev(3, "fastv", 90, 89)  # 88 < .98 · 90
    others = dev(2, "pyramiddrop", 89, 84) + dev(3, "pyramiddrop", 90, 90) + dev(1, "sparsevlm", 60, 50)
    layers, best, told = prune.choose([*full, *fastv, *others, *dev(2, "sparsevlm", 90, 40)])
    assert layers == {"fastv": 3, "pyramiddrop": 2, "sparsevlm": 1}
    assert best == "fastv"  # 90 + 89 at its K, pyramiddrop 89 + 84
    few = [*full, *dev(2, "fastv", 70, 60), *dev(1, "fastv", 50, 61), *dev(1, "lowest", 60, 52)]  # none is enough
    assert prune.choose(few)[:2] == ({"fastv": 1, "lowest": 1}, "lowest")
    rows = prune.dev_table([one for one in told if one["curve"] == "fastv"]).splitlines()
    assert rows[0] == "| of full | K = 1, 50% | K = 1, 25% | K = 2, 50% | K = 2, 25% | K = 3, 50% | K = 3, 25% |"
    assert rows[2] == "| fastv | 33.3% | 22.2% | 97.8% | 100.0% | 100.0% | 98.9% |"


def test_tables_and_picture_show_every_point() -> None:
    layers = dict.fromkeys(prune.IN_LLM, 3) | {"pyramiddrop": 2}
    everything = [
        Measured(one, 0, (8, 4, 6), 8, 0.5, 20.0, 0.7) for one in prune.settings(layers, 32, draws=2)
    ]  # fmt: skip
    points = prune.as_json(everything)
    rows = prune.table(points).splitlines()[2:]
    assert len(rows) == len({(point["curve"], point["layer"]) for point in points})
    assert rows[1].startswith("| fastv | 3 | 20.0 / 20.0 / 20.0 / 20.0 | 0.70 / 0.70 / 0.70 / 0.70 | **0.750** (")
    assert "".join(rows).count("**") == 2 * len(points)
    image = Image.open(io.BytesIO(prune.picture(points)))
    assert image.format == "PNG" and image.width > 900
    assert prune.tables({"dev": [], "tests": [], "points": points})["points"] == prune.table(points)


def test_what_is_written_is_read_again() -> None:
    one = measured("random", 0.5, 1, [1, 2], draw=3)
    assert prune.from_json(json.loads(json.dumps(asdict(one)))) == one


def test_committed_results_reach_the_bar() -> None:
    """Of the full accuracy .98 at a half and .93 at a quarter of the visual tokens, and the controls below."""
    results = json.loads((ROOT / "docs" / "results" / "prune_curves.json").read_text())
    points = {(point["curve"], point["layer"], point["keep"]): point for point in results["points"]}
    assert len(results["seeds"]) >= 3 and results["layers"][results["best"]] > 1
    assert all(word["n"] >= 3000 for point in points.values() for word in point["results"])
    best = results["best"], results["layers"][results["best"]]
    assert points[*best, 0.5]["results"][0]["ratio"] >= 0.98
    assert points[*best, 0.25]["results"][0]["ratio"] >= 0.93
    tests = {one["name"]: one for one in results["tests"]}
    for keep in ("50%", "25%"):
        for control in prune.CONTROLS:
            one = tests[f"{best[0]}, K = {best[1]}, {keep}: above {control}"]
            assert one["low"] > 0 and one["p"] < 0.001
