"""What was run, and what came out: the JSON of measurements. It imports torch alone, for machines that have little."""

import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__

GPU_PACKAGES = ("triton", "flash-attn", "liger-kernel")


def process_peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had so far: of its GPU, or else its resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_facts(command: str, packages: Sequence[str] = ("torch", "transformers", "av")) -> dict[str, Any]:
    """What makes a result traceable: command, commit, date, device, versions.

    Args:
        command: what prints it again.
        packages: whose versions matter; those that are not installed are left out.

    The commit is git's, or the environment's COMMIT where the package was copied without its repository.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else _cpu_name()
    versions = {"python": platform.python_version(), "foveate": __version__}
    for name in (*packages, *(GPU_PACKAGES if on_gpu else ())):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": command,
        "commit": _commit() or os.environ.get("COMMIT"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": f"{device}, {torch.get_num_threads()} threads",
        "versions": versions,
    }


def result(name: str, value: float, unit: str, n: int, **more: Any) -> dict[str, Any]:
    """An entry of a results file.

    Args:
        n: measurements that it is made of.
        **more: `low`, `high`, `baseline` (name of the entry that it is compared with), `ratio` (value / baseline's);
            those that are None don't apply and are left out.
    """
    if unknown := set(more) - {"low", "high", "baseline", "ratio"}:
        raise TypeError(f"a result has no {', '.join(sorted(unknown))}; accepted: low, high, baseline, ratio")
    return {"name": name, "value": value, "unit": unit, "n": n} | {k: v for k, v in more.items() if v is not None}


def _commit() -> str:
    if shutil.which("git") is None:
        return ""
    folder = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return git.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
