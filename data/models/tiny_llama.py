"""tiny-llama-wordnet-manpages-seed<k>.safetensors and -tokenizer.json: one small language model for all papers.

    python data/models/tiny_llama.py                # both seeds, 11 minutes each
    python data/models/tiny_llama.py --seed 1       # one
    python data/models/tiny_llama.py --steps 50 --work /tmp/trial --out /tmp/trial       # to see it work

Trained on the entries of WordNet ("dog, domestic dog (noun): a member of the genus Canis ...; "the dog barked all
night"") and the manual pages; 2 % of both are held out, and nothing of ``lee`` is seen, which is left for papers that
train on. The vocabulary is byte-level BPE learnt from the same texts, so every text has tokens. Token 0 precedes every
text. One thread; a run that was stopped goes on from the last minute.

The facts in a file's metadata: ``held_out_loss`` in nats a token over the held-out windows, of the weights as stored,
rounded to float16; ``unigram_loss`` and ``bigram_loss`` of counts of the training texts on the same tokens (the
bigram falls back on the unigram, with the weight that suits the held-out texts best); ``lee_loss`` on the first 100
texts of lee.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as bpe
from torch import Tensor

from nbkit import datasets, models, recipes, training

STEM = "tiny-llama-wordnet-manpages"
SEEDS = (0, 1)
BETWEEN = "<|endoftext|>"
VOCAB = 1024
LENGTH = 128
STEPS = 6400
SETTINGS = {
    "batch": 8,
    "length": LENGTH,
    "lr": 4e-3,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "warmup": 0.04,
}
MINUTE = 60


def texts() -> tuple[list[str], list[str]]:
    """For training and held out, each in a random order in which entries and pages are mixed."""
    wordnet, pages = datasets.load("wordnet"), datasets.load("manpages").documents
    whole = [
        f"{', '.join(words)} ({part}): {definition}" + "".join(f'; "{example}"' for example in examples)
        for words, part, definition, examples in zip(
            wordnet.words, wordnet.parts, wordnet.definitions, wordnet.examples, strict=True
        )
    ]
    rng = np.random.default_rng(0)
    held = []
    for group in (whole, [f"{page}\n{text}" for page, text in pages.items()]):
        out = set(rng.choice(len(group), len(group) // 50, replace=False).tolist())
        held.append(([t for i, t in enumerate(group) if i not in out], [group[i] for i in sorted(out)]))
    train, rest = ([*held[0][k], *held[1][k]] for k in (0, 1))
    return [train[i] for i in rng.permutation(len(train))], [rest[i] for i in rng.permutation(len(rest))]


def learn_vocabulary(train: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(bpe.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BETWEEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train, trainer)
    return tokenizer


def windows(tokenizer: Tokenizer, some: list[str], length: int = LENGTH) -> Tensor:
    """All texts in a row, token 0 before each, cut into pieces [N, length]; the rest of the last one is left out."""
    ids = [i for e in tokenizer.encode_batch_fast(some, add_special_tokens=False) for i in (0, *e.ids)]
    return torch.tensor(ids)[: len(ids) // length * length].view(-1, length)


@torch.no_grad()
def loss(model: torch.nn.Module, ids: Tensor) -> float:
    """Nats a token, over all tokens that have one before them in their window."""
    parts = [
        F.cross_entropy(
            model(input_ids=some).logits[:, :-1].flatten(0, 1), some[:, 1:].flatten(), reduction="sum"
        )
        for some in ids.split(32)
    ]
    return sum(part.item() for part in parts) / ids[:, 1:].numel()


def count_losses(train: Tensor, held: Tensor) -> dict[str, float]:
    """The same of two models that count; every token has been seen once more than it was."""
    one = torch.bincount(train.flatten(), minlength=VOCAB).double() + 1
    one /= one.sum()
    pairs = torch.bincount((train[:, :-1] * VOCAB + train[:, 1:]).flatten(), minlength=VOCAB**2).double()
    pairs = pairs.view(VOCAB, VOCAB)
    before, after = held[:, :-1].flatten(), held[:, 1:].flatten()
    two = [
        -((pairs[before, after] + k * one[after]) / (pairs.sum(1)[before] + k)).log().mean().item()
        for k in (1, 10, 100, 1000)
    ]
    return {"unigram_loss": -one[after].log().mean().item(), "bigram_loss": min(two)}


def train(ids: Tensor, seed: int, steps: int, work: Path) -> tuple[torch.nn.Module, float]:
    """The network after ``steps`` and the processor's seconds; what a stopped run saved in ``work`` is taken up."""
    model = models.build("tiny-llama", seed=seed).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": SETTINGS["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS["lr"], betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * SETTINGS["batch"] // len(ids))
    order = torch.cat([torch.randperm(len(ids), generator=generator) for _ in range(passes)])
    saved, first, before, factor = work / f"seed{seed}.pt", 0, 0.0, training.cosine(SETTINGS["warmup"])
    if saved.is_file():
        first, before, weights, state = torch.load(saved, weights_only=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    began = last = time.process_time()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS["lr"] * factor((step + 1) / (steps + 1))
        some = ids[order[step * SETTINGS["batch"] : (step + 1) * SETTINGS["batch"]]]
        current = F.cross_entropy(model(input_ids=some).logits[:, :-1].flatten(0, 1), some[:, 1:].flatten())
        optimizer.zero_grad()
        current.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if time.process_time() - last > MINUTE or step + 1 == steps:
            last = time.process_time()
            seconds = before + last - began
            part = saved.with_suffix(".part")  # a name a seed: two may run side by side
            torch.save((step + 1, seconds, model.state_dict(), optimizer.state_dict()), part)
            part.replace(saved)
            print(f"seed {seed}, step {step + 1}: loss {current.item():.3f}, {seconds:.0f} s", flush=True)
    return model.eval(), before + time.process_time() - began


def build(out: Path, seed: int | None, steps: int, work: Path) -> list[Path]:
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{STEM}-tokenizer.json"]
    kept = [work / name for name in ("vocabulary.json", "windows.pt")]
    if not all(path.is_file() for path in kept):
        some, rest = texts()
        tokenizer = learn_vocabulary(some)
        recipes.write_bytes(kept[0], tokenizer.to_str(pretty=True).encode())
        lee = list(datasets.load("lee").texts[:100])
        torch.save([windows(tokenizer, part) for part in (some, rest, lee)], kept[1])
    recipes.write_bytes(paths[0], kept[0].read_bytes())
    ids, held, lee = torch.load(kept[1], weights_only=True)
    print(json.dumps({"train": list(ids.shape), "held out": list(held.shape)}), flush=True)
    for k in SEEDS if seed is None else (seed,):
        model, seconds = train(ids, k, steps, work)
        recipes.round_to_half(model)
        measured = {
            "held_out_loss": loss(model, held),
            **count_losses(ids, held),
            "lee_loss": loss(model, lee),
        }
        facts = {
            "recipe": "data/models/tiny_llama.py",
            "dataset": "wordnet-manpages",
            "seed": k,
            "task": "next-token logits [N, T, 1024]",
            "takes": "input_ids [N, T] from models.tokenizer('tiny-llama')",
            "licence": "Apache-2.0; the texts: WordNet licence, and of the manual pages each its own",
            "settings": SETTINGS,
            "train_examples": len(ids),
            "steps": steps,
            **{name: round(value, 4) for name, value in measured.items()},
            "held_out_tokens": held[:, 1:].numel(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": round(seconds),
            "torch": torch.__version__,
        }
        paths.append(out / f"{STEM}-seed{k}.safetensors")
        models.save_checkpoint(paths[-1], model.half(), "tiny-llama", {}, **facts)
        print(json.dumps(facts), flush=True)
    return paths


if __name__ == "__main__":
    recipes.run(
        build,
        __doc__,
        seed={"type": int, "choices": SEEDS, "help": "one of them (default: both)"},
        steps={"type": int, "default": STEPS, "help": f"fewer, for a trial (default: {STEPS})"},
        work=recipes.work_option("tiny-llama"),
    )
