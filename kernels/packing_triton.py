"""`pack_keys` and `pack_values` on CUDA: numbers are read, and their codes, scales and zeros written, in one kernel.

Results are written through strides, so they may be views of a larger buffer. The rounding is the reference's to the
bit: float32 throughout, divisions rounded to nearest, scales and zeros rounded to float16 before they are used.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .packing import PackedKeys, PackedValues

BITS = (8, 4, 2)
LARGEST_TILE = 1 << 14  # numbers of a group of keys at one place of their bytes; more do not fit the registers
VALUE_TILE = 1 << 12  # numbers of the tokens that a program packs

LIMIT = tl.constexpr(65504.0)  # the largest float16


@triton.jit
def scale_and_zero(low, high, LEVELS: tl.constexpr):
    """As float16, the zero clamped and rounded before the scale is made with it."""
    zero = tl.minimum(tl.maximum(low, -LIMIT), LIMIT).to(tl.float16)
    scale = tl.div_rn(high - zero.to(tl.float32), tl.full(high.shape, LEVELS, tl.float32))
    return tl.minimum(tl.maximum(scale, 0.0), LIMIT).to(tl.float16), zero


@triton.jit
def codes_of(x, scale, zero, LEVELS: tl.constexpr):
    """Codes of x; scale and zero are float32 of its shape."""
    steps = tl.div_rn(x - zero, tl.where(scale > 0, scale, float("inf")))  # all the same: code 0
    return tl.minimum(tl.maximum(steps + 0.5, 0.0), LEVELS).to(tl.uint8)  # cut off, so rounded half up


@triton.jit
def pack_keys_kernel(
    keys_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    stride_batch, stride_head, stride_token,
    codes_stride_batch, codes_stride_head, codes_stride_token,
    scale_stride_batch, scale_stride_head, scale_stride_block,
    zero_stride_batch, zero_stride_head, zero_stride_block,
    kv_heads,
    group,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,  # of a token
    BLOCK_BYTES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One block of tokens that share a scale for each channel; a place of the bytes after the other."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    block = tl.program_id(0).to(tl.int64)
    batch, head = tl.program_id(1).to(tl.int64) // kv_heads, tl.program_id(1).to(tl.int64) % kv_heads
    t, byte = tl.arange(0, BLOCK_TOKENS), tl.arange(0, BLOCK_BYTES)
    real_byte = byte < BYTES
    real = (t < group)[:, None] & real_byte[None, :]
    token = block * group + t
    keys_ptr += batch * stride_batch + head * stride_head
    scale_ptr += batch * scale_stride_batch + head * scale_stride_head + block * scale_stride_block
    zero_ptr += batch * zero_stride_batch + head * zero_stride_head + block * zero_stride_block
    packed = tl.zeros([BLOCK_TOKENS, BLOCK_BYTES], tl.uint8)
    for PLACE in tl.static_range(8 // BITS):
        channel = PLACE * BYTES + byte
        x = tl.load(keys_ptr + token[:, None] * stride_token + channel[None, :], mask=real, other=0.0).to(tl.float32)
        low = tl.min(tl.where(real, x, float("inf")), 0)
        high = tl.max(tl.where(real, x, float("-inf")), 0)
        scale, zero = scale_and_zero(low, high, LEVELS)
        tl.store(scale_ptr + channel, scale, mask=real_byte)
        tl.store(zero_ptr + channel, zero, mask=real_byte)
        wide_scale = tl.broadcast_to(scale.to(tl.float32)[None, :], BLOCK_TOKENS, BLOCK_BYTES)
        packed |= codes_of(x, wide_scale, zero.to(tl.float32)[None, :], LEVELS) << (PLACE * BITS)
    codes_ptr += batch * codes_stride_batch + head * codes_stride_head
    tl.store(codes_ptr + token[:, None] * codes_stride_token + byte[None, :], packed, mask=real)


@triton.jit
def pack_values_kernel(
    values_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    stride_batch, stride_head, stride_token,
    codes_stride_batch, codes_stride_head, codes_stride_token,
    scale_stride_batch, scale_stride_head,
    zero_stride_batch, zero_stride_head,
    kv_heads,
    tokens,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,  # of a token
    BLOCK_BYTES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """A block of tokens, each with a scale for all of its channels; these are read a second time from the cache."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    batch, head = tl.program_id(1).to(tl.int64) // kv_heads, tl.program_id(1).to(tl.int64) % kv_heads
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    byte = tl.arange(0, BLOCK_BYTES)
    real_token = token < tokens
    real = real_token[:, None] & (byte < BYTES)[None, :]
    x_at = values_ptr + batch * stride_batch + head * stride_head + token[:, None] * stride_token + byte[None, :]
    low = tl.full([BLOCK_TOKENS], float("inf"), tl.float32)
    high = tl.full([BLOCK_TOKENS], float("-inf"), tl.float32)
    for PLACE in tl.static_range(8 // BITS):
        x = tl.load(x_at + PLACE * BYTES, mask=real, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(real, x, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(real, x, float("-inf")), 1))
    scale, zero = scale_and_zero(low, high, LEVELS)
    tl.store(scale_ptr + batch * scale_stride_batch + head * scale_stride_head + token, scale, mask=real_token)
    tl.store(zero_ptr + batch * zero_stride_batch + head * zero_stride_head + token, zero, mask=real_token)
    wide_scale = tl.broadcast_to(scale.to(tl.float32)[:, None], BLOCK_TOKENS, BLOCK_BYTES)
    packed = tl.zeros([BLOCK_TOKENS, BLOCK_BYTES], tl.uint8)
    for PLACE in tl.static_range(8 // BITS):
        x = tl.load(x_at + PLACE * BYTES, mask=real, other=0.0).to(tl.float32)
        packed |= codes_of(x, wide_scale, zero.to(tl.float32)[:, None], LEVELS) << (PLACE * BITS)
    codes_ptr += batch * codes_stride_batch + head * codes_stride_head
    tl.store(codes_ptr + token[:, None] * codes_stride_token + byte[None, :], packed, mask=real)


def takes(states: torch.Tensor, bits: float, group: int = 1) -> bool:
    """Whether the kernels pack such numbers [batch, kv_heads, tokens, head_dim] with so many bits, in such groups."""
    known = (torch.bfloat16, torch.float16, torch.float32)
    if states.dtype not in known or bits not in BITS or states.stride(-1) != 1:
        return False
    tile = triton.next_power_of_2(group) * triton.next_power_of_2(states.shape[3] * int(bits) // 8)
    return states.numel() > 0 and tile <= LARGEST_TILE


def key_blocks(head_dim: int, bits: int, group: int) -> dict[str, int]:
    width = head_dim * bits // 8
    return {
        "BYTES": width,
        "BLOCK_BYTES": triton.next_power_of_2(width),
        "BLOCK_TOKENS": triton.next_power_of_2(group),
    }


def value_blocks(head_dim: int, bits: int) -> dict[str, int]:
    width = head_dim * bits // 8
    wide = triton.next_power_of_2(width)
    return {"BYTES": width, "BLOCK_BYTES": wide, "BLOCK_TOKENS": max(1, VALUE_TILE // wide)}


def launch_options(blocks: dict[str, int]) -> dict[str, Any]:
    """At most 32 numbers of a tile for each thread."""
    return {"num_warps": min(16, max(1, blocks["BLOCK_TOKENS"] * blocks["BLOCK_BYTES"] // 1024))}


def pack_keys_triton(keys: torch.Tensor, packed: PackedKeys) -> None:
    """Packs keys [batch, kv_heads, tokens, head_dim] as `pack_keys` does, into tensors that are there already."""
    batch, kv_heads, tokens, head_dim = keys.shape
    blocks = key_blocks(head_dim, int(packed.bits), packed.group)
    pack_keys_kernel[tokens // packed.group, batch * kv_heads](
        keys, *packed.tensors, *keys.stride()[:3], *packed.codes.stride()[:3], *packed.scale.stride()[:3],
        *packed.zero.stride()[:3], kv_heads, packed.group, BITS=int(packed.bits), **blocks, **launch_options(blocks),
    )  # fmt: skip


def pack_values_triton(values: torch.Tensor, packed: PackedValues) -> None:
    """Packs values [batch, kv_heads, tokens, head_dim] as `pack_values` does, into tensors that are there already."""
    batch, kv_heads, tokens, head_dim = values.shape
    blocks = value_blocks(head_dim, int(packed.bits))
    pack_values_kernel[triton.cdiv(tokens, blocks["BLOCK_TOKENS"]), batch * kv_heads](
        values, *packed.tensors, *values.stride()[:3], *packed.codes.stride()[:3], *packed.scale.stride()[:2],
        *packed.zero.stride()[:2], kv_heads, tokens, BITS=int(packed.bits), **blocks, **launch_options(blocks),
    )  # fmt: skip
