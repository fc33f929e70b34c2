"""The loader: documents read and encoded by workers, packed by group, the same for any number of ranks and workers.

A step has a fixed number of micro-batches. Each belongs to a *group*: group g packs the documents at the positions
g, g + groups, g + 2·groups, … of the mixture. A rank owns groups / ranks of them, so what a step holds depends neither
on the number of ranks nor on the number of workers. The state is positions alone: what waits to be packed is read
again, and nothing else is replayed.

Where several ranks share each micro-batch (`sequence.py`), each of them plans the documents of the same groups, and
they compare what they have packed; media are read when a step's rows are chosen, each rank its own parts.
"""

import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from .document import Document, DocumentError
from .mixture import Mixture
from .packing import Batch, Packer, RowFacts, Waiting, choose_rows
from .sequence import SequenceCollate, SequenceMismatchError

CHUNK = 4  # documents a worker reads at a time
SURELY_SEEN = 1000  # documents on which `max_bad_fraction` is judged at least
NAMED_AT_MOST = 20  # documents in the error
GRACE_S = 20  # that a worker lives on after SIGTERM, for the trainer to end its step
PATIENCE = 64  # steps that a packed row waits at most for rows that cost as much


class TooManyBadError(RuntimeError):
    """More documents could not be used than `max_bad_fraction` allows; the message lists them with their reasons."""


class LoaderStateError(ValueError):
    """A loader state that is not this loader's; the message says what differs and what would be accepted."""


class Item(Protocol):
    """An encoded document: a `Sample`, or what an objective of its own makes of a document."""

    key: str

    @property
    def tokens(self) -> int: ...
    @property
    def tiles(self) -> int: ...
    @property
    def loss_tokens(self) -> int: ...


AnyItem = TypeVar("AnyItem", bound=Item)


@dataclass(frozen=True)
class BadDocument:
    """A document that can't be used, and why."""

    key: str
    reason: str
    message: str


@dataclass(frozen=True)
class Packing:
    """How documents become batches.

    Args:
        rows: rows of a micro-batch.
        groups: micro-batches of a step, over all ranks.
        tokens, tiles: budgets of a row.
        window: documents of a group that wait to be packed.
        reserve: packed rows of a group from which a step's are chosen, so that ranks' costs are alike.
    """

    rows: int
    groups: int
    tokens: int
    tiles: int
    window: int = 64
    reserve: int = 4


@dataclass(frozen=True)
class Share:
    """Which groups a rank owns, and how ranks tell each other of theirs.

    Args:
        rank, ranks: this one, and how many; of sequence groups where several ranks share each micro-batch.
        gather: all-gather of an object, over all processes; from one thread only.
        sequence: processes of a sequence group: `rank` has the processes rank · sequence and after.
    """

    rank: int = 0
    ranks: int = 1
    gather: Callable[[Any], list[Any]] = field(default=lambda value: [value])
    sequence: int = 1

    def groups(self, of: int) -> range:
        """Raises ValueError where the groups can't be shared out evenly."""
        if of % self.ranks:
            raise ValueError(
                f"{of} micro-batches a step can't be shared by {self.ranks} "
                f"{'processes' if self.sequence == 1 else 'sequence groups'}; accepted: a multiple of them"
            )
        each = of // self.ranks
        return range(self.rank * each, (self.rank + 1) * each)


@dataclass(frozen=True)
class _Told:
    """What a rank tells the others before a step."""

    facts: dict[int, list[RowFacts]]  # of the rows in each group's reserve
    keys: dict[int, list[list[str]]]  # of their documents, where they are logged
    bad: list[BadDocument]
    seen: int
    flag: bool
    hopeless: bool  # it stopped reading, because it found nothing but bad ones
    digest: bytes  # of what it has packed, where others pack the same


@dataclass(frozen=True)
class _Taken:
    """A group's micro-batch, as told to all."""

    facts: list[RowFacts]
    keys: list[str]
    positions: int


@dataclass(frozen=True)
class Step:
    """What one step trains on."""

    micro: list[Batch]  # this rank's
    loss_tokens: int  # of all ranks, as are all that follow
    tokens: int
    positions: int  # padding included
    documents: int
    costs: list[float]  # of each group, in FLOPs
    progress: float  # of a finite mixture, before this step
    keys: list[str] | None  # where they are logged
    bad: list[BadDocument]  # found since the step before
    bad_counts: Mapping[str, int]  # by reason, from the beginning
    flagged: bool  # whether any rank's flag was up
    state: dict  # of this rank's groups, after this step


class _Documents(Dataset, Generic[AnyItem]):
    """Positions to encoded documents, in a worker."""

    def __init__(self, mixture: Mixture, encode: Callable[[Document], AnyItem]):
        self.mixture, self.encode = mixture, encode

    def __getitem__(self, positions: Sequence[int]) -> "list[AnyItem | BadDocument]":
        return [self.read(position) for position in positions]

    def read(self, position: int) -> "AnyItem | BadDocument":
        try:
            return self.encode(self.mixture.document(position))
        except DocumentError as error:
            return BadDocument(error.key, error.reason, error.message)


@dataclass(frozen=True)
class _Row:
    """A packed row."""

    waiting: list[Waiting]
    facts: RowFacts

    @property
    def items(self) -> list[Any]:
        return [waiting.sample for waiting in self.waiting]

    @property
    def keys(self) -> list[str]:
        return [waiting.sample.key for waiting in self.waiting]


class _Group(Generic[AnyItem]):
    """One group's documents on their way: requested, arrived, waiting to be packed, packed."""

    def __init__(self, number: int, packing: Packing, total: int | None):
        self.number, self.packing, self.total = number, packing, total
        self.packer = Packer(packing.tokens, packing.tiles, packing.window)
        self.pool: list[_Row] = []  # packed, oldest first
        self.admitted = 0  # documents of this group that came to the packer, or were refused
        self.arrived: deque[tuple[int, Any]] = deque()
        self.again: deque[int] = deque()  # positions that a restored group has to read again
        self.restored: dict | None = None  # a state whose documents are yet to be read again
        self.requested = 0
        self.supply = 0  # requested and not yet admitted

    def position(self, number: int) -> int:
        return self.number + self.packing.groups * number

    def next_requests(self) -> list[int]:
        """The positions to read next; none at the end of the data."""
        wanted: list[int] = []
        while len(wanted) < CHUNK:
            if self.again:
                wanted.append(self.again.popleft())
            elif self.total is not None and self.position(self.requested) >= self.total:
                break
            else:
                wanted.append(self.position(self.requested))
                self.requested += 1
        self.supply += len(wanted)
        return wanted

    @property
    def ended(self) -> bool:
        """No document is left to be admitted."""
        return self.total is not None and self.position(self.admitted) >= self.total

    def state(self) -> dict:
        return {
            "group": self.number,
            "admitted": self.admitted,
            "waiting": [waiting.position for waiting in self.packer.waiting],
            "pool": [[row.facts.since, [waiting.position for waiting in row.waiting]] for row in self.pool],
        }

    def load_state(self, state: dict) -> None:
        self.requested = self.admitted = state["admitted"]
        self.again = deque([*(p for _, row in state["pool"] for p in row), *state["waiting"]])
        self.restored = state


class Loader(Generic[AnyItem]):
    """Steps of packed micro-batches.

    Args:
        mixture: the documents.
        packing: budgets, groups.
        encode: a document to an item, in the workers.
        collate: rows of items to a batch; where ranks share micro-batches a `SequenceCollate`, of planned documents.
        cost: what an item costs to compute, in any unit.
        share: this rank's part.
        workers: processes that read and encode; 0 does it in this one.
        max_bad_fraction: of the documents seen (of `SURELY_SEEN` at least) that may be unusable.
        log_keys: whether steps name their documents.
        flag: read each step; `Step.flagged` is true on all ranks where it was true on any.
        limit: documents after which the data ends, also where the mixture is endless.
    """

    def __init__(
        self,
        mixture: Mixture,
        packing: Packing,
        encode: Callable[[Document], AnyItem],
        collate: Callable[[list[list[AnyItem]]], Batch] | SequenceCollate,
        cost: Callable[[AnyItem], float],
        share: Share | None = None,
        workers: int = 0,
        max_bad_fraction: float = 0.01,
        log_keys: bool = False,
        flag: Callable[[], bool] = lambda: False,
        limit: int | None = None,
    ):
        self.mixture, self.packing, self.encode, self.collate, self.cost = mixture, packing, encode, collate, cost
        self.share, self.workers, self.max_bad_fraction = share or Share(), workers, max_bad_fraction
        self.log_keys, self.flag = log_keys, flag
        ends = [end for end in (mixture.documents, limit) if end is not None]
        self.total = min(ends) if ends else None
        degree = collate.topology.degree if isinstance(collate, SequenceCollate) else 1
        if self.share.sequence != degree:
            raise ValueError(
                f"share.sequence is {self.share.sequence}, but batches are made for {degree} ranks; both must be equal"
            )
        self.own = list(self.share.groups(packing.groups))
        self.plans = isinstance(collate, SequenceCollate)  # media are read once the rows are chosen
        self.unread = False  # what waited in a restored state had only been planned
        self.step = self.seen = self.documents_done = 0
        self.bad_counts: dict[str, int] = {}
        self.new_bad: list[BadDocument] = []
        self.named_bad: list[BadDocument] = []  # the first ones of the run, for the error
        self.groups: dict[int, _Group] = {}
        self.arrivals: Any = None  # the DataLoader's iterator, once started
        self._reset([])

    # State

    def _reset(self, states: list[dict]) -> None:
        self.close()
        self.groups = {g: _Group(g, self.packing, self.total) for g in self.own}
        by_group = {state["group"]: state for state in states}
        for number, group in self.groups.items():
            if states:
                group.load_state(by_group[number])

    def state_dict(self) -> dict:
        """Where this rank's groups are: a few numbers for each document that waits, whatever was seen before."""
        return {
            "step": self.step,
            "seen": self.seen,
            "documents_done": self.documents_done,
            "bad_counts": dict(self.bad_counts),
            "named_bad": [asdict(bad) for bad in self.named_bad],
            "groups": [group.state() for group in self.groups.values()],
            "packing": asdict(self.packing),
            "planned": self.plans,
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state_dict` was; `groups` may hold those of all ranks, of any number of them.

        Raises:
            LoaderStateError: the packing differs, or groups are missing.
        """
        then, now = state["packing"], asdict(self.packing)
        if then != now:
            changed = ", ".join(f"{k} was {then.get(k)} and is {now[k]}" for k in now if then.get(k) != now[k])
            raise LoaderStateError(f"the packing differs: {changed}; accepted: the same, on any number of processes")
        missing = set(self.own) - {group["group"] for group in state["groups"]}
        if missing:
            raise LoaderStateError(
                f"the state lacks groups {sorted(missing)}; accepted: those of all ranks together (merge_states)"
            )
        for name in ("step", "seen", "documents_done"):
            setattr(self, name, state[name])
        self.bad_counts = dict(state["bad_counts"])
        self.named_bad = [BadDocument(**bad) for bad in state["named_bad"]]
        self.unread = state.get("planned", False) and not self.plans
        self._reset(state["groups"])

    # Reading

    def _requests(self) -> Iterator[list[int]]:
        """What the workers read next: always for the group with the least on its way."""
        while True:
            for group in sorted(self.groups.values(), key=lambda g: (g.supply, g.number)):
                wanted = group.next_requests()
                if wanted:
                    self.in_flight.append((group, wanted))
                    yield wanted
                    break
            else:
                return

    def start_workers(self) -> None:
        """Starts the workers; the first `next` does it too, but a process should fork before it starts threads."""
        self.in_flight: deque[tuple[_Group, list[int]]] = deque()
        documents = _Documents(self.mixture, self.encode)
        loading: dict[str, Any] = {"prefetch_factor": 4} if self.workers else {}
        requests: Any = _Requests(self._requests)
        self.arrivals = iter(
            DataLoader(
                documents,
                batch_size=None,
                sampler=requests,
                num_workers=self.workers,
                collate_fn=_unchanged,
                worker_init_fn=_begin_worker,
                generator=torch.Generator(),  # or starting would draw from the generator that dropout draws from
                **loading,
            )
        )

    def _arrive(self, group: _Group) -> tuple[int, Any]:
        """The group's next document, waited for where it has to be."""
        while not group.arrived:
            items = next(self.arrivals)
            of, positions = self.in_flight.popleft()
            of.arrived.extend(zip(positions, items, strict=True))
        group.supply -= 1
        return group.arrived.popleft()

    def _read_again(self, group: _Group) -> None:
        """Fills a restored group with what waited in it."""
        state = group.restored
        if state is None:
            return
        group.restored = None
        count = len(state["waiting"]) + sum(len(row) for _, row in state["pool"])
        items = {}
        for _ in range(count):
            position, item = self._arrive(group)
            if not isinstance(item, BadDocument):
                items[position] = Waiting(position, item)
            elif self.unread:
                self.new_bad.append(item)
            else:
                raise DocumentError(item.key, item.reason, f"was read before the stop, now it can't be: {item.message}")
        rows = [(since, [items[p] for p in row if p in items]) for since, row in state["pool"]]
        group.pool = [self._row(since, row) for since, row in rows if row]
        group.packer.waiting = [items[p] for p in state["waiting"] if p in items]

    def _fill(self, group: _Group) -> None:
        """Packs rows until the reserve is there, or the data ended."""
        self._read_again(group)
        while len(group.pool) < max(self.packing.rows, self.packing.reserve):
            while group.packer.wants_more and not group.ended:
                position, item = self._arrive(group)
                group.admitted += 1
                self.seen_here += 1
                if not isinstance(item, BadDocument) and (misfit := group.packer.misfit(item)):
                    item = BadDocument(item.key, "too_long", misfit)
                if isinstance(item, BadDocument):
                    self.new_bad.append(item)
                    if len(self.new_bad) > self._bad_accepted(self.seen + self.seen_here):
                        return  # or data of which nothing can be used would be read for ever
                else:
                    group.packer.add(Waiting(position, item))
            if not group.packer.waiting:
                return
            group.pool.append(self._row(self.step, group.packer.row()))

    # Steps

    def next(self) -> Step | None:
        """The next step, the same on all ranks; None at the end of the data.

        Raises:
            TooManyBadError: on all ranks at the same step.
            SequenceMismatchError: ranks that share micro-batches have packed different documents; on all ranks.
        """
        if self.arrivals is None:
            self.start_workers()
        step = self._make([])
        while step is not None and not step.documents:  # none of them could be read
            step = self._make(step.bad)
        return step

    def _make(self, bad: list[BadDocument]) -> Step | None:
        """A step; `bad` were found for it before."""
        self.seen_here = 0
        for group in self.groups.values():
            self._fill(group)
        told: list[_Told] = self.share.gather(self._tell())
        self._check_same(told)
        flagged, hopeless = any(each.flag for each in told), any(each.hopeless for each in told)
        told = told[:: self.share.sequence]  # one of those that tell the same
        self.new_bad = []
        bad = [*bad, *(item for each in told for item in each.bad)]
        self.seen += sum(each.seen for each in told)
        self._count_bad([item for each in told for item in each.bad], hopeless)
        pools = {g: pool for each in told for g, pool in each.facts.items()}
        chosen = choose_rows([pools[g] for g in sorted(pools)], self.packing.rows, self.step, PATIENCE)
        if not any(chosen):
            return None
        rows = {g: [group.pool[i] for i in chosen[g]] for g, group in self.groups.items()}
        for g, group in self.groups.items():
            group.pool = [row for i, row in enumerate(group.pool) if i not in chosen[g]]
        progress = self.documents_done / self.total if self.total else 0.0
        if isinstance(self.collate, SequenceCollate):
            micro, taken, unread = self._read(rows, self.collate)
            self._count_bad(unread, False)
            bad += unread
        else:
            micro = [self.collate([row.items for row in of]) for of in rows.values()]
            keys = {g: named for each in told for g, named in each.keys.items()}
            taken = {}
            for g, numbers in enumerate(chosen):
                facts = [pools[g][i] for i in numbers]
                named = [key for i in numbers for key in keys[g][i]] if self.log_keys else []
                taken[g] = _Taken(facts, named, len(facts) * max([row.tokens for row in facts], default=0))
        facts = [row for g in sorted(taken) for row in taken[g].facts]
        documents = sum(row.documents for row in facts)
        self.documents_done += documents
        self.step += bool(documents)
        return Step(
            micro,
            sum(row.loss_tokens for row in facts),
            sum(row.tokens for row in facts),
            sum(one.positions for one in taken.values()),
            documents,
            [sum(row.cost for row in taken[g].facts) for g in sorted(taken)],
            progress,
            [key for g in sorted(taken) for key in taken[g].keys] if self.log_keys else None,
            bad,
            dict(self.bad_counts),
            flagged,
            self.state_dict(),
        )

    def _tell(self) -> _Told:
        keys = {g: [row.keys for row in group.pool] for g, group in self.groups.items() if self.log_keys}
        return _Told(
            {g: [row.facts for row in group.pool] for g, group in self.groups.items()},
            keys,
            self.new_bad,
            self.seen_here,
            self.flag(),
            len(self.new_bad) > self._bad_accepted(self.seen + self.seen_here),
            blake2b(repr(self._packed()).encode(), digest_size=16).digest() if self.share.sequence > 1 else b"",
        )

    def _packed(self) -> list[tuple]:
        """What ranks that share micro-batches must have alike: documents found bad, and those packed."""
        packed = [w for group in self.groups.values() for row in group.pool for w in row.waiting]
        bad: list[tuple] = [(item.key, item.reason) for item in self.new_bad]
        return bad + [(waiting.sample.key, waiting.position, waiting.sample.digest) for waiting in packed]

    def _check_same(self, told: list[_Told]) -> None:
        """That each sequence group has packed the same; all ranks call it."""
        size = self.share.sequence
        first = [each for each in told[::size] for _ in range(size)]
        differ = [rank for rank, (one, other) in enumerate(zip(told, first, strict=True)) if one.digest != other.digest]
        if not differ:
            return
        packed = self.share.gather(self._packed())
        rank, against = differ[0], differ[0] // size * size
        its, theirs = set(packed[rank]), set(packed[against])
        key = next((entry[0] for entry in [*packed[rank], *packed[against]] if (entry in its) != (entry in theirs)), "")
        more = f", and so do ranks {', '.join(map(str, differ[1:]))} from theirs" if differ[1:] else ""
        raise SequenceMismatchError(
            f"ranks {against} and {rank} share their sequences, but differ in what they packed{more}: {key} "
            f"{_described(packed[against], key)} on rank {against}, {_described(packed[rank], key)} on rank {rank}; "
            "accepted: the same files on every node"
        )

    def _read(
        self, rows: dict[int, list[_Row]], collate: SequenceCollate
    ) -> tuple[list[Batch], dict[int, _Taken], list[BadDocument]]:
        """Reads this rank's parts of its groups' packs.

        Returns:
            Its micro-batches; what all groups take; and documents that a rank could not read, which all leave out.
        """
        packs = {g: [item for row in of for item in row.items] for g, of in rows.items()}
        readings = {g: collate.read(pack) for g, pack in packs.items()}
        unread: dict[tuple[int, int], BadDocument] = {}  # by group and number in its pack
        for each in self.share.gather({g: reading.unread for g, reading in readings.items()}):
            for g, errors in each.items():
                for number, error in errors.items():
                    unread.setdefault((g, number), BadDocument(error.key, error.reason, error.message))
        micro, own = [], {}
        for g, of in rows.items():
            without = {number for group, number in unread if group == g}
            micro.append(collate(packs[g], readings[g], without))
            waiting = [w for row in of for w in row.waiting]
            row = self._row(0, [w for number, w in enumerate(waiting) if number not in without])
            own[g] = _Taken([row.facts], row.keys, collate.plan([item.tokens for item in row.items]).padded_tokens)
        taken = {g: one for each in self.share.gather(own)[:: self.share.sequence] for g, one in each.items()}
        return micro, taken, [unread[place] for place in sorted(unread)]

    def _row(self, since: int, waiting: list[Waiting]) -> _Row:
        items: list[Any] = [one.sample for one in waiting]
        facts = RowFacts(
            sum(map(self.cost, items)),
            since,
            sum(item.tokens for item in items),
            sum(item.loss_tokens for item in items),
            len(items),
        )
        return _Row(waiting, facts)

    def _bad_accepted(self, seen: int) -> int:
        return int(self.max_bad_fraction * max(seen, SURELY_SEEN))

    def _count_bad(self, bad: list[BadDocument], hopeless: bool) -> None:
        """Raises TooManyBadError; `hopeless`: a rank stopped reading."""
        for item in bad:
            self.bad_counts[item.reason] = self.bad_counts.get(item.reason, 0) + 1
        self.named_bad = [*self.named_bad, *bad][:NAMED_AT_MOST]
        self.documents_done += len(bad)
        total = sum(self.bad_counts.values())
        if total > self._bad_accepted(self.seen) or hopeless or (total and total == self.seen == self.total):
            named = "; ".join(f"{item.key}: {item.reason}: {item.message}" for item in self.named_bad)
            more = f"; and {total - len(self.named_bad)} more" if total > len(self.named_bad) else ""
            raise TooManyBadError(
                f"{total} of {self.seen} documents can't be used, max_bad_fraction {self.max_bad_fraction} accepts "
                f"{self._bad_accepted(self.seen)}: {named}{more}"
            )

    def close(self) -> None:
        """Ends the workers."""
        self.arrivals = None


class _Requests:
    """A generator as a sampler: iterable, without a length."""

    def __init__(self, generate: Callable[[], Iterator[list[int]]]):
        self.generate = generate

    def __iter__(self) -> Iterator[list[int]]:
        return self.generate()


def _described(packed: list[tuple], key: str) -> str:
    """What became of a document on a rank that has packed these."""
    entry = next((entry for entry in packed if entry[0] == key), None)
    if entry is None:
        return "is not packed"
    return f"can't be used ({entry[1]})" if len(entry) == 2 else f"is packed at position {entry[1]} (digest {entry[2]})"


def _unchanged(items: Any) -> Any:
    return items


def _begin_worker(worker: int) -> None:
    """Signals to the process group reach workers too, but it is the trainer that ends them; and they end when it was
    killed, also where one waits for room in a queue that nobody reads any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    grace = threading.Timer(GRACE_S, os._exit, (1,))
    grace.daemon = True  # else it holds up a worker that its trainer ends before
    signal.signal(signal.SIGTERM, lambda *_: None if grace.is_alive() else grace.start())
    trainer = os.getppid()

    def watch() -> None:
        while os.getppid() == trainer:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="trainer-watch", daemon=True).start()


def merge_states(states: Sequence[dict]) -> dict:
    """The states of all ranks as one, for any number of ranks to load; a group that several ranks share comes once."""
    groups = {group["group"]: group for state in states for group in state["groups"]}
    return states[0] | {"groups": [groups[number] for number in sorted(groups)]}


class Prefetched:
    """A loader's steps, made in a thread while the one before is trained on.

    Args:
        loader: from now on used by the thread alone.
        steps: how many it makes; None goes on to the end of the data. All ranks must make the same number, because
            each step is agreed on by all.
        ahead: steps that are made in advance.
    """

    def __init__(self, loader: Loader, steps: int | None, ahead: int = 1):
        self.loader, self.steps = loader, steps
        self.made: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=ahead)
        self.stopping = threading.Event()
        loader.start_workers()
        self.thread = threading.Thread(target=self._make, name="loader", daemon=True)
        self.thread.start()

    def _make(self) -> None:
        step: Step | BaseException | None
        made = 0
        while not self.stopping.is_set() and made != self.steps:
            made += 1
            try:
                step = self.loader.next()
            except BaseException as error:  # it belongs to whoever takes the step
                step = error
            while not self.stopping.is_set():
                try:
                    self.made.put(step, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if step is None or isinstance(step, BaseException):
                return

    def next(self) -> Step | None:
        step = self.made.get()
        if isinstance(step, BaseException):
            raise step
        return step

    def close(self) -> None:
        self.stopping.set()
        self.thread.join(timeout=5)  # after an error it may wait for ranks that are gone
        self.loader.close()
