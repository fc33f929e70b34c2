"""Attention over packed segments with its log-sum-exp, forward and backward: a block of ring attention.

A ring (Ring Attention, 2310.01889) sees the keys block after block, so it has to merge outputs by their log-sum-exp and
to call a block's backward with the output and the log-sum-exp over all blocks. That is right as it stands: the
probabilities are exp(score - lse), and Σ_j dP_ij · P_ij = dO_i · O_i is of the whole row (FlashAttention-2, 2307.08691,
§3.1.2). Autograd offers neither, hence the explicit backward.

On CUDA the kernels are torch's own FlashAttention, through the ATen operators below `torch.nn.attention.varlen`: those
take `scale` and few KV heads alike in torch 2.10 to 2.13, where the arguments of that module's own operators differ,
and are what `activate_flash_attention_impl("FA3")` replaces. The flash-attn package has the same FlashAttention-2
kernels and serves where torch was built without them. On a CPU it is the operator below `scaled_dot_product_attention`,
which takes float64 too. What none of them takes is left to the reference.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import torch

SCORES_AT_ONCE = 1 << 24  # bounds the reference's memory (64 MiB in float32)


@dataclass(frozen=True)
class Segments:
    """Where each segment of a packed axis begins and ends: segment i is bounds[i] .. bounds[i + 1].

    Attributes:
        bounds: from 0 on, never decreasing; a segment may be empty.

    Raises:
        ValueError: the bounds are not so.
    """

    bounds: tuple[int, ...]
    _tensors: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.bounds or self.bounds[0] != 0 or any(start > stop for start, stop in pairwise(self.bounds)):
            raise ValueError(f"bounds={self.bounds}; accepted: 0, then numbers that never decrease")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Where each segment begins and ends."""
        return pairwise(self.bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def longest(self) -> int:
        """The most tokens of a segment; 0 without segments."""
        return max((stop - start for start, stop in self), default=0)

    def on(self, device: torch.device | str) -> torch.Tensor:
        """The bounds, int32 [segments + 1], made once for a device."""
        device = torch.device(device)
        if device not in self._tensors:
            self._tensors[device] = torch.tensor(self.bounds, dtype=torch.int32, device=device)
        return self._tensors[device]


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of each segment's queries over the keys of the same segment.

    Args:
        query: [tokens_q, heads, head_dim]; head h reads kv head h // (heads // kv_heads).
        key, value: [tokens_k, kv_heads, head_dim]; any tensor may be a strided view.
        query_segments, key_segments: as many segments each.
        causal: the i-th query of a segment sees its keys 0 .. i; each segment has as many keys as queries then.
        scaling: of q·k.

    Returns:
        The output [tokens_q, heads, head_dim] in the query's dtype and the natural log-sum-exp of the scores
        [heads, tokens_q] in float32, or float64 for float64; 0 and -inf for queries whose segment has no keys.
        Autograd does not see this: `varlen_attention_backward` has the gradients.

    Raises:
        ValueError: the heads, the lengths or the segments do not fit each other.
    """
    _check(query, key, value, query_segments, key_segments, causal)
    arguments = (query, key, value, query_segments, key_segments, causal, scaling)
    with torch.no_grad():
        if query.device.type == "cpu":
            return _cpu_forward(*arguments)
        backend = cuda_backend(query)
        if backend == "reference":
            return reference_varlen_attention(*arguments)
        out, lse = (torch_forward if backend == "torch" else flash_attn_forward)(*arguments)
        for queries, keys in _places(query_segments, key_segments):
            if keys.start == keys.stop:  # there the kernels give +inf, or leave what was in the memory
                out[queries] = 0
                lse[:, queries] = -torch.inf
        return out, lse


def varlen_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `varlen_attention`, or these keys' share of them where the queries saw other keys too.

    Args:
        grad_out: [tokens_q, heads, head_dim], the gradient of `out`.
        query, key, value, query_segments, key_segments, causal, scaling: as in `varlen_attention`.
        out, lse: of attention over all keys that the queries saw: these, or these and more (`merge_attention`).

    Returns:
        grad_query, grad_key, grad_value, of the shapes and dtypes of query, key and value; 0 where nothing was seen.

    Raises:
        ValueError: as in `varlen_attention`.
    """
    _check(query, key, value, query_segments, key_segments, causal)
    arguments = (grad_out, query, key, value, out, lse, query_segments, key_segments, causal, scaling)
    with torch.no_grad():
        if query.device.type == "cpu":
            return _cpu_backward(*arguments)
        backend = cuda_backend(query)
        if backend == "reference":
            return reference_varlen_attention_backward(*arguments)
        grads = (torch_backward if backend == "torch" else flash_attn_backward)(*arguments)
        for queries, keys in _places(query_segments, key_segments):
            if keys.start == keys.stop or queries.start == queries.stop:  # the kernels skip these
                grads[0][queries] = 0
                grads[1][keys] = 0
                grads[2][keys] = 0
        return grads


def cuda_backend(query: torch.Tensor) -> str:
    """What computes on CUDA for such queries: "torch" or "flash_attn", the same kernels, or "reference"."""
    head_dim = query.shape[2]
    if query.dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        return "reference"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "reference"
    if torch.backends.cuda.is_flash_attention_available():
        return "torch"
    return "flash_attn" if _has_flash_attn() else "reference"


def torch_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`varlen_attention` by torch's FlashAttention kernels; queries without keys have no defined result."""
    query, key, value = _last_dim_contiguous(query, key, value)
    bounds = query_segments.on(query.device), key_segments.on(query.device)
    longest = query_segments.longest, key_segments.longest
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *bounds, *longest, 0.0, causal, False, scale=scaling
    )
    return out, lse


def torch_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients by torch's FlashAttention kernels; segments without queries or keys have no defined ones."""
    tensors = (*_last_dim_contiguous(grad_out, query, key, value, out), lse.contiguous())
    bounds = query_segments.on(query.device), key_segments.on(query.device)
    longest = query_segments.longest, key_segments.longest
    rng_state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of a dropout that there is not
    unused = torch.empty(0, device=query.device)
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
        *tensors, *bounds, *longest, 0.0, causal, rng_state, unused, scale=scaling
    )
    return grads


def flash_attn_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch_forward` by the flash-attn package (2.7 or newer)."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(
        *_last_dim_contiguous(query, key, value),
        query_segments.on(query.device),
        key_segments.on(query.device),
        query_segments.longest,
        key_segments.longest,
        dropout_p=0.0,
        softmax_scale=scaling,
        causal=causal,
    )
    return out, lse


def flash_attn_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`torch_backward` by the flash-attn package (2.7 or newer)."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    states = _last_dim_contiguous(query, key, value)
    grads = torch.empty_like(states[0]), torch.empty_like(states[1]), torch.empty_like(states[2])
    _flash_attn_varlen_backward(
        *_last_dim_contiguous(grad_out),
        *states,
        *_last_dim_contiguous(out),
        lse.contiguous(),
        *grads,
        query_segments.on(query.device),
        key_segments.on(query.device),
        query_segments.longest,
        key_segments.longest,
        dropout_p=0.0,
        softmax_scale=scaling,
        causal=causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
    )
    return grads


def reference_varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`varlen_attention` in plain torch, for any dtype, head_dim and device."""
    out, lse = _nothing_seen(query)
    for queries, keys, seen in _blocks(query, query_segments, key_segments, causal):
        scores, _ = _scores(query[queries], key[keys], seen, scaling)
        block_lse = scores.logsumexp(-1)
        p = (scores - block_lse[..., None]).exp()
        block_out = torch.einsum("kgqs,skd->qkgd", p, value[keys].to(p.dtype))
        out[queries] = block_out.reshape(query[queries].shape).to(query.dtype)
        lse[:, queries] = block_lse.flatten(0, 1)
    return out, lse


def reference_varlen_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`varlen_attention_backward` in plain torch, by FlashAttention-2's formulas (2307.08691, §2.3.2 and §3.1.2)."""
    dtype = lse.dtype
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value)]
    for queries, keys, seen in _blocks(query, query_segments, key_segments, causal):
        scores, q = _scores(query[queries], key[keys], seen, scaling)
        k, v = key[keys].to(dtype), value[keys].to(dtype)
        grouped = (*q.shape[:3], -1)  # [queries, kv_heads, heads of a group, head_dim]
        dout = grad_out[queries].to(dtype).reshape(grouped)
        delta = (dout * out[queries].to(dtype).reshape(grouped)).sum(-1)  # [queries, kv_heads, group]
        p = (scores - lse[:, queries].reshape(scores.shape[:3])[..., None]).exp()
        dscores = p * (torch.einsum("qkgd,skd->kgqs", dout, v) - delta.permute(1, 2, 0)[..., None]) * scaling
        grads[0][queries] += torch.einsum("kgqs,skd->qkgd", dscores, k).reshape(query[queries].shape)
        grads[1][keys] += torch.einsum("kgqs,qkgd->skd", dscores, q)
        grads[2][keys] += torch.einsum("kgqs,qkgd->skd", p, dout)
    grad_query, grad_key, grad_value = (grad.to(x.dtype) for grad, x in zip(grads, (query, key, value), strict=True))
    return grad_query, grad_key, grad_value


def _cpu_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = _last_dim_contiguous(query, key, value)
    out, lse = _nothing_seen(query)
    for queries, keys in _places(query_segments, key_segments):
        if queries.start < queries.stop and keys.start < keys.stop:
            block_out, block_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _batched(query[queries]), _batched(key[keys]), _batched(value[keys]), 0.0, causal, scale=scaling
            )
            out[queries] = block_out[0].transpose(0, 1)
            lse[:, queries] = block_lse[0]
    return out, lse


def _cpu_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_out, query, key, value, out = _last_dim_contiguous(grad_out, query, key, value, out)
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for queries, keys in _places(query_segments, key_segments):
        if queries.start < queries.stop and keys.start < keys.stop:
            block = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _batched(grad_out[queries]),
                _batched(query[queries]),
                _batched(key[keys]),
                _batched(value[keys]),
                _batched(out[queries]),
                lse[None, :, queries],
                0.0,
                causal,
                scale=scaling,
            )
            for grad, place, part in zip(grads, (queries, keys, keys), block, strict=True):
                grad[place] = part[0].transpose(0, 1)
    return grads


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_segments: Segments,
    key_segments: Segments,
    causal: bool,
) -> None:
    if key.shape != value.shape or query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}; accepted: key and value "
            "alike, the query with their head_dim and a multiple of their heads"
        )
    for name, x, segments in (("query", query, query_segments), ("key", key, key_segments)):
        if segments.bounds[-1] != x.shape[0]:
            raise ValueError(f"{name}_segments end at {segments.bounds[-1]}; accepted: its {x.shape[0]} tokens")
    if len(query_segments) != len(key_segments):
        raise ValueError(f"{len(query_segments)} query_segments, {len(key_segments)} key_segments; accepted: as many")
    if causal and query_segments.bounds != key_segments.bounds:
        raise ValueError(
            f"causal=True with query_segments {query_segments.bounds}, key_segments {key_segments.bounds}; accepted: "
            "the same lengths"
        )


def _nothing_seen(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and log-sum-exp where no key is seen, to be filled in."""
    tokens, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    lse = torch.full((heads, tokens), -torch.inf, dtype=dtype, device=query.device)
    return torch.zeros(query.shape, dtype=query.dtype, device=query.device), lse


def _places(query_segments: Segments, key_segments: Segments) -> Iterator[tuple[slice, slice]]:
    """The queries and the keys of each segment."""
    for queries, keys in zip(query_segments, key_segments, strict=True):
        yield slice(*queries), slice(*keys)


def _blocks(
    query: torch.Tensor, query_segments: Segments, key_segments: Segments, causal: bool
) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
    """Queries, at most SCORES_AT_ONCE scores of them, the keys of their segment, and what each sees [queries, keys]."""
    for queries, keys in _places(query_segments, key_segments):
        columns = keys.stop - keys.start
        if columns == 0:
            continue
        step = max(1, SCORES_AT_ONCE // (query.shape[1] * columns))
        for start in range(queries.start, queries.stop, step):
            block = slice(start, min(start + step, queries.stop))
            rows = torch.arange(block.start - queries.start, block.stop - queries.start, device=query.device)
            seen = rows[:, None] >= torch.arange(columns, device=query.device) if causal else None
            yield block, keys, seen


def _scores(
    query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[kv_heads, heads of a group, queries, keys], and the query [queries, kv_heads, heads of a group, head_dim]."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).reshape(query.shape[0], key.shape[1], -1, query.shape[2])
    scores = torch.einsum("qkgd,skd->kgqs", q, key.to(dtype)) * scaling
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf), q


def _batched(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_dim] as [1, heads, tokens, head_dim]."""
    return x.transpose(0, 1)[None]


def _last_dim_contiguous(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


@cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None
