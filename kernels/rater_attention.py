"""Attention rows of a few raters, averaged over heads or raters: the S × S matrix is never made."""

from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

SCORES_AT_ONCE = 1 << 22  # bounds the memory: logits that the reference holds at a time (16 MiB in float32)
KEYS_AT_ONCE = 1 << 24  # likewise numbers of the keys, widened (64 MiB in float32)
FEW_RATERS = 4  # for which kernels gain nothing, and would have to be compiled first


def rater_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    last: torch.Tensor,
    columns: torch.Tensor,
    scaling: float,
    over: Literal["heads", "raters"],
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of raters over all keys that each of them sees, some of its columns, averaged.

    On CUDA the Triton kernels run for more than a few raters, where Triton is installed and they take the inputs;
    otherwise the reference does.

    Args:
        q: [heads, raters, head_dim], queries after RoPE.
        k: [kv_heads, keys, head_dim], keys after RoPE; head h reads kv head h // (heads // kv_heads).
        last: [raters] int64, the last key that each rater sees.
        columns: [visual] int64, the keys whose probabilities are asked for; 0 where a rater does not see the key.
        scaling: of q·k.
        over: what is averaged: `heads` or `raters`.
        weights: [raters, visual], factors of the probabilities, where raters are averaged.

    Returns:
        [raters, visual] mean over heads, or [heads, visual] mean over raters; float32, float64 for float64 inputs.

    Raises:
        ValueError: if heads is no multiple of kv_heads, or weights are given where heads are averaged.
    """
    if q.shape[0] % k.shape[0]:
        raise ValueError(f"q has {q.shape[0]} heads, k {k.shape[0]}; accepted: a multiple of k's")
    if over == "heads" and weights is not None:
        raise ValueError("weights are for over='raters'")
    if q.is_cuda and q.shape[1] > FEW_RATERS and has_triton():
        from . import rater_attention_triton as kernels

        if kernels.takes(q):
            with torch.cuda.device(q.device):  # Triton launches on the current device
                return kernels.rater_attention_triton(q, k, last, columns, scaling, over, weights)
    return rater_attention_reference(q, k, last, columns, scaling, over, weights)


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def rater_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    last: torch.Tensor,
    columns: torch.Tensor,
    scaling: float,
    over: Literal["heads", "raters"],
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rater_attention` in plain torch, in blocks of kv heads and raters; one rater is a single matmul."""
    (heads, raters, _), (kv_heads, keys, _) = q.shape, k.shape
    group = heads // kv_heads
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.unflatten(0, (kv_heads, group))  # [kv_heads, group, raters, head_dim]
    raters_at_once = min(raters, max(1, SCORES_AT_ONCE // (group * keys)))
    kv_heads_at_once = max(1, min(SCORES_AT_ONCE // (group * keys * raters_at_once), KEYS_AT_ONCE // k[0].numel()))
    key = torch.arange(keys, device=k.device)
    out = torch.zeros(raters if over == "heads" else heads, len(columns), dtype=dtype, device=q.device)
    for kv_start in range(0, kv_heads, kv_heads_at_once):
        kv = slice(kv_start, kv_start + kv_heads_at_once)
        k_block = k[kv].to(dtype).mT  # [kv_heads, head_dim, keys]
        for start in range(0, raters, raters_at_once):
            rows = slice(start, start + raters_at_once)
            q_block = grouped[kv, :, rows].to(dtype) * scaling
            scores = (q_block.flatten(1, 2) @ k_block).unflatten(1, q_block.shape[1:3])
            scores.masked_fill_(key > last[rows, None], float("-inf"))  # [kv_heads, group, raters, keys]
            probabilities = scores.softmax(-1)[..., columns]  # [kv_heads, group, raters, visual]
            if over == "heads":
                out[rows] += probabilities.sum((0, 1)) / heads
            else:
                if weights is not None:
                    probabilities *= weights[rows].to(dtype)
                out[kv_start * group : (kv_start + len(k_block)) * group] += probabilities.sum(2).flatten(0, 1) / raters
    return out
