"""Training on images of several tiles, pooled videos and drawn numbers of queries."""

from typing import Any

import numpy as np
import pytest
import torch

from foveate.data.document import Document, DocumentError, Image, Text, Video
from foveate.data.encoding import drawn_queries, encode
from foveate.data.packing import collate
from foveate.train.build import build_model
from foveate.train.objectives import NextToken
from foveate.train.recipe import ModelRecipe
from foveate.vlm import model as model_module
from foveate.vlm.model import FoveateForConditionalGeneration
from foveate.vlm.processor import FoveateProcessor

VISION = {
    "model_type": "siglip2_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "patch_size": 4, "num_patches": 16, "vision_use_head": False,
}  # fmt: skip
TEXT = {
    "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "resize": {},
    "s2": {"tiling": "s2", "s2_scales": [16, 32]},
    "dynamic-s2": {"tiling": "dynamic-s2", "s2_scales": [16, 32], "projector": "downsample-3x3"},
    "tiles": {"tiling": "tiles", "video_pool": (2, 1, 1)},
    "anyres": {"tiling": "anyres", "projector": "mlp2x"},
    "native": {"tiling": "native", "video_pool": (2, 2, 1), "processor": {"max_patches": 64}},
    "resampler": {"tiling": "tiles", "projector": "resampler", "resampler_tokens": 6},
    "native resampler": {"tiling": "native", "projector": "resampler", "resampler_tokens": 6},
    "budget": {"tiling": "tiles", "processor": {"max_visual_tokens": 28, "min_frames": 2}},
}


def made(name: str) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    options = OPTIONS[name] | {
        "processor": {"image_size": (16, 16), "max_tiles": 4} | OPTIONS[name].get("processor", {})
    }
    torch.manual_seed(0)
    model, processor = build_model(ModelRecipe(vision=VISION, text=TEXT, vision_feature_layer=None, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double(), processor


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


DOCUMENTS = [
    Document("wide", (Image(noise(0, 20, 60)), Text("red circle", loss=True))),
    Document("clip", (Text("what"), Video(noise(1, 5, 16, 24)), Text("blue square", loss=True))),
    Document("text", (Text("green green red", loss=True),)),
    Document(
        "both",
        (
            Image(noise(2, 40, 16)), Text("red", loss=True), Video(noise(3, 3, 30, 20)), Image(noise(4, 16, 16)),
            Text("a", loss=True),
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_a_packed_rows_loss_is_the_sum_of_its_documents(name: str) -> None:
    model, processor = made(name)
    objective = NextToken(model, processor, chunks=1, same_calls=False)
    samples = [encode(document, processor) for document in DOCUMENTS]
    total = sum(sample.loss_tokens for sample in samples)
    alone = [objective(collate([[sample]], processor).inputs, total).item() for sample in samples]
    packed = objective(collate([samples[:3], samples[3:]], processor, raw_pixels=True).inputs, total).item()
    assert packed == pytest.approx(sum(alone), rel=1e-5)
    inputs = collate([[samples[3]]], processor).inputs
    assert model(**inputs).loss.item() * samples[3].loss_tokens / total == pytest.approx(alone[3], rel=1e-5)


@pytest.mark.parametrize("same_calls", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_without_media_tower_and_projector_run_once_and_get_zero_gradients(name: str, same_calls: bool) -> None:
    model, processor = made(name)
    objective = NextToken(model, processor, chunks=1, same_calls=same_calls)
    calls: dict[str, int] = {}

    def count(module: str) -> Any:
        return lambda *_: calls.update({module: calls.get(module, 0) + 1})

    linears = {n: m for n, m in model.multi_modal_projector.named_modules() if isinstance(m, torch.nn.Linear)}
    for module, part in {"tower": model.vision_tower, **linears}.items():
        part.register_forward_hook(count(module))
    objective(collate([[encode(DOCUMENTS[2], processor)]], processor).inputs, 2).backward()
    assert set(calls) == {"tower", *linears} and set(calls.values()) == {1 + same_calls}
    for name_, parameter in model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name_
    calls.clear()
    objective(collate([[encode(DOCUMENTS[3], processor)]], processor).inputs, 2).backward()
    assert set(calls.values()) == {2}  # once for images, once for frames: alike on all ranks


@pytest.mark.parametrize("name", ["tiles", "native"])
def test_validation_calls_the_tower_once_for_any_number_of_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = made(name)
    monkeypatch.setattr(model_module, "TOWER_BATCH", 1)
    calls: list[int] = []
    model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    samples = [encode(document, processor) for document in DOCUMENTS]
    with torch.inference_mode():
        NextToken(model, processor, chunks=1, same_calls=True)(collate([samples], processor).inputs, 2)
    assert len(calls) == 2  # images, frames


def test_a_document_whose_tiles_would_have_to_shrink_is_refused() -> None:
    _, processor = made("budget")
    processor.max_visual_tokens = 20
    assert len(encode(DOCUMENTS[0], processor).images) == 4
    with pytest.raises(DocumentError, match="max_visual_tokens is 20, which takes tiles of 8x8 pixels") as error:
        encode(DOCUMENTS[3], processor)
    assert error.value.reason == "too_long"
    processor.max_visual_tokens = 1
    with pytest.raises(DocumentError, match="max_visual_tokens is 1, too few for a text's media"):
        encode(DOCUMENTS[3], processor)


def test_queries_are_drawn_by_key_over_all_powers_of_two() -> None:
    _, processor = made("resampler")
    drawn = [drawn_queries(f"doc/{index}", processor) for index in range(200)]
    counts = {queries: drawn.count(queries) for queries in set(drawn)}
    assert set(counts) == {1, 2, 4, 6} and min(counts.values()) > 30
    assert drawn_queries("doc/7", processor) == drawn[7]
    sample = encode(Document("doc/7", DOCUMENTS[1].parts), processor)
    assert (sample.input_ids == processor.video_token_id).sum() == 5 * drawn[7]
    processor.train_queries = [3]
    assert drawn_queries("doc/7", processor) == 3
    assert drawn_queries("doc/7", made("tiles")[1]) is None
