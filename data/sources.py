"""Where documents come from: tar shards, JSON files, Hugging Face datasets on disk, and parts of these.

A source is map-style and pure: the same number is always the same document. Nothing is downloaded, nothing from data is
executed, and no path that data name is opened unless it lies inside the media's folder.
"""

import glob
import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from braceexpand import braceexpand

from ..vlm.processor import FoveateProcessor
from .document import Document, DocumentError
from .records import (
    MEDIA_EXTENSIONS,
    MediaReader,
    RecordOptions,
    document_from_record,
    has_text,
    parse_record,
)
from .shards import INDEX_NAME, Member, Paths, Shards, SourceError, open_file

SUBSET_FORMAT = "foveate-subset-1"
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
JSON_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)  # a string or a bracket
SCAN_BYTES = 2**23  # of a file that are held while its records are looked for
SHORTEST_RECORD_BYTES = 8  # only shorter lines may be blank
SAVED_MARKERS = ("state.json", "dataset_dict.json")  # of a folder written by datasets.save_to_disk
ACCEPTED = (
    "a local folder of .tar shards or .parquet files, a folder written by datasets.save_to_disk, a .tar, .json, .jsonl "
    "or .parquet file, or a glob or brace pattern or list of .tar or .parquet files"
)


class Source(Protocol):
    """Documents by number, from 0.

    `documents` is how many there are, None where there is no end; `runs` are the lengths of the runs of documents that
    are stored together, in order and some perhaps 0, for shuffling with locality; empty where there is no end.
    """

    @property
    def documents(self) -> int | None: ...

    @property
    def runs(self) -> Sequence[int]: ...

    def document(self, index: int) -> Document:
        """Raises DocumentError where it can't be used, IndexError where there is none."""
        ...

    def key(self, index: int) -> str:
        """What names the document in logs, whether or not it can be read; unique within the source."""
        ...


# Tar shards


class ShardSource:
    """Documents in webdataset tar shards.

    A document has a JSON member, whose media are other members of it; or an image or video and a .txt; or a .txt alone.
    A medium is named by its extension ("0.jpg"), its member's name or the basename of that; a single one needs no name.

    Args:
        paths: see `Shards`.
        processor: for the chat template and the end of text.
        options: how records become documents.
    """

    def __init__(self, paths: Paths, processor: FoveateProcessor, options: RecordOptions | None = None):
        self.shards, self.processor, self.options = Shards(paths), processor, options or RecordOptions()
        self.documents, self.runs = self.shards.documents, self.shards.runs

    def key(self, index: int) -> str:
        return self.shards.key(index)

    def document(self, index: int) -> Document:
        return self.document_of(self.key(index), self.shards.members(index))

    def document_of(self, key: str, members: dict[str, Member]) -> Document:
        """The document that a tar's members, by extension, are.

        Raises:
            DocumentError: they are none.
        """
        record = _record_of(key, members)
        media = [name for name in members if name.rpartition(".")[2] in MEDIA_EXTENSIONS]
        return document_from_record(key, record, _members_reader(key, members), self.options, self.processor, media)


def _record_of(key: str, members: dict[str, Member]) -> dict[str, Any]:
    """A document's JSON, with its .txt as the text where the JSON has none."""
    jsons = [name for name in members if name.rpartition(".")[2] == "json"]
    texts = [name for name in members if name.rpartition(".")[2] in ("txt", "text")]
    if len(jsons) > 1 or len(texts) > 1 or not jsons + texts:
        what = f"members with the extensions {', '.join(members)[:300]!a}"
        raise DocumentError(key, "bad_record", f"{what}; accepted: one json, one txt, or one of each, and media")
    record = parse_record(key, members[jsons[0]].data, f"member {members[jsons[0]].name!a}") if jsons else {}
    if not texts or has_text(record):
        return record
    name, data = members[texts[0]]
    try:
        return record | {"text": data.decode("utf-8").removesuffix("\n")}
    except UnicodeDecodeError as error:
        raise DocumentError(key, "bad_json", f"member {name!a}: {error}; accepted: UTF-8") from error


def _members_reader(key: str, members: dict[str, Member]) -> MediaReader:
    def read(name: str) -> bytes:
        if (found := members.get(name.lower())) is not None:
            return found.data
        for member in members.values():
            if name in (member.name, os.path.basename(member.name)):
                return member.data
        what = f"{name[:200]!a} is not among its members {', '.join(members)[:300]!a}"
        raise DocumentError(key, "missing_media", f"{what}; accepted: an extension or name of one of them")

    return read


def _folder_reader(key: str, root: str) -> MediaReader:
    """Names to paths inside a folder, symbolic links followed."""

    def read(name: str) -> str:
        path = os.path.realpath(os.path.join(root, name)) if "\0" not in name else ""
        if not path.startswith(os.path.join(root, "")):
            what = f"{name[:200]!a} lies outside of the media's folder {root}"
            raise DocumentError(key, "unsafe_name", f"{what}; accepted: files inside it")
        if not os.path.isfile(path):
            raise DocumentError(key, "missing_media", f"{path[:300]!a} is not there; accepted: a file")
        return path

    return read


# JSON files


class JsonSource:
    """Records of a JSON file: a list of objects, or one object a line (JSON Lines); media are files beside it.

    The file is read once to find its records, 16 bytes are kept of each, and a record is parsed when it is asked for.

    Args:
        path: the file; a list or lines is told by its first character.
        processor: for the chat template and the end of text.
        options: how records become documents.
        media_root: folder that names of media start from and must not leave, symbolic links followed; the file's own by
            default.

    Raises:
        SourceError: the file or folder is missing, or the file holds no list and no lines.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        processor: FoveateProcessor,
        options: RecordOptions | None = None,
        media_root: str | os.PathLike | None = None,
    ):
        self.path, self.processor, self.options = os.fspath(path), processor, options or RecordOptions()
        if not self.path.endswith(JSON_SUFFIXES) or not os.path.isfile(self.path):
            raise SourceError(f"{self.path}: no such JSON file; accepted: {', '.join(JSON_SUFFIXES)}")
        self.media_root = _media_root(media_root, os.path.dirname(self.path))
        status = os.stat(self.path)
        self.stamp = status.st_size, status.st_mtime_ns
        with open(self.path, "rb") as file:
            spans = _find_list_items if file.read(SCAN_BYTES).lstrip()[:1] == b"[" else _find_lines
        self.spans = spans(self.path)  # int64 [documents, 2], first byte and the one after the last
        self.documents = len(self.spans)
        if not self.documents:
            raise SourceError(f"{self.path}: no records; accepted: a list of objects, or an object a line")
        self.runs = (self.documents,)

    def key(self, index: int) -> str:
        self._check(index)
        return f"{os.path.basename(self.path)}/{index}"

    def document(self, index: int) -> Document:
        key = self.key(index)
        start, end = self.spans[index].tolist()
        data = open_file(self.path, *self.stamp).read(start, end - start)
        return document_from_record(
            key, parse_record(key, data), _folder_reader(key, self.media_root), self.options, self.processor
        )

    def _check(self, index: int) -> None:
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index}; accepted: 0 to {self.documents - 1}")


def _media_root(given: str | os.PathLike | None, default: str) -> str:
    root = os.path.realpath(default if given is None else given)
    if not os.path.isdir(root):
        raise SourceError(f"media_root is {root!r}; accepted: a folder")
    return root


def _find_lines(path: str) -> np.ndarray:
    """Where the lines of a file stand that are not blank, int64 [lines, 2] in bytes."""
    breaks = []
    with open(path, "rb") as file:
        while block := file.read(SCAN_BYTES):
            breaks.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + (file.tell() - len(block)))
        ends = np.concatenate([*breaks, [file.tell()]]).astype(np.int64)
        spans = np.stack([np.concatenate([[0], ends[:-1] + 1]), ends], axis=1)
        spans = spans[spans[:, 1] > spans[:, 0]]
        blank = []
        for i in np.flatnonzero(spans[:, 1] - spans[:, 0] < SHORTEST_RECORD_BYTES).tolist():
            start, end = spans[i].tolist()
            if not os.pread(file.fileno(), end - start, start).strip():
                blank.append(i)
    return np.delete(spans, blank, axis=0)


def _find_list_items(path: str) -> np.ndarray:
    """Where the objects of a JSON list stand in a file, int64 [objects, 2] in bytes, told by brackets alone."""
    spans: list[int] = []
    depth = after = start = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for token in JSON_TOKEN.finditer(data):
            at = token.start()
            if data[at] == ord('"'):
                continue
            depth += 1 if data[at] in b"[{" else -1
            if depth == 2 and data[at] in b"[{":
                start = at
            if depth == 1 and data[at] in b"]}":
                between, after = data[after:start].strip(), at + 1
                if between != (b"," if spans else b"["):
                    break
                spans += [start, after]
            if depth == 0:
                if data[after : at + 1].strip() == b"]" and not data[at + 1 :].strip():
                    return np.array(spans, np.int64).reshape(-1, 2)
                break
    raise SourceError(f"{path}: from byte {after} on it is no list of objects; accepted: a JSON list, or JSON Lines")


# Hugging Face datasets


class DatasetSource:
    """Rows of a Hugging Face dataset on disk: a folder written by `save_to_disk`, or parquet files.

    Columns are the fields of a record. Images stay bytes until a document is encoded. Arrow files are read in place;
    parquet has no random access, so the `datasets` library first writes it to its cache as Arrow, once.

    Args:
        path: a folder written by `save_to_disk`; or a .parquet file, a folder of such, or a glob or a list of them.
        processor: for the chat template and the end of text.
        options: how rows become documents.
        media_root: folder that names of media start from and must not leave; the data's own by default.
        cache: folder for what is made of parquet files; the library's own (HF_DATASETS_CACHE) by default.

    Raises:
        SourceError: there is no such data, it is damaged, or the folder holds several splits.
    """

    def __init__(
        self,
        path: Paths,
        processor: FoveateProcessor,
        options: RecordOptions | None = None,
        media_root: str | os.PathLike | None = None,
        cache: str | os.PathLike | None = None,
    ):
        self.processor, self.options = processor, options or RecordOptions()
        name, files = _dataset_files(path)
        self.media_root = _media_root(media_root, os.path.dirname(files[0]) if files else name)
        # Rows as Arrow stores them: no image is decoded and no feature's code runs.
        self.rows = _open_dataset(name, files, cache).with_format("arrow")
        self.name = os.path.basename(os.path.normpath(name))
        self.documents = len(self.rows)
        if not self.documents:
            raise SourceError(f"{name}: no rows; accepted: {ACCEPTED}")
        columns = self.rows.data.columns
        chunks = [len(chunk) for chunk in columns[0].chunks] if columns else []
        self.runs = tuple(filter(None, chunks)) if sum(chunks) == self.documents else (self.documents,)

    def key(self, index: int) -> str:
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index}; accepted: 0 to {self.documents - 1}")
        return f"{self.name}/{index}"

    def document(self, index: int) -> Document:
        key = self.key(index)
        (row,) = self.rows[int(index)].to_pylist()
        record = {name: _as_list(value) for name, value in row.items()}
        return document_from_record(key, record, _folder_reader(key, self.media_root), self.options, self.processor)


def _as_list(value: Any) -> Any:
    """Columns that are lists of objects may be stored as an object of lists, equally long."""
    if not isinstance(value, dict) or not value or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _dataset_files(path: Paths) -> tuple[str, list[str]]:
    """What to call a dataset by, and its parquet files; none for a folder written by `save_to_disk`."""
    several = [path] if isinstance(path, str | os.PathLike) else list(path)
    names = [os.fspath(one) for one in several]
    files: list[str] = []
    for name in names:
        if os.path.isdir(name):
            if len(names) == 1 and any(os.path.exists(os.path.join(name, marker)) for marker in SAVED_MARKERS):
                return name, []
            found = sorted(glob.glob(os.path.join(glob.escape(name), "*.parquet")))
        elif os.path.isfile(name):
            found = [name]
        else:
            found = sorted(one for part in braceexpand(name) for one in (glob.glob(part) or [part]))
        if not found or not all(one.endswith(".parquet") and os.path.isfile(one) for one in found):
            raise SourceError(f"{name}: no dataset on disk; accepted: {ACCEPTED}")
        files += found
    if not files:
        raise SourceError(f"{path}: no dataset on disk; accepted: {ACCEPTED}")
    return names[0], files


def _open_dataset(name: str, files: list[str], cache: str | os.PathLike | None) -> Any:
    """A datasets.Dataset; the library is slow to import, so this is where it is."""
    from datasets import Dataset, DatasetDict, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    try:
        if files:
            return Dataset.from_parquet(files, cache_dir=None if cache is None else os.fspath(cache))
        found = load_from_disk(name)
    except (OSError, ValueError, TypeError, KeyError, DatasetGenerationError) as error:
        raise SourceError(f"{name}: not a whole dataset ({error}); accepted: {ACCEPTED}") from error
    if isinstance(found, DatasetDict):
        splits = ", ".join(os.path.join(name, split) for split in found)
        raise SourceError(f"{name}: several splits; accepted: the folder of one: {splits}")
    return found


# Parts of sources


class Subset:
    """Some documents of a source, renumbered from 0 in their order.

    Args:
        source: where they come from.
        indices: integers, ascending, none twice.

    Raises:
        SourceError: the indices are no such list, or out of the source's range.
    """

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, _checked_indices("indices", indices, source.documents)
        self.documents = len(self.indices)
        if source.runs:
            edges = np.searchsorted(self.indices, np.cumsum([0, *source.runs]))
            self.runs: tuple[int, ...] = tuple(np.diff(edges).tolist())
        else:
            self.runs = (self.documents,)

    def key(self, index: int) -> str:
        return self.source.key(self._within(index))

    def document(self, index: int) -> Document:
        return self.source.document(self._within(index))

    def _within(self, index: int) -> int:
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index}; accepted: 0 to {self.documents - 1}")
        return int(self.indices[index])


def _checked_indices(name: str, indices: Any, documents: int | None) -> np.ndarray:
    """Ascending int64 indices, none twice and all in range."""
    try:
        array = np.asarray(indices)
    except (ValueError, OverflowError) as error:  # of several lengths, or too large
        raise SourceError(f"{name}: {error}; accepted: a list of integers") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise SourceError(f"{name}: {array.dtype} {list(array.shape)}; accepted: integers, at least one")
    array = array.astype(np.int64)
    if not len(array):
        return array
    if (wrong := np.flatnonzero(np.diff(array) <= 0)).size:
        first, second = array[wrong[0]], array[wrong[0] + 1]
        raise SourceError(f"{name}: {second} stands after {first}; accepted: ascending, none twice")
    if array[0] < 0 or (documents is not None and array[-1] >= documents):
        wrong_one = array[0] if array[0] < 0 else array[-1]
        last = "" if documents is None else f" to {documents - 1}, the source's last"
        raise SourceError(f"{name}: {wrong_one} is there; accepted: 0{last}")
    return array


def write_subset(
    path: str | os.PathLike, indices: np.ndarray, about: dict[str, Any] | None = None, of: int | None = None
) -> None:
    """Writes a subset index file, aside and then renamed.

    Args:
        path: a .json file.
        indices: as `Subset` takes them.
        about: how they were chosen; any JSON.
        of: how many documents the source has for which they were chosen; a source of another length is then refused.
    """
    checked = _checked_indices(os.fspath(path), indices, of)
    content = {"format": SUBSET_FORMAT, "of": of, "about": about or {}, "indices": checked.tolist()}
    aside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_subset(path: str | os.PathLike, documents: int | None = None) -> np.ndarray:
    """The indices of a subset index file: what `write_subset` writes, or a .npy array of integers.

    Args:
        path: the file.
        documents: how many the source has; None where it has no end.

    Returns:
        int64 [indices], ascending.

    Raises:
        SourceError: the file is missing, damaged, or made for another source; the message says what is accepted.
    """
    name = os.fspath(path)
    try:
        if name.endswith(".npy"):
            return _checked_indices(name, np.load(name, allow_pickle=False), documents)
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise SourceError(f"{name}: {error.strerror}; accepted: a subset index file, .json or .npy") from error
    except SourceError:
        raise
    except (ValueError, EOFError, RecursionError) as error:
        raise SourceError(f"{name}: {error}; accepted: a subset index file, .json or .npy") from error
    if not isinstance(content, dict) or content.get("format") != SUBSET_FORMAT:
        raise SourceError(f"{name}: no subset index; accepted: format {SUBSET_FORMAT!r} with a list of indices")
    of = content.get("of")
    if of is not None and documents is not None and of != documents:
        raise SourceError(f"{name}: made for a source of {of} documents; accepted: such a source, this has {documents}")
    return _checked_indices(name, content.get("indices"), documents)


def split(source: Source, fraction: float, seed: int, part: Literal["train", "validation"]) -> Subset:
    """One of two parts of a source that share no document and leave none out.

    A document's part is told by a hash of (seed, number) alone, so it stays where a source grows at its end.

    Args:
        source: must have an end.
        fraction: of the documents that are validation, expected; between 0 and 1.
        seed: of the hash.
        part: which of the two.

    Returns:
        The part, which may be empty.

    Raises:
        SourceError: the source has no end.
        ValueError: fraction or part is out of range.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; accepted: more than 0 and less than 1")
    if part not in ("train", "validation"):
        raise ValueError(f"part is {part!r}; accepted: train, validation")
    if source.documents is None:
        raise SourceError("the source has no end; accepted: one with a number of documents, to be split")
    chosen = np.concatenate(
        [
            start + np.flatnonzero((hashes < np.uint64(fraction * 2**64)) == (part == "validation"))
            for start, hashes in _hashes(seed, source.documents)
        ]
    )
    return Subset(source, chosen)


def _hashes(seed: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """SplitMix64 (Steele, Lea & Flood 2014) of seed and each number below `count`: (first number, uint64 [numbers])."""

    def mixed(state: np.ndarray) -> np.ndarray:
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    origin = mixed(np.array([seed % 2**64], np.uint64) + golden)
    for start in range(0, count, 2**20):
        numbers = np.arange(start + 1, min(count, start + 2**20) + 1, dtype=np.uint64)
        yield start, mixed(origin + numbers * golden)


# Opening


def open_source(
    path: Paths,
    processor: FoveateProcessor,
    *,
    format: str = "auto",
    max_images: int = 6,
    min_similarity: float | None = None,
    frames: int | None = None,
    media_root: str | os.PathLike | None = None,
    subset: str | os.PathLike | None = None,
) -> Source:
    """The source of what lies at a path.

    Args:
        path: tar shards (see `Shards`), a JSON file (`JsonSource`), or a dataset on disk (`DatasetSource`).
        processor: for the chat template and the end of text.
        format, max_images, min_similarity, frames: see `RecordOptions`.
        media_root: folder of the media that records name; the data's own by default. Shards hold theirs.
        subset: a subset index file.

    Raises:
        SourceError: nothing of this kind lies there; nothing is downloaded.
        ValueError: an option is out of range.
    """
    options = RecordOptions(format, max_images, min_similarity, frames)
    names = [os.path.expanduser(one) for one in ([path] if isinstance(path, str | os.PathLike) else path)]
    source = _open(names, processor, options, None if media_root is None else os.path.expanduser(media_root))
    return source if subset is None else Subset(source, read_subset(os.path.expanduser(subset), source.documents))


def _open(names: list[str], processor: FoveateProcessor, options: RecordOptions, media_root: str | None) -> Source:
    if not names:
        raise SourceError(f"the list of paths is empty; accepted: {ACCEPTED}")
    if remote := next((name for name in names if "://" in name), None):
        raise SourceError(f"{remote}: nothing is downloaded; accepted: {ACCEPTED}")
    kinds = {_kind(name) for name in names}
    if len(kinds) > 1:
        raise SourceError(
            f"{', '.join(names)[:300]}: of several kinds ({', '.join(sorted(kinds))}); accepted: one kind"
        )
    given = names[0] if len(names) == 1 else names
    match kinds.pop():
        case "json":
            if len(names) > 1:
                raise SourceError(f"{', '.join(names)[:300]}: several JSON files; accepted: one, or {ACCEPTED}")
            return JsonSource(names[0], processor, options, media_root)
        case "dataset":
            return DatasetSource(given, processor, options, media_root)
    if media_root is not None:
        raise SourceError(f"media_root is {media_root!r}, but shards hold their media; accepted: None")
    return ShardSource(given, processor, options)


def _kind(name: str) -> str:
    """Whether shards, a JSON file or a dataset lie at a path or are what a pattern is for."""
    if os.path.isdir(name):
        found = set(os.listdir(name))
        is_dataset = any(marker in found for marker in SAVED_MARKERS)
        is_parquet = any(file.endswith(".parquet") for file in found)
        is_shards = INDEX_NAME in found or any(file.endswith(".tar") for file in found)
        if is_shards + (is_dataset or is_parquet) != 1:
            what = "both shards and a dataset" if is_shards else "neither shards nor a dataset"
            raise SourceError(f"{name}: the folder holds {what}; accepted: {ACCEPTED}")
        return "shards" if is_shards else "dataset"
    for suffixes, kind in (((".tar",), "shards"), ((".parquet",), "dataset"), (JSON_SUFFIXES, "json")):
        if name.endswith(suffixes):
            return kind
    what = "a file of another kind" if os.path.exists(name) else "there is no such file or folder"
    raise SourceError(f"{name}: {what}, and nothing is downloaded; accepted: {ACCEPTED}")
