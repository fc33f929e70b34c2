"""The page is parsed with the standard library's HTML parser."""

import base64
import copy
import io
from collections.abc import Sequence
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image as PILImage

from foveate.data.document import Document, DocumentError, Image, Text, Video
from foveate.data.encoding import IGNORE, encode
from foveate.data.glyphs import GlyphSource, encode_mp4
from foveate.data.inspection import inspect_page, token_texts
from foveate.vlm.processor import FoveateProcessor


class Documents:
    """A source of given documents; in the place of some an error."""

    def __init__(self, documents: Sequence[Document | DocumentError]):
        self.all, self.documents, self.runs = documents, len(documents), (len(documents),)

    def document(self, index: int) -> Document:
        if isinstance(found := self.all[index], DocumentError):
            raise found
        return found

    def key(self, index: int) -> str:
        return self.all[index].key


class Page(HTMLParser):
    """Elements with their attributes, and the text of tokens, captions, placeholders and articles."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tokens: list[tuple[str, set[str]]] = []  # (text, kinds)
        self.texts: dict[str, list[str]] = {"figcaption": [], "placeholder": [], "h2": [], "why": [], "li": []}
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag in ("img", "meta"):
            return
        name = given.get("class") if given.get("class") in self.texts else tag
        self.open.append(name)
        if name in self.texts:
            self.texts[name].append("")
        if tag == "i":
            self.tokens.append(("", set((given.get("class") or "").split())))

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        name = self.open[-1] if self.open else ""
        if name == "i":
            self.tokens[-1] = (self.tokens[-1][0] + data, self.tokens[-1][1])
        if name in self.texts:
            self.texts[name][-1] += data

    def document_tokens(self) -> list[tuple[str, set[str]]]:
        """Those of the documents: the legend has four."""
        return self.tokens[4:]


def page_of(*documents: Document | DocumentError, processor: FoveateProcessor) -> Page:
    return Page(inspect_page(Documents(documents), "a source", processor, count=len(documents)))


PICTURE = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def test_tokens_with_loss_are_those_of_the_labels(chatml_processor: FoveateProcessor) -> None:
    parts = (Text("the cat"), Text(" is on the mat", loss=True), Text(" ?"), Text("<|im_end|>", loss=True))
    document = Document("a", parts)
    sample = encode(document, chatml_processor)
    tokens = page_of(document, processor=chatml_processor).document_tokens()
    assert ["l" in kinds for _, kinds in tokens] == (sample.labels != IGNORE).tolist()
    assert "".join(text for text, _ in tokens) == "the cat is on the mat ?<|im_end|>"
    assert [text for text, kinds in tokens if "s" in kinds] == ["<|im_end|>"]


def test_token_that_reaches_into_a_part_with_loss_is_marked(chatml_processor: FoveateProcessor) -> None:
    """Loss is told by token: " mat" is one, though only its end is in the part with loss."""
    whole = chatml_processor.tokenizer("is on the mat").input_ids
    document = Document("a", (Text("is on the m"), Text("at", loss=True)))
    tokens = page_of(document, processor=chatml_processor).document_tokens()
    assert len(tokens) == len(whole) < len("is on the mat")
    assert tokens[-1] == (" mat", {"l"})


@pytest.mark.parametrize("one_token", [False, True])
def test_text_of_data_is_escaped(chatml_processor: FoveateProcessor, one_token: bool) -> None:
    evil = "<script>alert('x')</script> & <img src=x onerror=alert(1)>"
    if one_token:
        tokenizer = copy.deepcopy(chatml_processor.tokenizer)
        tokenizer.add_tokens([evil])
        chatml_processor = FoveateProcessor(tokenizer, image_size=(28, 28))
    documents = [
        Document(evil, (Text(evil, loss=True), Text(evil))),
        DocumentError(evil, "bad_record", evil),
        Document("b", (Image(b"not an image <script>"),)),
    ]
    page = inspect_page(Documents(documents), evil, chatml_processor, count=3)
    parsed = Page(page)
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "img", "iframe", "link")]
    assert not [name for _, given in parsed.tags for name in given if name.startswith("on")]
    assert "".join(text for text, _ in parsed.document_tokens()) == evil + evil
    assert (len(parsed.document_tokens()) == 2) == one_token
    assert parsed.texts["h2"] == [evil, evil, "b"] and parsed.texts["why"][0] == evil
    policy = next(given["content"] for tag, given in parsed.tags if "http-equiv" in given)
    assert "default-src 'none'" in policy and "script" not in policy
    assert "http://" not in page and "https://" not in page


def test_media_are_what_the_model_sees(processor: FoveateProcessor) -> None:
    """Thumbnails, decoded, are the sample's tiles; placeholders are collapsed."""
    clip = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    parts = (Text("a"), Image(png(PICTURE)), Image(PICTURE[::-1]), Text("and", loss=True), Video(clip), Text("has"))
    document = Document("a", parts)
    sample = encode(document, processor)
    page = page_of(document, processor=processor)
    shown = [given["src"].removeprefix("data:image/png;base64,") for tag, given in page.tags if tag == "img"]
    pictures = [np.asarray(PILImage.open(io.BytesIO(base64.b64decode(data)))) for data in shown]
    for picture, tile in zip(pictures, [*sample.images, *sample.frames], strict=True):
        np.testing.assert_array_equal(picture, tile)
    assert page.texts["placeholder"] == ["⟨image: 16 tokens⟩", "⟨image: 16 tokens⟩", "⟨video of 3 frames: 14 tokens⟩"]
    assert page.texts["figcaption"] == ["80×50 → 64×64", "80×50 → 64×64", "frame 1", "frame 2", "frame 3"]
    # the separator after the last frame stays
    assert [text.strip() for text, _ in page.document_tokens()] == ["a", "and", "<|frame|>", "has"]


def test_frames_have_their_times(processor: FoveateProcessor) -> None:
    clip = encode_mp4(np.zeros((12, 32, 32, 3), np.uint8), scale=1, fps=4)
    page = page_of(Document("a", (Video(clip, num_frames=3), Text("clip"))), processor=processor)
    assert page.texts["figcaption"] == ["0.00 s", "1.50 s", "2.75 s"]


def test_large_pictures_and_long_videos_are_shown_in_part(chatml_processor: FoveateProcessor) -> None:
    large = FoveateProcessor(chatml_processor.tokenizer, image_size=(448, 672), patch_size=14)
    page = page_of(
        Document("a", (Image(PICTURE), Video(np.zeros((40, 28, 28, 3), np.uint8)), Text("cat"))), processor=large
    )
    pictures = [given["src"] for tag, given in page.tags if tag == "img"]
    assert len(pictures) == 1 + 32
    image = PILImage.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2])))
    assert image.size == (320, 213) and pictures[0].startswith("data:image/jpeg")
    assert page.texts["figcaption"][0] == "80×50 → 672×448"
    assert page.texts["figcaption"][-1] == "frame 40"


def test_refused_documents_are_shown_with_their_reason(processor: FoveateProcessor) -> None:
    page = page_of(
        DocumentError("shard/3", "missing_media", "no 0.jpg"),
        Document("b", (Image(b"no image"), Text("a", loss=True))),
        Document("c", (Text("a scene", loss=True),)),
        processor=processor,
    )
    kinds = [given["class"] for tag, given in page.tags if tag == "article"]
    assert kinds == ["refused", "refused", "document"]
    assert page.texts["why"][0] == "no 0.jpg" and "not an image" in page.texts["why"][1]
    assert page.texts["li"] == [
        "3 documents of 3, drawn with seed 0",
        "2 tokens, 1 of them carry loss (50%)",
        "2 refused",
    ]


def test_documents_are_drawn_by_seed(processor: FoveateProcessor) -> None:
    source = GlyphSource("captions", processor, documents=50)

    def keys(seed: int, count: int = 8) -> list[str]:
        return Page(inspect_page(source, "glyphs", processor, count, seed)).texts["h2"]

    assert keys(0) == keys(0) != keys(1)
    assert len(set(keys(0))) == 8
    assert keys(0, count=80) == [source.key(index) for index in range(50)]
    endless = GlyphSource("captions", processor)
    assert len(Page(inspect_page(endless, "glyphs", processor, 3)).texts["h2"]) == 3
    with pytest.raises(ValueError, match="count is 0"):
        inspect_page(source, "glyphs", processor, 0)


@pytest.mark.parametrize("text", ["naïve 猫 😀!", "<|im_start|>user\ncat<|im_end|>\n", "  two  spaces ", "猫", ""])
def test_token_texts_join_to_the_text(chatml_processor: FoveateProcessor, text: str) -> None:
    ids = chatml_processor.tokenizer(text).input_ids
    texts = token_texts(chatml_processor.tokenizer, ids)
    assert "".join(texts) == text and len(texts) == len(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in texts)
