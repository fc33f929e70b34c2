"""Results as JSON, and as one HTML page with curves, accuracies and examples."""

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.status import Status
from rich.table import Table

from ..vlm.cache.parse import KVSpec, kv_text
from ..vlm.media import load_video
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.parallel.topology import Topology
from ..vlm.processor import FoveateProcessor
from ..vlm.pruning import Reduction, method_text
from ..vlm.pruning.report import mean_visual_tokens
from .facts import run_facts
from .glyphs import TASKS, Item, TaskResult, answer, evaluate, task_items
from .sharing import ALONE, of_all_groups

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def evaluate_tasks(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    n: int,
    split: str,
    console: Console,
    reduction: Reduction | None = None,
    topology: Topology = ALONE,
) -> dict[str, TaskResult]:
    """Every task of the embedded data, printed as it is measured.

    Args:
        reduction: within which it is called, and that tells how many visual tokens are processed.
        topology: of the ranks, all of which call it.
    """
    results = {}
    for task in TASKS:
        done_before = len(reduction.prefills) if reduction else 0
        with console.status(task) as status:

            def show(done: int, task: str = task, status: Status = status) -> None:
                status.update(f"{task}: {done} of {n} questions")

            results[task] = evaluate(model, processor, task, n, split, after_batch=show, topology=topology)
        r = results[task]
        processed = ""
        if reduction and reduction.methods:
            done = of_all_groups(reduction.prefills[done_before:], topology)
            prefills = [prefill for of_group in done for prefill in of_group]
            r.visual_tokens, r.processed_visual_tokens = mean_visual_tokens(prefills)
            processed = f"  visual tokens {r.processed_visual_tokens:.1f} of {r.visual_tokens:.1f}"
        console.print(
            f"{task:>14}  {r.accuracy:.3f}  [{r.low:.3f}, {r.high:.3f}]  n={r.n}  "
            f"chance {r.chance:.3f}  majority {r.majority:.3f}{processed}",
            soft_wrap=True,
        )
    return results


def evaluate_and_report(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    out: Path | None,
    n: int,
    split: str,
    console: Console,
    methods: Sequence[Any] = (),
    kv: KVSpec | None = None,
    topology: Topology = ALONE,
) -> dict[str, TaskResult]:
    """`evaluate_tasks`, then `metrics.json` and `report.html` in `out`.

    Args:
        methods: that drop visual tokens meanwhile; see `foveate.reduce`.
        kv: how keys and values are kept meanwhile; likewise.
        topology: of the ranks, all of which call it; the first one writes.
    """
    reduction = Reduction(model, methods, kv) if methods or kv else None
    with reduction or nullcontext():
        results = evaluate_tasks(model, processor, n, split, console, reduction, topology)
        if out is not None:
            examples = example_items(split)
            answers = answer_each(model, processor, examples)
    if out is not None and topology.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        options, told = options_of(methods, kv, topology)
        facts = run_facts(f"foveate eval --task glyphs --n {n} --split {split}{options}") | told
        tasks = {task: result.summary() for task, result in results.items()}
        (out / "metrics.json").write_text(json.dumps(facts | {"tasks": tasks}, indent=1))
        picture = examples_picture(examples, answers)
        page = html_page("Evaluation", facts, [accuracy_table(results), ("Examples", image_tag(picture))])
        (out / "report.html").write_text(page)
        console.print(f"report in {out / 'report.html'}")
    return results


def options_of(methods: Sequence[Any], kv: KVSpec | None, topology: Topology = ALONE) -> tuple[str, dict[str, Any]]:
    """What was asked for, as options of the command, and as fields of `metrics.json`."""
    prune = [method_text(method) for method in methods]
    options = "".join(f" --prune {text}" for text in prune) + (f" --kv {kv_text(kv)}" if kv else "")
    told: dict[str, Any] = ({"prune": prune} if prune else {}) | ({"kv": kv_text(kv)} if kv else {})
    if topology.size > 1:
        options += f" --ulysses {topology.ulysses} --ring {topology.ring}"
        told["parallel"] = {"ulysses": topology.ulysses, "ring": topology.ring, "processes": topology.size}
    return options, told


def example_items(split: str) -> list[Item]:
    """One question of each task, the first ones of another seed than the measured ones."""
    return [next(task_items(task, 1, split, seed=1)) for task in TASKS]


def answer_each(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, items: Iterable[Item]
) -> list[str]:
    return [answer(model, processor, [item])[0] for item in items]


def examples_picture(items: Sequence[Item], answers: Sequence[str]) -> bytes:
    """A PNG with each item's picture or some of its frames, its question, answer and truth: stills, then clips."""
    stills = [pair for pair in zip(items, answers, strict=True) if not isinstance(pair[0].media, bytes)]
    clips = [pair for pair in zip(items, answers, strict=True) if isinstance(pair[0].media, bytes)]
    figure = plt.figure(figsize=(11, 2.9 + 1.85 * len(clips)))
    rows = figure.add_gridspec(1 + len(clips), 1, height_ratios=[2.4] + [1.35] * len(clips), hspace=0.45)
    row = rows[0].subgridspec(1, max(4, len(stills)), wspace=0.12)
    for k, (item, said) in enumerate(stills):
        _show(figure.add_subplot(row[k]), item.media, "", f"{item.question.text}\n{_verdict(item, said)}", item, said)
    for r, (item, said) in enumerate(clips):
        frames, numbers = _shown_frames(item)
        row = rows[1 + r].subgridspec(1, 8, wspace=0.06)
        title = f"{item.question.text}  →  {_verdict(item, said)}"
        for k, (frame, number) in enumerate(zip(frames, numbers, strict=True)):
            caption = f"frame {number + 1} / {item.frames}"
            _show(figure.add_subplot(row[k]), frame, caption, "" if k else title, item, said)
    return png(figure)


def _verdict(item: Item, said: str) -> str:
    return said if said == item.question.answer else f"{said}  (truth: {item.question.answer})"


def _show(axes: Any, picture: Any, caption: str, title: str, item: Item, said: str) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_axis_off()
    axes.text(0.5, -0.05, caption, transform=axes.transAxes, ha="center", va="top", fontsize=7, color="0.4")
    colour = "#116611" if said == item.question.answer else "#aa1111"
    axes.text(0, 1.04, title, transform=axes.transAxes, fontsize=9, color=colour, ha="left", va="bottom")


def _shown_frames(item: Item) -> tuple[list[np.ndarray], list[int]]:
    """Up to eight frames of a clip, evenly spread, the one that shows the answer among them; and their numbers."""
    frames = load_video(item.media, num_frames=item.frames).frames
    numbers = np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int)
    numbers[np.abs(numbers - item.answer_frame).argmin()] = item.answer_frame
    return [frames[i] for i in numbers], numbers.tolist()


def loss_picture(metrics: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of the loss over steps, a colour a stage."""
    figure, axes = plt.subplots(figsize=(10, 3.2))
    for stage in dict.fromkeys(line["stage"] for line in metrics):
        lines = [line for line in metrics if line["stage"] == stage]
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=stage, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return png(figure)


def png(figure: Any) -> bytes:
    """A matplotlib figure as PNG; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def image_tag(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def html_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def accuracy_table(results: dict[str, TaskResult]) -> tuple[str, str]:
    header = ["task", "accuracy", "95 % interval", "n", "chance", "majority"]
    rows = [
        [task, f"{r.accuracy:.3f}", f"{r.low:.3f} – {r.high:.3f}", r.n, f"{r.chance:.3f}", f"{r.majority:.3f}"]
        for task, r in results.items()
    ]
    if any(r.processed_visual_tokens is not None for r in results.values()):
        header += ["visual tokens", "processed by a layer"]
        for row, r in zip(rows, results.values(), strict=True):
            row += [f"{r.visual_tokens:.1f}", f"{r.processed_visual_tokens:.1f}"]
    return "Accuracy of generated answers", html_table(header, rows)


def html_page(title: str, facts: dict[str, Any], sections: Iterable[tuple[str, str]]) -> str:
    """A page that stands alone: sections of (heading, HTML), and at its end what was run."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}}
img{{max-width:100%}}table{{border-collapse:collapse}}td,th{{border-bottom:1px solid #ddd;padding:.25em .8em}}
td,th{{text-align:left}}td{{font-variant-numeric:tabular-nums}}footer{{color:#777;font-size:12px;margin-top:3em}}</style>
<h1>{html.escape(title)}</h1>{body}<footer><pre>{html.escape(json.dumps(facts, indent=1))}</pre></footer></html>"""


def print_stages(stages: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table("stage", "seconds", "steps", "tokens")
    for stage in stages:
        table.add_row(stage["name"], f"{stage['seconds']:.1f}", str(stage["steps"]), f"{stage['tokens']:,}")
    console.print(table)
