"""Answers of 4 processes about one sequence, in fp64, next to those of one process: saved in a folder.

python inference_runs.py FOLDER
"""

import gc
import importlib.util
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent))

import processes

from foveate import cli
from foveate.eval import glyphs, needle, prune
from foveate.vlm import chat
from foveate.vlm.chat import Chat
from foveate.vlm.media import MediaError, load_video
from foveate.vlm.parallel.inference import sequence_parallel
from foveate.vlm.parallel.topology import Topology, make_topology
from foveate.vlm.pruning import EVS, VTCCLS, DyCoke, FasterVLM, HiRED, VisionZip, reduce
from foveate.vlm.pruning.patches import replaced
from foveate.vlm.pruning.session import new_cache

RANKS = 4
GRIDS = ((1, 2), (2, 1), (2, 2), (4, 1), (1, 4))
STEPS = 3
PACKED = ("int8:group=4,residual=3", "int4:group=4,residual=3,sink=1,hadamard=true")
WIDTH = 32
METHODS: dict[str, Any] = {
    "visionzip": VisionZip(keep=0.5, contextual=1, dominant=1),
    "fastervlm": FasterVLM(keep=0.5, reindex=False),
    "vtc-cls": VTCCLS(keep=0.25),
    "hired": HiRED(keep=0.5),
    "evs": EVS(keep=0.6),
    "dycoke": DyCoke(keep=0.5),
}
REFUSED: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 2},
    "batch": {"input_ids": torch.ones(2, 3, dtype=torch.int64)},
    "padding": {"attention_mask": torch.tensor([[0, 1, 1]])},
    "cache": {"past_key_values": DynamicCache()},
    "max_time": {"max_time": 1.0},
    "features": {"video_features": torch.zeros(1, WIDTH, dtype=torch.float64)},
}


def tiny() -> Any:
    """Makes tiny models, as in other tests; letters are tokens."""
    spec: Any = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return module.Tiny(backend.to_str())


class Rows(TorchDispatchMode):
    """The most rows of a tensor of the LLM's width that any operator gives."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.most, self.weights = 0, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_wide = isinstance(result, torch.Tensor) and result.ndim and result.shape[-1] == WIDTH
        if is_wide and result.untyped_storage().data_ptr() not in self.weights:
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
        self.prompts = self.make_prompts()
        decoder = self.model.get_decoder()
        for owner in (decoder, *decoder.layers):
            for name, norm in list(owner.named_children()):
                if name.endswith("norm"):  # transformers' own rounds to float32
                    own = torch.nn.RMSNorm(WIDTH, norm.variance_epsilon, dtype=torch.float64)
                    own.weight.data.copy_(norm.weight.data)
                    setattr(owner, name, own)

    def inputs(self, text: str, images: Any = None, videos: Any = None) -> dict[str, torch.Tensor]:
        given = self.processor(text=[text], images=images, videos=videos, return_tensors="pt", add_special_tokens=False)
        return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}

    def make_prompts(self) -> dict[str, dict[str, torch.Tensor]]:
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
        logits: list[torch.Tensor] = []  # those that `generate` gives are in float32
        hook = self.model.register_forward_hook(lambda *call: logits.append(call[2].logits[0, -1]))
        tokens = (model or self.model).generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        hook.remove()
        return {"tokens": tokens, "logits": torch.stack(logits)}

    def sampled(self, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return self.said(self.prompts["mixed"], do_sample=True, temperature=2.0, max_new_tokens=8)["tokens"]

    def stopped(self, end: int) -> torch.Tensor:
        return self.said(self.prompts["mixed"], eos_token_id=end, max_new_tokens=6)["tokens"]

    def turns(self) -> dict[str, torch.Tensor]:
        """A prompt; then others that have some of the last one's tokens in common, whose rest is cropped away."""
        cache, ids = new_cache(self.model), self.prompts["mixed"]["input_ids"]
        said = [self.said(self.prompts["mixed"], past_key_values=cache)]
        length = ids.shape[1]
        for common, text in (
            (length, " And what is this, of all things?"),
            (length + 5, " b c"),
            (7, " d"),
            (10, " e"),
        ):
            cache.crop(common - cache.get_seq_length())
            ids = torch.cat([ids[:, :common], self.inputs(text)["input_ids"]], 1)
            said.append(self.said({"input_ids": ids}, past_key_values=cache))
        return {name: torch.stack([one[name] for one in said]) for name in ("tokens", "logits")}

    def chat(self) -> dict[str, Any]:
        """Two questions about a video and an image; what this rank encoded and how large its tensors got."""
        media = [load_video(self.tiny.frames(5, 21)), self.tiny.image(6)]
        frames: list[int] = []
        columns: list[int] = []
        of_parts = rows_of(self.model.vision_tower, frames), rows_of(self.model.get_decoder(), columns)
        with of_parts[0], of_parts[1], Rows(self.model) as rows:
            chat = Chat(self.model, self.processor, media)
            first = chat.ask("What is in the picture?", 3)
        second = chat.ask("And left of it?", 3)
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
            said = self.said(self.prompts["mixed"], model)
            reduction = model._foveate_reduction
        prefill = reduction.prefills[0]
        return said | {"visual": prefill.visual, "given": prefill.given, "kept": prefill.stages[0].kept[0]}

    def packed(self, kv: str, topology: Topology) -> dict[str, torch.Tensor]:
        """A step of decode on packed columns, and the same of one process that is given all of them, widened."""
        with reduce(self.model, kv=kv) as model:
            cache = new_cache(model)
            prompt = self.prompts["mixed"]
            model(**prompt, past_key_values=cache, logits_to_keep=1)
            mine = [
                (layer.all_slots()[0, 0], *(states.clone() for states in layer.store.dense())) for layer in cache.layers
            ]
            packed = min(layer.store.packed for layer in cache.layers)
            token = torch.tensor([[5]])
            two = torch.tensor([[7, 9]])
            logits = [model(input_ids=some, past_key_values=cache).logits[0, -1] for some in (token, two)]
        everyone: list[Any] = [None] * topology.degree
        dist.all_gather_object(everyone, mine, group=topology.group)
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

    def tasks(self, topology: Topology) -> dict[str, Any]:
        """Answers to questions about scenes, and what is left of others, shared out among the groups."""
        asked = glyphs.evaluate(self.model, self.processor, "colour_at", 3, "dev", topology=topology)
        rows = prune.measure(
            self.model, self.processor, prune.row_items(3, "dev"), prune.Setting("", 0.5), 0,
            methods=[FasterVLM(keep=0.5)], topology=topology,
        )  # fmt: skip
        return {"answers": asked.answers, "rows": (rows.right, rows.recall, rows.visual, rows.flops)}

    def bad_frame(self, topology: Topology) -> str:
        """What a rank tells of a frame that another rank could not decode."""
        clip = load_video(self.tiny.frames(5, 8))
        encode = chat.encode_video

        def broken(*args: Any, part: range, **kwargs: Any) -> torch.Tensor:
            if 5 in part:
                raise MediaError("clip.mp4: frame 5 can't be decoded")
            return encode(*args, part=part, **kwargs)

        chat.encode_video = broken
        try:
            with sequence_parallel(self.model, topology):
                Chat(self.model, self.processor, [clip])
        except ValueError as error:
            return str(error)
        finally:
            chat.encode_video = encode
        return ""

    def bad_image(self, topology: Topology) -> str:
        """What a rank tells of pixels that another rank could not encode."""

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise ValueError("an image can't be encoded")

        try:
            with sequence_parallel(self.model, topology), replaced(self.model, encode_images=broken):
                self.model.generate(**self.prompts["one image"], max_new_tokens=2)
        except ValueError as error:
            return str(error)
        return ""

    def refused(self) -> dict[str, str]:
        messages = {}
        others = {"other prompts": {"input_ids": torch.tensor([[5, 6, 10 + dist.get_rank()]])}}
        for name, given in (REFUSED | others).items():
            try:
                self.model.generate(**({"input_ids": torch.ones(1, 3, dtype=torch.int64)} | given), max_new_tokens=2)
            except ValueError as error:
                messages[name] = str(error)
        return messages


def cases(runs: Runs) -> dict[str, Any]:
    """Everything, of one process (rank 0's) and of the groups of each grid."""
    rank = dist.get_rank()
    results: dict[str, Any] = {}

    def everything(name: str, topology: Topology) -> None:
        with torch.no_grad(), sequence_parallel(runs.model, topology):
            for prompt, inputs in runs.prompts.items():
                results[f"{prompt} {name}"] = runs.said(inputs)
            results[f"turns {name}"] = runs.turns()
            results[f"chat {name}"] = runs.chat()
            if name in ("alone", "2 2"):
                results[f"all logits {name}"] = runs.model(**runs.prompts["one image"]).logits
                results[f"stopped {name}"] = runs.stopped(int(results[f"mixed {name}"]["tokens"][1]))
                for method in METHODS:
                    results[f"{method} {name}"] = runs.pruned(method)

    if rank == 0:
        everything("alone", Topology())
        results |= {f"sampled {seed}": runs.sampled(seed) for seed in (100, 102)}
        results["tasks alone"] = runs.tasks(Topology())
    for ulysses, ring in GRIDS:
        topology = make_topology(ulysses, ring)
        everything(f"{ulysses} {ring}", topology)
        if topology.data_size == 2 and ring == 2:
            with sequence_parallel(runs.model, topology):
                results["sampled"], results["tasks"] = runs.sampled(100 + rank), runs.tasks(topology)
    with torch.no_grad():
        for kv in PACKED:
            with sequence_parallel(runs.model, topology):
                packed = runs.packed(kv, topology)
            packed["reference"] = runs.widened(packed.pop("columns"))
            results[f"packed {kv.partition(':')[0]}"] = packed
        with sequence_parallel(runs.model, topology):
            results["refused"] = runs.refused()
    results["bad frame"] = runs.bad_frame(topology)
    results["bad image"] = runs.bad_image(topology)
    return results


def commands(runs: Runs, folder: Path) -> None:
    """`foveate` as torchrun runs it: what each rank prints, and the exit codes, in files of the folder."""
    runs.model.float().save_pretrained(folder / "model")
    runs.processor.save_pretrained(folder / "model")
    picture, model = folder / "picture.png", str(folder / "model")
    runs.tiny.image(0).save(picture)
    ask = ["ask", model, str(picture), "What is this?", "--max-new-tokens", "4"]
    needles = ["eval", model, "--task", "needles", "--frames", "6", "--n", "2", "--split", "dev", "--out"]
    grid = [
        "eval",
        model,
        "--task",
        "haystack",
        "--frames",
        "6",
        "--depths",
        "2",
        "--n",
        "1",
        "--split",
        "dev",
        "--out",
    ]
    for name, ranks, arguments in (
        ("ask alone", 1, ask),
        ("ask", 2, [*ask, "--ring", "2"]),
        ("too many", 2, ask),
        ("too few", 1, [*ask, "--ulysses", "4"]),
        ("refused", 2, [*ask, "--ulysses", "2", "--prune", "fastv:layer=1"]),
        ("eval alone", 1, [*needles, str(folder / "one")]),
        ("eval", 2, [*needles, str(folder / "two"), "--ulysses", "2"]),
        ("grid alone", 1, [*grid, str(folder / "grid-one")]),
        ("grid", 2, [*grid, str(folder / "grid-two"), "--ulysses", "2"]),
        ("lost", 2, [*ask, "--ring", "2"]),
        ("failed", 2, [*needles, str(folder / "none")]),
    ):
        _command(name, ranks, arguments, folder)


def _failing(*args: Any, **kwargs: Any) -> Any:
    raise MediaError("clip 7 can't be decoded")


def _command(name: str, ranks: int, arguments: list[str], folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks} if ranks > 1 else {}
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ |= {key: str(value) for key, value in environment.items()}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            torch.set_num_threads(1)
            out = os.open(folder / f"{name} {rank}", os.O_WRONLY | os.O_CREAT)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.argv = ["foveate", *arguments]
            cli.SILENT_S, needle.BATCH_TOKENS = 0.0, 1
            if name == "lost" and rank:  # it dies when the others wait for it
                chat.Chat.ask = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
            if name == "failed" and rank:  # in a group of its own, and the other group goes on
                needle.find = _failing
            code: Any = 1
            try:
                cli.main()
            except SystemExit as ended:
                code = ended.code or 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / f"{name} codes").write_text(json.dumps(codes))


if __name__ == "__main__":
    made = Runs()
    gc.collect()
    gc.freeze()  # or collections copy the libraries' pages in each process
    processes.run_all(partial(cases, made), RANKS, Path(sys.argv[1]))
    commands(made, Path(sys.argv[1]))
    gc.unfreeze()
