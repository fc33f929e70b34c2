"""What goes on around a prefill: further turns, beams, caches, flash attention; refusals; what a session leaves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.vlm.pruning import EVS, FasterVLM, FastV, Random, reduce
from foveate.vlm.pruning.base import Pruner, Selection, Sight
from foveate.vlm.pruning.pyramiddrop import PyramidDrop
from foveate.vlm.pruning.sparsevlm import SparseVLM

from . import brute, zoo
from .test_matrix import METHODS, STEPS, TOLERANCE, expected, forced, generated, row

PADDED = ("two images", "short text", "short")


# Turns.


def wanted(name: str, method: str, rows: Sequence[zoo.Row], more: Sequence[Sequence[int]], **turns: Any) -> list[Any]:
    """Brute force's logits of each row, from its first prompt's last token on."""
    animal = zoo.animal(name)
    rule = METHODS[method](animal.first_prunable)[1]
    return [
        brute.brute_force(
            zoo.with_weights(name), animal.alone(one, words), [one["input_ids"].shape[1], *turns.get("ends", ())], rule
        ).logits
        for one, words in zip(rows, more, strict=True)
    ]


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "foveate"])
@pytest.mark.parametrize("rows", [("image",), PADDED])
def test_a_second_question_goes_on_with_the_same_cache(name: str, method: str, rows: tuple[str, ...]) -> None:
    """First an answer of 3 words, then 4 words, and an answer of 3."""
    animal = zoo.animal(name)
    samples, words = [row(name, pieces) for pieces in rows], [forced(pieces, 10) for pieces in rows]
    inputs = animal.batch(samples)
    reduction = reduce(animal.model, METHODS[method](animal.first_prunable)[0])
    with reduction as model:
        cache = DynamicCache(config=model.config.get_text_config())
        first = generated(model, inputs | {"past_key_values": cache}, [some[:3] for some in words])
        asked = torch.tensor([some[:7] for some in words])
        question = {
            "input_ids": torch.cat([inputs["input_ids"], asked], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(asked)], dim=1),
            "past_key_values": cache,
        }
        second = generated(model, question, [some[7:] for some in words])
    logits = wanted(name, method, samples, words)
    assert torch.stack([want[:4] for want in logits]).sub(first).abs().max() <= TOLERANCE
    assert torch.stack([want[7:11] for want in logits]).sub(second).abs().max() <= TOLERANCE
    assert len(reduction.prefills) == 1


@pytest.mark.parametrize("name", ["llava", "internvl", "foveate"])
@pytest.mark.parametrize("rows", [("image",), PADDED])
def test_a_second_question_brings_another_image(name: str, rows: tuple[str, ...]) -> None:
    """Its tokens are rated in its own prompt; those kept of the first stay."""
    animal = zoo.animal(name)
    samples = [row(name, pieces) for pieces in rows]
    inputs, new = animal.batch(samples), animal.row(2, "image", 5)
    news = animal.batch([new] * len(rows))
    reduction = reduce(animal.model, METHODS["fastv"](animal.first_prunable)[0])
    with reduction as model:
        first = model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0))
        mask = torch.cat([inputs["attention_mask"], news["attention_mask"]], dim=1)
        places = mask.cumsum(1) - 1
        news |= {"attention_mask": mask, "past_key_values": first.past_key_values}
        second = model(**news, position_ids=places[:, -news["input_ids"].shape[1] :])
    for sample, one in enumerate(samples):
        both = {field: torch.cat([one[field], new[field]]) for field in new if field != "input_ids" and field in one}
        both = new | both | {"input_ids": torch.cat([one["input_ids"], new["input_ids"]], dim=1)}
        prompt, end = one["input_ids"].shape[1], both["input_ids"].shape[1]
        rule = METHODS["fastv"](animal.first_prunable)[1]
        want = brute.brute_force(zoo.with_weights(name), animal.alone(both), [prompt, end], rule)
        assert (second.logits[sample, -1] - want.logits[-1]).abs().max() <= TOLERANCE
        assert reduction.prefills[1].stages[0].kept[sample].tolist() == want.kept[0]
    assert [sum(prefill.given) for prefill in reduction.prefills] == [
        sum(int((one["input_ids"] == zoo.IMAGE).sum()) for one in samples),
        animal.image_tokens() * len(rows),
    ]


class _Watches(Pruner):
    """Keeps everything, and notes what the rater looks at before layer 2."""

    stages = (2,)

    def __init__(self, scored_by: str):
        self.scored_by = scored_by  # type: ignore[assignment,misc]
        self.rows: list[torch.Tensor] = []

    def select(self, stage: int, sight: Sight) -> Selection:
        assert sight.attention is not None
        self.rows.append(sight.attention.head_mean()[0])
        return Selection(torch.arange(sight.visual))


@pytest.mark.parametrize("kv", [None, "dense"])
@pytest.mark.parametrize(("scored_by", "layer"), [("previous", 1), ("own", 2)])
@pytest.mark.parametrize("rows", [("image",), PADDED])
def test_raters_of_a_second_prompt_see_the_first_one_too(
    scored_by: str, layer: int, rows: tuple[str, ...], kv: str | None
) -> None:
    """Their attention is the model's own: probabilities over all keys, those in the cache among them."""
    animal, weights = zoo.animal("llava"), []
    samples = [row("llava", pieces) for pieces in rows]
    inputs, new = animal.batch(samples), animal.row(2, "image", 5)
    news = animal.batch([new] * len(rows))
    watcher = _Watches(scored_by)
    with reduce(animal.model, watcher, kv=kv) as model:
        first = model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0))
        watcher.rows.clear()
        mask = torch.cat([inputs["attention_mask"], news["attention_mask"]], dim=1)
        news |= {"attention_mask": mask, "past_key_values": first.past_key_values}
        model(**news, position_ids=(mask.cumsum(1) - 1)[:, -news["input_ids"].shape[1] :])
    whole = zoo.with_weights("llava")
    attention: Any = whole.get_decoder().layers[layer].self_attn
    hook = attention.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    for sample, one in enumerate(samples):
        both = {field: torch.cat([one[field], new[field]]) for field in new if field != "input_ids" and field in one}
        whole(**animal.alone(new | both | {"input_ids": torch.cat([one["input_ids"], new["input_ids"]], dim=1)}))
        seen = (new["input_ids"][0] == zoo.IMAGE).nonzero()[:, 0] + one["input_ids"].shape[1]
        want = weights[sample][0, :, -1].mean(0)[seen]
        assert (watcher.rows[sample] - want).abs().max() <= 1e-9
    hook.remove()


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_beams_have_the_probabilities_of_brute_force(name: str, method: str) -> None:
    animal = zoo.animal(name)
    samples = [row(name, pieces) for pieces in ("image", "short text", "short")]  # 5.17 wants one image a row
    inputs = animal.batch(samples)
    with reduce(animal.model, METHODS[method](animal.first_prunable)[0]) as model:
        found = model.generate(
            **inputs, max_new_tokens=4, num_beams=3, num_return_sequences=3, do_sample=False, length_penalty=0.0,
            suppress_tokens=[zoo.PAD, zoo.IMAGE, zoo.VIDEO], output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    words = found.sequences[:, inputs["input_ids"].shape[1] :]
    assert len(words.unique(dim=0)) > len(samples)  # beams differ
    logits = wanted(name, method, [sample for sample in samples for _ in range(3)], words.tolist())
    log_probabilities = torch.stack([want[:4] for want in logits]).log_softmax(-1)
    sums = log_probabilities.gather(2, words[..., None]).sum((1, 2))
    assert (found.sequences_scores - sums).abs().max() < 1e-5


# What a cache holds.


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm"])
def test_layers_cache_what_they_process_and_report_the_whole_length(method: str) -> None:
    animal = zoo.animal("llava")
    inputs = animal.alone(row("llava", "image"))
    reduction = reduce(animal.model, METHODS[method](1)[0])
    cache = DynamicCache()
    with reduction as model:
        generated(model, inputs | {"past_key_values": cache}, [forced("image")])
    (prefill,) = reduction.prefills
    held = [layer.keys.shape[2] for layer in cache.layers]
    assert held == [prefill.text[0] + visual + STEPS for (visual,) in prefill.visual]
    assert held[-1] < held[0]
    assert {layer.get_seq_length() for layer in cache.layers} == {inputs["input_ids"].shape[1] + STEPS}


def test_hooks_on_layers_live_only_during_prefill() -> None:
    animal, counts = zoo.animal("foveate"), []

    class Counts(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            modules = [part for layer in animal.model.get_decoder().layers for part in layer.modules()]
            counts.append(sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in modules))
            return scores

    with reduce(animal.model, FastV(1, 0.5)) as model:
        model.generate(
            **animal.alone(row("foveate", "image")), max_new_tokens=3, logits_processor=LogitsProcessorList([Counts()])
        )
    assert counts == [0, 0, 0]


@pytest.mark.parametrize("name", ["llava", "foveate"])
def test_a_mask_says_which_embeddings_are_visual(name: str) -> None:
    animal = zoo.animal(name)
    inputs, embeds = animal.alone(row(name, "image")), []
    hook = animal.model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: embeds.append(args[0]))
    animal.model(**inputs)
    hook.remove()
    with reduce(animal.model, FastV(1, 0.5), visual_mask=inputs["input_ids"] == zoo.IMAGE) as model:
        logits = model(inputs_embeds=embeds[0], attention_mask=inputs["attention_mask"]).logits[0, -1]
    assert (logits - expected(name, "fastv", ("image",))[0].logits[0]).abs().max() <= TOLERANCE
    with reduce(animal.model, FastV(1, 0.5)) as model, pytest.raises(ValueError, match="visual_mask= of `reduce`"):
        model(inputs_embeds=embeds[0])


# Flash attention, which takes masks of [batch, columns], or none.


@contextmanager
def flash(model: Any, seen: list[tuple[int, int] | None]) -> Iterator[None]:
    """Attention under flash attention's name, with its conventions: masked columns are cut out of keys and queries, the
    last query sees the last key."""

    def attention(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **more: Any
    ) -> tuple[torch.Tensor, None]:
        assert more.get("is_causal", True)
        seen.append(None if mask is None else tuple(mask.shape))
        queries, groups = q.shape[2], q.shape[1] // k.shape[1]
        out = torch.zeros_like(q)
        for sample, keys in enumerate(torch.ones(len(q), k.shape[2]).bool() if mask is None else mask.bool()):
            real = keys[-queries:]
            left, right = (part[sample, :, keys].repeat_interleave(groups, dim=0) for part in (k, v))
            weights = q[sample][:, real] @ left.mT * scaling
            order = torch.ones(weights.shape[1:], dtype=torch.bool).tril(weights.shape[2] - weights.shape[1])
            out[sample, :, real] = weights.masked_fill(~order, -torch.inf).softmax(-1) @ right
        return out.transpose(1, 2), None

    config = model.get_decoder().layers[0].self_attn.config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = attention
    config._attn_implementation = "flash_attention_2"
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("rows", [("image",), PADDED])
def test_flash_attention_gets_masks_of_columns(name: str, method: str, rows: tuple[str, ...]) -> None:
    animal, seen = zoo.animal(name), []
    inputs = animal.batch([row(name, pieces) for pieces in rows])
    reduction = reduce(animal.model, METHODS[method](animal.first_prunable)[0])
    with flash(animal.model, seen), reduction as model:
        logits = generated(model, inputs, [forced(pieces) for pieces in rows])
    for got, want in zip(logits, expected(name, method, rows), strict=True):
        assert (got - want.logits).abs().max() <= TOLERANCE
    if len(rows) == 1:
        assert set(seen) == {None}  # nothing to mask: the fast way
    else:
        assert all(shape is not None and len(shape) == 2 for shape in seen)


# What is refused, before anything runs.


@contextmanager
def nothing_runs(model: Any) -> Iterator[None]:
    def fails(*_: Any) -> None:
        raise AssertionError("a layer ran")

    parts = [layer for part in (model.get_decoder(), model) for layer in part.modules() if layer is not model]
    hooks = [part.register_forward_pre_hook(fails) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"use_cache": False}, "use_cache is False; accepted within foveate.reduce: True"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size is 8; accepted"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'; accepted"),
        ({"past_key_values": "static"}, "past_key_values is a StaticCache"),
    ],
)
def test_generate_refuses(asked: dict[str, Any], says: str) -> None:
    animal = zoo.animal("llava")
    if "past_key_values" in asked:
        asked = {"past_key_values": StaticCache(config=animal.model.config.get_text_config(), max_cache_len=99)}
    inputs = animal.alone(row("llava", "image"))
    with (
        nothing_runs(animal.model),
        reduce(animal.model, FastV(1, 0.5)) as model,
        pytest.raises(ValueError, match=says),
    ):
        model.generate(**inputs, max_new_tokens=2, **asked)


def test_the_model_s_own_generation_settings_are_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    animal = zoo.animal("llava")
    monkeypatch.setattr(animal.model.generation_config, "use_cache", False)
    with reduce(animal.model, FastV(1, 0.5)) as model, pytest.raises(ValueError, match="use_cache is False"):
        model.generate(**animal.alone(row("llava", "image")), max_new_tokens=2)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"use_cache": False}, "use_cache is False"),
        ({"labels": True}, "labels were given"),
        ({"attention_mask": "right"}, "accepted: padding to the left"),
        ({"attention_mask": "4d"}, "attention_mask has shape"),
    ],
)
def test_forward_refuses(asked: dict[str, Any], says: str) -> None:
    animal = zoo.animal("llava")
    inputs = animal.alone(row("llava", "image"))
    tokens = inputs["input_ids"].shape[1]
    if "labels" in asked:
        asked = {"labels": inputs["input_ids"]}
    if asked.get("attention_mask") == "right":
        asked = {"attention_mask": (torch.arange(tokens) < tokens - 2).long()[None]}
    if asked.get("attention_mask") == "4d":
        asked = {"attention_mask": torch.ones(1, 1, tokens, tokens, dtype=torch.bool)}
    with reduce(animal.model, FastV(1, 0.5)) as model, pytest.raises(ValueError, match=says):
        model(**inputs | asked)


def test_flex_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.animal("llava").model
    monkeypatch.setattr(model.get_decoder().config, "_attn_implementation", "flex_attention")
    with pytest.raises(ValueError, match="attn_implementation is 'flex_attention'"), reduce(model, FastV(1, 0.5)):
        pass


@pytest.mark.parametrize(
    "method", [FastV(1, 0.5), PyramidDrop((1, 2), (0.5, 0.2)), SparseVLM(tokens=(8,), layers=(0,))]
)
def test_layers_below_the_deepstack_are_refused(method: Any) -> None:
    with pytest.raises(ValueError, match="layer 1; accepted of this model: 2 to 4, as its first 2 layers"):
        reduce(zoo.animal("qwen3_vl").model, method)


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 8; accepted of this model: 1 to 3"):
        reduce(zoo.animal("llava").model, PyramidDrop())


def text_model() -> Qwen2ForCausalLM:
    sizes = zoo._text("qwen2")
    del sizes["model_type"]
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()


def test_unknown_architectures_are_refused_and_work_where_the_visual_tokens_are_named() -> None:
    model, ids = text_model(), torch.tensor([[5, 6, *[zoo.IMAGE] * 8, 7, 9]])
    with pytest.raises(ValueError, match=r"model type 'qwen2' is not known.*visual_token_ids=.*visual_mask="):
        reduce(model, FastV(1, 0.5))
    reduction = reduce(model, FastV(1, 0.5), visual_token_ids=(zoo.IMAGE,))
    with reduction, torch.no_grad():
        model(ids)
    assert reduction.prefills[0].visual == ((8,), (4,), (4,), (4,))


# What is left when a session ends: nothing.


def traces(model: Any) -> Any:
    """All that a session could leave behind."""
    hooks = [
        (name, len(part._forward_pre_hooks), len(part._forward_hooks), sorted(vars(part)))
        for name, part in model.named_modules()
    ]
    configs = [config._attn_implementation for config in (model.config, model.get_decoder().config)]
    return (
        hooks,
        configs,
        sorted(ALL_ATTENTION_FUNCTIONS),
        sorted(AttentionInterface()),
        sorted(AttentionMaskInterface()),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "foveate"])
def test_nothing_is_left_of_a_session(name: str, method: str) -> None:
    animal = zoo.animal(name)
    model, inputs = animal.model, animal.batch([row(name, pieces) for pieces in PADDED])
    before, stock = traces(model), model(**inputs).logits
    with reduce(model, METHODS[method](animal.first_prunable)[0]):
        generated(model, inputs, [forced(pieces) for pieces in PADDED])
    assert traces(model) == before
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
@pytest.mark.parametrize("part", ["layers.0", "layers.0.self_attn.o_proj", "layers.1.mlp", "layers.3", "norm"])
def test_exceptions_restore_everything(method: str, part: str) -> None:
    animal = zoo.animal("llava")
    model, inputs = animal.model, animal.alone(row("llava", "image"))
    before, stock = traces(model), model(**inputs).logits

    def breaks(*_: Any) -> None:
        raise RuntimeError("of this test")

    def is_interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    reduction = reduce(model, METHODS[method](1)[0])
    with reduction:
        inside = traces(model)
        hook = model.get_decoder().get_submodule(part).register_forward_pre_hook(breaks)
        with pytest.raises(RuntimeError, match="of this test"):
            model(**inputs)
        hook.remove()
        assert traces(model) == inside
        again = model(**inputs).logits[0, -1]  # the session goes on
    assert (again - expected("llava", method, ("image",))[0].logits[0]).abs().max() <= TOLERANCE
    assert traces(model) == before
    assert torch.equal(model(**inputs).logits, stock)
    assert len(reduction.prefills) == 1

    hook = model.get_decoder().get_submodule(part).register_forward_pre_hook(is_interrupted)
    with pytest.raises(KeyboardInterrupt), reduce(model, METHODS[method](1)[0]):
        model(**inputs)
    hook.remove()
    assert traces(model) == before


def test_a_model_is_in_one_session_at_a_time() -> None:
    model = zoo.animal("llava").model
    with reduce(model, FastV(1, 0.5)), pytest.raises(RuntimeError, match="in use by a reduction already"):
        reduce(model, FastV(2, 0.5)).__enter__()
    with pytest.raises(ValueError, match="no method was given"):
        reduce(model)


def test_two_methods_before_the_llm_are_refused() -> None:
    with pytest.raises(ValueError, match="FasterVLM, EVS all act before the LLM"):
        reduce(zoo.animal("llava_onevision").model, FasterVLM(), EVS())


def test_two_methods_at_one_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"before the same layer, of \[2, 2\]"):
        reduce(zoo.animal("llava").model, FastV(2, 0.5), Random(2, 0.5))


def test_several_methods_at_once_are_their_rules_one_after_the_other() -> None:
    animal = zoo.animal("llava")
    first, second = brute.fastv(1, 0.5), brute.fastv(3, 0.5)
    both = brute.Rule((1, 3), first.choose)  # the same rule at both layers
    assert second.layers == (3,)
    inputs = animal.alone(row("llava", "image"))
    want = brute.brute_force(zoo.with_weights("llava"), inputs, [inputs["input_ids"].shape[1]], both)
    reduction = reduce(animal.model, FastV(1, 0.5), FastV(3, 0.5))
    with reduction as model:
        logits = model(**inputs).logits[0, -1]
    assert (logits - want.logits[0]).abs().max() <= TOLERANCE
    assert [stage.kept[0].tolist() for stage in reduction.prefills[0].stages] == want.kept
