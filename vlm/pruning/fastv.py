"""FastV: after a few layers, the visual tokens that the last token looks at least are dropped.

An Image is Worth 1/2 Tokens After Layer 2 (ECCV 2024), https://arxiv.org/abs/2403.06764, section 4.1.
"""

from dataclasses import dataclass

from .base import OneStage, Selection, Sight


@dataclass(frozen=True)
class FastV(OneStage):
    """Ranks by the attention of layer K - 1, averaged over heads, from the last prompt token.

    Attributes:
        layer: K, the first layer that reads fewer visual tokens; the paper's is 2.
        keep: fraction of the visual tokens that is kept, 1 - R of the paper.

    Raises:
        ValueError: a field is out of range.
    """

    def select(self, stage: int, sight: Sight) -> Selection:
        assert sight.attention is not None
        scores = sight.attention.head_mean()[-1]  # [visual]
        return Selection(scores.topk(self.budget(sight.visual)).indices.sort().values)
