"""What lmms-eval's entry point `lmms_eval.models` finds: light, as every start of lmms-eval loads it."""

from typing import Any


def manifest() -> Any:
    """The model `foveate`: of chat prompts by default, of plain ones and of likelihoods with `--force_simple`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="foveate",
        chat_class_path="foveate.eval.lmms.FoveateChat",
        simple_class_path="foveate.eval.lmms.FoveateSimple",
    )
