"""The tiny decoder of `tests/oracles`, run through `foveate.reduce` as the fixtures were made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

import foveate
from foveate.vlm.pruning import sparsevlm
from foveate.vlm.pruning.base import Prefill, Pruner, Selection, Sight
from foveate.vlm.pruning.clustering import cluster_tokens

FOLDER = Path(__file__).parents[2] / "oracles"


def load(name: str) -> dict[str, Any]:
    """A fixture's arrays; numbers as Python's, text left out."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files if file[key].dtype.kind in "fiub"}
    return {
        key: torch.from_numpy(array).to(torch.float32 if array.dtype == np.float16 else None)
        if array.ndim
        else array.item()
        for key, array in arrays.items()
    }


def decoder(heads: int = 4, kv_heads: int = 4) -> LlamaModel:
    """The fixtures' model, float32; fewer kv heads take the first rows of the projections."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
    )
    model = LlamaModel(config).eval()
    weights = {"embed_tokens.weight": torch.zeros(8, 64)}
    for name, weight in load("weights").items():
        narrow = ".k_proj." in name or ".v_proj." in name
        weights[name] = weight[: 64 * kv_heads // heads] if narrow else weight
    model.load_state_dict(weights)
    return model


@dataclass
class Run:
    """What a run of a fixture gave.

    Attributes:
        sights, selections: of each stage, sample after sample.
        last_hidden: [batch, kept, 64], of the prefill.
        decode_hidden: [batch, steps, 64].
        kv_len_prefill, kv_len_decode: columns that each layer's cache holds.
    """

    sights: list[Sight]
    selections: list[Selection]
    last_hidden: torch.Tensor
    decode_hidden: torch.Tensor
    kv_len_prefill: list[int]
    kv_len_decode: list[int]
    prefill: Prefill


@torch.no_grad()
def run(case: dict[str, Any], method: Pruner) -> Run:
    """Prefill and decode of a fixture."""
    model = decoder(case.get("num_heads", 4), case.get("num_kv_heads", 4))
    embeds = case["inputs_embeds"]
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, case["sys_len"] : case["sys_len"] + case["vis_len"]] = True
    cache = DynamicCache(config=model.config)
    sights, selections, decoded = [], [], []
    select, noises = type(method).select, iter(case[f"P{i}_noise"] for i in range(3) if f"P{i}_noise" in case)

    def noted(self: Pruner, stage: int, sight: Sight) -> Selection:
        sights.append(sight)
        selections.append(select(self, stage, sight))
        return selections[-1]

    def cluster(tokens: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
        return cluster_tokens(tokens, clusters, next(noises, None))  # which the reference programs draw

    reduction = foveate.reduce(model, method, visual_mask=visual)
    clustering = mock.patch.object(sparsevlm, "cluster_tokens", cluster)
    with clustering, mock.patch.object(type(method), "select", noted), reduction as m:
        last_hidden = m(inputs_embeds=embeds, past_key_values=cache).last_hidden_state
        kv_len_prefill = [layer.keys.shape[2] for layer in cache.layers]
        for step in case.get("decode_embeds", embeds[:, :0]).split(1, dim=1):
            if step.shape[1]:
                decoded.append(m(inputs_embeds=step, past_key_values=cache).last_hidden_state)
    kv_len_decode = [layer.keys.shape[2] for layer in cache.layers]
    decode_hidden = torch.cat(decoded, dim=1) if decoded else embeds[:, :0]
    (prefill,) = reduction.prefills
    return Run(sights, selections, last_hidden, decode_hidden, kv_len_prefill, kv_len_decode, prefill)


def assert_same_outputs(got: Run, case: dict[str, Any], atol: float) -> None:
    """Hidden states of prefill and decode, and what each layer's cache holds, are the fixture's."""
    torch.testing.assert_close(got.last_hidden, case["last_hidden"], rtol=0, atol=atol)
    assert got.kv_len_prefill == case["kv_len_prefill"].tolist()
    if "decode_hidden" in case:
        torch.testing.assert_close(got.decode_hidden, case["decode_hidden"], rtol=0, atol=atol)
        assert got.kv_len_decode == case["kv_len_decode"].tolist()
