"""What every test runs under: no network, fixed seeds, Triton's interpreter where there is no CUDA device."""

import gc
import os

# Read when the libraries are imported, so set first.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as cli.py does: threads that spin slow a busy machine down
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start: `make test` runs two files at a time

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from foveate.train.recipe import Recipe

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)  # sums differ in their last bits with the number of threads


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # collections during the tests, and in what they fork, then pass over the libraries


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else nanobind tells of leaks


# Every objective, kind of media and change between stages, in seconds.
TINY_RECIPE = """
name: tiny
threads: 1
precision: fp32
model:
  vision: {model_type: siglip2_vision_model, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
           num_attention_heads: 2, patch_size: 8, num_patches: 64, vision_use_head: false}
  text: {model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
         num_key_value_heads: 1, tie_word_embeddings: true, initializer_range: 0.08, max_position_embeddings: 2048,
         attention_dropout: 0.1}
  vision_feature_layer: null
  attn_implementation: eager
  processor: {image_size: [64, 64], video_size: [32, 32]}
tracking: {wandb: disabled, every_steps: 2}
checkpoint: {every_steps: 3, keep: 2}
stages:
  - name: warmup
    objective: region_text
    steps: 5
    learning_rates: {tower: 2.0e-3, projector: 1.0e-3}
    batch: {rows: 2}
    data: [{kind: regions}]
  - name: align
    steps: 4
    warmup_steps: 2
    weight_decay: 0.05
    learning_rates: {projector: 2.0e-3, llm: 1.0e-3}
    batch: {rows: 2, tokens: 200, window: 8, micro_batches: 2}
    data: [{kind: captions, objects: [1, 4]}, {kind: scene_chat, turns: [1, 4]}]
  - name: video
    steps: 3
    learning_rates: {tower: 1.0e-3, projector: 1.0e-3, llm: 1.0e-3}
    rope_theta: 5.0e+4
    batch: {rows: 2, tokens: 200, window: 8}
    data: [{kind: clip_chat}, {kind: interleaved, objects: [1, 4]}]
  - name: last
    steps: 3
    learning_rates: {llm: 1.0e-3}
    batch: {rows: 1, tokens: 200, window: 8}
    data: [{kind: needle_chat}]
"""


@pytest.fixture
def tiny_recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture
def tiny_recipe(tiny_recipe_path: Path) -> "Callable[..., Recipe]":
    """A recipe of four short stages on a tiny model, with overrides as on the command line."""
    from foveate.train.recipe import load_recipe

    return lambda *overrides: load_recipe(tiny_recipe_path, overrides)


@pytest.fixture
def same_threads() -> Iterator[None]:
    """For tests of what sets torch's number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
