"""Pickers that know about models: a layer, one of its neurons, a sparsity."""

from __future__ import annotations

from collections.abc import Iterable

import ipywidgets
from torch import nn

from nbkit import forward, hooks

_WITHOUT_NEURONS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
_WIDE = {"description_width": "initial"}


class LayerPicker(ipywidgets.Dropdown):
    """A menu of a model's layers; its ``value`` is the layer's dotted name.

    Offers every module that has no children and a known number of neurons. ``types`` and ``only`` choose others.

    Args:
        example: an input ``[N, ...]``. With it, layers without parameters (activations, pooling) are offered too, and
            layers that the forward does not reach are not.
        types: only modules of these classes; a class, its name (``"Conv2d"``) or several.
        only: only these layers, in this order: a dotted name, a shell pattern (``"blocks.*.mlp.fc1"``) or several.
        value: the layer picked at first; without it, the first.

    Raises: LayerNotFound (``only`` or ``value`` name no layer on offer), ValueError (nothing left to pick from),
    TypeError (``model`` is no module).

    >>> LayerPicker(model, types="Conv2d").value
    'conv1'
    """

    default_description = "layer"

    def __init__(
        self,
        model: nn.Module,
        *,
        example: forward.Inputs | None = None,
        types: type | str | Iterable[type | str] | None = None,
        only: str | Iterable[str] | None = None,
        value: str | None = None,
        description: str | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        table = hooks.layers(model, example).set_index("name")
        names = _chosen(model, table, types, only, ran=example is not None)
        if not names:
            raise ValueError(f"{type(model).__name__} has no layer to pick from with types={types!r}, only={only!r}")
        self.layers = table.loc[names].reset_index()
        self._neurons = {n: None if count is None else int(count) for n, count in _counts(table, names)}
        if value is not None and value not in names:
            hooks.get_layer(model, value)
            raise ValueError(f"layer {value!r} is in the model but not on offer; on offer are {', '.join(names)}")
        options = [(f"{n}  ({_summary(table.loc[n, 'type'], self._neurons[n])})", n) for n in names]
        super().__init__(
            options=options,
            value=value or names[0],
            description=self.default_description if description is None else description,
            style=_WIDE,
            layout={"width": "auto", "max_width": "100%"},
        )

    @property
    def neurons(self) -> int | None:
        """How many neurons the picked layer has; None where that is not known without an example input."""
        return self._neurons[self.value]


class NeuronPicker(ipywidgets.IntSlider):
    """A slider over the neurons of a layer; its ``value`` is an index from 0.

    The first argument is a :class:`LayerPicker`, whose choice the range then follows (a value beyond the new end moves
    to it), or a model together with ``layer``.

    Raises: LayerNotFound; ValueError where the number of neurons is not known, or ``value`` lies outside it.

    >>> NeuronPicker(model, "conv1").max                          # a layer of 64 channels
    63
    """

    default_description = "neuron"

    def __init__(
        self,
        source: LayerPicker | nn.Module,
        layer: str | None = None,
        *,
        example: forward.Inputs | None = None,
        value: int = 0,
        description: str | None = None,
    ):
        if isinstance(source, LayerPicker):
            if layer is not None:
                raise TypeError("a NeuronPicker follows a LayerPicker or takes a model and a layer, not both")
        elif layer is None:
            raise TypeError("a NeuronPicker of a model needs a layer: NeuronPicker(model, 'conv1')")
        else:
            source = LayerPicker(source, example=example, only=layer)
        unknown = [name for name, count in source._neurons.items() if not count]
        if unknown:
            raise ValueError(f"the number of neurons of {', '.join(unknown)} is not known; give an example= input")
        if not 0 <= value < source.neurons:
            raise ValueError(f"neuron {value} is out of range; {source.value!r} has neurons 0 to {source.neurons - 1}")
        super().__init__(
            value=value,
            min=0,
            max=source.neurons - 1,
            description=self.default_description if description is None else description,
            style=_WIDE,
        )
        self.source = source
        # the menu tells of its index before its value: the range has to fit before an explorer hears of either
        source.observe(self._follow, ["value", "index"])

    def _follow(self, _change) -> None:
        if self.source.value is not None:
            self.max = self.source.neurons - 1


class SparsitySlider(ipywidgets.FloatSlider):
    """A slider over sparsities, the share of weights (or neurons) that are zero, in ``[0, 1)``; shown in percent.

    Raises: ValueError where not ``0 <= min <= value <= max < 1`` or ``step`` is not positive.

    >>> SparsitySlider(value=0.9, max=0.98, step=0.02).value
    0.9
    """

    default_description = "sparsity"

    def __init__(
        self,
        *,
        value: float = 0.5,
        min: float = 0.0,
        max: float = 0.95,
        step: float = 0.05,
        description: str | None = None,
    ):
        if not 0 <= min <= value <= max < 1:
            raise ValueError(f"need 0 <= min <= value <= max < 1, not min={min}, value={value}, max={max}")
        if not step > 0:
            raise ValueError(f"step must be positive, not {step}")
        super().__init__(
            value=value,
            min=min,
            max=max,
            step=step,
            readout_format=".0%" if round(step * 100, 6) == round(step * 100) else ".1%",
            description=self.default_description if description is None else description,
            style=_WIDE,
        )


def _chosen(model, table, types, only, *, ran: bool) -> list[str]:
    modules = dict(model.named_modules())
    names = list(table.index) if only is None else [n for n in hooks.resolve(model, only) if n]
    if types is not None:
        types = [types] if isinstance(types, (type, str)) else list(types)
        classes = tuple(t for t in types if isinstance(t, type))
        names = [n for n in names if isinstance(modules[n], classes) or type(modules[n]).__name__ in types]
    elif only is None:
        names = [n for n in names if not any(modules[n].children()) and not isinstance(modules[n], _WITHOUT_NEURONS)]
    if ran:
        names = [n for n in names if table.loc[n, "output_shape"] is not None]
    if only is None:
        known = dict(_counts(table, names))
        names = [n for n in names if known[n] is not None]
    return names


def _counts(table, names) -> list[tuple[str, int | None]]:
    # the table's column is a nullable integer: a missing count is pandas.NA, which is neither true nor false
    counts = table.loc[names, "neurons"]
    return [(n, None if missing else count) for n, count, missing in zip(names, counts, counts.isna(), strict=True)]


def _summary(kind: str, neurons: int | None) -> str:
    return kind if neurons is None else f"{kind}, {neurons}"
