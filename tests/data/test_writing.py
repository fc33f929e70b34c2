"""Shards are read back with webdataset, tarfile and json, and by the project's own sources."""

import base64
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from foveate.data.encoding import Sample, encode
from foveate.data.glyphs import digit_clip, encode_mp4
from foveate.data.inputs import GLYPH_KINDS, Input, glyph_source, open_input
from foveate.data.shards import ShardIndex, Shards, SourceError, verify
from foveate.data.sources import ShardSource, open_source
from foveate.data.writing import Made, TooManyRefusedError, make_shards
from foveate.vlm.processor import FoveateProcessor

SCRIPT = """
import sys
from pathlib import Path
from foveate.data.inputs import open_input
from foveate.data.writing import make_shards

if __name__ == "__main__":
    source, out, documents_per_shard, workers = sys.argv[1:]
    make_shards(open_input(source), Path(out), int(documents_per_shard), workers=int(workers))
"""
DEADLINE_S = 120


def picture(seed: int, format: str = "png", side: int = 48) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return encode_mp4(digit_clip(np.random.default_rng(0), "test", frames=4, digits=2).frames, scale=2)


@pytest.fixture
def media(tmp_path: Path, mp4: bytes) -> Path:
    """A folder of media in several formats; one name says another format than the file has."""
    folder = tmp_path / "media"
    (folder / "deep").mkdir(parents=True)
    for number, (name, format) in enumerate(
        [("a.jpg", "jpeg"), ("b.png", "png"), ("deep/c.webp", "webp"), ("wrong.png", "jpeg")]
    ):
        (folder / name).write_bytes(picture(number, format))
    (folder / "clip.mp4").write_bytes(mp4)
    return folder


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


RECORDS: dict[str, dict[str, Any]] = {
    "llava": {
        "id": "x/1",
        "image": "a.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is at b3 ?"},
            {"from": "gpt", "value": "b3 7"},
        ],
    },
    "llava of two": {
        "image": ["deep/c.webp", "a.jpg"],
        "conversations": [
            {"from": "human", "value": "a <image> and <image> ?"},
            {"from": "gpt", "value": "nothing"},
        ],
    },
    "video": {
        "video": "clip.mp4",
        "conversations": [{"from": "human", "value": "<video> what ?"}, {"from": "gpt", "value": "a clip"}],
    },
    "openai": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_uri(picture(9))}},
                    {"type": "text", "text": "what is it ?"},
                    {"type": "image", "image": "wrong.png"},
                    {"type": "image", "path": "b.png"},
                ],
            },
            {"role": "assistant", "content": "a.jpg is a picture"},
        ]
    },
    "mmc4": {
        "text_list": ["a scene", "then a circle", "of 3"],
        "image_info": [
            {"image_name": "b.png", "raw_url": "http://x.org/b.png", "matched_text_index": 2, "matched_sim": 0.1},
            {"image_name": "a.jpg", "raw_url": "http://x.org/a.jpg", "matched_text_index": 0, "matched_sim": 0.3},
        ],
        "url": "http://x.org",
    },
    "obelics": {
        "images": ["a.jpg", None, "b.png", "a.jpg"],
        "texts": [None, "the first ", None, None],
        "metadata": [{"src": "a.jpg"}, None, None, None],
    },
    "caption": {"caption": "a red circle — ё", "image": "a.jpg", "similarity": 0.25},
    "text": {"text": "which digit appears ?", "url": "data:text/plain;base64,eA=="},
}


@pytest.fixture
def json_file(media: Path, tmp_path: Path) -> Path:
    (tmp_path / "records.json").write_text(json.dumps(list(RECORDS.values())))
    return tmp_path / "records.json"


def make(
    source: str | Path, out: Path, documents_per_shard: int = 3, media_root: Path | None = None, **options
) -> Made:
    return make_shards(open_input(str(source), media_root=media_root), out, documents_per_shard, **options)


def samples(out: Path) -> list[dict[str, bytes]]:
    """A folder's documents as webdataset sees them."""
    tars = sorted(str(path) for path in out.glob("*.tar"))
    return [
        {name: value for name, value in sample.items() if not name.startswith("__") or name == "__key__"}
        for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    ]


def sums(out: Path) -> dict[str, str]:
    """The SHA-256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def assert_same(a: Sample, b: Sample) -> None:
    for name in ("input_ids", "labels", "images", "frames"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# What is written


def test_members_are_the_record_and_its_media_untouched(json_file: Path, media: Path, tmp_path: Path) -> None:
    made = make(json_file, tmp_path / "out", media_root=media)
    written = samples(tmp_path / "out")
    assert [sample["__key__"] for sample in written] == [f"{number:09d}" for number in range(len(RECORDS))]
    names = {name: set(sample) - {"__key__"} for name, sample in zip(RECORDS, written, strict=True)}
    assert names == {
        "llava": {"json", "0.jpg"},
        "llava of two": {"json", "0.webp", "1.jpg"},
        "video": {"json", "0.mp4"},
        "openai": {"json", "0.png", "1.jpg", "2.png"},
        "mmc4": {"json", "0.png", "1.jpg"},
        "obelics": {"json", "0.jpg", "1.png"},
        "caption": {"json", "0.jpg"},
        "text": {"json"},
    }
    by_name = dict(zip(RECORDS, written, strict=True))
    assert by_name["llava of two"]["0.webp"] == (media / "deep/c.webp").read_bytes()
    assert by_name["openai"]["0.png"] == picture(9)
    assert by_name["openai"]["1.jpg"] == (media / "wrong.png").read_bytes()
    assert by_name["video"]["0.mp4"] == (media / "clip.mp4").read_bytes()
    assert made.index.counts == {"images": 11, "videos": 1, "refused": 0}


def test_records_are_kept_but_for_the_names_of_media(json_file: Path, media: Path, tmp_path: Path) -> None:
    make(json_file, tmp_path / "out", media_root=media)
    records = [json.loads(sample["json"]) for sample in samples(tmp_path / "out")]
    expected = json.loads(json.dumps(list(RECORDS.values())))
    expected[0]["image"] = "0.jpg"
    expected[1]["image"] = ["0.webp", "1.jpg"]
    expected[2]["video"] = "0.mp4"
    content = expected[3]["messages"][0]["content"]
    content[0]["image_url"]["url"], content[2]["image"], content[3]["path"] = "0.png", "1.jpg", "2.png"
    expected[4]["image_info"][0]["image_name"], expected[4]["image_info"][1]["image_name"] = "0.png", "1.jpg"
    expected[5]["images"] = ["0.jpg", None, "1.png", "0.jpg"]
    expected[6]["image"] = "0.jpg"
    assert records == expected


@pytest.mark.parametrize("lines", [False, True])
def test_documents_are_those_of_the_json_file(
    json_file: Path, media: Path, tmp_path: Path, processor: FoveateProcessor, lines: bool
) -> None:
    if lines:
        json_file = json_file.with_suffix(".jsonl")
        json_file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS.values()))
    make(json_file, tmp_path / "out", media_root=media, workers=2 if lines else 1)
    before = open_source(json_file, processor, media_root=media)
    after = ShardSource(tmp_path / "out", processor)
    assert after.documents == before.documents == len(RECORDS)
    for index in range(len(RECORDS)):
        assert_same(encode(before.document(index), processor), encode(after.document(index), processor))


def test_folder_of_media_and_texts(tmp_path: Path, mp4: bytes, processor: FoveateProcessor) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "x.png").write_bytes(b"not looked at")
    (folder / "b.v2.JPG").write_bytes(picture(1, "jpeg"))
    (folder / "b.v2.txt").write_text("a red circle\n")
    (folder / "sub" / "a.mp4").write_bytes(mp4)
    (folder / "sub" / "a.json").write_text('{"caption": "a clip", "source": "x"}')
    (folder / "c.png").write_bytes(picture(2))
    (folder / "c.json").write_text('{"similarity": 0.5}')
    (folder / "c.txt").write_text("a cross")
    (folder / "d.json").write_text(json.dumps({"image": "c.png", "caption": "again"}))
    make(folder, tmp_path / "out")
    written = samples(tmp_path / "out")
    assert [json.loads(sample["json"]) for sample in written] == [
        {"caption": "a red circle", "image": "0.jpg"},
        {"similarity": 0.5, "caption": "a cross", "image": "0.png"},
        {"image": "0.png", "caption": "again"},
        {"caption": "a clip", "source": "x", "video": "0.mp4"},
    ]
    assert written[0]["0.jpg"] == picture(1, "jpeg") and written[3]["0.mp4"] == mp4
    shards = ShardSource(tmp_path / "out", processor)
    assert encode(shards.document(0), processor).images.shape == (1, 64, 64, 3)
    assert len(encode(shards.document(3), processor).frames) == 4


@pytest.mark.parametrize("parquet", [False, True])
def test_dataset_keeps_its_images_bytes(tmp_path: Path, parquet: bool) -> None:
    pictures = [picture(number, "jpeg" if number % 2 else "png") for number in range(7)]
    # a file beside the data; the library puts it into what it saves itself
    second = {"bytes": None, "path": "own.png"} if parquet else {"bytes": picture(99), "path": "own.png"}
    rows = {
        "id": list(range(7)),
        "images": [[{"bytes": p, "path": None}, second] for p in pictures],
        "conversations": [
            [{"from": "human", "value": f"<image><image> what is {n} ?"}, {"from": "gpt", "value": "it"}]
            for n in range(7)
        ],
    }
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "images": datasets.List(datasets.Image(decode=False)),
            "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
        }
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    if parquet:
        (tmp_path / "data").mkdir()
        arrow = table.with_format("arrow")[:]
        pyarrow.parquet.write_table(arrow[:3], tmp_path / "data" / "0.parquet", row_group_size=2)
        pyarrow.parquet.write_table(arrow[3:], tmp_path / "data" / "1.parquet")
    else:
        table.save_to_disk(tmp_path / "data")
    (tmp_path / "data" / "own.png").write_bytes(picture(99))
    made = make(tmp_path / "data", tmp_path / "out", documents_per_shard=2, workers=2 if parquet else 1)
    assert [shard.documents for shard in made.index.shards] == [2, 2, 2, 1]
    for number, sample in enumerate(samples(tmp_path / "out")):
        record = json.loads(sample["json"])
        extension = "jpg" if number % 2 else "png"
        assert record["id"] == number and f"what is {number} ?" in record["conversations"][0]["value"]
        assert sample[f"0.{extension}"] == pictures[number] and sample["1.png"] == picture(99)
        assert record["images"] == [f"0.{extension}", {"bytes": None, "path": "1.png"} if parquet else "1.png"]


@pytest.mark.parametrize("kind", GLYPH_KINDS)
def test_embedded_data_are_the_same_from_files(kind: str, tmp_path: Path, processor: FoveateProcessor) -> None:
    name = f"glyphs:{kind}?documents=5&split=dev&seed=4&objects=1-6"
    make(name, tmp_path / "out")
    source, shards = glyph_source(name, processor), ShardSource(tmp_path / "out", processor)
    for index in range(5):
        drawn, read = (encode(s.document(index), processor) for s in (source, shards))
        np.testing.assert_array_equal(drawn.input_ids, read.input_ids)
        np.testing.assert_array_equal(drawn.labels, read.labels)
        np.testing.assert_array_equal(drawn.images, read.images)
        assert drawn.frames.shape == read.frames.shape
        if len(drawn.frames):  # H.264 is not exact
            assert np.abs(drawn.frames.astype(int) - read.frames.astype(int)).mean() < 8


def test_index_agrees_with_the_files(json_file: Path, media: Path, tmp_path: Path) -> None:
    make(json_file, tmp_path / "out", media_root=media)
    content = json.loads((tmp_path / "out" / "index.json").read_text())
    assert content["documents"] == len(RECORDS)
    for shard in content["shards"]:
        data = (tmp_path / "out" / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        offsets = np.load(tmp_path / "out" / f"{shard['name']}.idx")
        with tarfile.open(tmp_path / "out" / shard["name"]) as archive:
            first = {member.name.split(".")[0]: member.offset for member in reversed(archive.getmembers())}
        assert sorted(first.values()) == offsets[:-1].tolist() and len(offsets) == shard["documents"] + 1
    assert verify(tmp_path / "out") == []


def test_megabytes_set_the_size_of_shards(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.png").write_bytes(picture(number, side=64))  # 12 kB of noise
        (folder / f"{number}.txt").write_text("noise")
    made = make_shards(open_input(str(folder)), tmp_path / "out", megabytes_per_shard=0.15)
    sizes = [shard.bytes / 1e6 for shard in made.index.shards]
    assert len(sizes) == 4 and sizes[:-1] == pytest.approx([0.15] * 3, rel=0.15)


# Refused documents


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


def test_refused_documents_are_counted_by_reason(media: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(0))
    (media / "link.png").symlink_to(tmp_path / "secret.png")
    (media / "page.jpg").write_text("<html>not found</html>")
    for name, size in (("large.png", (9_000, 8_000)), ("huge.png", (100_000, 2_000))):
        Image.new("1", size).save(media / name)
    good = json.dumps({"caption": "a circle", "image": "a.jpg"})
    lines = [
        good,
        '{"caption": "x", "image": ',
        "[1, 2]",
        json.dumps({"caption": "x", "image": "../secret.png"}),
        json.dumps({"caption": "x", "image": str(tmp_path / "secret.png")}),
        json.dumps({"caption": "x", "image": "link.png"}),
        json.dumps({"caption": "x", "image": "missing.png"}),
        json.dumps({"caption": "x", "image": "https://x.org/a.png"}),
        json.dumps({"caption": "x", "image": "page.jpg"}),
        json.dumps({"caption": "x", "video": "a.jpg"}),
        json.dumps({"caption": "x", "image": "large.png"}),
        json.dumps({"caption": "x", "image": "huge.png"}),
        json.dumps({"caption": "x", "image": "data:image/png,plain"}),
        json.dumps({"title": "x"}),
        json.dumps({"caption": "<image> x", "image": "a.jpg"}),
        json.dumps({"text": "a", "deep": nested(700)}),
        json.dumps({"caption": "x", "image": "data:image/png;base64,é"}),
        good,
    ]
    (media / "records.jsonl").write_text("\n".join(lines))
    made = make(media / "records.jsonl", tmp_path / "out", 5, max_bad_fraction=1.0)
    reasons = {
        "bad_json": 1, "bad_record": 4, "unsafe_name": 3, "missing_media": 2, "unreadable_media": 4, "too_large": 2,
    }  # fmt: skip
    assert made.refused == reasons
    counts = json.loads((tmp_path / "out" / "index.json").read_text())["counts"]
    assert counts == {"images": 2, "videos": 0, "refused": 16} | {f"refused_{r}": n for r, n in reasons.items()}
    listed = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert [item["key"] for item in listed] == [f"records.jsonl/{number}" for number in range(1, 17)]
    assert [item["reason"] for item in listed[2:5]] == ["unsafe_name"] * 3
    assert "missing.png" in listed[5]["message"]
    # nothing of them is in the shards: those in the middle have no documents, so there are none
    assert [sample["__key__"] for sample in samples(tmp_path / "out")] == ["000000000", "000000017"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["shard-000000.tar", "shard-000003.tar"]
    assert Shards(tmp_path / "out").documents == 2


def test_names_that_are_no_text_are_listed(tmp_path: Path) -> None:
    """Linux file names are bytes."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (b"\xff\xfe.png", b"good.png"):
        (folder / os.fsdecode(name)).write_bytes(picture(0))
    (folder / "good.txt").write_text("noise")
    assert make(folder, tmp_path / "out", max_bad_fraction=0.5).refused == {"bad_record": 1}
    listed = json.loads((tmp_path / "out" / "refused.jsonl").read_text())
    assert os.fsencode(listed["key"]) == b"\xff\xfe"


def test_shard_that_loses_its_documents_is_removed(tmp_path: Path) -> None:
    """Its media were there in the run before."""
    records = [{"caption": "noise", "image": f"{number}.png"} for number in range(2)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    make(tmp_path / "data.json", tmp_path / "out", 1)
    (tmp_path / "1.png").unlink()
    (tmp_path / "out" / "shard-000001.tar.json").unlink()
    assert make(tmp_path / "data.json", tmp_path / "out", 1, max_bad_fraction=1.0).index.documents == 1
    assert Shards(tmp_path / "out").documents == 1 and not (tmp_path / "out" / "shard-000001.tar").exists()


def test_too_many_refused_documents_stop_the_run_and_can_be_mended(media: Path, tmp_path: Path) -> None:
    records = [{"caption": f"number {n}", "image": f"{n}.png"} for n in range(30)]
    (media / "records.json").write_text(json.dumps(records))
    for number in range(30):
        if number not in (4, 17):
            (media / f"{number}.png").write_bytes(picture(number))
    out = tmp_path / "out"
    with pytest.raises(TooManyRefusedError, match=r"2 missing_media.*of 30 accepts 1: records.json/4.*refused.jsonl"):
        make(media / "records.json", out, 2, max_bad_fraction=0.05)
    assert not (out / "index.json").exists() and not (out / "shard-000014.tar").exists()
    assert len((out / "refused.jsonl").read_text().splitlines()) == 2
    for number in (4, 17):
        (media / f"{number}.png").write_bytes(picture(number))
    made = make(media / "records.json", out, 2, max_bad_fraction=0.05)
    assert made.index.documents == 30 and not made.refused
    assert not (out / "refused.jsonl").exists()


def test_refused_documents_within_the_bound_are_accepted(media: Path, tmp_path: Path) -> None:
    records = [{"text": "a"}] * 99 + [{"caption": "x", "image": "none.png"}]
    (media / "records.json").write_text(json.dumps(records))
    assert make(media / "records.json", tmp_path / "out", 50, max_bad_fraction=0.01).index.documents == 99
    with pytest.raises(TooManyRefusedError):
        make(media / "records.json", tmp_path / "out2", 50, max_bad_fraction=0.009)


# Going on


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    name = "glyphs:scene_chat?documents=60&seed=1"
    made = [make(name, tmp_path / f"out{workers}", 7, workers=workers) for workers in (1, 3)]
    assert sums(tmp_path / "out1") == sums(tmp_path / "out3")
    assert made[0] == made[1] and len(made[0].index.shards) == 9


def test_second_run_leaves_whole_shards_alone(tmp_path: Path) -> None:
    name, out = "glyphs:captions?documents=20", tmp_path / "out"
    first = make(name, out)
    before, times = sums(out), {path.name: path.stat().st_mtime_ns for path in out.glob("shard*")}
    again = make(name, out)
    assert (again.found, again.index) == (7, first.index)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("shard*")} == times
    (out / "shard-000001.tar").unlink()
    (out / "shard-000002.tar").write_bytes((out / "shard-000002.tar").read_bytes()[:-512])
    (out / "shard-000003.tar.idx").unlink()
    (out / "shard-000004.tar.json").write_text("{")
    data = bytearray((out / "shard-000005.tar").read_bytes())
    data[700] ^= 1
    (out / "shard-000005.tar").write_bytes(data)
    assert make(name, out).found == 3  # by size, the flipped bit is not seen
    assert make(name, out, verify=True).found == 6
    assert sums(out) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: {"documents_per_shard": 5}, "documents_per_shard was 3 and is 5"),
        (
            lambda folder: {"documents_per_shard": None, "megabytes_per_shard": 1.0},
            "megabytes_per_shard was None and is 1",
        ),
        (lambda folder: {"media_root": folder}, "media_root was"),
        (lambda folder: {"source": "other.json"}, "source was"),
        (lambda folder: {"source": "changed"}, "sha256 was"),
    ],
)
def test_shards_of_other_data_or_settings_are_refused(
    tmp_path: Path, change: Callable[[Path], dict], said: str
) -> None:
    for name in ("data.json", "other.json"):
        (tmp_path / name).write_text(json.dumps([{"text": f"number {n}"} for n in range(4)]))
    (tmp_path / "folder").mkdir()
    make(tmp_path / "data.json", tmp_path / "out")
    before = sums(tmp_path / "out")
    options = {"documents_per_shard": 3} | change(tmp_path / "folder")
    source = options.pop("source", "data.json")
    if source == "changed":
        (tmp_path / "data.json").write_text(json.dumps([{"text": f"number {n}"} for n in range(5)]))
        source = "data.json"
    opened = open_input(str(tmp_path / source), media_root=options.pop("media_root", None))
    with pytest.raises(SourceError, match=said):
        make_shards(opened, tmp_path / "out", **options)
    assert sums(tmp_path / "out") == before


def test_changed_media_in_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(picture(0))
    (tmp_path / "folder" / "a.txt").write_text("noise")
    make(tmp_path / "folder", tmp_path / "out")
    (tmp_path / "folder" / "a.txt").write_text("other noise")
    with pytest.raises(SourceError, match="files was"):
        make(tmp_path / "folder", tmp_path / "out")


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    name = "glyphs:captions?documents=2"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("of great worth")
    with pytest.raises(SourceError, match=r"thesis\.txt.*accepted: a new or empty folder"):
        make(name, tmp_path / "mine")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shard-000000.tar").write_bytes(b"of another program")
    with pytest.raises(SourceError, match=r"no make\.json"):
        make(name, tmp_path / "shards")
    assert (tmp_path / "shards" / "shard-000000.tar").read_bytes() == b"of another program"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(picture(0))
    (tmp_path / "folder" / "a.txt").write_text("noise")
    with pytest.raises(SourceError, match="lies inside"):
        make(tmp_path / "folder", tmp_path / "folder" / "shards")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        make(name, tmp_path / "file")


def test_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    name = "glyphs:captions?documents=4"

    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(SourceError, match="another run"):
            make(name, tmp_path / "out")

    make(name, tmp_path / "out", after_shard=meanwhile)


def wait_until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def process_ids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def group_members(group: int) -> list[int]:
    """Processes of a group that still run."""
    found = []
    for pid in process_ids():
        with suppress(OSError):  # it has ended meanwhile
            state, _, of = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state != "Z":
                found.append(pid)
    return found


def test_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    name, out = "glyphs:needle_chat?documents=400&frames=8", tmp_path / "out"
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), name, str(out), "10", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_until(lambda: len(list(out.glob("shard-*.json"))) >= 3 or process.poll() is not None)
    finally:
        process.kill()
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == -signal.SIGKILL, err
    wait_until(lambda: not group_members(process.pid))  # its workers end by themselves
    assert not (out / "index.json").exists()
    left = sums(out)
    made = make(name, out, 10, workers=2)
    assert 3 <= made.found == len([name for name in left if name.endswith(".tar.json")]) < 40
    make(name, tmp_path / "uninterrupted", 10)
    assert sums(out) == (expected := sums(tmp_path / "uninterrupted"))
    assert all(expected[name] == sum for name, sum in left.items() if not name.startswith("."))


def descendants() -> list[int]:
    """Processes that this one has started, and those that they have."""
    parents = {}
    for pid in process_ids():
        with suppress(OSError):  # it has ended meanwhile
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            parents[pid] = int(parent) if state != "Z" else 0
    found = [os.getpid()]
    for ancestor in found:
        found += [pid for pid, parent in parents.items() if parent == ancestor]
    return found[1:]


def test_ctrl_c_leaves_whole_shards_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a terminal sends it: to the workers too."""
    out = tmp_path / "out"
    make("glyphs:captions?documents=4", tmp_path / "other", 2, workers=2)  # the server of the workers stays
    before, whole = descendants(), 0

    def interrupt(done: int, total: int) -> None:
        nonlocal whole
        if done >= 40:
            whole = len(list(out.glob("*.tar")))
            workers = set(descendants()) - set(before)
            assert len(workers) == 2
            for pid in workers:
                os.kill(pid, signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make("glyphs:needle_chat?documents=2000&frames=8", out, 20, workers=2, after_shard=interrupt)
    assert descendants() == before
    assert capfd.readouterr().err == ""
    assert 2 <= whole <= len(list(out.glob("*.tar"))) <= whole + 1  # those under way were given up
    assert_only_whole_shards(out)


def assert_only_whole_shards(out: Path) -> None:
    tars = sorted(path.name for path in out.glob("*.tar"))
    expected = {"make.json", ".lock", *tars, *(f"{tar}.{suffix}" for tar in tars for suffix in ("idx", "json"))}
    assert {path.name for path in out.iterdir()} == expected
    for tar in tars:
        record = json.loads((out / f"{tar}.json").read_text())
        assert record["sha256"] == hashlib.sha256((out / tar).read_bytes()).hexdigest()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Documents of which the sixth is large."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes(picture(number, side=200 if number == 5 else 32))
        (folder / f"{number}.txt").write_text("noise")
    return folder


def test_full_disk_leaves_no_half_shard(mixed: Path, tmp_path: Path) -> None:
    """Files may not be longer than 50 kB: as where the disk is full, a write fails in the middle."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError) as raised:
            make(mixed, tmp_path / "out", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    said = str(raised.value)
    assert "File too large while shard-000002.tar was written" in said and "\n" not in said
    assert_only_whole_shards(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    assert make(mixed, tmp_path / "out", 2).found == 2
    make(mixed, tmp_path / "uninterrupted", 2)
    assert sums(tmp_path / "out") == sums(tmp_path / "uninterrupted")


def test_full_disk_in_workers(mixed: Path, tmp_path: Path) -> None:
    make("glyphs:captions?documents=4", tmp_path / "other", 2, workers=2)  # starts the server of the workers
    servers = descendants()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for pid in servers:  # new workers have the limits of their server
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (50_000, hard))
        with pytest.raises(OSError, match=r"File too large while shard-000002\.tar was written"):
            make(mixed, tmp_path / "out", 2, workers=2)
    finally:
        for pid in servers:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert_only_whole_shards(tmp_path / "out")
    assert not (tmp_path / "out" / "shard-000002.tar").exists()


# Opening


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nothing", "not there"),
        ("file.xyz", "of no kind"),
        ("empty", "no images or videos"),
        ("empty.jsonl", "no records"),
        ("glyphs:poems?documents=3", "captions, interleaved"),
        ("glyphs:regions?documents=3", "accepted: captions"),
        ("glyphs:captions", r"documents=200"),
        ("glyphs:captions?documents=x", "a whole number"),
        ("glyphs:captions?documents=3&color=red", "option 'color'"),
        ("glyphs:captions?documents=3&objects=9-2", "objects is"),
    ],
)
def test_sources_that_cant_be_read_say_what_is_accepted(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "file.xyz").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SourceError, match=said):
        open_input(source if ":" in source else str(tmp_path / source))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"documents_per_shard": 0}, "documents_per_shard is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"megabytes_per_shard": 0.0}, "megabytes_per_shard is 0"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction is 1.5"),
        ({"documents_per_shard": 1, "megabytes_per_shard": 1.0}, "one of them"),
    ],
)
def test_options_out_of_range_are_named(tmp_path: Path, options: dict, said: str) -> None:
    opened: Input = open_input("glyphs:captions?documents=3")
    with pytest.raises(ValueError, match=said):
        make_shards(opened, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_index_is_that_of_the_reader(tmp_path: Path) -> None:
    made = make("glyphs:captions?documents=4", tmp_path / "out")
    assert ShardIndex.read(tmp_path / "out") == made.index
