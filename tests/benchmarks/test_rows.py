"""The benchmark's own arithmetic: which way the ratio goes, what counts as a difference, whose memory is whose."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from tests.benchmarks.kit import NotebookRun
from tests.benchmarks.rows import Row, measure, peak_mb


def test_a_ratio_above_one_means_the_kit_is_the_faster():
    m = measure("x", "y", lambda: Row(ours=lambda: 1.0, theirs=lambda: time.sleep(0.01) or 1.0, repeats=3))
    assert m.ratio > 1
    assert m.quartiles[0] <= m.ratio <= m.quartiles[1]
    assert m.theirs >= 0.01 > m.ours


def test_the_difference_is_the_largest_of_any_element():
    m = measure("x", "y", lambda: Row(lambda: torch.tensor([1.0, 2.0]), lambda: np.array([1.0, 2.5]), repeats=2))
    assert m.difference == 0.5


def test_results_of_other_shapes_are_not_compared():
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(1,\)"):
        measure("x", "y", lambda: Row(lambda: [1, 2], lambda: [1]))


def test_peak_memory_sees_what_is_freed_again():
    assert peak_mb(lambda: np.ones(8_000_000).sum()) > 40  # 61 MB, held only inside the call


def test_p95_is_in_milliseconds_and_needs_frames():
    assert NotebookRun("a", 1.0, [0.1] * 20).p95 == pytest.approx(100)
    assert NotebookRun("a", 1.0, []).p95 is None
