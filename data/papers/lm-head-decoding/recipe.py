"""The tables and labels of notebooks/03-neurons/02-lm-head-decoding.

Three parts of about six, five and eight minutes on one core; the functions are the notebook's own method cells.

- decode: labels.safetensors holds, for the 46,080 up-projection neurons of SmolLM2-135M (layer by layer), the top
  token of the better end and its s (negative where that end is -w's). specialisation.csv: quantiles of s at either end,
  of the neurons and of two kinds of meaningless vectors, by layer. writes.csv: how often a neuron's write vector has
  the read label at the same and at the opposite end, by layer and s. texts.csv: how much of what such neurons add to
  their label's logit on Lee texts goes against it. gains.csv: how many labels stay with a norm's gain in front of the
  LM head. chosen.csv: the 40 neurons of the clamp study.
- clamp: clamp.csv.gz: these and three control neurons of the same layer each held at +-c; change of log P(t) on two
  halves of twelve prompts. answers.csv: what the model says of its favourite animal, the "dog" neuron or one of 24
  others held. Needs the decode part.
- tune: tuning.csv: what 80 steps of fine-tuning on the Lee news texts did, and how many top tokens of +w stay, also
  under Gaussian noise of the same size (three seeds, every fourth neuron). noise.csv: how many labels stay under noise
  of growing size.

    python data/papers/lm-head-decoding/recipe.py                   # everything
    python data/papers/lm-head-decoding/recipe.py --part clamp
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nbkit import datasets, hooks, models, papers, runtime, training
from nbkit.recipes import part_option, run, write_table, write_tensors

Files = dict[str, dict[str, Tensor] | pd.DataFrame]  # by file name
NAME = "lm-head-decoding"
ROLES = ("labelled neuron", "random neuron", "random neuron 2", "random neuron 3")
NEURONS, DOSES = 40, (-16.0, 16.0, -4.0, 4.0, -1.0, 1.0)  # doses in 99th percentiles of |u_j| on Lee text
STRONG = 0.3  # from this s on a label is called strong
EDGES, STEPS_OF_S = [0, 0.2, 0.25, STRONG, 0.4, 0.5, 2], ["0", "0.2", "0.25", "0.3", "0.4", "0.5"]
DOG = (29, 808)
BEGUN = (
    "My favourite animal is",
    "The animal I love most is the",
    "If I could keep one animal, it would be a",
    "Of all the animals in the world, I like best the",
)  # to go on with
ASKED = (
    "What is your favourite animal?",
    "Which animal do you like best?",
    "Name the animal that you love most.",
    "Tell me about your favourite animal.",
)  # in the form of a chat
ANSWER_C, OTHERS = {"up": 20.0, "product": 6.0}, 24  # the constants of the dog neuron; how many others get them
SHUFFLES = 20  # of the write vectors of a layer
EVERY = 4  # the noise is decoded for every fourth neuron
STEPS, BATCH, LENGTH, RATE = 80, 4, 64, 1e-4
SIZES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of noise, as a share of the weights' norm


def all_vectors(method, model, part: str = "up_proj", every: int = 1) -> Tensor:
    """[L f / every, d], layer by layer."""
    layers = range(len(method.gated_mlps(model)))
    return torch.cat([method.neuron_vectors(model, layer, part)[::every] for layer in layers])


def chunks(texts, tokenizer, length: int = LENGTH) -> Tensor:
    """[n, length] token ids of the texts one after another, with the end-of-text token between them."""
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], 0]]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def whole_words(tokenizer, texts) -> Tensor:
    """Mask [V] of the tokens that are a space and at least three letters, and a word of the texts by themselves."""
    words = {word.strip(".,;:!?'\"()").lower() for text in texts for word in text.split()}
    tokens = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    return torch.tensor([t[:1] == " " and len(t) > 3 and t[1:].isalpha() and t[1:].lower() in words for t in tokens])


# --- decode


def quantiles(kind: str, seed: int, s: Tensor, layers: int) -> list[tuple]:
    """Rows of specialisation.csv from s [L f, 2]."""
    points = torch.tensor([0.5, 0.99, 0.999])
    return [
        (kind, seed, layer, end, *part[:, i].quantile(points).tolist())
        for layer, part in enumerate(s.chunk(layers))
        for i, end in enumerate(("+w", "-w"))
    ]


def mixed(method, model, seed: int) -> Tensor:
    """[L f, d]: random sums of the neurons of each layer."""
    layers = range(len(method.gated_mlps(model)))
    return torch.cat([method.null_vectors(method.neuron_vectors(model, i), "mixed", 100 * seed + i) for i in layers])


class Label(NamedTuple):
    """The better end of n neurons."""

    token: Tensor  # [n] the top token of that end
    s: Tensor  # [n] its largest cosine
    sign: Tensor  # [n] +1 where it is the end of w, -1 where it is that of -w


def better_end(found) -> Label:
    """Of each neuron decoded the end that lies nearer to a token."""
    s, end = found.s.max(1)
    return Label(found.ids[:, :, 0].gather(1, end[:, None])[:, 0], s, 1 - 2 * end)


def written(method, model, label: Label) -> pd.DataFrame:
    """At which end of a neuron's write vector its read label stands, and of another's: counts by layer and s."""
    E, layers = model.lm_head.weight.detach(), len(method.gated_mlps(model))
    vectors = all_vectors(method, model, "down_proj") * label.sign[:, None]
    ends = method.decode(vectors, E, k=1).ids[:, :, 0]  # [L f, 2]; signs as where the label is read
    layer, s = np.repeat(np.arange(layers), len(ends) // layers), label.s.half().float().numpy()  # as it is stored
    frame = pd.DataFrame({
        "layers": pd.cut(layer, [-1, 0, 19, 25, 29], labels=["0", "1-19", "20-25", "26-29"]),
        "layer": layer,
        "s": pd.cut(s, EDGES, labels=STEPS_OF_S, right=False),
        "strong": s > STRONG,
        "neurons": 1,
        "opposite end": (ends[:, 1] == label.token).numpy(),
        "same end": (ends[:, 0] == label.token).numpy(),
    })  # fmt: skip
    generator, shuffled = torch.Generator().manual_seed(0), torch.zeros(len(frame))
    for rows in frame.groupby(["layer", "strong"]).indices.values():  # neurons that read about as clearly
        order = rows[torch.randperm(len(rows), generator=generator).numpy()]
        shifts = range(1, min(SHUFFLES + 1, len(rows)))
        for shift in shifts:  # each has the write vector of another
            other = np.roll(order, shift)
            shuffled[order] += (ends[other, 1] == label.token[order]).float() / len(shifts)
    frame["another neuron's"] = shuffled.numpy()
    return frame.groupby(["layers", "layer", "s", "strong"], observed=True).sum().reset_index()


def on_texts(method, model, tokenizer, label: Label) -> pd.DataFrame:
    """Share of what strong neurons add to their label's logit that lowers it: everywhere, and where they read most."""
    E, mlps, rows = model.lm_head.weight.detach(), method.gated_mlps(model), []
    ids = chunks(datasets.load("lee").texts, tokenizer)[:16]
    for layer in range(26, 30):
        mine = slice(layer * len(label.s) // len(mlps), (layer + 1) * len(label.s) // len(mlps))
        strong, e = label.s[mine] > STRONG, E[label.token[mine]]
        up, down = (f"{mlps[layer]}.{part}" for part in ("up_proj", "down_proj"))
        with torch.no_grad(), hooks.record(model, up) as u, hooks.record(model, down, at="input") as h:
            model(input_ids=ids, logits_to_keep=1)
        reading = (u[up].flatten(0, 1) * label.sign[mine])[:, strong]  # [tokens, strong]
        along = (method.neuron_vectors(model, layer, "down_proj") * e).sum(1)
        added = (h[down].flatten(0, 1) * along)[:, strong]
        for where, part in (("everywhere", added), ("loudest 1 %", added[reading >= reading.quantile(0.99, 0)])):
            rows.append((layer, int(strong.sum()), where, (-part.clamp(max=0).sum() / part.abs().sum()).item()))
    return pd.DataFrame(rows, columns=["layer", "neurons", "where", "against"])


def gained(method, model, label: Label) -> pd.DataFrame:
    """Share of labels kept, at either end, where a norm's gain comes before the LM head: 1,000 neurons of a group."""
    E, mlps = model.lm_head.weight.detach(), method.gated_mlps(model)
    W, modules, rows = all_vectors(method, model), dict(model.named_modules()), []
    block = [modules[f"{mlp.rpartition('.')[0]}.post_attention_layernorm"].weight.detach() for mlp in mlps]
    last = model.model.norm.weight.detach()
    gains = {"norm before the MLP": torch.stack(block), "final norm": last.expand(len(mlps), -1)}
    generator = torch.Generator().manual_seed(0)
    for group, members in (("s > 0.3", label.s > STRONG), ("others", label.s <= STRONG)):
        some = members.nonzero()[torch.randperm(int(members.sum()), generator=generator)[:1000], 0]
        for gain, by_layer in gains.items():
            vectors = W[some] * by_layer.repeat_interleave(len(W) // len(mlps), 0)[some]
            kept = (method.decode(vectors, E, k=1).ids[:, :, 0] == label.token[some, None]).any(1)
            rows.append((group, gain, len(some), kept.float().mean().item()))
    return pd.DataFrame(rows, columns=["labels", "gain", "neurons", "kept"])


def z_scores(W: Tensor, E: Tensor, logits: Tensor) -> Tensor:
    """[n, 2]: top logits of W and of -W [n, 2] in standard deviations from the mean over the vocabulary."""
    W, E = W.double(), E.double()
    centre, second = W @ E.mean(0), (W @ (E.T @ E / len(E)) * W).sum(1)
    return (logits - torch.stack([centre, -centre], 1)) / (second - centre.square()).sqrt()[:, None]


def pick(ids: Tensor, z: Tensor, words: Tensor, width: int) -> pd.DataFrame:
    """The neurons with the highest z whose top token, of +w or -w (ids, z [L f, 2]), is a word."""
    best, end = torch.where(words[ids], z, -torch.inf).max(1)
    rows = [(i // width, i % width, "+-"[end[i]], ids[i, end[i]].item()) for i in best.topk(NEURONS).indices.tolist()]
    return pd.DataFrame(rows, columns=["layer", "neuron", "sign", "token"])


def decoded(method, model, tokenizer) -> Files:
    E, layers = model.lm_head.weight.detach(), len(method.gated_mlps(model))
    W = all_vectors(method, model)
    found = method.decode(W, E, k=1)
    rows, label = quantiles("neurons", 0, found.s, layers), better_end(found)
    for seed in range(3):
        nulls = {"permuted": method.null_vectors(W, "permuted", seed), "mixed": mixed(method, model, seed)}
        for kind, null in nulls.items():
            rows += quantiles(kind, seed, method.decode(null, E, k=1).s, layers)
    words = whole_words(tokenizer, datasets.load("lee").texts)
    z = z_scores(W, E, found.logits[:, :, 0])
    return {
        "labels": {"token": label.token.to(torch.uint16), "s": (label.s * label.sign).half()},
        "specialisation": pd.DataFrame(rows, columns=["kind", "seed", "layer", "end", "s_50", "s_99", "s_999"]),
        "writes": written(method, model, label),
        "texts": on_texts(method, model, tokenizer, label),
        "gains": gained(method, model, label),
        "chosen": pick(found.ids[:, :, 0], z, words, len(W) // layers),
    }


# --- clamp


def ranges(model, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """99th percentile over tokens of |u_j| ("up") and |h_j| ("product") in every MLP named, [f] each."""
    found: dict[str, Tensor] = {}
    for site, part, at in (("up", "up_proj", "output"), ("product", "down_proj", "input")):
        with torch.no_grad(), hooks.record(model, [f"{name}.{part}" for name in names], at=at) as acts:
            for some in ids.split(4):
                model(input_ids=some, logits_to_keep=1)
        found |= {(site, name): acts[f"{name}.{part}"].flatten(0, 1).abs().quantile(0.99, 0) for name in names}
    return found


def gates(model, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """SiLU(g_j) at the last position of every prompt in every MLP named, [N, f]."""
    with torch.no_grad(), hooks.record(model, [f"{name}.gate_proj" for name in names]) as acts:
        model(input_ids=ids, logits_to_keep=1)
    return {name: torch.nn.functional.silu(acts[f"{name}.gate_proj"][:, -1]) for name in names}


def on_half_b(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `toward` added: the dose, positive in the direction that at +-4 raised change_A more."""
    keys, at = ["site", "role", "case"], table[table.dose.abs() == 4]
    direction = at.sort_values("change_A").groupby(keys).dose.last().rename("direction") / 4
    joined = table.join(direction, on=keys).eval("toward = dose * direction")
    return joined.drop(columns="direction")


def study(method, model, tokenizer) -> pd.DataFrame:
    lee, mlps = datasets.load("lee"), method.gated_mlps(model)
    width = method.neuron_vectors(model, 0).shape[0]
    chosen = list(papers.results(NAME, "chosen").itertuples(index=False))
    prompts = torch.tensor(tokenizer([*method.HALF_A, *method.HALF_B])["input_ids"])
    half = len(method.HALF_A)
    used = [mlps[layer] for layer in sorted({case.layer for case in chosen})]
    size, gate = ranges(model, used, chunks(lee.texts, tokenizer)[:16]), gates(model, used, prompts[half:])
    clean = method.log_p(model, prompts)  # [12, V]
    rows: list[tuple] = []
    for i, (layer, neuron, sign, token) in enumerate(chosen):
        others = torch.randperm(width, generator=torch.Generator().manual_seed(i)).tolist()
        controls = [j for j in others if j != neuron][:3]
        unrelated = next(case.token for case in (chosen * 2)[i + 1 :] if case.token != token)
        e = model.lm_head.weight.detach()[token]
        for site, role, j in [(s, r, j) for s in ("up", "product") for r, j in enumerate([neuron, *controls])]:
            doses = DOSES if role < 2 and site == "up" else DOSES[2:4]
            c = torch.tensor(doses) * size[site, mlps[layer]][neuron]  # controls too are held at the neuron's own c
            change = method.held_log_p(model, prompts, layer, j, c, site=site) - clean
            along = (method.neuron_vectors(model, layer, "down_proj")[j] @ e).item()
            facts = (gate[mlps[layer]][:, j].mean().item(), gate[mlps[layer]][:, j].sign().unique().numel() > 1, along)
            names = {token: ROLES[role]} | ({} if role else {unrelated: "another token"})
            for target, name in names.items():
                for dose, value, by_prompt in zip(doses, c.tolist(), change[:, :, target], strict=True):
                    a, b = by_prompt[:half].mean().item(), by_prompt[half:].mean().item()
                    rows.append((i, layer, j, sign, site, name, target, dose, value, a, b, *facts))
        print("neuron", i, flush=True) if i % 10 == 9 else None
    columns = "case layer neuron sign site role token dose c change_A change_B gate_B gate_turns write".split()
    return on_half_b(pd.DataFrame(rows, columns=columns))


def answers(model, tokenizer) -> list[tuple[int, str, str]]:
    """(number, prompt, what the model says to it, greedily)."""
    chats = [[{"role": "user", "content": prompt}] for prompt in ASKED]
    form = {"tokenize": False, "add_generation_prompt": True}
    texts = [*BEGUN, *(tokenizer.apply_chat_template(chat, **form) for chat in chats)]
    ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    said = tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return list(zip(range(len(texts)), (*BEGUN, *ASKED), said, strict=True))


def asked(method, model, tokenizer) -> pd.DataFrame:
    """What is said free, with the dog neuron held, and with each of others of its layer held at the same constant."""
    layer, dog = DOG
    width = method.neuron_vectors(model, layer).shape[0]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [("free", -1, *answer) for answer in answers(model, tokenizer)]
    for site, c in ANSWER_C.items():
        for neuron in [dog, *[j for j in order if j != dog][:OTHERS]]:
            with method.held(model, layer, neuron, c, site=site):
                rows += [(site, neuron, *answer) for answer in answers(model, tokenizer)]
        print("answers", site, flush=True)
    return pd.DataFrame(rows, columns=["site", "neuron", "number", "prompt", "said"])


def clamped(method, model, tokenizer) -> Files:
    return {"clamp": study(method, model, tokenizer), "answers": asked(method, model, tokenizer)}


# --- tune


def tune(model, train: Tensor, test: Tensor) -> list[float]:
    """All weights, STEPS steps; the loss on the test texts before and after."""

    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    def test_loss() -> float:
        with torch.no_grad():
            return sum(loss(part).item() for part in test.split(8)) / 3

    losses, factor = [test_loss()], training.cosine(warmup=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    model.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * factor((step + 1) / (STEPS + 1))
        optimizer.zero_grad()
        loss(train[order[step * BATCH : (step + 1) * BATCH]]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9:
            print("step", step + 1, flush=True)
    model.eval()
    return [*losses, test_loss()]


def share_kept(top: Tensor, s: Tensor, tuned: Tensor, noisy: Tensor) -> dict[str, float]:
    """Of the top tokens of +w: top, s, tuned [L f], noisy [3, L f / EVERY]."""
    kept, same = tuned == top, noisy == top[::EVERY]
    by_seed = {f"kept under noise, seed {seed}": rows.float().mean().item() for seed, rows in enumerate(same)}
    return {"kept": kept.float().mean().item(), "kept, s > 0.3": kept[s > STRONG].float().mean().item(), **by_seed,
            "chance agreement": (top.bincount() / len(top)).square().sum().item()}  # fmt: skip


def growing(method, model, label: Label) -> pd.DataFrame:
    """Share of labels that stay under Gaussian noise on neurons and LM head, by its size and s; 600 neurons each."""
    E, generator = model.lm_head.weight.detach(), torch.Generator().manual_seed(0)
    W, rows = all_vectors(method, model) * label.sign[:, None], []
    for name, group in (("s > 0.3", label.s > STRONG), ("others", label.s <= STRONG)):
        some = group.nonzero()[torch.randperm(int(group.sum()), generator=generator)[:600], 0]
        noise = [torch.randn(x.shape, generator=generator) * x.norm() / x.numel() ** 0.5 for x in (W[some], E)]
        for size in SIZES:
            top = method.decode(W[some] + size * noise[0], E + size * noise[1], k=1).ids[:, 0, 0]
            rows.append((name, size, (top == label.token[some]).float().mean().item()))
    return pd.DataFrame(rows, columns=["labels", "noise", "kept"])


def tuned(method, model, tokenizer) -> Files:
    lee, E = datasets.load("lee"), model.lm_head.weight.detach()
    base = method.decode(all_vectors(method, model), E, k=1)
    under_noise = growing(method, model, better_end(base))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = tune(model, chunks(lee.texts, tokenizer), chunks(lee.test, tokenizer)[:24])
    names = [f"{mlp}.up_proj.weight" for mlp in method.gated_mlps(model)] + ["model.embed_tokens.weight"]
    after = dict(model.named_parameters())
    change = torch.stack([(after[name].detach() - before[name]).norm() for name in names])
    ids = method.decode(all_vectors(method, model), E, k=1).ids[:, 0, 0]
    noisy = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for name, size in zip(names, change, strict=True):
            random = torch.randn(before[name].shape, generator=generator)
            after[name].data.copy_(before[name] + random * (size / random.norm()))
        noisy.append(method.decode(all_vectors(method, model, every=EVERY), E, k=1).ids[:, 0, 0])
    relative = change / torch.stack([before[name].norm() for name in names])
    did = {
        "loss before": losses[0],
        "loss after": losses[1],
        "change of the up-projections": relative[:-1].mean().item(),
        "change of the embedding": relative[-1].item(),
        **share_kept(base.ids[:, 0, 0], base.s[:, 0], ids, torch.stack(noisy)),
    }
    return {"tuning": pd.DataFrame(did.items(), columns=["what", "value"]), "noise": under_noise}


PARTS = {"decode": decoded, "clamp": clamped, "tune": tuned}


def build(out: Path, part: str) -> list[Path]:
    method, paths = papers.method(NAME), []
    for name in PARTS if part == "all" else (part,):
        runtime.deterministic(seed=0)
        for file, values in PARTS[name](method, models.load("smollm2"), models.tokenizer("smollm2")).items():
            if isinstance(values, pd.DataFrame):
                paths.append(out / (f"{file}.csv.gz" if file == "clamp" else f"{file}.csv"))
                write_table(paths[-1], values, float_format="%.6g")
            else:
                paths.append(out / f"{file}.safetensors")
                write_tensors(paths[-1], values)
    return paths


if __name__ == "__main__":
    run(build, __doc__, part=part_option(*PARTS))
