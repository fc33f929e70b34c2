"""Configuration of a vision tower + projector + LLM model."""

import itertools
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .projector import downsample_factor
from .tiling import TILINGS

FEATURE_SELECT_STRATEGIES = ("default", "full")


class FoveateConfig(PreTrainedConfig):
    """What a Foveate model is made of.

    Args:
        vision_config: the vision tower's configuration (any model that `AutoModel` builds and that takes
            `pixel_values`), or a dict with its `model_type`.
        text_config: the LLM's configuration (any model that `AutoModelForCausalLM` builds), or such a dict.
        projector: `linear`, `mlp2x`, `downsample-2x2`, `downsample-3x3`, … (see `projector.py`), `pool-2x2`, … or
            `resampler` (see `resampler.py`).
        resampler_tokens: M, the queries of projector `resampler`.
        tiling: how an image becomes tiles and their features its tokens: `resize`, `s2`, `dynamic-s2`, `tiles`,
            `anyres` or `native` (see `tiling.py`).
        s2_scales: of `s2` and `dynamic-s2`, the sides in pixels of the square at each scale, ascending, multiples of
            the first, which is the side of a tile (NVILA: 448, 896, 1344).
        thumbnail: of `tiles`, whether an image of several tiles is followed by the whole image in one.
        anyres_max_tiles: of `anyres`, the tiles' worth of tokens above which an image's map is shrunk (LLaVA-OneVision:
            9); None never shrinks it (LLaVA-NeXT).
        video_pool: (t, h, w), the frames, rows and columns of a video's tokens that are averaged to one (NVILA's
            temporal pooling is (8, 1, 1)).
        token_order: `rows`, or `columns` for VILA-1.5's checkpoints, which read a tile's map column by column (tilings
            `resize` and `s2` alone).
        vision_feature_layer: index into the tower's hidden states (0 is the embedding output, -1 the last layer
            before the tower's final norm; LLaVA and VILA use -2), or None for the tower's final, normed output.
        vision_feature_select_strategy: `default` keeps the patch features; `full` also keeps what stands before
            them (CLS and register tokens), which only the projectors without downsampling can take.
        image_token_id: id of the placeholder that an image feature replaces.
        video_token_id: id of the placeholder that a video frame's feature replaces.
        tie_word_embeddings: follows the LLM's own setting when None.

    Raises:
        ValueError: a field has a value that is not accepted; the message names the field.
    """

    model_type = "foveate"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: dict | PreTrainedConfig | None = None,
        text_config: dict | PreTrainedConfig | None = None,
        projector: str = "downsample-2x2",
        resampler_tokens: int = 256,
        tiling: str = "resize",
        s2_scales: Sequence[int] | None = None,
        thumbnail: bool = True,
        anyres_max_tiles: int | None = 9,
        video_pool: Sequence[int] = (1, 1, 1),
        token_order: str = "rows",
        vision_feature_layer: int | None = -2,
        vision_feature_select_strategy: str = "default",
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ):
        self.vision_config = _sub_config("vision_config", vision_config, "siglip_vision_model")
        self.text_config = _sub_config("text_config", text_config, "qwen2")
        r = downsample_factor(projector)
        if vision_feature_select_strategy not in FEATURE_SELECT_STRATEGIES:
            raise ValueError(
                f"vision_feature_select_strategy is {vision_feature_select_strategy!r}; "
                f"accepted: {', '.join(FEATURE_SELECT_STRATEGIES)}"
            )
        if vision_feature_select_strategy == "full" and (r > 1 or projector == "resampler"):
            raise ValueError(
                f"vision_feature_select_strategy 'full' keeps CLS tokens, which projector {projector!r} can't place "
                "on its grid; accepted with it: 'default'"
            )
        if resampler_tokens < 1:
            raise ValueError(f"resampler_tokens is {resampler_tokens}; accepted: 1 or more")
        _check_tiling(tiling, s2_scales, vision_feature_select_strategy)
        if tiling == "anyres" and (r > 1 or projector == "resampler" or tuple(video_pool) != (1, 1, 1)):
            raise ValueError(
                f"tiling 'anyres' has its own way of pooling; accepted with it: projector linear or mlp2x (it is "
                f"{projector!r}) and video_pool (1, 1, 1) (it is {tuple(video_pool)})"
            )
        if token_order not in ("rows", "columns"):
            raise ValueError(f"token_order is {token_order!r}; accepted: rows, columns")
        if token_order == "columns" and (tiling not in ("resize", "s2") or projector == "resampler"):
            raise ValueError(
                f"token_order 'columns' is how VILA-1.5 reads one tile; accepted with it: tilings resize and s2 (it is "
                f"{tiling!r}), and no resampler"
            )
        merge = getattr(self.vision_config, "spatial_merge_size", 1)
        if tiling == "native" and r % merge:
            raise ValueError(
                f"projector {projector!r} makes tokens of {r}x{r} patches, but vision_config.spatial_merge_size is "
                f"{merge}; accepted with tiling 'native': downsampling by a multiple of it"
            )
        if len(video_pool) != 3 or min(video_pool) < 1:
            raise ValueError(f"video_pool is {video_pool}; accepted: (frames, rows, columns), each at least 1")
        gridless = projector == "resampler" or vision_feature_select_strategy == "full"
        if gridless and tuple(video_pool[1:]) != (1, 1):
            raise ValueError(
                f"video_pool is {video_pool}, but a frame's tokens are no grid with projector {projector!r} and "
                f"vision_feature_select_strategy {vision_feature_select_strategy!r}; accepted: (frames, 1, 1)"
            )
        layers = getattr(self.vision_config, "num_hidden_layers", None)
        if (
            vision_feature_layer is not None
            and layers is not None
            and not -layers - 1 <= vision_feature_layer <= layers
        ):
            raise ValueError(
                f"vision_feature_layer is {vision_feature_layer}; this tower of {layers} layers accepts "
                f"{-layers - 1} to {layers}, or None for its final output"
            )
        self.projector = projector
        self.resampler_tokens = resampler_tokens
        self.tiling = tiling
        self.s2_scales = None if s2_scales is None else list(s2_scales)
        self.thumbnail = thumbnail
        self.anyres_max_tiles = anyres_max_tiles
        self.video_pool = list(video_pool)
        self.token_order = token_order
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        if tie_word_embeddings is None:
            tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)

    @property
    def downsample_factor(self) -> int:
        """Side of the square of patches that becomes one token."""
        return downsample_factor(self.projector)

    @property
    def patch_size(self) -> int:
        """Side of the tower's patches in pixels."""
        size = self.vision_config.patch_size
        if isinstance(size, int):
            return size
        if len(set(size)) > 1:
            raise ValueError(f"vision_config.patch_size is {size}; accepted: square patches")
        return size[0]

    @property
    def scales(self) -> tuple[int, ...]:
        """The S² scales as multiples of a tile's side; (1,) without S²."""
        return tuple(side // self.s2_scales[0] for side in self.s2_scales) if self.s2_scales else (1,)


def _check_tiling(tiling: str, s2_scales: Sequence[int] | None, feature_select_strategy: str) -> None:
    if tiling not in TILINGS:
        raise ValueError(f"tiling is {tiling!r}; accepted: {', '.join(TILINGS)}")
    if (tiling in ("s2", "dynamic-s2")) != (s2_scales is not None):
        raise ValueError(f"s2_scales is {s2_scales} with tiling {tiling!r}; accepted: with 's2' and 'dynamic-s2' alone")
    if s2_scales is not None:
        pairs = itertools.pairwise(s2_scales)
        if not s2_scales or s2_scales[0] < 1 or any(b <= a or b % s2_scales[0] for a, b in pairs):
            raise ValueError(f"s2_scales is {s2_scales}; accepted: ascending pixels, multiples of the first")
    if tiling not in ("resize", "tiles", "anyres") and feature_select_strategy == "full":
        raise ValueError(
            f"vision_feature_select_strategy 'full' keeps CLS tokens, which tiling {tiling!r} can't place on its map; "
            "accepted with it: 'default'"
        )


def _sub_config(field: str, value: dict | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    if value is None:
        return AutoConfig.for_model(default_type)
    if isinstance(value, PreTrainedConfig):
        return value
    if isinstance(value, dict):
        if "model_type" not in value:
            raise ValueError(
                f"{field} has no model_type; accepted: a configuration or a dict that names its model_type"
            )
        return AutoConfig.for_model(**value)
    raise ValueError(f"{field} is a {type(value).__name__}; accepted: a transformers configuration or a dict")
