"""results, tuning, rates, settings, groups, noise (all .csv.gz) and pool.safetensors: what
notebooks/05-data/02-quad-data-selection measures beforehand.

2,400 chunks of 64 tokens, 800 of each source: news of lee, manual pages, entries of wordnet. 30 % are corrupted: 10 %
shuffled (the chunk's tokens in a random order), 10 % boilerplate (one of eight passages of 16 tokens, four times), 10 %
spliced (its second half is of another source). Other documents of the same sources give a first model its 900 chunks,
a reference its chunks and an evaluation its 288. A seed draws 1,800 of the 2,400 as its pool, trains its own model of
two layers for 200 steps, and draws its own reference of 64 chunks: news alone, or all three sources.

- embed: MiniLM's embedding of every chunk, for the clusters and for the rival that goes by likeness.
- scores: of every chunk of a pool, each form of influence, and what the rivals go by.
- tune: the learning rate of every selector, and the bandits' alpha, on a seed of their own, by the reference's loss.
- train: the model goes on with what each selector took, 24 steps of 16 chunks; loss on the evaluation.
- rates: the same losses where selectors share a learning rate.
- settings: what Quad takes where one of its settings is another; nothing is trained.
- groups: a group of 16 chunks of each cluster; the model takes three Adam steps on each; what the reference gains.
- noise: the corrupted share of Quad's selection when the scores stand in a random order.

About ten minutes on one core; a stopped run goes on where it was (delete the folder --work for a fresh start).
The functions are the notebook's method cells.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from nbkit import datasets, forward, language, models, papers, runtime, training
from nbkit.recipes import Work, part_option, run, work_option, write_table, write_tensors

SLUG = "quad-data-selection"
SOURCES = ("news", "manual", "gloss")
CLEAN, KINDS = "clean", ("shuffled", "boilerplate", "spliced")
LENGTH, PER_SOURCE, PER_KIND = 64, 800, 80
POOL, REFERENCE, BASIS = 1800, 64, 256  # a seed's pool, reference, chunks for the factors
SEEDS, TUNING = (0, 1, 2, 3, 4), 9
REFERENCES = ("news", "all")
BUDGET = 360
STEPS, BATCH = 24, 16
CLUSTERS, ALPHAS = 24, (0.1, 0.5, 2.0)  # alpha in standard deviations of a sample of scores
RATES = (3e-4, 1e-3, 3e-3, 9e-3)
SHARED = {"news": (1e-3, 3e-3), "all": RATES[:3]}  # rates at which selectors are compared alike
SETTINGS = {  # one of Quad's settings changed: K, or an argument of bandit
    "as trained": {},
    "12 clusters": {"K": 12},
    "48 clusters": {"K": 48},
    "96 clusters": {"K": 96},
    "tau 1 sd lower": {"margin": -1.0},
    "tau 0.75 sd higher": {"margin": 0.75},
    "alpha 2 sd": {"alpha": 2.0},
    "alpha 10 sd": {"alpha": 10.0},
    "pieces of 3, all read": {"take": 3},
    "pieces of 12, 6 read": {"take": 12, "draw": 6},
    "1 of 6 read": {"draw": 1},
    "6 of 6 read": {"draw": 6},
    "neighbours to 0.8": {"near": 0.8},
    "24 clusters a round": {"width": 24},
}


# --- texts


def documents() -> dict[str, list[str]]:
    """Of each source its documents, in a random order; an entry of wordnet is a document."""
    rng = np.random.default_rng(0)
    wordnet, lee = datasets.load("wordnet"), datasets.load("lee")
    entries = [
        (topic, f"{', '.join(words)} ({part}): {definition}" + "".join(f'; "{one}"' for one in examples))
        for topic, words, part, definition, examples in zip(
            wordnet.topics, wordnet.words, wordnet.parts, wordnet.definitions, wordnet.examples, strict=True
        )
    ]
    found = {"news": [*lee.texts, *lee.test], "manual": list(datasets.load("manpages").documents.values())}
    found = {name: [texts[i] for i in rng.permutation(len(texts))] for name, texts in found.items()}
    topics = sorted({topic for topic, _ in entries})
    by_topic = {topic: [text for other, text in entries if other == topic] for topic in topics}
    groups = []  # of entries of one topic, together long enough for a chunk
    for topic in topics:
        order = rng.permutation(len(by_topic[topic]))[:480]
        groups += ["\n".join(by_topic[topic][i] for i in order[k : k + 8]) for k in range(0, len(order) - 7, 8)]
    return {**found, "gloss": [groups[i] for i in rng.permutation(len(groups))]}


def cut(texts: list[str], most: int) -> Iterator[list[list[int]]]:
    """Of every document its chunks of 64 tokens, at most ``most``, evenly spread over it."""
    tokenizer = models.tokenizer("tiny-llama")
    for first in range(0, len(texts), 100):
        for ids in tokenizer(texts[first : first + 100], add_special_tokens=False)["input_ids"]:
            whole = len(ids) // LENGTH
            places = np.linspace(0, whole - 1, min(most, whole)).round().astype(int) if whole else []
            yield [ids[p * LENGTH : (p + 1) * LENGTH] for p in places]


@cache
def texts() -> dict[str, Tensor]:
    """Token numbers: "pool" [2400, 64], "first" [900, 64], "news" and "all" [.., 64] references, "evaluation"
    [288, 64], 96 a source; "kind" [2400] (0 clean), "source" [2400]."""
    sizes = {"first": 300, "reference": 200, "evaluation": 96, "pool": PER_SOURCE}
    most, rng = {"news": 12, "manual": 4, "gloss": 1}, np.random.default_rng(1)
    parts: dict[str, list] = {use: [] for use in sizes}
    for source, group in documents().items():
        cuts = cut(group, most[source])
        for use, size in sizes.items():
            chunks: list = []
            while len(chunks) < size:  # whole documents: none is in two uses
                chunks += next(cuts)
            parts[use].append([chunks[i] for i in sorted(rng.choice(len(chunks), size, replace=False))])
    reference = torch.tensor(parts["reference"])
    pool, kind = corrupted(torch.tensor(parts["pool"]).flatten(0, 1), rng)
    return {
        "pool": pool,
        "kind": kind,
        "source": torch.arange(3).repeat_interleave(PER_SOURCE),
        "first": torch.tensor(parts["first"]).flatten(0, 1),
        "news": reference[0],
        "all": reference.flatten(0, 1),
        "evaluation": torch.tensor(parts["evaluation"]).flatten(0, 1),
    }


def corrupted(clean: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The pool with 80 chunks of each kind and source spoilt, and the kinds."""
    pool, kind = clean.clone(), torch.zeros(len(clean), dtype=torch.long)
    passages = clean[rng.choice(len(clean), 8, replace=False), :16]
    for source in range(3):
        some = source * PER_SOURCE + rng.permutation(PER_SOURCE)[: 3 * PER_KIND].reshape(3, PER_KIND)
        for number, rows in enumerate(some, start=1):
            kind[rows] = number
            for i in rows:
                if number == 1:
                    pool[i] = clean[i][rng.permutation(LENGTH)]
                elif number == 2:
                    pool[i] = passages[rng.integers(8)].roll(int(rng.integers(16))).repeat(4)
                else:
                    other = (source + rng.integers(1, 3)) % 3 * PER_SOURCE + rng.integers(PER_SOURCE)
                    pool[i, LENGTH // 2 :] = clean[other, LENGTH // 2 :]
    return pool, kind


def embed(ids: Tensor) -> Tensor:
    """MiniLM's embedding of every chunk, length 1, [N, 384]."""
    model, tokenizer, words = models.load("minilm"), models.tokenizer("minilm"), models.tokenizer("tiny-llama")
    parts = []
    for some in ids.split(64):
        inputs = tokenizer(words.batch_decode(some), padding=True, truncation=True, max_length=96, return_tensors="pt")
        with forward.evaluating(model), torch.no_grad():
            parts.append(models.mean_pool(model(**inputs), inputs["attention_mask"]))
    return F.normalize(torch.cat(parts), dim=1)


@cache
def embeddings(work: Path) -> dict[str, Tensor]:
    file = work / "embeddings.pt"
    if not file.is_file():
        torch.save({use: embed(texts()[use]) for use in ("pool", "all")}, file)
    return torch.load(file, weights_only=True)


def clusters(points: Tensor, K: int = CLUSTERS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """k-means: the cluster of every row, and the cosine distances between centroids, [K, K]."""
    from sklearn.cluster import KMeans

    found = KMeans(K, n_init=2, random_state=seed).fit(points.numpy())
    centres = F.normalize(torch.from_numpy(found.cluster_centers_), dim=1)
    distance = (1 - centres @ centres.T).clamp(min=0).fill_diagonal_(0)
    return found.labels_, distance.double().numpy()


# --- models


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def go_on(model, ids: Tensor, steps: int, lr: float, seed: int):
    """Train in place, batches of 16; the learning rate falls to 0 as a cosine."""
    training.fit(model, ids, ids, steps=steps, lr=lr, batch=BATCH, optimizer="adamw", weight_decay=0.1,
                 schedule=training.cosine(), loss=next_token, seed=seed)  # fmt: skip
    return model


def first_model(seed: int, steps: int = 200):
    """The model that scores: two layers, trained briefly on other documents."""
    return go_on(models.build("tiny-llama", seed=seed, layers=2), texts()["first"], steps, 4e-3, seed).eval()


@cache
def trained(work: Path, seed: int):
    file, model = work / f"model-{seed}.pt", models.build("tiny-llama", seed=seed, layers=2)
    if not file.is_file():
        torch.save(first_model(seed).state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def drawn(seed: int, reference: str) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """A seed's pool (rows of the 2,400), the rows of its reference and their tokens."""
    pool = np.sort(np.random.default_rng((seed, 1)).choice(3 * PER_SOURCE, POOL, replace=False))
    rows = np.random.default_rng((seed, 2)).choice(200 if reference == "news" else 600, REFERENCE, replace=False)
    return pool, rows, texts()["all"][rows]


# --- scores


VARIANTS = {  # name -> layers, form, damping, relative, cosine
    "both": ("both", "EK-FAC", 0.1, True, True),
    "both, dot": ("both", "EK-FAC", 0.1, True, False),
    "MLP": ("MLP", "EK-FAC", 0.1, True, True),
    "attention": ("attention", "EK-FAC", 0.1, True, True),
    "identity": ("both", "identity", 1.0, False, True),
    "identity, dot": ("both", "identity", 1.0, False, False),
    "identity, MLP": ("MLP", "identity", 1.0, False, True),
    "K-FAC": ("both", "K-FAC", 0.1, True, True),
    "damping 0.001": ("both", "EK-FAC", 0.001, False, True),
    "damping 10": ("both", "EK-FAC", 10.0, True, True),
    "damping 0.01": ("both", "EK-FAC", 0.01, True, True),
}


def layers_of(method, model, kind: str) -> list[str]:
    return method.linear_layers(model, {"both": method.ATTENTION + method.MLP, "MLP": method.MLP,
                                        "attention": method.ATTENTION}[kind])  # fmt: skip


def all_scores(method, model, ids: Tensor, references: dict[str, Tensor], basis: Tensor) -> dict[str, np.ndarray]:
    """{f"{reference}: {variant}": [N]} in one pass over the pool."""
    every = layers_of(method, model, "both")
    factors, directions = method.ekfac(model, basis, every), []
    for chunks in references.values():
        for kind, form, damping, relative, cosine in VARIANTS.values():
            some = {name: factors[name] for name in layers_of(method, model, kind)}
            U = method.direction(model, chunks, some, damping=damping, relative=relative, form=form, cosine=cosine)
            directions.append({name: U.get(name, torch.zeros_like(factors[name].Lambda)) for name in every})
    stacked = {name: torch.stack([U[name] for U in directions]) for name in every}
    dots, squares = method.layer_scores(model, ids, stacked)  # [N, L, K], [N, L]
    found, k = {}, 0
    for reference in references:
        for variant, (kind, _, _, _, cosine) in VARIANTS.items():
            keep = [name in layers_of(method, model, kind) for name in every]
            score = dots[:, keep, k].sum(1)
            found[f"{reference}: {variant}"] = (score / squares[:, keep].sum(1).sqrt() if cosine else score).numpy()
            k += 1
    return found


def seen_bigrams() -> set[int]:
    first = texts()["first"]
    return set((first[:, :-1] * 1024 + first[:, 1:]).flatten().tolist())


def plain_look(ids: Tensor) -> dict[str, np.ndarray]:
    """What needs no model: the share of different tokens, the share of token pairs that the first texts lack."""
    known = seen_bigrams()
    pairs = (ids[:, :-1] * 1024 + ids[:, 1:]).tolist()
    return {
        "different": np.array([len(set(row)) / LENGTH for row in ids.tolist()]),
        "novel": np.array([np.mean([pair not in known for pair in row]) for row in pairs]),
    }


@cache
def measured(work: Path, seed: int) -> dict:
    """All that the selectors of a seed go by."""
    file = work / f"scores-{seed}.pt"
    if not file.is_file():
        method, model = papers.method(SLUG), trained(work, seed)
        pool, points = drawn(seed, "all")[0], embeddings(work)
        ids = texts()["pool"][pool]
        basis = ids[np.random.default_rng((seed, 3)).choice(POOL, BASIS, replace=False)]
        found = all_scores(method, model, ids, {name: drawn(seed, name)[2] for name in REFERENCES}, basis)
        for name in REFERENCES:
            alike = points["pool"][pool] @ points["all"][drawn(seed, name)[1]].T  # mean of the five most alike
            found[f"{name}: likeness"] = alike.topk(5, dim=1).values.mean(1).numpy()
        found["loss"] = language.nll(model, ids, batch=64).mean(1).numpy()
        found |= plain_look(ids)
        labels, distance = clusters(points["pool"][pool], seed=seed)
        torch.save({"pool": pool, "found": found, "cluster": labels, "distance": distance}, file)
        print(f"scores {seed}", flush=True)
    at = torch.load(file, weights_only=False)
    return at | {"points": embeddings(work)["pool"][at["pool"]].numpy()}


# --- selectors


BANDITS = {
    "Quad": ("both", None),
    "Quad, alpha 0": ("both", 0.0),
    "Quad, MLP only": ("MLP", None),
    "Quad, identity": ("identity", None),
    "bandit, no influence": (None, None),
}
TOPS = {"top-k influence": "both", "likeness to reference": "likeness"}
ALL_SOURCES = ("Quad", "top-k influence", "random", "plain filter")
EQUAL = "regression, as few scores"
NO_REFERENCE = ("random", "uniform over clusters", "low perplexity", "middle perplexity", "plain filter", "clean only",
                "bandit, no influence")  # fmt: skip
RIVALS = ("uniform over clusters", "low perplexity", "middle perplexity", "likeness to reference",
          "bandit, no influence", "Quad, alpha 0")  # fmt: skip
SELECTORS = (*BANDITS, *TOPS, *[name for name in NO_REFERENCE if name not in BANDITS])


def bandit(quad, at: dict, score: np.ndarray, budget: int, alpha: float, seed: int, margin: float = 0.0, **options):
    """alpha in standard deviations of a sample of 100 scores; tau their mean, and ``margin`` deviations more."""
    sample = score[np.random.default_rng((seed, 4)).choice(len(score), 100, replace=False)]
    sd, mean = float(sample.std()), float(sample.mean())
    return quad(score, at["cluster"], at["distance"], budget, alpha=alpha * sd, tau=mean + margin * sd, seed=seed,
                **options)  # fmt: skip


def regression(quad, at: dict, score: np.ndarray, budget: int, alpha: float, seed: int) -> np.ndarray:
    """The best by a ridge regression of scores on embeddings; it reads as many scores as Quad, drawn at random."""
    from sklearn.linear_model import RidgeCV

    pulls = bandit(quad, at, score, budget, alpha, seed)[1]
    seen = np.random.default_rng((seed, 8)).choice(len(score), 3 * len(pulls), replace=False)
    guess = RidgeCV(np.logspace(-3, 2, 11)).fit(at["points"][seen], score[seen]).predict(at["points"])
    guess[seen] = score[seen]
    return np.argsort(-guess, kind="stable")[:budget]


def select(method, at: dict, selector: str, reference: str, budget: int, alpha: float, seed: int) -> np.ndarray:
    """Places in the pool, ``budget`` of them."""
    found, n, rng = at["found"], len(at["pool"]), np.random.default_rng((seed, 5))
    lot = rng.permutation(n)
    if selector in BANDITS:
        variant, fixed = BANDITS[selector]
        score = np.zeros(n) if variant is None else found[f"{reference}: {variant}"]
        return bandit(method.quad, at, score, budget, alpha if fixed is None else fixed, seed)[0]
    if selector == EQUAL:
        return regression(method.quad, at, found[f"{reference}: both"], budget, alpha, seed)
    if selector in TOPS:
        return np.argsort(-found[f"{reference}: {TOPS[selector]}"], kind="stable")[:budget]
    if selector == "low perplexity":
        return np.argsort(found["loss"], kind="stable")[:budget]
    if selector == "middle perplexity":
        return np.argsort(np.abs(found["loss"].argsort().argsort() - n / 2), kind="stable")[:budget]
    if selector == "uniform over clusters":
        turn = np.zeros(n, int)  # which of its cluster a chunk is, in a random order
        for k in range(at["cluster"].max() + 1):
            own = lot[at["cluster"][lot] == k]
            turn[own] = np.arange(len(own))
        return lot[np.argsort(turn[lot], kind="stable")][:budget]
    if selector == "plain filter":  # no label is used: half of the tokens differ, and not among the 25 % strangest
        keep = lot[found["different"][lot] >= 0.5]
        keep = keep[found["novel"][keep] <= np.quantile(found["novel"][keep], 0.75)]
        return keep[:budget]
    if selector == "clean only":
        return lot[(texts()["kind"][at["pool"]] == 0).numpy()[lot]][:budget]
    return lot[:budget]


def describe(at: dict, chosen: np.ndarray, method) -> dict:
    kind, source = (texts()[name][at["pool"]][chosen].numpy() for name in ("kind", "source"))
    shares = {name: float((kind == k).mean()) for k, name in enumerate(KINDS, start=1)}
    return {"corrupted": float((kind > 0).mean()), **shares, "news": float((source == 0).mean()),
            "entropy": method.entropy(at["cluster"][chosen], CLUSTERS),
            "clusters": len(set(at["cluster"][chosen]))}  # fmt: skip


def losses(model, seed: int, reference: str) -> dict[str, float]:
    held = language.nll(model, texts()["evaluation"], batch=96).mean(1).view(3, 96).mean(1)
    return {"evaluation, news": float(held[0]), "evaluation, all": float(held.mean()),
            "reference loss": float(language.nll(model, drawn(seed, reference)[2], batch=64).mean())}  # fmt: skip


def one_run(method, work: Path, seed: int, reference: str, selector: str, budget: int, lr: float, alpha: float) -> dict:
    at = measured(work, seed)
    chosen = select(method, at, selector, reference, budget, alpha, seed)
    model = go_on(copy.deepcopy(trained(work, seed)), texts()["pool"][at["pool"]][chosen], STEPS, lr, seed)
    return {**describe(at, chosen, method), **losses(model, seed, reference)}


def tune(method, work: Work) -> pd.DataFrame:
    """Of each selector the rate, and Quad's alpha, of the lowest loss on the reference, on a seed of its own."""
    rows = [trial(method, work, "news", name, lr, ALPHAS[1]) for name in SELECTORS for lr in RATES]
    best = min((row for row in rows if row["selector"] == "Quad"), key=lambda row: row["reference loss"])["lr"]
    rows += [trial(method, work, "news", "Quad", best, alpha) for alpha in (ALPHAS[0], ALPHAS[2])]
    alpha = min((row for row in rows if row["selector"] == "Quad"), key=lambda row: row["reference loss"])["alpha"]
    rows += [trial(method, work, "news", EQUAL, lr, alpha) for lr in RATES]
    rows += [trial(method, work, "all", name, lr, alpha) for name in (*ALL_SOURCES, EQUAL) for lr in RATES[:3]]
    table = pd.DataFrame(rows)
    lowest = table.groupby(["reference", "selector"])["reference loss"].transform("min")
    return table.assign(taken=table["reference loss"] == lowest)


def trial(method, work: Work, reference: str, selector: str, lr: float, alpha: float) -> dict:
    job = partial(one_run, method, work.folder, TUNING, reference, selector, BUDGET, lr, alpha)
    found = work.once(f"tune {'' if reference == 'news' else 'all '}{selector} {lr:g} {alpha:g}", job)
    return {"reference": reference, "selector": selector, "lr": lr, "alpha": alpha, **found}


def train(method, work: Work, tuning: pd.DataFrame) -> pd.DataFrame:
    """alpha is Quad's for every bandit whose alpha is not fixed."""
    taken, rows = tuning[tuning["taken"]].set_index(["reference", "selector"]), []
    alpha = float(taken.loc[("news", "Quad"), "alpha"])
    runs = [("news", name) for name in (*SELECTORS, EQUAL)] + [("all", name) for name in (*ALL_SOURCES, EQUAL)]
    for seed in SEEDS:
        for reference, selector in runs:
            lr = float(taken.loc[(reference, selector), "lr"])
            job = partial(one_run, method, work.folder, seed, reference, selector, BUDGET, lr, alpha)
            found = work.once(f"train {seed} {reference} {selector} {lr:g} {alpha:g}", job)
            rows.append({"reference": reference, "selector": selector, "seed": seed, **found})
        for reference in REFERENCES:
            start = work.once(f"start {seed} {reference}", partial(losses, trained(work.folder, seed), seed, reference))
            rows.append({"reference": reference, "selector": "not trained on", "seed": seed, **start})
    table = pd.DataFrame(rows)
    news = table["reference"] == "news"
    return table.assign(evaluation=table["evaluation, news"].where(news, table["evaluation, all"]))


def rates(method, work: Work) -> pd.DataFrame:
    """The evaluation's loss of every seed at the same rates, whatever was tuned."""
    rows = []
    for reference, selectors in {"news": ("Quad", *TOPS), "all": ALL_SOURCES}.items():
        for selector in selectors:
            for seed, lr in product(SEEDS, SHARED[reference]):
                job = partial(one_run, method, work.folder, seed, reference, selector, BUDGET, lr, ALPHAS[0])
                found = work.once(f"train {seed} {reference} {selector} {lr:g} {ALPHAS[0]:g}", job)
                rows.append({"reference": reference, "selector": selector, "lr": lr, "seed": seed,
                             "evaluation": found[f"evaluation, {reference}"]})  # fmt: skip
    return pd.DataFrame(rows)


# --- settings


def settings(method, work: Work) -> pd.DataFrame:
    """What Quad takes with one setting changed; entropy always over the 24 clusters it was trained with."""
    rows = []
    for seed, (name, changed) in product(SEEDS, SETTINGS.items()):
        at, options = measured(work.folder, seed), {"alpha": ALPHAS[0]} | changed
        K = options.pop("K", CLUSTERS)
        if K != CLUSTERS:
            labels, distance = clusters(torch.from_numpy(at["points"]), K, seed=seed)
        else:
            labels, distance = at["cluster"], at["distance"]
        for reference in REFERENCES:
            other = {"cluster": labels, "distance": distance}
            chosen, log = bandit(method.quad, other, at["found"][f"{reference}: both"], BUDGET, seed=seed, **options)
            found = {key: describe(at, chosen, method)[key] for key in ("corrupted", "entropy")}
            scored = options.get("draw", 3) * len(log)
            rows.append({"reference": reference, "setting": name, "seed": seed, **found, "scored": scored})
    return pd.DataFrame(rows)


# --- groups


def groups(method, work: Work) -> pd.DataFrame:
    rows = []
    for seed in SEEDS:
        rows += work.once(f"groups {seed}", partial(one_seed_of_groups, work.folder, seed))
    return pd.DataFrame(rows)


def one_seed_of_groups(work: Path, seed: int) -> list[dict]:
    """Mean score of a group of 16 of each cluster, and what three Adam steps on each lower the reference's loss by."""
    at, rng, rows = measured(work, seed), np.random.default_rng((seed, 6)), []
    ids = texts()["pool"][at["pool"]]
    before = {name: losses(trained(work, seed), seed, name)["reference loss"] for name in REFERENCES}
    for k in range(CLUSTERS):
        own = rng.permutation(np.flatnonzero(at["cluster"] == k))
        for part in (own[:16],) if len(own) >= 16 else ():
            model = go_on(copy.deepcopy(trained(work, seed)), ids[part], 3, 1e-3, seed)
            for name in REFERENCES:
                after = float(language.nll(model, drawn(seed, name)[2], batch=64).mean())
                scores = {v: float(at["found"][f"{name}: {v}"][part].mean()) for v in [*VARIANTS, "likeness"]}
                rows.append({"seed": seed, "reference": name, "cluster": k, "gain": before[name] - after, **scores,
                             "minus loss": -float(at["found"]["loss"][part].mean())})  # fmt: skip
    return rows


# --- noise


def noise(method, work: Work, draws: int = 60) -> pd.DataFrame:
    """Quad's selection by scores that were shuffled over the pool: the corrupted share of pure noise."""
    rows = []
    for seed in SEEDS:
        at = measured(work.folder, seed)
        score = at["found"]["news: both"]
        for draw in range(draws):
            mixed = np.random.default_rng((seed, 7, draw)).permutation(score)
            chosen, _ = bandit(method.quad, at, mixed, BUDGET, ALPHAS[0], draw)
            rows.append({"seed": seed, "draw": draw, "corrupted": describe(at, chosen, method)["corrupted"]})
    return pd.DataFrame(rows)


# --- what the notebook draws and turns


def shown(work: Path) -> dict[str, Tensor]:
    """Seed 0's pool: rows, clusters and distances at three K, places on a map, scores in 16 bits."""
    from sklearn.manifold import TSNE

    at = measured(work, 0)
    points = embeddings(work)["pool"][at["pool"]]
    found = {"pool": torch.from_numpy(at["pool"]).short()}
    found["map"] = torch.from_numpy(TSNE(2, init="pca", random_state=0).fit_transform(points.numpy())).half()
    for K in (12, CLUSTERS, 48):
        labels, distance = (at["cluster"], at["distance"]) if K == CLUSTERS else clusters(points, K)
        found[f"cluster {K}"] = torch.from_numpy(labels).to(torch.uint8)
        found[f"distance {K}"] = torch.from_numpy(distance).half()
    for reference in REFERENCES:
        for variant in ("both", "MLP", "attention", "identity", "identity, dot", "both, dot"):
            score = torch.from_numpy(at["found"][f"{reference}: {variant}"])
            found[f"{reference}: {variant}"] = (score / score.std()).half()
    return found


def pool_of(kept: dict[str, Tensor]) -> tuple[Tensor, pd.DataFrame]:
    """Seed 0's pool as it is stored: tokens [1800, 64], and of every chunk its kind, source and place on the map."""
    rows = kept["pool"].long()
    names = dict(enumerate([CLEAN, *KINDS])), dict(enumerate(SOURCES))
    table = pd.DataFrame(kept["map"].float().numpy(), columns=["map x", "map y"])
    for column, words in zip(("kind", "source"), names, strict=True):
        table[column] = [words[k] for k in texts()[column][rows].tolist()]
    return texts()["pool"][rows], table


def choose(quad, kept, reference="news", form="both", alpha=ALPHAS[0], margin=0.0, K=CLUSTERS, budget=BUDGET):
    """What ``quad`` selects from it by the stored scores, and its pulls."""
    at = {"cluster": kept[f"cluster {K}"].numpy(), "distance": kept[f"distance {K}"].double().numpy()}
    return bandit(quad, at, kept[f"{reference}: {form}"].double().numpy(), budget, alpha, 0, margin)


def gains(model, layers: list[str], chunks: Tensor, reference: Tensor, eta: float) -> list[float]:
    """What the reference gains, divided by eta, from one plain step of gradient descent of these layers a chunk."""
    before, found = language.nll(model, reference, batch=64).mean(), []
    names = [f"{name}.weight" for name in layers]
    steps = training.example_gradients(model, {"input_ids": chunks}, chunks, loss=next_token, parameters=names)
    for i in range(len(chunks)):
        moved = copy.deepcopy(model)
        for name in names:
            moved.get_parameter(name).data -= eta * steps[name][i]
        found.append(float(before - language.nll(moved, reference, batch=64).mean()) / eta)
    return found


def build(out: Path, part: str, work: Path) -> list[Path]:
    runtime.deterministic(seed=0)
    method, work, tables, paths = papers.method(SLUG), Work(work), {}, []
    if part in ("all", "train"):
        tables["tuning"] = tune(method, work)
        tables["results"] = train(method, work, tables["tuning"])
        tables["rates"] = rates(method, work)
    if part in ("all", "settings"):
        tables["settings"] = settings(method, work)
    if part in ("all", "groups"):
        tables["groups"] = groups(method, work)
    if part in ("all", "noise"):
        tables["noise"] = noise(method, work)
    for name, table in tables.items():
        paths.append(out / f"{name}.csv.gz")
        write_table(paths[-1], table, float_format="%.5g")
    if part in ("all", "pool"):
        paths.append(out / "pool.safetensors")
        write_tensors(paths[-1], shown(work.folder))
    return paths


if __name__ == "__main__":
    run(build, __doc__, part=part_option("train", "settings", "groups", "noise", "pool"), work=work_option(SLUG))
