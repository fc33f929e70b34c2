import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.data.document import Document, Text
from foveate.data.mixture import BLOCK, Mixture, SourceOrder


class Named:
    """Documents `name/0`, `name/1`, … in runs."""

    def __init__(self, name: str, runs: list[int] | None = None):
        self.name, self.runs = name, runs or []
        self.documents = sum(runs) if runs else None

    def document(self, index: int) -> Document:
        return Document(self.key(index), (Text("red"),))

    def key(self, index: int) -> str:
        return f"{self.name}/{index}"


def keys(mixture: Mixture, positions: range) -> list[str]:
    return [mixture.document(p).key for p in positions]


@given(st.lists(st.integers(1, 700), min_size=1, max_size=8), st.integers(1, 900), st.integers(0, 5))
@settings(max_examples=60)
def test_an_order_holds_every_document_once(runs: list[int], shuffle: int, epoch: int) -> None:
    order = SourceOrder(runs, shuffle, [3, 1])
    assert sorted(order.index(epoch, i) for i in range(sum(runs))) == list(range(sum(runs)))


def test_orders_differ_by_epoch_and_seed_and_read_locally() -> None:
    runs = [1000] * 20
    orders = [
        [SourceOrder(runs, 512, seed).index(epoch, i) for i in range(2000)]
        for seed, epoch in (([1, 0], 0), ([1, 0], 1), ([2, 0], 0))
    ]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    first_window = orders[0][:512]
    assert len({index // 256 for index in first_window}) <= 6  # few runs are read in a window
    assert np.mean(np.abs(np.diff(first_window)) == 1) < 0.05  # yet neighbours are shuffled


def test_shuffle_zero_keeps_the_order() -> None:
    assert keys(Mixture([Named("a", [3, 4])], [1], seed=0, shuffle=0), range(9)) == [
        f"a/{i}" for i in (*range(7), 0, 1)
    ]


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 3000), min_size=1, max_size=3), st.integers(1, 3)), min_size=1, max_size=4
    ),
    st.integers(1, 2),
)
@settings(max_examples=20, deadline=None)
def test_an_epoch_holds_every_document_as_often_as_asked(sources: list[tuple[list[int], int]], epochs: int) -> None:
    named = [Named(str(i), runs) for i, (runs, _) in enumerate(sources)]
    mixture = Mixture(named, [times for _, times in sources], seed=5, epochs=epochs)
    length = sum(sum(runs) * times for runs, times in sources)
    assert mixture.documents == epochs * length
    for epoch in range(epochs):
        seen = Counter(keys(mixture, range(epoch * length, (epoch + 1) * length)))
        assert seen == {f"{i}/{j}": times for i, (runs, times) in enumerate(sources) for j in range(sum(runs))}
    with pytest.raises(IndexError, match=f"position {epochs * length} of"):
        mixture.locate(epochs * length)


def test_proportions_hold_in_every_stretch() -> None:
    mixture = Mixture([Named("a"), Named("b", [500]), Named("c", [7])], [3, 6, 0.01], seed=0)
    for start in (0, 5 * BLOCK, 1_000_000 * BLOCK):
        counts = Counter(key[0] for key in keys(mixture, range(start, start + BLOCK)))
        for name, share in (("a", 3 / 9.01), ("b", 6 / 9.01), ("c", 0.01 / 9.01)):
            assert abs(counts[name] - BLOCK * share) <= 2


def test_sources_are_mixed_within_a_block() -> None:
    names = [key[0] for key in keys(Mixture([Named("a"), Named("b")], [1, 1], seed=0), range(400))]
    changes = sum(x != y for x, y in pairwise(names))
    assert 150 < changes < 250  # as of a fair coin


def test_a_source_comes_whole_before_it_comes_again() -> None:
    mixture = Mixture([Named("a", [30, 20]), Named("b")], [1, 3], seed=2, shuffle=16)
    mine = [key for key in keys(mixture, range(600)) if key.startswith("a/")]
    assert len(set(mine[:50])) == 50 and len(set(mine[50:100])) == 50
    assert mine[:50] != mine[50:100]


@given(st.integers(0, 10**12))
@settings(max_examples=50)
def test_any_position_is_found_without_those_before(position: int) -> None:
    sources = [Named("a", [13, 200]), Named("b")]
    mixture = Mixture(sources, [1, 2.5], seed=1)
    first = mixture.locate(position)
    assert Mixture(sources, [1, 2.5], seed=1).locate(position) == first
    assert pickle.loads(pickle.dumps(mixture)).locate(position) == first
    mixture.locate(position + 10 * BLOCK)  # what is cached changes nothing
    assert mixture.locate(position) == first


def test_another_seed_is_another_mixture() -> None:
    sources = [Named("a", [100]), Named("b", [100])]
    assert keys(Mixture(sources, [1, 1], seed=1), range(50)) != keys(Mixture(sources, [1, 1], seed=2), range(50))


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_weights_must_be_positive_and_one_a_source(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights are"):
        Mixture([Named("a"), Named("b")], weights, seed=0)


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(ValueError, match="accepted"):
        Mixture([], [], seed=0)
    with pytest.raises(ValueError, match="source 1 is endless, so it has no epochs"):
        Mixture([Named("a", [3]), Named("b")], [1, 1], seed=0, epochs=1)
    with pytest.raises(ValueError, match="whole numbers"):
        Mixture([Named("a", [3])], [1.5], seed=0, epochs=1)
    with pytest.raises(ValueError, match="a millionth"):
        Mixture([Named("a"), Named("b")], [1, 1e-9], seed=0)
