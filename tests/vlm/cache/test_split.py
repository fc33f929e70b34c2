"""DuoAttention's heads against brute force: whole rows through the stock model with a mask for each head, in fp64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from foveate.vlm.cache import KVCache
from foveate.vlm.cache.split import DuoAttention, largest

LAYERS, HEADS, KV_HEADS, SINK, WINDOW = 3, 8, 4, 2, 5
GATES = [[0.9, 0.1, 0.2, 0.8], [0.0, 0.0, 0.0, 0.0], [1.0, 0.7, 0.6, 0.9]]  # mixed, all streaming, all retrieval


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=8, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"gates": GATES, "threshold": 0.5, "sink": SINK, "window": WINDOW}))
    return file


def _masked(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    """Attention of whole rows, each head with its own mask; padding is on the left."""
    out = torch.zeros_like(q)
    for row in range(len(q)):
        pad = 0 if mask is None else int((~mask[row, 0, -1]).sum())
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = scaling * q[row, head] @ k[row, group].T
            for i in range(pad, q.shape[2]):
                near = [j for j in range(pad, i + 1) if j - pad < SINK or i - j < WINDOW]
                seen = list(range(pad, i + 1)) if GATES[module.layer_idx][group] > 0.5 else near
                out[row, head, i] = scores[i, seen].softmax(0) @ v[row, group, seen]
    return out.transpose(1, 2), None


AttentionInterface.register("foveate_test_duo", _masked)
AttentionMaskInterface.register("foveate_test_duo", sdpa_mask)


def by_masks(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation("foveate_test_duo")
    try:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits
    finally:
        model.set_attn_implementation("sdpa")


def by_cache(model: Any, ids: torch.Tensor, mask: torch.Tensor, ends: list[int], kv: str) -> tuple[torch.Tensor, Any]:
    """Logits of passes that end at `ends`."""
    cache, logits, positions = KVCache(model, kv), [], (mask.cumsum(1) - 1).clamp(0)
    for begin, end in zip([0, *ends], ends, strict=False):
        with torch.no_grad():
            given = model(
                input_ids=ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
                past_key_values=cache,
            )  # fmt: skip
        logits.append(given.logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("pad", [0, 4])
def test_prompts_and_decode_steps_are_those_of_masked_heads(model: Any, heads: Path, pad: int) -> None:
    ids = torch.randint(1, 50, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    ends = [18, 19, 20, 21, 30, *range(31, 41)]  # a prompt, three steps, a second prompt, ten steps
    given, _ = by_cache(model, ids, mask, ends, f"duo:heads={heads}")
    expected = by_masks(model, ids, mask)
    assert (given - expected)[mask.bool()].abs().max() < 1e-10
    whole = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits
    assert (whole - expected)[mask.bool()].abs().max() > 1e-2


def test_streaming_heads_keep_sinks_and_window_and_retrieval_heads_all(model: Any, heads: Path) -> None:
    ids = torch.randint(1, 50, (1, 200))
    _, cache = by_cache(model, ids, torch.ones_like(ids), [200], f"duo:heads={heads}")
    held = [[part.store.columns for part in layer.layers] for layer in cache.layers]
    assert held == [[200, SINK + WINDOW - 1], [SINK + WINDOW - 1], [200]]
    assert cache.get_seq_length() == 200
    number = 8 * 2 * 8  # bytes of a token in a head
    assert cache.nbytes == number * (6 * 200 + 6 * (SINK + WINDOW - 1))


def test_beams_get_their_own_heads(model: Any, heads: Path) -> None:
    """Beam search reorders rows of both parts: its answer is that of a search without KV cache, by the masks."""
    ids = torch.randint(1, 50, (1, 14))
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    said = model.generate(ids, past_key_values=KVCache(model, f"duo:heads={heads}"), **options)
    model.set_attn_implementation("foveate_test_duo")
    try:
        assert torch.equal(said, model.generate(ids, use_cache=False, **options))
    finally:
        model.set_attn_implementation("sdpa")


def test_retrieval_heads_are_packed_by_any_store(model: Any, heads: Path) -> None:
    ids = torch.randint(1, 50, (1, 160))
    ends = [150, *range(151, 161)]
    dense, full = by_cache(model, ids, torch.ones_like(ids), ends, f"duo:heads={heads}")
    packed, small = by_cache(model, ids, torch.ones_like(ids), ends, f"duo:heads={heads}+int8:group=16,residual=16")
    assert 0 < (dense - packed).abs().max() < 0.2 * dense.std()
    assert small.nbytes < 0.5 * full.nbytes


def test_the_end_can_be_taken_back_until_a_head_has_evicted(model: Any, heads: Path) -> None:
    ids = torch.randint(1, 50, (1, 40))
    ones = torch.ones_like(ids)
    _, cache = by_cache(model, ids, ones, [6], f"duo:heads={heads}")
    cache.crop(-2)
    again = model(input_ids=ids[:, 4:6], past_key_values=cache).logits
    assert (again - by_masks(model, ids[:, :6], ones[:, :6])[:, 4:]).abs().max() < 1e-10
    _, cache = by_cache(model, ids, ones, [40], f"duo:heads={heads}")
    with pytest.raises(RuntimeError, match="evicted"):
        cache.crop(-2)


def test_a_ratio_takes_the_largest_gates(heads: Path) -> None:
    assert DuoAttention(str(heads), ratio=0.25).retrieval.tolist() == [
        [True, False, False, False], [False] * 4, [True, False, False, True],
    ]  # fmt: skip
    assert largest(torch.zeros(2, 2), 0.5).tolist() == [[True, True], [False, False]]


def test_wrong_files_and_models_are_refused(model: Any, heads: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json'; accepted: a file that foveate duo has written"):
        KVCache(model, f"duo:heads={tmp_path / 'none.json'}")
    (tmp_path / "odd.json").write_text(json.dumps({"gates": [[1.0]], "threshold": 0.5, "sink": 1, "window": 2}))
    with pytest.raises(ValueError, match="1 layers of 1 KV heads; accepted: 3 layers of 4"):
        KVCache(model, f"duo:heads={tmp_path / 'odd.json'}")
    with pytest.raises(ValueError, match=r"ratio is 2\.0; accepted: 0 to 1"):
        DuoAttention(str(heads), ratio=2.0)
