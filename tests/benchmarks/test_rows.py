"""The benchmark's own arithmetic: which way the ratio goes, what counts as a difference, whose memory is whose."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from sklearn.tree import DecisionTreeRegressor

from nbkit import widgets
from tests.benchmarks.__main__ import merged
from tests.benchmarks.growth import Sweep, exponent, grow
from tests.benchmarks.kit import Explored
from tests.benchmarks.links import Cost, summary
from tests.benchmarks.probe import probe
from tests.benchmarks.rows import Entry, Row, measure, peak_mb


def of(*args, target=None, memory_target=None, **options):
    return measure(Entry("x", "y", lambda: Row(*args, **options), target, memory_target))


def test_a_ratio_below_one_means_the_kit_is_the_faster():
    m = of(lambda: 1.0, lambda: time.sleep(0.01) or 1.0, repeats=3, target=0.5)
    assert m.ratio < 0.5 and m.verdict == "reached"
    assert m.quartiles[0] <= m.ratio <= m.quartiles[1]
    assert m.theirs >= 0.01 > m.ours


def test_a_missed_target_is_said_and_so_is_another_result():
    assert of(lambda: time.sleep(0.01) or 1.0, lambda: 1.0, repeats=3, target=1.0).verdict == "short"
    assert of(lambda: 1.0, lambda: 1.001, repeats=3, target=1000.0).verdict == "differs"
    assert of(lambda: float("nan"), lambda: 1.0, repeats=3, target=1000.0).verdict == "differs"
    assert of(lambda: 1.0, lambda: 1.0, repeats=3).verdict == ""


def test_more_memory_than_allowed_is_short():
    kept = lambda n: lambda: float(np.ones(n).sum() > 0)  # noqa: E731
    assert of(kept(8_000_000), kept(8), repeats=2, target=1e9, memory_target=1.0).verdict == "short"


def test_the_difference_is_the_largest_of_any_element_relative_to_the_largest():
    assert of(lambda: torch.tensor([1.0, 2.0]), lambda: np.array([1.0, 2.5]), repeats=2).difference == 0.2


def test_a_part_of_the_work_is_compared_with_the_same_part_and_its_time_scaled():
    m = of(lambda: np.arange(8), lambda: time.sleep(0.01) or np.arange(8)[::4], part=4, repeats=2,
           same_part=lambda v: v[::4])  # fmt: skip
    assert m.difference == 0
    assert m.theirs >= 0.04


def test_results_of_other_shapes_are_not_compared():
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(1,\)"):
        of(lambda: [1, 2], lambda: [1])


def test_peak_memory_sees_what_is_freed_again():
    assert peak_mb(lambda: np.ones(8_000_000).sum()) > 40  # 61 MB, held only inside the call


def test_an_exponent_is_the_slope_of_the_logarithms():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_a_sweep_counts_the_bytes_that_are_kept():
    grown = grow(Sweep("x", "n", (2**17, 2**18), lambda n: lambda: {"a": np.ones(n)}, "1"), repeats=2)
    assert grown.kept_mb == [1, 2]


def test_p95_is_in_milliseconds_and_its_limit_depends_on_the_model():
    assert Explored("a", [0.2] * 20, model=True).p95 == pytest.approx(200)
    assert not Explored("a", [0.2] * 20, model=True).short
    assert Explored("a", [0.2] * 20, model=False).short
    assert Explored("a", [], model=False).p95 is None and not Explored("a", [], model=False).short
    assert Explored("a", [0.1, 0.2, 0.6], model=True).median == pytest.approx(200)


def test_the_probe_draws_every_frame_anew_and_sees_whether_a_model_runs():
    net, tree = torch.nn.Linear(1, 1), DecisionTreeRegressor().fit([[0.0], [1.0]], [0.0, 1.0])

    def plain(fig, x):
        fig.subplots().plot([0, x])

    def modelled(fig, x):
        fig.subplots().plot([0, net(torch.ones(1)).item() + x])

    def grown(fig, x):
        fig.subplots().plot([0, tree.predict([[x]])[0]])

    explorers = [widgets.explore(render, x=(0, 3)) for render in (plain, modelled, grown)]
    try:
        found = {e["name"]: e for e in probe(moves=30)}
    finally:
        for explorer in explorers:
            explorer.close()
    assert {name: e["model"] for name, e in found.items()} == {"plain": False, "modelled": True, "grown": True}
    assert len(found["plain"]["frames"]) > 10  # three values: most moves come back to one that was drawn before


def test_the_crossing_is_where_the_links_win_from_then_on():
    costs = [Cost(d, (d**0.5 + 30, d / 16), (d, 2.0 * d)) for d in (64, 128, 1024, 4096)]
    costs[0] = Cost(64, (1.0, 2.0), (64, 32))  # wins once, loses again at 128: that does not count
    said = summary(costs)
    assert "less time from 1,024 inputs on and less memory from 128 inputs on" in said
    assert "1.00 (memory)" in said


def test_a_part_measured_again_takes_its_old_place():
    rows, title = "## Beside other libraries", ["# Benchmarks"]
    first = merged("", title, {"rows": [rows, "", "slow"], "notebooks": ["## Notebooks", "a"]}, "")
    again = merged(first, [*title, "", "new machine"], {"rows": ["", rows, "", "quick"]}, "notes")
    lines = [line for line in again.splitlines() if line]
    assert lines == [*title, "new machine", "## Notebooks", "a", rows, "quick", "notes"]
