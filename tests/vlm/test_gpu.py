"""The model on a GPU in bf16, against the CPU in fp32."""

import copy
import importlib.util
from typing import Any

import pytest
import torch

from foveate.vlm import FoveateConfig, FoveateForConditionalGeneration

pytestmark = pytest.mark.gpu

IMAGE, VIDEO, VOCABULARY = 510, 511, 512
ATTENTION = [
    "sdpa",
    pytest.param(
        "flash_attention_2",
        marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed"),
    ),
]


TOWERS = {
    "siglip_vision_model": {"image_size": 112},
    "siglip2_vision_model": {"num_patches": 64, "vision_use_head": False},
}
TILINGS = {
    "s2": {"tiling": "s2", "s2_scales": [112, 224]},
    "dynamic-s2": {"tiling": "dynamic-s2", "s2_scales": [112, 224], "projector": "downsample-3x3"},
    "tiles": {"tiling": "tiles", "projector": "pool-2x2"},
    "anyres": {"tiling": "anyres", "projector": "mlp2x"},
    "native": {"tiling": "native"},
    "resampler": {"tiling": "tiles", "projector": "resampler", "resampler_tokens": 20},
    "pooled": {"tiling": "native", "video_pool": (2, 2, 1)},
}


def make_model(tower: str = "siglip_vision_model", **options: Any) -> FoveateForConditionalGeneration:
    torch.manual_seed(0)
    config = FoveateConfig(
        vision_config={
            "model_type": tower, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 4, "patch_size": 14, **TOWERS[tower],
        },
        text_config={
            "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "initializer_range": 0.08,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **options,
    )  # fmt: skip
    return FoveateForConditionalGeneration(config).eval()


def make_inputs() -> dict[str, torch.Tensor]:
    """Two rows: an image (16 tokens) and text; two frames (32 tokens) and text, the first row padded on the left."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(1, 500, (2, 20), generator=generator)
    first = torch.cat([torch.zeros(16, dtype=torch.long), torch.full((16,), IMAGE), words[0]])
    second = torch.cat([torch.full((32,), VIDEO), words[1]])
    input_ids = torch.stack([first, second])
    labels = input_ids.masked_fill(input_ids >= 500, -100).masked_fill(input_ids == 0, -100)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "labels": labels,
        "pixel_values": torch.randn(1, 3, 112, 112, generator=generator),
        "pixel_values_videos": torch.randn(2, 3, 112, 112, generator=generator),
    }


def on(device: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("attention", ATTENTION)
def test_bf16_forward_and_backward_on_cuda_equal_fp32_on_cpu(attention: str) -> None:
    inputs = make_inputs()
    reference = make_model()
    expected = reference(**inputs)
    expected.loss.backward()
    model = make_model().to("cuda", torch.bfloat16)
    model.set_attn_implementation(attention)
    found = model(**on("cuda", inputs))
    found.loss.backward()
    seen = inputs["attention_mask"].bool()
    assert relative_error(found.logits.cpu()[seen], expected.logits[seen]) < 0.03
    assert abs(found.loss.item() - expected.loss.item()) < 0.02 * expected.loss.item()
    gradients = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        if parameter.grad is None or parameter.grad.norm() < 1e-4:
            continue
        cosine = torch.nn.functional.cosine_similarity(
            gradients[name].grad.float().cpu().flatten(), parameter.grad.flatten(), dim=0
        )
        assert cosine > 0.98, name


@pytest.mark.parametrize("name", TILINGS)
def test_bf16_features_of_several_tiles_on_cuda_equal_fp32_on_cpu(name: str) -> None:
    native = TILINGS[name]["tiling"] == "native"
    reference = make_model("siglip2_vision_model" if native else "siglip_vision_model", **TILINGS[name])
    grids = torch.tensor([[8, 10], [6, 4]] if native else [[2, 2], [1, 3]])
    tiles = {"s2": 2 * 5, "native": 104, "pooled": 104}.get(name, 2 + 4 + 3)  # a tile of another scale for each image
    side, frames = (14, 3 * 24) if native else (112, 3)
    generator = torch.Generator().manual_seed(1)
    images = {"pixel_values": torch.randn(tiles, 3, side, side, generator=generator), "image_grids": grids}
    if name == "anyres":
        images["image_sizes"] = torch.tensor([[200, 210], [100, 300]])
    video_grids = torch.tensor([[3, 6, 4]] if native else [[3, 1, 1]])
    videos = {
        "pixel_values_videos": torch.randn(frames, 3, side, side, generator=generator),
        "video_grids": video_grids,
    }
    model = copy.deepcopy(reference).to("cuda", torch.bfloat16)
    with torch.no_grad():
        expected = [*reference.encode_images(**images), *reference.encode_videos(**videos)]
        found = [*model.encode_images(**on("cuda", images)), *model.encode_videos(**on("cuda", videos))]
    for one, other in zip(found, expected, strict=True):
        assert one.is_cuda and one.dtype == torch.bfloat16
        assert relative_error(one, other) < 0.03


@pytest.mark.parametrize("beams", [1, 3])
def test_fp32_generation_on_cuda_equals_cpu(beams: int) -> None:
    inputs = {name: tensor for name, tensor in make_inputs().items() if name != "labels"}
    options = {"max_new_tokens": 16, "do_sample": False, "num_beams": beams, "suppress_tokens": [IMAGE, VIDEO]}
    expected = make_model().generate(**inputs, **options)
    found = make_model().to("cuda").generate(**on("cuda", inputs), **options)
    assert found.cpu().tolist() == expected.tolist()


@pytest.mark.parametrize("attention", ATTENTION)
def test_bf16_generation_on_cuda_follows_its_own_logits(attention: str) -> None:
    """Each generated token is the best, to within bf16's rounding, of one uncached pass over the whole sequence."""
    inputs = {name: tensor for name, tensor in make_inputs().items() if name != "labels"}
    model = make_model().to("cuda", torch.bfloat16)
    model.set_attn_implementation(attention)
    generated = model.generate(**on("cuda", inputs), max_new_tokens=8, do_sample=False, suppress_tokens=[IMAGE, VIDEO])
    prompt = inputs["input_ids"].shape[1]
    whole = inputs | {
        "input_ids": generated.cpu(),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1),
    }
    logits = make_model()(**whole).logits[:, prompt - 1 : -1, :IMAGE]  # fp32 on the CPU
    chosen = logits.gather(2, generated[:, prompt:].cpu().unsqueeze(-1)).squeeze(-1)
    assert (logits.amax(-1) - chosen).max() < 0.05 * logits.std()
