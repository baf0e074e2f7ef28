"""The text of a manual page written with the man macros: what a reader sees, without the layout."""

from __future__ import annotations

import re

# Strings of groff, and those that a few pages define for themselves (cciss, hpsa, regex, tzfile, zic).
STRINGS = {
    "-": "-", "R": "®", "Tm": "™", "lq": '"', "rq": '"', "q": '"', "dg": "(!)",
    "<": "<", ">": ">", ":": "", "o": "7°26′22.50″",
}  # fmt: skip
CHARACTERS = {
    "aq": "'", "dq": '"', "lq": '"', "rq": '"', "oq": "'", "cq": "'", "ga": "`", "ha": "^", "ti": "~", "rs": "\\",
    "bu": "•", "em": "—", "en": "–", "mi": "−", "+-": "±", "mc": "µ", "de": "°", "fm": "′", "sd": "″", "dg": "(!)",
    "la": "⟨", "ra": "⟩", "sc": "§", "12": "½", "^o": "ô", "^a": "â", "`a": "à", "'a": "á", ":a": "ä", ":A": "Ä",
}  # fmt: skip
GLUE = "\0"  # what \c leaves: the next piece follows without a space
ESCAPE = re.compile(
    r"""\\(?: \*\[(?P<s1>[^]]*)\] | \*\((?P<s2>..) | \*(?P<s3>.)
          | \[(?P<c1>[^]]*)\] | \((?P<c2>..)
          | f(?:\[[^]]*\]|\(..|.) | s[-+]?\d | n(?:\[[^]]*\]|\(..|.)
          | [whv]'[^']*' | N'(?P<code>\d+)' | (?P<one>.) )""",
    re.VERBOSE,
)
ONE = {"e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "t": " ", "c": GLUE} | dict.fromkeys("&|^/,):%{}", "")

FONTS = set("B I R SM SB BR BI RB RI IR IB".split())
ALTERNATING = {"BR", "BI", "RB", "RI", "IR", "IB"}
BREAKS = set("PP P LP TP TQ HP IP RS RE sp br in nf fi EX EE SY YS INDENT UNINDENT".split())


def unescape(text: str) -> str:
    """Characters for escape sequences; fonts, sizes and widths go. KeyError for a character it does not know."""

    def character(m: re.Match) -> str:
        if string := m["s1"] or m["s2"] or m["s3"]:
            return STRINGS[string]
        if name := m["c1"] or m["c2"]:
            return CHARACTERS[name]
        if m["code"]:
            return chr(int(m["code"]))
        return ONE.get(m["one"], m["one"]) if m["one"] else ""

    return ESCAPE.sub(character, text)


def arguments(rest: str) -> list[str]:
    """Arguments of a macro: separated by spaces, those with spaces in double quotes, in which ``""`` stands for one."""
    found = re.findall(r'"((?:[^"]|"")*)(?:"|$)|((?:\\.|[^\s\\])+)', rest)
    return [quoted.replace('""', '"') or bare for quoted, bare in found]


def source_lines(page: str) -> list[str]:
    """Lines without comments and macro definitions; one that ends in a backslash is joined with the next."""
    lines, defining, open_line = [], False, ""
    for line in page.split("\n"):
        if re.match(r"[.']\s*\\\"", line):
            continue
        line = open_line + re.sub(r"(?<!\\)((?:\\\\)*)\\\".*", r"\1", line)
        open_line = ""
        if re.search(r"(?<!\\)(\\\\)*\\$", line):
            open_line = line[:-1]
        elif defining:
            defining = line.strip() != ".."
        elif re.match(r"\.\s*de1?\s", line):
            defining = True
        else:
            lines.append(line)
    return lines


class Paragraphs:
    """Collects pieces of text into paragraphs: filled ones, or as in program text one a line."""

    def __init__(self):
        self.done, self.open, self.filled = [], "", True

    def add(self, text: str) -> None:
        glued = self.open.endswith(GLUE)
        self.open = self.open[:-1] + text if glued else f"{self.open} {text}"
        if not self.filled and not self.open.endswith(GLUE):
            self.end()

    def end(self) -> None:
        text = " ".join(self.open.replace(GLUE, "").split())
        if text:
            self.done.append(text)
        self.open = ""


def table_rows(lines: list[str]) -> list[list[str]]:
    """The rows between .TS and .TE, each a list of lines of roff; the format and the rules drawn go."""
    rows, row, in_format, in_block = [], [], True, False
    tab = "\t"
    for line in lines:
        if in_format:
            if found := re.search(r"tab\s*\((.)\)", line):
                tab = found[1]
            in_format = not line.rstrip().endswith(".")
            continue
        if line.startswith(".T&"):
            in_format = True
        elif line.startswith((".", "'")):
            row.append(line)
        elif line.strip() not in {"_", "="}:
            if line.startswith("T}"):
                line, in_block = line[2:], False
            if line.endswith("T{"):
                line, in_block = line[:-2], True
            row += [cell for cell in line.split(tab) if cell.strip() not in {"", "_", "\\_", "\\^"}]
        if row and not in_block:
            rows.append(row)
            row = []
    return rows


def request(out: Paragraphs, name: str, rest: str) -> None:
    """Does what a line that begins with a dot asks for, as far as it shows in the text."""
    words = [unescape(a) for a in arguments(rest)]
    if name in FONTS:
        if words:
            out.add(("" if name in ALTERNATING else " ").join(words))
    elif name == "q":
        quoted, after, before = (*words, "", "")[:3]
        out.add(f'{before}"{quoted}"{after}')
    elif name == "UR":
        out.add(" ".join(words))
    elif name == "UE":
        out.open += "".join(words)
    elif name in BREAKS or name == "SS":
        out.end()
        if name in {"nf", "EX", "fi", "EE"}:
            out.filled = name in {"fi", "EE"}
        if name in {"SS", "SY"} or (name == "IP" and words):
            out.add(" ".join(words if name != "IP" else words[:1]))
        if name == "SS" and words:
            out.end()


def text(lines: list[str], out: Paragraphs | None = None) -> str:
    """The paragraphs of some lines of roff, one a line, spaces collapsed."""
    out = out or Paragraphs()
    table = None
    for line in lines:
        asked = re.match(r"[.']\s*(\S*)\s*(.*)", line)
        name = asked[1] if asked else None
        if name == "TS":
            table = []
        elif name == "TE":
            out.end()
            out.done += [" ".join(filter(None, (text([piece]) for piece in row))) for row in table_rows(table)]
            table = None
        elif table is not None:
            table.append(line)
        elif asked:
            request(out, name, asked[2])
        elif line.strip():
            out.add(unescape(line))
        else:
            out.end()
    out.end()
    return "\n".join(p for p in out.done if p)


def sections(page: str) -> dict[str, str]:
    """Heading -> text of every section (.SH), in order."""
    found: dict[str, list[str]] = {}
    heading = None
    for line in source_lines(page):
        if asked := re.match(r"\.\s*SH\s+(.*)", line):
            heading = " ".join(unescape(a) for a in arguments(asked[1]))
            found.setdefault(heading, [])
        elif heading is not None:
            found[heading].append(line)
    return {heading: text(lines) for heading, lines in found.items()}
