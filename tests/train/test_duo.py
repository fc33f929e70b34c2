"""DuoAttention's gates: what they mix, what they are trained on, and that they find a head that was planted."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.data.glyphs import glyph_tokenizer
from foveate.train.duo import (
    DuoSettings,
    gated_attention,
    identify_heads,
    passkey_texts,
    streaming_attention,
    train_gates,
    vocabulary_of,
    write_heads,
)
from foveate.vlm.cache.split import DuoAttention

SETTINGS = DuoSettings(
    sink=2, window=8, lengths=(60, 80), passkeys=3, passkey_tokens=4, name_tokens=2, batch=2, steps=60,
    learning_rate=0.05, penalty=0.01,
)  # fmt: skip
WORDS = torch.arange(3, 50)
PLANTED = (1, 2)  # layer, KV head


def tiny_llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | fields)).eval()


def near(tokens: int, sink: int, window: int) -> torch.Tensor:
    """What a streaming head sees, [queries, keys], pair by pair."""
    return torch.tensor([[j <= i and (j < sink or i - j < window) for j in range(tokens)] for i in range(tokens)])


@pytest.mark.parametrize(("tokens", "sink", "window"), [(150, 3, 20), (150, 40, 70), (9, 4, 16), (70, 0, 1)])
def test_streaming_attention_is_that_of_its_mask(tokens: int, sink: int, window: int) -> None:
    query = torch.randn(2, 4, tokens, 8, dtype=torch.double)
    keys, values = torch.randn(2, 2, 2, tokens, 8, dtype=torch.double)
    scores = 0.3 * query @ keys.repeat_interleave(2, dim=1).mT
    weights = scores.masked_fill(~near(tokens, sink, window), -torch.inf).softmax(-1)
    given = streaming_attention(query, keys, values, 0.3, sink, window)
    assert (given - weights @ values.repeat_interleave(2, dim=1)).abs().max() < 1e-12


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gates_mix_what_a_head_sees(attention: str) -> None:
    """Half a gate is half of the full attention's output; outputs are compared behind the first attention block."""
    model = tiny_llama(num_key_value_heads=2, attn_implementation=attention).double()
    decoder, ids = model.get_decoder(), torch.randint(3, 50, (2, 40))
    seen: list[torch.Tensor] = []
    hook = decoder.layers[0].self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        decoder(input_ids=ids)
        for gate in (1.0, 0.0, 0.5):
            with gated_attention(decoder, torch.full((2, 2), gate), 2, 8):
                decoder(input_ids=ids)
        mask = near(40, 2, 8).expand(2, 1, 40, 40)
        decoder(input_ids=ids, attention_mask=mask if attention == "sdpa" else (~mask).double() * -1e300)
    hook.remove()
    full, opened, closed, half, masked = seen
    assert (full - opened).abs().max() < 1e-12
    assert (masked - closed).abs().max() < 1e-6  # eager attention's softmax is in float32
    assert ((full + masked) / 2 - half).abs().max() < 1e-6
    assert (full - masked).abs().max() > 1e-2
    assert model.config._attn_implementation == attention


def test_texts_end_in_passkeys_that_stand_in_them_under_the_same_names() -> None:
    texts, lengths = passkey_texts(WORDS, SETTINGS, first=1), set()
    for _ in range(5):
        recall = next(texts)
        ids = recall.inputs["input_ids"]
        lengths.add(ids.shape[1])
        assert ids.shape == recall.recalled.shape
        assert recall.recalled.sum(1).tolist() == [12, 12]
        assert ids[:, 0].tolist() == [1, 1] and set(ids[:, 1:].flatten().tolist()) <= set(WORDS.tolist())
        for row, asked in zip(ids.tolist(), recall.recalled.tolist(), strict=True):
            text, questions = row[:-18], [row[-18:][i : i + 6] for i in (0, 6, 12)]  # name and passkey
            assert asked[-18:] == [False, True, True, True, True, False] * 3
            for record in questions:
                assert any(text[i : i + 6] == record for i in range(len(text)))
    assert len(lengths) > 1 and min(lengths) >= 60 and max(lengths) <= 80
    again = next(passkey_texts(WORDS, SETTINGS, first=1)).inputs["input_ids"]
    assert torch.equal(again, next(passkey_texts(WORDS, SETTINGS, first=1)).inputs["input_ids"])
    with pytest.raises(ValueError, match="above 36, the tokens of 3 passkeys"):
        next(passkey_texts(WORDS, replace(SETTINGS, lengths=(36, 80))))


def test_a_planted_retrieval_head_is_found() -> None:
    """All heads add the same whatever they look at, but one, which averages the text."""
    model = tiny_llama(attention_bias=True)
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        with torch.no_grad():
            attention.v_proj.bias.normal_(std=0.1)  # less than what tells tokens apart
            for head, weight in enumerate(attention.v_proj.weight.unflatten(0, (4, 8))):
                weight.mul_(5.0 * ((number, head) == PLANTED))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps: list[tuple[int, float, float]] = []
    gates = train_gates(model, passkey_texts(WORDS, SETTINGS), SETTINGS, lambda *told: steps.append(told))
    assert gates[PLANTED] > 0.9
    others = torch.ones_like(gates, dtype=torch.bool)
    others[PLANTED] = False
    assert gates[others].max() < 0.1
    assert gates.min() >= 0 and gates.max() <= 1
    assert [step for step, *_ in steps] == list(range(1, 61))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_file_says_which_heads_stay_whole(tmp_path: Path) -> None:
    write_heads(tmp_path / "heads.json", torch.tensor([[0.2, 0.7], [0.51, 0.5]]), SETTINGS, {})
    duo = DuoAttention(str(tmp_path / "heads.json"))
    assert duo.retrieval.tolist() == [[False, True], [True, False]]
    assert (duo.streaming.sink, duo.streaming.window) == (2, 8)
    assert DuoAttention(str(tmp_path / "heads.json"), sink=1, window=5).streaming.window == 5


def test_heads_of_a_stock_model_are_written(tmp_path: Path) -> None:
    tokenizer, printed = glyph_tokenizer(), io.StringIO()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = vocabulary_of(tokenizer, 1000).tolist()
    assert words == [
        i for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) if token[0] != "<"
    ]
    settings = replace(SETTINGS, steps=2)
    gates = identify_heads(
        str(tmp_path / "model"), tmp_path / "heads.json", settings, "passkeys", Console(file=printed, width=200)
    )
    told = json.loads((tmp_path / "heads.json").read_text())
    assert torch.allclose(torch.tensor(told["gates"]), gates, atol=1e-4)
    assert (told["window"], told["steps"], told["data"], told["threshold"]) == (8, 2, "passkeys", 0.5)
    assert "8 of 8 KV heads are retrieval heads" in printed.getvalue()
    with pytest.raises(ValueError, match="no model of Foveate's"):
        identify_heads(str(tmp_path / "model"), tmp_path / "heads.json", settings, "needles", Console(file=printed))


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [("window", 0, "at least 1"), ("sink", -1, "at least 0"), ("lengths", (9, 8), "shortest ≤ longest")],
)
def test_wrong_settings_are_refused(field: str, value: Any, accepted: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is .*; accepted: {accepted}"):
        replace(SETTINGS, **{field: value})
