"""Questions and answers about media, turn by turn on one KV cache."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import Cache
from transformers.generation.streamers import TextStreamer

from .checkpoints import load
from .encode import encode_video
from .media import MediaError, Video, load_image, sample_video
from .model import FoveateForConditionalGeneration
from .parallel.inference import Share, own_images, parallel_session, together
from .processor import FoveateProcessor, VideoSource
from .pruning.session import is_reduced, new_cache
from .quantised_weights import Scheme, quantise, use_kernels


def load_model(
    path: str | Path, device: str | None = None, weights: Scheme | None = None, tower_weights: Scheme | None = None
) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    """Loads a model and its processor from a directory or a Hugging Face name, in the dtype it was saved in.

    Args:
        weights, tower_weights: how those of the LLM's and of the tower's layers are quantised; None leaves them.

    Raises:
        OSError: nothing is there that transformers can load.
        CheckpointError: it is no model of ours, nor one that `checkpoints.load` reads.
        QuantisationError: the weights can't be quantised so.
    """
    where: Any = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load(path)
    if weights or tower_weights:
        quantise(model, weights, tower_weights)
    model = model.to(where)
    use_kernels(model)
    return model, processor


def load_media(
    path: str | Path,
    num_frames: int | None,
    processor: FoveateProcessor,
    *,
    fps: float | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
) -> Image.Image | VideoSource:
    """Loads a file as an image, or else says which frames of it, as a video, are taken; none is decoded yet.

    Args:
        num_frames, fps: how many frames, or how many a second; the processor's own number when both are None.
        start_s, end_s: the part of a video, in seconds.

    Raises:
        MediaError: it is neither; the message says why for both.
        ValueError: an argument out of range.
    """
    try:
        return load_image(path)
    except MediaError as not_image:
        if num_frames is None and fps is None:
            num_frames = processor.num_frames
        try:
            sample_video(path, num_frames=num_frames, fps=fps, start_s=start_s, end_s=end_s)
        except MediaError as not_video:
            raise MediaError(f"{not_video} (as a video); {not_image} (as an image)") from not_video
        return VideoSource(path, num_frames, fps, start_s, end_s)


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

    The media stand before the first question. They are encoded at once, videos chunk by chunk as they are decoded, and
    only what the LLM reads of them is kept. Each turn prefills only what the KV cache does not hold yet.

    Args:
        model, processor: what answers.
        media: what `load_media` gave.
        max_visual_tokens: budget of all media together; the processor's own when None. See `processor.plan`.

    Made within `foveate.reduce`, it reads fewer visual tokens, or has the KV cache that was asked for there; it is then
    asked within it, too, and not elsewhere. So it is with `sequence_parallel`, where all ranks of the group make it and
    ask it the same; each decodes and encodes its share of the frames.

    Attributes:
        media: as given.
        plan: what they became.

    Raises:
        MediaError: a frame can't be decoded.
        BudgetError: not even the lowest resolution fits the budget.
    """

    def __init__(
        self,
        model: FoveateForConditionalGeneration,
        processor: FoveateProcessor,
        media: Sequence[Image.Image | Video | VideoSource] = (),
        max_visual_tokens: int | None = None,
    ):
        self.model, self.processor, self.media = model, processor, list(media)
        self.kinds = ["image" if isinstance(m, Image.Image) else "video" for m in media]
        images = [m for m in media if isinstance(m, Image.Image)]
        videos = [m for m in media if not isinstance(m, Image.Image)]
        self.plan = plan = processor.plan(images, videos, max_visual_tokens)
        tiles = processor.cut(replace(plan, videos=()), images)
        self.image_texts, self.video_texts = list(tiles.image_texts), [one.text for one in plan.videos]
        self.features: dict[str, torch.Tensor] = {}  # [tokens, D] of all images, of all videos; of this rank's share
        parallel = parallel_session(model)
        with torch.no_grad(), nullcontext() if parallel is None else together(parallel.topology.group):
            costs = [one.tiles * math.prod(one.tile) for one in plan.images]
            clips = [(one.frames, float(math.prod((*one.grid, *one.tile)))) for one in plan.videos]
            every = Share(range(len(images)), tuple(range(one.frames) for one in plan.videos))
            share = every if parallel is None else parallel.share(costs, clips)
            if share.images:
                inputs = own_images(model.config, processor.media_inputs([tiles]), share.images)
                encoded = model.encode_images(**{name: given.to(model.device) for name, given in inputs.items()})
                self.features["image_features"] = torch.cat(encoded)
            queries = plan.video_tiling.tokens_per_tile
            encoded = [
                encode_video(
                    model, processor, m.source if isinstance(m, VideoSource) else m, one, queries,
                    part=None if parallel is None else frames,
                )
                for m, one, frames in zip(videos, plan.videos, share.frames, strict=True)
                if frames
            ]  # fmt: skip
        if parallel is not None:
            encoded = parallel.drop(encoded, costs, clips)
        if encoded:
            self.features["video_features"] = torch.cat(encoded)
        self.reduced, self.parallel = is_reduced(model), parallel is not None
        self.messages: list[dict] = []
        self.cache: Cache | None = None
        self.cached_ids: list[int] = []

    def ask(self, question: str, max_new_tokens: int = 256, on_text: Callable[[str], None] | None = None) -> Answer:
        """Answers greedily; the question and the answer join the conversation.

        Args:
            question: text without media placeholders.
            max_new_tokens: at most so many tokens are generated.
            on_text: called with each new piece of the answer as it comes.

        Raises:
            ValueError: the question holds a media placeholder, or is empty; or it was made within `foveate.reduce` or
                `sequence_parallel` and is asked outside, or the other way round.
        """
        processor = self.processor
        for name, made, asked in (
            ("foveate.reduce", self.reduced, is_reduced(self.model)),
            ("sequence_parallel", self.parallel, parallel_session(self.model) is not None),
        ):
            if made != asked:
                here, there = ("outside", "within") if made else ("within", "outside")
                raise ValueError(f"asked {here} {name}, about media encoded {there}; accepted: both within, or neither")
        if not question.strip():
            raise ValueError("the question is empty; accepted: text")
        if processor.image_token in question or processor.video_token in question:
            raise ValueError(
                f"the question holds {processor.image_token} or {processor.video_token}; accepted: text without them"
            )
        turn, prompt = self._prompt(question)
        [text], _ = processor.get_text_with_replacements([prompt], self.image_texts, self.video_texts)
        encoded = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(self.model.device)
        ids = encoded["input_ids"][0].tolist()
        visual = sum(i in (processor.image_token_id, processor.video_token_id) for i in ids)
        cache = self._reuse_cache(ids)
        inputs = encoded if self.cached_ids else encoded | self.features
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
        said = text if isinstance(turn["content"], str) else [{"type": "text", "text": text}]
        self.messages += [turn, {"role": "assistant", "content": said}]
        first = clock.first_token_at or ended
        return Answer(text, len(ids), visual, len(new), first - began, ended - first)

    @property
    def visual_kinds(self) -> list[str]:
        """Of each visual token in the KV cache, in order, whether it is of an `image` or a `video`."""
        kinds = {self.processor.image_token_id: "image", self.processor.video_token_id: "video"}
        return [kinds[i] for i in self.cached_ids if i in kinds]

    def _prompt(self, question: str) -> tuple[dict, str]:
        """The question as a turn, and the whole conversation as text, with a placeholder for each of the media."""
        tokens = {"image": self.processor.image_token, "video": self.processor.video_token}
        text = {"type": "text", "text": question}
        contents: list[Any] = [[text], question]
        if not self.messages:
            # For templates that know no videos, or no content but text, placeholders are words.
            words = "".join(f"{tokens[kind]}\n" for kind in self.kinds) + question
            contents = [[*({"type": kind} for kind in self.kinds), text], [text | {"text": words}], words]
        for content in contents:
            turn = {"role": "user", "content": content}
            try:
                prompt = self.processor.apply_chat_template([*self.messages, turn], add_generation_prompt=True)
            except (TypeError, TemplateError):
                continue
            complete = all(prompt.count(token) == self.kinds.count(kind) for kind, token in tokens.items())
            if complete and question.strip() in prompt:
                return turn, prompt
        raise ValueError(
            "the model's chat template leaves out the question or some of the media "
            f"({', '.join(self.kinds) or 'none'}); accepted: a template for parts of text, image and video, or for text"
        )

    def _reuse_cache(self, ids: list[int]) -> Cache:
        """Keeps what the cache and the prompt have in common; all media must be in it, or it is dropped."""
        common = 0
        for cached, wanted in zip(self.cached_ids, ids[:-1], strict=False):
            if cached != wanted:
                break
            common += 1
        media_ids = (self.processor.image_token_id, self.processor.video_token_id)
        if self.cache is None or any(i in media_ids for i in ids[common:]) or not _crop(self.cache, common):
            self.cache, common = new_cache(self.model), 0
        self.cached_ids = ids[:common]  # noted before generating, which may be interrupted
        return self.cache


def _crop(cache: Cache, length: int) -> bool:
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
