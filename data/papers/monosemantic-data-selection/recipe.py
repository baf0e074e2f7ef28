"""results.csv.gz, downstream.csv.gz, autoencoders.csv, texts.csv.gz, selections.safetensors, codes.safetensors: what
notebooks/03-neurons/07-monosemantic-data-selection measures beforehand, on SmolLM2-135M and WordNet.

The texts are definitions of nouns of 6 to 20 words, no two the same; the targets are the twelve largest noun topics.
A pool of 480 (40 a topic), three draws of 8 target examples a topic, 1,800 others of all noun topics to train the
autoencoders on (and to count words in); none of the 2 % that tiny-llama has never seen, which are the test texts.

- read: SmolLM2 reads the 2,568 texts; states behind blocks 8 and 28, MLP units of block 28.
- sae: TopK autoencoders of 2,304 latents, K = 32: three seeds behind block 28, one behind block 8; hardly trained
  and untrained ones beside them.
- select: every method, every target, every draw; selections of the explorer, codes of the first autoencoder.
- downstream: tiny-llama goes on with each selection (6 steps) or the whole pool (20 or 6); loss on unseen definitions.

About eight minutes on one core; a stopped run goes on where it was (delete the folder --work for a fresh start).
The functions are the notebook's method cells.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nbkit import datasets, forward, hooks, models, papers, runtime
from nbkit.recipes import Work, part_option, run, work_option, write_table, write_tensors

SLUG = "monosemantic-data-selection"
TOPICS, PER_TOPIC, DRAWS, M, OTHERS = 12, 40, 3, 8, 1800
POOL, K = TOPICS * PER_TOPIC, 24  # 5 % of the pool
SHALLOW, DEEP, UNITS = "model.layers.8", "model.layers.28", "model.layers.28.mlp.down_proj"
LATENTS, TOP, SEEDS, STEPS, FEW = 2304, 32, 3, 250, 25
TOPS, EXAMPLES = (8, 16, 32, 64), (1, 3, 8)
READ = 64  # texts at once
RATES, TUNED = (3e-4, 1e-3, 3e-3), 6  # learning rates to choose from; steps, of K texts each


# --- the texts


@cache
def texts() -> pd.DataFrame:
    """A row a text: its entry in wordnet, its topic, what it is for, the draw of a target example (else -1)."""
    wordnet = datasets.load("wordnet")
    total = len(wordnet.topics)
    unseen = set(np.random.default_rng(0).choice(total, total // 50, replace=False).tolist())  # as tiny_llama.texts
    times = Counter(wordnet.definitions)
    nouns = [
        i for i, (topic, text) in enumerate(zip(wordnet.topics, wordnet.definitions, strict=True))
        if topic.startswith("noun.") and 6 <= len(text.split()) <= 20 and times[text] == 1
    ]  # fmt: skip
    sizes = Counter(topic for topic in wordnet.topics if topic.startswith("noun."))
    rng, rows = np.random.default_rng(0), []
    for topic, _ in sizes.most_common(TOPICS):
        known = [i for i in nouns if wordnet.topics[i] == topic and i not in unseen]
        chosen = rng.choice(known, PER_TOPIC + DRAWS * M, replace=False)
        rows += [(int(i), topic, "pool", -1) for i in chosen[:PER_TOPIC]]
        rows += [(int(i), topic, "example", j // M) for j, i in enumerate(chosen[PER_TOPIC:])]
        rows += [(i, topic, "test", -1) for i in nouns if wordnet.topics[i] == topic and i in unseen]
    used = {row[0] for row in rows} | unseen
    others = rng.choice([i for i in nouns if i not in used], OTHERS, replace=False)
    rows += [(int(i), wordnet.topics[i], "other", -1) for i in others]
    table = pd.DataFrame(rows, columns=["entry", "topic", "use", "draw"])
    table["text"] = [wordnet.definitions[i] for i in table["entry"]]
    order = {"pool": 0, "example": 1, "other": 2, "test": 3}
    return table.sort_values("use", key=lambda use: use.map(order), kind="stable", ignore_index=True)


def rows_of(use: str, topic: str | None = None, draw: int | None = None) -> list[int]:
    table = texts()
    keep = table["use"] == use
    if topic is not None:
        keep &= table["topic"] == topic
    if draw is not None:
        keep &= table["draw"] == draw
    return np.flatnonzero(keep).tolist()


def topics() -> list[str]:
    return list(texts()["topic"].drop_duplicates()[:TOPICS])


# --- read


@cache
def language_model():
    return models.load("smollm2")


def read_some(rows: list[int]) -> dict[str, Tensor]:
    """States of the tokens of some texts (float16), which text each is of, and the MLP units, averaged a text."""
    method, model = papers.method(SLUG), language_model()
    some = [texts()["text"][i] for i in rows]
    with hooks.record(model, SHALLOW) as low, hooks.record(model, UNITS, at="input") as h:
        deep, of = method.token_states(model, models.tokenizer("smollm2"), some, DEEP)
    place = torch.arange(h[UNITS].shape[1])
    real = (place > 0) & (place <= of.bincount()[:, None])  # [N, T]
    units = h[UNITS][real].float()
    return {
        "of": torch.tensor(rows)[of],
        SHALLOW: low[SHALLOW][real].half(),
        DEEP: deep.half(),
        "rows": torch.tensor(rows),
        "units": method.pool_tokens(units, of),
        "positive units": method.pool_tokens(units.relu(), of),
    }


def read(work: Path) -> dict[str, Tensor]:
    """All of it, in the order of texts(): of [n], states [n, 576] twice, units [N, 1536] twice."""
    used = rows_of("pool") + rows_of("example") + rows_of("other")
    used.sort(key=lambda i: len(texts()["text"][i]))  # little padding
    parts = []
    for first in range(0, len(used), READ):
        file = work / f"states-{first}.pt"
        if not file.is_file():
            torch.save(read_some(used[first : first + READ]), work / "part.pt")
            (work / "part.pt").replace(file)
            print(file.name, flush=True)
        parts.append(torch.load(file, weights_only=True))
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tokens, rows = whole["of"].argsort(stable=True), whole["rows"].argsort()
    return {name: value[rows if len(value) == len(rows) else tokens] for name, value in whole.items()}


# --- sae


def states(everything: dict[str, Tensor], layer: str, use: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """h [n, d] and text [n], numbered from 0, of the tokens of some uses that follow each other in texts()."""
    low, high = rows_of(use[0])[0], rows_of(use[-1])[-1]
    keep = (everything["of"] >= low) & (everything["of"] <= high)
    return everything[layer][keep].float(), everything["of"][keep] - low


def autoencoder(everything: dict[str, Tensor], work: Path, layer: str, seed: int, steps: int):
    """The autoencoder of a seed, trained on the tokens of the other texts; kept in a file."""
    method = papers.method(SLUG)
    sae = method.TopKSAE(everything[layer].shape[1], LATENTS, TOP, seed)
    h, _ = states(everything, layer, ("other",))
    file = work / f"sae-{layer}-{seed}-{steps}.pt"
    if not steps:
        sae.b_pre.data = h.mean(0)
    elif file.is_file():
        sae.load_state_dict(torch.load(file, weights_only=True))
    else:
        method.train(sae, h, steps=steps, seed=seed)
        torch.save(sae.state_dict(), work / "part.pt")
        (work / "part.pt").replace(file)
        print(file.name, flush=True)
    return sae.requires_grad_(False)


# --- select


def words_of(rows: list[int]) -> Tensor:
    """[N] lengths in words."""
    return torch.tensor([len(texts()["text"][i].split()) for i in rows]).float()


def counted() -> dict[str, Tensor]:
    """TF-IDF of pool and examples, and BM25's weights of the pool (k1 = 1.2, b = 0.75) beside the examples' counts.

    How rare a word is, is counted in the texts that trained the autoencoders and in the pool.
    """
    from scipy import sparse
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

    rows = {use: [texts()["text"][i] for i in rows_of(use)] for use in ("pool", "example", "other")}
    counter = CountVectorizer(stop_words="english").fit([*rows["other"], *rows["pool"]])
    counts = {use: counter.transform(some) for use, some in rows.items()}
    known = (sparse.vstack([counts["other"], counts["pool"]]) > 0).astype(np.float32).tocsr()
    tfidf = TfidfTransformer(sublinear_tf=True).fit(known)
    both = torch.from_numpy(sparse.vstack([counts["pool"], counts["example"]]).toarray()).float()
    tf, appears = both[:POOL], torch.from_numpy(np.asarray(known.sum(0))[0])
    rare = ((known.shape[0] - appears + 0.5) / (appears + 0.5) + 1).log()
    length = tf.sum(1, keepdim=True)
    bm25 = rare * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / length.mean()))
    return {
        "TF-IDF": torch.from_numpy(tfidf.transform(both.numpy()).toarray()).float(),
        "BM25": torch.cat([bm25, both[POOL:]]),
    }


def sentences() -> Tensor:
    """MiniLM's embeddings of pool and examples, length 1."""
    model, tokenizer = models.load("minilm"), models.tokenizer("minilm")
    parts = []
    some = [texts()["text"][i] for i in rows_of("pool") + rows_of("example")]
    for first in range(0, len(some), READ):
        inputs = tokenizer(some[first : first + READ], padding=True, return_tensors="pt")
        with forward.evaluating(model), torch.no_grad():
            parts.append(models.mean_pool(model(**inputs), inputs["attention_mask"]))
    return F.normalize(torch.cat(parts), dim=1)


def features(everything: dict[str, Tensor], work: Path) -> dict[tuple, tuple[Tensor, tuple[str, ...]]]:
    """(features, layer, K, pooling, seed) -> values [POOL + examples, F] and the metrics to try."""
    method = papers.method(SLUG)
    found = {}
    for layer in (SHALLOW, DEEP):
        h, of = states(everything, layer, ("pool", "example"))
        centre = states(everything, layer, ("other",))[0].mean(0)
        block = int(layer.rpartition(".")[2])
        found["raw", block, 0, "mean", 0] = method.pool_tokens(h, of), ("cosine",)
        found["raw, centred", block, 0, "mean", 0] = method.pool_tokens(h - centre, of), ("cosine",)
        found["raw, positive", block, 0, "mean", 0] = method.pool_tokens((h - centre).relu(), of), ("Jaccard",)
        for seed in range(SEEDS if layer == DEEP else 1):
            trained = autoencoder(everything, work, layer, seed, STEPS)
            for top in TOPS if layer == DEEP else (TOP,):
                code = trained.encode(h, top)
                for how in ("mean", "sum") if layer == DEEP else ("mean",):
                    found["SAE", block, top, how, seed] = method.pool_tokens(code, of, how), tuple(method.METRICS)
        for seed, (name, steps) in itertools.product(range(SEEDS), {"SAE, untrained": 0, "SAE, 25 steps": FEW}.items()):
            if layer == DEEP:
                code = method.pool_tokens(autoencoder(everything, work, layer, seed, steps).encode(h), of)
                found[name, block, TOP, "mean", seed] = code, ("Jaccard", "cosine")
    both = rows_of("pool") + rows_of("example")
    found["MLP units", 28, 0, "mean", 0] = everything["units"][both], ("cosine",)
    centre = everything["units"][rows_of("other")].mean(0)
    found["MLP units, centred", 28, 0, "mean", 0] = everything["units"][both] - centre, ("cosine",)
    found["MLP units, positive", 28, 0, "mean", 0] = everything["positive units"][both], ("Jaccard",)
    words = counted()
    found["TF-IDF", -1, 0, "", 0] = words["TF-IDF"], ("cosine",)
    found["BM25", -1, 0, "", 0] = words["BM25"], ("dot",)
    found["MiniLM", -1, 0, "", 0] = sentences(), ("cosine",)
    found["length", -1, 0, "", 0] = words_of(both)[:, None], ("Euclidean",)
    for seed in range(SEEDS):
        noise = torch.randn(len(both), 4, generator=torch.Generator().manual_seed(seed))
        found["random", -1, 0, "", seed] = noise, ("cosine",)
    return found


def examples_of(topic: str, draw: int, many: int = M) -> list[int]:
    """Rows, behind the pool's, of the first so many target examples of a draw."""
    return rows_of("example", topic, draw)[:many]


def chosen(values: Tensor, metric: str, topic: str, draw: int, many: int = M) -> Tensor:
    """The K selected texts of the pool."""
    method = papers.method(SLUG)
    pool, examples = values[:POOL], values[examples_of(topic, draw, many)]
    if metric == "dot":
        return (pool @ examples.sum(0)).argsort(descending=True, stable=True)[:K]
    return method.select(pool, examples, K, metric)


def precisions(found: dict[tuple, tuple]) -> tuple[pd.DataFrame, Tensor]:
    """A row a selection; and the selections themselves of the first autoencoder and draw.

    They are [topics, examples, K, metrics, pooling, K selected]."""
    method = papers.method(SLUG)
    kind, words = texts()["topic"].to_numpy()[:POOL], words_of(rows_of("pool"))
    picked = torch.zeros(TOPICS, len(EXAMPLES), len(TOPS), 3, 2, K, dtype=torch.int16)
    rows = []
    for key, (values, metrics) in found.items():
        name, block, top, how, seed = key
        main = name == "SAE" and block == 28
        for metric, (t, topic), draw, many in itertools.product(metrics, enumerate(topics()), range(DRAWS), EXAMPLES):
            shown = main and not seed and not draw  # what the explorer needs
            if many != M and not (shown or main and top == TOP):
                continue
            best = chosen(values, metric, topic, draw, many)
            if shown:
                place = t, EXAMPLES.index(many), TOPS.index(top), list(method.METRICS).index(metric)
                picked[(*place, ("mean", "sum").index(how))] = best.to(torch.int16)
            if many != M and top != TOP:
                continue
            precision = (kind[best.numpy()] == topic).mean()
            rows.append((*key, metric, many, topic, draw, round(precision, 4), round(words[best].mean().item(), 2)))
    columns = "features layer K pooling seed metric examples topic draw precision words".split()
    return pd.DataFrame(rows, columns=columns), picked


def packed(code: Tensor) -> dict[str, Tensor]:
    """Codes [N, d'] as bits (which are above 0), their values in 255ths of the text's largest, and that."""
    scale = code.amax(1)
    small = (255 * code / scale[:, None]).round().to(torch.uint8)
    bits = np.packbits((small > 0).numpy(), axis=1)
    return {"bits": torch.from_numpy(bits), "values": small[small > 0], "scale": scale}


def profiles(found: dict[tuple, tuple]) -> dict[str, Tensor]:
    """Topic means over the pool of the 60 features whose topic means vary most: [12, 60] of states and of codes."""
    kind, parts = texts()["topic"].to_numpy()[:POOL], {}
    for name, key in (("raw", ("raw, centred", 28, 0, "mean", 0)), ("SAE", ("SAE", 28, TOP, "mean", 0))):
        pool = found[key][0][:POOL]
        means = torch.stack([pool[torch.from_numpy(kind == topic)].mean(0) for topic in topics()])
        most = means.var(0).argsort(descending=True)[:60]
        parts[f"profile {name}"] = means[:, most].half()
    return parts


def quality(everything: dict[str, Tensor], work: Path) -> pd.DataFrame:
    """A row an autoencoder: variance missed on the texts it learnt from and on the pool, latents silent there."""
    method, rows = papers.method(SLUG), []
    cases = [(DEEP, seed, steps) for seed in range(SEEDS) for steps in (FEW, STEPS)] + [(SHALLOW, 0, STEPS)]
    for layer, seed, steps in cases:
        sae = autoencoder(everything, work, layer, seed, steps)
        learnt, _ = states(everything, layer, ("other",))
        h, _ = states(everything, layer, ("pool",))
        silent = (sae.encode(h) == 0).all(0).float().mean().item()
        missed = [round(method.unexplained(sae, some).item(), 4) for some in (learnt[::4], h)]
        rows.append((int(layer.rpartition(".")[2]), seed, steps, *missed, round(silent, 4), len(learnt), len(h)))
    columns = ["layer", "seed", "steps", "fvu learnt", "fvu pool", "silent", "tokens learnt", "tokens pool"]
    return pd.DataFrame(rows, columns=columns)


def select_all(work: Path, out: Path) -> list[Path]:
    everything = read(work)
    found = features(everything, work)
    table, picked = precisions(found)
    write_table(out / "results.csv.gz", table)
    write_table(out / "autoencoders.csv", quality(everything, work))
    shown = texts().query("use != 'other'").drop(columns="text")
    write_table(out / "texts.csv.gz", shown)
    first = found["SAE", 28, TOP, "mean", 0][0]
    targets = torch.stack([first[examples_of(topic, 0)].mean(0) for topic in topics()])
    write_tensors(out / "codes.safetensors", packed(torch.cat([first[:POOL], targets])) | profiles(found))
    write_tensors(out / "selections.safetensors", {"selected": picked[:, ::2]})  # 1 and 8 examples
    tuners = {"MONA": [found["SAE", 28, TOP, "mean", seed] for seed in range(DRAWS)]}
    tuners["MiniLM"] = [found["MiniLM", -1, 0, "", 0]] * DRAWS
    torch.save(tuners, work / "tuners.pt")
    names = ("results.csv.gz", "autoencoders.csv", "texts.csv.gz", "codes.safetensors", "selections.safetensors")
    return [out / name for name in names]


# --- downstream


def batch_loss(model, ids: list[list[int]]) -> Tensor:
    """Mean nats a token of texts of any length, a token 0 before each."""
    rows = nn.utils.rnn.pad_sequence([torch.tensor([0, *some]) for some in ids], batch_first=True)
    labels = nn.utils.rnn.pad_sequence(
        [torch.tensor(some) for some in ids], batch_first=True, padding_value=-100
    )
    logits = model(input_ids=rows).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def tune(model, ids: list[list[int]], *, steps=12, batch=24, lr=1e-3, seed=0):
    """Go on training the model, in place, on texts given as token numbers; every step has ``batch`` of them.

    No text comes again before the others have come (what is less than a batch at the end is left out).
    Raises: ValueError."""
    if steps < 1 or not 1 <= batch <= len(ids):
        raise ValueError(f"steps from 1, batch from 1 to {len(ids)}, not {steps} and {batch}")
    adam = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for step in range(steps):
        rate = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in adam.param_groups:
            group["lr"] = rate
        if len(queue) < batch:
            queue = torch.randperm(len(ids), generator=generator).tolist()
        some, queue = queue[:batch], queue[batch:]
        loss = batch_loss(model, [ids[i] for i in some])
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model


@cache
def token_numbers() -> list[list[int]]:
    return models.tokenizer("tiny-llama")(list(texts()["text"]), add_special_tokens=False)["input_ids"]


def losses(model, topic: str) -> list[float]:
    """Nats a token on the unseen definitions of a topic: every second one, to choose by, and the others."""
    rows = rows_of("test", topic)
    with forward.evaluating(model), torch.no_grad():
        return [
            round(batch_loss(model, [token_numbers()[i] for i in half[:40]]).item(), 5)
            for half in (rows[::2], rows[1::2])
        ]


def trained_on(selection: list[int], rate: float, seed: int, steps: int):
    model = models.load("tiny-llama", seed=0)
    return tune(model, [token_numbers()[i] for i in selection], steps=steps, batch=K, lr=rate, seed=seed)


def selection_of(name: str, topic: str, draw: int, work: Path) -> list[int]:
    """Texts of the pool: by a method, at random, or of the topic itself (24 of its 40)."""
    rng = np.random.default_rng([draw, topics().index(topic)])
    if name == "random":
        return rng.choice(POOL, K, replace=False).tolist()
    if name == "the topic itself":
        return rng.choice(rows_of("pool", topic), K, replace=False).tolist()
    values, metrics = torch.load(work / "tuners.pt", weights_only=True)[name][draw]
    return chosen(values, metrics[0], topic, draw).tolist()


def tuned(name: str, draw: int, rate: float, which: list[str], work: Path) -> list[tuple]:
    """Rows (selected by, rate, draw, topic, loss to choose by, loss)."""
    rows = []
    for topic in which:
        model = trained_on(selection_of(name, topic, draw, work), rate, draw, TUNED)
        rows.append((name, rate, draw, topic, *losses(model, topic)))
    return rows


WHOLE = {"whole pool": POOL // K, "whole pool, 6 steps": TUNED}  # steps: all of it once, or as many as a selection


def whole(name: str, draw: int, rate: float) -> list[tuple]:
    """The same of the whole pool; it knows no target."""
    model = trained_on(list(range(POOL)), rate, draw, WHOLE[name])
    return [(name, rate, draw, topic, *losses(model, topic)) for topic in topics()]


def best_rate(rows: list[tuple]) -> float:
    loss = pd.DataFrame(rows).groupby(1)[4].mean()
    return float(loss.idxmin())


def downstream(work: Work) -> pd.DataFrame:
    rows = [("before", 0.0, 0, topic, *losses(models.load("tiny-llama", seed=0), topic)) for topic in topics()]
    for name in ("random", "the topic itself", "MiniLM", "MONA"):
        trials = [
            row for rate in RATES
            for row in work.once(f"rate-{name}-{rate}", partial(tuned, name, 0, rate, topics()[::4], work.folder))
        ]  # fmt: skip
        rate = best_rate(trials)
        for draw in range(DRAWS):
            rows += work.once(f"tuned-{name}-{rate}-{draw}", partial(tuned, name, draw, rate, topics(), work.folder))
    for name in WHOLE:
        trials = [row for rate in RATES for row in work.once(f"{name}-{rate}-0", partial(whole, name, 0, rate))]
        rate = best_rate(trials)
        for draw in range(DRAWS):
            rows += work.once(f"{name}-{rate}-{draw}", partial(whole, name, draw, rate))
    return pd.DataFrame(rows, columns=["selected by", "rate", "draw", "topic", "validation", "loss"])


def build(out: Path, work: Path, part: str = "all") -> list[Path]:
    runtime.deterministic(seed=0)
    kept, paths = Work(work), []
    if part in ("all", "select"):
        paths += select_all(work, out)
    if part in ("all", "downstream"):
        paths.append(out / "downstream.csv.gz")
        write_table(paths[-1], downstream(kept))
    return paths


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), part=part_option("select", "downstream"))
