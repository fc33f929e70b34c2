"""What pruning must know of a model: its decoder layers, its visual tokens, and what would go wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..decoder import attention_config, decoder_of

# Models that were checked against brute force. Others may read visual tokens in ways that a causal decoder does not.
KNOWN = (
    "foveate",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "smolvlm",
)
TOKEN_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True)
class Architecture:
    """A model's parts that pruning works on.

    Attributes:
        model: what the user calls.
        decoder: its text model, which runs the layers.
        layers: its decoder layers.
        visual_ids: ids of visual tokens; none where a mask says which they are.
        first_prunable: the first layer that may read fewer tokens: higher layers' visual inputs of `deepstack` are
            added by place.
    """

    model: PreTrainedModel
    decoder: nn.Module
    layers: nn.ModuleList
    visual_ids: tuple[int, ...]
    first_prunable: int

    @property
    def config(self) -> Any:
        """The configuration that the layers' attention reads."""
        return attention_config(self.decoder)

    @classmethod
    def of(cls, model: PreTrainedModel, visual_ids: Sequence[int] | None, masked: bool) -> "Architecture":
        """Finds the parts.

        Args:
            visual_ids: ids of visual tokens, from a user who knows that the model will do.
            masked: a mask says which tokens are visual.

        Raises:
            ValueError: the model is not known, or its layers are not such that tokens can be dropped between them.
        """
        kind = model.config.model_type
        if visual_ids is None and not masked:
            if kind not in KNOWN:
                raise ValueError(
                    f"model type {kind!r} is not known; accepted: {', '.join(KNOWN)}, or name the visual tokens: "
                    "visual_token_ids=(151655,), or visual_mask= a bool tensor [batch, tokens] of the prompt. The "
                    "decoder must be causal over visual tokens too"
                )
            given = [getattr(model.config, name, None) for name in TOKEN_FIELDS]
            visual_ids = tuple(dict.fromkeys(i for i in given if i is not None))
        decoder = decoder_of(model)
        vision = getattr(model.config, "vision_config", None)
        deepstack = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        return cls(model, decoder, decoder.layers, tuple(visual_ids or ()), deepstack)

    def check_stage(self, layer: int, method: Any) -> None:
        """Raises ValueError where a method acts at a layer that can't read fewer tokens than the one before."""
        if not self.first_prunable <= layer < len(self.layers):
            deepstack = f", as its first {self.first_prunable} layers add visual features by place"
            raise ValueError(
                f"{type(method).__name__} drops tokens before layer {layer}; accepted of this model: "
                f"{max(1, self.first_prunable)} to {len(self.layers) - 1}{deepstack * bool(self.first_prunable)}"
            )
