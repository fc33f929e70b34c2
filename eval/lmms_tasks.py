"""Local tasks for lmms-eval: the questions of `foveate eval`, written with their data into a folder.

    foveate data lmms FOLDER --n 200
    lmms-eval --model foveate --model_args pretrained=MODEL --include_path FOLDER --tasks foveate_glyphs

The tasks' files are in `eval/tasks`; they are copied beside the data, so that the folder can be moved and shared.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from pyarrow import parquet

from ..data.drawing import COLOURS, SPLITS
from .glyphs import TASKS, Item, task_items
from .haystack import DEPTHS, haystack_items
from .prompts import Messages
from .shots import shot_items

FILES = Path(__file__).parent / "tasks"
FEATURES = datasets.Features(
    {
        "messages": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
        "videos": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
    }
)


@dataclass(frozen=True)
class Doc:
    """A question as lmms-eval gets it.

    Attributes:
        messages: with parts for media that name their type alone.
        answer: the only right one.
        images: uint8 [height, width, 3] of each, in the order of their parts.
        videos: mp4 files, likewise.
        choices: answers to choose from, where they are rated.
    """

    messages: Messages
    answer: str
    images: tuple[np.ndarray, ...] = ()
    videos: tuple[bytes, ...] = ()
    choices: tuple[str, ...] = ()


Docs = Callable[[int, str, int], Iterator[Doc]]  # of n questions, a split and a seed


def _about(kind: str, text: str) -> Messages:
    return [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]}]


def _glyph_doc(item: Item, choices: tuple[str, ...] = ()) -> Doc:
    text, answer = item.question.text, item.question.answer
    if isinstance(item.media, bytes):
        return Doc(_about("video", text), answer, videos=(item.media,))
    return Doc(_about("image", text), answer, (item.media,), choices=choices)


def _glyphs(task: str, n: int, split: str, seed: int) -> Iterator[Doc]:
    return map(_glyph_doc, task_items(task, n, split, seed))


def _colour_choice(n: int, split: str, seed: int) -> Iterator[Doc]:
    """Which of all colours a cell's glyph has."""
    for item in task_items("colour_at", n, split, seed):
        yield _glyph_doc(item, tuple(f"{item.question.subject} {colour}" for colour in COLOURS))


def _two_scenes(n: int, split: str, seed: int) -> Iterator[Doc]:
    """A question about a scene, answered, then one about another scene."""
    items = task_items("what_at", 2 * n, split, seed)
    for first, second in zip(items, items, strict=True):  # in pairs
        (shown,), (asked,) = _about("image", first.question.text), _about("image", second.question.text)
        said = {"role": "assistant", "content": [{"type": "text", "text": first.question.answer}]}
        yield Doc([shown, said, asked], second.question.answer, (first.media, second.media))  # type: ignore[arg-type]


def _haystack(frames: int, n: int, split: str, seed: int) -> Iterator[Doc]:
    """The questions of `foveate eval --task haystack`, whose n counts those at each depth."""
    for item in islice(haystack_items(-(-n // DEPTHS), frames, split=split, seed=seed), n):
        yield Doc(_about("video", item.question), item.answer, videos=(item.clip,))


def _shots(shots: int, rated: bool, n: int, split: str, seed: int) -> Iterator[Doc]:
    """The questions of `foveate eval --task shots` about held-out pictures."""
    for item in shot_items(n, shots, split=split, seed=seed):
        yield Doc(list(item.messages), item.answer, item.images, choices=item.choices if rated else ())


LOCAL_TASKS: dict[str, Docs] = {
    **{f"foveate_{task}": partial(_glyphs, task) for task in TASKS},
    "foveate_two_scenes": _two_scenes,
    "foveate_colour_choice": _colour_choice,
    "foveate_shots_1": partial(_shots, 1, False),
    "foveate_shots_4": partial(_shots, 4, False),
    "foveate_shots_4_choice": partial(_shots, 4, True),
    "foveate_haystack_64": partial(_haystack, 64),
    "foveate_haystack_128": partial(_haystack, 128),
}
GROUPS = {
    "foveate_glyphs": tuple(f"foveate_{task}" for task in TASKS),
    "foveate_shots": ("foveate_shots_1", "foveate_shots_4"),
    "foveate_haystack": ("foveate_haystack_64", "foveate_haystack_128"),
}


def is_local(name: str) -> bool:
    return name in LOCAL_TASKS or name in GROUPS


def write_tasks(
    out: Path, n: int = 200, names: Sequence[str] = (), split: str = "test", seed: int = 0
) -> tuple[str, ...]:
    """Writes tasks and their data.

    Args:
        out: folder, new or empty.
        n: questions a task.
        names: of tasks or groups; all tasks when empty.
        split: whose digit images are shown.
        seed: of what is drawn; `foveate eval` asks the questions of seed 0.

    Returns:
        The names of the tasks.

    Raises:
        ValueError: no such task or split, or the folder holds something.
    """
    wanted = dict.fromkeys(task for name in names or LOCAL_TASKS for task in GROUPS.get(name, (name,)))
    if unknown := [name for name in wanted if name not in LOCAL_TASKS]:
        raise ValueError(f"task is {unknown[0]!r}; accepted: {', '.join((*GROUPS, *LOCAL_TASKS))}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}")
    if n < 1:
        raise ValueError(f"n is {n}; accepted: 1 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something; accepted: a new or empty folder")
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name in ("utils.py", "_template", *(f"{task}.yaml" for task in wanted)):
        shutil.copyfile(FILES / name, out / name)
    for task in wanted:
        rows = [_row(doc, number, task, out) for number, doc in enumerate(LOCAL_TASKS[task](n, split, seed))]
        columns = {name: [row[name] for row in rows] for name in FEATURES}
        table = datasets.Dataset.from_dict(columns, features=FEATURES).data.table
        parquet.write_table(table, data / f"{task}.parquet")
    return tuple(wanted)


def _row(doc: Doc, number: int, task: str, out: Path) -> dict[str, Any]:
    videos = []
    for place, clip in enumerate(doc.videos):
        path = Path("data") / task / f"{number:05}-{place}.mp4"
        (out / path).parent.mkdir(exist_ok=True)
        (out / path).write_bytes(clip)
        videos.append(path.as_posix())
    return {
        "messages": json.dumps(doc.messages),
        "images": [{"bytes": _png(image), "path": None} for image in doc.images],
        "videos": videos,
        "answer": doc.answer,
        "choices": list(doc.choices),
    }


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
