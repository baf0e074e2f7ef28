"""Models by name: four that others trained, fetched once, and the small networks that this kit trained itself.

>>> from nbkit import models
>>> model = models.load("efficientnet-lite0")                     # doctest: +SKIP
>>> x = models.transform("efficientnet-lite0")(picture)[None]     # doctest: +SKIP
>>> models.labels("efficientnet-lite0")[model(x).argmax()]        # doctest: +SKIP

``load`` returns the ``nn.Module`` itself, in evaluation mode; what belongs beside it has its own function:
``transform`` for pictures, ``tokenizer`` for text, ``labels`` for class names. Every method of the kit takes any other
module too.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from nbkit.errors import UnknownName, did_you_mean
from nbkit.models import _pretrained, _trained
from nbkit.models._about import About, of_pretrained, of_trained
from nbkit.models._checkpoints import load_checkpoint, save_checkpoint
from nbkit.models._images import ImageTransform
from nbkit.models._pretrained import PRETRAINED
from nbkit.models._trained import Checkpoint, checkpoints
from nbkit.models.zoo import ARCHITECTURES, build

__all__ = [
    "About", "Checkpoint", "ImageTransform", "about", "architectures", "build", "checkpoints", "labels", "load",
    "load_checkpoint", "mean_pool", "names", "save_checkpoint", "tokenizer", "transform",
]  # fmt: skip


def names() -> list[str]:
    """The names ``load`` takes: the pretrained models, then the architectures with a checkpoint in this kit."""
    return [*PRETRAINED, *dict.fromkeys(c.name for c in checkpoints())]


def architectures() -> list[str]:
    """The names ``build`` takes: the small networks of this kit, freshly initialised."""
    return list(ARCHITECTURES)


def about(name: str, **options: Any) -> About:
    """Task, licence, source, input and size of a model, and the figures of its training where the kit trained it.

    ``options`` as for ``load`` (``seed``, ``dataset``, ``variant``). Loads no weights and fetches nothing.

    Raises: UnknownName.

    >>> models.about("dinov2-small").licence                      # doctest: +SKIP
    """
    _known(name)
    if name in PRETRAINED:
        return of_pretrained(name, PRETRAINED[name])
    return of_trained(checkpoints(name), _trained.choose(name, **options))


def load(name: str, **options: Any) -> nn.Module:
    """A model in evaluation mode, in float32 on the CPU, every parameter with ``requires_grad`` as torch sets it.

    A pretrained model is fetched and converted on first use (``nbkit.weights``). Options: ``attn_implementation``
    (``"sdpa"``, or ``"eager"`` for models asked for attention maps) for the transformers; ``seed``, ``dataset`` and
    ``variant`` for the networks trained here.

    Raises: UnknownName, TypeError (an option it does not have), DownloadError.

    >>> models.load("tiny-vit", seed=1)                           # doctest: +SKIP
    """
    _known(name)
    loader = PRETRAINED[name].load if name in PRETRAINED else _trained.load
    allowed = [p for p in inspect.signature(loader).parameters if p != "name"]
    for option in options:
        if option not in allowed:
            raise TypeError(f"{name} takes no option {option!r}{did_you_mean(option, allowed)}")
    return loader(**options) if name in PRETRAINED else loader(name, **options)


def transform(name: str, *, size: int | None = None, resize: int | None = None) -> ImageTransform:
    """What turns pictures into the input of a model of pictures: see :class:`ImageTransform`.

    ``size`` is the side of the input (default: the model's, 224), ``resize`` what the shorter side of the picture
    becomes before the middle is cut out (default: size * 256 / 224; ``resize=size`` cuts off nothing of a square).

    Raises: UnknownName for a model that takes no such pictures.

    >>> models.transform("dinov2-small", size=112)([picture, picture]).shape     # doctest: +SKIP
    torch.Size([2, 3, 112, 112])
    """
    _known(name)
    if name not in PRETRAINED or PRETRAINED[name].size is None:
        raise UnknownName(f"{name} has no transform; it takes {about(name).input}")
    if name == "dinov2-small" and size is not None and size % 14:
        raise ValueError(
            f"size must be a multiple of the patch, 14, not {size}; {max(1, round(size / 14)) * 14} is"
        )
    return PRETRAINED[name].transform(size, resize)


def tokenizer(name: str):
    """The tokenizer of a language model, a ``transformers.PreTrainedTokenizerFast``.

    Raises: UnknownName for a model without one; DownloadError.

    >>> models.tokenizer("smollm2")(["Hello"], return_tensors="pt")              # doctest: +SKIP
    """
    _known(name)
    if name in PRETRAINED and PRETRAINED[name].tokenizer:
        return _pretrained.tokenizer(name)
    if name not in PRETRAINED and (path := _trained.vocabulary(name)):
        return _trained.tokenizer(path)
    raise UnknownName(f"{name} has no tokenizer; it takes {about(name).input}")


def labels(name: str, **options: Any) -> list[str]:
    """The names of a model's classes, in order; ``options`` as for ``load``. Raises: UnknownName where it has none.

    >>> models.labels("efficientnet-lite0")[281]                  # doctest: +SKIP
    'tabby'
    """
    _known(name)
    if name == "efficientnet-lite0":
        from nbkit._paths import data_dir

        return (data_dir() / "sets" / "imagenet-labels.txt").read_text(encoding="utf-8").splitlines()
    if name not in PRETRAINED:
        facts = _trained.choose(name, **options).facts
        if "classes" in facts:
            return list(facts["classes"])
        if "task" in facts:
            raise UnknownName(f"{name} has no classes; its task is {facts['task']}")
        raise UnknownName(
            f"the classes of {name} are those of datasets.about({facts.get('dataset')!r}).classes"
        )
    raise UnknownName(f"{name} has no classes; its task is {PRETRAINED[name].task}")


def mean_pool(output: Any, attention_mask: Tensor) -> Tensor:
    """Sentence embeddings ``[N, D]``: the mean of a text encoder's ``last_hidden_state`` over the tokens in the mask.

    ``output`` is the encoder's output, or its hidden states ``[N, T, D]``; ``attention_mask`` is ``[N, T]``.

    Raises: ValueError where the shapes disagree or a text has no token.
    """
    hidden = getattr(output, "last_hidden_state", output)
    if hidden.ndim != 3 or attention_mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"hidden states {list(hidden.shape)} need a mask [N, T], not {list(attention_mask.shape)}"
        )
    mask = attention_mask.to(hidden.dtype).unsqueeze(-1)
    counts = mask.sum(1)
    if bool((counts == 0).any()):
        raise ValueError("a text has no token in its mask")
    return (hidden * mask).sum(1) / counts


def _known(name: str) -> None:
    if name not in (there := names()):
        raise UnknownName(f"no model {name!r}{did_you_mean(str(name), there)}")
