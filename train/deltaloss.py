"""DeltaLoss: which documents teach most, told by a small and a large model (NVILA, arXiv 2412.04468, data pruning).

A document's score is log(p_large / p_small) of the tokens that carry loss: about 0 where both models are right, or both
wrong, negative where only the small one is right. The documents with the highest scores are kept, source by source.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.document import Document, DocumentError
from ..data.encoding import IGNORE, Sample
from ..data.inputs import open_data
from ..data.packing import collate
from ..data.sources import Source, write_subset
from ..data.statistics import read_each
from ..vlm.chat import load_model
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.processor import FoveateProcessor

CHUNK = 2048  # positions whose probabilities are in memory in fp32 at a time


def document_losses(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    source: Source,
    indices: Sequence[int],
    batch_tokens: int,
    device: torch.device | str,
    workers: int = 0,
    after_document: Callable[[int], None] | None = None,
) -> np.ndarray:
    """What each document costs a model: cross-entropy of its tokens with loss, read in packed rows.

    Args:
        model: on `device`; computes without dropout.
        source: where documents come from, opened with the model's processor.
        indices: which of its documents.
        batch_tokens: budget of a row; a longer document has a row of its own.
        workers: processes that read; 0 reads in this one.
        after_document: is told how many are done.

    Returns:
        float64 [documents, 2]: sum of the losses in nats, and how many tokens carry loss; NaN and 0 for a document that
        can't be used.
    """
    losses = np.zeros((len(indices), 2))
    training = model.training
    model.eval()
    done = 0
    try:
        samples = enumerate(read_each(source, processor, indices, _sample, workers))
        for row in _rows(samples, batch_tokens):
            good = [(place, sample) for place, sample in row if isinstance(sample, Sample)]
            losses[[place for place, sample in row if isinstance(sample, DocumentError)], 0] = math.nan
            if good:
                sums = _row_losses(model, processor, [sample for _, sample in good], device)
                places = [place for place, _ in good]
                losses[places, 0] = sums
                losses[places, 1] = [sample.loss_tokens for _, sample in good]
            done += len(row)
            if after_document:
                after_document(done)
    finally:
        model.train(training)
    return losses


def _sample(document: Document, sample: Sample) -> Sample:
    return sample


def _rows(
    samples: Iterable[tuple[int, Sample | DocumentError]], batch_tokens: int
) -> Iterator[list[tuple[int, Sample | DocumentError]]]:
    """Cuts samples into rows, in order."""
    row: list[tuple[int, Sample | DocumentError]] = []
    tokens = 0
    for place, sample in samples:
        length = sample.tokens if isinstance(sample, Sample) else 0
        if row and tokens + length > batch_tokens:
            yield row
            row, tokens = [], 0
        row.append((place, sample))
        tokens += length
    if row:
        yield row


@torch.inference_mode()
def _row_losses(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    samples: Sequence[Sample],
    device: torch.device | str,
) -> np.ndarray:
    """Sum of each document's losses, float64 [documents], from one packed row."""
    batch = collate([samples], processor)
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    labels = inputs.pop("labels")[0]  # [tokens]
    predicted = (labels != IGNORE).nonzero().flatten()  # never a document's first token, so the one before is its own
    document = np.repeat(np.arange(len(samples)), [sample.tokens for sample in samples])[predicted.cpu().numpy()]
    if not len(predicted):
        return np.zeros(len(samples))
    logits = model(**inputs, use_cache=False, logits_to_keep=predicted - 1).logits[0]  # [predicted, vocabulary]
    each = [
        torch.nn.functional.cross_entropy(
            logits[at : at + CHUNK].float(), labels[predicted[at : at + CHUNK]], reduction="none"
        )
        for at in range(0, len(predicted), CHUNK)
    ]
    return np.bincount(document, torch.cat(each).double().cpu().numpy(), minlength=len(samples))


def scores(small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """log(p_large / p_small) a token, float64 [documents]; NaN where a document can't be used or carries no loss.

    A score is a mean over tokens: a sum would rank by length. Where the models' tokenizers differ, the large one's
    tokens are counted.

    Args:
        small, large: what `document_losses` gave for the two models.
    """
    if small.shape != large.shape:
        raise ValueError(f"losses of {len(small)} and of {len(large)} documents; accepted: of the same documents")
    tokens = np.where((small[:, 1] > 0) & (large[:, 1] > 0), large[:, 1], math.nan)
    return (small[:, 0] - large[:, 0]) / tokens


def select(small: np.ndarray, large: np.ndarray, keep_fraction: float) -> np.ndarray:
    """The places of the documents to keep, ascending int64: those with the highest scores.

    Args:
        small, large: what `document_losses` gave for the two models.
        keep_fraction: of all documents; of equal scores the earlier document is kept.

    Raises:
        ValueError: keep_fraction is out of (0, 1], or the losses are not of the same documents.
    """
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction is {keep_fraction}; accepted: above 0, up to 1")
    each = scores(small, large)
    order = np.argsort(-each, kind="stable")  # NaN last
    usable = int(np.isfinite(each).sum())
    return np.sort(order[: min(usable, round(keep_fraction * len(each)))])


def prune(
    source: str,
    out: Path,
    small: str,
    large: str,
    keep_fraction: float,
    processor: FoveateProcessor | None = None,
    batch_tokens: int = 8192,
    workers: int = 0,
    device: str | None = None,
    after_document: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores a source's documents with two models and writes which to keep: the command `foveate data prune`.

    Writes `out`, a subset index file for `open_source(…, subset=out)`, and beside it `<stem of out>.scores.json`: for
    each document its index, key, losses (nats a token) and score, null where it can't be used or carries no loss. The
    models are loaded one after the other.

    Args:
        source: what `open_data` takes, with an end.
        out: a .json file.
        small, large: folders or Hugging Face names of Foveate models.
        keep_fraction: of all documents; as many of them as can be used.
        processor: for both models, where it is not each model's own.
        batch_tokens: budget of a row of packed documents.
        workers: processes that read.
        device: of the models; a GPU where there is one when None.
        after_document: is told which model reads, how many documents are done, and of how many.
        **options: of `open_source`.

    Returns:
        What was written about the choice: `documents`, `kept`, `unusable`, `lowest_kept` (a score), ….

    Raises:
        ValueError: keep_fraction is out of range, `out` is no .json, the source has no end, or nothing can be kept.
    """
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction is {keep_fraction}; accepted: above 0, up to 1")
    if out.suffix != ".json":
        raise ValueError(f"{out}: no .json file; accepted: the name of one, which is written")
    both: list[np.ndarray] = []
    keys: list[str] = []
    for name in (small, large):
        model, own = load_model(name, device)
        opened = open_data(source, processor or own, **options)
        if opened.documents is None:
            raise ValueError(f"{source} has no end; accepted: a source with a number of documents")
        keys = [opened.key(index) for index in range(opened.documents)]
        indices = range(opened.documents)

        def told(done: int, name: str = name, of: int = opened.documents) -> None:
            if after_document:
                after_document(name, done, of)

        both.append(
            document_losses(model, processor or own, opened, indices, batch_tokens, model.device, workers, told)
        )
        del model
    of_small, of_large = both
    kept, each = select(of_small, of_large, keep_fraction), scores(of_small, of_large)
    if not len(kept):
        raise ValueError(f"{source}: nothing to keep of {len(keys)} documents; accepted: one that can be used at least")
    usable = np.isfinite(each)
    dropped = np.setdiff1d(np.flatnonzero(usable), kept)
    about = {
        "method": "DeltaLoss",
        "source": source,
        "small": small,
        "large": large,
        "keep_fraction": keep_fraction,
        "documents": len(keys),
        "kept": len(kept),
        "unusable": int((~usable).sum()),
        "lowest_kept": float(each[kept].min()),
        "mean_kept": float(each[kept].mean()),
        "mean_dropped": float(each[dropped].mean()) if len(dropped) else None,
    }
    per_token = [losses[:, 0] / np.where(losses[:, 1] > 0, losses[:, 1], math.nan) for losses in both]
    rows = [
        {"index": i, "key": key, "small": _number(a), "large": _number(b), "score": _number(score)}
        for i, (key, a, b, score) in enumerate(zip(keys, *per_token, each, strict=True))
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".scores.json").write_text(json.dumps({"about": about, "documents": rows}, indent=0) + "\n")
    write_subset(out, kept, about, of=len(keys))
    return about


def _number(value: float) -> float | None:
    """What JSON can hold."""
    return float(value) if math.isfinite(value) else None
