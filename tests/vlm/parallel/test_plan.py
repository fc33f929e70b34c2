"""Who holds which token and who encodes what: exhaustive and by brute force."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.vlm.parallel.plan import SequencePlan, route, shift_labels, split_by_cost
from foveate.vlm.parallel.topology import ParallelError

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=6)
PLANS = st.builds(
    lambda lengths, ulysses, ring: SequencePlan(tuple(lengths), ulysses, ring),
    LENGTHS,
    st.integers(1, 6),
    st.integers(1, 4),
)


@settings(max_examples=60, deadline=None)
@given(PLANS)
def test_every_token_has_one_rank_and_all_ranks_have_as_many(plan: SequencePlan) -> None:
    places = [plan.places(rank) for rank in range(plan.degree)]
    assert {len(of_rank) for of_rank in places} == {plan.local_tokens}
    real = np.concatenate([of_rank[of_rank >= 0] for of_rank in places])
    assert sorted(real.tolist()) == list(range(plan.tokens))
    for rank, of_rank in enumerate(places):
        assert (plan.owners[of_rank[of_rank >= 0]] == rank).all()
        assert (np.diff(of_rank[of_rank >= 0]) > 0).all()
    spare = plan.padded_tokens - plan.tokens
    chunk = 2 * plan.ring
    assert spare < chunk * (len(plan.lengths) + plan.ulysses)
    assert all(padded % chunk == 0 for padded in plan.padded)


@settings(max_examples=60, deadline=None)
@given(PLANS)
def test_positions_restart_at_documents_and_count_on_in_padding(plan: SequencePlan) -> None:
    of_pack = np.concatenate([np.arange(length) for length in plan.lengths])
    seen = []
    for rank in range(plan.degree):
        places, positions = plan.places(rank), plan.positions(rank)
        assert (positions[places >= 0] == of_pack[places[places >= 0]]).all()
        seen += positions.tolist()
    assert sorted(seen) == sorted(position for padded in plan.padded for position in range(padded))


@settings(max_examples=40, deadline=None)
@given(PLANS)
def test_rows_compute_the_same_of_causal_attention(plan: SequencePlan) -> None:
    rows = [
        np.concatenate([plan.positions(row * plan.ulysses + place) for place in range(plan.ulysses)])
        for row in range(plan.ring)
    ]
    assert len({int((row + 1).sum()) for row in rows}) == 1  # pairs of a query and a key that it sees


def test_row_and_chunks_are_zigzag() -> None:
    plan = SequencePlan((8, 3), 1, 2)
    assert plan.padded == (8, 4)
    assert plan.places(0).tolist() == [0, 1, 6, 7, 8, -1]
    assert plan.places(1).tolist() == [2, 3, 4, 5, 9, 10]
    assert plan.segments.bounds == (0, 4, 6) and plan.halves.bounds == (0, 2, 3)
    assert plan.front.tolist() == [True, True, False, False, True, False]


def test_position_ids_of_several_axes_come_back_as_they_were() -> None:
    plan = SequencePlan((5, 9, 1), 2, 3)
    ids = torch.arange(3 * plan.tokens).view(3, 1, plan.tokens)
    parts = [plan.shard(ids, rank, -7) for rank in range(plan.degree)]
    assert all(part.shape == (3, 1, plan.local_tokens) for part in parts)
    assert torch.equal(plan.unshard(parts), ids)
    assert sum(int((part == -7).sum()) for part in parts) == 3 * (plan.padded_tokens - plan.tokens)
    with pytest.raises(ParallelError, match=r"accepted: \[\.\.\., 15\]"):
        plan.shard(ids[..., 1:], 0, 0)


def test_labels_are_shifted_within_documents() -> None:
    labels = torch.tensor([[-100, 1, 2, -100, 4, -100, 6]])
    assert shift_labels(labels, (3, 3, 1)).tolist() == [[1, 2, -100, 4, -100, -100, -100]]


@settings(max_examples=30, deadline=None)
@given(PLANS, st.randoms(use_true_random=False))
def test_every_label_is_counted_once(plan: SequencePlan, random) -> None:
    labels = torch.tensor([random.choice([-100, 1, 2]) for _ in range(plan.tokens)])
    labels[torch.tensor([0, *np.cumsum(plan.lengths)[:-1]])] = -100  # nothing predicts a document's first token
    targets = shift_labels(labels, plan.lengths)
    parts = [plan.shard(targets, rank, -100) for rank in range(plan.degree)]
    kept = sorted(int(target) for part in parts for target in part if target != -100)
    assert kept == sorted(int(label) for label in labels if label != -100)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 5))
def test_the_costliest_share_is_as_cheap_as_any_contiguous_split_has_it(costs: list[int], parts: int) -> None:
    ranges = split_by_cost(costs, parts)
    assert [number for share in ranges for number in share] == list(range(len(costs)))
    assert len(ranges) == parts
    cuts = combinations(sorted([*range(len(costs) + 1)] * (parts - 1)), parts - 1)
    best = min(max(sum(costs[a:b]) for a, b in zip((0, *cut), (*cut, len(costs)), strict=True)) for cut in set(cuts))
    assert max((sum(costs[i] for i in share) for share in ranges), default=0) == best


def test_shares_of_skewed_media_are_even_where_a_split_by_count_is_not() -> None:
    # Frames of a tile each, then images of up to 14: what dynamic tiles make of a mixture.
    costs = [1] * 600 + [14] * 60 + [1] * 40 + [9] * 50
    even = np.array([sum(costs[i] for i in share) for share in split_by_cost(costs, 8)])
    by_count = np.array([sum(part) for part in np.array_split(costs, 8)])
    assert even.max() / even.mean() <= 1.02 and by_count.max() / by_count.mean() > 1.5


@settings(max_examples=60, deadline=None)
@given(PLANS, st.randoms(use_true_random=False))
def test_routes_fit_each_other_and_bring_every_token_to_its_place(plan: SequencePlan, random) -> None:
    places = np.array([place for place in range(plan.tokens) if random.random() < 0.6], dtype=np.int64)
    cuts = sorted(random.randrange(len(places) + 1) for _ in range(plan.degree - 1))
    counts = [b - a for a, b in zip((0, *cuts), (*cuts, len(places)), strict=True)]
    routes = [route(plan, places, counts, rank) for rank in range(plan.degree)]
    encoded = np.split(places, np.cumsum(counts)[:-1])  # a token is its place
    boxes = [
        np.split(own[one.send_index.numpy()], np.cumsum(one.send_counts)[:-1])
        for own, one in zip(encoded, routes, strict=True)
    ]
    for rank, one in enumerate(routes):
        assert one.receive_counts == tuple(len(box[rank]) for box in boxes)
        got = np.concatenate([box[rank] for box in boxes])
        held = plan.places(rank)
        assert got.tolist() == [place for place in held.tolist() if place in set(places.tolist())]


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ParallelError, match="holds 2 placeholders, but 3 visual tokens"):
        route(SequencePlan((4,), 2, 1), np.array([1, 2]), [3, 0], 0)
    for lengths in ((), (3, 0)):
        with pytest.raises(ParallelError, match="lengths"):
            SequencePlan(lengths, 1, 1)
