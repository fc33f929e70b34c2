"""Intervals for measured accuracies."""

import math


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95 % by default.

    Args:
        correct: successes among n, 0 ≤ correct ≤ n.
        n: trials, at least 1.
        z: quantile of the normal distribution.
    """
    if not (n > 0 and 0 <= correct <= n):
        raise ValueError(f"correct is {correct} of n {n}; accepted: 0 ≤ correct ≤ n, n ≥ 1")
    p = correct / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
