"""Models for people who have transformers and nothing of ours: with the model's code, or as a stock architecture.

`export(..., format="code")` is exact for every model and asks its users for `trust_remote_code=True`.
`export(..., format="stock")` needs no remote code, and is refused where no stock architecture computes the same:

    lfm2_vl   SigLIP or SigLIP-2 tower, its final output → `downsample-2x2` → LLM     (Liquid AI's LFM2-VL)
    llava     a tower run on pixels alone, one of its hidden states → `mlp2x` → LLM   (LLaVA-1.5)
"""

import copy
import inspect
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoModel,
    DeepseekVLProcessor,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Siglip2VisionConfig,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from .model import FoveateForConditionalGeneration, patchify
from .processor import FoveateProcessor

MODEL_AUTO_MAP = {
    "AutoConfig": "config.FoveateConfig",
    "AutoModel": "model.FoveateForConditionalGeneration",
    "AutoModelForCausalLM": "model.FoveateForConditionalGeneration",
    "AutoModelForImageTextToText": "model.FoveateForConditionalGeneration",
    "AutoProcessor": "processor.FoveateProcessor",
}
LOGITS_TOLERANCE = 1e-5  # of the largest logit


class ExportError(ValueError):
    """A model that can't be exported as asked. The message names the part, and what would be accepted."""


def export(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    out: str | os.PathLike[str],
    format: Literal["code", "stock"] = "code",
) -> None:
    """Writes model and processor as a directory that transformers loads without this package.

    Args:
        model: any model of ours; it is not changed.
        processor: the one that it was trained with.
        out: a directory that is made; it must not exist, or be empty.
        format: `code` (see `export_with_code`) or `stock` (see `export_stock`).

    Raises:
        ExportError: `out` holds files already, or `stock` can't express the model. Nothing is left in `out`.
    """
    writers = {"code": export_with_code, "stock": export_stock}
    if format not in writers:
        raise ExportError(f"format is {format!r}; accepted: {', '.join(writers)}")
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
    with _written_whole(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for part in (model, processor):
            custom_object_save(part, folder)
        _add_to_json(folder / "config.json", auto_map=MODEL_AUTO_MAP)
        _add_to_json(folder / "processor_config.json", auto_map={"AutoProcessor": MODEL_AUTO_MAP["AutoProcessor"]})


def export_stock(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, out: str | os.PathLike[str]
) -> None:
    """Writes the model as a stock transformers architecture, and a stock processor. No remote code is needed.

    What was written is loaded again and must give the model's own logits on random input, within 1e-5 of the largest
    (vision in float64, the LLM in its dtype); this takes memory for a second copy of the model.

    Stock architectures know only images. A video's frames are given as images, `<image>` in place of `<video>`,
    each followed by the processor's `frame_separator`.

    Inputs from `AutoProcessor.from_pretrained(out, backend="pil")`, which needs no torchvision, equal ours for RGB
    images (torchvision, the default where it is installed, rounds a resized pixel differently here and there):
        llava: `LlavaProcessor` with SigLIP's image processor.
        lfm2_vl: SigLIP-2's image processor, with the `DeepseekVLProcessor` that only repeats `<image>`: LFM2-VL's own
            processor keeps aspect ratios, adds marker tokens and needs torchvision. SigLIP-2's keeps aspect ratios
            too, so images of another ratio than `image_size` are to be resized first, `image.resize((width, height),
            resample)`. Where `video_size` differs, frames are resized to it, `image_processor([*images, *frames],
            do_resize=False)` makes the inputs, and the text is expanded by hand, one `<image>` a token.

    Raises:
        ExportError: `out` holds files already, or a part of the model has no stock twin.
    """
    with torch.no_grad(), _evaluating(model):
        _check_head(model.language_model)
        stock: PreTrainedModel
        stock_processor: ProcessorMixin
        if model.config.projector == "mlp2x":
            stock, stock_processor = _llava(model, processor)
        elif model.config.projector == "downsample-2x2":
            stock, stock_processor = _lfm2_vl(model, processor)
        else:
            raise ExportError(
                f"projector {model.config.projector!r} has no stock twin: "
                "llava needs 'mlp2x', lfm2_vl needs 'downsample-2x2'"
            )
        stock.generation_config = copy.deepcopy(model.generation_config)
        with _written_whole(out) as folder:
            stock.save_pretrained(folder)
            stock_processor.save_pretrained(folder)
            # transformers saves only what a tokenizer was made with
            named = {"image_token": processor.image_token, "padding_side": processor.tokenizer.padding_side}
            _add_to_json(folder / "tokenizer_config.json", **named)
            _check_logits(model, processor, type(stock), folder)


# Architectures


def _llava(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    config, tower = model.config, model.vision_tower
    vision = config.vision_config
    if vision.model_type == "siglip2_vision_model":
        raise ExportError(
            "vision_config siglip2_vision_model has no stock twin with projector 'mlp2x': llava runs its tower on "
            "pixels alone; accepted: siglip_vision_model, clip_vision_model, …"
        )
    if config.vision_feature_layer is None:
        raise ExportError(
            "vision_feature_layer None, the tower's final output, has no stock twin: llava reads a hidden state; "
            "accepted: a layer's index"
        )
    for name in ("image_size", "video_size"):
        size = getattr(processor, name)
        fixed = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
        if (fixed and size != _sides(vision.image_size)) or size != processor.image_size:
            accepted = _sides(vision.image_size) if fixed else processor.image_size
            raise ExportError(
                f"{name} {size} has no stock twin: llava takes images of one size and doesn't interpolate positions; "
                f"accepted: {accepted}"
            )
    # What the tower puts before its patches is kept by 'full'; llava's 'default' drops one token, ours all of them.
    pixels = torch.zeros(1, 3, *processor.image_size, device=tower.device, dtype=tower.dtype)
    hidden = tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]
    patches = (processor.image_size[0] // vision.patch_size) * (processor.image_size[1] // vision.patch_size)
    prefix = hidden.shape[1] - patches
    if config.vision_feature_select_strategy == "default" and prefix > 1:
        raise ExportError(
            f"vision_feature_select_strategy 'default' has no stock twin with {vision.model_type}: it drops {prefix} "
            "tokens before the patches, llava drops one; accepted: 'full', or a tower with at most one such token"
        )
    dropped = config.vision_feature_select_strategy == "default" and prefix == 1
    strategy: Literal["default", "full"] = "default" if dropped else "full"

    text, tied, image_token_id = _text_config(model)
    stock_config = LlavaConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=processor.tokens_per_image(),
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    stock = _assembled(LlavaForConditionalGeneration, stock_config, model, tower, {"linear_1": 0, "linear_2": 2})
    height, width = processor.image_size
    stock_processor = LlavaProcessor(
        SiglipImageProcessorPil(size={"height": height, "width": width}, **_normalisation(processor)),
        _stock_tokenizer(processor),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=prefix,
        chat_template=processor.chat_template,
    )
    return stock, stock_processor


def _lfm2_vl(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor
) -> tuple[Lfm2VlForConditionalGeneration, DeepseekVLProcessor]:
    config, tower = model.config, model.vision_tower
    vision = config.vision_config
    if vision.model_type not in ("siglip_vision_model", "siglip2_vision_model"):
        raise ExportError(
            f"vision_config {vision.model_type} has no stock twin with projector 'downsample-2x2'; lfm2_vl accepts "
            "siglip_vision_model and siglip2_vision_model"
        )
    if config.vision_feature_layer is not None:
        raise ExportError(
            f"vision_feature_layer {config.vision_feature_layer} has no stock twin with projector 'downsample-2x2'; "
            "lfm2_vl accepts None, the tower's final output"
        )
    for name in ("image_size", "video_size"):
        size = getattr(processor, name)
        if vision.model_type == "siglip_vision_model" and size != _sides(vision.image_size):
            raise ExportError(
                f"{name} {size} has no stock twin with siglip_vision_model: lfm2_vl interpolates positions "
                f"differently; accepted: {_sides(vision.image_size)}"
            )
        if size[0] % (2 * vision.patch_size) or size[1] % (2 * vision.patch_size):
            raise ExportError(
                f"{name} {size} has no stock twin with projector 'downsample-2x2': lfm2_vl doesn't pad a grid of "
                f"patches; accepted: multiples of {2 * vision.patch_size} pixels, two patches"
            )
    if vision.model_type == "siglip_vision_model":
        tower = _siglip_as_siglip2(tower)

    text, tied, image_token_id = _text_config(model)
    stock_config = Lfm2VlConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=text,
        image_token_id=image_token_id,
        projector_hidden_size=text.hidden_size,
        downsample_factor=2,
        tie_word_embeddings=tied,
    )
    layers = {"layer_norm": 0, "linear_1": 1, "linear_2": 3}
    stock = _assembled(Lfm2VlForConditionalGeneration, stock_config, model, tower, layers)
    patches = (processor.image_size[0] // vision.patch_size) * (processor.image_size[1] // vision.patch_size)
    stock_processor = DeepseekVLProcessor(
        Siglip2ImageProcessorPil(
            patch_size=vision.patch_size, max_num_patches=patches, do_convert_rgb=True, **_normalisation(processor)
        ),
        _stock_tokenizer(processor),
        num_image_tokens=processor.tokens_per_image(),
        chat_template=processor.chat_template,
    )
    return stock, stock_processor


def _siglip_as_siglip2(tower: PreTrainedModel) -> PreTrainedModel:
    """A SigLIP tower as SigLIP-2's: the same on a fixed grid, but a linear layer embeds patches that are cut outside,
    in the order (row, column, channel), where SigLIP convolves.
    """
    fields = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels"]
    fields += ["patch_size", "hidden_act", "layer_norm_eps", "attention_dropout"]
    config = Siglip2VisionConfig(
        num_patches=tower.config.image_size**2 // tower.config.patch_size**2,
        vision_use_head=getattr(tower.config, "vision_use_head", True),
        **{name: getattr(tower.config, name) for name in fields},
    )
    weights = tower.state_dict()
    (name,) = (name for name in weights if name.endswith("patch_embedding.weight"))
    weights[name] = weights[name].permute(0, 2, 3, 1).flatten(1).contiguous()  # [hidden, rows · columns · channels]
    with torch.device("meta"):
        twin = AutoModel.from_config(config)
    twin.load_state_dict(weights, assign=True)
    return twin.eval()


def _assembled(
    architecture: type[PreTrainedModel],
    config: PreTrainedConfig,
    model: FoveateForConditionalGeneration,
    tower: PreTrainedModel,
    projector_layers: dict[str, int],
) -> Any:
    """The stock model, made of the model's own modules and parameters: no weights are copied."""
    with torch.device("meta"):
        stock: Any = architecture(config)
    expected = _shapes(stock)
    llm = model.language_model
    if type(stock.model.language_model) is not type(llm.base_model):
        raise ExportError(
            f"text_config {config.text_config.model_type} has no stock twin: {type(llm).__name__} has a decoder "
            f"{type(llm.base_model).__name__}, AutoModel makes {type(stock.model.language_model).__name__}"
        )
    stock.model.vision_tower = tower
    stock.model.language_model = llm.base_model
    stock.lm_head = llm.get_output_embeddings()
    layers = model.multi_modal_projector.layers
    for name, index in projector_layers.items():
        setattr(stock.model.multi_modal_projector, name, layers[index])
    if _shapes(stock) != expected:
        wrong = sorted(name for name, _ in _shapes(stock).items() ^ expected.items())
        raise ExportError(f"weights don't fit stock {config.model_type}: {', '.join(wrong[:5])} (of {len(wrong)})")
    return stock


def _text_config(model: FoveateForConditionalGeneration) -> tuple[PreTrainedConfig, bool, int]:
    """The LLM's configuration, whether its head is the token embedding, and the id of the `<image>` token."""
    if model.config.image_token_id is None:
        raise ExportError("image_token_id is None; accepted: the id of the <image> token")
    llm = model.language_model
    config = copy.deepcopy(llm.config)
    tied = llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    if tied and getattr(llm.base_model, "embed_tokens", None) is not llm.get_input_embeddings():
        raise ExportError(
            f"text_config {config.model_type} has no stock twin: its head is tied to an embedding that isn't named "
            "embed_tokens; accepted: LLMs built like llama, qwen2, mistral"
        )
    config.tie_word_embeddings = tied
    return config, tied, model.config.image_token_id


def _check_head(llm: PreTrainedModel) -> None:
    """Raises ExportError unless the logits are a bias-free linear layer on the decoder's output, and nothing more."""
    head = llm.get_output_embeddings()
    wrong = ExportError(
        f"text_config {llm.config.model_type} has no stock twin: its logits are not those of one linear layer without "
        "bias on the decoder's output (a bias, or scaled or capped logits); accepted: LLMs like llama, qwen2, mistral"
    )
    if type(head) is not nn.Linear or head.bias is not None:
        raise wrong
    # In place of the head's output large values are put: they come out as they are, unless something follows.
    large = torch.linspace(-1e4, 1e4, head.out_features, device=head.weight.device, dtype=head.weight.dtype)
    seen: dict[str, torch.Tensor] = {}

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        seen["decoder"] = output[0]

    def replace_output(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen["head"] = args[0]
        return large.expand_as(output)

    hooks = [llm.base_model.register_forward_hook(keep_output), head.register_forward_hook(replace_output)]
    try:
        logits = llm(torch.arange(4, device=head.weight.device).unsqueeze(0), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    unchanged = torch.equal(logits.float(), large.float().expand_as(logits))
    if not unchanged or not torch.equal(seen["head"], seen["decoder"]):
        raise wrong


def _check_logits(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    architecture: type[PreTrainedModel],
    folder: Path,
) -> None:
    """Loads what was written and compares its logits with the model's own, for two images and two frames."""
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
    images = torch.randn(2, 3, *processor.image_size, generator=random, dtype=torch.float64).to(model.device)
    frames = torch.randn(2, 3, *processor.video_size, generator=random, dtype=torch.float64).to(model.device)
    image_ids = [processor.image_token_id] * 2 * processor.tokens_per_image()
    video_ids = [processor.video_token_id] * 2 * processor.tokens_per_frame()
    vocabulary = torch.randperm(model.language_model.get_input_embeddings().num_embeddings, generator=random).tolist()
    words = [word for word in vocabulary if word not in (processor.image_token_id, processor.video_token_id)]
    ids = torch.tensor([[*words[:4], *image_ids, *words[4:8], *video_ids, *words[8:12]]], device=model.device)
    expected = ours(input_ids=ids, pixel_values=images, pixel_values_videos=frames).logits
    ids = ids.masked_fill(ids == processor.video_token_id, processor.image_token_id)
    try:
        logits = stock(input_ids=ids, **_stock_pixels(stock.config, images, frames)).logits
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ExportError(f"stock {stock.config.model_type} can't run this model: {error}") from error
    difference, largest = (logits - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= LOGITS_TOLERANCE * largest:
        raise ExportError(
            f"stock {stock.config.model_type} gives other logits than the model: they differ by {difference:.1e} where "
            f"the largest is {largest:.1e}; accepted: a difference of {LOGITS_TOLERANCE:.0e} of it"
        )


def _stock_pixels(config: PreTrainedConfig, images: torch.Tensor, frames: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pixels [n, 3, height, width] of images and frames as the stock model takes them."""
    if config.model_type == "llava":
        return {"pixel_values": torch.cat([images, frames])}
    patch = config.vision_config.patch_size
    patches = [patches for pixels in (images, frames) for patches in patchify(pixels, patch)]  # each [patches, values]
    lengths = torch.tensor([len(p) for p in patches], device=images.device)
    padded = nn.utils.rnn.pad_sequence(patches, batch_first=True)  # [images, patches, values]
    grids = [[pixels.shape[2] // patch, pixels.shape[3] // patch] for pixels in (images, frames) for _ in pixels]
    return {
        "pixel_values": padded,
        "spatial_shapes": torch.tensor(grids, device=images.device),
        "pixel_attention_mask": (torch.arange(padded.shape[1], device=images.device) < lengths[:, None]).int(),
    }


# Files


@contextmanager
def _written_whole(out: str | os.PathLike[str]) -> Iterator[Path]:
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


def _add_to_json(path: Path, **entries: Any) -> None:
    """Adds entries to a file of transformers, and leaves out where the model's parts once lay on this machine."""
    content = json.loads(path.read_text(encoding="utf-8"), object_hook=_without_paths) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_paths(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if name != "_name_or_path"}


def _stock_tokenizer(processor: FoveateProcessor) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.image_token = processor.image_token
    return tokenizer


def _normalisation(processor: FoveateProcessor) -> dict[str, Any]:
    return {"image_mean": processor.image_mean, "image_std": processor.image_std, "resample": processor.resample}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _sides(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
