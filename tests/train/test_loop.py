import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from foveate.data.encoding import encode
from foveate.data.glyphs import GlyphSource
from foveate.data.packing import collate
from foveate.eval.glyphs import TASKS
from foveate.train import loop
from foveate.train.build import build_model, convert_checkpoint
from foveate.train.checkpoint import CheckpointError, newest_checkpoint, read_state
from foveate.train.dryrun import dry_run
from foveate.train.engine import NonFiniteError
from foveate.train.loop import Requeue, train
from foveate.train.objectives import NextToken
from foveate.train.recipe import EvaluationRecipe, Recipe, RecipeError, ValidationRecipe
from foveate.train.stages import make_loader
from foveate.train.tracking import read_metrics
from foveate.vlm.chat import load_model

STAGES = {"warmup": 5, "align": 9, "video": 12, "last": 15}  # of the tiny recipe: the step at which each ends
TIMES = {"tokens_per_s", "samples_per_s", "step_s", "data_wait", "seconds", "memory_bytes"}  # differ from run to run


@pytest.fixture
def quiet() -> Console:
    return Console(file=io.StringIO())


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    return (a / "model" / "model.safetensors").read_bytes() == (b / "model" / "model.safetensors").read_bytes()


def untimed(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, configuration, metrics and summaries, but for times."""
    for file in ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json"):
        assert (a / "model" / file).read_bytes() == (b / "model" / file).read_bytes(), file
    assert untimed(read_metrics(a)) == untimed(read_metrics(b))
    summaries = [untimed(json.loads((out / "stages.json").read_text())) for out in (a, b)]
    assert summaries[0] == summaries[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe that nothing interrupts, in a process of its own."""
    return tmp_path_factory.mktemp("reference")


@pytest.fixture
def uninterrupted(reference: Path, tiny_recipe: Callable[..., Recipe], quiet: Console) -> Path:
    if not (reference / "stages.json").exists():
        train(tiny_recipe(), reference, console=quiet)
    return reference


# Runs


def test_loss_falls(tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console) -> None:
    recipe = tiny_recipe(
        "stages.warmup.steps=30", "stages.warmup.batch.rows=4", "stages.align.steps=60", "tracking.every_steps=1"
    )
    recipe = recipe.model_copy(update={"stages": recipe.stages[:2]})
    train(recipe, tmp_path, console=quiet)
    for stage in ("warmup", "align"):
        losses = [line["loss"] for line in read_metrics(tmp_path) if line["stage"] == stage]
        assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_run_leaves_model_metrics_and_checkpoints(uninterrupted: Path) -> None:
    assert sorted(path.name for path in uninterrupted.iterdir()) == [
        "checkpoints", "metrics.jsonl", "model", "stages.json",
    ]  # fmt: skip
    assert [line["step"] for line in read_metrics(uninterrupted)] == [2, 4, 5, 6, 8, 9, 10, 12, 14, 15]
    for line in read_metrics(uninterrupted):
        assert line["stage"] == next(name for name, end in STAGES.items() if line["step"] <= end)
        assert line["loss"] > 0 and line["grad_norm"] > 0 and line["tokens_per_s"] > 0
        assert 0 <= line["data_wait"] <= 1 and 0 <= line["packing_waste"] < 1
    assert sorted(path.name for path in (uninterrupted / "checkpoints").iterdir()) == ["step-00000012", "step-00000015"]
    stages = json.loads((uninterrupted / "stages.json").read_text())
    assert {stage["name"]: stage["steps"] for stage in stages} == {"warmup": 5, "align": 4, "video": 3, "last": 3}
    assert all(0 < stage["tokens"] <= stage["positions"] and stage["seconds"] > 0 for stage in stages)


def test_metrics_show_each_parts_learning_rate(uninterrupted: Path) -> None:
    lines = {line["step"]: line for line in read_metrics(uninterrupted)}
    assert {name for name in lines[8] if name.startswith("lr_")} == {"lr_projector", "lr_llm"}
    # stage align: steps 6 and 7 warm up, 8 is the peak
    assert (lines[6]["lr_projector"], lines[6]["lr_llm"]) == pytest.approx((1e-3, 5e-4))
    assert (lines[8]["lr_projector"], lines[8]["lr_llm"]) == pytest.approx((2e-3, 1e-3))


def test_same_seed_same_run_and_another_seed_another(
    uninterrupted: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    train(tiny_recipe(), tmp_path / "again", console=quiet)
    assert_same_run(uninterrupted, tmp_path / "again")
    train(tiny_recipe("seed=1"), tmp_path / "other", console=quiet)
    assert not same_weights(uninterrupted, tmp_path / "other")


def test_checkpointing_does_not_change_the_run(
    uninterrupted: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    train(tiny_recipe("checkpoint.every_steps=1", "checkpoint.keep=1"), tmp_path, console=quiet)
    assert_same_run(uninterrupted, tmp_path)


def test_model_of_a_run_can_be_the_start_of_another(
    uninterrupted: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    recipe = tiny_recipe(f"model={{path: {uninterrupted / 'model'}, attn_implementation: eager}}")
    recipe = recipe.model_copy(update={"stages": recipe.stages[3:]})
    train(recipe, tmp_path, console=quiet)
    before, after = final_weights(uninterrupted), final_weights(tmp_path)
    changed = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed == {"language_model"}


def test_rope_theta_holds_from_its_stage_on(
    uninterrupted: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    train(tiny_recipe("stages.video.rope_theta=null"), tmp_path, console=quiet)
    with_theta, without = read_metrics(uninterrupted), read_metrics(tmp_path)
    same = [a["loss"] == b["loss"] for a, b in zip(with_theta, without, strict=True)]
    assert same == [line["step"] <= STAGES["align"] for line in with_theta]
    for out, theta in ((uninterrupted, 5e4), (tmp_path, 1e4)):
        model, _ = load_model(out / "model", device="cpu")
        assert model.config.text_config.rope_parameters["rope_theta"] == theta
        inverse = model.get_decoder().rotary_emb.inv_freq
        torch.testing.assert_close(inverse, theta ** -(torch.arange(0, 16, 2) / 16))


# Where a run may begin


def test_run_is_not_written_over(uninterrupted: Path, tiny_recipe: Callable[..., Recipe], quiet: Console) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    with pytest.raises(RecipeError, match="holds checkpoints of a run; accepted: --resume"):
        train(tiny_recipe(), uninterrupted, console=quiet)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_nothing_to_resume_is_an_error(tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console) -> None:
    with pytest.raises(RecipeError, match="no whole checkpoint to resume from"):
        train(tiny_recipe(), tmp_path / "new", resume=True, console=quiet)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [("seed=3", "seed"), ("stages.last.steps=9", "stages"), ("model.vision_feature_layer=-1", "model"),
     ("loader.max_bad_fraction=0.5", "loader"), ("precision=bf16", "precision")],
)  # fmt: skip
def test_resume_with_another_recipe_is_refused(
    uninterrupted: Path, tiny_recipe: Callable[..., Recipe], quiet: Console, override: str, named: str
) -> None:
    with pytest.raises(RecipeError, match=f"^{named} differ"):
        train(tiny_recipe(override), uninterrupted, resume=True, console=quiet)


def test_finished_run_resumes_to_the_same_model(
    tiny_recipe: Callable[..., Recipe], uninterrupted: Path, tmp_path: Path, quiet: Console
) -> None:
    train(tiny_recipe(), tmp_path, console=quiet)
    for path in (tmp_path / "model").iterdir():
        path.unlink()
    (tmp_path / "stages.json").unlink()
    # what is only watched may differ
    train(tiny_recipe("tracking.every_steps=1", "checkpoint.keep=5"), tmp_path, resume=True, console=quiet)
    assert_same_run(uninterrupted, tmp_path)


def test_failed_checkpoint_stops_the_run_and_leaves_the_one_before(
    tiny_recipe: Callable[..., Recipe],
    uninterrupted: Path,
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(tensors: object, path: Path) -> None:
        if "00000006" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    from foveate.train import checkpoint

    save = checkpoint.save_file
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match="step-00000006"):
            train(tiny_recipe(), tmp_path, console=quiet)
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-00000005"
    train(tiny_recipe(), tmp_path, resume=True, console=quiet)
    assert_same_run(uninterrupted, tmp_path)


def test_non_finite_loss_stops_the_run_before_its_step(
    tiny_recipe: Callable[..., Recipe],
    uninterrupted: Path,
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = itertools.count(1)
    real = NextToken.forward

    def poisoned(self: NextToken, inputs: dict, total: float) -> torch.Tensor:
        loss = real(self, inputs, total)
        return loss * float("nan") if next(calls) == 6 else loss  # the second micro-batch of step 8, the stage's third

    with monkeypatch.context() as patch:
        patch.setattr(NextToken, "forward", poisoned)
        with pytest.raises(NonFiniteError, match="loss is nan") as caught:
            train(tiny_recipe(), tmp_path, console=quiet)
    model, processor = build_model(tiny_recipe().model)
    loader = make_loader(tiny_recipe(), 1, model.config, processor)
    step = [loader.next() for _ in range(3)][-1]
    assert str(caught.value).split(": ", 1)[1].split(", ") == list(step.micro[1].keys)
    assert read_state(newest_checkpoint(tmp_path / "checkpoints"))["step"] == 6
    train(tiny_recipe(), tmp_path, resume=True, console=quiet)
    assert_same_run(uninterrupted, tmp_path)


# Interrupted runs


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("at", [2, 4, 7, 13])  # the next step ends a stage's middle, its end, …
def test_interrupted_run_saves_its_step_and_resumes_bit_identically(
    tiny_recipe: Callable[..., Recipe], uninterrupted: Path, tmp_path: Path, quiet: Console, at: int, number: int
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Requeue):
        train(
            tiny_recipe(),
            tmp_path,
            console=quiet,
            after_step=lambda step: signal.raise_signal(number) if step == at else None,
        )
    assert signal.getsignal(number) == before
    assert read_state(newest_checkpoint(tmp_path / "checkpoints"))["step"] == at + 1
    train(tiny_recipe(), tmp_path, resume=True, console=quiet)
    assert_same_run(uninterrupted, tmp_path)


def test_second_interrupt_stops_at_once(tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console) -> None:
    def twice(step: int) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe(), tmp_path, console=quiet, after_step=twice)
    assert newest_checkpoint(tmp_path / "checkpoints").name == "step-00000003"


# Each run is a forked process, so that a kill takes nothing else along and libraries are imported once.
KILLER = """
import gc, io, json, os, random, signal, sys, time
from pathlib import Path
from rich.console import Console
from foveate.train import checkpoint, loop
from foveate.train.recipe import load_recipe

recipe_path, folder, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def forked(out, at=None, writing=None):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        real = checkpoint.save_file

        def torn(tensors, path):
            if f"{writing:08d}" in str(path) and path.suffix == ".safetensors":
                path.write_bytes(b"half a file")
                kill()
            real(tensors, path)

        if writing:
            checkpoint.save_file = torn
        recipe = load_recipe(recipe_path, ["checkpoint.every_steps=2"])
        resume = checkpoint.newest_checkpoint(out / "checkpoints") is not None
        after = lambda step: kill() if step == at else None
        loop.train(recipe, out, resume=resume, console=Console(file=io.StringIO()), after_step=after)
        code = 0
    finally:
        os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


gc.collect()
gc.freeze()  # a collection in a fork then passes over the libraries
began = time.monotonic()
ended(forked(folder / "whole"))
whole_s = time.monotonic() - began
codes = {}
for name, kills in cases.items():
    codes[name] = [ended(forked(folder / name, **kill)) for kill in kills] + [ended(forked(folder / name))]

# kills at moments that nothing chose, until a run gets through
draw, moments = random.Random(7), 0
while True:
    child = forked(folder / "moments")
    deadline = time.monotonic() + draw.uniform(0.1, 0.9) * whole_s * (1 + moments / 4)
    while time.monotonic() < deadline and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    moments += 1
    if ended(child) == 0:
        break
print(json.dumps({"codes": codes, "moments": moments}))
"""
CASES = {
    "before the first checkpoint": [{"at": 1}],
    "in region_text": [{"at": 4}],
    "in region_text, off a checkpoint": [{"at": 3}],
    "at a stage's end": [{"at": 5}],
    "in a stage's first step": [{"at": 6}],
    "at another stage's end": [{"at": 9}],
    "after the stage that set rope_theta": [{"at": 14}],
    "at the end": [{"at": 15}],
    "three times": [{"at": 3}, {"at": 7}, {"at": 11}],
    "writing": [{"writing": 4}],
    "writing twice": [{"writing": 8}, {"writing": 14}],
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], tuple[Path, dict]]]:
    folder = tmp_path_factory.mktemp("killed")
    reports: list[dict] = []

    def run(recipe: Path) -> tuple[Path, dict]:
        if not reports:
            ran = subprocess.run(
                [sys.executable, "-c", KILLER, str(recipe), str(folder), json.dumps(CASES)],
                cwd="/",
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert ran.returncode == 0, ran.stderr
            reports.append(json.loads(ran.stdout.splitlines()[-1]))
        return folder, reports[0]

    yield run


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_run_is_bit_identical(
    killed: Callable[[Path], tuple[Path, dict]], uninterrupted: Path, tiny_recipe_path: Path, case: str
) -> None:
    folder, report = killed(tiny_recipe_path)
    assert report["codes"][case] == [*[-signal.SIGKILL] * len(CASES[case]), 0]
    assert_same_run(uninterrupted, folder / case)


def test_run_killed_at_any_moment_is_bit_identical(
    killed: Callable[[Path], tuple[Path, dict]], uninterrupted: Path, tiny_recipe_path: Path
) -> None:
    folder, report = killed(tiny_recipe_path)
    assert report["moments"] > 1
    assert_same_run(uninterrupted, folder / "moments")


# What is shown and tracked


def test_without_a_terminal_lines_tell_the_progress(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.StringIO()
    recipe = tiny_recipe()
    recipe = recipe.model_copy(update={"stages": recipe.stages[:2]})
    train(recipe, tmp_path / "a", console=Console(file=output))
    ends = output.getvalue().splitlines()
    assert [line.split("  ")[0] for line in ends] == ["warmup 5/5", "align 4/4"]
    assert all("loss " in line and "tokens/s" in line and line.endswith("0 s left") for line in ends)

    monkeypatch.setattr(loop, "LINE_EVERY_S", 0.0)
    output = io.StringIO()
    train(recipe, tmp_path / "b", console=Console(file=output))
    shown = [line.split("  ")[0] for line in output.getvalue().splitlines()]
    assert shown == [f"warmup {n}/5" for n in range(1, 6)] + [f"align {n}/4" for n in range(1, 5)]


def test_on_a_terminal_bars_show_rate_and_time_left(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    output = io.StringIO()
    train(tiny_recipe(), tmp_path, console=Console(file=output, force_terminal=True, width=120, color_system=None))
    for name, end in (("warmup", "5/5"), ("align", "4/4"), ("last", "3/3")):
        assert any(name in line and end in line and "tokens/s" in line for line in output.getvalue().splitlines())


def test_wandb_writes_an_offline_run(tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console) -> None:
    recipe = tiny_recipe("tracking.wandb=offline")
    recipe = recipe.model_copy(update={"stages": recipe.stages[:1]})
    train(recipe, tmp_path, console=quiet)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = run.glob("run-*.wandb")
    deadline = time.monotonic() + 60
    while b"grad_norm" not in log.read_bytes():  # written by wandb's own process, a moment after the run's end
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_metrics_cut_short_by_a_kill_are_read_to_the_last_whole_line(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


# Validation, evaluation, adapters


def last_stage(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"stages": recipe.stages[3:]})


def test_validation_loss_is_that_of_the_kept_out_documents(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """Against the final model's loss on the same documents one by one."""
    settings = "validation={every_steps: 2, documents: 7}"
    recipe = last_stage(tiny_recipe(settings, "checkpoint={every_steps: 1, keep: 1, keep_best: true}"))
    train(recipe, tmp_path, console=quiet)
    lines = {line["step"]: line for line in read_metrics(tmp_path) if "validation_loss" in line}
    assert sorted(lines) == [2, 3]  # every second step, and at the stage's end
    model, processor = load_model(tmp_path / "model", device="cpu")
    source = GlyphSource("needle_chat", processor, split="dev", seed=recipe.seed)
    total, tokens = 0.0, 0
    for index in range(7):
        batch = collate([[encode(source.document(index), processor)]], processor)
        with torch.inference_mode():
            loss = model(**batch.inputs, use_cache=False).loss.item()
        total, tokens = total + loss * batch.loss_tokens, tokens + batch.loss_tokens
    assert lines[3]["validation_loss"] == pytest.approx(total / tokens, rel=1e-5)
    kept = {int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {min(lines, key=lambda step: lines[step]["validation_loss"]), 3}


def test_evaluation_during_training_gives_accuracies_and_changes_nothing(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    plain = last_stage(tiny_recipe())
    train(plain, tmp_path / "plain", console=quiet)
    watched = plain.model_copy(
        update={
            "evaluation": EvaluationRecipe(every_steps=2, questions=2),
            "validation": ValidationRecipe(every_steps=1, documents=3),
        }
    )
    train(watched, tmp_path / "watched", console=quiet)
    assert same_weights(tmp_path / "plain", tmp_path / "watched")
    accuracies = [
        {k: v for k, v in line.items() if k.startswith("accuracy_")} for line in read_metrics(tmp_path / "watched")
    ]
    assert accuracies[-1].keys() == {f"accuracy_{task}" for task in TASKS}
    assert all(0 <= value <= 1 for value in accuracies[-1].values())


LORA = "stages.last.learning_rates={projector: 1e-3, lora: 1e-2}"


@pytest.mark.parametrize(
    "lora",
    ["{rank: 4, dropout: 0.1}", "{rank: 4, dora: true}", "{rank: 4, quantize: true}"],
    ids=["lora", "dora", "qlora"],
)
def test_adapters_are_merged_saved_and_resumed(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console, lora: str
) -> None:
    sizes = ("model.text.hidden_size=64", "model.text.intermediate_size=128")  # 4 bits come in blocks of 64
    recipe = last_stage(tiny_recipe(LORA, f"stages.last.lora={lora}", *sizes))
    train(recipe, tmp_path / "whole", console=quiet)
    model, _ = load_model(tmp_path / "whole" / "model", device="cpu")  # plain weights, no adapters in it
    assert (tmp_path / "whole" / "adapters" / "last" / "adapter_model.safetensors").exists()
    torch.manual_seed(recipe.seed)
    before = dict(build_model(recipe.model)[0].named_parameters())
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert not before["language_model.model.layers.0.self_attn.q_proj.weight"].equal(
        after["language_model.model.layers.0.self_attn.q_proj.weight"]
    )
    embedding = "language_model.model.embed_tokens.weight"
    assert before[embedding].equal(after[embedding])

    interrupted = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        train(
            recipe,
            tmp_path / "cut",
            console=quiet,
            after_step=lambda step: signal.raise_signal(interrupted) if step == 1 else None,
        )
    convert_checkpoint(newest_checkpoint(tmp_path / "cut" / "checkpoints"), tmp_path / "converted")
    assert load_file(tmp_path / "converted" / "model.safetensors").keys() == final_weights(tmp_path / "whole").keys()
    train(recipe, tmp_path / "cut", resume=True, console=quiet)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_workers_do_not_change_the_run_and_may_change_on_resume(
    uninterrupted: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(
            tiny_recipe("loader.workers=2"),
            tmp_path,
            console=quiet,
            after_step=lambda step: signal.raise_signal(signal.SIGINT) if step == 7 else None,
        )
    train(tiny_recipe("loader.workers=1"), tmp_path, resume=True, console=quiet)
    assert_same_run(uninterrupted, tmp_path)


def test_auto_resume_begins_and_goes_on(
    uninterrupted: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    def stop(step: int) -> None:
        if step == 10:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Requeue):
        train(tiny_recipe(), tmp_path, resume="auto", console=quiet, after_step=stop)
    assert not (tmp_path / "stages.json").exists()  # by which a launcher knows that it is to go on
    train(tiny_recipe(), tmp_path, resume="auto", console=quiet)
    assert_same_run(uninterrupted, tmp_path)


def test_checkpoint_of_a_stages_end_converts_to_a_model(uninterrupted: Path, tmp_path: Path) -> None:
    convert_checkpoint(uninterrupted / "checkpoints" / "step-00000015", tmp_path / "model")
    for file in ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json"):
        assert (tmp_path / "model" / file).read_bytes() == (uninterrupted / "model" / file).read_bytes(), file
    with pytest.raises(FileExistsError, match="not empty"):
        convert_checkpoint(uninterrupted / "checkpoints" / "step-00000015", tmp_path / "model")
    shutil.copytree(uninterrupted / "checkpoints" / "step-00000012", tmp_path / "cut")
    (tmp_path / "cut" / "state-00000-of-00001.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="not whole"):
        convert_checkpoint(tmp_path / "cut", tmp_path / "other")


def test_activation_checkpointing_holds_for_its_stage_and_changes_nothing(
    uninterrupted: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    counts: list[int] = []
    real = NextToken.forward

    def counted(self: NextToken, inputs: dict, total: float) -> torch.Tensor:
        counts.append(sum(getattr(module, "gradient_checkpointing", False) for module in self.modules()))
        return real(self, inputs, total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NextToken, "forward", counted)
        train(tiny_recipe("stages.align.activation_checkpointing=true"), tmp_path, console=quiet)
    assert all(counts[:8]) and not any(counts[8:])  # four steps of two micro-batches
    for name, weight in final_weights(uninterrupted).items():
        torch.testing.assert_close(final_weights(tmp_path)[name], weight, rtol=1e-4, atol=1e-5)


# Dry runs


def test_dry_run_checks_every_stage(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe()
    checks = dry_run(recipe)
    assert [check.name for check in checks] == ["warmup", "align", "video", "last"]
    model, processor = build_model(recipe.model)
    step = make_loader(recipe, 1, model.config, processor).next()
    assert (checks[1].tokens, checks[1].loss_tokens, checks[1].micro_batches) == (step.tokens, step.loss_tokens, 2)
    sizes = {"llm": model.language_model, "projector": model.multi_modal_projector, "tower": model.vision_tower}
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in sizes.items()}
    assert [check.trained for check in checks] == [
        count["tower"] + count["projector"], count["projector"] + count["llm"], sum(count.values()), count["llm"],
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny.yaml"]


@pytest.mark.parametrize(
    ("override", "processes", "message"),
    [
        ("stages.last.batch.tokens=5", 1, "none|can't be used"),
        ("engine=zero7", 1, "engine is 'zero7'; accepted: torch"),
        ("seed=0", 3, "1 micro-batches a step can't be shared by 3 processes"),
        ("sources={coyo: {about: pairs}}", 1, r"sources.coyo.path is not filled in \(pairs\)"),
    ],
)
def test_dry_run_finds_what_training_would(
    tiny_recipe: Callable[..., Recipe], override: str, processes: int, message: str
) -> None:
    data = ["stages.last.data=[coyo]"] if "coyo" in override else []
    with pytest.raises((ValueError, RuntimeError), match=message):
        dry_run(tiny_recipe(override, *data), processes)
