"""Methods on video features: what is dropped is NaN, all else is as before, and nothing stays on the model."""

from contextlib import suppress
from typing import Any

import pytest
import torch

from foveate.vlm.pruning import reduce
from foveate.vlm.pruning.dycoke import DyCoke
from foveate.vlm.pruning.evs import EVS
from foveate.vlm.pruning.fastv import FastV
from foveate.vlm.pruning.videos import attach

from . import zoo

METHODS = [EVS(keep=0.5), DyCoke(keep=0.5)]


def changed_attributes(model: Any) -> list[str]:
    """What model, base model and decoder have of their own: names, and numbers of hooks."""
    patched = ("generate", "encode_videos", "get_video_features", "get_image_features", "_video_reduction")
    return [
        f"{key} {len(value) if 'hook' in key else ''}"
        for module in (model, model.base_model, model.get_decoder())
        for key, value in vars(module).items()
        if key in patched or ("hook" in key and isinstance(value, dict))
    ]


def assert_marked(marked: torch.Tensor, plain: torch.Tensor, kept: torch.Tensor) -> None:
    """NaN in whole rows where nothing is kept [tokens], elsewhere bit for bit as before."""
    assert marked.shape == plain.shape
    assert 0 < kept.sum() < len(kept)
    assert marked[~kept].isnan().all()
    assert torch.equal(marked[kept], plain[kept])


# Inputs of two videos, and (frames, tokens of a frame) of each.
VIDEOS: dict[str, tuple[dict[str, torch.Tensor], list[tuple[int, int]]]] = {
    "foveate": (
        {"pixel_values_videos": torch.randn(7, 3, 16, 16), "video_grids": torch.tensor([[3, 1, 1], [4, 1, 1]])},
        [(3, 16), (4, 16)],
    ),
    "llava_onevision": ({"pixel_values_videos": torch.randn(2, 5, 3, 12, 12)}, [(5, 4), (5, 4)]),
    "qwen2_5_vl": (
        {"pixel_values_videos": torch.randn(24 + 80, 96), "video_grid_thw": torch.tensor([[3, 2, 4], [5, 4, 4]])},
        [(3, 2), (5, 4)],
    ),
}


@pytest.mark.parametrize("method", METHODS, ids=["evs", "dycoke"])
@pytest.mark.parametrize("name", VIDEOS)
def test_each_video_is_thinned_by_itself(name: str, method: Any) -> None:
    model, (inputs, shapes) = zoo.animal(name).model, VIDEOS[name]
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    before = changed_attributes(model)
    plain = model.get_video_features(*inputs.values()).pooler_output
    with attach(model, method):
        marked = model.get_video_features(*inputs.values(), return_dict=True).pooler_output
    assert changed_attributes(model) == before
    assert type(marked) is type(plain)
    for here, there, (frames, tokens) in zip(marked, plain, shapes, strict=True):
        tail = len(there) - frames * tokens
        assert tail in ((0, 1) if name == "llava_onevision" else (0,))  # a newline, that transformers 5.17 adds later
        video = torch.stack([there[f * tokens : (f + 1) * tokens] for f in range(frames)])
        assert_marked(here, there, torch.cat([method.select(video).flatten(), torch.ones(tail, dtype=torch.bool)]))


@pytest.mark.parametrize("name", VIDEOS)
def test_images_stay_as_they_are(name: str) -> None:
    made = zoo.animal(name)
    inputs, _ = made.media["image"]()
    plain = made.model.get_image_features(**inputs).pooler_output
    with attach(made.model, EVS(keep=0.1)):
        again = made.model.get_image_features(**inputs).pooler_output
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("pool", [(2, 1, 1), (2, 2, 1)])
def test_pooled_frames_are_compared_group_by_group(tiny: Any, pool: tuple[int, int, int]) -> None:
    model = tiny.model(video_pool=list(pool), dtype=torch.float64)
    pixels, grids = torch.randn(7, 3, 16, 16, dtype=torch.float64), torch.tensor([[7, 1, 1]])
    with torch.no_grad():
        [plain] = model.encode_videos(pixels, grids)
        with attach(model, EVS(keep=0.6)):
            [marked] = model.encode_videos(pixels, grids)
    assert_marked(marked, plain, EVS(keep=0.6).select(plain.unflatten(0, (4, -1))).flatten())


def test_the_newline_that_ends_a_video_stays(tiny: Any) -> None:
    model = tiny.model(tiling="anyres", projector="mlp2x", dtype=torch.float64)
    pixels, grids = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([[3, 1, 1]])
    with torch.no_grad():
        [plain] = model.encode_videos(pixels, grids)
        with attach(model, EVS(keep=0.4)):
            [marked] = model.encode_videos(pixels, grids)
    assert len(plain) == 3 * 4 + 1
    kept = torch.cat([EVS(keep=0.4).select(plain[:-1].unflatten(0, (3, 4))).flatten(), torch.tensor([True])])
    assert_marked(marked, plain, kept)


def test_frames_whose_video_is_not_known_are_refused(tiny: Any) -> None:
    model = tiny.model()
    with attach(model, EVS()), pytest.raises(ValueError, match=r"video_grids is None.*accepted: \[videos, 3\]"):
        model.encode_videos(torch.randn(4, 3, 16, 16))


# InternVL's frames are images.


def captured_embeds(model: Any, run: Any) -> torch.Tensor:
    """What the LLM's first pass reads, [batch, tokens, D]."""
    seen: list[torch.Tensor] = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["inputs_embeds"]), with_kwargs=True)
    run()
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("how", ["forward", "generate", "beams"])
def test_internvl_frames_are_the_images_of_one_tile_in_a_row(how: str) -> None:
    made = zoo.animal("internvl")
    model = made.model
    image = ["image", 1, "image", 2, "image", 1]  # three frames
    rows = [
        made.row(2, *image, 3),
        made.row(1, "image", 4),
        made.row(1, "image", "image", 1, *image, "image", "image", 2),
    ]
    inputs = made.batch(rows)  # three frames; one image; three frames between images of two tiles
    runs = {
        "forward": lambda: model(**inputs),
        "generate": lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False),
        "beams": lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2),
    }
    plain = captured_embeds(model, runs[how])
    before = changed_attributes(model)
    with attach(model, EVS(keep=0.5)):
        model(**inputs)
        marked = captured_embeds(model, lambda: failing(runs[how]))
    assert changed_attributes(model) == before
    if how == "beams":
        plain, marked = plain[::2], marked[::2]
    visual = inputs["input_ids"] == zoo.IMAGE
    for row, (ids, here, there) in enumerate(zip(visual, marked, plain, strict=True)):
        features, out = there[ids], here[ids].clone()
        assert torch.equal(here[~ids], there[~ids])
        if row == 1:
            assert torch.equal(out, features)  # a single image is no video
            continue
        frames = slice(0, 48) if row == 0 else slice(32, 80)
        video = features[frames].unflatten(0, (-1, 16))
        assert_marked(out[frames], features[frames], EVS(keep=0.5).select(video).flatten())
        if row == 2:  # images of two tiles
            assert torch.equal(out[:32], features[:32]) and torch.equal(out[80:], features[80:])


def failing(run: Any) -> None:
    """NaN goes on to the logits here, where no session drops the columns; sampling may refuse it."""
    with suppress(RuntimeError, ValueError):
        run()


def test_internvl_refuses_embeddings_without_ids() -> None:
    made = zoo.animal("internvl")
    row = made.batch([made.row(2, "image", 1, "image", 1)])
    embeds = made.model.get_input_embeddings()(row.pop("input_ids"))
    with attach(made.model, EVS()), pytest.raises(ValueError, match=r"inputs_embeds were given.*accepted: input_ids"):
        made.model(inputs_embeds=embeds, **row)


# With the session.


@pytest.mark.parametrize("name", ["foveate", "llava_onevision", "qwen2_5_vl", "internvl"])
def test_a_session_reads_what_is_kept(name: str) -> None:
    made = zoo.animal(name)
    video = ["image", 1, "image", 1, "image"] if name == "internvl" else ["video"]
    inputs = made.batch([made.row(2, *video, 4), made.row(3)])
    if name == "foveate":
        inputs["video_grids"] = torch.tensor([[2, 1, 1]])
    method, before = EVS(keep=0.6), changed_attributes(made.model)
    given = int((inputs["input_ids"][0] < zoo.WORDS).sum()) - int((inputs["attention_mask"][0] == 0).sum())
    with reduce(made.model, method, FastV(layer=2, keep=0.5)) as model:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    reduction = reduce(made.model, method, FastV(layer=2, keep=0.5))
    with reduction as model:
        logits = model(**inputs).logits
    assert logits[:, -1].isfinite().all()
    [prefill] = reduction.prefills
    tail = int(name == "llava_onevision")
    kept = int((given - tail) * 0.6) + tail
    assert prefill.given == (given, 0)
    assert [layer[0] for layer in prefill.visual] == [kept, kept] + [round(kept * 0.5)] * 2
    assert [len(stage.kept[0]) for stage in prefill.stages] == [kept, round(kept * 0.5)]
    assert changed_attributes(made.model) == before


# What can't work.


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llava", "'llava' has no inputs for"),
        ("llava_next", "'llava_next' has no inputs for"),
        ("smolvlm", "'smolvlm' reads as images, whose tiles can't be told from frames"),
        ("qwen3_vl", r"'qwen3_vl' adds to its first layers by place \(deepstack\)"),
    ],
)
def test_other_models_are_refused_before_anything_runs(name: str, said: str) -> None:
    model = zoo.animal(name).model
    before = changed_attributes(model)
    with pytest.raises(ValueError, match=f"EVS drops tokens of videos, which model type {said}; accepted: foveate, "):
        attach(model, EVS())
    assert changed_attributes(model) == before


@pytest.mark.parametrize("name", ["foveate", "internvl", "qwen2_5_vl"])
def test_a_second_method_is_refused_and_the_first_is_taken_off(name: str) -> None:
    model = zoo.animal(name).model
    before = changed_attributes(model)
    with pytest.raises(ValueError, match="DyCoke is the second method for videos"), attach(model, EVS()):
        attach(model, DyCoke())
    assert changed_attributes(model) == before
    with attach(model, DyCoke()):
        pass


def test_features_that_are_not_finite_are_a_fault(tiny: Any) -> None:
    model = tiny.model()
    pixels, grids = torch.full((2, 3, 16, 16), torch.inf), torch.tensor([[2, 1, 1]])
    before = changed_attributes(model)
    with pytest.raises(RuntimeError, match="not all finite, so EVS can't mark"), attach(model, EVS()):
        model.encode_videos(pixels, grids)
    assert changed_attributes(model) == before
