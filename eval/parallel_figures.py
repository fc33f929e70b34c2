"""The pictures and tables of docs/parallel_costs.md, and the table of needles of docs/parallel.md."""

import re
from collections.abc import Iterator
from typing import Any

from .bench_tables import by_name
from .report import plt, png
from .tables import markdown

Results = dict[str, Any]  # a results file's content
Entries = dict[str, dict[str, Any]]  # by name
LAYOUTS = {
    "ring_repeated": "ring, keys repeated", "ring_gqa": "ring", "ulysses_gqa": "Ulysses",
    "megatron_gqa": "Megatron CP + TP", "2d_repeated": "2-D, keys repeated",
}  # fmt: skip
CUTS = {"contiguous": "contiguous", "row-zigzag": "zigzag of the row", "document-zigzag": "zigzag of each document"}
SPLITS = {
    "media": "as many images and videos each",
    "frames": "as many images and frames each",
    "cost": "contiguous by cost (ours)",
}


def costs(results: Results) -> bytes:
    """A PNG: a step of other layouts over one of 2-D attention, by ranks; a line for each length."""
    entries = by_name(results)
    ranks, lengths = _ranks(entries), _lengths(entries)
    figure, panels = plt.subplots(1, len(LAYOUTS), figsize=(16, 4), layout="constrained")
    for axes, (layout, title) in zip(panels, LAYOUTS.items(), strict=True):
        for number, length in enumerate(lengths):
            of = [(count, entries.get(f"step_P{count}_S{length}K_{layout}")) for count in ranks]
            points = [(count, entry["ratio"]) for count, entry in of if entry]
            axes.plot(*zip(*points, strict=True), marker=".", color=plt.cm.viridis(number / 6), label=f"{length}K")
        axes.axhline(1, color="0.6", lw=0.8, ls="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(count) for count in ranks])
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
    """A PNG: work of the busiest rank over the mean, and memory of a rank."""
    entries = by_name(results)
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    rings = _numbers(entries, r"flops_contiguous_R(\d+)_mixture")
    _bars(panels[0], entries, [(f"R = {r}", f"flops_{{}}_R{r}_mixture") for r in rings], CUTS)
    panels[0].set_title("attention of the busiest row / mean, packs of documents", fontsize=9)
    ranks = _numbers(entries, r"tiles_by_cost_P(\d+)")
    _bars(panels[1], entries, [(f"P = {p}", f"tiles_by_{{}}_P{p}") for p in ranks], SPLITS)
    panels[1].set_title("tiles of the busiest rank / mean, a few long videos", fontsize=9)
    panels[1].set_yscale("log", base=2)
    panels[1].yaxis.set_major_formatter("{x:g}")
    grids = {name.removeprefix("memory_"): entry["value"] / 1e6 for name, entry in entries.items() if "memory_" in name}
    panels[2].bar([name.replace("_", "\n") for name in grids], list(grids.values()), color="C2")
    panels[2].set_title("peak of a rank's tensors in a step, MB", fontsize=9)
    for axes in panels:
        axes.grid(alpha=0.3, axis="y")
    return png(figure)


def _bars(axes: Any, entries: Entries, groups: list[tuple[str, str]], kinds: dict[str, str]) -> None:
    """Means with the least and the most, side by side for each group."""
    width = 0.8 / len(kinds)
    for number, (kind, label) in enumerate(kinds.items()):
        of = [entries[name.format(kind)] for _, name in groups]
        places = [place + (number - 1) * width for place in range(len(groups))]
        reach = [[entry["value"] - entry["low"] for entry in of], [entry["high"] - entry["value"] for entry in of]]
        values = [entry["value"] for entry in of]
        axes.bar(places, values, width, yerr=reach, label=label, error_kw={"lw": 0.8, "capsize": 2})
    axes.set_xticks(range(len(groups)), [name for name, _ in groups])
    axes.axhline(1, color="0.4", lw=0.8)
    axes.legend(fontsize=7)


def cost_tables(results: Results) -> dict[str, str]:
    """By mark; of `bench parallel`."""
    entries = by_name(results)
    ranks, lengths = _ranks(entries), _lengths(entries)

    def steps(layout: str) -> str:
        """Steps of a layout over those of 2-D attention; the latter's seconds."""
        rows = []
        for count in ranks:
            of = (entries.get(f"step_P{count}_S{length}K_{layout}") for length in lengths)
            rows.append([str(count), *(_step(entry, seconds=layout == "2d_gqa") for entry in of)])
        return markdown(["ranks", *(f"{n}K" if n < 1024 else f"{n // 1024}M" for n in lengths)], rows)

    return {
        "memory": _memory_table(entries),
        "attention": _attention_table(entries),
        "tiles": markdown(
            ["ranks", *SPLITS.values()],
            (
                [str(ranks), *(_mean(entries[f"tiles_by_{split}_P{ranks}"]) for split in SPLITS)]
                for ranks in _numbers(entries, r"tiles_by_cost_P(\d+)")
            ),
        ),
        "2d": steps("2d_gqa"),
        "ring": steps("ring_gqa"),
        "ring repeated": steps("ring_repeated"),
        "ulysses": steps("ulysses_gqa"),
        "megatron": steps("megatron_gqa"),
        "rates": _rates_table(entries),
    }


def _step(entry: dict[str, Any] | None, seconds: bool) -> str:
    if entry is None:
        return "–"
    if not seconds:
        return f"{entry['ratio']:.2f}"
    value = entry["value"]
    digits = 3 if value < 0.9995 else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f} s"


def _mean(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.3f} ({entry['low']:.3f} – {entry['high']:.3f})"


def _memory_table(entries: Entries) -> str:
    rows = []
    for name, entry in entries.items():
        if match := re.fullmatch(r"memory_U(\d+)_R(\d+)", name):
            at = "U{}_R{}".format(*match.groups())
            tokens, reduced = (entries.get(f"bytes_{at}_{what}") for what in ("tokens", "all_reduce"))
            sent = [f"{one['value']:,}" if one else "" for one in (tokens, reduced)]
            rows.append(
                [
                    "{} × {}".format(*match.groups()),
                    f"{entry['value'] / 1e6:.1f} MB",
                    f"{entry.get('ratio', 1):.3f}",
                    *sent,
                ]
            )
    return markdown(["U × R", "peak", "of 1 × 1", "visual tokens, bytes", "all-reduce, bytes"], rows)


def _attention_table(entries: Entries) -> str:
    rows = []
    for r in _numbers(entries, r"flops_contiguous_R(\d+)_mixture"):
        padding = (entries[f"{what}_padding_R{r}_mixture"]["value"] for what in ("flops", "tokens"))
        rows.append([
            str(r),
            f"{entries[f'flops_contiguous_R{r}_one_document']['value']:.3f}",
            *(_mean(entries[f"flops_{cut}_R{r}_mixture"]) for cut in CUTS),
            *(f"{100 * part:.2f} %" for part in padding),
        ])  # fmt: skip
    header = [
        "R", "contiguous, one document", "contiguous", "zigzag of the row", "zigzag of each document (ours)",
        "its padding: pairs", "tokens",
    ]  # fmt: skip
    return markdown(header, rows)


def _rates_table(entries: Entries) -> str:
    columns = {
        "ring, 256 ranks, 256K": "ring_gqa_over_2d_gqa_P256_S256K",
        "ring with keys repeated": "ring_repeated_over_2d_gqa_P256_S256K",
        "Megatron, 32 ranks, 32K": "megatron_gqa_over_2d_gqa_P32_S32K",
        "64K": "megatron_gqa_over_2d_gqa_P32_S64K",
        "256K": "megatron_gqa_over_2d_gqa_P32_S256K",
    }
    rates = _numbers(entries, r"ring_gqa_over_2d_gqa_P256_S256K_at_(\d+)T")
    rows = (
        [str(rate), *(f"{entries[f'{name}_at_{rate}T']['value']:.2f}" for name in columns.values())] for rate in rates
    )
    return markdown(["TFLOP/s", *columns], rows)


def _ranks(entries: Entries) -> list[int]:
    return _numbers(entries, r"step_P(\d+)_S\d+K_2d_gqa")


def _lengths(entries: Entries) -> list[int]:
    """In K tokens."""
    return _numbers(entries, r"step_P\d+_S(\d+)K_2d_gqa")


def _numbers(entries: Entries, pattern: str) -> list[int]:
    """What the pattern's group is in entries' names, in order."""

    def found() -> Iterator[int]:
        for name in entries:
            if match := re.fullmatch(pattern, name):
                yield int(match[1])

    return sorted(set(found()))


def needle_tables(results: Results) -> dict[str, str]:
    """By mark; of docs/results/parallel_needle.json: a row a model, length and grid; bytes of the fullest rank."""
    rows = []
    for one in results["points"]:
        found = one["results"][0]
        right = f"**{found['value']:.3f}** ({found['low']:.3f} – {found['high']:.3f})"
        kv, process = (max(rank[name] for rank in one["ranks"]) for name in ("kv_bytes", "peak_bytes"))
        tensors = f"{max(one['tensor_bytes']) / 1e6:,.1f}" if "tensor_bytes" in one else ""
        ranks = f"{one['ulysses'] * one['ring']} ({one['ulysses']} × {one['ring']})"
        cells = [one["model"], f"{one['frames']:,}", ranks, right]
        rows.append([*cells, f"{kv / 1e3:,.0f}", tensors, f"{process / 1e6:,.0f}"])
    header = [
        "", "frames", "ranks (U × R)", "needles found", "KV a rank, kB", "tensors a rank, MB", "process, MB",
    ]  # fmt: skip
    return {"needle": markdown(header, rows)}
