"""Damages small valid files of every format and reads them: a result or a MediaError is right, all else is a finding.

    python scripts/fuzz_media.py --tries 10000 --json > fuzz.json

Tries run in a worker process with limits on memory and CPU time, which is killed where a try takes too long and started
again after a crash. A finding's file is kept; the same --seed makes the same files again. decord is not tried.
"""

import argparse
import importlib.util
import io
import json
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MEMORY_BYTES = 2 * 2**30  # that a worker may take beyond what it starts with
RENEWED_AFTER = 1000  # tries of a worker
WORDS = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
OUTCOMES = ("read", "refused", "crash", "hang", "wrong")


# Valid files


def picture(number: int, mode: str = "RGB", height: int = 24, width: int = 32) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 9, columns * 7, (rows + columns + 20 * number) * 3], axis=-1) % 256
    pixels[4:12, number % 16 : number % 16 + 9] = (200, 30, 90)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def images() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray(np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 80)
    animated = {"save_all": True, "append_images": [picture(1), picture(2)]}
    wanted: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "rgb.png": (picture(0), "PNG", {"exif": exif}),
        "palette.png": (picture(0, "P"), "PNG", {"transparency": 3}),
        "grey16.png": (grey16, "PNG", {}),
        "animated.png": (picture(0), "PNG", animated),
        "baseline.jpg": (picture(0), "JPEG", {"exif": exif}),
        "progressive.jpg": (picture(0), "JPEG", {"progressive": True}),
        "cmyk.jpg": (picture(0, "CMYK"), "JPEG", {}),
        "animated.gif": (picture(0), "GIF", animated),
        "lossy.webp": (picture(0), "WEBP", {"exif": exif}),
        "lossless.webp": (picture(0, "RGBA"), "WEBP", {"lossless": True}),
        "animated.webp": (picture(0), "WEBP", animated),
        "rgb.bmp": (picture(0), "BMP", {}),
        "palette.bmp": (picture(0, "P"), "BMP", {}),
        "rgb.ppm": (picture(0), "PPM", {}),
        "raw.tiff": (picture(0), "TIFF", {"exif": exif}),
        "lzw.tiff": (picture(0), "TIFF", {"compression": "tiff_lzw"}),
        "deflate.tiff": (grey16, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "jpeg.tiff": (picture(0), "TIFF", {"compression": "jpeg"}),
    }
    files = {}
    for name, (image, image_format, options) in wanted.items():
        buffer = io.BytesIO()
        image.save(buffer, image_format, **options)
        files[name] = buffer.getvalue()
    return files


def videos() -> dict[str, bytes]:
    import av

    h264 = {"preset": "ultrafast", "crf": "24", "bf": "2"}
    vpx = {"deadline": "realtime", "cpu-used": "8"}
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    wanted: dict[str, tuple[str, str, dict[str, str], dict[str, str], int]] = {
        "plain.mp4": ("libx264", "yuv420p", h264, {}, 0),
        "turned.mp4": ("libx264", "yuv420p", h264, {}, 90),
        "fragments.mp4": ("libx264", "yuv420p", h264, fragments, 0),
        "faststart.mov": ("mpeg4", "yuv420p", {}, {"movflags": "faststart"}, 0),
        "h264.mkv": ("libx264", "yuv420p", h264, {}, 0),
        "vp9.webm": ("libvpx-vp9", "yuv420p", vpx, {}, 0),
        "vp8.webm": ("libvpx", "yuv420p", vpx, {}, 0),
        "h264.ts": ("libx264", "yuv420p", h264, {}, 0),
        "mpeg2.mpg": ("mpeg2video", "yuv420p", {}, {}, 0),
        "mpeg4.avi": ("mpeg4", "yuv420p", {}, {}, 0),
        "mjpeg.avi": ("mjpeg", "yuvj420p", {}, {}, 0),
        "h264.flv": ("libx264", "yuv420p", h264, {}, 0),
        "wmv2.asf": ("wmv2", "yuv420p", {}, {}, 0),
        "moving.gif": ("gif", "rgb8", {}, {}, 0),
    }
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (codec, pixels, options, container_options, rotation) in wanted.items():
            path = Path(folder) / name
            with av.open(str(path), "w", options=container_options) as container:
                stream: Any = container.add_stream(codec, rate=25, options=options)
                stream.height, stream.width, stream.pix_fmt = 24, 32, pixels
                stream.codec_context.gop_size, stream.codec_context.thread_count = 5, 1
                if rotation:
                    stream.set_display_rotation(rotation)
                for number in range(12):
                    frame = av.VideoFrame.from_ndarray(np.asarray(picture(number)), format="rgb24")
                    frame = frame.reformat(format=pixels)
                    frame.pts, frame.time_base = number, Fraction(1, 25)
                    container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
            files[name] = path.read_bytes()
    return files


# Damage


def damaged(files: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """(name of the valid file, the file of this try)."""
    chance = random.Random(f"{seed} {number}")
    name = chance.choice(sorted(files))
    data = bytearray(files[name])
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        data = chance.choice(DAMAGES)(data, chance, files) or bytearray(b"\0")
    return name, bytes(data)


def place(data: bytearray, chance: random.Random) -> int:
    """Anywhere, half of the time among the first bytes, where headers are."""
    return chance.randrange(min(len(data), chance.choice((64, 512, len(data), len(data)))))


def span(data: bytearray, chance: random.Random) -> slice:
    start = place(data, chance)
    return slice(start, start + chance.choice((1, 2, 4, 16, 100, 1000)))


def flip_bits(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> bytearray:
    for _ in range(chance.choice((1, 1, 3, 20, 200))):
        data[place(data, chance)] ^= 1 << chance.randrange(8)
    return data


def write_number(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> bytearray:
    start, size = place(data, chance), chance.choice((1, 2, 4, 8))
    number = chance.choice((*WORDS, len(data), chance.getrandbits(8 * size))) % 256**size
    data[start : start + size] = number.to_bytes(size, chance.choice(("big", "little")))
    return data


def truncate(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> bytearray:
    return data[: chance.randrange(1, len(data) + 1)]


def remove(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> bytearray:
    del data[span(data, chance)]
    return data


def repeat(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> bytearray:
    part = span(data, chance)
    data[part.start : part.start] = data[part] * chance.choice((1, 2, 50))
    return data


def fill(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> bytearray:
    part = span(data, chance)
    size = len(data[part])
    data[part] = chance.choice((bytes(size), b"\xff" * size, chance.randbytes(size)))
    return data


def splice(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> bytearray:
    other = files[chance.choice(sorted(files))]
    return data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]


DAMAGES: tuple[Callable[..., bytearray], ...] = (
    flip_bits, flip_bits, write_number, write_number, truncate, remove, repeat, fill, splice,
)  # fmt: skip


# Reading


def check(data: bytes) -> int:
    """Reads it in every way; how many gave a result.

    Raises:
        AssertionError: two ways disagree.
        Exception: anything but a MediaError.
    """
    from foveate.vlm import media

    limits = media.MediaLimits(max_pixels=2_000_000, max_frames=64, max_bytes=256 * 2**20)

    def attempt(function: Callable[..., Any], **arguments: Any) -> Any:
        try:
            return function(data, limits=limits, **arguments)
        except media.MediaError:
            return None

    read = 0
    size = attempt(media.probe_image)
    image = attempt(media.load_image)
    if image is not None:
        read += 1
        assert size == (image.height, image.width), f"probe_image says {size}, load_image {image.size}"
    info = attempt(media.probe_video)
    sampled = attempt(media.sample_video, num_frames=4)
    assert (info is None) == (sampled is None), "only one of probe_video and sample_video reads it"
    loaded = attempt(media.load_video, num_frames=4)
    if loaded is not None:
        read += 1
        assert sampled is not None and np.array_equal(sampled[1], loaded.timestamps_s), "sample_video: other times"
    frames = attempt(lambda data, limits: [*media.iter_video(data, size=(16, 16), batch=5, limits=limits)])
    return read + (frames is not None)


def work(folder: Path, seed: int, cpu_s: int, checker: Callable[[bytes], int]) -> None:
    """Answers each number of a try on stdin with a line of JSON."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        used = int(time.process_time()) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (used + cpu_s, resource.RLIM_INFINITY))
        try:
            outcome = {"outcome": "read" if checker(damaged(files, seed, int(line))[1]) else "refused"}
        except BaseException as error:
            outcome = {"outcome": "wrong", "error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(outcome), flush=True)


def worker_check(path: str | None) -> Callable[[bytes], int]:
    if path is None:
        return check
    spec = importlib.util.spec_from_file_location("checker", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.check


# Tries


class Worker:
    """A process that tries, started again when it ended."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        script = [sys.executable, __file__, "--work", str(folder), "--seed", str(options.seed)]
        check = ["--check", options.check] if options.check else []
        self.command = [*script, "--timeout", str(options.timeout), *check]
        self.timeout_s, self.tries = options.timeout, 0
        self.process: subprocess.Popen[bytes] | None = None

    def tried(self, number: int) -> dict[str, Any]:
        if self.process is None or self.tries >= RENEWED_AFTER:
            self.stop()
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
            self.tries = 0
        assert self.process.stdin is not None and self.process.stdout is not None
        first, self.tries = self.tries == 0, self.tries + 1
        self.process.stdin.write(f"{number}\n".encode())
        self.process.stdin.flush()
        patience_s = self.timeout_s + (120 if first else 0)  # which also imports
        if not select.select([self.process.stdout], [], [], patience_s)[0]:
            self.stop()
            return {"outcome": "hang", "error": f"no answer after {patience_s} s"}
        if line := self.process.stdout.readline():
            return json.loads(line)
        code = self.process.wait()
        self.stop()
        return {"outcome": "crash", "error": f"ended by signal {-code}" if code < 0 else f"exit code {code}"}

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def fuzz(options: argparse.Namespace) -> tuple[Counter[str], list[dict[str, Any]]]:
    """(number of each outcome, findings)."""
    outcomes: Counter[str] = Counter()
    findings = []
    with tempfile.TemporaryDirectory(prefix="fuzz-media-") as folder:
        files = images() | videos()
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        worker = Worker(Path(folder), options)
        for number in range(options.first, options.first + options.tries):
            said = worker.tried(number)
            outcomes[said["outcome"]] += 1
            if said["outcome"] not in ("read", "refused"):
                name, data = damaged(files, options.seed, number)
                options.keep.mkdir(parents=True, exist_ok=True)
                kept = options.keep / f"{options.seed}-{number}-{name}"
                kept.write_bytes(data)
                findings.append({"seed": options.seed, "number": number, "file": str(kept)} | said)
                print(json.dumps(findings[-1]), file=sys.stderr, flush=True)
            if (number + 1) % 500 == 0:
                print(f"{number + 1 - options.first} of {options.tries}: {dict(outcomes)}", file=sys.stderr, flush=True)
        worker.stop()
    return outcomes, findings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first try")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds that a try may take")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz_media"), help="folder for files of findings")
    parser.add_argument("--check", help="a Python file whose check(data) is tried instead of this project's functions")
    parser.add_argument("--json", action="store_true", help="print a results file instead of lines")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.seed, int(options.timeout) + 1, worker_check(options.check))
        return
    outcomes, findings = fuzz(options)
    if options.json:
        from foveate.eval.facts import result, run_facts

        entries = [result(f"tries_{name}", outcomes[name], "tries", options.tries) for name in OUTCOMES]
        facts = run_facts("python " + " ".join(sys.argv), ("av", "numpy", "pillow", "torch"))
        print(json.dumps(facts | {"results": entries, "findings": findings}, indent=1))
    else:
        print(", ".join(f"{name} {outcomes[name]}" for name in OUTCOMES))
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
