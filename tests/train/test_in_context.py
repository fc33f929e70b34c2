"""The in-context learning experiment: its recipe and arms, a run of a few steps, and the committed results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate.data.glyphs import GlyphSource
from foveate.eval import in_context as tables
from foveate.eval.in_context import as_json, draw, point
from foveate.eval.results import check_results, find
from foveate.train import in_context
from foveate.train.in_context import ARMS, Arm, run_arm, stage_recipe, train_start
from foveate.train.recipe import load_recipe
from foveate.vlm.chat import load_model

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "in_context.json"
SMALL = (
    "model.text.hidden_size=32", "model.text.intermediate_size=48", "model.text.num_attention_heads=2",
    "model.text.num_key_value_heads=2", "model.vision.hidden_size=24", "model.vision.intermediate_size=32",
    "model.vision.num_hidden_layers=1", "model.vision.num_attention_heads=2",
    *(f"stages.{stage}.{field}" for stage in ("tower", "text", "images") for field in ("steps=2", "warmup_steps=0")),
)  # fmt: skip


def test_arms_are_all_combinations_and_differ_in_nothing_else_than_they_say() -> None:
    assert len({arm.name for arm in ARMS}) == len({arm.folder for arm in ARMS}) == len(ARMS) == 12
    assert sum(arm.induction for arm in ARMS) == 8
    base = load_recipe("in-context").stages[-1]
    for arm in ARMS:
        recipe = stage_recipe("images", 3, Path("start"), arm.overrides)
        [stage] = recipe.stages
        kinds = {data.kind: data for data in stage.data}
        assert ("llm" in stage.learning_rates) != arm.frozen and "tower" not in stage.learning_rates
        assert ("image_episodes" in kinds) == arm.interleaved and "image_captions" in kinds
        assert ("text_episodes" in kinds) == ("text_repeats" in kinds) == arm.text
        assert recipe.seed == 3 and recipe.model.path == "start"
        same = ("steps", "schedule", "warmup_steps", "final_fraction", "weight_decay", "batch", "optimizer", "betas")
        assert all(getattr(stage, name) == getattr(base, name) for name in same)
    [own] = [arm for arm in ARMS if arm.name == "unfrozen, interleaved + captions"]
    assert stage_recipe("images", 0, None, own.overrides).stages[0] == base  # what `foveate train in-context` does


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_fifth_of_an_arms_tokens_are_text(interleaved: bool, shot_processor: Any) -> None:
    from foveate.data.encoding import encode

    [stage] = stage_recipe("images", 0, Path("start"), Arm(True, False, interleaved, True).overrides).stages
    tokens = {}
    for data in stage.data:
        source = GlyphSource(data.kind, shot_processor, objects=data.objects, turns=data.turns)
        mean = np.mean([encode(source.document(i), shot_processor).tokens for i in range(150)])
        tokens[data.kind] = data.weight * mean
    text = tokens["text_episodes"] + tokens["text_repeats"]
    assert text / sum(tokens.values()) == pytest.approx(0.2, abs=0.02)
    if interleaved:
        assert tokens["image_episodes"] == pytest.approx(tokens["image_captions"], rel=0.3)


@pytest.fixture(scope="module")
def shot_processor() -> Any:
    from foveate.train.build import build_model

    return build_model(load_recipe("in-context", SMALL).model)[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The start of a seed's arms, after two steps of each stage."""
    out = tmp_path_factory.mktemp("seed-0")
    train_start(out, 0, SMALL)
    return out


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(path, device="cpu")[0].state_dict())


def changed(before: Path, after: Path, part: str) -> bool:
    old, new = weights(before / "model"), weights(after / "model")
    return any(not torch.equal(old[name], new[name]) for name in old if name.startswith(part))


def test_both_llms_start_from_one_tower_and_nothing_but_texts_differ(start: Path) -> None:
    for llm in ("induction", "plain"):
        assert not changed(start / "tower", start / llm, "vision_tower")
        assert not changed(start / "tower", start / llm, "multi_modal_projector")
        assert changed(start / "tower", start / llm, "language_model")
    assert changed(start / "induction", start / "plain", "language_model")


@pytest.mark.parametrize("frozen", [True, False])
def test_an_arm_trains_what_it_says_and_is_not_run_again(
    frozen: bool, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_context, "TEXTS", 3)
    arm = Arm(induction=True, frozen=frozen, interleaved=True, text=True)
    measured = run_arm(start, arm, 0, 4, SMALL)
    folder = start / arm.folder
    assert changed(start / "induction", folder, "multi_modal_projector")
    assert changed(start / "induction", folder, "language_model") != frozen
    assert not changed(start / "induction", folder, "vision_tower")
    asked = {(p["kind"], p["ways"], p["shots"]): (len(p["forced"]), len(p["free"])) for p in measured["points"]}
    assert {(kind, 2, n) for kind in ("images", "classes") for n in (0, 1, 2, 4, 8)} < set(asked)
    assert set(asked.values()) == {(4, 4)} and len(measured["text"]) == 3
    monkeypatch.setattr(in_context, "train", None)
    monkeypatch.setattr(in_context, "measure_model", None)
    assert run_arm(start, arm, 0, 4, SMALL) == measured


def found(arm: str, seed: int, right: int) -> dict[str, Any]:
    """What an arm's measurement looks like: so many of 10 questions are right."""
    bits = "1" * right + "0" * (10 - right)
    asked = [(kind, 2, n) for kind in ("images", "classes") for n in (0, 1, 2, 4, 8)]
    asked += [("images", 4, 4), ("words", 2, 4)]
    points = [{"kind": kind, "ways": ways, "shots": n, "forced": bits, "free": "0" * 10} for kind, ways, n in asked]
    captions = {"colour": bits, "object": "0" * 10}
    return {"arm": arm, "seed": seed, "points": points, "captions": captions, "text": [1.0, 2.0 + seed]}


def test_results_tables_and_figure_tell_what_was_measured() -> None:
    names = ["unfrozen, interleaved + captions", "unfrozen, captions", "plain unfrozen, interleaved + captions"]
    measured = [
        found(name, seed, right + seed) for name, right in zip(names, (8, 3, 5), strict=True) for seed in (0, 1)
    ]
    facts = {
        "command": "c", "commit": "0" * 40, "date": "2026-01-01", "device": "d",
        "versions": {"python": "3", "foveate": "0"},
    }  # fmt: skip
    results = facts | as_json(measured)
    check_results(results, "in_context.json")
    entry = find(point(results["arms"][0], "images")["results"], "forced_choice")
    assert (entry["value"], entry["n"], entry["each"]) == (0.85, 20, [0.8, 0.9])
    assert find(results["arms"][1]["text"]["results"], "text_loss")["value"] == pytest.approx(1.75)
    compared = {(c["first"], c["second"]): c["results"][0] for c in results["comparisons"] if c["kind"] == "images"}
    assert set(compared) == {(names[0], names[1]), (names[0], names[2])}
    assert compared[names[0], names[1]]["value"] == pytest.approx(0.5)
    assert compared[names[0], names[1]]["p"] == pytest.approx(2 / 2**10)  # ten questions that the first alone has right
    pages = tables.tables(results)
    assert "| unfrozen, captions | 0.350 [0.181, 0.567] | 0.300 / 0.400 | 0.000" in pages["four-shots"]
    assert pages["by-shots"].count("\n") == 4 and "0.850" in pages["by-shots"]
    assert draw(results).startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())


def test_committed_unfrozen_interleaved_arms_learn_in_context_in_every_seed(committed: dict[str, Any]) -> None:
    arms = {arm["arm"]: arm for arm in committed["arms"]}
    assert len(committed["seeds"]) >= 3
    for name in ("unfrozen, interleaved + captions", "unfrozen, interleaved + captions, 20 % text"):
        for kind, least in (("images", 0.95), ("classes", 0.9)):
            entry = find(point(arms[name], kind)["results"], "forced_choice")
            assert entry["n"] >= 800 * len(committed["seeds"])
            assert min(entry["each"]) >= least, (name, kind)


def test_committed_captions_only_and_plain_arms_are_at_chance_and_far_below(committed: dict[str, Any]) -> None:
    arms = {arm["arm"]: find(point(arm, "images")["results"], "forced_choice") for arm in committed["arms"]}
    for text in (False, True):
        interleaved, captions = (arms[Arm(True, False, pages, text).name] for pages in (True, False))
        assert interleaved["low"] - captions["high"] >= 0.4
    at_chance = [arm.name for arm in ARMS if not (arm.induction and arm.interleaved)]
    assert all(abs(arms[name]["value"] - 0.5) < 0.05 for name in at_chance)


def test_committed_text_is_kept_where_a_fifth_is_text_and_lost_where_none_is(committed: dict[str, Any]) -> None:
    losses = {arm["arm"]: arm["text"]["results"][0]["value"] for arm in committed["arms"]}
    before = losses["induction LLM before pictures"]
    for pages in (True, False):
        assert losses[Arm(True, False, pages, True).name] < 1.5 * before
        assert losses[Arm(True, False, pages, False).name] > 3 * before
