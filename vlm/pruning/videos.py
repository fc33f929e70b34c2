"""Puts methods that drop tokens of videos between a model's vision part and its LLM.

A method sees a video whole, as the LLM would read it, [frames, tokens, D]. What it drops is overwritten with NaN, so
that features keep their number and order, and the session (`session.py`) takes the columns out before the first layer.
Still images are left as they are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial, wraps
from itertools import groupby
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from .patches import replaced


class VideoMethod(Protocol):
    """A method that drops tokens of videos; implementations are frozen dataclasses.

    Attributes:
        reindex: whether kept tokens get contiguous positions.
    """

    family: ClassVar[Literal["video"]]

    @property
    def reindex(self) -> bool: ...

    def compared_with(self, frame: int, frames: int) -> int | None:
        """The earlier frame that a frame of a video is compared with; None: none."""
        ...

    def kept(self, similarity: torch.Tensor) -> torch.Tensor:
        """Which tokens of a video stay, bool [frames, tokens], by what `similarities` gives of it."""
        ...

    def select(self, video: torch.Tensor) -> torch.Tensor:
        """Which tokens of a video [frames, tokens, D] stay, bool [frames, tokens]."""
        ...


def similarities(video: torch.Tensor, compared_with: Sequence[int | None]) -> torch.Tensor:
    """Cosine similarity of each token to that at the same place of another frame, float32 [frames, tokens].

    Args:
        video: [frames, tokens, D].
        compared_with: of each frame the other one; None: 0 stands there.
    """
    pairs = [(frame, other) for frame, other in enumerate(compared_with) if other is not None]
    found = torch.zeros(video.shape[:2], device=video.device)
    if pairs:
        frames, others = map(list, zip(*pairs, strict=True))
        found[frames] = torch.cosine_similarity(video[frames].float(), video[others].float(), dim=-1)
    return found


def attach(model: PreTrainedModel, method: VideoMethod) -> AbstractContextManager[None]:
    """Drops tokens of the model's videos, until the context manager is left.

    Args:
        model: Foveate's own, LlavaOnevision, Qwen2-VL, Qwen2.5-VL or InternVL. An InternVL sees frames as images: all
            images of a prompt that are one tile each are taken as the frames of one video.

    Raises:
        ValueError: another model; or a method for videos is attached already.
    """
    kind, name = model.config.model_type, type(method).__name__
    if kind not in ATTACH:
        raise ValueError(
            f"{name} drops tokens of videos, which model type {kind!r} {REFUSED.get(kind, 'has no inputs for')}; "
            f"accepted: {', '.join(ATTACH)}"
        )
    if hasattr(model, "_video_reduction"):
        raise ValueError(f"{name} is the second method for videos; accepted: one at a time")
    return ATTACH[kind](model, method)


def mark_dropped(method: VideoMethod, features: torch.Tensor, frames: int, tail: int = 0) -> torch.Tensor:
    """A video's features with NaN in those that the method drops.

    Args:
        features: [frames · tokens + tail, D].
        frames: of which there are features; groups of frames, where they are pooled.
        tail: tokens after the last frame, which stay.

    Raises:
        RuntimeError: features are not finite.
    """
    if not features.isfinite().all():
        raise RuntimeError(
            f"the features of a video are not all finite, so {type(method).__name__} can't mark what it drops; "
            "accepted: finite features, and one method before the LLM at a time"
        )
    body = features[: len(features) - tail]
    kept = method.select(body.unflatten(0, (frames, -1))).flatten()
    return torch.cat([body.masked_fill(~kept[:, None], math.nan), features[len(body) :]])


@contextmanager
def whole_video(model: PreTrainedModel) -> Iterator[Callable[[torch.Tensor, int, int], torch.Tensor]]:
    """For who encodes a video in chunks: within, `encode_videos` drops nothing.

    Yields:
        What takes the joined features [tokens, D], the number of (groups of) frames and of tokens after the last, and
        does what the model's session, if there is one, does to a whole video.
    """
    attached: _Foveate | None = getattr(model, "_video_reduction", None)
    if attached is None:
        yield lambda features, frames, tail: features
        return
    attached.in_chunks = True
    try:
        yield partial(mark_dropped, attached.method)
    finally:
        attached.in_chunks = False


class _Foveate:
    """`encode_videos` of Foveate's own models; it is what `get_video_features` and generation call, too."""

    def __init__(self, model: Any, method: VideoMethod):
        self.config, self.encode, self.method = model.config, model.encode_videos, method
        self.in_chunks = False

    def __call__(
        self,
        pixel_values_videos: torch.Tensor,
        video_grids: torch.Tensor | None = None,
        video_queries: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        videos = self.encode(pixel_values_videos, video_grids, video_queries)
        if self.in_chunks:
            return videos
        if video_grids is None:
            raise ValueError(
                f"video_grids is None, so {type(self.method).__name__} can't tell which frames are one video; "
                "accepted: [videos, 3], as the processor gives them"
            )
        groups = [-(-frames // self.config.video_pool[0]) for frames in video_grids[:, 0].tolist()]
        tail = int(self.config.tiling == "anyres")  # the newline that ends a video
        return [mark_dropped(self.method, *video, tail) for video in zip(videos, groups, strict=True)]


@contextmanager
def _foveate(model: Any, method: VideoMethod) -> Iterator[None]:
    attached = _Foveate(model, method)
    with replaced(model, encode_videos=attached, _video_reduction=attached):
        yield


@contextmanager
def _video_features(
    frames_of: Callable[..., Sequence[int]],
    frame_tokens: Callable[[Any], int] | None,
    model: PreTrainedModel,
    method: VideoMethod,
) -> Iterator[None]:
    """Models with a `get_video_features`.

    Args:
        frames_of: the frames of each video, from its arguments.
        frame_tokens: how many tokens a frame has, by the model's configuration, where others may follow the last frame.
    """
    base: Any = model.base_model
    encode = base.get_video_features

    @wraps(encode)
    def encode_and_drop(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs | {"return_dict": True})
        marked = []
        for features, frames in zip(output.pooler_output, frames_of(*args, **kwargs), strict=True):
            tail = len(features) - frames * frame_tokens(base.config) if frame_tokens else 0
            marked.append(mark_dropped(method, features, frames, tail))
        together = torch.stack(marked) if isinstance(output.pooler_output, torch.Tensor) else tuple(marked)
        output.pooler_output = together
        return output if kwargs.get("return_dict", True) else output.to_tuple()

    with replaced(base, get_video_features=encode_and_drop), replaced(model, _video_reduction=None):
        yield


def _onevision_frames(*pixels: torch.Tensor, **kwargs: Any) -> list[int]:
    """From [videos, frames, 3, height, width], whose name differs between versions of transformers."""
    given = [*pixels, *(kwargs[name] for name in ("pixel_values_videos", "pixel_values") if name in kwargs)]
    return [given[0].shape[1]] * len(given[0])


def _onevision_tokens(config: Any) -> int:
    """Of a frame, halved; a newline follows the last one, in some versions of transformers only later."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return (-(-side // 2)) ** 2


def _qwen_frames(
    pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor, *args: Any, **kwargs: Any
) -> list[int]:
    return video_grid_thw[:, 0].tolist()


class _InternVL:
    """InternVL, whose frames come as images: the prompt tells how many tiles each image has."""

    def __init__(self, base: Any, method: VideoMethod):
        self.method, self.image_token_id, self.encode = method, base.config.image_token_id, base.get_image_features
        self.rows: list[list[int]] = []  # lengths of the runs of image tokens in each row of the prompt

    def before(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Notes the prompt's images, before the model's forward."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            if kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs"):
                raise ValueError("inputs_embeds were given, which don't tell frames from text; accepted: input_ids")
            return args, kwargs
        images = (ids == self.image_token_id).tolist()
        self.rows = [[len(list(run)) for is_image, run in groupby(row) if is_image] for row in images]
        given = kwargs.get("mm_encoder_outputs") or {}
        if any(self.rows) and given.get("image") is not None:  # encoded before the prefill, by `generate`
            marked = replace(given["image"], pooler_output=self.mark(given["image"].pooler_output))
            kwargs["mm_encoder_outputs"] = given | {"image": marked}
        return args, kwargs

    def after(self, *_: Any) -> None:
        self.rows = []

    def mark(self, features: torch.Tensor) -> torch.Tensor:
        """[tiles, tokens, D] of all rows; each row's images of one tile are a video."""
        tiles, tokens, _ = features.shape
        if sum(map(sum, self.rows)) != tiles * tokens:
            return features  # the model says so
        marked, start = [], 0
        for row in self.rows:
            end = start + sum(row) // tokens
            single = [length == tokens for length in row for _ in range(length // tokens)]
            frames = torch.tensor(single, dtype=torch.bool, device=features.device)
            part = features[start:end].clone()
            if frames.any():
                video = part[frames].flatten(0, 1)
                part[frames] = mark_dropped(self.method, video, int(frames.sum())).unflatten(0, (-1, tokens))
            marked.append(part)
            start = end
        return torch.cat(marked)


@contextmanager
def _internvl(model: PreTrainedModel, method: VideoMethod) -> Iterator[None]:
    base: Any = model.base_model
    attached = _InternVL(base, method)

    @wraps(attached.encode)
    def encode_and_drop(*args: Any, **kwargs: Any) -> Any:
        output = attached.encode(*args, **kwargs | {"return_dict": True})
        if attached.rows:  # otherwise it is called before the prefill, and `before` sees what comes of it
            output.pooler_output = attached.mark(output.pooler_output)
        return output if kwargs.get("return_dict", True) else output.to_tuple()

    with ExitStack() as stack:
        stack.enter_context(replaced(base, get_image_features=encode_and_drop))
        stack.enter_context(replaced(model, _video_reduction=None))
        stack.callback(base.register_forward_pre_hook(attached.before, with_kwargs=True).remove)
        stack.callback(base.register_forward_hook(attached.after, always_call=True).remove)
        yield


ATTACH: dict[str, Callable[[Any, VideoMethod], AbstractContextManager[None]]] = {
    "foveate": _foveate,
    "llava_onevision": partial(_video_features, _onevision_frames, _onevision_tokens),
    "qwen2_vl": partial(_video_features, _qwen_frames, None),
    "qwen2_5_vl": partial(_video_features, _qwen_frames, None),
    "internvl": _internvl,
}
REFUSED = {
    "idefics3": "reads as images, whose tiles can't be told from frames",
    "smolvlm": "reads as images, whose tiles can't be told from frames",
    "qwen3_vl": "adds to its first layers by place (deepstack)",
}
