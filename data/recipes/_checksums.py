"""Bring the sizes and checksums in data/README.md up to date with the files; name files that have no row.

    python data/recipes/_checksums.py

Rows of the networks of train_checkpoints.py are written anew from the facts in the files.
"""

from __future__ import annotations

import hashlib
import json
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


def trained(file: str) -> str | None:
    """The row of a network of train_checkpoints.py, up to its size; None for any other file."""
    if not file.endswith(".safetensors"):
        return None
    data = (DATA / file).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    stored = header.get("__metadata__", {})
    if stored.get("recipe") != '"data/recipes/train_checkpoints.py"':
        return None
    facts = {k: json.loads(v) for k, v in stored.items()}
    how = f"{facts['steps']:,} steps of {facts['settings']['batch']}, AdamW, lr {facts['settings']['lr']:g}"
    right = f"{facts['test_accuracy']:.2%} of {facts['test_examples']:,}"
    if facts["dataset"] == "fashion-mnist":
        right += f" ({facts['shipped_test_accuracy']:.2%} of the shipped 2,000)"
    on = f"{facts['dataset']}, {facts['train_examples']:,}"
    return f"| `{file}` | {on} | {how} | {right} | {facts['seconds']} s | 0 kB | `{'0' * 64}` |"


def main() -> int:
    readme = DATA / "README.md"
    lines = readme.read_text(encoding="utf-8").split("\n")
    networks = [row for file in shipped() if (row := trained(file))]
    if networks:
        first = next(i for i, line in enumerate(lines) if line.startswith("| file | trained on |")) + 2
        last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
        known = {row.split(" |")[0] for row in networks}
        others = [line for line in lines[first:last] if line.split(" |")[0] not in known]
        lines[first:last] = networks + others
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
