"""An exercise's answer is right or not yet, whatever a reader hands in, and its digest does not tell it."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbkit import exercises


def said(capsys, answer, digest):
    exercises.check("the sum", answer, digest)
    return capsys.readouterr().out


def right(answer, digest):
    """Without pytest's capture, for the properties below."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lines.append)
        exercises.check("x", answer, digest)
    return lines == ["x: right"]


numbers = st.floats(1e-6, 1e6) | st.floats(-1e6, -1e-6)


def test_the_line_names_the_exercise(capsys):
    digest = exercises.digest(0.7534)
    assert said(capsys, 0.7534, digest) == "the sum: right\n"
    assert said(capsys, 0.76, digest) == "the sum: not yet\n"


@given(numbers, st.integers(1, 6), st.floats(-0.89, 0.89))
def test_a_number_within_nine_tenths_of_a_unit_is_right_wherever_it_lies(number, digits, off):
    if float(number).is_integer():
        number += 1e-7
    unit = 10.0 ** (math.floor(math.log10(abs(number))) - digits + 1)
    assert right(number + off * unit, exercises.digest(number, digits))


@given(numbers, st.integers(1, 6), st.sampled_from([-1, 1]), st.floats(1.11, 50))
def test_a_number_off_by_more_than_a_unit_is_not(number, digits, sign, off):
    unit = 10.0 ** (math.floor(math.log10(abs(number))) - digits + 1)
    assert not right(number + sign * off * unit, exercises.digest(number, digits))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20), st.data())
def test_in_an_array_each_element_has_room_and_none_too_much(values, data):
    values = [*values, 7.123]
    unit, digest = 0.01, exercises.digest(values)
    assert right([v + data.draw(st.floats(-0.89, 0.89)) * unit for v in values], digest)
    place = data.draw(st.integers(0, len(values) - 1))
    values[place] += 1.2 * unit
    assert not right(values, digest)


@given(st.integers(-10_000, 10_000))
def test_whole_numbers_are_exact(number):
    digest = exercises.digest(number)
    assert right(number, digest)
    assert right(float(number), digest)
    assert not right(number + 1, digest)
    assert not right(number - 1, digest)


@pytest.mark.parametrize(("number", "typed"), [(0.75349, 0.753), (0.75351, 0.754), (0.99996, 1.0), (1.0004, 1.0)])
def test_an_answer_rounded_by_hand_is_right(number, typed):
    assert right(typed, exercises.digest(number))


@pytest.mark.parametrize("as_type", [list, tuple, np.array, torch.tensor, pd.Series])
def test_an_array_is_the_same_in_every_dress(as_type):
    values = [0.25, -1.5, 0.125]
    assert right(as_type(values), exercises.digest(values))
    assert right(values, exercises.digest(as_type(values)))
    assert not right(as_type(values[::-1]), exercises.digest(values))


def test_a_scalar_in_every_dress():
    digest = exercises.digest(0.7534)
    trained = torch.nn.Parameter(torch.tensor(0.7534))
    for same in (np.float32(0.7534), np.array(0.7534), torch.tensor(0.7534), trained, trained.half()):
        assert right(same, digest)


def test_shape_and_order_count():
    digest = exercises.digest([[1, 2], [3, 4]])
    assert right(np.array([[1, 2], [3, 4]]), digest)
    assert not right([1, 2, 3, 4], digest)
    assert not right([[1, 3], [2, 4]], digest)


def test_texts_are_read_without_case_and_spaces():
    digest = exercises.digest("Grad CAM")
    assert right("  grad   cam ", digest)
    assert not right("gradcam", digest)
    assert right(np.array(["a", "b"]), exercises.digest(["A", "b"]))


def test_a_bool_is_no_number():
    assert right(np.bool_(True), exercises.digest(True))
    assert not right(1, exercises.digest(True))
    assert not right(False, exercises.digest(True))
    assert not right(True, exercises.digest(1))


def test_a_mixed_answer():
    digest = exercises.digest(["layer4", 0.5123, True])
    assert right(("Layer4", 0.5125, True), digest)
    assert not right(["layer4", 0.6123, True], digest)


def test_zero_takes_what_is_left_by_rounding():
    assert right(1e-16, exercises.digest(0.0))
    assert right([0.0, -1e-12], exercises.digest([0, 0]))
    assert not right(0.004, exercises.digest(0.0))


circle = []
circle.append(circle)


@pytest.mark.parametrize("wanted", [0.5, 3, True, "text", [0.5, 0.25]])
@pytest.mark.parametrize(
    "answer",
    [
        None, ..., math.nan, math.inf, [], [math.nan, 1.0], {}, {"a": 1}, object(), print, int, np.ndarray, 1j, b"text",
        "0.5 or so", [None, ...], torch.empty(2, device="meta"), pd.DataFrame({"a": [1.0]}), circle, 10**400,
    ],
    ids=lambda answer: type(answer).__name__,
)  # fmt: skip
def test_whatever_else_is_not_yet(answer, wanted):
    assert not right(answer, exercises.digest(wanted))


@pytest.mark.parametrize("answer", [None, ..., {"a": 1}, [1, None], 1j])
def test_a_digest_of_no_answer_is_refused(answer):
    with pytest.raises(TypeError, match="an answer is a number"):
        exercises.digest(answer)


@pytest.mark.parametrize(
    ("answer", "digits", "words"),
    [([], 3, "1 to 100"), ({1}, 3, "answer"), ([0.5] * 101, 3, "not 101"), (math.nan, 3, "NaN"), (0.5, 0, "digits")],
)
def test_a_digest_that_could_not_work_is_refused(answer, digits, words):
    with pytest.raises((TypeError, ValueError), match=words):
        exercises.digest(answer, digits)


@pytest.mark.parametrize("digest", ["", "0.5", None, 0.5, "3-5", "3-5-XYZ"])
def test_what_is_no_digest_is_said(digest):
    with pytest.raises(ValueError, match="no digest"):
        exercises.check("x", 0.5, digest)


def test_a_digest_holds_the_digits_and_not_the_answer():
    digest = exercises.digest(0.7534, digits=2)
    assert re.fullmatch(r"2-\d-[0-9a-f]{10}", digest)
    assert exercises.digest(753.4, digits=2)[:4] != "753"
    # numbers a power of ten apart share everything a reader could see but the hash
    assert exercises.digest(7.534, digits=2)[:3] == digest[:3]
