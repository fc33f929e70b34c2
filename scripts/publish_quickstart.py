"""Puts a quickstart run's results into the documentation: `publish_quickstart.py runs/quickstart`.

Copies its numbers to docs/results/quickstart.json and its picture to docs/quickstart.png, and writes the README's block
between the two `quickstart` marks from them.
"""

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "what_at": "what is at a cell of a 4 × 4 scene",
    "colour_at": "what colour is at a cell",
    "where_is": "where is a kind of glyph",
    "row_column": "what is in a row and column",
    "clip_colour_8": "what colour is a digit, mp4 of 8 frames",
    "needle_64": "which digit stands in one of 64 frames",
    "needle_128": "which digit stands in one of 128 frames",
}


def readme_block(results: dict) -> str:
    """The README's block in Markdown, from a run's results."""
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
    return "\n".join(lines)


def with_block(readme: str, block: str) -> str:
    """The README with the block between its marks."""
    return re.sub(
        r"(?<=<!-- quickstart -->\n).*?(?=<!-- /quickstart -->)", lambda _: block + "\n", readme, flags=re.DOTALL
    )


def main(run: Path) -> None:
    results = json.loads((run / "metrics.json").read_text()) | {"ask": json.loads((run / "ask.json").read_text())}
    (ROOT / "docs" / "results").mkdir(parents=True, exist_ok=True)
    (ROOT / "docs" / "results" / "quickstart.json").write_text(json.dumps(results, indent=1) + "\n")
    shutil.copyfile(run / "examples.png", ROOT / "docs" / "quickstart.png")
    readme = ROOT / "README.md"
    readme.write_text(with_block(readme.read_text(), readme_block(results)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
