"""Codes of keys and values, against numpy, one number after the other."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.kernels import packing
from foveate.kernels.packing import levels, pack_keys, pack_values, unpack_codes, unpack_keys, unpack_values

BITS = [8, 4, 2, 1.58, 1]
DIGITS = {8: 1, 4: 2, 2: 4, 1.58: 5, 1: 8}
GROUP = 16
SAME = {8: 1, 4: 1, 2: 1, 1.58: 0.98, 1: 0.98}  # of the bytes; a mean differs in its last bits


def scale_and_zero(x: np.ndarray, bits: float) -> tuple[np.float16, np.float16]:
    """Of numbers that share a scale."""
    x = x.astype(np.float64)
    if bits < 2:
        spread = np.abs(x - x.mean()).mean()
        low, high = x.mean() - spread, x.mean() + spread
    else:
        low, high = x.min(), x.max()
    zero = np.float16(low)
    return np.float16((high - np.float64(zero)) / levels(bits)), zero


def packed_by_numpy(x: np.ndarray, bits: float, group: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes [tokens, bytes], and the scale and zero of each number, of [tokens, head_dim]; group None: per token."""
    scale, zero = np.empty(x.shape, np.float16), np.empty(x.shape, np.float16)
    for token in range(len(x)):
        for channel in range(x.shape[1]):
            start = token if group is None else token // group * group
            sharing = x[token] if group is None else x[start : start + group, channel]
            scale[token, channel], zero[token, channel] = scale_and_zero(sharing, bits)
    steps = (x.astype(np.float64) - zero) / scale
    codes = np.clip(np.floor(steps + 0.5), 0, levels(bits)).astype(int)
    width = -(-x.shape[1] // DIGITS[bits])
    joined = np.zeros((len(x), width), int)
    for channel in range(x.shape[1]):
        joined[:, channel % width] += codes[:, channel] * (levels(bits) + 1) ** (channel // width)
    return joined, scale, zero


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_packed_per_channel_and_group(bits: float, dtype: torch.dtype) -> None:
    keys = (torch.randn(2, 2, 2 * GROUP, 24) * 3 + 8 * torch.randn(24)).to(dtype)
    packed = pack_keys(keys, bits, GROUP)
    for batch in range(2):
        for head in range(2):
            codes, scale, zero = packed_by_numpy(keys[batch, head].float().numpy(), bits, GROUP)
            held = [part[batch, head].repeat_interleave(GROUP, 0).numpy() for part in (packed.scale, packed.zero)]
            np.testing.assert_allclose(held[0], scale, rtol=1e-3)
            np.testing.assert_allclose(held[1], zero, rtol=1e-3)
            assert (packed.codes[batch, head].numpy() == codes).mean() > (
                1 - 1e-9 if bits >= 2 else 0.98
            )  # means round
    assert packed.head_dim == 24 and packed.tokens == 2 * GROUP


@pytest.mark.parametrize("bits", BITS)
def test_values_are_packed_per_token(bits: float) -> None:
    values = torch.randn(2, 2, 7, 40)
    packed = pack_values(values, bits)
    for batch in range(2):
        for head in range(2):
            codes, scale, zero = packed_by_numpy(values[batch, head].numpy(), bits, None)
            np.testing.assert_allclose(packed.scale[batch, head, :, None].expand(-1, 40), scale, rtol=1e-3)
            np.testing.assert_allclose(packed.zero[batch, head, :, None].expand(-1, 40), zero, rtol=1e-3)
            assert (packed.codes[batch, head].numpy() == codes).mean() >= SAME[bits]
    assert packed.head_dim == 40


@pytest.mark.parametrize("bits", BITS)
def test_unpacked_numbers_are_zero_plus_scale_times_code(bits: float) -> None:
    states = torch.randn(2, 2, 2 * GROUP, 24)
    keys, values = pack_keys(states, bits, GROUP), pack_values(states, bits)
    width = keys.codes.shape[3]
    for packed, unpacked, shared in ((keys, unpack_keys(keys), True), (values, unpack_values(values), False)):
        for token, channel in ((0, 0), (5, 7), (GROUP, 23), (2 * GROUP - 1, 11)):
            byte = int(packed.codes[1, 0, token, channel % width])
            code = byte // (levels(bits) + 1) ** (channel // width) % (levels(bits) + 1)
            assert int(unpack_codes(packed)[1, 0, token, channel]) == code
            place = (1, 0, token // GROUP, channel) if shared else (1, 0, token)
            expected = float(packed.zero[place]) + float(packed.scale[place]) * code
            assert float(unpacked[1, 0, token, channel]) == pytest.approx(expected, rel=1e-6)
    assert unpack_keys(keys, torch.bfloat16).dtype == torch.bfloat16
    assert unpack_keys(keys, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_errors_stay_within_half_a_step_far_from_zero(bits: float) -> None:
    """A zero that were rounded after the codes are made would add up to 0.06 here: half of float16's spacing at 200."""
    keys = torch.rand(1, 2, 64, 16) + torch.linspace(-200, 200, 16)
    packed = pack_keys(keys, bits, 64)
    below = (packed.zero.float() - keys.amin(2, keepdim=True)).clamp(min=0)  # what lies below a zero rounded upwards
    error = (unpack_keys(packed) - keys).abs()
    assert (error <= packed.scale.float() * 0.501 + below + 4e-5).all()
    inside = keys >= packed.zero.float()
    assert inside.float().mean() > 0.9
    assert (error <= packed.scale.float() * 0.501 + 4e-5)[inside.expand_as(error)].all()


def test_a_constant_channel_and_numbers_beyond_float16_do_no_harm() -> None:
    keys = torch.full((1, 1, GROUP, 8), 0.1)
    keys[..., 1] = 1e6
    keys[..., 2] = torch.linspace(-1e6, 1e6, GROUP)
    unpacked = unpack_keys(pack_keys(keys, 4, GROUP))
    assert unpacked.isfinite().all()
    assert torch.allclose(unpacked[..., 0], keys[..., 0], rtol=1e-3)
    assert torch.allclose(unpacked[..., 1], keys[..., 1], rtol=1e-3)  # its scale takes it there


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation allocates."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, made.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("bits", BITS)
def test_packing_in_blocks_widens_no_more_than_a_block(bits: float, monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randn(1, 2, 512, 64, dtype=torch.float16)
    whole = (pack_keys(states, bits, GROUP), pack_values(states, bits))
    monkeypatch.setattr(packing, "WIDENED_AT_ONCE", 1 << 13)
    with Largest() as largest:
        blocks = (pack_keys(states, bits, GROUP), pack_values(states, bits))
    assert largest.nbytes <= max(4 << 13, *(part.nbytes for one in whole for part in one.tensors))
    for one, other in zip(whole, blocks, strict=True):
        assert all(torch.equal(*parts) for parts in zip(one.tensors, other.tensors, strict=True))


def test_blocks_are_views_of_some_tokens() -> None:
    states = torch.randn(2, 2, 4 * GROUP, 16)
    keys, values = pack_keys(states, 4, GROUP), pack_values(states, 4)
    assert torch.equal(unpack_keys(keys.blocks(GROUP, 3 * GROUP)), unpack_keys(keys)[:, :, GROUP : 3 * GROUP])
    assert torch.equal(unpack_values(values.blocks(3, 11)), unpack_values(values)[:, :, 3:11])
    assert keys.blocks(GROUP, 3 * GROUP).codes.untyped_storage().data_ptr() == keys.codes.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("shape", "bits", "group", "said"),
    [
        ((1, 1, 16, 16), 3, 16, "bits is 3; accepted: 8, 4, 2, 1.58, 1"),
        ((1, 1, 16, 12), 4, 16, "head_dim is 12; accepted: a multiple of 8"),
        ((1, 1, 16, 16), 4, 12, "group is 12; accepted: a divisor of the 16 tokens"),
        ((1, 1, 16, 16), 4, 0, "group is 0; accepted: a divisor of the 16 tokens"),
    ],
)
def test_what_cannot_be_packed_says_what_can(shape: tuple[int, ...], bits: float, group: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pack_keys(torch.randn(shape), bits, group)
