"""`sequence_parallel`: answers about one long sequence by several ranks (LongVILA, arXiv 2408.10188, section 3.3.3).

    with sequence_parallel(model, make_topology(ulysses=2, ring=2)) as m:
        m.generate(**inputs)

Each rank encodes a share of the images and frames, the prompt's tokens are prefilled as in training, and their keys and
values stay where they were computed (`cache.py`). No rank ever holds the embeddings of all tokens. All ranks of the
group make the same calls with the same ids, and get the same results.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..cache.parse import KVSpec
from ..config import FoveateConfig
from ..model import IMAGE_INPUTS, VIDEO_INPUTS, FoveateForConditionalGeneration
from ..pruning.base import Prefill, Stage
from ..pruning.patches import replaced
from ..pruning.videos import whole_video
from ..tiling import grid_levels
from .attention import SharedSequence, sequence_attention
from .cache import LaterTokens, ShardedCache, check_kv
from .exchange import exchange_tokens
from .plan import SequencePlan, route, split_by_cost
from .topology import ParallelError, Topology
from .videos import drop_of_videos

KINDS = ("image", "video")
GENERATE_ACCEPTED: dict[str, tuple[Any, ...]] = {  # what would part the ranks, or needs a batch
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "max_time": (None,),
    "use_cache": (None, True),
    "cache_implementation": (None,),
    "prefill_chunk_size": (None,),
    "assistant_model": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
FORWARD_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "labels": (None,),
    "inputs_embeds": (None,),
    "use_cache": (None, True),
    "return_dict": (None, True),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}


@contextmanager
def sequence_parallel(model: Any, topology: Topology) -> Iterator[Any]:
    """Lets the ranks of a sequence group answer together, in a `with` block.

    Within, `generate` and calls of the model are made by all ranks of the group, for one sequence at a time and with
    the same `input_ids`. Pixels are given whole, and each rank encodes its share; `image_features` and `video_features`
    that are given are this rank's share of the tokens, the first rank's first. Samples are drawn alike, as the ranks
    get the random state of the group's first. In `foveate.reduce`, before or after it, methods that act after the
    tower drop tokens before they are shared out.

    Args:
        model: Foveate's own.
        topology: of one rank: nothing is changed.

    Yields:
        The model.

    Raises:
        ParallelError: the model, a pruning method, a KV cache, or what is asked of `generate` is none that several
            ranks can work on; the message says what is accepted. The placeholders don't fit the tokens of all ranks.
    """
    if topology.degree == 1:
        yield model
        return
    with _Session(model, topology).open():
        yield model


def parallel_session(model: Any) -> "_Session | None":
    """What `sequence_parallel` has opened on the model; None otherwise."""
    return getattr(model, "_foveate_parallel", None)


@contextmanager
def together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """What fails on a rank within the block fails on all ranks of the group; each enters it.

    Args:
        group: None: all processes.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    told: list[Any] = [None] * dist.get_world_size(group)
    own = None if failed is None else (isinstance(failed, ValueError | OSError), str(failed) or type(failed).__name__)
    dist.all_gather_object(told, own, group=group)
    if failed is not None:
        raise failed
    for rank, one in enumerate(told):
        if one is not None:
            mendable, message = one
            raise (ParallelError if mendable else RuntimeError)(f"rank {rank}: {message}")


# Who encodes what.


@dataclass(frozen=True)
class Share:
    """What a rank encodes: images and frames, each a run of all of them.

    Attributes:
        images: numbers of images.
        frames: of each video, numbers of frames; whole groups of frames that are pooled.
    """

    images: range
    frames: tuple[range, ...]


def shares(image_costs: Sequence[float], videos: Sequence[tuple[int, float]], group: int, degree: int) -> list[Share]:
    """What each rank encodes: runs of images and groups of frames of as equal costs as can be.

    Args:
        image_costs: of each image.
        videos: of each, its frames and the cost of one.
        group: frames that are pooled together.
        degree: ranks.
    """
    groups = [-(-frames // group) for frames, _ in videos]
    costs = list(image_costs)
    for (frames, cost), count in zip(videos, groups, strict=True):
        costs += [cost * min(group, frames - number * group) for number in range(count)]
    starts = list(accumulate(groups, initial=len(image_costs)))

    def of(units: range) -> Share:
        images = range(min(units.start, len(image_costs)), min(units.stop, len(image_costs)))
        frames = []
        for (count, _), start, many in zip(videos, starts, groups, strict=False):
            first, last = (min(max(edge - start, 0), many) * group for edge in (units.start, units.stop))
            frames.append(range(min(first, count), min(last, count)))
        return Share(images, tuple(frames))

    return [of(units) for units in split_by_cost(costs, degree)]


def image_rows(config: FoveateConfig, pixels: torch.Tensor, grids: torch.Tensor | None) -> list[int]:
    """How many rows of `pixel_values` each image takes."""
    if config.tiling == "resize" or grids is None:
        return [1] * len(pixels)
    if config.tiling == "anyres":
        return [1 + rows * columns for rows, columns in grids.tolist()]
    return [
        sum(math.prod(level) for level in grid_levels(config.tiling, (rows, columns), config.scales, config.thumbnail))
        for rows, columns in grids.tolist()
    ]


def own_images(config: FoveateConfig, inputs: dict[str, Any], images: range) -> dict[str, Any]:
    """The inputs of some of the images; empty where there are none."""
    if not images:
        return {}
    pixels = inputs["pixel_values"]
    starts = list(accumulate(image_rows(config, pixels, inputs.get("image_grids")), initial=0))
    rest = {name: inputs[name] for name in IMAGE_INPUTS[1:] if inputs.get(name) is not None}
    taken = {name: given[images.start : images.stop] for name, given in rest.items()}
    return {"pixel_values": pixels[starts[images.start] : starts[images.stop]]} | taken


def encode_frames(
    model: Any, inputs: dict[str, Any], frames: Sequence[range], counts: Sequence[int]
) -> list[torch.Tensor]:
    """What the LLM reads of some frames of each video, [tokens, D] of each video that has any.

    Args:
        inputs: `pixel_values_videos` and the like of all frames of all videos.
        frames: of each video, whole groups of those that are pooled.
        counts: frames of each video.
    """
    grids = inputs.get("video_grids")
    cells = [1] * len(counts) if grids is None else grids[:, 1:].prod(1).tolist()
    starts = list(accumulate((count * cell for count, cell in zip(counts, cells, strict=True)), initial=0))
    encoded = []
    for number, (some, cell) in enumerate(zip(frames, cells, strict=True)):
        if not some:
            continue
        rows = slice(starts[number] + some.start * cell, starts[number] + some.stop * cell)
        part = {"pixel_values_videos": inputs["pixel_values_videos"][rows]}
        if grids is not None:
            part["video_grids"] = torch.tensor([[len(some), *grids[number, 1:].tolist()]])
        if inputs.get("video_queries") is not None:
            part["video_queries"] = inputs["video_queries"][number : number + 1]
        [tokens] = model.encode_videos(**part)
        newline = model.config.tiling == "anyres" and some.stop < counts[number]  # it ends the whole video alone
        encoded.append(tokens[:-1] if newline else tokens)
    return encoded


@dataclass(frozen=True)
class _Told:
    """What a rank tells the others before a prompt is shared.

    Attributes:
        kept: of each kind of media, bool of each token that it encoded, whether it stays.
        prompt: how many ids it was given, and their checksum.
    """

    kept: dict[str, np.ndarray]
    prompt: tuple[int, int]


class _Session:
    """See `sequence_parallel`."""

    def __init__(self, model: Any, topology: Topology):
        if not isinstance(model, FoveateForConditionalGeneration):
            raise ParallelError(f"the model is a {type(model).__name__}; accepted: FoveateForConditionalGeneration")
        self.model: Any = model
        self.topology = topology
        self._logits: Callable[[torch.Tensor], torch.Tensor] | None = None  # of all ranks, from this one's

    @contextmanager
    def open(self) -> Iterator[None]:
        model: Any = self.model
        if parallel_session(model) is not None:
            raise ParallelError("sequence_parallel is open on this model; accepted: once")
        self._check_reduction()
        with ExitStack() as stack:
            stack.enter_context(sequence_attention(model, self.topology.ulysses))
            generate = partial(self._generate, model.generate)
            stack.enter_context(replaced(model, _foveate_parallel=self, generate=generate))
            stack.callback(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(self._after).remove)
            yield

    def new_cache(self, kv: KVSpec | None = None) -> ShardedCache:
        """A KV cache for a new sequence."""
        return ShardedCache(len(self.model.get_decoder().layers), self.topology, kv)

    def share(self, image_costs: Sequence[float], videos: Sequence[tuple[int, float]]) -> Share:
        """What this rank encodes; see `shares`."""
        group = self.model.config.video_pool[0]
        return shares(image_costs, videos, group, self.topology.degree)[self.topology.sequence_rank]

    def drop(
        self, parts: Sequence[torch.Tensor], image_costs: Sequence[float], videos: Sequence[tuple[int, float]]
    ) -> list[torch.Tensor]:
        """What a method that compares a video's frames drops of what the ranks encoded is NaN; all ranks call it.

        Args:
            parts: this rank's share of each video that it has frames of, [tokens, D].
            image_costs, videos: as given to `share`.
        """
        reduction = self._check_reduction()
        methods = [] if reduction is None else [one for one in reduction.methods if one.family == "video"]
        if not methods:
            return list(parts)
        config, group = self.model.config, self.model.config.video_pool[0]
        everyone = shares(image_costs, videos, group, self.topology.degree)
        tail = int(config.tiling == "anyres")
        counts = [-(-frames // group) for frames, _ in videos]
        ranges = [
            [range(some.start // group, -(-some.stop // group)) if some else range(0) for some in one.frames]
            for one in everyone
        ]
        return drop_of_videos(methods[0], parts, counts, ranges, tail, self.topology)

    def _check_reduction(self) -> Any:
        """The reduction that is open, or None.

        Raises:
            ParallelError: it has methods that several ranks can't work on.
        """
        reduction = getattr(self.model, "_foveate_reduction", None)
        for method in reduction.methods if reduction is not None else ():
            if method.family == "llm":
                raise ParallelError(
                    f"{type(method).__name__} drops tokens between the LLM's layers, where they lie on several ranks; "
                    "accepted under sequence parallelism: VisionZip, FasterVLM, VTCCLS, HiRED, EVS, DyCoke"
                )
        if reduction is not None and reduction.kv is not None:
            check_kv(reduction.kv)
        return reduction

    # generate

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, with one random state."""
        config = kwargs.get("generation_config") or self.model.generation_config
        _check_options(
            {name: kwargs.get(name, getattr(config, name, None)) for name in GENERATE_ACCEPTED}, GENERATE_ACCEPTED
        )
        if kwargs.get("past_key_values") is None:
            reduction = self._check_reduction()
            kwargs["past_key_values"] = self.new_cache(None if reduction is None else reduction.kv)
        self._share_random_state()
        return generate(*args, **kwargs)

    def _share_random_state(self) -> None:
        """Gives all ranks of the group the random state of the first."""
        device = self.model.device
        states = [(torch.get_rng_state, torch.set_rng_state)]
        if device.type == "cuda":
            states.append((partial(torch.cuda.get_rng_state, device), partial(torch.cuda.set_rng_state, device=device)))
        for get, put in states:
            state = get().to(device)
            dist.broadcast(state, self.topology.first, group=self.topology.group)
            put(state.cpu())

    # A pass of the model.

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Shares out a prompt, or lets later tokens be attended to by all ranks."""
        kwargs = dict(zip(("input_ids", "attention_mask", "position_ids"), args, strict=False)) | kwargs
        _check_options({name: kwargs.get(name) for name in FORWARD_ACCEPTED}, FORWARD_ACCEPTED)
        ids, mask, cache = (kwargs.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        if len(args) > 3 or ids is None or len(ids) != 1:
            given = "None" if ids is None else f"of shape {tuple(ids.shape)}"
            raise ParallelError(f"input_ids is {given}; accepted under sequence parallelism: [1, tokens]")
        if mask is not None and (mask.ndim != 2 or not bool(mask.all())):
            raise ParallelError("attention_mask has padding; accepted under sequence parallelism: a mask of ones, None")
        if cache is None:
            reduction = self._check_reduction()
            cache = self.new_cache(None if reduction is None else reduction.kv)
        if not isinstance(cache, ShardedCache):
            raise ParallelError(
                f"past_key_values is a {type(cache).__name__}; accepted under sequence parallelism: None, ShardedCache"
            )
        past = cache.get_seq_length()
        order = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        positions = kwargs.get("position_ids")
        if positions is not None and not torch.equal(positions.to(order), order):
            raise ParallelError(f"position_ids are others than {past}, …; accepted under sequence parallelism: None")
        kwargs |= {"past_key_values": cache, "attention_mask": None, "use_cache": True}
        if past:
            media = [name for name in _media_names() if kwargs.get(name) is not None]
            if media:
                raise ParallelError(
                    f"{', '.join(media)} with a KV cache that holds {past} tokens; accepted under sequence "
                    "parallelism: media in the first prompt"
                )
            kwargs |= {"position_ids": order, "sequence": LaterTokens()}
            self._logits = self._first_ranks
            return (), kwargs
        return (), self._share_prompt(ids, cache, kwargs)

    def _after(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """The logits of all ranks in place of this one's."""
        complete, self._logits = self._logits, None
        if complete is not None:
            output.logits = complete(output.logits)
        return output

    def _first_ranks(self, logits: torch.Tensor) -> torch.Tensor:
        """The group's first rank's logits: these are all the same, but for the last bit."""
        logits = logits.contiguous()
        dist.broadcast(logits, self.topology.first, group=self.topology.group)
        return logits

    # A prompt.

    def _share_prompt(self, ids: torch.Tensor, cache: ShardedCache, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the pass over this rank's part of a prompt."""
        topology, rank, tokens = self.topology, self.topology.sequence_rank, ids.shape[1]
        reduction = self._check_reduction()
        with together(topology.group):
            costs, videos = self._costs(kwargs)
            parts = self._encode(kwargs, self.share(costs, videos))
        if videos:
            parts["video"] = self.drop(parts["video"], costs, videos)
        embeddings = self.model.get_input_embeddings().weight
        nothing = embeddings.new_empty(0, embeddings.shape[1])
        features = {kind: torch.cat(of_kind) if of_kind else nothing for kind, of_kind in parts.items()}
        told: list[Any] = [None] * topology.degree
        row = ids[0].cpu().numpy()
        kept = {kind: (~some[:, 0].isnan()).cpu().numpy() for kind, some in features.items()}
        dist.all_gather_object(told, _Told(kept, (tokens, zlib.crc32(row.tobytes()))), group=topology.group)
        places = {kind: (row == getattr(self.model.config, f"{kind}_token_id")).nonzero()[0] for kind in KINDS}
        stays = _which_stay(tokens, places, told)
        staying = stays.nonzero()[0]
        plan = SequencePlan((len(staying),), topology.ulysses, topology.ring)
        own = plan.places(rank)  # among those that stay
        local = staying[own[own >= 0]]  # in the prompt
        for kind, of_kind in places.items():
            kwargs.pop(f"{kind}_features", None)
            for name in IMAGE_INPUTS if kind == "image" else VIDEO_INPUTS:
                kwargs.pop(name, None)
            if len(of_kind):
                here = np.searchsorted(staying, of_kind[stays[of_kind]])
                counts = [int(one.kept[kind].sum()) for one in told]
                some = features[kind][torch.from_numpy(kept[kind]).to(features[kind].device)]
                assert topology.group is not None
                kwargs[f"{kind}_features"] = exchange_tokens(some, route(plan, here, counts, rank), topology.group)
        text = next((token for token in row.tolist() if token not in self._media_ids()), 0)  # for padding
        reindexed = reduction is not None and any(method.reindex for method in reduction.methods)
        positions = np.arange(tokens - len(staying), tokens) if reindexed else staying  # up to the last one's own
        order = np.full(plan.local_tokens, tokens, dtype=np.int64)  # padding comes after
        order[: len(local)] = positions[own[own >= 0]]
        given = np.full(plan.local_tokens, text, dtype=np.int64)
        given[: len(local)] = row[local]
        cache.expect(local, tokens)
        if reduction is not None and reduction.methods and any(len(some) for some in places.values()):
            self._record(reduction, stays, places)
        asked = np.arange(tokens)[_kept_logits(kwargs.get("logits_to_keep", 0))]
        kwargs |= {
            "input_ids": torch.from_numpy(given).to(ids)[None],
            "position_ids": torch.from_numpy(order).to(ids)[None],
            "sequence": SharedSequence(plan, topology, ids.device),
            "logits_to_keep": self._local_logits(asked, local, ids.device),
        }
        return kwargs

    def _costs(self, kwargs: dict[str, Any]) -> tuple[list[float], list[tuple[int, float]]]:
        """Of each image that is given as pixels, and of each video its frames and that of one."""
        images: list[float] = []
        videos: list[tuple[int, float]] = []
        if (pixels := kwargs.get("pixel_values")) is not None:
            area = math.prod(pixels.shape[-2:])
            images = [area * rows for rows in image_rows(self.model.config, pixels, kwargs.get("image_grids"))]
        if (frames := kwargs.get("pixel_values_videos")) is not None:
            grids, area = kwargs.get("video_grids"), math.prod(frames.shape[-2:])
            shapes = [(len(frames), 1, 1)] if grids is None else grids.tolist()
            videos = [(count, height * width * area) for count, height, width in shapes]
        return images, videos

    def _encode(self, kwargs: dict[str, Any], share: Share) -> dict[str, list[torch.Tensor]]:
        """What this rank gives of each kind of media, parts of [tokens, D]."""
        model = self.model
        parts: dict[str, list[torch.Tensor]] = {
            kind: [kwargs[f"{kind}_features"]] if kwargs.get(f"{kind}_features") is not None else [] for kind in KINDS
        }
        with torch.no_grad():
            if share.images:
                parts["image"] += model.encode_images(**own_images(model.config, kwargs, share.images))
            if share.frames:
                counts = [count for count, _ in self._costs(kwargs)[1]]
                with whole_video(model):  # what is dropped of videos, `drop` says
                    parts["video"] += encode_frames(model, kwargs, share.frames, counts)
        return parts

    def _media_ids(self) -> tuple[int | None, ...]:
        return tuple(getattr(self.model.config, f"{kind}_token_id") for kind in KINDS)

    def _local_logits(self, asked: np.ndarray, local: np.ndarray, device: torch.device) -> torch.Tensor:
        """Which of the local tokens' logits this rank computes, int64 [some], of those that are asked for.

        Args:
            asked: [asked], tokens of the prompt.
            local: [tokens], those that are here.
        """
        here = np.isin(asked, local)
        own = np.searchsorted(local, asked[here])

        def complete(logits: torch.Tensor) -> torch.Tensor:
            """[1, asked, vocabulary], all but one rank's share of a row being 0."""
            dtype = torch.promote_types(logits.dtype, torch.float32)
            whole = logits.new_zeros(1, len(asked), logits.shape[-1], dtype=dtype)
            whole[:, torch.from_numpy(here).to(logits.device)] = logits[:, : len(own)].to(dtype)
            dist.all_reduce(whole, group=self.topology.group)
            return whole.to(logits.dtype)

        self._logits = complete
        return torch.from_numpy(own if len(own) else np.zeros(1, dtype=np.int64)).to(device)  # at least one

    def _record(self, reduction: Any, stays: np.ndarray, places: dict[str, np.ndarray]) -> None:
        """Tells the reduction what was processed of the prompt, by all ranks together."""
        visual = np.sort(np.concatenate(list(places.values())))
        left = torch.from_numpy(stays[visual].nonzero()[0])
        text, layers = len(stays) - len(visual), len(self.model.get_decoder().layers)
        stages = (Stage(0, (left,), (0,)),) if len(left) < len(visual) else ()
        reduction.prefills.append(Prefill((0,), (text,), (len(visual),), ((len(left),),) * layers, stages))


def _which_stay(tokens: int, places: dict[str, np.ndarray], told: Sequence[_Told]) -> np.ndarray:
    """Which of a prompt's tokens are prefilled, bool [tokens].

    Args:
        places: of each kind of media, where its placeholders are.
        told: by each rank.

    Raises:
        ParallelError: the ranks' prompts differ, or the placeholders are not as many as the encoded tokens.
    """
    if len({one.prompt for one in told}) > 1:
        lengths = [one.prompt[0] for one in told]
        raise ParallelError(f"the ranks were given different prompts, of {lengths} tokens; accepted: the same one")
    stays = np.ones(tokens, dtype=bool)
    for kind, of_kind in places.items():
        of_ranks = np.concatenate([one.kept[kind] for one in told])
        if len(of_ranks) != len(of_kind):
            raise ParallelError(
                f"the text holds {len(of_kind)} {kind} placeholder tokens, but the ranks' shares of the {kind} "
                f"features are of {[len(one.kept[kind]) for one in told]} tokens; accepted: as many in all"
            )
        stays[of_kind] = of_ranks
    if not stays[-1]:
        raise ParallelError("the prompt ends with a visual token that was dropped; accepted: text at its end")
    return stays


def _media_names() -> tuple[str, ...]:
    return (*IMAGE_INPUTS, *VIDEO_INPUTS, *(f"{kind}_features" for kind in KINDS))


def _kept_logits(wanted: int | torch.Tensor) -> Any:
    """`logits_to_keep`, as an index of the prompt's tokens."""
    return slice(-wanted, None) if isinstance(wanted, int) else wanted.cpu().numpy()


def _check_options(given: dict[str, Any], accepted: dict[str, tuple[Any, ...]]) -> None:
    for name, value in given.items():
        if not any(value is one or (isinstance(value, int) and value == one) for one in accepted[name]):
            wanted = ", ".join(map(str, accepted[name]))
            shown = value if isinstance(value, int | float | str) else f"a {type(value).__name__}"
            raise ParallelError(f"{name} is {shown}; accepted under sequence parallelism: {wanted}")
