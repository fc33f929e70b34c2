"""Keys and values as codes of a few bits: x ≈ zero + scale · code, rounded as in KIVI (2402.02750, §3).

Keys have outlier channels, so a scale is shared by one channel of a block of tokens; values have none, so a scale is
shared by the channels of one token. Scales and zeros are rounded to float16 before the codes are made with them: an
offset rounded afterwards would be off by more than a step where a channel lies far from zero.

From 2 bits on the codes span the numbers' range. Below, extremes would make bad levels: there are two or three of them,
at the mean and at their mean distance from it, as in VidKV (2503.16257), which takes zero for the mean.

A byte holds several codes as the digits of a number, the lowest digit first: byte j holds channels j, j + bytes,
j + 2 · bytes ... So a kernel reads contiguous halves or quarters of a head from the same bytes.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch

from .rater_attention import has_triton

CODES_PER_BYTE = {8: 1, 4: 2, 2: 4, 1.58: 5, 1: 8}  # 1.58 = log2(3): a ternary digit
WIDENED_AT_ONCE = 1 << 20  # bounds the memory: numbers widened while packing (4 MiB in float32: a CPU's cache)


def levels(bits: float) -> int:
    """The highest code."""
    return 2 if bits == 1.58 else 2 ** int(bits) - 1


def bytes_per_head(head_dim: int, bits: float) -> int:
    """Bytes for the codes of one token in one head; the last digits are unused where 5 does not divide head_dim."""
    return -(-head_dim // CODES_PER_BYTE[bits])


@dataclass
class PackedStates:
    """Codes with what turns them back into numbers; any tensor may be a strided view, contiguous in its last dim.

    Attributes:
        codes: uint8 [batch, kv_heads, tokens, bytes_per_head].
        scale, zero: float16; their shape is the subclass's.
        bits: of a code, a key of CODES_PER_BYTE.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: float

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    @property
    def head_dim(self) -> int:
        return self.codes.shape[3] * CODES_PER_BYTE[self.bits] // 8 * 8  # head_dim is a multiple of 8

    def blocks(self, start: int, stop: int) -> Self:
        """The tokens from `start` to `stop`, each a multiple of how many share a scale; a view."""
        first, last = (place * self.scale.shape[2] // max(self.tokens, 1) for place in (start, stop))
        return replace(
            self,
            codes=self.codes[:, :, start:stop],
            scale=self.scale[:, :, first:last],
            zero=self.zero[:, :, first:last],
        )

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.codes, self.scale, self.zero


@dataclass
class PackedKeys(PackedStates):
    """A scale per channel and block of tokens: scale and zero are [batch, kv_heads, tokens / group, head_dim].

    Attributes:
        group: tokens of a block.
    """

    group: int


@dataclass
class PackedValues(PackedStates):
    """A scale per token: scale and zero are [batch, kv_heads, tokens]."""


def pack_keys(keys: torch.Tensor, bits: float, group: int) -> PackedKeys:
    """Quantises each channel over blocks of `group` tokens; on CUDA by a Triton kernel, if it takes the bits.

    Args:
        keys: [batch, kv_heads, tokens, head_dim], of a floating-point type.
        bits: 8, 4, 2, 1.58 or 1.
        group: tokens of a block, which divides the tokens.

    Raises:
        ValueError: bits are none of these, head_dim is no multiple of 8, or the group does not divide the tokens.
    """
    _check(keys, bits)
    batch, heads, tokens, head_dim = keys.shape
    if group < 1 or tokens % group:
        raise ValueError(f"group is {group}; accepted: a divisor of the {tokens} tokens")
    codes = keys.new_empty(batch, heads, tokens, bytes_per_head(head_dim, bits), dtype=torch.uint8)
    scale, zero = keys.new_empty(2, batch, heads, tokens // group, head_dim, dtype=torch.float16)
    into = PackedKeys(codes, scale, zero, bits, group)
    if keys.is_cuda and has_triton():
        from . import packing_triton as kernels

        if kernels.takes(keys, bits, group):
            with torch.cuda.device(keys.device):  # Triton launches on the current device
                kernels.pack_keys_triton(keys, into)
            return into
    step = max(1, WIDENED_AT_ONCE // (batch * heads * group * head_dim))  # blocks
    for first in range(0, tokens // group, step):
        blocks = slice(first, first + step)
        block = keys[:, :, first * group : (first + step) * group].unflatten(2, (-1, group))
        packed = _quantise(block, 3, bits, scale[:, :, blocks], zero[:, :, blocks])
        codes[:, :, first * group : (first + step) * group] = packed.flatten(2, 3)
    return into


def pack_values(values: torch.Tensor, bits: float) -> PackedValues:
    """Quantises each token over its channels; on CUDA by a Triton kernel, if it takes the bits.

    Args:
        values: [batch, kv_heads, tokens, head_dim], of a floating-point type.
        bits: 8, 4, 2, 1.58 or 1.

    Raises:
        ValueError: bits are none of these, or head_dim is no multiple of 8.
    """
    _check(values, bits)
    batch, heads, tokens, head_dim = values.shape
    codes = values.new_empty(batch, heads, tokens, bytes_per_head(head_dim, bits), dtype=torch.uint8)
    scale, zero = values.new_empty(2, batch, heads, tokens, dtype=torch.float16)
    into = PackedValues(codes, scale, zero, bits)
    if values.is_cuda and has_triton():
        from . import packing_triton as kernels

        if kernels.takes(values, bits):
            with torch.cuda.device(values.device):
                kernels.pack_values_triton(values, into)
            return into
    step = max(1, WIDENED_AT_ONCE // (batch * heads * head_dim))
    for start in range(0, tokens, step):
        block = slice(start, start + step)
        codes[:, :, block] = _quantise(values[:, :, block], 3, bits, scale[:, :, block], zero[:, :, block])
    return into


def unpack_keys(packed: PackedKeys, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the codes stand for, [batch, kv_heads, tokens, head_dim]."""
    codes = unpack_codes(packed).unflatten(2, (-1, packed.group))
    return _dequantise(codes, packed.scale[:, :, :, None], packed.zero[:, :, :, None], dtype).flatten(2, 3)


def unpack_values(packed: PackedValues, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the codes stand for, [batch, kv_heads, tokens, head_dim]."""
    return _dequantise(unpack_codes(packed), packed.scale[..., None], packed.zero[..., None], dtype)


def unpack_codes(packed: PackedStates) -> torch.Tensor:
    """The codes themselves, uint8 [batch, kv_heads, tokens, head_dim]."""
    if packed.bits == 8:
        return packed.codes
    digits = range(CODES_PER_BYTE[packed.bits])
    if packed.bits == 1.58:
        places = [packed.codes // 3**digit % 3 for digit in digits]
    else:
        bits = int(packed.bits)
        places = [packed.codes >> bits * digit & levels(bits) for digit in digits]
    return torch.cat(places, -1)[..., : packed.head_dim]


def _check(states: torch.Tensor, bits: float) -> None:
    if bits not in CODES_PER_BYTE:
        raise ValueError(f"bits is {bits}; accepted: {', '.join(map(str, CODES_PER_BYTE))}")
    if states.shape[3] % 8:
        raise ValueError(f"head_dim is {states.shape[3]}; accepted: a multiple of 8")


def _quantise(x: torch.Tensor, dim: int, bits: float, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Bytes with the codes of x, whose scale over `dim` is written into `scale` and `zero`."""
    top, limit = levels(bits), torch.finfo(torch.float16).max
    dtype = torch.promote_types(x.dtype, torch.float32)
    if bits < 2:
        mean = x.mean(dim, dtype=dtype)
        spread = x.to(dtype).sub(mean.unsqueeze(dim)).abs_().mean(dim)
        low, high = mean - spread, mean + spread
    else:
        low, high = x.amin(dim).to(dtype), x.amax(dim).to(dtype)
    zero.copy_(low.clamp_(-limit, limit))
    scale.copy_((high - zero.to(dtype)).div_(top).clamp_(0, limit))
    step = torch.where(scale > 0, scale.to(dtype), torch.inf)  # all the same: code 0
    codes = x.to(dtype).sub(zero.to(dtype).unsqueeze(dim)).div_(step.unsqueeze(dim))
    return _join(codes.add_(0.5).clamp_(0, top).to(torch.uint8), bits)


def _join(codes: torch.Tensor, bits: float) -> torch.Tensor:
    """Bytes [..., bytes_per_head] of codes [..., head_dim]."""
    if bits == 8:
        return codes
    width = bytes_per_head(codes.shape[-1], bits)
    joined, radix = codes[..., :width].clone(), levels(bits) + 1
    for digit in range(1, CODES_PER_BYTE[bits]):
        part = codes[..., digit * width : (digit + 1) * width]
        joined[..., : part.shape[-1]] += part * radix**digit
    return joined


def _dequantise(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return codes.to(wide).mul_(scale.to(wide)).add_(zero.to(wide)).to(dtype)
