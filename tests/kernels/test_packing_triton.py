import pytest
import torch

from foveate.kernels.packing import PackedKeys, PackedValues, pack_keys, pack_values

kernels = pytest.importorskip("foveate.kernels.packing_triton")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is on without a CUDA device")
SHAPES = [((2, 2, 64, 64), 32), ((1, 3, 40, 80), 20), ((1, 1, 128, 128), 128)]  # of the states, and the group


def states(shape, dtype, device="cpu"):
    """Outlier channels, offsets, all the same in one token and in one block of a channel, and huge numbers."""
    x = torch.randn(shape, device=device) * torch.linspace(0.01, 40, shape[3], device=device)
    x += 50 * torch.randn(shape[3], device=device)
    x[:, :, :, 2] = -7
    x[:, :, 3] = 1.0003e-4  # not a float16, and what is left of it is too little for a scale
    x[0, 0, 5, 6] = 1e6 if dtype == torch.float32 else 6e4
    x[0, 0, 7, 9] = -x[0, 0, 5, 6]
    return x.to(dtype)


def inside_a_buffer(x, spare):
    """A buffer full of 99 and a view of it, of x's shape: with more before, after and between the rows."""
    buffer = torch.full([*x.shape[:2], x.shape[2] + 5, *(n + spare for n in x.shape[3:])], 99).to(x)
    view = buffer[:, :, 2 : 2 + x.shape[2]]
    return buffer, view[..., : x.shape[3]] if x.dim() == 4 else view


def check(pack, expected, make):
    """The kernel's results in views of buffers, bit for bit those of torch; around them nothing is written."""
    buffers, views = zip(*(inside_a_buffer(part, 3) for part in expected.tensors), strict=True)
    pack(make(*views))
    for buffer, view, part in zip(buffers, views, expected.tensors, strict=True):
        assert torch.equal(view, part)
        view.fill_(99)
        assert (buffer == 99).all()


@interpreted
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes_and_scales_are_those_of_the_reference(dtype, bits):
    for shape, group in SHAPES:
        x = inside_a_buffer(states(shape, dtype), 1)[1].copy_(states(shape, dtype))
        assert kernels.takes(x, bits, group)
        check(
            lambda packed, x=x: kernels.pack_keys_triton(x, packed),
            pack_keys(x, bits, group),
            lambda *parts, group=group: PackedKeys(*parts, bits, group),
        )
        check(
            lambda packed, x=x: kernels.pack_values_triton(x, packed),
            pack_values(x, bits),
            lambda *parts: PackedValues(*parts, bits),
        )


@interpreted
def test_numbers_are_at_most_half_a_step_off():
    x = torch.randn(1, 2, 32, 16)
    keys = PackedKeys(*(torch.empty_like(part) for part in pack_keys(x, 4, 16).tensors), 4, 16)
    kernels.pack_keys_triton(x, keys)
    low, high = keys.codes & 15, keys.codes >> 4
    scale, zero = (part.double().repeat_interleave(16, 2) for part in (keys.scale, keys.zero))
    error = torch.cat([low, high], 3) * scale + zero - x.double()
    assert (error.abs() <= scale * 0.5 + 2e-3).all()  # zero and scale are rounded to float16
    assert error.abs().max() > 0.02


def test_what_no_kernel_packs_is_refused():
    x = torch.randn(1, 1, 64, 64)
    assert kernels.takes(x, 4, 64)
    assert not kernels.takes(x.double(), 4, 64)
    assert not kernels.takes(x, 1.58, 64)
    assert not kernels.takes(x.mT, 4, 64)
    assert not kernels.takes(x, 4, 4096)  # the tile of a group
    assert not kernels.takes(x[:, :, :0], 4, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_and_scales_are_those_of_the_reference_on_cuda(dtype, bits):
    x = states((2, 4, 8192, 128), dtype, "cuda")
    for group in (32, 64, 128):
        expected = pack_keys(x.cpu(), bits, group)
        keys = PackedKeys(*(torch.empty_like(part, device="cuda") for part in expected.tensors), bits, group)
        kernels.pack_keys_triton(x, keys)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(keys.tensors, expected.tensors, strict=True))
    expected = pack_values(x.cpu(), bits)
    values = PackedValues(*(torch.empty_like(part, device="cuda") for part in expected.tensors), bits)
    kernels.pack_values_triton(x, values)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(values.tensors, expected.tensors, strict=True))
