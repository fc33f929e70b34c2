"""Quest's pages. That it agrees with brute force is in test_policies."""

from typing import Any

import pytest
import torch

from foveate.vlm.cache import KVCache
from foveate.vlm.cache.base import Query
from foveate.vlm.cache.dense import Dense
from foveate.vlm.cache.packed import PackedConfig
from foveate.vlm.cache.paged import Paged, PagedConfig
from foveate.vlm.cache.quest import Quest

from ..pruning import zoo
from . import agreement


def states(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, 2, 2, columns, 8, dtype=torch.float64)
    return keys, values


def query(mask: torch.Tensor | None = None) -> Query:
    """Of 4 heads; what the model itself would do must not be asked."""

    def own(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    return Query(torch.randn(2, 4, 1, 8, dtype=torch.float64), 0.5, mask, own)


def assert_bounds(store: Paged, page: int) -> None:
    """They are those of all pages but that of the last column."""
    low, high = store.page_bounds()
    pages = (store.columns - 1) // page
    blocks = store.keys[:, :, : pages * page].unflatten(2, (pages, page))
    assert torch.equal(low, blocks.min(3).values)
    assert torch.equal(high, blocks.max(3).values)


def test_bounds_follow_all_that_happens_to_a_store() -> None:
    store = PagedConfig(4).make()
    store.append(*states(9))
    assert_bounds(store, 4)
    for _ in range(8):
        store.append(*states(1))
        assert_bounds(store, 4)
    store.crop(1)  # the last column is that of a whole page, now
    assert_bounds(store, 4)
    store.crop(3)
    store.append(*states(5))
    assert_bounds(store, 4)
    store.rows(torch.tensor([1, 0, 1]))
    assert_bounds(store, 4)
    store.select(torch.tensor([6, 7, 9, 11, 12, 14]).expand(3, 2, -1), 5)
    assert store.columns == 11
    assert_bounds(store, 4)
    store.replace(2, torch.zeros(3, 2, 3, 8), torch.zeros(3, 2, 3, 8))
    assert_bounds(store, 4)
    assert store.nbytes > super(Paged, store).nbytes


def test_all_pages_are_the_whole_cache() -> None:
    store = Paged(4)
    store.append(*states(15))
    one = query(torch.rand(2, 1, 1, 15) < 0.7)
    every = torch.arange(3).expand(2, 2, -1)
    keys, values = (part.repeat_interleave(2, dim=1) for part in store.dense())
    wanted = torch.nn.functional.scaled_dot_product_attention(one.states, keys, values, one.mask, scale=0.5)
    assert torch.allclose(store.attend_pages(one, every), wanted)


def test_pages_of_holes_are_not_chosen() -> None:
    """Whatever their keys are."""
    store = Paged(4)
    keys, values = states(25)
    keys[0, :, :8] *= 100
    store.append(keys, values)
    mask = torch.ones(2, 1, 1, 25, dtype=torch.bool)
    mask[0, ..., :8] = False
    chosen: list[torch.Tensor] = []

    def attend_pages(one: Query, pages: torch.Tensor) -> torch.Tensor:
        chosen.append(pages)
        return one.states

    store.attend_pages = attend_pages  # type: ignore[method-assign]
    Quest(keep=0.5, first=0).attend(store, query(mask), 0)
    assert chosen[0].shape == (2, 2, 3)
    assert int(chosen[0][1].min()) >= 0
    assert chosen[0][0, :, 2].tolist() == [-1, -1]  # half of 4 pages, where the other row has 6
    assert int(chosen[0][0, :, :2].min()) >= 2
    Quest(tokens=9, first=0).attend(store, query(mask), 0)
    assert chosen[1].shape == (2, 2, 2)  # 8 columns


@pytest.mark.parametrize("tokens", [None, 20])
def test_padding_by_whole_pages_changes_nothing(tokens: int | None) -> None:
    animal = zoo.animal("text qwen3")
    one = agreement.row("text qwen3", "long")
    spec = f"quest:keep=0.3,first=1,tokens={str(tokens).lower()}+paged:page=4"
    for padding in (4, 12):
        logits = [
            agreement.generated(
                animal.model, animal.batch([one], 60 + more), [agreement.words("long")],
                past_key_values=KVCache(animal.model, spec),
            )[0]
            for more in (0, padding)
        ]  # fmt: skip
        assert (logits[0] - logits[1]).abs().max() < agreement.TOLERANCE
    full, _ = agreement.generated(animal.model, animal.batch([one]), [agreement.words("long")])
    assert (logits[0] - full)[:, 1:].abs().amin((0, 1)).max() > 1e-3


def test_a_store_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="quest reads a Dense store; accepted: paged, or one of packed keys"):
        Quest().attend(Dense(), query(), 0)
    assert isinstance(KVCache(zoo.animal("text llama").model, "quest").layers[0].store, Paged)
    assert PackedConfig().make().page == 64


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Quest, {"keep": 1.5}, "keep is 1.5; accepted: a fraction above 0, up to 1"),
        (Quest, {"tokens": 0}, "tokens is 0; accepted: at least 1, or none"),
        (Quest, {"first": -1}, "first is -1; accepted: at least 0"),
        (PagedConfig, {"page": 0}, "page is 0; accepted: at least 1"),
    ],
)
def test_wrong_fields_are_named(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)
