"""Accuracy over FLOPs and KV bytes: the Pareto set, what a setting costs, the statistics, the command's files."""

import io
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from foveate.eval import frontier, frontier_tasks
from foveate.eval.frontier import DENSE, FULL, Point, pareto, pareto_points, run_frontier
from foveate.eval.frontier_report import equivalent, lines, picture, tables
from foveate.eval.frontier_tasks import KNOWN, TASKS, Answered, RandomOfTower, RandomOfVideo, answers, batches
from foveate.eval.glyphs import answer
from foveate.eval.prune import Setting, row_items
from foveate.eval.results import check_results, load_results
from foveate.eval.statistics import bootstrap_interval
from foveate.vlm.cache.parse import parse_kv
from foveate.vlm.pruning import Reduction, parse_method
from foveate.vlm.pruning.fastervlm import FasterVLM
from foveate.vlm.pruning.towers import VisualMap

ROOT = Path(__file__).parents[2]

# The Pareto set

numbers = st.integers(0, 4)
points = st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=12)


@given(points)
def test_the_pareto_set_is_what_brute_force_finds(points: list[tuple[int, int, int]]) -> None:
    def superfluous(one: int) -> bool:
        flops, size, accuracy = points[one]
        return any(
            f <= flops and b <= size and a >= accuracy and ((f, b, a) != (flops, size, accuracy) or other < one)
            for other, (f, b, a) in enumerate(points)
        )

    found = pareto(
        [(f, b) for f, b, _ in points], [a for *_, a in points], lambda one, other: points[one][2] >= points[other][2]
    )
    assert sorted(found) == [one for one in range(len(points)) if not superfluous(one)]


@given(points, st.randoms(use_true_random=False))
def test_each_point_is_in_the_set_or_made_superfluous_by_one_that_is(
    points: list[tuple[int, int, int]], random: Any
) -> None:
    good = [[random.random() < 0.5 for _ in points] for _ in points]  # neither transitive nor antisymmetric
    costs = [(f, b) for f, b, _ in points]
    found = pareto(costs, [a for *_, a in points], lambda one, other: good[one][other])

    def replaces(one: int, other: int) -> bool:
        cheap = costs[one][0] <= costs[other][0] and costs[one][1] <= costs[other][1]
        return cheap and (good[one][other] or costs[one] == costs[other])

    for other in range(len(points)):
        by = [one for one in found if one != other and replaces(one, other)]
        assert bool(by) == (other not in found)


def point(
    curve: str, right: list[bool], flops: float = 1.0, size: float = 100.0, store: str = DENSE, layer: int = 3,
    keep: float = 0.25,
) -> Point:  # fmt: skip
    setting = FULL if curve == "full" else Setting(curve, keep, curve, layer)
    whole = tuple(2 * int(one) for one in right)
    one = Answered(whole, (2,) * len(right), tuple(right), size, 8.0, 0.5, 0.9, 10.0, 2e6 * flops, 2e6)
    return Point(setting, store, (one,))


def of(right: int, n: int = 1000) -> list[bool]:
    return [number < right for number in range(n)]


def names(points: list[Point]) -> set[str]:
    return {points[number].setting.curve for number in pareto_points(points)}


def test_only_what_is_surely_less_than_a_point_worse_replaces() -> None:
    full, random = point("full", of(900)), point("random", of(300), 0.79)
    lost = point("fastv", of(899), 0.8)  # on the same questions: one lost, none won
    assert names([full, random, lost]) == {"fastv", "random"}
    assert names([full, random, point("fastv", of(885), 0.8)]) == {"full", "fastv", "random"}
    # The same accuracy on other questions: too much noise to be sure.
    moved = [not one if 850 <= number < 950 else one for number, one in enumerate(of(900))]
    assert sum(moved) == 900
    assert names([full, random, point("fastv", moved, 0.8)]) == {"full", "fastv", "random"}


def test_methods_that_are_not_surely_above_their_control_are_no_candidates() -> None:
    full = point("full", of(900))
    for right, chosen in ((502, {"full", "random"}), (520, {"full", "random", "fastv"})):
        some = [full, point("random", of(500), 0.79), point("fastv", of(right), 0.78)]  # cheaper than the control, even
        assert names(some) == chosen - ({"random"} if "fastv" in chosen else set())


# What a setting costs


def test_flops_and_kv_bytes_are_those_of_hand_arithmetic(row_model: Any) -> None:
    model, processor = row_model
    asked = batches(model, processor, row_items(3, "dev"))
    [batch] = asked
    text, vocabulary = batch.ids.shape[1] - 32, model.config.text_config.vocab_size
    assert text == 8
    stores = {
        "dense": "dense",
        "token": "int4:keys_per=token,group=1,residual=0",
        "channel": "int4:hadamard=true,group=4,residual=0",
        "window": "int8:group=8,residual=16",
    }
    found = answers(model, processor, asked, "fastv:layer=3,keep=0.25", {k: parse_kv(v) for k, v in stores.items()})
    tokens = [40, 40, 40, 16]  # a layer
    linear = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    layers = sum(linear * t + 2 * 2 * 32 * t * (t + 1) // 2 for t in tokens)
    assert found["dense"].flops == layers + 2 * 32 * vocabulary + 2 * 32 * 40  # its scores: one row of q·k in layer 2
    assert found["dense"].full_flops == 4 * (linear * 40 + 2 * 2 * 32 * 40 * 41 // 2) + 2 * 32 * vocabulary
    # Heads: 2 of 16 numbers, keys and values; codes of 4 bits are 8 bytes a head, scale and zero 4 bytes.
    assert found["dense"].kv_bytes == 2 * 32 * 4 * sum(tokens)
    assert found["token"].kv_bytes == 2 * 2 * (8 + 4) * sum(tokens) + 4 * (2 * 32 * 4)  # and a column to come a layer
    by_channel = 2 * (8 + 16 * 4 / 4) + 2 * (8 + 4)  # of a token: a scale for each channel of four tokens
    assert found["channel"].kv_bytes == by_channel * sum(tokens) + 4 * 4 * (2 * 32 * 4)
    # 40 tokens: 24 packed, 16 as they are in buffers of 24; 16 tokens: none packed.
    assert found["window"].kv_bytes == 3 * 24 * (2 * (16 + 16 * 4 / 8) + 2 * (16 + 4)) + 4 * 24 * (2 * 32 * 4)
    assert [found[name].packed for name in stores] == pytest.approx([0, 1, 1, 3 * 24 / sum(tokens)])
    for one in found.values():
        assert one.held == pytest.approx(sum(tokens) / 160)
        assert one.visual == (3 * 32 + 8) / 4


@pytest.mark.parametrize(
    "method", ["", "fastv:layer=2,keep=0.25", "sparsevlm:tokens=8,layers=1,per=0", "visionzip:keep=0.5"]
)
def test_answers_are_those_of_generate_whatever_the_store(
    row_model: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = deepcopy(row_model[0]), row_model[1]
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.self_attn.o_proj.weight *= 10  # or else what was read hardly matters
    stores = {
        "dense": "dense",
        "int2": "int2:keys_per=token,group=1,residual=0",
        "rotated": "int2:hadamard=true,group=4,residual=4",
        "snapkv": "snapkv:keep=0.25,window=4+int4:group=4,residual=0",
        "zipvl": "zipvl:group=8,residual=0,probes=4",
    }
    items = row_items(4, "dev")
    said: list[list[str]] = []
    generated = frontier_tasks.generated
    monkeypatch.setattr(frontier_tasks, "generated", lambda *given: said.append(generated(*given)) or said[-1])
    found = answers(
        model, processor, batches(model, processor, items), method, {name: parse_kv(kv) for name, kv in stores.items()}
    )
    by_generate = []
    for kv in stores.values():  # each read from the start, by transformers' generate
        with Reduction(model, [parse_method(method)] if method else [], kv=kv):
            by_generate.append(answer(model, processor, items, max_new_tokens=9))
    assert said == by_generate
    assert len({tuple(texts) for texts in by_generate}) > 2  # what the caches hold is read
    for texts, of_store in zip(by_generate, found.values(), strict=True):
        truths = [item.question.answer for item in items]
        assert of_store.exact == tuple(a == b for a, b in zip(texts, truths, strict=True))
        assert of_store.right == tuple(
            sum(a == b for a, b in zip(text.split(), true.split(), strict=False))
            for text, true in zip(texts, truths, strict=True)
        )


def test_controls_before_the_llm_keep_as_many_tokens_as_the_methods() -> None:
    image = VisualMap(torch.tensor([0] * 10 + [1] * 6 + [-1]), torch.rand(1, 17), None, False, None)
    for keep in (0.75, 0.25, 0.1):
        kept = RandomOfTower(keep).choose(image).keep
        assert [int((image.tile[kept] == tile).sum()) for tile in (0, 1, -1)] == [
            int((image.tile[FasterVLM(keep).choose(image).keep] == tile).sum()) for tile in (0, 1, -1)
        ]
        assert int(RandomOfVideo(keep).select(torch.zeros(8, 4, 2)).sum()) == round(32 * keep)
    first, again = RandomOfVideo(0.25, seed=1), RandomOfVideo(0.25, seed=1)
    draws = [first.select(torch.zeros(8, 4, 2)) for _ in range(2)]
    assert torch.equal(draws[0], again.select(torch.zeros(8, 4, 2))) and not torch.equal(*draws)


def test_every_method_of_the_grid_has_the_control_of_its_budget() -> None:
    layers = {"fastv": 3, "pyramiddrop": 2}
    grid = frontier.grid(layers, 32, 4, ("visionzip", "evs", "dycoke"), (0.5, 0.1))
    there = {(one.curve, one.layer, one.keep) for one in grid}
    assert len(there) == len(grid)
    for one in grid:
        control = frontier.control_of(one)
        assert (control in there) == (one.curve in frontier.PRUNERS)
        if one.method:
            frontier_method = KNOWN[one.method.partition(":")[0]]
            assert (getattr(frontier_method, "family", "") == "llm") == (one.layer > 0)
    # DyCoke keeps one frame of four whole, so half of the tokens is a third of the others', and a tenth can't be.
    assert [one.method for one in grid if one.curve == "dycoke"] == ["dycoke:keep=0.333333"]
    assert [frontier._dycoke(keep, 1) for keep in (0.75, 0.5, 0.25, 0.1)] == [None, None, 0.0, None]


# What is chosen, and what is told of it


def test_layers_are_the_first_that_keep_enough_or_else_the_best() -> None:
    def tried(curve: str, layer: int, half: int, quarter: int) -> list[Point]:
        return [point(curve, of(right), layer=layer, keep=keep) for keep, right in ((0.5, half), (0.25, quarter))]

    some = [point("full", of(1000)), *tried("fastv", 1, 985, 900), *tried("fastv", 2, 981, 931)]
    some += [*tried("fastv", 3, 1000, 1000), *tried("sparsevlm", 1, 999, 300), *tried("sparsevlm", 2, 500, 400)]
    assert frontier.choose_layers(some) == {"fastv": 2, "sparsevlm": 2}


def crafted(fastv: int, pyramiddrop: int, n: int = 1000) -> list[Point]:
    made = [point("full", of(900, n)), point("full", of(898, n), size=20, store="int4")]
    for curve, right in (("fastv", fastv), ("pyramiddrop", pyramiddrop)):
        made += [point(curve, of(right, n), 0.8, size, store) for store, size in ((DENSE, 80), ("int4", 16))]
    return [*made, point("random", of(300, n), 0.79, 80)]


def test_choices_are_made_on_dev_and_told_of_test() -> None:
    test, dev = crafted(fastv=600, pyramiddrop=880), crafted(fastv=880, pyramiddrop=600)
    told = frontier.as_json(test, dev, test, {DENSE: "dense", "int4": "int4"})
    assert told["claims"]["best"] == "fastv, K = 3, 25%, dense"
    found = {one["name"]: one for one in told["claims"]["results"]}
    assert found["exact_match: of full"]["value"] == pytest.approx(600 / 900, abs=1e-5)
    assert found["exact_match less random"]["value"] == 0.3
    by_name = {one["name"]: one for one in told["points"]}
    chosen = {name for name, one in by_name.items() if one["pareto"]}
    assert chosen == {"nothing dropped, int4", "fastv, K = 3, 25%, int4", "random, K = 3, 25%, dense"}
    assert {name for name, one in by_name.items() if one["pareto_by_test"]} == {
        "nothing dropped, int4", "pyramiddrop, K = 3, 25%, int4", "random, K = 3, 25%, dense",
    }  # fmt: skip
    exact = by_name["fastv, K = 3, 25%, int4"]["results"][1]
    assert (exact["value"], exact["n"]) == (0.6, 1000)
    assert (exact["low"], exact["high"]) == pytest.approx((0.56931, 0.62993), abs=2e-5)  # Wilson's, by hand
    assert by_name["fastv, K = 3, 25%, int4"]["dev"] == 0.88


def test_p_values_are_adjusted_for_all_methods_and_none_of_the_controls() -> None:
    told = frontier.as_json(*[crafted(305, 303)] * 3, {DENSE: "dense", "int4": "int4"})
    by_name = {one["name"]: one for one in told["points"]}
    which = "exact_match less random"
    raw = [by_name[f"{curve}, K = 3, 25%, {store}"] for curve in ("fastv", "pyramiddrop") for store in (DENSE, "int4")]
    # Five and three questions won, none lost: two-sided binomial 2/2^5 and 2/2^3; four tests, by Holm ×4, ×3, ×2, ×1.
    assert [p["results"][-1]["p"] for p in raw] == [0.0625, 0.0625, 0.25, 0.25]
    assert [p["holm"][which] for p in raw] == [0.25, 0.25, 0.5, 0.5]
    assert told["tests"][which] == {"tests": 4, "higher": 0, "lower": 0}
    assert told["tests"]["exact_match less full"] == {"tests": 5, "higher": 0, "lower": 4}
    assert "holm" not in by_name["random, K = 3, 25%, dense"]


def test_resampled_questions_are_paired_and_give_the_bootstraps_interval() -> None:
    rng = np.random.default_rng(0)
    of_models = [np.stack([rng.random(200), rng.random(200) ** 2]) for _ in range(2)]
    drawn = frontier.resampled([np.concatenate([one, one[:1]]) for one in of_models])
    assert np.array_equal(drawn[:, 0], drawn[:, 2])  # the same questions for all points
    for statistic in (lambda a, b: a - b, lambda a, b: a / b):
        own = np.quantile(statistic(drawn[:, 0], drawn[:, 1]), [0.025, 0.975])
        other = bootstrap_interval(statistic, [one[0] for one in of_models], [one[1] for one in of_models])
        assert own == pytest.approx(other, rel=0.05, abs=0.006)


# The command


def run(row_model: Any, out: Path, **more: Any) -> tuple[dict[str, Any], str]:
    printed = io.StringIO()
    options = {"pruners": ["fastv", "visionzip"], "keeps": [0.5, 0.25], "kv": ["int4:group=4,residual=0"]} | more
    content = run_frontier([row_model, row_model], "rows", out, 4, Console(file=printed, width=300), **options)
    return content, printed.getvalue()


def test_two_models_two_methods_two_stores(row_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, printed = run(row_model, tmp_path, names=["a", "b"])
    written = json.loads((tmp_path / "frontier.json").read_text())
    assert written == json.loads(json.dumps(content))
    check_results(written | {"commit": "0" * 40}, "frontier.json")
    assert written["command"] == (
        "foveate frontier a b --task rows --n 4 --out OUT --prune fastv --prune visionzip --kv int4:group=4,residual=0 "
        "--keep 0.5 --keep 0.25"
    )
    assert (tmp_path / "frontier.json").stat().st_size < 600 * len(written["points"]) + 6000
    layer = written["layers"]["fastv"]
    keeps = (0.5, 0.25)
    both = {("full", 1.0), *((name, keep) for name in ("fastv", "visionzip") for keep in keeps)}
    alone = {("nothing", 0.0), *((name, keep) for name in ("lowest", "random", "random-of-tower") for keep in keeps)}
    there = [(one["curve"], one["keep"], one["store"]) for one in written["points"]]
    kv = "int4:group=4,residual=0"
    assert sorted(there) == sorted(
        [*((*one, store) for one in both for store in ("dense", kv)), *((*one, "dense") for one in alone)]
    )
    for one in written["points"]:
        assert one["results"][1]["n"] == 8
        assert one["layer"] == (layer if one["curve"] in ("fastv", "random", "lowest", "nothing") else 0)
    assert f"test  fastv, K = {layer}, 25%" in printed and "Pareto set" in printed
    # The figure and the tables come from the JSON alone.
    with Image.open(io.BytesIO((tmp_path / "frontier.png").read_bytes())) as image:
        assert min(image.size) > 400
    made = tables(written)
    assert set(made) == {f"rows-{name}" for name in ("pareto", "claims", "stores", "methods", "both")}
    dense = next(one for one in written["points"] if one["name"] == f"fastv, K = {layer}, 25%, dense")
    assert f"| fastv, K = {layer}, 25% | {dense['visual_tokens']:.1f} | {dense['flops']:.2f} |" in made["rows-methods"]
    assert lines(written)[0] in printed

    def refused(*_: Any) -> Any:
        raise AssertionError("asked again")

    with monkeypatch.context() as patch:
        patch.setattr(frontier, "answers", refused)
        again, _ = run(row_model, tmp_path, names=["a", "b"])
        assert again["points"] == content["points"]
        with torch.no_grad():
            next(row_model[0].parameters()).view(-1)[0] += 1  # another model: nothing of what is written is its own
        try:
            with pytest.raises(AssertionError, match="asked again"):
                run(row_model, tmp_path)
        finally:
            with torch.no_grad():
                next(row_model[0].parameters()).view(-1)[0] -= 1


def test_a_picture_outlines_the_pareto_set() -> None:
    told = frontier.as_json(*[crafted(880, 600)] * 3, {DENSE: "dense", "int4": "int4"})
    told |= {"task": "rows", "models": 1, "questions": {"dev": 1000, "test": 1000, "claims": 1000}}
    outlined = picture(told)
    without = picture(told | {"points": [one | {"pareto": False} for one in told["points"]]})
    assert Image.open(io.BytesIO(outlined)).size == Image.open(io.BytesIO(without)).size and outlined != without


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruners": ["fastw"]}, "prune is 'fastw'; accepted: fastv, sparsevlm, "),
        ({"pruners": ["evs"]}, "prune is evs; accepted with the task rows: fastv, "),
        ({"keeps": [0.5, 1.0]}, "keep is 1.0; accepted: fractions between 0 and 1"),
        ({"kv": ["int5"]}, "kv is 'int5'; accepted: dense, paged, int8"),
    ],
)
def test_wrong_names_are_refused_before_anything_runs(
    row_model: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(row_model, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_models_of_another_task_are_refused(row_model: Any, tmp_path: Path) -> None:
    for task, message in (
        (
            "glyphs",
            "the model reads 32 tokens of a picture of this task; accepted: 16, as models of the recipe quickst",
        ),
        ("clips", "the model reads 128 tokens of a picture of this task; accepted: 64"),
        ("needles", "the model reads 4 tokens of a picture of this task; accepted: 1, as models of the recipe needle"),
        ("row", "task is 'row'; accepted: rows, glyphs, clips, needles"),
    ):
        with pytest.raises(ValueError, match=message):
            run_frontier([row_model], task, tmp_path, 4, Console(file=io.StringIO()))


@pytest.mark.parametrize("task", list(TASKS))
def test_questions_are_the_same_again_and_differ_by_split_and_model(task: str) -> None:
    def made(n: int, split: str, seed: int) -> list[tuple[str, bytes]]:
        items = TASKS[task].items(n, split, seed, 8)
        return [
            (item.question.text, item.media if isinstance(item.media, bytes) else item.media.tobytes())
            for item in items
        ]

    assert made(5, "dev", 0)[:3] == made(3, "dev", 0) and len(made(5, "dev", 0)) == 5
    assert len({made(1, split, seed)[0][1] for split in ("dev", "test") for seed in (0, 1)}) == 4


def test_committed_results_reach_the_bar() -> None:
    """At a quarter of the tokens within a tenth of full, above random; 4 bits within a point of dense; all packed."""
    results = load_results(ROOT / "docs" / "results" / "frontier_rows.json")
    claims = results["claims"]
    best = next(one for one in results["points"] if one["name"] == claims["best"])
    assert best["keep"] == 0.25 and results["models"] >= 3 and any(one["pareto"] for one in results["points"])
    found = {one["name"]: one for one in claims["results"]}
    assert found["exact_match: of full"]["low"] >= 0.9
    assert found["exact_match less random"]["low"] > 0.2 and found["exact_match less random"]["p"] < 1e-6
    stores = {one["store"]: one["results"] for one in claims["stores"]}
    for store in ("int8", "int8 keys, int4 values", "int4, keys by channel"):
        for one in stores[store][:2]:
            assert one["n"] >= 2000 and equivalent(one, 0.01)
    packed = [one["packed"] for one in results["points"] if one["curve"] == "full" and one["store"] != DENSE]
    assert packed == [1.0] * len(packed)
