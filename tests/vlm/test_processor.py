"""The processor: what text and media become, against computations with PIL, numpy and the tokenizer alone."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoProcessor, pipeline

from foveate.vlm import FoveateProcessor
from foveate.vlm.media import MediaError, load_video


def expanded(text: str, tokens: int, frames: tuple[int, ...] = (), separator: str = "\n") -> str:
    """The text with its placeholders written out; each `<video>` takes the next number of frames."""
    text = text.replace("<image>", "\0" * tokens)
    for count in frames:
        text = text.replace("<video>", ("\1" * tokens + separator) * count, 1)
    return text.replace("\0", "<image>").replace("\1", "<video>")


def pixels_by_hand(image: Image.Image, size: tuple[int, int], mean: Any = (0.5,) * 3, std: Any = (0.5,) * 3) -> Any:
    resized = np.asarray(image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC), np.float64)
    return torch.from_numpy(((resized / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)).float()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# Text


@pytest.mark.parametrize(
    ("size", "r", "prefix", "tokens"), [((16, 16), 2, 0, 4), ((20, 28), 3, 0, 6), ((8, 8), 1, 1, 5)]
)
def test_each_placeholder_becomes_its_exact_number_of_tokens(
    tiny: Any, size: tuple[int, int], r: int, prefix: int, tokens: int
) -> None:
    processor = tiny.processor(image_size=size, downsample_factor=r, prefix_tokens=prefix)
    text = "A <image> B<image>\nC<video>"
    inputs = processor(text=text, images=[tiny.image(0), tiny.image(1)], videos=[tiny.frames(2, 3)])
    assert inputs["input_ids"] == [processor.tokenizer(expanded(text, tokens, (3,)))["input_ids"]]
    assert inputs["input_ids"][0].count(processor.image_token_id) == 2 * tokens == 2 * processor.tokens_per_image()
    assert inputs["input_ids"][0].count(processor.video_token_id) == 3 * tokens == 3 * processor.tokens_per_frame()


def test_frames_have_their_own_size_and_separator(tiny: Any) -> None:
    processor = tiny.processor(video_size=(8, 12), frame_separator=" | ")
    inputs = processor(text="<image><video>", images=tiny.image(0), videos=tiny.frames(1, 2), return_tensors="pt")
    text = "<image>" * 4 + ("<video>" * 2 + " | ") * 2
    assert inputs["input_ids"].tolist() == [processor.tokenizer(text)["input_ids"]]
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    assert inputs["pixel_values_videos"].shape == (2, 3, 8, 12)


def test_batches_are_padded_left(tiny: Any) -> None:
    processor = tiny.processor()
    texts = ["How many digits appear?", "<image>?"]
    inputs = processor(text=texts, images=[tiny.image(0)], padding=True, return_tensors="pt")
    rows = [processor.tokenizer(expanded(t, 4))["input_ids"] for t in texts]
    longest = max(map(len, rows))
    assert inputs["input_ids"].tolist() == [[0] * (longest - len(r)) + r for r in rows]
    assert inputs["attention_mask"].tolist() == [[0] * (longest - len(r)) + [1] * len(r) for r in rows]
    right = processor(text=texts, images=[tiny.image(0)], padding=True, padding_side="right", return_tensors="pt")
    assert right["input_ids"].tolist() == [r + [0] * (longest - len(r)) for r in rows]


def test_text_alone_needs_no_media(tiny: Any) -> None:
    processor = tiny.processor()
    expected = [processor.tokenizer("Describe.")["input_ids"]]
    for none in ({}, {"images": [], "videos": [], "audio": [], "audios": []}, {"images": None}, {"images": [[]]}):
        inputs = processor(text="Describe.", **none)
        assert inputs["input_ids"] == expected
        assert set(inputs) == {"input_ids", "attention_mask"}


def test_token_types_tell_text_images_and_video_apart(tiny: Any) -> None:
    inputs = tiny.processor()(
        text=["a<image><video>"], images=[tiny.image(0)], videos=[tiny.frames(0, 1)], return_mm_token_type_ids=True
    )
    assert inputs["mm_token_type_ids"] == [[0] + [1] * 4 + [2] * 4 + [0]]


def test_offsets_point_into_the_text_as_given(tiny: Any) -> None:
    processor = tiny.processor()
    text = "<image>Hi <video><image> there"
    inputs = processor(
        text=["some longer text so that the other row is padded", text],
        images=[tiny.image(0), tiny.image(1)],
        videos=[tiny.frames(0, 2)],
        return_offsets_mapping=True,
        padding=True,
    )
    ids, offsets, mask = (inputs[k][1].tolist() for k in ("input_ids", "offset_mapping", "attention_mask"))
    spans = {processor.image_token_id: [[0, 7], [17, 24]], processor.video_token_id: [[10, 17]]}
    separator = processor.tokenizer("\n")["input_ids"][0]
    for i, (start, end), real in zip(ids, offsets, mask, strict=True):
        if i in spans:
            assert [start, end] in spans[i]
        elif i == separator:
            assert [start, end] == [10, 17]
        elif real:
            assert processor.decode([i]) == text[start:end]
        else:
            assert start == end == 0


def test_replacement_offsets_are_those_of_transformers(tiny: Any) -> None:
    processor = tiny.processor()
    inputs = processor(
        text="Hi <image>!",
        images=tiny.image(0),
        return_offsets_mapping=True,
        return_text_replacement_offsets=True,
        return_tensors="pt",
    )
    (replaced,) = inputs["text_replacement_offsets"][0]
    assert (replaced["span"], replaced["new_span"]) == ((3, 10), (3, 31))
    assert inputs["offset_mapping"][0, -1].tolist() == [31, 32]


# How media are given


def test_media_come_one_flat_or_by_text(tiny: Any) -> None:
    processor = tiny.processor()
    a, b, c = (tiny.image(i) for i in range(3))
    texts = ["<image> and <image>", "none", "<image>"]
    expected = torch.stack([pixels_by_hand(image, (16, 16)) for image in (a, b, c)])
    for images in ([a, b, c], (a, b, c), [[a, b], [], [c]], [[a, b], [], c], [(a, b), (), (c,)]):
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
        torch.testing.assert_close(inputs["pixel_values"], expected)
    one = processor(text="<image>", images=a, return_tensors="pt")
    torch.testing.assert_close(one["pixel_values"], expected[:1])


def test_an_image_comes_from_any_source(tiny: Any, tmp_path: Path) -> None:
    image = tiny.image(0, (20, 30))
    (tmp_path / "a.png").write_bytes(png(image))
    uri = "data:image/png;base64," + base64.b64encode(png(image)).decode()
    expected = pixels_by_hand(image, (16, 16))[None]
    for source in (image, np.asarray(image), png(image), tmp_path / "a.png", str(tmp_path / "a.png"), uri):
        for images in (source, [source], [[source]]):
            inputs = tiny.processor()(text="<image>", images=images, return_tensors="pt")
            torch.testing.assert_close(inputs["pixel_values"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_pixels_are_resized_then_normalised_by_channel(tiny: Any, resample: Image.Resampling) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    processor = tiny.processor(
        image_size=(12, 20), image_mean=mean, image_std=std, resample=int(resample), patch_size=4
    )
    image, frame = tiny.image(0, (31, 17)), tiny.image(1, (40, 40))
    inputs = processor(text="<image><video>", images=image, videos=[[frame]], return_tensors="pt")
    for source, key in ((image, "pixel_values"), (frame, "pixel_values_videos")):
        resized = np.asarray(source.resize((20, 12), resample), np.float64)
        for channel in range(3):
            expected = torch.from_numpy((resized[..., channel] / 255 - mean[channel]) / std[channel]).float()
            torch.testing.assert_close(inputs[key][0, channel], expected, rtol=1e-5, atol=1e-6)


def test_a_video_comes_from_any_source(tiny: Any, tmp_path: Path) -> None:
    grey = [0, 40, 80, 120, 160, 200, 240]
    path = tiny.mp4(tmp_path / "a.mp4", grey)
    frames = np.stack([np.full((16, 16, 3), g, np.uint8) for g in grey])
    processor = tiny.processor()
    pil = [Image.fromarray(f) for f in frames]
    for source in (path, str(path), path.read_bytes(), frames, list(frames), pil, load_video(path)):
        for videos in (source, [source], [[source]]):
            inputs = processor(text="<video>", videos=videos, num_frames=7, return_tensors="pt")
            assert inputs["pixel_values_videos"].shape == (7, 3, 16, 16)
            values = (inputs["pixel_values_videos"].mean((1, 2, 3)) * 0.5 + 0.5) * 255
            assert values.tolist() == pytest.approx(grey, abs=4)
            assert inputs["input_ids"].tolist() == [processor.tokenizer(expanded("<video>", 4, (7,)))["input_ids"]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 120, 240]),  # the processor's own num_frames, 3
        ({"num_frames": 2}, [0, 240]),
        ({"num_frames": 4}, [0, 80, 160, 240]),
        ({"num_frames": 100}, [0, 40, 80, 120, 160, 200, 240]),
        ({"fps": 2}, [0, 80, 160, 240]),
        ({"fps": 1}, [0, 160]),
    ],
)
def test_frames_are_sampled_as_asked(tiny: Any, tmp_path: Path, options: dict, expected: list[int]) -> None:
    path = tiny.mp4(tmp_path / "a.mp4", [0, 40, 80, 120, 160, 200, 240])
    inputs = tiny.processor()(text="<video>", videos=path, return_tensors="pt", **options)
    values = (inputs["pixel_values_videos"].mean((1, 2, 3)) * 0.5 + 0.5) * 255
    assert values.tolist() == pytest.approx(expected, abs=4)
    assert (inputs["input_ids"] == tiny.processor().video_token_id).sum() == 4 * len(expected)


def test_frames_given_as_such_are_all_kept(tiny: Any) -> None:
    frames = tiny.frames(0, 9)
    inputs = tiny.processor()(text="<video><video>", videos=[frames, list(frames[:5])], return_tensors="pt")
    expected = torch.from_numpy(np.concatenate([frames, frames[:5]])).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(inputs["pixel_values_videos"], expected)


def test_videos_of_different_lengths_keep_their_order_and_tokens(tiny: Any) -> None:
    processor = tiny.processor()
    texts = ["<video> and <image>", "<image>", "<video><video>"]
    lengths = (2, 1, 3)
    videos = [tiny.frames(i, n) for i, n in enumerate(lengths)]
    nested = [[videos[0]], [], videos[1:]]
    for given in (videos, nested):
        inputs = processor(
            text=texts, images=[tiny.image(0), tiny.image(1)], videos=given, return_tensors="pt", padding=True
        )
        counts = (inputs["input_ids"] == processor.video_token_id).sum(1).tolist()
        assert counts == [2 * 4, 0, (1 + 3) * 4]
        expected = torch.from_numpy(np.concatenate(videos)).permute(0, 3, 1, 2) / 127.5 - 1
        torch.testing.assert_close(inputs["pixel_values_videos"], expected)


# Errors


@pytest.mark.parametrize(
    ("text", "media", "message"),
    [
        ("<image><image>", {"images": 1}, r"hold 2 <image> placeholders, but 1 images were given"),
        ("<image>", {"images": 2}, r"hold 1 <image> placeholders, but 2 images"),
        ("<image>", {}, r"hold 1 <image> placeholders, but 0 images"),
        ("none", {"images": 1}, r"hold 0 <image> placeholders, but 1 images"),
        ("<video>", {"videos": 2}, r"hold 1 <video> placeholders, but 2 videos"),
        ("<video>", {"images": 1}, r"hold 0 <image> placeholders, but 1 images"),
        (["<image>", ""], {"images": [[], ["x"]]}, r"hold \[1, 0\] <image> placeholders, but \[0, 1\] images"),
        (["<image>", "<image>"], {"images": [["x", "x"]]}, r"hold \[1, 1\] <image> placeholders, but \[2\] images"),
    ],
)
def test_a_mismatch_names_both_numbers(tiny: Any, text: Any, media: dict, message: str) -> None:
    make: dict[str, Callable] = {"images": tiny.image, "videos": lambda seed: tiny.frames(seed, 1)}
    given = {k: [make[k](i) for i in range(v)] if isinstance(v, int) else v for k, v in media.items()}
    with pytest.raises(ValueError, match=message):
        tiny.processor()(text=text, **given)


def test_truncation_never_cuts_media(tiny: Any) -> None:
    processor = tiny.processor()
    options: dict[str, Any] = {"images": [tiny.image(0)], "truncation": True}
    with pytest.raises(ValueError, match=r"3 of 4 image placeholder tokens are left: truncation \(max_length 4\)"):
        processor(text="a<image>b", max_length=4, **options)
    kept = processor(text="a<image>b", max_length=5, **options)["input_ids"][0]
    assert kept == processor.tokenizer("a")["input_ids"] + [processor.image_token_id] * 4
    with pytest.raises(ValueError, match=r"2 of 4 video placeholder tokens are left"):
        processor(text="<video>", videos=tiny.frames(0, 1), truncation=True, max_length=2)


@pytest.mark.parametrize("typo", [{"num_frame": 3}, {"image": 1}, {"paddding": True}, {"do_resize": False}])
def test_a_misspelt_argument_is_an_error(tiny: Any, typo: dict) -> None:
    with pytest.raises(TypeError, match=next(iter(typo))):
        tiny.processor()(text="x", **typo)


def test_what_cannot_be_used_is_refused(tiny: Any, tmp_path: Path) -> None:
    processor = tiny.processor()
    for name in ("audio", "audios"):
        with pytest.raises(ValueError, match="audio was given; accepted: text, images, videos"):
            processor(text="x", **{name: [np.zeros(9)]})
    with pytest.raises(ValueError, match="text is None"):
        processor(images=[tiny.image(0)])
    with pytest.raises(ValueError, match="num_frames=3 and fps=1"):
        processor(text="<video>", videos=tiny.frames(0, 2), num_frames=3, fps=1)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(MediaError, match=r"broken\.png"):
        processor(text="<image>", images=tmp_path / "broken.png")
    with pytest.raises(MediaError, match="float64"):
        processor(text="<image>", images=np.zeros((8, 8, 3)))
    with pytest.raises(MediaError, match="nothing is downloaded"):
        processor(text="<image>", images="https://example.com/a.png")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_size": (16,)}, ValueError, r"image_size is \(16,\); accepted: \(height, width\)"),
        ({"video_size": (2, 16)}, ValueError, r"video_size is \(2, 16\)"),
        ({"num_framez": 3}, TypeError, "num_framez"),
    ],
)
def test_a_wrong_field_is_named(tiny: Any, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny.processor(**options)
    with pytest.raises(ValueError, match="tokenizer is None"):
        FoveateProcessor()


# Saving


def test_a_saved_processor_keeps_every_field(tiny: Any, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "image_size": (20, 28),
        "video_size": (8, 12),
        "patch_size": 4,
        "downsample_factor": 3,
        "prefix_tokens": 0,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
        "frame_separator": " | ",
        "num_frames": 5,
        "video_backend": "decord",
        "chat_template": "{{ messages[0].content }}!",
    }
    FoveateProcessor(tiny.tokenizer(), **fields).save_pretrained(tmp_path)
    for loaded in (AutoProcessor.from_pretrained(tmp_path), FoveateProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is FoveateProcessor
        assert {name: getattr(loaded, name) for name in fields} == fields
        assert (loaded.image_token_id, loaded.video_token_id) == (360, 361)
        assert loaded.tokenizer.padding_side == "left"
        assert loaded.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi!"
    assert FoveateProcessor.from_pretrained(tmp_path, num_frames=9).num_frames == 9


def test_a_loaded_processor_gives_the_same_inputs(tiny: Any, tmp_path: Path) -> None:
    processor = tiny.processor()
    processor.save_pretrained(tmp_path)
    options: dict[str, Any] = {"text": "A <image>", "images": tiny.image(0), "return_tensors": "pt"}
    before, after = processor(**options), AutoProcessor.from_pretrained(tmp_path)(**options)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_media_tokens_that_a_tokenizer_has_are_kept(tiny: Any) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<video>", "extra", "<image>"], special_tokens=True)
    processor = tiny.processor(tokenizer)
    assert (processor.video_token_id, processor.image_token_id, len(tokenizer)) == (360, 362, 363)


# Chat templates


IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


CONVERSATIONS = [
    ([{"role": "user", "content": "Hi"}], "<|im_start|>user\nHi<|im_end|>\n"),
    ([{"role": "user", "content": [said("Hi")]}], "<|im_start|>user\nHi<|im_end|>\n"),
    (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [IMAGE, said("What?"), VIDEO, said(" and"), IMAGE]},
            {"role": "assistant", "content": [said("A "), said("cat.")]},
            {"role": "user", "content": [said("Sure?")]},
            {"role": "assistant", "content": "Yes.\n"},
        ],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>What?<video> and<image><|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nYes.\n<|im_end|>\n",
    ),
]


@pytest.mark.parametrize(("conversation", "text"), CONVERSATIONS)
def test_the_chat_template_gives_chatml(tiny: Any, conversation: list[dict], text: str) -> None:
    processor = tiny.processor()
    assert processor.apply_chat_template(conversation) == text
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompt == text + "<|im_start|>assistant\n"
    assert processor.apply_chat_template([conversation, conversation]) == [text, text]


def test_the_embedded_datas_template(tiny: Any) -> None:
    from foveate.data.glyphs import CHAT_TEMPLATE, FRAME_SEPARATOR, glyph_tokenizer

    processor = FoveateProcessor(glyph_tokenizer(), chat_template=CHAT_TEMPLATE, frame_separator=FRAME_SEPARATOR)
    text = processor.apply_chat_template(CONVERSATIONS[2][0][1:], add_generation_prompt=True)
    assert text == (
        "<|user|><image>What?<video> and<image><|assistant|>A cat.<|end|><|user|>Sure?<|assistant|>Yes.\n<|end|>"
        "<|assistant|>"
    )


def test_a_part_of_unknown_type_is_an_error(tiny: Any) -> None:
    with pytest.raises(TemplateError, match="content part of type sound; accepted: text, image, video"):
        tiny.processor().apply_chat_template([{"role": "user", "content": [{"type": "sound"}]}])


def test_the_chat_template_takes_real_media(tiny: Any, tmp_path: Path) -> None:
    processor = tiny.processor()
    a, b, c = (tiny.image(i, (20, 20)) for i in range(3))
    b.save(tmp_path / "b.png")
    uri = "data:image/png;base64," + base64.b64encode(png(c)).decode()
    path = tiny.mp4(tmp_path / "v.mp4", [0, 60, 120, 180, 240])
    frames = tiny.frames(5, 2)
    content = [
        {"type": "image", "image": a},
        said("one"),
        {"type": "video", "path": str(path)},
        {"type": "image", "url": str(tmp_path / "b.png")},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "video", "video": frames},
        {"type": "image", "image": np.asarray(a)},
        said("two"),
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    text = "<|im_start|>user\n<image>one<video><image><image><video><image>two<|im_end|>\n<|im_start|>assistant\n"
    assert inputs["input_ids"].tolist() == [processor.tokenizer(expanded(text, 4, (3, 2)))["input_ids"]]
    expected = torch.stack([pixels_by_hand(image, (16, 16)) for image in (a, b, c, a)])
    torch.testing.assert_close(inputs["pixel_values"], expected, rtol=1e-5, atol=1e-6)
    assert inputs["pixel_values_videos"].shape == (3 + 2, 3, 16, 16)
    given = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(inputs["pixel_values_videos"][3:], given)


def test_sampling_options_pass_through_the_chat_template(tiny: Any, tmp_path: Path) -> None:
    path = tiny.mp4(tmp_path / "v.mp4", [0, 60, 120, 180, 240])
    messages = [{"role": "user", "content": [{"type": "video", "path": path}]}]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for kwargs, frames in (({"num_frames": 2}, 2), ({"fps": 4}, 5), ({}, 3)):
        inputs = tiny.processor().apply_chat_template(messages, processor_kwargs=dict(kwargs), **options)
        assert len(inputs["pixel_values_videos"]) == frames
    with pytest.raises(TypeError, match="num_frame"):
        tiny.processor().apply_chat_template(messages, processor_kwargs={"num_frame": 2}, **options)


def test_batched_conversations_are_padded_and_keep_their_media(tiny: Any) -> None:
    processor = tiny.processor()
    a, b, c = (tiny.image(i) for i in range(3))
    batch = [
        [{"role": "user", "content": [{"type": "image", "image": a}, said("x"), {"type": "image", "image": b}]}],
        [{"role": "user", "content": "only text"}],
        [{"role": "user", "content": [{"type": "image", "image": c}]}],
    ]
    inputs = processor.apply_chat_template(
        batch, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [8, 0, 4]
    expected = torch.stack([pixels_by_hand(image, (16, 16)) for image in (a, b, c)])
    torch.testing.assert_close(inputs["pixel_values"], expected)
    for ids, mask, conversation in zip(inputs["input_ids"], inputs["attention_mask"], batch, strict=True):
        text = expanded(processor.apply_chat_template(conversation), 4)
        assert processor.decode(ids[mask.bool()]) == text


ANSWERS = [["A red circle.", "Yes"], ["Three digits appear\nin the clip."]]


@pytest.mark.parametrize("tensors", [None, "pt"])
def test_the_assistant_mask_covers_exactly_the_assistants_words(tiny: Any, tensors: str | None) -> None:
    processor = tiny.processor()
    batch = [
        [
            {"role": "system", "content": "assistant"},
            {"role": "user", "content": [{"type": "image", "image": tiny.image(0)}, said("What?")]},
            {"role": "assistant", "content": ANSWERS[0][0]},
            {"role": "user", "content": [said("Yes"), {"type": "video", "video": tiny.frames(0, 2)}]},
            {"role": "assistant", "content": [said(ANSWERS[0][1])]},
        ],
        [
            {"role": "user", "content": [said("?"), {"type": "image", "image": tiny.image(1)}]},
            {"role": "assistant", "content": ANSWERS[1][0]},
        ],
    ]
    inputs = processor.apply_chat_template(
        batch,
        tokenize=True,
        return_dict=True,
        return_tensors=tensors,
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True} if tensors else {},
    )
    assert "offset_mapping" not in inputs and "text_replacement_offsets" not in inputs
    for ids, mask, answers in zip(inputs["input_ids"], inputs["assistant_masks"], ANSWERS, strict=True):
        marked, pieces, last = [int(m) for m in mask], [], 0
        for i, m in zip(ids, marked, strict=True):
            if m and not last:
                pieces.append([])
            if m:
                pieces[-1].append(int(i))
            last = m
        assert [processor.decode(p) for p in pieces] == [a + "<|im_end|>\n" for a in answers]


def test_transformers_pipeline_runs_it(tiny: Any) -> None:
    pipe = pipeline("image-text-to-text", model=tiny.model(), processor=tiny.processor())
    messages = [{"role": "user", "content": [{"type": "image", "image": tiny.image(0)}, said("What?")]}]
    (answer,) = pipe(text=messages, max_new_tokens=3, return_full_text=False)
    assert isinstance(answer["generated_text"], str)
