import pytest
import torch

from foveate.vlm.pruning.hired import HiRED, parts, share_budget
from foveate.vlm.pruning.tower_reading import Cut
from foveate.vlm.pruning.towers import VisualMap

from . import oracle


def cut_image(first: torch.Tensor, last: torch.Tensor, cut: Cut | None) -> VisualMap:
    """Of attention [tiles, tokens] of both layers."""
    tile = torch.arange(len(first)).repeat_interleave(first.shape[1])
    return VisualMap(tile, torch.stack([first.flatten(), last.flatten()]), None, False, cut)


def test_hired_equals_the_reference_program():
    case = oracle.load("hired_r40_a50")
    cut = Cut(grid=(2, 2), cells=(6, 6), whole=0)
    image = cut_image(case["top_cls_heads"].sum(1), case["bottom_cls_heads"].sum(1), cut)
    choice = HiRED(keep=0.4, alpha=0.5, strips=True).choose(image)
    mask = torch.zeros(5 * 36, dtype=torch.bool)
    mask[choice.keep] = True
    assert torch.equal(mask.view(5, 36), case["mask"])
    strips = parts((6, 6), (2, 2), strips=True)
    budgets = share_budget(case["top_cls_heads"][0].sum(0), strips, 4, case["total_budget"], 0.5)
    assert budgets == [case["full_budget"], *case["sub_budgets"].tolist()]


def test_parts_of_the_whole_image_are_what_its_tiles_show():
    assert (
        parts((4, 6), (2, 3), strips=False).view(4, 6).tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    )
    assert parts((3, 3), (1, 2), strips=False).view(3, 3).tolist() == [[0, 1, 1]] * 3  # by a token's middle


@pytest.mark.parametrize("whole", [0, 4])
def test_tiles_share_the_budget_by_where_the_whole_image_is_looked_at(whole):
    first = torch.zeros(5, 16)
    best = [2, 3, 6, 7, 8, 12]  # upper right quadrant, then two of the lower left
    first[whole, best] = torch.tensor([9.0, 8, 7, 6, 5, 4])
    last = torch.rand(5, 16)
    choice = HiRED(keep=0.3, alpha=0.625).choose(cut_image(first, last, Cut((2, 2), (4, 4), whole)))
    cut = [tile for tile in range(5) if tile != whole]
    # 24 of 80 tokens stay, int(24 · 0.625) = 15 of the whole; its int(16 · 0.375) = 6 best are 4 and 2 in two tiles.
    expected = {whole: 15, cut[0]: 0, cut[1]: 6, cut[2]: 3, cut[3]: 0}
    for tile, budget in expected.items():
        kept = choice.keep[choice.keep // 16 == tile] % 16
        assert kept.tolist() == sorted(last[tile].topk(budget).indices.tolist())


def test_without_a_tile_of_the_whole_image_each_keeps_the_same():
    last = torch.rand(3, 10)
    choice = HiRED(keep=0.25).choose(cut_image(torch.rand(3, 10), last, None))
    expected = [10 * tile + i for tile in range(3) for i in sorted(last[tile].topk(2).indices.tolist())]
    assert choice.keep.tolist() == expected


def test_fields_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        HiRED(alpha=1.5)
    with pytest.raises(ValueError, match=r"keep is -0\.1"):
        HiRED(keep=-0.1)
