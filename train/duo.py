"""DuoAttention's head identification: which KV heads of a frozen model have to see the whole context.

DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (ICLR 2025),
https://arxiv.org/abs/2410.10819, section 2.2. Each KV head gets a gate α that mixes its full attention with attention
to the first tokens and a window of the latest. The gates are trained so that the final hidden states stay what they
were where passkeys are recalled, and that few gates stay open. What `vlm/cache/split.py` does with them is section 2.3.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..data.encoding import IGNORE, encode
from ..data.glyphs import GlyphSource
from ..eval.facts import run_facts
from ..vlm.checkpoints import load, read_config
from ..vlm.config import FoveateConfig
from ..vlm.decoder import attention_config, attention_function, decoder_of
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.processor import FoveateProcessor
from ..vlm.vila import is_vila

THRESHOLD = 0.5  # of gates: retrieval heads are above


@dataclass(frozen=True)
class DuoSettings:
    """How gates are trained; the paper's (section 3.1), but for texts that are shorter.

    Attributes:
        sink, window: what a streaming head sees: so many first tokens, and so many latest ones, each token itself among
            them.
        lengths: of texts in tokens, shortest and longest.
        passkeys: in a text.
        passkey_tokens: of each passkey.
        name_tokens: of the name that stands before a passkey, and before it is recalled.
        batch: texts of a step, all equally long.
        steps, learning_rate: of Adam; the rate rises over the first fifth of the steps and falls over the last.
        penalty: λ, times the mean of the gates.
        seed: of the texts.

    Raises:
        ValueError: a field is out of range.
    """

    sink: int = 128
    window: int = 256
    lengths: tuple[int, int] = (1000, 8000)
    passkeys: int = 10
    passkey_tokens: int = 32
    name_tokens: int = 8
    batch: int = 1
    steps: int = 2000
    learning_rate: float = 0.02
    penalty: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("window", "passkeys", "passkey_tokens", "name_tokens", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: at least 1")
        if self.sink < 0:
            raise ValueError(f"sink is {self.sink}; accepted: at least 0")
        if not 0 < self.lengths[0] <= self.lengths[1]:
            raise ValueError(f"lengths is {self.lengths}; accepted: shortest ≤ longest, from 1")


@dataclass(frozen=True)
class Recall:
    """Texts that end in what has to be looked up in them.

    Attributes:
        inputs: of the decoder: `input_ids` [batch, tokens], or `inputs_embeds`.
        recalled: bool [batch, tokens], True where the next token is one that is looked up.
    """

    inputs: Mapping[str, torch.Tensor]
    recalled: torch.Tensor


def passkey_texts(vocabulary: torch.Tensor, settings: DuoSettings, first: int | None = None) -> Iterator[Recall]:
    """Random texts in which names with passkeys stand anywhere; at the end each name comes again, and its passkey.

    Args:
        vocabulary: int64 [tokens], the ids that texts are made of.
        first: id of the token that begins a text; None: none does.

    Raises:
        ValueError: the passkeys don't fit into the shortest text.
    """
    records, width = settings.passkeys, settings.name_tokens + settings.passkey_tokens
    if settings.lengths[0] <= 2 * records * width:
        raise ValueError(
            f"lengths is {settings.lengths}; accepted: above {2 * records * width}, the tokens of {records} "
            "passkeys with their names, told and recalled"
        )
    random = torch.Generator().manual_seed(settings.seed)

    def draw(*size: int) -> torch.Tensor:
        return vocabulary[torch.randint(len(vocabulary), size, generator=random)]

    low = 0 if first is None else 1  # at 0 no passkey can stand then
    asked = torch.zeros(records, width, dtype=torch.bool)
    asked[:, settings.name_tokens - 1 : -1] = True
    while True:
        length = int(torch.randint(settings.lengths[0], settings.lengths[1] + 1, (), generator=random))
        filling = length - 2 * records * width
        texts = []
        for _ in range(settings.batch):
            told = draw(records, width)
            places = torch.randint(low, filling + 1, (records,), generator=random).sort().values.tolist()
            parts, begin = [], 0
            haystack = draw(filling)
            for place, record in zip(places, told, strict=True):
                parts += [haystack[begin:place], record]
                begin = place
            recalled = told[torch.randperm(records, generator=random)]
            texts.append(torch.cat([*parts, haystack[begin:], recalled.flatten()]))
            if first is not None:
                texts[-1][0] = first
        mask = torch.cat([torch.zeros(length - records * width, dtype=torch.bool), asked.flatten()])
        yield Recall({"input_ids": torch.stack(texts)}, mask.expand(settings.batch, -1))


def streaming_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, sink: int, window: int
) -> torch.Tensor:
    """Causal attention to the first `sink` tokens and the `window` latest, each token itself among them.

    Blocks of queries are computed one after another, each against the columns that some of its rows see.

    Args:
        query: [batch, heads, tokens, head_dim].
        keys, values: [batch, kv_heads, tokens, head_dim].

    Returns:
        [batch, heads, tokens, head_dim].
    """
    tokens, groups = query.shape[2], query.shape[1] // keys.shape[1]
    blocks = []
    for rows in torch.arange(tokens, device=query.device).split(max(window, 64)):
        begin = max(int(rows[0]) - window + 1, 0)
        columns = torch.cat([rows.new_tensor(range(min(sink, begin))), torch.arange(begin, rows[-1] + 1).to(rows)])
        distance = rows[:, None] - columns
        seen = (distance >= 0) & ((columns < sink) | (distance < window))
        near_keys, near_values = (x[:, :, columns].repeat_interleave(groups, dim=1) for x in (keys, values))
        blocks.append(
            nn.functional.scaled_dot_product_attention(
                query[:, :, rows], near_keys, near_values, attn_mask=seen, scale=scaling
            )
        )
    return torch.cat(blocks, dim=2)


@contextmanager
def gated_attention(decoder: Any, gates: torch.Tensor, sink: int, window: int) -> Iterator[None]:
    """Mixes, while it lasts, each KV head's attention: α · full + (1 − α) · streaming (section 2.2).

    Args:
        decoder: as of `decoder_of`.
        gates: α, [layers, kv_heads].
    """
    config = attention_config(decoder)
    own = config._attn_implementation or "eager"
    name = "foveate_duo:" + own

    def mixed(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any):
        config._attn_implementation = own  # flash attention looks at the name
        try:
            full, _ = attention_function(module, own)(module, query, key, value, mask, **kwargs)
        finally:
            config._attn_implementation = name
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        near = streaming_attention(query, key, value, scaling, sink, window).transpose(1, 2)
        gate = gates[module.layer_idx].to(full).repeat_interleave(query.shape[1] // key.shape[1])[:, None]
        return gate * full + (1 - gate) * near, None

    ALL_ATTENTION_FUNCTIONS.register(name, mixed)
    if own in ALL_MASK_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = own


def train_gates(
    model: PreTrainedModel,
    texts: Iterator[Recall],
    settings: DuoSettings,
    after_step: Callable[[int, float, float], None] | None = None,
) -> torch.Tensor:
    """Trains the gates from 1 on; the model stays as it is.

    The loss is the mean squared difference of the final hidden states, with and without gates, where something is
    recalled, plus `penalty` times the mean of the gates, which are clamped to [0, 1] after each step.

    Args:
        texts: as many as there are steps.
        after_step: called with the number of steps done, the distillation loss and the mean gate.

    Returns:
        float32 [layers, kv_heads].

    Raises:
        ValueError: the decoder is not one of layers with RoPE and full attention.
    """
    decoder = decoder_of(model)
    device = next(decoder.parameters()).device
    shape = (len(decoder.layers), decoder.config.num_key_value_heads)
    gates = torch.ones(shape, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([gates], lr=settings.learning_rate)
    fifth = max(settings.steps // 5, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / fifth, max(settings.steps - step, 1) / fifth)
    )
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.eval().requires_grad_(False)
    try:
        for step in range(settings.steps):
            recall = next(texts)
            inputs = {key: value.to(device) for key, value in recall.inputs.items()}
            where = recall.recalled.to(device)
            with torch.no_grad():
                wanted = decoder(**inputs, use_cache=False).last_hidden_state[where]
            with gated_attention(decoder, gates, settings.sink, settings.window):
                given = decoder(**inputs, use_cache=False).last_hidden_state[where]
            distilled = nn.functional.mse_loss(given.float(), wanted.float())
            optimizer.zero_grad()
            (distilled + settings.penalty * gates.mean()).backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            if after_step:
                after_step(step + 1, distilled.item(), gates.mean().item())
    finally:
        model.train(training)
        for parameter in learned:
            parameter.requires_grad_(True)
    return gates.detach().cpu()


def vocabulary_of(tokenizer: Any, size: int) -> torch.Tensor:
    """The ids below `size` that are words: neither special tokens nor added ones; int64 [tokens]."""
    odd = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return torch.tensor([i for i in range(min(size, len(tokenizer))) if i not in odd])


def needle_clips(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, settings: DuoSettings
) -> Iterator[Recall]:
    """In the place of texts: clips of `lengths` frames, each with questions for `passkeys` needles, one clip a step."""
    turns = (settings.passkeys, settings.passkeys)
    source = GlyphSource("needles_chat", processor, seed=settings.seed, frames=settings.lengths, turns=turns)
    for index in count():
        sample = encode(source.document(index), processor)
        with torch.no_grad():
            media = {name: given.to(model.device) for name, given in processor.media_inputs([sample.media]).items()}
            ids = torch.from_numpy(sample.input_ids)[None].to(model.device)
            features = torch.cat(model.encode_videos(**media))
            embeds = model.get_inputs_embeds(input_ids=ids, video_features=features)
        recalled = torch.from_numpy(sample.labels != IGNORE)[None].roll(-1, 1)
        yield Recall({"inputs_embeds": embeds}, recalled)


def load_llm(source: str) -> tuple[PreTrainedModel, Any]:
    """Loads a model of ours with its processor, or else a transformers LLM or VLM with its tokenizer.

    Raises:
        OSError: nothing is there that transformers can load.
        ValueError: it is no such model.
    """
    config = read_config(source)
    if config.get("model_type") == FoveateConfig.model_type or is_vila(config):
        return load(source)
    kind = AutoConfig.from_pretrained(source).model_type
    auto: Any = AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    return auto.from_pretrained(source, dtype="auto").eval(), AutoTokenizer.from_pretrained(source)


def identify_heads(source: str, out: Path, settings: DuoSettings, data: str, console: Console) -> torch.Tensor:
    """Trains a model's gates and writes them to `out`, for `--kv duo:heads=OUT`.

    Args:
        source: see `load_llm`.
        data: `passkeys`; or `needles`, for models of the recipe `needle`.

    Returns:
        float32 [layers, kv_heads].

    Raises:
        ValueError: the model is none that it works on.
    """
    model, reader = load_llm(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]  # transformers wraps it
    if data == "needles":
        if not isinstance(model, FoveateForConditionalGeneration):
            raise ValueError(f"{source} is no model of Foveate's; accepted with data needles: one of the recipe needle")
        texts = needle_clips(model, reader, settings)
    else:
        tokenizer = getattr(reader, "tokenizer", reader)
        words = vocabulary_of(tokenizer, decoder_of(model).config.vocab_size)
        texts = passkey_texts(words, settings, tokenizer.bos_token_id)

    def tell(step: int, distilled: float, gate: float) -> None:
        if step % max(settings.steps // 20, 1) == 0:
            console.print(
                f"step {step}/{settings.steps}  distillation {distilled:.5f}  mean gate {gate:.3f}", highlight=False
            )

    gates = train_gates(model, texts, settings, tell)
    facts = run_facts(f"foveate duo MODEL --data {data}", ("torch", "transformers"))
    write_heads(out, gates, settings, facts | {"data": data})
    for number, layer in enumerate(gates.tolist()):
        console.print(f"layer {number:>2}  " + " ".join(f"{gate:.2f}" for gate in layer), highlight=False)
    console.print(
        f"{int((gates > THRESHOLD).sum())} of {gates.numel()} KV heads are retrieval heads (gate above {THRESHOLD}); "
        f"in {out}",
        highlight=False,
    )
    return gates


def write_heads(path: Path, gates: torch.Tensor, settings: DuoSettings, facts: Mapping[str, Any]) -> None:
    """Writes what `duo:heads=FILE` reads; gates are rounded to four digits."""
    rounded = [[round(gate, 4) for gate in layer] for layer in gates.tolist()]
    told = {**facts, "threshold": THRESHOLD, **asdict(settings), "gates": rounded}
    path.write_text(json.dumps(told, indent=1) + "\n")
