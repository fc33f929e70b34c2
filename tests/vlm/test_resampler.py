"""Matryoshka queries: any number of tokens of one trained projector."""

import numpy as np
import pytest
import torch

from foveate.vlm.resampler import Resampler, sine_positions

C, D, M = 6, 16, 8


@pytest.fixture
def resampler() -> Resampler:
    torch.manual_seed(0)
    made = Resampler(C, D, M).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def test_it_equals_attention_by_the_formula(resampler: Resampler) -> None:
    grid, features = (3, 5), torch.randn(2, 15, C, dtype=torch.float64)
    weights = {name: value.detach().numpy() for name, value in resampler.named_parameters()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    patches = norm("norm_vision", linear("from_vision", features.numpy()))
    positions = np.zeros((15, D))
    for patch in range(15):
        for half, place in enumerate((patch // 5, patch % 5)):
            for k in range(D // 4):
                angle = place / 10000 ** (k / (D // 4))
                positions[patch, half * D // 2 + k] = np.sin(angle)
                positions[patch, half * D // 2 + D // 4 + k] = np.cos(angle)
    queries = linear("to_query", norm("norm_query", weights["queries.weight"]))
    keys, values = linear("to_key", patches + positions), linear("to_value", patches)
    assert resampler.heads == 1
    scores = np.exp(queries @ keys.swapaxes(1, 2) / np.sqrt(D))
    read = scores / scores.sum(-1, keepdims=True) @ values
    expected = linear("out", norm("norm_out", linear("attended", read)))
    np.testing.assert_allclose(resampler(features, grid).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_first_queries_do_not_depend_on_those_after_them(resampler: Resampler) -> None:
    features = torch.randn(2, 15, C, dtype=torch.float64)
    before = resampler(features, (3, 5))[:, :3]
    with torch.no_grad():
        resampler.queries.weight[3:] += 1
    torch.testing.assert_close(resampler(features, (3, 5))[:, :3], before)


def test_maps_of_any_sizes_are_read_as_each_alone(resampler: Resampler) -> None:
    grids = [(3, 5), (1, 1), (4, 2)]
    maps = [torch.randn(*grid, C, dtype=torch.float64) for grid in grids]
    for one, grid, together in zip(maps, grids, resampler.forward_maps(maps), strict=True):
        torch.testing.assert_close(together, resampler(one.flatten(0, 1)[None], grid)[0])


def test_where_a_patch_stands_is_seen(resampler: Resampler) -> None:
    features = torch.randn(1, 15, C, dtype=torch.float64)
    assert not torch.allclose(resampler(features, (3, 5)), resampler(features.flip(1), (3, 5)))
    assert len(sine_positions((3, 5), features.new_zeros(D)).unique(dim=0)) == 15


def test_a_width_that_positions_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size is 18; projector 'resampler' accepts multiples of 4"):
        Resampler(C, 18, M)
