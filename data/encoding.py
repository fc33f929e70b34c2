"""A document to a sample: token ids, labels, and the pixels of its media."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage

from ..vlm.media import MediaError, MediaLimitError, MediaLimits, load_image, load_video
from ..vlm.media import Video as DecodedVideo
from ..vlm.processor import FoveateProcessor
from ..vlm.tiling import to_tiles
from .document import Document, DocumentError, Image, Text, Video

IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """A document as a model reads it.

    `input_ids` and `labels` are int64 [tokens]; a label stands at its own token (shifted by the model) and is -100
    where no loss falls, at the first token always, so that nothing is predicted across documents. `images` and
    `frames` are uint8 [tiles, height, width, 3].
    """

    key: str
    input_ids: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    frames: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def loss_tokens(self) -> int:
        """How many tokens are predicted."""
        return int((self.labels != IGNORE).sum())

    @property
    def tiles(self) -> int:
        """What the tower has to encode, in tiles."""
        return len(self.images) + len(self.frames)


def encode(document: Document, processor: FoveateProcessor, limits: MediaLimits | None = None) -> Sample:
    """Tokenizes a document as one text, its media placeholders expanded.

    Raises:
        DocumentError: a medium can't be read, the document has no tokens, or its text holds a media placeholder.
    """
    limits = limits or MediaLimits()
    text = ""
    spans: list[tuple[int, int]] = []  # characters on which loss falls
    images: list[PILImage.Image] = []
    frames: list[np.ndarray] = []
    for part in document.parts:
        if isinstance(part, Text):
            if processor.image_token in part.text or processor.video_token in part.text:
                raise DocumentError(
                    document.key, "bad_record", "a text holds a media placeholder; accepted: text without one"
                )
            if part.loss:
                spans.append((len(text), len(text) + len(part.text)))
            text += part.text
        elif isinstance(part, Image):
            with _naming(document.key):
                images.append(load_image(part.source, limits))
            text += processor.image_text()
        else:
            with _naming(document.key):
                clip = _frames(part, processor, limits)
            frames.extend(clip)
            text += processor.video_text(len(clip))
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    if not len(input_ids):
        raise DocumentError(
            document.key, "empty", "the document is empty; accepted: at least one part with text or media"
        )
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE)
    for start, end in spans:
        inside = (offsets[:, 0] < end) & (offsets[:, 1] > start)
        labels[inside] = input_ids[inside]
    labels[0] = IGNORE
    return Sample(
        document.key,
        input_ids,
        labels,
        to_tiles(images, processor.image_size, processor.resample),
        to_tiles(frames, processor.video_size, processor.resample),
    )


def _frames(video: Video, processor: FoveateProcessor, limits: MediaLimits) -> np.ndarray:
    """The frames to read, uint8 [frames, height, width, 3]: files are sampled, frames given as such all kept."""
    source, count = video.source, video.num_frames
    if isinstance(source, DecodedVideo):
        return source.frames
    if count is None:
        if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape[3:] == (3,) and len(source):
            return source
        if not isinstance(source, np.ndarray | list | tuple):
            count = processor.num_frames
    size = processor.video_size if processor.resample == PILImage.Resampling.BICUBIC else None  # as in the processor
    return load_video(source, num_frames=count, size=size, backend=processor.video_backend, limits=limits).frames


@contextmanager
def _naming(key: str) -> Iterator[None]:
    try:
        yield
    except MediaError as error:
        reason = "too_large" if isinstance(error, MediaLimitError) else "unreadable_media"
        raise DocumentError(key, reason, str(error)) from error
