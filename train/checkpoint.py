"""Checkpoints: whole or not at all, without pickle, of any number of processes for any number of them.

A checkpoint is a directory `step-00000120` of safetensors and JSON files. It is written aside under another name, each
file flushed to disk, `manifest.json` (size and SHA-256 of every file) last, and then renamed: a directory without a
manifest that fits is never loaded. Each process writes whole tensors of its share, `state-00001-of-00004.safetensors`,
so what is read does not depend on how many wrote it, or under which engine.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, or none that is whole is there."""


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, in a thread unless told otherwise.

    Args:
        folder: of the run's checkpoints, the same one for all processes.
        keep: how many of the newest stay.
        keep_best: whether the one of lowest `validation_loss` stays too.
        asynchronous: `save` returns when the tensors are handed over; they must not change afterwards.
        rank, ranks: this process, and how many there are.
        gather: all-gather of an object over the processes, used by nothing else meanwhile.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_best: bool = False,
        asynchronous: bool = False,
        rank: int = 0,
        ranks: int = 1,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
    ):
        self.folder, self.keep, self.keep_best, self.asynchronous = folder, keep, keep_best, asynchronous
        self.rank, self.ranks, self.gather = rank, ranks, gather
        self.thread: threading.Thread | None = None
        self.error: CheckpointError | None = None

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict) -> None:
        """Writes `step-<step>`, then removes what need not be kept.

        Later steps are removed too: a resumed run comes to an earlier one only if they were not whole.

        Args:
            tensors: this process's share, on the CPU.
            state: what JSON can hold: positions, counters; of rank 0.

        Raises:
            CheckpointError: this one, or the one before where that was written meanwhile, can't be written; earlier
                ones are untouched.
        """
        self.wait()
        if not self.asynchronous:
            self._write(step, tensors, state)
            return self.wait()
        self.thread = threading.Thread(target=self._write, args=(step, tensors, state), name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Returns when what was saved last is on disk; raises CheckpointError where it could not be written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        if failure is None:
            self.wait()
        elif self.thread is not None:  # what stopped the run is the error to show; it may wait for ranks that are gone
            self.thread.join(timeout=60)

    def _write(self, step: int, tensors: dict[str, torch.Tensor], state: dict) -> None:
        target = self.folder / f"step-{step:08d}"
        aside = self.folder / f".writing-{target.name}"
        try:
            self._together(lambda: self._prepare(aside))
            name = f"state-{self.rank:05d}-of-{self.ranks:05d}.safetensors"
            entries = self._together(lambda: self._write_share(aside / name, tensors))
            self._together(lambda: self._commit(aside, target, dict(entries), state))
        except (OSError, SafetensorError) as error:
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            self.error = CheckpointError(f"{target}: can't be written: {error}; earlier checkpoints are untouched")

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """What each process's work gave; an OSError on all of them where one had one."""
        result, problem = None, None
        try:
            result = work()
        except (OSError, SafetensorError) as error:
            problem = str(error)
        told = self.gather((result, problem))
        problems = [text for _, text in told if text]
        if problems:
            raise OSError(problems[0])
        return [value for value, _ in told]

    def _prepare(self, aside: Path) -> None:
        if self.rank == 0:
            for left in self.folder.glob(".writing-*"):
                shutil.rmtree(left)
            aside.mkdir(parents=True)

    def _write_share(self, path: Path, tensors: dict[str, torch.Tensor]) -> tuple[str, dict]:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return _written(path)

    def _commit(self, aside: Path, target: Path, entries: dict[str, dict], state: dict) -> None:
        if self.rank:
            return
        (aside / "state.json").write_text(json.dumps(state))
        entries |= dict([_written(aside / "state.json")])
        (aside / "manifest.json").write_text(json.dumps(entries, indent=1))
        for path in (aside / "manifest.json", aside):
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        _flush(self.folder)
        self._prune(target)

    def _prune(self, newest: Path) -> None:
        earlier = [path for path in _steps(self.folder) if path.name <= newest.name]
        kept = set(earlier[-self.keep :])
        if self.keep_best:
            losses = {path: read_state(path).get("validation_loss") for path in earlier if is_whole(path, hashes=False)}
            measured = {path: loss for path, loss in losses.items() if loss is not None}
            if measured:
                kept.add(min(measured, key=lambda path: measured[path]))
        for path in _steps(self.folder):
            if path not in kept:
                shutil.rmtree(path)


class CheckpointTensors(Mapping[str, torch.Tensor]):
    """All processes' tensors of a checkpoint by name, each read when it is asked for. Use it in a `with`."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Self:
        self.stack = ExitStack()
        self.files: dict[str, Any] = {}
        manifest = json.loads((self.path / "manifest.json").read_text())
        for name in sorted(name for name in manifest if name.endswith(".safetensors")):
            opened = self.stack.enter_context(safe_open(self.path / name, framework="pt"))
            self.files |= dict.fromkeys(opened.keys(), opened)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def of_engine(self) -> "CheckpointTensors":
        """Those of an engine's state."""
        chosen = CheckpointTensors(self.path)
        kinds = ("weight/", "optimizer/", "buffer/")
        chosen.files = {name: file for name, file in self.files.items() if name.startswith(kinds)}
        return chosen

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as its manifest says, or None."""
    return next((path for path in reversed(_steps(folder)) if is_whole(path)), None)


def read_state(path: Path) -> dict:
    """A checkpoint's `state.json`."""
    return json.loads((path / "state.json").read_text())


def is_whole(path: Path, hashes: bool = True) -> bool:
    """Whether all files that the manifest lists are there, with its sizes and, unless told otherwise, hashes."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return "state.json" in manifest and all(
            (path / name).stat().st_size == entry["bytes"] and (not hashes or _sha256(path / name) == entry["sha256"])
            for name, entry in manifest.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def rng_tensors(rank: int) -> dict[str, torch.Tensor]:
    """The states of torch's random number generators (dropout draws from them)."""
    states = {f"rng/cpu/{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"rng/cuda/{rank}"] = torch.cuda.get_rng_state()
    return states


def load_rng_tensors(tensors: Mapping[str, torch.Tensor], rank: int) -> None:
    """Sets the generators to what `rng_tensors` saved; on more ranks than then, the new ones keep their own."""
    if f"rng/cpu/{rank}" in tensors:
        torch.set_rng_state(tensors[f"rng/cpu/{rank}"])
    if f"rng/cuda/{rank}" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"rng/cuda/{rank}"])


def _written(path: Path) -> tuple[str, dict]:
    """A file's entry in the manifest, once it is on disk."""
    _flush(path)
    return path.name, {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _steps(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
