"""EVS against its rule written out frame by frame."""

import numpy as np
import pytest
import torch

from foveate.vlm.pruning.evs import EVS


@pytest.mark.parametrize(("frames", "tokens", "keep"), [(6, 5, 0.5), (9, 4, 0.29), (2, 7, 0.9), (5, 3, 1.0)])
def test_what_changed_most_is_kept_over_the_whole_video(frames: int, tokens: int, keep: float) -> None:
    video = np.random.default_rng(0).normal(size=(frames, tokens, 8))
    changes = {}
    for frame in range(1, frames):
        for token in range(tokens):
            now, before = video[frame, token], video[frame - 1, token]
            changes[frame, token] = 1 - now @ before / np.linalg.norm(now) / np.linalg.norm(before)
    budget = int(frames * tokens * keep + 1e-9) - tokens
    most = set(sorted(changes, key=lambda place: -changes[place])[:budget])
    expected = {(0, token) for token in range(tokens)} | most
    assert {tuple(place) for place in EVS(keep).select(torch.from_numpy(video)).nonzero().tolist()} == expected
    assert len(expected) == int(frames * tokens * keep + 1e-9)


def test_still_frames_lose_everything_and_moving_ones_nothing() -> None:
    still = torch.randn(1, 4, 6)
    video = torch.cat([still, still, -still, -still])
    assert EVS(keep=0.5).select(video).sum(1).tolist() == [4, 0, 4, 0]


@pytest.mark.parametrize("frames", [1, 3])
def test_the_first_frame_stays_whole_whatever_the_budget(frames: int) -> None:
    kept = EVS(keep=0.01).select(torch.randn(frames, 4, 6))
    assert kept[0].all() and not kept[1:].any()


def test_equal_changes_are_kept_in_order_of_time() -> None:
    video = torch.eye(6)[:, None].expand(6, 2, 6)
    assert EVS(keep=0.5).select(video).tolist() == [[True, True]] * 3 + [[False, False]] * 3


def test_what_can_be_no_fraction_is_refused() -> None:
    with pytest.raises(ValueError, match="keep is 2; accepted: a fraction from 0 to 1"):
        EVS(keep=2)
