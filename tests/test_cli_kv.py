"""The options of the command that make a KV cache and weights smaller: --kv, --weights, --quant."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from foveate import cli
from foveate.train.build import build_model
from foveate.train.recipe import Recipe

INT4 = "int4:group=8,residual=0"  # prompts here are short


@pytest.fixture
def foveate(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], same_threads: None
) -> Callable[..., SimpleNamespace]:
    """Runs the command in this process: exit code and what was printed."""

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["foveate", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return SimpleNamespace(code=ended.value.code, out=out, err=err)

    return run


@pytest.fixture
def model(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    """A tiny model with random weights, saved."""
    model, processor = build_model(tiny_recipe().model)
    silent = [*processor.tokenizer.all_special_ids, processor.image_token_id, processor.video_token_id]
    model.generation_config.suppress_tokens = silent  # a random model says little else
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def png(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ask", "m", "what ?", "--kv", "int5"], "--kv: kv is 'int5'; accepted: dense, paged, int8, int4, int2, "),
        (["ask", "m", "what ?", "--kv", "snapkv:keep=2"], "--kv: snapkv: keep is 2.0; accepted: a fraction above 0"),
        (["eval", "m", "--kv", "int4+int8"], "--kv: kv is 'int4+int8', with two of "),
        (["ask", "m", "what ?", "--weights", "w4"], "--weights: scheme is 'w4'; accepted: w4a16, w8a8, w4a8"),
        (["ask", "m", "what ?", "--tower-weights", "w4a16"], "--tower-weights: scheme is 'w4a16'; accepted: w8a8"),
        (["eval", "m", "--weights", "w4a16:group=7"], "--weights: w4a16: group is 7; accepted: 32, 64, 128, 256"),
        (["export", "m", "out", "--quant", "int4"], "--quant: scheme is 'int4'; accepted: w4a16, w8a8, w4a8"),
        (["export", "m", "out", "--tower-quant", "w4a8"], "--tower-quant: scheme is 'w4a8'; accepted: w8a8"),
        (["export", "m", "out", "--quant", "w8a8", "--format", "vila"], "--format vila takes no quantised weights"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    foveate: Callable[..., SimpleNamespace], arguments: list[str], said: str
) -> None:
    ran = foveate(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err and ran.err.count("\n") == 1


def test_ask_tells_what_the_kv_cache_holds(foveate: Callable[..., SimpleNamespace], model: Path, png: Path) -> None:
    asked = ("ask", model, png, "what is at b3 ?", "--max-new-tokens", 6)
    plain, small = foveate(*asked, "--json"), foveate(*asked, "--kv", f"snapkv:keep=0.5,window=4+{INT4}", "--json")
    assert small.code == 0, small.err
    told, full = json.loads(small.out), json.loads(plain.out)
    assert "kv" not in full and "prune" not in told
    kept, length = told["kv"], told["tokens"]["prompt"] + told["tokens"]["new"] - 1
    assert kept["kv"].startswith("snapkv:") and "+int4:" in kept["kv"]
    assert kept["length"] == length
    # half of the prompt, and the answer, in a layer of two heads of 16 numbers: keys and values in fp32
    assert kept["tokens"] == [round(told["tokens"]["prompt"] / 2) + told["tokens"]["new"] - 1] * 2
    assert all(0 < packed < tokens for packed, tokens in zip(kept["packed"], kept["tokens"], strict=True))
    assert kept["full_bytes"] == 2 * 2 * 16 * 4 * length
    assert kept["bytes"] < kept["full_bytes"] / 2 and kept["bits"] == pytest.approx(
        32 * kept["bytes"] / kept["full_bytes"]
    )
    printed = foveate(*asked, "--kv", INT4, "--prune", "fastv:layer=1,keep=0.5")
    assert printed.code == 0, printed.err
    lines = printed.err.splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["KV cache", "tokens held by a layer (mean)"]
    assert f" of {length}, " in lines[-1] and any("visual tokens" in line for line in lines)


def test_eval_takes_a_small_kv_cache_and_quantised_weights(
    foveate: Callable[..., SimpleNamespace],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from foveate.eval import glyphs, report

    monkeypatch.setattr(report, "TASKS", ["what_at"])
    monkeypatch.setattr(glyphs, "TASKS", {"what_at": glyphs.TASKS["what_at"]})
    ran = foveate("eval", model, "--n", 2, "--kv", INT4, "--weights", "w8a8", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "visual tokens" not in ran.out
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["kv"].startswith("int4:") and f"--kv {written['kv']}" in written["command"]
    assert list(written["tasks"]) == ["what_at"] and written["tasks"]["what_at"]["n"] == 2


def test_quantised_exports_answer_as_weights_quantised_on_loading(
    foveate: Callable[..., SimpleNamespace], model: Path, png: Path, tmp_path: Path
) -> None:
    question = (png, "what is at b3 ?", "--max-new-tokens", 5)
    schemes = ("w4a16:group=32", "w8a8")
    written = foveate("export", model, tmp_path / "out", "--quant", schemes[0], "--tower-quant", schemes[1])
    assert written.code == 0, written.err
    assert "code export in" in written.out and "weights 0." in written.out
    exported = foveate("ask", tmp_path / "out", *question, "--kv", "int8:group=8,residual=8")
    loaded = foveate("ask", model, *question, "--weights", schemes[0], "--tower-weights", schemes[1])
    assert exported.code == loaded.code == 0, exported.err + loaded.err
    again = foveate("ask", tmp_path / "out", *question)
    assert again.out == loaded.out and again.out.strip()
    twice = foveate("ask", tmp_path / "out", *question, "--weights", "w8a8")
    assert twice.code == 2 and "quantised already" in twice.err
