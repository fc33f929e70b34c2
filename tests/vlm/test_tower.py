"""Towers run on images of any size against transformers' own preprocessing; positions resized against brute force."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from foveate.vlm.tiling import Tiling, normalise
from foveate.vlm.tower import (
    NATIVE_TOWERS,
    QWEN_TOWERS,
    interpolate_positions,
    patchify,
    resize_positions,
    run_native_tower,
    run_tower,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.5)
QWEN: dict[str, Any] = {"hidden_size": 32, "depth": 4, "num_heads": 2, "patch_size": 4, "out_hidden_size": 24}
NATIVE: dict[str, dict[str, Any]] = {
    "siglip2_vision_model": {"num_patches": 16, "vision_use_head": False, "hidden_size": 32, "patch_size": 4},
    "pixtral": {"image_size": 256, "hidden_size": 32, "patch_size": 4},
    "qwen2_5_vl_vision": QWEN | {"window_size": 24, "fullatt_block_indexes": [1, 3]},  # windows of 3x3 squares of 2x2
    "qwen3_vl_vision": QWEN | {"num_position_embeddings": 36, "deepstack_visual_indexes": [1]},
    "qwen3_vl_moe_vision": QWEN | {"num_position_embeddings": 36, "deepstack_visual_indexes": [1]},
    "qwen3_5_vision": QWEN | {"num_position_embeddings": 36},
    "qwen3_5_moe_vision": QWEN | {"num_position_embeddings": 36},
}
SIZES = [(40, 56), (8, 8), (24, 80), (56, 40)]  # (height, width) in pixels, multiples of 8


def native_tower(name: str) -> PreTrainedModel:
    layers = {} if name.startswith("qwen") else {"num_hidden_layers": 4, "num_attention_heads": 2}
    config = AutoConfig.for_model(name, intermediate_size=48, **NATIVE[name], **layers)
    if name == "qwen2_5_vl_vision":  # AutoModel of transformers 5.17 doesn't know it
        tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config)
    else:
        tower = AutoModel.from_config(config)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tower.double().eval()


def settings(tower: PreTrainedModel, layer: int | None = None, strategy: str = "default") -> Any:
    """The fields of `FoveateConfig` that say how a tower is run."""
    return SimpleNamespace(
        vision_config=tower.config,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        patch_size=tower.config.patch_size,
    )


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def cut(images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches [patches, 3, 4, 4] of all images and their grids, by the processor's way."""
    tiling = Tiling("native", (8, 8), 4, 2, min_patches=4)
    plans = [tiling.plan(image.height, image.width) for image in images]
    patches = [normalise(tiling.cut(image, plan, 3), MEAN, STD) for image, plan in zip(images, plans, strict=True)]
    return torch.cat(patches).double(), torch.tensor([plan.grid for plan in plans])


# Images at their own aspect ratio


@pytest.mark.parametrize("layer", [None, -2, 0])
@pytest.mark.parametrize("name", NATIVE_TOWERS)
@torch.no_grad()
def test_images_of_a_batch_are_encoded_as_each_alone(name: str, layer: int | None) -> None:
    tower = native_tower(name)
    config = settings(tower, layer)
    together = run_native_tower(tower, config, *cut(pictures()))
    for image, features in zip(pictures(), together, strict=True):
        assert features.shape == (image.height // 4, image.width // 4, 32)
        (alone,) = run_native_tower(tower, config, *cut([image]))
        torch.testing.assert_close(features, alone)
        assert features.std() > 1e-3


@torch.no_grad()
def test_siglip2_gives_what_it_gives_with_its_own_processor() -> None:
    tower = native_tower("siglip2_vision_model")
    processor = Siglip2ImageProcessorPil(
        patch_size=4, max_num_patches=150, do_resize=False, image_mean=list(MEAN), image_std=list(STD)
    )
    inputs = processor(pictures(), return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected = tower(**inputs, output_hidden_states=True)
    for layer, states in ((None, expected.last_hidden_state), (-2, expected.hidden_states[-2])):
        features = run_native_tower(tower, settings(tower, layer), *cut(pictures()))
        for image, (height, width) in enumerate(SIZES):
            patches = height // 4 * (width // 4)
            torch.testing.assert_close(features[image].flatten(0, 1), states[image, :patches], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", QWEN_TOWERS)
@torch.no_grad()
def test_qwens_merger_gives_what_it_gives_with_its_own_processor(name: str) -> None:
    """Features are before the merger and in raster order: merged square by square they are the tower's own output."""
    tower: Any = native_tower(name)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, min_pixels=64, max_pixels=10**6, image_mean=list(MEAN), image_std=list(STD)
    )
    inputs = processor(pictures(), return_tensors="pt")
    expected = tower(inputs["pixel_values"].double(), grid_thw=inputs["image_grid_thw"]).pooler_output
    squares = []
    for features in run_native_tower(tower, settings(tower), *cut(pictures())):
        for y in range(0, features.shape[0], 2):
            for x in range(0, features.shape[1], 2):
                squares += [features[y, x], features[y, x + 1], features[y + 1, x], features[y + 1, x + 1]]
    torch.testing.assert_close(tower.merger(torch.stack(squares)), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pixtral_gives_what_it_gives_of_padded_images() -> None:
    tower = native_tower("pixtral")
    padded = torch.zeros(len(SIZES), 3, 56, 80, dtype=torch.float64)
    for image, pixels in zip(pictures(), padded, strict=True):
        pixels[:, : image.height, : image.width] = normalise(np.asarray(image)[None], MEAN, STD)[0]
    expected = tower(padded, image_sizes=torch.tensor(SIZES), output_hidden_states=True).hidden_states[-2]
    features = run_native_tower(tower, settings(tower, -2), *cut(pictures()))
    torch.testing.assert_close(torch.cat([one.flatten(0, 1) for one in features]), expected[0])


@torch.no_grad()
def test_a_naflex_tower_runs_tiles_as_images_of_that_size() -> None:
    tower = native_tower("siglip2_vision_model")
    pixels = torch.randn(2, 3, 24, 16, dtype=torch.float64)
    tiles, grid = run_tower(tower, settings(tower, -2), pixels)
    patches = patchify(pixels, 4).unflatten(-1, (4, 4, 3)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    images = run_native_tower(tower, settings(tower, -2), patches, torch.tensor([[6, 4], [6, 4]]))
    assert grid == (6, 4)
    torch.testing.assert_close(tiles, torch.stack(images).flatten(1, 2))


def test_gradients_reach_every_patch() -> None:
    tower = native_tower("qwen2_5_vl_vision")
    patches, grids = cut(pictures()[:2])
    features = run_native_tower(tower, settings(tower), patches.requires_grad_(), grids)
    features[1].sum().backward()
    assert patches.grad is not None
    reached = patches.grad.flatten(1).abs().sum(1) > 0
    assert reached.tolist() == [False] * 140 + [True] * 4


def test_wrong_native_inputs_are_refused() -> None:
    tower = native_tower("qwen2_5_vl_vision")
    patches, grids = cut(pictures()[:1])
    with pytest.raises(ValueError, match=r"patches holds 139 patches; the grids .* have 140"):
        run_native_tower(tower, settings(tower), patches[1:], grids)
    with pytest.raises(ValueError, match=r"patches has shape \(140, 3, 4, 2\); accepted: \[patches, 3, 4, 4\]"):
        run_native_tower(tower, settings(tower), patches[..., :2], grids)
    with pytest.raises(ValueError, match=r"grids are \[\(20, 7\)\]; .* multiples of its spatial_merge_size 2"):
        run_native_tower(tower, settings(tower), patches, torch.tensor([[20, 7]]))
    clip = AutoModel.from_config(AutoConfig.for_model("clip_vision_model", **SQUARE["clip_vision_model"], **WIDTH))
    with pytest.raises(
        ValueError, match=r"'clip_vision_model' doesn't take .* accepted .* siglip2_vision_model, pixtral"
    ):
        run_native_tower(clip, settings(clip), patches, grids)


# The position embedding

WIDTH = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
SQUARE: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {"image_size": 16, "intermediate_size": 48, "vision_use_head": False},
    "clip_vision_model": {"image_size": 18, "intermediate_size": 48},
    "vit": {"image_size": 16, "intermediate_size": 48},
    "ijepa": {"image_size": 16, "intermediate_size": 48},
    "dinov2": {"image_size": 16},
    "dinov2_with_registers": {"image_size": 16, "num_register_tokens": 3},
}


def cubic(x: float) -> float:
    """Keys' kernel with a = -3/4, which torch, OpenCV and the towers' own code take."""
    x = abs(x)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3 if x < 2 else 0.0


def bicubic(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """[rows, columns, C] resized point by point; beyond the border its values go on."""
    resized = np.zeros((height, width, grid.shape[2]))
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) * grid.shape[0] / height - 0.5, (j + 0.5) * grid.shape[1] / width - 0.5
            for row in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
                for column in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                    source = grid[min(max(row, 0), grid.shape[0] - 1), min(max(column, 0), grid.shape[1] - 1)]
                    resized[i, j] += cubic(y - row) * cubic(x - column) * source
    return resized


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((7, 7), (4, 4)), ((3, 5), (6, 4)), ((5, 5), (5, 5))])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_positions_are_interpolated_over_their_grid(old: tuple[int, int], new: tuple[int, int], prefix: int) -> None:
    positions = torch.randn(1, prefix + old[0] * old[1], 6)
    resized = interpolate_positions(positions, old, new)
    assert resized.shape == (1, prefix + new[0] * new[1], 6)
    assert resized[:, :prefix].equal(positions[:, :prefix])
    expected = bicubic(positions[0, prefix:].unflatten(0, old).double().numpy(), *new)
    np.testing.assert_allclose(resized[0, prefix:].unflatten(0, new), expected, atol=1e-5)
    assert interpolate_positions(positions[0].bfloat16(), old, new).dtype == torch.bfloat16


def test_a_ramp_of_columns_stays_one_in_every_row() -> None:
    """Resized along the flattened index, as some do, rows come out zero and the ramp runs through the whole table."""
    ramp = torch.arange(1.0, 9).expand(8, 8).reshape(64, 1)
    resized = interpolate_positions(ramp, (8, 8), (16, 16)).unflatten(0, (16, 16))[..., 0]
    assert (resized > 0.5).all() and resized.diff(dim=0).abs().max() < 1e-5
    assert (resized.diff(dim=1) > 0).all()


@pytest.mark.parametrize("side", [28, 12])
@pytest.mark.parametrize("name", SQUARE)
@torch.no_grad()
def test_a_resized_tower_loads_and_runs_at_its_new_size(name: str, side: int, tmp_path: Path) -> None:
    tower = AutoModel.from_config(AutoConfig.for_model(name, **SQUARE[name], **WIDTH)).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        parameter.requires_grad_(False)
    pixels = torch.randn(2, 3, side, side)
    expected, _ = run_tower(tower, settings(tower, -2, "full"), pixels)  # interpolated as it runs
    resize_positions(tower, (side, side))
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    tower.save_pretrained(tmp_path)
    loaded, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()) and loaded.config.image_size == side
    for model in (tower, loaded.eval()):
        states = model(pixels, output_hidden_states=True).hidden_states  # nothing left to interpolate
        torch.testing.assert_close(states[-2], expected, atol=1e-5, rtol=1e-5)


def test_resizing_to_the_same_size_changes_nothing() -> None:
    tower = AutoModel.from_config(AutoConfig.for_model("vit", **SQUARE["vit"], **WIDTH)).to(torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    resize_positions(tower, (16, 16))
    assert all(tensor.equal(before[name]) for name, tensor in tower.state_dict().items())
    assert all(module.training for module in tower.modules())
    assert all(parameter.requires_grad for parameter in tower.parameters())


@pytest.mark.parametrize("name", ["siglip2_vision_model", "pixtral", "qwen3_vl_vision"])
def test_towers_that_interpolate_for_every_image_are_not_resized(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}' has no position embedding of one image size"):
        resize_positions(native_tower(name), (64, 64))


@pytest.mark.parametrize("size", [(16, 20), (3, 3)])
def test_sizes_that_are_not_square_are_refused(size: tuple[int, int]) -> None:
    tower = AutoModel.from_config(AutoConfig.for_model("vit", **SQUARE["vit"], **WIDTH))
    with pytest.raises(ValueError, match=r"size is \(.*accepted: \(side, side\)"):
        resize_positions(tower, size)


def test_too_few_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="has 15 positions"):
        interpolate_positions(torch.zeros(15, 2), (4, 4), (5, 5))
