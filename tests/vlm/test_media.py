"""Videos are encoded here with their frame number drawn in each frame, so that a test reads back which frame it got."""

import base64
import io
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageFile

from foveate.vlm import media
from foveate.vlm.media import (
    MediaError,
    MediaLimits,
    iter_video,
    load_image,
    load_video,
    probe_image,
    probe_video,
    sample_indices,
    sample_video,
)

FPS = 10
BLOCK = 16
H264 = {"preset": "ultrafast", "crf": "18", "bf": "3", "b-pyramid": "none"}
VPX = {"deadline": "realtime", "cpu-used": "8"}


def numbered(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """The number in binary: twelve black or white blocks in three rows, a white one below for the orientation."""
    frame = np.zeros((height, width, 3), np.uint8)
    for bit in range(12):
        row, column = bit // 4 * BLOCK, bit % 4 * BLOCK
        frame[row : row + BLOCK, column : column + BLOCK] = 255 * (number >> bit & 1)
    frame[3 * BLOCK : 4 * BLOCK, :BLOCK] = 255
    return frame


def number_of(frame: np.ndarray) -> int:
    middle = BLOCK // 2
    assert frame[3 * BLOCK + middle, middle].mean() > 127, "not upright"
    assert frame[3 * BLOCK + middle, 3 * BLOCK + middle].mean() < 127, "not upright"
    lit = (frame[bit // 4 * BLOCK + middle, bit % 4 * BLOCK + middle].mean() > 127 for bit in range(12))
    return sum(on << bit for bit, on in enumerate(lit))


def assert_read_alike(source, **arguments) -> media.Video:
    """`load_video`'s result, after checking that `sample_video` and `iter_video` say the same."""
    video = load_video(source, **arguments)
    sampling = {name: value for name, value in arguments.items() if name in ("num_frames", "fps", "start_s", "end_s")}
    _, times_s = sample_video(source, **sampling)
    np.testing.assert_array_equal(times_s, video.timestamps_s)
    for batch in (1, 5, 1000):
        batches = list(iter_video(source, batch=batch, **arguments))
        assert [len(frames) for frames in batches[:-1]] == [batch] * (len(batches) - 1)
        np.testing.assert_array_equal(np.concatenate(batches), video.frames)
    return video


def numbers_of(video: media.Video) -> list[int]:
    return [number_of(frame) for frame in video.frames]


def encode(
    path: Path,
    frames: int = 40,
    codec: str = "libx264",
    gop: int = 12,
    times_ms: list[int] | None = None,
    rotation: tuple = (),
    size: tuple[int, int] = (64, 96),
    options: dict | None = None,
    container_options: dict | None = None,
) -> Path:
    defaults = {"libx264": H264, "libvpx-vp9": VPX, "libvpx": VPX}
    pixels = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p" if size[0] % 2 == 0 else "yuv444p")
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=FPS, options={**defaults.get(codec, {}), **(options or {})})
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
        stream.codec_context.time_base = Fraction(1, 1000) if times_ms else Fraction(1, FPS)
        if rotation:
            stream.set_display_rotation(*rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(number, *size), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = times_ms[number] if times_ms else number, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def copy_packets(source: Path, target: Path, first: int, zero: int, edit=None) -> Path:
    """What `ffmpeg -c copy -ss` does: packets from `first` on, shifted so that frame `zero` is shown at time 0."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options={"avoid_negative_ts": "disabled"}) as writer:
        stream = reader.streams.video[0]
        copied = writer.add_stream_from_template(stream)
        shift = int(Fraction(zero, FPS) / stream.time_base)
        for order, packet in enumerate(packet for packet in reader.demux(stream) if packet.size):
            if order < first:
                continue
            packet = edit(order, packet) if edit else packet
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copied
            writer.mux(packet)
    return target


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 frames, B-frames, a keyframe every 12."""
    return encode(tmp_path_factory.mktemp("video") / "plain.mp4")


# Images


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_every_source_gives_the_same_pixels(picture, tmp_path):
    data = encoded(Image.fromarray(picture), "PNG")
    path = tmp_path / "a b%.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (str(path), path, path.as_uri(), data, uri, Image.fromarray(picture), Image.open(path), picture):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(pixels(image), picture)


@pytest.mark.parametrize("image_format", media.IMAGE_FORMATS)
@pytest.mark.parametrize("lenient", [False, True])
def test_complete_files_load_and_truncated_ones_never_do(image_format, lenient, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    path = tmp_path / f"cut.{image_format.lower()}"
    data = encoded(Image.fromarray(picture), image_format)
    path.write_bytes(data)
    assert load_image(path).size == (30, 20)
    for kept in (len(data) // 100 + 1, len(data) // 4, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:kept])
        with pytest.raises(MediaError, match=path.name):
            load_image(path)


def test_exif_orientation_is_applied(picture):
    upright = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, -1),
        7: picture[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(picture, 1),
    }
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = load_image(encoded(Image.fromarray(picture), "PNG", exif=exif))
        np.testing.assert_array_equal(pixels(image), expected, err_msg=str(orientation))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 257, 32896, 65535]], np.uint16)
    for source in (
        Image.fromarray(grey),
        encoded(Image.fromarray(grey), "PNG"),
        encoded(Image.fromarray(grey), "TIFF"),
    ):
        assert pixels(load_image(source))[0, :, 0].tolist() == [0, 1, 128, 255]
    maxval_1000 = b"P5 3 1 1000\n" + struct.pack(">3H", 0, 500, 1000)
    assert pixels(load_image(maxval_1000))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(MediaError, match="16 bits"):
        load_image(Image.fromarray(np.array([[70000]], np.int32)))
    with pytest.raises(MediaError, match="floating-point"):
        load_image(Image.fromarray(np.ones((2, 2), np.float32)))


def test_transparency_is_composited_on_white():
    rgba = np.array([[[200, 100, 0, 0], [200, 100, 0, 255], [200, 100, 0, 51]]], np.uint8)
    expected = [[255, 255, 255], [200, 100, 0], [244, 224, 204]]
    image = Image.fromarray(rgba)
    for source in (rgba, image, encoded(image, "PNG"), encoded(image, "WEBP", lossless=True, exact=True)):
        assert pixels(load_image(source))[0].tolist() == expected
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert pixels(load_image(encoded(palette, "PNG", transparency=0)))[0].tolist() == [[255, 255, 255], [40, 50, 60]]
    grey = Image.fromarray(np.array([[[90, 255], [90, 0]]], np.uint8), "LA")
    assert pixels(load_image(encoded(grey, "PNG")))[0].tolist() == [[90] * 3, [255] * 3]


def test_other_modes_become_rgb():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(pixels(load_image(encoded(cmyk, "JPEG", quality=95))).astype(int) - [255, 0, 0]).max() < 8
    assert pixels(load_image(Image.new("1", (1, 1), 1))).tolist() == [[[255] * 3]]
    grey = np.array([[7, 200]], np.uint8)
    for source in (grey, grey[:, :, None]):
        assert pixels(load_image(source))[0].tolist() == [[7] * 3, [200] * 3]


def test_the_first_frame_of_an_animation_is_taken():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert pixels(load_image(data))[0, 0].tolist() == [255, 0, 0]


ANY_IMAGE = {
    "one pixel": (Image.new("RGB", (1, 1), (9, 8, 7)), "PNG", {}, (9, 8, 7)),
    "tall": (Image.new("RGB", (1, 20_000), (9, 8, 7)), "PNG", {}, (9, 8, 7)),
    "wide": (Image.new("RGB", (20_000, 1), (250, 250, 250)), "JPEG", {}, (250, 250, 250)),
    "bilevel": (Image.new("1", (9, 5), 1), "PNG", {}, (255, 255, 255)),
    "bilevel fax": (Image.new("1", (9, 5), 1), "TIFF", {"compression": "group4"}, (255, 255, 255)),
    "grey": (Image.new("L", (9, 5), 77), "JPEG", {}, (77, 77, 77)),
    "palette": (Image.new("RGB", (9, 5), (255, 0, 0)).convert("P"), "PNG", {}, (255, 0, 0)),
    "palette gif": (Image.new("RGB", (9, 5), (255, 0, 0)).convert("P"), "GIF", {}, (255, 0, 0)),
    "cmyk jpeg": (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", {"quality": 100}, (254, 0, 0)),
    "cmyk tiff": (Image.new("CMYK", (9, 5), (0, 255, 255, 0)), "TIFF", {}, (255, 0, 0)),
    "ycbcr": (Image.new("RGB", (16, 16), (0, 0, 254)).convert("YCbCr"), "JPEG", {"quality": 100}, (0, 0, 254)),
    "lab": (Image.new("LAB", (9, 5), (255, 128, 128)), "TIFF", {}, (255, 255, 255)),
    "16 bits": (Image.fromarray(np.full((5, 9), 257 * 77, np.uint16)), "PNG", {}, (77, 77, 77)),
    "alpha": (Image.new("RGBA", (9, 5), (0, 0, 0, 0)), "WEBP", {"lossless": True}, (255, 255, 255)),
    "alpha palette": (Image.new("RGBA", (9, 5), (0, 0, 0, 0)), "GIF", {}, (255, 255, 255)),
    **{
        f"animated {image_format}": (
            Image.new("RGB", (9, 5), (255, 0, 0)),
            image_format,
            {"save_all": True, "append_images": [Image.new("RGB", (9, 5), (0, 0, 255))], **options},
            (255, 0, 0),
        )
        for image_format, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}))
    },
}


@pytest.mark.parametrize("kind", ANY_IMAGE)
def test_images_of_any_kind_load(kind):
    image, image_format, options, colour = ANY_IMAGE[kind]
    data = encoded(image, image_format, **options)
    loaded = load_image(data)
    assert loaded.mode == "RGB" and loaded.size == image.size
    assert np.abs(pixels(loaded).astype(int) - colour).max() <= 2
    assert probe_image(data) == (image.height, image.width)


def late_exif(data: bytes) -> bytes:
    """The PNG with its eXIf chunk moved behind the pixels."""
    at = data.index(b"eXIf") - 4
    length = int.from_bytes(data[at : at + 4], "big") + 12
    chunk, rest = data[at : at + length], data[:at] + data[at + length :]
    return rest[:-12] + chunk + rest[-12:]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP", "late PNG", "XMP"])
def test_a_probed_size_is_the_loaded_size(image_format, picture, monkeypatch):
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"exif": exif}
        if image_format == "XMP":
            options = {"xmp": f'<x:xmpmeta tiff:Orientation="{orientation}"/>'.encode()}
        kind = {"late PNG": "PNG", "XMP": "JPEG"}.get(image_format, image_format)
        data = encoded(Image.fromarray(picture), kind, **options)
        if image_format == "late PNG":
            data = late_exif(data)
        expected = load_image(data).size[::-1]
        assert expected == ((30, 20) if 5 <= orientation <= 8 else (20, 30))
        assert probe_image(Image.open(io.BytesIO(data))) == expected
        with monkeypatch.context() as patch:
            if image_format != "late PNG":
                patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
            assert probe_image(data) == expected


def test_probing_refuses_what_loading_refuses_by_the_header(picture, tmp_path):
    data = encoded(Image.fromarray(picture), "PNG")
    assert probe_image(data[:-40]) == (20, 30)  # only its pixels are cut
    assert probe_image(picture) == probe_image(Image.fromarray(picture)) == (20, 30)
    floating = encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")
    for source in (b"", data[:20], "http://localhost/a.png", tmp_path / "absent.png", 3, floating, np.zeros((4, 4))):
        with pytest.raises(MediaError):
            load_image(source)
        with pytest.raises(MediaError):
            probe_image(source)
    with pytest.raises(MediaError, match=r"8000x8001.*max_pixels"):
        probe_image(png_of_claimed_size(8000, 8001))


def png_of_claimed_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_bombs_are_refused_by_their_header(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(MediaError, match=r"^<bytes>: .*8000x8001.*max_pixels.*64000000"):
        load_image(png_of_claimed_size(8000, 8001))
    for limits in (MediaLimits(), MediaLimits(max_pixels=10**12)):
        with pytest.raises(MediaError, match="<bytes>"):
            load_image(png_of_claimed_size(60000, 60000), limits)
    with pytest.raises(MediaError, match=r"<array>: 30x20 is 600 pixels.*max_pixels accepts up to 599"):
        load_image(np.zeros((20, 30, 3), np.uint8), MediaLimits(max_pixels=599))


def test_what_is_not_an_image_is_refused_by_name(tmp_path):
    empty, text, folder, pipe = (tmp_path / name for name in ("empty.png", "text.jpg", "folder.png", "pipe.png"))
    empty.write_bytes(b"")
    text.write_text("not an image " * 100)
    folder.mkdir()
    os.mkfifo(pipe)
    pickled = tmp_path / "array.npy"
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for path in (empty, text, folder, pipe, pickled, tmp_path / "absent.png"):
        for load in (load_image, load_video, probe_video):
            with pytest.raises(MediaError, match=path.name):
                load(path)
    icon = encoded(Image.new("RGB", (16, 16)), "ICO")
    for source in (b"", b"x" * 100, icon, "data:image/png,abc", "data:image/png;base64,!!", 3, None, "a\0b"):
        with pytest.raises(MediaError):
            load_image(source)
    for source in ("http://localhost/a.png", "HTTPS://localhost/a.png", "ftp://localhost/a", "file://elsewhere/a.png"):
        with pytest.raises(MediaError, match="nothing is downloaded"):
            load_image(source)
    for array in (
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ):
        with pytest.raises(MediaError, match="<array>"):
            load_image(array)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused_by_name(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(MediaError, match=r"secret\.png.*[Pp]ermission"):
        load_image(path)


def test_large_files_are_refused_unread(mp4):
    with pytest.raises(MediaError, match=r"plain\.mp4.*max_bytes accepts up to 100"):
        load_video(mp4, limits=MediaLimits(max_bytes=100))
    with pytest.raises(MediaError, match="max_bytes"):
        load_image(bytes(101), MediaLimits(max_bytes=100))


# Sampling


def test_uniform_sampling_spans_the_video_without_repeats():
    assert sample_indices(np.arange(101.0), num_frames=5, max_frames=8).tolist() == [0, 25, 50, 75, 100]
    assert sample_indices(np.arange(3.0), num_frames=8, max_frames=8).tolist() == [0, 1, 2]
    assert sample_indices(np.arange(9.0), num_frames=1, max_frames=8).tolist() == [0]
    assert sample_indices(np.array([]), num_frames=4, max_frames=8).tolist() == []


@pytest.mark.parametrize("fps", [0.3, 1, 3, 7.5, 10, 30, 1e9])
def test_fps_sampling_takes_the_last_frame_at_or_before_each_multiple(fps):
    for seed in range(5):
        times_ms = np.cumsum(np.random.default_rng(seed).integers(1, 400, 50)) - 1000
        ticks = []
        if fps <= 30:
            span = Fraction(int(times_ms[-1] - times_ms[0]), 1000) + Fraction(1, 2000)
            ticks = [Fraction(k) / Fraction(fps) for k in range(int(span * Fraction(fps)) + 1)]
        slack = Fraction(1, 2000)
        frame_s = [Fraction(int(t - times_ms[0]), 1000) - slack for t in times_ms]
        brute = {max(i for i, t in enumerate(frame_s) if t <= tick) for tick in ticks}
        expected = sorted(brute) or list(range(50))
        assert sample_indices(times_ms / 1000, fps=fps, max_frames=50).tolist() == expected


def test_fps_sampling_on_an_exact_grid_is_not_off_by_rounding():
    assert sample_indices(np.arange(300) / 30, fps=10, max_frames=100).tolist() == list(range(0, 300, 3))
    assert sample_indices(np.arange(300) * 0.1, fps=10, max_frames=300).tolist() == list(range(300))
    assert sample_indices((np.arange(300) / 30).round(3), fps=15, max_frames=150).tolist() == list(range(0, 300, 2))
    assert sample_indices(np.arange(300) / 30, fps=10, max_frames=4).tolist() == [0, 100, 199, 299]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_frames": 2, "fps": 1}, {"num_frames": 0}, {"num_frames": 9}, {"fps": 0}, {"fps": float("nan")}],
)
def test_wrong_sampling_arguments_are_value_errors(arguments):
    with pytest.raises(ValueError, match=r"num_frames|fps"):
        sample_indices(np.arange(5.0), max_frames=8, **arguments)


# Videos

CONTAINERS = {
    "h264, B-frames, short GOP": ("a.mp4", "libx264", 12),
    "h264, B-frames, one keyframe": ("b.mp4", "libx264", 1000),
    "h264 in fragments": ("f.mp4", "libx264", 20),
    "h264 in Matroska": ("a.mkv", "libx264", 20),
    "VP9": ("a.webm", "libvpx-vp9", 20),
    "VP8": ("b.webm", "libvpx", 20),
    "MPEG-TS": ("a.ts", "libx264", 20),
    "MPEG-PS": ("a.mpg", "mpeg2video", 15),
    "MPEG-4 in AVI": ("a.avi", "mpeg4", 20),
    "h264 with B-frames in AVI": ("b.avi", "libx264", 20),
    "every frame a keyframe": ("c.avi", "mjpeg", 1),
    "FLV": ("a.flv", "libx264", 20),
    "GIF": ("a.gif", "gif", 20),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_exactly_the_asked_frames_come_back(kind, tmp_path):
    name, codec, gop = CONTAINERS[kind]
    fragments = {"movflags": "frag_keyframe+empty_moov"} if "fragments" in kind else None
    path = encode(tmp_path / name, 100, codec, gop, container_options=fragments)
    everything = load_video(path)
    assert numbers_of(everything) == list(range(100))
    np.testing.assert_allclose(everything.timestamps_s, np.arange(100) / FPS, atol=1e-3)
    assert everything.fps == pytest.approx(FPS, rel=1e-3)
    assert everything.duration_s == pytest.approx(10, abs=0.02)
    assert everything.damaged == 0
    assert everything.frames.dtype == np.uint8

    for num_frames in (1, 2, 9, 64):
        sampled = assert_read_alike(path.read_bytes(), num_frames=num_frames)
        expected = np.linspace(0, 99, num_frames).round()
        assert numbers_of(sampled) == expected.tolist()
        np.testing.assert_allclose(sampled.timestamps_s, expected / FPS, atol=1e-3)
    assert numbers_of(assert_read_alike(path, fps=1)) == list(range(0, 100, 10))
    assert numbers_of(load_video(path, start_s=4.95, end_s=5.5)) == [50, 51, 52, 53, 54]
    assert load_video(path, start_s=4.95, end_s=5.5).timestamps_s[0] == pytest.approx(5, abs=1e-3)

    info = probe_video(path)
    assert (info.width, info.height, info.frames, info.rotation) == (96, 64, 100, 0)
    assert info.duration_s == pytest.approx(10, abs=0.02)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.ts"])
def test_two_frames_of_a_long_video_cost_two_groups_of_pictures(name, tmp_path, monkeypatch):
    path = encode(tmp_path / name, 200, "libvpx-vp9" if name.endswith("webm") else "libx264", gop=20)
    decoded = []
    decode = media._VideoFile._decode
    monkeypatch.setattr(media._VideoFile, "_decode", lambda *a: decoded.append(1) or decode(*a))
    assert numbers_of(load_video(path, num_frames=2)) == [0, 199]
    assert len(decoded) < 40


def test_variable_frame_rate_keeps_its_timestamps(tmp_path):
    times_ms = np.cumsum(np.random.default_rng(1).integers(20, 300, 30)).tolist()
    for name in ("vfr.mp4", "vfr.mkv"):
        path = encode(tmp_path / name, 30, times_ms=times_ms)
        video = load_video(path)
        expected = (np.array(times_ms) - times_ms[0]) / 1000
        np.testing.assert_allclose(video.timestamps_s, expected, atol=2e-3)
        assert video.fps == pytest.approx(29 / expected[-1], rel=1e-3)
        clip = load_video(path, start_s=1.0, end_s=2.0)
        assert numbers_of(clip) == [i for i, t in enumerate(expected) if 1.0 <= t < 2.0]


@pytest.mark.parametrize(
    ("rotation", "displayed"),
    [
        ((90,), lambda frame: np.rot90(frame, 1)),
        ((180,), lambda frame: np.rot90(frame, 2)),
        ((270,), lambda frame: np.rot90(frame, 3)),
        ((0, True), lambda frame: frame[:, ::-1]),
        ((0, False, True), lambda frame: frame[::-1]),
        ((90, True), lambda frame: np.rot90(frame, 1)[:, ::-1]),
    ],
)
def test_frames_are_as_displayed(rotation, displayed, tmp_path):
    """libavutil/display.h: rotated counter-clockwise, then mirrored."""
    path = encode(tmp_path / "rotated.mp4", 3, rotation=rotation)
    stored = load_video(encode(tmp_path / "stored.mp4", 3)).frames
    video = load_video(path)
    np.testing.assert_array_equal(video.frames, np.stack([displayed(frame) for frame in stored]))
    info = probe_video(path)
    assert (info.height, info.width) == video.frames.shape[1:3]
    if len(rotation) == 1:
        assert info.rotation == rotation[0]
    with pytest.warns(UserWarning, match="reading with PyAV"):
        np.testing.assert_array_equal(load_video(path, backend="decord").frames, video.frames)


@pytest.mark.parametrize("gop", [7, 20, 1000])
@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.ts"])
def test_cut_without_reencoding(gop, name, tmp_path):
    """From a keyframe, an edit list hides what precedes the cut. From the middle, nothing decodes before a keyframe."""
    source = encode(tmp_path / "source.mp4", 100, gop=gop)
    keyframe = 60 // gop * gop
    if name == "cut.mp4":
        cut = copy_packets(source, tmp_path / name, keyframe, 61)
        assert numbers_of(load_video(cut)) == list(range(61, 100))
        for num_frames in (1, 2, 5):
            expected = (61 + np.linspace(0, 38, num_frames).round()).tolist()
            video = load_video(cut, num_frames=num_frames)
            assert numbers_of(video) == expected
            np.testing.assert_allclose(video.timestamps_s, (np.array(expected) - 61) / FPS, atol=1e-3)
    middle = copy_packets(source, tmp_path / f"middle-{name}", 30, 20)
    first_decodable = -(-30 // gop) * gop
    if first_decodable > 99:
        with pytest.raises(MediaError, match=middle.name):
            load_video(middle)
    else:
        video = load_video(middle)
        assert numbers_of(video) == list(range(first_decodable, 100))
        assert video.timestamps_s[0] == 0
        assert numbers_of(load_video(middle, num_frames=2)) == [first_decodable, 99]


def test_hidden_vp8_frames_are_not_counted(tmp_path):
    """An alternate reference frame is a packet of its own in VP8, with show_frame = 0 (RFC 6386, section 9.1)."""

    def hide_odd(order: int, packet: av.Packet) -> av.Packet:
        data = bytearray(bytes(packet))
        if order % 2:
            data[0] &= ~0x10
        hidden = av.Packet(bytes(data))
        hidden.pts, hidden.dts, hidden.time_base, hidden.is_keyframe = (
            packet.pts,
            packet.dts,
            packet.time_base,
            not order,
        )
        return hidden

    path = copy_packets(encode(tmp_path / "a.webm", 40, "libvpx", 1000), tmp_path / "b.webm", 0, 0, edit=hide_odd)
    assert numbers_of(load_video(path)) == list(range(0, 40, 2))
    assert numbers_of(load_video(path, num_frames=3)) == [0, 20, 38]


def test_frames_are_resized_while_decoding(mp4):
    full = load_video(mp4, num_frames=4)
    small = assert_read_alike(mp4, num_frames=4, size=(32, 60))
    assert small.frames.shape == (4, 32, 60, 3)
    np.testing.assert_array_equal(load_video(full.frames, size=(32, 60)).frames, small.frames)
    assert load_video(mp4, num_frames=4, size=(128, 192)).frames.shape == (4, 128, 192, 3)


@pytest.mark.parametrize("size", [(32, 60), (144, 256), (448, 448), (1, 1), (1, 300), (2, 1000)])
def test_resizing_is_that_of_pil(size):
    frames = np.random.default_rng(0).integers(50, 206, (2, 144, 256, 3), dtype=np.uint8)
    for frame, resized in zip(frames, load_video(frames, size=size).frames, strict=True):
        of_pil = np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC))
        difference = np.abs(resized.astype(int) - of_pil)
        assert difference.max() <= 2 and difference.mean() < (0.25 if min(size) < 3 else 0.02)


@pytest.mark.parametrize("pyramid", ["none", "strict", "normal"])
@pytest.mark.parametrize("gop", [7, 1000])
def test_sampled_pixels_are_those_of_decoding_everything(pyramid, gop, tmp_path, monkeypatch):
    """Though pictures that no other refers to are skipped where they aren't wanted."""
    options = {"preset": "medium", "bf": "5", "b-pyramid": pyramid, "refs": "4"}
    path = encode(tmp_path / "a.mp4", 60, gop=gop, options=options)
    with av.open(str(path)) as container:
        everything = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    decoded = []
    decode = media._VideoFile._decode
    monkeypatch.setattr(media._VideoFile, "_decode", lambda *a: decoded.extend(frames := decode(*a)) or frames)
    for num_frames in (2, 7, 23, 60):
        decoded.clear()
        video = load_video(path, num_frames=num_frames)
        np.testing.assert_array_equal(video.frames, everything[np.linspace(0, 59, num_frames).round().astype(int)])
        if num_frames == 7 and gop == 1000:
            assert len(decoded) < 40  # of 60


def test_chosen_times_give_their_frames(mp4):
    _, times_s = sample_video(mp4, num_frames=9)
    video = load_video(mp4, times_s=times_s[[1, 2, 7]])
    assert numbers_of(video) == np.linspace(0, 39, 9).round()[[1, 2, 7]].tolist()
    np.testing.assert_array_equal(np.concatenate(list(iter_video(mp4, times_s=times_s[[1, 2, 7]]))), video.frames)
    for wrong in ([times_s[1] + 0.01], [99.0], [-1.0], times_s[[2, 1]], times_s[[1, 1]], []):
        with pytest.raises(MediaError, match=r"plain\.mp4: times_s"):
            load_video(mp4, times_s=np.array(wrong))
    with pytest.raises(ValueError, match="times_s"):
        load_video(mp4, times_s=times_s, fps=1)


def test_a_frame_that_seeking_misses_comes_in_its_turn(mp4, monkeypatch):
    """The seeking read leaves frame 5 out; 34 later ones are more than what is held back for it."""
    by_seeking = media._VideoFile._by_seeking
    fifth = media._VideoFile(open(mp4, "rb"), "", MediaLimits()).keys[5]  # noqa: SIM115

    def without_fifth(self, *arguments):
        return ((key, frame) for key, frame in by_seeking(self, *arguments) if key != fifth)

    monkeypatch.setattr(media._VideoFile, "_by_seeking", without_fifth)
    assert numbers_of(assert_read_alike(mp4)) == list(range(40))


def test_frames_that_a_decoder_gives_out_of_order_come_in_order(mp4, monkeypatch):
    sequentially = media._VideoFile._sequentially

    def swapped(self, container, stream, keys):
        frames = list(sequentially(self, container, stream, keys))
        return iter(frames[10:20] + frames[:10] + frames[20:])

    monkeypatch.setattr(media._VideoFile, "_by_seeking", lambda *arguments: iter(()))
    monkeypatch.setattr(media._VideoFile, "_sequentially", swapped)
    assert numbers_of(assert_read_alike(mp4)) == list(range(40))


def test_iterating_holds_a_batch_at_a_time(tmp_path):
    path = encode(tmp_path / "a.mp4", 200, gop=50, size=(64, 96))
    peaks = []
    for frames in (40, 200):
        tracemalloc.start()
        assert sum(len(batch) for batch in iter_video(path, num_frames=frames, size=(256, 256), batch=4)) == frames
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    of_a_frame = 256 * 256 * 3
    assert peaks[1] < 16 * of_a_frame
    assert peaks[1] - peaks[0] < 4 * of_a_frame


def test_iterating_refuses_arguments_at_once(mp4):
    for arguments in ({"batch": 0}, {"num_frames": 2, "fps": 1}, {"start_s": -1}, {"size": (0, 4)}, {"backend": "x"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            iter_video(mp4, **arguments)
    with pytest.raises(MediaError, match=r"40 frames.*max_frames accepts up to 39"):
        next(iter_video(mp4, limits=MediaLimits(max_frames=39)))
    assert len(next(iter_video(mp4, batch=1, limits=MediaLimits(max_bytes=30_000)))) == 1  # all would be 737,280 bytes


def test_an_abandoned_iterator_closes_its_file(mp4):
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc")
    before = len(list(descriptors.iterdir()))
    frames = iter_video(mp4, batch=2)
    next(frames)
    assert len(list(descriptors.iterdir())) > before
    frames.close()
    assert len(list(descriptors.iterdir())) == before


def test_odd_sizes_and_single_frames(tmp_path):
    path = encode(tmp_path / "odd.mp4", 5, size=(65, 97))
    assert load_video(path).frames.shape == (5, 65, 97, 3)
    assert numbers_of(load_video(path)) == list(range(5))
    video = load_video(encode(tmp_path / "one.mp4", 1), fps=2)
    assert numbers_of(video) == [0]
    assert video.duration_s == pytest.approx(1 / FPS)


@pytest.mark.parametrize("size", [(2, 2), (1, 1), (1, 3000), (3000, 1)])
def test_extreme_shapes_of_frames(size, tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("rawvideo", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *size, "bgr24"
        for value in (20, 90, 200):
            frame = np.full((*size, 3), value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(stream.encode(None))
    video = assert_read_alike(tmp_path / "a.avi")
    assert video.frames.shape == (3, *size, 3)
    assert [frame[0, 0, 0] for frame in video.frames] == [20, 90, 200]
    assert assert_read_alike(tmp_path / "a.avi", size=(8, 8)).frames[2, 7, 7, 0] == 200


def test_limits_of_a_video_are_checked_before_decoding(mp4, monkeypatch):
    monkeypatch.setattr(media._VideoFile, "decode", lambda *a: pytest.fail("decoded"))
    for limits, message in (
        (MediaLimits(max_pixels=6143), r"plain\.mp4: 96x64 is 6144 pixels.*max_pixels accepts up to 6143"),
        (MediaLimits(max_frames=39), r"plain\.mp4: 40 frames.*max_frames accepts up to 39"),
        (MediaLimits(max_bytes=40 * 64 * 96 * 3 - 1), r"plain\.mp4: 737280 bytes.*max_bytes accepts up to 737279"),
    ):
        with pytest.raises(MediaError, match=message):
            load_video(mp4, limits=limits)


def test_a_stream_that_grows_is_held_to_the_limit_and_to_one_size(tmp_path):
    small, large, path = (tmp_path / name for name in ("small.ts", "large.ts", "both.ts"))
    encode(small, 12)
    encode(large, 12, size=(640, 960), times_ms=[5000 + 100 * number for number in range(12)])
    path.write_bytes(small.read_bytes() + large.read_bytes())
    assert load_video(path, size=(64, 96)).frames.shape == (24, 64, 96, 3)
    with pytest.raises(MediaError, match=r"both\.ts: the picture size changes"):
        load_video(path)
    with pytest.raises(MediaError, match=r"both\.ts: 12 of the 24 sampled frames"):
        load_video(path, size=(64, 96), limits=MediaLimits(max_pixels=10_000))


def test_files_joined_without_remuxing_are_refused(tmp_path):
    part = encode(tmp_path / "part.ts", 12).read_bytes()
    (tmp_path / "joined.ts").write_bytes(part + part)
    with pytest.raises(MediaError, match=r"joined\.ts: its timestamps jump back"):
        load_video(tmp_path / "joined.ts")


def test_frames_from_memory(mp4, tmp_path):
    frames = np.stack([numbered(i) for i in range(9)])
    for source in (frames, list(frames), [Image.fromarray(frame) for frame in frames]):
        video = assert_read_alike(source, num_frames=3, size=(64, 80))
        video = assert_read_alike(source, num_frames=3)
        assert numbers_of(video) == [0, 4, 8]
        assert video.timestamps_s.tolist() == [0, 4, 8]
        assert len(load_video(source).frames) == 9
        with pytest.raises(ValueError, match="timestamps"):
            load_video(source, fps=1)
    with pytest.raises(MediaError, match=r"frame 1 is \(97, 65\)"):
        load_video([frames[0], numbered(1, 65, 97)])
    with pytest.raises(MediaError, match="frame 1: <array>"):
        load_video([frames[0], frames[1] / 255])
    with pytest.raises(MediaError, match="no frames"):
        load_video([])
    for array in (frames / 255, frames[0], frames[..., :1]):
        with pytest.raises(MediaError, match="<array>"):
            load_video(array)
    with pytest.raises(MediaError, match=r"9 frames.*max_frames"):
        load_video(frames, limits=MediaLimits(max_frames=8))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_frames": 2, "fps": 1},
        {"num_frames": 0},
        {"num_frames": 4000},
        {"fps": -1},
        {"start_s": -1},
        {"start_s": 2, "end_s": 2},
        {"size": (0, 4)},
        {"backend": "opencv"},
    ],
)
def test_wrong_arguments_are_value_errors_not_media_errors(arguments, mp4):
    with pytest.raises(ValueError, match=next(iter(arguments))) as caught:
        load_video(mp4, **arguments)
    assert caught.type is ValueError


def test_an_empty_clip_says_how_long_the_video_is(mp4):
    with pytest.raises(MediaError, match=r"plain\.mp4: no frame from 9.* 4\.000 s"):
        load_video(mp4, start_s=9)


# Damage and malice


def test_truncated_mp4_is_an_error_or_reported_damage(mp4, tmp_path):
    data = mp4.read_bytes()
    path = tmp_path / "cut.mp4"
    for kept in (1, 7, 30, len(data) // 4, len(data) // 2, len(data) * 3 // 4):  # moov stands at the end
        path.write_bytes(data[:kept])
        with pytest.raises(MediaError, match=r"cut\.mp4"):
            load_video(path)
    data = encode(tmp_path / "fast.mp4", 40, container_options={"movflags": "faststart"}).read_bytes()
    body = data.index(b"mdat")
    for part in (0.6, 0.75, 0.9):
        path.write_bytes(data[: body + int((len(data) - body) * part)])
        present = probe_video(path).frames
        assert 0 < present < 40
        decoded = 0
        for number in range(40):
            try:
                video = load_video(path, start_s=(number - 0.5) / FPS if number else 0, end_s=(number + 0.5) / FPS)
            except MediaError:
                continue
            assert numbers_of(video) == [number]
            assert video.damaged >= 40 - present
            decoded += 1
        assert present - 2 <= decoded <= present


def test_frames_that_cannot_be_decoded_are_never_replaced(tmp_path):
    """The packets from 30 to 36 hold noise: those frames are refused, and the others are themselves."""
    noise = random.Random(0)

    def spoil(order: int, packet: av.Packet) -> av.Packet:
        if not 30 <= order < 36:
            return packet
        spoiled = av.Packet(packet.size.to_bytes(4, "big") + noise.randbytes(packet.size))
        spoiled.pts, spoiled.dts, spoiled.time_base = packet.pts, packet.dts, packet.time_base
        return spoiled

    source = encode(tmp_path / "source.mp4", 60, gop=10, options={"bf": "0"})
    path = copy_packets(source, tmp_path / "spoilt.mp4", 0, 0, edit=spoil)
    with pytest.raises(MediaError, match=r"spoilt\.mp4: [6-9] of the 60 sampled frames could not be decoded"):
        load_video(path)
    with pytest.raises(MediaError, match="1 of the 1 sampled"):
        load_video(path, start_s=3.2, num_frames=1)
    assert numbers_of(load_video(path, end_s=3.0)) == list(range(30))
    rest = load_video(path, start_s=4.0)
    assert numbers_of(rest) == list(range(40, 60))
    assert numbers_of(load_video(path, num_frames=2)) == [0, 59]


def test_a_loss_never_shifts_the_frames_of_a_container_without_pts(tmp_path):
    def spoil(order: int, packet: av.Packet) -> av.Packet:
        if order != 15:
            return packet
        spoiled = av.Packet(b"\xff" * 9)
        spoiled.pts, spoiled.dts, spoiled.time_base = packet.pts, packet.dts, packet.time_base
        return spoiled

    source = encode(tmp_path / "source.avi", 40, "mpeg4", 10)
    assert numbers_of(load_video(copy_packets(source, tmp_path / "whole.avi", 0, 0))) == list(range(40))
    spoilt = copy_packets(source, tmp_path / "spoilt.avi", 0, 0, edit=spoil)
    with pytest.raises(MediaError, match=r"spoilt\.avi: 39 of 40 frames decode"):
        load_video(spoilt, start_s=2, num_frames=3)


def test_concealed_frames_are_refused(tmp_path):
    """The decoder fills the lower half of frame 30 in; that isn't the frame."""

    def spoil(order: int, packet: av.Packet) -> av.Packet:
        if order != 30:
            return packet
        data = bytes(packet)
        spoiled = av.Packet(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
        spoiled.pts, spoiled.dts, spoiled.time_base = packet.pts, packet.dts, packet.time_base
        spoiled.is_keyframe = packet.is_keyframe
        return spoiled

    source = encode(tmp_path / "source.mp4", 60, gop=10, size=(256, 256), options={"bf": "0"})
    path = copy_packets(source, tmp_path / "concealed.mp4", 0, 0, edit=spoil)
    with av.open(str(path)) as container:
        assert [i for i, frame in enumerate(container.decode(video=0)) if frame.is_corrupt] == [30]
    with pytest.raises(MediaError, match="1 of the 60 sampled"):
        load_video(path)
    after = load_video(path, start_s=3.1, end_s=3.5)
    assert (len(after.frames), after.damaged) == (4, 1)


def test_frames_before_the_first_keyframe_are_not_presentable(tmp_path):
    """Cut at the keyframe of an open group of pictures: frames shown before it follow it, without their references."""
    source = encode(tmp_path / "source.ts", 60, "mpeg2video", 15, options={"bf": "2"})
    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    start = [order for order, packet in enumerate(packets) if packet.is_keyframe][2]
    keyframe = sum(packet.pts < packets[start].pts for packet in packets)
    assert packets[start + 1].pts < packets[start].pts
    cut = load_video(copy_packets(source, tmp_path / "cut.mkv", start, 0))
    assert numbers_of(cut) == list(range(keyframe, 60))
    assert cut.damaged == 0


def test_files_without_video_are_refused(tmp_path):
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    frameless = tmp_path / "frameless.mkv"
    with av.open(str(frameless), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.start_encoding()
    raw = encode(tmp_path / "raw.h264", 5)
    text = tmp_path / "text.mp4"
    text.write_text("hello " * 1000)
    for path in (sound, frameless, raw, text):
        for load in (load_video, probe_video):
            with pytest.raises(MediaError, match=path.name):
                load(path)


@pytest.mark.parametrize("suffix", ["m3u8", "txt", "mp4", "ts"])
def test_playlists_never_open_the_file_they_name(suffix, mp4, tmp_path):
    encode(tmp_path / "private.ts", 5)
    playlists = (
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nprivate.ts\n#EXT-X-ENDLIST\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/private.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile private.ts\n",
    )
    for text in playlists:
        path = tmp_path / f"list.{suffix}"
        path.write_text(text)
        for source in (path, text.encode()):
            with pytest.raises(MediaError):
                load_video(source)
    for source in (f"concat:{mp4}|{mp4}", f"subfile,,start,0,end,0,,:{mp4}", "http://localhost/a.mp4"):
        with pytest.raises(MediaError):
            load_video(source)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", ["mp4", "webm", "ts", "png", "jpeg"])
def test_flipped_bytes_give_a_result_or_a_media_error(suffix, tmp_path):
    path = tmp_path / f"flipped.{suffix}"
    if suffix in ("png", "jpeg"):
        image = Image.fromarray(numbered(1234))
        data, load = encoded(image, suffix, **({"exif": image.getexif()} if suffix == "png" else {})), load_image
    else:
        codec = "libvpx-vp9" if suffix == "webm" else "libx264"
        data, load = encode(tmp_path / f"whole.{suffix}", 20, codec).read_bytes(), load_video
    outcomes = set()
    for seed in range(15):
        chance = random.Random(seed)
        flipped = bytearray(data)
        for _ in range(chance.choice((1, 3, 20))):
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            load(path)
            outcomes.add("result")
        except MediaError as error:
            assert path.name in str(error)
            outcomes.add("error")
    assert outcomes


# Backends and imports


def test_decord_gives_the_frames_of_pyav(mp4, recwarn):
    pytest.importorskip("decord")
    for source in (mp4, mp4.read_bytes()):
        for arguments in ({}, {"num_frames": 7}, {"fps": 3, "start_s": 1.0, "size": (32, 48)}):
            ours, theirs = (load_video(source, backend=backend, **arguments) for backend in ("pyav", "decord"))
            np.testing.assert_array_equal(ours.frames, theirs.frames)
            np.testing.assert_array_equal(ours.timestamps_s, theirs.timestamps_s)
    assert not [w for w in recwarn if "decord" in str(w.message)]


@pytest.mark.parametrize("name", ["a.ts", "a.avi", "a.mpg"])
def test_decord_hands_over_what_it_gets_wrong(name, tmp_path):
    pytest.importorskip("decord")
    path = encode(tmp_path / name, 30, {"a.ts": "libx264", "a.avi": "mpeg4", "a.mpg": "mpeg2video"}[name])
    with pytest.warns(UserWarning, match=rf"{name}: decord .*PyAV"):
        assert numbers_of(load_video(path, num_frames=4, backend="decord")) == [0, 10, 19, 29]


def test_decord_hands_over_edit_lists(tmp_path):
    pytest.importorskip("decord")
    cut = copy_packets(encode(tmp_path / "source.mp4", 60, gop=20), tmp_path / "cut.mp4", 20, 25)
    with pytest.warns(UserWarning, match=r"cut\.mp4: decord"):
        assert numbers_of(load_video(cut, backend="decord")) == list(range(25, 60))


def test_the_module_stands_alone_and_needs_no_decoder_to_be_imported(mp4, tmp_path):
    code = f"""
import sys, runpy
sys.modules["av"] = sys.modules["decord"] = None
media = runpy.run_path({media.__file__!r})
import numpy as np
assert media["load_image"](np.zeros((4, 4, 3), np.uint8)).size == (4, 4)
try:
    media["load_video"]({str(mp4)!r})
except ImportError as error:
    assert "pip install av" in str(error)
else:
    raise SystemExit("no error")
assert not [name for name in sys.modules if name.startswith("foveate")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_files_are_closed(mp4):
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc")
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        load_video(mp4, num_frames=2)
        with pytest.raises(MediaError):
            load_video(mp4, limits=MediaLimits(max_frames=1))
        with pytest.raises(MediaError):
            load_image(mp4)
    assert len(list(descriptors.iterdir())) == before
