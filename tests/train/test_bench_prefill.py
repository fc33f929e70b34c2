"""`foveate bench prefill` runs and says what it must; what it measures decides no test."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from foveate import cli
from foveate.train.bench_prefill import SHAPES, PrefillBench, _build, bench_prefill, make_model
from foveate.train.flops import ModelFlops
from foveate.vlm.pruning.costs import Decoder

METHODS = ("fastv:layer=1,keep=0.25", "sparsevlm:tokens=20/10,layers=1/2,per=40")


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    bench = PrefillBench("tiny", (40, 80), text=40, methods=METHODS, rounds=1, steps=2, device="cpu")
    return {entry["name"]: entry for entry in bench_prefill(bench)}


def test_every_way_has_times_memory_and_decode(results: dict[str, dict[str, Any]]) -> None:
    for visual in (40, 80):
        for name in ("unpruned", *METHODS):
            for part in ("ttft", "cpu_ttft", "visual_tokens", "kv", "kv_predicted", "peak", "decode", "cpu_decode"):
                assert results[f"{visual}_{name}_{part}"]["value"] > 0
        for name in METHODS:
            for part in ("speed_up", "cpu_speed_up"):
                entry, said = results[f"{visual}_{name}_{part}"], results[f"{visual}_{name}_flop_speed_up"]["value"]
                assert entry["ratio"] == pytest.approx(entry["value"] / said)
            assert results[f"{visual}_{name}_decode"]["baseline"] == f"{visual}_{name}_plain_decode"


def test_kv_bytes_are_those_of_what_layers_processed(results: dict[str, dict[str, Any]]) -> None:
    """4 layers with 2 kv heads of 16 in float32: 256 bytes a token and layer."""
    assert results["80_unpruned_kv"]["value"] == 4 * (40 + 80) * 256
    assert results["80_fastv:layer=1,keep=0.25_kv"]["value"] == (40 + 80 + 3 * (40 + 20)) * 256
    assert results["80_fastv:layer=1,keep=0.25_visual_tokens"]["value"] == (80 + 3 * 20) / 4
    assert all(entry["ratio"] == 1 for name, entry in results.items() if name.endswith("_kv"))


def test_methods_before_the_llm_are_measured_from_pixels_on() -> None:
    methods = ("fastervlm:keep=0.5", "fastv:layer=1,keep=0.5")
    bench = PrefillBench("tiny", (40,), methods=methods, tower=True, rounds=1, steps=1, device="cpu")
    results = {entry["name"]: entry for entry in bench_prefill(bench)}
    assert results["fastervlm:keep=0.5_visual_tokens"]["value"] == 20
    assert results["fastervlm:keep=0.5_kv"]["ratio"] == 1
    flops = ModelFlops.from_model(make_model("tiny", torch.device("cpu"), torch.float32, tower=True))
    every = {part: 2 * getattr(flops, part) for part in ("tower_linear", "tower_pair")}  # its last layer runs, unread
    flops = replace(flops, **every)
    whole, kept = (flops.step([count + 60], {(56, 56): 10}, trains=(), predicted=1).forward for count in (40, 20))
    assert results["fastervlm:keep=0.5_flop_speed_up"]["value"] == pytest.approx(whole / kept, rel=1e-3)


def test_the_command_prints_a_results_file(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "tiny", "--visual", "30", "--rounds", "1", "--steps", "0", "--device", "cpu"]
    options += ["--prune", "fastv", "--json"]
    monkeypatch.setattr(sys, "argv", ["foveate", "bench", "prefill", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = json.loads(capfd.readouterr().out)
    assert ended.value.code == 0
    assert said["command"] == " ".join(["foveate", "bench", "prefill", *options])
    names = {entry["name"] for entry in said["results"]}
    assert {"unpruned_ttft", "fastv_ttft", "fastv_speed_up", "fastv_flop_speed_up", "fastv_kv", "fastv_peak"} <= names
    assert all(entry["baseline"] in names for entry in said["results"] if "baseline" in entry)


@pytest.mark.parametrize("visual", ["abc", "576,", "0", "5.5"])
def test_the_command_names_the_option_that_is_wrong(
    visual: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["foveate", "bench", "prefill", "--shape", "tiny", "--visual", visual])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code not in (0, None)
    assert f"--visual is '{visual}'; accepted: numbers of at least 1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("llava-1.5-7b", 6.74e9), ("nvila-8b", 7.62e9), ("qwen2.5-vl-7b", 7.62e9), ("0.5b", 0.49e9)],
)
def test_shapes_are_those_of_the_models(shape: str, parameters: float) -> None:
    """Parameters of Vicuna-7B, Qwen2-7B and Qwen2-0.5B."""
    with torch.device("meta"):
        model = _build(shape, {}, tower=False)
    llm = [model.get_decoder(), model.get_output_embeddings()]
    held = {id(parameter): parameter.numel() for part in llm for parameter in part.parameters()}
    assert sum(held.values()) == pytest.approx(parameters, rel=0.01)
    assert Decoder.from_config(model.config).layers == len(model.get_decoder().layers)
    assert shape in SHAPES


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"shape": "9b"}, "shape is '9b'; accepted: tiny"),
        ({"visual": ()}, "visual is"),
        ({"text": 20}, "text is 20; accepted: more than 35"),
        ({"rounds": 0}, "rounds is 0; accepted: 1 or more"),
        ({"steps": -1}, "steps is -1; accepted: 0 or more"),
        ({"methods": ("evs",)}, "method 'evs' acts before the LLM"),
        ({"tower": True, "shape": "qwen2.5-vl-7b"}, "tower with shape 'qwen2.5-vl-7b'; accepted: tiny"),
        ({"tower": True, "visual": (2881,)}, "accepted with tower: multiples of 144"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PrefillBench(**fields)
