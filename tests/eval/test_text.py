"""Loss on held-out text, against each text read alone by transformers in float64, and the experiment on retention."""

import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from foveate.data.sentences import CATEGORIES, Sentences, held_out
from foveate.data.small_scenes import SMALL_SCENE_QUESTIONS
from foveate.eval.results import find
from foveate.eval.retention import BEFORE, LAST, START, Measured, as_points, picture, scene_items, tables, unchanged
from foveate.eval.text import TextLoss, entropy, evaluate_text, text_loss, text_results
from foveate.train import retention
from foveate.train.build import build_config, build_model
from foveate.train.recipe import RecipeError, load_recipe
from foveate.train.retention import ARMS, arm_recipe, run_experiment, start_recipe, text_shares
from foveate.vlm.model import FoveateForConditionalGeneration
from foveate.vlm.parallel.topology import Topology
from foveate.vlm.processor import FoveateProcessor

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "text_retention.json"
TINY = [
    "model.vision.hidden_size=24", "model.vision.intermediate_size=24", "model.vision.num_hidden_layers=1",
    "model.text.hidden_size=16", "model.text.intermediate_size=16", "model.text.num_hidden_layers=2",
]  # fmt: skip
Speaker = tuple[FoveateForConditionalGeneration, FoveateProcessor]


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    """Random weights, float64."""
    torch.manual_seed(0)
    model, processor = build_model(start_recipe(0, TINY).model)
    return model.double().eval(), processor


@pytest.fixture(scope="module")
def texts() -> list[Sentences]:
    return list(held_out(40))


# The loss


def test_loss_is_that_of_each_text_read_alone(speaker: Speaker, texts: list[Sentences]) -> None:
    model, processor = speaker
    loss = text_loss(model, processor, [text.text for text in texts], batch_tokens=200)
    for number, text in enumerate(texts):
        words = [*text.text.split(), "<|end|>"]
        ids = processor.tokenizer.convert_tokens_to_ids(words)
        with torch.no_grad():
            logits = model.language_model(input_ids=torch.tensor([ids])).logits[0]
        nats = sum(float(row.logsumexp(0) - row[word]) for row, word in zip(logits, ids[1:], strict=False))
        assert loss.tokens[number] == len(words) - 1
        assert abs(loss.nats[number] - nats) < 1e-9
    assert loss.mean == pytest.approx(loss.nats.sum() / (sum(len(text.text.split()) for text in texts)), rel=1e-12)


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_neither_batches_nor_padding_change_the_loss(
    speaker: Speaker, texts: list[Sentences], batch_tokens: int
) -> None:
    some = [text.text for text in texts]
    expected, found = text_loss(*speaker, some), text_loss(*speaker, some, batch_tokens=batch_tokens)
    assert np.abs(found.nats - expected.nats).max() < 1e-9
    assert np.array_equal(found.tokens, expected.tokens)
    alone = text_loss(*speaker, some[7:8])
    assert abs(alone.nats[0] - expected.nats[7]) < 1e-9


def test_a_model_that_knows_nothing_has_the_logarithm_of_its_words(texts: list[Sentences]) -> None:
    model, processor = build_model(start_recipe(0, TINY).model)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    loss = text_loss(model, processor, [text.text for text in texts])
    assert loss.mean == pytest.approx(math.log(len(processor.tokenizer)), rel=1e-6)
    said = text_results(texts, loss)
    assert find(said, "all: perplexity")["value"] == pytest.approx(len(processor.tokenizer), rel=1e-5)


def test_a_reader_who_knows_the_language_has_its_entropy(texts: list[Sentences]) -> None:
    tokens = np.array([len(text.text.split()) for text in texts])
    said = text_results(texts, entropy(texts, tokens))
    for name in ("all", *CATEGORIES):
        chosen = [text for text in texts if name in ("all", text.category)]
        expected = -sum(text.log_likelihood for text in chosen) / sum(len(text.text.split()) for text in chosen)
        entry = find(said, f"{name}: loss")
        assert (entry["n"], entry["ratio"]) == (len(chosen), 1)
        assert entry["value"] == pytest.approx(expected, rel=1e-12)
        assert entry["low"] <= expected <= entry["high"]
        assert find(said, f"{name}: perplexity")["value"] == pytest.approx(math.exp(expected))


def test_interval_is_as_wide_as_the_ratio_estimators_error() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 60, 2000)
    nats = tokens * rng.normal(0.7, 0.2, 2000)
    loss = TextLoss(nats, tokens)
    error = np.std(nats - loss.mean * tokens) / math.sqrt(2000) / tokens.mean()
    low, high = loss.interval()
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_what_cannot_be_measured_is_refused(speaker: Speaker) -> None:
    with pytest.raises(ValueError, match=r"text 1: the model's tokenizer does not know the word 'zebra'; accepted"):
        text_loss(*speaker, ["facts : ann", "facts : zebra"])
    with pytest.raises(ValueError, match=r"there are no texts"):
        text_loss(*speaker, [])
    with pytest.raises(ValueError, match=r"ulysses 2 and ring 1: texts are short"):
        evaluate_text(*speaker, None, 2, "test", Console(), Topology(ulysses=2, size=2))
    with pytest.raises(ValueError, match=r"split is 'valid'; accepted"):
        evaluate_text(*speaker, None, 2, "valid", Console())


def test_evaluation_prints_and_writes_what_it_measured(speaker: Speaker, tmp_path: Path) -> None:
    printed = io.StringIO()
    loss = evaluate_text(*speaker, tmp_path, 30, "dev", Console(file=printed, width=200))
    told = json.loads((tmp_path / "metrics.json").read_text())
    assert told["command"] == "foveate eval --task text --n 30 --split dev"
    assert find(told["results"], "all: loss")["value"] == loss.mean
    assert told["tokens"] == loss.tokens.sum() == sum(len(text.text.split()) for text in held_out(30, "dev"))
    assert f"all  {loss.mean:.4f} nats a token" in printed.getvalue()


# The experiment


def test_only_a_model_from_scratch_chooses_its_tokenizer() -> None:
    with pytest.raises(RecipeError, match=r"tokenizer is 'sentences', but a pretrained LLM has its own; accepted"):
        load_recipe("text-retention", ["model.tokenizer=sentences"])
    with pytest.raises(RecipeError, match=r"model.tokenizer"):
        start_recipe(0, ["model.tokenizer=verses"])
    assert "dora" in build_config(start_recipe(0).model)[1].tokenizer.get_vocab()


def test_arms_differ_in_data_and_in_what_trains_alone(tmp_path: Path) -> None:
    recipes = {arm: arm_recipe(arm, 3, tmp_path) for arm in ARMS}
    bare = []
    for recipe in recipes.values():
        assert recipe.seed == 3
        stages = [stage.model_copy(update={"data": [], "learning_rates": {}}) for stage in recipe.stages]
        bare.append(recipe.model_copy(update={"stages": stages}))
    assert all(one == bare[0] for one in bare)
    kinds = {arm: [[data.kind for data in stage.data] for stage in recipe.stages] for arm, recipe in recipes.items()}
    images = [["small_interleaved"], ["small_chat"]]
    assert kinds == {
        "no text": images,
        "text in instruct": [images[0], [*images[1], "sentences"]],
        "text in both": [[*images[0], "sentences"], [*images[1], "sentences"]],
        "LLM frozen": images,
    }
    trains = {arm: [set(stage.learning_rates) for stage in recipe.stages] for arm, recipe in recipes.items()}
    assert trains.pop("LLM frozen") == [{"projector"}, {"tower", "projector"}]
    assert all(parts == [{"projector", "llm"}, {"tower", "projector", "llm"}] for parts in trains.values())


FEW = tuple(
    [f"stages.{stage}.{field}" for stage in stages for field in ("steps=2", "batch.rows=2", "warmup_steps=0")]
    for stages in (("text", "tower-warmup", "align"), ("interleaved", "instruct"))
)


def run_tiny(out: Path, patch: pytest.MonkeyPatch) -> list[Measured]:
    """Two steps of everything, with the tiniest model, in a thread of this process."""
    patch.setattr(retention, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    return run_experiment(out, Console(quiet=True), [0], 30, 6, 1, ([*TINY, *FEW[0]], FEW[1]))


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Measured]]:
    out = tmp_path_factory.mktemp("retention")
    with pytest.MonkeyPatch.context() as patch:
        return out, run_tiny(out, patch)


def test_each_stage_is_measured_and_a_frozen_llm_loses_nothing(tried: tuple[Path, list[Measured]]) -> None:
    _, measured = tried
    shared = [(START, stage) for stage in ("text", "tower-warmup", "align")]
    later = [(arm, stage) for arm in ARMS for stage in ("interleaved", "instruct")]
    assert [(one.arm, one.stage) for one in measured] == shared + later
    told = unchanged(measured, ["LLM frozen"])
    assert [(one["arm"], one["stage"]) for one in told] == [*shared[1:], *later[-2:]]
    assert all(one["bit_equal"] for one in told)
    trained = [one for one in unchanged(measured, list(ARMS)) if one["arm"] not in (START, "LLM frozen")]
    assert len(trained) == 6 and not any(one["bit_equal"] for one in trained)
    for one in measured:
        asked = dict.fromkeys(SMALL_SCENE_QUESTIONS, 6) if one.stage == LAST else {}
        assert {task: len(right) for task, right in one.right.items()} == asked


def test_what_is_finished_is_not_run_again(tried: tuple[Path, list[Measured]], monkeypatch: pytest.MonkeyPatch) -> None:
    out, measured = tried
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert run_tiny(out, monkeypatch) == measured
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_fifth_of_the_tokens_is_text(tried: tuple[Path, list[Measured]]) -> None:
    start = tried[0] / "seed-0" / "start" / "model"
    shares = list(text_shares(arm_recipe("text in both", 0, start), 150))
    assert [share["stage"] for share in shares] == ["interleaved", "instruct"]
    assert all(0.15 < share["tokens"] < 0.25 for share in shares)
    assert all(share["tokens"] < share["loss_tokens"] for share in shares)  # all of a text is predicted
    without = list(text_shares(arm_recipe("no text", 0, start), 20))
    assert [(share["tokens"], share["loss_tokens"]) for share in without] == [(0, 0), (0, 0)]


def made_up() -> list[Measured]:
    """Two seeds; after `no text` every loss is 1.5 times what it was, after `text in both` 1.01 times."""
    measured = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(20, 50, 60).tolist()
        nats = (np.array(tokens) * rng.uniform(0.5, 0.9, 60)).tolist()
        before = Measured(seed, START, BEFORE, nats, tokens, {})
        measured.append(before)
        for arm, factor, right in (("no text", 1.5, [True, False] * 5), ("text in both", 1.01, [True] * 10)):
            lost = [factor * one for one in nats]
            measured.append(Measured(seed, arm, LAST, lost, tokens, dict.fromkeys(SMALL_SCENE_QUESTIONS, right)))
    return measured


def test_points_compare_each_arm_with_the_model_before() -> None:
    measured = made_up()
    points = {point["name"]: point["results"] for point in as_points(measured)}
    assert list(points) == ["before", "no text, instruct", "text in both, instruct"]
    for arm, factor in (("no text", 1.5), ("text in both", 1.01)):
        entry = find(points[f"{arm}, instruct"], "all: loss / before")
        assert entry["value"] == pytest.approx(factor)
        assert (entry["low"], entry["high"]) == (pytest.approx(factor), pytest.approx(factor))
        assert entry["each"] == [pytest.approx(factor)] * 2
    pooled = [one for one in measured if one.arm == START]
    loss = find(points["before"], "all: loss")
    assert loss["value"] == pytest.approx(sum(sum(one.nats) for one in pooled) / sum(sum(one.tokens) for one in pooled))
    assert loss["low"] < loss["value"] < loss["high"]
    task = next(iter(SMALL_SCENE_QUESTIONS))
    assert find(points["no text, instruct"], task)["value"] == 0.5
    above = find(points["text in both, instruct"], f"{task} above no text")
    assert (above["value"], above["n"]) == (50, 20)
    assert above["p"] == pytest.approx(2 / 2**10)
    with pytest.raises(ValueError, match=r"no text, instruct: seeds \[1\]; accepted: those of stage text"):
        as_points([one for one in measured if (one.seed, one.arm) != (0, "no text")])


def test_scenes_asked_about_are_the_same_again() -> None:
    for task in SMALL_SCENE_QUESTIONS:
        first, again = list(scene_items(task, 20)), list(scene_items(task, 20))
        assert [item.question for item in first] == [item.question for item in again]
        assert len({item.media.tobytes() for item in first}) == 20
        assert first[0].question != next(scene_items(task, 1, seed=1)).question or task
        assert all(item.question.answer.split()[0] in item.question.text.split() for item in first)


# What was found


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(RESULTS.read_text())


def test_text_in_training_keeps_the_loss_within_2_percent_and_without_it_is_lost(results: dict) -> None:
    points = {point["name"]: point["results"] for point in results["points"]}
    before = find(points["before"], "all: loss")
    lost = points["no text, instruct"]
    assert len(results["seeds"]) >= 3
    for arm in ("text in instruct", "text in both"):
        kept = points[f"{arm}, instruct"]
        assert find(kept, "all: loss / before")["high"] <= 1.02
        assert all(find(kept, f"{name}: loss / before")["value"] <= 1.02 for name in CATEGORIES)
        assert all(one <= 1.02 for one in find(kept, "all: loss / before")["each"])
        assert find(lost, "all: loss")["low"] > max(before["high"], find(kept, "all: loss")["high"])
    assert all(one > 2 for one in find(lost, "all: loss / before")["each"])


def test_before_is_near_the_languages_entropy(results: dict) -> None:
    points = {point["name"]: point["results"] for point in results["points"]}
    loss, least = (find(points["before"], f"all: {what}")["value"] for what in ("loss", "entropy"))
    assert least < loss < 1.02 * least


def test_text_costs_the_image_tasks_little_but_not_nothing(results: dict) -> None:
    """As the page says: `what_at` loses some points with text, at equal steps."""
    points = {point["name"]: point["results"] for point in results["points"]}
    for arm in ("text in instruct", "text in both"):
        told = points[f"{arm}, instruct"]
        assert find(told, "what_at above no text")["low"] > -4
        assert find(told, "what_at above no text")["high"] < 0
        assert find(told, "colour_at above no text")["low"] > -1
        assert find(told, "what_at")["value"] > 0.85


def test_a_frozen_llm_had_the_very_same_loss(results: dict) -> None:
    assert {(one["arm"], one["stage"]) for one in results["frozen"]} == {
        (START, "tower-warmup"), (START, "align"), ("LLM frozen", "interleaved"), ("LLM frozen", "instruct"),
    }  # fmt: skip
    assert len(results["frozen"]) == 4 * len(results["seeds"])
    assert all(one["bit_equal"] for one in results["frozen"])


def test_tables_and_picture_are_made_of_the_results_alone(results: dict) -> None:
    made = tables(results)
    assert set(made) == {"arms", "categories", "seeds"}
    assert made["arms"].count("\n") == 1 + len(ARMS)
    assert picture(results).startswith(b"\x89PNG")
