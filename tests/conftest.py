"""Fixtures every test may ask for."""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings

from nbkit import recipes

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # no test depends on how busy the machine is


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the unit tests run: cpu, or what NBKIT_TEST_DEVICE names (NBKIT_TEST_DEVICE=cuda runs them on a GPU)."""
    return torch.device(os.environ.get("NBKIT_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="module")
def recipe(request) -> ModuleType:
    """A recipe as a module, by its path below data/ in the test module's RECIPE."""
    return recipes.load(request.module.RECIPE)
