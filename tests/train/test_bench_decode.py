"""`foveate bench decode` and `bench kernels` run and say what they must; what they measure decides no test."""

import json
import sys
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from foveate import cli
from foveate.train import bench_caches
from foveate.train.bench_caches import PreallocatedLayer, baseline, held_bytes, quantized_backend
from foveate.train.bench_decode import DecodeBench, bench_decode
from foveate.train.bench_kernels import KernelBench, bench_kernels

KV = ("int4:group=32,residual=32", "snapkv:keep=0.25+dense", "quest+paged")
RATIOS = [f"{clock}over_{other}" for clock in ("", "cpu_") for other in ("dynamic", "preallocated")]


@pytest.fixture(scope="module")
def decoded() -> dict[str, dict[str, Any]]:
    bench = DecodeBench("tiny", context=128, batch=2, kv=KV, rounds=1, steps=1, device="cpu")
    return {entry["name"]: entry for entry in bench_decode(bench)}


def test_every_cache_has_times_and_memory(decoded: dict[str, dict[str, Any]]) -> None:
    for way in ("dynamic", "preallocated", *KV):
        for part in ("decode", "cpu_decode", "kv", "step_memory", "largest"):
            assert decoded[f"{way}_{part}"]["value"] > 0
    assert all(f"{way}_{ratio}" in decoded for way in KV for ratio in RATIOS)
    assert not any(name.startswith("dynamic_over") for name in decoded)


def test_kv_bytes_are_those_of_the_formats(decoded: dict[str, dict[str, Any]]) -> None:
    """4 layers with 2 KV heads of 16 in float32, 2 sequences of 128 tokens and 3 steps."""
    heads = 4 * 2 * 2
    assert decoded["dynamic_kv"]["value"] == heads * (128 + 2) * 2 * 16 * 4
    packed = 96 * (2 * 8 + 4) + 3 * 16 * 4  # codes, values' scales and zeros; keys', in blocks of 32
    full = (32 + 32) * 2 * 16 * 4  # residual and a group
    assert heads * (packed + 32 * 2 * 16 * 4) < decoded[f"{KV[0]}_kv"]["value"] < heads * 1.1 * (packed + full)
    assert decoded[f"{KV[1]}_kv"]["value"] < 0.6 * decoded["dynamic_kv"]["value"]


def test_what_a_step_frees_is_not_counted_as_held(decoded: dict[str, dict[str, Any]]) -> None:
    """DynamicCache holds a layer's keys, or its values, twice for a moment, and not those of every layer."""
    growth = decoded["dynamic_step_memory"]["value"] - decoded["preallocated_step_memory"]["value"]
    assert 0 < growth < decoded["dynamic_kv"]["value"] / 4


def test_attention_alone_is_measured_for_every_format() -> None:
    bench = KernelBench("tiny", context=160, bits=(8, 4), group=32, residual=32, rounds=1, device="cpu")
    results = {entry["name"]: entry for entry in bench_kernels(bench)}
    for way in ("dynamic", "preallocated", "int8", "int4", "quest", "quest_int8", "quest_int4"):
        for part in ("attention", "cpu_attention", "bytes", "bandwidth"):
            assert results[f"{way}_{part}"]["value"] > 0
    heads = 2  # of 16 in float32
    assert results["dynamic_bytes"]["value"] == heads * 160 * 2 * 16 * 4
    tail = heads * 32 * 2 * 16 * 4
    assert results["int4_bytes"]["value"] == tail + heads * (128 * (2 * 8 + 4) + 4 * 16 * 4)
    one_page = (128 * (2 * 8 + 4) + 4 * 16 * 4) // 4
    assert results["quest_int4_bytes"]["value"] == tail + heads * (one_page + 4 * 16 * 4)
    assert results["quest_bytes"]["value"] == heads * (16 * 2 + 2 * 10) * 16 * 4  # one page, and the bounds of ten
    assert all(f"int4_{ratio}" in results for ratio in RATIOS)


def test_a_preallocated_layer_gives_what_a_dynamic_one_does() -> None:
    config = Qwen2Config(num_hidden_layers=1)
    caches = [baseline(name, config, room=3) for name in ("dynamic", "preallocated")]
    for tokens in (5, 1, 2):
        states = torch.randn(2, 2, 3, tokens, 4)
        (keys, values), (ours, our_values) = (cache.update(*states, 0) for cache in caches)
        assert torch.equal(keys, ours) and torch.equal(values, our_values)
    assert isinstance(caches[1].layers[0], PreallocatedLayer)
    assert [cache.get_seq_length() for cache in caches] == [8, 8]
    assert [held_bytes(cache) for cache in caches] == [2 * 2 * 3 * 8 * 4 * 4] * 2


@pytest.mark.skipif(quantized_backend() is None, reason="neither optimum-quanto nor hqq is installed")
def test_bytes_of_the_quantised_cache_are_a_fraction() -> None:
    cache = baseline("quantized", Qwen2Config(num_hidden_layers=1), room=1)
    for tokens in (512, 1):
        keys, _ = cache.update(*torch.randn(2, 1, 2, tokens, 64), 0)
    assert keys.shape[2] == 513 and 0.1 < held_bytes(cache) / (2 * keys.nbytes) < 0.25


def test_without_a_backend_the_quantised_cache_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_caches, "quantized_backend", lambda: None)
    with pytest.raises(ValueError, match="accepted: optimum-quanto or hqq installed"):
        baseline("quantized", Qwen2Config(num_hidden_layers=1), room=1)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("decode", ["--context", "40", "--steps", "1", "--kv", "int8:group=8,residual=8"]),
        ("kernels", ["--context", "64", "--bits", "8", "--group", "16", "--residual", "16", "--pages", "0.5"]),
    ],
)
def test_the_commands_print_results_files(
    command: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["foveate", "bench", command, "--shape", "tiny", "--rounds", "1", "--device", "cpu", *options, "--json"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    said = json.loads(capfd.readouterr().out)
    assert said["command"] == " ".join(argv)
    names = {entry["name"] for entry in said["results"]}
    assert all(entry["baseline"] in names for entry in said["results"] if "baseline" in entry)
    assert ("dynamic_decode" if command == "decode" else "copy_bandwidth") in names


@pytest.mark.parametrize(
    ("bench", "fields", "says"),
    [
        (DecodeBench, {"shape": "9b"}, "shape is '9b'; accepted: tiny"),
        (DecodeBench, {"steps": 0}, "steps is 0; accepted: 1 or more"),
        (DecodeBench, {"kv": ("int5",)}, "int5"),
        (KernelBench, {"shape": "9b"}, "shape is '9b'; accepted: tiny"),
        (KernelBench, {"rounds": 0}, "rounds is 0; accepted: 1 or more"),
        (KernelBench, {"context": 100}, "context is 100; accepted: residual and group together, or more"),
        (KernelBench, {"bits": (4, 3)}, r"bits are \[3\]; accepted: 8, 4, 2"),
        (KernelBench, {"pages": 0.0}, "pages is 0.0; accepted: a fraction above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(bench: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        bench(**fields)
