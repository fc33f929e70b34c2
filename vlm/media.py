"""Files and bytes → images and frames, safely.

Nothing is downloaded, no file that another file names is opened, sizes are checked before anything is decoded, and
whatever is wrong with an input is a `MediaError` that names it. Exports copy this file beside a model, so it imports
libraries only.
"""

from __future__ import annotations

import base64
import io
import os
import re
import stat
import struct
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

Source = str | os.PathLike[str] | bytes
ImageSource = Source | Image.Image | np.ndarray
VideoSource = Source | np.ndarray | Sequence[ImageSource]

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Playlists (hls, dash, concat) are absent because they open other files; raw streams, because they have no timestamps.
VIDEO_CONTAINERS = ("avi", "asf", "flv", "gif", "matroska", "mov", "mpeg", "mpegts", "ogg")
SEEKABLE_CONTAINERS = ("flv", "matroska", "mov", "mpegts")  # in others, such as MPEG-PS, a seek changes the pts
DECORD_CONTAINERS = (
    "matroska",
    "mov",
)  # decord 0.6 hangs on some MPEG-TS, and seeks to wrong frames in AVI and MPEG-PS
ORIENTATION = 0x0112  # EXIF's tag
LATE_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp", b"xmp")  # PNG chunks and texts
REORDERED_FRAMES = 16  # held until those displayed before them come; decoders reorder by themselves
CONVERTED_FRAMES = 4  # that wait to be taken while the decoder goes on
SEEK_PACKETS = 16  # a seek flushes the decoder: it pays only where it skips at least this many packets
CLOCK_SLACK_S = 5e-4  # Matroska rounds timestamps to milliseconds


class MediaError(ValueError):
    """An image or a video that can't be read. The message starts with its name and says why."""


class MediaLimitError(MediaError):
    """An image or a video that is over one of `MediaLimits`."""


@dataclass(frozen=True)
class MediaLimits:
    """What is refused before it costs memory."""

    max_pixels: int = 64_000_000  # of an image, or of one video frame
    max_frames: int = 2048  # sampled from a video
    max_bytes: int = 4 * 2**30  # of a file, and of the sampled frames in memory


DEFAULT_LIMITS = MediaLimits()


@dataclass(frozen=True)
class Video:
    """Sampled frames. Time 0 is the source's first presentable frame, also in a sub-clip."""

    frames: np.ndarray  # uint8 [frames, height, width, 3]
    timestamps_s: np.ndarray  # float64 [frames]
    duration_s: float  # of the whole source
    fps: float  # mean frame rate of the whole source
    damaged: int  # packets missing or undecodable, and frames concealed, of what was decoded


@dataclass(frozen=True)
class VideoInfo:
    width: int  # as displayed, after rotation
    height: int
    frames: int  # presentable
    duration_s: float
    fps: float  # mean
    rotation: int  # degrees counter-clockwise from the stored to the displayed picture
    codec: str


# Sources


def _name(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        text = os.fsdecode(source)
        return "<data URI>" if text.startswith("data:") else text[:500]
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or "<image>")
    names = {bytes: "<bytes>", np.ndarray: "<array>", list: "<list>", tuple: "<list>"}
    return names.get(type(source), f"<{type(source).__name__}>")


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Decoders raise dozens of types on bad input: each becomes a MediaError that names the input."""
    try:
        yield
    except (MediaError, ImportError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise MediaLimitError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: not an image in one of the formats {', '.join(IMAGE_FORMATS)}") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(f"{name}: {reason}") from error


def _check_bytes(size: int, name: str, limits: MediaLimits) -> None:
    if size > limits.max_bytes:
        raise MediaLimitError(f"{name}: {size} bytes, the limit max_bytes accepts up to {limits.max_bytes}")


def _check_pixels(width: int, height: int, name: str, limits: MediaLimits) -> None:
    if width <= 0 or height <= 0:
        raise MediaError(f"{name}: the picture is {width}x{height}, expected at least one pixel")
    if width * height > limits.max_pixels:
        accepted = f"the limit max_pixels accepts up to {limits.max_pixels}"
        raise MediaLimitError(f"{name}: {width}x{height} is {width * height} pixels, {accepted}")


def _data_uri_bytes(uri: str, name: str, limits: MediaLimits) -> bytes:
    header, _, payload = uri.partition(",")
    if not header.endswith(";base64"):
        raise MediaError(f"{name}: only base64 is read, as in data:image/png;base64,…")
    _check_bytes(len(payload) * 3 // 4, name, limits)
    return base64.b64decode(payload, validate=True)


def _local_path(text: str, name: str) -> str:
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", text)
    if scheme is None:
        return text
    uri = urlsplit(text)
    if scheme[1].lower() != "file" or uri.netloc not in ("", "localhost"):
        raise MediaError(f"{name}: nothing is downloaded; expected a local path or a local file:// URI")
    return unquote(uri.path)


@contextmanager
def _open(source: object, name: str, limits: MediaLimits) -> Iterator[BinaryIO]:
    if not isinstance(source, str | os.PathLike | bytes):
        raise MediaError(f"{name}: unsupported type, expected a path, a file:// or data: URI, bytes, or uint8 pixels")
    if not isinstance(source, bytes):
        text = os.fsdecode(source)
        source = _data_uri_bytes(text, name, limits) if text.startswith("data:") else _local_path(text, name)
    if not source:
        raise MediaError(f"{name}: is empty")
    if isinstance(source, bytes):
        _check_bytes(len(source), name, limits)
        with io.BytesIO(source) as buffer:
            yield buffer
        return
    status = os.stat(source)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe or a device can block for ever
        raise MediaError(f"{name}: a directory or a special file, expected a regular file")
    if status.st_size == 0:
        raise MediaError(f"{name}: is empty")
    _check_bytes(status.st_size, name, limits)
    with open(source, "rb") as file:
        yield file


# Images


class _CompleteReader(io.BufferedReader):
    """Raises where a decoder reads past the end: some programs set PIL.ImageFile.LOAD_TRUNCATED_IMAGES for everyone."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if not data and size != 0:
            raise OSError("truncated")
        return data


def load_image(source: ImageSource, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """An RGB image from a path, a file:// or base64 data: URI, bytes, a PIL image or a uint8 array.

    Arrays are [height, width] or [height, width, channels] with 1, 3 or 4 channels. EXIF orientation is applied,
    transparency is composited on white, 16-bit grey is scaled to 8 bits, and of an animation the first frame is taken.

    Raises:
        MediaError: missing, unreadable, truncated or over a limit, or not in one of IMAGE_FORMATS.
    """
    name = _name(source)
    with _reading(name):
        if isinstance(source, np.ndarray):
            return _to_rgb(_image_from_array(source, name), name, limits)
        if isinstance(source, Image.Image):
            return _to_rgb(source, name, limits)
        with (
            _open(source, name, limits) as handle,
            _CompleteReader(handle) as reader,  # type: ignore[arg-type]
            Image.open(reader, formats=IMAGE_FORMATS) as image,
        ):
            return _to_rgb(image, name, limits)


def probe_image(source: ImageSource, limits: MediaLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(height, width) of what `load_image` returns, from the header alone: pixels that can't be decoded go unnoticed.

    Raises:
        MediaError: missing, without a readable header, over a limit, or not in one of IMAGE_FORMATS.
    """
    name = _name(source)
    with _reading(name):
        if isinstance(source, np.ndarray):
            source = _image_from_array(source, name)
        if isinstance(source, Image.Image):
            return _displayed_size(source, source.getexif(), name, limits)
        with (
            _open(source, name, limits) as handle,
            _CompleteReader(handle) as reader,  # type: ignore[arg-type]
            Image.open(reader, formats=IMAGE_FORMATS) as image,
        ):
            decodes = image.format == "PNG" and not _has_late_orientation(reader)  # PNG's own getexif would
            exif = Image.Image.getexif(image) if decodes else image.getexif()
            return _displayed_size(image, exif, name, limits)


def _displayed_size(image: Image.Image, exif: Image.Exif, name: str, limits: MediaLimits) -> tuple[int, int]:
    _check_image(image, name, limits)
    width, height = image.size
    turned = exif.get(ORIENTATION) in (5, 6, 7, 8) and image.format != "TIFF"  # whose size PIL gives as displayed
    return (width, height) if turned else (height, width)


def _has_late_orientation(reader: BinaryIO) -> bool:
    """Whether a PNG file has EXIF or XMP, in any of their forms, behind its first pixels."""
    before, pixels_seen = reader.tell(), False
    reader.seek(8)
    try:
        while True:
            length, kind = struct.unpack(">I4s", reader.read(8))
            start = reader.tell()
            if pixels_seen and kind in (b"tEXt", b"zTXt", b"iTXt"):
                kind = reader.read(min(length, 80)).partition(b"\0")[0]
            if pixels_seen and kind in LATE_ORIENTATION:
                return True
            pixels_seen |= kind == b"IDAT"
            reader.seek(start + length + 4)
    except (OSError, struct.error):  # its end
        return False
    finally:
        reader.seek(before)


def _check_image(image: Image.Image, name: str, limits: MediaLimits) -> None:
    _check_pixels(*image.size, name, limits)
    if image.mode == "F":
        raise MediaError(f"{name}: floating-point pixels have no fixed range, expected 8 or 16 bits")


def _image_from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise MediaError(
            f"{name}: {array.dtype} {list(array.shape)}, expected uint8 [height, width] or [height, width, 1, 3 or 4]"
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _to_rgb(image: Image.Image, name: str, limits: MediaLimits) -> Image.Image:
    _check_image(image, name, limits)
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)  # [height, width]
        if grey.min() < 0 or grey.max() > 65535:
            raise MediaError(f"{name}: grey values {grey.min()}…{grey.max()}, expected 16 bits, 0…65535")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# Sampling


def _check_sampling(num_frames: int | None, fps: float | None, max_frames: int) -> None:
    if num_frames is not None and fps is not None:
        raise ValueError(f"num_frames={num_frames} and fps={fps}: expected only one of them")
    if num_frames is not None and not 0 < num_frames <= max_frames:
        raise ValueError(f"num_frames={num_frames}, expected 1 to max_frames={max_frames}")
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"fps={fps}, expected a positive number")


@dataclass(frozen=True)
class _Sampling:
    """Which frames of a video are taken, as `load_video` says."""

    num_frames: int | None
    fps: float | None
    start_s: float | None
    end_s: float | None
    times_s: np.ndarray | None = None

    def check(self, source: object, limits: MediaLimits) -> None:
        if self.times_s is not None and not self.num_frames is self.fps is self.start_s is self.end_s is None:
            raise ValueError("times_s is given with num_frames, fps, start_s or end_s: expected alone")
        _check_sampling(self.num_frames, self.fps, limits.max_frames)
        from_s, to_s = self._clip()
        if not 0 <= from_s < to_s:
            raise ValueError(f"start_s={self.start_s}, end_s={self.end_s}: expected 0 <= start_s < end_s")
        if isinstance(source, np.ndarray | list | tuple) and not self.fps is self.start_s is self.end_s is None:
            named = _name(source)
            raise ValueError(f"{named}: fps, start_s and end_s need timestamps, which arrays and images don't have")

    def _clip(self) -> tuple[float, float]:
        return self.start_s or 0.0, float("inf") if self.end_s is None else self.end_s

    def choose(self, video: _VideoFile | _FrameList) -> np.ndarray:
        """Indices of frames, int64 [chosen], ascending."""
        (from_s, to_s), times_s, name, limits = self._clip(), video.times_s, video.name, video.limits
        if self.times_s is not None:
            return self._at_times(video)
        clip = np.flatnonzero((times_s >= from_s - CLOCK_SLACK_S) & (times_s < to_s - CLOCK_SLACK_S))
        if not len(clip):
            raise MediaError(f"{name}: no frame from {from_s} to {to_s} s; the video lasts {video.duration_s:.3f} s")
        if self.num_frames is None and self.fps is None:
            if len(clip) > limits.max_frames:
                accepted = f"the limit max_frames accepts up to {limits.max_frames}; pass num_frames or fps"
                raise MediaLimitError(f"{name}: {len(clip)} frames, {accepted}")
            return clip
        most = limits.max_frames
        return clip[sample_indices(times_s[clip], num_frames=self.num_frames, fps=self.fps, max_frames=most)]

    def _at_times(self, video: _VideoFile | _FrameList) -> np.ndarray:
        wanted, most = np.asarray(self.times_s, np.float64), video.limits.max_frames
        if not 0 < len(wanted) <= most:
            raise MediaError(f"{video.name}: times_s holds {len(wanted)} times, expected 1 to max_frames={most}")
        chosen = np.searchsorted(video.times_s, wanted).clip(max=len(video.times_s) - 1)
        absent = video.times_s[chosen] != wanted
        absent[1:] |= np.diff(chosen) <= 0
        if absent.any():
            at = f"times_s holds {wanted[absent][0]} s"
            raise MediaError(f"{video.name}: {at}, expected times that sample_video gave, each once and in their order")
        return chosen


def sample_indices(
    timestamps_s: np.ndarray, *, num_frames: int | None = None, fps: float | None = None, max_frames: int
) -> np.ndarray:
    """Which frames to take, as ascending int64 indices, none twice.

    With num_frames: `linspace(0, n - 1, num_frames)`, rounded, so first and last frame are included; every frame once
    where there are no more than num_frames. With fps: the last frame at or before each multiple of 1/fps from the first
    timestamp to the last, give or take CLOCK_SLACK_S; where that's more than max_frames, max_frames uniformly as above.

    Args:
        timestamps_s: ascending float64 [frames].

    Raises:
        ValueError: not exactly one of num_frames and fps, or one out of range.
    """
    if num_frames is None and fps is None:
        raise ValueError("num_frames=None and fps=None: expected exactly one of them")
    _check_sampling(num_frames, fps, max_frames)
    n = len(timestamps_s)
    if fps is not None and n:
        elapsed = np.asarray(timestamps_s, np.float64) - timestamps_s[0]
        # The number of the first multiple at or after a frame; where the next frame has another, this one is taken.
        multiple = np.ceil((elapsed - CLOCK_SLACK_S) * fps)
        beyond = np.floor((elapsed[-1] + CLOCK_SLACK_S) * fps) + 1
        taken = np.flatnonzero(np.diff(multiple, append=beyond) > 0)
        if len(taken) <= max_frames:
            return taken
    return np.linspace(0, n - 1, min(n, num_frames or max_frames)).round().astype(np.int64)


# Video


class _Packet(NamedTuple):
    pts: Any  # int or None
    dts: int | None
    place: int | None  # in the file
    ticks: int  # duration
    is_keyframe: bool
    is_shown: bool


class _VideoFile:
    """A demuxed video: which frames it presents and when, and how to decode some of them.

    `keys` [frames] int64 identify decoded frames, in the order of `times_s`: by their pts, or by their number where
    `by_number`: pts are absent or not unique, or made up by FFmpeg as in AVI.
    """

    def __init__(self, handle: BinaryIO, name: str, limits: MediaLimits):
        try:
            import av
        except ImportError as error:
            raise ImportError("reading videos needs PyAV: pip install av") from error
        self.av, self.handle, self.name, self.limits = av, handle, name, limits
        self.damaged: set[int | None] = set()  # pts of packets and frames
        self.lost = 0  # packets that the index announces and the file doesn't hold
        self.packets: list[_Packet] = []  # in decode order
        with self._opened() as (container, stream):
            self.container, tick_s, rate = container.format.name, stream.time_base, stream.average_rate
            size, codec = (stream.width, stream.height), stream.codec_context.name
            frame = self._scan(container, stream)
        self.matrix = _display_matrix(frame)

        first = next((packet for packet in self.packets if packet.is_keyframe), self.packets[0])
        shown = [packet for packet in self.packets[self.packets.index(first) :] if packet.is_shown]
        pts = [packet.pts for packet in shown]
        self.by_number = self.container == "avi" or None in pts or len(set(pts)) < len(pts)
        if self.by_number:
            clock = [packet.dts if packet.dts is not None else order for order, packet in enumerate(shown)]
            ticks = sorted(clock)
            if ticks != clock:
                raise MediaError(f"{name}: its timestamps jump back, as in files joined without remuxing")
            self.keys = np.arange(len(shown))
        else:  # frames displayed before the first keyframe refer to pictures that aren't there
            shown = sorted((packet for packet in shown if packet.pts >= first.pts), key=lambda packet: packet.pts)
            ticks = [packet.pts for packet in shown]
            self.keys = np.array(ticks, np.int64)
        if not shown:
            raise MediaError(f"{name}: the video stream has no presentable frame")
        self.times_s = (np.array(ticks) - ticks[0]) * tick_s.numerator / tick_s.denominator
        span_s = (ticks[-1] - ticks[0]) * tick_s  # a Fraction
        rate = (len(shown) - 1) / span_s if span_s else rate
        duration_s, fps = float(span_s + (shown[-1].ticks * tick_s or (1 / rate if rate else 0))), float(rate or 0)
        width, height = size if self.matrix[0] else size[::-1]
        self.duration_s, self.fps = duration_s, fps
        self.size = height, width
        self.info = VideoInfo(width, height, len(shown), duration_s, fps, frame.rotation % 360, codec)

    @property
    def damage(self) -> int:
        return len(self.damaged) + self.lost

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """A container and its video stream, from the handle alone: FFmpeg gets no protocol to open anything else."""
        self.handle.seek(0)
        options = {"format_whitelist": ",".join(VIDEO_CONTAINERS), "protocol_whitelist": "none"}
        try:
            container = self.av.open(self.handle, options=options, metadata_errors="replace", buffer_size=2**18)
        except self.av.FFmpegError as error:
            reason = f"not a complete video in one of the containers {', '.join(VIDEO_CONTAINERS)}"
            raise MediaError(f"{self.name}: {reason} ({error.strerror})") from error
        with container:
            cover = self.av.stream.Disposition.attached_pic
            stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
            if stream is None or stream.codec_context is None:
                raise MediaError(f"{self.name}: no video stream, or no decoder for it")
            _check_pixels(stream.width, stream.height, self.name, self.limits)
            stream.codec_context.options = {"max_pixels": str(self.limits.max_pixels)}
            yield container, stream

    def _scan(self, container: Any, stream: Any) -> Any:
        """Fills `packets`; returns the first frame that decodes."""
        frame, codec = None, stream.codec_context
        for packet in self._demux(container, stream):
            if packet is not None:
                hidden = packet.is_discard or (codec.name == "vp8" and not memoryview(packet)[0] & 0x10)
                facts = packet.pts, packet.dts, packet.pos, packet.duration or 0, packet.is_keyframe, not hidden
                self.packets.append(_Packet(*facts))
                if packet.is_corrupt:
                    self.damaged.add(packet.pts)
            if frame is None:
                with suppress(self.av.FFmpegError):
                    frame = next(iter(codec.decode(packet)), None)
        self.lost = max(0, len(stream.index_entries) - len(self.packets))
        if frame is None:
            raise MediaError(f"{self.name}: none of its {len(self.packets)} video packets can be decoded")
        return frame

    def _demux(self, container: Any, stream: Any) -> Iterator[Any]:
        """The packets, then None to flush the decoder."""
        try:
            yield from (packet for packet in container.demux(stream) if packet.size)
        except self.av.FFmpegError:
            self.damaged.add(None)
        yield None

    def _decode(self, stream: Any, packet: Any) -> list[Any]:
        try:
            frames = stream.codec_context.decode(packet)
        except self.av.FFmpegError:
            self.damaged.add(packet and packet.pts)
            return []
        self.damaged.update(frame.pts for frame in frames if frame.is_corrupt)
        return frames

    def frames(self, chosen: np.ndarray, size: tuple[int, int] | None, backend: str) -> Iterator[np.ndarray]:
        """uint8 [height, width, 3] of each chosen frame as displayed, in order."""
        done = 0
        if backend == "decord":
            for pixels in _decord_frames(self, chosen, size):
                done += 1
                yield pixels
        to_rgb = partial(self.av.video.reformatter.VideoReformatter().reformat, format="rgb24", threads=1)
        converting: deque[Future[np.ndarray]] = deque()
        with ThreadPoolExecutor(1) as pool:  # pixels are converted and resized while the next frames are decoded
            for frame in self.decode(self.keys[chosen[done:]].tolist()):
                converting.append(pool.submit(self._displayed, frame, to_rgb, size))
                if len(converting) > CONVERTED_FRAMES:
                    yield converting.popleft().result()
            while converting:
                yield converting.popleft().result()

    def _displayed(self, frame: Any, to_rgb: Callable[[Any], Any], size: tuple[int, int] | None) -> np.ndarray:
        _check_pixels(frame.width, frame.height, self.name, self.limits)
        a, b, c, d = _display_matrix(frame)
        pixels = to_rgb(frame).to_ndarray()
        return _resized(pixels[::d, ::a] if a else pixels.swapaxes(0, 1)[::b, ::c], size)

    def decode(self, keys: Sequence[int]) -> Iterator[Any]:
        """The frames of these keys in their order, all intact: by seeking, then from the beginning where that fails."""
        seekable = self.container.startswith(SEEKABLE_CONTAINERS) and not self.by_number
        readers = [self._by_seeking, self._sequentially] if seekable else [self._sequentially]
        pending, lost = deque(keys), 0
        while readers and pending:
            read, wanted = readers.pop(0), set(pending)
            ahead: dict[int, Any] = {}  # frames that came before their turn
            with self._opened() as (container, stream):
                for key, frame in read(container, stream, sorted(wanted)):
                    if key in wanted and not frame.is_corrupt:
                        wanted.remove(key)
                        ahead[key] = frame
                    overdue = len(ahead) > REORDERED_FRAMES
                    if overdue and readers:
                        break
                    while pending and (pending[0] in ahead or overdue):
                        turn = pending.popleft()
                        if turn not in ahead:
                            wanted.remove(turn)
                            lost += 1
                        elif lost:  # only counted now
                            del ahead[turn]
                        else:
                            yield ahead.pop(turn)
                        overdue = len(ahead) > REORDERED_FRAMES
        lost += sum(key not in ahead for key in pending)
        if lost:
            raise MediaError(f"{self.name}: {lost} of the {len(keys)} sampled frames could not be decoded")

    def _sequentially(self, container: Any, stream: Any, keys: list[int]) -> Iterator[tuple[int, Any]]:
        number, left = 0, set(keys)
        for packet in self._demux(container, stream):
            for frame in self._decode(stream, packet):
                key = number if self.by_number else frame.pts
                number += 1
                left.discard(key)
                yield key, frame
            if not left and not self.by_number:
                return
        if self.by_number and number != len(self.keys):
            raise MediaError(
                f"{self.name}: {number} of {len(self.keys)} frames decode, and without pts it's open which"
            )

    def _by_seeking(self, container: Any, stream: Any, keys: list[int]) -> Iterator[tuple[int, Any]]:
        """From the keyframe before each pts. Seeks only go forward, so each packet is read once at most.

        Stops where the demuxer gives other packets than it gave to the scan.
        """
        order_of = {(packet.pts, packet.place): order for order, packet in enumerate(self.packets)}
        starts = sorted((p.pts, order) for order, p in enumerate(self.packets) if p.is_keyframe and p.pts is not None)

        def keyframe_before(pts: int) -> int:
            return starts[max(0, bisect_right(starts, (pts, len(order_of))) - 1)][1] if starts else 0

        wanted, pending, reached = set(keys), deque(keys), -1  # reached: a packet's place in decode order
        while pending:
            start = keyframe_before(pending[0])
            for timestamp in (pending[0], self.packets[start].dts):  # demuxers seek by one or the other
                packets = self._seek(container, stream, timestamp)
                first = next(packets, None)
                landed = order_of.get((first.pts, first.pos), -1) if first is not None else -1
                if reached < landed <= start:
                    break
            else:
                return
            for reached, packet in enumerate(chain([first], packets), landed):
                if packet is not None and order_of.get((packet.pts, packet.pos)) != reached:
                    return
                if self.info.codec == "h264":  # no other picture needs those that refer to others only
                    shown = packet is None or packet.pts in wanted
                    stream.codec_context.skip_frame = "DEFAULT" if shown else "NONREF"
                for frame in self._decode(stream, packet):
                    yield frame.pts, frame
                    while pending and frame.pts is not None and pending[0] <= frame.pts:
                        pending.popleft()
                if not pending or keyframe_before(pending[0]) - reached >= SEEK_PACKETS:
                    break
            else:
                return

    def _seek(self, container: Any, stream: Any, timestamp: int | None) -> Iterator[Any]:
        if timestamp is not None:
            try:
                container.seek(timestamp, stream=stream)
            except self.av.FFmpegError:
                return
            yield from self._demux(container, stream)


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d): pixel (x, y) is displayed at (a x + c y, b x + d y), but for an offset."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.sign(np.frombuffer(bytes(matrix), np.int32)[:5]).tolist()
    return (a or 1, 0, 0, d or 1) if a or d else (0, b or 1, c or 1, 0)


def _resized(pixels: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Bicubic with antialiasing: PIL's within 2 of 255 where nothing overshoots 0 or 255, and faster."""
    if size is None or pixels.shape[:2] == size:
        return pixels
    image = torch.from_numpy(np.require(pixels, None, ["C", "W"])).permute(2, 0, 1)[None]  # [1, 3, height, width]
    resized = torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def probe_video(source: Source, limits: MediaLimits = DEFAULT_LIMITS) -> VideoInfo:
    """What a video holds: demuxes the whole stream, and decodes one frame for its rotation.

    Raises:
        MediaError: missing, unreadable, without a presentable frame, or over a limit.
    """
    name = _name(source)
    with _reading(name), _open(source, name, limits) as handle:
        return _VideoFile(handle, name, limits).info


class _FrameList:
    """Frames given as such, one a second; `size` is (height, width)."""

    info = None
    fps, damage = 1.0, 0

    def __init__(self, source: np.ndarray | Sequence[ImageSource], name: str, limits: MediaLimits):
        if isinstance(source, np.ndarray) and (source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3):
            raise MediaError(f"{name}: {source.dtype} {list(source.shape)}, expected uint8 [frames, height, width, 3]")
        if not len(source):
            raise MediaError(f"{name}: no frames")
        self.source, self.name, self.limits = source, name, limits
        self.times_s, self.duration_s = np.arange(len(source), dtype=np.float64), float(len(source))
        with self._frame(0):
            self.size = probe_image(source[0], limits)

    def frames(self, chosen: np.ndarray, size: tuple[int, int] | None, backend: str) -> Iterator[np.ndarray]:
        """uint8 [height, width, 3] of each chosen frame, in order."""
        for index in chosen.tolist():
            with self._frame(index):
                image = load_image(self.source[index], self.limits)
            if image.size != self.size[::-1]:
                sizes = f"is {image.size}, the first {self.size[::-1]} (width, height)"
                raise MediaError(f"{self.name}: frame {index} {sizes}")
            yield _resized(np.asarray(image), size)

    @contextmanager
    def _frame(self, index: int) -> Iterator[None]:
        try:
            yield
        except MediaError as error:
            raise MediaError(f"{self.name}: frame {index}: {error}") from error


@contextmanager
def _video(source: VideoSource, name: str, limits: MediaLimits) -> Iterator[_VideoFile | _FrameList]:
    with _reading(name):
        if isinstance(source, np.ndarray | list | tuple):
            yield _FrameList(source, name, limits)
        else:
            with _open(source, name, limits) as handle:
                yield _VideoFile(handle, name, limits)


def _batches(
    video: _VideoFile | _FrameList, chosen: np.ndarray, size: tuple[int, int] | None, backend: str, batch: int
) -> Iterator[np.ndarray]:
    """uint8 [up to batch, height, width, 3] of the chosen frames, in order."""
    shape, left, row = None, len(chosen), 0
    for pixels in video.frames(chosen, size, backend):
        shape = shape or pixels.shape
        if pixels.shape != shape:
            sizes = f"{shape[:2]} to {pixels.shape[:2]} (height, width)"
            raise MediaError(f"{video.name}: the picture size changes from {sizes}; pass size")
        if not row:
            rows = min(batch, left)
            _check_bytes(rows * pixels.size, video.name, video.limits)
            frames = np.empty((rows, *shape), np.uint8)
        frames[row] = pixels
        left, row = left - 1, row + 1
        if row == len(frames):
            yield frames
            row = 0


def sample_video(
    source: VideoSource,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> tuple[VideoInfo | None, np.ndarray]:
    """What a video holds, and when the frames stand that `load_video` would take, without decoding them.

    Returns:
        The information (None for arrays and lists, which have none) and float64 [frames], seconds.

    Raises:
        MediaError, ValueError: as `load_video`, but for pixels that can't be decoded.
    """
    sampling = _Sampling(num_frames, fps, start_s, end_s)
    sampling.check(source, limits)
    with _video(source, _name(source), limits) as video:
        return video.info, video.times_s[sampling.choose(video)]


def iter_video(
    source: VideoSource,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    times_s: np.ndarray | None = None,
    size: tuple[int, int] | None = None,
    backend: str = "pyav",
    batch: int = 32,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Iterator[np.ndarray]:
    """The frames of `load_video` with the same arguments, in batches: memory doesn't grow with their number.

    A frame that can't be decoded ends it with a MediaError, maybe after earlier frames: those count only once the
    iterator has ended by itself.

    Args:
        batch: frames at a time; the last batch may be smaller.

    Returns:
        Iterator of uint8 [up to batch, height, width, 3].

    Raises:
        MediaError, ValueError: as `load_video`; max_bytes holds for the file and for a batch.
    """
    sampling = _Sampling(num_frames, fps, start_s, end_s, times_s)
    sampling.check(source, limits)
    _check_output(size, backend, limits)
    if batch < 1:
        raise ValueError(f"batch={batch}, expected at least 1")

    def read() -> Iterator[np.ndarray]:
        with _video(source, _name(source), limits) as video:
            yield from _batches(video, sampling.choose(video), size, backend, batch)

    return read()


def load_video(
    source: VideoSource,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    times_s: np.ndarray | None = None,
    size: tuple[int, int] | None = None,
    backend: str = "pyav",
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Video:
    """Samples a video's frames, as `sample_indices` says; all of them where neither num_frames nor fps is given.

    The source is a path, a file:// or base64 data: URI, bytes, uint8 frames [frames, height, width, 3], or a list of
    what `load_image` takes, all of one size. Arrays and lists have no clock: they count as one frame a second.

    Args:
        start_s, end_s: only frames with start_s <= timestamp < end_s.
        times_s: instead, exactly the frames at these times, some or all of those that `sample_video` gave.
        size: (height, width); each frame is resized as it is decoded (bicubic with antialiasing).
        backend: "pyav", or "decord", which hands over to PyAV with a warning where it would fail or take other frames.

    Raises:
        MediaError: missing, unreadable, over a limit, nothing in the clip, or a sampled frame that can't be decoded:
            no other frame takes its place. Frames predicted from a damaged one are kept; `Video.damaged` tells.
        ValueError: an argument out of range.
    """
    sampling = _Sampling(num_frames, fps, start_s, end_s, times_s)
    sampling.check(source, limits)
    _check_output(size, backend, limits)
    with _video(source, _name(source), limits) as video:
        chosen = sampling.choose(video)
        height, width = size or video.size
        _check_bytes(len(chosen) * height * width * 3, video.name, limits)
        [frames] = _batches(video, chosen, size, backend, len(chosen))
        return Video(frames, video.times_s[chosen], video.duration_s, video.fps, video.damage)


def _check_output(size: tuple[int, int] | None, backend: str, limits: MediaLimits) -> None:
    if backend not in ("pyav", "decord"):
        raise ValueError(f"backend={backend!r}, expected 'pyav' or 'decord'")
    if size is not None and not (min(size) > 0 and size[0] * size[1] <= limits.max_pixels):
        raise ValueError(f"size={size}, expected (height, width) of 1 to max_pixels={limits.max_pixels} pixels")


def _decord_frames(video: _VideoFile, chosen: np.ndarray, size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    """The frames; none, with a warning, where decord 0.6 is known to hang or to return others, fewer where it fails."""
    try:
        import decord
    except ImportError as error:
        raise ImportError("backend='decord' needs decord: pip install decord") from error
    if not video.container.startswith(DECORD_CONTAINERS):
        reason = f"can hang on {video.container}, or return other frames"
    elif video.damaged or video.lost:
        reason = "can hang on a damaged file"
    elif video.matrix != (1, 0, 0, 1):
        reason = "ignores mirroring"
    elif not all(packet.is_shown for packet in video.packets):
        reason = "returns frames that are not to be shown"
    else:
        video.handle.seek(0)
        try:
            source = video.handle if isinstance(video.handle, io.BytesIO) else os.path.abspath(video.handle.name)
            reader = decord.VideoReader(source, ctx=decord.cpu(0), num_threads=1)
            if len(reader) == len(video.keys):
                for index in chosen.tolist():
                    yield _resized(reader[index].asnumpy(), size)
                return
            reason = f"counts {len(reader)} frames of {len(video.keys)}"
        except Exception as error:
            reason = f"failed ({str(error)[:200]})"
    warnings.warn(f"{video.name}: decord {reason}; reading with PyAV", stacklevel=3)
