"""What a reader does on the page, step by step: open, choose from a menu, run, save, drag, look."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

import pytest

PROMPTS = ".jp-CodeCell .jp-InputPrompt:not(.jp-Placeholder-prompt)"  # a collapsed cell shows a placeholder
# JupyterLab shows a traceback as it shows what a cell writes to stderr; the text tells one from the other.
STDERR = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]'
RAISED = r"Traceback \(most recent call last\)|^\w*(Error|Exception|Interrupt): "


def open_notebook(page, lab, name: str) -> None:
    address, token = lab
    page.goto(f"{address}/lab/tree/{name}?reset&token={token}")
    page.locator(".jp-NotebookPanel:visible .jp-Cell").first.wait_for()
    page.locator(".jp-Toolbar-kernelName", has_text="Python 3").first.wait_for()
    page.locator("#jp-main-statusbar", has_text="Python 3 (ipykernel) | Idle").wait_for()


def choose(page, menu: str, entry: str) -> None:
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.locator(".lm-Menu-itemLabel:visible").get_by_text(entry, exact=True).click()


def run_all_from_the_menu(page, milliseconds: float) -> None:
    """Clear stored outputs, run all cells, wait until every cell on the page has its number and the kernel rests.

    Fails where a cell raised.
    """
    choose(page, "Edit", "Clear Outputs of All Cells")
    choose(page, "Run", "Run All Cells")
    raised = page.wait_for_function(
        """([cells, stderr, raised]) => {
            const texts = [...document.querySelectorAll(stderr)].map(e => e.textContent);
            const traceback = texts.find(text => RegExp(raised, 'm').test(text));
            const prompts = [...document.querySelectorAll(cells)].map(p => p.textContent);
            const kernel = document.querySelector('.jp-Notebook-ExecutionIndicator');
            const done = prompts.length && prompts.every(p => /\\d/.test(p)) && kernel.dataset.status === 'idle';
            return traceback ? {traceback} : done && {traceback: null};
        }""",
        arg=[PROMPTS, STDERR, RAISED],
        timeout=milliseconds,
    ).json_value()["traceback"]
    if raised:
        pytest.fail(f"a cell raised:\n{raised}")


def save(page, file: Path) -> dict:
    """Save from the menu; the notebook as it then lies in the file."""
    before = file.stat().st_mtime_ns
    choose(page, "File", "Save Notebook")
    end = time.monotonic() + 30
    while file.stat().st_mtime_ns == before:
        assert time.monotonic() < end, "the notebook was not saved"
        page.wait_for_timeout(100)
    page.locator(".lm-DockPanel-tabBar .lm-TabBar-tab.lm-mod-current:not(.jp-mod-dirty)").wait_for()
    return json.loads(file.read_text(encoding="utf-8"))


def outputs(notebook: dict) -> list[dict]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def shut_down_the_kernels(lab) -> None:
    address, token = lab
    for session in json.load(urllib.request.urlopen(f"{address}/api/sessions?token={token}", timeout=10)):
        url = f"{address}/api/sessions/{session['id']}?token={token}"
        urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=30).close()


def scroll_to(page, selector: str):
    """The first element that matches, scrolled into view; JupyterLab draws only the cells near the screen."""
    panel = page.locator(".jp-NotebookPanel:visible .jp-WindowedPanel-outer").first
    panel.evaluate("e => e.scrollTo(0, 0)")
    for _ in range(80):
        found = page.locator(selector)
        if found.count() and found.first.is_visible():
            found.first.scroll_into_view_if_needed()
            return found.first
        panel.evaluate("e => e.scrollBy(0, e.clientHeight / 2)")
        page.wait_for_timeout(150)
    pytest.fail(f"nothing in the notebook matches {selector}")


def pixels(picture) -> list[int]:
    """The picture as the browser has it."""
    return picture.evaluate("async e => [...new Uint8Array(await (await fetch(e.src)).arrayBuffer())]")


def drag(page, handle, fraction: float) -> None:
    """Take a slider's handle with the mouse and let it go at a fraction of its track."""
    handle.scroll_into_view_if_needed()
    track = handle.locator("xpath=ancestor::*[contains(concat(' ', @class, ' '), ' noUi-target ')][1]").bounding_box()
    start = handle.bounding_box()
    y = start["y"] + start["height"] / 2
    page.mouse.move(start["x"] + start["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"] * fraction, y, steps=12)
    page.mouse.up()


def step_to(handle, value, wanted: str) -> None:
    """Move a slider to a value with the arrow keys."""

    def number(text: str) -> float:
        return float(text.strip().rstrip("%"))

    for _ in range(40):
        now = value.inner_text()
        if now == wanted:
            return
        handle.press("ArrowRight" if number(now) < number(wanted) else "ArrowLeft")
    pytest.fail(f"the slider stands at {value.inner_text()} and cannot be stepped to {wanted}")


def wait_for_another_picture(page, picture, before: list[int], seconds: float = 30) -> list[int]:
    """The picture once it has changed and stayed the same for a while: frames of a drag may still be on their way."""
    end = time.monotonic() + seconds
    now, since = before, time.monotonic()
    while time.monotonic() < end:
        page.wait_for_timeout(150)
        latest = pixels(picture)
        if latest != now:
            now, since = latest, time.monotonic()
        elif now != before and time.monotonic() - since > 2:
            return now
    pytest.fail("the slider was dragged and the picture stayed as it was, or never came to rest")
