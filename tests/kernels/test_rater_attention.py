import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foveate.kernels import rater_attention as module
from foveate.kernels.rater_attention import rater_attention, rater_attention_reference

AVERAGES = [("heads", False), ("raters", False), ("raters", True)]


def brute_force(q, k, last, columns, scaling, over, weights=None):
    """In float64, one head and rater after the other."""
    heads, raters, group = q.shape[0], q.shape[1], q.shape[0] // k.shape[0]
    probabilities = torch.zeros(heads, raters, len(columns), dtype=torch.float64)
    for head in range(heads):
        for rater in range(raters):
            seen = k[head // group, : last[rater] + 1].double() @ q[head, rater].double() * scaling
            row = torch.zeros(k.shape[1], dtype=torch.float64)
            row[: len(seen)] = (seen - seen.max()).exp() / (seen - seen.max()).exp().sum()
            probabilities[head, rater] = row[columns]
    if over == "heads":
        return probabilities.mean(0)
    return (probabilities if weights is None else probabilities * weights.double()).mean(1)


def example(heads, kv_heads, raters, keys, head_dim, dtype=torch.float32):
    """Raters that see different numbers of keys; columns with gaps, some after what some raters see."""
    q, k = torch.randn(heads, raters, head_dim), torch.randn(kv_heads, keys, head_dim)
    last = torch.randint(keys // 3, keys, (raters,))
    columns = torch.randperm(keys)[: keys // 2].sort().values
    return q.to(dtype), k.to(dtype), last, columns, 1.5 * head_dim**-0.5, torch.rand(raters, len(columns))


@pytest.mark.parametrize(("over", "weighted"), AVERAGES)
@pytest.mark.parametrize("scores_at_once", [1, 300, 1 << 22])  # one head and rater at a time, some, all
@pytest.mark.parametrize("keys_at_once", [1, 1 << 24])
def test_reference_equals_brute_force(monkeypatch, scores_at_once, keys_at_once, over, weighted):
    monkeypatch.setattr(module, "SCORES_AT_ONCE", scores_at_once)
    monkeypatch.setattr(module, "KEYS_AT_ONCE", keys_at_once)
    for shape in [(6, 2, 5, 23, 8), (4, 4, 1, 17, 16), (2, 1, 9, 11, 4)]:
        *inputs, weights = example(*shape)
        weights = weights if weighted else None
        got = rater_attention(*inputs, over, weights)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), brute_force(*inputs, over, weights), rtol=0, atol=2e-7)


def test_float64_stays_float64_and_bfloat16_is_computed_in_float32():
    q, k, last, columns, scaling, _ = example(6, 2, 5, 23, 8, torch.float64)
    expected = brute_force(q, k, last, columns, scaling, "heads")
    torch.testing.assert_close(rater_attention(q, k, last, columns, scaling, "heads"), expected, rtol=0, atol=1e-15)
    q, k = q.bfloat16(), k.bfloat16()
    expected = brute_force(q, k, last, columns, scaling, "heads")
    got = rater_attention(q, k, last, columns, scaling, "heads")
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-7)


def test_memory_stays_bounded_with_many_raters(monkeypatch):
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 1 << 15)
    heads, raters, keys = 8, 64, 512
    q, k = torch.randn(heads, raters, 8), torch.randn(2, keys, 8)
    last, columns = torch.full((raters,), keys - 1), torch.arange(100)
    for over in ("heads", "raters"):
        with torch.profiler.profile(profile_memory=True) as profile:
            rater_attention(q, k, last, columns, 1.0, over)
        assert max(event.self_cpu_memory_usage for event in profile.events()) <= 4 << 15 < 4 * heads * raters * keys


def test_memory_stays_bounded_with_many_keys(monkeypatch):
    monkeypatch.setattr(module, "KEYS_AT_ONCE", 2 * 512 * 16)  # two heads' of eight
    q, k = torch.randn(8, 1, 16).bfloat16(), torch.randn(8, 512, 16).bfloat16()
    with torch.profiler.profile(profile_memory=True) as profile:
        rater_attention(q, k, torch.tensor([511]), torch.arange(100), 1.0, "heads")
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= 4 * 2 * 512 * 16


def test_wrong_arguments_are_refused():
    q, k, last, columns, scaling, weights = example(6, 2, 5, 23, 8)
    with pytest.raises(ValueError, match="q has 5 heads, k 2"):
        rater_attention(q[:5], k, last, columns, scaling, "heads")
    with pytest.raises(ValueError, match="weights"):
        rater_attention(q, k, last, columns, scaling, "heads", weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is on where there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",  # heads, kv_heads, raters, keys, head_dim
    [(28, 4, 5, 77, 80), (6, 3, 1, 200, 16), (4, 4, 17, 33, 8), (2, 1, 70, 129, 96), (2, 2, 3, 64, 128)],
)
def test_kernels_equal_brute_force(shape, dtype):
    kernels = pytest.importorskip("foveate.kernels.rater_attention_triton")
    *inputs, weights = example(*shape, dtype)
    for over, weighted in AVERAGES:
        got = kernels.rater_attention_triton(*inputs, over, weights if weighted else None)
        expected = brute_force(*inputs, over, weights if weighted else None)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is on where there is no CUDA device")
def test_kernels_take_slices_of_a_larger_cache():
    kernels = pytest.importorskip("foveate.kernels.rater_attention_triton")
    *inputs, _ = example(4, 2, 3, 40, 16)
    q, k = inputs[0].transpose(0, 1).contiguous().transpose(0, 1), torch.randn(2, 60, 32)[:, 5:45, ::2]
    got = kernels.rater_attention_triton(q, k, *inputs[2:], "heads")
    torch.testing.assert_close(got.double(), brute_force(q, k, *inputs[2:], "heads"), rtol=0, atol=1e-6)


def test_kernels_compile_for_an_h100_without_spills():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compile_sm90.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout)
    assert len(kernels) == 6
    for kernel in kernels:
        assert kernel["tensor_cores"], kernel
        assert kernel["spill_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= 227 * 1024, kernel


@pytest.mark.gpu
@pytest.mark.parametrize(("over", "weighted"), AVERAGES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(28, 4, 128), (14, 2, 64), (8, 8, 80)])
def test_kernels_equal_the_reference_on_cuda(over, weighted, heads, kv_heads, head_dim):
    raters, keys = 60, 30_000
    q = torch.randn(heads, raters, head_dim, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(kv_heads, keys + raters, head_dim, device="cuda", dtype=torch.bfloat16)
    last = torch.arange(keys, keys + raters, device="cuda")
    columns = torch.arange(35, keys - 5, device="cuda")
    weights = torch.rand(raters, len(columns), device="cuda") if weighted else None
    got = rater_attention(q, k, last, columns, head_dim**-0.5, over, weights)
    expected = rater_attention_reference(
        q.double(), k.double(), last, columns, head_dim**-0.5, over, None if weights is None else weights.double()
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-9)
