"""Draws what `foveate bench parallel --json` printed: docs/parallel_costs.png and docs/parallel_balance.png.

foveate bench parallel --json > docs/results/bench_parallel_cpu.json
scripts/parallel_plots.py docs/results/bench_parallel_cpu.json docs
"""

import json
import sys
from pathlib import Path
from typing import Any

from foveate.eval.report import plt, png
from foveate.train.bench_parallel import RANKS, RINGS, TOKENS

LAYOUTS = {
    "ring_repeated": "ring, keys repeated", "ring_gqa": "ring", "ulysses_gqa": "Ulysses",
    "megatron_gqa": "Megatron CP + TP", "2d_repeated": "2-D, keys repeated",
}  # fmt: skip
Results = dict[str, dict[str, Any]]


def costs(results: Results) -> bytes:
    """A step of other layouts over one of 2-D attention, by ranks; a line for each length."""
    figure, panels = plt.subplots(1, len(LAYOUTS), figsize=(16, 4), layout="constrained")
    for axes, (layout, title) in zip(panels, LAYOUTS.items(), strict=True):
        for number, tokens in enumerate(TOKENS):
            of = [(ranks, results.get(f"step_P{ranks}_S{tokens // 1024}K_{layout}")) for ranks in RANKS]
            points = [(ranks, entry["ratio"]) for ranks, entry in of if entry]
            axes.plot(
                *zip(*points, strict=True), marker=".", color=plt.cm.viridis(number / 6), label=f"{tokens // 1024}K"
            )
        axes.axhline(1, color="0.6", lw=0.8, ls="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("ranks")
        axes.grid(alpha=0.3)
        if "repeated" in layout or "ring" in layout:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("step over one of 2-D attention")
    panels[0].legend(fontsize=8, title="tokens", title_fontsize=8)
    return png(figure)


def balance(results: Results) -> bytes:
    """Work of the busiest rank over the mean, and memory of a rank."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    layouts = {
        "contiguous": "contiguous",
        "row-zigzag": "zigzag of the row",
        "document-zigzag": "zigzag of each document",
    }
    _bars(panels[0], results, [(f"R = {r}", f"flops_{{}}_R{r}_mixture") for r in RINGS], layouts)
    panels[0].set_title("attention of the busiest row / mean, packs of documents", fontsize=9)
    splits = {"media": "as many images and videos", "frames": "as many images and frames", "cost": "by cost"}
    _bars(panels[1], results, [(f"P = {p}", f"tiles_by_{{}}_P{p}") for p in (4, 8, 32)], splits)
    panels[1].set_title("tiles of the busiest rank / mean, a few long videos", fontsize=9)
    panels[1].set_yscale("log", base=2)
    panels[1].yaxis.set_major_formatter("{x:g}")
    grids = {name.removeprefix("memory_"): entry["value"] / 1e6 for name, entry in results.items() if "memory_" in name}
    panels[2].bar([name.replace("_", "\n") for name in grids], list(grids.values()), color="C2")
    panels[2].set_title("peak of a rank's tensors in a step, MB", fontsize=9)
    for axes in panels:
        axes.grid(alpha=0.3, axis="y")
    return png(figure)


def _bars(axes: Any, results: Results, groups: list[tuple[str, str]], kinds: dict[str, str]) -> None:
    """Means with the least and the most, side by side for each group."""
    width = 0.8 / len(kinds)
    for number, (kind, label) in enumerate(kinds.items()):
        entries = [results[name.format(kind)] for _, name in groups]
        places = [place + (number - 1) * width for place in range(len(groups))]
        values = [entry["value"] for entry in entries]
        reach = [
            [entry["value"] - entry["low"] for entry in entries],
            [entry["high"] - entry["value"] for entry in entries],
        ]
        axes.bar(places, values, width, yerr=reach, label=label, error_kw={"lw": 0.8, "capsize": 2})
    axes.set_xticks(range(len(groups)), [name for name, _ in groups])
    axes.axhline(1, color="0.4", lw=0.8)
    axes.legend(fontsize=7)


if __name__ == "__main__":
    source, folder = map(Path, sys.argv[1:])
    entries = {entry["name"]: entry for entry in json.loads(source.read_text())["results"]}
    (folder / "parallel_costs.png").write_bytes(costs(entries))
    (folder / "parallel_balance.png").write_bytes(balance(entries))
