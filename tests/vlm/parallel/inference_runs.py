"""Answers of 4 processes about one sequence, in fp64, next to those of one process: saved in a folder.

python inference_runs.py FOLDER
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import processes
from conftest import Tiny

from foveate.vlm import FoveateForConditionalGeneration, FoveateProcessor
from foveate.vlm.chat import Chat
from foveate.vlm.media import load_video
from foveate.vlm.parallel.inference import sequence_parallel
from foveate.vlm.parallel.topology import Topology, make_topology
from foveate.vlm.pruning import FasterVLM, HiRED, VisionZip, VTCCLS, reduce
from foveate.vlm.pruning.session import new_cache

RANKS = 4
GRIDS = ((1, 2), (2, 1), (2, 2), (4, 1), (1, 4))
STEPS = 5
WIDTH = 32
METHODS: dict[str, Any] = {
    "visionzip": VisionZip(keep=0.5, contextual=1, dominant=1),
    "fastervlm": FasterVLM(keep=0.5, reindex=False),
    "vtc-cls": VTCCLS(keep=0.25),
    "hired": HiRED(keep=0.5),
}
REFUSED: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 2},
    "batch": {"input_ids": torch.ones(2, 3, dtype=torch.int64)},
    "padding": {"attention_mask": torch.tensor([[0, 1, 1]])},
    "cache": {"past_key_values": DynamicCache()},
    "max_time": {"max_time": 1.0},
    "features": {"video_features": torch.zeros(1, WIDTH, dtype=torch.float64)},
}


def tiny() -> Tiny:
    """Letters as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return Tiny(backend.to_str())


class Rows(TorchDispatchMode):
    """The most rows of a tensor of the LLM's width that any operator gives."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim and result.shape[-1] == WIDTH:
            self.most = max(self.most, result.numel() // WIDTH)
        return result


@contextmanager
def rows_of(module: torch.nn.Module, taken: list[int]) -> Iterator[None]:
    """Notes how many rows each call of a module reads."""

    def note(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("inputs_embeds", kwargs.get("pixel_values"))
        taken.append(len(given) if given.ndim == 4 else given.shape[1])

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    yield
    hook.remove()


class Runs:
    """A tiny model, its prompts, and what it says."""

    def __init__(self) -> None:
        self.tiny = tiny()
        options = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1}
        self.tower = {"hidden_size": 24}
        torch.manual_seed(0)
        self.model: Any = self.tiny.model(
            tower_options=self.tower, llm_options=options, dtype=torch.float64, video_pool=(2, 1, 1)
        )
        self.processor = self.tiny.processor(video_pool=(2, 1, 1))
        self.clip_model: Any = None

    def inputs(self, text: str, images: Any = None, videos: Any = None) -> dict[str, torch.Tensor]:
        given = self.processor(
            text=[text], images=images, videos=videos, return_tensors="pt", add_special_tokens=False
        )
        return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}

    def prompts(self) -> dict[str, dict[str, torch.Tensor]]:
        frames = self.tiny.frames(0, 9)
        return {
            "mixed": self.inputs(
                "Look: <image> and <video> then <image> <video> what?",
                [self.tiny.image(1), self.tiny.image(2)],
                [frames, self.tiny.frames(3, 2)],
            ),
            "one image": self.inputs("<image> what?", [self.tiny.image(4)]),
            "text": self.inputs("Hello, you. How are you today?"),
            "short": self.inputs("a"),
        }

    def said(self, inputs: dict[str, torch.Tensor], model: Any = None, **options: Any) -> dict[str, torch.Tensor]:
        """Tokens [steps] and logits [steps, vocabulary] of an answer."""
        options = {"max_new_tokens": STEPS, "do_sample": False} | options
        made = (model or self.model).generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        tokens = made.sequences[0, inputs["input_ids"].shape[1] :]
        return {"tokens": tokens, "logits": torch.cat(made.logits)}

    def sampled(self, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return self.said(self.prompts()["mixed"], do_sample=True, temperature=2.0, max_new_tokens=12)["tokens"]

    def stopped(self, end: int) -> torch.Tensor:
        return self.said(self.prompts()["mixed"], eos_token_id=end, max_new_tokens=12)["tokens"]

    def turns(self) -> dict[str, torch.Tensor]:
        """A prompt, one behind it on the same cache, then another where the second was cropped away."""
        cache = new_cache(self.model)
        prompt = self.prompts()["mixed"]
        said = [self.said(prompt, past_key_values=cache)]
        length = prompt["input_ids"].shape[1]
        for text in (" And what is this, of all things?", " b"):
            cache.crop(length - cache.get_seq_length())
            more = self.inputs(text)["input_ids"]
            said.append(self.said({"input_ids": torch.cat([prompt["input_ids"], more], 1)}, past_key_values=cache))
        cache.crop(-(cache.get_seq_length() - 7))  # into what was shared out
        ids = torch.cat([prompt["input_ids"][:, :7], more], 1)
        said.append(self.said({"input_ids": ids}, past_key_values=cache))
        return {name: torch.stack([one[name] for one in said]) for name in ("tokens", "logits")}

    def chat(self) -> dict[str, Any]:
        """Two questions about a video and an image; what this rank encoded and how large its tensors got."""
        media = [load_video(self.tiny.frames(5, 21)), self.tiny.image(6)]
        frames: list[int] = []
        columns: list[int] = []
        with rows_of(self.model.vision_tower, frames), rows_of(self.model.get_decoder(), columns), Rows() as rows:
            chat = Chat(self.model, self.processor, media)
            first = chat.ask("What is in the picture?", 6)
        second = chat.ask("And left of it?", 6)
        assert chat.cache is not None
        held = sum(
            (layer.store.columns if hasattr(layer, "store") else layer.keys.shape[2]) for layer in chat.cache.layers
        )
        return {
            "texts": [first.text, second.text],
            "prompt": first.prompt_tokens,
            "frames": sum(frames),
            "columns": max(columns),
            "rows": rows.most,
            "held": held,
        }

    def pruned(self, name: str) -> dict[str, Any]:
        """The answer about what a method left of images and a video."""
        method = METHODS[name]
        with reduce(self.model, method) as model:
            said = self.said(self.prompts()["mixed"], model)
            reduction = model._foveate_reduction
        prefill = reduction.prefills[0]
        return said | {"visual": prefill.visual, "given": prefill.given, "kept": prefill.stages[0].kept[0]}

    def packed(self, kv: str, topology: Topology) -> dict[str, torch.Tensor]:
        """A step of decode on packed columns, and the same of one process that is given all of them, widened."""
        with reduce(self.model, kv=kv) as model:
            cache = new_cache(model)
            prompt = self.prompts()["mixed"]
            model(**prompt, past_key_values=cache, logits_to_keep=1)
            mine = [
                (layer.all_slots()[0, 0], *(states.clone() for states in layer.store.dense())) for layer in cache.layers
            ]
            packed = min(layer.store.packed for layer in cache.layers)
            token = torch.tensor([[5]])
            two = torch.tensor([[7, 9]])
            logits = [model(input_ids=some, past_key_values=cache).logits[0, -1] for some in (token, two)]
        everyone: list[Any] = [None] * topology.degree
        torch.distributed.all_gather_object(everyone, mine, group=topology.group)
        return {"logits": torch.stack(logits), "packed": packed, "columns": everyone, "bytes": cache.nbytes}

    def widened(self, columns: list[Any]) -> torch.Tensor:
        """What one process says of keys and values that were packed by several."""
        cache = DynamicCache(config=self.model.get_decoder().config)
        for layer in range(len(columns[0])):
            order = torch.cat([of_rank[layer][0] for of_rank in columns]).argsort()
            states = [torch.cat([of_rank[layer][part] for of_rank in columns], 2)[:, :, order] for part in (1, 2)]
            cache.update(*states, layer)
        steps = (torch.tensor([[5]]), torch.tensor([[7, 9]]))
        return torch.stack([self.model(input_ids=some, past_key_values=cache).logits[0, -1] for some in steps])

    def refused(self) -> dict[str, str]:
        messages = {}
        for name, given in REFUSED.items():
            try:
                self.model.generate(**({"input_ids": torch.ones(1, 3, dtype=torch.int64)} | given), max_new_tokens=2)
            except ValueError as error:
                messages[name] = str(error)
        return messages


def cases() -> dict[str, Any]:
    runs = Runs()
    rank = torch.distributed.get_rank()
    results: dict[str, Any] = {}

    def everything(name: str, topology: Topology) -> None:
        with torch.no_grad(), sequence_parallel(runs.model, topology):
            for prompt, inputs in runs.prompts().items():
                results[f"{prompt} {name}"] = runs.said(inputs)
            whole = runs.model(**runs.prompts()["one image"]).logits
            results[f"all logits {name}"] = whole
            results[f"sampled {name}"] = runs.sampled(100 + (rank if name != "alone" else 0))
            results[f"stopped {name}"] = runs.stopped(int(results["mixed alone"]["tokens"][2]))
            results[f"turns {name}"] = runs.turns()
            results[f"chat {name}"] = runs.chat()
            for method in METHODS if name in ("alone", "2 2", "1 4") else ():
                results[f"{method} {name}"] = runs.pruned(method)

    everything("alone", Topology())
    for ulysses, ring in GRIDS:
        everything(f"{ulysses} {ring}", make_topology(ulysses, ring))
    topology = make_topology(2, 2)
    with torch.no_grad():
        for kv in ("int8:group=4,residual=3", "int4:group=2,residual=2,sink=1,hadamard=true"):
            with sequence_parallel(runs.model, topology):
                packed = runs.packed(kv, topology)
            packed["reference"] = runs.widened(packed.pop("columns"))
            results[f"packed {kv.partition(':')[0]}"] = packed
        with sequence_parallel(runs.model, topology):
            results["refused"] = runs.refused()
    return results


if __name__ == "__main__":
    processes.run_all(cases, RANKS, Path(sys.argv[1]))
