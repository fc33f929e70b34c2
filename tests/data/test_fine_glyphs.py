import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageDraw

from foveate.data.document import Image, Text, Video
from foveate.data.fine_glyphs import (
    CELLS,
    COLOURS,
    MOMENTS,
    FineGlyph,
    clip_questions,
    close_scene,
    fine_clip,
    fine_scene,
    scene_question,
)
from foveate.data.glyphs import CHAT_TEMPLATE, FRAME_SEPARATOR, GlyphSource, glyph_tokenizer
from foveate.vlm.processor import FoveateProcessor

# The usual codes of a seven-segment display, bits 0 to 6 for segments a to g.
CODES = {"0": 0x3F, "1": 0x06, "2": 0x5B, "3": 0x4F, "4": 0x66, "5": 0x6D, "6": 0x7D, "7": 0x07, "8": 0x7F, "9": 0x6F}
# Middles of the segments a to g, in pixels right of and below the digit's middle.
MIDDLES = [(0, -5), (3, -2.5), (3, 2.5), (0, 5), (-3, 2.5), (-3, -2.5), (0, 0)]
CORNERS = {"tl": (-3, -5), "tr": (3, -5), "ml": (-3, 0), "mr": (3, 0), "bl": (-3, 5), "br": (3, 5)}
LINES = ["tl tr", "tr mr", "mr br", "bl br", "ml bl", "tl ml", "ml mr"]


@pytest.fixture(scope="module")
def processor() -> FoveateProcessor:
    return FoveateProcessor(
        glyph_tokenizer(), image_size=(84, 84), patch_size=14, chat_template=CHAT_TEMPLATE,
        frame_separator=FRAME_SEPARATOR,
    )  # fmt: skip


def colour_at(picture: np.ndarray, x: float, y: float) -> str | None:
    """The colour of a bright pixel, None where it is dark."""
    pixel = picture[int(y), int(x)].astype(float)
    if pixel.max() < 110:
        return None
    directions = {name: np.array(rgb) / np.linalg.norm(rgb) for name, rgb in COLOURS.items()}
    return max(directions, key=lambda name: directions[name] @ pixel)


def shown(picture: np.ndarray, glyph: FineGlyph) -> tuple[int, set[str]]:
    """Which segments are lit around a digit's middle, as a code, and in which colours."""
    sin, cos = np.sin(glyph.angle), np.cos(glyph.angle)
    places = [(glyph.scale * x, glyph.scale * y) for x, y in MIDDLES]
    seen = [colour_at(picture, glyph.x + cos * x - sin * y, glyph.y + sin * x + cos * y) for x, y in places]
    return sum(1 << i for i, colour in enumerate(seen) if colour), {colour for colour in seen if colour}


def template(kind: str) -> np.ndarray:
    """A digit drawn by PIL at eight times its size and reduced, float [20, 20]."""
    image = PILImage.new("L", (160, 160))
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(LINES):
        if CODES[kind] >> i & 1:
            ends = [tuple(80 + 8 * side for side in CORNERS[name]) for name in line.split()]
            draw.line(ends, fill=255, width=16)
    return np.asarray(image.resize((20, 20), PILImage.Resampling.BOX), dtype=float) / 255


def nearest_digit(patch: np.ndarray) -> str:
    """The digit whose template correlates best with a 14 × 14 patch, at any shift."""
    light = patch.max(axis=2).astype(float)
    light = (light - light.mean()).ravel()
    best = {}
    for kind in CODES:
        windows = np.lib.stride_tricks.sliding_window_view(template(kind), (14, 14)).reshape(-1, 14 * 14)
        windows = windows - windows.mean(1, keepdims=True)
        best[kind] = (windows @ light / np.linalg.norm(windows, axis=1)).max()
    return max(best, key=best.get)


def test_scene_shows_each_cells_digit_in_its_colour_and_nothing_else() -> None:
    for index in range(40):
        scene = fine_scene(np.random.default_rng([1, index]))
        assert scene.picture.shape == (256, 256, 3) and scene.picture.dtype == np.uint8
        for i, glyph in enumerate(scene.cells):
            assert (int(glyph.y * 3 / 256), int(glyph.x * 3 / 256)) == divmod(i, 3)
            assert shown(scene.picture, glyph) == (CODES[glyph.kind], {glyph.colour})
        dark = scene.picture.max(axis=2).astype(float)
        for glyph in scene.cells:
            top, left = int(glyph.y) - 9, int(glyph.x) - 9
            dark[max(top, 0) : top + 18, max(left, 0) : left + 18] = 0
        assert dark.max() < 110


def test_strokes_are_two_pixels_wide_and_digits_twelve_high() -> None:
    """The light of an upright stroke, all of it summed across, is that of two bright pixels."""
    widths, heights = [], []
    for index in range(300):
        scene = fine_scene(np.random.default_rng([2, index]))
        for glyph in scene.cells:
            if glyph.kind == "1" and abs(glyph.angle) < 0.03:
                top, left = int(glyph.y) - 12, int(glyph.x) - 12
                box = scene.picture[max(top, 0) : top + 25, max(left, 0) : left + 25]
                light = box @ np.array(COLOURS[glyph.colour]) / np.sum(np.square(COLOURS[glyph.colour]))
                light -= np.median(light)
                peak = np.quantile(light, 0.99)
                widths.append(light.sum() / peak / (12 * glyph.scale))
                heights.append((light.max(axis=1) > peak / 2).sum() / glyph.scale)
    assert len(widths) > 20
    assert np.mean(widths) == pytest.approx(2.0, abs=0.35)
    assert np.mean(heights) == pytest.approx(12, abs=0.7)


def test_digits_colours_and_slots_are_drawn_evenly() -> None:
    glyphs = [glyph for index in range(400) for glyph in fine_scene(np.random.default_rng([3, index])).cells]
    for values, kinds in (([g.kind for g in glyphs], 10), ([g.colour for g in glyphs], 6)):
        counts = Counter(values)
        assert len(counts) == kinds
        assert max(abs(n - len(glyphs) / kinds) for n in counts.values()) < 5 * np.sqrt(len(glyphs) / kinds)
    slots = Counter((int(g.y * 18 / 256), int(g.x * 18 / 256)) for g in glyphs)
    assert len(slots) == 18 * 18


def test_close_scene_shows_digits_as_large_as_a_tile_of_a_scene_at_252_pixels() -> None:
    for index in range(40):
        scene = close_scene(np.random.default_rng([4, index]), 84)
        assert scene.picture.shape == (84, 84, 3)
        for i, glyph in enumerate(scene.cells):
            assert (int(glyph.y * 3 / 84), int(glyph.x * 3 / 84)) == divmod(i, 3)
            assert 0.85 < glyph.scale < 1.1
            assert shown(scene.picture, glyph) == (CODES[glyph.kind], {glyph.colour})


def test_questions_say_what_stands_where() -> None:
    scene = fine_scene(np.random.default_rng(5))
    for i, cell in enumerate(["a1", "b1", "c1", "a2", "b2", "c2", "a3", "b3", "c3"]):
        question, answer = scene_question(scene, i)
        assert question == f"what is at {cell} ?"
        assert answer == f"{cell} {scene.cells[i].kind} {scene.cells[i].colour}"


def test_clip_shows_eight_digits_one_after_the_other() -> None:
    lengths: Counter[int] = Counter()
    for index in range(60):
        clip = fine_clip(np.random.default_rng([6, index]), 84)
        assert clip.frames.shape == (MOMENTS, 84, 84, 3) and len(clip.glyphs) == MOMENTS
        for frame, glyph in zip(clip.frames, clip.glyphs, strict=True):
            assert shown(frame, glyph) == (CODES[glyph.kind], {glyph.colour})
        kinds = [glyph.kind for glyph in clip.glyphs]
        runs = re.findall(r"(.)\1*", "".join(kinds))
        assert len(runs) == len(set(runs)) == 8
        lengths.update(Counter(kinds).values())
        questions = clip_questions(clip)
        assert set(questions.values()) == {f"{glyph.kind} {glyph.colour}" for glyph in clip.glyphs}
        assert all(re.search(r"colour is the (\d)", q)[1] == a.split()[0] for q, a in questions.items())
    assert min(lengths) == 1 and max(lengths) > 10


def test_regions_say_what_each_patch_shows(processor: FoveateProcessor) -> None:
    whole = right = told = 0
    for index in range(60):
        image, *texts = GlyphSource("fine_regions", processor).document(index).parts
        assert isinstance(image, Image) and image.source.shape == (84, 84, 3) and len(texts) == 36
        low = texts[0].text.split()[0] in CELLS and not any(set(text.text) & set("4567890") for text in texts)
        whole += low
        for number, text in enumerate(texts):
            row, column = divmod(number, 6)
            patch = image.source[14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
            words = text.text.split()
            if words[0] in CELLS:
                assert words.pop(0) == CELLS[row // 2 * 3 + column // 2]
            bright = np.unravel_index(patch.max(axis=2).argmax(), (14, 14))
            if words[-1] in COLOURS and not low:
                assert colour_at(patch, bright[1], bright[0]) == words[-1]
            if low:
                assert (words == ["nothing"]) == (patch.max() < 75) or patch.max() < 100
            else:
                assert (words == ["nothing"]) == (colour_at(patch, bright[1], bright[0]) is None)
            if words[0] in CODES:
                told += 1
                right += nearest_digit(patch) == words[0]
    assert 5 <= whole <= 27
    assert right / told > 0.9  # the templates are neither turned nor scaled


@pytest.mark.parametrize("kind", ["fine_captions", "close_captions", "fine_chat", "close_chat"])
def test_captions_and_chats_say_what_the_picture_shows(processor: FoveateProcessor, kind: str) -> None:
    """Read off the whole text, the picture being that of the same numbers drawn again."""
    for index in range(5):
        source = GlyphSource(kind, processor, split="test", seed=3)
        image, *parts = (part for part in source.document(index).parts if not _is_markup(part))
        text = "".join(part.text for part in parts)
        said = {cell: (digit, colour) for cell, digit, colour in re.findall(r"([abc][123]) (\d) (\w+)", text)}
        scene = fine_scene(source.rng(index)) if kind.startswith("fine") else close_scene(source.rng(index), 84)
        assert np.array_equal(scene.picture, image.source)
        assert said == {cell: (g.kind, g.colour) for cell, g in zip(CELLS, scene.cells, strict=True)}
        trained = "".join(part.text for part in parts if part.loss)
        assert len(re.findall(r"\d (?:red|green|blue|yellow|cyan|magenta)", trained)) == 9


def _is_markup(part: Image | Video | Text) -> bool:
    return isinstance(part, Text) and part.text == "<|user|>"


def test_clip_chat_asks_about_what_its_frames_show(processor: FoveateProcessor) -> None:
    for index in range(12):
        source = GlyphSource("fine_clip_chat", processor, frames=(1 + index, 4 + 2 * index))
        parts = source.document(index).parts
        (video,) = [part for part in parts if isinstance(part, Video)]
        clip = fine_clip(source.rng(index), 84)
        count = len(video.source)
        assert 1 + index <= count <= 4 + 2 * index
        taken = np.linspace(0, MOMENTS - 1, count).round().astype(int)
        assert np.array_equal(video.source, clip.frames[taken])
        said = re.findall(r"(\d) (\w+)<", "".join(part.text for part in parts if isinstance(part, Text) and part.loss))
        assert set(said) == {(clip.glyphs[i].kind, clip.glyphs[i].colour) for i in taken}


@pytest.mark.parametrize(("projector", "side"), [(1, 18), (2, 9), (3, 6), (6, 3)])
def test_scene_regions_say_what_each_token_shows(projector: int, side: int) -> None:
    scaled = FoveateProcessor(
        glyph_tokenizer(), image_size=(84, 84), patch_size=14, downsample_factor=projector, tiling="dynamic-s2",
        s2_scales=[84, 168, 252], chat_template=CHAT_TEMPLATE, frame_separator=FRAME_SEPARATOR,
    )  # fmt: skip
    with_places = 0
    for index in range(12):
        image, *texts = GlyphSource("fine_scene_regions", scaled).document(index).parts
        assert len(texts) == side * side
        texts = [text.text.split() for text in texts]
        placed = all(words[0] in CELLS for words in texts)
        with_places += placed
        step = 256 / side
        for number, words in enumerate(texts):
            top, left = (step * at for at in divmod(number, side))
            if placed:
                assert words.pop(0) == CELLS[int((top + 1) * 3 / 256) * 3 + int((left + 1) * 3 / 256)]
            box = image.source[round(top + 1) : round(top + step - 1), round(left + 1) : round(left + step - 1)]
            bright = np.unravel_index(box.max(axis=2).argmax(), box.shape[:2])
            colour = colour_at(box, bright[1], bright[0])
            assert words == ["nothing"] if colour is None else words != ["nothing"]
            assert not placed or colour is None or words[1] == colour
    assert 0 < with_places < 12


def test_scene_regions_name_tokens_that_are_no_square(processor: FoveateProcessor) -> None:
    odd = FoveateProcessor(glyph_tokenizer(), image_size=(84, 56), patch_size=14, chat_template=CHAT_TEMPLATE)
    with pytest.raises(ValueError, match="becomes 6 tokens"):
        GlyphSource("fine_scene_regions", odd).document(0)


def test_frame_regions_say_what_each_quarter_shows(processor: FoveateProcessor) -> None:
    seen = Counter()
    for index in range(60):
        image, *texts = GlyphSource("fine_frame_regions", processor).document(index).parts
        for number, text in enumerate(texts):
            top, left = (42 * at for at in divmod(number, 2))
            quarter = image.source[top : top + 42, left : left + 42]
            bright = np.unravel_index(quarter.max(axis=2).argmax(), (42, 42))
            words = text.text.split()
            colour = colour_at(quarter, bright[1], bright[0])
            assert (words == ["nothing"]) == (colour is None)
            if len(words) == 2:
                assert words[1] == colour
            seen[len(words) if colour else 0] += 1
    assert min(seen[0], seen[1], seen[2]) > 30
