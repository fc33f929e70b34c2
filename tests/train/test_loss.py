import importlib.util
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from foveate.train import loss as loss_module
from foveate.train.loss import fusion_obstacle, liger_applies, token_loss
from foveate.vlm import FoveateConfig, FoveateForConditionalGeneration

ROWS, TOKENS, WIDTH, VOCABULARY = 3, 17, 8, 41
LABELS = ["dense", "sparse", "one", "last_token_only", "none"]

needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)


def make_labels(kind: str) -> torch.Tensor:
    labels = torch.randint(0, VOCABULARY, (ROWS, TOKENS))
    if kind == "sparse":
        labels[torch.rand(ROWS, TOKENS) < 0.7] = -100
    elif kind == "one":
        keep = labels[1, 5].item()
        labels.fill_(-100)[1, 5] = keep
    elif kind == "last_token_only":
        labels[:, :-1] = -100
    elif kind == "none":
        labels[:, 1:] = -100  # the first token's label predicts nothing
    return labels


def reference(hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, total: float) -> torch.Tensor:
    """Position by position, from all logits in fp64."""
    logits = head(hidden).double()
    loss = 0 * logits.sum()
    for row in range(len(labels)):
        for position in range(1, labels.shape[1]):
            target = labels[row, position]
            if target != -100:
                scores = logits[row, position - 1]
                loss = loss + torch.logsumexp(scores, 0) - scores[target]
    return loss / total


def gradients(loss: torch.Tensor, *of: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, of))


# Exactness


@pytest.mark.parametrize("chunks", [1, 3, 8, 200])
@pytest.mark.parametrize("kind", LABELS)
def test_loss_and_gradients_equal_full_logits(kind: str, chunks: int) -> None:
    labels = make_labels(kind)
    hidden = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)
    ours, theirs = token_loss(hidden, head, labels, 12.5, chunks), reference(hidden, head, labels, 12.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for mine, expected in zip(
        gradients(ours, hidden, head.weight, head.bias), gradients(theirs, hidden, head.weight, head.bias), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
    assert (theirs == 0) == (kind == "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_predicted_tokens_gradients_are_zero_not_none(dtype: torch.dtype) -> None:
    hidden = torch.randn(ROWS, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY, dtype=dtype)
    loss = token_loss(hidden, head, make_labels("none"), 5, 4)
    loss.backward()
    assert loss.item() == 0 and loss.dtype == dtype
    for tensor in (hidden, head.weight, head.bias):
        assert tensor.grad is not None and torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_a_head_tied_to_the_embedding_gets_both_gradients() -> None:
    ids, labels = torch.randint(0, VOCABULARY, (ROWS, TOKENS)), make_labels("sparse")
    embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    (ours,) = gradients(token_loss(embedding(ids).tanh(), head, labels, 7, 3), embedding.weight)
    (theirs,) = gradients(reference(embedding(ids).tanh(), head, labels, 7), embedding.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same(frozen: str) -> None:
    labels = make_labels("sparse")
    hidden = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64, requires_grad=frozen != "hidden")
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64).requires_grad_(frozen != "head")
    trained, still = (head.weight, hidden) if frozen == "hidden" else (hidden, head.weight)
    (expected,) = gradients(reference(hidden, head, labels, 7), trained)
    token_loss(hidden, head, labels, 7, 3).backward()
    torch.testing.assert_close(trained.grad, expected, rtol=1e-10, atol=1e-10)
    assert still.grad is None


def test_bf16_logits_are_summed_in_fp32() -> None:
    labels = make_labels("dense")
    hidden = torch.randn(ROWS, TOKENS, WIDTH).bfloat16()
    head = nn.Linear(WIDTH, VOCABULARY).bfloat16()
    loss = token_loss(hidden, head, labels, 1, 1)
    assert loss.dtype == torch.float32
    # bf16 holds 8 bits: a sum of 48 terms in it would be wrong by 1e-2
    torch.testing.assert_close(loss.double(), reference(hidden, head, labels, 1), rtol=1e-5, atol=0)


def test_autocast_holds_in_the_recomputation_too() -> None:
    labels = make_labels("sparse")
    hidden = torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY)
    dtypes = []
    head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_loss(hidden, head, labels, 9, 2)
    loss.backward()
    assert dtypes == [torch.bfloat16] * 4 and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference(hidden, head, labels, 9), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total": 0}, r"total is 0; accepted"),
        ({"total": math.nan}, r"total is nan; accepted"),
        ({"chunks": 0}, r"chunks is 0; accepted: 1 or more"),
        ({"labels": torch.zeros(1, 4)}, r"hidden has shape \(1, 3, 8\) and labels \(1, 4\)"),
        ({"hidden": torch.zeros(3, 8)}, r"hidden has shape \(3, 8\)"),
    ],
)
def test_arguments_that_make_no_loss_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.zeros(1, 3, 8), "labels": torch.zeros(1, 3, dtype=torch.long), "total": 1.0}
    with pytest.raises(ValueError, match=message):
        token_loss(**({"lm_head": nn.Linear(8, 5)} | arguments | change))


# Memory and calls


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor made under it has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return output


def test_no_tensor_is_as_large_as_all_logits() -> None:
    rows, tokens, width, vocabulary, chunks = 2, 64, 4, 100, 8
    labels = torch.randint(0, vocabulary, (rows, tokens))
    hidden = torch.randn(rows, tokens, width, requires_grad=True)
    head = nn.Linear(width, vocabulary)
    with LargestTensor() as full:
        logits = head(hidden)[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
    with LargestTensor() as chunked:
        token_loss(hidden, head, labels, 1, chunks).backward()
    assert full.numel == rows * tokens * vocabulary
    assert chunked.numel == math.ceil(rows * (tokens - 1) / chunks) * vocabulary
    labels[:, : tokens // 2] = -100  # what is not predicted has no logits at all
    with LargestTensor() as half:
        token_loss(hidden, head, labels, 1, chunks).backward()
    assert half.numel == math.ceil(rows * tokens / 2 / chunks) * vocabulary


@pytest.mark.parametrize("kind", LABELS)
def test_the_head_is_called_equally_often_whatever_the_labels(kind: str) -> None:
    """Under ZeRO-3 every call gathers the weight from all ranks."""
    hidden = torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY)
    calls = []
    head.register_forward_hook(lambda module, args, output: calls.append(output))
    loss = token_loss(hidden, head, make_labels(kind), 3, 5)
    assert len(calls) == 5
    loss.backward()
    assert len(calls) == 10


# liger


class Cuda(torch.Tensor):
    """A CPU tensor that says that it is on CUDA."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def cuda_hidden(dtype: torch.dtype = torch.float32, positions: int = 5, requires_grad: bool = True) -> torch.Tensor:
    return torch.randn(positions, WIDTH, dtype=dtype, requires_grad=requires_grad).as_subclass(Cuda)


def hooked(head: nn.Module) -> nn.Module:
    head.register_forward_pre_hook(lambda module, args: None)
    return head


def partitioned(head: nn.Module) -> nn.Module:
    head.weight.ds_id = 0  # what ZeRO-3 marks its parameters with
    return head


class LinearTwin(nn.Linear):
    """As LoRA's, bitsandbytes' and torchao's layers are."""


@needs_liger
@pytest.mark.parametrize(
    ("applies", "hidden", "make_head"),
    [
        (True, {}, lambda head: head),
        (True, {"dtype": torch.bfloat16}, lambda head: head),
        (True, {}, lambda head: head.requires_grad_(False)),
        (True, {"requires_grad": False}, lambda head: head.requires_grad_(False)),
        (False, {"requires_grad": False}, lambda head: head),
        (False, {"dtype": torch.float64}, lambda head: head),
        (False, {"positions": 0}, lambda head: head),
        (False, {}, hooked),
        (False, {}, partitioned),
        (False, {}, lambda head: nn.Sequential(head)),
        (False, {}, lambda head: LinearTwin(WIDTH, VOCABULARY)),
    ],
    ids=[
        "plain",
        "bf16",
        "frozen",
        "all-frozen",
        "head-alone",
        "fp64",
        "empty",
        "hook",
        "zero3",
        "wrapped",
        "subclass",
    ],
)
def test_liger_is_used_on_cuda_where_the_head_is_a_whole_plain_linear(
    applies: bool, hidden: dict[str, Any], make_head: Callable[[nn.Module], nn.Module]
) -> None:
    head = make_head(nn.Linear(WIDTH, VOCABULARY))
    assert liger_applies(cuda_hidden(**hidden), head) is applies
    assert not liger_applies(torch.randn(5, WIDTH, requires_grad=True), head), "never on a CPU"


@needs_liger
def test_liger_gets_the_predicting_positions_and_sums_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = make_labels("sparse")
    hidden = torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY)
    made = loss_module._liger_loss()
    assert (made.ignore_index, made.reduction, made.accum_dtype) == (-100, "sum", torch.float32)
    assert (made.label_smoothing, made.softcap, made.lse_square_scale) == (0, None, 0)
    seen: list[Any] = []

    def record(*args: Any) -> torch.Tensor:
        seen.extend(args)
        return torch.tensor(6.0)

    monkeypatch.setattr(loss_module, "_liger_loss", lambda: record)
    assert token_loss(hidden.as_subclass(Cuda), head, labels, 4, 3).item() == 1.5
    weight, states, targets, bias = seen
    assert weight is head.weight and bias is head.bias
    wanted = [(r, t) for r in range(ROWS) for t in range(TOKENS - 1) if labels[r, t + 1] != -100]
    assert targets.tolist() == [labels[r, t + 1] for r, t in wanted]
    assert torch.equal(states.as_subclass(torch.Tensor), torch.stack([hidden[r, t] for r, t in wanted]))


@needs_liger
def test_ligers_interface_is_the_one_that_is_called() -> None:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    made = inspect.signature(LigerFusedLinearCrossEntropyLoss.__init__).parameters
    assert {"ignore_index", "reduction", "accum_dtype"} <= set(made)
    called = list(inspect.signature(LigerFusedLinearCrossEntropyLoss.forward).parameters)
    assert called == ["self", "lin_weight", "_input", "target", "bias"]


def compare_liger(monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """liger against the chunks, with bias and without, all positions and few."""
    for kind in ("dense", "sparse", "one"):
        for bias in (False, True):
            labels = make_labels(kind).to(device)
            hidden = torch.randn(ROWS, TOKENS, WIDTH, device=device, dtype=dtype, requires_grad=True)
            head = nn.Linear(WIDTH, VOCABULARY, bias=bias, device=device, dtype=dtype)
            results = []
            for applies in (True, False):
                monkeypatch.setattr(loss_module, "liger_applies", lambda *args, applies=applies: applies)
                loss = token_loss(hidden, head, labels, 7, 3)
                assert loss.dtype == torch.float32
                results.append([loss, *gradients(loss, hidden, *head.parameters())])
            for liger, ours in zip(*results, strict=True):
                torch.testing.assert_close(liger, ours, rtol=tolerance, atol=tolerance * ours.abs().max().item())


@needs_liger
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no CUDA device")
def test_liger_equals_the_chunks_under_tritons_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    compare_liger(monkeypatch, "cpu", torch.float32, 1e-5)


@needs_liger
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_liger_equals_the_chunks_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    compare_liger(monkeypatch, "cuda", dtype, tolerance)


@needs_liger
@pytest.mark.gpu
def test_peak_memory_on_a_gpu_is_less_than_one_set_of_logits() -> None:
    rows, tokens, width, vocabulary = 2, 4096, 256, 65536
    labels = torch.randint(0, vocabulary, (rows, tokens), device="cuda")
    hidden = torch.randn(rows, tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = nn.Linear(width, vocabulary, bias=False, device="cuda", dtype=torch.bfloat16)
    logits_bytes = 2 * rows * tokens * vocabulary
    for module in (head, nn.Sequential(head)):  # liger, then the chunks
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        token_loss(hidden, module, labels, 1, 32).backward()
        assert torch.cuda.max_memory_allocated() - before < 0.75 * logits_bytes


# Models


LLMS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama": {},
    "mistral": {},
    "gemma": {"head_dim": 8},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "granite": {"logits_scaling": 1.0},
    "mixtral": {"num_local_experts": 2},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "granite-scaled": {"model_type": "granite", "logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "mixtral-routed": {"model_type": "mixtral", "output_router_logits": True, "router_aux_loss_coef": 0.5},
    "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
}
OBSTACLES = {
    "gemma2": "text_config gemma2: it changes its head's logits",
    "granite-scaled": "text_config granite: it changes its head's logits",
    "cohere": "text_config cohere: it changes its head's logits",
    "mixtral-routed": "text_config mixtral: output_router_logits adds the routers' loss",
    "opt": "text_config opt: its head reads something else",
}


def make_llm(name: str) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1} if name not in ("gpt2", "opt") else {}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    options = {"model_type": name} | LLMS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(sizes | tokens | options)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("name", [name for name in LLMS if name not in OBSTACLES])
def test_decoder_and_head_apart_give_the_models_own_loss(name: str) -> None:
    llm = make_llm(name)
    assert fusion_obstacle(llm) is None
    ids, labels = torch.randint(0, VOCABULARY, (ROWS, TOKENS)), make_labels("sparse")
    total = torch.tensor(11)
    hidden = llm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    apart = token_loss(hidden, llm.get_output_embeddings(), labels, total.item(), 3)
    own = llm(input_ids=ids, labels=labels, num_items_in_batch=total, use_cache=False).loss
    torch.testing.assert_close(apart, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBSTACLES)
def test_models_with_a_loss_of_their_own_say_why(name: str) -> None:
    llm = make_llm(name)
    obstacle = fusion_obstacle(llm)
    assert obstacle is not None and obstacle.startswith(OBSTACLES[name])
    assert "forward" not in llm.base_model.__dict__ and "forward" not in llm.get_output_embeddings().__dict__
    if name == "opt":
        return  # its decoder is one level deeper, so there is no output to compare
    ids, labels = torch.randint(0, VOCABULARY, (ROWS, TOKENS)), make_labels("sparse")
    hidden = llm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    apart = token_loss(hidden, llm.get_output_embeddings(), labels, 11, 3)
    own = llm(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(11), use_cache=False).loss
    assert abs(apart.item() - own.item()) > 1e-3 * own.item()


def test_the_probe_reads_no_weights() -> None:
    """So it also works where they are partitioned."""
    with torch.device("meta"):
        llm = make_llm("qwen2")
    llm.lm_head.weight = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it
    assert fusion_obstacle(llm) is None


def test_a_vlms_embeddings_decoder_and_head_apart_give_its_own_loss() -> None:
    tower = {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, "vision_use_head": False}
    tower |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = FoveateConfig(tower, make_llm("qwen2").config, image_token_id=39, video_token_id=40)
    model = FoveateForConditionalGeneration(config)
    ids = torch.randint(0, 39, (ROWS, TOKENS))
    ids[0, 3:7], ids[2, 1:5], ids[1, 8:12] = 39, 39, 40
    media = {"pixel_values": torch.randn(2, 3, 16, 16), "pixel_values_videos": torch.randn(1, 3, 16, 16)}
    labels = make_labels("sparse")
    embeds = model.get_inputs_embeds(ids, **media)
    assert embeds.shape == (ROWS, TOKENS, 16)
    llm = model.language_model
    hidden = llm.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    apart = token_loss(hidden, llm.get_output_embeddings(), labels, 13, 4)
    own = model(input_ids=ids, **media, labels=labels, num_items_in_batch=torch.tensor(13), use_cache=False).loss
    torch.testing.assert_close(apart, own, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"8 image placeholder tokens \(id 39\) .* 0 features"):
        model.get_inputs_embeds(ids)
    torch.testing.assert_close(model.get_inputs_embeds(ids, decoding=True), model.get_input_embeddings()(ids))
