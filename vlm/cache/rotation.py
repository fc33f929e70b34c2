"""A rotation of each head that spreads the outliers of a channel over all of them.

QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (NeurIPS 2024), https://arxiv.org/abs/2404.00456, section 4.2. Here
keys are rotated after RoPE, and queries with them; and values, whose rotation is undone after the attention.
"""

from functools import cache

import torch


def rotated(states: torch.Tensor) -> torch.Tensor:
    """Each head times an orthonormal Hadamard matrix, which is its own inverse: [..., head_dim].

    Raises:
        ValueError: head_dim is no power of two.
    """
    return states @ hadamard(states.shape[-1], states.dtype, states.device)


@cache
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[size, size], after Sylvester."""
    if size & (size - 1):
        raise ValueError(f"head_dim is {size}; accepted for a Hadamard rotation: a power of two")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix * size**-0.5).to(device, dtype)
