"""The KV caches of transformers that ours are measured against."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import DynamicCache, PreTrainedConfig, QuantizedCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import is_hqq_available, is_optimum_quanto_available

BASELINES = ("dynamic", "quantized", "preallocated")


class PreallocatedLayer(DynamicLayer):
    """Keys and values as they are, in buffers with room into which new ones are written.

    Args:
        room: tokens after the prompt.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, new = self.get_seq_length(), key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, head_dim = key_states.shape
            self.buffers = key_states.new_empty(2, batch, heads, new + self.room, head_dim)
        self.buffers[0, :, :, start : start + new] = key_states
        self.buffers[1, :, :, start : start + new] = value_states
        self.keys, self.values = self.buffers[:, :, :, : start + new]
        return self.keys, self.values


def quantized_backend() -> str | None:
    """What transformers' QuantizedCache can work with here."""
    if is_optimum_quanto_available():
        return "quanto"
    return "hqq" if is_hqq_available() else None


def baseline(name: str, config: PreTrainedConfig, room: int) -> Cache:
    """An empty cache: DynamicCache, QuantizedCache with 4 bits and its defaults, or preallocated dense.

    Args:
        name: of BASELINES.
        room: tokens after the prompt, for which memory is allocated with it.

    Raises:
        ValueError: there is no backend for QuantizedCache.
    """
    config = config.get_text_config(decoder=True)
    if name == "dynamic":
        return DynamicCache(config=config)
    if name == "preallocated":
        return Cache(layers=[PreallocatedLayer(room) for _ in range(config.num_hidden_layers)])
    backend = quantized_backend()
    if backend is None:
        raise ValueError("QuantizedCache has no backend; accepted: optimum-quanto or hqq installed")
    axes = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}  # as its guide advises
    return QuantizedCache(backend, config, nbits=4, **axes)


def held_bytes(cache: Cache) -> int:
    """Bytes that a baseline's layers hold."""
    storages = [tensor.untyped_storage() for layer in cache.layers for tensor in _tensors(tuple(vars(layer).values()))]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    """Plain tensors in an attribute of a layer, those in quantised ones too."""
    if isinstance(held, torch.Tensor) and is_traceable_wrapper_subclass(held):
        held = tuple(getattr(held, name) for name in held.__tensor_flatten__()[0])
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, (tuple, dict)):
        for part in held.values() if isinstance(held, dict) else held:
            yield from _tensors(part)
