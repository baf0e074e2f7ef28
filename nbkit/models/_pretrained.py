"""The models that other people trained: what each is, and how it is loaded from its converted folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nbkit import weights
from nbkit.models._efficientnet import EfficientNetLite0
from nbkit.models._images import ImageTransform


@dataclass(frozen=True)
class Pretrained:
    """One model: facts for :func:`nbkit.models.about`, how to load it, what to feed it."""

    title: str
    task: str
    input: str
    parameters: int
    load: Callable[..., nn.Module]
    notes: str
    size: int | None = None
    """Side of the square input, for a model of pictures."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    tokenizer: bool = False

    def transform(self, size: int | None, resize: int | None) -> ImageTransform:
        size = self.size if size is None else size
        # 224 out of 256: the share of the picture that ImageNet models are evaluated on.
        return ImageTransform(
            size, round(size * 256 / 224) if resize is None else resize, self.mean, self.std
        )


def efficientnet_lite0() -> nn.Module:
    from safetensors.torch import load_file

    folder = weights.fetch("efficientnet-lite0")
    with torch.random.fork_rng(devices=[]):  # building draws initial weights, which are then replaced
        model = EfficientNetLite0()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def dinov2_small(*, attn_implementation: str = "sdpa") -> nn.Module:
    from transformers import Dinov2Model

    return _from_folder(Dinov2Model, "dinov2-small", attn_implementation)


def smollm2(*, attn_implementation: str = "sdpa") -> nn.Module:
    from transformers import LlamaForCausalLM

    return _from_folder(LlamaForCausalLM, "smollm2", attn_implementation)


def minilm(*, attn_implementation: str = "sdpa") -> nn.Module:
    from transformers import BertModel

    return _from_folder(BertModel, "minilm", attn_implementation)


def tokenizer(name: str):
    """The tokenizer (``transformers.PreTrainedTokenizerFast``) in a model's folder."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(weights.fetch(name), local_files_only=True)


def _from_folder(kind: type, name: str, attn_implementation: str) -> nn.Module:
    if attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation must be 'sdpa' or 'eager' (which also returns attention maps), not "
            f"{attn_implementation!r}"
        )
    folder: Path = weights.fetch(name)
    with quiet(), torch.random.fork_rng(devices=[]):
        model = kind.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attn_implementation, local_files_only=True
        )
    return model.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and notices that transformers would leave in a notebook; its settings come back."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


_PICTURE = "RGB pictures [N, 3, 224, 224] from models.transform({name!r})"
_TOKENS = "input_ids and attention_mask [N, T] from models.tokenizer({name!r})"

PRETRAINED: dict[str, Pretrained] = {
    "efficientnet-lite0": Pretrained(
        "EfficientNet-Lite0", "ImageNet classification, 1000 classes: logits [N, 1000]", _PICTURE, 4_652_008,
        efficientnet_lite0,
        "Last convolution: _conv_head; its maps after BatchNorm and ReLU6: _act_head, [N, 1280, 7, 7]. Blocks: "
        "_blocks.0 to _blocks.15. Every operation but the skip additions is a module of its own.",
        224, (0.498,) * 3, (0.502,) * 3,
    ),
    "dinov2-small": Pretrained(
        "DINOv2-based ViT-S/14", "image features: last_hidden_state [N, 1 + patches, 384], class token first",
        "RGB pictures [N, 3, s, s], s a multiple of 14, from models.transform('dinov2-small', size=s)", 22_056_192,
        dinov2_small,
        "Backbone of a published saliency model; whether its authors fine-tuned it is not known. No class head: fit a "
        "probe. Position embeddings are interpolated from 37 x 37. attn_implementation='eager' gives attention maps.",
        224,
    ),
    "minilm": Pretrained(
        "all-MiniLM-L6-v2", "sentence embeddings [N, 384]: models.mean_pool(output, attention_mask)", _TOKENS,
        22_713_216, minilm, "A BERT of 6 layers, width 384, up to 256 tokens.", tokenizer=True,
    ),
    "smollm2": Pretrained(
        "SmolLM2-135M-Instruct", "next-token logits [N, T, 49152]", _TOKENS, 134_515_008, smollm2,
        "Llama architecture: 30 layers, width 576, 9 query and 3 key-value heads. The weights were published in 4 bits "
        "(Q4_1) and are expanded to float32: 538 MB in the cache.", tokenizer=True,
    ),
}  # fmt: skip
