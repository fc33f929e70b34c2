import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.data.document import Document, Image, Text, Video, chat_document
from foveate.vlm.processor import FoveateProcessor

CAT, DOG = Image("cat.png"), Image("dog.png")
CLIP = Video("clip.mp4")
CONVERSATION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": [{"type": "text", "text": "And here: "}, {"type": "video"}, {"type": "image"}]},
    {"role": "assistant", "content": "Two dogs."},
]


def joined(document: Document) -> str:
    return "".join(
        part.text if isinstance(part, Text) else "<image>" if isinstance(part, Image) else "<video>"
        for part in document.parts
    )


def test_conversation_is_cut_at_media_and_at_the_assistants_words(chatml_processor: FoveateProcessor) -> None:
    document = chat_document("key", CONVERSATION, [CAT, CLIP, DOG], chatml_processor)
    assert document.parts == (
        Text("<|im_start|>user\n"),
        CAT,
        Text("What is it?<|im_end|>\n<|im_start|>assistant\n"),
        Text("A cat.<|im_end|>\n", loss=True),
        Text("<|im_start|>user\nAnd here: "),
        CLIP,
        DOG,
        Text("<|im_end|>\n<|im_start|>assistant\n"),
        Text("Two dogs.<|im_end|>\n", loss=True),
    )


def test_template_of_the_embedded_data_marks_answer_and_end_of_turn(processor: FoveateProcessor) -> None:
    document = chat_document("key", CONVERSATION[:2], [CAT], processor)
    assert document.parts == (
        Text("<|user|>"),
        CAT,
        Text("What is it?<|assistant|>"),
        Text("A cat.<|end|>", loss=True),
    )


words = st.text("abc é☃\n'<>{}", max_size=12)
contents = st.lists(st.one_of(st.sampled_from(["image", "video"]), words), max_size=4)


@given(st.lists(st.tuples(contents, contents), min_size=1, max_size=4), st.booleans())
def test_joined_text_is_the_rendered_template(
    chatml_processor: FoveateProcessor, turns: list[tuple[list[str], list[str]]], open_end: bool
) -> None:
    def parts(content: list[str]) -> list[dict]:
        return [{"type": c} if c in ("image", "video") else {"type": "text", "text": c} for c in content]

    messages = [
        {"role": role, "content": parts(content)}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    if open_end:
        messages.append({"role": "user", "content": "And now?"})
    media = [
        Image(f"{i}.png") if part["type"] == "image" else Video(f"{i}.mp4")
        for i, part in enumerate(p for m in messages if m["content"] != "And now?" for p in m["content"])
        if part["type"] != "text"
    ]
    before = copy.deepcopy(messages), list(media)
    document = chat_document("key", messages, media, chatml_processor)

    assert joined(document) == chatml_processor.apply_chat_template(messages)
    assert [part for part in document.parts if not isinstance(part, Text)] == media
    said = "".join(part.text for part in document.parts if isinstance(part, Text) and part.loss)
    answers = ["".join(c for c in answer if c not in ("image", "video")) for _, answer in turns]
    assert said == "".join(answer + "<|im_end|>\n" for answer in answers)
    assert (messages, media) == before
    assert chat_document("key", messages, media, chatml_processor) == document


def test_a_conversation_without_an_answer_has_no_loss(chatml_processor: FoveateProcessor) -> None:
    document = chat_document("key", CONVERSATION[:1], [CAT], chatml_processor)
    assert not any(part.loss for part in document.parts if isinstance(part, Text))


@pytest.mark.parametrize("media", [[], [CAT], [CAT, CLIP], [CAT, CLIP, DOG, CAT]])
def test_media_and_placeholders_must_be_equally_many(chatml_processor: FoveateProcessor, media: list) -> None:
    with pytest.raises(ValueError, match=r"^a/key: .*must be equal"):
        chat_document("a/key", CONVERSATION, media, chatml_processor)


@pytest.mark.parametrize("media", [[CLIP, CLIP, DOG], [CAT, DOG, CAT]])
def test_an_image_is_no_video(chatml_processor: FoveateProcessor, media: list) -> None:
    with pytest.raises(ValueError, match=r"^a/key: a medium is of type (Video|Image), but its placeholder is <"):
        chat_document("a/key", CONVERSATION, media, chatml_processor)


def test_a_template_that_marks_no_answer_is_refused(chatml_processor: FoveateProcessor) -> None:
    unmarked = copy.copy(chatml_processor)
    unmarked.chat_template = chatml_processor.chat_template.replace("{%- generation -%}", "").replace(
        "{%- endgeneration -%}", ""
    )
    with pytest.raises(ValueError, match=r"a/key: .*generation"):
        chat_document("a/key", CONVERSATION, [CAT, CLIP, DOG], unmarked)


def test_media_can_be_pixels(processor: FoveateProcessor) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    document = chat_document("key", CONVERSATION[:2], iter([Image(pixels)]), processor)
    assert document.parts[1].source is pixels
