"""Pruning on a GPU: where raters' attention has a Triton kernel and flash attention is at hand."""

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from foveate.train.bench_prefill import PrefillBench, bench_prefill
from foveate.vlm.pruning import reduce

from . import zoo
from .test_matrix import BATCHES, METHODS, TOLERANCE, expected, forced, generated, row

pytestmark = pytest.mark.gpu


@cache
def on_gpu(name: str) -> Any:
    return deepcopy(zoo.animal(name).model).cuda()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "foveate"])
def test_pruned_logits_equal_masked_logits_on_a_gpu(name: str, method: str, batch: str) -> None:
    animal, (rows, padding) = zoo.animal(name), BATCHES[batch]
    samples = [row(name, pieces) for pieces in rows]
    inputs = animal.batch(samples, max(sample["input_ids"].shape[1] for sample in samples) + padding)
    inputs = {field: value.cuda() for field, value in inputs.items()}
    with reduce(on_gpu(name), METHODS[method](animal.first_prunable)[0]) as model:
        logits = generated(model, inputs, [forced(pieces) for pieces in rows]).cpu()
    for got, want in zip(logits, expected(name, method, rows), strict=True):
        assert (got - want.logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_bfloat16_is_near_float64(attention: str, batch: str) -> None:
    """Kept tokens may differ where scores are close; `Random` has none."""
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    rows, padding = BATCHES[batch]
    animal, model = zoo.animal("llava"), on_gpu("llava").bfloat16()
    model.set_attn_implementation({"text_config": attention})
    samples = [row("llava", pieces) for pieces in rows]
    inputs = animal.batch(samples, max(sample["input_ids"].shape[1] for sample in samples) + padding)
    inputs = {field: value.cuda() for field, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    try:
        with reduce(model, METHODS["random"](1)[0]):
            logits = generated(model, inputs, [forced(pieces) for pieces in rows]).double().cpu()
    finally:
        on_gpu.cache_clear()
    want = torch.stack([outcome.logits for outcome in expected("llava", "random", rows)])
    assert (logits - want).norm() < 0.05 * want.norm()


def test_prefill_bench_measures_memory_and_kv_cache() -> None:
    results = {entry["name"]: entry for entry in bench_prefill(PrefillBench("tiny", (256,), rounds=1, steps=2))}
    assert results["fastv:layer=2,keep=0.5_kv"]["ratio"] == 1
    assert results["fastv:layer=2,keep=0.5_peak"]["value"] > 0
