"""SparseVLM: text tokens that look at the picture rate its tokens, and what is dropped lives on, merged.

SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (ICML 2025),
https://arxiv.org/abs/2410.04417, section 3. Layer numbers are the paper's: the output of layer l is pruned.
"""

from dataclasses import dataclass

import torch

from .base import Pruner, Selection, Sight, check_layers
from .clustering import cluster_tokens
from .scores import RaterAttention

LAYERS = (2, 6, 15)
RANK_LAYERS = (2, 6, 15, 19)
# Of LLaVA-1.5's 576 visual tokens, those that go on after each of LAYERS: the setting's number is their rough average.
PUBLISHED = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}


@dataclass(frozen=True)
class _TextRated(Pruner):
    """Raters and budgets, which SparseVLM and SparseVLM+ share."""

    tokens: int | tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    per: int = 576

    def __post_init__(self) -> None:
        check_layers(self.stages, "layers, each plus 1,")
        if self.per < 0:
            raise ValueError(f"per is {self.per}; accepted: the number of visual tokens that `tokens` is for, or 0")
        if self._counted:
            self._counts()

    @property
    def _counted(self) -> bool:
        return True

    @property
    def stages(self) -> tuple[int, ...]:
        layers = self.layers or (LAYERS if self._counted else RANK_LAYERS)
        return tuple(layer + 1 for layer in layers)

    def _counts(self) -> tuple[int, ...]:
        """Tokens to keep at each stage, of `per` visual tokens."""
        tokens = 192 if self.tokens is None else self.tokens
        if isinstance(tokens, int) and self.layers in (None, LAYERS) and tokens in PUBLISHED:
            return PUBLISHED[tokens]
        if isinstance(tokens, int) and len(self.stages) == 1:
            tokens = (tokens,)
        if isinstance(tokens, int) or len(tokens) != len(self.stages) or min(tokens) < 1:
            raise ValueError(
                f"tokens is {tokens}; accepted: with layers={LAYERS} one of {', '.join(map(str, PUBLISHED))}, "
                f"or a number of tokens for each layer, here {len(self.stages)}"
            )
        return tokens

    def _budget(self, stage: int, total: int, visual: int) -> int:
        """Tokens to keep of `visual`, at least one less; `total` came in the prompt."""
        count = self._counts()[stage]
        if self.per:
            count = max(1, round(count * total / self.per))
        return min(count, visual - 1)

    def raters(self, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor | None:
        """Text tokens that visual tokens resemble more than they do the mean text token (section 3.2)."""
        if not len(text) or not len(visual):
            return None
        wide = torch.promote_types(text.dtype, torch.float32)
        total = torch.zeros(len(text), dtype=wide, device=text.device)
        for block in visual.split(4096):
            total += (block.to(wide) @ text.to(wide).T).softmax(1).sum(0)
        relevance = total / len(visual)  # [text]
        return relevance > relevance.mean()


@dataclass(frozen=True)
class SparseVLM(_TextRated):
    """Ranks by the attention of raters, averaged over heads and raters; some dropped tokens are merged and go on.

    How many tokens are kept is fixed (`tokens`), or follows the rank of the raters' attention (`scale`, `bias`): the
    less their rows have in common, the more. The paper's rank settings are, for 192, 128 and 64 tokens of 576,
    scale=13.5; scale=9, bias=6; scale=0.8.

    Attributes:
        tokens: a published setting, 192, 128, 96 or 64, or the number of tokens to keep at each of `layers`, merged
            ones not counted. None: 192, unless `scale` is given.
        layers: whose output is pruned; None: the published, (2, 6, 15), and (2, 6, 15, 19) with `scale`.
        per: how many visual tokens `tokens` is for; for others it is in proportion. 0: `tokens` as it is, for any.
        scale, bias: int(rank · scale + bias) tokens are kept, all of them where the rank is full.
        reindex: kept tokens get contiguous positions, as in the paper; otherwise they keep their own.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    scale: float | None = None
    bias: float = 0.0
    reindex: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None and self.tokens is not None:
            raise ValueError(f"tokens is {self.tokens} and scale {self.scale}; accepted: one of the two")
        if self.scale is None and self.bias:
            raise ValueError(f"bias is {self.bias} without scale; accepted: both, for the rank rule")
        if self.scale is not None and self.scale < 0:
            raise ValueError(f"scale is {self.scale}; accepted: a number from 0")

    @property
    def _counted(self) -> bool:
        return self.scale is None

    @property
    def reindexes(self) -> bool:
        return self.reindex

    def select(self, stage: int, sight: Sight) -> Selection:
        assert sight.attention is not None
        attention = sight.attention.head_mean()  # [raters, visual]
        if self.scale is None:
            kept = self._budget(stage, sight.total, sight.visual)
        else:
            rank = int(torch.linalg.matrix_rank(attention.float()))
            if rank == sight.visual:
                return Selection(torch.arange(rank, device=attention.device))
            kept = min(max(int(rank * self.scale + self.bias), 0), sight.visual - 1)
        return recycle(attention.mean(0), kept, sight.hidden)


@dataclass(frozen=True)
class SparseVLMPlus(_TextRated):
    """SparseVLM+: what attention owes to the distance alone is divided out, and only heads that look are asked.

    Each probability is divided by what RoPE makes of two all-ones vectors at the same two positions, q·k·scaling; the
    scores are the mean over the heads whose raters look most at visual tokens. Nothing is merged, positions stay.

    Attributes:
        tokens, layers, per: see `SparseVLM`.
        heads: how many heads are asked; all of them in a model that has fewer.

    Raises:
        ValueError: a field is out of range.
    """

    heads: int = 14

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise ValueError(f"heads is {self.heads}; accepted: a number from 1")

    def select(self, stage: int, sight: Sight) -> Selection:
        assert sight.attention is not None
        scores = self.scores(sight.attention)
        kept = self._budget(stage, sight.total, sight.visual)
        return Selection(scores.topk(kept).indices.sort().values)

    def scores(self, attention: RaterAttention) -> torch.Tensor:
        """[visual]."""
        by_head = attention.rater_mean(1 / attention.self_product())  # [heads, visual]
        looking = by_head.sum(1).topk(min(self.heads, len(by_head))).indices
        return by_head[looking].mean(0)


def recycle(scores: torch.Tensor, kept: int, hidden: torch.Tensor) -> Selection:
    """Keeps the best tokens, and merges the best three in ten of the others (section 3.4).

    Args:
        scores: [visual].
        kept: how many are kept, fewer than there are.
        hidden: [visual, D].
    """
    order = scores.argsort(descending=True, stable=True)
    recycled = order[kept:][: int(0.3 * (len(scores) - kept)) + 1]
    merged, centers = cluster_tokens(hidden[recycled], clusters=len(recycled) // 10 + 1)
    return Selection(order[:kept].sort().values, merged, recycled[centers])
