"""A needle in 1,024 frames, trained and found by processes that share each clip: `parallel_needle.py runs/parallel`.

Trains the recipe `needle-long` on four processes, from the model of recipe `needle` as it is after its stage `middle`
(--start), and asks the same questions on 1, 2 and 4 processes; then what a process holds while it answers one of them
(docs/parallel.md). What is finished in the folder is not run again. Writes `results.json` to it; --publish also puts it
into docs/.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.multiprocessing import start_processes

from foveate.eval.facts import run_facts
from foveate.eval.figures import publish
from foveate.eval.needle import ask, find, prepare
from foveate.eval.parallel_figures import needle_tables
from foveate.train.bench import peak_memory
from foveate.train.loop import FINISHED
from foveate.train.recipe import load_recipe
from foveate.vlm.chat import load_model
from foveate.vlm.parallel.inference import sequence_parallel
from foveate.vlm.parallel.topology import make_topology

FRAMES = 1024
GRIDS = ((1, 1), (2, 1), (2, 2))  # ulysses, ring
BEFORE = (128, FRAMES)  # frames that the model is asked about as it was before
TIMEOUT_S = 600
FOVEATE = Path(sys.executable).with_name("foveate")


def foveate(processes: int, *arguments: str | Path) -> None:
    """Runs a command of the package on so many processes, a thread each."""
    launcher = (
        ["torchrun", "--standalone", "--nproc-per-node", str(processes), "--no-python", "--"] if processes > 1 else []
    )
    command = [*launcher, str(FOVEATE), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{FOVEATE.parent}:{os.environ['PATH']}"}
    subprocess.run(command, check=True, env=environment)


def trained(out: Path, start: Path) -> list[Path]:
    """The models after each stage; they are trained unless that is done."""
    run, extended = out / "model", out / "context-1k"
    if not (run / FINISHED).exists():
        foveate(4, "train", "needle-long", "--out", run, "--auto-resume", f"model.path={start}")
    if not extended.exists():
        foveate(1, "convert", min((run / "checkpoints").iterdir()), extended)
    return [extended, run / "model"]


def raised(out: Path, start: Path) -> Path:
    """The model to start from with the RoPE theta of stage context-1k, and nothing else."""
    if not out.exists():
        shutil.copytree(start, out)
        config = json.loads((out / "config.json").read_text())
        config["text_config"]["rope_parameters"]["rope_theta"] = load_recipe("needle-long").stages[0].rope_theta
        (out / "config.json").write_text(json.dumps(config))
    return out


def asked(out: Path, model: Path, frames: int, questions: int, ulysses: int, ring: int) -> dict[str, Any]:
    """What `foveate eval` writes."""
    if not (out / "metrics.json").exists():
        grid = ("--ulysses", str(ulysses), "--ring", str(ring)) if ulysses * ring > 1 else ()
        options = ("--task", "needles", "--frames", str(frames), "--n", str(questions), *grid)
        foveate(ulysses * ring, "eval", model, *options, "--out", out)
    return json.loads((out / "metrics.json").read_text())


def held(rank: int, folder: str, model: Path, ulysses: int, ring: int) -> None:
    """Writes the bytes of tensors, weights aside, that a process holds at most while it answers a question."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_S)
    store = dist.FileStore(f"{folder}/store", ulysses * ring)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ulysses * ring, timeout=timeout)
    loaded, processor = load_model(model, device="cpu")
    with sequence_parallel(loaded, make_topology(ulysses, ring)):

        def work() -> object:
            return find(loaded, processor, prepare(loaded, processor, ask(1, FRAMES)))

        work()  # what is made once
        most = peak_memory(torch.device("cpu"), work)
    Path(folder, f"{rank}.json").write_text(json.dumps(most))
    dist.barrier()
    dist.destroy_process_group()


def held_once(out: Path, model: Path, ulysses: int, ring: int) -> list[int]:
    """`held` of each process, or what was written before."""
    if not out.exists():
        with tempfile.TemporaryDirectory() as folder:
            start_processes(held, (folder, model, ulysses, ring), ulysses * ring)
            ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ulysses * ring)]
        out.write_text(json.dumps(ranks))
    return json.loads(out.read_text())


def run(out: Path, start: Path, questions: int) -> dict[str, Any]:
    """Everything, as JSON."""
    extended, model = trained(out, start)
    wanted = [("before", start, frames, (1, 1)) for frames in BEFORE]
    wanted += [("before, theta raised", raised(out / "raised", start), FRAMES, (1, 1))]
    wanted += [("after context-1k", extended, FRAMES, (1, 1))]
    wanted += [("after long-sft", model, FRAMES, grid) for grid in GRIDS]
    points = []
    for name, of, frames, (ulysses, ring) in wanted:
        file = out / f"{name.replace(',', '').replace(' ', '-')}-{frames}-{questions}-{ulysses}x{ring}"
        told = asked(file, of, frames, questions, ulysses, ring)
        one = {"model": name, "frames": frames, "ulysses": ulysses, "ring": ring, "ranks": told["ranks"]}
        if of == model:
            one["tensor_bytes"] = held_once(out / f"tensors-{ulysses}x{ring}.json", of, ulysses, ring)
        points.append(one | {"by_depth": told["by_depth"], "results": told["results"]})
    metrics = [json.loads(line) for line in (out / "model" / "metrics.jsonl").read_text().splitlines()]
    losses = [{name: one[name] for name in ("step", "stage", "loss", "memory_bytes")} for one in metrics]
    stages = json.loads((out / "model" / FINISHED).read_text())
    return {"training": {"processes": 4, "stages": stages, "metrics": losses}, "points": points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--start", type=Path, default=Path("runs/needle-128"), help="the model to start from")
    parser.add_argument("--questions", type=int, default=200, help="asked of each model on each number of processes")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = run(options.out, options.start, options.questions)
    facts = run_facts(f"scripts/parallel_needle.py OUT --start START --questions {options.questions}")
    (options.out / "results.json").write_text(json.dumps(facts | results, indent=1) + "\n")
    Console().print(needle_tables(results)["needle"], highlight=False, soft_wrap=True)
    if options.publish:
        publish("parallel_needle", facts | results)


if __name__ == "__main__":
    main()
