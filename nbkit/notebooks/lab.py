"""What JupyterLab stores when a reader saves: the pictures, without widget views that nothing can show later.

A server extension, switched on by the installation of nbkit: pyproject.toml puts ``lab.json`` into the environment's
``etc/jupyter``. It changes the file alone; the open page keeps its live widgets. To do without it:
``jupyter server extension disable nbkit.notebooks.lab``.
"""

from __future__ import annotations

from typing import Any

from nbkit.notebooks._normal import METADATA, WIDGET, caption, is_progress


def keep_pictures(model: dict[str, Any], **_: Any) -> None:
    """Bring a notebook that is about to be saved nearer to the normal form; nothing a reader wrote or ran is lost.

    JupyterLab prefers a bundle's widget view and, without its kernel, shows an error in the picture's place. So the
    view goes where the same output has a picture, unless the notebook stores the widget's state. Progress bars go.
    Of ``language_info``, which JupyterLab fills in as a notebook is opened, the part stays that is the same anywhere.

    A ``pre_save_hook`` of Jupyter's contents manager: ``model`` is changed in place.
    """
    notebook = model.get("content")
    if model.get("type") != "notebook" or not isinstance(notebook, dict):
        return
    metadata = notebook.get("metadata", {})
    language = metadata.get("language_info", {})
    if language.get("name") == METADATA["language_info"]["name"]:
        metadata["language_info"] = {key: language[key] for key in METADATA["language_info"] if key in language}
    states = metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for cell in notebook.get("cells", []):
        if "outputs" in cell:
            cell["outputs"] = [stored for output in cell["outputs"] for stored in _stored(output, states)]


def _stored(output: dict[str, Any], states: dict[str, Any]) -> list[dict[str, Any]]:
    """What is stored of an output; where the rest says it as well, its widget view is taken out."""
    data = output.get("data", {})
    if WIDGET not in data or data[WIDGET].get("model_id") in states:
        return [output]
    if is_progress("".join(data.get("text/plain", ""))):
        return []
    if not any(kind.startswith("image/") for kind in data):
        return [output]
    below = caption(output)
    del data[WIDGET]
    output.get("metadata", {}).pop(WIDGET, None)
    return [output] if below is None else [output, below]


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": __name__}]


def _load_jupyter_server_extension(server) -> None:
    server.contents_manager.register_pre_save_hook(keep_pictures)
