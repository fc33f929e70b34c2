"""`reduce`: a model that reads fewer visual tokens, for the time of a `with` block.

    with foveate.reduce(model, FastV(layer=2, keep=0.5)) as m:
        m.generate(**inputs)

During prefill hooks on the decoder layers drop columns between them, so that later layers compute on, and cache, the
tokens that were kept. In decode there is nothing to do, unless samples of a batch kept different numbers of tokens or
were padded: then holes are masked. No modeling file is touched; when the block ends, nothing of it is left on the
model. A KV cache that was filled in the block is to be continued in one.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..cache.cache import KVCache
from ..cache.parse import KVSpec, parse_kv
from ..cache.report import KVCosts, costs
from . import towers, videos
from .architecture import Architecture
from .base import Prefill, Pruner
from .patches import replaced
from .prefill import PrefillPass
from .slots import SlotLayer


def reduce(
    model: PreTrainedModel,
    *methods: Any,
    kv: KVSpec | str | None = None,
    visual_token_ids: Sequence[int] | None = None,
    visual_mask: torch.Tensor | None = None,
) -> "Reduction":
    """Makes a model drop visual tokens, or keep a smaller KV cache, or both, in a `with` block.

    Args:
        model: Foveate's own, or a transformers VLM: Llava, LlavaNext, LlavaOnevision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL,
            InternVL, SmolVLM, Idefics3; with `visual_token_ids` or `visual_mask` any whose decoder is causal.
        methods: such as `FastV(layer=2, keep=0.5)`; one or several at once, or none where `kv` is given.
        kv: how keys and values are kept, such as "snapkv:keep=0.25+int4" (see `KVCache`), of every sequence that begins
            without a KV cache of its own; a DynamicCache when None. With `kv` alone LLMs are accepted, too.
        visual_token_ids: ids that stand for visual tokens; those of the model's configuration when None.
        visual_mask: bool [batch, tokens], instead of ids: which tokens of a first prefill are visual. For
            `inputs_embeds`.

    Returns:
        A context manager that gives the model; its `prefills` tell what was processed.

    Raises:
        ValueError: a method can't work on this model.
    """
    return Reduction(model, methods, kv, visual_token_ids, visual_mask)


def is_reduced(model: PreTrainedModel) -> bool:
    """Whether a reduction of the model is open."""
    return getattr(model, "_foveate_reduction", None) is not None


def new_cache(model: PreTrainedModel) -> Cache:
    """A KV cache for a new sequence: of the reduction or the sequence parallelism that is open, or a DynamicCache."""
    reduction: Reduction | None = getattr(model, "_foveate_reduction", None)
    if reduction is not None:
        return reduction.new_cache()
    parallel = _parallel(model)
    return DynamicCache(config=model.get_decoder().config) if parallel is None else parallel.new_cache()


class Reduction:
    """See `reduce`.

    Attributes:
        methods: what drops tokens.
        kv: how keys and values are kept; None: as a DynamicCache does.
        prefills: what each prefill processed that read visual tokens, in order.
        held: what the KV cache held after each `generate`, where `kv` was given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        methods: Sequence[Any],
        kv: KVSpec | str | None = None,
        visual_token_ids: Sequence[int] | None = None,
        visual_mask: torch.Tensor | None = None,
    ):
        if not methods and kv is None:
            raise ValueError("no method was given; accepted: one or more, such as FastV(layer=2, keep=0.5), or kv=")
        self.methods = tuple(methods)
        self.kv = parse_kv(kv) if isinstance(kv, str) else kv
        sees = bool(methods) or (self.kv is not None and self.kv.needs_visual)
        self.architecture = Architecture.of(model, visual_token_ids if sees else (), visual_mask is not None)
        self.visual_mask = visual_mask
        self.prefills: list[Prefill] = []
        self.held: list[KVCosts] = []
        self.before_llm = [method for method in methods if method.family != "llm"]
        if len(self.before_llm) > 1:
            names = ", ".join(type(method).__name__ for method in self.before_llm)
            raise ValueError(f"{names} all act before the LLM; accepted: one such method, and others inside the LLM")
        for method in self.before_llm:
            if self.architecture.first_prunable:
                self.architecture.check_stage(0, method)
            self._attach(method)  # refuses what it can't work for; attached later
        self.stages: list[tuple[int, int, Pruner]] = []  # layer, the method's stage, method
        for method in methods:
            for stage, layer in enumerate(method.stages if method.family == "llm" else ()):
                self.architecture.check_stage(layer, method)
                self.stages.append((layer, stage, method))
        self.stages.sort(key=lambda stage: stage[0])
        layers = [layer for layer, *_ in self.stages]
        if len(set(layers)) < len(layers):
            raise ValueError(f"two methods drop tokens before the same layer, of {layers}; accepted: different layers")
        if self.kv is not None:
            self.new_cache()  # refuses what it can't work for
            scored = [type(method).__name__ for *_, method in self.stages if method.scored_by != "nothing"]
            if self.kv.duo is not None and scored:
                raise ValueError(
                    f"{scored[0]} scores by attention over all keys, of which duo's streaming heads keep few; accepted "
                    "with duo: methods before the LLM, Random"
                )
        self.generators: dict[int, torch.Generator] = {}
        self._open: ExitStack | None = None
        self._visual: torch.Tensor | None = None  # [batch, tokens] of the forward pass that runs
        self._pass: PrefillPass | None = None

    def __enter__(self) -> Any:
        model: Any = self.architecture.model
        if self._open is not None or is_reduced(model):
            raise RuntimeError("this model is in use by a reduction already; accepted: several methods in one `reduce`")
        self._refuse_attention()
        self.prefills.clear()
        self.held.clear()
        for method in self.methods:
            self.generators[id(method)] = torch.Generator().manual_seed(getattr(method, "seed", 0))
        with ExitStack() as stack:
            stack.enter_context(replaced(model, _foveate_reduction=self))
            for method in self.before_llm:
                stack.enter_context(self._attach(method))
            if hasattr(model, "generate"):
                stack.enter_context(replaced(model, generate=partial(self._generate, model.generate)))
            stack.callback(self._end)
            hooks = [
                model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                self.architecture.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
                self.architecture.decoder.register_forward_hook(self._after_decoder, always_call=True),
            ]
            for hook in hooks:
                stack.callback(hook.remove)
            self._open = stack.pop_all()
        return model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        opened, self._open = self._open, None
        assert opened is not None
        opened.close()

    def new_cache(self) -> Cache:
        """A KV cache for a new sequence."""
        if (parallel := _parallel(self.architecture.model)) is not None:
            return parallel.new_cache(self.kv)
        if self.kv is None:
            return DynamicCache(config=self.architecture.config)
        return KVCache(self.architecture.model, self.kv)

    def _attach(self, method: Any) -> AbstractContextManager[None]:
        attach = towers.attach if method.family == "tower" else videos.attach
        return attach(self.architecture.model, method)

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, after a look at what it was asked for."""
        config = kwargs.get("generation_config") or self.architecture.model.generation_config

        def asked(name: str) -> Any:
            return kwargs[name] if name in kwargs else getattr(config, name, None)

        parallel = _parallel(self.architecture.model)
        if parallel is None:
            _refuse(asked("use_cache"), kwargs.get("past_key_values"))
        if self.methods and asked("prefill_chunk_size") is not None:
            raise ValueError(
                f"prefill_chunk_size is {asked('prefill_chunk_size')}; accepted within foveate.reduce: None, "
                "as the end of the prompt tells which are needed"
            )
        if asked("cache_implementation") not in (None, "dynamic", "dynamic_full", "offloaded"):
            raise ValueError(
                f"cache_implementation is {asked('cache_implementation')!r}; accepted within foveate.reduce: "
                "None, 'dynamic', 'offloaded'"
            )
        if self.kv is not None and kwargs.get("past_key_values") is None:
            if asked("cache_implementation") is not None:
                raise ValueError(
                    f"cache_implementation is {asked('cache_implementation')!r}; accepted where kv is given: None"
                )
            kwargs["past_key_values"] = self.new_cache()
        made = generate(*args, **kwargs)
        if isinstance(kwargs.get("past_key_values"), KVCache) or (self.kv is not None and parallel is not None):
            self.held.append(costs(kwargs["past_key_values"]))
        return made

    def _refuse_attention(self) -> None:
        if self.architecture.config._attn_implementation == "flex_attention":
            raise ValueError(
                "attn_implementation is 'flex_attention', whose block masks can't be shortened; accepted within "
                "foveate.reduce: sdpa, eager, flash attention"
            )

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes which tokens are visual."""
        self._end()
        if _parallel(model) is not None:  # which drops what is to be dropped before the tokens are shared
            return
        if kwargs.get("labels") is not None:
            raise ValueError("labels were given; accepted within foveate.reduce: None, for inference alone")
        cache = kwargs.get("past_key_values")
        _refuse(kwargs.get("use_cache"), cache)
        ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        past = 0 if cache is None else cache.get_seq_length()
        if self.visual_mask is not None:
            batch, tokens = (embeds if ids is None else ids).shape[:2]  # type: ignore[union-attr]
            self._visual = None if past else _mask_rows(self.visual_mask, batch, tokens)
        elif ids is not None:
            known = torch.tensor(self.architecture.visual_ids, device=ids.device, dtype=ids.dtype)
            self._visual = None if past and ids.shape[1] == 1 else torch.isin(ids, known)
        elif embeds is not None and not past:
            raise ValueError(
                "inputs_embeds were given without input_ids, so it can't be told which tokens are visual; accepted: "
                "input_ids, or visual_mask= of `reduce`, a bool tensor [batch, tokens]"
            )

    def _before_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Begins a prefill, or a decode step with holes to mask."""
        if _parallel(self.architecture.model) is not None:
            return None
        given = kwargs.get("inputs_embeds")
        if given is None:
            given = kwargs.get("input_ids", args[0] if args else None)
        assert given is not None
        cache = kwargs.get("past_key_values")
        if cache is not None and given.shape[1] == 1 and cache.get_seq_length() and not self._needs_masks(cache):
            return None
        self._refuse_attention()
        if cache is None:
            cache = kwargs["past_key_values"] = self.new_cache()
        visual = self._visual
        if visual is None:
            visual = torch.zeros(given.shape[:2], dtype=torch.bool)
        if visual.shape != given.shape[:2]:
            raise ValueError(
                f"{tuple(visual.shape)} tokens were given to the model, {tuple(given.shape[:2])} to its LLM"
            )
        if isinstance(cache, KVCache):
            cache.see(visual.to(given.device))
        if not self.methods:
            return args, kwargs
        first = any(method.reindex for method in self.before_llm) if self.before_llm else None
        self._pass = PrefillPass(
            self.architecture, self.stages, first, self.generators, cache, visual.to(given.device),
            kwargs.get("attention_mask"),
        )  # fmt: skip
        self._pass.install()
        return args, kwargs

    def _needs_masks(self, cache: Cache) -> bool:
        """Whether in decode the masks that transformers makes don't fit what the cache's layers hold."""
        thin = [layer for layer in cache.layers if isinstance(layer, SlotLayer)]
        name = self.architecture.config._attn_implementation
        if name != "sdpa" and "flash" not in name:  # eager attention always has a mask
            return bool(thin)
        return any(layer.has_holes or layer.padded for layer in thin)

    def _after_decoder(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        done = self._pass
        self._end()
        if done is not None and output is not None and any(done.given):
            self.prefills.append(done.record())

    def _end(self) -> None:
        self._visual = None
        if self._pass is not None:
            self._pass.remove()
            self._pass = None


def _parallel(model: Any) -> Any:
    """The sequence parallelism of the model that is open (`parallel.inference`), or None."""
    return getattr(model, "_foveate_parallel", None)


def _refuse(use_cache: bool | None, cache: Any) -> None:
    """Raises ValueError where there is no KV cache whose layers can hold different numbers of tokens."""
    if use_cache is False:
        raise ValueError("use_cache is False; accepted within foveate.reduce: True")
    layers = getattr(cache, "layers", ())
    odd = {type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, SlotLayer)}
    if cache is not None and not isinstance(cache, KVCache) and (odd or not isinstance(cache, Cache)):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__} of {', '.join(sorted(odd)) or 'no layers'}; accepted within "
            "foveate.reduce: DynamicCache, foveate.KVCache"
        )


def _mask_rows(mask: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """The mask for a batch, which may be one of beams: each row several times."""
    if mask.ndim != 2 or mask.shape[1] != tokens or batch % len(mask):
        raise ValueError(f"visual_mask has shape {tuple(mask.shape)}; accepted: [{batch}, {tokens}], as the prompt has")
    return mask.bool().repeat_interleave(batch // len(mask), dim=0)
