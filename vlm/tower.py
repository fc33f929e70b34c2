"""Runs vision towers: tiles of one size, or images at their own aspect ratio; resizes a tower's position embedding."""

import copy
import inspect
import math
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .config import FoveateConfig
from .tiling import merge_tiles

QWEN_TOWERS = (
    "qwen2_5_vl_vision",
    "qwen3_vl_vision",
    "qwen3_vl_moe_vision",
    "qwen3_5_vision",
    "qwen3_5_moe_vision",
)
NATIVE_TOWERS = ("siglip2_vision_model", "pixtral", *QWEN_TOWERS)


def run_tower(
    tower: PreTrainedModel, config: FoveateConfig, pixel_values: torch.Tensor
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Runs the tower on tiles of one size.

    Args:
        tower: the vision tower.
        config: says which layer's features are read, and whether with prefix tokens.
        pixel_values: [tiles, 3, height, width].

    Returns:
        Features [tiles, tokens, C] and the tiles' (height, width) in patches.

    Raises:
        ValueError: the tower doesn't give one token a patch.
    """
    vision, layer, patch = tower.config, config.vision_feature_layer, config.patch_size
    tiles, _, height, width = pixel_values.shape
    grid = (height // patch, width // patch)
    inputs: dict[str, Any] = {"pixel_values": pixel_values.to(tower.dtype)}
    if vision.model_type == "siglip2_vision_model":  # takes flattened patches and each image's grid
        inputs["pixel_values"] = patchify(inputs["pixel_values"], patch)
        inputs["spatial_shapes"] = torch.tensor([grid], device=pixel_values.device).expand(tiles, 2)
        inputs["pixel_attention_mask"] = pixel_values.new_ones(tiles, grid[0] * grid[1], dtype=torch.long)
    elif (height, width) != _sides(vision.image_size) and "interpolate_pos_encoding" in _forward_names(tower):
        inputs["interpolate_pos_encoding"] = True
    features = _features(tower, layer, inputs)
    if features.ndim != 3 or len(features) != tiles or features.shape[1] < grid[0] * grid[1]:
        raise ValueError(
            f"vision tower {vision.model_type!r} gave {tuple(features.shape)} for {tiles} images of "
            f"{grid[0]}x{grid[1]} patches; accepted: towers that give [images, tokens, channels], one token a patch"
        )
    if config.vision_feature_select_strategy == "default":
        features = features[:, features.shape[1] - grid[0] * grid[1] :]
    return features, grid


def run_native_tower(
    tower: PreTrainedModel, config: FoveateConfig, patches: torch.Tensor, grids: torch.Tensor
) -> list[torch.Tensor]:
    """Runs the tower on images of any sizes at once; no image sees another.

    Args:
        tower: one of `NATIVE_TOWERS`; Qwen's give the features before their merger.
        config: says which layer's features are read.
        patches: all images' patches in raster order, [patches, 3, p, p].
        grids: int64 [images, 2], (rows, columns) of each image's patches.

    Returns:
        For each image its features [rows, columns, C].

    Raises:
        ValueError: the tower takes no images of any size, or patches and grids don't fit it or each other.
    """
    vision, layer, patch = tower.config, config.vision_feature_layer, config.patch_size
    if vision.model_type not in NATIVE_TOWERS:
        raise ValueError(
            f"vision tower {vision.model_type!r} doesn't take images at their own aspect ratio; accepted with tiling "
            f"'native': {', '.join(NATIVE_TOWERS)}"
        )
    if patches.ndim != 4 or tuple(patches.shape[2:]) != (patch, patch):
        raise ValueError(f"patches has shape {tuple(patches.shape)}; accepted: [patches, 3, {patch}, {patch}]")
    sizes: list[tuple[int, int]] = [(rows, columns) for rows, columns in grids.tolist()]
    counts = [rows * columns for rows, columns in sizes]
    if sum(counts) != len(patches):
        raise ValueError(f"patches holds {len(patches)} patches; the grids {sizes} have {sum(counts)}")
    patches = patches.to(tower.dtype)
    if vision.model_type == "siglip2_vision_model":
        features = _run_siglip2(tower, layer, patches, grids, counts)
    elif vision.model_type == "pixtral":
        features = _run_pixtral(tower, layer, patches, sizes, counts)
    else:
        features = _run_qwen(tower, layer, patches, sizes, counts)
    return [image.unflatten(0, size) for image, size in zip(features, sizes, strict=True)]


def _run_siglip2(
    tower: PreTrainedModel, layer: int | None, patches: torch.Tensor, grids: torch.Tensor, counts: list[int]
) -> list[torch.Tensor]:
    """SigLIP 2 NaFlex (arXiv 2502.14786, section 2.4.2): a padded batch and its mask. Gives [patches, C] by image."""
    flat = patches.permute(0, 2, 3, 1).flatten(1)  # [patches, p·p·3]
    padded = nn.utils.rnn.pad_sequence(list(flat.split(counts)), batch_first=True)  # [images, longest, p·p·3]
    lengths = torch.tensor(counts, device=patches.device)
    inputs = {
        "pixel_values": padded,
        "spatial_shapes": grids.to(patches.device),
        "pixel_attention_mask": (torch.arange(padded.shape[1], device=patches.device) < lengths[:, None]).long(),
    }
    features = _features(tower, layer, inputs)  # [images, longest, C]
    return [image[:count] for image, count in zip(features, counts, strict=True)]


def _run_pixtral(
    tower: PreTrainedModel, layer: int | None, patches: torch.Tensor, sizes: list[tuple[int, int]], counts: list[int]
) -> list[torch.Tensor]:
    """Pixtral (arXiv 2410.07073, section 2.1), image after image: one mask over all would be quadratic in them."""
    features = []
    for image, size in zip(patches.permute(0, 2, 3, 1).split(counts), sizes, strict=True):
        pixels = merge_tiles(image, size).permute(2, 0, 1).unsqueeze(0)  # [1, 3, height, width]
        features.append(_features(tower, layer, {"pixel_values": pixels})[0])
    return features


def _run_qwen(
    tower: PreTrainedModel, layer: int | None, patches: torch.Tensor, sizes: list[tuple[int, int]], counts: list[int]
) -> list[torch.Tensor]:
    """Qwen2.5-VL (arXiv 2502.13923, section 2.1.1) and Qwen3-VL: patches come and go in the order of their merger.

    A still image is a clip of as many equal frames as a patch is long in time.
    """
    vision = tower.config
    merge, frames = vision.spatial_merge_size, vision.temporal_patch_size
    if any(rows % merge or columns % merge for rows, columns in sizes):
        raise ValueError(
            f"grids are {sizes}; vision tower {vision.model_type!r} accepts multiples of its spatial_merge_size {merge}"
        )
    window = vision.window_size // vision.patch_size // merge if vision.model_type == "qwen2_5_vl_vision" else None
    come, go, start = [], [], 0
    for size, count in zip(sizes, counts, strict=True):
        come.append(start + _merger_order(size, merge, None))
        go.append(start + _merger_order(size, merge, window))
        start += count
    clips = patches[torch.cat(come).to(patches.device)].unsqueeze(2).expand(-1, -1, frames, -1, -1)
    grid_thw = torch.tensor([(1, *size) for size in sizes], device=patches.device)
    features = _features(tower, layer, {"hidden_states": clips.flatten(1), "grid_thw": grid_thw})  # [patches, C]
    raster = torch.cat(go).argsort().to(features.device)
    return list(features[raster].split(counts))


def _merger_order(size: tuple[int, int], merge: int, window: int | None) -> torch.Tensor:
    """Raster indices [patches] of a map of `size`, square by square of merge·merge patches.

    Args:
        size: (rows, columns) in patches.
        merge: side of the squares in patches.
        window: side in squares of the windows of attention, which the squares are sorted by; None: raster order.
    """
    rows, columns = size[0] // merge, size[1] // merge
    squares = torch.arange(size[0] * size[1]).reshape(rows, merge, columns, merge).transpose(1, 2)
    squares = squares.reshape(rows * columns, merge * merge)
    if window is not None:
        window_row, window_column = torch.arange(rows) // window, torch.arange(columns) // window
        windows = window_row[:, None] * columns + window_column  # [rows, columns]
        squares = squares[windows.flatten().argsort(stable=True)]
    return squares.flatten()


def _features(tower: PreTrainedModel, layer: int | None, inputs: dict[str, Any]) -> torch.Tensor:
    outputs = tower(**inputs, output_hidden_states=layer is not None)
    return outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]


def patchify(pixel_values: torch.Tensor, patch: int) -> torch.Tensor:
    """Cuts [tiles, 3, height, width] into patches in raster order, [tiles, patches, patch·patch·3]."""
    tiles, channels, height, width = pixel_values.shape
    rows, columns = height // patch, width // patch
    cut = pixel_values[:, :, : rows * patch, : columns * patch].reshape(tiles, channels, rows, patch, columns, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(tiles, rows * columns, patch * patch * channels)


def resize_positions(tower: PreTrainedModel, size: tuple[int, int]) -> None:
    """Makes a tower one of another image size: its position embedding is interpolated over its 2-D grid (bicubic).

    In place, weights and `tower.config`, so that a tower saved afterwards loads at the new size (a model's
    `config.vision_config` is another object). Prefix tokens keep their positions. The tower then gives what it gave
    before with `interpolate_pos_encoding`. To be done before an optimizer is made: the embeddings are new parameters.

    Args:
        tower: one with a learned position for each patch of a square grid (SigLIP, CLIP, ViT, DINOv2, …).
        size: (height, width) in pixels, equal: transformers' towers keep a square grid.

    Raises:
        ValueError: the size isn't square, or the tower has no such embedding.
    """
    config = tower.config
    matches = [re.fullmatch(r"(.+)\.(position_embeddings?(?:\.weight)?)", name) for name, _ in tower.named_parameters()]
    found = [match.groups() for match in matches if match]
    if getattr(config, "image_size", None) is None or len(found) != 1:
        raise ValueError(
            f"vision tower {config.model_type!r} has no position embedding of one image size; accepted: towers with a "
            "learned position for each patch, such as siglip_vision_model, clip_vision_model, vit, dinov2"
        )
    patch = _sides(config.patch_size)
    if size[0] != size[1] or min(size) < max(patch):
        raise ValueError(f"size is {size}; accepted: (side, side), at least one patch of {patch[0]}x{patch[1]} pixels")
    old, new = ((s[0] // patch[0], s[1] // patch[1]) for s in (_sides(config.image_size), size))
    path, name = found[0]
    embeddings = tower.get_submodule(path)
    weights = embeddings.state_dict()
    antialias = config.model_type == "dinov2_with_registers"  # alone of all does so when it runs
    weights[name] = interpolate_positions(weights[name], old, new, antialias)
    resized_config = copy.deepcopy(config)
    resized_config.image_size = size[0] if isinstance(config.image_size, int) else type(config.image_size)(size)
    resized = type(embeddings)(resized_config)
    resized.load_state_dict(weights)
    resized.to(weights[name]).train(embeddings.training)
    for parameter, before in zip(resized.parameters(), embeddings.parameters(), strict=True):
        parameter.requires_grad_(before.requires_grad)
    tower.set_submodule(path, resized)
    config.image_size = resized_config.image_size


def interpolate_positions(
    positions: torch.Tensor, old: tuple[int, int], new: tuple[int, int], antialias: bool = False
) -> torch.Tensor:
    """Resizes a position embedding from one grid (rows, columns) to another by bicubic interpolation.

    Args:
        positions: [..., prefix tokens + rows·columns, C]; those of the prefix are kept.
        old, new: the grids.
        antialias: as in `torch.nn.functional.interpolate`.

    Raises:
        ValueError: there are fewer positions than the old grid has patches.
    """
    prefix = positions.shape[-2] - math.prod(old)
    if prefix < 0:
        raise ValueError(f"position embedding has {positions.shape[-2]} positions; a grid {old} needs {math.prod(old)}")
    table = positions.reshape(-1, positions.shape[-1])
    grid = table[prefix:].float().unflatten(0, old).permute(2, 0, 1).unsqueeze(0)  # [1, C, rows, columns]
    resized = nn.functional.interpolate(grid, size=new, mode="bicubic", antialias=antialias)
    patches = resized[0].permute(1, 2, 0).flatten(0, 1).to(positions.dtype)
    return torch.cat([table[:prefix], patches]).reshape(*positions.shape[:-2], -1, positions.shape[-1])


def _forward_names(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
