"""Images of several tiles and pooled videos through processor and model, against loops over tiles in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.vlm import model as model_module
from foveate.vlm import vision
from foveate.vlm.media import Video
from foveate.vlm.model import FoveateForConditionalGeneration
from foveate.vlm.processor import FoveateProcessor, model_fields

PATCH, TILE = 4, 16
S2 = {"tiling": "s2", "s2_scales": [16, 32, 48]}
DYNAMIC_S2 = {"tiling": "dynamic-s2", "s2_scales": [16, 32, 48]}
SIZES = [(16, 16), (30, 90), (200, 50), (100, 133), (1, 1)]


def made(tiny: Any, processor_options: dict | None = None, **options: Any) -> tuple[Any, FoveateProcessor]:
    tower = "siglip2_vision_model" if options.get("tiling") == "native" else "siglip_vision_model"
    model = tiny.model(tower, dtype=torch.float64, **options)
    fields = model_fields(model.config) | {"image_size": (TILE, TILE), "num_frames": 3} | (processor_options or {})
    return model, FoveateProcessor(tiny.tokenizer(), **fields)


def tower_maps(model: FoveateForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Each tile's features [tiles, 4, 4, C], the tower run on one tile at a time."""
    out = [model.vision_tower(one[None], output_hidden_states=True).hidden_states[-2][0] for one in pixels]
    return torch.stack(out).unflatten(1, (TILE // PATCH, TILE // PATCH))


def area_pooled(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[h, w, C] to [height, width, C], each cell the mean of the cells that it touches."""
    out = torch.empty(height, width, x.shape[2], dtype=x.dtype)
    for row in range(height):
        top, bottom = row * x.shape[0] // height, -(-(row + 1) * x.shape[0] // height)
        for column in range(width):
            left, right = column * x.shape[1] // width, -(-(column + 1) * x.shape[1] // width)
            out[row, column] = x[top:bottom, left:right].mean((0, 1))
    return out


def joined(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.cat([torch.cat(list(tiles[row * columns : (row + 1) * columns]), 1) for row in range(rows)], 0)


def s2_by_loops(model: Any, tiles: torch.Tensor, levels: list[tuple[int, int]], grid: tuple[int, int]) -> torch.Tensor:
    """The tokens of one image's map, [rows, columns, D]."""
    maps, side = tower_maps(model, tiles), TILE // PATCH
    scales, start = [], 0
    for rows, columns in levels:
        level = joined(maps[start : start + rows * columns], rows, columns)
        scales.append(area_pooled(level, grid[0] * side, grid[1] * side))
        start += rows * columns
    together = torch.cat(scales, -1)
    blocks = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            block = together[row * side : (row + 1) * side, column * side : (column + 1) * side]
            tokens = model.multi_modal_projector(block.flatten(0, 1)[None], (side, side))[0]
            r = model.config.downsample_factor
            blocks.append(tokens.unflatten(0, (-(-side // r), -(-side // r))))
    return joined(torch.stack(blocks), *grid)


@pytest.mark.parametrize("projector", ["mlp2x", "downsample-2x2", "downsample-3x3"])
@pytest.mark.parametrize("scheme", [S2, DYNAMIC_S2])
def test_s2_equals_loops_over_tiles_and_scales(tiny: Any, scheme: dict, projector: str) -> None:
    model, processor = made(tiny, {"max_tiles": 12}, projector=projector, **scheme)
    images = [tiny.image(seed, size) for seed, size in enumerate(SIZES)]
    inputs = processor(text="<image>" * len(images), images=images, return_tensors="pt")
    pixels = inputs["pixel_values"].double()
    with torch.no_grad():
        given = model.encode_images(pixels, inputs["image_grids"])
        start = 0
        for image, tokens in zip(images, given, strict=True):
            plan = processor.plan_image((image.height, image.width))
            tiles = pixels[start : start + plan.tiles]
            start += plan.tiles
            expected = s2_by_loops(model, tiles, list(plan.levels), plan.grid).flatten(0, 1)
            torch.testing.assert_close(tokens, expected)
            assert len(tokens) == plan.tokens
    assert start == len(pixels)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == sum(len(tokens) for tokens in given)


def test_tiles_and_their_thumbnail_are_read_one_after_another(tiny: Any) -> None:
    model, processor = made(tiny, {"max_tiles": 6}, tiling="tiles")
    image = tiny.image(0, (40, 90))
    inputs = processor(text="<image>", images=image, return_tensors="pt")
    assert inputs["image_grids"].tolist() == [[1, 2]]
    resized = np.asarray(image.resize((32, 16), Image.Resampling.BICUBIC))
    cuts = [resized[:, :16], resized[:, 16:], np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))]
    pixels = torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2).double() / 255 * 2 - 1
    torch.testing.assert_close(inputs["pixel_values"].double(), pixels, atol=1e-6, rtol=0)
    with torch.no_grad():
        maps = tower_maps(model, pixels).flatten(1, 2)
        expected = model.multi_modal_projector(maps, (4, 4)).flatten(0, 1)
        (tokens,) = model.encode_images(pixels, inputs["image_grids"])
    torch.testing.assert_close(tokens, expected)


def test_native_images_keep_their_aspect_ratio(tiny: Any) -> None:
    model, processor = made(tiny, {"max_patches": 64}, tiling="native")
    images = [tiny.image(seed, size) for seed, size in enumerate([(16, 40), (24, 24), (300, 100)])]
    inputs = processor(text="<image>" * 3, images=images, return_tensors="pt")
    grids = inputs["image_grids"].tolist()
    assert grids[:2] == [[4, 10], [6, 6]]
    assert grids[2][0] * grids[2][1] <= 64 and 2 < grids[2][0] / grids[2][1] < 4
    with torch.no_grad():
        together = model.encode_images(inputs["pixel_values"].double(), inputs["image_grids"])
        for image, grid, tokens in zip(images, grids, together, strict=True):
            alone = processor(text="<image>", images=image, return_tensors="pt")
            (expected,) = model.encode_images(alone["pixel_values"].double(), alone["image_grids"])
            torch.testing.assert_close(tokens, expected)
            assert len(tokens) == grid[0] * grid[1] // 4


@pytest.mark.parametrize("pool", [(2, 1, 1), (4, 1, 1), (1, 2, 2), (3, 2, 1)])
def test_pooled_videos_equal_means_of_their_frames_tokens(tiny: Any, pool: tuple[int, int, int]) -> None:
    model, processor = made(tiny, video_pool=pool, projector="mlp2x")
    clips = [np.stack([np.asarray(tiny.image(10 * n + f)) for f in range(frames)]) for n, frames in ((1, 7), (2, 4))]
    inputs = processor(text="<video> and <video>", videos=clips, return_tensors="pt")
    pixels, start = inputs["pixel_values_videos"].double(), 0
    t, h, w = pool
    with torch.no_grad():
        given = model.encode_videos(pixels, inputs.get("video_grids"))
        given = list(torch.cat(given).split([processor.plan_video(clip).tokens for clip in clips]))
        for clip, tokens in zip(clips, given, strict=True):
            maps = tower_maps(model, pixels[start : start + len(clip)]).flatten(1, 2)
            maps = model.multi_modal_projector(maps, (4, 4)).unflatten(1, (4, 4))
            start += len(clip)
            expected = [
                maps[f : f + t, r : r + h, c : c + w].mean((0, 1, 2))
                for f in range(0, len(clip), t)
                for r in range(0, 4, h)
                for c in range(0, 4, w)
            ]
            torch.testing.assert_close(tokens, torch.stack(expected))
    assert (inputs["input_ids"] == processor.video_token_id).sum() == sum(map(len, given))


def test_frames_repeat_their_features_over_the_scales(tiny: Any) -> None:
    model, processor = made(tiny, **DYNAMIC_S2)
    frames = np.stack([np.asarray(tiny.image(f)) for f in range(2)])
    inputs = processor(text="<video>", videos=frames, return_tensors="pt")
    pixels = inputs["pixel_values_videos"].double()
    with torch.no_grad():
        (tokens,) = model.encode_videos(pixels)
        maps = tower_maps(model, pixels).flatten(1, 2).repeat(1, 1, 3)
        torch.testing.assert_close(tokens, model.multi_modal_projector(maps, (4, 4)).flatten(0, 1))


OPTIONS = {
    "resize": {},
    "s2": S2,
    "dynamic-s2": DYNAMIC_S2,
    "tiles": {"tiling": "tiles"},
    "native": {"tiling": "native"},
    "resampler": {"projector": "resampler", "resampler_tokens": 6, "tiling": "tiles"},
    "pool": {"projector": "pool-2x2"},
    "anyres": {"tiling": "anyres", "projector": "mlp2x"},
    "pooled video": {"video_pool": (2, 1, 1)},
    "pooled native video": {"video_pool": (2, 2, 2), "tiling": "native"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_few_tiles_at_a_time_give_the_same_features(tiny: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = made(tiny, {"max_tiles": 4}, **OPTIONS[name])
    images, clip = [tiny.image(s, (20, 50)) for s in range(4)], np.stack([np.asarray(tiny.image(s)) for s in range(9)])
    inputs = processor(text="<image>" * 4 + "<video>", images=images, videos=clip, return_tensors="pt").to(
        torch.float64
    )
    counts = []
    run = {name: getattr(vision, name) for name in ("run_tower", "run_native_tower")}

    def counted(name: str) -> Any:
        def call(tower: Any, config: Any, pixels: torch.Tensor, *grids: torch.Tensor) -> Any:
            counts.append(len(grids[0]) if grids else len(pixels))
            return run[name](tower, config, pixels, *grids)

        return call

    for function in run:
        monkeypatch.setattr(vision, function, counted(function))
    monkeypatch.setattr(model_module, "TOWER_BATCH", 3)
    with torch.no_grad():
        chunked = model(**inputs).logits
    assert max(counts) <= 3
    counts.clear()
    whole = model(**inputs).logits  # with gradients: one call for images, one for frames
    assert len(counts) == 2
    torch.testing.assert_close(chunked, whole.detach())


@pytest.mark.parametrize("name", OPTIONS)
def test_generation_encodes_media_once_whatever_the_beams(tiny: Any, name: str) -> None:
    model, processor = made(tiny, {"max_tiles": 4}, **OPTIONS[name])
    images, clip = [tiny.image(s, (20, 50)) for s in range(2)], np.stack([np.asarray(tiny.image(s)) for s in range(3)])
    texts = ["<image> what <video>", "<image>"]
    inputs = processor(text=texts, images=images, videos=clip, padding=True).to(torch.float64)
    greedy = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    one = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2, num_return_sequences=2)
    assert one.shape[0] == 4 and greedy.shape[0] == 2
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
        logits[:, model.generation_config.suppress_tokens] = -torch.inf
    assert greedy[:, inputs["input_ids"].shape[1]].tolist() == logits.argmax(-1).tolist()


def test_any_number_of_queries_at_inference(tiny: Any) -> None:
    model, processor = made(tiny, projector="resampler", resampler_tokens=6)
    image = tiny.image(0)
    features = {}
    for queries in (1, 3, 6, None):
        inputs = processor(text="a <image> b", images=image, query_tokens=queries, return_tensors="pt")
        assert (inputs["input_ids"] == processor.image_token_id).sum() == (queries or 6)
        with torch.no_grad():
            (features[queries],) = model.encode_images(
                inputs["pixel_values"].double(), image_queries=inputs["image_queries"]
            )
            assert model(**inputs.to(torch.float64)).logits.isfinite().all()
    assert features[1].shape == (1, 32)
    torch.testing.assert_close(features[3], features[6][:3])
    with pytest.raises(ValueError, match="query_tokens is 7; accepted: 1 to 6"):
        processor(text="<image>", images=image, query_tokens=7)
    with pytest.raises(ValueError, match="query_tokens is 2; accepted: None: the projector is no resampler"):
        tiny.processor()(text="<image>", images=image, query_tokens=2)


def test_grids_that_do_not_fit_the_pixels_are_told(tiny: Any) -> None:
    model, _ = made(tiny, **DYNAMIC_S2)
    pixels = torch.zeros(13, 3, TILE, TILE, dtype=torch.float64)
    with pytest.raises(ValueError, match="image_grids tell of 14 tiles, but 13 were given"):
        model.encode_images(pixels, torch.tensor([[3, 3]]))
    with pytest.raises(ValueError, match=r"image_grids is None; this model accepts \[media, 2\]"):
        model.encode_images(pixels)
    pooled, _ = made(tiny, video_pool=(2, 1, 1))
    with pytest.raises(ValueError, match=r"video_grids is None; this model accepts \[media, 3\]"):
        pooled.encode_videos(pixels)
    with pytest.raises(ValueError, match="video_grids tell of 12 tiles, but 13 were given"):
        pooled.encode_videos(pixels, torch.tensor([[12, 1, 1]]))


def test_a_saved_model_of_several_scales_is_the_same(tiny: Any, tmp_path: Any) -> None:
    for name in ("dynamic-s2", "resampler", "pooled native video"):
        model, processor = made(tiny, {"max_tiles": 5}, **OPTIONS[name])
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        loaded = FoveateForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.float64)
        again = FoveateProcessor.from_pretrained(tmp_path / name)
        image = tiny.image(0, (30, 70))
        inputs = processor(text="<image>", images=image, return_tensors="pt").to(torch.float64)
        other = again(text="<image>", images=image, return_tensors="pt").to(torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**other).logits, model(**inputs).logits, rtol=0, atol=0)


def test_a_video_object_keeps_its_clock(tiny: Any) -> None:
    frames = np.stack([np.asarray(tiny.image(s)) for s in range(4)])
    clip = Video(frames, np.array([0.0, 2.5, 5.0, 7.5]), 10.0, 0.4, 0)
    _, processor = made(tiny, {"timestamps": "text"}, video_pool=(2, 1, 1))
    assert processor.plan_video(clip).text == f"0.0s: {'<video>' * 4}\n5.0s: {'<video>' * 4}\n"
    _, processor = made(tiny, {"timestamps": "tokens", "time_tokens": 4})
    tokens = [f"<|time_{n}|>{'<video>' * 4}\n" for n in range(4)]
    assert processor.plan_video(clip).text == "".join(tokens)
    ids = processor(text="<video>", videos=clip)["input_ids"][0]
    times = processor.tokenizer.convert_tokens_to_ids([f"<|time_{n}|>" for n in range(4)])
    assert [i for i in ids if i in times] == times


@pytest.mark.parametrize("options", [{}, S2])
def test_tokens_column_by_column(tiny: Any, options: dict) -> None:
    model, processor = made(tiny, **options)
    frames = np.stack([np.asarray(tiny.image(seed, (16, 32))) for seed in range(2)])
    inputs = processor(text="<image><video>", images=tiny.image(9), videos=frames, return_tensors="pt").to(
        torch.float64
    )
    images = {k: inputs[k] for k in ("pixel_values", "image_grids") if k in inputs}
    with torch.no_grad():
        (rows,), (video,) = model.encode_images(**images), model.encode_videos(inputs["pixel_values_videos"])
        model.config.token_order = "columns"
        (columns,), (other,) = model.encode_images(**images), model.encode_videos(inputs["pixel_values_videos"])
    order = [0, 2, 1, 3]
    torch.testing.assert_close(columns, rows[order])
    torch.testing.assert_close(other, video[[*order, *(4 + i for i in order)]])
