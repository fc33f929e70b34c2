"""Several sources as one endless or finite sequence of documents, in given proportions, without state.

Which document stands at position p depends on (seed, p) alone. So any process can work out any part of the sequence:
nothing has to be replayed to go on in the middle, and neither the number of ranks nor of workers changes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from .document import Document

if TYPE_CHECKING:
    from .sources import Source

BLOCK = 4096  # draws in which the proportions hold exactly, to one document a source
RUN = 256  # documents that are read in a row, at most, before the order jumps elsewhere


@dataclass(frozen=True)
class Place:
    """Where a document of a mixture comes from: source number, how often the source was used up before, index."""

    source: int
    epoch: int
    index: int


class SourceOrder:
    """The order in which a source's documents come, another one each epoch.

    Runs of documents that are stored together are permuted, then the documents within windows of `shuffle`: what a
    shuffle buffer does, but as a function of the position. Reads stay local: a window touches few runs.

    Args:
        runs: lengths of runs of documents that are stored together.
        shuffle: documents in a window; 0 leaves the source's own order.
        seed: of the permutations.
    """

    def __init__(self, runs: Sequence[int], shuffle: int, seed: Sequence[int]):
        self.shuffle, self.seed = shuffle, list(seed)
        self.documents = sum(runs)
        starts = [start for start in accumulate(runs, initial=0)][:-1]
        cut = [(a + at, min(RUN, n - at)) for a, n in zip(starts, runs, strict=True) for at in range(0, n, RUN)]
        self.starts, self.lengths = np.array(cut, dtype=np.int64).reshape(-1, 2).T
        self._runs = lru_cache(maxsize=2)(self._permuted_runs)
        self._window = lru_cache(maxsize=4)(self._permuted_window)

    def index(self, epoch: int, rank: int) -> int:
        """The document at place `rank` (from 0) of an epoch."""
        if self.shuffle == 0:
            return rank
        window, at = divmod(rank, self.shuffle)
        ordered = window * self.shuffle + int(self._window(epoch, window)[at])
        ends, starts = self._runs(epoch)
        run = int(np.searchsorted(ends, ordered, side="right"))
        return int(starts[run] + ordered - (ends[run - 1] if run else 0))

    def _permuted_runs(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the runs end in the epoch's order, and where they start in the source."""
        order = np.random.default_rng([*self.seed, 1, epoch, 0]).permutation(len(self.starts))
        return np.cumsum(self.lengths[order]), self.starts[order]

    def _permuted_window(self, epoch: int, window: int) -> np.ndarray:
        size = min(self.shuffle, self.documents - window * self.shuffle)
        return np.random.default_rng([*self.seed, 2, epoch, window]).permutation(size)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self._runs = lru_cache(maxsize=2)(self._permuted_runs)
        self._window = lru_cache(maxsize=4)(self._permuted_window)


class Mixture:
    """Sources in given proportions.

    In any stretch of `BLOCK` positions a source has its share to within one document; the order within a block is
    random. A source that is used up begins again, in another order.

    Args:
        sources: where documents come from.
        weights: how often each is drawn, in proportion, all positive; with `epochs`, how many times each comes in an
            epoch: whole numbers.
        seed: of the draws and orders.
        epochs: of how many epochs the mixture consists, each with every document of every source `weight` times; None
            makes it endless.
        shuffle: see `SourceOrder`.

    Raises:
        ValueError: weights that can't be drawn by, or an endless or empty source where it doesn't fit.
    """

    def __init__(
        self,
        sources: "Sequence[Source]",
        weights: Sequence[float],
        seed: int,
        epochs: int | None = None,
        shuffle: int = 2048,
    ):
        if len(sources) != len(weights) or not sources or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights are {list(weights)} for {len(sources)} sources; accepted: a positive one each")
        counts = [source.documents for source in sources]
        if 0 in counts:
            raise ValueError(f"source {counts.index(0)} has no documents; accepted: one at least")
        self.sources, self.seed = list(sources), seed
        self.orders = [
            SourceOrder(source.runs, shuffle, [seed, number]) if source.documents is not None else None
            for number, source in enumerate(sources)
        ]
        self.epoch_documents: int | None = None
        if epochs is not None:
            if None in counts:
                raise ValueError(f"source {counts.index(None)} is endless, so it has no epochs; accepted: finite ones")
            if not all(float(weight).is_integer() for weight in weights):
                raise ValueError(f"weights are {list(weights)}; with epochs, accepted: whole numbers, times an epoch")
            self.shares = [int(weight) * int(n or 0) for weight, n in zip(weights, counts, strict=True)]
            self.epoch_documents = sum(self.shares)
        else:
            fractions = [Fraction(weight / max(weights)).limit_denominator(10**6) for weight in weights]
            if not all(fractions):
                raise ValueError(f"weights are {list(weights)}; accepted: the smallest a millionth of the largest")
            scale = math.lcm(*(fraction.denominator for fraction in fractions))
            self.shares = [int(fraction * scale) for fraction in fractions]
        self.documents = None if epochs is None else epochs * sum(self.shares)
        self.edges = list(accumulate(self.shares))
        self._block = lru_cache(maxsize=8)(self._drawn_block)

    def locate(self, position: int) -> Place:
        """Where the document at a position comes from.

        Raises:
            IndexError: beyond the end of a finite mixture.
        """
        if position < 0 or (self.documents is not None and position >= self.documents):
            raise IndexError(f"position {position} of a mixture of {self.documents} documents")
        epoch, within = divmod(position, self.epoch_documents) if self.epoch_documents else (0, position)
        block = within // BLOCK
        if position >= self._start(epoch, block + 1):  # rounding down makes a block begin a little early
            block += 1
        sources, ranks = self._block(epoch, block)
        at = position - self._start(epoch, block)
        source, rank = int(sources[at]), int(ranks[at])
        order = self.orders[source]
        if order is None:
            return Place(source, 0, rank)
        source_epoch, rank = divmod(rank, order.documents)
        return Place(source, source_epoch, order.index(source_epoch, rank))

    def document(self, position: int) -> Document:
        """The document at a position.

        Raises:
            DocumentError: it can't be used.
        """
        place = self.locate(position)
        return self.sources[place.source].document(place.index)

    def key(self, position: int) -> str:
        """What names the document at a position, also where it can't be read."""
        place = self.locate(position)
        return self.sources[place.source].key(place.index)

    def _counts(self, epoch: int, block: int) -> list[int]:
        """How many documents of each source come before a block."""
        ideal = block * BLOCK
        if self.epoch_documents:
            ideal = epoch * self.epoch_documents + min(ideal, self.epoch_documents)
        return [ideal * share // self.edges[-1] for share in self.shares]

    def _start(self, epoch: int, block: int) -> int:
        return sum(self._counts(epoch, block))

    def _drawn_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position of a block, and the rank of its document among the source's, both [positions]."""
        before, after = self._counts(epoch, block), self._counts(epoch, block + 1)
        sizes = [b - a for a, b in zip(before, after, strict=True)]
        sources = np.repeat(np.arange(len(sizes)), sizes)
        ranks = np.concatenate([np.arange(a, b) for a, b in zip(before, after, strict=True)])
        drawn = np.random.default_rng([self.seed, 0, 0, epoch, block]).permutation(len(sources))
        sources = sources[drawn]
        by_source = np.argsort(sources, kind="stable")  # each source's documents in the order of its own
        placed = np.empty_like(ranks)
        placed[by_source] = ranks
        return sources, placed

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_block"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self._block = lru_cache(maxsize=8)(self._drawn_block)
