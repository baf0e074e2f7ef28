"""Bring the sizes and checksums in data/README.md up to date with the files; name files that have no row.

python data/recipes/_checksums.py
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parents[1]
SIZE, CHECKSUM = re.compile(r"\| [\d.]+ [kM]B \|"), re.compile(r"`[0-9a-f]{64}`")


def size(n: int) -> str:
    return f"{n / 1e6:.2f} MB" if n >= 1e5 else f"{n / 1e3:.1f} kB"


def shipped() -> list[str]:
    """Every file under data/ that came out of a recipe."""
    skip = {"recipes", "__pycache__", ".ipynb_checkpoints"}
    files = (p.relative_to(DATA) for p in DATA.rglob("*") if p.is_file())
    return sorted(f.as_posix() for f in files if not skip & set(f.parts) and f.name != "README.md")


def main() -> int:
    readme = DATA / "README.md"
    lines = readme.read_text(encoding="utf-8").split("\n")
    missing = []
    for file in shipped():
        row = next((i for i, line in enumerate(lines) if line.startswith(f"| `{file}` |")), None)
        if row is None:
            missing.append(file)
            continue
        data = (DATA / file).read_bytes()
        lines[row] = CHECKSUM.sub(f"`{hashlib.sha256(data).hexdigest()}`", lines[row])
        lines[row] = SIZE.sub(f"| {size(len(data))} |", lines[row])
    readme.write_text("\n".join(lines), encoding="utf-8")
    for file in missing:
        print(f"no row in data/README.md for {file}", file=sys.stderr)
    return bool(missing)


if __name__ == "__main__":
    raise SystemExit(main())
