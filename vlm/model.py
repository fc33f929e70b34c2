"""The model: vision tower → projector → causal LLM.

Image and frame features replace their placeholder tokens in the LLM's input (LLaVA, arXiv 2304.08485; VILA,
arXiv 2312.07533). The tower is any transformers vision model, the LLM any transformers causal LM.
"""

import inspect
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from .config import FoveateConfig
from .processor import add_media_tokens
from .projector import Projector
from .resampler import Resampler
from .tower import resize_positions
from .vision import TOWER_BATCH, VisionEncoder

# Inputs that only the first forward of a generation takes: afterwards their tokens are in the KV cache.
IMAGE_INPUTS = ("pixel_values", "image_grids", "image_sizes", "image_queries")
VIDEO_INPUTS = ("pixel_values_videos", "video_grids", "video_queries")
MEDIA_INPUTS = (*IMAGE_INPUTS, *VIDEO_INPUTS, "image_features", "video_features")


class FoveatePreTrainedModel(PreTrainedModel):
    config_class = FoveateConfig
    config: FoveateConfig
    base_model_prefix = ""
    input_modalities = ["image", "video", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class FoveateForConditionalGeneration(FoveatePreTrainedModel, GenerationMixin):
    """Answers with text to interleaved text, images and video.

    `vision_tower`, `multi_modal_projector` and `language_model` (a complete causal LM with its head) are the parts.
    """

    def __init__(self, config: FoveateConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = _projector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        if config.tiling == "anyres":
            self.image_newline = _newline(config)
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        vision: str | PathLike,
        text: str | PathLike,
        projector: str = "downsample-2x2",
        tower_image_size: int | None = None,
        **options: Any,
    ) -> "FoveateForConditionalGeneration":
        """Joins a pretrained tower and a pretrained LLM by a new projector.

        The media tokens are added to the LLM's vocabulary and its embeddings resized. The processor that fits is
        `FoveateProcessor.from_parts(vision, text, model.config)`.

        Args:
            vision: name or directory of a vision tower, or of a model that has one (CLIP, SigLIP).
            text: name or directory of a causal LLM with its tokenizer.
            projector: see `FoveateConfig`.
            tower_image_size: side of the images, in pixels, to which the tower's position embedding is resized for good
                (`tower.resize_positions`); its own when None.
            **options: fields of `FoveateConfig` (`vision_feature_layer`, …); of `from_pretrained` (`dtype`,
                `attn_implementation`, `revision`, …) all that are not such fields, used for both parts.
        """
        config_fields = set(inspect.signature(FoveateConfig.__init__).parameters) - {"self", "kwargs"}
        config_options = {k: options.pop(k) for k in list(options) if k in config_fields}
        source = {k: options[k] for k in ("cache_dir", "local_files_only", "revision", "token") if k in options}
        tower = AutoModel.from_pretrained(vision, config=tower_config(vision, **source), **options)
        if tower_image_size is not None:
            resize_positions(tower, (tower_image_size, tower_image_size))
        llm = AutoModelForCausalLM.from_pretrained(text, **options)
        tokenizer = AutoTokenizer.from_pretrained(text, **source)
        image_token_id, video_token_id = add_media_tokens(tokenizer)
        if len(tokenizer) > llm.config.vocab_size:
            llm.resize_token_embeddings(len(tokenizer))
        config = FoveateConfig(
            vision_config=tower.config,
            text_config=llm.config,
            projector=projector,
            image_token_id=image_token_id,
            video_token_id=video_token_id,
            **config_options,
        )
        if options.get("attn_implementation") is not None:  # a name, or a dict with one for each part
            config._attn_implementation = options["attn_implementation"]
        with torch.device("meta"):
            model = cls(config)
        model.vision_tower, model.language_model = tower, llm
        model.multi_modal_projector = _projector(config).to(llm.dtype)
        model.multi_modal_projector.apply(model._init_weights)
        if config.tiling == "anyres":
            model.image_newline = nn.Parameter(_newline(config).to(llm.dtype))
        model.generation_config = llm.generation_config
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = self.language_model.resize_token_embeddings(*args, **kwargs)
        self.config.text_config.vocab_size = self.language_model.config.vocab_size
        return embeddings

    @property
    def vision(self) -> VisionEncoder:
        """Tower, merging of tiles and projector as one."""
        newline = self.image_newline if self.config.tiling == "anyres" else None
        return VisionEncoder(self.vision_tower, self.multi_modal_projector, self.config, newline, TOWER_BATCH)

    def encode_images(
        self,
        pixel_values: torch.Tensor,
        image_grids: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_queries: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """What the LLM reads of each image, [tokens, D]; see `VisionEncoder.encode_images`."""
        return self.vision.encode_images(pixel_values, image_grids, image_sizes, image_queries)

    def encode_videos(
        self,
        pixel_values_videos: torch.Tensor,
        video_grids: torch.Tensor | None = None,
        video_queries: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """What the LLM reads of each video, [tokens, D]; see `VisionEncoder.encode_videos`."""
        return self.vision.encode_videos(pixel_values_videos, video_grids, video_queries)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grids: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_queries: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """What the LLM reads of images, in transformers' form; see `encode_images`.

        Returns:
            `pooler_output`: [images, tokens, D], or where images differ in tokens a tuple of [tokens, D].
        """
        return _as_output(self.encode_images(pixel_values, image_grids, image_sizes, image_queries))

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_grids: torch.Tensor | None = None,
        video_queries: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """What the LLM reads of videos, in transformers' form; see `encode_videos` and `get_image_features`."""
        return _as_output(self.encode_videos(pixel_values_videos, video_grids, video_queries))

    def _placeholders(self, input_ids: torch.Tensor, kind: str) -> torch.Tensor:
        """Where `input_ids` [batch, tokens] hold the placeholder of a kind of media, bool of that shape."""
        token_id = getattr(self.config, f"{kind}_token_id")
        return torch.zeros_like(input_ids, dtype=torch.bool) if token_id is None else input_ids == token_id

    def _check_count(self, placeholders: int, features: int, kind: str) -> None:
        if placeholders != features:
            token_id = getattr(self.config, f"{kind}_token_id")
            raise ValueError(
                f"the text holds {placeholders} {kind} placeholder tokens (id {token_id}) but the {kind} inputs give "
                f"{features} features; both numbers must be equal (was the prompt truncated?)"
            )

    def _scatter(
        self, embeds: torch.Tensor, input_ids: torch.Tensor, kind: str, features: torch.Tensor | None
    ) -> torch.Tensor:
        """Puts `features` [tokens, D] where `input_ids` holds the placeholder of their kind."""
        mask = self._placeholders(input_ids, kind)
        self._check_count(int(mask.sum()), 0 if features is None else len(features), kind)
        return embeds if features is None else embeds.masked_scatter(mask.unsqueeze(-1), features.to(embeds))

    def get_inputs_embeds(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_queries: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grids: torch.Tensor | None = None,
        video_queries: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        decoding: bool = False,
    ) -> torch.Tensor:
        """What the decoder reads, [batch, tokens, D]: the embeddings of `input_ids`, media in their places.

        Args:
            input_ids and media: see `forward`.
            decoding: `input_ids` continue a KV cache; a media token that was generated is then a token like others.

        Raises:
            ValueError: the number of placeholders and of features differ.
        """
        if pixel_values is not None:
            image_features = torch.cat(self.encode_images(pixel_values, image_grids, image_sizes, image_queries))
        if pixel_values_videos is not None:
            video_features = torch.cat(self.encode_videos(pixel_values_videos, video_grids, video_queries))
        known = input_ids
        if not decoding:  # a checkpoint's placeholders may have ids beyond its embeddings
            placeholders = self._placeholders(input_ids, "image") | self._placeholders(input_ids, "video")
            known = input_ids.masked_fill(placeholders, 0)
        embeds = self.get_input_embeddings()(known)
        for kind, features in (("image", image_features), ("video", video_features)):
            if features is not None or not decoding:
                embeds = self._scatter(embeds, input_ids, kind, features)
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_queries: torch.Tensor | None = None,
        video_grids: torch.Tensor | None = None,
        video_queries: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass of the model.

        Args:
            input_ids: [batch, tokens], media placeholders expanded by the processor.
            attention_mask: [batch, tokens], 0 at padding; None together with restarting `position_ids` means packed
                rows, whose documents don't see each other.
            position_ids: [batch, tokens].
            past_key_values: KV cache of the tokens before `input_ids`.
            inputs_embeds: instead of `input_ids` [batch, tokens, D]; media must then be scattered already.
            pixel_values, image_grids, image_sizes, image_queries: all images in order, see `vision.py`.
            pixel_values_videos, video_grids, video_queries: the frames of all videos in order, see `vision.py`.
            image_features, video_features: instead of those, what `encode_images` and `encode_videos` gave,
                concatenated to [tokens, D].
            labels: [batch, tokens], -100 where no loss falls; shifted inside, as in transformers.
            logits_to_keep: as in transformers.

        Raises:
            ValueError: the number of placeholders and of features differ.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        media = {
            "pixel_values": pixel_values,
            "image_grids": image_grids,
            "image_sizes": image_sizes,
            "image_queries": image_queries,
            "pixel_values_videos": pixel_values_videos,
            "video_grids": video_grids,
            "video_queries": video_queries,
            "image_features": image_features,
            "video_features": video_features,
        }
        if input_ids is not None:
            decoding = past_key_values is not None and past_key_values.get_seq_length() > 0
            inputs_embeds = self.get_inputs_embeds(input_ids, **media, decoding=decoding)
        elif any(given is not None for given in media.values()):
            raise ValueError("media inputs need input_ids, whose placeholders say where they belong")
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        parent: Any = super()  # transformers annotates `self` with a class that no model inherits
        inputs = parent.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in MEDIA_INPUTS:
                inputs.pop(name, None)
            media = [name for name in MEDIA_INPUTS if kwargs.get(name) is not None]
            is_first_chunk = past_key_values is not None and past_key_values.get_seq_length() == 0
            if media and is_first_chunk:
                raise ValueError(f"prefill_chunk_size was given together with {media}; accepted with media: None")
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Beams and several returned sequences: media are encoded once, then repeated row by row."""
        media: dict[str, torch.Tensor] = {}
        if expand_size > 1 and input_ids is not None:
            media = {k: v for k in MEDIA_INPUTS if (v := model_kwargs.pop(k, None)) is not None}
            images = {k: media.pop(k) for k in IMAGE_INPUTS if k in media}
            videos = {k: media.pop(k) for k in VIDEO_INPUTS if k in media}
            if images:
                media["image_features"] = torch.cat(self.encode_images(**images))
            if videos:
                media["video_features"] = torch.cat(self.encode_videos(**videos))
            for kind in ("image", "video"):
                if (features := media.get(f"{kind}_features")) is not None:
                    counts = self._placeholders(input_ids, kind).sum(1).tolist()
                    self._check_count(sum(counts), len(features), kind)
                    media[f"{kind}_features"] = torch.cat(
                        [row for row in features.split(counts) for _ in range(expand_size)]
                    )
        parent: Any = super()  # as above
        input_ids, model_kwargs = parent._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | media


def _projector(config: FoveateConfig) -> Projector | Resampler:
    channels, width = config.vision_config.hidden_size * len(config.scales), config.text_config.hidden_size
    if config.projector == "resampler":
        return Resampler(channels, width, config.resampler_tokens)
    return Projector(config.projector, channels, width)


def _newline(config: FoveateConfig) -> nn.Parameter:
    """What ends each row of an `anyres` map, [D]."""
    width = config.text_config.hidden_size
    return nn.Parameter(torch.randn(width) * width**-0.5)


def _as_output(features: list[torch.Tensor]) -> BaseModelOutputWithPooling:
    alike = len({len(one) for one in features}) == 1
    together: Any = torch.stack(features) if alike else tuple(features)
    return BaseModelOutputWithPooling(pooler_output=together)


def tower_config(vision: str | PathLike, **source: Any) -> PreTrainedConfig:
    """The tower's configuration at a name or directory, also where it is a part of CLIP's or SigLIP's."""
    config = AutoConfig.from_pretrained(vision, **source)
    config = getattr(config, "vision_config", config)
    if config.model_type in ("siglip_vision_model", "siglip2_vision_model"):
        config.vision_use_head = False  # the pooling head is not used, so it need not be built or trained
    return config
