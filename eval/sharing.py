"""Questions shared out among sequence groups, and what all ranks have to tell."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from ..vlm.parallel.topology import Topology

T = TypeVar("T")
ALONE = Topology()


def own_part(items: Sequence[T], topology: Topology) -> Sequence[T]:
    """The items of this rank's sequence group: each group takes every so manieth."""
    return items[topology.data_rank :: topology.data_size]


def of_all_ranks(value: T, topology: Topology) -> list[T]:
    """Every rank's value, by rank; all ranks call it."""
    if topology.size == 1:
        return [value]
    values: list[Any] = [None] * topology.size
    dist.all_gather_object(values, value)
    return values


def of_all_groups(value: T, topology: Topology) -> list[T]:
    """Every sequence group's value, by group; all ranks call it, those of a group with the same."""
    return of_all_ranks(value, topology)[:: topology.degree]


def joined(found: Sequence[T], topology: Topology) -> list[T]:
    """What all groups found, each of its `own_part`, in the order of the items; all ranks call it."""
    parts = of_all_groups(list(found), topology)
    return [parts[number % len(parts)][number // len(parts)] for number in range(sum(map(len, parts)))]
