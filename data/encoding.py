"""A document to a sample: token ids, labels, and the pixels of its media."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from ..vlm.media import MediaError, MediaLimitError, MediaLimits
from ..vlm.planning import BudgetError, MediaTiles, PlannedMedia, VideoSource
from ..vlm.processor import FoveateProcessor
from .document import Document, DocumentError, Image, Text, Video

IGNORE = -100


@dataclass(frozen=True)
class _Tokens:
    """A document's text.

    `input_ids` and `labels` are int64 [tokens]; a label stands at its own token (shifted by the model) and is -100
    where no loss falls, at the first token always, so that nothing is predicted across documents.
    """

    key: str
    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def loss_tokens(self) -> int:
        """How many tokens are predicted."""
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True)
class Sample(_Tokens):
    """A document as a model reads it: `input_ids` and `labels`, int64 [tokens], and the tiles of its media.

    A label stands at its own token (shifted by the model) and is -100 where no loss falls, at the first token always,
    so that nothing is predicted across documents.
    """

    media: MediaTiles

    @property
    def images(self) -> np.ndarray:
        """Tiles of its images, uint8 [tiles, height, width, 3]."""
        return self.media.images

    @property
    def frames(self) -> np.ndarray:
        """Tiles of its videos' frames, uint8 [tiles, height, width, 3]."""
        return self.media.frames

    @property
    def tiles(self) -> int:
        """What the tower has to encode, in tiles (with tiling `native` in patches)."""
        return len(self.images) + len(self.frames)


@dataclass(frozen=True)
class PlannedSample(_Tokens):
    """A document whose text is the `Sample`'s and whose media are yet to be read: by several ranks, each a part."""

    planned: PlannedMedia

    @property
    def media(self) -> MediaTiles:
        """The shapes of its tiles; the pixels are zeros that take no memory."""
        return self.planned.blank()

    @property
    def tiles(self) -> int:
        """As `Sample.tiles`."""
        plan = self.planned.plan
        frames = sum(video.frames * video.grid[0] * video.grid[1] for video in plan.videos)
        return sum(image.tiles for image in plan.images) + frames

    @property
    def digest(self) -> str:
        """Of its text and of what is planned: ranks that share the document must have the same."""
        digest = blake2b(digest_size=8)
        plan = self.planned.plan
        for numbers in (self.input_ids, self.labels, *(video.times_s for video in plan.videos)):
            digest.update(numbers.tobytes())
        digest.update(repr((self.key, self.planned.sizes, [video.size for video in plan.videos])).encode())
        return digest.hexdigest()


def encode(document: Document, processor: FoveateProcessor, limits: MediaLimits | None = None) -> Sample:
    """Tokenizes a document as one text, its media placeholders expanded.

    Raises:
        DocumentError: a medium can't be read, the document has no tokens, or its text holds a media placeholder.
    """
    with naming(document.key):
        media = _read(document, processor, limits or MediaLimits())
    input_ids, labels = _tokenized(document, processor, media.image_texts, media.video_texts)
    return Sample(document.key, input_ids, labels, replace(media, image_texts=(), video_texts=()))


def plan_document(document: Document, processor: FoveateProcessor, limits: MediaLimits | None = None) -> PlannedSample:
    """As `encode`, but of its media only headers are read and packets counted: no pixel is decoded.

    Raises:
        DocumentError: as `encode`, but for pixels that can't be decoded.
    """
    with naming(document.key):
        media = _planned(document, processor, limits or MediaLimits())
    image_texts = [processor.image_text(one) for one in media.plan.images]
    video_texts = [one.text for one in media.plan.videos]
    input_ids, labels = _tokenized(document, processor, image_texts, video_texts)
    plan = replace(media.plan, videos=tuple(replace(one, text="") for one in media.plan.videos))
    return PlannedSample(document.key, input_ids, labels, replace(media, plan=plan))


def _tokenized(
    document: Document, processor: FoveateProcessor, image_texts: Sequence[str], video_texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels, int64 [tokens] each, from what the placeholders of the document's media become."""
    texts = {Image: iter(image_texts), Video: iter(video_texts)}
    text = ""
    spans: list[tuple[int, int]] = []  # characters on which loss falls
    for part in document.parts:
        if isinstance(part, Text):
            if processor.image_token in part.text or processor.video_token in part.text:
                raise DocumentError(
                    document.key, "bad_record", "a text holds a media placeholder; accepted: text without one"
                )
            if part.loss:
                spans.append((len(text), len(text) + len(part.text)))
            text += part.text
        else:
            text += next(texts[type(part)])
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
    return input_ids, labels


def media_of(document: Document) -> tuple[list[Any], list[VideoSource]]:
    """A document's images and videos, as `FoveateProcessor.read_media` takes them."""
    images = [part.source for part in document.parts if isinstance(part, Image)]
    return images, [VideoSource(part.source, part.num_frames) for part in document.parts if isinstance(part, Video)]


def _read(document: Document, processor: FoveateProcessor, limits: MediaLimits) -> MediaTiles:
    images, videos = media_of(document)
    queries = drawn_queries(document.key, processor)
    media = processor.read_media([images], [videos], query_tokens=queries, limits=limits)[0]
    _check_tiles(media, processor)
    return media


def _planned(document: Document, processor: FoveateProcessor, limits: MediaLimits) -> PlannedMedia:
    images, videos = media_of(document)
    queries = drawn_queries(document.key, processor)
    media = processor.plan_media(images, videos, query_tokens=queries, limits=limits)
    _check_tiles(media.blank(), processor)
    return media


def _check_tiles(media: MediaTiles, processor: FoveateProcessor) -> None:
    """Refuses tiles of a lower resolution: a batch's tiles are all of one size."""
    for tiles, tiling in ((media.images, processor.image_tiling), (media.frames, processor.video_tiling)):
        if tiling.scheme != "native" and len(tiles) and tiles.shape[1:3] != tiling.tile:
            raise BudgetError(
                f"max_visual_tokens is {processor.max_visual_tokens}, which takes tiles of {tiles.shape[1]}x"
                f"{tiles.shape[2]} pixels; training accepts what fits with fewer frames and tiles, of "
                f"{tiling.tile[0]}x{tiling.tile[1]}"
            )


def drawn_queries(key: str, processor: FoveateProcessor) -> int | None:
    """How many tokens a tile becomes in this document, with projector `resampler`: drawn by the document's key, so that
    all numbers are trained (Matryoshka Query Transformer, arXiv 2405.19315, section 3).
    """
    if processor.query_tokens is None:
        return None
    powers = [2**power for power in range(processor.query_tokens.bit_length())]
    choices = processor.train_queries or sorted({*powers, processor.query_tokens})
    return choices[zlib.crc32(key.encode()) % len(choices)]


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Makes errors of media DocumentErrors of this document."""
    try:
        yield
    except MediaError as error:
        reason = "too_large" if isinstance(error, MediaLimitError) else "unreadable_media"
        raise DocumentError(key, reason, str(error)) from error
    except BudgetError as error:
        raise DocumentError(key, "too_long", str(error)) from error
