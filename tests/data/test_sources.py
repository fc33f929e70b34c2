"""Sources: what lies on disk as documents by number, and nothing else."""

import io
import json
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from foveate.data.document import Document, DocumentError, Image, Text, Video
from foveate.data.encoding import encode
from foveate.data.glyphs import GlyphSource, encode_mp4
from foveate.data.records import RecordOptions
from foveate.data.shards import index_folder
from foveate.data.sources import (
    DatasetSource,
    JsonSource,
    ShardSource,
    Source,
    SourceError,
    Subset,
    open_source,
    read_subset,
    split,
    write_subset,
)
from foveate.vlm.processor import FoveateProcessor

EOS = "<|im_end|>"  # of chatml_processor
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10)]


def picture(number: int, format: str = "JPEG") -> bytes:
    """A picture of one colour, told apart by it."""
    buffer = io.BytesIO()
    PILImage.new("RGB", (24, 16), COLOURS[number % 4]).save(buffer, format, quality=95)
    return buffer.getvalue()


def conversation(value: str = "<image>\nWhat is it?", **fields: Any) -> dict:
    return fields | {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "A colour."}]}


def documents_of(source: Source) -> list[Document]:
    assert source.documents is not None
    return [source.document(i) for i in range(source.documents)]


def images_of(document: Document) -> list:
    return [part.source for part in document.parts if isinstance(part, Image)]


def text_of(document: Document) -> str:
    return "".join(part.text for part in document.parts if isinstance(part, Text))


def check_contract(source: Source) -> None:
    """What every source promises: numbers, runs, keys, range, the same document again, in another process too."""
    assert source.documents is not None
    assert sum(source.runs) == source.documents
    assert len({source.key(i) for i in range(source.documents)}) == source.documents
    for index in (-1, source.documents):
        for read in (source.key, source.document):
            with pytest.raises(IndexError, match=f"^document {index}; accepted: 0 to {source.documents - 1}$"):
                read(index)
    documents = documents_of(source)
    assert [document.key for document in documents] == [source.key(i) for i in range(source.documents)]
    assert documents_of(source) == documents
    assert documents_of(pickle.loads(pickle.dumps(source))) == documents
    loader = torch.utils.data.DataLoader(
        range(source.documents), batch_size=None, num_workers=2, collate_fn=source.document,
        multiprocessing_context="fork", timeout=60,
    )  # fmt: skip
    assert list(loader) == documents


# Tar shards


@pytest.fixture
def shard_folder(tmp_path: Path) -> Path:
    """A document of every layout, by webdataset's writer, over two shards."""
    clip = encode_mp4(np.zeros((4, 32, 32, 3), np.uint8), 1)
    mmc4 = {"text_list": ["one", "two"], "image_info": [{"image_name": "0.jpg", "matched_text_index": 1}]}
    samples: list[dict] = [
        {"json": mmc4, "0.jpg": picture(0)},
        {"json": {"texts": [None, "one"], "images": ["00001.b.png", None]}, "b.png": picture(1, "PNG")},
        {"jpg": picture(2), "txt": "a caption\n"},
        {"jpg": picture(3), "json": {"caption": "another", "url": "http://example.org", "width": 24}, "txt": "ignored"},
        {"jpg": picture(0), "json": {"key": "x", "caption": None}, "txt": "from the txt"},
        {"txt": "only text"},
        {"json": {"text": "only json"}},
        {"json": conversation(image="0.JPG"), "0.jpg": picture(1)},
        {"json": conversation(), "jpg": picture(2)},
        {"json": conversation("What happens?", video="page/00009.mp4"), "mp4": clip},
        {"json": {"instruction": "Say it.", "output": "It."}, "cls": b"3", "npy": b"not read"},
    ]
    pattern = f"{tmp_path}/shard-%06d.tar"
    with webdataset.ShardWriter(pattern, maxcount=6, verbose=0) as writer:
        for i, sample in enumerate(samples):
            writer.write({"__key__": f"page/{i:05d}"} | sample)
    return tmp_path


def test_shards_hold_documents_of_every_layout(shard_folder: Path, chatml_processor: FoveateProcessor) -> None:
    source = ShardSource(shard_folder, chatml_processor, RecordOptions(frames=2))
    documents = documents_of(source)
    assert source.runs == (6, 5)
    assert [images_of(document) for document in documents] == [
        [picture(0)], [picture(1, "PNG")], [picture(2)], [picture(3)], [picture(0)], [], [], [picture(1)], [picture(2)],
        [], [],
    ]  # fmt: skip
    assert [text_of(document).removesuffix(EOS) for document in documents[:7]] == [
        "onetwo", "one", "a caption", "another", "from the txt", "only text", "only json",
    ]  # fmt: skip
    assert documents[0].parts == (Text("one", True), Image(picture(0)), Text(f"two{EOS}", True))
    assert all("A colour." in text_of(documents[i]) for i in (7, 8, 9))
    (clip,) = [part for part in documents[9].parts if isinstance(part, Video)]
    assert encode(documents[9], chatml_processor).frames.shape == (clip.num_frames, 28, 28, 3) == (2, 28, 28, 3)
    for document in documents:
        encode(document, chatml_processor)


def test_shards_keep_a_sources_promises(shard_folder: Path, chatml_processor: FoveateProcessor) -> None:
    check_contract(ShardSource(shard_folder, chatml_processor))
    index_folder(shard_folder)
    check_contract(ShardSource(shard_folder, chatml_processor))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says to be so large, and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class _Touches:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


CORRUPT: dict[str, tuple[str, dict[str, bytes]]] = {
    "cut JPEG": ("unreadable_media", {"json": json.dumps(conversation(image="jpg")).encode(), "jpg": picture(0)[:-40]}),
    "no JPEG": ("unreadable_media", {"txt": b"words", "jpg": b"<html>not found</html>"}),
    "empty JPEG": ("unreadable_media", {"txt": b"words", "jpg": b""}),
    "cut clip": (
        "unreadable_media",
        {"json": json.dumps(conversation("<video>")).encode(), "mp4": encode_mp4(np.zeros((4, 8, 8, 3), "u1"))[:300]},
    ),
    "bad JSON": ("bad_json", {"json": b'{"text": "words"', "jpg": picture(0)}),
    "Latin-1 JSON": ("bad_json", {"json": b'{"text": "caf\xe9"}'}),
    "Latin-1 text": ("bad_json", {"txt": b"caf\xe9"}),
    "a list": ("bad_record", {"json": b'["words"]'}),
    "no layout": ("bad_record", {"json": b'{"url": "http://example.org"}'}),
    "missing image": ("missing_media", {"json": json.dumps(conversation(image="1.jpg")).encode(), "0.jpg": picture(0)}),
    "image elsewhere": ("missing_media", {"json": json.dumps(conversation(image="/etc/passwd")).encode()}),
    "path traversal": ("missing_media", {"json": json.dumps(conversation(image="../../secret.jpg")).encode()}),
    "remote image": ("missing_media", {"json": json.dumps(conversation(image="http://example.org/1.jpg")).encode()}),
    "no caption": ("bad_record", {"jpg": picture(0)}),
    "two texts": ("bad_record", {"txt": b"a", "b.txt": b"b", "jpg": picture(0)}),
    "two unnamed images": ("bad_record", {"txt": b"a", "0.jpg": picture(0), "1.jpg": picture(1)}),
    "100,000 pixels wide": ("too_large", {"txt": b"words", "png": png_header(100_000, 800)}),
    "pickle": ("pickled_member", {"txt": b"words", "jpg": picture(0), "pkl": b""}),
    "placeholder": ("bad_record", {"txt": b"an <image> here"}),
    "no words": ("bad_record", {"txt": b"\n"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_document_says_why_and_its_neighbours_are_read(
    tmp_path: Path, chatml_processor: FoveateProcessor, case: str
) -> None:
    reason, members = CORRUPT[case]
    touched = tmp_path / "touched"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, files in (("0", {"txt": b"before"}), ("1", members), ("2", {"txt": b"after", "jpg": picture(2)})):
            for extension, data in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                data = pickle.dumps(_Touches(touched)) if extension == "pkl" else data
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (tmp_path / "secret.jpg").write_bytes(picture(1))
    source = ShardSource(tmp_path / "a.tar", chatml_processor)
    assert source.documents == 3
    with pytest.raises(DocumentError) as caught:
        encode(source.document(1), chatml_processor)
    assert (caught.value.key, caught.value.reason) == ("a.tar/1", reason)
    caught.value.message.encode()
    assert text_of(source.document(0)) == f"before{EOS}"
    assert encode(source.document(2), chatml_processor).tiles == 1
    assert not touched.exists()


def test_an_image_of_100_000_pixels_square_is_refused(tmp_path: Path, chatml_processor: FoveateProcessor) -> None:
    with webdataset.TarWriter(f"{tmp_path}/a.tar") as writer:
        writer.write({"__key__": "0", "png": png_header(100_000, 100_000), "txt": "words"})
    with pytest.raises(DocumentError, match=r"10000000000 pixels|100000x100000") as caught:
        encode(ShardSource(tmp_path, chatml_processor).document(0), chatml_processor)
    assert caught.value.key == "a.tar/0"
    assert caught.value.reason == "too_large"


# JSON files


def write_json(path: Path, records: list, layout: str) -> Path:
    if layout == "lines":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records, indent=2 if layout == "indented" else None))
    return path


@pytest.fixture
def media_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(picture(i))
    (tmp_path / "outside.jpg").write_bytes(picture(3))
    return folder.parent


@pytest.mark.parametrize(
    ("name", "layout"),
    [("a.jsonl", "lines"), ("a.json", "lines"), ("a.json", "list"), ("a.json", "indented"), ("a.ndjson", "lines")],
)  # fmt: skip
def test_a_json_files_records_are_documents(
    media_folder: Path, chatml_processor: FoveateProcessor, name: str, layout: str
) -> None:
    records = [conversation(image=f"images/{i}.jpg") for i in range(3)] + [{"text": 'wörds [{"]\\'}]
    source = JsonSource(write_json(media_folder / name, records, layout), chatml_processor)
    check_contract(source)
    assert [source.key(i) for i in (0, 3)] == [f"{name}/0", f"{name}/3"]
    documents = documents_of(source)
    assert [images_of(document) for document in documents] == [
        [str(media_folder / f"images/{i}.jpg")] for i in range(3)
    ] + [[]]
    assert text_of(documents[3]) == 'wörds [{"]\\' + EOS
    sample = encode(documents[1], chatml_processor)
    assert np.abs(sample.images.astype(int) - COLOURS[1]).max() < 8


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\{}[],: \n\u2028é', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\{}[]', max_size=4), inner, max_size=3),
    max_leaves=12,
)


@given(
    st.lists(st.dictionaries(st.text("ab", max_size=2), json_values, max_size=3), min_size=1, max_size=6),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]),
    st.booleans(),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_records_are_found_in_any_json(
    tmp_path: Path,
    chatml_processor: FoveateProcessor,
    records: list,
    indent: int | None,
    ascii: bool,
    line: str,
    end: bool,
) -> None:
    (tmp_path / "list.json").write_text(json.dumps(records, indent=indent, ensure_ascii=ascii) + line * end)
    lines = line.join(json.dumps(record, ensure_ascii=ascii) for record in records)
    (tmp_path / "lines.jsonl").write_bytes((lines + line * end).encode())
    for name in ("list.json", "lines.jsonl"):
        source = JsonSource(tmp_path / name, chatml_processor)
        content = (tmp_path / name).read_bytes()
        assert [json.loads(content[start:stop]) for start, stop in source.spans] == records


def test_records_are_found_across_blocks(tmp_path: Path, chatml_processor: FoveateProcessor, monkeypatch) -> None:
    monkeypatch.setattr("foveate.data.sources.SCAN_BYTES", 7)
    records = [{"text": "x" * i} for i in range(1, 40)]
    source = JsonSource(write_json(tmp_path / "a.jsonl", records, "lines"), chatml_processor)
    assert [text_of(document) for document in documents_of(source)] == [record["text"] + EOS for record in records]


@pytest.mark.parametrize(
    "content",
    ["[", "[1, 2]", '[{"text": "a"}', '[{"text": "a"} {"text": "b"}]', '[{"text": "a"}, 3, {"text": "b"}]',
     '[{"text": "a"}, "b"]', '[{"text": "a"}] x', "[null]", '[{"text": "a"},]', '[{"text": "a"}]]'],
)  # fmt: skip
def test_a_damaged_json_list_is_refused(tmp_path: Path, chatml_processor: FoveateProcessor, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(SourceError, match=r"a\.json: from byte \d+ on .*accepted: a JSON list, or JSON Lines"):
        JsonSource(tmp_path / "a.json", chatml_processor)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n\n["c"]\n{"text": "\xff"}\n{"text": "e"}'),
        ("a.json", b'[{"text": "a"}, {"text" "b"}, ["c"], {"text": "\xff"}, {"text": "e"}]'),
    ],
)
def test_a_bad_record_of_a_file_costs_one_document(
    tmp_path: Path, chatml_processor: FoveateProcessor, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    source = JsonSource(tmp_path / name, chatml_processor)
    assert source.documents == 5
    assert [text_of(source.document(i)) for i in (0, 4)] == [f"a{EOS}", f"e{EOS}"]
    for index, reason in ((1, "bad_json"), (2, "bad_record"), (3, "bad_json")):
        with pytest.raises(DocumentError) as caught:
            source.document(index)
        assert (caught.value.key, caught.value.reason) == (f"{name}/{index}", reason)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../outside.jpg", "unsafe_name"),
        ("images/../../outside.jpg", "unsafe_name"),
        ("/etc/passwd", "unsafe_name"),
        ("link.jpg", "unsafe_name"),
        ("folder/outside.jpg", "unsafe_name"),
        ("..", "unsafe_name"),
        ("images/0.jpg\0.png", "unsafe_name"),
        ("images/9.jpg", "missing_media"),
        ("images", "missing_media"),
        (".", "unsafe_name"),
        ("~/outside.jpg", "missing_media"),
        ("file:///etc/passwd", "missing_media"),
        ("https://example.org/0.jpg", "missing_media"),
    ],
)
def test_media_must_lie_in_their_folder(
    media_folder: Path, chatml_processor: FoveateProcessor, name: str, reason: str
) -> None:
    (media_folder / "link.jpg").symlink_to(media_folder.parent / "outside.jpg")
    (media_folder / "folder").symlink_to(media_folder.parent)
    path = write_json(media_folder / "a.jsonl", [conversation(image=name)], "lines")
    with pytest.raises(DocumentError) as caught:
        JsonSource(path, chatml_processor).document(0)
    assert (caught.value.key, caught.value.reason) == ("a.jsonl/0", reason)


def test_media_root_may_be_elsewhere_and_names_absolute_inside_it(
    media_folder: Path, tmp_path: Path, chatml_processor: FoveateProcessor
) -> None:
    names = ["0.jpg", "../images/1.jpg", str(media_folder / "images" / "2.jpg")]
    path = write_json(tmp_path / "a.jsonl", [conversation(image=name) for name in names], "lines")
    source = JsonSource(path, chatml_processor, media_root=media_folder / "images")
    found = [images_of(document)[0] for document in documents_of(source)]
    assert found == [str(media_folder / "images" / f"{i}.jpg") for i in range(3)]
    beside = media_folder / "images-2"  # its name begins as the folder's
    beside.mkdir()
    (beside / "0.jpg").write_bytes(picture(0))
    write_json(path, [conversation(image="../images-2/0.jpg")], "lines")
    with pytest.raises(DocumentError, match="outside"):
        JsonSource(path, chatml_processor, media_root=media_folder / "images").document(0)


@pytest.mark.parametrize("name", ["missing.json", "folder.json", "a.txt", "a.jsonl.gz", "empty.json", "blank.jsonl"])
def test_what_is_no_json_file_is_refused(tmp_path: Path, chatml_processor: FoveateProcessor, name: str) -> None:
    (tmp_path / "folder.json").mkdir()
    for other in ("a.txt", "a.jsonl.gz", "empty.json"):
        (tmp_path / other).touch()
    (tmp_path / "blank.jsonl").write_text("\n  \n")
    with pytest.raises(SourceError, match=f"{name}: no .*accepted"):
        JsonSource(tmp_path / name, chatml_processor)


def test_a_missing_media_root_is_refused(tmp_path: Path, chatml_processor: FoveateProcessor) -> None:
    path = write_json(tmp_path / "a.jsonl", [{"text": "x"}], "lines")
    with pytest.raises(SourceError, match=r"media_root is .*accepted: a folder"):
        JsonSource(path, chatml_processor, media_root=tmp_path / "nowhere")


# Hugging Face datasets

ROWS = {
    "caption": [{"image": i, "caption": f"caption {i}"} for i in range(3)],
    "chat": [conversation(image=i) for i in range(3)],
    "cauldron": [{"images": [i, i + 1], "texts": [{"user": "Which?", "assistant": f"{i}."}]} for i in range(3)],
    "obelics": [{"images": [i, None], "texts": [None, f"text {i}"]} for i in range(3)],
}


def dataset_of(rows: list[dict], **features: Any):
    """A dataset with Image features, pictures by their numbers."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    def filled(row: dict) -> dict:
        def put(value: Any) -> Any:
            if isinstance(value, list):
                return [put(v) for v in value]
            return {"bytes": picture(value), "path": None} if isinstance(value, int) else value

        return {name: put(value) if name in ("image", "images") else value for name, value in row.items()}

    texts: Any = Value("string")
    if isinstance(rows[0].get("texts", [None])[-1], dict):
        texts = {"user": Value("string"), "assistant": Value("string")}
    known = {
        "image": ImageFeature(),
        "images": List(ImageFeature()),
        "texts": List(texts),
        "caption": Value("string"),
        "conversations": List({"from": Value("string"), "value": Value("string")}),
    }
    return Dataset.from_list([filled(row) for row in rows], Features({name: known[name] for name in rows[0]}))


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("stored", ["arrow", "parquet"])
def test_a_datasets_rows_are_documents(
    tmp_path: Path, chatml_processor: FoveateProcessor, layout: str, stored: str
) -> None:
    dataset = dataset_of(ROWS[layout])
    if stored == "arrow":
        dataset.save_to_disk(tmp_path / "rows")
        source = DatasetSource(tmp_path / "rows", chatml_processor)
        assert source.key(2) == "rows/2"
    else:
        dataset.to_parquet(tmp_path / "rows.parquet")
        source = DatasetSource(tmp_path / "rows.parquet", chatml_processor, cache=tmp_path / "cache")
        assert source.key(2) == "rows.parquet/2"
    check_contract(source)
    documents = documents_of(source)
    expected = [[picture(i), picture(i + 1)] if layout == "cauldron" else [picture(i)] for i in range(3)]
    assert [images_of(document) for document in documents] == expected
    said = {"caption": "caption {}" + EOS, "chat": "A colour.", "cauldron": "{}." + EOS, "obelics": "text {}" + EOS}
    assert all(said[layout].format(i) in text_of(document) for i, document in enumerate(documents))
    assert encode(documents[0], chatml_processor).tiles == len(expected[0])


def test_parquet_files_are_read_from_a_folder_a_glob_and_a_list(
    tmp_path: Path, chatml_processor: FoveateProcessor
) -> None:
    for i in range(2):
        dataset_of([{"image": i, "caption": f"caption {i}"}]).to_parquet(tmp_path / f"rows-{i}.parquet")
    for path in (
        tmp_path,
        f"{tmp_path}/*.parquet",
        f"{tmp_path}/rows-{{0..1}}.parquet",
        [tmp_path / "rows-0.parquet", tmp_path / "rows-1.parquet"],
    ):
        source = DatasetSource(path, chatml_processor, cache=tmp_path / "cache")
        assert [text_of(document) for document in documents_of(source)] == [f"caption {i}{EOS}" for i in range(2)]


def test_lists_of_objects_stored_as_an_object_of_lists(tmp_path: Path, chatml_processor: FoveateProcessor) -> None:
    from datasets import Dataset

    turns = {"role": ["user", "assistant"], "content": ["What?", "That."]}
    Dataset.from_list([{"messages": turns}]).save_to_disk(tmp_path / "rows")
    assert text_of(DatasetSource(tmp_path / "rows", chatml_processor).document(0)).count("That.") == 1


def test_a_dataset_may_name_images_in_its_folder_alone(media_folder: Path, chatml_processor: FoveateProcessor) -> None:
    from datasets import Dataset

    names = ["images/0.jpg", "../outside.jpg"]
    Dataset.from_list([{"image": name, "caption": "a"} for name in names]).save_to_disk(media_folder / "rows")
    source = DatasetSource(media_folder / "rows", chatml_processor, media_root=media_folder)
    assert images_of(source.document(0)) == [str(media_folder / "images" / "0.jpg")]
    with pytest.raises(DocumentError) as caught:
        source.document(1)
    assert (caught.value.key, caught.value.reason) == ("rows/1", "unsafe_name")


def test_rows_stored_together_are_runs(tmp_path: Path, chatml_processor: FoveateProcessor) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": [str(i) for i in range(10)]}).save_to_disk(tmp_path / "rows", num_shards=2)
    source = DatasetSource(tmp_path / "rows", chatml_processor)
    assert source.runs == (5, 5)
    assert [text_of(document) for document in documents_of(source)] == [f"{i}{EOS}" for i in range(10)]


def test_a_dataset_of_several_splits_or_damaged_is_refused(tmp_path: Path, chatml_processor: FoveateProcessor) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["a"]})
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(
        SourceError, match=r"several splits; accepted: the folder of one: .*splits/train, .*splits/test"
    ):
        DatasetSource(tmp_path / "splits", chatml_processor)
    assert DatasetSource(tmp_path / "splits" / "train", chatml_processor).documents == 1
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SourceError, match=r"bad\.parquet: not a whole dataset"):
        DatasetSource(tmp_path / "bad.parquet", chatml_processor, cache=tmp_path / "cache")
    for file in (tmp_path / "splits" / "train").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SourceError, match="train: not a whole dataset"):
        DatasetSource(tmp_path / "splits" / "train", chatml_processor)


def test_a_dataset_script_is_not_run(tmp_path: Path, chatml_processor: FoveateProcessor) -> None:
    folder = tmp_path / "rows"
    dataset_of(ROWS["caption"]).save_to_disk(folder)
    (folder / "rows.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert DatasetSource(folder, chatml_processor).documents == 3
    assert not (tmp_path / "ran").exists()
    with pytest.raises(SourceError, match=r"rows\.py"):
        open_source(folder / "rows.py", chatml_processor)


# Parts of sources


class Counted:
    """A source of numbers."""

    def __init__(self, *runs: int):
        self.runs, self.documents = runs, sum(runs)

    def document(self, index: int) -> Document:
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index}; accepted: 0 to {self.documents - 1}")
        return Document(self.key(index), (Text(str(index)),))

    def key(self, index: int) -> str:
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index}; accepted: 0 to {self.documents - 1}")
        return f"counted/{index}"


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.data())
def test_a_subset_is_those_documents_in_their_runs(runs: list[int], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, max(0, sum(runs) - 1)), unique=True, max_size=sum(runs)).map(sorted))
    subset = Subset(Counted(*runs), np.array(chosen, dtype=np.int64))
    assert [text_of(document) for document in documents_of(subset)] == [str(i) for i in chosen]
    assert [subset.key(i) for i in range(len(chosen))] == [f"counted/{i}" for i in chosen]
    run_of = np.repeat(np.arange(len(runs)), runs)
    assert list(subset.runs) == [int((run_of[chosen] == run).sum()) for run in range(len(runs))]


def test_a_subset_keeps_a_sources_promises() -> None:
    check_contract(Subset(Counted(3, 0, 5), np.array([0, 2, 3, 7])))


def test_a_subset_of_a_source_without_end(processor: FoveateProcessor) -> None:
    glyphs = GlyphSource("captions", processor)
    subset = Subset(glyphs, np.array([5, 10**9]))
    assert (subset.documents, subset.runs, subset.key(1)) == (2, (2,), glyphs.key(10**9))
    assert subset.document(0).key == glyphs.document(5).key


@pytest.mark.parametrize(
    ("indices", "what"),
    [
        ([3, 1], "1 stands after 3; accepted: ascending"),
        ([1, 1], "1 stands after 1; accepted: ascending"),
        ([-1, 1], "-1 is there; accepted: 0 to 7"),
        ([1, 8], "8 is there; accepted: 0 to 7"),
        ([0.0, 1.0], "float64.*accepted: integers"),
        ([[0], [1]], "accepted: integers"),
        ([[0], [1, 2]], "accepted: a list of integers"),
        ([True, False], "bool.*accepted: integers"),
        (["1"], "accepted: integers"),
        ([2**70], "accepted"),
        (3, "accepted: integers"),
        (None, "accepted: integers"),
    ],
)  # fmt: skip
def test_bad_indices_are_named_wherever_they_come_from(tmp_path: Path, indices: Any, what: str) -> None:
    path = tmp_path / "subset.json"
    path.write_text(json.dumps({"format": "foveate-subset-1", "indices": indices}))
    with pytest.raises(SourceError, match=rf"subset\.json: .*{what}"):
        read_subset(path, 8)
    if isinstance(indices, list) and "list of integers" not in what and indices != [2**70]:
        with pytest.raises(SourceError, match=f"indices: .*{what}"):
            Subset(Counted(8), np.array(indices))
        np.save(tmp_path / "subset.npy", np.array(indices))
        with pytest.raises(SourceError, match=rf"subset\.npy: .*{what}"):
            read_subset(tmp_path / "subset.npy", 8)


def test_a_subset_file_comes_back(tmp_path: Path) -> None:
    indices = np.array([0, 3, 7])
    write_subset(tmp_path / "a.json", indices, {"by": "DeltaLoss"}, of=8)
    assert read_subset(tmp_path / "a.json", 8).tolist() == [0, 3, 7]
    assert read_subset(tmp_path / "a.json", 8).dtype == np.int64
    assert json.loads((tmp_path / "a.json").read_text())["about"] == {"by": "DeltaLoss"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(SourceError, match=r"made for a source of 8 documents.*this has 9"):
        read_subset(tmp_path / "a.json", 9)
    with pytest.raises(SourceError, match="7 is there"):
        write_subset(tmp_path / "b.json", indices, of=7)
    np.save(tmp_path / "a.npy", indices.astype(np.uint32))
    assert read_subset(tmp_path / "a.npy", 8).tolist() == [0, 3, 7]


def test_a_damaged_subset_file_is_refused(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    np.save(tmp_path / "object.npy", np.array([_Touches(touched)], dtype=object))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "object.npy").read_bytes()[:60])
    (tmp_path / "cut.json").write_text('{"format": "foveate-subset-1", "indices": [1, 2')
    (tmp_path / "other.json").write_text("[1, 2]")
    for name in ("object.npy", "cut.npy", "cut.json", "other.json", "missing.json", "missing.npy"):
        with pytest.raises(SourceError, match=f"{name}: .*accepted"):
            read_subset(tmp_path / name, 8)
    assert not touched.exists()


def split_mix(seed: int, count: int) -> list[int]:
    """SplitMix64 as its authors wrote it, in Python's integers."""

    def step(state: int) -> tuple[int, int]:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return state, z ^ (z >> 31)

    _, state = step(seed)
    numbers = []
    for _ in range(count):
        state, number = step(state)
        numbers.append(number)
    return numbers


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_parts_of_a_split_share_nothing_and_leave_nothing_out(seed: int) -> None:
    source = Counted(700, 0, 1300)
    train, validation = split(source, 0.1, seed, "train"), split(source, 0.1, seed, "validation")
    assert sorted([*train.indices.tolist(), *validation.indices.tolist()]) == list(range(2000))
    hashes = split_mix(seed, 2000)
    assert validation.indices.tolist() == [i for i, number in enumerate(hashes) if number < 0.1 * 2**64]
    assert abs(validation.documents - 200) < 60
    longer = split(Counted(2**20 + 500), 0.1, seed, "validation")  # the same where the source has grown
    assert longer.indices[longer.indices < 2000].tolist() == validation.indices.tolist()
    assert abs(longer.documents / longer.source.documents - 0.1) < 0.001
    assert set(validation.indices) != set(split(source, 0.1, seed + 1, "validation").indices)


def test_a_split_needs_an_end_a_fraction_and_a_part(processor: FoveateProcessor) -> None:
    with pytest.raises(SourceError, match="no end"):
        split(GlyphSource("captions", processor), 0.1, 0, "train")
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="fraction is"):
            split(Counted(8), fraction, 0, "train")
    with pytest.raises(ValueError, match="part is 'test'"):
        split(Counted(8), 0.5, 0, "test")  # type: ignore[arg-type]


# Opening


def test_what_lies_at_a_path_is_opened(shard_folder: Path, chatml_processor: FoveateProcessor, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(shard_folder / "unused"))
    files = shard_folder / "files"
    files.mkdir()
    write_json(files / "a.json", [{"text": "a"}], "list")
    write_json(files / "a.jsonl", [{"text": "a"}], "lines")
    dataset_of(ROWS["caption"]).save_to_disk(files / "rows")
    for path, kind in (
        (shard_folder, ShardSource),
        (str(shard_folder), ShardSource),
        (shard_folder / "shard-000000.tar", ShardSource),
        (f"{shard_folder}/shard-{{000000..000001}}.tar", ShardSource),
        ([f"{shard_folder}/shard-000001.tar", f"{shard_folder}/shard-000000.tar"], ShardSource),
        (files / "a.json", JsonSource),
        ([files / "a.jsonl"], JsonSource),
        (files / "rows", DatasetSource),
    ):
        assert type(open_source(path, chatml_processor)) is kind


def test_options_reach_the_records(tmp_path: Path, media_folder: Path, chatml_processor: FoveateProcessor) -> None:
    infos = [{"image_name": f"{i}.jpg", "matched_text_index": 0, "matched_sim": i / 10} for i in range(3)]
    records = [{"text": f"text {i}", "text_list": ["a"], "image_info": infos} for i in range(4)]
    path = write_json(tmp_path / "a.jsonl", records, "lines")
    write_subset(tmp_path / "subset.json", np.array([1, 3]), of=4)
    source = open_source(
        str(path), chatml_processor, media_root=media_folder / "images", subset=tmp_path / "subset.json", max_images=1
    )
    assert [source.key(i) for i in range(2)] == ["a.jsonl/1", "a.jsonl/3"]
    assert images_of(source.document(0)) == [str(media_folder / "images" / "2.jpg")]
    least = open_source(path, chatml_processor, media_root=media_folder / "images", min_similarity=0.05)
    assert len(images_of(least.document(0))) == 2
    texts = open_source(path, chatml_processor, format="text", subset=tmp_path / "subset.json")
    assert [text_of(document) for document in documents_of(texts)] == [f"text 1{EOS}", f"text 3{EOS}"]
    with pytest.raises(ValueError, match="format is 'prose'"):
        open_source(path, chatml_processor, format="prose")


@pytest.mark.parametrize(
    "path",
    [
        "liuhaotian/LLaVA-Instruct-150K", "http://example.org/a.tar", "s3://b/a.tar", "hf://x/y", "empty",
        "a.txt", "mixed", [], ["a.json", "b.json"], ["a.json", "shards"], "no.json", "no-{0..3}.tar", "*.parquet",
    ],
)  # fmt: skip
def test_what_cannot_be_opened_is_named_with_what_can(
    tmp_path: Path, chatml_processor: FoveateProcessor, monkeypatch: pytest.MonkeyPatch, path: str | list
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "mixed", "shards"):
        Path(folder).mkdir()
    for name in ("a.txt", "mixed/a.tar", "mixed/a.parquet", "shards/a.tar"):
        Path(name).touch()
    for name in ("a.json", "b.json"):
        Path(name).write_text('[{"text": "a"}]')
    named = path if isinstance(path, str) else ", ".join(path) if path else "the list of paths is empty"
    with pytest.raises(SourceError) as caught:
        open_source(path, chatml_processor)
    assert named.split("-{")[0] in str(caught.value)
    assert "nothing is downloaded" in str(caught.value) or "/" not in named
    assert "accepted: " in str(caught.value)


def test_shards_take_no_media_root(shard_folder: Path, chatml_processor: FoveateProcessor) -> None:
    with pytest.raises(SourceError, match=r"media_root is .*shards hold their media"):
        open_source(shard_folder, chatml_processor, media_root=shard_folder)


# The embedded data


def test_the_embedded_data_may_have_an_end(processor: FoveateProcessor) -> None:
    endless, ended = GlyphSource("captions", processor), GlyphSource("captions", processor, documents=3)
    assert (endless.documents, endless.runs) == (None, ())
    assert (ended.documents, ended.runs) == (3, (3,))
    assert endless.document(10**6).key == endless.key(10**6)
    assert [ended.document(i).key for i in range(3)] == [endless.key(i) for i in range(3)]
    for source, index, last in ((ended, 3, " to 2"), (ended, -1, " to 2"), (endless, -1, "")):
        for read in (source.document, source.key):
            with pytest.raises(IndexError, match=f"^document {index}; accepted: 0{last}$"):
                read(index)
    with pytest.raises(ValueError, match=r"^documents is 0; accepted"):
        GlyphSource("captions", processor, documents=0)
