import itertools
import json
import pickletools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from foveate.train import checkpoint
from foveate.train.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_optimizer_tensors,
    load_rng_tensors,
    load_weight_tensors,
    newest_checkpoint,
    optimizer_tensors,
    rng_tensors,
    save_checkpoint,
    weight_tensors,
)

FILES = ["manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"]


def save(folder: Path, step: int, keep: int = 2) -> Path:
    weights = {"a": torch.full((3, 2), float(step)), "b": torch.arange(4)}
    optimizer = {"0.exp_avg": torch.full((2,), -float(step)), "0.step": torch.tensor(float(step))}
    return save_checkpoint(folder, step, {"weights": weights, "optimizer": optimizer}, {"step": step}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "checkpoints", 120)
    assert path.name == "step-00000120"
    assert names(path) == FILES
    tensors, state = load_checkpoint(path)
    assert state == {"step": 120}
    assert set(tensors) == {"weights", "optimizer"}
    assert tensors["weights"]["a"].equal(torch.full((3, 2), 120.0))
    assert tensors["weights"]["b"].equal(torch.arange(4))
    assert tensors["optimizer"]["0.step"].equal(torch.tensor(120.0))


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
    with pytest.raises(CheckpointError, match="step-00000002: not whole"):
        load_checkpoint(damaged)


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
    shutil.copy(path / "weights.safetensors", path / "head.safetensors")
    assert set(load_checkpoint(path)[0]) == {"weights", "optimizer"}


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_later_checkpoints_do_not_push_out_whole_ones(tmp_path: Path, keep: int) -> None:
    """As after a resume from step 5, of a run whose later checkpoints were damaged."""
    for step in (5, 9, 10):
        save(tmp_path, step, keep=3)
    for step in (9, 10):
        spoil(tmp_path / f"step-{step:08d}" / "weights.safetensors", "cut 50%")
    save(tmp_path, 6, keep=keep)
    assert newest_checkpoint(tmp_path).name == "step-00000006"
    assert names(tmp_path) == ["step-00000005", "step-00000006"][-keep:]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    spoil(path / "weights.safetensors", "cut 50%")
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
        if next(calls) == 1:  # not at once: something is on disk already
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


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    torch.manual_seed(0)
    module, other = Tied(), Tied()
    stored = weight_tensors(module)
    assert sum(t.shape == (7, 4) for t in stored.values()) == 1
    assert "norm.running_mean" in stored
    load_weight_tensors(other, {name: tensor.clone() for name, tensor in stored.items()})
    assert other.head.weight is other.embed.weight
    for name, tensor in module.state_dict().items():
        assert other.state_dict()[name].equal(tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "names .*norm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "names .*extra"),
        (lambda t: t.update({"norm.weight": torch.zeros(5)}), r"norm.weight has shape \(5,\).*\(4,\)"),
    ],
)
def test_weights_of_another_model_are_refused(change: object, message: str) -> None:
    tensors = dict(weight_tensors(Tied()))
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_weight_tensors(Tied(), tensors)


@pytest.mark.parametrize("fused", [True, False])
def test_restored_optimizer_goes_on_bit_identically(tmp_path: Path, fused: bool) -> None:
    ids = torch.tensor([1, 2, 3, 3, 6])

    def fresh() -> tuple[Tied, torch.optim.AdamW]:
        torch.manual_seed(1)
        module = Tied()
        decayed = [p for p in module.parameters() if p.ndim >= 2]
        plain = [p for p in module.parameters() if p.ndim < 2]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "part": "llm", "peak_lr": 0.1}]
        return module, torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5, fused=fused)

    def steps(module: Tied, optimizer: torch.optim.AdamW, n: int) -> None:
        for _ in range(n):
            module(ids).backward()
            optimizer.step()
            optimizer.zero_grad()

    module, optimizer = fresh()
    steps(module, optimizer, 3)
    save_checkpoint(
        tmp_path, 3, {"weights": weight_tensors(module), "optimizer": optimizer_tensors(optimizer)}, {}, keep=1
    )
    steps(module, optimizer, 3)

    tensors, _ = load_checkpoint(tmp_path / "step-00000003")
    other, restored = fresh()
    load_weight_tensors(other, tensors["weights"])
    load_optimizer_tensors(restored, tensors["optimizer"])
    assert restored.param_groups[1]["part"] == "llm"
    steps(other, restored, 3)
    for name, value in module.state_dict().items():
        assert other.state_dict()[name].equal(value), name


def test_restored_random_numbers_go_on_as_before(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.rand(7)
    save_checkpoint(tmp_path, 1, {"rng": rng_tensors()}, {}, keep=1)
    expected = torch.rand(9), torch.nn.functional.dropout(torch.ones(50))
    torch.manual_seed(99)
    load_rng_tensors(load_checkpoint(tmp_path / "step-00000001")[0]["rng"])
    assert torch.rand(9).equal(expected[0])
    assert torch.nn.functional.dropout(torch.ones(50)).equal(expected[1])
