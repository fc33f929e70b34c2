"""Scenes of eight rows and the questions about them, against the pictures and an order that is written out here."""

import numpy as np
import pytest

from foveate.data import drawing
from foveate.data.document import Document, Image, Text
from foveate.data.drawing import COLOURS
from foveate.data.encoding import encode
from foveate.data.glyphs import CHAT_TEMPLATE, FRAME_SEPARATOR, KIND_BUILDERS, GlyphSource, glyph_tokenizer
from foveate.data.sorting import RowScene, read_row, row_scene, sort_row
from foveate.vlm.processor import FoveateProcessor

NAMES = ["a1", "b1", "c1", "d1", "a2", "b2", "c2", "d2"]  # of rows, from the top
ORDER = [*"0123456789", "circle", "square", "triangle", "cross", "ring", "diamond"]


@pytest.fixture(scope="module")
def processor() -> FoveateProcessor:
    return FoveateProcessor(
        glyph_tokenizer(), image_size=(128, 64), video_size=(32, 32), patch_size=8, chat_template=CHAT_TEMPLATE,
        frame_separator=FRAME_SEPARATOR,
    )  # fmt: skip


def shown_colours(picture: np.ndarray, row: int) -> list[str]:
    """The colours of a row's four cells, from their brightest pixels."""
    colours = []
    for column in range(4):
        cell = picture[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].reshape(-1, 3).astype(float)
        bright = cell[np.argsort(cell.max(axis=1))[-20:]].mean(axis=0)
        colours.append(max(COLOURS, key=lambda name: np.dot(COLOURS[name], bright) / np.linalg.norm(COLOURS[name])))
    return colours


def pairs(said: str) -> list[tuple[str, str]]:
    """(colour, kind) of each glyph of an answer."""
    words = said.split()
    return list(zip(words[::2], words[1::2], strict=True))


def scenes(n: int, split: str = "train") -> list[RowScene]:
    return [row_scene(np.random.default_rng([5, i]), split) for i in range(n)]


def picture_of(document: Document) -> np.ndarray:
    [image] = [part for part in document.parts if isinstance(part, Image)]
    assert isinstance(image.source, np.ndarray)
    return image.source


def texts(document: Document) -> list[str]:
    return [part.text for part in document.parts if isinstance(part, Text)]


def turns(document: Document) -> list[tuple[str, str, str]]:
    """(what is asked, the row's name, the answer) of each turn of a conversation."""
    words = "".join(texts(document)).replace("<|user|>", "").split("<|end|>")
    found = []
    for turn in words[:-1]:
        question, answer = turn.split("<|assistant|>")
        [name] = [word for word in question.split() if word in NAMES]
        found.append((question.strip().replace(name, "_"), name, answer))
    return found


def test_each_row_holds_four_kinds_and_all_kinds_and_colours_occur() -> None:
    seen = set()
    for scene in scenes(40):
        assert scene.picture.shape == (128, 64, 3) and scene.picture.dtype == np.uint8
        assert len(scene.cells) == 32
        for row in range(8):
            kinds = [glyph.kind for glyph in scene.cells[4 * row : 4 * row + 4]]
            assert len(set(kinds)) == 4
        seen |= {(glyph.kind, glyph.colour) for glyph in scene.cells}
    assert seen == {(kind, colour) for kind in ORDER for colour in COLOURS}


def test_answers_tell_what_the_picture_shows_in_the_order_that_is_asked_for() -> None:
    for scene in scenes(10):
        for row, name in enumerate(NAMES):
            shown = shown_colours(scene.picture, row)
            question, said = read_row(scene, row)
            assert question == f"what is in row {name} ?"
            assert [colour for colour, _ in pairs(said)] == shown
            question, sorted_said = sort_row(scene, row)
            assert question == f"what does row {name} have ?"
            assert sorted(pairs(sorted_said)) == sorted(pairs(said))
            ranks = [ORDER.index(kind) for _, kind in pairs(sorted_said)]
            assert ranks == sorted(ranks) and len(set(ranks)) == 4
            assert read_row(scene, row, colours=False)[1].split() == [kind for _, kind in pairs(said)]
            assert sort_row(scene, row, colours=False)[1].split() == [kind for _, kind in pairs(sorted_said)]


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_scenes_show_digits_of_their_split_alone(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, drawn = drawing.digit_masks, []

    def recorded(of: str) -> dict[str, np.ndarray]:
        drawn.append(of)
        return real(of)

    monkeypatch.setattr(drawing, "digit_masks", recorded)
    scenes(2, split)
    assert set(drawn) == {split}


def test_regions_name_the_row_and_kind_of_each_token(processor: FoveateProcessor) -> None:
    source = GlyphSource("row_regions", processor)
    assert processor.tokens_per_image() == 32
    for index in range(5):
        document, scene = source.document(index), row_scene(source.rng(index), "train")
        assert np.array_equal(picture_of(document), scene.picture)
        assert texts(document) == [f"{NAMES[i // 4]} {glyph.kind}" for i, glyph in enumerate(scene.cells)]


def test_captions_tell_every_row_once_and_the_name_is_given(processor: FoveateProcessor) -> None:
    source = GlyphSource("row_captions", processor)
    orders = set()
    for index in range(5):
        document, scene = source.document(index), row_scene(source.rng(index), "train")
        parts = [part for part in document.parts if isinstance(part, Text)]
        names = [part.text.strip() for part in parts if not part.loss][:-1]
        told = [part.text.removesuffix(" ; ").split() for part in parts if part.loss]
        assert sorted(names) == sorted(NAMES)
        for name, kinds in zip(names, told, strict=True):
            row = NAMES.index(name)
            assert kinds == [glyph.kind for glyph in scene.cells[4 * row : 4 * row + 4]]
        orders.add(tuple(names))
    assert len(orders) == 5


@pytest.mark.parametrize(("kind", "coloured"), [("row_chat", True), ("row_kind_chat", False)])
def test_conversations_read_and_sort_rows_that_differ(kind: str, coloured: bool, processor: FoveateProcessor) -> None:
    source, asked = GlyphSource(kind, processor, turns=(3, 8)), []
    lengths = set()
    for index in range(60):
        document = source.document(index)
        picture, said = picture_of(document), turns(document)
        lengths.add(len(said))
        assert len({name for _, name, _ in said}) == len(said)
        for question, name, answer in said:
            asked.append(question)
            colours = shown_colours(picture, NAMES.index(name))
            kinds = answer.split()[1::2] if coloured else answer.split()
            if coloured:
                told = [colour for colour, _ in pairs(answer)]
                assert (told if "is in" in question else sorted(told)) == (
                    colours if "is in" in question else sorted(colours)
                )
            if "have" in question:
                assert kinds == sorted(kinds, key=ORDER.index)
            assert len(kinds) == 4
    assert lengths == {3, 4, 5, 6, 7, 8}
    assert set(asked) == {"what is in row _ ?", "what does row _ have ?"}
    assert 0.35 < asked.count("what is in row _ ?") / len(asked) < 0.65


def test_every_word_is_in_the_vocabulary(processor: FoveateProcessor) -> None:
    """The quickstart's, which has no word for rows' names or for sorting."""
    for kind in ("row_chat", "row_kind_chat", "row_captions"):
        ids = encode(GlyphSource(kind, processor).document(0), processor).input_ids
        assert processor.tokenizer.unk_token_id not in np.asarray(ids).tolist()


def test_older_kinds_keep_their_numbers() -> None:
    """What they draw depends on their place in the list: the quickstart's data must stay as they are."""
    assert list(KIND_BUILDERS)[:17] == [
        "regions", "frame_regions", "captions", "interleaved", "scene_chat", "clip_chat", "needle_chat",
        "fine_regions", "fine_scene_regions", "fine_frame_regions", "close_captions", "close_chat", "fine_captions",
        "fine_chat", "fine_clip_chat", "row_regions", "row_captions",
    ]  # fmt: skip
