"""Text tokens, and pivot tokens that draw attention, in more bits than the rest of the visual ones; heads are rotated.

AKVQ-VL: Attention-Aware KV Cache Adaptive 2-Bit Quantization for Vision-Language Models,
https://arxiv.org/abs/2501.15021.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .bank import Rating
from .base import Seen
from .budget import highest
from .mixed import MixedConfig, attention_of_probes, check_fraction


@dataclass(frozen=True)
class AKVQConfig(MixedConfig):
    """The text of a prompt is salient, and its pivot tokens.

    Attributes:
        pivots: fraction of a prompt's tokens that are pivots: those that receive most attention from the probes.
    """

    needs_visual: ClassVar[bool] = True

    hadamard: bool = True
    pivots: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(pivots=self.pivots)

    def rate(self, seen: Seen) -> Rating:
        if seen.visual is None:
            raise ValueError(
                "nobody told which tokens are visual, as akvq-vl must know; accepted: foveate.reduce(model, kv=...), "
                "or KVCache.see before each prompt"
            )
        scores = attention_of_probes(seen, self.probes)
        salient = highest(scores, torch.tensor(round(self.pivots * scores.shape[2]), device=scores.device))
        visual = seen.visual[:, None].expand(-1, seen.slots.shape[1], -1).gather(2, seen.slots.clamp(min=0))
        return Rating(scores, salient | (~visual & (seen.slots >= 0)))
