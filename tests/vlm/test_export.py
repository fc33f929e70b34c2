"""Exports give the model's own logits and words in a process that has transformers and nothing of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.data.glyphs import CHAT_TEMPLATE, FRAME_SEPARATOR, glyph_tokenizer
from foveate.vlm import FoveateConfig, FoveateForConditionalGeneration, FoveateProcessor, stock
from foveate.vlm.export import ExportError, export
from foveate.vlm.processor import _prefix_tokens, add_media_tokens

PATCH = 8  # pixels
TOWERS: dict[str, dict[str, Any]] = {
    "siglip": {"model_type": "siglip_vision_model", "image_size": 64},
    "siglip2": {"model_type": "siglip2_vision_model", "num_patches": 64, "vision_use_head": False},
    "clip": {"model_type": "clip_vision_model", "image_size": 64},
    "intern": {"model_type": "internvl_vision", "image_size": 64},
    "registers": {"model_type": "dinov2_with_registers", "image_size": 64, "num_register_tokens": 2},
}
TEXT = "what is at a1 ? <image> red circle <video> digit"
NEW_TOKENS = 6

# In front of what runs in the other process: neither our package nor a video decoder can be imported.
ISOLATION = """
import json, sys
import numpy as np

sys.modules.update(dict.fromkeys(["foveate", "av", "decord"]))  # importing them fails

import torch
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor,
    AutoTokenizer,
)

torch.set_num_threads(1)
folder = sys.argv[1]
media = np.load(f"{folder}/media.npz")
image, frames = Image.fromarray(media["image"]), list(media["frames"])
report = {}

def answer(model, inputs, media_ids):
    with torch.no_grad():
        logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=media_ids)
    return logits.numpy(), ids[:, inputs["input_ids"].shape[1] :].numpy()

def finish():
    assert not any(sys.modules[name] for name in sys.modules if name.split(".")[0] in ("foveate", "av", "decord"))
    with open(f"{folder}/report.json", "w") as file:
        json.dump(report, file)
"""

LOAD_CODE = (
    ISOLATION
    + """
path = f"{folder}/code"
config = AutoConfig.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
inputs = processor(images=image, videos=[frames], text=sys.argv[2], return_tensors="pt")
report["classes"] = {}
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    model = auto.from_pretrained(path, trust_remote_code=True)
    report["classes"][auto.__name__] = type(model).__name__
    logits, words = answer(model, inputs, [config.image_token_id, config.video_token_id])
    np.savez(f"{folder}/{auto.__name__}.npz", logits=logits, words=words, **{k: v.numpy() for k, v in inputs.items()})
report["config"] = type(config).__name__
report["processor"] = type(processor).__name__
report["tokenizer"] = AutoTokenizer.from_pretrained(path, trust_remote_code=True)("what is at a1 ?").input_ids
parts = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "what is at a1 ?"}]
report["prompt"] = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
finish()
"""
)

LOAD_STOCK = (
    ISOLATION
    + """
for case in json.loads(sys.argv[3]):
    path = f"{folder}/{case['name']}"
    processor = AutoProcessor.from_pretrained(path, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(path)
    token, separator = processor.image_token, case["frame_separator"]
    before, after = sys.argv[2].split("<video>")
    filter = processor.image_processor.resample
    if case["by_hand"]:  # frames smaller than the image: resized, and their tokens written, by hand
        shown = [image.resize(case["image_size"], filter)]
        shown += [Image.fromarray(frame).resize(case["video_size"], filter) for frame in frames]
        inputs = processor.image_processor(shown, do_resize=False, return_tensors="pt")
        counts = inputs["spatial_shapes"].prod(1) // model.config.downsample_factor**2
        text = before.replace(token, token * counts[0]) + (token * counts[1] + separator) * len(frames) + after
        inputs.update(processor.tokenizer(text, return_tensors="pt"))
    else:
        shown = [image, *map(Image.fromarray, frames)]
        if case["architecture"] == "lfm2_vl":  # its image processor keeps aspect ratios
            shown = [picture.resize(case["image_size"], filter) for picture in shown]
        text = before + (token + separator) * len(frames) + after
        inputs = processor(images=shown, text=text, return_tensors="pt")
    logits, words = answer(model, inputs, case["media_ids"])
    np.savez(f"{folder}/{case['name']}.npz", logits=logits, words=words, **{k: v.numpy() for k, v in inputs.items()})
    square = processor.image_processor([Image.fromarray(media["square"])], return_tensors="pt")["pixel_values"]
    np.save(f"{folder}/{case['name']}-square.npy", square.numpy())
    report[case["name"]] = {
        "model": type(model).__name__,
        "processor": type(processor).__name__,
        "config": AutoConfig.from_pretrained(path).model_type,
        "padding_side": processor.tokenizer.padding_side,
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
        "eos": model.generation_config.eos_token_id,
        "prompt": processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is at a1 ?"}]}],
            add_generation_prompt=True,
        ),
    }
finish()
"""
)


def make(
    tower: str,
    llm: str,
    projector: str,
    layer: int | None,
    image_size: int = 64,
    video_size: int = 64,
    strategy: str = "default",
    text: dict[str, Any] | None = None,
) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    """A tiny random model and its processor; `text` holds further fields of the LLM's configuration."""
    torch.manual_seed(0)
    tokenizer = glyph_tokenizer()
    image_token_id, video_token_id = add_media_tokens(tokenizer)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    # Weights larger than usual, so that a mistake in the picture is seen in the logits.
    llm_config = sizes | {
        "model_type": llm,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    llm_config |= {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 4}
    config = FoveateConfig(
        vision_config=sizes | {"intermediate_size": 48, "patch_size": PATCH} | TOWERS[tower],
        text_config=llm_config | (text or {}),
        projector=projector,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
    )
    processor = FoveateProcessor(
        tokenizer,
        image_size=(image_size, image_size),
        video_size=(video_size, video_size),
        patch_size=PATCH,
        downsample_factor=config.downsample_factor,
        prefix_tokens=_prefix_tokens(config),
        image_mean=(0.4, 0.5, 0.6),
        image_std=(0.2, 0.25, 0.3),
        chat_template=CHAT_TEMPLATE,
        frame_separator=FRAME_SEPARATOR,
    )
    model = FoveateForConditionalGeneration(config).eval()
    with torch.no_grad():  # norms and biases are made as ones and zeros, which would hide a wrong one
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model, processor


def pictures() -> dict[str, np.ndarray]:
    """An image of another size and ratio than the model's, a square one, and three frames; all uint8."""
    random = np.random.default_rng(0)
    coarse = {"image": (1, 9, 14), "square": (1, 12, 12), "frames": (3, 6, 8)}
    drawn = {name: random.integers(0, 256, (*shape, 3), dtype=np.uint8) for name, shape in coarse.items()}
    drawn = {name: value.repeat(9, 1).repeat(9, 2) for name, value in drawn.items()}
    return {"image": drawn["image"][0], "square": drawn["square"][0], "frames": drawn["frames"]}


def expected_answer(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The inputs, logits and words of the model in this process."""
    media = pictures()
    inputs = processor(
        images=Image.fromarray(media["image"]), videos=[list(media["frames"])], text=TEXT, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
        media_ids = [model.config.image_token_id, model.config.video_token_id]
        words = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, suppress_tokens=media_ids)
        noise = {name: torch.randn_like(v) if v.is_floating_point() else v for name, v in inputs.items()}
        assert (model(**noise).logits - logits)[:, -1].abs().max() > 1e-2, "the picture has no effect on the logits"
    return dict(inputs), logits, words[:, inputs["input_ids"].shape[1] :]


def run_without_foveate(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    np.savez(folder / "media.npz", **pictures())
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-I", "-c", script, str(folder), TEXT, *arguments]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


def written_text(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".py", ".jinja"))


# With code


@pytest.fixture(scope="module")
def code_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("code")
    model, processor = make("siglip2", "qwen2", "downsample-2x2", -2, video_size=32, text={"tie_word_embeddings": True})
    # What from_pretrained leaves in the parts' configurations.
    model.config.vision_config._name_or_path = model.config.text_config._name_or_path = "/home/somebody/checkpoint"
    export(model, processor, folder / "code")
    return folder, model, processor


def test_export_with_code_gives_the_same_logits_and_words_without_foveate(
    code_export: tuple[Path, Any, Any],
) -> None:
    folder, model, processor = code_export
    report = run_without_foveate(LOAD_CODE, folder)
    autos = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
    assert report["classes"] == dict.fromkeys(autos, "FoveateForConditionalGeneration")
    assert (report["config"], report["processor"]) == ("FoveateConfig", "FoveateProcessor")
    assert report["tokenizer"] == processor.tokenizer("what is at a1 ?").input_ids
    assert report["prompt"] == "<|user|><image><video>what is at a1 ?<|assistant|>"

    inputs, logits, words = expected_answer(model, processor)
    for auto in autos:
        loaded = np.load(folder / f"{auto}.npz")
        for name, value in inputs.items():
            np.testing.assert_array_equal(loaded[name], value.numpy())
        np.testing.assert_allclose(loaded["logits"], logits.numpy(), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(loaded["words"], words.numpy())


def test_export_with_code_holds_code_weights_and_nothing_of_this_machine(code_export: tuple[Path, Any, Any]) -> None:
    folder, _, _ = code_export
    modules = {"anyres", "config", "media", "model", "planning", "processor", "projector", "resampler"}
    modules |= {"tiling", "tower", "video", "vision"}
    assert {path.stem for path in (folder / "code").glob("*.py")} == modules
    suffixes = {path.suffix for path in (folder / "code").iterdir()}
    assert suffixes == {".py", ".json", ".jinja", ".safetensors"}
    assert str(folder) not in written_text(folder / "code")
    assert "/home/somebody" not in written_text(folder / "code")


def test_export_leaves_model_and_later_saves_as_they_were(code_export: tuple[Path, Any, Any], tmp_path: Path) -> None:
    _, model, processor = code_export
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in written_text(tmp_path / "saved")
    assert list((tmp_path / "saved").glob("*.py")) == []
    assert processor.tokenizer._processor_class == "FoveateProcessor"


# Stock

STOCK_CASES = {
    "lfm2-siglip2": {
        "tower": "siglip2",
        "llm": "qwen2",
        "projector": "downsample-2x2",
        "layer": None,
        "video_size": 32,
    },
    "lfm2-siglip": {"tower": "siglip", "llm": "llama", "projector": "downsample-2x2", "layer": None},
    "llava-clip": {"tower": "clip", "llm": "llama", "projector": "mlp2x", "layer": -2},
    "llava-siglip": {
        "tower": "siglip",
        "llm": "qwen2",
        "projector": "mlp2x",
        "layer": -1,
        "text": {"tie_word_embeddings": True},
    },
    "llava-registers": {"tower": "registers", "llm": "qwen2", "projector": "mlp2x", "layer": 2, "strategy": "full"},
}


@pytest.fixture(scope="module")
def stock_exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stock")
    cases, made = [], {}
    for name, options in STOCK_CASES.items():
        model, processor = made[name] = make(**options)
        export(model, processor, folder / name, "stock")
        case = {"name": name, "architecture": "lfm2_vl" if name.startswith("lfm2") else "llava"}
        case |= {"image_size": processor.image_size, "video_size": processor.video_size}
        case["by_hand"] = processor.video_size != processor.image_size
        case["frame_separator"] = processor.frame_separator
        case["media_ids"] = [processor.image_token_id, processor.video_token_id]
        cases.append(case)
    return folder, made, run_without_foveate(LOAD_STOCK, folder, json.dumps(cases))


@pytest.mark.parametrize("name", STOCK_CASES)
def test_stock_export_gives_the_same_logits_and_words_without_foveate(
    name: str, stock_exports: tuple[Path, dict[str, Any], dict[str, Any]]
) -> None:
    folder, made, report = stock_exports
    model, processor = made[name]
    inputs, logits, words = expected_answer(model, processor)
    loaded = np.load(folder / f"{name}.npz")
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.video_token_id, processor.image_token_id)
    np.testing.assert_array_equal(loaded["input_ids"], ids.numpy())
    np.testing.assert_allclose(loaded["logits"], logits.numpy(), rtol=0, atol=1e-5 * max(1, logits.abs().max().item()))
    np.testing.assert_array_equal(loaded["words"], words.numpy())

    architecture = ("Lfm2VlForConditionalGeneration", "DeepseekVLProcessor", "lfm2_vl")
    if name.startswith("llava"):
        architecture = ("LlavaForConditionalGeneration", "LlavaProcessor", "llava")
        pixels = torch.cat([inputs["pixel_values"], inputs["pixel_values_videos"]])
        np.testing.assert_allclose(loaded["pixel_values"], pixels.numpy(), rtol=0, atol=1e-5)
    assert (report[name]["model"], report[name]["processor"], report[name]["config"]) == architecture
    assert report[name]["tied"] == STOCK_CASES[name].get("text", {}).get("tie_word_embeddings", False)
    assert (report[name]["eos"], report[name]["padding_side"]) == (4, "left")
    assert report[name]["prompt"] == "<|user|><image>what is at a1 ?<|assistant|>"
    assert "auto_map" not in written_text(folder / name)


@pytest.mark.parametrize("name", STOCK_CASES)
def test_stock_processor_resizes_and_normalises_square_images_as_ours(
    name: str, stock_exports: tuple[Path, dict[str, Any], dict[str, Any]]
) -> None:
    folder, made, _ = stock_exports
    inputs = made[name][1](images=Image.fromarray(pictures()["square"]), text="<image>")
    pixels = inputs["pixel_values"]  # [1, 3, 64, 64]
    if name.startswith("lfm2"):  # [1, patches, patch · patch · 3], cut here by slices
        starts = range(0, 64, PATCH)
        cut = [pixels[0, :, y : y + PATCH, x : x + PATCH].permute(1, 2, 0).flatten() for y in starts for x in starts]
        pixels = torch.stack(cut).unsqueeze(0)
    np.testing.assert_allclose(np.load(folder / f"{name}-square.npy"), pixels.numpy(), rtol=0, atol=1e-5)


def test_stock_export_changes_nothing_of_a_bfloat16_model_in_training(tmp_path: Path) -> None:
    model, processor = make("siglip", "llama", "downsample-2x2", None)
    model.bfloat16().train()
    model.vision_tower.eval()
    config = model.config.to_dict()
    export(model, processor, tmp_path / "out", "stock")
    assert model.language_model.training and not model.vision_tower.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.to_dict() == config
    assert processor.tokenizer._processor_class is None and not hasattr(processor.tokenizer, "image_token")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "linear": (
        {"projector": "linear", "layer": -2},
        "projector 'linear' .* need 'mlp2x', lfm2_vl and internvl need 'down",
    ),
    "3x3": ({"projector": "downsample-3x3", "layer": None}, "projector 'downsample-3x3'"),
    "clip with 2x2": ({"tower": "clip", "layer": None}, "vision_config clip_vision_model .* siglip_vision_model"),
    "siglip2 with mlp2x": ({"projector": "mlp2x", "layer": -2}, "vision_config siglip2_vision_model"),
    "layer with 2x2": ({"layer": -2}, "vision_feature_layer -2 .* accepts None"),
    "final output with mlp2x": ({"tower": "clip", "projector": "mlp2x", "layer": None}, "vision_feature_layer None"),
    "odd grid": ({"layer": None, "image_size": 72}, r"image_size \(72, 72\) .* multiples of 16"),
    "odd grid of frames": ({"layer": None, "video_size": 40}, r"video_size \(40, 40\) .* multiples of 16"),
    "siglip at another size": ({"tower": "siglip", "layer": None, "video_size": 32}, r"video_size .*\(64, 64\)"),
    "clip at another size": (
        {"tower": "clip", "projector": "mlp2x", "layer": -2, "image_size": 80, "video_size": 80},
        r"image_size \(80, 80\) .*\(64, 64\)",
    ),
    "llava with other frames": (
        {"tower": "registers", "projector": "mlp2x", "layer": -2, "video_size": 32, "strategy": "full"},
        r"video_size \(32, 32\) .*\(64, 64\)",
    ),
    "registers dropped": (
        {"tower": "registers", "projector": "mlp2x", "layer": -2},
        "vision_feature_select_strategy 'default' .* drops 3 tokens",
    ),
    "capped logits": ({"layer": None, "llm": "gemma2", "text": {"head_dim": 8}}, "text_config gemma2"),
    "scaled logits": ({"layer": None, "llm": "granite", "text": {"logits_scaling": 1.5}}, "text_config granite"),
    "head with a bias": ({"layer": None, "llm": "phi", "text": {"num_key_value_heads": 4}}, "text_config phi"),
    "head tied to another name": ({"layer": None, "llm": "gpt2"}, "text_config gpt2 .* embed_tokens"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_stock_export_names_the_part_without_a_twin_and_writes_nothing(case: str, tmp_path: Path) -> None:
    options, message = UNSUPPORTED[case]
    defaults: dict[str, Any] = {"tower": "siglip2", "llm": "llama", "projector": "downsample-2x2"}
    model, processor = make(**(defaults | options))
    with pytest.raises(ExportError, match=message):
        export(model, processor, tmp_path / "out", "stock")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("video_pool", [4, 1, 1], r"video_pool \[4, 1, 1\] has no stock twin; accepted: \[1, 1, 1\]"),
        ("tiling", "dynamic-s2", "tiling 'dynamic-s2' has no stock twin .*; accepted: resize"),
        ("token_order", "columns", "token_order 'columns' has no stock twin; accepted: 'rows'"),
    ],
)
def test_stock_export_names_the_field_without_a_twin(field: str, value: Any, message: str, tmp_path: Path) -> None:
    model, processor = make("siglip", "llama", "downsample-2x2", None)
    setattr(model.config, field, value)
    with pytest.raises(ExportError, match=message):
        export(model, processor, tmp_path / "out", "stock")


def test_stock_export_of_internvl_needs_tokens_around_an_image(tmp_path: Path) -> None:
    model, processor = make("intern", "llama", "downsample-2x2", None)
    with pytest.raises(
        ExportError, match=r"start_image_token '' has no stock twin: .*; accepted: a token of the vocab"
    ):
        export(model, processor, tmp_path / "out", "stock")


def test_stock_export_with_other_logits_is_refused_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = make("siglip", "llama", "downsample-2x2", None)
    converted = stock._siglip_as_siglip2

    def with_channels_first(tower: Any) -> Any:
        twin = converted(tower)
        weight = next(p for n, p in twin.named_parameters() if n.endswith("patch_embedding.weight"))
        weight.data = weight.data.reshape(-1, PATCH * PATCH, 3).transpose(1, 2).flatten(1)
        return twin

    monkeypatch.setattr(stock, "_siglip_as_siglip2", with_channels_first)
    with pytest.raises(ExportError, match="gives other logits"):
        export(model, processor, tmp_path / "out", "stock")
    assert list(tmp_path.iterdir()) == []


# Both


@pytest.mark.parametrize("format", ["code", "stock"])
def test_export_replaces_nothing(format: Any, tmp_path: Path) -> None:
    model, processor = make("siglip2", "llama", "downsample-2x2", None)
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(ExportError, match="exists already"):
            export(model, processor, out, format)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_export_fills_an_empty_directory(tmp_path: Path) -> None:
    model, processor = make("siglip2", "llama", "downsample-2x2", None)
    export(model, processor, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_export_names_the_formats_it_has(tmp_path: Path) -> None:
    model, processor = make("siglip2", "llama", "downsample-2x2", None)
    with pytest.raises(ExportError, match="format is 'onnx'; accepted: code, stock, vila"):
        export(model, processor, tmp_path / "out", "onnx")  # type: ignore[arg-type]
