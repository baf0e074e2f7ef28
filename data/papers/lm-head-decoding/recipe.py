"""The tables and tensors of notebooks/03-neurons/02-lm-head-decoding.

Three parts of about four, three and seven minutes on one core; the functions are the notebook's own method cells.

- decode: tensors.safetensors holds, for the 46,080 up-projection neurons of SmolLM2-135M (layer by
  layer) and both signs, the ids of the five best tokens, the largest cosine s and the z-score of the top logit.
  nulls.csv: quantiles of s over rows with permuted entries, by layer, three seeds.
  variants.csv: top tokens under the other readings, every fourth neuron.
- clamp: clamp.csv: 40 neurons and three control neurons of the same layer each held at +-c;
  change of log P(t) on two halves of twelve prompts. Needs the decode part.
- tune: tuned.safetensors: the top tokens after 80 steps of fine-tuning on the Lee news
  texts, those after Gaussian noise of the same size (three seeds, every fourth neuron), and what the tuning did.

    python data/papers/lm-head-decoding/recipe.py                   # everything
    python data/papers/lm-head-decoding/recipe.py --part clamp
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from nbkit import datasets, hooks, models, papers, runtime, training
from nbkit.recipes import part_option, run, write_table, write_tensors

Files = tuple[dict[str, dict[str, Tensor]], dict[str, pd.DataFrame]]  # safetensors and tables, by file name
NAME = "lm-head-decoding"
NEURONS, DOSES = 40, (-16.0, 16.0, -4.0, 4.0, -1.0, 1.0)  # doses in 99th percentiles of |u_j| on Lee text
EVERY = 4  # the other readings and the noise are decoded for every fourth neuron
STEPS, BATCH, LENGTH, RATE = 80, 4, 64, 1e-4


def all_vectors(method, model, variant: str = "raw", every: int = 1) -> Tensor:
    """[L f / every, d], layer by layer."""
    layers = range(len(method.gated_mlps(model)))
    return torch.cat([method.neuron_vectors(model, layer, variant)[::every] for layer in layers])


def chunks(texts, tokenizer, length: int = LENGTH) -> Tensor:
    """[n, length] token ids of the texts one after another, with the end-of-text token between them."""
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], 0]]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def whole_words(tokenizer, texts) -> Tensor:
    """Mask [V] of the tokens that are a space and at least three letters, and a word of the texts by themselves."""
    words = {word.strip(".,;:!?'\"()").lower() for text in texts for word in text.split()}
    tokens = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    return torch.tensor([t[:1] == " " and len(t) > 3 and t[1:].isalpha() and t[1:].lower() in words for t in tokens])


def decoded(method, model, tokenizer) -> Files:
    E, layers = model.lm_head.weight.detach(), len(method.gated_mlps(model))
    real = method.decode(all_vectors(method, model), E, k=5)
    tensors = {"ids": real.ids.to(torch.uint16), "s": real.s.half(), "z": real.z.half()}
    rows = []
    for variant in method.VARIANTS[1:]:
        other = method.decode(all_vectors(method, model, variant, EVERY), E, k=1)
        for layer, (mine, raw, s) in enumerate(
            zip(*(x.chunk(layers) for x in (other.ids[:, :, 0], real.ids[::EVERY, :, 0], other.s)), strict=True)
        ):
            either = (mine[:, :, None] == raw[:, None]).any((1, 2)).float().mean().item()
            same, top = (mine[:, 0] == raw[:, 0]).float().mean().item(), s[:, 0].quantile(0.99).item()
            rows.append((variant, layer, same, either, top))
    variants = pd.DataFrame(rows, columns=["variant", "layer", "same", "same_either_sign", "s_99"])
    rows, points = [], torch.tensor([0.5, 0.99, 0.999])
    for seed in range(3):
        null = method.decode(method.null_vectors(all_vectors(method, model), "permuted", seed), E, k=1)
        for layer, s in enumerate(null.s.chunk(layers)):
            rows += [(seed, layer, sign, *s[:, i].quantile(points).tolist()) for i, sign in enumerate("+-")]
    nulls = pd.DataFrame(rows, columns=["seed", "layer", "sign", "s_50", "s_99", "s_999"])
    return {"tensors": tensors}, {"nulls": nulls, "variants": variants}


def pick(stored: dict[str, Tensor], words: Tensor, width: int, n: int) -> list[tuple[int, int, int, int]]:
    """(layer, neuron, sign, token) of the n neurons with the highest z whose top token, of +w or -w, is a word."""
    top = stored["ids"][:, :, 0].long()  # [L f, 2]
    z, sign = torch.where(words[top], stored["z"].float(), -torch.inf).max(1)
    return [(i // width, i % width, sign[i].item(), top[i, sign[i]].item()) for i in z.topk(n).indices.tolist()]


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
    """Mean over prompts and positions of |SiLU(g_j)| in every MLP named, [f]."""
    with torch.no_grad(), hooks.record(model, [f"{name}.gate_proj" for name in names]) as acts:
        model(input_ids=ids, logits_to_keep=1)
    return {name: torch.nn.functional.silu(acts[f"{name}.gate_proj"]).abs().mean((0, 1)) for name in names}


def clamped(method, model, tokenizer) -> Files:
    lee, mlps = datasets.load("lee"), method.gated_mlps(model)
    width = method.neuron_vectors(model, 0).shape[0]
    chosen = pick(papers.tensors(NAME), whole_words(tokenizer, lee.texts), width, NEURONS)
    prompts = torch.tensor(tokenizer([*method.HALF_A, *method.HALF_B])["input_ids"])
    half = len(method.HALF_A)
    used = [mlps[layer] for layer in sorted({layer for layer, *_ in chosen})]
    size, gate = ranges(model, used, chunks(lee.texts, tokenizer)[:16]), gates(model, used, prompts)
    clean = method.log_p(model, prompts)  # [12, V]
    unit, rows = torch.nn.functional.normalize, []
    for i, (layer, neuron, sign, token) in enumerate(chosen):
        others = torch.randperm(width, generator=torch.Generator().manual_seed(i)).tolist()
        controls = [j for j in others if j != neuron][:3]
        unrelated = next(t for *_, t in (chosen * 2)[i + 1 :] if t != token)
        e = unit(model.lm_head.weight.detach()[token], dim=0)
        for site, role, j in [(s, r, j) for s in ("up", "product") for r, j in enumerate([neuron, *controls])]:
            doses = DOSES if role < 2 and site == "up" else DOSES[2:4]
            c = torch.tensor(doses) * size[site, mlps[layer]][neuron]  # controls too are held at the neuron's own c
            change = method.held_log_p(model, prompts, layer, j, c, site) - clean
            write = unit(method.neuron_vectors(model, layer, "down_proj")[j], dim=0)
            facts = (gate[mlps[layer]][j].item(), (write @ e).item())
            for target, name in ((token, "neuron" if role == 0 else f"control {role}"), (unrelated, "unrelated token")):
                if name == "unrelated token" and role:
                    continue
                for dose, value, by_prompt in zip(doses, c.tolist(), change[:, :, target], strict=True):
                    a, b = by_prompt[:half].mean().item(), by_prompt[half:].mean().item()
                    rows.append((i, layer, j, "+-"[sign], site, name, target, dose, value, a, b, *facts))
        print("neuron", i, flush=True) if i % 10 == 9 else None
    columns = "case layer neuron sign site role token dose c change_A change_B gate write".split()
    return {}, {"clamp": pd.DataFrame(rows, columns=columns)}


def tuned(method, model, tokenizer) -> Files:
    lee = datasets.load("lee")
    train, test = chunks(lee.texts, tokenizer), chunks(lee.test, tokenizer)[:24]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

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
    losses.append(test_loss())
    names = [f"{mlp}.up_proj.weight" for mlp in method.gated_mlps(model)] + ["model.embed_tokens.weight"]
    after = dict(model.named_parameters())
    change = torch.stack([(after[name].detach() - before[name]).norm() for name in names])
    ids = method.decode(all_vectors(method, model), model.lm_head.weight.detach(), k=1).ids[:, 0, 0]
    noisy = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for name, size in zip(names, change, strict=True):
            noise = torch.randn(before[name].shape, generator=generator)
            after[name].data.copy_(before[name] + noise * (size / noise.norm()))
        found = method.decode(all_vectors(method, model, every=EVERY), model.lm_head.weight.detach(), k=1)
        noisy.append(found.ids[:, 0, 0])
    relative = change / torch.stack([before[name].norm() for name in names])
    found = {"ids": ids.to(torch.uint16), "noise_ids": torch.stack(noisy).to(torch.uint16),
             "relative_change": relative, "test_loss": torch.tensor(losses)}  # fmt: skip
    return {"tuned": found}, {}


PARTS = {"decode": decoded, "clamp": clamped, "tune": tuned}


def build(out: Path, part: str) -> list[Path]:
    method, paths = papers.method(NAME), []
    for name in PARTS if part == "all" else (part,):
        runtime.deterministic(seed=0)
        tensors, tables = PARTS[name](method, models.load("smollm2"), models.tokenizer("smollm2"))
        for file, values in tensors.items():
            paths.append(out / f"{file}.safetensors")
            write_tensors(paths[-1], values)
        for file, table in tables.items():
            paths.append(out / f"{file}.csv")
            write_table(paths[-1], table, float_format="%.6g")
    return paths


if __name__ == "__main__":
    run(build, __doc__, part=part_option(*PARTS))
