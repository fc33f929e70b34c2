import pytest
import torch

from foveate.vlm.pruning.towers import merge
from foveate.vlm.pruning.visionzip import VisionZip, zip_tokens

from . import oracle


@pytest.mark.parametrize("name", ["d17_c6", "d20_c1", "batch2"])
def test_visionzip_equals_the_reference_program(name):
    case = oracle.load(f"visionzip_{name}")
    for image, heads in enumerate(case["cls_attn_heads"]):
        features, keys = case["hidden"][image, 1:], case["metric"][image, 1:]  # patches
        dominant, targets, others, nearest = zip_tokens(heads.sum(0), keys, case["dominant"] - 1, case["contextual"])
        assert dominant.tolist() == case["dominant_patches"][image].tolist()
        rest = (case["rest_tokens"][image] - 1).tolist()
        assert targets.tolist() == [rest[i] for i in case["target_indices"].reshape(-1).tolist()]
        assert others.tolist() == [token for token in rest if token not in targets.tolist()]
        assert nearest.tolist() == case["assign"][image].tolist()
        into = torch.full((len(features),), -1)
        into[others] = targets[nearest]
        changed, merged = merge(features, into)
        contextual = features.index_copy(0, changed, merged)[targets]
        output = torch.cat([case["hidden"][image, :1], features[dominant], contextual])
        torch.testing.assert_close(output, case["output"][image], rtol=0, atol=1e-5)


def test_a_target_without_members_stays_as_it_is():
    tokens = torch.randn(4, 3)
    changed, merged = merge(tokens, torch.tensor([-1, 0, -1, 0]))
    assert changed.tolist() == [0]
    torch.testing.assert_close(merged[0], tokens[0] + (tokens[1] + tokens[3]) / 2)


def test_budgets_are_the_papers_counts_or_a_fraction_in_their_proportion():
    assert VisionZip(54, 10).counts(576) == (54, 10)
    for paper in ((54, 10), (108, 20), (162, 30)):
        assert VisionZip(keep=sum(paper) / 576).counts(576) == paper
    assert VisionZip(keep=0.0001).counts(576) == (1, 0)
    assert VisionZip(keep=0.0).counts(576) == (0, 0)


def test_fields_out_of_range_are_refused():
    with pytest.raises(ValueError, match="dominant, contextual are 0, 10"):
        VisionZip(dominant=0)
    with pytest.raises(ValueError, match=r"keep is 1\.5"):
        VisionZip(keep=1.5)
