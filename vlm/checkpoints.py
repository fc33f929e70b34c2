"""Checkpoints of others whose topology is ours: transformers' LLaVA and InternVL, and VILA's folders (`vila.py`).

    llava            LLaVA-1.5: one hidden state → `mlp2x`, one tile an image            (arXiv 2310.03744)
    llava_next       LLaVA-NeXT: the same over `anyres` tiles
    llava_onevision  LLaVA-OneVision: `anyres` tiles, a large map shrunk, frames pooled   (arXiv 2408.03326)
    internvl         InternVL: `tiles` and a thumbnail, `downsample-2x2`                  (arXiv 2404.16821)

The way back is `export(..., format="stock")`. No weight is changed on either way.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import cached_file, logging

from .config import FoveateConfig
from .export import written_whole
from .model import FoveateForConditionalGeneration
from .processor import FoveateProcessor, model_fields
from .quantised_weights import check_readable
from .stock import ExportError, add_to_json, check_head, shapes

# Tokens that a tower puts before its patches, where it has no registers
PREFIX_TOKENS = {"siglip_vision_model": 0, "clip_vision_model": 1, "internvl_vision": 1, "vit": 1, "dinov2": 1}


class CheckpointError(ValueError):
    """A checkpoint that isn't of our topology, or not whole. The message names the key and what is accepted."""


Fields = dict[str, Any]


def load(
    source: str | PathLike[str], dtype: str | torch.dtype = "auto"
) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    """Loads a checkpoint of ours, of Hugging Face's or of VILA's layout, told from its `config.json`.

    Args:
        source: a directory or a Hugging Face name; VILA's layout from a directory alone.
        dtype: of the weights; as they were saved when `auto`.

    Raises:
        CheckpointError: it is none of these, or its topology isn't ours.
        QuantisationError: its weights are quantised in a way that is not read here.
        OSError: nothing is there.
    """
    from .vila import from_vila, is_vila

    config = read_config(source)
    if is_vila(config):
        return from_vila(source, dtype)
    if config.get("model_type") != FoveateConfig.model_type:
        return from_hf(source, dtype)
    processor = AutoProcessor.from_pretrained(source)
    if not isinstance(processor, FoveateProcessor):
        raise CheckpointError(
            f"{source} holds a {type(processor).__name__}; accepted: a model that Foveate trained or exported"
        )
    check_readable(config)
    model: Any = FoveateForConditionalGeneration.from_pretrained(source, dtype=dtype, use_safetensors=True)
    return model.eval(), processor


def import_checkpoint(
    source: str | PathLike[str], out: str | PathLike[str], dtype: str | torch.dtype = "auto"
) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    """Writes a checkpoint as a model of ours, which every command takes; see `load`.

    Args:
        source: see `load`.
        out: a directory that is made; it must not exist, or be empty.
        dtype: see `load`.

    Raises:
        CheckpointError: as `load`, or `out` holds files already. Nothing is left in `out`.
    """
    try:
        with written_whole(out) as folder:
            model, processor = load(source, dtype)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            add_to_json(folder / "config.json")  # without the path that it came from
    except ExportError as error:
        raise CheckpointError(str(error)) from error
    return model, processor


def from_hf(
    source: str | PathLike[str], dtype: str | torch.dtype = "auto"
) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    """Loads one of transformers' models listed above.

    Prompts, tiles and numbers of tokens are those of the checkpoint's own processor, and so are the pixels of its image
    processor (the PIL backend's: torchvision rounds a resized pixel differently here and there). Its chat template and
    its media tokens are kept; where it has none for videos, `<video>` is added to the tokenizer, not to the weights.
    Only safetensors are opened.

    Args:
        source: a directory or a Hugging Face name.
        dtype: of the weights; as they were saved when `auto`.

    Raises:
        CheckpointError: another model type, or a field that has no counterpart here; the message names it.
        OSError: nothing is there.
    """
    if (model_type := read_config(source).get("model_type")) not in READERS:
        raise CheckpointError(
            f"model_type is {model_type!r}; accepted: a model that Foveate trained or exported, {', '.join(READERS)}, "
            "or VILA's layout"
        )
    stock_config = AutoConfig.from_pretrained(source)
    if getattr(stock_config, "quantization_config", None):
        raise CheckpointError("quantization_config is set; accepted: weights that aren't quantized")
    tokenizer = AutoTokenizer.from_pretrained(source)
    settings, _ = ImageProcessingMixin.get_image_processor_dict(source)  # its class may want torchvision
    written, _ = ProcessorMixin.get_processor_dict(source)
    fields, options, layers = READERS[stock_config.model_type](stock_config, settings, written, tokenizer)
    stock = loaded_whole(AutoModelForImageTextToText, source, dtype)
    options["chat_template"] = written.get("chat_template") or tokenizer.chat_template
    tied = stock.lm_head.weight is stock.get_input_embeddings().weight
    text = stock.model.language_model.config
    text.tie_word_embeddings = tied
    config = FoveateConfig(
        vision_config=stock.model.vision_tower.config, text_config=text, tie_word_embeddings=tied, **fields
    )
    processor = FoveateProcessor(tokenizer, **(model_fields(config) | options))
    config.image_token_id, config.video_token_id = processor.image_token_id, processor.video_token_id
    if stock_config.image_token_id != config.image_token_id:
        raise CheckpointError(
            f"image_token_id is {stock_config.image_token_id}, but the tokenizer gives {processor.image_token} the id "
            f"{config.image_token_id}; accepted: the same"
        )
    with torch.device("meta"):
        model = FoveateForConditionalGeneration(config)
    expected = shapes(model)
    llm: Any = model.language_model
    if type(llm.base_model) is not type(stock.model.language_model):
        raise CheckpointError(
            f"text_config {text.model_type} has no counterpart: {type(llm).__name__} has a decoder "
            f"{type(llm.base_model).__name__}, the checkpoint {type(stock.model.language_model).__name__}"
        )
    model.vision_tower = stock.model.vision_tower
    setattr(llm, llm.base_model_prefix, stock.model.language_model)
    llm.set_output_embeddings(stock.lm_head)
    projector: Any = model.multi_modal_projector.layers
    for name, index in layers.items():
        projector[index] = getattr(stock.model.multi_modal_projector, name)
    if config.tiling == "anyres":
        model.image_newline = stock.model.image_newline
    if wrong := sorted(name for name, _ in shapes(model).items() ^ expected.items()):
        raise CheckpointError(f"weights don't fit: {', '.join(wrong[:5])} (of {len(wrong)})")
    model.generation_config = stock.generation_config
    return checked(model), processor


def loaded_whole(
    auto: Any, source: str | PathLike[str], dtype: str | torch.dtype, ignored: str | None = None, **options: Any
) -> Any:
    """A model of transformers from safetensors, all of whose weights were there, and no others.

    Args:
        auto: the class that loads it.
        source, dtype: as in `load`.
        ignored: weights whose names hold this may be there; they are not loaded.
        **options: of `from_pretrained`.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is raised here
    try:
        model, loading = auto.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    finally:
        logging.set_verbosity(verbosity)
    problems = {kind: sorted(map(str, names)) for kind, names in loading.items()}
    if ignored is not None:
        problems["unexpected_keys"] = [name for name in problems["unexpected_keys"] if ignored not in name]
    if problems := {kind: names for kind, names in problems.items() if names}:
        raise CheckpointError(f"weights of {source} don't fit its config.json: {problems}")
    return model.eval()


def checked(model: FoveateForConditionalGeneration) -> FoveateForConditionalGeneration:
    """The model for inference, if its logits are those of a plain linear head, which the layouts here all have."""
    model.eval()
    try:
        with torch.no_grad():
            check_head(model.language_model)
    except ExportError as error:
        raise CheckpointError(str(error)) from error
    return model


# Hugging Face's classes: each reader gives the fields of `FoveateConfig`, the options of `FoveateProcessor`, and which
# module of the projector is which of our layers.


def _llava(
    config: PreTrainedConfig, settings: Fields, written: Fields, tokenizer: PreTrainedTokenizerBase
) -> tuple[Fields, Fields, dict[str, int]]:
    image_size, fit = _fitted_size(settings)
    side = _square("vision_config.image_size", config.vision_config.image_size)
    if image_size != (side, side):
        raise CheckpointError(f"the image processor's size is {image_size}; accepted: the tower's {(side, side)}")
    fields = {"projector": "mlp2x", "tiling": "resize"} | _selected(config)
    options = {"image_size": image_size, "fit": fit} | _tokens(written, tokenizer) | _normalisation(settings)
    return fields, options, {"linear_1": 0, "linear_2": 2}


def _anyres(
    config: PreTrainedConfig, settings: Fields, written: Fields, tokenizer: PreTrainedTokenizerBase
) -> tuple[Fields, Fields, dict[str, int]]:
    side = _square("vision_config.image_size", config.vision_config.image_size)
    patches = side // config.vision_config.patch_size
    max_tiles = None
    if config.model_type == "llava_onevision":
        ratio = config.vision_aspect_ratio
        if not ratio.startswith("anyres_max_") or not ratio.removeprefix("anyres_max_").isdigit():
            raise CheckpointError(f"vision_aspect_ratio is {ratio!r}; accepted: anyres_max_N")
        max_tiles = int(ratio.removeprefix("anyres_max_"))
        tokens = patches**2 + prefix_tokens(config.vision_config)
        if (counted := written.get("num_image_tokens", tokens)) != tokens:
            raise CheckpointError(f"num_image_tokens is {counted}; accepted: {tokens}, the tower's")
    if set(settings.get("size", {}).values()) != {side}:
        raise CheckpointError(f"the image processor's size is {settings.get('size')}; accepted: the tower's {side}")
    pinpoints = settings.get("image_grid_pinpoints", config.image_grid_pinpoints)
    if any(pixels % side for grid in pinpoints for pixels in grid):
        raise CheckpointError(f"image_grid_pinpoints are {pinpoints}; accepted: multiples of a tile's side {side}")
    if list(map(list, pinpoints)) != list(map(list, config.image_grid_pinpoints)):
        raise CheckpointError(
            f"image_grid_pinpoints of the image processor are {pinpoints}; accepted: the model's "
            f"{config.image_grid_pinpoints}"
        )
    fields = {"projector": "mlp2x", "tiling": "anyres", "anyres_max_tiles": max_tiles} | _selected(config)
    if fields["vision_feature_select_strategy"] == "full":
        raise CheckpointError(
            "vision_feature_select_strategy is 'full'; accepted with a tower that has a CLS: 'default'"
        )
    options = {
        "image_size": (side, side),
        "anyres_grids": [(rows // side, columns // side) for rows, columns in pinpoints],
        "anyres_max_tiles": max_tiles,
        "frame_separator": "",
    }
    return fields, options | _tokens(written, tokenizer) | _normalisation(settings), {"linear_1": 0, "linear_2": 2}


def _internvl(
    config: PreTrainedConfig, settings: Fields, written: Fields, tokenizer: PreTrainedTokenizerBase
) -> tuple[Fields, Fields, dict[str, int]]:
    if config.downsample_ratio != 0.5:
        raise CheckpointError(f"downsample_ratio is {config.downsample_ratio}; accepted: 0.5")
    size = _sides("size", settings.get("size", {}))
    patch = _square("vision_config.patch_size", config.vision_config.patch_size)
    if size[0] != size[1] or size[0] % (2 * patch):
        raise CheckpointError(
            f"the image processor's size is {size}; accepted: square, multiples of {2 * patch} pixels"
        )
    counted = written.get("image_seq_length", config.image_seq_length)
    if counted != (size[0] // patch // 2) ** 2:
        raise CheckpointError(f"image_seq_length is {counted}; accepted: {(size[0] // patch // 2) ** 2}")
    fields = {"projector": "downsample-2x2", "tiling": "tiles", "thumbnail": True} | _selected(config)
    if fields["vision_feature_layer"] == -1:
        fields["vision_feature_layer"] = None  # transformers takes the tower's final output for -1
    start, end = (getattr(tokenizer, f"{name}_image_token", default) for name, default in _INTERNVL_TOKENS)
    options = {
        "image_size": size,
        "min_tiles": settings.get("min_patches", 1),
        "max_tiles": settings.get("max_patches", 12) if settings.get("crop_to_patches", True) else 1,
        "image_token": getattr(tokenizer, "context_image_token", "<IMG_CONTEXT>"),
        "video_token": getattr(tokenizer, "video_token", "<video>"),
        "image_start": start,
        "image_end": end,
        "frame_start": "Frame{number}: " + start,
        "frame_end": end,
        "frame_separator": "\n",
        "last_frame_separator": False,
    }
    return fields, options | _normalisation(settings), {"layer_norm": 0, "linear_1": 1, "linear_2": 3}


_INTERNVL_TOKENS = (("start", "<img>"), ("end", "</img>"))
Reader = Callable[[PreTrainedConfig, Fields, Fields, PreTrainedTokenizerBase], tuple[Fields, Fields, dict[str, int]]]
READERS: dict[str, Reader] = {
    "llava": _llava,
    "llava_next": _anyres,
    "llava_onevision": _anyres,
    "internvl": _internvl,
}


def _selected(config: PreTrainedConfig) -> Fields:
    """Which features are read; and that the projector is ours."""
    if config.projector_hidden_act != "gelu":
        raise CheckpointError(f"projector_hidden_act is {config.projector_hidden_act!r}; accepted: 'gelu'")
    if not getattr(config, "multimodal_projector_bias", True):
        raise CheckpointError("multimodal_projector_bias is False; accepted: True")
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise CheckpointError(f"vision_feature_layer is {layer}; accepted: one layer's index")
    prefix = prefix_tokens(config.vision_config)
    strategy = config.vision_feature_select_strategy
    if strategy == "default" and prefix != 1:
        raise CheckpointError(
            f"vision_feature_select_strategy is 'default', which drops the first token, but this tower puts {prefix} "
            "before its patches; accepted with it: 'full'"
        )
    # Without a CLS token both keep the patches; 'default' then fits every tiling.
    return {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy if prefix else "default"}


def prefix_tokens(vision: PreTrainedConfig) -> int:
    """CLS and register tokens that a tower puts before its patches.

    Raises:
        CheckpointError: the tower isn't known.
    """
    if vision.model_type == "dinov2_with_registers":
        return 1 + vision.num_register_tokens
    if vision.model_type not in PREFIX_TOKENS:
        accepted = ", ".join([*PREFIX_TOKENS, "dinov2_with_registers"])
        raise CheckpointError(f"vision_config.model_type is {vision.model_type!r}; accepted: {accepted}")
    return PREFIX_TOKENS[vision.model_type]


def _tokens(written: Fields, tokenizer: PreTrainedTokenizerBase) -> Fields:
    """The placeholders, as transformers' processors find them."""
    names = {"image_token": "<image>", "video_token": "<video>"}
    return {name: getattr(tokenizer, name, None) or written.get(name, token) for name, token in names.items()}


def _normalisation(settings: Fields) -> Fields:
    if missing := {"image_mean", "image_std", "resample"} - set(settings):
        raise CheckpointError(f"the image processor's file has no {', '.join(sorted(missing))}")
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not settings.get(name, True):
            raise CheckpointError(f"{name} of the image processor is False; accepted: True")
    if abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise CheckpointError(f"rescale_factor of the image processor is {settings['rescale_factor']}; accepted: 1/255")
    return {name: settings[name] for name in ("image_mean", "image_std", "resample")}


def _fitted_size(settings: Fields) -> tuple[tuple[int, int], str]:
    """(height, width) that an image becomes, and how it is fitted."""
    size, crop = settings.get("size", {}), settings.get("crop_size")
    if not settings.get("do_center_crop", crop is not None):
        return _sides("size", size), "pad" if settings.get("do_pad") else "stretch"
    if crop is None:
        raise CheckpointError("the image processor's file has do_center_crop, but no crop_size")
    side = _square("crop_size", _sides("crop_size", crop))
    resized = size.get("shortest_edge", size.get("height")) if isinstance(size, Mapping) else size
    if resized != side:
        raise CheckpointError(f"the image processor's size is {size}; accepted: its crop_size {side}")
    if settings.get("do_pad"):
        return (side, side), "pad"
    return (side, side), "crop" if "shortest_edge" in size or isinstance(size, int) else "stretch"


def _sides(name: str, size: Any) -> tuple[int, int]:
    """(height, width) of an image processor's size."""
    if isinstance(size, int):
        return size, size
    if not {"height", "width"} <= set(size):
        raise CheckpointError(f"{name} of the image processor is {size}; accepted: height and width")
    return size["height"], size["width"]


def _square(name: str, size: int | Sequence[int]) -> int:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(set(sides)) != 1:
        raise CheckpointError(f"{name} is {size}; accepted: a square")
    return sides[0]


def read_config(source: str | PathLike[str]) -> Fields:
    """The `config.json` of a directory or a Hugging Face name.

    Raises:
        OSError: there is none.
    """
    path = cached_file(source, "config.json")
    if path is None:
        raise OSError(f"{source} holds no config.json; accepted: a model's folder")
    return json.loads(Path(path).read_text(encoding="utf-8"))
