"""What a mask saves: multiply-adds by layer, measured on a forward pass, and a table of the model; what tokens cost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from numbers import Integral

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from nbkit import forward
from nbkit.errors import LayerDidNotRun
from nbkit.sparsity._masks import Masks
from nbkit.sparsity._weights import check_finite, is_product, n_outputs, prunable


def flops(model: nn.Module, inputs: forward.Inputs, *, masks: Masks | None = None):
    """Multiply-adds of one example in every linear and convolutional layer, counted by hooks on a forward pass.

    The first of ``inputs`` [N, ...] runs; :func:`prunable` says what is linear.
    A weight is used once at each position: of the output map, of the token sequence, or of the input map for a
    transposed convolution. So ``macs = weights * positions``. One multiply-add is two FLOPs in other counts. Biases,
    normalisations, activations and attention products are not counted; places in the padding are. The projections of
    an ``nn.MultiheadAttention`` have a row each, ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    Returns a DataFrame indexed by layer: ``type``, ``weights``, ``positions`` (summed over calls),
    ``macs``, and with ``masks`` also ``kept`` (weights; all of a layer without a mask) and ``macs_kept``.

    Raises: LayerDidNotRun (a masked layer), ValueError (other shapes), LayerNotFound, NotFinite.

    >>> flops(model, x)["macs"].sum()
    """
    import pandas as pd

    forward.check_inputs(inputs)
    forward.check_device(model, inputs)
    by_weight = {id(w): masks[name] for name, w in masks._weights(model).items()} if masks is not None else {}
    one = forward.take(inputs, slice(0, 1))  # what a layer does without examples (prompts, coordinates) counts whole
    products = _products(model)
    positions: dict[str, int] = {}
    with ExitStack() as stack:
        for row, (module, _, _) in products.items():
            hook = module.register_forward_hook(_count_positions(row, positions), with_kwargs=True)
            stack.callback(hook.remove)
        with forward.evaluating(model), torch.no_grad():
            forward.call(model, one)
    asleep = [row for row, (_, w, _) in products.items() if row not in positions and id(w) in by_weight]
    if asleep:
        raise LayerDidNotRun(f"layer {asleep[0]!r} has a mask but did not run in the forward pass")
    rows = {}
    for row in positions:
        module, weight, part = products[row]
        count, at = weight[part].numel(), positions[row]
        kept = int(torch.count_nonzero(by_weight[id(weight)][part])) if id(weight) in by_weight else count
        rows[row] = (type(module).__name__, count, at, count * at, kept, kept * at)
    columns = ["type", "weights", "positions", "macs", "kept", "macs_kept"]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("layer")
    return frame if masks is not None else frame.drop(columns=["kept", "macs_kept"])


def transformer_macs(
    tokens: int | Sequence[int],
    *,
    width: int,
    hidden: int,
    key_width: int | None = None,
    gated: bool = False,
) -> np.ndarray:
    """Multiply-adds of one example in each transformer block, the products of attention included.

    A block that ``T`` tokens enter costs ``2 T width (width + key_width)`` for its four projections, ``2 T^2 width``
    for queries times keys and weights times values, all heads together, and ``2 T width hidden`` for its two-layer
    MLP, or three times ``T width hidden`` for a gated one. Softmax, normalisations and biases are not counted, nor the
    half of the products that a causal mask makes needless. :func:`flops` counts the projections and the MLP of a model
    by hooks, without the term in ``T^2``.

    Args:
        tokens: how many enter each block, ``[blocks]``; an int is one block.
        width: of the residual stream. hidden: of the MLP.
        key_width: of all keys together, as of all values: key heads times the width of a head. Default ``width``.

    Returns: ints ``[blocks]``.

    Raises: TypeError (not whole numbers), ValueError (below 1; token counts that are not a list).

    >>> transformer_macs([50, 25, 25], width=64, hidden=256).sum()
    """
    count = np.atleast_1d(np.asarray(tokens))
    key_width = width if key_width is None else key_width
    for name, value in {"width": width, "hidden": hidden, "key_width": key_width}.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, not {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if count.size and count.dtype.kind not in "iu":
        raise TypeError(f"tokens must be whole numbers, not {count.dtype}")
    if count.ndim != 1 or not count.size or count.min() < 1:
        raise ValueError(f"tokens must be a list of counts of at least 1, not {tokens!r}")
    count = count.astype(np.int64)
    return 2 * count * width * (width + key_width) + 2 * count**2 * width + (2 + gated) * count * width * hidden


def _products(model: nn.Module) -> dict[str, tuple[nn.Module, Tensor, slice]]:
    """What multiplies with a weight: for each row of the table the module that is called, the weight, its rows used."""
    found: dict[str, tuple[nn.Module, Tensor, slice]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):  # no hook on its out_proj ever fires
            prefix, packed = f"{path}." if path else "", module.in_proj_weight
            for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
                whole = (getattr(module, f"{name}_weight"), slice(None))
                part = (packed, slice(i * module.embed_dim, (i + 1) * module.embed_dim))
                found[prefix + name] = (module, *(whole if packed is None else part))
            found[f"{prefix}out_proj"] = (module, module.out_proj.weight, slice(None))
        elif path not in found and is_product(module):
            found[path] = (module, module.weight, slice(None))
    return found


def _count_positions(row: str, positions: dict[str, int]):
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        if isinstance(module, nn.MultiheadAttention):
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            tokens = given[{"k_proj": "key", "v_proj": "value"}.get(row.rpartition(".")[2], "query")]
            count = tokens.numel() // tokens.shape[-1]
        elif isinstance(module, _ConvTransposeNd):
            count = args[0].numel() // module.in_channels
        else:
            count = output.numel() // n_outputs(module)
        positions[row] = positions.get(row, 0) + count

    return hook


def sparsity_report(model: nn.Module, example: forward.Inputs | None = None):
    """How sparse a model is now: weights that are exactly 0 in each prunable layer, and what that saves.

    Returns a DataFrame indexed by parameter, with a last row ``total``: ``shape``, ``weights``, ``nonzero``,
    ``density``, and with an ``example`` [N, ...] the multiply-adds of one example, ``macs`` and ``macs_kept`` (see
    :func:`flops`; 0 where a layer did not run).

    Raises: ValueError (nothing to prune), NotFinite.

    >>> sparsity_report(model, x)
    """
    import pandas as pd

    weights = prunable(model)
    check_finite(weights, "weight")
    masks = Masks({name: w.detach() != 0 for name, w in weights.items()})
    frame = masks.report().rename(columns={"kept": "nonzero"})
    total = {"shape": "", "weights": frame["weights"].sum(), "nonzero": frame["nonzero"].sum()}
    total["density"] = total["nonzero"] / total["weights"]
    if example is not None:
        table, products = flops(model, example), _products(model)
        uses: dict[int, int] = {}  # a weight that several layers share is used by each of them
        for row, places in table["positions"].items():
            uses[id(products[row][1])] = uses.get(id(products[row][1]), 0) + places
        positions = np.array([uses.get(id(weight), 0) for weight in weights.values()])
        for column, count in (("macs", "weights"), ("macs_kept", "nonzero")):
            frame[column] = frame[count] * positions
            total[column] = frame[column].sum()
    return pd.concat([frame, pd.DataFrame(total, index=pd.Index(["total"], name="parameter"))])
