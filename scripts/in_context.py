"""In-context learning at the smallest size: `in_context.py runs/in-context` (docs/in_context.md).

Trains, for each seed, a tower, an LLM with induction and a plain one, then every arm from these, two at a time, and
asks all of them the same questions. What is finished in the folder is not run again. Writes to it `results.json` and
`in_context.png`; --publish also puts them into docs/, with the tables of docs/in_context.md.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two arms at a time, a core each

from rich.console import Console

from foveate.eval.facts import run_facts
from foveate.eval.figures import publish
from foveate.eval.in_context import as_json, draw
from foveate.train.in_context import run_experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=800, help="asked of each arm of each seed in each setting")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/")
    options = parser.parse_args()
    console, began = Console(), time.perf_counter()
    measured = run_experiment(options.out, console, options.seeds, options.questions)
    seeds = " ".join(map(str, options.seeds))
    facts = run_facts(f"scripts/in_context.py OUT --seeds {seeds} --questions {options.questions}")
    results = facts | as_json(measured)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "in_context.png").write_bytes(draw(results))
    console.print(f"{time.perf_counter() - began:.0f} s; results in {options.out / 'results.json'}")
    if options.publish:
        publish("in_context", results)


if __name__ == "__main__":
    main()
