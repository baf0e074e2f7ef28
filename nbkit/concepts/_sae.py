"""A small sparse autoencoder: one hidden layer of ReLUs whose L1 norm is penalised."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.inference_mode(False)  # autograd follows nothing in that mode
def train(
    activations: Tensor, k: int, *, seed: int, penalty: float = 0.05, steps: int = 1000, batch: int = 256,
    learning_rate: float = 3e-3,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Fit ``x ~ relu((x - c) E + b) D + c`` to activations [N, P]; returns E [P, k], b [k], D [k, P], c [P].

    The loss is the squared error plus ``penalty`` times the sum of the codes, averaged over a batch, of activations
    scaled to a mean squared norm of 1, so that ``penalty`` means the same for every layer. Rows of D have length 1.
    Adam; the first weights and the batches come from ``seed`` alone.
    """
    for name, value in {"penalty": penalty, "learning_rate": learning_rate}.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative; it is {value}")
    if steps < 1 or batch < 1:
        raise ValueError(f"steps and batch must be at least 1, not {steps} and {batch}")
    generator = torch.Generator().manual_seed(seed)
    center = activations.mean(0)
    scale = (activations - center).square().sum(1).mean().sqrt().clamp_min(1e-12)
    data = (activations - center) / scale
    decoder = torch.nn.functional.normalize(torch.randn(k, data.shape[1], generator=generator).to(data), dim=1)
    parameters = [decoder.T.clone(), torch.zeros(k).to(data), decoder, torch.zeros(data.shape[1]).to(data)]
    encoder, bias, decoder, shift = (p.requires_grad_(True) for p in parameters)
    optimizer = torch.optim.Adam([encoder, bias, decoder, shift], lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(data), (min(batch, len(data)),), generator=generator).to(data.device)
            x = data[rows]
            codes = torch.relu((x - shift) @ encoder + bias)
            loss = (codes @ decoder + shift - x).square().sum(1).mean() + penalty * codes.sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                decoder.copy_(torch.nn.functional.normalize(decoder, dim=1))
    encoder, bias, decoder, shift = (p.detach() for p in (encoder, bias, decoder, shift))
    return encoder, bias * scale, decoder, center + shift * scale
