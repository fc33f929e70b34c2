"""Webdataset tar shards, read by random access: an index of byte offsets, and the members of one document.

A document is a run of neighbouring members whose names are equal up to the first dot of the basename, as in webdataset
(`000017.json`, `000017.0.jpg`: key `000017`, extensions `json` and `0.jpg`). Nothing is extracted, and a member's name
is never used as a path.

Headers are walked by a few lines of our own and not by `tarfile`: that loops for ever on a negative size
(CVE-2025-8194, fixed only in recent patch releases of Python) and takes a header that is damaged for the end of the
archive. Understood are ustar, GNU long names and pax.
"""

import glob
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from braceexpand import braceexpand

from .document import DocumentError

INDEX_NAME = "index.json"
INDEX_FORMAT = "foveate-shards-1"
BLOCK = 512
MAX_EXTENDED_HEADER_BYTES = 2**20  # a name is shorter
MAX_DOCUMENT_BYTES = 4 * 2**30  # as MediaLimits.max_bytes: refused before it costs memory
OPEN_FILES = 128  # a process; a shuffle window reaches over several shards
PICKLED = ("pkl", "pickle", "pyd", "pt", "pth", "ckpt", "joblib", "dill")  # webdataset would unpickle the first five
UNSAFE_NAME = re.compile(r"\Z|[/\\]|.:|(.*[/\\])?\.\.([/\\]|\Z)", re.DOTALL)  # absolute, of a Windows drive, or with ..
META_NAME = re.compile(r"__[^/]*__($|/)")  # webdataset passes over such members
PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")  # length and key

Paths = str | os.PathLike | Sequence[str | os.PathLike]


class SourceError(ValueError):
    """A source can't be opened. The message names the path and what is accepted."""


# Tar headers


class Header(NamedTuple):
    """A member of a tar: what it is and where, in bytes; links and devices are neither regular nor folders."""

    name: str
    regular: bool
    folder: bool
    start: int  # of its first header
    data: int
    size: int


class DamagedTarError(Exception):
    """The archive ends too early, or what stands where a header should be is none."""


def walk_headers(read: Callable[[int, int], bytes], end: int) -> Iterator[Header]:
    """The members of a tar, up to the end-of-archive block or exactly to byte `end`.

    Args:
        read: (offset, bytes) → those bytes, fewer at the end.
        end: nothing beyond it is read. A member whose data go beyond is still yielded, then the error follows.

    Raises:
        DamagedTarError: a header is damaged, or a member goes beyond `end`.
    """
    at = start = 0
    name: str | None = None  # from extended headers, as the size
    size: int | None = None
    while at < end:
        header = read(at, BLOCK)
        if len(header) < BLOCK:
            raise DamagedTarError(f"it ends at byte {at + len(header)}, inside a header")
        if not header.strip(b"\0"):
            return
        kind, length = header[156:157], _number(header[124:136])
        if length is None or _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise DamagedTarError(f"no tar header stands at byte {at}")
        at += BLOCK
        if kind in b"LKxXg":  # about the member that follows; K names what it links to, g is for all members
            if length > min(MAX_EXTENDED_HEADER_BYTES, end - at):
                raise DamagedTarError(f"the extended header at byte {at - BLOCK} has {length} bytes")
            if kind == b"L":
                name = _text(read(at, length))
            elif kind in b"xX":
                records = _pax_records(read(at, length))
                name = records.get("path", name)
                if "size" in records:
                    if not re.fullmatch("[0-9]{1,19}", records["size"]):
                        raise DamagedTarError(f"the extended header at byte {at - BLOCK} has no valid size")
                    size = int(records["size"])
            at += -(-length // BLOCK) * BLOCK
            continue
        if name is None:
            name = _text(header[:100])
            if header[257:263] == b"ustar\0" and header[345]:
                name = f"{_text(header[345:500])}/{name}"
        if size is not None:
            length = size
        if kind in b"123456":  # links, devices and folders: whatever the size says, no data follow
            length = 0
        folder = kind == b"5" or (kind in b"\x000" and name.endswith("/"))
        yield Header(name, kind in b"\x0007" and not folder, folder, start, at, length)
        if length > end - at:
            raise DamagedTarError(f"it ends at byte {end}, inside the member {name[:100]!r}")
        at += -(-length // BLOCK) * BLOCK
        start, name, size = at, None, None
    if start < at or at > end:
        raise DamagedTarError(f"it ends at byte {end}, inside a member")


def _number(digits: bytes) -> int | None:
    """A number of a header, octal or (GNU) base 256; None where it is neither, or negative."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    digits = digits.partition(b"\0")[0].strip(b" ")
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)


def _text(name: bytes) -> str:
    return name.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(data: bytes) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of an extended header."""
    records, at = {}, 0
    while match := PAX_RECORD.match(data, at):
        after = at + int(match[1])
        if after <= match.end():
            break
        records[match[2].decode("utf-8", "replace")] = data[match.end() : after - 1].decode("utf-8", "surrogateescape")
        at = after
    return records


def _is_unsafe(header: Header) -> bool:
    """Whether a member is a link or a device, or its name would lead out of a folder that it was extracted to."""
    if not (header.regular or header.folder):
        return True
    return UNSAFE_NAME.match(header.name) is not None


def _key_and_extension(name: str) -> tuple[str, str] | None:
    """Webdataset's key and lower-case extension of a member; None without an extension, for hidden and meta files."""
    folder = name.rfind("/") + 1
    dot = name.find(".", folder)
    if dot <= folder or META_NAME.match(name):
        return None
    return name[:dot], name[dot + 1 :].lower()


def _document_key(header: Header) -> str | None:
    """What the members of a document have in common; None for a member that belongs to none."""
    unsafe = _is_unsafe(header)
    if header.folder and not unsafe:
        return None
    split = _key_and_extension(header.name)
    if split is None:
        return header.name if unsafe else None  # an unsafe one is a document of its own, which is then refused
    return split[0]


# Offsets


def offsets_path(tar: str | os.PathLike) -> Path:
    """Where a shard's offsets are kept: `NAME.tar.idx` beside it."""
    return Path(f"{os.fspath(tar)}.idx")


def scan_offsets(tar: str | os.PathLike) -> tuple[np.ndarray, bool]:
    """Where the documents of a tar begin, from its headers.

    Returns:
        int64 [documents + 1] in bytes, the last being where the documents end; and whether the tar is damaged or lacks
        its end-of-archive block. Then the documents end with the file, and the last one is that in which the damage
        begins, or the one before where no header tells: it can't be known to be whole.
    """
    offsets: list[int] = []
    current: str | None = None
    end = 0
    with open(tar, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            for header in walk_headers(lambda at, length: os.pread(file.fileno(), length, at), size):
                key = _document_key(header)
                if key is not None and key != current:
                    offsets.append(header.start)
                    current = key
                end = header.data + -(-header.size // BLOCK) * BLOCK
            damaged = end + BLOCK > size
        except DamagedTarError:
            damaged = True
    if damaged:
        offsets, end = offsets or [0], size
    return np.array([*offsets, end], np.int64), damaged


def write_offsets(tar: str | os.PathLike) -> np.ndarray:
    """Writes a tar's offsets beside it, and returns them as `scan_offsets` does.

    Raises:
        SourceError: the tar is damaged.
    """
    offsets, damaged = scan_offsets(tar)
    if damaged:
        raise SourceError(f"{tar}: damaged, or it lacks its end-of-archive block; accepted: a whole tar")
    path = offsets_path(tar)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "wb") as file:
        np.save(file, offsets, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    return offsets


def read_offsets(tar: str | os.PathLike) -> tuple[np.ndarray, bool]:
    """As `scan_offsets`, from `NAME.tar.idx` where that fits the tar."""
    offsets = _stored_offsets(tar)
    if offsets is not None and _ends_archive(tar, int(offsets[-1])):
        return offsets, False
    return scan_offsets(tar)


def _stored_offsets(tar: str | os.PathLike) -> np.ndarray | None:
    """What `NAME.tar.idx` holds; None where it is missing or no list of ascending offsets."""
    try:
        offsets = np.load(offsets_path(tar), allow_pickle=False)
    except (OSError, ValueError, EOFError):  # missing or damaged
        return None
    if not isinstance(offsets, np.ndarray) or offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets):
        return None
    ascending = bool((np.diff(offsets) > 0).all()) and offsets[0] >= 0
    return offsets if ascending and not (offsets % BLOCK).any() else None


def _ends_archive(tar: str | os.PathLike, end: int) -> bool:
    """Whether an end-of-archive block stands at a byte."""
    with open(tar, "rb", buffering=0) as file:
        return os.pread(file.fileno(), BLOCK, end) == bytes(BLOCK)


# The index of a folder


@dataclass(frozen=True)
class ShardEntry:
    """A shard as its folder's index knows it."""

    name: str
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a folder, kept in its `index.json`.

    Args:
        shards: in the order in which documents are numbered.
        counts: of whatever the writer counted, such as images.
        about: how the shards were made; any JSON.
    """

    shards: tuple[ShardEntry, ...]
    counts: dict[str, int] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def write(self, folder: str | os.PathLike) -> Path:
        """Writes `index.json`, aside and then renamed."""
        content = {
            "format": INDEX_FORMAT,
            "documents": self.documents,
            "bytes": sum(shard.bytes for shard in self.shards),
            "counts": self.counts,
            "about": self.about,
            "shards": [asdict(shard) for shard in self.shards],
        }
        path = Path(folder, INDEX_NAME)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        with open(aside, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        return path

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "ShardIndex":
        """Reads `index.json`.

        Raises:
            SourceError: it is missing, or not as `write` makes it; the message names the field.
        """
        path = Path(folder, INDEX_NAME)
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path}: not JSON ({error})") from error
        if not isinstance(content, dict) or content.get("format") != INDEX_FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise SourceError(f"{path}: format is {found!r}; accepted: {INDEX_FORMAT!r}")
        rows, counts, about = (content.get(name) for name in ("shards", "counts", "about"))
        if not isinstance(rows, list):
            raise SourceError(f"{path}: shards is {type(rows).__name__}; accepted: a list")
        if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
            raise SourceError(f"{path}: counts is {str(counts)[:100]}; accepted: integers by name")
        if not isinstance(about, dict):
            raise SourceError(f"{path}: about is {type(about).__name__}; accepted: a dictionary")
        index = cls(tuple(_shard_entry(row, f"{path}: shards[{i}]") for i, row in enumerate(rows)), counts, about)
        if len({shard.name for shard in index.shards}) < len(index.shards):
            raise SourceError(f"{path}: a shard's name is there twice; accepted: each once")
        if content.get("documents") != index.documents:
            raise SourceError(f"{path}: documents is {content.get('documents')}, its shards have {index.documents}")
        return index


def _shard_entry(row: Any, where: str) -> ShardEntry:
    if not isinstance(row, dict):
        raise SourceError(f"{where} is {type(row).__name__}; accepted: a dictionary")
    for name, accepted, is_good in (
        ("name", "the name of a .tar in this folder", _is_plain_tar_name),
        ("documents", "an integer from 0", _is_count),
        ("bytes", "an integer from 0", _is_count),
        ("sha256", "64 hexadecimal digits", _is_sha256),
    ):
        if not is_good(row.get(name)):
            raise SourceError(f"{where}.{name} is {str(row.get(name))[:100]!r}; accepted: {accepted}")
    return ShardEntry(row["name"], row["documents"], row["bytes"], row["sha256"])


def _is_plain_tar_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".tar") and not re.search(r"[/\\\0]", name)


def _is_count(number: Any) -> bool:
    return type(number) is int and number >= 0


def _is_sha256(digest: Any) -> bool:
    return isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None


def describe_shard(tar: str | os.PathLike) -> ShardEntry:
    """Writes a shard's offsets beside it, and returns its entry for the index.

    Raises:
        SourceError: the tar is damaged.
    """
    documents = len(write_offsets(tar)) - 1
    return ShardEntry(os.path.basename(tar), documents, os.path.getsize(tar), _sha256(tar))


def index_folder(folder: str | os.PathLike, counts: dict[str, int] | None = None) -> ShardIndex:
    """Writes the offsets of every tar in a folder, and the folder's `index.json`.

    Raises:
        SourceError: no tar is there, or one is damaged.
    """
    names = _tar_names(folder)
    if not names:
        raise SourceError(f"{folder}: no shards; accepted: a folder with .tar files")
    index = ShardIndex(tuple(describe_shard(Path(folder, name)) for name in names), counts or {})
    index.write(folder)
    return index


def verify(folder: str | os.PathLike) -> list[str]:
    """What is wrong with the shards of a folder, by size and checksum of its index: "NAME: what", or nothing."""
    problems = []
    for shard in ShardIndex.read(folder).shards:
        path = Path(folder, shard.name)
        if not path.is_file():
            problems.append(f"{shard.name}: missing")
        elif path.stat().st_size != shard.bytes:
            problems.append(f"{shard.name}: {path.stat().st_size} bytes, the index says {shard.bytes}")
        elif _sha256(path) != shard.sha256:
            problems.append(f"{shard.name}: its SHA-256 is not that of the index")
        elif len(read_offsets(path)[0]) - 1 != shard.documents:
            problems.append(f"{shard.name}: {len(read_offsets(path)[0]) - 1} documents, not {shard.documents}")
    return problems


def _sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tar_names(folder: str | os.PathLike) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".tar") and not name.startswith("."))


# Documents


class Member(NamedTuple):
    """A member of a document."""

    name: str  # whole, as in the tar
    data: bytes


class _Shard(NamedTuple):
    path: str
    label: str  # unique among the shards read together
    documents: int
    size: int  # in bytes; with the time of change it tells a file from a later one of its name
    changed_ns: int
    offsets: tuple[np.ndarray, bool] | None  # as `read_offsets`; None where the folder's index counts the documents


class Shards:
    """The documents of tar shards by number, each read by one `pread`.

    Offsets are read from `NAME.tar.idx`, or from the tar's headers where that is missing or does not fit. Files are
    opened on demand and a bounded number kept open a process; after a fork, and in threads, reads go on independently.

    Args:
        paths: a folder (its `index.json`, or all its .tar files), a .tar, a glob or brace pattern of them, or a list.

    Raises:
        SourceError: nothing is there, a shard is missing, or a folder's index does not fit its shards.
    """

    def __init__(self, paths: Paths):
        found = _find_shards(paths)
        labels = _labels([path for path, _ in found])
        self.shards = []
        for (path, entry), label in zip(found, labels, strict=True):
            status = os.stat(path)
            offsets = None
            if entry is None:
                offsets = read_offsets(path)
                documents = len(offsets[0]) - 1
            elif status.st_size <= entry.bytes:
                documents = entry.documents
            else:
                sizes = f"{status.st_size} bytes, but {INDEX_NAME} says {entry.bytes}"
                raise SourceError(f"{path}: {sizes}; accepted: shards as they were indexed (index the folder again)")
            self.shards.append(_Shard(path, label, documents, status.st_size, status.st_mtime_ns, offsets))
        self.runs = tuple(shard.documents for shard in self.shards)
        self.ends = list(accumulate(self.runs))
        self.documents = sum(self.runs)

    def key(self, index: int) -> str:
        """The shard and the number of a document in it, such as "shard-000003.tar/17"."""
        shard, number = self._locate(index)
        return f"{shard.label}/{number}"

    def members(self, index: int) -> dict[str, Member]:
        """A document's members by extension.

        Raises:
            DocumentError: truncated_shard, unsafe_name, pickled_member, too_large, or bad_record for a member that is
                there twice.
            IndexError: there is no such document.
        """
        shard, number = self._locate(index)
        key = f"{shard.label}/{number}"
        data = _read_document(key, shard, number)
        members: dict[str, Member] = {}
        belongs: str | None = None
        try:
            for header in walk_headers(lambda at, length: data[at : at + length], len(data)):
                of = _document_key(header)
                if of is None:
                    continue
                if of != (belongs := belongs or of):
                    raise DamagedTarError(f"{offsets_path(shard.label)} does not fit it")
                _add_member(key, header, data, members)
        except DamagedTarError as error:
            what = f"the shard is damaged: {error}, counted from the document's first; accepted: a whole tar"
            raise DocumentError(key, "truncated_shard", what) from error
        return members

    def _locate(self, index: int) -> tuple[_Shard, int]:
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index}; accepted: 0 to {self.documents - 1}")
        at = bisect_right(self.ends, index)
        return self.shards[at], index - self.ends[at] + self.runs[at]


def _read_document(key: str, shard: _Shard, number: int) -> bytes:
    """The bytes of a document's members."""
    offsets, damaged = shard.offsets or _indexed_offsets(shard.path, shard.documents, shard.size, shard.changed_ns)
    if number > len(offsets) - 2 or (damaged and number == len(offsets) - 2):
        where = f"at byte {shard.size} or before" if number > len(offsets) - 2 else f"after byte {offsets[number]}"
        raise DocumentError(key, "truncated_shard", f"the shard ends or is damaged {where}; accepted: a whole tar")
    start, end = int(offsets[number]), int(offsets[number + 1])
    if end - start > MAX_DOCUMENT_BYTES:
        raise DocumentError(key, "too_large", f"{end - start} bytes; accepted: up to {MAX_DOCUMENT_BYTES}")
    data = open_file(shard.path, shard.size, shard.changed_ns).read(start, end - start)
    if len(data) < end - start:
        what = f"the shard ends at byte {start + len(data) if data else shard.size}, the document at {end}"
        raise DocumentError(key, "truncated_shard", f"{what}; accepted: a whole tar")
    return data


def _add_member(key: str, header: Header, data: bytes, members: dict[str, Member]) -> None:
    shown = ascii(header.name[:200])
    if _is_unsafe(header):
        accepted = "regular files with relative names without '..'"
        raise DocumentError(key, "unsafe_name", f"member {shown} leads out of the archive; accepted: {accepted}")
    split = _key_and_extension(header.name)
    assert split is not None
    extension = split[1]
    if extension.rpartition(".")[2] in PICKLED:
        what = f"member {shown} can only be read by unpickling, which runs code; accepted: json, txt, images, videos"
        raise DocumentError(key, "pickled_member", what)
    if extension in members:
        raise DocumentError(key, "bad_record", f"member {shown} is there twice; accepted: each extension once")
    members[extension] = Member(header.name, data[header.data : header.data + header.size])


class OpenFile:
    """A file descriptor that closes with the last reference to it. Reads have no position, so they may be shared."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # when Python ends, `os` may be gone already
        if hasattr(self, "descriptor"):
            close(self.descriptor)

    def read(self, start: int, length: int) -> bytes:
        """So many bytes, fewer where the file ends."""
        data = os.pread(self.descriptor, length, start)
        while 0 < len(data) < length:  # one call reads 2 GiB at most
            more = os.pread(self.descriptor, length - len(data), start + len(data))
            if not more:
                break
            data += more
        return data


@lru_cache(OPEN_FILES)
def open_file(path: str, size: int, changed_ns: int) -> OpenFile:
    """A file, kept open while it is one of the last used; size and time tell it from a later file of its name."""
    return OpenFile(path)


@lru_cache(OPEN_FILES)
def _indexed_offsets(path: str, documents: int, size: int, changed_ns: int) -> tuple[np.ndarray, bool]:
    """The offsets of a shard whose number of documents is known: those stored serve even where the tar is cut."""
    offsets = _stored_offsets(path)
    if offsets is not None and len(offsets) - 1 == documents:
        end = int(offsets[-1])
        if size < end + BLOCK or _ends_archive(path, end):
            return offsets, False
    return scan_offsets(path)


def _find_shards(paths: Paths) -> list[tuple[str, ShardEntry | None]]:
    """The .tar files that paths name, with their entries in the index where they were named by their folder."""
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found = [shard for path in several for shard in _find_shards_at(os.fspath(path))]
    if not found:
        raise SourceError(f"{paths}: no shards; accepted: {ACCEPTED_PATHS}")
    names = [os.path.realpath(path) for path, _ in found]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise SourceError(f"{twice}: named twice; accepted: each shard once")
    return found


ACCEPTED_PATHS = "a local folder of .tar files, a .tar file, a glob or brace pattern of them, or a list of these"


def _find_shards_at(path: str) -> list[tuple[str, ShardEntry | None]]:
    if os.path.isdir(path):
        names = _tar_names(path)
        if not os.path.exists(os.path.join(path, INDEX_NAME)):
            if not names:
                raise SourceError(f"{path}: a folder without shards; accepted: {ACCEPTED_PATHS}")
            return [(os.path.join(path, name), None) for name in names]
        entries = ShardIndex.read(path).shards
        if differing := sorted({entry.name for entry in entries} ^ set(names)):
            where = f"not in {INDEX_NAME}" if differing[0] in names else "not there"
            raise SourceError(f"{path}: {differing[0]} is {where}; accepted: the shards that were indexed, no others")
        return [(os.path.join(path, entry.name), entry) for entry in entries]
    if os.path.isfile(path):
        found = [path]
    else:
        try:
            expanded = list(braceexpand(path))
        except ValueError as error:  # unbalanced braces
            raise SourceError(f"{path}: {error}; accepted: {ACCEPTED_PATHS}") from error
        found = [name for one in expanded for name in (sorted(glob.glob(one)) if glob.has_magic(one) else [one])]
    for name in found or [path]:
        if not name.endswith(".tar") or not os.path.isfile(name):
            raise SourceError(f"{name}: no uncompressed .tar file; accepted: {ACCEPTED_PATHS}")
    return [(name, None) for name in found]


def _labels(paths: list[str]) -> list[str]:
    """Short names, unique as the paths are."""
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) == len(names):
        return names
    whole = [os.path.realpath(path) for path in paths]
    common = os.path.commonpath(whole)
    return [os.path.relpath(path, common) for path in whole]
