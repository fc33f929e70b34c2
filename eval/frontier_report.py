"""What `foveate frontier` prints and draws, and the tables of docs/frontier.md: all from its JSON."""

from collections.abc import Sequence
from typing import Any

from .report import plt, png
from .results import find
from .tables import markdown, with_interval

Results = dict[str, Any]
DENSE, FULL = "dense", "full"
CONTROLS = ("random", "lowest", "nothing", "random-of-tower", "random-of-video")
LESS_FULL, LESS_RANDOM = "exact_match less full", "exact_match less random"
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">")
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "navy")  # no grey
WITHIN = 0.1  # of the full accuracy: what is printed of the Pareto set


def _at(results: Results, curve: str, layer: int, keep: float, store: str = DENSE) -> Results | None:
    for point in results["points"]:
        if (point["curve"], point["layer"], point["keep"], point["store"]) == (curve, layer, keep, store):
            return point
    return None


def _full(results: Results, store: str = DENSE) -> Results:
    point = _at(results, FULL, 0, 1.0, store)
    assert point is not None
    return point


def _accuracy(point: Results) -> float:
    return find(point["results"], "exact_match")["value"]


def _random(results: Results, point: Results) -> Results | None:
    """The control that drops as many tokens in the same place."""
    before = "random-of-video" if point["curve"] in ("evs", "dycoke") else "random-of-tower"
    name = "random" if point["layer"] else before
    return _at(results, name, point["layer"], point["keep"])


def _points(entry: Results) -> str:
    """A difference in points of accuracy."""
    return f"{100 * entry['value']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"


def _part(value: float, whole: float) -> str:
    return f"{value / whole:.1%}" if whole else "none"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _setting(point: Results) -> str:
    if point["curve"] == FULL:
        return "nothing dropped"
    layer = f", K = {point['layer']}" if point["layer"] else ""
    return f"{point['curve']}{layer}, {point['keep']:.0%}"


def equivalent(entry: Results, margin: float) -> bool:
    """Whether a difference's 95 % interval lies within the margin, on both sides of nothing."""
    return -margin < entry["low"] and entry["high"] < margin


# Tables


def tables(results: Results) -> dict[str, str]:
    """By mark: the Pareto set, methods, stores, and methods × stores of a task."""
    task = results["task"]
    return {
        f"{task}-pareto": pareto_table(results),
        f"{task}-claims": claims_table(results),
        f"{task}-stores": stores_table(results),
        f"{task}-methods": methods_table(results),
        f"{task}-both": both_table(results),
    }


def pareto_of(results: Results) -> list[Results]:
    """The Pareto set chosen by the dev split, the most accurate there first; controls among it."""
    return sorted((one for one in results["points"] if one["pareto"]), key=lambda one: -one["dev"])


def pareto_table(results: Results) -> str:
    full = _accuracy(_full(results))
    rows = []
    for one in pareto_of(results):
        found = find(one["results"], "exact_match")
        rows.append([
            _setting(one), one["store"], f"{one['flops']:.2f}", f"{one['kv_bytes'] / 1e3:.1f}", f"{one['dev']:.3f}",
            with_interval(found), _part(found["value"], full), "yes" if one["pareto_by_test"] else "",
        ])  # fmt: skip
    header = ["method", "KV store", "FLOPs", "KV kB", "dev", "test", "of full", "on test, too"]
    return markdown(header, rows)


def claims_table(results: Results) -> str:
    claims = results["claims"]
    rows = []
    for one in claims["results"]:
        form = with_interval(one, ".1%") if one["unit"] == "ratio" else _points(one)
        rows.append([one["name"], form, f"p {_p(one['p'])}" if "p" in one else ""])
    return markdown([claims["best"], "95 % interval", "McNemar"], rows)


def stores_table(results: Results) -> str:
    """Of each store what it holds, and what it changes without and with the best pruning method."""
    rows = []
    for entry in [{"store": DENSE, "results": []}, *results["claims"]["stores"]]:
        point = _full(results, entry["store"])
        cells = [
            _told(entry["store"], results["stores"][entry["store"]]), f"{point['kv_bytes'] / 1e3:.1f}",
            f"{point['bits']:.1f}", f"{point['held']:.0%}", f"{point['packed']:.0%}",
            with_interval(find(point["results"], "exact_match")),
        ]  # fmt: skip
        if entry["results"]:
            alone, best = (find(entry["results"], name) for name in ("nothing dropped", "best method"))
            inside = [equivalent(one, results["margin"]) for one in (alone, best)]
            cells += [_points(alone), _points(find(entry["results"], "words, nothing dropped")), _points(best)]
            cells.append("both" if all(inside) else "first" if inside[0] else "second" if inside[1] else "")
        rows.append(cells + [""] * (10 - len(cells)))
    header = ["KV store", "kB", "bits", "held", "packed", "answers right", "against dense", "words, against dense",
              "with the best method", f"within ±{100 * results['margin']:g} point"]  # fmt: skip
    return markdown(header, rows)


def _told(store: str, text: str) -> str:
    return f"`{text}`" if store == text else f"{store}: `{text}`"


def methods_table(results: Results) -> str:
    """With the dense store: every method at every budget."""
    rows = []
    for one in results["points"]:
        if one["store"] != DENSE or (one["curve"] in CONTROLS and one["curve"] != "nothing"):
            continue
        words, exact = (find(one["results"], name) for name in ("word_accuracy", "exact_match"))
        control = _random(results, one) if one["curve"] not in (FULL, "nothing") else None
        cells = [_setting(one), f"{one['visual_tokens']:.1f}", f"{one['flops']:.2f}", f"{one['kv_bytes'] / 1e3:.1f}",
                 with_interval(exact), with_interval(words)]  # fmt: skip
        less = [each for each in one["results"] if each["name"] == LESS_FULL]
        cells.append(_points(less[0]) if less else "")
        if control is not None:
            above = find(one["results"], LESS_RANDOM)
            cells += [f"{_accuracy(control):.3f}", _points(above), _p(one["holm"][LESS_RANDOM])]
        rows.append(cells + [""] * (10 - len(cells)))
    header = ["method", "visual tokens", "FLOPs", "KV kB", "answers right", "words right", "against full", "random",
              "against random", "p (Holm)"]  # fmt: skip
    return markdown(header, rows)


def both_table(results: Results) -> str:
    """Answers right of methods × stores, at the budget of the best method."""
    stores = list(results["stores"])
    keep = next(one["keep"] for one in results["points"] if one["name"] == results["claims"]["best"])
    rows = []
    for one in results["points"]:
        if one["store"] != DENSE or one["curve"] in CONTROLS or one["keep"] not in (keep, 1.0):
            continue
        same = [_at(results, one["curve"], one["layer"], one["keep"], store) for store in stores]
        rows.append([_setting(one), *(f"{_accuracy(point):.3f}" if point else "" for point in same)])
    return markdown(["answers right", *stores], rows)


# What is printed


def lines(results: Results) -> list[str]:
    """The Pareto set and what the tests say."""
    full = _accuracy(_full(results))
    found = pareto_of(results)
    chosen = [one for one in found if one["curve"] not in CONTROLS]
    controls = [one["name"] for one in found if one["curve"] in CONTROLS]
    near = [one for one in chosen if _accuracy(one) >= (1 - WITHIN) * full]
    told = [
        f"Pareto set (accuracy of whole answers, FLOPs, KV bytes): {len(chosen)} of "
        f"{sum(one['curve'] not in CONTROLS for one in results['points'])} settings, chosen by "
        f"{results['questions']['dev']} dev questions a model, within {100 * results['margin']:g} point; "
        f"{sum(one['pareto_by_test'] for one in chosen)} of them by the test questions, too.",
        f"controls in it: {', '.join(controls) or 'none'}",
        f"{len(near)} of them keep {1 - WITHIN:.0%} of the full accuracy on test questions:",
    ]
    for one in near:
        seen = with_interval(find(one["results"], "exact_match"))
        costs = f"FLOPs {one['flops']:.2f}  KV {one['kv_bytes'] / 1e3:6.1f} kB"
        told.append(f"  {one['name']:<48} {seen}  {_part(_accuracy(one), full):>6} of full  {costs}")
    claims = results["claims"]
    told.append(f"best method by dev at its budget: {claims['best']}")
    for one in claims["results"]:
        form = with_interval(one, ".1%") if one["unit"] == "ratio" else f"{_points(one)} points"
        told.append(f"  {one['name']}: {form}" + (f", p {_p(one['p'])}" if "p" in one else ""))
    for entry in claims["stores"]:
        alone = find(entry["results"], "nothing dropped")
        verdict = "within" if equivalent(alone, results["margin"]) else "not within"
        told.append(
            f"  {entry['store']}, nothing dropped: {_points(alone)} points against dense, {verdict} "
            f"±{100 * results['margin']:g}"
        )
    for which, count in results["tests"].items():
        told.append(
            f"{which}: {count['tests']} tests, after Holm's correction {count['higher']} surely higher, "
            f"{count['lower']} surely lower"
        )
    return told


# The picture


def picture(results: Results) -> bytes:
    """A PNG: answers right over FLOPs and over KV bytes; a colour a method, a marker a store, the Pareto set outlined.

    Controls are grey. Bars are 95 % intervals (Wilson).
    """
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), sharey=True)
    stores = {store: MARKERS[number % len(MARKERS)] for number, store in enumerate(results["stores"])}
    curves = list(dict.fromkeys(one["curve"] for one in results["points"] if one["curve"] not in CONTROLS))
    colours = {FULL: "black"} | dict(zip([one for one in curves if one != FULL], COLOURS, strict=False))
    groups: dict[tuple[bool, bool, str, str], list[Results]] = {}
    for one in results["points"]:
        place = (one["curve"] not in CONTROLS, one["pareto"], one["curve"], one["store"])
        groups.setdefault(place, []).append(one)
    for axes, x in zip(panels, ("flops", "kv_bytes"), strict=True):
        for (_, is_chosen, curve, store), some in sorted(groups.items()):
            colour = colours.get(curve, "0.75")
            at = [one[x] / (1e3 if x == "kv_bytes" else 1) for one in some]
            found = [find(one["results"], "exact_match") for one in some]
            values = [one["value"] for one in found]
            bars = [[one["value"] - one["low"] for one in found], [one["high"] - one["value"] for one in found]]
            axes.errorbar(at, values, bars, fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.6)
            style = {"edgecolors": "black" if is_chosen else "none", "linewidths": 1.4 if is_chosen else 0}
            axes.scatter(at, values, 50 if is_chosen else 18, color=colour, marker=stores[store], zorder=2, **style)
        full = _accuracy(_full(results))
        axes.axhline(full, ls=":", lw=1, color="0.4")
        axes.axhline((1 - WITHIN) * full, ls="--", lw=1, color="0.7")
        axes.grid(alpha=0.3)
    panels[0].set_xlabel("FLOPs of the LLM's prefill, against nothing dropped")
    panels[1].set_xlabel("kB of a prompt's KV cache at the end of prefill, as allocated")
    panels[1].set_xscale("log")
    ticks = _ticks([one["kv_bytes"] / 1e3 for one in results["points"]])
    panels[1].set_xticks(ticks, [str(tick) for tick in ticks])
    panels[1].minorticks_off()
    panels[0].set_ylabel("answers right, test questions")
    panels[0].set_ylim(-0.02, 1.02)
    legend = [
        plt.Line2D([], [], marker="o", ls="", color=colour, label="nothing dropped" if curve == FULL else curve)
        for curve, colour in colours.items()
    ]
    legend.append(plt.Line2D([], [], marker="o", ls="", color="0.75", label="controls"))
    legend += [plt.Line2D([], [], marker=m, ls="", color="0.4", label=store) for store, m in stores.items()]
    outline: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": "black", "markeredgewidth": 1.4}
    legend.append(plt.Line2D([], [], marker="o", ls="", label="Pareto set, chosen by dev", **outline))
    figure.legend(handles=legend, fontsize=8, ncols=6, loc="lower center")
    figure.suptitle(
        f"{results['task']}: {results['models']} model{'s' if results['models'] > 1 else ''}, "
        f"{results['questions']['test']} questions each; dashed: {1 - WITHIN:.0%} of full",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    return png(figure)


def _ticks(values: Sequence[float]) -> list[int]:
    """Round numbers within the values' range."""
    every = [1, 2, 5, 10, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000, 2000, 5000, 10000]
    return [one for one in every if min(values) * 0.9 <= one <= max(values) * 1.1]
