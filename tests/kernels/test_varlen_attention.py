import itertools
import math
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.kernels import varlen_attention as module
from foveate.kernels.packed_attention import merge_attention
from foveate.kernels.varlen_attention import (
    Segments,
    reference_varlen_attention,
    reference_varlen_attention_backward,
    varlen_attention,
    varlen_attention_backward,
)

WAYS = {
    "dispatched": (varlen_attention, varlen_attention_backward),
    "reference": (reference_varlen_attention, reference_varlen_attention_backward),
}
PACKED, OTHERS, TAIL = (0, 5, 5, 18, 40), (0, 1, 9, 9, 90), (0, 0, 6, 6, 31)
CASES = [(PACKED, PACKED, True), (PACKED, PACKED, False), (PACKED, OTHERS, False), (OTHERS, PACKED, False)]
HEADS = [(8, 2), (8, 8), (4, 1)]
SCALING = 0.3


def example(queries, keys, heads=8, kv_heads=2, head_dim=24, dtype=torch.float64, device="cpu"):
    """Gradient of the output, query, key and value, no two of them laid out alike."""
    torch.manual_seed(0)
    query = torch.randn(queries[-1], heads + 3, head_dim + 2, dtype=torch.float64)[:, 1 : heads + 1, :head_dim]
    key = torch.randn(keys[-1], 2 * kv_heads, head_dim, dtype=torch.float64)[:, ::2]
    value = torch.randn(kv_heads, keys[-1], head_dim, dtype=torch.float64).transpose(0, 1)
    grad_out = torch.randn(heads, head_dim, queries[-1], dtype=torch.float64).permute(2, 0, 1)
    return [x.to(device, dtype) for x in (grad_out, query, key, value)]


def seen(queries, keys, causal):
    """Which keys each query may see, bool [tokens_q, tokens_k]."""
    mask = torch.zeros(queries[-1], keys[-1], dtype=torch.bool)
    for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True):
        for i in range(a, b):
            mask[i, c : c + i - a + 1 if causal else d] = True
    return mask


def brute_force(grad_out, query, key, value, mask):
    """Output, log-sum-exp and autograd's gradients of dense masked attention in float64."""
    inputs = [x.cpu().double().detach().requires_grad_() for x in (query, key, value)]
    query, (key, value) = inputs[0], (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in inputs[1:])
    scores = torch.einsum("qhd,khd->hqk", query, key) * SCALING
    nothing = ~mask.any(1)
    p = scores.masked_fill(~mask, -math.inf).masked_fill(nothing[:, None], 0).softmax(-1) * mask
    out = torch.einsum("hqk,khd->qhd", p, value)
    lse = scores.masked_fill(~mask, -math.inf).logsumexp(-1)
    grads = torch.autograd.grad(out, inputs, grad_out.cpu().double())
    return [x.detach() for x in (out, lse, *grads)]


def compute(way, inputs, queries, keys, causal):
    forward, backward = WAYS[way]
    grad_out, *states = inputs
    arguments = (Segments(queries), Segments(keys), causal, SCALING)
    out, lse = forward(*states, *arguments)
    return out, lse, *backward(grad_out, *states, out, lse, *arguments)


def close(got, expected, tolerance=1e-12):
    """The tolerance is a share of the largest number expected."""
    for part, wanted in zip(got, expected, strict=True):
        largest = wanted[wanted.isfinite()].abs().max().item()
        torch.testing.assert_close(part.cpu().double(), wanted, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("queries", "keys", "causal"), CASES)
def test_equals_dense_masked_attention_and_autograd(way, heads, queries, keys, causal, monkeypatch):
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 300)  # some segments are split
    inputs = example(queries, keys, *heads)
    expected = brute_force(*inputs, seen(queries, keys, causal))
    got = compute(way, inputs, queries, keys, causal)
    assert all(x.dtype == torch.float64 for x in got)
    close(got, expected)


@pytest.mark.parametrize("way", WAYS)
def test_blocks_of_keys_add_up_to_the_whole_with_the_merged_log_sum_exp(way):
    forward, backward = WAYS[way]
    grad_out, query, key, value = example(PACKED, OTHERS)
    columns = [torch.arange(start, stop) for start, stop in pairwise(OTHERS)]
    blocks = []
    for block in ([c[: len(c) // 3] for c in columns], [c[len(c) // 3 :] for c in columns]):  # 1 // 3: an empty segment
        bounds = (0, *itertools.accumulate(len(part) for part in block))
        places = torch.cat(block)
        blocks.append(
            (places, (query, key[places], value[places]), (Segments(PACKED), Segments(bounds), False, SCALING))
        )
    outs, lses = zip(*(forward(*states, *rest) for _, states, rest in blocks), strict=True)
    out, lse = merge_attention([out.transpose(0, 1) for out in outs], lses)
    out = out.transpose(0, 1)
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    for places, states, rest in blocks:
        grad_query, grad_key, grad_value = backward(grad_out, *states, out, lse, *rest)
        grads[0] += grad_query
        grads[1][places] += grad_key
        grads[2][places] += grad_value
    close((out, lse, *grads), brute_force(grad_out, query, key, value, seen(PACKED, OTHERS, causal=False)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_narrow_dtypes_keep_their_exactness(way, dtype, tolerance):
    inputs = example(PACKED, PACKED, dtype=dtype)
    got = compute(way, inputs, PACKED, PACKED, causal=True)
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype, dtype]
    close(got, brute_force(*inputs, seen(PACKED, PACKED, causal=True)), tolerance)


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "heads", "says"),
    [
        (PACKED, OTHERS, True, (8, 2), "causal=True"),
        (PACKED, (0, 40), False, (8, 2), "4 query_segments, 1 key_segments"),
        (PACKED, PACKED, False, (8, 3), "multiple of their heads"),
    ],
)
def test_what_does_not_fit_is_refused(queries, keys, causal, heads, says):
    _, *states = example(queries, keys, *heads)
    with pytest.raises(ValueError, match=says):
        varlen_attention(*states, Segments(queries), Segments(keys), causal, SCALING)


def test_segments_know_their_bounds():
    segments = Segments(PACKED)
    assert list(segments) == [(0, 5), (5, 5), (5, 18), (18, 40)]
    assert (segments.longest, len(segments)) == (22, 4)
    assert segments.on("cpu").dtype == torch.int32
    assert segments.on("cpu").tolist() == list(PACKED)
    assert segments.on("cpu") is segments.on(torch.device("cpu"))
    assert segments == Segments(PACKED)
    for bounds in ((), (1, 2), (0, 3, 2)):
        with pytest.raises(ValueError, match="bounds="):
            Segments(bounds)


class OperatorsCalled(TorchDispatchMode):
    """What each ATen operator was called with last: positional and keyword arguments by its name."""

    def __init__(self):
        super().__init__()
        self.arguments = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.arguments[func._schema.name.removeprefix("aten::")] = args, kwargs or {}
        return func(*args, **(kwargs or {}))


@pytest.fixture
def pretend_cuda(monkeypatch):
    """Tensors of a CUDA device that have shapes and no numbers; operators check their arguments on them."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode():
        yield lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("causal", [True, False])
def test_operators_of_torch_take_what_they_are_given_on_cuda(pretend_cuda, causal):
    query, grad_out = pretend_cuda(8, 40, 64).transpose(0, 1), pretend_cuda(40, 8, 64)
    key = value = pretend_cuda(40, 2, 64)
    with OperatorsCalled() as called:
        arguments = (Segments((0, 5, 18, 40)), Segments((0, 5, 18, 40)), causal, SCALING)
        out, lse = varlen_attention(query, key, value, *arguments)
        grads = varlen_attention_backward(grad_out, query, key, value, out, lse, *arguments)
    assert (out.shape, out.dtype, out.device.type) == (query.shape, torch.bfloat16, "cuda")
    assert (lse.shape, lse.dtype) == ((8, 40), torch.float32)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]
    for name in ("_flash_attention_forward", "_flash_attention_backward"):
        arguments = called.arguments[name]
        schema = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]
        given = dict(zip(schema, arguments[0], strict=False)) | arguments[1]
        assert (given["max_q"], given["max_k"], given["is_causal"], given["scale"]) == (22, 22, causal, SCALING)
        assert all(given[x].dtype == torch.int32 for x in ("cum_seq_q", "cum_seq_k"))


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 64), (torch.bfloat16, 20), (torch.bfloat16, 264)])
def test_what_the_kernels_do_not_take_is_the_references_on_cuda(pretend_cuda, dtype, head_dim):
    assert module.cuda_backend(pretend_cuda(40, 8, head_dim, dtype=dtype)) == "reference"


def test_flash_attn_serves_where_torch_has_no_kernels(pretend_cuda, monkeypatch):
    query = pretend_cuda(40, 8, 64)
    assert module.cuda_backend(query) == "torch"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    for installed, backend in ((True, "flash_attn"), (False, "reference")):
        monkeypatch.setattr(module, "_has_flash_attn", lambda installed=installed: installed)
        assert module.cuda_backend(query) == backend


def test_flash_attn_is_called_by_its_signatures(monkeypatch):
    """Those of flash-attn 2.7 and 2.8; what they are given is computed with the reference."""

    def lengths(cu_seqlens):
        assert cu_seqlens.dtype == torch.int32
        return Segments(tuple(cu_seqlens.tolist()))

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        segments = lengths(cu_seqlens_q), lengths(cu_seqlens_k)
        assert (max_seqlen_q, max_seqlen_k, dropout_p) == (segments[0].longest, segments[1].longest, 0)
        return *reference_varlen_attention(q, k, v, *segments, causal, softmax_scale), None, None

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        segments = lengths(cu_seqlens_q), lengths(cu_seqlens_k)
        assert (max_seqlen_q, max_seqlen_k) == (segments[0].longest, segments[1].longest)
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0, -1, -1, 0, None)
        grads = reference_varlen_attention_backward(dout, q, k, v, out, softmax_lse, *segments, causal, softmax_scale)
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad)
        return softmax_lse

    interface = SimpleNamespace(_flash_attn_varlen_forward=forward, _flash_attn_varlen_backward=backward)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setitem(WAYS, "flash_attn", (module.flash_attn_forward, module.flash_attn_backward))
    inputs = example(PACKED, OTHERS)
    close(
        compute("flash_attn", inputs, PACKED, OTHERS, causal=False),
        brute_force(*inputs, seen(PACKED, OTHERS, causal=False)),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "flash_attn"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("queries", "keys", "causal"), [*CASES, (PACKED, TAIL, False)])
def test_cuda_kernels_equal_the_reference(backend, heads, queries, keys, causal, monkeypatch):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    monkeypatch.setattr(module, "cuda_backend", lambda query: backend)
    inputs = example(queries, keys, *heads, head_dim=64, dtype=torch.bfloat16, device="cuda")
    got = compute("dispatched", inputs, queries, keys, causal)
    close(got, brute_force(*inputs, seen(queries, keys, causal)), 2e-2)
