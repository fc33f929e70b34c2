"""KV caches on a GPU, where packed columns and Quest's pages are read by Triton kernels."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from foveate.vlm.cache import KVCache

from .test_cache import animal, dynamic, generate, three

pytestmark = pytest.mark.gpu

KVS = (
    "int8:group=16,residual=16",
    "int4:group=16,residual=16",
    "int2:group=16,residual=16",
    "snapkv:keep=0.5,window=4+int8:group=16,residual=0",
    "h2o:keep=0.5",
    "streaming:sink=2,window=16+int8:group=16,residual=0",
    "quest:keep=0.5,first=0+paged:page=4",
    "quest:keep=0.5,first=0+int8:group=16,residual=0",
)


def on_gpu(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: x.to("cuda", dtype if x.is_floating_point() else None) for name, x in inputs.items()}


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("name", ["llava", "internvl", "llm-qwen2"])
def test_a_gpu_gives_what_a_cpu_gives(name: str, kv: str) -> None:
    """Beams on rows of different lengths, in float32: codes may differ by one where a number is between two."""
    stock = deepcopy(animal(name).model).float()
    words = {"min_new_tokens": 5, "num_beams": 2}
    cpu_inputs = {key: x.float() if x.is_floating_point() else x for key, x in three(name).items()}
    wanted = generate(stock, cpu_inputs, KVCache(stock, kv), **words)
    model: Any = stock.cuda()
    given = generate(model, on_gpu(three(name), torch.float32), KVCache(model, kv), **words)
    first = wanted[1][0]
    assert (given[1][0].cpu() - first).norm() < 1e-3 * first.norm()  # of the prompt, which nothing changed
    same = (given[0].cpu() == wanted[0]).all()
    assert not same or (given[1].cpu() - wanted[1]).norm() < 0.05 * wanted[1].norm()


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_a_dense_cache_is_a_dynamic_cache_in_bfloat16(attention: str) -> None:
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    model: Any = deepcopy(animal("llava").model).to("cuda", torch.bfloat16)
    model.set_attn_implementation({"text_config": attention})
    inputs = on_gpu(three("llava"), torch.bfloat16)
    given, wanted = (
        generate(model, inputs, held, min_new_tokens=5) for held in (KVCache(model, "dense"), dynamic(model))
    )
    assert torch.equal(given[0], wanted[0])
    torch.testing.assert_close(given[1], wanted[1], rtol=0.02, atol=0.02)
