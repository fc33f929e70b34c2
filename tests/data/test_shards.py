"""Tar shards by random access: against tarfile and plain webdataset, whole, damaged, cut, and hostile."""

import gc
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.data import shards as shards_module
from foveate.data.document import DocumentError
from foveate.data.shards import (
    Member,
    ShardEntry,
    ShardIndex,
    Shards,
    SourceError,
    describe_shard,
    index_folder,
    offsets_path,
    read_offsets,
    scan_offsets,
    verify,
    write_offsets,
)

Files = list[tuple[str, bytes]]


def write_tar(
    path: Path, files: Files, format: int = tarfile.USTAR_FORMAT, types: dict[str, bytes] | None = None
) -> Path:
    """A tar of these members, by Python's tarfile; `types` makes some links, devices or folders."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.type = (types or {}).get(name, tarfile.REGTYPE)
            info.size = len(data) if info.isreg() else 0
            info.linkname = "/etc/passwd" if info.issym() or info.islnk() else ""
            tar.addfile(info, io.BytesIO(data))
    return path


def pages(count: int, images: int = 2, start: int = 0) -> Files:
    """Members of documents, each of a JSON and images, of sizes around tar's blocks."""
    files = []
    for i in range(start, start + count):
        files.append((f"{i:05d}.json", json.dumps({"number": i}).encode()))
        files += [(f"{i:05d}.{k}.jpg", bytes([i % 256, k]) * (200 * i + 128 * k)) for k in range(images)]
    return files


def expected_documents(files: Files) -> list[dict[str, bytes]]:
    """Extension → data of each document, where every member has an extension and keys are made by `pages`."""
    documents: dict[str, dict[str, bytes]] = {}
    for name, data in files:
        documents.setdefault(name[:5], {})[name[6:]] = data
    return list(documents.values())


def data_of(members: dict[str, Member]) -> dict[str, bytes]:
    return {extension: member.data for extension, member in members.items()}


def outcome(shards: Shards, index: int) -> dict[str, bytes] | str:
    """The document's members, or why it can't be read; errors carry the document's key."""
    try:
        return data_of(shards.members(index))
    except DocumentError as error:
        assert error.key == shards.key(index)
        assert "accepted: " in error.message
        return error.reason


# Grouping and offsets

stems = st.text("ab/.-é中 ", min_size=1, max_size=6) | st.builds("{}".format, st.integers(0, 99))
names = st.builds(
    lambda folder, stem, extension: f"{folder}{stem}{extension}",
    st.sampled_from(["", "d/", "d.x/", "./", "f/" * 40, "é" * 60 + "/"]),
    stems,
    st.sampled_from(["", ".jpg", ".JPG", ".0.jpg", ".json", ".a.b.c", "." + "x" * 120]),
)
plans = st.lists(st.tuples(names, st.sampled_from([0, 1, 511, 512, 513, 1500])), max_size=12)


def is_plain(name: str) -> bool:
    """Names about which webdataset has no other opinion: not hidden, and not unsafe."""
    *folders, last = name.split("/")
    return all(folder not in ("", "..") for folder in folders) and last != "" and not last.startswith(".")


@given(plans, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_are_webdatasets(tmp_path: Path, plan: list[tuple[str, int]], format: int) -> None:
    plan = [(name, size) for name, size in plan if is_plain(name)]
    unique = {
        name.lower(): (name, np.random.default_rng(size).bytes(size)) for name, size in plan
    }  # webdataset fails on members there twice
    path = write_tar(tmp_path / "random.tar", list(unique.values()), format)

    samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    shards = Shards(path)
    assert shards.documents == len(samples)
    for index, sample in enumerate(samples):
        assert data_of(shards.members(index)) == {k: v for k, v in sample.items() if not k.startswith("__")}
        for member in shards.members(index).values():
            assert member.name.startswith(sample["__key__"] + ".")

    offsets, damaged = scan_offsets(path)  # a document's first header, extended headers included, as tarfile tells
    with tarfile.open(path) as tar:
        starts = {member.name: member.offset for member in tar}
    firsts = [min(starts[m.name] for m in shards.members(i).values()) for i in range(len(samples))]
    assert (offsets[:-1].tolist(), damaged) == (firsts, False)


def test_webdatasets_writer_and_reader_agree_with_us(tmp_path: Path) -> None:
    pattern = f"{tmp_path}/shard-%06d.tar"
    with webdataset.ShardWriter(pattern, maxcount=7, verbose=0) as writer:
        for i in range(20):
            writer.write(
                {"__key__": f"page/{i:04d}", "json": {"i": i}, "0.jpg": bytes([i]) * i * 100, "txt": f"text {i}"}
            )
    shards = Shards(tmp_path)
    assert shards.runs == (7, 7, 6)
    assert [shards.key(i) for i in (0, 6, 7, 19)] == [
        "shard-000000.tar/0", "shard-000000.tar/6", "shard-000001.tar/0", "shard-000002.tar/5",
    ]  # fmt: skip
    paths = [f"{tmp_path}/shard-{i:06d}.tar" for i in range(3)]
    for index, sample in enumerate(webdataset.WebDataset(paths, shardshuffle=False)):
        assert data_of(shards.members(index)) == {k: v for k, v in sample.items() if not k.startswith("__")}


def test_members_of_no_document_are_passed_over(tmp_path: Path) -> None:
    """Folders, webdataset's meta members, members without an extension, and hidden ones such as macOS writes."""
    files = [("__meta__/x.json", b"{}"), ("README", b"x" * 700), ("d", b""), ("d/1.json", b"1"), ("d/._1.jpg", b"mac"),
             ("d/1.jpg", b"2"), ("LICENSE", b"y"), ("d/2.json", b"3"), ("NOTES", b"z")]  # fmt: skip
    shards = Shards(write_tar(tmp_path / "a.tar", files, types={"d": tarfile.DIRTYPE}))
    assert [outcome(shards, i) for i in range(shards.documents)] == [{"json": b"1", "jpg": b"2"}, {"json": b"3"}]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_whole(tmp_path: Path, format: int) -> None:
    folder = "a-folder/" * 14
    path = write_tar(tmp_path / "a.tar", [(f"{folder}1.jpg", b"1"), (f"{folder}2.jpg", b"2"), ("2.txt", b"3")], format)
    shards = Shards(path)
    assert [{e: m.name for e, m in shards.members(i).items()} for i in range(shards.documents)] == [
        {"jpg": f"{folder}1.jpg"}, {"jpg": f"{folder}2.jpg"}, {"txt": "2.txt"},
    ]  # fmt: skip


def test_an_index_out_of_range_is_an_index_error(tmp_path: Path) -> None:
    shards = Shards(write_tar(tmp_path / "a.tar", pages(3)))
    for index in (-1, 3):
        for read in (shards.members, shards.key):
            with pytest.raises(IndexError, match=f"document {index}; accepted: 0 to 2"):
                read(index)


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", b"1"), ("1.JPG", b"2"), ("2.jpg", b"3")])
    assert [outcome(Shards(path), i) for i in range(2)] == ["bad_record", {"jpg": b"3"}]


# Stored offsets


@pytest.fixture
def counted_scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    scanned: list[str] = []

    def scan(tar: str | os.PathLike) -> tuple[np.ndarray, bool]:
        scanned.append(os.path.basename(tar))
        return scan_offsets(tar)

    monkeypatch.setattr(shards_module, "scan_offsets", scan)
    return scanned


def test_stored_offsets_spare_the_scan(tmp_path: Path, counted_scans: list[str]) -> None:
    files = pages(5)
    path = write_tar(tmp_path / "a.tar", files)
    offsets = write_offsets(path)
    assert offsets.tolist() == scan_offsets(path)[0].tolist()
    assert np.load(offsets_path(path), allow_pickle=False).dtype == np.int64
    counted_scans.clear()
    shards = Shards(path)
    assert [outcome(shards, i) for i in range(5)] == expected_documents(files)
    assert counted_scans == []
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.idx"]


def damaged_offsets(good: np.ndarray) -> list[bytes]:
    def saved(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    whole = saved(good)
    return [
        b"",
        b"no numpy",
        whole[:-4],
        whole[:100],
        saved(good.astype(np.float64)),
        saved(good[None]),
        saved(good[::-1].copy()),
        saved(good + 1),
        saved(good[:-1]),  # ends where a document begins
        saved(good + 512 * 10**6),
        saved(good[:0]),
        saved(np.array([good, None], dtype=object)),  # np.load would unpickle it
    ]


@pytest.mark.parametrize("case", range(12))
def test_offsets_that_do_not_fit_are_made_anew(tmp_path: Path, counted_scans: list[str], case: int) -> None:
    files = pages(5)
    path = write_tar(tmp_path / "a.tar", files)
    damaged = damaged_offsets(write_offsets(path))
    assert len(damaged) == 12
    offsets_path(path).write_bytes(damaged[case])
    counted_scans.clear()
    shards = Shards(path)
    assert [outcome(shards, i) for i in range(shards.documents)] == expected_documents(files)
    assert counted_scans == ["a.tar"]


def test_offsets_of_an_older_shard_are_not_used(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pages(3))
    write_offsets(path)
    write_tar(path, pages(9))
    shards = Shards(path)
    assert [outcome(shards, i) for i in range(shards.documents)] == expected_documents(pages(9))


def test_offsets_into_another_shard_of_the_same_end_are_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.txt", b"x" * 512), ("2.txt", b"x" * 1024)])
    write_offsets(path)
    write_tar(path, [("1.txt", b"x" * 1024), ("2.txt", b"x" * 512)])
    assert [outcome(Shards(path), i) for i in range(2)] == ["truncated_shard", "truncated_shard"]


def test_offsets_that_join_documents_are_noticed(tmp_path: Path) -> None:
    files = pages(5)
    path = write_tar(tmp_path / "a.tar", files)
    with open(offsets_path(path), "wb") as file:
        np.save(file, np.delete(scan_offsets(path)[0], 2))
    assert [outcome(Shards(path), i) for i in (0, 1, 2)] == [
        expected_documents(files)[0], "truncated_shard", expected_documents(files)[3],
    ]  # fmt: skip


def test_offsets_of_another_shard_of_as_many_documents_are_not_used(tmp_path: Path) -> None:
    files = pages(5)
    path = write_tar(tmp_path / "a.tar", files)
    index_folder(tmp_path)
    (tmp_path / "other").mkdir()
    other = write_tar(tmp_path / "other" / "a.tar", pages(5, images=1))
    write_offsets(other)
    shutil.copy(offsets_path(other), offsets_path(path))
    assert [outcome(Shards(tmp_path), i) for i in range(5)] == expected_documents(files)


def test_no_document_is_in_an_empty_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [])
    assert write_offsets(path).tolist() == [0]
    assert Shards(path).documents == 0


# Cut and damaged shards


@pytest.fixture(params=["alone", "with its offsets", "with the folder's index"])
def kept(request: pytest.FixtureRequest) -> str:
    return request.param


def test_whole_documents_before_a_cut_are_read(tmp_path: Path, kept: str) -> None:
    """Cut at every block of the last two documents, and within blocks."""
    files = pages(6)
    path = write_tar(tmp_path / "a.tar", files)
    if kept == "with its offsets":
        write_offsets(path)
    elif kept == "with the folder's index":
        index_folder(tmp_path)
    whole, documents = path.read_bytes(), expected_documents(files)
    starts = scan_offsets(path)[0].tolist()
    for cut in [at for block in range(starts[4], starts[6] + 512, 512) for at in (block, block + 1, block + 511)]:
        path.write_bytes(whole[:cut])
        shards = Shards(path if kept != "with the folder's index" else tmp_path)
        found = [outcome(shards, i) for i in range(shards.documents)]
        before = sum(end <= cut for end in starts[1:])  # documents that are whole in what is left
        if kept == "with the folder's index":
            assert found == documents[:before] + ["truncated_shard"] * (6 - before)
        else:  # where the next header is gone, nothing tells that the last document is whole
            is_told = any(start < cut for start in starts[before : before + 1] if cut - start >= 512) and before < 6
            assert found == (documents[:before] if is_told else documents[: before - 1]) + ["truncated_shard"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_cut_between_a_name_and_its_header_is_noticed(tmp_path: Path, format: int) -> None:
    folder = "a-folder/" * 14
    files = [(f"{folder}{i}.txt", bytes([i]) * 700) for i in range(3)]
    path = write_tar(tmp_path / "a.tar", files, format)
    whole, end = path.read_bytes(), int(scan_offsets(path)[0][-1])
    for cut in range(512, end + 512, 512):
        path.write_bytes(whole[:cut])
        shards = Shards(path)
        *before, last = [outcome(shards, i) for i in range(shards.documents)]
        assert before == [{"txt": data} for _, data in files[: len(before)]]
        assert last == "truncated_shard"


def test_a_tar_cut_to_nothing_is_one_document_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pages(2))
    whole = path.read_bytes()
    for cut in (0, 1, 511, 512):
        path.write_bytes(whole[:cut])
        shards = Shards(path)
        assert [outcome(shards, i) for i in range(shards.documents)] == ["truncated_shard"]


def test_a_cut_shard_is_not_indexed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pages(3))
    path.write_bytes(path.read_bytes()[:-10240])
    for index in (write_offsets, describe_shard):
        with pytest.raises(SourceError, match=r"a\.tar.*whole tar"):
            index(path)
    assert os.listdir(tmp_path) == ["a.tar"]


@pytest.mark.parametrize("place", ["first header", "second header"])
def test_a_damaged_header_costs_its_document_where_offsets_are_stored(tmp_path: Path, place: str) -> None:
    files = pages(6)
    path = write_tar(tmp_path / "a.tar", files)
    offsets = write_offsets(path)
    content = bytearray(path.read_bytes())
    content[int(offsets[2]) + (30 if place == "first header" else 1024 + 30)] ^= 0xFF
    path.write_bytes(content)
    documents = expected_documents(files)
    shards = Shards(path)
    assert [outcome(shards, i) for i in range(6)] == [*documents[:2], "truncated_shard", *documents[3:]]
    offsets_path(path).unlink()  # without them, where the next document begins is not known
    shards = Shards(path)
    read = 1 if place == "first header" else 2  # the damaged header may have belonged to the document before
    assert [outcome(shards, i) for i in range(shards.documents)] == [*documents[:read], "truncated_shard"]


def test_a_shard_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    files = pages(6)
    path = write_tar(tmp_path / "a.tar", files)
    shards = Shards(path)
    os.truncate(path, int(scan_offsets(path)[0][4]) + 700)
    assert [outcome(shards, i) for i in range(6)] == expected_documents(files)[:4] + ["truncated_shard"] * 2


def header_with_size(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157], block[257:265] = name, size, kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "header",
    [
        header_with_size(b"2.txt", b"\xff" * 10 + struct.pack(">h", -512)),  # tarfile reads it again and again
        header_with_size(b"2.txt", b"\xff" * 10 + struct.pack(">h", -1024)),
        header_with_size(b"2.txt", b"-0000000002\0"),
        header_with_size(b"2.txt", b"\x80" + b"\xff" * 11),
        header_with_size(b"2.txt", b"77777777777\0"),
        header_with_size(b"x", b"77777777777\0", b"x"),
        header_with_size(b"x", b"77777777777\0", b"L"),
        header_with_size(b"x", b"%011o\0" % 2**21, b"L") + b"n" * 2**21,
        header_with_size(b"x", b"00000000034\0", b"x") + b"12 size=-512\n16 path=2.txt\n".ljust(512, b"\0"),
        header_with_size(b"x", b"00000010000\0", b"x") + b"5000 size=".ljust(4096, b"9"),
    ],
)
def test_hostile_headers_end_the_shard(tmp_path: Path, header: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.txt", b"one")])
    path.write_bytes(path.read_bytes()[:1024] + header + header_with_size(b"3.txt", b"00000000000\0") + bytes(1024))
    shards = Shards(path)
    found = [outcome(shards, i) for i in range(shards.documents)]
    assert found[-1] == "truncated_shard"
    assert found[:-1] in ([], [{"txt": b"one"}])


def test_sizes_in_base_256_and_in_pax_headers_are_read(tmp_path: Path) -> None:
    big = header_with_size(b"1.txt", b"\x80" + (600).to_bytes(11, "big")) + b"x" * 600 + bytes(424)
    record = b"12 size=600\n"
    pax = header_with_size(b"x", b"%011o\0" % len(record), b"x") + record.ljust(512, b"\0")
    pax += header_with_size(b"2.txt", b"00000000000\0") + b"y" * 600 + bytes(424)
    path = tmp_path / "a.tar"
    path.write_bytes(big + pax + bytes(1024))
    assert [outcome(Shards(path), i) for i in range(2)] == [{"txt": b"x" * 600}, {"txt": b"y" * 600}]


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_never_raise_anything_else(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, pages(4), tarfile.PAX_FORMAT)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    shards = Shards(path)
    for index in range(shards.documents):
        outcome(shards, index)


# Hostile members


@pytest.mark.parametrize(
    "name",
    ["../1.jpg", "../../../etc/cron.d/1", "a/../../1.jpg", "/etc/1.jpg", "/etc/passwd", "..\\1.jpg", "C:\\1", "a/.."],
)  # fmt: skip
def test_a_name_that_leads_out_is_refused_and_its_neighbours_are_read(tmp_path: Path, name: str) -> None:
    files = [("0.jpg", b"0"), (name, b"out"), ("2.jpg", b"2")]
    shards = Shards(write_tar(tmp_path / "a.tar", files))
    assert [outcome(shards, i) for i in range(3)] == [{"jpg": b"0"}, "unsafe_name", {"jpg": b"2"}]


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE", "GNUTYPE_SPARSE"])
@pytest.mark.parametrize("name", ["1.jpg", "link"])
def test_links_and_devices_are_refused_and_their_neighbours_are_read(tmp_path: Path, kind: str, name: str) -> None:
    files = [("0.jpg", b"0"), (name, b""), ("2.jpg", b"2")]
    shards = Shards(write_tar(tmp_path / "a.tar", files, types={name: getattr(tarfile, kind)}))
    assert [outcome(shards, i) for i in range(3)] == [{"jpg": b"0"}, "unsafe_name", {"jpg": b"2"}]


class _Touches:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd", "pt", "pth", "0.PTH", "ckpt", "features.pkl", "joblib"])
def test_a_pickled_member_is_refused_and_not_opened(tmp_path: Path, extension: str) -> None:
    touched = tmp_path / "touched"
    bomb = pickle.dumps(_Touches(touched))
    files = [("0.jpg", b"0"), ("1.jpg", b"1"), (f"1.{extension}", bomb), ("2.jpg", b"2")]
    shards = Shards(write_tar(tmp_path / "a.tar", files))
    assert [outcome(shards, i) for i in range(3)] == [{"jpg": b"0"}, "pickled_member", {"jpg": b"2"}]
    assert not touched.exists()
    pickle.loads(bomb).close()  # it would have been noticed
    assert touched.exists()


def test_a_document_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"0"), ("1.jpg", b"1" * 5000), ("2.jpg", b"2")])
    monkeypatch.setattr(shards_module, "MAX_DOCUMENT_BYTES", 4096)
    assert [outcome(Shards(path), i) for i in range(3)] == [{"jpg": b"0"}, "too_large", {"jpg": b"2"}]


# A folder's index


def test_an_indexed_folder_is_read_as_its_shards(tmp_path: Path, counted_scans: list[str]) -> None:
    files = pages(11)
    write_tar(tmp_path / "b.tar", files[12:])
    write_tar(tmp_path / "a.tar", files[:12])
    index = index_folder(tmp_path, {"images": 22})
    assert index == ShardIndex.read(tmp_path)
    assert [(shard.name, shard.documents) for shard in index.shards] == [("a.tar", 4), ("b.tar", 7)]
    assert (index.documents, index.counts) == (11, {"images": 22})
    for shard in index.shards:
        content = (tmp_path / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    counted_scans.clear()
    shards = Shards(tmp_path)
    assert (shards.runs, shards.documents) == ((4, 7), 11)
    assert [outcome(shards, i) for i in range(11)] == expected_documents(files)
    assert counted_scans == []
    for name in ("a.tar.idx", "b.tar.idx"):
        (tmp_path / name).unlink()
    assert [outcome(Shards(tmp_path), i) for i in range(11)] == expected_documents(files)


def test_verify_lists_damaged_shards(tmp_path: Path) -> None:
    for i in range(5):
        write_tar(tmp_path / f"{i}.tar", pages(3, start=3 * i))
    index = index_folder(tmp_path)
    assert verify(tmp_path) == []
    content = bytearray((tmp_path / "1.tar").read_bytes())
    content[600] ^= 1
    (tmp_path / "1.tar").write_bytes(content)
    (tmp_path / "2.tar").write_bytes(content[:-512])
    (tmp_path / "3.tar").unlink()
    wrong = [ShardEntry(s.name, 4, s.bytes, s.sha256) if s.name == "4.tar" else s for s in index.shards]
    ShardIndex(tuple(wrong)).write(tmp_path)
    assert [problem.split(":")[0] for problem in verify(tmp_path)] == ["1.tar", "2.tar", "3.tar", "4.tar"]


ENTRY = {"name": "a.tar", "documents": 3, "bytes": 10240, "sha256": "0" * 64}
INDEX = {"format": "foveate-shards-1", "documents": 3, "counts": {}, "about": {}, "shards": [ENTRY]}


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("{", "not JSON"),
        (json.dumps([INDEX]), "format"),
        (json.dumps(INDEX | {"format": "foveate-shards-9"}), "format is 'foveate-shards-9'"),
        (json.dumps(INDEX | {"shards": {}}), "shards is dict"),
        (json.dumps(INDEX | {"shards": ["a.tar"]}), r"shards\[0\] is str"),
        (json.dumps(INDEX | {"shards": [ENTRY | {"name": "../a.tar"}]}), r"shards\[0\].name is '../a.tar'"),
        (json.dumps(INDEX | {"shards": [ENTRY | {"name": "/etc/passwd"}]}), r"shards\[0\].name"),
        (json.dumps(INDEX | {"shards": [ENTRY | {"documents": -1}]}), r"shards\[0\].documents is '-1'"),
        (json.dumps(INDEX | {"shards": [ENTRY | {"documents": True}]}), r"shards\[0\].documents"),
        (json.dumps(INDEX | {"shards": [ENTRY | {"bytes": "10"}]}), r"shards\[0\].bytes"),
        (json.dumps(INDEX | {"shards": [ENTRY | {"sha256": "0" * 63}]}), r"shards\[0\].sha256"),
        (json.dumps(INDEX | {"shards": [ENTRY, ENTRY], "documents": 6}), "twice"),
        (json.dumps(INDEX | {"documents": 4}), "documents is 4"),
        (json.dumps(INDEX | {"counts": {"images": "3"}}), "counts"),
        (json.dumps(INDEX | {"about": None}), "about is NoneType"),
    ],
)
def test_a_damaged_index_names_the_field(tmp_path: Path, content: str, field: str) -> None:
    write_tar(tmp_path / "a.tar", pages(3))
    (tmp_path / "index.json").write_text(content)
    for read in (ShardIndex.read, Shards):
        with pytest.raises(SourceError, match=f"index.json: .*{field}"):
            read(tmp_path)


def test_an_index_that_does_not_fit_its_folder_is_refused(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, pages(40))
    index_folder(tmp_path)
    write_tar(tmp_path / "c.tar", pages(1))
    with pytest.raises(SourceError, match=r"c\.tar is not in index\.json"):
        Shards(tmp_path)
    (tmp_path / "c.tar").unlink()
    write_tar(tmp_path / "b.tar", pages(80))
    with pytest.raises(SourceError, match=r"b\.tar: \d+ bytes, but index\.json says \d+"):
        Shards(tmp_path)
    (tmp_path / "b.tar").unlink()
    with pytest.raises(SourceError, match=r"b\.tar is not there"):
        Shards(tmp_path)


# Paths


def test_shards_are_found_by_folder_glob_braces_and_list(tmp_path: Path) -> None:
    files = pages(6)
    for i in range(3):
        write_tar(tmp_path / f"s-{i}.tar", files[6 * i : 6 * i + 6])
    (tmp_path / "notes.txt").touch()
    for paths in (
        tmp_path,
        str(tmp_path),
        f"{tmp_path}/s-?.tar",
        f"{tmp_path}/*.tar",
        f"{tmp_path}/s-{{0..2}}.tar",
        f"{tmp_path}/s-{{0,1,2}}.tar",
        [tmp_path / "s-0.tar", f"{tmp_path}/s-{{1..2}}.tar"],
    ):
        shards = Shards(paths)
        assert [outcome(shards, i) for i in range(shards.documents)] == expected_documents(files)
    backwards = Shards([tmp_path / "s-2.tar", tmp_path / "s-0.tar"])
    assert outcome(backwards, 0) == expected_documents(files)[4]


def test_keys_are_unique_over_folders(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "s.tar", pages(2))
    shards = Shards([tmp_path / "x", tmp_path / "y"])
    assert [shards.key(i) for i in range(4)] == ["x/s.tar/0", "x/s.tar/1", "y/s.tar/0", "y/s.tar/1"]


@pytest.mark.parametrize(
    "paths",
    ["no.tar", "no", "empty", "*.tar", "s-{0..3}.tar", "s-{0", "s-0.tar.gz", "notes.txt", [], ["s-0.tar", "no.tar"]],
)  # fmt: skip
def test_paths_without_shards_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: str | list) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("notes.txt").touch()
    shutil.copy(write_tar(tmp_path / "kept.tar", pages(1)), "s-0.tar.gz")
    Path("kept.tar").rename("s-0.tar") if paths != "*.tar" else Path("kept.tar").unlink()
    with pytest.raises(SourceError, match=r"accepted: a local folder of .tar files"):
        Shards(paths)


def test_a_shard_named_twice_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pages(1))
    (tmp_path / "b.tar").symlink_to(path)
    with pytest.raises(SourceError, match=r"a\.tar: named twice"):
        Shards([tmp_path])


# Processes, threads, open files


def _read_in_child(shards: Shards, documents: list, queue: multiprocessing.Queue) -> None:
    order = np.random.default_rng(os.getpid()).permutation(len(documents)).tolist()
    queue.put(all(data_of(shards.members(i)) == documents[i] for i in order for _ in range(5)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_the_same(tmp_path: Path, method: str) -> None:
    files = pages(20)
    write_tar(tmp_path / "a.tar", files[:30])
    write_tar(tmp_path / "b.tar", files[30:])
    index_folder(tmp_path)
    shards, documents = Shards(tmp_path), expected_documents(files)
    assert data_of(shards.members(0)) == documents[0]  # a file is open when the process forks
    if method == "spawn":
        assert pickle.loads(pickle.dumps(shards)).members(13) == shards.members(13)
        return
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read_in_child, args=(shards, documents, queue)) for _ in range(3)]
    for child in children:
        child.start()
    for _ in range(5):
        assert [data_of(shards.members(i)) for i in range(20)] == documents
    assert [queue.get(timeout=60) for _ in children] == [True] * 3
    for child in children:
        child.join(60)


def test_few_files_stay_open_and_threads_may_share_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards_module.open_file.cache_clear()
    gc.collect()
    files = pages(300, images=0)
    for i in range(300):
        write_tar(tmp_path / f"{i:03d}.tar", files[i : i + 1])
    shards, before = Shards(tmp_path), len(os.listdir("/proc/self/fd"))
    order = np.random.default_rng(0).integers(0, 300, 2000).tolist()
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda i: data_of(shards.members(i)), order))
    assert read == [{"json": files[i][1]} for i in order]
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) - before <= shards_module.OPEN_FILES


def test_a_file_put_in_the_place_of_another_is_read_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.txt", b"old")])
    assert outcome(Shards(path), 0) == {"txt": b"old"}
    path.unlink()
    write_tar(path, [("1.txt", b"new")])
    os.utime(path, ns=(10**18, 10**18))
    assert outcome(Shards(path), 0) == {"txt": b"new"}


def test_read_offsets_says_what_scan_offsets_says(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pages(4))
    for _ in range(2):
        for one, other in zip(read_offsets(path), scan_offsets(path), strict=True):
            assert np.array_equal(one, other)
        write_offsets(path)
