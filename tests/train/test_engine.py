import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from foveate.train.distributed import World
from foveate.train.engine import (
    SHIPPED,
    EngineConfigError,
    Micro,
    NonFiniteError,
    StateError,
    StepResult,
    TorchEngine,
    deepspeed_config,
    make_engine,
    resolve_precision,
    shares_weights,
)

CPU = torch.device("cpu")
RUNS = Path(__file__).with_name("engine_runs.py")
FP32 = 1e-6  # relative, of three steps


# One process


class Sum(nn.Module):
    """Adds up each of its weights times the input of its name."""

    def __init__(self, **weights: float) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.tensor([value])) for name, value in weights.items()})

    def forward(self, inputs: dict[str, torch.Tensor], total: float) -> torch.Tensor:
        return sum((self.weights[name] * x).sum() for name, x in inputs.items()) / total


def micro_of(*keys: str, **inputs: float) -> Micro:
    return Micro({name: torch.tensor([value]) for name, value in inputs.items()}, keys or ("key",))


def engine_of(module: Sum, max_grad_norm: float | None = None, precision: str = "fp32", lr: float = 1.0) -> TorchEngine:
    """With plain gradient descent, each weight in a part of its own."""
    groups = [{"params": [weight], "part": name} for name, weight in module.weights.items()]
    return TorchEngine(module, torch.optim.SGD(groups, lr=lr), precision, max_grad_norm, World())


def values(module: Sum) -> dict[str, float]:
    return {name: weight.item() for name, weight in module.weights.items()}


def test_micro_batches_are_summed_and_divided_by_the_total_alone() -> None:
    module = Sum(a=1.0, b=1.0)
    result = engine_of(module).step([micro_of(a=3.0, b=1.0), micro_of(a=5.0), micro_of(b=4.0)], total=2)
    assert result == StepResult(6.5, pytest.approx(math.hypot(4, 2.5)), {"a": 4.0, "b": 2.5})
    assert values(module) == {"a": -3.0, "b": -1.5}


def test_gradients_do_not_leak_into_the_next_step() -> None:
    module = Sum(a=0.0)
    engine = engine_of(module)
    engine.step([micro_of(a=2.0)], 1)
    assert module.weights["a"].grad is None
    assert engine.step([micro_of(a=3.0)], 1).grad_norm == 3.0
    assert values(module) == {"a": -5.0}


def test_learning_rates_are_taken_from_the_groups_at_each_step() -> None:
    module = Sum(a=0.0, b=0.0)
    engine = engine_of(module)
    for rate in (0.5, 2.0):
        engine.param_groups[1]["lr"] = rate
        engine.step([micro_of(a=1.0, b=1.0)], 1)
    assert values(module) == {"a": -2.0, "b": -2.5}


def test_parameter_that_the_loss_does_not_reach_has_a_gradient_of_zero() -> None:
    module = Sum(a=1.0, b=1.0)
    optimizer = torch.optim.AdamW([{"params": [*module.parameters()], "part": "all"}], lr=0.1, weight_decay=0.5)
    result = TorchEngine(module, optimizer, "fp32", None, World()).step([micro_of(a=2.0)], 1)
    assert result.grad_norm == 2.0
    assert values(module)["b"] == pytest.approx(0.95)  # decay alone


@pytest.mark.parametrize("limit", [0.5, 5.0, 50.0, None])
def test_gradients_are_clipped_together(limit: float | None) -> None:
    module = Sum(a=0.0, b=0.0)
    result = engine_of(module, limit).step([micro_of(a=3.0, b=4.0)], 1)
    assert result == StepResult(0.0, 5.0, {"a": 3.0, "b": 4.0})
    scale = 1 if limit is None else min(1.0, limit / 5)
    assert values(module) == pytest.approx({"a": -3 * scale, "b": -4 * scale}, rel=1e-5)


def test_evaluation_gives_the_loss_without_dropout_or_step() -> None:
    module = Sum(a=3.0)
    module.forward = lambda inputs, total: nn.functional.dropout(  # type: ignore[method-assign]
        module.weights["a"] * inputs["a"].expand(64), 0.5, module.training
    ).sum() / total  # fmt: skip
    engine = engine_of(module.train())
    assert engine.evaluate([micro_of(a=1.0), micro_of(a=2.0)], 64) == 9.0
    assert module.training and values(module) == {"a": 3.0} and module.weights["a"].grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_non_finite_loss_stops_before_the_step_and_names_its_documents(value: float, place: int) -> None:
    module = Sum(a=1.0)
    optimizer = torch.optim.AdamW([{"params": [module.weights["a"]], "part": "a"}])
    engine = TorchEngine(module, optimizer, "fp32", 1.0, World())
    engine.step([micro_of(a=1.0)], 1)
    before = engine.state_tensors()
    micro = [micro_of(f"doc/{n}a", f"doc/{n}b", a=value if n == place else 1.0) for n in range(3)]
    with pytest.raises(NonFiniteError, match=rf"loss is -?(nan|inf).*on: doc/{place}a, doc/{place}b$"):
        engine.step(micro, 1)
    after = engine.state_tensors()
    assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before)
    assert module.weights["a"].grad is None


def test_non_finite_gradient_names_all_documents() -> None:
    module = Sum(a=1e-30)
    module.forward = lambda inputs, total: (module.weights["a"] * 1e-30).sqrt().sum()  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"gradient norm is (inf|nan); stopped before the step on: x, y, z$"):
        engine_of(module).step([micro_of("x", "y"), micro_of("z")], 1)
    assert values(module) == pytest.approx({"a": 1e-30})


def test_bf16_computes_in_bf16_and_keeps_fp32_weights() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    wrapped = nn.Module()
    wrapped.inner = module
    wrapped.forward = lambda inputs, total: module(inputs["x"]).float().mean()  # type: ignore[method-assign]
    seen: list[torch.dtype] = []
    module[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        optimizer = torch.optim.AdamW([{"params": [*module.parameters()], "part": "all"}], lr=1e-4)
        engine = TorchEngine(wrapped, optimizer, precision, 1.0, World())
        before = [p.detach().clone() for p in module.parameters()]
        engine.step([Micro({"x": torch.ones(2, 8)}, ("key",))], 1)
        assert seen.pop() == dtype
        assert {value.dtype for value in engine.state_tensors().values()} == {torch.float32}
        # a step of 1e-4 is below bf16's resolution of these weights: it is not lost
        assert all(not value.equal(old) for value, old in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
def test_named_precision_is_taken(precision: str) -> None:
    assert resolve_precision(precision, CPU) == precision
    assert resolve_precision("auto", CPU) in ("bf16", "fp32")


# States that don't fit


def test_state_of_another_module_is_refused_by_name() -> None:
    engine = engine_of(Sum(a=1.0, b=2.0))
    state = engine.state_tensors()
    assert set(state) == {"weight/weights.a", "weight/weights.b"}
    with pytest.raises(StateError, match=r"only in one of both: weight/weights\.b$"):
        engine.load_state_tensors({"weight/weights.a": torch.zeros(1)})
    with pytest.raises(StateError, match=r"only in one of both: weight/other$"):
        engine.load_state_tensors(state | {"weight/other": torch.zeros(1)})
    with pytest.raises(StateError, match=r"weight/weights.b has shape \(2,\); this module's has \(1,\)"):
        engine.load_state_tensors(state | {"weight/weights.b": torch.zeros(2)})


def test_state_without_an_optimiser_starts_it_afresh() -> None:
    module = Sum(a=1.0)
    optimizer = torch.optim.AdamW([{"params": [module.weights["a"]], "part": "a"}], lr=0.1, weight_decay=0)
    engine = TorchEngine(module, optimizer, "fp32", None, World())
    engine.load_state_tensors({"weight/weights.a": torch.tensor([7.0])})
    engine.step([micro_of(a=1.0)], 1)
    state = engine.state_tensors()
    assert values(module)["a"] == pytest.approx(6.9) and state["optimizer/weights.a/step"] == 1


# DeepSpeed's files


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_hold_what_their_names_say(name: str, tmp_path: Path) -> None:
    config = deepspeed_config(name)["zero_optimization"]
    offloads = {key for key in config if key.startswith("offload")}
    assert config["stage"] == int(name[4])
    expected = {"zero2-offload": {"offload_optimizer"}, "zero3-offload": {"offload_optimizer", "offload_param"}}
    assert offloads == expected.get(name, set())
    assert shares_weights(name) == (config["stage"] == 3) and not shares_weights("torch")
    path = tmp_path / "mine.json"  # what we ship is acceptable from a user
    path.write_text(json.dumps({"zero_optimization": config}))
    assert deepspeed_config(str(path)) == {"zero_optimization": config}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping"),
        ({"train_batch_size": 8}, "train_batch_size"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer.type"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type"),
        ({"bf16": {"enabled": True}}, "bf16.enabled"),
        ({"communication_data_type": "auto"}, "communication_data_type"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param has no effect"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4"),
        ({"zero_optimization": {}}, "stage is None"),
    ],
)
def test_file_that_says_what_the_recipe_says_is_refused(change: dict, named: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | change))
    with pytest.raises(EngineConfigError, match=named) as caught:
        deepspeed_config(str(path))
    assert str(path) in str(caught.value) and "accepted" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_file_that_is_no_configuration_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(EngineConfigError, match=str(path)):
        deepspeed_config(str(path))


def test_unknown_engine_is_refused_with_those_that_there_are() -> None:
    module = Sum(a=1.0)
    with pytest.raises(EngineConfigError, match=r"'zero9'.*torch, zero0, zero1, zero2, zero2-offload"):
        make_engine("zero9", module, torch.optim.SGD(module.parameters()), "fp32", None, World(), 1)


@pytest.mark.parametrize(("precision", "shape", "named"), [("fp64", (1,), "fp64"), ("fp32", (), "scale")])
def test_what_deepspeed_can_not_do_is_refused(precision: str, shape: tuple[int, ...], named: str) -> None:
    module = nn.Module()
    module.scale = nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.SGD([{"params": [module.scale], "part": "head"}])
    with pytest.raises(EngineConfigError, match=named):
        make_engine("zero2", module, optimizer, precision, None, World(), 1)


# Several processes: engine_runs.py runs them


def load_runs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_runs", RUNS)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs = load_runs()
several = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all engines gave on 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("engines")
    command, env = [sys.executable, str(RUNS), str(folder)], {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return folder


def facts_of(out: Path, run: str) -> list[dict]:
    return json.loads((out / f"{run}.json").read_text())


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of a tensor's elements, by its largest element."""
    pairs = [(a[name].double(), value.double()) for name, value in b.items()]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


def absolute_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - value).abs().max()) for name, value in b.items())


def check_facts(facts: list[dict], expected: list[dict], tolerance: float) -> None:
    """Losses and norms of all steps."""
    for fact, right in zip(facts, expected, strict=False):
        assert fact["loss"] == pytest.approx(right["loss"], rel=tolerance)
        assert fact["norm"] == pytest.approx(right["norm"], rel=tolerance)
        assert fact["parts"] == pytest.approx(right["parts"], rel=tolerance)
        assert math.hypot(*fact["parts"].values()) == pytest.approx(fact["norm"], rel=1e-12)


@several
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("ranks", runs.SIZES)
@pytest.mark.parametrize("name", runs.EQUAL)
def test_three_steps_equal_those_without_an_engine(out: Path, name: str, ranks: int, accumulation: int) -> None:
    run = f"sgd-{ranks}-{accumulation}-{name}"
    weights, expected = load_file(out / f"{run}.safetensors"), load_file(out / "reference-sgd.safetensors")
    exact = name == "torch"  # in fp64
    assert {weight.dtype for key, weight in weights.items() if "quantised" not in key} == {
        torch.float64 if exact else torch.float32
    }
    difference = absolute_difference(weights, expected) if exact else relative_difference(weights, expected)
    assert difference <= (1e-9 if exact else FP32)
    check_facts(facts_of(out, run), facts_of(out, "reference-sgd"), 1e-12 if exact else 3e-6)


@several
@pytest.mark.parametrize(("precision", "ranks", "name"), runs.WRITTEN)
def test_adamw_with_clipping_equals_that_without_an_engine(out: Path, precision: str, ranks: int, name: str) -> None:
    run = f"adamw-{precision}-{ranks}-{name}"
    weights, expected = load_file(out / f"{run}.safetensors"), load_file(out / "reference-adamw.safetensors")
    assert relative_difference(weights, expected) <= {"fp32": FP32, "bf16": 3e-3}[precision]
    *facts, last = facts_of(out, run)
    assert all(fact["norm"] > 50 * runs.CLIP for fact in facts)
    check_facts(facts, facts_of(out, "reference-adamw"), {"fp32": 3e-6, "bf16": 0.1}[precision])
    evaluated = facts_of(out, "adamw-fp32-1-torch")[-1]["evaluated"]
    assert last["evaluated"] == pytest.approx(evaluated, rel={"fp32": 1e-6, "bf16": 1e-3}[precision])


@several
def test_bf16_without_partitions_is_autocast(out: Path) -> None:
    weights, expected = (load_file(out / f"adamw-bf16-2-{name}.safetensors") for name in ("zero0", "torch"))
    assert relative_difference(weights, expected) <= FP32


def name_of(case: object) -> str:
    return "-".join(map(str, case)) if isinstance(case, tuple) else str(case)


@several
@pytest.mark.parametrize(("reader", "writer"), runs.LOADED, ids=name_of)
def test_state_goes_from_engine_to_engine(out: Path, reader: tuple, writer: tuple) -> None:
    run = f"loaded-{name_of(reader)}-from-{name_of(writer)}"
    weights, never_stopped = (
        load_file(out / f"{run}.safetensors"),
        load_file(out / f"adamw-{name_of(writer)}.safetensors"),
    )
    checks = facts_of(out, run)[-1]
    # what the reader would write is what it has read, to the bit
    assert checks["keys"] and checks["changed"] == []
    # each tensor is read once, and no rank reads them all
    stored = [load_file(file) for file in out.glob(f"state-{name_of(writer)}-?.safetensors")]
    assert sum(checks["reads"]) == sum(map(len, stored))
    assert max(checks["reads"]) - min(checks["reads"]) <= 6
    if reader == writer:
        assert all(weights[key].equal(value) for key, value in never_stopped.items())
    else:
        assert relative_difference(weights, never_stopped) <= {"fp32": FP32, "bf16": 1e-3}[reader[0]]


@several
@pytest.mark.parametrize(("precision", "ranks", "name"), runs.WRITTEN)
def test_state_holds_everything_once_in_fp32(out: Path, precision: str, ranks: int, name: str) -> None:
    parts = [load_file(out / f"state-{precision}-{ranks}-{name}-{rank}.safetensors") for rank in range(ranks)]
    merged = {key: value for part in parts for key, value in part.items()}
    assert len(merged) == sum(map(len, parts)) and min(map(len, parts)) > 0
    module = runs.NextToken()
    runs.optimizer_of(module, "adamw")  # freezes
    expected = {"buffer/seen": module.seen.shape}
    for key, parameter in module.named_parameters():
        expected[f"weight/{key}"] = parameter.shape
        if parameter.requires_grad:
            expected |= {f"optimizer/{key}/{slot}": parameter.shape for slot in ("exp_avg", "exp_avg_sq")}
            expected[f"optimizer/{key}/step"] = torch.Size()
            assert merged[f"optimizer/{key}/step"] == 2
        else:  # and exactly what it was
            assert merged[f"weight/{key}"].equal(parameter)
    assert {key: value.shape for key, value in merged.items()} == expected
    assert {value.dtype for key, value in merged.items() if "quantised" not in key} == {torch.float32}


@several
def test_every_engine_stops_on_every_rank_before_a_step_that_is_not_finite(out: Path) -> None:
    told = json.loads((out / "poisoned.json").read_text())
    assert {(case["engine"], case["poison"]) for case in told} == {
        (name, poison) for name in runs.POISONED for poison in ("poison", "poisoned_gradient")
    }
    for case in told:
        last = (
            case["keys"][-1][1] if case["poison"] == "poison" else [k for of in case["keys"] for ks in of for k in ks]
        )
        what = "loss" if case["poison"] == "poison" else "gradient norm"
        expected = f"{what} is nan; stopped before the step on: {', '.join(last)}"
        assert case["messages"] == [expected, expected], case["engine"]
        assert case["unchanged"], case["engine"]


@several
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_closed_engine_gives_its_module_back_for_the_next(out: Path, precision: str) -> None:
    several, one = (load_file(out / f"chain-{precision}-{run}.safetensors") for run in ("several", "one"))
    assert relative_difference(several, one) <= {"fp32": FP32, "bf16": 1e-2}[precision]
