"""JupyterLab for real: a lesson run from the menu, a slider dragged with the mouse, saved, closed and opened again.

Needs Chromium (a distribution's package will do) and skips with a line that says so where there is none; in CI
(``CI=true``) that is a failure. Screenshots land in ``tests/browser/out/``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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
WIDGET = "application/vnd.jupyter.widget-view+json"
PROMPTS = ".jp-CodeCell .jp-InputPrompt:not(.jp-Placeholder-prompt)"  # a collapsed cell shows a placeholder
# JupyterLab shows a traceback as it shows what a cell writes to stderr; the text tells one from the other.
STDERR = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]'
RAISED = r"Traceback \(most recent call last\)|^\w*(Error|Exception|Interrupt): "

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
    page.locator(".lm-Menu-itemLabel:visible").get_by_text(entry, exact=True).click()


def _run_all_from_the_menu(page, milliseconds: float) -> None:
    """Clear stored outputs, run all cells, wait until every cell on the page has its number and the kernel rests.

    Fails where a cell raised.
    """
    _choose(page, "Edit", "Clear Outputs of All Cells")
    _choose(page, "Run", "Run All Cells")
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


def _save(page, file: Path) -> dict:
    """Save from the menu; the notebook as it then lies in the file."""
    before = file.stat().st_mtime_ns
    _choose(page, "File", "Save Notebook")
    end = time.monotonic() + 30
    while file.stat().st_mtime_ns == before:
        assert time.monotonic() < end, "the notebook was not saved"
        page.wait_for_timeout(100)
    page.locator(".lm-DockPanel-tabBar .lm-TabBar-tab.lm-mod-current:not(.jp-mod-dirty)").wait_for()
    return json.loads(file.read_text(encoding="utf-8"))


def _outputs(notebook: dict) -> list[dict]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def _shut_down_the_kernels(lab) -> None:
    address, token = lab
    for session in json.load(urllib.request.urlopen(f"{address}/api/sessions?token={token}", timeout=10)):
        url = f"{address}/api/sessions/{session['id']}?token={token}"
        urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=30).close()


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


@pytest.mark.parametrize(("code", "error"), [("1 / 0", "ZeroDivisionError"), ("1 +", "SyntaxError")])
def test_a_cell_that_raises_fails_the_run(page, lab, folder, code, error):
    from nbformat import v4, write

    warns = "import sys; print('a warning, no Error', file=sys.stderr)"
    cells = [v4.new_code_cell(source) for source in (warns, code, "'never'")]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{error}.ipynb")
    _open(page, lab, f"{error}.ipynb")
    with pytest.raises(pytest.fail.Exception, match=f"(?s)a cell raised:.*{error}"):
        _run_all_from_the_menu(page, 60_000)


def test_a_notebook_that_was_only_opened_stays_as_it_was(page, lab, folder):
    file = folder / NOTEBOOK
    before = file.read_bytes()
    _open(page, lab, NOTEBOOK)
    _save(page, file)
    assert file.read_bytes() == before


def test_a_lesson_is_run_played_with_saved_and_opened_again(page, lab, folder):
    OUT.mkdir(exist_ok=True)
    file = folder / NOTEBOOK
    name = OUT / file.stem
    page.on("dialog", lambda dialog: dialog.accept())
    try:
        _open(page, lab, NOTEBOOK)
        _run_all_from_the_menu(page, 240_000)
        output = _explorer(page)
        _drag_there_and_back(page, output)
        page.screenshot(path=name.with_suffix(".png"))

        saved = _save(page, file)
        assert not [output for output in _outputs(saved) if output["output_type"] == "error"]
        assert not [o for o in _outputs(saved) if WIDGET in o.get("data", {})], "a widget view was saved"
        picture = output.locator("img").first
        _drag(page, output.locator(".noUi-handle").first, 0.02)
        _wait_for_another_picture(page, picture, _bytes(picture))  # the page it was saved from is still alive

        for kernel in ("running", "gone"):
            if kernel == "gone":
                _shut_down_the_kernels(lab)
            _open(page, lab, NOTEBOOK)
            _see_the_pictures_of_explorers(page, saved)
            page.screenshot(path=f"{name}-kernel-{kernel}.png")
    except BaseException:
        page.screenshot(path=f"{name}-failed.png")
        raise
    assert name.with_suffix(".png").stat().st_size > 10_000


def _explorer(page):
    """The output of the first explorer with a slider."""
    handle = _scroll_to(page, ".jp-OutputArea .widget-slider .noUi-handle")
    return handle.locator("xpath=ancestor::*[contains(concat(' ', @class, ' '), ' jp-OutputArea-child ')][1]")


def _drag_there_and_back(page, output) -> None:
    """Another place of the slider shows another picture; the same place the same one."""
    handle, value = output.locator(".noUi-handle").first, output.locator(".widget-readout").first
    picture = output.locator("img").first
    picture.wait_for()
    first = _bytes(picture)
    assert first[:4] == [0x89, *b"PNG"]
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


def _see_the_pictures_of_explorers(page, notebook: dict) -> None:
    bundles = [output["data"] for output in _outputs(notebook) if "image/png" in output.get("data", {})]
    stored = [data["image/png"] for data in bundles if "".join(data["text/plain"]).startswith("explore(")]
    assert stored
    for png in stored:
        picture = _scroll_to(page, f'.jp-RenderedImage img[src$="{png.strip()[-80:]}"]')
        page.wait_for_timeout(1000)  # cells above may still grow into their height
        picture.scroll_into_view_if_needed()
        assert picture.evaluate("e => e.complete && e.naturalWidth") > 100
    said = page.locator(".jp-NotebookPanel:visible").first.evaluate("e => e.textContent")
    assert not re.search("(?i)error displaying widget|model not found", said)
