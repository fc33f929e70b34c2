"""The scale-then-compress experiment: its variants, their start, a run of a few steps, and the committed results."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from foveate.eval.compress import gain_kept, over_seeds
from foveate.train.build import build_model
from foveate.train.compress import (
    VARIANTS,
    run_variant,
    run_video,
    start_variant,
    train_from,
    variant_recipe,
    visual_tokens,
)
from foveate.train.recipe import load_recipe
from foveate.vlm.chat import load_model

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "scale_then_compress.json"
NAMES = ("compress-start", "compress", "compress-video-start", "compress-video")
SHORT = (
    "stages.align.steps=2", "stages.align.warmup_steps=0", "tracking.wandb=disabled", "threads=1",
)  # fmt: skip


def variant(name: str):
    return next(one for one in VARIANTS if one.name == name)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("low", 6 * 6), ("low + tower stage", 6 * 6), ("scaled", 18 * 18), ("scaled + 2x2", 9 * 9),
        ("scaled + 3x3", 6 * 6), ("scaled + 3x3 + tower stage", 6 * 6),
    ],
)  # fmt: skip
def test_variants_have_their_tokens_and_differ_in_nothing_else_than_they_say(name: str, tokens: int) -> None:
    recipe, base = variant_recipe(variant(name), seed=3), load_recipe("compress")
    assert visual_tokens(recipe) == tokens
    assert recipe.seed == 3
    assert [stage.steps for stage in recipe.stages] == [stage.steps for stage in base.stages]
    assert [stage.data for stage in recipe.stages] == [stage.data for stage in base.stages]
    assert [stage.batch.rows for stage in recipe.stages] == [stage.batch.rows for stage in base.stages]
    assert ("tower" in recipe.stages[1].learning_rates) == name.endswith("tower stage")
    assert all("tower" not in stage.learning_rates for stage in (recipe.stages[0], recipe.stages[2]))
    assert recipe.model.vision == base.model.vision and recipe.model.text == base.model.text


def test_all_recipes_describe_one_tower_and_llm() -> None:
    models = [load_recipe(name).model for name in NAMES]
    for field in ("vision", "text", "embedding_scale", "vision_feature_layer", "attn_implementation", "processor"):
        assert all(getattr(model, field) == getattr(models[0], field) for model in models)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(1)
    model, processor = build_model(load_recipe("compress-start").model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_variants_start_with_one_tower_and_llm_and_projectors_of_their_seed(start: Path, tmp_path: Path) -> None:
    shared, _ = load_model(start, device="cpu")
    models = []
    for number, (name, seed) in enumerate(
        [("scaled + 3x3", 0), ("scaled + 3x3 + tower stage", 0), ("scaled + 3x3", 1)]
    ):
        out = tmp_path / str(number)
        recipe = start_variant(variant_recipe(variant(name), seed), start, out)
        assert recipe.model.path == str(out)
        model, processor = load_model(out, device="cpu")
        assert processor.plan_image((256, 256)).tokens == 36
        for part in ("vision_tower", "language_model"):
            own, given = (getattr(m, part).state_dict() for m in (model, shared))
            assert own.keys() == given.keys() and all(torch.equal(own[key], given[key]) for key in own)
        models.append(model.multi_modal_projector.layers[1].weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def test_a_run_of_a_few_steps_trains_and_scores_and_is_not_done_twice(start: Path, tmp_path: Path) -> None:
    steps = [f"stages.{stage}.{field}" for stage in ("tower", "instruct") for field in ("steps=1", "warmup_steps=0")]
    console = Console(file=io.StringIO())
    first = run_variant(variant("scaled + 3x3 + tower stage"), start, tmp_path / "v", console, 0, 4, (*SHORT, *steps))
    assert (first.tokens, set(first.scores)) == (36, {"digit", "colour"})
    assert all(score.n == 4 for score in first.scores.values())
    before, after = (load_model(tmp_path / "v" / name, device="cpu")[0] for name in ("start", "model"))
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        own = [getattr(model, part).state_dict() for model in (before, after)]
        assert any(not torch.equal(own[0][key], own[1][key]) for key in own[0])
    written_at = (tmp_path / "v" / "stages.json").stat().st_mtime_ns
    again = run_variant(variant("scaled + 3x3 + tower stage"), start, tmp_path / "v", console, 0, 4, (*SHORT, *steps))
    assert again == first
    assert (tmp_path / "v" / "stages.json").stat().st_mtime_ns == written_at


def test_a_run_on_video_measures_each_number_of_frames(start: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    short = ("stages.video.steps=1", "stages.video.warmup_steps=0")
    first, _ = train_from(load_recipe("compress-video-start", [*SHORT, *short]), start, tmp_path / "start", console)
    measured = run_video(4, first, tmp_path / "v", console, 0, 2, (*SHORT[2:], *short))
    models = [load_model(folder, device="cpu")[0] for folder in (first, tmp_path / "v" / "start")]
    weights = [model.multi_modal_projector.state_dict() for model in models]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])  # goes on with its projector
    assert [one.tokens for one in measured] == [4 * 1, 4 * 2, 4 * 4, 4 * 8]  # 2 × 2 tokens of each four frames
    assert [one.name for one in measured] == [f"video, {frames} frames, pool 4" for frames in (4, 8, 16, 32)]


# The committed results


@pytest.fixture(scope="module")
def rows() -> dict:
    return over_seeds(json.loads(RESULTS.read_text())["variants"])


def test_committed_scaling_gains_twenty_points_and_the_compressed_keep_nine_tenths_of_it(rows: dict) -> None:
    assert rows["scaled"]["digit"].accuracy - rows["low"]["digit"].accuracy >= 0.2
    best = rows["scaled + 3x3 + tower stage"]
    assert best["tokens"] <= rows["scaled"]["tokens"] / 2
    assert gain_kept(rows, "scaled + 3x3 + tower stage") >= 0.9
    assert all(row["digit"].n >= 500 for row in rows.values() if "digit" in row)
    assert rows["low"]["colour"].accuracy > 0.95  # it is the resolution that is missing, not the training


def test_committed_results_hold_every_variant_and_more_frames_read_more(rows: dict) -> None:
    assert {one.name for one in VARIANTS} <= set(rows)
    few, many = rows["video, 8 frames, pool 1"], rows["video, 32 frames, pool 4"]
    assert few["tokens"] == many["tokens"]
    assert many["colour"].accuracy > few["colour"].accuracy
    assert all(row["colour"].n >= 500 for row in rows.values())


def test_page_holds_the_committed_tables() -> None:  # tests/test_docs.py compares them
    assert (ROOT / "docs" / "compress.md").read_text().count("| scaled | 324 |") == 1
