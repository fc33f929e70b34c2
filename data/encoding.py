"""A document to a sample: token ids, labels, and the pixels of its media."""

from dataclasses import dataclass

import numpy as np

from ..vlm.media import MediaLimits, load_image, load_video
from ..vlm.processor import FoveateProcessor
from ..vlm.tiling import to_tiles
from .document import Document, Image, Text

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
    def tiles(self) -> int:
        """What the tower has to encode, in tiles."""
        return len(self.images) + len(self.frames)


def encode(document: Document, processor: FoveateProcessor, limits: MediaLimits | None = None) -> Sample:
    """Tokenizes a document as one text, its media placeholders expanded.

    Raises:
        MediaError: a medium can't be read.
        ValueError: the document has no text, or its text holds a media placeholder of its own.
    """
    limits = limits or MediaLimits()
    text, spans = "", []  # characters on which loss falls
    images, frames = [], []
    for part in document.parts:
        if isinstance(part, Text):
            if processor.image_token in part.text or processor.video_token in part.text:
                raise ValueError(f"{document.key}: a text holds a media placeholder; accepted: text without one")
            if part.loss:
                spans.append((len(text), len(text) + len(part.text)))
            text += part.text
        elif isinstance(part, Image):
            image = part.source if isinstance(part.source, np.ndarray) else load_image(part.source, limits)
            images.append(image)
            text += processor.image_text()
        else:
            source = part.source
            if not (isinstance(source, np.ndarray) and source.ndim == 4):
                count = part.num_frames or (processor.num_frames if not isinstance(source, list | tuple) else None)
                clip = load_video(source, num_frames=count, backend=processor.video_backend, limits=limits)
                source = clip.frames
            frames.extend(source)
            text += processor.video_text(len(source))
    if not text:
        raise ValueError(f"{document.key}: the document is empty; accepted: at least one part with text or media")
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids = np.asarray(encoded["input_ids"], dtype=np.int64)
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
