"""Which token each column of a KV cache layer holds."""

import torch


class Slots:
    """Each column's slot: its token's place in the whole sequence, -1 at holes.

    Columns see those before them. Slots ascend with them, except those of merged tokens.

    Attributes:
        columns: that the store has.
        table: int64 [batch, 1 | kv_heads, capacity], of which the first `columns` count; None while column i holds
            token i in every row and head.
        has_holes: whether any slot is -1.
        are_moved: whether column i may hold another token than i, or heads other ones.
    """

    def __init__(self) -> None:
        self.columns = 0
        self.table: torch.Tensor | None = None
        self.has_holes = self.are_moved = False

    @property
    def are_shared(self) -> bool:
        """Whether all heads hold the same tokens."""
        return self.table is None or self.table.shape[1] == 1

    def all(self, batch: int, device: torch.device) -> torch.Tensor:
        """int64 [batch, 1 | kv_heads, columns]."""
        if self.table is None:
            return torch.arange(self.columns, device=device).expand(batch, 1, -1)
        return self.table[:, :, : self.columns]

    def append(self, start: int, count: int, new: torch.Tensor | None) -> None:
        """Adds columns at the end.

        Args:
            start: slot of the first, where `new` is None.
            count: of columns.
            new: int64 [batch, count], their slots, where they are not all there or not one after the other.
        """
        end = self.columns + count
        if self.table is None and new is None and start == self.columns:
            self.columns = end
            return
        if self.table is None:
            assert new is not None or not self.columns
            device = new.device if new is not None else torch.device("cpu")
            self.table = self.all(1 if new is None else len(new), device).contiguous()
        if end > self.table.shape[2]:
            spare = self.table.new_empty(*self.table.shape[:2], end - self.columns if count > 1 else end)
            self.table = torch.cat([self.table[:, :, : self.columns], spare], dim=2)
        if new is None and count == 1:
            self.table[:, :, self.columns] = start
        else:
            order = torch.arange(start, start + count, device=self.table.device) if new is None else new[:, None]
            self.table[:, :, self.columns : end] = order
        self.columns = end

    def mark(self, keep: torch.Tensor, start: int) -> None:
        """Makes holes of columns, from `start` on: bool [batch, 1 | kv_heads, columns - start], False there."""
        batch, heads = keep.shape[:2]
        old = self.all(batch, keep.device)[:, :, : self.columns]
        table = old.expand(batch, max(heads, old.shape[1]), -1).clone()
        table[:, :, start:].masked_fill_(~keep, -1)
        self.table, self.has_holes, self.are_moved = table, True, True

    def compact(self, start: int, sinks: int = 0) -> torch.Tensor | None:
        """Takes out holes from `start` on, as far as every row and head has some; those left stand first.

        Args:
            sinks: so many tokens stand before the holes.

        Returns:
            int64 [batch, 1 | kv_heads, columns], the columns that stay, from `start` on; None where nothing moves.
        """
        if self.table is None or not self.has_holes:
            return None
        slots = self.table[:, :, start : self.columns]
        live = slots >= 0
        counts = live.sum(-1)
        spare = slots.shape[2] - int(counts.max())
        self.has_holes = not bool((counts == counts.max()).all()) or bool((self.table[:, :, :start] < 0).any())
        if not spare and not sinks:
            return None
        places = torch.where(live, 2, 1).masked_fill(live & (live.cumsum(-1) <= sinks), 0)
        order = places.argsort(dim=-1, stable=True)
        index = torch.cat([order[:, :, :sinks], order[:, :, sinks + spare :]], dim=2)
        self.table = torch.cat([self.table[:, :, :start], slots.gather(2, index)], dim=2)
        self.columns -= spare
        self.are_moved = True
        return index + start

    def after(self, length: int) -> int:
        """Of how many of the last columns no row and head has a slot below `length`."""
        if self.table is None:
            return max(self.columns - length, 0)
        slots = self.table[:, :, : self.columns]
        stays = ((slots >= 0) & (slots < length)).any(0).any(0)
        return self.columns - int(stays.nonzero().max() + 1 if bool(stays.any()) else 0)

    def crop(self, columns: int, length: int) -> None:
        """Removes the last columns; tokens from `length` on become holes where they are left."""
        self.columns -= columns
        if self.table is not None:
            slots = self.table[:, :, : self.columns]
            slots.masked_fill_(slots >= length, -1)
            self.has_holes = bool((slots < 0).any())

    def rows(self, index: torch.Tensor) -> None:
        """Keeps these rows of the batch."""
        if self.table is not None:
            self.table = self.table.index_select(0, index.to(self.table.device))

    def seen(self, queries: int, batch: int, device: torch.device) -> torch.Tensor | None:
        """Which columns the last tokens see, causally: bool [batch, 1 | kv_heads, 1 | queries, columns].

        Returns:
            None where one token sees all.
        """
        if queries == 1:
            return self.all(batch, device)[:, :, None] >= 0 if self.has_holes else None
        order = torch.arange(self.columns, device=device)
        causal = order <= order[self.columns - queries :, None]
        if self.has_holes:
            return causal & (self.all(batch, device)[:, :, None] >= 0)
        return causal.expand(batch, 1, -1, -1)
