"""Runs sequence parallelism on four processes for `test_sequence_parallel.py`: `python sequence_runs.py OUT SCRIPT`.

What the runs give, beside what one process gives that computes one document at a time, lies in OUT as JSON. The
processes are forked, so that libraries are imported once. SCRIPT is `kill_and_resume.py`, which starts whole trainings.
"""

import copy
import gc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from engine_runs import fork
from torch import nn

from foveate.data.document import Document, Image, Text, Video
from foveate.data.encoding import encode, plan_document
from foveate.data.packing import Batch, collate
from foveate.data.sequence import SequenceCollate
from foveate.train import objectives, peers
from foveate.train.acceleration import disable_checkpointing, enable_checkpointing
from foveate.train.adapters import AdapterSettings, add_adapters
from foveate.train.build import build_model
from foveate.train.distributed import World
from foveate.train.engine import Micro, make_engine, shares_weights
from foveate.train.objectives import NextToken, SequenceNextToken
from foveate.train.recipe import ModelRecipe, load_recipe
from foveate.vlm.model import FoveateForConditionalGeneration
from foveate.vlm.parallel.attention import sequence_attention
from foveate.vlm.parallel.plan import Route
from foveate.vlm.parallel.topology import Topology, make_topology
from foveate.vlm.processor import FoveateProcessor

RANKS = 4
GRIDS = [(1, 2), (2, 1), (2, 2), (4, 1), (1, 4)]  # (ulysses, ring)
SQUARE = (2, 2)
RATE = 0.5
PARTS = {"tower": "vision_tower", "projector": "multi_modal_projector", "llm": "language_model"}

VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "patch_size": 4, "image_size": 16, "vision_use_head": False,
}  # fmt: skip
TEXT = {
    "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "pooled": {"video_pool": (2, 1, 1)},
    "dynamic-s2": {"tiling": "dynamic-s2", "s2_scales": [16, 32], "processor": {"max_tiles": 4}},
    "anyres": {"tiling": "anyres", "projector": "mlp2x", "processor": {"max_tiles": 4}},
    "native": {
        "vision": VISION | {"model_type": "siglip2_vision_model", "num_patches": 16}, "tiling": "native",
        "video_pool": (2, 2, 1), "processor": {"max_patches": 64},
    },
}  # fmt: skip
RNG = np.random.default_rng(0)
WORDS = ("red", "blue", "green", "what", "is", "at", "circle", "square")


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)


def words(count: int) -> str:
    return " ".join(RNG.choice(WORDS, count))


# Packs; of the first, the only labels of its long document stand at the end.
SHORT = Document("short", (Text("a"), Text("red", loss=True)))
PACKS = [
    [
        Document("long", (Text("what"), Video(noise(5, 16, 16)), Text(words(30)), Text("circle square", loss=True))),
        SHORT,
    ],
    [
        Document("pair", (Image(noise(20, 60)), Text(words(3), loss=True), Image(noise(16, 16)), Text(words(9)))),
        SHORT,
        Document("both", (Video(noise(2, 16, 24)), Image(noise(30, 16)), Text(words(4), loss=True))),
    ],
    [Document("text", (Text(words(5)), Text(words(8), loss=True))), SHORT],
]
# Of steps; divided among one to twelve packs.
STEP = [
    (
        Document(f"clip/{number}", (Text("what"), Video(noise(1 + number % 5, 16, 16)), Text(words(4), loss=True))),
        Document(f"picture/{number}", (Image(noise(16, 16)), Text(words(2 + number % 3), loss=True))),
        Document(f"text/{number}", (Text(words(3)), Text(words(5), loss=True))),
    )[number % 3]
    for number in range(12)
]


def made(options: dict[str, Any], lora: bool = False) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    processing = {"image_size": (16, 16), "video_size": (16, 16)} | options.get("processor", {})
    torch.manual_seed(0)
    fields = {"vision": VISION, "text": TEXT, "vision_feature_layer": None} | options | {"processor": processing}
    model, processor = build_model(ModelRecipe(**fields))
    for module in [*model.language_model.modules()]:
        for name, child in module.named_children():
            if type(child).__name__ == "Qwen2RMSNorm":  # which computes in fp32
                setattr(module, name, nn.RMSNorm(TEXT["hidden_size"], child.variance_epsilon))
    if lora:
        add_adapters(model, AdapterSettings(rank=2, alpha=4))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.double().train(), processor


# One process, one document at a time


def alone(document: Document, processor: FoveateProcessor) -> Batch:
    return collate([[encode(document, processor)]], processor, raw_pixels=True)


def loss_tokens(documents: list[Document], processor: FoveateProcessor) -> int:
    return sum(encode(document, processor).loss_tokens for document in documents)


@contextmanager
def hidden_states(model: FoveateForConditionalGeneration) -> Iterator[list[torch.Tensor]]:
    """What the decoder gives in each call, [tokens, D]."""
    seen: list[torch.Tensor] = []
    decoder: Any = model.get_decoder()
    hook = decoder.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state[0].detach()))
    try:
        yield seen
    finally:
        hook.remove()


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """By name, and cleared; of parameters that the loss does not reach zeros."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
    return found


def by_documents(model: FoveateForConditionalGeneration, processor: FoveateProcessor) -> dict[str, Any]:
    """The reference: loss, hidden states of each pack, labels, gradients."""
    objective = NextToken(model, processor, chunks=1, same_calls=False)
    documents = [document for pack in PACKS for document in pack]
    total = loss_tokens(documents, processor)
    with hidden_states(model) as seen:
        losses = [objective(alone(document, processor).inputs, total) for document in documents]
        torch.stack(losses).sum().backward()
    states = iter(seen)
    samples = [encode(document, processor) for document in documents]
    return {
        "total": total,
        "loss": sum(loss.item() for loss in losses),
        "hidden": [torch.cat([next(states) for _ in pack]) for pack in PACKS],
        "labels": sorted(int(label) for sample in samples for label in sample.labels if label >= 0),
        "gradients": gradients(model),
    }


# Four processes


def share(processor: FoveateProcessor, documents: list[Document], topology: Topology) -> Batch:
    """This rank's part of a pack."""
    collation = SequenceCollate(processor, topology)
    samples = [plan_document(document, processor) for document in documents]
    return collation(samples, collation.read(samples))


def shared(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, topology: Topology, reference: dict[str, Any]
) -> dict[str, Any]:
    """How far a grid's ranks are from the reference, and what each of them had to do."""
    batches = [share(processor, pack, topology) for pack in PACKS]
    own = range(topology.data_rank, len(PACKS), topology.data_size)
    objective = SequenceNextToken(model, processor, 2, False, topology)
    loss, apart, labels = torch.zeros((), dtype=torch.float64), 0.0, []
    for number in own:
        inputs = batches[number].inputs
        with hidden_states(model) as seen, sequence_attention(model, topology.ulysses):
            local = objective(inputs, reference["total"])
            local.backward()
        loss += local.detach()
        parts = [torch.empty_like(seen[0]) for _ in range(topology.degree)]
        dist.all_gather(parts, seen[0].contiguous(), group=topology.group)
        hidden = inputs["sequence"].plan.unshard([part.T for part in parts]).T
        apart = max(apart, float((hidden - reference["hidden"][number]).abs().max()))
        labels += inputs["targets"][inputs["targets"] >= 0].tolist()
    dist.all_reduce(loss)
    found = gradients(model)
    for gradient in found.values():
        dist.all_reduce(gradient)
    wanted = reference["gradients"]
    assert found.keys() == wanted.keys()
    errors = {}
    for part in {name.partition(".")[0] for name in wanted}:
        names = [name for name in wanted if name.startswith(part)]
        most = max(float(wanted[name].abs().max()) for name in names)
        errors[part] = max(float((found[name] - wanted[name]).abs().max()) for name in names) / most
    told: list[Any] = [None] * RANKS
    facts = [
        {
            "labels": int((batch.inputs["targets"] >= 0).sum()),
            "frames": len(batch.inputs.get("pixel_values_videos", ())),
            "images": len(batch.inputs.get("image_grids", ())),
        }
        for batch in batches
    ]
    dist.all_gather_object(told, (labels, facts, apart))
    return {
        "loss": abs(loss.item() - reference["loss"]),
        "hidden": max(of_rank[2] for of_rank in told),
        "gradients": errors,
        "labels": sorted(label for of_rank in told for label in of_rank[0]) == reference["labels"],
        "ranks": [of_rank[1] for of_rank in told[: topology.degree]],
        "found": found,
    }


def reduced(features: torch.Tensor, route: Route, group: dist.ProcessGroup) -> torch.Tensor:
    """In the place of `exchange_tokens`: all visual tokens on every rank, by a plain all_reduce."""
    rank = dist.get_rank(group)
    towards = torch.empty(len(features), dtype=torch.int64)
    towards[route.send_index] = torch.arange(len(route.send_counts)).repeat_interleave(torch.tensor(route.send_counts))
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, towards, group=group)
    counts = [len(of_rank) for of_rank in told]
    whole = features.new_zeros(sum(counts), features.shape[1])
    whole[sum(counts[:rank]) : sum(counts[: rank + 1])] = features
    dist.all_reduce(whole, group=group)
    return whole[torch.cat(told) == rank]


def equal_gradients(world: World, prepared: dict[str, Any]) -> dict[str, Any]:
    """Each run's distance from the reference."""
    grids = {grid: make_topology(*grid) for grid in GRIDS}
    square = grids[SQUARE]
    runs: dict[str, Any] = {}
    for name, (model, processor, reference) in prepared.items():
        for grid in GRIDS if name == "pooled" else [SQUARE]:
            runs[f"{name} {grid[0]}x{grid[1]}"] = shared(model, processor, grids[grid], reference)
    model, processor, reference = prepared["pooled"]
    plain = runs["pooled 2x2"]["found"]
    enable_checkpointing(model)
    checkpointed = runs["checkpointed 2x2"] = shared(model, processor, square, reference)
    disable_checkpointing(model)
    checkpointed["same"] = all(plain[name].equal(gradient) for name, gradient in checkpointed["found"].items())
    exchange, objectives.exchange_tokens = objectives.exchange_tokens, reduced
    runs["all_reduce 2x2"] = shared(model, processor, square, reference)
    objectives.exchange_tokens = exchange
    for part in ("vision_tower", "multi_modal_projector"):
        model.get_submodule(part).requires_grad_(False)
    llm = {name: wanted for name, wanted in reference["gradients"].items() if name.startswith(PARTS["llm"])}
    runs["frozen 2x2"] = shared(model, processor, square, reference | {"gradients": llm})
    model.requires_grad_(True)
    for run in runs.values():
        del run["found"]
    return runs


# Steps of engines


def optimizer_of(model: FoveateForConditionalGeneration) -> torch.optim.Optimizer:
    groups = [
        {"params": [*model.get_submodule(name).parameters()], "part": part} for part, name in PARTS.items()
    ]  # fmt: skip
    return torch.optim.SGD(groups, lr=RATE)


def step_alone() -> dict[str, Any]:
    """The reference: how a step of gradient descent changes each parameter, in fp64."""
    model, processor = made(OPTIONS["pooled"])
    objective = NextToken(model, processor, chunks=1, same_calls=False)
    total = loss_tokens(STEP, processor)
    losses = [objective(alone(document, processor).inputs, total) for document in STEP]
    torch.stack(losses).sum().backward()
    changes = {name: -RATE * gradient for name, gradient in gradients(model).items()}
    return {"total": total, "loss": sum(loss.item() for loss in losses), "changes": changes}


def equal_steps(world: World, reference: dict[str, Any]) -> dict[str, Any]:
    """How far a step of each engine, grid and number of micro-batches is from the reference."""
    runs = {}
    first, processor = made(OPTIONS["pooled"])
    for grid in ((1, 1), (2, 1), SQUARE):
        topology = make_topology(*grid)
        for accumulation in (1, 3):
            count = topology.data_size * accumulation
            packs = [STEP[number::count] for number in range(count)]
            own = packs[topology.data_rank * accumulation :][:accumulation]
            if topology.degree == 1:
                batches = [collate([[encode(d, processor) for d in pack]], processor, True) for pack in own]
            else:
                batches = [share(processor, pack, topology) for pack in own]
            micro = [Micro(batch.inputs, batch.keys) for batch in batches]
            for name in ("torch", "zero1", "zero2", "zero3"):
                precision = "fp64" if name == "torch" else "fp32"  # DeepSpeed has no fp64
                model = copy.deepcopy(first).to(torch.float64 if name == "torch" else torch.float32)
                same_calls = shares_weights(name)
                if topology.degree == 1:
                    objective: nn.Module = NextToken(model, processor, 1, same_calls)
                else:
                    objective = SequenceNextToken(model, processor, 1, same_calls, topology)
                before = {name: value.detach().double().clone() for name, value in model.named_parameters()}
                engine = make_engine(name, objective, optimizer_of(model), precision, None, world, accumulation)
                if topology.degree == 1:
                    result = engine.step(micro, reference["total"])
                else:
                    with sequence_attention(model, topology.ulysses):
                        result = engine.step(micro, reference["total"])
                after = engine.full_weights()
                if name == "torch":
                    after = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
                engine.close()
                if world.rank == 0:
                    wanted = reference["changes"]
                    most = max(float(change.abs().max()) for change in wanted.values())
                    errors = [
                        float((after[f"model.{name}"].double() - before[name] - wanted[name]).abs().max()) / most
                        for name in wanted
                    ]
                    run = f"{name} {grid[0]}x{grid[1]} accumulation {accumulation}"
                    runs[run] = {"change": max(errors), "loss": abs(result.loss / reference["loss"] - 1)}
    return runs


# Whole trainings

RECIPE = """
name: shared
threads: 1
precision: fp32
model:
  vision: {model_type: siglip2_vision_model, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
           num_attention_heads: 2, patch_size: 8, num_patches: 64, vision_use_head: false}
  text: {model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
         num_key_value_heads: 1, tie_word_embeddings: true, max_position_embeddings: 2048}
  vision_feature_layer: null
  video_pool: [2, 1, 1]
  processor: {image_size: [64, 64], video_size: [32, 32]}
tracking: {wandb: disabled, every_steps: 1, documents: true}
checkpoint: {every_steps: 1, keep: 2}
validation: {every_steps: 4, documents: 6}
stages:
  - name: warmup
    objective: region_text
    steps: 2
    optimizer: sgd
    parallel: {ulysses: 1, ring: 1}
    learning_rates: {tower: 0.1, projector: 0.1}
    batch: {rows: 1, micro_batches: 4}
    data: [{kind: regions}]
  - name: video
    steps: 8
    optimizer: sgd
    momentum: 0.9
    activation_checkpointing: true
    learning_rates: {tower: 0.1, projector: 0.1, llm: 0.1}
    batch: {rows: 2, tokens: 120, window: 4, reserve: 2, micro_batches: 2}
    data: [{kind: clip_chat, frames: [2, 6]}, {kind: captions, objects: [1, 4]}]
"""
# (processes, ulysses, ring, step after which which of the processes is killed, and which then waits without
# an error, as with NCCL) of runs in one folder.
CHAIN = [(4, 2, 2, 4, 2, 3), (4, 2, 2, 6, 0, -1), (4, 1, 2, 8, 3, -1), (1, 1, 1, 0, 0, -1)]


def trainings(out: Path, script: str) -> None:
    """One process that is never stopped; and runs of several that are killed, each of which goes on from the last."""
    spec = importlib.util.spec_from_file_location("kill_and_resume", script)
    assert spec is not None and spec.loader is not None
    forked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(forked)
    (out / "shared.yaml").write_text(RECIPE)

    def run(name: str, ranks: int, ulysses: int, ring: int, step: int, victim: int, stuck: int) -> dict[str, Any]:
        def after_step(done: int) -> None:
            if done == step and os.environ["RANK"] == str(victim):
                killed_at.write_text(str(time.monotonic()))
                os.kill(os.getpid(), signal.SIGKILL)
            if done == step and os.environ["RANK"] == str(stuck):
                time.sleep(100)

        peers.STUCK_S = 30.0 if stuck < 0 else 0.1
        killed_at = out / "killed_at"
        killed_at.write_text("0")
        overrides = [f"parallel.ulysses={ulysses}", f"parallel.ring={ring}", "timeout_s=50"]
        codes = forked.end(forked.start(load_recipe(out / "shared.yaml", overrides), out / name, ranks, after_step))
        logs = [out / f"{name}.{rank}.log" for rank in range(ranks)]
        told = [log.read_text().splitlines() for log in logs]
        for log in logs:
            log.unlink()
        return {"codes": codes, "told": told, "ended_s": time.monotonic() - float(killed_at.read_text())}

    found = {"whole": [run("whole", 1, 1, 1, 0, 0, -1)], "killed": [run("killed", *link) for link in CHAIN]}
    (out / "trainings.json").write_text(json.dumps(found))


def main(out: Path, script: str) -> None:
    out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for late in ("foveate.train.zero", "deepspeed.runtime.zero.muon.muon_optimizer"):  # else each fork imports them
        importlib.import_module(late)
    prepared = {}
    for name, options in OPTIONS.items():
        made_of = made(options)
        prepared[name] = (*made_of, by_documents(*made_of))
    adapted = made(OPTIONS["pooled"], lora=True)
    prepared["lora"] = (*adapted, by_documents(*adapted))
    of_step = step_alone()
    gc.collect()
    gc.freeze()  # a collection in a fork then passes over the libraries

    def work(world: World) -> None:
        found = {}
        for name, part, given in (("gradients", equal_gradients, prepared), ("steps", equal_steps, of_step)):
            began = time.monotonic()
            found[name] = part(world, given)
            found[f"{name}_s"] = time.monotonic() - began
        if world.rank == 0:
            (out / "found.json").write_text(json.dumps(found))

    fork(RANKS, work, out, timeout_s=150)
    trainings(out, script)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
