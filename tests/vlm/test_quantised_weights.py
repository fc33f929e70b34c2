"""Quantised weights: what is saved stands for what is computed, and comes back as it was."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from foveate.vlm import FoveateForConditionalGeneration, quantised_weights
from foveate.vlm.checkpoints import load
from foveate.vlm.export import export
from foveate.vlm.quantised_weights import (
    QuantisationError,
    Scheme,
    parse_scheme,
    quantise,
    use_kernels,
    weight_bytes,
)

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
W4, W8 = Scheme("w4a16", 32), Scheme("w8a8")


@pytest.fixture
def model(tiny: Any) -> FoveateForConditionalGeneration:
    return tiny.model(llm_options=SIZES)


def ids(model: FoveateForConditionalGeneration) -> torch.Tensor:
    return torch.randint(5, model.config.text_config.vocab_size - 5, (2, 9), generator=torch.Generator().manual_seed(1))


def numbers(weight: Any) -> np.ndarray:
    """What saved 4-bit codes stand for, byte by byte, as torchao says: float64 [out, in]."""
    rows, columns = weight.shape
    stood_for = np.empty((rows, columns))
    group = weight.block_size[1]
    for row, held in enumerate(weight.qdata.numpy().view(np.uint8)):
        for column in range(columns):
            nibble = (held[column // 2] >> (4 * (column % 2))) & 15
            code = int(nibble) - 16 * (nibble > 7)
            scale, zero = (float(part[column // group, row]) for part in (weight.scale, weight.zero_point))
            stood_for[row, column] = scale * code + zero
    return stood_for


def linear_of(scheme: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, torch.Tensor, Any]:
    """A layer whose inputs fit all schemes, its weight, and the weight quantised."""
    linear = nn.Linear(128, 24, dtype=dtype)
    linear.weight.data = (linear.weight.data + 0.1) * (1 + 20 * torch.rand(24, 1))
    weight = linear.weight.detach().clone()
    return linear, weight, quantised_weights._four_bits(weight, parse_scheme(scheme))


def activations(x: torch.Tensor, scheme: str) -> torch.Tensor:
    """What a layer reads of its inputs, in float64."""
    if scheme != "w4a8":
        return x.bfloat16().double()
    steps = x.double().abs().amax(-1, keepdim=True) / 448
    read = (x.double() / steps).to(torch.float8_e4m3fn).double() * steps
    assert not torch.allclose(read, x.double(), rtol=1e-2)
    return read


@pytest.mark.parametrize(("scheme", "group"), [("w4a16:group=32", 32), ("w4a16", 128), ("w4a8", 128)])
def test_four_bit_layers_compute_with_the_numbers_that_are_saved(scheme: str, group: int) -> None:
    linear, weight, packed = linear_of(scheme)
    assert packed.qdata.nbytes == weight.numel() // 2 and packed.scale.shape == (128 // group, 24)
    stood_for = numbers(packed)
    steps = np.repeat(packed.scale.numpy().T, group, axis=1)
    error = np.abs(stood_for - weight.numpy().astype(np.float64)) / steps
    assert error.max() < (0.51 if scheme != "w4a8" else 1.01)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    use_kernels(linear)
    x = torch.randn(3, 5, 128)
    expected = activations(x, scheme) @ torch.from_numpy(stood_for).T + linear.bias.double()
    assert linear(x).dtype == x.dtype
    assert (linear(x) - expected).abs().max() < 5e-3 * expected.abs().max()


def test_w8a8_layers_multiply_integers() -> None:
    from torchao.quantization import quantize_

    linear = nn.Linear(40, 24)
    weight, x = linear.weight.detach().double(), torch.randn(7, 40)
    quantize_(linear, Scheme("w8a8").config())
    codes, scales = linear.weight.qdata.long(), linear.weight.scale.double()
    assert ((codes * scales - weight).abs() <= 0.51 * scales).all() and codes.abs().max() >= 127
    steps = x.abs().amax(-1, keepdim=True).double() / 127.5
    integers = (x.double() / steps).round().clamp(-128, 127)
    expected = integers @ codes.double().T * steps * scales.T + linear.bias.double()
    assert (linear(x) - expected).abs().max() < 3e-2 * expected.abs().max()
    assert (linear(x) - expected).abs().mean() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize(("llm", "tower"), [(W4, W8), (W8, None), (None, W8)])
def test_saved_models_come_back_as_they_were(model: Any, tiny: Any, llm: Any, tower: Any, tmp_path: Path) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    memory = weight_bytes(model)
    quantise(model, llm, tower)
    assert weight_bytes(model) < memory
    export(model, tiny.processor(), tmp_path / "out")
    assert {file.suffix for file in (tmp_path / "out").iterdir()} <= {".json", ".safetensors", ".jinja", ".py"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    loaded, _ = load(tmp_path / "out")
    quantised = {name for name, weight in loaded.named_parameters() if hasattr(weight, "qdata")}
    parts = {name.split(".")[0] for name in quantised}
    assert parts == {part for part, scheme in (("language_model", llm), ("vision_tower", tower)) if scheme}
    assert all(".layers." in name and name.endswith("weight") for name in quantised)
    for name, weight in loaded.state_dict().items():
        if name not in quantised:
            assert torch.equal(weight, before[name]), name
    with pytest.raises(ValueError, match=r"loaded with quantised weights, .* accepted: .* or a copy of the folder"):
        export(loaded, tiny.processor(), tmp_path / "again")
    for one in (model, loaded):
        use_kernels(one)
    inputs = {"input_ids": ids(model), "image_features": None}
    assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    images = torch.randn(2, 3, 16, 16)
    for own, other in zip(model.encode_images(images), loaded.encode_images(images), strict=True):
        assert torch.equal(own, other)


def test_more_bits_are_closer_to_floating_point(tiny: Any) -> None:
    divergences = []
    for scheme in ("w8a8", "w4a16:group=32", None):
        model = tiny.model(llm_options=SIZES)
        full = model(input_ids=ids(model)).logits.log_softmax(-1)
        if scheme:
            quantise(model, parse_scheme(scheme))
            use_kernels(model)
        own = model(input_ids=ids(model)).logits.log_softmax(-1)
        divergences.append((full.exp() * (full - own)).sum(-1).mean().item())
        torch.manual_seed(0)
    eight, four, none = divergences
    assert abs(none) < 1e-6 < eight < four / 10


def test_checkpoints_of_others_can_be_quantised(tiny: Any, tmp_path: Path) -> None:
    model = tiny.model("clip_vision_model", "llama", llm_options=SIZES, projector="mlp2x", vision_feature_layer=-2)
    processor = tiny.processor(downsample_factor=1)
    export(model, processor, tmp_path / "llava", format="stock")
    stock, _ = load(tmp_path / "llava")
    assert "quantization_config" not in vars(stock.config)
    for one in (model, stock):
        quantise(one, W4, W8)
        use_kernels(one)
    assert torch.equal(model(input_ids=ids(model)).logits, stock(input_ids=ids(model)).logits)


def test_tied_embeddings_stay(tiny: Any) -> None:
    model = tiny.model(llm_options=SIZES | {"tie_word_embeddings": True})
    quantise(model, W8)
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert type(head) is nn.Parameter and head.data_ptr() == embeddings.data_ptr()


# What is refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("w4a4", "scheme is 'w4a4'; accepted: w4a16, w8a8, w4a8"),
        ("w4a16:group=48", "w4a16: group is 48; accepted: 32, 64, 128, 256"),
        ("w4a16:size=32", "scheme is 'w4a16:size=32'; accepted: w4a16:group=N"),
        ("w8a8:group=32", "scheme is 'w8a8:group=32'; accepted: w8a8"),
        ("", "scheme is ''; accepted: w4a16, w8a8, w4a8"),
    ],
)
def test_unknown_schemes_are_refused(text: str, said: str) -> None:
    with pytest.raises(QuantisationError) as raised:
        parse_scheme(text)
    assert str(raised.value) == said


@pytest.mark.parametrize("text", ["w4a16:group=32", "w4a16:group=128", "w8a8", "w4a8"])
def test_a_schemes_text_is_read_back(text: str) -> None:
    assert parse_scheme(text).text == text


def test_sizes_that_do_not_fit_are_refused_and_nothing_is_changed(tiny: Any) -> None:
    model = tiny.model(llm_options=SIZES)
    with pytest.raises(
        QuantisationError, match=r"q_proj is 64 → 64; accepted by w4a16:group=128: .* 128 \(w4a16 takes "
    ):
        quantise(model, Scheme("w4a16"))
    with pytest.raises(QuantisationError, match=r"q_proj is 64 → 64; accepted by w4a8: inputs in multiples of 128"):
        quantise(model, Scheme("w4a8"), W8)
    with pytest.raises(QuantisationError, match="tower_weights is w4a16; accepted: w8a8"):
        quantise(model, W4, W4)
    assert not any(hasattr(weight, "qdata") for weight in model.parameters())
    odd = tiny.model(llm_options=SIZES | {"intermediate_size": 36})
    with pytest.raises(QuantisationError, match="gate_proj is 64 → 36; accepted by w8a8: multiples of 8"):
        quantise(odd, W8)
    with pytest.raises(QuantisationError, match=r"gpt2 has no nn\.Linear within its layers"):
        quantise(tiny.model(llm_name="gpt2"), W8)


def test_what_is_quantised_is_not_quantised_again_nor_exported_as_stock(model: Any, tiny: Any, tmp_path: Path) -> None:
    quantise(model, W8)
    with pytest.raises(QuantisationError, match="quantised already; accepted: a model in floating point"):
        quantise(model, W8)
    with pytest.raises(ValueError, match="weights are quantised; accepted by format 'stock': floating point"):
        export(model, tiny.processor(), tmp_path / "out", format="stock")


def test_a_missing_or_old_torchao_is_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised_weights, "version", lambda name: "0.17.0")
    with pytest.raises(QuantisationError, match=r"newer torchao than 0.17.0; .*pip install 'foveate\[quant\]'"):
        quantise(model, W8)
    monkeypatch.setattr(quantised_weights, "find_spec", lambda name: None)
    with pytest.raises(QuantisationError, match=r"torchao, which is not installed; .*pip install 'foveate\[quant\]'"):
        parse_scheme("w8a8")


def test_models_quantised_by_others_are_refused(model: Any, tiny: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(QuantisationError, match="quant_method is 'gptq'; accepted: torchao"):
        load(tmp_path)


def test_four_bit_weights_on_other_devices_are_refused() -> None:
    with pytest.raises(QuantisationError, match="4-bit weights are on mps; accepted: cpu or cuda"):
        quantised_weights._laid_out(SimpleNamespace(device=torch.device("mps")))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_on_cuda_four_bit_layers_compute_with_the_numbers_that_are_saved(scheme: str) -> None:
    linear, _, packed = linear_of(scheme, torch.bfloat16)
    stood_for = torch.from_numpy(numbers(packed)).cuda()
    linear.weight = nn.Parameter(packed, requires_grad=False)
    linear.cuda()
    use_kernels(linear)
    x = torch.randn(40, 128, device="cuda", dtype=torch.bfloat16)
    expected = activations(x, scheme) @ stood_for.T + linear.bias.double()
    assert (linear(x) - expected).abs().max() < 2e-2 * expected.abs().max()
