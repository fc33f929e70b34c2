"""Attention of single queries to chosen pages of the keys, as in Quest (2406.10774, §3): which pages, and over them.

A page is a block of consecutive columns, of which Quest keeps the lowest and the highest key in each channel. From
these comes an upper bound of q·k over the page; the pages with the highest bounds are read, the others are not. The
blocks in which packed keys share a scale are such pages: zero is the lowest key, zero + scale · levels the highest.
"""

import torch

from .packed_attention import packed_attention
from .packing import PackedKeys, PackedValues
from .rater_attention import has_triton


def page_scores(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Upper bounds of q·k over the keys of each page: Σ over channels of max(q · low, q · high) (§3.3, algorithm 1).

    Heads that share a KV head read the same pages, those that one of them needs most: their maximum is taken.

    Args:
        query: [batch, heads, 1, head_dim], after RoPE; head h reads kv head h // (heads // kv_heads).
        low, high: [batch, kv_heads, pages, head_dim], bounds of the keys, low <= high.

    Returns:
        [batch, kv_heads, pages] in float32, float64 for float64 queries; without the scaling of q·k.

    Raises:
        ValueError: there are several queries, or heads is no multiple of kv_heads.
    """
    _check(query, low)
    if query.is_cuda and has_triton():
        from . import page_attention_triton as kernels

        if kernels.takes_bounds(query, low, high):
            with torch.cuda.device(query.device):  # Triton launches on the current device
                return kernels.page_scores_triton(query, low, high)
    return page_scores_reference(query, low, high)


def page_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    page: int,
    tail: int,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over chosen pages, and over all columns from `tail` on.

    Args:
        query: [batch, heads, 1, head_dim], after RoPE; head h reads kv head h // (heads // kv_heads).
        keys, values: [batch, kv_heads, columns, head_dim]; may be strided views.
        pages: int64 [batch, kv_heads, chosen], different pages that end before `tail`; -1: none.
        page: columns of a page; page p is the columns from p · page to (p + 1) · page.
        tail: first column that is read in any case.
        scaling: of q·k.
        mask: bool [batch, 1 | kv_heads, 1, columns], True where seen; None: all is seen.

    Returns:
        The output [batch, heads, 1, head_dim] and the natural log-sum-exp of the scores [batch, heads, 1], in float32,
        or float64 for float64 queries; 0 and -inf for a query that sees nothing.

    Raises:
        ValueError: there are several queries, or heads is no multiple of kv_heads.
    """
    _check(query, keys)
    if query.is_cuda and has_triton():
        from . import page_attention_triton as kernels

        if kernels.takes(query, keys, values):
            with torch.cuda.device(query.device):
                return kernels.page_attention_triton(query, keys, values, pages, page, tail, scaling, mask)
    return page_attention_reference(query, keys, values, pages, page, tail, scaling, mask)


def packed_page_attention(
    query: torch.Tensor,
    keys: PackedKeys,
    values: PackedValues,
    dense_keys: torch.Tensor,
    dense_values: torch.Tensor,
    pages: torch.Tensor,
    scaling: float,
    packed_mask: torch.Tensor | None = None,
    dense_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`packed_attention` of which only some of the packed columns are read: those of chosen key blocks.

    Args:
        query: [batch, heads, 1, head_dim], after RoPE; head h reads kv head h // (heads // kv_heads).
        keys, values: packed columns; page p is the columns from p · keys.group to (p + 1) · keys.group.
        dense_keys, dense_values: [batch, kv_heads, columns, head_dim], all of which are read; there may be none.
        pages: int64 [batch, kv_heads, chosen], different pages; -1: none.
        scaling: of q·k.
        packed_mask, dense_mask: bool [batch, 1 | kv_heads, 1, columns], True where seen; None: all is seen.

    Returns:
        Output and log-sum-exp, as `page_attention`.

    Raises:
        ValueError: there are several queries, or heads is no multiple of kv_heads.
    """
    _check(query, keys.codes)
    if query.is_cuda and has_triton():
        from . import packed_attention_triton as kernels

        if kernels.takes(query, keys, values):
            with torch.cuda.device(query.device):
                return kernels.packed_attention_triton(
                    query, keys, values, dense_keys, dense_values, scaling, packed_mask, dense_mask, pages
                )
    return packed_page_attention_reference(
        query, keys, values, dense_keys, dense_values, pages, scaling, packed_mask, dense_mask
    )


def page_scores_reference(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """`page_scores` in plain torch: a channel's maximum is at `high` where q is positive, and at `low` elsewhere."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query[:, :, 0].to(dtype).unflatten(1, (low.shape[1], -1))  # [batch, kv_heads, heads of the group, head_dim]
    bounds = q.clamp(min=0) @ high.to(dtype).mT + q.clamp(max=0) @ low.to(dtype).mT
    return bounds.amax(2)


def page_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    page: int,
    tail: int,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`page_attention` in plain torch: the chosen columns are copied."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query[:, :, 0].to(dtype).unflatten(1, (keys.shape[1], -1)) * scaling
    chosen_keys, chosen_values = (
        torch.cat([_chosen(x, pages, page), x[:, :, tail:]], 2).to(dtype) for x in (keys, values)
    )
    scores = q @ chosen_keys.mT  # [batch, kv_heads, heads of the group, columns read]
    seen = _seen(pages, page, None if mask is None else mask[..., :tail])
    rest = seen.new_ones(1, 1, keys.shape[2] - tail) if mask is None else mask[:, :, 0, tail:]
    seen = torch.cat([seen, rest.expand(*pages.shape[:2], -1)], 2)
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    lse = scores.logsumexp(3)
    shift = lse.masked_fill(lse == -torch.inf, 0)  # nothing is seen: exp(-inf - 0) = 0
    out = (scores - shift[..., None]).exp() @ chosen_values
    return out.flatten(1, 2).unsqueeze(2), lse.flatten(1, 2).unsqueeze(2)


def packed_page_attention_reference(
    query: torch.Tensor,
    keys: PackedKeys,
    values: PackedValues,
    dense_keys: torch.Tensor,
    dense_values: torch.Tensor,
    pages: torch.Tensor,
    scaling: float,
    packed_mask: torch.Tensor | None = None,
    dense_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`packed_page_attention` by way of `packed_attention`: the codes of the chosen pages are copied."""
    group = keys.group
    chosen_keys = PackedKeys(
        _chosen(keys.codes, pages, group), _chosen(keys.scale, pages, 1), _chosen(keys.zero, pages, 1), keys.bits, group
    )
    codes, scale, zero = (_chosen(part, pages, group) for part in values.tensors)
    chosen_values = PackedValues(codes, scale, zero, values.bits)
    seen = None
    if packed_mask is not None or (pages < 0).any():
        seen = _seen(pages, group, packed_mask)[:, :, None]
    return packed_attention(query, chosen_keys, chosen_values, dense_keys, dense_values, scaling, seen, dense_mask)


def _check(query: torch.Tensor, keys: torch.Tensor) -> None:
    if query.shape[2] != 1:
        raise ValueError(f"there are {query.shape[2]} queries; accepted: 1")
    if query.shape[1] % keys.shape[1]:
        raise ValueError(f"query has {query.shape[1]} heads, keys {keys.shape[1]}; accepted: a multiple of keys'")


def _chosen(x: torch.Tensor, pages: torch.Tensor, page: int) -> torch.Tensor:
    """Columns [batch, kv_heads, chosen · page, ...] of the pages of x [batch, kv_heads, columns, ...]; -1: any page."""
    batch, kv_heads, columns = x.shape[:3]
    paged = x[:, :, : columns // page * page].unflatten(2, (-1, page))
    row, head = (torch.arange(size, device=x.device) for size in (batch, kv_heads))
    return paged[row[:, None, None], head[:, None], pages.clamp(min=0)].flatten(2, 3)


def _seen(pages: torch.Tensor, page: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Which of the columns of the pages are seen, bool [batch, kv_heads, chosen · page]."""
    seen = (pages >= 0).repeat_interleave(page, 2)
    if mask is None:
        return seen
    return seen & _chosen(mask[:, :, 0].expand(*pages.shape[:2], -1), pages, page)
