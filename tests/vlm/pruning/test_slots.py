"""A cache layer that holds fewer columns behaves as one that holds all, as far as its tokens go."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from foveate.vlm.pruning.slots import SlotLayer

HEADS, WIDTH = 2, 3


def states(rows: list[list[int]]) -> torch.Tensor:
    """Keys or values [batch, heads, columns, width] whose every number is the token's slot; holes are noise."""
    slots = torch.tensor(rows)
    noise = torch.rand(slots.shape)
    return torch.where(slots < 0, noise, slots).float()[:, None, :, None].expand(-1, HEADS, -1, WIDTH).clone()


def filled(rows: list[list[int]], tokens: int, decoded: int = 0) -> SlotLayer:
    """A layer after a prefill of so many tokens, of which it got these slots, and some decode steps."""
    layer = SlotLayer()
    holes = any(slot < 0 for row in rows for slot in row)
    layer.expect(torch.tensor(rows), tokens, holes)
    layer.update(states(rows), states(rows))
    for step in range(decoded):
        new = states([[tokens + step]] * len(rows))
        layer.update(new, new)
    return layer


def held(layer: SlotLayer) -> list[list[int]]:
    """The slots, after a look that keys and values are theirs."""
    slots = layer.all_slots()
    assert layer.keys is not None and layer.values is not None
    for kept in (layer.keys, layer.values):
        assert kept.shape == (len(slots), HEADS, slots.shape[1], WIDTH)
        real = slots >= 0
        assert torch.equal(kept[:, 0, :, 0][real], slots[real].float())
    assert layer.has_holes == bool((slots < 0).any())
    return slots.tolist()


def test_length_is_that_of_the_whole_sequence() -> None:
    layer = filled([[0, 2, 6]], tokens=7, decoded=2)
    assert layer.get_seq_length() == 9
    assert layer.get_mask_sizes(4) == (13, 0)
    assert layer.columns == 5
    assert held(layer) == [[0, 2, 6, 7, 8]]


def test_a_second_prefill_follows_decoded_tokens() -> None:
    layer = filled([[0, 2, 6]], tokens=7, decoded=2)
    rows = [[0, 2, 6, 7, 8, 10, 11]]
    layer.expect(torch.tensor(rows), 3, False)
    new = states([[10, 11]])
    layer.update(new, new)
    assert held(layer) == rows
    assert layer.get_seq_length() == 12


@pytest.mark.parametrize("surplus", range(1, 12))
def test_crop_leaves_the_slots_before_the_new_end(surplus: int) -> None:
    rows = [[-1, -1, 3, 8], [0, 1, 5, 8], [-1, 4, 7, 8]]
    layer = filled(rows, tokens=9, decoded=2)
    layer.crop(-surplus)
    kept = [[slot for slot in [*row, 9, 10] if 0 <= slot < 11 - surplus] for row in rows]
    width = max(map(len, kept))
    got = held(layer)
    assert [[slot for slot in row if slot >= 0] for row in got] == kept
    assert all(len(row) in (width, width + 2) and row == sorted(row) for row in got)  # holes stay at the left
    assert layer.get_seq_length() == 11 - surplus


def test_crop_refuses_a_length() -> None:
    with pytest.raises(ValueError, match="tokens_to_remove is 3"):
        filled([[0, 1]], tokens=2).crop(3)


def test_batch_operations_take_the_slots_along() -> None:
    rows = [[-1, 3], [0, 3], [1, 3]]
    layer = filled(rows, tokens=4)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert held(layer) == [[1, 3], [-1, 3], [-1, 3]]
    layer.batch_select_indices(torch.tensor([0, 1]))
    assert held(layer) == [[1, 3], [-1, 3]]
    layer.batch_repeat_interleave(2)
    assert held(layer) == [[1, 3], [1, 3], [-1, 3], [-1, 3]]
    layer.reset()
    assert layer.get_seq_length() == layer.columns == 0


def test_takes_over_what_a_layer_holds() -> None:
    dense = DynamicLayer()
    rows = [[-1, 1, 2], [0, 1, 2]]
    dense.update(states(rows), states(rows))
    layer = SlotLayer.from_dynamic(dense, torch.tensor(rows) >= 0)
    assert held(layer) == rows
    assert layer.get_seq_length() == 3
    assert SlotLayer.from_dynamic(DynamicLayer(), torch.zeros(2, 0, dtype=torch.bool)).get_seq_length() == 0


def test_a_cache_crops_thin_and_whole_layers_alike() -> None:
    cache = DynamicCache()
    cache.update(states([list(range(7))]), states([list(range(7))]), 0)
    cache.layers.append(filled([[0, 2, 6]], tokens=7))
    for layer in range(2):
        cache.update(states([[7]]), states([[7]]), layer)
    cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.layers] == [6, 6]
    assert held(cache.layers[1]) == [[0, 2]]
