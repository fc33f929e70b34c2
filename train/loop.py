"""The training loop: stages in order, each a plain loop over packed batches."""

import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..vlm.model import FoveateForConditionalGeneration
from .build import build_model
from .checkpoint import (
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
from .engine import PlainEngine, resolve_precision
from .optimizer import make_optimizer, set_learning_rates, set_trainable
from .recipe import Recipe, RecipeError, StageRecipe
from .stages import make_batches, make_head, make_losses
from .tracking import Tracker

LINE_EVERY_S = 10.0  # of progress, where the output is no terminal


@dataclass
class StageSummary:
    """What a stage took; `positions` counts padding too, so 1 - tokens / positions is what packing wastes."""

    name: str
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    positions: int = 0


def train(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    device: str | None = None,
    console: Console | None = None,
    after_step: Callable[[int], None] | None = None,
) -> list[StageSummary]:
    """Runs a recipe and leaves the model in `out/model`, checkpoints in `out/checkpoints`.

    Args:
        recipe: what to do.
        out: the run's folder.
        resume: go on from the newest whole checkpoint; the run then ends bit-identical to one never stopped (same
            machine, device and threads).
        device: where to train; `cuda` where there is one.
        console: where progress is shown.
        after_step: called after each step with the number of steps done.

    Raises:
        RecipeError: `out` holds another run's checkpoints, or none to resume.
        NonFiniteError: a loss or gradient was not finite.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; the step in progress is done and saved in a checkpoint.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    precision = resolve_precision(recipe.precision, where)
    newest = _starting_point(recipe, out, resume)
    out.mkdir(parents=True, exist_ok=True)
    tensors, state = load_checkpoint(newest) if newest else ({}, {"stage": 0, "stage_step": 0, "step": 0})
    summaries = [StageSummary(**s) for s in state.get("summaries", [])]
    model, processor = build_model(recipe.model)
    model.to(where)  # type: ignore[arg-type]  # its decorator hides self
    model.train()
    if newest:
        load_weight_tensors(model, tensors["weights"])
    for stage in recipe.stages[: state["stage"]]:  # their traces in the configuration, which is no weight
        if stage.rope_theta:
            set_rope_theta(model, stage.rope_theta)
    step = state["step"]

    with Tracker(out, recipe, step) as tracker, _Display(console) as display, _Interruption() as interruption:
        for number in range(state["stage"], len(recipe.stages)):
            stage = recipe.stages[number]
            resumed = number == state["stage"] and state["stage_step"] > 0
            first = state["stage_step"] if resumed else 0
            if not resumed:
                summaries.append(StageSummary(stage.name))
                torch.manual_seed(recipe.seed + number)  # so that a stage's head doesn't depend on stages before it
            summary = summaries[-1]
            if stage.rope_theta:
                set_rope_theta(model, stage.rope_theta)
            set_trainable(model, stage)
            head = make_head(stage)
            modules = [model] if head is None else [model, head.to(where)]
            optimizer = make_optimizer(model, stage, head)
            engine = PlainEngine(modules, optimizer, precision, stage.max_grad_norm, where)
            batches = make_batches(stage, processor, recipe.seed + number)
            if resumed:
                batches.load_state_dict(state["batches"])
                load_optimizer_tensors(optimizer, tensors["optimizer"])
                if head is not None:
                    load_weight_tensors(head, tensors["head"])
                load_rng_tensors(tensors["rng"])
            display.stage(stage, first)
            for stage_step in range(first, stage.steps):
                began = time.perf_counter()
                micro = [batches.next() for _ in range(stage.batch.accumulation)]
                waited = time.perf_counter() - began
                set_learning_rates(optimizer, stage_step, stage)
                loss, norm = engine.step(make_losses(stage, model, head, micro, where), [batch.keys for batch in micro])
                step += 1
                last = stage_step + 1 == stage.steps
                seconds = time.perf_counter() - began
                tokens, positions = sum(b.used_tokens for b in micro), sum(b.positions for b in micro)
                summary.seconds += seconds
                summary.steps += 1
                summary.tokens += tokens
                summary.positions += positions
                display.step(summary, loss)
                if step % recipe.tracking.every_steps == 0 or last:
                    tracker.log({
                        "step": step, "stage": stage.name, "loss": loss, "grad_norm": norm,
                        "tokens_per_s": tokens / seconds, "data_wait": waited / seconds,
                        "packing_waste": 1 - tokens / positions,
                        **{f"lr_{group['part']}": group["lr"] for group in optimizer.param_groups},
                    })  # fmt: skip
                stopping = interruption.wanted
                saving_began = time.perf_counter()
                if step % recipe.checkpoint.every_steps == 0 or last or stopping:
                    saved = {"weights": weight_tensors(model)}
                    if not last:
                        saved |= {"optimizer": optimizer_tensors(optimizer), "rng": rng_tensors()}
                        if head is not None:
                            saved["head"] = weight_tensors(head)
                    following = {"stage": number + last, "stage_step": 0 if last else stage_step + 1, "step": step}
                    save_checkpoint(
                        out / "checkpoints",
                        step,
                        saved,
                        following
                        | {"batches": batches.state_dict(), "summaries": [asdict(s) for s in summaries]}
                        | {"recipe": recipe.model_dump(mode="json")},
                        recipe.checkpoint.keep,
                    )
                summary.seconds += time.perf_counter() - saving_began
                if after_step:
                    after_step(step)
                if stopping:
                    raise KeyboardInterrupt
        model.requires_grad_(True)
        model.eval()
        model.save_pretrained(out / "model")
        processor.save_pretrained(out / "model")
        (out / "stages.json").write_text(json.dumps([asdict(s) for s in summaries], indent=1))
    return summaries


def set_rope_theta(model: FoveateForConditionalGeneration, theta: float) -> None:
    """Sets the LLM's RoPE base, in its configuration and in its rotary embedding (context extension)."""
    for config in (model.config.text_config, model.language_model.config):
        config.rope_parameters = {**config.rope_parameters, "rope_theta": float(theta)}
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(model.language_model.config).to(model.device)


def _starting_point(recipe: Recipe, out: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, None to begin."""
    folder = out / "checkpoints"
    newest = newest_checkpoint(folder)
    if not resume:
        if newest:
            raise RecipeError(
                f"{out} holds checkpoints of a run; accepted: --resume to go on with it, or another --out"
            )
        return None
    if newest is None:
        raise RecipeError(f"{folder}: no whole checkpoint to resume from; accepted: a run without --resume")
    then = json.loads((newest / "state.json").read_text())["recipe"]
    now = recipe.model_dump(mode="json")
    changed = sorted(k for k in now if k not in ("tracking", "checkpoint") and now[k] != then.get(k))
    if changed:
        raise RecipeError(f"{', '.join(changed)} differ from the run in {out}; accepted on --resume: the same recipe")
    return newest


class _Interruption:
    """Lets Ctrl-C and SIGTERM end a run after its current step, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.wanted = False

    def __enter__(self) -> Self:
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # Python takes signals there alone
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


class _Display:
    """The stage's progress: bars on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console | None):
        columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn())
        fields = (TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self.console = console or Console()
        self.progress = Progress(*columns, *fields, console=self.console, disable=not self.console.is_terminal)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def stage(self, stage: StageRecipe, done: int) -> None:
        self.total = stage.steps
        self.bar = self.progress.add_task(stage.name, total=stage.steps, completed=done, rate="", loss="")
        self.printed_at = time.monotonic()

    def step(self, summary: StageSummary, loss: float) -> None:
        rate, shown = f"{summary.tokens / summary.seconds:,.0f} tokens/s", f"loss {loss:.3f}"
        self.progress.update(self.bar, completed=summary.steps, rate=rate, loss=shown)
        due = time.monotonic() - self.printed_at >= LINE_EVERY_S or summary.steps == self.total
        if due and not self.console.is_terminal:
            left_s = summary.seconds / summary.steps * (self.total - summary.steps)
            line = f"{summary.name} {summary.steps}/{self.total}  {shown}  {rate}  {left_s:.0f} s left"
            self.console.print(line, highlight=False, soft_wrap=True)
            self.printed_at = time.monotonic()
