import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from foveate.data.document import Image, Text
from foveate.train.build import build_model
from foveate.train.objectives import RegionText
from foveate.train.recipe import Recipe
from foveate.train.stages import make_loader


def test_region_text_is_the_sigmoid_loss() -> None:
    """Against loops over every pair, in double precision."""
    torch.manual_seed(0)
    regions, texts, labels = torch.randn(6, 8), torch.randn(4, 8), torch.tensor([0, 3, 1, 1, 2, 0])
    head = RegionText()
    t, b = math.exp(head.log_scale.item()), head.bias.item()
    expected = 0.0
    for i, region in enumerate(regions.double().numpy()):
        for j, text in enumerate(texts.double().numpy()):
            logit = t * region @ text / np.linalg.norm(region) / np.linalg.norm(text) + b
            expected += math.log1p(math.exp(-logit if labels[i] == j else logit)) / len(regions)
    assert head(regions, texts, labels, len(regions)).item() == pytest.approx(expected, rel=1e-5)


def test_each_region_has_its_text() -> None:
    with pytest.raises(ValueError, match="6 tokens but 5 regions"):
        RegionText()(torch.randn(6, 8), torch.randn(4, 8), torch.zeros(5, dtype=torch.long), 6)


def test_region_batches_give_each_cell_its_words(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    model, processor = build_model(recipe.model)
    loader = make_loader(recipe, 0, model.config, processor)
    for step in range(3):
        (batch,) = loader.next().micro
        documents = [loader.mixture.document(2 * step + i) for i in range(2)]
        said = [
            processor.tokenizer.decode(batch.inputs["text_ids"][label], skip_special_tokens=True)
            for label in batch.inputs["labels"]
        ]
        assert said == [part.text for document in documents for part in document.parts if isinstance(part, Text)]
        pictures = np.stack([p.source for document in documents for p in document.parts if isinstance(p, Image)])
        assert batch.inputs["pixel_values"].equal(torch.from_numpy(pictures))
        assert batch.keys == tuple(document.key for document in documents)
        assert (batch.loss_tokens, batch.tiles) == (32, (1, 1))


@pytest.mark.parametrize("number", range(4))
def test_restored_batches_go_on(tiny_recipe: Callable[..., Recipe], number: int) -> None:
    recipe = tiny_recipe()
    model, processor = build_model(recipe.model)
    ahead = make_loader(recipe, number, model.config, processor)
    for _ in range(3):
        step = ahead.next()
    behind = make_loader(recipe, number, model.config, processor)
    behind.load_state_dict(json.loads(json.dumps(step.state)))
    for _ in range(3):
        for a, b in zip(ahead.next().micro, behind.next().micro, strict=True):
            assert a.keys == b.keys
            assert a.inputs.keys() == b.inputs.keys()
            assert all(a.inputs[name].equal(b.inputs[name]) for name in a.inputs)


def test_pictures_and_frames_of_a_region_batch_stand_in_the_order_of_their_texts(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    recipe = tiny_recipe(
        "stages.warmup.data=[{kind: regions}, {kind: frame_regions, frames: [1, 3]}]", "stages.warmup.batch.rows=6"
    )
    model, processor = build_model(recipe.model)
    (batch,) = make_loader(recipe, 0, model.config, processor).next().micro
    said = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch.inputs["text_ids"]]
    texts = [said[label] for label in batch.inputs["labels"]]
    pictures, frames = batch.inputs["pixel_values"], batch.inputs["pixel_values_videos"]
    cells = [c for p in pictures for row in p.split(16, 0) for c in row.split(16, 1)]
    cells += [c for f in frames for row in f.split(16, 0) for c in row.split(16, 1)]
    assert len(cells) == len(texts) == 16 * len(pictures) + 4 * len(frames)
    assert len(pictures) and len(frames)
    for cell, text in zip(cells, texts, strict=True):  # something bright stands where the text names something
        brightest = cell.amax(-1).flatten().sort().values[-20:].float().mean()
        assert (brightest > 102) == (not text.endswith("nothing"))
