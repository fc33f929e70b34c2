"""Configurations of public parts, so that a recipe which names them can be planned where they are not at hand.

Of each part's `config.json` on Hugging Face (the address is https://huggingface.co/NAME/blob/main/config.json), what
decides its shape, and of an LLM how many tokens its tokenizer has: media tokens are added behind them.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..vlm.model import tower_config
from .recipe import RecipeError

MEDIA_TOKENS = 2  # <image> and <video>, see `processor.add_media_tokens`


def _siglip(image_size: int) -> dict[str, Any]:
    """SigLIP's shape-optimised tower of 400 million parameters (arXiv 2303.15343; 2305.13035)."""
    return {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "patch_size": 14, "image_size": image_size, "vision_use_head": False,
    }  # fmt: skip


def _qwen2(hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    """Qwen2 and Qwen2.5 (arXiv 2407.10671, table 1; 2412.15115, table 1)."""
    return {
        "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 28,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": tied,
    }  # fmt: skip


def _llama(hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 32,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    } | others  # fmt: skip


TOWERS = {
    "google/siglip-so400m-patch14-384": _siglip(384),
    "Efficient-Large-Model/paligemma-siglip-so400m-patch14-448": _siglip(448),
}

# name -> configuration, tokens of the tokenizer
LLMS = {
    "princeton-nlp/Sheared-LLaMA-2.7B": (_llama(2560, 6912, 20, 20, 32000, max_position_embeddings=4096), 32000),
    "meta-llama/Llama-2-7b-hf": (_llama(4096, 11008, 32, 32, 32000, max_position_embeddings=4096), 32000),
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        _llama(4096, 14336, 32, 8, 128256, max_position_embeddings=8192, rope_theta=5e5),
        128256,
    ),
    "Qwen/Qwen2-1.5B-Instruct": (_qwen2(1536, 8960, 12, 2, 151936, True), 151646),
    "Qwen/Qwen2-7B-Instruct": (_qwen2(3584, 18944, 28, 4, 152064, False), 151646),
    "Qwen/Qwen2.5-1.5B-Instruct": (_qwen2(1536, 8960, 12, 2, 151936, True), 151665),
    "Qwen/Qwen2.5-7B-Instruct": (_qwen2(3584, 18944, 28, 4, 152064, False), 151665),
}


def known_tower(name: str) -> PreTrainedConfig:
    """A tower's configuration: from the folder or the hub's cache, else from `TOWERS`, else from the hub.

    Raises:
        RecipeError: it is in none of them.
    """
    try:
        return tower_config(name, local_files_only=True)
    except (OSError, ValueError):
        if name in TOWERS:
            return AutoConfig.for_model(**TOWERS[name])
    try:
        return tower_config(name)
    except (OSError, ValueError) as error:
        raise _unknown("model.vision", name, list(TOWERS)) from error


def known_llm(name: str) -> PreTrainedConfig:
    """An LLM's configuration with room for the media tokens; see `known_tower`. From a folder, cache or hub its
    vocabulary is taken to have that room.

    Raises:
        RecipeError: it is in none of them.
    """
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        if name in LLMS:
            config, tokens = LLMS[name]
            return AutoConfig.for_model(**config | {"vocab_size": max(config["vocab_size"], tokens + MEDIA_TOKENS)})
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _unknown("model.text", name, list(LLMS)) from error


def _unknown(field: str, name: str, known: list[str]) -> RecipeError:
    return RecipeError(
        f"{field} is {name!r}, whose configuration is in no folder, not in the hub's cache and could not be fetched; "
        f"accepted without a network: a folder, or one of {', '.join(known)}"
    )
