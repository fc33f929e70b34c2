"""The embedded data: real handwritten digits and drawn shapes, coloured and set in scenes and clips.

Nothing is downloaded: the digits are scikit-learn's `load_digits` (1,797 images of 8 × 8, from UCI's "Optical
Recognition of Handwritten Digits"), split *by digit image* into train, dev and test, so a question about a test scene
is about handwriting that no training step has seen. Every document is a function of (seed, split, index).
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import av
import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..vlm.processor import CONTENT_MACRO, FoveateProcessor
from .document import Document, Image, Text, Video, chat_document
from .drawing import COLOURS, DIGITS, KINDS, SHAPES, SPLITS, Glyph, draw_cells
from .episodes import EPISODE_KIND_BUILDERS, EPISODE_TEMPLATE, EPISODE_WORDS
from .fine_glyphs import FINE_KIND_BUILDERS
from .needles import NEEDLE_KIND_BUILDERS
from .sentences import SENTENCE_KIND_BUILDERS, SENTENCE_WORDS
from .sorting import SORTING_KIND_BUILDERS

REGION_DIGITS = 0.75  # of the glyphs that a tower is warmed up on: digits are what takes longest to learn
SIDE = 4  # cells a scene is wide and high
CELLS = tuple(f"{column}{row}" for row in range(1, SIDE + 1) for column in "abcd")  # raster order

WORDS = (
    *KINDS, *COLOURS, *CELLS, "nothing", "what", "is", "at", "colour", "where", "the", "in", "row", "column",
    "which", "digit", "appears", "does", "have", "?", ".", ";", ",", "a", "scene", "clip", "has", "and", "image",
    "then", "picture", "of", "it", "there",
)  # fmt: skip

CHAT_TEMPLATE = (
    CONTENT_MACRO
    + """
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|assistant|>' -}}{%- generation -%}{{- content(message) -}}{{- '<|end|>' -}}{%- endgeneration -%}
{%- else -%}{{- '<|user|>' -}}{{- content(message) -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""
)
FRAME_SEPARATOR = "<|frame|>"


# Of tokenizers that a recipe can choose: the words.
TOKENIZERS = {"glyphs": WORDS, "sentences": (*WORDS, *SENTENCE_WORDS), "episodes": EPISODE_WORDS}
TEMPLATES = {"glyphs": CHAT_TEMPLATE, "sentences": CHAT_TEMPLATE, "episodes": EPISODE_TEMPLATE}


def glyph_tokenizer(name: str = "glyphs") -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the embedded data's small language; `name` is one of `TOKENIZERS`."""
    special = ["<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>", FRAME_SEPARATOR]
    vocabulary = {word: i for i, word in enumerate([*special, *dict.fromkeys(TOKENIZERS[name])])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", FRAME_SEPARATOR],
    )


def _draw(rng: np.random.Generator, kinds: Sequence[str] = KINDS, colours: Sequence[str] = tuple(COLOURS)) -> Glyph:
    return Glyph(kinds[int(rng.integers(len(kinds)))], colours[int(rng.integers(len(colours)))])


@dataclass(frozen=True)
class Scene:
    """What stands in the 4 × 4 cells, and the picture of it (uint8 [64, 64, 3])."""

    cells: tuple[Glyph | None, ...]
    picture: np.ndarray


def random_scene(rng: np.random.Generator, split: str, objects: tuple[int, int], digits: float = 0.5) -> Scene:
    """A scene with so many objects (lowest, highest), of which the fraction `digits` are digits, the others shapes."""
    count = rng.integers(objects[0], objects[1] + 1)
    cells: list[Glyph | None] = [None] * len(CELLS)
    for cell in rng.permutation(len(CELLS))[:count]:
        cells[cell] = _draw(rng, DIGITS if rng.random() < digits else SHAPES)
    return Scene(tuple(cells), draw_cells(cells, SIDE, split, rng))


@dataclass(frozen=True)
class Question:
    """A question with its true answer.

    Answers say first what they are about ("b3 7"), so that a model of few layers has one look-up a word to learn.

    Args:
        task: what it tests.
        text: the question.
        subject: what the answer is about, as the question names it; nothing where it names nothing.
        fact: what only the picture tells.
        cell: of a scene, that it is about.
    """

    task: str
    text: str
    subject: str
    fact: str
    cell: int | None = None

    @property
    def answer(self) -> str:
        return f"{self.subject} {self.fact}".strip()


def _kind(glyph: Glyph | None) -> str:
    return glyph.kind if glyph else "nothing"


def _what_at(scene: Scene, rng: np.random.Generator) -> Question:
    cell = _choose_cell(scene, rng)
    return Question("what_at", f"what is at {CELLS[cell]} ?", CELLS[cell], _kind(scene.cells[cell]), cell)


def _row_column(scene: Scene, rng: np.random.Generator) -> Question:
    cell = _choose_cell(scene, rng)
    place = _row_and_column(cell)
    return Question("row_column", f"what is in {place} ?", place, _kind(scene.cells[cell]), cell)


def _colour_at(scene: Scene, rng: np.random.Generator) -> Question:
    colours = {i: glyph.colour for i, glyph in enumerate(scene.cells) if glyph}
    cell = int(rng.choice(list(colours)))
    return Question("colour_at", f"what colour is at {CELLS[cell]} ?", CELLS[cell], colours[cell], cell)


def _where_is(scene: Scene, rng: np.random.Generator) -> Question | None:
    """About a kind that the scene holds once."""
    kinds = [_kind(glyph) for glyph in scene.cells]
    unique = [i for i, glyph in enumerate(scene.cells) if glyph and kinds.count(glyph.kind) == 1]
    if not unique:
        return None
    cell = int(rng.choice(unique))
    return Question("where_is", f"where is the {kinds[cell]} ?", kinds[cell], CELLS[cell], cell)


def _row_and_column(cell: int) -> str:
    return f"row {cell // SIDE + 1} column {cell % SIDE + 1}"


def _choose_cell(scene: Scene, rng: np.random.Generator) -> int:
    """A cell to ask about: an empty one in one of ten draws."""
    empty = [i for i, glyph in enumerate(scene.cells) if glyph is None]
    full = [i for i, glyph in enumerate(scene.cells) if glyph is not None]
    return int(rng.choice(empty if empty and rng.random() < 0.1 else full))


SCENE_QUESTIONS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "what_at": _what_at,
    "colour_at": _colour_at,
    "where_is": _where_is,
    "row_column": _row_column,
}


@dataclass(frozen=True)
class Clip:
    """Frames of 2 × 2 cells (uint8 [frames, 32, 32, 3]) and what each holds."""

    cells: tuple[tuple[Glyph | None, ...], ...]
    frames: np.ndarray


def digit_clip(rng: np.random.Generator, split: str, frames: int, digits: int) -> Clip:
    """A clip in which `digits` different digits, of different colours, each stay for some frames among shapes."""
    cells = [[_draw(rng, SHAPES) if rng.random() < 0.5 else None for _ in range(4)] for _ in range(frames)]
    kinds = rng.permutation(DIGITS)[:digits]
    colours = rng.permutation(list(COLOURS))[:digits]
    places = rng.permutation(4)[:digits]
    for kind, colour, place in zip(kinds, colours, places, strict=True):
        length = int(rng.integers(1, max(2, frames // 2 + 1)))
        start = int(rng.integers(0, frames - length + 1))
        for frame in range(start, start + length):
            cells[frame][place] = Glyph(str(kind), str(colour))
    return Clip(tuple(map(tuple, cells)), np.stack([draw_cells(c, 2, split, rng) for c in cells]))


def needle_clip(rng: np.random.Generator, split: str, frames: int) -> Clip:
    """A haystack of shapes with a digit in one frame, at any depth."""
    cells = [[_draw(rng, SHAPES) if rng.random() < 0.5 else None for _ in range(4)] for _ in range(frames)]
    cells[rng.integers(frames)][rng.integers(4)] = _draw(rng, DIGITS)
    return Clip(tuple(map(tuple, cells)), np.stack([draw_cells(c, 2, split, rng) for c in cells]))


def clip_digits(clip: Clip) -> dict[str, str]:
    """The digits that appear in a clip, with their colours."""
    return {g.kind: g.colour for frame in clip.cells for g in frame if g and g.kind in DIGITS}


def clip_colour_questions(clip: Clip) -> list[Question]:
    """For each digit of a clip, what colour it has."""
    return [Question("clip_colour", f"what colour is the {d} ?", d, colour) for d, colour in clip_digits(clip).items()]


def needle_questions(clip: Clip) -> list[Question]:
    """Which digit the haystack holds, and its colour."""
    ((digit, colour),) = clip_digits(clip).items()
    return [
        Question("needle", "which digit appears ?", "", digit),
        Question("needle_colour", "what colour is the digit ?", "", f"{digit} {colour}"),
    ]


def encode_mp4(frames: np.ndarray, scale: int = 8, fps: int = 8) -> bytes:
    """Encodes frames (uint8 [frames, height, width, 3]) as H.264 in an mp4 file, each pixel `scale`² pixels large."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "ultrafast", "threads": "1"})
        stream.height, stream.width = frames.shape[1] * scale, frames.shape[2] * scale
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            large = np.ascontiguousarray(frame.repeat(scale, 0).repeat(scale, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(large, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _turns(questions: Sequence[Question], media_type: str) -> list[dict]:
    """Questions about one medium as a conversation; the medium stands before the first."""
    messages: list[dict] = []
    for i, question in enumerate(questions):
        content: list[dict] = [{"type": media_type}] if i == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": question.answer})
    return messages


def grounded_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Every object with its place, in random order, in one of three wordings.

    The order is random so that a place can't be told from the one before: each word about an object has to be read
    off the picture at the place that is named.
    """
    wording = rng.integers(3)
    objects = [(i, glyph.kind, glyph.colour) for i, glyph in enumerate(scene.cells) if glyph]
    phrases = []
    for k in rng.permutation(len(objects)):
        i, kind, colour = objects[k]
        words = ((CELLS[i], kind, colour), (kind, CELLS[i], colour), (_row_and_column(i), kind, colour))[wording]
        phrases.append(" ".join(words))
    return " ; ".join(phrases) + " ."


def check_ranges(
    objects: tuple[int, int], turns: tuple[int, int], frames: tuple[int, int], images: tuple[int, int]
) -> None:
    """Raises ValueError where a range of `GlyphSource` can't be drawn from."""
    if not 1 <= objects[0] <= objects[1] <= len(CELLS):
        raise ValueError(f"objects is {objects}; accepted: lowest ≤ highest, from 1 to {len(CELLS)}")
    for name, (low, high) in (("turns", turns), ("frames", frames), ("images", images)):
        if not 1 <= low <= high:
            raise ValueError(f"{name} is {(low, high)}; accepted: lowest ≤ highest, from 1")


@dataclass(frozen=True)
class GlyphSource:
    """Documents of one kind: `document(index)` is the same for the same seed, split, kind and index.

    Args:
        kind: one of `KIND_BUILDERS`.
        processor: for the chat template; of the kinds of `fine_glyphs.py` also for the size of tiles and frames.
        split: whose digit images are used.
        seed: of everything that is drawn.
        objects: lowest and highest number of objects in a scene.
        turns: lowest and highest number of questions about a scene.
        frames: lowest and highest number of frames in a clip.
        images: lowest and highest number of images in an interleaved page.
        documents: how many there are; None where there is no end.
    """

    kind: str
    processor: FoveateProcessor
    split: str = "train"
    seed: int = 0
    objects: tuple[int, int] = (4, 16)
    turns: tuple[int, int] = (4, 12)
    frames: tuple[int, int] = (2, 8)
    images: tuple[int, int] = (2, 4)
    documents: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KIND_BUILDERS:
            raise ValueError(f"kind is {self.kind!r}; accepted: {', '.join(KIND_BUILDERS)}")
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; accepted: {', '.join(SPLITS)}")
        check_ranges(self.objects, self.turns, self.frames, self.images)
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"documents is {self.documents}; accepted: 1 or more, or None for no end")

    @property
    def runs(self) -> tuple[int, ...]:
        """Lengths of the runs of documents that are stored together: one, or none where there is no end."""
        return () if self.documents is None else (self.documents,)

    def rng(self, index: int) -> np.random.Generator:
        kinds = list(KIND_BUILDERS)
        return np.random.default_rng([self.seed, SPLITS.index(self.split), kinds.index(self.kind), index])

    def document(self, index: int) -> Document:
        """Document number `index`, from 0; IndexError from `documents` on."""
        key = self.key(index)
        return KIND_BUILDERS[self.kind](self, self.rng(index), key)

    def key(self, index: int) -> str:
        """The document's key; IndexError as for the document."""
        if index < 0 or (self.documents is not None and index >= self.documents):
            last = "" if self.documents is None else f" to {self.documents - 1}"
            raise IndexError(f"document {index}; accepted: 0{last}")
        return f"glyphs/{self.kind}/{self.split}/{self.seed}/{index}"


def _regions(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A scene and, cell by cell, what it holds: for the region-text objective."""
    scene = random_scene(rng, source.split, source.objects, REGION_DIGITS)
    texts = (Text(f"{cell} {glyph or 'nothing'}", loss=True) for cell, glyph in zip(CELLS, scene.cells, strict=True))
    return Document(key, (Image(scene.picture), *texts))


def _frame_regions(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A clip of digits and shapes and, frame by frame and cell by cell, what it holds."""
    frames = int(rng.integers(source.frames[0], source.frames[1] + 1))
    cells = [
        _draw(rng, DIGITS if rng.random() < REGION_DIGITS else SHAPES) if rng.random() < 0.9 else None
        for _ in range(4 * frames)
    ]
    pictures = np.stack([draw_cells(cells[i : i + 4], 2, source.split, rng) for i in range(0, len(cells), 4)])
    return Document(key, (Video(pictures), *(Text(str(glyph or "nothing"), loss=True) for glyph in cells)))


def _caption(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    scene = random_scene(rng, source.split, source.objects)
    return Document(key, (Image(scene.picture), Text(grounded_caption(scene, rng) + "<|end|>", loss=True)))


def _interleaved(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """A page of several images, each before its sentence; loss on all text."""
    parts: list = []
    scenes = [
        random_scene(rng, source.split, source.objects)
        for _ in range(rng.integers(source.images[0], source.images[1] + 1))
    ]
    for scene in scenes:
        parts += [Image(scene.picture), Text(grounded_caption(scene, rng), loss=True)]
    return Document(key, (*parts, Text("<|end|>", loss=True)))


def _scene_chat(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    """Questions about cells that differ: an answer never stands in the conversation already."""
    scene = random_scene(rng, source.split, source.objects)
    names = list(SCENE_QUESTIONS)
    turns = int(rng.integers(source.turns[0], source.turns[1] + 1))
    questions: dict[int | None, Question] = {}
    for _ in range(4 * turns):
        question = SCENE_QUESTIONS[names[rng.integers(len(names))]](scene, rng)
        if question is not None:
            questions.setdefault(question.cell, question)
        if len(questions) == turns:
            break
    return chat_document(key, _turns(list(questions.values()), "image"), [Image(scene.picture)], source.processor)


def _clip_chat(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    frames = int(rng.integers(source.frames[0], source.frames[1] + 1))
    clip = digit_clip(rng, source.split, frames, digits=int(rng.integers(1, 5)))
    questions = clip_colour_questions(clip)
    return chat_document(key, _turns(questions, "video"), [Video(clip.frames)], source.processor)


def _needle_chat(source: GlyphSource, rng: np.random.Generator, key: str) -> Document:
    frames = int(rng.integers(source.frames[0], source.frames[1] + 1))
    clip = needle_clip(rng, source.split, frames)
    questions = [needle_questions(clip)[i] for i in rng.permutation(2)]
    return chat_document(key, _turns(questions, "video"), [Video(clip.frames)], source.processor)


KIND_BUILDERS: dict[str, Callable[[GlyphSource, np.random.Generator, str], Document]] = {
    "regions": _regions,
    "frame_regions": _frame_regions,
    "captions": _caption,
    "interleaved": _interleaved,
    "scene_chat": _scene_chat,
    "clip_chat": _clip_chat,
    "needle_chat": _needle_chat,
    **FINE_KIND_BUILDERS,
    **SORTING_KIND_BUILDERS,
    **NEEDLE_KIND_BUILDERS,
    **SENTENCE_KIND_BUILDERS,
    **EPISODE_KIND_BUILDERS,
}
# For the region-text objective alone.
REGION_KINDS = (
    "regions", "frame_regions", "fine_regions", "fine_scene_regions", "fine_frame_regions", "row_regions",
    "needle_regions", "small_regions", "episode_regions",
)  # fmt: skip
