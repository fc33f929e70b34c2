"""A KV cache layer that holds fewer columns than the sequence has tokens."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class SlotLayer(DynamicLayer):
    """Keys and values of the tokens that were kept, each with its slot: its place in the whole sequence.

    To the outside it has the sequence's whole length, from which transformers derives positions and mask sizes; what it
    stores is its own matter. Rows with fewer kept tokens than others begin with holes.

    Attributes:
        slots: [batch, columns] int64, -1 at holes, of the columns that prefills stored.
        appended: columns after those, which decoding stored: one a token, in every row.
        length: tokens of the whole sequence, padding included.
        has_holes: whether any slot is -1.
        padded: whether the whole sequence has padding.
    """

    slots: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.slots = torch.empty(0, 0, dtype=torch.long)
        self.appended = self.length = 0
        self.has_holes = self.padded = False
        self._coming: tuple[torch.Tensor, int, bool] | None = None

    @classmethod
    def from_dynamic(cls, layer: DynamicLayer, valid: torch.Tensor) -> "SlotLayer":
        """Takes over a layer's keys and values.

        Args:
            valid: bool [batch, columns], False at padding.
        """
        made = cls()
        if layer.get_seq_length():
            assert layer.keys is not None and layer.values is not None
            made.lazy_initialization(layer.keys, layer.values)
            made.keys, made.values = layer.keys, layer.values
            made.length = layer.get_seq_length()
            order = torch.arange(made.length, device=valid.device)
            made.slots = torch.where(valid, order, -1)
            made.has_holes = not bool(valid.all())
        return made

    @property
    def columns(self) -> int:
        """Columns that are stored."""
        return self.slots.shape[1] + self.appended

    def all_slots(self) -> torch.Tensor:
        """[batch, columns] int64, those that decoding appended too."""
        if not self.appended:
            return self.slots
        after = torch.arange(self.length - self.appended, self.length, device=self.slots.device)
        return torch.cat([self.slots, after.expand(len(self.slots), -1)], dim=1)

    def expect(self, slots: torch.Tensor, tokens: int, has_holes: bool) -> None:
        """Says what the next `update` makes of it.

        Args:
            slots: [batch, columns] int64 of all columns after it, -1 at holes.
            tokens: by which the whole sequence grows.
            has_holes: whether any of the slots is -1.
        """
        self._coming = (slots, tokens, has_holes)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._coming is None:
            self.appended += key_states.shape[-2]
            self.length += key_states.shape[-2]
            if not self.slots.numel():
                self.slots = torch.empty(len(key_states), 0, dtype=torch.long, device=key_states.device)
        else:
            self.slots, tokens, self.has_holes = self._coming
            self.length += tokens
            self.appended, self._coming = 0, None
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens of the whole sequence, as far as they are stored."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}; accepted: minus the number of tokens")
        self._coming = None
        if not tokens_to_remove or not self.is_initialized:
            return
        assert self.keys is not None and self.values is not None
        surplus = min(-tokens_to_remove, self.length)
        if surplus <= self.appended:
            self.appended -= surplus
            self.keys, self.values = self.keys[..., :-surplus, :], self.values[..., :-surplus, :]
        else:
            slots = self.all_slots()
            kept = (slots >= 0) & (slots < self.length - surplus)
            counts = kept.sum(1)
            width = int(counts.max())
            order = kept.long().argsort(dim=1, stable=True)[:, slots.shape[1] - width :]  # what is kept, at the right
            real = torch.arange(width, device=slots.device) >= width - counts[:, None]
            self.slots = torch.where(real, slots.gather(1, order), -1)
            index = order[:, None, :, None].to(self.keys.device)
            self.keys = self.keys.gather(2, index.expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
            self.values = self.values.gather(2, index.expand(-1, self.values.shape[1], -1, self.values.shape[3]))
            self.has_holes = not bool(real.all())
            self.appended = 0
        self.length -= surplus

    def reset(self) -> None:
        super().reset()
        self._clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.slots = self.slots.index_select(0, beam_idx.to(self.slots.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.slots = self.slots.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.slots = self.slots[indices.to(self.slots.device)]
