"""A page that shows documents as a model reads them: media at the model's size, tokens, and where loss falls."""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage
from transformers import PreTrainedTokenizerBase

from ..vlm.media import MediaLimits
from ..vlm.processor import FoveateProcessor
from ..vlm.tiling import ImagePlan, merge_tiles
from .document import Document, DocumentError, Image, Video
from .encoding import IGNORE, Sample, drawn_queries, encode, media_of
from .sources import Source

FIRST_OF_ENDLESS = 10_000  # an endless source's documents that are drawn from
MAX_FRAMES = 32  # of a video that are shown
THUMBNAIL = 320  # pixels of the longer side at most


def inspect_page(source: Source, name: str, processor: FoveateProcessor, count: int = 20, seed: int = 0) -> str:
    """A page of HTML that stands alone and runs nothing, with `count` documents drawn at random.

    Args:
        name: what the source is called on the page.
        count: documents to show; all where the source has fewer.
        seed: of the draw.
    """
    if count < 1:
        raise ValueError(f"count is {count}; accepted: 1 at least")
    documents = FIRST_OF_ENDLESS if source.documents is None else source.documents
    rng = np.random.default_rng(seed)
    indices = np.sort(rng.choice(documents, min(count, documents), replace=False)).tolist()
    shown = [_shown(source, index, processor) for index in indices]
    good = [entry for entry in shown if entry.refused is None]
    tokens, loss = sum(entry.tokens for entry in good), sum(entry.loss_tokens for entry in good)
    of = "an endless source" if source.documents is None else f"{source.documents:,}"
    lines = [
        f"{len(shown):,} documents of {of}, drawn with seed {seed}",
        f"{tokens:,} tokens, {loss:,} of them carry loss ({loss / max(tokens, 1):.0%})",
        f"{len(shown) - len(good):,} refused",
    ]
    head = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    body = "".join(entry.html for entry in shown)
    return PAGE.format(title=html.escape(name), head=head, body=body, css=CSS)


@dataclass(frozen=True)
class _Shown:
    """A document's part of the page."""

    html: str
    tokens: int = 0
    loss_tokens: int = 0
    refused: str | None = None  # the reason


def _shown(source: Source, index: int, processor: FoveateProcessor) -> _Shown:
    limits = MediaLimits()
    try:
        document = source.document(index)
        sample = encode(document, processor, limits)
        media = _media(document, sample, limits, processor)
    except DocumentError as error:
        chips = _chips([("document", f"{index:,}", ""), ("refused:", error.reason, "")])
        text = f'<p class="why">{html.escape(error.message)}</p>'
        return _Shown(_article(error.key, chips, text, "refused"), refused=error.reason)
    counts = [("document", f"{index:,}", ""), ("", f"{sample.tokens:,}", "tokens")]
    for number, unit in (
        (sample.loss_tokens, "with loss"),
        (sum(medium.kind == "image" for medium in media), "images"),
        (len(sample.frames), "frames"),
        (sample.tiles, "tiles"),
    ):
        if number:
            counts.append(("", f"{number:,}", unit.removesuffix("s") if number == 1 else unit))
    text = f'<div class="text">{_tokens_html(sample, media, processor)}</div>'
    return _Shown(_article(sample.key, _chips(counts), text, "document"), sample.tokens, sample.loss_tokens)


def _article(key: str, chips: str, text: str, kind: str) -> str:
    return f'<article class="{kind}"><header><h2>{html.escape(key)}</h2>{chips}</header>{text}</article>\n'


def _chips(facts: Sequence[tuple[str, str, str]]) -> str:
    """Facts as (what stands before, value, what stands after)."""
    items = "".join(f"<span>{a} <b>{html.escape(value)}</b> {b}</span>" for a, value, b in facts)
    return f'<div class="chips">{items}</div>'


# Media


@dataclass(frozen=True)
class _Medium:
    """An image or a video as the model sees it."""

    kind: str  # "image" or "video"
    pictures: list[np.ndarray]  # uint8 [height, width, 3]: an image's tiles, a video's frames
    captions: list[str]  # of each picture
    tokens: int  # its placeholders


def _media(document: Document, sample: Sample, limits: MediaLimits, processor: FoveateProcessor) -> list[_Medium]:
    """The document's media in reading order, with the sample's tiles."""
    images, videos = media_of(document)
    queries = drawn_queries(document.key, processor)
    plan = processor.plan(images, videos, query_tokens=queries, limits=limits)
    pictures, start = [], 0
    for one, (height, width) in zip(plan.images, sample.media.image_sizes.tolist(), strict=True):
        tiles = sample.images[start : start + one.tiles]
        start += one.tiles
        pictures.append(_image(one, tiles, f"{width}×{height}", native=processor.tiling == "native"))
    clips, start = [], 0
    for video, part in zip(plan.videos, videos, strict=True):
        each = video.grid[0] * video.grid[1]
        tiles = sample.frames[start : start + each * video.frames]
        start += len(tiles)
        frames = [merge_tiles(tiles[i : i + each], video.grid) for i in range(0, len(tiles), each)]
        timed = not isinstance(part.source, np.ndarray | list | tuple)
        captions = [f"{time:.2f} s" if timed else f"frame {time + 1:.0f}" for time in video.times_s]
        clips.append(_Medium("video", frames, captions, video.tokens))
    of_kind = {Image: iter(pictures), Video: iter(clips)}
    return [next(of_kind[type(part)]) for part in document.parts if isinstance(part, Image | Video)]


def _image(plan: ImagePlan, tiles: np.ndarray, size: str, native: bool) -> _Medium:
    shown = [merge_tiles(tiles, plan.grid)] if native else list(tiles)
    seen = f"{shown[0].shape[1]}×{shown[0].shape[0]}"
    captions = [f"tile {number} of {len(shown)}" for number in range(1, len(shown) + 1)]
    first = seen if seen == size else f"{size} → {seen}"
    captions[0] = first if len(shown) == 1 else f"{first}, {captions[0]}"
    return _Medium("image", shown, captions, plan.tokens)


def _figure(tile: np.ndarray, caption: str) -> str:
    image = PILImage.fromarray(tile)
    side = max(image.size)
    if side > THUMBNAIL:
        image = image.resize((image.width * THUMBNAIL // side, image.height * THUMBNAIL // side))
    buffer = io.BytesIO()
    kind = "png" if side <= 128 else "jpeg"  # small tiles are shown enlarged, where JPEG's blocks would be seen
    image.save(buffer, format=kind, **({"quality": 85} if kind == "jpeg" else {}))
    data = base64.b64encode(buffer.getvalue()).decode()
    sharp = ' class="small"' if side <= 128 else ""
    return (
        f'<figure><img{sharp} alt="" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _medium_html(medium: _Medium, tokens: int) -> str:
    count = len(medium.pictures)
    frames = f" of {count:,} frames" if medium.kind == "video" else ""
    chosen = np.linspace(0, count - 1, min(MAX_FRAMES, count)).round().astype(int).tolist()
    figures = "".join(_figure(medium.pictures[i], medium.captions[i]) for i in chosen)
    left_out = count - len(chosen)
    more = f'<span class="more">{left_out:,} frames in between are not shown</span>' if left_out else ""
    label = f"⟨{medium.kind}{frames}: {tokens:,} tokens⟩"
    return f'<div class="medium"><span class="placeholder">{label}</span><div>{figures}{more}</div></div>'


# Tokens


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; nothing where a character goes on in the next token, which has it whole."""

    def decoded(start: int, stop: int) -> str:
        text = tokenizer.decode(list(ids[start:stop]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    texts = []
    start = done = 0  # text up to `done` is given out; decoding begins before it, at `start`, so that spaces come right
    for stop in range(1, len(ids) + 1):
        before, text = decoded(start, done), decoded(start, stop)
        if len(text) > len(before) and (stop == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            texts.append(text[len(before) :])
            start, done = done, stop
        else:
            texts.append("")
    return texts


def _tokens_html(sample: Sample, media: Sequence[_Medium], processor: FoveateProcessor) -> str:
    """Tokens one by one, those with loss marked; each medium's placeholders as one, with its picture."""
    ids = sample.input_ids.tolist()
    texts = token_texts(processor.tokenizer, ids)
    special = {i for i, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    pieces = []
    at = 0
    for start, stop, medium in _placeholders(ids, media, processor):
        pieces += [_token(texts[i], ids[i] in special, sample.labels[i] != IGNORE) for i in range(at, start)]
        pieces.append(_medium_html(medium, stop - start))
        at = stop
    pieces += [_token(texts[i], ids[i] in special, sample.labels[i] != IGNORE) for i in range(at, len(ids))]
    return "".join(pieces)


def _token(text: str, special: bool, loss: bool) -> str:
    kinds = " ".join(name for name, holds in (("l", loss), ("s", special)) if holds)
    shown = html.escape(text).replace("\n", "<u></u>\n")
    if special:  # the space that decoding puts before it is not part of it
        space, shown = shown[: len(shown) - len(shown.lstrip(" "))], shown.lstrip(" ")
        return f'{space}<i class="{kinds}">{shown}</i>'
    return f'<i class="{kinds}">{shown}</i>' if kinds else f"<i>{shown}</i>"


def _placeholders(
    ids: Sequence[int], media: Sequence[_Medium], processor: FoveateProcessor
) -> Iterator[tuple[int, int, _Medium]]:
    """Where each medium's tokens begin and end; a video's from its first frame to its last, separators included."""
    at = 0
    for medium in media:
        token = processor.image_token_id if medium.kind == "image" else processor.video_token_id
        left = medium.tokens
        while ids[at] != token:
            at += 1
        start = at
        while left:
            left -= ids[at] == token
            at += 1
        yield start, at, medium


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{css}</style>
<main><h1>{title}</h1><ul class="facts">{head}</ul>
<p class="legend"><i class="l">carries loss</i> <i>context</i> <i class="s">special token</i>
<i class="l s">special token with loss</i> <u></u> line break</p>
{body}</main></html>
"""

CSS = """
:root{color-scheme:light dark;--ground:#f6f7f9;--card:#fff;--ink:#1c2128;--soft:#667;--line:#dfe3e8;
--loss:#cdeed3;--loss-edge:#8fcf9d;--special:#e4e8f7;--special-ink:#39489b;--bad:#b3261e;--bad-ground:#fdeceb}
@media(prefers-color-scheme:dark){:root{--ground:#14171b;--card:#1c2026;--ink:#dde2e8;--soft:#98a2ad;--line:#333a43;
--loss:#1d4a2b;--loss-edge:#33784a;--special:#2a3157;--special-ink:#b7c2ff;--bad:#ff8a80;--bad-ground:#3a2021}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:62rem;margin:0 auto;padding:2rem 1.2rem 4rem}
h1{font-size:1.35rem;margin:0 0 .6rem;overflow-wrap:anywhere}
.facts{list-style:none;margin:0;padding:0;color:var(--soft)}
.facts li{display:inline}.facts li+li::before{content:" · "}
.legend{color:var(--soft);font-size:.85rem;margin:.8rem 0 1.6rem}
article{background:var(--card);border:1px solid var(--line);border-radius:10px;margin:0 0 1.2rem;overflow:hidden}
article header{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;align-items:baseline;justify-content:space-between;
padding:.6rem 1rem;border-bottom:1px solid var(--line)}
h2{font:600 .85rem/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:0;overflow-wrap:anywhere}
.chips{display:flex;flex-wrap:wrap;gap:.9rem;color:var(--soft);font-size:.82rem;font-variant-numeric:tabular-nums}
.chips b{color:var(--ink);font-weight:600}
.text{padding:.9rem 1rem 1.1rem;white-space:pre-wrap;overflow-wrap:anywhere}
i{font-style:normal;border-radius:3px}
i.l{background:var(--loss);box-shadow:inset 0 -2px var(--loss-edge);border-radius:0}
i.s{background:var(--special);color:var(--special-ink);font:.8em ui-monospace,Menlo,Consolas,monospace;padding:0 .2em}
i.l.s{background:var(--loss)}
u{text-decoration:none;opacity:.45;font-size:.8em}u::before{content:"↵"}
.medium{display:block;margin:.45rem 0;white-space:normal}
.medium>div{display:flex;flex-wrap:wrap;gap:.5rem;align-items:flex-end}
.placeholder{display:inline-block;font:.8rem ui-monospace,Menlo,Consolas,monospace;color:var(--soft);
margin-bottom:.3rem}
figure{margin:0}figure img{display:block;max-width:100%;height:auto;border-radius:5px;border:1px solid var(--line)}
img.small{width:128px;image-rendering:pixelated}
figcaption{font-size:.75rem;color:var(--soft);font-variant-numeric:tabular-nums;margin-top:.15rem}
.more{font-size:.8rem;color:var(--soft)}
article.refused{border-color:var(--bad)}
.refused header{background:var(--bad-ground)}.refused .chips b{color:var(--bad)}
.why{margin:0;padding:.9rem 1rem;color:var(--bad);overflow-wrap:anywhere}
"""
