"""The whole way at the smallest size: what the run writes, not what the model has learned."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from foveate.eval.glyphs import TASKS
from foveate.train import quickstart
from foveate.train.quickstart import run_quickstart
from foveate.train.recipe import Recipe, RecipeError, load_recipe
from foveate.vlm.media import probe_video


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    stages = ("tower-warmup", "align", "interleaved", "instruct", "video", "long-context")
    shrunk = [f"stages.{stage}.{field}" for stage in stages for field in ("steps=1", "warmup_steps=0")]
    return load_recipe(
        "quickstart", [*shrunk, "tracking.wandb=disabled", "threads=2", "stages.long-context.data.0.frames=[2,4]"]
    )


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart")
    printed = io.StringIO()
    run_quickstart(folder, Console(file=printed, width=200), recipe, questions=2)
    return folder, printed.getvalue()


def test_metrics_hold_stages_memory_and_tasks(run: tuple[Path, str]) -> None:
    metrics = json.loads((run[0] / "metrics.json").read_text())
    assert [stage["name"] for stage in metrics["stages"]] == [
        "tower-warmup", "align", "interleaved", "instruct", "video", "long-context",
    ]  # fmt: skip
    assert all(stage["steps"] == 1 and stage["seconds"] > 0 and stage["tokens"] > 0 for stage in metrics["stages"])
    assert 1e8 < metrics["peak_memory_bytes"] < 4e10
    assert set(metrics["tasks"]) == set(TASKS)
    for result in metrics["tasks"].values():
        assert set(result) == {"accuracy", "n", "low", "high", "chance", "majority"}
        assert result["n"] == 2
    assert 0 <= metrics["packing_waste"] < 1


def test_both_exports_answer_as_the_model_does(run: tuple[Path, str]) -> None:
    asked = json.loads((run[0] / "ask.json").read_text())
    assert len(asked) == 4
    for one in asked:
        assert one["answer"] == one["answer_code"] == one["answer_stock"]
        assert one["truth"].split()[0] in one["question"]
    config = json.loads((run[0] / "stock" / "config.json").read_text())
    assert config["model_type"] == "lfm2_vl"
    assert "auto_map" not in config


def test_clip_report_and_pictures_are_what_they_say(run: tuple[Path, str]) -> None:
    clip = probe_video(run[0] / "clip.mp4")
    assert (clip.frames, clip.codec) == (8, "h264")
    page = (run[0] / "report.html").read_text()
    assert all(task in page for task in TASKS)
    assert page.count("data:image/png;base64,") == 2  # examples and losses
    assert Image.open(run[0] / "examples.png").width > 500
    assert 'clip.mp4 "what colour is the' in run[1]


def test_each_stage_logs_its_loss(run: tuple[Path, str]) -> None:
    lines = [json.loads(line) for line in (run[0] / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kept", ["train", "model", "stock"])
def test_folders_of_others_are_left_alone(kept: str, recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / kept / "mine.txt"
    file.parent.mkdir()
    file.write_text("mine")
    with pytest.raises(RecipeError, match="no quickstart wrote"):
        run_quickstart(tmp_path, Console(file=io.StringIO()), recipe, questions=2)
    assert sorted(tmp_path.rglob("*")) == [file.parent, file]
    assert file.read_text() == "mine"


def test_a_run_stopped_after_training_does_not_train_again_and_a_finished_one_is_replaced(
    run: tuple[Path, str], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "_reload", lambda out, questions: {"model": questions, "stock": questions})
    folder, _ = run
    checkpoint = max((folder / "train" / "checkpoints").iterdir()) / "manifest.json"
    written_at = checkpoint.stat().st_mtime_ns
    (folder / "metrics.json").unlink()
    printed = io.StringIO()
    run_quickstart(folder, Console(file=printed, width=200), recipe, questions=1)
    assert "going on with the unfinished run" in printed.getvalue()
    assert checkpoint.stat().st_mtime_ns == written_at
    run_quickstart(folder, Console(file=printed, width=200), recipe, questions=1)
    assert "replacing the run" in printed.getvalue()
    assert checkpoint.stat().st_mtime_ns > written_at
