"""wordnet.jsonl.xz and wordnet-licence.txt: the 117,659 synsets of WordNet 3.0, from apt wordnet-base 1:3.0-37.

A line of data.noun, data.verb, data.adj or data.adv (see wndb(5WN) of the package) becomes one record: words, part,
topic, definition, examples. The topic is the file its authors kept a synset in, by its name in lexnames(5WN):
noun.animal. What a gloss says before its first quoted example is the definition. Who an example is quoted from
goes; so does what some forty glosses add after their examples. Twenty glosses have a quotation mark too many or too
few and stay as they were split by this rule.
"""

from __future__ import annotations

import re
from pathlib import Path

from nbkit.recipes import from_apt, run, write_bytes, write_records

FOLDER = "usr/share/wordnet"
LICENCE = "usr/share/doc/wordnet-base/copyright"
FILES = {
    f"{FOLDER}/data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
    f"{FOLDER}/data.verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
    f"{FOLDER}/data.adj": "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
    f"{FOLDER}/data.adv": "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
    LICENCE: "f461bac9a5a1810c4fe1e3cec0a980f79406e3a8c1c147f3874979fb00e2cc0e",
}
TOPICS = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
    "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
    "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition "
    "verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social "
    "verb.stative verb.weather adj.ppl"
).split()  # by number, as lexnames(5WN) lists them
PARTS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
FIRST_EXAMPLE = re.compile(r'[;:,]\s*(?=")')
POSITION = re.compile(r"\((a|p|ip)\)$")  # where an adjective may stand: galore(ip)


def split_gloss(gloss: str) -> tuple[str, list[str]]:
    """The definition and the examples: ``'a b; "c d"; "e"'`` gives ``('a b', ['c d', 'e'])``.

    A quotation inside the definition (in brackets, or with no separator before it) stays there.
    """
    for found in FIRST_EXAMPLE.finditer(gloss):
        definition, rest = gloss[: found.start()], gloss[found.end() :]
        if definition.count("(") <= definition.count(")"):
            return definition.strip(" ;:,"), [e.strip() for e in re.findall(r'"([^"]+)"', rest)]
    return gloss.strip(" ;:,"), []


def synset(line: str) -> dict:
    """offset file type n word id word id ... | gloss; the number of words is hexadecimal, spaces are underscores."""
    fields, gloss = line.split(" | ", 1)
    _, topic, kind, n, *rest = fields.split(" ")
    words = [POSITION.sub("", word).replace("_", " ") for word in rest[: 2 * int(n, 16) : 2]]
    definition, examples = split_gloss(gloss.strip())
    return {
        "words": words,
        "part": PARTS[kind],
        "topic": TOPICS[int(topic)],
        "definition": definition,
        "examples": examples,
    }


def build(out: Path) -> list[Path]:
    *tables, licence = from_apt("wordnet-base", FILES)
    lines = "".join(table.decode() for table in tables).splitlines()
    paths = [out / "wordnet.jsonl.xz", out / "wordnet-licence.txt"]
    write_records(paths[0], [synset(line) for line in lines if not line.startswith("  ")])
    write_bytes(paths[1], licence)
    return paths


if __name__ == "__main__":
    run(build, __doc__)
