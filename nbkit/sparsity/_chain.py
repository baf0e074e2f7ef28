"""Reading a model as a chain of layers, with ``torch.fx``; or saying why it is none."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from nbkit import forward

# Between two layers: what treats each channel by itself and turns 0 into 0, so that a removed channel stays silent.
_PASSES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Softsign,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_PASSING = {
    "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "tanhshrink",
    "hardtanh", "hardswish", "softsign", "dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous",
    *(f"{kind}{n}d" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool") for n in (1, 2, 3)),
}  # fmt: skip


@dataclass
class Layer:
    """A Linear or Conv layer of the chain, and the normalisations between it and the next."""

    name: str
    module: nn.Module
    norms: list[nn.Module] = field(default_factory=list)  # BatchNorms, and PReLUs with a slope a channel
    flattened: bool = False

    @property
    def units(self) -> int:
        return self.module.out_features if isinstance(self.module, nn.Linear) else self.module.out_channels

    @property
    def inputs(self) -> int:
        return self.module.in_features if isinstance(self.module, nn.Linear) else self.module.in_channels

    @property
    def depthwise(self) -> bool:
        m = self.module
        return isinstance(m, _ConvNd) and m.groups == m.in_channels == m.out_channels and m.groups > 1


def chain(model: nn.Module) -> list[Layer]:
    """The layers of a chain in the order they run. Raises: TypeError, saying what is no chain; ValueError (empty)."""
    nodes = _line(model)
    layers: list[Layer] = []
    # what stands after the last layer seen; it matters only if another layer follows
    unknown: str | None = None
    for node in nodes:
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, (nn.Linear, _ConvNd)):
            layer = Layer(node.target, module)
            _check_layer(layer, layers, unknown)
            layers.append(layer)
        elif layers and _channelwise_size(module) == layers[-1].units:
            layers[-1].norms.append(module)
        elif layers and _flattens(node, module):
            layers[-1].flattened = True
        elif layers and not _passes(node, module):
            unknown = unknown or _describe(node, module)
    if not layers:
        raise ValueError("no prunable layers: the model has no Linear or Conv layer")
    return layers


def _check_layer(layer: Layer, before: list[Layer], unknown: str | None) -> None:
    module = layer.module
    if any(module is other.module for other in before):
        raise TypeError(f"not a chain: layer {layer.name!r} runs twice")
    if isinstance(module, _ConvTransposeNd):
        raise TypeError(f"layer {layer.name!r}: transposed convolutions are not supported")
    if isinstance(module, _ConvNd) and module.groups > 1 and not layer.depthwise:
        raise TypeError(f"layer {layer.name!r}: grouped convolutions other than depthwise are not supported")
    if not before:
        return
    last = before[-1]
    if unknown:
        raise TypeError(
            f"not a plain chain: {unknown} between {last.name!r} and {layer.name!r}; allowed are BatchNorm, pooling, "
            "dropout, flatten and activations with f(0) = 0"
        )
    spread = layer.inputs % last.units or (layer.inputs != last.units and not last.flattened)
    if spread or (isinstance(last.module, nn.Linear) and layer.inputs != last.units):
        raise TypeError(f"not a plain chain: {layer.name!r} reads {layer.inputs} inputs from {last.units} channels")
    if isinstance(last.module, _ConvNd) and isinstance(module, nn.Linear) and not last.flattened:
        raise TypeError(f"not a plain chain: no flatten between the maps of {last.name!r} and {layer.name!r}")


def _line(model: nn.Module) -> list[fx.Node]:
    """The nodes of the model's graph, each of which reads the one before and nothing else."""
    try:
        with forward.evaluating(model):
            graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever the forward does with a symbolic value
        raise TypeError(f"not a chain that can be read: tracing {type(model).__name__} failed with {error}") from error
    line: list[fx.Node] = []
    sizes: set[fx.Node] = set()  # x.size(0) and the like: numbers, not a second path
    previous: fx.Node | None = None
    for node in graph.nodes:
        reads = [n for n in node.all_input_nodes if n not in sizes]
        if node.op == "placeholder":
            if previous is not None and node.users:
                raise TypeError("not a chain: the model takes more than one input")
            previous = previous or node
        elif node.op == "get_attr":
            raise TypeError(f"not a chain: the forward uses the tensor {node.target!r} directly")
        elif _asks_size(node) or (node.all_input_nodes and not reads):
            sizes.add(node)
        elif reads != [previous]:
            names = ", ".join(str(n) for n in reads)
            raise TypeError(f"not a chain: {node} reads {names or 'nothing'}, not only {previous}")
        elif node.op != "output":
            line.append(node)
            previous = node
    return line


def _asks_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _passes(node: fx.Node, module: nn.Module | None) -> bool:
    if module is None:
        return _name(node) in _PASSING
    if isinstance(module, nn.PReLU):
        return module.num_parameters == 1
    if isinstance(module, nn.Hardtanh):
        return module.min_val <= 0 <= module.max_val
    return isinstance(module, _PASSES)


def _channelwise_size(module: nn.Module | None) -> int | None:
    """The number of channels a module holds parameters for, if it treats each by itself."""
    if isinstance(module, _BatchNorm):
        return module.num_features
    return module.num_parameters if isinstance(module, nn.PReLU) and module.num_parameters > 1 else None


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether this turns [N, C, ...] into [N, C * places], or averages the places away."""
    if module is not None:
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    name, rest = _name(node), node.args[1:]
    if name == "flatten":
        start = node.kwargs.get("start_dim", rest[0] if rest else 0)
        return start == 1 and node.kwargs.get("end_dim", rest[1] if len(rest) > 1 else -1) == -1
    if name in ("view", "reshape"):
        shape = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        return len(shape) == 2
    if name == "mean":
        dims = node.kwargs.get("dim", rest[0] if rest else ())
        places = {(2,), (-1,), (2, 3), (-2, -1), (-1, -2), (3, 2), (2, 3, 4)}
        dims = tuple(dims) if isinstance(dims, (tuple, list)) else (dims,)
        return dims in places and len(rest) < 2 and not node.kwargs.get("keepdim")
    return False


def _describe(node: fx.Node, module: nn.Module | None) -> str:
    return f"{node.target} ({type(module).__name__})" if module is not None else f"{_name(node)}()"
