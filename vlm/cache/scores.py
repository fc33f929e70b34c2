"""How much the columns of a KV cache layer are looked at: sums of attention rows, never the whole matrix."""

import torch

from .base import Seen

SCORES_AT_ONCE = 1 << 24  # bounds the memory: logits that are held at a time (64 MiB in float32)
COLUMNS_AT_ONCE = 1 << 12  # likewise columns that are dequantised at a time


def received_attention(seen: Seen, queries: int | None = None) -> torch.Tensor:
    """What each column receives: softmax attention from a pass's queries, summed; the mean over a KV head's group.

    Args:
        queries: how many look, the pass's last ones; None: all. Those at holes don't.

    Returns:
        [batch, kv_heads, columns], 0 at holes; float32, float64 for float64 queries.
    """
    store, columns, rows = seen.store, seen.store.columns, seen.query.shape[2]
    rows = rows if queries is None else min(queries, rows)
    dtype = torch.promote_types(seen.query.dtype, torch.float32)
    kv_heads = store.dense(columns - 1)[0].shape[1]
    query = (seen.query[:, :, -rows:].to(dtype) * seen.scaling).unflatten(1, (kv_heads, -1))
    batch, _, group, _, _ = query.shape
    live = seen.slots >= 0
    order = torch.arange(columns, device=query.device)
    received = query.new_zeros(batch, kv_heads, columns)
    step = max(1, SCORES_AT_ONCE // (batch * kv_heads * group * columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        end = columns - rows + stop  # later columns are those of later queries
        own = order[end - (stop - start) : end]
        some = query[:, :, :, start:stop].flatten(2, 3)  # [batch, kv_heads, group · queries, head_dim]
        blocks = [
            some @ store.dense(first, min(first + COLUMNS_AT_ONCE, end))[0].to(dtype).mT
            for first in range(0, end, COLUMNS_AT_ONCE)
        ]
        logits = torch.cat(blocks, dim=3) if len(blocks) > 1 else blocks[0]
        hidden = ~live[:, :, None, None, :end] | (order[:end] > own[:, None])
        logits.unflatten(2, (group, -1)).masked_fill_(hidden, torch.finfo(dtype).min)
        looks = live[:, :, None, own].to(dtype).repeat(1, 1, 1, group)  # [batch, 1 | kv_heads, 1, group · queries]
        received[:, :, :end] += (looks @ logits.softmax(-1))[:, :, 0]
    return received / group
