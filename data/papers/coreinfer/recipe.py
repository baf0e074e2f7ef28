"""The tables of this folder: what notebooks/03-neurons/05-coreinfer measures beforehand, on SmolLM2-135M and lee.

- background: 32 texts of 256 tokens; static.safetensors: in which share of their tokens each neuron is core (in 255ths,
  what the static sets are made of), all 30 layers. Four clusters of these texts, for the similarity-guided arm.
- quality: 24 other texts, prompts of 256 tokens, 64 to go on: quality.csv.gz, mean negative log-likelihood of the last
  63 under every rule and kept share; core and static again with the smaller alpha of the public code.
- stability: stability.csv, how much of a set the next 8 or 64 tokens, or a stranger's, replace; how a prompt's set and
  that of its own, and of the others', continuation overlap.
- short: prompts of 16 tokens, for the similarity-guided arm (in quality.csv.gz).
- judged: the 50 texts that people compared: pairs.csv.gz, their sets' overlap and cosines of TF-IDF and MiniLM;
  meaning.csv, their rank correlations with people, beside a Mantel test's; layers.csv, the same layer by layer.

About nine minutes on one core; a run that was stopped goes on where it was (delete the folder --work to start afresh).
The functions are the notebook's method cells.
"""

from __future__ import annotations

import itertools
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor

from nbkit import datasets, forward, hooks, language, models, papers, runtime
from nbkit.recipes import Work, part_option, run, work_option, write_table, write_tensors

SLUG = "coreinfer"
ALL, INNER = range(30), slice(5, 26)
PROMPT, TEXTS, BATCH = 256, 24, 4
BACKGROUND, SHORT, CLUSTERS = 32, 16, 4
SHARES = (0.6, 0.4, 0.2, 0.1)
MIDDLE = (0.4, 0.2)  # shares that every rule is measured at
ALPHAS = (0.05, 0.2, 0.8)  # beside 0.4
SEEDS = 3


@cache
def kit():
    """Method, model, tokenizer, windows [24, 320] to test on and windows [32, 256] of other texts."""
    runtime.deterministic(seed=0)
    method, tokenizer = papers.method(SLUG), models.tokenizer("smollm2")
    texts = datasets.load("lee").texts
    ids, of = language.token_windows(tokenizer, texts, 320, n=TEXTS, seed=0)
    others = [text for i, text in enumerate(texts) if i not in of.tolist()]
    background, _ = language.token_windows(tokenizer, others, PROMPT, n=BACKGROUND, seed=1)
    return method, models.load("smollm2"), ids, background


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Shared neurons over the larger set, mean over axis 0 (layers): bool [L, ..., f] twice."""
    return ((a & b).sum(-1) / torch.maximum(a.sum(-1), b.sum(-1)).clamp(min=1)).mean(0)


# --- background


def counts_of(ids: Tensor, alpha: float = 0.4, layers=ALL) -> list:
    """Core counts [L, f] of one text."""
    method, model, *_ = kit()
    h, _ = method.read(model, ids[None], layers)
    return method.core_counts(h[:, 0], alpha).tolist()


def sizes_of(ids: Tensor) -> list:
    """What each neuron writes, as a share of all that its layer's neurons write for a token: mean over tokens."""
    method, model, *_ = kit()
    h, _ = method.read(model, ids[None])
    return written(h)[:, 0].tolist()


def written(h: Tensor) -> Tensor:
    """[L, N, f]: mean over tokens of |h_j| ||v_j|| as a share of the token's sum."""
    method, model, *_ = kit()
    size = h.abs() * norms()[:, None, None]
    return (size / size.sum(-1, keepdim=True)).mean(2)


@cache
def norms() -> Tensor:
    """[L, f]: length of what a neuron writes."""
    method, model, *_ = kit()
    names = method.down_projections(model, method.LAYERS)
    return torch.stack([model.get_submodule(n).weight.detach().norm(dim=0) for n in names])


def background(work: Work) -> dict[str, Tensor]:
    """``static``: uint8 [30, f]; ``clusters``: [4, 30, f] summed counts; ``centres``: [4, f]; ``size``: [21, f]."""
    from sklearn.cluster import KMeans

    method, _, _, ids = kit()
    counts = torch.tensor([work.once(f"counts-{i}", partial(counts_of, row)) for i, row in enumerate(ids)])
    sizes = torch.tensor([work.once(f"sizes-{i}", partial(sizes_of, row)) for i, row in enumerate(ids[:16])])
    hot = method.core_set(counts[:, method.LAYERS[-1]], 0.2).float()  # [32, f]
    groups = KMeans(CLUSTERS, n_init=10, random_state=0).fit(hot.numpy())
    label = torch.from_numpy(groups.labels_).long()
    return {
        "static": (255 * counts.sum(0) / (BACKGROUND * PROMPT)).round().to(torch.uint8),
        "clusters": torch.stack([counts[label == k].sum(0) for k in range(CLUSTERS)]),
        "centres": torch.from_numpy(groups.cluster_centers_),
        "size": sizes.mean(0),
    }


# --- quality


def nearest(counts: Tensor, known: dict[str, Tensor], beta: float) -> Tensor:
    """[L, N, f]: the set of the cluster whose centre is nearest to a prompt's core set in the last layer."""
    method = kit()[0]
    hot = method.core_set(counts[-1], 0.2).float()  # [N, f]
    cluster = torch.cdist(hot, known["centres"].float()).argmin(1)
    return method.core_set(known["clusters"][cluster][:, INNER].movedim(0, 1), beta)


def every_token(share: float):
    """A context, the bound: of every token the neurons that write most."""
    method, model, *_ = kit()
    names = method.down_projections(model, method.LAYERS)

    def keep(h: Tensor, norm: Tensor) -> Tensor:
        size = h.abs() * norm
        best = size.topk(int(share * h.shape[-1] + 1e-9), dim=-1).indices
        return h * torch.zeros_like(h).scatter_(-1, best, 1.0)

    return hooks.edit(model, {
        name: hooks.replace(partial(keep, norm=norm), at="input") for name, norm in zip(names, norms(), strict=True)
    })  # fmt: skip


def random_set(shape, share: float, seed: int) -> Tensor:
    return papers.method(SLUG).core_set(torch.rand(shape, generator=torch.Generator().manual_seed(seed)), share)


def quality(first: int, known: dict[str, Tensor]) -> list[tuple]:
    """Rows (rule, layers, alpha, kept, prompt, text, nll) of texts ``first`` to ``first + 3``."""
    method, model, ids, _ = kit()
    ids = ids[first : first + BATCH]
    h, output = method.read(model, ids[:, :PROMPT], ALL)
    prompt, rest, past = h[INNER], ids[:, PROMPT:], output.past_key_values
    counts = method.core_counts(h)  # [30, N, f]
    later = method.core_counts(method.read(model, rest, past=past)[0])
    past.crop(-rest.shape[1])
    static = known["static"].float()[:, None].expand(-1, len(ids), -1)
    rows = []

    def add(rule, share, core, *, layers=method.LAYERS, alpha=0.4):
        loss = method.continuation_nll(model, rest, past, core, layers).mean(1)
        kind = "all" if len(layers) == 30 else "inner"
        rows.extend((rule, kind, alpha, share, PROMPT, first + i, round(x, 5)) for i, x in enumerate(loss.tolist()))

    add("dense", 1.0, None)
    for share in SHARES:
        add("core", share, method.core_set(counts[INNER], share))
        add("static", share, method.core_set(static[INNER], share))
        for seed in range(SEEDS):
            add(f"random {seed}", share, random_set(counts[INNER].shape, share, 1000 * seed + first))
        with every_token(share):
            add("every token anew", share, None)
    for share in MIDDLE:
        add("another text's", share, method.core_set(counts[INNER], share).roll(1, 1))
        add("cluster", share, nearest(counts[INNER], known, share))
        add("size", share, method.core_set(written(prompt), share))
        add("static size", share, method.core_set(known["size"][:, None].expand(-1, len(ids), -1), share))
        add("core of |h|", share, method.core_set(method.core_counts(prompt.abs()), share))
        add("continuation", share, method.core_set(later, share))
    for alpha in ALPHAS:
        add("core", 0.4, method.core_set(method.core_counts(prompt, alpha), 0.4), alpha=alpha)
    add("core", 0.4, method.core_set(counts, 0.4), layers=ALL)
    add("static", 0.4, method.core_set(static, 0.4), layers=ALL)
    add("random 0", 0.4, random_set(counts.shape, 0.4, first), layers=ALL)
    return rows


def short(first: int, known: dict[str, Tensor]) -> list[tuple]:
    """The same after prompts of 16 tokens, the last of the 256."""
    method, model, ids, _ = kit()
    ids = ids[first : first + BATCH, PROMPT - SHORT :]
    h, output = method.read(model, ids[:, :SHORT])
    counts, past, rows = method.core_counts(h), output.past_key_values, []
    static = known["static"][INNER].float()[:, None].expand(-1, len(ids), -1)
    sets = {
        "dense": None,
        "core": method.core_set(counts),
        "cluster": nearest(counts, known, 0.4),
        "static": method.core_set(static),
        "random 0": random_set(counts.shape, 0.4, first),
    }
    for rule, core in sets.items():
        loss = method.continuation_nll(model, ids[:, SHORT:], past, core).mean(1)
        kept = 1.0 if core is None else 0.4
        rows += [(rule, "inner", 0.4, kept, SHORT, first + i, round(x, 5)) for i, x in enumerate(loss.tolist())]
    return rows


def smaller(first: int, static: Tensor) -> list[tuple]:
    """Core and static with alpha 0.2, the public code's default, for both. static: [21, f]."""
    method, model, ids, _ = kit()
    ids = ids[first : first + BATCH]
    h, output = method.read(model, ids[:, :PROMPT])
    scores = {"core": method.core_counts(h, 0.2), "static": static[:, None].expand(-1, len(ids), -1)}
    rows = []
    for share, (rule, score) in itertools.product(MIDDLE, scores.items()):
        core = method.core_set(score, share)
        loss = method.continuation_nll(model, ids[:, PROMPT:], output.past_key_values, core).mean(1)
        rows += [(rule, "inner", 0.2, share, PROMPT, first + i, round(x, 5)) for i, x in enumerate(loss.tolist())]
    return rows


def foreseen(first: int) -> list[tuple]:
    """By size again, in the continuation itself: what a perfect forecast of sizes would be worth."""
    method, model, ids, _ = kit()
    ids = ids[first : first + BATCH]
    past = method.read(model, ids[:, :PROMPT])[1].past_key_values
    later = written(method.read(model, ids[:, PROMPT:], past=past)[0])
    past.crop(PROMPT - ids.shape[1])
    rows = []
    for share in MIDDLE:
        loss = method.continuation_nll(model, ids[:, PROMPT:], past, method.core_set(later, share)).mean(1)
        key = ("size, continuation", "inner", 0.4, share, PROMPT)
        rows += [(*key, first + i, round(x, 5)) for i, x in enumerate(loss.tolist())]
    return rows


# --- stability


def stability(first: int) -> dict:
    """Core counts of prompts, of prompts and 8 or 64 more tokens, and of the continuation alone: sparse layers."""
    method, model, ids, _ = kit()
    h, _ = method.read(model, ids[first : first + BATCH])
    cut = {"prompt": slice(0, 256), "8 more": slice(256, 264), "64 more": slice(256, 320)}
    cut |= {f"first {n}": slice(0, n) for n in (16, 32, 64, 128)}
    return {name: method.core_counts(h[:, :, part]).movedim(1, 0).tolist() for name, part in cut.items()}


def stability_rows(counts: dict[str, Tensor]) -> pd.DataFrame:
    """A row a text, share and comparison. A stranger is the next text."""
    method, rows = kit()[0], []
    for share in MIDDLE:
        sets = {name: method.core_set(c.movedim(0, 1), share) for name, c in counts.items()}  # [21, 24, f]
        prompt, later = sets["prompt"], sets["64 more"]
        for name in ("first 16", "first 32", "first 64", "first 128"):
            rows += _rows(share, f"{name} tokens, whole prompt", overlap(sets[name], prompt))
            rows += _rows(share, f"{name} tokens, another prompt", overlap(sets[name], prompt.roll(1, 1)))
        for more in ("8 more", "64 more"):
            for who, extra in (("own", counts[more]), ("stranger's", counts[more].roll(1, 0))):
                longer = method.core_set((counts["prompt"] + extra).movedim(0, 1), share)
                rows += _rows(share, f"{more}, {who}", 1 - overlap(prompt, longer))
        matrix = overlap(prompt[:, :, None], later[:, None])  # [24, 24]
        own = matrix.diagonal()
        rows += _rows(share, "continuation, own", own)
        rows += _rows(share, "continuation, others' mean", (matrix.sum(1) - own) / (TEXTS - 1))
        rows += _rows(share, "continuation, rank of own", 1 + (matrix > own[:, None]).sum(1))
    return pd.DataFrame(rows, columns=["kept", "what", "text", "value"])


def _rows(share: float, what: str, values: Tensor) -> list[tuple]:
    return [(share, what, i, round(v, 4)) for i, v in enumerate(values.tolist())]


# --- judged


def judged(i: int) -> list:
    method, model, *_ = kit()
    ids = models.tokenizer("smollm2")(datasets.load("lee").test[i], return_tensors="pt", add_special_tokens=False)
    h, _ = method.read(model, ids["input_ids"], ALL)
    return method.core_counts(h[:, 0]).tolist()


def cosines() -> dict[str, np.ndarray]:
    """TF-IDF (fitted on all 350 texts) and MiniLM: [50, 50]."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    lee = datasets.load("lee")
    words = TfidfVectorizer(stop_words="english").fit([*lee.texts, *lee.test]).transform(lee.test)
    tokens = models.tokenizer("minilm")(list(lee.test), padding=True, truncation=True, max_length=256,
                                        return_tensors="pt")  # fmt: skip
    minilm = models.load("minilm")
    with forward.evaluating(minilm), torch.no_grad():
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        code = models.mean_pool(minilm(**inputs), tokens["attention_mask"])
    code = torch.nn.functional.normalize(code, dim=1)
    return {"TF-IDF": (words @ words.T).toarray(), "MiniLM": (code @ code.T).numpy()}


def pairs(counts: Tensor) -> tuple[pd.DataFrame, np.ndarray]:
    """A row a pair of texts; and the overlap at 40 % by layer, [30, 1225]. counts: [50, 30, f]."""
    method = papers.method(SLUG)
    first, second = np.triu_indices(len(counts), 1)
    table = pd.DataFrame({"first": first, "second": second})
    by_layer = {}
    for share in MIDDLE:
        sets = method.core_set(counts, share)
        shared = (sets[first] & sets[second]).sum(-1) / sets[0, 0].sum()  # [1225, 30]
        table[f"overlap {share}"] = shared[:, INNER].mean(1).numpy()
        by_layer[share] = shared.T.numpy()
    for name, cosine in cosines().items():
        table[name] = cosine[first, second]
    return table.round(5), by_layer[0.4]


def mantel(a, b, given=None, *, n: int = 999, seed: int = 0) -> tuple[float, np.ndarray]:
    """Spearman of the pairs of two similarity matrices [M, M], and of n relabellings of b.

    given: a third matrix, whose ranks are taken out of both by regression first. Raises: ValueError.
    """
    if any(m is not None and m.shape != (len(a), len(a)) for m in (a, b, given)):
        raise ValueError("the matrices must be square and of one size")
    upper = np.triu_indices(len(a), 1)
    x, y, z = (None if m is None else rankdata(m[upper]) - rankdata(m[upper]).mean() for m in (a, b, given))
    if z is not None:
        x, y = x - z * (x @ z) / (z @ z), y - z * (y @ z) / (z @ z)
    square = np.zeros(a.shape)
    square[upper] = y
    square += square.T
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(a)) for _ in range(n)]
    null = [np.corrcoef(x, square[np.ix_(p, p)][upper])[0, 1] for p in orders]
    return np.corrcoef(x, y)[0, 1], np.array(null)


def meaning(table: pd.DataFrame, people: np.ndarray) -> pd.DataFrame:
    """A row a score: Spearman with people, and what 99 % of 999 relabellings stay below."""

    def square(name: str) -> np.ndarray:
        matrix = np.eye(len(people))
        matrix[table["first"], table["second"]] = table[name]
        return np.maximum(matrix, matrix.T)

    names = table.columns[2:]
    found = {name: mantel(square(name), people) for name in names}
    found |= {f"{name}, given TF-IDF": mantel(square(name), people, square("TF-IDF")) for name in names[:2]}
    rows = [(name, rho, np.quantile(null, 0.99)) for name, (rho, null) in found.items()]
    return pd.DataFrame(rows, columns=["score", "rho", "of relabellings"]).round(4)


def by_depth(overlaps: np.ndarray, judged: np.ndarray, table: pd.DataFrame, n: int = 2000) -> pd.DataFrame:
    """A row a layer: Spearman with people, 95 % of n bootstraps over texts, and in which share of them the mean of
    layers 18 to 25 is above that of 5 to 12 (the same in every row)."""
    x, y = np.stack([rankdata(row) for row in overlaps]), rankdata(judged)
    drawn = np.random.default_rng(0).multinomial(50, np.full(50, 1 / 50), size=n)
    weight = (drawn[:, table["first"]] * drawn[:, table["second"]]).astype(float)
    weight /= weight.sum(1, keepdims=True)  # [n, 1225]

    def correlation(w: np.ndarray) -> np.ndarray:  # [1225] or [n, 1225] -> [(n,) 30]
        x_mean, y_mean = w @ x.T, (w @ y)[..., None]
        x_var, y_var = w @ (x**2).T - x_mean**2, (w @ y**2)[..., None] - y_mean**2
        return (w @ (x * y).T - x_mean * y_mean) / np.sqrt(x_var * y_var)

    spread = correlation(weight)  # [n, 30]
    deeper = (spread[:, 18:26].mean(1) > spread[:, 5:13].mean(1)).mean()
    low, high = np.quantile(spread, [0.025, 0.975], axis=0)
    rho = correlation(np.full(len(y), 1 / len(y)))
    columns = {"layer": range(len(x)), "rho": rho, "low": low, "high": high, "deeper": deeper}
    return pd.DataFrame(columns).round(4)


def build(out: Path, work: Path, part: str = "all") -> list[Path]:
    kept, written_files = Work(work), []
    starts = range(0, TEXTS, BATCH)

    def wanted(name: str) -> bool:
        return part in ("all", name)

    if wanted("background") or wanted("quality"):
        known = background(kept)
        write_tensors(out / "static.safetensors", {"static": known["static"]})
        written_files.append(out / "static.safetensors")
    if wanted("quality"):
        rows = [row for i in starts for row in kept.once(f"quality-{i}", partial(quality, i, known))]
        rows += [row for i in starts for row in kept.once(f"short-{i}", partial(short, i, known))]
        texts = enumerate(kit()[3])
        counts = [kept.once(f"counts02-{i}", partial(counts_of, row, 0.2, kit()[0].LAYERS)) for i, row in texts]
        static = torch.tensor(counts).sum(0)
        rows += [row for i in starts for row in kept.once(f"smaller-{i}", partial(smaller, i, static))]
        rows += [row for i in starts for row in kept.once(f"foreseen-{i}", partial(foreseen, i))]
        rows = list({row[:-1]: row for row in map(tuple, rows)}.values())  # core with 0.2 is there already
        columns = ["rule", "layers", "alpha", "kept", "prompt", "text", "nll"]
        write_table(out / "quality.csv.gz", pd.DataFrame(rows, columns=columns))
        written_files.append(out / "quality.csv.gz")
    if wanted("stability"):
        found = [kept.once(f"stability-{i}", partial(stability, i)) for i in starts]
        counts = {name: torch.cat([torch.tensor(f[name]) for f in found]) for name in found[0]}
        write_table(out / "stability.csv", stability_rows(counts))
        written_files.append(out / "stability.csv")
    if wanted("judged"):
        counts = torch.tensor([kept.once(f"judged-{i}", partial(judged, i)) for i in range(50)])
        table, by_layer = pairs(counts)
        people = datasets.load("lee").similarity
        judged_pairs = people[table["first"], table["second"]]
        tables = {"pairs.csv.gz": table, "meaning.csv": meaning(table, people)}
        tables["layers.csv"] = by_depth(by_layer, judged_pairs, table)
        for name, found in tables.items():
            write_table(out / name, found)
            written_files.append(out / name)
    return written_files


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), part=part_option("background", "quality", "stability", "judged"))
