"""Counts what two ranks of each engine hold, and what layers keep whose tokens they share, for `test_plan.py`: prints
bytes by engine, and by how tokens are shared, as JSON.

python memory_runs.py FOLDER

The processes are forked, so that libraries are imported once.
"""

import gc
import importlib
import json
import os
import socket
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from foveate.train.distributed import World, init_world
from foveate.train.engine import Micro, deepspeed_config, make_engine
from foveate.vlm.config import FoveateConfig
from foveate.vlm.model import FoveateForConditionalGeneration
from foveate.vlm.parallel.attention import SharedSequence, sequence_attention
from foveate.vlm.parallel.plan import SequencePlan
from foveate.vlm.parallel.topology import Topology, make_topology

RANKS = 2
BUCKET, THRESHOLD = 1000, 3000  # elements of a bucket; up to which ZeRO-3 keeps a tensor whole
RUNS = (("torch", "bf16"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3", "bf16"), ("zero3", "fp32"))
SHARED = ((1, 1), (2, 1), (1, 2))  # ulysses, ring
MODES = ("bf16", "autocast", "fp32")
TOKENS = 256  # of a rank
LLM = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8, "num_key_value_heads": 1}


def make_model() -> FoveateForConditionalGeneration:
    """A tiny model whose tower is frozen, with weights that bf16 holds: others are kept in fp32 on the CPU too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "siglip_vision_model", "patch_size": 8, "image_size": 32, "vision_use_head": False} | sizes
    text = {"model_type": "qwen2", "vocab_size": 200, "num_key_value_heads": 1, "tie_word_embeddings": False} | sizes
    model = FoveateForConditionalGeneration._from_config(FoveateConfig(vision, text, image_token_id=198))
    model.vision_tower.requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def engine_name(name: str, folder: Path) -> str:
    if name == "torch":
        return name
    config = deepspeed_config(name)["zero_optimization"]
    config |= {key: BUCKET for key in ("reduce_bucket_size", "allgather_bucket_size") if key in config}
    if name == "zero3":
        config |= {"stage3_param_persistence_threshold": THRESHOLD, "stage3_prefetch_bucket_size": BUCKET}
    path = folder / f"{name}.json"
    if not path.exists():  # written before the ranks, of which one would read what another is writing
        path.write_text(json.dumps({"zero_optimization": config}))
    return str(path)


class Loss(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, torch.Tensor], total: float) -> torch.Tensor:
        return self.model(**inputs, labels=inputs["input_ids"]).loss / total


def storages() -> dict[int, int]:
    """Bytes of every tensor's storage that Python knows."""
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def held(world: World, name: str, precision: str, folder: Path) -> int:
    """Bytes that this rank holds when the optimiser is about to step for the second time."""
    model = make_model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "part": "llm", "weight_decay": 0.0}], lr=1e-3, fused=True)
    ids = torch.arange(20)[None]
    ids[0, 3:7] = 198
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 32, 32)}
    of_model = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    gc.collect()
    before = storages().keys() - of_model
    engine = make_engine(engine_name(name, folder), Loss(model), optimizer, precision, 1.0, world, 1)
    counts = []
    update = engine._update

    def counted(norm: float) -> None:
        gc.collect()
        counts.append(sum(size for pointer, size in storages().items() if pointer not in before))
        update(norm)

    engine._update = counted
    for _ in range(2):
        engine.step([Micro(inputs, ("key",))], 20.0)
    engine._update = update
    engine.close()
    return counts[1]


def saved_bytes(model: nn.Module, inputs: dict[str, Any]) -> int:
    """What autograd keeps of a forward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    return sum(size for size, _ in kept.values())


def make_llm(layers: int, mode: str, trains: bool) -> nn.Module:
    """A tiny decoder as it computes in a mode of `memory.Mode`."""
    config = AutoConfig.for_model("qwen2", num_hidden_layers=layers, vocab_size=64, **LLM)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").model
    return model.to(torch.bfloat16 if mode == "bf16" else torch.float32).requires_grad_(trains)


def shared_sequence(topology: Topology) -> SharedSequence:
    """One document, of which each rank holds so many tokens."""
    plan = SequencePlan((TOKENS * topology.degree,), topology.ulysses, topology.ring)
    return SharedSequence(plan, topology, torch.device("cpu"))


def kept(topology: Topology, mode: str, trains: bool) -> int:
    """Bytes that autograd keeps of two more layers."""
    sequence, of_layers = shared_sequence(topology), []
    for layers in (1, 3):
        model = make_llm(layers, mode, trains)
        weights = next(model.parameters())
        embeds = torch.randn(1, TOKENS, LLM["hidden_size"], dtype=weights.dtype, requires_grad=True)
        places = torch.from_numpy(sequence.plan.positions(topology.sequence_rank))[None]
        inputs = {"inputs_embeds": embeds, "position_ids": places, "use_cache": False, "sequence": sequence}
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast")
        with autocast, sequence_attention(model, topology.ulysses):
            of_layers.append(saved_bytes(model, inputs))
    return of_layers[1] - of_layers[0]


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made under it and still live, and the most there were."""

    now = most = 0

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage._cdata)
        return out

    def gone(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


def attended(topology: Topology) -> int:
    """The most bytes that live while one layer's attention runs, forward and backward, in bf16."""
    heads, kv_heads = LLM["num_attention_heads"], LLM["num_key_value_heads"]
    head_dim = LLM["hidden_size"] // heads
    shapes = [(1, number, TOKENS, head_dim) for number in (heads, kv_heads, kv_heads)]
    states = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    sequence = shared_sequence(topology)
    sequence.layout  # noqa: B018  # made once for all layers
    with Live() as live:
        out = sequence.attend(nn.Identity(), *states, head_dim**-0.5)
        out.backward(torch.ones_like(out))
    return live.most


def main(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with init_world("cpu") as world:
        bytes_held = {f"{name} {precision}": held(world, name, precision, folder) for name, precision in RUNS}
        for ulysses, ring in SHARED:
            topology, name = make_topology(ulysses, ring), f"{ulysses}x{ring}"
            bytes_held[f"{name} attended"] = attended(topology)
            for mode in MODES:
                for trains in (True, False):
                    bytes_held[f"{name} {mode} {trains}"] = kept(topology, mode, trains)
        if rank == 0:
            print(json.dumps(bytes_held), flush=True)


if __name__ == "__main__":
    for late in ("foveate.train.zero", "deepspeed.runtime.zero.muon.muon_optimizer"):  # else each fork imports them
        importlib.import_module(late)
    for engine, _ in RUNS:
        engine_name(engine, Path(sys.argv[1]))
    gc.collect()
    gc.freeze()  # a collection in a fork then passes over the libraries
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if not child:
            try:
                main(rank, port, Path(sys.argv[1]))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
