from types import SimpleNamespace

import pytest
import torch

from foveate.vlm.pruning.base import Sight
from foveate.vlm.pruning.parse import parse_method
from foveate.vlm.pruning.sparsevlm import SparseVLM, SparseVLMPlus

from . import oracle


def method(case):
    layers = tuple(case["pruning_layers"].tolist())
    if "scale" in case:
        return SparseVLM(scale=case["scale"], bias=case["bias"], layers=layers)
    kind = SparseVLMPlus if case["num_heads"] == 16 else SparseVLM
    return kind(tokens=tuple(case["token_list"].tolist()), layers=layers, per=0)


def seen(attention: torch.Tensor, hidden: torch.Tensor | None = None, total: int | None = None) -> Sight:
    """With this head mean, [raters, visual]."""
    visual = attention.shape[1]
    hidden = torch.randn(visual, 8) if hidden is None else hidden
    source = SimpleNamespace(head_mean=lambda: attention)
    return Sight(total or visual, hidden, torch.arange(visual), source, torch.Generator())


@pytest.mark.parametrize(
    "name",
    ["v1_s2", "v1_s1_b6", "v1_gqa", "v1_fullrank_noprune", "head_t40_20_10", "plus_t40_20_10"],
)
def test_sparsevlm_equals_the_reference_programs(name):
    case = oracle.load(f"sparsevlm_{name}")
    pruner = method(case)
    span, end = case["inputs_embeds"][0, case["sys_len"] :], case["vis_len"]
    assert pruner.raters(span[:end], span[end:]).nonzero()[:, 0].tolist() == case["raters"].tolist()
    got = oracle.run(case, pruner)
    assert len(got.sights) == len(case["pruning_layers"])
    for i, (sight, selection) in enumerate(zip(got.sights, got.selections, strict=True)):
        if isinstance(pruner, SparseVLMPlus):
            scores = pruner.scores(sight.attention)
        else:
            attention = sight.attention.head_mean()
            torch.testing.assert_close(attention, case[f"P{i}_rater_attn"], rtol=0, atol=1e-5)
            scores = attention.mean(0)
        torch.testing.assert_close(scores, case[f"P{i}_scores"], rtol=0, atol=1e-5)
        if "scale" in case:
            assert int(torch.linalg.matrix_rank(attention)) == case[f"P{i}_rank"]
        assert selection.keep.tolist() == case[f"P{i}_kept"].tolist()
        if f"P{i}_merged" in case:
            torch.testing.assert_close(selection.merged, case[f"P{i}_merged"], rtol=0, atol=5e-4)
            assert selection.centers.tolist() == case[f"P{i}_recycled_idx"][case[f"P{i}_centers"]].tolist()
        else:
            assert selection.merged is None
        merged = 0 if selection.merged is None else len(selection.merged)
        assert len(selection.keep) + merged == case[f"P{i}_v_after"]
    oracle.assert_same_outputs(got, case, atol=5e-4)


@pytest.mark.parametrize("name", ["clamp", "full", "lowrank3"])
def test_the_rank_rule_equals_the_reference_programs(name):
    case = oracle.load(f"sparse_rank_unit_{name}")
    attention = case["head_attn"].mean(0)
    selection = SparseVLM(scale=case["scale"], bias=case["bias"]).select(0, seen(attention))
    assert selection.keep.tolist() == case["kept"].tolist()


@pytest.mark.parametrize(("tokens", "processed"), [(192, 206.5), (128, 145.4), (64, 82.2)])
def test_published_settings_process_as_many_tokens_as_counted(tokens, processed):
    """Mean over LLaVA-1.5-7B's 32 layers, merged tokens counted too."""
    pruner, visual, layers = SparseVLM(tokens=tokens), 576, []
    for layer in range(32):
        if layer in pruner.stages:
            selection = pruner.select(pruner.stages.index(layer), seen(torch.rand(3, visual), total=576))
            visual = len(selection.keep) + len(selection.merged)
        layers.append(visual)
    assert sum(layers) / 32 == pytest.approx(processed, abs=0.05)


def test_counts_are_in_proportion_to_the_prompts_visual_tokens():
    attention = torch.rand(3, 1000)
    assert len(SparseVLM(tokens=64).select(1, seen(attention, total=2880)).keep) == 150
    assert len(SparseVLM(tokens=(64,), layers=(2,), per=0).select(0, seen(attention, total=2880)).keep) == 64
    assert len(SparseVLM(tokens=(64,), layers=(2,), per=640).select(0, seen(attention, total=5)).keep) == 1


def test_the_best_three_in_ten_of_the_dropped_are_merged():
    """21 tokens are kept; of 79 the best 24 become 3, in which all of them count alike."""
    attention = torch.arange(100, 0, -1.0)[torch.randperm(100)][None]
    hidden = torch.zeros(100, 4)
    hidden[:, 0] = attention[0]
    selection = SparseVLM(tokens=(21,), layers=(2,), per=0).select(0, seen(attention, hidden))
    assert sorted(attention[0, selection.keep].tolist()) == list(range(80, 101))
    assert len(selection.merged) == 3
    assert selection.merged[:, 0].min() >= 55.9 and selection.merged[:, 0].max() < 80
    assert set(attention[0, selection.centers].tolist()) <= set(range(56, 80))


def test_a_prompt_without_text_that_can_rate_is_rated_by_its_last_token():
    pruner = SparseVLM(scale=5.0, layers=(2,))
    assert not pruner.raters(torch.randn(9, 4), torch.randn(1, 4)).any()
    assert pruner.raters(torch.randn(9, 4), torch.randn(0, 4)) is None
    got = oracle.run(oracle.load("pdrop_l4_single") | {"decode_embeds": torch.randn(1, 2, 64)}, pruner)
    assert got.sights[0].attention.q.shape[1] == 1
    assert len(got.selections[0].keep) == 5  # the rank of one row is 1
    assert torch.isfinite(got.last_hidden).all() and torch.isfinite(got.decode_hidden).all()


def test_raters_of_many_visual_tokens_are_those_of_the_whole_softmax():
    visual, text = torch.randn(9000, 8, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    relevance = (visual @ text.T).softmax(1).mean(0)
    assert SparseVLM().raters(visual, text).tolist() == (relevance > relevance.mean()).tolist()


def test_settings_are_read_from_text():
    assert parse_method("sparsevlm:tokens=192") == SparseVLM(tokens=192)
    assert parse_method("sparsevlm:layers=2/6,tokens=300/200") == SparseVLM(tokens=(300, 200), layers=(2, 6))
    assert parse_method("sparsevlm:scale=13.5,bias=0") == SparseVLM(scale=13.5)
    single = parse_method("sparsevlm+:layers=2,tokens=30,per=0")
    assert single.stages == (3,) and single._counts() == (30,)


def test_prunes_the_output_of_the_papers_layers():
    assert SparseVLM().stages == SparseVLMPlus().stages == (3, 7, 16)
    assert SparseVLM(scale=13.5).stages == (3, 7, 16, 20)
    assert SparseVLM().reindexes and not SparseVLMPlus().reindexes


def test_fields_that_contradict_are_refused():
    for kind, fields, message in [
        (SparseVLM, {"tokens": 100}, "192, 128, 96, 64"),
        (SparseVLM, {"tokens": 192, "layers": (2, 6)}, "tokens is 192"),
        (SparseVLM, {"tokens": (300, 200), "layers": (2, 6, 15)}, "here 3"),
        (SparseVLM, {"tokens": (300, 200, 0)}, "tokens is"),
        (SparseVLM, {"tokens": 192, "scale": 13.5}, "one of the two"),
        (SparseVLM, {"bias": 6.0}, "without scale"),
        (SparseVLM, {"scale": -1.0}, "scale is -1.0"),
        (SparseVLM, {"layers": (6, 2, 15)}, "layers"),
        (SparseVLMPlus, {"heads": 0}, "heads is 0"),
        (SparseVLMPlus, {"per": -1}, "per is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            kind(**fields)
