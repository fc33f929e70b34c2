"""Stock architectures that compute what a model of ours does.

lfm2_vl          SigLIP or SigLIP-2 tower, its final output → `downsample-2x2` → LLM     (Liquid AI's LFM2-VL)
internvl         InternVL's tower, `tiles` → `downsample-2x2` → LLM                      (arXiv 2404.16821)
llava            a tower run on pixels alone, one of its hidden states → `mlp2x` → LLM   (LLaVA-1.5, arXiv 2310.03744)
llava_next       the same over `anyres` tiles                                            (LLaVA-NeXT)
llava_onevision  the same, a large map shrunk                                            (arXiv 2408.03326)
"""

import copy
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoModel,
    DeepseekVLProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Siglip2VisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from .anyres import GRIDS
from .model import FoveateForConditionalGeneration
from .processor import FoveateProcessor
from .tower import patchify


class ExportError(ValueError):
    """A model that can't be exported as asked. The message names the part, and what would be accepted."""


@dataclass(frozen=True)
class ProcessorFiles:
    """A stock processor that can only be made where torchvision is (for its videos), as the files that it saves.

    Attributes:
        name: its class.
        image_processor: with the PIL backend.
        video_processor: name of the class that does the same to frames.
        tokenizer: with the media tokens.
        tokens: what the class calls them.
        fields: its other arguments.
        chat_template: Jinja.
    """

    name: str
    image_processor: Any
    video_processor: str
    tokenizer: PreTrainedTokenizerBase
    tokens: dict[str, str]
    fields: dict[str, Any]
    chat_template: Any

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        add_to_json(folder / "tokenizer_config.json", processor_class=self.name, **self.tokens)
        images = self.image_processor.to_dict()
        frames = {k: images[k] for k in ("size", "image_mean", "image_std", "resample") if k in images}
        frames["video_processor_type"] = self.video_processor
        (folder / "processor_config.json").write_text("{}")
        parts = {"processor_class": self.name, "image_processor": images, "video_processor": frames}
        add_to_json(folder / "processor_config.json", **parts, **self.fields)
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


StockProcessor = ProcessorMixin | ProcessorFiles


def stock_twin(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor
) -> tuple[PreTrainedModel, StockProcessor]:
    """The stock model, made of the model's own parameters, and its processor.

    Raises:
        ExportError: a part has no stock twin.
    """
    config = model.config
    check_head(model.language_model)
    if list(config.video_pool) != [1, 1, 1]:
        raise ExportError(f"video_pool {list(config.video_pool)} has no stock twin; accepted: [1, 1, 1]")
    if config.token_order != "rows":
        raise ExportError(f"token_order {config.token_order!r} has no stock twin; accepted: 'rows'")
    if config.projector not in ("mlp2x", "downsample-2x2"):
        raise ExportError(
            f"projector {config.projector!r} has no stock twin: llava, llava_next and llava_onevision need 'mlp2x', "
            "lfm2_vl and internvl need 'downsample-2x2'"
        )
    internvl = config.vision_config.model_type == "internvl_vision" and config.projector == "downsample-2x2"
    tilings = ("resize", "anyres") if config.projector == "mlp2x" else ("resize", "tiles") if internvl else ("resize",)
    if config.tiling not in tilings:
        raise ExportError(
            f"tiling {config.tiling!r} has no stock twin with projector {config.projector!r} and vision_config "
            f"{config.vision_config.model_type}; accepted: {', '.join(tilings)}"
        )
    if config.projector == "mlp2x":
        return _anyres(model, processor) if config.tiling == "anyres" else _llava(model, processor)
    return _internvl(model, processor) if internvl else _lfm2_vl(model, processor)


def _llava(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    config, tower = model.config, model.vision_tower
    vision = config.vision_config
    layer = _hidden_state(model)
    for name in ("image_size", "video_size"):
        size = getattr(processor, name)
        fixed = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
        if (fixed and size != _sides(vision.image_size)) or size != processor.image_size:
            accepted = _sides(vision.image_size) if fixed else processor.image_size
            raise ExportError(
                f"{name} {size} has no stock twin: llava takes images of one size and doesn't interpolate positions; "
                f"accepted: {accepted}"
            )
    strategy, prefix = _strategy(model, processor)
    text, tied, image_token_id = _text_config(model)
    stock_config = LlavaConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=processor.tokens_per_image(),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    stock = _assembled(LlavaForConditionalGeneration, stock_config, model, tower, {"linear_1": 0, "linear_2": 2})
    stock_processor = LlavaProcessor(
        _fitting_image_processor(processor),
        _stock_tokenizer(processor),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=prefix,
        chat_template=processor.chat_template,
    )
    return stock, stock_processor


def _hidden_state(model: FoveateForConditionalGeneration) -> int:
    """The layer that is read; ExportError unless the tower is run on pixels alone, and one hidden state of it read."""
    if model.config.vision_config.model_type == "siglip2_vision_model":
        raise ExportError(
            "vision_config siglip2_vision_model has no stock twin with projector 'mlp2x': llava runs its tower on "
            "pixels alone; accepted: siglip_vision_model, clip_vision_model, …"
        )
    if model.config.vision_feature_layer is None:
        raise ExportError(
            "vision_feature_layer None, the tower's final output, has no stock twin: llava reads a hidden state; "
            "accepted: a layer's index"
        )
    return model.config.vision_feature_layer


def _strategy(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor
) -> tuple[Literal["default", "full"], int]:
    """What the stock model is to keep, and how many tokens the tower puts before its patches.

    'full' keeps them; llava's 'default' drops one token, ours all of them.
    """
    config, tower, patch = model.config, model.vision_tower, processor.patch_size
    pixels = torch.zeros(1, 3, *processor.image_size, device=tower.device, dtype=tower.dtype)
    hidden = tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]
    prefix = hidden.shape[1] - (processor.image_size[0] // patch) * (processor.image_size[1] // patch)
    if config.vision_feature_select_strategy == "default" and prefix > 1:
        raise ExportError(
            f"vision_feature_select_strategy 'default' has no stock twin with {config.vision_config.model_type}: it "
            f"drops {prefix} tokens before the patches, llava drops one; accepted: 'full', or a tower with at most one "
            "such token"
        )
    dropped = config.vision_feature_select_strategy == "default" and prefix == 1
    return "default" if dropped else "full", prefix


def _fitting_image_processor(processor: FoveateProcessor) -> Any:
    """The stock image processor that makes an image one tile as ours does."""
    (height, width), options = processor.image_size, _normalisation(processor)
    if processor.fit == "stretch":
        return SiglipImageProcessorPil(size={"height": height, "width": width}, **options)
    if height != width:
        raise ExportError(
            f"image_size {processor.image_size} has no stock twin with fit {processor.fit!r}; accepted: a square"
        )
    options |= {"size": {"shortest_edge": height}, "crop_size": {"height": height, "width": width}}
    return (
        CLIPImageProcessorPil(**options) if processor.fit == "crop" else LlavaImageProcessorPil(do_pad=True, **options)
    )


def _anyres(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor
) -> tuple[PreTrainedModel, StockProcessor]:
    """LLaVA-NeXT; LLaVA-OneVision where large maps are shrunk."""
    config, vision = model.config, model.config.vision_config
    layer = _hidden_state(model)
    side, next_ = processor.image_size[0], config.anyres_max_tiles is None
    if processor.image_size != _sides(vision.image_size) or processor.image_size != (side, side):
        raise ExportError(
            f"image_size {processor.image_size} has no stock twin: llava_next and llava_onevision take "
            f"tiles of one square size and don't interpolate positions; accepted: {_sides(vision.image_size)}"
        )
    strategy, prefix = _strategy(model, processor)
    text, tied, image_token_id = _text_config(model)
    pinpoints = [[rows * side, columns * side] for rows, columns in processor.anyres_grids or GRIDS]
    fields: dict[str, Any] = {
        "vision_config": copy.deepcopy(model.vision_tower.config),
        "text_config": text,
        "image_token_index": image_token_id,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "image_grid_pinpoints": pinpoints,
        "tie_word_embeddings": tied,
    }
    layers = {"linear_1": 0, "linear_2": 2}
    tokenizer = _stock_tokenizer(processor)
    if next_:
        stock = _assembled(
            LlavaNextForConditionalGeneration, LlavaNextConfig(**fields), model, model.vision_tower, layers
        )
        next_images = LlavaNextImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=pinpoints,
            **_normalisation(processor),
        )
        return stock, LlavaNextProcessor(
            next_images,
            tokenizer,
            patch_size=vision.patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=prefix,
            chat_template=processor.chat_template,
        )
    if config.video_token_id is None:
        raise ExportError("video_token_id is None; accepted with llava_onevision: the id of the <video> token")
    ratio = f"anyres_max_{config.anyres_max_tiles}"
    stock_config = LlavaOnevisionConfig(video_token_index=config.video_token_id, vision_aspect_ratio=ratio, **fields)
    stock = _assembled(LlavaOnevisionForConditionalGeneration, stock_config, model, model.vision_tower, layers)
    images = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_grid_pinpoints=pinpoints, **_normalisation(processor)
    )
    own = {
        "num_image_tokens": (side // vision.patch_size) ** 2 + prefix,
        "vision_feature_select_strategy": strategy,
        "vision_aspect_ratio": ratio,
    }
    tokens = {"image_token": processor.image_token, "video_token": processor.video_token}
    name = "LlavaOnevisionVideoProcessor"
    chat_template = processor.chat_template
    return stock, ProcessorFiles(
        "LlavaOnevisionProcessor", images, name, tokenizer, tokens, own | tokens, chat_template
    )


def _internvl(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor
) -> tuple[InternVLForConditionalGeneration, ProcessorFiles]:
    config, tower = model.config, model.vision_tower
    layer, patch = config.vision_feature_layer, processor.patch_size
    if layer == -1:  # transformers takes the final output for -1, which may have a norm more
        raise ExportError(
            "vision_feature_layer -1 has no stock twin: internvl accepts None, the tower's final output, or another"
        )
    for name in ("image_size", "video_size"):
        size = getattr(processor, name)
        if size != processor.image_size or size[0] != size[1] or size[0] % (2 * patch):
            raise ExportError(
                f"{name} {size} has no stock twin: internvl takes tiles of one square size and doesn't pad a grid of "
                f"patches; accepted: a square, multiples of {2 * patch} pixels, two patches"
            )
    tiles = config.tiling == "tiles"
    plain = {"thumbnail": config.thumbnail or not tiles, "tile_separator": not processor.tile_separator}
    plain |= {"fit": processor.fit == "stretch"}
    if wrong := [name for name, holds in plain.items() if not holds]:
        raise ExportError(
            f"{wrong[0]} {getattr(processor, wrong[0])!r} has no stock twin: internvl has no such setting"
        )
    tokenizer = _stock_tokenizer(processor)
    tokens = {  # internvl's names
        "start_image_token": processor.image_start,
        "end_image_token": processor.image_end,
        "context_image_token": processor.image_token,
        "video_token": processor.video_token,
    }
    for name, token in tokens.items():
        if token not in tokenizer.get_vocab():
            raise ExportError(
                f"{name} {token!r} has no stock twin: internvl puts one token before and one after an image's; "
                "accepted: a token of the vocabulary"
            )
    text, tied, image_token_id = _text_config(model)
    stock_config = InternVLConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=text,
        image_token_id=image_token_id,
        image_seq_length=processor.tokens_per_image(),
        vision_feature_layer=-1 if layer is None else layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
    )
    layers = {"layer_norm": 0, "linear_1": 1, "linear_2": 3}
    stock = _assembled(InternVLForConditionalGeneration, stock_config, model, tower, layers)
    side = processor.image_size[0]
    images = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        crop_to_patches=tiles,
        min_patches=processor.min_tiles if tiles else 1,
        max_patches=processor.max_tiles if tiles else 1,
        **_normalisation(processor),
    )
    own = {"image_seq_length": processor.tokens_per_image()}
    name = "InternVLVideoProcessor"
    return stock, ProcessorFiles("InternVLProcessor", images, name, tokenizer, tokens, own, processor.chat_template)


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
    expected = shapes(stock)
    llm = model.language_model
    if type(stock.model.language_model) is not type(llm.base_model):
        raise ExportError(
            f"text_config {config.text_config.model_type} has no stock twin: {type(llm).__name__} has a decoder "
            f"{type(llm.base_model).__name__}, AutoModel makes {type(stock.model.language_model).__name__}"
        )
    stock.model.vision_tower = tower
    stock.model.language_model = llm.base_model
    stock.lm_head = llm.get_output_embeddings()
    layers: Any = model.multi_modal_projector.layers
    for name, index in projector_layers.items():
        setattr(stock.model.multi_modal_projector, name, layers[index])
    if model.config.tiling == "anyres":
        stock.model.image_newline = model.image_newline
    if shapes(stock) != expected:
        wrong = sorted(name for name, _ in shapes(stock).items() ^ expected.items())
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


def check_head(llm: PreTrainedModel) -> None:
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


@dataclass
class Media:
    """Random pixels for the self-check.

    Attributes:
        images: of each image its tiles, [tiles, 3, height, width].
        sizes: int64 [images, 2], (height, width) of the originals.
        frames: [frames, 3, height, width], of one video.
    """

    images: list[torch.Tensor]
    sizes: torch.Tensor
    frames: torch.Tensor


def stock_pixels(config: PreTrainedConfig, media: Media) -> dict[str, torch.Tensor]:
    """Pixels of images and frames as the stock model takes them."""
    if config.model_type in ("llava", "internvl"):
        return {"pixel_values": torch.cat([*media.images, media.frames])}
    if config.model_type in ("llava_next", "llava_onevision"):
        padded = nn.utils.rnn.pad_sequence(media.images, batch_first=True)  # [images, tiles, 3, height, width]
        inputs = {"pixel_values": padded, "image_sizes": media.sizes}
        return inputs | ({"pixel_values_videos": media.frames[None]} if len(media.frames) else {})
    patch = config.vision_config.patch_size
    pixels = [*torch.cat(media.images), *media.frames]  # each [3, height, width]
    patches = [patchify(one[None], patch)[0] for one in pixels]  # each [patches, values]
    lengths = torch.tensor([len(p) for p in patches], device=media.frames.device)
    padded = nn.utils.rnn.pad_sequence(patches, batch_first=True)  # [images, patches, values]
    grids = [[one.shape[1] // patch, one.shape[2] // patch] for one in pixels]
    return {
        "pixel_values": padded,
        "spatial_shapes": torch.tensor(grids, device=padded.device),
        "pixel_attention_mask": (torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]).int(),
    }


def _stock_tokenizer(processor: FoveateProcessor) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.image_token = processor.image_token
    return tokenizer


def _normalisation(processor: FoveateProcessor) -> dict[str, Any]:
    return {"image_mean": processor.image_mean, "image_std": processor.image_std, "resample": processor.resample}


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _sides(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def add_to_json(path: Path, **entries: Any) -> None:
    """Adds entries to a file of transformers, and leaves out where the model's parts once lay on this machine."""
    content = json.loads(path.read_text(encoding="utf-8"), object_hook=_without_paths) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_paths(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if name != "_name_or_path"}
