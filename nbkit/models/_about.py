"""The card of a model."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nbkit.models._pretrained import Pretrained
from nbkit.models._trained import Checkpoint
from nbkit.models.zoo import ARCHITECTURES
from nbkit.weights import ARTEFACTS


@dataclass(frozen=True)
class About:
    """What a model is, where it is from and what may be done with it."""

    name: str
    title: str
    task: str
    licence: str
    source: str
    """Package and version that carries the weights, or the recipe that trained them."""
    input: str
    parameters: int
    figures: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the recipe recorded for a network trained here: accuracy, seconds ..."""
    notes: str = ""

    def _repr_html_(self) -> str:
        rows = {
            "task": self.task, "input": self.input, "parameters": f"{self.parameters:,}",
            "trained here": ", ".join(f"{k} {v}" for k, v in self.figures.items() if not isinstance(v, dict)),
            "source": self.source, "licence": self.licence, "notes": self.notes,
        }  # fmt: skip
        cells = "".join(
            f"<tr><th style='text-align:left'>{k}</th><td style='text-align:left'>{html.escape(v)}</td></tr>"
            for k, v in rows.items()
            if v
        )
        return f"<b>{html.escape(self.title)}</b> <code>{html.escape(self.name)}</code><table>{cells}</table>"


def of_pretrained(name: str, model: Pretrained) -> About:
    a = ARTEFACTS[name]
    return About(
        name, model.title, model.task, a.licence, f"pip {a.package} {a.version}", model.input.format(name=name),
        model.parameters, notes=model.notes,
    )  # fmt: skip


def of_trained(there: Sequence[Checkpoint], chosen: Checkpoint) -> About:
    facts = dict(chosen.facts)
    config, recipe = facts.pop("config", {}), facts.pop("recipe", "data/models")
    done = f"made {made}" if (made := facts.get("inputs")) else "as they are"
    takes = facts.pop("takes", f"the tensors of datasets.load({chosen.dataset!r}) {done}")
    task = facts.pop("task", f"classification of {chosen.dataset}")
    licence, parameters = facts.pop("licence", "Apache-2.0"), facts.pop("parameters", None)
    if parameters is None:
        with torch.random.fork_rng(devices=[]):  # the device "meta" draws no numbers, but loads torch's compiler: 2 s
            parameters = sum(p.numel() for p in ARCHITECTURES[chosen.name](**config).parameters())
    options = (f"dataset={c.dataset!r}, {f'variant={c.variant!r}, ' * bool(c.variant)}seed={c.seed}" for c in there)
    figures = {k: v for k, v in facts.items() if k not in ("architecture", "classes")}
    return About(
        chosen.name, chosen.name, task, licence, f"trained here: {recipe}", takes, parameters, figures,
        f"Checkpoints: {', '.join(options)}.",
    )  # fmt: skip
