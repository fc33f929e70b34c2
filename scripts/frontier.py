"""Frontiers of all tasks: `frontier.py OUT --rows MODEL... --quickstart MODEL --needle MODEL` (docs/frontier.md).

`foveate frontier` for each task whose models are given; less is asked of the tasks that hardly tell methods apart. What
is finished in the folder is not run again. --publish also puts results, pictures and tables into docs/.
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the command `foveate` sets it, and for the same reason

import torch
from rich.console import Console

from foveate.eval.figures import DOCS, make
from foveate.eval.frontier import STORES, run_frontier, write
from foveate.eval.results import check_results
from foveate.vlm.chat import load_model

FEW_KV = ("int4", "int4, keys by channel", "snapkv 75% in int4")
FEWER: dict[str, Any] = {"keeps": (0.5, 0.25), "kv": [STORES[store] for store in FEW_KV]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--rows", nargs="*", default=[], help="models of the recipe sort-row, of several seeds")
    parser.add_argument("--quickstart", nargs="*", default=[], help="models of the recipe quickstart")
    parser.add_argument("--needle", nargs="*", default=[], help="models of the recipe needle")
    parser.add_argument("--n", type=int, default=200, help="test questions of each model in each setting")
    parser.add_argument("--n-claims", type=int, default=800, help="test questions of each model for what is claimed")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console, done = Console(), []
    for task, names, n_dev, fewer in (
        ("rows", options.rows, 300, {}),
        ("glyphs", options.quickstart, 600, FEWER),
        ("needles", options.needle, 300, FEWER),
        ("clips", options.quickstart, 300, FEWER),
    ):
        if not names:
            continue
        console.rule(task)
        models = [(model.float(), processor) for model, processor in (load_model(name, device="cpu") for name in names)]
        counts = {"n": options.n, "n_dev": n_dev, "n_claims": options.n_claims}
        content = run_frontier(models, task, options.out / task, console=console, names=names, **counts, **fewer)
        done.append((f"frontier_{task}", content))
    for name, content in done if options.publish else ():
        check_results(content, f"{name}.json")
        write(content, DOCS / "results" / f"{name}.json")
        make(DOCS, [name])


if __name__ == "__main__":
    main()
