"""A layer of a KV cache that computes its own attention.

`update()` gives the layer itself in place of keys and values, and names our attention function as the model's, until
that function has run once: it calls `KVLayer.attend`. So keys and values may be kept in any form, and no modeling file
is touched.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..decoder import attention_function
from .base import Eviction, Policy, Query, Seen, Selector, Store
from .slots import Slots

PREFIX = "foveate_kv:"  # and the name of the model's own attention: names the function that runs in its place


class Attention:
    """The attention of a decoder: the name of its function stands in the configuration that all layers read.

    Attributes:
        config: that configuration.
        frequencies: float [rotary width / 2], of RoPE, in radians a position; None where the decoder has none.
        visual: bool [batch, length], which tokens of the whole sequence are visual; None where nobody told.
    """

    def __init__(self, config: Any, frequencies: torch.Tensor | None = None):
        self.config, self.frequencies = config, frequencies
        self.visual: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict) -> "Attention":
        copied = Attention(self.config, self.frequencies)  # which stays the model's
        copied.visual = self.visual
        return copied

    def take(self) -> None:
        """Makes the next attention call ours."""
        own = self.config._attn_implementation or "eager"
        if own.startswith(PREFIX):
            return
        name = PREFIX + own
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, partial(_attention, own))
            if own in ALL_MASK_ATTENTION_FUNCTIONS:  # should a pass be interrupted just now, the next one finds a mask
                ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
        _name_attention(self.config, name)


def _name_attention(config: Any, name: str) -> None:
    """Sets the attention's name: as the property does, without its check of the whole configuration (50 us)."""
    if "_attn_implementation_internal" in config.__dict__:
        config.__dict__["_attn_implementation_internal"] = name
    else:
        config._attn_implementation = name


def _attention(
    own: str, module: Any, query: torch.Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function as transformers calls it, once; then the model's own is back."""
    _name_attention(module.config, own)  # first: flash attention looks at the name
    if not hasattr(key, "attend"):
        return attention_function(module, own)(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions is True; accepted with this KV cache: False")
    scaling = kwargs.get("scaling")
    kwargs["scaling"] = query.shape[-1] ** -0.5 if scaling is None else scaling
    states = key.attend(module, query, attention_mask, own, kwargs)
    return states.transpose(1, 2).contiguous(), None


class KVLayer(CacheLayerMixin):
    """Keys and values of one decoder layer: what keeps them, what evicts some, what chooses those that are read.

    Attributes:
        store: keeps the columns.
        policy: evicts some; None: nothing is evicted.
        selector: chooses what a decode step reads; None: all.
        slots: which tokens the columns hold.
        length: tokens of the whole sequence, padding and what was evicted included.
        show: called once with (queries, keys, scaling, slots before this pass) of the next pass, before anything of it
            is evicted or packed; for pruning methods that score by attention.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        number: int,
        attention: Attention,
        make: Callable[[], Store],
        policy: Policy | None = None,
        selector: Selector | None = None,
    ):
        super().__init__()
        self.number, self.attention, self.make = number, attention, make
        self.policy, self.selector = policy, selector
        self.show: Callable[..., None] | None = None
        self._clear()

    def _clear(self) -> None:
        self.store = self.make()
        self.slots = Slots()
        self.length = 0
        self.evicted_at = 0  # length of the sequence when something was last evicted
        self.batch = 0
        self.scores: torch.Tensor | None = None
        self.memory: dict[str, torch.Tensor] = {}
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None
        self._coming: tuple[torch.Tensor, int] | None = None
        self._stale = 0  # decode steps that made holes since the last compaction

    # As transformers sees it.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.batch = key_states.dtype, key_states.device, len(key_states)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes new keys and values [batch, kv_heads, tokens, head_dim]; gives (layer, layer) for the attention."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._new = (key_states, value_states)
        self.attention.take()
        return self, self

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.is_initialized = False
        self._clear()

    def offload(self) -> None:
        raise ValueError("this KV cache can't be offloaded; accepted: DynamicCache(offloading=True)")

    def prefetch(self) -> None:
        self.offload()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if not self.length:
            return
        indices = indices.to(self.device)
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.store.rows(indices)
        self.slots.rows(indices)
        if self.scores is not None:
            self.scores = self.scores[indices]
        self.memory = {name: held[indices] for name, held in self.memory.items()}
        self.batch = len(indices)

    def check_crop(self, tokens: int) -> int:
        """How many columns go with the last tokens of the sequence.

        Raises:
            RuntimeError: what would be left is not what the shorter sequence had: something was evicted or packed.
        """
        left = max(self.length - tokens, 0)
        if not left or not tokens:
            return self.store.columns if tokens else 0
        columns = self.slots.after(left)
        if left < self.evicted_at:
            raise RuntimeError(
                f"{tokens} tokens were to be removed from the KV cache, which evicted some when it had "
                f"{self.evicted_at} of its {self.length}; accepted: at most {self.length - self.evicted_at}"
            )
        if columns > self.store.croppable:
            raise RuntimeError(
                f"{columns} columns were to be removed from a KV cache, of which the last {self.store.croppable} are "
                "not packed; accepted: at most those"
            )
        return columns

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens of the whole sequence."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}; accepted: minus the number of tokens")
        columns = self.check_crop(-tokens_to_remove)
        self._coming = None
        if -tokens_to_remove >= self.length:
            self.reset()
        elif tokens_to_remove:
            self.store.crop(columns)
            self.length += tokens_to_remove
            self.slots.crop(columns, self.length)
            if self.scores is not None:
                self.scores = self.scores[:, :, : self.slots.columns]

    def all_slots(self) -> torch.Tensor:
        """int64 [batch, 1 | kv_heads, columns], -1 at holes."""
        return self.slots.all(self.batch, self.device)

    # A pass.

    def expect(self, slots: torch.Tensor, tokens: int) -> None:
        """Says which tokens come next, where some were dropped before this layer.

        Args:
            slots: int64 [batch, columns], of the columns to come, -1 at holes.
            tokens: by which the whole sequence grows.
        """
        self._coming = (slots, tokens)

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        mask: Any,
        own: str,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Attention over what is stored and what `update` brought; then evicts, then packs.

        Args:
            module: the model's attention module.
            query: [batch, heads, queries, head_dim].
            mask: as transformers made it for the model's own attention, over the whole sequence.
            own: name of that attention.
            options: its keyword arguments.

        Returns:
            [batch, heads, queries, head_dim].
        """
        assert self._new is not None
        (keys, values), self._new = self._new, None
        new, before, scaling = keys.shape[2], self.store.columns, options["scaling"]
        had = self.all_slots() if self.show is not None else None
        self._append(new, mask)
        self.store.append(keys, values)
        if self.show is not None:
            show, self.show = self.show, None
            show(query, self.store.dense()[0] if before else keys, scaling, had)
        restricted = self._restrict(new, query.device) if new > 1 and self.policy is not None else None
        # Whether the mask that transformers made is one over the columns that there are.
        fits = not self.slots.are_moved and self.store.columns == self.length and restricted is None
        seen = None
        if before or not fits:
            seen = self.slots.seen(new, self.batch, query.device)
            if restricted is not None:
                seen = restricted if seen is None else seen & restricted

        def by_model(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            attention = attention_function(module, own)
            given: Any = mask
            if not fits:
                if not self.slots.has_holes and restricted is None and new in (1, keys.shape[2]):
                    given = None
                elif "flash" in own and self.slots.are_shared and restricted is None:
                    given = self.slots.all(self.batch, query.device)[:, 0] >= 0
                else:
                    assert seen is not None
                    heads = query.shape[1] // seen.shape[1] if seen.shape[1] > 1 else 1
                    given = seen.repeat_interleave(heads, dim=1)
                    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return attention(module, query, keys, values, given, **options)[0].transpose(1, 2)

        if not before:
            states = by_model(keys, values)
        else:
            asked = Query(query, scaling, seen, by_model)
            if new == 1 and self.selector is not None:
                states = self.selector.attend(self.store, asked, self.number)
            else:
                states = self.store.attend(asked)
        self._evict(query, scaling, new)
        self.store.settle(lambda: self._seen(query, scaling, new))
        return states

    def _append(self, new: int, mask: Any) -> None:
        """Notes the slots of the columns to come."""
        if self._coming is not None:
            (dropped, tokens), self._coming = self._coming, None
            self.slots.append(self.length, new, dropped)
            self.slots.has_holes |= bool((dropped < 0).any())
            self.slots.are_moved = True
            self.length += tokens
            return
        real = _real(mask, new) if new > 1 or not self.length else None
        slots = None
        if real is not None and not bool(real.all()):
            order = torch.arange(self.length, self.length + new, device=real.device)
            slots = torch.where(real, order, -1).expand(self.batch, -1)
            self.slots.has_holes = True
        self.slots.append(self.length, new, slots)
        self.length += new

    def _restrict(self, new: int, device: torch.device) -> torch.Tensor | None:
        assert self.policy is not None
        if type(self.policy).visible is Policy.visible:
            return None
        slots = self.slots.all(self.batch, device)
        return self.policy.visible(slots[:, :, -new:, None], slots[:, :, None])

    def _evict(self, query: torch.Tensor, scaling: float, new: int) -> None:
        policy = self.policy
        if policy is None or (new == 1 and not policy.evicts_in_decode):
            return
        decided = policy.evict(self._seen(query, scaling, new))
        if decided is None:
            decided = Eviction()
        self.scores = decided.scores if decided.scores is not None else self.scores
        if decided.keys is not None and decided.values is not None:
            self.store.replace(decided.start, decided.keys, decided.values)
        if decided.keep is not None:
            self.evicted_at = self.length
            self.slots.mark(decided.keep, decided.start)
            self._stale += 1
        begins = new == self.store.columns and policy.sinks > 0
        if (decided.keep is not None and new > 1) or begins or self._stale >= STALE:
            self._compact(0 if begins else decided.start, policy.sinks if begins else 0)

    def _compact(self, start: int, sinks: int) -> None:
        self._stale = 0
        index = self.slots.compact(start, sinks)
        if index is None:
            return
        self.store.select(index, start)
        if self.scores is not None:
            gathered = self.scores.gather(2, index.expand(-1, self.scores.shape[1], -1))
            self.scores = torch.cat([self.scores[:, :, :start], gathered], dim=2)

    def _seen(self, query: torch.Tensor, scaling: float, new: int) -> Seen:
        return Seen(
            query=query,
            scaling=scaling,
            new=new,
            store=self.store,
            slots=self.all_slots(),
            visual=self.attention.visual,
            scores=self.scores,
            layer=self.number,
            frequencies=self.attention.frequencies,
            memory=self.memory,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated for keys and values."""
        return self.store.nbytes


STALE = 64  # decode steps after which holes are taken out


def _real(mask: Any, new: int) -> torch.Tensor | None:
    """Which of the new tokens are no padding, bool [batch, new], from a mask as transformers makes it; None: all."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"the attention mask is a {type(mask).__name__}; accepted by this KV cache: attn_implementation sdpa, "
            "eager, flash attention"
        )
    if mask.ndim == 2:
        return mask[:, -new:].bool()
    row = mask[:, 0, -1, -new:]  # the last token sees all that there is
    return row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
