"""Quest: a decode step reads the pages of the cache whose keys can matter to it most.

Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (ICML 2024), https://arxiv.org/abs/2406.10774,
section 3.
"""

from dataclasses import dataclass

import torch

from ...kernels.page_attention import page_scores
from .base import Query, Selector, Store
from .budget import part_of
from .paged import Pages


@dataclass(frozen=True)
class Quest(Selector):
    """Nothing is evicted: each step reads in each KV head its own pages, and the columns that are in none.

    A page's score bounds its keys' products with the query: the sum over channels of the larger of q · min and q · max;
    of the heads that share a KV head, the highest counts. Pages are those of a `paged` store, or the key blocks of a
    packed one.

    Attributes:
        keep: fraction of the pages that is read, rounded, halves to even; at least one page is.
        tokens: columns in the pages that are read, in whole pages; None: `keep` says it.
        first: layers, from the lowest on, that read all; the paper's are 2.

    Raises:
        ValueError: a field is out of range.
    """

    keep: float = 1 / 16
    tokens: int | None = None
    first: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; accepted: a fraction above 0, up to 1")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; accepted: at least 1, or none")
        if self.first < 0:
            raise ValueError(f"first is {self.first}; accepted: at least 0")

    def attend(self, store: Store, query: Query, layer: int) -> torch.Tensor:
        """Attention of single queries over the pages that are chosen, [batch, heads, 1, head_dim].

        Raises:
            ValueError: the store has no pages.
        """
        if not isinstance(store, Pages):
            raise ValueError(f"quest reads a {type(store).__name__} store; accepted: paged, or one of packed keys")
        if layer < self.first:
            return store.attend(query)
        low, high = store.page_bounds()
        pages = low.shape[2]
        count = max(1, self.tokens // store.page if self.tokens is not None else round(self.keep * pages))
        if count >= pages:
            return store.attend(query)
        scores = page_scores(query.states, low, high)  # [batch, kv_heads, pages]
        if query.mask is None:
            return store.attend_pages(query, scores.topk(count).indices)
        first, last = store.paged_from, store.paged_from + pages * store.page
        alive = query.mask[:, :, 0, first:last].unflatten(-1, (pages, store.page)).any(-1)
        chosen = scores.masked_fill(~alive, -torch.inf).topk(count).indices
        if self.tokens is None:  # a fraction of a row's own pages
            counts = part_of(alive.sum(-1, keepdim=True), self.keep).clamp(min=1)
            chosen = chosen.masked_fill(torch.arange(count, device=chosen.device) >= counts, -1)
        return store.attend_pages(query, chosen)
