"""Intervals and tests against what is known, exact enumeration and scipy."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from foveate.eval.statistics import bootstrap_interval, holm, mcnemar, paired_p, wilson_interval


def answers(both: int, only_first: int, only_second: int, n: int) -> tuple[list[bool], list[bool]]:
    """Two lists of answers with so many right in both, and in one alone."""
    first = [True] * (both + only_first) + [False] * (n - both - only_first)
    second = [True] * both + [False] * only_first + [True] * only_second
    return first, second + [False] * (n - len(second))


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # from Wilson's formula as tabulated, 95 %
        (0, 10, 0.0, 0.2775),
        (1, 10, 0.0179, 0.4042),
        (8, 10, 0.4902, 0.9433),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson_interval_has_the_known_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (3, 7), (250, 500), (499, 500), (0, 2000)])
def test_wilson_interval_holds_what_the_score_test_does_not_reject(correct: int, n: int) -> None:
    """p belongs to it when |correct / n - p| ≤ z √(p (1 - p) / n): tried on a fine grid."""
    p = np.linspace(0, 1, 200_001)
    accepted = p[np.abs(correct / n - p) <= 1.959964 * np.sqrt(p * (1 - p) / n) + 1e-12]
    assert wilson_interval(correct, n) == pytest.approx((accepted.min(), accepted.max()), abs=1e-5)


def test_wilson_interval_holds_the_proportion_to_the_last_bit() -> None:
    for n in (1, 7, 2400):
        assert wilson_interval(0, n)[0] == 0 and wilson_interval(n, n)[1] == 1
        assert all((found := wilson_interval(c, n))[0] <= c / n <= found[1] for c in range(n + 1))


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 4), (5, 4)])
def test_wilson_interval_refuses_what_can_not_be(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="accepted"):
        wilson_interval(correct, n)


def test_bootstrap_has_the_standard_error_of_a_mean_of_seeds() -> None:
    rng = np.random.default_rng(1)
    samples = [rng.normal(0.1, 1, 400), rng.normal(7, 2, 900)]
    middle = (samples[0].mean() + samples[1].mean()) / 2
    spread = 1.96 * math.sqrt(samples[0].var() / 400 + samples[1].var() / 900) / 2
    low, high = bootstrap_interval(lambda mean: mean, samples)
    assert low == pytest.approx(middle - spread, abs=0.15 * spread)
    assert high == pytest.approx(middle + spread, abs=0.15 * spread)


def test_bootstrap_draws_the_same_questions_of_all_samples() -> None:
    values = [np.random.default_rng(2).random(200)]
    assert bootstrap_interval(lambda a, b: a - b, values, [values[0] - 0.3]) == pytest.approx((0.3, 0.3))
    assert bootstrap_interval(lambda a, b: a / b, values, [2 * values[0]]) == pytest.approx((0.5, 0.5))


def test_paired_p_is_that_of_all_sign_flips() -> None:
    a = np.array([8, 7, 6, 8, 3, 8, 5, 4, 8, 2, 7, 6]) / 8
    b = np.array([6, 7, 4, 8, 4, 3, 5, 1, 6, 2, 8, 1]) / 8
    sums = [
        abs(sum(s * d for s, d in zip(signs, a - b, strict=True))) for signs in itertools.product((1, -1), repeat=12)
    ]
    exact = np.mean([one >= abs((a - b).sum()) - 1e-9 for one in sums])
    assert 0.01 < exact < 0.1
    assert paired_p([a[:5], a[5:]], [b[:5], b[5:]], flips=40_000) == pytest.approx(exact, rel=0.1)
    assert paired_p([a], [a]) == 1
    far = [np.ones(50)], [np.zeros(50)]
    assert paired_p(*far, flips=999) == 1 / 1000


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (9, 2), (40, 61), (300, 300)])
def test_mcnemar_is_the_binomial_test_of_what_differs(only_first: int, only_second: int) -> None:
    found = mcnemar(*answers(200, only_first, only_second, 1000))
    differ = only_first + only_second
    assert found.p == pytest.approx(stats.binomtest(only_first, differ).pvalue if differ else 1, abs=1e-12)
    assert (found.n, found.only_first, found.only_second) == (1000, only_first, only_second)
    assert found.difference == pytest.approx((only_first - only_second) / 1000)
    assert found.low <= found.difference <= found.high


@pytest.mark.parametrize("cells", [(0.6, 0.1, 0.05), (0.2, 0.3, 0.1), (0.9, 0.05, 0.02), (0.1, 0.4, 0.4)])
def test_interval_of_a_paired_difference_covers_the_truth(cells: tuple[float, float, float]) -> None:
    n, covered, truth = 24, 0.0, cells[1] - cells[2]
    law = stats.multinomial(n, [*cells, 1 - sum(cells)])
    for counts in itertools.product(range(n + 1), repeat=3):
        if (left := n - sum(counts)) >= 0 and (chance := law.pmf([*counts, left])) > 1e-9:
            found = mcnemar(*answers(*counts, n))
            covered += chance * (found.low <= truth <= found.high)
    assert covered > 0.935


@pytest.mark.parametrize("counts", [(700, 150, 60), (20, 300, 200), (900, 30, 30)])
def test_interval_of_a_paired_difference_is_near_the_bootstrap(counts: tuple[int, int, int]) -> None:
    first, second = answers(*counts, 1000)
    found = mcnemar(first, second)
    drawn = bootstrap_interval(lambda a, b: a - b, [np.array(first, float)], [np.array(second, float)])
    assert (found.low, found.high) == pytest.approx(drawn, abs=0.1 * (drawn[1] - drawn[0]))


def test_mcnemar_refuses_other_questions() -> None:
    with pytest.raises(ValueError, match="3 and 2 answers; accepted: the same questions"):
        mcnemar([True] * 3, [True] * 2)
    with pytest.raises(ValueError, match="at least one"):
        mcnemar([], [])


def test_holm_multiplies_by_the_tests_that_are_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
