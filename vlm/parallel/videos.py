"""Methods that compare a video's frames, where the frames lie on several ranks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..pruning.videos import VideoMethod, similarities
from .exchange import all_to_all
from .topology import ParallelError, Topology


def drop_of_videos(
    method: VideoMethod,
    parts: Sequence[torch.Tensor],
    counts: Sequence[int],
    ranges: Sequence[Sequence[range]],
    tail: int,
    topology: Topology,
) -> list[torch.Tensor]:
    """As `mark_dropped` of whole videos: each rank gets the few frames of others that its own are compared with, and
    all ranks' similarities, one number a token. All ranks of the group call it.

    Args:
        parts: of each video that this rank has frames of, its share of the features [tokens, D].
        counts: frames of each video; groups of frames, where they are pooled.
        ranges: by rank and video, numbers of the frames that it has.
        tail: tokens after a video's last frame, which stay.

    Returns:
        The parts, NaN where the method drops them.

    Raises:
        ParallelError: on some rank features are not finite.
    """
    rank = topology.sequence_rank
    own = {video: frames for video, frames in enumerate(ranges[rank]) if frames}
    bodies = {}  # of each video, this rank's [frames, tokens, D]
    for (video, frames), part in zip(own.items(), parts, strict=True):
        end = len(part) - tail * (frames.stop == counts[video])
        bodies[video] = part[:end].unflatten(0, (len(frames), -1))
    wanted = [_wanted(method, counts, of_rank) for of_rank in ranges]
    others = _exchanged(bodies, wanted, ranges, topology)
    found = {
        video: _similarity(method, video, own[video], counts[video], body, others).cpu()
        for video, body in bodies.items()
    }
    finite = all(bool(body.isfinite().all()) for body in bodies.values())
    told: list[Any] = [None] * topology.degree
    dist.all_gather_object(told, (finite, found), group=topology.group)
    if not all(is_finite for is_finite, _ in told):
        raise ParallelError(
            f"the features of a video are not all finite, so {type(method).__name__} can't mark what it drops; "
            "accepted: finite features"
        )
    marked = []
    for (video, frames), part in zip(own.items(), parts, strict=True):
        whole = torch.cat([of_rank[video] for _, of_rank in told if video in of_rank])
        kept = method.kept(whole)[frames.start : frames.stop].flatten().to(part.device)
        body = part[: len(kept)].masked_fill(~kept[:, None], math.nan)
        marked.append(torch.cat([body, part[len(kept) :]]))
    return marked


def _wanted(method: VideoMethod, counts: Sequence[int], frames: Sequence[range]) -> list[tuple[int, int]]:
    """(video, frame) of other ranks that a rank's frames of each video are compared with."""
    wanted = set()
    for video, (count, some) in enumerate(zip(counts, frames, strict=True)):
        others = {method.compared_with(frame, count) for frame in some}
        wanted |= {(video, other) for other in others if other is not None and other not in some}
    return sorted(wanted)


def _exchanged(
    bodies: dict[int, torch.Tensor],
    wanted: Sequence[Sequence[tuple[int, int]]],
    ranges: Sequence[Sequence[range]],
    topology: Topology,
) -> dict[tuple[int, int], torch.Tensor]:
    """The frames that this rank wants of others, [tokens, D] each."""
    rank, degree = topology.sequence_rank, topology.degree
    owners = {
        (video, frame): of
        for of, of_rank in enumerate(ranges)
        for video, frames in enumerate(of_rank)
        for frame in frames
    }
    sent = [[place for place in of_rank if owners[place] == rank] for of_rank in wanted]
    coming = [[place for place in wanted[rank] if owners[place] == of] for of in range(degree)]
    rows = [bodies[video][frame - ranges[rank][video].start] for of_rank in sent for video, frame in of_rank]
    width = next((body.shape[2] for body in bodies.values()), 0)
    some = next(iter(bodies.values())) if bodies else torch.empty(0)
    assert topology.group is not None
    got = all_to_all(
        torch.cat(rows) if rows else some.new_empty(0, width),
        [sum(bodies[video].shape[1] for video, _ in of_rank) for of_rank in sent],
        [sum(bodies[video].shape[1] for video, _ in of_rank) for of_rank in coming],
        topology.group,
        "tokens",
    )
    places = [place for of_rank in coming for place in of_rank]
    return dict(zip(places, got.split([bodies[video].shape[1] for video, _ in places]), strict=True))


def _similarity(
    method: VideoMethod,
    video: int,
    frames: range,
    count: int,
    body: torch.Tensor,
    others: dict[tuple[int, int], torch.Tensor],
) -> torch.Tensor:
    """`similarities` of this rank's frames of a video, [frames, tokens]."""
    before = {frame: states for (of, frame), states in others.items() if of == video}
    numbers = [*before, *frames]
    here = torch.cat([torch.stack(list(before.values())), body]) if before else body
    compared = [None if frame not in frames else method.compared_with(frame, count) for frame in numbers]
    places = [None if other is None else numbers.index(other) for other in compared]
    return similarities(here, places)[len(before) :]
