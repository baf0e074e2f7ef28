"""From a file, a library's bundle or a fetched wheel to the dataclasses of ``_types``."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import zipfile
from importlib.util import find_spec
from pathlib import Path

from nbkit._paths import data_dir
from nbkit.datasets._catalogue import CATALOGUE, FOOLBOX, LEE_50, LEE_SIMILARITY
from nbkit.datasets._texts import Dictionary, Retrieval
from nbkit.datasets._types import About, Dataset, Pictures, Recordings, Table, Tensors, Texts


def shipped(file: str, sha256: str) -> bytes:
    """The bytes of a file under data/sets.

    Raises: FileNotFoundError, or OSError where the bytes are not the ones that were committed.
    """
    path = data_dir() / "sets" / file
    if not path.is_file():
        raise FileNotFoundError(f"data/sets/{file} is missing; data/README.md says how to rebuild it")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise OSError(f"data/sets/{file} is damaged: SHA-256 {found[:12]}..., expected {sha256[:12]}...; "
                      "restore it from the repository or rebuild it (data/README.md)")  # fmt: skip
    return data


def arrays(about: About, path: Path | None = None) -> Tensors:
    """An .npz, the shipped one or that at ``path``, with x_train, y_train, x_test, y_test.

    x: uint8 images [N, H, W] or float series [N, C, T].
    """
    import numpy as np
    import torch

    with np.load(path or io.BytesIO(shipped(about.file, about.sha256)), allow_pickle=False) as npz:
        x = torch.from_numpy(np.concatenate([npz["x_train"], npz["x_test"]]))
        y = torch.from_numpy(np.concatenate([npz["y_train"], npz["y_test"]]).astype(np.int64))
        n_train = len(npz["y_train"])
    if x.dtype == torch.uint8:
        x = x[:, None].float().div_(255)
    return Tensors(about, x, y, about.classes, n_train)


def textile(about: About) -> Tensors:
    from nbkit import weights

    return arrays(about, weights.fetch("textile") / "textile.npz")


def rest_fmri(about: About) -> Recordings:
    import numpy as np
    import torch

    from nbkit import weights

    with np.load(weights.fetch("rest-fmri") / "rest-fmri.npz", allow_pickle=False) as npz:
        series, fibres, lengths = (torch.from_numpy(npz[part]) for part in ("series", "fibres", "lengths"))
        return Recordings(about, series, fibres, lengths, tuple(map(str, npz["regions"])), interval=0.72)


def digits(about: About) -> Tensors:
    import numpy as np
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    train, test = train_test_split(
        np.arange(len(bunch.target)), test_size=360, stratify=bunch.target, random_state=0
    )
    order = np.concatenate([np.sort(train), np.sort(test)])
    x = torch.from_numpy(bunch.images[order]).float()[:, None] / 16
    return Tensors(about, x, torch.from_numpy(bunch.target[order]).long(), about.classes, len(train))


def sklearn_table(about: About) -> Table:
    import sklearn.datasets

    load = getattr(sklearn.datasets, f"load_{about.name.replace('-', '_')}")
    bunch = load(as_frame=True)
    return Table(about, bunch.data, bunch.target, about.classes, None, bunch.frame)


def _table(about: About, X, target, frame, groups=None) -> Table:
    """``target``: class names, turned into integers."""
    y = target.map({c: i for i, c in enumerate(about.classes)}).astype("int64").rename("target")
    return Table(about, X, y, about.classes, groups, frame)


def _read_csv(about: About, **options):
    import pandas as pd

    data = shipped(about.file, about.sha256)
    return pd.read_csv(io.BytesIO(gzip.decompress(data) if about.file.endswith(".gz") else data), **options)


def oasis2(about: About) -> Table:
    frame = _read_csv(about)
    X = frame[["Age", "EDUC", "SES", "MMSE", "eTIV", "nWBV", "ASF"]].copy()
    X.insert(1, "Male", (frame["Gender"] == "M").astype("int64"))
    return _table(about, X, frame["Group"], frame, frame["Subject.ID"].rename("subject"))


def csf_biomarkers(about: About) -> Table:
    frame = _read_csv(about)
    X = frame.drop(columns="Class").rename(columns={"Genotype": "APOE4"})
    X["APOE4"] = frame["Genotype"].str.count("E4")
    return _table(about, X, frame["Class"], frame)


_VOICE = [
    "MDVP:Fo(Hz)", "MDVP:Fhi(Hz)", "MDVP:Flo(Hz)", "MDVP:Jitter(%)", "MDVP:Jitter(Abs)", "MDVP:RAP", "MDVP:PPQ",
    "Jitter:DDP", "MDVP:Shimmer", "MDVP:Shimmer(dB)", "Shimmer:APQ3", "Shimmer:APQ5", "MDVP:APQ", "Shimmer:DDA",
    "NHR", "HNR", "RPDE", "DFA", "spread1", "spread2", "D2", "PPE",
]  # fmt: skip


def parkinson_voice(about: About) -> Table:
    frame = _read_csv(about).rename(columns={f"X{i}": name for i, name in enumerate(_VOICE, 1)})
    target = frame["Type"].map(dict(enumerate(about.classes)))
    return _table(about, frame[_VOICE], target, frame, frame["subject"])


def parkinson_speech(about: About) -> Table:
    frame = _read_csv(about)
    return _table(about, frame.drop(columns="class"), frame["class"], frame)


def sleep_stages(about: About) -> Table:
    """The source sorts a night by clock time, midnight first; here the evening comes first, as it was slept."""
    import pandas as pd

    frame = _read_csv(about)
    seconds = pd.to_timedelta(frame["Time"]).dt.total_seconds().astype("int64")
    frame["clock"] = seconds.where(seconds < 12 * 3600, seconds - 24 * 3600) / 3600
    frame = frame.sort_values(["Series", "clock"], ignore_index=True)

    night, clock = frame["Series"], frame.pop("clock")
    y = frame["Value"].map({c: i for i, c in enumerate(about.classes)})
    hours = clock - clock.groupby(night).transform("first")
    previous = y.groupby(night).shift()
    began = hours.where(y != previous).ffill()
    second = (clock * 3600).round().astype("int64") % 30
    X = pd.DataFrame({
        "hours": hours,
        "clock": clock,
        "previous": previous,
        "minutes": 60 * (hours - began.groupby(night).shift()),
        "epoch": (second == second.groupby(night).transform(lambda s: s.mode()[0])).astype("int64"),
    })  # fmt: skip
    return _table(about, X, frame["Value"], frame, night.replace(51, 50).rename("night"))


def keel(about: About) -> Table:
    """No header; the last column is the class, numbered from 0 or (movement-libras) from 1."""
    frame = _read_csv(about, header=None)
    frame.columns = [f"f{i}" for i in range(frame.shape[1] - 1)] + ["class"]
    y = frame["class"] - (1 if about.name == "movement-libras" else 0)
    return Table(about, frame.drop(columns="class"), y.rename("target"), about.classes, None, frame)


def lee(about: About) -> Texts:
    def lines(file: str, sha256: str) -> tuple[str, ...]:
        return tuple(gzip.decompress(shipped(file, sha256)).decode("latin-1").strip().split("\n"))

    return Texts(about, lines(about.file, about.sha256), lines(*LEE_50), _similarity())


def _similarity():
    """[50, 50], symmetric; the file leaves what is below the diagonal 0."""
    import numpy as np

    upper = np.loadtxt(io.BytesIO(shipped(*LEE_SIMILARITY)), delimiter="\t")
    return np.triu(upper) + np.triu(upper, 1).T


def _records(about: About) -> list[dict]:
    return [json.loads(line) for line in lzma.decompress(shipped(about.file, about.sha256)).splitlines()]


def manpages(about: About) -> Retrieval:
    pages = _records(about)
    return Retrieval(
        about,
        documents={p["id"]: p["text"] for p in pages},
        queries={p["id"]: p["query"] for p in pages},
        relevance={p["id"]: {p["id"]: 2} | dict.fromkeys(p["related"], 1) for p in pages},
        licences={p["id"]: p["licence"] for p in pages},
    )


def wordnet(about: About) -> Dictionary:
    synsets = _records(about)
    return Dictionary(
        about,
        words=tuple(tuple(s["words"]) for s in synsets),
        definitions=tuple(s["definition"] for s in synsets),
        examples=tuple(tuple(s["examples"]) for s in synsets),
        parts=tuple(s["part"] for s in synsets),
        topics=tuple(s["topic"] for s in synsets),
    )


# File and licence as the two libraries state it (skimage.data docstrings, sklearn/datasets/images/README.txt).
_PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png", "public domain (NASA)"),
    "chelsea": ("skimage", "data/chelsea.png", "CC0 (Stefan van der Walt)"),
    "coffee": ("skimage", "data/coffee.png", "CC0 (Rachel Michetti)"),
    "rocket": ("skimage", "data/rocket.jpg", "public domain (SpaceX)"),
    "camera": ("skimage", "data/camera.png", "CC0 (Lav Varshney)"),
    "coins": ("skimage", "data/coins.png", "no known copyright restrictions (Brooklyn Museum)"),
    "ihc": ("skimage", "data/ihc.png", "no known copyright restrictions"),
    "retina": ("skimage", "data/retina.jpg", "CC0 (Häggström, Medical gallery)"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg", "public domain (NASA)"),
    "china": ("sklearn", "datasets/images/china.jpg", "CC BY 2.0 (danielbuechele)"),
    "flower": ("sklearn", "datasets/images/flower.jpg", "CC BY 2.0 (vultilion)"),
}


def _rgb(source):
    import numpy as np
    from PIL import Image

    with Image.open(source) as picture:
        return np.array(picture.convert("RGB"))


def photos(about: About) -> Pictures:
    images = {}
    for name, (library, file, _) in _PHOTOS.items():
        spec = find_spec(library)
        if spec is None:
            raise ImportError(f"the picture {name!r} comes with {library}, which is not installed")
        images[name] = _rgb(Path(spec.origin).parent / file)
    return Pictures(about, images, {name: licence for name, (*_, licence) in _PHOTOS.items()})


def _foolbox(prefix: str) -> list[tuple[str, int, io.BytesIO]]:
    """(file stem, class index, bytes) of the wheel's samples; a file is named ``<prefix>_<number>_<class>.<ext>``."""
    from nbkit import weights

    with zipfile.ZipFile(weights.wheel(FOOLBOX.package, FOOLBOX.version, FOOLBOX.sha256)) as wheel:
        names = sorted(n for n in wheel.namelist() if n.startswith(f"foolbox/data/{prefix}_"))
        return [(Path(n).stem, int(Path(n).stem.rsplit("_", 1)[1]), io.BytesIO(wheel.read(n))) for n in names]


_IMAGENET_LABELS = {
    22: "bald eagle", 99: "goose", 129: "spoonbill", 251: "dalmatian", 243: "bull mastiff", 305: "dung beetle",
    317: "leafhopper", 438: "beaker", 455: "bottlecap", 471: "cannon", 541: "drum", 559: "folding chair", 609: "jeep",
    630: "loafer", 741: "prayer rug", 853: "thatch", 915: "yurt", 949: "strawberry", 990: "buckeye",
}  # fmt: skip


def imagenet_sample(about: About) -> Pictures:
    import torch

    samples = _foolbox("imagenet")
    y = torch.tensor([c for _, c, _ in samples])
    images = {stem.removeprefix("imagenet_"): _rgb(data) for stem, _, data in samples}
    licences = dict.fromkeys(images, about.licence)
    return Pictures(about, images, licences, y, tuple(_IMAGENET_LABELS[int(c)] for c in y))


def cifar_sample(about: About) -> Tensors:
    import numpy as np
    import torch

    samples = _foolbox("cifar10")
    x = torch.from_numpy(np.stack([_rgb(data) for *_, data in samples])).permute(0, 3, 1, 2).float().div(255)
    return Tensors(about, x.contiguous(), torch.tensor([c for _, c, _ in samples]), about.classes)


LOADERS = {
    "digits": digits,
    "iris": sklearn_table, "wine": sklearn_table, "breast-cancer": sklearn_table, "diabetes": sklearn_table,
    "mnist": arrays, "fashion-mnist": arrays, "textile": textile, "basic-motions": arrays,
    "photos": photos, "imagenet-sample": imagenet_sample, "cifar-sample": cifar_sample,
    "oasis2": oasis2, "csf-biomarkers": csf_biomarkers,
    "parkinson-voice": parkinson_voice, "parkinson-speech": parkinson_speech,
    "sleep-stages": sleep_stages, "rest-fmri": rest_fmri,
    "movement-libras": keel, "spambase": keel, "optdigits": keel,
    "lee": lee, "manpages": manpages, "wordnet": wordnet,
}  # fmt: skip


def load(name: str) -> Dataset:
    return LOADERS[name](CATALOGUE[name])
