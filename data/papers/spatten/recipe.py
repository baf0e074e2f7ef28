"""All tables of this folder: what notebooks/07-lean-transformers/12-spatten measures beforehand.

MiniLM: tokens of 480 WordNet glosses in three test sets pruned by 13 rules to half, by 7 to two other shares, heads by
five to one: topics that a probe of the whole network's embeddings gets right, and cosine to the whole embedding; the
same 13 for the 50 Lee documents, with the rank correlation to human similarities. SmolLM2: surprise at 16 tokens after
each of 16 prompts, cached tokens, values, heads and bits of keys pruned in 41 ways, and what each fetches. About 7
minutes on one core; a run that was stopped goes on where it was (delete the folder --work for a fresh start). The
functions are the notebook's method cells.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from nbkit import hooks
from nbkit.recipes import Work, part_option, run, work_option, write_table

TOPICS = (
    *("noun.plant", "noun.person", "noun.artifact", "noun.act"),
    *("noun.animal", "noun.state", "noun.substance", "noun.communication"),
)
PIECES, TRAINED, TESTED, SETS = 24, 150, 20, 3  # word pieces of a gloss; glosses of a topic; test sets
LEE = 51  # word pieces of a Lee document: the shortest has as many
HEADS = 0.75
LOT = ("random 0", "random 1", "random 2")
LOT_KEPT = ("random, ends kept 0", "random, ends kept 1", "random, ends kept 2")
TOKEN_ARMS = (
    *("cascade", "local", *LOT, *LOT_KEPT, "first tokens", "rare words", "magnitude", "least voted"),
    "cascade, ends kept",
)
FEW_TOKEN_ARMS = ("cascade", *LOT, *LOT_KEPT)  # where not half of the tokens stay
HEAD_ARMS = ("cascade", "local", *LOT)

PROMPTS, PROMPT, TOLD = 16, 167, 16
FINAL = PROMPT + TOLD  # tokens cached at the last step
SINKS = 4
PRUNED_FROM = 5  # SmolLM2's first pruned layer, 15 % of 30


def the_method():
    from nbkit import papers

    return papers.method("spatten")


# texts


def cut(tokenizer, texts, length: int) -> Tensor:
    """[CLS], the first ``length`` word pieces and [SEP] of each text that has as many: [n, length + 2]."""
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    return torch.tensor([[first, *row[:length], last] for row in rows if len(row) >= length])


@cache
def glosses(trained: int = TRAINED, tested: int = TESTED) -> dict:
    """ids and topics of the training glosses and of three test sets, all disjoint, topics equally often."""
    from nbkit import datasets, models

    words, tokenizer = datasets.load("wordnet"), models.tokenizer("minilm")
    generator = torch.Generator().manual_seed(0)
    parts = {name: [] for name in ("train", *range(SETS))}
    for topic in TOPICS:
        texts = [d for d, t in zip(words.definitions, words.topics, strict=True) if t == topic and len(d) > 80]
        ids = cut(tokenizer, texts, PIECES)
        ids = ids[torch.randperm(len(ids), generator=generator)]
        parts["train"].append(ids[:trained])
        for s in range(SETS):
            parts[s].append(ids[TRAINED + TESTED * s :][:tested])
    return {
        name: (torch.cat(part), torch.arange(len(TOPICS)).repeat_interleave(len(part[0])))
        for name, part in parts.items()
    }


def frequency(ids: Tensor, vocabulary: int) -> Tensor:
    """In how many rows each token occurs, [vocabulary]."""
    found = torch.zeros(len(ids), vocabulary).scatter(1, ids, 1.0)
    return found.sum(0)


# the encoder


def token_rule(arm: str, seen: Tensor, generator: torch.Generator):
    """What an arm ranks by: a function of a Stage. ``seen`` [n, L]: in how many other texts each token occurs."""

    def scores(stage) -> Tensor:
        if arm.startswith("cascade"):
            found = stage.total
        elif arm == "local":
            found = stage.last
        elif arm == "least voted":
            found = -stage.total
        elif arm == "magnitude":
            found = stage.hidden.norm(dim=-1)
        elif arm == "first tokens":
            found = -stage.places.float()
        elif arm == "rare words":
            found = -seen.gather(1, stage.places)
        else:
            found = torch.rand(stage.places.shape, generator=generator)
        if "ends kept" in arm or arm == "rare words":
            ends = (stage.places == 0) | (stage.places == seen.shape[1] - 1)
            found = found.masked_fill(ends, torch.inf)
        return found

    return scores


def head_rule(arm: str, generator: torch.Generator):
    if arm in ("cascade", "local"):
        return lambda stage: stage.total if arm == "cascade" else stage.last
    return lambda stage: torch.rand(stage.total.shape, generator=generator)


def embedded(method, model, ids: Tensor, settings=None, tokens=None) -> tuple[Tensor, object]:
    """Mean over the tokens left, [n, D], in batches of 40; and the costs."""
    parts, bills = [], []
    for start in range(0, len(ids), 40):
        some = ids[start : start + 40]
        given = settings(start, len(some)) if settings else {}
        all_left = [ids.shape[1]] * model.config.num_hidden_layers
        output, log = method.encode(model, some, tokens or all_left, **given)
        parts.append(output.last_hidden_state.mean(1))
        bills.append(method.cost(log))
    return torch.cat(parts), bills[0]


def pruned(method, model, ids: Tensor, seen: Tensor, kind: str, arm: str, keep: float, seed: int):
    """Embeddings of the texts, one arm; and the costs."""
    generator = torch.Generator().manual_seed(seed)

    def settings(start: int, n: int) -> dict:
        if kind == "tokens":
            return {"rule": token_rule(arm, seen[start : start + n], generator)}
        heads = method.schedule(model.config.num_attention_heads, layers, 1 - keep, skip=0.3)
        return {"heads": heads, "head_rule": head_rule(arm, generator)}

    layers = model.config.num_hidden_layers
    if kind == "tokens":
        return embedded(method, model, ids, settings, method.schedule(ids.shape[1], layers, 1 - keep))
    return embedded(method, model, ids, settings)


@cache
def minilm():
    from nbkit import models

    return the_method().prepared(models.load("minilm"))


@cache
def probe():
    """Logistic regression on the whole network's embeddings of the training glosses; C by five-fold validation."""
    from sklearn.linear_model import LogisticRegressionCV

    ids, y = glosses()["train"]
    x = whole(ids)
    grid = {"Cs": [0.1, 1.0, 10.0, 100.0], "cv": 5, "max_iter": 2000, "random_state": 0}
    return LogisticRegressionCV(**grid, use_legacy_attributes=False, scoring="accuracy", l1_ratios=(0,)).fit(x, y)


def whole(ids: Tensor) -> Tensor:
    return embedded(the_method(), minilm(), ids)[0]


def topics(kind: str, arm: str, keep: float) -> list[dict]:
    """A row a test set: accuracy, cosine, costs, and which texts were right (a bit a text, in hex)."""
    method, model, rows = the_method(), minilm(), []
    often = frequency(glosses()["train"][0], model.config.vocab_size)
    for s in range(SETS):
        ids, y = glosses()[s]
        seed = 1000 * s + 100 * int(100 * keep) + TOKEN_ARMS.index(arm) if arm in TOKEN_ARMS else s
        x, bill = (
            (whole(ids), None)
            if kind == "whole"
            else pruned(method, model, ids, often[ids], kind, arm, keep, seed)
        )
        right = probe().predict(x.numpy()) == y.numpy()
        row = {"kind": kind, "arm": arm, "keep": keep, "set": s, "accuracy": round(float(right.mean()), 4)}
        row["cosine"] = round(F.cosine_similarity(x, whole(ids) if kind == "whole" else known(s)).mean().item(), 4)
        row["right"] = np.packbits(right).tobytes().hex()
        rows.append(row)
    return rows


@cache
def known(s: int) -> Tensor:
    return whole(glosses()[s][0])


def leads(table: pd.DataFrame) -> pd.DataFrame:
    """Points of accuracy by which cascade is ahead of each rival, draws averaged: a row a rival, with each test set's
    lead, the mean and its standard error over all texts, paired."""
    hits = {}
    for row in table.itertuples():
        right = np.unpackbits(np.frombuffer(bytes.fromhex(row.right), dtype=np.uint8))
        arm = row.arm[:-2] if row.arm[-1].isdigit() else row.arm
        hits.setdefault((row.kind, row.keep, arm), {}).setdefault(row.set, []).append(100.0 * right)
    hits = {key: np.stack([np.mean(sets[s], axis=0) for s in range(SETS)]) for key, sets in hits.items()}
    rows = []
    for (kind, keep, arm), values in hits.items():
        if kind != "whole" and arm != "cascade":
            gap = hits[kind, keep, "cascade"] - values
            row = {"kind": kind, "keep": keep, "rival": arm}
            row |= {f"set {s}": gap[s].mean() for s in range(SETS)}
            rows.append(row | {"lead": gap.mean(), "error": gap.std(ddof=1) / gap.size**0.5})
    return pd.DataFrame(rows).round(3)


def documents(kind: str, arm: str, keep: float) -> list[dict]:
    """Lee: Spearman of the 1,225 cosines with the human similarities, and the cosine to the whole embedding."""
    from scipy.stats import spearmanr

    from nbkit import datasets, models

    method, model, lee = the_method(), minilm(), datasets.load("lee")
    tokenizer = models.tokenizer("minilm")
    ids = cut(tokenizer, lee.test, LEE)
    often = frequency(cut(tokenizer, lee.texts, LEE), model.config.vocab_size)
    full = whole(ids)
    seed = 100 * int(100 * keep) + TOKEN_ARMS.index(arm) if arm in TOKEN_ARMS else 0
    x = full if kind == "whole" else pruned(method, model, ids, often[ids], kind, arm, keep, seed)[0]
    i, j = np.triu_indices(len(ids), 1)
    unit = F.normalize(x, dim=-1)
    found = spearmanr((unit @ unit.T).numpy()[i, j], lee.similarity[i, j]).statistic
    row = {"kind": kind, "arm": arm, "keep": keep, "spearman": round(float(found), 4)}
    return [row | {"cosine": round(F.cosine_similarity(x, full).mean().item(), 4)}]


# generation


@cache
def prompted(part: str):
    """SmolLM2, the windows of a part, and the prompts read: evaluation texts, or calibration texts."""
    from nbkit import datasets, language, models

    method = the_method()
    model = method.prepared(models.load("smollm2"))
    texts = datasets.load("lee").texts
    texts = texts[:150] if part == "calibration" else texts[150:]
    ids, _ = language.token_windows(models.tokenizer("smollm2"), texts, FINAL + 1, n=PROMPTS, seed=0)
    with hooks.record(model, [f"model.layers.{PRUNED_FROM}"], at="input") as seen:
        prompt = method.read(model, ids[:, :PROMPT])
        norms = seen[f"model.layers.{PRUNED_FROM}"].norm(dim=-1)
    return model, ids, prompt, norms


def priorities(arm: str, ids: Tensor, norms: Tensor) -> Tensor:
    """Fixed priorities [n, FINAL] of cached tokens, for rules that look at no attention."""
    from nbkit import datasets, models

    place = torch.arange(float(FINAL)).expand(len(ids), -1)
    if arm == "first tokens":
        return -place
    if arm == "magnitude":  # of a new token: the median, for its state is not known before
        new = norms.median(1, keepdim=True).values.expand(-1, TOLD)
        return torch.cat([norms, new], 1)
    if arm == "rare words":
        texts = datasets.load("lee").texts[:150]
        found = torch.zeros(49152)
        for row in models.tokenizer("smollm2")(list(texts), verbose=False)["input_ids"]:
            found[torch.tensor(row).unique()] += 1
        return -found[ids[:, :FINAL]]
    seed = int(arm[-1]) if arm[-1].isdigit() else 0
    score = torch.rand(place.shape, generator=torch.Generator().manual_seed(seed)) if "random" in arm else place
    return score.masked_fill(place < SINKS, torch.inf) if "ends kept" in arm else score


GENERATION_ARMS = (
    *("cascade", "per query", "local", *LOT, *LOT_KEPT, "recent", "recent, ends kept"),
    *("first tokens", "rare words", "magnitude"),
)
FEW_ARMS = ("cascade", "per query", *LOT, "recent, ends kept")
BITS = {
    **{f"{b} bits": (b, 0, 0.0) for b in (4, 5, 6, 7)},
    **{f"{m}+4, tau {t}": (m, 4, t) for m in (4, 6) for t in (0.0, 0.1)},
    **{f"4+4, middle, tau {t}": (4, 4, t, True) for t in (0.0, 0.1, 0.4)},
}
TOGETHER = {0.5: {"bits": BITS["6+4, tau 0.1"], "values": 0.5}, 0.35: {"bits": BITS["4+4, tau 0.1"], "values": 0.9}}


def arms() -> dict[tuple, dict]:
    """(what, arm, keep) -> the settings of ``surprise``, a rule by its name."""
    found = {("none", "none", 1.0): {}}
    found |= {("tokens", arm, 0.5): {"keep": 0.5, "rule": arm} for arm in GENERATION_ARMS}
    found |= {("tokens", arm, keep): {"keep": keep, "rule": arm} for arm in FEW_ARMS for keep in [0.4]}
    found |= {("bits", name, 1.0): {"bits": bits} for name, bits in BITS.items()}
    found |= {("values", "local", 0.3): {"values": 0.7}}
    found |= {("heads", arm, 0.75): {"heads": 0.75, "head_rule": arm} for arm in ("cascade", *LOT)}
    for keep, others in TOGETHER.items():
        found |= {("all", arm, keep): {"keep": keep, "rule": arm} | others for arm in ("cascade", "per query")}
    return found


def settled(method, given: dict, ids: Tensor, norms: Tensor) -> dict:
    """Settings by name as ``surprise`` takes them."""
    settings = {name: given[name] for name in ("values", "bits") if name in given}
    if "keep" in given:
        settings["tokens"] = method.schedule(FINAL, 30, 1 - given["keep"])
        arm = given["rule"]
        named = {"cascade": method.cascade, "per query": method.per_query, "local": lambda stage: stage.last}
        fixed = None if arm in named else priorities(arm, ids, norms)
        settings["rule"] = named.get(arm, lambda stage: fixed[:, : stage.total.shape[1]])
    if "heads" in given:
        settings["heads"] = method.schedule(9, 30, 1 - given["heads"], skip=0.3)
        generator = torch.Generator().manual_seed(LOT.index(given["head_rule"]) if given["head_rule"] in LOT else 0)
        settings["head_rule"] = head_rule(given["head_rule"], generator)
    return settings


def generation(part: str, given: dict) -> dict:
    """Mean surprise of each prompt's tokens, and what was fetched a prompt."""
    method = the_method()
    model, ids, prompt, norms = prompted(part)
    told, log = method.surprise(model, prompt, ids[:, PROMPT:], **settled(method, given, ids, norms))
    return {"nats": [round(v, 4) for v in told.mean(1).tolist()], "bill": list(method.cost(log))}


def tables(found: dict[tuple, dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a setting and prompt; a row a setting with its costs as shares of the whole cache's."""
    nats, costs = [], []
    rows, bits, bytes_, macs = found["none", "none", 1.0]["bill"][:4]
    for (what, arm, keep), one in found.items():
        about = {"what": what, "arm": arm, "keep": keep}
        nats += [about | {"prompt": p, "nats": v} for p, v in enumerate(one["nats"])]
        bill = one["bill"]
        shares = {"rows": bill[0] / rows, "bytes": bill[2] / bytes_, "macs": bill[3] / macs}
        costs.append(about | shares | {"key bits": 16 * bill[1] / bill[0] / (bits / rows), "rate": bill[4] / bill[5]})
    return pd.DataFrame(nats), pd.DataFrame(costs).round(4)


def build(out: Path, work: Path, part: str) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept, written = Work(work), []
    if part in ("all", "encoder"):
        half = [("whole", "whole", 1.0), *(("tokens", arm, 0.5) for arm in TOKEN_ARMS)]
        more = [("tokens", arm, keep) for keep in (0.7, 0.4) for arm in FEW_TOKEN_ARMS]
        more += [("heads", arm, HEADS) for arm in HEAD_ARMS]
        for name, measure, cases in (("topics", topics, half + more), ("documents", documents, half)):
            rows = []
            for case in cases:
                rows += kept.once(f"{name}-{'-'.join(map(str, case))}", partial(measure, *case))
            write_table(out / f"{name}.csv", pd.DataFrame(rows))
            written.append(out / f"{name}.csv")
        write_table(out / "leads.csv", leads(pd.read_csv(out / "topics.csv")))
        written.append(out / "leads.csv")
    if part in ("all", "generation"):
        exam = {name: {"bits": BITS[name]} for name in ("4 bits", "6 bits", "6+4, tau 0.1")} | {"none": {}}
        tried = {
            name: kept.once(f"calibration-{name}", partial(generation, "calibration", given))
            for name, given in exam.items()
        }
        rows = [{"arm": n, "prompt": p, "nats": v} for n, one in tried.items() for p, v in enumerate(one["nats"])]
        prompted.cache_clear()
        found = {
            key: kept.once(f"generation-{'-'.join(map(str, key))}", partial(generation, "evaluation", given))
            for key, given in arms().items()
        }
        for name, table in zip(("generation", "costs"), tables(found), strict=True):
            write_table(out / f"{name}.csv", table)
        write_table(out / "calibration.csv", pd.DataFrame(rows))
        written += [out / f"{name}.csv" for name in ("generation", "costs", "calibration")]
    return written


if __name__ == "__main__":
    run(build, __doc__, work=work_option("spatten"), part=part_option("encoder", "generation"))
