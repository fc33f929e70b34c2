"""The processes that train together: who this one is, and how they talk."""

import contextlib
import gc
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from .peers import ADVICE, Watch

Group = Literal["main", "data", "checkpoint"]

# What torchrun sets, and Slurm's names for some.
RANKS, MASTER = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("MASTER_ADDR", "MASTER_PORT")
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


class LaunchError(ValueError):
    """The launcher's environment can't be used; the message names the variables."""


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    The groups `data` and `checkpoint` are for the threads of those names: calls of one group come in the same order on
    every rank, which threads that shared a group could not promise.

    Attributes:
        hosts: names of the machines of all ranks; none where it is alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    groups: Mapping[Group, dist.ProcessGroup] = field(default_factory=dict, repr=False)
    hosts: tuple[str, ...] = ()

    def gather(self, value: Any, group: Group = "main") -> list[Any]:
        """Every rank's value, by rank; all ranks call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.groups[group])
        return values

    def barrier(self, group: Group = "main") -> None:
        """Returns when every rank has called it."""
        if self.size > 1:
            on_gpu = group == "main" and self.device.type == "cuda"
            dist.barrier(self.groups[group], device_ids=[self.device.index] if on_gpu else None)


@contextlib.contextmanager
def init_world(device: str | None = None, timeout_s: float = 1800, advice: str = ADVICE) -> Iterator[World]:
    """Joins the processes that torchrun, DeepSpeed's launcher or srun started; alone without them.

    srun without torchrun is taken where MASTER_ADDR is set and RANK is not.

    Args:
        device: `cpu`, `cuda` or `cuda:1`; a GPU where there is one. `cuda` is the one of this process on its node.
        timeout_s: how long a rank waits for the others before it fails.
        advice: what to do where another process is gone.

    Raises:
        LaunchError: the environment is incomplete, or there is no such device.
        ProcessLostError, SystemExit: another process is gone; see `Watch.explain`.
    """
    launched = _launched(os.environ)
    rank, size, local_rank = (int(launched[name]) for name in RANKS) if launched else (0, 1, 0)
    where = _device(device, local_rank)
    on_gpu = where.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(where)
    timeout = timedelta(seconds=timeout_s)
    groups: dict[Group, dist.ProcessGroup] = {}
    hosts: list[str] = []
    watch: Watch | None = None
    failed = False
    with _environment(launched):
        try:
            if size > 1:
                backend, own = ("nccl", where) if on_gpu else ("gloo", None)
                dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, device_id=own)
                assert dist.group.WORLD is not None
                groups["main"] = dist.group.WORLD
                for name in ("data", "checkpoint"):
                    groups[name] = dist.new_group(backend="gloo", timeout=timeout)
                hosts = [""] * size
                dist.all_gather_object(hosts, socket.gethostname(), groups["data"])
                watch = Watch(rank, hosts, timeout_s, advice)
            yield World(rank, size, local_rank, where, groups, tuple(hosts))
        except BaseException as error:
            failed = True
            if watch:
                watch.explain(error)
            raise
        finally:
            if watch:
                watch.leave(failed)
            groups.clear()
            # Leaving NCCL waits for the others: after a failure they may be stuck, and end when this process does.
            if dist.is_initialized() and not (failed and on_gpu):  # DeepSpeed makes itself a group of one process
                _leave()


def _leave() -> None:
    if "deepspeed" in sys.modules:
        from deepspeed import comm

        if comm.is_initialized():
            comm.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # gloo's threads end when the last object that knows their group is gone
    # A thread that still holds its last work needs the interpreter to drop it, and aborts where that is shutting down.
    time.sleep(0.1)


def _launched(env: Mapping[str, str]) -> dict[str, str]:
    """The launcher's variables under torchrun's names; empty without a launcher."""
    found = {name: env[name] for name in (*RANKS, *MASTER) if name in env}
    accepted = f"all of {', '.join((*RANKS, *MASTER))}, as torchrun sets them, or neither RANK nor WORLD_SIZE"
    if "RANK" not in found and "WORLD_SIZE" not in found:
        slurm = {name: env[theirs] for name, theirs in SLURM.items() if theirs in env}
        if "MASTER_ADDR" not in found or not slurm:
            return {}
        found |= slurm
        accepted = f"all of {', '.join((*SLURM.values(), *MASTER))}, as srun and its script set them, or no MASTER_ADDR"
    alone = found.get("WORLD_SIZE") == "1"
    missing = [name for name in (*RANKS, *(() if alone else MASTER)) if name not in found]
    if missing:
        have = ", ".join(f"{name}={value}" for name, value in found.items())
        raise LaunchError(f"the environment has {have} but no {', '.join(missing)}; accepted: {accepted}")
    for name in RANKS:
        if not found[name].isdecimal():
            raise LaunchError(f"{name} is {found[name]!r}; accepted: a whole number")
    if not int(found["RANK"]) < int(found["WORLD_SIZE"]):
        raise LaunchError(f"RANK is {found['RANK']}; accepted: less than WORLD_SIZE, {found['WORLD_SIZE']}")
    return found


def _device(device: str | None, local_rank: int) -> torch.device:
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type != "cuda":
        return where
    index = local_rank if where.index is None else where.index
    if index >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {local_rank} should train on cuda:{index}, but this machine has {torch.cuda.device_count()} "
            "GPUs; accepted: at most one process a GPU"
        )
    return torch.device("cuda", index)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for a while: libraries then find srun's tasks as torchrun's."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
