"""The picture of a prefill: images and frames as the model sees them, the visual tokens that were kept lit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..anyres import map_cells
from ..encode import planned_frames
from ..planning import VideoSource
from ..tiling import ImagePlan, Tiling, merge_tiles, to_tiles
from ..video import VideoPlan
from .base import Prefill

if TYPE_CHECKING:
    from ..chat import Chat

MOST_FRAMES = 16  # of all videos together
BACKGROUND, TEXT, LIGHT = (18, 18, 20), (225, 225, 225), (255, 184, 28)


@dataclass(frozen=True)
class Picture:
    """An image, a level of one, or a frame, and the visual tokens of its places.

    Attributes:
        pixels: uint8 [height, width, 3], as the model sees it.
        tokens: int64 [rows, columns], the number of each cell's token among those of the medium.
        tops, lefts: where rows and columns of cells begin, and the last one ends, in pixels.
        title: what it is, where that must be said.
    """

    pixels: np.ndarray
    tokens: np.ndarray
    tops: list[int]
    lefts: list[int]
    title: str = ""

    def lit(self, kept: np.ndarray) -> np.ndarray:
        """bool [height, width], whether the token that shows a pixel is kept.

        Args:
            kept: bool [tokens of the medium].
        """
        cells = kept[self.tokens]
        return cells.repeat(np.diff(self.tops), axis=0).repeat(np.diff(self.lefts), axis=1)


def image_pictures(
    image: Image.Image, plan: ImagePlan, tiling: Tiling, resample: int, token_order: str
) -> list[Picture]:
    """An image's levels whose tokens the LLM reads; tokens without a place (CLS, ends of rows) are in none.

    Args:
        image: RGB.
        plan: what `tiling.plan` gave for its size.
        resample: PIL's resampling filter.
        token_order: as in `FoveateConfig`.

    Raises:
        ValueError: the projector's tokens have no places.
    """
    check_places(tiling)
    tiles, (rows, columns) = tiling.cut(image, plan, resample), plan.grid
    if tiling.scheme == "native":
        cells = (rows // tiling.r, columns // tiling.r)
        return [_whole(merge_tiles(tiles, plan.grid), np.arange(math.prod(cells)).reshape(cells))]
    cells = tiling.cells
    if tiling.scheme == "anyres":
        size = (image.height, image.width)
        base = Picture(tiles[0], np.arange(math.prod(cells)).reshape(cells), *_edges(tiling, (1, 1)), "whole image")
        return [base, _anyres_map(merge_tiles(tiles[1:], plan.grid), plan, tiling, size)]
    if tiling.scheme in ("s2", "dynamic-s2"):  # one map of all scales; the largest is shown
        level = plan.levels[-1]
        pixels = merge_tiles(tiles[len(tiles) - math.prod(level) :], level)
        tokens = _in_order((rows * cells[0], columns * cells[1]), token_order)
        tops, lefts = _edges(tiling, plan.grid, scale=level[0] // rows)
        return [Picture(pixels, tokens, tops, lefts)]
    each = tiling.prefix_tokens + math.prod(cells)
    order = token_order if tiling.scheme == "resize" and not tiling.prefix_tokens else "rows"
    of_tile = tiling.prefix_tokens + _in_order(cells, order)
    pictures, first = [], 0
    for level in plan.levels:
        count = math.prod(level)
        tokens = (first + np.arange(count))[:, None, None] * each + of_tile  # [tiles, rows, columns]
        pixels = merge_tiles(tiles[first : first + count], level)
        title = "" if len(plan.levels) == 1 else "thumbnail" if first else "tiles"
        pictures.append(Picture(pixels, merge_tiles(tokens[..., None], level)[..., 0], *_edges(tiling, level), title))
        first += count
    return pictures


def frame_pictures(
    frames: np.ndarray, numbers: Sequence[int], plan: VideoPlan, tiling: Tiling, pool: Sequence[int], token_order: str
) -> list[Picture]:
    """Some frames of a video; frames that are pooled together show the same tokens.

    Args:
        frames: uint8 [shown, height, width, 3], of the plan's size.
        numbers: which of the plan's frames they are.
        plan: of the video.
        tiling: of its frames.
        pool: (frames, rows, columns), as `FoveateConfig.video_pool`.
        token_order: as in `FoveateConfig`.

    Raises:
        ValueError: the projector's tokens have no places.
    """
    check_places(tiling)
    height, width = plan.size
    whole = replace(tiling, scheme="resize", tile=plan.size)  # also of tiling `native`, whose tile is a patch
    (rows, columns), prefix = whole.cells, tiling.prefix_tokens
    tops, lefts = _edges(whole, (1, 1))
    group, *window = pool
    if plan.tokens % plan.tokens_per_group:  # anyres, which halves frames and ends a video with a newline
        rows, columns = -(-rows // 2), -(-columns // 2)
        tops, lefts = _spread(0, height, rows), _spread(0, width, columns)
    else:
        rows, columns = -(-rows // window[0]), -(-columns // window[1])
        tops, lefts = [*tops[:-1][:: window[0]], height], [*lefts[:-1][:: window[1]], width]
    cells = prefix + _in_order((rows, columns), "rows" if prefix else token_order)
    return [
        Picture(frame, number // group * plan.tokens_per_group + cells, tops, lefts, f"{plan.times_s[number]:.1f} s")
        for frame, number in zip(frames, numbers, strict=True)
    ]


def kept_picture(chat: "Chat", prefill: Prefill, methods: Sequence[Any]) -> Image.Image:
    """What a conversation's first prefill read of its media: all of it, then what each stage left.

    Args:
        chat: after its answer.
        prefill: what `Reduction.prefills` tells of it.
        methods: of the reduction.

    Raises:
        ValueError: the model's visual tokens have no places in the picture (projector `resampler`).
        MediaError: a frame can't be decoded again.
    """
    kinds = chat.visual_kinds[: prefill.given[0]]
    pictures = _pictures(chat)
    panels = []
    everything = torch.arange(prefill.given[0])
    steps = [(f"{prefill.given[0]} visual tokens", everything)]
    steps += [(_title(prefill, number, methods), stage.kept[0]) for number, stage in enumerate(prefill.stages)]
    for title, indices in steps:
        kept = np.zeros(len(kinds), dtype=bool)
        kept[indices.numpy()] = True
        of_kind = {kind: kept[[k == kind for k in kinds]] for kind in ("image", "video")}
        panels.append((title, [(picture, picture.lit(of_kind[kind][first:])) for kind, first, picture in pictures]))
    return _draw(panels)


def _pictures(chat: "Chat") -> list[tuple[str, int, Picture]]:
    """Kind, first token of the medium among those of its kind, and picture: all of the images, some of the frames."""
    config, processor, plan = chat.model.config, chat.processor, chat.plan
    pictures = []
    first = 0
    for image, one in zip([m for m in chat.media if isinstance(m, Image.Image)], plan.images, strict=True):
        levels = image_pictures(image, one, plan.image_tiling, processor.resample, config.token_order)
        pictures += [("image", first, picture) for picture in levels]
        first += one.tokens
    first, videos = 0, [m for m in chat.media if not isinstance(m, Image.Image)]
    for video, clip in zip(videos, plan.videos, strict=True):
        shares = np.linspace(0, clip.frames - 1, max(1, MOST_FRAMES // len(videos)))
        numbers = sorted(set(shares.round().astype(int).tolist()))
        source = video.source if isinstance(video, VideoSource) else video
        shown = planned_frames(processor, source, replace(clip, times_s=clip.times_s[numbers]), MOST_FRAMES)
        frames = to_tiles(np.concatenate(list(shown)), clip.size, processor.resample)
        some = frame_pictures(frames, numbers, clip, plan.video_tiling, config.video_pool, config.token_order)
        pictures += [("video", first, picture) for picture in some]
        first += clip.tokens
    return pictures


def _title(prefill: Prefill, number: int, methods: Sequence[Any]) -> str:
    stage = prefill.stages[number]
    names = [
        type(method).__name__
        for method in methods
        if (stage.layer in method.stages if method.family == "llm" else stage.layer == 0)
    ]
    where = f"layer {stage.layer} on" if stage.layer else "before the LLM"
    merged = f" + {stage.merged[0]} merged" if stage.merged[0] else ""
    return f"{', '.join(names)}, {where}: {len(stage.kept[0])}{merged} of {prefill.given[0]}"


def check_places(tiling: Tiling) -> None:
    if tiling.tokens_per_tile is not None:
        raise ValueError(
            "the projector's tokens are answers to queries, without places in the picture; accepted: projectors that "
            "give tokens of patches"
        )


def _in_order(cells: tuple[int, int], order: str) -> np.ndarray:
    """Numbers of the tokens of a map of (rows, columns), which are in the order of its rows or its columns."""
    numbers = np.arange(math.prod(cells))
    return numbers.reshape(cells) if order == "rows" else numbers.reshape(cells[::-1]).T


def _whole(pixels: np.ndarray, tokens: np.ndarray) -> Picture:
    """A picture that its cells divide evenly."""
    return Picture(pixels, tokens, _spread(0, pixels.shape[0], len(tokens)), _spread(0, pixels.shape[1], len(tokens.T)))


def _spread(start: int, end: int, parts: int) -> list[int]:
    return np.linspace(start, end, parts + 1).round().astype(int).tolist()


def _edges(tiling: Tiling, grid: tuple[int, int], scale: int = 1) -> tuple[list[int], list[int]]:
    """Tops and lefts of the cells of a grid of tiles, in pixels of that grid, made `scale` times as large.

    A tile's last cells may hold fewer patches, and what is left beside its patches.
    """
    side = tiling.r * tiling.patch_size * scale
    edges = []
    for tiles, cells, length in zip(grid, tiling.cells, tiling.tile, strict=True):
        length *= scale
        edges.append([tile * length + cell * side for tile in range(tiles) for cell in range(cells)] + [tiles * length])
    return edges[0], edges[1]


def _anyres_map(canvas: np.ndarray, plan: ImagePlan, tiling: Tiling, size: tuple[int, int]) -> Picture:
    """The tiles of an image without their padding; each row of tokens ends with a newline."""
    (top, left), (rows, columns) = map_cells(size, plan.grid, tiling.cells, tiling.anyres_max_tiles)
    tops, lefts = _edges(tiling, plan.grid)
    high, low, near, far = tops[top], tops[len(tops) - 1 - top], lefts[left], lefts[len(lefts) - 1 - left]
    tokens = math.prod(tiling.cells) + np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)
    return replace(_whole(canvas[high:low, near:far], tokens), title="tiles")


# Drawing.


def _draw(panels: Sequence[tuple[str, Sequence[tuple[Picture, np.ndarray]]]]) -> Image.Image:
    """Panels with a title each, side by side where they are small, and of few pictures."""
    count = len(panels[0][1])
    side = 288 if count == 1 else 224 if count <= 4 else 144
    columns = min(count, 8 if count > 4 else 2)
    drawn = [_panel(title, [_lit(*pair, side) for pair in pairs], columns, side) for title, pairs in panels]
    width, height = (max(panel.size[axis] for panel in drawn) for axis in (0, 1))
    across = max(1, min(len(drawn), 1200 // width))
    sheet = Image.new("RGB", (across * width, -(-len(drawn) // across) * height), BACKGROUND)
    for number, panel in enumerate(drawn):
        sheet.paste(panel, (number % across * width, number // across * height))
    return sheet


def _panel(title: str, pictures: Sequence[Image.Image], columns: int, side: int) -> Image.Image:
    gap, line = 8, 26
    heights = [max(p.height for p in pictures[i : i + columns]) + gap for i in range(0, len(pictures), columns)]
    font: Any = ImageFont.load_default(14)
    width = max(columns * (side + gap), math.ceil(font.getlength(title))) + gap
    panel = Image.new("RGB", (width, line + sum(heights) + gap), BACKGROUND)
    ImageDraw.Draw(panel).text((gap, gap), title, TEXT, font)
    tops = list(accumulate(heights, initial=line + gap))
    for number, picture in enumerate(pictures):
        panel.paste(picture, (gap + number % columns * (side + gap), tops[number // columns]))
    return panel


def _lit(picture: Picture, lit: np.ndarray, side: int) -> Image.Image:
    """A picture, its longer side `side` pixels, dimmed where nothing is kept, with a line around what is."""
    height, width = lit.shape
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    pixels = np.asarray(Image.fromarray(picture.pixels).resize(size, how)).astype(np.float32)
    mask = np.asarray(Image.fromarray(lit).resize(size, Image.Resampling.NEAREST))
    dimmed = 0.75 * np.array(BACKGROUND) + 0.25 * pixels.mean(-1, keepdims=True)
    out = np.where(mask[..., None], pixels, dimmed).astype(np.uint8)
    if not mask.all():
        inner = np.pad(mask, 1)[2:, 1:-1] & np.pad(mask, 1)[:-2, 1:-1] & np.pad(mask, 1)[1:-1, 2:]
        out[mask & ~(inner & np.pad(mask, 1)[1:-1, :-2])] = LIGHT
    caption = 18 if picture.title else 0
    drawn = Image.new("RGB", (size[0], size[1] + caption), BACKGROUND)
    drawn.paste(Image.fromarray(out))
    if picture.title:
        font: Any = ImageFont.load_default(11)
        ImageDraw.Draw(drawn).text((0, size[1] + 2), picture.title, TEXT, font)
    return drawn
