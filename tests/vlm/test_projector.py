"""The projectors: space-to-depth against loops, each projector against a computation written out in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from foveate.vlm.projector import Projector, average_pool, downsample_factor, space_to_depth
from foveate.vlm.tiling import tokens_per_tile

C, D = 6, 10

NAMES = ["linear", "mlp2x", "downsample-2x2", "downsample-3x3", "downsample-4x4", "pool-2x2", "pool-3x3"]


def merged_by_loops(features: np.ndarray, r: int) -> np.ndarray:
    """Space-to-depth pixel by pixel: [tiles, h, w, C] to [tiles, ⌈h/r⌉, ⌈w/r⌉, r·r·C]."""
    tiles, height, width, channels = features.shape
    out = np.zeros((tiles, math.ceil(height / r), math.ceil(width / r), r * r * channels))
    for tile in range(tiles):
        for y in range(height):
            for x in range(width):
                for c in range(channels):
                    square = (y % r) * r + x % r
                    out[tile, y // r, x // r, square * channels + c] = features[tile, y, x, c]
    return out


def averaged_by_loops(x: np.ndarray, r: int) -> np.ndarray:
    tiles, height, width, channels = x.shape
    out = np.empty((tiles, -(-height // r), -(-width // r), channels))
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            square = x[:, row * r : row * r + r, column * r : column * r + r]  # at the edges a part of one
            out[:, row, column] = square.mean((1, 2))
    return out


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def projected(name: str, p: list[np.ndarray], features: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """What the papers write, from the parameters in the order in which the projector holds them."""
    if name == "linear":
        return features @ p[0].T + p[1]
    if name == "mlp2x":
        return gelu(features @ p[0].T + p[1]) @ p[2].T + p[3]
    r = int(name[-1])
    if name.startswith("pool"):
        x = averaged_by_loops(features.reshape(len(features), *grid, -1), r).reshape(len(features), -1, C)
        return gelu(x @ p[0].T + p[1]) @ p[2].T + p[3]
    x = merged_by_loops(features.reshape(len(features), *grid, -1), r).reshape(len(features), -1, r * r * C)
    if r == 2:
        return gelu(layer_norm(x, p[0], p[1]) @ p[2].T + p[3]) @ p[4].T + p[5]
    x = gelu(layer_norm(x, p[0], p[1]) @ p[2].T + p[3])
    return gelu(layer_norm(x, p[4], p[5]) @ p[6].T + p[7]) @ p[8].T + p[9]


@given(height=st.integers(1, 9), width=st.integers(1, 9), r=st.integers(1, 4), channels=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_space_to_depth_equals_loops(height: int, width: int, r: int, channels: int) -> None:
    features = np.random.default_rng(0).normal(size=(2, height, width, channels))
    assert np.array_equal(space_to_depth(torch.from_numpy(features), r).numpy(), merged_by_loops(features, r))


def test_space_to_depth_pads_right_and_below_with_zeros() -> None:
    features = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]).reshape(1, 3, 3, 1)
    squares = space_to_depth(features, 2)[0].tolist()
    assert squares == [[[1, 2, 4, 5], [3, 0, 6, 0]], [[7, 8, 0, 0], [9, 0, 0, 0]]]


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (6, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_projector_equals_the_formula(name: str, grid: tuple[int, int]) -> None:
    projector = Projector(name, C, D).double()
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter)
    features = torch.randn(2, grid[0] * grid[1], C, dtype=torch.float64)
    parameters = [p.detach().numpy() for p in projector.parameters()]
    expected = projected(name, parameters, features.numpy(), grid)
    np.testing.assert_allclose(projector(features, grid).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("linear", [(D, C), (D,)]),
        ("mlp2x", [(D, C), (D,), (D, D), (D,)]),
        ("downsample-2x2", [(4 * C,), (4 * C,), (D, 4 * C), (D,), (D, D), (D,)]),
        ("pool-2x2", [(D, C), (D,), (D, D), (D,)]),
        (
            "downsample-3x3",
            [(9 * C,), (9 * C,), (3 * C, 9 * C), (3 * C,), (3 * C,), (3 * C,), (D, 3 * C), (D,), (D, D), (D,)],
        ),
    ],
)
def test_parameters_have_the_published_shapes(name: str, shapes: list[tuple[int, ...]]) -> None:
    assert [tuple(p.shape) for p in Projector(name, C, D).parameters()] == shapes


@pytest.mark.parametrize("name", ["linear", "mlp2x"])
def test_projectors_without_downsampling_take_tokens_before_the_patches(name: str) -> None:
    projector = Projector(name, C, D)
    features = torch.randn(2, 1 + 16, C)
    with_cls = projector(features, (4, 4))
    torch.testing.assert_close(with_cls[:, 1:], projector(features[:, 1:], (4, 4)))


# VILA and NVILA: 448 / 14 = 32 patches a side; SigLIP-so400m at 384 / 14 = 27.
@pytest.mark.parametrize(
    ("side", "r", "tokens"), [(448, 2, 256), (448, 3, 121), (384, 2, 196), (384, 3, 81), (384, 1, 729)]
)
def test_published_token_counts(side: int, r: int, tokens: int) -> None:
    assert tokens_per_tile((side, side), 14, r) == tokens


@given(
    size=st.tuples(st.integers(4, 60), st.integers(4, 60)),
    patch=st.integers(1, 4),
    name=st.sampled_from(NAMES),
)
@settings(max_examples=60, deadline=None)
def test_the_count_that_the_processor_uses_is_what_the_projector_gives(
    size: tuple[int, int], patch: int, name: str
) -> None:
    grid = (size[0] // patch, size[1] // patch)
    tokens = Projector(name, 2, 3)(torch.zeros(1, grid[0] * grid[1], 2), grid).shape[1]
    assert tokens_per_tile(size, patch, downsample_factor(name)) == tokens


def test_prefix_tokens_are_counted_once_a_tile() -> None:
    assert tokens_per_tile((16, 20), 4, 1, prefix_tokens=5) == 4 * 5 + 5


@pytest.mark.parametrize("name", ["downsample", "downsample-1x1", "downsample-2x3", "pool-0x0", "conv", "Linear"])
def test_an_unknown_projector_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"projector is '{name}'; accepted: linear, mlp2x, downsample-RxR"):
        downsample_factor(name)


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_any_sizes_are_projected_as_each_alone(name: str) -> None:
    projector, grids = Projector(name, C, D), [(4, 6), (1, 1), (5, 3)]
    maps = [torch.randn(*grid, C) for grid in grids]
    for one, grid, together in zip(maps, grids, projector.forward_maps(maps), strict=True):
        torch.testing.assert_close(together, projector(one.flatten(0, 1)[None], grid)[0])


def test_average_pool_takes_bf16() -> None:
    x = torch.randn(3, 2, 2, 4)
    torch.testing.assert_close(
        average_pool(x.bfloat16(), (2, 2, 1)).float(), average_pool(x, (2, 2, 1)), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("window", [(1, 1, 1), (2, 1, 1), (4, 2, 3), (8, 1, 1), (3, 5, 5)])
def test_average_pool_averages_what_each_window_holds(window: tuple[int, int, int]) -> None:
    x = torch.randn(7, 4, 5, 2, dtype=torch.float64)
    t, h, w = window
    expected = [
        [[x[f : f + t, r : r + h, c : c + w].mean((0, 1, 2)) for c in range(0, 5, w)] for r in range(0, 4, h)]
        for f in range(0, 7, t)
    ]
    torch.testing.assert_close(
        average_pool(x, window), torch.stack([torch.stack([torch.stack(b) for b in a]) for a in expected])
    )
