"""What in the input made the model say so: attributions by gradients, maps, propagation, covering and attention.

Every method is ``method(model, inputs, target=None, *, ...)`` with ``inputs`` a tensor ``[N, ...]`` or a dict passed
as keyword arguments, and ``target`` ``None`` (the class each example is given), an int, ints ``[N]``, or a callable on
the model's output that returns ``[N]`` scores. The score of a class is its logit, before the softmax. A callable must
treat every row alike, since methods run many altered copies of the examples through it.

=============================  ===========================================================  ==================
method                         in a word                                                    returns
=============================  ===========================================================  ==================
:func:`saliency`               gradient                                                     like the inputs
:func:`input_x_gradient`       gradient times input                                         like the inputs
:func:`integrated_gradients`   mean gradient on the way from a baseline, complete           like the inputs
:func:`smooth_grad`            mean gradient over noisy copies                              like the inputs
:func:`guided_backprop`        gradient, positive at every ReLU                             like the inputs
:func:`layer_relevance`        the score handed back layer by layer (LRP)                   like the inputs or layer
:func:`grad_cam`               feature maps weighted by their mean gradient                 ``[N, h, w]``
:func:`grad_cam_plus_plus`     the same, every place of evidence counting alike             ``[N, h, w]``
:func:`guided_grad_cam`        guided backpropagation times Grad-CAM                        like the inputs
:func:`occlusion`              fall of the score when a window is covered                   like the inputs
:func:`rise`                   mean of random masks, weighted by the score                  ``[N, H, W]``
:func:`attention_rollout`      attention of all layers multiplied                           ``[N, T, T]``
=============================  ===========================================================  ==================

:func:`attention_probabilities` hands out what the rollout multiplies: a tensor ``[N, heads, T, T]`` a layer.

Results are plain tensors on the CPU. Nothing of the model changes: mode, hooks, parameters and their ``.grad``.
"""

from __future__ import annotations

from nbkit.attribution._attention import attention_probabilities, attention_rollout
from nbkit.attribution._cam import grad_cam, grad_cam_plus_plus, guided_grad_cam, normalize, upsample
from nbkit.attribution._gradients import input_x_gradient, integrated_gradients, saliency, smooth_grad
from nbkit.attribution._guided import guided_backprop
from nbkit.attribution._perturbation import occlusion, rise
from nbkit.attribution._relevance import layer_relevance

__all__ = [
    "attention_probabilities", "attention_rollout", "grad_cam", "grad_cam_plus_plus", "guided_backprop",
    "guided_grad_cam", "input_x_gradient", "integrated_gradients", "layer_relevance", "normalize", "occlusion", "rise",
    "saliency", "smooth_grad", "upsample",
]  # fmt: skip
