"""Times of things that take turns, and what results say of them."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

from ..eval.facts import result
from .bench import now


class Times(NamedTuple):
    """Seconds that something took: by the clock, and of the processor.

    Those of a CPU are the process's on all cores, which others on the machine disturb less; those of a GPU are its
    kernels', without the time in which it waited for one to be launched.
    """

    wall: float
    busy: float


def timed(device: torch.device, work: Callable[[], object]) -> Times:
    """What the work takes; on a GPU it is done twice."""
    wall, cpu = now(device), time.process_time()
    work()
    wall, cpu = now(device) - wall, time.process_time() - cpu
    if device.type == "cpu":
        return Times(wall, cpu)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize(device)
    return Times(wall, sum(event.self_device_time_total for event in profile.key_averages()) / 1e6)


class Turns:
    """Times of several ways of doing the same, a median of each in each round.

    Args:
        device: on which they are done.
        name: of what they do, for the results.
        unit, per_s: of times in results; as many make a second.
        baselines: ways that the others are compared with, where they are measured.
    """

    def __init__(self, device: torch.device, name: str, unit: str, per_s: float, baselines: tuple[str, ...]):
        self.name, self.unit, self.per_s, self.baselines = name, unit, per_s, baselines
        self.busy = "gpu" if device.type == "cuda" else "cpu"
        self.rounds: dict[str, list[Times]] = {}

    def add(self, way: str, taken: list[Times]) -> None:
        """A round of a way."""
        both = Times(median(times.wall for times in taken), median(times.busy for times in taken))
        self.rounds.setdefault(way, []).append(both)

    def seconds(self, way: str, clock: str = "wall") -> float:
        return median(getattr(times, clock) for times in self.rounds[way])

    def results(self, way: str) -> list[dict[str, Any]]:
        """Its times, and how many times those of each baseline they are: median, lowest and highest of the rounds."""
        results = []
        for clock, prefix in (("wall", ""), ("busy", f"{self.busy}_")):
            own = [getattr(times, clock) for times in self.rounds[way]]
            results.append(self._result(f"{way}_{prefix}{self.name}", [s * self.per_s for s in own], self.unit))
            for other in self.baselines:
                if way not in self.baselines and other in self.rounds:
                    theirs = [getattr(times, clock) for times in self.rounds[other]]
                    ratios = [a / b for a, b in zip(own, theirs, strict=True)]
                    results.append(self._result(f"{way}_{prefix}over_{other}", ratios, "times its time"))
        return results

    def _result(self, name: str, values: list[float], unit: str) -> dict[str, Any]:
        return result(name, median(values), unit, len(values), low=min(values), high=max(values))
