"""Reads a vision tower's attention while a model encodes media, and which of its tokens the LLM's columns are made of.

A media function (`get_image_features`, `encode_images`, …) runs once as it is, and the attention functions of some
tower layers note what they see. Then it runs on a trace: what is known of each tower token (its attention, keys, number
and tile) in place of the token's features, with means in place of the projector. So the model's own code says which
tower tokens a column of the LLM is made of, whatever its tiling, packing, pooling and projector do; of several the
trace holds the mean.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from ...kernels.rater_attention import rater_attention
from ..projector import average_pool
from .patches import replaced

CLS_TOWERS = ("clip_vision_model", "internvl_vision", "vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
OTHER_TOWERS = (
    "siglip_vision_model",
    "siglip2_vision_model",
    "smolvlm_vision",
    "idefics3_vision",
    "pixtral",
)  # no CLS token
MODELS = ("llava", "llava_next", "llava_onevision", "internvl", "smolvlm", "idefics3", "foveate")
WITH_CONNECTOR = ("smolvlm", "idefics3")  # names their parts alike
READING = "foveate_tower_reading"  # name of the attention function while a layer is read
TILES_AT_ONCE = 64  # whose numbers a trace holds, which bounds its memory


@dataclass(frozen=True)
class Cut:
    """How an image was cut in tiles.

    Attributes:
        grid: (rows, columns) of the tiles.
        cells: (rows, columns) of a tile's tokens.
        whole: number of the tile that shows the whole image; those of the grid have the other numbers, in raster order.
    """

    grid: tuple[int, int]
    cells: tuple[int, int]
    whole: int


@dataclass(frozen=True)
class Vision:
    """The parts of a model that see.

    Attributes:
        owner: the module whose media functions the model calls.
        functions: their names.
        tower: the vision tower.
        projector: maps channels, after tokens were moved into them.
        blocks: the tower's layers, a module list.
        feature_layer: index of the tower's hidden state that is projected, or several; None: its final output.
    """

    owner: Any
    functions: tuple[str, ...]
    tower: Any
    projector: Any
    blocks: Any
    feature_layer: int | tuple[int, ...] | None

    @classmethod
    def of(cls, model: Any, method: str) -> "Vision":
        """Finds them.

        Raises:
            ValueError: the model, its tower, projector or tiling is none that a method of this name works for.
        """
        config, kind = model.config, model.config.model_type
        if kind not in MODELS:
            raise ValueError(
                f"{method} can't tell what a {kind!r} model makes of its tower; accepted: {', '.join(MODELS)}"
            )
        owner = model if kind == "foveate" else getattr(model, "model", model)
        tower = owner.vision_model if kind in WITH_CONNECTOR else owner.vision_tower
        towers = (*CLS_TOWERS, *OTHER_TOWERS)
        if tower.config.model_type not in towers:
            raise ValueError(
                f"{method} can't read the attention of vision tower {tower.config.model_type!r}; accepted: "
                f"{', '.join(towers)}"
            )
        if kind == "foveate" and config.projector == "resampler":
            raise ValueError(
                f"{method} with projector 'resampler', whose tokens stand for no place; accepted: all others"
            )
        if kind != "foveate" and tower.config.model_type == "pixtral":
            raise ValueError(
                f"{method} with tower 'pixtral' in a {kind!r} model, all images in one row; accepted: foveate"
            )
        count = tower.config.num_hidden_layers
        [blocks] = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        layer = None if kind in WITH_CONNECTOR else config.vision_feature_layer
        layer = tuple(layer) if isinstance(layer, list) else layer
        if kind == "foveate":
            functions: tuple[str, ...] = ("encode_images", "encode_videos")
        else:
            functions = tuple(name for name in ("get_image_features", "get_video_features") if hasattr(owner, name))
        projector = owner.connector.modality_projection if kind in WITH_CONNECTOR else owner.multi_modal_projector
        vision = cls(owner, functions, tower, projector, blocks, layer)
        if vision.read_layer < 0:
            raise ValueError(f"vision_feature_layer is {layer}, the embeddings; {method} needs the output of a layer")
        return vision

    @property
    def read_layer(self) -> int:
        """The deepest layer, 0-based, whose output is projected; -1: the embeddings are."""
        if self.feature_layer is None:
            return len(self.blocks) - 1
        layers = [self.feature_layer] if isinstance(self.feature_layer, int) else self.feature_layer
        return max(layer % (len(self.blocks) + 1) for layer in layers) - 1

    @property
    def projects_tokens(self) -> bool:
        """Whether the projector maps tower tokens one by one."""
        return (
            self.owner.config.model_type not in ("internvl", *WITH_CONNECTOR) and getattr(self.projector, "r", 1) == 1
        )

    @property
    def has_cls(self) -> bool:
        return self.tower.config.model_type in CLS_TOWERS

    @property
    def prefix(self) -> int:
        """Tokens of the tower that are no patches; they stand first."""
        return 1 + getattr(self.tower.config, "num_register_tokens", 0) if self.has_cls else 0

    def drops_cls(self, arguments: dict[str, Any]) -> bool:
        """Whether a call of a media function with such arguments projects patches alone."""
        given = arguments.get("vision_feature_select_strategy")
        return (self.owner.config.vision_feature_select_strategy if given is None else given) == "default"

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tower tokens [tokens, C] one by one to [tokens, D]."""
        grid = [(1, len(tokens))] if self.owner.config.model_type == "foveate" else []
        return self.projector(tokens[None], *grid)[0]

    def cut(self, function: str, arguments: dict[str, Any], index: int) -> "Cut | None":
        """How an image was cut in tiles, where there is a tile that shows the whole besides and the model knows."""
        config = self.owner.config
        if function == "get_image_features" and config.model_type in ("llava_next", "llava_onevision"):
            counts = arguments.get("batch_num_images")  # OneVision cuts an image where it is a sample's only one
            if counts is not None and [int(n) for n in counts for _ in range(n)][index] > 1:
                return None
            size, tile = arguments["image_sizes"][index], config.vision_config.image_size
            rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tile)
            side = tile // config.vision_config.patch_size
            return Cut((rows, columns), (side, side), 0)
        if function == "encode_images" and config.tiling in ("tiles", "anyres"):
            rows, columns = arguments["image_grids"][index].tolist()
            r, (height, width) = config.downsample_factor, arguments["pixel_values"].shape[-2:]
            cells = (-(-(height // config.patch_size) // r), -(-(width // config.patch_size) // r))
            if config.tiling == "anyres":
                return Cut((rows, columns), cells, 0)
            if config.thumbnail and rows * columns > 1:
                return Cut((rows, columns), cells, rows * columns)
        return None


@dataclass(frozen=True)
class Trace:
    """What is known of the columns of one image or video, or of all tower tokens.

    Attributes:
        attention: [layers, columns].
        number: [columns], number of the token in its tile.
        keys: [columns, head_dim], or None.
        tile: [columns] int64, the tile of most of its tokens, the first of equals; -1 for columns that are no patches.
    """

    attention: torch.Tensor
    number: torch.Tensor
    keys: torch.Tensor | None
    tile: torch.Tensor


class Reading:
    """What is read of a tower while one media function runs.

    Args:
        vision: the model's parts.
        layers: 0-based, whose attention is read.
        wants_more: whether keys of the last of them, and features that are projected token by token, are kept too.
    """

    def __init__(self, vision: Vision, layers: tuple[int, ...], wants_more: bool):
        self.vision, self.layers, self.wants_more = vision, layers, wants_more
        self.rows: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}  # [tiles, tokens] each
        self.keys: list[torch.Tensor] = []  # [tiles, tokens, head_dim] each
        self.features: list[torch.Tensor] = []  # [tiles, tokens, C] each

    @contextmanager
    def of_tower(self) -> Iterator[None]:
        """While open, what the tower computes is noted."""
        tower = self.vision.tower
        with ExitStack() as patches:
            for layer in self.rows:
                block = self.vision.blocks[layer]
                patches.enter_context(replaced(block, forward=self._reading(block, layer)))
            if self.wants_more and self.vision.projects_tokens:
                patches.enter_context(replaced(tower, forward=self._keeping(tower.forward)))
            yield

    def _keeping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def kept(*args: Any, **kwargs: Any) -> Any:
            outputs, layer = forward(*args, **kwargs), self.vision.feature_layer
            if layer is None:
                self.features.append(outputs.last_hidden_state)
            else:
                states = [outputs.hidden_states[i] for i in ([layer] if isinstance(layer, int) else layer)]
                self.features.append(torch.cat(states, dim=-1))
            return outputs

        return kept

    def _reading(self, block: Any, layer: int) -> Callable[..., Any]:
        """A layer's forward during which the attention function is one that notes q and k."""
        forward: Callable[..., Any] = block.forward
        config: Any = next(module.config for module in block.modules() if hasattr(module, "config"))

        @functools.wraps(forward)
        def read(*args: Any, **kwargs: Any) -> Any:
            name = config._attn_implementation

            def attend(
                module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any
            ) -> Any:
                config._attn_implementation = name  # flash attention looks at it
                scaling = options.get("scaling")
                self._note(layer, q, k, mask, q.shape[-1] ** -0.5 if scaling is None else scaling)
                eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
                return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)(module, q, k, v, mask, **options)

            ALL_ATTENTION_FUNCTIONS[READING] = attend
            config._attn_implementation = READING
            try:
                return forward(*args, **kwargs)
            finally:
                config._attn_implementation = name
                del ALL_ATTENTION_FUNCTIONS[READING]

        return read

    @torch.no_grad()
    def _note(self, layer: int, q: torch.Tensor, k: torch.Tensor, mask: Any, scaling: float) -> None:
        """q, k: [tiles, heads, tokens, head_dim]."""
        if self.vision.has_cls:
            rows = cls_attention(q, k, scaling).mean(1)
        else:
            tiles = zip(q, k, _seen_keys(mask, k), strict=True)
            rows = torch.stack([received_attention(*tile, scaling).mean(0) for tile in tiles])
        self.rows[layer].append(rows)
        if self.wants_more and layer == self.layers[-1]:
            self.keys.append(k.mean(1))

    def tower_features(self) -> torch.Tensor | None:
        """What is projected token by token, with the tokens that stand first, [tiles, most tokens of a tile, C]."""
        return _padded(self.features) if self.features else None

    def tokens(self) -> Trace:
        """Of all tower tokens, [tiles, most tokens of a tile] instead of columns; those that are no patches have NaN.

        Raises:
            RuntimeError: an attention function was not called.
        """
        if not all(self.rows.values()):
            raise RuntimeError("the vision tower called no attention function that can be read; is it compiled?")
        attention = torch.stack([_padded(self.rows[layer]) for layer in self.layers])  # [layers, tiles, tokens]
        tiles, tokens = attention.shape[1:]
        number = torch.arange(tokens, device=attention.device).to(attention).repeat(tiles, 1)
        attention[..., : self.vision.prefix] = torch.nan
        keys = _padded(self.keys).to(attention) if self.wants_more else None
        tile = torch.arange(tiles, device=attention.device)[:, None].expand(-1, tokens)
        return Trace(attention, number, keys, tile)

    def columns(self, tokens: Trace, run: Callable[[], Any]) -> list[Trace]:
        """Of each image or video that `run`, a call of the media function, gives.

        Args:
            tokens: what `tokens` gave.
            run: makes the call again.
        """
        parts = [tokens.attention.movedim(0, -1), tokens.number[..., None]]
        means = self._replay(run, torch.cat(parts if tokens.keys is None else [*parts, tokens.keys], dim=-1))
        count = len(tokens.tile)
        shares = [mean.new_zeros(len(mean)) for mean in means]
        tiles = [torch.full_like(share, -1, dtype=torch.long) for share in shares]
        for start in range(0, count, TILES_AT_ONCE):  # of which tile most of a column is
            some = torch.arange(start, min(start + TILES_AT_ONCE, count), device=tokens.tile.device)
            one_hot = (tokens.tile[..., None] == some).to(tokens.number)
            for mean, share, tile in zip(self._replay(run, one_hot), shares, tiles, strict=True):
                most = mean.max(dim=-1)
                more = most.values > share  # never where it is NaN
                share[more], tile[more] = most.values[more], most.indices[more] + start
        layers = len(tokens.attention)
        traces = []
        for mean, tile in zip(means, tiles, strict=True):
            tile[mean[:, 0].isnan()] = -1
            keys = None if tokens.keys is None else mean[:, layers + 1 :]
            traces.append(Trace(mean[:, :layers].T, mean[:, layers], keys, tile))
        return traces

    def _replay(self, run: Callable[[], Any], values: torch.Tensor) -> list[torch.Tensor]:
        """What becomes of values [tiles, tokens, channels] of tower tokens: [columns, channels] of each medium."""
        vision, channels, done = self.vision, values.shape[-1], 0
        calls = iter(self.rows[self.layers[0]])

        @functools.wraps(vision.tower.forward)
        def tower(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            tiles, tokens = next(calls).shape
            done += tiles
            some = values[done - tiles : done, :tokens]
            return SimpleNamespace(last_hidden_state=some, hidden_states=_Everywhere(some))

        def project(features: torch.Tensor, grid: tuple[int, int] = (1, 1)) -> torch.Tensor:
            features = features.unflatten(-1, (-1, channels)).mean(-2)  # tokens and layers moved into channels
            r = getattr(vision.projector, "r", 1)
            return features if r == 1 else average_pool(features.unflatten(1, grid), (1, r, r)).flatten(1, 2)

        def project_maps(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [project(one.flatten(0, 1)[None], (one.shape[0], one.shape[1]))[0] for one in maps]

        with ExitStack() as patches:
            patches.enter_context(replaced(vision.tower, forward=tower))
            patches.enter_context(replaced(vision.projector, forward=project))
            if hasattr(vision.projector, "forward_maps"):
                patches.enter_context(replaced(vision.projector, forward_maps=project_maps))
            if hasattr(vision.owner, "image_newline"):
                newline = nn.Parameter(values.new_full((channels,), torch.nan), requires_grad=False)
                patches.enter_context(replaced(vision.owner, image_newline=newline))
            return list(media_features(run()))


class _Everywhere:
    """The same features as every hidden state."""

    def __init__(self, features: torch.Tensor):
        self.features = features

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.features


def media_features(outputs: Any) -> Any:
    """What a media function gave, [columns, D] of each image or video: a list, a tuple or a tensor."""
    return outputs if isinstance(outputs, list) else outputs.pooler_output


def _padded(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[tiles, tokens, ...] of several tower runs as one, zeros behind the tokens of runs with fewer."""
    most = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(p, (0, 0) * (p.ndim - 2) + (0, most - p.shape[1])) for p in parts])


def cls_attention(q: torch.Tensor, k: torch.Tensor, scaling: float) -> torch.Tensor:
    """Softmax attention of the first token to all.

    Args:
        q, k: [tiles, heads, tokens, head_dim].
        scaling: of q·k.

    Returns:
        [tiles, heads, tokens], float32; float64 of float64.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (q[:, :, :1].to(dtype) @ k.to(dtype).mT * scaling).softmax(-1)[:, :, 0]


def received_attention(q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor | None, scaling: float) -> torch.Tensor:
    """Softmax attention that each token of a tile receives, mean over its tokens.

    Args:
        q, k: [heads, tokens, head_dim].
        seen: [tokens] bool, which are no padding; None: all.
        scaling: of q·k.

    Returns:
        [heads, tokens], float32 or of float64 float64; 0 at padding.
    """
    real = torch.arange(q.shape[1], device=q.device) if seen is None else seen.nonzero()[:, 0]
    columns = torch.arange(len(real), device=q.device)
    rows = rater_attention(q[:, real], k[:, real], torch.full_like(columns, len(real) - 1), columns, scaling, "raters")
    received = rows.new_zeros(len(q), q.shape[1])
    received[:, real] = rows
    return received


def _seen_keys(mask: Any, k: torch.Tensor) -> list[torch.Tensor | None]:
    """Of each tile the keys that its tokens see, [tokens] bool; all: None.

    Args:
        mask: None, [tiles, tokens] (flash attention), or [tiles, 1, tokens or 1, tokens], bool or added to logits.
        k: [tiles, ...].
    """
    if mask is None:
        return [None] * len(k)
    rows = mask if mask.ndim == 2 else mask[:, 0, 0]
    return list((rows >= 0 if rows.is_floating_point() else rows.bool()).expand(len(k), -1))
