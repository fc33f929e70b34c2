"""StreamingLLM: how sinks move, and where they can't. That it agrees with brute force is in test_policies."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from foveate.vlm.cache import KVCache
from foveate.vlm.cache.parse import KVSpec
from foveate.vlm.cache.streaming import StreamingLLM, rotated

from ..pruning import zoo
from . import agreement, brute


def text_model(kind: str, **fields: Any) -> Any:
    sizes = {name: value for name, value in zoo._text(kind, **fields).items() if name != "model_type"}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
    {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=[rope["rope_type"] for rope in ROPES])
def test_moved_keys_are_those_of_the_model_at_later_places(rope: dict[str, Any]) -> None:
    decoder = text_model("llama", rope_parameters=rope).get_decoder()
    StreamingLLM().check(decoder)
    keys, places = torch.randn(2, 3, 5, 8), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    shift = torch.tensor([0, 90])
    before, after = (
        apply_rotary_pos_emb(keys, keys, *decoder.rotary_emb(keys, position_ids=at))[1]
        for at in (places, places + shift[:, None])
    )
    moved = rotated(before, shift[:, None, None], decoder.rotary_emb.inv_freq)
    assert (moved - after).abs().max() < 1e-4
    assert torch.equal(moved[0], before[0])


def test_channels_beyond_the_rotary_width_stay() -> None:
    keys = torch.randn(1, 1, 2, 8)
    moved = rotated(keys, torch.tensor(5), torch.tensor([1.0, 0.1]))
    assert torch.equal(moved[..., 4:], keys[..., 4:])
    assert torch.allclose(moved[..., :4], rotated(keys[..., :4], torch.tensor(5), torch.tensor([1.0, 0.1])))
    assert not torch.allclose(moved[..., :4], keys[..., :4])


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: zoo.animal("qwen2_5_vl").model, "M-RoPE"),
        (lambda: zoo.animal("qwen3_vl").model, "M-RoPE"),
        (
            lambda: text_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "RoPE of type 'dynamic', which depends on the length",
        ),
        (lambda: text_model("glm", partial_rotary_factor=0.5), "positions that are not RoPE on halves of each head"),
        (lambda: text_model("smollm3", no_rope_layer_interval=2), "positions that are not RoPE on halves"),
    ],
    ids=["qwen2_5_vl", "qwen3_vl", "dynamic", "glm", "smollm3"],
)
def test_where_sinks_can_not_move_only_own_positions_are_accepted(model: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why) as raised:
        KVCache(model(), "streaming:sink=4,window=16")
    assert str(raised.value).endswith("accepted: reindex=false, so that tokens keep their positions in the text")
    KVCache(model(), "streaming:sink=4,window=16,reindex=false")
    KVCache(model(), "streaming:sink=0,window=16")


def test_it_holds_no_more_than_sinks_and_window() -> None:
    """Nor does it lose sinks of rows that are padded, in whatever turn."""
    model, rows = zoo.animal("text qwen2").model, ("text", "image")
    inputs = zoo.animal("text qwen2").batch([agreement.row("text qwen2", pieces) for pieces in rows])
    _, kv = agreement.generated(
        model, inputs, [agreement.words(pieces, 30) for pieces in rows],
        past_key_values=KVCache(model, "streaming:sink=3,window=7"),
    )  # fmt: skip
    width = inputs["input_ids"].shape[1]
    for sample, begin in enumerate([width - 12, 0]):
        for heads in agreement.held(kv, sample, begin).values():
            last = width - begin + 30
            assert heads == [[0, 1, 2, *range(last - 6, last)]]


def test_sinks_of_padded_rows_are_found_when_the_answer_fills_the_window() -> None:
    """Nothing was evicted from the prompts."""
    spec, rule = KVSpec(policy=StreamingLLM(2, 44)), brute.streaming(2, 44)
    agreement.check("text llama", spec, rule, "three", steps=20)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sink": -1}, "sink is -1; accepted: at least 0"),
        ({"window": 0}, "window is 0; accepted: at least 1"),
        ({"windowed": True}, "windowed is true with reindex, .* accepted: reindex=false"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingLLM(**fields)
