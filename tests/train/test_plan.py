"""Plans, against models, engines, processors and PyTorch's own books."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from foveate.train.build import add_stage_adapters, build_config, build_model
from foveate.train.engine import deepspeed_config
from foveate.train.memory import ActivationShape, Counts, LayerShape, Mode, compute_mode, model_states
from foveate.train.optimizer import make_optimizer, set_trainable
from foveate.train.plan import Plan, plan, planned_tiles, print_plan
from foveate.train.recipe import Recipe, RecipeError, load_recipe
from foveate.train.shapes import LLMS, TOWERS, known_llm, known_tower
from foveate.train.stages import encoded_tiles, make_loader

RUNS = Path(__file__).with_name("memory_runs.py")


@pytest.fixture(scope="module")
def plans() -> Callable[..., Plan]:
    """Plans of shipped recipes, each made once."""
    made: dict[tuple, Plan] = {}

    def of(name: str, *overrides: str, gpus: int = 64) -> Plan:
        key = (name, overrides, gpus)
        return made.get(key) or made.setdefault(key, plan(load_recipe(name, overrides), gpus))

    return of


# Shapes


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("princeton-nlp/Sheared-LLaMA-2.7B", 2.70e9),  # arXiv 2310.06694
        ("meta-llama/Llama-2-7b-hf", 6.74e9),  # its model card
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8.03e9),
        ("Qwen/Qwen2-1.5B-Instruct", 1.54e9),
        ("Qwen/Qwen2-7B-Instruct", 7.62e9),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1.54e9),
        ("Qwen/Qwen2.5-7B-Instruct", 7.62e9),  # 7.61B
        ("google/siglip-so400m-patch14-384", 0.4e9),  # without its pooling head
        ("Efficient-Large-Model/paligemma-siglip-so400m-patch14-448", 0.4e9),
    ],
)
def test_known_shapes_have_the_published_parameters(name: str, published: float) -> None:
    with torch.device("meta"):
        if name in TOWERS:
            model = AutoModel.from_config(known_tower(name))
        else:
            model = AutoModelForCausalLM.from_config(known_llm(name))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0.04 if name in TOWERS else 0.003)


def test_every_known_shape_is_held_to_a_published_one() -> None:
    (mark,) = [mark for mark in test_known_shapes_have_the_published_parameters.pytestmark]
    assert {name for name, _ in mark.args[1]} == {*TOWERS, *LLMS}


def test_media_tokens_have_room() -> None:
    assert known_llm("princeton-nlp/Sheared-LLaMA-2.7B").vocab_size == 32002
    assert known_llm("Qwen/Qwen2.5-7B-Instruct").vocab_size == 152064  # padded, larger than its 151665 tokens


@pytest.mark.parametrize("field", ["vision", "text"])
def test_a_part_that_is_nowhere_is_named(field: str) -> None:
    recipe = load_recipe("nvila-8b", [f"model.{field}=nobody/nothing"])
    with pytest.raises(RecipeError, match=f"model.{field} is 'nobody/nothing', whose configuration .* accepted"):
        plan(recipe)


def test_a_part_at_hand_goes_before_the_table(tmp_path: Path) -> None:
    name = "Qwen/Qwen2-7B-Instruct"
    AutoConfig.for_model("qwen2", hidden_size=24).save_pretrained(tmp_path / name)
    with contextlib.chdir(tmp_path):
        assert known_llm(name).hidden_size == 24
    assert known_llm(name).hidden_size == 3584


# Parameters


@pytest.mark.parametrize("name", ["tiny-nvila-8b", "tiny-longvila-8b"])
def test_parameters_are_the_models(name: str) -> None:
    recipe = load_recipe(name)
    made = plan(recipe, gpus=4)
    model, _ = build_model(recipe.model)
    assert sum(made.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert made.parameters["tower"] == sum(p.numel() for p in model.vision_tower.parameters())
    for stage, planned in zip(recipe.stages, made.stages, strict=True):
        model, _ = build_model(recipe.model)
        add_stage_adapters(model, stage)
        set_trainable(model, stage)
        groups = make_optimizer(model, stage).param_groups
        trained = {
            part: sum(p.numel() for group in groups if group["part"] == part for p in group["params"])
            for part in stage.learning_rates
        }
        assert planned.trained == trained


def test_a_checkpoint_is_planned_as_what_it_was_saved_from(tmp_path: Path) -> None:
    recipe = load_recipe("tiny-nvila-8b")
    model, processor = build_model(recipe.model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    at_hand = recipe.model_copy(update={"model": recipe.model.model_validate({"path": str(tmp_path)})})
    assert asdict(plan(at_hand)) == asdict(plan(recipe))


# Tokens


@pytest.mark.parametrize(
    ("name", "overrides", "square", "wide", "video", "video_tokens"),
    [
        ("vila-1.5-3b", (), (1, 196), (1, 196), 8, 1568),
        ("nvila-lite-8b", (), (10, 1210), (13, 1573), 8, 968),
        ("nvila-8b", (), (14, 2304), (17, 3072), 8, 2048),  # NVILA, arXiv 2412.04468, table 1
        ("nvila-8b", ("model.projector=downsample-3x3",), (14, 1089), (17, 1452), 8, 968),
        ("nvila-8b-video", (), (1, 256), (1, 256), 256, 8192),
        ("longvila-8b", (), (1, 196), (1, 196), 2048, 401408),
    ],
)
def test_published_tokens_of_images_and_videos(
    plans: Callable[..., Plan],
    name: str,
    overrides: tuple[str, ...],
    square: tuple[int, int],
    wide: tuple[int, int],
    video: int,
    video_tokens: int,
) -> None:
    media = {(m.height, m.width, m.frames): (m.tiles, m.tokens) for m in plans(name, *overrides).media}
    assert media[1344, 1344, 0] == square
    assert media[768, 1024, 0] == wide  # 4:3
    assert {frames: found for (*_, frames), found in media.items() if frames == video}[video] == (video, video_tokens)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.tiling=resize", "model.s2_scales=null"],
        ["model.tiling=s2"],
        ["model.tiling=dynamic-s2"],
        ["model.tiling=tiles", "model.s2_scales=null"],
        ["model.tiling=native", "model.s2_scales=null"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_planned_tiles_are_those_that_are_cut(overrides: list[str]) -> None:
    _, processor = build_config(load_recipe("tiny-nvila-8b", overrides).model)
    sizes = [(40, 90), (64, 64), (200, 30)]
    images = [np.zeros((height, width, 3), np.uint8) for height, width in sizes]
    clip = np.zeros((5, 48, 64, 3), np.uint8)
    (media,) = processor.read_media([images], [[clip]])
    cut = encoded_tiles(processor.tiling, media)
    assert planned_tiles(processor, processor.plan(sizes, [clip])) == cut
    assert (cut[0] == cut[1]) == (processor.s2_scales is None)


# Operations and time


def test_a_steps_operations_are_what_the_loader_counts(tiny_recipe: Callable[..., Recipe]) -> None:
    """Of the embedded data, whose documents are looked at; rows are taken to be full."""
    recipe = tiny_recipe()
    made = plan(recipe, gpus=1)
    model, processor = build_model(recipe.model)
    for number, planned in enumerate(made.stages[1:], 1):
        loader = make_loader(recipe, number, model.config, processor)
        steps = [loader.next() for _ in range(12)]
        filled = sum(step.tokens for step in steps) / sum(step.positions for step in steps)
        assert planned.flops.model * filled == pytest.approx(sum(sum(s.costs) for s in steps) / 12, rel=0.15)
        assert planned.documents * filled == pytest.approx(sum(s.documents for s in steps) / 12, rel=0.2)


def test_an_llms_step_follows_the_6nd_rule(plans: Callable[..., Plan]) -> None:
    """6·N·D (arXiv 2001.08361, section 2.1) of the LLM's layers, twice that of a tower that nothing trains before."""
    made = plans("nvila-8b")
    step = next(stage for stage in made.stages if stage.name == "pretrain")
    llm = 7.616e9 - 2 * 152064 * 3584  # neither the embedding nor, where nothing is predicted, the head multiplies
    expected = 6 * llm * step.tokens + 2 * made.parameters["tower"] * 1024 * step.tiles
    assert step.flops.model == pytest.approx(expected, rel=0.1)
    assert step.tokens == 576 * 8192


def test_time_is_operations_over_the_gpus_share(plans: Callable[..., Plan]) -> None:
    few, many = plans("nvila-8b"), plan(load_recipe("nvila-8b"), gpus=128, gpu="A100", mfu=0.2)
    for a, b in zip(few.stages, many.stages, strict=True):
        assert a.step_s == pytest.approx(a.flops.model / (64 * 989e12 * 0.4))
        assert b.step_s == pytest.approx(a.step_s * 989 / 312)
        assert a.total_s is None
        assert a.million_documents_s == pytest.approx(1e6 / a.documents * a.step_s)
    extension = plans("longvila-8b").stages[3]
    assert extension.total_s == pytest.approx(40 * extension.step_s)


def test_what_a_source_says_of_its_documents_counts() -> None:
    def tokens(*overrides: str) -> tuple[float, float]:
        stage = plan(load_recipe("nvila-8b-video", overrides)).stages[4]
        return stage.documents, stage.tiles

    documents, tiles = tokens("stages.video.data=[llava-video-178k]")
    assert documents == pytest.approx(1024 * 16384 / (8192 + 32 + 128))
    assert tiles == pytest.approx(256 * documents)
    more, _ = tokens("stages.video.data=[{source: llava-video-178k, mean_tokens: 9000}]")
    assert more == pytest.approx(1024 * 16384 / 9000)
    both, _ = tokens("stages.video.data=[llava-video-178k*3, llava-instruct]")
    assert both == pytest.approx(1024 * 16384 / (0.75 * 8352 + 0.25 * (256 + 128)))


# Memory


@pytest.fixture(scope="module")
def memory_runs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_runs", RUNS)
    runs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runs)
    return runs


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, memory_runs: ModuleType
) -> tuple[dict[str, int], ModuleType, Path]:
    """Bytes that one of two ranks holds, by engine and precision."""
    folder = tmp_path_factory.mktemp("engines")
    done = subprocess.run(
        [sys.executable, str(RUNS), str(folder)],
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), memory_runs, folder


@pytest.mark.parametrize(
    ("name", "precision"),
    [("torch", "bf16"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3", "bf16"), ("zero3", "fp32")],
)
def test_model_states_are_what_the_engines_hold(
    engines: tuple[dict[str, int], ModuleType, Path], name: str, precision: str
) -> None:
    held, runs, folder = engines
    stage = 0 if name == "torch" else int(name[-1])
    counts = Counts.of(runs.make_model(), runs.THRESHOLD)
    mode = compute_mode(stage, precision)
    zero = deepspeed_config(runs.engine_name(name, folder))["zero_optimization"] if stage else {}
    states = model_states(stage, mode, counts, runs.RANKS, 2, zero)
    assert 0 < counts.trained < counts.every and 0 < counts.small < counts.every
    buffers = runs.BUCKET * (2 if mode == "bf16" else 4) if stage == 3 else 0  # others are freed when a step ends
    expected = states.weights + states.gradients + states.optimizer + buffers
    assert held[f"{name} {precision}"] == pytest.approx(expected, rel=0.002)


def test_a_quantised_llms_weights_are_those_that_are_held() -> None:
    recipe = load_recipe("tiny-longvila-8b", ["stages.context-64k.lora.quantize=true"])
    stages = {stage.name: stage.memory[0] for stage in plan(recipe).stages}
    model, _ = build_model(recipe.model)
    add_stage_adapters(model, recipe.stages[3])
    # beside these are the scales, an eighth of a bit a weight
    held = sum(p.untyped_storage().nbytes() for p in model.parameters())
    assert stages["context-64k"].weights == pytest.approx(held, rel=0.05)
    assert stages["context-64k"].weights < 0.6 * stages["context-256k"].weights
    assert stages["context-64k"].optimizer == stages["context-256k"].optimizer


@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("mode", ["bf16", "autocast", "fp32"])
@pytest.mark.parametrize("part", ["tower", "llm"])
def test_activations_are_what_autograd_keeps(memory_runs: ModuleType, part: str, mode: Mode, trains: bool) -> None:
    """What a second and a third layer add, with flash attention."""
    tokens, sizes = 256, {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8}
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    kept = []
    for layers in (1, 3):
        if part == "llm":
            config = AutoConfig.for_model(
                "qwen2", num_hidden_layers=layers, num_key_value_heads=2, vocab_size=64, **sizes
            )
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").model
            embeds = torch.randn(1, tokens, 128, dtype=dtype, requires_grad=True)
            inputs = {"inputs_embeds": embeds, "position_ids": torch.arange(tokens)[None], "use_cache": False}
        else:
            options = {"image_size": 128, "patch_size": 8, "vision_use_head": False, "num_hidden_layers": layers}
            config = AutoConfig.for_model("siglip_vision_model", **sizes, **options)
            model = AutoModel.from_config(config, attn_implementation="sdpa")
            inputs = {"pixel_values": torch.randn(1, 3, 128, 128, dtype=dtype)}
        model.to(dtype).requires_grad_(trains)
        if part == "tower":
            model.get_input_embeddings().requires_grad_(True)  # so that gradients reach the layers' start
        shape = LayerShape.of(model, list(model.layers if part == "llm" else model.encoder.layers))
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            found = memory_runs.saved_bytes(model, inputs)
        kept.append(found - shape.activations(tokens, mode, trains, checkpointing=False))
    assert kept[0] == kept[1]  # all else than layers is the same
    assert shape.layers == 3 and shape.gated == (part == "llm")


@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("mode", ["bf16", "autocast", "fp32"])
@pytest.mark.parametrize("shared", [(1, 1), (2, 1), (1, 2)], ids=lambda shared: f"{shared[0]}x{shared[1]}")
def test_activations_are_what_autograd_keeps_of_shared_rows(
    engines: tuple[dict[str, int], ModuleType, Path], shared: tuple[int, int], mode: Mode, trains: bool
) -> None:
    """Of two layers, by one of two ranks; with a row of two the one head of keys and values is repeated."""
    held, runs, _ = engines
    ulysses, ring = shared
    model = runs.make_llm(2, mode, trains)
    shape = LayerShape.of(model, list(model.layers))
    assert shape.sent_key_value(ulysses) == 16 * ulysses
    expected = shape.activations(runs.TOKENS, mode, trains, checkpointing=False, ulysses=ulysses)
    assert held[f"{ulysses}x{ring} {mode} {trains}"] == expected


@pytest.mark.parametrize("shared", [(2, 1), (1, 2)], ids=["ulysses", "ring"])
def test_exchanges_take_no_more_than_their_buffers(
    engines: tuple[dict[str, int], ModuleType, Path], shared: tuple[int, int]
) -> None:
    """What lives at most while a layer attends, over what does on one rank, less what its activations are."""
    held, runs, _ = engines
    ulysses, ring = shared
    shape = LayerShape.of(llm := runs.make_llm(1, "bf16", True), list(llm.layers))
    kept = [runs.TOKENS * shape.bytes_a_token("bf16", False, u) for u in (1, ulysses)]
    more = held[f"{ulysses}x{ring} attended"] - held["1x1 attended"] - (kept[1] - kept[0])
    buffers = ActivationShape(shape, shape, 0, 64).exchange_buffers(runs.TOKENS, 0, "bf16", ulysses, ring)
    assert 0.5 * buffers < more <= buffers


def test_checkpointed_layers_keep_their_inputs(plans: Callable[..., Plan]) -> None:
    shape = LayerShape(4, 128, 128, 32, 8, 352, gated=True, rms=True, matrices=0)
    one = shape.bytes_a_token("bf16", True)
    assert shape.activations(10, "bf16", True, checkpointing=True) == 10 * (4 * 2 * 128 + one)
    for stage in plans("nvila-8b").stages:
        for plain, checkpointed in stage.activations.values():
            assert plain > 2 * checkpointed
        assert stage.memory[3].activations == stage.activations[3][1]


def test_zero_shares_what_its_stage_shares(plans: Callable[..., Plan]) -> None:
    """arXiv 1910.02054, section 3: of 16 bytes a parameter 12 are shared from stage 1, then gradients, then weights."""
    few, many = plans("nvila-8b", gpus=8).stages[3].memory, plans("nvila-8b").stages[3].memory
    every = sum(plans("nvila-8b").parameters.values())
    assert many[0].weights + many[0].gradients + many[0].optimizer == pytest.approx(16 * every)
    for zero in (1, 2, 3):
        assert (
            many[zero].optimizer == pytest.approx(12 * every / 64) and few[zero].optimizer == 8 * many[zero].optimizer
        )
    assert many[2].gradients == few[2].gradients / 8
    assert many[2].weights == few[2].weights == 2 * every
    assert many[3].weights == pytest.approx(2 * every / 64, rel=0.1)  # with what is too small to share


# Shared rows


def test_longvilas_stages_fit_their_gpus_as_they_are_shared(plans: Callable[..., Plan]) -> None:
    made = plans("longvila-8b", gpus=8)
    assert [(stage.ulysses, stage.ring) for stage in made.stages[4:]] == [(4, 1), (4, 2), (4, 2), (4, 2)]
    assert all(stage.memory[3].total < made.gpu_memory for stage in made.stages)
    assert made.notes == []


def test_a_shared_row_is_its_ranks_parts(plans: Callable[..., Plan]) -> None:
    """4 ranks keep of 256k tokens what one keeps of 64k, and the output of attention once more; see the formulas."""
    extension, shared = plans("longvila-8b").stages[3:5]
    more = 28 * 65536 * 2 * 3584  # of all layers
    assert shared.activations[3][0] == extension.activations[3][0] + more
    assert shared.activations[3][1] == extension.activations[3][1] + more / 28  # of the one that is computed again
    assert shared.memory[3].weights == extension.memory[3].weights
    exchanged = 65536 * 2 * 2 * (3584 + 2 * 512)  # of a layer, sent and received
    assert shared.memory[3].buffers == extension.memory[3].buffers + exchanged


def test_a_shared_video_is_its_ranks_frames(plans: Callable[..., Plan]) -> None:
    rate = 64 * 989e12 * 0.4
    shared = plans("longvila-8b").stages[7]
    assert shared.imbalance == 1 and shared.step_s == pytest.approx(shared.flops.model / rate)
    ranks = plans("longvila-8b", "stages.long-sft.parallel={ulysses: 4, ring: 4}").stages[7]
    logits = 1024 * 152064 * (2 + 8)
    assert ranks.activations[3][0] - logits == pytest.approx((shared.activations[3][0] - logits) / 2)
    assert ranks.flops == shared.flops
    odd = plans("longvila-8b", "sources.longvila-sft.frames=12", "stages.long-sft.batch.tiles=12").stages[7]
    assert odd.imbalance == pytest.approx(2 / 1.5)  # 12 frames of 8 ranks
    assert odd.step_s > 1.01 * odd.flops.model / rate


def test_what_is_sent_is_the_formulas(plans: Callable[..., Plan]) -> None:
    """Heads (U - 1) / U · (2H + 2K) / P each way; ring (R - 1) / R · 2K / U, backward that and 2K / U in fp32."""
    stage = plans("longvila-8b", gpus=16).stages[6]
    of_row = 2**20 * 128 * 2 * (3 / 4 * (2 * 28 + 2 * 4) / 8 * 3 + 1 / 2 * 2 * 4 / 4 * 3 + 2 * 2 * 4 / 4)
    assert stage.sent == 28 * of_row * 64 / 2  # layers; rows of two groups; the forward pass runs twice
    assert plans("longvila-8b", gpus=16).stages[3].sent == 0


def test_heads_that_can_not_be_shared_are_refused() -> None:
    recipe = load_recipe("longvila-8b", ["stages.align.parallel={ulysses: 14}"])  # of the scripts
    with pytest.raises(RecipeError, match=r"stages.align: parallel: ulysses is 14.*accepted: 1, 2, 4, 28"):
        plan(recipe, gpus=56)


# Notes


def test_what_can_not_train_is_said(plans: Callable[..., Plan]) -> None:
    alone = [f"stages.context-{length}.parallel=null" for length in ("256k", "512k", "1m")]
    notes = plans("longvila-8b", *alone).notes
    assert any("context-1m: engine zero3 takes" in note and "none, of ZeRO-0 to 3" in note for note in notes)
    assert [note.rpartition("; ")[2].rpartition(",")[0] for note in notes[1:]] == [
        "parallel that fits: {ulysses: 2, ring: 1}",
        "parallel that fits: {ulysses: 4, ring: 1}",
        "parallel that fits: {ulysses: 4, ring: 2}",
    ]
    assert any("64 GPUs can't share the micro_batches of stages context-64k evenly" in note for note in notes)
    assert plans("nvila-8b").notes == []
    small = plan(load_recipe("nvila-8b", ["engine=zero1"]), gpu="A40", gpus=64).notes
    assert any("stages.sft: engine zero1 takes" in note and "those that fit: zero2, zero3" in note for note in small)
    odd = plan(load_recipe("longvila-8b"), gpus=12).notes
    assert any("12 GPUs are no multiple of those that share a row in stages context-512k, context-1m" in n for n in odd)
    short = plan(load_recipe("nvila-8b", ["stages.align.batch.tokens=2048"]), gpus=64).notes
    assert any("llava-cc3m-pretrain as assumed has 3,200 tokens and 17 tiles; a row accepts 2,048" in n for n in short)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "H1000"}, "gpu is 'H1000'; accepted: B200"),
        ({"gpus": 0}, "gpus is 0"),
        ({"mfu": 1.5}, "mfu 1.5"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(load_recipe("tiny-nvila-8b"), **options)


def test_a_plan_prints_and_is_json(plans: Callable[..., Plan]) -> None:
    made = plans("nvila-8b")
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_plan(made, console)
    text = console.export_text()
    assert "8.09 B parameters" in text and "3,072" in text and "ZeRO" in text
    assert all(stage.name in text for stage in made.stages)
    assert json.loads(json.dumps(asdict(made)))["stages"][3]["memory"]["3"]["weights"] > 0
