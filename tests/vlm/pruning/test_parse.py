"""Methods as text."""

from dataclasses import FrozenInstanceError, fields
from typing import Any, get_type_hints

import pytest

from foveate.vlm.pruning.parse import METHODS, method_text, parse_method
from foveate.vlm.spec import accepted


@pytest.mark.parametrize(
    ("text", "name", "given"),
    [
        ("fastv", "FastV", {}),
        ("fastv:", "FastV", {}),
        (" FastV : layer = 3 , keep=.25 ", "FastV", {"layer": 3, "keep": 0.25}),
        ("random:keep=1,seed=7", "Random", {"keep": 1.0, "seed": 7}),
        ("pyramiddrop:layers=2/4,keep=0.5/1e-1", "PyramidDrop", {"layers": (2, 4), "keep": (0.5, 0.1)}),
        ("pyramiddrop:layers=3,keep=0.5,reindex=False", "PyramidDrop",
         {"layers": (3,), "keep": (0.5,), "reindex": False}),
        ("sparsevlm:tokens=64", "SparseVLM", {"tokens": 64}),
        ("sparsevlm:tokens=40/20/10,scale=none", "SparseVLM", {"tokens": (40, 20, 10), "scale": None}),
        ("sparsevlm+:heads=2", "SparseVLMPlus", {"heads": 2}),
        ("vtc-cls:start=none", "VTCCLS", {"start": None}),
        ("vtc-cls:start=3", "VTCCLS", {"start": 3}),
        ("dycoke:keep=0.5,last_group=false", "DyCoke", {"keep": 0.5, "last_group": False}),
    ],
)  # fmt: skip
def test_a_text_says_which_method_with_which_fields(text: str, name: str, given: dict[str, Any]) -> None:
    method = parse_method(text)
    assert type(method).__name__ == name
    assert method == type(method)(**given)
    for field, value in given.items():
        assert type(getattr(method, field)) is type(value)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_frozen_and_is_made_again_from_its_text(name: str) -> None:
    method = parse_method(name)
    text = method_text(method)
    assert text.startswith(f"{name}:") and text.count("=") == len(fields(method))
    assert parse_method(text) == method
    assert method.family in ("llm", "tower", "video")
    with pytest.raises(FrozenInstanceError):
        setattr(method, fields(method)[0].name, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "method is ''; accepted: fastv, sparsevlm, sparsevlm+, pyramiddrop, random, lowest, visionzip"),
        ("fastw:keep=1", "method is 'fastw'; accepted: fastv, "),
        ("fastv=2", "method is 'fastv=2'; accepted: fastv, "),
        ("fastv:layr=2", "fastv has no field 'layr'; accepted: layer, keep"),
        ("fastv:scored_by=own", "fastv has no field 'scored_by'; accepted: layer, keep"),
        ("fastv:layer", "fastv: 'layer' is not FIELD=VALUE; accepted fields: layer, keep"),
        ("fastv:layer=2,,keep=1", "fastv: '' is not FIELD=VALUE"),
        ("fastv:layer=2,layer=2", "fastv: layer is given twice"),
        ("fastv:layer=2.5", "fastv: layer is '2.5'; accepted: a whole number"),
        ("fastv:layer=", "fastv: layer is ''; accepted: a whole number"),
        ("fastv:keep=half", "fastv: keep is 'half'; accepted: a number"),
        ("fastv:keep=nan", "fastv: keep is 'nan'; accepted: a number"),
        ("fastv:keep=2", "fastv: keep is 2.0; accepted: a fraction"),
        ("evs:reindex=yes", "evs: reindex is 'yes'; accepted: true or false"),
        ("pyramiddrop:layers=8//2", "pyramiddrop: layers is '8//2'; accepted: whole numbers joined by '/'"),
        ("pyramiddrop:layers=8/4,keep=0.5/0.2", "pyramiddrop: layers is (8, 4); accepted: ascending"),
        ("sparsevlm:tokens=few",
         "sparsevlm: tokens is 'few'; accepted: a whole number, or whole numbers joined by '/', or none"),
    ],
)  # fmt: skip
def test_what_is_no_method_says_what_is_accepted(text: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_method(text)
    assert said in str(error.value)


def test_every_kind_of_field_has_words() -> None:
    for method in METHODS.values():
        hints = get_type_hints(method)
        assert all(accepted(hints[field.name]) for field in fields(method))
