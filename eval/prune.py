"""How much of its accuracy a model keeps when visual tokens are dropped: methods, controls, intervals, paired tests.

The questions, scores, tables and the picture of the experiment that `scripts/prune_curves.py` runs (docs/prune.md).
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.drawing import SPLITS
from ..data.glyphs import Question
from ..data.sorting import COLUMNS, ROWS, row_scene, sort_row
from ..vlm.cache.parse import KVSpec
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.parallel.inference import parallel_session
from ..vlm.parallel.topology import Topology
from ..vlm.processor import FoveateProcessor
from ..vlm.pruning import Prefill, parse_method, reduce
from ..vlm.pruning.costs import summary
from .facts import result
from .glyphs import Item, answer
from .report import plt, png
from .sharing import ALONE, joined, of_all_groups, own_part
from .statistics import bootstrap_interval, paired_p

IN_LLM = ("fastv", "sparsevlm", "sparsevlm+", "pyramiddrop")
AFTER_TOWER = ("visionzip", "fastervlm", "vtc-cls", "hired")
CONTROLS = ("random", "lowest")
KEEPS = (0.75, 0.5, 0.25, 0.1)  # fractions of the visual tokens
DRAWS = 3  # of the control `random`


def row_items(n: int, split: str = "test", seed: int = 0) -> list[Item]:
    """Questions that ask for a row sorted, each about its own scene; `cell` is the first of the row.

    Raises:
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}")
    items = []
    for index in range(n):
        rng = np.random.default_rng([23, seed, SPLITS.index(split), index])
        scene, row = row_scene(rng, split), int(rng.integers(ROWS))
        text, said = sort_row(scene, row)
        items.append(Item(Question("sort_row", text, "", said, row * COLUMNS), scene.picture))
    return items


@dataclass(frozen=True)
class Setting:
    """A point of a curve.

    Attributes:
        curve: its name.
        keep: the fraction of the visual tokens that is kept, 1 where nothing is dropped, 0 where all are.
        method: as `parse_method` reads it; empty where nothing is dropped.
        layer: K, the first layer that reads fewer visual tokens; 0 for methods after the tower.
        draw: number of the draw, where the method is random.
    """

    curve: str
    keep: float
    method: str = ""
    layer: int = 0
    draw: int = 0


FULL = Setting("full", 1.0)


def llm_settings(layer: int, keep: float, tokens: int) -> list[Setting]:
    """The methods inside the LLM, each with one stage at layer K and its published scores.

    Args:
        tokens: visual tokens of a question.
    """
    count = round(tokens * keep)
    methods = {
        "fastv": f"fastv:layer={layer},keep={keep}",
        "sparsevlm": f"sparsevlm:tokens={count},layers={layer - 1},per=0",
        "sparsevlm+": f"sparsevlm+:tokens={count},layers={layer - 1},per=0",
        "pyramiddrop": f"pyramiddrop:layers={layer},keep={keep}",
    }
    return [Setting(curve, keep, method, layer) for curve, method in methods.items()]


def settings(
    layers: Mapping[str, int], tokens: int, keeps: Sequence[float] = KEEPS, draws: int = DRAWS
) -> list[Setting]:
    """Everything that is measured: methods, controls at each method's layer, and what is left without visual tokens.

    FastV at layer 1, where the last token can't know yet what it was asked, is a control too.

    Args:
        layers: K of each method inside the LLM.
        tokens: visual tokens of a question.
    """
    made = [
        FULL,
        *(Setting("nothing", 0.0, f"fastv:layer={layer},keep=0", layer) for layer in sorted({*layers.values()})),
    ]
    for keep in keeps:
        for layer in sorted({1, *layers.values()}):
            made += [
                one
                for one in llm_settings(layer, keep, tokens)
                if layers.get(one.curve) == layer or (one.curve, layer) == ("fastv", 1)
            ]
            for draw in range(draws if layer > 1 else 1):
                made.append(Setting("random", keep, f"random:layer={layer},keep={keep},seed={draw}", layer, draw))
            made.append(Setting("lowest", keep, f"lowest:layer={layer},keep={keep}", layer))
        made += [Setting(name, keep, f"{name}:keep={keep}") for name in AFTER_TOWER]
    return made


@dataclass(frozen=True)
class Measured:
    """What a model with a seed answered in a setting.

    Attributes:
        right: of each question, how many of the answer's words are right, each at its place.
        words: of an answer.
        recall: part of the needed visual tokens, those of the row that is asked for, among the kept; mean.
        visual: visual tokens that a layer of the LLM processes, merged ones too; mean over layers and questions.
        flops: of the LLM's prefill, in relation to nothing dropped.
    """

    setting: Setting
    seed: int
    right: tuple[int, ...]
    words: int
    recall: float
    visual: float
    flops: float

    @property
    def accuracy(self) -> float:
        """Of words."""
        return sum(self.right) / len(self.right) / self.words

    @property
    def exact(self) -> float:
        """Answers without an error."""
        return sum(one == self.words for one in self.right) / len(self.right)

    def line(self) -> str:
        """What is printed of it."""
        return (
            f"seed {self.seed}  K {self.setting.layer}  {self.setting.curve:>11} {self.setting.keep:4.0%}  "
            f"words {self.accuracy:.3f}  answers {self.exact:.3f}  row kept {self.recall:.2f}  "
            f"visual tokens {self.visual:4.1f}  FLOPs {self.flops:.2f}"
        )


def measure(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    items: Sequence[Item],
    setting: Setting,
    seed: int,
    batch: int = 250,
    methods: Sequence[Any] | None = None,
    kv: KVSpec | None = None,
    topology: Topology = ALONE,
) -> Measured:
    """Generates the answers in a setting and compares them with the truth.

    Args:
        batch: questions at a time; under sequence parallelism one.
        methods: that drop visual tokens; the setting's when None.
        kv: how keys and values are kept; see `foveate.reduce`.
        topology: of the ranks, all of which call it; their sequence groups share the questions out.
    """
    if methods is None:
        methods = [parse_method(setting.method)] if setting.method else []
    reduction = reduce(model, *methods, kv=kv) if methods or kv else None
    said: list[str] = []
    with reduction or nullcontext():
        own, batch = own_part(items, topology), batch if parallel_session(model) is None else 1
        for start in range(0, len(own), batch):
            words = len(own[start].question.answer.split())
            said += answer(model, processor, own[start : start + batch], max_new_tokens=words + 1)
    said = joined(said, topology)
    words = len(items[0].question.answer.split())
    right = tuple(right_words(a, item.question.answer) for a, item in zip(said, items, strict=True))
    recall, visual, flops = 1.0, float(processor.tokens_per_image()), 1.0
    if reduction is not None and methods:
        cells = [item.question.cell or 0 for item in own]
        found = of_all_groups((reduction.prefills, cells), topology)
        prefills = [prefill for of_group, _ in found for prefill in of_group]
        recall = _recall(prefills, [cell for _, of_group in found for cell in of_group])
        visual, flops = _costs(model, prefills, methods)
    return Measured(setting, seed, right, words, recall, visual, flops)


def right_words(said: str, true: str) -> int:
    """How many words of the truth stand at their place in what was said."""
    return sum(a == b for a, b in zip(said.split(), true.split(), strict=False))


def _costs(
    model: FoveateForConditionalGeneration, prefills: Sequence[Prefill], methods: Sequence[Any]
) -> tuple[float, float]:
    """Visual tokens that a layer processes of a question, and FLOPs against nothing dropped."""
    costs = [summary(model.config, prefill, methods) for prefill in prefills]
    questions = sum(len(prefill.given) for prefill in prefills)
    visual = sum(cost.pruned.mean_visual for cost in costs) / questions
    return visual, sum(cost.pruned.flops for cost in costs) / sum(cost.full.flops for cost in costs)


def _recall(prefills: Sequence[Prefill], first: Sequence[int]) -> float:
    """Part of `COLUMNS` visual tokens from number `first[question]` on that the last stage kept; mean."""
    whole = [tuple(torch.arange(given) for given in prefill.given) for prefill in prefills]  # where nothing was dropped
    last = [
        prefill.stages[-1].kept if prefill.stages else all_of for prefill, all_of in zip(prefills, whole, strict=True)
    ]
    kept = [tokens for of_prefill in last for tokens in of_prefill]
    needed = [((tokens >= cell) & (tokens < cell + COLUMNS)).sum() for tokens, cell in zip(kept, first, strict=True)]
    return float(torch.stack(needed).float().mean() / COLUMNS)


def measure_once(
    folder: Path,
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    items: Sequence[Item],
    setting: Setting,
    seed: int,
) -> Measured:
    """`measure`, or what it has written to the folder before."""
    name = f"{setting.curve} {setting.keep:g} layer {setting.layer} draw {setting.draw}"
    file = folder / f"{re.sub('[^a-z0-9.+=]+', '-', name.lower())}.json"
    if file.exists():
        done = from_json(json.loads(file.read_text()))
        if (done.setting, done.seed, len(done.right)) == (setting, seed, len(items)):
            return done
    measured = measure(model, processor, items, setting, seed)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(measured)))
    return measured


def from_json(content: dict[str, Any]) -> Measured:
    """What `dataclasses.asdict` was given."""
    return Measured(**content | {"setting": Setting(**content["setting"]), "right": tuple(content["right"])})


# Intervals and tests


def per_question(measured: Iterable[Measured], value: Callable[[Measured], Sequence[float]]) -> list[np.ndarray]:
    """One curve's point: of each seed the questions' values, the mean over draws, [questions]."""
    of_seed = defaultdict(list)
    for one in measured:
        of_seed[one.seed].append(np.asarray(value(one), np.float64))
    return [np.mean(draws, axis=0) for _, draws in sorted(of_seed.items())]


def word_scores(measured: Measured) -> list[float]:
    """Part of each answer's words that are right."""
    return [one / measured.words for one in measured.right]


def exact_scores(measured: Measured) -> list[float]:
    """1 for an answer without an error, else 0."""
    return [float(one == measured.words) for one in measured.right]


# Results


def as_json(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One entry a curve, K and fraction, all seeds and draws together; see `facts.result`."""
    points = _points(measured)
    full = points[FULL.curve, FULL.layer, FULL.keep]
    return [_point(*at, some, full) for at, some in points.items()]


def _points(measured: Iterable[Measured]) -> dict[tuple[str, int, float], list[Measured]]:
    """By curve, K and fraction, in the order of first appearance."""
    points: dict[tuple[str, int, float], list[Measured]] = defaultdict(list)
    for one in measured:
        points[one.setting.curve, one.setting.layer, one.setting.keep].append(one)
    return dict(points)


def _point(
    curve: str, layer: int, keep: float, measured: Sequence[Measured], full: Sequence[Measured]
) -> dict[str, Any]:
    results = []
    for name, value in (("word_accuracy", word_scores), ("exact_match", exact_scores)):
        own, of_full = per_question(measured, value), _mean(per_question(full, value))
        low, high = bootstrap_interval(lambda mean: mean, own)
        n, ratio = sum(map(len, own)), _mean(own) / of_full if of_full else None
        results.append(result(name, _mean(own), "fraction", n, low=low, high=high, baseline="full", ratio=ratio))
    seeds = sorted({one.seed for one in measured})
    return {
        "curve": curve,
        "layer": layer,
        "keep": keep,
        "methods": sorted({one.setting.method for one in measured}),
        "visual_tokens": float(np.mean([one.visual for one in measured])),
        "flops": float(np.mean([one.flops for one in measured])),
        "recall": float(np.mean([one.recall for one in measured])),
        "seeds": {str(seed): float(np.mean([one.accuracy for one in measured if one.seed == seed])) for seed in seeds},
        "results": results,
    }


def _mean(of_seeds: Sequence[np.ndarray]) -> float:
    """The mean of the seeds' means."""
    return float(np.mean([values.mean() for values in of_seeds]))


def kept_and_tests(measured: Sequence[Measured], curve: str, layer: int) -> list[dict[str, Any]]:
    """What part of the full accuracy of words a method keeps, and how far it is above the controls at the same layer.

    `p` is that of `paired_p`; a difference's interval is of the paired bootstrap.
    """
    points = {at: per_question(some, word_scores) for at, some in _points(measured).items()}
    full = points[FULL.curve, FULL.layer, FULL.keep]
    told: list[dict[str, Any]] = []
    for keep in sorted({at[2] for at in points if at[:2] == (curve, layer)}, reverse=True):
        own = points[curve, layer, keep]
        n, name = sum(map(len, own)), f"{curve}, K = {layer}, {keep:.0%}"
        low, high = bootstrap_interval(lambda a, b: a / b, own, full)
        told.append(result(f"{name}: of full", _mean(own) / _mean(full), "ratio", n, low=low, high=high))
        for control in CONTROLS:
            other = points[control, layer, keep]
            low, high = bootstrap_interval(lambda a, b: a - b, own, other)
            above = result(f"{name}: above {control}", _mean(own) - _mean(other), "fraction", n, low=low, high=high)
            told.append(above | {"p": paired_p(own, other)})
    return told


def choose(
    dev: Sequence[Measured], kept: dict[float, float] | None = None
) -> tuple[dict[str, int], str, list[dict[str, Any]]]:
    """K of each method inside the LLM, and the best of them, by answers of the validation split.

    A method's K is the smallest layer at which it keeps enough of the full accuracy of words; where there is none, the
    one at which it keeps most of it with the smallest fraction of visual tokens. The best method is the most accurate
    at its K, the mean over the fractions.

    Args:
        dev: nothing dropped, and methods at several layers and fractions.
        kept: fraction of visual tokens → what is enough; .98 at a half and .93 at a quarter by default.

    Returns:
        K by curve, the best curve, and what was compared.
    """
    kept = kept or {0.5: 0.98, 0.25: 0.93}
    parts: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)  # of full
    accuracies = {at: _mean(per_question(some, word_scores)) for at, some in _points(dev).items()}
    full = accuracies.pop((FULL.curve, FULL.layer, FULL.keep))
    for (curve, layer, keep), accuracy in accuracies.items():
        parts[curve, layer][keep] = accuracy / full
    enough = [at for at, by_keep in parts.items() if all(by_keep[keep] >= least for keep, least in kept.items())]
    layers: dict[str, int] = {}
    for curve in dict.fromkeys(curve for curve, _ in parts):
        own = [at for at in parts if at[0] == curve]
        good = [layer for name, layer in enough if name == curve]
        layers[curve] = min(good) if good else max(own, key=lambda at: parts[at][min(kept)])[1]
    best, _ = max(layers.items(), key=lambda at: sum(parts[at].values()))
    told = [
        {"curve": curve, "layer": layer, "keep": keep, "word_accuracy": part * full, "of_full": part}
        for (curve, layer), by_keep in parts.items()
        for keep, part in by_keep.items()
    ]
    return layers, best, told


def table(points: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each method at its K, a column for each fraction kept."""
    keeps = sorted({point["keep"] for point in points if 0 < point["keep"] < 1}, reverse=True)
    columns = ["method", "K", "visual tokens", "FLOPs", *(f"{keep:.0%}" for keep in keeps)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (curve, layer), some in _curves(points).items():
        name = {FULL.curve: "nothing dropped", "nothing": "every token dropped"}.get(curve, curve)
        visual, flops = (
            " / ".join(f"{p[key]:{form}}" for p in some) for key, form in (("visual_tokens", ".1f"), ("flops", ".2f"))
        )
        cells = [_cell(point) for point in some] + [""] * (len(keeps) - len(some))
        lines.append(f"| {' | '.join([name, str(layer or ''), visual, flops, *cells])} |")
    return "\n".join(lines)


def _cell(point: dict[str, Any]) -> str:
    words, exact = point["results"]
    interval = f"{words['low']:.3f} – {words['high']:.3f}"
    return f"**{words['value']:.3f}** ({interval}), {exact['value']:.3f}, {point['recall']:.2f}"


def _curves(points: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """By curve and K, most kept first; FastV and the controls at layer 1, and what acts after the tower, come last."""
    curves: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for point in sorted(points, key=_place):
        curves[point["curve"], point["layer"]].append(point)
    return dict(curves)


def _place(point: dict[str, Any]) -> tuple[bool, int, int, float]:
    order = (FULL.curve, *IN_LLM, *CONTROLS, "nothing", *AFTER_TOWER)
    return point["layer"] == 1, order.index(point["curve"]), point["layer"], -point["keep"]


def dev_table(told: Sequence[dict[str, Any]]) -> str:
    """Markdown: what `choose` compared."""
    columns = sorted({(one["layer"], one["keep"]) for one in told}, key=lambda at: (at[0], -at[1]))
    lines = ["| of full | " + " | ".join(f"K = {layer}, {keep:.0%}" for layer, keep in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    values = {(one["curve"], one["layer"], one["keep"]): one["of_full"] for one in told}
    for curve in dict.fromkeys(one["curve"] for one in told):
        lines.append(f"| {curve} | " + " | ".join(f"{values[curve, *at]:.1%}" for at in columns) + " |")
    return "\n".join(lines)


def tests_table(tests: Sequence[dict[str, Any]]) -> str:
    """Markdown: what `kept_and_tests` gives, a row for each method, K and fraction."""
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for one in tests:
        name, _, what = one["name"].partition(": ")
        form = ".1%" if one["unit"] == "ratio" else "+.3f"
        cell = f"**{one['value']:{form}}** ({one['low']:{form}} – {one['high']:{form}})"
        rows[name][what] = cell + (f", p = {one['p']:.1g}" if "p" in one else "")
    columns = list(dict.fromkeys(what for row in rows.values() for what in row))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(row[c] for c in columns)} |" for name, row in rows.items())])


def tables(results: dict[str, Any]) -> dict[str, str]:
    """By mark; of docs/results/prune_curves.json."""
    return {
        "dev": dev_table(results["dev"]),
        "points": table(results["points"]),
        "tests": tests_table(results["tests"]),
    }


def picture(points: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: words right over the fraction kept inside the LLM, and of all methods over what they process."""
    figure, (inside, of_all) = plt.subplots(1, 2, figsize=(12.5, 5.2), sharey=True)
    by_curve = _curves(points)
    full = by_curve.pop((FULL.curve, FULL.layer))[0]["results"][0]["value"]
    for axes in (inside, of_all):
        axes.axhline(full, ls=":", lw=1, color="0.4", label="nothing dropped")
    colours = {curve: f"C{number}" for number, curve in enumerate((*IN_LLM, *CONTROLS, *AFTER_TOWER))}
    for (curve, layer), some in by_curve.items():
        if curve == "nothing":
            value = some[0]["results"][0]["value"]
            inside.axhline(value, ls=(0, (layer, 2)), lw=1, color="0.4", label=f"every token dropped at K = {layer}")
            continue
        line = {1: ":", 2: "--", 3: "-"}.get(layer, "-")
        label = f"{curve}, K = {layer}" if layer else f"{curve}, after the tower"
        style = {"color": colours[curve], "ls": line, "label": label, "lw": 1 if curve in CONTROLS else 2}
        if layer:
            _band(inside, [100 * point["keep"] for point in some], some, style)
        if curve != "lowest":
            _band(of_all, [point["visual_tokens"] for point in some], some, style)
    inside.set_xscale("log")
    inside.set_xticks([100 * keep for keep in KEEPS], [f"{keep:.0%}" for keep in KEEPS])
    inside.minorticks_off()
    inside.set_xlabel("visual tokens kept from layer K on")
    inside.set_ylabel("words right")
    of_all.set_xlabel("visual tokens that a layer processes, mean")
    inside.set_ylim(0, 1.02)
    for axes in (inside, of_all):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    figure.tight_layout()
    return png(figure)


def _band(axes: Any, x: Sequence[float], points: Sequence[dict[str, Any]], style: dict[str, Any]) -> None:
    words = [point["results"][0] for point in points]
    axes.plot(x, [one["value"] for one in words], marker=".", **style)
    low, high = ([one[end] for one in words] for end in ("low", "high"))
    axes.fill_between(x, low, high, alpha=0.15, color=style["color"], lw=0)
