"""Shards from folders, JSON and Hugging Face datasets: in parallel, each whole or not at all, on again after a stop.

A shard is written aside, flushed to disk, renamed, and then told of by a small JSON file, so a run that was killed goes
on with the shards that are missing. The same input and settings give the same bytes, whatever the number of workers.
"""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]

from webdataset import TarWriter

from .document import DocumentError
from .inputs import Input, Members, Raw, members
from .shards import ShardEntry, ShardIndex, SourceError, offsets_path, write_offsets

WRITER = 1  # a number that changes with the bytes that are written
MAKE_NAME, REFUSED_NAME, LOCK_NAME = "make.json", "refused.jsonl", ".lock"
OWN_NAMES = re.compile(r"make\.json|index\.json|refused\.jsonl|\.lock|shard-\d{6}\.tar(\.idx|\.json)?")
ASIDE = re.compile(r"\.+(make\.json|index\.json|refused\.jsonl|shard-\d{6}\.tar)\b.*\.\d+(\.idx)?(\.\d+)?")
NAMED_AT_MOST = 5  # refused documents in the error
MEASURED = 200  # documents whose mean size tells how many a shard of some megabytes holds


class TooManyRefusedError(ValueError):
    """More documents were refused than `max_bad_fraction` accepts."""


class _Stopped(Exception):
    """A worker left its shard because the run is ending."""


@dataclass(frozen=True)
class Refused:
    """A document that is in no shard, and why."""

    key: str
    reason: str
    message: str


@dataclass(frozen=True)
class Written:
    """A shard that is whole, as its `NAME.tar.json` says; without documents there is no tar."""

    name: str
    documents: int
    bytes: int
    sha256: str
    images: int
    videos: int
    refused: tuple[Refused, ...]

    @property
    def entry(self) -> ShardEntry:
        return ShardEntry(self.name, self.documents, self.bytes, self.sha256)


@dataclass(frozen=True)
class Made:
    """What `make_shards` has done."""

    index: ShardIndex
    refused: Counter[str] = field(default_factory=Counter)  # by reason
    found: int = 0  # shards that were whole before


@dataclass(frozen=True)
class _Task:
    """A shard to write: its name, and which of the input's records go into it."""

    name: str
    start: int
    stop: int


def make_shards(
    source: Input,
    out: Path,
    documents_per_shard: int | None = None,
    megabytes_per_shard: float | None = None,
    workers: int = 1,
    max_bad_fraction: float = 0.01,
    verify: bool = False,
    after_shard: Callable[[int, int], None] | None = None,
) -> Made:
    """Writes a source's documents as webdataset shards.

    `out` then holds `shard-000000.tar` … with their offsets (`.idx`) and counts (`.json`), `index.json`,
    `refused.jsonl` where documents were refused, and `make.json`: what they were made from. Members of a document are
    `KEY.json`, its record, and `KEY.0.jpg`, `KEY.1.mp4` …, the media that the record names by `0.jpg`, `1.mp4` ….

    Args:
        source: what `open_input` gave.
        out: folder; new, empty, or of a run that is to go on.
        documents_per_shard: of the input, refused ones included; 1000 unless `megabytes_per_shard` is given.
        megabytes_per_shard: about how many megabytes (10⁶ bytes) a shard shall have: the mean size of some documents
            tells how many that are.
        workers: processes that write; 1 writes in this one.
        max_bad_fraction: of all documents that may be refused.
        verify: whether shards that are there already are checked by their SHA-256, not only by size.
        after_shard: is told how many documents of how many are done.

    Raises:
        TooManyRefusedError: above `max_bad_fraction`; `refused.jsonl` has the list.
        SourceError: `out` holds other files, or shards of other data or settings; the message names what differs.
        OSError: a shard can't be written (disk full); the whole ones stay.
        KeyboardInterrupt: Ctrl-C; nothing half-written is left.
    """
    if documents_per_shard is not None and megabytes_per_shard is not None:
        raise ValueError("documents_per_shard and megabytes_per_shard are both given; accepted: one of them")
    for name, value in (("documents_per_shard", documents_per_shard), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; accepted: 1 at least")
    if megabytes_per_shard is not None and not megabytes_per_shard > 0:
        raise ValueError(f"megabytes_per_shard is {megabytes_per_shard}; accepted: above 0")
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction is {max_bad_fraction}; accepted: 0 to 1")
    if not source.documents:
        raise SourceError(f"{source.name}: no documents; accepted: one at least")
    asked = {"documents_per_shard": documents_per_shard, "megabytes_per_shard": megabytes_per_shard}
    if documents_per_shard is None and megabytes_per_shard is None:
        asked["documents_per_shard"] = 1000
    if Path(source.name) in (out.resolve(), *out.resolve().parents):
        raise SourceError(f"{out} lies inside {source.name}; accepted: a folder outside of what is read")
    out.mkdir(parents=True, exist_ok=True)
    _check_folder(out)
    with _locked(out):
        for path in out.iterdir():
            if ASIDE.fullmatch(path.name):  # left half-written by a run that was killed
                path.unlink()
        about = json.loads(json.dumps({"writer": WRITER, "source": source.name, **source.facts, **asked}))
        _check_make(out, about)
        size = asked["documents_per_shard"] or _documents_in(megabytes_per_shard or 0, source)
        return _make(source, out, int(size), about, workers, max_bad_fraction, verify, after_shard)


def _make(
    source: Input,
    out: Path,
    size: int,
    about: dict[str, Any],
    workers: int,
    max_bad_fraction: float,
    verify: bool,
    after_shard: Callable[[int, int], None] | None,
) -> Made:
    starts = range(0, source.documents, size)
    names = [f"shard-{number:06d}.tar" for number in range(len(starts))]
    whole = {name: written for name in names if (written := _whole(out / name, verify))}
    refused = sum(len(written.refused) for written in whole.values())
    allowed = max_bad_fraction * source.documents
    if refused > allowed:  # an earlier run ended for this: what it refused may be mended by now
        whole = {name: written for name, written in whole.items() if not written.refused}
        refused = 0
    found = len(whole)
    done = sum(written.documents + len(written.refused) for written in whole.values())

    def tasks() -> Iterator[_Task]:
        for name, start in zip(names, starts, strict=True):
            if name not in whole:
                yield _Task(name, start, min(start + size, source.documents))

    if after_shard:
        after_shard(done, source.documents)
    running = _written(tasks(), source, out, min(workers, len(names) - found))
    try:
        for written in running:
            whole[written.name] = written
            done += written.documents + len(written.refused)
            refused += len(written.refused)
            if after_shard:
                after_shard(done, source.documents)
            if refused > allowed:
                break
    finally:
        running.close()
    shards = [whole[name] for name in names if name in whole]
    bad = [item for written in shards for item in written.refused]
    if bad:
        lines = "".join(json.dumps(asdict(item)) + "\n" for item in bad)
        _write_whole(out / REFUSED_NAME, lines)
    else:
        (out / REFUSED_NAME).unlink(missing_ok=True)
    reasons = Counter(item.reason for item in bad)
    if refused > allowed:
        named = "; ".join(f"{item.key}: {item.reason}: {item.message}" for item in bad[:NAMED_AT_MOST])
        counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        more = f"; all are in {out / REFUSED_NAME}"
        raise TooManyRefusedError(
            f"{refused} of {done} documents read were refused ({counts}); max_bad_fraction {max_bad_fraction} of "
            f"{source.documents} accepts {int(allowed)}: {named}{more}"
        )
    counts_of = {
        "images": sum(written.images for written in shards),
        "videos": sum(written.videos for written in shards),
        "refused": len(bad),
        **{f"refused_{reason}": n for reason, n in sorted(reasons.items())},
    }
    index = ShardIndex(tuple(written.entry for written in shards if written.documents), counts_of, about)
    index.write(out)
    return Made(index, reasons, found)


# The folder


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keeps a second run out of the folder."""
    with open(out / LOCK_NAME, "w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SourceError(f"{out}: another run is writing there; accepted: one at a time") from error
            except OSError:  # the file system has no locks
                pass
        yield


def _check_folder(out: Path) -> None:
    """Raises SourceError where a file in the folder is not of `make_shards`; the message names it."""
    names = sorted(path.name for path in out.iterdir() if not ASIDE.fullmatch(path.name))
    for name in names:
        if not OWN_NAMES.fullmatch(name) or (out / name).is_dir():
            raise SourceError(f"{out} holds {name}, which is not of this command; accepted: a new or empty folder")
    if MAKE_NAME not in names and set(names) - {LOCK_NAME}:
        raise SourceError(f"{out} holds {names[-1]} but no {MAKE_NAME}; accepted: a new or empty folder")


def _check_make(out: Path, about: dict[str, Any]) -> None:
    """Writes `make.json`, or compares it with what is to be made."""
    path = out / MAKE_NAME
    if not path.exists():
        _write_whole(path, json.dumps(about, indent=1) + "\n")
        return
    try:
        then = json.loads(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"{path}: not JSON ({error}); accepted: another folder") from error
    differing = [
        f"{name} was {str(then.get(name))[:200]} and is {str(about.get(name))[:200]}"
        for name in sorted({*about, *then})
        if then.get(name) != about.get(name)
    ]
    if differing:
        raise SourceError(
            f"{out} was made from other data or settings: {'; '.join(differing)}; accepted: the same, or another folder"
        )


def _whole(tar: Path, verify: bool) -> Written | None:
    """What is known of a shard that is there and whole; None where it has to be written."""
    try:
        content = json.loads(_record_path(tar).read_bytes())
        written = Written(**content | {"refused": tuple(Refused(**item) for item in content["refused"])})
        if written.documents == 0:
            return written
        if tar.stat().st_size != written.bytes or not offsets_path(tar).stat().st_size:
            return None
        if verify:
            with tar.open("rb") as file:
                return written if hashlib.file_digest(file, "sha256").hexdigest() == written.sha256 else None
        return written
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _record_path(tar: Path) -> Path:
    return tar.with_name(tar.name + ".json")


def _write_whole(path: Path, text: str) -> None:
    """Writes a small file aside and renames it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _documents_in(megabytes: float, source: Input) -> int:
    """How many documents fill so many megabytes, from the mean size of some, evenly spread."""
    step = max(1, source.documents // MEASURED)
    sizes = []
    for start in range(0, source.documents, step):
        for item in source.records(start, start + 1):
            with suppress(DocumentError):
                content = _members(item).content
                sizes.append(sum(512 + -(-len(data) // 512) * 512 for data in content.values()))
    return max(1, int(megabytes * 1e6 * len(sizes) / sum(sizes))) if sizes else 1


# Shards


def _written(tasks: Iterator[_Task], source: Input, out: Path, workers: int) -> Generator[Written, None, None]:
    """Writes shards as they are asked for, in processes where there are several workers.

    Closing it, and any error, ends the workers: shards that are not done are removed.
    """
    if workers <= 1:
        for task in tasks:
            yield _write_shard(task, source, out)
        return
    # Not forked from here: this process may have threads. The server imports this module once for all workers.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    stop = context.Event()
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(stop, source, out))
    running: set[Future[Written]] = set()
    try:
        for task in tasks:
            running.add(executor.submit(_write_in_worker, task))
            while len(running) >= 2 * workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from [future.result() for future in done]
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from [future.result() for future in done]
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that writes shards was killed, perhaps for want of memory; the same command goes on with the "
            "shards that are missing"
        ) from error
    finally:
        stop.set()
        executor.shutdown(wait=True, cancel_futures=True)


_stop: Any = None  # in a worker, the event that ends it
_work: tuple[Input, Path] | None = None  # in a worker, what it reads and where it writes


def _start_worker(stop: Any, source: Input, out: Path) -> None:
    global _stop, _work
    _stop, _work = stop, (source, out)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches workers too, but it is the main process that ends them
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # the main process was killed: nobody waits for this shard any more

    threading.Thread(target=watch, daemon=True).start()


def _write_in_worker(task: _Task) -> Written:
    assert _work is not None
    return _write_shard(task, *_work)


class _Sink:
    """A file that is hashed as it is written; `broken` swallows what an archive writes when it is thrown away."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.bytes, self.broken = file, hashlib.sha256(), 0, False

    def write(self, data: bytes) -> int:
        if not self.broken:
            self.file.write(data)
            self.hash.update(data)
            self.bytes += len(data)
        return len(data)


def _write_shard(task: _Task, source: Input, out: Path) -> Written:
    """Writes one shard with its offsets, then the JSON file that says it is whole."""
    tar = out / task.name
    aside = tar.with_name(f".{task.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            sink = _Sink(file)
            archive = TarWriter(sink, encoder=False, mtime=0, mode=0o644, user="", group="")
            try:
                counts, refused = _write_documents(source, task, archive)
                archive.close()
            except BaseException:
                sink.broken = True
                raise
            file.flush()
            os.fsync(file.fileno())
        documents = counts["documents"]
        written = Written(
            task.name, documents, sink.bytes, sink.hash.hexdigest(), counts["images"], counts["videos"], tuple(refused)
        )
        if documents:
            found = len(write_offsets(aside)) - 1
            if found != documents:
                raise RuntimeError(f"{tar}: {documents} documents were written and {found} are found")
            os.replace(offsets_path(aside), offsets_path(tar))
            os.replace(aside, tar)
            _flush_folder(out)
        else:
            for left in (aside, tar, offsets_path(tar)):
                left.unlink(missing_ok=True)
            written = Written(task.name, 0, 0, "", 0, 0, tuple(refused))
        _write_whole(_record_path(tar), json.dumps(asdict(written), indent=1) + "\n")
        return written
    except BaseException as error:
        for left in (aside, offsets_path(aside)):
            left.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(
                f"{out}: {error.strerror} while {task.name} was written; no part of it is left, and the same command "
                "goes on with the shards that are missing"
            ) from error
        raise


def _write_documents(source: Input, task: _Task, archive: TarWriter) -> tuple[Counter[str], list[Refused]]:
    counts: Counter[str] = Counter()
    refused = []
    for number, item in enumerate(source.records(task.start, task.stop), task.start):
        if _stop is not None and _stop.is_set():
            raise _Stopped
        try:
            found = _members(item)
        except DocumentError as error:
            refused.append(Refused(error.key, error.reason, error.message))
            continue
        archive.write({"__key__": f"{number:09d}", **found.content})
        counts.update(documents=1, images=found.images, videos=found.videos)
    return counts, refused


def _members(item: Raw | DocumentError) -> Members:
    if isinstance(item, DocumentError):
        raise item
    return members(item)


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
