"""What the in-context learning experiment found: results, figure and tables of docs/in_context.md."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from .facts import result
from .report import png
from .results import find
from .statistics import bootstrap_interval, mcnemar, wilson_interval
from .tables import markdown, with_interval

SHOTS = 4  # at which arms are compared
ASKED = (("forced", "forced_choice"), ("free", "generated"))
COLOURS = {"interleaved": "#1b6ca8", "captions": "#c2571a"}
BEFORE = "before pictures"  # ends the names of what arms start from


def as_json(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Entries of a results file, from what `train.in_context.run_experiment` gives.

    Accuracies are of the seeds' questions together, with Wilson intervals; arms are compared on the same questions.
    """
    names = list(dict.fromkeys(one["arm"] for one in measured))
    by_arm = {name: [one for one in measured if one["arm"] == name] for name in names}
    return {
        "seeds": sorted({one["seed"] for one in measured}),
        "arms": [{"arm": name} | _arm(seeds) for name, seeds in by_arm.items()],
        "comparisons": [
            _compared(by_arm, first, second, kind) for first, second in _pairs(names) for kind in ("images", "classes")
        ],
    }


def _arm(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    points = []
    for place, point in enumerate(seeds[0]["points"]):
        entries = [_accuracy(name, [one["points"][place][field] for one in seeds]) for field, name in ASKED]
        points.append({key: point[key] for key in ("kind", "ways", "shots")} | {"results": entries})
    captions = [_accuracy(name, [one["captions"][name] for one in seeds]) for name in ("colour", "object")]
    losses = [np.array(one["text"]) for one in seeds]
    low, high = bootstrap_interval(lambda mean: mean, losses)
    each = [float(of_seed.mean()) for of_seed in losses]
    mean = float(np.mean(each))
    texts = result("text_loss", mean, "nats a token", sum(map(len, losses)), low=min(low, mean), high=max(high, mean))
    return {"points": points, "captions": {"results": captions}, "text": {"results": [texts | {"each": each}]}}


def _accuracy(name: str, bits: Sequence[str]) -> dict[str, Any]:
    """Of all seeds' questions together; `each` is one seed's."""
    right, n = sum(one.count("1") for one in bits), sum(map(len, bits))
    low, high = wilson_interval(right, n)
    each = [one.count("1") / len(one) for one in bits]
    return result(name, right / n, "fraction", n, low=low, high=high) | {"each": each}


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Arms that differ in one thing: what is read or whether the LLM is frozen or has induction."""
    changes = [("interleaved + captions", "captions"), (", 20 % text", ""), ("unfrozen", "frozen")]
    pairs = [(first, first.replace(there, instead)) for there, instead in changes for first in names if there in first]
    pairs += [(name, f"plain {name}") for name in names]
    return [(first, second) for first, second in pairs if second in names]


def _compared(by_arm: dict[str, list], first: str, second: str, kind: str) -> dict[str, Any]:
    answers = []
    for name in (first, second):
        points = [
            p for one in by_arm[name] for p in one["points"] if (p["kind"], p["shots"], p["ways"]) == (kind, SHOTS, 2)
        ]
        answers.append([bit == "1" for point in points for bit in point["forced"]])
    paired = mcnemar(*answers)
    entry = result("difference", paired.difference, "fraction", paired.n, low=paired.low, high=paired.high)
    return {"first": first, "second": second, "kind": kind, "shots": SHOTS, "results": [entry | {"p": paired.p}]}


def point(arm: dict[str, Any], kind: str, shots: int = SHOTS, ways: int = 2) -> dict[str, Any]:
    """An arm's group of entries of one setting.

    Raises:
        KeyError: it was not measured.
    """
    for one in arm["points"]:
        if (one["kind"], one["shots"], one["ways"]) == (kind, shots, ways):
            return one
    raise KeyError(f"{arm['arm']}: {kind}, {shots} shots, {ways} ways was not measured")


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The page's tables by their marks."""
    arms = results["arms"]
    shots = [one["shots"] for one in arms[0]["points"] if one["kind"] == "images" and one["ways"] == 2]
    by_shots = [
        [
            arm["arm"],
            *(with_interval(find(point(arm, "images", number)["results"], "forced_choice")) for number in shots),
        ]
        for arm in arms
    ]
    return {
        "four-shots": markdown(
            ["arm", "held-out pictures", "seeds", "generated", "new classes, new names", "generated", "4 classes"],
            [_four(arm) for arm in arms],
        ),
        "by-shots": markdown(["arm", *(f"{number} shot{'s' * (number != 1)}" for number in shots)], by_shots),
        "kept": markdown(
            ["arm", "words, 4 shots", "caption: colour", "caption: object", "text loss"], map(_kept, arms)
        ),
        "comparisons": markdown(
            ["arm", "against", "difference", "p"],
            [
                _comparison(one)
                for one in results["comparisons"]
                if one["kind"] == "images" and "interleaved" in one["first"]
            ],
        ),
    }


def _four(arm: dict[str, Any]) -> list[str]:
    cells = [arm["arm"]]
    for kind in ("images", "classes"):
        entries = point(arm, kind)["results"]
        chosen = find(entries, "forced_choice")
        cells.append(with_interval(chosen))
        if kind == "images":
            cells.append(" / ".join(f"{value:.3f}" for value in chosen["each"]))
        cells.append(with_interval(find(entries, "generated")))
    return [*cells, with_interval(find(point(arm, "images", ways=4)["results"], "forced_choice"))]


def _kept(arm: dict[str, Any]) -> list[str]:
    words = find(point(arm, "words")["results"], "forced_choice")
    told = [with_interval(find(arm["captions"]["results"], name)) for name in ("colour", "object")]
    return [arm["arm"], with_interval(words), *told, with_interval(arm["text"]["results"][0])]


def _comparison(compared: dict[str, Any]) -> list[str]:
    entry = compared["results"][0]
    p = "< 0.0001" if entry["p"] < 1e-4 else f"{entry['p']:.4f}"
    return [compared["first"], compared["second"], with_interval(entry, "+.3f"), p]


def draw(results: dict[str, Any]) -> bytes:
    """PNG: accuracy over the number of examples, an LLM with induction and a plain one.

    Bands are 95 % intervals of all seeds' questions, dots the seeds.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for panel, plain in zip(panels, (False, True), strict=True):
        for arm in results["arms"]:
            name = arm["arm"]
            if name.startswith("plain") == plain and not name.endswith(BEFORE):
                _curve(panel, arm)
        panel.axhline(0.5, color="0.6", linewidth=1, linestyle=":")
        panel.set_title("LLM without induction" if plain else "LLM with induction", fontsize=10)
        panel.set_xlabel("examples of each of the two classes")
        panel.set_xticks(range(5), ["0", "1", "2", "4", "8"])
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("forced choice, held-out pictures")
    panels[0].set_ylim(0.4, 1.02)
    return png(figure)


def _curve(panel: Any, arm: dict[str, Any]) -> None:
    name = arm["arm"]
    points = [one for one in arm["points"] if one["kind"] == "images" and one["ways"] == 2]
    entries = [find(one["results"], "forced_choice") for one in points]
    colour = COLOURS["interleaved" if "interleaved" in name else "captions"]
    style = "--" if "unfrozen" not in name else "-"
    marker = "s" if "text" in name else "o"
    places = range(len(entries))
    panel.plot(places, [e["value"] for e in entries], style, marker=marker, color=colour, label=name, markersize=4)
    low, high = ([entry[side] for entry in entries] for side in ("low", "high"))
    panel.fill_between(places, low, high, color=colour, alpha=0.12)
    for place, entry in zip(places, entries, strict=True):
        panel.plot([place] * len(entry["each"]), entry["each"], ".", color=colour, alpha=0.5, markersize=3)
