import itertools
import json
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from foveate.train import checkpoint
from foveate.train.build import load_weights
from foveate.train.checkpoint import (
    CheckpointError,
    CheckpointTensors,
    CheckpointWriter,
    is_whole,
    load_rng_tensors,
    newest_checkpoint,
    read_state,
    rng_tensors,
)

STATE = "state-00000-of-00001.safetensors"
FILES = ["manifest.json", STATE, "state.json"]


def save(folder: Path, step: int, keep: int = 2) -> Path:
    tensors = {"weight/a": torch.full((3, 2), float(step)), "optimizer/a/step": torch.tensor(float(step))}
    CheckpointWriter(folder, keep).save(step, tensors, {"step": step})
    return folder / f"step-{step:08d}"


def load(path: Path) -> dict[str, torch.Tensor]:
    with CheckpointTensors(path) as tensors:
        return dict(tensors)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "checkpoints", 120)
    assert path.name == "step-00000120"
    assert names(path) == FILES
    assert read_state(path) == {"step": 120}
    tensors = load(path)
    assert set(tensors) == {"weight/a", "optimizer/a/step"}
    assert tensors["weight/a"].equal(torch.full((3, 2), 120.0))
    assert tensors["optimizer/a/step"].equal(torch.tensor(120.0))


def gathers(ranks: int) -> list[Callable[[Any], list[Any]]]:
    """The all-gather of so many threads."""
    barrier, told = Barrier(ranks, timeout=30), [None] * ranks

    def of(rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            told[rank] = value
            barrier.wait()
            copy = list(told)
            barrier.wait()
            return copy

        return gather

    return [of(rank) for rank in range(ranks)]


def save_shares(folder: Path, step: int, shares: list[dict[str, torch.Tensor]], asynchronous: bool) -> list[Exception]:
    """Each rank's share, from a thread; the errors."""
    errors: list[Exception] = []

    def each(rank: int, gather: Callable) -> None:
        options = {"rank": rank, "ranks": len(shares), "gather": gather, "asynchronous": asynchronous}
        writer = CheckpointWriter(folder, 2, **options)
        try:
            writer.save(step, shares[rank], {"from": rank})
            writer.wait()
        except CheckpointError as error:
            errors.append(error)

    threads = [Thread(target=each, args=(rank, gather)) for rank, gather in enumerate(gathers(len(shares)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return errors


@pytest.mark.parametrize("asynchronous", [False, True])
def test_shares_of_all_ranks_are_one_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    shares = [{"weight/a": torch.zeros(2)}, {"weight/b": torch.ones(3)}, {}]
    assert save_shares(tmp_path, 4, shares, asynchronous) == []
    path = newest_checkpoint(tmp_path)
    assert names(path) == ["manifest.json", *(f"state-{r:05d}-of-00003.safetensors" for r in range(3)), "state.json"]
    assert read_state(path) == {"from": 0}
    assert {name: tensor.tolist() for name, tensor in load(path).items()} == {"weight/a": [0, 0], "weight/b": [1, 1, 1]}


def test_failure_of_one_rank_is_that_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)
    real = checkpoint.save_file

    def full(tensors: dict, path: Path) -> None:
        if "00001-of" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    errors = save_shares(tmp_path, 4, [{"weight/a": torch.zeros(2)}, {"weight/b": torch.ones(3)}], True)
    assert len(errors) == 2 and all("No space left" in str(error) for error in errors)
    assert names(tmp_path) == ["step-00000003"]


def test_asynchronous_save_is_told_of_a_failure_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, 2, asynchronous=True)
    started, go_on = Event(), Event()

    def full(tensors: dict, path: Path) -> None:
        started.set()
        assert go_on.wait(30)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    writer.save(1, {"weight/a": torch.zeros(2)}, {})
    assert started.wait(30)  # `save` came back while it was still being written
    assert newest_checkpoint(tmp_path) is None
    go_on.set()
    with pytest.raises(CheckpointError, match=r"step-00000001: can't be written: .*No space"):
        writer.wait()
    monkeypatch.undo()
    writer.save(2, {"weight/a": torch.zeros(2)}, {})
    writer.wait()
    assert newest_checkpoint(tmp_path).name == "step-00000002"


def test_best_is_kept_besides_the_newest(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=1, keep_best=True)
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 1.5], 1):
        writer.save(step, {}, {"validation_loss": loss})
    assert names(tmp_path) == ["step-00000002", "step-00000005"]
    writer.save(6, {}, {"validation_loss": 0.5})
    assert names(tmp_path) == ["step-00000006"]


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for file in path.iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text())
            continue
        data = file.read_bytes()
        assert not data.startswith((b"PK", b"\x80")) and data[8:9] == b"{"  # safetensors: a length, then JSON
        with pytest.raises(ValueError):
            list(pickletools.genops(data))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (3, 6, 9, 100_000_000 - 1):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000009", "step-99999999"]
    assert newest_checkpoint(tmp_path).name == "step-99999999"
    save(tmp_path / "one", 1, keep=1)
    save(tmp_path / "one", 2, keep=1)
    assert names(tmp_path / "one") == ["step-00000002"]


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000004").write_text("a file")
    (tmp_path / "step-5").mkdir()
    assert newest_checkpoint(tmp_path) is None


# Damage


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a directory":
        path.unlink()
        path.mkdir()
    elif how.startswith("cut"):
        path.write_bytes(data[: len(data) * int(how[4:-1]) // 100])
    else:
        at = len(data) * int(how[5:-1]) // 100
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])


DAMAGE = ["deleted", "empty", "a directory", "cut 50%", "cut 99%", "flip 1%", "flip 30%", "flip 60%", "flip 99%"]


@pytest.mark.parametrize(("file", "how"), list(itertools.product(FILES, DAMAGE)))
def test_damaged_checkpoint_is_not_loaded_and_the_one_before_is(tmp_path: Path, file: str, how: str) -> None:
    before, damaged = save(tmp_path, 1), save(tmp_path, 2)
    spoil(damaged / file, how)
    assert newest_checkpoint(tmp_path) == before
    assert not is_whole(damaged)


def test_every_cut_and_every_flipped_byte_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    """Or leaves it saying the same, as another white space does."""
    path = save(tmp_path, 1) / "manifest.json"
    data = path.read_bytes()
    meaning = json.loads(data)
    changed = [data[:n] for n in range(len(data))]
    changed += [data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :] for i in range(len(data)) for bit in (1, 32)]
    for spoiled in changed:
        path.write_bytes(spoiled)
        if newest_checkpoint(tmp_path) is not None:
            assert json.loads(spoiled) == meaning


def test_a_checkpoint_still_being_written_is_not_loaded_and_then_cleared_away(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    for step in (2, 3):
        shutil.copytree(first, tmp_path / f".writing-step-{step:08d}")
    assert newest_checkpoint(tmp_path) == first
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    save_file({"weight/b": torch.zeros(2)}, path / "state-00001-of-00002.safetensors")
    assert set(load(path)) == {"weight/a", "optimizer/a/step"}


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_later_checkpoints_do_not_push_out_whole_ones(tmp_path: Path, keep: int) -> None:
    """As after a resume from step 5, of a run whose later checkpoints were damaged."""
    for step in (5, 9, 10):
        save(tmp_path, step, keep=3)
    for step in (9, 10):
        spoil(tmp_path / f"step-{step:08d}" / STATE, "cut 50%")
    save(tmp_path, 6, keep=keep)
    assert newest_checkpoint(tmp_path).name == "step-00000006"
    assert names(tmp_path) == ["step-00000005", "step-00000006"][-keep:]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    spoil(path / STATE, "cut 50%")
    assert save(tmp_path, 4) == newest_checkpoint(tmp_path) == path


# Failing to write


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: (os error 28)")])
@pytest.mark.parametrize("failing", ["save_file", "_sha256", "_flush"])
def test_failed_write_leaves_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: Exception
) -> None:
    first = save(tmp_path, 1)
    written = {file.name: file.read_bytes() for file in first.iterdir()}
    real = getattr(checkpoint, failing)
    calls = itertools.count()

    def fail(*arguments: object) -> object:
        if next(calls) == (failing != "save_file"):  # where that can be, something is on disk already
            raise error
        return real(*arguments)

    monkeypatch.setattr(checkpoint, failing, fail)
    with pytest.raises(CheckpointError, match=r"step-00000002: can't be written: .*28.*earlier .* untouched"):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001"]
    assert {file.name: file.read_bytes() for file in first.iterdir()} == written
    assert newest_checkpoint(tmp_path) == first
    assert save(tmp_path, 2) == newest_checkpoint(tmp_path)


def test_error_of_safetensors_is_a_checkpoint_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is no OSError; here its target is a directory."""
    first = save(tmp_path, 1)
    real = checkpoint.save_file

    def blocked(tensors: dict, path: Path) -> None:
        path.mkdir()
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", blocked)
    with pytest.raises(CheckpointError, match="can't be written"):
        save(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == first


def test_file_in_the_folders_place_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="can't be written"):
        save(tmp_path / "checkpoints", 1)


# Weights, optimiser, random numbers


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(ids))).logsumexp(-1).mean()


def stored(module: nn.Module) -> dict[str, torch.Tensor]:
    return {f"weight/{name}": parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    module, other = Tied(), Tied()
    load_weights(other, stored(module), "")
    assert other.head.weight is other.embed.weight
    assert other.head.weight.equal(module.head.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight/norm.weight"), "names .*norm.weight"),
        (lambda t: t.update({"weight/extra": torch.zeros(1)}), "names .*extra"),
        (lambda t: t.update({"weight/norm.weight": torch.zeros(5)}), r"norm.weight has shape \(5,\).*\(4,\)"),
    ],
)
def test_weights_of_another_model_are_refused(change: Callable, message: str) -> None:
    tensors = stored(Tied())
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_weights(Tied(), tensors, "")


def test_restored_random_numbers_go_on_as_before(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.rand(7)
    CheckpointWriter(tmp_path, 1).save(1, rng_tensors(rank=0), {})
    expected = torch.rand(9), torch.nn.functional.dropout(torch.ones(50))
    torch.manual_seed(99)
    load_rng_tensors(load(tmp_path / "step-00000001"), rank=0)
    assert torch.rand(9).equal(expected[0])
    assert torch.nn.functional.dropout(torch.ones(50)).equal(expected[1])
