import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from foveate.data.glyphs import GlyphSource
from foveate.data.mixture import Mixture
from foveate.data.packing import Batch, Packer, collate
from foveate.train.build import build_model
from foveate.train.engine import NonFiniteError, PlainEngine, resolve_precision
from foveate.train.recipe import Recipe
from foveate.train.stages import make_losses

CPU = torch.device("cpu")


def engine_of(module: nn.Module, max_grad_norm: float = 1e9, precision: str = "fp32", **options: float) -> PlainEngine:
    """With plain gradient descent at rate 1, so that a step moves each weight by its gradient."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, **options)
    return PlainEngine([module], optimizer, precision, max_grad_norm, CPU)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# Accumulation


def uneven_batches(recipe: Recipe) -> tuple[list[Batch], Batch, nn.Module]:
    """Three micro-batches with unequal numbers of predicted tokens, and one batch of all their rows."""
    torch.manual_seed(0)
    model, processor = build_model(recipe.model)
    sources = [GlyphSource(kind, processor) for kind in ("captions", "clip_chat")]
    packer = Packer(Mixture(sources, [1, 1], processor, seed=0), 160, 64, window=8)
    rows = [packer.row() for _ in range(6)]
    parts = [rows[:1], rows[1:3], rows[3:]]
    return [collate(part, processor) for part in parts], collate(rows, processor), model.eval()


def test_accumulated_micro_batches_step_like_one_batch(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    micro, whole, model = uneven_batches(recipe)
    counts = [batch.loss_tokens for batch in micro]
    assert len(set(counts)) == 3 and sum(counts) == whole.loss_tokens

    # the reference: mean cross-entropy over all predicted tokens, by hand
    inputs = dict(whole.inputs)
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits
    log_p = logits[:, :-1].log_softmax(-1)
    following = labels[:, 1:]
    chosen = log_p.gather(-1, following.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = -(chosen * (following != -100)).sum() / (following != -100).sum()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    before = weights(model)
    stage = recipe.stages[1]
    loss, norm = engine_of(model).step(make_losses(stage, model, None, micro, CPU), [b.keys for b in micro])
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert norm == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in gradients.values())), rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(before[name] - weights(model)[name], gradient, rtol=1e-5, atol=1e-6)


def test_gradients_do_not_leak_into_the_next_step(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    micro, _, model = uneven_batches(recipe)
    engine = engine_of(model)
    start = weights(model)
    losses = make_losses(recipe.stages[1], model, None, micro[:1], CPU)
    engine.step(losses, [micro[0].keys])
    first = {name: start[name] - value for name, value in weights(model).items()}
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    engine.step(losses, [micro[0].keys])
    for name, value in weights(model).items():
        assert (start[name] - value).equal(first[name])


# Clipping


@pytest.mark.parametrize("limit", [0.5, 5.0, 50.0])
def test_gradients_are_clipped_together(limit: float) -> None:
    a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    for module in (a, b):
        nn.init.zeros_(module.weight)
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=1.0)
    engine = PlainEngine([a, b], optimizer, "fp32", limit, CPU)
    loss, norm = engine.step([lambda: 3 * a.weight.sum() + 4 * b.weight.sum()], [["key"]])
    assert (loss, norm) == (0.0, pytest.approx(5.0))
    scale = min(1.0, limit / 5)
    assert (-a.weight.item(), -b.weight.item()) == pytest.approx((3 * scale, 4 * scale), rel=1e-5)


# Non-finite


class Poisoned(nn.Module):
    """A loss that is not finite, or finite with a gradient that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 0.0]))

    def loss(self, kind: str) -> torch.Tensor:
        return {
            "good": self.weight.sum(),
            "nan": self.weight.sum() * math.nan,
            "inf": self.weight.sum() / 0,
            "-inf": -self.weight.sum() / 0,
            "gradient": self.weight[1].abs().sqrt(),  # of 0: the gradient is infinite
        }[kind]


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_non_finite_loss_stops_before_the_step_and_names_its_documents(kind: str, place: int) -> None:
    module = Poisoned()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0)
    engine = PlainEngine([module], optimizer, "fp32", 1.0, CPU)
    engine.step([lambda: module.loss("good")], [["fine"]])
    before, state = weights(module), {k: v.clone() for k, v in optimizer.state[module.weight].items()}
    kinds = ["good"] * 3
    kinds[place] = kind
    keys = [[f"doc/{i}{c}" for c in "ab"] for i in range(3)]
    with pytest.raises(NonFiniteError, match=rf"loss is -?(nan|inf).*doc/{place}a, doc/{place}b$"):
        engine.step([lambda k=k: module.loss(k) for k in kinds], keys)
    assert module.weight.equal(before["weight"])
    assert all(value.equal(state[name]) for name, value in optimizer.state[module.weight].items())
    assert module.weight.grad is None


def test_non_finite_gradient_stops_before_the_step_and_names_all_documents() -> None:
    module = Poisoned()
    before = weights(module)
    keys = [[f"doc/{i}" for i in range(20)], ["other"]]
    with pytest.raises(NonFiniteError, match=r"gradient norm is (inf|nan)") as caught:
        engine_of(module, max_grad_norm=1.0).step([lambda: module.loss("gradient"), lambda: module.loss("good")], keys)
    assert str(caught.value).split(": ", 1)[1].split(", ") == [*keys[0], "other"]
    assert module.weight.equal(before["weight"])
    assert module.weight.grad is None


# Precision


def test_bf16_computes_in_bf16_and_keeps_fp32_weights() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    seen: list[torch.dtype] = []
    module[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        engine = PlainEngine([module], optimizer, precision, 1.0, CPU)
        before = weights(module)
        engine.step([lambda: module(torch.ones(2, 8)).float().mean()], [["key"]])
        assert seen.pop() == dtype
        assert all(p.dtype == torch.float32 for p in module.parameters())
        assert all(s["exp_avg"].dtype == torch.float32 for s in optimizer.state.values())
        # a step of 1e-4 is below bf16's resolution of these weights: it is not lost
        assert all(not value.equal(before[name]) for name, value in weights(module).items())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_named_precision_is_taken(precision: str) -> None:
    assert resolve_precision(precision, CPU) == precision
    assert resolve_precision("auto", CPU) in ("bf16", "fp32")
