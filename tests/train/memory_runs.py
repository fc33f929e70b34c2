"""Counts what two ranks of each engine hold, for `test_plan.py`: prints bytes by engine as JSON.

python memory_runs.py FOLDER

The processes are forked, so that libraries are imported once.
"""

import gc
import json
import os
import socket
import sys
import traceback
from pathlib import Path

import torch
from torch import nn

from foveate.train.distributed import World, init_world
from foveate.train.engine import Micro, deepspeed_config, make_engine
from foveate.vlm.config import FoveateConfig
from foveate.vlm.model import FoveateForConditionalGeneration

RANKS = 2
BUCKET, THRESHOLD = 1000, 3000  # elements of a bucket; up to which ZeRO-3 keeps a tensor whole
RUNS = (("torch", "bf16"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3", "bf16"), ("zero3", "fp32"))


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


def main(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with init_world("cpu") as world:
        bytes_held = {f"{name} {precision}": held(world, name, precision, folder) for name, precision in RUNS}
        if rank == 0:
            print(json.dumps(bytes_held), flush=True)


if __name__ == "__main__":
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
