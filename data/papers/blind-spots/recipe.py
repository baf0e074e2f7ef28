"""All tables of this folder and the frames: what notebooks/01-saliency/04-blind-spots measures beforehand.

Level set traversal and its rivals on 32 pairs of Fashion-MNIST images, by a normal and a robust twin: how near each
comes to the target within its budget, how confident the model stays on segments and triangles. The twins of seed 0
are shipped, those of seeds 1 and 2 are trained first (data/models/robust_twins.py, 4 minutes). And one pair of
photographs with EfficientNet-Lite0, at 160 pixels. About 9 minutes on one core; a run that was stopped goes on where it
was (delete the folder --work for a fresh start). The functions are the notebook's method cells.
"""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nbkit.recipes import Work, load, run, seeds_option, work_option, write_table, write_tensors

PAIRS = 32
SURE = 0.6  # both twins are right with more than this
ETA, T, DELTA, EPS = 0.05, 150, 0.2, 2e-3
RIVALS = {"projection off": "none", "random hyperplane": "random"}
RIVAL_ETAS = (0.05, 0.01)  # each pair takes the better
ATTACK = 0.004  # RMSE of a step of the attack from the target
NEAREST = 5  # images of the training set that vote on what a picture shows
POINTS = 21  # of a segment
PHOTOS = {"coffee": "espresso", "chelsea": "Egyptian cat"}  # of scikit-image, both CC0: source, target
SIDE = 160
SHOWN = (0, 3, 8, 20, 40)


def eligible(twins, x: Tensor, y: Tensor) -> Tensor:
    """[N]: which images both twins call rightly and with confidence."""
    fine = torch.ones(len(x), dtype=torch.bool)
    with torch.no_grad():
        for model, _ in twins.values():
            sure, called = model(x).softmax(1).max(1)
            fine &= (called == y) & (sure > SURE)
    return fine


def choose(fine: Tensor, y: Tensor, seed: int, n: int = PAIRS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers of n sources, of two targets each, of three classes, and of another image of the source's class."""
    generator = torch.Generator().manual_seed(seed)
    order = fine.nonzero()[:, 0]
    order = order[torch.randperm(len(order), generator=generator)]
    source, rest = order[:n], order[n:]
    picked = []
    for s in source:
        mixed = rest[torch.randperm(len(rest), generator=generator)]
        one = mixed[y[mixed] != y[s]][0]
        two = mixed[(y[mixed] != y[s]) & (y[mixed] != y[one])][0]
        same = mixed[y[mixed] == y[s]][0]
        picked.append(torch.stack([s, one, two, same]))
    return tuple(torch.stack(picked).T)


def random_point(method, x: Tensor, distance: Tensor, seed: int) -> Tensor:
    """Images at the given RMSE from x in random directions, clipped to [0, 1]: the length is found by halving."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(100 + seed))
    low, high = torch.zeros(len(x)), torch.full((len(x),), 50.0)
    for _ in range(60):
        middle = (low + high) / 2
        far = method.rmse((x + middle[:, None, None, None] * direction).clamp(0, 1), x) > distance
        low, high = torch.where(far, low, middle), torch.where(far, middle, high)
    return (x + low[:, None, None, None] * direction).clamp(0, 1)


def farthest(method, model, x: Tensor, target: Tensor, c: Tensor, p_0: Tensor) -> Tensor:
    """RMSE to the target of the farthest of T points of the straight fade that is within the budget."""
    within = p_0 - method.along(model, x, target, c, points=T + 1) < DELTA
    share = (within * torch.linspace(0, 1, T + 1)[:, None]).amax(0)
    return (1 - share) * method.rmse(x, target)


def attacked(method, model, target: Tensor, c: Tensor, p_0: Tensor, most: int = T) -> tuple[Tensor, Tensor]:
    """From the target up the confidence in c, until it is within the budget; and where it is, [B]."""
    now = target
    for _ in range(most):
        short = p_0 - method.confidence(model, now, c) >= DELTA
        if not short.any():
            break
        g = method.gradient(model, now, c)
        step = ATTACK * g / g.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-20)
        now = torch.where(short[:, None, None, None], (now - step).clamp(0, 1), now)
    return now, p_0 - method.confidence(model, now, c) < DELTA


def vote(picture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The class of most of the nearest images of x: a judge without a gradient."""
    near = torch.cdist(picture.flatten(1), x.flatten(1)).topk(NEAREST, dim=1, largest=False).indices
    return y[near].mode(1).values


def walks(method, model, x, target, c, seed: int) -> tuple[dict[str, Tensor], dict]:
    """RMSE to the target of every arm's end; and the walk of LST with the correction, a frame every other step."""
    go = partial(method.lst, model, x, target, c, T=T, delta=DELTA, seed=seed, every=T)
    found, full = {}, None
    for correction, eps in (("off", 0.0), ("on", EPS)):
        walk = go(eta=ETA, eps=eps, every=2)
        found[f"LST, {correction}"] = method.rmse(walk.end, target)
        full = walk
        for name, direction in RIVALS.items():
            ends = [method.rmse(go(eta=eta, eps=eps, direction=direction).end, target) for eta in RIVAL_ETAS]
            found[f"{name}, {correction}"] = torch.stack(ends).amin(0)
    found["line"] = farthest(method, model, x, target, c, full.p_0)
    return found, full


def bent(x: Tensor, frames: Tensor) -> Tensor:
    """The largest distance of a walk's frames [K, B, ...] from its segment, as a share of the segment's length, [B]."""
    along, away = (frames[-1] - x).flatten(1), (frames - x).flatten(2)
    share = (away * along).sum(2) / along.square().sum(1).clamp_min(1e-20)
    return ((away - share[..., None] * along).norm(dim=2) / along.norm(dim=1).clamp_min(1e-10)).amax(0)


def segments(method, model, x, target, same, end, attack, c, seed: int) -> dict[str, Tensor]:
    """{to what: p [POINTS, B]} on straight segments from x."""
    point = random_point(method, x, method.rmse(x, end), seed)
    ends = {"LST's end": end, "the target": target, "an attack's end": attack, "a random point": point,
            "another of its class": same}  # fmt: skip
    return {name: method.along(model, x, other, c, POINTS) for name, other in ends.items()}


def hull(method, model, x, one, two, c, p_0) -> dict[str, Tensor]:
    """Of the triangle: mean p, shares of it, and the share of the edge that does not touch the source."""
    p, called = method.triangle(model, x, one, two, c)
    high = p > p_0 - DELTA
    opposite = torch.tensor([round(10 * (i + j)) == 10 for i, j in method.GRID])
    return {"mean": p.mean(0), "high": high.float().mean(0), "called": called.float().mean(0),
            "edge": high[opposite].float().mean(0)}  # fmt: skip


def walked(method, model, variant: str, images, c, seed: int, work: Path) -> dict:
    """What ``walks`` gives, and the walk to the second target; kept in a file of ``work``."""
    path = work / f"walks-{variant}-{seed}.pt"
    if not path.is_file():
        x, one, two = images
        arms, walk = walks(method, model, x, one, c, seed)
        second = method.lst(model, x, two, c, eta=ETA, T=T, delta=DELTA, eps=EPS, seed=seed + 50, every=2)
        found = {"arms": arms, "first": walk.frames, "second": second.frames}
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(found, part)
        part.replace(path)
    return torch.load(path, weights_only=True)


def one_twin(method, model, judges, images, c, goal, found: dict, seed: int) -> tuple[dict, dict]:
    """Columns of the table of pairs, and curves of the segments."""
    x, one, two, same = images
    arms, end, second = found["arms"], found["first"][-1], found["second"][-1]
    p_0 = method.confidence(model, x, c)
    share = (1 - arms["LST, on"] / method.rmse(x, one))[:, None, None, None]
    fade = x + share * (one - x)  # on the straight line, as near to the target as LST's end
    attack, reached = attacked(method, model, one, c, p_0)
    lines = segments(method, model, x, one, same, end, attack, c, seed)
    row = {"p_0": p_0, "p end": method.confidence(model, end, c), "p fade": method.confidence(model, fade, c),
           "p same": lines["another of its class"][-1], "mean fade": method.along(model, x, fade, c, POINTS).mean(0),
           "start": method.rmse(x, one), **arms,
           "second": method.rmse(second, two), "bent": bent(x, found["first"]), "reached": reached,
           "attack": torch.where(reached, method.rmse(attack, one), method.rmse(x, one))}  # fmt: skip
    for name, picture in {"source": x, "fade": fade, "end": end, "attack": attack}.items():
        for which, judge in judges.items():
            row[f"{which} {name}"] = (judge(picture) == goal) & (reached | (name != "attack"))
    for name, p in lines.items():
        row |= {f"mean {name}": p.mean(0), f"least {name}": p[1:-1].amin(0)}
    row |= {f"triangle {name}": v for name, v in hull(method, model, x, end, second, c, p_0).items()}
    return row, {name: p.mean(1).tolist() for name, p in lines.items()}


def even(method, twins, found, images, c) -> dict[str, dict]:
    """Triangles of both twins, their walks cut where they are as near to the target as the one that ended farther."""
    x, cut = images[0], {variant: [] for variant in twins}
    rows = {variant: {} for variant in twins}
    for which, target in zip(("first", "second"), images[1:3], strict=True):
        away = {
            v: torch.stack([method.rmse(f, target) for f in w[which]]) for v, w in found.items()
        }  # [K, B]
        far = torch.stack([a[-1] for a in away.values()]).amax(0)
        for variant, a in away.items():
            nearest = (a - far).abs().argmin(0)
            cut[variant].append(found[variant][which][nearest, torch.arange(len(x))])
            rows[variant][f"even {which}"] = method.rmse(cut[variant][-1], target)
    for variant, (model, _) in twins.items():
        of = hull(method, model, x, *cut[variant], c, method.confidence(model, x, c))
        rows[variant] |= {f"even {name}": of[name] for name in ("mean", "high", "called")}
    return rows


@torch.no_grad()
def measure(seed: int, work: Path, n: int = PAIRS) -> dict[str, list]:
    from nbkit import datasets, models, papers

    method, data = papers.method("blind-spots"), datasets.load("fashion-mnist")
    twins = load("models/robust_twins.py").twins(seed, work)
    network = models.load("small-cnn", seed=0)
    judges = {"judge": lambda z: network(z).argmax(1), "vote": partial(vote, x=data.x_train, y=data.y_train)}
    fine = eligible(twins, data.x_test, data.y_test)
    numbers = choose(fine, data.y_test, seed, n)
    images, c, goal = [data.x_test[k] for k in numbers], data.y_test[numbers[0]], data.y_test[numbers[1]]
    found = {v: walked(method, model, v, images[:3], c, seed, work) for v, (model, _) in twins.items()}
    cut = even(method, twins, found, images, c)
    who = dict(zip(("source", "target", "second target", "same class"), numbers, strict=True)) | {"c": c}
    rows, curves, about = [], [], []
    for variant, (model, facts) in twins.items():
        label = {"seed": seed, "model": variant}
        row, lines = one_twin(method, model, judges, images, c, goal, found[variant], seed)
        exact = {name: v.tolist() for name, v in who.items()}
        rounded = {name: np.round(v.double().numpy(), 4).tolist() for name, v in (row | cut[variant]).items()}
        rows += pd.DataFrame(label | exact | rounded).to_dict("records")
        curves += [
            label | {"to": name, "at": round(k / (POINTS - 1), 3), "p": round(p, 4)}
            for name, values in lines.items()
            for k, p in enumerate(values)
        ]
        kept = ("test_accuracy", "attacked_accuracy", "mean_confidence")
        about.append(label | {k: facts[k] for k in kept} | {"eligible": int(fine.sum())})
    return {"pairs": rows, "segments": curves, "twins": about}


class Normalised(torch.nn.Module):
    """A network that takes pixels in [0, 1]: its own normalisation first."""

    def __init__(self, net, mean, std):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


def photographs() -> tuple[torch.nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """EfficientNet-Lite0, source and target [1, 3, SIDE, SIDE], and their classes."""
    from skimage import data

    from nbkit import models

    labels = models.labels("efficientnet-lite0")
    transform = models.transform("efficientnet-lite0", size=SIDE)
    model = Normalised(models.load("efficientnet-lite0"), transform.mean, transform.std)
    source, target = (
        torch.from_numpy(np.array(transform.crop(getattr(data, name)()), np.float32)).permute(2, 0, 1)[None]
        / 255
        for name in PHOTOS
    )
    return model, source, target, *(torch.tensor([labels.index(name)]) for name in PHOTOS.values())


@torch.no_grad()
def photo_rivals() -> list[dict]:
    """The ends of four ways from one photograph to the other, and the target itself."""
    from nbkit import papers

    method = papers.method("blind-spots")
    model, source, target, c, goal = photographs()
    go = partial(method.lst, model, source, target, c, eta=ETA, T=SHOWN[-1], delta=DELTA, seed=0)
    ends = {
        "LST, on": go(eps=EPS).end,
        "LST, off": go(eps=0.0).end,
        "projection off, on": go(eps=EPS, direction="none").end,
        "an attack's end": attacked(method, model, target, c, method.confidence(model, source, c))[0],
        "the target": target,
    }
    return [
        {"end": name, "rmse": round(method.rmse(end, target).item(), 4)}
        | {"p": round(method.confidence(model, end, c).item(), 4)}
        | {"p target": round(method.confidence(model, end, goal).item(), 4)}
        | {"least on the way": round(method.along(model, source, end, c).min().item(), 4)}
        for name, end in ends.items()
    ]


def photo() -> dict[str, list]:
    """Frames of one walk with EfficientNet-Lite0, as JPEG files, and the confidences of the exact frames."""
    from PIL import Image

    from nbkit import papers

    method = papers.method("blind-spots")
    model, source, target, c, goal = photographs()
    walk = method.lst(model, source, target, c, eta=ETA, T=SHOWN[-1], delta=DELTA, eps=EPS, seed=0, every=1)
    rows, jpegs = [], []
    with torch.no_grad():
        for step, frame in enumerate(walk.frames):
            far = method.rmse(frame, target)
            fade = target + (far / method.rmse(source, target)) * (source - target)
            of = {name: method.confidence(model, picture, label).item() for name, picture, label in (
                ("p", frame, c), ("p target", frame, goal), ("p fade", fade, c), ("p target fade", fade, goal),
            )}  # fmt: skip
            rows.append(
                {"step": step, "rmse": round(far.item(), 4)} | {k: round(v, 4) for k, v in of.items()}
            )
            if step in SHOWN:
                buffer = io.BytesIO()
                pixels = (255 * frame[0].permute(1, 2, 0)).round().byte().numpy()
                Image.fromarray(pixels).save(buffer, "JPEG", quality=82)
                jpegs.append(list(buffer.getvalue()))
    least = method.along(model, source, walk.end, c).min().item()
    whole = {"p_0": round(walk.p_0.item(), 4), "least on the segment": round(least, 4)}
    return {"rows": [row | whole for row in rows], "jpegs": jpegs}


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    torch.set_num_threads(1)
    kept = Work(work)
    parts = [kept.once(f"seed {seed}", partial(measure, seed, work)) for seed in range(seeds)]
    found = kept.once("photo", photo)
    tables = {name: pd.DataFrame([row for part in parts for row in part[name]]) for name in parts[0]}
    tables["photo"] = pd.DataFrame(found["rows"])
    tables["photo-rivals"] = pd.DataFrame(kept.once("photo rivals", photo_rivals))
    paths = []
    for name, table in tables.items():
        paths.append(out / (f"{name}.csv.gz" if name == "pairs" else f"{name}.csv"))
        write_table(paths[-1], table)
    paths.append(out / "frames.safetensors")
    frames = {
        f"step {s}": torch.tensor(j, dtype=torch.uint8) for s, j in zip(SHOWN, found["jpegs"], strict=True)
    }
    write_tensors(paths[-1], frames)
    return paths


if __name__ == "__main__":
    run(build, __doc__, work=work_option("blind-spots"), seeds=seeds_option(3))
