"""DyCoke's dynamic pruning: at each decode step, only the visual tokens in use are attended to.

DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models (CVPR 2025),
https://arxiv.org/abs/2411.15024, section 3.3.
"""

import torch

from .base import check_keep


class DynamicPruning:
    """Which keys the later layers attend to at each decode step: the text, and the visual tokens in use.

    A new subset is chosen when the attention over the visual tokens has changed since the step before; the cache stays
    whole, so that a token can come back.

    Args:
        visual: [visual] int64, the keys of the visual tokens.
        keep: fraction of the visual tokens that is attended to, 1 - p of the paper.
        threshold: cosine similarity to the step before, from which on nothing is chosen anew.
        reuse: whether the earlier subset then serves, as in the paper; the published code attends to everything.

    Raises:
        ValueError: `keep` is out of range.
    """

    def __init__(self, visual: torch.Tensor, keep: float = 0.3, threshold: float = 0.9, reuse: bool = True):
        check_keep(keep)
        self.visual, self.keep, self.threshold, self.reuse = visual, keep, threshold, reuse
        self.similarity = 0.0  # of the last step's attention to that of the step before
        self._row: torch.Tensor | None = None
        self._chosen = visual

    def step(self, attention: torch.Tensor) -> torch.Tensor:
        """The keys to attend to at this step, [kept] int64, ascending.

        Args:
            attention: [keys], of the new token, the mean over the heads of the layer before the first that is pruned.
        """
        row = attention[self.visual].float()
        if self._row is not None:
            self.similarity = float(torch.cosine_similarity(row, self._row, dim=0))
        self._row = row
        if self.similarity < self.threshold:
            best = row.topk(int(round(self.keep * len(row), 6))).indices
            self._chosen = self.visual[best]
        elif not self.reuse:
            self._chosen = self.visual
        attended = torch.ones(len(attention), dtype=torch.bool, device=attention.device)
        attended[self.visual] = False
        attended[self._chosen] = True
        return attended.nonzero()[:, 0]
