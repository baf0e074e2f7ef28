"""JupyterLab for real: a lesson run from the menu, a slider dragged with the mouse, saved, closed and opened again.

Screenshots land in ``tests/browser/out/``.
"""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.browser.steps import (
    drag,
    open_notebook,
    outputs,
    pixels,
    run_all_from_the_menu,
    save,
    scroll_to,
    shut_down_the_kernels,
    step_to,
    wait_for_another_picture,
)  # fmt: skip

OUT = Path(__file__).parent / "out"
NOTEBOOK = "notebooks/00-start/02-hooks.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"

pytestmark = pytest.mark.browser


def test_the_server_asks_for_its_token(lab):
    address, _ = lab
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{address}/api/contents", timeout=10)


@pytest.mark.parametrize(("code", "error"), [("1 / 0", "ZeroDivisionError"), ("1 +", "SyntaxError")])
def test_a_cell_that_raises_fails_the_run(page, lab, folder, code, error):
    from nbformat import v4, write

    warns = "import sys; print('a warning, no Error', file=sys.stderr)"
    cells = [v4.new_code_cell(source) for source in (warns, code, "'never'")]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{error}.ipynb")
    open_notebook(page, lab, f"{error}.ipynb")
    with pytest.raises(pytest.fail.Exception, match=f"(?s)a cell raised:.*{error}"):
        run_all_from_the_menu(page, 60_000)


def test_a_notebook_that_was_only_opened_stays_as_it_was(page, lab, folder):
    file = folder / NOTEBOOK
    before = file.read_bytes()
    open_notebook(page, lab, NOTEBOOK)
    save(page, file)
    assert file.read_bytes() == before


def test_a_lesson_is_run_played_with_saved_and_opened_again(page, lab, folder):
    OUT.mkdir(exist_ok=True)
    file = folder / NOTEBOOK
    name = OUT / file.stem
    page.on("dialog", lambda dialog: dialog.accept())
    try:
        open_notebook(page, lab, NOTEBOOK)
        run_all_from_the_menu(page, 240_000)
        output = _explorer(page)
        _drag_there_and_back(page, output)
        page.screenshot(path=name.with_suffix(".png"))

        saved = save(page, file)
        assert not [output for output in outputs(saved) if output["output_type"] == "error"]
        assert not [o for o in outputs(saved) if WIDGET in o.get("data", {})], "a widget view was saved"
        picture = output.locator("img").first
        before = pixels(picture)
        drag(page, output.locator(".noUi-handle").first, 0.02)
        wait_for_another_picture(page, picture, before)  # the page it was saved from is still alive

        for kernel in ("running", "gone"):
            if kernel == "gone":
                shut_down_the_kernels(lab)
            open_notebook(page, lab, NOTEBOOK)
            _see_the_pictures_of_explorers(page, saved)
            page.screenshot(path=f"{name}-kernel-{kernel}.png")
    except BaseException:
        page.screenshot(path=f"{name}-failed.png")
        raise
    assert name.with_suffix(".png").stat().st_size > 10_000


def _explorer(page):
    """The output of the first explorer with a slider."""
    handle = scroll_to(page, ".jp-OutputArea .widget-slider .noUi-handle")
    return handle.locator("xpath=ancestor::*[contains(concat(' ', @class, ' '), ' jp-OutputArea-child ')][1]")


def _drag_there_and_back(page, output) -> None:
    """Another place of the slider shows another picture; the same place the same one."""
    handle, value = output.locator(".noUi-handle").first, output.locator(".widget-readout").first
    picture = output.locator("img").first
    picture.wait_for()
    first = pixels(picture)
    assert first[:4] == [0x89, *b"PNG"]
    drag(page, handle, 0.95)
    at_the_end, there = wait_for_another_picture(page, picture, first), value.inner_text()
    drag(page, handle, 0.02)
    at_the_start = wait_for_another_picture(page, picture, at_the_end)
    drag(page, handle, 0.95)
    wait_for_another_picture(page, picture, at_the_start)
    step_to(handle, value, there)  # the mouse may have let go a step away from where it did before
    end = time.monotonic() + 30
    while pixels(picture) != at_the_end and time.monotonic() < end:
        page.wait_for_timeout(200)
    assert pixels(picture) == at_the_end, f"two pictures for the value {there}"


def _see_the_pictures_of_explorers(page, notebook: dict) -> None:
    bundles = [output["data"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    stored = [data["image/png"] for data in bundles if "".join(data["text/plain"]).startswith("explore(")]
    assert stored
    for png in stored:
        picture = scroll_to(page, f'.jp-RenderedImage img[src$="{png.strip()[-80:]}"]')
        page.wait_for_timeout(1000)  # cells above may still grow into their height
        picture.scroll_into_view_if_needed()
        assert picture.evaluate("e => e.complete && e.naturalWidth") > 100
    said = page.locator(".jp-NotebookPanel:visible").first.evaluate("e => e.textContent")
    assert not re.search("(?i)error displaying widget|model not found", said)


def test_the_map_of_papers_leads_to_their_notebooks(page, lab):
    open_notebook(page, lab, "notebooks/00-start/01-welcome.ipynb")
    link = scroll_to(page, '.jp-OutputArea a[href*="01-lottery-ticket"]')
    assert "The Lottery Ticket Hypothesis" in link.inner_text()
    link.click()
    page.locator(".lm-TabBar-tab.lm-mod-current", has_text="01-lottery-ticket.ipynb").wait_for()
    page.locator(".jp-NotebookPanel:visible .jp-MarkdownCell", has_text="Lottery Ticket").first.wait_for()
