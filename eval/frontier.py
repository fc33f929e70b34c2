"""Accuracy over prefill FLOPs and KV cache bytes, of pruning methods × budgets × KV stores: `foveate frontier`.

Everything is asked the same questions. What is chosen (each method's layer K, the Pareto set, the best method) is
chosen by answers to the dev split's questions; what is told of it is measured on the test split's (docs/frontier.md).
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..vlm.cache.parse import KVSpec, parse_kv
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.processor import FoveateProcessor
from .facts import result, run_facts
from .frontier_report import CONTROLS, DENSE, LESS_FULL, LESS_RANDOM, lines, picture
from .frontier_tasks import TASKS, Answered, Batch, answers, batches
from .prune import AFTER_TOWER, FULL, IN_LLM, KEEPS, Setting, llm_settings
from .statistics import RESAMPLES, holm, mcnemar, newcombe_interval, wilson_interval

OF_VIDEO = ("evs", "dycoke")
PRUNERS = (*IN_LLM, *AFTER_TOWER, *OF_VIDEO)
NOTHING, RANDOM, LOWEST = "nothing", "random", "lowest"  # controls
# Prompts here have 23 to 71 tokens: nothing is left in full precision but what does not fill a group of 4.
EACH = "keys_per=token,group=1,residual=0"
STORES = {
    DENSE: "dense",
    "int8": f"int8:{EACH}",
    "int8 keys, int4 values": f"int4:keys=8,{EACH}",
    "int4": f"int4:{EACH}",
    "int4, keys by channel": "int4:hadamard=true,group=4,residual=0",
    "int2, keys by channel": "int2:hadamard=true,group=4,residual=0",
    "snapkv 75% in int4": f"snapkv:keep=0.75,window=7+int4:{EACH}",
}
MARGIN = 0.01  # of accuracy: what is surely less than so much worse counts as as good
BUDGET = 0.25  # fraction of the visual tokens at which the best method is chosen
ENOUGH = {0.5: 0.98, 0.25: 0.93}  # of the full accuracy that a K must keep with a fraction of the tokens
DEV, TEST, CLAIMS = "dev", "test", "claims"  # questions: for choosing, of every setting, and of what is claimed
Key = tuple[str, int, float, str]  # curve, layer, keep, store


# What is measured


def grid(
    layers: Mapping[str, int], visual: int, frame: int, before_llm: Sequence[str], keeps: Sequence[float] = KEEPS
) -> list[Setting]:
    """Every method at every budget, nothing dropped, and the controls.

    Args:
        layers: K of each method inside the LLM.
        visual: tokens of a prompt.
        frame: tokens of a frame, of videos.
        before_llm: methods before the LLM.
        keeps: fractions of the visual tokens.
    """
    made = [FULL, *(Setting(NOTHING, 0.0, f"fastv:layer={k},keep=0", k) for k in sorted({*layers.values()}))]
    for keep in keeps:
        for layer in sorted({*layers.values()}):
            made += [one for one in llm_settings(layer, keep, visual) if layers.get(one.curve) == layer]
            made += [Setting(name, keep, f"{name}:layer={layer},keep={keep}", layer) for name in (RANDOM, LOWEST)]
        for name in before_llm:
            if name != "dycoke":
                made.append(Setting(name, keep, f"{name}:keep={keep}"))
            elif (kept := _dycoke(keep, frame)) is not None:
                made.append(Setting(name, keep, f"{name}:keep={kept:g}"))
        for name in sorted({_random_of(name) for name in before_llm}):
            made.append(Setting(name, keep, f"{name}:keep={keep}"))
    return made


def _dycoke(keep: float, frame: int) -> float | None:
    """DyCoke's `keep` for a fraction of a video's tokens, as it keeps the first of four frames whole; None: can't be.

    Of frames of one token it keeps all others or none, so there only a quarter.
    """
    others = round((4 * keep - 1) / 3, 6)
    return others if others == 0 or (others > 0 and frame > 1) else None


def _random_of(name: str) -> str:
    return "random-of-video" if name in OF_VIDEO else "random-of-tower"


def control_of(setting: Setting) -> tuple[str, int, float] | None:
    """Curve, layer and fraction of the control that drops as many tokens in the same place, any of them."""
    if setting.curve in PRUNERS:
        return (RANDOM if setting.layer else _random_of(setting.curve)), setting.layer, setting.keep
    return None


@dataclass(frozen=True)
class Point:
    """What a setting with a KV store came to, all models together.

    Attributes:
        setting, store: what it is.
        seeds: what each model answered.
    """

    setting: Setting
    store: str
    seeds: tuple[Answered, ...]

    @property
    def key(self) -> Key:
        return self.setting.curve, self.setting.layer, self.setting.keep, self.store

    @property
    def name(self) -> str:
        return point_name(*self.key)

    @property
    def exact(self) -> np.ndarray:
        """Whether each answer is right, bool [questions of all models]."""
        return np.concatenate([one.exact for one in self.seeds])

    @property
    def accuracy(self) -> float:
        """Of whole answers."""
        return float(self.exact.mean())

    @property
    def words(self) -> list[np.ndarray]:
        """Of each model, part of each answer's words that are right."""
        return [np.divide(one.right, one.words) for one in self.seeds]

    def mean(self, name: str) -> float:
        return float(np.mean([getattr(one, name) for one in self.seeds]))

    @property
    def flops(self) -> float:
        """Of the LLM's prefill, against nothing dropped."""
        return round(self.mean("flops") / self.mean("full_flops"), 6)

    @property
    def kv_bytes(self) -> float:
        return round(self.mean("kv_bytes"), 2)


def point_name(curve: str, layer: int, keep: float, store: str) -> str:
    """For people: `fastv, K = 3, 25%, int4`."""
    if curve == FULL.curve:
        return f"nothing dropped, {store}"
    return f"{curve}{f', K = {layer}' if layer else ''}, {keep:.0%}, {store}"


class Asked:
    """A model with its questions, and what it has answered before.

    Args:
        number: of the model, from 0 on: each has questions of its own.
        counts: how many questions, by `DEV`, `TEST` and `CLAIMS`; those of the last two are of the test split.
        folder: for the answers.
    """

    def __init__(
        self,
        model: FoveateForConditionalGeneration,
        processor: FoveateProcessor,
        task: str,
        number: int,
        counts: Mapping[str, int],
        frames: int,
        folder: Path,
    ):
        self.model, self.processor, self.task, self.number = model, processor, task, number
        self.counts, self.frames, self.folder = counts, frames, folder
        self.weights = _fingerprint(model)
        self._batches: dict[str, list[Batch]] = {}

    def batches(self, split: str) -> list[Batch]:
        """Made at the first need."""
        if split not in self._batches:
            of_split = TEST if split == CLAIMS else split
            items = list(TASKS[self.task].items(self.counts[split], of_split, self.number, self.frames))
            self._batches[split] = batches(self.model, self.processor, items)
        return self._batches[split]

    def answers(self, split: str, setting: Setting, stores: Mapping[str, str]) -> dict[str, Answered]:
        """Of each KV store, or what was written to the folder of the same before."""
        name = re.sub("[^a-z0-9.+=]+", "-", f"{setting.curve} layer {setting.layer} {setting.keep:g}".lower())
        file = self.folder / f"model-{self.number}" / split / f"{name}.json"
        asked = {"setting": asdict(setting), "questions": self.counts[split], "frames": self.frames}
        asked |= {"task": self.task, "weights": self.weights}
        done = json.loads(file.read_text()) if file.exists() else {}
        if {name: done.get(name) for name in asked} != asked:
            done = asked | {"stores": {}}
        missing = {store: text for store, text in stores.items() if done["stores"].get(store, {}).get("kv") != text}
        if missing:
            specs: dict[str, KVSpec] = {store: parse_kv(text) for store, text in missing.items()}
            for store, found in answers(self.model, self.processor, self.batches(split), setting.method, specs).items():
                done["stores"][store] = {"kv": missing[store], "answered": asdict(found)}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(done))
        told = {store: done["stores"][store]["answered"] for store in stores}
        return {store: from_json(one) for store, one in told.items()}


def from_json(content: dict[str, Any]) -> Answered:
    """What `dataclasses.asdict` was given."""
    return Answered(**content | {name: tuple(content[name]) for name in ("right", "words", "exact")})


def _fingerprint(model: FoveateForConditionalGeneration) -> str:
    """Of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def measure(
    asked: Sequence[Asked], split: str, settings: Sequence[Setting], stores: Mapping[str, str], console: Console
) -> list[Point]:
    """Every setting with every KV store; controls with the dense one alone, which is to their advantage."""
    points = []
    for setting in settings:
        own = {DENSE: stores[DENSE]} if setting.curve in CONTROLS else stores
        found = [one.answers(split, setting, own) for one in asked]
        some = [Point(setting, store, tuple(of_model[store] for of_model in found)) for store in own]
        told = "  ".join(f"{point.store} {point.accuracy:.3f}" for point in some)
        name = point_name(*some[0].key[:3], DENSE).removesuffix(f", {DENSE}")
        console.print(f"{split:>6}  {name:<26} FLOPs {some[0].flops:.2f}  {told}", highlight=False, soft_wrap=True)
        points += some
    return points


# What is chosen


def choose_layers(points: Sequence[Point]) -> dict[str, int]:
    """K of each method inside the LLM: the smallest layer at which it keeps enough of the full accuracy (`ENOUGH`).

    Where there is none, the one at which it keeps most with the smallest fraction of the tokens.
    """
    full = next(point.accuracy for point in points if point.setting == FULL)
    kept: dict[str, dict[int, dict[float, float]]] = {}
    for point in points:
        if point.setting != FULL:
            of_layer = kept.setdefault(point.setting.curve, {}).setdefault(point.setting.layer, {})
            of_layer[point.setting.keep] = point.accuracy / full if full else 0.0
    layers = {}
    for curve, by_layer in kept.items():
        enough = [k for k, parts in by_layer.items() if all(parts[keep] >= least for keep, least in ENOUGH.items())]
        layers[curve] = min(enough) if enough else max(by_layer, key=lambda k: by_layer[k][min(ENOUGH)])
    return layers


def pareto(
    costs: Sequence[tuple[float, float]], accuracies: Sequence[float], as_good: Callable[[int, int], bool]
) -> list[int]:
    """The points that no point of the set makes superfluous, by being as cheap in both costs and as good.

    Points are taken by rising cost, so each that is left out is made superfluous by one that is in: `as_good` need not
    be transitive. Where costs are the same the most accurate, or else the first, point is taken for all of them.

    Args:
        costs: of each point.
        accuracies: of each point.
        as_good: whether the first point is as good as the second, as far as is known.

    Returns:
        Their numbers, by rising first cost.
    """
    kept: list[int] = []
    for one in sorted(range(len(costs)), key=lambda i: (*costs[i], -accuracies[i], i)):
        if not any(costs[k] == costs[one] or (costs[k][1] <= costs[one][1] and as_good(k, one)) for k in kept):
            kept.append(one)
    return kept


def pareto_points(points: Sequence[Point], margin: float = MARGIN) -> list[int]:
    """Numbers of the points of the Pareto set in FLOPs, KV bytes and accuracy of whole answers, controls among them.

    As good is what is surely less than `margin` worse: the paired difference's 95 % interval (Newcombe 1998) lies above
    -`margin`. So noise leaves points in the set, and never takes one out. A method's point that is not surely more
    accurate than its control is no candidate: the control is.
    """
    exact = np.stack([point.exact for point in points]).astype(np.float64)
    both = (exact @ exact.T).round().astype(int)
    right, n = both.diagonal(), exact.shape[1]

    def least(one: int, other: int) -> float:
        """By how much the first point is more accurate than the second, at least."""
        shared = int(both[one, other])
        return newcombe_interval(shared, int(right[one]) - shared, int(right[other]) - shared, n)[0]

    places = {point.key: number for number, point in enumerate(points)}
    able = []
    for number, point in enumerate(points):
        control = control_of(point.setting)
        if control is None or least(number, places[*control, DENSE]) > 0:
            able.append(number)
    kept = pareto(
        [(points[one].flops, points[one].kv_bytes) for one in able],
        [points[one].accuracy for one in able],
        lambda one, other: least(able[one], able[other]) > -margin,
    )
    return [able[one] for one in kept]


# What is told


def resampled(values: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Bootstrap means [resamples, points] (Efron 1979): questions are drawn anew within each model, for all points.

    Args:
        values: of each model, [points, questions].
    """
    rng = np.random.default_rng(seed)
    means = np.zeros((resamples, values[0].shape[0]))
    for of_model in values:
        n = of_model.shape[1]
        for start in range(0, resamples, 500):
            counts = rng.multinomial(n, np.full(n, 1 / n), size=min(500, resamples - start))
            means[start : start + len(counts)] += counts @ of_model.T / n / len(values)
    return means


class Board:
    """Points on the same questions, and how they differ; each by its key."""

    def __init__(self, points: Sequence[Point]):
        self.points = {point.key: point for point in points}
        self.place = {key: number for number, key in enumerate(self.points)}
        models = range(len(points[0].seeds))
        words = [np.stack([point.words[m] for point in points]) for m in models]
        exact = [np.stack([np.asarray(point.seeds[m].exact, np.float64) for point in points]) for m in models]
        self.resampled = {"word_accuracy": resampled(words), "exact_match": resampled(exact)}
        self.values = {
            "word_accuracy": np.mean([one.mean(1) for one in words], axis=0),
            "exact_match": np.mean([one.mean(1) for one in exact], axis=0),
        }
        self.n = sum(one.shape[1] for one in exact)

    def bootstrap(
        self, name: str, value: str, statistic: Callable[..., Any], *keys: Key, unit: str = "fraction"
    ) -> dict[str, Any]:
        """A result with its interval: a statistic of the means of `value` at these points."""
        places = [self.place[key] for key in keys]
        low, high = np.quantile(statistic(*(self.resampled[value][:, place] for place in places)), [0.025, 0.975])
        seen = float(statistic(*(self.values[value][place] for place in places)))
        return _result(name, seen, unit, self.n, min(low, seen), max(high, seen))

    def difference(self, name: str, one: Key, other: Key) -> dict[str, Any]:
        """Whole answers at a point less those at another, with McNemar's p."""
        paired = mcnemar(self.points[one].exact.tolist(), self.points[other].exact.tolist())
        told = _result(name, paired.difference, "fraction", paired.n, paired.low, paired.high)
        return told | {"p": float(f"{paired.p:.3g}")}


def _result(name: str, value: float, unit: str, n: int, low: float, high: float) -> dict[str, Any]:
    return result(name, *(round(value, 5), unit, n), low=round(low, 5), high=round(high, 5))


def as_json(
    test: Sequence[Point], dev: Sequence[Point], claimed: Sequence[Point], stores: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that is told, but for the facts of the run.

    Args:
        test, dev: the same settings.
        claimed: those that `best_and_controls` gives by dev, of more questions.
        stores: KV caches as text, by name.
    """
    board, tried = Board(test), {point.key: point for point in dev}
    full = (FULL.curve, FULL.layer, FULL.keep, DENSE)
    chosen = {dev[number].key for number in pareto_points(dev)}
    by_test = {test[number].key for number in pareto_points(test)}
    points: list[dict[str, Any]] = []
    for key, point in board.points.items():
        correct = int(point.exact.sum())
        low, high = wilson_interval(correct, board.n)
        results = [
            board.bootstrap("word_accuracy", "word_accuracy", lambda mean: mean, key),
            _result("exact_match", correct / board.n, "fraction", board.n, low, high),
        ]
        if key != full:
            results.append(board.difference(LESS_FULL, key, full))
        if (control := control_of(point.setting)) is not None:
            results.append(board.difference(LESS_RANDOM, key, (*control, DENSE)))
        points.append({
            "name": point.name, "curve": key[0], "layer": key[1], "keep": key[2], "store": key[3],
            "method": point.setting.method, "visual_tokens": round(point.mean("visual"), 3), "flops": point.flops,
            "kv_bytes": point.kv_bytes, "bits": round(point.mean("bits"), 3), "held": round(point.mean("held"), 4),
            "packed": round(point.mean("packed"), 4), "by_model": [round(sum(s.exact) / len(s.exact), 4) for s in
            point.seeds], "dev": round(tried[key].accuracy, 5), "pareto": key in chosen, "pareto_by_test":
            key in by_test, "results": results,
        })  # fmt: skip
    tests = {
        which: _holm([one for one in points if one["curve"] not in CONTROLS], which)
        for which in (LESS_FULL, LESS_RANDOM)
    }
    return {
        "stores": dict(stores),
        "full_flops": round(test[0].mean("full_flops")),
        "margin": MARGIN,
        "tests": tests,
        "claims": _claims(Board(claimed), dev, stores),
        "points": points,
    }


def _holm(points: Sequence[dict[str, Any]], which: str) -> dict[str, int]:
    """Writes to each point its p adjusted for all tests of a kind (Holm 1979), and counts them."""
    tested = [(point, one) for point in points for one in point["results"] if one["name"] == which]
    adjusted = holm([one["p"] for _, one in tested])
    for (point, _), p in zip(tested, adjusted, strict=True):
        point.setdefault("holm", {})[which] = float(f"{p:.3g}")
    surely = [one["value"] for (_, one), p in zip(tested, adjusted, strict=True) if p < 0.05]
    return {"tests": len(tested), "higher": sum(v > 0 for v in surely), "lower": sum(v < 0 for v in surely)}


def best_and_controls(dev: Sequence[Point]) -> list[Setting]:
    """The best method at `BUDGET`, with a dense KV cache; its control; nothing dropped."""
    keeps = {point.setting.keep for point in dev if point.setting.curve in PRUNERS}
    keep = min(keeps, key=lambda one: abs(one - BUDGET))
    some = [p for p in dev if p.setting.curve in PRUNERS and (p.setting.keep, p.store) == (keep, DENSE)]
    best = max(some, key=lambda point: point.accuracy).setting
    control = control_of(best)
    [found] = {p.setting for p in dev if (p.setting.curve, p.setting.layer, p.setting.keep) == control}
    return [best, found, FULL]


def _claims(board: Board, dev: Sequence[Point], stores: Mapping[str, str]) -> dict[str, Any]:
    """Of the best method, and of each KV store without and with it."""
    at, control, full = ((one.curve, one.layer, one.keep) for one in best_and_controls(dev))
    own = (*at, DENSE)
    results = []
    for value in ("exact_match", "word_accuracy"):
        if board.resampled[value][:, board.place[*full, DENSE]].all():  # or else there is nothing to be a part of
            of_full = (own, (*full, DENSE))
            results.append(board.bootstrap(f"{value}: of full", value, lambda a, b: a / b, *of_full, unit="ratio"))
    results.append(board.difference(LESS_RANDOM, own, (*control, DENSE)))
    above = (own, (*control, DENSE))
    results.append(board.bootstrap("word_accuracy less random", "word_accuracy", lambda a, b: a - b, *above))
    packed = []
    for store in stores:
        if store == DENSE:
            continue
        told = [
            board.difference("nothing dropped", (*full, store), (*full, DENSE)),
            board.difference("best method", (*at, store), own),
            board.bootstrap("words, nothing dropped", "word_accuracy", lambda a, b: a - b,
                            (*full, store), (*full, DENSE)),
            board.bootstrap("words, best method", "word_accuracy", lambda a, b: a - b, (*at, store), own),
        ]  # fmt: skip
        packed.append({"store": store, "results": told})
    return {"best": point_name(*at, DENSE), "results": results, "stores": packed}


# The command


def check_names(pruners: Sequence[str], keeps: Sequence[float]) -> None:
    """Raises ValueError where there is no such method, or a fraction is out of range."""
    for name in pruners:
        if name not in PRUNERS:
            raise ValueError(f"prune is {name!r}; accepted: {', '.join(PRUNERS)}")
    for keep in keeps:
        if not 0 < keep < 1:
            raise ValueError(f"keep is {keep}; accepted: fractions between 0 and 1")


def run_frontier(
    models: Sequence[tuple[FoveateForConditionalGeneration, FoveateProcessor]],
    task: str,
    out: Path,
    n: int,
    console: Console,
    names: Sequence[str] = (),
    pruners: Sequence[str] = (),
    keeps: Sequence[float] = KEEPS,
    kv: Sequence[str] = (),
    frames: int = 64,
    n_dev: int | None = None,
    n_claims: int | None = None,
) -> dict[str, Any]:
    """Measures the grid, prints the Pareto set, and writes `frontier.json` and `frontier.png` in `out`.

    A run that was stopped goes on with what is not finished.

    Args:
        models: seeds of one recipe, each with its processor.
        task: one of `TASKS`.
        n: test questions of each model.
        names: of the models, for the command that is noted.
        pruners: of `PRUNERS`; all that apply to the task when empty.
        keeps: fractions of the visual tokens.
        kv: KV caches as `parse_kv` reads them, besides the dense one; `STORES` when empty.
        frames: of each clip, of the task `needles`.
        n_dev: questions of the dev split, of each model, for choosing; half as many as `n` when None.
        n_claims: test questions of each model, `n` when None, for the best method and the KV stores by themselves.

    Returns:
        What `frontier.json` has.

    Raises:
        ValueError: a name or fraction is wrong, a model is one of another task, or no method is left.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; accepted: {', '.join(TASKS)}")
    check_names(pruners, keeps)
    for _, processor in models:
        TASKS[task].check(processor)
    named = {text: store for store, text in STORES.items()}
    stores = {DENSE: "dense"} | {named.get(text, text): text for text in kv} if kv else STORES
    for text in stores.values():
        parse_kv(text)
    able = [*IN_LLM, *TASKS[task].before_llm]
    own = [name for name in pruners or able if name in able]
    if not own:
        raise ValueError(f"prune is {', '.join(pruners)}; accepted with the task {task}: {', '.join(able)}")
    counts = {DEV: max(1, n // 2) if n_dev is None else n_dev, TEST: n, CLAIMS: n if n_claims is None else n_claims}
    asked = [Asked(*model, task, number, counts, frames, out / "answers") for number, model in enumerate(models)]
    inside = [name for name in IN_LLM if name in own]
    visual, frame = asked[0].batches(DEV)[0].visual, asked[0].processor.tokens_per_frame()
    tried = [
        one
        for layer in range(1, models[0][0].config.text_config.num_hidden_layers)
        for keep in ENOUGH
        for one in llm_settings(layer, keep, visual)
        if one.curve in inside
    ]
    layers = choose_layers(measure(asked, DEV, [FULL, *tried], {DENSE: "dense"}, console)) if inside else {}
    settings = grid(layers, visual, frame, [name for name in own if name not in inside], keeps)
    dev = measure(asked, DEV, settings, stores, console)
    test = measure(asked, TEST, settings, stores, console)
    claimed = measure(asked, CLAIMS, best_and_controls(dev), stores, console)
    options = "".join(f" --prune {name}" for name in pruners) + "".join(f" --kv {text}" for text in kv)
    options += "" if tuple(keeps) == KEEPS else "".join(f" --keep {keep:g}" for keep in keeps)
    options += f" --frames {frames}" if task == "needles" else ""
    options += "".join(
        f" {name} {count}" for name, count in (("--n-dev", n_dev), ("--n-claims", n_claims)) if count is not None
    )
    facts = run_facts(f"foveate frontier {' '.join(names) or 'MODEL'} --task {task} --n {n} --out OUT{options}")
    told = {"task": task, "models": len(models), "questions": counts, "layers": layers}
    content = facts | told | as_json(test, dev, claimed, stores)
    out.mkdir(parents=True, exist_ok=True)
    write(content, out / "frontier.json")
    (out / "frontier.png").write_bytes(picture(content))
    for line in lines(content):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"results in {out / 'frontier.json'}, figure in {out / 'frontier.png'}", soft_wrap=True)
    return content


def write(content: dict[str, Any], file: Path) -> None:
    """JSON with a line for each point."""
    points = ",\n".join(f"  {json.dumps(point)}" for point in content["points"])
    rest = json.dumps({name: value for name, value in content.items() if name != "points"}, indent=1)
    file.write_text(f'{rest[:-2]},\n "points": [\n{points}\n ]\n}}\n', encoding="utf-8")
