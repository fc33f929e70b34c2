"""From tower features to LLM embeddings, with fewer tokens.

linear, mlp2x    one token a patch (LLaVA; LLaVA-1.5, arXiv 2310.03744)
downsample-RxR   space-to-depth: each R×R square of patches moves into channels, so N patches become ⌈√N / R⌉² tokens
                 (2x2: VILA-1.5's, NVILA's "spatial-to-channel"; 3x3: NVILA, arXiv 2412.04468, section 2.1)
pool-RxR         each R×R square is averaged, then as mlp2x
resampler        learned queries that read the patches; see `resampler.py`
"""

import re
from collections.abc import Sequence

import torch
from torch import nn

PROJECTORS = ("linear", "mlp2x", "downsample-RxR", "pool-RxR", "resampler")


def downsample_factor(projector: str) -> int:
    """R, the side of the square of patches that becomes one token: 1 without downsampling.

    Raises:
        ValueError: no projector has this name.
    """
    if projector in ("linear", "mlp2x", "resampler"):
        return 1
    match = re.fullmatch(r"(?:downsample|pool)-([2-9]|[1-9]\d)x\1", projector)
    if match is None:
        raise ValueError(f"projector is {projector!r}; accepted: {', '.join(PROJECTORS)}, with R from 2 to 99")
    return int(match[1])


def space_to_depth(features: torch.Tensor, r: int) -> torch.Tensor:
    """Moves each r×r square of a feature map into channels, in raster order; pads with zeros right and below.

    Args:
        features: [tiles, height, width, channels].
        r: side of the square.

    Returns:
        [tiles, ⌈height / r⌉, ⌈width / r⌉, r·r·channels].
    """
    tiles, height, width, channels = features.shape
    pad_h, pad_w = -height % r, -width % r
    if pad_h or pad_w:
        features = nn.functional.pad(features, (0, 0, 0, pad_w, 0, pad_h))
    rows, columns = (height + pad_h) // r, (width + pad_w) // r
    features = features.reshape(tiles, rows, r, columns, r, channels).transpose(2, 3)
    return features.reshape(tiles, rows, columns, r * r * channels)


def average_pool(features: torch.Tensor, window: tuple[int, int, int]) -> torch.Tensor:
    """Means over windows of (frames, rows, columns); the last windows of an axis may be partial, and average what they
    hold. NVILA's temporal pooling is a window of (t, 1, 1) (arXiv 2412.04468, section 2.1).

    Args:
        features: [frames, height, width, channels].
        window: (t, h, w).

    Returns:
        [⌈frames / t⌉, ⌈height / h⌉, ⌈width / w⌉, channels].
    """
    for axis, size in enumerate(window):  # a mean of means: along one axis all windows hold equally many
        whole = features.shape[axis] // size * size
        first, last = features.narrow(axis, 0, whole), features.narrow(axis, whole, features.shape[axis] - whole)
        means = [first.unflatten(axis, (-1, size)).mean(axis + 1)] if whole else []
        features = torch.cat([*means, *([last.mean(axis, keepdim=True)] if last.shape[axis] else [])], axis)
    return features


class Projector(nn.Module):
    """Maps tower features to LLM embeddings.

    Args:
        name: one of `PROJECTORS` but `resampler`.
        vision_dim: channels C of the tower's features.
        text_dim: width D of the LLM's embeddings.
    """

    def __init__(self, name: str, vision_dim: int, text_dim: int):
        super().__init__()
        self.r, self.pools = downsample_factor(name), name.startswith("pool")
        c, d, r = vision_dim, text_dim, self.r
        layers: list[nn.Module]
        if name == "linear":
            layers = [nn.Linear(c, d)]
        elif r == 1 or self.pools:
            layers = [nn.Linear(c, d), nn.GELU(), nn.Linear(d, d)]
        elif r == 2:
            layers = [nn.LayerNorm(4 * c), nn.Linear(4 * c, d), nn.GELU(), nn.Linear(d, d)]
        else:
            layers = [nn.LayerNorm(r * r * c), nn.Linear(r * r * c, r * c), nn.GELU()]
            layers += [nn.LayerNorm(r * c), nn.Linear(r * c, d), nn.GELU(), nn.Linear(d, d)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Projects [tiles, tokens, C] to [tiles, tokens', D].

        Args:
            features: the patches in raster order; a projector without downsampling takes any tokens.
            grid: (height, width) of the tiles in patches.
        """
        if self.r > 1:
            features = self._squares(features.unflatten(1, grid)).flatten(1, 2)  # [tiles, tokens', C or r·r·C]
        return self.layers(features)

    def forward_maps(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Projects maps of any sizes, [height, width, C] each to [tokens, D], by one call of each layer: ranks that
        share the layers' weights (ZeRO-3) call them alike whatever images they have.
        """
        squares = [self._squares(one[None]).flatten(0, 2) for one in maps]
        return list(self.layers(torch.cat(squares)).split([len(one) for one in squares]))

    def _squares(self, features: torch.Tensor) -> torch.Tensor:
        if self.r == 1:
            return features
        return average_pool(features, (1, self.r, self.r)) if self.pools else space_to_depth(features, self.r)
