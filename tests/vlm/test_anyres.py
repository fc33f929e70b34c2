"""AnyRes tiles, counts and features equal those of transformers' LLaVA-OneVision and LLaVA-NeXT."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from foveate.vlm import anyres

NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # LLaVA-NeXT's image_grid_pinpoints in tiles


def sizes(count: int, largest: int) -> list[tuple[int, int]]:
    """Random (height, width): two in three of any aspect ratio, one at a ratio that a grid has."""
    draw = random.Random(0)
    made = []
    for i in range(count):
        height, width = draw.randint(1, largest), draw.randint(1, largest)
        made.append((height, height * draw.randint(1, 6) // draw.randint(1, 3) or 1) if i % 3 == 0 else (height, width))
    return made


def picture(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_grids_are_llava_onevisions() -> None:
    assert [[384 * i, 384 * j] for i, j in anyres.GRIDS] == LlavaOnevisionImageProcessorPil.image_grid_pinpoints


@pytest.mark.parametrize(("grids", "side"), [(anyres.GRIDS, 384), (NEXT_GRIDS, 336)])
def test_picked_grid_is_transformers_best_resolution(grids: Any, side: int) -> None:
    pinpoints = [[rows * side, columns * side] for rows, columns in grids]
    for size in sizes(3000, 4000):
        rows, columns = anyres.pick_grid(size, grids, (side, side))
        assert (rows * side, columns * side) == tuple(select_best_resolution(size, pinpoints)), size


def test_token_counts_are_llava_onevisions_and_llava_nexts() -> None:
    grids, pinpoints = anyres.GRIDS, [[384 * i, 384 * j] for i, j in anyres.GRIDS]
    counter = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
        patch_size=14,
        num_additional_image_tokens=0,
    )
    for size in sizes(2000, 4000):
        grid = anyres.pick_grid(size, grids, (384, 384))
        for processor, max_tiles in ((LlavaOnevisionProcessor, 9), (LlavaNextProcessor, None)):
            counter._get_unpadded_features = processor._get_unpadded_features.__get__(counter)
            expected = processor._get_number_of_features(counter, *size, 384, 384)
            assert anyres.image_tokens(size, grid, (27, 27), max_tiles) == expected, (size, processor)


def test_packed_features_are_llava_onevisions_and_llava_nexts() -> None:
    torch.manual_seed(0)
    side, cells, newline = 32, (4, 4), torch.randn(3)
    vision = SimpleNamespace(image_size=side, patch_size=side // cells[0])
    for one_vision in (True, False):
        max_tiles = 3 if one_vision else None
        pinpoints = [[side * i, side * j] for i, j in anyres.GRIDS]
        model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
        shrunk = 0
        for size in sizes(150, 300):
            grid = anyres.pick_grid(size, anyres.GRIDS, (side, side))
            features = torch.randn(1 + grid[0] * grid[1], 16, 3)
            packed = anyres.pack(features, grid, size, newline, cells, max_tiles)
            if one_vision:
                pack, options = LlavaOnevisionModel.pack_image_features, {"vision_aspect_ratio": "anyres_max_3"}
            else:
                pack, options = LlavaNextModel.pack_image_features, {"vision_feature_select_strategy": "default"}
            expected, _ = pack(model, [features], torch.tensor([size]), image_newline=newline, **options)
            torch.testing.assert_close(packed, expected[0], rtol=0, atol=1e-6)
            assert len(packed) == anyres.image_tokens(size, grid, cells, max_tiles)
            shrunk += len(packed) < anyres.image_tokens(size, grid, cells, None)
        assert shrunk > 20 or not one_vision


def test_video_features_are_llava_onevisions() -> None:
    torch.manual_seed(0)
    for side in (4, 5):  # an odd side leaves half a cell
        config = SimpleNamespace(vision_config=SimpleNamespace(image_size=8 * side, patch_size=8))
        frames, newline = torch.randn(3, side * side, 6), torch.randn(6)
        pooled = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), frames)
        packed = anyres.pack_video(frames, newline, (side, side))
        torch.testing.assert_close(packed, torch.cat([pooled.flatten(0, 1), newline[None]]), rtol=0, atol=1e-6)
        assert len(packed) == anyres.video_tokens(3, (side, side))


@pytest.mark.parametrize("processor", [LlavaOnevisionImageProcessorPil, LlavaNextImageProcessorPil])
def test_tiles_are_transformers_pixel_by_pixel(processor: Any) -> None:
    pinpoints = [[32 * i, 32 * j] for i, j in anyres.GRIDS]
    size = {"height": 32, "width": 32} if processor is LlavaOnevisionImageProcessorPil else {"shortest_edge": 32}
    options = {"size": size, "image_grid_pinpoints": pinpoints, "do_rescale": False, "do_normalize": False}
    if "shortest_edge" in size:
        options["crop_size"] = {"height": 32, "width": 32}
    theirs = processor(**options)
    for shape in [(32, 32), (100, 37), (20, 90), (64, 96), (7, 5), (150, 149), (200, 30)]:
        grid = anyres.pick_grid(shape, anyres.GRIDS, (32, 32))
        tiles = anyres.cut(picture(shape), grid, (32, 32), 3)
        expected = theirs(picture(shape), return_tensors="np")["pixel_values"][0].transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(tiles, expected)


def test_fitted_images_are_clips_and_llavas_pixel_by_pixel() -> None:
    raw = {"do_rescale": False, "do_normalize": False}
    crop = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **raw)
    pad = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.4, 0.5, 0.6],
        **raw,
    )
    for shape in [(32, 32), (100, 37), (20, 90), (7, 5), (41, 40), (33, 200)]:
        for theirs, fit in ((crop, "crop"), (pad, "pad")):
            fitted = anyres.fit_image(picture(shape), (32, 32), fit, 3, (102, 127, 153))
            expected = theirs(picture(shape), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
            np.testing.assert_array_equal(np.asarray(fitted), expected)
    assert anyres.fit_image(picture((10, 90)), (20, 40), "crop", 3, (0, 0, 0)).size == (40, 20)
    with pytest.raises(ValueError, match="fit is 'zoom'; accepted: stretch, crop, pad"):
        anyres.fit_image(picture((4, 4)), (8, 8), "zoom", 3, (0, 0, 0))
