"""A needle in a haystack, depth × frames, on mp4 files: `needle_grid.py runs/needle_grid` (docs/needle.md).

Trains the recipe `needle` with each seed and asks the models in every setting of eval/needle_grid.py, at each length
with `evaluate_haystack`, which is what `foveate eval --task haystack` calls. What is finished in the folder is not run
again. Writes `results.json` to it; --publish also puts it, the picture and the tables into docs/.
"""

import argparse
import json
import os
import re
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the command `foveate` sets it, and for the same reason

import torch
import torch.distributed as dist
from rich.console import Console
from torch.multiprocessing import start_processes

from foveate.data.needles import NEEDLES
from foveate.eval.facts import result, run_facts
from foveate.eval.figures import publish
from foveate.eval.haystack import DEPTHS, evaluate_haystack, fraction, haystack_items, said_without_clip, search
from foveate.eval.needle_grid import (
    FULL,
    SETTINGS,
    SHORT,
    SINGLE,
    TAKEN_OUT_SHORT,
    Setting,
    compare,
    point,
    questions_a_cell,
    tables,
)
from foveate.train.loop import FINISHED, train
from foveate.train.recipe import load_recipe
from foveate.vlm.cache.parse import parse_kv
from foveate.vlm.chat import load_model
from foveate.vlm.parallel.inference import sequence_parallel
from foveate.vlm.parallel.topology import Topology, make_topology
from foveate.vlm.pruning import parse_method

TIMEOUT_S = 1800


def trained(out: Path, seed: int, console: Console) -> Path:
    """The folder of the seed's model; it is trained unless that is done."""
    if not (out / FINISHED).exists():
        train(load_recipe("needle", [f"seed={seed}", "tracking.wandb=disabled"]), out, resume="auto", console=console)
    return out / "model"


@cache
def loaded(folder: Path) -> tuple[Any, Any]:
    model, processor = load_model(folder, device="cpu")
    return model.float(), processor


def asked(out: Path, folder: Path, setting: Setting, frames: int, n: int, console: Console) -> dict[str, Any]:
    """What `evaluate_haystack` writes, n questions a cell; now, or before."""
    name = re.sub("[^a-z0-9]+", "-", setting.name.lower()).strip("-")
    out = out / f"{name}-{frames}-{n}"
    if not (out / "metrics.json").exists():
        console.print(f"[bold]{setting.name}")
        if setting.ulysses > 1:
            store = str((out.parent / f"{out.name}.store").absolute())
            Path(store).unlink(missing_ok=True)
            start_processes(shared, (store, out, folder, setting, frames, n), setting.ulysses)
        else:
            evaluate(out, folder, setting, frames, n, Topology(), console)
    return json.loads((out / "metrics.json").read_text())


def evaluate(
    out: Path, folder: Path, setting: Setting, frames: int, n: int, topology: Topology, console: Console
) -> None:
    model, processor = loaded(folder)
    methods = [parse_method(setting.prune.format(half=frames // 2))] if setting.prune else []
    kv = parse_kv(setting.kv) if setting.kv else None
    with sequence_parallel(model, topology):
        evaluate_haystack(
            model, processor, out, n, "test", console, methods, kv, topology, [frames], needles=setting.needles
        )


def shared(rank: int, store: str, out: Path, folder: Path, setting: Setting, frames: int, n: int) -> None:
    """One of the processes that share each clip."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, setting.ulysses), rank=rank, world_size=setting.ulysses,
        timeout=timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    try:
        evaluate(out, folder, setting, frames, n, make_topology(setting.ulysses, 1), Console(quiet=rank > 0))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def without_needle(file: Path, folder: Path, needles: int, n: int) -> dict[str, Any]:
    """The control of short clips whose needle is taken out, n questions a cell; measured now, or before."""
    if not file.exists():
        model, processor = loaded(folder)
        items = haystack_items(n, SHORT, needles=needles, taken_out=True)
        row = search(model, processor, items, SHORT, DEPTHS, said_without_clip(model, processor))
        file.write_text(json.dumps(fraction(TAKEN_OUT_SHORT, row.right)))
    return json.loads(file.read_text())


def run(out: Path, seeds: list[int], questions: int, console: Console) -> dict[str, Any]:
    """Everything, as JSON."""
    points, said = [], {}
    for setting in SETTINGS:
        for seed in seeds if setting.every_seed else seeds[:1]:
            folder = trained(out / f"seed-{seed}", seed, console)
            here = out / f"seed-{seed}" / "asked"
            written = [
                asked(here, folder, setting, frames, questions_a_cell(setting, frames, questions), console)
                for frames in setting.frames
            ]
            points.append(point(setting, seed, written))
            if setting.name in (FULL, SINGLE):
                file = here / f"taken-out-{setting.needles}-{2 * questions}.json"
                points[-1]["results"].append(without_needle(file, folder, setting.needles, 2 * questions))
            said[setting.name, seed] = {
                frames: answers for one in written for frames, answers in one["answers"].items()
            }
    compare(points)
    return {"seeds": seeds, "training": stages(out, seeds), "points": points, "same": same(said, seeds[0])}


def stages(out: Path, seeds: list[int]) -> dict[str, Any]:
    """How long each seed's training took."""
    return {str(seed): json.loads((out / f"seed-{seed}" / FINISHED).read_text()) for seed in seeds}


def same(said: dict[tuple[str, int], dict[str, list[str]]], seed: int) -> list[dict[str, Any]]:
    """Of each setting on several processes, how many answers are word by word those of one process."""
    told = []
    for setting in SETTINGS:
        if setting.ulysses > 1:
            pairs = [
                (own, other)
                for frames, answers in said[setting.name, seed].items()
                for own, other in zip(answers, said[FULL, seed][frames], strict=False)  # of which there may be more
            ]
            equal = sum(own == other for own, other in pairs)
            told.append(result(f"{setting.name}: same answers", equal / len(pairs), "fraction", len(pairs)))
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--questions", type=int, default=20, help="asked in a cell; twice as many to 256 frames, a quarter at 2,048"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=160)
    results = run(options.out, options.seeds, options.questions, console)
    seeds = " ".join(map(str, options.seeds))
    facts = run_facts(f"scripts/needle_grid.py OUT --seeds {seeds} --questions {options.questions}")
    facts |= {"depths": DEPTHS, "needles": NEEDLES}
    (options.out / "results.json").write_text(json.dumps(facts | results, indent=1) + "\n")
    for made in tables(results).values():
        console.print(made, highlight=False, soft_wrap=True)
    if options.publish:
        publish("needle_grid", facts | results)


if __name__ == "__main__":
    main()
