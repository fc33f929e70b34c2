"""Which ranks share a sequence, and how they stand to each other (LongVILA, arXiv 2408.10188, section 3.3).

The ranks of a sequence group form a grid: rows of `ulysses` consecutive ranks, which should be one node and exchange
heads (DeepSpeed-Ulysses, arXiv 2309.14509), in a ring of `ring` rows, which pass keys and values on (Ring Attention,
arXiv 2310.01889).
"""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class ParallelError(ValueError):
    """Something that sequence parallelism does not do; the message says what it was and what would be accepted."""


@dataclass(frozen=True)
class Topology:
    """This rank among those that share its sequence.

    Attributes:
        ulysses, ring: ranks of a row, and rows.
        rank, size: of all processes.
        group, ulysses_group, ring_group: of the sequence, of this rank's row, of its column; None where it is alone.
    """

    ulysses: int = 1
    ring: int = 1
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = field(default=None, repr=False)
    ulysses_group: dist.ProcessGroup | None = field(default=None, repr=False)
    ring_group: dist.ProcessGroup | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("ulysses", "ring"):
            if getattr(self, name) < 1:
                raise ParallelError(f"{name} is {getattr(self, name)}; accepted: 1 or more")
        if self.size % self.degree:
            raise ParallelError(
                f"ulysses {self.ulysses} x ring {self.ring} needs a multiple of {self.degree} processes, but there are "
                f"{self.size}; accepted: torchrun with so many"
            )

    @property
    def degree(self) -> int:
        """Ranks that share a sequence."""
        return self.ulysses * self.ring

    @property
    def sequence_rank(self) -> int:
        """This rank's place in its sequence group."""
        return self.rank % self.degree

    @property
    def ulysses_rank(self) -> int:
        return self.sequence_rank % self.ulysses

    @property
    def ring_rank(self) -> int:
        return self.sequence_rank // self.ulysses

    @property
    def data_rank(self) -> int:
        """Which sequence group this is."""
        return self.rank // self.degree

    @property
    def data_size(self) -> int:
        """How many sequence groups there are."""
        return self.size // self.degree

    @property
    def first(self) -> int:
        """The rank, of all processes, of the sequence group's first one."""
        return self.data_rank * self.degree


def make_topology(ulysses: int = 1, ring: int = 1, timeout: timedelta | None = None) -> Topology:
    """This process's topology; the groups are made, so all processes call it, in the same order.

    Args:
        ulysses, ring: see `Topology`.
        timeout: how long a rank waits for the others of a group; torch's default when None.

    Raises:
        ParallelError: the number of processes is no multiple of `ulysses` x `ring`.
    """
    started = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
    alone = Topology(ulysses, ring, rank, size)
    if alone.degree == 1:
        return alone
    own: dict[str, Any] = {}
    for first in range(0, size, alone.degree):
        ranks = range(first, first + alone.degree)
        rows = [ranks[row * ulysses : (row + 1) * ulysses] for row in range(ring)]
        columns = [ranks[column::ulysses] for column in range(ulysses)]
        for name, members in (
            ("group", [ranks]),
            ("ulysses_group", rows if ulysses > 1 else []),
            ("ring_group", columns if ring > 1 else []),
        ):
            for of_group in members:
                group = dist.new_group(list(of_group), timeout=timeout)
                if rank in of_group:
                    own[name] = group
    return Topology(ulysses, ring, rank, size, **own)


def check_heads(config: Any, ulysses: int) -> None:
    """Refuses a text model whose attention heads can't be shared by the ranks of a row.

    Args:
        config: the text model's.
        ulysses: ranks of a row.

    Raises:
        ParallelError: the message gives the numbers that would be accepted.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    accepted = [u for u in range(1, heads + 1) if heads % u == 0 and (kv_heads % u == 0 or u % kv_heads == 0)]
    if ulysses not in accepted:
        raise ParallelError(
            f"ulysses is {ulysses}, but the text model has {heads} attention heads and {kv_heads} of keys and values; "
            f"accepted: {', '.join(map(str, accepted))}"
        )
