"""Finding the hidden units of a transformer's MLPs by what flows where."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nbkit import forward

_FOUND: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()  # what a model of these parameters was found to have


@forward.outside_inference_mode
def mlp_hidden(model: nn.Module, inputs: forward.Inputs | None = None) -> list[str]:
    """The down projections of a transformer's MLPs, in running order: their *input* is the hidden activation.

    Read and edit it with ``at="input"``: ``[N, T, f]``, in a gated MLP the product of gate and up. The model runs once
    on three tokens, and a linear layer counts where

    - what it takes in comes, through an activation, straight from other linear layers, **place by place** (through an
      attention, one place would depend on the others), and feeds nothing else, and
    - it leads back to the width those layers read: the MLP's output is added to what it came from.

    Names and classes play no part. Linear is what multiplies its input with its own matrix ``weight``, either way round
    (GPT-2's ``Conv1D``). Not found are MLPs under unmerged adapters and experts kept in one tensor.

    Args:
        inputs: what to run the model on, one example; default ``input_ids`` of three tokens. For a vision transformer
            give a picture ``[1, C, H, W]``.

    Raises: TypeError where the model does not run on the inputs or has no such layer.

    >>> mlp_hidden(models.load("smollm2"))[0]
    'model.layers.0.mlp.down_proj'
    """
    key = tuple((name, p.shape, p.dtype, p.device) for name, p in model.named_parameters())
    if inputs is None and _FOUND.get(model, ((), []))[0] == key:
        return list(_FOUND[model][1])
    runs = _run(model, _tokens(model) if inputs is None else inputs)
    sources = [_sources(run, runs[:i]) for i, run in enumerate(runs)]
    fed: dict[int, set[str]] = {}
    for run, above in zip(runs, sources, strict=True):
        for i in above:
            fed.setdefault(i, set()).add(run.name)
    names: dict[str, bool] = {}
    for run, above in zip(runs, sources, strict=True):
        alone = bool(above) and all(fed[i] == {run.name} for i in above)
        is_down = alone and _leads_back(run, [(runs[i], gradient) for i, gradient in above.items()])
        names[run.name] = is_down and names.get(run.name, True)  # a layer that runs twice must be one both times
    found = [name for name, is_down in names.items() if is_down]
    if not found:
        raise TypeError(f"{type(model).__name__} has no MLP: of {len(names)} linear layers none is a down projection")
    if inputs is None:
        _FOUND[model] = (key, found)
    return list(found)


@dataclass
class _Run:
    """One pass through a linear layer; the output is a leaf, so that autograd from what follows ends there."""

    name: str
    taken: Tensor
    out: Tensor


def _tokens(model: nn.Module) -> dict[str, Tensor]:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    ids = torch.arange(1, 4) % getattr(embedding, "num_embeddings", 4)
    device = next((p.device for p in model.parameters()), None)
    return {"input_ids": ids[None].to(device)}


def _run(model: nn.Module, inputs: forward.Inputs) -> list[_Run]:
    runs: list[_Run] = []

    def cut(name: str):
        def hook(module, args, out):
            if args and _multiplies(module, args[0], out):
                leaf = out.detach().requires_grad_()
                runs.append(_Run(name, args[0], leaf))
                return leaf.clone()  # a leaf may not be written into, and an activation may work in place
            return None

        return hook

    with forward.evaluating(model), _hooked(model, cut), torch.enable_grad():
        try:
            forward.call(model, inputs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{type(model).__name__} does not run on {'inputs' if isinstance(inputs, Tensor) else list(inputs)} "
                f"({error}); give inputs= of one example that it takes"
            ) from error
    return runs


@contextmanager
def _hooked(model: nn.Module, make) -> Iterator[None]:
    """Hooks on everything without parts; what others hooked (an open ``record`` or ``edit``) is out of the way."""
    theirs = [(m, m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    try:
        for module, *_ in theirs:
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                module.register_forward_hook(make(name))
        yield
    finally:
        for module, after, before in theirs:
            module._forward_hooks, module._forward_pre_hooks = after, before


def _multiplies(module: nn.Module, x, out) -> bool:
    """Whether ``out`` is ``x`` times the module's matrix; differences of rows drop the bias."""
    weight = module._parameters.get("weight")
    if not (isinstance(x, Tensor) and isinstance(out, Tensor) and weight is not None and weight.ndim == 2):
        return False
    if not x.is_floating_point() or x.ndim < 2 or x.shape[:-1] != out.shape[:-1]:
        return False
    rows, got = (t.detach().reshape(-1, t.shape[-1]).float() for t in (x, out))
    rows, got, w = rows - rows.roll(1, 0), got - got.roll(1, 0), weight.detach().float()
    for matrix in (w.T, w):
        if (rows.shape[1], got.shape[1]) == tuple(matrix.shape):
            wanted = rows @ matrix
            if torch.allclose(got, wanted, rtol=0, atol=1e-2 * float(wanted.abs().max()) + 1e-12):
                return True
    return False


def _sources(run: _Run, before: list[_Run]) -> dict[int, Tensor]:
    """Which earlier linear layers feed the run with no other between, and how the run's last place depends on each."""
    if not before or not run.taken.requires_grad:
        return {}
    last = run.taken.reshape(-1, run.taken.shape[-1])[-1]
    weights = torch.linspace(1, 2, len(last), device=last.device, dtype=last.dtype)
    outs = [r.out for r in before]
    gradients = torch.autograd.grad((last * weights).sum(), outs, retain_graph=True, allow_unused=True)
    return {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}


def _leads_back(run: _Run, above: list[tuple[_Run, Tensor]]) -> bool:
    """Place by place, through an activation, and back to the width that was read."""
    places = run.taken.numel() // run.taken.shape[-1]
    for source, gradient in above:
        rows = gradient.reshape(-1, gradient.shape[-1])
        if len(rows) != places or rows[:-1].any() or source.taken.shape[-1] != run.out.shape[-1]:
            return False
    source = above[0][0].out.detach()
    if len(above) > 1 or source.shape != run.taken.shape:
        return True
    ratio = (run.taken * source).sum() / source.square().sum()  # a plain multiple is no activation
    return not torch.allclose(run.taken, ratio * source, rtol=1e-3, atol=1e-6)
