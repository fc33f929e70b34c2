"""What the tasks beside this file make of a document; lmms-eval loads it from the folder that they were written to.

A document's `messages` (JSON) hold a part for each medium, which are in `images` and `videos` in their order.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [*doc["images"], *(str(FOLDER / video) for video in doc["videos"])]


def doc_to_text(doc: dict[str, Any]) -> str:
    """All in one text, an image's place marked by `<image>`: for lmms-eval's plain protocol."""
    words = {"image": "<image>", "video": ""}
    parts = [part for message in json.loads(doc["messages"]) for part in message["content"]]
    return "".join(part["text"] if part["type"] == "text" else words[part["type"]] for part in parts)


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    media = {"image": iter(doc["images"]), "video": (str(FOLDER / video) for video in doc["videos"])}
    messages = json.loads(doc["messages"])
    for message in messages:
        for part in message["content"]:
            if part["type"] != "text":
                part["url"] = next(media[part["type"]])
    return messages


def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """Right is an answer that equals the truth."""
    return {"accuracy": float(results[0].strip() == doc["answer"])}


def process_choices(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Right is where the true answer has the least loss, as lmms-eval's own scorers have it."""
    losses = [loss for loss, _ in results]
    return {"accuracy": float(doc["choices"][losses.index(min(losses))] == doc["answer"])}
