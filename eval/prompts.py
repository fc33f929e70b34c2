"""Conversations about media, asked in batches: answers generated, or given ones rated by their likelihood."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import StoppingCriteria, StoppingCriteriaList

from ..vlm.cache.parse import KVSpec
from ..vlm.chat import Chat
from ..vlm.media import Video, load_image
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.planning import VideoSource
from ..vlm.processor import FoveateProcessor
from ..vlm.pruning import Reduction
from ..vlm.pruning.session import new_cache

Messages = list[dict[str, Any]]
LOOK_AHEAD = 4  # batches that are read at a time, so that prompts of like length are asked together


@dataclass(frozen=True)
class Prompt:
    """A conversation as the LLM reads it, up to where its answer begins.

    Attributes:
        text: with every placeholder at its full length.
        ids: tokens of it.
        features: `image_features` and `video_features`, [tokens, D], where it has such media.
    """

    text: str
    ids: tuple[int, ...]
    features: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Generated:
    """An answer, and of how many tokens."""

    text: str
    prompt_tokens: int
    new_tokens: int


class Asker:
    """Asks a model about media, whoever else is asked in the same batch.

    Media are encoded one conversation at a time. In a batch shorter prompts are padded on the left; where `methods` or
    `kv` are given only prompts of one length are asked together, so that no group of a quantised cache holds padding.
    Methods that draw at random are asked one question at a time, each with the method's own seed.

    Args:
        model, processor: what answers.
        methods: that drop visual tokens; see `foveate.reduce`.
        kv: how keys and values are kept; likewise.
        num_frames, fps: frames of each video, or frames a second; what a video says by itself when both are None, and
            the processor's own number where it says nothing.
        max_visual_tokens: budget of a conversation's media; the processor's own when None.
        batch_size: conversations that are asked together, at most.

    Attributes:
        prefills: what each prefill processed, where methods are given; see `Reduction`.
        as_text: how many placeholders stood in texts without a medium, and were read as words.
    """

    def __init__(
        self,
        model: FoveateForConditionalGeneration,
        processor: FoveateProcessor,
        methods: Sequence[Any] = (),
        kv: KVSpec | str | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        max_visual_tokens: int | None = None,
        batch_size: int = 1,
    ):
        if num_frames is not None and fps is not None:
            raise ValueError(f"frames is {num_frames} and fps is {fps}; accepted: one of them")
        for name, value in (("frames", num_frames), ("fps", fps), ("max_visual_tokens", max_visual_tokens)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; accepted: more than 0")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; accepted: 1 or more")
        self.model, self.processor = model, processor
        self.methods = tuple(methods)
        self.reduction = Reduction(model, self.methods, kv) if self.methods or kv is not None else None
        self.num_frames, self.fps, self.max_visual_tokens = num_frames, fps, max_visual_tokens
        self.batch_size = 1 if self._drawing else batch_size
        self.prefills: list[Any] = []
        self.as_text = 0

    @property
    def _drawing(self) -> list[Any]:
        """Methods that draw at random."""
        return [method for method in self.methods if hasattr(method, "seed")]

    def _reduced(self) -> AbstractContextManager[Any]:
        return self.reduction or nullcontext()

    def read(self, messages: Messages) -> Prompt:
        """Reads a conversation whose last turn is the user's; within `foveate.reduce`, if anything reduces the model.

        Args:
            messages: Hugging Face's, each content a text or a list of parts: `{"type": "text", "text": …}`,
                `{"type": "image", "image": …}` with what `load_image` takes, `{"type": "video", "video": …}` with a
                path, bytes, frames or a `VideoSource`. A placeholder in a text is a word.

        Raises:
            MediaError: a medium can't be read; the message names it.
            BudgetError: not even the lowest resolution fits the budget.
            ValueError: a part of another type, or the chat template can't render them.
        """
        turns, media = self._parts(messages)
        chat = Chat(self.model, self.processor, media, self.max_visual_tokens)
        prompt = render(self.processor, turns)
        [text], _ = self.processor.get_text_with_replacements([prompt], chat.image_texts, chat.video_texts)
        return Prompt(text, tuple(self._ids(text)), chat.features)

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _parts(self, messages: Messages) -> tuple[Messages, list[Any]]:
        """Turns of placeholders and texts alone, and the media in their order."""
        if not messages or messages[-1]["role"] != "user":
            raise ValueError(f"the conversation is {messages!r:.200}; accepted: one whose last turn is the user's")
        turns: Messages = []
        media: list[Any] = []
        for message in messages:
            content = message["content"]
            parts: list[dict[str, Any]] = []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                kind = part["type"]
                if kind == "text":
                    parts.append({"type": "text", "text": self._without_placeholders(part["text"])})
                elif kind == "image":
                    media.append(load_image(part["image"]))
                    parts.append({"type": "image"})
                elif kind == "video":
                    media.append(self._video(part["video"]))
                    parts.append({"type": "video"})
                else:
                    raise ValueError(f"content of type {kind!r}; accepted: text, image, video")
            turns.append({"role": message["role"], "content": parts})
        return turns, media

    def _without_placeholders(self, text: str) -> str:
        for token in (self.processor.image_token, self.processor.video_token):
            self.as_text += text.count(token)
            text = text.replace(token, f"{token[0]} {token[1:-1]} {token[-1]}")
        return text

    def _video(self, given: Any) -> Video | VideoSource:
        if isinstance(given, Video):
            return given
        source = given if isinstance(given, VideoSource) else VideoSource(given)
        if isinstance(source.source, str | Path | bytes):
            num_frames, fps = source.num_frames, source.fps
            if self.num_frames is not None or self.fps is not None:
                num_frames, fps = self.num_frames, self.fps
            elif num_frames is None and fps is None:
                num_frames = self.processor.num_frames
            source = VideoSource(source.source, num_frames, fps, source.start_s, source.end_s)
        return source

    @torch.inference_mode()
    def generate(
        self,
        conversations: Sequence[Callable[[], Prompt | None]],
        stop: Sequence[str] = (),
        after: Callable[[int], None] | None = None,
        **options: Any,
    ) -> list[Generated | None]:
        """Answers, in the order of the conversations.

        Args:
            conversations: each reads its prompt, by `read`, when it is its turn; None where nothing is to be asked.
            stop: an answer ends before the first of these texts.
            after: called with the number of conversations done.
            **options: of transformers' `generate`, such as `max_new_tokens`.
        """
        answers: list[Generated | None] = [None] * len(conversations)
        done = 0
        with self._reduced():
            for numbers in _slices(len(conversations), self.batch_size):
                prompts = {n: prompt for n in numbers if (prompt := conversations[n]()) is not None}
                for batch in self._batches(prompts, lambda prompt: len(prompt.ids)):
                    said = self._answers([prompts[n] for n in batch], stop, options)
                    for number, one in zip(batch, said, strict=True):
                        answers[number] = one
                done += len(numbers)
                if after:
                    after(done)
            self.prefills += self.reduction.prefills if self.reduction else []
        return answers

    def _batches(self, waiting: dict[int, Any], length: Callable[[Any], Any]) -> Iterator[list[int]]:
        """Numbers of those that are asked together."""
        numbers = sorted(waiting, key=lambda n: length(waiting[n]))  # stable: of one length in their order
        batch: list[int] = []
        for number in numbers:
            full = len(batch) == self.batch_size
            other = self.reduction is not None and batch and length(waiting[number]) != length(waiting[batch[0]])
            if full or other:
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Prompts padded on the left, and the features of all."""
        longest = max(len(prompt.ids) for prompt in prompts)
        pad = self._pad_id
        ids = torch.tensor([[pad] * (longest - len(prompt.ids)) + list(prompt.ids) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts])
        inputs = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
        for name in ("image_features", "video_features"):
            if given := [prompt.features[name] for prompt in prompts if name in prompt.features]:
                inputs[name] = torch.cat(given)
        return inputs

    @property
    def _pad_id(self) -> int:
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return 0 if pad is None else pad  # masked, whatever it is

    def _redraw(self) -> None:
        for method in self._drawing:
            assert self.reduction is not None
            self.reduction.generators[id(method)].manual_seed(method.seed)

    def _answers(self, prompts: Sequence[Prompt], stop: Sequence[str], options: dict[str, Any]) -> list[Generated]:
        inputs, tokenizer = self._inputs(prompts), self.processor.tokenizer
        length = inputs["input_ids"].shape[1]
        self._redraw()
        if stop:
            options = options | {"stopping_criteria": StoppingCriteriaList([_Stops(tokenizer, stop, length)])}
        generate: Any = self.model.generate  # type: ignore[misc]  # transformers types its self as a protocol
        made = generate(**inputs, pad_token_id=self._pad_id, **options)[:, length:]
        answers = []
        for prompt, ids in zip(prompts, made.tolist(), strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            answers.append(Generated(before(text, stop).strip(), len(prompt.ids), self._until_end(ids)))
        return answers

    def _until_end(self, ids: Sequence[int]) -> int:
        """How many tokens were generated, the end of the turn included."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))

    @torch.inference_mode()
    def log_likelihoods(
        self,
        conversations: Sequence[tuple[Any, Callable[[], Prompt], str]],
        after: Callable[[int], None] | None = None,
    ) -> list[tuple[float, int, bool]]:
        """How likely given answers are: log-probability in nats, number of tokens, whether greedy decoding says them.

        The prompt is read first, then the answer goes on from its KV cache, as in generation: what a method drops never
        depends on the answer.

        Args:
            conversations: of each a key, which is the same for the same prompt, what reads the prompt, the answer.
            after: as in `generate`.

        Raises:
            ValueError: an answer is empty.
        """
        found: list[tuple[float, int, bool]] = [(0.0, 0, False)] * len(conversations)
        done = 0
        with self._reduced():
            for numbers in _slices(len(conversations), self.batch_size):
                prompts: dict[Any, Prompt] = {}  # each is read once, however many answers are rated
                rated: dict[int, tuple[Prompt, tuple[int, ...]]] = {}
                for number in numbers:
                    key, read, answer = conversations[number]
                    if key not in prompts:
                        prompts[key] = read()
                    rated[number] = prompts[key], self._continuation(prompts[key], answer)
                for batch in self._batches(rated, lambda one: (len(one[0].ids), len(one[1]))):
                    for number, one in zip(batch, self._rated([rated[n] for n in batch]), strict=True):
                        found[number] = one
                done += len(numbers)
                if after:
                    after(done)
            self.prefills += self.reduction.prefills if self.reduction else []
        return found

    def _continuation(self, prompt: Prompt, answer: str) -> tuple[int, ...]:
        """An answer's tokens behind the prompt."""
        together = tuple(self._ids(prompt.text + answer))
        same = together[: len(prompt.ids)] == prompt.ids
        ids = together[len(prompt.ids) :] if same else tuple(self._ids(answer))
        if not ids:
            raise ValueError(f"the answer to rate is {answer!r}; accepted: a text of at least one token")
        return ids

    def _rated(self, pairs: Sequence[tuple[Prompt, tuple[int, ...]]]) -> list[tuple[float, int, bool]]:
        prompts, answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
        inputs = self._inputs(prompts)
        lengths = [len(answer) for answer in answers]
        longest = max(lengths)
        ids = torch.tensor([[*answer, *[self._pad_id] * (longest - len(answer))] for answer in answers])
        ids = ids.to(self.model.device)  # [batch, longest]; what follows an answer is not looked at
        cache = new_cache(self.model)
        self._redraw()
        mask = inputs["attention_mask"]
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(**inputs, position_ids=places, past_key_values=cache, logits_to_keep=1).logits
        if longest > 1:
            mask = torch.cat([mask, torch.ones_like(ids[:, 1:])], dim=1)
            more = places[:, -1:] + 1 + torch.arange(longest - 1, device=ids.device)
            later = self.model(input_ids=ids[:, :-1], attention_mask=mask, position_ids=more, past_key_values=cache)
            logits = torch.cat([logits, later.logits], dim=1)  # [batch, longest, vocabulary]
        given = logits.float().log_softmax(-1).gather(2, ids.unsqueeze(2)).squeeze(2)
        greedy = logits.argmax(-1) == ids
        return [
            (float(given[row, :length].double().sum()), length, bool(greedy[row, :length].all()))
            for row, length in enumerate(lengths)
        ]


def render(processor: FoveateProcessor, turns: Messages) -> str:
    """The conversation as text, with a placeholder for each of the media, up to where the answer begins.

    Args:
        turns: messages whose contents are parts: texts, and media by their type alone.

    Raises:
        ValueError: the chat template leaves out a text or some of the media, in whatever form they are given.
    """
    tokens = {"image": processor.image_token, "video": processor.video_token}
    parts = [part for turn in turns for part in turn["content"]]
    kinds = [part["type"] for part in parts]
    texts = [part["text"].strip() for part in parts if part["type"] == "text"]

    def words(turn: dict[str, Any]) -> str:
        parts = turn["content"]
        return "".join(part["text"] if part["type"] == "text" else tokens[part["type"]] + "\n" for part in parts)

    forms: tuple[Callable[[dict[str, Any]], Any], ...] = (
        lambda turn: turn["content"],
        # For templates that know no videos, or no content but text, placeholders are words.
        lambda turn: [{"type": "text", "text": words(turn)}],
        words,
    )
    for form in forms:
        try:
            written = [{"role": turn["role"], "content": form(turn)} for turn in turns]
            prompt = processor.apply_chat_template(written, add_generation_prompt=True)
        except (TypeError, TemplateError):
            continue
        if all(prompt.count(token) == kinds.count(kind) for kind, token in tokens.items()) and all(
            text in prompt for text in texts
        ):
            return prompt
    raise ValueError(
        "the model's chat template leaves out a text or some of the media "
        f"({', '.join(kind for kind in kinds if kind != 'text') or 'none'}); accepted: a template for parts of text, "
        "image and video, or for text"
    )


def before(text: str, stop: Sequence[str]) -> str:
    """What stands before the first of the stops."""
    return text[: min((place for one in stop if one and (place := text.find(one)) >= 0), default=len(text))]


class _Stops(StoppingCriteria):
    """Ends each row's generation once a stop stands in its text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_tokens: int):
        self.tokenizer, self.stop, self.prompt_tokens = tokenizer, stop, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_tokens :], skip_special_tokens=True)
        ended = [before(text, self.stop) != text for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _slices(count: int, batch_size: int) -> Iterator[range]:
    step = batch_size if batch_size == 1 else LOOK_AHEAD * batch_size
    return (range(start, min(start + step, count)) for start in range(0, count, step))
