"""Checkpoints of transformers' classes give the same prompts, tiles and logits here, and go back bit by bit."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from foveate.data.glyphs import glyph_tokenizer
from foveate.vlm import FoveateForConditionalGeneration, FoveateProcessor
from foveate.vlm.checkpoints import CheckpointError, from_hf, import_checkpoint, load
from foveate.vlm.export import export

SIDE, PATCH = 32, 8  # pixels: 16 patches a tile
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}{{ c.text or c.type }}{% endfor %}{% endfor %}"
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
NORMALISATION = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "resample": 3}
SIZES = [(50, 41), (40, 97), (130, 33), (32, 32)]  # (height, width) of the pictures


def sizes(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48} | more


def clip(**more: Any) -> dict[str, Any]:
    return sizes(model_type="clip_vision_model", image_size=SIDE, patch_size=PATCH) | more


def siglip(**more: Any) -> dict[str, Any]:
    return sizes(model_type="siglip_vision_model", image_size=SIDE, patch_size=PATCH, vision_use_head=False) | more


def intern(**more: Any) -> dict[str, Any]:
    return sizes(image_size=SIDE, patch_size=PATCH, layer_scale_init_value=0.7) | more


def text(vocab_size: int, **more: Any) -> dict[str, Any]:
    # Weights larger than usual, so that a mistake in the picture is seen in the logits.
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 4}
    return sizes(model_type="qwen2", num_key_value_heads=2, initializer_range=0.2, vocab_size=vocab_size) | ends | more


def tokenizer_with(*tokens: str, **named: str) -> Any:
    tokenizer = glyph_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    for name, token in named.items():
        setattr(tokenizer, name, token)
    return tokenizer


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """Norms, biases and position embeddings are made as ones and zeros, which would hide a wrong one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save(folder: Path, model: PreTrainedModel, processor: ProcessorMixin, **tokens: str) -> None:
    shaken(model).save_pretrained(folder)
    fields = {n: vars(processor)[n] for n in ("image_seq_length", "num_image_tokens") if n in vars(processor)}
    if fields:  # it has a video processor, without which it isn't saved
        names = {"vision_feature_select_strategy", "vision_aspect_ratio", "image_token", "video_token"}
        fields |= {n: vars(processor)[n] for n in names if "num_image_tokens" in fields}
        fields |= {"image_processor": processor.image_processor.to_dict(), "processor_class": type(processor).__name__}
        processor.tokenizer.save_pretrained(folder)
        (folder / "processor_config.json").write_text(json.dumps(fields))
        (folder / "chat_template.jinja").write_text(processor.chat_template)
    else:
        processor.save_pretrained(folder)
    path = folder / "tokenizer_config.json"  # transformers saves only what a tokenizer was made with
    path.write_text(json.dumps(json.loads(path.read_text()) | tokens))


def llava(folder: Path, fit: str = "crop", **fields: Any) -> ProcessorMixin:
    tokenizer = tokenizer_with("<image>")
    vision = fields.pop("vision_config", siglip() if fit == "stretch" else clip())
    strategy = "full" if vision["model_type"] == "siglip_vision_model" else "default"
    options: dict[str, Any] = NORMALISATION | {"size": {"shortest_edge": SIDE}}
    options["crop_size"] = {"height": SIDE, "width": SIDE}
    images: Any = {
        "crop": lambda: CLIPImageProcessorPil(**options),
        "pad": lambda: LlavaImageProcessorPil(do_pad=True, **options),
        "stretch": lambda: SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, **NORMALISATION),
    }[fit]()
    config = LlavaConfig(
        **{
            "vision_config": vision,
            "text_config": text(len(tokenizer) + 5),
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
            "image_seq_length": (SIDE // PATCH) ** 2,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": strategy,
        }
        | fields
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
        chat_template=TEMPLATE,
    )
    save(folder, LlavaForConditionalGeneration(config), processor)
    return processor


def llava_next(folder: Path, **fields: Any) -> ProcessorMixin:
    tokenizer = tokenizer_with("<image>")
    config = LlavaNextConfig(
        **{
            "vision_config": clip(),
            "text_config": text(len(tokenizer)),
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
            "image_grid_pinpoints": PINPOINTS[1:],
        }
        | fields
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS[1:],
        **NORMALISATION,
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    save(folder, LlavaNextForConditionalGeneration(config), processor)
    return processor


def onevision(folder: Path, **fields: Any) -> ProcessorMixin:
    tokenizer = tokenizer_with("<image>", "<video>")
    config = LlavaOnevisionConfig(
        **{
            "vision_config": siglip(),
            "text_config": text(len(tokenizer), tie_word_embeddings=True),
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
            "video_token_index": tokenizer.convert_tokens_to_ids("<video>"),
            "image_grid_pinpoints": PINPOINTS,
            "vision_aspect_ratio": "anyres_max_2",  # so that some maps are shrunk
        }
        | fields
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS, **NORMALISATION
    )
    processor = LlavaOnevisionProcessor(
        images,
        tokenizer,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=TEMPLATE,
    )
    save(folder, LlavaOnevisionForConditionalGeneration(config), processor)
    return processor


INTERN_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def internvl(folder: Path, **fields: Any) -> ProcessorMixin:
    tokenizer = tokenizer_with(*INTERN_TOKENS.values(), **INTERN_TOKENS)
    for name, token in INTERN_TOKENS.items():
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    config = InternVLConfig(
        **{
            "vision_config": intern(use_qk_norm=True, attention_bias=True, use_mean_pooling=False),
            # as InternVL3's, the last token, `<video>`, has no embedding
            "text_config": text(len(tokenizer) - 1),
            "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            "image_seq_length": 4,
            "tie_word_embeddings": False,
        }
        | fields
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=6, **NORMALISATION
    )
    processor = InternVLProcessor(images, tokenizer, image_seq_length=4, chat_template=TEMPLATE)
    save(folder, InternVLForConditionalGeneration(config), processor, **INTERN_TOKENS)
    return processor


MAKERS: dict[str, Callable[..., ProcessorMixin]] = {
    "llava": llava,
    "llava-pad": lambda folder, **fields: llava(folder, "pad", **fields),
    "llava-siglip": lambda folder, **fields: llava(folder, "stretch", **fields),
    "llava-next": llava_next,
    "onevision": onevision,
    "internvl": internvl,
}


@pytest.fixture(autouse=True, scope="module")
def no_torchvision() -> Any:
    """Without torchvision, which we don't have, processors that take videos can be made as long as no video comes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None)
        yield


@pytest.fixture(scope="module", params=MAKERS)
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any, Any]:
    """Folder, transformers' model and processor, ours."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param) / "theirs"
    processor = MAKERS[request.param](folder)
    return folder, AutoModelForImageTextToText.from_pretrained(folder).eval(), processor, *from_hf(folder)


def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    coarse = [draw.integers(0, 256, (-(-h // 4), -(-w // 4), 3), dtype=np.uint8) for h, w in SIZES]
    enlarged = [image.repeat(4, 0).repeat(4, 1)[:h, :w] for image, (h, w) in zip(coarse, SIZES, strict=True)]
    return [Image.fromarray(image) for image in enlarged]


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def prompts(token: str) -> str:
    return f"what is at {token} red {token} ? circle {token} at {token} digit"


@torch.no_grad()
def test_prompts_tiles_and_logits_are_transformers(checkpoint: tuple[Path, Any, Any, Any, Any]) -> None:
    _, stock, theirs, model, processor = checkpoint
    prompt = prompts(theirs.image_token)
    expected = theirs(images=pictures(), text=prompt, return_tensors="pt")
    inputs = processor(images=pictures(), text=prompt, return_tensors="pt")
    torch.testing.assert_close(inputs["input_ids"], expected["input_ids"], rtol=0, atol=0)
    pixels = expected["pixel_values"]
    if pixels.ndim == 5:  # [images, tiles, 3, height, width], padded
        tiles = [processor.plan_image(size).tiles for size in SIZES]
        pixels = torch.cat([of_image[:count] for of_image, count in zip(pixels, tiles, strict=True)])
    torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=0, atol=1e-5)
    logits = stock(**expected).logits
    assert_same_logits(model(**inputs).logits, logits)
    inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
    assert (model(**inputs).logits - logits)[:, -1].abs().max() > 1e-2, "the pictures have no effect on the logits"


def test_token_counts_of_any_size_are_transformers(checkpoint: tuple[Path, Any, Any, Any, Any]) -> None:
    _, _, theirs, _, processor = checkpoint
    draw = random.Random(0)
    many = [(draw.randint(1, 400), draw.randint(1, 400)) for _ in range(300)]
    if processor.fit != "stretch":
        theirs.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    elif processor.tiling == "resize":
        theirs.image_processor.crop_size = theirs.image_processor.size
    counts = theirs._get_num_multimodal_tokens(image_sizes=many)["num_image_tokens"]
    around = 2 if theirs.__class__.__name__.startswith("InternVL") else 0  # it counts <img> and </img> too
    assert [processor.plan_image(size).tokens + around for size in many] == counts


def test_chat_template_is_kept(checkpoint: tuple[Path, Any, Any, Any, Any]) -> None:
    _, _, theirs, _, processor = checkpoint
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red ?"}]}]
    assert processor.apply_chat_template(messages) == theirs.apply_chat_template(messages) == "[user]imagered ?"


def test_weights_and_files_come_back_as_they_were(checkpoint: tuple[Path, Any, Any, Any, Any], tmp_path: Path) -> None:
    folder, _, theirs, model, processor = checkpoint
    export(model, processor, tmp_path / "back", "stock")
    was, came = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert was.keys() == came.keys()
    for name in was:
        torch.testing.assert_close(came[name], was[name], rtol=0, atol=0)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back")]
    for config in configs:  # what the whole model's entry says is not said again of its parts
        for part in ("text_config", "vision_config"):
            for name in ("tie_word_embeddings", "dtype"):
                config[part].pop(name, None)
    assert configs[0] == configs[1]
    files = [json.loads((path / "processor_config.json").read_text()) for path in (folder, tmp_path / "back")]
    for file in files:
        file.pop("video_processor", None)
        for name in ("do_pad", "do_center_crop", "do_convert_rgb", "crop_size", "max_patches", "min_patches"):
            file["image_processor"].setdefault(name, None)
    assert files[0] == files[1]
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == TEMPLATE
    back = AutoTokenizer.from_pretrained(tmp_path / "back")
    for name in ("image_token", "video_token", *INTERN_TOKENS):
        if hasattr(theirs.tokenizer, name):
            assert getattr(back, name) == getattr(theirs.tokenizer, name)


@torch.no_grad()
def test_videos_of_onevision_are_pooled_and_end_in_a_newline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = onevision(tmp_path / "theirs")
    model, processor = from_hf(tmp_path / "theirs")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs").eval()
    frames = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    inputs = processor(videos=[frames], text="what is at <video> ?", return_tensors="pt")
    text = f"what is at {'<video>' * (3 * 2 * 2 + 1)} ?"  # 4 x 4 patches a frame become 2 x 2, and one newline
    ids = theirs.tokenizer(text, return_tensors="pt")["input_ids"]
    torch.testing.assert_close(inputs["input_ids"], ids, rtol=0, atol=0)
    expected = stock(input_ids=ids, pixel_values_videos=normalised(frames)[None]).logits
    assert_same_logits(model(**inputs).logits, expected)


@torch.no_grad()
def test_videos_of_internvl_are_numbered_frames(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = internvl(tmp_path / "theirs")
    model, processor = from_hf(tmp_path / "theirs")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs").eval()
    frames = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    inputs = processor(videos=[frames], text="what is at <video> ?", return_tensors="pt")
    video = {"pixel_values_videos": torch.zeros(1, 2, 3, SIDE, SIDE)}
    text = f"what is at {theirs.replace_video_token(video, 0)} ?"
    assert (
        processor.plan_video(frames).text.replace("<video>", "<IMG_CONTEXT>") in text
    )  # lines too, which ids don't show
    ids = theirs.tokenizer(text, return_tensors="pt")["input_ids"]
    ours = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.video_token_id, processor.image_token_id)
    torch.testing.assert_close(ours, ids, rtol=0, atol=0)
    assert_same_logits(model(**inputs).logits, stock(input_ids=ids, pixel_values=normalised(frames)).logits)


def normalised(frames: np.ndarray) -> torch.Tensor:
    """uint8 [frames, height, width, 3] to float32 [frames, 3, height, width]."""
    pixels = (frames / 255 - NORMALISATION["image_mean"]) / NORMALISATION["image_std"]
    return torch.from_numpy(pixels).float().permute(0, 3, 1, 2)


@pytest.mark.parametrize("maker", [internvl, onevision])
@torch.no_grad()
def test_imported_checkpoint_is_a_model_of_ours(maker: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = maker(tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    model, processor = load(tmp_path / "ours")
    assert isinstance(model, FoveateForConditionalGeneration) and isinstance(processor, FoveateProcessor)
    assert str(tmp_path) not in (tmp_path / "ours" / "config.json").read_text()
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs").eval()
    llm = model.language_model
    assert (llm.lm_head.weight is llm.get_input_embeddings().weight) == (maker is onevision)
    prompt = prompts(theirs.image_token)
    expected = stock(**theirs(images=pictures(), text=prompt, return_tensors="pt")).logits
    assert_same_logits(model(**processor(images=pictures(), text=prompt, return_tensors="pt")).logits, expected)
    with pytest.raises(CheckpointError, match="exists already"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "other act": (llava, {"projector_hidden_act": "gelu_pytorch_tanh"}, "projector_hidden_act is 'gelu_pytorch_tanh'"),
    "quick gelu": (internvl, {"projector_hidden_act": "quick_gelu"}, "projector_hidden_act is 'quick_gelu'"),
    "no bias": (llava, {"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
    "layers": (llava, {"vision_feature_layer": [-2, -3]}, r"vision_feature_layer is \[-2, -3\]; accepted: one"),
    "ratio": (internvl, {"downsample_ratio": 0.25}, "downsample_ratio is 0.25; accepted: 0.5"),
    "pinpoints": (llava_next, {"image_grid_pinpoints": [[40, 32]]}, "image_grid_pinpoints"),
    "max": (onevision, {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio is 'pad'; accepted: anyres_max_N"),
    "first patch dropped": (
        onevision,
        {"vision_feature_select_strategy": "default"},
        "vision_feature_select_strategy is 'default'.*accepted with it: 'full'",
    ),
    "quantized": (llava, {"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config is set"),
    "token": (llava, {"image_token_index": 3}, "image_token_id is 3, but the tokenizer gives <image>"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fields_without_a_counterpart_are_named(case: str, tmp_path: Path) -> None:
    maker, fields, message = REFUSED[case]
    maker(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=message):
        from_hf(tmp_path)


@pytest.mark.parametrize(
    ("maker", "name", "value", "message"),
    [
        (llava, "do_normalize", False, "do_normalize of the image processor is False; accepted: True"),
        (llava, "rescale_factor", 1.0, "rescale_factor of the image processor is 1.0; accepted: 1/255"),
        (llava, "size", {"shortest_edge": 40}, "size is .*40.*; accepted: its crop_size 32"),
        (llava, "crop_size", {"height": 24, "width": 32}, "crop_size is .24, 32.; accepted: a square"),
        (onevision, "size", {"height": 40, "width": 32}, "size is .*40.*; accepted: the tower's 32"),
        (onevision, "image_grid_pinpoints", [[32, 32]], "image_grid_pinpoints of the image processor"),
        (internvl, "size", {"height": 40, "width": 40}, "size is .40, 40.; accepted: square, multiples of 16 pixels"),
    ],
)
def test_settings_of_the_image_processor_are_named(
    maker: Any, name: str, value: Any, message: str, tmp_path: Path
) -> None:
    maker(tmp_path)
    path = tmp_path / "processor_config.json"
    written = json.loads(path.read_text())
    written["image_processor"][name] = value
    path.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=message):
        from_hf(tmp_path)


def test_other_models_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "internvl_chat"}')  # not transformers' own
    with pytest.raises(
        CheckpointError,
        match="model_type is 'internvl_chat'; accepted: a model that Foveate trained or exported, llava, llava_next",
    ):
        load(tmp_path)
