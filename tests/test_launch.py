"""The launch scripts, with stand-ins for the cluster's commands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
BIN = Path(sys.executable).parent
PORT = 20000 + os.getpid() % 10000

# Notes how it was started, then ends; where WAIT is set at SIGTERM, as `foveate train` does.
FOVEATE = """#!/bin/bash
out=$CALLS/${RANK:-${SLURM_PROCID:-alone}}
trap 'echo saved >"$out.saved"; exit 0' TERM
world="${WORLD_SIZE:-} ${LOCAL_RANK:-} ${MASTER_ADDR:-} ${MASTER_PORT:-}"
echo "${PYTHONPATH:-}" >"$out.pythonpath"
printf '%s\\n' "$PWD" "$world" "$@" >"$out.part"
mv "$out.part" "$out"
[ -z "${FAIL:-}" ] || exit "$FAIL"
while [ -n "${WAIT:-}" ]; do sleep 0.05; done
"""
# Runs the tasks here, as Slurm does with one node, and names their process ids for the test to signal.
SRUN = """#!/bin/bash
echo "$@" >>"$CALLS/srun"
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  echo $! >>"$CALLS/tasks"
  tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do wait "$task" || worst=$?; done
exit $worst
"""
SCONTROL = """#!/bin/bash
echo "$@" >>"$CALLS/scontrol"
[ "$1 $2" != "show hostnames" ] || printf '%s\\n' 127.0.0.1 other
"""
# Each host's command, here: `%n` is the host's number.
PDSH = """#!/bin/bash
echo "$@" >>"$CALLS/pdsh"
while [[ $1 == -* ]]; do
  case $1 in
    -w) hosts=$2; shift ;;
    -f) shift ;;
  esac
  shift
done
number=0
for host in ${hosts//,/ }; do
  command="$*"
  bash -c "${command//%n/$number}" &
  number=$((number + 1))
done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
"""
SSH = """#!/bin/bash
echo "$@" >>"$CALLS/ssh"
echo 127.0.0.1
"""


class Cluster:
    """Stand-ins on PATH; `calls` is the folder where they note how they were called."""

    def __init__(self, folder: Path, real: bool = False):
        self.folder, self.calls, self.bin = folder, folder / "calls", folder / "bin"
        self.calls.mkdir(parents=True)
        self.bin.mkdir()
        stand_ins = {"srun": SRUN, "scontrol": SCONTROL, "pdsh": PDSH, "ssh": SSH} | (
            {} if real else {"foveate": FOVEATE}
        )
        for name, text in stand_ins.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER_", "CONTAINER_"))}
        self.environment = inherited | {
            "PATH": f"{self.bin}:{BIN}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }

    def start(self, script: str, *arguments: object, cwd: Path = ROOT, **environment: object) -> subprocess.Popen:
        command = ["bash", str(SCRIPTS / script), *map(str, arguments)]
        variables = self.environment | {name: str(value) for name, value in environment.items()}
        return subprocess.Popen(
            command, cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, script: str, *arguments: object, cwd: Path = ROOT, **environment: object) -> tuple[int, str, str]:
        return finish(self.start(script, *arguments, cwd=cwd, **environment))

    def noted(self, name: object) -> list[str]:
        path = self.calls / str(name)
        return path.read_text().splitlines() if path.exists() else []


def finish(process: subprocess.Popen, timeout_s: float = 200) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def wait_for(condition: Callable[[], object], process: subprocess.Popen, timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(finish(process, 1))
        time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    yield Cluster(tmp_path / "cluster")


SLURM = {
    "SLURM_JOB_ID": 4242, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": 2, "SLURM_CPUS_PER_TASK": 1,
    "MASTER_PORT": PORT,
}  # fmt: skip


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train_torchrun.sh", []),
        ("train_torchrun.sh", ["recipe"]),
        ("train_torchrun.sh", ["--help", "out"]),
        ("train_torchrun.sh", ["recipe", "stages.align.steps=2"]),
        ("train_deepspeed.sh", ["hosts", "recipe"]),
        ("train_deepspeed.sh", ["hosts", "recipe", "threads=1"]),
        ("train_slurm.sbatch", ["recipe"]),
        ("train_slurm.sbatch", ["recipe", "--out"]),
    ],
)
def test_wrong_arguments_get_the_usage(cluster: Cluster, script: str, arguments: list[str]) -> None:
    code, out, err = cluster.run(script, *arguments)
    assert (code, out) == (2, "") and err.startswith("usage: ") and f"scripts/{script}" in err and err.count("\n") == 1


def test_usage_in_the_head_of_a_script_is_what_it_prints(cluster: Cluster) -> None:
    for script in ("train_torchrun.sh", "train_deepspeed.sh"):
        printed = cluster.run(script)[2].removeprefix("usage: ").strip()
        assert f"#   {printed}\n" in (SCRIPTS / script).read_text()


@pytest.mark.parametrize("script", ["train_torchrun.sh", "train_deepspeed.sh", "train_slurm.sbatch", "tiny_data.sh"])
def test_script_is_bash_without_paths_of_a_machine(script: str) -> None:
    text = (SCRIPTS / script).read_text()
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=False, timeout=30).returncode == 0
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert not re.search(r"/(home|root|data|mnt|scratch|lustre|opt|work)/", text)


# torchrun


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_torchrun_starts_processes_that_a_signal_lets_save(
    cluster: Cluster, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = cluster.start("train_torchrun.sh", "tiny", "some out", "a.b=[1, 2]", "c=d", cwd=tmp_path, NPROC=2, WAIT=1)
    wait_for(lambda: (cluster.calls / "0").exists() and (cluster.calls / "1").exists(), process)
    os.kill(process.pid, number)  # as `kill`, or the scheduler; a terminal's reaches this process group alone
    ended, _, err = finish(process)
    assert ended == code, err
    for rank in "01":
        place, ranks, *arguments = cluster.noted(rank)
        assert place == str(tmp_path) and ranks.startswith(f"2 {rank} ")
        assert arguments == ["train", "tiny", "a.b=[1, 2]", "c=d", "--out", "some out", "--auto-resume"]
        assert cluster.noted(f"{rank}.saved") == ["saved"]


def test_torchrun_passes_a_failure_on(cluster: Cluster) -> None:
    code, _, _ = cluster.run("train_torchrun.sh", "tiny", "out", NPROC=1, FAIL=3)
    assert code == 1


def test_number_of_processes_is_checked(cluster: Cluster) -> None:
    code, _, err = cluster.run("train_torchrun.sh", "tiny", "out", NPROC="two")
    assert code == 2 and "NPROC is 'two'" in err and cluster.noted("alone") == []


# DeepSpeed


def test_deepspeed_starts_a_process_a_slot_on_each_host(cluster: Cluster, tmp_path: Path) -> None:
    """From the repository's root, where Python must not find our `kernels/`."""
    hosts = tmp_path / "hosts"
    hosts.write_text("first slots=1\nsecond slots=1\n")
    code, _, err = cluster.run("train_deepspeed.sh", hosts, "tiny", "some out", "engine=zero2", MASTER_PORT=PORT + 1)
    assert code == 0, err
    assert "-w first,second" in cluster.noted("pdsh")[0] and "cd /;" in cluster.noted("pdsh")[0]
    assert all(call.split()[-2] == "first" or "first" in call for call in cluster.noted("ssh"))
    for rank in "01":
        place, ranks, *arguments = cluster.noted(rank)
        assert (place, ranks) == (str(ROOT), f"2 0 127.0.0.1 {PORT + 1}")
        assert arguments == ["train", "tiny", "engine=zero2", "--out", "some out", "--auto-resume"]
        assert cluster.noted(f"{rank}.pythonpath") == [os.environ.get("PYTHONPATH", "")]


def test_deepspeed_needs_its_hostfile_and_its_command(cluster: Cluster, tmp_path: Path) -> None:
    code, _, err = cluster.run("train_deepspeed.sh", tmp_path / "hosts", "tiny", "out")
    assert code == 2 and "no such hostfile" in err
    (tmp_path / "hosts").write_text("first slots=1\n")
    code, _, err = cluster.run("train_deepspeed.sh", tmp_path / "hosts", "tiny", "out", FOVEATE="no-such-command")
    assert code == 2 and "no-such-command: no such command" in err
    assert cluster.noted("ssh") == []


# Slurm


def test_slurm_asks_for_the_signal_and_for_requeueing() -> None:
    options = re.findall(r"^#SBATCH (.+)$", (SCRIPTS / "train_slurm.sbatch").read_text(), re.MULTILINE)
    assert "--signal=USR1@180" in options and "--requeue" in options and "--open-mode=append" in options


def test_slurm_starts_tasks_that_find_the_first_node(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stages.json").touch()
    variables = {name: value for name, value in SLURM.items() if name != "MASTER_PORT"}
    code, out, err = cluster.run("train_slurm.sbatch", "tiny", "out", "a=1", cwd=tmp_path, **variables)
    assert code == 0, err
    assert out.splitlines()[-1] == "done: out"
    assert cluster.noted("scontrol") == ["show hostnames node[1-2]"]
    assert cluster.noted("srun") == [
        "--kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task=1 foveate train tiny a=1 --out out --auto-resume"
    ]
    assert cluster.noted(0)[1] == cluster.noted(1)[1] == f"  127.0.0.1 {10000 + 4242}"


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("my.sif", "foveate apptainer exec --nv --bind /a:/a --pwd {cwd} my.sif foveate train tiny"),
        ("my.sqsh", "--container-image=my.sqsh --container-mounts=/a:/a --container-workdir={cwd} foveate train tiny"),
    ],
)
def test_slurm_runs_in_a_container(cluster: Cluster, tmp_path: Path, image: str, expected: str) -> None:
    (cluster.bin / "apptainer").symlink_to(cluster.bin / "foveate")
    code, _, err = cluster.run("train_slurm.sbatch", "tiny", "out", cwd=tmp_path, CONTAINER_IMAGE=image, **SLURM)
    assert code == 1 and "CONTAINER_MOUNTS" in err and cluster.noted("srun") == []
    cluster.run(
        "train_slurm.sbatch", "tiny", "out", cwd=tmp_path, CONTAINER_IMAGE=image, CONTAINER_MOUNTS="/a:/a", **SLURM
    )
    assert expected.format(cwd=tmp_path).removeprefix("foveate ") in cluster.noted("srun")[0]


def test_slurm_does_not_requeue_what_failed_or_made_no_progress(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.run("train_slurm.sbatch", "tiny", "out", cwd=tmp_path, FAIL=3, **SLURM)[0] == 3
    (tmp_path / "out" / "checkpoints" / "step-00000002").mkdir(parents=True)
    code, _, err = cluster.run("train_slurm.sbatch", "tiny", "out", cwd=tmp_path, **SLURM)
    assert code == 1 and "no new checkpoint" in err.replace("stopped before there was a", "no")
    assert not any(call.startswith("requeue") for call in cluster.noted("scontrol"))


def test_slurm_needs_a_job(cluster: Cluster) -> None:
    code, _, err = cluster.run("train_slurm.sbatch", "tiny", "out")
    assert code == 1 and "SLURM_JOB_ID: is not set: start this by sbatch" in err


@pytest.mark.slow
def test_slurm_job_saves_at_the_signal_requeues_and_finishes(tiny_recipe_path: Path, tmp_path: Path) -> None:
    """Two tasks of the real command: signalled as Slurm does, started again by the same script."""
    cluster = Cluster(tmp_path / "cluster", real=True)
    stage = (
        "{name: only, steps: 30, learning_rates: {projector: 1.0e-3, llm: 1.0e-3}, data: [{kind: captions}],"
        " batch: {rows: 1, tokens: 200, micro_batches: 2}}"
    )
    arguments = [tiny_recipe_path, "out", f"stages=[{stage}]", "checkpoint.every_steps=1000", "tracking.every_steps=1"]
    metrics, out = tmp_path / "out" / "metrics.jsonl", tmp_path / "out"

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in metrics.read_text().splitlines()]

    process = cluster.start("train_slurm.sbatch", *arguments, cwd=tmp_path, **SLURM)
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, process)
    for task in cluster.noted("tasks"):
        os.kill(int(task), signal.SIGUSR1)
    code, printed, err = finish(process)
    assert code == 0, err
    assert cluster.noted("scontrol")[-1] == "requeue 4242"
    done = steps()[-1]
    assert 1 < done < 30 and (out / "checkpoints" / f"step-{done:08d}").is_dir() and not (out / "stages.json").exists()
    assert f"step-{done:08d}; requeueing job 4242" in printed

    (cluster.calls / "scontrol").unlink()
    code, printed, err = cluster.run("train_slurm.sbatch", *arguments, cwd=tmp_path, **SLURM)
    assert code == 0, err
    assert printed.splitlines()[-1] == "done: out"
    assert cluster.noted("scontrol") == ["show hostnames node[1-2]"]
    assert steps() == list(range(1, 31)) and (out / "model" / "model.safetensors").is_file()
