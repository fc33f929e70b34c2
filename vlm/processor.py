"""The processor: text, images and video to model inputs, every media placeholder expanded to its exact length."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ImageProcessingMixin, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import TextKwargs

from .config import FoveateConfig
from .media import (
    DEFAULT_LIMITS,
    MediaError,
    MediaLimits,
    Video,
    load_image,
    load_video,
    probe_image,
    sample_video,
)
from .planning import Clip, MediaPlan, MediaTiles, PlannedMedia, VideoSource, plan_texts, thinned
from .tiling import ImagePlan, Tiling, normalise, to_tiles
from .video import TIMESTAMPS, VideoPlan, time_texts, time_token

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


def add_media_tokens(
    tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE_TOKEN, video_token: str = VIDEO_TOKEN
) -> tuple[int, int]:
    """Adds the placeholder tokens where they are missing and returns their ids (image, video)."""
    tokenizer.add_tokens([image_token, video_token], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids([image_token, video_token])
    assert isinstance(ids, list)
    return ids[0], ids[1]


class FoveateProcessor(ProcessorMixin):
    """Makes model inputs from text with `<image>` and `<video>` placeholders and their media.

    Args:
        tokenizer: the LLM's tokenizer; the media tokens are added where they are missing.
        image_size: (height, width) of a tile, in pixels.
        video_size: (height, width) of video frames; like `image_size` when None.
        patch_size: side of the tower's patches in pixels.
        downsample_factor: r of the projector.
        prefix_tokens: CLS and register tokens that the model keeps.
        tiling: how images become tiles: `resize`, `s2`, `dynamic-s2`, `tiles`, `anyres` or `native` (see `tiling.py`).
            Frames are one tile each, with `native` of their own aspect ratio too.
        s2_scales: as in `FoveateConfig`.
        min_tiles, max_tiles: bounds of an image's grid of tiles.
        thumbnail: of `tiles`, as in `FoveateConfig`.
        anyres_grids: of `anyres`, the grids of tiles (rows, columns) that an image may have; all up to 6×6 when None.
        anyres_max_tiles: of `anyres`, as in `FoveateConfig`.
        fit: how `resize` makes an image a tile: `stretch`, `crop` or `pad` (see `anyres.fit_image`).
        min_patches, max_patches: of `native`, bounds of the patches of an image or a frame.
        video_pool: as in `FoveateConfig`.
        query_tokens: tokens a tile, with projector `resampler`.
        train_queries: the numbers of tokens a tile that training draws from; powers of 2 up to `query_tokens` when
            None.
        max_visual_tokens: budget of the visual tokens of a text (in training of a document). What is over it loses
            frames first, then resolution; see `plan`.
        min_frames: frames that a video keeps at least before resolution is lost.
        image_mean, image_std: by channel, on pixels in [0, 1].
        resample: PIL's resampling filter (3 is bicubic).
        image_start, image_end: text around each image's tokens.
        tile_separator: text between the tokens of the tiles of an image, of `tiles` alone.
        frame_start, frame_end: text around each frame's tokens (each group's, where frames are pooled over time);
            `{number}` in it becomes the frame's number, from 1.
        frame_separator: text after each frame.
        last_frame_separator: whether it also stands after the last frame.
        timestamps: what tells a frame's time, before its `frame_start`: `none`, `text` (as `12.5s: `) or `tokens`
            (see `video.py`).
        time_tokens: how many time tokens there are, with timestamps `tokens`.
        num_frames: frames taken from a video when a call gives neither `num_frames` nor `fps`.
        video_backend: `pyav` or `decord`.
        image_token, video_token: the placeholders.
        chat_template: Jinja template; ChatML with content lists when None.

    Raises:
        ValueError: a field has a value that is not accepted; the message names the field.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_size: tuple[int, int] = (384, 384),
        video_size: tuple[int, int] | None = None,
        patch_size: int = 14,
        downsample_factor: int = 2,
        prefix_tokens: int = 0,
        tiling: str = "resize",
        s2_scales: Sequence[int] | None = None,
        min_tiles: int = 1,
        max_tiles: int = 12,
        thumbnail: bool = True,
        anyres_grids: Sequence[tuple[int, int]] | None = None,
        anyres_max_tiles: int | None = 9,
        fit: str = "stretch",
        min_patches: int = 16,
        max_patches: int = 1024,
        video_pool: Sequence[int] = (1, 1, 1),
        query_tokens: int | None = None,
        train_queries: Sequence[int] | None = None,
        max_visual_tokens: int | None = None,
        min_frames: int = 8,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        resample: int = 3,
        image_start: str = "",
        image_end: str = "",
        tile_separator: str = "",
        frame_start: str = "",
        frame_end: str = "",
        frame_separator: str = "\n",
        last_frame_separator: bool = True,
        timestamps: str = "none",
        time_tokens: int = 100,
        num_frames: int = 8,
        video_backend: str = "pyav",
        image_token: str = IMAGE_TOKEN,
        video_token: str = VIDEO_TOKEN,
        chat_template: str | None = None,
    ):
        if tokenizer is None:
            raise ValueError("tokenizer is None; accepted: the LLM's tokenizer")
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id, self.video_token_id = add_media_tokens(tokenizer, image_token, video_token)
        self.image_size = _checked_size("image_size", image_size, patch_size)
        self.video_size = _checked_size("video_size", video_size or image_size, patch_size)
        self.patch_size = patch_size
        self.downsample_factor = downsample_factor
        self.prefix_tokens = prefix_tokens
        self.tiling = tiling
        self.s2_scales = None if s2_scales is None else list(s2_scales)
        if self.s2_scales and self.image_size != (self.s2_scales[0],) * 2:
            raise ValueError(f"image_size is {image_size}; accepted: the first of s2_scales {s2_scales}, twice")
        self.min_tiles, self.max_tiles, self.thumbnail = min_tiles, max_tiles, thumbnail
        self.anyres_grids = None if anyres_grids is None else [tuple(grid) for grid in anyres_grids]
        self.anyres_max_tiles = anyres_max_tiles
        self.fit = fit
        self.min_patches, self.max_patches = min_patches, max_patches
        self.video_pool = list(video_pool)
        self.query_tokens = query_tokens
        self.train_queries = None if train_queries is None else list(train_queries)
        for name, value in (("max_visual_tokens", max_visual_tokens), ("min_frames", min_frames)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; accepted: 1 or more")
        self.max_visual_tokens, self.min_frames = max_visual_tokens, min_frames
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.resample = resample
        self.image_start, self.image_end, self.tile_separator = image_start, image_end, tile_separator
        if tile_separator and tiling != "tiles":
            raise ValueError(
                f"tile_separator is {tile_separator!r} with tiling {tiling!r}; accepted: with 'tiles' alone"
            )
        self.frame_start, self.frame_end = frame_start, frame_end
        self.frame_separator, self.last_frame_separator = frame_separator, last_frame_separator
        if timestamps not in TIMESTAMPS:
            raise ValueError(f"timestamps is {timestamps!r}; accepted: {', '.join(TIMESTAMPS)}")
        self.timestamps, self.time_tokens = timestamps, time_tokens
        if timestamps == "tokens":
            tokenizer.add_tokens([time_token(number) for number in range(time_tokens)], special_tokens=True)
        self.num_frames = num_frames
        self.video_backend = video_backend
        super().__init__(tokenizer, chat_template=chat_template or CONTENT_MACRO + CHAT_TEMPLATE)
        tokenizer.padding_side = "left"  # what generation needs; training packs and does not pad
        _ = self.image_tiling, self.video_tiling  # checks their fields

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
        defaults = {"image_size": tile_size(config), **model_fields(config)}
        if missing := {"image_mean", "image_std", "resample"} - set(fields):
            raise ValueError(f"{vision}: the image processor's file has no {', '.join(sorted(missing))}; pass it")
        return cls(AutoTokenizer.from_pretrained(text), **(defaults | fields))

    @property
    def image_tiling(self) -> Tiling:
        """How images are cut."""
        red, green, blue = (int(mean * 255) for mean in self.image_mean)
        return Tiling(
            scheme=self.tiling,
            tile=self.image_size,
            patch_size=self.patch_size,
            r=self.downsample_factor,
            prefix_tokens=self.prefix_tokens,
            scales=tuple(side // self.s2_scales[0] for side in self.s2_scales) if self.s2_scales else (),
            min_tiles=self.min_tiles,
            max_tiles=self.max_tiles,
            thumbnail=self.thumbnail,
            anyres_grids=tuple((rows, columns) for rows, columns in self.anyres_grids or ()),
            anyres_max_tiles=self.anyres_max_tiles,
            fit=self.fit,
            background=(red, green, blue),
            min_patches=self.min_patches,
            max_patches=self.max_patches,
            tokens_per_tile=self.query_tokens,
        )

    @property
    def video_tiling(self) -> Tiling:
        """How frames are cut: each is one tile."""
        scheme = "native" if self.tiling == "native" else "resize"
        return replace(self.image_tiling, scheme=scheme, tile=self.video_size, scales=(), fit="stretch")

    def tokens_per_image(self) -> int:
        """LLM tokens of an image of `image_size`."""
        return self.image_tiling.plan(*self.image_size).tokens

    def tokens_per_frame(self) -> int:
        """LLM tokens of a video frame of `video_size` (of a group of frames, where they are pooled over time), without
        the text around them.
        """
        return self._video_plan(*self.video_size, np.zeros(1), self.video_tiling).tokens

    def plan_image(self, image: Any, limits: MediaLimits = DEFAULT_LIMITS) -> ImagePlan:
        """What an image becomes, told from its header alone.

        Args:
            image: what `load_image` takes, or (height, width) in pixels.
            limits: see `media.py`.

        Raises:
            MediaError: the image's size can't be read.
        """
        return self.plan([image], limits=limits).images[0]

    def plan_video(self, video: Any, limits: MediaLimits = DEFAULT_LIMITS, **sampling: Any) -> VideoPlan:
        """What a video becomes, told without decoding it.

        Args:
            video: what `load_video` takes, or a `Video`.
            limits: see `media.py`.
            **sampling: `num_frames`, `fps`, `start_s`, `end_s`; the processor's own `num_frames` of a file when neither
                of the first two is given.

        Raises:
            MediaError: the video can't be read.
        """
        return self.plan(videos=[VideoSource(video, **sampling)], limits=limits).videos[0]

    def plan(
        self,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        max_visual_tokens: int | None = None,
        query_tokens: int | None = None,
        limits: MediaLimits = DEFAULT_LIMITS,
    ) -> MediaPlan:
        """What the media of one text become, before a pixel is read: grids, frames and exact numbers of tokens.

        Over the budget, first all videos lose frames in proportion, down to `min_frames` each. If that is not enough,
        images and frames together go one step lower in resolution (`Tiling.lower`; with projector `resampler` a tenth
        of the queries once there are no tiles to lose), and videos get back the frames that then fit; and so on.

        Args:
            images: each as in `plan_image`.
            videos: each as in `plan_video`, or a `VideoSource`.
            max_visual_tokens: the budget; the processor's own when None.
            query_tokens: tokens a tile, with projector `resampler`; the processor's own when None.
            limits: see `media.py`.

        Raises:
            MediaError: a medium's size can't be read.
            BudgetError: not even the lowest resolution fits the budget.
        """
        return self.plan_media(images, videos, max_visual_tokens, query_tokens, limits).plan

    def plan_media(
        self,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        max_visual_tokens: int | None = None,
        query_tokens: int | None = None,
        limits: MediaLimits = DEFAULT_LIMITS,
    ) -> PlannedMedia:
        """As `plan`, with what reading the media later needs."""
        sizes = [size if _is_size(size) else probe_image(size, limits) for size in images]
        clips = [self._clip(video, limits, sampled=True) for video in videos]
        plan = self._plans([sizes], [clips], max_visual_tokens, query_tokens)[0]
        return PlannedMedia(plan, tuple(images), tuple(sizes), tuple(clips))

    def _plans(
        self,
        sizes: Sequence[Sequence[tuple[int, int]]],
        clips: Sequence[Sequence[Clip]],
        max_visual_tokens: int | None,
        query_tokens: int | None,
    ) -> list[MediaPlan]:
        """The plans of several texts, whose media have one resolution, so that their tiles make one batch.

        Args:
            sizes: (height, width) of each text's images.
            clips: each text's videos.
            max_visual_tokens, query_tokens: as in `__call__`.
        """
        budget = self.max_visual_tokens if max_visual_tokens is None else max_visual_tokens
        if query_tokens is not None and (self.query_tokens is None or not 1 <= query_tokens <= self.query_tokens):
            accepted = f"1 to {self.query_tokens}" if self.query_tokens else "None: the projector is no resampler"
            raise ValueError(f"query_tokens is {query_tokens}; accepted: {accepted}")
        queries = query_tokens or self.query_tokens
        image_tiling = replace(self.image_tiling, tokens_per_tile=queries)
        video_tiling = replace(self.video_tiling, tokens_per_tile=queries)
        texts = list(zip(sizes, clips, strict=True))
        return plan_texts(texts, image_tiling, video_tiling, self._video_plan, budget, self.min_frames)

    def _video_plan(self, height: int, width: int, times_s: np.ndarray, tiling: Tiling) -> VideoPlan:
        """The plan of a video of frames of height × width pixels, shown at times_s."""
        frame = tiling.plan(height, width)
        size = (frame.grid[0] * frame.tile[0], frame.grid[1] * frame.tile[1])
        group, *window = self.video_pool
        if self.tiling == "anyres":
            window = [2, 2]  # its frames are halved
        tokens = frame.tokens
        if tuple(window) != (1, 1):
            cells = [-(-(side // self.patch_size) // self.downsample_factor) for side in size]
            tokens = -(-cells[0] // window[0]) * -(-cells[1] // window[1])
        times = time_texts(times_s, group, self.timestamps, self.time_tokens)
        frames = [
            time + self.frame_start.replace("{number}", str(number)) + self.video_token * tokens + self.frame_end
            for number, time in enumerate(times, 1)
        ]
        text = self.frame_separator.join(frames) + (self.frame_separator if self.last_frame_separator else "")
        newline = int(self.tiling == "anyres")  # ends the video, a feature like the others
        text += self.video_token * newline
        return VideoPlan(times_s, size, frame.grid, frame.tile, tokens, text, tokens * len(times) + newline)

    def _clip(self, video: Any, limits: MediaLimits, sampled: bool) -> Clip:
        """A video with what its plan needs; `sampled` leaves files undecoded until their plan is made."""
        wanted = video if isinstance(video, VideoSource) else VideoSource(video)
        source, count = wanted.source, wanted.num_frames
        if isinstance(source, Video):
            frames = source.frames
            return Clip(wanted, (frames.shape[1], frames.shape[2]), source.timestamps_s, source)
        sampling: dict[str, Any] = {
            "fps": wanted.fps,
            "start_s": wanted.start_s,
            "end_s": wanted.end_s,
            "limits": limits,
        }
        if isinstance(source, list | tuple | np.ndarray):
            if sampled:
                _, times_s = sample_video(source, num_frames=count, **sampling)
                return Clip(wanted, probe_image(source[0], limits), times_s, None)
            loaded = load_video(source, num_frames=count, **sampling)
            return self._clip(loaded, limits, sampled)
        if count is None and wanted.fps is None:
            count = self.num_frames
        wanted = replace(wanted, num_frames=count)
        if sampled:
            info, times_s = sample_video(source, num_frames=count, **sampling)
            assert info is not None  # only arrays and lists have none
            return Clip(wanted, (info.height, info.width), times_s, None)
        size = self.video_size if self.resample == Image.Resampling.BICUBIC else None  # what decoding resizes with
        loaded = load_video(source, num_frames=count, size=size, backend=self.video_backend, **sampling)
        return Clip(wanted, (loaded.frames.shape[1], loaded.frames.shape[2]), loaded.timestamps_s, loaded)

    def _frames(
        self, clip: Clip, plan: VideoPlan, tiling: Tiling, limits: MediaLimits, part: slice = slice(None)
    ) -> np.ndarray:
        """The frames of a plan, or some of them, uint8 [tiles, height, width, 3]."""
        if clip.loaded is None:
            source, times_s, size = clip.wanted.source, plan.times_s[part], None
            if self.resample == Image.Resampling.BICUBIC and not isinstance(source, list | tuple | np.ndarray):
                size = plan.size  # files are resized with it as they are decoded
            frames = load_video(source, times_s=times_s, size=size, backend=self.video_backend, limits=limits).frames
        else:
            frames = thinned(clip.loaded.frames, plan.frames)[part]
        if tiling.scheme != "native":
            return frames if frames.shape[1:3] == plan.size else to_tiles(frames, plan.size, self.resample)
        one = tiling.plan(*clip.size)
        return np.concatenate([tiling.cut(frame, one, self.resample) for frame in frames])

    def read_media(
        self,
        images: Sequence[Sequence[Any]],
        videos: Sequence[Sequence[Any]],
        max_visual_tokens: int | None = None,
        query_tokens: int | None = None,
        limits: MediaLimits = DEFAULT_LIMITS,
    ) -> list[MediaTiles]:
        """Reads the media of several texts and cuts them, as `plan` says.

        Args:
            images: of each text; what `load_image` takes.
            videos: of each text; what `load_video` takes, a `Video` or a `VideoSource`.
            max_visual_tokens, query_tokens, limits: as in `__call__`.

        Raises:
            MediaError: a file can't be read; the message names it.
            BudgetError: not even the lowest resolution fits the budget.
        """
        pictures = [[load_image(image, limits) for image in of_text] for of_text in images]
        later = self.tiling == "native" or (max_visual_tokens or self.max_visual_tokens) is not None
        clips = [[self._clip(video, limits, sampled=later) for video in of_text] for of_text in videos]
        sizes = [[(image.height, image.width) for image in of_text] for of_text in pictures]
        plans = self._plans(sizes, clips, max_visual_tokens, query_tokens)
        return [self.cut(*one, limits) for one in zip(plans, pictures, clips, strict=True)]

    def read_image(self, media: PlannedMedia, number: int, limits: MediaLimits = DEFAULT_LIMITS) -> np.ndarray:
        """One planned image, uint8 [tiles, height, width, 3].

        Raises:
            MediaError: it can't be read, or has not the size that its header told.
        """
        image, size = load_image(media.images[number], limits), media.sizes[number]
        if (image.height, image.width) != size:
            raise MediaError(
                f"an image has {image.height}x{image.width} pixels (height x width), but its header told "
                f"{size[0]}x{size[1]}; both must be equal"
            )
        return media.plan.image_tiling.cut(image, media.plan.images[number], self.resample)

    def read_frames(
        self, media: PlannedMedia, number: int, frames: range, limits: MediaLimits = DEFAULT_LIMITS
    ) -> np.ndarray:
        """Consecutive frames of a planned video, uint8 [tiles, height, width, 3]; no frame before the keyframe that
        they need is decoded, and none after them.

        Args:
            media: from `plan_media`.
            number: of the video.
            frames: of the planned ones.
            limits: see `media.py`.

        Raises:
            MediaError: one of them can't be read.
        """
        part = slice(frames.start, frames.stop)
        return self._frames(media.clips[number], media.plan.videos[number], media.plan.video_tiling, limits, part)

    def cut(
        self,
        plan: MediaPlan,
        images: Sequence[Image.Image],
        clips: Sequence[Clip] = (),
        limits: MediaLimits = DEFAULT_LIMITS,
    ) -> MediaTiles:
        """The tiles of a plan's images and videos.

        Args:
            plan: what `plan` gave for them.
            images: RGB.
            clips: videos.
            limits: see `media.py`.

        Raises:
            MediaError: a frame can't be read.
        """
        tiling = plan.image_tiling
        tiles = [tiling.cut(*one, self.resample) for one in zip(images, plan.images, strict=True)]
        frames = [self._frames(*one, plan.video_tiling, limits) for one in zip(clips, plan.videos, strict=True)]
        blank = np.empty((0, 1, 1, 3), np.uint8)
        return MediaTiles(
            images=np.concatenate(tiles) if tiles else blank,
            frames=np.concatenate(frames) if frames else blank,
            image_grids=np.array([one.grid for one in plan.images], np.int64).reshape(-1, 2),
            image_sizes=np.array([(image.height, image.width) for image in images], np.int64).reshape(-1, 2),
            video_grids=np.array([(one.frames, *one.grid) for one in plan.videos], np.int64).reshape(-1, 3),
            queries=tiling.tokens_per_tile,
            image_texts=tuple(self.image_text(one) for one in plan.images),
            video_texts=tuple(one.text for one in plan.videos),
        )

    def image_text(self, plan: ImagePlan) -> str:
        """The text that an image's placeholder becomes."""
        tokens = self.image_token * plan.tokens
        if self.tile_separator:
            tokens = self.tile_separator.join([self.image_token * (plan.tokens // plan.tiles)] * plan.tiles)
        return self.image_start + tokens + self.image_end

    def media_inputs(self, media: Sequence[MediaTiles], raw_pixels: bool = False) -> dict[str, torch.Tensor]:
        """The media of a batch of texts as the model takes them; see `FoveateForConditionalGeneration`.

        Args:
            media: of each text.
            raw_pixels: leave pixels as uint8 [tiles, height, width, 3], which an objective normalises on its device.

        Returns:
            `pixel_values` and `pixel_values_videos` where there are images and videos, with the grids, sizes and
            numbers of queries that this model needs.
        """
        inputs: dict[str, torch.Tensor] = {}
        for name, kind, tiles, grids, needed in (
            (
                "pixel_values",
                "image",
                [m.images for m in media],
                [m.image_grids for m in media],
                self.tiling != "resize",
            ),
            ("pixel_values_videos", "video", [m.frames for m in media], [m.video_grids for m in media], True),
        ):
            if not sum(len(one) for one in tiles):
                continue
            together = np.concatenate([one for one in tiles if len(one)])
            pixels = torch.from_numpy(together) if raw_pixels else normalise(together, self.image_mean, self.image_std)
            inputs[name] = pixels
            if needed:
                inputs[f"{kind}_grids"] = torch.from_numpy(np.concatenate(grids))
            if self.tiling == "anyres" and kind == "image":
                inputs["image_sizes"] = torch.from_numpy(np.concatenate([m.image_sizes for m in media]))
            if self.query_tokens is not None:
                numbers = [m.queries for m, of in zip(media, grids, strict=True) for _ in of]
                inputs[f"{kind}_queries"] = torch.tensor(numbers)
        return inputs

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        audios: Any = None,
        num_frames: int | None = None,
        fps: float | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        max_visual_tokens: int | None = None,
        query_tokens: int | None = None,
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
            start_s, end_s: the part of each video file that is read, in seconds.
            max_visual_tokens: budget of each text's visual tokens; the processor's own when None. See `plan`.
            query_tokens: tokens a tile, with projector `resampler`; the processor's own when None.
            limits: see `media.py`.
            audio, audios: refused unless empty; callers that serve many models pass empty lists.
            **tokenizer_options: `padding`, `truncation`, `max_length`, `add_special_tokens`, … With
                `return_offsets_mapping` the offsets are characters of `text` as given; with
                `return_text_replacement_offsets`, of the expanded text, as in transformers.

        Returns:
            `input_ids`, `attention_mask`, and where there are any media what `media_inputs` gives.

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
        limits = limits or DEFAULT_LIMITS
        of_images = self._by_text(images, texts, "image", _is_image)
        of_videos = self._by_text(videos, texts, "video", _is_video)
        wanted = [
            [v if isinstance(v, VideoSource) else VideoSource(v, num_frames, fps, start_s, end_s) for v in of_text]
            for of_text in of_videos
        ]
        media = self.read_media(of_images, wanted, max_visual_tokens, query_tokens, limits)
        image_texts = [one for m in media for one in m.image_texts]
        video_texts = [one for m in media for one in m.video_texts]
        data: dict[str, Any] = {}
        replaced: Any  # for each text a list of dicts, which transformers' annotation does not say
        texts, replaced = self.get_text_with_replacements(texts, image_texts, video_texts)
        if return_tensors is None and tokenizer_options.get("padding"):
            return_tensors = "pt"
        encoded = self.tokenizer(texts, return_tensors=None, **tokenizer_options)
        data.update(encoded)
        if "offset_mapping" in data and not return_text_replacement_offsets:
            pairs = zip(data["offset_mapping"], replaced, strict=True)
            data["offset_mapping"] = [_to_given_text(spans, of_text) for spans, of_text in pairs]
        for token, token_id, name, given in (
            (self.image_token, self.image_token_id, "image", image_texts),
            (self.video_token, self.video_token_id, "video", video_texts),
        ):
            unit = sum(one.count(token) for one in given)
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
        batch.update(self.media_inputs(media))
        return batch

    def _by_text(self, media: Any, texts: list[str], kind: str, is_one: Any) -> list[list]:
        """Sorts one, a list, or a list of lists of media to their texts, and checks them against the placeholders."""
        token = self.image_token if kind == "image" else self.video_token
        wanted = [text.count(token) for text in texts]
        if media is None:
            media = []
        elif is_one(media):
            media = [media]
        nested = [m for m in media if isinstance(m, list | tuple) and not is_one(m)]
        if nested:
            by_text = [list(m) if isinstance(m, list | tuple) and not is_one(m) else [m] for m in media]
            if [len(m) for m in by_text] != wanted:
                raise ValueError(
                    f"the texts hold {wanted} {token} placeholders, but {[len(m) for m in by_text]} {kind}s were "
                    "given; both lists of numbers must be equal"
                )
            return by_text
        if len(media) != sum(wanted):
            raise ValueError(
                f"the texts hold {sum(wanted)} {token} placeholders, but {len(media)} {kind}s were given; both "
                "numbers must be equal"
            )
        one = iter(media)
        return [list(itertools.islice(one, count)) for count in wanted]

    def post_process_image_text_to_text(self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any):
        """Decodes generated ids, as `ProcessorMixin` does for pipelines."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        images = ["pixel_values", "image_grids", "image_sizes", "image_queries"]
        return [*self.tokenizer.model_input_names, *images, "pixel_values_videos", "video_grids", "video_queries"]


def _is_size(value: Any) -> bool:
    """(height, width)."""
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(side, int) for side in value)


def _checked_size(name: str, size: Sequence[int], patch_size: int) -> tuple[int, int]:
    if len(size) != 2 or min(size) < patch_size:
        raise ValueError(f"{name} is {size}; accepted: (height, width), each at least patch_size {patch_size}")
    return size[0], size[1]


def tile_size(config: FoveateConfig) -> tuple[int, int]:
    """(height, width) of a tile in pixels: the first S² scale, or the tower's own."""
    if config.s2_scales:
        return config.s2_scales[0], config.s2_scales[0]
    side = getattr(config.vision_config, "image_size", None)
    if side is None:  # NaFlex towers have a number of patches instead, Qwen's neither
        patches = getattr(config.vision_config, "num_patches", 32**2)
        side = int(patches**0.5) * config.patch_size
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def model_fields(config: FoveateConfig) -> dict[str, Any]:
    """The arguments of `FoveateProcessor` that follow from a model's configuration."""
    return {
        "patch_size": config.patch_size,
        "downsample_factor": config.downsample_factor,
        "prefix_tokens": _prefix_tokens(config),
        "tiling": config.tiling,
        "s2_scales": config.s2_scales,
        "thumbnail": config.thumbnail,
        "anyres_max_tiles": config.anyres_max_tiles,
        "video_pool": config.video_pool,
        "query_tokens": config.resampler_tokens if config.projector == "resampler" else None,
    }


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
