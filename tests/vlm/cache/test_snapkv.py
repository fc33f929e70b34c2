"""SnapKV's edges. That it agrees with brute force is in test_policies."""

from typing import Any

import pytest
import torch

from foveate.vlm.cache import KVCache
from foveate.vlm.cache.snapkv import SnapKV

from ..pruning import zoo
from . import agreement


def held(kv: str, *pieces: str) -> list[list[list[int]]]:
    """What each head of layer 1 holds after the prompts of a batch."""
    animal = zoo.animal("text llama")
    inputs = animal.batch([agreement.row("text llama", each) for each in pieces])
    cache = animal.model(**inputs, past_key_values=KVCache(animal.model, kv)).past_key_values
    tokens = inputs["attention_mask"].sum(1).tolist()
    width = inputs["input_ids"].shape[1]
    return [agreement.held(cache, sample, width - count)[1] for sample, count in enumerate(tokens)]


def test_prompts_within_the_window_stay_whole() -> None:
    """In a batch with a longer one, too, whose heads keep columns of their own, and the window."""
    short, long = held("snapkv:keep=0.3,window=12", "text", "long")
    assert set(map(tuple, short)) == {tuple(range(12))}
    assert [len(head) for head in long] == [18, 18]
    assert long[0] != long[1]
    assert all(head[-12:] == list(range(48, 60)) for head in long)


def test_tokens_are_a_capacity_with_the_window_in_it() -> None:
    [heads] = held("snapkv:tokens=20,window=8", "long")
    assert [len(head) for head in heads] == [20, 20]
    [heads] = held("snapkv:tokens=5,window=8", "long")
    assert heads[0] == list(range(52, 60))  # never less than the window
    short, long = held("snapkv:tokens=20,window=8", "text", "long")
    assert short[0] == list(range(12))
    assert len(long[0]) == 20


def test_votes_are_pooled_over_neighbours() -> None:
    votes = torch.tensor([[[0.0, 3.0, 0.0, 0.0, 6.0]]])
    assert SnapKV(kernel=3).pooled(votes).tolist() == [[[1.0, 1.0, 1.0, 2.0, 2.0]]]
    assert SnapKV(kernel=3, pooling="max").pooled(votes).tolist() == [[[3.0, 3.0, 3.0, 6.0, 6.0]]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0.0}, "keep is 0.0; accepted: a fraction above 0, up to 1"),
        ({"tokens": 0}, "tokens is 0; accepted: at least 1, or none"),
        ({"window": 0}, "window is 0; accepted: at least 1"),
        ({"kernel": 4}, "kernel is 4; accepted: an odd number"),
        ({"pooling": "sum"}, "pooling is 'sum'; accepted: mean, max"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SnapKV(**fields)
