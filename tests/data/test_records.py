"""Records of the public layouts, written by hand from their schemas, become the documents that they mean."""

import base64
import io
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from foveate.data.document import Document, DocumentError, Image, Text, Video
from foveate.data.encoding import encode
from foveate.data.glyphs import encode_mp4
from foveate.data.records import LAYOUTS, RecordOptions, document_from_record, parse_record
from foveate.vlm.processor import FoveateProcessor

EOS = "<|im_end|>"  # of chatml_processor
BELOW_MEDIA = "/media/"


def png(colour: tuple[int, int, int] = (200, 30, 40)) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (20, 10), colour).save(buffer, "PNG")
    return buffer.getvalue()


def made(record: dict, processor: FoveateProcessor, unnamed: tuple = (), **options: Any) -> Document:
    """The record's document, its media resolved to paths that begin with /media/."""
    before = repr(record)
    document = document_from_record(
        "shard.tar/3", record, lambda name: BELOW_MEDIA + name, RecordOptions(**options), processor, unnamed
    )
    assert repr(record) == before
    assert document.key == "shard.tar/3"
    return document


def brief(document: Document) -> list[str]:
    """Parts as strings: media by their names, text with loss in brackets."""
    return [
        (f"[{part.text}]" if part.loss else part.text)
        if isinstance(part, Text)
        else f"{type(part).__name__}:{str(part.source).removeprefix(BELOW_MEDIA)}"
        for part in document.parts
    ]


def joined(document: Document) -> str:
    return "".join(
        part.text if isinstance(part, Text) else "<image>" if isinstance(part, Image) else "<video>"
        for part in document.parts
    )


def refused(record: Any, processor: FoveateProcessor, **options: Any) -> DocumentError:
    with pytest.raises(DocumentError) as caught:
        made(record, processor, **options)
    assert caught.value.key == "shard.tar/3"
    assert "accepted: " in caught.value.message
    return caught.value


# Interleaved pages

MMC4 = {
    "url": "https://example.org/cats",
    "text_list": ["Cats sleep a lot.", "Here is one.", "Dogs do not.", "The end."],
    "image_info": [
        {
            "face_detections": None,
            "image_name": "b9040a0dbb22.jpg",
            "raw_url": "https://example.org/b.jpg",
            "matched_text_index": 2,
            "matched_sim": 0.21,
        },
        {"image_name": "a1.png", "raw_url": "https://example.org/a.png", "matched_text_index": 1, "matched_sim": 0.31},
        {"image_name": "c.jpg", "raw_url": "https://example.org/c.jpg", "matched_text_index": 1, "matched_sim": 0.18},
    ],
    "similarity_matrix": [[0.1, 0.1, 0.21, 0.0], [0.2, 0.31, 0.1, 0.1], [0.1, 0.18, 0.0, 0.0]],
    "could_have_url_duplicate": 0,
}


def test_an_mmc4_image_stands_before_its_sentence(chatml_processor: FoveateProcessor) -> None:
    assert brief(made(MMC4, chatml_processor)) == [
        "[Cats sleep a lot.]",
        "Image:a1.png",
        "Image:c.jpg",
        "[Here is one.]",
        "Image:b9040a0dbb22.jpg",
        f"[Dogs do not. The end.{EOS}]",
    ]


@pytest.mark.parametrize(
    ("most", "least", "kept"),
    [
        (6, None, {"a1.png", "b9040a0dbb22.jpg", "c.jpg"}),
        (2, None, {"a1.png", "b9040a0dbb22.jpg"}),
        (1, None, {"a1.png"}),
        (0, None, set()),
        (6, 0.2, {"a1.png", "b9040a0dbb22.jpg"}),
        (6, 0.31, {"a1.png"}),
        (1, 0.5, set()),
    ],
)
def test_the_most_similar_images_of_an_mmc4_page_are_kept(
    chatml_processor: FoveateProcessor, most: int, least: float | None, kept: set
) -> None:
    document = made(MMC4, chatml_processor, max_images=most, min_similarity=least)
    assert {str(p.source).removeprefix(BELOW_MEDIA) for p in document.parts if isinstance(p, Image)} == kept
    assert joined(document).replace("<image>", " ").split() == (" ".join(MMC4["text_list"]) + EOS).split()


def test_images_of_unknown_similarity_are_kept_last_and_first_come_first(chatml_processor: FoveateProcessor) -> None:
    infos = [{"image_name": f"{i}.jpg", "matched_text_index": 0} for i in range(4)]
    record = {"text_list": ["words"], "image_info": infos}
    assert brief(made(record, chatml_processor, max_images=2))[:2] == ["Image:0.jpg", "Image:1.jpg"]
    infos[3] = infos[3] | {"matched_sim": 0.01}
    assert brief(made(record, chatml_processor, max_images=2, min_similarity=0.0))[:2] == ["Image:0.jpg", "Image:3.jpg"]


@given(st.data())
@settings(deadline=None)
def test_images_without_a_sentence_get_the_best_assignment(chatml_processor: FoveateProcessor, data: st.DataObject):
    """As MMC4: the sum of similarities is the greatest of all ways in which no sentence has two images."""
    sentences, images = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    similarity = st.lists(st.integers(-50, 50), min_size=sentences, max_size=sentences)
    matrix = data.draw(st.lists(similarity, min_size=images, max_size=images))
    record = {
        "text_list": [f"s{i}" for i in range(sentences)],
        "image_info": [{"image_name": f"{i}.jpg"} for i in range(images)],
        "similarity_matrix": matrix,
    }
    sentence_of, waiting = {}, []
    for part in made(record, chatml_processor).parts:
        if isinstance(part, Image):
            waiting.append(int(re.findall(r"\d+", str(part.source))[0]))
        else:
            sentence_of |= dict.fromkeys(waiting, int(re.findall(r"s(\d+)", part.text)[0]))
            waiting = []
    assert sorted(sentence_of) == list(range(images))
    if images <= sentences:
        assert len(set(sentence_of.values())) == images
        ways = itertools.permutations(range(sentences), images)
        best = max(sum(matrix[i][s] for i, s in enumerate(way)) for way in ways)
        assert sum(matrix[i][s] for i, s in sentence_of.items()) == best
    else:  # some images are left over: theirs is the most similar sentence
        assert set(sentence_of.values()) == set(range(sentences))
        shared = [i for i, s in sentence_of.items() if matrix[i][s] < max(matrix[i])]
        assert len(shared) <= sentences


def test_similarity_comes_from_the_matrix_where_the_image_has_none(chatml_processor: FoveateProcessor) -> None:
    record = {
        "text_list": ["one", "two"],
        "image_info": [{"image_name": "a.jpg"}, {"image_name": "b.jpg", "matched_text_index": 0}],
        "similarity_matrix": [[0.1, 0.9], [0.3, 0.2]],
    }
    assert brief(made(record, chatml_processor)) == ["Image:b.jpg", "[one]", "Image:a.jpg", f"[two{EOS}]"]
    assert brief(made(record, chatml_processor, min_similarity=0.5)) == ["[one]", "Image:a.jpg", f"[two{EOS}]"]


OBELICS = {
    "images": ["0.jpg", None, "1.jpg", None, None, "2.png"],
    "texts": [None, "First.\n\nStill first.", None, "Second.", "Third.", None],
    "metadata": "[]",
    "general_metadata": "{}",
}


def test_an_obelics_image_stands_in_place(chatml_processor: FoveateProcessor) -> None:
    assert brief(made(OBELICS, chatml_processor)) == [
        "Image:0.jpg",
        "[First.\n\nStill first.]",
        "Image:1.jpg",
        "[Second.\n\nThird.]",
        "Image:2.png",
        f"[{EOS}]",
    ]


def test_obelics_images_over_the_limit_go_with_their_place(chatml_processor: FoveateProcessor) -> None:
    assert brief(made(OBELICS, chatml_processor, max_images=1)) == [
        "Image:0.jpg",
        f"[First.\n\nStill first.\n\nSecond.\n\nThird.{EOS}]",
    ]


def test_loss_of_a_page_falls_on_its_text_and_end(chatml_processor: FoveateProcessor) -> None:
    record = {"text_list": ["the cat", "the mat"], "image_info": [{"image_name": "0", "matched_text_index": 1}]}
    document = document_from_record("k", record, lambda name: png(), RecordOptions(), chatml_processor)
    sample = encode(document, chatml_processor)
    tokenizer = chatml_processor.tokenizer
    said = [tokenizer.encode(text, add_special_tokens=False) for text in ("the cat", f"the mat{EOS}")]
    assert sample.labels[sample.labels >= 0].tolist() == (said[0] + said[1])[1:]  # nothing predicts the first token
    assert said[1][-1] == tokenizer.eos_token_id
    assert len(sample.input_ids) == len(said[0]) + len(said[1]) + chatml_processor.tokens_per_image()


# Captions and text


@pytest.mark.parametrize("record", [{"caption": "a cat", "image": "0.jpg"}, {"text": "a cat", "images": ["0.jpg"]}])
def test_a_captions_image_stands_before_it(chatml_processor: FoveateProcessor, record: dict) -> None:
    assert brief(made(record, chatml_processor)) == ["Image:0.jpg", f"[a cat{EOS}]"]


def test_a_caption_may_be_of_a_video_and_its_medium_unnamed(chatml_processor: FoveateProcessor) -> None:
    assert made({"caption": "a cat", "video": "v.mp4"}, chatml_processor, frames=4).parts == (
        Video(f"{BELOW_MEDIA}v.mp4", 4),
        Text(f"a cat{EOS}", loss=True),
    )
    for name, kind in (("jpg", "Image"), ("0.MP4", "Video")):
        assert brief(made({"text": "a cat"}, chatml_processor, (name,))) == [f"{kind}:{name}", f"[a cat{EOS}]"]


def test_text_has_loss_everywhere(chatml_processor: FoveateProcessor) -> None:
    assert made({"text": "a cat", "meta": {"source": "web"}}, chatml_processor).parts == (Text(f"a cat{EOS}", True),)


def test_end_of_text_is_needed(processor: FoveateProcessor, chatml_processor: FoveateProcessor) -> None:
    assert brief(made({"text": "red circle"}, processor)) == ["[red circle<|end|>]"]
    tokenizer = chatml_processor.tokenizer
    end, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        with pytest.raises(ValueError, match="eos_token") as caught:
            made({"text": "a cat"}, chatml_processor)
    finally:
        tokenizer.eos_token = end
    assert not isinstance(caught.value, DocumentError)  # the tokenizer is at fault, not the document


# Conversations

LLAVA = {
    "id": "000000033471",
    "image": "coco/train2017/000000033471.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "On the mat."},
    ],
}


def test_a_llava_conversation(chatml_processor: FoveateProcessor) -> None:
    assert brief(made(LLAVA, chatml_processor)) == [
        "<|im_start|>user\n",
        "Image:coco/train2017/000000033471.jpg",
        "\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
        "[A cat.<|im_end|>\n]",
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n",
        "[On the mat.<|im_end|>\n]",
    ]


def conversation(*values: str, **fields: Any) -> dict:
    """A ShareGPT record of these turns, the user's first."""
    turns = [{"from": ("user", "assistant")[i % 2], "value": value} for i, value in enumerate(values)]
    return fields | {"conversations": turns}


@pytest.mark.parametrize(
    ("record", "question"),
    [
        (conversation("a <image> b <image>", "yes", image=["1", "2"]), ["a ", "Image:1", " b ", "Image:2"]),
        (conversation("What?", "yes", image="1.jpg"), ["Image:1.jpg", "What?"]),
        (conversation("What?", "yes", images=["1.jpg", "2.jpg"]), ["Image:1.jpg", "Image:2.jpg", "What?"]),
        (conversation("<video>\nWhat?", "yes", video="v.mp4"), ["Video:v.mp4", "\nWhat?"]),
        (conversation("<image>\nWhat?", "yes", video="v.mp4"), ["Video:v.mp4", "\nWhat?"]),  # LLaVA-Video-178K
        (conversation("What?", "yes", video="v.mp4", image="i.jpg"), ["Image:i.jpg", "Video:v.mp4", "What?"]),
        (conversation("<video><image>", "yes", video="v.mp4", image="i.jpg"), ["Video:v.mp4", "Image:i.jpg"]),
        (conversation("What?", "yes", image=None), ["What?"]),
    ],
)  # fmt: skip
def test_media_stand_at_their_placeholders_or_before_the_first_question(
    chatml_processor: FoveateProcessor, record: dict, question: list[str]
) -> None:
    first, *middle, last = ["<|im_start|>user\n", *question, "<|im_end|>\n<|im_start|>assistant\n"]
    expected: list[str] = [first]
    for piece in [*middle, last]:
        if piece.startswith(("Image:", "Video:")) or expected[-1].startswith(("Image:", "Video:")):
            expected.append(piece)
        else:
            expected[-1] += piece
    assert brief(made(record, chatml_processor)) == [*expected, "[yes<|im_end|>\n]"]


def test_media_without_a_placeholder_stand_after_the_system_prompt(chatml_processor: FoveateProcessor) -> None:
    record = conversation("What?", "Yes.", image="0.jpg")
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    assert brief(made(record, chatml_processor))[:2] == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "Image:0.jpg",
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (conversation("<image><image>", "yes", image="1.jpg"), "missing_media"),
        (conversation("<image>", "yes"), "missing_media"),
        (conversation("<video>", "yes", image="1.jpg"), "missing_media"),
        (conversation("<image>", "yes", image=["1.jpg", "2.jpg"]), "bad_record"),
        (conversation("<image>", "yes", image="1.jpg", video="v.mp4"), "bad_record"),
    ],
)
def test_placeholders_that_do_not_fit_the_media_are_refused(
    chatml_processor: FoveateProcessor, record: dict, reason: str
) -> None:
    assert refused(record, chatml_processor).reason == reason


URI = "data:image/png;base64," + base64.b64encode(png()).decode()
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is "},
                {"type": "text", "text": "it? "},
                {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
                {"type": "image", "image": "1.jpg"},
                {"type": "video", "video": "v.mp4", "text": None},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
}


def test_an_openai_conversation(chatml_processor: FoveateProcessor) -> None:
    document = made(OPENAI, chatml_processor)
    assert brief(document) == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is it? ",
        f"Image:{URI}",
        "Image:1.jpg",
        "Video:v.mp4",
        "<|im_end|>\n<|im_start|>assistant\n",
        "[A cat.<|im_end|>\n]",
    ]


def test_a_data_uri_and_bytes_are_the_image_that_they_hold(chatml_processor: FoveateProcessor) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "image", "image": {"bytes": png(), "path": None}},
    ]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    sample = encode(made({"messages": turns}, chatml_processor), chatml_processor)
    assert sample.images.shape == (2, 28, 28, 3)
    assert (sample.images == (200, 30, 40)).all()


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "image", "image": None, "text": None}])
def test_bare_parts_take_the_records_media(chatml_processor: FoveateProcessor, part: dict) -> None:
    turns = [
        {"role": "user", "content": [part, {"type": "text", "text": " and "}, part]},
        {"role": "assistant", "content": "cats"},
    ]
    document = made(
        {"messages": turns, "images": [{"bytes": b"1"}, {"bytes": None, "path": "2.jpg"}]}, chatml_processor
    )
    assert [part.source for part in document.parts if isinstance(part, Image)] == [b"1", f"{BELOW_MEDIA}2.jpg"]


@pytest.mark.parametrize(
    "url", ["http://example.org/a.jpg", "https://example.org/a.jpg", "s3://bucket/a.jpg", "file:///etc/passwd"]
)
def test_nothing_is_downloaded(chatml_processor: FoveateProcessor, url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    for record in ({"messages": turns}, {"caption": "red", "image": url}, OBELICS | {"images": [None] * 5 + [url]}):
        error = refused(record, chatml_processor)
        assert (error.reason, url in error.message, "downloaded" in error.message) == ("missing_media", True, True)


QUESTION_AND_ANSWER = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "What is it?", "input": "", "output": "A cat."},  # Alpaca
        {"instruction": "What is it?", "context": None, "response": "A cat.", "category": "qa"},  # Dolly
        {"prompt": "What is it?", "response": "A cat."},
        {"prompt": "What is it?", "completion": "A cat."},
        {"inputs": "What is it?", "targets": "A cat.", "task": "cot"},  # FLAN
        {"question": "What is it?", "answer": "A cat."},
        {"texts": [{"user": "What is it?", "assistant": "A cat.", "source": "vqav2"}], "images": []},  # The Cauldron
        {"messages": QUESTION_AND_ANSWER},
        conversation("What is it?", "A cat."),
    ],
)
def test_instructions_are_rendered_by_the_chat_template(chatml_processor: FoveateProcessor, record: dict) -> None:
    document = made(record, chatml_processor)
    assert joined(document) == chatml_processor.apply_chat_template(QUESTION_AND_ANSWER)
    assert [part.text for part in document.parts if isinstance(part, Text) and part.loss] == ["A cat.<|im_end|>\n"]


def test_alpacas_input_stands_below_its_instruction(chatml_processor: FoveateProcessor) -> None:
    record = {"instruction": "Translate.", "input": "chat", "output": "cat"}
    assert "<|im_start|>user\nTranslate.\n\nchat<|im_end|>" in joined(made(record, chatml_processor))


def test_the_cauldrons_images_stand_before_its_first_question(chatml_processor: FoveateProcessor) -> None:
    turns = [{"user": f"Q{i}", "assistant": f"A{i}"} for i in range(2)]
    document = made({"images": [{"bytes": b"x", "path": None}], "texts": turns}, chatml_processor)
    assert brief(document)[1:3] == ["Image:b'x'", "Q0<|im_end|>\n<|im_start|>assistant\n"]
    assert [text for text in brief(document) if text[0] == "["] == ["[A0<|im_end|>\n]", "[A1<|im_end|>\n]"]


def test_a_clip_of_a_chat_is_read(processor: FoveateProcessor) -> None:
    frames = np.zeros((6, 32, 32, 3), np.uint8)
    record = conversation("<video> what digit appears ?", "7", video="clip")
    document = document_from_record("k", record, lambda name: encode_mp4(frames, 1), RecordOptions(frames=3), processor)
    sample = encode(document, processor)
    assert sample.frames.shape == (3, 32, 32, 3)
    assert processor.tokenizer.decode(sample.labels[sample.labels >= 0]) == "7 <|end|>"


def test_a_template_may_refuse_a_conversation(chatml_processor: FoveateProcessor) -> None:
    """Many alternate strictly; what they raise is not a ValueError."""
    strict = FoveateProcessor(
        chatml_processor.tokenizer,
        image_size=(28, 28),
        chat_template="{{ raise_exception('roles must alternate') }}",
    )
    error = refused(conversation("a", "b"), strict)
    assert error.reason == "bad_record"
    assert "roles must alternate" in error.message


# Bad records


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({}, "the record has the fields ''"),
        ({"url": "x", "text": None}, "the record has the fields 'url, text'"),
        (MMC4 | {"text_list": "a text"}, "text_list is 'a text'"),
        (MMC4 | {"text_list": ["a", None, "b", "c"]}, r"text_list\[1\] is None"),
        (MMC4 | {"text_list": ["", " ", "", "\n"]}, "text_list is"),
        (MMC4 | {"text_list": []}, "similarity_matrix is|matched_text_index is"),
        (MMC4 | {"image_info": {"image_name": "a"}}, "image_info is"),
        (MMC4 | {"image_info": ["a.jpg"], "similarity_matrix": None}, r"image_info\[0\] is 'a.jpg'"),
        (MMC4 | {"similarity_matrix": [[0.1] * 4] * 2}, "similarity_matrix is"),
        (MMC4 | {"similarity_matrix": [[0.1] * 3] * 3}, "similarity_matrix is"),
        (MMC4 | {"similarity_matrix": [[0.1] * 4, [0.1] * 3, [0.1] * 4]}, "similarity_matrix is"),
        (MMC4 | {"similarity_matrix": [[float("nan")] * 4] * 3}, "similarity_matrix is"),
        (MMC4 | {"similarity_matrix": [["a"] * 4] * 3}, "similarity_matrix is"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a.jpg"}]}, r"image_info\[0\].matched_text_index is None"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a", "matched_text_index": 1}]}, "matched_text_index is 1"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a", "matched_text_index": -1}]}, "index is -1"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a", "matched_text_index": True}]}, "index is True"),
        ({"text_list": ["a"], "image_info": [{"image_name": "", "matched_text_index": 0}]}, "image_name is ''"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, r"image_info\[0\].image_name is None"),
        (
            {"text_list": ["a"], "image_info": [{"image_name": "a", "matched_text_index": 0, "matched_sim": "0.3"}]},
            r"image_info\[0\].matched_sim is '0.3'",
        ),
        (OBELICS | {"texts": [None] * 6}, "texts is"),
        (OBELICS | {"texts": ["a"]}, "images is .* 1"),
        (OBELICS | {"texts": [1] * 6}, r"texts\[0\] is 1"),
        (OBELICS | {"images": [3] * 6}, r"images\[0\] is 3"),
        (OBELICS | {"images": "0.jpg"}, "images is '0.jpg'"),
        ({"caption": "", "image": "0.jpg"}, "caption is ''"),
        ({"caption": ["a", "b"], "image": "0.jpg"}, r"caption is \['a', 'b'\]"),
        ({"caption": "a", "image": ""}, "image is ''"),
        ({"caption": "a", "image": {"height": 3}}, "image is {'height': 3}"),
        ({"caption": "a", "images": ["0.jpg", "1.jpg"]}, "media is"),
        ({"text": " \n"}, r"text is ' \\n'"),
        ({"text": 5}, "text is 5"),
        ({"text": "half \ud83d pair"}, "text is"),
        (conversation(), r"conversations is \[\]"),
        ({"conversations": "What?"}, "conversations is 'What\\?'"),
        ({"conversations": ["What?"]}, r"conversations\[0\] is 'What\?'"),
        ({"conversations": [{"from": "bard", "value": "x"}]}, r"conversations\[0\].from is 'bard'; accepted: .*gpt"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"messages\[0\].role is \['user'\]"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\].role is None"),
        (conversation("What?", ""), r"conversations\[1\].value is ''"),
        (conversation("What?", None), r"conversations\[1\].content is None"),
        (conversation("What?"), r"roles is \['user'\]"),
        ({"conversations": [{"from": "gpt", "value": "hi"}], "image": "0.jpg"}, r"roles is \['assistant'\]"),
        ({"messages": [{"role": "user", "content": []}]}, r"messages\[0\].content is \[\]"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"messages\[0\].content\[0\].type is 'x'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, r"content\[0\].type is 'audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"content\[0\].text is None"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": 7}]}]}, r"content\[0\].image is 7"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("<ima", "ge>")]}]},
            r"messages\[0\].content is '<image>'",
        ),
        (OPENAI | {"images": ["2.jpg"]}, "messages is"),
        ({"instruction": "", "output": "x"}, "instruction is ''"),
        ({"instruction": "x", "output": 3}, "output is 3"),
        ({"texts": [{"user": "x"}]}, r"texts\[0\].assistant is None"),
        ({"texts": [{"user": "x", "assistant": "y"}, None]}, r"texts\[1\] is None"),
    ],
)  # fmt: skip
def test_a_bad_record_names_the_field_and_what_it_holds(
    chatml_processor: FoveateProcessor, record: dict, field: str
) -> None:
    error = refused(record, chatml_processor)
    assert error.reason == "bad_record"
    assert re.match(field, error.message) or re.search(field, error.message.split(";")[0]), error.message


def test_a_captions_missing_image_is_missing_media(chatml_processor: FoveateProcessor) -> None:
    assert refused({"caption": "a cat", "url": "http://example.org"}, chatml_processor).reason == "missing_media"


def test_long_values_are_shortened(chatml_processor: FoveateProcessor) -> None:
    assert len(refused({"caption": ["x" * 10**5] * 100, "image": "i"}, chatml_processor).message) < 300
    assert len(refused({"x" * 10**5: 1}, chatml_processor).message) < 700


def test_placeholders_in_a_pages_text_are_refused_at_the_latest_when_it_is_encoded(
    chatml_processor: FoveateProcessor,
) -> None:
    with pytest.raises(DocumentError, match="placeholder") as caught:
        encode(made({"text": "an <image> here"}, chatml_processor), chatml_processor)
    assert caught.value.reason == "bad_record"


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("auto", ["<|im_start|>user\n", "Image:0.jpg", "Q<|im_end|>\n<|im_start|>assistant\n", "[A<|im_end|>\n]"]),
        ("chat", ["<|im_start|>user\n", "Image:0.jpg", "Q<|im_end|>\n<|im_start|>assistant\n", "[A<|im_end|>\n]"]),
        ("caption", ["Image:0.jpg", f"[a cat{EOS}]"]),
        ("text", [f"[words{EOS}]"]),
    ],
)
def test_a_layout_can_be_chosen(chatml_processor: FoveateProcessor, format: str, expected: list[str]) -> None:
    record = conversation("Q", "A", caption="a cat", text="words", image="0.jpg")
    assert brief(made(record, chatml_processor, format=format)) == expected


@pytest.mark.parametrize("format", LAYOUTS)
def test_a_record_of_another_layout_is_refused(chatml_processor: FoveateProcessor, format: str) -> None:
    others = {"interleaved": {"text": "x"}, "chat": {"text": "x"}, "caption": {"text": "x"}, "text": {"caption": "x"}}
    assert refused(others[format], chatml_processor, format=format).reason == "bad_record"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "bad_json"),
        (b"{", "bad_json"),
        (b'{"text": "caf\xe9"}', "bad_json"),
        ('{"text": "x"}'.encode("utf-16"), "bad_json"),
        (b"[" * 10**5, "bad_json"),
        (b'{"text": ' + b"1" * 10**4 + b"}", "bad_json"),
        (b'{"text": "x"} {}', "bad_json"),
        (b"[1]", "bad_record"),
        (b"null", "bad_record"),
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(DocumentError, match=r"^key: the record.*accepted: a JSON object") as caught:
        parse_record("key", data)
    assert caught.value.reason == reason
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("options", "field"),
    [({"format": "yaml"}, "format"), ({"max_images": -1}, "max_images"), ({"frames": 0}, "frames")],
)  # fmt: skip
def test_options_out_of_range_are_named(options: dict, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} is .*accepted"):
        RecordOptions(**options)


NAMES = (
    "text_list", "image_info", "image_name", "matched_text_index", "matched_sim", "similarity_matrix", "texts",
    "images", "image", "video", "videos", "caption", "text", "conversations", "messages", "from", "role", "value",
    "content", "type", "image_url", "url", "bytes", "path", "instruction", "input", "output", "user", "assistant",
)  # fmt: skip
words = st.sampled_from(
    ["", "a", "<image>", "<video> x", "human", "gpt", "user", "assistant", "system", "text", "image", "image_url",
     "video", "http://x", "data:,", "\ud800", "<ima", "ge>"]
)  # fmt: skip
scalars = st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.floats(), words)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5)
)
content_parts = st.fixed_dictionaries({"type": words}, optional={"text": words, "image": values})
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"])},
    optional={"content": st.one_of(words, st.lists(content_parts, max_size=3))},
)
records = st.one_of(
    st.dictionaries(st.sampled_from(NAMES), values, max_size=6),
    st.fixed_dictionaries({"messages": st.lists(turns, max_size=3)}, optional={"images": values, "video": values}),
)


@given(records, st.sampled_from([(), ("jpg",), ("mp4",), ("0.jpg", "1.jpg")]))
@settings(deadline=None)
def test_any_record_is_a_document_or_refused(
    chatml_processor: FoveateProcessor, record: dict, unnamed: tuple[str, ...]
) -> None:
    try:
        document = made(record, chatml_processor, unnamed)
    except DocumentError as error:
        assert error.reason in ("bad_record", "missing_media")
        error.message.encode()  # can be written to a log
    else:
        assert any(isinstance(part, Text) for part in document.parts)
        json.dumps(brief(document)).encode()
