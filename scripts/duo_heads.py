"""DuoAttention's head identification, proved on tiny models: `duo_heads.py runs/duo` (docs/kv.md).

Trains a Llama of 3 layers and 12 KV heads from random weights, with each seed, to recall passkeys; identifies its
retrieval heads; and asks for 200 passkeys with some heads streaming, through the KV cache: all but the identified
heads, the identified heads alone, and as many random ones. What is finished in the folder is not run again. Writes
`results.json` to it; --publish also puts it into docs/results/duo.json.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.eval.facts import result, run_facts
from foveate.eval.figures import publish
from foveate.eval.statistics import wilson_interval
from foveate.train.duo import THRESHOLD, DuoSettings, passkey_texts, train_gates, write_heads
from foveate.vlm.cache.cache import KVCache

FIRST, VOCABULARY = 0, torch.arange(1, 64)
SETTINGS = DuoSettings(
    sink=4, window=16, lengths=(96, 160), passkeys=4, passkey_tokens=4, name_tokens=2, batch=8, steps=300
)
LENGTH = 128  # tokens of a text with passkeys that is asked about
DRAWS = 10  # of random heads


def trained(out: Path, seed: int, console: Console) -> LlamaForCausalLM:
    """A model that recalls passkeys; it is trained unless the folder holds it."""
    if (out / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(out)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.08, bos_token_id=None,
        eos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model, rate = LlamaForCausalLM(config), 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    for name, lengths, steps in (("short", (50, 64), 3000), ("long", (64, 160), 400)):
        texts = passkey_texts(VOCABULARY, replace(SETTINGS, lengths=lengths, batch=32, seed=1000 + seed), FIRST)
        mean = 4.0  # of the loss
        for step in range(steps):
            recall = next(texts)
            ids = recall.inputs["input_ids"]
            logits = model(input_ids=ids, use_cache=False).logits[recall.recalled]
            loss = nn.functional.cross_entropy(logits, ids.roll(-1, 1)[recall.recalled])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50, 1 if name == "short" else 1 - step / steps)
            optimizer.step()
            mean += 0.05 * (loss.item() - mean)
            if (step + 1) % 200 == 0:
                console.print(f"{name} {step + 1}/{steps}  loss {mean:.3f}")
            if name == "short" and mean < 0.2:  # recalled; now in longer texts
                break
    model.save_pretrained(out)
    return model


@torch.inference_mode()
def recalled(model: LlamaForCausalLM, heads: Path | None, questions: int, seed: int) -> int:
    """How many of so many passkeys are generated without a mistake.

    Args:
        heads: file that says which KV heads are no streaming heads; None: all.
    """
    asked = replace(SETTINGS, lengths=(LENGTH, LENGTH), batch=min(questions, 100), seed=10**6 + seed)
    texts, right, done = passkey_texts(VOCABULARY, asked, FIRST), 0, 0
    width = asked.name_tokens + asked.passkey_tokens
    begin = LENGTH - asked.passkeys * width + asked.name_tokens
    while done < questions:
        ids = next(texts).inputs["input_ids"][: questions - done]
        cache = KVCache(model, f"duo:heads={heads}" if heads else "dense")
        said = model.generate(
            ids[:, :begin], past_key_values=cache, max_new_tokens=asked.passkey_tokens, do_sample=False
        )
        right += int((said == ids[:, : said.shape[1]]).all(1).sum())
        done += len(ids)
    return right


def run_seed(out: Path, seed: int, questions: int, console: Console) -> dict:
    """One model's gates, and its accuracies, as JSON."""
    model = trained(out / "model", seed, console).eval()
    settings = replace(SETTINGS, seed=seed)
    gates = train_gates(model, passkey_texts(VOCABULARY, settings, FIRST), settings)
    found = (gates > THRESHOLD).flatten()
    count, random = int(found.sum()), torch.Generator().manual_seed(seed)

    def accuracy(name: str, choices: list[torch.Tensor]) -> dict:
        """Of heads that see everything: bool [layers · kv_heads] each; all texts of all choices are counted."""
        right = []
        for kept in choices:
            write_heads(out / "heads.json", kept.float().view_as(gates), settings, {})
            right.append(recalled(model, out / "heads.json", questions, seed))
        low, high = wilson_interval(sum(right), questions * len(choices))
        value = sum(right) / (questions * len(choices))
        console.print(f"seed {seed}  {name:>40}  {value:.3f}  [{low:.3f}, {high:.3f}]", highlight=False)
        each = [one / questions for one in right]
        return result(name, value, "fraction", questions * len(choices), low=low, high=high) | {"each": each}

    draws = [torch.randperm(found.numel(), generator=random)[:count] for _ in range(DRAWS)]
    chosen = [torch.zeros_like(found).index_fill(0, draw, True) for draw in draws]
    all_heads = torch.ones_like(found)
    measured = [
        accuracy("no head streams", [all_heads]),
        accuracy("all but the identified stream", [found]),
        accuracy("all but as many random ones stream", chosen),
        accuracy("as many of the smallest gates stream", [_fewest(gates, count)]),
        accuracy("as many random ones stream", [~one for one in chosen]),
        accuracy("the identified stream", [~found]),
        accuracy("all stream", [~all_heads]),
    ]
    return {"seed": seed, "identified": count, "gates": gates.tolist(), "results": measured}


def _fewest(gates: torch.Tensor, count: int) -> torch.Tensor:
    """All heads but the `count` of the smallest gates."""
    smallest = gates.flatten().argsort(stable=True)[:count]
    return torch.ones(gates.numel(), dtype=torch.bool).index_fill(0, smallest, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=200, help="passkeys that are asked for in each setting")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    seeds = []
    for seed in options.seeds:
        folder = options.out / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        done = folder / f"measured-{options.questions}.json"
        if not done.exists():
            done.write_text(json.dumps(run_seed(folder, seed, options.questions, console)))
        seeds.append(json.loads(done.read_text()))
    facts = run_facts(f"scripts/duo_heads.py OUT --seeds {' '.join(map(str, options.seeds))}")
    told = facts | {"settings": asdict(SETTINGS), "tokens": LENGTH, "seeds": seeds}
    (options.out / "results.json").write_text(json.dumps(told, indent=1) + "\n")
    if options.publish:
        publish("duo", told)


if __name__ == "__main__":
    main()
