"""The media benchmarks and the fuzzer run and print what they must; what they measure decides no test."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate import cli
from foveate.train import bench_encode, bench_media
from foveate.train.bench_media import bench_memory, make_clip, repeat_clip
from foveate.vlm.media import load_video, probe_video

FUZZ = Path(__file__).resolve().parents[2] / "scripts" / "fuzz_media.py"


@pytest.fixture
def results_of(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, dict[str, Any]]]:
    """Runs `foveate bench … --json`; its results by name."""

    def run(*arguments: object) -> dict[str, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["foveate", "bench", *map(str, arguments), "--json"])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert ended.value.code == 0, err
        results = {entry["name"]: entry for entry in json.loads(out)["results"]}
        for entry in results.values():
            assert math.isfinite(entry["value"]) and entry["value"] > 0
            assert ("baseline" in entry) == ("ratio" in entry)
            if "baseline" in entry:
                assert entry["ratio"] == pytest.approx(entry["value"] / results[entry["baseline"]]["value"])
        return results

    return run


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    make_clip(path, 40, gop=12, height=72, width=128)
    return path


def test_bench_media_compares_with_bare_decoders(results_of: Callable[..., Any], clip: Path) -> None:
    results = results_of("media", "--video", clip, "--frames", 5, "--rounds", 2)
    assert {"media_frames_per_s", "decord_frames_per_s", "media_over_decord"} <= set(results)
    best = results["media_frames_per_s"]["baseline"].removesuffix("_frames_per_s")
    assert best.startswith("pyav") and f"media_over_{best}" in results
    pyav = [entry["value"] for name, entry in results.items() if name.startswith("pyav")]
    assert results[f"{best}_frames_per_s"]["value"] == max(pyav)


def test_bare_decoders_take_the_frames_of_the_media_path(clip: Path) -> None:
    expected = load_video(clip, num_frames=7).frames
    numbers, pts = bench_media._uniform_pts(clip, 7)
    for frames in (
        bench_media.pyav_in_order(clip, pts, "SLICE"),
        bench_media.pyav_in_order(clip, pts, "AUTO"),
        bench_media.pyav_seeking(clip, pts),
        bench_media.decord_batch(clip, numbers),
    ):
        np.testing.assert_array_equal(np.stack(list(frames)), expected)
    bench_media._check_same(clip, 7, list(expected))
    with pytest.raises(ValueError, match="take other frames"):
        bench_media._check_same(clip, 7, list(expected[::-1]))


def test_a_repeated_clip_holds_its_frames_again(clip: Path, tmp_path: Path) -> None:
    repeat_clip(clip, tmp_path / "three.mp4", 3)
    assert probe_video(tmp_path / "three.mp4").frames == 120
    once, thrice = load_video(clip), load_video(tmp_path / "three.mp4")
    np.testing.assert_array_equal(thrice.frames, np.concatenate([once.frames] * 3))
    assert np.ptp(np.diff(thrice.timestamps_s)) < 1e-3


def test_peak_memory_counts_what_is_held(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    repeat_clip(clip, path, 5)
    results = {entry["name"]: entry["value"] for entry in bench_memory(path, counts=(150,))}
    frames = 150 * 448 * 448 * 3
    assert results["load_150_frames_peak"] - results["load_150_frames_beyond_result"] == frames
    assert results["load_150_frames_peak"] > frames
    assert 0 < results["encode_150_frames_beyond_result"] < results["encode_150_frames_peak"]


def test_bench_encode_counts_tokens(results_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_encode, "TINY_TILE", 84)
    results = results_of("encode", "--images", 2, "--rounds", 1, "--seconds", 0.001, "--device", "cpu")
    # 6×6 patches: 9 tokens with 2×2 and 4 with 3×3; 960×1280 becomes 3×4 tiles, and with a thumbnail 13
    tokens = {"resize": 1, "video": 1, "s2": 1, "dynamic-s2": 12, "tiles": 13}
    for way, tiles in tokens.items():
        for projector, of_tile in (("downsample-2x2", 9), ("downsample-3x3", 4)):
            unit = "frames" if way == "video" else "images"
            rate = results[f"{way}_{projector}_{unit}_per_s"]["value"]
            assert results[f"{way}_{projector}_tokens_per_s"]["value"] == pytest.approx(rate * tiles * of_tile)


def fuzz(folder: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, FUZZ, "--json", "--keep", folder / "kept", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode in (0, 1), ran.stderr
    return ran.returncode, json.loads(ran.stdout)


@pytest.mark.timeout(120)
def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    code, said = fuzz(tmp_path, "--tries", 200)
    counts = {entry["name"].removeprefix("tries_"): entry["value"] for entry in said["results"]}
    assert said["findings"] == [] and code == 0
    assert counts["read"] > 20 and counts["refused"] > 20 and counts["read"] + counts["refused"] == 200


@pytest.mark.timeout(120)
def test_the_fuzzer_notices_crashes_hangs_and_wrong_exceptions(tmp_path: Path) -> None:
    """By the number of the call; each finding's file is kept, and the tries after it go on."""
    faulty = tmp_path / "faulty.py"
    faulty.write_text(
        "import os, signal, time\n"
        "from pathlib import Path\n"
        f"calls = Path({str(tmp_path / 'calls')!r})\n"
        "def check(data):\n"
        "    number = len(calls.read_text()) if calls.exists() else 0\n"
        "    calls.write_text('x' * (number + 1))\n"
        "    if number == 1: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if number == 3: time.sleep(1000)\n"
        "    if number == 5: raise ZeroDivisionError('by zero')\n"
        "    if number == 6: bytearray(64 * 2**30)\n"
        "    if number == 8:\n"
        "        while True: pass\n"
        "    return number % 2\n"
    )
    code, said = fuzz(tmp_path, "--tries", 10, "--check", faulty, "--timeout", 1, "--seed", 3)
    assert code == 1
    found = {finding["number"]: (finding["outcome"], finding["error"]) for finding in said["findings"]}
    assert found.keys() == {1, 3, 5, 6, 8}
    assert found[1] == ("crash", "ended by signal 11")
    assert found[3][0] == "hang" and found[8][0] in ("hang", "crash")
    assert found[5] == ("wrong", "ZeroDivisionError: by zero")
    assert found[6][0] == "wrong" and found[6][1].startswith("MemoryError")
    assert all(Path(finding["file"]).stat().st_size > 0 for finding in said["findings"])
