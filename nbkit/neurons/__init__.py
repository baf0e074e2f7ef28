"""What single neurons, and paths of neurons, contribute to a model's output.

>>> activation(model, x, layer="blocks.3.mlp.act", positions=0)         # [N, K] what each neuron puts out
>>> gradient_x_activation(model, x, layer="blocks.3.mlp.act")           # [N, K] first-order share of the score
>>> conductance(model, x, layer="blocks.3.mlp.act")                     # [N, K] share, integrated from a baseline
>>> ablation_effect(model, x, layer="blocks.3.mlp.act")                 # [N, K] change of the score without it
>>> neuron_path(model, x, labels, layers="blocks.*.mlp.act").path       # [N, L] an influential unit in each layer
>>> joint_attribution(model, x, path, labels, layers="blocks.*.mlp.act")  # [N] the score of any such set
>>> input_gradients(model, x, layer="blocks.3.mlp.act")                 # [N, K, ...] what each neuron looks for

A neuron is an entry of a layer's *output* along its neuron axis (``nbkit.hooks``). For a transformer's MLP name the
activation function between the two linear layers. Models run in evaluation mode and come back as they were.
"""

from __future__ import annotations

from nbkit.neurons._ablation import ablation_effect
from nbkit.neurons._basic import activation, conductance, gradient, gradient_x_activation
from nbkit.neurons._inputs import input_gradients
from nbkit.neurons._path import NeuronPath, joint_attribution, neuron_path

__all__ = [
    "NeuronPath", "ablation_effect", "activation", "conductance", "gradient", "gradient_x_activation",
    "input_gradients", "joint_attribution", "neuron_path",
]  # fmt: skip
