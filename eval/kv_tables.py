"""The tables of docs/kv.md, docs/kv_methods.md and docs/kv_quality.md, but for the needles' (`kv_needle.py`)."""

from typing import Any

from . import kv_quality, weights_quality
from .bench_tables import by_name
from .tables import markdown

Results = dict[str, Any]  # a results file's content
BASELINES = {
    "dynamic": "DynamicCache",
    "quantized": "QuantizedCache (quanto, 4 bits)",
    "preallocated": "preallocated, sdpa",
}
AGAINST = ("× DynamicCache", "× QuantizedCache", "× preallocated")
WHEN = (kv_quality.LATER, kv_quality.ASKED)
# What the summary's rows show: label → setting of kv_quality.json, setting of kv_needle.json.
SUMMARY = {
    "`int8`, residual 0": ("int8", "int8"),
    "`int4`, residual 0": ("int4", "int4"),
    "`int2`, residual 16": ("int2, residual 16", "int2"),
    "`vidkv`": ("vidkv", "vidkv"),
    "`snapkv`, a quarter": ("snapkv 25%", "snapkv, 25 %"),
    "`h2o`, a quarter": ("h2o 25%", "h2o, 25 %"),
    "`look-m`, a quarter": ("look-m 25%", "look-m, 25 %"),
    "`quest`, a tenth of the pages": ("quest 10%", "quest, 10 % of pages"),
    "`duo`, 2 of 16 heads whole": (None, "duo"),
}
# Of the harder task's settings that evict or select; the others of them lose nearly everything.
ROWS_SHOWN = ("streaming 128", "snapkv 50%", "h2o 64 tokens", "quest 50%")


def summary(quality: Results, needles: Results) -> dict[str, str]:
    """By mark; a few settings of docs/results/kv_quality.json and kv_needle.json side by side."""
    entries = {entry["setting"]: by_name(entry) for entry in quality["settings"]}
    found = {(one["setting"], one["frames"], one["question"]): one["results"][0]["value"] for one in needles["points"]}

    def needle(setting: str) -> list[str]:
        return [f"{found[setting, *at]:.3f}".lstrip("0") for at in ((512, 1), (256, 2))]

    full = entries["DynamicCache"]
    rows = [["full cache", *(f"{100 * full[f'{when}: accuracy']['value']:.1f} %" for when in WHEN), *needle("dense")]]
    for label, (setting, of_needles) in SUMMARY.items():
        lost = [_points(entries[setting][f"{when}: difference"]) if setting else "" for when in WHEN]
        rows.append([label, *lost, *needle(of_needles)])
    return {"summary": markdown(["", *WHEN, "needle, 512 frames", "second question, 256"], rows)}


def quality(glyphs: Results, rows: Results) -> dict[str, str]:
    """By mark; of docs/results/kv_quality.json and kv_quality_rows.json."""
    chosen = [one for one in rows["settings"] if one["setting"] in ROWS_SHOWN or _is_quantised(one)]
    return {
        "quality": kv_quality.table(glyphs["settings"]),
        "breaks": kv_quality.what_breaks(glyphs["settings"]),
        "rows": kv_quality.table(chosen),
    }


def _is_quantised(entry: dict[str, Any]) -> bool:
    setting = kv_quality.Setting(entry["setting"], entry["kv"], entry["prune"])
    return setting.is_packed_alone and setting.kv not in ("", "dense")


def weights(results: Results) -> dict[str, str]:
    """By mark; of docs/results/weights_quality.json."""
    return {"weights": weights_quality.table(results["settings"])}


def duo(results: Results) -> dict[str, str]:
    """By mark; of docs/results/duo.json, a column a seed."""
    header = [""]
    for one in results["seeds"]:
        heads = sum(map(len, one["gates"]))
        header.append(f"seed {one['seed']}, {one['identified']} of {heads} heads identified")
    rows = [
        [entries[0]["name"], *(f"**{one['value']:.3f}** ({one['low']:.3f} – {one['high']:.3f})" for one in entries)]
        for entries in zip(*(one["results"] for one in results["seeds"]), strict=True)
    ]
    return {"duo": markdown(header, rows)}


def decode(single: Results, half: Results) -> dict[str, str]:
    """By mark; of `bench decode` in float32 and in bfloat16."""
    of = [by_name(single), by_name(half)]
    rows = []
    for cache in _caches(of[0], "_decode"):
        cells = [BASELINES.get(cache, f"`{cache}`")]
        for found in of:
            cells.append(f"{found[f'{cache}_decode']['value']:.0f} ({found[f'{cache}_cpu_decode']['value']:.0f})")
            cells += _ratios(found, cache, 2)
        kv, largest = of[0][f"{cache}_kv"]["value"], of[0][f"{cache}_largest"]["value"]
        rows.append([*cells, f"{kv / 1e6:.0f} MB", f"{largest / 1e6:.2f} M"])
    header = [
        "cache", "float32, ms (CPU ms)", *AGAINST, "bfloat16, ms (CPU ms)", *AGAINST,
        "KV, float32", "fit in 24 GB, tokens",
    ]  # fmt: skip
    return {"decode": markdown(header, rows)}


def kernels(results: Results) -> dict[str, str]:
    """By mark; of `bench kernels`: attention of one layer. What reads pages comes last."""
    found = by_name(results)
    rows = []
    for cache in sorted(_caches(found, "_attention"), key=lambda cache: cache.startswith("quest")):
        clock, cpu = found[f"{cache}_attention"]["value"], found[f"{cache}_cpu_attention"]["value"]
        cells = [BASELINES.get(cache, f"`{cache}`"), f"{clock:,.0f} ({cpu:,.0f})", *_ratios(found, cache, 3)]
        read, reached = found[f"{cache}_bytes"]["value"], found[f"{cache}_bandwidth"]["value"]
        rows.append([*cells, f"{read / 1e6:.2f} MB", f"{100 * reached:.0f} %"])
    header = ["attention of a layer", "µs (CPU µs)", *AGAINST, "bytes read", "of copy bandwidth"]
    return {"kernels": markdown(header, rows)}


def _caches(found: dict[str, Any], end: str) -> list[str]:
    return [name.removesuffix(end) for name in found if name.endswith(end) and not name.endswith(f"_cpu{end}")]


def _ratios(found: dict[str, Any], cache: str, digits: int) -> list[str]:
    """Of its time to each baseline's, by the clock and by CPU time; empty for a baseline."""
    if cache in BASELINES:
        return [""] * len(BASELINES)
    return [
        f"{found[f'{cache}_over_{other}']['value']:.{digits}f} "
        f"({found[f'{cache}_cpu_over_{other}']['value']:.{digits}f})"
        for other in BASELINES
    ]


def _points(difference: dict[str, Any]) -> str:
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
