"""lee.txt.gz, lee-50.txt.gz and lee-50-similarity.txt: 300 and 50 short news texts, one a line, and how alike people
found every two of the 50 (from 0 to 1; what lies below the diagonal is 0), from pip gensim 4.4.0.

gensim's wheels differ by platform and Python; the recipe takes the Linux x86-64 one for Python 3.11 and runs there. The
three files are the same in all of them.
"""

from __future__ import annotations

from pathlib import Path

from nbkit.recipes import from_wheel, run, write_bytes

SHA256 = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
FILES = {
    "lee.txt.gz": "lee_background.cor",
    "lee-50.txt.gz": "lee.cor",
    "lee-50-similarity.txt": "similarities0-1.txt",
}


def build(out: Path) -> list[Path]:
    members = [f"gensim/test/test_data/{f}" for f in FILES.values()]
    for name, data in zip(FILES, from_wheel("gensim", "4.4.0", SHA256, *members), strict=True):
        write_bytes(out / name, data)
    return [out / name for name in FILES]


if __name__ == "__main__":
    run(build, __doc__)
