"""All tables of this folder: what notebooks/12-search-and-proof/04-order-preserving-gflownets measures beforehand.

Eight runs an arm on a grid of 16 x 16 cells: order-preserving training, and trajectory balance at three exponents and
three rewards, each with its own learning rate; five runs a method on each of two two-objective grids; 180 searches a
method on the table of 125 cells of the notebook on the evaluation of architecture search. About 6 minutes on one
core; a run that was stopped goes on where it was (delete the folder --work for a fresh start). The functions are the
notebook's method cells; the rival for two objectives, PC-GFN, and evolution stand here.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from nbkit.recipes import Work, part_option, run, work_option, write_table, write_tensors

H = 16
R0S = (0.1, 0.01, 0.001)
BETAS = (1, 4, 16)
RATES = (0.05, 0.2, 0.8)
RUNS = 8
TUNING = 1000  # from this seed on, runs that only choose
STEPS = 1000
WATCH = (0, 20, 60, 200, 400, 600, 1000)

SIDE = 32
PAIRS = (("branin", "currin"), ("shubert", "beale"))
OTHER = ("branin", "beale")  # on which the learning rates are chosen
NET_RATES = {"OP": (3e-3, 1e-2, 3e-2, 1e-1), "PC": (1e-3, 3e-3, 1e-2)}  # the best of each has neighbours on both sides
NET_STEPS = 300
SEEDS = 5
BATCH = 64


@functools.cache
def parts():
    from nbkit import papers

    return papers.method("order-preserving-gflownets")


# --- one objective, a grid


def levels(H: int):
    """[H * H]: 2 on the peaks, 1 on the plateaus around them, 0 elsewhere."""
    import torch

    off = (2 * torch.cartesian_prod(torch.arange(H), torch.arange(H)) - (H - 1)).abs()
    plateau = (2 * off > H - 1).all(1)  # in whole numbers: no rounding at the edges
    peak = ((5 * off > 3 * (H - 1)) & (5 * off < 4 * (H - 1))).all(1)
    return plateau.long() + peak.long()


def rewards(H: int, R0: float):
    """The paper's grid: R0 everywhere, 0.5 more on the plateaus, 2.5 more on the peaks."""
    import torch

    return R0 + torch.tensor([0.0, 0.5, 2.5])[levels(H)]


def rows_of(arm: dict, seen: dict, levels) -> list[dict]:
    """A row a run and watched step: mass of the best cells, entropy, and how well log p_T keeps the order."""
    found = []
    for step, p in seen.items():
        for seed, one in enumerate(p.double()):
            log_p = one.clamp(min=1e-300).log()
            means = [log_p[levels == k].mean().item() for k in range(3)]
            row = arm | {"seed": seed, "step": step, "entropy": round(-(one * log_p).sum().item(), 3)}
            row |= {f"mode {i}": round(v, 4) for i, v in enumerate(one[levels == 2].tolist())}
            row |= {"concordance": round(concordance(log_p, levels), 3)}
            found.append(row | {"middle": round((means[1] - means[0]) / (means[2] - means[0] or math.nan), 3)})
    return found


def log_rewards(R0: float, beta: float, clip: bool):
    """[256], beta log R, not below -12 where clipped."""
    log_R = beta * rewards(H, R0).log()
    return log_R.clamp(min=-12) if clip else log_R


def needs_clip(R0: float, beta: float) -> bool:
    return beta * math.log(R0) < -12


def score(p, levels) -> list[float]:
    """Modes with more than 0.05 of the mass, then the mass of all, over runs: what choices go by."""
    mass = p[:, levels == 2]
    return [(mass > 0.05).sum(1).double().mean().item(), mass.sum(1).mean().item()]


def tune_grid(lr: float) -> list[dict]:
    """Two runs of every arm at one learning rate."""
    import torch

    m = parts()
    height = levels(H)
    arms = [(R0, b, c) for R0, b in product(R0S, BETAS) for c in ((False, True) if needs_clip(R0, b) else (False,))]
    values = torch.stack([log_rewards(*arm) for arm in arms for _ in range(2)])
    _, _, seen = m.train(m.grid(H), values, m.balance_loss, lr=lr, seed=TUNING, steps=STEPS, watch=(STEPS,))
    found = [
        {"R0": R0, "beta": b, "clip": c, "lr": lr, "score": score(seen[STEPS][2 * i : 2 * i + 2], height)}
        for i, (R0, b, c) in enumerate(arms)
    ]
    values = rewards(H, 0.1).repeat(2, 1)
    _, _, seen = m.train(m.grid(H), values, m.pair_loss, lr=lr, seed=TUNING, steps=STEPS, watch=(STEPS,))
    return [*found, {"R0": 0, "beta": 0, "clip": False, "lr": lr, "score": score(seen[STEPS], height)}]


def concordance(log_p, u) -> float:
    """Of all pairs with different u, the share in which the better has the larger log_p."""
    better = u[:, None] > u
    return (log_p[:, None] > log_p)[better].double().mean().item()


def packed(seen: dict, run: int) -> list:
    """[steps, S], log p_T of one run, as numbers JSON holds."""
    return [seen[step][run].double().clamp(min=1e-30).log().tolist() for step in WATCH]


def grid_runs(lr: float, arms: list) -> list:
    """Eight runs of each TB arm (R0, beta, clip) that wants this learning rate."""
    import torch

    m = parts()
    values = torch.stack([log_rewards(*arm) for arm in arms for _ in range(RUNS)])
    _, _, seen = m.train(m.grid(H), values, m.balance_loss, lr=lr, seed=0, steps=STEPS, watch=WATCH)
    found = []
    for i, (R0, b, clip) in enumerate(arms):
        mine = {step: p[RUNS * i : RUNS * (i + 1)] for step, p in seen.items()}
        arm = {"arm": "TB", "R0": R0, "beta": b, "lr": lr, "clip": clip, "explore": 0.01, "back": 32}
        found.append([rows_of(arm, mine, levels(H)), f"TB {R0:g} {b}", packed(mine, 0)])
    return found


def order_runs(lr: float, back: int, explore: float) -> list:
    """Eight runs of OP, with or without ways back."""
    m = parts()
    values = rewards(H, 0.1).repeat(RUNS, 1)
    batch = (96 - back, back, explore)
    _, _, seen = m.train(
        m.grid(H), values, m.pair_loss, lr=lr, batch=batch, seed=0, steps=STEPS, watch=WATCH
    )
    arm = {"arm": "OP", "R0": 0.0, "beta": 0, "lr": lr, "clip": False, "explore": explore, "back": back}
    name = "OP" if back else f"OP on-policy {explore:g}"
    return [[rows_of(arm, seen, levels(H)), name, packed(seen, 0)]]


def grids(kept: Work) -> tuple[list[dict], list[dict], dict]:
    tuned = [row for lr in RATES for row in kept.once(f"tune-{lr}", partial(tune_grid, lr))]
    best = {}
    for row in tuned:
        key = (row["R0"], row["beta"])
        if key not in best or row["score"] > best[key]["score"]:
            best[key] = row
    found = []
    for lr in RATES:
        arms = [(*key, row["clip"]) for key, row in best.items() if row["lr"] == lr and key[1]]
        if arms:
            key = "-".join(f"{R0:g}b{b}{'c' * clip}" for R0, b, clip in arms)
            found += kept.once(f"TB-{lr}-{key}", partial(grid_runs, lr, arms))
    lr = best[0, 0]["lr"]
    for setting in ((32, 0.01), (0, 0.01), (0, 0.1)):
        found += kept.once(f"OP-{lr}-{setting}", partial(order_runs, lr, *setting))
    for row in tuned:
        count, mass = row.pop("score")
        row |= {"modes": count, "mass": round(mass, 4), "chosen": row is best[row["R0"], row["beta"]]}
    rows = [{"name": label(row)} | row | summed(row) for rows, _, _ in found for row in rows]
    return tuned, rows, {name: log_p for _, name, log_p in found}


def summed(row: dict) -> dict:
    """Mass of the four peaks, and how many have more than 0.05 of it."""
    mass = [row[f"mode {i}"] for i in range(4)]
    return {"mass": round(sum(mass), 4), "modes": sum(one > 0.05 for one in mass)}


def label(row: dict) -> str:
    """What a reader calls an arm: ``TB 4``, ``OP``, ``OP, no ways back, 0.1``."""
    if row["arm"] == "TB":
        return f"TB {row['beta']}"
    return "OP" if row["back"] else f"OP, no ways back, {row['explore']:g}"


# --- two objectives, a grid


def objectives(pair, H: int):
    """Two of four test functions on H x H points of [-1, 1]^2, to be maximised: [H * H, 2]."""
    import torch

    x, y = torch.cartesian_prod(*[torch.linspace(-1, 1, H, dtype=torch.float64)] * 2).T
    a, b = (x + 1) / 2, (y + 1) / 2
    rise = 2300 * a**3 + 1900 * a**2 + 2092 * a + 60
    bowl = 15 * b - 5.1 * (15 * a - 5) ** 2 / (4 * math.pi**2) + 5 * (15 * a - 5) / math.pi - 6
    waves = [sum(i * torch.cos(i - 1.5 * (i + 1) * z) for i in range(1, 6)) for z in (x, y)]
    table = {
        "branin": 1 - (bowl**2 + 10 * (1 - 1 / (8 * math.pi)) * torch.cos(15 * a - 5) + 10) / 308.13,
        "currin": (1 - torch.exp(-1 / (2 * b + 1e-10)))
        * rise / (100 * a**3 + 500 * a**2 + 4 * a + 20) / 13.77,
        "shubert": (waves[0] * waves[1] + 186.8) / 397,
        "beale": sum((c - x + x * y**k) ** 2 for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))) / 38.8,
    }
    return torch.stack([table[name] for name in pair], 1).float()


def reachable(H: int):
    """All cells of a grid whose sides end the way but the far corner: [H * H]."""
    import torch

    return torch.arange(H * H) < H * H - 1


def front(u, among):
    """Which of the candidates are among and undominated there: [N]."""
    import torch

    return among & parts().undominated(torch.where(among[:, None], u, -torch.inf))


def igd_plus(found, best) -> float:
    """Mean distance from the front, best [m, d], to what was found, [n, d]; only lacks count."""
    lack = (best[:, None] - found).clamp(min=0).norm(dim=-1)
    return lack.amin(1).mean().item()


def network(inputs: int, hidden: int, outputs: int):
    from torch import nn

    widths = [inputs, hidden, hidden, hidden]
    layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.LeakyReLU())]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


@functools.cache
def board():
    """The grid whose sides end the way, and its cells one-hot, [1024, 64]."""
    import torch

    cells = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    hot = torch.nn.functional.one_hot(cells, SIDE).flatten(1).float()
    return walled(SIDE), hot


def walled(side: int):
    """The grid where a coordinate side - 1 ends the way, as in the public code."""
    import torch

    m = parts()
    x, y = torch.cartesian_prod(torch.arange(side), torch.arange(side)).T
    at_wall = (x == side - 1) | (y == side - 1)
    return m.space(m.grid(side).child.masked_fill(at_wall[:, None], -1), torch.ones_like(x))


def preferences(n: int, generator):
    """Weights from Dirichlet(1.5), exponents from Gamma(16): [n, 2], [n]."""
    gamma = generator.gamma(1.5, size=(n, 2))
    return gamma / gamma.sum(1, keepdims=True), generator.gamma(16.0, size=n)


def conditioned_policy(net, condition, at):
    """log P_F [N, 3] in the states at [N], each under its own weights and exponent, [N, 3]."""
    import torch

    where, hot = board()
    logits = net(torch.cat([hot[at], condition], 1))
    allowed = torch.cat([where.child[at] >= 0, where.stops[at, None]], 1)
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(1)


def conditioned_ways(net, condition, g):
    """A way under each condition: states, actions and owners of all its steps, and where each way ended."""
    import torch

    where = board()[0]
    at, which = torch.zeros(len(condition), dtype=torch.long), torch.arange(len(condition))
    states, actions, owners, ended = [], [], [], torch.zeros_like(at)
    while len(at):
        with torch.no_grad():
            p = conditioned_policy(net, condition[which], at).exp()
        even = (p > 0).float()
        a = torch.multinomial(0.99 * p + 0.01 * even / even.sum(1, keepdim=True), 1, generator=g).squeeze(1)
        states, actions, owners = [*states, at], [*actions, a], [*owners, which]
        ended[which[a == 2]] = at[a == 2]
        at, which = where.child[at, a.clamp(max=1)][a < 2], which[a < 2]
    return torch.cat(states), torch.cat(actions), torch.cat(owners), ended


def conditioned_loss(net, flow, u, weights, beta, states, actions, owners, ended):
    """Trajectory balance towards (w u)^beta, log Z a network of weights and exponent."""
    import torch

    m, (where, _) = parts(), board()
    condition = torch.cat([weights, beta[:, None]], 1)
    ahead = conditioned_policy(net, condition[owners], states).gather(1, actions[:, None]).squeeze(1)
    move = actions.clamp(max=1)
    behind = torch.where(actions < 2, m.uniform(where)[where.child[states, move].clamp(min=0), move], 0.0)
    log_r = flow(condition).squeeze(1).index_add(0, owners, ahead - behind)
    return m.balance_loss(log_r, beta * (weights * u[ended]).sum(1).clamp(min=1e-30).log())


def conditioned_ends(net, draws):
    """p_T of PC-GFN, the mean over these preferences."""
    import torch

    m, (where, hot) = parts(), board()
    weights, beta = (torch.from_numpy(part).float() for part in draws)
    condition = torch.cat([weights, beta[:, None]], 1)
    n, S = len(beta), len(hot)
    with torch.no_grad():
        rows = [net(torch.cat([hot, one.expand(S, -1)], 1)) for one in condition]
        many = m.copies(where, n)
        return m.landing(m.policy(torch.cat(rows), many), many, S * torch.arange(n)).view(n, S).mean(0)


def front_run(pair, arm: str, lr: float, seed: int, steps: int):
    """log p_T [1024] after training."""
    import torch

    m, (where, hot) = parts(), board()
    u = objectives(pair, SIDE)
    torch.manual_seed(seed)
    g, draw = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    net, flow = network(67, 64, 3), network(3, 32, 1)
    adam = torch.optim.Adam([*net.parameters(), *flow.parameters()], lr=lr, weight_decay=1e-4)
    constant = torch.cat([hot, torch.ones(len(hot), 3)], 1)
    log_pb = m.uniform(where)
    for _ in range(steps):
        if arm == "OP":
            log_pf = m.policy(net(constant), where)
            *ways, at = m.walk(log_pf, where, torch.zeros(BATCH, dtype=torch.long), 0.01, g)
            loss = m.order_loss(m.log_reward(log_pf, log_pb, where, *ways), u[at])
        else:
            weights, beta = (torch.from_numpy(part).float() for part in preferences(BATCH, draw))
            ways = conditioned_ways(net, torch.cat([weights, beta[:, None]], 1), g)
            loss = conditioned_loss(net, flow, u, weights, beta, *ways)
        adam.zero_grad()
        loss.backward()
        adam.step()
    if arm == "OP":
        with torch.no_grad():
            p = m.landing(m.policy(net(constant), where), where, torch.tensor([0]))
    else:
        p = conditioned_ends(net, preferences(64, np.random.default_rng(TUNING + seed)))
    return p.double().clamp(min=1e-30).log().tolist()


def judged_front(pair, log_p, seed: int) -> dict:
    """Share of the mass on the true front; share of the front in 64 draws; their distance to it, IGD+."""
    import torch

    u, p = objectives(pair, SIDE).double(), torch.tensor(log_p).exp()
    best = front(u, reachable(SIDE))
    draws = torch.multinomial(p, 20 * BATCH, True, generator=torch.Generator().manual_seed(seed)).view(20, -1)
    igd = np.mean([igd_plus(u[one], u[best]) for one in draws])
    return {"share": round(p[best].sum().item(), 4), "found": round((1 - (1 - p[best]) ** BATCH).mean().item(), 4),
            "IGD+": round(float(igd), 4)}  # fmt: skip


def fronts(kept: Work) -> tuple[list[dict], dict]:
    import torch

    rate = {}
    for arm in ("OP", "PC"):
        tried = {}
        for lr in NET_RATES[arm]:
            log_p = kept.once(f"front-tune-{arm}-{lr}", partial(front_run, OTHER, arm, lr, TUNING, NET_STEPS))
            tried[lr] = judged_front(OTHER, log_p, 0)["share"]
        rate[arm] = max(tried, key=tried.get)
    rows, maps = [], {}
    allowed = reachable(SIDE)
    for pair in PAIRS:
        name = "-".join(pair)
        arms = {"OP": ("OP", rate["OP"]), "PC": ("PC", rate["PC"]), "OP, the code's rate": ("OP", 0.01)}
        for (label, (arm, lr)), seed in product(arms.items(), range(SEEDS)):
            one = partial(front_run, pair, arm, lr, seed, NET_STEPS)
            log_p = kept.once(f"front-{name}-{arm}-{lr}-{seed}", one)
            rows.append({"pair": name, "arm": label, "lr": lr, "seed": seed} | judged_front(pair, log_p, seed))
            if seed == 0 and label in ("OP", "PC"):
                maps[f"{arm} {name}"] = log_p
        best = front(objectives(pair, SIDE), allowed)
        maps[f"front {name}"] = torch.where(best, 1 / best.sum(), 0.0).double().clamp(min=1e-30).log().tolist()
        even = torch.where(allowed, 1 / allowed.sum(), 0.0).double().clamp(min=1e-30).log().tolist()
        rows.append({"pair": name, "arm": "every cell alike", "lr": 0.0, "seed": 0} | judged_front(pair, even, 0))
    return rows, maps


# --- a table of cells


def blanks(edges: int = 3, options: int = 5):
    """A form filled in in any order: action options e + o sets blank e to o; stop when full.

    The state is read as digits, the last blank fastest: 0 is empty, 1 + o is option o.
    """
    import torch

    if edges < 1 or options < 1:
        raise ValueError(f"a form has 1 blank or more, of 1 option or more: {edges}, {options}")
    digits = torch.cartesian_prod(*[torch.arange(options + 1)] * edges).view(-1, edges)
    steps = (options + 1) ** torch.arange(edges - 1, -1, -1)
    filled = torch.arange(len(digits))[:, None, None] + steps[:, None] * torch.arange(1, options + 1)
    child = torch.where(digits[:, :, None] == 0, filled, -1)
    return parts().space(child.flatten(1), (digits > 0).all(1))


TABLE = "nas-evaluation"
OPS = ("none", "skip", "conv1x1", "conv3x3", "avgpool3x3")
FIRST = 10
EACH = 5
MOST = 40
SEARCHES = 180
AT_ONCE = 60
CELL_BETAS = (1, 16, 64, 256)
CELL_RATES = (0.05, 0.2)


@functools.cache
def table():
    """Validation [3, 125] and mean test accuracy [125] of the cells of two cells, in percent; the graph's ends."""
    import torch

    from nbkit import papers

    stored = papers.results(TABLE, "cells").query("cells == 2 and protocol == 'base'")
    names = ["e01", "e02", "e12", "seed"]
    order = pd.MultiIndex.from_product([OPS, OPS, OPS, range(3)], names=names)
    wide = stored.set_index(names)[["val", "test"]].reindex(order)
    val, test = (torch.tensor(wide[c].to_numpy().reshape(125, 3).T.copy()).float() for c in ("val", "test"))
    return val, test.mean(0)


def chosen_by_gfn(loss, lr, beta, known, val, seed):
    """p_T [K, S] after training on ways to the known cells [K, n] of K searches."""
    import torch

    m = parts()
    where = blanks()
    finals = where.stops.nonzero().squeeze(1)
    K = len(known)
    values = torch.full((K, len(where.child)), 0.0)
    values[:, finals] = val if loss is m.pair_loss else beta * (val / 100).log()
    _, _, seen = m.train(
        where, values, loss, steps=60, lr=lr, batch=(0, 64, 0.0), seed=seed, watch=(60,), ends=finals[known]
    )
    return seen[60][:, finals]


def search(method: str, beta: float, lr: float, first: int, searches: int) -> list:
    """Order in which each search evaluates cells, [searches, 40]."""
    import torch

    m = parts()
    val = table()[0][torch.arange(searches) % 3]
    orders = []
    for k in range(searches):
        g = torch.Generator().manual_seed(first + k)
        orders.append(torch.randperm(125, generator=g))
    known = torch.stack(orders)[:, :FIRST]
    g = torch.Generator().manual_seed(first + 7)
    if method == "random":
        return torch.stack(orders)[:, :MOST].tolist()
    while known.shape[1] < MOST:
        if method == "evolution":
            known = evolved(known, val, g)
            continue
        loss = m.pair_loss if method == "OP" else m.balance_loss
        p = chosen_by_gfn(loss, lr, beta, known, val, first + known.shape[1]) + 1e-12
        fresh = torch.multinomial(p.scatter(1, known, 0.0), EACH, generator=g)
        known = torch.cat([known, fresh], 1)
    return known.tolist()


def evolved(known, val, g):
    """One more cell a search: the best of 5 among the last 20 changes one edge, until the cell is new."""
    import torch

    fresh = []
    for cells, values in zip(known.tolist(), val, strict=True):
        recent, seen = cells[-20:], set(cells)
        while True:
            picks = [recent[i] for i in torch.randint(len(recent), (5,), generator=g)]
            parent = max(picks, key=lambda cell: values[cell].item())
            edge, op = torch.randint(3, (1,), generator=g).item(), torch.randint(5, (1,), generator=g).item()
            digits = [parent // 25, parent // 5 % 5, parent % 5]
            digits[edge] = op
            child = 25 * digits[0] + 5 * digits[1] + digits[2]
            if child not in seen:
                break
            recent = cells if len(set(recent)) < 3 else recent
        fresh.append(child)
    return torch.cat([known, torch.tensor(fresh)[:, None]], 1)


def curves(order):
    """Test accuracy of the cell that is best by validation so far, [searches, 40]."""
    import torch

    val, test = table()
    order = torch.tensor(order)
    values = val[torch.arange(len(order)) % 3].gather(1, order)
    best = torch.stack([values[:, : n + 1].argmax(1) for n in range(order.shape[1])], 1)
    return test[order.gather(1, best)]


def cells(kept: Work) -> list[dict]:
    arms = [("random", 0, 0), ("evolution", 0, 0)]
    for method, beta in [("OP", 0), *(("TB", beta) for beta in CELL_BETAS)]:
        tried = {}
        for lr in CELL_RATES:
            order = kept.once(f"cells-tune-{method}-{beta}-{lr}", partial(search, method, beta, lr, TUNING, 30))
            tried[lr] = curves(order)[:, FIRST:].mean().item()
        arms.append((method, beta, max(tried, key=tried.get)))
    rows = []
    for method, beta, lr in arms:
        order = []
        for first in range(0, SEARCHES, AT_ONCE):
            one = partial(search, method, beta, lr, first, AT_ONCE)
            order += kept.once(f"cells-{method}-{beta}-{lr}-{first}", one)
        test = curves(order)
        name = f"TB {beta}" if method == "TB" else method
        for k, one in enumerate(test):
            row = {"arm": name, "lr": lr, "search": k, "validation seed": k % 3}
            row |= {str(n): round(one[n - 1].item(), 3) for n in (10, 15, 20, 30, 40)}
            rows.append(row | {"mean": round(one[FIRST:].mean().item(), 4)})
    return rows


def write_maps(path: Path, maps: dict) -> Path:
    import torch

    squares = {}
    for name, log_p in maps.items():
        flat = torch.tensor(log_p).clamp(min=-30).half()
        side = math.isqrt(flat.shape[-1])
        squares[name] = flat.view(-1, side, side)
    write_tensors(path, squares)
    return path


def build(out: Path, work: Path, part: str = "all") -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept, written = Work(work), []
    if part in ("all", "grid"):
        tuned, rows, maps = grids(kept)
        write_table(out / "tuning.csv", pd.DataFrame(tuned))
        write_table(out / "grid.csv", pd.DataFrame(rows))
        written += [out / "tuning.csv", out / "grid.csv", write_maps(out / "grid.safetensors", maps)]
    if part in ("all", "fronts"):
        rows, maps = fronts(kept)
        write_table(out / "fronts.csv", pd.DataFrame(rows))
        written += [out / "fronts.csv", write_maps(out / "fronts.safetensors", maps)]
    if part in ("all", "cells"):
        write_table(out / "cells.csv", pd.DataFrame(cells(kept)))
        written += [out / "cells.csv"]
    return written


if __name__ == "__main__":
    run(build, __doc__, work=work_option("order-preserving-gflownets"), part=part_option("grid", "fronts", "cells"))
