"""Plans against published counts, brute force and transformers' own; cuts against crops of the resized image."""

import math
import random
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from foveate.vlm import anyres
from foveate.vlm.projector import space_to_depth
from foveate.vlm.tiling import (
    TILINGS,
    ImagePlan,
    Tiling,
    closest_grid,
    grid_levels,
    merge_scales,
    merge_tiles,
    split_tiles,
)

NVILA: dict[str, Any] = {"scheme": "dynamic-s2", "tile": (448, 448), "patch_size": 14, "scales": (1, 2, 3)}
SMALL: dict[str, dict[str, Any]] = {  # patches of 4 pixels
    "resize": {"tile": (24, 28)},
    "s2": {"tile": (20, 20), "scales": (1, 3)},
    "dynamic-s2": {"tile": (20, 20), "scales": (1, 2, 3)},
    "tiles": {"tile": (20, 28), "min_tiles": 2, "max_tiles": 7},
    "anyres": {"tile": (12, 12)},
    "native": {"tile": (4, 4), "min_patches": 10, "max_patches": 99},
}


def small(scheme: str, r: int = 2, **options: Any) -> Tiling:
    return Tiling(scheme, patch_size=4, r=1 if scheme == "anyres" else r, **(SMALL[scheme] | options))


def sizes(count: int) -> list[tuple[int, int]]:
    """(height, width) from a pixel to 20,000, every order of magnitude as often, one in five a line of pixels."""
    draw = random.Random(0)

    def side() -> int:
        return round(math.exp(draw.uniform(0, math.log(20_000))))

    lines = [(1, 1), (1, 20_000), (20_000, 1)]
    return lines + [draw.choice([(side(), side())] * 8 + [(1, side()), (side(), 1)]) for _ in range(count - len(lines))]


def picture(height: int, width: int) -> Image.Image:
    """Noise, in which every tile differs."""
    noise = np.random.default_rng(height * width).integers(0, 256, (min(height, 60), min(width, 60), 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


# Published figures


@pytest.mark.parametrize(("side", "r", "tokens"), [(448, 2, 256), (448, 3, 121), (384, 2, 196), (384, 3, 81)])
def test_tokens_of_a_tile_are_those_published(side: int, r: int, tokens: int) -> None:
    """VILA-1.5 and NVILA (arXiv 2412.04468, section 2.1): 32 and 27 patches a side."""
    assert Tiling("resize", (side, side), 14, r).plan(480, 640).tokens == tokens
    assert Tiling("s2", (side, side), 14, r, scales=(1, 2, 3)).plan(480, 640).tokens == tokens


@pytest.mark.parametrize(
    ("size", "tiles"), [((900, 900), 9), ((768, 1024), 12), ((1024, 768), 12), ((1080, 1920), 12), ((1920, 1080), 10)]
)
def test_dynamic_s2_has_the_published_tokens(size: tuple[int, int], tiles: int) -> None:
    """NVILA at scales of 448, 896 and 1344 pixels: 2,304 tokens of a square image, 3,072 of 4:3 and 16:9.

    (Upright 9:16 is closer to 2:5 than to 3:4 as width / height counts it.)
    """
    by_r = {r: Tiling(r=r, **NVILA).plan(*size) for r in (2, 3)}
    assert by_r[2].tokens == {9: 2304, 10: 2560, 12: 3072}[tiles] and by_r[3].tokens == tiles * 121
    assert by_r[2].levels == ((1, 1), (2, 2), by_r[2].grid) and math.prod(by_r[2].grid) == tiles
    assert by_r[2].tiles == 1 + 4 + tiles


@pytest.mark.parametrize(("size", "tiles"), [((448, 448), 1), ((450, 1800), 5), ((1344, 1792), 13)])
def test_internvl_counts_the_thumbnail_of_several_tiles(size: tuple[int, int], tiles: int) -> None:
    """InternVL 1.5 (arXiv 2404.16821, section 3.3): 256 tokens a tile, of 1 to 12 tiles and a thumbnail."""
    tiling = Tiling("tiles", (448, 448), 14, 2)
    assert tiling.plan(*size).tiles == tiles and tiling.plan(*size).tokens == 256 * tiles
    assert replace(tiling, thumbnail=False).plan(*size).tokens == 256 * (tiles - (tiles > 1))


# The grid


@pytest.mark.parametrize(("least", "most"), [(1, 12), (1, 6), (4, 9)])
def test_grids_are_those_of_transformers_internvl(least: int, most: int) -> None:
    tie = [(448, 672), (672, 1008), (1008, 1512), (448, 448), (634, 634), (897, 897), (1800, 1800), (1, 2)]
    for size in sizes(3334) + tie:
        columns, rows = get_optimal_tiled_canvas(size, (448, 448), least, most)
        assert closest_grid(*size, (448, 448), least, most) == (rows, columns), size


def test_no_grid_within_bounds_is_closer_in_aspect_ratio() -> None:
    tile = (200, 300)
    grids = [(rows, columns) for rows in range(1, 11) for columns in range(1, 11) if 3 <= rows * columns <= 10]
    for height, width in sizes(1000):
        distance = {
            (rows, columns): abs(Fraction(width, height) - Fraction(columns * tile[1], rows * tile[0]))
            for rows, columns in grids
        }
        grid = closest_grid(height, width, tile, 3, 10)
        assert float(distance[grid]) == pytest.approx(float(min(distance.values()))), (height, width)


def test_of_equally_close_grids_a_larger_image_takes_the_larger() -> None:
    tile = (10, 10)
    assert [closest_grid(side, side, tile, 1, 9) for side in (10, 14, 15, 21, 22)] == [(1, 1)] * 2 + [(2, 2)] * 2 + [
        (3, 3)
    ]


# Plans, of all sizes


@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize("scheme", TILINGS)
def test_the_plan_is_what_cutting_and_space_to_depth_give(scheme: str, r: int) -> None:
    for size in [*sizes(14), (20, 20), (61, 40)]:
        tiling = small(scheme, r)
        plan = tiling.plan(*size)
        pixels = tiling.cut(picture(*size), plan, Image.Resampling.NEAREST)
        assert pixels.shape == (plan.tiles, *plan.tile, 3) and pixels.dtype == np.uint8
        rows, columns = plan.tile[0] // 4, plan.tile[1] // 4
        features = torch.arange(plan.tiles).view(-1, 1, 1, 1).expand(-1, rows, columns, 1).float()
        if scheme == "native":
            features = features.reshape(1, *plan.grid, 1)
            assert plan.grid[0] % r == 0 == plan.grid[1] % r
        elif scheme in ("s2", "dynamic-s2"):
            features = merge_scales(features, plan.levels, plan.grid)
        if scheme == "anyres":
            cells, projected = (rows, columns), features.flatten(1, 2)
            read = anyres.pack(projected, plan.grid, size, torch.zeros(1), cells, tiling.anyres_max_tiles)
        else:
            read = space_to_depth(features, r).flatten(0, 2)
        assert plan.tokens == len(read), (size, plan)


@pytest.mark.parametrize("scheme", TILINGS)
def test_plans_keep_their_bounds_at_any_size(scheme: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "s2": {"scales": (1, 2, 3)},
        "dynamic-s2": {"scales": (1, 2, 3)},
        "tiles": {"min_tiles": 2},
    }
    tiling = Tiling(scheme, (448, 448), 14, 1 if scheme == "anyres" else 2, **options.get(scheme, {}))
    for size in sizes(10_000):
        plan = tiling.plan(*size)
        rows, columns = plan.grid
        assert min(plan.grid) >= 1 and (plan.grid in plan.levels or scheme == "s2")
        if scheme in ("resize", "s2"):
            assert plan.grid == (1, 1) and plan.tokens == 256
        elif scheme == "dynamic-s2":
            assert 9 <= rows * columns <= 12 and plan.tokens == rows * columns * 256
        elif scheme == "tiles":
            assert 2 <= rows * columns <= 12 and plan.tokens == (rows * columns + 1) * 256
        elif scheme == "native":
            assert rows % 2 == 0 == columns % 2 and rows * columns <= 4096 and plan.tokens == rows * columns // 4
        else:
            assert plan.grid in anyres.GRIDS and 32 * 32 <= plan.tokens <= 32 * 32 * (1 + 9 * 1.21) + 6 * 32


def test_a_plan_of_no_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="image size is 0x5"):
        small("tiles").plan(0, 5)


# Tiles and maps


def test_maps_of_any_image_are_cut_in_place_and_merged_exactly() -> None:
    tilings = [Tiling(r=2, **NVILA), Tiling("tiles", (448, 448), 14, 2), Tiling("anyres", (384, 384), 14, 1)]
    for number, size in enumerate(sizes(10_000)):
        rows, columns = tilings[number % 3].plan(*size).grid
        whole = np.arange(rows * 2 * columns * 3).reshape(rows * 2, columns * 3, 1)
        tiles = split_tiles(whole, (rows, columns))
        corners = [top * 2 * columns * 3 + left * 3 for top in range(rows) for left in range(columns)]
        assert tiles[:, 0, 0, 0].tolist() == corners
        assert (merge_tiles(tiles, (rows, columns)) == whole).all()


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 1), (3, 3)])
def test_merging_tiles_undoes_splitting_and_the_other_way_round(grid: tuple[int, int], array: Any) -> None:
    rows, columns = grid
    whole = array(np.random.default_rng(0).integers(0, 1000, (rows * 4, columns * 5, 2)))
    tiles = split_tiles(whole, grid)
    assert tiles.shape == (rows * columns, 4, 5, 2)
    for index in range(rows * columns):
        top, left = index // columns * 4, index % columns * 5
        assert (tiles[index] == whole[top : top + 4, left : left + 5]).all()
    assert (merge_tiles(tiles, grid) == whole).all()
    assert (split_tiles(merge_tiles(tiles, grid), grid) == tiles).all()


def test_maps_that_are_no_grid_of_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"5x6 can't be cut in 2x3"):
        split_tiles(np.zeros((5, 6, 1)), (2, 3))
    with pytest.raises(ValueError, match=r"5 tiles can't fill a grid of 2x3"):
        merge_tiles(np.zeros((5, 2, 2, 1)), (2, 3))
    with pytest.raises(ValueError, match=r"features holds 6 tiles; levels .* have 5"):
        merge_scales(torch.zeros(6, 2, 2, 1), ((1, 1), (2, 2)), (1, 1))


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("scheme", ["resize", "s2", "dynamic-s2", "tiles", "native"])
def test_tiles_are_crops_of_the_resized_image(scheme: str, resample: Image.Resampling) -> None:
    for size in [(33, 71), (71, 33), (50, 50), (1, 400), (400, 1)]:
        image, tiling = picture(*size), small(scheme)
        plan = tiling.plan(*size)
        height, width = plan.tile
        expected = []
        for rows, columns in plan.levels:
            canvas = image.resize((columns * width, rows * height), resample)
            for top in range(0, rows * height, height):
                for left in range(0, columns * width, width):
                    expected.append(np.asarray(canvas.crop((left, top, left + width, top + height))))
        assert (tiling.cut(image, plan, resample) == np.stack(expected)).all()
        assert (tiling.cut(np.asarray(image), plan, resample) == np.stack(expected)).all()


def test_the_thumbnail_comes_last_and_s2_scales_in_order() -> None:
    tiling = small("tiles")
    plan = tiling.plan(20, 56)
    assert plan == ImagePlan(((1, 2), (1, 1)), (20, 28), (1, 2), 3 * 3 * 4)
    thumbnail = np.asarray(picture(20, 56).resize((28, 20), 3))
    assert (tiling.cut(picture(20, 56), plan, 3)[-1] == thumbnail).all()
    assert small("s2").plan(9, 9).levels == ((1, 1), (3, 3))
    assert grid_levels("tiles", (2, 3), thumbnail=False) == ((2, 3),) == grid_levels("native", (2, 3))


@pytest.mark.parametrize(("fit", "left"), [("crop", 20), ("stretch", 0)])
def test_a_resized_image_may_be_cropped_instead(fit: str, left: int) -> None:
    image, tiling = picture(20, 60), Tiling("resize", (20, 20), 4, 2, fit=fit)
    expected = image.crop((left, 0, 60 - left, 20)).resize((20, 20), 3)
    assert (tiling.cut(image, tiling.plan(20, 60), 3)[0] == np.asarray(expected)).all()


def test_a_resized_image_may_be_padded_to_a_square() -> None:
    tiling = Tiling("resize", (20, 20), 4, 2, fit="pad", background=(7, 8, 9))
    tile = tiling.cut(np.full((10, 20, 3), 200, np.uint8), tiling.plan(10, 20), 3)[0]
    assert (tile[5:15] == 200).all() and (tile[:5] == (7, 8, 9)).all() and (tile[15:] == (7, 8, 9)).all()


# Scales


def area_pool(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each output is the mean of the inputs that its area touches, in float64."""
    pooled = np.zeros((height, width, x.shape[2]))
    for i in range(height):
        for j in range(width):
            top, bottom = i * x.shape[0] // height, -(-(i + 1) * x.shape[0] // height)
            left, right = j * x.shape[1] // width, -(-(j + 1) * x.shape[1] // width)
            pooled[i, j] = x[top:bottom, left:right].mean((0, 1))
    return pooled


@pytest.mark.parametrize(
    ("levels", "grid"),
    [(((1, 1), (2, 2), (3, 3)), (1, 1)), (((1, 1), (2, 2), (3, 4)), (3, 4)), (((1, 1), (2, 2), (1, 5)), (1, 5))],
)
def test_scales_are_merged_as_area_pooling_by_hand(levels: Any, grid: tuple[int, int]) -> None:
    h, w, channels = 4, 5, 3
    counts = [rows * columns for rows, columns in levels]
    features = torch.randn(sum(counts), h, w, channels, dtype=torch.float64)
    blocks = merge_scales(features, levels, grid)
    assert blocks.shape == (grid[0] * grid[1], h, w, channels * len(levels))
    start = 0
    for level, (rows, columns) in enumerate(levels):
        whole = np.zeros((rows * h, columns * w, channels))
        for index in range(rows * columns):
            top, left = index // columns * h, index % columns * w
            whole[top : top + h, left : left + w] = features[start + index]
        start += rows * columns
        expected = area_pool(whole, grid[0] * h, grid[1] * w)
        for index, block in enumerate(blocks):
            top, left = index // grid[1] * h, index % grid[1] * w
            of_level = block[..., level * channels : (level + 1) * channels].numpy()
            np.testing.assert_allclose(of_level, expected[top : top + h, left : left + w], atol=1e-12)


def test_every_scale_of_a_block_shows_the_same_place() -> None:
    """Features that hold their own place in the image, from 0 to 1, still do after merging, whatever the scale."""
    plan = Tiling(r=2, **NVILA).plan(768, 1024)
    tiles = []
    for rows, columns in plan.levels:
        y, x = np.meshgrid((np.arange(rows * 8) + 0.5) / (rows * 8), (np.arange(columns * 8) + 0.5) / (columns * 8))
        tiles.append(split_tiles(np.stack([y.T, x.T], axis=-1), (rows, columns)))
    blocks = merge_scales(torch.from_numpy(np.concatenate(tiles)), plan.levels, plan.grid)
    places = merge_tiles(blocks, plan.grid).unflatten(-1, (3, 2))  # [rows, columns, level, (y, x)]
    torch.testing.assert_close(places[:, :, 0], places[:, :, 2], atol=0.5 / 8, rtol=0)
    torch.testing.assert_close(places[:, :, 1], places[:, :, 2], atol=0.5 / 16, rtol=0)
    constant = merge_scales(torch.full((17, 3, 3, 2), 0.25), plan.levels, plan.grid)
    torch.testing.assert_close(constant, torch.full_like(constant, 0.25))


# Native sizes


def test_native_sizes_are_qwens_where_it_takes_the_image() -> None:
    tiling = Tiling("native", (28, 28), 14, 2, min_patches=16, max_patches=1280)
    compared = 0
    for height, width in sizes(10_000):
        on_edge = any(is_square(Fraction(tokens * height, width)) for tokens in (4, 320))  # where floats err
        if min(height, width) > 14 and max(height, width) <= 200 * min(height, width) and not on_edge:
            expected = smart_resize(height, width, 28, 16 * 14 * 14, 1280 * 14 * 14)
            if expected[0] * expected[1] <= 1280 * 14 * 14:  # with long strips it passes its own maximum
                rows, columns = tiling.plan(height, width).grid
                assert (rows * 14, columns * 14) == expected, (height, width)
                compared += 1
    assert compared > 3500


def is_square(x: Fraction) -> bool:
    return all(math.isqrt(part) ** 2 == part for part in (x.numerator, x.denominator))


def test_native_keeps_the_size_of_images_within_bounds() -> None:
    tiling = Tiling("native", (28, 28), 14, 2, min_patches=64, max_patches=1024)
    image = picture(280, 420)
    assert tiling.plan(280, 420).grid == (20, 30)
    pixels = tiling.cut(image, tiling.plan(280, 420), 3)
    assert (merge_tiles(pixels, (20, 30)) == np.asarray(image)).all()
    assert tiling.plan(56, 56).grid == (8, 8), "too small: scaled up"
    assert tiling.plan(2800, 2800).grid == (32, 32), "too large: scaled down to all that fits"


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (3, 9000)])
def test_native_sizes_of_lines_stay_between_one_token_and_the_maximum(size: tuple[int, int]) -> None:
    for r, least, most in [(1, 1, 16), (2, 16, 16), (2, 4, 4), (3, 9, 1000)]:
        rows, columns = Tiling("native", (14, 14), 14, r, min_patches=least, max_patches=most).plan(*size).grid
        assert r <= min(rows, columns) and rows * columns <= most and rows % r == 0 == columns % r


# Lower resolutions


def lowered(tiling: Tiling) -> list[Tiling]:
    steps = [tiling]
    while (lower := steps[-1].lower()) is not None:
        steps.append(lower)
    return steps


@pytest.mark.parametrize("scheme", [scheme for scheme in TILINGS if scheme != "anyres"])
def test_lower_resolutions_never_have_more_tokens_and_end_at_one(scheme: str) -> None:
    for options in ({}, {"r": 3}, {"tile": (37, 90)}, {"tile": (90, 30)}):
        steps = lowered(small(scheme, **options))
        for size in sizes(30):
            tokens = [step.plan(*size).tokens for step in steps]
            assert tokens == sorted(tokens, reverse=True), (size, options)
            assert tokens[-1] == 1


def test_lower_resolutions_of_anyres_end_at_two_tokens_and_a_newline() -> None:
    steps = lowered(small("anyres"))
    assert steps[-1].plan(50, 50).tokens == 1 + 1 + 1
    assert {step.tile for step in steps if step.plan(9, 90).tiles > 2} == {(12, 12)}


def test_a_lower_tile_is_one_token_shorter_and_keeps_its_aspect_ratio() -> None:
    steps = [step.tile for step in lowered(Tiling("resize", (28 * 12, 28 * 16), 14, 2))]
    assert [height // 28 for height, _ in steps] == list(range(12, 0, -1))
    assert all(abs(width / 28 - height / 28 * 16 / 12) <= 0.5 for height, width in steps)
    assert Tiling("resize", (384, 384), 14, 2).lower() == Tiling("resize", (364, 364), 14, 2, aspect=1.0)


def test_fewer_tiles_lower_the_minimum_to_a_square() -> None:
    grids = [step.plan(900, 900).grid for step in lowered(Tiling(r=2, **NVILA))[:12]]
    assert grids == [(3, 3)] * 4 + [(2, 2)] * 5 + [(1, 1)] * 3
    tiles = lowered(Tiling("tiles", (448, 448), 14, 2, min_tiles=6, max_tiles=7))
    assert [(step.min_tiles, step.max_tiles) for step in tiles[:7]] == [(6, 7), (6, 6), (4, 5), (4, 4)] + [
        (1, most) for most in (3, 2, 1)
    ]


@pytest.mark.parametrize("scheme", ["resize", "s2", "tiles", "dynamic-s2", "native"])
def test_a_fixed_number_of_tokens_a_tile_is_only_lowered_by_tiles(scheme: str) -> None:
    steps = lowered(small(scheme, tokens_per_tile=5))
    assert {step.tile for step in steps} == {steps[0].tile}
    plan = steps[0].plan(300, 100)
    expected = {"dynamic-s2": math.prod(plan.grid), "tiles": plan.tiles}.get(scheme, 1)
    assert plan.tokens == 5 * expected and steps[-1].plan(300, 100).tokens == 5


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "s3"}, "scheme is 's3'; accepted: resize, s2"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"r": 0}, "r is 0"),
        ({"tile": (448, 13)}, r"tile is \(448, 13\); .* patch_size 14"),
        ({"scales": (1, 2)}, r"scales is \(1, 2\); accepted: none with scheme 'resize'"),
        ({"scheme": "s2"}, r"scales is \(\); accepted: rising multiples"),
        ({"scheme": "s2", "scales": (2, 3)}, r"scales is \(2, 3\)"),
        ({"scheme": "dynamic-s2", "scales": (1, 3, 3)}, r"scales is \(1, 3, 3\)"),
        ({"prefix_tokens": -1}, "prefix_tokens is -1"),
        ({"scheme": "s2", "scales": (1, 2), "prefix_tokens": 1}, "prefix_tokens is 1; accepted: 0 with scheme 's2'"),
        ({"scheme": "tiles", "min_tiles": 0}, "min_tiles is 0"),
        ({"scheme": "tiles", "min_tiles": 5, "max_tiles": 4}, "min_tiles is 5; accepted: 1 to max_tiles 4"),
        ({"scheme": "native", "max_patches": 3, "min_patches": 1}, r"max_patches is 3; accepted: at least r² = 4"),
        ({"scheme": "native", "min_patches": 5000}, "min_patches is 5000; accepted: 1 to max_patches 4096"),
        ({"scheme": "anyres"}, "r is 2; accepted: 1 with scheme 'anyres'"),
        ({"scheme": "anyres", "r": 1, "tokens_per_tile": 4}, "tokens_per_tile is 4; accepted: None"),
        ({"anyres_grids": ((1, 0),)}, r"anyres_grids is \(\(1, 0\),\)"),
        ({"tokens_per_tile": 0}, "tokens_per_tile is 0"),
        ({"anyres_max_tiles": 0}, "anyres_max_tiles is 0"),
        ({"fit": "cover"}, "fit is 'cover'; accepted: stretch, crop, pad"),
    ],
)
def test_a_wrong_field_is_named(options: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"scheme": "resize", "tile": (448, 448), "patch_size": 14, "r": 2}
    with pytest.raises(ValueError, match=message):
        Tiling(**(fields | options))
