"""manpages.jsonl.xz and manpages-licences.txt: manual pages of Linux, from apt manpages and manpages-dev 6.03-2.

A record is a page: id, query (its one-line description), text (without NAME, SEE ALSO and COLOPHON), related (the pages
its SEE ALSO names that are in the collection) and licence (the comments at its head, which hold copyright, licence and
history). Another name of a page (a symbolic link, or a file that only says .so) is not a page; where a SEE ALSO uses
one, the page it leads to is meant.
"""

from __future__ import annotations

import gzip
import posixpath
import re
from pathlib import Path

from nbkit.recipes import from_deb, load, run, write_bytes, write_records

sections = load("sets/_roff.py").sections

VERSION = "6.03-2"
PACKAGES = {
    "manpages": "efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91",
    "manpages-dev": "96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838",
}
LICENCES = "usr/share/doc/manpages/copyright"
MAN = re.compile(r"usr/share/man/(man\d/(.+))\.gz")
LEFT_OUT = {"NAME", "SEE ALSO", "COLOPHON"}  # the query, the relevance, and the same words on every page
MENTION = re.compile(r"([\w.+:-]+)\s?\((\d\w*)\)")


def collect() -> tuple[dict[str, str], dict[str, str], bytes]:
    """Pages (id -> source), other names (id -> id; may lead to another one) and the text of the licences."""
    files: dict[str, bytes] = {}
    links: dict[str, str] = {}
    for package, sha in PACKAGES.items():
        more, more_links = from_deb(package, VERSION, sha)
        files |= more
        links |= more_links
    names = {MAN.fullmatch(k)[2]: posixpath.basename(v)[:-3] for k, v in links.items() if MAN.fullmatch(k)}
    pages = {}
    for path, data in files.items():
        if found := MAN.fullmatch(path):
            page = gzip.decompress(data).decode()
            if moved := re.match(r"\.so\s+(\S+)", page):
                names[found[2]] = posixpath.basename(moved[1])
            else:
                pages[found[2]] = page
    return pages, names, files[LICENCES]


def licence(page: str) -> str:
    """The comments before the title line, as they stand."""
    head = re.split(r"^\.TH ", page, maxsplit=1, flags=re.MULTILINE)[0]
    if "rst2man" in head:  # macros stand there; the notice follows the description
        head = page.split(".SH ")[1]
    lines = [m[1].rstrip() for m in re.finditer(r"^[.']\s*\\\"(.*)$", head, re.MULTILINE)]
    lines = [line for line in lines if line.strip() != "t"]  # not a comment: asks for the table preprocessor
    return "\n".join(lines).strip("\n") or "no notice in the page: see manpages-licences.txt"


def record(page: str, source: str, pages: dict[str, str], names: dict[str, str]) -> dict:
    parts = sections(source)
    query = parts["NAME"].replace("\n", " ").partition(" - ")[2]
    if not query:
        raise SystemExit(f"{page}: no description in its NAME section: {parts['NAME']!r}")
    related = []
    for name, section in MENTION.findall(parts.get("SEE ALSO", "")):
        # A page may call timespec(3) what is filed as timespec.3type.
        for other in (f"{name}.{section}{subsection}" for subsection in ("", "type", "const", "head")):
            while other in names:
                other = names[other]
            if other in pages and other != page and other not in related:
                related.append(other)
    text = "\n".join(f"{heading}\n{body}" for heading, body in parts.items() if heading not in LEFT_OUT)
    return {"id": page, "query": query, "text": text, "related": related, "licence": licence(source)}


def build(out: Path) -> list[Path]:
    pages, names, licences = collect()
    paths = [out / "manpages.jsonl.xz", out / "manpages-licences.txt"]
    write_records(paths[0], [record(page, pages[page], pages, names) for page in sorted(pages)])
    write_bytes(paths[1], licences)
    return paths


if __name__ == "__main__":
    run(build, __doc__)
