"""Controls, that a method has to beat: visual tokens dropped at random, and those dropped that FastV would keep."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from .base import Pruner, Selection, Sight, check_keep, check_layers


@dataclass(frozen=True)
class Random(Pruner):
    """Keeps any visual tokens.

    Attributes:
        layer: the first layer that reads fewer visual tokens.
        keep: fraction of the visual tokens that is kept.
        seed: of the draws, which go on over the samples of a session.

    Raises:
        ValueError: a field is out of range.
    """

    layer: int = 2
    keep: float = 0.5
    seed: int = 0
    scored_by: ClassVar[Literal["previous", "own", "nothing"]] = "nothing"

    def __post_init__(self) -> None:
        check_layers((self.layer,), "layer")
        check_keep(self.keep)

    @property
    def stages(self) -> tuple[int, ...]:
        return (self.layer,)

    def select(self, stage: int, sight: Sight) -> Selection:
        drawn = torch.randperm(sight.visual, generator=sight.generator)[: round(sight.visual * self.keep)]
        return Selection(drawn.sort().values)


@dataclass(frozen=True)
class Lowest(Pruner):
    """Keeps the visual tokens with the lowest scores of FastV.

    Attributes:
        layer, keep: see `FastV`.

    Raises:
        ValueError: a field is out of range.
    """

    layer: int = 2
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_layers((self.layer,), "layer")
        check_keep(self.keep)

    @property
    def stages(self) -> tuple[int, ...]:
        return (self.layer,)

    def select(self, stage: int, sight: Sight) -> Selection:
        assert sight.attention is not None
        scores = sight.attention.head_mean()[-1]
        return Selection(scores.topk(round(len(scores) * self.keep), largest=False).indices.sort().values)
