import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from foveate.train.acceleration import enable_checkpointing
from foveate.train.adapters import (
    LLM_TARGETS,
    AdapterSettings,
    add_adapters,
    dequantize_llm,
    load_adapter,
    load_adapter_and_merge,
    merge_adapters,
    part_parameters,
    quantize_llm,
    save_adapter,
    trainable_parameters,
)
from foveate.train.recipe import PARTS
from foveate.vlm import FoveateConfig, FoveateForConditionalGeneration

IMAGE, VIDEO, VOCABULARY = 60, 61, 64
TOWERS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {"vision_use_head": False},
    "siglip2_vision_model": {"num_patches": 16, "vision_use_head": False},
    "clip_vision_model": {},
}


@pytest.fixture(autouse=True)
def _no_advice_from_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # It must be told that no base model was named, which is as wanted.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        yield


def make_model(
    tower: str = "siglip_vision_model", llm: str = "qwen2", seed: int = 0, **text: Any
) -> FoveateForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    grouped = {} if llm == "gpt2" else {"num_key_value_heads": 1}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = FoveateConfig(
        vision_config=AutoConfig.for_model(tower, **(sizes | {"image_size": 16, "patch_size": 4} | TOWERS[tower])),
        text_config=AutoConfig.for_model(llm, **(sizes | grouped | tokens | text)),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    model = FoveateForConditionalGeneration(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_inputs(seed: int = 1) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, IMAGE, (2, 12), generator=random)
    ids[:, 2:6] = IMAGE
    pixels = torch.randn(2, 3, 16, 16, generator=random)
    return {"input_ids": ids, "pixel_values": pixels, "labels": ids.where(ids != IMAGE, -100)}


def logits(model: FoveateForConditionalGeneration) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_inputs()).logits


def make_nontrivial(model: FoveateForConditionalGeneration) -> None:
    """New adapters are zero; this makes them matter."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in part_parameters(model, "lora"):
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(parameter * (1 + 0.3 * noise) if "magnitude" in name else 0.3 * noise)


def train(model: FoveateForConditionalGeneration, parts: list[str], steps: int = 12) -> tuple[list[float], set[str]]:
    """The loss of each step, and the names of what was trained."""
    model.train()
    model.requires_grad_(False)
    chosen = {name: p for named in trainable_parameters(model, parts).values() for name, p in named}
    # The features are the input of the tower's second and last layer, which is so not in use.
    used = {name for name in chosen if not re.match(r"vision_tower\.(encoder\.layers\.1|post_layernorm)\.", name)}
    parameters = [p.requires_grad_(True) for p in chosen.values()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(**make_inputs()).loss
        loss.backward()
        optimizer.step()
        assert all((p.grad is not None) == (n in used) for n, p in model.named_parameters())
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses, used


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


# Adapters

SETTINGS = {
    "lora": AdapterSettings(rank=4, alpha=8),
    "dora": AdapterSettings(rank=4, alpha=8, dora=True),
    "all-linear": AdapterSettings(rank=2, targets="all-linear"),
    "tower": AdapterSettings(rank=2, targets=("q_proj", "fc1"), parts=("tower",)),
    "both": AdapterSettings(rank=2, dora=True, targets="all-linear", parts=("llm", "tower")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_new_adapters_change_nothing_and_alone_are_trained(name: str) -> None:
    model, settings = make_model(), SETTINGS[name]
    before = logits(model)
    embedding = model.get_input_embeddings()
    add_adapters(model, settings)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert model.get_input_embeddings() is embedding
    adapted = ("language_model.", "vision_tower.") if len(settings.parts) == 2 else ()
    adapted = adapted or (("language_model.",) if settings.parts == ("llm",) else ("vision_tower.",))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith(adapted):
            assert parameter.requires_grad == (".lora_" in parameter_name), parameter_name
        else:
            assert parameter.requires_grad and ".lora_" not in parameter_name, parameter_name


def test_the_right_layers_are_adapted() -> None:
    def layers(**options: Any) -> set[str]:
        model = make_model()
        add_adapters(model, AdapterSettings(rank=2, **options))
        return {re.sub(r"\.lora_.*", "", name) for name, _ in part_parameters(model, "lora")}

    blocks = [f"language_model.model.layers.{i}" for i in range(2)]
    attention = {f"{block}.self_attn.{name}_proj" for block in blocks for name in "qkvo"}
    mlp = {f"{block}.mlp.{name}_proj" for block in blocks for name in ("gate", "up", "down")}
    assert layers() == layers(targets="all-linear") == attention | mlp, "never the head"
    assert layers(targets=("q_proj", "k_proj", "v_proj", "o_proj")) == attention
    tower = {f"vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert layers(targets=("q_proj",), parts=("tower",)) == tower


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("tied", [False, True])
def test_merging_gives_the_adapted_logits_and_the_plain_modules(name: str, tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    plain, before, names = logits(model), kinds(model), list(model.state_dict())
    adapters = add_adapters(model, SETTINGS[name])
    make_nontrivial(model)
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 0.1
    merge_adapters(adapters)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5 * adapted.abs().max().item())
    assert kinds(model) == before and list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    assert part_parameters(model, "lora") == []
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied == model.config.text_config.tie_word_embeddings
    add_adapters(model, SETTINGS[name])  # and the next stage can begin


def test_a_merged_lora_is_the_weight_plus_the_scaled_product() -> None:
    model = make_model()
    layer = model.language_model.model.layers[1].mlp.up_proj
    before = layer.weight.detach().clone()
    adapters = add_adapters(model, AdapterSettings(rank=4, alpha=6))
    make_nontrivial(model)
    weights = {name.rpartition(".up_proj.")[2]: p for name, p in part_parameters(model, "lora") if "1.mlp.up_" in name}
    expected = before + 6 / 4 * weights["lora_B.default.weight"] @ weights["lora_A.default.weight"]
    merge_adapters(adapters)
    torch.testing.assert_close(layer.weight, expected)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_training_with_checkpointing_lowers_the_loss_and_generation_works(name: str) -> None:
    model = make_model()
    frozen = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapters = add_adapters(model, SETTINGS[name])
    enable_checkpointing(model)
    losses, _ = train(model, ["lora"])
    assert losses[-1] < 0.9 * losses[0]
    inputs = {key: tensor for key, tensor in make_inputs().items() if key != "labels"}
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE, VIDEO])
    for key, tensor in model.state_dict().items():
        if ".lora_" not in key:
            assert torch.equal(tensor, frozen[key.replace(".base_layer", "")]), key
    merge_adapters(adapters)
    again = model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE, VIDEO])
    assert answer.shape == (2, 15) and torch.equal(answer, again)


def test_dropout_falls_on_the_adapters_input_while_training() -> None:
    model = make_model()
    add_adapters(model, AdapterSettings(rank=4, dropout=0.5))
    make_nontrivial(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_adapters_of_a_bf16_model_are_fp32() -> None:
    model = make_model().bfloat16()
    add_adapters(model, SETTINGS["dora"])
    assert {p.dtype for _, p in part_parameters(model, "lora")} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


# Files


@pytest.mark.parametrize("name", SETTINGS)
def test_a_saved_adapter_loads_and_merges_into_a_new_model(name: str, tmp_path: Path) -> None:
    model = make_model()
    adapters = add_adapters(model, SETTINGS[name])
    make_nontrivial(model)
    save_adapter(adapters, tmp_path)
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    again = make_model()
    loaded = load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert {p.requires_grad for _, p in part_parameters(again, "lora")} == {True}
    merge_adapters(loaded)
    fresh = make_model()
    load_adapter_and_merge(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(again))
    assert kinds(fresh) == kinds(make_model())


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_peft_itself_loads_a_saved_adapter(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, fresh = make_model(), make_model()
    adapters = add_adapters(model, SETTINGS[name])
    make_nontrivial(model)
    save_adapter(adapters, tmp_path)
    ids = torch.randint(0, IMAGE, (2, 9))
    with torch.no_grad():
        wrapped = PeftModel.from_pretrained(fresh.language_model, str(tmp_path))
        assert torch.equal(wrapped(input_ids=ids).logits, model.language_model(input_ids=ids).logits)


def test_what_peft_saved_loads(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    source, model = make_model(), make_model()
    get_peft_model(source.language_model, LoraConfig(r=3, target_modules=["v_proj"])).save_pretrained(str(tmp_path))
    load_adapter(model, tmp_path)
    names = {name for name, _ in part_parameters(model, "lora")}
    assert len(names) == 4 and all(".v_proj.lora_" in name for name in names)
    assert torch.equal(model.state_dict()[min(names)], source.state_dict()[min(names)])


def test_gathered_tensors_can_be_saved_in_place_of_the_models_own(tmp_path: Path) -> None:
    model = make_model()
    adapters = add_adapters(model, SETTINGS["both"])
    make_nontrivial(model)
    gathered, expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}, logits(model)
    with torch.no_grad():
        for _, parameter in part_parameters(model, "lora"):
            parameter.zero_()
    save_adapter(adapters, tmp_path, gathered)
    again = make_model()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), expected)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"holds no adapter_config.json; accepted: a folder that save_adapter"):
        load_adapter(model, tmp_path)
    adapters = add_adapters(model, SETTINGS["lora"])
    with pytest.raises(ValueError, match="the llm has adapters already; accepted: one set"):
        add_adapters(model, SETTINGS["lora"])
    save_adapter(adapters, tmp_path)
    with pytest.raises(ValueError, match=r"the adapter doesn't fit the llm: .*lora_.* \(of \d+\)"):
        load_adapter(make_model(hidden_size=64), tmp_path)
    with pytest.raises(ValueError, match=r"\['q_proj', .* are in no layer of the llm \(gpt2\); accepted: .* c_attn"):
        add_adapters(make_model(llm="gpt2"), AdapterSettings())
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3", "target_modules": ["q_proj"]}')
    with pytest.raises(ValueError, match=r"adapter_config.json has peft_type .*IA3; accepted: LORA"):
        load_adapter(make_model(), tmp_path)


def test_a_merged_weight_that_is_not_finite_is_refused() -> None:
    model = make_model()
    adapters = add_adapters(model, SETTINGS["lora"])
    make_nontrivial(model)
    with torch.no_grad():
        part_parameters(model, "lora")[0][1][0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        merge_adapters(adapters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adapters.rank is 0; accepted: 1 or more"),
        ({"alpha": 0}, "adapters.alpha is 0; accepted: above 0"),
        ({"dropout": 1.0}, "adapters.dropout is 1.0; accepted"),
        ({"targets": ()}, r"adapters.targets is \(\); accepted"),
        ({"parts": ("projector",)}, r"adapters.parts is \('projector',\); accepted: llm, tower"),
    ],
)
def test_a_wrong_setting_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterSettings(**options)


# QLoRA


def quantised_model() -> FoveateForConditionalGeneration:
    pytest.importorskip("bitsandbytes")
    return quantize_llm(wide_model(), torch.float32)


def wide_model() -> FoveateForConditionalGeneration:
    return make_model(hidden_size=64, intermediate_size=128)


def test_the_llms_linear_layers_are_held_in_4_bits() -> None:
    import bitsandbytes as bnb

    model, plain = quantised_model(), wide_model()
    quantised = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    blocks = [f"language_model.model.layers.{i}" for i in range(2)]
    expected = {f"{block}.self_attn.{name}_proj" for block in blocks for name in "qkvo"}
    assert quantised == expected | {f"{block}.mlp.{name}_proj" for block in blocks for name in ("gate", "up", "down")}
    # the sixteen levels of NF4, from QLoRA's appendix E, to four digits
    levels = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
    levels += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
    for name in quantised:
        layer, original = model.get_submodule(name), plain.get_submodule(name).weight.detach()
        assert layer.weight.numel() * layer.weight.element_size() == original.numel() / 2
        blocks_of_64 = original.flatten().unflatten(0, (-1, 64))
        scale = blocks_of_64.abs().amax(1, keepdim=True)
        nearest = (blocks_of_64 / scale).unsqueeze(-1).sub(torch.tensor(levels)).abs().argmin(-1)
        rounded = (torch.tensor(levels)[nearest] * scale).view_as(original)
        identity = torch.eye(layer.in_features)
        with torch.no_grad():
            bias = 0 if layer.bias is None else layer.bias
            weight = (layer(identity) - bias).T
        # The scales are quantised too, to 8 bits; a weight midway between two levels may go to either.
        assert ((weight - rounded).abs() > 0.01 * original.abs().max()).double().mean() < 0.01, name


@pytest.mark.parametrize("dora", [False, True])
def test_qlora_lowers_the_loss_and_merges_into_plain_weights(dora: bool, tmp_path: Path) -> None:
    model = quantised_model()
    adapters = add_adapters(model, AdapterSettings(rank=4, dora=dora))
    losses, _ = train(model, ["lora"])
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        evaluated = model(**make_inputs()).loss.item()
    losses, _ = train(model, ["lora"], steps=2)
    assert losses[0] == pytest.approx(evaluated, rel=1e-5), "an evaluation changes nothing"
    adapted, plain = logits(model), wide_model()
    merge_adapters(adapters)
    assert kinds(model) == kinds(plain) and list(model.state_dict()) == list(plain.state_dict())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4 * adapted.abs().max().item())
    model.save_pretrained(tmp_path)
    again = FoveateForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_a_qlora_loads_best_onto_the_quantised_llm(tmp_path: Path) -> None:
    model = quantised_model()
    adapters = add_adapters(model, SETTINGS["lora"])
    make_nontrivial(model)
    expected = logits(model)
    save_adapter(adapters, tmp_path)
    again, other = quantised_model(), wide_model()
    load_adapter_and_merge(again, tmp_path)
    load_adapter_and_merge(other, tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert (logits(other) - expected).abs().max() > 100 * (logits(again) - expected).abs().max()


def test_dequantised_weights_are_the_quantised_ones() -> None:
    model = quantised_model()
    expected = logits(model)
    dequantize_llm(model)
    assert kinds(model) == kinds(wide_model())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    quantize_llm(model, torch.float32)
    torch.testing.assert_close(logits(model), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


def test_quantised_weights_are_not_trained_nor_quantised_again() -> None:
    model = quantised_model()
    with pytest.raises(ValueError, match=r"llm is trained but .* is held in 4 bits; accepted: lora in its place"):
        trainable_parameters(model, ["llm"])
    assert trainable_parameters(model, ["llm_norms", "llm_embeddings"])
    with pytest.raises(ValueError, match="the LLM is quantised or has adapters already"):
        quantize_llm(model)
    with pytest.raises(ValueError, match=r"q_proj of the LLM has 32 inputs; accepted for 4 bits: multiples of 64"):
        quantize_llm(make_model())
    with pytest.raises(ValueError, match=r"text_config gpt2 has no nn.Linear to quantise"):
        quantize_llm(make_model(llm="gpt2"))


# Parts


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("tied", [False, True])
def test_parts_hold_what_their_names_say(tower: str, tied: bool) -> None:
    model = make_model(tower, "qwen3", tie_word_embeddings=tied)
    add_adapters(model, AdapterSettings(rank=2))
    names = {part: [name for name, _ in part_parameters(model, part)] for part in PARTS}
    for part in PARTS:
        assert len(names[part]) == len(set(names[part])) > 0
    everything = {name for name, _ in model.named_parameters()}
    assert set().union(*(names[p] for p in ("tower", "projector", "llm", "lora"))) == everything
    assert sum(len(names[p]) for p in ("tower", "projector", "llm", "lora")) == len(everything)
    assert all(name.startswith("vision_tower.") for name in names["tower"])
    assert all(name.startswith("multi_modal_projector.") for name in names["projector"])
    assert len(names["lora"]) == 2 * 2 * len(LLM_TARGETS)
    head = [] if tied else ["language_model.lm_head.weight"]
    assert names["llm_embeddings"] == ["language_model.model.embed_tokens.weight", *head]
    norms = [f"{i}.{n}" for i in range(2) for n in ("self_attn.q_norm", "self_attn.k_norm")]
    norms += [f"{i}.{n}_layernorm" for i in range(2) for n in ("input", "post_attention")]
    expected = {f"language_model.model.layers.{norm}.weight" for norm in norms}
    assert set(names["llm_norms"]) == expected | {"language_model.model.norm.weight"}
    tower_norms = set(names["tower_norms"])
    assert tower_norms == {name for name in names["tower"] if re.search(r"norm\d?\.|layrnorm\.", name)}
    assert len(tower_norms) == 2 * (2 * 2 + (2 if tower.startswith("clip") else 1))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["tower", "tower_norms"], "tower and tower_norms are trained in one stage"),
        (["llm", "lora"], "llm and lora are trained in one stage"),
        (["llm_norms", "llm"], "llm and llm_norms are trained in one stage"),
        (["llm", "llm_embeddings"], "llm and llm_embeddings are trained in one stage"),
        (["tower", "lora"], "tower and lora are trained in one stage"),
        (["head"], "part is 'head'; accepted: tower, tower_norms"),
    ],
)
def test_parts_that_overlap_are_refused(parts: list[str], message: str) -> None:
    model = make_model()
    add_adapters(model, SETTINGS["both"])
    with pytest.raises(ValueError, match=message):
        trainable_parameters(model, parts)


def test_a_tower_trains_beside_the_llms_adapters_and_lora_needs_adapters() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="lora is trained but the model has no such parameters; add_adapters"):
        trainable_parameters(model, ["lora"])
    add_adapters(model, SETTINGS["lora"])
    assert list(trainable_parameters(model, ["tower", "lora"])) == ["tower", "lora"]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (AdapterSettings(rank=4), ["tower_norms", "lora"]),  # NVILA
        (AdapterSettings(rank=8, targets=LLM_TARGETS[:4]), ["lora", "llm_embeddings", "llm_norms"]),  # LongVILA, 4
    ],
    ids=["nvila", "longvila"],
)
def test_published_tunings_move_their_parameters_alone(settings: AdapterSettings, parts: list[str]) -> None:
    model = make_model(tie_word_embeddings=True)
    add_adapters(model, settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, used = train(model, parts, steps=3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == used
    assert {part for part in PARTS for name, _ in part_parameters(model, part) if name in moved} >= set(parts)
