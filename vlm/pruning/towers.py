"""Methods that drop or merge visual tokens after the vision tower, before the LLM: what they see, and how they act.

Where columns of the LLM are made of several tower tokens (space-to-depth, pixel shuffle, pooling, S²), attention and
keys are means over them, and projected features are merged; else tower tokens are merged and projected anew.
"""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from .patches import replaced
from .tower_reading import Cut, Reading, Trace, Vision, media_features


@dataclass(frozen=True)
class VisualMap:
    """What a method sees of one image or video: the columns that the LLM would read of it.

    Attributes:
        tile: [columns] int64, the tile (of a video: the frame) that a column shows most of, numbered within the image;
            of S² the one of the whole image, as far as there is one. -1 for columns that are no patches (newlines, CLS
            tokens that the model passes on): they always stay.
        attention: [layers, columns], of the layers asked for: the CLS token's attention, or in towers without one the
            mean attention that a token receives; head mean.
        keys: [columns, head_dim], head mean of the last such layer's; None unless asked for.
        gives_cls: there is a CLS token that a column can hold: each is one tower token, projected.
        cut: how the image was cut in tiles; None where it is one, or none shows the whole, or the model does not know.
    """

    tile: torch.Tensor
    attention: torch.Tensor
    keys: torch.Tensor | None
    gives_cls: bool
    cut: Cut | None

    def tiles(self) -> dict[int, torch.Tensor]:
        """The columns of each tile, [tokens] int64 ascending."""
        numbers, counts = self.tile.unique(return_counts=True)
        columns = self.tile.argsort(stable=True).split(counts.tolist())
        return {tile: some for tile, some in zip(numbers.tolist(), columns, strict=True) if tile >= 0}


@dataclass(frozen=True)
class Choice:
    """What a method makes of an image or video.

    Attributes:
        keep: [kept] int64 ascending, the columns that the LLM reads, besides those with tile -1.
        into: [columns] int64, the column to whose feature the mean of all such columns is added; -1: none.
        source: [kept] int64, the column whose feature is written to each kept one; -1: the CLS token of its tile. None:
            its own.
    """

    keep: torch.Tensor
    into: torch.Tensor | None = None
    source: torch.Tensor | None = None


class TowerPruner(ABC):
    """A method that acts after the vision tower. Subclasses are frozen dataclasses.

    Attributes:
        family: where a method acts.
        wants_keys: whether it chooses by the tower's keys too.
        reindex: whether the LLM's positions are contiguous, as if it had been given the kept tokens alone.
    """

    family: ClassVar[Literal["tower"]] = "tower"
    wants_keys: ClassVar[bool] = False
    reindex: bool

    def layers(self, read: int) -> tuple[int, ...]:
        """The tower layers, 0-based, whose attention it ranks by.

        Args:
            read: the layer whose output is projected.

        Raises:
            ValueError: the tower does not have them.
        """
        return (read,)

    @abstractmethod
    def choose(self, image: VisualMap) -> Choice:
        """Chooses of one image or video."""


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest scores [tokens], ascending; the first of equals."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def budget(tokens: int, keep: float) -> int:
    """How many of so many tokens are kept: the nearest whole number, but one where any are."""
    return max(int(keep > 0), round(keep * tokens))


def best_of_tiles(scores: torch.Tensor, image: VisualMap, keep: float) -> torch.Tensor:
    """The columns of the best scores [columns] of each tile, ascending: a fraction of its tokens."""
    chosen = [columns[best(scores[columns], budget(len(columns), keep))] for columns in image.tiles().values()]
    return torch.cat(chosen).sort().values if chosen else image.tile[:0]


def merge(tokens: torch.Tensor, into: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds to tokens the mean of those that go into them (VisionZip, arXiv 2412.04467).

    Args:
        tokens: [tokens, C].
        into: [tokens] int64, see `Choice`.

    Returns:
        Which tokens changed, [merged] int64, and what they are now, [merged, C].
    """
    members = (into >= 0).nonzero()[:, 0]
    targets, group, counts = into[members].unique(return_inverse=True, return_counts=True)
    sums = tokens.new_zeros(len(targets), tokens.shape[1]).index_add(0, group, tokens[members])
    return targets, tokens[targets] + sums / counts[:, None]


def attach(model: Any, method: TowerPruner) -> AbstractContextManager[None]:
    """While it is open, the rows that a method drops are NaN in the features that the model's media functions give.

    Features keep number and order; merged features stand in kept rows.

    Raises:
        ValueError: at once, the model, its tower, projector or tiling is none that the method works for.
    """
    vision = Vision.of(model, type(method).__name__)
    return _attached(vision, method, method.layers(vision.read_layer))


@contextmanager
def _attached(vision: Vision, method: TowerPruner, layers: tuple[int, ...]) -> Iterator[None]:
    functions = {name: _reducing(vision, method, layers, getattr(vision.owner, name)) for name in vision.functions}
    with replaced(vision.owner, **functions):
        yield


def _reducing(
    vision: Vision, method: TowerPruner, layers: tuple[int, ...], function: Callable[..., Any]
) -> Callable[..., Any]:
    """The media function, which marks what the method drops."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def reduced(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        layer = arguments.get("vision_feature_layer")
        if layer is not None and (tuple(layer) if isinstance(layer, list) else layer) != vision.feature_layer:
            raise ValueError(f"vision_feature_layer is {layer}; accepted while pruning: {vision.feature_layer}")
        reading = Reading(vision, layers, method.wants_keys)
        with reading.of_tower():
            outputs = function(*args, **kwargs)
        tokens, tower_features = reading.tokens(), reading.tower_features()
        columns = reading.columns(tokens, lambda: function(*args, **kwargs))
        media = media_features(outputs)
        reduced = []
        for index, (features, trace) in enumerate(zip(media, columns, strict=True)):
            if not bool(features.isfinite().all()):
                raise RuntimeError(f"the features of medium {index} are not finite, so none can be marked as dropped")
            own = _own_tokens(tower_features, tokens, trace)
            gives_cls = own is not None and vision.has_cls and vision.drops_cls(arguments)
            cut = vision.cut(function.__name__, arguments, index)
            image = VisualMap(_within_image(trace.tile), trace.attention, trace.keys, gives_cls, cut)
            reduced.append(_write(vision, features, image, method.choose(image), own))
        if isinstance(outputs, list):
            return reduced
        outputs.pooler_output = torch.stack(reduced) if isinstance(media, torch.Tensor) else type(media)(reduced)
        return outputs

    return reduced


def _within_image(tile: torch.Tensor) -> torch.Tensor:
    """Numbers of tiles [columns], from 0 on."""
    patches = tile >= 0
    return torch.where(patches, tile - tile[patches].min(), -1) if bool(patches.any()) else tile


def _own_tokens(
    features: torch.Tensor | None, tokens: Trace, columns: Trace
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Where every column is one tower token: that token, [columns, C], and the CLS token of its tile, [columns, C].

    Args:
        features: of all tower tokens, [tiles, tokens, C]; None where the projector does not map them one by one.
        tokens, columns: the traces of both.
    """
    if features is None or tokens.keys is None or columns.keys is None:
        return None
    patches = columns.tile >= 0
    tile, number = columns.tile.clamp(min=0), columns.number.nan_to_num().round().long()
    if not torch.equal(tokens.keys[tile, number][patches], columns.keys[patches]):
        return None
    return features[tile, number], features[tile, 0]


def _write(
    vision: Vision,
    features: torch.Tensor,
    image: VisualMap,
    choice: Choice,
    own: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Features [columns, D] as chosen, NaN where they are dropped."""
    made = features
    if choice.into is not None:
        tokens = features if own is None else own[0]
        targets, merged = merge(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), choice.into)
        made = features.clone()
        made[targets] = (merged if own is None else vision.project(merged.to(tokens))).to(made)
    written = torch.full_like(features, torch.nan)
    extra = image.tile < 0
    written[extra] = features[extra]
    source = choice.keep if choice.source is None else choice.source
    written[choice.keep] = made[source]
    places = choice.keep[source < 0]
    if len(places):
        assert own is not None
        written[places] = vision.project(own[1][places]).to(written)
    return written
