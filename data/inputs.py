"""What shards are made from: records of folders, JSON files, Hugging Face datasets and the embedded data.

A record stays as it is but for its media: each that it names is read, checked, and named by its member in the shard.
"""

import base64
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image as PILImage

from ..vlm.media import IMAGE_FORMATS, MediaLimits
from ..vlm.processor import IMAGE_TOKEN, VIDEO_TOKEN, FoveateProcessor
from .document import DocumentError, Image, Part, Text, Video
from .glyphs import CHAT_TEMPLATE, FRAME_SEPARATOR, GlyphSource, encode_mp4, glyph_tokenizer
from .records import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    MediaReader,
    RecordOptions,
    document_from_record,
    has_text,
    parse_record,
)
from .shards import SourceError, open_file
from .sources import (
    JSON_SUFFIXES,
    SAVED_MARKERS,
    JsonSource,
    Source,
    _as_list,
    _dataset_files,
    _folder_reader,
    _media_root,
    _open_dataset,
    open_source,
)

KINDS = ("auto", "folder", "json", "dataset", "glyphs")
GLYPHS = "glyphs:"
GLYPH_KINDS = ("captions", "interleaved", "scene_chat", "clip_chat", "needle_chat")
CLIP_SCALE = 2  # of the embedded clips' pixels in their files: H.264 keeps one colour for 2 × 2 pixels
EVERYTHING = RecordOptions(max_images=2**31)  # no image of a page is left out
MEDIA_FIELDS = {"image", "images", "video", "videos", "image_name", "image_url", "video_url", "url", "path", "bytes"}
IMAGE_NAMES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff", "PPM": "ppm"}
VIDEO_STARTS = (  # (where, bytes that stand there, extension)
    (4, b"ftypqt", "mov"), (4, b"ftyp", "mp4"), (4, b"moov", "mov"), (4, b"mdat", "mov"), (4, b"wide", "mov"),
    (4, b"free", "mov"), (0, b"\x1a\x45\xdf\xa3", "mkv"), (8, b"AVI ", "avi"), (0, b"FLV", "flv"), (0, b"OggS", "ogv"),
    (0, b"GIF8", "gif"), (0, b"\x00\x00\x01\xba", "mpg"), (0, b"\x30\x26\xb2\x75", "wmv"),
)  # fmt: skip
ROWS = 16  # of a dataset that are in memory at a time


@dataclass(frozen=True)
class Raw:
    """A record as it was found.

    Args:
        key: names it in errors.
        record: as parsed from JSON; may hold bytes, as rows of a table do.
        read: name of a medium → its bytes, or its path, proven to lie inside the media's folder.
        unnamed: a medium that comes with the record, which may not name it.
    """

    key: str
    record: dict[str, Any]
    read: MediaReader
    unnamed: tuple[str, ...] = ()


class Input(Protocol):
    """Records by number.

    `name` is where they come from, `facts` what tells this input from another (JSON), `documents` how many there are.
    It can be sent to another process.
    """

    name: str
    facts: dict[str, Any]
    documents: int

    def records(self, start: int, stop: int) -> Iterator[Raw | DocumentError]:
        """The records from `start` to before `stop`; an error in the place of one that can't be parsed."""
        ...


# A record and its media as members of a shard


@dataclass(frozen=True)
class Members:
    """A document's members by extension, and how many of them are images and videos."""

    content: dict[str, bytes]
    images: int
    videos: int


def members(raw: Raw, limits: MediaLimits | None = None) -> Members:
    """A record as a document of a shard: `json`, and its media as `0.jpg`, `1.mp4` …, in their own format.

    Images are opened, but not decoded whole.

    Raises:
        DocumentError: the record is of no accepted layout, or a medium is missing, unsafe, too large or no such medium.
    """
    try:
        return _members(raw, limits or MediaLimits())
    except RecursionError as error:
        raise DocumentError(raw.key, "bad_record", f"the record is nested too deeply ({error})") from error


def _members(raw: Raw, limits: MediaLimits) -> Members:
    embedded: dict[str, _Embedded] = {}
    record = _without_bytes(raw, raw.record, "", embedded)
    # The reader of shards says which names are media: it is made to ask for them.
    document = document_from_record(
        raw.key, record, lambda name: name, EVERYTHING, embedded_processor(), unnamed=raw.unnamed
    )
    for part in document.parts:
        if isinstance(part, Text) and any(token in part.text for token in (IMAGE_TOKEN, VIDEO_TOKEN)):
            what = f"a text holds a media placeholder: {part.text[:100]!a}; accepted: one for each medium, in a chat"
            raise DocumentError(raw.key, "bad_record", what)
    is_image = {str(part.source): isinstance(part, Image) for part in document.parts if not isinstance(part, Text)}
    content: dict[str, bytes] = {}
    renamed: dict[str, str] = {}

    def rename(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: rename(item, key) for key, item in value.items()}
        if isinstance(value, list):
            return [rename(item, name) for item in value]
        if not isinstance(value, str) or name not in MEDIA_FIELDS:
            return value
        if value not in is_image:
            return embedded[value].written if value in embedded else value
        if value not in renamed:
            data = embedded[value].data if value in embedded else _bytes(raw, value, limits)
            extension = _extension(raw.key, value, data, is_image[value], limits)
            renamed[value] = f"{len(renamed)}.{extension}"
            content[renamed[value]] = data
        return renamed[value]

    kept = rename(record, "")
    for name in raw.unnamed:
        if name in is_image and name not in renamed:
            kept |= rename({"image" if is_image[name] else "video": name}, "")
    if lost := sorted(set(is_image) - set(renamed)):
        raise DocumentError(raw.key, "bad_record", f"{lost[0][:200]!a} is named in no field of media; accepted: in one")
    try:
        content["json"] = json.dumps(kept, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise DocumentError(raw.key, "bad_record", f"{error}; accepted: texts of whole characters") from error
    images = sum(is_image[name] for name in renamed)
    return Members(content, images, len(renamed) - images)


class _Embedded(NamedTuple):
    """Bytes that stand in a record, and what JSON can hold in their place where they are no medium."""

    data: bytes
    written: str | None


def _without_bytes(raw: Raw, value: Any, name: str, embedded: dict[str, _Embedded]) -> Any:
    """The record with names in the place of bytes and data: URIs, which go to `embedded`."""
    written = None
    if isinstance(value, dict):
        if not set(value) <= {"bytes", "path"} or not isinstance(value.get("bytes"), bytes):
            return {key: _without_bytes(raw, item, key, embedded) for key, item in value.items()}
        value = value["bytes"]
    if isinstance(value, list):
        return [_without_bytes(raw, item, name, embedded) for item in value]
    if isinstance(value, str) and name in MEDIA_FIELDS and value.startswith("data:"):
        written = value
        header, _, data = value.partition(",")
        try:
            if not header.endswith(";base64"):
                raise ValueError("it is not in base64")
            value = base64.b64decode(data, validate=True)
        except ValueError as error:
            what = f"{name} is {value[:60]!a}: {error}; accepted: data:TYPE;base64,…"
            raise DocumentError(raw.key, "unreadable_media", what) from error
    if not isinstance(value, bytes):
        return value
    stand_in = f"\0embedded {len(embedded)}"  # no file has such a name
    embedded[stand_in] = _Embedded(value, written)
    return stand_in


def _bytes(raw: Raw, name: str, limits: MediaLimits) -> bytes:
    """What a name stands for, read whole."""
    found = raw.read(name)
    if isinstance(found, bytes):
        return found
    try:
        if (size := os.path.getsize(found)) > limits.max_bytes:
            what = f"{found}: {size} bytes, the limit max_bytes accepts up to {limits.max_bytes}"
            raise DocumentError(raw.key, "too_large", what)
        return Path(found).read_bytes()
    except OSError as error:
        raise DocumentError(raw.key, "unreadable_media", f"{found}: {error.strerror}") from error


def _extension(key: str, name: str, data: bytes, is_image: bool, limits: MediaLimits) -> str:
    """What a medium's format is called, told by its first bytes."""
    shown = f"{name[:200].lstrip(chr(0))!a}: {len(data)} bytes"
    if is_image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", PILImage.DecompressionBombWarning)
                with PILImage.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                    pixels, kind = image.width * image.height, image.format
        except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
            raise DocumentError(key, "too_large", f"{shown}: {error}") from error
        except Exception as error:  # decoders raise dozens of types on bad input
            what = f"{shown} that are no image; accepted: {', '.join(IMAGE_FORMATS)}"
            raise DocumentError(key, "unreadable_media", what) from error
        if pixels > limits.max_pixels:
            what = f"{shown}: {pixels} pixels, the limit max_pixels accepts up to {limits.max_pixels}"
            raise DocumentError(key, "too_large", what)
        return IMAGE_NAMES[kind or ""]
    for at, start, extension in VIDEO_STARTS:
        if data[at : at + len(start)] == start:
            return extension
    extension = name.rpartition(".")[2].lower()
    if not data or extension not in VIDEO_EXTENSIONS or data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"<")):
        what = f"{shown} that are no video; accepted: {', '.join(VIDEO_EXTENSIONS)}"
        raise DocumentError(key, "unreadable_media", what)
    return extension


# Inputs


def open_input(source: str, kind: str = "auto", media_root: str | os.PathLike | None = None) -> Input:
    """What records lie at a path.

    Args:
        source: a folder of images and videos, each with a .txt or .json of the same name; a .json list or .jsonl file;
            a folder written by `datasets.save_to_disk`, a .parquet file or a folder of such; or `glyphs:KIND`, the
            embedded data, with options as in `glyphs:captions?documents=200&split=dev&seed=1`.
        kind: one of `KINDS`; "auto" tells it by what lies there.
        media_root: folder that names of media start from and must not leave; the records' own by default.

    Raises:
        SourceError: nothing of this kind lies there.
        ValueError: kind is none of `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; accepted: {', '.join(KINDS)}")
    path = source if source.startswith(GLYPHS) else os.path.expanduser(source)
    match _kind(path) if kind == "auto" else kind:
        case "glyphs":
            if media_root is not None:
                raise SourceError(f"media_root is {str(media_root)!r}, but the embedded data have none; accepted: None")
            return GlyphInput(path)
        case "json":
            return JsonInput(path, media_root)
        case "dataset":
            return DatasetInput(path, media_root)
        case _:
            return FolderInput(path, media_root)


def _kind(path: str) -> str:
    if path.startswith(GLYPHS):
        return "glyphs"
    if os.path.isdir(path):
        names = os.listdir(path)
        is_dataset = any(name in SAVED_MARKERS or name.endswith(".parquet") for name in names)
        return "dataset" if is_dataset else "folder"
    if path.endswith(JSON_SUFFIXES):
        return "json"
    if path.endswith(".parquet"):
        return "dataset"
    accepted = "a folder, a .json, .jsonl or .parquet file, or glyphs:KIND"
    raise SourceError(
        f"{path}: {'of no kind that is read' if os.path.exists(path) else 'not there'}; accepted: {accepted}"
    )


class JsonInput:
    """Records of a JSON list or of JSON Lines, and media in files."""

    def __init__(self, path: str, media_root: str | os.PathLike | None):
        found = JsonSource(path, embedded_processor(), media_root=media_root)
        self.name, self.documents = os.path.realpath(path), found.documents
        self.media_root, self._spans, self._stamp = found.media_root, found.spans, found.stamp
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.facts = {"kind": "json", "media_root": self.media_root, "sha256": digest}

    def records(self, start: int, stop: int) -> Iterator[Raw | DocumentError]:
        for number in range(start, stop):
            key = f"{os.path.basename(self.name)}/{number}"
            first, end = self._spans[number].tolist()
            data = open_file(self.name, *self._stamp).read(first, end - first)
            try:
                yield Raw(key, parse_record(key, data), _folder_reader(key, self.media_root))
            except DocumentError as error:
                yield error


class FolderInput:
    """Images and videos, each with its text in a .txt, or a record in a .json, of the same name.

    Folders in it are searched, symbolic links to folders not followed. A .json may be a record of any layout that names
    media of its own; a .txt serves where the .json has no text.
    """

    def __init__(self, path: str, media_root: str | os.PathLike | None):
        root = os.path.realpath(path)
        if not os.path.isdir(root):
            raise SourceError(f"{path}: no such folder; accepted: a folder with images or videos and their texts")
        self.name = root
        self.media_root = _media_root(media_root, root)
        stems: dict[str, list[str]] = {}
        digest = hashlib.sha256()
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                stem, suffix = os.path.splitext(os.path.relpath(os.path.join(folder, name), root))
                if name.startswith(".") or suffix[1:].lower() not in (
                    *IMAGE_EXTENSIONS,
                    *VIDEO_EXTENSIONS,
                    "txt",
                    "json",
                ):
                    continue
                status = os.lstat(os.path.join(folder, name))
                digest.update(json.dumps([stem, suffix, status.st_size, status.st_mtime_ns]).encode())
                stems.setdefault(stem, []).append(suffix)
        self._files = sorted(stems.items())
        self.documents = len(self._files)
        if not self.documents:
            accepted = f"{', '.join(IMAGE_EXTENSIONS + VIDEO_EXTENSIONS)}, with a .txt or .json of the same name"
            raise SourceError(f"{path}: no images or videos in this folder; accepted: {accepted}")
        self.facts = {"kind": "folder", "media_root": self.media_root, "files": digest.hexdigest()}

    def records(self, start: int, stop: int) -> Iterator[Raw | DocumentError]:
        for stem, suffixes in self._files[start:stop]:
            try:
                yield self._record(stem, suffixes)
            except DocumentError as error:
                yield error

    def _record(self, stem: str, suffixes: list[str]) -> Raw:
        key = stem
        media = [f"{stem}{suffix}" for suffix in suffixes if suffix.lower() not in (".txt", ".json")]
        texts = [suffix for suffix in suffixes if suffix.lower() == ".txt"]
        jsons = [suffix for suffix in suffixes if suffix.lower() == ".json"]
        if not texts and not jsons:
            raise DocumentError(
                key, "bad_record", f"{media[0]!a} has no text; accepted: a .txt or .json of the same name"
            )
        if len(media) > 1:
            raise DocumentError(key, "bad_record", f"{', '.join(map(ascii, media))}; accepted: one image or video")
        if not media and not jsons:
            what = f"{stem + texts[0]!a} has no image or video of the same name; accepted: one"
            raise DocumentError(key, "missing_media", what)
        record = parse_record(key, self._read(key, stem + jsons[0]), stem + jsons[0]) if jsons else {}
        if texts and not has_text(record):
            try:
                record["caption"] = self._read(key, stem + texts[0]).decode().strip()
            except UnicodeDecodeError as error:
                raise DocumentError(key, "bad_json", f"{stem + texts[0]!a}: {error}; accepted: UTF-8") from error
        own, named = _folder_reader(key, self.name), _folder_reader(key, self.media_root)
        return Raw(key, record, lambda name: (own if name in media else named)(name), tuple(media))

    def _read(self, key: str, name: str) -> bytes:
        path = str(_folder_reader(key, self.name)(name))
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise DocumentError(key, "bad_record", f"{path}: {error.strerror}") from error


class DatasetInput:
    """Rows of a dataset that was saved to disk, or of parquet files, which are read in order and not copied."""

    def __init__(self, path: str, media_root: str | os.PathLike | None):
        name, files = _dataset_files(path)
        self.name = os.path.realpath(name)
        self.media_root = _media_root(media_root, os.path.dirname(files[0]) if files else name)
        self._parquet = [os.path.realpath(file) for file in files]
        if files:
            self._groups = [(file, n, rows) for file in self._parquet for n, rows in enumerate(_row_groups(file))]
            self._ends = np.cumsum([rows for _, _, rows in self._groups], dtype=np.int64)
            self.documents = int(self._ends[-1]) if len(self._ends) else 0
        else:
            self.documents = len(_saved_dataset(self.name))
        if not self.documents:
            raise SourceError(f"{path}: no rows; accepted: one at least")
        found = self._parquet or sorted(str(file) for file in Path(self.name).iterdir() if file.is_file())
        stamps = [[os.path.basename(f), (status := os.stat(f)).st_size, status.st_mtime_ns] for f in found]
        digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
        self.facts = {"kind": "dataset", "media_root": self.media_root, "files": digest}

    def records(self, start: int, stop: int) -> Iterator[Raw | DocumentError]:
        for number, row in enumerate(self._rows(start, stop), start):
            key = f"{os.path.basename(self.name)}/{number}"
            record = {name: _as_list(value) for name, value in row.items()}
            yield Raw(key, record, _folder_reader(key, self.media_root))

    def _rows(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        if not self._parquet:
            rows = _saved_dataset(self.name)
            for at in range(start, stop, ROWS):
                yield from rows[at : min(at + ROWS, stop)].to_pylist()
            return
        first = int(np.searchsorted(self._ends, start, side="right"))
        for (file, number, rows), end in zip(self._groups[first:], self._ends[first:].tolist(), strict=True):
            at = end - rows
            if at >= stop:
                return
            for batch in _parquet_file(file).iter_batches(batch_size=ROWS, row_groups=[number]):
                wanted = slice(max(start - at, 0), max(stop - at, 0))
                yield from batch[wanted].to_pylist()
                at += len(batch)
                if at >= stop:
                    return


def _row_groups(file: str) -> list[int]:
    """Rows of each row group of a parquet file."""
    metadata = _parquet_file(file).metadata
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


@lru_cache(4)
def _parquet_file(file: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise SourceError(f"{file}: not a whole parquet file ({error})") from error


@lru_cache(4)
def _saved_dataset(name: str) -> Any:
    """Rows as Arrow stores them: no image is decoded and no feature's code runs."""
    return _open_dataset(name, [], None).with_format("arrow")


# The embedded data


@lru_cache(1)
def embedded_processor() -> FoveateProcessor:
    """The embedded data's language, with images of 64 pixels (16 tokens) and frames of 32 (4 tokens)."""
    return FoveateProcessor(
        glyph_tokenizer(),
        image_size=(64, 64),
        video_size=(32, 32),
        patch_size=8,
        chat_template=CHAT_TEMPLATE,
        frame_separator=FRAME_SEPARATOR,
    )


def glyph_source(text: str, processor: FoveateProcessor) -> GlyphSource:
    """The embedded data that a text such as `glyphs:captions?documents=200&split=dev&seed=1&objects=1-4` names.

    Raises:
        SourceError: an option that `GlyphSource` does not have, or a value that it does not accept.
    """
    kind, _, query = text.removeprefix(GLYPHS).partition("?")
    accepted = {f.name: f.type for f in fields(GlyphSource) if f.name not in ("kind", "processor")}
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in accepted:
            raise SourceError(f"{text}: option {name!r}; accepted: {', '.join(accepted)}")
        if name == "split":
            options[name] = value
        elif name in ("seed", "documents"):
            options[name] = _whole_number(text, name, value)
        else:
            low, dash, high = value.partition("-")
            options[name] = (_whole_number(text, name, low), _whole_number(text, name, high if dash else low))
    try:
        return GlyphSource(kind, processor, **options)
    except ValueError as error:
        raise SourceError(f"{text}: {error}") from error


def _whole_number(text: str, name: str, value: str) -> int:
    if not re.fullmatch("[0-9]{1,12}", value):
        raise SourceError(f"{text}: {name} is {value!r}; accepted: a whole number, or a range such as 1-4")
    return int(value)


def open_data(source: str, processor: FoveateProcessor, **options: Any) -> Source:
    """As `open_source`, and `glyphs:KIND` for the embedded data, which take no options."""
    if not source.startswith(GLYPHS):
        return open_source(source, processor, **options)
    if given := [name for name, value in options.items() if value is not None]:
        raise SourceError(f"{source}: {', '.join(given)} given; accepted: none with the embedded data")
    return glyph_source(source, processor)


class GlyphInput:
    """The embedded data as files would hold them: PNG pictures, mp4 clips, and records in public layouts."""

    def __init__(self, text: str):
        self.name = text
        source = glyph_source(text, embedded_processor())
        if source.kind not in GLYPH_KINDS:
            raise SourceError(f"{text}: kind is {source.kind!r}; accepted: {', '.join(GLYPH_KINDS)}")
        if source.documents is None:
            raise SourceError(
                f"{text}: no end; accepted: a number of documents, as in {GLYPHS}{source.kind}?documents=200"
            )
        self.documents = source.documents
        options = {f.name: getattr(source, f.name) for f in fields(source) if f.name != "processor"}
        self.facts = {"kind": "glyphs", "options": options}

    def records(self, start: int, stop: int) -> Iterator[Raw | DocumentError]:
        source = glyph_source(self.name, embedded_processor())
        for index in range(start, stop):
            document = source.document(index)
            yield Raw(document.key, _glyph_record(source.kind, document.parts), _no_files)


def _no_files(name: str) -> bytes:
    raise AssertionError(name)  # the records hold their media


def _glyph_record(kind: str, parts: Sequence[Part]) -> dict[str, Any]:
    """A document of the embedded data as a record of a public layout."""
    media = [_file(part) for part in parts if not isinstance(part, Text)]
    texts = [part.text if isinstance(part, Text) else None for part in parts]
    if kind == "captions":
        return {"image": media[0], "caption": "".join(text for text in texts if text).removesuffix("<|end|>")}
    if kind == "interleaved":  # as OBELICS: the end of text is added when it is read
        waiting = iter(media)
        in_place = [None if isinstance(part, Text) else next(waiting) for part in parts[:-1]]
        return {"texts": texts[:-1], "images": in_place}
    token, name = ("<image>", "image") if kind == "scene_chat" else ("<video>", "video")
    text = "".join(token if text is None else text for text in texts)
    turns = re.findall(r"<\|user\|>(.*?)<\|assistant\|>(.*?)<\|end\|>", text)
    if kind == "clip_chat":  # OpenAI's layout, its media as the record's
        messages = []
        for question, answer in turns:
            content = [{"type": "video"}] if token in question else []
            messages.append(
                {"role": "user", "content": [*content, {"type": "text", "text": question.replace(token, "")}]}
            )
            messages.append({"role": "assistant", "content": answer})
        return {name: media[0], "messages": messages}
    said = [{"from": who, "value": value} for turn in turns for who, value in zip(("human", "gpt"), turn, strict=True)]
    return {name: media[0], "conversations": said}


def _file(part: Image | Video) -> bytes:
    """A picture as PNG, a clip as mp4."""
    assert isinstance(part.source, np.ndarray)
    if isinstance(part, Video):
        return encode_mp4(part.source, scale=CLIP_SCALE)
    buffer = io.BytesIO()
    PILImage.fromarray(part.source).save(buffer, format="png")
    return buffer.getvalue()
