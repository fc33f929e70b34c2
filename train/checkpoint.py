"""Checkpoints: whole or not at all, without pickle.

A checkpoint is a directory `step-00000120` of safetensors and JSON files. It is written aside under another name, each
file flushed to disk, `manifest.json` (size and SHA-256 of every file) last, and then renamed: a directory without a
manifest that fits is never loaded.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, or none that is whole is there."""


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict, keep: int
) -> Path:
    """Writes `step-<step>` in `folder`, then removes all but the newest `keep`.

    Later steps are removed too: a resumed run comes to an earlier one only if they were not whole.

    Args:
        tensors: file stem to its tensors (`weights`, `optimizer`, …).
        state: what JSON can hold: positions, counters.

    Raises:
        CheckpointError: it can't be written; earlier checkpoints are untouched.
    """
    target = folder / f"step-{step:08d}"
    aside = folder / f".writing-{target.name}"
    try:
        for left in folder.glob(".writing-*"):
            shutil.rmtree(left)
        aside.mkdir(parents=True)
        for stem, named in tensors.items():
            save_file(
                {k: v.detach().cpu().contiguous().clone() for k, v in named.items()}, aside / f"{stem}.safetensors"
            )
        (aside / "state.json").write_text(json.dumps(state))
        files = sorted(aside.iterdir())
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*aside.iterdir(), aside]:
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{target}: can't be written: {error}; earlier checkpoints are untouched") from error
    kept = [path for path in _steps(folder) if path.name <= target.name][-keep:]
    for path in _steps(folder):
        if path not in kept:
            shutil.rmtree(path)
    return target


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as its manifest says, or None."""
    return next((path for path in reversed(_steps(folder)) if _is_whole(path)), None)


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """Reads (tensors by file stem, state).

    Raises:
        CheckpointError: a file is missing or differs from the manifest.
    """
    if not _is_whole(path):
        raise CheckpointError(f"{path}: not whole (a file is missing or differs from manifest.json)")
    files = [path / name for name in json.loads((path / "manifest.json").read_text())]
    tensors = {file.stem: load_file(file) for file in files if file.suffix == ".safetensors"}
    return tensors, json.loads((path / "state.json").read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state as named tensors, `<parameter number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{n}.{name}": value for n, values in state.items() for name, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rng_tensors() -> dict[str, torch.Tensor]:
    """The states of torch's random number generators (dropout draws from them)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def load_rng_tensors(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def weight_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state, tied weights once."""
    seen: set[int] = set()
    weights = {}
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            weights[name] = tensor
            seen.add(tensor.data_ptr())
    return weights


def load_weight_tensors(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Raises CheckpointError where names or shapes are not the module's."""
    own = weight_tensors(module)
    if set(own) != set(tensors):
        odd = sorted(set(own) ^ set(tensors))
        raise CheckpointError(f"the weights' names are not this model's: {', '.join(odd[:5])}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}; this model's has {tuple(own[name].shape)}")
        own[name].copy_(tensor)


def _steps(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def _is_whole(path: Path) -> bool:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return "state.json" in manifest and all(
            (path / name).stat().st_size == entry["bytes"] and _sha256(path / name) == entry["sha256"]
            for name, entry in manifest.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
