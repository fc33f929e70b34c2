"""The picture of kept tokens: each token stands where the pixels are that it is made of."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.vlm import FoveateProcessor
from foveate.vlm.chat import Chat
from foveate.vlm.media import Video
from foveate.vlm.planning import MediaPlan
from foveate.vlm.processor import model_fields
from foveate.vlm.pruning import EVS, FastV, reduce
from foveate.vlm.pruning.show import Picture, check_places, frame_pictures, image_pictures, kept_picture

# The model's fields, the processor's, and the image's (height, width).
IMAGES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, int]]] = {
    "resize": ({}, {"image_size": (24, 16)}, (48, 48)),
    "half-empty-squares": ({}, {"image_size": (20, 12)}, (40, 48)),
    "patches-that-do-not-fill-a-tile": ({}, {"image_size": (27, 19)}, (54, 38)),
    "columns": ({"token_order": "columns"}, {"image_size": (24, 16)}, (48, 48)),
    "cls": (
        {"tower_name": "clip_vision_model", "vision_feature_select_strategy": "full", "projector": "mlp2x"},
        {"image_size": (16, 16)},
        (64, 64),
    ),
    "tiles": ({"tiling": "tiles"}, {"image_size": (16, 16), "max_tiles": 6}, (96, 64)),
    "tiles-without-thumbnail": ({"tiling": "tiles", "thumbnail": False}, {"image_size": (16, 16)}, (40, 80)),
    "tiles-with-cls": (
        {
            "tower_name": "clip_vision_model",
            "vision_feature_select_strategy": "full",
            "projector": "mlp2x",
            "tiling": "tiles",
        },
        {"image_size": (16, 16), "max_tiles": 2},
        (32, 64),
    ),
    "s2": ({"tiling": "s2", "s2_scales": [16, 32]}, {"image_size": (16, 16)}, (64, 96)),
    "dynamic-s2": ({"tiling": "dynamic-s2", "s2_scales": [16, 32]}, {"image_size": (16, 16)}, (32, 48)),
    "s2-columns": (
        {"tiling": "s2", "s2_scales": [16, 32], "token_order": "columns"},
        {"image_size": (16, 16)},
        (64, 96),
    ),
    "anyres": ({"tiling": "anyres", "projector": "mlp2x"}, {"image_size": (16, 16)}, (36, 80)),
    "anyres-shrunk": (
        {"tiling": "anyres", "projector": "mlp2x", "anyres_max_tiles": 2},
        {"image_size": (16, 16)},
        (64, 64),
    ),
    "native": (
        {"tiling": "native", "tower_name": "siglip2_vision_model"},
        {"image_size": (16, 16), "max_patches": 64},
        (48, 24),
    ),
}


def make(tiny: Any, fields: dict[str, Any], sizes: dict[str, Any]) -> tuple[Any, FoveateProcessor]:
    """A model whose tower is its patch embedding alone, so that a token sees the pixels of its own place alone."""
    model = tiny.model(**fields, vision_feature_layer=0, dtype=torch.float64)
    processor = FoveateProcessor(tiny.tokenizer(), **(model_fields(model.config) | {"max_tiles": 12} | sizes))
    return model, processor


def cells_of(picture: Picture) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Each token, and the middle half of its box (top, bottom, left, right) in pixels, at least one."""
    found = []
    for row, tokens in enumerate(picture.tokens.tolist()):
        for column, token in enumerate(tokens):
            edges = []
            for start, end in (picture.tops[row : row + 2], picture.lefts[column : column + 2]):
                edges += [start + (end - start) // 4, max(start + (end - start) // 4 + 1, end - (end - start) // 4)]
            found.append((token, (edges[0], edges[1], edges[2], edges[3])))
    return found


@pytest.mark.parametrize("topology", IMAGES)
def test_an_image_token_stands_where_its_pixels_are(tiny: Any, topology: str) -> None:
    fields, sizes, (height, width) = IMAGES[topology]
    model, processor = make(tiny, fields, sizes)
    grey = np.full((height, width, 3), 128, np.uint8)
    image = Image.fromarray(grey)
    plan = processor.plan([(height, width)])
    pictures = image_pictures(image, plan.images[0], plan.image_tiling, processor.resample, model.config.token_order)
    seen = [token for picture in pictures for token in picture.tokens.flatten().tolist()]
    assert len(seen) == len(set(seen)) and max(seen) < plan.images[0].tokens
    changed, wanted = [image], []
    for picture in pictures:
        high, wide = picture.pixels.shape[:2]
        assert (picture.tops[0], picture.lefts[0], picture.tops[-1], picture.lefts[-1]) == (0, 0, high, wide)
        for token, (top, bottom, left, right) in cells_of(picture):
            pixels = grey.copy()
            rows, columns = height / high, width / wide
            box = pixels[int(top * rows) : round(bottom * rows), int(left * columns) : round(right * columns)]
            box[:] = (255, 0, 99)
            if topology == "dynamic-s2":  # its small scale has other cells: stripes that vanish in it
                box[:, ::2] = (1, 255, 157)
            changed.append(Image.fromarray(pixels))
            wanted.append((token, picture.tokens.flatten()))
    tiles = processor.cut(MediaPlan((plan.images[0],) * len(changed), (), *plan_tilings(plan)), changed)
    with torch.no_grad():
        first, *others = model.encode_images(**processor.media_inputs([tiles]))
    assert len(first) == plan.images[0].tokens
    for features, (token, tokens) in zip(others, wanted, strict=True):
        difference = (features - first).norm(dim=1)[tokens]
        assert tokens[int(difference.argmax())] == token


def plan_tilings(plan: MediaPlan) -> tuple[Any, Any]:
    return plan.image_tiling, plan.video_tiling


VIDEOS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "frames": ({}, {"image_size": (24, 16)}),
    "columns": ({"token_order": "columns"}, {"image_size": (24, 16)}),
    "in-time": ({"video_pool": [3, 1, 1]}, {"image_size": (24, 16)}),
    "in-time-and-space": ({"video_pool": [2, 2, 1], "projector": "mlp2x"}, {"image_size": (20, 16)}),
    "columns-pooled": ({"video_pool": [1, 2, 1], "projector": "mlp2x", "token_order": "columns"},
                       {"image_size": (20, 16)}),
    "anyres": ({"tiling": "anyres", "projector": "mlp2x"}, {"image_size": (16, 16)}),
    "native": ({"tiling": "native", "tower_name": "siglip2_vision_model", "video_pool": [2, 1, 1]},
               {"image_size": (16, 16), "max_patches": 32}),
}  # fmt: skip


@pytest.mark.parametrize("topology", VIDEOS)
def test_a_video_token_stands_where_its_pixels_are(tiny: Any, topology: str) -> None:
    fields, sizes = VIDEOS[topology]
    model, processor = make(tiny, fields, sizes)
    grey = np.full((4, 32, 24, 3), 128, np.uint8)
    plan = processor.plan(videos=[Video(grey, np.arange(4.0), 4.0, 1.0, 0)])
    clip = plan.videos[0]
    grey = np.full((4, *clip.size, 3), 128, np.uint8)
    pictures = frame_pictures(
        grey, range(4), clip, plan.video_tiling, model.config.video_pool, model.config.token_order
    )
    assert [picture.title for picture in pictures] == ["0.0 s", "1.0 s", "2.0 s", "3.0 s"]
    seen = {token for picture in pictures for token in picture.tokens.flatten().tolist()}
    assert seen == set(range(clip.tokens - (topology == "anyres")))

    clips, wanted = [grey], []
    for frame, picture in enumerate(pictures):
        for token, (top, bottom, left, right) in cells_of(picture):
            clips.append(grey.copy())
            clips[-1][frame, top:bottom, left:right] = (255, 0, 99)
            wanted.append(token)
    videos = [[Video(frames, clip.times_s, 4.0, 1.0, 0)] for frames in clips]
    with torch.no_grad():
        inputs = processor.media_inputs(processor.read_media([[]] * len(videos), videos))
        first, *others = model.encode_videos(**inputs)
    for features, token in zip(others, wanted, strict=True):
        assert int((features - first).norm(dim=1).argmax()) == token


def test_tokens_without_places_are_refused(tiny: Any) -> None:
    _, processor = make(tiny, {"projector": "resampler", "resampler_tokens": 6}, {"image_size": (16, 16)})
    with pytest.raises(ValueError, match="without places in the picture; accepted: projectors that give tokens of"):
        check_places(processor.image_tiling)


def panel_light(sheet: Image.Image, panels: int) -> list[int]:
    """Of panels side by side: pixels as bright as the media, or on the line around what is kept."""
    pixels = np.asarray(sheet).astype(int)
    light = (pixels > 250).all(-1) | (pixels == (255, 184, 28)).all(-1)
    return [int(part.sum()) for part in np.split(light, panels, axis=1)]


def test_the_panels_are_lit_where_tokens_are_kept(tiny: Any) -> None:
    model, processor = tiny.model(dtype=torch.float64), tiny.processor(image_size=(16, 32))
    white = Image.new("RGB", (40, 20), "white")
    reduction = reduce(model, FastV(layer=1, keep=0.25))
    with reduction:
        chat = Chat(model, processor, [white])
        chat.ask("What?", max_new_tokens=2)
        chat.ask("And?", max_new_tokens=2)
    [prefill] = reduction.prefills
    sheet = kept_picture(chat, prefill, reduction.methods)
    assert panel_light(sheet, 2) == [288 * 144, 2 * 72 * 72]
    box = np.asarray(sheet).astype(int)[:, sheet.width // 2 :].min(-1) > 250
    rows, columns = box.nonzero()
    kept = {(int((r - 34) // 72), int((c - 8) // 72)) for r, c in zip(rows, columns, strict=True)}
    assert kept == {(int(token) // 4, int(token) % 4) for token in prefill.stages[0].kept[0]}


def test_images_and_frames_stand_in_one_picture_and_many_frames_are_chosen_from(tiny: Any) -> None:
    model, processor = tiny.model(dtype=torch.float64), tiny.processor(image_size=(16, 16))
    clips = [
        Video(np.full((count, 16, 16, 3), 255, np.uint8), np.arange(float(count)), 9.0, 1.0, 0) for count in (20, 3)
    ]
    reduction = reduce(model, EVS(keep=0.5))
    with reduction:
        chat = Chat(model, processor, [clips[0], Image.new("RGB", (8, 8)), clips[1]])
        chat.ask("What?", max_new_tokens=1)
    assert chat.visual_kinds == ["video"] * 80 + ["image"] * 4 + ["video"] * 12
    [prefill] = reduction.prefills
    sheet = kept_picture(chat, prefill, reduction.methods)
    shown = [range(4 * frame, 4 * frame + 4) for frame in (0, 3, 5, 8, 11, 14, 16, 19)] + [range(84, 96)]
    white = [token for tokens in shown for token in tokens]
    kept = set(prefill.stages[0].kept[0].tolist())
    assert len(kept) == 40 + 4 + 6
    pixels = np.asarray(sheet).astype(int)
    light = (pixels > 250).all(-1) | (pixels == (255, 184, 28)).all(-1)
    halves = [int(half.sum()) for half in np.split(light, 2, axis=0)]
    assert halves == [len(white) * 72 * 72, len(kept.intersection(white)) * 72 * 72]
