"""Metrics: always to `metrics.jsonl`, and to Weights & Biases, offline unless the recipe says otherwise."""

import json
from pathlib import Path
from typing import Any, Self

import wandb

from .recipe import Recipe


class Tracker:
    """Writes one JSON object a line, and the same to wandb.

    Args:
        folder: of the run; `metrics.jsonl` and `wandb/` are written there.
        recipe: its tracking settings, and the configuration that wandb shows.
        resume_step: lines after this step, of steps that a resumed run does again, are dropped.
    """

    def __init__(self, folder: Path, recipe: Recipe, resume_step: int = 0):
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= resume_step]
        aside = path.with_suffix(".writing")  # so that a kill here loses no line
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(path)
        self.file = path.open("a", buffering=1)
        self.run: wandb.Run | None = None
        if recipe.tracking.wandb != "disabled":
            self.run = wandb.init(
                project=recipe.tracking.project,
                name=recipe.name,
                dir=folder,
                mode=recipe.tracking.wandb,
                config=recipe.model_dump(),
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )

    def log(self, metrics: dict[str, Any]) -> None:
        """Writes one line; `step` is among the metrics."""
        self.file.write(json.dumps(metrics) + "\n")
        if self.run:
            self.run.log(metrics, step=metrics["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        self.file.close()
        if self.run:
            self.run.finish(exit_code=1 if failure else 0)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last line cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
