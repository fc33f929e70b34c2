"""Runs every engine on 1, 2 and 4 processes for `test_engine.py`: `python engine_runs.py OUT`.

What each run gives lies in OUT as safetensors and JSON. The processes are forked, so that libraries are imported once.
"""

import gc
import importlib
import json
import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from foveate.train.distributed import World, init_world
from foveate.train.engine import Engine, Micro, NonFiniteError, deepspeed_config, make_engine
from foveate.vlm.config import FoveateConfig
from foveate.vlm.model import FoveateForConditionalGeneration

SIZES = (1, 2, 4)
STEPS = 3
CLIP = 0.02  # below every gradient norm here
IMAGE, VOCABULARY = 60, 64
DOCUMENTS = 16

# Engines whose parameters after three steps are compared; every size of world, one micro-batch a rank and four.
EQUAL = ("torch", "zero0", "zero1", "small2", "small3")
# Whose states are written, as (precision, ranks, engine) …
WRITTEN = (
    *(("fp32", 1, name) for name in ("torch", "small2")),
    *(("fp32", 2, name) for name in ("torch", "zero1", "zero2-offload", "small3")),
    *(("fp32", 4, name) for name in ("torch", "small2", "zero3-offload")),
    *(("bf16", 2, name) for name in ("torch", "zero0", "zero1", "small2", "small3")),
)
# … and which engines load those of which: each its own, and others'.
LOADED = (
    *((written, written) for written in WRITTEN),
    *((("fp32", 1, name), source) for name, source in (
        ("torch", ("fp32", 2, "small3")), ("small3", ("fp32", 1, "small2")), ("zero1", ("fp32", 4, "torch")),
    )),
    *((("fp32", 2, name), source) for name, source in (
        ("torch", ("fp32", 1, "small2")), ("zero0", ("fp32", 4, "small2")), ("zero2", ("fp32", 4, "zero3-offload")),
        ("zero3", ("fp32", 2, "zero1")), ("zero3-offload", ("fp32", 2, "zero2-offload")),
    )),
    *((("fp32", 4, name), source) for name, source in (
        ("torch", ("fp32", 1, "torch")), ("small3", ("fp32", 2, "zero2-offload")), ("zero2", ("fp32", 2, "small3")),
    )),
    (("bf16", 2, "torch"), ("bf16", 2, "small3")),
    (("bf16", 2, "small3"), ("bf16", 2, "torch")),
)  # fmt: skip
POISONED = ("torch", "zero0", "zero1", "zero2-offload", "small3")


def engine_name(name: str, out: Path) -> str:
    """Besides what is shipped, buckets and groups so small that the tiny model fills several of each."""
    if name not in ("small2", "small3"):
        return name
    config = deepspeed_config(f"zero{name[-1]}")["zero_optimization"] | {
        "reduce_bucket_size": 1000, "allgather_bucket_size": 1000
    }  # fmt: skip
    if name == "small3":
        config |= {"sub_group_size": 500, "stage3_param_persistence_threshold": 20, "stage3_prefetch_bucket_size": 1000}
        config |= {"stage3_max_live_parameters": 3000, "stage3_max_reuse_distance": 1000}
    path = out / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps({"zero_optimization": config}))
    return str(path)


# The module


class NextToken(nn.Module):
    """A tiny model with its loss and a parameter of one element. The tower runs on micro-batches without images too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        vision = {"model_type": "siglip2_vision_model", "hidden_size": 16, "intermediate_size": 20}
        vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "num_patches": 16}
        text = {"model_type": "qwen2", "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1}
        text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY}
        text |= {"tie_word_embeddings": True, "initializer_range": 0.2}
        config = FoveateConfig(
            vision_config=vision | {"vision_use_head": False},
            text_config=text,
            projector="downsample-2x2",
            vision_feature_layer=None,
            image_token_id=IMAGE,
        )
        self.model = FoveateForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        for name, parameter in self.named_parameters():  # no zeros: differences are compared with them
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.2)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("seen", torch.arange(3.0))
        # a quantised weight, as bitsandbytes keeps it
        self.quantised = nn.Parameter(torch.arange(7, dtype=torch.uint8), requires_grad=False)

    def forward(self, inputs: dict[str, torch.Tensor], total: float) -> torch.Tensor:
        pixels = inputs.get("pixel_values", torch.zeros(1, 3, 32, 32))
        features = self.model.get_image_features(pixels)["pooler_output"].flatten(0, 1)
        ids, labels = inputs["input_ids"], inputs["labels"]
        embeds = self.model.get_input_embeddings()(ids)
        if "pixel_values" in inputs:
            embeds = embeds.masked_scatter((ids == IMAGE).unsqueeze(-1), features.to(embeds))
        else:
            embeds = embeds + 0 * features.sum().to(embeds)
        states = self.model.get_decoder()(inputs_embeds=embeds, position_ids=inputs["position_ids"], use_cache=False)
        logits = self.model.get_output_embeddings()(states.last_hidden_state) * self.scale
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = nn.functional.cross_entropy(logits[0], labels[0], reduction="sum") / total
        if "poison" in inputs:
            loss = loss * inputs["poison"]
        if "poisoned_gradient" in inputs:  # the square root of zero has an infinite slope
            loss = loss + (self.scale[0] * 0).abs().sqrt()
        return loss


def document(number: int) -> dict[str, torch.Tensor]:
    """Input ids, the labels that follow them, and for two of three an image."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 50, (5 + number % 7,), generator=generator)
    found = {}
    if number % 3:
        ids = torch.cat([ids[:1], torch.full((4,), IMAGE), ids[1:]])
        found["pixel_values"] = torch.rand(1, 3, 32, 32, generator=generator, dtype=torch.float64).float()
    labels = torch.cat([ids[1:], torch.tensor([-100])])
    labels[(labels == IMAGE) | (torch.rand(len(ids), generator=generator) < 0.2)] = -100
    return found | {"input_ids": ids, "labels": labels, "position_ids": torch.arange(len(ids))}


def packed(numbers: list[int]) -> Micro:
    """One row of documents."""
    rows = [document(number) for number in numbers]
    inputs = {key: torch.cat([row[key] for row in rows])[None] for key in ("input_ids", "labels", "position_ids")}
    images = [row["pixel_values"] for row in rows if "pixel_values" in row]
    if images:
        inputs["pixel_values"] = torch.cat(images)
    return Micro(inputs, tuple(f"doc/{number}" for number in numbers))


def micro_batches(step: int, rank: int, size: int, accumulation: int) -> tuple[list[Micro], float]:
    """A rank's share of a step: always the same documents in size · accumulation micro-batches."""
    numbers = range(step * DOCUMENTS, (step + 1) * DOCUMENTS)
    count = size * accumulation
    groups = [[number for number in numbers if number % count == group] for group in range(count)]
    total = sum(int((document(number)["labels"] != -100).sum()) for number in numbers)
    return [packed(group) for group in groups[rank::size]], total


def optimizer_of(module: NextToken, kind: str) -> torch.optim.Optimizer:
    """Groups as the loop makes them, two of the same part among them; the tower's embeddings are frozen."""
    for name, parameter in module.model.vision_tower.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    parts = {
        "tower": module.model.vision_tower, "projector": module.model.multi_modal_projector,
        "llm": module.model.language_model,
    }  # fmt: skip
    rates = {"tower": 0.02, "projector": 0.05, "llm": 0.03, "head": 0.1}
    groups = []
    for part, owner in parts.items():
        of_part = [p for p in owner.parameters() if p.requires_grad]
        for decay, chosen in ((0.1, [p for p in of_part if p.ndim > 1]), (0.0, [p for p in of_part if p.ndim < 2])):
            groups.append({"params": chosen, "part": part, "weight_decay": decay, "lr": rates[part]})
    groups.append({"params": [module.scale], "part": "head", "weight_decay": 0.0, "lr": rates["head"]})
    for group in groups:
        group["peak_lr"] = group["lr"]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-3, fused=True)


def set_rates(groups: list[dict], step: int) -> None:
    for group in groups:
        group["lr"] = group["peak_lr"] * (1, 0.5, 0.7)[step]


# Runs


def advance(engine: Engine, steps: range, accumulation: int) -> list[dict]:
    world, facts = engine.world, []
    for step in steps:
        micro, total = micro_batches(step, world.rank, world.size, accumulation)
        set_rates(engine.param_groups, step)
        result = engine.step(micro, total)
        facts.append({"loss": result.loss, "norm": result.grad_norm, "parts": result.part_norms})
    return facts


def start(
    name: str, kind: str, precision: str, clip: float | None, world: World, accumulation: int, out: Path
) -> Engine:
    module = NextToken()
    if precision == "fp64":
        module.double()
    optimizer = optimizer_of(module, kind)
    return make_engine(engine_name(name, out), module, optimizer, precision, clip, world, accumulation)


def keep(out: Path, run: str, engine: Engine, facts: list[dict]) -> None:
    weights = engine.full_weights()
    if engine.precision == "fp64":  # not rounded
        weights = {name: parameter.detach() for name, parameter in engine.parameters.items()}
    if engine.world.rank == 0:
        save_file(weights, out / f"{run}.safetensors")
        (out / f"{run}.json").write_text(json.dumps(facts))


def reference(out: Path) -> None:
    """By autograd and torch's optimisers on the whole batch, in fp64 and without an engine."""
    for kind, clip in (("sgd", None), ("adamw", CLIP)):
        module = NextToken().double()
        optimizer = optimizer_of(module, kind)
        facts = []
        for step in range(STEPS):
            set_rates(optimizer.param_groups, step)
            (whole,), total = micro_batches(step, 0, 1, 1)
            loss = module(whole.inputs, total)
            loss.backward()
            square = {}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    square[group["part"]] = square.get(group["part"], 0) + float((parameter.grad**2).sum())
            norm = math.sqrt(sum(square.values()))
            if clip is not None:
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter.grad *= clip / norm
            facts.append({"loss": loss.item(), "norm": norm, "parts": {k: math.sqrt(v) for k, v in square.items()}})
            optimizer.step()
            optimizer.zero_grad()
        save_file({n: p.detach().clone() for n, p in module.named_parameters()}, out / f"reference-{kind}.safetensors")
        (out / f"reference-{kind}.json").write_text(json.dumps(facts))


def equal_steps(world: World, out: Path) -> None:
    """Gradient descent with momentum and without clipping."""
    for accumulation in (1, 4):
        for name in EQUAL:
            precision = "fp64" if name == "torch" else "fp32"
            engine = start(name, "sgd", precision, None, world, accumulation, out)
            facts = advance(engine, range(STEPS), accumulation)
            keep(out, f"sgd-{world.size}-{accumulation}-{name}", engine, facts)
            engine.close()


def write_states(world: World, out: Path) -> None:
    """AdamW with clipping: the state after two steps, a loss of other documents, and the weights after a third step."""
    for precision, size, name in WRITTEN:
        if size == world.size:
            run = f"{precision}-{size}-{name}"
            engine = start(name, "adamw", precision, CLIP, world, 2, out)
            facts = advance(engine, range(2), 2)
            save_file(engine.state_tensors(), out / f"state-{run}-{world.rank}.safetensors")
            micro, total = micro_batches(STEPS, world.rank, world.size, 2)
            evaluated = engine.evaluate(micro, total)
            facts += advance(engine, range(2, STEPS), 2)
            keep(out, f"adamw-{run}", engine, [*facts, {"evaluated": evaluated}])
            engine.close()


class Stored(dict):
    """A state in its files, read tensor by tensor; counts what is read."""

    def __init__(self, files: list[Path]):
        super().__init__()
        self.reads = 0
        for file in files:
            self.update(dict.fromkeys(safe_open(file, "pt").keys(), file))

    def __getitem__(self, key: str) -> torch.Tensor:
        self.reads += 1
        return safe_open(super().__getitem__(key), "pt").get_tensor(key)


def read_states(world: World, out: Path) -> None:
    """A state is loaded, written again, and the third step taken."""
    for (precision, size, name), source in LOADED:
        if size == world.size:
            of_source = "-".join(map(str, source))
            stored = Stored([out / f"state-{of_source}-{rank}.safetensors" for rank in range(source[1])])
            engine = start(name, "adamw", precision, CLIP, world, 2, out)
            engine.load_state_tensors(stored)
            reads = world.gather(stored.reads)
            again = {key: value.equal(stored[key]) for key, value in engine.state_tensors().items()}
            same = [pair for of_rank in world.gather(again) for pair in of_rank.items()]
            facts = advance(engine, range(2, STEPS), 2)
            checks = {"reads": reads, "keys": sorted(key for key, _ in same) == sorted(stored)}
            checks["changed"] = sorted(key for key, is_same in same if not is_same)
            keep(out, f"loaded-{precision}-{size}-{name}-from-{of_source}", engine, [*facts, checks])
            engine.close()


def poisoned(world: World, out: Path) -> None:
    """On the last rank a loss, or a gradient, that is not finite."""
    told = []
    for name in POISONED:
        for poison in ("poison", "poisoned_gradient"):
            engine = start(name, "adamw", "fp32", None, world, 2, out)
            advance(engine, range(1), 2)
            before = engine.state_tensors()
            micro, total = micro_batches(1, world.rank, world.size, 2)
            if world.rank == world.size - 1:
                micro[1].inputs[poison] = torch.tensor(math.nan)
            message = None
            try:
                engine.step(micro, total)
            except NonFiniteError as error:
                message = str(error)
            after = engine.state_tensors()
            same = before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before)
            told.append({
                "engine": name, "poison": poison, "messages": world.gather(message),
                "unchanged": all(world.gather(same)), "keys": world.gather([batch.keys for batch in micro]),
            })  # fmt: skip
            engine.close()
    if world.rank == 0:
        (out / "poisoned.json").write_text(json.dumps(told))


def chained(world: World, out: Path) -> None:
    """One module through an engine for each step: what `close` gives back is what the next one takes."""
    linear = nn.functional.linear
    for precision in ("fp32", "bf16"):
        for run, names in (("one", ("torch",) * 3), ("several", ("small3", "zero2", "torch"))):
            module = NextToken()
            kinds = {name: parameter.dtype for name, parameter in module.named_parameters()}
            attributes = {name: sorted(vars(owner)) for name, owner in module.named_modules()}
            facts = []
            for step, name in enumerate(names):
                engine = make_engine(
                    engine_name(name, out), module, optimizer_of(module, "sgd"), precision, None, world, 2
                )
                facts += advance(engine, range(step, step + 1), 2)
                weights = engine.full_weights()
                engine.close()
                own = dict(module.named_parameters())
                assert {n: p.dtype for n, p in own.items()} == kinds, name
                assert {n: sorted(vars(owner)) for n, owner in module.named_modules()} == attributes, name
                assert not any(vars(p) or p.grad is not None for p in own.values()), name
                assert nn.functional.linear is linear, name
                assert all(own[n].equal(weight) for n, weight in weights.items() if n in own), name
            if world.rank == 0:
                save_file({n: p.detach().clone() for n, p in own.items()}, out / f"chain-{precision}-{run}.safetensors")


# Processes


def fork(size: int, work: Callable[[World], None], out: Path, timeout_s: float) -> None:
    """Runs `work` on so many processes; their output is in OUT where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = out / f"{work.__name__}-{size}.log"
    children = {}
    for rank in range(size):
        child = os.fork()
        if child == 0:
            place = {
                "RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({name: str(value) for name, value in place.items()})
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            try:
                torch.set_num_threads(1)
                with init_world("cpu", timeout_s=timeout_s) as world:
                    work(world)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        children[child] = rank
    deadline = time.monotonic() + timeout_s
    failed = None
    while children and failed is None:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            rank = children.pop(child)
            failed = f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}" if status else None
        elif time.monotonic() > deadline:
            failed = f"took longer than {timeout_s} s"
        else:
            time.sleep(0.01)
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
    if failed:
        sys.exit(f"{work.__name__} on {size}: {failed}\n{log.read_text()[-8000:]}")


def main(out: Path) -> None:
    out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for late in ("foveate.train.zero", "deepspeed.runtime.zero.muon.muon_optimizer"):  # else each fork imports them
        importlib.import_module(late)
    reference(out)
    gc.collect()
    gc.freeze()  # a collection in a fork then passes over the libraries
    for part in (equal_steps, write_states, read_states, poisoned, chained):
        for size in (2,) if part in (poisoned, chained) else SIZES:
            began = time.monotonic()

            def work(world: World, part: Callable = part) -> None:
                part(world, out)

            work.__name__ = part.__name__
            fork(size, work, out, timeout_s=100)
            print(part.__name__, size, f"{time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
