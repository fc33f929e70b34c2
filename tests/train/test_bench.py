"""The benchmarks run and print what a results file holds; what they measure decides no test."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate import cli
from foveate.data.document import Document
from foveate.data.encoding import Sample, encode
from foveate.data.sources import ShardSource
from foveate.train import bench_data
from foveate.train.bench import IMAGE_ID, SHAPES, MadeUp, TrainBench, made_up_processor, padded_batches, peak_memory
from foveate.train.bench_data import _FromShards, bench_processor, make_bench_shards
from foveate.train.flops import ModelFlops
from foveate.vlm.config import FoveateConfig
from foveate.vlm.model import FoveateForConditionalGeneration

CPU = torch.device("cpu")
FACTS = {"command", "commit", "date", "device", "versions", "results"}


@pytest.fixture
def results_of(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, dict[str, Any]]]:
    """Runs `foveate bench … --json`; its results by name, checked against the format of a results file."""

    def run(*arguments: object) -> dict[str, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["foveate", "bench", *map(str, arguments), "--json"])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert ended.value.code == 0, err
        said = json.loads(out)
        assert set(said) == FACTS
        assert said["command"] == " ".join(["foveate", "bench", *map(str, arguments), "--json"])
        assert said["versions"]["torch"] == torch.__version__
        results = {entry["name"]: entry for entry in said["results"]}
        assert len(results) == len(said["results"])
        for entry in results.values():
            assert set(entry) <= {"name", "value", "unit", "n", "low", "high", "baseline", "ratio"}
            assert entry["unit"] and entry["n"] >= 1 and math.isfinite(entry["value"])
            assert ("baseline" in entry) == ("ratio" in entry)
            if "baseline" in entry:
                assert entry["baseline"] in results
        return results

    return run


def config(model: str) -> FoveateConfig:
    return FoveateConfig(**SHAPES[model], image_token_id=IMAGE_ID, video_token_id=2)


@pytest.fixture
def made_up() -> Iterator[tuple[MadeUp, list[Sample]]]:
    source = MadeUp(512, vocabulary=100, image_tokens=4, image_side=56)
    yield source, [source.encode(source.document(i)) for i in range(60)]


def test_bench_train_prints_every_part(results_of: Callable[..., dict[str, dict[str, Any]]]) -> None:
    results = results_of("train", "--tokens", 256, "--steps", 2, "--device", "cpu")
    assert {
        "parameters", "train_tokens_per_s", "train_images_per_s", "train_step_s", "train_data_wait",
        "train_flops_per_s", "padded_tokens_per_s", "packed_tokens_per_s", "packed_over_padded_step",
        "padded_padding", "step_forward_s", "step_backward_s", "step_optimizer_s", "step_memory_fused_loss",
        "step_memory_full_logits",
    } == set(results)  # fmt: skip
    assert results["packed_tokens_per_s"]["baseline"] == "padded_tokens_per_s"
    assert results["step_memory_fused_loss"]["baseline"] == "step_memory_full_logits"
    assert all(results[f"step_{part}_s"]["value"] > 0 for part in ("forward", "backward", "optimizer"))
    with torch.device("meta"):
        expected = sum(p.numel() for p in FoveateForConditionalGeneration(config("tiny")).parameters())
    assert results["parameters"]["value"] == expected


def test_bench_data_prints_every_part(
    results_of: Callable[..., dict[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, smaller in (("ROUNDS", 1), ("RESTORES", 1), ("ROW_TOKENS", 1024), ("PACKED_STEPS", 20)):
        monkeypatch.setattr(bench_data, name, smaller)
    results = results_of("data", "--documents", 60, "--workers", 0, "--seconds", 0.1, "--restore")
    assert {
        "webdataset_documents_per_s", "webdataset_MB_per_s", "loader_documents_per_s", "loader_MB_per_s",
        "loader_over_webdataset", "restore_at_1_percent_s", "restore_at_90_percent_s",
        "packing_waste_without_reserve", "packing_waste_with_reserve", "imbalance_without_reserve",
        "imbalance_with_reserve",
    } == set(results)  # fmt: skip
    assert results["loader_documents_per_s"]["baseline"] == "webdataset_documents_per_s"
    assert results["packing_waste_with_reserve"]["value"] < 0.03  # no timing: the same everywhere
    assert results["imbalance_with_reserve"]["value"] < results["imbalance_without_reserve"]["value"]


def test_shards_that_are_none_are_a_users_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "list.json").write_text('[{"text": "one"}]')
    monkeypatch.setattr(sys, "argv", ["foveate", "bench", "data", str(tmp_path / "list.json")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "no tar shards" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [("model", "3b", "tiny, 0.5b, 2b, 8b"), ("steps", 0, "1 or more"), ("trains", ("head",), "tower, projector, llm")],
)
def test_settings_that_cannot_be_are_refused(field: str, value: Any, accepted: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} .*{accepted}"):
        TrainBench(**{field: value})


def test_made_up_documents_are_skewed_and_the_same_each_time(made_up: tuple[MadeUp, list[Sample]]) -> None:
    source, samples = made_up
    again = source.encode(Document(samples[7].key, ()))
    assert np.array_equal(again.input_ids, samples[7].input_ids) and np.array_equal(again.images, samples[7].images)
    lengths = [source.encode(source.document(i)).tokens for i in range(400)]
    assert max(lengths) <= 512 and np.percentile(lengths, 99) > 6 * np.median(lengths)
    assert any(len(sample.images) == 0 for sample in samples) and any(len(sample.images) > 1 for sample in samples)
    for sample in samples:
        assert (sample.input_ids == IMAGE_ID).sum() == 4 * len(sample.images)
        assert sample.loss_tokens == sample.tokens - 4 * len(sample.images) - 1


def test_padded_batches_hold_the_same_documents_within_the_budget(made_up: tuple[MadeUp, list[Sample]]) -> None:
    _, samples = made_up
    batches = padded_batches(samples, 512, made_up_processor(config("tiny")))
    assert [key for batch in batches for key in batch.keys] == [sample.key for sample in samples]
    assert sum(batch.tokens for batch in batches) == sum(sample.tokens for sample in samples)
    assert sum(batch.loss_tokens for batch in batches) == sum(sample.loss_tokens for sample in samples)
    assert all(batch.positions <= 512 for batch in batches)
    for batch, following in pairwise(batches):  # nor would the next document have fitted
        longest = max(*batch.lengths, following.lengths[0])
        assert (len(batch.lengths) + 1) * longest > 512
    rest = iter(samples)
    for batch in batches:
        for ids, labels, positions in zip(
            *(batch.inputs[name] for name in ("input_ids", "labels", "position_ids")), strict=True
        ):
            sample = next(rest)
            assert ids[: sample.tokens].tolist() == sample.input_ids.tolist()
            assert (labels[sample.tokens :] == -100).all()
            assert positions.tolist() == list(range(len(ids)))


@pytest.mark.parametrize(("model", "billions"), [("0.5b", 0.58), ("2b", 2.0), ("8b", 8.1)])
def test_shapes_have_the_size_that_they_are_named_by(model: str, billions: float) -> None:
    with torch.device("meta"):
        made = FoveateForConditionalGeneration(config(model))
    assert sum(p.numel() for p in made.parameters()) / 1e9 == pytest.approx(billions, rel=0.03)
    assert ModelFlops.from_model(made).head > 0


def test_peak_memory_is_that_of_the_tensors_held_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            first = torch.ones(1_000_000)
            second = first + 1  # two at a time, whatever the number of turns
            del first, second

    peak = peak_memory(CPU, work)
    assert peak is not None and 8_000_000 <= peak < 9_000_000


def test_webdataset_reads_the_documents_that_our_source_reads(tmp_path: Path) -> None:
    import webdataset

    make_bench_shards(tmp_path, 12)
    processor = bench_processor()
    source = ShardSource(str(tmp_path), processor)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).map(_FromShards(source, processor)))
    assert len(theirs) == source.documents == 12
    for i, sample in enumerate(theirs):
        ours = encode(source.document(i), processor)
        assert np.array_equal(sample.input_ids, ours.input_ids) and np.array_equal(sample.images, ours.images)
        assert len(ours.images) == 1 and ours.loss_tokens > 0


def test_bench_train_imports_only_what_a_gpu_machine_has() -> None:
    """torch, transformers and their own needs; no data library, no DeepSpeed, no tracker."""
    missing = ("av", "webdataset", "wandb", "datasets", "deepspeed", "braceexpand", "pydantic", "peft", "sklearn")
    code = (
        "import sys\n"
        f"for name in {missing}: sys.modules[name] = None\n"
        "from foveate.train.bench import TrainBench, bench_train\n"
        "from foveate.train import bench_commands\n"
        "from foveate.eval.facts import run_facts\n"
        "from foveate import cli\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
