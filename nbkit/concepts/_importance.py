"""Which concepts the decision rests on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from nbkit import forward, hooks
from nbkit.concepts._factorize import Factorization, decode
from nbkit.concepts._sobol import design, jansen
from nbkit.errors import NotFinite, NotFittedError

Head = nn.Module | Callable[[Tensor], Tensor]
METHODS = ("sobol", "gradient", "tcav", "ablation")


@forward.outside_inference_mode
def concept_importance(
    head: Head, codes: Tensor, dictionary: Tensor | Factorization, target: forward.Target = None, *,
    method: str = "sobol", n: int = 64, seed: int = 0, batch: int = 256, per_example: bool = False,
) -> Tensor:  # fmt: skip
    """How much the head's score depends on each concept.

    ``head`` maps activations to logits: the part of the model after the layer, module or function. ``codes`` [N, k]
    (or [N, k, H, W], [N, T, k]) are of the examples to explain; ``dictionary`` [k, P], or the Factorization where
    its offset belongs to the activations (pca, sae). ``target``: None (the class predicted from the decoded codes),
    an int, ints [N], or a callable on the head's output giving [N] scores. Scores should be logits: a saturated
    probability hides influence.

    ``method``:

    - ``"sobol"``: total Sobol index of a factor in [0, 1] that multiplies the concept's code at every location: the
      share of the score's variance left once all other factors are known, in ``n`` (k + 1) forwards an example
      (:func:`total_sobol`; ``n`` design rows from ``seed``).
    - ``"gradient"``: |sum over locations of u dy/du|, gradient x code.
    - ``"tcav"``: 1 where y grows along the concept (sum over locations of dy/du > 0), else 0.
    - ``"ablation"``: y minus y with the concept's codes set to 0. Signed: a concept that argues against the target is
      below 0. (``"sobol"`` and ``"gradient"`` give such a concept a high value, ``"tcav"`` one near 0.)

    Returns [k], the mean over examples, on the CPU; with ``per_example`` [N, k]. An example whose score does not
    change at all has no Sobol indices (NaN): it is left out of the mean, and a RuntimeWarning says how many were.
    ``batch`` rows go through the head at a time, which bounds memory.

    Raises: NotFittedError (no codes or dictionary), ValueError (shapes, n < 2, unknown method, every example
    constant), IndexError (target), NotFinite.

    Source: Fel et al. 2023, "CRAFT" (arXiv 2211.10154); tcav: Kim et al. 2018 (arXiv 1711.11279).

    >>> concept_importance(head, bank.codes, bank.dictionary, 3)
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}")
    codes, weights, offset = _checked(head, codes, dictionary, batch)

    def logits(part: Tensor) -> Tensor:
        return head(decode(part, weights, offset))

    with forward.evaluating(head) if isinstance(head, nn.Module) else nullcontext():
        with torch.no_grad():
            target = _targets(logits, codes, target, batch)
        if method == "sobol":
            each = _sobol(logits, codes, target, n, seed, batch)
        elif method == "ablation":
            each = _ablation(logits, codes, target, batch)
        else:
            each = _gradient(logits, codes, target, batch, method)
    return each if per_example else _mean(each)


def _sobol(logits: Head, codes: Tensor, target: forward.Target, n: int, seed: int, batch: int) -> Tensor:
    k = codes.shape[hooks.neuron_axis(codes)]
    masks = design(k, n, seed=seed).to(codes)
    scores = _score_variants(logits, codes, target, masks, batch)
    indices = jansen(scores, n)
    silent = ~_flat(codes, k).any(-1).cpu()  # a code of 0 stays 0 under every mask, whatever rounding does
    return torch.where(silent & ~indices.isnan(), 0.0, indices)


def _ablation(logits: Head, codes: Tensor, target: forward.Target, batch: int) -> Tensor:
    k = codes.shape[hooks.neuron_axis(codes)]
    masks = torch.cat([torch.ones(1, k), 1 - torch.eye(k)]).to(codes)
    scores = _score_variants(logits, codes, target, masks, batch).double()
    return scores[:, :1] - scores[:, 1:]


def _score_variants(logits: Head, codes: Tensor, target: forward.Target, masks: Tensor, batch: int) -> Tensor:
    """Scores [N, M] of every example's codes under every mask [M, k]."""
    axis = hooks.neuron_axis(codes)
    pairs = torch.cartesian_prod(torch.arange(len(codes)), torch.arange(len(masks)))
    found = []
    with torch.no_grad():
        for part in pairs.split(batch):
            example, mask = part.to(codes.device).T
            shape = [1] * codes.ndim
            shape[0], shape[axis] = len(part), masks.shape[1]
            output = logits(codes[example] * masks[mask].reshape(shape))
            found.append(_scores(output, _of(target, example)))
    return torch.cat(found).reshape(len(codes), len(masks))


def _gradient(logits: Head, codes: Tensor, target: forward.Target, batch: int, method: str) -> Tensor:
    k = codes.shape[hooks.neuron_axis(codes)]
    found = []
    for start in range(0, len(codes), batch):
        rows = torch.arange(start, min(start + batch, len(codes)), device=codes.device)
        with torch.enable_grad():
            part = codes[rows].requires_grad_(True)
            score = forward.scores(logits(part), _of(target, rows)).sum()
            slope = torch.autograd.grad(score, part)[0]
        flow = _flat(part.detach() * slope, k).sum(-1).abs()
        found.append(flow if method == "gradient" else (_flat(slope, k).sum(-1) > 0).to(flow))
    return torch.cat(found).cpu().double()


def _targets(logits: Head, codes: Tensor, target: forward.Target, batch: int) -> forward.Target:
    """Targets fixed for the unchanged codes: what the head says of them must not move under a mask."""
    if callable(target):
        return target
    outputs = torch.cat([forward.first_tensor(logits(part)) for part in codes.split(batch)])
    return forward.resolve_target(outputs, target)


def _of(target: forward.Target, rows: Tensor) -> forward.Target:
    return target if callable(target) else target[rows]


def _scores(output: object, target: forward.Target) -> Tensor:
    scores = forward.scores(output, target).cpu()
    if not torch.isfinite(scores).all():
        raise NotFinite("the head returned NaN or infinite scores")
    return scores


def _flat(values: Tensor, k: int) -> Tensor:
    """[N, k, locations]."""
    return values.movedim(hooks.neuron_axis(values), 1).reshape(len(values), k, -1)


def _mean(each: Tensor) -> Tensor:
    constant = each.isnan().any(1)
    if constant.all():
        raise ValueError("the score is the same for every mask in all examples; no concept has an index (all codes 0?)")
    if constant.any():
        warnings.warn(
            f"{int(constant.sum())} of {len(each)} examples have a constant score and were left out",
            RuntimeWarning, stacklevel=4,
        )  # fmt: skip
    return each[~constant].mean(0)


def _checked(
    head: Head, codes: Tensor, dictionary: Tensor | Factorization, batch: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    if codes is None or dictionary is None:
        raise NotFittedError("no codes or dictionary: make them with factorize() first")
    offset = None
    if isinstance(dictionary, Factorization):
        dictionary, offset = dictionary.dictionary, dictionary.offset
    forward.check_inputs(codes, name="codes")
    forward.check_inputs(dictionary, name="dictionary")
    if not codes.is_floating_point():
        codes = codes.float()
    axis = hooks.neuron_axis(codes)
    if dictionary.ndim != 2 or codes.shape[axis] != len(dictionary):
        shapes = f"{tuple(codes.shape)} and {tuple(dictionary.shape)}"
        raise ValueError(f"codes and dictionary [k, P] must have the same number of concepts; shapes {shapes}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    parameter = next(head.parameters(), None) if isinstance(head, nn.Module) else None
    codes = codes.detach() if parameter is None else codes.detach().to(parameter)
    # copies, because autograd saves no tensor that was made in inference mode
    return codes, dictionary.detach().clone(), None if offset is None else offset.clone()
