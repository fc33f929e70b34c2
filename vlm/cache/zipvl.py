"""Tokens that receive attention in more bits than the others, as many as hold most of it.

ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache Compression,
https://arxiv.org/abs/2410.08584: the cache's mixed precision; its sparse prefill is not here.
"""

from dataclasses import dataclass

import torch

from .bank import Rating
from .base import Seen
from .budget import highest
from .mixed import MixedConfig, attention_of_probes, check_fraction


@dataclass(frozen=True)
class ZipVLConfig(MixedConfig):
    """A layer's own attention says how many tokens of a prompt are salient.

    In a row of the batch they are as many as receive `tau` of the attention of the probes, those that receive most from
    each probe that sees them; the same in all heads, unless a policy keeps other tokens in each.

    Attributes:
        tau: fraction of the attention.
    """

    tau: float = 0.975

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(tau=self.tau)

    def rate(self, seen: Seen) -> Rating:
        received = attention_of_probes(seen, self.probes)
        held = received.sort(dim=-1, descending=True).values.cumsum(-1)
        counts = (held < self.tau * held[..., -1:]).sum(-1) + 1
        columns = received.shape[2]
        probes = torch.arange(columns, 0, -1, device=received.device).clamp(max=self.probes)  # that see each column
        scores = received / probes
        return Rating(scores, highest(scores, counts))
