"""`rater_attention` on CUDA in two passes: log-sum-exp of each head and rater, then the probabilities asked for.

The probability of column j is exp(q·k_j − lse), so only visual columns are made a second time, and they are averaged in
registers: besides the result, memory holds one number for each head, rater and split of the keys. No atomics: a program
owns what it writes, and two runs give the same bits.
"""

from typing import Any, Literal

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
ROW_BYTES = 512  # of a tile of q or k, the most that fits: head_dim 256 in bfloat16 and float16, 128 in float32


@triton.jit
def log_sum_exp_kernel(
    q_ptr,
    k_ptr,
    last_ptr,
    out_ptr,  # [splits, heads, raters]
    q_stride_head,
    q_stride_rater,
    k_stride_head,
    k_stride_key,
    heads,
    raters,
    keys,
    keys_per_split,  # a multiple of BLOCK_KEYS
    scale,  # scaling · log2(e)
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Base-2 log-sum-exp over one split of the keys; its rows are the (head, rater) pairs of one kv head."""
    kv_head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real_row = row < GROUP * raters
    head, rater = kv_head * GROUP + row // raters, row % raters
    dim = tl.arange(0, BLOCK_DIM)
    real_dim = dim < HEAD_DIM
    q_at = q_ptr + head[:, None] * q_stride_head + rater[:, None] * q_stride_rater + dim[None, :]
    q = tl.load(q_at, mask=real_row[:, None] & real_dim[None, :], other=0.0)
    last = tl.load(last_ptr + rater, mask=real_row, other=-1)

    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    first = split * keys_per_split
    for start in range(first, tl.minimum(first + keys_per_split, keys), BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        k_at = k_ptr + kv_head * k_stride_head + key[:, None].to(tl.int64) * k_stride_key + dim[None, :]
        k = tl.load(k_at, mask=(key < keys)[:, None] & real_dim[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
        scores = tl.where((key[None, :] <= last[:, None]) & (key < keys)[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # nothing seen yet: no inf − inf
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        largest = new_largest
    result = largest + tl.log2(tl.where(total > 0, total, 1.0))  # -inf where no key of the split is seen
    tl.store(out_ptr + (split * heads + head) * raters + rater, result, mask=real_row)


@triton.jit
def probabilities(
    q_ptr,
    lse_ptr,
    q_stride_head,
    q_stride_rater,
    raters,
    scale,
    k,  # [BLOCK_COLUMNS, BLOCK_DIM]
    column,
    last,
    head,
    rater,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Of one head's block of raters to a block of columns, [BLOCK_RATERS, BLOCK_COLUMNS]."""
    real_rater = rater < raters
    dim = tl.arange(0, BLOCK_DIM)
    q_at = q_ptr + head * q_stride_head + rater[:, None].to(tl.int64) * q_stride_rater + dim[None, :]
    q = tl.load(q_at, mask=real_rater[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    lse = tl.load(lse_ptr + head * raters + rater, mask=real_rater, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
    return tl.where(column[None, :] <= last[:, None], tl.exp2(scores - lse[:, None]), 0.0)


@triton.jit
def head_mean_kernel(
    q_ptr,
    k_ptr,
    last_ptr,
    columns_ptr,
    lse_ptr,  # [heads, raters]
    out_ptr,  # [raters, visual]
    q_stride_head,
    q_stride_rater,
    k_stride_head,
    k_stride_key,
    kv_heads,
    raters,
    visual,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_RATERS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A block of columns × a block of raters, summed over all heads; a tile of keys serves the heads of its group."""
    place = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column = tl.load(columns_ptr + place, mask=place < visual, other=0)
    rater = tl.program_id(1) * BLOCK_RATERS + tl.arange(0, BLOCK_RATERS)
    last = tl.load(last_ptr + rater, mask=rater < raters, other=-1)
    dim = tl.arange(0, BLOCK_DIM)
    total = tl.zeros([BLOCK_RATERS, BLOCK_COLUMNS], tl.float32)
    k_at = k_ptr + column[:, None] * k_stride_key + dim[None, :]
    for kv_head in range(kv_heads):
        k = tl.load(k_at, mask=(place < visual)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            total += probabilities(
                q_ptr, lse_ptr, q_stride_head, q_stride_rater, raters, scale, k, column, last, head, rater,
                HEAD_DIM, BLOCK_DIM,
            )  # fmt: skip
        k_at += k_stride_head
    out_at = out_ptr + rater[:, None].to(tl.int64) * visual + place[None, :]
    tl.store(out_at, total / (kv_heads * GROUP), mask=(rater < raters)[:, None] & (place < visual)[None, :])


@triton.jit
def rater_mean_kernel(
    q_ptr,
    k_ptr,
    last_ptr,
    columns_ptr,
    lse_ptr,  # [heads, raters]
    weights_ptr,  # [raters, visual]
    out_ptr,  # [heads, visual]
    q_stride_head,
    q_stride_rater,
    k_stride_head,
    k_stride_key,
    raters,
    visual,
    scale,
    WEIGHTED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_RATERS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A block of columns × one head, summed over all raters."""
    place = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    real_column = place < visual
    column = tl.load(columns_ptr + place, mask=real_column, other=0)
    head = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)
    k_at = k_ptr + head // GROUP * k_stride_head + column[:, None] * k_stride_key + dim[None, :]
    k = tl.load(k_at, mask=real_column[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    total = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for start in range(0, raters, BLOCK_RATERS):
        rater = start + tl.arange(0, BLOCK_RATERS)
        last = tl.load(last_ptr + rater, mask=rater < raters, other=-1)
        block = probabilities(
            q_ptr, lse_ptr, q_stride_head, q_stride_rater, raters, scale, k, column, last, head, rater,
            HEAD_DIM, BLOCK_DIM,
        )  # fmt: skip
        if WEIGHTED:
            weights_at = weights_ptr + rater[:, None].to(tl.int64) * visual + place[None, :]
            block *= tl.load(weights_at, mask=(rater < raters)[:, None] & real_column[None, :], other=0.0)
        total += tl.sum(block, 0)
    tl.store(out_ptr + head * visual + place, total / raters, mask=real_column)


def takes(q: torch.Tensor) -> bool:
    """Whether the kernels serve queries of this dtype and head_dim (the last dimension)."""
    known = (torch.bfloat16, torch.float16, torch.float32)
    return q.dtype in known and triton.next_power_of_2(q.shape[-1]) * q.dtype.itemsize <= ROW_BYTES


def block_sizes(raters: int, group: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Of the kernels' tiles; smaller where a long row would fill registers and shared memory."""
    block_dim = max(16, triton.next_power_of_2(head_dim))
    wide = block_dim * dtype.itemsize > 256  # bytes of a row; 256 is bf16 with head_dim 128
    columns = 32 if wide else 64
    return {
        "BLOCK_DIM": block_dim,
        "BLOCK_ROWS": min(columns, max(16, triton.next_power_of_2(raters * group))),
        "BLOCK_RATERS": min(columns, max(16, triton.next_power_of_2(raters))),
        "BLOCK_KEYS": columns,
        "BLOCK_COLUMNS": columns,
    }


def rater_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    last: torch.Tensor,
    columns: torch.Tensor,
    scaling: float,
    over: Literal["heads", "raters"],
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rater_attention` on CUDA, or under Triton's interpreter on a CPU, for what `takes` says; float32."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    last, columns = last.contiguous(), columns.contiguous()
    (heads, raters, head_dim), (kv_heads, keys, _), visual = q.shape, k.shape, len(columns)
    group = heads // kv_heads
    blocks = block_sizes(raters, group, head_dim, q.dtype)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    scale = scaling * LOG2_E
    shape: dict[str, Any] = {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_DIM": blocks["BLOCK_DIM"]}

    row_blocks = triton.cdiv(group * raters, blocks["BLOCK_ROWS"])
    key_blocks = triton.cdiv(keys, blocks["BLOCK_KEYS"])
    splits = max(1, min(key_blocks, programs_wanted(q.device) // (row_blocks * kv_heads)))
    keys_per_split = triton.cdiv(key_blocks, splits) * blocks["BLOCK_KEYS"]
    splits = triton.cdiv(keys, keys_per_split)
    partial = torch.empty(splits, heads, raters, dtype=torch.float32, device=q.device)
    log_sum_exp_kernel[row_blocks, kv_heads, splits](
        q, k, last, partial, *strides, heads, raters, keys, keys_per_split, scale,
        BLOCK_ROWS=blocks["BLOCK_ROWS"], BLOCK_KEYS=blocks["BLOCK_KEYS"], **shape,
    )  # fmt: skip
    lse = partial[0] if splits == 1 else (partial / LOG2_E).logsumexp(0) * LOG2_E

    shape |= {"BLOCK_RATERS": blocks["BLOCK_RATERS"], "BLOCK_COLUMNS": blocks["BLOCK_COLUMNS"]}
    column_blocks = triton.cdiv(visual, blocks["BLOCK_COLUMNS"])
    if over == "heads":
        out = torch.empty(raters, visual, dtype=torch.float32, device=q.device)
        grid = (column_blocks, triton.cdiv(raters, blocks["BLOCK_RATERS"]))
        head_mean_kernel[grid](
            q, k, last, columns, lse, out, *strides, kv_heads, raters, visual, scale, **shape
        )  # fmt: skip
        return out
    out = torch.empty(heads, visual, dtype=torch.float32, device=q.device)
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    rater_mean_kernel[column_blocks, heads](
        q, k, last, columns, lse, out if weights is None else weights, out, *strides, raters, visual, scale,
        WEIGHTED=weights is not None, **shape,
    )  # fmt: skip
    return out


def programs_wanted(device: torch.device) -> int:
    """Two for each multiprocessor, so that long prompts are read by the whole device."""
    if device.type != "cuda":
        return 8
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
