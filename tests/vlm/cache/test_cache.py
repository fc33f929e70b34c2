"""`KVCache` beside transformers' DynamicCache, and what it refuses. Stores and policies have tests of their own."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from foveate.vlm.cache import KVCache
from foveate.vlm.cache.layer import STALE
from foveate.vlm.cache.report import costs
from foveate.vlm.pruning import FastV, SparseVLM, reduce

from ..pruning import zoo

TEXTS = ("llm-llama", "llm-qwen2", "llm-qwen3")
NAMES = (*zoo.NAMES, *TEXTS)
UNWANTED = [[zoo.PAD], [zoo.IMAGE], [zoo.VIDEO]]  # not to be generated


@cache
def animal(name: str) -> zoo.Animal:
    """A tiny model in float64: of the zoo, or a stock LLM."""
    if name in zoo.NAMES:
        return zoo.animal(name)
    torch.manual_seed(0)
    kind = name.removeprefix("llm-")
    config = CONFIG_MAPPING[kind](**{key: value for key, value in zoo._text(kind).items() if key != "model_type"})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return zoo.Animal(name, model, {})


@cache
def three(name: str) -> zoo.Row:
    """A batch of rows of different lengths, padded to the left; one of text alone."""
    torch.manual_seed(1)
    one = animal(name)
    kinds = ((12,), (4,), (9,)) if name in TEXTS else ((2, "image", 5), (4,), (1, "image", 2, "image", 3))
    return one.batch([one.row(*pieces) for pieces in kinds])


def dynamic(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.get_decoder().config)


def generate(model: Any, inputs: zoo.Row, cache: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences, and the logits of each step [steps, batch, vocabulary]."""
    torch.manual_seed(3)
    made = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=5, bad_words_ids=UNWANTED, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip
    return made.sequences, torch.stack(made.logits)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", NAMES)
def test_a_dense_cache_is_a_dynamic_cache(name: str, options: dict[str, Any]) -> None:
    model, inputs = animal(name).model, three(name)
    held = KVCache(model, "dense")
    sequences, logits = generate(model, inputs, held, **options)
    wanted_sequences, wanted = generate(model, inputs, dynamic(model), **options)
    assert torch.equal(sequences, wanted_sequences)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-12)
    assert held.get_seq_length() == inputs["input_ids"].shape[1] + 4
    assert model.get_decoder().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llava", "internvl", "llm-llama"])
def test_chunks_turns_and_crops_are_those_of_a_dynamic_cache(name: str) -> None:
    model: Any = animal(name).model
    inputs = three(name)
    first, turn = inputs["input_ids"].shape[1], torch.randint(zoo.WORDS, zoo.VOCABULARY, (3, 4))
    logits = []
    for held in (KVCache(model, "dense"), dynamic(model)):
        mask = inputs["attention_mask"]
        steps = [model(**inputs, past_key_values=held, use_cache=True).logits[:, -1]]
        for crop in (-2, -4, 0):  # the second goes back into the first pass
            mask = torch.cat([mask[:, : held.get_seq_length()], torch.ones_like(turn)], dim=1)
            steps.append(model(turn, attention_mask=mask, past_key_values=held).logits)
            held.crop(crop)
        assert held.get_seq_length() == first + 6
        logits.append(steps)
    for got, wanted in zip(*logits, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_drafts_are_taken_back() -> None:
    """Prompt lookup decoding crops what it guessed wrong."""
    model, prompt = animal("llm-llama").model, torch.tensor([[5, 6, 7, 8] * 4])
    wanted = model.generate(prompt, max_new_tokens=12, do_sample=False)
    held = KVCache(model, "dense")
    got = model.generate(prompt, past_key_values=held, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(got, wanted)


def test_eager_attention_is_the_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = animal("llm-qwen3").model
    monkeypatch.setattr(model.config, "_attn_implementation", "eager")
    inputs = {name: value[:1, 3:] for name, value in three("llm-qwen3").items()}  # no padding, where eager fp64 is NaN
    got, wanted = (generate(model, inputs, held)[1] for held in (KVCache(model, "dense"), dynamic(model)))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert model.config._attn_implementation == "eager"


def test_a_prompt_s_cache_can_be_copied() -> None:
    model: Any = animal("llm-llama").model
    inputs = {name: value[:1] for name, value in three("llm-llama").items()}
    held = KVCache(model, "dense")
    model(**inputs, past_key_values=held)
    copied, word = copy.deepcopy(held), torch.tensor([[9]])
    first = model(word, past_key_values=held).logits
    assert held.get_seq_length() == copied.get_seq_length() + 1
    torch.testing.assert_close(model(word, past_key_values=copied).logits, first, rtol=0, atol=0)


def test_rows_are_selected_and_repeated() -> None:
    model: Any = animal("llm-llama").model
    word, rows = torch.tensor([[9]] * 3), torch.tensor([2, 0, 2])
    logits = []
    for held in (KVCache(model, "dense"), dynamic(model)):
        model(**three("llm-llama"), past_key_values=held)
        held.batch_repeat_interleave(2)
        held.batch_select_indices(torch.tensor([0, 2, 4]))
        held.reorder_cache(rows)
        mask = torch.cat([three("llm-llama")["attention_mask"][rows], torch.ones(3, 1, dtype=torch.long)], dim=1)
        logits.append(model(word, attention_mask=mask, past_key_values=held).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)
    assert (logits[0][0] - logits[0][1]).abs().max() > 0.1
    held = KVCache(model, "dense")
    model(**three("llm-llama"), past_key_values=held)
    held.reset()
    assert (held.get_seq_length(), held.nbytes) == (0, 0)


@cache
def equally_long(name: str) -> zoo.Row:
    """Rows without padding, one of them of text alone, which pruning leaves as long as it is."""
    torch.manual_seed(1)
    one = animal(name)
    row = one.row(2, "image", 5)
    return one.batch([row, one.row(row["input_ids"].shape[1])])


@pytest.mark.parametrize("batch", [three, equally_long])
@pytest.mark.parametrize("name", ["llava_onevision", "foveate"])
def test_within_reduce_it_holds_what_pruning_left(name: str, batch: Callable[[str], zoo.Row]) -> None:
    """Beams: what DynamicCache gives, which is held to brute force elsewhere."""
    model, inputs = animal(name).model, batch(name)
    methods = (FastV(1, 0.5), SparseVLM(tokens=(6,), layers=(1,), per=16))  # the second merges tokens
    given = []
    for kv in ("dense", None):
        with reduce(model, *methods, kv=kv) as reduced:
            given.append(generate(reduced, inputs, None, num_beams=2))
    assert torch.equal(given[0][0], given[1][0])
    torch.testing.assert_close(given[0][1], given[1][1], rtol=0, atol=1e-10)


def test_a_second_prompt_that_was_pruned_is_cropped_as_if_it_had_not_been() -> None:
    model, one = animal("llava").model, animal("llava").row(2, "image", 5)
    with reduce(model, FastV(1, 0.5), kv="dense") as reduced:
        held = reduced(**one).past_key_values
        columns, length = [layer.store.columns for layer in held.layers], held.get_seq_length()
        word, alone = torch.tensor([[9]]), copy.deepcopy(held)
        reduced(**one, past_key_values=held)
        slots = held.layers[2].all_slots()[0, 0]
        assert slots.max() == 2 * length - 1 and (slots >= length).sum() == columns[2]
        held.crop(-length)
        assert [layer.store.columns for layer in held.layers] == columns
        got, wanted = (reduced(word, past_key_values=cache).logits for cache in (held, alone))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "kv", ["streaming:sink=2,window=4", "h2o:tokens=5", "snapkv:keep=0.5,window=2", "int8:group=4,residual=0"]
)
def test_rows_that_change_places_take_all_that_is_known_of_them_along(kv: str) -> None:
    model: Any = animal("llm-llama").model
    order, words = torch.tensor([2, 0, 1]), torch.tensor([[9], [10], [11]])
    ends = []
    for moved in (True, False):
        first = torch.arange(3) if moved else order
        inputs = {name: value[first] for name, value in three("llm-llama").items()}
        held, mask = KVCache(model, kv), inputs["attention_mask"]
        position = (mask.cumsum(1) - 1).clamp(min=0)
        model(**inputs, position_ids=position, past_key_values=held)
        for step in range(6):
            if moved and step == 3:
                held.reorder_cache(order)
                mask, position, first = mask[order], position[order], order
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            position = position[:, -1:] + 1
            last = model(words[first], attention_mask=mask, position_ids=position, past_key_values=held).logits
        ends.append(last)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-10)


def test_reduce_makes_the_cache_and_tells_what_it_held() -> None:
    model, inputs = animal("llava").model, animal("llava").alone(animal("llava").row(2, "image", 5))
    with pytest.raises(ValueError, match="no method was given"):
        reduce(model)
    session = reduce(model, FastV(2, 0.5), kv="dense")
    with session as reduced:
        reduced.generate(**inputs, max_new_tokens=4, do_sample=False)
        made = reduced(**inputs).past_key_values
    (held,) = session.held
    assert held.tokens == (26, 26, 18, 18) and held.length == 26
    assert held.full_bytes == 4 * 26 * 2 * 2 * 8 * 8  # layers, tokens, K and V, heads, head_dim, bytes
    assert isinstance(made, KVCache) and costs(made).tokens == (23, 23, 15, 15)


def test_llms_have_a_kv_cache_in_reduce_but_no_visual_tokens() -> None:
    model, inputs = animal("llm-qwen2").model, three("llm-qwen2")
    wanted = generate(model, inputs, dynamic(model))[1]
    with reduce(model, kv="dense") as reduced:
        got = generate(reduced, inputs, None)[1]
        chunked = reduced.generate(**inputs, max_new_tokens=3, prefill_chunk_size=5, do_sample=False)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert torch.equal(chunked, model.generate(**inputs, max_new_tokens=3, do_sample=False))
    with pytest.raises(ValueError, match="model type 'qwen2' is not known"):
        reduce(model, FastV(2, 0.5))


# What is refused, and what is left after something went wrong.


def test_models_with_other_states_than_full_attention_are_refused() -> None:
    small = {name: value for name, value in zoo._text("mistral").items() if name != "model_type"}
    sliding = AutoModelForCausalLM.from_config(CONFIG_MAPPING["mistral"](**small, sliding_window=4))
    with pytest.raises(ValueError, match="keep their states as DynamicSlidingWindowLayer; accepted: full attention"):
        KVCache(sliding, "dense")
    learned = CONFIG_MAPPING["gpt2"](n_embd=8, n_layer=1, n_head=1, vocab_size=9)
    with pytest.raises(ValueError, match="not one of layers with rotary positions"):
        KVCache(AutoModelForCausalLM.from_config(learned), "dense")


def test_what_a_cache_can_not_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = animal("llm-llama").model
    held = KVCache(model, "dense")
    model(**three("llm-llama"), past_key_values=held)
    with pytest.raises(ValueError, match="tokens_to_remove is 3; accepted: minus the number"):
        held.layers[0].crop(3)
    with pytest.raises(ValueError, match="can't be offloaded"):
        held.layers[0].offload()
    with pytest.raises(ValueError, match="output_attentions is True; accepted"):
        model(torch.tensor([[9]] * 3), past_key_values=held, output_attentions=True)
    monkeypatch.setattr(model.config, "_attn_implementation", "flex_attention")
    with pytest.raises(ValueError, match=r"attention mask is a BlockMask; accepted .* sdpa"):
        model(**three("llm-llama"), past_key_values=KVCache(model, "dense"))


@pytest.mark.parametrize(
    "kv", ["streaming:sink=2,window=8", "streaming:sink=2,window=8+int4:group=4,residual=0", "h2o:tokens=10"]
)
def test_what_is_evicted_in_decode_takes_no_memory_in_the_end(kv: str) -> None:
    model: Any = animal("llm-llama").model
    held, word = KVCache(model, kv), torch.tensor([[9]])
    sizes = []
    for _ in range(150):
        model(word, past_key_values=held)
        sizes.append(held.layers[0].store.columns)
    assert max(sizes) <= 10 + STALE + 1 and sizes[-1] < 150 - STALE
    assert costs(held).tokens == (9 if "streaming" in kv else 10,) * zoo.LAYERS


@pytest.mark.parametrize(
    ("kv", "says"),
    [
        ("snapkv:keep=0.5,window=2", "which evicted some when it had 12 of its 15; accepted: at most 3"),
        ("int4:group=4,residual=4", "of which the last 7 are not packed; accepted: at most those"),
    ],
)
def test_a_crop_that_would_need_what_is_gone_removes_nothing(kv: str, says: str) -> None:
    model: Any = animal("llm-llama").model
    held = KVCache(model, kv)
    prompt = torch.randint(zoo.WORDS, zoo.VOCABULARY, (1, 12))
    model(prompt, past_key_values=held)
    for _ in range(3):
        model(torch.tensor([[9]]), past_key_values=held)
    columns = held.layers[0].store.columns
    with pytest.raises(RuntimeError, match=says):
        held.crop(-8)
    assert held.get_seq_length() == 15 and {layer.store.columns for layer in held.layers} == {columns}
    held.crop(-3)
    assert held.get_seq_length() == 12 and held.layers[0].store.columns == columns - 3


def test_an_interrupted_pass_leaves_a_model_that_works() -> None:
    """Ctrl-C between a cache's update and the attention: our function stays named, and gives the model's own."""
    model: Any = animal("llm-llama").model
    inputs = three("llm-llama")
    wanted = generate(model, inputs, dynamic(model))[1]
    KVCache(model, "dense").layers[0].attention.take()
    try:
        assert model.config._attn_implementation != "sdpa"
        torch.testing.assert_close(generate(model, inputs, dynamic(model))[1], wanted, rtol=0, atol=0)
        assert model.config._attn_implementation == "sdpa"
    finally:
        model.config._attn_implementation = "sdpa"
