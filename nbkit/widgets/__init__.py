"""Controls a reader turns and a picture that answers, live in JupyterLab and still readable where no kernel runs.

>>> layer = LayerPicker(model)
>>> neuron = NeuronPicker(layer)                              # its range follows the picked layer
>>> def render(fig, layer, neuron, sparsity, signed):
...     ax = fig.subplots()                                   # fig is empty, and the same one every time
...     ax.imshow(response(layer, neuron, sparsity, signed))
>>> explore(render, layer=layer, neuron=neuron, sparsity=SparsitySlider(), signed=False)

What a control may be (:func:`explore` has the details):

===========================  ==========================================================
``LayerPicker`` and so on    the picker, or any other ipywidget that has a ``value``
``(0, 10)`` ``(0, 1, 0.1)``  a slider from, to, in steps of; a fourth number is where it starts
``["a", "b"]``               a menu, as is any row of values; ``{"label": value}`` gives them names of their own;
                             up to five short options are buttons
``True``  ``"text"``         a tick box; a line of text
anything else                passed on to ``render`` as it is
===========================  ==========================================================

``selfcheck()``, in a notebook's last cell, moves every control of every explorer and fails where one does nothing or
``render`` raises.
"""

from __future__ import annotations

from nbkit.widgets._explorer import Explorer, explore
from nbkit.widgets._pickers import LayerPicker, NeuronPicker, SparsitySlider
from nbkit.widgets._selfcheck import selfcheck

__all__ = ["Explorer", "LayerPicker", "NeuronPicker", "SparsitySlider", "explore", "selfcheck"]
