import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from foveate.train.distributed import MASTER, RANKS, SLURM, LaunchError, World, init_world

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the environment that a launcher would, and nothing else of the kind."""
    for name in (*RANKS, *MASTER, *SLURM.values()):
        monkeypatch.delenv(name, raising=False)

    def launch(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize("variables", [{}, {"MASTER_ADDR": "host"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}])
def test_without_a_launcher_the_process_is_alone(launched: Callable[..., None], variables: dict[str, str]) -> None:
    launched(variables)
    with init_world("cpu") as world:
        assert (world.rank, world.size, world.local_rank, world.device) == (0, 1, 0, torch.device("cpu"))
        assert not dist.is_initialized()
        assert world.gather({"a": 1}, "data") == [{"a": 1}]
        world.barrier("checkpoint")


def test_one_launched_process_needs_no_address(launched: Callable[..., None]) -> None:
    launched({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    with init_world("cpu") as world:
        assert world == World() and not dist.is_initialized()


def test_group_that_deepspeed_makes_is_left_at_the_end(launched: Callable[..., None]) -> None:
    launched({})
    with init_world("cpu"):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert not dist.is_initialized()


@pytest.mark.parametrize("missing", TORCHRUN)
def test_incomplete_environment_is_refused_by_name(launched: Callable[..., None], missing: str) -> None:
    launched({name: value for name, value in TORCHRUN.items() if name != missing})
    with pytest.raises(LaunchError, match=f"no {missing}; accepted: all of RANK, WORLD_SIZE"), init_world("cpu"):
        pass
    assert not dist.is_initialized()


@pytest.mark.parametrize("missing", ["SLURM_NTASKS", "MASTER_PORT"])
def test_incomplete_environment_of_slurm_is_refused_by_name(launched: Callable[..., None], missing: str) -> None:
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    launched({name: value for name, value in slurm.items() if name != missing})
    own = {theirs: name for name, theirs in SLURM.items()}.get(missing, missing)
    with pytest.raises(LaunchError, match=f"no {own}; accepted: all of SLURM_PROCID"), init_world("cpu"):
        pass


@pytest.mark.parametrize(("name", "value"), [("RANK", "2"), ("RANK", "-1"), ("WORLD_SIZE", "two"), ("LOCAL_RANK", "")])
def test_ranks_that_can_not_be_are_refused(launched: Callable[..., None], name: str, value: str) -> None:
    launched(TORCHRUN | {name: value})
    with pytest.raises(LaunchError, match=f"^{name} is '?{value}"), init_world("cpu"):
        pass


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="has that many GPUs")
def test_more_processes_than_gpus_are_refused(launched: Callable[..., None]) -> None:
    launched(TORCHRUN | {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "7"})
    with pytest.raises(LaunchError, match=r"cuda:7.*at most one process a GPU"), init_world("cuda"):
        pass


WORK = """
    import json, os, sys, threading
    import torch, torch.distributed as dist
    from foveate.train.distributed import init_world

    with init_world("cpu", timeout_s=60) as world:
        found = {"place": [world.rank, world.size, world.local_rank], "RANK": os.environ["RANK"]}
        # Threads in groups of their own, in another order on each rank: with one group they would get each other's.
        def talk(group):
            found[group] = [world.gather([group, world.rank, i], group) for i in range(20)]
            world.barrier(group)
        threads = [threading.Thread(target=talk, args=(g,)) for g in ("data", "checkpoint", "main")]
        for thread in threads[::1 if world.rank else -1]:
            thread.start()
        for thread in threads:
            thread.join()
        # The last to be done is a step of DDP: its threads must have ended when the interpreter does.
        ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(9, 9))
        ddp(torch.ones(2, 9)).sum().backward()
        if world.rank == 1:
            print(json.dumps(found))
        if sys.argv[1:] == ["fail"]:
            raise RuntimeError("this rank only") if world.rank else SystemExit(0)
    assert not dist.is_initialized() and world.groups == {}
    assert ("RANK" in os.environ) == ("SLURM_PROCID" not in os.environ)
"""


def run(variables: list[dict[str, str]], *arguments: str) -> list[subprocess.CompletedProcess]:
    """A process for each environment, at the same time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(WORK), *arguments]
    inherited = {k: v for k, v in os.environ.items() if k not in (*RANKS, *MASTER, *SLURM.values())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": Path(__file__).parent}
    processes = [subprocess.Popen(command, env=inherited | master | own, **pipes) for own in variables]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(command, p.returncode, out, err)
        for p, (out, err) in zip(processes, outputs, strict=True)
    ]


@pytest.mark.parametrize(
    ("names", "ending"), [(dict(zip(RANKS, RANKS, strict=True)), ("fail",)), (SLURM, ())], ids=["torchrun", "srun"]
)
def test_processes_find_each_other_and_threads_have_groups_of_their_own(
    names: dict[str, str], ending: tuple[str, ...]
) -> None:
    ranks = [{names["RANK"]: str(n), names["WORLD_SIZE"]: "2", names["LOCAL_RANK"]: str(n)} for n in range(2)]
    done = run(ranks, *ending)
    # a rank that fails in the end says so, and neither hangs
    assert [process.returncode for process in done] == [0, len(ending)], done[0].stderr[-2000:] + done[1].stderr[-2000:]
    assert ("RuntimeError: this rank only" in done[1].stderr) == bool(ending)
    found = json.loads(done[1].stdout)
    assert found["place"] == [1, 2, 1] and found["RANK"] == "1"
    for group in ("data", "checkpoint", "main"):
        assert found[group] == [[[group, rank, i] for rank in range(2)] for i in range(20)]
