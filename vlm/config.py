"""Configuration of a vision tower + projector + LLM model."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .projector import PROJECTORS

FEATURE_SELECT_STRATEGIES = ("default", "full")


class FoveateConfig(PreTrainedConfig):
    """What a Foveate model is made of.

    Args:
        vision_config: the vision tower's configuration (any model that `AutoModel` builds and that takes
            `pixel_values`), or a dict with its `model_type`.
        text_config: the LLM's configuration (any model that `AutoModelForCausalLM` builds), or such a dict.
        projector: `linear`, `mlp2x`, `downsample-2x2` or `downsample-3x3` (see `projector.py`).
        vision_feature_layer: index into the tower's hidden states (0 is the embedding output, -1 the last layer
            before the tower's final norm; LLaVA and VILA use -2), or None for the tower's final, normed output.
        vision_feature_select_strategy: `default` keeps the patch features; `full` also keeps what stands before
            them (CLS and register tokens), which only the projectors without downsampling can take.
        image_token_id: id of the placeholder that an image feature replaces.
        video_token_id: id of the placeholder that a video frame's feature replaces.
        tie_word_embeddings: follows the LLM's own setting when None.

    Raises:
        ValueError: a field has a value that is not accepted; the message names the field.
    """

    model_type = "foveate"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: dict | PreTrainedConfig | None = None,
        text_config: dict | PreTrainedConfig | None = None,
        projector: str = "downsample-2x2",
        vision_feature_layer: int | None = -2,
        vision_feature_select_strategy: str = "default",
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        tie_word_embeddings: bool | None = None,
        **kwargs: Any,
    ):
        self.vision_config = _sub_config("vision_config", vision_config, "siglip_vision_model")
        self.text_config = _sub_config("text_config", text_config, "qwen2")
        if projector not in PROJECTORS:
            raise ValueError(f"projector is {projector!r}; accepted: {', '.join(PROJECTORS)}")
        if vision_feature_select_strategy not in FEATURE_SELECT_STRATEGIES:
            raise ValueError(
                f"vision_feature_select_strategy is {vision_feature_select_strategy!r}; "
                f"accepted: {', '.join(FEATURE_SELECT_STRATEGIES)}"
            )
        if vision_feature_select_strategy == "full" and PROJECTORS[projector] > 1:
            raise ValueError(
                f"vision_feature_select_strategy 'full' keeps CLS tokens, which projector {projector!r} can't place "
                "on its grid; accepted with it: 'default'"
            )
        layers = getattr(self.vision_config, "num_hidden_layers", None)
        if (
            vision_feature_layer is not None
            and layers is not None
            and not -layers - 1 <= vision_feature_layer <= layers
        ):
            raise ValueError(
                f"vision_feature_layer is {vision_feature_layer}; this tower of {layers} layers accepts "
                f"{-layers - 1} to {layers}, or None for its final output"
            )
        self.projector = projector
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        if tie_word_embeddings is None:
            tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)

    @property
    def downsample_factor(self) -> int:
        """Side of the square of patches that becomes one token."""
        return PROJECTORS[self.projector]


def _sub_config(field: str, value: dict | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    if value is None:
        return AutoConfig.for_model(default_type)
    if isinstance(value, PreTrainedConfig):
        return value
    if isinstance(value, dict):
        if "model_type" not in value:
            raise ValueError(
                f"{field} has no model_type; accepted: a configuration or a dict that names its model_type"
            )
        return AutoConfig.for_model(**value)
    raise ValueError(f"{field} is a {type(value).__name__}; accepted: a transformers configuration or a dict")
