"""Methods after the vision tower: what they see of each architecture, what they leave of its features, and no trace."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, LlamaConfig, LlavaOnevisionConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

import foveate
from foveate.vlm import FoveateConfig, FoveateForConditionalGeneration
from foveate.vlm.chat import Chat
from foveate.vlm.pruning.fastervlm import FasterVLM
from foveate.vlm.pruning.hired import HiRED
from foveate.vlm.pruning.tower_reading import READING, Cut
from foveate.vlm.pruning.towers import Choice, TowerPruner, VisualMap, attach
from foveate.vlm.pruning.visionzip import VisionZip
from foveate.vlm.pruning.vtc_cls import VTCCLS
from foveate.vlm.tiling import grid_levels, merge_scales, merge_tiles

from . import oracle, zoo

METHODS = (FasterVLM(keep=0.4), VTCCLS(keep=0.4, start=0), HiRED(keep=0.4), VisionZip(keep=0.4))
NAMES = ("llava", "llava_next", "llava_onevision", "internvl", "smolvlm", "foveate")


@dataclass(frozen=True)
class Watch(TowerPruner):
    """Keeps everything and notes what it sees."""

    seen: list[VisualMap]
    reindex: bool = False
    wants_keys = True

    def layers(self, read: int) -> tuple[int, ...]:
        return tuple(range(read + 1))

    def choose(self, image: VisualMap) -> Choice:
        self.seen.append(image)
        return Choice((image.tile >= 0).nonzero()[:, 0])


def features(model: Any, kind: str, media: dict[str, torch.Tensor], method: TowerPruner | None = None) -> list[Any]:
    """What the LLM reads of each image or video, [columns, D], a method's way or the model's own."""
    function = f"get_{kind}_features"
    with attach(model, method) if method else torch.no_grad(), torch.no_grad():
        pixels = [media[key] for key in media if key.startswith("pixel_values")]  # of any name in transformers 5.17
        more = {key: value for key, value in media.items() if not key.startswith("pixel_values")}
        return list(getattr(getattr(model, "model", model), function)(*pixels, **more).pooler_output)


def media(name: str, kind: str = "image", count: int = 2) -> dict[str, torch.Tensor]:
    """Of a model of the zoo."""
    animal = zoo.animal(name)
    row = animal.row(*[kind] * count)
    row.pop("input_ids")
    if name == "smolvlm":
        row["pixel_values"] = row["pixel_values"][None]
    return row


@contextmanager
def eager(tower: Any):
    before = tower.config._attn_implementation
    tower.config._attn_implementation = "eager"
    yield
    tower.config._attn_implementation = before


def tower_attention(model: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Of each layer's full attention, head mean, the CLS token's row or the mean of all rows: [tiles, patches]."""
    inner = getattr(model, "model", model)
    tower = inner.vision_model if hasattr(inner, "vision_model") else inner.vision_tower
    with eager(tower), torch.no_grad():
        attention = tower(pixels, output_attentions=True).attentions  # [tiles, heads, tokens, tokens] each
    has_cls = "siglip" not in tower.config.model_type and "smol" not in tower.config.model_type
    return [one.mean(1)[:, 0, 1:] if has_cls else one.mean((1, 2)) for one in attention]


def squares(rows: torch.Tensor, side: int, r: int = 2) -> torch.Tensor:
    """Means of r x r squares of maps [tiles, side · side], to [tiles, (side / r)²]."""
    return torch.nn.functional.avg_pool2d(rows.view(-1, 1, side, side), r).flatten(1)


# What methods see.


@pytest.mark.parametrize("name", ["llava", "internvl", "smolvlm", "foveate"])
def test_attention_is_that_of_eager_attention(name):
    model, given, seen = zoo.animal(name).model, media(name), []
    features(model, "image", given, Watch(seen))
    layers = tower_attention(model, given["pixel_values"].flatten(0, -4))
    if name in ("llava", "foveate"):
        layers = layers[:-1]  # the last layer's output is not read
    if name != "llava":
        layers = [squares(layer, side=8) for layer in layers]
    assert sum(len(image.tile) for image in seen) == 2 * 16
    got = torch.cat([image.attention for image in seen], dim=1)
    torch.testing.assert_close(got, torch.stack([layer.flatten() for layer in layers]))
    assert got.std() / got.mean() > 0.1  # far from uniform
    for image in seen:  # SmolVLM's images of one sample come as one
        assert image.tile.tolist() == [i for i in range(len(image.tile) // 16) for _ in range(16)]


def test_llava_next_rows_of_tiles_and_newlines_are_told_apart():
    """Two images: tiles side by side, and one below the other, whose padding above and below is cut off."""
    model, seen = zoo.animal("llava_next").model, []
    given = {"pixel_values": torch.randn(2, 3, 3, 8, 8).double(), "image_sizes": torch.tensor([[8, 16], [9, 8]])}
    features(model, "image", given, Watch(seen))
    [attention, _] = tower_attention(model, given["pixel_values"].flatten(0, 1))  # [6 tiles, 4]
    nan = [math.nan]
    a, b, c = attention[:3].tolist()
    wide = [*a, *b[:2], *c[:2], *nan, *b[2:], *c[2:], *nan]
    d, e, f = attention[3:].tolist()
    tall = [*d, *e[2:], *nan, *f[:2], *nan]  # of the four rows the first and the last are padding
    for image, expected in zip(seen, (wide, tall), strict=True):
        torch.testing.assert_close(image.attention[0], torch.tensor(expected).double(), equal_nan=True)
    assert seen[0].tile.tolist() == [0] * 4 + [1, 1, 2, 2, -1] * 2
    assert seen[1].tile.tolist() == [0] * 4 + [1, 1, -1, 2, 2, -1]
    assert [image.cut.grid for image in seen] == [(1, 2), (2, 1)]


def onevision(**options: Any) -> Any:
    """Tiles of 3 x 3 tokens, up to 3 x 4 of them, shrunk to one tile's worth."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(image_size=12, patch_size=4, vision_use_head=False, **sizes),
        text_config=LlamaConfig(vocab_size=48, **sizes),
        image_grid_pinpoints=[[36, 48], [12, 12]],
        vision_aspect_ratio="anyres_max_1",
        **options,
    )
    model = LlavaOnevisionModel(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def test_onevision_shrunk_maps_are_interpolated():
    model, seen = onevision(), []
    given = {"pixel_values": torch.randn(1, 13, 3, 12, 12).double(), "image_sizes": torch.tensor([[36, 48]])}
    [reduced] = features(model, "image", given, Watch(seen))
    rows = tower_attention(model, given["pixel_values"][0])[-1]
    whole = merge_tiles(rows[1:].view(12, 3, 3, 1), (3, 4))[..., 0]  # [9, 12]
    small = torch.nn.functional.interpolate(whole[None, None], (2, 3), mode="bilinear")[0, 0]
    expected = torch.cat([rows[0], torch.nn.functional.pad(small, (0, 1), value=math.nan).flatten()])
    torch.testing.assert_close(seen[0].attention[-1], expected, equal_nan=True)
    # Centres of the small map's cells, in tiles of the grid: rows 0.75 and 2.25, columns 0.67, 2, and 3.33.
    assert seen[0].tile.tolist() == [0] * 9 + [1, 2, 4, -1, 9, 10, 12, -1]
    assert bool(reduced.isfinite().all())


def test_onevision_cuts_the_only_image_of_a_sample():
    model, seen = zoo.animal("llava_onevision").model, []
    given = {"pixel_values": torch.randn(3, 2, 3, 12, 12).double(), "image_sizes": torch.tensor([[12, 12]] * 3)}
    features(model, "image", given | {"batch_num_images": torch.tensor([1, 2])}, Watch(seen))
    assert [image.cut and image.cut.grid for image in seen] == [(1, 1), None, None]
    assert [image.tile.tolist() for image in seen[1:]] == [[0] * 9 + [-1]] * 2


def test_onevision_video_frames_are_tiles():
    model, seen = zoo.animal("llava_onevision").model, []
    given = media("llava_onevision", "video")
    features(model, "video", given, Watch(seen))
    rows = tower_attention(model, given["pixel_values_videos"].flatten(0, 1))[-1]
    pooled = torch.nn.functional.interpolate(rows.view(6, 1, 3, 3), (2, 2), mode="bilinear").view(2, 12)
    for image, expected in zip(seen, pooled, strict=True):
        torch.testing.assert_close(image.attention[-1, :12], expected)
        assert image.tile[:12].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert set(image.tile[12:].tolist()) <= {-1}  # a newline, in some versions


@pytest.mark.parametrize("name", ["siglip2_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit"])
def test_foveate_reads_many_towers(tiny, name):
    model, seen = tiny.model(name, projector="mlp2x", tiling="resize", vision_feature_layer=-2), []
    pixels = torch.randn(3, 3, 16, 16)
    features(model, "image", {"pixel_values": pixels}, Watch(seen))
    inputs = {"pixel_values": pixels}
    if name.startswith("siglip2"):
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(3, 16, 48)
        shapes, mask = torch.tensor([[4, 4]] * 3), torch.ones(3, 16, dtype=torch.long)
        inputs = {"pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": mask}
    with eager(model.vision_tower), torch.no_grad():
        attention = model.vision_tower(**inputs, output_attentions=True).attentions
    for layer in range(2):
        rows = attention[layer].mean(1)
        rows = rows.mean(1) if name.startswith("siglip2") else rows[:, 0, -16:]
        torch.testing.assert_close(torch.stack([image.attention[layer] for image in seen]), rows)


NATIVE = {"siglip2_vision_model": {"num_patches": 16, "vision_use_head": False}, "pixtral": {"image_size": 64}}


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("projector", ["mlp2x", "pool-2x2"])
def test_images_of_any_size(tiny, name, projector):
    """More than one run of the tower, of other longest images each."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = AutoConfig.for_model(name, patch_size=4, **sizes | NATIVE[name])
    config = FoveateConfig(vision, tiny.llm("qwen2", 48), projector, tiling="native", vision_feature_layer=-1)
    model, seen = FoveateForConditionalGeneration(config).eval(), []
    tiny.randomise(model)
    grids = torch.tensor([[2, 4]] * (33 if name == "siglip2_vision_model" else 1) + [[4, 6], [3, 2]])
    pixels = torch.randn(int(grids.prod(1).sum()), 3, 4, 4)
    given = {"pixel_values": pixels, "image_grids": grids}
    features(model, "image", given, Watch(seen))
    for index in (0, len(grids) - 3, len(grids) - 2, len(grids) - 1):
        rows, columns = grids[index].tolist()
        patches = pixels[int(grids[:index].prod(1).sum()) :][: rows * columns]
        if name == "pixtral":
            whole = merge_tiles(patches.permute(0, 2, 3, 1), (rows, columns)).permute(2, 0, 1)[None]
            inputs = {"pixel_values": whole, "image_sizes": torch.tensor([whole.shape[-2:]])}
        else:
            flat = patches.permute(0, 2, 3, 1).flatten(1)[None]
            inputs = {"pixel_values": flat, "spatial_shapes": grids[index : index + 1]}
            inputs["pixel_attention_mask"] = torch.ones(flat.shape[:2]).long()
        with eager(model.vision_tower), torch.no_grad():
            expected = model.vision_tower(**inputs, output_attentions=True).attentions[-1].mean((1, 2))
        if projector == "pool-2x2":
            maps = expected.view(1, rows, columns)
            expected = torch.nn.functional.avg_pool2d(maps, 2, ceil_mode=True).flatten()[None]
        torch.testing.assert_close(seen[index].attention[-1], expected[0])
    before, after = features(model, "image", given), features(model, "image", given, VisionZip(keep=0.5))
    assert [int(one.isfinite().all(-1).sum()) for one in after] == [round(len(one) / 2) for one in before]


def test_s2_scores_are_means_over_scales(tiny):
    model, seen = tiny.model(tiling="dynamic-s2", s2_scales=(16, 32), projector="downsample-3x3"), []
    grid, levels = (1, 2), grid_levels("dynamic-s2", (1, 2), (1, 2))
    pixels = torch.randn(3, 3, 16, 16)
    given = {"pixel_values": pixels, "image_grids": torch.tensor([grid])}
    features(model, "image", given, Watch(seen))
    rows = tower_attention(model, pixels)[1]  # layer -2
    blocks = merge_scales(rows.view(3, 4, 4, 1), levels, grid).mean(-1)  # [2, 4, 4]
    # 3 x 3 patches make a token; those at the right and below are of one row or column.
    means = [[[b[i : i + 3, j : j + 3].mean() for j in (0, 3)] for i in (0, 3)] for b in blocks]
    expected = merge_tiles(torch.tensor(means)[..., None], grid).flatten()
    torch.testing.assert_close(seen[0].attention[1], expected)
    assert seen[0].tile.tolist() == [0] * 8  # one map


def test_smolvlm_padding_is_no_rater_and_receives_nothing():
    model, seen = zoo.animal("smolvlm").model, []
    pixels, mask = torch.randn(1, 2, 3, 32, 32).double(), torch.ones(1, 2, 32, 32, dtype=torch.bool)
    mask[0, 0, 20:] = mask[0, 0, :, 24:] = False
    with attach(model, Watch(seen)), torch.no_grad():
        model.get_image_features(pixels, mask)
    real = torch.zeros(2, 8, 8, dtype=torch.bool)
    real[0, :5, :6] = real[1] = True
    tower = model.model.vision_model
    with eager(tower), torch.no_grad():
        attention = tower(pixels[0], patch_attention_mask=real, output_attentions=True).attentions[-1].mean(1)
    rows = torch.stack([one[some].mean(0) for one, some in zip(attention, real.flatten(1), strict=True)])
    got = torch.cat([image.attention[-1] for image in seen])
    torch.testing.assert_close(got, squares(rows, side=8).flatten())


# What they leave.


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("name", NAMES)
def test_kept_features_are_the_models_own_and_dropped_ones_nan(name, method):
    model, given = zoo.animal(name).model, media(name)
    plain, reduced = features(model, "image", given), features(model, "image", given, method)
    assert len(plain) == len(reduced)
    for before, after in zip(plain, reduced, strict=True):
        dropped = after.isnan().all(-1)
        assert torch.equal(after[~dropped], before[~dropped])
        assert bool(dropped.any())


@pytest.mark.parametrize(
    ("name", "kept"), [("llava", 6), ("llava_next", 2 + 2 + 2 + 2), ("llava_onevision", 4 + 4 + 3)]
)
def test_each_tile_keeps_its_share_and_newlines_stay(name, kept):
    for image in features(zoo.animal(name).model, "image", media(name), FasterVLM(keep=0.4)):
        assert int(image.isfinite().all(-1).sum()) == kept


def test_the_best_tokens_of_a_tile_are_kept():
    model, given = zoo.animal("llava").model, media("llava", count=3)
    first = tower_attention(model, given["pixel_values"])[0]
    for method in (FasterVLM(keep=0.25), VTCCLS(keep=0.25)):  # one layer is read of two
        for image, scores in zip(features(model, "image", given, method), first, strict=True):
            assert image.isfinite()[:, 0].nonzero()[:, 0].tolist() == sorted(scores.topk(4).indices.tolist())


def test_fastervlm_equals_the_reference_program():
    case = oracle.load("fastervlm_t16")
    scores = case["cls_attn_heads"][0].mean(0)
    torch.testing.assert_close(scores, case["scores"][0], rtol=0, atol=1e-6)
    image = VisualMap(torch.zeros(64, dtype=torch.long), scores[None], None, False, None)
    kept = FasterVLM(keep=16 / 64).choose(image).keep
    assert kept.tolist() == case["kept"][0].tolist()
    torch.testing.assert_close(case["features"][0, kept], case["output"][0], rtol=0, atol=0)


def test_vtc_cls_sums_layers(tiny):
    model = tiny.model("clip_vision_model", projector="linear", vision_feature_layer=None)
    pixels = torch.randn(2, 3, 16, 16)
    layers = tower_attention(model, pixels)
    scores = layers[1] + layers[2]
    for image, one in zip(
        features(model, "image", {"pixel_values": pixels}, VTCCLS(0.25, start=1)), scores, strict=True
    ):
        assert image.isfinite()[:, 0].nonzero()[:, 0].tolist() == sorted(one.topk(4).indices.tolist())
    with pytest.raises(ValueError, match="start is 3"):
        attach(model, VTCCLS(start=3))


def test_hired_gives_tiles_what_the_whole_image_shows(tiny):
    model, seen = tiny.model("clip_vision_model", projector="linear", tiling="tiles"), []
    given = {"pixel_values": torch.randn(3, 3, 16, 16), "image_grids": torch.tensor([[1, 2]])}
    features(model, "image", given, Watch(seen))
    first, last = seen[0].attention.view(2, 3, 16)  # of layers 0 and 1 of 3: left, right, and the whole image
    [image] = features(model, "image", given, HiRED(keep=0.5, alpha=0.25))
    best = first[2].topk(12).indices.tolist()  # of 24 tokens 6 are of the whole image
    budgets = [sum(i % 4 // 2 == side for i in best) * 18 // 12 for side in (0, 1)] + [6]
    assert budgets[0] != budgets[1] and max(budgets) < 16
    expected = [16 * t + i for t in range(3) for i in sorted(last[t].topk(budgets[t]).indices.tolist())]
    assert image.isfinite().all(-1).nonzero()[:, 0].tolist() == expected


def zipped(x: torch.Tensor, keys: torch.Tensor, scores: torch.Tensor, dominant: int, contextual: int) -> dict[str, Any]:
    """VisionZip of tokens x [tokens, C], token by token."""
    top = sorted(scores.topk(dominant).indices.tolist())
    rest = [i for i in range(len(x)) if i not in top]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    others = [i for i in rest if i not in targets]
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in others:
        members[max(targets, key=lambda t: torch.cosine_similarity(keys[i], keys[t], dim=0).item())].append(i)
    merged = [x[t] + x[members[t]].mean(0) if members[t] else x[t] for t in targets]
    return {"top": top, "targets": targets, "first": others[0], "merged": merged}


def own_keys(tower: Any, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """A layer's keys, head mean, [tiles, tokens, head_dim]."""
    noted = []
    block = next(m for m in tower.modules() if isinstance(m, torch.nn.ModuleList))[layer]
    project = next(module for name, module in block.named_modules() if name.endswith("k_proj"))
    hook = project.register_forward_hook(lambda module, args, output: noted.append(output))
    with torch.no_grad():
        tower(pixels)
    hook.remove()
    heads = tower.config.num_attention_heads
    return noted[0].unflatten(-1, (heads, -1)).mean(-2)


@pytest.mark.parametrize("reindex", [True, False])
def test_visionzip_merges_tower_tokens_and_passes_the_cls_token(reindex):
    model, given = zoo.animal("llava").model, media("llava")
    tower, pixels = model.model.vision_tower, given["pixel_values"]
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states[-2]
    keys, scores = own_keys(tower, pixels, 0), tower_attention(model, pixels)[0]
    plain = features(model, "image", given)
    reduced = features(model, "image", given, VisionZip(dominant=5, contextual=3, reindex=reindex))
    for i, image in enumerate(reduced):
        expected = zipped(states[i, 1:], keys[i, 1:], scores[i], dominant=4, contextual=3)
        with torch.no_grad():
            cls, *merged = model.model.multi_modal_projector(torch.stack([states[i, 0], *expected["merged"]])[None])[0]
        tokens = dict(zip(expected["targets"], merged, strict=True)) | {expected["first"]: cls}
        tokens |= {top: plain[i][top] for top in expected["top"]}
        kept = image.isfinite().all(-1).nonzero()[:, 0].tolist()
        assert kept == sorted(tokens)
        order = [expected["first"], *expected["top"], *expected["targets"]] if reindex else kept
        torch.testing.assert_close(image[kept], torch.stack([tokens[column] for column in order]))


def test_visionzip_merges_projected_features_where_columns_are_several_tokens():
    model, given = zoo.animal("internvl").model, media("internvl")
    tower, pixels = model.model.vision_tower, given["pixel_values"]
    keys = own_keys(tower, pixels, 1)[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    keys = torch.nn.functional.avg_pool2d(keys, 2).flatten(2).mT
    scores = squares(tower_attention(model, pixels)[1], side=8)
    plain = features(model, "image", given)
    reduced = features(model, "image", given, VisionZip(dominant=5, contextual=3, reindex=False))
    for image, before, key, score in zip(reduced, plain, keys, scores, strict=True):
        expected = zipped(before, key, score, dominant=5, contextual=3)
        tokens = dict(zip(expected["targets"], expected["merged"], strict=True))
        tokens |= {top: before[top] for top in expected["top"]}
        kept = image.isfinite().all(-1).nonzero()[:, 0].tolist()
        assert kept == sorted(tokens)
        torch.testing.assert_close(image[kept], torch.stack([tokens[column] for column in kept]))


def test_visionzip_passes_cls_tokens_of_tiles_in_one_run_alone():
    """The tiles of a packed map alternate, row by row: they have none, and their tokens stay where they are."""
    model, given = zoo.animal("llava_next").model, media("llava_next", count=1)
    tower, pixels = model.model.vision_tower, given["pixel_values"][0]
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states[-2]
    keys, scores = own_keys(tower, pixels, 0), tower_attention(model, pixels)[0]
    [plain], [image] = features(model, "image", given), features(model, "image", given, VisionZip(2, 1))
    columns = [[0, 1, 2, 3], [4, 5, 9, 10], [6, 7, 11, 12]]
    for tile in range(3):
        expected = zipped(states[tile, 1:], keys[tile, 1:], scores[tile], dominant=1 if tile == 0 else 2, contextual=1)
        with torch.no_grad():
            cls, merged = model.model.multi_modal_projector(torch.stack([states[tile, 0], *expected["merged"]])[None])[
                0
            ]
        top, [target] = [columns[tile][i] for i in expected["top"]], [columns[tile][i] for i in expected["targets"]]
        kept = [column for column in columns[tile] if bool(image[column].isfinite().all())]
        if tile == 0:
            assert kept == sorted([columns[0][expected["first"]], *top, target])
            torch.testing.assert_close(image[kept], torch.stack([cls, plain[top[0]], merged]))
        else:
            assert kept == sorted([*top, target])
            torch.testing.assert_close(image[[*top, target]], torch.stack([*plain[top], merged]))


def test_visionzip_merges_pooled_columns_as_they_are():
    model, given = zoo.animal("llava_onevision").model, media("llava_onevision", "video", count=1)
    pixels = given["pixel_values_videos"][0]
    keys = own_keys(model.model.vision_tower, pixels, 1).view(3, 3, 3, -1).permute(0, 3, 1, 2)
    keys = torch.nn.functional.interpolate(keys, (2, 2), mode="bilinear").flatten(2).mT
    scores = tower_attention(model, pixels)[-1].view(3, 1, 3, 3)
    scores = torch.nn.functional.interpolate(scores, (2, 2), mode="bilinear").flatten(1)
    [plain] = features(model, "video", given)
    [video] = features(model, "video", given, VisionZip(dominant=1, contextual=1, reindex=False))
    for frame in range(3):
        before, after = (x[4 * frame : 4 * frame + 4] for x in (plain, video))
        expected = zipped(before, keys[frame], scores[frame], dominant=1, contextual=1)
        kept = [expected["top"][0], expected["targets"][0]]
        torch.testing.assert_close(after[kept], torch.stack([before[kept[0]], expected["merged"][0]]))
        assert int(after.isnan().all(-1).sum()) == 2


def test_visionzip_leaves_tiles_within_their_budget_as_they_are():
    model, given = zoo.animal("llava").model, media("llava")
    for before, after in zip(
        features(model, "image", given), features(model, "image", given, VisionZip(12, 4)), strict=True
    ):
        assert torch.equal(before, after)


FOVEATE: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = [
    ({"projector": "linear", "tower_name": "clip_vision_model", "vision_feature_select_strategy": "full"}, {}),
    ({"projector": "pool-2x2", "token_order": "columns"}, {}),
    ({"projector": "mlp2x", "tiling": "tiles"}, {"image_grids": torch.tensor([[1, 2], [2, 1]])}),
    (
        {"projector": "mlp2x", "tiling": "anyres", "anyres_max_tiles": 1},
        {"image_grids": torch.tensor([[1, 2], [2, 2]]), "image_sizes": torch.tensor([[10, 32], [32, 32]])},
    ),
    ({"tiling": "s2", "s2_scales": (16, 32), "token_order": "columns"}, {"image_grids": torch.tensor([[1, 1]] * 2)}),
    ({"tiling": "dynamic-s2", "s2_scales": (16, 32)}, {"image_grids": torch.tensor([[1, 2], [2, 2]])}),
]
TILES = [2, 2, 6, 8, 10, 8]


@pytest.mark.parametrize(("case", "tiles"), list(zip(FOVEATE, TILES, strict=True)), ids=lambda case: str(case)[:40])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_foveate_tilings(tiny, case, tiles, method):
    options, layout = case
    model = tiny.model(**options)
    given = {"pixel_values": torch.randn(tiles, 3, 16, 16)} | layout
    plain, reduced = features(model, "image", given), features(model, "image", given, method)
    for before, after in zip(plain, reduced, strict=True):
        kept = after.isfinite().all(-1)
        assert torch.equal(kept, ~after.isnan().any(-1))
        assert 0.25 * len(before) <= int(kept.sum()) < 0.7 * len(before)
        if not isinstance(method, VisionZip):
            assert torch.equal(after[kept], before[kept])
    if options.get("vision_feature_select_strategy") == "full":
        for before, after in zip(plain, reduced, strict=True):  # the CLS token stays, once
            assert after.isclose(before[0], atol=1e-5).all(-1).nonzero().tolist() == [[0]]


@pytest.mark.parametrize("thumbnail", [True, False])
def test_foveate_tells_how_images_are_cut(tiny, thumbnail):
    model, seen = tiny.model(projector="downsample-3x3", tiling="tiles", thumbnail=thumbnail), []
    grids = torch.tensor([[1, 1], [2, 1]])
    features(model, "image", {"pixel_values": torch.randn(3 + thumbnail, 3, 16, 16), "image_grids": grids}, Watch(seen))
    assert [image.cut for image in seen] == [None, Cut((2, 1), (2, 2), whole=2) if thumbnail else None]


def test_foveate_frames_are_tiles_and_pooled_scores_are_means(tiny):
    model, seen = tiny.model(projector="pool-2x2", video_pool=(2, 1, 1)), []
    given = {"pixel_values_videos": torch.randn(5, 3, 16, 16), "video_grids": torch.tensor([[5, 1, 1]])}
    features(model, "video", given, Watch(seen))
    rows = squares(tower_attention(model, given["pixel_values_videos"])[1], side=4)
    expected = torch.cat([rows[:2].mean(0), rows[2:4].mean(0), rows[4]])
    torch.testing.assert_close(seen[0].attention[1], expected)
    assert [len(columns) for columns in seen[0].tiles().values()] == [4, 4, 4]


def test_more_tiles_than_are_traced_at_once(tiny):
    model, seen = tiny.model(projector="downsample-2x2"), []
    features(model, "video", {"pixel_values_videos": torch.randn(70, 3, 16, 16)}, Watch(seen))
    assert seen[0].tile.tolist() == [frame for frame in range(70) for _ in range(4)]


# Where they act, and that nothing stays.


def test_chat_encodes_within_a_session(tiny):
    model, processor = tiny.model(), tiny.processor()
    with attach(model, FasterVLM(keep=0.5)):
        chat = Chat(model, processor, [tiny.image(0), tiny.image(1)])
    assert int(chat.features["image_features"].isnan().all(-1).sum()) == 2 * 2


def state(model: Any) -> list[Any]:
    modules = [(id(module), sorted(vars(module))) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    tower = getattr(getattr(model, "model", model), "vision_tower", None)
    return [
        modules,
        hooks,
        sorted(ALL_ATTENTION_FUNCTIONS),
        tower.config._attn_implementation,
        dict(model.named_parameters()),
    ]


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_exceptions_leave_nothing(name):
    model, given = zoo.animal(name).model, media(name)
    tower = model.model.vision_tower
    features(model, "image", given)  # transformers puts hooks of its own in the first time
    tower(given["pixel_values"].flatten(0, -4), output_hidden_states=True)
    before = {key: id(value) for key, value in state(model)[-1].items()}, state(model)[:-1]
    for break_down in ("attention", "method", "projector"):
        patched = pytest.MonkeyPatch()

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise KeyError("broken")

        method: TowerPruner = FasterVLM()
        if break_down == "attention":
            patched.setattr(type(tower.encoder.layers[0].self_attn.out_proj), "forward", fail)
        elif break_down == "projector":
            patched.setattr(type(model.model.multi_modal_projector), "forward", fail)
        else:
            patched.setattr(FasterVLM, "choose", fail)
        with pytest.raises(KeyError, match="broken"):
            features(model, "image", given, method)
        patched.undo()
        after = {key: id(value) for key, value in state(model)[-1].items()}, state(model)[:-1]
        assert after == before and READING not in ALL_ATTENTION_FUNCTIONS


def test_attention_functions_see_their_own_name():
    """Flash attention loads its kernel by it."""
    model, given, names = zoo.animal("llava").model, media("llava"), []

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(module.config._attn_implementation)
        return AttentionInterface()["sdpa"](module, *args, **kwargs)

    AttentionInterface.register("own_name", attention)
    config = model.model.vision_tower.config
    config._attn_implementation = "own_name"
    try:
        features(model, "image", given, VisionZip(keep=0.5))
    finally:
        config._attn_implementation = "sdpa"
        del AttentionInterface._global_mapping["own_name"]
    assert names == ["own_name"] * 2


def test_features_that_are_not_finite_are_an_error():
    given = media("llava", count=1)
    given["pixel_values"][0, 0, 0, 0] = math.nan
    with pytest.raises(RuntimeError, match="medium 0 are not finite"):
        features(zoo.animal("llava").model, "image", given, FasterVLM())


def test_what_cannot_work_is_refused_at_once(tiny):
    for name in ("qwen2_5_vl", "qwen3_vl"):
        with pytest.raises(ValueError, match=f"'{name}'.*accepted: llava, llava_next"):
            attach(zoo.animal(name).model, FasterVLM())
    with pytest.raises(ValueError, match="projector 'resampler'"):
        attach(tiny.model(projector="resampler", resampler_tokens=4), FasterVLM())
    with pytest.raises(ValueError, match="vision tower 'sam_vision_model'; accepted: clip_vision_model"):
        attach(tiny.model("sam_vision_model"), FasterVLM())
    with pytest.raises(ValueError, match="vision_feature_layer is 0"):
        attach(tiny.model(vision_feature_layer=0), FasterVLM())
    with (
        pytest.raises(ValueError, match="vision_feature_layer is -1; accepted while pruning: -2"),
        attach(zoo.animal("llava").model, FasterVLM()),
    ):
        zoo.animal("llava").model.get_image_features(**media("llava"), vision_feature_layer=-1)


# Whole sessions.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [FasterVLM(keep=0.4), VisionZip(keep=0.4)], ids=lambda method: type(method).__name__)
def test_generating_equals_generating_from_embeddings_without_what_is_dropped(name, method):
    animal = zoo.animal(name)
    model: Any = animal.model
    row = animal.row(3, "image", 2, "image", 4)
    inputs = animal.alone(row)
    images = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    kept = torch.cat([one.view(-1, zoo.WIDTH) for one in features(model, "image", images, method)])
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids).masked_scatter((ids == zoo.IMAGE)[..., None], kept)
    embeds = embeds[:, embeds[0].isfinite().all(-1)]
    how = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [zoo.IMAGE, zoo.VIDEO, zoo.PAD]}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]).long(), **how)
    with foveate.reduce(model, replace(method, reindex=True)) as reduced:
        got = reduced.generate(**inputs, **how)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=0, atol=1e-6)
    assert got.sequences[:, ids.shape[1] :].tolist() == expected.sequences.tolist()
