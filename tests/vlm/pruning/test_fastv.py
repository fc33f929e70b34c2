import pytest
import torch

from foveate.vlm.pruning.fastv import FastV

from . import oracle

CASES = ["k1_r90_round", "k2_r0_keepall", "k2_r50", "k2_r50_gqa", "k2_r50_v25_bankers", "k2_r50_vis_first", "k3_r75"]


@pytest.mark.parametrize("name", CASES)
def test_fastv_equals_the_reference_program(name):
    case = oracle.load(f"fastv_hf_{name}")
    got = oracle.run(case, FastV(layer=case["K"], keep=1 - case["r"]))
    (sight,), (stage,) = got.sights, got.prefill.stages
    torch.testing.assert_close(sight.attention.head_mean()[-1], case["scores"], rtol=0, atol=1e-5)
    assert stage.layer == case["K"]
    assert stage.kept[0].tolist() == case["kept_visual"].tolist()
    oracle.assert_same_outputs(got, case, atol=2e-4)
    assert got.prefill.visual == ((case["vis_len"],),) * case["K"] + ((case["n_keep"],),) * (8 - case["K"])


def test_fields_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"layer is .*0"):
        FastV(layer=0)
    for keep in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"keep is {keep}"):
            FastV(keep=keep)
