"""Who holds which token of a pack of documents, and who encodes which images and frames.

Plain numbers, the same on every rank, without communication. Each document is padded to a multiple of 2 x `ring` and
cut in as many chunks; row g of the grid takes its chunks g and 2 x `ring` - 1 - g, so that all rows compute the same of
causal attention (zigzag; the balance holds for each document, where zigzag over a whole pack loses up to half). A row's
tokens are cut evenly among its ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch

from ...kernels.varlen_attention import Segments
from .topology import ParallelError

IGNORE = -100


def shift_labels(labels: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Labels at their own tokens to the targets that each token predicts, within its document.

    Args:
        labels: [..., tokens], -100 where no loss falls.
        lengths: tokens of each document.

    Returns:
        [..., tokens]; -100 at the last token of each document.
    """
    targets = torch.full_like(labels, IGNORE)
    targets[..., :-1] = labels[..., 1:]
    ends = torch.tensor(list(accumulate(lengths)), device=labels.device) - 1
    targets[..., ends] = IGNORE
    return targets


def split_by_cost(costs: Sequence[float], parts: int) -> list[range]:
    """Contiguous ranges of items, in order, whose largest sum of costs is the least possible.

    Args:
        costs: of each item, 0 or more.
        parts: how many ranges; some are empty where there are fewer items.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=np.float64))])

    def cut(bound: float) -> list[int]:
        """Where the ranges end, each as long as the bound allows."""
        ends = [0]
        for _ in range(parts):
            ends.append(int(np.searchsorted(sums, sums[ends[-1]] + bound * (1 + 1e-12), side="right")) - 1)
        return ends

    low, high = sums[-1] / parts, float(sums[-1])
    if cut(low)[-1] == len(costs):
        high = low
    while high - low > 1e-9 * max(high, 1e-300):
        middle = (low + high) / 2
        low, high = (low, middle) if cut(middle)[-1] == len(costs) else (middle, high)
    ends = cut(high)
    return [range(start, end) for start, end in pairwise(ends)]


@dataclass(frozen=True)
class SequencePlan:
    """Where each token of a pack of documents is.

    Attributes:
        lengths: tokens of each document, one at least.
        ulysses, ring: see `Topology`.

    Raises:
        ParallelError: a document without tokens, or none at all.
    """

    lengths: tuple[int, ...]
    ulysses: int
    ring: int

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ParallelError(f"lengths is {self.lengths}; accepted: one document at least, of a token at least each")
        if self.ulysses < 1 or self.ring < 1:
            raise ParallelError(f"ulysses is {self.ulysses} and ring {self.ring}; accepted: 1 or more")

    @property
    def degree(self) -> int:
        return self.ulysses * self.ring

    @property
    def tokens(self) -> int:
        """Of all documents, without padding."""
        return sum(self.lengths)

    @cached_property
    def padded(self) -> tuple[int, ...]:
        """Of each document with its padding; the last one's also makes a row's tokens a multiple of its ranks."""
        chunks = 2 * self.ring
        padded = [-(-length // chunks) * chunks for length in self.lengths]
        while sum(padded) // self.ring % self.ulysses:
            padded[-1] += chunks
        return tuple(padded)

    @property
    def padded_tokens(self) -> int:
        return sum(self.padded)

    @property
    def local_tokens(self) -> int:
        """Of each rank, padding included."""
        return self.padded_tokens // self.degree

    def places(self, rank: int) -> np.ndarray:
        """Where the tokens of a rank of the group stand in the pack, int64 [local_tokens]; -1 at padding."""
        return self._of_rank(self._row_places, rank)

    def positions(self, rank: int) -> np.ndarray:
        """Position of each of a rank's tokens in its document, int64 [local_tokens]; padding goes on counting."""
        return self._of_rank(self._row_positions, rank)

    def shard(self, tensor: torch.Tensor, rank: int, fill: float) -> torch.Tensor:
        """A rank's part of what tokens have.

        Args:
            tensor: [..., tokens].
            rank: in the sequence group.
            fill: what padding has.

        Returns:
            [..., local_tokens].
        """
        if tensor.shape[-1] != self.tokens:
            raise ParallelError(f"a tensor of shape {tuple(tensor.shape)}; accepted: [..., {self.tokens}]")
        places = torch.from_numpy(self.places(rank)).to(tensor.device)
        return tensor[..., places.clamp(min=0)].masked_fill(places < 0, fill)

    def unshard(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """What `shard` gave to all ranks of the group, by rank, as it was: [..., tokens]."""
        whole = parts[0].new_empty(*parts[0].shape[:-1], self.tokens)
        for rank, part in enumerate(parts):
            places = torch.from_numpy(self.places(rank)).to(part.device)
            whole[..., places[places >= 0]] = part[..., places >= 0]
        return whole

    @cached_property
    def owners(self) -> np.ndarray:
        """The rank of the group that holds each token, int64 [tokens]."""
        owners = np.empty(self.tokens, dtype=np.int64)
        for rank in range(self.degree):
            places = self.places(rank)
            owners[places[places >= 0]] = rank
        return owners

    @cached_property
    def segments(self) -> Segments:
        """The documents on a row of the grid: two chunks each."""
        return Segments((0, *accumulate(length // self.ring for length in self.padded)))

    @cached_property
    def halves(self) -> Segments:
        """The documents where each has one of its two chunks."""
        return Segments((0, *accumulate(length // self.ring // 2 for length in self.padded)))

    @cached_property
    def front(self) -> np.ndarray:
        """Which of a row's tokens are of a document's first chunk there, bool [padded_tokens / ring]."""
        front = np.zeros(self.padded_tokens // self.ring, dtype=bool)
        for start, end in pairwise(self.segments.bounds):
            front[start : (start + end) // 2] = True
        return front

    @cached_property
    def _row_positions(self) -> list[np.ndarray]:
        """Of each row, position of its tokens in their documents."""
        chunks = 2 * self.ring
        rows = []
        for row in range(self.ring):
            parts = []
            for length in self.padded:
                chunk = length // chunks
                parts += [np.arange(c * chunk, (c + 1) * chunk) for c in (row, chunks - 1 - row)]
            rows.append(np.concatenate(parts))
        return rows

    @cached_property
    def _row_places(self) -> list[np.ndarray]:
        """Of each row, where its tokens stand in the pack; -1 at padding."""
        counts = [length // self.ring for length in self.padded]  # of each document in a row
        starts = np.repeat(np.concatenate([[0], np.cumsum(self.lengths)[:-1]]), counts)
        lengths = np.repeat(self.lengths, counts)
        return [np.where(row < lengths, starts + row, -1) for row in self._row_positions]

    def _of_rank(self, rows: list[np.ndarray], rank: int) -> np.ndarray:
        row, place = divmod(rank, self.ulysses)
        return rows[row][place * self.local_tokens : (place + 1) * self.local_tokens]


@dataclass(frozen=True)
class Route:
    """What a rank sends of the visual tokens that it encoded, and what it gets; of one kind of media.

    Ranks encode contiguous runs, so that tokens come in the order in which a rank holds their placeholders.

    Attributes:
        send_index: int64 [own], order in which its tokens leave, by destination.
        send_counts: to each rank of the group.
        receive_counts: from each rank.
    """

    send_index: torch.Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]


def route(plan: SequencePlan, places: np.ndarray, counts: Sequence[int], rank: int) -> Route:
    """The route of the visual tokens of one kind.

    Args:
        plan: of the pack.
        places: int64 [visual tokens], where their placeholders stand in the pack, ascending.
        counts: how many of them each rank of the group has encoded: the first rank the first ones, and so on.
        rank: in the group.

    Raises:
        ParallelError: the numbers of placeholders and of encoded tokens differ.
    """
    if sum(counts) != len(places):
        raise ParallelError(
            f"the pack holds {len(places)} placeholders, but {sum(counts)} visual tokens were encoded; both numbers "
            "must be equal"
        )
    sources = np.repeat(np.arange(plan.degree), counts)  # who encodes a token
    targets = plan.owners[places]  # who holds it
    sent = targets[sources == rank]
    got = sources[targets == rank]
    return Route(
        torch.from_numpy(np.argsort(sent, kind="stable")),
        tuple(np.bincount(sent, minlength=plan.degree).tolist()),
        tuple(np.bincount(got, minlength=plan.degree).tolist()),
    )
