import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from foveate.data.document import Document, DocumentError, Text
from foveate.data.encoding import Sample
from foveate.data.loader import (
    BadDocument,
    Loader,
    LoaderStateError,
    Packing,
    Prefetched,
    Share,
    Step,
    TooManyBadError,
    merge_states,
)
from foveate.data.mixture import Mixture
from foveate.data.packing import collate
from foveate.vlm.planning import MediaTiles
from foveate.vlm.processor import FoveateProcessor

from .ranks import in_threads

PACKING = Packing(rows=2, groups=4, tokens=64, tiles=8, window=6, reserve=3)


class Lengths:
    """Documents of skewed lengths; some can't be used."""

    def __init__(self, documents: int, name: str = "d", bad: Callable[[int], bool] = lambda index: False):
        self.documents, self.runs, self.name, self.bad = documents, [documents], name, bad

    def key(self, index: int) -> str:
        return f"{self.name}/{index}"

    def document(self, index: int) -> Document:
        if self.bad(index):
            raise DocumentError(self.key(index), "bad_json", "is broken")
        return Document(self.key(index), (Text(str(index)),))


def encode(document: Document) -> Sample:
    number = int(document.parts[0].text)
    tokens = 1 + int(np.random.default_rng(number).lognormal(2, 1)) % 60
    ids = np.full(tokens, number, dtype=np.int64)
    tiles = np.full((number % 3, 2, 2, 3), number % 256, dtype=np.uint8)
    return Sample(document.key, ids, ids, MediaTiles(tiles, tiles[:0]))


@pytest.fixture
def make(processor: FoveateProcessor) -> Callable[..., Loader]:
    def made(source: Any = None, packing: Packing = PACKING, epochs: int | None = None, **options: Any) -> Loader:
        mixture = Mixture([source or Lengths(500)], [1], seed=3, epochs=epochs, shuffle=100)
        cost = options.pop("cost", lambda sample: float(sample.tokens) ** 2)
        return Loader(mixture, packing, encode, lambda rows: collate(rows, processor), cost, log_keys=True, **options)

    return made


def run(loader: Loader | Prefetched, steps: int) -> list[Step]:
    made = [step for _ in range(steps) if (step := loader.next())]
    loader.close()
    return made


def ranked(make_one: Callable[[Share], Any], ranks: int, work: Callable[[Any], Any]) -> list[Any]:
    """Work of several ranks, each in a thread, whose gather waits for all."""
    return in_threads(ranks, lambda rank, gather: work(make_one(Share(rank, ranks, gather))))


def same_batches(a: list[Step], b: list[Step]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert (one.keys, one.loss_tokens, one.tokens, one.costs, one.bad_counts) == (
            other.keys, other.loss_tokens, other.tokens, other.costs, other.bad_counts,
        )  # fmt: skip
        for x, y in zip(one.micro, other.micro, strict=True):
            assert x.keys == y.keys and x.inputs.keys() == y.inputs.keys()
            assert all(torch.equal(x.inputs[name], y.inputs[name]) for name in x.inputs)


def across(ranks: list[list[Step]]) -> list[list]:
    """Each step's micro-batches of all ranks."""
    return [
        [batch.inputs["input_ids"].tolist() for step in steps for batch in step.micro]
        for steps in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(make: Callable[..., Loader], workers: int) -> None:
    bad = Lengths(500, bad=lambda index: index % 97 == 5)
    same_batches(run(make(bad), 12), run(make(bad, workers=workers), 12))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_change_nothing_but_who_computes(make: Callable[..., Loader], ranks: int) -> None:
    alone = run(make(), 10)
    shared = ranked(lambda share: make(share=share), ranks, lambda loader: run(loader, 10))
    assert across(shared) == across([alone])
    for steps in shared:
        assert [s.keys for s in steps] == [s.keys for s in alone]
        assert [(s.loss_tokens, s.tokens, s.positions) for s in steps] == [
            (s.loss_tokens, s.tokens, s.positions) for s in alone
        ]


def test_totals_are_those_of_the_batches(make: Callable[..., Loader]) -> None:
    for step in run(make(), 10):
        assert step.loss_tokens == sum(int((b.inputs["labels"] != -100).sum()) for b in step.micro)
        assert step.tokens == sum(sum(b.lengths) for b in step.micro)
        assert step.positions == sum(b.inputs["input_ids"].numel() for b in step.micro)
        assert step.keys == [key for b in step.micro for key in b.keys]
        assert step.costs == [sum(n**2 for n in b.lengths) for b in step.micro]
        assert step.documents == len(step.keys)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_document_comes_once_an_epoch(make: Callable[..., Loader], ranks: int) -> None:
    def one(share: Share) -> Loader:
        return make(Lengths(203), epochs=2, share=share)

    runs = ranked(one, ranks, lambda loader: run(loader, 200))
    steps = runs[0]
    seen = Counter(key for step in steps for key in step.keys or [])
    assert seen == {f"d/{i}": 2 for i in range(203)}
    assert Counter(key for r in runs for s in r for b in s.micro for key in b.keys) == seen
    progress = [step.progress for step in steps]
    assert progress[0] == 0 and progress == sorted(progress) and 0.9 < progress[-1] < 1
    assert len(steps) < 200  # it ended by itself


def test_ranks_without_data_compute_padding(make: Callable[..., Loader]) -> None:
    (step,) = run(make(Lengths(1), epochs=1), 5)
    empty = [batch for batch in step.micro if not batch.keys]
    assert len(empty) == 3
    assert all((batch.inputs["labels"] == -100).all() and batch.positions == 2 - 1 for batch in empty)


@pytest.mark.parametrize("workers", [0, 2])
def test_restored_loader_gives_the_same_batches(make: Callable[..., Loader], workers: int) -> None:
    bad = Lengths(300, bad=lambda index: index % 150 == 7)
    whole = run(make(bad), 24)
    for cut in (1, 5, 11):
        state = json.loads(json.dumps(whole[cut - 1].state))
        restored = make(bad, workers=workers)
        restored.load_state_dict(state)
        same_batches(run(restored, 24 - cut), whole[cut:])


def test_state_of_two_ranks_goes_on_with_four_and_one(make: Callable[..., Loader]) -> None:
    whole = run(make(), 12)
    two = ranked(lambda share: make(share=share), 2, lambda loader: run(loader, 6))
    state = json.loads(json.dumps(merge_states([steps[-1].state for steps in two])))

    def go_on(loader: Loader) -> list[Step]:
        loader.load_state_dict(state)
        return run(loader, 6)

    for ranks in (1, 2, 4):
        assert across(ranked(lambda share: make(share=share), ranks, go_on)) == across([whole[6:]])


def test_prefetched_steps_carry_the_state_after_them(make: Callable[..., Loader]) -> None:
    whole = run(make(), 8)
    ahead = run(Prefetched(make(workers=1), steps=8, ahead=3), 8)
    same_batches(ahead, whole)
    assert [step.state for step in ahead] == [step.state for step in whole]


def test_a_thread_makes_no_more_steps_than_asked(make: Callable[..., Loader]) -> None:
    loader = make()
    steps = Prefetched(loader, steps=3, ahead=10)
    for _ in range(3):
        steps.next()
    steps.thread.join(timeout=30)
    assert not steps.thread.is_alive() and loader.step == 3


def test_an_error_in_the_thread_reaches_who_takes_the_step(make: Callable[..., Loader]) -> None:
    steps = Prefetched(make(Lengths(500, bad=lambda index: True)), steps=None)
    with pytest.raises(TooManyBadError, match=r"d/.*bad_json"):
        steps.next()


def test_data_of_which_nothing_can_be_used_is_an_error(make: Callable[..., Loader]) -> None:
    with pytest.raises(TooManyBadError, match="3 of 3 documents can't be used"):
        make(Lengths(3, bad=lambda index: True), epochs=1).next()


def test_state_does_not_grow_and_reading_again_is_bounded(make: Callable[..., Loader]) -> None:
    read: list[int] = []

    class Counting(Lengths):
        def document(self, index: int) -> Document:
            read.append(index)
            return super().document(index)

    steps = run(make(Counting(100_000)), 400)
    sizes = [len(json.dumps(step.state)) for step in steps]
    assert max(sizes[200:]) < 1.3 * max(sizes[:20])
    costs = []
    for step in (steps[4], steps[399]):
        read.clear()
        restored = make(Counting(100_000))
        restored.load_state_dict(step.state)
        restored.next()
        restored.close()
        costs.append(len(read))
    assert max(costs) < 4 * 4 * (6 + 3 * 12)  # groups, each with a window and a reserve of rows


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"groups": 2}, "groups was 4 and is 2"), ({"tokens": 65}, "tokens was 64 and is 65"), ({"window": 7}, "window")],
)
def test_another_packing_is_refused(make: Callable[..., Loader], changed: dict, message: str) -> None:
    (step,) = run(make(), 1)
    from dataclasses import replace

    with pytest.raises(LoaderStateError, match=message):
        make(packing=replace(PACKING, **changed)).load_state_dict(step.state)


def test_states_of_some_ranks_alone_are_refused(make: Callable[..., Loader]) -> None:
    two = ranked(lambda share: make(share=share), 2, lambda loader: run(loader, 1))
    with pytest.raises(LoaderStateError, match=r"lacks groups \[2, 3\]"):
        make().load_state_dict(two[0][0].state)


def test_groups_must_be_a_multiple_of_ranks(make: Callable[..., Loader]) -> None:
    with pytest.raises(ValueError, match="4 micro-batches a step can't be shared by 3 processes"):
        make(share=Share(0, 3))


# Documents that can't be used


def test_bad_documents_are_counted_and_their_neighbours_come(make: Callable[..., Loader]) -> None:
    source = Lengths(200, bad=lambda index: index in (3, 77))
    steps = run(make(source, epochs=1), 100)
    assert {key for step in steps for key in step.keys or []} == {f"d/{i}" for i in range(200)} - {"d/3", "d/77"}
    assert steps[-1].bad_counts == {"bad_json": 2}
    assert sorted(bad.key for step in steps for bad in step.bad) == ["d/3", "d/77"]
    assert BadDocument("d/3", "bad_json", "is broken") in [bad for step in steps for bad in step.bad]


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_bad_documents_stop_all_ranks_with_the_list(make: Callable[..., Loader], ranks: int) -> None:
    source = Lengths(500, bad=lambda index: index % 10 == 1)

    def work(loader: Loader) -> int:
        steps = 0
        while loader.next():
            steps += 1
        return steps

    for result in ranked(lambda share: make(source, share=share, max_bad_fraction=0.02), ranks, work):
        assert isinstance(result, TooManyBadError)
        assert "max_bad_fraction 0.02 accepts 20" in str(result) and "bad_json: is broken" in str(result)


def test_a_document_over_a_budget_is_bad_by_name(make: Callable[..., Loader]) -> None:
    from dataclasses import replace

    steps = run(make(Lengths(60), replace(PACKING, tokens=30), epochs=1, max_bad_fraction=1.0), 100)
    too_long = {f"d/{i}" for i in range(60) if encode(Lengths(60).document(i)).tokens > 30}
    assert too_long
    assert {bad.key for step in steps for bad in step.bad} == too_long
    assert {bad.reason for step in steps for bad in step.bad} == {"too_long"}
    assert all("a row accepts at most 30" in bad.message for step in steps for bad in step.bad)


def test_bad_counts_go_on_after_a_restore(make: Callable[..., Loader]) -> None:
    source = Lengths(300, bad=lambda index: index % 40 == 7)
    whole = run(make(source, epochs=1), 100)
    restored = make(source, epochs=1)
    restored.load_state_dict(whole[3].state)
    rest = run(restored, 100)
    assert rest[-1].bad_counts == whole[-1].bad_counts == {"bad_json": 8}


def test_flag_of_one_rank_is_seen_by_all(make: Callable[..., Loader]) -> None:
    runs = ranked(lambda share: make(share=share, flag=lambda: share.rank == 1), 2, lambda loader: run(loader, 2))
    assert all(step.flagged for steps in runs for step in steps)


def test_limit_ends_an_endless_mixture(make: Callable[..., Loader]) -> None:
    steps = run(make(limit=30), 100)
    assert sum(step.documents for step in steps) == 30


def test_a_worker_lives_on_after_sigterm_and_ends_with_its_loader(make: Callable[..., Loader]) -> None:
    """A scheduler's signal reaches it too, while the trainer ends its step."""
    loader, others = make(workers=1), set(multiprocessing.active_children())
    steps = [loader.next()]
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGTERM)
    steps += run(loader, 20)
    assert len(steps) == 21
    worker.join(60)
    assert worker.exitcode == 0


# Balance


def test_a_reserve_evens_out_costs(make: Callable[..., Loader]) -> None:
    """Mean over steps of the costliest group's cost relative to the mean group's."""

    def imbalance(reserve: int) -> float:
        packing = Packing(rows=1, groups=8, tokens=64, tiles=8, window=8, reserve=reserve)
        steps = run(make(Lengths(20_000), packing), 150)
        return float(np.mean([max(step.costs) / np.mean(step.costs) for step in steps[30:]]))

    assert imbalance(8) - 1 < 0.6 * (imbalance(1) - 1)


def test_no_row_waits_for_ever(make: Callable[..., Loader]) -> None:
    """A costly document per hundred is trained on soon, though no other row costs as much."""
    steps = run(make(Lengths(20_000), cost=lambda s: 1e6 if s.input_ids[0] % 100 == 0 else 1.0), 300)
    first_seen = {key: i for i, step in enumerate(steps) for key in step.keys or []}
    mixture = Mixture([Lengths(20_000)], [1], seed=3, shuffle=100)
    place = {mixture.key(p): p for p in range(20_000)}
    rate = len(first_seen) / len(steps)
    late = [first_seen[key] - place[key] / rate for key in first_seen if int(key[2:]) % 100 == 0]
    assert late and max(late) < 64 + 40
