import pytest
import torch

from foveate.vlm.pruning.clustering import cluster_tokens

from . import oracle


def clusters_by_hand(tokens, k):
    """Density peaks one token after the other, in float64; ties go to the earlier token."""
    x = tokens.double()
    distance = [[float((a - b).norm()) / x.shape[1] ** 0.5 for b in x] for a in x]
    density = [float(torch.tensor([d**2 for d in sorted(row)[:k]]).mean().neg().exp()) for row in distance]
    score = []
    for i, row in enumerate(distance):
        denser = [row[j] for j in range(len(x)) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        score.append(density[i] * (min(denser) if denser else max(map(max, distance))))
    centers = sorted(range(len(x)), key=lambda i: -score[i])[:k]
    members = {c: [c] for c in centers}
    for i in set(range(len(x))) - set(centers):
        members[min(centers, key=lambda c: distance[i][c])].append(i)
    return torch.stack([x[members[c]].sum(0) / (len(members[c]) + 1e-6) for c in centers]), centers


@pytest.mark.parametrize("name", ["n12_k1", "n44_k5"])
def test_clusters_equal_the_reference_programs(name):
    case = oracle.load(f"sparse_cluster_unit_{name}")
    merged, centers = cluster_tokens(case["x"], case["n_clusters"], case["noise"])
    torch.testing.assert_close(merged, case["merged"], rtol=0, atol=1e-5)
    assert centers.tolist() == case["centers"].tolist()


@pytest.mark.parametrize(("tokens", "clusters"), [(1, 1), (13, 2), (30, 4)])
def test_clusters_equal_brute_force(tokens, clusters):
    x = torch.randn(tokens, 6, dtype=torch.float64)
    expected, centers = clusters_by_hand(x, clusters)
    merged, got = cluster_tokens(x, clusters)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-12)
    assert got.tolist() == centers


def test_tokens_that_tie_give_the_same_clusters_each_time():
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [10.0, 0.0], [10.0, 1.0]])  # two pairs, all equally dense
    merged, centers = cluster_tokens(x, 2)
    assert centers.tolist() == [0, 2]
    torch.testing.assert_close(merged, torch.tensor([[0.0, 0.5], [10.0, 0.5]]), rtol=0, atol=1e-4)
    merged, centers = cluster_tokens(torch.ones(20, 3), 3)
    assert centers.tolist() == [0, 1, 2]
    torch.testing.assert_close(merged, torch.ones(3, 3), rtol=0, atol=1e-5)  # none is empty


def test_merged_tokens_keep_their_dtype():
    assert cluster_tokens(torch.randn(12, 4, dtype=torch.bfloat16), 2)[0].dtype == torch.bfloat16
