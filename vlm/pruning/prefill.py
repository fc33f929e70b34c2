"""One forward pass of a decoder, in which columns are dropped between its layers."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..cache.layer import KVLayer
from ..cache.split import SplitLayer
from ..decoder import attention_function
from .architecture import Architecture
from .base import Prefill, Pruner, Selection, Sight, Stage
from .scores import RaterAttention
from .slots import SlotLayer
from .stream import Stream, take

SCORES = "foveate_scores"  # names the attention function that shows q and k, while a layer runs that rates


class PrefillPass:
    """Hooks on the decoder's layers, from `install` to `remove`.

    Before its layer each hook drops what is to be dropped, gives the layer positions and a mask that fit what is left,
    and tells its cache layer which tokens come. In decode, with nothing to drop, it masks the holes.
    """

    def __init__(
        self,
        architecture: Architecture,
        stages: Sequence[tuple[int, int, Pruner]],
        reindexes_first: bool | None,
        generators: dict[int, torch.Generator],
        cache: Cache,
        visual: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ):
        """Begins a pass.

        Args:
            stages: (layer, the method's stage, method), ascending.
            reindexes_first: whether positions are re-indexed where a method marked features as dropped (NaN) before the
                LLM; None where no such method is in use.
            generators: by the id of the method.
            cache: KV cache, which gets layers of `slots.py`.
            visual: bool [batch, tokens].
            attention_mask: [batch, cached + new tokens], 0 at padding.

        Raises:
            ValueError: the mask or the cache is not one that works; see `reduce`.
        """
        self.architecture, self.cache, self.generators = architecture, cache, generators
        self.past: int = cache.get_seq_length()
        batch, self.tokens = visual.shape
        valid = torch.ones(batch, self.past + self.tokens, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.shape != valid.shape:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; accepted while visual tokens are "
                    f"dropped: {tuple(valid.shape)}, a number for each token, those in the KV cache first"
                )
            valid = attention_mask.bool().cpu()
        new = valid[:, self.past :]
        if not bool(new[:, -1].all()) or bool((new[:, :-1] & ~new[:, 1:]).any()):
            raise ValueError("attention_mask has padding behind tokens; accepted: padding to the left")
        self.stream = Stream(visual.cpu(), new, visual.device)
        self.device = visual.device
        self.valid_past = valid[:, : self.past]
        self.padded = not bool(valid.all())
        self.text, self.given = self.stream.text_counts, self.stream.visual_counts
        self.totals = self.given
        drops = any(self.given)
        self.todo = list(stages) if drops else []
        self.reindexes_first = reindexes_first if drops else None
        self.counts: list[tuple[int, ...]] = []
        self.done: list[Stage] = []
        self.positions: torch.Tensor | None = None  # [..., batch, columns], as the decoder's RoPE takes them
        self.rotary: tuple[torch.Tensor, torch.Tensor] | None = None  # cos and sin, once columns were dropped
        self.raters: dict[int, list[torch.Tensor]] = {}  # by the id of the method: each sample's rating text tokens
        # Of the layer that rates: q, k, scaling, and which cached columns are no holes, [batch, 1 | heads, past].
        self.seen: tuple[torch.Tensor, torch.Tensor, float, torch.Tensor] | None = None
        self.slots_after: dict[tuple[int, int, int], tuple[torch.Tensor, ...]] = {}
        self.masks: dict[int, Any] = {}
        self.hooks: list[Any] = []
        self.hidden_name: str | None = None
        first = 0 if self.reindexes_first is not None else min((layer for layer, *_ in self.todo), default=None)
        self._take_over(first)

    def _take_over(self, first: int | None) -> None:
        """Makes the cache's layers from `first` on such that can hold fewer columns."""
        layers: Any = self.cache.layers
        while len(layers) < len(self.architecture.layers):
            layers.append(DynamicLayer())
        for index in range(len(layers) if first is None else first, len(layers)):
            if type(layers[index]) is DynamicLayer:
                layers[index] = SlotLayer.from_dynamic(layers[index], self.valid_past.to(self.device))
            if isinstance(layers[index], SlotLayer):
                layers[index].padded |= self.padded

    def install(self) -> None:
        decoder: Any = self.architecture.decoder
        self.hooks.append(decoder.rotary_emb.register_forward_pre_hook(self._note_positions, with_kwargs=True))
        for index, layer in enumerate(self.architecture.layers):
            hook: Callable[..., Any] = partial(self._before_layer, index)
            self.hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self._hide_attention()

    def record(self) -> Prefill:
        past = tuple(self.valid_past.sum(1).tolist())
        return Prefill(past, self.text, self.given, tuple(self.counts), tuple(self.done))

    def _note_positions(self, rotary: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.positions is None:
            positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
            assert positions is not None
            self.positions = positions.expand(*positions.shape[:-2], len(self.stream.rows), -1)

    def _before_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        hidden: torch.Tensor = args[0] if args else kwargs.pop("hidden_states")
        if index == 0:
            hidden = self._before_first(hidden)
        if self.todo and self.todo[0][0] == index:
            _, stage, method = self.todo.pop(0)
            hidden = self._prune(index, stage, method, hidden, kwargs)
        self.counts.append(self.stream.visual_counts)
        if self.rotary is not None:
            kwargs["position_embeddings"] = tuple(part.to(hidden.device) for part in self.rotary)
            if kwargs.get("position_ids") is not None:  # flash attention alone reads them, to find packed documents
                kwargs["position_ids"] = torch.arange(hidden.shape[1], device=hidden.device)[None]
        kept: Any = self.cache.layers[index]
        if isinstance(kept, KVLayer | SplitLayer):
            if self.rotary is not None:  # columns were dropped; it makes its own masks
                kept.expect(torch.where(self.stream.slots < 0, -1, self.stream.slots + self.past), self.tokens)
        elif isinstance(kept, SlotLayer):
            slots = self._slots_after(kept)
            kwargs["attention_mask"] = self._mask(kept, slots, hidden)
            if self.tokens > 1:
                kept.expect(slots, self.tokens, kept.has_holes or self.stream.has_holes)
        if self.todo and self.todo[0][0] == index + 1 and self.todo[0][2].scored_by == "previous":
            if isinstance(kept, KVLayer):
                kept.show = self._note
            else:
                self._show_attention(index, stop=False)
        return (hidden, *args[1:]), kwargs

    # What is left, for the layer to come.

    def _slots_after(self, kept: SlotLayer) -> torch.Tensor:
        """[batch, columns] of what the cache layer holds after this pass; one tensor for layers that hold the same."""
        key = (id(kept.slots) if kept.columns else 0, kept.appended, id(self.stream.slots))
        if key not in self.slots_after:
            new = torch.where(self.stream.slots < 0, -1, self.stream.slots + self.past)
            slots = torch.cat([kept.all_slots().to(new.device), new], dim=1) if kept.columns else new
            self.slots_after[key] = (slots, kept.slots, self.stream.slots)  # holds on to all, so that ids stay theirs
        return self.slots_after[key][0]

    def _mask(self, kept: SlotLayer, slots: torch.Tensor, hidden: torch.Tensor) -> Any:
        """As transformers makes it for the model's attention, over the columns that are there."""
        if id(slots) not in self.masks:
            has_holes = kept.has_holes or self.stream.has_holes
            sizes: Any = _Sizes(slots.shape[1] - self.stream.slots.shape[1])
            self.masks[id(slots)] = create_causal_mask(
                config=self.architecture.config,
                inputs_embeds=hidden,
                attention_mask=(slots >= 0) if has_holes else None,
                past_key_values=sizes,
                position_ids=None,
            )
        mask = self.masks[id(slots)]
        return mask.to(hidden.device) if isinstance(mask, torch.Tensor) else mask

    # Dropping.

    def _before_first(self, hidden: torch.Tensor) -> torch.Tensor:
        """Drops what a method marked before the LLM; then in-LLM methods choose their raters."""
        if self.reindexes_first is not None:
            kept = [(~hidden[b, row.visual, 0].isnan()).nonzero()[:, 0] for b, row in enumerate(self.stream.rows)]
            if any(len(some) < len(row.visual) for some, row in zip(kept, self.stream.rows, strict=True)):
                hidden = self._apply(0, [Selection(some) for some in kept], hidden, self.reindexes_first)
            if self.text and bool(hidden[:, -1, 0].isnan().any()):
                raise ValueError("the prompt ends with a visual token that was dropped; accepted: text at its end")
        self.totals = self.stream.visual_counts
        for method in {id(method): method for *_, method in self.todo}.values():
            if type(method).raters is not Pruner.raters:
                self.raters[id(method)] = [self._raters(method, hidden[b], b) for b in range(len(hidden))]
        return hidden

    def _raters(self, method: Pruner, embeds: torch.Tensor, sample: int) -> torch.Tensor:
        """[raters] int64, which of the sample's text tokens rate."""
        row, after = self.stream.rows[sample], self.stream.text_after[sample]
        last = torch.tensor([len(row.text) - 1], device=embeds.device)
        if not len(row.visual):
            return last
        chosen = method.raters(embeds[row.visual], embeds[row.text[len(row.text) - after :]])
        rating = last if chosen is None else chosen.nonzero()[:, 0] + len(row.text) - after
        return rating if len(rating) else last

    def _prune(
        self, index: int, stage: int, method: Pruner, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        rotary = self.rotary if self.rotary is not None else kwargs["position_embeddings"]
        rotary = (rotary[0].to(hidden.device), rotary[1].to(hidden.device))
        if method.scored_by == "own":
            self._probe(index, hidden, rotary)
        selections: list[Selection | None] = []
        for sample, row in enumerate(self.stream.rows):
            if not len(row.visual):
                selections.append(None)
                continue
            attention = None if method.scored_by == "nothing" else self._attention(method, sample, rotary)
            sight = Sight(self.totals[sample], hidden[sample], row.visual, attention, self.generators[id(method)])
            selections.append(method.select(stage, sight))
        self.seen = None
        return self._apply(index, selections, hidden, method.reindexes)

    def _apply(
        self, index: int, selections: Sequence[Selection | None], hidden: torch.Tensor, reindexes: bool
    ) -> torch.Tensor:
        """Drops columns of `hidden` [batch, columns, D], and of the positions with them."""
        merged = [one.merged if one is not None else None for one in selections]
        counts = tuple(0 if one is None else len(one) for one in merged)
        if any(counts):
            more = hidden.new_zeros(len(hidden), max(counts), hidden.shape[2])
            for sample, states in enumerate(merged):
                if states is not None:
                    more[sample, : len(states)] = states.to(hidden)
            hidden = torch.cat([hidden, more], dim=1)
        choice = self.stream.choose(selections)
        hidden = take(hidden, choice.sources.to(hidden.device), 0.0, self.stream.has_holes)
        self.done.append(Stage(index, tuple(row.given for row in self.stream.rows), counts))
        self._move(choice.places, reindexes, hidden)
        return hidden

    def _move(self, places: torch.Tensor, reindexes: bool, hidden: torch.Tensor) -> None:
        """Positions of the columns at `places` [batch, columns]; holes have any."""
        assert self.positions is not None
        places = places.to(self.positions.device).clamp(min=0)
        if reindexes:  # up to the last token's own position: RoPE sees differences alone
            back = torch.arange(places.shape[1] - 1, -1, -1, device=places.device)
            self.positions = self.positions[..., -1:] - back
        else:
            places = places.expand(*self.positions.shape[:-1], -1)
            self.positions = self.positions.gather(-1, places)
        decoder: Any = self.architecture.decoder
        self.rotary = decoder.rotary_emb(
            hidden[:1, :1].to(self.positions.device), self.positions
        )  # its dtype and device

    # Attention.

    def _attention(self, method: Pruner, sample: int, rotary: tuple[torch.Tensor, torch.Tensor]) -> RaterAttention:
        """The sample's raters and keys of the layer that was seen."""
        assert self.seen is not None
        q, k, scaling, real = self.seen
        row, columns = self.stream.rows[sample], self.stream.slots.shape[1]
        begin, past = columns - len(row), k.shape[2] - columns  # holes are at the left, keys of the cache before
        keys = k[sample, :, past + begin :]
        if past:
            before, there = k[sample, :, :past], real[sample].to(k.device)
            if not bool(there.all()):  # heads may have kept different tokens, as many each
                before = before[there.expand(len(before), -1)].view(len(before), -1, before.shape[2])
            keys, past = torch.cat([before, keys], dim=1), before.shape[1]
        if id(method) in self.raters:
            raters = row.text[self.raters[id(method)][sample]]
        else:
            raters = row.text[-1:]
        cos, sin = (part[min(sample, len(part) - 1), begin:] for part in rotary)
        device = cos.device  # the stage's; the layer that was seen may be on another one
        return RaterAttention(
            q[sample][:, raters.to(q.device)].to(device),
            keys.to(device),
            (raters - begin + past).to(device),
            (row.visual - begin + past).to(device),
            scaling,
            (cos, sin),
        )

    def _probe(self, index: int, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Sees the layer's own q and k of all columns, with nothing computed after them and nothing cached."""
        layer: Any = self.architecture.layers[index]
        device = next(layer.parameters()).device
        device = hidden.device if device.type == "meta" else device  # offloaded weights come where the states are
        self._show_attention(index, stop=True)
        with suppress(_Seen):
            layer.self_attn(
                hidden_states=layer.input_layernorm(hidden.to(device)),
                position_embeddings=(rotary[0].to(device), rotary[1].to(device)),
                attention_mask=None,
                past_key_values=_Peek(self.cache, index),
            )

    def _show_attention(self, index: int, stop: bool) -> None:
        """Until it is called once, the model's attention function is `_see`."""
        config = self.architecture.config
        self.hidden_name = config._attn_implementation
        ALL_ATTENTION_FUNCTIONS[SCORES] = partial(self._see, index, stop)
        config._attn_implementation = SCORES

    def _hide_attention(self) -> None:
        if self.hidden_name is not None:
            self.architecture.config._attn_implementation = self.hidden_name
            del ALL_ATTENTION_FUNCTIONS[SCORES]
            self.hidden_name = None

    def _see(
        self,
        index: int,
        stop: bool,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        """An attention function that notes what it sees, and with `stop` goes no further."""
        self._hide_attention()  # first: flash attention looks at the name
        scaling = kwargs.get("scaling")
        held: Any = self.cache.layers[index]
        if isinstance(held, SlotLayer | KVLayer) and held.get_seq_length():
            slots = held.all_slots()
        else:
            slots = torch.where(self.valid_past, 0, -1)
        self._note(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, slots)
        if stop:
            raise _Seen
        function = attention_function(module, self.architecture.config._attn_implementation)
        return function(module, query, key, value, mask, **kwargs)

    def _note(self, query: torch.Tensor, keys: torch.Tensor, scaling: float, slots: torch.Tensor) -> None:
        """Keeps what a layer's attention works on; slots [batch, (heads,) columns], those of the pass may follow."""
        past = keys.shape[2] - self.stream.slots.shape[1]
        real = (slots if slots.ndim == 3 else slots[:, None])[:, :, :past] >= 0
        self.seen = (query, keys, scaling, real)


class _Seen(Exception):
    """Ends a layer after its q and k were seen."""


class _Peek:
    """Gives the keys that a cache layer holds and new ones, and stores none."""

    def __init__(self, cache: Cache, index: int):
        self.layer: Any = cache.layers[index]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.layer.get_seq_length():
            held = self.layer.store.dense()[0] if isinstance(self.layer, KVLayer) else self.layer.keys
            keys = torch.cat([held, keys], dim=2)
        return keys, values


class _Sizes:
    """What the making of masks asks of a KV cache."""

    is_compileable = False

    def __init__(self, columns: int):
        self.columns = columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.columns + query_length, 0
