"""What the media of texts become, within a budget of visual tokens, before a pixel is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .media import Video
from .tiling import ImagePlan, Tiling
from .video import VideoPlan, most_frames

Size = tuple[int, int]  # (height, width) in pixels


class BudgetError(ValueError):
    """Media that don't fit a budget of visual tokens even at the lowest resolution."""


@dataclass(frozen=True)
class VideoSource:
    """A video, and which of its frames are taken; see `media.load_video`."""

    source: Any
    num_frames: int | None = None
    fps: float | None = None
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True)
class MediaPlan:
    """What the media of one text become, told before a pixel is read.

    Attributes:
        images, videos: each one's plan, in order.
        image_tiling, video_tiling: how they are cut; with a token budget maybe at a lower resolution than usual.
    """

    images: tuple[ImagePlan, ...]
    videos: tuple[VideoPlan, ...]
    image_tiling: Tiling
    video_tiling: Tiling

    @property
    def tokens(self) -> int:
        """Visual tokens."""
        return sum(plan.tokens for plan in self.images) + sum(plan.tokens for plan in self.videos)


@dataclass(frozen=True)
class MediaTiles:
    """The media of one text as uint8 tiles.

    Attributes:
        images, frames: [tiles, height, width, 3] of all images, and of all frames of all videos.
        image_grids: int64 [images, 2]; video_grids: int64 [videos, 3]; see `FoveateForConditionalGeneration`.
        image_sizes: int64 [images, 2], each image's own (height, width) in pixels.
        queries: tokens a tile, with projector `resampler`.
        image_texts, video_texts: what each placeholder becomes.
    """

    images: np.ndarray
    frames: np.ndarray
    image_grids: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    image_sizes: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    video_grids: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64))
    queries: int | None = None
    image_texts: tuple[str, ...] = ()
    video_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clip:
    """A video whose frames are known by size and time, decoded or not."""

    wanted: VideoSource
    size: tuple[int, int]  # (height, width) of its frames
    times_s: np.ndarray
    loaded: Video | None


@dataclass(frozen=True)
class PlannedMedia:
    """The media of one text, planned but not read; `FoveateProcessor.read_image` and `read_frames` read parts of them.

    Attributes:
        plan: what they become.
        images: each image's source.
        sizes: each image's (height, width) in pixels.
        clips: the videos.
    """

    plan: MediaPlan
    images: tuple[Any, ...]
    sizes: tuple[Size, ...]
    clips: tuple[Clip, ...]

    def blank(self) -> MediaTiles:
        """The shapes of what would be read: the pixels are zeros that take no memory."""
        images, videos = self.plan.images, self.plan.videos
        frames = sum(one.frames * one.grid[0] * one.grid[1] for one in videos)
        return MediaTiles(
            _no_pixels(sum(one.tiles for one in images), images[0].tile if images else (1, 1)),
            _no_pixels(frames, videos[0].tile if videos else (1, 1)),
            np.array([one.grid for one in images], np.int64).reshape(-1, 2),
            np.array(self.sizes, np.int64).reshape(-1, 2),
            np.array([(one.frames, *one.grid) for one in videos], np.int64).reshape(-1, 3),
            self.plan.image_tiling.tokens_per_tile,
        )


def _no_pixels(tiles: int, tile: Size) -> np.ndarray:
    return np.broadcast_to(np.zeros((), np.uint8), (tiles, *tile, 3))


def thinned(frames: np.ndarray, count: int) -> np.ndarray:
    """So many of the frames (or of their times), evenly, as `sample_indices` takes them."""
    if count == len(frames):
        return frames
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(np.int64)]


def _lower(tiling: Tiling) -> Tiling | None:
    """The next lower resolution; once there are no tiles to lose, fewer queries of projector `resampler`."""
    lower = tiling.lower()
    if lower is None and (tiling.tokens_per_tile or 1) > 1:
        return replace(tiling, tokens_per_tile=int((tiling.tokens_per_tile or 1) * 0.9) or 1)
    return lower


def plan_texts(
    texts: Sequence[tuple[Sequence[Size], Sequence[Clip]]],
    image_tiling: Tiling,
    video_tiling: Tiling,
    video_plan: Callable[[int, int, np.ndarray, Tiling], VideoPlan],
    budget: int | None,
    min_frames: int,
) -> list[MediaPlan]:
    """The plans of several texts, whose media have one resolution, so that their tiles make one batch.

    Over the budget, first all videos of a text lose frames in proportion, down to `min_frames` each. Where that is not
    enough, images and frames together go one step lower in resolution (`Tiling.lower`; with projector `resampler` a
    tenth of the queries once there are no tiles to lose), and videos get back the frames that then fit; and so on.

    Args:
        texts: each one's images, by size, and videos.
        image_tiling, video_tiling: the full resolution.
        video_plan: the plan of a video from its frames' height and width, their times and a tiling.
        budget: visual tokens of each text; None: any number.
        min_frames: frames that a video keeps at least, where it has as many.

    Raises:
        BudgetError: not even the lowest resolution fits the budget.
    """

    def within(sizes: Sequence[Size], clips: Sequence[Clip]) -> MediaPlan | None:
        """A text's plan at this resolution, with the most frames that fit; None if none do."""
        images = tuple(image_tiling.plan(*size) for size in sizes)

        def plan(counts: Sequence[int]) -> MediaPlan:
            pairs = zip(clips, counts, strict=True)
            videos = (video_plan(*clip.size, thinned(clip.times_s, count), video_tiling) for clip, count in pairs)
            return MediaPlan(images, tuple(videos), image_tiling, video_tiling)

        counts = [len(clip.times_s) for clip in clips]
        if budget is None:
            return plan(counts)
        fitting = most_frames(counts, min_frames, lambda some: plan(some).tokens <= budget)
        return None if fitting is None else plan(fitting)

    while True:
        plans = [within(*text) for text in texts]
        whole = [plan for plan in plans if plan is not None]
        if len(whole) == len(plans):
            return whole
        lower = _lower(image_tiling), _lower(video_tiling)
        if lower == (None, None):
            raise BudgetError(
                f"max_visual_tokens is {budget}, too few for a text's media even at the lowest resolution and "
                f"{min_frames} frames a video (min_frames); accepted: more, or fewer media"
            )
        image_tiling, video_tiling = lower[0] or image_tiling, lower[1] or video_tiling
