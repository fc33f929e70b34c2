"""The tables of docs/benchmarks.md and docs/media.md, from what `foveate bench ... --json` printed."""

import re
from typing import Any

from .tables import markdown

Results = dict[str, Any]  # a results file's content
MEASURED = ("result", "value", "ratio to baseline", "n")
PRUNED = {
    "unpruned": "unpruned",
    "fastv:layer=2,keep=0.5": "FastV K = 2, R = 50 %",
    "fastv:layer=2,keep=0.25": "FastV K = 2, R = 75 %",
    "fastv:layer=2,keep=0.1": "FastV K = 2, R = 90 %",
    "pyramiddrop:layers=6/12/18": "PyramidDrop, layers 6, 12, 18",
    "sparsevlm": 'SparseVLM "192"',
    "sparsevlm+": 'SparseVLM+ "192"',
}


def by_name(results: Results) -> dict[str, dict[str, Any]]:
    """The entries at the top."""
    return {entry["name"]: entry for entry in results["results"]}


def training(of_data: Results, of_train: Results) -> dict[str, str]:
    """By mark; of `bench data --restore` and `bench train`."""
    data, train = by_name(of_data), by_name(of_train)
    loader, bare = data["loader_documents_per_s"], data["webdataset_documents_per_s"]
    early, late = data["restore_at_1_percent_s"], data["restore_at_90_percent_s"]
    waste, reserved = data["packing_waste_with_reserve"], data["imbalance_with_reserve"]
    packed, padded = train["packed_tokens_per_s"], train["padded_tokens_per_s"]
    fused, whole = train["step_memory_fused_loss"], train["step_memory_full_logits"]
    rows = [
        (
            "loader over webdataset, 1 worker",
            f"{loader['value']:.0f} documents/s, {data['loader_MB_per_s']['value']:.1f} MB/s",
            f"{loader['ratio']:.2f} × {bare['value']:.0f} documents/s ({_rounds(data['loader_over_webdataset'])})",
            f"{loader['n']} rounds",
        ),
        (
            "restore at 90 % of an epoch",
            f"{late['value']:.2f} s",
            f"{late['ratio']:.2f} × {early['value']:.2f} s at 1 %",
            f"{late['n']}",
        ),
        ("packing waste at 8,192 tokens", f"{100 * waste['value']:.2f} %", "", f"{waste['n']} steps"),
        (
            "imbalance of 8 groups with a reserve of 8 rows",
            f"{reserved['value']:.3f}",
            f"{reserved['ratio']:.3f} × {data['imbalance_without_reserve']['value']:.3f} without",
            f"{reserved['n']} steps",
        ),
        (
            "`bench train`, tiny, 2,048 tokens: packed over padded",
            f"{packed['value']:,.0f} tokens/s",
            f"{packed['ratio']:.2f} × {padded['value']:,.0f} tokens/s",
            f"{packed['n']} steps",
        ),
        (
            "the same: step's peak memory, chunked loss",
            f"{fused['value'] / 1e6:.0f} MB",
            f"{fused['ratio']:.2f} × {whole['value'] / 1e6:.0f} MB with whole logits",
            f"{fused['n']}",
        ),
    ]
    return {"training": markdown(MEASURED, rows)}


def prefill(results: Results) -> dict[str, str]:
    """By mark; of `bench prefill`, a row for each method."""
    found = by_name(results)
    rows = []
    for method, name in PRUNED.items():
        clock, cpu = found[f"{method}_ttft"]["value"], found[f"{method}_cpu_ttft"]["value"]
        decode, kv, peak = (found[f"{method}_{what}"]["value"] for what in ("decode", "kv", "peak"))
        if method == "unpruned":
            gained = ["1", "1", "", f"{decode:.1f}", ""]
        else:
            by_clock, by_cpu, flops = (
                found[f"{method}_{what}"]["value"] for what in ("speed_up", "cpu_speed_up", "flop_speed_up")
            )
            gained = [
                f"{by_clock:.2f} ({by_cpu:.2f})",
                f"{flops:.2f}",
                f"{by_clock / flops:.2f} ({by_cpu / flops:.2f})",
                f"{decode:.1f}",
                f"{found[f'{method}_decode']['ratio']:.3f}",
            ]
        rows.append([name, f"{clock:.2f} s ({cpu:.2f} s)", *gained, f"{kv / 1e6:.1f} MB", f"{peak / 1e6:.0f} MB"])
    header = [
        "", "first token, clock (CPU)", "measured speed-up, clock (CPU)", "FLOP model", "measured / FLOP model",
        "decode, ms/token", "over a plain cache", "KV cache", "peak memory",
    ]  # fmt: skip
    return {"prefill": markdown(header, rows)}


def media(usual: Results, without_b_frames: Results) -> dict[str, str]:
    """By mark; of `bench media`, and of the same with `--b-frames 0`."""
    rows = []
    clips = (
        ("file to tower's input over bare PyAV in order, wall clock", usual),
        ("no B-frames, so none to skip (`--b-frames 0`), over bare PyAV in order, wall clock", without_b_frames),
    )
    for title, results in clips:
        found = by_name(results)
        own, n = found["media_frames_per_s"], f"{found['media_frames_per_s']['n']} rounds"
        for bare, against in (("pyav_in_order", title), ("decord", "the same over bare decord, wall clock")):
            value = f"{own['value']:.1f} frames/s" if bare == "pyav_in_order" else ""
            over, by_cpu = found[f"media_over_{bare}"], found[f"media_over_{bare}_by_cpu_time"]
            of = f"{over['value']:.2f} ({_rounds(over)}) × {found[f'{bare}_frames_per_s']['value']:.1f} frames/s"
            rows.append((against, value, of, n))
            rows.append(("the same by CPU time", "", f"{by_cpu['value']:.2f} ({_rounds(by_cpu)})", n))
    return {"media": markdown(MEASURED, rows)}


def encode(results: Results) -> dict[str, str]:
    """By mark; of `bench encode`, a row for each tiling and projector."""
    rows = []
    for name, entry in by_name(results).items():
        if match := re.fullmatch(r"(.+)_downsample-(\d)x\d_(images|frames)_per_s", name):
            tiling, side, unit = match.groups()
            tokens = by_name(results)[name.replace(f"_{unit}_per_s", "_tokens_per_s")]["value"]
            value = f"{entry['value']:.1f} {unit}/s, {tokens:,.0f} tokens/s"
            ratio = f"{entry['ratio']:.3f}" if "ratio" in entry else ""
            rows.append((f"{tiling}, {side}×{side}", value, ratio, f"{entry['n']} rounds"))
    return {"encode": markdown(MEASURED, rows)}


def memory(results: Results) -> dict[str, str]:
    """By mark; of `bench media --memory`."""
    found = by_name(results)
    header = [
        "frames", "encoded chunk by chunk", "less the features", "loaded at once, 448×448 uint8", "less the frames",
    ]  # fmt: skip
    rows = []
    for frames in sorted({int(name.split("_")[1]) for name in found}):
        peaks = (
            found[f"{way}_{frames}_frames_{what}"]["value"]
            for way in ("encode", "load")
            for what in ("peak", "beyond_result")
        )
        rows.append([f"{frames:,}", *(f"{peak / 1e6:,.0f} MB" for peak in peaks)])
    return {"memory": markdown(header, rows)}


def _rounds(entry: dict[str, Any]) -> str:
    return f"rounds {entry['low']:.2f} – {entry['high']:.2f}"
