"""The exchanges of sequence parallelism that autograd follows: visual tokens to their places, heads for tokens.

An in-place `all_reduce` of embeddings, which autograd does not see, would lose the gradient of every visual token that
another rank's part of the sequence holds.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .plan import Route

_counters: list[Counter[str]] = []


@contextmanager
def count_traffic() -> Iterator[Counter[str]]:
    """Counts the bytes that this rank sends to others, by what they are: `tokens`, `heads`, `ring`, and the same with
    ` backward`. What a rank keeps is not counted.
    """
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def note_traffic(what: str, elements: int, tensor: torch.Tensor) -> None:
    """Counts elements of a tensor's type that are sent to another rank."""
    for counter in _counters:
        counter[what] += elements * tensor.element_size()


def exchange_tokens(features: torch.Tensor, route: Route, group: dist.ProcessGroup) -> torch.Tensor:
    """Visual tokens from the ranks that encoded them to those whose part of the sequence holds their placeholders.

    Every rank of the group calls it, also one that has nothing to send. No rank holds the tokens of all.

    Args:
        features: [own tokens, D], what this rank encoded, in order of the pack.
        route: of their kind of media, the same on its device or another.
        group: the sequence's.

    Returns:
        [received tokens, D], in local order of the placeholders.
    """
    sent = features.index_select(0, route.send_index.to(features.device))
    return all_to_all(sent, route.send_counts, route.receive_counts, group, "tokens")


def scatter_heads(states: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """All heads of a few tokens to a few heads of all tokens of the row (DeepSpeed-Ulysses, arXiv 2309.14509, section
    3.1): [tokens, groups of heads, heads, head_dim] to [tokens x ranks, heads, head_dim].

    Args:
        states: as many groups of heads as the row has ranks; rank i gets the i-th.
        group: the row; None where a rank is alone in it.
    """
    if group is None:
        return states.flatten(1, 2)
    tokens, ranks = states.shape[:2]
    by_rank = states.transpose(0, 1).flatten(0, 1)  # [ranks x tokens, heads, head_dim]
    return all_to_all(by_rank, [tokens] * ranks, [tokens] * ranks, group, "heads")


def gather_heads(states: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The way back: [tokens x ranks, heads, head_dim] to [tokens, heads x ranks, head_dim]."""
    if group is None:
        return states
    ranks = dist.get_world_size(group)
    tokens = len(states) // ranks
    got = all_to_all(states, [tokens] * ranks, [tokens] * ranks, group, "heads")
    return got.unflatten(0, (ranks, tokens)).transpose(0, 1).flatten(1, 2)


def all_to_all(
    tensor: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup, what: str
) -> torch.Tensor:
    """Rows of a tensor to the ranks of a group, and theirs to this one; in the backward pass gradients the other way.

    Args:
        tensor: [rows, ...], by destination.
        send, receive: rows to and from each rank.
        group: of which every rank calls it.
        what: the name under which `count_traffic` counts it.

    Returns:
        [rows, ...], by source.
    """
    return _AllToAll.apply(tensor, tuple(send), tuple(receive), group, what)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        send: tuple[int, ...],
        receive: tuple[int, ...],
        group: dist.ProcessGroup,
        what: str,
    ) -> torch.Tensor:
        ctx.way = (receive, send, group, f"{what} backward")
        return _exchange(tensor, send, receive, group, what)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return _exchange(gradients[0], *ctx.way), None, None, None, None


def _exchange(
    tensor: torch.Tensor, send: tuple[int, ...], receive: tuple[int, ...], group: dist.ProcessGroup, what: str
) -> torch.Tensor:
    row = tensor[:1].numel() if len(tensor) else 0
    note_traffic(what, (sum(send) - send[dist.get_rank(group)]) * row, tensor)
    got = tensor.new_empty(sum(receive), *tensor.shape[1:])
    dist.all_to_all_single(got, tensor.contiguous(), list(receive), list(send), group=group)
    return got
