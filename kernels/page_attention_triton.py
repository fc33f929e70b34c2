"""`page_scores` and `page_attention` on CUDA; packed pages are read by the kernel of `packed_attention_triton`."""

import torch
import triton
import triton.language as tl

from .packed_attention_triton import (
    LOG2_E,
    attend_dense,
    block_sizes,
    join_splits,
    launch_options,
    mask_of,
    nothing_seen,
    split_sizes,
    takes_query,
)

BLOCK_PAGES = 64

# They change from token to token: no kernel is compiled for those that 16 divides.
LENGTHS = (
    "paged_columns", "paged_splits", "columns_per_split", "tail", "columns", "mask_stride_batch", "mask_stride_head",
    "pages_stride_batch", "pages_stride_head",
)  # fmt: skip


@triton.jit(do_not_specialize=("pages",))
def page_scores_kernel(
    q_ptr,
    low_ptr,
    high_ptr,
    out_ptr,  # [batch, kv_heads, pages]
    q_stride_batch, q_stride_head,
    low_stride_batch, low_stride_head, low_stride_page,
    high_stride_batch, high_stride_head, high_stride_page,
    kv_heads,
    rows,  # heads of a group
    pages,
    DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of pages for all heads of a group: q+ · high + q- · low, and of these the heads' maximum."""
    batch, head = tl.program_id(1).to(tl.int64) // kv_heads, tl.program_id(1).to(tl.int64) % kv_heads
    row, c = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_DIM)
    page = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real_channel = (c < HEAD_DIM)[None, :]
    q_at = q_ptr + batch * q_stride_batch + (head * rows + row)[:, None] * q_stride_head + c[None, :]
    q = tl.load(q_at, mask=(row < rows)[:, None] & real_channel, other=0.0).to(DTYPE)
    nothing = tl.zeros([BLOCK_ROWS, BLOCK_DIM], DTYPE)

    real, at = (page < pages)[:, None] & real_channel, page.to(tl.int64)[:, None]
    low_at = low_ptr + batch * low_stride_batch + head * low_stride_head + at * low_stride_page + c[None, :]
    high_at = high_ptr + batch * high_stride_batch + head * high_stride_head + at * high_stride_page + c[None, :]
    low = tl.load(low_at, mask=real, other=0.0).to(DTYPE)
    high = tl.load(high_at, mask=real, other=0.0).to(DTYPE)
    bounds = tl.dot(tl.maximum(q, nothing), tl.trans(high), input_precision="tf32x3")
    bounds = tl.dot(tl.minimum(q, nothing), tl.trans(low), bounds, input_precision="tf32x3")
    score = tl.max(tl.where((row < rows)[:, None], bounds, float("-inf")), 0)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * pages + page, score, mask=page < pages)


@triton.jit(do_not_specialize=LENGTHS)
def page_attention_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    mask_ptr,
    pages_ptr,
    out_ptr,  # [batch, heads, 1, splits, head_dim]
    lse_ptr,  # [batch, heads, 1, splits]
    q_stride_batch, q_stride_head,
    key_stride_batch, key_stride_head, key_stride,
    value_stride_batch, value_stride_head, value_stride,
    mask_stride_batch, mask_stride_head,
    pages_stride_batch, pages_stride_head,
    kv_heads,
    rows,  # heads of a group
    paged_columns,  # to read
    paged_splits,  # programs for these; those after them are for the tail
    columns_per_split,  # a multiple of BLOCK
    tail,
    columns,
    scale,  # scaling · log2(e)
    HEAD_DIM: tl.constexpr,
    MASK: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of the chosen columns or of the tail, for all heads of one KV head."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    head, batch = tl.program_id(1).to(tl.int64) % kv_heads, tl.program_id(1).to(tl.int64) // kv_heads
    out_row = tl.program_id(1).to(tl.int64) * rows
    q_ptr += batch * q_stride_batch + head * rows * q_stride_head
    keys_ptr += batch * key_stride_batch + head * key_stride_head
    values_ptr += batch * value_stride_batch + head * value_stride_head
    mask_ptr += batch * mask_stride_batch + head * mask_stride_head
    pages_ptr += batch * pages_stride_batch + head * pages_stride_head
    if split < paged_splits:
        first = split * columns_per_split
        attend_dense(
            q_ptr, keys_ptr, values_ptr, mask_ptr, pages_ptr, out_ptr, lse_ptr,
            q_stride_head, 0, key_stride, value_stride, 0, first, tl.minimum(first + columns_per_split, paged_columns),
            out_row, rows, 1, splits, split, scale, HEAD_DIM, MASK, PAGE, BLOCK_ROWS, BLOCK_DIM, BLOCK,
        )  # fmt: skip
    else:
        first = tail + (split - paged_splits) * columns_per_split
        attend_dense(
            q_ptr, keys_ptr, values_ptr, mask_ptr, pages_ptr, out_ptr, lse_ptr,
            q_stride_head, 0, key_stride, value_stride, 0, first, tl.minimum(first + columns_per_split, columns),
            out_row, rows, 1, splits, split, scale, HEAD_DIM, MASK, 0, BLOCK_ROWS, BLOCK_DIM, BLOCK,
        )  # fmt: skip


def takes_bounds(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> bool:
    """Whether `page_scores_triton` serves these."""
    known = (torch.bfloat16, torch.float16, torch.float32)
    return low.dtype in known and high.dtype in known and takes_query(query, query.shape[1] // low.shape[1])


def takes(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `page_attention_triton` serves these."""
    known = (torch.bfloat16, torch.float16, torch.float32)
    return keys.dtype in known and values.dtype in known and takes_query(query, query.shape[1] // keys.shape[1])


def score_options(dtype: torch.dtype) -> dict[str, int]:
    return {"num_warps": 4 if dtype.itemsize == 2 else 8, "num_stages": 1}


def page_scores_triton(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """`page_scores` on CUDA, or under Triton's interpreter on a CPU, for what `takes_bounds` says; float32."""
    query, low, high = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, low, high))
    (batch, heads, _, head_dim), (_, kv_heads, pages, _) = query.shape, low.shape
    dtype = query.dtype if query.dtype == low.dtype == high.dtype else torch.float32
    blocks = block_sizes(heads // kv_heads, head_dim, BLOCK_PAGES, dtype.itemsize)
    out = torch.empty(batch, kv_heads, pages, dtype=torch.float32, device=query.device)
    if out.numel() > 0:
        page_scores_kernel[triton.cdiv(pages, blocks["BLOCK"]), batch * kv_heads](
            query, low, high, out, *query.stride()[:2], *low.stride()[:3], *high.stride()[:3], kv_heads,
            heads // kv_heads, pages, DTYPE=getattr(tl, str(dtype).removeprefix("torch.")), HEAD_DIM=head_dim,
            BLOCK_ROWS=blocks["BLOCK_ROWS"], BLOCK_DIM=blocks["BLOCK_DIM"], BLOCK=blocks["BLOCK"],
            **score_options(dtype),
        )  # fmt: skip
    return out


def page_attention_triton(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    page: int,
    tail: int,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`page_attention` on CUDA, or under Triton's interpreter on a CPU, for what `takes` says; float32."""
    query, keys, values, pages = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values, pages))
    (batch, heads, _, head_dim), (_, kv_heads, columns, _) = query.shape, keys.shape
    blocks = block_sizes(heads // kv_heads, head_dim, BLOCK_PAGES, query.dtype.itemsize)
    block = blocks["DENSE_BLOCK"]
    paged_columns = pages.shape[2] * page
    paged_splits, columns_per_split, _, _ = split_sizes(
        paged_columns, columns - tail, 16, batch * kv_heads, block, query.device
    )
    splits = paged_splits + triton.cdiv(columns - tail, columns_per_split)
    if splits == 0:
        return nothing_seen(query)
    parts = torch.empty(batch, heads, 1, splits, head_dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(batch, heads, 1, splits, dtype=torch.float32, device=query.device)
    mask, kind = mask_of(mask, batch, kv_heads, query)
    page_attention_kernel[splits, batch * kv_heads](
        query, keys, values, mask, pages, parts, part_lse, *query.stride()[:2], *keys.stride()[:3],
        *values.stride()[:3], *mask.stride()[:2], *pages.stride()[:2], kv_heads, heads // kv_heads, paged_columns,
        paged_splits, columns_per_split, tail, columns, scaling * LOG2_E, HEAD_DIM=head_dim, MASK=kind, PAGE=page,
        BLOCK_ROWS=blocks["BLOCK_ROWS"], BLOCK_DIM=blocks["BLOCK_DIM"], BLOCK=block,
        **launch_options(blocks, 16, query.dtype.itemsize),
    )  # fmt: skip
    return join_splits(parts, part_lse)
