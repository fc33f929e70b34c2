"""Text retention: what is left of an LLM's language when it has become a VLM's (docs/text_retention.md).

Trains the recipe `text-retention-start`, then each arm of `text-retention`, with each seed, and measures every stage's
end. The measurements themselves are in `eval/retention.py`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from ..data.encoding import encode
from ..eval.retention import RE_BLENDED, START, WITHOUT, Measured, measure, read, write
from .build import build_config, model_of_checkpoint
from .checkpoint import is_whole, read_state
from .loop import FINISHED, train
from .recipe import GlyphData, Recipe, load_recipe
from .stages import make_mixture


@dataclass(frozen=True)
class Arm:
    """An arm: in which stages text is left out, and whether the LLM stays frozen."""

    without_text: tuple[str, ...]
    frozen: bool = False


ARMS = {
    WITHOUT: Arm(("interleaved", "instruct")),
    "text in instruct": Arm(("interleaved",)),
    RE_BLENDED: Arm(()),
    "LLM frozen": Arm(("interleaved", "instruct"), frozen=True),
}


def start_recipe(seed: int, overrides: Sequence[str] = ()) -> Recipe:
    """What all arms of a seed share."""
    return load_recipe("text-retention-start", ["tracking.wandb=disabled", *overrides, f"seed={seed}"])


def arm_recipe(arm: str, seed: int, start: Path, overrides: Sequence[str] = ()) -> Recipe:
    """An arm's recipe: the same steps and batches in all, whatever is read and trained.

    Args:
        start: the folder of the model that it begins with.
    """
    recipe = load_recipe(
        "text-retention", ["tracking.wandb=disabled", *overrides, f"seed={seed}", f"model.path={start}"]
    )
    stages = []
    for stage in recipe.stages:
        changed: dict[str, Any] = {}
        if stage.name in ARMS[arm].without_text:
            changed["data"] = [data for data in stage.data if not _is_text(data)]
        if ARMS[arm].frozen:
            changed["learning_rates"] = {part: rate for part, rate in stage.learning_rates.items() if part != "llm"}
        stages.append(stage.model_copy(update=changed))
    return recipe.model_copy(update={"stages": stages})


def _is_text(data: Any) -> bool:
    return isinstance(data, GlyphData) and data.kind == "sentences"


def text_shares(recipe: Recipe, documents: int = 400) -> Iterator[dict[str, Any]]:
    """Of each stage, what part of the documents, tokens (visual ones too) and tokens with loss is text alone.

    Args:
        documents: from so many of a stage's it is counted.
    """
    _, processor = build_config(recipe.model)
    for number, stage in enumerate(recipe.stages):
        mixture, counts, total = make_mixture(recipe, number, processor), Counter[str](), Counter[str]()
        for position in range(documents):
            sample = encode(mixture.document(position), processor)
            found = {"documents": 1, "tokens": sample.tokens, "loss_tokens": sample.loss_tokens}
            total.update(found)
            if _is_text(stage.data[mixture.locate(position).source]):
                counts.update(found)
        yield {"stage": stage.name} | {name: counts[name] / total[name] for name in total}


def run_part(folder: Path, recipe: Recipe, arm: str, texts: int, questions: int) -> list[Measured]:
    """Trains a recipe in the folder and measures each stage's end, unless that is done.

    Args:
        arm: the recipe's, or `START`.
        texts, questions: that each model is measured with.
    """
    torch.set_num_threads(recipe.threads or 1)
    disable_progress_bar()
    files = {stage.name: folder / f"measured-{stage.name}-{texts}-{questions}.json" for stage in recipe.stages}
    if not (folder / FINISHED).exists():
        with open(folder.with_suffix(".log"), "a") as log:
            train(recipe, folder, resume="auto", console=Console(file=log))
    for checkpoint in sorted((folder / "checkpoints").iterdir()):
        if not is_whole(checkpoint, hashes=False):
            continue
        state = read_state(checkpoint)
        name = recipe.stages[state["stage"] - 1].name
        if state["stage_step"] == 0 and not files[name].exists():
            model, processor = model_of_checkpoint(checkpoint)
            write(measure(model, processor, recipe.seed, arm, name, texts, questions), files[name])
    return [read(file) for file in files.values()]


def run_experiment(
    out: Path,
    console: Console,
    seeds: Sequence[int],
    texts: int,
    questions: int,
    jobs: int,
    overrides: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> list[Measured]:
    """Everything, in order of seeds, arms and stages.

    Args:
        out: folder of the runs; what is finished there is not run again.
        texts, questions: see `run_part`.
        jobs: models that are trained at the same time, a process each.
        overrides: of the recipes `text-retention-start` and `text-retention`.
    """
    found: dict[tuple[int, str], list[Measured]] = {}
    todo = [(seed, START) for seed in seeds]
    running: dict[Future[list[Measured]], tuple[int, str]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            while todo or running:
                while todo and len(running) < jobs:  # no more: what waits in the pool can't be taken back
                    seed, arm = todo.pop(0)
                    folder, recipe = _part(out / f"seed-{seed}", arm, seed, overrides)
                    running[pool.submit(run_part, folder, recipe, arm, texts, questions)] = (seed, arm)
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    seed, arm = running.pop(future)
                    found[seed, arm] = future.result()
                    for one in found[seed, arm]:
                        console.print(one.line(), soft_wrap=True, highlight=False)
                    if arm == START:
                        todo += [(seed, name) for name in ARMS]
        except BaseException:
            for process in active_children():  # they end after their step, with a checkpoint
                process.terminate()
            raise
    return [one for seed in seeds for arm in (START, *ARMS) for one in found[seed, arm]]


def _part(folder: Path, arm: str, seed: int, overrides: tuple[Sequence[str], Sequence[str]]) -> tuple[Path, Recipe]:
    """The folder and recipe of an arm, or of what all arms share."""
    own, start = folder / arm.lower().replace(" ", "-"), folder / START / "model"
    own.mkdir(parents=True, exist_ok=True)
    return own, start_recipe(seed, overrides[0]) if arm == START else arm_recipe(arm, seed, start, overrides[1])
