"""What the tests of evaluations share."""

from typing import Any

import pytest
import torch

from foveate.train.build import build_model
from foveate.train.recipe import load_recipe


@pytest.fixture(scope="session")
def row_model() -> Any:
    """The recipe sort-row's model, with random weights, but smaller, and its processor."""
    torch.manual_seed(0)
    recipe = load_recipe("sort-row", [
        "model.text.hidden_size=32", "model.text.intermediate_size=48", "model.text.num_attention_heads=2",
        "model.text.num_key_value_heads=2", "model.vision.hidden_size=24", "model.vision.intermediate_size=32",
        "model.vision.num_hidden_layers=2",
    ])  # fmt: skip
    model, processor = build_model(recipe.model)
    return model.eval(), processor


@pytest.fixture(scope="session")
def needle_model() -> Any:
    """The recipe needle's model, with random weights, but smaller, and its processor."""
    torch.manual_seed(0)
    recipe = load_recipe("needle", [
        "model.text.hidden_size=32", "model.text.intermediate_size=48", "model.text.num_attention_heads=2",
        "model.text.num_key_value_heads=2", "model.text.num_hidden_layers=2", "model.vision.hidden_size=24",
        "model.vision.intermediate_size=32", "model.vision.num_hidden_layers=1",
    ])  # fmt: skip
    model, processor = build_model(recipe.model)
    return model.eval(), processor
