"""DyCoke's temporal merging: of similar frames of a video only what differs stays.

DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models (CVPR 2025),
https://arxiv.org/abs/2411.15024, section 3.2. What it does in decode stands in `dycoke_decode.py`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from .base import check_keep
from .videos import similarities


@dataclass(frozen=True)
class DyCoke:
    """Temporal merging, in groups of four frames: the second and the fourth are compared with the frame before, the
    third with the first; of each the tokens stay that are least like the same place of the other frame.

    Attributes:
        keep: fraction kept of the tokens of a frame that is compared, 1 - k of the paper. A group's first frame stays
            whole, so that of a video (1 + 3 · keep) / 4 stay.
        last_group: whether the third frame of the last four is compared as well; the published code leaves it whole.
        reindex: whether kept tokens get contiguous positions, as the paper's LLM sees them.

    Raises:
        ValueError: `keep` is out of range.
    """

    keep: float = 0.3
    last_group: bool = True
    reindex: bool = True
    family: ClassVar[Literal["video"]] = "video"

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def select(self, video: torch.Tensor) -> torch.Tensor:
        """Which tokens stay.

        Args:
            video: [frames, tokens, D], what the LLM would read of it; any number of frames.

        Returns:
            bool [frames, tokens].
        """
        return self.kept(self._similarity(video))

    def kept(self, similarity: torch.Tensor) -> torch.Tensor:
        """Which tokens stay, bool [frames, tokens], by their similarity to the other frame, [frames, tokens]."""
        kept = torch.zeros_like(similarity, dtype=torch.bool)
        for frame, tokens in zip(kept, self._ranked(similarity), strict=True):
            frame[tokens] = True
        return kept

    def ranked(self, video: torch.Tensor) -> list[torch.Tensor]:
        """The kept tokens of each frame, [kept] int64: all in order, or of a compared frame the least similar first.

        Args:
            video: see `select`.
        """
        return self._ranked(self._similarity(video))

    def _similarity(self, video: torch.Tensor) -> torch.Tensor:
        return similarities(video, [self.compared_with(frame, len(video)) for frame in range(len(video))])

    def _ranked(self, similarity: torch.Tensor) -> list[torch.Tensor]:
        frames, tokens = similarity.shape
        budget = int(round(self.keep * tokens, 6))  # 0.3 of 10 is 3, whatever 1 - 0.7 is
        every = torch.arange(tokens, device=similarity.device)
        return [
            every if self.compared_with(number, frames) is None else of_frame.argsort(stable=True)[:budget]
            for number, of_frame in enumerate(similarity)
        ]

    def compared_with(self, frame: int, frames: int) -> int | None:
        """The frame that a frame of a video is compared with; None where it stays whole."""
        if frame % 2:
            return frame - 1
        if frame % 4 == 2 and (self.last_group or frame - 2 < frames - 4):
            return frame - 2
        return None
