import hashlib
import io
import os
import re
import subprocess
import sys
from collections import Counter

import av
import numpy as np
import pytest
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from foveate.data.document import Document, Image, Text, Video
from foveate.data.drawing import digit_masks
from foveate.data.encoding import encode
from foveate.data.episodes import EPISODE_KIND_BUILDERS
from foveate.data.glyphs import (
    COLOURS,
    DIGITS,
    KIND_BUILDERS,
    SCENE_QUESTIONS,
    SHAPES,
    SPLITS,
    Glyph,
    GlyphSource,
    Question,
    Scene,
    clip_colour_questions,
    digit_clip,
    draw_cells,
    encode_mp4,
    glyph_tokenizer,
    needle_clip,
    needle_questions,
    random_scene,
)
from foveate.vlm.processor import FoveateProcessor

CELL_NAMES = ["a1", "b1", "c1", "d1", "a2", "b2", "c2", "d2", "a3", "b3", "c3", "d3", "a4", "b4", "c4", "d4"]


def cell_pixels(picture: np.ndarray, cell: int) -> np.ndarray:
    """The 16 × 16 pixels of a cell, float [256, 3]."""
    row, column = divmod(cell, picture.shape[1] // 16)
    return picture[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].reshape(-1, 3).astype(float)


def shown_colour(picture: np.ndarray, cell: int) -> str | None:
    """The colour whose hue the cell's brightest pixels have, None where nothing is bright."""
    pixels = cell_pixels(picture, cell)
    bright = pixels[pixels.max(axis=1) >= np.sort(pixels.max(axis=1))[-20]].mean(axis=0)
    if bright.max() < 110:
        return None
    directions = {name: np.array(rgb) / np.linalg.norm(rgb) for name, rgb in COLOURS.items()}
    return max(directions, key=lambda name: directions[name] @ bright)


# The digits


def test_splits_share_no_digit_image_and_leave_none_out() -> None:
    """The masks of the three splits, together, are each of scikit-learn's 1,797 images once."""
    data = load_digits()
    drawn = Counter()
    for image, label in zip(data.images, data.target, strict=True):
        mask = PILImage.fromarray((image * (255 / 16)).astype(np.uint8)).resize((13, 13), PILImage.Resampling.BICUBIC)
        drawn[str(label), np.asarray(mask).tobytes()] += 1
    assert drawn.total() == 1797
    split_masks = {
        split: Counter(
            (digit, (mask * 255).round().astype(np.uint8).tobytes())
            for digit, masks in digit_masks(split).items()
            for mask in masks
        )
        for split in SPLITS
    }
    assert max(drawn.values()) == 1  # no image is there twice, so none is in two splits
    originals = {split: masks & drawn for split, masks in split_masks.items()}
    assert sum(originals.values(), Counter()) == drawn
    for split, share in (("train", 0.7), ("dev", 0.1), ("test", 0.2)):
        assert abs(originals[split].total() - share * 1797) <= 1
        assert {digit for digit, _ in originals[split]} == set(DIGITS)
    for split in ("dev", "test"):
        assert split_masks[split] == originals[split]

    # what train holds besides are variants of its own images: those are nearest to them, of all
    def rows(masks: list[tuple[str, bytes]]) -> np.ndarray:
        pixels = np.stack([np.frombuffer(mask, np.uint8) for _, mask in masks]).astype(float)
        return (pixels - pixels.mean(1, keepdims=True)) / pixels.std(1, keepdims=True)

    variants = list(split_masks["train"] - drawn)[::10]
    every = list(drawn)
    nearest = (rows(variants) @ rows(every).T).argmax(axis=1) if variants else []
    assert sum(every[i] in originals["train"] for i in nearest) >= 0.85 * len(variants)  # 0.7 would be chance


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_show_digits_of_their_split_alone(split: str) -> None:
    """Each drawn digit is nearest to a mask of its own split and label, among all."""
    masks = [(s, d, m) for s in SPLITS for d, images in digit_masks(s).items() for m in images]
    stack = np.stack([m for _, _, m in masks]).reshape(len(masks), -1)
    stack = (stack - stack.mean(1, keepdims=True)) / stack.std(1, keepdims=True)
    rng = np.random.default_rng(0)
    for _ in range(3):
        cells = [Glyph(str(rng.integers(10)), str(rng.choice(list(COLOURS)))) for _ in range(16)]
        picture = draw_cells(cells, 4, split, rng).astype(float)
        for i, glyph in enumerate(cells):
            cell = cell_pixels(picture, i).reshape(16, 16, 3) @ (np.array(COLOURS[glyph.colour]) - 35)
            places = [cell[y : y + 13, x : x + 13].ravel() for y in range(4) for x in range(4)]
            places = [(p - p.mean()) / p.std() for p in places]
            best = int(np.max(np.stack(places) @ stack.T, axis=0).argmax())
            assert masks[best][:2] == (split, glyph.kind)


# Pictures and truths


def scenes(n: int, objects: tuple[int, int] = (1, 16), split: str = "train") -> list[tuple[Scene, np.random.Generator]]:
    rngs = [np.random.default_rng([9, i]) for i in range(n)]
    return [(random_scene(rng, split, objects), rng) for rng in rngs]


def test_scene_shows_its_objects_where_they_stand() -> None:
    for scene, _ in scenes(100):
        assert scene.picture.shape == (64, 64, 3) and scene.picture.dtype == np.uint8
        for i, glyph in enumerate(scene.cells):
            assert shown_colour(scene.picture, i) == (glyph.colour if glyph else None)


def test_scene_has_as_many_objects_as_asked() -> None:
    counts = Counter(sum(g is not None for g in scene.cells) for scene, _ in scenes(300, (3, 6)))
    assert set(counts) == {3, 4, 5, 6}


def test_shapes_differ_in_their_pixels() -> None:
    rng = np.random.default_rng(0)
    drawn = {
        shape: np.mean([cell_pixels(draw_cells([Glyph(shape, "red")], 1, "train", rng), 0) for _ in range(20)], axis=0)
        for shape in SHAPES
    }
    for a in SHAPES:
        for b in SHAPES:
            assert (np.abs(drawn[a] - drawn[b]).mean() > 5) == (a != b)


def true_facts(scene: Scene, text: str) -> list[str]:
    """What the scene's cells say, by another way than the one that made the question."""
    cells = dict(zip(CELL_NAMES, scene.cells, strict=True))
    if match := re.fullmatch(r"what is at ([a-d][1-4]) \?", text):
        glyph = cells[match[1]]
        return [glyph.kind if glyph else "nothing"]
    if match := re.fullmatch(r"what is in row ([1-4]) column ([1-4]) \?", text):
        glyph = cells["abcd"[int(match[2]) - 1] + match[1]]
        return [glyph.kind if glyph else "nothing"]
    if match := re.fullmatch(r"what colour is at ([a-d][1-4]) \?", text):
        return [cells[match[1]].colour]
    if match := re.fullmatch(r"where is the (\w+) \?", text):
        return [name for name, glyph in cells.items() if glyph and glyph.kind == match[1]]
    raise AssertionError(text)


@pytest.mark.parametrize("task", SCENE_QUESTIONS)
def test_scene_questions_have_one_true_answer(task: str) -> None:
    asked: list[Question] = []
    for scene, rng in scenes(300):
        question = SCENE_QUESTIONS[task](scene, rng)
        if question is None:
            repeated = Counter(glyph.kind for glyph in scene.cells if glyph)
            assert task == "where_is" and min(repeated.values()) > 1
            continue
        assert true_facts(scene, question.text) == [question.fact]
        assert question.answer == f"{question.subject} {question.fact}"
        assert question.subject in question.text
        assert question.task == task
        asked.append(question)
    assert len(asked) > 280
    if task in ("what_at", "row_column"):
        assert 10 <= sum(question.fact == "nothing" for question in asked) <= 60
    assert len({question.text for question in asked}) > 12


def test_where_is_leaves_out_what_stands_twice() -> None:
    circle, square = Glyph("circle", "red"), Glyph("square", "red")
    scene = Scene((circle, square, circle, *[None] * 13), np.zeros((64, 64, 3), np.uint8))
    asked = [SCENE_QUESTIONS["where_is"](scene, np.random.default_rng(i)) for i in range(20)]
    assert {(question.text, question.fact) for question in asked} == {("where is the square ?", "b1")}
    scene = Scene((circle, None, circle, *[None] * 13), scene.picture)
    assert SCENE_QUESTIONS["where_is"](scene, np.random.default_rng(0)) is None


def test_clip_shows_each_digit_in_one_colour_of_its_own() -> None:
    for i in range(60):
        rng = np.random.default_rng([1, i])
        count, length = 1 + i % 4, 1 + i % 8
        clip = digit_clip(rng, "dev", length, count)
        assert clip.frames.shape == (length, 32, 32, 3)
        seen = {(g.kind, g.colour) for frame in clip.cells for g in frame if g and g.kind in DIGITS}
        assert len(seen) == len({kind for kind, _ in seen}) == len({colour for _, colour in seen}) == count
        questions = clip_colour_questions(clip)
        assert {(re.fullmatch(r"what colour is the (\d) \?", q.text)[1], q.fact) for q in questions} == seen
        for frame, cells in zip(clip.frames, clip.cells, strict=True):
            for place, glyph in enumerate(cells):
                assert shown_colour(frame, place) == (glyph.colour if glyph else None)


def test_needle_is_one_digit_in_one_frame() -> None:
    depths = []
    for i in range(60):
        clip = needle_clip(np.random.default_rng([2, i]), "test", 16)
        ((depth, needle),) = [
            (depth, g) for depth, frame in enumerate(clip.cells) for g in frame if g and g.kind in DIGITS
        ]
        depths.append(depth)
        which, colour = needle_questions(clip)
        assert (which.text, which.answer) == ("which digit appears ?", needle.kind)
        assert (colour.text, colour.answer.split()[-1]) == ("what colour is the digit ?", needle.colour)
    assert min(depths) < 4 and max(depths) > 11


# Documents


def described(document: Document) -> bytes:
    """Everything that a document holds, as bytes."""
    pieces = [document.key.encode()]
    for part in document.parts:
        pieces.append(f"{part.text}|{part.loss}".encode() if isinstance(part, Text) else part.source.tobytes())
    return b"\0".join(pieces)


def digests(processor: FoveateProcessor) -> list[str]:
    return [
        hashlib.sha256(described(GlyphSource(kind, processor, split=split, seed=3).document(5))).hexdigest()
        for kind in KIND_BUILDERS
        for split in SPLITS
    ]


DIGESTS = """
import sys, importlib.util
spec = importlib.util.spec_from_file_location("glyph_tests", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from foveate.data.glyphs import CHAT_TEMPLATE, FRAME_SEPARATOR, glyph_tokenizer
processor = module.FoveateProcessor(
    glyph_tokenizer(), image_size=(64, 64), video_size=(32, 32), patch_size=8, chat_template=CHAT_TEMPLATE,
    frame_separator=FRAME_SEPARATOR
)
print(*module.digests(processor))
"""


def test_documents_are_the_same_in_every_process(processor: FoveateProcessor) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", DIGESTS, __file__],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    own = digests(processor)
    assert ran.stdout.split() == own
    assert len(set(own)) == len(own)


def test_index_seed_and_split_each_change_the_document(processor: FoveateProcessor) -> None:
    made = [
        described(GlyphSource("scene_chat", processor, split=split, seed=seed).document(index))
        for split in ("train", "test")
        for seed in (0, 1)
        for index in (0, 1)
    ]
    assert len(set(made)) == 8
    keys = {piece.split(b"\0")[0] for piece in made}
    assert len(keys) == 8


@pytest.mark.parametrize("kind", KIND_BUILDERS)
def test_documents_hold_no_unknown_word(processor: FoveateProcessor, kind: str) -> None:
    source = GlyphSource(kind, processor, objects=(1, 16), frames=(1, 8))
    own = {"sentences": "sentences"} | dict.fromkeys(EPISODE_KIND_BUILDERS, "episodes")
    tokenizer = glyph_tokenizer(own.get(kind, "glyphs"))
    for index in range(60):
        document = source.document(index)
        for part in document.parts:
            if isinstance(part, Text):
                assert tokenizer.unk_token_id not in tokenizer.encode(part.text), part.text
        assert (encode(document, processor).labels != -100).sum() > 0


def test_regions_name_every_cell_in_raster_order(processor: FoveateProcessor) -> None:
    for index in range(20):
        image, *texts = GlyphSource("regions", processor, objects=(1, 16)).document(index).parts
        assert [text.text.split(" ")[0] for text in texts] == CELL_NAMES
        for i, text in enumerate(texts):
            said = text.text.split(" ", 1)[1]
            assert (said == "nothing") == (shown_colour(image.source, i) is None)
            assert said == "nothing" or said.split(" ")[0] == shown_colour(image.source, i)


def test_frame_regions_name_every_cell_of_every_frame(processor: FoveateProcessor) -> None:
    for index in range(20):
        clip, *texts = GlyphSource("frame_regions", processor).document(index).parts
        assert len(texts) == 4 * len(clip.source)
        for i, text in enumerate(texts):
            colour = shown_colour(clip.source[i // 4], i % 4)
            assert text.text == "nothing" if colour is None else colour in text.text.split()


def caption_objects(caption: str) -> dict[int, str]:
    """Cell number → colour, read from a caption in any of its wordings."""
    found = {}
    for phrase in caption.removesuffix(" .").split(" ; "):
        colour = next(word for word in phrase.split() if word in COLOURS)
        if match := re.search(r"row (\d) column (\d)", phrase):
            cell = 4 * (int(match[1]) - 1) + int(match[2]) - 1
        else:
            cell = CELL_NAMES.index(next(word for word in phrase.split() if word in CELL_NAMES))
        assert cell not in found
        found[cell] = colour
    return found


@pytest.mark.parametrize("kind", ["captions", "interleaved"])
def test_captions_name_what_their_picture_shows(processor: FoveateProcessor, kind: str) -> None:
    source = GlyphSource(kind, processor, objects=(1, 16), images=(2, 4))
    pages = [source.document(index).parts for index in range(30)]
    for parts in pages:
        assert [p.text for p in parts if isinstance(p, Text)][-1].endswith("<|end|>")
        for i, part in enumerate(parts):
            if isinstance(part, Image):
                shown = {cell: shown_colour(part.source, cell) for cell in range(16)}
                caption = parts[i + 1]
                assert caption.loss
                assert caption_objects(caption.text.removesuffix("<|end|>")) == {c: v for c, v in shown.items() if v}
    images = {sum(isinstance(p, Image) for p in parts) for parts in pages}
    assert images == ({1} if kind == "captions" else {2, 3, 4})


def answers(document: Document) -> list[str]:
    return [p.text.removesuffix("<|end|>") for p in document.parts if isinstance(p, Text) and p.loss]


def test_chats_have_turns_and_frames_as_asked(processor: FoveateProcessor) -> None:
    chats = [GlyphSource("scene_chat", processor, turns=(2, 5)).document(i) for i in range(40)]
    assert {len(answers(chat)) for chat in chats} >= {2, 3, 4, 5}
    assert max(len(answers(chat)) for chat in chats) == 5
    clips = [GlyphSource("clip_chat", processor, frames=(2, 4)).document(i) for i in range(40)]
    lengths = {len(part.source) for clip in clips for part in clip.parts if isinstance(part, Video)}
    assert lengths == {2, 3, 4}
    for i in range(10):
        last_words = {said.split()[-1] for said in answers(GlyphSource("needle_chat", processor).document(i))}
        assert len(last_words & set(DIGITS)) == len(last_words & set(COLOURS)) == 1


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"kind": "poems"}, "kind"),
        ({"kind": "captions", "split": "all"}, "split"),
        ({"kind": "captions", "objects": (0, 3)}, "objects"),
        ({"kind": "captions", "objects": (3, 17)}, "objects"),
        ({"kind": "captions", "objects": (5, 4)}, "objects"),
        ({"kind": "scene_chat", "turns": (0, 4)}, "turns"),
        ({"kind": "clip_chat", "frames": (4, 2)}, "frames"),
        ({"kind": "interleaved", "images": (0, 1)}, "images"),
    ],
)
def test_bad_arguments_are_named(processor: FoveateProcessor, arguments: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*accepted"):
        GlyphSource(processor=processor, **arguments)


# mp4


@pytest.mark.parametrize("frames", [1, 5, 40])
def test_mp4_holds_the_frames_in_order(frames: int) -> None:
    clip = needle_clip(np.random.default_rng(4), "test", frames)
    with av.open(io.BytesIO(encode_mp4(clip.frames, scale=8, fps=4))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 4)
        decoded = [(float(f.time), f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
    assert [time for time, _ in decoded] == pytest.approx([i / 4 for i in range(frames)])
    large = np.stack([pixels for _, pixels in decoded]).astype(float)
    assert large.shape == (frames, 256, 256, 3)
    small = large.reshape(frames, 32, 8, 32, 8, 3).mean(axis=(2, 4))
    error = ((small[:, None] - clip.frames[None].astype(float)) ** 2).mean(axis=(2, 3, 4))  # [decoded, original]
    assert error.argmin(axis=1).tolist() == list(range(frames))
    assert 10 * np.log10(255**2 / np.diag(error)).min() > 30  # PSNR in dB
