"""JupyterLab for real: a notebook run from the menu, a slider dragged with the mouse, a picture that answers.

Needs Chromium (a distribution's package will do) and skips with a line that says so where there is none; in CI
(``CI=true``) that is a failure. Screenshots land in ``tests/browser/out/``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from nbkit import _paths

OUT = Path(__file__).parent / "out"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# As root there is no sandbox to be had; the rest keeps Chromium from calling home, which a closed network refuses.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
NOTEBOOK = "notebooks/00-start/02-hooks.ipynb"

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        message = "no Chromium found: install your system's package (apt-get install chromium) to run this test"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What JupyterLab serves: copies, so that its autosave changes nothing in the repository."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(_paths.notebooks_dir(), folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return folder


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    """A JupyterLab on a free port with settings of its own; gives (address, token)."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    ours = {
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "IPYTHONDIR": home / "ipython",
    }
    log = home / "lab.log"
    quiet = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # a first start asks about news
    command = [
        sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    with log.open("wb") as output:
        environment = {**os.environ, **{name: str(path) for name, path in ours.items()}}
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api/status?token={token}", server, log)
        yield address, token
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()
        server.wait()


@pytest.fixture
def page(chromium, tmp_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def _wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.3)
    pytest.fail(f"JupyterLab did not come up:\n{log.read_text()[-2000:]}")


def _open(page, lab, name: str) -> None:
    address, token = lab
    page.goto(f"{address}/lab/tree/{name}?reset&token={token}")
    page.locator(".jp-NotebookPanel:visible .jp-Cell").first.wait_for()
    page.locator(".jp-Toolbar-kernelName", has_text="Python 3").first.wait_for()
    page.locator("#jp-main-statusbar", has_text="Python 3 (ipykernel) | Idle").wait_for()


def _choose(page, menu: str, entry: str) -> None:
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem", name=entry, exact=True).click()


def _run_all_from_the_menu(page, milliseconds: float) -> None:
    """Clear stored outputs, run all cells, wait until every cell on the page has its number and the kernel rests."""
    _choose(page, "Edit", "Clear Outputs of All Cells")
    _choose(page, "Run", "Run All Cells")
    page.wait_for_function(
        """() => {
            const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent);
            const kernel = document.querySelector('.jp-Notebook-ExecutionIndicator');
            return prompts.length && prompts.every(p => /\\d/.test(p)) && kernel.dataset.status === 'idle';
        }""",
        timeout=milliseconds,
    )


def _scroll_to(page, selector: str):
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


def _bytes(picture) -> list[int]:
    """The picture as the browser has it."""
    return picture.evaluate("async e => [...new Uint8Array(await (await fetch(e.src)).arrayBuffer())]")


def _drag(page, handle, fraction: float) -> None:
    """Take a slider's handle with the mouse and let it go at a fraction of its track."""
    handle.scroll_into_view_if_needed()
    track = handle.locator("xpath=ancestor::*[contains(concat(' ', @class, ' '), ' noUi-target ')][1]").bounding_box()
    start = handle.bounding_box()
    y = start["y"] + start["height"] / 2
    page.mouse.move(start["x"] + start["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"] * fraction, y, steps=12)
    page.mouse.up()


def _step_to(handle, value, wanted: str) -> None:
    """Move a slider to a value with the arrow keys."""

    def number(text: str) -> float:
        return float(text.strip().rstrip("%"))

    for _ in range(40):
        now = value.inner_text()
        if now == wanted:
            return
        handle.press("ArrowRight" if number(now) < number(wanted) else "ArrowLeft")
    pytest.fail(f"the slider stands at {value.inner_text()} and cannot be stepped to {wanted}")


def _wait_for_another_picture(page, picture, before: list[int], seconds: float = 30) -> list[int]:
    """The picture once it has changed and stayed the same for a while: frames of a drag may still be on their way."""
    end = time.monotonic() + seconds
    now, since = before, time.monotonic()
    while time.monotonic() < end:
        page.wait_for_timeout(150)
        latest = _bytes(picture)
        if latest != now:
            now, since = latest, time.monotonic()
        elif now != before and time.monotonic() - since > 2:
            return now
    pytest.fail("the slider was dragged and the picture stayed as it was, or never came to rest")


def test_the_server_asks_for_its_token(lab):
    address, _ = lab
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{address}/api/contents", timeout=10)


def test_a_slider_dragged_with_the_mouse_changes_the_picture(page, lab):
    OUT.mkdir(exist_ok=True)
    shot = OUT / f"{Path(NOTEBOOK).stem}.png"
    try:
        _open(page, lab, NOTEBOOK)
        _run_all_from_the_menu(page, 240_000)
        assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0

        handle = _scroll_to(page, ".jp-OutputArea .widget-slider .noUi-handle")
        output = handle.locator("xpath=ancestor::*[contains(concat(' ', @class, ' '), ' jp-OutputArea-child ')][1]")
        picture = output.locator("img").first
        picture.wait_for()
        first = _bytes(picture)
        assert first[:4] == [0x89, *b"PNG"]

        value = output.locator(".widget-readout").first
        _drag(page, handle, 0.95)
        at_the_end, there = _wait_for_another_picture(page, picture, first), value.inner_text()
        _drag(page, handle, 0.02)
        at_the_start = _wait_for_another_picture(page, picture, at_the_end)
        _drag(page, handle, 0.95)
        _wait_for_another_picture(page, picture, at_the_start)
        _step_to(handle, value, there)  # the mouse may have let go a step away from where it did before
        end = time.monotonic() + 30
        while _bytes(picture) != at_the_end and time.monotonic() < end:
            page.wait_for_timeout(200)
        assert _bytes(picture) == at_the_end, f"two pictures for the value {there}"
    finally:
        page.screenshot(path=shot)
    assert shot.stat().st_size > 10_000
