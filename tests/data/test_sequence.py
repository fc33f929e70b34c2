"""Packs that several ranks share: each reads its own images and frames, and all hold the same documents."""

import io
import json
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from foveate.data.document import Document, DocumentError, Image, Text, Video
from foveate.data.encoding import encode, plan_document
from foveate.data.glyphs import encode_mp4
from foveate.data.loader import Loader, Packing, Share, Step, TooManyBadError, merge_states
from foveate.data.mixture import Mixture
from foveate.data.packing import Batch, collate
from foveate.data.sequence import SequenceCollate, SequenceMismatchError, media_units, share_units
from foveate.train.build import build_model
from foveate.train.recipe import ModelRecipe
from foveate.vlm import media as media_module
from foveate.vlm.media import load_video
from foveate.vlm.model import FoveateForConditionalGeneration
from foveate.vlm.parallel.topology import Topology
from foveate.vlm.processor import FoveateProcessor

from .ranks import in_threads

VISION = {
    "model_type": "siglip2_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "patch_size": 4, "num_patches": 16, "vision_use_head": False,
}  # fmt: skip
TEXT = {
    "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "resize": {"video_pool": (3, 1, 1), "processor": {"resample": 2}},
    "s2": {"tiling": "s2", "s2_scales": [16, 32]},
    "dynamic-s2": {"tiling": "dynamic-s2", "s2_scales": [16, 32], "projector": "downsample-3x3"},
    "tiles": {"tiling": "tiles", "video_pool": (2, 1, 1)},
    "anyres": {"tiling": "anyres", "projector": "mlp2x"},
    "native": {"tiling": "native", "video_pool": (2, 2, 1), "processor": {"max_patches": 64}},
    "resampler": {"tiling": "tiles", "projector": "resampler", "resampler_tokens": 6},
    "budget": {"tiling": "tiles", "processor": {"max_visual_tokens": 60, "min_frames": 2}},
}
RNG = np.random.default_rng(0)


def made(name: str) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    options = OPTIONS[name] | {
        "processor": {"image_size": (16, 16), "max_tiles": 4} | OPTIONS[name].get("processor", {})
    }
    torch.manual_seed(0)
    model, processor = build_model(ModelRecipe(vision=VISION, text=TEXT, vision_feature_layer=None, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double(), processor


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)


CLIP, DECODED = encode_mp4(noise(9, 24, 16), scale=1), load_video(noise(3, 16, 24))
DOCUMENTS = [
    Document("wide", (Image(noise(20, 60)), Text("red circle", loss=True))),
    Document("clip", (Text("what"), Video(noise(7, 16, 24)), Text("blue square", loss=True))),
    Document("text", (Text("green green red", loss=True),)),
    Document("both", (
        Image(noise(40, 16)), Text("red", loss=True), Video(CLIP, 5), Image(noise(16, 16)), Text("a", loss=True),
        Video(DECODED), Video([PILImage.fromarray(frame) for frame in noise(4, 16, 16)]),
    )),
]  # fmt: skip


def ranks_of(ulysses: int, ring: int, size: int | None = None) -> list[Topology]:
    size = size or ulysses * ring
    return [Topology(ulysses, ring, rank, size) for rank in range(size)]


def batches(documents: list[Document], processor: FoveateProcessor, ulysses: int, ring: int) -> list[Batch]:
    """Of each rank of a group."""
    samples = [plan_document(document, processor) for document in documents]
    collates = [SequenceCollate(processor, topology, threads=2) for topology in ranks_of(ulysses, ring)]
    return [collate_(samples, collate_.read(samples)) for collate_ in collates]


def exchanged(features: list[torch.Tensor], routes: list[Any]) -> list[torch.Tensor]:
    """What an all-to-all by these routes gives each rank, without one."""
    pairs = zip(features, routes, strict=True)
    sent = [own[route.send_index].split(list(route.send_counts)) for own, route in pairs]
    for rank, route in enumerate(routes):
        assert route.receive_counts == tuple(len(parts[rank]) for parts in sent)
    return [torch.cat([parts[rank] for parts in sent]) for rank in range(len(features))]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_planned_document_is_the_encoded_one(name: str) -> None:
    """Text, numbers and shapes of tiles; packing and costs then choose the same rows."""
    _, processor = made(name)
    for document in DOCUMENTS:
        sample, planned = encode(document, processor), plan_document(document, processor)
        planned = pickle.loads(pickle.dumps(planned))  # as from a worker
        for field in ("input_ids", "labels"):
            assert np.array_equal(getattr(planned, field), getattr(sample, field))
        for field in ("key", "tokens", "tiles", "loss_tokens"):
            assert getattr(planned, field) == getattr(sample, field)
        assert planned.media.queries == sample.media.queries
        for field in ("image_grids", "image_sizes", "video_grids"):
            assert np.array_equal(getattr(planned.media, field), getattr(sample.media, field))
        for field in ("images", "frames"):
            assert getattr(planned.media, field).shape == getattr(sample.media, field).shape


@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_together_hold_what_one_holds(name: str) -> None:
    """Pixels that are read, tokens, targets, and features where their placeholders are."""
    model, processor = made(name)
    whole = collate([[encode(document, processor) for document in DOCUMENTS]], processor, raw_pixels=True)
    labels = whole.inputs.pop("labels")[0]
    ends = np.cumsum(whole.lengths) - 1
    targets = torch.cat([labels[1:], torch.tensor([-100])])
    targets[ends] = -100

    def float_pixels(inputs: dict) -> dict:
        names = ("pixel_values", "pixel_values_videos")
        return {
            k: v.double().permute(0, 3, 1, 2) / 255 - 0.5 if k in names else v
            for k, v in inputs.items()
            if k not in ("targets", "position_ids", "sequence")
        }

    with torch.no_grad():
        embeds = model.get_inputs_embeds(**float_pixels(whole.inputs))
    for ulysses, ring in ((1, 4), (3, 1)):
        ranks = batches(DOCUMENTS, processor, ulysses, ring)
        for pixels in ("pixel_values", "pixel_values_videos"):
            together = torch.cat([b.inputs[pixels] for b in ranks if pixels in b.inputs])
            assert torch.equal(together, whole.inputs[pixels])
        plans = [batch.inputs["sequence"].plan for batch in ranks]
        assert len(set(plans)) == 1 and plans[0].lengths == whole.lengths
        for batch in ranks:
            assert (batch.keys, batch.lengths, batch.tiles, batch.loss_tokens) == (
                whole.keys, whole.lengths, whole.tiles, whole.loss_tokens,
            )  # fmt: skip
            assert batch.inputs["input_ids"].shape == (1, plans[0].local_tokens) == (1, batch.positions)
        for field, expected in (("input_ids", whole.inputs["input_ids"]), ("targets", targets[None]),
                                ("position_ids", whole.inputs["position_ids"])):  # fmt: skip
            assert torch.equal(plans[0].unshard([batch.inputs[field] for batch in ranks]), expected)
        assert sum(int((batch.inputs["targets"] != -100).sum()) for batch in ranks) == whole.loss_tokens

        given: dict[str, list[torch.Tensor]] = {"image": [], "video": []}
        for batch in ranks:
            inputs, counts = float_pixels(batch.inputs), batch.inputs["sequence"].video_tokens
            own = {"image": [], "video": []}
            with torch.no_grad():
                if "pixel_values" in inputs:
                    of = (inputs.get(k) for k in ("pixel_values", "image_grids", "image_sizes", "image_queries"))
                    own["image"] = model.encode_images(*of)
                if "pixel_values_videos" in inputs:
                    of = (inputs.get(k) for k in ("pixel_values_videos", "video_grids", "video_queries"))
                    videos = model.encode_videos(*of)
                    own["video"] = [tokens[:count] for tokens, count in zip(videos, counts, strict=True)]
            for kind, tokens in own.items():
                given[kind].append(torch.cat([torch.zeros(0, 16).double(), *tokens]))
        received = {
            kind: exchanged(given[kind], [batch.inputs["sequence"].routes[kind] for batch in ranks]) for kind in given
        }
        with torch.no_grad():
            local = [
                model.get_inputs_embeds(batch.inputs["input_ids"], image_features=image, video_features=video)
                for batch, image, video in zip(ranks, received["image"], received["video"], strict=True)
            ]
        found = plans[0].unshard([one.transpose(1, 2) for one in local]).transpose(1, 2)
        assert torch.allclose(found, embeds, atol=1e-12, rtol=0)


def test_a_pack_without_media_or_without_documents_has_no_routes(processor: FoveateProcessor) -> None:
    for documents, tokens in (([DOCUMENTS[2]], 3), ([], 1)):
        for batch in batches(documents, processor, 2, 2):
            sequence = batch.inputs["sequence"]
            assert sequence.routes == {"image": None, "video": None} and sequence.video_tokens == ()
            assert set(batch.inputs) == {"input_ids", "position_ids", "targets", "sequence"}
            assert sequence.plan.tokens == tokens and batch.tokens == sum(batch.lengths) == 3 * len(documents)
    assert sum(int((b.inputs["targets"] != -100).sum()) for b in batches([], processor, 2, 2)) == 0


def test_fewer_media_than_ranks_leave_some_without(processor: FoveateProcessor) -> None:
    ranks = batches([Document("one", (Image(noise(64, 64)), Text("red", loss=True)))], processor, 2, 2)
    assert sum("pixel_values" in batch.inputs for batch in ranks) == 1
    assert all(batch.inputs["sequence"].routes["image"] is not None for batch in ranks)
    assert sum(sum(batch.inputs["sequence"].routes["image"].receive_counts) for batch in ranks) == 16


# Reading


def test_only_own_frames_are_decoded(
    processor: FoveateProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, gop, ranks = 96, 12, 4
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.gop_size = 32, 32, "yuv420p", gop
        for frame in noise(frames, 32, 32):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    document = Document("long", (Video(tmp_path / "clip.mp4", frames), Text("red", loss=True)))
    sample = plan_document(document, processor)
    decoded: list[int] = []
    decode = media_module._VideoFile._decode

    def counting(*args: Any) -> list:
        found = decode(*args)
        decoded[-1] += len(found)
        return found

    monkeypatch.setattr(media_module._VideoFile, "_decode", counting)
    own = []
    for topology in ranks_of(2, 2):
        decoded.append(0)
        (tiles,) = SequenceCollate(processor, topology).read([sample]).tiles
        own.append(len(tiles))
    assert own == [frames // ranks] * ranks
    assert all(count <= frames // ranks + gop for count in decoded), decoded
    decoded.append(0)
    whole = encode(document, processor).frames
    assert decoded[-1] == frames == len(whole)


def test_planning_decodes_no_pixel(processor: FoveateProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load_image", "load_video"):
        monkeypatch.setattr(f"foveate.vlm.processor.{name}", lambda *_, **__: pytest.fail("pixels were read"))
    assert plan_document(Document("a", (Image(picture(0)), Video(CLIP), Video(noise(5, 8, 8)))), processor).tiles == 14


def test_an_image_that_is_not_what_its_header_told_is_unreadable(processor: FoveateProcessor) -> None:
    sample = plan_document(Document("a/key", (Image(noise(8, 8)),)), processor)
    sample = replace(sample, planned=replace(sample.planned, sizes=((9, 8),)))
    reading = SequenceCollate(processor, Topology()).read([sample])
    with pytest.raises(DocumentError, match=r"^a/key: an image has 8x8 pixels .* its header told 9x8"):
        raise reading.unread[0]


def test_pixels_are_shared_evenly_where_counts_are_not() -> None:
    """max/mean over ranks of the patches to encode: few long videos among many short ones, few large among small."""
    _, processor = made("native")
    processor.max_patches, rng = 256, np.random.default_rng(1)
    documents = []
    for number in range(48):
        frames = 1 + int(rng.lognormal(1.5, 1.3))
        size = (16, 8 + 8 * (number % 3)) if number % 6 else (64, 64)
        documents.append(Document(str(number), (Video(np.zeros((frames, *size, 3), np.uint8)), Text("red"))))
    samples = [plan_document(document, processor) for document in documents]
    units = media_units(samples, processor.video_pool[0])

    def spread(shares: list[list[Any]]) -> float:
        sums = [sum(part.pixels for part in share) for share in shares]
        assert sum(sums) == sum(unit.pixels for unit in units) == 16 * sum(sample.tiles for sample in samples)
        return max(sums) / (sum(sums) / len(sums))

    ranks = 8
    by_video = [[u for u in units if u.document * ranks // len(documents) == rank] for rank in range(ranks)]
    by_frame = [[u for i, u in enumerate(units) if i * ranks // len(units) == rank] for rank in range(ranks)]
    assert spread(by_video) > 1.5 and spread(by_frame) > 1.5
    assert spread(share_units(units, ranks)) <= 1.10


# The loader

PACKING = Packing(rows=2, groups=2, tokens=80, tiles=40, window=4, reserve=3)


def picture(number: int, whole: bool = True) -> bytes:
    """A PNG file; one that isn't whole has its header."""
    buffer = io.BytesIO()
    PILImage.fromarray(np.random.default_rng(number).integers(0, 256, (24, 24, 3)).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue() if whole else buffer.getvalue()[:-600]


class Mixed:
    """Texts, images and clips; the pixels of some can't be decoded, and some can't be opened at all."""

    def __init__(self, documents: int = 80, broken: Callable[[int], bool] = lambda index: False):
        self.documents, self.runs, self.broken = documents, [documents], broken

    def key(self, index: int) -> str:
        return f"d/{index}"

    def document(self, index: int) -> Document:
        if index % 50 == 33:
            raise DocumentError(self.key(index), "bad_json", "is broken")
        words = Text(" red" * (1 + index % 11), loss=True)
        frames = np.full((1 + index % 5, 8, 8, 3), index % 256, np.uint8)
        media = [(), (Image(picture(index)),), (Video(frames),), (Video(frames), Image(picture(index)))][index % 4]
        if self.broken(index):
            media = (Video([PILImage.fromarray(one) for one in frames] * 2), Image(picture(index, whole=False)))
        return Document(self.key(index), (*media, words))


@pytest.fixture
def make(processor: FoveateProcessor) -> Callable[..., Loader]:
    """The loader of a rank, of (ulysses, ring) as it says; alone without sequence parallelism."""

    def made(
        rank: int = 0, size: int = 1, gather: Any = None, grid: Any = None, source: Any = None, **more: Any
    ) -> Any:
        mixture = Mixture([source or Mixed()], [1], seed=3, epochs=more.pop("epochs", None), shuffle=40)
        more = {"log_keys": True, "max_bad_fraction": 0.05} | more
        if grid is None:
            share = Share(rank, size, gather) if gather else None
            reads: Any = (partial(encode, processor=processor), partial(collate, processor=processor))
        else:
            topology = Topology(*grid, rank, size)
            share = Share(topology.data_rank, topology.data_size, gather, topology.degree)
            reads = partial(plan_document, processor=processor), SequenceCollate(processor, topology)
        return Loader(mixture, PACKING, *reads, lambda sample: float(sample.tokens) ** 2, share=share, **more)

    return made


def run(loader: Loader, steps: int, state: dict | None = None) -> list[Step]:
    if state:
        loader.load_state_dict(state)
    done = [step for _ in range(steps) if (step := loader.next())]
    loader.close()
    return done


def ranked(make: Callable[..., Loader], size: int, grid: tuple[int, int], steps: int, **more: Any) -> list[Any]:
    """Steps of each rank of the world."""
    state = more.pop("state", None)
    return in_threads(size, lambda rank, gather: run(make(rank, size, gather, grid, **more), steps, state))


def totals(steps: list[Step]) -> list[tuple]:
    return [(s.keys, s.loss_tokens, s.tokens, s.documents, s.costs, s.bad_counts, s.progress) for s in steps]


def packs(ranks: list[list[Step]], degree: int) -> list[list[list[int]]]:
    """Ids of each micro-batch of each step, put together from their ranks."""
    found = []
    for steps in zip(*ranks, strict=True):
        found.append([])
        for first in range(0, len(steps), degree):
            for parts in zip(*(step.micro for step in steps[first : first + degree]), strict=True):
                plan = parts[0].inputs["sequence"].plan
                found[-1].append(plan.unshard([part.inputs["input_ids"][0] for part in parts]).tolist())
    return found


def tokens_of(keys: tuple[str, ...], processor: FoveateProcessor) -> list[int]:
    samples = [encode(Mixed().document(int(key[2:])), processor) for key in keys]
    return [token for sample in samples for token in sample.input_ids.tolist()]


@pytest.mark.parametrize(("size", "grid"), [(2, (1, 2)), (4, (2, 1)), (4, (2, 2))])
def test_a_step_holds_the_same_documents_at_any_degree(
    make: Callable[..., Loader], processor: FoveateProcessor, size: int, grid: tuple[int, int]
) -> None:
    alone = run(make(), 4)
    shared = ranked(make, size, grid, 4)
    for steps in shared:
        assert totals(steps) == totals(alone)
    expected = [[tokens_of(batch.keys, processor) for batch in step.micro] for step in alone]
    assert packs(shared, math.prod(grid)) == expected
    for step in zip(*shared, strict=True):
        assert step[0].positions == sum(b.inputs["input_ids"].numel() for one in step for b in one.micro)
        assert step[0].loss_tokens == sum(int((b.inputs["targets"] != -100).sum()) for o in step for b in o.micro)


def test_states_go_on_at_another_degree_and_without(make: Callable[..., Loader]) -> None:
    whole = run(make(), 5)
    state = json.loads(json.dumps(merge_states([steps[-1].state for steps in ranked(make, 4, (1, 2), 3)])))
    assert len(state["groups"]) == PACKING.groups
    assert totals(run(make(), 2, state)) == totals(whole[3:])
    from_alone = json.loads(json.dumps(whole[2].state))
    for restored in (state, from_alone):
        for steps in ranked(make, 4, (2, 2), 2, state=restored):
            assert totals(steps) == totals(whole[3:])


BROKEN = {7, 21, 50, 71}


def test_a_document_that_cannot_be_decoded_leaves_the_pack_on_all_ranks(
    make: Callable[..., Loader], processor: FoveateProcessor
) -> None:
    """Only the rank that owns the image finds out; the others have read its frames."""
    source = Mixed(broken=BROKEN.__contains__)
    shared = ranked(make, 4, (1, 2), 100, source=source, epochs=1)
    good = {f"d/{index}" for index in range(80) if index not in BROKEN | {33}}
    for steps in shared:
        assert totals(steps) == totals(shared[0])
        keys = [key for step in steps for key in step.keys]
        assert len(keys) == len(good) and set(keys) == good
        bad = [one for step in steps for one in step.bad if one.reason == "unreadable_media"]
        assert sorted(one.key for one in bad) == sorted(f"d/{index}" for index in BROKEN)
        assert steps[-1].bad_counts == {"unreadable_media": 4, "bad_json": 1}
    for step in zip(*shared, strict=True):
        together = [batch for one in step[::2] for batch in one.micro]
        assert step[0].keys == [key for batch in together for key in batch.keys]
        assert step[0].documents == len(step[0].keys)
        assert step[0].tokens == sum(batch.tokens for batch in together)
        assert step[0].positions == sum(b.inputs["input_ids"].numel() for one in step for b in one.micro)
        assert step[0].loss_tokens == sum(int((b.inputs["targets"] != -100).sum()) for o in step for b in o.micro)
    steps = zip(*shared, strict=True)
    expected = [[tokens_of(batch.keys, processor) or [0] for one in step[::2] for batch in one.micro] for step in steps]
    assert packs(shared, 2) == expected
    for steps in zip(*shared, strict=True):
        frames = sum(len(b.inputs.get("pixel_values_videos", ())) for one in steps for b in one.micro)
        assert frames == sum(1 + int(key[2:]) % 5 for key in steps[0].keys if int(key[2:]) % 4 > 1)


def test_what_had_only_been_planned_may_be_missing_after_a_restore(make: Callable[..., Loader]) -> None:
    """Documents of a restored state that can't be decoded, read by one rank alone, are counted and left out."""
    source = Mixed(broken=BROKEN.__contains__)
    first = ranked(make, 2, (2, 1), 1, source=source, epochs=1)[0]
    waiting = [p for g in first[0].state["groups"] for p in [*g["waiting"], *(p for _, row in g["pool"] for p in row)]]
    assert {int(make(source=source, epochs=1).mixture.key(p)[2:]) for p in waiting} & BROKEN
    rest = run(make(source=source, epochs=1), 100, first[0].state)
    keys = [key for step in [*first, *rest] for key in step.keys or []]
    assert len(keys) == len(set(keys)) == 75
    assert rest[-1].bad_counts == {"unreadable_media": 4, "bad_json": 1}


def test_too_many_that_cannot_be_decoded_stop_all_ranks(make: Callable[..., Loader]) -> None:
    source = Mixed(broken=lambda index: index % 10 == 1)
    for error in ranked(make, 4, (1, 2), 100, source=source, epochs=1, max_bad_fraction=0.004):
        assert isinstance(error, TooManyBadError)
        assert "max_bad_fraction 0.004 accepts 4" in str(error) and "unreadable_media" in str(error)


def test_a_step_of_which_nothing_can_be_read_is_left_out(make: Callable[..., Loader]) -> None:
    """All documents but one are broken; the step that trains is the one that has it."""
    source = Mixed(documents=30, broken=lambda index: index != 11)
    for steps in ranked(make, 2, (1, 2), 100, source=source, epochs=1, max_bad_fraction=1.0):
        (step,) = steps
        assert step.keys == ["d/11"] and step.documents == step.state["step"] == 1 and step.loss_tokens > 0
        assert {one.key for one in step.bad} <= {f"d/{index}" for index in range(30)}
        assert [len(batch.keys) for batch in step.micro].count(1) == 1


def test_ranks_that_pack_different_documents_are_told_apart(make: Callable[..., Loader]) -> None:
    class Other(Mixed):
        def document(self, index: int) -> Document:
            document = super().document(index)
            return replace(document, parts=(*document.parts, Text("blue"))) if index == 12 else document

    def work(rank: int, gather: Any) -> list[Step]:
        return run(make(rank, 4, gather, (1, 2), Other() if rank == 3 else Mixed()), 100)

    for error in in_threads(4, work):
        assert isinstance(error, SequenceMismatchError)
        found = r"ranks 2 and 3 share .*: d/12 is packed at position (\d+) \(digest (\w+)\) on rank 2, is packed at "
        told = re.match(found + r"position \1 \(digest (\w+)\) on rank 3;", str(error))
        assert told and told[2] != told[3]


def test_a_medium_missing_on_one_rank_is_named(make: Callable[..., Loader]) -> None:
    class Missing(Mixed):
        def document(self, index: int) -> Document:
            if index == 12:
                raise DocumentError(self.key(index), "missing_media", "is not there")
            return super().document(index)

    def work(rank: int, gather: Any) -> list[Step]:
        return run(make(rank, 2, gather, (2, 1), Missing() if rank == 1 else Mixed()), 100)

    for error in in_threads(2, work):
        assert isinstance(error, SequenceMismatchError)
        assert re.search(r": d/12 is (not )?packed .*on rank 0, can't be used \(missing_media\) on rank 1;", str(error))


def test_shares_must_fit_the_batches(make: Callable[..., Loader], processor: FoveateProcessor) -> None:
    def loader(topology: Topology, share: Share) -> Loader:
        reads: Any = partial(plan_document, processor=processor), SequenceCollate(processor, topology)
        return Loader(Mixture([Mixed()], [1], seed=3), PACKING, *reads, lambda sample: 1.0, share=share)

    with pytest.raises(ValueError, match="sequence is 1, but batches are made for 2 ranks"):
        loader(Topology(2, 1, 0, 2), Share(0, 1))
    with pytest.raises(ValueError, match="2 micro-batches a step can't be shared by 3 sequence groups"):
        loader(Topology(2, 1, 0, 6), Share(0, 3, sequence=2))
