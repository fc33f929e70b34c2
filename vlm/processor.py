"""The processor: text, images and video to model inputs, every media placeholder expanded to its exact length."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ImageProcessingMixin, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import TextKwargs

from .config import FoveateConfig
from .media import MediaLimits, Video, load_image, load_video
from .tiling import normalise, to_tiles, tokens_per_tile
from .video import video_text

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"

# ChatML with content lists; the assistant's words (and its end of turn) are marked as what a model is trained on.
CHAT_TEMPLATE = """
{%- if bos_token -%}{{- bos_token -}}{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- content(message) -}}{{- '<|im_end|>\n' -}}{%- endgeneration -%}
{%- else -%}{{- content(message) -}}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# Turns a message's content, a string or a list of parts, into text; put before every chat template of ours.
CONTENT_MACRO = """
{%- macro content(message) -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<image>' -}}
{%- elif part.type == 'video' -%}{{- '<video>' -}}
{%- elif part.type == 'text' -%}{{- part.text -}}
{%- else -%}{{- raise_exception('content part of type ' + part.type + '; accepted: text, image, video') -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
"""


def add_media_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Adds the placeholder tokens where they are missing and returns their ids (image, video)."""
    tokenizer.add_tokens([IMAGE_TOKEN, VIDEO_TOKEN], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, VIDEO_TOKEN])
    assert isinstance(ids, list)
    return ids[0], ids[1]


class FoveateProcessor(ProcessorMixin):
    """Makes model inputs from text with `<image>` and `<video>` placeholders and their media.

    Args:
        tokenizer: the LLM's tokenizer; the media tokens are added where they are missing.
        image_size: (height, width) that images are resized to, in pixels.
        video_size: (height, width) of video frames; like `image_size` when None.
        patch_size: side of the tower's patches in pixels.
        downsample_factor: r of the projector.
        prefix_tokens: CLS and register tokens that the model keeps.
        image_mean, image_std: by channel, on pixels in [0, 1].
        resample: PIL's resampling filter (3 is bicubic).
        frame_separator: text after each frame's tokens.
        num_frames: frames taken from a video when a call gives neither `num_frames` nor `fps`.
        video_backend: `pyav` or `decord`.
        chat_template: Jinja template; ChatML with content lists when None.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_size: tuple[int, int] = (384, 384),
        video_size: tuple[int, int] | None = None,
        patch_size: int = 14,
        downsample_factor: int = 2,
        prefix_tokens: int = 0,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        resample: int = 3,
        frame_separator: str = "\n",
        num_frames: int = 8,
        video_backend: str = "pyav",
        chat_template: str | None = None,
    ):
        if tokenizer is None:
            raise ValueError("tokenizer is None; accepted: the LLM's tokenizer")
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN
        self.image_token_id, self.video_token_id = add_media_tokens(tokenizer)
        self.image_size = _checked_size("image_size", image_size, patch_size)
        self.video_size = _checked_size("video_size", video_size or image_size, patch_size)
        self.patch_size = patch_size
        self.downsample_factor = downsample_factor
        self.prefix_tokens = prefix_tokens
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.resample = resample
        self.frame_separator = frame_separator
        self.num_frames = num_frames
        self.video_backend = video_backend
        super().__init__(tokenizer, chat_template=chat_template or CONTENT_MACRO + CHAT_TEMPLATE)
        tokenizer.padding_side = "left"  # what generation needs; training packs and does not pad

    @classmethod
    def from_parts(
        cls, vision: str | PathLike, text: str | PathLike, config: FoveateConfig, **options: Any
    ) -> "FoveateProcessor":
        """The processor of a model joined by `FoveateForConditionalGeneration.from_parts`.

        Args:
            vision: name or directory of the tower; mean, std and filter come from its image processor's file.
            text: name or directory of the LLM, for its tokenizer.
            config: the joined model's configuration.
            **options: arguments of this class that shall differ.

        Raises:
            ValueError: neither the image processor's file nor `options` has the mean, the std or the filter.
        """
        settings, _ = ImageProcessingMixin.get_image_processor_dict(vision)  # its class may want torchvision
        fields = {
            name: settings[name] for name in ("image_mean", "image_std", "resample") if name in settings
        } | options
        side = getattr(config.vision_config, "image_size", None)
        if side is None:  # NaFlex towers have no image size, only a number of patches
            side = int(config.vision_config.num_patches**0.5) * config.vision_config.patch_size
        defaults = {
            "image_size": (side, side) if isinstance(side, int) else tuple(side),
            "patch_size": config.vision_config.patch_size,
            "downsample_factor": config.downsample_factor,
            "prefix_tokens": _prefix_tokens(config),
        }
        if missing := {"image_mean", "image_std", "resample"} - set(fields):
            raise ValueError(f"{vision}: the image processor's file has no {', '.join(sorted(missing))}; pass it")
        return cls(AutoTokenizer.from_pretrained(text), **(defaults | fields))

    def tokens_per_image(self) -> int:
        """LLM tokens of one image."""
        return tokens_per_tile(self.image_size, self.patch_size, self.downsample_factor, self.prefix_tokens)

    def tokens_per_frame(self) -> int:
        """LLM tokens of one video frame, its separator not counted."""
        return tokens_per_tile(self.video_size, self.patch_size, self.downsample_factor, self.prefix_tokens)

    def pixel_values(self, images: Sequence[Image.Image | np.ndarray], video: bool = False) -> torch.Tensor:
        """RGB images (PIL or uint8 [height, width, 3]) to float32 [images, 3, height, width].

        Args:
            images: the images, or with `video` the frames of all videos.
            video: resize to `video_size` instead of `image_size`.
        """
        tiles = to_tiles(images, self.video_size if video else self.image_size, self.resample)
        return normalise(tiles, self.image_mean, self.image_std)

    def image_text(self) -> str:
        """The text that an image's placeholder becomes."""
        return self.image_token * self.tokens_per_image()

    def video_text(self, frames: int) -> str:
        """The text that the placeholder of a video of so many frames becomes."""
        return video_text(frames, self.tokens_per_frame(), self.video_token, self.frame_separator)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        audios: Any = None,
        num_frames: int | None = None,
        fps: float | None = None,
        limits: MediaLimits | None = None,
        return_text_replacement_offsets: bool = False,
        return_mm_token_type_ids: bool = False,
        return_tensors: str | None = None,
        **tokenizer_options: Any,
    ) -> BatchFeature:
        """Makes model inputs.

        Args:
            images: one image, a list of all images of the batch in order, or a list of lists by text. Each a path,
                bytes, PIL image or uint8 array.
            text: one text or several, with one `<image>` or `<video>` where each of the media stands.
            videos: likewise. Each a path, bytes, a list of frames or a uint8 array [frames, height, width, 3].
            num_frames, fps: how many frames to take of each video, or how many a second (not both); files are
                sampled to the processor's own `num_frames` by default, frames given as such are all kept.
            limits: see `media.py`.
            audio, audios: refused unless empty; callers that serve many models pass empty lists.
            **tokenizer_options: `padding`, `truncation`, `max_length`, `add_special_tokens`, … With
                `return_offsets_mapping` the offsets are characters of `text` as given; with
                `return_text_replacement_offsets`, of the expanded text, as in transformers.

        Returns:
            `input_ids`, `attention_mask`, and where there are any `pixel_values` [images, 3, height, width] and
            `pixel_values_videos` [frames of all videos, 3, height, width].

        Raises:
            MediaError: a file can't be read; the message names it.
            ValueError: the numbers of placeholders and of media differ.
            TypeError: an argument that neither this class nor a tokenizer has.
        """
        tokenizer_options.pop("do_sample_frames", None)  # apply_chat_template adds it to num_frames and fps
        if unknown := set(tokenizer_options) - set(TextKwargs.__annotations__):  # tokenizers ignore such
            raise TypeError(f"unexpected arguments: {', '.join(sorted(unknown))}")
        if audio or audios:
            raise ValueError("audio was given; accepted: text, images, videos")
        if text is None:
            raise ValueError("text is None; accepted: a text with one placeholder for each image and video")
        texts = [text] if isinstance(text, str) else list(text)
        limits = limits or MediaLimits()
        images = self._by_text(images, texts, "image", _is_image)
        videos = self._by_text(videos, texts, "video", _is_video)
        data: dict[str, Any] = {}
        loaded = [load_image(image, limits) for image in images]
        clips = [self._load_video(video, num_frames, fps, limits) for video in videos]
        replaced: Any  # for each text a list of dicts, which transformers' annotation does not say
        texts, replaced = self.get_text_with_replacements(
            texts, [self.image_text()] * len(loaded), [self.video_text(len(clip.frames)) for clip in clips]
        )
        if return_tensors is None and tokenizer_options.get("padding"):
            return_tensors = "pt"
        encoded = self.tokenizer(texts, return_tensors=None, **tokenizer_options)
        data.update(encoded)
        if "offset_mapping" in data and not return_text_replacement_offsets:
            pairs = zip(data["offset_mapping"], replaced, strict=True)
            data["offset_mapping"] = [_to_given_text(spans, of_text) for spans, of_text in pairs]
        for token_id, name, unit in (
            (self.image_token_id, "image", self.tokens_per_image() * len(loaded)),
            (self.video_token_id, "video", self.tokens_per_frame() * sum(len(clip.frames) for clip in clips)),
        ):
            found = sum(ids.count(token_id) for ids in data["input_ids"])
            if found != unit:
                raise ValueError(
                    f"after tokenization {found} of {unit} {name} placeholder tokens are left: truncation "
                    f"(max_length {tokenizer_options.get('max_length')}) would cut media; accepted: a longer "
                    "max_length or fewer media"
                )
        if return_mm_token_type_ids:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        batch = BatchFeature(data, tensor_type=return_tensors)
        if return_text_replacement_offsets:
            batch["text_replacement_offsets"] = replaced
        if loaded:
            batch["pixel_values"] = self.pixel_values(loaded)
        if clips:
            batch["pixel_values_videos"] = self.pixel_values([f for clip in clips for f in clip.frames], video=True)
        return batch

    def _by_text(self, media: Any, texts: list[str], kind: str, is_one: Any) -> list:
        """Flattens one, a list, or a list of lists of media, and checks them against the placeholders."""
        token = self.image_token if kind == "image" else self.video_token
        wanted = [text.count(token) for text in texts]
        if media is None:
            media = []
        elif is_one(media):
            media = [media]
        nested = [m for m in media if isinstance(m, list | tuple) and not is_one(m)]
        if nested:
            media = [list(m) if isinstance(m, list | tuple) and not is_one(m) else [m] for m in media]
            if [len(m) for m in media] != wanted:
                raise ValueError(
                    f"the texts hold {wanted} {token} placeholders, but {[len(m) for m in media]} {kind}s were given; "
                    "both lists of numbers must be equal"
                )
            return list(itertools.chain.from_iterable(media))
        if len(media) != sum(wanted):
            raise ValueError(
                f"the texts hold {sum(wanted)} {token} placeholders, but {len(media)} {kind}s were given; both "
                "numbers must be equal"
            )
        return list(media)

    def _load_video(self, video: Any, num_frames: int | None, fps: float | None, limits: MediaLimits) -> Video:
        if isinstance(video, Video):
            return video
        if num_frames is None and fps is None and not isinstance(video, list | tuple | np.ndarray):
            num_frames = self.num_frames
        size = self.video_size if self.resample == Image.Resampling.BICUBIC else None  # what decoding resizes with
        return load_video(video, num_frames=num_frames, fps=fps, size=size, backend=self.video_backend, limits=limits)

    def post_process_image_text_to_text(self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any):
        """Decodes generated ids, as `ProcessorMixin` does for pipelines."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "pixel_values", "pixel_values_videos"]


def _checked_size(name: str, size: Sequence[int], patch_size: int) -> tuple[int, int]:
    if len(size) != 2 or min(size) < patch_size:
        raise ValueError(f"{name} is {size}; accepted: (height, width), each at least patch_size {patch_size}")
    return size[0], size[1]


def _prefix_tokens(config: FoveateConfig) -> int:
    """CLS and register tokens that the model keeps, told from the tower's configuration."""
    if config.vision_feature_select_strategy == "default":
        return 0
    vision = config.vision_config
    if vision.model_type in ("siglip_vision_model", "siglip2_vision_model", "aimv2_vision_model", "ijepa"):
        return 0
    return 1 + (getattr(vision, "num_register_tokens", 0) or 0)


def _to_given_text(spans: Sequence[tuple[int, int]], replaced: Sequence[dict]) -> list[tuple[int, int]]:
    """Moves spans of characters of an expanded text to the text before; those within a replacement to its placeholder.

    Args:
        spans: (start, end) of each token; those of padding are empty and stay.
        replaced: what `get_text_with_replacements` tells of each placeholder, in order.
    """
    starts = [r["new_span"][0] for r in replaced]
    given = []
    for start, end in spans:
        before = bisect_right(starts, start)
        if before and start < end:
            old, new = replaced[before - 1]["span"], replaced[before - 1]["new_span"]
            shift = old[1] - new[1]
            start, end = old if start < new[1] else (start + shift, end + shift)
        given.append((start, end))
    return given


def _is_image(media: Any) -> bool:
    return isinstance(media, str | PathLike | bytes | Image.Image | np.ndarray)


def _is_video(media: Any) -> bool:
    """A file, an array, or a list of frames (arrays or PIL images)."""
    if isinstance(media, list | tuple):
        return len(media) > 0 and all(
            isinstance(f, Image.Image | np.ndarray) and getattr(f, "ndim", 3) == 3 for f in media
        )
    return isinstance(media, str | PathLike | bytes | np.ndarray | Video)
