"""A processor of the embedded data's language, and one of ChatML with a byte-level tokenizer."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from foveate.data.glyphs import CHAT_TEMPLATE, FRAME_SEPARATOR, glyph_tokenizer
from foveate.vlm.processor import FoveateProcessor


@pytest.fixture(scope="session")
def processor() -> FoveateProcessor:
    """Images of 64 pixels are 16 tokens, frames of 32 pixels 4 and a separator."""
    return FoveateProcessor(
        glyph_tokenizer(),
        image_size=(64, 64),
        video_size=(32, 32),
        patch_size=8,
        chat_template=CHAT_TEMPLATE,
        frame_separator=FRAME_SEPARATOR,
    )


@pytest.fixture(scope="session")
def chatml_processor() -> FoveateProcessor:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat is on the mat", "what is the cat on?", "assistant user system"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    return FoveateProcessor(tokenizer, image_size=(28, 28), patch_size=14)
