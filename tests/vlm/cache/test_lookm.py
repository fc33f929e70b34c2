"""LOOK-M's merging, and what it asks for. That it agrees with brute force is in test_policies."""

from typing import Any

import pytest
import torch

from foveate.vlm.cache import KVCache, lookm
from foveate.vlm.cache.lookm import LookM, merged
from foveate.vlm.pruning import reduce

from ..pruning import zoo
from . import agreement


def test_three_ways_to_merge() -> None:
    """Two evicted keys are nearest to the first kept one, none to the second, and a hole stays out of it."""
    keys = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [3.0, 4.0], [9.0, 0.0]])[None, None]
    values = torch.tensor([[10.0, 0.0], [4.0, 4.0], [0.0, 7.0], [0.0, 5.0], [9.0, 9.0]])[None, None]
    keep = torch.tensor([[[True, False, False, False, False]]])
    evicted = torch.tensor([[[False, True, False, True, False]]])
    keep[..., 2] = True
    keys[0, 0, 3] = torch.tensor([4.0, 3.0])  # cosine 0.8 to the first, 0.6 to the second
    wanted: dict[Any, tuple[list[float], list[float]]] = {
        "averaged": ([(2 + 1 + 4) / 3, 3 / 3], [(10 + 4 + 0) / 3, (0 + 4 + 5) / 3]),
        "pivotal": ([(2 + 1.5 + 3) / 3, 1.5 / 3], [(10 + 7 + 5) / 3, (0 + 2 + 2.5) / 3]),
        "weighted": ([(2 + 1 + 0.8 * 4) / 3, 0.8 * 3 / 3], [(10 + 4 + 0) / 3, (0 + 4 + 0.8 * 5) / 3]),
    }
    for how, (key, value) in wanted.items():
        new_keys, new_values = merged(keys, values, keep, evicted, how)
        assert torch.allclose(new_keys[0, 0, 0], torch.tensor(key))
        assert torch.allclose(new_values[0, 0, 0], torch.tensor(value))
        assert torch.equal(new_keys[:, :, 1:], keys[:, :, 1:])
        assert torch.equal(new_values[:, :, 1:], values[:, :, 1:])


@pytest.mark.parametrize("how", ["averaged", "pivotal", "weighted"])
def test_however_few_are_compared_together(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And however many of a row or head are kept."""
    keys, values = torch.randn(2, 2, 3, 24, 8)
    keep = torch.rand(2, 3, 24) < 0.3
    evicted = ~keep & (torch.rand(2, 3, 24) < 0.8)
    at_once = merged(keys, values, keep, evicted, how)
    monkeypatch.setattr(lookm, "SIMILARITIES_AT_ONCE", 100)
    in_parts = merged(keys, values, keep, evicted, how)
    assert all(torch.allclose(one, other) for one, other in zip(at_once, in_parts, strict=True))
    assert not torch.equal(at_once[0], keys)


def test_text_stays_before_images() -> None:
    """As long as the budget has room: of 28 tokens 12 are text."""
    animal = zoo.animal("llava")
    one = agreement.row("llava", "image")
    text = (one["input_ids"][0] != zoo.IMAGE).nonzero()[:, 0].tolist()
    with reduce(animal.model, kv="look-m:keep=0.5,recent=0.2") as model:
        kv = model(**one).past_key_values
    for heads in agreement.held(kv, 0, 0).values():
        assert [len(head) for head in heads] == [14, 14]
        assert all(set(text) <= set(head) for head in heads)
    with reduce(animal.model, kv="look-m:tokens=8,recent=0") as model:
        kv = model(**one).past_key_values
    assert all(set(head) < set(text) for heads in agreement.held(kv, 0, 0).values() for head in heads)


def test_it_must_know_which_tokens_are_visual() -> None:
    animal = zoo.animal("llava")
    one = agreement.row("llava", "image")
    with pytest.raises(ValueError, match=r"nobody told which tokens are visual.*accepted: foveate.reduce\(model, kv"):
        animal.model(**one, past_key_values=KVCache(animal.model, "look-m"))
    told = KVCache(animal.model, "look-m")
    told.see(one["input_ids"] == zoo.IMAGE)
    with reduce(animal.model, kv="look-m") as model:
        wanted = model(**one).past_key_values
    kv = animal.model(**one, past_key_values=told).past_key_values
    assert agreement.held(kv, 0, 0) == agreement.held(wanted, 0, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recent": -0.5}, "recent is -0.5; accepted: a fraction from 0 to 1"),
        ({"merge": "mean"}, "merge is 'mean'; accepted: averaged, pivotal, weighted, none"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LookM(**fields)
