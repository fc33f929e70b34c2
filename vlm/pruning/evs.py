"""EVS: of a video, the tokens that changed most from the frame before stay.

Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference, https://arxiv.org/abs/2510.14624
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from .base import check_keep
from .videos import similarities


@dataclass(frozen=True)
class EVS:
    """Keeps the first frame whole, and of all others together the tokens least like the same place a frame earlier.

    One budget for the whole video: frames in which much moves keep more, still ones may lose every token.

    Attributes:
        keep: fraction of a video's tokens that is kept, 1 - q of the paper; the first frame's at least.
        reindex: whether kept tokens get contiguous positions; the paper keeps their own.

    Raises:
        ValueError: `keep` is out of range.
    """

    keep: float = 0.5
    reindex: bool = False
    family: ClassVar[Literal["video"]] = "video"

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def select(self, video: torch.Tensor) -> torch.Tensor:
        """Which tokens stay.

        Args:
            video: [frames, tokens, D], what the LLM would read of it.

        Returns:
            bool [frames, tokens].
        """
        frames = len(video)
        return self.kept(similarities(video, [self.compared_with(frame, frames) for frame in range(frames)]))

    def compared_with(self, frame: int, frames: int) -> int | None:
        """The frame before."""
        return frame - 1 if frame else None

    def kept(self, similarity: torch.Tensor) -> torch.Tensor:
        """Which tokens stay, bool [frames, tokens], by their similarity to the frame before, [frames, tokens]."""
        frames, tokens = similarity.shape
        budget = max(tokens, int(round(frames * tokens * self.keep, 6)))
        change = 1 - similarity[1:]
        most = change.flatten().argsort(descending=True, stable=True)[: budget - tokens]
        kept = torch.zeros(frames * tokens, dtype=torch.bool, device=similarity.device)
        kept[:tokens] = True
        kept[tokens + most] = True
        return kept.unflatten(0, (frames, tokens))
