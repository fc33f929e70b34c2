"""`foveate bench data`: the loader against bare webdataset on the same shards, what restoring takes, and packing.

Both read, decode and tokenize with the same code; the loader also packs and collates. They take turns, so that what
else the machine does hits both.
"""

import io
import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from ..data.document import Document, Image, Video
from ..data.encoding import Sample, encode
from ..data.loader import CHUNK, Loader, Packing
from ..data.mixture import Mixture
from ..data.packing import collate
from ..data.shards import Member
from ..data.sources import ShardSource, open_source
from ..eval.facts import result
from ..vlm.config import FoveateConfig
from ..vlm.processor import FoveateProcessor
from .bench import SHAPES, MadeUp
from .flops import ModelFlops

SHARD_DOCUMENTS = 200
ROUNDS = 5  # of each of the two
PREFETCH = 4  # chunks that a worker is ahead
RESTORES = 5  # at each of the two positions
PLACES = (0.01, 0.9)  # of an epoch
ROW_TOKENS, ROW_TILES = 8192, 64
GROUPS, PACKED_STEPS = 8, 100
WORDS = (
    "a", "the", "of", "on", "in", "with", "and", "two", "three", "small", "large", "red", "green", "blue", "white",
    "black", "dog", "cat", "person", "bird", "car", "street", "table", "house", "tree", "water", "mountain", "bridge",
    "train", "plate", "window", "sitting", "standing", "holding", "walking", "next", "behind", "under", "photo", "view",
)  # fmt: skip


@dataclass(frozen=True)
class DataBench:
    """What `bench_data` measures.

    Args:
        shards: as `open_source` takes them; None makes some for the time of the run.
        documents: how many are made.
        workers: processes of each loader.
        seconds: that each of the two is measured, over all rounds.
        restore: whether restoring is measured.
    """

    shards: str | None = None
    documents: int = 1000
    workers: int = 2
    seconds: float = 10.0
    restore: bool = False


def bench_processor() -> FoveateProcessor:
    """Images of 448 pixels, as NVILA-Lite has them, and a byte-level tokenizer trained on the captions' words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    return FoveateProcessor(tokenizer, image_size=(448, 448), patch_size=14, downsample_factor=3)


def make_bench_shards(folder: Path, documents: int) -> None:
    """Shards of JPEG photographs (640×480, made of noise at several scales) with captions, every fourth with a chat."""
    from webdataset import TarWriter

    rng = np.random.default_rng(0)
    pictures = [_photo(rng) for _ in range(32)]
    for first in range(0, documents, SHARD_DOCUMENTS):
        with TarWriter(str(folder / f"shard-{first // SHARD_DOCUMENTS:06d}.tar"), mtime=0) as writer:
            for number in range(first, min(documents, first + SHARD_DOCUMENTS)):
                picture = pictures[number % len(pictures)]
                if number % 4:
                    record = {"txt": _sentence(rng, 10, 60)}
                else:
                    turns = []
                    for turn in range(int(rng.integers(1, 6))):
                        asked = "<image>\n" * (turn == 0) + _sentence(rng, 5, 15)
                        turns += [
                            {"from": "human", "value": asked},
                            {"from": "gpt", "value": _sentence(rng, 10, 120)},
                        ]
                    record = {"json": json.dumps({"image": "jpg", "conversations": turns})}
                writer.write({"__key__": f"{number:08d}", "jpg": picture} | record)


def _photo(rng: np.random.Generator) -> bytes:
    """A JPEG of about the size that a photograph has, 640×480."""
    pixels = np.full((480, 640, 3), 128.0)
    for side in (4, 16, 64, 160):
        coarse = PILImage.fromarray(rng.integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8))
        pixels += (np.asarray(coarse.resize((640, 480), PILImage.Resampling.BICUBIC), float) - 128) * 2 / side**0.5
    buffer = io.BytesIO()
    PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _sentence(rng: np.random.Generator, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(least, most))))


def bench_data(bench: DataBench, show: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Measures the loader; results as of `eval.facts.result`.

    Raises:
        ValueError: the shards can't be read, or something else than shards lies there.
    """
    processor = bench_processor()
    with _shards(bench, show) as path:
        source = open_source(path, processor)
        if not isinstance(source, ShardSource):
            raise ValueError(f"{path}: no tar shards; accepted: what webdataset reads too")
        results = _against_webdataset(bench, source, processor, show)
        if bench.restore:
            results += _restore(bench, source, processor, show)
    show("packing")
    return results + packing_results(PACKED_STEPS)


@contextmanager
def _shards(bench: DataBench, show: Callable[[str], None]) -> Iterator[str]:
    if bench.shards is not None:
        yield bench.shards
        return
    with tempfile.TemporaryDirectory(prefix="foveate-bench-") as folder:
        show(f"writing {bench.documents} documents")
        make_bench_shards(Path(folder), bench.documents)
        yield folder


# Speed


class _FromShards:
    """What bare webdataset gives, encoded: in a worker."""

    def __init__(self, source: ShardSource, processor: FoveateProcessor):
        self.source, self.processor = source, processor

    def __call__(self, raw: dict[str, Any]) -> Sample:
        key = raw["__key__"]
        members = {name: Member(f"{key}.{name}", data) for name, data in raw.items() if not name.startswith("__")}
        return encode(self.source.document_of(key, members), self.processor)


def _webdataset_documents(source: ShardSource, processor: FoveateProcessor, workers: int) -> Generator[int, None, None]:
    """Numbers of documents as they come out of webdataset in a torch DataLoader, without end."""
    import webdataset

    urls = [shard.path for shard in source.shards.shards]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None, empty_check=False)
        .map(_FromShards(source, processor))
        .repeat()
        .batched(CHUNK, collation_fn=list)
    )
    loading: dict[str, Any] = {"prefetch_factor": PREFETCH} if workers else {}
    for batch in DataLoader(dataset, batch_size=None, num_workers=workers, **loading):
        yield len(batch)


def _loader(
    source: ShardSource,
    processor: FoveateProcessor,
    workers: int,
    encode_one: Callable[[Document], Sample],
    epochs: int | None = None,
) -> Loader:
    return Loader(
        Mixture([source], [1.0], seed=0, epochs=epochs),
        Packing(rows=1, groups=1, tokens=ROW_TOKENS, tiles=ROW_TILES),
        encode_one,
        partial(collate, processor=processor, raw_pixels=True),
        lambda sample: float(sample.tokens),
        workers=workers,
    )


def _loader_documents(loader: Loader) -> Generator[int, None, None]:
    while (step := loader.next()) is not None:
        yield step.documents


def _against_webdataset(
    bench: DataBench, source: ShardSource, processor: FoveateProcessor, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    loader = _loader(source, processor, bench.workers, partial(encode, processor=processor))
    streams = {
        "webdataset": _webdataset_documents(source, processor, bench.workers),
        "loader": _loader_documents(loader),
    }
    rates: dict[str, list[float]] = {name: [] for name in streams}
    for number in range(ROUNDS + 1):  # the first warms up
        for name, stream in streams.items():
            show(f"{name}, round {number} of {ROUNDS}")
            rate = _rate(stream, 2 * bench.workers * PREFETCH * CHUNK, bench.seconds / ROUNDS)
            if number:
                rates[name].append(rate)
    loader.close()
    for stream in streams.values():
        stream.close()
    megabytes = sum(shard.size for shard in source.shards.shards) / source.documents / 1e6
    ratios = [ours / bare for ours, bare in zip(rates["loader"], rates["webdataset"], strict=True)]
    results: list[dict[str, Any]] = []
    for name, against in (("webdataset", {}), ("loader", {"baseline": "webdataset"})):
        low, high, middle = min(rates[name]), max(rates[name]), mean(rates[name])
        for unit, factor in (("documents/s", 1.0), ("MB/s", megabytes)):
            more: dict[str, Any] = {"low": low * factor, "high": high * factor}
            if against:
                more |= {"baseline": f"webdataset_{_word(unit)}", "ratio": middle / mean(rates["webdataset"])}
            results.append(result(f"{name}_{_word(unit)}", middle * factor, unit, ROUNDS, **more))
    extremes = {"low": min(ratios), "high": max(ratios)}
    return [*results, result("loader_over_webdataset", median(ratios), "times", ROUNDS, **extremes)]


def _word(unit: str) -> str:
    return unit.replace("/", "_per_")


def _rate(stream: Iterator[int], untimed: int, seconds: float) -> float:
    """Documents a second, after so many that the workers had ready while the other's turn was."""
    while untimed > 0:
        untimed -= next(stream)
    documents = 0
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        documents += next(stream)
    return documents / passed


# Restoring


class _Skim:
    """Encodes a document of the same tokens and tiles without decoding its images."""

    def __init__(self, processor: FoveateProcessor):
        self.processor, self.blank = processor, PILImage.new("RGB", processor.image_size[::-1])

    def __call__(self, document: Document) -> Sample:
        if any(isinstance(part, Video) for part in document.parts):
            return encode(document, self.processor)  # how many frames it has is in the file
        parts = tuple(Image(self.blank) if isinstance(part, Image) else part for part in document.parts)
        return encode(Document(document.key, parts), self.processor)


def _restore(
    bench: DataBench, source: ShardSource, processor: FoveateProcessor, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Seconds from a new loader to its first batch, at the beginning and near the end of an epoch."""
    show("going through an epoch")
    states = {}
    with torch.inference_mode():
        skimming = _loader(source, processor, bench.workers, _Skim(processor), epochs=1)
        places = list(PLACES)
        while places and (step := skimming.next()) is not None:
            if step.state["groups"][0]["admitted"] >= max(places[0] * source.documents, 1):
                states[places.pop(0)] = step.state
        skimming.close()
    seconds: dict[float, list[float]] = {place: [] for place in states}
    for number in range(RESTORES):
        show(f"restoring, {number + 1} of {RESTORES}")
        for place, state in states.items():
            began = time.perf_counter()
            loader = _loader(source, processor, bench.workers, partial(encode, processor=processor), epochs=1)
            loader.load_state_dict(state)
            loader.next()
            seconds[place].append(time.perf_counter() - began)
            loader.close()
    results: list[dict[str, Any]] = []
    for place, times in seconds.items():
        more: dict[str, Any] = {"low": min(times), "high": max(times)}
        if results:
            more |= {"baseline": results[0]["name"], "ratio": median(times) / results[0]["value"]}
        results.append(result(f"restore_at_{place * 100:.0f}_percent_s", median(times), "s", RESTORES, **more))
    return results


# Packing


def packing_results(steps: int) -> list[dict[str, Any]]:
    """Waste of rows of 8k tokens on lengths with a long tail, and how unevenly 8 groups cost, attention counted."""
    flops = ModelFlops.from_config(FoveateConfig(**SHAPES["2b"]))
    made_up = MadeUp(ROW_TOKENS, vocabulary=1000)
    results: list[dict[str, Any]] = []
    for name, reserve in (("without_reserve", 1), ("with_reserve", 8)):
        loader = Loader(
            Mixture([made_up], [1.0], seed=0, shuffle=0),
            Packing(rows=1, groups=GROUPS, tokens=ROW_TOKENS, tiles=ROW_TILES, window=128, reserve=reserve),
            made_up.encode,
            partial(collate, processor=bench_processor()),
            lambda sample: flops.document(sample.tokens, predicted=sample.loss_tokens),
        )
        taken = [step for _ in range(steps) if (step := loader.next()) is not None]
        loader.close()
        waste = 1 - sum(step.tokens for step in taken) / (len(taken) * GROUPS * ROW_TOKENS)
        uneven = [max(step.costs) / mean(step.costs) for step in taken]
        results.append(result(f"packing_waste_{name}", waste, "fraction of the budget", len(taken)))
        more: dict[str, Any] = {"low": min(uneven), "high": max(uneven)}
        if reserve > 1:
            more |= {"baseline": "imbalance_without_reserve", "ratio": mean(uneven) / results[1]["value"]}
        results.append(result(f"imbalance_{name}", mean(uneven), "costliest group / mean", len(taken), **more))
    return results
