"""The model against pipelines made by hand from its parts, and what transformers' users expect of a model."""

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    GenerationConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextConfig,
    TextIteratorStreamer,
)

from foveate.vlm import FoveateConfig, FoveateForConditionalGeneration, FoveateProcessor

PREFIX_TOKENS = {"clip_vision_model": 1, "dinov2": 1, "dinov2_with_registers": 4, "dinov3_vit": 3, "vit": 1}
OTHER_TOWERS = ("siglip2_vision_model", "clip_vision_model", "dinov2", "dinov2_with_registers")
F = nn.functional


# The pipeline by hand


def tower_layers(tower: nn.Module) -> nn.ModuleList:
    (layers,) = [
        m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == tower.config.num_hidden_layers
    ]
    return layers


def tower_inputs(model: FoveateForConditionalGeneration, pixels: torch.Tensor) -> dict[str, Any]:
    """What the tower's own documentation asks for."""
    config = model.config.vision_config
    patch, (images, _, height, width) = config.patch_size, pixels.shape
    if config.model_type != "siglip2_vision_model":
        options = {} if config.model_type.startswith("dinov2") else {"interpolate_pos_encoding": True}
        return {"pixel_values": pixels, **({} if height == width == config.image_size else options)}
    grid = (height // patch, width // patch)
    patches = []
    for image in pixels:
        for y in range(grid[0]):
            for x in range(grid[1]):
                square = image[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
                patches.append(square.permute(1, 2, 0).flatten())  # by row, column, channel, as NaFlex processors do
    return {
        "pixel_values": torch.stack(patches).unflatten(0, (images, -1)),
        "pixel_attention_mask": torch.ones(images, grid[0] * grid[1], dtype=torch.long),
        "spatial_shapes": torch.tensor([grid] * images),
    }


def tower_features(model: FoveateForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """The hidden states of a layer, caught by hooks at the layers: [images, tokens, C]."""
    tower, index = model.vision_tower, model.config.vision_feature_layer
    states: list[torch.Tensor] = []
    layers = tower_layers(tower)

    def note_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def note_output(module: nn.Module, args: tuple, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layers[0].register_forward_pre_hook(note_input, with_kwargs=True)]
    hooks += [layer.register_forward_hook(note_output) for layer in layers]
    final = tower(**tower_inputs(model, pixels)).last_hidden_state
    for hook in hooks:
        hook.remove()
    assert len(states) == len(layers) + 1
    features = final if index is None else states[index]
    if model.config.vision_feature_select_strategy == "default":
        features = features[:, PREFIX_TOKENS.get(model.config.vision_config.model_type, 0) :]
    return features


def project(model: FoveateForConditionalGeneration, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    p = list(model.multi_modal_projector.parameters())
    name = model.config.projector
    if name == "linear":
        return F.linear(features, *p)
    if name == "mlp2x":
        return F.linear(F.gelu(F.linear(features, *p[:2])), *p[2:])
    r = int(name[-1])
    rows, columns = math.ceil(grid[0] / r), math.ceil(grid[1] / r)
    tokens = []
    for image in features.unflatten(1, grid):
        padded = image.new_zeros(rows * r, columns * r, image.shape[-1])
        padded[: grid[0], : grid[1]] = image
        for y in range(rows):
            for x in range(columns):
                tokens.append(padded[y * r : (y + 1) * r, x * r : (x + 1) * r].flatten())
    x = torch.stack(tokens).unflatten(0, (len(features), -1))
    x = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], *p[:2]), *p[2:4]))
    if r == 2:
        return F.linear(x, *p[4:])
    return F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], *p[4:6]), *p[6:8])), *p[8:])


def encode(model: FoveateForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    patch = model.config.vision_config.patch_size
    grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
    return project(model, tower_features(model, pixels), grid)


def logits_by_hand(model: FoveateForConditionalGeneration, inputs: Any) -> torch.Tensor:
    """The LLM on embeddings laid one after the other, each placeholder taking the next feature."""
    table = model.language_model.get_input_embeddings()  # a module: Gemma's also scales
    dtype = table.weight.dtype
    images, frames = [], []
    if "pixel_values" in inputs:
        images = list(encode(model, inputs["pixel_values"].to(dtype)).flatten(0, 1))
    if "pixel_values_videos" in inputs:
        frames = list(encode(model, inputs["pixel_values_videos"].to(dtype)).flatten(0, 1))
    rows = []
    for ids in inputs["input_ids"].tolist():
        row = []
        for i in ids:
            if i == model.config.image_token_id:
                row.append(images.pop(0))
            elif i == model.config.video_token_id:
                row.append(frames.pop(0))
            else:
                row.append(table(torch.tensor(i)))
        rows.append(torch.stack(row))
    assert not images and not frames
    return model.language_model(inputs_embeds=torch.stack(rows), attention_mask=inputs["attention_mask"]).logits


def mixed_inputs(tiny: Any, processor: FoveateProcessor) -> Any:
    """Two rows of different length: two images and a video; an image."""
    return processor(
        text=["Left <image> right <image> then <video> ?", "Only <image>"],
        images=[tiny.image(0), tiny.image(1), tiny.image(2)],
        videos=[tiny.frames(3, 2)],
        padding=True,
        return_tensors="pt",
    )


MATRIX = [
    ("siglip_vision_model", "downsample-2x2", -2, "default", "qwen2"),
    ("siglip_vision_model", "downsample-3x3", None, "default", "llama"),
    ("siglip_vision_model", "mlp2x", -1, "full", "gemma2"),
    ("siglip_vision_model", "linear", 0, "default", "gpt2"),
    ("siglip2_vision_model", "downsample-2x2", -2, "default", "llama"),
    ("siglip2_vision_model", "downsample-3x3", -1, "default", "gemma2"),
    ("siglip2_vision_model", "mlp2x", None, "full", "qwen2"),
    ("clip_vision_model", "downsample-2x2", None, "default", "gpt2"),
    ("clip_vision_model", "downsample-3x3", -2, "default", "qwen2"),
    ("clip_vision_model", "mlp2x", -1, "full", "llama"),
    ("clip_vision_model", "linear", 1, "default", "gemma2"),
    ("dinov2", "downsample-2x2", -1, "default", "qwen2"),
    ("dinov2", "linear", None, "full", "gpt2"),
    ("dinov2", "downsample-3x3", -2, "default", "llama"),
    ("dinov2_with_registers", "downsample-2x2", -2, "default", "gemma2"),
    ("dinov2_with_registers", "mlp2x", None, "full", "qwen2"),
    ("dinov2_with_registers", "linear", 2, "default", "llama"),
    ("dinov3_vit", "downsample-2x2", -2, "default", "qwen2"),
    ("vit", "mlp2x", 3, "default", "llama"),
]


@pytest.mark.parametrize(("tower", "projector", "layer", "strategy", "llm"), MATRIX)
def test_logits_equal_the_pipeline_by_hand(
    tiny: Any, tower: str, projector: str, layer: int | None, strategy: str, llm: str
) -> None:
    model = tiny.model(
        tower,
        llm,
        projector=projector,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        dtype=torch.float32 if llm == "gemma2" else torch.float64,  # its eager attention: NaN in float64 where padded
    )
    prefix = PREFIX_TOKENS.get(tower, 0) if strategy == "full" else 0
    processor = tiny.processor(downsample_factor=model.config.downsample_factor, prefix_tokens=prefix)
    inputs = mixed_inputs(tiny, processor)
    tolerance = 1e-5 if llm == "gemma2" else 1e-7
    with torch.no_grad():
        expected = logits_by_hand(model, inputs)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [(24, 24), (8, 28), (12, 20)])
@pytest.mark.parametrize("tower", ["siglip_vision_model", "siglip2_vision_model", "clip_vision_model", "dinov2"])
def test_other_image_sizes_interpolate_the_positions(tiny: Any, tower: str, size: tuple[int, int]) -> None:
    model = tiny.model(tower, dtype=torch.float64)
    inputs = mixed_inputs(tiny, tiny.processor(image_size=size, video_size=(16, 16)))
    assert inputs["pixel_values"].shape[2:] == size
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits_by_hand(model, inputs), rtol=1e-7, atol=1e-7)


def test_pixels_beyond_the_last_whole_patch_do_not_matter(tiny: Any) -> None:
    for name in ("siglip_vision_model", "siglip2_vision_model", "dinov2"):
        model = tiny.model(name)
        pixels = torch.randn(1, 3, 18, 19)
        with torch.no_grad():
            expected = model.get_image_features(pixels[:, :, :16, :16]).pooler_output
            torch.testing.assert_close(model.get_image_features(pixels).pooler_output, expected)


@pytest.mark.parametrize("tower", [t for t in PREFIX_TOKENS] + ["siglip_vision_model", "siglip2_vision_model", "ijepa"])
def test_a_processor_counts_the_tokens_before_the_patches(tiny: Any, tmp_path: Path, tower: str) -> None:
    CLIPImageProcessor().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model = tiny.model(tower, projector="linear", vision_feature_select_strategy="full")
    processor = FoveateProcessor.from_parts(tmp_path, tmp_path, model.config)
    inputs = processor(text="<image>", images=tiny.image(0), return_tensors="pt")
    assert model.get_image_features(inputs["pixel_values"]).pooler_output.shape[1] == processor.tokens_per_image()


def test_a_tower_without_a_token_for_each_patch_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"'sam_vision_model' gave .* for 2 images of 4x4 patches; accepted: towers"):
        tiny.model("sam_vision_model").get_image_features(torch.zeros(2, 3, 16, 16))


def test_a_placeholder_mismatch_names_both_numbers(tiny: Any) -> None:
    model, processor = tiny.model(), tiny.processor()
    inputs = mixed_inputs(tiny, processor)
    with pytest.raises(ValueError, match=r"12 image placeholder tokens .* 8 features"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:2]})
    fewer = {"pixel_values_videos": inputs["pixel_values_videos"][:1], "video_grids": torch.tensor([[1, 1, 1]])}
    with pytest.raises(ValueError, match=r"8 video placeholder tokens .* 4 features"):
        model(**inputs | fewer)
    text = processor(text="no media", return_tensors="pt")
    with pytest.raises(ValueError, match=r"0 image placeholder tokens .* 4 features"):
        model(**text, pixel_values=inputs["pixel_values"][:1])


def test_placeholders_without_media_are_an_error(tiny: Any) -> None:
    model = tiny.model()
    inputs = mixed_inputs(tiny, tiny.processor())
    with pytest.raises(ValueError, match=r"12 image placeholder tokens .* 0 features"):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


def test_media_need_a_placeholder_token(tiny: Any) -> None:
    model = tiny.model()
    inputs = mixed_inputs(tiny, tiny.processor())
    model.config.image_token_id = None
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(ValueError, match=r"0 image placeholder tokens \(id None\) .* 12 features"):
            model.generate(**inputs, max_new_tokens=1, **options)


def test_features_can_be_given_instead_of_pixels(tiny: Any) -> None:
    model = tiny.model()
    inputs = mixed_inputs(tiny, tiny.processor())
    with torch.no_grad():
        images = model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
        frames = model.get_video_features(inputs["pixel_values_videos"]).pooler_output.flatten(0, 1)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        given = model(input_ids=ids, attention_mask=mask, image_features=images, video_features=frames).logits
        torch.testing.assert_close(given, model(**inputs).logits)


def test_logits_to_keep_are_the_last(tiny: Any) -> None:
    model = tiny.model()
    inputs = mixed_inputs(tiny, tiny.processor())
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, model(**inputs).logits[:, -2:])


def test_the_loss_is_the_mean_over_labelled_tokens(tiny: Any) -> None:
    model = tiny.model(dtype=torch.float64)
    inputs = mixed_inputs(tiny, tiny.processor())
    labels = inputs["input_ids"].clone()
    labels[inputs["attention_mask"] == 0] = -100
    labels[labels == model.config.image_token_id] = -100
    labels[labels == model.config.video_token_id] = -100
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    total, count = 0.0, 0
    for row, target in zip(output.logits.log_softmax(-1), labels.tolist(), strict=True):
        for position in range(1, len(target)):
            if target[position] != -100:
                total, count = total - row[position - 1, target[position]].item(), count + 1
    assert output.loss.item() == pytest.approx(total / count, rel=1e-6)


# Configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector": "conv"}, "projector is 'conv'; accepted: linear, mlp2x, downsample-RxR, pool-RxR, resampler"),
        ({"resampler_tokens": 0}, "resampler_tokens is 0; accepted: 1 or more"),
        ({"tiling": "grid"}, "tiling is 'grid'; accepted: resize, s2, dynamic-s2, tiles, anyres, native"),
        ({"tiling": "dynamic-s2"}, "s2_scales is None with tiling 'dynamic-s2'"),
        ({"s2_scales": [16, 32]}, "s2_scales is [16, 32] with tiling 'resize'"),
        ({"tiling": "s2", "s2_scales": [16, 24]}, "s2_scales is [16, 24]; accepted: ascending pixels, multiples of"),
        ({"tiling": "s2", "s2_scales": [32, 16]}, "s2_scales is [32, 16]; accepted: ascending pixels, multiples of"),
        (
            {"tiling": "native", "projector": "mlp2x", "vision_config": {"model_type": "qwen3_vl_vision"}},
            "projector 'mlp2x' makes tokens of 1x1 patches, but vision_config.spatial_merge_size is 2",
        ),
        (
            {"tiling": "anyres"},
            "tiling 'anyres' has its own way of pooling; accepted with it: projector linear or mlp2x",
        ),
        ({"video_pool": (8, 1)}, "video_pool is (8, 1); accepted: (frames, rows, columns), each at least 1"),
        ({"video_pool": (1, 0, 1)}, "video_pool is (1, 0, 1); accepted"),
        (
            {"video_pool": (1, 2, 2), "projector": "resampler"},
            "video_pool is (1, 2, 2), but a frame's tokens are no grid",
        ),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy is 'cls'; accepted: default, full"),
        ({"vision_feature_select_strategy": "full"}, "'full' keeps CLS tokens, which projector 'downsample-2x2'"),
        ({"vision_feature_layer": 4}, "vision_feature_layer is 4; this tower of 3 layers accepts -4 to 3"),
        ({"vision_feature_layer": -5}, "vision_feature_layer is -5"),
        ({"vision_config": {"hidden_size": 8}}, "vision_config has no model_type"),
        ({"text_config": "qwen2"}, "text_config is a str; accepted"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_accepted(tiny: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FoveateConfig(**({"vision_config": tiny.tower("siglip_vision_model")} | options))


def test_configuration_survives_saving(tiny: Any, tmp_path: Path) -> None:
    config = FoveateConfig(
        vision_config=tiny.tower("dinov2_with_registers"),
        text_config=tiny.llm("gemma2", 99).to_dict(),
        projector="mlp2x",
        vision_feature_layer=None,
        vision_feature_select_strategy="full",
        image_token_id=5,
        video_token_id=6,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is FoveateConfig
    assert type(loaded.text_config).__name__ == "Gemma2Config"
    assert loaded.vision_feature_layer is None
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


def test_embeddings_are_tied_as_the_llm_says(tiny: Any) -> None:
    for tied in (True, False):
        model = tiny.model(llm_options={"tie_word_embeddings": tied})
        assert model.config.tie_word_embeddings is tied
        same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert same is tied


# Saving and loading


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tower", "llm"), [("siglip_vision_model", "qwen2"), ("clip_vision_model", "gpt2")])
def test_a_saved_model_gives_the_same_logits(tiny: Any, tmp_path: Path, tower: str, llm: str, tied: bool) -> None:
    model = tiny.model(tower, llm, llm_options={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    inputs = mixed_inputs(tiny, tiny.processor())
    loaded, report = FoveateForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) is tied
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText])
def test_auto_classes_load_it(tiny: Any, tmp_path: Path, auto_class: Any) -> None:
    tiny.model().save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    assert type(auto_class.from_pretrained(tmp_path)) is FoveateForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(tmp_path)) is FoveateProcessor


def test_it_loads_and_runs_in_bfloat16(tiny: Any, tmp_path: Path) -> None:
    model = tiny.model()
    for parameter in model.parameters():
        parameter.data.mul_(0.2)  # small values, so that rounding stays small
    model.save_pretrained(tmp_path)
    loaded = FoveateForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    inputs = mixed_inputs(tiny, tiny.processor())
    with torch.no_grad():
        logits, exact = loaded(**inputs).logits, model(**inputs).logits
        converted = copy.deepcopy(model).to(torch.bfloat16)(**inputs).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, converted)
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert loaded.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_resized_embeddings_survive_saving(tiny: Any, tmp_path: Path) -> None:
    for tied in (True, False):
        model = tiny.model(llm_options={"tie_word_embeddings": tied})
        old = model.get_input_embeddings().weight.detach().clone()
        model.resize_token_embeddings(len(old) + 7)
        assert model.get_input_embeddings().num_embeddings == len(old) + 7
        assert model.get_output_embeddings().out_features == len(old) + 7
        assert model.config.text_config.vocab_size == len(old) + 7
        assert torch.equal(model.get_input_embeddings().weight[: len(old)], old)
        model.save_pretrained(tmp_path)
        loaded = FoveateForConditionalGeneration.from_pretrained(tmp_path)
        inputs = mixed_inputs(tiny, tiny.processor())
        with torch.no_grad():
            logits = loaded(**inputs).logits
            assert logits.shape[-1] == loaded.config.get_text_config().vocab_size == len(old) + 7
            assert torch.equal(logits, model(**inputs).logits)


def test_the_decoder_is_the_llm_without_its_head(tiny: Any) -> None:
    for name in tiny.llms:
        model = tiny.model(llm_name=name)
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            hidden = model.get_decoder()(input_ids=ids).last_hidden_state
        assert hidden.shape == (1, 3, 32)
        assert not any(m is model.get_output_embeddings() for m in model.get_decoder().modules())


# Joining parts


def make_tower(tiny: Any, kind: str, path: Path) -> nn.Module:
    """Fills a directory with a tower and its image processor; returns the tower."""
    if kind == "siglip_vision":
        model = AutoModel.from_config(tiny.tower("siglip_vision_model", vision_use_head=True))
    elif kind == "siglip_whole":
        text = SiglipTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
        model = SiglipModel(
            SiglipConfig(text_config=text, vision_config=tiny.tower("siglip_vision_model", vision_use_head=True))
        )
    elif kind == "clip_whole":
        text = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=tiny.tower("clip_vision_model"), projection_dim=8))
    else:
        model = AutoModel.from_config(tiny.tower(kind))
    tiny.randomise(model)
    model.save_pretrained(path)
    processor = SiglipImageProcessor if kind.startswith("siglip") else CLIPImageProcessor
    processor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(path)
    return getattr(model, "vision_model", model)


def make_llm(tiny: Any, path: Path, name: str = "qwen2", spare: int = 0, **options: Any) -> nn.Module:
    """Fills a directory with an LLM, its tokenizer and generation settings; returns the LLM."""
    tokenizer = tiny.tokenizer()
    model = AutoModelForCausalLM.from_config(tiny.llm(name, len(tokenizer) + spare, **options))
    tiny.randomise(model)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0, top_k=7, do_sample=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def assert_kept(saved: nn.Module, loaded: nn.Module, new_rows: int = 0) -> None:
    """Every tensor of `loaded` is that of `saved`, but for new rows below."""
    state = saved.state_dict()
    for name, tensor in loaded.state_dict().items():
        rows = len(tensor) - new_rows if tensor.shape != state[name].shape else len(tensor)
        assert torch.equal(tensor[:rows], state[name]), name


@pytest.mark.parametrize(
    "kind",
    ["siglip_vision", "siglip_whole", "clip_whole", *OTHER_TOWERS],
)
@pytest.mark.parametrize("tied", [True, False])
def test_joined_parts_keep_their_saved_weights(tiny: Any, tmp_path: Path, kind: str, tied: bool) -> None:
    tower = make_tower(tiny, kind, tmp_path / "vision")
    llm = make_llm(tiny, tmp_path / "text", tie_word_embeddings=tied)
    model = FoveateForConditionalGeneration.from_parts(tmp_path / "vision", tmp_path / "text", projector="linear")
    processor = FoveateProcessor.from_parts(tmp_path / "vision", tmp_path / "text", model.config)

    assert not any(module.training for module in model.modules())
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert_kept(tower, model.vision_tower)
    assert_kept(llm, model.language_model, new_rows=2)
    assert not any("head" in name for name in model.vision_tower.state_dict())  # SigLIP's pooling head is left out
    assert model.generation_config.top_k == 7 and model.generation_config.eos_token_id == [2, 0]

    tokens = len(tiny.tokenizer())
    assert (model.config.image_token_id, model.config.video_token_id) == (tokens, tokens + 1)
    assert (processor.image_token_id, processor.video_token_id) == (tokens, tokens + 1)
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == tokens + 2
    assert processor.image_size == (16, 16) and processor.patch_size == 4
    assert processor.image_mean == [0.1, 0.2, 0.3] and processor.image_std == [0.4, 0.5, 0.6]
    assert processor.resample == 3

    inputs = mixed_inputs(tiny, processor)
    with torch.no_grad():
        logits = model(**inputs).logits
        torch.testing.assert_close(logits, logits_by_hand(model, inputs), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "joined")
    processor.save_pretrained(tmp_path / "joined")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "joined")
    again = mixed_inputs(tiny, AutoProcessor.from_pretrained(tmp_path / "joined"))
    assert torch.equal(again["pixel_values"], inputs["pixel_values"])
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) is tied
    assert loaded.generation_config.top_k == 7
    with torch.no_grad():
        assert torch.equal(loaded(**again).logits, logits)


def test_spare_rows_of_the_llm_take_the_media_tokens(tiny: Any, tmp_path: Path) -> None:
    make_tower(tiny, "siglip_vision", tmp_path / "vision")
    llm = make_llm(tiny, tmp_path / "text", spare=64)
    model = FoveateForConditionalGeneration.from_parts(tmp_path / "vision", tmp_path / "text")
    assert model.get_input_embeddings().num_embeddings == len(tiny.tokenizer()) + 64
    assert_kept(llm, model.language_model)


def test_joining_takes_fields_and_loading_options(tiny: Any, tmp_path: Path) -> None:
    make_tower(tiny, "clip_whole", tmp_path / "vision")
    make_llm(tiny, tmp_path / "text", "llama")
    model = FoveateForConditionalGeneration.from_parts(
        str(tmp_path / "vision"),
        str(tmp_path / "text"),
        projector="mlp2x",
        vision_feature_layer=1,
        vision_feature_select_strategy="full",
        dtype=torch.bfloat16,
        attn_implementation="eager",
    )
    assert model.config.vision_feature_layer == 1
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for part in (model, model.vision_tower, model.language_model):
        assert part.config._attn_implementation == "eager"
    processor = FoveateProcessor.from_parts(tmp_path / "vision", tmp_path / "text", model.config, num_frames=5)
    assert (processor.num_frames, processor.prefix_tokens, processor.tokens_per_image()) == (5, 1, 17)
    assert model.generate(**mixed_inputs(tiny, processor), max_new_tokens=1) is not None
    model.save_pretrained(tmp_path / "joined")
    loaded = AutoModel.from_pretrained(tmp_path / "joined", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_joining_can_resize_the_tower_for_good(tiny: Any, tmp_path: Path) -> None:
    make_tower(tiny, "siglip_vision", tmp_path / "vision")
    make_llm(tiny, tmp_path / "text")
    parts = (tmp_path / "vision", tmp_path / "text")
    model = FoveateForConditionalGeneration.from_parts(*parts, tower_image_size=24)
    assert model.config.vision_config.image_size == 24
    assert FoveateProcessor.from_parts(*parts, model.config).image_size == (24, 24)
    model.save_pretrained(tmp_path / "joined")
    loaded = FoveateForConditionalGeneration.from_pretrained(tmp_path / "joined")
    plain = FoveateForConditionalGeneration.from_parts(*parts)  # interpolates whenever it runs
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected, _ = plain.vision._tower(pixels)
        for resized in (model, loaded):
            torch.testing.assert_close(resized.vision._tower(pixels)[0], expected)


def test_joining_without_a_named_attention_keeps_the_parts_own(tiny: Any, tmp_path: Path) -> None:
    make_tower(tiny, "siglip_vision", tmp_path / "vision")
    make_llm(tiny, tmp_path / "text")
    for options in ({}, {"attn_implementation": None}):
        model = FoveateForConditionalGeneration.from_parts(tmp_path / "vision", tmp_path / "text", **options)
        for part in (model.vision_tower, model.language_model):
            assert part.config._attn_implementation == "sdpa"


def test_joining_refuses_what_it_does_not_know(tiny: Any, tmp_path: Path) -> None:
    make_tower(tiny, "siglip_vision", tmp_path / "vision")
    make_llm(tiny, tmp_path / "text")
    with pytest.raises(ValueError, match="projector is 'qformer'"):
        FoveateForConditionalGeneration.from_parts(tmp_path / "vision", tmp_path / "text", projector="qformer")
    with pytest.raises(TypeError, match="projektor"):
        FoveateForConditionalGeneration.from_parts(tmp_path / "vision", tmp_path / "text", projektor="linear")
    with pytest.raises(OSError, match="nothing"):
        FoveateForConditionalGeneration.from_parts(tmp_path / "nothing", tmp_path / "text")


def test_the_new_projector_is_initialised_like_the_llm(tiny: Any, tmp_path: Path) -> None:
    make_tower(tiny, "siglip_vision", tmp_path / "vision")
    make_llm(tiny, tmp_path / "text")
    model = FoveateForConditionalGeneration.from_parts(tmp_path / "vision", tmp_path / "text")
    norm, first, _, last = model.multi_modal_projector.layers
    assert torch.equal(norm.weight, torch.ones(128)) and torch.equal(norm.bias, torch.zeros(128))
    for linear in (first, last):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert torch.equal(linear.bias, torch.zeros(32))


# Generation


def greedy_by_hand(model: FoveateForConditionalGeneration, inputs: Any, tokens: int) -> torch.Tensor:
    """One row, the whole sequence again for every token, no cache."""
    ids = inputs["input_ids"]
    media = {k: inputs[k] for k in ("pixel_values", "pixel_values_videos") if k in inputs}
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(input_ids=ids, use_cache=False, **media).logits[:, -1]
            logits[:, [model.config.image_token_id, model.config.video_token_id]] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


ROWS = {
    "image": ("What <image>?", 1, 0),
    "images": ("<image> and <image> or <image>", 3, 0),
    "mixed": ("First <video> then <image> then <video>", 1, 2),
    "text": ("How many digits appear?", 0, 0),
}


def row(tiny: Any, name: str) -> dict[str, Any]:
    """Text and media of a row; frames of different count a video."""
    text, images, videos = ROWS[name]
    seed = 10 * list(ROWS).index(name)
    return {
        "text": text,
        "images": [tiny.image(seed + i) for i in range(images)],
        "videos": [tiny.frames(seed + i, 1 + i) for i in range(videos)],
    }


@pytest.fixture
def batch(tiny: Any) -> Any:
    """All of ROWS in one batch with left padding."""
    rows = [row(tiny, name) for name in ROWS]
    return tiny.processor()(**{k: [r[k] for r in rows] for k in rows[0]}, padding=True, return_tensors="pt")


@pytest.mark.parametrize("llm", ["qwen2", "gpt2", "gemma2"])
@pytest.mark.parametrize("name", ROWS)
def test_greedy_generation_equals_the_loop_by_hand(tiny: Any, name: str, llm: str) -> None:
    model = tiny.model(llm_name=llm, dtype=torch.float64)
    inputs = tiny.processor()(**row(tiny, name), return_tensors="pt")
    expected = greedy_by_hand(model, inputs, 8)
    with torch.no_grad():  # random models repeat themselves, so compare the logits too
        logits = model(**{k: v for k, v in inputs.items() if k.startswith("pixel")}, input_ids=expected).logits[
            0, -9:-1
        ]
    for use_cache in (True, False):
        generated = model.generate(
            **inputs,
            max_new_tokens=8,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(generated.sequences, expected)
        torch.testing.assert_close(torch.cat(generated.logits).double(), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("llm", ["qwen2", "llama"])
def test_each_row_of_a_padded_batch_generates_as_alone(tiny: Any, batch: Any, llm: str, beams: int) -> None:
    model = tiny.model(llm_name=llm, dtype=torch.float64)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    assert (batch["attention_mask"][:, 0] == 0).sum() == 3  # padding stands left
    together = model.generate(**batch, **options)
    for i, name in enumerate(ROWS):
        alone = model.generate(**tiny.processor()(**row(tiny, name), return_tensors="pt"), **options)
        assert together.sequences[i, -6:].tolist() == alone.sequences[0, -6:].tolist(), name
        for step, logits in enumerate(together.logits):  # [rows · beams, vocabulary]
            of_row = logits[i * beams : (i + 1) * beams]
            torch.testing.assert_close(of_row, alone.logits[step], rtol=1e-4, atol=1e-4)


def test_beam_search_finds_what_exhaustive_search_finds(tiny: Any) -> None:
    """With as many beams as first tokens, two steps are exhaustive."""
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.processor()(**row(tiny, "images"), return_tensors="pt")
    allowed = list(range(3, 15))
    blocked = [i for i in range(model.config.text_config.vocab_size) if i not in allowed]
    model.generation_config.suppress_tokens = blocked
    generated = model.generate(**inputs, num_beams=12, max_new_tokens=2, do_sample=False, length_penalty=0.0)

    def scores(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        return logits.log_softmax(-1)

    best, best_pair = -math.inf, (0, 0)
    first = scores(inputs["input_ids"])
    for a in allowed:
        second = scores(torch.cat([inputs["input_ids"], torch.tensor([[a]])], 1))
        for b in allowed:
            if first[a] + second[b] > best:
                best, best_pair = float(first[a] + second[b]), (a, b)
    assert tuple(generated[0, -2:].tolist()) == best_pair


def test_several_sampled_sequences_each_see_their_rows_media(tiny: Any, batch: Any) -> None:
    model = tiny.model(dtype=torch.float64)
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": True, "top_k": 2, "num_return_sequences": 8}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(1)
    drawn = model.generate(**batch, **options)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**batch, **options).sequences, drawn.sequences)
    assert len(drawn.sequences) == 8 * len(ROWS)
    for i, name in enumerate(ROWS):
        with torch.no_grad():
            logits = model(**tiny.processor()(**row(tiny, name), return_tensors="pt")).logits[0, -1]
        of_row = slice(8 * i, 8 * (i + 1))
        torch.testing.assert_close(drawn.logits[0][of_row].double(), logits.expand(8, -1), rtol=1e-4, atol=1e-4)
        logits[[model.config.image_token_id, model.config.video_token_id]] = -torch.inf
        assert set(drawn.sequences[of_row, -2].tolist()) <= set(logits.topk(2).indices.tolist()), name


def test_beams_name_both_numbers_of_a_mismatch(tiny: Any, batch: Any) -> None:
    inputs = dict(batch) | {"pixel_values": batch["pixel_values"][1:]}
    with pytest.raises(ValueError, match=r"20 image placeholder tokens .* 16 features"):
        tiny.model().generate(**inputs, num_beams=2, max_new_tokens=1)


def test_the_tower_runs_once_a_generation(tiny: Any, batch: Any) -> None:
    model = tiny.model()
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        with counting(model.vision_tower) as calls:
            model.generate(**batch, max_new_tokens=4, **options)
        assert [c["pixel_values"].shape[0] for c in calls] == [5, 3]  # images, then frames


@contextmanager
def counting(module: nn.Module) -> Iterator[list[dict]]:
    """The keyword arguments of each call."""
    calls: list[dict] = []
    hook = module.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    yield calls
    hook.remove()


def test_only_the_new_token_is_decoded(tiny: Any, batch: Any) -> None:
    model = tiny.model()
    with counting(model.language_model) as calls:
        model.generate(**batch, max_new_tokens=3)
    assert [c["inputs_embeds"].shape[1] for c in calls] == [batch["input_ids"].shape[1], 1, 1]


def test_streamed_text_is_the_generated_text(tiny: Any) -> None:
    model, processor = tiny.model(), tiny.processor()
    inputs = processor(**row(tiny, "mixed"), return_tensors="pt")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    generated = model.generate(**inputs, max_new_tokens=12, streamer=streamer)
    assert "".join(streamer) == processor.decode(generated[0, inputs["input_ids"].shape[1] :])


def test_embeddings_can_be_generated_from(tiny: Any) -> None:
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.processor()(**row(tiny, "image"), return_tensors="pt")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == model.config.image_token_id] = encode(
            model, inputs["pixel_values"].double()
        ).flatten(0, 1)
        generated = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=5)
        expected = greedy_by_hand(model, inputs, 5)
    assert torch.equal(generated, expected[:, -5:])


def test_media_need_the_ids_that_say_where_they_stand(tiny: Any, batch: Any) -> None:
    model = tiny.model()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=batch["input_ids"], inputs_embeds=embeds)
    with pytest.raises(ValueError, match="media inputs need input_ids"):
        model(inputs_embeds=embeds, pixel_values=batch["pixel_values"])


def test_a_turn_on_a_kept_cache_equals_the_whole_sequence(tiny: Any) -> None:
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.processor()(**row(tiny, "images"), return_tensors="pt")
    first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
    second = model.generate(
        input_ids=longer,
        attention_mask=torch.ones_like(longer),
        past_key_values=first.past_key_values,
        max_new_tokens=4,
    )
    expected = greedy_by_hand(model, {"input_ids": longer, "pixel_values": inputs["pixel_values"]}, 4)
    assert torch.equal(second, expected)


@pytest.mark.parametrize("beams", [1, 2])
def test_chunked_prefill_of_media_is_refused(tiny: Any, beams: int) -> None:
    model = tiny.model()
    inputs = tiny.processor()(**row(tiny, "mixed"), return_tensors="pt")
    with pytest.raises(ValueError, match=r"prefill_chunk_size|placeholder tokens"):
        model.generate(**inputs, max_new_tokens=4, prefill_chunk_size=5, num_beams=beams)


def test_chunked_prefill_of_text_equals_prefill_at_once(tiny: Any) -> None:
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.processor()(**row(tiny, "text"), return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False, prefill_chunk_size=3)
    assert torch.equal(generated, greedy_by_hand(model, inputs, 4))


# Attention and packing


def test_eager_and_sdpa_give_the_same_logits(tiny: Any, batch: Any) -> None:
    sdpa = tiny.model(attn_implementation="sdpa")
    eager = tiny.model(attn_implementation="eager")
    eager.load_state_dict(sdpa.state_dict())
    assert eager.vision_tower.config._attn_implementation == "eager"
    assert sdpa.language_model.config._attn_implementation == "sdpa"
    keep = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(eager(**batch).logits[keep], sdpa(**batch).logits[keep], rtol=1e-4, atol=1e-4)


def test_each_part_takes_its_own_attention(tiny: Any, tmp_path: Path) -> None:
    parts = {"vision_config": "eager", "text_config": "sdpa"}
    built = tiny.model(attn_implementation=parts)
    built.save_pretrained(tmp_path / "model")
    loaded = FoveateForConditionalGeneration.from_pretrained(tmp_path / "model", attn_implementation=parts)
    make_tower(tiny, "siglip_vision", tmp_path / "vision")
    make_llm(tiny, tmp_path / "text")
    joined = FoveateForConditionalGeneration.from_parts(
        tmp_path / "vision", tmp_path / "text", attn_implementation=parts
    )
    switched = tiny.model(attn_implementation="sdpa")
    switched.set_attn_implementation(parts)
    for name, model in {"built": built, "loaded": loaded, "joined": joined, "switched": switched}.items():
        assert model.vision_tower.config._attn_implementation == "eager", name
        assert model.language_model.config._attn_implementation == "sdpa", name
        assert model.config.vision_config._attn_implementation == "eager", name


def test_missing_flash_attention_is_an_import_error(tiny: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("only where flash-attn can't be installed")
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(ImportError, match=r"(?i)flash"):
        FoveateForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("llm", ["qwen2", "llama"])
def test_packed_documents_do_not_see_each_other(tiny: Any, llm: str, attention: str) -> None:
    model = tiny.model(llm_name=llm, attn_implementation=attention, dtype=torch.float64)
    documents = [tiny.processor()(**row(tiny, name), return_tensors="pt") for name in ROWS]
    ids = torch.cat([d["input_ids"] for d in documents], 1)
    positions = torch.cat([torch.arange(d["input_ids"].shape[1]) for d in documents])[None]
    media = {k: torch.cat([d[k] for d in documents if k in d]) for k in ("pixel_values", "pixel_values_videos")}
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False, **media).logits
        alone = torch.cat([model(**d).logits for d in documents], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)


# Training


def loss_and_gradients(model: FoveateForConditionalGeneration, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == model.config.image_token_id, -100)
    loss = model(**batch, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tower", ["siglip_vision_model", "clip_vision_model", "dinov2", "siglip2_vision_model"])
def test_checkpointed_gradients_equal_plain_ones(tiny: Any, batch: Any, tower: str) -> None:
    model = tiny.model(tower, dtype=torch.float64).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.is_gradient_checkpointing
    plain_loss, plain = loss_and_gradients(model, batch)
    in_tower = tower_layers(checkpointed.vision_tower)[0].mlp.fc1
    in_llm = checkpointed.get_decoder().layers[0].mlp.gate_proj
    with counting(in_tower) as tower_calls, counting(in_llm) as llm_calls:
        loss, gradients = loss_and_gradients(checkpointed, batch)
    assert len(tower_calls) == 4 and len(llm_calls) == 2  # images and frames, each again in the backward pass
    assert loss == pytest.approx(plain_loss, rel=1e-12)
    assert gradients.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(n.startswith(part) and g.abs().max() > 1e-9 for n, g in plain.items()), part


def test_the_gradient_reaches_the_first_layer_of_the_tower(tiny: Any, batch: Any) -> None:
    """Against a difference quotient; GPT-2, because the norms of the others compute in float32."""
    model = tiny.model(llm_name="gpt2", dtype=torch.float64)
    (parameter,) = [p for n, p in model.vision_tower.named_parameters() if n.endswith("patch_embedding.weight")]
    weights = torch.randn(*batch["input_ids"].shape, model.config.text_config.vocab_size)
    (gradient,) = torch.autograd.grad((model(**batch).logits * weights).sum(), parameter)
    direction, step = torch.randn_like(parameter), 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * step * direction)
            values.append((model(**batch).logits * weights).sum().item())
            parameter.sub_(sign * step * direction)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_lora_on_the_llm_trains(tiny: Any, batch: Any) -> None:
    base = tiny.model()
    tower = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(r=4, target_modules=r"language_model.*\.(q_proj|v_proj)"))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all("language_model" in n and "lora_" in n for n in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(5):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    merged = model.merge_and_unload()
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, tower[n])}
    assert changed and all("q_proj" in n or "v_proj" in n for n in changed)
    assert merged.generate(**batch, max_new_tokens=2).shape[0] == len(ROWS)
