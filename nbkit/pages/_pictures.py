"""``notebooks/pictures/<slug>.jpg``: the picture of the cell tagged ``main-picture``, small enough for a table."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path

from nbkit import _catalogue, _cells

TAG = "main-picture"
MAX_WIDTH, MAX_BYTES = 900, 60_000
_QUALITIES = (85, 75, 65, 55)


def changed(notebooks: Path) -> dict[Path, bytes]:
    """Path -> JPEG, of the papers whose main picture is another one than the file was made of.

    A file keeps the fingerprint of its source as its comment: the same picture may be packed into other bytes by
    another version of the library. Where no cell is tagged, the file that is there stays.
    """
    found = {}
    for paper in _catalogue.papers().values():
        source = main_picture(notebooks / paper.file) if (notebooks / paper.file).is_file() else None
        path = notebooks / "pictures" / f"{paper.slug}.jpg"
        if source and _comment(path) != fingerprint(source):
            found[path] = shrunk(source)
    return found


def main_picture(notebook: Path) -> bytes | None:
    """The picture that the tagged cell shows, None where no cell is tagged.

    Raises: ValueError where several are tagged, or the tagged one stores no picture.
    """
    tagged = _cells.numbered(notebook, TAG)
    if not tagged:
        return None
    if len(tagged) > 1:
        raise ValueError(f"{notebook.name}: cells {', '.join(str(n) for n, _ in tagged)} are all tagged {TAG}")
    number, cell = tagged[0]
    for output in cell.get("outputs", []):
        for kind in ("image/png", "image/jpeg"):
            if kind in output.get("data", {}):
                data = output["data"][kind]
                return base64.b64decode(data if isinstance(data, str) else "".join(data))
    raise ValueError(f"{notebook.name}, cell {number}: tagged {TAG}, but it stores no picture; run the notebook")


def fingerprint(source: bytes) -> str:
    return f"made of {hashlib.sha256(source).hexdigest()[:16]}"


def shrunk(source: bytes) -> bytes:
    """A JPEG of at most ``MAX_WIDTH`` pixels and ``MAX_BYTES`` bytes that remembers what it was made of."""
    from PIL import Image

    image = Image.open(io.BytesIO(source)).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    width = min(MAX_WIDTH, picture.width)
    while True:
        small = picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS)
        for quality in _QUALITIES:
            out = io.BytesIO()
            small.save(out, "jpeg", quality=quality, optimize=True, comment=fingerprint(source))
            if out.tell() <= MAX_BYTES:
                return out.getvalue()
        width = int(0.85 * width)


def _comment(path: Path) -> str | None:
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get("comment", b"").decode(errors="replace")
