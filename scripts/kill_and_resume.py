"""Kills a training run of several processes with SIGKILL at random moments, resumes it each time, and compares.

    .venv/bin/python scripts/kill_and_resume.py [--kills 20] [--json]

Two ranks with two loader workers each train on webdataset shards for some epochs and write a checkpoint at every step,
so that many kills fall into a save. In the end the weights must be bit-identical to those of a run that nothing
stopped, and the log of documents must hold every one exactly once an epoch. Every run is forked from this process,
which has imported everything.
"""

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import webdataset as wds
from rich.console import Console

from foveate.data.glyphs import GlyphSource, glyph_tokenizer
from foveate.eval.facts import result, run_facts
from foveate.train import loop
from foveate.train.recipe import Recipe, load_recipe

logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

DOCUMENTS = 60  # a shard
RANKS, WORKERS, EPOCHS = 2, 2, 8
RECIPE = """
name: killed
threads: 1
precision: fp32
model:
  vision: {model_type: siglip2_vision_model, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
           num_attention_heads: 2, patch_size: 8, num_patches: 64, vision_use_head: false}
  text: {model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
         num_key_value_heads: 1, tie_word_embeddings: true, max_position_embeddings: 2048, attention_dropout: 0.1}
  vision_feature_layer: null
  processor: {image_size: [64, 64], video_size: [32, 32]}
sources: {captions: {path: SHARDS, format: caption}}
loader: {workers: WORKERS}
tracking: {wandb: disabled, every_steps: 1, documents: true}
checkpoint: {every_steps: 1, keep: 2}
stages:
  - name: first
    epochs: EPOCHS
    learning_rates: {tower: 1.0e-3, projector: 1.0e-3, llm: 1.0e-3}
    shuffle: 32
    batch: {rows: 1, tokens: 256, window: 8, micro_batches: 4}
    data: [captions]
"""


def write_shards(folder: Path) -> None:
    """Two shards of captions of the embedded data's scenes."""
    source = GlyphSource("captions", processor=None, objects=(1, 6))  # type: ignore[arg-type]  # captions need no template
    folder.mkdir(parents=True)
    end = glyph_tokenizer().eos_token
    for shard in range(2):
        with wds.TarWriter(str(folder / f"shard-{shard:06d}.tar")) as writer:
            for index in range(shard * DOCUMENTS, (shard + 1) * DOCUMENTS):
                image, text = source.document(index).parts
                caption = text.text.removesuffix(end)
                writer.write({"__key__": f"{index:06d}", "png": _png(image.source), "txt": caption})


def _png(pixels: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def start(recipe: Recipe, out: Path, ranks: int = RANKS, after_step: Callable[[int], None] | None = None) -> list[int]:
    """Forks the ranks of a run; gives their process ids. What they fail with goes to `<out>.<rank>.log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            code = 1
            try:
                environment = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
                sys.stderr = out.with_suffix(f".{rank}.log").open("a")  # until the process ends
                quiet = Console(file=io.StringIO())
                loop.train(recipe, out, resume="auto", console=quiet, device="cpu", after_step=after_step)
                code = 0
            except BaseException as error:
                print(type(error).__name__, str(error)[:500], file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        children.append(child)
    return children


def end(children: list[int]) -> list[int]:
    """Their exit codes, once they are gone."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def kill(children: list[int]) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def alive(children: list[int]) -> bool:
    return any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for child in children)


def run(kills: int, folder: Path) -> dict[str, Any]:
    """What happened: how many kills hit, how many of them a save, and whether all is as it should be."""
    write_shards(folder / "shards")
    text = RECIPE.replace("SHARDS", str(folder / "shards")).replace("WORKERS", str(WORKERS))
    (folder / "killed.yaml").write_text(text.replace("EPOCHS", str(EPOCHS)))
    recipe = load_recipe(folder / "killed.yaml")
    gc.collect()
    gc.freeze()  # a collection in a fork then passes over the libraries
    began = time.monotonic()
    children = start(recipe, folder / "whole")
    metrics = folder / "whole" / "metrics.jsonl"
    while alive(children) and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.005)
    start_s = time.monotonic() - began
    codes = end(children)
    if any(codes):
        raise SystemExit(f"the run that nothing stops ended with {codes}: see {folder}")
    step_s = (time.monotonic() - began - start_s) / len(metrics.read_text().splitlines())

    draw = random.Random(7)
    hit = in_save = single = 0
    resumed_at = []
    while hit < kills:
        children = start(recipe, folder / "killed")
        deadline = time.monotonic() + draw.uniform(0.5 * start_s, start_s + 4 * step_s)
        while time.monotonic() < deadline and alive(children):
            time.sleep(0.005)
        if not alive(children):
            break  # it got through before the kill
        if draw.random() < 0.3:  # one rank dies first
            single += 1
            kill(children[:1])
            time.sleep(0.05)
        kill(children)
        end(children)
        hit += 1
        in_save += any((folder / "killed" / "checkpoints").glob(".writing-*"))
        steps = sorted((folder / "killed" / "checkpoints").glob("step-*"))
        resumed_at.append(int(steps[-1].name[5:]) if steps else 0)
    codes = end(start(recipe, folder / "killed"))

    documents = {}
    for name in ("whole", "killed"):
        lines = [json.loads(line) for line in (folder / name / "documents.jsonl").read_text().splitlines()]
        documents[name] = [(line["step"], line["keys"]) for line in lines]
    seen = Counter(key for _, keys in documents["killed"] for key in keys)
    weights = [(folder / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    return {
        "kills": hit,
        "in_save": in_save,
        "one_rank_first": single,
        "resumed_at": resumed_at,
        "steps": len(documents["whole"]),
        "last_codes": codes,
        "same_weights": weights[0] == weights[1],
        "same_documents": documents["whole"] == documents["killed"],
        "each_document_once_an_epoch": len(seen) == 2 * DOCUMENTS and set(seen.values()) == {EPOCHS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print the results as docs/results/ holds them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(options.kills, Path(folder))
    if options.json:
        facts = run_facts(f"scripts/kill_and_resume.py --kills {options.kills} --json")
        results = [
            result("kills", kills := found.pop("kills"), "kills", 1),
            *(result(name, found.pop(name), "kills", kills) for name in ("in_save", "one_rank_first")),
            result("steps", found.pop("steps"), "steps", 1),
        ]
        print(json.dumps(facts | {"results": results} | found, indent=1))
    else:
        for name, value in found.items():
            print(f"{name}: {value}")
    wanted = ("same_weights", "same_documents", "each_document_once_an_epoch")
    if not all(found[name] for name in wanted) or any(found["last_codes"]):
        raise SystemExit("the killed run differs")


if __name__ == "__main__":
    main()
