"""KV cache policies by brute force: the full row runs through the stock model, and each layer's attention is simulated.

One sample at a time, unpadded, in float64, without KV cache: the tokens of the decode steps stand at the row's end. In
place of the attention function a loop goes through the passes that there would be (prompts, then token after token):
what each KV head holds is a list of columns, what is seen of them a mask. What is kept is found by a few lines a
policy, written from the papers. Nothing of the package is used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..pruning import brute as pruning
from ..pruning import zoo

MARGIN = 1e-9  # scores are float64 on both sides


@dataclass
class View:
    """What a rule sees after a pass.

    Attributes:
        layer: number.
        begin, end: columns that the pass added.
        is_prompt: whether the pass was a prompt.
        weights: [heads, end - begin, columns], of the pass's queries, 0 where nothing is seen.
        keys, values: [kv_heads, columns, head_dim], to be overwritten where a rule merges.
        held: of each KV head the columns it holds, ascending, to be changed.
        text: of each column, whether it is no visual token.
        memory: of the rule, from pass to pass.
    """

    layer: int
    begin: int
    end: int
    is_prompt: bool
    weights: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    held: list[list[int]]
    text: list[bool]
    memory: dict[str, Any]

    def received(self, head: int, queries: int | None = None) -> torch.Tensor:
        """[columns], summed over the last queries, averaged over the KV head's group."""
        rows = self.weights if queries is None else self.weights[:, -queries:]
        return rows.sum(1).unflatten(0, (len(self.held), -1)).mean(1)[head]


@dataclass(frozen=True)
class Rule:
    """A policy or selector.

    Attributes:
        evict: changes what is held after a pass.
        read: the columns that a single token sees, of those held: (layer, queries of a group [heads, head_dim], keys of
            the KV head [columns, head_dim], columns held).
        in_cache: positions are ranks among the columns that are held.
        window: (sinks, window), of which a prompt's tokens see no others.
    """

    evict: Callable[[View], None] = lambda view: None
    read: Callable[[int, torch.Tensor, torch.Tensor, list[int]], list[int]] | None = None
    in_cache: bool = False
    window: tuple[int, int] | None = None


@dataclass
class _Run:
    """The rule that runs, and what it is about: set while a model is called."""

    rule: Rule
    ends: Sequence[int]  # of passes; after the last one tokens come one by one
    text: list[bool]
    frequencies: torch.Tensor
    held: dict[int, list[list[int]]] = field(default_factory=dict)  # of each layer at the end


_running: list[_Run] = []


def brute_force(
    name: str, inputs: zoo.Row, ends: Sequence[int], rule: Rule, pruner: pruning.Rule | None = None
) -> tuple[torch.Tensor, dict[int, list[list[int]]]]:
    """Prefills and teacher-forced decode steps of one sample, with whatever prunes its visual tokens.

    Args:
        name: of the zoo's model.
        inputs: of one row: prompts, and the tokens of the decode steps.
        ends: where passes end, the first one the first prompt; after the last one tokens come one by one.

    Returns:
        logits from the first prompt's last token on; of each layer and KV head the columns that are held at the end.
    """
    model: Any = zoo.with_weights(name)
    config, rotary = model.get_decoder().config, model.get_decoder().rotary_emb
    text = [token not in pruning.VISUAL_IDS for token in inputs["input_ids"][0].tolist()]
    prompts = [end for begin, end in zip([0, *ends], ends, strict=False) if end - begin > 1]
    run = _Run(rule, ends, text, rotary.inv_freq.double())
    before, config._attn_implementation = config._attn_implementation, "foveate_test_kv"
    _running.append(run)
    try:
        nothing = pruning.Rule((), lambda view: ([], []))
        outcome = pruning.brute_force(model, inputs, prompts, pruner or nothing)
    finally:
        _running.pop()
        config._attn_implementation = before
    return outcome.logits, run.held


def _attention(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """An attention function as transformers calls it, of one row; columns that its last token does not see are dead."""
    run, total = _running[-1], q.shape[2]
    live = mask[0, 0, -1].nonzero()[:, 0]
    ends = [int((live < end).sum()) for end in run.ends]
    out, weights = q.new_zeros(total, q.shape[1], v.shape[3]), q.new_zeros(q.shape[1], total, total)
    simulated, rows, held = _simulate(
        run, module.layer_idx, q[0][:, live], k[0][:, live], v[0][:, live], scaling, ends, live.tolist()
    )
    out[live] = simulated.transpose(0, 1)
    weights[:, live[:, None], live] = rows
    run.held[module.layer_idx] = [[int(live[column]) for column in columns] for columns in held]
    return out[None], weights[None]


AttentionInterface.register("foveate_test_kv", _attention)
AttentionMaskInterface.register("foveate_test_kv", sdpa_mask)


def _simulate(
    run: _Run,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    ends: list[int],
    places: list[int],
) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Output [heads, columns, head_dim], weights [heads, columns, columns] and what is held at the end."""
    heads, total, _ = q.shape
    keys, values, rule = k.clone(), v.clone(), run.rule
    group = heads // len(k)
    held: list[list[int]] = [[] for _ in k]
    out, weights, memory = torch.zeros_like(q[..., : v.shape[2]]), q.new_zeros(heads, total, total), dict[str, Any]()
    passes = [*ends, *range(ends[-1] + 1, total + 1)]
    for begin, end in zip([0, *passes], passes, strict=False):
        for columns in held:
            columns += range(begin, end)
        rows = list(range(begin, end))
        for head, columns in enumerate(held):
            some = slice(head * group, (head + 1) * group)
            states, queries = keys[head], q[some]
            if rule.in_cache:
                states, queries = _at_ranks(states, columns, run), _at_ranks(queries, columns, run)
            seen = torch.zeros(total, total, dtype=torch.bool)
            seen[:, columns] = True
            seen = seen.tril()
            for row in rows if rule.window is not None else ():
                sink, window = rule.window
                rank = columns.index(row)
                seen[row, columns[sink : max(rank + 1 - window, sink)]] = False
            if rule.read is not None and len(rows) == 1:
                shown = rule.read(layer, queries[:, rows[0]], states, columns)
                seen[rows[0], [column for column in columns if column not in shown]] = False
            logits = (queries[:, rows] @ states.T * scaling).masked_fill(~seen[rows], -torch.inf)
            weights[some, rows] = logits.softmax(-1)
            out[some, rows] = weights[some, rows] @ values[head]
        text = [run.text[place] for place in places]
        view = View(layer, begin, end, end - begin > 1, weights[:, begin:end], keys, values, held, text, memory)
        rule.evict(view)
    return out, weights, held


def _at_ranks(states: torch.Tensor, columns: list[int], run: _Run) -> torch.Tensor:
    """Keys or queries [..., columns, head_dim] as RoPE would have made them at their ranks among those held."""
    turned, half = torch.zeros_like(states), states.shape[-1] // 2
    angles = (torch.arange(len(columns)) - torch.tensor(columns))[:, None] * run.frequencies
    pairs = torch.complex(states[..., columns, :half], states[..., columns, half:])
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    turned[..., columns, :] = torch.cat([pairs.real, pairs.imag], dim=-1)
    return turned


def _best(columns: list[int], scores: torch.Tensor, count: int) -> list[int]:
    """The `count` columns that score highest, ascending, the first of equal ones; must not hang on rounding."""
    ranked = sorted(columns, key=lambda column: -float(scores[column]))
    if 0 < count < len(ranked):
        last, following = float(scores[ranked[count - 1]]), float(scores[ranked[count]])
        assert last == following or last - following > MARGIN * abs(last), "scores are near-tied: take another seed"
    return sorted(ranked[: max(count, 0)])


# Rules of the policies.


def streaming(sink: int, window: int, reindex: bool = True, windowed: bool = False) -> Rule:
    def evict(view: View) -> None:
        for columns in view.held:
            if len(columns) > sink + window - 1:  # with the next token: the sinks and the window
                columns[:] = columns[:sink] + columns[len(columns) - window + 1 :]

    return Rule(evict, in_cache=reindex, window=(sink, window) if windowed else None)


def snapkv(keep: float, window: int, kernel: int, pooling: str = "mean") -> Rule:
    def evict(view: View) -> None:
        came = view.end - view.begin
        if not view.is_prompt or came <= window:
            return
        prefix = list(range(view.begin, view.end - window))
        for head, columns in enumerate(view.held):
            votes = view.received(head, window)
            pooled = torch.zeros_like(votes)
            for column in prefix:
                near = [c for c in range(column - kernel // 2, column + kernel // 2 + 1) if c in prefix]
                pooled[column] = votes[near].max() if pooling == "max" else votes[near].sum() / kernel
            best = _best(prefix, pooled, round(keep * came) - window)
            columns[:] = [c for c in columns if c < view.begin or c in best or c >= view.end - window]

    return Rule(evict)


def h2o(keep: float, recent: float) -> Rule:
    def evict(view: View) -> None:
        if view.is_prompt:
            view.memory["prompt"] = view.memory.get("prompt", 0) + view.end - view.begin
        budget = round(keep * view.memory["prompt"])
        late = round(recent * budget)
        for head, columns in enumerate(view.held):
            scores = view.memory[str(head)] = view.memory.get(str(head), 0) + view.received(head)
            latest = columns[len(columns) - late :]
            others = columns[: len(columns) - late]
            columns[:] = _best(others, scores, budget - late) + latest

    return Rule(evict)


def lookm(keep: float, recent: float, merge: str) -> Rule:
    def evict(view: View) -> None:
        if not view.is_prompt:
            return
        came = list(range(view.begin, view.end))
        budget = round(keep * len(came))
        late = round(recent * budget)
        for head, columns in enumerate(view.held):
            scores = view.received(head)
            scores = scores + torch.tensor(view.text) * scores[came].max()
            others = came[: len(came) - late]
            kept = _best(others, scores, budget - late) + came[len(came) - late :]
            columns[:] = [c for c in columns if c < view.begin or c in kept]
            evicted = [c for c in came if c not in kept]
            if merge != "none":
                _merge(view.keys[head], view.values[head], kept, evicted, merge)

    return Rule(evict)


def _merge(keys: torch.Tensor, values: torch.Tensor, kept: list[int], evicted: list[int], how: str) -> None:
    old_keys, old_values = keys.clone(), values.clone()
    near: dict[int, list[tuple[int, float]]] = {}
    for column in evicted:
        cosines = torch.cosine_similarity(old_keys[column], old_keys[kept], dim=-1)
        best = int(cosines.argmax())
        assert len(kept) == 1 or cosines.topk(2).values.diff().abs() > MARGIN, "keys are as near: take another seed"
        near.setdefault(kept[best], []).append((column, float(cosines[best])))
    for pivot, group in near.items():
        for new, old in ((keys, old_keys), (values, old_values)):
            total = old[pivot].clone()
            for column, similarity in group:
                total += {
                    "averaged": old[column],
                    "pivotal": (old[column] + old[pivot]) / 2,
                    "weighted": similarity * old[column],
                }[how]
            new[pivot] = total / (len(group) + 1)


def quest(page: int, keep: float, first: int, residual: int | None = None) -> Rule:
    """Of the columns held, number i is in page i // page. Packed ones are in pages, `residual` or more are not."""

    def read(layer: int, queries: torch.Tensor, keys: torch.Tensor, columns: list[int]) -> list[int]:
        pages = (len(columns) - 1 - (residual or 0)) // page  # without the newest token's
        if layer < first:
            return columns
        scores = torch.zeros(pages, dtype=keys.dtype)
        for number in range(pages):
            members = keys[columns[number * page : (number + 1) * page]]
            low, high = members.amin(0), members.amax(0)
            if residual is not None:
                high = high.half().double()  # as scale and offset are
            scores[number] = torch.maximum(queries * low, queries * high).sum(-1).max()
        best = _best(list(range(pages)), scores, max(1, round(keep * pages)))
        return [column for i, column in enumerate(columns) if i // page in best or i // page >= pages]

    return Rule(read=read)


def packed(rule: Rule, bits: int, group: int, residual: int, sink: int) -> Rule:
    """The same with quantised columns, for one prompt: groups of what a head stores, holes of later evictions too."""

    def evict(view: View) -> None:
        rule.evict(view)
        for head, columns in enumerate(view.held):
            stored, done = view.memory.setdefault(f"stored {head}", ([], [0]))
            stored += columns if view.is_prompt else range(view.begin, view.end)
            while len(stored) - sink - done[0] >= residual + group:
                block = stored[sink + done[0] : sink + done[0] + group]
                done[0] += group
                for states, axis in ((view.keys, 0), (view.values, 1)):
                    states[head, block] = _quantised(states[head, block], bits, axis)

    return replace(rule, evict=evict)


def _quantised(x: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Codes of so many bits, with a scale and an offset in float16 for what lies along an axis."""
    zero = x.amin(axis, keepdim=True).half().double()
    scale = ((x.amax(axis, keepdim=True) - zero) / (2**bits - 1)).half().double()
    return zero + scale * ((x - zero) / scale).round().clamp(0, 2**bits - 1)
