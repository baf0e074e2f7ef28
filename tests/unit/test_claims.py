"""A claim keeps its figures, its rule, its chance and its verdict, and complains when the verdict is no longer true."""

from __future__ import annotations

import json

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook, new_output

from nbkit import claims, papers
from nbkit.claims import MIME, VerdictChanged
from nbkit.errors import NotFinite, UnknownName

FAILED = {"holds": False, "verdict": "does not hold here"}
UNTESTED = {"holds": None, "verdict": "not tested", "note": "our network has one layer"}
MIXED = {"holds": {"80 %": True, "99 %": False}, "verdict": "mixed"}
GAIN = {"method": "path", "better": "lower"}
EVERYTHING = {
    **MIXED, **GAIN, "kind": "ours", "by_chance": 0.125, "how": "three coins", "paper": "0.41", "unit": "p / p0",
    "note": "a small model",
}  # fmt: skip


def record(**changes):
    arguments = {
        "slug": "neuron-path", "name": "removal", "claim": "Removing the path hurts more",
        "ours": {"path": [0.6, 0.5, 0.7], "activation": [0.8, 0.9, 0.7]}, "holds": True, "verdict": "holds",
        "rule": "lower mean in 2 of 3 seeds", **changes,
    }  # fmt: skip
    return claims.check(arguments.pop("slug"), arguments.pop("name"), arguments.pop("claim"), **arguments)


def html(claim):
    return claim._repr_mimebundle_()["text/html"]


@pytest.fixture
def shelf(tmp_path):
    """A notebooks folder, and a function that stores claims in the outputs of a paper's notebook."""
    root = tmp_path / "notebooks"

    def write(slug, *stored, source="claims.check(...)"):
        path = root / papers.get(slug).file
        path.parent.mkdir(parents=True, exist_ok=True)
        outputs = [new_output("display_data", data=claim._repr_mimebundle_()) for claim in stored]
        nbformat.write(new_notebook(cells=[new_code_cell(source, outputs=outputs)]), path)
        return path

    root.mkdir()
    write.root = root
    return write


# --- the verdict


def test_a_true_verdict_is_recorded_with_every_value():
    claim = record()
    assert claim.holds
    assert claim.ours == {"path": (0.6, 0.5, 0.7), "activation": (0.8, 0.9, 0.7)}
    assert "path 0.600 ± 0.100" in repr(claim)


@pytest.mark.parametrize(
    ("holds", "verdict"),
    [(False, "holds"), (True, "does not hold here"), (True, "mixed"), ({"a": True, "b": False}, "holds")],
)
def test_a_verdict_that_is_no_longer_true_fails_with_the_figures(holds, verdict):
    with pytest.raises(VerdictChanged, match=r"path 0\.600 ± 0\.100; activation 0\.800 ± 0\.100") as error:
        record(holds=holds, verdict=verdict)
    assert isinstance(error.value, AssertionError)
    assert "lower mean in 2 of 3 seeds" in str(error.value)


@pytest.mark.parametrize("verdict", ["holds", "mixed", "does not hold here"])
def test_what_was_not_tested_has_no_other_verdict(verdict):
    with pytest.raises(VerdictChanged, match="say 'not tested'"):
        record(holds=None, verdict=verdict)


@pytest.mark.parametrize(
    ("cases", "verdict"),
    [
        ({"80 %": True, "99 %": True}, "holds"),
        ({"80 %": True, "99 %": np.bool_(False)}, "mixed"),
        ({"80 %": torch.tensor(False), "99 %": False}, "does not hold here"),
        (pd.Series({"80 %": True, "99 %": False}), "mixed"),
    ],
)
def test_cases_make_the_verdict(cases, verdict):
    claim = record(holds=cases, verdict=verdict)
    assert claim.verdict == verdict
    assert list(claim.cases) == ["80 %", "99 %"]
    assert claim.met in repr(claim) and claim.met in html(claim)


def test_the_error_names_the_cases():
    with pytest.raises(VerdictChanged, match="80 %: yes; 99 %: no"):
        record(holds=MIXED["holds"], verdict="holds")


@pytest.mark.parametrize("changes", [FAILED, MIXED, UNTESTED])
def test_every_verdict_is_a_result(changes):
    claim = record(**changes)
    assert not claim.holds
    assert changes["verdict"] in html(claim)


@pytest.mark.parametrize("ours", [None, {}])
def test_what_was_not_tested_may_have_no_figures(ours):
    claim = record(ours=ours, **UNTESTED)
    assert claim.ours == {}
    assert "<table>" not in html(claim)
    assert repr(claim) == "neuron-path / removal: not tested"


def test_a_check_of_our_own_says_so():
    assert "a check of our own" in html(record(kind="ours"))
    assert "a check of our own" not in html(record())


# --- the chance that noise passes


@pytest.mark.parametrize(("chance", "no_test"), [(0, False), (0.05, False), (0.0501, True), (np.float32(0.25), True)])
def test_a_rule_that_noise_passes_says_that_it_is_no_test(chance, no_test):
    claim = record(by_chance=chance, how="simulated: 10,000 shuffles")
    assert claim.no_test == no_test
    sentence = f"Pure noise passes this rule in {claim.chance} of cases: it is no test."
    for shown in (repr(claim), html(claim)):
        assert (sentence in shown) == no_test
    assert "simulated: 10,000 shuffles" in html(claim)


@pytest.mark.parametrize(
    ("chance", "text"), [(0, "0 %"), (0.125, "12.5 %"), (0.004, "0.4 %"), (1e-7, "under 0.01 %"), (1, "100 %")]
)
def test_chances_are_shown_in_per_cent(chance, text):
    assert record(by_chance=chance, how="counted").chance == text


def test_a_chance_that_nobody_computed_is_said():
    assert record().chance == "not computed"
    assert "<i>By chance:</i> not computed" in html(record())
    assert "By chance" not in html(record(**UNTESTED))


# --- the gain


def test_the_gain_is_taken_run_by_run_over_the_strongest_rival():
    ours = {"path": [1.0, 2.0, 3.0], "weak": [0.0, 0.0, 0.0], "strong": [0.5, 2.5, 2.0]}
    gain = record(ours=ours, method="path", better="higher").gain
    assert (gain.rival, gain.values, gain.paired, gain.rivals) == ("strong", (0.5, -0.5, 1.0), True, ("weak", "strong"))
    assert str(gain) == "+0.333 ± 0.764 over strong (ahead in 2 of 3 runs)"


def test_where_lower_is_better_the_lowest_rival_is_strongest_and_a_gain_is_still_positive():
    ours = {"path": [1.0, 2.0], "far": [9.0, 9.0], "near": [2.0, 4.0]}
    gain = record(ours=ours, **GAIN).gain
    assert (gain.rival, gain.values) == ("near", (1.0, 2.0))


def test_a_method_that_is_behind_has_a_negative_gain():
    assert record(method="activation", better="lower").gain.values == (-0.2, -0.4, 0.0)


def test_unequal_numbers_of_runs_are_compared_by_their_means():
    gain = record(ours={"path": [1.0, 3.0], "activation": [1.0]}, method="path", better="higher").gain
    assert (gain.values, gain.paired) == ((1.0,), False)
    assert str(gain) == "+1 over activation (difference of means)"


def test_only_the_rivals_named_compete():
    ours = {"path": [2.0], "weak": [1.0], "ceiling": [9.0]}
    gain = record(ours=ours, method="path", better="higher", rivals=["weak"]).gain
    assert (gain.rival, gain.rivals) == ("weak", ("weak",))
    assert record(ours=ours, method="path", better="higher", rivals="weak").gain == gain


def test_the_gain_is_shown():
    claim = record(**GAIN)
    assert str(claim.gain) in repr(claim)
    assert f"<i>Gain over the strongest rival:</i> {claim.gain}" in html(claim)


@given(st.lists(st.tuples(*[st.integers(-1000, 1000)] * 3), min_size=1), st.sampled_from(["higher", "lower"]))
def test_no_rival_is_stronger_than_the_one_the_gain_is_over(runs, better):
    ours = dict(zip("abc", map(list, zip(*runs, strict=True)), strict=True))
    claim = record(ours=ours, method="a", better=better)
    sign = 1 if better == "higher" else -1
    means = {label: sign * np.mean(values) for label, values in claim.ours.items()}
    assert means[claim.gain.rival] == pytest.approx(max(means["b"], means["c"]))
    assert np.mean(claim.gain.values) == pytest.approx(means["a"] - means[claim.gain.rival])


# --- what may be given


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
    assert f"<i>Paper:</i> {text}" in html(claim)


def test_one_number_is_one_run():
    assert record(ours={"x": 0.25}).ours == {"x": (0.25,)}
    assert record(ours={"x": torch.tensor(0.25)}).figures == "x 0.250"


@pytest.mark.parametrize("holds", [np.bool_(True), torch.tensor(True), True])
def test_holds_may_be_any_truth_value(holds):
    assert record(holds=holds).holds


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"slug": "neuron-paths"}, UnknownName, "did you mean 'neuron-path'"),
        ({"verdict": "true"}, ValueError, "verdict must be 'holds', 'mixed', 'does not hold here' or 'not tested'"),
        ({"kind": "theirs"}, ValueError, "kind must be 'paper' or 'ours', not 'theirs'"),
        ({"ours": {}}, ValueError, "ours is empty"),
        ({"ours": None}, ValueError, "ours is empty"),
        ({"ours": {"path": []}}, ValueError, r"ours\['path'\] is empty"),
        ({"ours": {"path": [0.1, float("nan")]}}, NotFinite, "1 NaN or infinite values of 2"),
        ({"ours": {"path": [float("inf")]}}, NotFinite, "path"),
        ({"ours": {"path": [[1.0], [2.0]]}}, ValueError, "one number a run"),
        ({"ours": {"path": [True]}}, ValueError, "one number a run"),
        ({"ours": {"path": ["0.1"]}}, ValueError, "one number a run"),
        ({"ours": object()}, TypeError, "must be a number or a list of numbers, not object"),
        ({"ours": {"path": "0.1"}}, TypeError, "a list of numbers, not str"),
        ({"paper": [0.7]}, TypeError, "paper must be a text or a number, not list"),
        ({"holds": 0.3}, TypeError, "holds must be True or False"),
        ({"holds": {"80 %": 1}}, TypeError, r"holds\['80 %'\] must be True or False"),
        ({"holds": {}}, ValueError, "holds names no case"),
        ({"rule": " "}, ValueError, "rule"),
        ({"claim": ""}, ValueError, "claim"),
        ({"name": ""}, ValueError, "name"),
        ({**UNTESTED, "note": " "}, ValueError, "needs a note"),
        ({"by_chance": 1.2, "how": "x"}, ValueError, "by_chance must be a probability from 0 to 1, not 1.2"),
        ({"by_chance": -0.1, "how": "x"}, ValueError, "from 0 to 1"),
        ({"by_chance": float("nan"), "how": "x"}, ValueError, "from 0 to 1"),
        ({"by_chance": "5 %", "how": "x"}, TypeError, "by_chance must be a probability or None, not '5 %'"),
        ({"by_chance": True, "how": "x"}, TypeError, "by_chance must be a probability"),
        ({"by_chance": 0.01}, ValueError, "by_chance without how"),
        ({"how": "simulated"}, ValueError, "give by_chance, too"),
        ({"method": "paths", "better": "lower"}, UnknownName, "method: ours has no 'paths'; did you mean 'path'"),
        ({**GAIN, "rivals": ["activations"]}, UnknownName, "rivals: ours has no 'activations'; did you mean"),
        ({**GAIN, "better": "lowest"}, ValueError, "better must be 'higher' or 'lower', not 'lowest'"),
        ({"method": "path"}, ValueError, "better must be 'higher' or 'lower', not None"),
        ({"better": "lower"}, ValueError, "better without method"),
        ({"better": "lower", "rivals": ["activation"]}, ValueError, "better and rivals without method"),
        ({**GAIN, "rivals": ["path"]}, ValueError, "cannot be its own rival"),
        ({**GAIN, "rivals": []}, ValueError, "'path' has no rival in ours"),
        ({**GAIN, "ours": {"path": [1.0]}}, ValueError, "'path' has no rival in ours"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        record(**changes)


# --- one rounding


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.5], "0.500"),
        (0.25, "0.250"),
        (11, "11"),
        (45661, "45,661"),
        (4.0441e4, "40,441"),
        (12345.678, "12,346"),
        (-0.25138, "-0.251"),
        (0, "0"),
        ([0.5, 0.5], "0.500 ± 0.000"),
        ([1, 3], "2.00 ± 1.41"),
        ([1000, 3000], "2,000 ± 1,414"),
        ([0.0, 0.0], "0 ± 0"),
        ([-0.001, 0.001], "0.00000 ± 0.00141"),
        ([-0.0100001, 0.01], "0.0000 ± 0.0141"),
        ([0.00012, 0.00018], "0.000150 ± 0.000042"),
        ([2e-7, 4e-7], "3.00e-07 ± 1.41e-07"),
        (3e20, "3.00e+20"),
        (pd.Series([1, 3], index=[7, 8]), "2.00 ± 1.41"),
        (torch.tensor([1.0, 3.0]), "2.00 ± 1.41"),
    ],
)
def test_a_figure_shows_three_digits_of_the_larger_number(values, text):
    assert claims.figure(values) == text


def test_a_figure_has_its_unit_and_a_gain_its_sign():
    assert claims.figure([1, 3], "points") == "2.00 ± 1.41 points"
    assert claims.figure([1, 3], signed=True) == "+2.00 ± 1.41"
    assert claims.figure([-1, -3], signed=True) == "-2.00 ± 1.41"


@pytest.mark.parametrize(
    ("values", "error"),
    [([], ValueError), ([float("nan")], NotFinite), ("0.5", TypeError), (None, TypeError), ([[1.0]], ValueError)],
)
def test_a_figure_needs_numbers(values, error):
    with pytest.raises(error, match="values"):
        claims.figure(values)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8))
def test_a_figure_is_the_mean_and_sample_deviation(values):
    mean, deviation = (float(part.replace(",", "")) for part in claims.figure(values).split(" ± "))
    scale = max(abs(np.mean(values)), np.std(values, ddof=1))
    assert mean == pytest.approx(np.mean(values), abs=0.01 * scale + 1e-12)
    assert deviation == pytest.approx(np.std(values, ddof=1), abs=0.01 * scale + 1e-12)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5))
def test_what_is_shown_does_not_change_by_being_stored(values):
    stored = record(ours={"x": values}).ours["x"]
    assert claims.figure(stored) == claims.figure(values)


# --- what is stored


def test_the_table_escapes_what_it_is_given():
    page = html(record(claim="a < b & <script>", ours={"<i>x</i>": 1.0}))
    assert "<script>" not in page
    assert "&lt;i&gt;x" in page


@pytest.mark.parametrize("changes", [{}, FAILED, UNTESTED, EVERYTHING, {"ours": {"z": [1, 2], "a": [3]}}])
def test_collect_reads_back_all_that_was_stored(shelf, changes):
    stored = record(**changes)
    shelf("neuron-path", stored)
    (found,) = claims.collect(shelf.root)
    assert found == stored
    assert list(found.ours) == list(stored.ours)
    assert repr(found) == repr(stored)


def test_claims_are_collected_in_reading_order(shelf):
    stored = [record(), record(name="overlap", **FAILED)]
    shelf("neuron-path", *stored)
    shelf("grad-cam", record(slug="grad-cam"))
    assert claims.collect(shelf.root) == [record(slug="grad-cam"), *stored]


def test_a_record_of_before_is_read_with_what_it_has(shelf):
    old = {
        "slug": "neuron-path", "name": "removal", "claim": "A claim", "ours": [["path", [0.6]]], "verdict": "holds",
        "rule": "above 0.5", "paper": None, "unit": "", "note": "",
    }  # fmt: skip
    path = shelf("neuron-path", record())
    book = json.loads(path.read_text())
    book["cells"][0]["outputs"][0]["data"][MIME] = old
    path.write_text(json.dumps(book))
    (found,) = claims.collect(shelf.root)
    assert (found.kind, found.chance, found.gain, found.cases) == ("paper", "not computed", None, {})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda stored: stored.pop("rule"), "cell 1: a stored claim lacks 'rule'; run the notebook again"),
        (lambda stored: stored.update(threshold="x"), "holds 'threshold', which no claim has"),
    ],
)
def test_a_record_that_is_no_claim_is_refused(shelf, spoil, message):
    path = shelf("neuron-path", record())
    book = json.loads(path.read_text())
    spoil(book["cells"][0]["outputs"][0]["data"][MIME])
    path.write_text(json.dumps(book))
    with pytest.raises(ValueError, match=message):
        claims.collect(shelf.root)


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


def test_a_function_that_checks_stores_nothing_before_it_is_called(shelf):
    shelf("neuron-path", source="def settle(name):\n    return claims.check(name)")
    assert claims.collect(shelf.root) == []
    shelf("neuron-path", source="def settle(name):\n    return claims.check(name)\n\nclaims.check(a)")
    with pytest.raises(ValueError, match="1 claims.check and 0 stored"):
        claims.collect(shelf.root)


def test_a_claim_survives_the_notebook_format():
    bundle = record(**EVERYTHING)._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", MIME}
    stored = json.loads(json.dumps(bundle[MIME]))
    assert stored["ours"] == [["path", [0.6, 0.5, 0.7]], ["activation", [0.8, 0.9, 0.7]]]
    assert stored["cases"] == [["80 %", True], ["99 %", False]]
    assert stored["gain"]["values"] == [0.2, 0.4, 0.0]
    assert (stored["by_chance"], stored["how"], stored["kind"]) == (0.125, "three coins", "ours")


# --- measured again

TABLE = pd.DataFrame({"method": ["a", "b"], "accuracy": [0.5, 0.75]}, index=[3, 7])


@pytest.mark.parametrize(
    ("stored", "now", "count"),
    [
        (0.5, 0.501, "1 value again: within 0.002 of the stored one"),
        ([0.5, 0.6], np.array([0.501, 0.599]), "2 values again: all within 0.002 of the stored ones"),
        (torch.tensor([[0.5, 0.6]]), [[0.501, 0.6]], "2 values"),
        ({"a": 1.0, "b": [2.0, 3.0]}, {"b": np.array([2.0, 3.0]), "a": 1.0}, "3 values"),
        (pd.Series([1.0, 2.0], index=["a", "b"]), pd.Series([2.0, 1.0], index=["b", "a"]), "2 values"),
        (pd.Series([1.0, 2.0], index=["a", "b"]), {"b": 2.0, "a": 1.0}, "2 values"),
        (pd.Series([1.0, 2.0], index=["a", "b"]), [1.0, 2.0], "2 values"),
        (TABLE, TABLE[::-1].assign(accuracy=[0.751, 0.5]), "2 values"),
        ([float("nan"), 1.0], [float("nan"), 1.0], "2 values"),
        (0.853, 0.851, "1 value"),
    ],
)
def test_what_comes_out_the_same_is_one_line(stored, now, count, capsys):
    assert claims.again(stored, now, within=0.002) is None
    printed = capsys.readouterr().out
    assert printed.startswith(count) and printed.count("\n") == 1


def test_nothing_may_differ_where_nothing_is_allowed(capsys):
    claims.again([1, 2], [1, 2], within=0)
    assert capsys.readouterr().out == "2 values again: all equal to the stored ones\n"
    with pytest.raises(AssertionError, match="1 of 2 values"):
        claims.again([1.0, 2.0], [1.0, 2.0 + 1e-12], within=0)


@pytest.mark.parametrize(
    ("stored", "now", "message"),
    [
        (0.5, 0.6, "1 of 1 values differ by more than 0.01 from the stored ones; the worst: 0.6 now, 0.5 stored"),
        ({"a": 1.0, "b": 2.0}, {"a": 1.1, "b": 2.5}, r"2 of 2 .* worst: b: 2.5 now, 2 stored \(0.5 apart\)"),
        (TABLE, TABLE.assign(accuracy=[0.5, 0.8]), "worst: 7, accuracy: 0.8 now, 0.75 stored"),
        (TABLE, TABLE.assign(method=["a", "c"]), "7, method: 'c' now, 'b' stored"),
        ([1.0], [float("nan")], "nan now, 1 stored"),
        ([1.0], [float("inf")], "inf now, 1 stored"),
        ([1.0], [None], "None now, 1.0 stored"),
    ],
)
def test_what_differs_fails_and_names_the_worst(stored, now, message):
    with pytest.raises(AssertionError, match=message):
        claims.again(stored, now, within=0.01)


@pytest.mark.parametrize(
    ("stored", "now", "within", "error", "message"),
    [
        ({"a": 1.0}, {"b": 1.0}, 0.1, ValueError, "stored alone holds a; now alone holds b"),
        ([1.0, 2.0], [1.0], 0.1, ValueError, "stored holds 2 values and now 1"),
        (1.0, [], 0.1, ValueError, "stored holds 1 values and now 0"),
        ([], [], 0.1, ValueError, "no numbers to compare"),
        (["a"], ["a"], 0.1, ValueError, "no numbers to compare"),
        (pd.Series([1.0, 2.0], index=["a", "a"]), [1.0, 2.0], 0.1, ValueError, "stored holds a twice"),
        (object(), 1.0, 0.1, TypeError, "cannot compare object: give numbers"),
        (1.0, 1.0, -0.1, ValueError, "within must be"),
        (1.0, 1.0, float("nan"), ValueError, "within must be"),
        (1.0, 1.0, True, ValueError, "within must be"),
    ],
)
def test_what_cannot_be_compared_is_refused(stored, now, within, error, message):
    with pytest.raises(error, match=message):
        claims.again(stored, now, within=within)
