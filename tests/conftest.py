"""Fixtures every test may ask for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from nbkit import _paths

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the unit tests run: cpu, or what NBKIT_TEST_DEVICE names (NBKIT_TEST_DEVICE=cuda runs them on a GPU)."""
    return torch.device(os.environ.get("NBKIT_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="module")
def recipe(request) -> Iterator[ModuleType]:
    """A module of data/recipes, by the name in the test module's RECIPE."""
    folder = str(_paths.data_dir() / "recipes")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module(request.module.RECIPE)
    finally:
        sys.path.remove(folder)
