"""All tables of this folder: what notebooks/03-neurons/03-shortcut-neurons measures beforehand.

Eight times the 10,000 images of Fashion-MNIST, 14 x 14, are dealt anew to the training of M_0, the benchmark
B, the fine-tuning of M_un and M_con, that of the evaluated models M_e, and the reference R. Neurons are
ranked by every rule and control on M_un and M_con; then models fine-tuned on other images are patched, three
of them along the number of neurons, and a pool of twelve, whose abilities differ since some of their labels
were drawn anew. A placebo locates with a network that saw 500 other images in place of B. About 5 minutes on
one core; a run that was stopped goes on where it was (delete the folder --work for a fresh start). The
functions are the notebook's method cells.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd

from nbkit.recipes import Work, run, seeds_option, work_option, write_table

LEVELS = (5, 16, 32, 64, 96, 128, 192, 256, 384)  # neurons, of 384
SHARES = tuple(k / 10 for k in range(1, 10))  # of the way to the weights of M_0: as many levels
COPIES = (0, 1, 5)  # of B among what M_e was trained on
POOL = ((2000, 0.0), (1000, 0.25), (1000, 0.5), (1000, 0.75))  # fresh images, share of labels drawn anew
AT = (64, 128)  # neurons patched in the pool


def images():
    """Fashion-MNIST as [10000, 196], and its labels."""
    from torch.nn.functional import avg_pool2d

    from nbkit import datasets

    data = datasets.load("fashion-mnist")
    return avg_pool2d(data.x_train, 2).flatten(1), data.y_train


def shuffled(scores, strata, generator):
    """Scores that changed places at random within each stratum."""
    import torch

    mixed = scores.clone()
    for stratum in strata.unique():
        members = (strata == stratum).nonzero()[:, 0]
        mixed[members] = scores[members[torch.randperm(len(members), generator=generator)]]
    return mixed


def controls(scores, size, generator, layers: int = 3, alike: int = 16, draws: int = 5) -> dict[str, list]:
    """Scores [neurons] dealt anew among all neurons, among those of a layer, among the 16 of a layer that are next to
    each other in size; and "not last": the last layer after all others."""
    import torch

    layer = torch.arange(layers).repeat_interleave(len(scores) // layers)
    place = (layer + size / (2 * size.max())).argsort().argsort()  # by layer, then by size
    strata = {"random": 0 * layer, "within layer": layer, "matched": 1000 * layer + place // alike}
    found = {"not last": [scores - 100 * (layer == layers - 1)]}
    for rule, of in strata.items():
        found[rule] = [shuffled(scores, of, generator) for _ in range(draws)]
    return found


def dealt(method, seed: int) -> tuple:
    """Images, labels and parts of one seed, and how its networks are trained: ``k`` is for the order of images."""
    x, y = images()
    parts = method.deal(len(x), seed)

    def tuned(start, k, *rows, labels=y):
        return method.train(start, x, labels, *rows, seed=10 * seed + k)

    return x, y, parts, tuned


def located(method, seed: int) -> dict:
    """Images, parts, M_0 and the rankings of one seed; "located x5": S + C by an M_con that saw B five times."""
    import torch

    x, y, parts, tuned = dealt(method, seed)
    base = tuned(method.network(seed), 0, parts["base"])
    un, con, con5 = (tuned(base, 1, parts["locate"], *[parts["B"]] * copies) for copies in COPIES)
    of_b = x[parts["B"]], y[parts["B"]]
    generator = torch.Generator().manual_seed(seed)
    scores = method.rankings(con, un, base, *of_b, generator)
    rules = {rule: [one] for rule, one in scores.items()} | controls(scores["S + C"], scores["magnitude"], generator)
    rules["located x5"] = [method.comparative(con5, un, of_b[0]) + method.causal(con5, un, base, *of_b)]
    return {"x": x, "y": y, "parts": parts, "tuned": tuned, "base": base, "rules": rules}


def redrawn(y, rows, share: float, seed: int):
    """Labels of which, among ``rows``, about this share is drawn anew from ten classes."""
    import torch

    generator, labels = torch.Generator().manual_seed(seed), y.clone()
    chosen = rows[torch.rand(len(rows), generator=generator) < share]
    labels[chosen] = torch.randint(10, (len(chosen),), generator=generator)
    return labels


def hits(method, model, base, x, y, chosen=()) -> int:
    return round(len(x) * method.right(model, base, x, y, chosen))


def measure(seed: int) -> dict[str, list]:
    """The rows of every table for one seed; right answers are counted."""
    from scipy.stats import spearmanr

    from nbkit import papers

    method = papers.method("shortcut-neurons")
    all_ = located(method, seed)
    base, rules, parts = all_["base"], all_["rules"], all_["parts"]
    sets = {name: (all_["x"][parts[name]], all_["y"][parts[name]]) for name in ("B", "R")}

    def counts(model, chosen=()):
        return [hits(method, model, base, *of, chosen) for of in sets.values()]

    sweep = [[seed, -1, "M_0", 0, 0, *counts(base)]]
    pool, scores, truth = [], {}, []
    for size, noise in POOL:
        fresh = parts["fresh"][:size]
        labels = redrawn(all_["y"], fresh, noise, seed)
        for copies in COPIES:
            model = all_["tuned"](base, 2, fresh, *[parts["B"]] * copies, labels=labels)
            raw = counts(model)
            truth.append(raw[1])
            scores.setdefault(("raw", 0, 0), []).append(raw[0])
            for rule, draws in rules.items():
                for draw, ranking in enumerate(draws):
                    for n in AT:
                        found = hits(method, model, base, *sets["B"], method.top(ranking, n))
                        scores.setdefault((rule, n, draw), []).append(found)
            for share in (0.5, 0.7):
                found = hits(method, method.blended(model, base, share), base, *sets["B"])
                scores.setdefault(("blend", round(100 * share), 0), []).append(found)
            pool.append([seed, size, noise, copies, raw[1], raw[0], *(scores["S + C", n, 0][-1] for n in AT)])
            if not noise:
                sweep.append([seed, copies, "none", 0, 0, *raw])
                for rule, draws in rules.items():
                    for draw, ranking in enumerate(draws):
                        tops = {n: method.top(ranking, n) for n in LEVELS}
                        sweep += [[seed, copies, rule, n, draw, *counts(model, top)] for n, top in tops.items()]
                for share in SHARES:
                    mixed = method.blended(model, base, share)
                    sweep.append([seed, copies, "blend", round(100 * share), 0, *counts(mixed)])
    ranks = [[seed, *key, float(spearmanr(found, truth).statistic)] for key, found in scores.items()]
    return {"sweep": sweep, "pool": pool, "ranks": ranks, "located": [places(method, seed, rules)]}


def placebo(seed: int) -> dict:
    """Located by a network that saw 500 other images in place of B: its rows of "sweep", how many of its first 64 are
    among the first of S + C, and the mean of S for both."""
    from nbkit import papers

    method = papers.method("shortcut-neurons")
    x, y, parts, tuned = dealt(method, seed)
    sets = {name: (x[parts[name]], y[parts[name]]) for name in ("B", "R")}
    base = tuned(method.network(seed), 0, parts["base"])
    un = tuned(base, 1, parts["locate"])
    S, both = {}, {}
    for seen in ("B", "other"):
        net = tuned(base, 1, parts["locate"], parts[seen])
        S[seen] = method.comparative(net, un, sets["B"][0])
        both[seen] = S[seen] + method.causal(net, un, base, *sets["B"])
    rows = []
    for copies in COPIES:
        model = tuned(base, 2, parts["fresh"], *[parts["B"]] * copies)
        for n in LEVELS:
            top = method.top(both["other"], n)
            rows.append([seed, copies, "placebo", n, 0, *(hits(method, model, base, *of, top) for of in sets.values())])
    first = [set(method.top(scores, 64).tolist()) for scores in both.values()]
    return {"sweep": rows, "located": [len(first[0] & first[1]), *(one.mean().item() for one in S.values())]}


def places(method, seed: int, rules: dict) -> list:
    """Of the first 64 of S + C: how many lie in each layer, how many are first by other rules; spread of S and C."""
    first = {rule: set(method.top(draws[0], 64).tolist()) for rule, draws in rules.items()}
    layers = [sum(k // 128 == layer for k in first["S + C"]) for layer in range(3)]
    shared = [len(first["S + C"] & first[rule]) for rule in ("S", "C", "moved", "magnitude", "located x5")]
    return [seed, *layers, *shared, rules["S"][0].std().item(), (rules["S + C"][0] - rules["S"][0]).std().item()]


COLUMNS = {
    "sweep": ["seed", "copies", "rule", "level", "draw", "B", "R"],
    "pool": ["seed", "size", "noise", "copies", "R", "raw", *(f"S + C, {n}" for n in AT)],
    "ranks": ["seed", "rule", "level", "draw", "rho"],
    "located": ["seed", "fc2", "fc3", "fc4", "S", "C", "moved", "magnitude", "located x5", "sd of S", "sd of C"]
    + ["placebo", "mean S", "mean S, placebo"],
}


def compared(sweep: pd.DataFrame) -> pd.DataFrame:
    """``sweep`` as shares, with the net inflation ``left``, (B - R) less that of M_0, and the ``loss`` on R."""
    sweep = sweep.assign(B=sweep["B"] / 500, R=sweep["R"] / 2500)
    gap = sweep[sweep["rule"] == "M_0"].set_index("seed").eval("B - R")
    before = sweep[sweep["rule"] == "none"].set_index(["seed", "copies"])["R"]
    before = before.reindex(pd.MultiIndex.from_frame(sweep[["seed", "copies"]])).to_numpy()
    return sweep.assign(left=sweep["B"] - sweep["R"] - sweep["seed"].map(gap), loss=before - sweep["R"])


def cheapest(sweep: pd.DataFrame, most: float = 0.01) -> pd.DataFrame:
    """The lowest net inflation that each rule reaches for a loss on R of at most ``most``: doing nothing is a level of
    every rule; the mean over the draws of a control. A row a seed and number of copies, a column a rule."""
    leaky = sweep[sweep["copies"] > 0]
    nothing = leaky[leaky["rule"] == "none"].set_index(["seed", "copies"])["left"]
    nothing = nothing.reindex(pd.MultiIndex.from_frame(leaky[["seed", "copies"]])).to_numpy()
    paid = leaky.assign(left=leaky["left"].where(leaky["loss"] <= most + 1e-9, nothing).clip(upper=nothing))
    lowest = paid.groupby(["copies", "seed", "rule", "draw"])["left"].min()
    return lowest.groupby(["copies", "seed", "rule"]).mean().unstack().reset_index()


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    rows = [kept.once(f"seed-{seed}", partial(measure, seed)) for seed in range(seeds)]
    for seed, one in enumerate(rows):
        more = kept.once(f"placebo-{seed}", partial(placebo, seed))
        one["sweep"] += more["sweep"]
        one["located"][0] += more["located"]
    tables = {
        name: pd.DataFrame([row for one in rows for row in one[name]], columns=columns)
        for name, columns in COLUMNS.items()
    }
    tables["sweep"] = compared(tables["sweep"])
    tables["cheap"] = cheapest(tables["sweep"])
    paths = []
    for name, table in tables.items():
        paths.append(out / (f"{name}.csv.gz" if name == "sweep" else f"{name}.csv"))
        write_table(paths[-1], table.round(4))
    return paths


if __name__ == "__main__":
    run(build, __doc__, work=work_option("shortcut-neurons"), seeds=seeds_option(8))
