"""`foveate bench media`: frames of a video file to the tower's input against bare decoders, and the memory it takes.

The bare decoders read the same frames to RGB and do no more; the media path also finds the frames' times, resizes and
normalises. They take turns, so that what else the machine does hits all.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from ..eval.facts import result
from ..vlm.config import FoveateConfig
from ..vlm.encode import encode_video
from ..vlm.media import load_video
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.planning import VideoSource
from ..vlm.processor import FoveateProcessor
from .bench import SHAPES
from .bench_data import bench_processor

HEIGHT, WIDTH, FPS = 720, 1280, 30
TILE = 448
WITHIN = 3  # times the best in the first round, or a bare decoder's way is not measured further
DISTINCT_FRAMES = 256  # of the clips whose memory is measured


@dataclass(frozen=True)
class MediaBench:
    """What `bench_media` measures.

    Args:
        video: a file; None makes a clip for the time of the run.
        seconds: of the clip that is made.
        gop: frames between its keyframes, at most.
        b_frames: at most so many in a row.
        frames: that are taken of it.
        rounds: in each of which everything has its turn.
    """

    video: Path | None = None
    seconds: float = 30.0
    gop: int = 250
    b_frames: int = 3
    frames: int = 64
    rounds: int = 7


# The clip


def make_clip(
    path: Path, frames: int, gop: int = 250, b_frames: int = 3, height: int = HEIGHT, width: int = WIDTH
) -> None:
    """Encodes h264 as x264 does by default: a camera moves over noise at several scales, things cross, and grain."""
    import av

    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "crf": "21", "bf": str(b_frames)}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.gop_size = gop
        for picture in _pictures(frames, height, width):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _pictures(frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """uint8 [height, width, 3] each."""
    rng = np.random.default_rng(0)
    land = np.full((2 * height, 2 * width, 3), 128.0)
    for side in (4, 16, 64, 160, 640):
        coarse = rng.integers(0, 256, (side * 9 // 16 + 1, side, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
        land += (np.asarray(smooth, float) - 128) * 2 / math.sqrt(side)
    land = land.clip(0, 255).astype(np.int16)
    grain = rng.integers(-6, 7, (height + 64, width + 64, 1)).astype(np.int16)
    starts, speeds = rng.uniform(0, [height, width], (8, 2)), rng.uniform(-6, 6, (8, 2))
    colours, sides = rng.integers(0, 256, (8, 3)), rng.integers(height // 36 + 1, height // 8 + 2, 8)
    for number in range(frames):
        top = int((0.5 + 0.45 * math.sin(number / 60)) * height)
        left = int((0.5 + 0.45 * math.cos(number / 83)) * width)
        picture = land[top : top + height, left : left + width].copy()
        for (y, x), colour, side in zip(starts + number * speeds, colours, sides, strict=True):
            y, x = int(y) % height, int(x) % width
            picture[y : y + side, x : x + side] = colour
        dy, dx = rng.integers(0, 64, 2)
        yield (picture + grain[dy : dy + height, dx : dx + width]).clip(0, 255).astype(np.uint8)


def repeat_clip(source: Path, target: Path, times: int) -> None:
    """Writes the packets of a clip several times over, one behind the other."""
    import av

    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        copied = writer.add_stream_from_template(stream)
        if stream.average_rate is None or stream.time_base is None:
            raise ValueError(f"{source}: no frame rate")
        length = round(stream.frames / stream.average_rate / stream.time_base)
        for number in range(times):
            reader.seek(0)
            for packet in reader.demux(stream):
                if packet.pts is not None and packet.dts is not None:
                    packet.pts, packet.dts = packet.pts + number * length, packet.dts + number * length
                    packet.stream = copied
                    writer.mux(packet)


@contextmanager
def _clip(bench: MediaBench, show: Callable[[str], None]) -> Iterator[Path]:
    if bench.video is not None:
        yield bench.video
        return
    with tempfile.TemporaryDirectory(prefix="foveate-bench-") as folder:
        frames = round(bench.seconds * FPS)
        show(f"encoding {frames} frames")
        path = Path(folder) / "clip.mp4"
        make_clip(path, frames, bench.gop, bench.b_frames)
        yield path


# Bare decoders


def _uniform_pts(path: Path, frames: int) -> tuple[list[int], list[int]]:
    """(numbers, pts) of frames from the first to the last, as the media path takes them."""
    import av

    with av.open(str(path)) as container:
        pts = sorted(packet.pts for packet in container.demux(video=0) if packet.pts is not None)
    numbers = np.linspace(0, len(pts) - 1, min(frames, len(pts))).round().astype(int).tolist()
    return numbers, [pts[number] for number in numbers]


def pyav_in_order(path: Path, pts: list[int], threads: str) -> list[np.ndarray]:
    """Decodes from the beginning; `threads` is FFmpeg's thread type."""
    import av

    wanted, frames = set(pts), []
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = threads
        for frame in container.decode(video=0):
            if frame.pts in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == len(wanted):
                    break
    return frames


def pyav_seeking(path: Path, pts: list[int]) -> list[np.ndarray]:
    """Seeks to the keyframe before each frame."""
    import av

    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for wanted in pts:
            container.seek(wanted, stream=stream)
            frame = next(frame for frame in container.decode(stream) if frame.pts == wanted)
            frames.append(frame.to_ndarray(format="rgb24"))
    return frames


def decord_batch(path: Path, numbers: list[int]) -> np.ndarray:
    import decord

    return decord.VideoReader(str(path)).get_batch(numbers).asnumpy()


# Speed


def bench_media(bench: MediaBench, show: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Measures the media path; results as of `eval.facts.result`.

    Raises:
        MediaError: the video can't be read.
        ValueError: the bare decoders and the media path take other frames.
    """
    processor = bench_processor()
    with _clip(bench, show) as path:
        numbers, pts = _uniform_pts(path, bench.frames)
        ways: dict[str, Callable[[], Any]] = {
            "pyav_in_order": partial(pyav_in_order, path, pts, "SLICE"),
            "pyav_in_order_frame_threads": partial(pyav_in_order, path, pts, "AUTO"),
            "pyav_seeking": partial(pyav_seeking, path, pts),
        }
        bare = set(ways)
        if find_spec("decord") is not None:
            ways["decord"] = partial(decord_batch, path, numbers)
        ways["media"] = partial(_tower_input, path, bench.frames, processor)
        show("checking that all take the same frames")
        _check_same(path, bench.frames, ways["pyav_in_order"]())
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}  # seconds of the clock, of the CPU
        for number in range(bench.rounds + 1):  # the first warms up
            for name in list(ways):
                show(f"{name}, round {number} of {bench.rounds}")
                clock, cpu = time.perf_counter(), time.process_time()
                ways[name]()
                took[name].append((time.perf_counter() - clock, time.process_time() - cpu))
            if number == 0:
                fastest = min(took[name][0] for name in bare)[0]
                slow = {name for name in bare if took[name][0][0] > WITHIN * fastest}
                ways = {name: way for name, way in ways.items() if name not in slow}
                took = {name: [] for name in ways}
    return _speed_results(took, len(pts), bench.rounds)


def _tower_input(path: Path, frames: int, processor: FoveateProcessor) -> Any:
    media = processor.read_media([[]], [[VideoSource(path, num_frames=frames)]])
    return processor.media_inputs(media)["pixel_values_videos"]  # float32 [frames, 3, height, width]


def _check_same(path: Path, frames: int, bare: list[np.ndarray]) -> None:
    ours = load_video(path, num_frames=frames).frames
    if len(ours) != len(bare) or not all(np.array_equal(*pair) for pair in zip(ours, bare, strict=True)):
        raise ValueError(f"{path}: the media path and PyAV take other frames; accepted: an upright, undamaged video")


def _speed_results(took: dict[str, list[tuple[float, float]]], frames: int, rounds: int) -> list[dict[str, Any]]:
    rates = {name: [frames / clock for clock, _ in times] for name, times in took.items()}
    best = max((name for name in rates if name.startswith("pyav")), key=lambda name: median(rates[name]))
    results = []
    for name, of_way in rates.items():
        more: dict[str, Any] = {"low": min(of_way), "high": max(of_way)}
        if name == "media":
            more |= {"baseline": f"{best}_frames_per_s", "ratio": median(of_way) / median(rates[best])}
        results.append(result(f"{name}_frames_per_s", median(of_way), "frames/s", rounds, **more))
    for name in (best, *(name for name in rates if name == "decord")):
        for label, which in (("", 0), ("_by_cpu_time", 1)):
            pairs = zip(took[name], took["media"], strict=True)
            ratios = [theirs[which] / ours[which] for theirs, ours in pairs]
            extremes = {"low": min(ratios), "high": max(ratios)}
            results.append(result(f"media_over_{name}{label}", median(ratios), "times", rounds, **extremes))
    return results


# Memory


def bench_memory(
    video: Path | None, counts: tuple[int, ...] = (256, 2048), show: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Peak resident memory of a process above that before, of a clip of so many frames, all of which are taken.

    Encoded: file to features, chunk by chunk, with a tiny tower. Loaded: all frames at once, as uint8 tiles.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="foveate-bench-") as folder:
        part = Path(folder) / "part.mp4"
        if video is None:
            show(f"encoding {DISTINCT_FRAMES} frames")
            make_clip(part, DISTINCT_FRAMES)
        for count in counts:
            path = video or Path(folder) / f"{count}.mp4"
            if video is None:
                repeat_clip(part, path, -(-count // DISTINCT_FRAMES))
            for work in ("encode", "load"):
                show(f"{work}, {count} frames")
                code = f"from foveate.train.bench_media import run_memory; run_memory({work!r}, {str(path)!r}, {count})"
                ran = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
                said = json.loads(ran.stdout.splitlines()[-1])
                beyond = said["peak"] - said["result"]
                results.append(result(f"{work}_{count}_frames_peak", said["peak"], "bytes", 1))
                results.append(result(f"{work}_{count}_frames_beyond_result", beyond, "bytes", 1))
    return results


def run_memory(work: str, path: str, frames: int) -> None:
    """Prints the bytes that `work` took at most and those of its result, as JSON; for a process of its own."""
    processor, model = bench_processor(), _tiny_model()
    before = _memory("VmRSS")
    if work == "encode":
        plan = processor.plan_video(path, num_frames=frames)
        features = encode_video(model, processor, path, plan)
        kept = features.nbytes
    else:
        kept = load_video(path, num_frames=frames, size=(TILE, TILE)).frames.nbytes
    print(json.dumps({"peak": _memory("VmHWM") - before, "result": kept}))


def _memory(field: str) -> int:
    """A line of /proc/self/status, in bytes. Its peak, unlike getrusage's, isn't the parent's."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}; memory is measured on Linux alone")
    return int(found[1]) * 1024


def _tiny_model() -> FoveateForConditionalGeneration:
    shape = SHAPES["tiny"]
    vision = shape["vision_config"] | {"image_size": TILE}
    config = FoveateConfig(**shape | {"vision_config": vision, "projector": "downsample-3x3"})
    return FoveateForConditionalGeneration._from_config(config).eval()
