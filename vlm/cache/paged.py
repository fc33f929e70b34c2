"""Dense keys and values in pages, of which the lowest and highest key are known, as Quest needs it.

Quest (ICML 2024), https://arxiv.org/abs/2406.10774, section 3.3.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ...kernels.page_attention import page_attention
from .base import Query
from .dense import Dense


@runtime_checkable
class Pages(Protocol):
    """A store that can be read page by page; columns before the first page and after the last are always read.

    Attributes:
        page: columns of a page.
        paged_from: first column of the first page.
    """

    @property
    def page(self) -> int: ...

    @property
    def paged_from(self) -> int: ...

    def page_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lowest and highest key of each page in each channel, each [batch, kv_heads, pages, head_dim]."""
        ...

    def attend_pages(self, query: Query, pages: torch.Tensor) -> torch.Tensor:
        """Attention of single queries over some pages, [batch, heads, 1, head_dim].

        Args:
            pages: int64 [batch, kv_heads, chosen].
        """
        ...


class Paged(Dense):
    """A dense store with the bounds of its pages; those that the last column is in, or that are not whole, have none.

    Args:
        page: columns of a page.
    """

    paged_from = 0

    def __init__(self, page: int = 16) -> None:
        super().__init__()
        self.page = page
        self.bounds: tuple[torch.Tensor, torch.Tensor] | None = None  # of as many first pages as were asked for

    @property
    def whole(self) -> int:
        """Pages that are whole, without the last column's: the newest token sees itself."""
        return max(self.columns - 1, 0) // self.page

    def page_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        known = 0 if self.bounds is None else self.bounds[0].shape[2]
        whole = self.whole
        if known < whole or self.bounds is None:
            pages = self.keys[:, :, known * self.page : whole * self.page].unflatten(2, (whole - known, self.page))
            new = (pages.amin(3), pages.amax(3))
            if self.bounds is not None:
                new = (torch.cat([self.bounds[0], new[0]], dim=2), torch.cat([self.bounds[1], new[1]], dim=2))
            self.bounds = new
        return self.bounds

    def attend_pages(self, query: Query, pages: torch.Tensor) -> torch.Tensor:
        tail = self.whole * self.page
        out, _ = page_attention(query.states, self.keys, self.values, pages, self.page, tail, query.scaling, query.mask)
        return out.to(query.states.dtype)

    def _keep_bounds(self, columns: int) -> None:
        """Forgets the bounds of pages that reach beyond the first columns."""
        if self.bounds is not None:
            whole = columns // self.page
            self.bounds = (self.bounds[0][:, :, :whole], self.bounds[1][:, :, :whole])

    def select(self, index: torch.Tensor, start: int = 0) -> None:
        super().select(index, start)
        self._keep_bounds(start)

    def replace(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().replace(start, keys, values)
        self._keep_bounds(start)

    def crop(self, columns: int) -> None:
        super().crop(columns)
        self._keep_bounds(max(self.columns - 1, 0))

    def rows(self, index: torch.Tensor) -> None:
        super().rows(index)
        if self.bounds is not None:
            self.bounds = (self.bounds[0][index], self.bounds[1][index])

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(bound.nbytes for bound in self.bounds or ())


@dataclass(frozen=True)
class PagedConfig:
    """Settings of `Paged`.

    Attributes:
        page: columns of a page; the paper's are 16.

    Raises:
        ValueError: the page is not of at least one column.
    """

    page: int = 16

    def __post_init__(self) -> None:
        if self.page < 1:
            raise ValueError(f"page is {self.page}; accepted: at least 1")

    def make(self, sinks: int = 0) -> Paged:
        """An empty store; all of it is in full precision, so sinks need nothing of their own."""
        return Paged(self.page)
