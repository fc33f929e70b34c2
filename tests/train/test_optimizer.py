import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from foveate.train.build import build_model
from foveate.train.distributed import World
from foveate.train.engine import Micro, TorchEngine
from foveate.train.objectives import RegionText
from foveate.train.optimizer import learning_rate_scale, make_optimizer, set_learning_rates, set_trainable
from foveate.train.recipe import Recipe, StageRecipe
from foveate.train.stages import make_loader, make_objective
from foveate.vlm.model import FoveateForConditionalGeneration


def stage_of(**fields: object) -> StageRecipe:
    return StageRecipe(
        **({"name": "s", "steps": 10, "learning_rates": {"llm": 1.0}, "data": [{"kind": "captions"}]} | fields)
    )


def test_schedule_is_linear_warm_up_and_cosine() -> None:
    stage = stage_of(steps=10, warmup_steps=4, final_fraction=0.1)
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    expected = [0.25, 0.5, 0.75, 1.0, *cosine]
    assert [learning_rate_scale(stage, step, 0.0) for step in range(10)] == pytest.approx(expected)
    assert expected[4] == 1.0


@pytest.mark.parametrize(("steps", "warmup", "final"), [(1, 0, 0.0), (7, 0, 0.3), (100, 99, 0.0), (50, 10, 1.0)])
def test_schedule_stays_between_its_ends(steps: int, warmup: int, final: float) -> None:
    stage = stage_of(steps=steps, warmup_steps=warmup, final_fraction=final)
    scales = [learning_rate_scale(stage, step, 0.0) for step in range(steps)]
    assert scales[warmup] == 1.0
    assert scales[:warmup] == sorted(scales[:warmup]) and all(0 < s <= 1 for s in scales[:warmup])
    assert scales[warmup:] == sorted(scales[warmup:], reverse=True) and min(scales[warmup:]) >= final


def test_schedule_scales_every_part_from_its_own_peak() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups = [{"params": [a], "peak_lr": 3.0}, {"params": [b], "peak_lr": 0.5}]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):  # the second time from rates that the first has set
        set_learning_rates(optimizer.param_groups, learning_rate_scale(stage_of(warmup_steps=4), 1, 0.0))
        assert [group["lr"] for group in optimizer.param_groups] == [1.5, 0.25]


@pytest.fixture
def model(tiny_recipe: Callable[..., Recipe]) -> FoveateForConditionalGeneration:
    torch.manual_seed(0)
    return build_model(tiny_recipe().model)[0]


@pytest.mark.parametrize(("progress", "scale"), [(0.0, 1e-3 / 0.101), (0.05, 0.051 / 0.101), (0.1, 1.0), (0.55, 0.5)])
def test_epochs_are_measured_by_progress(progress: float, scale: float) -> None:
    stage = stage_of(steps=None, epochs=2, warmup_fraction=0.1, data=[{"kind": "captions", "documents": 9}])
    assert learning_rate_scale(stage, 12345, progress) == pytest.approx(scale)


def test_warmup_fraction_is_of_the_steps_and_constant_stays() -> None:
    stage = stage_of(steps=20, warmup_fraction=0.1, schedule="constant")
    assert [learning_rate_scale(stage, step, 0.0) for step in range(20)] == [0.5] + [1.0] * 19


PARTS = [
    {"tower": 1e-3},
    {"projector": 1e-3},
    {"llm": 1e-3},
    {"tower": 1e-3, "llm": 2e-3},
    {"projector": 1e-3, "llm": 2e-3},
    {"tower": 1e-3, "projector": 2e-3, "llm": 3e-3},
]
PREFIXES = {"tower": "vision_tower.", "projector": "multi_modal_projector.", "llm": "language_model."}


@pytest.mark.parametrize("rates", PARTS, ids=["+".join(rates) for rates in PARTS])
def test_every_trained_parameter_is_in_one_group(
    model: FoveateForConditionalGeneration, rates: dict[str, float]
) -> None:
    stage = stage_of(learning_rates=rates, weight_decay=0.1)
    set_trainable(model, stage)
    optimizer = make_optimizer(model, stage)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        part = next(part for part, prefix in PREFIXES.items() if name.startswith(prefix))
        assert parameter.requires_grad == (part in rates), name
        assert (id(parameter) in groups) == (part in rates), name
        if part in rates:
            group = groups[id(parameter)]
            assert (group["part"], group["lr"], group["peak_lr"]) == (part, rates[part], rates[part])
            owner = model.get_submodule(name.rpartition(".")[0])
            plain = type(owner).__name__.endswith("Norm") or name.endswith("bias")
            assert group["weight_decay"] == (0.0 if plain else 0.1), name
    assert any("norm" in name for name, _ in model.named_parameters())
    assert any(name.endswith("bias") for name, _ in model.named_parameters())


def test_parts_of_parts_train_alone_at_their_own_rates_and_decays(model: FoveateForConditionalGeneration) -> None:
    rates = {"tower_norms": 1e-3, "llm_norms": 2e-3, "llm_embeddings": 3e-3}
    stage = stage_of(learning_rates=rates, weight_decay=0.1, weight_decays={"llm_embeddings": 0.2})
    set_trainable(model, stage)
    groups = {id(p): group for group in make_optimizer(model, stage).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        norm = type(model.get_submodule(name.rpartition(".")[0])).__name__.endswith("Norm")
        embedding = "embed_tokens" in name  # the head is tied to it
        trained = (norm and not name.startswith("multi_modal_projector")) or embedding
        assert (parameter.requires_grad, id(parameter) in groups) == (trained, trained), name
        if trained:
            part = "llm_embeddings" if embedding else "tower_norms" if name.startswith("vision") else "llm_norms"
            assert (groups[id(parameter)]["part"], groups[id(parameter)]["lr"]) == (part, rates[part])
            assert groups[id(parameter)]["weight_decay"] == (0.2 if embedding else 0.0)


def test_head_trains_at_the_highest_rate(model: FoveateForConditionalGeneration, tiny_recipe: Callable) -> None:
    stage = tiny_recipe("stages.warmup.weight_decay=0.3").stages[0]
    set_trainable(model, stage)
    head = RegionText()
    groups = [g for g in make_optimizer(model, stage, head).param_groups if g["part"] == "head"]
    assert sum(len(g["params"]) for g in groups) == len(list(head.parameters()))
    assert {g["lr"] for g in groups} == {2e-3}
    undecayed = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert undecayed == {id(head.log_scale), id(head.bias)}


def train_steps(recipe: Recipe, number: int, steps: int = 3) -> tuple[dict, dict, dict]:
    """Weights before and after a few steps of a stage, and the gradients of one more backward pass."""
    torch.manual_seed(0)
    model, processor = build_model(recipe.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stage = recipe.stages[number]
    set_trainable(model, stage)
    objective = make_objective(stage, model, processor, same_calls=False)
    optimizer = make_optimizer(model, stage, getattr(objective, "head", None))
    engine = TorchEngine(objective, optimizer, "fp32", stage.max_grad_norm, World())
    loader = make_loader(recipe, number, model.config, processor)
    for step in range(steps):
        batch = loader.next()
        set_learning_rates(engine.param_groups, learning_rate_scale(stage, step, 0.0))
        engine.step([Micro(micro.inputs, micro.keys) for micro in batch.micro], batch.loss_tokens)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = loader.next()
    objective(batch.micro[0].inputs, batch.loss_tokens).backward()
    return before, after, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("number", range(4))
def test_frozen_parts_do_not_change_and_trained_ones_do(tiny_recipe: Callable[..., Recipe], number: int) -> None:
    recipe = tiny_recipe()
    before, after, gradients = train_steps(recipe, number)
    for part, prefix in PREFIXES.items():
        names = [name for name in before if name.startswith(prefix)]
        changed = [name for name in names if not before[name].equal(after[name])]
        if part in recipe.stages[number].learning_rates:
            assert len(changed) > 0.7 * len(names)
            assert any(gradients[name] is not None for name in names)
        else:
            assert changed == []
            assert all(gradients[name] is None for name in names)


def test_a_parts_rate_sets_how_far_it_moves(tiny_recipe: Callable[..., Recipe]) -> None:
    """Adam's first step moves each weight by its learning rate, in every part by the part's own."""
    rates = {"tower": 1e-4, "projector": 1e-3, "llm": 1e-2}
    recipe = tiny_recipe(f"stages.video.learning_rates={rates}")
    before, after, _ = train_steps(recipe, 2, steps=1)
    for part, prefix in PREFIXES.items():
        moved = max(float((after[n] - before[n]).abs().max()) for n in before if n.startswith(prefix))
        assert moved == pytest.approx(rates[part], rel=0.02)


def test_weight_decay_shrinks_matrices_alone(tiny_recipe: Callable[..., Recipe]) -> None:
    """Against a run without decay: θ ← θ - lr·λ·θ on the matrices, before Adam's own step."""
    plain = train_steps(tiny_recipe("stages.video.weight_decay=0"), 2, steps=1)
    decayed = train_steps(tiny_recipe("stages.video.weight_decay=0.5"), 2, steps=1)
    for name, start in plain[0].items():
        expected = plain[1][name] - (1e-3 * 0.5 * start if start.ndim >= 2 else 0)
        torch.testing.assert_close(decayed[1][name], expected, rtol=1e-5, atol=1e-6)
