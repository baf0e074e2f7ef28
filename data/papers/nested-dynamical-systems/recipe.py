"""All tables of this folder: what notebooks/09-representations/05-nested-dynamical-systems measures beforehand.

Machines whose wiring is a state, beside fixed wirings and other rivals. tracking.csv: a simulated plant whose force
changes its sign, 20 runs, wirings that learn by gradients (free, bounded or normalised) or recursive least squares,
the best fixed wiring, none, one that remembers the last step and one that is told; the settings of each were chosen
on 20 other runs. markets.csv: four forecasters on the 40 test recordings of basic-motions, and four networks that
learn the digits as they forecast them (10 orders), mixed by wealth, evenly, by their geometric mean, by weights
fitted beforehand, or not at all. tuned.csv: their settings, chosen on the training recordings and on 5 other orders.
About 2 minutes on one core; a run that was stopped goes on where it was (delete the folder --work for a fresh start).
The machines are the notebook's method cells.
"""

from __future__ import annotations

import functools
import itertools
import operator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nbkit import datasets, papers
from nbkit.recipes import Work, part_option, run, work_option, write_table

SLUG = "nested-dynamical-systems"
RUNS, OTHERS = range(20), range(100, 120)  # simulated runs: measured, and those that chose the settings
ORDERS, OTHER_ORDERS = range(10, 20), range(100, 105)  # of the digits
PLANTS = (0.5, 0.8)  # a
FLIPS = (200, 50, 20)  # steps between two changes of the sign of b
STEPS = 400
HOLD = 10  # steps that the target stays
NOISE = 0.1
RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2)
NORMALISED = (0.3, 0.6, 1.2, 1.8, 2.4, 3.0, 4.0, 6.0)
FORGET = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
DITHERS = (0.0, 0.03, 0.1, 0.2, 0.4, 0.8)
GAINS = (-1, -0.75, -0.5, -0.375, -0.25, -0.125, 0, 0.125, 0.25, 0.375, 0.5, 0.75, 1)
SHARES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
STEP_SIZES = {"unequal": (0.1, 0.3, 0.6, 1.0), "equal": (0.4, 0.4, 0.4, 0.4)}  # of four networks
BATCH = 8
FLOOR = 0.01
EXPERTS = ("last value", "line", "AR(2)", "mean")


# --- learners in a row


def batches(n: int = 200, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Batches of the training digits: pixels [size, 64] in 0 to 1, and the digits [size, 10], one-hot."""
    data = datasets.load("digits")
    x, y = data.x.flatten(1).double() / data.x.max(), torch.eye(10, dtype=torch.float64)[data.y.long()]
    rows = torch.randint(data.n_train, (n, size), generator=torch.Generator().manual_seed(0))
    return [(x[chosen], y[chosen]) for chosen in rows]


def accuracy(net, p) -> float:
    """Share of the test digits for which the largest output of a learner in state p is the right one."""
    data = datasets.load("digits")
    x, y = data.x.flatten(1).double() / data.x.max(), data.y
    return (net.implement(p, x[data.n_train :]).argmax(1) == y[data.n_train :]).double().mean().item()


def flat(p) -> Tensor:
    """All numbers of nested tuples of tensors, in order."""
    if isinstance(p, Tensor):
        return p.flatten()
    return torch.cat([flat(part) for part in p if isinstance(part, Tensor) or part])


def by_autograd(layers, data, step: float) -> Tensor:
    """Tanh layers and a linear one, squared error, by torch's differentiation of the whole: weights before and after
    each batch, [batches + 1, weights]."""
    weights = [[w.clone().requires_grad_() for w in layer.state] for layer in layers]
    path = [flat(weights).detach()]
    for x, y in data:
        for i, (W, c) in enumerate(weights):
            x = x @ W + c if i == len(weights) - 1 else (x @ W + c).tanh()
        loss = (x - y).square().sum() / 2
        gradients = torch.autograd.grad(loss, [w for layer in weights for w in layer])
        with torch.no_grad():
            for w, gradient in zip([w for layer in weights for w in layer], gradients, strict=True):
                w -= step * gradient
        path.append(flat(weights).detach())
    return torch.stack(path)


def mistaken(layers, late: bool):
    """A row of learners that request with their new weights (late), or request the gradient in place of a target."""

    def wrong(learner):
        def respond(p, a, target):
            new, request = learner.respond(p, a, target)
            return new, learner.respond(new, a, target)[1] if late else a - request

        return replace(learner, respond=respond)

    return functools.reduce(operator.rshift, map(wrong, layers))


def softmax(n: int):
    """A learner without weights for the log loss: it requests logits minus gradient, z - (softmax(z) - target)."""
    method = papers.method(SLUG)
    requests = lambda p, z, target: ((), z - (z.softmax(-1) - target))  # noqa: E731
    return method.Learner(method.reals(n), method.reals(n), (), lambda p, z: z.softmax(-1), requests)


# --- a plant whose sign changes


def world(seeds, flips: int) -> tuple[Tensor, ...]:
    """b [400], noise, target and dither [400, runs, 1] of some runs; the sign b changes every ``flips`` steps."""
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    def normal(n):
        return torch.stack([torch.randn(n, 1, generator=g, dtype=torch.float64) for g in draws], 1)

    noise, target, dither = NOISE * normal(STEPS), normal(STEPS // HOLD + 1), normal(STEPS)
    b = 1.0 - 2.0 * (torch.arange(STEPS) // flips % 2).double()
    return b, noise, target.repeat_interleave(HOLD, 0)[:STEPS], dither


def boxes_of(a: float, b, noise, target, dither) -> list:
    """The plant x' = a x + b_t u + noise_t, from 0, what it should follow and the dither, as machines."""
    method = papers.method(SLUG)
    source = method.Interface(method.reals(1), method.nothing())
    move = lambda s, u: (s[0] + 1, a * s[1] + b[s[0]] * u + noise[s[0]])  # noqa: E731
    shows = method.Interface(method.reals(1), method.reals(1))
    plant = method.System(shows, (0, torch.zeros_like(noise[0])), lambda s: s[1], move)
    return [plant, method.player(target, source), method.player(dither, source)]


def told(dils, b: Tensor):
    """The wiring that is given the plant's sign at every step."""
    (p,), z = dils.state

    def update(s, boxes, direction):
        t = s[2] + 1
        return (torch.cat([p[..., :1], b[min(t, len(b) - 1)].expand_as(p[..., 1:])], -1),), z, t

    return replace(dils, state=((p,), z, 0), update=update)


def least_squares(dils, forget):
    """The same wiring, but (a, b) is fitted by recursive least squares that forget."""
    (p,), z = dils.state

    def update(s, boxes, _):
        (w,), z, P = s
        Pz = (P @ z.unsqueeze(-1)).squeeze(-1)
        gain = Pz / (forget + (z * Pz).sum(-1, keepdim=True))
        error = boxes[0] - (w * z).sum(-1, keepdim=True)
        P = (P - gain.unsqueeze(-1) * Pz.unsqueeze(-2)) / forget.unsqueeze(-1)
        size = P.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        _, now = dils.update(((w,), z), boxes, None)
        return (w + gain * error,), now, P * (100 / size).clamp(max=1)

    start = torch.eye(2, dtype=torch.float64).expand(*p.shape, 2)
    return replace(dils, state=((p,), z, start), update=update)


def normalised(dils, eps):
    """The same wiring, learned by gradients with the step divided by 1 + |z|^2."""

    def update(s, boxes, _):
        (w,), z = s
        error = boxes[0] - (w * z).sum(-1, keepdim=True)
        _, now = dils.update(s, boxes, None)
        return (w + eps * error * z / (1 + z.square().sum(-1, keepdim=True)),), now

    return replace(dils, update=update)


def last_step(dils):
    """The wiring that keeps a, and takes for b the sign that the last step shows. It learns nothing else: a fixed
    wiring with a box that remembers x and u does the same."""

    def update(s, boxes, direction):
        (p,), z = s
        a = p[..., :1]
        shown = (boxes[0] - a * z[..., :1]) * z[..., 1:]
        _, now = dils.update(s, boxes, direction)
        return (torch.cat([a, torch.where(shown >= 0, 1.0, -1.0).to(p)], -1),), now

    return replace(dils, update=update)


def tame(dils, most: float = 100.0):
    """The same, with (a, b) kept within 100: what diverges stays a finite number, and a large error."""

    def update(s, boxes, direction):
        (p,), *rest = dils.update(s, boxes, direction)
        return (p.nan_to_num().clamp(-most, most),), *rest

    return replace(dils, update=update)


def errors(dils, boxes, steps: int = STEPS) -> Tensor:
    """x' - r, [runs, steps - 1]: what came of what was asked for."""
    method = papers.method(SLUG)
    shown = torch.stack([s.position for s in method.run(method.wire(tame(dils), *boxes), [None] * (steps - 1))])
    return (shown[1:, :, 0] - shown[:-1, :, 1]).T


def arm(name: str, seeds, flips: int, a: float, settings) -> Tensor:
    """Errors [settings, runs, steps - 1] of one arm under every setting."""
    method, n, m = papers.method(SLUG), len(seeds), len(settings)
    signals = world(list(seeds) * m, flips)
    first, second = (
        torch.tensor([s[i] for s in settings], dtype=torch.float64).repeat_interleave(n)[:, None] for i in (0, 1)
    )
    right = torch.tensor([a, 1.0], dtype=torch.float64).expand(n * m, 2)
    if name == "gradient":
        dils = method.tracking(right, first, second)
    elif name == "bounded":
        dils = tame(method.tracking(right, first, second), 1.0)
    elif name == "last step":
        dils = last_step(method.tracking(right, 0.0, second))
    elif name == "normalised":
        dils = normalised(method.tracking(right, 0.0, second), first)
    elif name == "least squares":
        dils = least_squares(method.tracking(right, 0.0, second), first)
    elif name == "fixed":  # u = second r + first x
        p = torch.cat([-first / torch.where(second == 0, 1.0, second), second], -1)
        dils = method.tracking(p, 0.0)
    else:
        dils = told(method.tracking(right, 0.0), signals[0])
    return errors(dils, boxes_of(a, *signals)).unflatten(0, (m, n))


def rms(e: Tensor) -> Tensor:
    return e.square().mean(-1).sqrt()


GRIDS = {
    "gradient": list(itertools.product(RATES, DITHERS)),
    "bounded": list(itertools.product(RATES, DITHERS)),
    "least squares": list(itertools.product(FORGET, DITHERS)),
    "normalised": list(itertools.product(NORMALISED, DITHERS)),
    "last step": [(0.0, dither) for dither in DITHERS],
    "fixed": [(0.0, 0.0), *((x, r) for x, r in itertools.product(GAINS, GAINS) if r != 0)],
}


def plant_case(a: float, flips: int) -> list[dict]:
    """Every arm in one case, each with the setting that had the lowest mean error in the other runs."""
    chosen = {"none": (0.0, 0.0), "first": (-a, 1.0), "told": (0.0, 0.0)}
    for name, grid in GRIDS.items():
        chosen[name] = grid[int(rms(arm(name, OTHERS, flips, a, grid)).nan_to_num(1e9).mean(1).argmin())]
    rows = []
    for name, setting in chosen.items():
        kind = {"none": "fixed", "first": "fixed"}.get(name, name)
        e = arm(kind, RUNS, flips, a, [setting])[0]
        for seed, (whole, before) in enumerate(zip(rms(e), rms(e[:, :flips]), strict=True)):
            row = {"a": a, "flips": flips, "arm": name, "first": float(setting[0]), "second": float(setting[1])}
            rows.append(row | {"seed": seed, "error": whole.item(), "before": before.item()})
    return rows


# --- markets


def experts(x: Tensor, prefix: int = 30, bins: int = 8, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """Forecasts [..., T - prefix, 4, bins] and what happened [..., T - prefix] of recordings x [..., T].

    Last value, straight line, AR(2) and mean, each with normal errors; coefficients, spreads and the edges of the
    bins (quantiles) come from the first ``prefix`` samples; ``floor`` of every forecast is even.

    Raises: ValueError.
    """
    if not 8 <= prefix < x.shape[-1] or bins < 2 or not 0 < floor < 1 or not x.isfinite().all():
        raise ValueError(f"prefix {prefix}, bins {bins} and floor {floor} do not suit x {list(x.shape)}")
    n = prefix - 2
    past = torch.stack([x[..., 1:-1], x[..., :-2], torch.ones_like(x[..., 2:])], -1)
    ar = past @ (torch.linalg.pinv(past[..., :n, :]) @ x[..., 2:prefix, None])
    mean = x[..., :prefix].mean(-1, keepdim=True).expand_as(past[..., 0])
    guess = torch.stack([past[..., 0], 2 * past[..., 0] - past[..., 1], ar[..., 0], mean], -1)
    spread = (guess[..., :n, :] - x[..., 2:prefix, None]).square().mean(-2, keepdim=True).sqrt().clamp(min=1e-9)
    levels = torch.arange(1, bins, dtype=x.dtype) / bins
    edges = x[..., :prefix].quantile(levels, -1).movedim(0, -1).unsqueeze(-2)  # [..., 1, bins - 1]
    below = torch.special.ndtr((edges.unsqueeze(-2) - guess[..., n:, :, None]) / spread[..., None])
    ends = torch.zeros_like(below[..., :1])
    forecast = torch.cat([ends, below, ends + 1], -1).diff(dim=-1)
    return (1 - floor) * forecast + floor / bins, (x[..., prefix:, None] > edges).sum(-1)


def happened(forecast: Tensor, outcome: Tensor) -> Tensor:
    """Log probability of what happened; forecasts [..., n], outcomes [...]."""
    return forecast.gather(-1, outcome.unsqueeze(-1))[..., 0].log()


def trade(forecast: Tensor, outcome: Tensor, start: Tensor, share: float = 0.0, groups=None) -> list:
    """The market before every outcome; forecast [..., T, k, n], outcome [..., T].

    groups: of experts, each a market that is a box of the outer one, and starts with what its experts own together.
    """
    method = papers.method(SLUG)
    n, shown = forecast.shape[-1], forecast.movedim((-3, -2), (0, 1))  # [T, k, ..., n]
    box = method.Interface(method.forecasts(n), method.outcomes(n))
    boxes = [method.player(shown[:, i], box) for i in range(len(start))]
    for group in groups or []:
        inner = method.market(start[group] / start[group].sum(), n, share)
        boxes.append(method.wire(inner, *[boxes[i] for i in group]))
    owned = torch.stack([start[group].sum() for group in groups]) if groups else start
    whole = method.wire(method.market(owned, n, share), *boxes[-len(owned) :])
    return method.run(whole, outcome.movedim(-1, 0)[:-1])


def traded(forecast: Tensor, outcome: Tensor, start: Tensor, share: float = 0.0) -> tuple[Tensor, Tensor]:
    """Log scores [..., T] of the market and the wealth before every outcome [..., T, k]."""
    history = trade(forecast, outcome, start, share)
    scores = torch.stack([happened(s.position, o) for s, o in zip(history, outcome.movedim(-1, 0), strict=True)], -1)
    return scores, torch.stack([s.state[0].expand(*forecast.shape[:-3], len(start)) for s in history], -2)


def regret(forecast: Tensor, outcome: Tensor, score: Tensor) -> Tensor:
    """How far the market's log scores [..., T] are behind the best expert's in the end, as a share of ln k."""
    given = happened(forecast, outcome.unsqueeze(-1).expand(forecast.shape[:-1])).sum(-2)
    return (given.amax(-1) - score.sum(-1)) / np.log(forecast.shape[-2])


def fitted(logp: Tensor, rounds: int = 300) -> Tensor:
    """The fixed weights [k] with the highest log score on logp [N, k], by expectation maximisation."""
    w = torch.full_like(logp[0], 1 / logp.shape[-1])
    for _ in range(rounds):
        part = w * logp.exp()
        w = (part / part.sum(-1, keepdim=True)).mean(0)
    return w.clamp(min=1e-6) / w.clamp(min=1e-6).sum()


def scores(forecast: Tensor, outcome: Tensor, tuned: dict | None) -> dict[str, Tensor]:
    """Log scores [series] of all arms; forecast [series, (channels,) T, k, n]. tuned: of :func:`tune`."""
    logp = happened(forecast, outcome.unsqueeze(-1).expand(forecast.shape[:-1]))
    even = torch.full_like(logp[(0,) * (logp.ndim - 1)], 1 / logp.shape[-1])
    total = lambda s: s.flatten(1).sum(1)  # noqa: E731
    arms = {
        "market": total(traded(forecast, outcome, even)[0]),
        "even": total((logp.exp() @ even).log()),
        "geometric mean": total(happened(forecast.log().mean(-2).softmax(-1), outcome)),
        "best afterwards": logp.sum(-2).amax(-1).reshape(len(logp), -1).sum(1),
    }
    if tuned:
        w = torch.tensor(tuned["weights"], dtype=torch.float64)
        arms |= {
            "chosen": total(logp[..., tuned["single"]]),
            "fitted": total((logp.exp() @ w).log()),
            "market, shared": total(traded(forecast, outcome, even, tuned["share"])[0]),
            "market from fitted": total(traded(forecast, outcome, w)[0]),
        }
    return arms | {f"expert {i}": total(logp[..., i]) for i in range(logp.shape[-1])}


def tune(forecast: Tensor, outcome: Tensor) -> dict:
    """On other data: the best single expert, the best fixed weights, the best share that is dealt out anew."""
    logp = happened(forecast, outcome.unsqueeze(-1).expand(forecast.shape[:-1]))
    even = torch.full_like(logp[(0,) * (logp.ndim - 1)], 1 / logp.shape[-1])
    by_share = {s: traded(forecast, outcome, even, s)[0].sum().item() for s in SHARES}
    flat = logp.flatten(0, -2)
    weights = fitted(flat).tolist()
    return {"single": int(flat.sum(0).argmax()), "weights": weights, "share": max(by_share, key=by_share.get)}


def motions(train: bool = False) -> tuple[Tensor, Tensor, list[str]]:
    """40 recordings [40, 6, 100], their motions [40] and the motions' names."""
    data = datasets.load("basic-motions")
    part = slice(None, data.n_train) if train else slice(data.n_train, None)
    return data.x[part].double(), data.y[part], list(data.classes)


def stream(seed: int, steps) -> tuple[Tensor, Tensor]:
    """Forecasts [T, k, 10] of k networks that learn the training digits in one pass, and the digits [T].

    A batch is forecast first, then learned; the networks differ in their step and their first weights.
    """
    method, data = papers.method(SLUG), datasets.load("digits")
    order = torch.randperm(data.n_train, generator=torch.Generator().manual_seed(seed))
    x, y = data.x[order].flatten(1).double() / data.x.max(), data.y[order].long()
    forecast = []
    for i, step in enumerate(steps):
        eps, draw = step / BATCH, 1000 * seed + 10 * i
        first, second = method.dense(64, 32, eps, draw), method.dense(32, 10, eps, draw + 1, torch.positive)
        net = first >> second >> softmax(10)
        p, seen = net.state, []
        for a, target in zip(x.split(BATCH), torch.eye(10, dtype=torch.float64)[y].split(BATCH), strict=True):
            seen.append(net.implement(p, a))
            p, _ = net.respond(p, a, target)
        forecast.append((1 - FLOOR) * torch.cat(seen) + FLOOR / 10)
    return torch.stack(forecast, 1), y


def digits(seeds, kind: str) -> tuple[Tensor, Tensor]:
    """The streams of some orders, [orders, T, 4, 10] and [orders, T]."""
    forecast, y = zip(*(stream(seed, STEP_SIZES[kind]) for seed in seeds), strict=True)
    return torch.stack(forecast), torch.stack(y)


def market_rows(tuned: dict, forecast: Tensor, outcome: Tensor, what: list[str]) -> list[dict]:
    """A row a recording or order and arm, and a row a setting."""
    rows = [
        {"what": what[i], "number": i, "arm": name, "score": value.item()}
        for name, values in scores(forecast, outcome, tuned).items()
        for i, value in enumerate(values)
    ]
    settings = [(name, i, v) for name, value in tuned.items() for i, v in enumerate(np.atleast_1d(value))]
    return rows + [{"what": "tuned", "number": i, "arm": name, "score": float(v)} for name, i, v in settings]


def on_motions() -> list[dict]:
    x, y, names = motions()
    train, _, _ = motions(train=True)
    return market_rows(tune(*experts(train)), *experts(x), [names[i] for i in y])


def on_digits(kind: str) -> list[dict]:
    return market_rows(tune(*digits(OTHER_ORDERS, kind)), *digits(ORDERS, kind), [f"digits, {kind}"] * len(ORDERS))


def build(out: Path, work: Path, part: str = "all") -> list[Path]:
    torch.set_num_threads(1)
    kept, paths = Work(work), []
    if part in ("all", "tracking"):
        rows = []
        for a, flips in itertools.product(PLANTS, FLIPS):
            rows += kept.once(f"plant-{a}-{flips}", functools.partial(plant_case, a, flips))
        table = pd.DataFrame(rows)
        table[["error", "before"]] = table[["error", "before"]].round(4)
        paths.append(out / "tracking.csv")
        write_table(paths[-1], table)
    if part in ("all", "markets"):
        found = {"motions": kept.once("motions", on_motions)}
        for kind in STEP_SIZES:
            found[f"digits, {kind}"] = kept.once(f"digits-{kind}", functools.partial(on_digits, kind))
        table = pd.concat([pd.DataFrame(rows).assign(data=data) for data, rows in found.items()])
        table["score"] = table["score"].round(3)
        settings = table["what"] == "tuned"
        paths += [out / "markets.csv", out / "tuned.csv"]
        write_table(paths[-2], table[~settings].drop(columns="data"))
        tuned = table[settings].rename(columns={"arm": "setting", "score": "value"})
        write_table(paths[-1], tuned[["data", "setting", "number", "value"]])
    return paths


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), part=part_option("tracking", "markets"))
