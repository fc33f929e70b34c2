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
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
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
    damaged: int  # packets missing or undecodable, and frames concealed, in the part that was read


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


def _image_from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise MediaError(
            f"{name}: {array.dtype} {list(array.shape)}, expected uint8 [height, width] or [height, width, 1, 3 or 4]"
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _to_rgb(image: Image.Image, name: str, limits: MediaLimits) -> Image.Image:
    _check_pixels(*image.size, name, limits)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise MediaError(f"{name}: floating-point pixels have no fixed range, expected 8 or 16 bits")
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
        self.info = VideoInfo(width, height, len(shown), duration_s, fps, frame.rotation % 360, codec)

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

    def decode(self, keys: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """(key, frame) of each frame that decodes intact: by seeking, then what that left out in one pass."""
        wanted = set(keys)
        seekable = self.container.startswith(SEEKABLE_CONTAINERS) and not self.by_number
        for read in (self._by_seeking, self._sequentially) if seekable else (self._sequentially,):
            if wanted:
                with self._opened() as (container, stream):
                    for key, frame in read(container, stream, sorted(wanted)):
                        if key in wanted and not frame.is_corrupt:
                            wanted.remove(key)
                            yield key, frame

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

        pending, reached = deque(keys), -1  # reached: a packet's place in decode order
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
    if size is None or pixels.shape[:2] == size:
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def probe_video(source: Source, limits: MediaLimits = DEFAULT_LIMITS) -> VideoInfo:
    """What a video holds: demuxes the whole stream, and decodes one frame for its rotation.

    Raises:
        MediaError: missing, unreadable, without a presentable frame, or over a limit.
    """
    name = _name(source)
    with _reading(name), _open(source, name, limits) as handle:
        return _VideoFile(handle, name, limits).info


def load_video(
    source: VideoSource,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
    size: tuple[int, int] | None = None,
    backend: str = "pyav",
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Video:
    """Samples a video's frames, as `sample_indices` says; all of them where neither num_frames nor fps is given.

    The source is a path, a file:// or base64 data: URI, bytes, uint8 frames [frames, height, width, 3], or a list of
    what `load_image` takes, all of one size. Arrays and lists have no clock: they count as one frame a second.

    Args:
        start_s, end_s: only frames with start_s <= timestamp < end_s.
        size: (height, width); each frame is resized as it is decoded (PIL, bicubic).
        backend: "pyav", or "decord", which hands over to PyAV with a warning where it would fail or take other frames.

    Raises:
        MediaError: missing, unreadable, over a limit, nothing in the clip, or a sampled frame that can't be decoded:
            no other frame takes its place. Frames predicted from a damaged one are kept; `Video.damaged` tells.
        ValueError: an argument out of range.
    """
    _check_sampling(num_frames, fps, limits.max_frames)
    if backend not in ("pyav", "decord"):
        raise ValueError(f"backend={backend!r}, expected 'pyav' or 'decord'")
    from_s, to_s = start_s or 0.0, float("inf") if end_s is None else end_s
    if not 0 <= from_s < to_s:
        raise ValueError(f"start_s={start_s}, end_s={end_s}: expected 0 <= start_s < end_s")
    if size is not None and not (min(size) > 0 and size[0] * size[1] <= limits.max_pixels):
        raise ValueError(f"size={size}, expected (height, width) of 1 to max_pixels={limits.max_pixels} pixels")
    name = _name(source)
    if isinstance(source, np.ndarray | list | tuple):
        if not fps is start_s is end_s is None:
            raise ValueError(f"{name}: fps, start_s and end_s need timestamps, which arrays and images don't have")
        with _reading(name):
            return _video_from_images(source, num_frames, size, name, limits)

    with _reading(name), _open(source, name, limits) as handle:
        video = _VideoFile(handle, name, limits)
        times_s, info = video.times_s, video.info
        chosen = np.flatnonzero((times_s >= from_s - CLOCK_SLACK_S) & (times_s < to_s - CLOCK_SLACK_S))
        if not len(chosen):
            raise MediaError(f"{name}: no frame from {from_s} to {to_s} s; the video lasts {info.duration_s:.3f} s")
        chosen = chosen[_sampled(times_s[chosen], num_frames, fps, name, limits)]
        height, width = size or (info.height, info.width)
        _check_bytes(len(chosen) * height * width * 3, name, limits)
        frames = _decord_frames(video, chosen, size) if backend == "decord" else None
        if frames is None:
            frames = _pyav_frames(video, chosen, size)
        return Video(frames, times_s[chosen], info.duration_s, info.fps, len(video.damaged) + video.lost)


def _sampled(
    times_s: np.ndarray, num_frames: int | None, fps: float | None, name: str, limits: MediaLimits
) -> np.ndarray:
    if num_frames is not None or fps is not None:
        return sample_indices(times_s, num_frames=num_frames, fps=fps, max_frames=limits.max_frames)
    if len(times_s) > limits.max_frames:
        accepted = f"the limit max_frames accepts up to {limits.max_frames}; pass num_frames or fps"
        raise MediaLimitError(f"{name}: {len(times_s)} frames, {accepted}")
    return np.arange(len(times_s))


def _video_from_images(
    source: np.ndarray | Sequence[ImageSource],
    num_frames: int | None,
    size: tuple[int, int] | None,
    name: str,
    limits: MediaLimits,
) -> Video:
    if isinstance(source, np.ndarray) and (source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3):
        raise MediaError(f"{name}: {source.dtype} {list(source.shape)}, expected uint8 [frames, height, width, 3]")
    if not len(source):
        raise MediaError(f"{name}: no frames")
    times_s = np.arange(len(source), dtype=np.float64)
    chosen = _sampled(times_s, num_frames, None, name, limits)
    frames, stored = [], None
    for index in chosen.tolist():
        try:
            image = load_image(source[index], limits)
        except MediaError as error:
            raise MediaError(f"{name}: frame {index}: {error}") from error
        stored = stored or image.size
        if image.size != stored:
            raise MediaError(f"{name}: frame {index} is {image.size}, the first {stored} (width, height)")
        frames.append(_resized(np.asarray(image), size))
        _check_bytes(len(chosen) * frames[0].size, name, limits)
    return Video(np.stack(frames), times_s[chosen], float(len(source)), 1.0, 0)


def _pyav_frames(video: _VideoFile, chosen: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [frames, height, width, 3] as displayed."""
    row_of = {key: row for row, key in enumerate(video.keys[chosen].tolist())}
    frames: np.ndarray | None = None
    decoded = 0
    for key, frame in video.decode(list(row_of)):
        _check_pixels(frame.width, frame.height, video.name, video.limits)
        a, b, c, d = _display_matrix(frame)
        pixels = frame.to_ndarray(format="rgb24", threads=1)
        pixels = _resized(pixels[::d, ::a] if a else pixels.swapaxes(0, 1)[::b, ::c], size)
        if frames is None:
            frames = np.empty((len(row_of), *pixels.shape), np.uint8)
        if pixels.shape != frames.shape[1:]:
            sizes = f"{frames.shape[1:3]} to {pixels.shape[:2]} (height, width)"
            raise MediaError(f"{video.name}: the picture size changes from {sizes}; pass size")
        frames[row_of[key]] = pixels
        decoded += 1
    if frames is None or decoded < len(row_of):
        lost = f"{len(row_of) - decoded} of the {len(row_of)} sampled frames"
        raise MediaError(f"{video.name}: {lost} could not be decoded")
    return frames


def _decord_frames(video: _VideoFile, chosen: np.ndarray, size: tuple[int, int] | None) -> np.ndarray | None:
    """The frames; or None, with a warning, where decord 0.6 is known to hang or to return other frames, or fails."""
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
                return np.stack([_resized(reader[index].asnumpy(), size) for index in chosen.tolist()])
            reason = f"counts {len(reader)} frames of {len(video.keys)}"
        except Exception as error:
            reason = f"failed ({str(error)[:200]})"
    warnings.warn(f"{video.name}: decord {reason}; reading with PyAV", stacklevel=3)
    return None
