"""Expected gradients: integrated gradients averaged over the background, for torch modules."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from nbkit import forward
from nbkit.shapley._game import Game
from nbkit.shapley._predict import module_score


@torch.inference_mode(False)  # autograd follows nothing in that mode
def expected_gradients(played: Game, *, draws: int, seed: int) -> np.ndarray:
    """Estimates [N, P] of E[(x - b) * df/dx at b + t (x - b)], b from the background and t uniform in (0, 1).

    Erion et al. 2021, "Improving performance of deep learning models with axiomatic attribution priors and expected
    gradients", equation 3: the estimator of ``shap.GradientExplainer``, here with many rows a backward pass, every
    background row used equally often, and t stratified, which lowers its variance. ``draws`` beyond the size of the
    background are rounded up to a multiple of it.

    Raises: TypeError for anything but a torch module on a float input.
    """
    if not isinstance(played.model, nn.Module):
        raise TypeError(f"method='gradient' needs a torch module, not {type(played.model).__name__}")
    x, background = (played.table.decode(m) for m in (played.table.x, played.table.background))
    if not x.is_floating_point():
        raise TypeError(f"method='gradient' needs a float input, not {x.dtype}")
    score, _ = module_score(played.model, played.target, x[:1])
    others = len(background)
    draws = draws if draws <= others else -(-draws // others) * others
    b, t = _draws(len(x), others, draws, seed)
    result = np.zeros(played.table.x.shape)
    with forward.evaluating(played.model), torch.enable_grad():
        for start in range(0, b.size, played.batch):
            row, k = np.divmod(np.arange(start, min(start + played.batch, b.size)), draws)
            step = x[row] - background[b[row, k]]
            at = torch.as_tensor(t[row, k, None]).to(x.dtype).to(x.device)
            point = (background[b[row, k]] + at * step).requires_grad_(True)
            (slope,) = torch.autograd.grad(score(point).sum(), point)
            np.add.at(result, row, (slope * step).cpu().double().numpy())
    return result / draws


def _draws(rows: int, others: int, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Background rows and positions [rows, draws]: each background row gets its own even spread of positions."""
    rng = np.random.default_rng(seed)
    turn, b = np.divmod(np.arange(draws), others)
    b = np.stack([rng.permutation(others)[b] for _ in range(rows)])
    if draws <= others:
        turn = rng.permuted(np.broadcast_to(np.arange(draws), (rows, draws)), axis=1)
    strata = draws if draws <= others else draws // others
    return b, (turn + rng.random((rows, draws))) / strata
