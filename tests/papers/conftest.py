"""What the tests of several papers stand on."""

from __future__ import annotations

import pytest
import torch

from nbkit import models


@pytest.fixture(scope="module")
def vit():
    """A vision transformer trained on Fashion-MNIST: 50 tokens, six blocks."""
    return models.load("tiny-vit", seed=0)


@pytest.fixture(scope="module")
def x():
    """Six pictures of noise for it."""
    return torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
