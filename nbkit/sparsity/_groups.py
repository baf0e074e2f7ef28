"""Which channels of a model can only be cut together, found by running it once (torch-pruning's dependency graph)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from nbkit import forward
from nbkit.sparsity._weights import computed


@dataclass
class Member:
    """One axis of one module that loses entries with the group: its outputs, its inputs, or one that is both."""

    name: str
    module: nn.Module
    cut: Callable[[nn.Module, list[int]], object]  # removes entries from the module, in place
    entries: Tensor  # [entries] of the module's axis
    channels: Tensor  # [entries] the channel of the group that each of them carries
    out: bool  # the axis of its outputs

    @property
    def is_layer(self) -> bool:
        """Whether it makes the channels: a row of its weight each."""
        return self.out and isinstance(self.module, (nn.Linear, _ConvNd))


@dataclass
class Group:
    """Channels that can only be cut together, and every axis that carries them.

    ``fixed``: why they stay (the model's inputs, its output). ``refused``: why cutting them cannot be right.
    """

    members: list[Member] = field(default_factory=list)
    fixed: str | None = None
    refused: str | None = None

    @property
    def layers(self) -> list[Member]:
        return [member for member in self.members if member.is_layer]

    @property
    def name(self) -> str:
        return self.layers[0].name

    @property
    def size(self) -> int:
        return max(int(member.channels.max()) for member in self.members) + 1


def groups(model: nn.Module, example: forward.Inputs) -> list[Group]:
    """The groups of ``model``'s channels, in the order of its layers; their modules are the model's own.

    ``model`` runs once on ``example`` in evaluation mode and is left as it was.

    Raises: TypeError where the run cannot be followed; ValueError for a model without Linear or Conv layers.
    """
    graph, traced = _traced(model, example)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    found = [_group(graph, items, order) for items in traced]
    if not found:
        raise ValueError("no prunable layers: the model has no Linear or Conv layer")
    return sorted(found, key=lambda group: order[group.name])


def _traced(model: nn.Module, example: forward.Inputs) -> tuple:
    import torch_pruning

    graph = torch_pruning.DependencyGraph()
    with forward.evaluating(model), torch.enable_grad(), forward.requiring_grad(model.parameters(), True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tensors that no layer holds: Group.refused tells
            try:
                graph.build_dependency(model, example, forward_fn=forward.logits, verbose=False)
                return graph, list(graph.get_all_groups())
            except Exception as error:  # whatever a model's forward may raise
                raise TypeError(f"the channels of {type(model).__name__} cannot be followed: {error}") from error


def _group(graph, items, order: dict[str, int]) -> Group:
    group = Group()
    for item in items:
        node, module = item.dep.target, item.dep.target.module
        name = graph._module2name.get(module)
        out = item is items[0] or graph.is_out_channel_pruning_fn(item.dep.handler)
        if out and not node.outputs:
            group.fixed = "are the model's output"
        if isinstance(module, nn.Parameter):
            group.refused = f"go with the tensor {graph._param_to_name[module]!r}, which no layer holds"
        elif name is not None:
            if out and not node.inputs and not _mixes(module):
                group.fixed = "are the model's inputs"
            entries, channels = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
            group.members.append(Member(name, module, item.dep.handler, entries, channels, out))
    group.members.sort(key=lambda member: (order[member.name], member.out))
    if any(len(set(member.channels.bincount(minlength=group.size).tolist())) > 1 for member in group.members):
        group.refused = "are shared out among the parts of a split or a reshape, where one cannot go alone"
    return group


def _mixes(module: nn.Module) -> bool:
    """Whether each output reads all inputs, so that one axis can be cut without the other."""
    return isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1)


def check_weights(model: nn.Module) -> None:
    """Raise TypeError where a layer computes its weight, or shares it with another, so that it cannot be cut."""
    seen: dict[int, str] = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module) or hasattr(module, "weight_orig") or hasattr(module, "weight_g"):
            raise TypeError(computed(path))
        for name, parameter in module.named_parameters(recurse=False):
            if seen.setdefault(id(parameter), path) != path:
                raise TypeError(
                    f"{path}.{name} is also the weight of {seen[id(parameter)]!r}; cut apart they would differ"
                )
