"""A recipe's model and processor: from a checkpoint, from pretrained parts, or from scratch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoProcessor

from ..data.glyphs import FRAME_SEPARATOR, TEMPLATES, glyph_tokenizer
from ..vlm.config import FoveateConfig
from ..vlm.model import FoveateForConditionalGeneration, tower_config
from ..vlm.processor import FoveateProcessor, add_media_tokens, model_fields
from .adapters import Adapters, AdapterSettings, add_adapters, load_quantised, merge_adapters, quantize_llm
from .checkpoint import CheckpointError, CheckpointTensors, is_whole, read_state
from .distributed import World
from .recipe import ModelRecipe, Recipe, StageRecipe


def build_model(recipe: ModelRecipe) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    """Loads or makes what the recipe's `model` names, in fp32.

    From scratch the tokenizer is one of the embedded data's own (`data/glyphs.py`), and the LLM's vocabulary is its
    size.
    """
    loading: dict[str, Any] = {"dtype": "float32", "attn_implementation": recipe.attn_implementation}
    if recipe.path is not None:
        model = FoveateForConditionalGeneration.from_pretrained(recipe.path, **loading)
        return model, AutoProcessor.from_pretrained(recipe.path)
    if isinstance(recipe.vision, str) and isinstance(recipe.text, str):
        options = recipe.config_fields | loading | {"tower_image_size": recipe.tower_image_size}
        model = FoveateForConditionalGeneration.from_parts(recipe.vision, recipe.text, **options)
        processor = FoveateProcessor.from_parts(recipe.vision, recipe.text, model.config, **recipe.processor)
        if len(processor.tokenizer) > model.config.text_config.vocab_size:  # it has added time tokens
            model.resize_token_embeddings(len(processor.tokenizer))
        return model, processor
    config, processor = _from_scratch(recipe)
    model = FoveateForConditionalGeneration._from_config(config, attn_implementation=recipe.attn_implementation)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(recipe.embedding_scale)
    return model, processor


def build_config(recipe: ModelRecipe) -> tuple[FoveateConfig, FoveateProcessor]:
    """The configuration and processor of what `build_model` gives; no weights are read."""
    if recipe.path is not None:
        return FoveateConfig.from_pretrained(recipe.path), AutoProcessor.from_pretrained(recipe.path)
    if not (isinstance(recipe.vision, str) and isinstance(recipe.text, str)):
        return _from_scratch(recipe)
    vision = tower_config(recipe.vision)
    if recipe.tower_image_size is not None:
        vision.image_size = recipe.tower_image_size
    config = FoveateConfig(
        vision_config=vision,
        text_config=AutoConfig.from_pretrained(recipe.text),
        **recipe.config_fields,
    )
    processor = FoveateProcessor.from_parts(recipe.vision, recipe.text, config, **recipe.processor)
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(processor.tokenizer))
    return config, processor


def _from_scratch(recipe: ModelRecipe) -> tuple[FoveateConfig, FoveateProcessor]:
    assert isinstance(recipe.vision, dict) and isinstance(recipe.text, dict)  # ModelRecipe has checked it
    language = recipe.tokenizer or "glyphs"
    tokenizer = glyph_tokenizer(language)
    image_token_id, video_token_id = add_media_tokens(tokenizer)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = FoveateConfig(
        vision_config=recipe.vision,
        text_config=recipe.text | tokens | {"vocab_size": len(tokenizer)},
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        **recipe.config_fields,
    )
    layout: dict[str, Any] = {"chat_template": TEMPLATES[language], "frame_separator": FRAME_SEPARATOR}
    processor = FoveateProcessor(tokenizer, **(model_fields(config) | layout | recipe.processor))
    config.text_config.vocab_size = len(tokenizer)  # with time tokens, if the processor has added them
    return config, processor


def starting_model(recipe: Recipe, checkpoint: Path | None) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    """The model that a run begins or goes on with; from the middle of a stage its weights are yet to be loaded."""
    if checkpoint is None:
        return build_model(recipe.model)
    state = read_state(checkpoint)
    if not state["stage_step"]:
        return model_of_checkpoint(checkpoint)
    model, processor = build_model(recipe.model)
    _follow_stages(model, recipe, state["stage"])
    return model, processor


def model_of_checkpoint(path: Path) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    """The model as a training checkpoint holds it, in fp32 on the CPU, adapters merged into the weights.

    Raises:
        CheckpointError: it is not whole, or its weights are not those of the recipe's model.
    """
    if not is_whole(path, hashes=False):
        raise CheckpointError(f"{path}: not whole (a file is missing or differs from manifest.json)")
    state = read_state(path)
    recipe = Recipe.model_validate(state["recipe"])
    model, processor = build_model(recipe.model)
    _follow_stages(model, recipe, state["stage"] + bool(state["stage_step"]))
    adapters = add_stage_adapters(model, recipe.stages[state["stage"]], path) if state["stage_step"] else None
    with CheckpointTensors(path) as tensors:
        load_weights(model, tensors, "model.")
    if adapters is not None:
        merge_adapters(adapters)
    return model, processor


def add_stage_adapters(
    model: FoveateForConditionalGeneration, stage: StageRecipe, checkpoint: Path | None = None
) -> Adapters | None:
    """Quantises the LLM and adds adapters as the stage says.

    Args:
        checkpoint: from the middle of the stage; its 4-bit weights take the place of the model's.
    """
    if stage.lora is None:
        return None
    if stage.lora.quantize:
        quantize_llm(model)
        if checkpoint is not None:
            with CheckpointTensors(checkpoint) as tensors:
                load_quantised(model, tensors)
    return add_adapters(model, AdapterSettings(**stage.lora.model_dump(exclude={"quantize"})))


def weight_tensors(model: FoveateForConditionalGeneration, world: World) -> dict[str, torch.Tensor]:
    """This rank's share of a model's weights for a checkpoint, as an engine's `state_tensors` names them."""
    named = enumerate(model.named_parameters())
    return {
        f"weight/model.{name}": parameter.detach().cpu().clone()
        for number, (name, parameter) in named
        if number % world.size == world.rank
    }


def _follow_stages(model: FoveateForConditionalGeneration, recipe: Recipe, stages: int) -> None:
    """Leaves the traces of a recipe's first stages in the configuration, which is no weight."""
    for stage in recipe.stages[:stages]:
        if stage.rope_theta:
            set_rope_theta(model, stage.rope_theta)


def load_weights(module: nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Copies a checkpoint's weights `weight/<prefix><name>` into a module.

    Raises:
        CheckpointError: names or shapes are not the module's.
    """
    own = {f"weight/{prefix}{name}": parameter for name, parameter in module.named_parameters()}
    saved = {name for name in tensors if name.startswith(f"weight/{prefix}")}
    if own.keys() != saved:
        odd = sorted(own.keys() ^ saved)
        raise CheckpointError(f"the weights' names are not this model's: {', '.join(odd[:5])}")
    with torch.no_grad():
        for name, parameter in own.items():
            tensor = tensors[name]
            if parameter.shape != tensor.shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(tensor.shape)}; this model's has {tuple(parameter.shape)}"
                )
            parameter.copy_(tensor)


def set_rope_theta(model: FoveateForConditionalGeneration, theta: float) -> None:
    """Sets the LLM's RoPE base, in its configuration and in its rotary embedding (context extension)."""
    for config in (model.config.text_config, model.language_model.config):
        config.rope_parameters = {**config.rope_parameters, "rope_theta": float(theta)}
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(model.language_model.config).to(model.device)


def convert_checkpoint(path: Path, out: Path) -> None:
    """Writes a training checkpoint as a directory that `from_pretrained` loads.

    Raises:
        CheckpointError: it is not a whole checkpoint.
        FileExistsError: `out` holds files.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty; accepted: a new or empty folder")
    if not is_whole(path):
        raise CheckpointError(f"{path}: not whole (a file is missing or differs from manifest.json)")
    model, processor = model_of_checkpoint(path)
    model.save_pretrained(out)
    processor.save_pretrained(out)
