"""Scale, then compress, at the smallest size: `scale_then_compress.py runs/compress` (docs/compress.md).

Trains a tower and LLM that all variants start from, then each variant, and asks them about test scenes and clips. What
is finished in the folder is not run again. Writes to it `results.json` and `compress.png`; --publish also puts them
into docs/, with the tables of docs/compress.md.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the command `foveate` sets it, and for the same reason

from rich.console import Console

from foveate.eval.compress import as_json, picture
from foveate.eval.facts import run_facts
from foveate.eval.figures import publish
from foveate.train.compress import run_experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--questions", type=int, default=1000, help="asked of each variant")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/")
    options = parser.parse_args()
    measured = run_experiment(options.out, Console(), options.seeds, options.questions)
    seeds = " ".join(map(str, options.seeds))
    facts = run_facts(f"scripts/scale_then_compress.py OUT --seeds {seeds} --questions {options.questions}")
    results = facts | {"variants": as_json(measured)}
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "compress.png").write_bytes(picture(results["variants"]))
    if options.publish:
        publish("scale_then_compress", results)


if __name__ == "__main__":
    main()
