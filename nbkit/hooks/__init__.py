"""Read and change what flows through a model: ``layers`` lists it, ``record`` keeps it, ``edit`` rewrites it,
``narrow`` leaves tokens out.

>>> layers(model, example)                                   # what is there: name, type, shape, neurons, parameters
>>> with record(model, ["conv1", "conv2"]) as acts:          # what each layer puts out
...     model(x)
>>> acts["conv2"].shape
>>> with edit(model, {"conv2": zero([3, 5])}):               # the same model with two channels silenced
...     model(x)

Any ``torch.nn.Module``, any layer by its dotted name in ``model.named_modules()``. The model is as it was when a
context closes, also after an exception. Contexts nest: a hook sees the changes of every context opened before it, so
a ``record`` opened inside an ``edit`` keeps the edited values.

**The neuron axis** is stated here and nowhere else (:func:`neuron_axis`): axis 1 for maps ``[N, C, H, W]`` and the
output of one-dimensional convolutions ``[N, C, L]``, the last axis for ``[N, F]`` and for tokens ``[N, T, F]``. The
axes between are the *positions*: tokens, or places in a map. Axis 0 is taken for the examples, whatever it counts.

A shape alone does not tell every case: a ReLU after a ``Conv1d`` looks as if its places were its neurons, an activation
on channels-last maps as if its rows were, and a recurrent layer that puts time first as if its steps were examples.
For the first two an edit takes ``axis=``; for the last, ask for ``batch_first=True``.
"""

from __future__ import annotations

from nbkit.hooks._edit import Edit, clamp, edit, replace, scale, zero
from nbkit.hooks._names import get_layer, layers, neuron_axis, resolve
from nbkit.hooks._narrow import narrow
from nbkit.hooks._record import Recording, record

__all__ = [
    "Edit", "Recording", "clamp", "edit", "get_layer", "layers", "narrow", "neuron_axis", "record", "replace",
    "resolve", "scale", "zero",
]  # fmt: skip
