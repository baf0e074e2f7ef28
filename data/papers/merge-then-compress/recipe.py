"""All files of this folder: what notebooks/07-lean-transformers/08-merge-then-compress measures beforehand.

Five networks tiny-moe learn the ten classes of Fashion-MNIST with a balanced router, then three tops without: their
usage of experts is skewed. They are merged in many ways, before and after the same recovery, and compressed. About 6
minutes on one core; a run that was stopped goes on where it was (delete the folder --work for a fresh start). The
functions are the notebook's method cells.
"""

from __future__ import annotations

import functools
from copy import deepcopy
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nbkit.recipes import Work, round_to_half, run, seeds_option, work_option, write_table, write_tensors

TOPS = (2, 4, 6)  # pullover, coat, shirt
TRAIN = 9000  # images; the rest of the training set chooses learning rates
CALIBRATION = 256
BATCH = 64
EPOCHS = {"classes": 4, "tops": 6}
RATE = {"classes": 2e-3, "tops": 1e-3}
BALANCE = 0.01  # while all ten classes are learnt
AVERAGES = (1, 2, 4)
DRAWS = 5  # of random groups before recovery
TUNED = 2  # of these, recovered
RATES = (1e-3, 3e-3, 1e-2)
STEPS = 100
RANK = 4
ROWS = 0.1  # of S that stay
MERGED = {
    "M-SMoE": {},
    "unweighted": {"weighting": "uniform"},
    "reversed usage": {"weighting": "reversed"},
    "not aligned": {"aligned": False},
    "equal k": {"adaptive": False},
    "by router weights": {"base": "router weights"},
    "by expert weights": {"base": "expert weights"},
}
RANDOM = ("random members", "random groups", "random groups, unweighted")
OTHERS = ("dominant alone", "keep top", "average of all", "average of all, aligned")
RECOVERED = (
    *("M-SMoE", "unweighted", "not aligned", "random groups, unweighted", "dominant alone", "keep top"),
    *("average of all", "no experts", "dense", "full"),
)


@functools.cache
def method():
    from nbkit import papers

    return papers.method("merge-then-compress")


@functools.cache
def data() -> dict[str, tuple]:
    """(images, classes): all classes to train on; tops to train on, to choose by, and to test."""
    from nbkit import datasets

    fashion = datasets.load("fashion-mnist")
    sets = {
        "classes": (fashion.x_train[:TRAIN], fashion.y_train[:TRAIN]),
        "choose": (fashion.x_train[TRAIN:], fashion.y_train[TRAIN:]),
        "test": (fashion.x_test, fashion.y_test),
    }
    sets["tops"] = sets["classes"]
    for name in ("tops", "choose", "test"):
        x, y = sets[name]
        top = torch.isin(y, torch.tensor(TOPS))
        sets[name] = (x[top], y[top])
    return sets


def calibration():
    return data()["tops"][0][:CALIBRATION]


# networks


def learn(model, which: str, balanced: float, seed: int) -> None:
    from nbkit import training
    from nbkit.models.zoo.moe import balance

    x, y = data()[which]
    optimizer = torch.optim.AdamW(model.parameters(), RATE[which], weight_decay=0.01, fused=True)
    generator, factor, step = torch.Generator().manual_seed(seed), training.cosine(0.05), 0
    for _ in range(EPOCHS[which]):
        order = torch.randperm(len(x), generator=generator)
        for index in order[: len(x) // BATCH * BATCH].split(BATCH):
            logits, routing = model(x[index], routing=True)
            loss = F.cross_entropy(logits, y[index])
            if balanced:
                loss = loss + balanced * balance(routing)
            optimizer.param_groups[0]["lr"] = RATE[which] * factor(step / (EPOCHS[which] * (len(x) // BATCH)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def trained(folder: Path, seed: int, experts: int = 8):
    """(what learnt all classes, what then learnt the tops), in weights that float16 holds; kept in the folder."""
    from nbkit import models

    nets = [models.build("tiny-moe", seed=seed, experts=experts) for _ in range(2)]
    paths = [folder / f"{experts}-{which}-seed{seed}.safetensors" for which in EPOCHS]
    if not paths[0].is_file():
        learn(nets[0], "classes", BALANCE if experts > 1 else 0.0, seed)
        round_to_half(nets[0])
        models.save_checkpoint(paths[0], nets[0], "tiny-moe", {"experts": experts})
    if not paths[1].is_file():
        nets[1].load_state_dict(models.load_checkpoint(paths[0])[0].state_dict())
        learn(nets[1], "tops", 0.0, seed + 1000)
        round_to_half(nets[1])
        models.save_checkpoint(paths[1], nets[1], "tiny-moe", {"experts": experts})
    return [models.load_checkpoint(path)[0] for path in paths]


# ways to merge


def random_labels(experts: int, k: int, generator: torch.Generator):
    """Labels [E] of k groups, none empty: one expert each by lot, then every other one goes anywhere."""
    labels = torch.randint(k, (experts,), generator=generator)
    labels[torch.randperm(experts, generator=generator)[:k]] = torch.arange(k)
    return labels


def other(model, average: int, arm: str, draw: int):
    """A copy merged or pruned by a rival that m_smoe has no setting for."""
    m = method()
    routed = m.routes(model, calibration())
    usages = torch.stack([m.usage(z) for z in routed])
    counts = m.shares_of(usages, average)
    model, generator = deepcopy(model), torch.Generator().manual_seed(draw)
    for f, z, k, block in zip(usages, routed, counts, model.blocks, strict=True):
        moe = block.moe
        if arm == "keep top":  # the router chooses among those that stay
            stays = f.argsort(descending=True, stable=True)[:k]
            moe.router.weight = nn.Parameter(moe.router.weight[stays].detach().clone())
            m.put(moe, moe.w_in[stays], moe.w_out[stays], torch.arange(k))
            continue
        if arm != "average of all":
            m.put(moe, *m.align(moe.w_in, moe.w_out)[:2], moe.slot)
        if arm == "no experts":  # all weights 0: ReLU passes no gradient there, so they stay 0
            m.put(moe, 0 * moe.w_in[:1], 0 * moe.w_out[:1], torch.zeros(len(f), dtype=torch.long))
            continue
        if arm.startswith("average"):
            labels, weights = torch.zeros(len(f), dtype=torch.long), torch.ones_like(f)
        elif arm == "dominant alone":
            labels = m.group(f, m.similarity(z.T), k)
            weights = torch.zeros_like(f)
            weights[f.argsort(descending=True, stable=True)[:k]] = 1.0
        else:
            labels = random_labels(len(f), k, generator)
            weights = torch.ones_like(f) if arm.endswith("unweighted") else f
        m.put(moe, m.merge(moe.w_in, labels, weights), m.merge(moe.w_out, labels, weights), labels)
    return model


def made(folder: Path, seed: int, arm: str, average: int = 2, draw: int = 0):
    """The network of an arm before recovery, or as it was trained (full, dense)."""
    if arm == "dense":
        return trained(folder, seed, experts=1)[1]
    model = trained(folder, seed)[1]
    if arm == "full":
        return model
    if arm == "random members":
        return method().m_smoe(model, calibration(), average, base="random", seed=100 * draw + 10 * seed)
    if arm in MERGED:
        return method().m_smoe(model, calibration(), average, **MERGED[arm])
    return other(model, average, arm, 100 * draw + 10 * seed)


def accuracy(model, which: str = "test") -> float:
    from nbkit import training

    return round(training.accuracy(model, *data()[which]), 4)


def multiply_adds(model) -> float:
    """A token's way through all linear maps, in thousands; of the experts, what its own stores, over test tokens."""
    total = 49 * 32
    routed = method().routes(model, data()["test"][0])
    parts = factors(model)
    for i, (block, z) in enumerate(zip(model.blocks, routed, strict=True)):
        slots = block.moe.slot[z.argmax(1)].bincount(minlength=len(parts[2 * i][0])) / len(z)
        total += 4 * 32 * 32 + 2 * 16 * 32 + 32 * z.shape[1]
        for matrix in parts[2 * i : 2 * i + 2]:
            stored = sum(p[0].numel() for p in matrix[:2]) * torch.ones(len(slots))
            if len(matrix) == 3:
                stored = stored + matrix[2].any(-1).sum(-1) * matrix[2].shape[-1]
            total += (slots * stored).sum().item()
    return round(total / 1000, 2)


# compression


class LowRankPlusRows(nn.Module):
    """W = U V + S for every matrix of [k, m, n]; without ``rows`` there is no S. Raises: ValueError (rank)."""

    def __init__(self, rank: int, rows: bool = True):
        super().__init__()
        self.rank, self.rows = rank, rows

    def forward(self, U: Tensor, V: Tensor, *S: Tensor) -> Tensor:
        return U @ V + S[0] if S else U @ V

    def right_inverse(self, W: Tensor) -> tuple[Tensor, ...]:
        U, V = method().low_rank(W, self.rank)
        return (U, V, W - U @ V) if self.rows else (U, V)


def factor(model: nn.Module, rank: int, rows: bool = True) -> nn.Module:
    """A copy whose stored experts are U V + S. Raises: ValueError (rank)."""
    model = deepcopy(model)
    for block in model.blocks:
        for name in ("w_in", "w_out"):
            parametrize.register_parametrization(block.moe, name, LowRankPlusRows(rank, rows))
    return model


def factors(model: nn.Module) -> list[list[Tensor]]:
    """[U, V] or [U, V, S] of every expert matrix that factor() took apart; [W] of the others."""
    found = []
    for block in model.blocks:
        for name in ("w_in", "w_out"):
            whole = not parametrize.is_parametrized(block.moe, name)
            parts = [getattr(block.moe, name)] if whole else block.moe.parametrizations[name]
            found.append(parts if whole else list(parts.parameters()))
    return found


def expert_parameters(model: nn.Module) -> int:
    """What is stored: whole matrices, or U, V and the rows of S that are not all 0."""
    count = 0
    for parts in factors(model):
        count += sum(part.numel() for part in parts[:2])
        if len(parts) == 3:
            count += parts[2].any(-1).sum().item() * parts[2].shape[-1]
    return count


class RowPruner:
    """LoSparse's: called after every step, it clears rows of S until the share ``final`` of its values is left.

    A row is worth the mean of |S x gradient|, smoothed over steps; what stays falls along a cubic curve, after
    ``warmup`` steps, until 4 ``warmup`` before the end.

    Raises: ValueError (final outside 0 to 1, too few steps, a model without S).
    """

    def __init__(self, model: nn.Module, steps: int, final: float = 0.1, warmup: int = 10, beta: float = 0.85):
        self.S = [parts[2] for parts in factors(model) if len(parts) == 3]
        if not self.S or not 0 <= final <= 1 or steps <= 5 * warmup:
            raise ValueError(f"final {final} must be 0 to 1, steps over {5 * warmup}, the model from factor() with S")
        self.steps, self.final, self.warmup, self.beta = steps, final, warmup, beta
        self.smooth = [torch.zeros_like(S) for S in self.S]
        self.last = [torch.zeros_like(S) for S in self.S]

    def remaining(self, step: int) -> float:
        done = (step - self.warmup) / (self.steps - 5 * self.warmup)
        return self.final + (1 - self.final) * (1 - min(max(done, 0.0), 1.0)) ** 3

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        for S, smooth, last in zip(self.S, self.smooth, self.last, strict=True):
            smooth.mul_(self.beta).add_(last, alpha=1 - self.beta)  # a step behind, as in the public code
            last.copy_((S * S.grad).abs())
        rows = [smooth.mean(-1, keepdim=True).expand_as(smooth) for smooth in self.smooth]
        every = torch.cat([row.flatten() for row in rows])
        gone = int(len(every) * (1 - self.remaining(step)))
        if gone:
            bar = every.kthvalue(gone).values
            for S, row in zip(self.S, rows, strict=True):
                S.masked_fill_(row < bar, 0.0)


# what is measured


def before(folder: Path, seed: int) -> list[dict]:
    """A row an arm, average k and draw: test accuracy without recovery."""
    rows = []
    for average in AVERAGES:
        for arm in (*MERGED, *RANDOM, *OTHERS):
            if arm.startswith("average") and average > 1:
                continue
            for draw in range(DRAWS if arm in RANDOM and average > 1 else 1):
                model = made(folder, seed, arm, average, draw)
                row = {"seed": seed, "k": average, "arm": arm, "draw": draw}
                row |= {"parameters": expert_parameters(model), "accuracy": accuracy(model)}
                rows.append(row)
    return rows


def usage_and_rank(folder: Path, seed: int) -> list[dict]:
    """A row a block: how even usage is, how far experts lie from expert 0, and stable ranks."""
    m, (first, full) = method(), trained(folder, seed)
    x = data()["classes"][0][:CALIBRATION]
    shares = [torch.stack([m.usage(z) for z in m.routes(net, part)]) for net, part in
              ((first, x), (full, calibration()))]  # fmt: skip
    merged = {arm: made(folder, seed, arm) for arm in ("M-SMoE", "not aligned", "dominant alone")}
    random = [made(folder, seed, "random groups", draw=d) for d in range(DRAWS)]
    rows = []
    for i, block in enumerate(full.blocks):
        moe, f = block.moe, shares[1][i]
        a, b, _ = m.align(moe.w_in, moe.w_out)
        even = [torch.special.entr(share[i]).sum().item() / torch.tensor(8.0).log().item() for share in shares]
        row = {"seed": seed, "block": i, "groups": len(merged["M-SMoE"].blocks[i].moe.w_in)}
        row |= {"entropy, classes": even[0], "entropy, tops": even[1], "least": f.min().item(), "most": f.max().item()}
        row["distance"] = ((moe.w_in - moe.w_in[0]).square().sum() + (moe.w_out - moe.w_out[0]).square().sum()).item()
        row["distance, aligned"] = ((a - a[0]).square().sum() + (b - b[0]).square().sum()).item()
        row["rank, experts"] = rank_of(moe)
        row |= {f"rank, {arm}": rank_of(net.blocks[i].moe) for arm, net in merged.items()}
        row["rank, random groups"] = sum(rank_of(net.blocks[i].moe) for net in random) / DRAWS
        rows.append({key: round(v, 4) for key, v in row.items()})
    return rows


def rank_of(moe) -> float:
    """The mean stable rank of the stored matrices."""
    return torch.cat([method().stable_rank(moe.w_in), method().stable_rank(moe.w_out)]).mean().item()


def recovered(folder: Path, seed: int, arm: str, rate: float, average: int = 2, draw: int = 0):
    """The arm's network after the same steps on the same batches."""
    model = made(folder, seed, arm, average, draw)
    method().recover(model, *data()["tops"], teacher(folder, seed), steps=STEPS, lr=rate, seed=seed)
    return model


@functools.lru_cache(maxsize=1)
@torch.no_grad()
def teacher(folder: Path, seed: int):
    """The full network's logits of all tops to train on."""
    return trained(folder, seed)[1](data()["tops"][0])


def rates(folder: Path, arm: str) -> list[dict]:
    """A row a learning rate: loss on the tops kept aside, first network."""
    from nbkit import training

    make = partial(squeezed if arm in SQUEEZED else recovered, folder, 0, arm)
    losses = [training.evaluate(make(rate), *data()["choose"])[0] for rate in RATES]
    return [{"arm": arm, "rate": rate, "loss": round(loss, 4)} for rate, loss in zip(RATES, losses, strict=True)]


def best(kept: Work, folder: Path, arm: str) -> float:
    rows = kept.once(f"rates-{arm}", partial(rates, folder, arm))
    return min(rows, key=lambda row: row["loss"])["rate"]


def after(folder: Path, rate: float, seed: int, arm: str, average: int, draw: int) -> list[dict]:
    model = recovered(folder, seed, arm, rate, average, draw)
    row = {"seed": seed, "k": average, "arm": arm, "draw": draw, "rate": rate}
    row |= {"parameters": expert_parameters(model), "multiply-adds": multiply_adds(model)}
    if arm == "no experts":
        row |= {"parameters": 0, "multiply-adds": round(row["multiply-adds"] - 8.192, 2)}
    row |= {"before": accuracy(made(folder, seed, arm, average, draw)), "accuracy": accuracy(model)}
    return [row]


# arm -> network it starts from, rank, share of S at the end (None: no S)
SQUEEZED = {
    "MC-SMoE": ("M-SMoE", RANK, ROWS),
    "SVD only": ("M-SMoE", 6, None),
    "rows only": ("M-SMoE", 0, 0.2875),
    "LoSparse on all": ("full", 1, 0.0250),
}


def squeezed(folder: Path, seed: int, arm: str, rate: float):
    """Recovered, taken apart, and pruned within as many steps again."""
    start, rank, share = SQUEEZED[arm]
    model = factor(begun(folder, seed, start), rank, rows=share is not None)
    how = {"steps": STEPS, "lr": rate, "seed": seed + 50}
    if share is not None:
        how["after"] = RowPruner(model, STEPS, final=share)
    method().recover(model, *data()["tops"], teacher(folder, seed), **how)
    return model


@functools.lru_cache(maxsize=2)
def begun(folder: Path, seed: int, arm: str):
    """The recovered network that compression starts from."""
    return recovered(folder, seed, arm, START_RATES[arm])


START_RATES: dict[str, float] = {}  # of the networks that compression starts from


def compressed(folder: Path, rate: float, seed: int, arm: str) -> list[dict]:
    model = squeezed(folder, seed, arm, rate)
    row = {"seed": seed, "k": 2, "arm": arm, "draw": 0, "rate": rate}
    row |= {"parameters": expert_parameters(model), "multiply-adds": multiply_adds(model)}
    return [row | {"before": accuracy(begun(folder, seed, SQUEEZED[arm][0])), "accuracy": accuracy(model)}]


def build(out: Path, work: Path, seeds: int) -> list[Path]:
    from nbkit import runtime

    runtime.deterministic(seed=0)
    kept = Work(work)
    found = {"before": [], "layers": [], "after": []}
    for seed in range(seeds):
        for experts in (8, 1):
            kept.once(f"trained-{seed}-{experts}", lambda s=seed, e=experts: len(trained(work, s, e)))
        found["layers"] += kept.once(f"layers-{seed}", partial(usage_and_rank, work, seed))
        found["before"] += kept.once(f"before-{seed}", partial(before, work, seed))
    chosen = {arm: best(kept, work, arm) for arm in RECOVERED}
    START_RATES.update(chosen)
    chosen |= {arm: best(kept, work, arm) for arm in SQUEEZED}
    for seed in range(seeds):
        cases = [(arm, 2, draw) for arm in RECOVERED for draw in range(TUNED if arm in RANDOM else 1)]
        cases += [(arm, k, 0) for arm in ("M-SMoE",) for k in (1, 4)]
        for arm, k, draw in cases:
            todo = partial(after, work, chosen[arm], seed, arm, k, draw)
            found["after"] += kept.once(f"after-{seed}-{arm}-{k}-{draw}", todo)
        for arm in SQUEEZED:
            todo = partial(compressed, work, chosen[arm], seed, arm)
            found["after"] += kept.once(f"compressed-{seed}-{arm}", todo)
    full = {row["seed"]: row["before"] for row in found["after"] if row["arm"] == "full"}
    for row in found["after"]:
        row["lost"] = round(full[row["seed"]] - row["accuracy"], 4)
    for name, rows in found.items():
        write_table(out / f"{name}.csv", pd.DataFrame(rows))
    tried = [row for arm in chosen for row in kept.once(f"rates-{arm}", partial(rates, work, arm))]
    write_table(out / "rates.csv", pd.DataFrame(tried))
    weights = trained(work, 0)[1].state_dict()
    write_tensors(out / "net.safetensors", {k: v if k.endswith("slot") else v.half() for k, v in weights.items()})
    return [out / name for name in (*(f"{name}.csv" for name in found), "rates.csv", "net.safetensors")]


if __name__ == "__main__":
    run(build, __doc__, work=work_option("merge-then-compress"), seeds=seeds_option(5))
