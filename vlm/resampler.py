"""A learned compressor that is trained once and gives any number of tokens: Matryoshka queries.

M learned queries read a tile's patches by cross-attention and never see each other, so the first m of them are the same
whatever comes after. Training keeps the first m, drawn anew for each document; inference keeps as many as it can afford
(Matryoshka Query Transformer, arXiv 2405.19315, section 3). m = 1 is the extreme of LLaVA-Mini (arXiv 2501.03895),
without that paper's fusion of the remaining visual tokens into the text.
"""

from collections.abc import Sequence

import torch
from torch import nn


class Resampler(nn.Module):
    """Maps tower features to LLM embeddings, one token a query.

    Args:
        vision_dim: channels C of the tower's features.
        text_dim: width D of the LLM's embeddings, a multiple of 4.
        queries: M, the most tokens that a tile can become.
    """

    def __init__(self, vision_dim: int, text_dim: int, queries: int):
        super().__init__()
        if text_dim % 4:
            raise ValueError(f"the LLM's hidden_size is {text_dim}; projector 'resampler' accepts multiples of 4")
        self.heads = next(heads for heads in range(max(1, text_dim // 64), 0, -1) if text_dim % heads == 0)
        self.queries = nn.Embedding(queries, text_dim)
        self.norm_query = nn.LayerNorm(text_dim)
        self.to_query = nn.Linear(text_dim, text_dim)
        self.from_vision = nn.Linear(vision_dim, text_dim)
        self.norm_vision = nn.LayerNorm(text_dim)
        self.to_key = nn.Linear(text_dim, text_dim)
        self.to_value = nn.Linear(text_dim, text_dim)
        self.attended = nn.Linear(text_dim, text_dim)
        self.norm_out = nn.LayerNorm(text_dim)
        self.out = nn.Linear(text_dim, text_dim)

    def forward(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Projects [tiles, height·width, C] to [tiles, M, D].

        Args:
            features: the patches in raster order.
            grid: (height, width) of the tiles in patches.
        """
        patches = self.norm_vision(self.from_vision(features))
        keys = self.to_key(patches + sine_positions(grid, patches))
        return self._out(self._read(self._queries().expand(len(patches), -1, -1), keys, self.to_value(patches)))

    def forward_maps(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Projects maps of any sizes, [height, width, C] each to [M, D]; as `Projector.forward_maps`."""
        sizes = [one.shape[0] * one.shape[1] for one in maps]
        patches = self.norm_vision(self.from_vision(torch.cat([one.flatten(0, 1) for one in maps])))
        positions = [sine_positions((one.shape[0], one.shape[1]), patches) for one in maps]
        keys, values = self.to_key(patches + torch.cat(positions)).split(sizes), self.to_value(patches).split(sizes)
        queries = self._queries()[None]
        read = [self._read(queries, key[None], value[None]) for key, value in zip(keys, values, strict=True)]
        return list(self._out(torch.cat(read)))

    def _queries(self) -> torch.Tensor:
        """[M, D]; by calls of modules, which gather weights that ranks share (ZeRO-3)."""
        numbers = torch.arange(self.queries.num_embeddings, device=self.queries.weight.device)
        return self.to_query(self.norm_query(self.queries(numbers)))

    def _read(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[tiles, M, D] of queries, [tiles, patches, D] of keys and values."""
        heads = [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (queries, keys, values)]
        return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    def _out(self, read: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm_out(self.attended(read)))


def sine_positions(grid: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """Fixed positions of a grid's cells, [height·width, D] for `like` [.., D]: half of it tells rows, half columns.

    A position is its sines and cosines at wavelengths from 2π to 10,000·2π (arXiv 1706.03762, section 3.5), so that a
    grid of any size has some.
    """
    quarter = like.shape[-1] // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, device=like.device, dtype=torch.float32) / quarter)
    axes = []
    for length in grid:
        angles = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * frequencies
        axes.append(torch.cat([angles.sin(), angles.cos()], dim=-1))  # [length, D / 2]
    rows = axes[0][:, None].expand(-1, grid[1], -1)
    columns = axes[1][None].expand(grid[0], -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).to(like.dtype)
