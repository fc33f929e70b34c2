"""A script: answers questions about a video with both exports of a model, by transformers alone.

    python -I reload_check.py CODE_EXPORT STOCK_EXPORT VIDEO QUESTION ...

This package can't be imported while it runs. The last line that it prints is a JSON object: `code` and `stock`, each a
list of answers.
"""

import json
import sys
from typing import Any


def main(code: str, stock: str, video: str, questions: list[str]) -> None:
    sys.modules["foveate"] = None  # type: ignore[assignment]  # every import of it is an ImportError from here on
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(code, trust_remote_code=True)
    models: dict[str, Any] = {
        "code": AutoModelForImageTextToText.from_pretrained(code, trust_remote_code=True),
        "stock": AutoModelForImageTextToText.from_pretrained(stock),
    }
    answers: dict[str, list[str]] = {name: [] for name in models}
    for question in questions:
        content = [{"type": "video", "path": video}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        for name, model in models.items():
            given = dict(inputs) if name == "code" else as_lfm2_vl(inputs, processor, model.config)
            words = model.generate(**given, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            answers[name].append(processor.decode(words, skip_special_tokens=True).strip())
    print(json.dumps(answers))


def as_lfm2_vl(inputs: Any, processor: Any, config: Any) -> dict[str, Any]:
    """A video's frames as the images that the stock architecture `lfm2_vl` takes: flattened patches and their grid."""
    frames, patch = inputs["pixel_values_videos"], config.vision_config.patch_size
    count, channels, height, width = frames.shape
    rows, columns = height // patch, width // patch
    patches = frames.reshape(count, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    ids = inputs["input_ids"]
    return {
        "input_ids": ids.masked_fill(ids == processor.video_token_id, config.image_token_id),
        "attention_mask": inputs["attention_mask"],
        "pixel_values": patches.reshape(count, rows * columns, -1),
        "spatial_shapes": ids.new_tensor([[rows, columns]]).expand(count, 2),
        "pixel_attention_mask": ids.new_ones(count, rows * columns),
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
