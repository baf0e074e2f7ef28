"""Controls and pictures for a reader who uses the keyboard or a screen reader, and for one whose kernel is gone."""

from __future__ import annotations

import json

import pytest

from tests.browser.steps import open_notebook, run_all_from_the_menu, save, shut_down_the_kernels

NAME = "controls.ipynb"
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
EXPLORER = """\
from nbkit import widgets

def wave(fig, shape, layer, threshold, signed):
    heights = {"sine": 1, "square": 2, "saw": 3}
    fig.subplots().plot([0, heights[shape] + threshold, (-1) ** signed * layer])

widgets.explore(
    wave, shape=["sine", "square", "saw"], layer=list(range(8)), threshold=(0.0, 1.0, 0.05), signed=True
)"""
FIGURE = """\
import matplotlib.pyplot as plt
from nbkit import plots

plots.style()
_, ax = plt.subplots()
ax.plot([3, 1, 2])
ax.set_title("Random masks lose\\n5 points")
plt.show()"""
NOTICE = "No kernel answers these controls any more: run the cell again."

pytestmark = pytest.mark.browser


@pytest.fixture
def played(page, lab, folder):
    """The page with a notebook of an explorer and a figure, run from the menu."""
    from nbformat import v4, write

    cells = [v4.new_code_cell(EXPLORER), v4.new_code_cell(FIGURE)]
    write(v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), folder / NAME)
    page.on("dialog", lambda dialog: dialog.accept())
    open_notebook(page, lab, NAME)
    run_all_from_the_menu(page, 120_000)
    page.locator(".nbkit-explorer img").wait_for()
    return page


def _cells(page) -> list[str]:
    """The kinds of the cells."""
    return page.locator(".jp-Notebook .jp-Cell").evaluate_all("cells => cells.map(cell => cell.ariaLabel)")


def _focus_is_in_the_explorer(page) -> bool:
    return page.evaluate("document.activeElement.closest('.nbkit-explorer') !== null")


def test_keys_pressed_in_an_explorer_stay_in_it(played):
    page = played
    menu = page.get_by_label("layer")
    button = page.get_by_role("button", name="square")
    controls = [menu, button, page.get_by_role("slider"), page.get_by_role("checkbox")]
    cells = _cells(page)
    for control in controls:
        control.focus()
        for key in ("b", "a", "d", "d", "x", "y", "m", "j", "k"):  # insert, delete, cut, change the kind, leave
            page.keyboard.press(key)
        page.wait_for_timeout(500)  # a shortcut that got through would by now have changed the cells
        assert _cells(page) == cells
        assert _focus_is_in_the_explorer(page)
    menu.focus()
    page.keyboard.press("ArrowDown")
    assert menu.input_value() == "1"
    assert _focus_is_in_the_explorer(page)


def test_buttons_and_sliders_answer_the_keyboard_and_say_what_they_are(played):
    page = played
    picture = page.locator(".nbkit-explorer img")
    shapes = page.get_by_role("group", name="shape")
    assert shapes.get_by_role("button", pressed=True).inner_text() == "sine"
    before = picture.get_attribute("src")
    shapes.get_by_role("button", name="saw").focus()
    page.keyboard.press("Enter")
    shapes.get_by_role("button", name="saw", pressed=True).wait_for()
    page.wait_for_function("before => document.querySelector('.nbkit-explorer img').src !== before", arg=before)

    slider = page.get_by_role("slider", name="threshold")
    slider.focus()
    for said in ("0.05", "0.10", "0.15", "0.20"):
        page.keyboard.press("ArrowRight")
        page.wait_for_function("said => document.activeElement.ariaValueText === said", arg=said)


def test_shortcuts_that_run_and_save_pass(played, folder):
    page = played
    run_all_from_the_menu(page, 120_000)  # at rest: an output that came after the save would leave the tab dirty
    page.locator(".nbkit-explorer img").wait_for()
    page.get_by_role("slider", name="threshold").focus()
    page.keyboard.press("Control+s")
    page.locator(".lm-DockPanel-tabBar .lm-TabBar-tab.lm-mod-current:not(.jp-mod-dirty)").wait_for()
    assert json.loads((folder / NAME).read_text(encoding="utf-8"))["cells"][0]["outputs"]


def test_a_stored_picture_is_described_and_says_what_can_be_turned(played, lab, folder):
    page = played
    save(page, folder / NAME)
    shut_down_the_kernels(lab)
    open_notebook(page, lab, NAME)
    first = page.locator(".jp-OutputArea").first
    assert first.locator("img").get_attribute("alt") == "wave at shape='sine', layer=0, threshold=0.0, signed=True"
    said = first.inner_text()
    assert "A stored picture. Run this cell for 4 controls: shape, layer, threshold, signed." in said
    assert page.get_by_role("img", name="Random masks lose 5 points").count() == 1


def test_controls_of_a_kernel_that_is_gone_say_so(played, lab):
    page = played
    said = "getComputedStyle(document.querySelector('.nbkit-explorer'), '::before').content"
    assert NOTICE not in page.evaluate(said)
    shut_down_the_kernels(lab)
    page.wait_for_function(f"{said}.includes('{NOTICE}')")
