"""Keys in 1.5 bits and values in 1.58, both per channel, with the values of salient tokens in 2.

VidKV: Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models, https://arxiv.org/abs/2503.16257:
the channels of keys with the largest ranges are packed in 2 bits, the others in 1 bit after a Fourier transform along
the channels; values are ternary.

The transform here is Hartley's, the real form of Fourier's: as many real numbers go out as in, where half of those of
Fourier's say the same as the other half.
"""

from dataclasses import dataclass
from functools import cache
from math import pi
from typing import Self

import torch

from ...kernels.packed_attention import merge_attention
from .bank import TOKENS_AT_ONCE, Format, Rating, States, UniformBank
from .base import Seen
from .budget import highest
from .mixed import MixedBank, attention_of_probes, check_fraction, check_probes
from .packed import Packed, check_window

SCORES_AT_ONCE = 1 << 22  # bounds the memory (16 MiB in float32)


@dataclass(frozen=True)
class VidKVConfig:
    """Settings of a store as VidKV packs it.

    Attributes:
        anomalous: fraction of a head's channels whose keys have 2 bits, rounded to eights, of which each part has some.
        salient: fraction of a prompt's tokens whose values have 2 bits: those that receive most attention.
        probes: latest tokens of a prompt whose attention counts.
        group, residual, sink: as in `PackedConfig`.

    Raises:
        ValueError: a field is out of range.
    """

    anomalous: float = 0.5
    salient: float = 0.2
    probes: int = 64
    group: int = 32
    residual: int = 128
    sink: int = 0

    def __post_init__(self) -> None:
        check_window(self.group, self.residual, self.sink)
        check_fraction(anomalous=self.anomalous, salient=self.salient)
        check_probes(self.probes)

    def make(self, sinks: int = 0) -> Packed:
        def bank(values: float) -> VidKVBank:
            formats = (Format(bits, "channel", self.group) for bits in (2, 1, values))
            return VidKVBank(*formats, anomalous=self.anomalous)

        sink = max(sinks, self.sink)
        if not self.salient:
            return Packed(bank(1.58), self.residual, sink)
        return Packed(MixedBank(bank(2), bank(1.58)), self.residual, sink, rate=self.rate)

    def rate(self, seen: Seen) -> Rating:
        scores = attention_of_probes(seen, self.probes)
        count = torch.tensor(round(self.salient * scores.shape[2]), device=scores.device)
        return Rating(scores, highest(scores, count))


class VidKVBank(UniformBank):
    """Keys in two parts: anomalous channels as they are, and the others transformed.

    Attributes:
        anomalous: fraction of the channels.
        order: int64 [batch, kv_heads, head_dim], channels by the range of the first keys that are packed, the largest
            first; None before.
    """

    def __init__(self, *formats: Format, anomalous: float):
        super().__init__(*formats)
        self.anomalous = anomalous
        self.order: torch.Tensor | None = None

    def empty(self) -> Self:
        bank = type(self)(*self.formats, anomalous=self.anomalous)
        bank.order = self.order
        return bank

    @property
    def tensors(self) -> list[torch.Tensor]:
        return super().tensors if self.order is None else [*super().tensors, self.order]

    def divide(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.order is None:
            self.order = (keys.amax(2) - keys.amin(2)).argsort(dim=-1, descending=True)
        anomalous, normal = self._channels(keys, self.order).tensor_split((self._split(keys),), dim=-1)
        return anomalous, normal @ hartley(normal.shape[-1], normal.dtype, normal.device), values

    def join(self, parts: list[torch.Tensor]) -> States:
        anomalous, normal, values = parts
        assert self.order is not None
        keys = torch.cat([anomalous, normal @ hartley(normal.shape[-1], normal.dtype, normal.device)], dim=-1)
        return self._channels(keys, self.order.argsort(dim=-1)), values

    def _split(self, keys: torch.Tensor) -> int:
        head_dim = keys.shape[3]
        if head_dim < 16:
            raise ValueError(f"head_dim is {head_dim}; accepted by vidkv: a multiple of 8 from 16 on")
        return min(max(round(self.anomalous * head_dim / 8), 1), head_dim // 8 - 1) * 8  # in eights, as all is packed

    @staticmethod
    def _channels(keys: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return keys.gather(3, order[:, :, None].expand(-1, -1, keys.shape[2], -1))

    def attend(
        self,
        states: torch.Tensor,
        dense_keys: torch.Tensor,
        dense_values: torch.Tensor,
        scaling: float,
        packed_mask: torch.Tensor | None,
        dense_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In blocks that are dequantised, one at a time: no kernel takes keys in two parts."""
        found = [attention(states, dense_keys, dense_values, scaling, dense_mask)]
        most = SCORES_AT_ONCE // found[0][1].numel()
        step = max(min(TOKENS_AT_ONCE, most) // self.group, 1) * self.group
        for start in range(0, self.tokens, step):
            stop = min(start + step, self.tokens)
            mask = None if packed_mask is None else packed_mask[..., start:stop]
            block = attention(states, *self.dense(start, stop), scaling, mask)
            found = [merge_attention(*zip(*found, block, strict=True))]
        return found[0]

    def rows(self, index: torch.Tensor) -> None:
        super().rows(index)
        self.order = None if self.order is None else self.order[index]


def attention(
    states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention and its log-sum-exp, as `packed_attention` gives them, over dense columns only."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    batch, heads, queries, head_dim = states.shape
    q = (states.to(dtype) * scaling).reshape(batch, keys.shape[1], -1, head_dim)  # rows: heads of a group, each query
    scores = (q @ keys.to(dtype).mT).unflatten(2, (-1, queries))  # [batch, kv_heads, group, queries, columns]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    lse = scores.logsumexp(-1)
    shift = lse.masked_fill(lse == -torch.inf, 0)  # nothing is seen: exp(-inf - 0) = 0
    out = (scores - shift[..., None]).exp().flatten(2, 3) @ values.to(dtype)
    return out.view(states.shape), lse.view(batch, heads, queries)


@cache
def hartley(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[size, size], orthonormal, its own inverse: cos + sin of 2π · row · column / size."""
    step = torch.arange(size, dtype=torch.float64)
    angle = 2 * pi / size * (step[:, None] * step % size)
    return ((angle.cos() + angle.sin()) * size**-0.5).to(device, dtype)
