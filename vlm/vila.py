"""VILA's checkpoint layout: `config.json` and the folders `llm/`, `vision_tower/` and `mm_projector/`.

VILA-1.5 (arXiv 2312.07533), LongVILA and NVILA (arXiv 2412.04468) are published so; the keys are those of
`llava/model/configuration_llava.py` in github.com/NVlabs/VILA. Its space-to-depth orders channels as ours does, (row,
column, channel), and pads as ours does, so every weight is taken as it is.
"""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, ImageProcessingMixin, PreTrainedConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .checkpoints import CheckpointError, Fields, checked, loaded_whole, prefix_tokens
from .config import FoveateConfig
from .export import written_whole
from .model import FoveateForConditionalGeneration, tower_config
from .processor import CONTENT_MACRO, FoveateProcessor, add_media_tokens, model_fields
from .stock import ExportError

PARTS = ("llm", "vision_tower", "mm_projector")
# mm_projector_type -> ours, and by how much their `layers.N` is ahead of ours: a module without weights stands first
PROJECTORS = {
    "linear": ("linear", 0),
    "mlp2x_gelu": ("mlp2x", 0),
    "mlp_downsample": ("downsample-2x2", 1),
    "mlp_downsample_2x2_fix": ("downsample-2x2", 1),
    "mlp_downsample_3x3_fix": ("downsample-3x3", 1),
}
TOWERS = ("siglip_vision_model", "clip_vision_model")
KINDS = {ours: theirs for theirs, (ours, _) in reversed(PROJECTORS.items())}
# Keys that change the model; what they may be here, None besides
PLAIN = {
    "ps3": (False,),
    "look_close_mode": (),
    "mm_use_im_start_end": (False,),
    "video_max_tiles": (1,),
}
IMAGE_ENCODERS = ("BasicImageEncoder",)
VIDEO_ENCODERS = ("BasicVideoEncoder", "TSPVideoEncoder")


def is_vila(config: Fields) -> bool:
    """Whether a `config.json` is one of VILA's layout."""
    return all(f"{part}_cfg" in config for part in PARTS)


def from_vila(
    source: str | PathLike[str], dtype: str | torch.dtype = "auto"
) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    """Loads a model of VILA's layout; only safetensors are opened.

    Args:
        source: the directory.
        dtype: of the weights; the checkpoint's `model_dtype`, or as they were saved, when `auto`.

    Raises:
        CheckpointError: a part is missing, or a key has no counterpart here; the message names it.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise CheckpointError(f"{source} is no directory; VILA's layout is read from a downloaded one")
    config = _json(folder / "config.json")
    if not is_vila(config):
        raise CheckpointError(f"{folder}/config.json lacks one of {', '.join(f'{part}_cfg' for part in PARTS)}")
    parts = {part: _part(folder, part) for part in PARTS}
    if "quantization_config" in _json(parts["llm"] / "config.json"):
        raise CheckpointError("quantization_config of llm/ is set; accepted: weights that aren't quantized")
    if (model_type := _json(parts["vision_tower"] / "config.json").get("model_type")) not in TOWERS:
        raise CheckpointError(f"model_type of vision_tower/ is {model_type!r}; accepted: {', '.join(TOWERS)}")
    vision = tower_config(parts["vision_tower"])
    fields, options = _read(config, vision, _json(parts["mm_projector"] / "config.json"))
    if dtype == "auto" and config.get("model_dtype"):
        dtype = getattr(torch, str(config["model_dtype"]).removeprefix("torch."))
    # The pooling head of SigLIP is not read by VILA either, and left out.
    tower = loaded_whole(AutoModel, parts["vision_tower"], dtype, config=vision, ignored="head.")
    llm = loaded_whole(AutoModelForCausalLM, parts["llm"], dtype)
    tokenizer = AutoTokenizer.from_pretrained(parts["llm"])
    settings, _ = ImageProcessingMixin.get_image_processor_dict(parts["vision_tower"])
    options |= {name: settings[name] for name in ("image_mean", "image_std")}
    options["chat_template"] = _chat_template(tokenizer.chat_template)
    image_token_id, video_token_id = add_media_tokens(tokenizer)
    foveate_config = FoveateConfig(
        vision_config=tower.config,
        text_config=llm.config,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        **fields,
    )
    with torch.device("meta"):
        model = FoveateForConditionalGeneration(foveate_config)
    model.vision_tower, model.language_model = tower, llm
    kind = _json(parts["mm_projector"] / "config.json")["mm_projector_type"]
    _load_projector(model.multi_modal_projector, parts["mm_projector"], kind, llm.dtype)
    model.generation_config = llm.generation_config
    return checked(model), FoveateProcessor(tokenizer, **(model_fields(foveate_config) | options))


def to_vila(model: FoveateForConditionalGeneration, processor: FoveateProcessor, out: str | PathLike[str]) -> None:
    """Writes a model in VILA's layout: the inverse of `from_vila`.

    Args:
        model, processor: what is written; neither is changed.
        out: a directory that is made; it must not exist, or be empty.

    Raises:
        ExportError: VILA has no counterpart of a field, which is named, or `out` holds files already.
    """
    config, tower, llm = model.config, model.vision_tower, model.language_model
    entries, kind = _entries(model, processor)
    parts = {"llm": llm.config, "vision_tower": tower.config}
    entries |= {f"{part}_cfg": part_config.to_diff_dict() for part, part_config in parts.items()}
    entries["mm_projector_cfg"] = {"model_type": "v2l_projector", "mm_projector_type": kind}
    with written_whole(out) as folder:
        for part in PARTS:
            (folder / part).mkdir()
        llm.save_pretrained(folder / "llm")
        processor.tokenizer.save_pretrained(folder / "llm")
        tower.config.save_pretrained(folder / "vision_tower")
        weights = {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in tower.state_dict().items()}
        _save(weights, folder / "vision_tower")
        side = {"height": processor.image_size[0], "width": processor.image_size[1]}
        options = {name: getattr(processor, name) for name in ("image_mean", "image_std", "resample")}
        if prefix_tokens(config.vision_config):  # CLIP
            images: Any = CLIPImageProcessorPil(size={"shortest_edge": side["height"]}, crop_size=side, **options)
        else:
            images = SiglipImageProcessorPil(size=side, **options)
        images.save_pretrained(folder / "vision_tower")
        projector = model.multi_modal_projector.state_dict()
        _save({_projector_name(name, kind): tensor for name, tensor in projector.items()}, folder / "mm_projector")
        for path, content in (("mm_projector/config.json", entries["mm_projector_cfg"]), ("config.json", entries)):
            (folder / path).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save(weights: dict[str, torch.Tensor], folder: Path) -> None:
    kept = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def _entries(model: FoveateForConditionalGeneration, processor: FoveateProcessor) -> tuple[Fields, str]:
    """VILA's `config.json`, its parts' configurations not yet in it, and `mm_projector_type`."""
    config, columns = model.config, model.config.token_order == "columns"
    aspect = {"stretch": "resize", "pad": "pad", "crop": None}[processor.fit]
    aspect = {"tiles": "dynamic", "dynamic-s2": "dynamic_s2"}.get(config.tiling, aspect)
    clip = config.vision_config.model_type == "clip_vision_model"
    side = _side(config.vision_config)
    fits = {
        "vision_config": (config.vision_config.model_type in TOWERS, " or ".join(TOWERS)),
        "projector": (config.projector in KINDS, ", ".join(KINDS)),
        "token_order": (not columns or config.projector == "downsample-2x2", "'columns' with 'downsample-2x2' alone"),
        "tiling": (config.tiling in ("resize", "s2", "dynamic-s2", "tiles"), "resize, s2, dynamic-s2, tiles"),
        "vision_feature_layer": (config.vision_feature_layer is not None, "a layer's index"),
        "image_size": (processor.image_size == (side, side), f"the tower's {(side, side)}"),
        "video_size": (processor.video_size == processor.image_size, f"image_size {processor.image_size}"),
        "resample": (processor.resample == 3, "3, bicubic"),
        "fit": (processor.fit != "crop" or clip, "'crop' with a CLIP tower alone"),
        "thumbnail": (config.thumbnail, "True"),
        "frame_end": (not processor.frame_end, "''"),
        "timestamps": (processor.timestamps == "none", "none"),
        "last_frame_separator": (processor.last_frame_separator, "True"),
        "tile_separator": (
            processor.tile_separator == ("\n" if config.tiling == "tiles" else ""),
            "'\\n' with 'tiles'",
        ),
    }
    for name, (holds, accepted) in fits.items():
        if not holds:
            value = getattr(processor, name, getattr(config, name, None))
            value = value.model_type if isinstance(value, PreTrainedConfig) else value
            raise ExportError(f"{name} {value!r} has no counterpart in VILA's layout; accepted: {accepted}")
    encoders = "llava.model.encoders."
    image_encoder = {
        "_target_": encoders + "BasicImageEncoder",
        "start_tokens": processor.image_start or None,
        "end_tokens": processor.image_end or None,
    }
    video_encoder: Fields = {
        "_target_": encoders + "BasicVideoEncoder",
        "start_tokens": processor.frame_start or None,
        "end_tokens": processor.frame_separator or None,
    }
    if list(config.video_pool) != [1, 1, 1]:
        video_encoder |= {"_target_": encoders + "TSPVideoEncoder", "pool_sizes": [list(config.video_pool)]}
    entries: Fields = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaModel"],
        "hidden_size": config.text_config.hidden_size,
        "mm_hidden_size": config.vision_config.hidden_size * len(config.scales),
        "image_aspect_ratio": aspect,
        "num_video_frames": processor.num_frames,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": (
            "patch" if clip and config.vision_feature_select_strategy == "default" else "cls_patch"
        ),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "model_dtype": str(model.language_model.dtype),
        "vision_resolution": -1,
        "min_tiles": processor.min_tiles,
        "max_tiles": processor.max_tiles,
        "video_max_tiles": 1,
        "s2": config.tiling == "s2",
        "dynamic_s2": config.tiling == "dynamic-s2",
    }
    if not columns:
        entries |= {"image_encoder": image_encoder, "video_encoder": video_encoder}
    elif processor.image_start or processor.image_end or list(config.video_pool) != [1, 1, 1]:
        raise ExportError(
            "token_order 'columns' has no counterpart in VILA's layout with text around images or video_pool"
        )
    if config.s2_scales:
        entries |= {
            "s2_scales": ",".join(map(str, config.s2_scales)),
            "s2_max_split_size": config.s2_scales[0],
            "s2_resize_output_to_scale_idx": -1 if config.tiling == "dynamic-s2" else 0,
        }
    return entries, KINDS[config.projector]


def _read(config: Fields, vision: PreTrainedConfig, projector: Fields) -> tuple[Fields, Fields]:
    """The fields of `FoveateConfig` and the options of `FoveateProcessor` that a VILA config stands for."""
    for key, accepted in PLAIN.items():
        if (value := config.get(key)) is not None and value not in accepted:
            raise CheckpointError(f"{key} is {value!r}; accepted: {', '.join(map(str, (*accepted, None)))}")
    if config.get("vision_resolution") not in (None, -1, vision.image_size):
        raise CheckpointError(
            f"vision_resolution is {config['vision_resolution']}; accepted: the tower's {vision.image_size}, or -1"
        )
    kind = projector.get("mm_projector_type")
    if kind not in PROJECTORS:
        raise CheckpointError(f"mm_projector_type is {kind!r}; accepted: {', '.join(PROJECTORS)}")
    fields: Fields = {
        "projector": PROJECTORS[kind][0],
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
    }
    if kind == "mlp_downsample" and config.get("image_encoder") is None:
        fields["token_order"] = "columns"  # VILA-1.5's code, without the last permute of NVILA's
    fields["vision_feature_select_strategy"] = _strategy(config, vision, fields["projector"])
    fields |= _tiling(config, vision)
    side = _side(vision)
    options: Fields = {"image_size": (side, side), "resample": 3}  # PIL's own default, which VILA resizes with
    aspect = config.get("image_aspect_ratio")
    if aspect == "pad":
        options["fit"] = "pad"
    elif aspect is None and vision.model_type == "clip_vision_model":
        options["fit"] = "crop"  # left to CLIP's image processor
    if fields["tiling"] == "tiles":
        options |= {"min_tiles": config.get("min_tiles", 1), "tile_separator": "\n"}
    if fields["tiling"] in ("tiles", "dynamic-s2"):
        options["max_tiles"] = config.get("max_tiles", 12)
    if config.get("num_video_frames"):
        options["num_frames"] = config["num_video_frames"]
    image_encoder = _encoder(config, "image_encoder", IMAGE_ENCODERS)
    video_encoder = _encoder(config, "video_encoder", VIDEO_ENCODERS)
    if image_encoder is not None:
        options["image_start"] = image_encoder.get("start_tokens") or ""
        options["image_end"] = _ending(image_encoder)
    if video_encoder is not None:
        options["frame_start"] = video_encoder.get("start_tokens") or ""
        options["frame_separator"] = _ending(video_encoder)
        if video_encoder.get("sep_tokens"):
            raise CheckpointError(f"sep_tokens of video_encoder is {video_encoder['sep_tokens']!r}; accepted: None")
        pools = video_encoder.get("pool_sizes", [[1, 1, 1]])
        if len(pools) != 1 or len(pools[0]) != 3:
            raise CheckpointError(f"pool_sizes of video_encoder is {pools}; accepted: one [frames, rows, columns]")
        fields["video_pool"] = pools[0]
    return fields, options


def _strategy(config: Fields, vision: PreTrainedConfig, projector: str) -> str:
    prefix = prefix_tokens(vision)
    feature = config.get("mm_vision_select_feature", "patch")
    if feature == "patch" and prefix == 1:
        return "default"
    if feature == "cls_patch" and prefix == 0:
        return "default"  # there is no CLS: all tokens are patches
    if feature == "cls_patch" and not projector.startswith("downsample"):
        return "full"
    accepted = "'cls_patch'" if prefix == 0 else "'patch'"
    raise CheckpointError(
        f"mm_vision_select_feature is {feature!r} with a {vision.model_type} and projector {projector}; "
        f"accepted: {accepted}"
    )


def _tiling(config: Fields, vision: PreTrainedConfig) -> Fields:
    aspect = config.get("image_aspect_ratio")
    dynamic = bool(config.get("dynamic_s2"))
    if dynamic != (aspect == "dynamic_s2"):
        raise CheckpointError(
            f"dynamic_s2 is {dynamic} with image_aspect_ratio {aspect!r}; accepted: with 'dynamic_s2'"
        )
    if not dynamic and not config.get("s2"):
        if aspect == "dynamic":
            return {"tiling": "tiles", "thumbnail": True}
        if aspect in ("resize", "pad", None):
            return {"tiling": "resize"}
        raise CheckpointError(f"image_aspect_ratio is {aspect!r}; accepted: resize, pad, dynamic, dynamic_s2")
    if not dynamic and aspect not in ("resize", None):
        raise CheckpointError(f"image_aspect_ratio is {aspect!r} with s2; accepted: 'resize'")
    scales = config.get("s2_scales")
    scales = sorted(int(side) for side in (scales.split(",") if isinstance(scales, str) else scales or []))
    if scales[:1] != [vision.image_size]:
        raise CheckpointError(
            f"s2_scales is {config.get('s2_scales')!r}; accepted: from the tower's {vision.image_size}"
        )
    if config.get("s2_max_split_size") not in (None, scales[0]):
        raise CheckpointError(
            f"s2_max_split_size is {config['s2_max_split_size']}; accepted: {scales[0]}, the first scale"
        )
    index = config.get("s2_resize_output_to_scale_idx", 0)
    accepted = (-1, len(scales) - 1) if dynamic else (0, -len(scales))
    if index not in accepted:
        raise CheckpointError(f"s2_resize_output_to_scale_idx is {index}; accepted: {accepted[0]}")
    return {"tiling": "dynamic-s2" if dynamic else "s2", "s2_scales": scales}


def _encoder(config: Fields, key: str, accepted: tuple[str, ...]) -> Fields | None:
    """A media encoder's arguments; None in VILA-1.5's configs, which have no such key."""
    encoder = config.get(key)
    if isinstance(encoder, str):
        encoder = json.loads(encoder)
    if encoder is not None and encoder.get("_target_", "").rsplit(".", 1)[-1] not in accepted:
        raise CheckpointError(f"{key} is {encoder.get('_target_')!r}; accepted: {', '.join(accepted)}")
    return encoder


def _ending(encoder: Fields) -> str:
    return encoder.get("end_tokens", "\n") or ""


def _chat_template(template: Any) -> Any:
    """A template of an LLM, whose messages are text, for messages that are lists of parts too."""
    if not isinstance(template, str):
        return template
    for content in ("message['content']", 'message["content"]', "message.content"):
        template = template.replace(content, "content(message)")
    return CONTENT_MACRO + template


def _part(folder: Path, part: str) -> Path:
    path = folder / part
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{part}_cfg: {path} holds no config.json; accepted: a checkpoint with its parts' folders"
        )
    if not list(path.glob("*.safetensors")):
        pickled = sorted(file.name for file in path.glob("*.bin"))
        raise CheckpointError(
            f"{path} holds no safetensors (found: {', '.join(pickled) or 'no weights'}). Pickled weights can run code "
            "and are not opened; convert them where you trust them: torch.load(file, weights_only=True), then "
            "safetensors.torch.save_file"
        )
    return path


def _load_projector(projector: nn.Module, path: Path, kind: str, dtype: torch.dtype) -> None:
    theirs = {name: weight for file in sorted(path.glob("*.safetensors")) for name, weight in load_file(file).items()}
    expected = {_projector_name(name, kind): name for name in projector.state_dict()}
    if wrong := sorted(set(theirs) ^ set(expected)):
        raise CheckpointError(f"{path} holds other weights than mm_projector_type {kind} has: {', '.join(wrong[:5])}")
    weights = {ours: theirs[name].to(dtype) for name, ours in expected.items()}
    shapes = {name: weight.shape for name, weight in projector.state_dict().items()}
    if wrong := sorted(name for name, weight in weights.items() if weight.shape != shapes[name]):
        raise CheckpointError(
            f"{path}: {_projector_name(wrong[0], kind)} is {tuple(weights[wrong[0]].shape)}; accepted: "
            f"{tuple(shapes[wrong[0]])}, from the hidden sizes of tower and LLM"
        )
    projector.load_state_dict(weights, assign=True)


def _projector_name(name: str, kind: str) -> str:
    """VILA's name of one of our projector's weights."""
    _, index, tensor = name.split(".")
    return f"layers.{tensor}" if kind == "linear" else f"layers.{int(index) + PROJECTORS[kind][1]}.{tensor}"


def _json(path: Path) -> Fields:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    return json.loads(path.read_text(encoding="utf-8"))


def _side(vision: PreTrainedConfig) -> int:
    size = vision.image_size
    return size if isinstance(size, int) else size[0]
