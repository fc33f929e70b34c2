"""Token counts and budgets, told before a pixel is read."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.data.glyphs import encode_mp4
from foveate.vlm.planning import BudgetError, VideoSource
from foveate.vlm.processor import FoveateProcessor
from foveate.vlm.video import most_frames

SCHEMES: dict[str, dict[str, Any]] = {
    "resize": {},
    "s2": {"tiling": "s2", "s2_scales": [16, 32]},
    "dynamic-s2": {"tiling": "dynamic-s2", "s2_scales": [16, 32, 48]},
    "tiles": {"tiling": "tiles", "max_tiles": 6},
    "anyres": {"tiling": "anyres", "downsample_factor": 1},
    "native": {"tiling": "native", "max_patches": 100},
    "resampler": {"tiling": "tiles", "downsample_factor": 1, "query_tokens": 9},
    "pooled": {"video_pool": (3, 2, 1), "downsample_factor": 1},
}
SIZES = [(16, 16), (60, 40), (9, 100), (33, 35)]


def clip(frames: int, size: tuple[int, int] = (16, 24)) -> bytes:
    rng = np.random.default_rng(frames)
    return encode_mp4(rng.integers(0, 256, (frames, *size, 3), dtype=np.uint8), scale=1, fps=4)


def png(size: tuple[int, int], orientation: int | None = None) -> bytes:
    image, buffer = Image.new("RGB", size[::-1]), io.BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def counted(processor: FoveateProcessor, **media: Any) -> int:
    """Placeholder tokens of a prompt with all media."""
    text = "<image>" * len(media.get("images", [])) + "<video>" * len(media.get("videos", []))
    ids = processor(text=text, **media)["input_ids"][0]
    return sum(i in (processor.image_token_id, processor.video_token_id) for i in ids)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_plan_counts_what_the_prompt_holds(tiny: Any, name: str) -> None:
    processor = tiny.processor(**SCHEMES[name])
    images, videos = [png(size) for size in SIZES], [clip(5), clip(7, (40, 16))]
    plan = processor.plan(images, videos)
    assert plan.tokens == counted(processor, images=images, videos=videos)
    assert [video.frames for video in plan.videos] == [3, 3]
    for size, one in zip(SIZES, plan.images, strict=True):
        assert processor.plan_image(size) == one


def test_a_plan_reads_no_pixel(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor, turned = tiny.processor(**SCHEMES["tiles"]), png((16, 64), orientation=6)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were read"))
    assert processor.plan_image(turned).grid == (4, 1)
    (tmp_path / "clip.mp4").write_bytes(clip(9))
    assert processor.plan_video(tmp_path / "clip.mp4", fps=2).frames == 5
    part = processor.plan_video(tmp_path / "clip.mp4", num_frames=2, start_s=1.0, end_s=2.0)
    assert part.times_s.tolist() == [1.0, 1.75]


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_read_is_within_the_budget(tiny: Any, name: str) -> None:
    processor = tiny.processor(min_frames=2, **SCHEMES[name])
    images, videos = [png(size) for size in SIZES[:3]], [VideoSource(clip(12), 12), VideoSource(clip(30, (24, 16)), 20)]
    whole = processor.plan(images, videos).tokens
    seen = set()
    for budget in sorted({whole, whole - 1, *np.linspace(12, whole, 12).astype(int).tolist()}):
        try:
            plan = processor.plan(images, videos, max_visual_tokens=budget)
        except BudgetError as error:
            assert f"max_visual_tokens is {budget}, too few" in str(error)
            continue
        assert plan.tokens == counted(processor, images=images, videos=videos, max_visual_tokens=budget) <= budget
        seen.add(plan.tokens)
    assert whole in seen and len(seen) > 3


def test_frames_are_lost_before_resolution(tiny: Any) -> None:
    processor = tiny.processor(min_frames=4, image_size=(32, 32))  # 16 tokens an image, and a frame
    image, videos = (50, 50), [VideoSource(clip(8), 8), VideoSource(clip(32), 32)]

    def planned(budget: int) -> tuple[list[int], tuple[int, int]]:
        plan = processor.plan([image], videos, max_visual_tokens=budget)
        return [video.frames for video in plan.videos], plan.image_tiling.tile

    assert planned(16 * 41) == ([8, 32], (32, 32))
    assert planned(16 * 41 - 1) == ([7, 31], (32, 32))  # in proportion: 8 · 31 / 32
    assert planned(16 * 21) == ([4, 16], (32, 32))
    assert planned(16 * 20) == ([4, 15], (32, 32))  # no video under min_frames
    assert planned(16 * 9) == ([4, 4], (32, 32))
    assert planned(16 * 9 - 1) == ([4, 10], (24, 24))  # 9 tokens each now, so frames come back: 1 + 4 + 10 of them
    assert planned(9) == ([4, 4], (8, 8))
    with pytest.raises(BudgetError, match="too few for a text's media even at the lowest resolution and 4 frames"):
        planned(8)


def test_one_batch_has_one_resolution_and_frames_by_text(tiny: Any) -> None:
    processor = tiny.processor(min_frames=1, max_visual_tokens=16)  # 4 tokens a frame or image
    frames = np.zeros((6, 16, 16, 3), np.uint8)
    inputs = processor(text=["<video>", "<image> <video>"], images=[frames[0]], videos=[frames, frames], padding=True)
    assert [(row == processor.video_token_id).sum().item() for row in inputs["input_ids"]] == [16, 12]
    assert inputs["pixel_values_videos"].shape == (7, 3, 16, 16)


def test_a_video_keeps_evenly_spaced_frames(tiny: Any) -> None:
    processor = tiny.processor(min_frames=1)
    frames = np.stack([np.full((16, 16, 3), value, np.uint8) for value in range(0, 200, 20)])
    for video in (frames, list(frames)):
        inputs = processor(text="<video>", videos=[video], max_visual_tokens=4 * 4, return_tensors="pt")
        values = (inputs["pixel_values_videos"][:, 0, 0, 0] * 127.5 + 127.5).round().tolist()
        assert values == [0, 60, 120, 180]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_visual_tokens": 0}, "max_visual_tokens is 0; accepted: 1 or more"),
        ({"min_frames": 0}, "min_frames is 0; accepted: 1 or more"),
        ({"timestamps": "clock"}, "timestamps is 'clock'; accepted: none, text, tokens"),
        (
            {"tiling": "s2", "s2_scales": [32, 64]},
            r"image_size is \(16, 16\); accepted: the first of s2_scales \[32, 64\]",
        ),
        ({"tile_separator": "\n"}, "with tiling 'resize'; accepted: with 'tiles' alone"),
        ({"tiling": "mosaic"}, "scheme is 'mosaic'; accepted: resize, s2"),
        ({"tiling": "tiles", "min_tiles": 9, "max_tiles": 4}, "min_tiles is 9; accepted: 1 to max_tiles 4"),
    ],
)
def test_a_wrong_setting_is_named(tiny: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.processor(**options)


def test_most_frames_equals_a_search_over_all_lengths() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts = rng.integers(1, 40, rng.integers(1, 4)).tolist()
        floor, budget, each = int(rng.integers(1, 6)), int(rng.integers(0, 300)), rng.integers(1, 9, len(counts))

        def cost(frames: list[int], each: np.ndarray = each) -> int:
            return int(np.dot(frames, each))

        options = [
            [max(min(count, floor), count * longest // max(counts)) for count in counts]
            for longest in range(max(counts), -1, -1)
        ]
        fitting = [frames for frames in options if cost(frames) <= budget]
        found = most_frames(counts, floor, lambda frames, most=budget: cost(frames) <= most)
        assert found == (fitting[0] if fitting else None)


def test_text_around_media(tiny: Any) -> None:
    options = {"image_start": "<img>", "image_end": "</img>", "tiling": "tiles", "tile_separator": "|", "max_tiles": 2}
    processor = tiny.processor(**options)
    four = "<image>" * 4
    texts = processor.read_media([[Image.new("RGB", (40, 16))]], [[]])[0].image_texts
    assert texts == (f"<img>{four}|{four}|{four}</img>",)
    layout = {
        "frame_start": "Frame{number}: <",
        "frame_end": ">",
        "frame_separator": ", ",
        "last_frame_separator": False,
    }
    text = tiny.processor(**layout).plan_video(np.zeros((2, 16, 16, 3), np.uint8)).text
    assert text == f"Frame1: <{'<video>' * 4}>, Frame2: <{'<video>' * 4}>"
