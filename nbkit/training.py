"""A training loop that can be read in one sitting.

>>> history = fit(model, (x, y), epochs=5, lr=1e-3, validation=(x_val, y_val))   # doctest: +SKIP
>>> history.frame.plot(y=["loss", "val_loss"])                                   # doctest: +SKIP
"""

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

from nbkit import forward
from nbkit.errors import NotFinite, UnknownName, did_you_mean

Pair = tuple[forward.Inputs, Tensor]

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


def fit(
    model: nn.Module,
    data: Pair,
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
    post_step: Callable[[nn.Module], None] | None = None,
    on_epoch: Callable[[int, History], None] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    desc: str | None = None,
) -> History:
    """Train ``model`` in place by mini-batch gradient descent and say what happened.

    Args:
        data: ``(x, y)``: inputs ``[N, ...]`` (or a dict of them) and targets ``[N]``, integers into the classes.
        epochs, steps: how long; give one. An epoch visits every example once; its last batch may be smaller.
        optimizer: "adam", "adamw", "sgd" (momentum 0.9), or a callable ``(parameters, lr=, weight_decay=)``.
        schedule: factor on ``lr`` as a function of the fraction of training done, 0 to 1; see ``cosine``.
        validation: ``(x, y)``, or several by name; evaluated every ``every`` steps (default: epoch) and at the end.
        augment: ``(x, generator) -> x``, applied to each training batch on the CPU.
        post_step: called with the model after each update: the place to apply a sparsity mask again.
        on_epoch: called with the number of epochs done and the history so far.
        seed: of the order of examples, of ``augment`` and of dropout. The global random state is left alone.
        device: where to train (default: where the model is). The model stays there; ``data`` stays where it is.

    Raises:
        ValueError: empty data, x and y of different length, neither or both of epochs and steps, a bad number.
        IndexError: a class label out of range. UnknownName: no such optimizer.
        NotFinite: a loss that is NaN or infinite, naming the step. The model is left as it was at the last finite loss.

    The model comes back in the mode (train/eval) it had.

    >>> from nbkit.models._zoo import build
    >>> len(fit(build("lenet-300-100", seed=0), (torch.rand(8, 784), torch.arange(8)), steps=3).loss)
    3
    """
    x, y = _pair(data, "data")
    sets = dict(validation) if isinstance(validation, Mapping) else {"val": validation} if validation else {}
    sets = {name: _pair(pair, name) for name, pair in sets.items()}
    n = len(y)
    total, per_epoch = _length(n, epochs, steps, batch, lr, every)
    opt = _optimizer(model, optimizer, lr, weight_decay)
    _check_labels(model, x, y, loss)
    if device is not None:
        model.to(device)
    device = next(model.parameters()).device
    history, order, generator = History(), torch.empty(0), torch.Generator().manual_seed(seed)
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
            index = order[at : at + batch].to(y.device)
            xb, yb = forward.take(x, index), y[index]
            xb = augment(xb, generator) if augment else xb

            value = loss(forward.logits(model, _to(xb, device)), yb.to(device))
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


@torch.no_grad()
def evaluate(
    model: nn.Module, x: forward.Inputs, y: Tensor, *, loss: Callable = F.cross_entropy, batch: int = 512
) -> tuple[float, float]:
    """Mean loss and accuracy (fraction right; NaN where targets are not classes) in evaluation mode.

    >>> from nbkit.models._zoo import build
    >>> mean, right = evaluate(build("lenet-300-100", seed=0), torch.rand(8, 784), torch.arange(8))
    """
    x, y = _pair((x, y), "data")
    device = next(model.parameters()).device
    total, right, classes = 0.0, 0, not y.is_floating_point()
    with forward.evaluating(model):
        for start in range(0, len(y), batch):
            part = slice(start, start + batch)
            yb = y[part].to(device)
            out = forward.logits(model, _to(forward.take(x, part), device))
            total += loss(out, yb).item() * len(yb)
            right += (out.argmax(-1) == yb).sum().item() if classes else 0
    return total / len(y), right / len(y) if classes else math.nan


def accuracy(model: nn.Module, x: forward.Inputs, y: Tensor, *, batch: int = 512) -> float:
    """Fraction of ``x`` whose largest logit is at ``y``, in evaluation mode, ``batch`` examples at a time.

    Raises ValueError for no data or different lengths.

    >>> from nbkit.models._zoo import build
    >>> 0 <= accuracy(build("lenet-300-100", seed=0), torch.rand(8, 784), torch.arange(8)) <= 1
    True
    """
    return evaluate(model, x, y, loss=lambda out, _: out.new_zeros(()), batch=batch)[1]


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


def _pair(pair: Pair, name: str) -> Pair:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[1], Tensor):
        raise TypeError(f"{name} must be a pair (x, y) with y a tensor, not {type(pair).__name__}")
    x, y = pair
    forward.check_inputs(x, name=f"{name}: x")
    if forward.batch_size(x) != len(y):
        raise ValueError(f"{name}: {forward.batch_size(x)} inputs but {len(y)} targets")
    return x, y


def _length(n: int, epochs, steps, batch: int, lr: float, every) -> tuple[int, int]:
    """Steps in all, and steps an epoch."""
    if (epochs is None) == (steps is None):
        raise ValueError(f"give either epochs or steps; got epochs={epochs} and steps={steps}")
    limits = {"epochs": epochs, "steps": steps, "batch": batch, "every": every}
    for name, value in limits.items():
        if value is not None and (value != int(value) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, not {value}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, not {lr}")
    per_epoch = math.ceil(n / batch)
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
def _check_labels(model: nn.Module, x: forward.Inputs, y: Tensor, loss: Callable) -> None:
    """A class out of range would stop a GPU with an assertion deep inside; say it before anything starts."""
    if loss is not F.cross_entropy or y.is_floating_point():
        return
    device = next(model.parameters()).device
    with forward.evaluating(model):
        classes = forward.logits(model, _to(forward.take(x, slice(0, 1)), device)).shape[1]
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise IndexError(
            f"labels run from {int(y.min())} to {int(y.max())}; the model has classes 0 to {classes - 1}"
        )


def _measure(model: nn.Module, sets: Mapping[str, Pair], loss: Callable, batch: int) -> dict[str, float]:
    row = {}
    for name, (x, y) in sets.items():
        row[f"{name}_loss"], row[f"{name}_accuracy"] = evaluate(model, x, y, loss=loss, batch=max(batch, 512))
    return row


def _to(inputs: forward.Inputs, device: torch.device) -> forward.Inputs:
    if isinstance(inputs, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return inputs.to(device)
