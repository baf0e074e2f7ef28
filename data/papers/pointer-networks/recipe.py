"""All tables and networks of this folder: what notebooks/12-search-and-proof/05-pointer-networks measures beforehand.

Hulls of 10 points: pointer network and sequence to sequence with and without attention, three seeds each, every arm
with a learning rate of its own. Pointer networks for hulls of 5 to 12 points and for shortest tours of 5 to 10, three
seeds each, tested on more points as well, beside simple rules. About 12 minutes on a core; a run that was stopped goes
on where it was (delete the folder --work for a fresh start). The functions are the notebook's method cells.
"""

from __future__ import annotations

from functools import partial
from itertools import count, takewhile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from nbkit.recipes import (
    Work,
    round_to_half,
    run,
    seeds_option,
    widened,
    work_option,
    write_table,
    write_tensors,
)

ARMS = ("Ptr-Net", "Seq2Seq + attention", "Seq2Seq")
N = 10
GRID = (0.004, 0.008, 0.016)
STEPS = {"rate": 500, "compare": 800, "hull": 1500, "tour": 900}
LONGER = {"hull": 2400, "tour": 2000}  # one seed each, run when the outcomes of the others were known
TOUR_RATE = (
    0.016  # set by hand: at 0.064, the best for hulls, the training loss of two seeds in three never fell
)
LENGTHS = {"hull": (5, 12), "tour": (5, 10)}  # trained on
TESTED = {"hull": (5, 8, 10, 12, 15, 18, 24), "tour": (5, 8, 10, 12, 14)}
SETS = {"hull": 1000, "tour": 400}
BATCH = 64
PAD = -100  # behind the stop symbol; no loss there


def the_method():
    from nbkit import papers

    return papers.method("pointer-networks")


# labels and scores


class Ambiguous(ValueError):
    """A set of points with more than one right answer."""


def checked(P) -> np.ndarray:
    """Point sets [B, n, 2] as they are, in 64 bits. Raises: ValueError."""
    P = np.asarray(P, dtype=np.float64)
    if P.ndim != 3 or P.shape[1] < 3 or P.shape[2] != 2 or not np.isfinite(P).all():
        raise ValueError(f"points are finite numbers [sets, n, 2] with n of 3 or more: {P.shape}")
    return P


def turn(a, b, c) -> np.ndarray:
    """Twice the signed area of triangles a, b, c [..., 2]; positive: c is left of a -> b."""
    u = b - a
    w = c - a
    return u[..., 0] * w[..., 1] - u[..., 1] * w[..., 0]


def hulls(P) -> np.ndarray:
    """Targets [B, n + 2]: from the corner of the lowest index, counter-clockwise, that corner
    again, 0, then PAD. Raises: ValueError (also: three points on a line)."""
    P = checked(P)
    n = P.shape[1]
    area = turn(P[:, :, None, None], P[:, None, :, None], P[:, None, None])  # [B, i, j, k]
    i, j, k = np.ogrid[:n, :n, :n]
    if (np.abs(area) < 1e-9)[:, (i != j) & (j != k) & (k != i)].any():
        raise Ambiguous("three points of a set lie on a line: its corners are ambiguous")
    edge = ((area > 0) | (k == i) | (k == j)).all(3) & ~np.eye(n, dtype=bool)
    follows = edge.argmax(2)
    at = first = edge.any(2).argmax(1)
    C = np.full((len(P), n + 2), PAD)
    C[:, 0] = first + 1
    around = np.ones(len(P), dtype=bool)  # still on the way round
    for step in range(1, n + 2):
        C[:, step] = np.where(C[:, step - 1] > 0, 0, PAD)
        at = follows[np.arange(len(P)), at]
        C[around, step] = at[around] + 1
        around &= at != first
    return C


def corners(c) -> list[int]:
    """Indices from 0 of a target or an answer: up to stop, without the closing repetition."""
    found = [int(j) - 1 for j in takewhile(lambda j: j > 0, c)]
    return found[:-1] if len(found) > 1 and found[0] == found[-1] else found


def batch(targets, sets: int, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Uniform points [sets, n, 2] in the unit square, drawn anew where targets are ambiguous, and their targets."""
    while True:
        P = rng.random((sets, n, 2))
        try:
            C = targets(P)
            break
        except Ambiguous:  # once in a million sets
            continue
    C = C[:, (C != PAD).any(0)]
    return torch.from_numpy(P).float(), torch.from_numpy(C)


def tours(P) -> np.ndarray:
    """Targets [B, n] of shortest tours, from the first point, counter-clockwise.

    Held and Karp: of every set S of points and end j, the shortest way to go through S and end
    in j; n of 14 or fewer. Raises: ValueError.
    """
    P = checked(P)
    m = P.shape[1] - 1  # the points but the first
    if m > 13:
        raise ValueError(f"2 ** {m} subsets are too many: tours of 14 points at most")
    D = np.linalg.norm(P[:, :, None] - P[:, None], axis=3)
    cost = np.full((1 << m, len(P), m), np.inf)
    came = np.zeros(cost.shape, dtype=np.int8)
    for S in range(1, 1 << m):
        for j in (j for j in range(m) if S >> j & 1):
            ways = cost[S ^ 1 << j] + D[:, 1:, j + 1]
            alone = S == 1 << j
            came[S, :, j] = ways.argmin(1)
            cost[S, :, j] = D[:, 0, j + 1] if alone else ways.min(1)
    rows = np.arange(len(P))
    S = np.full(len(P), (1 << m) - 1)
    at = (cost[-1] + D[:, 1:, 0]).argmin(1)
    C = np.ones((len(P), m + 1), dtype=int)
    for step in range(m, 0, -1):
        C[:, step] = at + 2
        at, S = came[S, rows, at].astype(int), S ^ (1 << at)
    clockwise = np.array([signed_area(p[c - 1]) < 0 for p, c in zip(P, C, strict=True)])
    C[clockwise, 1:] = C[clockwise, :0:-1]
    return C


def signed_area(P: np.ndarray) -> float:
    """Of a polygon [m, 2]; positive: counter-clockwise."""
    return float(turn(np.zeros(2), P, np.roll(P, -1, 0)).sum() / 2)


def length(P: np.ndarray) -> float:
    """Of a closed tour through P [m, 2] in this order."""
    return float(np.linalg.norm(P - np.roll(P, -1, 0), axis=1).sum())


def cycle(order: list[int]) -> list[int]:
    """One writing for all starts and both directions of a closed polygon."""
    at = order.index(min(order))
    turned = order[at:] + order[:at]
    return min(turned, turned[:1] + turned[:0:-1])


def simple(P) -> bool:
    """Whether a polygon [m, 2] has three corners or more, all different, and no sides that cross."""
    Q = np.roll(P, -1, 0)
    if len(np.unique(P, axis=0)) < max(3, len(P)):
        return False
    parts = turn(P[:, None], Q[:, None], P[None]) * turn(P[:, None], Q[:, None], Q[None]) < 0
    return not (parts & parts.T).any()


def judge(P, C, found) -> dict:
    """Of one set [n, 2]: the same polygon? simple? which share of the area (NaN if not simple)?"""
    P, right, given = checked(P[None])[0], corners(C), corners(found)
    is_simple = simple(P[given])
    share = abs(signed_area(P[given])) / signed_area(P[right]) if is_simple else np.nan
    same = bool(given) and cycle(given) == cycle(right)
    return {"accurate": same, "simple": is_simple, "coverage": share}


# rivals


class Seq2Seq(nn.Module):
    """The paper's rivals: a score for each of n + 1 words, from the decoder's state d, or from d and what attention
    reads, which is also fed to the next step."""

    def __init__(self, n: int, hidden: int = 64, attention: bool = False):
        super().__init__()
        self.encoder = nn.LSTM(2, hidden, batch_first=True)
        self.decoder = nn.LSTMCell(2 + attention * hidden, hidden)
        self.begin = nn.Parameter(torch.empty(2))
        self.out = nn.Linear(hidden * (1 + attention), n + 1)
        if attention:
            self.W1 = nn.Linear(hidden, hidden, bias=False)
            self.W2 = nn.Linear(hidden, hidden, bias=False)
            self.v = nn.Parameter(torch.empty(hidden))
        self.n, self.attention = n, attention
        the_method().initialise(self)

    def encode(self, P):
        if P.shape[1] != self.n:
            raise ValueError(f"its dictionary holds {self.n} points, not {P.shape[1]}")
        e, (h, c) = self.encoder(P)
        return e, (h, c, torch.zeros_like(h)) if self.attention else (h, c)

    def step(self, e, x, state):
        h, c, *read = (part[0] for part in state)
        h, c = self.decoder(torch.cat([x, *read], 1), (h, c))
        if self.attention:
            a = (torch.tanh(self.W1(e) + self.W2(h)[:, None]) @ self.v).softmax(1)
            read = [(a[:, :, None] * e).sum(1)]
        u = self.out(torch.cat([*read, h], 1))
        return u, tuple(part[None] for part in (h, c, *read))

    def forward(self, P, C):
        """Scores [B, m, n + 1], the right answers C [B, m] being known."""
        e, state = self.encode(P)
        scores = []
        for x in the_method().fed(self.begin, P, C).unbind(1):
            u, state = self.step(e, x, state)
            scores.append(u)
        return torch.stack(scores, 1)


def told(net: nn.Module, P: np.ndarray, **how) -> tuple[np.ndarray, np.ndarray, float]:
    """The answer for one set [n, 2], up to the first stop, its weights [m, n + 1] at each step, and its log p; ``how``
    as for the notebook's ``decode``."""
    points = torch.from_numpy(P).float()[None]
    C = the_method().decode(net, points, **how)
    C = C[:, : (C[0] > 0).sum() + (not how.get("tour"))]
    with torch.no_grad():
        p = net(points, C).softmax(2)[0]
    return C[0].numpy(), p.numpy(), p.gather(1, C[0][:, None]).log().sum().item()


def network(arm: str, seed: int):
    """A network before training."""
    method = the_method()
    torch.manual_seed(seed)
    if arm == "Ptr-Net":
        return method.PointerNet()
    return Seq2Seq(N, attention="attention" in arm)


def batches(task: str, lengths: tuple[int, int], seed: int):
    """Batches without end; all sets of a batch have equally many points."""
    rng = np.random.default_rng([seed, 1])
    targets = {"hull": hulls, "tour": tours}[task]
    for _ in count():
        yield batch(targets, BATCH, int(rng.integers(lengths[0], lengths[1] + 1)), rng)


def test_sets(task: str, n: int, sets: int, seed: int = 2):
    """Points [sets, n, 2] and targets that no network is trained on."""
    rng = np.random.default_rng([n, sets, seed])
    targets = {"hull": hulls, "tour": tours}[task]
    parts = [batch(targets, min(100, sets - done), n, rng) for done in range(0, sets, 100)]
    widest = max(C.shape[1] for _, C in parts)
    fill = partial(torch.nn.functional.pad, value=PAD)
    return torch.cat([P for P, _ in parts]), torch.cat([fill(C, (0, widest - C.shape[1])) for _, C in parts])


# rates


def validation_loss(arm: str, rate: float) -> float:
    method, net = the_method(), network(arm, seed=100)
    method.train(net, batches("hull", (N, N), seed=100), STEPS["rate"], rate)
    P, C = test_sets("hull", N, 500, seed=3)
    with torch.no_grad():
        return nn.functional.cross_entropy(net(P, C).flatten(0, 1), C.flatten(), ignore_index=PAD).item()


def rates(arm: str) -> dict:
    found = widened(partial(validation_loss, arm), GRID)
    return {str(rate): round(loss, 4) for rate, loss in found.items()}


def best(found: dict) -> float:
    return float(min(found, key=found.get))


# hulls


def judged(P, C, answers) -> dict:
    """Shares of 1,000 sets: accuracy, simple polygons, area covered by those."""
    rows = pd.DataFrame(
        [judge(*one) for one in zip(P.numpy().astype(float), C.numpy(), answers, strict=True)]
    )
    means = rows.mean()
    return {"accuracy": round(means["accurate"], 4), "simple": round(means["simple"], 4),
            "coverage": None if np.isnan(means["coverage"]) else round(means["coverage"], 4)}  # fmt: skip


def compare(arm: str, seed: int, rate: float) -> dict:
    """An arm trained and tested on sets of 10 points."""
    method, net = the_method(), network(arm, seed)
    losses = method.train(net, batches("hull", (N, N), seed), STEPS["compare"], rate)
    round_to_half(net)
    P, C = test_sets("hull", N, SETS["hull"])
    rows = [{"beam": k} | judged(P, C, method.decode(net, P, beam=k).numpy()) for k in (1, 3)]
    return {"losses": np.reshape(losses, (-1, 50)).mean(1).round(3).tolist(), "rows": rows}


def trained(task: str, seed: int, rate: float) -> dict:
    """A pointer network for sets of several sizes; its weights, as lists of what float16 holds."""
    method, net = the_method(), network("Ptr-Net", seed)
    losses = method.train(net, batches(task, LENGTHS[task], seed), STEPS[task], rate)
    round_to_half(net)
    weights = {name: w.tolist() for name, w in net.state_dict().items()}
    return {"losses": np.reshape(losses, (-1, 50)).mean(1).round(3).tolist(), "weights": weights}


def coins() -> tuple[np.ndarray, np.ndarray]:
    """The photograph of coins, [H, W], and their centres [24, 2], y upwards, scaled to the unit square: blobs over
    Otsu's threshold of more than 500 pixels."""
    from skimage import filters, measure

    from nbkit import datasets

    photo = datasets.load("photos")["coins"][..., 0]
    blobs = measure.regionprops(measure.label(photo > filters.threshold_otsu(photo)))
    centres = np.array([(blob.centroid[1], -blob.centroid[0]) for blob in blobs if blob.area > 500])
    return photo, (centres - centres.min(0)) / np.ptp(centres, axis=0)


def loaded(weights: dict):
    net = the_method().PointerNet()
    net.load_state_dict({name: torch.as_tensor(w).float() for name, w in weights.items()})
    return net


def extremes(P: np.ndarray, directions: int) -> np.ndarray:
    """Answers [B, directions + 1]: the outermost point in each of so many directions, once, in their order; no
    learning. 0s behind."""
    angles = 2 * np.pi * np.arange(directions) / directions
    outermost = (P @ np.stack([np.cos(angles), np.sin(angles)])).argmax(1)  # [B, directions]
    answers = np.zeros((len(P), directions + 1), dtype=int)
    for row, found in zip(answers, outermost, strict=True):
        once = list(dict.fromkeys(found.tolist()))
        row[: len(once)] = np.array(once) + 1
    return answers


def by_lot(P: np.ndarray, C: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Answers: as many points as the hull has corners, any, in the order of their angle about their mean."""
    answers = np.zeros((len(P), P.shape[1] + 1), dtype=int)
    for row, points, target in zip(answers, P, C, strict=True):
        some = rng.choice(len(points), len(corners(target)), replace=False)
        x, y = (points[some] - points[some].mean(0)).T
        row[: len(some)] = some[np.arctan2(y, x).argsort()] + 1
    return answers


def hull_rows(seed: int, weights: dict) -> list[dict]:
    method, net, rows = the_method(), loaded(weights), []
    for n in TESTED["hull"]:
        P, C = test_sets("hull", n, SETS["hull"])
        for k in (1, 3):
            found = judged(P, C, method.decode(net, P, beam=k).numpy())
            rows.append({"rule": "Ptr-Net", "seed": seed, "n": n, "beam": k} | found)
    return rows


def hull_rules() -> list[dict]:
    rows = []
    for n in TESTED["hull"]:
        P, C = test_sets("hull", n, SETS["hull"])
        points, rng = P.numpy().astype(float), np.random.default_rng(n)
        answers = {f"{k} directions": extremes(points, k) for k in (4, 8, 16)} | {
            "by lot": by_lot(points, C.numpy(), rng)
        }
        for rule, given in answers.items():
            rows.append({"rule": rule, "seed": 0, "n": n, "beam": 0} | judged(P, C, given))
    return rows


# tours


def nearest(P: np.ndarray) -> list[int]:
    """From the first point always on to the nearest that is left."""
    order, left = [0], set(range(1, len(P)))
    while left:
        order.append(min(left, key=lambda j: np.linalg.norm(P[j] - P[order[-1]])))
        left.remove(order[-1])
    return order


def two_opt(P: np.ndarray, order: list[int]) -> list[int]:
    """Turns stretches of a tour round as long as that makes it shorter."""
    better = True
    while better:
        better = False
        for i in range(1, len(P) - 1):
            for j in range(i + 1, len(P)):
                turned = order[:i] + order[i : j + 1][::-1] + order[j + 1 :]
                if length(P[turned]) < length(P[order]) - 1e-12:
                    order, better = turned, True
    return order


def ratio(P, C, answers) -> dict:
    """Length of tours over the shortest, both summed over sets; all answers visit each point once."""
    made = sum(length(p[list(a)]) for p, a in zip(P, answers, strict=True))
    return {"ratio": round(made / sum(length(p[c - 1]) for p, c in zip(P, C, strict=True)), 4)}


def tour_rows(seed: int, weights: dict) -> list[dict]:
    method, net, rows = the_method(), loaded(weights), []
    for n in TESTED["tour"]:
        P, C = test_sets("tour", n, SETS["tour"])
        points, free = (
            P.numpy().astype(float),
            method.decode(net, P, beam=3, tour=True).numpy(),
        )
        valid = np.mean([sorted(c) == list(range(1, n + 1)) for c in free.tolist()])
        for k in (1, 3):
            found = ratio(
                points, C.numpy(), method.decode(net, P, beam=k, tour=True, constrained=True).numpy() - 1
            )
            rows.append(
                {"rule": "Ptr-Net", "seed": seed, "n": n, "beam": k, "valid": round(valid, 4)} | found
            )
    return rows


def tour_rules() -> list[dict]:
    rows = []
    for n in TESTED["tour"]:
        P, C = test_sets("tour", n, SETS["tour"])
        points, rng = P.numpy().astype(float), np.random.default_rng(n)
        near = [nearest(p) for p in points]
        answers = {"random": [rng.permutation(n) for _ in points], "nearest": near,
                   "2-opt": [two_opt(p, order) for p, order in zip(points, near, strict=True)]}  # fmt: skip
        for rule, given in answers.items():
            rows.append(
                {"rule": rule, "seed": 0, "n": n, "beam": 0, "valid": 1.0} | ratio(points, C.numpy(), given)
            )
    return rows


# more training


def longer() -> list[dict]:
    """One seed of the rival with attention at two rates, and one network for tours at twice its rate; beam 3."""
    method, rows = the_method(), []
    P, C = test_sets("hull", N, SETS["hull"])
    for rate in (0.032, 0.128):
        net = network("Seq2Seq + attention", seed=2)
        method.train(net, batches("hull", (N, N), 2), LONGER["hull"], rate)
        round_to_half(net)
        score = judged(P, C, method.decode(net, P, beam=3).numpy())["accuracy"]
        rows.append(
            {"arm": "Seq2Seq + attention", "rate": rate, "steps": LONGER["hull"], "n": N, "score": score}
        )
    net = network("Ptr-Net", seed=0)
    method.train(net, batches("tour", LENGTHS["tour"], 0), LONGER["tour"], 2 * TOUR_RATE)
    round_to_half(net)
    for n in (5, 8, 10, 12):
        P, C = test_sets("tour", n, SETS["tour"])
        answers = method.decode(net, P, beam=3, tour=True, constrained=True).numpy() - 1
        score = ratio(P.numpy().astype(float), C.numpy(), answers)["ratio"]
        rows.append({"arm": "tour", "rate": 2 * TOUR_RATE, "steps": LONGER["tour"], "n": n, "score": score})
    return rows


def build(out: Path, work: Path, seeds: int = 3) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    rate = {"Ptr-Net": kept.once("rates-Ptr-Net", partial(rates, "Ptr-Net"))}
    nets = {("hull", 0): kept.once("hull-0", partial(trained, "hull", 0, best(rate["Ptr-Net"])))}
    compared = {}
    for arm in ARMS:
        rate[arm] = kept.once(f"rates-{arm}", partial(rates, arm))
        for seed in range(seeds):
            compared[arm, seed] = kept.once(
                f"compare-{arm}-{seed}", partial(compare, arm, seed, best(rate[arm]))
            )
    for task, seed in [(task, seed) for task in LENGTHS for seed in range(seeds)]:
        made = partial(trained, task, seed, TOUR_RATE if task == "tour" else best(rate["Ptr-Net"]))
        nets[task, seed] = kept.once(f"{task}-{seed}", made)
    tables = {"rates": [{"arm": a, "rate": float(r), "loss": v} for a in ARMS for r, v in rate[a].items()]}
    tables["compare"] = [{"arm": a, "seed": s} | r for (a, s), made in compared.items() for r in made["rows"]]
    tables["curves"] = [
        {"arm": arm, "seed": seed, "step": 50 * i, "loss": loss}
        for (arm, seed), made in compared.items()
        for i, loss in enumerate(made["losses"], start=1)
    ]
    measure = {"hull": (hull_rules, hull_rows), "tour": (tour_rules, tour_rows)}
    for task, (rules, rows) in measure.items():
        tables[task] = kept.once(f"{task}-rules", rules)
        for seed in range(seeds):
            tables[task] += kept.once(f"{task}-rows-{seed}", partial(rows, seed, nets[task, seed]["weights"]))
    tables["longer"] = kept.once("longer", longer)
    paths = []
    for name, table in tables.items():
        write_table(out / f"{name}.csv", pd.DataFrame(table))
        paths.append(out / f"{name}.csv")
    for task in LENGTHS:
        half = {name: torch.tensor(w).half() for name, w in nets[task, 0]["weights"].items()}
        write_tensors(out / f"{task}.safetensors", half)
        paths.append(out / f"{task}.safetensors")
    return paths


if __name__ == "__main__":
    run(build, __doc__, work=work_option("pointer-networks"), seeds=seeds_option(3))
