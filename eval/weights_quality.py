"""What quantised weights cost: answers, perplexity, divergence, bytes in memory and on disk (docs/kv.md)."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..vlm.chat import load_model
from ..vlm.checkpoints import load
from ..vlm.export import export
from ..vlm.quantised_weights import SCHEMES, parse_scheme, quantise, weight_bytes
from .facts import result
from .kv_quality import Read, Task, batches, log_probabilities, loss_interval, random_prompts, read_task


@dataclass(frozen=True)
class Weights:
    """How a model's weights are kept, as `parse_scheme` reads it; empty where they stay."""

    llm: str = ""
    tower: str = ""

    @property
    def name(self) -> str:
        return " + ".join(filter(None, (self.llm, self.tower and f"tower {self.tower}"))) or "floating point"


FULL = Weights()
WEIGHTS = (
    FULL,
    Weights("w8a8"),
    Weights("w4a16:group=32"),
    Weights("w4a16"),
    Weights("w4a8"),
    Weights("", "w8a8"),
    *(Weights(scheme, "w8a8") for scheme in SCHEMES),
)


@dataclass(frozen=True)
class Measured:
    """A model with its weights kept so.

    Attributes:
        read: of each task.
        kl: nats a token to the model in floating point, on random prompts.
        memory: bytes of all weights.
        disk: bytes of the exported safetensors.
    """

    weights: Weights
    read: tuple[Read, ...]
    kl: float
    memory: int
    disk: int


def measure(folder: Path, weights: Weights, tasks: Sequence[Task], split: str) -> Measured:
    """Exports a model with its weights kept so, loads what was written on a CPU, and asks it.

    Args:
        folder: of a model in floating point.
        split: whose digit images are shown.
    """
    original, _ = load_model(folder, device="cpu")
    prompts = random_prompts(original)
    full = log_probabilities(original, prompts)
    with tempfile.TemporaryDirectory() as written:
        unquantised, processor = load(folder)
        if weights != FULL:
            llm, tower = (parse_scheme(text) if text else None for text in (weights.llm, weights.tower))
            quantise(unquantised, llm, tower)
        export(unquantised, processor, written)
        disk = sum(file.stat().st_size for file in Path(written).glob("*.safetensors"))
        model, processor = load_model(written, device="cpu")
    read = tuple(read_task(model, task.name, batches(model, processor, task, split)) for task in tasks)
    kl = (full.exp() * (full - log_probabilities(model, prompts))).sum(-1).mean().item()
    return Measured(weights, read, max(kl, 0.0), weight_bytes(model), disk)


def as_json(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One entry for each of the ways; see `facts.result`."""
    full = next(one for one in measured if one.weights == FULL)
    entries = []
    for one in measured:
        n, tokens = sum(sum(read.questions) for read in one.read), sum(read.tokens for read in one.read)
        loss = loss_interval(one.read, full.read)
        nll = sum(read.nll for read in one.read)
        results = [
            result("accuracy", sum(sum(read.right) for read in one.read) / n, "fraction", n),
            result("difference", loss[0], "fraction", n, low=loss[1], high=loss[2], baseline=FULL.name),
            result("perplexity", float(np.exp(nll / tokens)), "", tokens),
            result("KL on random prompts", one.kl, "nats a token", 1),
            result("memory", one.memory, "bytes", 1, baseline=FULL.name, ratio=one.memory / full.memory),
            result("disk", one.disk, "bytes", 1, baseline=FULL.name, ratio=one.disk / full.disk),
        ]
        entries.append(
            {"setting": one.weights.name, "weights": one.weights.llm, "tower": one.weights.tower, "results": results}
        )
    return entries


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each of the ways."""
    lines = [
        "| LLM | tower | memory | disk | accuracy | points against floating point | perplexity | KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        found = {one["name"]: one for one in entry["results"]}
        loss = found["difference"]
        cells = [
            entry["weights"] or "as it is",
            entry["tower"] or "as it is",
            *(f"{found[name]['value'] / 1e6:.2f} MB ({found[name]['ratio']:.2f})" for name in ("memory", "disk")),
            f"{found['accuracy']['value']:.3f}",
            f"{100 * loss['value']:+.1f} [{100 * loss['low']:+.1f}, {100 * loss['high']:+.1f}]",
            f"{found['perplexity']['value']:.3f}",
            f"{found['KL on random prompts']['value']:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
