"""From tower features to LLM embeddings, with fewer tokens.

`linear` and `mlp2x` keep one token a patch (LLaVA, LLaVA-1.5, arXiv 2310.03744). `downsample-2x2` (VILA-1.5, NVILA's
"spatial-to-channel") and `downsample-3x3` (NVILA, arXiv 2412.04468, section 2.1) first move each r×r square of patches
into channels, so N patches become ⌈√N / r⌉² tokens.
"""

import torch
from torch import nn

# name -> r, the side of the square of patches that becomes one token
PROJECTORS = {"linear": 1, "mlp2x": 1, "downsample-2x2": 2, "downsample-3x3": 3}


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


class Projector(nn.Module):
    """Maps tower features to LLM embeddings.

    Args:
        name: one of `PROJECTORS`.
        vision_dim: channels C of the tower's features.
        text_dim: width D of the LLM's embeddings.
    """

    def __init__(self, name: str, vision_dim: int, text_dim: int):
        super().__init__()
        self.r = PROJECTORS[name]
        c, d = vision_dim, text_dim
        layers: list[nn.Module]
        if name == "linear":
            layers = [nn.Linear(c, d)]
        elif name == "mlp2x":
            layers = [nn.Linear(c, d), nn.GELU(), nn.Linear(d, d)]
        elif name == "downsample-2x2":
            layers = [nn.LayerNorm(4 * c), nn.Linear(4 * c, d), nn.GELU(), nn.Linear(d, d)]
        else:
            layers = [nn.LayerNorm(9 * c), nn.Linear(9 * c, 3 * c), nn.GELU()]
            layers += [nn.LayerNorm(3 * c), nn.Linear(3 * c, d), nn.GELU(), nn.Linear(d, d)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Projects [tiles, tokens, C] to [tiles, tokens', D].

        Args:
            features: the patches in raster order; a projector without downsampling takes any tokens.
            grid: (height, width) of the tiles in patches.
        """
        if self.r > 1:
            features = features.unflatten(1, grid)  # [tiles, height, width, C]
            features = space_to_depth(features, self.r).flatten(1, 2)  # [tiles, tokens', r·r·C]
        return self.layers(features)
