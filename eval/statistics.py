"""Intervals and paired tests of measured accuracies."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959964  # the normal distribution's quantile of 97.5 %
RESAMPLES = 4000  # of questions, for bootstrap intervals


def wilson_interval(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
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
    # At 0 and n of n a limit is the proportion itself, but for rounding.
    return min(p, max(0.0, (centre - spread) / scale)), max(p, min(1.0, (centre + spread) / scale))


@dataclass(frozen=True)
class Paired:
    """Two accuracies on the same questions, compared.

    Attributes:
        difference: the first accuracy less the second.
        low, high: the difference's 95 % interval.
        p: of no difference, two-sided.
        n: questions.
        only_first, only_second: questions that one alone answers right.
    """

    difference: float
    low: float
    high: float
    p: float
    n: int
    only_first: int
    only_second: int


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """McNemar's exact test (McNemar 1947), with `newcombe_interval`.

    Args:
        first, second: whether each question is answered right; number i is the same question in both.

    Raises:
        ValueError: not equally many, or none.
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    n = len(a)
    if n != len(b) or not n:
        raise ValueError(f"{n} and {len(b)} answers; accepted: the same questions, at least one")
    both, only_a, only_b = (int(part.sum()) for part in (a & b, a & ~b, ~a & b))
    low, high = newcombe_interval(both, only_a, only_b, n)
    return Paired((only_a - only_b) / n, low, high, _sign_test(only_a, only_b), n, only_a, only_b)


def _sign_test(first: int, second: int) -> float:
    """The two-sided binomial probability of a split at least as uneven, each side being as likely."""
    n, least = first + second, min(first, second)
    tail = sum(math.comb(n, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2**n)


def newcombe_interval(both: int, only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies on the same questions (Newcombe 1998, method 10).

    Args:
        both, only_first, only_second: questions that both, the first or the second alone answers right, of n.
    """
    neither = n - both - only_first - only_second
    first, second = both + only_first, both + only_second
    (low_a, high_a), (low_b, high_b) = wilson_interval(first, n), wilson_interval(second, n)
    p_a, p_b = first / n, second / n
    margins = math.sqrt(first * (n - first) * second * (n - second))
    product = float(both * neither - only_first * only_second)
    if product > 0:
        product = max(product - n / 2, 0.0)  # the correction for continuity
    phi = product / margins if margins else 0.0
    below = (p_a - low_a) ** 2 - 2 * phi * (p_a - low_a) * (high_b - p_b) + (high_b - p_b) ** 2
    above = (high_a - p_a) ** 2 - 2 * phi * (high_a - p_a) * (p_b - low_b) + (p_b - low_b) ** 2
    return p_a - p_b - math.sqrt(max(below, 0.0)), p_a - p_b + math.sqrt(max(above, 0.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values of a family of tests (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, most = [0.0] * len(order), 0.0
    for rank, place in enumerate(order):
        most = max(most, min(1.0, (len(order) - rank) * p_values[place]))
        adjusted[place] = most
    return adjusted


def bootstrap_interval(
    statistic: Callable[..., np.ndarray], *samples: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """A percentile bootstrap's 95 % interval (Efron 1979); questions are drawn anew within each seed.

    Args:
        statistic: of the samples' means, arrays [resamples] each.
        samples: each of them of every seed [questions]; question number i is the same one in all, and is drawn
            together. A sample's mean is that of the seeds' means.
    """
    rng = np.random.default_rng(seed)
    means = [np.zeros(resamples) for _ in samples]
    for of_seed in zip(*samples, strict=True):
        stacked = np.stack(of_seed)  # [samples, questions]
        n = stacked.shape[1]
        for start in range(0, resamples, 500):
            count = min(500, resamples - start)
            drawn = rng.integers(n, size=(count, n))
            for mean, values in zip(means, stacked, strict=True):
                mean[start : start + count] += values[drawn].mean(1) / len(samples[0])
    low, high = np.quantile(statistic(*means), [0.025, 0.975])
    return float(low), float(high)


def paired_p(a: Sequence[np.ndarray], b: Sequence[np.ndarray], flips: int = 10_000, seed: int = 0) -> float:
    """Fisher's paired randomisation test, two-sided: the questions' differences with random signs.

    Args:
        a, b: of each seed the questions' scores, of the same questions.

    Returns:
        (1 + flips whose mean difference is at least the one seen) / (1 + flips).
    """
    differences = np.concatenate([x - y for x, y in zip(a, b, strict=True)])
    rng, beyond, seen = np.random.default_rng(seed), 0, abs(differences.sum()) - 1e-9
    for start in range(0, flips, 500):
        signs = rng.integers(0, 2, (min(500, flips - start), len(differences)), dtype=np.int8) * 2 - 1
        beyond += int((np.abs(signs @ differences) >= seen).sum())
    return (1 + beyond) / (1 + flips)
