from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from foveate.data.document import Document, DocumentError, Image, Text, Video, chat_document
from foveate.data.encoding import Sample, encode
from foveate.data.glyphs import KIND_BUILDERS, GlyphSource, encode_mp4
from foveate.data.packing import collate
from foveate.vlm.media import load_video
from foveate.vlm.processor import FoveateProcessor

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
CLIP = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)


def grey_mp4(frames: int) -> bytes:
    """Frame i of n is of brightness 200 i / n."""
    greys = np.arange(frames) * 200 // frames
    return encode_mp4(np.broadcast_to(greys[:, None, None, None], (frames, 32, 32, 3)).astype(np.uint8), scale=1)


def tokens_of(document: Document, processor: FoveateProcessor) -> tuple[list[int], list[int]]:
    """Ids and labels of a document, part by part; right where no word goes on over the end of a part."""
    vocabulary = processor.tokenizer.get_vocab()
    ids, labels = [], []
    for part in document.parts:
        if isinstance(part, Text):
            new = processor.tokenizer.encode(part.text, add_special_tokens=False)
        elif isinstance(part, Image):
            new = [vocabulary["<image>"]] * 16
        else:
            new = ([vocabulary["<video>"]] * 4 + [vocabulary["<|frame|>"]]) * len(part.source)
        ids += new
        labels += new if isinstance(part, Text) and part.loss else [-100] * len(new)
    return ids, [-100, *labels[1:]]


@pytest.mark.parametrize("kind", KIND_BUILDERS)
def test_ids_and_labels_are_those_of_the_parts(processor: FoveateProcessor, kind: str) -> None:
    source = GlyphSource(kind, processor)
    for index in range(20):
        document = source.document(index)
        if "regions" in kind:  # its texts are not one text
            document = Document("key", document.parts[:2])
        sample = encode(document, processor)
        ids, labels = tokens_of(document, processor)
        assert sample.input_ids.tolist() == ids
        assert sample.labels.tolist() == labels
        assert (sample.input_ids.dtype, sample.labels.dtype) == (np.int64, np.int64)
        assert sample.key == document.key
        assert sample.tiles == sum(
            1 if isinstance(p, Image) else len(p.source) for p in document.parts if not isinstance(p, Text)
        )


def test_first_label_is_never_predicted(processor: FoveateProcessor) -> None:
    sample = encode(Document("key", (Text("red circle", loss=True),)), processor)
    assert sample.labels.tolist() == [-100, processor.tokenizer.convert_tokens_to_ids("circle")]


def test_labels_of_subword_tokens_spell_the_answer(chatml_processor: FoveateProcessor) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is the cat on? né ☃"}]},
        {"role": "assistant", "content": "the mat, ☃ né"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "is"},
    ]
    sample = encode(chat_document("key", messages, [Image(NOISE)], chatml_processor), chatml_processor)
    labelled = sample.labels != -100
    assert np.array_equal(sample.labels[labelled], sample.input_ids[labelled])
    assert chatml_processor.tokenizer.decode(sample.labels[labelled]) == "the mat, ☃ né<|im_end|>\nis<|im_end|>\n"


@pytest.mark.parametrize("placeholder", ["<image>", "<video>"])
@pytest.mark.parametrize("loss", [False, True])
def test_a_placeholder_inside_a_text_is_refused(processor: FoveateProcessor, placeholder: str, loss: bool) -> None:
    document = Document("a/key", (Image(NOISE), Text(f"what is {placeholder} ?", loss)))
    with pytest.raises(ValueError, match=r"^a/key: .*placeholder"):
        encode(document, processor)


@pytest.mark.parametrize("parts", [(), (Text(""),), (Text("  \n"),)])
def test_a_document_without_tokens_is_refused(processor: FoveateProcessor, parts: tuple) -> None:
    with pytest.raises(ValueError, match=r"^a/key: the document is empty"):
        encode(Document("a/key", parts), processor)


def test_images_are_resized_and_frames_too(processor: FoveateProcessor, tmp_path: Path) -> None:
    picture = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3)).astype(np.uint8))
    picture.save(tmp_path / "picture.png")
    expected = np.asarray(picture.resize((64, 64), PILImage.Resampling.BICUBIC))
    array = np.asarray(picture)
    for source in (picture, array, tmp_path / "picture.png", (tmp_path / "picture.png").read_bytes()):
        assert np.array_equal(encode(Document("key", (Image(source),)), processor).images, expected[None])
    frames = encode(Document("key", (Video(np.stack([array, array])),)), processor).frames
    assert np.array_equal(frames, [np.asarray(picture.resize((32, 32), PILImage.Resampling.BICUBIC))] * 2)


def test_media_of_the_right_size_are_taken_as_they_are(processor: FoveateProcessor) -> None:
    sample = encode(Document("key", (Video(CLIP), Image(NOISE), Video(CLIP[:1]), Text("red"))), processor)
    assert np.array_equal(sample.images, NOISE[None])
    assert np.array_equal(sample.frames, np.concatenate([CLIP, CLIP[:1]]))


@pytest.mark.parametrize(("count", "expected"), [(None, 8), (3, 3), (12, 12)])
def test_video_files_are_sampled(processor: FoveateProcessor, tmp_path: Path, count: int | None, expected: int) -> None:
    (tmp_path / "clip.mp4").write_bytes(grey_mp4(12))
    sample = encode(Document("key", (Video(tmp_path / "clip.mp4", num_frames=count),)), processor)
    assert len(sample.frames) == expected
    assert (sample.input_ids == processor.video_token_id).sum() == 4 * expected
    shown = sample.frames.mean(axis=(1, 2, 3)) / (200 / 12)  # the number of each frame
    assert np.all(np.diff(shown) > 0.5)
    assert np.abs(shown - shown.round()).max() < 0.25


def test_frames_given_as_such_are_all_kept_unless_a_number_is_named(processor: FoveateProcessor) -> None:
    many = np.repeat(CLIP, 10, axis=0)  # more than the processor's num_frames
    for source in (many, list(many), [PILImage.fromarray(frame) for frame in many], load_video(many)):
        assert np.array_equal(encode(Document("key", (Video(source),)), processor).frames, many)
    for source in (many, list(many)):
        assert len(encode(Document("key", (Video(source, num_frames=4),)), processor).frames) == 4


@pytest.mark.parametrize(
    "part",
    [
        Image("missing.png"),
        Image(b"no picture"),
        Image(NOISE / np.float32(255)),
        Video("missing.mp4"),
        Video(b"no clip"),
        Video(CLIP / np.float32(255)),
        Video(CLIP[:0]),
        Video(CLIP[..., :2]),
    ],
)
def test_media_that_cannot_be_read_are_named_with_their_document(
    processor: FoveateProcessor, part: Image | Video
) -> None:
    with pytest.raises(DocumentError, match=r"^a/key: "):
        encode(Document("a/key", (part, Text("red", loss=True))), processor)


def test_a_cut_file_is_an_error_not_another_picture(processor: FoveateProcessor, tmp_path: Path) -> None:
    PILImage.fromarray(NOISE).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    with pytest.raises(DocumentError, match=r"^a/key: "):
        encode(Document("a/key", (Image(data[: len(data) // 2]),)), processor)
    with pytest.raises(DocumentError, match=r"^a/key: "):
        encode(Document("a/key", (Video(grey_mp4(12)[:400]),)), processor)


def test_training_reads_what_inference_reads(processor: FoveateProcessor) -> None:
    """Ids and pixels equal those of the processor's call, for stills and for a video file."""
    mp4 = grey_mp4(12)
    messages = [
        {
            "role": "user",
            "content": [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "what is at b3 ?"}],
        },
        {"role": "assistant", "content": "red circle"},
    ]
    picture = PILImage.fromarray(NOISE).resize((80, 40))
    sample = encode(chat_document("key", messages, [Video(mp4), Image(picture)], processor), processor)
    inputs = processor(
        text=processor.apply_chat_template(messages), images=[picture], videos=[mp4], return_tensors="pt"
    )
    batch = collate([[sample]], processor)
    for name in ("input_ids", "pixel_values", "pixel_values_videos"):
        assert batch.inputs[name].equal(inputs[name]), name


def test_encoding_twice_gives_the_same(processor: FoveateProcessor) -> None:
    document = GlyphSource("clip_chat", processor).document(3)
    first, second = encode(document, processor), encode(document, processor)
    assert isinstance(first, Sample)
    for name in ("input_ids", "labels", "images", "frames"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
