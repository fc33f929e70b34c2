"""Controls, that a method has to beat: visual tokens dropped at random, and those dropped that FastV would keep."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from .base import OneStage, Selection, Sight


@dataclass(frozen=True)
class Random(OneStage):
    """Keeps any visual tokens.

    Attributes:
        layer, keep: see `FastV`.
        seed: of the draws, which go on over the samples of a session.

    Raises:
        ValueError: a field is out of range.
    """

    scored_by: ClassVar[Literal["previous", "own", "nothing"]] = "nothing"
    seed: int = 0

    def select(self, stage: int, sight: Sight) -> Selection:
        drawn = torch.randperm(sight.visual, generator=sight.generator)[: self.budget(sight.visual)]
        return Selection(drawn.sort().values)


@dataclass(frozen=True)
class Lowest(OneStage):
    """Keeps the visual tokens with the lowest scores of FastV.

    Attributes:
        layer, keep: see `FastV`.

    Raises:
        ValueError: a field is out of range.
    """

    def select(self, stage: int, sight: Sight) -> Selection:
        assert sight.attention is not None
        scores = sight.attention.head_mean()[-1]
        return Selection(scores.topk(self.budget(sight.visual), largest=False).indices.sort().values)
