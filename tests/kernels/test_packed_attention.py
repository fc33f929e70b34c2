import math
import os
import shutil

import pytest
import torch

from foveate.kernels import packed_attention as module
from foveate.kernels import packed_attention_cpu as cpu_kernels
from foveate.kernels.packed_attention import merge_attention, packed_attention, packed_attention_reference
from foveate.kernels.packing import pack_keys, pack_values, unpack_keys, unpack_values
from foveate.train.bench import peak_memory

BITS = [(8, 8), (4, 4), (2, 2), (1, 1), (8, 2), (2, 4), (1.58, 1.58)]
WAYS = {"dispatched": packed_attention, "reference": packed_attention_reference}


def brute_force(query, keys, values, scaling, mask=None):
    """One head, one query after the other, in float64; keys and values [batch, kv_heads, columns, head_dim]."""
    batch, heads, queries, _ = query.shape
    group = heads // keys.shape[1]
    out, lse = torch.zeros(query.shape, dtype=torch.float64), torch.full(query.shape[:3], -math.inf).double()
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                seen = torch.arange(keys.shape[2])
                if mask is not None:
                    seen = mask[b, h // group % mask.shape[1], i % mask.shape[2]].nonzero()[:, 0]
                scores = keys[b, h // group, seen].double() @ query[b, h, i].double() * scaling
                if len(seen):
                    lse[b, h, i] = scores.logsumexp(0)
                    out[b, h, i] = (scores - lse[b, h, i]).exp() @ values[b, h // group, seen].double()
    return out, lse


def example(heads=6, kv_heads=2, queries=1, packed=96, dense=11, head_dim=24, group=16, bits=(4, 4)):
    """Queries, packed and dense columns, scaling, and what all columns are dequantised."""
    keys, values = torch.randn(2, 2, kv_heads, packed, head_dim) * torch.rand(head_dim) * 3 + 1
    packs = pack_keys(keys, bits[0], group), pack_values(values, bits[1])
    tail = torch.randn(2, 2, kv_heads, dense, head_dim)
    whole = [torch.cat([unpack(part, torch.float64), rest.double()], 2)
             for unpack, part, rest in zip((unpack_keys, unpack_values), packs, tail, strict=True)]  # fmt: skip
    return (torch.randn(2, heads, queries, head_dim), *packs, *tail, 0.3), whole


def close(got, expected, atol=1e-5):
    for part, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(part.double(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", BITS)
def test_equals_float64_attention_over_dequantised_columns(way, bits):
    inputs, whole = example(bits=bits)
    got = WAYS[way](*inputs)
    assert got[0].dtype == got[1].dtype == torch.float32
    close(got, brute_force(inputs[0], *whole, 0.3))


@pytest.mark.parametrize("threads", [1, 2])
def test_few_queries_on_a_cpu_run_in_compiled_code(monkeypatch, same_threads, threads):
    """Whatever else passes here would pass in torch alone."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
    inputs, whole = example(head_dim=64, packed=200, group=20)  # vectors are full; tiles of tokens are not
    torch.set_num_threads(threads)
    monkeypatch.setattr(cpu_kernels, "PER_THREAD", 1)
    calls = []
    call = cpu_kernels._call
    monkeypatch.setattr(cpu_kernels, "_call", lambda name, *rest: (calls.append(name), call(name, *rest)))
    close(packed_attention(*inputs), brute_force(inputs[0], *whole, 0.3))
    assert calls == ["packed_scores", "packed_outputs"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("mask_heads", "mask_queries", "queries"), [(1, 1, 1), (2, 1, 3), (1, 3, 3), (2, 3, 3)])
def test_masks_by_head_and_query_and_queries_that_see_nothing(way, mask_heads, mask_queries, queries):
    inputs, whole = example(queries=queries)
    mask = torch.rand(2, mask_heads, mask_queries, 96 + 11) < 0.5
    mask[1, 0, 0] = False
    mask[0, 0, 0, :96] = False  # sees dense columns alone
    out, lse = WAYS[way](*inputs, *mask.split([96, 11], dim=-1))
    close((out, lse), brute_force(inputs[0], *whole, 0.3, mask))
    blind = out[1, :3, 0] if mask_heads == 2 else out[1, :, 0]
    assert (blind == 0).all() and (lse[1, 0, 0] == -math.inf).all()


@pytest.mark.parametrize("way", WAYS)
def test_without_dense_columns_or_without_packed_ones(way):
    for sizes in ({"dense": 0}, {"packed": 0}, {"heads": 2, "kv_heads": 2}):
        inputs, whole = example(**sizes)
        close(WAYS[way](*inputs), brute_force(inputs[0], *whole, 0.3))


@pytest.mark.parametrize("way", WAYS)
def test_columns_of_larger_buffers(way):
    """As stores hold them: with room after the last token, which holds anything."""
    inputs, whole = example()
    query, keys, values, *rest = inputs
    for packed in (keys, values):
        for name in ("codes", "scale", "zero"):
            part = getattr(packed, name)
            room = torch.full_like(part[:, :, :1], 77).expand(-1, -1, 9, *part.shape[3:])
            setattr(packed, name, torch.cat([part, room], 2)[:, :, : part.shape[2]])
        assert not packed.codes.is_contiguous()
    close(WAYS[way](query, keys, values, *rest), brute_force(query, *whole, 0.3))


@pytest.mark.parametrize("swapped", ["keys", "values", "both"])
def test_keys_with_a_scale_per_token_and_values_with_one_per_channel(swapped):
    (query, keys, values, *rest), whole = example()
    if swapped != "values":
        keys = pack_values(whole[0][:, :, :96].float(), 4)
        whole[0][:, :, :96] = unpack_values(keys, torch.float64)
    if swapped != "keys":
        values = pack_keys(whole[1][:, :, :96].float(), 4, 32)  # not the keys' group
        whole[1][:, :, :96] = unpack_keys(values, torch.float64)
    close(packed_attention(query, keys, values, *rest), brute_force(query, *whole, 0.3))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at_once", [1, 600])  # a block of columns is one group, or some
def test_blocks_of_columns(monkeypatch, way, at_once):
    monkeypatch.setattr(module, "SCORES_AT_ONCE", at_once)
    inputs, whole = example(queries=4)
    mask = torch.rand(2, 1, 4, 107) < 0.3
    mask[:, :, :, :40] = False  # the first blocks show nothing
    close(WAYS[way](*inputs, *mask.split([96, 11], dim=-1)), brute_force(inputs[0], *whole, 0.3, mask))


def test_float64_stays_float64_and_bfloat16_is_computed_in_float32():
    inputs, whole = example()
    close(packed_attention(inputs[0].double(), *inputs[1:]), brute_force(inputs[0], *whole, 0.3), atol=1e-13)
    query, keys, values, *dense, scaling = inputs
    query, dense = query.bfloat16(), [states.bfloat16() for states in dense]
    whole = [torch.cat([part[:, :, :96], states.double()], 2) for part, states in zip(whole, dense, strict=True)]
    got = packed_attention(query, keys, values, *dense, scaling)
    assert got[0].dtype == torch.float32
    close(got, brute_force(query, *whole, 0.3))


def test_scores_far_from_zero_overflow_nowhere():
    inputs, whole = example()
    inputs = (inputs[0] * 1000, *inputs[1:])
    out, lse = packed_attention(*inputs)
    expected = brute_force(inputs[0], *whole, 0.3)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), expected[0], rtol=0, atol=5e-3)  # float32 scores of thousands


@pytest.mark.parametrize("way", WAYS)
def test_no_dequantised_copy_of_the_columns_is_alive(way):
    inputs, _ = example(heads=2, packed=16384, head_dim=64, group=64)
    dense = 2 * 2 * 16384 * 64 * 4  # bytes of the keys alone in float32
    WAYS[way](*inputs)
    assert peak_memory(torch.device("cpu"), lambda: WAYS[way](*inputs)) < dense / 3


def test_without_a_compiler_it_runs_in_torch_and_says_so_once(monkeypatch):
    inputs, whole = example()
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu_kernels._library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="runs in torch, several times slower") as said:
            close(packed_attention(*inputs), brute_force(inputs[0], *whole, 0.3))
            packed_attention(*inputs)
        assert len(said) == 1
    finally:
        cpu_kernels._library.cache_clear()


def test_parts_merge_to_the_whole():
    inputs, whole = example(queries=3)
    expected = brute_force(inputs[0], *whole, 0.3)
    bounds = [(0, 40), (40, 40), (40, 41), (41, 107)]  # one of them empty
    parts = [brute_force(inputs[0], *(states[:, :, a:b] for states in whole), 0.3) for a, b in bounds]
    close(merge_attention(*zip(*parts, strict=True)), expected, atol=1e-12)
    nothing = [brute_force(inputs[0], *(states[:, :, :0] for states in whole), 0.3)] * 2
    out, lse = merge_attention(*zip(*nothing, strict=True))
    assert (out == 0).all() and (lse == -math.inf).all()


def test_heads_that_do_not_divide_are_refused():
    (query, *rest), _ = example()
    with pytest.raises(ValueError, match="query has 5 heads, keys have 2; accepted: a multiple of the keys'"):
        packed_attention(query[:, :5], *rest)
