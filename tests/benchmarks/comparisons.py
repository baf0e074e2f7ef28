"""The rows of ``make bench`` beside other libraries: the same computation by the kit and by a reference."""

from __future__ import annotations

from tests.benchmarks.rows import Row, row


def _small_net(width: int = 32):
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    )  # fmt: skip
    return net.eval(), torch.randn(16, 3, 32, 32)


@row("integrated gradients, 16 images, 32 steps", "captum")
def _():
    from captum.attr import IntegratedGradients

    from nbkit import attribution

    net, images = _small_net()
    reference = IntegratedGradients(net)
    return Row(
        ours=lambda: attribution.integrated_gradients(net, images, 3, steps=32),
        theirs=lambda: reference.attribute(images, target=3, n_steps=32).detach(),
    )


@row("global magnitude pruning, 40 k weights", "torch.nn.utils.prune")
def _():
    import copy

    import torch
    from torch.nn.utils import prune

    from nbkit import sparsity

    net, _ = _small_net(64)
    names = ["0", "2", "6"]

    def theirs():
        model = copy.deepcopy(net)
        layers = [(model.get_submodule(name), "weight") for name in names]
        prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.8)
        return torch.cat([layer.weight_mask.flatten() for layer, _ in layers])

    def ours():
        masks = sparsity.magnitude_mask(copy.deepcopy(net), 0.8, scope="global")
        return torch.cat([masks[f"{name}.weight"].flatten() for name in names]).float()

    return Row(ours=ours, theirs=theirs)
