"""DuoAttention: retrieval heads keep every token, streaming heads the first ones and a window of the latest.

DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (ICLR 2025),
https://arxiv.org/abs/2410.10819, section 2.3. Which heads are which is found by `foveate duo` (section 2.2).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .base import Store
from .dense import Dense
from .layer import Attention, KVLayer
from .streaming import StreamingLLM


@dataclass(frozen=True)
class DuoAttention:
    """Which KV heads are retrieval heads, and what streaming heads keep.

    Attributes:
        heads: file that `foveate duo` has written.
        sink: first tokens that a streaming head keeps; None: as many as the heads were found with.
        window: latest ones, the token itself among them; None likewise.
        ratio: fraction of the KV heads that are retrieval heads, those of the largest gates; None: the file's own
            choice.

    Raises:
        ValueError: there is no such file, or a field is out of range.
    """

    heads: str
    sink: int | None = None
    window: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}; accepted: 0 to 1")
        _ = self.streaming  # reads and checks the file

    @cached_property
    def found(self) -> dict[str, Any]:
        """What the file holds: `gates` [layers][kv_heads], `threshold`, `sink`, `window`."""
        try:
            found = json.loads(Path(self.heads).read_text())
            return {name: found[name] for name in ("gates", "threshold", "sink", "window")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"heads is {self.heads!r}; accepted: a file that foveate duo has written") from error

    @cached_property
    def streaming(self) -> StreamingLLM:
        """What streaming heads keep, and see of a prompt; tokens have their positions in the text."""
        sink = self.found["sink"] if self.sink is None else self.sink
        window = self.found["window"] if self.window is None else self.window
        return StreamingLLM(sink, window, reindex=False, windowed=True)

    @cached_property
    def retrieval(self) -> torch.Tensor:
        """Which are retrieval heads, bool [layers, kv_heads]."""
        gates = torch.tensor(self.found["gates"])
        return gates > self.found["threshold"] if self.ratio is None else largest(gates, self.ratio)

    def check(self, decoder: Any) -> None:
        """Raises ValueError where the file is not about such a decoder."""
        shape = (len(decoder.layers), decoder.config.num_key_value_heads)
        if self.retrieval.shape != shape:
            layers, heads = self.retrieval.shape
            raise ValueError(
                f"{self.heads} is about {layers} layers of {heads} KV heads; accepted: {shape[0]} layers of {shape[1]}"
            )

    def layer(self, number: int, attention: Attention, make: Callable[[], Store]) -> "SplitLayer":
        """The cache's layer of that number; `make` gives the store of its retrieval heads."""
        return SplitLayer(
            self.retrieval[number],
            KVLayer(number, attention, make),
            KVLayer(number, attention, Dense, self.streaming),
        )


def largest(gates: torch.Tensor, ratio: float) -> torch.Tensor:
    """Which gates are among the fraction of the largest ones; equal ones: the first."""
    kept = gates.flatten().argsort(descending=True, stable=True)[: round(ratio * gates.numel())]
    return torch.zeros(gates.numel(), dtype=torch.bool).index_fill(0, kept, True).view_as(gates)


class SplitLayer(CacheLayerMixin):
    """A layer whose KV heads are kept by two: `full` has the retrieval heads, `streaming` the others.

    Either may have none. What holds for all heads is asked of the first that has some.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, retrieval: torch.Tensor, full: KVLayer, streaming: KVLayer):
        """`retrieval`: bool [kv_heads]."""
        super().__init__()
        groups = ((retrieval.nonzero()[:, 0], full), ((~retrieval).nonzero()[:, 0], streaming))
        self.parts = [(heads, part) for heads, part in groups if len(heads)]
        self.kv_heads = len(retrieval)

    @property
    def layers(self) -> list[KVLayer]:
        return [part for _, part in self.parts]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.parts = [(heads.to(self.device), part) for heads, part in self.parts]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes new keys and values [batch, kv_heads, tokens, head_dim]; gives (layer, layer) for the attention."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for heads, part in self.parts:
            part.update(key_states[:, heads], value_states[:, heads])
        return self, self

    def attend(self, module: Any, query: torch.Tensor, mask: Any, own: str, options: dict[str, Any]) -> torch.Tensor:
        """As `KVLayer.attend`: each KV head with the query heads of its group."""
        query = query.unflatten(1, (self.kv_heads, -1))  # [batch, kv_heads, group, queries, head_dim]
        states = torch.empty_like(query)
        for heads, part in self.parts:
            attended = part.attend(module, query[:, heads].flatten(1, 2), mask, own, options)
            states[:, heads] = attended.unflatten(1, (len(heads), -1))
        return states.flatten(1, 2)

    def expect(self, slots: torch.Tensor, tokens: int) -> None:
        """As `KVLayer.expect`."""
        for layer in self.layers:
            layer.expect(slots, tokens)

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.layers[0].length

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def check_crop(self, tokens: int) -> None:
        """Raises RuntimeError where the last tokens can't be removed."""
        for layer in self.layers:
            layer.check_crop(tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens."""
        self.check_crop(-tokens_to_remove)
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for layer in self.layers:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.layers:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for layer in self.layers:
            layer.batch_select_indices(indices)

    def offload(self) -> None:
        self.layers[0].offload()

    def prefetch(self) -> None:
        self.layers[0].prefetch()

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated for keys and values."""
        return sum(layer.nbytes for layer in self.layers)
