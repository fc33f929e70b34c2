"""A recipe's model and processor: from a checkpoint, from pretrained parts, or from scratch."""

from typing import Any

import torch
from transformers import AutoProcessor

from ..data.glyphs import CHAT_TEMPLATE, FRAME_SEPARATOR, glyph_tokenizer
from ..vlm.config import FoveateConfig
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.processor import FoveateProcessor, add_media_tokens
from .recipe import ModelRecipe


def build_model(recipe: ModelRecipe) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    """Loads or makes what the recipe's `model` names, in fp32.

    From scratch the tokenizer is the embedded data's own (`data/glyphs.py`), and the LLM's vocabulary is its size.
    """
    loading: dict[str, Any] = {"dtype": "float32", "attn_implementation": recipe.attn_implementation}
    if recipe.path is not None:
        model = FoveateForConditionalGeneration.from_pretrained(recipe.path, **loading)
        return model, AutoProcessor.from_pretrained(recipe.path)
    if isinstance(recipe.vision, str) and isinstance(recipe.text, str):
        options: dict[str, Any] = {"projector": recipe.projector, "vision_feature_layer": recipe.vision_feature_layer}
        model = FoveateForConditionalGeneration.from_parts(recipe.vision, recipe.text, **loading, **options)
        return model, FoveateProcessor.from_parts(recipe.vision, recipe.text, model.config, **recipe.processor)
    assert isinstance(recipe.vision, dict) and isinstance(recipe.text, dict)  # ModelRecipe has checked it
    tokenizer = glyph_tokenizer()
    image_token_id, video_token_id = add_media_tokens(tokenizer)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = FoveateConfig(
        vision_config=recipe.vision,
        text_config=recipe.text | tokens | {"vocab_size": len(tokenizer)},
        projector=recipe.projector,
        vision_feature_layer=recipe.vision_feature_layer,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
    )
    processor = FoveateProcessor(
        tokenizer,
        patch_size=config.vision_config.patch_size,
        downsample_factor=config.downsample_factor,
        **({"chat_template": CHAT_TEMPLATE, "frame_separator": FRAME_SEPARATOR} | recipe.processor),
    )
    model = FoveateForConditionalGeneration._from_config(config, attn_implementation=recipe.attn_implementation)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(recipe.embedding_scale)
    return model, processor
