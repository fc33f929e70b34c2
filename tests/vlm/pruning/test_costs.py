"""The published figures, and operations as torch counts them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaOnevisionConfig,
    MixtralConfig,
    Qwen2Config,
)

from foveate.vlm.pruning import costs, reduce
from foveate.vlm.pruning.base import Prefill, Pruner, Selection, Sight, Stage
from foveate.vlm.pruning.parse import parse_method

LLAVA_7B = LlavaConfig()  # its defaults are LLaVA-1.5-7B's


def made(*runs: tuple[int, int], text: int = 60, past: int = 0) -> Prefill:
    """One sample's prefill from runs of (layers, visual tokens)."""
    visual = tuple((tokens,) for layers, tokens in runs for _ in range(layers))
    return Prefill((past,), (text,), visual[0], visual, ())


# Layers that process so many visual tokens; SparseVLM prunes the output of layers 2, 6, 15 and adds recycled tokens.
@pytest.mark.parametrize(
    ("prefill", "share", "processed"),
    [
        (made((2, 576), (30, 288)), 0.57, 306.0),  # FastV K=2, R=50 %
        (made((2, 576), (30, 144)), 0.36, 171.0),  # R=75 %
        (made((8, 576), (8, 288), (8, 144), (8, 72)), 0.515, 270.0),  # PyramidDrop
        (made((3, 576), (4, 309), (9, 204), (16, 113)), 0.41, 206.5),  # SparseVLM "192"
        (made((3, 576), (4, 312), (9, 117), (16, 39)), 0.32, 145.4),  # "128"
        (made((3, 576), (4, 82), (9, 32), (16, 18)), 0.22, 82.2),  # "64"
    ],
)
def test_published_shares_of_flops_and_processed_tokens(prefill: Prefill, share: float, processed: float) -> None:
    prefill = Prefill(prefill.past, prefill.text, (576,), prefill.visual, prefill.stages)
    costs_of = costs.summary(LLAVA_7B, prefill)
    assert costs_of.pruned.paper_flops / costs_of.full.paper_flops == pytest.approx(share, abs=0.005)
    assert costs_of.pruned.mean_visual == pytest.approx(processed, abs=0.051)
    assert costs_of.full.mean_visual == 576


@pytest.mark.parametrize(("tokens", "share"), [(192, 0.39), (128, 0.29), (64, 0.19)])
def test_visionzip_s_published_shares(tokens: int, share: float) -> None:
    prefill = Prefill((0,), (60,), (576,), ((tokens,),) * 32, ())
    costs_of = costs.summary(LLAVA_7B, prefill)
    assert costs_of.pruned.paper_flops / costs_of.full.paper_flops == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(
    ("method", "share", "processed"),
    [
        ("fastv:layer=2,keep=0.5", 0.57, 306.0),
        ("fastv:layer=2,keep=0.25", 0.36, 171.0),
        ("pyramiddrop", 0.515, 270.0),
        ("sparsevlm:tokens=192", 0.41, 206.5),
        ("sparsevlm:tokens=128", 0.32, 145.4),
        ("sparsevlm:tokens=64", 0.22, 82.2),
    ],
)
def test_a_session_with_llava_s_layers_and_tokens_reports_the_published_figures(
    llava_deep: LlamaForCausalLM, method: str, share: float, processed: float
) -> None:
    """576 visual and 60 text tokens through 32 layers, narrow ones; figures for LLaVA-1.5-7B's sizes."""
    mask = (torch.arange(636) >= 35) & (torch.arange(636) < 35 + 576)
    reduction = reduce(llava_deep, parse_method(method), visual_mask=mask[None])
    with reduction as model, torch.no_grad():
        model(inputs_embeds=torch.randn(1, 636, 16), logits_to_keep=1)
    (prefill,) = reduction.prefills
    costs_of = costs.summary(LLAVA_7B, prefill)
    assert costs_of.pruned.paper_flops / costs_of.full.paper_flops == pytest.approx(share, abs=0.005)
    assert costs_of.pruned.mean_visual == pytest.approx(processed, abs=0.051)


@pytest.fixture(scope="module")
def llava_deep() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=32, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def test_kv_bytes_are_those_of_the_papers_and_of_qwen() -> None:
    """Qwen2.5-7B: 57,344 bytes a token; LLaVA-1.5-7B: 512 KiB a token, all in bf16."""
    qwen = Qwen2Config(
        hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, num_hidden_layers=28
    )
    one = made((28, 0), text=1)
    assert costs.kv_bytes(costs.Decoder.from_config(qwen), one) == 57_344
    llava = costs.Decoder.from_config(LLAVA_7B)
    assert costs.kv_bytes(llava, made((32, 0), text=1)) == 512 * 1024
    assert costs.kv_bytes(llava, made((2, 576), (30, 144))) == (2 * 636 + 30 * 204) * 16 * 1024
    assert costs.kv_bytes(llava, made((32, 0), text=1), torch.float32) == 2 * 512 * 1024


def tiny(**more: object) -> Qwen2Config:
    sizes = {
        "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    return Qwen2Config(**(sizes | more))


def test_flops_are_torch_s_count_but_for_what_causal_attention_skips() -> None:
    config, tokens = tiny(), 33
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, tokens, dtype=torch.long), logits_to_keep=1)
    skipped = 3 * 4 * 24 * (tokens**2 - tokens * (tokens + 1) // 2)
    counted = costs.prefill_flops(costs.Decoder.from_config(config), made((3, 23), text=10))
    rope = 2 * (4 // 2) * tokens  # which is a matrix product in transformers 5.17
    assert counter.get_total_flops() - counted - skipped in (0, rope)


@pytest.mark.parametrize(("past", "window"), [(0, None), (7, None), (0, 5), (3, 5), (9, 5)])
def test_attention_counts_the_pairs_of_the_mask(past: int, window: int | None) -> None:
    query, key = torch.arange(past, past + 11)[:, None], torch.arange(past + 11)
    seen = (key <= query) & (key > query - (window or 1000))
    plain, windowed = tiny(), tiny(use_sliding_window=True, sliding_window=window, max_window_layers=0)
    decoder = costs.Decoder.from_config(windowed if window else plain)
    alone = costs.Decoder(**(vars(decoder) | {"width": 0}))  # no weights: attention is left
    assert costs.prefill_flops(alone, made((3, 1), text=10, past=past)) == 3 * 4 * 24 * seen.sum().item()


class _Rates(Pruner):
    stages = (1, 2)

    def select(self, stage: int, sight: Sight) -> Selection:
        raise NotImplementedError


class _Own(_Rates):
    scored_by = "own"


class _Texts(_Rates):
    def raters(self, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(text), dtype=torch.bool)


class _Blind(_Rates):
    scored_by = "nothing"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (_Blind(), 0),
        (_Rates(), 48 * (30 + 20)),  # one row over the keys of layers 0 and 1; q·k of 6 heads of 4
        (_Own(), 48 * (30 + 20) + 2 * 24 * 4 * (2 * (30 + 20) + 6 * 2)),  # and their keys, and two queries
        (_Texts(), 10 * 48 * (30 + 20) + 2 * 24 * 10 * 20),  # ten rows; embeddings of ten texts and 20 visual tokens
    ],
)
def test_scoring_counts_rater_rows(method: Pruner, expected: float) -> None:
    prefill = Prefill((0, 0), (10, 9), (20, 0), ((20, 0), (10, 0), (5, 0)), ())  # a sample without media rates nothing
    assert costs.scoring_flops(costs.Decoder.from_config(tiny()), prefill, method) == expected


def test_a_batch_adds_up_and_unpruned_is_the_prompt() -> None:
    decoder, kept = costs.Decoder.from_config(tiny()), torch.arange(4)
    batch = Prefill((0, 5), (10, 3), (20, 8), ((20, 8), (4, 2), (4, 2)), (Stage(1, (kept, kept[:2]), (0, 0)),))
    first, second = made((1, 20), (2, 4), text=10), made((1, 8), (2, 2), text=3, past=5)
    for count in (costs.paper_flops, costs.prefill_flops, costs.kv_bytes):
        assert count(decoder, batch) == count(decoder, first) + count(decoder, second)
    assert costs.unpruned(batch) == Prefill((0, 5), (10, 3), (20, 8), ((20, 8),) * 3, ())
    assert costs.cost(decoder, batch).visual == (28, 6, 6)


def test_lines_say_what_each_layer_processes() -> None:
    counts, against = costs.summary(tiny(), made((1, 20), (2, 5), text=10)).lines()
    assert counts == "visual tokens: 20 in layer 0, 5 in layers 1-2"
    assert "processed visual tokens (mean) 10 of 20 (50.0%)" in against
    assert "KV cache 1.92 kB of 2.88 kB (66.7%)" in against


def test_sizes_of_other_llms_are_refused_and_read_from_whole_models() -> None:
    onevision = costs.Decoder.from_config(LlavaOnevisionConfig(text_config=tiny()))
    assert onevision == costs.Decoder.from_config(tiny())
    assert (onevision.layers, onevision.kv_heads, onevision.head_dim) == (3, 2, 4)
    with pytest.raises(ValueError, match="num_experts 8"):
        costs.Decoder.from_config(MixtralConfig())
    with pytest.raises(ValueError, match="prefill has 2 layers; accepted: the LLM's 3"):
        costs.summary(tiny(), made((2, 5)))
