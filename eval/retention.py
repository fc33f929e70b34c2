"""What a VLM's training leaves of its LLM's language: measurements, tables and picture of docs/text_retention.md.

VILA (arXiv 2312.07533, section 3): training on pictures costs text ability, and text-only data in it restores that.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..data.drawing import SPLITS
from ..data.glyphs import Question
from ..data.sentences import CATEGORIES, Sentences, held_out
from ..data.small_scenes import CELLS, SMALL_SCENE_QUESTIONS, small_scene
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.processor import FoveateProcessor
from .facts import result
from .glyphs import Item, answer
from .report import plt, png
from .statistics import bootstrap_interval, mcnemar, wilson_interval
from .tables import bold_with_interval, markdown
from .text import TextLoss, entropy, text_loss

BEFORE, LAST = "text", "instruct"  # the stage that ends with the LLM as it was, and the last one
START = "start"  # name of the stages that all arms share
BATCH = 100  # questions that are asked at a time
RE_BLENDED, WITHOUT = "text in both", "no text"


@dataclass(frozen=True)
class Measured:
    """A model after a stage.

    Attributes:
        seed: of its training, and of the texts and scenes.
        arm: or `START`.
        nats, tokens: of each held-out text, as of `TextLoss`.
        right: question's task → of each scene, whether it was answered right; after the last stage.
    """

    seed: int
    arm: str
    stage: str
    nats: list[float]
    tokens: list[int]
    right: dict[str, list[bool]]

    @property
    def loss(self) -> TextLoss:
        return TextLoss(np.array(self.nats), np.array(self.tokens))

    def line(self) -> str:
        """What is printed of it."""
        right = "".join(f"  {task} {sum(some) / len(some):.3f}" for task, some in self.right.items())
        return f"seed {self.seed}  {self.arm:>12}  {self.stage:>12}  {self.loss.mean:.4f} nats a token{right}"


@cache
def texts_of(seed: int, n: int) -> tuple[Sentences, ...]:
    """The held-out texts that a seed's models are measured with."""
    return tuple(held_out(n, "test", seed))


def scene_items(task: str, n: int, split: str = "test", seed: int = 0) -> Iterator[Item]:
    """Questions of a task, each about its own scene; the same for the same seed and split."""
    number = list(SMALL_SCENE_QUESTIONS).index(task)
    for index in range(n):
        rng = np.random.default_rng([42, seed, SPLITS.index(split), number, index])
        scene, cell = small_scene(rng, split), int(rng.integers(len(CELLS)))
        yield Item(Question(task, *SMALL_SCENE_QUESTIONS[task](scene, cell), cell), scene.picture)


def ask_scenes(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, n: int, seed: int
) -> dict[str, list[bool]]:
    """Of each task, which of n questions are answered right, word by word."""
    right: dict[str, list[bool]] = {}
    for task in SMALL_SCENE_QUESTIONS:
        items = list(scene_items(task, n, seed=seed))
        said = [one for i in range(0, n, BATCH) for one in answer(model, processor, items[i : i + BATCH], 4)]
        right[task] = [one == item.question.answer for one, item in zip(said, items, strict=True)]
    return right


def measure(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    seed: int,
    arm: str,
    stage: str,
    texts: int,
    questions: int,
) -> Measured:
    """Reads held-out texts, and after the last stage asks about held-out scenes."""
    loss = text_loss(model, processor, [text.text for text in texts_of(seed, texts)])
    right = ask_scenes(model, processor, questions, seed) if stage == LAST else {}
    return Measured(seed, arm, stage, loss.nats.tolist(), loss.tokens.tolist(), right)


def write(measured: Measured, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".writing")
    aside.write_text(json.dumps(asdict(measured)))
    aside.rename(path)


def read(path: Path) -> Measured:
    """What `write` wrote."""
    return Measured(**json.loads(path.read_text()))


# Results


def as_points(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Groups of entries, for a results file: one for each arm and stage, its seeds together."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for one in sorted(measured, key=lambda one: one.seed):
        groups.setdefault((one.arm, one.stage), []).append(one)
    before = groups[START, BEFORE]
    for (arm, stage), some in groups.items():
        if [one.seed for one in some] != [one.seed for one in before]:
            raise ValueError(f"{arm}, {stage}: seeds {[one.seed for one in some]}; accepted: those of stage {BEFORE}")
    points = []
    for (arm, stage), some in groups.items():
        entries = _text_entries(some, before)
        for task in some[0].right:
            entries.append(_task_entry(task, some))
            reference = groups.get((WITHOUT, stage))
            if reference and arm != WITHOUT:
                entries.append(_task_difference(task, some, reference))
        points.append({"name": _name(arm, stage), "arm": arm, "stage": stage, "results": entries})
    return points


def _name(arm: str, stage: str) -> str:
    return "before" if (arm, stage) == (START, BEFORE) else f"{arm}, {stage}"


def _text_entries(some: Sequence[Measured], before: Sequence[Measured]) -> list[dict[str, Any]]:
    """Of all texts and of each category: entropy, loss, and the loss against that before."""
    texts = [texts_of(one.seed, len(one.nats)) for one in some]
    entries = []
    for name in ("all", *CATEGORIES):
        chosen = [np.array([name in ("all", text.category) for text in own]) for own in texts]
        losses = [one.loss.of(these) for one, these in zip(some, chosen, strict=True)]
        then = [one.loss.of(these) for one, these in zip(before, chosen, strict=True)]
        least = [
            entropy([text for text, this in zip(own, these, strict=True) if this], loss.tokens)
            for own, these, loss in zip(texts, chosen, losses, strict=True)
        ]
        n = int(sum(map(np.sum, chosen)))
        mean, reference, floor = (_pooled(one) for one in (losses, then, least))
        low, high = _interval(losses)
        entries.append(result(f"{name}: entropy", floor, "nats a token", n))
        entries.append(
            result(f"{name}: loss", mean, "nats a token", n, low=low, high=high)
            | {"baseline": "before", "ratio": mean / reference, "each": [loss.mean for loss in losses]}
        )
        entries.append(
            result(f"{name}: perplexity", math.exp(mean), "", n, low=math.exp(low), high=math.exp(high))
        )  # fmt: skip
        low, high = _ratio_interval(losses, then)
        each = [loss.mean / was.mean for loss, was in zip(losses, then, strict=True)]
        entries.append(
            result(f"{name}: loss / before", mean / reference, "ratio", n, low=low, high=high) | {"each": each}
        )
    return entries


def _pooled(losses: Sequence[TextLoss]) -> float:
    return float(sum(loss.nats.sum() for loss in losses) / sum(loss.tokens.sum() for loss in losses))


def _interval(losses: Sequence[TextLoss]) -> tuple[float, float]:
    """Of the pooled loss: a bootstrap of the texts, within each seed."""
    return bootstrap_interval(lambda a, b: a / b, _sums(losses), [len(loss.nats) * loss.tokens for loss in losses])


def _ratio_interval(losses: Sequence[TextLoss], then: Sequence[TextLoss]) -> tuple[float, float]:
    """Of the ratio of two pooled losses on the same texts: the same bootstrap."""
    if all(np.array_equal(loss.nats, was.nats) for loss, was in zip(losses, then, strict=True)):
        return 1.0, 1.0
    return bootstrap_interval(lambda a, b: a / b, _sums(losses), _sums(then))


def _sums(losses: Sequence[TextLoss]) -> list[np.ndarray]:
    """Values whose mean is a seed's sum: seeds have different numbers of texts of a category."""
    return [len(loss.nats) * loss.nats for loss in losses]


def _task_entry(task: str, some: Sequence[Measured]) -> dict[str, Any]:
    right = [answer for one in some for answer in one.right[task]]
    low, high = wilson_interval(sum(right), len(right))
    entry = result(task, sum(right) / len(right), "fraction", len(right), low=low, high=high)
    return entry | {"each": [sum(one.right[task]) / len(one.right[task]) for one in some]}


def _task_difference(task: str, some: Sequence[Measured], reference: Sequence[Measured]) -> dict[str, Any]:
    """Points of accuracy over the arm without text, on the same questions (McNemar's test)."""
    one, other = ([answer for model in models for answer in model.right[task]] for models in (some, reference))
    told = mcnemar(one, other)
    entry = result(
        f"{task} above {WITHOUT}", 100 * told.difference, "points", told.n, low=100 * told.low, high=100 * told.high
    )
    return entry | {"p": told.p}


def unchanged(measured: Sequence[Measured], frozen: Sequence[str]) -> list[dict[str, Any]]:
    """Of each model whose LLM was frozen, whether every text's loss is the very number that it was before.

    Args:
        frozen: arms that never train the LLM, besides the stages after `BEFORE` that all arms share.
    """
    before = {one.seed: one for one in measured if (one.arm, one.stage) == (START, BEFORE)}
    return [
        {"seed": one.seed, "arm": one.arm, "stage": one.stage, "bit_equal": one.nats == before[one.seed].nats}
        for one in measured
        if one.arm in (START, *frozen) and one.stage != BEFORE
    ]


# Tables and picture


def _entries(results: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Point's name → entry's name → entry."""
    return {point["name"]: {one["name"]: one for one in point["results"]} for point in results["points"]}


def _arms(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(point["arm"] for point in results["points"] if point["arm"] != START))


def tables(results: dict[str, Any]) -> dict[str, str]:
    """By mark; of docs/results/text_retention.json."""
    return {"arms": arms_table(results), "categories": categories_table(results), "seeds": seeds_table(results)}


def arms_table(results: dict[str, Any]) -> str:
    """Markdown: a row for each arm."""
    entries, shares = _entries(results), {(one["arm"], one["stage"]): one for one in results["shares"]}
    tasks = list(SMALL_SCENE_QUESTIONS)
    names = [task.replace("_", " ") for task in tasks]
    columns = [
        "",
        "text in interleaved, instruct",
        "before",
        "after interleaved",
        "after instruct",
        "of before",
        "perplexity",
    ]
    rows = []
    for arm in _arms(results):
        between, last = entries[f"{arm}, interleaved"], entries[f"{arm}, {LAST}"]
        told = ", ".join(f"{shares[arm, stage]['loss_tokens']:.0%}" for stage in ("interleaved", LAST))
        cells = [
            f"{entries['before']['all: loss']['value']:.4f}",
            bold_with_interval(between["all: loss"], ".4f"),
            bold_with_interval(last["all: loss"], ".4f"),
            bold_with_interval(last["all: loss / before"], ".2%"),
            f"{last['all: perplexity']['value']:.3f}",
            *(bold_with_interval(last[task], ".3f") for task in tasks),
        ]
        rows.append([arm, told, *cells])
    return markdown([*columns, *names], rows)


def categories_table(results: dict[str, Any]) -> str:
    """Markdown: a row for each category, with the loss before and after the last stage of each arm."""
    entries, arms = _entries(results), _arms(results)
    rows = []
    for name in (*CATEGORIES, "all"):
        first = entries["before"]
        cells = [f"{first[f'{name}: {what}']['value']:.4f}" for what in ("entropy", "loss")]
        for arm in arms:
            last = entries[f"{arm}, {LAST}"][f"{name}: loss"]
            cells.append(f"{last['value']:.4f} ({last['ratio']:.1%})")
        rows.append([name, *cells])
    return markdown(["nats a token", "entropy", "before", *arms], rows)


def seeds_table(results: dict[str, Any]) -> str:
    """Markdown: a row for each arm, with each seed's loss after the last stage against before, and image tasks."""
    entries = _entries(results)
    rows = []
    for arm in _arms(results):
        last = entries[f"{arm}, {LAST}"]
        cells = [", ".join(f"{one:.2%}" for one in last["all: loss / before"]["each"])]
        cells += [", ".join(f"{one:.3f}" for one in last[task]["each"]) for task in SMALL_SCENE_QUESTIONS]
        rows.append([arm, *cells])
    return markdown(["each seed", "of before", "what at", "colour at"], rows)


def picture(results: dict[str, Any]) -> bytes:
    """A PNG: the loss on text after each stage, and what of each category is lost after the last one."""
    entries, arms = _entries(results), _arms(results)
    shared = [point["name"] for point in results["points"] if point["arm"] == START]
    stages = [point["stage"] for point in results["points"] if point["arm"] in (START, arms[0])]
    figure, (over, by) = plt.subplots(1, 2, figsize=(12.5, 4.4), width_ratios=(1, 1.15))
    floor = entries["before"]["all: entropy"]["value"]
    over.axhline(floor, ls=":", lw=1, color="0.4", label="the language's entropy")
    start = entries["before"]["all: loss"]["value"]
    over.axhspan(0.98 * start, 1.02 * start, color="0.5", alpha=0.2, lw=0, label="within 2 % of before")
    for number, arm in enumerate(arms):
        names = [*shared, *(f"{arm}, {stage}" for stage in stages[len(shared) :])]
        some = [entries[name]["all: loss"] for name in names]
        values = [one["value"] for one in some]
        over.plot(range(len(names)), values, marker=".", color=f"C{number}", label=arm, lw=2)
        low, high = ([one[end] for one in some] for end in ("low", "high"))
        over.fill_between(range(len(names)), low, high, alpha=0.2, color=f"C{number}", lw=0)
        ratios = [entries[f"{arm}, {LAST}"][f"{name}: loss"]["ratio"] for name in (*CATEGORIES, "all")]
        places = np.arange(len(ratios)) + (number - (len(arms) - 1) / 2) * 0.8 / len(arms)
        by.bar(places, [100 * (ratio - 1) for ratio in ratios], 0.8 / len(arms), color=f"C{number}", label=arm)
    over.set_yscale("log")
    most = max(one["all: loss"]["high"] for one in entries.values())
    over.set_ylim(0.93 * floor, 1.15 * most)
    ticks = [tick for tick in (0.5, 0.6, 0.8, 1, 1.5, 2, 3, 4, 6, 8) if 0.93 * floor < tick < 1.15 * most]
    over.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    over.minorticks_off()
    over.set_xticks(range(len(stages)), [stage.replace("-", "\n") for stage in stages])
    over.set_xlabel("after stage")
    over.set_ylabel("loss on held-out text, nats a token")
    by.set_yscale("symlog", linthresh=2)
    by.axhspan(-2, 2, color="0.5", alpha=0.2, lw=0)
    by.axhline(0, lw=0.8, color="0.4")
    by.set_yticks([-2, 0, 2, 10, 100, 1000], ["-2 %", "0", "2 %", "10 %", "100 %", "1,000 %"])
    by.minorticks_off()
    by.set_ylim(-3, 8000)
    by.set_xticks(range(len(CATEGORIES) + 1), [*CATEGORIES, "all"], rotation=20)
    by.set_ylabel(f"loss after {LAST}, against before")
    for axes, columns in ((over, 1), (by, len(arms))):
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=8, loc="upper left", ncols=columns)
    figure.tight_layout()
    return png(figure)
