"""Writing a file so that it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` beside ``path`` and rename it into place; a file that was there keeps its permissions.

    An interrupt or a full disk leaves what was there before. Raises: FileNotFoundError where the folder is missing.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        part.write_bytes(data)
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
