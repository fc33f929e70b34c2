"""A pack of documents that several ranks train on together: who reads which images and frames, and each rank's batch.

Every rank of a sequence group plans all documents of the pack, and reads and encodes a contiguous run of its images
and frames: the split in two stages of LongVILA (arXiv 2408.10188, section 3.3), with the media shared by the pixels
they take instead of by their number.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from ..vlm.media import DEFAULT_LIMITS, MediaLimits
from ..vlm.parallel.plan import Route, SequencePlan, route, shift_labels, split_by_cost
from ..vlm.parallel.topology import Topology
from ..vlm.planning import MediaTiles
from ..vlm.processor import FoveateProcessor
from .document import DocumentError
from .encoding import IGNORE, PlannedSample, naming
from .packing import Batch

Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")


class SequenceMismatchError(RuntimeError):
    """Ranks that share their sequences read different documents; the message names the first one."""


@dataclass(frozen=True)
class Part:
    """An image, or consecutive frames of a video (whole groups of `video_pool[0]` frames, but for the video's end).

    Attributes:
        document: its number in the pack.
        kind: `image` or `video`.
        number: of the image or the video, in its document.
        frames: of a video, those of the planned ones; of an image empty.
        pixels: that are encoded.
        tokens: that the LLM reads of it.
    """

    document: int
    kind: Kind
    number: int
    frames: range
    pixels: int
    tokens: int


@dataclass(frozen=True)
class SequenceBatch:
    """What a rank needs besides tensors, to be one of those that share a pack.

    Attributes:
        plan: who holds which token.
        routes: of the visual tokens of each kind of media; None where the whole pack has none of that kind.
        video_tokens: of each run of frames of this rank, how many of its encoded tokens the LLM reads. With tiling
            `anyres` the newline after a run is left over where the video goes on in another rank.
    """

    plan: SequencePlan
    routes: Mapping[Kind, Route | None]
    video_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """What this rank has read of a pack.

    Attributes:
        shares: of each rank of the group, the parts that it reads.
        tiles: uint8 [tiles, height, width, 3] of each part of this rank.
        unread: documents, by number, of which a part can't be read.
    """

    shares: list[list[Part]]
    tiles: list[np.ndarray]
    unread: Mapping[int, DocumentError]


def media_units(samples: Sequence[PlannedSample], group: int) -> list[Part]:
    """The least that a rank encodes, in order: an image, or a group of so many frames."""
    units = []
    for document, sample in enumerate(samples):
        plan = sample.planned.plan
        for number, image in enumerate(plan.images):
            pixels = image.tiles * image.tile[0] * image.tile[1]
            units.append(Part(document, "image", number, range(0), pixels, image.tokens))
        for number, video in enumerate(plan.videos):
            pixels, ends = video.size[0] * video.size[1], range(group, video.frames + group, group)
            rest = video.tokens - video.tokens_per_group * len(ends)  # a newline after the last group
            for end in ends:
                frames = range(end - group, min(end, video.frames))
                tokens = video.tokens_per_group + (rest if end == ends[-1] else 0)
                units.append(Part(document, "video", number, frames, pixels * len(frames), tokens))
    return units


def share_units(units: Sequence[Part], ranks: int) -> list[list[Part]]:
    """The parts that each rank reads: contiguous, of about as many pixels; consecutive frames of a video are one."""
    return [_joined(units[run.start : run.stop]) for run in split_by_cost([unit.pixels for unit in units], ranks)]


def _joined(units: Sequence[Part]) -> list[Part]:
    parts: list[Part] = []
    for unit in units:
        last = parts[-1] if parts else None
        if last and unit.kind == "video" and _medium(last) == _medium(unit):
            frames = range(last.frames.start, unit.frames.stop)
            unit = replace(unit, frames=frames, pixels=last.pixels + unit.pixels, tokens=last.tokens + unit.tokens)
            parts.pop()
        parts.append(unit)
    return parts


def _medium(part: Part) -> tuple[int, Kind, int]:
    return part.document, part.kind, part.number


class SequenceCollate:
    """Makes a pack's batch for this rank, in two steps, since between them all ranks agree on what can't be read.

    Args:
        processor: reads media.
        topology: this rank among those that share the pack.
        limits: see `media.py`.
        threads: that read media.
    """

    def __init__(
        self,
        processor: FoveateProcessor,
        topology: Topology,
        limits: MediaLimits = DEFAULT_LIMITS,
        threads: int = 1,
    ):
        self.processor, self.topology, self.limits, self.threads = processor, topology, limits, threads

    def plan(self, lengths: Sequence[int]) -> SequencePlan:
        """Of documents of so many tokens; of a token of padding where there is none."""
        return SequencePlan(tuple(lengths) or (1,), self.topology.ulysses, self.topology.ring)

    def read(self, samples: Sequence[PlannedSample]) -> Reading:
        """Reads this rank's parts of a pack, and nothing else."""
        units = media_units(samples, self.processor.video_pool[0])
        shares = share_units(units, self.topology.degree)
        own = shares[self.topology.sequence_rank]
        with ThreadPoolExecutor(self.threads) as pool:  # a new one each time: no thread is left where workers fork
            tiles = list(pool.map(lambda part: self._tiles(samples[part.document], part), own))
        unread: dict[int, DocumentError] = {}
        for part, found in zip(own, tiles, strict=True):
            if isinstance(found, DocumentError):
                unread.setdefault(part.document, found)
        return Reading(shares, [np.empty(0) if isinstance(one, DocumentError) else one for one in tiles], unread)

    def _tiles(self, sample: PlannedSample, part: Part) -> np.ndarray | DocumentError:
        try:
            with naming(sample.key):
                if part.kind == "image":
                    return self.processor.read_image(sample.planned, part.number, self.limits)
                return self.processor.read_frames(sample.planned, part.number, part.frames, self.limits)
        except DocumentError as error:
            return error

    def __call__(self, samples: Sequence[PlannedSample], reading: Reading, without: Collection[int] = ()) -> Batch:
        """The batch of this rank.

        Args:
            samples: the pack.
            reading: what `read` gave for it.
            without: documents, by number, that are left out. The others' parts stay with the ranks that read them.

        Returns:
            `inputs`: `input_ids`, `position_ids` and `targets` (shifted labels) int64 [1, local tokens]; of this rank's
            parts what `FoveateProcessor.media_inputs` gives, pixels raw; and `sequence`, a `SequenceBatch`. All else is
            of the whole pack.
        """
        kept = [sample for number, sample in enumerate(samples) if number not in without]
        shares = [[part for part in share if part.document not in without] for share in reading.shares]
        rank, padding = self.topology.sequence_rank, self.processor.tokenizer.pad_token_id or 0
        plan = self.plan([sample.tokens for sample in kept])
        ids = np.concatenate([sample.input_ids for sample in kept] or [np.array([padding])])
        labels = np.concatenate([sample.labels for sample in kept] or [np.array([IGNORE])])
        targets = shift_labels(torch.from_numpy(labels), plan.lengths)
        parts = zip(reading.shares[rank], reading.tiles, strict=True)
        own = [(part, tiles) for part, tiles in parts if part.document not in without]
        inputs: dict[str, Any] = {
            "input_ids": plan.shard(torch.from_numpy(ids)[None], rank, padding),
            "position_ids": torch.from_numpy(plan.positions(rank))[None],
            "targets": plan.shard(targets[None], rank, IGNORE),
            **self.processor.media_inputs([_part_tiles(samples[part.document], part, t) for part, t in own], True),
            "sequence": SequenceBatch(
                plan,
                {kind: self._route(plan, kind, ids, shares) for kind in KINDS},
                tuple(part.tokens for part, _ in own if part.kind == "video"),
            ),
        }
        return Batch(
            inputs,
            tuple(sample.key for sample in kept),
            tuple(sample.tokens for sample in kept),
            tuple(sample.tiles for sample in kept),
            sum(sample.loss_tokens for sample in kept),
        )

    def _route(self, plan: SequencePlan, kind: Kind, ids: np.ndarray, shares: list[list[Part]]) -> Route | None:
        """Where the visual tokens of a kind go; None where there are none."""
        placeholder = self.processor.image_token_id if kind == "image" else self.processor.video_token_id
        places = np.flatnonzero(ids == placeholder)
        counts = [sum(part.tokens for part in share if part.kind == kind) for share in shares]
        return route(plan, places, counts, self.topology.sequence_rank) if len(places) or any(counts) else None


def _part_tiles(sample: PlannedSample, part: Part, tiles: np.ndarray) -> MediaTiles:
    """A part as a text's media."""
    media, nothing = sample.planned, np.empty((0, 1, 1, 3), np.uint8)
    queries = media.plan.image_tiling.tokens_per_tile
    if part.kind == "video":
        grid = (len(part.frames), *media.plan.videos[part.number].grid)
        return MediaTiles(nothing, tiles, video_grids=np.array([grid], np.int64), queries=queries)
    grids = np.array([media.plan.images[part.number].grid], np.int64)
    return MediaTiles(tiles, nothing, grids, np.array([media.sizes[part.number]], np.int64), queries=queries)
