"""The training loop: stages in order, each a plain loop over steps of packed micro-batches."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.loader import Loader, Prefetched, Share, Step, merge_states
from ..eval.facts import process_peak_bytes
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.parallel.attention import sequence_attention
from ..vlm.parallel.topology import Topology
from ..vlm.processor import FoveateProcessor
from .acceleration import compile_model, convert_to_fp8, disable_checkpointing, enable_checkpointing
from .adapters import Adapters, merge_adapters, quantised_tensors, save_adapter
from .build import add_stage_adapters, set_rope_theta, starting_model, weight_tensors
from .checkpoint import (
    CheckpointTensors,
    CheckpointWriter,
    load_rng_tensors,
    newest_checkpoint,
    read_state,
    rng_tensors,
)
from .distributed import Group, World, init_world
from .engine import Engine, Micro, StepResult, make_engine, resolve_precision, shares_weights
from .flops import peak_flops
from .optimizer import learning_rate_scale, make_optimizer, set_learning_rates, set_trainable
from .parallel import Topologies, check_parallel
from .recipe import Recipe, RecipeError, StageRecipe
from .stages import check_sources, make_loader, make_objective
from .tracking import Tracker

LINE_EVERY_S = 10.0  # of progress, where the output is no terminal
FINISHED = "stages.json"  # written last: a run's folder that holds it is done


class Requeue(Exception):
    """A signal of the scheduler came: the run is saved and can go on later; the exit code is to be 0."""


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
    resume: bool | Literal["auto"] = False,
    device: str | None = None,
    console: Console | None = None,
    after_step: Callable[[int], None] | None = None,
) -> list[StageSummary]:
    """Runs a recipe and leaves the model in `out/model`, checkpoints in `out/checkpoints`.

    Under `torchrun` or Slurm every process calls this, with the same arguments and the same folder.

    Args:
        recipe: what to do.
        out: the run's folder.
        resume: go on from the newest whole checkpoint, of any number of processes; on the same number (and machine,
            device and threads) the run ends bit-identical to one never stopped. `auto`: where there is one.
        device: where to train; `cuda` where there is one.
        console: where progress is shown.
        after_step: called after each step with the number of steps done.

    Raises:
        RecipeError: `out` holds another run's checkpoints, or none to resume; or processes can't share the work so.
        ProcessLostError: another process is gone; raised by one of the others, which end by SystemExit.
        NonFiniteError: a loss or gradient was not finite.
        TooManyBadError: more documents can't be used than the recipe accepts.
        KeyboardInterrupt: Ctrl-C came; the step in progress is done and saved in a checkpoint.
        Requeue: the same after SIGTERM or SIGUSR1.
    """
    check_sources(recipe)
    with _Interruption() as interruption, init_world(device, recipe.timeout_s) as world:
        check_parallel(recipe, world.size)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        newest = _on_first(world, lambda: _starting_point(recipe, out, resume))
        state: dict[str, Any] = {"stage": 0, "stage_step": 0, "step": 0, "validation_loss": None}
        if newest:
            state = read_state(newest)
        summaries = [StageSummary(**s) for s in state.get("summaries", [])]
        torch.manual_seed(recipe.seed)
        model, processor = starting_model(recipe, newest)
        if recipe.fp8:
            convert_to_fp8(model, device=world.device)
        if recipe.compile:
            compile_model(model)
        step, validation_loss = state["step"], state["validation_loss"]

        with (
            Tracker(out, recipe, step, active=world.rank == 0) as tracker,
            _Display(console, active=world.rank == 0) as display,
            _writer(recipe, out, world) as writer,
            ExitStack() as resources,
        ):
            topologies = Topologies(world, recipe.timeout_s, display.console)
            for number in range(state["stage"], len(recipe.stages)):
                stage = recipe.stages[number]
                first = state["stage_step"] if number == state["stage"] else 0
                if not first:
                    summaries.append(StageSummary(stage.name))
                summary = summaries[-1]
                topology = topologies(recipe, stage)
                engine, adapters = _make_engine(
                    recipe, number, model, processor, world, topology, newest if first else None
                )
                share = _share(world, topology, "data")
                loader = make_loader(
                    recipe, number, model.config, processor, share, flag=interruption.flag, topology=topology
                )
                if first and newest:
                    with CheckpointTensors(newest) as saved:
                        engine.load_state_tensors(saved.of_engine())
                        load_rng_tensors(saved, world.rank)
                    loader.load_state_dict(state["loader"])
                ahead = _prefetched(loader, recipe, None if stage.steps is None else stage.steps - first)
                steps = resources.enter_context(closing(ahead))
                display.stage(stage, first)
                meter = _Meter(
                    recipe, stage, world, topology.data_size, exact_flops=getattr(loader.cost, "exact", False)
                )
                if first:
                    meter.sums = state["meter"]
                stage_step = first
                batch, waited = _timed(steps.next)
                while batch is not None:
                    began = time.perf_counter()
                    set_learning_rates(engine.param_groups, learning_rate_scale(stage, stage_step, batch.progress))
                    with _attention(model, topology):
                        result = engine.step([Micro(b.inputs, b.keys) for b in batch.micro], batch.loss_tokens)
                    step, stage_step = step + 1, stage_step + 1
                    computed = time.perf_counter() - began
                    meter.add(batch, waited, computed)
                    _summarise(summary, batch, waited + computed)
                    tracker.documents(step, batch)
                    upcoming, waited = _timed(steps.next) if stage_step != stage.steps else (None, 0.0)
                    last = upcoming is None
                    stopping = (upcoming or batch).flagged if world.size > 1 else interruption.flag()
                    display.step(summary, result.loss)
                    extra: dict[str, Any] = {}
                    if recipe.validation and (step % recipe.validation.every_steps == 0 or last):
                        validation_loss = _validate(engine, recipe, number, model, processor, world, topology)
                        extra["validation_loss"] = validation_loss
                    if recipe.evaluation and (step % recipe.evaluation.every_steps == 0 or last):
                        extra |= _evaluate(engine, recipe, model, processor)
                    if step % recipe.tracking.every_steps == 0 or last or extra:
                        facts = meter.metrics(batch, result, engine.param_groups)
                        tracker.log({"step": step, "stage": stage.name} | facts | extra)
                    if last:
                        break
                    saving_began = time.perf_counter()
                    if step % recipe.checkpoint.every_steps == 0 or stopping:
                        where = {"stage": number, "stage_step": stage_step, "step": step, "meter": meter.sums}
                        loaders = merge_states(world.gather(batch.state, "main"))
                        tensors = engine.state_tensors() | quantised_tensors(model) | rng_tensors(world.rank)
                        writer.save(step, tensors, where | facts_of(recipe, summaries, validation_loss, loaders))
                    summary.seconds += time.perf_counter() - saving_began
                    if after_step:
                        after_step(step)
                    if stopping:
                        writer.wait()
                        raise interruption.reason()
                    batch = upcoming
                if batch is None:
                    raise RecipeError(f"stages.{stage.name}: its data hold no document; accepted: one at least")
                resources.close()
                engine.close()
                model.float()
                if adapters:
                    if world.rank == 0:
                        save_adapter(adapters, out / "adapters" / stage.name)
                    merge_adapters(adapters)
                where = {"stage": number + 1, "stage_step": 0, "step": step}
                writer.save(step, weight_tensors(model, world), where | facts_of(recipe, summaries, validation_loss))
                if after_step:
                    after_step(step)
                if stopping and number + 1 < len(recipe.stages):
                    writer.wait()
                    raise interruption.reason()
            writer.wait()
            if world.rank == 0:
                _finish(model, processor, out, summaries)
            world.barrier("main")
    return summaries


def _make_engine(
    recipe: Recipe,
    number: int,
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    world: World,
    topology: Topology,
    checkpoint: Path | None,
) -> tuple[Engine, Adapters | None]:
    """A stage's engine, and its adapters where it has any.

    Args:
        checkpoint: from the middle of the stage, which the engine is to load; 4-bit weights are taken from it.
    """
    stage = recipe.stages[number]
    torch.manual_seed(recipe.seed + number)  # so that what a stage adds doesn't depend on stages before it
    if stage.rope_theta:
        set_rope_theta(model, stage.rope_theta)
    adapters = add_stage_adapters(model, stage, checkpoint)
    if recipe.engine == "torch":  # DeepSpeed takes a model from the CPU, which need not fit on one device
        model.to(world.device)  # type: ignore[arg-type]  # its decorator hides self
    model.train()
    set_trainable(model, stage)
    if stage.activation_checkpointing:
        enable_checkpointing(model)
    else:
        disable_checkpointing(model)  # of an earlier stage
    same_calls = shares_weights(recipe.engine)
    objective = make_objective(stage, model, processor, same_calls, topology)
    head = getattr(objective, "head", None)
    engine = make_engine(
        recipe.engine,
        objective,
        make_optimizer(model, stage, head),
        resolve_precision(recipe.precision, world.device),
        stage.max_grad_norm,
        world,
        micro_batches_per_rank=stage.batch.micro_batches // topology.data_size,
    )
    torch.manual_seed(recipe.seed + number + 1_000_003 * world.rank)  # dropout differs between ranks
    return engine, adapters


def _share(world: World, topology: Topology, group: Group) -> Share:
    """This rank's part of the documents, the same for all ranks of a sequence group."""
    gather = partial(world.gather, group=group)
    return Share(topology.data_rank, topology.data_size, gather, topology.degree)


def _attention(model: FoveateForConditionalGeneration, topology: Topology) -> AbstractContextManager:
    """In which the LLM attends to what all ranks of a sequence group hold, in the backward pass too."""
    return sequence_attention(model, topology.ulysses) if topology.degree > 1 else nullcontext()


def _writer(recipe: Recipe, out: Path, world: World) -> CheckpointWriter:
    settings = recipe.checkpoint

    def gather(value: Any) -> list[Any]:
        try:
            return world.gather(value, "checkpoint")
        except RuntimeError as error:  # as of a disk: the thread is to tell of it, not to end by it
            raise ConnectionError(f"another process is gone ({error})") from error

    return CheckpointWriter(
        out / "checkpoints",
        settings.keep,
        settings.keep_best,
        settings.asynchronous,
        world.rank,
        world.size,
        gather,
    )


def facts_of(
    recipe: Recipe, summaries: list[StageSummary], validation_loss: float | None, loader: dict | None = None
) -> dict:
    """What a checkpoint's `state.json` holds besides the position."""
    return {
        "validation_loss": validation_loss,
        "summaries": [asdict(summary) for summary in summaries],
        "recipe": recipe.model_dump(mode="json"),
        "loader": loader,
    }


def _validate(
    engine: Engine,
    recipe: Recipe,
    number: int,
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    world: World,
    topology: Topology,
) -> float | None:
    """Mean loss on the validation documents, over all ranks; None for an objective without next tokens."""
    if recipe.stages[number].objective != "next_token":
        return None
    share = _share(world, topology, "main")
    loader = make_loader(recipe, number, model.config, processor, share, part="validation", topology=topology)
    total, tokens = 0.0, 0
    while (batch := loader.next()) is not None:
        with _attention(model, topology):
            loss = engine.evaluate([Micro(b.inputs, b.keys) for b in batch.micro], batch.loss_tokens)
        total += loss * batch.loss_tokens
        tokens += batch.loss_tokens
    return total / tokens


def _evaluate(
    engine: Engine, recipe: Recipe, model: FoveateForConditionalGeneration, processor: FoveateProcessor
) -> dict[str, float]:
    """Accuracy of generated answers on the dev split. All ranks answer all questions: with ZeRO-3 they have to."""
    from ..eval.glyphs import TASKS, evaluate

    assert recipe.evaluation is not None
    model.eval()
    with torch.no_grad():
        results = {task: evaluate(model, processor, task, recipe.evaluation.questions, "dev") for task in TASKS}
    model.train()
    return {f"accuracy_{task}": result.accuracy for task, result in results.items()}


def _finish(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, out: Path, summaries: list[StageSummary]
) -> None:
    """Writes the model, whole or not at all, and the mark that the run is done."""
    model.requires_grad_(True)
    model.eval()
    aside = out / ".writing-model"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    shutil.rmtree(out / "model", ignore_errors=True)
    aside.rename(out / "model")
    (out / FINISHED).write_text(json.dumps([asdict(s) for s in summaries], indent=1))


def _prefetched(loader: Loader, recipe: Recipe, steps: int | None) -> Loader | Prefetched:
    return Prefetched(loader, steps) if recipe.loader.workers else loader


def _timed(next_step: Callable[[], Step | None]) -> tuple[Step | None, float]:
    began = time.perf_counter()
    return next_step(), time.perf_counter() - began


def _summarise(summary: StageSummary, batch: Step, seconds: float) -> None:
    summary.seconds += seconds
    summary.steps += 1
    summary.tokens += batch.tokens
    summary.positions += batch.positions


class _Meter:
    """Rates since the last line of metrics."""

    def __init__(self, recipe: Recipe, stage: StageRecipe, world: World, data_size: int, exact_flops: bool):
        self.world, self.data_size = world, data_size
        packs = stage.objective == "next_token"
        self.capacity = stage.batch.micro_batches * stage.batch.rows * stage.batch.tokens if packs else None
        self.peak = (recipe.tracking.peak_flops or peak_flops(world.device)) if exact_flops else None
        self._clear()

    def _clear(self) -> None:
        self.sums = dict.fromkeys(("seconds", "waited", "flops", "imbalance"), 0.0)
        self.sums |= dict.fromkeys(("tokens", "positions", "documents", "steps"), 0)

    def add(self, batch: Step, waited: float, computed: float) -> None:
        each = len(batch.costs) // self.data_size
        ranks = [sum(batch.costs[i : i + each]) for i in range(0, len(batch.costs), each)]  # of each sequence group
        found = {
            "seconds": waited + computed,
            "waited": waited,
            "tokens": batch.tokens,
            "positions": batch.positions,
            "documents": batch.documents,
            "flops": sum(batch.costs),
            "imbalance": max(ranks) * len(ranks) / max(1e-9, sum(ranks)),
            "steps": 1,
        }
        self.sums = {name: self.sums[name] + value for name, value in found.items()}

    def metrics(self, batch: Step, result: StepResult, groups: list[dict]) -> dict[str, Any]:
        """Of the steps since the last call; rates are of all ranks together."""
        sums = self.sums
        metrics = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            **{f"grad_norm_{part}": norm for part, norm in result.part_norms.items()},
            "tokens_per_s": sums["tokens"] / sums["seconds"],
            "samples_per_s": sums["documents"] / sums["seconds"],
            "step_s": sums["seconds"] / sums["steps"],
            "data_wait": sums["waited"] / sums["seconds"],
            "packing_waste": 1 - sums["tokens"] / sums["positions"],
            **({"row_fill": sums["tokens"] / sums["steps"] / self.capacity} if self.capacity else {}),
            "imbalance": sums["imbalance"] / sums["steps"],
            "memory_bytes": process_peak_bytes(self.world.device),
            **{f"lr_{group['part']}": group["lr"] for group in groups},
            **{f"bad_{reason}": count for reason, count in batch.bad_counts.items()},
        }
        if self.peak:
            metrics["mfu"] = sums["flops"] / (sums["seconds"] * self.world.size * self.peak)
        self._clear()
        return metrics


def _on_first(world: World, work: Callable[[], Any]) -> Any:
    """What rank 0's work gives, or its RecipeError, on all ranks."""
    value, error = None, None
    if world.rank == 0:
        try:
            value = work()
        except RecipeError as caught:
            error = caught
    value, error = world.gather((value, error), "main")[0]
    if error is not None:
        raise error
    return value


def _starting_point(recipe: Recipe, out: Path, resume: bool | Literal["auto"]) -> Path | None:
    """The checkpoint to go on from, None to begin."""
    folder = out / "checkpoints"
    newest = newest_checkpoint(folder)
    if newest is None and resume is not True:
        out.mkdir(parents=True, exist_ok=True)
        return None
    if not resume:
        raise RecipeError(f"{out} holds checkpoints of a run; accepted: --resume to go on with it, or another --out")
    if newest is None:
        raise RecipeError(f"{folder}: no whole checkpoint to resume from; accepted: a run without --resume")
    then, now = read_state(newest)["recipe"], recipe.model_dump(mode="json")
    for each in (then, now):
        each["loader"] = {k: v for k, v in each["loader"].items() if k != "workers"}
        each["stages"] = [{k: v for k, v in stage.items() if k != "parallel"} for stage in each["stages"]]
    may_differ = ("tracking", "checkpoint", "threads", "engine", "evaluation", "compile", "parallel", "timeout_s")
    changed = sorted(k for k in now if k not in may_differ and now[k] != then.get(k))
    if changed:
        raise RecipeError(f"{', '.join(changed)} differ from the run in {out}; accepted on --resume: the same recipe")
    return newest


class _Interruption:
    """Lets Ctrl-C and a scheduler's signals end a run after its current step, with a checkpoint; a second Ctrl-C ends
    it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.process = os.getpid()

    def __enter__(self) -> Self:
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # Python takes signals there alone
            numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
            self.previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def flag(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    def reason(self) -> BaseException:
        """What to raise once the run is saved; on ranks that got no signal, as if the scheduler's had come."""
        return KeyboardInterrupt() if self.signal == signal.SIGINT else Requeue()

    def _note(self, number: int, frame: object) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number


class _Display:
    """The stage's progress: bars on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console | None, active: bool):
        columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn())
        fields = (TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self.console = console or Console()
        self.lines = active and not self.console.is_terminal
        self.progress = Progress(
            *columns, *fields, console=self.console, disable=not (active and self.console.is_terminal)
        )

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
        if due and self.lines:
            left = ""
            if self.total:
                left = f"  {summary.seconds / summary.steps * (self.total - summary.steps):.0f} s left"
            line = f"{summary.name} {summary.steps}/{self.total or '?'}  {shown}  {rate}{left}"
            self.console.print(line, highlight=False, soft_wrap=True)
            self.printed_at = time.monotonic()
