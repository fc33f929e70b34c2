"""Columns while tokens are dropped, against the same said with Python lists."""

import random

import pytest
import torch

from foveate.vlm.pruning.base import Selection
from foveate.vlm.pruning.stream import Stream, take


def prompt(rng: random.Random, tokens: int, real: int) -> list[str]:
    """Padding, then text and visual tokens, text at the end."""
    return ["pad"] * (tokens - real) + [rng.choice(["text", "visual"]) for _ in range(real - 1)] + ["text"]


def names(stream: Stream, states: torch.Tensor) -> list[list[str]]:
    """What each row's columns hold: states [batch, columns, 1] are numbers of names."""
    return [[NAMES[int(number)] for number in row if number >= 0] for row in states[..., 0]]


NAMES: dict[int, str] = {}


@pytest.mark.parametrize("seed", range(12))
def test_columns_are_those_of_lists(seed: int) -> None:
    rng = random.Random(seed)
    tokens = 14
    rows = [prompt(rng, tokens, real) for real in (14, 9, 11)]
    visual, valid = (torch.tensor([[test(kind) for kind in row] for row in rows])
                     for test in (lambda kind: kind == "visual", lambda kind: kind != "pad"))  # fmt: skip
    stream = Stream(visual, valid, torch.device("cpu"))
    NAMES.clear()
    NAMES.update({100 * b + c: f"{kind}{c}" for b, row in enumerate(rows) for c, kind in enumerate(row)})
    states = torch.tensor([[[100 * b + c] for c in range(tokens)] for b in range(len(rows))])
    wanted = [[f"{kind}{c}" for c, kind in enumerate(row) if kind != "pad"] for row in rows]
    assert stream.visual_counts == tuple(sum(kind == "visual" for kind in row) for row in rows)

    for stage in range(2):
        selections: list[Selection | None] = []
        merged_states = torch.full((len(rows), 2, 1), -1)
        for b, row in enumerate(wanted):
            seen = [name for name in row if not name.startswith("text")]
            if not seen:
                selections.append(None)
                continue
            keep = sorted(rng.sample(range(len(seen)), rng.randint(0, len(seen))))
            made = [f"merged{stage}{b}{i}" for i in range(rng.randint(0, 2))]
            centers = torch.tensor([rng.randrange(len(seen)) for _ in made], dtype=torch.long)
            for i, name in enumerate(made):
                NAMES[10000 + 1000 * stage + 10 * b + i] = name
                merged_states[b, i] = 10000 + 1000 * stage + 10 * b + i
            selections.append(Selection(torch.tensor(keep, dtype=torch.long), merged_states[b, : len(made)], centers))
            after = row.index(seen[-1])
            stay = {seen[i] for i in keep}
            before, behind = row[: after + 1], row[after + 1 :]
            wanted[b] = [name for name in before if name.startswith("text") or name in stay] + made + behind
        width = stream.slots.shape[1]
        choice = stream.choose(selections)
        states = take(torch.cat([states, merged_states], dim=1), choice.sources, fill=-1)
        assert states.shape[1] == max(map(len, wanted)) <= width + 2
        assert names(stream, states) == wanted
        for b, row in enumerate(stream.rows):
            have = [NAMES[int(number)] for number in states[b, row.visual, 0]]
            assert have == [name for name in wanted[b] if not name.startswith("text")]
            given = [[name for name in rows_visual(rows[b])][i] if i >= 0 else "merged" for i in row.given.tolist()]
            assert given == [name if name.startswith("visual") else "merged" for name in have]
            assert [NAMES[int(number)] for number in states[b, row.text, 0]] == [
                name for name in wanted[b] if name.startswith("text")
            ]
    assert stream.has_holes == (len(set(map(len, wanted))) > 1)


def rows_visual(row: list[str]) -> list[str]:
    return [f"visual{c}" for c, kind in enumerate(row) if kind == "visual"]


def test_places_of_merged_tokens_are_their_centers() -> None:
    visual = torch.tensor([[False, True, True, True, False]])
    stream = Stream(visual, torch.ones_like(visual), torch.device("cpu"))
    choice = stream.choose([Selection(torch.tensor([0]), torch.zeros(2, 4), torch.tensor([2, 1]))])
    assert choice.sources.tolist() == [[0, 1, 5, 6, 4]]
    assert choice.places.tolist() == [[0, 1, 3, 2, 4]]
    assert stream.slots.tolist() == [[0, 1, 3, 2, 4]]


def test_a_visual_token_at_the_end_counts_as_text() -> None:
    visual = torch.tensor([[True, True, True]])
    stream = Stream(visual, torch.ones_like(visual), torch.device("cpu"))
    assert stream.visual_counts == (2,)
    stream.choose([Selection(torch.tensor([], dtype=torch.long))])
    assert stream.slots.tolist() == [[2]]


def test_text_after_the_last_visual_token_is_counted() -> None:
    visual = torch.tensor([[False, False, True, False, False], [False] * 5, [False, True, False, True, False]])
    valid = torch.tensor([[True] * 5, [False, True, True, True, True], [True] * 5])
    assert Stream(visual, valid, torch.device("cpu")).text_after == (2, 4, 1)
