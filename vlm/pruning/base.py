"""What a pruning method inside the LLM is: what it sees, what it says, and what is told of a prefill.

A method never sees a particular model, a batch or padding: it chooses for one sample at a time.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from .scores import RaterAttention


@dataclass(frozen=True)
class Sight:
    """What a method sees of one sample when it chooses.

    Attributes:
        total: visual tokens that the LLM's first layer read in this prefill.
        states: [columns, D], what the stage's layer would read.
        columns: [visual] int64, ascending: those of the visual tokens that are still there.
        attention: of the raters to these visual tokens; None where the method asks for no scores.
        generator: for what is drawn; it goes on from stage to stage and sample to sample.
    """

    total: int
    states: torch.Tensor
    columns: torch.Tensor
    attention: RaterAttention | None
    generator: torch.Generator

    @property
    def visual(self) -> int:
        """Visual tokens that are still there."""
        return len(self.columns)

    @property
    def hidden(self) -> torch.Tensor:
        """States of the visual tokens that are still there, [visual, D]."""
        return self.states[self.columns.to(self.states.device)]


@dataclass(frozen=True)
class Selection:
    """Which visual tokens go on.

    Attributes:
        keep: [kept] int64, ascending indices of the visual tokens that are still there.
        merged: [merged, D], new states that follow the sample's last visual token, visual from then on.
        centers: [merged] int64, the visual token whose place each of them has where positions are not re-indexed.
    """

    keep: torch.Tensor
    merged: torch.Tensor | None = None
    centers: torch.Tensor | None = None


class Pruner(ABC):
    """A method that drops visual tokens between the LLM's layers, during prefill. Subclasses are frozen dataclasses.

    Attributes:
        family: where a method acts: `llm` (this class), `tower`, `video`.
        scored_by: whose attention rates: that of the layer before the stage's (`previous`), the stage's own, computed
            on its whole input (`own`), or none (`nothing`).
    """

    family: ClassVar[Literal["llm"]] = "llm"
    scored_by: ClassVar[Literal["previous", "own", "nothing"]] = "previous"

    @property
    @abstractmethod
    def stages(self) -> tuple[int, ...]:
        """The first layer, 0-based, that reads fewer tokens, of each stage; ascending, all at least 1."""

    @property
    def reindexes(self) -> bool:
        """Whether kept tokens get contiguous positions; otherwise they keep their own."""
        return False

    def raters(self, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor | None:
        """Which tokens rate: chosen once, on the input embeddings.

        Args:
            visual: [visual tokens, D].
            text: [text tokens after the last visual token, D].

        Returns:
            bool [text tokens]; None, or none of them: the last prompt token rates.
        """
        return None

    @abstractmethod
    def select(self, stage: int, sight: Sight) -> Selection:
        """Chooses at a stage; there is at least one visual token."""


@dataclass(frozen=True)
class OneStage(Pruner):
    """A method that keeps a fraction of the visual tokens before one layer.

    Attributes:
        layer: K, the first layer that reads fewer visual tokens.
        keep: fraction of the visual tokens that is kept.

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

    def budget(self, visual: int) -> int:
        """Tokens to keep of so many; halves are rounded to even numbers."""
        return round(visual * self.keep)


@dataclass(frozen=True)
class Stage:
    """What one stage kept.

    Attributes:
        layer: the first layer that read fewer tokens.
        tokens: of each sample int64 [visual], which of the visual tokens that it brought to this prefill each one is
            that went on, ascending, and -1 for merged ones; where the model is, so that no prefill waits for them.
        merged: of each sample, new tokens that this stage made.
    """

    layer: int
    tokens: tuple[torch.Tensor, ...]
    merged: tuple[int, ...]

    @property
    def kept(self) -> tuple[torch.Tensor, ...]:
        """Of each sample int64 [kept], `tokens` without merged ones, on the CPU."""
        return tuple(tokens[tokens >= 0].cpu() for tokens in self.tokens)


@dataclass(frozen=True)
class Prefill:
    """What one prefill processed; samples without padding.

    Attributes:
        past: of each sample, tokens that were in the KV cache before, at full length.
        text: of each sample, tokens that are not visual.
        given: of each sample, visual tokens in the prompt.
        visual: [layers][samples], visual tokens that each layer processed, merged ones too.
        stages: what was dropped where; a first stage at layer 0 where a method acts before the LLM.
    """

    past: tuple[int, ...]
    text: tuple[int, ...]
    given: tuple[int, ...]
    visual: tuple[tuple[int, ...], ...]
    stages: tuple[Stage, ...]


def check_keep(keep: float, name: str = "keep") -> None:
    """Raises ValueError unless it is a fraction to keep."""
    if not 0 <= keep <= 1:
        raise ValueError(f"{name} is {keep}; accepted: a fraction from 0 to 1")


def check_layers(layers: tuple[int, ...], name: str = "layers") -> None:
    """Raises ValueError unless these can be the layers of stages."""
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 1:
        raise ValueError(f"{name} is {layers}; accepted: ascending layer numbers, the first at least 1")
