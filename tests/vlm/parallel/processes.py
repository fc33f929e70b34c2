"""Forks processes that share gloo, from a parent that has imported torch: starting them is what costs.

A script of runs calls `run_all(cases, ranks)`; a test calls `collect(script, folder)` and asserts.
"""

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 120


def run_all(cases: Callable[[], dict[str, Any]], ranks: int, folder: Path, backend: str = "gloo") -> None:
    """Runs `cases` on ranks 0, 1, … in processes of their own; each rank's results are saved in the folder.

    With `nccl` rank i has GPU i, which tensors are made on that name no device.
    """
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(cases, rank, ranks, folder, backend)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    codes = [process.exitcode for process in processes]
    if alive or any(codes):
        raise SystemExit(f"exit codes {codes}, {len(alive)} of {ranks} hung")


def _rank(cases: Callable[[], dict[str, Any]], rank: int, ranks: int, folder: Path, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    torch.manual_seed(0)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    try:
        torch.save(cases(), folder / f"rank{rank}.pt")
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the others would wait for it in `destroy_process_group`
    dist.destroy_process_group()


def collect(script: Path, folder: Path, ranks: int, *arguments: str) -> list[dict[str, Any]]:
    """What each rank of a script of runs has saved; the script gets the folder as its first argument."""
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *arguments],
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S + 60,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True, map_location="cpu") for rank in range(ranks)]
