"""A claim keeps its figures, its rule and its verdict, and complains when the verdict is no longer true."""

from __future__ import annotations

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook, new_output

from nbkit import claims, papers
from nbkit.claims import MIME, VerdictChanged
from nbkit.errors import NotFinite, UnknownName

FAILED = {"holds": False, "verdict": "does not hold here"}


def record(**changes):
    arguments = {
        "slug": "neuron-path", "name": "removal", "claim": "Removing the path hurts more",
        "ours": {"path": [0.6, 0.5, 0.7], "activation": [0.8, 0.9, 0.7]}, "holds": True, "verdict": "holds",
        "threshold": "lower mean in 2 of 3 seeds", **changes,
    }  # fmt: skip
    return claims.check(arguments.pop("slug"), arguments.pop("name"), arguments.pop("claim"), **arguments)


@pytest.fixture
def shelf(tmp_path):
    """A notebooks folder, and a function that stores claims in the outputs of a paper's notebook."""
    root = tmp_path / "notebooks"

    def write(slug, *stored, source="claims.check(...)"):
        path = root / papers.get(slug).file
        path.parent.mkdir(parents=True, exist_ok=True)
        outputs = [new_output("display_data", data=claim._repr_mimebundle_()) for claim in stored]
        nbformat.write(new_notebook(cells=[new_code_cell(source, outputs=outputs)]), path)

    root.mkdir()
    write.root = root
    return write


def test_a_true_verdict_is_recorded_with_every_value():
    claim = record()
    assert claim.holds
    assert claim.ours == {"path": (0.6, 0.5, 0.7), "activation": (0.8, 0.9, 0.7)}
    assert "path 0.600 ± 0.100" in repr(claim)


@pytest.mark.parametrize(("holds", "verdict"), [(False, "holds"), (True, "does not hold here")])
def test_a_verdict_that_is_no_longer_true_fails_with_the_figures(holds, verdict):
    with pytest.raises(VerdictChanged, match=r"path 0\.600 ± 0\.100; activation 0\.800 ± 0\.100") as error:
        record(holds=holds, verdict=verdict)
    assert isinstance(error.value, AssertionError)
    assert "lower mean in 2 of 3 seeds" in str(error.value)


def test_a_claim_that_does_not_hold_is_a_result_too():
    claim = record(**FAILED)
    assert not claim.holds
    assert "does not hold here" in claim._repr_mimebundle_()["text/html"]


@pytest.mark.parametrize("values", [np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), (1, 2), [np.float32(1), 2]])
def test_values_may_come_as_any_sequence_of_numbers(values):
    assert record(ours={"x": values}).ours == {"x": (1.0, 2.0)}


@pytest.mark.parametrize(("ours", "values"), [(0.25, (0.25,)), ([1, 2], (1.0, 2.0)), (np.arange(2), (0.0, 1.0))])
def test_figures_without_a_name_are_ours(ours, values):
    assert record(ours=ours).ours == {"ours": values}


@pytest.mark.parametrize(("paper", "text"), [(0.74, "0.74"), (0.0, "0.0"), (np.float64(0.3), "0.3"), ("74 %", "74 %")])
def test_the_papers_number_and_the_note_may_be_numbers(paper, text):
    claim = record(paper=paper, note=3)
    assert (claim.paper, claim.note) == (text, "3")
    assert f"<i>Paper:</i> {text}" in claim._repr_mimebundle_()["text/html"]
    assert f"| {text} |" in claims.markdown([claim])


def test_one_number_is_one_run():
    assert record(ours={"x": 0.25}).ours == {"x": (0.25,)}
    assert record(ours={"x": torch.tensor(0.25)}).figures == "x 0.25"


@pytest.mark.parametrize("holds", [np.bool_(True), torch.tensor(True), True])
def test_holds_may_be_any_truth_value(holds):
    assert record(holds=holds).holds


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"slug": "neuron-paths"}, UnknownName, "did you mean 'neuron-path'"),
        ({"verdict": "true"}, ValueError, "verdict must be 'holds' or 'does not hold here', not 'true'"),
        ({"ours": {}}, ValueError, "ours is empty"),
        ({"ours": {"path": []}}, ValueError, r"ours\['path'\] is empty"),
        ({"ours": {"path": [0.1, float("nan")]}}, NotFinite, "1 NaN or infinite values of 2"),
        ({"ours": {"path": [float("inf")]}}, NotFinite, "path"),
        ({"ours": {"path": [[1.0], [2.0]]}}, ValueError, "one number a run"),
        ({"ours": {"path": [True]}}, ValueError, "one number a run"),
        ({"ours": {"path": ["0.1"]}}, ValueError, "one number a run"),
        ({"ours": None}, TypeError, "must be a number or a list of numbers, not NoneType"),
        ({"ours": {"path": "0.1"}}, TypeError, "a list of numbers, not str"),
        ({"paper": [0.7]}, TypeError, "paper must be a text or a number, not list"),
        ({"holds": 0.3}, TypeError, "holds must be True or False"),
        ({"holds": None}, TypeError, "holds must be True or False"),
        ({"threshold": " "}, ValueError, "threshold"),
        ({"claim": ""}, ValueError, "claim"),
        ({"name": ""}, ValueError, "name"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        record(**changes)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.5], "0.5"),
        ([0.5, 0.5], "0.500 ± 0.000"),
        ([1, 3], "2.00 ± 1.41"),
        ([1000, 3000], "2000 ± 1414"),
        ([0.0, 0.0], "0 ± 0"),
        ([-0.001, 0.001], "0.00000 ± 0.00141"),
        ([0.00012, 0.00018], "0.000150 ± 0.000042"),
    ],
)
def test_a_spread_shows_three_digits_of_the_larger_figure(values, text):
    assert claims.spread(values) == text


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8))
def test_a_spread_is_the_mean_and_sample_deviation(values):
    mean, deviation = map(float, claims.spread(values).split(" ± "))
    scale = max(abs(np.mean(values)), np.std(values, ddof=1))
    assert mean == pytest.approx(np.mean(values), abs=0.01 * scale + 1e-12)
    assert deviation == pytest.approx(np.std(values, ddof=1), abs=0.01 * scale + 1e-12)


def test_the_table_escapes_what_it_is_given():
    page = record(claim="a < b & <script>", ours={"<i>x</i>": 1.0})._repr_mimebundle_()["text/html"]
    assert "<script>" not in page
    assert "&lt;i&gt;x" in page


def test_collect_reads_back_what_the_notebooks_stored(shelf):
    stored = [record(paper="0.41", note="a small model"), record(name="overlap", **FAILED)]
    shelf("neuron-path", *stored)
    shelf("grad-cam", record(slug="grad-cam"))
    assert claims.collect(shelf.root) == [record(slug="grad-cam"), *stored]


def test_the_page_counts_verdicts_and_links_notebooks(shelf):
    shelf("neuron-path", record(paper="0.41 | 0.5"), record(name="overlap", unit="%", **FAILED))
    page = claims.markdown(claims.collect(shelf.root))
    assert "2 claims of 1 paper: **1** hold, **1** do not hold here." in page
    assert "(notebooks/03-neurons/01-neuron-path.ipynb)" in page
    assert "0.41 \\| 0.5" in page
    assert "path: 0.600 ± 0.100<br>activation: 0.800 ± 0.100<br>(%, 3 runs)" in page


def test_check_fails_until_the_page_is_written_again(shelf, capsys):
    page = shelf.root.parent / "CLAIMS.md"
    shelf("neuron-path", record())
    arguments = ["--notebooks", str(shelf.root)]
    assert claims.main([*arguments, "--check"]) == 1
    assert "CLAIMS.md is missing" in capsys.readouterr().err
    assert not page.exists()
    assert claims.main(arguments) == 0
    assert claims.main([*arguments, "--check"]) == 0
    shelf("neuron-path", record(ours={"path": [0.1]}))
    before = page.read_bytes()
    assert claims.main([*arguments, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert page.read_bytes() == before


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda shelf: shelf("neuron-path"), "cell 1: 1 claims.check and 0 stored claims"),
        (lambda shelf: shelf("neuron-path", record(), source="claims.check(a); claims.check(b)"), "and 1 stored"),
        (lambda shelf: shelf("craft", record()), "a claim of 'neuron-path' in the notebook of 'craft'"),
        (lambda shelf: shelf("neuron-path", record(), record()), "two claims have the name 'removal'"),
    ],
)
def test_a_notebook_whose_claims_cannot_be_trusted_is_refused(shelf, write, message):
    write(shelf)
    with pytest.raises(ValueError, match=message):
        claims.collect(shelf.root)
    assert claims.main(["--notebooks", str(shelf.root)]) == 1


def test_without_notebooks_there_are_no_claims(shelf):
    assert "0 claims of 0 papers" in claims.markdown(claims.collect(shelf.root))


def test_a_claim_survives_the_notebook_format():
    bundle = record()._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", MIME}
    assert bundle[MIME]["ours"] == [["path", [0.6, 0.5, 0.7]], ["activation", [0.8, 0.9, 0.7]]]
