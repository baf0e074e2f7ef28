"""How fast sparsity rises over rounds, and how it is shared out between layers."""

from __future__ import annotations

import math

from torch import nn

from nbkit.sparsity._weights import Names, check_sparsity, prunable


def schedule(
    kind: str = "one-shot", sparsity: float | None = None, rounds: int | None = None, *, rate: float | None = None,
    initial: float = 0.0,
) -> list[float]:  # fmt: skip
    """The sparsity to reach after each round, a list of floats.

    - ``"one-shot"``: ``[sparsity]``.
    - ``"iterative"``: each round removes the fraction ``rate`` of the survivors. Give two of ``sparsity``, ``rounds``
      and ``rate``: ``rounds`` and ``rate`` gives 1 - (1 - rate)^r; with ``sparsity`` and ``rounds`` the rate is
      solved for; with ``sparsity`` and ``rate`` the last round is cut to end at ``sparsity``.
    - ``"gradual cubic"``, or ``"gradual"`` or ``"cubic"``: sparsity + (initial - sparsity)(1 - t / rounds)³ for
      t = 1 ... rounds, fast first.

    ``-``, ``_`` and spaces in the kind do not matter: ``"one_shot"``. ``initial`` is the sparsity before the first
    round.

    Raises: ValueError for another kind, a missing or superfluous argument, sparsity below ``initial``, or numbers
    outside [0, 1); fewer than one round.

    Source: iterative, Frankle and Carbin 2019 (arXiv 1803.03635); cubic, Zhu and Gupta 2017 (arXiv 1710.01878), eq. 1.

    >>> schedule("cubic", 0.8, 4)                # 0.4625, 0.7, 0.7875, 0.8 up to rounding
    """
    kinds = dict.fromkeys(("gradualcubic", "gradual", "cubic"), _cubic)
    kinds |= {"oneshot": _one_shot, "iterative": _iterative}
    plain = "".join(c for c in str(kind) if c not in "-_ ")
    if plain not in kinds:
        raise ValueError(f"kind must be 'one-shot', 'iterative' or 'gradual cubic', not {kind!r}")
    initial = check_sparsity(initial, "initial")
    if sparsity is not None and check_sparsity(sparsity) < initial:
        raise ValueError(f"sparsity {sparsity} is below the initial sparsity {initial}")
    if rounds is not None and (isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1):
        raise ValueError(f"rounds must be an int of at least 1, not {rounds!r}")
    if rate is not None and not check_sparsity(rate, "rate") > 0:
        raise ValueError(f"rate must lie in (0, 1); it is {rate}")
    return kinds[plain](sparsity, rounds, rate, initial)


def _one_shot(sparsity, rounds, rate, initial) -> list[float]:
    if sparsity is None or rate is not None or rounds not in (None, 1):
        raise ValueError("a one-shot schedule takes sparsity, and no rate or number of rounds")
    return [float(sparsity)]


def _iterative(sparsity, rounds, rate, initial) -> list[float]:
    if [sparsity, rounds, rate].count(None) != 1:
        raise ValueError("an iterative schedule takes exactly two of sparsity, rounds and rate")
    start = 1 - initial
    if rate is None:
        rate = 1 - ((1 - sparsity) / start) ** (1 / rounds)
    elif rounds is None:
        rounds = max(1, math.ceil(math.log((1 - sparsity) / start) / math.log(1 - rate) - 1e-9))
    levels = [1 - start * (1 - rate) ** r for r in range(1, rounds + 1)]
    return levels if sparsity is None else [*levels[:-1], float(sparsity)]


def _cubic(sparsity, rounds, rate, initial) -> list[float]:
    if sparsity is None or rounds is None or rate is not None:
        raise ValueError("a cubic schedule takes sparsity and rounds, and no rate")
    return [sparsity + (initial - sparsity) * (1 - t / rounds) ** 3 for t in range(1, rounds + 1)]


def uniform(
    model: nn.Module, sparsity: float, *, layers: Names = None, exclude: Names = ()
) -> dict[str, float]:
    """The same density ``1 - sparsity`` in every layer, ``{parameter name: density}``. Raises: as :func:`erk`.

    >>> mask_from_densities(magnitude(model), uniform(model, 0.9))
    """
    sparsity = check_sparsity(sparsity)
    return dict.fromkeys(prunable(model, layers=layers, exclude=exclude), 1 - sparsity)


def erk(model: nn.Module, sparsity: float, *, layers: Names = None, exclude: Names = ()) -> dict[str, float]:
    """Erdős-Rényi-kernel densities: a layer's is proportional to sum(shape) / prod(shape), none above 1.

    The factor is solved so that the total is ``1 - sparsity``; layers that would pass 1 are dense and the factor is
    solved again over the others. Small layers stay denser than large ones. ``shape`` is the weight's, so a grouped
    convolution counts the inputs of one group.

    Returns ``{parameter name: density}``. Raises: ValueError (sparsity outside [0, 1), nothing to prune),
    LayerNotFound.

    Source: Evci et al. 2020, "Rigging the lottery" (arXiv 1911.11134), section on sparsity distribution.

    >>> mask_from_densities(magnitude(model), erk(model, 0.9))
    """
    keep = 1 - check_sparsity(sparsity)
    weights = prunable(model, layers=layers, exclude=exclude)
    sizes = {name: w.numel() for name, w in weights.items()}
    total = keep * sum(sizes.values())
    raw = {name: sum(w.shape) / w.numel() for name, w in weights.items()}
    dense: set[str] = set()
    while len(dense) < len(raw):
        free = [n for n in raw if n not in dense]
        factor = (total - sum(sizes[n] for n in dense)) / sum(raw[n] * sizes[n] for n in free)
        above = {n for n in free if factor * raw[n] > 1}
        if not above:
            break
        dense |= above  # certain: what they give up only raises the factor of the others
    return {n: 1.0 if n in dense else factor * raw[n] for n in raw}
