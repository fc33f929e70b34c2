"""One JSON record and its media as a document: the public layouts of interleaved pages, captions, chats and text."""

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn, TypeAlias

import numpy as np
from jinja2 import TemplateError

from ..vlm.processor import IMAGE_TOKEN, VIDEO_TOKEN, FoveateProcessor
from .document import Document, DocumentError, Image, Part, Text, Video, chat_document

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
VIDEO_EXTENSIONS = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "flv", "mpg", "mpeg", "ts", "ogv", "wmv")
MEDIA_EXTENSIONS = frozenset(IMAGE_EXTENSIONS + VIDEO_EXTENSIONS)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# One question and its answer in fields of their own: Alpaca, prompt and completion, FLAN, Dolly, VQA.
QUESTION_FIELDS = ("instruction", "prompt", "inputs", "question")
CONTEXT_FIELDS = ("input", "context")
ANSWER_FIELDS = ("output", "response", "completion", "targets", "answer")
CAPTION_FIELDS = ("caption", "text")
LAYOUT_FIELDS = {
    "interleaved": "text_list and image_info, or texts and images",
    "chat": "conversations, messages, or a question and its answer",
    "caption": "caption or text, and an image or a video",
    "text": "text",
}
FORMATS = ("auto", *LAYOUT_FIELDS)
SENTENCE_JOINT = " "  # MMC4's sentences, as VILA joins them
PARAGRAPH_JOINT = "\n\n"  # OBELICS' paragraphs

_shown = reprlib.Repr()  # of values in errors
_shown.maxstring = _shown.maxother = 100

MediaReader: TypeAlias = Callable[[str], bytes | str]


@dataclass(frozen=True)
class RecordOptions:
    """How records become documents.

    Args:
        format: one of `FORMATS`; "auto" tells it by each record's fields.
        max_images: most images of an interleaved page. Of MMC4's the most similar are kept, of others the first.
        min_similarity: images of MMC4's pages below it are left out; None keeps all.
        frames: frames taken of each video; the processor's number when None.
    """

    format: str = "auto"
    max_images: int = 6
    min_similarity: float | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}; accepted: {', '.join(FORMATS)}")
        if self.max_images < 0:
            raise ValueError(f"max_images is {self.max_images}; accepted: 0 or more")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames is {self.frames}; accepted: 1 or more, or None for the processor's number")


def parse_record(key: str, data: bytes, name: str = "the record") -> dict[str, Any]:
    """A JSON object from bytes.

    Raises:
        DocumentError: bad_json, or bad_record where it is something else than an object.
    """
    try:
        record = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise DocumentError(key, "bad_json", f"{name}: {error}; accepted: a JSON object in UTF-8") from error
    if not isinstance(record, dict):
        raise DocumentError(key, "bad_record", f"{name} is {_shown.repr(record)}; accepted: a JSON object")
    return record


def has_text(record: dict[str, Any]) -> bool:
    """Whether a record has a field that one of the layouts takes its text from."""
    fields = ("text_list", "texts", "conversations", "messages", *QUESTION_FIELDS, *CAPTION_FIELDS)
    return any(record.get(field) is not None for field in fields)


def document_from_record(
    key: str,
    record: dict[str, Any],
    media: MediaReader,
    options: RecordOptions,
    processor: FoveateProcessor,
    unnamed: Sequence[str] = (),
) -> Document:
    """A record as a document; its media are decoded later, when the document is encoded.

    Layouts, with the fields that tell them; a field that is null counts as absent:

    - interleaved: `text_list` and `image_info` (MMC4): each image before its matched sentence. `texts` and `images`, in
      parallel (OBELICS): in place. Loss on all text, end of text included.
    - chat: `conversations` (LLaVA, ShareGPT), `messages` (OpenAI), `texts` of user and assistant (The Cauldron), or a
      question and its answer in fields of their own (Alpaca and others). Loss on the assistant's words.
    - caption: `caption` or `text`, and one image or video, which stands before it. Loss on all text.
    - text: `text`. Loss on all.

    Media stand in `image`, `images`, `video`, `videos`, `image_info`, or in a message's parts: a name, which `media`
    resolves, a base64 data: URI, bytes, or a dictionary with bytes or path, as Hugging Face datasets keep them.

    Args:
        key: the document's key.
        record: as parsed from JSON, or a row of a table.
        media: name → bytes, or a path proven to lie inside the media's folder; raises DocumentError.
        options: see `RecordOptions`.
        processor: its chat template renders conversations, its tokenizer's end of text ends other documents.
        unnamed: names of media that come with the record; where it names none, a single one of these is its medium.

    Raises:
        DocumentError: bad_record names the field, what it holds and what is accepted; missing_media, unsafe_name.
        ValueError: the tokenizer has no end of text, or the chat template marks no assistant's words.
    """
    reader = _Record(key, record, media, options, processor, unnamed)
    for name, (fits, build) in LAYOUTS.items():
        if options.format in ("auto", name) and fits(reader):
            return Document(key, tuple(build(reader)))
    accepted = "; ".join(fields for name, fields in LAYOUT_FIELDS.items() if options.format in ("auto", name))
    found = ", ".join(map(str, record))[:300]
    raise DocumentError(key, "bad_record", f"the record has the fields {found!a}; accepted: {accepted}")


class _Record:
    """A record's fields, checked as they are taken."""

    def __init__(
        self,
        key: str,
        fields: dict[str, Any],
        media: MediaReader,
        options: RecordOptions,
        processor: FoveateProcessor,
        unnamed: Sequence[str],
    ):
        self.key, self.fields, self.media = key, fields, media
        self.options, self.processor, self.unnamed = options, processor, unnamed

    def fail(self, field: str, value: Any, accepted: str) -> NoReturn:
        raise DocumentError(self.key, "bad_record", f"{field} is {_shown.repr(value)[:200]}; accepted: {accepted}")

    def has(self, *names: str) -> str | None:
        """The first of these fields that is there."""
        return next((name for name in names if self.fields.get(name) is not None), None)

    def items(self, name: str) -> list[Any]:
        value = self.fields.get(name)
        if not isinstance(value, list):
            self.fail(name, value, "a list")
        return value

    def string(self, field: str, value: Any) -> str:
        """A text, which may be empty but not hold half a surrogate pair: no tokenizer takes that."""
        if not isinstance(value, str) or (not value.isascii() and re.search("[\ud800-\udfff]", value)):
            self.fail(field, value, "a text")
        return value

    def filled(self, field: str, value: Any) -> str:
        """A text with more than white space."""
        if not self.string(field, value).strip():
            self.fail(field, value, "a text that is not empty")
        return value

    def image(self, field: str, value: Any) -> Image:
        return Image(self.source(field, value))

    def video(self, field: str, value: Any) -> Video:
        return Video(self.source(field, value), self.options.frames)

    def source(self, field: str, value: Any) -> bytes | str:
        """Bytes, a data: URI or a path that was proven safe."""
        if isinstance(value, dict):  # as Hugging Face datasets and OpenAI's messages write it
            value = next((value[name] for name in ("bytes", "path", "url") if value.get(name) is not None), value)
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            self.fail(field, value, "a name, a data: URI, bytes, or a dictionary with bytes, path or url")
        if value.startswith("data:"):
            return value
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", value):
            what = f"{field} is {_shown.repr(value)}; accepted: what is stored with the record, nothing is downloaded"
            raise DocumentError(self.key, "missing_media", what)
        return self.media(value)

    def own_media(self) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
        """(field, value) of the record's images, and of its videos."""
        images, videos = self._values("image", "images"), self._values("video", "videos")
        if images or videos or not self.unnamed:
            return images, videos
        if len(self.unnamed) > 1:
            self.fail("media", list(self.unnamed), "one image or video, or their names in the record")
        name = self.unnamed[0]
        value = [("media", name)]
        return ([], value) if name.rpartition(".")[2].lower() in VIDEO_EXTENSIONS else (value, [])

    def _values(self, one: str, several: str) -> list[tuple[str, Any]]:
        name = self.has(one, several)
        if name is None:
            return []
        value = self.fields[name]
        return [(f"{name}[{i}]", v) for i, v in enumerate(value)] if isinstance(value, list) else [(name, value)]

    def end_of_text(self) -> str:
        token = self.processor.tokenizer.eos_token
        if not isinstance(token, str):
            raise ValueError("the tokenizer has no eos_token; accepted: one that has, for documents to end with")
        return token


# Interleaved pages


def _is_interleaved(record: _Record) -> bool:
    return bool(record.has("text_list") or (record.has("texts") and record.has("images") and not _is_cauldron(record)))


def _interleaved(record: _Record) -> list[Part]:
    return _mmc4(record) if record.has("text_list") else _obelics(record)


def _mmc4(record: _Record) -> list[Part]:
    """Each image directly before its matched sentence, as in VILA's pretraining."""
    sentences = [record.string(f"text_list[{i}]", text) for i, text in enumerate(record.items("text_list"))]
    infos = record.items("image_info") if record.has("image_info") else []
    matches = []  # (similarity or None, sentence, number of the image)
    similarities = _similarities(record, len(infos), len(sentences))
    assigned = None
    for i, info in enumerate(infos):
        field = f"image_info[{i}]"
        if not isinstance(info, dict):
            record.fail(field, info, "an object")
        sentence = info.get("matched_text_index")
        if sentence is None:
            if similarities is None:
                record.fail(f"{field}.matched_text_index", None, "a number of text_list, or a similarity_matrix")
            assigned = _assign(similarities) if assigned is None else assigned
            sentence = int(assigned[i])
        elif type(sentence) is not int or not 0 <= sentence < len(sentences):
            record.fail(f"{field}.matched_text_index", sentence, f"a number of text_list, 0 to {len(sentences) - 1}")
        similarity = info.get("matched_sim")
        if similarity is None:
            similarity = None if similarities is None else float(similarities[i, sentence])
        elif type(similarity) not in (int, float) or not math.isfinite(similarity):
            record.fail(f"{field}.matched_sim", similarity, "a finite number")
        least = record.options.min_similarity
        if least is None or similarity is None or similarity >= least:
            matches.append((similarity, sentence, i))
    matches.sort(key=lambda match: (match[0] is None, -(match[0] or 0.0)))  # stable: the first of equals
    kept = sorted(matches[: record.options.max_images], key=lambda match: match[2])
    before: dict[int, list[Image]] = {}
    for _, sentence, i in kept:
        image = record.image(f"image_info[{i}].image_name", infos[i].get("image_name"))
        before.setdefault(sentence, []).append(image)
    parts: list[Part | str] = []
    for i, text in enumerate(sentences):
        parts += [*before.get(i, []), text]
    return _page(record, "text_list", parts, SENTENCE_JOINT)


def _similarities(record: _Record, images: int, sentences: int) -> np.ndarray | None:
    """MMC4's similarity matrix, float64 [images, sentences]."""
    if not images or not record.has("similarity_matrix"):
        return None
    accepted = f"{images} lists of {sentences} finite numbers"
    rows = record.items("similarity_matrix")
    try:
        matrix = np.array(rows, np.float64)
    except (TypeError, ValueError, OverflowError):
        record.fail("similarity_matrix", rows, accepted)
    if matrix.shape != (images, sentences) or not np.isfinite(matrix).all() or not sentences:
        record.fail("similarity_matrix", rows, accepted)
    return matrix


def _assign(similarities: np.ndarray) -> np.ndarray:
    """The sentence of each image, int64 [images]: MMC4's assignment, which gives a sentence to one image at most and
    maximises the sum of similarities (Zhu et al. 2023, section 3); images left over go to the sentence most similar."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and few records need it

    best = similarities.argmax(axis=1)
    images, sentences = linear_sum_assignment(similarities, maximize=True)
    best[images] = sentences
    return best


def _obelics(record: _Record) -> list[Part]:
    """Images in place; those over the limit are left out with their place."""
    texts, images = record.items("texts"), record.items("images")
    if len(texts) != len(images):
        record.fail("images", images, f"as many entries as texts has, {len(texts)}")
    parts: list[Part | str] = []
    kept = 0
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        if image is not None and kept < record.options.max_images:
            parts.append(record.image(f"images[{i}]", image))
            kept += 1
        if text is not None:
            parts.append(record.string(f"texts[{i}]", text))
    return _page(record, "texts", parts, PARAGRAPH_JOINT)


def _page(record: _Record, field: str, pieces: Sequence[Part | str], joint: str) -> list[Part]:
    """Texts and images in order, with loss on all text; texts without an image between them are joined."""
    parts: list[Part] = []
    for piece in [piece for piece in pieces if not isinstance(piece, str) or piece.strip()]:
        if not isinstance(piece, str):
            parts.append(piece)
        elif parts and isinstance(parts[-1], Text):
            parts[-1] = Text(parts[-1].text + joint + piece, loss=True)
        else:
            parts.append(Text(piece, loss=True))
    if not any(isinstance(part, Text) for part in parts):
        record.fail(field, record.fields[field], "at least one text that is not empty")
    if isinstance(parts[-1], Text):
        parts[-1] = Text(parts[-1].text + record.end_of_text(), loss=True)
    else:
        parts.append(Text(record.end_of_text(), loss=True))
    return parts


# Captions and text


def _is_caption(record: _Record) -> bool:
    if record.has("caption"):
        return True
    return bool(record.has("text") and (record.has("image", "images", "video", "videos") or record.unnamed))


def _caption(record: _Record) -> list[Part]:
    field = record.has(*CAPTION_FIELDS)
    assert field
    text = record.filled(field, record.fields[field])
    images, videos = record.own_media()
    if not images and not videos:
        raise DocumentError(record.key, "missing_media", f"{field} without a medium; accepted: one image or video")
    if len(images) + len(videos) > 1:
        record.fail("media", [value for _, value in images + videos], "one image or video to a caption")
    medium = record.image(*images[0]) if images else record.video(*videos[0])
    return [medium, Text(text + record.end_of_text(), loss=True)]


def _is_text(record: _Record) -> bool:
    return record.has("text") is not None


def _text(record: _Record) -> list[Part]:
    return [Text(record.filled("text", record.fields["text"]) + record.end_of_text(), loss=True)]


# Conversations


class _Awaited(Enum):
    """A place in a turn for the next of the record's images or videos."""

    IMAGE = IMAGE_TOKEN
    VIDEO = VIDEO_TOKEN


_Slot: TypeAlias = str | Image | Video | _Awaited  # what a turn is made of


def _is_cauldron(record: _Record) -> bool:
    texts = record.fields.get("texts")
    return isinstance(texts, list) and any(isinstance(text, dict) for text in texts)


def _is_chat(record: _Record) -> bool:
    if record.has("conversations", "messages") or _is_cauldron(record):
        return True
    return bool(record.has(*QUESTION_FIELDS) and record.has(*ANSWER_FIELDS))


def _chat(record: _Record) -> list[Part]:
    turns = list(_turns(record))
    roles = [role for role, _ in turns]
    if "assistant" not in roles:
        record.fail("roles", roles, "at least one turn of the assistant")
    _place_media(record, turns)
    messages: list[dict[str, Any]] = []
    media: list[Image | Video] = []
    for role, slots in turns:
        content: list[dict[str, str]] = []
        for slot in slots:
            if isinstance(slot, str):
                content.append({"type": "text", "text": slot})
            elif isinstance(slot, Image | Video):
                content.append({"type": "image" if isinstance(slot, Image) else "video"})
                media.append(slot)
        messages.append({"role": role, "content": slots[0] if isinstance(slots[0], str) and not slots[1:] else content})
    try:
        return list(chat_document(record.key, messages, media, record.processor).parts)
    except TemplateError as error:
        what = f"the chat template refuses the roles {_shown.repr(roles)} ({error})"
        raise DocumentError(record.key, "bad_record", f"{what}; accepted: what the template renders") from error


def _turns(record: _Record) -> Iterator[tuple[str, list[_Slot]]]:
    """Role and content of each turn; no content is empty."""
    field = record.has("conversations", "messages")
    if field:
        turns = record.items(field)
        if not turns:
            record.fail(field, turns, "at least one turn")
        for i, turn in enumerate(turns):
            yield _turn(record, f"{field}[{i}]", turn)
    elif _is_cauldron(record):
        for i, turn in enumerate(record.items("texts")):
            if not isinstance(turn, dict):
                record.fail(f"texts[{i}]", turn, "an object with user and assistant")
            for role in ("user", "assistant"):
                yield role, _split(record.filled(f"texts[{i}].{role}", turn.get(role)))
    else:
        question, answer = record.has(*QUESTION_FIELDS), record.has(*ANSWER_FIELDS)
        context = record.has(*CONTEXT_FIELDS)
        assert question and answer
        text = record.filled(question, record.fields[question])
        if context and record.string(context, record.fields[context]).strip():
            text += PARAGRAPH_JOINT + record.fields[context]
        yield "user", _split(text)
        yield "assistant", _split(record.filled(answer, record.fields[answer]))


def _turn(record: _Record, field: str, turn: Any) -> tuple[str, list[_Slot]]:
    if not isinstance(turn, dict):
        record.fail(field, turn, "an object with from and value, or role and content")
    said_by = "from" if turn.get("from") is not None else "role"
    said = "value" if turn.get("value") is not None else "content"
    name, content = turn.get(said_by), turn.get(said)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        record.fail(f"{field}.{said_by}", name, f"one of {', '.join(ROLES)}")
    if isinstance(content, list):
        slots = _content(record, f"{field}.{said}", content)
    else:
        slots = _split(record.string(f"{field}.{said}", content))
    if not any(not isinstance(slot, str) or slot.strip() for slot in slots):
        record.fail(f"{field}.{said}", content, "a text that is not empty, or a list of parts")
    return role, slots


def _content(record: _Record, field: str, parts: list[Any]) -> list[_Slot]:
    """An OpenAI-style content list, or one as transformers' chat templates take it."""
    slots: list[_Slot] = []
    for i, part in enumerate(parts):
        slot = _content_part(record, f"{field}[{i}]", part)
        if isinstance(slot, str) and slots and isinstance(slots[-1], str):
            slots[-1] += slot
        else:
            slots.append(slot)
    for slot in slots:
        if isinstance(slot, str) and (IMAGE_TOKEN in slot or VIDEO_TOKEN in slot):
            record.fail(field, slot, f"media as parts of their own, no {IMAGE_TOKEN} or {VIDEO_TOKEN} in a part's text")
    return slots


def _content_part(record: _Record, field: str, part: Any) -> _Slot:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return record.string(f"{field}.text", part.get("text"))
    if kind not in ("image", "image_url", "video", "video_url"):
        record.fail(f"{field}.type", kind or part, "text, image, image_url, video or video_url")
    is_image = kind.startswith("image")
    name = next((name for name in (kind, "url", "path", "bytes") if part.get(name) is not None), None)
    if name is None:
        return _Awaited.IMAGE if is_image else _Awaited.VIDEO
    return (record.image if is_image else record.video)(f"{field}.{name}", part[name])


def _split(text: str) -> list[_Slot]:
    """A text written as LLaVA's are, cut at its placeholders."""
    pieces = [piece for piece in re.split(f"({IMAGE_TOKEN}|{VIDEO_TOKEN})", text) if piece]
    return [_Awaited(piece) if piece in (IMAGE_TOKEN, VIDEO_TOKEN) else piece for piece in pieces]


def _place_media(record: _Record, turns: list[tuple[str, list[_Slot]]]) -> None:
    """Puts the record's media where they are awaited, or before the first user's words where none is."""
    slots = [slot for _, content in turns for slot in content]
    awaited = {kind: slots.count(kind) for kind in _Awaited}
    if not any(awaited.values()) and any(isinstance(slot, Image | Video) for slot in slots):
        if record.has("image", "images", "video", "videos"):
            record.fail("messages", record.fields.get("messages"), "media in the parts or in fields of their own")
        return
    images, videos = record.own_media()
    if videos and not images and awaited == {_Awaited.IMAGE: len(videos), _Awaited.VIDEO: 0}:
        for _, content in turns:  # LLaVA-Video writes <image> where its videos stand
            content[:] = [_Awaited.VIDEO if slot is _Awaited.IMAGE else slot for slot in content]
    elif not any(awaited.values()) and (images or videos):
        first = next((content for role, content in turns if role == "user"), None)
        if first is None:
            record.fail("roles", [role for role, _ in turns], "a turn of the user, for the media to stand in")
        first[:0] = [_Awaited.IMAGE] * len(images) + [_Awaited.VIDEO] * len(videos)
    else:
        lacking = [awaited[_Awaited.IMAGE] - len(images), awaited[_Awaited.VIDEO] - len(videos)]
        if any(lacking):
            what = f"{awaited[_Awaited.IMAGE]} {IMAGE_TOKEN} for {len(images)} images, "
            what += f"{awaited[_Awaited.VIDEO]} {VIDEO_TOKEN} for {len(videos)} videos"
            reason = "missing_media" if max(lacking) > 0 else "bad_record"
            raise DocumentError(record.key, reason, f"{what}; accepted: equally many, or no placeholder at all")
    waiting: dict[_Slot, Iterator[Image | Video]] = {
        _Awaited.IMAGE: (record.image(*value) for value in images),
        _Awaited.VIDEO: (record.video(*value) for value in videos),
    }
    for _, content in turns:
        content[:] = [next(waiting[slot]) if isinstance(slot, _Awaited) else slot for slot in content]


LAYOUTS: dict[str, tuple[Callable[[_Record], bool], Callable[[_Record], list[Part]]]] = {
    "interleaved": (_is_interleaved, _interleaved),
    "chat": (_is_chat, _chat),
    "caption": (_is_caption, _caption),
    "text": (_is_text, _text),
}
