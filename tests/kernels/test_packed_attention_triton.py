import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.kernels.packed_attention import packed_attention_reference
from foveate.kernels.packing import PackedKeys, PackedValues, pack_keys, pack_values

kernels = pytest.importorskip("foveate.kernels.packed_attention_triton")
packed_attention_triton = kernels.packed_attention_triton

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is on without a CUDA device")


@pytest.fixture(autouse=True)
def several_splits_of_few_tokens(monkeypatch, request):
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(kernels, "SPLIT_TOKENS", 32)


def numbers(packed: PackedKeys | PackedValues) -> torch.Tensor:
    """What the codes stand for in float64, decoded channel by channel."""
    bits, width = packed.bits, packed.codes.shape[3]
    channels = [packed.codes[..., c % width].int() >> bits * (c // width) & 2**bits - 1 for c in range(packed.head_dim)]
    scale, zero = packed.scale.double(), packed.zero.double()
    if isinstance(packed, PackedKeys):
        scale, zero = (x.repeat_interleave(packed.group, 2) for x in (scale, zero))
    else:
        scale, zero = scale[..., None], zero[..., None]
    return torch.stack(channels, -1) * scale + zero


def brute_force(query, keys, values, dense_keys, dense_values, scaling, packed_mask=None, dense_mask=None):
    """In float64, one row after the other, over the columns that it sees."""
    batch, heads, queries, _ = query.shape
    k = torch.cat([numbers(keys), dense_keys.double()], 2)
    v = torch.cat([numbers(values), dense_values.double()], 2)
    everything = torch.ones(batch, k.shape[1], queries, 1, dtype=torch.bool)
    parts = zip((packed_mask, dense_mask), (keys.tokens, dense_keys.shape[2]), strict=True)
    mask = [
        everything.expand(-1, -1, -1, n) if m is None else m.expand(batch, k.shape[1], queries, n) for m, n in parts
    ]
    seen = torch.cat(mask, 3)
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, queries))).tolist():
        kv = h // (heads // k.shape[1])
        columns = seen[b, kv, i].nonzero().flatten()
        if len(columns) > 0:
            scores = k[b, kv, columns] @ query[b, h, i].double() * scaling
            lse[b, h, i] = scores.logsumexp(0)
            out[b, h, i] = scores.softmax(0) @ v[b, kv, columns]
    return out, lse


def example(shape, bits, group, dtype=torch.float32, masks=None, device="cpu"):
    """Keys with outlier channels; masks: none, one of the columns, or one for each KV head and each query."""
    batch, heads, kv_heads, queries, packed, dense, head_dim = shape
    query = torch.randn(batch, heads, queries, head_dim, device=device)
    keys, values = torch.randn(2, batch, kv_heads, packed + dense, head_dim, device=device)
    keys[..., 3] += 20
    query, keys, values = query.to(dtype), keys.to(dtype), values.to(dtype)
    tokens = slice(0, packed)
    inputs = [query, pack_keys(keys[:, :, tokens], bits[0], group), pack_values(values[:, :, tokens], bits[1])]
    inputs += [keys[:, :, packed:], values[:, :, packed:], head_dim**-0.5]
    if masks is not None:
        of_heads, of_queries = {"shared": (1, 1), "heads": (kv_heads, 1), "each": (kv_heads, queries)}[masks]
        inputs += [torch.rand(batch, of_heads, of_queries, n, device=device) > 0.4 for n in (packed, dense)]
    return inputs


def check(inputs, tolerance):
    (out, lse), (expected_out, expected_lse) = packed_attention_triton(*inputs), brute_force(*inputs)
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=tolerance)


@interpreted
@pytest.mark.parametrize(
    ("shape", "bits", "group", "masks"),  # batch, heads, kv_heads, queries, packed, dense, head_dim
    [
        ((1, 28, 4, 1, 64, 5, 128), (4, 4), 64, "heads"),
        ((2, 4, 2, 1, 96, 20, 64), (8, 4), 32, "shared"),
        ((1, 4, 2, 3, 64, 20, 80), (2, 8), 32, "each"),
        ((1, 2, 2, 1, 0, 20, 32), (4, 4), 64, None),
        ((1, 4, 1, 1, 80, 0, 96), (4, 2), 16, None),
        ((1, 2, 2, 1, 48, 3, 64), (2, 2), 48, "heads"),
    ],
)
def test_kernel_equals_brute_force(shape, bits, group, masks):
    check(example(shape, bits, group, masks=masks), 5e-6)


@interpreted
@pytest.mark.parametrize("bits", [(4, 4), (8, 2)])
def test_half_precision_queries_are_served_to_their_precision(bits):
    check(example((1, 7, 1, 1, 64, 9, 64), bits, 64, torch.float16, "heads"), 2e-3)


@interpreted
@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_splits_do_not_change_the_result(monkeypatch, programs):
    monkeypatch.setattr(kernels, "programs_at_once", lambda device: programs)
    inputs = example((1, 4, 2, 1, 96, 37, 32), (4, 4), 16, masks="heads")
    splits = kernels.split_sizes(96, 37, 4, 2, 16, torch.device("cpu"))
    assert {1: 1, 3: 5, 1000: 5}[programs] <= splits[0] + splits[2]
    check(inputs, 5e-6)


@interpreted
def test_more_splits_than_are_joined_at_a_time():
    parts, lse = torch.randn(1, 3, 2, 37, 24), 5 * torch.randn(1, 3, 2, 37)
    lse[0, 0, 0, :30] = lse[0, 1] = -torch.inf  # a query sees nothing in many splits, a head's in none
    parts[lse == -torch.inf] = 0
    out, joined = kernels.join_splits(parts, lse)
    weights = lse.double().softmax(-1).nan_to_num(0)
    torch.testing.assert_close(out.double(), (weights[..., None] * parts.double()).sum(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(joined.double(), lse.double().logsumexp(-1), rtol=0, atol=1e-6)


@interpreted
def test_a_query_that_sees_nothing_gives_zero_and_minus_infinity():
    inputs = example((1, 4, 2, 1, 64, 5, 32), (4, 4), 32, masks="heads")
    inputs[6][:, 1] = inputs[7][:, 1] = False
    out, lse = packed_attention_triton(*inputs)
    assert (out[:, 2:] == 0).all() and (lse[:, 2:] == -torch.inf).all()
    check(inputs, 5e-6)
    inputs = example((1, 4, 2, 1, 0, 0, 32), (4, 4), 32)
    out, lse = packed_attention_triton(*inputs)
    assert (out == 0).all() and (lse == -torch.inf).all()


@interpreted
@pytest.mark.parametrize("spare", [8, 1])  # bytes between the rows; after an odd number no 16-bit word begins there
def test_kernel_reads_views_of_larger_buffers(spare):
    query, keys, values, *dense, scaling = example((2, 4, 2, 1, 64, 20, 32), (4, 2), 32)

    def inside(x):
        buffer = torch.full([*x.shape[:2], x.shape[2] + 3, *(n + spare for n in x.shape[3:])], 77, dtype=x.dtype)
        view = buffer[:, :, 2 : 2 + x.shape[2], ...]
        view = view[..., : x.shape[3]] if x.dim() == 4 else view
        view.copy_(x)
        return view

    views = [PackedKeys(*map(inside, keys.tensors), 4, 32), PackedValues(*map(inside, values.tensors), 2)]
    check([query, *views, *map(inside, dense), scaling], 5e-6)


def test_what_no_kernel_serves_is_refused():
    query, keys, values, *_ = example((1, 4, 2, 1, 32, 5, 32), (4, 4), 32)
    assert kernels.takes(query, keys, values)
    assert not kernels.takes(query.double(), keys, values)
    assert not kernels.takes(torch.randn(1, 4, 40, 32), keys, values)  # 80 rows
    assert not kernels.takes(query, pack_keys(torch.randn(1, 2, 32, 32), 1.58, 32), values)
    assert not kernels.takes(query, pack_keys(torch.randn(1, 2, 32, 32), 4, 8), values)
    assert not kernels.takes(query, values, values)


@pytest.mark.parametrize("pairs", [1, 4, 32, 300, 2000])
@pytest.mark.parametrize(("packed", "dense"), [(0, 100), (1024, 0), (32_768, 200), (500_032, 4096)])
def test_splits_fill_an_h100_and_leave_no_column_out(monkeypatch, pairs, packed, dense):
    monkeypatch.setattr(kernels, "programs_at_once", lambda device: 4 * 132)
    monkeypatch.setattr(kernels, "SPLIT_TOKENS", 256)
    packed_splits, packed_each, dense_splits, dense_each = kernels.split_sizes(
        packed, dense, 4, pairs, 64, torch.device("cpu")
    )
    assert packed_each % 64 == dense_each % 64 == 0
    assert packed_each * (packed_splits - 1) < packed <= packed_each * packed_splits or packed == packed_splits == 0
    assert dense_each * (dense_splits - 1) < dense <= dense_each * dense_splits or dense == dense_splits == 0
    if packed >= 32_768 and pairs in (4, 32):
        assert 0.7 * 528 <= pairs * (packed_splits + dense_splits) <= 1.1 * 528


@pytest.fixture(scope="module")
def compiled():
    """What every kernel of packed columns and pages needs on an H100."""
    script = Path(__file__).with_name("compile_sm90.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), "packed_attention", "page_attention", "packing"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_kernels_compile_for_an_h100_and_as_many_programs_fit_as_are_started(compiled):
    assert len(compiled) == 9
    for kernel in compiled:
        assert kernel["spill_bytes"] <= 32, kernel  # Triton 3.6 spills 16 bytes where 3.9 spills none
        assert kernel["shared_bytes"] <= 227 * 1024 // kernels.PROGRAMS_PER_SM, kernel
        assert kernel["tensor_cores"] == ("attention" in kernel["kernel"] or "scores" in kernel["kernel"]), kernel
        if kernel["kernel"] == "packed_attention_kernel" and kernel["bits"] <= 4:
            assert kernel["registers"] * 32 * kernel["warps"] * kernels.PROGRAMS_PER_SM <= 65_536, kernel


def test_assembly_makes_numbers_of_the_digits_of_all_bytes(compiled):
    words = np.arange(1 << 16, dtype=np.uint32) * 0x10001 ^ 0xA5C30000  # two 16-bit words in a register
    for kernel in compiled:
        if kernel["kernel"] != "packed_attention_kernel":
            continue
        bits, expected = kernel["bits"], {}
        for digit in range(16 // bits):
            expected[digit] = words.view(np.uint16).reshape(-1, 2) >> digit * bits & 2**bits - 1
        assert len(kernel["digits"]) == len(expected)
        for shift, mask, exponent, table in kernel["digits"]:
            assert table == 0xF0 & 0xCC | 0xAA  # (shifted and mask) or exponent
            number = (words >> shift & mask | exponent).view(np.float16).reshape(-1, 2)
            position = 25 - (exponent & 0xFFFF) // 1024
            number = number - np.float16(2.0 ** (10 - position))
            assert (number == expected.pop((shift + position) // bits)).all()
        assert not expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "bits", "group", "masks"),
    [
        ((2, 28, 4, 1, 32_768, 190, 128), (4, 4), 64, None),
        ((2, 28, 4, 1, 32_768, 190, 128), (2, 2), 64, "heads"),
        ((1, 14, 2, 1, 8_192, 70, 64), (8, 8), 32, "shared"),
        ((1, 14, 2, 1, 8_192, 70, 64), (2, 2), 128, None),
        ((3, 8, 4, 4, 4_096, 33, 256), (4, 8), 64, "each"),
        ((1, 8, 8, 1, 2_048, 0, 80), (4, 2), 32, "shared"),
        ((1, 8, 8, 1, 2_048, 31, 96), (8, 4), 16, "heads"),
    ],
)
def test_kernel_equals_the_reference_on_cuda(shape, bits, group, masks, dtype):
    inputs = example(shape, bits, group, dtype, masks, "cuda")
    assert kernels.takes(*inputs[:3])
    out, lse = packed_attention_triton(*inputs)
    wide = [inputs[0].double(), *inputs[1:3], *(x.double() for x in inputs[3:5]), *inputs[5:]]
    expected_out, expected_lse = packed_attention_reference(*wide)
    tolerance = {torch.bfloat16: 5e-3, torch.float16: 2e-3, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=2 * tolerance)
