from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from foveate.train.acceleration import compile_model, convert_to_fp8, enable_checkpointing
from foveate.vlm import FoveateConfig, FoveateForConditionalGeneration

IMAGE, VIDEO, VOCABULARY = 60, 61, 64
TOWERS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {"vision_use_head": False},
    "siglip2_vision_model": {"num_patches": 16, "vision_use_head": False},
    "clip_vision_model": {},
}
PAIRS = [("siglip_vision_model", "qwen2"), ("siglip2_vision_model", "llama"), ("clip_vision_model", "gemma2")]


def make_model(
    tower: str = "siglip_vision_model",
    llm: str = "qwen2",
    layers: int = 2,
    features: int | None = -2,
    **text: Any,
) -> FoveateForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = FoveateConfig(
        vision_config=AutoConfig.for_model(tower, **(sizes | {"image_size": 16, "patch_size": 4} | TOWERS[tower])),
        text_config=AutoConfig.for_model(llm, **(sizes | {"num_key_value_heads": 1} | tokens | text)),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_feature_layer=features,
    )
    model = FoveateForConditionalGeneration._from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.train()


def make_inputs(tokens: int = 12, rows: int = 2) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, IMAGE, (rows, tokens), generator=random)
    ids[:, 2:6] = IMAGE
    positions = torch.cat([torch.arange(7), torch.arange(tokens - 7)]).expand(rows, tokens)  # two documents a row
    pixels = torch.randn(rows, 3, 16, 16, generator=random)
    labels = ids.where(ids != IMAGE, -100)
    return {"input_ids": ids, "position_ids": positions, "pixel_values": pixels, "labels": labels}


def loss_and_gradients(
    model: FoveateForConditionalGeneration, tokens: int = 12, rows: int = 2
) -> tuple[float, dict[str, torch.Tensor | None]]:
    model.zero_grad(set_to_none=True)
    loss = model(**make_inputs(tokens, rows), use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def add_lora(model: FoveateForConditionalGeneration, rank: int) -> None:
    # Imported here: a machine that runs the GPU tests alone need not have what recipes need.
    from foveate.train.adapters import AdapterSettings, add_adapters

    add_adapters(model, AdapterSettings(rank=rank))


def assert_same_step(
    model: FoveateForConditionalGeneration, other: FoveateForConditionalGeneration, **sizes: int
) -> None:
    loss, gradients = loss_and_gradients(model, **sizes)
    other_loss, other_gradients = loss_and_gradients(other, **sizes)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


# Checkpointing


class SavedBytes:
    """What the backward pass keeps, in bytes, without parameters."""

    def __init__(self, model: nn.Module):
        self.parameters = {p.data_ptr() for p in model.parameters()}
        self.storages: dict[int, int] = {}

    def __enter__(self) -> "SavedBytes":
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.parameters:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.hooks.__exit__(*args)
        self.total = sum(self.storages.values())


def saved_bytes(model: FoveateForConditionalGeneration) -> int:
    with SavedBytes(model) as saved:
        loss = model(**make_inputs(), use_cache=False).loss
    del loss
    return saved.total


@pytest.mark.parametrize(("tower", "llm"), PAIRS)
@pytest.mark.parametrize("parts", [("tower",), ("llm",), ("tower", "llm")], ids="+".join)
def test_checkpointing_keeps_less_and_changes_no_gradient(tower: str, llm: str, parts: tuple[str, ...]) -> None:
    plain, model = make_model(tower, llm), make_model(tower, llm)
    enable_checkpointing(model, parts)
    assert_same_step(model, plain)
    before, after = saved_bytes(plain), saved_bytes(model)
    assert after < 0.9 * before
    for part in parts if len(parts) > 1 else ():
        alone = make_model(tower, llm)
        enable_checkpointing(alone, [part])
        assert after < 0.9 * saved_bytes(alone), part
    assert list(model.state_dict()) == list(plain.state_dict())


def test_checkpointing_does_not_make_frozen_parts_compute_gradients() -> None:
    model = make_model()
    model.requires_grad_(False)
    enable_checkpointing(model)
    assert not model(**make_inputs(), use_cache=False).loss.requires_grad
    assert not model.get_inputs_embeds(make_inputs()["input_ids"], make_inputs()["pixel_values"]).requires_grad
    model.language_model.model.norm.requires_grad_(True)
    model(**make_inputs(), use_cache=False).loss.backward()
    assert model.language_model.model.norm.weight.grad is not None


def test_checkpointing_with_frozen_embeddings_reaches_adapters_in_every_layer() -> None:
    plain, model = make_model(), make_model()
    for each in (plain, model):
        add_lora(each, 2)
        each.vision_tower.requires_grad_(False)
        each.multi_modal_projector.requires_grad_(False)
    enable_checkpointing(model)
    for name, parameter in model.named_parameters():
        plain.get_parameter(name).data.copy_(parameter)
    assert_same_step(model, plain)
    gradients = loss_and_gradients(model)[1]
    assert all((gradient is not None) == (".lora_" in name) for name, gradient in gradients.items())


def test_a_part_that_can_not_be_checkpointed_is_named() -> None:
    with pytest.raises(ValueError, match="checkpointing is asked for of 'projector'; accepted: tower, llm"):
        enable_checkpointing(make_model(), ["projector"])


# Compilation


@pytest.fixture
def dynamo() -> Iterator[Any]:
    """PyTorch's compiler, with empty caches and counters."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("tower", "llm", "checkpointing", "features"),
    [
        (*PAIRS[0], True, -2),
        (*PAIRS[1], False, None),
        (*PAIRS[2], True, None),
    ],
)
def test_a_compiled_model_takes_the_same_step(
    dynamo: Any, tower: str, llm: str, checkpointing: bool, features: int | None
) -> None:
    plain, model = make_model(tower, llm, features=features), make_model(tower, llm, features=features)
    if checkpointing:
        enable_checkpointing(model)
    compile_model(model, backend="eager")
    for sizes in ({}, {"tokens": 23, "rows": 3}):
        assert_same_step(model, plain, **sizes)
    assert list(model.state_dict()) == list(plain.state_dict())
    if features is None:
        assert not dynamo.utils.counters["graph_break"]


def test_compiled_by_autograd_too_it_takes_the_same_step(dynamo: Any) -> None:
    plain, model = make_model(layers=1, features=None), make_model(layers=1, features=None)
    enable_checkpointing(model)
    compile_model(model, backend="aot_eager")
    assert_same_step(model, plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_layer_is_compiled_and_layers_share_a_compilation(dynamo: Any, checkpointing: bool) -> None:
    """So that many layers are not over PyTorch's limit, beyond which it doesn't compile any more."""
    graphs = {}
    for layers in (1, 4):
        dynamo.reset()
        counter = dynamo.testing.CompileCounterWithBackend("eager")
        model = make_model(features=None, layers=layers)
        if checkpointing:
            enable_checkpointing(model)
        compile_model(model, backend=counter)
        loss_and_gradients(model)
        graphs[layers] = counter.frame_count
        outside = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
        parts = ("vision_tower.encoder.layers", "language_model.model.layers")
        assert outside == [f"{part}.{i}" for part in parts for i in range(layers)]
    assert graphs == {1: 2, 4: 2}, "one for the tower's layers, one for the LLM's"


def test_adapters_are_compiled_without_a_break(dynamo: Any) -> None:
    plain, model = make_model(features=None), make_model(features=None)
    for each in (plain, model):
        torch.manual_seed(1)
        add_lora(each, 2)
    compile_model(model, backend="eager")
    assert_same_step(model, plain)
    assert not dynamo.utils.counters["graph_break"]


# fp8


def steps(model: FoveateForConditionalGeneration, number: int = 12) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(number):
        losses.append(loss_and_gradients(model)[0])
        optimizer.step()
    return losses


def test_fp8_rounds_the_llms_linear_layers_and_no_others() -> None:
    from torchao.float8.float8_linear import Float8Linear

    plain, model = make_model(llm="qwen2"), make_model(llm="qwen2")
    names = convert_to_fp8(model, emulate=True)
    blocks = [f"language_model.model.layers.{i}" for i in range(2)]
    expected = [f"{block}.self_attn.{name}_proj" for block in blocks for name in "qkvo"]
    expected += [f"{block}.mlp.{name}_proj" for block in blocks for name in ("gate", "up", "down")]
    converted = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert set(names) == converted == set(expected)
    assert type(model.get_output_embeddings()) is nn.Linear
    weights = model.state_dict()
    assert list(weights) == list(plain.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.state_dict().items())


def test_fp8_losses_track_those_in_full_precision() -> None:
    plain, model = make_model(), make_model()
    convert_to_fp8(model, emulate=True)
    expected, losses = steps(plain), steps(model)
    assert expected[-1] < 0.7 * expected[0]
    assert losses == pytest.approx(expected, rel=0.05)
    assert losses[0] != expected[0], "it rounds"


def test_a_layer_in_fp8_is_the_product_of_rounded_factors() -> None:
    """Each factor is scaled so that its largest element becomes e4m3's largest, 448, and rounded."""
    model = make_model()
    convert_to_fp8(model, emulate=True)
    layer = model.language_model.model.layers[0].mlp.up_proj
    states = torch.randn(5, 32)

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        scale = 448 / tensor.abs().max()
        return (tensor * scale).to(torch.float8_e4m3fn).float() / scale

    product = rounded(states) @ rounded(layer.weight.detach()).T
    torch.testing.assert_close(layer(states).detach(), product, rtol=1e-4, atol=1e-4)
    assert layer.config.emulate and layer.config.pad_inner_dim


def test_layers_that_fp8_can_not_take_and_adapters_stay() -> None:
    model = make_model(hidden_size=32, intermediate_size=40)
    add_lora(model, 16)
    names = convert_to_fp8(model, emulate=True)
    blocks = [f"language_model.model.layers.{i}.self_attn" for i in range(2)]
    assert set(names) == {f"{block}.{name}_proj.base_layer" for block in blocks for name in "qkvo"}
    with pytest.raises(ValueError, match=r"text_config qwen2 has no linear layer that can be fp8; .* multiples of 16"):
        convert_to_fp8(make_model(hidden_size=24, intermediate_size=40), emulate=True)


def test_a_device_without_fp8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"fp8 is asked for on cpu; accepted: a CUDA device of compute capability 8.9"):
        convert_to_fp8(make_model())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"on NVIDIA A100-SXM4-80GB, of compute capability 8.0; accepted"):
        convert_to_fp8(make_model(), device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert convert_to_fp8(make_model(), device=torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with fp8"
)
def test_fp8_on_a_gpu_tracks_bf16() -> None:
    """19 tokens: a number that fp8's products don't take unpadded."""
    pytest.importorskip("torchao")
    losses = {}
    for name in ("bf16", "fp8"):
        model = make_model(hidden_size=64, intermediate_size=128).cuda()
        if name == "fp8":
            assert convert_to_fp8(model)
        compile_model(model)
        inputs = {key: tensor.cuda() for key, tensor in make_inputs(19, 1).items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses[name] = []
        for _ in range(8):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**inputs, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["bf16"][-1] < 0.8 * losses["bf16"][0]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.1)
