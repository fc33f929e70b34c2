"""H2O's scores, and its budgets. That it agrees with brute force is in test_policies."""

import pytest
import torch

from foveate.vlm.cache import KVCache, scores
from foveate.vlm.cache.base import Seen
from foveate.vlm.cache.dense import Dense
from foveate.vlm.cache.h2o import H2O
from foveate.vlm.cache.packed import PackedConfig

from ..pruning import zoo
from . import agreement


def seen(queries: int, columns: int, dtype: torch.dtype) -> Seen:
    """Random states; the first row has two holes, in one of its heads one more."""
    store = Dense()
    store.append(*torch.randn(2, 2, 2, columns, 8).to(dtype))
    slots = torch.arange(columns).repeat(2, 2, 1)
    slots[0, :, :2], slots[0, 1, 4] = -1, -1
    return Seen(torch.randn(2, 6, queries, 8).to(dtype), 0.4, queries, store, slots, None, None, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("queries", [None, 3, 1])
def test_received_attention_is_the_sum_of_softmax_rows(
    queries: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few rows and columns are looked at together."""
    monkeypatch.setattr(scores, "SCORES_AT_ONCE", 600)
    monkeypatch.setattr(scores, "COLUMNS_AT_ONCE", 4)
    one = seen(9, 14, dtype)
    keys = one.store.dense()[0].double().repeat_interleave(3, dim=1)
    mask = torch.ones(14, 14, dtype=torch.bool).tril()[-9:] & (one.slots >= 0)[:, :, None].repeat_interleave(3, dim=1)
    rows = (one.query.double() @ keys.mT * 0.4).masked_fill(~mask, -torch.inf).softmax(-1)
    wanted = rows[:, :, -(queries or 9) :].sum(2).unflatten(1, (2, 3)).mean(2)
    got = scores.received_attention(one, queries)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert (got - wanted).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)


def test_queries_that_are_padding_do_not_look() -> None:
    one = seen(14, 14, torch.float64)
    total = scores.received_attention(one).sum(-1)
    assert torch.allclose(total, torch.tensor([[12.0, 11.0], [14.0, 14.0]], dtype=torch.float64))


def test_the_budget_grows_with_prompts_not_with_answers() -> None:
    """In rows of different lengths; a head has chosen its own columns, and always holds the latest."""
    animal, rows = zoo.animal("text llama"), ("text", "long")
    inputs = animal.batch([agreement.row("text llama", pieces) for pieces in rows])
    with_answer = [agreement.words(pieces, 9) for pieces in rows]
    kv = KVCache(animal.model, "h2o:keep=0.5,recent=0.4")
    agreement.generated(animal.model, inputs, with_answer, past_key_values=kv)
    for sample, (begin, budget, late) in enumerate([(48, 6, 2), (0, 30, 12)]):  # halves of 12 and 60
        for heads in agreement.held(kv, sample, begin).values():
            last = 60 - begin + 9
            assert [len(head) for head in heads] == [budget, budget]
            assert all(head[-late:] == list(range(last - late, last)) for head in heads)
    asked = torch.tensor(with_answer)
    more = {
        "input_ids": torch.cat([inputs["input_ids"], asked, asked], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(asked).repeat(1, 2)], dim=1),
    }
    agreement.generated(animal.model, more, with_answer, past_key_values=kv)
    counts = [[len(head) for head in agreement.held(kv, sample, 0)[2]] for sample in range(2)]
    assert counts == [[10, 10], [34, 34]]  # halves of 12 + 9 and 60 + 9, to even


def test_tokens_are_the_budget() -> None:
    """Which answers may fill, where the prompt did not."""
    animal = zoo.animal("text llama")
    kv = KVCache(animal.model, "h2o:tokens=14")
    inputs = animal.alone(agreement.row("text llama", "text"))
    agreement.generated(animal.model, inputs, [agreement.words("text", 2)], past_key_values=kv)
    assert agreement.held(kv, 0, 0)[1][0] == list(range(14))
    kv = KVCache(animal.model, "h2o:tokens=14")
    agreement.generated(animal.model, inputs, [agreement.words("text", 5)], past_key_values=kv)
    heads = agreement.held(kv, 0, 0)[1]
    assert [len(head) for head in heads] == [14, 14]
    assert all(head[-7:] == list(range(10, 17)) for head in heads)


def test_packed_columns_are_scored_from_what_they_stand_for() -> None:
    one = seen(1, 20, torch.float32)
    packed = PackedConfig(keys=8, values=8, group=4, residual=2).make()
    packed.append(*one.store.dense())
    packed.settle(lambda: one)
    assert packed.packed == 16
    exact = scores.received_attention(one)
    one.store = packed
    assert (scores.received_attention(one) - exact).abs().max() < 0.01


def test_a_wrong_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"recent is 1.5; accepted: a fraction from 0 to 1"):
        H2O(recent=1.5)
