"""Density-peak clustering of tokens: centers are dense, and far from what is denser.

Rodriguez and Laio, Clustering by fast search and find of density peaks (Science 2014),
https://doi.org/10.1126/science.1242072; with k nearest neighbours for the density as SparseVLM takes it,
https://arxiv.org/abs/2410.04417, section 3.4.
"""

import torch
from torch.nn.functional import one_hot


def cluster_tokens(
    tokens: torch.Tensor, clusters: int, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges tokens into the means of their clusters.

    Args:
        tokens: [tokens, D].
        clusters: how many, at most as many as tokens; a token's density is taken from as many neighbours.
        noise: [tokens], added to the densities times 1e-6. Where densities tie without it, the earlier token counts as
            the denser one.

    Returns:
        merged: [clusters, D], the means, in tokens' dtype; best center first.
        centers: [clusters] int64, the token at the center of each.
    """
    states = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    distances = torch.cdist(states, states) / states.shape[1] ** 0.5  # [tokens, tokens]
    nearest = distances.topk(clusters, largest=False).values  # [tokens, clusters], the token itself among them
    density = (-nearest.square().mean(1)).exp()
    if noise is not None:
        density = density + noise * 1e-6
    place = density.argsort(descending=True, stable=True).argsort()  # 0: the densest
    denser = place < place[:, None]  # [tokens, tokens]
    to_denser = torch.where(denser, distances, distances.max()).amin(1)
    centers = (to_denser * density).argsort(descending=True, stable=True)[:clusters]

    cluster = distances[centers].argmin(0)  # of each token
    cluster[centers] = torch.arange(clusters, device=cluster.device)
    members = one_hot(cluster, clusters).to(states.dtype).T  # [clusters, tokens]
    merged = members @ states / (members.sum(1, keepdim=True) + 1e-6)
    return merged.to(tokens.dtype), centers
