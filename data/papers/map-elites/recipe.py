"""All tables of this folder: what notebooks/12-search-and-proof/03-map-elites measures beforehand.

Retina: seven searches with four seeds each, 100,000 evaluations (the first 2,000 random, the same for all), MAP-Elites
and the evolutionary algorithm on to 800,000, NSLC in one run; the four measures against M*, the best of all that any
run found in a cell. Arm: the same searches with five seeds, 20,000 evaluations, each with the mutation step that was
best for it on two other seeds. About 8 minutes on one core; a run that was stopped goes on where it was (delete the
folder --work for a fresh start). ``cells``, ``Archive``, ``search`` and the measures are the notebook's method cells.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree

from nbkit.recipes import Work, run, seeds_option, work_option, write_table, write_tensors

ARMS = ("MAP-Elites", "refined", "evolution", "NSLC", "random", "fit parents", "first come")
LONG = {"MAP-Elites": 4, "evolution": 4, "NSLC": 1}  # and of how many of their runs
WAYS = ("MAP-Elites", "evolution")  # whose ancestors are kept
GRID = (24, 24)  # of the retina's map
BUDGETS = (25_000, 50_000, 100_000, 200_000, 400_000, 800_000)
COMMON = 100_000
ARM_GRID = (40, 40)
ARM_EVALUATIONS = 20_000
ARM_SEEDS = 5
STEPS = (0.02, 0.05, 0.1, 0.2)
PILOTS = (100, 101)
CONSTANT = 0.75  # what answering "no" to every pattern scores

LAYERS = (8, 8, 4, 2, 1)
WEIGHTS, GENES = 106, 121  # connections between neighbouring layers; with 15 biases
ROW = (-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5)
PLACES = (ROW, ROW, (-2, -1, 1, 2), (-1, 1), (0,))  # where nodes stand; layers are 1 apart
LEFT = (1, 4, 5, 7, 11, 13, 14, 15)  # objects: pixels 0 to 3 as bits of a number
RIGHT = (2, 7, 8, 10, 11, 13, 14, 15)  # the mirror images, pixels 4 to 7


def the_method():
    from nbkit import papers

    return papers.method("map-elites")


# retina: the networks

@cache
def task() -> tuple[np.ndarray, np.ndarray]:
    """All patterns [256, 8], pixels -1 or 1, and the right answers [256], -1 or 1."""
    number = np.arange(256)
    both = np.isin(number & 15, LEFT) & np.isin(number >> 4, RIGHT)
    return 2.0 * (number[:, None] >> np.arange(8) & 1) - 1, 2.0 * both - 1


def layers(genomes: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights [n, in, out] and biases [n, out] of each layer. Raises: ValueError."""
    if genomes.ndim != 2 or genomes.shape[1] != GENES or not (np.abs(genomes) <= 2).all():
        raise ValueError(f"genomes are [n, {GENES}] of -2 ... 2, not {genomes.shape}")
    found = []
    weight = 0
    bias = WEIGHTS
    for a, b in pairwise(LAYERS):
        block = genomes[:, weight : weight + a * b].reshape(-1, a, b)
        found.append((block, genomes[:, bias : bias + b]))
        weight += a * b
        bias += b
    return found


def answers(genomes: np.ndarray) -> np.ndarray:
    """What a network says to each pattern, [n, 256]; tanh(20 z) of a whole number is its sign."""
    h = task()[0].astype(np.float32)[None]
    for weights, biases in layers(genomes.astype(np.float32)):
        h = np.sign(h @ weights + biases[:, None])
    return h[..., 0]


@cache
def lengths() -> np.ndarray:
    """Squared length of each of the 106 possible connections."""
    steps = pairwise([np.array(row) for row in PLACES])
    return np.concatenate([((a[:, None] - b) ** 2 + 1).ravel() for a, b in steps])


def places() -> dict[int, tuple[float, int]]:
    """Where each of the 23 nodes stands, and in which layer."""
    return dict(enumerate((x, k) for k, row in enumerate(PLACES) for x in row))


def links(genomes: np.ndarray) -> np.ndarray:
    """Which node feeds which, [n, 23, 23]."""
    start = np.cumsum((0, *LAYERS))
    found = np.zeros((len(genomes), start[-1], start[-1]))
    for k, (weights, _) in enumerate(layers(genomes)):
        found[:, start[k] : start[k + 1], start[k + 1] : start[k + 2]] = weights != 0
    return found


def modularity(link: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q [n] of directed graphs [n, k, k], split in two, and the sides [n, k], -1 or 1."""
    edges = np.maximum(link.sum((1, 2)), 1)
    b = link - link.sum(2)[:, :, None] * link.sum(1)[:, None] / edges[:, None, None]
    whisper = np.diag(1e-7 * np.arange(link.shape[1]))  # settles ties alike on every machine
    vectors = np.linalg.eigh(b + b.transpose(0, 2, 1) + whisper)[1]
    sides = np.where(vectors[..., -1] > 0, 1.0, -1.0)
    q = np.einsum("ni,nij,nj->n", sides, b, sides) / (2 * edges)
    return np.maximum(q.round(12), 0), sides  # no split at all has Q = 0


def see(genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of patterns answered rightly; features: connection cost, modularity."""
    performance = (answers(genomes) == task()[1]).mean(1)
    cost = (genomes[:, :WEIGHTS] != 0) @ lengths()
    return performance, np.stack([cost, modularity(links(genomes))[0]], 1)


def wire(n: int, rng) -> np.ndarray:
    """Random genomes [n, 121]: any number of connections is as likely as any other."""
    genomes = rng.integers(-2, 3, (n, GENES)).astype(np.int8)
    place = rng.random((n, WEIGHTS)).argsort(1).argsort(1)
    kept = place < rng.integers(0, WEIGHTS + 1, (n, 1))
    genomes[:, :WEIGHTS] = rng.choice([-2, -1, 1, 2], kept.shape) * kept
    return genomes


def rewire(genomes: np.ndarray, rng) -> np.ndarray:
    """Varied copies: two weights a step up or down, on average; a bias in 24 anew; one time
    in five a connection comes, one time in five one goes."""
    genomes = genomes.copy()
    w = genomes[:, :WEIGHTS]  # a view: what is written to it is written to the copy
    there = w != 0
    step = rng.random(w.shape) * there.sum(1, keepdims=True) < 2
    level = np.clip(w + 2 - (w > 0) + rng.choice([-1, 1], w.shape), 0, 3)  # in -2, -1, 1, 2
    w[there & step] = (level - 2 + (level > 1))[there & step]
    lot = rng.random(w.shape)
    value = rng.choice([-2, -1, 1, 2], len(w))
    for free, new in ((~there, value), (there, 0 * value)):
        rows = np.flatnonzero((rng.random(len(w)) < 0.2) & free.any(1))
        w[rows, (lot * free).argmax(1)[rows]] = new[rows]
    fresh = rng.random((len(w), GENES - WEIGHTS)) < 1 / 24
    genomes[:, WEIGHTS:][fresh] = rng.integers(-2, 3, fresh.sum())
    return genomes


def eye(evaluate=see):
    """The paper's first domain, for the notebook's ``search``: an object on the left and one on the right?"""
    return the_method().Domain(wire, rewire, evaluate, (0, 0), (lengths().sum(), 0.5))


class Remembering:
    """``see`` with the modularity of a graph computed once: most offspring have their parent's graph."""

    def __init__(self):
        self.known = {}

    def __call__(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        there = genomes[:, :WEIGHTS] != 0
        keys = [row.tobytes() for row in np.packbits(there, axis=1)]
        new = {key: i for i, key in enumerate(keys) if key not in self.known}
        if new:
            q, _ = modularity(links(genomes[list(new.values())]))
            self.known.update(zip(new, q, strict=True))
        performance = (answers(genomes) == task()[1]).mean(1)
        return performance, np.stack([there @ lengths(), [self.known[key] for key in keys]], 1)


# rivals


class Evolution:
    """A (mu + lambda) evolutionary algorithm: the best ``size`` survive, parents win a tournament of two."""

    def __init__(self, size: int = 200):
        self.alive = np.empty(0, int)
        self.seen = 0
        self.size = size

    def __call__(self, run, n: int, rng) -> np.ndarray:
        born = np.arange(self.seen, len(run.performance))
        pool = np.concatenate([born, self.alive])  # of equals the younger stays
        self.alive = pool[np.argsort(-run.performance[pool], kind="stable")[: self.size]]
        self.seen = len(run.performance)
        pair = rng.choice(self.alive, (2, n))
        return np.where(run.performance[pair[0]] >= run.performance[pair[1]], *pair)


class LocalCompetition:
    """Novelty search with local competition: NSGA-II on novelty and on the share of neighbours beaten."""

    def __init__(self, domain, size: int = 200, neighbours: int = 15, share: float = 0.025):
        self.low, self.high = np.array(domain.low, float), np.array(domain.high, float)
        self.size, self.neighbours, self.share = size, neighbours, share
        self.alive, self.kept, self.seen = np.empty(0, int), np.empty(0, int), 0

    def __call__(self, seen, n: int, rng) -> np.ndarray:
        born = np.arange(self.seen, len(seen.performance))
        self.seen = len(seen.performance)
        pool = np.concatenate([born, self.alive])
        around = np.concatenate([pool, self.kept])
        places = (seen.features - self.low) / (self.high - self.low)
        far, near = cKDTree(places[around]).query(places[pool], self.neighbours + 1)  # itself among them
        beaten = (seen.performance[around][near] < seen.performance[pool][:, None]).sum(1)
        value = np.stack([far.mean(1), beaten], 1)
        front = fronts(value)
        room = crowding(value, front)
        order = np.lexsort((-room, front))[: self.size]
        self.alive, front, room = pool[order], front[order], room[order]
        self.kept = np.concatenate([self.kept, born[rng.random(len(born)) < self.share]])
        a, b = rng.integers(0, len(self.alive), (2, n))
        first = (front[a] < front[b]) | ((front[a] == front[b]) & (room[a] >= room[b]))
        return self.alive[np.where(first, a, b)]


def fronts(value: np.ndarray) -> np.ndarray:
    """The front of each row of value [n, 2], both to be large: 0 where nothing dominates it, and so on."""
    rows, which = np.unique(value, axis=0, return_inverse=True)
    front, lowest = np.empty(len(rows), int), []  # minus the largest second value of each front, rising
    for i in np.lexsort((rows[:, 1], rows[:, 0]))[::-1]:  # nothing later dominates what came before
        front[i] = bisect_right(lowest, -rows[i, 1])
        lowest[front[i] : front[i] + 1] = [-rows[i, 1]]
    return front[which.ravel()]


def crowding(value: np.ndarray, front: np.ndarray) -> np.ndarray:
    """NSGA-II's crowding distance within each front, infinite at its ends."""
    room = np.zeros(len(value))
    for column in value.T:
        order = np.lexsort((column, front))
        starts = np.flatnonzero(np.diff(front[order], prepend=-1))
        ends = np.append(starts[1:], len(order)) - 1
        span = np.repeat(column[order[ends]] - column[order[starts]], ends - starts + 1)
        gap = np.full(len(order), np.inf)
        gap[1:-1] = (column[order[2:]] - column[order[:-2]]) / np.maximum(span[1:-1], 1e-12)
        gap[starts] = gap[ends] = np.inf
        room[order] += gap
    return room


def chooser(arm: str, method, domain, shape, evaluations: int):
    """How the arm chooses parents; None: it has none."""
    if arm == "random":
        return None
    if arm == "evolution":
        return Evolution()
    if arm == "NSLC":
        return LocalCompetition(domain)
    made = method.MapElites(domain, shape)
    if arm == "refined":
        coarse = method.MapElites(domain, [max(1, side // 4) for side in shape])
        return partial(refined, coarse, made, evaluations // 2)
    if arm == "fit parents":
        return partial(fit_parents, made)
    if arm == "first come":
        return partial(first_come, made)
    return made


def refined(coarse, fine, half: int, seen, n: int, rng) -> np.ndarray:
    """The paper's option: a coarse map at first, here for half of the evaluations."""
    return (coarse if len(seen.performance) < half else fine)(seen, n, rng)


def fit_parents(elites, seen, n: int, rng) -> np.ndarray:
    """Ablation: the better of two elites, in place of any elite."""
    pair = np.stack([elites(seen, n, rng), elites(seen, n, rng)])
    return np.where(seen.performance[pair[0]] >= seen.performance[pair[1]], *pair)


def first_come(elites, seen, n: int, rng) -> np.ndarray:
    """Ablation: a parent is any first occupant of a cell, however well it does."""
    return elites(seen._replace(performance=0 * seen.performance), n, rng)


# retina: the runs


def retina(arm: str, seed: int) -> dict:
    """Of one run: the map (patterns right, -1 empty) and the best at every budget; of long runs the way to the best."""
    method = the_method()
    domain = eye(Remembering())
    budgets = [b for b in BUDGETS if b <= COMMON or seed < LONG.get(arm, 0)]
    first = COMMON if arm == "random" else 2000
    found = method.search(domain, chooser(arm, method, domain, GRID, budgets[-1]), budgets[-1], seed, first=first)
    maps = {b: method.chart(found, domain, GRID, b) for b in budgets}
    whole = {b: np.where(m.elites < 0, -1, 256 * m.performance).astype(int).tolist() for b, m in maps.items()}
    result = {"maps": whole, "best": {b: found.performance[:b].max().item() for b in budgets}}
    if arm in WAYS:
        result["way"] = way(method, found, domain, COMMON)
    if arm == "MAP-Elites":
        result["elites"] = found.genomes[maps[COMMON].elites].tolist() if seed == 0 else []
        result["summit"] = found.genomes[found.performance.argmax()].tolist()
    return result


def way(method, found, domain, evaluations: int) -> list[dict]:
    """The ancestors of the best of the first evaluations, the oldest first."""
    rows, number = [], int(found.performance[:evaluations].argmax())
    while number >= 0:
        cell = method.cells(found.features[number : number + 1], GRID, domain.low, domain.high)[0]
        row = {"evaluation": number, "cell": int(cell), "performance": round(float(found.performance[number]), 6)}
        cost, q = found.features[number]
        rows.append(row | {"connection cost": round(float(cost), 3), "modularity": round(float(q), 6)})
        number = int(found.parents[number])
    return rows[::-1]


def retina_tables(kept: Work, seeds: int) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, torch.Tensor]]:
    method, runs = the_method(), {}
    for seed in range(seeds):
        for arm in ARMS:
            runs[arm, seed] = kept.once(f"retina-{arm}-{seed}", partial(retina, arm, seed))
    maps = {(*key, int(b)): np.array(m) for key, one in runs.items() for b, m in one["maps"].items()}
    best = np.max(list(maps.values()), axis=0)
    rows = [
        {"domain": "retina", "arm": a, "seed": s, "evaluations": b, "highest": runs[a, s]["best"][str(b)]}
        | measured(method, share(m), share(best))
        for (a, s, b), m in maps.items()
    ]
    ways = [{"arm": a, "seed": s, **row} for a in WAYS for s in range(seeds) for row in runs[a, s]["way"]]
    small = {f"{arm}": np.stack([maps[arm, s, COMMON] for s in range(seeds)]) for arm in ARMS}
    small["MAP-Elites, long"] = np.stack([maps["MAP-Elites", s, BUDGETS[-1]] for s in range(seeds)])
    small["MAP-Elites, early"] = np.stack([maps["MAP-Elites", s, BUDGETS[0]] for s in range(seeds)])
    tensors = {name: torch.from_numpy(m).to(torch.int16) for name, m in {**small, "M*": best}.items()}
    genomes = np.array(runs["MAP-Elites", 0]["elites"])
    genomes[maps["MAP-Elites", 0, COMMON] < 0] = 0
    tensors["genomes"] = torch.from_numpy(genomes).to(torch.int8)
    return pd.DataFrame(rows), pd.DataFrame(ways), tensors


def share(counts: np.ndarray) -> np.ndarray:
    """Shares of 256 patterns, empty cells -inf."""
    return np.where(counts < 0, -np.inf, counts / 256)


def measured(method, performance: np.ndarray, best: np.ndarray) -> dict[str, float]:
    """The four measures, and two of them of what lies above a constant answer."""
    found = {name: round(float(v[0]), 6) for name, v in method.metrics(performance, best).items()}
    above = [np.where(np.isfinite(p), np.maximum(p - CONSTANT, 0), p) for p in (performance, best)]
    more = {k: float(v[0]) for k, v in method.metrics(*above).items() if k in ("reliability", "precision")}
    return found | {f"{name} above a constant": round(v, 6) for name, v in more.items()}


# arm


def joints(genomes: np.ndarray) -> np.ndarray:
    """Where the joints of arms with genes in [0, 1] are, [n, joints + 1, 2]; lengths sum to 1. Raises: ValueError."""
    if genomes.ndim != 2 or not ((genomes >= 0) & (genomes <= 1)).all():
        raise ValueError(f"genomes are [n, joints] in [0, 1], not {genomes.shape}")
    heading = np.cumsum((2 * genomes - 1) * np.pi, 1)
    steps = np.stack([np.cos(heading), np.sin(heading)], -1) / genomes.shape[1]
    return np.concatenate([np.zeros_like(steps[:, :1]), np.cumsum(steps, 1)], 1)


def bend(genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Performance, 1 where all angles are equal, and the end point [n, 2]."""
    return 1 - ((2 * genomes - 1) * np.pi).std(1) / np.pi, joints(genomes)[:, -1]


def planar(many: int = 12, step: float = 0.05):
    """Reach a point with joints bent alike; mutation adds noise to all. Raises: ValueError."""
    if many < 2 or not step > 0:
        raise ValueError(f"two joints or more and a step above 0, not {many} and {step}")
    return the_method().Domain(
        sample=lambda n, rng: rng.random((n, many)),
        vary=lambda x, rng: np.clip(x + step * rng.standard_normal(x.shape), 0, 1),
        evaluate=bend,
        low=(-1, -1),
        high=(1, 1),
    )


def reach(arm: str, seed: int, step: float) -> np.ndarray:
    """The map of one search, [cells], empty cells -inf."""
    method = the_method()
    domain = planar(step=step)
    first = ARM_EVALUATIONS if arm == "random" else 2000
    choose = chooser(arm, method, domain, ARM_GRID, ARM_EVALUATIONS)
    found = method.search(domain, choose, ARM_EVALUATIONS, seed, first=first)
    return method.chart(found, domain, ARM_GRID).performance


def reached(kept: Work, arm: str, step: float, seed: int) -> np.ndarray:
    if arm == "random":
        step = STEPS[0]  # it has none
    found = kept.once(f"arm-{arm}-{step}-{seed}", lambda: reach(arm, seed, step).tolist())
    return np.array(found)


def arm_tables(kept: Work, seeds: int) -> tuple[pd.DataFrame, pd.DataFrame, torch.Tensor]:
    """The measures with each arm's own step, the pilots that chose it, and M*."""
    method = the_method()
    pilot = {(a, step, s): reached(kept, a, step, s) for a in ARMS for step in STEPS for s in PILOTS}
    top = np.max(list(pilot.values()), axis=0)
    steps = pd.DataFrame([row(method, m, top, arm=a, step=x, seed=s) for (a, x, s), m in pilot.items()])
    mean = steps.groupby(["arm", "step"])[["reliability", "best"]].mean()
    chosen = {(a, why): mean.loc[a, why].idxmax() for a in ARMS for why in ("reliability", "best")}
    wanted = {(a, chosen[a, why], s) for a, why in chosen for s in range(seeds)}
    found = {(a, step, s): reached(kept, a, step, s) for a, step, s in sorted(wanted)}
    maps = {(a, why, s): found[a, step, s] for (a, why), step in chosen.items() for s in range(seeds)}
    best = np.max(list(maps.values()), axis=0)
    rows = [
        row(method, m, best, domain="arm", arm=a, seed=s, evaluations=ARM_EVALUATIONS, step=chosen[a, why], chosen=why)
        for (a, why, s), m in maps.items()
    ]
    return pd.DataFrame(rows), steps, torch.from_numpy(best)


def row(method, performance: np.ndarray, best: np.ndarray, **labels) -> dict:
    found = {name: round(float(v[0]), 5) for name, v in method.metrics(performance, best).items()}
    return labels | {"highest": round(float(performance.max()), 5)} | found


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    kept = Work(work)
    table, ways, tensors = retina_tables(kept, seeds)
    arms, steps, best = arm_tables(kept, ARM_SEEDS)
    write_table(out / "retina.csv", table)
    write_table(out / "arm.csv", arms)
    write_table(out / "steps.csv", steps)
    write_table(out / "ways.csv", ways)
    write_tensors(out / "maps.safetensors", {**tensors, "arm M*": best})
    return [out / name for name in ("retina.csv", "arm.csv", "steps.csv", "ways.csv", "maps.safetensors")]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("map-elites"), seeds=seeds_option(4))
