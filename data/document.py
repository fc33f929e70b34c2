"""The one type that all data become: an ordered list of text, images and video."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeAlias

import numpy as np
from PIL import Image as PILImage
from transformers.utils.chat_template_utils import render_jinja_template

from ..vlm.media import Video as DecodedVideo
from ..vlm.processor import FoveateProcessor

ImageSource: TypeAlias = str | PathLike | bytes | PILImage.Image | np.ndarray
VideoSource: TypeAlias = str | PathLike | bytes | np.ndarray | Sequence[PILImage.Image | np.ndarray] | DecodedVideo


# Why a document can't be used.
REASONS = (
    "truncated_shard",  # the tar ends inside the document
    "bad_json",
    "bad_record",  # JSON, but no document of an accepted layout
    "missing_media",  # the record names an image or video that is not there
    "unreadable_media",
    "too_large",  # a medium is over a limit of MediaLimits
    "unsafe_name",  # a path that leads out of its folder
    "pickled_member",  # a member that only unpickling could read
    "too_long",  # more tokens or tiles than a row accepts
    "empty",
)


class DocumentError(ValueError):
    """A document can't be used; it is counted by its reason, never replaced by another.

    Args:
        key: the document's key; the message begins with it.
        reason: one of `REASONS`.
        message: what is wrong and what would be accepted.
    """

    def __init__(self, key: str, reason: str, message: str):
        assert reason in REASONS, reason
        super().__init__(f"{key}: {message}")
        self.key, self.reason, self.message = key, reason, message

    def __reduce__(self) -> tuple:  # so that it comes back whole from a worker process
        return type(self), (self.key, self.reason, self.message)


@dataclass(frozen=True)
class Text:
    """A run of text; `loss` says whether its tokens are predicted."""

    text: str
    loss: bool = False


@dataclass(frozen=True)
class Image:
    """An image: path, bytes, PIL or uint8 [height, width, 3]."""

    source: ImageSource


@dataclass(frozen=True)
class Video:
    """A video: path, bytes, or frames (uint8 [frames, height, width, 3]); files are sampled to `num_frames`."""

    source: VideoSource
    num_frames: int | None = None


Part: TypeAlias = Text | Image | Video


@dataclass(frozen=True)
class Document:
    """Parts in reading order, and the key that errors and logs name it by."""

    key: str
    parts: tuple[Part, ...]


def chat_document(
    key: str, messages: list[dict[str, Any]], media: Iterable[Image | Video], processor: FoveateProcessor
) -> Document:
    """A conversation as a document, rendered by the processor's chat template.

    Args:
        key: the document's key.
        messages: `role` and `content` as transformers' chat templates take them; image and video parts may be bare
            (`{"type": "image"}`).
        media: the images and videos in the order of their parts.
        processor: its template marks the assistant's words by `{% generation %}`; loss falls on them alone.

    Raises:
        ValueError: the template marks no assistant's words, or placeholders and media differ in number or kind.
    """
    rendered: Any  # annotated as a string, but it is ([text], [[(start, end) of the assistant's words]])
    rendered = render_jinja_template(
        conversations=[messages],
        chat_template=str(processor.chat_template),
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    (text,), (answers,) = rendered
    if not answers and any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{key}: the chat template marks no assistant text; accepted: one with {{% generation %}}")
    parts: list[Part] = []
    queue = list(media)
    position = 0
    for start, end in answers:
        parts += _split(key, text[position:start], False, queue, processor)
        parts += _split(key, text[start:end], True, queue, processor)
        position = end
    parts += _split(key, text[position:], False, queue, processor)
    if queue:
        raise ValueError(f"{key}: {len(queue)} media more than placeholders in the messages; both must be equal")
    return Document(key, tuple(parts))


def _split(key: str, text: str, loss: bool, queue: list[Image | Video], processor: FoveateProcessor) -> list[Part]:
    """Cuts a run of text at media placeholders, whose media are taken from the queue."""
    parts: list[Part] = []
    while text:
        found = [(at, t) for t in (processor.image_token, processor.video_token) if (at := text.find(t)) >= 0]
        if not found:
            return [*parts, Text(text, loss)]
        at, token = min(found)
        if at:
            parts.append(Text(text[:at], loss))
        if not queue:
            raise ValueError(f"{key}: the messages hold more placeholders than media; both numbers must be equal")
        medium = queue.pop(0)
        if isinstance(medium, Image) != (token == processor.image_token):
            raise ValueError(f"{key}: a medium is of type {type(medium).__name__}, but its placeholder is {token}")
        parts.append(medium)
        text = text[at + len(token) :]
    return parts
