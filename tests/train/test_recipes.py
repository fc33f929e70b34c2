"""The recipes that come with the package, and the script that makes the tiny ones' data."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from foveate import cli
from foveate.data.document import Text, chat_document
from foveate.data.glyphs import glyph_tokenizer
from foveate.data.inputs import open_input
from foveate.data.writing import make_shards
from foveate.train.build import build_config
from foveate.train.dryrun import dry_run
from foveate.train.loop import train
from foveate.train.recipe import Recipe, SourceData, StageRecipe, load_recipe, shipped_recipes
from foveate.train.report import write_report
from foveate.train.shapes import known_llm
from foveate.vlm.parallel.topology import ParallelError, check_heads
from foveate.vlm.processor import FoveateProcessor

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ["vila-1.5-3b", "nvila-lite-8b", "nvila-8b", "nvila-8b-video", "longvila-8b"]
PROCESSES = {"longvila-8b": (8, 16, 32)}  # that a published batch is to be shared by; the others 64 too
ALONE = [f"stages.{stage}.parallel=null" for stage in ("context-256k", "context-512k", "context-1m", "long-sft")]


def sources_of(recipe: Recipe, stage: StageRecipe) -> list[str]:
    assert all(isinstance(data, SourceData) for data in stage.data)
    return [data.source for data in stage.data]


def structure(recipe: Recipe) -> list[tuple]:
    """Of each stage: its name, what trains, and the kinds of data it reads: layouts, videos apart.

    Plain texts count as chats, of which some are text alone: the tiny data have no others.
    """
    layouts = {"text": "chat"}
    kinds = {
        name: (layouts.get(source.format, source.format), source.frames is not None)
        for name, source in recipe.sources.items()
    }
    return [
        (stage.name, set(stage.learning_rates), {kinds[name] for name in sources_of(recipe, stage)})
        for stage in recipe.stages
    ]


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_is_valid_under_its_name(name: str) -> None:
    assert load_recipe(name).name == name


def test_published_recipes_and_their_twins_are_shipped() -> None:
    assert {"quickstart", *PUBLISHED, *(f"tiny-{name}" for name in PUBLISHED)} <= set(shipped_recipes())


@pytest.mark.parametrize("name", PUBLISHED)
def test_twin_has_the_stages_parts_and_kinds_of_data_of_its_recipe(name: str) -> None:
    published, twin = load_recipe(name), load_recipe(f"tiny-{name}")
    assert structure(twin) == structure(published)
    assert twin.model.projector == published.model.projector
    assert twin.model.tiling == published.model.tiling
    assert len(twin.model.s2_scales or []) == len(published.model.s2_scales or [])
    assert [side > 1 for side in twin.model.video_pool] == [side > 1 for side in published.model.video_pool]
    assert twin.model.vision_feature_layer == published.model.vision_feature_layer
    for ours, theirs in zip(twin.stages, published.stages, strict=True):
        assert (ours.schedule, ours.rope_theta is None) == (theirs.schedule, theirs.rope_theta is None)
        assert (ours.lora and ours.lora.targets) == (theirs.lora and theirs.lora.targets)
        assert (ours.parallel is None) == (theirs.parallel is None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_says_what_each_source_is_and_uses_it(name: str) -> None:
    recipe = load_recipe(name)
    assert all(source.path is None and len(source.about) > 20 for source in recipe.sources.values())
    assert {s for stage in recipe.stages for s in sources_of(recipe, stage)} == set(recipe.sources)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_batches_are_what_their_comments_say_and_can_be_shared(name: str) -> None:
    """`# 2048 samples × 140 tokens … = 70 rows`, then the batch; rounded by a third at most."""
    text = (ROOT / "train" / "recipes" / f"{name}.yaml").read_text()
    comments = [tuple(map(int, found)) for found in re.findall(r"# (\d+) samples × (\d+) tokens.* = (\d+) rows", text)]
    recipe = load_recipe(name)
    assert len(comments) == len(recipe.stages)
    for stage, (samples, tokens, rows) in zip(recipe.stages, comments, strict=True):
        batch = stage.batch
        assert abs(samples * tokens / batch.tokens - rows) < 1
        assert 2 / 3 < batch.rows * batch.micro_batches / rows < 4 / 3
        degree = recipe.parallel_of(stage).degree
        for processes in PROCESSES.get(name, (8, 16, 32, 64)):
            assert processes % degree == 0 and batch.micro_batches % (processes // degree) == 0


def test_nvilas_read_the_same_data() -> None:
    lite, full, video = (load_recipe(name) for name in ("nvila-lite-8b", "nvila-8b", "nvila-8b-video"))
    assert lite.sources == full.sources
    assert [stage.data for stage in lite.stages] == [stage.data for stage in full.stages]
    assert [stage.data for stage in video.stages[:4]] == [stage.data for stage in full.stages]


# Of the released scripts, and of NVILA's paper (arXiv 2412.04468, section 2.1 and table 8).
SCRIPTS = {
    "vila-1.5-3b": [(1e-3, 2048), (5e-5, 512), (1e-4, 1024)],
    "nvila-lite-8b": [(1e-3, 2048), (5e-5, 1024), (5e-5, 1024), (2e-5, 2048)],
    "nvila-8b": [(1e-3, 512), (2e-5, 1024), (2e-5, 1024), (1.5e-5, 1024)],
    "nvila-8b-video": [(1e-3, 512), (2e-5, 1024), (2e-5, 1024), (1.5e-5, 1024), (2e-5, 2048)],
    "longvila-8b": [(1e-3, 2048), (5e-5, 1024), (1e-4, 1024), *[(2e-5, n) for n in (32, 256, 256, 64)], (5e-5, 37)],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rates_and_samples_are_the_scripts(name: str) -> None:
    text = (ROOT / "train" / "recipes" / f"{name}.yaml").read_text()
    samples = [int(found) for found in re.findall(r"# (\d+) samples ×", text)]
    rates = [set(stage.learning_rates.values()) for stage in load_recipe(name).stages]
    assert [(*rate, n) for rate, n in zip(rates, samples, strict=True)] == SCRIPTS[name]


def test_scale_then_compress_is_what_the_scripts_say() -> None:
    full, lite, video = (load_recipe(name).model for name in ("nvila-8b", "nvila-lite-8b", "nvila-8b-video"))
    assert (full.tiling, full.s2_scales, full.projector) == ("dynamic-s2", [448, 896, 1344], "downsample-2x2")
    assert (lite.tiling, lite.thumbnail, lite.projector) == ("tiles", True, "downsample-3x3")
    assert full.processor["max_tiles"] == lite.processor["max_tiles"] == 12
    assert (video.tiling, video.video_pool, video.processor["num_frames"]) == ("resize", (8, 1, 1), 256)
    for name in ("nvila-8b", "nvila-lite-8b", "nvila-8b-video"):  # the tower tuned once the compressor is in
        assert set(load_recipe(name).stages[1].learning_rates) == {"tower", "projector"}


def test_longvila_extends_its_context_before_its_videos() -> None:
    stages = [stage for stage in load_recipe("longvila-8b").stages if stage.name.startswith("context")]
    assert [stage.rope_theta for stage in stages] == [15300000, 207112184, 1062356830, 3580165449]
    assert [stage.batch.tokens for stage in stages] == [2**16, 2**18, 2**19, 2**20]
    assert all(stage.lora.rank == 8 and set(stage.learning_rates.values()) == {2e-5} for stage in stages)


@pytest.mark.parametrize("name", ["longvila-8b", "tiny-longvila-8b"])
def test_longvilas_processes_share_its_heads(name: str) -> None:
    """28 heads and 4 of keys and values, of Qwen2 7B; 4 and 2."""
    recipe = load_recipe(name)
    text = known_llm(recipe.model.text) if name == "longvila-8b" else build_config(recipe.model)[0].text_config
    grids = {stage.name: recipe.parallel_of(stage) for stage in recipe.stages}
    for grid in grids.values():
        check_heads(text, grid.ulysses)
    assert [name for name, grid in grids.items() if grid.degree == 1] == ["align", "pretrain", "sft", "context-64k"]
    if name == "longvila-8b":
        with pytest.raises(ParallelError, match="accepted: 1, 2, 4, 28"):
            check_heads(text, 14)  # of the scripts of 256 and 512 frames


def test_needle_long_goes_on_where_needle_has_seen_128_frames() -> None:
    before, after = load_recipe("needle"), load_recipe("needle-long")
    steps = {stage.name: stage.steps for stage in before.stages}
    seen = [data.frames[1] for stage in before.stages[:3] for data in stage.data]
    text = (ROOT / "train" / "recipes" / "needle-long.yaml").read_text()
    assert max(seen) == 128 and f"step-{sum(steps[name] for name in list(steps)[:3]):08d} " in text
    assert [max(data.frames[1] for data in stage.data) for stage in after.stages] == [1024, 1024]
    assert after.stages[0].rope_theta > before.model.text["rope_parameters"]["rope_theta"]
    assert after.parallel.degree == 4 and all(
        data.frames[1] <= stage.batch.tiles for stage in after.stages for data in stage.data
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_names_the_first_source_to_fill_in(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the tower and the LLM are at hand, which they are not here."""
    at_hand = build_config(load_recipe(f"tiny-{name}").model)
    monkeypatch.setattr("foveate.train.dryrun.build_config", lambda model: at_hand)
    monkeypatch.setattr(sys, "argv", ["foveate", "train", name, "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "sources.llava-cc3m-pretrain.path is not filled in" in message
    assert "LLaVA-CC3M-Pretrain-595K" in message


def test_vicunas_template_puts_loss_on_answers_alone() -> None:
    processor = FoveateProcessor(glyph_tokenizer(), **load_recipe("vila-1.5-3b").model.processor)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what is it ?"}]},
        {"role": "assistant", "content": "a clip"},
    ]
    parts = chat_document("key", messages, [], processor).parts
    end = processor.tokenizer.eos_token
    assert [(part.text, part.loss) for part in parts if isinstance(part, Text)] == [
        ("be brief USER: what is it ? ASSISTANT:", False),
        (f" a clip{end}", True),
    ]


# The tiny ones' data


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/tiny-data as scripts/tiny_data.sh makes it, but of fewer documents."""
    folder = tmp_path_factory.mktemp("tiny")
    fake = folder / "foveate"
    fake.write_text(f'#!/bin/sh\necho "$@" >>{folder}/calls\n')
    fake.chmod(0o755)
    environment = os.environ | {"FOVEATE": str(fake)}
    subprocess.run(
        [str(ROOT / "scripts" / "tiny_data.sh")],
        cwd=folder,
        env=environment,
        check=True,
        timeout=60,
        capture_output=True,
    )
    for call in (folder / "calls").read_text().splitlines():
        data, make, source, out = call.split()[:4]
        assert (data, make) == ("data", "make")
        source = re.sub(r"documents=\d+", "documents=40", source)
        source = source if source.startswith("glyphs:") else str(folder / source)
        made = make_shards(open_input(source), folder / out, documents_per_shard=20)
        assert made.index.documents >= 40 and not made.refused
    return folder


def test_tiny_data_are_all_that_the_tiny_recipes_read(tiny_data: Path) -> None:
    paths = {s.path for name in PUBLISHED for s in load_recipe(f"tiny-{name}").sources.values()}
    made = {str(path.parent.relative_to(tiny_data)) for path in tiny_data.glob("runs/tiny-data/*/index.json")}
    assert made == paths


@pytest.mark.parametrize("name", PUBLISHED)
def test_tiny_recipe_has_a_first_step_in_each_stage(
    name: str, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_data)
    names = [stage.name for stage in load_recipe(name).stages]
    overrides = [f"stages.{stage}.batch.{change}" for stage in names for change in ("window=4", "reserve=1")]
    checks = dry_run(load_recipe(f"tiny-{name}", ["loader.workers=0", *overrides]), processes=4)
    assert [check.name for check in checks] == names
    assert all(check.loss_tokens > 0 and check.bad == 0 for check in checks)
    assert all((check.tiles == 0) == check.name.startswith("context") for check in checks), "which is extended on texts"


@pytest.mark.parametrize("name", ["nvila-lite-8b", "nvila-8b", "nvila-8b-video", "longvila-8b"])
def test_tiny_recipe_trains_through_all_stages(
    name: str, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tiny_data)
    names = [stage.name for stage in load_recipe(name).stages]
    small = ("steps=3", "batch.window=4", "batch.reserve=1", "batch.micro_batches=1")
    overrides = [f"stages.{stage}.{change}" for stage in names for change in small]
    overrides += ["tracking.wandb=disabled", "threads=1", "loader.workers=0", "validation.documents=3"]
    overrides += ALONE if name == "longvila-8b" else []
    recipe = load_recipe(f"tiny-{name}", overrides)
    summaries = train(recipe, tmp_path / "run", device="cpu")
    assert [(summary.name, summary.steps) for summary in summaries] == [(stage, 3) for stage in names]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "bad_documents.jsonl").exists()
    page = write_report(tmp_path / "run").read_text()
    assert "Finished" in page and "3 of 3" in page and all(stage in page for stage in names)


@pytest.mark.parametrize("arguments", [["a", "b"], ["--help"]])
def test_tiny_data_refuses_other_arguments(arguments: list[str]) -> None:
    command = [str(ROOT / "scripts" / "tiny_data.sh"), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 2 and ran.stderr.startswith("usage: scripts/tiny_data.sh")
