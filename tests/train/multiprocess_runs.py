"""Runs of several processes, forked from one that has imported everything: prints what happened as JSON.

python multiprocess_runs.py SCRIPT FOLDER RECIPE
"""

import gc
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

from foveate.train.recipe import load_recipe

script, folder, recipe_path = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
spec = importlib.util.spec_from_file_location("kill_and_resume", script)
forked = importlib.util.module_from_spec(spec)
spec.loader.exec_module(forked)
for late in ("foveate.train.zero", "deepspeed.runtime.zero.muon.muon_optimizer"):  # else each fork imports them
    importlib.import_module(late)
gc.collect()
gc.freeze()  # a collection in a fork then passes over the libraries
codes = {}


def run(name: str, ranks: int, *overrides: str, stop_at: int | None = None, by: int = signal.SIGUSR1) -> None:
    """A run in a folder of that name, which goes on where there is a checkpoint; `stop_at` signals the last rank."""

    def after_step(step: int) -> None:
        if step == stop_at and os.environ["RANK"] == str(ranks - 1):
            signal.raise_signal(by)

    children = forked.start(load_recipe(recipe_path, overrides), folder / name, ranks, after_step)
    codes.setdefault(name, []).append(forked.end(children))


run("one", 1)
run("two", 2)
run("four", 4, "loader.workers=1")
run("zero3", 2, "engine=zero3")
# begun on two, gone on with on one, ended on four: each engine loads the other's checkpoint
run("moved", 2, "engine=zero2", stop_at=2)
run("moved", 1, "engine=torch", stop_at=4)
run("moved", 4, "engine=zero3")
run("usr1", 2, stop_at=2)
run("usr1", 2)
run("three", 3)
run("bad", 2, "sources.captions.path=" + str(folder / "bad"), "loader.max_bad_fraction=0.003")
print(json.dumps(codes))
