"""What `foveate eval --task` names: which function measures it, and which options it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # nothing heavy, so that a wrong option is told at once
    from rich.console import Console

    from ..vlm.cache.parse import KVSpec
    from ..vlm.model import FoveateForConditionalGeneration
    from ..vlm.parallel.topology import Topology
    from ..vlm.processor import FoveateProcessor

LMMS = "lmms:"  # before the name of a task of lmms-eval
# Task → questions where none are said: of haystack a cell, of shots of each number of shots.
QUESTIONS = {"glyphs": 500, "rows": 500, "needles": 500, "haystack": 20, "shots": 500, "text": 1000}
# Options that only some tasks take.
OPTIONS = {
    "frames": ("needles", "haystack", LMMS),
    "depths": ("haystack",),
    "needles": ("haystack",),
    "shots": ("shots",),
    "ways": ("shots",),
    "batch": (LMMS,),
    "max-visual-tokens": (LMMS,),
    "prune": ("glyphs", "rows", "needles", "haystack", "shots", LMMS),
    "kv": ("glyphs", "rows", "needles", "haystack", "shots", LMMS),
}


def check_task(tasks: Sequence[str], **options: Any) -> str:
    """The one task that is named, or `LMMS` where all are lmms-eval's.

    Args:
        options: values of `OPTIONS`, with underscores; None and empty where not given.

    Raises:
        ValueError: no such task, several of ours, or an option that it does not take.
    """
    kinds = {LMMS if task.startswith(LMMS) and task != LMMS else task for task in tasks}
    accepted = f"{', '.join(QUESTIONS)} or {LMMS}NAME"
    if unknown := sorted(kinds - {*QUESTIONS, LMMS} | kinds & {LMMS} & set(tasks)):
        raise ValueError(f"--task {unknown[0]}; accepted: {accepted}")
    if len(tasks) > 1 and kinds != {LMMS}:
        raise ValueError(f"--task {' --task '.join(tasks)}; accepted: one, or several {LMMS}NAME")
    kind = kinds.pop()
    for option, takers in OPTIONS.items():
        given = options.get(option.replace("-", "_"))
        if given not in (None, [], ()) and kind not in takers:
            raise ValueError(
                f"--{option} with --task {tasks[0]}; accepted: --task "
                + " or ".join(f"{taker}NAME" if taker == LMMS else taker for taker in takers)
            )
    if kind == "needles" and len(options.get("frames") or ()) > 1:
        raise ValueError("several --frames with --task needles; accepted: one, or --task haystack")
    if kind == LMMS and len(options.get("frames") or ()) > 1:
        raise ValueError(f"several --frames with --task {tasks[0]}; accepted: one")
    return kind


def run_task(
    task: str,
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    out: Path | None,
    n: int | None,
    split: str,
    console: Console,
    methods: Sequence[Any],
    kv: KVSpec | None,
    topology: Topology,
    *,
    frames: Sequence[int] = (),
    **grid: Any,
) -> None:
    """Measures a task of ours and prints it; in `out` it is written.

    Args:
        task: what `check_task` gives.
        n: questions; None: as `QUESTIONS` says.
        frames: of clips.
        **grid: `depths`, `needles`, `shots` and `ways`, where given; see `evaluate_haystack` and `evaluate_shots`.
    """
    n = n or QUESTIONS[task]
    given: dict[str, Any] = {name: value for name, value in grid.items() if value}
    if task == "text":
        from .text import evaluate_text

        evaluate_text(model, processor, out, n, split, console, topology)
        return
    asked: dict[str, Any] = {"out": out, "n": n, "split": split, "console": console, "topology": topology}
    asked |= {"methods": methods, "kv": kv}
    if task == "needles":
        from .needle import evaluate_needles

        evaluate_needles(model, processor, **asked, frames=frames[0] if frames else 64)
    elif task == "haystack":
        from .haystack import FRAMES, evaluate_haystack

        evaluate_haystack(model, processor, **asked, frames=frames or FRAMES, **given)
    elif task == "shots":
        from .shots import evaluate_shots

        evaluate_shots(model, processor, **asked, **given)
    elif task == "rows":
        from .rows import evaluate_rows

        evaluate_rows(model, processor, **asked)
    else:
        from .report import evaluate_and_report

        evaluate_and_report(model, processor, **asked)
