"""Checkpoints of VILA's layout give the logits of VILA's forward pass, written here by hand from image to logits."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, Olmo2Config, SiglipVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from foveate.data.glyphs import glyph_tokenizer
from foveate.vlm.checkpoints import CheckpointError, load
from foveate.vlm.export import ExportError, export

SIDE, PATCH, C, D = 32, 8, 32, 40  # pixels of a tile and of a patch; widths of tower and LLM
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NVILA = {
    "image_encoder": {"_target_": "llava.model.encoders.BasicImageEncoder"},
    "video_encoder": '{"_target_": "llava.model.encoders.BasicVideoEncoder"}',
}
DYNAMIC = {
    "image_aspect_ratio": "dynamic_s2",
    "dynamic_s2": True,
    "s2_scales": f"{SIDE},{2 * SIDE}",
    "s2_max_split_size": SIDE,
    "s2_resize_output_to_scale_idx": -1,
    "max_tiles": 6,
}
S2 = DYNAMIC | {
    "image_aspect_ratio": "resize",
    "dynamic_s2": False,
    "s2": True,
    "s2_resize_output_to_scale_idx": 0,
    "max_tiles": 12,
}


def vila(folder: Path, kind: str, tower: str = "siglip", **entries: Any) -> None:
    """Writes a random checkpoint as VILA does: the tower with transformers 4's names and SigLIP's pooling head."""
    torch.manual_seed(0)
    tokenizer = glyph_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}".replace(
        "m.", "message."
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("for m in", "for message in")
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    llm_config = Olmo2Config(  # transformers makes a qwen2's tokenizer anew, as a Qwen tokenizer, which ours isn't
        **sizes, hidden_size=D, num_key_value_heads=2, vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=4
    )
    config_class = SiglipVisionConfig if tower == "siglip" else CLIPVisionConfig
    vision = AutoModel.from_config(config_class(**sizes, hidden_size=C, image_size=SIDE, patch_size=PATCH))
    llm = AutoModelForCausalLM.from_config(llm_config)
    with torch.no_grad():
        for parameter in [*vision.parameters(), *llm.parameters()]:
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    vision.config.save_pretrained(folder / "vision_tower")
    named = {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in vision.state_dict().items()}
    save_file(named, folder / "vision_tower" / "model.safetensors", {"format": "pt"})
    # VILA saves the size that images are resized to before they are cut, not the tower's
    images = SiglipImageProcessorPil(size={"height": 99, "width": 99}, image_mean=MEAN, image_std=STD, resample=3)
    images.save_pretrained(folder / "vision_tower")
    (folder / "mm_projector").mkdir()
    (folder / "mm_projector" / "config.json").write_text(json.dumps({"mm_projector_type": kind}))
    width = C * (2 if entries.get("s2_scales") else 1)
    save_file(projector_weights(kind, width), folder / "mm_projector" / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaModel"],
        "llm_cfg": {"model_type": "olmo2"},
        "vision_tower_cfg": {"model_type": vision.config.model_type},
        "mm_projector_cfg": {"mm_projector_type": kind},
        "mm_hidden_size": width,
        "hidden_size": D,
        "image_aspect_ratio": "resize",
        "num_video_frames": 3,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch" if tower == "siglip" else "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "s2": False,
        "model_dtype": "torch.float32",
        "vision_resolution": -1,
        "video_max_tiles": 1,
    }
    (folder / "config.json").write_text(json.dumps(config | entries))


def projector_weights(kind: str, c: int) -> dict[str, torch.Tensor]:
    """`nn.Sequential`'s names; the downsampling, its first module, has no weights."""
    norms, linears = {
        "linear": ({}, {"layers": (c, D)}),
        "mlp2x_gelu": ({}, {"layers.0": (c, D), "layers.2": (D, D)}),
        "mlp_downsample": ({"layers.1": 4 * c}, {"layers.2": (4 * c, D), "layers.4": (D, D)}),
        "mlp_downsample_2x2_fix": ({"layers.1": 4 * c}, {"layers.2": (4 * c, D), "layers.4": (D, D)}),
        "mlp_downsample_3x3_fix": (
            {"layers.1": 9 * c, "layers.4": 3 * c},
            {"layers.2": (9 * c, 3 * c), "layers.5": (3 * c, D), "layers.7": (D, D)},
        ),
    }[kind]
    weights: dict[str, torch.Tensor] = {}
    for name, width in norms.items():
        weights |= {f"{name}.weight": 1 + 0.3 * torch.randn(width), f"{name}.bias": 0.3 * torch.randn(width)}
    for name, (inputs, outputs) in linears.items():
        weights[f"{name}.weight"] = torch.randn(outputs, inputs) * inputs**-0.5
        weights[f"{name}.bias"] = 0.3 * torch.randn(outputs)
    return weights


class ByHand:
    """VILA's forward pass from the files, after its description."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.kind = self.config["mm_projector_cfg"]["mm_projector_type"]
        self.weights = load_file(folder / "mm_projector" / "model.safetensors")
        self.tower = AutoModel.from_pretrained(folder / "vision_tower").eval()
        self.llm = AutoModelForCausalLM.from_pretrained(folder / "llm").eval()

    def pixels(self, image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
        """[3, height, width] of an image that is stretched to `size` (width, height), or padded or cropped before."""
        if self.config["image_aspect_ratio"] == "pad":
            square = Image.new("RGB", (max(image.size),) * 2, tuple(int(mean * 255) for mean in MEAN))
            square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
            image = square
        if self.config["image_aspect_ratio"] is None:  # left to CLIP's image processor
            raw = {"do_rescale": False, "do_normalize": False}
            clip = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE, resample=3, **raw)
            image = Image.fromarray(clip(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0))
        resized = np.asarray(image.resize(size)) / 255
        return torch.from_numpy((resized - MEAN) / STD).float().permute(2, 0, 1)

    def features(self, tile: torch.Tensor) -> torch.Tensor:
        """[rows, columns, C] of one tile [3, height, width]."""
        hidden = self.tower(tile[None], output_hidden_states=True).hidden_states[-2][0]
        if self.config["mm_vision_select_feature"] == "patch":
            hidden = hidden[1:]
        side = math.isqrt(len(hidden))
        return hidden.reshape(side, side, -1)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """[rows', columns', D] of features [rows, columns, C]."""
        norm_and_linear = {"linear": ["L"], "mlp2x_gelu": ["L", "G", "L"]}.get(self.kind, ["N", "L", "G", "L"])
        first, r = 0, 1
        if "downsample" in self.kind:
            first, r = 1, 3 if "3x3" in self.kind else 2
            rows, columns, channels = features.shape
            padded = torch.zeros(-(-rows // r) * r, -(-columns // r) * r, channels)
            padded[:rows, :columns] = features
            features = torch.stack(
                [
                    torch.stack(
                        [
                            torch.cat([padded[y + dy, x + dx] for dy in range(r) for dx in range(r)])
                            for x in range(0, padded.shape[1], r)
                        ]
                    )
                    for y in range(0, padded.shape[0], r)
                ]
            )
        if r == 3:
            norm_and_linear = ["N", "L", "G", "N", "L", "G", "L"]
        for index, layer in enumerate(norm_and_linear, first):
            name = "layers" if self.kind == "linear" else f"layers.{index}"
            if layer == "G":
                features = F.gelu(features)
                continue
            weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
            norm = layer == "N"
            features = F.layer_norm(features, weight.shape, weight, bias) if norm else F.linear(features, weight, bias)
        return features

    def image(self, image: Image.Image) -> torch.Tensor:
        """[tokens, D] of one image."""
        if not self.config.get("s2_scales"):
            projected = self.project(self.features(self.pixels(image, (SIDE, SIDE))))
            if self.kind == "mlp_downsample" and "image_encoder" not in self.config:  # VILA-1.5 goes column by column
                projected = projected.transpose(0, 1)
            return projected.flatten(0, 1)
        rows, columns = (2, 3) if self.config["dynamic_s2"] else (2, 2)
        small = self.features(self.pixels(image, (SIDE, SIDE)))
        pixels = self.pixels(image, (columns * SIDE, rows * SIDE))
        cut = [[pixels[:, y : y + SIDE, x : x + SIDE] for x in range(0, columns * SIDE, SIDE)] for y in (0, SIDE)]
        large = torch.cat([torch.cat([self.features(tile) for tile in row], dim=1) for row in cut])
        size = large.shape[:2] if self.config["dynamic_s2"] else small.shape[:2]
        maps = [F.interpolate(m.permute(2, 0, 1)[None], size=size, mode="area")[0] for m in (small, large)]
        both = torch.cat(maps).permute(1, 2, 0)
        if not self.config["dynamic_s2"]:
            return self.project(both).transpose(0, 1).flatten(0, 1)  # VILA-1.5 again
        side = SIDE // PATCH
        blocks = [
            [self.project(both[y : y + side, x : x + side]) for x in range(0, columns * side, side)] for y in (0, side)
        ]
        return torch.cat([torch.cat(row, dim=1) for row in blocks]).flatten(0, 1)

    def frames(self, frames: np.ndarray, newline: torch.Tensor) -> torch.Tensor:
        """[tokens, D] of a video: each frame one tile, whose features stand for every scale."""
        scales = 2 if self.config.get("s2_scales") else 1
        encoder = self.config.get("video_encoder")
        pool = (json.loads(encoder) if isinstance(encoder, str) else encoder).get("pool_sizes", [[1, 1, 1]])[0]
        tokens = [self.features(self.pixels(Image.fromarray(f), (SIDE, SIDE))) for f in frames]
        tokens = [self.project(torch.cat([f] * scales, dim=-1)) for f in tokens]
        groups = [torch.stack(tokens[i : i + pool[0]]).mean(0) for i in range(0, len(tokens), pool[0])]
        return torch.cat([torch.cat([group.flatten(0, 1), newline]) for group in groups])

    @torch.no_grad()
    def logits(self, parts: list[Any]) -> torch.Tensor:
        """[tokens, vocabulary] of text ids and of features."""
        embed = self.llm.get_input_embeddings()
        embeds = [embed(torch.tensor(part)) if isinstance(part, list) else part for part in parts]
        return self.llm(inputs_embeds=torch.cat(embeds)[None]).logits[0]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vila-1.5": ("mlp_downsample", {}),
    "vila-1.5 clip": ("mlp2x_gelu", {"tower": "clip"}),
    "vila-1.5 padded": ("linear", {"image_aspect_ratio": "pad"}),
    "clip cropped": ("mlp2x_gelu", {"tower": "clip", "image_aspect_ratio": None}),
    "vila-1.5 s2": ("mlp_downsample", S2),
    "linear": ("linear", {}),
    "nvila 2x2": ("mlp_downsample", NVILA),
    "longvila": ("mlp_downsample_2x2_fix", NVILA),
    "3x3": ("mlp_downsample_3x3_fix", NVILA),
    "nvila dynamic s2": ("mlp_downsample", NVILA | DYNAMIC),
    "nvila dynamic s2 3x3": ("mlp_downsample_3x3_fix", NVILA | DYNAMIC),
}


@pytest.fixture
def picture() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    return Image.fromarray(coarse.repeat(4, 0).repeat(4, 1))  # 48 x 72 pixels: 2 x 3 tiles


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_vilas_forward_pass(case: str, tmp_path: Path, picture: Image.Image) -> None:
    kind, entries = CASES[case]
    vila(tmp_path, kind, **entries)
    model, processor = load(tmp_path)
    words = processor.tokenizer
    parts: list[Any] = [words("what is at").input_ids, ByHand(tmp_path).image(picture)]
    if "image_encoder" in entries:  # NVILA ends an image with a newline
        parts.append(words("\n").input_ids)
    parts.append(words("red circle ?").input_ids)
    expected = ByHand(tmp_path).logits([part for part in parts if len(part)])
    inputs = processor(images=picture, text="what is at <image> red circle ?", return_tensors="pt")
    logits = model(**inputs).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
    assert (model(**inputs).logits[0] - expected)[-1].abs().max() > 1e-3, "the picture has no effect on the logits"


@pytest.mark.parametrize("pool", [None, [2, 1, 1]])
@pytest.mark.parametrize("scaled", [{}, DYNAMIC])
@torch.no_grad()
def test_videos_are_frames_with_newlines(scaled: dict, pool: list[int] | None, tmp_path: Path) -> None:
    encoder: dict[str, Any] = {"_target_": "llava.model.encoders.BasicVideoEncoder", "end_tokens": "red"}
    if pool:
        encoder = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [pool], "end_tokens": "red"}
    vila(tmp_path, "mlp_downsample", **NVILA | {"video_encoder": encoder} | scaled)
    model, processor = load(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    by_hand, words = ByHand(tmp_path), processor.tokenizer
    newline = by_hand.llm.get_input_embeddings()(torch.tensor(words("red").input_ids))
    video = by_hand.frames(frames, newline)
    expected = by_hand.logits([words("what is at").input_ids, video, words("circle ?").input_ids])
    inputs = processor(videos=[frames], text="what is at <video> circle ?", return_tensors="pt")
    logits = model(**inputs).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_settings_come_from_the_keys(tmp_path: Path) -> None:
    vila(tmp_path, "mlp_downsample_3x3_fix", **NVILA | {"image_aspect_ratio": "dynamic", "max_tiles": 4})
    model, processor = load(tmp_path)
    assert (processor.tiling, processor.max_tiles, processor.num_frames) == ("tiles", 4, 3)
    assert (processor.image_end, processor.tile_separator, processor.frame_separator) == ("\n", "\n", "\n")
    assert (model.config.projector, model.config.vision_feature_layer) == ("downsample-3x3", -2)
    assert not hasattr(model.vision_tower, "head")  # no one reads it
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red ?"}]}
    assert processor.apply_chat_template([message]) == "user: <image>red ?"


@pytest.mark.parametrize("case", ["vila-1.5", "vila-1.5 padded", "clip cropped", "nvila dynamic s2 3x3", "vila-1.5 s2"])
def test_weights_and_keys_come_back_as_they_were(case: str, tmp_path: Path) -> None:
    kind, entries = CASES[case]
    vila(tmp_path / "theirs", kind, **entries)
    model, processor = load(tmp_path / "theirs")
    export(model, processor, tmp_path / "back", "vila")
    for part in ("llm", "mm_projector", "vision_tower"):
        was, came = (load_file(tmp_path / name / part / "model.safetensors") for name in ("theirs", "back"))
        was = {name: weight for name, weight in was.items() if ".head." not in name}
        assert was.keys() == came.keys()
        for name, weight in was.items():
            torch.testing.assert_close(came[name], weight, rtol=0, atol=0)
    theirs, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    for key in theirs.keys() - {"llm_cfg", "vision_tower_cfg", "mm_projector_cfg", "image_encoder", "video_encoder"}:
        assert back[key] == theirs[key]
    again, processor_again = load(tmp_path / "back")
    configs = [again.config.to_dict(), model.config.to_dict()]
    for config in configs:
        for part in (config["text_config"], config["vision_config"]):
            del part["_name_or_path"]
    assert configs[0] == configs[1]
    fields, fields_again = processor.to_dict(), processor_again.to_dict()
    assert fields_again == fields


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("resample", 2, "resample 2 has no counterpart in VILA's layout; accepted: 3"),
        ("fit", "crop", "fit 'crop' has no counterpart .* CLIP tower alone"),
        ("timestamps", "text", "timestamps 'text' has no counterpart"),
        ("frame_end", "red", "frame_end 'red' has no counterpart"),
    ],
)
def test_fields_that_vila_lacks_are_named(field: str, value: Any, message: str, tmp_path: Path) -> None:
    vila(tmp_path / "theirs", "linear")
    model, processor = load(tmp_path / "theirs")
    setattr(processor, field, value)
    with pytest.raises(ExportError, match=message):
        export(model, processor, tmp_path / "out", "vila")
    assert not (tmp_path / "out").exists()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "projector": (
        "mlp2x_gelu",
        {"kind": "mlp3x_gelu"},
        "mm_projector_type is 'mlp3x_gelu'; accepted: linear, mlp2x_gelu",
    ),
    "3x3 s2": ("mlp2x_gelu", {"kind": "mlp_downsample_3x3_s2"}, "mm_projector_type is 'mlp_downsample_3x3_s2'"),
    "ps3": ("linear", {"ps3": True}, "ps3 is True; accepted: False"),
    "start and end": ("linear", {"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
    "video tiles": ("linear", {"video_max_tiles": 4}, "video_max_tiles is 4; accepted: 1"),
    "resolution": ("linear", {"vision_resolution": 64}, "vision_resolution is 64; accepted: the tower's 32"),
    "patch without CLS": (
        "linear",
        {"mm_vision_select_feature": "patch"},
        "mm_vision_select_feature is 'patch' with a siglip_vision_model .*; accepted: 'cls_patch'",
    ),
    "CLS in a square": (
        "mlp_downsample",
        {"tower": "clip", "mm_vision_select_feature": "cls_patch"},
        "mm_vision_select_feature is 'cls_patch' with a clip_vision_model .*; accepted: 'patch'",
    ),
    "aspect": ("linear", {"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; accepted: resize, pad"),
    "not dynamic": ("linear", {"image_aspect_ratio": "dynamic_s2"}, "dynamic_s2 is False with image_aspect_ratio"),
    "scales": ("linear", DYNAMIC | {"s2_scales": "64,96"}, "s2_scales is '64,96'; accepted: from the tower's 32"),
    "split": ("linear", DYNAMIC | {"s2_max_split_size": 64}, "s2_max_split_size is 64; accepted: 32"),
    "output scale": ("linear", DYNAMIC | {"s2_resize_output_to_scale_idx": 0}, "scale_idx is 0; accepted: -1"),
    "encoder": ("linear", {"image_encoder": {"_target_": "x.Other"}}, "image_encoder is 'x.Other'; accepted: Basic"),
    "pools": (
        "linear",
        {"video_encoder": {"_target_": "x.TSPVideoEncoder", "pool_sizes": [[8, 1, 1], [1, 2, 2]]}},
        "pool_sizes of video_encoder",
    ),
    "width": ("linear", {"width": 8}, r"layers.weight is \(40, 8\); accepted: \(40, 32\)"),
    "more weights": ("linear", {"extra": True}, "other weights than mm_projector_type linear has: top_down"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_keys_without_a_counterpart_are_named(case: str, tmp_path: Path) -> None:
    kind, entries, message = REFUSED[case]
    entries = dict(entries)
    path = tmp_path / "mm_projector"
    other, width, extra = entries.pop("kind", kind), entries.pop("width", C), entries.pop("extra", False)
    vila(tmp_path, kind, **entries)
    (path / "config.json").write_text(json.dumps({"mm_projector_type": other}))
    if width != C or extra:
        more = {"top_down_prompt_head.weight": torch.ones(2)} if extra else {}
        save_file(projector_weights(kind, width) | more, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    vila(tmp_path, "linear")
    path = tmp_path / "mm_projector"
    (path / "model.safetensors").unlink()
    torch.save(nn.Linear(2, 2), path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"mm_projector holds no safetensors .found: pytorch_model\.bin.*convert them"
    ):
        load(tmp_path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"mm_projector_cfg: .*mm_projector holds no config\.json"):
        load(tmp_path)


def test_other_towers_are_named(tmp_path: Path) -> None:
    vila(tmp_path, "linear")
    (tmp_path / "vision_tower" / "config.json").write_text('{"model_type": "intern_vit_6b"}')  # VILA-1.5-40b's
    with pytest.raises(
        CheckpointError, match="model_type of vision_tower/ is 'intern_vit_6b'; accepted: siglip_vision"
    ):
        load(tmp_path)


def test_missing_weights_of_the_llm_are_named(tmp_path: Path) -> None:
    vila(tmp_path, "linear")
    weights = load_file(tmp_path / "llm" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "llm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"llm don't fit its config.json: .*model\.norm\.weight"):
        load(tmp_path)
