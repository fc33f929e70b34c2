import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import cli
from foveate.data.glyphs import digit_clip, encode_mp4
from foveate.train.build import build_model
from foveate.train.checkpoint import newest_checkpoint, read_state
from foveate.train.recipe import Recipe

COMMANDS = {
    "quickstart": ["--out"],
    "train": ["RECIPE", "KEY=VALUE", "--out", "--resume", "--auto-resume", "--dry-run", "--processes"],
    "convert": ["CHECKPOINT", "OUT"],
    "report": ["RUN", "--out", "--docs", "--check"],
    "data": ["make", "index", "verify", "inspect", "stats", "prune"],
    "plan": ["RECIPE", "KEY=VALUE", "--gpus", "--gpu", "--mfu", "--json"],
    "bench": ["data", "train", "media", "encode"],
    "ask": [
        "MODEL",
        "MEDIA",
        "QUESTION",
        "--frames",
        "--fps",
        "--from",
        "--to",
        "--max-visual-tokens",
        "--max-new-tokens",
        "--prune",
        "--kv",
        "--weights",
        "--tower-weights",
        "--show",
        "--json",
    ],
    "import": ["SOURCE", "OUT", "--dtype"],
    "export": ["MODEL", "OUT", "--format", "code", "stock", "vila", "--quant", "--tower-quant"],
    "eval": [
        "MODEL",
        "--task",
        "lmms:NAME",
        "--out",
        "--n",
        "--split",
        "--frames",
        "--depths",
        "--needles",
        "--shots",
        "--ways",
        "--batch",
        "--prune",
        "--kv",
        "--weights",
        "--tower-weights",
    ],
    "frontier": ["MODEL...", "--task", "rows", "clips", "--out", "--n", "--prune", "--keep", "--kv", "--frames"],
}
FOVEATE = str(Path(sys.executable).with_name("foveate"))


class Ran:
    """An exit code and what was printed."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    def assert_user_error(self, *said: str) -> None:
        assert self.code == 2, self.err
        assert self.out == ""
        assert self.err.count("\n") == 1 and self.err.startswith("foveate"), self.err
        assert "Traceback" not in self.err
        for words in said:
            assert words in self.err


@pytest.fixture
def foveate(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], same_threads: None
) -> Callable[..., Ran]:
    """Runs the command in this process."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["foveate", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ran(ended.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def model(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    """A tiny model with random weights, saved."""
    torch.manual_seed(0)
    model, processor = build_model(tiny_recipe().model)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def png(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture
def mp4(tmp_path: Path) -> Path:
    clip = digit_clip(np.random.default_rng(0), "test", frames=12, digits=2)
    (tmp_path / "clip.mp4").write_bytes(encode_mp4(clip.frames))
    return tmp_path / "clip.mp4"


# Help and usage


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_every_command(foveate: Callable[..., Ran], arguments: list[str]) -> None:
    ran = foveate(*arguments)
    assert ran.code == 0
    assert all(command in ran.out for command in COMMANDS)
    assert "--debug" in ran.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_names_its_arguments(foveate: Callable[..., Ran], command: str) -> None:
    ran = foveate(command, "--help")
    assert ran.code == 0
    assert all(word.upper() in ran.out.upper() for word in COMMANDS[command])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "quickstart", "--fast"], "--fast"),
        (["train", "nope"], "nvila-8b, nvila-8b-video, nvila-lite-8b, quickstart"),
        (["train", "missing.yaml"], "missing.yaml: no such file"),
        (["train", "quickstart", "stages.align.steps=0"], "stages.1.steps is 0"),
        (["train", "quickstart", "sedd=1"], "sedd is 1"),
        (["ask"], "Missing argument 'MODEL'"),
        (["ask", "/no/model", "what ?"], "/no/model: no such folder"),
        (["ask", "m", "missing.png", "what ?"], "missing.png: no such file"),
        (["ask", "m", "missing.png"], "missing.png: no such file"),
        (["ask", "m", "--json"], "--json needs a question"),
        (["ask", "m", "what ?", "--frames", "0"], "--frames"),
        (["ask", "m", "what ?", "--prune", "fastw"], "--prune: method is 'fastw'; accepted: fastv, sparsevlm, "),
        (
            ["ask", "m", "what ?", "--prune", "evs", "--prune", "fastv:layr=1"],
            "fastv has no field 'layr'",
        ),
        (["ask", "m", "what ?", "--prune", "fastv:keep=all"], "fastv: keep is 'all'; accepted: a number"),
        (["ask", "m", ".", "what ?", "--show", "a.png"], "--show needs --prune"),
        (["ask", "m", "what ?", "--prune", "evs", "--show", "a.png"], "--show needs an image or a video"),
        (["ask", "m", ".", "--prune", "evs", "--show", "a.png"], "--show needs a question"),
        (
            ["ask", "m", ".", "?", "--prune", "evs", "--show", "no/a.png"],
            "--show no/a.png: accepted: a file",
        ),
        (["ask", "m", ".", "?", "--prune", "evs", "--show", "."], "--show .: accepted: a file in a folder"),
        (["export", "m"], "Missing argument 'OUT'"),
        (["export", "m", "out", "--format", "onnx"], "'code', 'stock'"),
        (["export", "./no/model", "out"], "no such folder"),
        (["eval", "m", "--n", "many"], "--n"),
        (["eval", "m", "--task", "poems"], "glyphs"),
        (["eval", "m", "--task", "lmms:"], "--task lmms:; accepted: glyphs, rows,"),
        (["eval", "m", "--task", "rows", "--task", "text"], "accepted: one, or several lmms:NAME"),
        (
            ["eval", "m", "--frames", "64"],
            "--frames with --task glyphs; accepted: --task needles or haystack or lmms:NAME",
        ),
        (["eval", "m", "--task", "needles", "--frames", "8", "--frames", "9"], "accepted: one, or --task haystack"),
        (["eval", "m", "--task", "lmms:mme", "--shots", "1"], "--shots with --task lmms:mme; accepted: --task shots"),
        (["eval", "m", "--task", "rows", "--batch", "1"], "--batch with --task rows; accepted: --task lmms:NAME"),
        (["eval", "m", "--task", "text", "--kv", "int4"], "--kv with --task text; accepted: --task glyphs"),
        (["frontier"], "Missing argument 'MODEL...'"),
        (["frontier", "m", "--frames", "64"], "--frames with --task rows; accepted: --task needles"),
        (["report"], "accepted: the folder of a run, or --docs"),
        (["report", "run", "--check"], "--check goes with --docs"),
        (["eval", "m", "--prune", "evs:keep"], "--prune: evs: 'keep' is not FIELD=VALUE; accepted fields: keep, "),
        (["eval", "/no/model"], "/no/model: no such folder"),
    ],
)
def test_users_errors_are_one_line_and_exit_code_2(
    foveate: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    foveate(*arguments).assert_user_error(said)


def test_folder_without_a_model_is_a_users_error(foveate: Callable[..., Ran], tmp_path: Path) -> None:
    foveate("ask", tmp_path, "what ?").assert_user_error(str(tmp_path))


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from foveate.train.recipe import RecipeError

    monkeypatch.setattr(sys, "argv", ["foveate", "train", "nope", "--debug"])
    with pytest.raises(RecipeError):
        cli.main()


def test_faults_of_ours_exit_with_1_and_name_their_type(
    foveate: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a fault\nof two lines")

    monkeypatch.setattr("foveate.train.recipe.load_recipe", fail)
    ran = foveate("train", "quickstart")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.count("\n") == 1 and "KeyError" in ran.err and "--debug" in ran.err


# ask


def test_ask_answers_about_a_picture(foveate: Callable[..., Ran], model: Path, png: Path) -> None:
    ran = foveate("ask", model, png, "what is at b3 ?", "--max-new-tokens", 3)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.endswith("\n") and ran.out.count("\n") == 1 and len(ran.out.split()) <= 3


def test_ask_prints_json(foveate: Callable[..., Ran], model: Path, png: Path, mp4: Path) -> None:
    ran = foveate("ask", model, png, mp4, "what is at b3 ?", "--max-new-tokens", 3, "--json", "--frames", 5)
    assert ran.code == 0
    said = json.loads(ran.out)
    assert set(said) == {"answer", "tokens", "seconds"}
    assert set(said["seconds"]) == {"load", "media", "prefill", "decode"}
    assert all(seconds >= 0 for seconds in said["seconds"].values()) and said["seconds"]["load"] > 0
    # user, 16 of the picture, 5 frames of 4 and a separator, 5 words, assistant
    assert said["tokens"]["visual"] == 16 + 5 * 4
    assert said["tokens"]["prompt"] == 1 + 16 + 5 * 5 + 5 + 1
    assert 1 <= said["tokens"]["new"] <= 3


def test_ask_tells_what_was_pruned_and_draws_it(
    foveate: Callable[..., Ran], model: Path, png: Path, mp4: Path, tmp_path: Path
) -> None:
    arguments = ["ask", model, png, mp4, "what is at b3 ?", "--max-new-tokens", 3, "--frames", 5]
    arguments += ["--prune", "dycoke:keep=0.5", "--prune", "fastv:layer=1,keep=0.25"]
    ran = foveate(*arguments, "--show", tmp_path / "kept.png")
    assert ran.code == 0, ran.err
    assert ran.out.count("\n") == 1 and len(ran.out.split()) <= 3
    kept = 16 + 4 + 2 + 2 + 2 + 4  # the picture, then frames of 4 tokens: whole, three compared, whole
    by_layer, against = ran.err.splitlines()
    assert by_layer == f"visual tokens: {kept} in layer 0, {round(kept / 4)} in layer 1"
    assert against.startswith(f"processed visual tokens (mean) {(kept + round(kept / 4)) / 2:.4g} of 36 ")
    assert "FLOPs" in against and "KV cache" in against
    with Image.open(tmp_path / "kept.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 100
    told = json.loads(foveate(*arguments, "--json").out)
    assert told["answer"] == ran.out.strip() and told["tokens"]["visual"] == 36
    pruned, full = told["prune"].pop("pruned"), told["prune"].pop("full")
    assert told["prune"] == {"methods": ["dycoke:keep=0.5,last_group=true,reindex=true", "fastv:layer=1,keep=0.25"]}
    assert (pruned["visual"], full["visual"]) == ([kept, round(kept / 4)], [36, 36])
    text = told["tokens"]["prompt"] - 36
    assert pruned["kv_bytes"] / full["kv_bytes"] == (2 * text + kept + round(kept / 4)) / (2 * text + 72)
    assert pruned["flops"] < full["flops"]


def test_text_alone_has_nothing_to_prune(foveate: Callable[..., Ran], model: Path) -> None:
    ran = foveate("ask", model, "what ?", "--max-new-tokens", 2, "--prune", "evs")
    assert (ran.code, ran.err) == (0, "visual tokens: none\n")
    assert foveate("ask", model, "what ?", "--max-new-tokens", 2).out == ran.out
    told = json.loads(foveate("ask", model, "what ?", "--max-new-tokens", 2, "--prune", "evs", "--json").out)
    assert told["prune"] == {"methods": ["evs:keep=0.5,reindex=false"]}


def test_a_method_that_the_model_has_no_layer_for_is_a_users_error(
    foveate: Callable[..., Ran], model: Path, png: Path
) -> None:
    foveate("ask", model, png, "what ?", "--prune", "fastv:layer=9").assert_user_error(
        "FastV drops tokens before layer 9"
    )


def test_a_prompt_tells_once_what_was_pruned(
    foveate: Callable[..., Ran], model: Path, png: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = iter(["what is at b3 ?", "and at b4 ?", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(questions))
    ran = foveate("ask", model, png, "--max-new-tokens", 2, "--prune", "random:layer=1,keep=0.5")
    assert ran.code == 0 and ran.out.count("\n") == 2
    assert ran.err.splitlines()[0] == "visual tokens: 16 in layer 0, 8 in layer 1" and ran.err.count("\n") == 2


def test_long_question_is_no_file(foveate: Callable[..., Ran], model: Path) -> None:
    assert foveate("ask", model, "what is at b3 ? " * 40, "--max-new-tokens", 1).code == 0


def test_file_that_is_no_media_is_a_users_error(foveate: Callable[..., Ran], model: Path, mp4: Path) -> None:
    mp4.write_bytes(mp4.read_bytes()[:500])
    foveate("ask", model, mp4, "what ?").assert_user_error("clip.mp4")


def test_without_a_question_a_prompt_takes_several(foveate: Callable[..., Ran], model: Path, mp4: Path) -> None:
    """Through the installed command: two answers, one refusal in between, the same as asked alone."""
    asked = "what colour is the 3 ?\n\n<image> ?\nwhat colour is the 4 ?\n"
    command = [FOVEATE, "ask", str(model), str(mp4), "--max-new-tokens", "3"]
    ran = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    first, _, second = (line.strip() for line in ran.stdout.splitlines())
    assert first and second
    assert ran.stderr.count("foveate: ") == 1 and "<image>" in ran.stderr
    alone = foveate("ask", model, mp4, "what colour is the 3 ?", "--max-new-tokens", 3)
    assert alone.code == 0 and alone.out.strip() == first


# train, export, eval


def test_dry_run_trains_nothing(foveate: Callable[..., Ran], tiny_recipe_path: Path, tmp_path: Path) -> None:
    ran = foveate("train", tiny_recipe_path, "--dry-run", "--out", tmp_path / "run")
    assert ran.code == 0 and all(stage in ran.out for stage in ("warmup", "align", "video", "last"))
    assert not (tmp_path / "run").exists()
    ran = foveate("train", tiny_recipe_path, "--dry-run", "--processes", 2)
    ran.assert_user_error("1 micro-batches a step can't be shared by 2 processes")


def test_a_run_is_reported_and_its_checkpoint_converted(
    foveate: Callable[..., Ran], tiny_recipe_path: Path, tmp_path: Path, png: Path
) -> None:
    assert foveate("train", tiny_recipe_path, "--out", tmp_path / "run").code == 0
    ran = foveate("report", tmp_path / "run")
    assert ran.code == 0 and (tmp_path / "run" / "report.html").stat().st_size > 10_000
    checkpoint = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert foveate("convert", checkpoint, tmp_path / "model").code == 0
    assert foveate("ask", tmp_path / "model", png, "what ?", "--max-new-tokens", 1).code == 0
    foveate("report", tmp_path).assert_user_error("metrics.jsonl")


def test_train_writes_a_model_that_ask_takes(
    foveate: Callable[..., Ran], tiny_recipe_path: Path, tmp_path: Path, png: Path
) -> None:
    ran = foveate("train", tiny_recipe_path, "stages.last.steps=1", "--out", tmp_path / "run")
    assert ran.code == 0
    assert "last 1/1" in ran.out
    assert foveate("ask", tmp_path / "run" / "model", png, "what ?", "--max-new-tokens", 1).code == 0
    foveate("train", tiny_recipe_path, "--out", tmp_path / "run").assert_user_error("--resume")
    foveate("train", tiny_recipe_path, "--out", tmp_path / "run", "--resume").assert_user_error("stages differ")
    foveate("train", tiny_recipe_path, "--out", tmp_path / "new", "--resume").assert_user_error("no whole checkpoint")


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 0, "--resume goes on with")]
)
def test_signals_stop_training_with_a_checkpoint(
    tiny_recipe_path: Path, tmp_path: Path, number: int, code: int, said: str
) -> None:
    """Through the installed command, as a terminal does it: the signal goes to its whole process group."""
    command = [
        FOVEATE, "train", str(tiny_recipe_path), "stages.align.steps=100000", "checkpoint.every_steps=100000",
        "tracking.wandb=offline", "loader.workers=1", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and '"align"' in metrics.read_text()):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == code, err
    assert said in out + err
    assert "Traceback" not in out + err
    state = read_state(newest_checkpoint(tmp_path / "run" / "checkpoints"))
    assert state["stage"] == 1 and state["step"] == 5 + state["stage_step"] > 5


def test_export_can_be_loaded_again(foveate: Callable[..., Ran], model: Path, png: Path, tmp_path: Path) -> None:
    ran = foveate("export", model, tmp_path / "exported")
    assert ran.code == 0 and f"code export in {tmp_path / 'exported'}" in ran.out
    asked = [foveate("ask", m, png, "what ?", "--max-new-tokens", 3) for m in (model, tmp_path / "exported")]
    assert asked[0].out == asked[1].out


def test_a_recipe_is_planned_without_weights(foveate: Callable[..., Ran]) -> None:
    ran = foveate("plan", "nvila-8b", "--gpus", "64")
    assert ran.code == 0, ran.err
    assert "nvila-8b: 8.09 B parameters (tower 413.33 M" in ran.out and "2,304" in ran.out
    made = json.loads(foveate("plan", "tiny-nvila-8b", "--json").out)
    assert [stage["name"] for stage in made["stages"]] == ["align", "vision", "pretrain", "sft"]
    foveate("plan", "nvila-8b", "--gpu", "H1000").assert_user_error("gpu is 'H1000'; accepted: ", "H100")


def test_a_model_of_ours_can_be_imported_and_another_is_refused(
    foveate: Callable[..., Ran], model: Path, tmp_path: Path
) -> None:
    ran = foveate("import", model, tmp_path / "again")
    assert ran.code == 0, ran.err
    assert "siglip2_vision_model > downsample-2x2 > qwen2, tiling resize" in ran.out
    weights = [(folder / "model.safetensors").read_bytes() for folder in (model, tmp_path / "again")]
    assert weights[0] == weights[1]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    foveate("import", tmp_path / "bert", tmp_path / "out").assert_user_error(
        "model_type is 'bert'; accepted: a model that Foveate trained"
    )
    assert not (tmp_path / "out").exists()
    foveate("import", "./absent", tmp_path / "out").assert_user_error("./absent: no such folder")


def test_eval_writes_its_report(
    foveate: Callable[..., Ran], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.eval import report

    monkeypatch.setattr(report, "TASKS", {"colour_at": report.TASKS["colour_at"]})
    ran = foveate("eval", model, "--n", 2, "--split", "dev", "--out", tmp_path / "report")
    assert ran.code == 0, ran.err
    assert "colour_at" in ran.out and "n=2" in ran.out
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["tasks"]["colour_at"]["n"] == 2
    assert (tmp_path / "report" / "report.html").exists()


def test_eval_within_a_reduction_says_which_and_how_much_is_processed(
    foveate: Callable[..., Ran], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.eval import report

    monkeypatch.setattr(report, "TASKS", {name: report.TASKS[name] for name in ("colour_at", "clip_colour_8")})
    methods = ["--prune", "evs:keep=0.5", "--prune", "fastv:layer=1,keep=0.25"]
    ran = foveate("eval", model, "--n", 3, "--split", "dev", "--out", tmp_path / "report", *methods)
    assert ran.code == 0, ran.err
    assert "visual tokens 10.0 of 16.0" in ran.out and "visual tokens 10.0 of 32.0" in ran.out
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["prune"] == ["evs:keep=0.5,reindex=false", "fastv:layer=1,keep=0.25"]
    assert "--prune evs:keep=0.5" in metrics["command"]
    for task, given in (("colour_at", 16.0), ("clip_colour_8", 32.0)):  # EVS leaves 16 of the clip's 32
        assert metrics["tasks"][task]["visual_tokens"] == given
        assert metrics["tasks"][task]["processed_visual_tokens"] == (16 + 4) / 2
    page = (tmp_path / "report" / "report.html").read_text()
    assert "processed by a layer" in page and "evs:keep=0.5" in page
