"""The model `foveate` of lmms-eval 0.7.3 (docs/lmms.md).

    lmms-eval --model foveate --model_args pretrained=MODEL,kv=int4 --tasks mmmu_val --batch_size 8

lmms-eval has two protocols. Tasks give `FoveateChat` messages, with media where they belong. `FoveateSimple`, which
`--force_simple` chooses, gets a text and a list of media; it alone can rate answers by their likelihood.
"""

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from PIL import Image
from tqdm import tqdm

from ..vlm.cache.parse import parse_kv
from ..vlm.chat import load_model
from ..vlm.media import MediaError
from ..vlm.planning import VideoSource
from ..vlm.processor import IMAGE_TOKEN
from ..vlm.pruning import parse_method
from ..vlm.pruning.report import mean_visual_tokens
from ..vlm.quantised_weights import SCHEMES, TOWER_SCHEMES, parse_scheme
from .prompts import Asker, Generated, Messages, Prompt

MAX_ROUNDS = 1000
MAX_NEW_TOKENS = 1024  # of tasks that name no number
BLANK_LINE = "\n\n"  # what lmms-eval lets tasks stop at that name no stop themselves
GENERATION = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
STOPS = ("until", "stop_sequences")
OF_OTHERS = ("image_aspect_ratio", "max_agentic_steps")  # that tasks of lmms-eval name for other models: no warning
DTYPES = ("bfloat16", "float16", "float32")
SCORES = ("loss", "total_loss", "log_likelihood")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class Foveate(lmms):
    """What both protocols share.

    Args:
        pretrained: folder or Hugging Face name, of all that `foveate ask` takes.
        prune: methods as `--prune` takes them, joined by `+`.
        kv: as `--kv` takes it.
        frames, fps: frames of each video, or frames a second; what the task's video says, or the model's own number,
            when both are None.
        max_visual_tokens: budget of a prompt's media; the model's own when None.
        weights, tower_weights: how those of the LLM and of the tower are quantised, as `--weights` takes it.
        dtype: bfloat16, float16 or float32; as saved when None.
        attn_implementation: sdpa, eager, flash_attention_2, …; transformers' choice when None.
        device: such as cpu or cuda:1; the process's own GPU, or else the CPU, when None.
        batch_size: prompts that are asked together.
        stop_at_blank_line: whether an answer ends at a blank line where the task says nothing else. lmms-eval adds this
            stop to tasks that name none; a chat model's answer ends by itself, and may have paragraphs.
        score: what `loglikelihood` gives: `loss`, the mean of the negative log-likelihood over the tokens, which other
            models of lmms-eval give and its scorers minimise; `total_loss`, its sum; `log_likelihood`, the sum's
            negative.
        bad_media: what happens where a medium can't be read: `stop`, or `empty`: the question is answered by nothing,
            counted and told.

    Raises:
        ValueError: an argument has a value that is not accepted; the message names it.
    """

    def __init__(
        self,
        pretrained: str,
        prune: str | None = None,
        kv: str | None = None,
        frames: int | None = None,
        fps: float | None = None,
        max_visual_tokens: int | None = None,
        weights: str | None = None,
        tower_weights: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        stop_at_blank_line: bool = False,
        score: str = "loss",
        bad_media: str = "stop",
    ):
        super().__init__()
        for name, value, accepted in (
            ("dtype", dtype, (None, *DTYPES)),
            ("score", score, SCORES),
            ("bad_media", bad_media, ("stop", "empty")),
            ("stop_at_blank_line", stop_at_blank_line, (True, False)),
        ):
            if value not in accepted:
                raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(str, accepted))}")
        for name, number in (("frames", frames), ("max_visual_tokens", max_visual_tokens)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                raise ValueError(f"{name} is {number!r}; accepted: a whole number")
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size is {batch_size!r}; accepted: a whole number")
        if dtype is not None and (weights or tower_weights):
            raise ValueError(f"dtype is {dtype} with quantised weights; accepted: one of them")
        methods = [_named("prune", parse_method, text) for text in _specs(prune)]
        spec = None if kv is None else _named("kv", parse_kv, "+".join(_specs(kv)))
        schemes = {
            name: _named(name, partial(parse_scheme, accepted=accepted), text)
            for name, text, accepted in (("weights", weights, SCHEMES), ("tower_weights", tower_weights, TOWER_SCHEMES))
            if text
        }
        self.device = torch.device(device or _own_device())
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        model, processor = load_model(str(pretrained), str(self.device), **schemes)
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        if dtype is not None:
            model = model.to(getattr(torch, dtype))
        self.asker = Asker(model, processor, methods, spec, frames, fps, max_visual_tokens, int(batch_size))
        self.stop_at_blank_line, self.score, self.bad_media = stop_at_blank_line, score, bad_media
        self.unread: list[str] = []  # questions whose media could not be read
        self._rank, self._world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._told: set[str] = set()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "Foveate":
        """What lmms-eval makes the model with, from `--model_args` and its own options.

        Raises:
            ValueError: there is no such argument, or one is given twice.
        """
        try:
            given = simple_parse_args_string(arg_string)
        except ValueError as error:
            accepted = "NAME=VALUE,…; a value that has commas in []"
            raise ValueError(f"--model_args is {arg_string!r}; accepted: {accepted}") from error
        known = list(inspect.signature(cls).parameters)
        if unknown := [name for name in given if name not in known]:
            spec = next((name for name in ("prune", "kv") if name in given), None)
            hint = f". Is it a field of {spec}? Then write {spec}=[…]" if spec else ""
            raise ValueError(f"--model_args has no {unknown[0]!r}; accepted: {', '.join(known)}{hint}")
        if "pretrained" not in given:
            raise ValueError("--model_args has no pretrained; accepted: pretrained=MODEL,…, a folder or a name")
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if (most := options.pop("max_batch_size", None)) is not None:
            raise ValueError(f"--max_batch_size {most}; accepted: --batch_size alone")
        for name, value in options.items():
            default = name == "batch_size" and value in (1, "1")
            if not default and str(given.get(name, value)) != str(value):
                raise ValueError(f"--{name} is {value} and in --model_args {given[name]}; accepted: one of them")
        return cls(**(options | given))

    @property
    def batch_size(self) -> int:
        return self.asker.batch_size

    @property
    def chat_template(self) -> str:
        raise ValueError("--apply_chat_template; accepted: without it, prompts always are in the model's chat template")

    def apply_chat_template(self, messages: Messages) -> str:
        return self.chat_template

    def clean(self) -> None:
        """Frees the model's memory: a judge may be loaded next."""
        del self.asker
        super().clean()

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answers, in the order of the requests; see `lmms_eval.api.model.lmms`."""
        return self._ending(lambda: [_result(one) for one in self._generate(list(map(self._question, requests)))])

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        """Answers of all rounds of each request. What a round is asked, the task makes of the answers before."""
        return self._ending(lambda: self._rounds(list(map(self._question, requests))))

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """How likely given answers are, as the argument `score` says, and whether greedy decoding would say them."""
        return self._ending(lambda: self._likelihoods(requests))

    def _question(self, request: Any) -> "Question":
        raise NotImplementedError

    def _likelihoods(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError("answers are rated by their likelihood with --force_simple alone")

    def _rounds(self, questions: list["Question"]) -> list[list[str]]:
        answers: list[list[str]] = [[] for _ in questions]
        info: list[Any] = [None] * len(questions)
        going = {n: question for n, question in enumerate(questions) if not question.padding}
        for number in range(1, MAX_ROUNDS + 1):
            if not going:
                return answers
            said = self._generate(list(going.values()))
            for (n, question), one in zip(list(going.items()), said, strict=True):
                answers[n] = [*answers[n], one.text if one else ""]
                with _named_errors(question.name):
                    messages, ended, kept, info[n] = question.next_round(number, answers[n], info[n])
                answers[n] = answers[n] if kept is None else list(kept)
                if ended:
                    del going[n]
                else:
                    going[n] = replace(question, messages=partial(list, messages))
        name = next(iter(going.values())).name
        raise ValueError(f"{name}: no end after {MAX_ROUNDS} rounds; accepted: a task that tells its last round")

    def _generate(self, questions: Sequence["Question"]) -> list[Generated | None]:
        """The answers; of one set of generation settings at a time."""
        answers: list[Generated | None] = [None] * len(questions)
        groups: dict[str, list[int]] = {}
        for number, question in enumerate(questions):
            groups.setdefault(repr(sorted(question.settings.items())), []).append(number)
        began = time.perf_counter()
        with tqdm(total=len(questions), disable=self._rank != 0, desc="foveate") as bar:
            for numbers in groups.values():
                stop, options = self._settings(questions[numbers[0]])
                readers = [partial(self._read, questions[n]) for n in numbers]
                some = self.asker.generate(readers, stop, partial(_show, bar, bar.n), **options)
                for n, one in zip(numbers, some, strict=True):
                    answers[n] = one
        self._tell(answers, time.perf_counter() - began)
        return answers

    def _read(self, question: "Question") -> Prompt | None:
        """A question as the LLM reads it; None where it is not to be asked."""
        if question.padding:
            return None
        try:
            with _named_errors(question.name):
                return self.asker.read(question.messages())
        except UnreadableError:
            if self.bad_media == "stop":
                raise
            self.unread.append(question.name)
            return None

    def _settings(self, question: "Question") -> tuple[list[str], dict[str, Any]]:
        """Where answers end, and arguments of `generate`."""
        given = dict(question.settings)
        stop = [text for name in STOPS for text in _texts(given.pop(name, None))]
        if stop == [BLANK_LINE] and not self.stop_at_blank_line:
            stop = []
        for name in given:
            if name not in GENERATION + OF_OTHERS:
                self._warn(f"{question.task}: generation setting {name} is not used; accepted: {', '.join(GENERATION)}")
        options = {name: given[name] for name in GENERATION if given.get(name) is not None}
        options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
        temperature, top_p = options.get("temperature"), options.get("top_p")
        samples = bool(options.get("do_sample", temperature)) and temperature != 0 and top_p != 0
        if not samples:
            for name in ("temperature", "top_p", "top_k"):
                options.pop(name, None)
        return stop, options | {"do_sample": samples}

    def _warn(self, text: str) -> None:
        if text not in self._told and self._rank == 0:
            logger.warning(text)
        self._told.add(text)

    def _tell(self, answers: Sequence[Generated | None], seconds: float) -> None:
        """Speed and savings go to lmms-eval's results; what was not right, to its log."""
        tokens = sum(one.new_tokens for one in answers if one)
        more: dict[str, float] = {"rank": self._rank}
        if self.asker.methods and self.asker.prefills:
            more["visual_tokens"], more["processed_visual_tokens"] = mean_visual_tokens(self.asker.prefills)
        speed = tokens / max(seconds, 1e-9)
        log_metrics(total_gen_tokens=tokens, total_elapsed_time=seconds, avg_speed=speed, additional_metrics=more)
        if self.asker.as_text:
            self._warn("questions hold <image> or <video> without a medium; they were read as words")
        if self.unread:
            names = "; ".join(self.unread)
            logger.warning(f"{len(self.unread)} questions whose media can't be read were answered by nothing: {names}")

    def _ending(self, run: Callable[[], list[Any]]) -> list[Any]:
        """What one of several processes fails with ends all: lmms-eval would let the others wait."""
        try:
            return run()
        except Exception as error:
            if self._world_size == 1:
                raise
            print(f"foveate: rank {self._rank}: {error}", file=sys.stderr, flush=True)
            os._exit(1)


class FoveateChat(Foveate):
    """The protocol of messages."""

    is_simple = False

    def _question(self, request: Any) -> "Question":
        _, doc_to_messages, settings, doc_id, task, split = request.args
        frames = request.metadata.get("num_frames")

        def messages() -> Messages:
            return _messages(doc_to_messages(self.task_dict[task][split][doc_id]), frames)

        def next_round(number: int, answers: list[str], info: Any) -> Round:
            doc = self.task_dict[task][split][doc_id]
            made = doc_to_messages(doc, round_idx=number, previous_output=answers, previous_round_info=info)
            given, ended, kept, info = made
            return [] if ended else _messages(given, frames), ended, kept, info

        return Question(task, split, doc_id, settings, messages, next_round, _is_padding(request))


class FoveateSimple(Foveate):
    """The protocol of a text and a list of media."""

    is_simple = True

    def _question(self, request: Any) -> "Question":
        if len(request.args) == 7:  # of several rounds
            text, settings, doc_to_visual, doc_to_text, doc_id, task, split = request.args
        else:
            (text, settings, doc_to_visual, doc_id, task, split), doc_to_text = request.args, None
        frames = request.metadata.get("num_frames")

        def messages() -> Messages:
            return _plain(text, _visuals(doc_to_visual, self.task_dict[task][split][doc_id]), frames)

        def next_round(number: int, answers: list[str], info: Any) -> Round:
            doc = self.task_dict[task][split][doc_id]
            made = doc_to_text(doc, previous_output=answers, round_idx=number, previous_round_info=info)
            visuals, asked, ended, kept, info = made
            return [] if ended else _plain(asked, _flat(visuals), frames), ended, kept, info

        return Question(task, split, doc_id, settings, messages, next_round, _is_padding(request))

    def _likelihoods(self, requests: list[Any]) -> list[Any]:
        found: list[Any] = [(0.0, False)] * len(requests)
        rated = {n: self._rated(request) for n, request in enumerate(requests) if not _is_padding(request)}
        with tqdm(total=len(rated), disable=self._rank != 0, desc="foveate") as bar:
            said = self.asker.log_likelihoods(list(rated.values()), partial(_show, bar, 0))
        for n, (total, tokens, greedy) in zip(rated, said, strict=True):
            found[n] = {"loss": -total / tokens, "total_loss": -total, "log_likelihood": total}[self.score], greedy
        # A bare pair would be made a text by lmms-eval 0.7.3.
        return [GenerationResult(pair) for pair in found]

    def _rated(self, request: Any) -> tuple[Any, Callable[[], Prompt], str]:
        """A key of the prompt, what reads it, and the answer to rate."""
        text, answer, *where = request.args
        text = text[0] if isinstance(text, list) else text
        if not where:  # the answer alone, for mutual information
            return "", partial(self.asker.read, [{"role": "user", "content": text}]), answer
        doc_to_visual, doc_id, task, split = where
        frames = request.metadata.get("num_frames")
        written = _written_messages(doc_to_visual)

        def read() -> Prompt:
            doc = self.task_dict[task][split][doc_id]
            with _named_errors(f"{task}, doc {doc_id} ({split})"):
                if written is not None:
                    return self.asker.read(_messages(written(doc), frames))
                return self.asker.read(_plain(text, _visuals(doc_to_visual, doc), frames))

        if callable(answer):
            answer = answer(self.task_dict[task][split][doc_id])
        answer = answer[0] if isinstance(answer, list) else answer
        # The chat template ends where an answer begins, so the delimiter before it has no place.
        return (task, split, doc_id, text), read, str(answer).lstrip()


Round = tuple[Messages, bool, Any, Any]  # what is asked, whether all has been, the answers to keep, the task's notes


class UnreadableError(ValueError):
    """A question's media can't be read."""


@dataclass(frozen=True)
class Question:
    """A request of either protocol.

    Attributes:
        task, split, doc_id: which document it is about.
        settings: of generation, as the task gives them.
        messages: makes what is asked.
        next_round: from the round's number, the answers so far and what the task noted, what is asked next.
        padding: it only fills up a process's share; its answer is thrown away.
    """

    task: str
    split: str
    doc_id: int
    settings: dict[str, Any]
    messages: Callable[[], Messages]
    next_round: Callable[[int, list[str], Any], Round]
    padding: bool = False

    @property
    def name(self) -> str:
        return f"{self.task}, doc {self.doc_id} ({self.split})"


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Errors within it begin with a question's name."""
    try:
        yield
    except (MediaError, FileNotFoundError) as error:
        raise UnreadableError(f"{name}: {error}") from error
    except Exception as error:
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error


def _is_padding(request: Any) -> bool:
    return bool(request.metadata.get("__padding_only__"))


def _show(bar: Any, before: int, done: int) -> None:
    bar.update(before + done - bar.n)


def _result(one: Generated | None) -> Any:
    if one is None:
        return GenerationResult("")
    return GenerationResult(one.text, TokenCounts(input_tokens=one.prompt_tokens, output_tokens=one.new_tokens))


def _texts(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else [text for text in value if text]


def _specs(text: str | None) -> list[str]:
    """Settings joined by `+`, in brackets where they hold commas: `[fastv:layer=2,keep=0.5+evs:keep=0.5]`."""
    if text is None:
        return []
    text = str(text).strip().strip("\"'")
    if text.startswith("[") != text.endswith("]"):
        raise ValueError(f"{text!r} has one bracket; accepted: both, [NAME:FIELD=VALUE,…], or none")
    return text.removeprefix("[").removesuffix("]").split("+")


def _named(name: str, parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{name}={text}: {error}") from error


def _own_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _written_messages(doc_to_visual: Any) -> Callable[[Any], Any] | None:
    """The messages that a task writes itself, which lmms-eval's plain protocol does not pass on."""
    written = getattr(getattr(getattr(doc_to_visual, "__self__", None), "config", None), "doc_to_messages", None)
    return written if callable(written) else None


def _visuals(doc_to_visual: Any, doc: Any) -> list[Any]:
    return _flat(doc_to_visual(doc) if callable(doc_to_visual) else doc_to_visual)


def _flat(visuals: Any) -> list[Any]:
    """Media, however nested, without gaps."""
    if visuals is None:
        return []
    if isinstance(visuals, list | tuple):
        return [one for some in visuals for one in _flat(some)]
    return [visuals]


def _plain(text: str, visuals: Sequence[Any], frames: int | None) -> Messages:
    """A text and media as one turn of the user's."""
    parts = [_medium(_kind(one), one, frames) for one in visuals]
    return [{"role": "user", "content": _interleaved(parts, text)}]


def _messages(given: Any, frames: int | None) -> Messages:
    """lmms-eval's messages, whose media stand under `url`, as `Asker.read` takes them."""
    messages: Messages = []
    for message in given:
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [part if part["type"] == "text" else _medium(part["type"], part, frames) for part in content]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        if len(texts) == 1 and parts[-1]["type"] == "text":  # media first: placeholders may tell where they belong
            parts = _interleaved(parts[:-1], texts[0])
        messages.append({"role": message["role"], "content": parts})
    return messages


def _interleaved(media: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Images where the text has a placeholder for each; else all media before the text."""
    pieces = text.split(IMAGE_TOKEN)
    if media and len(pieces) == len(media) + 1 and all(part["type"] == "image" for part in media):
        texts = [{"type": "text", "text": piece} for piece in pieces]
        pairs = [part for pair in zip(texts, media, strict=False) for part in pair]
        return [part for part in [*pairs, texts[-1]] if part.get("text") != ""]
    return [*media, {"type": "text", "text": text}]


def _kind(visual: Any) -> str:
    """What a medium without a name is."""
    if isinstance(visual, dict) and "type" in visual:
        return visual["type"]
    if isinstance(visual, str | Path):
        return "image" if str(visual).lower().endswith(IMAGE_SUFFIXES) else "video"
    if isinstance(visual, Image.Image) or (isinstance(visual, np.ndarray) and visual.ndim < 4):
        return "image"
    if isinstance(visual, dict) and "bytes" in visual:
        return "image"
    return "video" if isinstance(visual, np.ndarray) else type(visual).__name__


def _medium(kind: str, given: Any, frames: int | None) -> dict[str, Any]:
    """A medium as `Asker.read` takes it.

    Args:
        given: the medium, or a dict with it and with seconds where a clip begins and ends.
        frames: of a video file.
    """
    start, end = None, None
    while isinstance(given, dict):
        start = next((given[name] for name in ("start_time", "video_start") if given.get(name) is not None), start)
        end = next((given[name] for name in ("end_time", "video_end") if given.get(name) is not None), end)
        inner = next((given[name] for name in ("url", "bytes", "path", kind) if given.get(name) is not None), None)
        if inner is None:
            raise ValueError(f"a {kind} of {', '.join(given)}; accepted: with url, path or bytes")
        given = inner
    if kind == "image":
        return {"type": "image", "image": given}
    if kind != "video":
        raise ValueError(f"a medium of type {kind}; accepted: images and videos")
    is_file = isinstance(given, str | Path | bytes)
    return {"type": "video", "video": VideoSource(given, frames if is_file else None, None, start, end)}
