"""Ring attention over a pack of documents (arXiv 2310.01889; zigzag order: arXiv 2311.09431, section 3.2).

Each row of the grid holds two chunks of every document. Keys and values go round the ring while queries stay; what is
attended to of each row's keys is merged by the log-sum-exp. In the backward pass they go round again, together with
their gradients, which are summed in fp32 and come home in the end.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ...kernels.varlen_attention import Segments, varlen_attention, varlen_attention_backward
from .exchange import note_traffic
from .plan import SequencePlan


@dataclass(frozen=True)
class RingLayout:
    """How the documents of a pack lie on a row of the grid.

    Attributes:
        whole: the documents, two chunks each.
        halves: the documents, where each has one of its chunks.
        front, back: int64 [tokens / 2], where the first and the second chunks are.
    """

    whole: Segments
    halves: Segments
    front: torch.Tensor
    back: torch.Tensor

    @classmethod
    def of(cls, plan: SequencePlan, device: torch.device) -> "RingLayout":
        front = torch.from_numpy(plan.front).to(device)
        return cls(plan.segments, plan.halves, front.nonzero().squeeze(1), (~front).nonzero().squeeze(1))


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RingLayout,
    scaling: float,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Causal attention within documents that lie on several ranks.

    Args:
        query: [tokens, heads, head_dim], this rank's.
        key, value: [tokens, kv_heads, head_dim], this rank's.
        layout: the same on all ranks.
        scaling: of the scores.
        group: the ring; None where one rank holds the documents whole.

    Returns:
        [tokens, heads, head_dim].
    """
    return _RingAttention.apply(query, key, value, layout, scaling, group)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: RingLayout,
        scaling: float,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        ring = _Ring(group)
        states = torch.stack([key, value])  # [2, tokens, kv_heads, head_dim], of one row after the other
        coming = ring.pass_on(states, "ring") if ring.size > 1 else None
        out, lse = varlen_attention(query, key, value, layout.whole, layout.whole, True, scaling)
        kept = out.to(lse.dtype)
        for step in range(1, ring.size):
            assert coming is not None
            states = coming.wait()
            if step + 1 < ring.size:  # under way while this row's keys are attended to
                coming = ring.pass_on(states, "ring")
            block = _Block(layout, ring.rank, (ring.rank - step) % ring.size)
            keys, values = block.keys(states)
            some, some_lse = varlen_attention(
                block.queries(query), keys, values, block.query_segments, block.key_segments, False, scaling
            )
            kept, lse = block.merged(kept, lse, some, some_lse)
        out = kept.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scaling, ctx.group = layout, scaling, group
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        query, key, value, out, lse = ctx.saved_tensors
        layout, scaling, grad_out = ctx.layout, ctx.scaling, gradients[0].contiguous()
        ring = _Ring(ctx.group)
        states = torch.stack([key, value])
        coming = ring.pass_on(states, "ring backward") if ring.size > 1 else None
        grad_query, *of_states = varlen_attention_backward(
            grad_out, query, key, value, out, lse, layout.whole, layout.whole, True, scaling
        )
        grad_query = grad_query.to(lse.dtype)
        grads = torch.stack(of_states).to(lse.dtype)  # of the row whose keys are here, from the rows that had them
        for step in range(1, ring.size):
            assert coming is not None
            states, grads_coming = coming.wait(), ring.pass_on(grads, "ring backward")
            if step + 1 < ring.size:
                coming = ring.pass_on(states, "ring backward")
            block = _Block(layout, ring.rank, (ring.rank - step) % ring.size)
            keys, values = block.keys(states)
            grad, *of_block = varlen_attention_backward(
                block.queries(grad_out),
                block.queries(query),
                keys,
                values,
                block.queries(out),
                block.of_queries(lse),
                block.query_segments,
                block.key_segments,
                False,
                scaling,
            )
            block.add_queries(grad_query, grad)
            grads = grads_coming.wait()
            block.add_keys(grads, torch.stack(of_block))
        if ring.size > 1:
            grads = ring.pass_on(grads, "ring backward").wait()
        grad_key, grad_value = grads.to(key.dtype)
        return grad_query.to(query.dtype), grad_key, grad_value, None, None, None


class _Block:
    """A row's queries and another row's keys: what of them sees what, all of it.

    Keys of an earlier row: their first chunk comes before both of ours, the second after. Of a later row: both lie
    between ours.
    """

    def __init__(self, layout: RingLayout, row: int, of: int):
        self.layout, self.earlier = layout, of < row
        halves, whole = layout.halves, layout.whole
        self.query_segments, self.key_segments = (whole, halves) if self.earlier else (halves, whole)

    def queries(self, states: torch.Tensor) -> torch.Tensor:
        """[tokens, ...], those of the queries that see anything."""
        return states if self.earlier else states.index_select(0, self.layout.back)

    def of_queries(self, lse: torch.Tensor) -> torch.Tensor:
        """[heads, tokens], likewise."""
        return lse if self.earlier else lse.index_select(1, self.layout.back)

    def keys(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of [2, tokens, kv_heads, head_dim], keys and values that are seen."""
        key, value = states.index_select(1, self.layout.front) if self.earlier else states
        return key, value

    def merged(
        self, out: torch.Tensor, lse: torch.Tensor, some: torch.Tensor, some_lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to what was seen before and to these keys, as one: [tokens, heads, head_dim], [heads, tokens]."""
        before, before_lse = self.queries(out), self.of_queries(lse)
        both_lse = torch.logaddexp(before_lse, some_lse)
        share = (some_lse - both_lse).exp().T.unsqueeze(-1)  # [tokens, heads, 1], of these keys
        both = before + share * (some.to(out.dtype) - before)
        if self.earlier:
            return both, both_lse
        return out.index_copy(0, self.layout.back, both), lse.index_copy(1, self.layout.back, both_lse)

    def add_queries(self, total: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds gradients of `queries` to those of all, in place."""
        if self.earlier:
            total.add_(gradient)
        else:
            total.index_add_(0, self.layout.back, gradient.to(total.dtype))

    def add_keys(self, total: torch.Tensor, gradients: torch.Tensor) -> None:
        """Adds gradients of `keys` [2, tokens, kv_heads, head_dim] to those of all, in place."""
        if self.earlier:
            total.index_add_(1, self.layout.front, gradients.to(total.dtype))
        else:
            total.add_(gradients)


class _Coming:
    """A tensor on its way from the row before."""

    def __init__(self, tensor: torch.Tensor, works: list[dist.Work], sent: torch.Tensor):
        self.tensor, self.works, self.sent = tensor, works, sent  # what is sent must live as long

    def wait(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        return self.tensor


class _Ring:
    """A ring's ranks; one alone without a group."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def pass_on(self, tensor: torch.Tensor, what: str) -> _Coming:
        """Starts to send a tensor to the next row and to receive one of its shape from the row before."""
        assert self.group is not None
        note_traffic(what, tensor.numel(), tensor)
        tensor = tensor.contiguous()
        coming = torch.empty_like(tensor)
        following, previous = (dist.get_global_rank(self.group, (self.rank + way) % self.size) for way in (1, -1))
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, following, self.group),
                dist.P2POp(dist.irecv, coming, previous, self.group),
            ]
        )
        return _Coming(coming, works, tensor)
