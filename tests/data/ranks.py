"""Several ranks in one process, each in a thread."""

from collections.abc import Callable
from threading import Barrier, Thread
from typing import Any

from foveate.data.loader import TooManyBadError
from foveate.data.sequence import SequenceMismatchError

ON_ALL_RANKS = (TooManyBadError, SequenceMismatchError)  # what all ranks raise at the same step
Gather = Callable[[Any], list[Any]]


def in_threads(ranks: int, work: Callable[[int, Gather], Any]) -> list[Any]:
    """What `work(rank, gather)` gives on each rank, or what it raises of `ON_ALL_RANKS`; gather waits for all."""
    barrier, told = Barrier(ranks, timeout=60), [None] * ranks
    results: list[Any] = [None] * ranks

    def gather_of(rank: int) -> Gather:
        def all_gather(value: Any) -> list[Any]:
            told[rank] = value
            barrier.wait()
            copy = list(told)
            barrier.wait()
            return copy

        return all_gather

    def each(rank: int) -> None:
        try:
            results[rank] = work(rank, gather_of(rank))
        except Exception as error:
            results[rank] = error
            if not isinstance(error, ON_ALL_RANKS):
                barrier.abort()

    threads = [Thread(target=each, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, ON_ALL_RANKS):
            raise result
    return results
