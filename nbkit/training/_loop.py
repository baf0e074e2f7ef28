"""Gradient descent: one function, and what it checks before it starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from nbkit import forward, runtime
from nbkit.errors import NotFinite, UnknownName, did_you_mean
from nbkit.training._evaluate import (
    Pair,
    check_pair,
    check_whole,
    count_right,
    evaluate,
    labels_in_range,
    moved,
)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda params, **kw: torch.optim.SGD(params, momentum=0.9, **kw),
}


@dataclass
class History:
    """What happened: the loss of every step, and an evaluation now and then.

    ``evaluations`` holds one dict each: step, and ``<set>_loss`` and ``<set>_accuracy`` for every set in
    ``validation`` (``val_`` where only a pair was given). Steps count from 1: step k is the state after k updates.
    """

    loss: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def frame(self):
        """A DataFrame indexed by step: loss, and the evaluations where there were any (NaN elsewhere)."""
        import pandas as pd

        steps = pd.DataFrame({"loss": self.loss}, index=pd.RangeIndex(1, len(self.loss) + 1, name="step"))
        return steps.join(pd.DataFrame(self.evaluations).set_index("step")) if self.evaluations else steps

    def best(self, name: str = "val_loss") -> dict[str, float]:
        """The evaluation with the lowest ``name`` (the highest for an accuracy); the earliest of equals.

        Raises KeyError where it was not measured.
        """
        known = {k for e in self.evaluations for k in e}
        if name not in known:
            raise KeyError(f"{name!r} was not measured{did_you_mean(name, sorted(known))}")
        sign = -1 if name.endswith("accuracy") else 1
        return min(self.evaluations, key=lambda e: sign * e[name])

    def _repr_html_(self) -> str:
        figures = [f"{len(self.loss)} steps", f"{self.seconds:.1f} s"]
        figures += [f"loss {self.loss[-1]:.4g}"] if self.loss else []
        figures += [f"{k} {v:.4g}" for k, v in (self.evaluations or [{}])[-1].items() if k != "step"]
        return f"<table><tr>{''.join(f'<td>{f}</td>' for f in figures)}</tr></table>"


def cosine(warmup: float = 0.0) -> Callable[[float], float]:
    """Learning-rate schedule: linear rise over the fraction ``warmup`` of training, then half a cosine down to 0."""

    def factor(done: float) -> float:
        if done < warmup:
            return done / warmup
        return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))

    return factor


@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    model: nn.Module,
    data: Pair | forward.Inputs,
    y: Tensor | None = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    lr: float = 1e-3,
    batch: int = 128,
    optimizer: str | Callable[..., torch.optim.Optimizer] = "adam",
    weight_decay: float = 0.0,
    schedule: Callable[[float], float] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    validation: Pair | Mapping[str, Pair] | None = None,
    every: int | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    adversary: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor] | None = None,
    post_step: Callable[[nn.Module], None] | None = None,
    on_epoch: Callable[[int, History], None] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    desc: str | None = None,
) -> History:
    """Train ``model`` in place by mini-batch gradient descent and say what happened.

    Args:
        data: ``(x, y)``: inputs ``[N, ...]`` (or a dict of them) and targets ``[N]``, integers into the classes. Or
            ``x`` alone, and ``y`` after it.
        epochs, steps: how long; give one. An epoch visits every example once; its last batch may be smaller, but a
            single example left over joins the batch before it (BatchNorm cannot train on one).
        optimizer: "adam", "adamw", "sgd" (momentum 0.9), or a callable ``(parameters, lr=, weight_decay=)``.
        schedule: factor on ``lr`` as a function of the fraction of training done, 0 to 1; see ``cosine``.
        validation: ``(x, y)``, or several by name; evaluated every ``every`` steps (default: epoch) and at the end.
        augment: ``(x, generator) -> x``, applied to each training batch on the CPU.
        adversary: ``(model, x, y, generator) -> x``, applied to each training batch last, on the model's device: what
            the step then trains on. It has a generator of its own: the order of examples is that without it.
        post_step: called with the model after each update: the place to apply a sparsity mask again.
        on_epoch: called with the number of epochs done and the history so far.
        seed: of the order of examples, of ``augment``, of ``adversary`` and of dropout. The global random state is left
            alone.
        device: where to train, "auto" as in ``runtime.device`` (default: where the model is). The model stays there;
            ``data`` stays where it is.

    Raises:
        ValueError: empty data, x and y of different length, a shape that model or loss does not take, neither or both
            of epochs and steps, a bad number, a device that is not there.
        TypeError: data that is no pair with a tensor y.
        IndexError: a class label out of range. UnknownName: no such optimizer.
        NotFinite: a loss that is NaN or infinite, naming the step. The model is left as it was at the last finite loss.

    All of these but NotFinite come before the first step, also for the validation sets. The model comes back in the
    mode (train/eval) it had.

    >>> from nbkit.models import build
    >>> len(fit(build("lenet-300-100", seed=0), (torch.rand(8, 784), torch.arange(8)), steps=3).loss)
    3
    """
    x, y = check_pair(data if y is None else (data, y), "data")
    sets = dict(validation) if isinstance(validation, Mapping) else {"val": validation} if validation else {}
    sets = {name: check_pair(pair, name) for name, pair in sets.items()}
    n = len(y)
    total, per_epoch = _length(n, epochs, steps, batch, lr, every)
    opt = _optimizer(model, optimizer, lr, weight_decay)
    there = None if device is None else runtime.device(device)
    _check_set(model, "data", x, y, loss)
    for name, pair in sets.items():
        _check_set(model, name, *pair, loss, measured=True)
    if there is not None:
        model.to(there)
    device = next(model.parameters()).device
    history, order, generator = History(), torch.empty(0), torch.Generator().manual_seed(seed)
    attacks = torch.Generator().manual_seed(seed)
    good = _Snapshot(model)
    started = time.perf_counter()
    with (
        _training_mode(model),
        _own_randomness(seed, device),
        tqdm(total=total, desc=desc, disable=not desc) as bar,
    ):
        for step in range(1, total + 1):
            at = (step - 1) % per_epoch * batch
            if at == 0:
                order = torch.randperm(n, generator=generator)
            index = order[at : n if step % per_epoch == 0 else at + batch].to(y.device)
            xb, yb = forward.take(x, index), y[index]
            xb = moved(augment(xb, generator) if augment else xb, device)
            yb = yb.to(device)
            xb = adversary(model, xb, yb, attacks) if adversary else xb

            value = loss(forward.logits(model, xb), yb)
            if not math.isfinite(value.item()):
                good.restore()
                raise NotFinite(f"the loss is {value.item()} at step {step} of {total}; the model is left as it was at "
                                f"the last finite loss. A smaller lr than {lr} may help")  # fmt: skip
            good.take()
            for group in opt.param_groups:
                group["lr"] = lr * (schedule((step - 1) / total) if schedule else 1.0)
            opt.zero_grad(set_to_none=True)
            value.backward()
            opt.step()
            if post_step:
                post_step(model)

            history.loss.append(value.item())
            epoch_done = step % per_epoch == 0
            if sets and (step == total or (step % every == 0 if every else epoch_done)):
                history.evaluations.append({"step": step, **_measure(model, sets, loss, batch)})
            history.seconds = time.perf_counter() - started
            bar.update()
            if on_epoch and epoch_done:
                on_epoch(step // per_epoch, history)
    if not good.finite():
        good.restore()
        raise NotFinite(
            f"the update of step {total}, the last, made the weights NaN or infinite; it was taken back"
        )
    return history


class _Snapshot:
    """The model's parameters and buffers at the last finite loss."""

    def __init__(self, model: nn.Module):
        self.live = list(model.state_dict().values())
        self.kept = [t.clone() for t in self.live]

    def take(self) -> None:
        torch._foreach_copy_(self.kept, self.live)

    def restore(self) -> None:
        torch._foreach_copy_(self.live, self.kept)

    def finite(self) -> bool:
        return all(bool(torch.isfinite(t).all()) for t in self.live)


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    with forward.evaluating(model):  # remembers every module's mode and gives it back
        model.train()
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout draws from generators seeded here; the global ones get their state back."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _length(n: int, epochs, steps, batch: int, lr: float, every) -> tuple[int, int]:
    """Steps in all, and steps an epoch."""
    if (epochs is None) == (steps is None):
        raise ValueError(f"give either epochs or steps; got epochs={epochs} and steps={steps}")
    limits = {"epochs": epochs, "steps": steps, "every": every}
    check_whole(batch=batch, **{name: value for name, value in limits.items() if value is not None})
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, not {lr}")
    per_epoch = max(1, n // batch + (n % batch > 1))
    return int(steps if epochs is None else epochs * per_epoch), per_epoch


def _optimizer(model: nn.Module, optimizer, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    make = optimizer if callable(optimizer) else OPTIMIZERS.get(optimizer)
    if make is None:
        raise UnknownName(f"no optimizer {optimizer!r}{did_you_mean(str(optimizer), OPTIMIZERS)}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model has requires_grad=True: there is nothing to train")
    return make(parameters, lr=lr, weight_decay=weight_decay)


@torch.no_grad()
def _check_set(
    model: nn.Module, name: str, x: forward.Inputs, y: Tensor, loss: Callable, *, measured: bool = False
) -> None:
    """Run one example through: what does not fit is said before training has changed anything.

    A class out of range would also stop a GPU with an assertion deep inside.
    """
    device = next(model.parameters()).device
    with forward.evaluating(model), _own_randomness(0, device):
        try:
            out = forward.logits(model, moved(forward.take(x, slice(0, 1)), device))
            if loss is F.cross_entropy:
                if not y.is_floating_point():
                    labels_in_range(y, out.shape[min(1, out.ndim - 1)], strict=True)
                loss(out, y[:1].to(device))
        except RuntimeError as error:
            raise ValueError(f"{name}: its first example does not fit model and loss: {error}") from error
    if measured:
        count_right(out, y[:1].to(device), loss)


def _measure(model: nn.Module, sets: Mapping[str, Pair], loss: Callable, batch: int) -> dict[str, float]:
    row = {}
    for name, (x, y) in sets.items():
        row[f"{name}_loss"], row[f"{name}_accuracy"] = evaluate(model, x, y, loss=loss, batch=max(batch, 512))
    return row
