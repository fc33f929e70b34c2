"""Tiny parts with random weights, from which the tests of the model and the processor are made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from foveate.vlm import FoveateConfig, FoveateForConditionalGeneration, FoveateProcessor

CORPUS = [
    "What is in the picture? A red circle stands left of a blue square.",
    "How many digits appear in the clip? Three digits appear, one after the other.",
    "Describe the image. The user asks and the assistant answers in words.",
]

TOWERS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {"image_size": 16, "vision_use_head": False},
    "siglip2_vision_model": {"num_patches": 16, "vision_use_head": False},
    "clip_vision_model": {"image_size": 16, "projection_dim": 32},
    "dinov2": {"image_size": 16},
    "dinov2_with_registers": {"image_size": 16, "num_register_tokens": 3},
    "dinov3_vit": {"image_size": 16, "num_register_tokens": 2},
    "vit": {"image_size": 16},
    "ijepa": {"image_size": 16},
    "sam_vision_model": {"image_size": 16},
}

LLMS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "n_inner": 48},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "sliding_window": 8},
}


def tower(name: str, **options: Any) -> PreTrainedConfig:
    """Two layers of width 32, patches of 4 pixels, images of 16."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 4,
    }
    return AutoConfig.for_model(name, **(sizes | TOWERS[name] | options))


def llm(name: str, vocab_size: int, **options: Any) -> PreTrainedConfig:
    """Two layers of width 32."""
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    if name != "gpt2":
        sizes |= {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
        }
    return AutoConfig.for_model(name, **(sizes | LLMS[name] | options))


def randomise(model: torch.nn.Module) -> None:
    """Large random weights: with the initialisation's small ones almost nothing changes the logits."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)


class Tiny:
    """Makes tiny configurations, models, tokenizers and media."""

    towers, llms = tuple(TOWERS), tuple(LLMS)
    tower, llm, randomise = staticmethod(tower), staticmethod(llm), staticmethod(randomise)

    def __init__(self, backend: str):
        self.backend = backend

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A byte-level BPE like Qwen2's, without media tokens."""
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(self.backend),
            pad_token="<|endoftext|>",
            eos_token="<|im_end|>",
        )

    def processor(self, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> FoveateProcessor:
        sizes = {"image_size": (16, 16), "patch_size": 4, "downsample_factor": 2, "num_frames": 3}
        return FoveateProcessor(tokenizer or self.tokenizer(), **(sizes | options))

    def model(
        self,
        tower_name: str = "siglip_vision_model",
        llm_name: str = "qwen2",
        tower_options: dict[str, Any] | None = None,
        llm_options: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        attn_implementation: Any = None,
        **options: Any,
    ) -> FoveateForConditionalGeneration:
        """A model whose media tokens are those of `processor()`."""
        processor = self.processor()
        config = FoveateConfig(
            vision_config=tower(tower_name, **(tower_options or {})),
            text_config=llm(llm_name, len(processor.tokenizer), **(llm_options or {})),
            image_token_id=processor.image_token_id,
            video_token_id=processor.video_token_id,
            **options,
        )
        model = FoveateForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
        randomise(model)
        model.generation_config.eos_token_id = None  # random models would stop anywhere
        model.generation_config.suppress_tokens = [processor.image_token_id, processor.video_token_id]
        return model.to(dtype).eval()

    @staticmethod
    def image(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
        """A random picture; size is (height, width)."""
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))

    @staticmethod
    def frames(seed: int, count: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
        """Random frames, uint8 [frames, height, width, 3]."""
        return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)

    @staticmethod
    def mp4(path: Path, grey: list[int], side: int = 32) -> Path:
        """A video at 4 frames a second whose frames are plain grey of these values."""
        import av

        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=4, options={"crf": "1"})
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
            for value in grey:
                picture = np.full((side, side, 3), value, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        return path


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer.special_tokens = [AddedToken(token, special=True) for token in special]
    backend.train_from_iterator(CORPUS, trainer)
    return Tiny(backend.to_str())


MakeModel = Callable[..., FoveateForConditionalGeneration]
