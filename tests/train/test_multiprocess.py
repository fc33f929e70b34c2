"""Whole runs of several processes: the same documents and the same model, whoever computes them."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "kill_and_resume.py"


@pytest.fixture(scope="module")
def forked() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(*arguments: str, timeout_s: int) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(forked: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[list[int]]]]:
    """All runs of multiprocess_runs.py, and their exit codes."""
    folder = tmp_path_factory.mktemp("runs")
    forked.write_shards(folder / "shards")
    forked.write_shards(folder / "bad")
    (shard, _) = sorted((folder / "bad").glob("*.tar"))
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"\x89PNG", b"\x00PNG"))  # no picture of the first shard can be read
    recipe = forked.RECIPE.replace("SHARDS", str(folder / "shards")).replace("WORKERS", "0").replace("EPOCHS", "1")
    recipe = recipe.replace("attention_dropout: 0.1", "attention_dropout: 0.0")  # which differs between ranks
    recipe = recipe.replace("learning_rates:", "optimizer: sgd\n    momentum: 0.9\n    learning_rates:")
    (folder / "recipe.yaml").write_text(recipe)
    printed = run_script(
        str(ROOT / "tests" / "train" / "multiprocess_runs.py"),
        str(SCRIPT),
        str(folder),
        str(folder / "recipe.yaml"),
        timeout_s=280,
    )
    return folder, json.loads(printed.splitlines()[-1])


def log(folder: Path, name: str) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob(f"{name}.*.log")))


def documents(run: Path) -> list[list[str]]:
    return [json.loads(line)["keys"] for line in (run / "documents.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["two", "four", "zero3", "moved", "usr1"])
def test_steps_hold_the_same_documents_on_any_number_of_ranks(
    runs: tuple[Path, dict[str, list[list[int]]]], forked: ModuleType, name: str
) -> None:
    folder, codes = runs
    assert not any(codes["one"][-1]) and not any(codes[name][-1]), log(folder, name)
    steps = documents(folder / "one")
    assert documents(folder / name) == steps
    counts = Counter(key for step in steps for key in step)
    assert len(counts) == 2 * forked.DOCUMENTS and set(counts.values()) == {1}


@pytest.mark.parametrize("name", ["two", "four", "zero3", "moved", "usr1"])
def test_the_model_is_the_same_on_any_number_of_ranks_and_engine(
    runs: tuple[Path, dict[str, list[list[int]]]], name: str
) -> None:
    folder, codes = runs
    assert not any(codes[name][-1]), log(folder, name)
    one, other = (load_file(folder / run / "model" / "model.safetensors") for run in ("one", name))
    assert one.keys() == other.keys()
    for weight in one:
        torch.testing.assert_close(other[weight], one[weight], rtol=1e-4, atol=2e-6)


def test_a_signal_to_one_rank_saves_and_stops_all(runs: tuple[Path, dict[str, list[list[int]]]]) -> None:
    folder, codes = runs
    assert codes["usr1"] == [[1, 1], [0, 0]]  # Requeue, which the command turns into exit code 0
    assert log(folder, "usr1").count("Requeue") == 2
    assert (folder / "usr1" / "model").is_dir()


def test_ranks_that_cannot_share_the_micro_batches_are_refused(
    runs: tuple[Path, dict[str, list[list[int]]]],
) -> None:
    folder, codes = runs
    assert codes["three"] == [[1, 1, 1]]
    assert log(folder, "three").count("4 micro-batches a step can't be shared by 3 processes") == 3


def test_too_many_bad_documents_stop_all_ranks_with_their_keys(
    runs: tuple[Path, dict[str, list[list[int]]]],
) -> None:
    folder, codes = runs
    assert codes["bad"] == [[1, 1]]
    assert log(folder, "bad").count("TooManyBadError") == 2
    assert "shard-000000.tar/" in log(folder, "bad") and "unreadable_media" in log(folder, "bad")


def test_killed_and_resumed_run_is_bit_identical() -> None:
    """Two ranks with two workers each; the command's own number of kills is 20."""
    printed = run_script(str(SCRIPT), "--kills", "5", "--json", timeout_s=280)
    found = json.loads(printed[printed.index("\n{\n") :] if not printed.startswith("{") else printed)
    found |= {result["name"]: result["value"] for result in found["results"]}
    assert found["kills"] == 5 and found["last_codes"] == [0, 0]
    assert found["same_weights"] and found["same_documents"] and found["each_document_once_an_epoch"]
