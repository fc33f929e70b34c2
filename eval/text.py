"""`foveate eval --task text`: loss and perplexity on held-out generated text (docs/text_retention.md)."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..data.document import Document, Text
from ..data.encoding import IGNORE, Sample, encode
from ..data.sentences import CATEGORIES, Sentences, held_out
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.parallel.topology import Topology
from ..vlm.processor import FoveateProcessor
from .facts import result, run_facts
from .sharing import ALONE, joined, own_part
from .statistics import bootstrap_interval

BATCH_TOKENS = 4096  # that are read at a time, padding included


@dataclass(frozen=True)
class TextLoss:
    """Loss of each text.

    Attributes:
        nats: summed over the text's tokens but the first, with the end of text, float64 [texts].
        tokens: how many that are, int64 [texts].
    """

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Nats a token, over all tokens of all texts."""
        return float(self.nats.sum() / self.tokens.sum())

    def interval(self) -> tuple[float, float]:
        """The mean's 95 % interval: a bootstrap of the texts."""
        return bootstrap_interval(lambda nats, tokens: nats / tokens, [self.nats], [self.tokens])

    def of(self, chosen: np.ndarray) -> "TextLoss":
        """Of some of the texts: bool [texts]."""
        return TextLoss(self.nats[chosen], self.tokens[chosen])


@torch.inference_mode()
def text_loss(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    texts: Sequence[str],
    batch_tokens: int = BATCH_TOKENS,
) -> TextLoss:
    """A model's loss on texts without media, each read by itself from its first token and followed by the end of text.

    Args:
        batch_tokens: texts of like length are read together, up to so many tokens with padding.

    Raises:
        ValueError: no texts, a text of less than two tokens, or words that the tokenizer doesn't know.
    """
    samples = [_sample(processor, number, text) for number, text in enumerate(texts)]
    if not samples:
        raise ValueError("there are no texts; accepted: one or more")
    model.eval()
    nats = np.zeros(len(samples))
    for batch in _batches(samples, batch_tokens):
        longest = max(samples[number].tokens for number in batch)
        ids = torch.full((len(batch), longest), processor.tokenizer.pad_token_id or 0)
        labels = torch.full((len(batch), longest), IGNORE)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, number in enumerate(batch):
            sample = samples[number]
            ids[row, : sample.tokens] = torch.from_numpy(sample.input_ids)
            labels[row, : sample.tokens] = torch.from_numpy(sample.labels)
            mask[row, : sample.tokens] = 1
        ids, labels, mask = (one.to(model.device) for one in (ids, labels, mask))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # [batch, tokens - 1, words]
        precise = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        losses = torch.nn.functional.cross_entropy(
            precise, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="none"
        )
        nats[batch] = losses.double().view(len(batch), -1).sum(1).cpu().numpy()
    return TextLoss(nats, np.array([sample.loss_tokens for sample in samples]))


def _sample(processor: FoveateProcessor, number: int, text: str) -> Sample:
    tokenizer = processor.tokenizer
    sample = encode(Document(f"text {number}", (Text(text + tokenizer.eos_token, loss=True),)), processor)
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown != tokenizer.eos_token_id and unknown in sample.input_ids:
        word = next(word for word in text.split() if unknown in tokenizer.encode(word, add_special_tokens=False))
        raise ValueError(
            f"text {number}: the model's tokenizer does not know the word {word!r}; accepted: models that know all of "
            "them, as those of the recipe text-retention do"
        )
    if not sample.loss_tokens:
        raise ValueError(f"text {number} has {sample.tokens} token; accepted: 2 or more, as the first is not predicted")
    return sample


def _batches(samples: Sequence[Sample], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of samples, the shortest first."""
    batch: list[int] = []
    for number in sorted(range(len(samples)), key=lambda number: samples[number].tokens):
        if batch and (len(batch) + 1) * samples[number].tokens > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    yield batch


def entropy(texts: Sequence[Sentences], tokens: np.ndarray) -> TextLoss:
    """What a reader who knows the language loses on the texts.

    Args:
        tokens: as the model's tokenizer counts them, int64 [texts], so that losses a token compare.
    """
    return TextLoss(np.array([-text.log_likelihood for text in texts]), tokens)


def text_results(texts: Sequence[Sentences], loss: TextLoss) -> list[dict[str, Any]]:
    """Entries of a results file: of all texts and of each category the loss, the entropy and the perplexity."""
    least, categories = entropy(texts, loss.tokens), np.array([text.category for text in texts])
    entries = []
    for name in ("all", *CATEGORIES):
        chosen = np.full(len(texts), True) if name == "all" else categories == name
        if not chosen.any():
            continue
        own, floor = loss.of(chosen), least.of(chosen)
        (low, high), n = own.interval(), int(chosen.sum())
        entries += [
            result(f"{name}: entropy", floor.mean, "nats a token", n),
            result(
                f"{name}: loss", own.mean, "nats a token", n, low=low, high=high,
                baseline=f"{name}: entropy", ratio=own.mean / floor.mean,
            ),
            result(f"{name}: perplexity", math.exp(own.mean), "", n, low=math.exp(low), high=math.exp(high)),
        ]  # fmt: skip
    return entries


def evaluate_text(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    out: Path | None,
    n: int,
    split: str,
    console: Console,
    topology: Topology = ALONE,
) -> TextLoss:
    """Reads held-out texts, prints loss and perplexity of each category, and writes `metrics.json` in `out`.

    Args:
        model, processor: whose tokenizer knows the texts' words, as those of the recipe `text-retention` do.
        out: None: nothing is written.
        n: texts.
        topology: of the ranks, all of which call it and share the texts out; the first one writes.

    Raises:
        ValueError: unknown words, or ranks that share a sequence.
    """
    if topology.degree > 1:
        raise ValueError(
            f"ulysses {topology.ulysses} and ring {topology.ring}: texts are short, and not shared; accepted: 1 and 1"
        )
    texts = list(held_out(n, split))
    part = text_loss(model, processor, [text.text for text in own_part(texts, topology)])
    found = joined(list(zip(part.nats.tolist(), part.tokens.tolist(), strict=True)), topology)
    loss = TextLoss(np.array([nats for nats, _ in found]), np.array([tokens for _, tokens in found]))
    results = text_results(texts, loss)
    said = {entry["name"]: entry for entry in results}
    for name in dict.fromkeys(entry["name"].partition(":")[0] for entry in results):
        own, least = said[f"{name}: loss"], said[f"{name}: entropy"]
        console.print(
            f"{name:>14}  {own['value']:.4f} nats a token  [{own['low']:.4f}, {own['high']:.4f}]  entropy "
            f"{least['value']:.4f}  perplexity {said[f'{name}: perplexity']['value']:.3f}  n={own['n']}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"{'tokens':>14}  {loss.tokens.sum():,}, of {n:,} texts, first ones left out", highlight=False)
    if out is not None and topology.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        facts = run_facts(f"foveate eval --task text --n {n} --split {split}")
        content = facts | {"tokens": int(loss.tokens.sum()), "results": results}
        (out / "metrics.json").write_text(json.dumps(content, indent=1))
        console.print(f"metrics in {out / 'metrics.json'}")
    return loss
