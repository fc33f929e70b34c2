import pytest
import torch

from foveate.vlm.pruning.pyramiddrop import PyramidDrop

from . import oracle


def method(case) -> PyramidDrop:
    return PyramidDrop(layers=tuple(case["layer_list"].tolist()), keep=tuple(case["ratio_list"].tolist()))


@pytest.mark.parametrize("name", ["l246_half", "l4_single"])
def test_pyramiddrop_equals_the_reference_program(name):
    case = oracle.load(f"pdrop_{name}")
    got = oracle.run(case, method(case))
    assert len(got.sights) == len(case["layer_list"])
    for i, (sight, selection, stage) in enumerate(zip(got.sights, got.selections, got.prefill.stages, strict=True)):
        torch.testing.assert_close(sight.attention.head_mean()[-1], case[f"P{i}_scores"], rtol=0, atol=1e-5)
        assert selection.keep.tolist() == case[f"P{i}_kept"].tolist()
        assert stage.kept[0].tolist() == case[f"P{i}_kept_original"].tolist()
    oracle.assert_same_outputs(got, case, atol=2e-4)


def test_each_sample_of_a_batch_is_ranked_by_itself():
    case = oracle.load("pdrop_batch2")
    got = oracle.run(case, method(case))
    kept = [selection.keep.tolist() for selection in got.selections]  # stage after stage, sample after sample
    assert kept[:2] == case["P0_kept"].tolist()
    assert kept[2:] == case["P1_kept"].tolist()
    assert kept[0] != kept[1]
    oracle.assert_same_outputs(got, case, atol=2e-4)


def test_shares_are_of_the_prompts_tokens_rounded_down():
    case = oracle.load("pdrop_l246_half")  # 48 visual tokens
    got = oracle.run(case, PyramidDrop(layers=(2, 4, 7), keep=(0.99, 0.51, 0.51), reindex=False))
    assert [len(selection.keep) for selection in got.selections] == [47, 24, 24]
    assert [counts[0] for counts in got.prefill.visual] == [48, 48, 47, 47, 24, 24, 24, 24]


def test_fields_out_of_range_are_refused():
    for fields, message in [
        ({"layers": (8, 8, 24)}, "layers is"),
        ({"layers": (8, 16)}, "2 fractions"),
        ({"keep": (0.5, 0.6, 0.1)}, "none above the one before"),
        ({"keep": (0.5, 0.5, -0.1)}, "keep is -0.1"),
    ]:
        with pytest.raises(ValueError, match=message):
            PyramidDrop(**fields)
