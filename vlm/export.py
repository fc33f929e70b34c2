"""Models for people who have transformers and nothing of ours: with the model's code, or as a stock architecture.

`export(..., format="code")` is exact for every model and asks its users for `trust_remote_code=True`.
`export(..., format="stock")` needs no remote code, and is refused where no stock architecture computes the same; which
there are says `stock.py`. `export(..., format="vila")` writes VILA's folders (`vila.py`).
"""

import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .model import FoveateForConditionalGeneration
from .processor import FoveateProcessor
from .quantised_weights import is_quantised
from .stock import ExportError, Media, add_to_json, stock_pixels, stock_twin

MODEL_AUTO_MAP = {
    "AutoConfig": "config.FoveateConfig",
    "AutoModel": "model.FoveateForConditionalGeneration",
    "AutoModelForCausalLM": "model.FoveateForConditionalGeneration",
    "AutoModelForImageTextToText": "model.FoveateForConditionalGeneration",
    "AutoProcessor": "processor.FoveateProcessor",
}
LOGITS_TOLERANCE = 1e-5  # of the largest logit


def export(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    out: str | os.PathLike[str],
    format: Literal["code", "stock", "vila"] = "code",
) -> None:
    """Writes model and processor as a directory that transformers loads without this package.

    Args:
        model: any model of ours; it is not changed. Quantised ones (`quantised_weights.py`) fit format `code` alone.
        processor: the one that it was trained with.
        out: a directory that is made; it must not exist, or be empty.
        format: `code` (see `export_with_code`), `stock` (see `export_stock`) or `vila` (see `to_vila`).

    Raises:
        ExportError: `out` holds files already, or the format can't express the model. Nothing is left in `out`.
    """
    from .vila import to_vila  # which imports this module

    writers = {"code": export_with_code, "stock": export_stock, "vila": to_vila}
    if format not in writers:
        raise ExportError(f"format is {format!r}; accepted: {', '.join(writers)}")
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.pre_quantized:
        raise ExportError(
            "the model was loaded with quantised weights, which transformers can't write again; accepted: a model in "
            "floating point, or a copy of the folder"
        )
    if format != "code" and is_quantised(model.config):
        raise ExportError(f"the model's weights are quantised; accepted by format {format!r}: floating point")
    writers[format](model, processor, out)


def export_with_code(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, out: str | os.PathLike[str]
) -> None:
    """Writes weights, processor and the few files of code that run them.

    `AutoModelForImageTextToText`, `AutoModelForCausalLM`, `AutoModel`, `AutoConfig` and `AutoProcessor` load the
    directory with `trust_remote_code=True`. Reading video files needs PyAV there.

    Raises:
        ExportError: `out` holds files already.
    """
    with written_whole(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for part in (model, processor):
            custom_object_save(part, folder)
        add_to_json(folder / "config.json", auto_map=MODEL_AUTO_MAP)
        add_to_json(folder / "processor_config.json", auto_map={"AutoProcessor": MODEL_AUTO_MAP["AutoProcessor"]})


def export_stock(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, out: str | os.PathLike[str]
) -> None:
    """Writes the model as a stock transformers architecture, and a stock processor. No remote code is needed.

    What was written is loaded again and must give the model's own logits on random input, within 1e-5 of the largest
    (vision in float64, the LLM in its dtype); this takes memory for a second copy of the model.

    llava, llava_next and lfm2_vl know only images. A video's frames are given as images, `<image>` in place of
    `<video>`, each followed by the processor's `frame_separator`. internvl and llava_onevision take videos.

    Inputs from `AutoProcessor.from_pretrained(out, backend="pil")`, which needs no torchvision, equal ours for RGB
    images (torchvision, the default where it is installed, rounds a resized pixel differently here and there):
        llava: `LlavaProcessor` with SigLIP's image processor, with CLIP's (fit `crop`) or LLaVA's own (`pad`).
        internvl, llava_onevision: their own; transformers loads those only where torchvision is, for their videos.
        lfm2_vl: SigLIP-2's image processor, with the `DeepseekVLProcessor` that only repeats `<image>`: LFM2-VL's own
            processor keeps aspect ratios, adds marker tokens and needs torchvision. SigLIP-2's keeps aspect ratios
            too, so images of another ratio than `image_size` are to be resized first, `image.resize((width, height),
            resample)`. Where `video_size` differs, frames are resized to it, `image_processor([*images, *frames],
            do_resize=False)` makes the inputs, and the text is expanded by hand, one `<image>` a token.

    Raises:
        ExportError: `out` holds files already, or a part of the model has no stock twin.
    """
    with torch.no_grad(), _evaluating(model):
        stock, stock_processor = stock_twin(model, processor)
        stock.generation_config = copy.deepcopy(model.generation_config)
        with written_whole(out) as folder:
            stock.save_pretrained(folder)
            stock_processor.save_pretrained(folder)
            # transformers saves only what a tokenizer was made with
            named = {"image_token": processor.image_token, "padding_side": processor.tokenizer.padding_side}
            add_to_json(folder / "tokenizer_config.json", **named)
            _check_logits(model, processor, type(stock), folder)


# Self-check


def _check_logits(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    architecture: type[PreTrainedModel],
    folder: Path,
) -> None:
    """Loads what was written and compares its logits with the model's own, for two images and two frames.

    One image is square, the other three times as wide as high, so that tilings have several tiles.
    """
    loaded: Any = architecture.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    stock, loading = loaded
    if problems := {kind: sorted(map(str, names)) for kind, names in loading.items() if names}:
        raise ExportError(f"stock {stock.config.model_type} doesn't load what was written: {problems}")
    stock = stock.to(model.device).eval()
    with torch.device("meta"):
        ours = FoveateForConditionalGeneration(copy.deepcopy(model.config))
    ours.language_model = model.language_model
    ours.vision_tower = copy.deepcopy(model.vision_tower)
    ours.multi_modal_projector = copy.deepcopy(model.multi_modal_projector)
    if model.config.tiling == "anyres":
        ours.image_newline = copy.deepcopy(model.image_newline)
    # A convolution and a linear layer round differently. In float64 that vanishes, and only mistakes are left.
    for vision in (ours.vision_tower, stock.model.vision_tower):
        vision.double().set_attn_implementation("eager")
    ours.multi_modal_projector.double()
    stock.model.multi_modal_projector.double()
    llm = stock.model.language_model
    llm.set_attn_implementation(model.language_model.config._attn_implementation)
    for buffer, own in zip(llm.buffers(), model.language_model.base_model.buffers(), strict=True):
        buffer.data = buffer.to(own.dtype)  # model.bfloat16() rounds even the rotary frequencies, which no file holds

    random = torch.Generator().manual_seed(0)
    height, width = processor.image_size
    sizes = [(height, width), (height, 3 * width)]
    plans = [processor.plan_image(size) for size in sizes]
    media = Media(
        images=[_noise((plan.tiles, 3, *plan.tile), random, model.device) for plan in plans],
        sizes=torch.tensor(sizes, device=model.device),
        frames=_noise((2, 3, *processor.video_size), random, model.device),
    )
    if stock.config.model_type == "llava_next":  # knows no videos
        media.frames = media.frames[:0]
    inputs: dict[str, torch.Tensor] = {"pixel_values": torch.cat(media.images)}
    if model.config.tiling != "resize":
        inputs["image_grids"] = torch.tensor([plan.grid for plan in plans], device=model.device)
    if model.config.tiling == "anyres":
        inputs["image_sizes"] = media.sizes
    frames = len(media.frames)
    if frames:
        inputs["pixel_values_videos"] = media.frames
        inputs["video_grids"] = torch.tensor([[frames, 1, 1]], device=model.device)
    image_ids = [processor.image_token_id] * sum(plan.tokens for plan in plans)
    video_tokens = len(ours.encode_videos(media.frames, inputs["video_grids"])[0]) if frames else 0
    video_ids = [processor.video_token_id] * video_tokens
    vocabulary = torch.randperm(model.language_model.get_input_embeddings().num_embeddings, generator=random).tolist()
    words = [word for word in vocabulary if word not in (processor.image_token_id, processor.video_token_id)]
    ids = torch.tensor([[*words[:4], *image_ids, *words[4:8], *video_ids, *words[8:12]]], device=model.device)
    expected = ours(input_ids=ids, **inputs).logits
    if stock.config.model_type != "llava_onevision":
        ids = ids.masked_fill(ids == processor.video_token_id, processor.image_token_id)
    try:
        logits = stock(input_ids=ids, **stock_pixels(stock.config, media)).logits
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ExportError(f"stock {stock.config.model_type} can't run this model: {error}") from error
    difference, largest = (logits - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= LOGITS_TOLERANCE * largest:
        raise ExportError(
            f"stock {stock.config.model_type} gives other logits than the model: they differ by {difference:.1e} where "
            f"the largest is {largest:.1e}; accepted: a difference of {LOGITS_TOLERANCE:.0e} of it"
        )


def _noise(shape: tuple[int, ...], random: torch.Generator, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float64).to(device)


# Files


@contextmanager
def written_whole(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` where all goes well, and vanishes where not."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"out {out} exists already; accepted: a new or an empty directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        folder = Path(aside) / out.name
        folder.mkdir()
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
