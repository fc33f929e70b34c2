"""The chat: several turns on one cache answer as if each were asked afresh."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from foveate import cli
from foveate.vlm import FoveateForConditionalGeneration, FoveateProcessor, encode
from foveate.vlm.cache import KVCache
from foveate.vlm.chat import Chat, load_media, load_model
from foveate.vlm.encode import encode_video
from foveate.vlm.media import MediaError, Video, load_video
from foveate.vlm.processor import VideoSource, model_fields
from foveate.vlm.pruning import EVS, FastV, reduce

DIGITS = "0123456789"
QUESTIONS = ["What is in the picture?", "And left of it?", "How many digits appear?"]


@contextmanager
def counting(module: nn.Module) -> Iterator[list[dict]]:
    """The keyword arguments of each call."""
    calls: list[dict] = []
    hook = module.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    yield calls
    hook.remove()


def media(tiny: Any) -> list[Image.Image | Video]:
    """A video, two images, a video."""
    return [load_video(tiny.frames(0, 2)), tiny.image(1), tiny.image(2), load_video(tiny.frames(3, 1))]


def digits_only(model: FoveateForConditionalGeneration, processor: FoveateProcessor) -> None:
    """Answers that tokenize again as they were generated: no two digits merge."""
    allowed = set(processor.tokenizer.convert_tokens_to_ids(list(DIGITS)))
    model.generation_config.suppress_tokens = [i for i in range(len(processor.tokenizer)) if i not in allowed]


def assert_cache_holds_its_tokens(chat: Chat, pixels: Any) -> None:
    """Keys and values are those of one pass over the cached tokens."""
    assert chat.cache is not None and chat.cache.get_seq_length() == len(chat.cached_ids)
    with torch.no_grad():
        fresh = chat.model(input_ids=torch.tensor([chat.cached_ids]), use_cache=True, **pixels).past_key_values
    for layer, expected in zip(chat.cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.values, expected.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("llm", ["qwen2", "gpt2", "gemma2"])
def test_turns_on_one_cache_answer_as_asked_afresh(tiny: Any, llm: str) -> None:
    model, processor = tiny.model(llm_name=llm, dtype=torch.float64), tiny.processor()
    chat = Chat(model, processor, media(tiny))
    for question in QUESTIONS:
        history = list(chat.messages)
        answer = chat.ask(question, max_new_tokens=6)
        fresh = Chat(model, processor, media(tiny))
        fresh.messages = history
        assert fresh.ask(question, max_new_tokens=6).text == answer.text
        images = [m for m in media(tiny) if not isinstance(m, Video)]
        videos = [m.frames for m in media(tiny) if isinstance(m, Video)]
        prompt = processor.apply_chat_template(chat.messages[:-1], add_generation_prompt=True)
        inputs = processor(text=prompt, images=images, videos=videos, return_tensors="pt")
        alone = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(alone, skip_special_tokens=True).strip() == answer.text
        assert (answer.prompt_tokens, answer.new_tokens) == (inputs["input_ids"].shape[1], 6)
        assert answer.visual_tokens == 5 * 4
        if llm != "gemma2":  # its sliding window forgets
            pixels = {k: v for k, v in inputs.items() if k.startswith("pixel")}
            assert_cache_holds_its_tokens(chat, pixels)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3


def test_a_turn_prefills_only_what_is_new_and_encodes_no_media_again(tiny: Any) -> None:
    model, processor = tiny.model(dtype=torch.float64), tiny.processor()
    digits_only(model, processor)
    with counting(model.vision_tower) as tower:
        chat = Chat(model, processor, media(tiny))
    assert len(tower) == 3  # images, then each video
    cached = 0
    for question in QUESTIONS:
        with counting(model.language_model) as llm, counting(model.vision_tower) as tower:
            answer = chat.ask(question, max_new_tokens=5)
        assert len(answer.text) == 5 and set(answer.text) <= set(DIGITS)
        assert llm[0]["inputs_embeds"].shape[1] == answer.prompt_tokens - cached
        assert all(call["inputs_embeds"].shape[1] == 1 for call in llm[1:])
        assert not tower
        cached = answer.prompt_tokens + answer.new_tokens - 1  # the last token was never read


def test_the_cache_is_used_up_to_where_an_answer_tokenizes_otherwise(tiny: Any) -> None:
    model, processor = tiny.model(dtype=torch.float64), tiny.processor()
    chat = Chat(model, processor, media(tiny))
    first = chat.ask(QUESTIONS[0], max_new_tokens=8)
    with counting(model.language_model) as llm:
        second = chat.ask(QUESTIONS[1], max_new_tokens=8)
    assert llm[0]["inputs_embeds"].shape[1] <= second.prompt_tokens - first.prompt_tokens


def test_media_stand_first_in_their_order(tiny: Any) -> None:
    model, processor = tiny.model(), tiny.processor()
    with counting(model) as calls, counting(model.vision_tower) as tower:
        Chat(model, processor, media(tiny)).ask("Describe.", max_new_tokens=1)
    text = (
        "<|im_start|>user\n" + ("<video>" * 4 + "\n") * 2 + "<image>" * 8 + "<video>" * 4 + "\n"
        "Describe.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert calls[0]["input_ids"].tolist() == [processor.tokenizer(text)["input_ids"]]
    given = [np.stack([np.array(tiny.image(1)), np.array(tiny.image(2))]), tiny.frames(0, 2), tiny.frames(3, 1)]
    for call, pixels in zip(tower, given, strict=True):
        expected = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        torch.testing.assert_close(call["pixel_values"], expected)


def test_text_alone_can_be_asked(tiny: Any) -> None:
    model, processor = tiny.model(dtype=torch.float64), tiny.processor()
    chat = Chat(model, processor)
    chat.ask("Hi", max_new_tokens=3)
    answer = chat.ask("Again", max_new_tokens=3)
    assert answer.visual_tokens == 0
    fresh = Chat(model, processor)
    fresh.messages = chat.messages[:2]
    assert fresh.ask("Again", max_new_tokens=3).text == answer.text


@pytest.mark.parametrize("digits", [True, False])
def test_the_pieces_of_an_answer_make_its_text(tiny: Any, digits: bool) -> None:
    model, processor = tiny.model(), tiny.processor()
    if digits:
        digits_only(model, processor)
    pieces: list[str] = []
    answer = Chat(model, processor, media(tiny)).ask("Describe.", max_new_tokens=40, on_text=pieces.append)
    assert "".join(pieces).strip() == answer.text
    assert answer.new_tokens == 40 and all(pieces)
    assert answer.prefill_s > 0 and answer.decode_s > 0


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "the question is empty"),
        (" \n", "the question is empty"),
        ("What is <image>?", "the question holds <image> or <video>"),
        ("<video>", "the question holds <image> or <video>"),
    ],
)
def test_a_question_that_cannot_be_asked_changes_nothing(tiny: Any, question: str, message: str) -> None:
    chat = Chat(tiny.model(), tiny.processor(), media(tiny))
    chat.ask("Hi", max_new_tokens=2)
    before = list(chat.messages)
    with pytest.raises(ValueError, match=message):
        chat.ask(question)
    assert chat.messages == before


@pytest.mark.parametrize("with_media", [True, False])
@pytest.mark.parametrize("turn", [0, 1])
def test_an_interrupted_answer_leaves_the_conversation_as_it_was(tiny: Any, turn: int, with_media: bool) -> None:
    model, processor = tiny.model(dtype=torch.float64), tiny.processor()
    digits_only(model, processor)
    given = media(tiny) if with_media else []
    chat, undisturbed = (Chat(model, processor, given) for _ in range(2))
    for question in QUESTIONS[:turn]:
        chat.ask(question, max_new_tokens=5)
        undisturbed.ask(question, max_new_tokens=5)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("A question that is never answered to its end?", max_new_tokens=5, on_text=interrupt)
    assert chat.messages == undisturbed.messages
    for question in QUESTIONS[turn:]:
        assert chat.ask(question, max_new_tokens=5).text == undisturbed.ask(question, max_new_tokens=5).text


def test_a_turn_interrupted_before_its_new_cache_is_filled(tiny: Any) -> None:
    """A full sliding window can't be cropped, so the second turn begins anew and is interrupted there."""
    model, processor = tiny.model(llm_name="gemma2", dtype=torch.float64), tiny.processor()
    chat, undisturbed = (Chat(model, processor, media(tiny)) for _ in range(2))
    for c in (chat, undisturbed):
        c.ask(QUESTIONS[0], max_new_tokens=8)

    def interrupt(module: nn.Module, args: tuple) -> None:
        raise KeyboardInterrupt

    hook = model.language_model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        chat.ask(QUESTIONS[1], max_new_tokens=8)
    hook.remove()
    assert chat.ask(QUESTIONS[1], max_new_tokens=8).text == undisturbed.ask(QUESTIONS[1], max_new_tokens=8).text


def test_turns_within_a_reduction_answer_as_asked_afresh(tiny: Any) -> None:
    """EVS keeps the same tokens whatever is asked, so that a new prefill of the whole conversation tells the answer."""
    model, processor = tiny.model(dtype=torch.float64), tiny.processor()
    given = [load_video(tiny.frames(0, 4)), tiny.image(1), load_video(tiny.frames(3, 6))]
    reduction = reduce(model, EVS(keep=0.5))
    with reduction:
        chat = Chat(model, processor, given)
        for turn, question in enumerate(QUESTIONS):
            history = list(chat.messages)
            with counting(model.language_model) as llm:
                answer = chat.ask(question, max_new_tokens=6)
            if turn:
                assert llm[0]["inputs_embeds"].shape[1] < answer.prompt_tokens / 2
            fresh = Chat(model, processor, given)
            fresh.messages = history
            assert fresh.ask(question, max_new_tokens=6).text == answer.text
            assert chat.cache is not None and chat.cache.get_seq_length() == len(chat.cached_ids)
            assert chat.cache.layers[0].keys.shape[2] == len(chat.cached_ids) - (16 - 8) - (24 - 12)
    assert all(prefill.given == (16 + 4 + 24,) for prefill in reduction.prefills)
    assert all(layer == (8 + 4 + 12,) for prefill in reduction.prefills for layer in prefill.visual)
    assert len(reduction.prefills) == 1 + len(QUESTIONS)  # the chat's first, and each fresh one's


def test_later_turns_prefill_nothing_visual_and_thin_layers_stay_thin(tiny: Any) -> None:
    model, processor = tiny.model(dtype=torch.float64), tiny.processor()
    reduction = reduce(model, FastV(layer=1, keep=0.5))
    with reduction:
        chat = Chat(model, processor, media(tiny))
        for question in QUESTIONS:
            chat.ask(question, max_new_tokens=6)
            assert chat.cache is not None
            held = [layer.keys.shape[2] for layer in chat.cache.layers]
            assert held == [len(chat.cached_ids), len(chat.cached_ids) - 10]
    assert [prefill.visual for prefill in reduction.prefills] == [((20,), (10,))]


@pytest.mark.parametrize("kv", ["dense", "int4:group=8,residual=8"])
def test_turns_go_on_in_the_kv_cache_asked_for(tiny: Any, kv: str) -> None:
    model, processor = tiny.model(dtype=torch.float64), tiny.processor()
    plain = Chat(model, processor, media(tiny))
    wanted = [plain.ask(question, max_new_tokens=6).text for question in QUESTIONS]
    with reduce(model, kv=kv):
        chat = Chat(model, processor, media(tiny))
        for turn, question in enumerate(QUESTIONS):
            before = chat.cache
            with counting(model.language_model) as llm:
                answer = chat.ask(question, max_new_tokens=6)
            assert isinstance(chat.cache, KVCache) and chat.cache.get_seq_length() == len(chat.cached_ids)
            assert chat.cache.layers[0].store.packed == (0 if kv == "dense" else (len(chat.cached_ids) - 8) // 8 * 8)
            if turn:
                assert chat.cache is before and llm[0]["inputs_embeds"].shape[1] < answer.prompt_tokens / 2
            if kv == "dense":
                assert answer.text == wanted[turn]


def test_a_turn_that_needs_what_was_packed_again_begins_afresh(tiny: Any) -> None:
    model, processor = tiny.model(dtype=torch.float64), tiny.processor()
    with reduce(model, kv="int4:group=8,residual=8"):
        chat, fresh = (Chat(model, processor, media(tiny)) for _ in range(2))
        chat.ask(QUESTIONS[0], max_new_tokens=6)
        before, chat.messages = chat.cache, []
        assert chat.ask(QUESTIONS[1], max_new_tokens=6).text == fresh.ask(QUESTIONS[1], max_new_tokens=6).text
        assert chat.cache is not before


def test_what_was_encoded_within_a_reduction_is_not_asked_about_outside(tiny: Any) -> None:
    model, processor = tiny.model(), tiny.processor()
    with reduce(model, EVS(keep=0.5)):
        within = Chat(model, processor, media(tiny))
    with pytest.raises(ValueError, match=r"asked outside foveate.reduce, about media encoded within; accepted"):
        within.ask("What?", max_new_tokens=1)
    outside = Chat(model, processor, media(tiny))
    with reduce(model, EVS(keep=0.5)), pytest.raises(ValueError, match=r"asked within foveate.reduce, about"):
        outside.ask("What?", max_new_tokens=1)
    assert outside.ask("What?", max_new_tokens=1).new_tokens == 1


def test_a_saved_model_is_loaded_in_its_own_dtype(tiny: Any, tmp_path: Path) -> None:
    tiny.model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    tiny.processor(num_frames=5).save_pretrained(tmp_path)
    model, processor = load_model(tmp_path, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training and processor.num_frames == 5
    assert Chat(model, processor, media(tiny)).ask("What?", max_new_tokens=2).new_tokens == 2


def test_what_is_no_model_is_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    tiny.tokenizer().save_pretrained(tmp_path)
    tiny.llm("qwen2", 360).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="accepted: a model that Foveate trained or exported"):
        load_model(tmp_path)


def test_files_are_loaded_as_image_or_video(tiny: Any, tmp_path: Path) -> None:
    processor = tiny.processor()
    tiny.image(0, (20, 30)).save(tmp_path / "a.png")
    image = load_media(tmp_path / "a.png", None, processor)
    assert np.array_equal(np.asarray(image), np.asarray(tiny.image(0, (20, 30))))
    path = tiny.mp4(tmp_path / "a.mp4", [0, 60, 120, 180, 240])
    assert load_media(path, None, processor) == VideoSource(path, num_frames=3)
    assert load_media(path, 2, processor, start_s=0.5) == VideoSource(path, num_frames=2, start_s=0.5)
    assert load_media(path, None, processor, fps=2.0, end_s=1.0) == VideoSource(path, fps=2.0, end_s=1.0)
    with pytest.raises(MediaError, match="no frame from 9"):
        load_media(path, None, processor, start_s=9.0)
    (tmp_path / "a.txt").write_text("neither")
    with pytest.raises(MediaError, match=r"\(as a video\).*\(as an image\)"):
        load_media(tmp_path / "a.txt", None, processor)
    with pytest.raises(MediaError, match="nothing"):
        load_media(tmp_path / "nothing", None, processor)


def test_a_file_is_answered_about_as_its_frames_are(tiny: Any, tmp_path: Path) -> None:
    model, processor = tiny.model(dtype=torch.float64), tiny.processor()
    path = tiny.mp4(tmp_path / "a.mp4", list(range(0, 250, 10)), side=16)  # 4 frames a second
    samplings: list[dict[str, Any]] = [{"num_frames": 5}, {"fps": 2.0}, {"num_frames": 3, "start_s": 1.5, "end_s": 4.0}]
    for sampling in samplings:
        clip = {name: value for name, value in sampling.items() if name != "num_frames"}
        source = load_media(path, sampling.get("num_frames"), processor, **clip)
        with counting(model.vision_tower) as tower:
            answer = Chat(model, processor, [source]).ask("What?", max_new_tokens=4)
        frames = load_video(path, **sampling).frames
        seen = torch.cat([call["pixel_values"] for call in tower]).float()
        torch.testing.assert_close(seen, torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1)
        assert Chat(model, processor, [load_video(path, **sampling)]).ask("What?", max_new_tokens=4).text == answer.text
        assert answer.visual_tokens == 4 * len(frames)


def test_media_are_held_to_their_budget(tiny: Any, tmp_path: Path) -> None:
    model, processor = tiny.model(), tiny.processor(min_frames=2)
    path = tiny.mp4(tmp_path / "a.mp4", list(range(0, 250, 10)), side=16)
    given = [tiny.image(0), VideoSource(path, num_frames=20)]
    assert Chat(model, processor, given).ask("What?", max_new_tokens=1).visual_tokens == 4 + 20 * 4
    with counting(model.vision_tower) as tower:
        chat = Chat(model, processor, given, max_visual_tokens=4 + 7 * 4 + 3)
    assert chat.ask("What?", max_new_tokens=1).visual_tokens == 4 + 7 * 4
    seen = tower[1]["pixel_values"]
    assert len(seen) == 7
    every = load_video(path, num_frames=20).frames
    taken = every[np.linspace(0, 19, 7).round().astype(int)]
    torch.testing.assert_close(seen, torch.from_numpy(taken).permute(0, 3, 1, 2).float() / 127.5 - 1)


TOPOLOGIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "pooled": {"video_pool": (4, 2, 1)},
    "native": {"tiling": "native", "video_pool": (2, 1, 1)},
    "anyres": {"tiling": "anyres", "projector": "mlp2x"},
    "queries": {"projector": "resampler", "resampler_tokens": 6},
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_video_encoded_in_chunks_is_the_video_encoded_whole(
    tiny: Any, tmp_path: Path, topology: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "TOWER_BATCH", 4)
    tower = "siglip2_vision_model" if topology == "native" else "siglip_vision_model"
    model = tiny.model(tower, dtype=torch.float64, **TOPOLOGIES[topology])
    fields = model_fields(model.config) | {"image_size": (16, 16), "min_frames": 11}
    processor = FoveateProcessor(tiny.tokenizer(), **fields)
    path = tiny.mp4(tmp_path / "a.mp4", list(range(0, 250, 10)), side=32)
    for source in (path, load_video(path, num_frames=11)):
        budget = 40 if topology == "queries" else None  # then 3 of the 6 queries a frame are kept
        plan = processor.plan(videos=[VideoSource(source, num_frames=11)], max_visual_tokens=budget)
        with counting(model.vision_tower) as calls:
            chunked = encode_video(model, processor, source, plan.videos[0], plan.video_tiling.tokens_per_tile)
        assert len(calls) >= 3
        options: dict[str, Any] = {"num_frames": 11, "max_visual_tokens": budget}
        inputs = processor(text="<video>", videos=[source], return_tensors="pt", **options)
        names = ("pixel_values_videos", "video_grids", "video_queries")
        with torch.no_grad():
            whole = model.encode_videos(**{name: inputs[name] for name in names if name in inputs})
        torch.testing.assert_close(chunked, torch.cat(whole))
        assert len(chunked) == plan.tokens
        with reduce(model, EVS(keep=0.4)):  # compares frames across chunks too
            thinned = encode_video(model, processor, source, plan.videos[0], plan.video_tiling.tokens_per_tile)
            with torch.no_grad():
                whole = model.encode_videos(**{name: inputs[name] for name in names if name in inputs})
        torch.testing.assert_close(thinned, torch.cat(whole), equal_nan=True)
        kept = ~thinned[:, 0].isnan()
        end = int(topology == "anyres")
        assert int(kept.sum()) == int((len(chunked) - end) * 0.4) + end
        torch.testing.assert_close(thinned[kept], chunked[kept])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("1:30", 90), ("0:01:30.5", 90.5), ("2:00:00", 7200), (".5", 0.5), ("120:00", 7200)],
)
def test_times_of_day_are_seconds(text: str, seconds: float) -> None:
    assert cli._seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1:75", "1:2:3:4", "1.5:00", "1e3", "one", "1:", "nan", "1:-2"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(cli.UsageError, match=r"accepted: \[\[hours:\]minutes:\]seconds"):
        cli._seconds(text)


LLAVA = """{% for m in messages %}{{ m.role.upper() }}: \
{% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}\
{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %} {% endfor %}ASSISTANT:"""
TEXT_ALONE = "{% for m in messages %}[{{ m.role + '] ' + m.content }}{% endfor %}"
NO_PLACE = "{% for m in messages %}{% for c in m.content if c.type == 'text' %}hello{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (LLAVA, "USER: <image>\n<video>\nwhat ? ASSISTANT:"),
        (TEXT_ALONE, "[user] <image>\n<video>\nwhat ?"),
    ],
)
def test_templates_that_know_no_videos_or_no_parts_get_placeholders_as_words(
    tiny: Any, template: str, prompt: str
) -> None:
    model, processor = tiny.model(), tiny.processor()
    processor.chat_template = template
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    chat = Chat(model, processor, [tiny.image(0), Video(frames, np.arange(2.0), 2.0, 1.0, 0)])
    assert chat._prompt("what ?")[1] == prompt
    assert chat.ask("what ?", 2).visual_tokens == 4 + 2 * 4
    assert chat.ask("and ?", 2).visual_tokens == 4 + 2 * 4
    said = chat.messages[1]["content"]
    assert (said if isinstance(said, str) else said[0]["text"]) in chat._prompt("and ?")[1]


def test_a_template_without_a_place_for_the_question_is_refused(tiny: Any) -> None:
    processor = tiny.processor()
    processor.chat_template = NO_PLACE
    with pytest.raises(ValueError, match=r"chat template leaves out the question or some of the media \(image\)"):
        Chat(tiny.model(), processor, [tiny.image(0)]).ask("what ?", 2)
