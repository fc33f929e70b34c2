"""Metrics: always to `metrics.jsonl`, and to Weights & Biases, offline unless the recipe says otherwise."""

import json
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TextIO

import wandb

from ..data.loader import Step
from .recipe import Recipe


class Tracker:
    """Writes one JSON object a line to `metrics.jsonl`, and the same to wandb.

    Besides: documents that can't be used to `bad_documents.jsonl`, and where the recipe says so each step's documents
    to `documents.jsonl`.

    Args:
        folder: of the run; the files and `wandb/` are written there.
        recipe: its tracking settings, and the configuration that wandb shows.
        resume_step: lines after this step, of steps that a resumed run does again, are dropped.
        active: False writes nothing: of several processes one writes.
    """

    def __init__(self, folder: Path, recipe: Recipe, resume_step: int = 0, active: bool = True):
        self.files: dict[str, TextIO] = {}
        self.folder, self.resume_step, self.active = folder, resume_step, active
        self.run: wandb.Run | None = None
        if not active:
            return
        for name in ("metrics", *(file for file in ("documents", "bad_documents") if read_lines(folder, file))):
            self._open(name)
        if recipe.tracking.wandb != "disabled":
            self.run = wandb.init(
                project=recipe.tracking.project,
                name=recipe.name,
                id=_run_id(folder),
                resume="allow",
                dir=folder,
                mode=recipe.tracking.wandb,
                config=recipe.model_dump(),
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )

    def log(self, metrics: dict[str, Any]) -> None:
        """Writes one line; `step` is among the metrics."""
        self._write("metrics", metrics)
        with self._wandb_may_fail():
            if self.run:
                self.run.log(metrics, step=metrics["step"])

    def documents(self, step: int, batch: Step) -> None:
        """Writes the step's documents, and those that could not be used."""
        if batch.keys is not None:
            self._write("documents", {"step": step, "keys": batch.keys})
        for bad in batch.bad:
            self._write("bad_documents", {"step": step} | asdict(bad))

    def _write(self, name: str, line: dict[str, Any]) -> None:
        if not self.active:
            return
        if name not in self.files:
            self._open(name)
        self.files[name].write(json.dumps(line) + "\n")

    def _open(self, name: str) -> None:
        path = self.folder / f"{name}.jsonl"
        kept = [line for line in read_lines(self.folder, name) if line["step"] <= self.resume_step]
        aside = path.with_suffix(".writing")  # so that a kill here loses no line
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(path)
        self.files[name] = path.open("a", buffering=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        for file in self.files.values():
            file.close()
        with self._wandb_may_fail():
            if self.run:
                self.run.finish(exit_code=1 if failure else 0)

    @contextmanager
    def _wandb_may_fail(self) -> Iterator[None]:
        """wandb's own process can be ended by a signal to all; that must not end a run, which has its lines anyway."""
        try:
            yield
        except (wandb.Error, OSError) as error:
            warnings.warn(f"wandb is gone ({error}); metrics go to metrics.jsonl alone", stacklevel=3)
            self.run = None


def _run_id(folder: Path) -> str:
    """wandb's name of the run, the same when it is resumed."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return read_lines(folder, "metrics")


def read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a run's `<name>.jsonl`; a last line cut short by a kill is left out."""
    path = folder / f"{name}.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
