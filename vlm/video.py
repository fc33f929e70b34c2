"""Video to tokens: which frames, how they are pooled over time, and the text that stands around them.

Each frame is one tile; frames are averaged in groups of t (`video_pool`); a group's tokens may follow its time and are
followed by a separator (NVILA's layout, arXiv 2412.04468, section 2.1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

TIMESTAMPS = ("none", "text", "tokens")


@dataclass(frozen=True)
class VideoPlan:
    """What a video becomes.

    Attributes:
        times_s: float64 [frames], when each sampled frame is shown.
        size: (height, width) that frames are resized to, in pixels.
        grid: (rows, columns) of tiles a frame: (1, 1), with tiling `native` of patches.
        tile: (height, width) of a tile in pixels; with tiling `native` of a patch.
        tokens_per_group: tokens of a group of frames.
        text: what the video's placeholder becomes: times, placeholders and separators.
        tokens: placeholder tokens in the text.
    """

    times_s: np.ndarray
    size: tuple[int, int]
    grid: tuple[int, int]
    tile: tuple[int, int]
    tokens_per_group: int
    text: str
    tokens: int

    @property
    def frames(self) -> int:
        return len(self.times_s)


def seconds_text(time_s: float) -> str:
    """A time as words of text: `75.5s: `."""
    return f"{time_s:.1f}s: "


def time_token(number: int) -> str:
    """Name of a time token."""
    return f"<|time_{number}|>"


def time_texts(times_s: np.ndarray, group: int, timestamps: str, time_tokens: int) -> list[str]:
    """What tells the time of each group of frames, that of its first frame.

    Args:
        times_s: [frames].
        group: frames of a group.
        timestamps: `none`; `text` (seconds of the source); `tokens`: time tokens, relative to the first and the last
            frame, as in Vid2Seq (arXiv 2302.14115, section 3.1).
        time_tokens: how many time tokens there are.
    """
    starts = times_s[::group]
    if timestamps == "none":
        return [""] * len(starts)
    if timestamps == "text":
        return [seconds_text(time_s) for time_s in starts.tolist()]
    span_s = max(float(times_s[-1] - times_s[0]), 1e-9)
    bins = np.rint((starts - times_s[0]) / span_s * (time_tokens - 1)).astype(int)
    return [time_token(number) for number in bins.tolist()]


def most_frames(counts: Sequence[int], floor: int, fits: Callable[[list[int]], bool]) -> list[int] | None:
    """The largest numbers of frames that fit a budget: all videos lose frames in proportion, none under the floor.

    Args:
        counts: frames of each video.
        floor: frames that a video keeps at least, where it has as many.
        fits: whether a choice of numbers of frames fits; not less true of fewer.

    Returns:
        The frames of each video; None where even the floor does not fit.
    """

    def shrunk(longest: int) -> list[int]:
        return [max(min(count, floor), count * longest // max(counts)) for count in counts]

    if not counts:
        return [] if fits([]) else None
    low, high = 0, max(counts)
    if fits(shrunk(high)):
        return shrunk(high)
    if not fits(shrunk(low)):
        return None
    while high - low > 1:  # low fits, high does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(shrunk(middle)) else (low, middle)
    return shrunk(low)
