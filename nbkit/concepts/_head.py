"""The part of a model after the layer, as a function of the codes."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from nbkit import forward
from nbkit.concepts._factorize import Factorization, decode


class _Decode(nn.Module):
    """Codes to activations."""

    def __init__(self, dictionary: Tensor, offset: Tensor | None):
        super().__init__()
        self.register_buffer("dictionary", dictionary)
        self.register_buffer("offset", offset)

    def forward(self, codes: Tensor) -> Tensor:
        return decode(codes, self.dictionary, self.offset)


def head_on_codes(
    head: nn.Module, dictionary: Tensor | Factorization, offset: Tensor | None = None
) -> nn.Sequential:
    """The module ``codes -> head(codes @ dictionary + offset)``: what the rest of a model says of codes.

    ``head`` maps the activations to logits: the part of the model after the layer. ``dictionary`` [k, P], or a
    Factorization, whose offset is then taken as well. Where ``head`` is a Sequential that begins with a linear layer or
    a convolution, dictionary and offset are folded into a copy of that layer: the same numbers from k channels in place
    of P, which is what makes thousands of passes cheap. (An offset is not folded into a convolution that pads: the
    margin it adds holds zeros, not the offset.) Everything else is shared with ``head``, which stays as it was.

    Raises: ValueError (a dictionary of other neurons than the first layer takes, an offset of another length),
    TypeError (a head that is no module), NotFinite.

    >>> logits = head_on_codes(model[8:], bank)             # logits(bank.codes) is model[8:](bank.decode(bank.codes))
    """
    if not isinstance(head, nn.Module):
        raise TypeError(f"head must be a module, not {type(head).__name__}; of a function, decode the codes before it")
    if isinstance(dictionary, Factorization):
        dictionary, offset = dictionary.dictionary, dictionary.offset
    forward.check_inputs(dictionary, name="dictionary")
    if dictionary.ndim != 2 or (offset is not None and offset.shape != dictionary.shape[1:]):
        shapes = f"{tuple(dictionary.shape)} and {None if offset is None else tuple(offset.shape)}"
        raise ValueError(f"dictionary must be [k, P] and offset [P] or None; their shapes are {shapes}")
    layers = list(head) if isinstance(head, nn.Sequential) else [head]
    folded = _folded(layers[0], dictionary, offset) if layers else None
    if folded is None:
        layers = [_placed(_Decode(dictionary.detach().clone(), offset), head).train(head.training), *layers]
    else:
        layers[0] = folded
    result = nn.Sequential(*layers)
    result.training = head.training  # a module of its own, whose parts keep their modes
    return result


def _folded(layer: nn.Module, dictionary: Tensor, offset: Tensor | None) -> nn.Module | None:
    """A copy of a layer that takes codes, or None where there is none."""
    convolution = isinstance(layer, (nn.Conv2d, nn.Conv3d)) and layer.groups == 1
    if not (convolution or type(layer) is nn.Linear):
        return None
    neurons = layer.weight.shape[1]
    if neurons != dictionary.shape[1]:
        raise ValueError(f"the dictionary has {dictionary.shape[1]} neurons, the head's first layer takes {neurons}")
    if convolution and offset is not None and layer.padding not in (0, (0,) * len(layer.kernel_size), "valid"):
        return None
    copy = deepcopy(layer)
    weight = layer.weight.detach()
    copy.weight = nn.Parameter(torch.einsum("op...,kp->ok...", weight, dictionary.to(weight)))
    if offset is not None:
        shift = weight.flatten(2).sum(2) @ offset.to(weight) if convolution else weight @ offset.to(weight)
        copy.bias = nn.Parameter(shift if layer.bias is None else layer.bias.detach() + shift)
    setattr(copy, "in_channels" if convolution else "in_features", len(dictionary))
    return copy


def _placed(module: nn.Module, like: nn.Module) -> nn.Module:
    """On the device and in the type of another one's parameters, where it has any."""
    parameter = next(like.parameters(), None)
    return module if parameter is None else module.to(parameter)
