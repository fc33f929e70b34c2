from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from foveate.data.document import Document, Image, Text, Video
from foveate.data.encoding import Sample, encode
from foveate.data.glyphs import glyph_tokenizer
from foveate.train.acceleration import enable_checkpointing
from foveate.train.adapters import AdapterSettings, add_adapters, trainable_parameters
from foveate.train.flops import EVERYTHING, ModelFlops, peak_flops
from foveate.train.recipe import StageRecipe
from foveate.train.stages import SampleCost, encoded_tiles
from foveate.vlm import FoveateConfig, FoveateForConditionalGeneration
from foveate.vlm.processor import FoveateProcessor, model_fields

TOWERS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {"image_size": 28, "vision_use_head": False},
    "siglip2_vision_model": {"num_patches": 49, "vision_use_head": False},
    "clip_vision_model": {"image_size": 28},
    "dinov2": {"image_size": 28},
    "dinov3_vit": {"image_size": 28, "num_register_tokens": 2},
}
PREFIX = {"clip_vision_model": 1, "dinov2": 1, "dinov3_vit": 3}
LLMS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 2},  # grouped, gated
    "llama": {"num_key_value_heads": 4},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 24},
    "gpt2": {"n_inner": 80},  # neither
    "phi": {},
}
TILES = {(28, 28): 2, (16, 20): 3}  # 7x7 and 4x5 patches: an odd side is padded for 2x2
PATCHES = [49, 49, 20, 20, 20]
PROJECTED = {1: sum(PATCHES), 2: 2 * 16 + 3 * 6, 3: 2 * 9 + 3 * 4}
TOKENS = 180


def make_config(tower: str = "siglip_vision_model", llm: str = "qwen2", **options: Any) -> FoveateConfig:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {"vocab_size": 130, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return FoveateConfig(
        vision_config=AutoConfig.for_model(
            tower, **({**sizes, "hidden_size": 32, "patch_size": 4} | TOWERS.get(tower, {}))
        ),
        text_config=AutoConfig.for_model(llm, **(sizes | tokens | LLMS.get(llm, {}) | options.pop("text", {}))),
        image_token_id=128,
        video_token_id=129,
        **({"vision_feature_layer": None} | options),
    )


def counted(
    model: FoveateForConditionalGeneration, r: int, trains: Collection[str] = EVERYTHING
) -> tuple[float, float]:
    """PyTorch's count of a training step's forward and backward pass."""
    model.requires_grad_(False)
    for named in trainable_parameters(model, list(trains)).values():
        for _, parameter in named:
            parameter.requires_grad_(True)
    ids = torch.randint(0, 128, (1, TOKENS))
    features = [model.get_image_features(torch.zeros(1, 3, *size)).pooler_output.shape[1] for size in TILES]
    assert features[0] * 2 + features[1] * 3 == PROJECTED[r]
    ids[:, : 2 * features[0]] = 128
    ids[:, TOKENS - 3 * features[1] :] = 129
    pixels = {"pixel_values": torch.randn(2, 3, 28, 28), "pixel_values_videos": torch.randn(3, 3, 16, 20)}
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=ids, **pixels, labels=ids.clone(), use_cache=False).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    # Some versions of transformers make the angles of rotary embeddings by a matrix product.
    rotary = [sum(ops.values()) for name, ops in forward.get_flop_counts().items() if name.endswith(".rotary_emb")]
    return forward.get_total_flops() - sum(rotary), backward.get_total_flops()


def attention_not_needed(llm: Any) -> int:
    """What eager attention computes for pairs that the causal mask hides, n² against n·(n + 1)/2."""
    width = llm.num_attention_heads * (getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads)
    return llm.num_hidden_layers * 4 * width * (TOKENS**2 - TOKENS * (TOKENS + 1) // 2)


def make_model(config: FoveateConfig) -> FoveateForConditionalGeneration:
    return FoveateForConditionalGeneration._from_config(config, attn_implementation="eager").train()


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("llm", LLMS)
def test_a_training_step_is_what_pytorch_counts(tower: str, llm: str) -> None:
    config = make_config(tower, llm)
    step = ModelFlops.from_config(config).step([TOKENS], TILES)
    forward, backward = counted(make_model(config), 2)
    hidden = attention_not_needed(config.text_config)
    assert step.forward == forward - hidden
    assert step.backward == backward - 2 * hidden
    assert (step.model, step.recomputed) == (step.forward + step.backward, 0)


@pytest.mark.parametrize(
    ("projector", "r"), [("linear", 1), ("mlp2x", 1), ("downsample-2x2", 2), ("downsample-3x3", 3)]
)
@pytest.mark.parametrize(
    "trains",
    [
        ["projector"],
        ["llm"],
        ["projector", "llm"],
        ["tower"],
        ["tower_norms"],
        ["tower", "projector"],
        ["llm_norms"],
        ["llm_embeddings"],
        ["tower_norms", "projector", "llm_norms", "llm_embeddings"],
    ],
    ids="+".join,
)
def test_frozen_parts_save_their_share_of_the_backward_pass(projector: str, r: int, trains: list[str]) -> None:
    config = make_config(projector=projector)
    step = ModelFlops.from_config(config).step([TOKENS], TILES, trains)
    forward, backward = counted(make_model(config), r, trains)
    hidden = attention_not_needed(config.text_config)
    assert step.forward == forward - hidden
    assert step.backward == backward - 2 * hidden


def test_prefix_tokens_reach_a_projector_that_keeps_them() -> None:
    options = {"projector": "mlp2x", "vision_feature_layer": None}
    patches = ModelFlops.from_config(make_config("dinov3_vit", **options)).step([], TILES, ["projector"])
    full = make_config("dinov3_vit", **options, vision_feature_select_strategy="full")
    every = ModelFlops.from_config(full).step([], TILES, ["projector"])
    extra = 2 * (32 * 48 + 48 * 48) * 5 * 3  # five tiles, three tokens before the patches
    assert every.forward - patches.forward == extra
    assert every.backward - patches.backward == extra + 2 * 48 * 48 * 5 * 3


@pytest.mark.parametrize(("layer", "needed"), [(-1, 3), (-2, 2), (1, 1), (3, 3), (-4, 0)])
def test_tower_layers_after_the_features_are_not_counted(layer: int, needed: int) -> None:
    found = []
    for features in (layer, None):
        with torch.device("meta"):
            model = make_model(make_config("clip_vision_model", vision_feature_layer=features))
        add_adapters(model, AdapterSettings(rank=3, targets="all-linear", parts=("tower",)))
        found.append(ModelFlops.from_model(model))
    flops, whole = found
    assert flops.tower_lora == whole.tower_lora * needed / 3 and whole.tower_lora > 0
    assert flops.tower_linear == whole.tower_linear * needed / 3
    assert flops.tower_pair == whole.tower_pair * needed / 3
    assert flops.patch_embedding == whole.patch_embedding == 2 * 4 * 4 * 3 * 32


# Documents


def test_documents_cost_what_they_cost_apart() -> None:
    flops = ModelFlops.from_config(make_config())
    packed, apart = flops.step([30, 100, 7], TILES), [flops.step([30], TILES), flops.step([100]), flops.step([7])]
    assert packed.forward == sum(step.forward for step in apart)
    assert packed.backward == sum(step.backward for step in apart)
    assert flops.document(100, {(28, 28): 3}, ["llm"]) == flops.step([100], {(28, 28): 3}, ["llm"]).model
    attended = sum(n * (n + 1) // 2 for n in (30, 100, 7))
    together = flops.step([137], TILES).forward - packed.forward
    assert together == 3 * 4 * 48 * (137 * 138 // 2 - attended)


def test_logits_are_counted_where_something_is_predicted() -> None:
    flops = ModelFlops.from_config(make_config())
    head = 2 * 48 * 130
    assert flops.step([50]).model - flops.step([50], predicted=20).model == 3 * 30 * head
    frozen = flops.step([50], trains=["projector"]), flops.step([50], trains=["projector"], predicted=20)
    assert frozen[0].model - frozen[1].model == 2 * 30 * head


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 23])
def test_a_window_limits_the_pairs(tokens: int) -> None:
    text = {"head_dim": 12, "num_key_value_heads": 2, "sliding_window": 5}
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    one = ModelFlops.from_config(make_config(llm="gemma2", text=text | {"layer_types": types}))
    none = ModelFlops.from_config(make_config(llm="gemma2", text=text | {"layer_types": ["full_attention"] * 3}))
    every = ModelFlops.from_config(make_config(llm="mistral", text={"num_key_value_heads": 2, "sliding_window": 5}))
    assert (one.windows, none.windows, every.windows) == ((5, None, 5), (None,) * 3, (5,) * 3)
    hidden = sum(1 for q in range(tokens) for k in range(q + 1) if k <= q - 5)
    assert none.step([tokens]).forward - one.step([tokens]).forward == 2 * 4 * 48 * hidden


# Tiles, scales, pools


def count_media(config: FoveateConfig, trains: Collection[str], **media: torch.Tensor) -> tuple[float, float, int]:
    """PyTorch's count of a training step on media alone, forward and backward, and the tokens that the LLM reads."""
    model = make_model(config)
    model.requires_grad_(False)
    for named in trainable_parameters(model, list(trains)).values():
        for _, parameter in named:
            parameter.requires_grad_(True)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        features = [
            torch.cat(encode(media[pixels], *(media[name] for name in (f"{kind}_grids",) if name in media)))
            for kind, pixels, encode in (
                ("image", "pixel_values", model.encode_images),
                ("video", "pixel_values_videos", model.encode_videos),
            )
            if pixels in media
        ]
        embeds = torch.cat(features)[None]
        loss = model.language_model(inputs_embeds=embeds, use_cache=False).logits.sum()
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        loss.backward()
    rotary = [sum(ops.values()) for name, ops in forward.get_flop_counts().items() if name.endswith(".rotary_emb")]
    return forward.get_total_flops() - sum(rotary), backward.get_total_flops(), embeds.shape[1]


def hidden_pairs(config: FoveateConfig, tokens: int) -> int:
    """What eager attention computes for pairs that the causal mask hides."""
    return config.text_config.num_hidden_layers * 4 * 48 * (tokens**2 - tokens * (tokens + 1) // 2)


TRAINED = (["projector"], ["tower", "projector"], ["tower", "projector", "llm"])


@pytest.mark.parametrize("trains", TRAINED, ids="+".join)
@pytest.mark.parametrize(
    ("options", "grids", "tiles", "blocks", "tokens"),
    [
        ({"tiling": "s2", "s2_scales": [28, 56]}, [(1, 1)], 5, 1, 16),
        ({"tiling": "dynamic-s2", "s2_scales": [28, 56, 84]}, [(3, 3), (3, 4)], 2 * 5 + 9 + 12, 21, 21 * 16),
        ({"tiling": "tiles"}, [(2, 3), (1, 1)], 7 + 1, 8, 8 * 16),
        ({"projector": "pool-3x3"}, None, 3, 3, 3 * 9),
        ({"projector": "downsample-4x4"}, None, 3, 3, 3 * 4),
        ({"projector": "resampler", "resampler_tokens": 5}, None, 3, 3, 3 * 5),
        ({"projector": "resampler", "tiling": "s2", "s2_scales": [28, 56]}, [(1, 1)], 5, 1, 256),
    ],
    ids=["s2", "dynamic-s2", "tiles", "pool", "4x4", "resampler", "s2-resampler"],
)
def test_many_tiles_are_what_pytorch_counts(
    options: dict[str, Any],
    grids: list[tuple[int, int]] | None,
    tiles: int,
    blocks: int,
    tokens: int,
    trains: list[str],
) -> None:
    config = make_config(**options)
    media = {"pixel_values": torch.randn(tiles, 3, 28, 28)}
    if grids is not None:
        media["image_grids"] = torch.tensor(grids)
    forward, backward, read = count_media(config, trains, **media)
    assert read == tokens
    step = ModelFlops.from_config(config).step([read], {(28, 28): tiles}, trains, blocks={(28, 28): blocks})
    # The queries' own layer runs once a call, whatever there is to read; it is not counted.
    queries = 2 * 48 * 48 * config.resampler_tokens if config.projector == "resampler" else 0
    assert step.forward == forward - hidden_pairs(config, read) - queries
    assert step.backward == backward - 2 * hidden_pairs(config, read) - 2 * queries


@pytest.mark.parametrize("trains", TRAINED, ids="+".join)
@pytest.mark.parametrize("options", [{}, {"tiling": "dynamic-s2", "s2_scales": [28, 56]}], ids=["plain", "dynamic-s2"])
def test_pooled_frames_are_read_by_the_llm_alone(options: dict[str, Any], trains: list[str]) -> None:
    config = make_config(video_pool=(4, 2, 1), **options)
    grids = torch.tensor([(9, 1, 1), (4, 1, 1)])
    media = {"pixel_values_videos": torch.randn(13, 3, 28, 28), "video_grids": grids}
    forward, backward, read = count_media(config, trains, **media)
    assert read == (3 + 1) * 2 * 4  # 4x4 tokens a frame; the last group has one frame
    step = ModelFlops.from_config(config).step([read], {(28, 28): 13}, trains)
    assert step.forward == forward - hidden_pairs(config, read)
    assert step.backward == backward - 2 * hidden_pairs(config, read)


@pytest.mark.parametrize("trains", TRAINED, ids="+".join)
def test_an_image_of_its_own_size_is_one_tile(trains: list[str]) -> None:
    config = make_config("siglip2_vision_model", tiling="native")
    media = {"pixel_values": torch.randn(24, 3, 4, 4), "image_grids": torch.tensor([(4, 6)])}
    forward, backward, read = count_media(config, trains, **media)
    step = ModelFlops.from_config(config).step([read], {(16, 24): 1}, trains)
    assert read == 6
    assert step.forward == forward - hidden_pairs(config, read)
    assert step.backward == backward - 2 * hidden_pairs(config, read)


def encode_media(config: FoveateConfig) -> tuple[Sample, FoveateProcessor]:
    """A document of two images and a clip, as training encodes it."""
    processor = FoveateProcessor(
        glyph_tokenizer(), image_size=(28, 28), max_tiles=4, min_patches=4, max_patches=49, **model_fields(config)
    )
    images = [Image(np.zeros((height, width, 3), np.uint8)) for height, width in ((40, 60), (30, 30))]
    clip = Video(np.zeros((5, 20, 30, 3), np.uint8))
    return encode(Document("key", (*images, clip, Text("a 7", loss=True))), processor), processor


@pytest.mark.parametrize(
    "options",
    [{}, {"tiling": "tiles"}, {"tiling": "dynamic-s2", "s2_scales": [28, 56], "video_pool": (2, 1, 1)}],
    ids=["resize", "tiles", "dynamic-s2"],
)
def test_a_samples_cost_is_what_pytorch_counts_of_its_batch(options: dict[str, Any]) -> None:
    config = make_config(**options)
    sample, processor = encode_media(config)
    parts = ["tower", "projector", "llm"]
    forward, backward, read = count_media(config, parts, **processor.media_inputs([sample.media]))
    cost = SampleCost(config, StageRecipe(name="all", steps=1, learning_rates=dict.fromkeys(parts, 1.0), data=["x"]))
    tiles, blocks = encoded_tiles(config.tiling, sample.media)
    step = cost.flops.step([read], tiles, parts, blocks=blocks)
    assert step.forward == forward - hidden_pairs(config, read)
    assert step.backward == backward - 2 * hidden_pairs(config, read)
    assert cost(sample) == cost.flops.document(sample.tokens, tiles, parts, sample.loss_tokens, blocks)


def test_a_samples_images_of_their_own_size_are_tiles() -> None:
    config = make_config("siglip2_vision_model", tiling="native")
    sample, processor = encode_media(config)
    plans = [processor.plan_image(size) for size in ((40, 60), (30, 30), *[(20, 30)] * 5)]
    assert len({plan.grid for plan in plans}) > 1
    tiles, blocks = encoded_tiles("native", sample.media)
    assert tiles == blocks == Counter((4 * plan.grid[0], 4 * plan.grid[1]) for plan in plans)


# Adapters and checkpointing


@pytest.mark.parametrize("upstream", [[], ["tower_norms"]], ids=["alone", "nvila"])
def test_adapters_cost_their_own_products(upstream: list[str]) -> None:
    config = make_config()
    model = make_model(config)
    add_adapters(model, AdapterSettings(rank=3))
    step = ModelFlops.from_model(model).step([TOKENS], TILES, [*upstream, "lora"])
    forward, backward = counted(model, 2, [*upstream, "lora"])
    hidden = attention_not_needed(config.text_config)
    assert step.forward == forward - hidden
    # The gradient of the first layer's input, which nothing needs where adapters train alone.
    first = sum(2 * TOKENS * 48 * width + 2 * TOKENS * 48 * 3 for width in (48, 24, 24))
    assert step.backward == backward - 2 * hidden + (0 if upstream else first)
    plain = ModelFlops.from_config(config)
    assert step.forward > plain.step([TOKENS], TILES).forward
    assert plain.step([TOKENS], TILES, ["lora"]).backward == 0, "no adapters, nothing trains"


@pytest.mark.parametrize("parts", [("llm",), ("tower",), ("llm", "tower")], ids="+".join)
def test_recomputation_counts_as_hardwares_work_alone(parts: tuple[str, ...]) -> None:
    config = make_config()
    model = make_model(config)
    flops = ModelFlops.from_config(config)
    plain, step = flops.step([TOKENS], TILES), flops.step([TOKENS], TILES, checkpointing=parts)
    assert step.model == plain.model == plain.hardware
    _, without = counted(model, 2)
    enable_checkpointing(model, parts)
    _, recomputing = counted(model, 2)
    # PyTorch stops a recomputation before its last product, whose result no gradient needs; hidden pairs as above.
    last = {"llm": 2 * 80 * 48 * TOKENS, "tower": 2 * 80 * 32 * sum(PATCHES)}
    unneeded = sum(3 * last[part] for part in parts)
    hidden = attention_not_needed(config.text_config) if "llm" in parts else 0
    assert step.recomputed == step.hardware - step.model == recomputing - without - hidden + unneeded
    assert flops.step([TOKENS], TILES, ["llm"], checkpointing=["tower"]).recomputed == 0, "no backward pass, no need"
    assert flops.step([TOKENS], TILES, [], checkpointing=["tower", "llm"]).hardware == plain.forward


# Sizes


def test_a_2b_model_follows_the_6nd_rule() -> None:
    """Qwen2-1.5B with SigLIP-so400m; 6·N·D with N the weights that multiply (arXiv 2001.08361, section 2.1)."""
    config = FoveateConfig(
        {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
        | {"num_attention_heads": 16, "patch_size": 14, "image_size": 448, "vision_use_head": False},
        {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
        | {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
        vision_feature_layer=None,
    )
    with torch.device("meta"):
        model = FoveateForConditionalGeneration(config)
    flops = ModelFlops.from_model(model)
    weights = sum(p.numel() for p in model.language_model.parameters())
    assert weights == pytest.approx(1.54e9, rel=0.01)
    assert flops.document(64) == pytest.approx(6 * weights * 64, rel=0.01)
    attention = 6 * 28 * 8192**2 * 1536  # 12·L·n²·D, of which a causal mask leaves half
    assert flops.document(8192) == pytest.approx(6 * weights * 8192 + attention, rel=0.01)
    tower = sum(p.numel() for name, p in model.vision_tower.named_parameters() if "position" not in name)
    tile = flops.step([], {(448, 448): 1}, ["tower"])
    assert tile.model == pytest.approx(6 * tower * 1024 + 12 * 27 * 1024**2 * 1152, rel=0.02)
    assert flops.step([], {(448, 448): 1}, []).backward == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llm": "mixtral", "text": {"num_local_experts": 2, "num_key_value_heads": 2}}, r"mixtral: .* weight mlp\."),
        ({"llm": "lfm2", "text": {"layer_types": ["conv", "full_attention", "conv"]}}, r"lfm2: .* weight conv\.conv"),
        ({"llm": "deepseek_v3", "text": {"first_k_dense_replace": 3}}, "deepseek_v3 has latent attention"),
        ({"tower": "sam_vision_model"}, "sam_vision_model: it can't be told what its weight attn.rel_pos_h computes"),
    ],
)
def test_what_can_not_be_counted_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelFlops.from_config(make_config(**options))


# Peaks


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_are_known_by_the_devices_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda:0") == peak_flops(torch.device("cuda")) == peak


def test_a_cpus_peak_is_not_known() -> None:
    assert peak_flops("cpu") is None
