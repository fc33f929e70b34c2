"""The in-context learning experiment (docs/in_context.md): arms that differ in what is trained, and on what.

Each seed has one tower, one LLM with induction and one without; its arms all start from these and run the last stage of
the recipe `in-context`. Two arms run at a time, in processes of one thread.
"""

import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..data.glyphs import GlyphSource
from ..eval.shots import SHOTS, ShotBatch, answer_captions, measure_shots, shot_batches
from ..vlm.chat import load_model
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.processor import FoveateProcessor
from .build import build_config
from .deltaloss import document_losses
from .loop import FINISHED, train
from .recipe import ModelRecipe, Recipe, load_recipe

PROCESSES = 2
CORE_SHOTS = 4  # at which arms are compared
TEXTS = 400  # held-out episodes of words, whose loss is measured
CAPTIONS = "{kind: image_captions, weight: 4}"
EPISODES = "{kind: image_episodes, objects: [2, 8], turns: [2, 16]}"
# A fifth of the tokens of captions and episodes, or of captions alone.
TEXT = (
    "{{kind: text_episodes, objects: [2, 8], turns: [4, 16], weight: {0}}}",
    "{{kind: text_repeats, objects: [2, 16], turns: [16, 16], weight: {1}}}",
)
# The control's texts, which are known by heart (loss 0.00) in a third of the steps.
FACTS = ("stages.text.data=[{kind: text_facts, turns: [16, 16]}]", "stages.text.steps=200")


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        induction: whether the LLM's texts could be told from their context; otherwise its words have fixed names.
        frozen: whether the LLM is, so that the projector alone is trained.
        interleaved: whether episodes of pictures stand beside captions.
        text: whether a fifth of the tokens are texts.
    """

    induction: bool
    frozen: bool
    interleaved: bool
    text: bool

    @property
    def name(self) -> str:
        data = "interleaved + captions" if self.interleaved else "captions"
        llm = f"{'' if self.induction else 'plain '}{'frozen' if self.frozen else 'unfrozen'}"
        return f"{llm}, {data}{', 20 % text' if self.text else ''}"

    @property
    def folder(self) -> str:
        return self.name.replace(" + captions", "").replace(" %", "").replace(",", "").replace(" ", "-")

    @property
    def overrides(self) -> list[str]:
        """Of the recipe's stage `images`."""
        data = [EPISODES, CAPTIONS] if self.interleaved else [CAPTIONS]
        if self.text:
            documents = 0.4 if self.interleaved else 0.18  # to an episode's weight of 1: 19 tokens, and 16 of captions
            data += [entry.format(0.75 * documents, 0.25 * documents) for entry in TEXT]
        rates = "{projector: 2.0e-3}" if self.frozen else "{projector: 2.0e-3, llm: 2.0e-3}"
        return [f"stages.images.data=[{', '.join(data)}]", f"stages.images.learning_rates={rates}"]


ARMS = tuple(
    Arm(induction, frozen, interleaved, text)
    for induction in (True, False)
    for frozen in (True, False)
    for interleaved in (True, False)
    for text in (False, True)
    if induction or not text
)


def stage_recipe(stage: str, seed: int, start: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """One stage of the recipe `in-context`, from a model's folder; None: from random weights."""
    recipe = load_recipe("in-context", [f"seed={seed}", "tracking.wandb=disabled", *overrides])
    model = recipe.model
    if start is not None:
        model = ModelRecipe(path=str(start), attn_implementation=model.attn_implementation)
    chosen = [one for one in recipe.stages if one.name == stage]
    return recipe.model_copy(update={"stages": chosen, "model": model})


def train_start(out: Path, seed: int, overrides: Sequence[str] = ()) -> None:
    """What a seed's arms start from: `tower`, then `induction` and `plain`, folders of runs in `out`."""
    torch.set_num_threads(1)
    steps = [("tower", "tower", None, ()), ("text", "induction", "tower", ()), ("text", "plain", "tower", FACTS)]
    for stage, folder, start, more in steps:
        recipe = stage_recipe(stage, seed, None if start is None else out / start / "model", [*more, *overrides])
        _train(recipe, out / folder)


def run_arm(out: Path, arm: Arm, seed: int, questions: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Trains an arm of a seed in its folder in `out` and measures it, unless that is done; what was measured."""
    torch.set_num_threads(1)
    done = out / arm.folder / f"measured-{questions}.json"
    if not done.exists():
        start = out / _start(arm.induction) / "model"
        began = time.process_time()
        _train(stage_recipe("images", seed, start, [*arm.overrides, *overrides]), out / arm.folder)
        trained = time.process_time()
        measured = measure_model(out / arm.folder / "model", questions, seed)
        done.write_text(json.dumps(measured | {"training_cpu_s": trained - began}))
    return json.loads(done.read_text())


def measure_start(out: Path, induction: bool, seed: int, questions: int) -> dict[str, Any]:
    """The same of what a seed's arms start from, which has read no episode of pictures and no caption."""
    torch.set_num_threads(1)
    done = out / _start(induction) / f"measured-{questions}.json"
    if not done.exists():
        done.write_text(json.dumps(measure_model(done.parent / "model", questions, seed)))
    return json.loads(done.read_text())


def _start(induction: bool) -> str:
    return "induction" if induction else "plain"


def _train(recipe: Recipe, out: Path) -> None:
    if not (out / FINISHED).exists():
        out.mkdir(parents=True, exist_ok=True)
        with (out / "log.txt").open("a") as log:
            train(recipe, out, resume="auto", device="cpu", console=Console(file=log, width=120))


def measure_model(path: Path, questions: int, seed: int) -> dict[str, Any]:
    """Accuracies with all numbers of shots, of captions, and the loss on texts.

    Which questions are right is told as a string of 0 and 1, so that arms can be compared question by question.
    """
    model, processor = load_model(path, device="cpu")
    points = []
    asked = [(kind, 2, shots) for kind in ("images", "classes") for shots in SHOTS]
    asked += [("images", 4, CORE_SHOTS), ("words", 2, CORE_SHOTS)]
    for kind, ways, shots in asked:
        forced, free = measure_shots(model, processor, _questions(questions, shots, ways, kind, seed))
        points.append({"kind": kind, "ways": ways, "shots": shots, "forced": _bits(forced), "free": _bits(free)})
    said = answer_captions(model, processor, questions, seed=seed)
    captions = {
        "colour": _bits([answer.split()[:1] == [truth.split()[0]] for answer, truth in said]),
        "object": _bits([answer.split()[1:] == [truth.split()[1]] for answer, truth in said]),
    }
    return {"points": points, "captions": captions, "text": text_loss(model, processor, seed)}


@lru_cache(maxsize=16)
def _questions(n: int, shots: int, ways: int, kind: str, seed: int) -> tuple[ShotBatch, ...]:
    """Kept in a process's memory: the same questions are asked of all arms of a seed, whose processors are alike."""
    _, processor = build_config(load_recipe("in-context").model)
    return tuple(shot_batches(processor, n, shots, ways, kind, seed=seed))


def _bits(right: Sequence[bool]) -> str:
    return "".join("01"[one] for one in right)


def text_loss(model: FoveateForConditionalGeneration, processor: FoveateProcessor, seed: int) -> list[float]:
    """Mean loss of each held-out episode of words, in nats a name that the context tells."""
    source = GlyphSource("text_episodes", processor, "test", seed, objects=(2, 8), turns=(16, 16))
    losses = document_losses(model, processor, source, range(TEXTS), 4096, "cpu")
    return (losses[:, 0] / losses[:, 1]).tolist()


def run_experiment(
    out: Path, console: Console, seeds: Sequence[int], questions: int, overrides: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Everything: each arm's measurements, and its seed and name. What is finished in `out` is not run again."""
    began, found = time.perf_counter(), []
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        try:
            starts = {seed: pool.submit(train_start, out / f"seed-{seed}", seed, overrides) for seed in seeds}
            jobs: list[tuple[int, str, Future]] = []
            for seed, start in starts.items():
                start.result()
                console.print(f"seed {seed}: tower and LLMs  {time.perf_counter() - began:.0f} s", highlight=False)
                jobs += _jobs(pool, out, seed, questions, overrides)
            for of_seed, name, future in jobs:
                found.append({"seed": of_seed, "arm": name} | future.result())
                line = f"seed {of_seed}  {name:>46}  {_line(found[-1])}  {time.perf_counter() - began:.0f} s"
                console.print(line, highlight=False, soft_wrap=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what runs ends its arm; nothing else is begun
            raise
    return found


def _jobs(
    pool: ProcessPoolExecutor, out: Path, seed: int, questions: int, overrides: Sequence[str]
) -> Iterator[tuple[int, str, Future]]:
    """A seed's measurements: seed, name, and what will be measured."""
    folder = out / f"seed-{seed}"
    for induction in (True, False):
        name = f"{_start(induction)} LLM before pictures"
        yield seed, name, pool.submit(measure_start, folder, induction, seed, questions)
    for arm in ARMS:
        yield seed, arm.name, pool.submit(run_arm, folder, arm, seed, questions, overrides)


def _line(measured: dict[str, Any]) -> str:
    shots = {
        point["kind"]: point["forced"].count("1") / len(point["forced"])
        for point in measured["points"]
        if point["shots"] == CORE_SHOTS and point["ways"] == 2
    }
    return "  ".join(f"{kind} {value:.3f}" for kind, value in shots.items())
