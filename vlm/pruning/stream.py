"""Which of a prefill's columns hold which tokens, while columns are dropped between layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from .base import Selection


@dataclass
class Row:
    """One sample's columns.

    Attributes:
        text: [text tokens] int64, ascending columns.
        visual: [visual tokens] int64, ascending columns.
        given: [visual tokens] int64, which of the sample's visual tokens each is; -1 for merged ones.
    """

    text: torch.Tensor
    visual: torch.Tensor
    given: torch.Tensor

    def __len__(self) -> int:
        return len(self.text) + len(self.visual)


@dataclass(frozen=True)
class Choice:
    """What `Stream.choose` says of the columns to come, [batch, columns] each, -1 at holes.

    Attributes:
        sources: columns that the states are taken from; merged ones count on behind the old columns.
        places: columns whose positions they have.
    """

    sources: torch.Tensor
    places: torch.Tensor


class Stream:
    """The columns that flow from layer to layer: each sample's tokens in order, at the right, holes at the left.

    The last token of the prompt always stays and counts as text, as the first answer token comes from it.

    Attributes:
        slots: [batch, columns] int64, the prompt's token in each column, -1 at holes.
        rows: each sample's columns.
        has_holes: whether any slot is -1.
    """

    def __init__(self, visual: torch.Tensor, valid: torch.Tensor, device: torch.device):
        """Of a whole prompt: bool [batch, tokens] each, on the CPU; not valid is padding."""
        visual = visual & valid
        visual[:, -1] = False
        tokens = torch.arange(visual.shape[1])
        self.slots = torch.where(valid, tokens, -1).to(device)
        self.has_holes = not bool(valid.all())
        self.rows = []
        for seen, real in zip(visual, valid, strict=True):
            columns = seen.nonzero()[:, 0]
            text = (real & ~seen).nonzero()[:, 0]
            self.rows.append(Row(text.to(device), columns.to(device), torch.arange(len(columns), device=device)))
        after = visual.flip(1).cumsum(1).flip(1) == 0
        self.text_after = tuple((after & valid).sum(1).tolist())  # text tokens after the last visual one

    @property
    def visual_counts(self) -> tuple[int, ...]:
        return tuple(len(row.visual) for row in self.rows)

    @property
    def text_counts(self) -> tuple[int, ...]:
        return tuple(len(row.text) for row in self.rows)

    def choose(self, selections: Sequence[Selection | None]) -> Choice:
        """Goes over to the columns that stay, without padding where samples have equally many.

        Args:
            selections: of each sample; None keeps all.
        """
        width_before = self.slots.shape[1]
        rows, sources, places = [], [], []
        for row, selection in zip(self.rows, selections, strict=True):
            chosen, source, place = _chosen(row, selection, width_before)
            rows.append(chosen)
            sources.append(source)
            places.append(place)
        width = max(map(len, rows))
        for row in rows:
            row.text, row.visual = (columns + width - len(row) for columns in (row.text, row.visual))
        self.rows, self.has_holes = rows, any(len(row) < width for row in rows)
        choice = Choice(*(torch.stack([pad(one, (width - len(one), 0), value=-1) for one in all_rows])
                          for all_rows in (sources, places)))  # fmt: skip
        self.slots = take(self.slots, choice.places, -1, self.has_holes)
        return choice


def _chosen(row: Row, selection: Selection | None, width: int) -> tuple[Row, torch.Tensor, torch.Tensor]:
    """The row's columns that stay, counted from its first, and their sources and places; see `Choice`."""
    visual, given = row.visual, row.given
    if selection is not None:
        keep = selection.keep.to(visual.device)
        visual, given = visual[keep], given[keep]
    source = place = torch.cat([row.text, visual])
    order_by = 2 * source
    if selection is not None and selection.merged is not None and selection.centers is not None:
        merged = torch.arange(len(selection.merged), device=visual.device)
        source = torch.cat([source, width + merged])
        place = torch.cat([place, row.visual[selection.centers.to(visual.device)]])
        order_by = torch.cat([order_by, (2 * row.visual[-1] + 1).expand(len(merged))])
        given = torch.cat([given, torch.full_like(merged, -1)])
    order = order_by.argsort(stable=True)
    columns = torch.empty_like(order)
    columns[order] = torch.arange(len(order), device=order.device)
    texts = len(row.text)
    return Row(columns[:texts], columns[texts:], given), source[order], place[order]


def take(values: torch.Tensor, columns: torch.Tensor, fill: Any, has_holes: bool = True) -> torch.Tensor:
    """Columns of `values` [batch, columns, ...], [batch, new columns, ...], with `fill` where they are -1 (holes)."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    if not has_holes:
        return values[rows, columns]
    taken = values[rows, columns.clamp(min=0)]
    return torch.where((columns < 0).view(*columns.shape, *[1] * (values.ndim - 2)), fill, taken)
