"""A KV cache whose columns lie on the ranks of a sequence group.

A prompt's columns stay where its prefill left them; each later token's goes to rank (its place) % (ranks). Queries of
later tokens are the same on all ranks: each attends to the columns that it holds, and what comes of it is merged by the
log-sum-exp, as between the blocks of Ring Attention (arXiv 2310.01889, section 3.1).
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ...kernels.packed_attention import merge_attention
from ...kernels.varlen_attention import Segments, varlen_attention
from ..cache.base import Query, Seen
from ..cache.dense import Dense, DenseConfig
from ..cache.packed import Packed, PackedConfig
from ..cache.parse import KVSpec, kv_text
from .exchange import note_traffic
from .topology import ParallelError, Topology

SCORES_AT_ONCE = 1 << 24  # bounds the memory where many later tokens come at once (64 MiB in float32)
ACCEPTED = "dense, int8, int4, int2, with any of their fields"


class _Columns(Dense):
    """A rank's share is large, and few are added to it in a turn."""

    growth = 16


class ShardedLayer(CacheLayerMixin):
    """Keys and values of one decoder layer: of the columns that this rank holds.

    Attributes:
        store: keeps the columns.
        places: int64 [columns], where those of the prompt stand in the whole sequence, ascending.
        later: tokens from here on went to one rank after the other.
        length: tokens of the whole sequence.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, topology: Topology, store: Any):
        super().__init__()
        self.topology, self.config = topology, store
        self._clear()

    def _clear(self) -> None:
        self.store = _Columns() if isinstance(self.config, DenseConfig) else self.config.make(0)
        self.places = np.zeros(0, dtype=np.int64)
        self.later = self.length = 0
        self._coming: tuple[np.ndarray, int] | None = None
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None

    def expect(self, places: np.ndarray, tokens: int) -> None:
        """Says that the next pass is a prompt's, which all ranks share.

        Args:
            places: int64, where the first of the columns to come stand in the whole sequence, ascending; the others
                are padding.
            tokens: of the whole sequence.
        """
        self._coming = (places, tokens)

    # As transformers sees it.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes keys and values [1, kv_heads, tokens, head_dim]: a prompt's, of this rank, which it gives back; or
        those of later tokens, the same on all ranks, for which it gives (layer, layer).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._coming is None:
            self._new = (key_states, value_states)
            return self, self
        (self.places, self.length), self._coming = self._coming, None
        self.later = self.length
        self.store.append(key_states[:, :, : len(self.places)], value_states[:, :, : len(self.places)])
        self.store.settle(_unrated)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.is_initialized = False
        self._clear()

    def surplus(self, length: int) -> int:
        """How many of the columns here belong to tokens from `length` on."""
        before = int(np.searchsorted(self.places, min(length, self.later)))
        return self.store.columns - before - len(self._turns(self.later, length))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens of the whole sequence; `ShardedCache.crop` checks them."""
        length = max(self.length + tokens_to_remove, 0)
        if not length:
            self.reset()
        elif tokens_to_remove:
            self.store.crop(self.surplus(length))
            self.length = length
            if length < self.later:
                self.places, self.later = self.places[: np.searchsorted(self.places, length)], length

    def _turns(self, start: int, stop: int) -> range:
        """Those of the tokens from `start` to `stop` whose columns come to this rank."""
        degree = self.topology.degree
        return range(start + (self.topology.sequence_rank - start) % degree, stop, degree)

    # A pass of later tokens.

    def attend(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of the tokens that `update` brought, over all columns of all ranks.

        Args:
            query: [1, heads, tokens, head_dim], the same on all ranks, which all call this.
            scaling: of q·k.

        Returns:
            [1, tokens, heads, head_dim].
        """
        assert self._new is not None
        (keys, values), self._new = self._new, None
        tokens, before = keys.shape[2], self.store.columns
        own = [turn - self.length for turn in self._turns(self.length, self.length + tokens)]
        if own:
            self.store.append(keys[:, :, own], values[:, :, own])
        seen = None  # bool [tokens, own]; all columns are seen by a single token
        if tokens > 1:
            places = torch.arange(tokens, device=query.device)
            seen = places[:, None] >= torch.tensor(own, dtype=torch.int64, device=query.device)
        out, lse = self._attend_here(query, scaling, before, seen)
        if own:
            self.store.settle(_unrated)
        self.length += tokens
        part = torch.cat([out.to(lse.dtype), lse[..., None]], dim=-1)  # [1, heads, tokens, head_dim + 1]
        ranks = self.topology.degree
        note_traffic("decode", part.numel() * (ranks - 1), part)
        parts = [torch.empty_like(part) for _ in range(ranks)]
        dist.all_gather(parts, part, group=self.topology.group)
        merged, _ = merge_attention([one[..., :-1] for one in parts], [one[..., -1] for one in parts])
        return merged.to(query.dtype).transpose(1, 2)

    def _attend_here(
        self, query: torch.Tensor, scaling: float, before: int, seen: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [1, heads, tokens, head_dim] and log-sum-exp [1, heads, tokens] over the columns that are here.

        Args:
            before: columns that are seen by all queries.
            seen: bool [tokens, other columns], which queries see the others; None: all do.
        """
        tokens, store = query.shape[2], self.store
        if isinstance(store, Packed) and store.packed:
            mask = None
            if seen is not None:
                mask = torch.cat([seen.new_ones(tokens, before), seen], dim=1)[None, None]
            return store.attend_part(Query(query, scaling, mask, _of_model))
        keys, values = store.dense()  # [1, kv_heads, columns, head_dim]
        end = before if seen is not None else store.columns
        packed = [states[0].transpose(0, 1) for states in (query, keys[:, :, :end], values[:, :, :end])]
        segments = Segments((0, tokens)), Segments((0, end))
        out, lse = varlen_attention(packed[0], packed[1], packed[2], *segments, False, scaling)
        out, lse = out.transpose(0, 1)[None], lse[None]
        if seen is None or not seen.shape[1]:
            return out, lse
        some, some_lse = _masked_attention(query, keys[:, :, end:], values[:, :, end:], seen, scaling)
        return merge_attention([out.to(some.dtype), some], [lse, some_lse])

    # What is told of it.

    def all_slots(self) -> torch.Tensor:
        """int64 [1, 1, columns], where the columns here stand in the whole sequence."""
        places = np.concatenate([self.places, np.array(self._turns(self.later, self.length), dtype=np.int64)])
        return torch.from_numpy(places)[None, None]

    @property
    def nbytes(self) -> int:
        """Bytes that this rank has allocated for keys and values."""
        return self.store.nbytes


class ShardedCache(Cache):
    """The KV cache of one sequence that the ranks of a group share; within `sequence_parallel` it is what is made.

    Args:
        layers: of the decoder.
        topology: this rank's.
        kv: how each rank keeps its columns: `dense` or a packed store; as they are when None. A rank packs groups of
            its own columns, and has a residual window of its own.

    Attributes:
        spec: as given.

    Raises:
        ParallelError: `kv` is not such.
    """

    def __init__(self, layers: int, topology: Topology, kv: KVSpec | None = None):
        self.spec = kv or KVSpec()
        check_kv(self.spec)
        self.topology = topology
        super().__init__(layers=[ShardedLayer(topology, self.spec.store) for _ in range(layers)])
        self.layers: Any

    def expect(self, places: np.ndarray, tokens: int) -> None:
        """See `ShardedLayer.expect`."""
        for layer in self.layers:
            layer.expect(places, tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens from all layers, or from none; all ranks call it.

        Raises:
            RuntimeError: on some rank something that would have to come back is packed.
        """
        length = max(self.get_seq_length() + tokens_to_remove, 0)
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}; accepted: minus the number of tokens")
        if length and tokens_to_remove and not isinstance(self.spec.store, DenseConfig):
            fits = all(layer.surplus(length) <= layer.store.croppable for layer in self.layers)
            agreed = torch.tensor([fits], dtype=torch.int32, device=self.layers[0].device)
            dist.all_reduce(agreed, dist.ReduceOp.MIN, group=self.topology.group)
            if not agreed:
                raise RuntimeError(
                    f"{-tokens_to_remove} tokens were to be removed from the KV cache, but some are packed; accepted: "
                    "those after the packed ones"
                )
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        """Bytes that this rank has allocated for keys and values."""
        return sum(layer.nbytes for layer in self.layers)


class LaterTokens:
    """What the keyword `sequence` of a decoder's call holds when a `ShardedCache` is continued; see `Attending`."""

    def attend(self, module: nn.Module, query: torch.Tensor, key: Any, value: Any, scaling: float) -> torch.Tensor:
        """Here key and value are the cache's layer."""
        attended: torch.Tensor = key.attend(query, scaling)
        return attended


def check_kv(spec: KVSpec) -> None:
    """Raises ParallelError where keys and values can't be kept so by several ranks, each for its own columns."""
    others = [name for name in ("policy", "selector", "duo") if getattr(spec, name) is not None]
    if others or not isinstance(spec.store, DenseConfig | PackedConfig):
        raise ParallelError(
            f"kv is {kv_text(spec)!r}, which chooses by the whole sequence; accepted under sequence parallelism: "
            f"{ACCEPTED}"
        )


def _masked_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `packed_attention`, of a batch of one over columns [1, kv_heads, columns, head_dim], few at a time.

    Args:
        seen: bool [queries, columns].
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads, columns = query.shape[1], keys.shape[2]
    groups = heads // keys.shape[1]
    keys, values = (states.to(dtype).repeat_interleave(groups, dim=1) for states in (keys, values))
    outs, lses = [], []
    step = max(1, SCORES_AT_ONCE // (heads * columns))
    for some, mask in zip(query.split(step, dim=2), seen.split(step), strict=True):
        scores = (some.to(dtype) @ keys.transpose(2, 3) * scaling).masked_fill(~mask, -torch.inf)
        lse = scores.logsumexp(-1)
        probabilities = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
        outs.append(probabilities @ values)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _unrated() -> Seen:
    raise AssertionError("stores that rate columns are refused")


def _of_model(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the model's own attention does not give a log-sum-exp")
