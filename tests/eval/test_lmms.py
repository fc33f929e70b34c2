"""lmms-eval, unmodified, runs the local tasks; its answers are those of `foveate eval`."""

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed; `make test` does it", allow_module_level=True)

from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.utils import simple_parse_args_string
from loguru import logger

from foveate.data.glyphs import COLOURS
from foveate.eval.glyphs import evaluate, task_items
from foveate.eval.lmms import Foveate, FoveateChat, FoveateSimple
from foveate.eval.lmms_run import entries, model_arguments, run_lmms
from foveate.eval.lmms_tasks import FILES, GROUPS, LOCAL_TASKS, write_tasks
from foveate.eval.prompts import Asker, before
from foveate.eval.statistics import wilson_interval
from foveate.train.build import build_model
from foveate.train.recipe import load_recipe
from foveate.vlm.chat import Chat
from foveate.vlm.media import load_image, load_video
from foveate.vlm.model import FoveateForConditionalGeneration
from foveate.vlm.processor import FoveateProcessor
from foveate.vlm.pruning import EVS, FastV, Random

pytestmark = pytest.mark.timeout(900)  # lmms-eval starts slowly where the machine is busy
N = 7  # questions of a task: odd, so that two processes have different shares
ASKED = ("foveate_what_at", "foveate_clip_colour_8", "foveate_two_scenes", "foveate_shots_1")
BIN = Path(sys.executable).parent
Model = tuple[FoveateForConditionalGeneration, FoveateProcessor]


@pytest.fixture(scope="module")
def model() -> Model:
    """A quickstart model, smaller, with weights large enough that random answers differ."""
    torch.manual_seed(1)
    recipe = load_recipe("quickstart", [
        "model.vision.hidden_size=48", "model.vision.intermediate_size=64", "model.vision.num_hidden_layers=1",
        "model.text.hidden_size=64", "model.text.intermediate_size=96", "model.text.initializer_range=0.3",
    ])  # fmt: skip
    made, processor = build_model(recipe.model)
    return made.eval(), processor


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("lmms") / "model"
    for part in model:
        part.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lmms") / "tasks"
    assert write_tasks(path, N, [*ASKED, "foveate_colour_choice"]) == (*ASKED, "foveate_colour_choice")
    return path


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is left in the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def said(written: Path) -> dict[str, dict[int, str]]:
    """The answers in lmms-eval's own output, by task and document."""
    answers: dict[str, dict[int, str]] = {}
    for path in written.glob("**/*_samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        answers[path.stem.partition("_samples_")[2]] = {line["doc_id"]: line["filtered_resps"] for line in lines}
    return answers


@pytest.fixture(scope="module")
def two_processes(folder: str, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """lmms-eval's own command, as a user with two devices starts it; prompts asked eight at a time."""
    out = tmp_path_factory.mktemp("console")
    command = [
        BIN / "torchrun", "--nproc-per-node", "2", "--no-python", "--", BIN / "lmms-eval", "--model", "foveate",
        "--model_args", f"pretrained={folder}", "--include_path", tasks, "--tasks", ",".join(ASKED),
        "--batch_size", "8", "--output_path", out, "--log_samples",
    ]  # fmt: skip
    ran = subprocess.run(list(map(str, command)), cwd=out, capture_output=True, text=True, timeout=800)
    (results,) = out.glob("**/*_results.json") or [None]
    assert ran.returncode == 0 and results is not None, ran.stdout + ran.stderr
    return {"log": ran.stdout, "answers": said(out), "results": json.loads(results.read_text())["results"]}


@pytest.fixture(scope="module")
def one_process(folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `foveate eval --task lmms:…` runs, one prompt at a time."""
    out = tmp_path_factory.mktemp("one")
    console = Console(file=(out / "printed").open("w"), width=200)
    results = run_lmms(folder, ASKED, out, N, console, batch_size=1)
    console.file.close()
    metrics = json.loads((out / "metrics.json").read_text())
    return {"answers": said(out), "results": results, "metrics": metrics, "printed": (out / "printed").read_text()}


# Whole runs


def test_two_processes_and_batches_say_what_one_process_says_one_by_one(
    two_processes: dict[str, Any], one_process: dict[str, Any]
) -> None:
    assert set(two_processes["answers"]) == set(one_process["answers"]) == set(ASKED)
    assert two_processes["answers"] == one_process["answers"]
    for task, answers in one_process["answers"].items():
        assert sorted(answers) == list(range(N))
        assert len(set(answers.values())) > 2, f"{task}: answers that hardly differ would show little"
    assert all(f"|{task}" in two_processes["log"].replace(" ", "") for task in ASKED)  # its table


@pytest.mark.parametrize("task", ["what_at", "clip_colour_8"])
def test_answers_and_accuracy_are_those_of_foveate_eval(task: str, model: Model, one_process: dict[str, Any]) -> None:
    ours = evaluate(*model, task, n=N)
    answers = one_process["answers"][f"foveate_{task}"]
    assert [answers[number] for number in range(N)] == [one["answer"] for one in ours.answers]
    (entry,) = [one for one in one_process["results"] if one["name"] == f"foveate_{task} accuracy"]
    assert (entry["value"], entry["n"], entry["low"], entry["high"]) == (ours.accuracy, N, ours.low, ours.high)


def test_interleaved_pictures_are_asked_as_a_chat_about_them(model: Model, one_process: dict[str, Any]) -> None:
    loaded, processor = model
    items = list(task_items("what_at", 2 * N))
    for number, (first, second) in enumerate(zip(items[::2], items[1::2], strict=True)):
        turns = "<|user|><image>{}<|assistant|>{}<|end|><|user|><image>{}<|assistant|>"
        text = turns.format(first.question.text, first.question.answer, second.question.text)
        inputs = processor(text=[text], images=[first.media, second.media], padding=True, add_special_tokens=False)
        made = loaded.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answer = processor.decode(made, skip_special_tokens=True).strip()
        assert one_process["answers"]["foveate_two_scenes"][number] == answer


def test_metrics_tell_how_they_were_made(one_process: dict[str, Any], folder: str) -> None:
    metrics = one_process["metrics"]
    asked = " ".join(f"--task lmms:{task}" for task in ASKED)
    assert metrics["command"] == f"foveate eval {asked} --n {N} --split test --batch 1"
    assert metrics["versions"]["lmms-eval"] == "0.7.3" and metrics["processes"] == 1
    assert f"--model_args pretrained={folder} --tasks {','.join(ASKED)} --batch_size 1" in metrics["lmms_eval"]
    assert metrics["results"] == one_process["results"]
    for one in metrics["results"]:
        assert (one["low"], one["high"]) == wilson_interval(round(one["value"] * one["n"]), one["n"])
        assert re.search(rf"{one['name']}  {one['value']:.3f}  \[.*\]  n={N}", one_process["printed"])


def test_rated_answers_are_scored_by_their_likelihood(model: Model, folder: str, tmp_path: Path) -> None:
    """Against the logits of each whole text, read without a cache, one by one."""
    (result,) = run_lmms(folder, ["foveate_colour_choice"], tmp_path / "out", N, Console(quiet=True), batch_size=3)
    (path,) = (tmp_path / "out").glob("**/*_samples_*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    right = []
    for line, item in zip(lines, task_items("colour_at", N), strict=True):
        choices = [f"{item.question.subject} {colour}" for colour in COLOURS]
        losses = [-total / tokens for total, tokens, _ in (brute_force(model, item, text) for text in choices)]
        assert [float(loss) for loss, _ in line["filtered_resps"]] == pytest.approx(losses, abs=2e-5)
        right.append(choices[int(np.argmin(losses))] == item.question.answer)
    assert result["value"] == pytest.approx(np.mean(right)) and result["n"] == N


def brute_force(model: Model, item: Any, answer: str) -> tuple[float, int, bool]:
    """Log-likelihood of an answer to a question about an image, its tokens, whether each is the likeliest."""
    loaded, processor = model
    prompt = f"<|user|><image>{item.question.text}<|assistant|>"
    asked, whole = (
        processor(text=text, images=[item.media], add_special_tokens=False, return_tensors="pt")
        for text in (prompt, prompt + answer)
    )
    with torch.no_grad():
        logits = loaded(**whole, use_cache=False).logits[0].double()
    start, ids = asked["input_ids"].shape[1], whole["input_ids"][0]
    total, greedy = 0.0, True
    for place in range(start, len(ids)):
        scores = logits[place - 1]
        total += float(scores[ids[place]] - scores.exp().sum().log())
        greedy &= int(scores.argmax()) == int(ids[place])
    return total, len(ids) - start, greedy


# Likelihoods


def rated(task: str, answers: Sequence[tuple[int, Any]], doc_to_visual: Callable[[Any], Any]) -> list[Instance]:
    """Requests as lmms-eval makes them: of documents by number, each with an answer."""
    return [
        Instance(
            "loglikelihood", (f"question {number} ?", answer, doc_to_visual, number, task, "test"), place,
            metadata={"task": task, "doc_id": number, "repeats": 1},
        )
        for place, (number, answer) in enumerate(answers)
    ]  # fmt: skip


ANSWERS = ["red", "red circle", "a b3 7", "nothing", "red circle at b3"]


@pytest.mark.parametrize(
    "given", [{}, {"kv": "int4"}, {"prune": "[fastv:layer=1,keep=0.5]"}, {"prune": "random:layer=1,keep=0.5"}]
)
def test_likelihoods_of_a_batch_are_those_of_each_alone(given: dict[str, Any], model: Model, folder: str) -> None:
    items = list(task_items("what_at", 3))
    docs = [{"image": item.media} for item in items] + [{"image": None}]
    requests = rated("t", [(n, f" {answer}") for answer in ANSWERS for n in (2, 0, 3, 1)], lambda doc: [doc["image"]])
    found = []
    for batch_size in (1, 8):
        asked = FoveateSimple(pretrained=folder, batch_size=batch_size, device="cpu", score="log_likelihood", **given)
        asked.task_dict = {"t": {"test": docs}}
        found.append([unwrap_generation_output(one)[0] for one in asked.loglikelihood(requests)])
    one, eight = found
    assert [greedy for _, greedy in one] == [greedy for _, greedy in eight]
    assert [total for total, _ in one] == pytest.approx([total for total, _ in eight], abs=5e-5)
    if given:  # what is dropped or packed does not depend on the answer: the first token is as likely in any
        by_request = {(r.args[3], r.args[1]): total for r, (total, _) in zip(requests, one, strict=True)}
        longer = [by_request[n, " red circle at b3"] for n in range(4)]
        assert all(by_request[n, " red"] > by_request[n, " red circle"] > longer[n] for n in range(4))


def test_scores_are_mean_loss_total_loss_or_log_likelihood(folder: str, model: Model) -> None:
    item = next(task_items("what_at", 1))
    total, tokens, greedy = brute_force(model, item, "red circle at b3")
    prompt = [
        {
            "role": "user",
            "content": [{"type": "image", "url": item.media}, {"type": "text", "text": item.question.text}],
        }
    ]
    task = SimpleNamespace(config=SimpleNamespace(doc_to_messages=lambda doc: prompt))
    visual = type("Task", (), {"config": task.config, "doc_to_visual": lambda self, doc: []})().doc_to_visual
    for score, expected in (("loss", -total / tokens), ("total_loss", -total), ("log_likelihood", total)):
        asked = FoveateSimple(pretrained=folder, device="cpu", score=score)
        asked.task_dict = {"t": {"test": [{}]}}
        [answer] = asked.loglikelihood(rated("t", [(0, lambda doc: ["red circle at b3"])], visual))
        pair, _ = unwrap_generation_output(answer)
        assert pair[0] == pytest.approx(expected, abs=2e-5) and pair[1] == greedy


# Batches


def conversations() -> list[list[dict[str, Any]]]:
    """Of many lengths and kinds: text alone, one picture, two, a clip, an example before the question."""
    items = list(task_items("what_at", 4))
    (clip,) = task_items("clip_colour_8", 1)
    images = [{"type": "image", "image": item.media} for item in items]
    texts = [{"type": "text", "text": item.question.text} for item in items]
    video = {"type": "video", "video": clip.media}
    contents = [
        [texts[0]], [images[0], texts[0]], [images[1], texts[1]], [images[2], images[3], texts[3]],
        [texts[2], images[2]], [video, {"type": "text", "text": clip.question.text}], [images[3], texts[3]],
    ]  # fmt: skip
    asked = [[{"role": "user", "content": content}] for content in contents]
    example = [*asked[1], {"role": "assistant", "content": "a1 red"}, {"role": "user", "content": contents[2]}]
    return [*asked, example]


def ask(asker: Asker, first: int = 0, **options: Any) -> list[str]:
    options = {"max_new_tokens": 8, "do_sample": False} | options
    answers = asker.generate([lambda given=given: asker.read(given) for given in conversations()[first:]], **options)
    return [answer.text for answer in answers if answer]


def reductions() -> list[dict[str, Any]]:
    fastv = FastV(layer=1, keep=0.5)
    return [
        {},
        {"kv": "int4:group=8,residual=8"},
        {"methods": [fastv]},
        {"methods": [EVS(keep=0.5), fastv], "kv": "snapkv:keep=0.5,window=4"},
        {"methods": [Random(layer=1, keep=0.3)]},
    ]


@pytest.mark.parametrize("given", reductions(), ids=["whole", "int4", "fastv", "evs+fastv+snapkv", "random"])
def test_answers_of_a_batch_are_those_of_each_alone(given: dict[str, Any], model: Model) -> None:
    one, eight = (ask(Asker(*model, **given, batch_size=size)) for size in (1, 8))
    assert one == eight
    assert one[5:] == ask(Asker(*model, **given, batch_size=2), first=5)  # as another process has them
    assert len(set(one)) > 4
    if given:
        assert one != ask(Asker(*model))


def test_answers_are_those_of_a_chat(model: Model) -> None:
    """The same prompts, media and answers as `foveate ask` has, which shares no batching with it."""
    told = ask(Asker(*model, num_frames=3, batch_size=8))
    for conversation, answer in zip(conversations()[:-1], told, strict=False):
        parts = conversation[0]["content"]
        if parts[-1]["type"] == "text":  # the media before the question, as in a chat
            media = [part.get("image", part.get("video")) for part in parts[:-1]]
            loaded = [chat_medium(one) for one in media]
            assert Chat(*model, loaded).ask(parts[-1]["text"], max_new_tokens=8).text == answer


def chat_medium(given: Any) -> Any:
    return load_image(given) if isinstance(given, np.ndarray) else load_video(given, num_frames=3)


def test_an_answer_ends_before_the_first_stop(model: Model) -> None:
    whole = ask(Asker(*model))
    words = whole[1].split()
    assert len(words) > 3
    stop = [words[2], words[1]]  # whichever comes first
    assert ask(Asker(*model, batch_size=8), stop=stop) == [before(text, stop).strip() for text in whole]
    assert before("ab cd ef", ["ef", "", "cd"]) == "ab " and before("ab", ["x"]) == "ab"
    assert before(whole[1], stop) != whole[1]


def test_a_placeholder_without_a_medium_is_a_word(model: Model) -> None:
    asker = Asker(*model)
    prompt = asker.read([{"role": "user", "content": "what is <image> and <video> ?"}])
    assert not set(prompt.ids) & {model[1].image_token_id, model[1].video_token_id}
    assert prompt.features == {} and asker.as_text == 2


# What lmms-eval gives


def request(kind: str, arguments: tuple[Any, ...], doc_id: int = 0, **metadata: Any) -> Instance:
    return Instance(kind, arguments, 0, metadata={"task": "t", "doc_id": doc_id, "repeats": 1} | metadata)


def loaded(chat: bool, folder: str, docs: Sequence[Any], **given: Any) -> Foveate:
    made = (FoveateChat if chat else FoveateSimple)(pretrained=folder, device="cpu", **given)
    made.task_dict = {"t": {"test": list(docs)}}
    return made


SETTINGS = {"max_new_tokens": 4, "until": [], "do_sample": False}


def test_rounds_are_asked_as_the_task_makes_them_of_the_answers(folder: str, model: Model) -> None:
    """A first question about a picture, then questions about another that hold the answers so far; doc i has i + 1."""
    pictures = [item.media for item in task_items("what_at", 2)]
    seen: list[Any] = []

    def loud(answers: Sequence[str]) -> tuple[str, ...]:
        """A task may change what has been said."""
        return tuple(answer.upper() for answer in answers)

    def text_of(number: int, answers: Sequence[str]) -> str:
        return " ; ".join(["what is at b3 ?", *answers][: number + 1])

    def messages(doc: dict, round_idx: Any = None, previous_output: Any = None, previous_round_info: Any = None) -> Any:
        number = round_idx or 0
        content = [
            {"type": "image", "url": pictures[min(number, 1)]},
            {"type": "text", "text": text_of(number, previous_output or [])},
        ]
        made = [{"role": "user", "content": content}]
        if round_idx is None:
            return made
        seen.append((doc["n"], number, list(previous_output), previous_round_info))
        return (None if number > doc["n"] else made), number > doc["n"], loud(previous_output), f"after {number}"

    def plain(doc: dict, previous_output: Any, round_idx: int, previous_round_info: Any) -> Any:
        made = text_of(round_idx, previous_output)
        ended = round_idx > doc["n"]
        return (None if ended else [pictures[1]]), (None if ended else made), ended, loud(previous_output), None

    docs = [{"n": n} for n in range(3)]
    chat = loaded(True, folder, docs, batch_size=8)
    chat_requests = [
        request("generate_until_multi_round", ("", messages, SETTINGS, n, "t", "test"), n) for n in range(3)
    ]
    said_in_chat = [unwrap_generation_output(one)[0] for one in chat.generate_until_multi_round(chat_requests)]
    simple = loaded(False, folder, docs)
    simple_requests = [
        request(
            "generate_until_multi_round",
            (text_of(0, []), SETTINGS, lambda doc: [pictures[0]], plain, n, "t", "test"),
            n,
        )
        for n in range(3)
    ]
    said_plainly = [unwrap_generation_output(one)[0] for one in simple.generate_until_multi_round(simple_requests)]
    assert [len(answers) for answers in said_in_chat] == [1, 2, 3]
    assert said_plainly == said_in_chat
    assert [(number, info) for n, number, _, info in seen if n == 2] == [(1, None), (2, "after 1"), (3, "after 2")]
    for number, answer in enumerate(said_in_chat[2]):
        chat_of_one = Chat(*model, [load_image(pictures[min(number, 1)])])
        assert chat_of_one.ask(text_of(number, said_in_chat[2]), max_new_tokens=4).text.upper() == answer


def test_media_in_all_their_forms_and_text_alone(folder: str, model: Model, tmp_path: Path) -> None:
    image, clip = next(task_items("what_at", 1)).media, next(task_items("clip_colour_8", 1)).media
    (tmp_path / "clip.mp4").write_bytes(clip)
    picture = load_image(image)
    picture.save(tmp_path / "picture.png")
    text = "what is at b3 ?"
    visuals = [
        [picture], [str(tmp_path / "picture.png")], [image], [{"type": "image", "url": picture}], [[picture]],
        [str(tmp_path / "clip.mp4")], [{"type": "video", "path": str(tmp_path / "clip.mp4"), "video_end": 0.5}],
        [{"type": "video", "url": {"url": str(tmp_path / "clip.mp4"), "video_end": 0.5}}], [], None,
    ]  # fmt: skip
    asked = loaded(False, folder, visuals, batch_size=8)
    answers = asked.generate_until(
        [request("generate_until", (text, SETTINGS, lambda doc: doc, n, "t", "test"), n) for n in range(len(visuals))]
    )
    texts = [answer.text for answer in answers]
    assert len(set(texts[:5])) == 1 and texts[6] == texts[7] and texts[8] == texts[9]
    assert texts[0] == Chat(*model, [picture]).ask(text, max_new_tokens=4).text
    assert texts[5] == Chat(*model, [load_video(clip, num_frames=model[1].num_frames)]).ask(text, max_new_tokens=4).text
    assert texts[6] == Chat(*model, [load_video(clip, num_frames=8, end_s=0.5)]).ask(text, max_new_tokens=4).text
    assert texts[8] == Chat(*model).ask(text, max_new_tokens=4).text
    assert answers[8].token_counts.output_tokens <= 4 < answers[8].token_counts.input_tokens


def test_placeholders_tell_where_pictures_belong(folder: str) -> None:
    first, second = ([{"url": item.media}] for item in task_items("what_at", 2))
    asked = loaded(False, folder, [first + second])
    text = "<image>what is at b3 ?<image>"
    (question,) = [
        asked._question(
            request("generate_until", (text, SETTINGS, lambda doc: [one["url"] for one in doc], 0, "t", "test"))
        )
    ]
    kinds = [part["type"] for part in question.messages()[0]["content"]]
    assert kinds == ["image", "text", "image"]
    fewer = asked._question(request("generate_until", (text, SETTINGS, lambda doc: [doc[0]["url"]], 0, "t", "test")))
    assert [part["type"] for part in fewer.messages()[0]["content"]] == ["image", "text"]


@pytest.mark.parametrize("chat", [True, False])
def test_a_medium_that_cannot_be_read_is_named_or_counted(chat: bool, folder: str, tmp_path: Path) -> None:
    (tmp_path / "damaged.mp4").write_bytes(next(task_items("clip_colour_8", 1)).media[:2000])
    docs = [[], [str(tmp_path / "damaged.mp4")], [str(tmp_path / "absent.mp4")], []]

    def messages(doc: list[str]) -> Any:
        media = [{"type": "video", "url": path} for path in doc]
        return [{"role": "user", "content": [*media, {"type": "text", "text": "what is at b3 ?"}]}]

    ways = (
        (lambda n: ("", messages, SETTINGS, n, "t", "test"))
        if chat
        else (lambda n: ("what is at b3 ?", SETTINGS, lambda doc: doc, n, "t", "test"))
    )
    requests = [request("generate_until", ways(n), n) for n in range(4)]
    with pytest.raises(ValueError, match=r"t, doc 1 \(test\): .*damaged.mp4"):
        loaded(chat, folder, docs).generate_until(requests)
    with pytest.raises(ValueError, match=r"t, doc 2 \(test\): .*absent.mp4"):
        loaded(chat, folder, docs).generate_until(requests[2:])
    asked = loaded(chat, folder, docs, bad_media="empty", batch_size=4)
    log: list[str] = []
    handler = logger.add(log.append, level="WARNING")
    texts = [answer.text for answer in asked.generate_until(requests)]
    logger.remove(handler)
    assert texts[0] == texts[3] != "" and texts[1] == texts[2] == ""
    assert any("2 questions" in line and "t, doc 1 (test); t, doc 2 (test)" in line for line in log)


@pytest.mark.parametrize("chat", [True, False])
def test_frames_are_those_of_the_argument_or_else_of_the_task(chat: bool, folder: str, model: Model) -> None:
    clip = next(task_items("clip_colour_8", 1)).media
    text = {"type": "text", "text": "what is at b3 ?"}

    def asked(metadata: dict[str, int], **given: Any) -> str:
        first = (
            (lambda doc: [{"role": "user", "content": [{"type": "video", "url": clip}, text]}]) if chat else SETTINGS
        )
        arguments = (
            ("", first, SETTINGS) if chat else (text["text"], first, lambda doc: [{"type": "video", "url": clip}])
        )
        one = request("generate_until", (*arguments, 0, "t", "test"), **metadata)
        return loaded(chat, folder, [{}], **given).generate_until([one])[0].text

    said = {
        n: Chat(*model, [load_video(clip, num_frames=n)]).ask(text["text"], max_new_tokens=4).text for n in (2, 5, 8)
    }
    assert len(set(said.values())) == 3
    assert asked({}) == said[8] and asked({"num_frames": 5}) == said[5]
    assert asked({"num_frames": 5}, frames=2) == said[2] and asked({"num_frames": 5}, fps=2.0) == said[2]


def test_what_one_of_several_processes_fails_with_ends_it(
    folder: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = loaded(True, folder, [{}])
    asked._world_size, asked._rank = 2, 1

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    failing = request("generate_until", ("", lambda doc: doc["absent"], SETTINGS, 0, "t", "test"))
    with pytest.raises(SystemExit, match="1"):
        asked.generate_until([failing])
    assert "foveate: rank 1: t, doc 0 (test): KeyError: 'absent'" in capfd.readouterr().err


def test_requests_that_only_fill_up_are_not_asked(folder: str) -> None:
    asked = loaded(True, folder, [{}])

    def never(doc: Any) -> Any:
        raise AssertionError

    filling = request("generate_until", ("", never, SETTINGS, 0, "t", "test"), __padding_only__=True)
    assert [one.text for one in asked.generate_until([filling])] == [""]


@pytest.mark.parametrize(
    ("given", "stop", "options"),
    [
        ({}, [], {"max_new_tokens": 1024}),
        ({"until": ["\n\n"], "max_new_tokens": 5}, [], {"max_new_tokens": 5}),
        ({"until": ["\n\n", "Q:"], "max_new_tokens": 5}, ["\n\n", "Q:"], {"max_new_tokens": 5}),
        ({"until": "Q:", "stop_sequences": ["A:", ""]}, ["Q:", "A:"], {"max_new_tokens": 1024}),
        ({"temperature": 0, "top_p": None, "num_beams": 3}, [], {"max_new_tokens": 1024, "num_beams": 3}),
        ({"temperature": 0.5}, [], {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.5}),
        ({"temperature": 0.5, "do_sample": False}, [], {"max_new_tokens": 1024}),
        ({"max_new_tokens": 5, "do_sample": True, "top_p": 0.9, "top_k": 5}, [],
         {"max_new_tokens": 5, "do_sample": True, "top_p": 0.9, "top_k": 5}),
        ({"do_sample": True, "top_p": 0}, [], {"max_new_tokens": 1024}),
        ({"temperature": 0.0, "do_sample": True}, [], {"max_new_tokens": 1024}),
    ],
)  # fmt: skip
def test_generation_settings(given: dict[str, Any], stop: list[str], options: dict[str, Any], folder: str) -> None:
    asked = Foveate.__new__(FoveateChat)
    asked.stop_at_blank_line = False
    assert asked._settings(SimpleNamespace(settings=given, task="t")) == (stop, {"do_sample": False} | options)
    asked.stop_at_blank_line = True
    assert asked._settings(SimpleNamespace(settings=given, task="t"))[0] == (
        ["\n\n"] if given.get("until") == ["\n\n"] else stop
    )


def test_settings_are_used_each_for_its_own_questions_and_others_are_told(folder: str, model: Model) -> None:
    asked = loaded(True, folder, [{}])
    messages = [{"role": "user", "content": "what is at b3 ?"}]
    log: list[str] = []
    handler = logger.add(log.append, level="WARNING")
    kinds = [
        {"max_new_tokens": n, "until": []} | more for n, more in ((2, {}), (6, {"num_beams": 4}), (2, {"voice": "low"}))
    ]
    answers = asked.generate_until(
        [request("generate_until", ("", lambda doc: messages, one, 0, "t", "test")) for one in kinds]
    )
    logger.remove(handler)
    ids = model[1].tokenizer("<|user|>what is at b3 ?<|assistant|>", return_tensors="pt")["input_ids"]
    for answer, settings in ((answers[0], {"max_new_tokens": 2}), (answers[1], {"max_new_tokens": 6, "num_beams": 4})):
        made = model[0].generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
        assert answer.text == model[1].decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert answers[2].text == answers[0].text
    assert sum("generation setting voice is not used" in line for line in log) == 1


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", r"has no pretrained; accepted: pretrained=MODEL"),
        ("pretrained", r"--model_args is 'pretrained'; accepted: NAME=VALUE"),
        ("pretrained=FOLDER,prune=fastv:layer=1,keep=0.5", r"has no 'keep'; accepted: .* Then write prune=\[…\]"),
        ("pretrained=FOLDER,colour=red", r"has no 'colour'; accepted: pretrained, prune, kv, frames"),
        ("pretrained=FOLDER,prune=[fastv:layer=1,keep=2]", r"prune=fastv:layer=1,keep=2: fastv: keep is 2"),
        ("pretrained=FOLDER,prune=blur", r"prune=blur: .*accepted: .*fastv"),
        ("pretrained=FOLDER,kv=int5", r"kv=int5: kv is 'int5'; accepted"),
        ("pretrained=FOLDER,kv=[int4", r"'\[int4' has one bracket; accepted: both"),
        ("pretrained=FOLDER,weights=w1", r"weights=w1: "),
        ("pretrained=FOLDER,dtype=int8", r"dtype is 'int8'; accepted: None, bfloat16, float16, float32"),
        ("pretrained=FOLDER,dtype=bfloat16,weights=w8a8", r"dtype is bfloat16 with quantised weights; accepted: one"),
        ("pretrained=FOLDER,frames=0", r"frames is 0; accepted: more than 0"),
        ("pretrained=FOLDER,frames=2.5", r"frames is 2.5; accepted: a whole number"),
        ("pretrained=FOLDER,frames=8,fps=2", r"frames is 8 and fps is 2; accepted: one of them"),
        ("pretrained=FOLDER,score=best", r"score is 'best'; accepted: loss, total_loss, log_likelihood"),
        ("pretrained=FOLDER,bad_media=skip", r"bad_media is 'skip'; accepted: stop, empty"),
        ("pretrained=FOLDER,batch_size=auto", r"batch_size is 'auto'; accepted: a whole number"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: str, message: str, folder: str) -> None:
    with pytest.raises(ValueError, match=message):
        FoveateChat.create_from_arg_string(arguments.replace("FOLDER", folder), {"batch_size": 1, "device": None})


def test_options_of_the_command_and_arguments_agree(folder: str) -> None:
    def made(arguments: str, **options: Any) -> Foveate:
        return FoveateSimple.create_from_arg_string(f"pretrained={folder},device=cpu{arguments}", options)

    assert made("", batch_size="8").batch_size == 8
    assert made(",batch_size=4", batch_size=1).batch_size == 4
    with pytest.raises(ValueError, match="--batch_size is 8 and in --model_args 4; accepted: one of them"):
        made(",batch_size=4", batch_size="8")
    with pytest.raises(ValueError, match="--max_batch_size 64; accepted: --batch_size alone"):
        made("", max_batch_size=64)
    with pytest.raises(ValueError, match="--apply_chat_template; accepted: without it"):
        _ = made("").chat_template
    both = made(
        ",prune=[evs:keep=0.5+fastv:layer=1,keep=0.25],kv=[snapkv:keep=0.5,window=4+int4],dtype=bfloat16,frames=6"
    )
    assert [type(method).__name__ for method in both.asker.methods] == ["EVS", "FastV"]
    assert both.asker.reduction.kv.policy.window == 4 and both.asker.num_frames == 6
    assert both.asker.model.dtype == torch.bfloat16


def test_arguments_pass_through_lmms_evals_own_parser() -> None:
    prune, kv = ["evs:keep=0.5", "fastv:layer=2,keep=0.5"], "streaming:sink=4,window=64"
    parsed = simple_parse_args_string(model_arguments("models/a", prune, kv, frames=8, fps=None))
    assert parsed == {"pretrained": "models/a", "prune": f"[{prune[0]}+{prune[1]}]", "kv": f"[{kv}]", "frames": 8}
    with pytest.raises(ValueError, match="pretrained is 'a,b'; accepted by lmms-eval: without commas"):
        model_arguments("a,b")


def test_both_protocols_are_found_by_the_entry_point() -> None:
    assert MODEL_REGISTRY_V2.get_model_class("foveate") is FoveateChat
    assert MODEL_REGISTRY_V2.get_model_class("foveate", force_simple=True) is FoveateSimple


# Tasks and results


def test_every_local_task_has_a_file_that_names_its_data() -> None:
    files = {path.stem for path in FILES.glob("*.yaml")}
    assert files == set(LOCAL_TASKS)
    tags: dict[str, list[str]] = {}
    for name in LOCAL_TASKS:
        config = yaml.safe_load((FILES / f"{name}.yaml").read_text().replace("!function", ""))
        assert config["task"] == name and config["dataset_kwargs"] == {"data_files": {"test": f"data/{name}.parquet"}}
        if "tag" in config:
            tags.setdefault(config["tag"], []).append(name)
        frames = re.search(r"_(8|64|128)$", name)
        assert config["metadata"].get("num_frames") == (int(frames[1]) if frames else None)
    assert {name: sorted(of) for name, of in tags.items()} == {name: sorted(of) for name, of in GROUPS.items()}


def test_wrong_tasks_are_named(tmp_path: Path) -> None:
    for given, message in (
        ({"names": ["poems"]}, "task is 'poems'; accepted: foveate_glyphs, "),
        ({"split": "all"}, "split is 'all'; accepted: train, dev, test"),
        ({"n": 0}, "n is 0; accepted: 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            write_tasks(tmp_path / "new", **given)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="holds something; accepted: a new or empty folder"):
        write_tasks(tmp_path, 1)
    with pytest.raises(ValueError, match=r"foveate_colour_choice rate answers .*; accepted: one kind in a run"):
        run_lmms("nowhere", ["foveate_what_at", "foveate_colour_choice"], None, 1, Console(quiet=True))


def test_only_means_of_zeros_and_ones_have_wilsons_interval() -> None:
    results = {
        "a": {"alias": "a", "acc,none": 0.75, "acc_stderr,none": 0.2, "bleu,none": 0.5, "acc,b": 0.5, "x,none": "-"},
        "b": {"acc,none": 3.5},
    }  # fmt: skip
    samples = {"a": [{"acc": value, "bleu": 0.5} for value in (1, True, 0.0, 1.0)]}
    low, high = wilson_interval(3, 4)
    assert entries(results, samples) == [
        {"name": "a acc", "value": 0.75, "unit": "fraction", "n": 4, "low": low, "high": high},
        {"name": "a bleu", "value": 0.5, "unit": "", "n": 4},
        {"name": "a acc (b)", "value": 0.5, "unit": "", "n": 4},
        {"name": "b acc", "value": 3.5, "unit": "", "n": 1},
    ]


def test_public_tasks_of_the_documentation_exist() -> None:
    import lmms_eval

    known = set()
    for path in Path(lmms_eval.__file__).parent.glob("tasks/**/*.yaml"):
        known |= set(re.findall(r"^(?:task|group|tag): *[\"']?([\w+-]+)", path.read_text(), re.MULTILINE))
    page = (Path(__file__).parents[2] / "docs" / "lmms.md").read_text()
    table = page.partition("| benchmark |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([a-z][\w]+)`", table))
    named |= set(re.findall(r"--task lmms:(\w+)", page))
    assert len(named) > 40
    assert sorted(named - known - set(GROUPS) - set(LOCAL_TASKS)) == []


def test_the_tables_of_the_documentation_name_all_local_tasks_and_arguments() -> None:
    page = (Path(__file__).parents[2] / "docs" / "lmms.md").read_text()
    assert [name for name in (*LOCAL_TASKS, *GROUPS) if f"`{name}`" not in page] == []
    arguments = page.partition("## Model arguments")[2].partition("lmms-eval splits")[0]
    given = set(inspect.signature(Foveate).parameters) - {"batch_size"}
    assert set(re.findall(r"`([a-z_]+)`(?=[^|]*\|[^|]*\|$)", arguments, re.MULTILINE)) >= given
