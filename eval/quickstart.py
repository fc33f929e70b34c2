"""The README's block about the quickstart, from its results."""

from typing import Any

NAMES = {
    "what_at": "what is at a cell of a 4 × 4 scene",
    "colour_at": "what colour is at a cell",
    "where_is": "where is a kind of glyph",
    "row_column": "what is in a row and column",
    "clip_colour_8": "what colour is a digit, mp4 of 8 frames",
    "needle_64": "which digit stands in one of 64 frames",
    "needle_128": "which digit stands in one of 128 frames",
}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The block, in Markdown.

    Args:
        results: `metrics.json` of a run of `foveate quickstart`, with its `ask.json` as `ask`.
    """
    lines = [
        f"Printed by `make quickstart` on {results['device']} ({results['date']}): "
        f"{results['training_seconds']:.0f} s of training, {results['total_seconds']:.0f} s in all, at most "
        f"{results['peak_memory_bytes'] / 1e9:.1f} GB of memory, {100 * results['packing_waste']:.1f} % of packed "
        "positions wasted. One model answers all; answers are generated, the digits' handwriting is held out.",
        "",
        "| task | accuracy | 95 % interval | n | chance | majority |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {NAMES[task]} | **{r['accuracy']:.3f}** | {r['low']:.3f} – {r['high']:.3f} | {r['n']} | "
        f"{r['chance']:.3f} | {r['majority']:.3f} |"
        for task, r in results["tasks"].items()
    ]
    lines += ["", "Training, stage by stage:", "", "| stage | seconds | steps | tokens |", "|---|---|---|---|"]
    lines += [f"| {s['name']} | {s['seconds']:.1f} | {s['steps']} | {s['tokens']:,} |" for s in results["stages"]]
    lines += ["", "Asked about `clip.mp4`, which the run wrote:", ""]
    lines += [f"    > {a['question']}\n    {a['answer']}    (truth: {a['truth']})" for a in results["ask"]]
    lines += ["", "![Questions, frames and answers made by the run](docs/quickstart.png)"]
    return {"quickstart": "\n".join(lines)}
