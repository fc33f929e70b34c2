"""Images and frames to what the LLM reads: vision tower, merging of tiles, projector, pooling over time."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from . import anyres
from .config import FoveateConfig
from .projector import Projector, average_pool
from .resampler import Resampler
from .tiling import Grid, grid_levels, merge_scales, merge_tiles
from .tower import run_native_tower, run_tower

TOWER_BATCH = 32  # tiles: large enough to fill a GPU


@dataclass(frozen=True)
class VisionEncoder:
    """A model's parts that see.

    Attributes:
        tower, projector, config: the model's.
        newline: [D], what ends each row of an `anyres` map.
        tower_batch: tiles that the tower takes at a time where no gradients are wanted, which bounds its memory; None:
            all at once, as ranks need that share weights and have to call them equally often.
    """

    tower: PreTrainedModel
    projector: Projector | Resampler
    config: FoveateConfig
    newline: nn.Parameter | None
    tower_batch: int | None

    def encode_images(
        self,
        pixel_values: torch.Tensor,
        image_grids: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_queries: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """What the LLM reads of each image, [tokens, D], by tower, merging of tiles, and projector.

        Args:
            pixel_values: [tiles of all images, 3, height, width]; with tiling `native` [patches of all images, 3,
                patch, patch].
            image_grids: [images, 2], (rows, columns) of tiles (`native`: of patches) of the level that is read; None
                with tiling `resize` alone, whose every tile is an image.
            image_sizes: [images, 2], each image's own (height, width) in pixels; tiling `anyres` alone needs it.
            image_queries: [images], the tokens that projector `resampler` gives of a tile; all of them when None.

        Raises:
            ValueError: an input's shape is not as above.
        """
        _check_pixels("pixel_values", pixel_values)
        tiling = self.config.tiling
        if tiling == "native":
            maps = self._native_maps(pixel_values, _pairs("image_grids", image_grids))
            images = [tokens[None] for tokens in self.projector.forward_maps(maps)]
        elif tiling == "resize":
            features, patches = self._tower(pixel_values)
            images = list(self._in_order(self.projector(features, patches), patches).split(1))
        elif tiling == "tiles":
            grids = _pairs("image_grids", image_grids)
            counts = [
                sum(map(math.prod, grid_levels(tiling, grid, self.config.scales, self.config.thumbnail)))
                for grid in grids
            ]
            _check_tiles("image_grids", pixel_values, sum(counts))
            images = list(self.projector(*self._tower(pixel_values)).split(counts))
        elif tiling == "anyres":
            images = self._anyres(pixel_values, _pairs("image_grids", image_grids), _pairs("image_sizes", image_sizes))
        else:
            images = self._scaled(pixel_values, _pairs("image_grids", image_grids))
        return [tokens.flatten(0, 1) for tokens in _first_queries("image_queries", image_queries, images)]

    def encode_videos(
        self,
        pixel_values_videos: torch.Tensor,
        video_grids: torch.Tensor | None = None,
        video_queries: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """What the LLM reads of each video, [tokens, D]: every frame is one tile, its tokens pooled as `video_pool`.

        Without gradients the frames go through tower and projector a few at a time.

        Args:
            pixel_values_videos: [frames of all videos, 3, height, width]; with tiling `native` their patches.
            video_grids: [videos, 3], (frames, rows, columns) in tiles (`native`: in patches) a frame; None where it
                does not matter which frames are one video: not pooled over time, tiling not `native` or `anyres`, no
                numbers of queries.
            video_queries: [videos], as `image_queries`.

        Raises:
            ValueError: an input's shape is not as above.
        """
        _check_pixels("pixel_values_videos", pixel_values_videos)
        apart = self.config.tiling in ("native", "anyres") or self.config.video_pool[0] > 1
        if video_grids is None and video_queries is None and not apart:
            grids = [(len(pixel_values_videos), 1, 1)]
        else:
            grids = [(frames, rows, columns) for frames, rows, columns in _numbers("video_grids", video_grids, 3)]
        _check_tiles("video_grids", pixel_values_videos, sum(math.prod(grid) for grid in grids))
        if torch.is_grad_enabled() or self.tower_batch is None:
            videos = [self._pooled(maps) for maps in self._frame_maps(pixel_values_videos, grids)]
        else:
            runs = grids if apart else [(len(pixel_values_videos), 1, 1)]  # frames alike go through the tower together
            parts = pixel_values_videos.split([math.prod(run) for run in runs])
            videos = [self._encode_video(part, run) for part, run in zip(parts, runs, strict=True)]
            if not apart:
                videos = list(videos[0].split([grid[0] for grid in grids]))
        videos = [tokens.flatten(0, 1) for tokens in _first_queries("video_queries", video_queries, videos)]
        if self.config.tiling == "anyres":
            videos = [torch.cat([tokens, self._end_of_row()[None].to(tokens)]) for tokens in videos]
        return videos

    def _encode_video(self, pixels: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """One video's tokens [groups of frames, tokens, D], in chunks of whole groups."""
        tiles, group = grid[1] * grid[2], self.config.video_pool[0]
        chunks = pixels.split(tiles * group * max(1, (self.tower_batch or len(pixels)) // group))
        maps = (self._frame_maps(chunk, [(len(chunk) // tiles, grid[1], grid[2])])[0] for chunk in chunks)
        return joined((self._pooled(one) for one in maps), -(-grid[0] // group))

    def _frame_maps(self, pixels: torch.Tensor, grids: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Each video's tokens as maps, [frames, rows, columns, D]; [frames, tokens, 1, D] where they have no grid."""
        frames = [grid[0] for grid in grids]
        if self.config.tiling == "native":
            patches = [(rows, columns) for count, rows, columns in grids for _ in range(count)]
            projected = iter(self.projector.forward_maps(self._native_maps(pixels, patches)))
            videos = [torch.stack([next(projected) for _ in range(count)]) for count in frames]
            sizes = [(rows, columns) for _, rows, columns in grids]
        else:
            features, size = self._tower(pixels)
            features = features.repeat(1, 1, len(self.config.scales))
            videos = list(self.projector(features, size).split(frames))
            sizes = [size] * len(videos)
        return [self._as_map(tokens, size) for tokens, size in zip(videos, sizes, strict=True)]

    def _in_order(self, tokens: torch.Tensor, patches: Grid) -> torch.Tensor:
        """A tile's tokens [tiles, tokens, D] row by row, or for `token_order` columns column by column."""
        if self.config.token_order == "rows":
            return tokens
        return self._as_map(tokens, patches).transpose(1, 2).flatten(1, 2)

    def _as_map(self, tokens: torch.Tensor, patches: Grid) -> torch.Tensor:
        """[tiles, tokens, D] of tiles of (height, width) patches to [tiles, rows, columns, D]."""
        rows, columns = (-(-side // self.config.downsample_factor) for side in patches)
        return tokens.unflatten(1, (rows, columns) if tokens.shape[1] == rows * columns else (-1, 1))

    def _pooled(self, maps: torch.Tensor) -> torch.Tensor:
        """[frames, rows, columns, D] to [groups of frames, tokens, D]."""
        if self.config.tiling == "anyres":
            return anyres.pool_frames(maps.flatten(1, 2), (maps.shape[1], maps.shape[2]))
        t, h, w = self.config.video_pool
        pooled = maps if t * h * w == 1 else average_pool(maps, (t, h, w))
        return (pooled.transpose(1, 2) if self.config.token_order == "columns" else pooled).flatten(1, 2)

    def _tower(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """[tiles, 3, height, width] to ([tiles, tower tokens, C], grid in patches)."""
        if torch.is_grad_enabled() or self.tower_batch is None or len(pixel_values) <= self.tower_batch:
            return run_tower(self.tower, self.config, pixel_values)
        parts = [run_tower(self.tower, self.config, part) for part in pixel_values.split(self.tower_batch)]
        return torch.cat([features for features, _ in parts]), parts[0][1]

    def _native_maps(self, patches: torch.Tensor, grids: list[Grid]) -> list[torch.Tensor]:
        """Patches of images of any grid to their features, [rows, columns, C] each."""
        _check_tiles("image_grids", patches, sum(math.prod(grid) for grid in grids))
        if torch.is_grad_enabled() or self.tower_batch is None:
            return run_native_tower(self.tower, self.config, patches, torch.tensor(grids))
        maps, after = [], 0
        for start in range(0, len(grids), self.tower_batch):
            some = grids[start : start + self.tower_batch]
            before, after = after, after + sum(math.prod(grid) for grid in some)
            maps += run_native_tower(self.tower, self.config, patches[before:after], torch.tensor(some))
        return maps

    def _anyres(self, pixel_values: torch.Tensor, grids: list[Grid], sizes: list[Grid]) -> list[torch.Tensor]:
        """A base tile and an unpadded map with newlines; see `anyres.py`."""
        counts = [1 + math.prod(grid) for grid in grids]
        _check_tiles("image_grids", pixel_values, sum(counts))
        features, cells = self._tower(pixel_values)
        tokens = self.projector(features, cells).split(counts)
        most = self.config.anyres_max_tiles
        images = zip(tokens, grids, sizes, strict=True)
        return [anyres.pack(one, grid, size, self._end_of_row(), cells, most)[None] for one, grid, size in images]

    def _scaled(self, pixel_values: torch.Tensor, grids: list[Grid]) -> list[torch.Tensor]:
        """S²: every scale's tiles are merged to a map, the maps joined by channels, cut again, projected and merged."""
        levels = [grid_levels(self.config.tiling, grid, self.config.scales) for grid in grids]
        counts = [sum(rows * columns for rows, columns in of_image) for of_image in levels]
        _check_tiles("image_grids", pixel_values, sum(counts))
        features, patches = self._tower(pixel_values)
        maps = features.unflatten(1, patches).split(counts)
        images = zip(maps, levels, grids, strict=True)
        blocks = [merge_scales(one, of_image, grid) for one, of_image, grid in images]
        tokens = self.projector(torch.cat(blocks).flatten(1, 2), patches)
        split = tokens.split([math.prod(grid) for grid in grids])
        if self.config.projector == "resampler":  # its tokens are no map
            return list(split)
        maps = [merge_tiles(self._as_map(one, patches), grid) for one, grid in zip(split, grids, strict=True)]
        if self.config.token_order == "columns":
            maps = [one.transpose(0, 1) for one in maps]
        return [one.flatten(0, 1)[None] for one in maps]

    def _end_of_row(self) -> torch.Tensor:
        assert self.newline is not None  # a model of tiling `anyres` has one
        return self.newline


def joined(parts: Iterable[torch.Tensor], length: int) -> torch.Tensor:
    """`torch.cat` of parts that come one by one, of so many rows together; they and the whole are never held twice."""
    whole, end = None, 0
    for part in parts:
        if whole is None:
            whole = part.new_empty(length, *part.shape[1:])
        whole[end : end + len(part)] = part
        end += len(part)
    assert whole is not None and end == length
    return whole


def _check_pixels(name: str, pixels: torch.Tensor) -> None:
    if pixels.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(pixels.shape)}; accepted: [tiles, 3, height, width]")


def _check_tiles(name: str, pixels: torch.Tensor, tiles: int) -> None:
    if len(pixels) != tiles:
        raise ValueError(f"{name} tell of {tiles} tiles, but {len(pixels)} were given; both numbers must be equal")


def _pairs(name: str, numbers: torch.Tensor | None) -> list[Grid]:
    """[images, 2] as tuples."""
    return [(rows, columns) for rows, columns in _numbers(name, numbers, 2)]


def _numbers(name: str, grids: torch.Tensor | None, axes: int) -> list[list[int]]:
    if grids is None or grids.ndim != 2 or grids.shape[1] != axes:
        given = "None" if grids is None else f"of shape {tuple(grids.shape)}"
        raise ValueError(f"{name} is {given}; this model accepts [media, {axes}], as its processor gives them")
    return grids.tolist()


def _first_queries(name: str, queries: torch.Tensor | None, media: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of each of the media, [tiles, tokens, D], the tokens of the first queries of each tile."""
    if queries is None:
        return media
    if len(queries) != len(media):
        raise ValueError(f"{name} has {len(queries)} numbers for {len(media)} media; both numbers must be equal")
    return [one[:, :first] for one, first in zip(media, queries.tolist(), strict=True)]
