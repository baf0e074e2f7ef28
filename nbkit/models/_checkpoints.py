"""A network in a file: weights and JSON facts in safetensors, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nbkit._files import write_whole
from nbkit.errors import UnknownName, did_you_mean
from nbkit.models.zoo import ARCHITECTURES, build


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    architecture: str | None = None,
    config: dict[str, Any] | None = None,
    **facts: Any,
) -> None:
    """Write weights and what is needed to use them to a safetensors file, whole or not at all.

    ``architecture`` is a name of ``models.architectures()``; None for a class of your own, whose qualified name is then
    stored as the fact ``class``. ``config``: the settings it was built with. ``facts`` (dataset, variant, seed, recipe,
    accuracy ...) go into the file's metadata as JSON.

    Raises: UnknownName (no such architecture), TypeError (a fact that JSON cannot hold).

    >>> models.save_checkpoint("net.safetensors", Net(width=8), config={"width": 8}, seed=0)    # doctest: +SKIP
    """
    from safetensors.torch import save

    if architecture is not None and architecture not in ARCHITECTURES:
        raise UnknownName(f"no architecture {architecture!r}{did_you_mean(str(architecture), ARCHITECTURES)}")
    about = {"architecture": architecture, "config": config or {}, **facts}
    if architecture is None:
        about["class"] = f"{type(model).__module__}.{type(model).__qualname__}"
    state = {k: v.detach().cpu().contiguous() for k, v in _untied(model).items()}
    data = save(state, {k: json.dumps(v) for k, v in about.items()})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)


def load_checkpoint(
    path: str | Path, model: nn.Module | Callable[..., nn.Module] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a file that ``save_checkpoint`` wrote, in evaluation mode, and its facts.

    ``model``: for a class that is not of this kit, a freshly built network, which gets the weights, or what builds one:
    called with the stored config as keyword arguments. Without it the stored architecture is built, in float32.

    Raises: FileNotFoundError; ValueError where the file is no such checkpoint or its weights do not fit, in which case
    ``model`` is as it was.

    >>> model, facts = models.load_checkpoint("net.safetensors", Net)                           # doctest: +SKIP
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    name = Path(path).name
    facts = read_facts(path)
    if "architecture" not in facts or "config" not in facts:
        raise ValueError(f"{name} is not a checkpoint of this kit: its metadata lacks architecture and config")
    if model is None:
        if facts["architecture"] is None:
            raise ValueError(f"{name} holds a {facts.get('class')}; pass model=, a freshly built one or its class")
        model = build(facts["architecture"], seed=0, **facts["config"])
    elif not isinstance(model, nn.Module):
        model = model(**facts["config"])
    try:
        state = load(Path(path).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{name} is not a checkpoint of this kit: {error}") from error
    if wrong := _misfits(_untied(model), state):
        raise ValueError(f"the weights of {name} do not fit this network: {wrong}")
    model.load_state_dict(state, strict=False)  # the second names of tied weights are missing
    return model.eval(), facts


def read_facts(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says about itself; no weight is read. Raises: FileNotFoundError, ValueError."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, "np") as file:
            return {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{Path(path).name} is not a checkpoint of this kit: {error}") from error


def _untied(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name; of those that are tied, as a model's input and output embedding, only the first."""
    there: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        there.setdefault(id(tensor), (name, tensor))
    return dict(there.values())


def _misfits(wanted: dict[str, Tensor], stored: dict[str, Tensor]) -> str:
    """What is missing, left over or of another shape, the first three of each; empty where everything fits."""
    found = {
        "missing": [k for k in wanted if k not in stored],
        "left over": sorted(k for k in stored if k not in wanted),
        "of another shape": [
            f"{k} {list(stored[k].shape)} in place of {list(wanted[k].shape)}"
            for k in wanted
            if k in stored and stored[k].shape != wanted[k].shape
        ],
    }
    return "; ".join(
        f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" for what, names in found.items() if names
    )
