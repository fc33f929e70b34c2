"""Attention over packed keys and values, which are never dequantised as a whole.

In the kernels the codes enter the products as they are. With x ≈ zero + scale · code (`packing`), q · k = q · zero +
(q ∘ scale) · code: the scale of a block of keys is folded into the query. And Σ p · v = Σ p · zero + Σ (p · scale) ·
code: that of a value's token into its probability. The reference dequantises a block of columns at a time.
"""

from collections.abc import Callable, Sequence
from math import lcm
from typing import Any

import torch

from .packing import PackedKeys, PackedValues, unpack_keys, unpack_values
from .rater_attention import has_triton

Packed = PackedKeys | PackedValues

NUMBERS_AT_ONCE = 1 << 18  # dequantised at a time (1 MiB in float32), which a core's cache holds
SCORES_AT_ONCE = 1 << 22  # bounds the memory where there are many queries (16 MiB in float32)


def packed_attention(
    query: torch.Tensor,
    keys: Packed,
    values: Packed,
    dense_keys: torch.Tensor,
    dense_values: torch.Tensor,
    scaling: float,
    packed_mask: torch.Tensor | None = None,
    dense_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over packed columns and dense ones together.

    On CUDA the Triton kernel runs, where Triton is installed and it takes the inputs. On a CPU a few queries have
    products in C++, where there is a compiler (`packed_attention_cpu`). Otherwise the reference does it all.

    Args:
        query: [batch, heads, queries, head_dim], after RoPE; head h reads kv head h // (heads // kv_heads).
        keys, values: the packed columns; either may have its scales by channel or by token.
        dense_keys, dense_values: [batch, kv_heads, columns, head_dim]; there may be none.
        scaling: of q·k.
        packed_mask, dense_mask: bool [batch, 1 | kv_heads, 1 | queries, columns], True where seen; None: all is seen.

    Returns:
        The output [batch, heads, queries, head_dim] and the natural log-sum-exp of the scores [batch, heads, queries],
        in float32, or float64 for float64 queries; 0 and -inf for a query that sees nothing.

    Raises:
        ValueError: heads is no multiple of kv_heads.
    """
    heads, kv_heads = query.shape[1], keys.codes.shape[1]
    if heads % kv_heads:
        raise ValueError(f"query has {heads} heads, keys have {kv_heads}; accepted: a multiple of the keys'")
    dense = (dense_keys, dense_values, scaling, packed_mask, dense_mask)
    if isinstance(keys, PackedKeys) and isinstance(values, PackedValues):
        if query.is_cuda and has_triton():
            from . import packed_attention_triton as triton_kernels

            if triton_kernels.takes(query, keys, values):
                with torch.cuda.device(query.device):  # Triton launches on the current device
                    return triton_kernels.packed_attention_triton(query, keys, values, *dense)
        if query.device.type == "cpu":
            from . import packed_attention_cpu as cpu_kernels

            if cpu_kernels.takes(query, keys, values):
                return blockwise_attention(query, keys, values, *dense, cpu_kernels.scores, cpu_kernels.outputs)
    return packed_attention_reference(query, keys, values, *dense)


def merge_attention(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all columns, from that over each of several parts of them: its output and log-sum-exp.

    Args:
        outs: [..., head_dim] of each part.
        lses: [...], natural log-sum-exp of each part's scores; -inf where nothing was seen.
    """
    stacked = torch.stack(list(lses))
    lse = stacked.logsumexp(0)
    weights = (stacked - lse.masked_fill(lse == -torch.inf, 0)).exp()  # nothing seen at all: exp(-inf - 0) = 0
    return (torch.stack(list(outs)) * weights[..., None]).sum(0), lse


def packed_attention_reference(
    query: torch.Tensor,
    keys: Packed,
    values: Packed,
    dense_keys: torch.Tensor,
    dense_values: torch.Tensor,
    scaling: float,
    packed_mask: torch.Tensor | None = None,
    dense_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`packed_attention` in plain torch, for any number of queries and any packed states."""
    batch, kv_heads = keys.codes.shape[:2]
    columns = NUMBERS_AT_ONCE // (batch * kv_heads * query.shape[3])
    return blockwise_attention(
        query, keys, values, dense_keys, dense_values, scaling, packed_mask, dense_mask, _scores, _outputs, columns
    )


def blockwise_attention(
    query: torch.Tensor,
    keys: Packed,
    values: Packed,
    dense_keys: torch.Tensor,
    dense_values: torch.Tensor,
    scaling: float,
    packed_mask: torch.Tensor | None,
    dense_mask: torch.Tensor | None,
    packed_scores: Callable[[torch.Tensor, Any], torch.Tensor],
    packed_outputs: Callable[[torch.Tensor, Any], torch.Tensor],
    columns: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`packed_attention`, block of columns after block, with a running softmax; rows are a group's heads and queries.

    Args:
        packed_scores: gives q · k [batch, kv_heads, rows, tokens] of q [batch, kv_heads, rows, head_dim] and keys.
        packed_outputs: gives p · v [batch, kv_heads, rows, head_dim] of p [batch, kv_heads, rows, tokens] and values.
        columns: of a block, at most, where it is not smaller for its scores' sake.
    """
    (batch, kv_heads), (heads, queries, head_dim) = keys.codes.shape[:2], query.shape[1:]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = (query.to(dtype) * scaling).reshape(batch, kv_heads, heads // kv_heads * queries, head_dim)
    rows = q.shape[2]
    most = SCORES_AT_ONCE // (batch * kv_heads * rows)
    most = most if columns is None else min(most, columns)
    unit = lcm(*(states.group for states in (keys, values) if isinstance(states, PackedKeys)))
    step = max(1, most // unit) * unit

    softmax = _RunningSoftmax(q)
    for start in range(0, keys.tokens, step):
        stop = min(start + step, keys.tokens)
        scores = packed_scores(q, keys.blocks(start, stop))
        p = softmax.add(scores, _rows(packed_mask, start, stop, rows))
        softmax.out += packed_outputs(p, values.blocks(start, stop))
    for start in range(0, dense_keys.shape[2], step):
        stop = start + step
        scores = q @ dense_keys[:, :, start:stop].to(dtype).mT
        p = softmax.add(scores, _rows(dense_mask, start, stop, rows))
        softmax.out += p @ dense_values[:, :, start:stop].to(dtype)
    out, lse = softmax.result()
    return out.reshape(query.shape), lse.reshape(batch, heads, queries)


class _RunningSoftmax:
    """Attention of rows to blocks of columns that come one after the other.

    Attributes:
        out: [batch, kv_heads, rows, head_dim], the sum of values times exp(score - largest score so far).
    """

    def __init__(self, q: torch.Tensor) -> None:
        self.out = torch.zeros_like(q)
        self.total = q.new_zeros(q.shape[:3])
        self.largest = q.new_full(q.shape[:3], -torch.inf)

    def add(self, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """What a block's values are to be weighed with, from its scores [batch, kv_heads, rows, columns]."""
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        largest = torch.maximum(self.largest, scores.amax(-1))
        shift = largest.masked_fill(largest == -torch.inf, 0)  # nothing seen yet: exp(-inf - 0) = 0
        p = scores.sub_(shift[..., None]).exp_()
        before = (self.largest - shift).exp_()
        self.out *= before[..., None]
        self.total = self.total * before + p.sum(-1)
        self.largest = largest
        return p

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and the natural log-sum-exp of the scores."""
        seen = self.total.clamp_min(torch.finfo(self.total.dtype).tiny)
        return self.out / seen[..., None], self.largest + self.total.log()


def _scores(q: torch.Tensor, states: Packed) -> torch.Tensor:
    return q @ _dequantised(states, q.dtype).mT


def _outputs(p: torch.Tensor, states: Packed) -> torch.Tensor:
    return p @ _dequantised(states, p.dtype)


def _dequantised(states: Packed, dtype: torch.dtype) -> torch.Tensor:
    return unpack_keys(states, dtype) if isinstance(states, PackedKeys) else unpack_values(states, dtype)


def _rows(mask: torch.Tensor | None, start: int, stop: int, rows: int) -> torch.Tensor | None:
    """A mask of queries for the rows of a block, bool [batch, 1 | kv_heads, 1 | rows, columns]."""
    if mask is None:
        return None
    mask = mask[..., start:stop]
    return mask if mask.shape[2] == 1 else mask.repeat(1, 1, rows // mask.shape[2], 1)
