"""Pruning by brute force: the full row runs through the stock model, and columns that were dropped are masked.

One sample at a time, unpadded, in float64, without KV cache: the tokens of the decode steps stand at the row's end.
What is kept is found by a few lines a method, written from the methods' descriptions, on attention weights of the same
run. Nothing of the package's pruning is used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

VISUAL_IDS = (1, 2)
MARGIN = 1e-5  # the package scores in float32: scores must differ by more than this part of them


@dataclass(frozen=True)
class View:
    """What a rule sees of a stage.

    Attributes:
        rows: [heads, raters, visual], attention of the raters to the visual columns that are left.
        ones: [raters, visual], product of all-ones vectors under RoPE, divided by √head_dim.
        states: [visual, D], of these columns, at the stage's layer.
        total: visual tokens of the prompt.
    """

    stage: int
    rows: torch.Tensor
    ones: torch.Tensor
    states: torch.Tensor
    total: int
    generator: torch.Generator

    @property
    def visual(self) -> int:
        return len(self.states)


Choice = tuple[list[int], list[tuple[torch.Tensor, int]]]  # kept; merged states, and the visual token each stands for


@dataclass(frozen=True)
class Rule:
    """How a method chooses.

    Attributes:
        layers: the first that reads fewer tokens, of each stage.
        own: a stage is rated by its own layer's attention; otherwise by the layer before.
        texts: raters are chosen among the text after the last visual token; otherwise the last prompt token rates.
        reindex: what is left has positions 0, 1, 2 … from the first stage on.
        draws: whether the choice is by chance.
    """

    layers: tuple[int, ...]
    choose: Callable[[View], Choice]
    own: bool = False
    texts: bool = False
    reindex: bool = False
    draws: bool = False


@dataclass(frozen=True)
class Outcome:
    """What comes out.

    Attributes:
        logits: [1 + decode steps, vocabulary], of the prompt's last token and of each further one.
        kept: of each stage, which of the prompt's visual tokens are left.
        visual: of each layer, visual tokens that it reads, merged ones too.
    """

    logits: torch.Tensor
    kept: list[list[int]]
    visual: list[int]


@dataclass
class _Layer:
    """What a layer reads: columns in the order in which they stand, and those that were given new states."""

    order: list[int]
    places: list[int]  # columns that each column has its position from
    written: dict[int, torch.Tensor] = field(default_factory=dict)
    reindex: bool = False


def brute_force(
    model: Any,
    inputs: dict[str, torch.Tensor],
    prompts: Sequence[int],
    rule: Rule,
    generator: Any = None,
    marked: torch.Tensor | None = None,
) -> Outcome:
    """Prefill and teacher-forced decode steps of one sample.

    Args:
        model: whose decoder's attention modules give (output, weights).
        inputs: of one row: the prompt, and the tokens of the decode steps.
        prompts: where prompts end: one number, or several where a conversation goes on with new prompts. Each prunes
            the visual tokens that it brings.
        generator: for what is drawn.
        marked: [prompt, D], what the first layer reads, NaN where a method before the LLM dropped a token.

    Returns:
        what comes from the last token of the first prompt on; `kept` and `visual` of the last prompt.
    """
    tokens, decoder = inputs["input_ids"].shape[1], model.get_decoder()
    layers = [_Layer(list(range(tokens)), list(range(tokens))) for _ in decoder.layers]
    gone = [] if marked is None else marked.isnan().any(1).nonzero()[:, 0].tolist()
    if marked is not None:
        layers[0].written = {column: marked[column] for column in range(len(marked)) if column not in gone}
        for each in layers:
            each.order = [column for column in each.order if column not in gone]
            each.reindex = rule.reindex
    run = _run(model, inputs, layers)
    begin = 0
    for end in prompts:
        ids = inputs["input_ids"][0, :end].tolist()
        visual = [column for column in range(begin, end) if ids[column] in VISUAL_IDS]
        begin = end
        left, merged, counts = [column for column in visual if column not in gone], set[int](), []
        kept = [] if marked is None else [[visual.index(column) for column in left]]
        raters = [end - 1]
        if rule.texts and left:
            raters = _raters(run.states[0], left, list(range(left[-1] + 1, end))) or raters
        for layer in range(len(layers)):
            while left and len(kept) < len(rule.layers) and rule.layers[len(kept)] == layer:
                source = layer if rule.own else layer - 1
                ones = _turned_ones(run.rotary[source], tokens)
                view = View(
                    len(kept),
                    run.weights[source][:, raters][:, :, left],
                    ones[raters] @ ones[left].T * ones.shape[1] ** -0.5,
                    run.states[layer][left],
                    len(visual),
                    generator,
                )
                chosen, new = rule.choose(view)
                spare = _drop(layers[layer:], left, chosen, new)
                for later in layers[layer:]:
                    later.reindex = rule.reindex
                merged |= set(spare)
                left = [left[i] for i in chosen] + spare
                kept.append([visual.index(column) for column in left if column not in merged])
                run = _run(model, inputs, layers)
            counts.append(len(left))
    return Outcome(run.logits[prompts[0] - 1 :], kept, counts)


def _drop(layers: list[_Layer], left: list[int], chosen: list[int], new: list[tuple[torch.Tensor, int]]) -> list[int]:
    """Takes columns out of layers' order, and puts merged tokens into some of those; gives their columns."""
    dropped = sorted(set(left) - {left[i] for i in chosen})
    spare = dropped[: len(new)]
    for layer in layers:
        at = layer.order.index(left[-1]) + 1
        before, after = ([c for c in part if c not in dropped] for part in (layer.order[:at], layer.order[at:]))
        layer.order = before + spare + after
    for column, (state, stands_for) in zip(spare, new, strict=True):
        layers[0].written[column] = state
        for layer in layers:
            layer.places[column] = layer.places[left[stands_for]]
    return spare


def _turned_ones(rotary: tuple[torch.Tensor, torch.Tensor], tokens: int) -> torch.Tensor:
    """What RoPE makes of an all-ones vector at each column, [tokens, head_dim]."""
    cos, sin = (part.reshape(-1, tokens, part.shape[-1])[0] for part in rotary)
    half = cos.shape[1] // 2
    return torch.cat([cos[:, :half] - sin[:, :half], cos[:, half:] + sin[:, half:]], dim=1)


@dataclass
class _Run:
    logits: torch.Tensor
    states: list[torch.Tensor] = field(default_factory=list)  # of each layer's input, [tokens, D]
    weights: list[torch.Tensor] = field(default_factory=list)  # of each layer, [heads, tokens, tokens]
    rotary: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


def _run(model: Any, inputs: dict[str, torch.Tensor], layers: list[_Layer]) -> _Run:
    decoder, tokens = model.get_decoder(), inputs["input_ids"].shape[1]
    run, hooks = _Run(torch.empty(0)), []

    def before(index: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        layer, hidden = layers[index], args[0].clone()
        for column, state in layer.written.items():
            hidden[0, column] = state
        rank = torch.full((tokens,), -1)
        rank[layer.order] = torch.arange(len(layer.order))
        seen = (rank <= rank[:, None]) & (rank >= 0) & (rank[:, None] >= 0) | torch.eye(tokens, dtype=torch.bool)
        if layer.reindex:
            positions = rank.clamp(min=0)[None]
            kwargs["position_embeddings"] = decoder.rotary_emb(hidden, _as_model_has_it(decoder, positions))
        else:
            kwargs["position_embeddings"] = tuple(part[..., layer.places, :] for part in kwargs["position_embeddings"])
        kwargs["attention_mask"] = seen[None, None]
        run.states.append(hidden[0])
        run.rotary.append(kwargs["position_embeddings"])
        return (hidden, *args[1:]), kwargs

    for index, layer in enumerate(decoder.layers):
        hooks.append(
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: before(index, args, kwargs), with_kwargs=True
            )
        )
        hooks.append(layer.self_attn.register_forward_hook(lambda _, args, output: run.weights.append(output[1][0])))
    try:
        run.logits = model(**inputs, use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return run


def _as_model_has_it(decoder: Any, positions: torch.Tensor) -> torch.Tensor:
    """M-RoPE has three coordinates, which are the same for text."""
    if hasattr(decoder.rotary_emb, "mrope_section"):
        return positions.expand(3, *positions.shape)
    return positions


def _best(scores: torch.Tensor, count: int) -> list[int]:
    """The `count` best, ascending; the choice must not hang on rounding."""
    ranked = scores.sort(descending=True).values
    if 0 < count < len(ranked):
        assert ranked[count - 1] - ranked[count] > MARGIN * ranked[count - 1].abs(), (
            "scores are near-tied: take another seed"
        )
    return sorted(scores.argsort(descending=True)[:count].tolist())


def _raters(states: torch.Tensor, visual: Sequence[int], text: list[int]) -> list[int]:
    """SparseVLM: text tokens whose share of the visual tokens' softmax over the text is above the mean."""
    if not text:
        return []
    shares = torch.stack([(states[text] @ states[column]).softmax(0) for column in visual]).mean(0)
    assert (shares - shares.mean()).abs().min() > MARGIN * shares.mean(), "raters are near-tied: take another seed"
    return [column for column, share in zip(text, shares, strict=True) if share > shares.mean()]


# Rules of the methods.


def fastv(layer: int, keep: float) -> Rule:
    def choose(view: View) -> Choice:
        return _best(view.rows.mean(0)[-1], round(view.visual * keep)), []

    return Rule((layer,), choose)


def lowest(layer: int, keep: float) -> Rule:
    def choose(view: View) -> Choice:
        return _best(-view.rows.mean(0)[-1], round(view.visual * keep)), []

    return Rule((layer,), choose)


def random(layer: int, keep: float) -> Rule:
    def choose(view: View) -> Choice:
        drawn = torch.randperm(view.visual, generator=view.generator)[: round(view.visual * keep)]
        return sorted(drawn.tolist()), []

    return Rule((layer,), choose, draws=True)


def pyramiddrop(layers: tuple[int, ...], keep: tuple[float, ...], reindex: bool = True) -> Rule:
    def choose(view: View) -> Choice:
        return _best(view.rows.mean(0)[-1], int(view.total * keep[view.stage])), []

    return Rule(layers, choose, own=True, reindex=reindex)


def sparsevlm(layers: tuple[int, ...], tokens: tuple[int, ...], per: int, reindex: bool = True) -> Rule:
    """`layers` as the method counts them: whose output is pruned; `tokens` of `per` visual ones are kept."""

    def choose(view: View) -> Choice:
        scores = view.rows.mean(0).mean(0)
        return _recycled(view, scores, min(round(tokens[view.stage] * view.total / per), view.visual - 1))

    return Rule(tuple(layer + 1 for layer in layers), choose, texts=True, reindex=reindex)


def sparsevlm_by_rank(layers: tuple[int, ...], scale: float, bias: float) -> Rule:
    def choose(view: View) -> Choice:
        rows = view.rows.mean(0)
        rank = int(torch.linalg.matrix_rank(rows.float()))
        if rank == view.visual:
            return list(range(rank)), []
        return _recycled(view, rows.mean(0), min(int(rank * scale + bias), view.visual - 1))

    return Rule(tuple(layer + 1 for layer in layers), choose, texts=True, reindex=True)


def sparsevlm_plus(layers: tuple[int, ...], tokens: tuple[int, ...], per: int, heads: int) -> Rule:
    def choose(view: View) -> Choice:
        rows = view.rows / view.ones
        looking = _best(rows.sum((1, 2)), heads)
        scores = rows[looking].mean(0).mean(0)
        return _best(scores, min(round(tokens[view.stage] * view.total / per), view.visual - 1)), []

    return Rule(tuple(layer + 1 for layer in layers), choose, texts=True)


def _recycled(view: View, scores: torch.Tensor, count: int) -> Choice:
    """The best, and the next three tenths of the others merged by density peaks."""
    kept = _best(scores, count)
    others = [i for i in scores.argsort(descending=True).tolist() if i not in kept]
    again = others[: int(0.3 * len(others)) + 1]
    _best(scores, count + len(again))
    clusters, x = len(again) // 10 + 1, view.states[again]
    assert clusters != 2, "with two clusters nearest neighbours have the same density: take other numbers"
    apart = (x[:, None] - x).norm(dim=-1) / x.shape[1] ** 0.5
    density = (-apart.sort(dim=1).values[:, :clusters].square().mean(1)).exp()
    peak = torch.empty(len(again), dtype=x.dtype)
    for i, row in enumerate(apart):
        denser = [j for j in range(len(again)) if density[j] > density[i]]
        peak[i] = (row[denser].min() if denser else apart.max()) * density[i]
    if clusters == 1:
        return kept, [(x.sum(0) / (len(again) + 1e-6), again[int(peak.argmax())])]
    _best(peak, clusters)
    centers = peak.argsort(descending=True)[:clusters].tolist()
    members: list[list[int]] = [[] for _ in centers]
    for i in range(len(again)):
        members[centers.index(i) if i in centers else int(apart[i, centers].argmin())].append(i)
    return kept, [
        (x[own].sum(0) / (len(own) + 1e-6), again[center]) for center, own in zip(centers, members, strict=True)
    ]
