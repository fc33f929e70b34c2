"""The decoder of a model: its text model, of which KV caches and pruning know the layers and the attention."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def decoder_of(model: PreTrainedModel) -> Any:
    """The text model that runs the decoder layers.

    Raises:
        ValueError: its layers are not such as work on a KV cache of keys and values with RoPE, all of full attention.
    """
    kind = model.config.model_type
    decoder: Any = model.get_decoder()
    layers: Any = getattr(decoder, "layers", None)
    fits = (
        isinstance(layers, nn.ModuleList)
        and hasattr(decoder, "rotary_emb")
        and all(hasattr(layer, name) for layer in layers for name in ("self_attn", "input_layernorm"))
        and all("position_embeddings" in inspect.signature(layer.forward).parameters for layer in layers)
        and all(hasattr(layer.self_attn, "config") for layer in layers)
    )
    if not fits:
        raise ValueError(
            f"the decoder of model type {kind!r} ({type(decoder).__name__}) is not one of layers with rotary "
            "positions that are given to them; accepted: decoders such as Llama's, Qwen2's, Qwen3's"
        )
    cache = DynamicCache(config=decoder.config)
    odd = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
    if odd:
        raise ValueError(
            f"layers of model type {kind!r} keep their states as {', '.join(sorted(odd))}; accepted: full attention"
        )
    return decoder


def attention_config(decoder: Any) -> Any:
    """The configuration that the layers' attention reads, the name of its function among it."""
    return decoder.layers[0].self_attn.config


def attention_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function of that name, as the module would find it."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[arg-type]
