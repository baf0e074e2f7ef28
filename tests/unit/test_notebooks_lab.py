"""A notebook saved in JupyterLab keeps its pictures, and one that was only opened does not change."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from jupyter_core.paths import jupyter_config_path, jupyter_path
from jupyter_server.extension.config import ExtensionConfigManager
from jupyter_server.services.contents.largefilemanager import LargeFileManager
from nbformat.v4 import new_code_cell, new_notebook, new_output

from nbkit import _paths
from nbkit.notebooks import lab

WIDGET = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
VIEW = {"model_id": "abc", "version_major": 2, "version_minor": 0}
PNG = "iVBORw0KGgo="
OPENED = {  # what JupyterLab writes into a notebook as its kernel answers
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3}, "file_extension": ".py", "mimetype": "text/x-python",
        "name": "python", "nbconvert_exporter": "python", "pygments_lexer": "ipython3", "version": "3.11.7",
    },
}  # fmt: skip
KEPT = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}


def saved(*bundles, **metadata) -> dict:
    """The notebook that is stored where one cell showed these bundles."""
    outputs = [new_output("display_data", data=data, metadata={WIDGET: {}}) for data in bundles]
    model = {"type": "notebook", "content": new_notebook(cells=[new_code_cell("x", outputs=outputs)])}
    model["content"]["metadata"] = metadata
    model = json.loads(json.dumps(model))
    lab.keep_pictures(model=model, path="a.ipynb", contents_manager=None)
    return model["content"]


def shown(*bundles, **metadata) -> list[dict]:
    return [output["data"] for output in saved(*bundles, **metadata)["cells"][0]["outputs"]]


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "image/svg+xml"])
def test_a_picture_stays_without_the_view_that_would_hide_it(kind):
    bundle = {"text/plain": "explore(f)", kind: PNG}
    assert shown({**bundle, WIDGET: VIEW}) == [bundle]
    assert saved({**bundle, WIDGET: VIEW})["cells"][0]["outputs"][0]["metadata"] == {}
    assert shown(bundle, {"text/plain": "1"}) == [bundle, {"text/plain": "1"}]


def test_a_stored_explorer_says_below_its_picture_what_can_be_turned():
    about = {"alt": "f at k=1", "controls": ["k", "keep <top>"]}
    live = new_output("display_data", data={"image/png": PNG, WIDGET: VIEW}, metadata={"image/png": about})
    model = {"type": "notebook", "content": new_notebook(cells=[new_code_cell("x", outputs=[live])])}
    for _ in range(2):  # saved once more, it says so once
        lab.keep_pictures(model=model)
        picture, below = model["content"]["cells"][0]["outputs"]
        assert picture["data"] == {"image/png": PNG} and picture["metadata"] == {"image/png": about}
        assert "Run this cell for 2 controls: k, keep &lt;top&gt;." in below["data"]["text/html"]
        assert "run this cell for 2 controls: k, keep <top>]" in below["data"]["text/plain"]


def test_a_control_without_a_picture_stays_for_a_kernel_that_goes_on():
    slider = {"text/plain": "IntSlider(value=0)", WIDGET: VIEW}
    assert shown(slider) == [slider]


@pytest.mark.parametrize("text", ["  0%|          | 0/12 [00:00<?, ?it/s]", ["  0%|          | 0/12"]])
def test_a_progress_bar_goes(text):
    assert shown({"text/plain": text, WIDGET: VIEW}, {"text/plain": "after"}) == [{"text/plain": "after"}]


def test_a_view_whose_state_the_notebook_stores_stays():
    bundle = {"text/plain": "explore(f)", "image/png": PNG, WIDGET: VIEW}
    assert shown(bundle, widgets={STATE: {"state": {"abc": {}}}}) == [bundle]
    assert WIDGET not in shown(bundle, widgets={STATE: {"state": {"another": {}}}})[0]


def test_what_only_says_which_python_opened_the_notebook_goes():
    assert saved(**copy.deepcopy(OPENED))["metadata"] == {**OPENED, "language_info": KEPT}
    other = {"name": "R", "version": "4.3"}
    assert saved(language_info=dict(other))["metadata"]["language_info"] == other
    assert saved()["metadata"] == {}


@pytest.mark.parametrize("model", [{"type": "file", "content": "text"}, {"type": "notebook"}, {}])
def test_anything_but_a_notebook_is_left_alone(model):
    before = copy.deepcopy(model)
    lab.keep_pictures(model=model, path="a")
    assert model == before


def test_a_stored_notebook_that_was_only_opened_is_stored_as_it_was(tmp_path):
    stored = sorted(_paths.notebooks_dir().glob("00-start/*.ipynb"))[0].read_text(encoding="utf-8")
    (tmp_path / "a.ipynb").write_text(stored, encoding="utf-8")
    manager = LargeFileManager(root_dir=str(tmp_path))
    lab._load_jupyter_server_extension(SimpleNamespace(contents_manager=manager))
    opened = manager.get("a.ipynb")
    opened["content"]["metadata"] |= copy.deepcopy(OPENED)
    manager.save(opened, "a.ipynb")
    assert (tmp_path / "a.ipynb").read_text(encoding="utf-8") == stored


def test_the_installation_switched_it_on():
    config = ExtensionConfigManager(read_config_path=jupyter_config_path())
    [point] = lab._jupyter_server_extension_points()
    assert config.enabled(point["module"]), "install the kit again: pip install -e ."


def test_the_installation_brought_the_page_its_part():
    installed = [Path(folder) / "nbkit" for folder in jupyter_path("labextensions")]
    [found] = [folder for folder in installed if folder.is_dir()]
    part = Path(lab.__file__).parent / "labextension"
    load = json.loads((part / "package.json").read_text())["jupyterlab"]["_build"]["load"]
    said = "install the kit again: pip install -e ."
    assert (found / load).read_text(encoding="utf-8") == (part / load).read_text(encoding="utf-8"), said
