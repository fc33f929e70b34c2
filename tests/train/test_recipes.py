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
from foveate.vlm.processor import FoveateProcessor

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ["vila-1.5", "nvila-lite", "nvila"]
PROCESSES = (8, 16, 32, 64)  # that the published batches are to be shared by


def sources_of(recipe: Recipe, stage: StageRecipe) -> list[str]:
    assert all(isinstance(data, SourceData) for data in stage.data)
    return [data.source for data in stage.data]


def structure(recipe: Recipe) -> list[tuple]:
    """Of each stage: its name, what trains, and the kinds of data it reads: layouts, videos apart."""
    kinds = {name: (source.format, source.frames is not None) for name, source in recipe.sources.items()}
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
    assert twin.model.vision_feature_layer == published.model.vision_feature_layer


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
    stages = load_recipe(name).stages
    assert len(comments) == len(stages)
    for stage, (samples, tokens, rows) in zip(stages, comments, strict=True):
        batch = stage.batch
        assert abs(samples * tokens / batch.tokens - rows) < 1
        assert 2 / 3 < batch.rows * batch.micro_batches / rows < 4 / 3
        assert all(batch.micro_batches % processes == 0 for processes in PROCESSES)


def test_nvila_and_nvila_lite_read_the_same_data() -> None:
    lite, full = load_recipe("nvila-lite"), load_recipe("nvila")
    assert {n: s.about for n, s in lite.sources.items()} == {n: s.about for n, s in full.sources.items()}
    assert [stage.data for stage in lite.stages] == [stage.data for stage in full.stages]


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


def test_llama_3_template_puts_loss_on_answers_alone() -> None:
    processor = FoveateProcessor(glyph_tokenizer(), **load_recipe("vila-1.5").model.processor)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what is it ?"}]},
        {"role": "assistant", "content": "a clip"},
    ]
    parts = chat_document("key", messages, [], processor).parts
    assert [(part.text, part.loss) for part in parts if isinstance(part, Text)] == [
        (
            "<|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nwhat is it ?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("a clip<|eot_id|>", True),
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
    checks = dry_run(load_recipe(f"tiny-{name}", ["loader.workers=0"]), processes=2)
    assert [check.name for check in checks] == [stage.name for stage in load_recipe(name).stages]
    assert all(check.loss_tokens > 0 and check.tiles > 0 and check.bad == 0 for check in checks)


def test_tiny_recipe_trains_through_all_stages(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tiny_data)
    names = [stage.name for stage in load_recipe("nvila-lite").stages]
    overrides = [f"stages.{name}.steps=2" for name in names]
    overrides += ["tracking.wandb=disabled", "threads=1", "loader.workers=0", "validation.documents=3"]
    recipe = load_recipe("tiny-nvila-lite", overrides)
    summaries = train(recipe, tmp_path / "run", device="cpu")
    assert [(summary.name, summary.steps) for summary in summaries] == [(name, 2) for name in names]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "bad_documents.jsonl").exists()
    page = write_report(tmp_path / "run").read_text()
    assert "Finished" in page and "2 of 2" in page and all(name in page for name in names)


@pytest.mark.parametrize("arguments", [["a", "b"], ["--help"]])
def test_tiny_data_refuses_other_arguments(arguments: list[str]) -> None:
    command = [str(ROOT / "scripts" / "tiny_data.sh"), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 2 and ran.stderr.startswith("usage: scripts/tiny_data.sh")
