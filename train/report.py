"""A training run as one HTML page: its metrics in pictures, its stages, the documents it refused and its recipe."""

import html
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

from ..eval.report import html_page, html_table, image_tag, png
from .checkpoint import is_whole, read_state
from .loop import FINISHED
from .tracking import read_lines, read_metrics

LISTED_AT_MOST = 50  # refused documents
GIGABYTE = 1e9
Line = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One diagram over the steps: label → metric. Metrics that no line has are left out."""

    title: str
    series: dict[str, str]
    scale: Literal["linear", "log"] = "linear"
    unit: float = 1.0  # what values are divided by
    dots: tuple[str, ...] = ()  # labels drawn as points: what is measured now and then


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes the page of a run, which may still be going on or have been killed.

    Args:
        run: folder of the run; `metrics.jsonl` has to be there.
        out: the page to write; `report.html` in the run's folder when None.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: there is no `metrics.jsonl`.
        ValueError: it has no line yet.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run}: no metrics.jsonl there; accepted: the folder of a training run")
    lines = read_metrics(run)
    if not lines:
        raise ValueError(f"{path}: no line yet; accepted: a run that has logged once")
    state = _newest_state(run)
    recipe = state.get("recipe", {})
    name = recipe.get("name", run.resolve().name)
    page = html_page(
        f"Training: {name}",
        {"run": str(run.resolve()), "last step": lines[-1]["step"], "written": f"{datetime.now():%Y-%m-%d %H:%M}"},
        [
            ("Stages", _status(run, lines) + _stages(run, lines, state)),
            *((title, image_tag(picture)) for title, picture in _pictures(lines)),
            ("Documents that could not be used", _refused(run)),
            ("Recipe", _recipe(recipe)),
        ],
    )
    target = out or run / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _newest_state(run: Path) -> dict[str, Any]:
    """What the newest checkpoint knows; empty where there is none. Checkpoints may be removed meanwhile."""
    for path in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        if is_whole(path, hashes=False):
            try:
                return read_state(path)
            except OSError:
                continue
    return {}


def _status(run: Path, lines: Sequence[Line]) -> str:
    last, path = lines[-1], run / "metrics.jsonl"
    when = f"{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"
    what = "Finished" if (run / FINISHED).is_file() else "Not finished: going on, or stopped"
    text = f"{what}. The last line of metrics.jsonl is of step {last['step']}, stage {last['stage']}, {when}."
    return f"<p>{html.escape(text)}</p>"


def _stages(run: Path, lines: Sequence[Line], state: dict[str, Any]) -> str:
    """What each stage took and where its loss came to; what a checkpoint tells is as old as it."""
    finished = run / FINISHED
    summaries = json.loads(finished.read_text()) if finished.is_file() else state.get("summaries", [])
    taken = {summary["name"]: summary for summary in summaries}
    plans = {stage["name"]: stage for stage in state.get("recipe", {}).get("stages", [])}
    rows = []
    for name in dict.fromkeys([*plans, *(line["stage"] for line in lines)]):
        own = [line for line in lines if line["stage"] == name]
        plan, summary = plans.get(name, {}), taken.get(name, {})
        length = plan.get("steps") or (f"{plan['epochs']} epochs" if plan.get("epochs") else "?")
        rows.append(
            (
                name,
                ", ".join(plan.get("learning_rates", {})),
                f"{summary.get('steps', 0)} of {length}",
                f"{summary.get('tokens', 0):,}",
                f"{summary.get('seconds', 0.0):,.1f}",
                _number(_last(own, "loss")),
                _number(_last(own, "validation_loss")),
            )
        )
    table = html_table(("stage", "trains", "steps", "tokens", "seconds", "last loss", "validation loss"), rows)
    if not summaries:
        return table + "<p>Steps, tokens and seconds come with the first checkpoint.</p>"
    if not finished.is_file():
        return table + f"<p>Steps, tokens and seconds are those of the checkpoint at step {state['step']:,}.</p>"
    return table


def _last(lines: Sequence[Line], metric: str) -> float | None:
    return next((line[metric] for line in reversed(lines) if line.get(metric) is not None), None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _pictures(lines: Sequence[Line]) -> Iterator[tuple[str, bytes]]:
    """(heading, PNG) of each group of diagrams that has anything to show."""
    names = {name for line in lines for name in line}

    def having(prefix: str) -> dict[str, str]:
        return {name.removeprefix(prefix): name for name in sorted(names) if name.startswith(prefix)}

    groups = {
        "Loss": (
            Panel("loss", {"training": "loss", "validation": "validation_loss"}, "log", dots=("validation",)),
            Panel("accuracy of generated answers", having("accuracy_")),
        ),
        "Learning rates and gradients": (
            Panel("learning rate", having("lr_"), "log"),
            Panel("gradient norm before clipping", {"all": "grad_norm"} | having("grad_norm_"), "log"),
        ),
        "Speed": (
            Panel("tokens a second", {"": "tokens_per_s"}),
            Panel("samples a second", {"": "samples_per_s"}),
            Panel("seconds a step", {"": "step_s"}, "log"),
            Panel("MFU", {"": "mfu"}),
        ),
        "Where time and memory go": (
            Panel("waiting for data, of the time", {"": "data_wait"}),
            Panel("costliest process, of the mean", {"": "imbalance"}),
            Panel("padding, of the positions", {"": "packing_waste"}),
            Panel("memory of the first process, GB", {"": "memory_bytes"}, unit=GIGABYTE),
        ),
    }
    for heading, panels in groups.items():
        shown = [panel for panel in panels if names & set(panel.series.values())]
        if shown:
            yield heading, _picture(lines, shown)


def _picture(lines: Sequence[Line], panels: Sequence[Panel]) -> bytes:
    """Diagrams two in a row, the steps where stages begin marked."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(11, 3.1 * rows), squeeze=False, layout="constrained")
    begins: dict[str, int] = {}
    for line in lines:
        begins.setdefault(line["stage"], line["step"])
    for axes, panel in zip(grid.flat, panels, strict=False):
        drawn = [
            values for label, metric in panel.series.items() if (values := _draw(axes, lines, panel, label, metric))
        ]
        axes.set_title(panel.title, fontsize=9, loc="left", pad=16)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if panel.scale == "log" and drawn and all(value > 0 for values in drawn for value in values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            within_a_decade = max(map(max, drawn)) < 10 * min(map(min, drawn))
            axes.yaxis.set_minor_formatter("{x:g}" if within_a_decade else NullFormatter())
            axes.tick_params(which="minor", labelsize=7)
        elif not any(value < 0 for values in drawn for value in values):
            axes.set_ylim(bottom=0)
        for stage, step in begins.items():
            axes.axvline(step, color="0.75", linewidth=0.8, zorder=0)
            axes.annotate(stage, (step, 1.01), xycoords=("data", "axes fraction"), fontsize=7, color="0.4")
        if any(panel.series):
            axes.legend(fontsize=7)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    return png(figure)


def _draw(axes: Any, lines: Sequence[Line], panel: Panel, label: str, metric: str) -> list[float]:
    """Draws a metric where lines have it; a gap where a stage does not. Returns the values."""
    having = [line for line in lines if line.get(metric) is not None]
    values = [line[metric] / panel.unit for line in having]
    if label in panel.dots:
        axes.plot([line["step"] for line in having], values, "o", markersize=3.5, label=label)
        return values
    colour = None
    for stage in dict.fromkeys(line["stage"] for line in having):
        own = [(line["step"], line[metric] / panel.unit) for line in having if line["stage"] == stage]
        (curve,) = axes.plot(*zip(*own, strict=True), linewidth=1.2, color=colour, label=None if colour else label)
        if len(own) == 1:
            curve.set_marker(".")
        colour = curve.get_color()
    return values


def _refused(run: Path) -> str:
    """How many documents were refused for which reason, and the first of them."""
    refused = read_lines(run, "bad_documents")
    if not refused:
        return "<p>None.</p>"
    counts = html_table(("reason", "documents"), Counter(line["reason"] for line in refused).most_common())
    rows = [(line["step"], line["reason"], line["key"], line["message"]) for line in refused[:LISTED_AT_MOST]]
    more = len(refused) - len(rows)
    note = f"<p>and {more:,} more, in bad_documents.jsonl</p>" if more else ""
    return counts + "<br>" + html_table(("step", "reason", "key", "what is wrong"), rows) + note


def _recipe(recipe: dict[str, Any]) -> str:
    if not recipe:
        return "<p>It comes with the first checkpoint.</p>"
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=90, default_flow_style=None)
    return f"<pre>{html.escape(text)}</pre>"
