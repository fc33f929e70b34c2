"""DyCoke against the arrays of its published code, and against its rules written out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.vlm.pruning.dycoke import DyCoke
from foveate.vlm.pruning.dycoke_decode import DynamicPruning

ORACLES = Path(__file__).parents[2] / "oracles"


@pytest.mark.parametrize("name", ["dycoke_ttm_f8", "dycoke_ttm_f16"])
def test_the_published_code_keeps_the_same_tokens_in_the_same_order(name: str) -> None:
    case = np.load(ORACLES / f"{name}.npz")
    frames, tokens = int(case["n_frames"]), int(case["tokens_per_frame"])
    video = torch.from_numpy(case["x"]).unflatten(0, (frames, tokens))
    method = DyCoke(keep=1 - round(float(case["merging_ratio"]), 6), last_group=False)
    ranked = method.ranked(video)
    assert [len(kept) for kept in ranked] == case["tokens_per_output_frame"].tolist()
    flat = torch.cat([number * tokens + kept for number, kept in enumerate(ranked)])
    assert flat.tolist() == case["output_source_index"].tolist()
    assert method.select(video).flatten().nonzero()[:, 0].tolist() == sorted(case["output_source_index"].tolist())


@pytest.mark.parametrize("frames", range(1, 10))
def test_any_number_of_frames_is_compared_in_groups_of_four(frames: int) -> None:
    others = {1: 0, 3: 2, 2: 0, 5: 4, 7: 6, 6: 4}
    video = torch.from_numpy(np.random.default_rng(frames).normal(size=(frames, 10, 5)))
    kept = DyCoke(keep=0.3).select(video)
    for frame in range(frames):
        if frame not in others:
            assert kept[frame].all()
            continue
        here, there = video[frame].numpy(), video[others[frame]].numpy()
        cosine = (here * there).sum(1) / np.linalg.norm(here, axis=1) / np.linalg.norm(there, axis=1)
        assert set(kept[frame].nonzero()[:, 0].tolist()) == set(np.argsort(cosine)[:3].tolist())


def test_the_whole_video_can_be_kept() -> None:
    assert DyCoke(keep=1.0).select(torch.randn(7, 4, 3)).all()


@pytest.mark.parametrize("keep", [-0.1, 1.1])
def test_what_can_be_no_fraction_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=f"keep is {keep}; accepted: a fraction"):
        DyCoke(keep=keep)
    with pytest.raises(ValueError, match=f"keep is {keep}; accepted: a fraction"):
        DynamicPruning(torch.arange(3), keep=keep)


def test_decode_attends_to_what_the_published_code_attends_to() -> None:
    case = np.load(ORACLES / "dycoke_dp_p70.npz")
    first, visual = int(case["image_token_start_index"]), int(case["image_token_length"])
    keep = 1 - round(float(case["p"]), 6)
    pruning = DynamicPruning(torch.arange(first, first + visual), keep, reuse=False)
    for step in range(int(case["n_steps"])):
        attended = pruning.step(torch.from_numpy(case[f"attn_mean_step{step}"]))
        assert attended.tolist() == case[f"attended_index_step{step}"].tolist()
        assert pruning.similarity == pytest.approx(float(case["similarity"][step]), abs=1e-5)


def test_the_earlier_subset_serves_while_attention_stays_as_it_is() -> None:
    pruning = DynamicPruning(torch.arange(2, 6), keep=0.5)
    assert pruning.step(torch.tensor([0.1, 0.1, 0.3, 0.0, 0.5, 0.1, 0.1])).tolist() == [0, 1, 2, 4, 6]
    alike = torch.tensor([0.1, 0.1, 0.3, 0.0, 0.5, 0.31, 0.1, 0.2])  # others would be best now
    assert pruning.step(alike).tolist() == [0, 1, 2, 4, 6, 7]
    assert pruning.similarity >= 0.9
    changed = torch.tensor([0.1, 0.1, 0.0, 0.9, 0.0, 0.8, 0.1, 0.2, 0.1])
    assert pruning.step(changed).tolist() == [0, 1, 3, 5, 6, 7, 8]
