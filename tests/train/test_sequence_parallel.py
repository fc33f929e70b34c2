"""Sequence parallelism in training: gradients, steps and whole runs equal those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from foveate.train import parallel
from foveate.train.distributed import World
from foveate.train.dryrun import dry_run
from foveate.train.parallel import Topologies, check_parallel
from foveate.train.recipe import Recipe, RecipeError
from foveate.train.tracking import read_metrics
from foveate.vlm.parallel.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
GRIDS = ("1x2", "2x1", "2x2", "4x1", "1x4")  # ulysses x ring, of four processes
RUNS = (
    *(f"pooled {grid}" for grid in GRIDS),
    *(f"{name} 2x2" for name in ("dynamic-s2", "anyres", "native", "lora", "checkpointed", "frozen")),
)
LONG, PAIR, TEXT = range(3)  # the packs
STEPS = [
    f"{engine} {grid} accumulation {accumulation}"
    for grid in ("1x1", "2x1", "2x2")
    for accumulation in (1, 3)
    for engine in ("torch", "zero1", "zero2", "zero3")
]
GONE = "is gone: killed, or its machine failed; the others end too. --resume goes on from the newest checkpoint"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of sequence_runs.py, in a folder."""
    folder = tmp_path_factory.mktemp("sequence") / "runs"
    script = Path(__file__).with_name("sequence_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(ROOT / "scripts" / "kill_and_resume.py")],
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def found(runs: Path) -> dict[str, Any]:
    return json.loads((runs / "found.json").read_text())


@pytest.fixture(scope="module")
def trainings(runs: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads((runs / "trainings.json").read_text())


# Gradients, in fp64


@pytest.mark.parametrize("run", RUNS)
def test_outputs_and_all_gradients_equal_those_of_documents_alone(found: dict[str, Any], run: str) -> None:
    of_run = found["gradients"][run]
    assert of_run["loss"] < 1e-10 and of_run["hidden"] < 1e-10
    parts = (
        {"language_model"} if run.startswith("frozen") else {"language_model", "multi_modal_projector", "vision_tower"}
    )
    parts |= {"image_newline"} if run.startswith("anyres") else set()
    assert set(of_run["gradients"]) == parts
    for part, error in of_run["gradients"].items():
        # SigLIP 2 resizes its position embeddings in fp32, on a CPU.
        assert error < (1e-7 if (run, part) == ("native 2x2", "vision_tower") else 1e-10), part


@pytest.mark.parametrize("run", RUNS)
def test_every_label_is_predicted_once(found: dict[str, Any], run: str) -> None:
    assert found["gradients"][run]["labels"]


def test_runs_have_ranks_without_frames_and_without_labels(found: dict[str, Any]) -> None:
    for run in ("pooled 2x2", "pooled 4x1", "pooled 1x4"):
        ranks = found["gradients"][run]["ranks"]
        assert sorted(rank[LONG]["frames"] for rank in ranks) == [0, 1, 2, 2]  # groups of two frames, not cut
        assert min(rank[LONG]["labels"] for rank in ranks) == 0 < max(rank[LONG]["labels"] for rank in ranks)
        assert not any(rank[TEXT]["frames"] + rank[TEXT]["images"] for rank in ranks)
    images = [rank[PAIR]["images"] for rank in found["gradients"]["dynamic-s2 2x2"]["ranks"]]
    assert sum(images) == 3 and 0 in images  # fewer than ranks


def test_activation_checkpointing_changes_no_bit(found: dict[str, Any]) -> None:
    assert found["gradients"]["checkpointed 2x2"]["same"]


def test_a_plain_all_reduce_of_features_would_lose_gradients(found: dict[str, Any]) -> None:
    """The exchange of LongVILA's public code: the loss is right, what tower and projector learn is not."""
    run = found["gradients"]["all_reduce 2x2"]
    assert run["loss"] < 1e-10 and run["gradients"]["language_model"] < 1e-10
    assert run["gradients"]["vision_tower"] > 0.1 and run["gradients"]["multi_modal_projector"] > 0.1


# Steps of engines


@pytest.mark.parametrize("run", STEPS)
def test_a_step_changes_parameters_as_one_process_would(found: dict[str, Any], run: str) -> None:
    """Plain gradient descent, not clipped, which a wrong scale would show; DeepSpeed has no fp64."""
    tolerance = 1e-12 if run.startswith("torch") else 2e-6
    assert found["steps"][run]["change"] < tolerance and found["steps"][run]["loss"] < tolerance


def test_all_steps_ran(found: dict[str, Any]) -> None:
    assert set(found["steps"]) == set(STEPS)


# Whole trainings


def test_a_killed_process_ends_the_run_with_one_error(trainings: dict[str, list[dict[str, Any]]]) -> None:
    victims = [2, 0, 3]
    assert len(trainings["killed"]) == len(victims) + 1
    for run, victim in zip(trainings["killed"], victims, strict=False):
        assert run["codes"] == [-9 if rank == victim else 1 for rank in range(4)]
        lines = [line for of_rank in run["told"] for line in of_rank if line != "SystemExit 1"]
        assert len(lines) == 1 and f"process {victim} of 4" in lines[0] and GONE in lines[0]
        assert run["ended_s"] < 50  # timeout_s


def test_killed_runs_go_on_with_other_grids_as_if_never_stopped(
    runs: Path, trainings: dict[str, list[dict[str, Any]]]
) -> None:
    """2 x 2, again 2 x 2, 1 x 2 in two groups, one process."""
    assert trainings["whole"][0]["codes"] == trainings["killed"][-1]["codes"] == [0]
    whole, killed = (read_metrics(runs / name) for name in ("whole", "killed"))
    assert [line["step"] for line in whole] == [line["step"] for line in killed] == list(range(1, 11))
    for name in ("loss", "validation_loss"):
        losses, others = ([line[name] for line in lines if line.get(name)] for lines in (whole, killed))
        assert losses == pytest.approx(others, rel=1e-6) and len(losses) == (10 if name == "loss" else 3)
    documents = [(runs / name / "documents.jsonl").read_text() for name in ("whole", "killed")]
    assert documents[0] == documents[1]
    weights = [load_file(runs / name / "model" / "model.safetensors") for name in ("whole", "killed")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6)


# Refusals, before anything is loaded


@pytest.fixture
def shared_recipe(tiny_recipe: Any) -> Any:
    """The tiny recipe's last stage, on four processes in a grid of 2 x 2."""

    def make(*overrides: str) -> Recipe:
        stage = "{name: last, steps: 3, learning_rates: {llm: 1.0e-3}, "
        stage += "batch: {rows: 1, window: 2, reserve: 1}, data: [{kind: needle_chat}]}"
        grid = "parallel={ulysses: 2, ring: 2}"
        return tiny_recipe(f"stages=[{stage}]", grid, "model.text.attention_dropout=0", *overrides)

    return make


def test_a_recipe_that_can_be_shared_is_accepted(shared_recipe: Any) -> None:
    check_parallel(shared_recipe("stages.last.batch.micro_batches=2"), 8)
    assert [check.micro_batches for check in dry_run(shared_recipe("stages.last.batch.micro_batches=6"), 8)] == [3]


@pytest.mark.parametrize(
    ("override", "processes", "message"),
    [
        ("parallel.ring=3", 4, r"^parallel: ulysses 2 x ring 3 needs a multiple of 6 processes, but there are 4"),
        (
            "stages.last.parallel={ulysses: 3, ring: 1}",
            3,
            r"^stages.last.parallel: .*2 attention heads.*accepted: 1, 2",
        ),
        ("stages.last.batch.micro_batches=3", 8, r"^stages.last.batch.micro_batches: 3 .* by 2 groups of 4 processes"),
        ("model.text.attention_dropout=0.1", 4, r"^parallel: the text model's attention_dropout is 0.1; accepted"),
        ("model.text={model_type: gemma2}", 4, r"^parallel: the text model's layer_types is \['sliding_attention'\]"),
        (
            "model.text.rope_parameters={rope_type: dynamic, factor: 2.0, rope_theta: 1.0e+4}",
            4,
            "rope_type is .'dynamic",
        ),
        ("model.text={model_type: mixtral, output_router_logits: true}", 4, "output_router_logits is True; accepted"),
    ],
)
def test_what_can_not_be_shared_is_refused_by_field(
    shared_recipe: Any, override: str, processes: int, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        check_parallel(shared_recipe(override), processes)


def test_an_objective_without_a_sequence_says_how_its_stage_is_left_alone(tiny_recipe: Any) -> None:
    with pytest.raises(RecipeError, match=r"accepted: stages.warmup.parallel={ulysses: 1, ring: 1}"):
        tiny_recipe("parallel={ring: 2}")
    recipe = tiny_recipe("parallel={ring: 2}", "stages.warmup.parallel={ulysses: 1, ring: 1}")
    assert [recipe.parallel_of(stage).degree for stage in recipe.stages] == [1, 2, 2, 2]


@pytest.mark.parametrize(("hosts", "warns"), [("aabb", False), ("abab", True), ("abbb", True)])
def test_rows_that_cross_machines_are_told(
    shared_recipe: Any, monkeypatch: pytest.MonkeyPatch, hosts: str, warns: bool
) -> None:
    monkeypatch.setattr(parallel, "make_topology", lambda *_: Topology(2, 2, 0, 4))
    console, recipe = Console(record=True, quiet=False), shared_recipe()
    topologies = Topologies(World(0, 4, hosts=tuple(hosts)), 60.0, console)
    assert topologies(recipe, recipe.stages[0]) is topologies(recipe, recipe.stages[0])
    assert console.export_text().count("parallel.ulysses 2 exchanges heads between machines (a, b)") == warns
