"""The whole way on the embedded data: train, evaluate, export, reload with stock transformers, ask about an mp4."""

import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from ..data.glyphs import clip_colour_questions, digit_clip, encode_mp4
from ..eval import report
from ..vlm.chat import Chat, load_media, load_model
from ..vlm.export import export
from ..vlm.reload_check import __file__ as RELOAD_SCRIPT
from .checkpoint import newest_checkpoint
from .loop import train
from .recipe import Recipe, RecipeError, load_recipe
from .tracking import read_metrics

QUESTIONS = 500  # a task
MARK = ".quickstart"  # the file that says that a run in a folder is ours to replace


def run_quickstart(
    out: Path, console: Console, recipe: Recipe | None = None, questions: int = QUESTIONS
) -> dict[str, Any]:
    """Runs everything and returns what `out/metrics.json` holds.

    Writes to `out`: `metrics.json`, `report.html`, `examples.png`, `clip.mp4`, `ask.json`, `model/` (export with code),
    `stock/` (export as a stock architecture) and `train/` (the run: checkpoints, metrics). An unfinished run in `out`
    is gone on with, a finished one is replaced; a folder that holds anything else is refused.

    Args:
        out: folder.
        console: where progress is shown.
        recipe: another recipe than the shipped `quickstart`, of a model with the same tasks.
        questions: asked per task.

    Raises:
        RecipeError: `out` holds files that no quickstart wrote.
    """
    recipe = recipe or load_recipe("quickstart")
    began = time.perf_counter()
    resume = _prepare(out, console)
    console.rule(f"1 train: {len(recipe.stages)} stages")
    summaries = [asdict(summary) for summary in train(recipe, out / "train", resume=resume, console=console)]
    report.print_stages(summaries, console)

    console.rule("2 export, and reload without this package")
    model, processor = load_model(out / "train" / "model", device="cpu")
    formats: dict[str, Literal["code", "stock"]] = {"model": "code", "stock": "stock"}
    for name, format in formats.items():
        shutil.rmtree(out / name, ignore_errors=True)
        export(model, processor, out / name, format=format)
    clip_items = _write_clip(out / "clip.mp4")
    reloaded = _reload(out, [question for question, _ in clip_items])

    console.rule("3 ask about clip.mp4")
    model, processor = load_model(out / "model", device="cpu")
    asked = []
    for i, (question, truth) in enumerate(clip_items):
        media = load_media(out / "clip.mp4", None, processor)
        said = Chat(model, processor, [media]).ask(question).text
        asked.append(
            {"question": question, "answer": said, "truth": truth}
            | {f"answer_{name}": answers[i] for name, answers in reloaded.items()}
        )
        console.print(
            f'foveate ask {out / "model"} {out / "clip.mp4"} "{question}"  →  {said}  (truth: {truth})', soft_wrap=True
        )
    (out / "ask.json").write_text(json.dumps(asked, indent=1))

    console.rule(f"4 evaluate on held-out digits, {questions} questions a task")
    results = report.evaluate_tasks(model, processor, questions, "test", console)
    packed = [s for s, stage in zip(summaries, recipe.stages, strict=True) if stage.objective == "next_token"]
    metrics = report.run_facts("foveate quickstart") | {
        "training_seconds": sum(s["seconds"] for s in summaries),
        "stages": summaries,
        "packing_waste": 1 - sum(s["tokens"] for s in packed) / sum(s["positions"] for s in packed),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tasks": {task: result.summary() for task, result in results.items()},
        "total_seconds": time.perf_counter() - began,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    _write_report(out, model, processor, metrics, results, asked)
    console.print(f"{metrics['total_seconds']:.0f} s in all; report in {out / 'report.html'}")
    return metrics


def _prepare(out: Path, console: Console) -> bool:
    """Makes the folder ready; True where an unfinished run in it is to be gone on with."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / MARK).is_file():
        raise RecipeError(
            f"{out} holds files that no quickstart wrote; accepted: a new or empty folder, or such a run's"
        )
    if newest_checkpoint(out / "train" / "checkpoints") and not (out / "metrics.json").exists():
        console.print(f"going on with the unfinished run in {out}")
        return True
    if (out / MARK).exists():
        console.print(f"replacing the run in {out}")
        (out / "metrics.json").unlink(missing_ok=True)
        for name in ("train", "model", "stock"):
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text("A folder that foveate quickstart wrote, and may replace.\n")
    return False


def _write_clip(path: Path) -> list[tuple[str, str]]:
    """Writes a test clip with four digits of four colours; gives its questions and true answers."""
    clip = digit_clip(np.random.default_rng([2024, 1]), "test", frames=8, digits=4)
    path.write_bytes(encode_mp4(clip.frames, scale=16, fps=2))
    return [(question.text, question.answer) for question in clip_colour_questions(clip)]


def _reload(out: Path, questions: list[str]) -> dict[str, list[str]]:
    """Answers of both exports from a process in which this package can't be imported."""
    command = [
        sys.executable,
        "-I",
        RELOAD_SCRIPT,
        str(out / "model"),
        str(out / "stock"),
        str(out / "clip.mp4"),
        *questions,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise RuntimeError(f"the exports can't be reloaded: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _write_report(out: Path, model: Any, processor: Any, metrics: dict, results: dict, asked: list[dict]) -> None:
    items = report.example_items("test")
    picture = report.examples_picture(items, report.answer_each(model, processor, items))
    (out / "examples.png").write_bytes(picture)
    stages = report.html_table(
        ("stage", "seconds", "steps", "tokens"),
        [(s["name"], f"{s['seconds']:.1f}", s["steps"], f"{s['tokens']:,}") for s in metrics["stages"]],
    )
    sections = [
        report.accuracy_table(results),
        ("Examples", report.image_tag(picture)),
        ("Questions about clip.mp4", report.html_table(list(asked[0]), [list(a.values()) for a in asked])),
        ("Stages", stages),
        ("Loss", report.image_tag(report.loss_picture(read_metrics(out / "train")))),
    ]
    facts = {k: metrics[k] for k in ("command", "commit", "date", "device", "versions", "peak_memory_bytes")}
    (out / "report.html").write_text(report.html_page("Foveate quickstart", facts, sections))
