"""How much raters look at visual tokens: rows of attention, never the whole matrix."""

from dataclasses import dataclass

import torch

from ...kernels.rater_attention import rater_attention


@dataclass(frozen=True)
class RaterAttention:
    """Softmax attention of one sample's raters, over all keys that each of them sees.

    Attributes:
        q: [heads, raters, head_dim], queries after RoPE.
        k: [kv_heads, keys, head_dim], keys after RoPE, those of the KV cache first.
        last: [raters] int64, the last key that each rater sees.
        columns: [visual] int64, the keys of the visual tokens.
        scaling: of q·k.
        rotary: cos and sin of this prefill's keys, the last ones, [new keys, rotary width].
    """

    q: torch.Tensor
    k: torch.Tensor
    last: torch.Tensor
    columns: torch.Tensor
    scaling: float
    rotary: tuple[torch.Tensor, torch.Tensor]

    def head_mean(self) -> torch.Tensor:
        """Mean over the heads of each rater's row, float32 [raters, visual]."""
        return rater_attention(self.q, self.k, self.last, self.columns, self.scaling, over="heads")

    def rater_mean(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Mean over the raters in each head, float32 [heads, visual].

        Args:
            weights: [raters, visual], factors of the probabilities.
        """
        return rater_attention(self.q, self.k, self.last, self.columns, self.scaling, over="raters", weights=weights)

    def self_product(self) -> torch.Tensor:
        """RoPE's own product of rater and visual token: all-ones vectors rotated to their positions, q·k·scaling.

        Returns:
            float32 [raters, visual].
        """
        cos, sin = (part.float() for part in self.rotary)
        half = cos.shape[1] // 2
        ones = torch.cat([cos[:, :half] - sin[:, :half], cos[:, half:] + sin[:, half:]], dim=1)  # the half-split layout
        before = self.k.shape[1] - len(ones)  # keys of the KV cache
        return ones[self.last - before] @ ones[self.columns - before].T * self.scaling
