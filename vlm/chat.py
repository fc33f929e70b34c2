"""Questions and answers about media, turn by turn on one KV cache."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, DynamicCache
from transformers.generation.streamers import TextStreamer

from .media import MediaError, MediaLimits, Video, load_image, load_video
from .model import FoveateForConditionalGeneration
from .processor import FoveateProcessor


def load_model(path: str | Path, device: str | None = None) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    """Loads a Foveate model and its processor from a directory or a Hugging Face name, in the dtype it was saved in.

    Raises:
        OSError: nothing is there that transformers can load.
        ValueError: it is not a Foveate model.
    """
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(path)
    if not isinstance(processor, FoveateProcessor):
        raise ValueError(
            f"{path} holds a {type(processor).__name__}; accepted: a model that Foveate trained or exported"
        )
    model: Any = FoveateForConditionalGeneration.from_pretrained(path, dtype="auto")
    return model.to(where).eval(), processor


def load_media(path: str | Path, num_frames: int | None, processor: FoveateProcessor) -> Image.Image | Video:
    """Loads a file as an image, or else as a video of so many frames.

    Raises:
        MediaError: it is neither; the message says why for both.
    """
    limits = MediaLimits()
    try:
        return load_image(path, limits)
    except MediaError as not_image:
        try:
            return load_video(
                path,
                num_frames=num_frames or processor.num_frames,
                size=processor.video_size,
                backend=processor.video_backend,
                limits=limits,
            )
        except MediaError as not_video:
            raise MediaError(f"{not_video} (as a video); {not_image} (as an image)") from not_video


@dataclass(frozen=True)
class Answer:
    """An answer, what it took and how long."""

    text: str
    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float


class Chat:
    """A conversation about fixed media.

    The media stand before the first question. Each turn prefills only what the KV cache does not hold yet.

    Args:
        model, processor: what answers.
        media: what `load_media` gave.
    """

    def __init__(
        self,
        model: FoveateForConditionalGeneration,
        processor: FoveateProcessor,
        media: Sequence[Image.Image | Video] = (),
    ):
        self.model, self.processor, self.media = model, processor, list(media)
        self.messages: list[dict] = []
        self.cache: DynamicCache | None = None
        self.cached_ids: list[int] = []

    def ask(self, question: str, max_new_tokens: int = 256, on_text: Callable[[str], None] | None = None) -> Answer:
        """Answers greedily; the question and the answer join the conversation.

        Args:
            question: text without media placeholders.
            max_new_tokens: at most so many tokens are generated.
            on_text: called with each new piece of the answer as it comes.

        Raises:
            ValueError: the question holds a media placeholder, or is empty.
        """
        processor = self.processor
        if not question.strip():
            raise ValueError("the question is empty; accepted: text")
        if processor.image_token in question or processor.video_token in question:
            raise ValueError(
                f"the question holds {processor.image_token} or {processor.video_token}; accepted: text without them"
            )
        content: list[dict] = []
        if not self.messages:
            content = [{"type": "video" if isinstance(m, Video) else "image"} for m in self.media]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        prompt = processor.apply_chat_template([*self.messages, turn], add_generation_prompt=True)
        inputs = processor(
            text=prompt,
            images=[m for m in self.media if not isinstance(m, Video)] or None,
            videos=[m for m in self.media if isinstance(m, Video)] or None,
            add_special_tokens=False,
            return_tensors="pt",
        ).to(self.model.device)
        ids = inputs["input_ids"][0].tolist()
        visual = sum(i in (processor.image_token_id, processor.video_token_id) for i in ids)
        cache = self._reuse_cache(ids, inputs)
        clock = _Clock(processor.tokenizer, on_text)
        began = time.perf_counter()
        model: Any = self.model  # transformers annotates `generate` with a class that no model inherits
        generated = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock
        )[0].tolist()
        ended = time.perf_counter()
        self.cached_ids = generated[: cache.get_seq_length()]
        new = generated[len(ids) :]
        text = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        self.messages += [turn, {"role": "assistant", "content": text}]
        first = clock.first_token_at or ended
        return Answer(text, len(ids), visual, len(new), first - began, ended - first)

    def _reuse_cache(self, ids: list[int], inputs: BatchFeature) -> DynamicCache:
        """Keeps what the cache and the prompt have in common; all media must be in it, or it is dropped."""
        common = 0
        for cached, wanted in zip(self.cached_ids, ids[:-1], strict=False):
            if cached != wanted:
                break
            common += 1
        media_ids = (self.processor.image_token_id, self.processor.video_token_id)
        if self.cache is None or any(i in media_ids for i in ids[common:]) or not _crop(self.cache, common):
            self.cache, self.cached_ids = DynamicCache(config=self.model.language_model.config), []
            return self.cache
        self.cached_ids = ids[:common]  # noted before generating, which may be interrupted
        for name in ("pixel_values", "pixel_values_videos"):
            inputs.pop(name, None)
        return self.cache


def _crop(cache: DynamicCache, length: int) -> bool:
    """Leaves the first tokens in the cache; False where it can't, such as behind a full sliding window."""
    surplus = cache.get_seq_length() - length
    try:
        if surplus:
            cache.crop(-surplus)
    except (RuntimeError, ValueError):
        return False
    return True


class _Clock(TextStreamer):
    """Streams text to a callback and notes when the first token came."""

    def __init__(self, tokenizer, on_text: Callable[[str], None] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.first_token_at: float | None = None
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen and self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self.prompt_seen = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.on_text and text:
            self.on_text(text)
