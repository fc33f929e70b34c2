"""Tiny models of every supported architecture with random weights, and rows of inputs for them, without processors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForImageTextToText, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from foveate.vlm import FoveateConfig, FoveateForConditionalGeneration

WIDTH, VOCABULARY, LAYERS = 32, 48, 4
PAD, IMAGE, VIDEO, WORDS = 0, 1, 2, 3  # ids; those of words from WORDS on
VISION_START = WORDS  # of Qwen's, by which transformers 5.17 counts a row's images

Row = dict[str, torch.Tensor]  # inputs of a model for one sample
Media = Callable[[], tuple[Row, int]]  # fields of one image or video, and tokens that it takes


@dataclass(frozen=True)
class Animal:
    """A model, and what makes its inputs."""

    name: str
    model: PreTrainedModel
    media: dict[str, Media]
    first_prunable: int = 1

    def row(self, *pieces: int | str, tokens: int | None = None) -> Row:
        """Inputs of one sample without padding.

        Args:
            pieces: numbers of words, "image", "video" or "frames" (a video with a word between its frames).
            tokens: that the row has, words after the last piece making up the number.
        """
        ids: list[int] = []
        fields: list[Row] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids += torch.randint(WORDS, VOCABULARY, (piece,)).tolist()
                continue
            made, count = self.media[piece]()
            if self.name.startswith("qwen"):
                ids.append(VISION_START)
            fields.append(made)
            ids += [IMAGE if piece == "image" else VIDEO] * count
            if piece == "frames":
                ids.insert(len(ids) - count // 2, WORDS)
        if tokens is not None:
            assert len(ids) < tokens
            ids += torch.randint(WORDS, VOCABULARY, (tokens - len(ids),)).tolist()
        return {"input_ids": torch.tensor([ids])} | _joined(fields)

    def image_tokens(self) -> int:
        return self.media["image"]()[1]

    def batch(self, rows: Sequence[Row], tokens: int | None = None) -> Row:
        """Rows one below the other, padded to the left to the longest, or to so many tokens."""
        width = tokens or max(row["input_ids"].shape[1] for row in rows)
        ids = torch.full((len(rows), width), PAD)
        for row, padded in zip(rows, ids, strict=True):
            padded[width - row["input_ids"].shape[1] :] = row["input_ids"][0]
        mask = torch.stack([torch.arange(width) >= width - row["input_ids"].shape[1] for row in rows]).long()
        media = [{name: value for name, value in row.items() if name != "input_ids"} for row in rows]
        if self.name in ("smolvlm", "idefics3") and any(media):
            media = [_with_blank_images(fields, media) for fields in media]
        joined = {"input_ids": ids, "attention_mask": mask} | _joined([fields for fields in media if fields])
        if self.name.startswith("qwen"):
            joined["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        return joined

    def alone(self, row: Row, more: Sequence[int] = ()) -> Row:
        """A batch of one row, with further words at its end."""
        ids = torch.cat([row["input_ids"], torch.tensor([list(more)], dtype=torch.long)], dim=1)
        return self.batch([row | {"input_ids": ids}])


def _joined(fields: Sequence[Row]) -> Row:
    names = dict.fromkeys(name for made in fields for name in made)
    return {name: torch.cat([made[name] for made in fields if name in made]) for name in names}


def _with_blank_images(fields: Row, rows: Sequence[Row]) -> Row:
    """SmolVLM and Idefics3 take as many images of every sample; those that are all 0 are none."""
    most = max(len(row.get("pixel_values", ())) for row in rows)
    some = next(row["pixel_values"] for row in rows if row)
    own = fields.get("pixel_values", some[:0])
    return {"pixel_values": torch.cat([own, some.new_zeros(most - len(own), *some.shape[1:])])[None]}


def _text(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD,
        "tie_word_embeddings": False,
    } | more  # fmt: skip


def _tower(kind: str, image_size: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": image_size, "patch_size": 4, "num_channels": 3,
    } | more  # fmt: skip


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _build(kind: str, **fields: Any) -> PreTrainedModel:
    config = CONFIG_MAPPING[kind](**fields)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")


def _llava() -> Animal:
    model = _build(
        "llava", vision_config=_tower("clip_vision_model", 16), text_config=_text("llama"), image_token_index=IMAGE
    )
    return Animal("llava", model, {"image": lambda: ({"pixel_values": _pixels(1, 3, 16, 16)}, 16)})


def _llava_next() -> Animal:
    model = _build(
        "llava_next",
        vision_config=_tower("clip_vision_model", 8),
        text_config=_text("mistral", sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[8, 16], [16, 8]],
    )
    one = {"image_sizes": torch.tensor([[8, 16]])}
    # 4 tokens of the whole, then two tiles, of 2 rows with 4 tokens and a newline each.
    return Animal("llava_next", model, {"image": lambda: ({"pixel_values": _pixels(1, 3, 3, 8, 8)} | one, 14)})


def _llava_onevision() -> Animal:
    model = _build(
        "llava_onevision",
        vision_config=_tower("siglip_vision_model", 12, vision_use_head=False),
        text_config=_text("qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[12, 12]],
    )
    one = {"image_sizes": torch.tensor([[12, 12]])}
    return Animal(
        "llava_onevision",
        model,
        {
            "image": lambda: ({"pixel_values": _pixels(1, 2, 3, 12, 12)} | one, 9 + 9 + 3),
            "video": lambda: ({"pixel_values_videos": _pixels(1, 3, 3, 12, 12)}, 3 * 4 + 1),
        },
    )


def _qwen2_5_vl() -> Animal:
    vision = {
        "depth": 2, "hidden_size": WIDTH, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    model = _build(
        "qwen2_5_vl",
        vision_config=vision,
        text_config=_text("qwen2_5_vl_text", rope_parameters=rope, use_sliding_window=False),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
    )
    image, video = torch.tensor([[1, 8, 8]]), torch.tensor([[2, 4, 8]])
    seconds = torch.tensor([1.0])
    return Animal(
        "qwen2_5_vl",
        model,
        {
            "image": lambda: ({"pixel_values": _pixels(64, 96), "image_grid_thw": image}, 16),
            "video": lambda: (
                {"pixel_values_videos": _pixels(64, 96), "video_grid_thw": video, "second_per_grid_ts": seconds},
                16,
            ),
        },
    )


def _qwen2_vl() -> Animal:
    vision = {
        "depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 1, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    model = _build(
        "qwen2_vl",
        vision_config=vision,
        text_config=_text("qwen2_vl_text", rope_parameters=rope, use_sliding_window=False),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
    )
    image = torch.tensor([[1, 8, 8]])
    return Animal(
        "qwen2_vl", model, {"image": lambda: ({"pixel_values": _pixels(64, 96), "image_grid_thw": image}, 16)}
    )


def _qwen3_vl() -> Animal:
    vision = {
        "depth": 3, "hidden_size": WIDTH, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    model = _build(
        "qwen3_vl",
        vision_config=vision,
        text_config=_text("qwen3_vl_text", rope_parameters=rope, num_hidden_layers=LAYERS + 1),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
    )
    image, video = torch.tensor([[1, 8, 8]]), torch.tensor([[2, 4, 8]])
    return Animal(
        "qwen3_vl",
        model,
        {
            "image": lambda: ({"pixel_values": _pixels(64, 96), "image_grid_thw": image}, 16),
            "frames": lambda: ({"pixel_values_videos": _pixels(64, 96), "video_grid_thw": video}, 16),
        },
        first_prunable=2,
    )


def _internvl() -> Animal:
    vision = _tower("internvl_vision", [32, 32], patch_size=[4, 4], use_absolute_position_embeddings=True)
    model = _build("internvl", vision_config=vision, text_config=_text("qwen2"), image_token_id=IMAGE)
    return Animal("internvl", model, {"image": lambda: ({"pixel_values": _pixels(1, 3, 32, 32)}, 16)})


def _idefics3(kind: str = "idefics3") -> Animal:
    vision = _tower(f"{kind}_vision", 32)
    model = _build(
        kind,
        vision_config=vision,
        text_config=_text("llama"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    return Animal(kind, model, {"image": lambda: ({"pixel_values": _pixels(1, 3, 32, 32)}, 16)})


def _smolvlm() -> Animal:
    return _idefics3("smolvlm")


def _foveate() -> Animal:
    config = FoveateConfig(
        _tower("siglip_vision_model", 16, patch_size=2, vision_use_head=False),
        _text("qwen2"),
        projector="downsample-2x2",
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    model = FoveateForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    grids = torch.tensor([[2, 1, 1]])
    return Animal(
        "foveate",
        model,
        {
            "image": lambda: ({"pixel_values": _pixels(1, 3, 16, 16)}, 16),
            "video": lambda: ({"pixel_values_videos": _pixels(2, 3, 16, 16), "video_grids": grids}, 2 * 16),
        },
    )


_MAKERS = {
    maker.__name__[1:]: maker
    for maker in (
        _llava,
        _llava_next,
        _llava_onevision,
        _qwen2_vl,
        _qwen2_5_vl,
        _qwen3_vl,
        _internvl,
        _smolvlm,
        _idefics3,
        _foveate,
    )
}
NAMES = tuple(_MAKERS)


@cache
def animal(name: str) -> Animal:
    """In float64, in eval mode, with sdpa; the same object whenever asked."""
    torch.manual_seed(0)
    made = _MAKERS[name]()
    for parameter in made.model.parameters():
        if parameter.ndim > 1:  # such that attention is far from uniform
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    made.model.double().eval().requires_grad_(False)
    _compute_in_float64(made.model)
    return made


@cache
def with_weights(name: str) -> PreTrainedModel:
    """A copy of the model, whose decoder's attention modules give (output, attention weights)."""
    made = animal(name)
    model: Any = _MAKERS[name]().model.double().eval().requires_grad_(False)
    model.load_state_dict(made.model.state_dict())
    _compute_in_float64(model)
    model.get_decoder().config._attn_implementation = "foveate_test_weights"
    return model


def _attention(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention by its definition; mask is bool [batch, 1, queries, keys], causal where None."""
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    weights = (q @ k.mT * scaling).masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).contiguous(), weights


AttentionInterface.register("foveate_test_weights", _attention)
AttentionMaskInterface.register("foveate_test_weights", sdpa_mask)


def _compute_in_float64(model: Any) -> None:
    """transformers computes RoPE and norms in float32, whatever the model's dtype, which hides smaller errors."""
    decoder = model.get_decoder()
    decoder.rotary_emb.forward = MethodType(_rotary, decoder.rotary_emb)
    for module in decoder.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)


def _rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m_rope = hasattr(self, "recomposition_frequencies")
    if m_rope:
        position_ids = position_ids.expand(3, -1, -1)
    angles = position_ids[..., None].double() * self.inv_freq.double()  # [(3,) batch, tokens, head_dim / 2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    if m_rope:
        return self.recomposition_frequencies(cos), self.recomposition_frequencies(sin)
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
