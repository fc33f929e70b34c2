"""A video file to what the LLM reads of it, in memory that grows with the result alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from .media import DEFAULT_LIMITS, MediaLimits, Video, iter_video
from .model import FoveateForConditionalGeneration
from .processor import FoveateProcessor
from .pruning.videos import whole_video
from .tiling import normalise, split_tiles, to_tiles
from .video import VideoPlan
from .vision import TOWER_BATCH, joined


@torch.no_grad()
def encode_video(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    source: Any,
    plan: VideoPlan,
    queries: int | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
    part: range | None = None,
) -> torch.Tensor:
    """Encodes a video chunk by chunk as it is decoded.

    Args:
        source: what `load_video` takes, or a `Video`.
        plan: what `processor.plan` or `plan_video` gave for it.
        queries: tokens a frame, with projector `resampler`.
        limits: see `media.py`.
        part: numbers of the frames that are decoded and encoded, whole groups of those that are pooled; all when None.
            What methods for whole videos drop is then left to the caller.

    Returns:
        [plan.tokens, D], what `model.encode_videos` gives of all its frames at once; within `foveate.reduce` too. Of a
        part its tokens alone.

    Raises:
        MediaError: it can't be read, or a frame can't be decoded.
    """
    is_part, part = part is not None, range(plan.frames) if part is None else part
    tail = int(model.config.tiling == "anyres" and part.stop == plan.frames)  # the newline that ends a video
    groups = -(-len(part) // model.config.video_pool[0])
    with whole_video(model) as reduced:
        chunks = _chunks(model, processor, source, plan, queries, limits, part)
        features = joined(chunks, groups * plan.tokens_per_group + tail)
        return features if is_part else reduced(features, groups, tail)


def _chunks(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    source: Any,
    plan: VideoPlan,
    queries: int | None,
    limits: MediaLimits,
    part: range,
) -> Iterator[torch.Tensor]:
    """What the LLM reads of a few frames at a time, [tokens, D]."""
    group, done = model.config.video_pool[0], part.start
    batch = group * max(1, TOWER_BATCH // group)  # whole groups
    for frames in planned_frames(processor, source, plan, batch, limits, part):
        done += len(frames)
        tiles = to_tiles(frames, plan.size, processor.resample)
        if model.config.tiling == "native":
            tiles = np.concatenate([split_tiles(frame, plan.grid) for frame in tiles])
        inputs = {"pixel_values_videos": normalise(tiles, processor.image_mean, processor.image_std).to(model.device)}
        inputs["video_grids"] = torch.tensor([[len(frames), *plan.grid]])
        if queries is not None:
            inputs["video_queries"] = torch.tensor([queries])
        [tokens] = model.encode_videos(**inputs)
        if model.config.tiling == "anyres" and done < plan.frames:
            tokens = tokens[:-1]  # the newline that ends a video
        yield tokens


def planned_frames(
    processor: FoveateProcessor,
    source: Any,
    plan: VideoPlan,
    batch: int,
    limits: MediaLimits = DEFAULT_LIMITS,
    part: range | None = None,
) -> Iterator[np.ndarray]:
    """Decodes a plan's frames, uint8 [up to batch, height, width, 3]; arguments as of `encode_video`.

    Their size may be the source's own.
    """
    some = slice(0, plan.frames) if part is None else slice(part.start, part.stop)
    if isinstance(source, Video):
        chosen = np.isin(source.timestamps_s, plan.times_s).nonzero()[0][some]
        yield from (source.frames[chosen[start : start + batch]] for start in range(0, len(chosen), batch))
        return
    size = plan.size if processor.resample == Image.Resampling.BICUBIC else None  # what decoding resizes with
    backend = processor.video_backend
    yield from iter_video(source, times_s=plan.times_s[some], size=size, backend=backend, batch=batch, limits=limits)
