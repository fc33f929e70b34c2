"""Answers of several ranks about one sequence against those of one process, in fp64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.vlm.encode import encode_video
from foveate.vlm.media import load_video
from foveate.vlm.model import IMAGE_INPUTS, VIDEO_INPUTS
from foveate.vlm.parallel.inference import encode_frames, image_rows, own_images, sequence_parallel, shares
from foveate.vlm.parallel.topology import ParallelError, Topology

from ..test_compression import OPTIONS, made
from . import inference_runs as runs
from .processes import collect

GRIDS = [f"{ulysses} {ring}" for ulysses, ring in runs.GRIDS]
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inference")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each rank of inference_runs.py got."""
    return collect(Path(runs.__file__), folder, runs.RANKS)


def printed(folder: Path, name: str) -> tuple[list[str], list[int]]:
    """What each rank of a command wrote, and the exit codes."""
    codes = json.loads((folder / f"{name} codes").read_text())
    return [(folder / f"{name} {rank}").read_text(errors="replace") for rank in range(len(codes))], codes


@pytest.mark.parametrize("prompt", ["mixed", "one image", "text", "short", "turns"])
@pytest.mark.parametrize("grid", GRIDS)
def test_logits_of_every_step_equal_those_of_one_process(ranks: list[dict[str, Any]], grid: str, prompt: str) -> None:
    """Prompts of two images and two videos, of one image, of text alone, of a token; and later turns."""
    alone = ranks[0][f"{prompt} alone"]
    assert alone["logits"].dtype == torch.float64 and alone["logits"].shape[-2] == runs.STEPS
    for rank in ranks:
        torch.testing.assert_close(rank[f"{prompt} {grid}"]["logits"], alone["logits"], **EXACT)
        assert torch.equal(rank[f"{prompt} {grid}"]["tokens"], alone["tokens"])


def test_logits_of_all_tokens_are_put_together(ranks: list[dict[str, Any]]) -> None:
    alone = ranks[0]["all logits alone"]
    assert alone.shape[1] > 8
    for rank in ranks:
        torch.testing.assert_close(rank["all logits 2 2"], alone, **EXACT)


def test_samples_and_ends_are_those_of_the_first_ranks_random_state(ranks: list[dict[str, Any]]) -> None:
    """Each rank had a seed of its own; the groups are of two ranks."""
    assert not torch.equal(ranks[0]["sampled 100"], ranks[0]["sampled 102"])
    for number, rank in enumerate(ranks):
        assert torch.equal(rank["sampled"], ranks[0]["sampled 100" if number < 2 else "sampled 102"])
        assert torch.equal(rank["stopped 2 2"], ranks[0]["stopped alone"]) and len(rank["stopped 2 2"]) == 2


@pytest.mark.parametrize("grid", GRIDS)
def test_each_rank_encodes_its_frames_and_holds_its_tokens(ranks: list[dict[str, Any]], grid: str) -> None:
    """A chat about a video of 21 frames and an image, two questions: nowhere are there embeddings of all tokens."""
    alone = ranks[0]["chat alone"]
    degree = eval(grid.replace(" ", "*"))
    whole = alone["prompt"]
    assert alone["frames"] == 22 and alone["columns"] == alone["rows"] == whole
    for rank in ranks:
        told = rank[f"chat {grid}"]
        assert told["texts"] == alone["texts"] and told["prompt"] == whole
        assert told["columns"] <= -(-whole // degree) + 2 * degree  # with padding
        assert told["rows"] <= told["columns"]
    for first in range(0, len(ranks), degree):
        group = [rank[f"chat {grid}"] for rank in ranks[first : first + degree]]
        assert sum(told["frames"] for told in group) == 22
        assert max(told["frames"] for told in group) <= 22 / degree + 1  # frames are pooled in pairs
        assert sum(told["held"] for told in group) == alone["held"]
        assert max(told["held"] for told in group) <= 1.15 * alone["held"] / degree


@pytest.mark.parametrize("method", runs.METHODS)
def test_methods_after_the_tower_drop_the_same(ranks: list[dict[str, Any]], method: str) -> None:
    alone = ranks[0][f"{method} alone"]
    assert 0 < len(alone["kept"]) < alone["given"][0]
    for rank in ranks:
        told = rank[f"{method} 2 2"]
        torch.testing.assert_close(told["logits"], alone["logits"], **EXACT)
        assert (told["visual"], told["given"]) == (alone["visual"], alone["given"])
        assert torch.equal(told["kept"], alone["kept"])


@pytest.mark.parametrize("store", ["int8", "int4"])
def test_packed_shares_are_attended_to_as_if_widened(ranks: list[dict[str, Any]], store: str) -> None:
    """One process gets all ranks' columns, dequantised, and says the same of the next tokens."""
    plain = ranks[0]["mixed alone"]["logits"][0]
    for rank in ranks:
        told = rank[f"packed {store}"]
        torch.testing.assert_close(told["logits"], told["reference"], **EXACT)
        assert told["packed"] >= 4 and not torch.allclose(told["logits"][0], plain)


def test_tasks_shared_out_give_what_one_process_finds(ranks: list[dict[str, Any]]) -> None:
    """Three questions to two groups of two ranks."""
    for rank in ranks:
        assert rank["tasks"]["answers"] == ranks[0]["tasks alone"]["answers"]
        assert rank["tasks"]["rows"] == ranks[0]["tasks alone"]["rows"]


def test_what_several_ranks_cannot_do_is_refused_on_all(ranks: list[dict[str, Any]]) -> None:
    refused = ranks[0]["refused"]
    assert {name: message.partition(";")[0] for name, message in refused.items()} == {
        "num_beams": "num_beams is 2",
        "batch": "input_ids is of shape (2, 3)",
        "padding": "attention_mask has padding",
        "cache": "past_key_values is a DynamicCache",
        "max_time": "max_time is 1.0",
        "features": "the text holds 0 video placeholder tokens, but the ranks' shares of the video features are of "
        "[1, 1, 1, 1] tokens",
        "other prompts": "the ranks were given different prompts, of [3, 3, 3, 3] tokens",
    }
    assert all("; accepted" in message for message in refused.values())
    assert all(rank["refused"] == refused for rank in ranks)


@pytest.mark.parametrize(
    ("what", "told"),
    [("bad frame", "clip.mp4: frame 5 can't be decoded"), ("bad image", "an image can't be encoded")],
)
def test_media_that_one_rank_cannot_read_fail_on_all(ranks: list[dict[str, Any]], what: str, told: str) -> None:
    messages = [rank[what] for rank in ranks]
    owner = next(number for number, message in enumerate(messages) if not message.startswith("rank"))
    assert messages == [told if number == owner else f"rank {owner}: {told}" for number in range(runs.RANKS)]


def test_the_first_rank_alone_prints_the_answer(ranks: list[dict[str, Any]], folder: Path) -> None:
    [alone], _ = printed(folder, "ask alone")
    assert alone.strip()
    assert printed(folder, "ask") == ([alone, ""], [0, 0])


def test_eval_tells_each_ranks_memory(ranks: list[dict[str, Any]], folder: Path) -> None:
    texts, codes = printed(folder, "eval")
    assert codes == [0, 0] and texts[1] == ""
    one, two = (json.loads((folder / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one["results"] == two["results"] and one["by_depth"] == two["by_depth"]
    assert two["parallel"] == {"ulysses": 2, "ring": 1, "processes": 2}
    assert "--ulysses 2 --ring 1" in two["command"]
    assert len(two["ranks"]) == 2 and texts[0].count("peak memory") == 2
    for of_rank in two["ranks"]:
        assert of_rank["kv_bytes"] <= 0.6 * one["kv_bytes"]
        assert of_rank["peak_bytes"] >= of_rank["loaded_bytes"] > 1e8


def test_ranks_that_share_a_clip_answer_the_needle_grid_as_one_does(ranks: list[dict[str, Any]], folder: Path) -> None:
    texts, codes = printed(folder, "grid")
    assert codes == [0, 0] and texts[1] == ""
    one, two = (json.loads((folder / name / "metrics.json").read_text()) for name in ("grid-one", "grid-two"))
    assert one["answers"] == two["answers"] and [len(said) for said in two["answers"].values()] == [2]
    assert two["parallel"] == {"ulysses": 2, "ring": 1, "processes": 2}
    [kv_one], [kv_two] = ([e["value"] for e in m["rows"][0]["results"] if e["name"] == "KV cache"] for m in (one, two))
    assert kv_two <= 0.6 * kv_one


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too many", "foveate ask: Invalid value: --ulysses 1 --ring 1 are for 1 process, but there are 2; accepted: "),
        ("too few", "foveate ask: Invalid value: --ulysses 4 --ring 1 are for 4 processes, but there is 1; accepted: "),
        ("refused", "foveate: FastV drops tokens between the LLM's layers, where they lie on several ranks; "),
    ],
)
def test_a_command_that_cannot_work_says_so_once(
    ranks: list[dict[str, Any]], folder: Path, name: str, message: str
) -> None:
    texts, codes = printed(folder, name)
    assert set(codes) == {2}
    assert texts[0].startswith(message) and texts[0].count("\n") == 1
    assert not any(texts[1:])


def test_a_killed_process_ends_the_others_with_one_line(ranks: list[dict[str, Any]], folder: Path) -> None:
    texts, codes = printed(folder, "lost")
    assert codes == [1, -9]
    assert texts[0].startswith("foveate: process 1 of 2") and texts[0].count("\n") == 1 and texts[1] == ""


def test_what_fails_in_one_group_alone_is_told_by_it(ranks: list[dict[str, Any]], folder: Path) -> None:
    texts, codes = printed(folder, "failed")
    assert texts == ["", "foveate: clip 7 can't be decoded\n"]
    assert codes[1] == 2 and codes[0] != 0


def test_shares_are_runs_of_equal_costs() -> None:
    """By hand: costs 4, 4, then pairs of frames of 2, 2, 2 and 1 (the last has one frame), then 2."""
    got = shares([4, 4], [(7, 1.0), (2, 1.0)], 2, 4)
    assert [list(share.images) for share in got] == [[0], [1], [], []]
    assert [[list(frames) for frames in share.frames] for share in got] == [
        [[], []],
        [[], []],
        [[0, 1, 2, 3], []],
        [[4, 5, 6], [0, 1]],
    ]
    assert sorted(len(share.frames[0]) for share in shares([], [(1, 1.0)], 2, 3)) == [0, 0, 1]


@pytest.mark.parametrize("name", OPTIONS)
def test_shares_are_encoded_as_the_whole(tiny: Any, name: str) -> None:
    """Four images and two clips by three ranks, with every tiling; then a file's frames in two parts."""
    model, processor = made(tiny, {"max_tiles": 4}, **OPTIONS[name])
    images = [tiny.image(seed, size) for seed, size in enumerate([(20, 50), (16, 16), (50, 20), (16, 16)])]
    clips = [tiny.frames(seed, count) for seed, count in ((5, 9), (6, 3))]
    inputs = processor(text="<image>" * 4 + "<video>" * 2, images=images, videos=clips, return_tensors="pt")
    config, group = model.config, model.config.video_pool[0]
    rows = image_rows(config, inputs["pixel_values"], inputs.get("image_grids"))
    counts = inputs["video_grids"][:, 0].tolist()
    videos = [(frames, float(height * width)) for frames, height, width in inputs["video_grids"].tolist()]
    got: dict[str, list[torch.Tensor]] = {"images": [], "videos": []}
    with torch.no_grad():
        for share in shares(rows, videos, group, 3):
            some = own_images(config, inputs, share.images)
            got["images"] += model.encode_images(**some) if some else []
            got["videos"] += encode_frames(model, inputs, share.frames, counts)
        wanted = {
            "images": model.encode_images(**{k: v for k, v in inputs.items() if k in IMAGE_INPUTS}),
            "videos": model.encode_videos(**{k: v for k, v in inputs.items() if k in VIDEO_INPUTS}),
        }
        for kind, features in wanted.items():
            torch.testing.assert_close(torch.cat(got[kind]), torch.cat(features), **EXACT)
        clip = load_video(clips[0])
        plan = processor.plan(videos=[clip])
        parts = [
            encode_video(model, processor, clip, plan.videos[0], plan.video_tiling.tokens_per_tile, part=part)
            for part in (range(4), range(4, 9))
        ]
        torch.testing.assert_close(torch.cat(parts), wanted["videos"][0], **EXACT)


def test_other_models_are_refused() -> None:
    parallel = sequence_parallel(torch.nn.Linear(1, 1), Topology(2, 1, 0, 2))
    with pytest.raises(ParallelError, match="the model is a Linear; accepted: FoveateForConditionalGeneration"):
        parallel.__enter__()
