"""Manual pages and WordNet: the relevance holds together and is not given away; roff and glosses become text."""

from __future__ import annotations

import re
import subprocess
from collections import Counter

import pytest

from nbkit import datasets, recipes

RECIPE = "sets/_roff.py"


@pytest.fixture(scope="module")
def pages():
    return datasets.load("manpages")


@pytest.fixture(scope="module")
def wordnet():
    return datasets.load("wordnet")


def test_every_page_is_the_best_answer_to_its_own_description(pages):
    assert len(pages) == 1100
    assert set(pages.documents) == set(pages.queries) == set(pages.relevance) == set(pages.licences)
    for page, grades in pages.relevance.items():
        assert grades[page] == 2 and set(grades) <= set(pages.documents)
        assert all(grade == 1 for other, grade in grades.items() if other != page)
    assert sum(len(grades) > 1 for grades in pages.relevance.values()) == 1052
    assert sum(n for n in Counter(pages.queries.values()).values() if n > 1) == 90


def test_a_page_checked_by_hand(pages):
    """qsort(3) names sort(1), of another package, strcmp(3), and two names of scandir(3): alphasort, versionsort."""
    assert pages.queries["qsort.3"] == "sort an array"
    assert pages.relevance["qsort.3"] == {"qsort.3": 2, "scandir.3": 1, "strcmp.3": 1}
    text = pages.documents["qsort.3"]
    assert "The qsort() function sorts an array with nmemb elements of size size. The base argument" in text
    assert "qsort(), qsort_r() Thread safety MT-Safe" in text  # a table's row
    assert "\nreturn strcmp(*(const char **) p1, *(const char **) p2);\n" in text  # program text keeps its lines
    assert 'fprintf(stderr, "Usage: %s <string>...\\n", argv[0]);' in text
    assert "SPDX-License-Identifier: Linux-man-pages-copyleft" in pages.licences["qsort.3"]


def test_documents_do_not_give_the_relevance_away(pages):
    for page, text in pages.documents.items():
        headings = set(text.split("\n"))
        explained = page == "man-pages.7"  # lists what sections a page has
        assert explained or not headings & {"NAME", "SEE ALSO", "COLOPHON"}, page
        assert f"- {pages.queries[page]}" not in text, page
        assert len(text) > 150 and len(pages.queries[page]) > 3


def test_documents_are_text_and_not_roff(pages):
    about_roff = {"man-pages.7", "man.7", "regex.7"}  # these write about requests and backslashes
    for page, text in pages.documents.items():
        assert "\0" not in text and "\t" not in text and "  " not in text, page
        if page not in about_roff:
            assert not re.search(r"^\.(B|I|BR|IR|RB|RI|BI|IB|PP|TP|SH|SS|TS|TE)\b", text, re.MULTILINE), page
            assert not re.search(r"\\f[BIRP]|\\[(*&[]", text), page


def test_licences_say_who_asks_for_what(pages):
    unnamed = [page for page, text in pages.licences.items() if not re.search("copyright|licen[cs]e", text, re.I)]
    assert unnamed == []
    assert sum("SPDX-License-Identifier: Linux-man-pages-copyleft" in t for t in pages.licences.values()) > 600


def test_a_dictionary_entry_checked_by_hand(wordnet):
    i = wordnet.words.index(("dog", "domestic dog", "Canis familiaris"))
    assert wordnet.definitions[i] == (
        "a member of the genus Canis (probably descended from the common wolf) that has been domesticated by man "
        "since prehistoric times; occurs in many breeds"
    )
    assert wordnet.examples[i] == ("the dog barked all night",) and wordnet.parts[i] == "noun"
    galore = wordnet.words.index(("galore",))  # in the file: galore(ip)
    assert wordnet.definitions[galore] == "in great numbers" and wordnet.parts[galore] == "adjective"
    assert wordnet.topics[i] == "noun.animal" and wordnet.topics[galore] == "adj.all"


def test_wordnet_is_complete(wordnet):
    """The counts of synsets that Princeton publishes (wnstats(7WN))."""
    assert Counter(wordnet.parts) == {"noun": 82115, "verb": 13767, "adjective": 18156, "adverb": 3621}
    assert len(wordnet) == len(wordnet.words) == len(wordnet.examples) == len(wordnet.parts) == 117659
    assert all(wordnet.definitions) and all(all(words) for words in wordnet.words)
    assert not any("_" in word for words in wordnet.words for word in words)
    assert sum('"' in d for d in wordnet.definitions) == 20


def test_topics_are_the_45_files_of_the_lexicographers(wordnet):
    topics = Counter(wordnet.topics)
    assert len(wordnet.topics) == len(wordnet) and len(topics) == 45
    assert min(topics.values()) == topics["noun.motive"] == 42 and max(topics.values()) == topics["adj.all"] == 14435
    start = {"noun": "noun", "verb": "verb", "adjective": "adj", "adverb": "adv"}
    assert all(t.split(".")[0] == start[part] for t, part in zip(wordnet.topics, wordnet.parts, strict=True))


def test_people_judged_every_pair_of_the_lee_documents():
    lee = datasets.load("lee")
    found = lee.similarity
    assert found.shape == (50, 50) and (found == found.T).all() and (found.diagonal() == 1).all()
    assert found.min() == 0.2 and found[0, 1] == 0.3 and found[48, 1] == 0.7  # as read in the file
    assert found[0, 13] == 1 and found[0, 32] == 0.96 and sorted(found[0])[-4] < 0.6
    assert all("Democrats" in lee.test[i] for i in (0, 13, 32))


def test_collections_show_queries_with_their_answers(pages, wordnet):
    assert pages._repr_html_().count("<tr><td style='text-align:left'>") == 3
    assert "entity (noun)" in wordnet._repr_html_() and "(adverb)" in wordnet._repr_html_()
    empty = datasets.Retrieval(pages.about)
    assert len(empty) == 0 and "relevant documents" in empty._repr_html_()


@pytest.mark.parametrize(
    "roff, text",
    [
        (".BR qsort (3),\n.I compar", "qsort(3), compar"),
        ('.BI "int " f "(void *" p );', "int f(void *p);"),
        (r"\fBa\fP\-\fIb\fR \(aqc\(aq \[bu] d\e0 x\&.y", r"a-b 'c' • d\0 x.y"),
        ("one  two\nthree\n.PP\nfour", "one two three\nfour"),
        (".nf\na\n  b\n.fi\nc\nd", "a\nb\nc d"),
        (".TP\n.B EINVAL\nnot valid", "EINVAL not valid"),
        (".IP \\[bu] 3\nitem", "• item"),
        ("a\\c\n.BR b (2)/\\c\nc", "ab(2)/c"),
        ('kept\n.\\" a comment\nkept too \\" not this', "kept kept too"),
        ("long \\\nline", "long line"),
        (".TS\nallbox;\nl l.\nName\tValue\nT{\n.BR f (),\n.BR g ()\nT}\tsafe\n.TE", "Name Value\nf(), g() safe"),
        (".UR http://x.org\nthe site\n.UE .", "http://x.org the site."),
    ],
)
def test_roff_becomes_what_a_reader_sees(recipe, roff, text):
    assert recipe.text(recipe.source_lines(roff)) == text


def test_sections_by_heading(recipe):
    page = '.TH x 1\n.SH NAME\nx \\- does\n.SH "SEE ALSO"\n.BR y (1)\n.SH NOTES\n.SS Old\nfoo'
    assert recipe.sections(page) == {"NAME": "x - does", "SEE ALSO": "y(1)", "NOTES": "Old\nfoo"}
    with pytest.raises(KeyError):
        recipe.unescape(r"\[no such character]")


def test_related_pages_are_found_under_any_of_their_names():
    manpages = recipes.load("sets/manpages.py")
    source = ".TH a 3\n.SH NAME\na, b \\- does\n.SH SEE ALSO\n.BR b (3),\n.BR c (3),\n.BR t (3),\n.BR ls (1)"
    found = manpages.record("a.3", source, {"a.3": source, "d.2": "", "t.3type": ""}, {"b.3": "a.3", "c.3": "d.2"})
    assert found["query"] == "does" and found["related"] == ["d.2", "t.3type"]
    with pytest.raises(SystemExit, match="no description"):
        manpages.record("a.3", ".SH NAME\nnothing", {}, {})


@pytest.mark.parametrize(
    "gloss, definition, examples",
    [
        ('a b; "c d"; "e"', "a b", ["c d", "e"]),
        ("no example", "no example", []),
        ('one; two; "said so"- Somebody; "more"', "one; two", ["said so", "more"]),
        ('go under, "The raft sank"', "go under", ["The raft sank"]),
        ('exact words (e.g., "he said")', 'exact words (e.g., "he said")', []),
        ('as in "make strides"; "big strides"', 'as in "make strides"', ["big strides"]),
    ],
)
def test_glosses_are_definitions_and_examples(gloss, definition, examples):
    assert recipes.load("sets/wordnet.py").split_gloss(gloss) == (definition, examples)


def test_a_synset_line():
    line = '00000001 00 s 02 galore(ip) 0 in_plenty 1 001 & 00000002 a 0000 | in great numbers; "daffodils galore"  \n'
    assert recipes.load("sets/wordnet.py").synset(line) == {
        "words": ["galore", "in plenty"],
        "part": "adjective",
        "topic": "adj.all",
        "definition": "in great numbers",
        "examples": ["daffodils galore"],
    }


def test_a_debian_package_is_read_with_its_links_and_refused_when_it_is_another(tmp_path, monkeypatch):
    """apt and dpkg-deb are stood in for: the "package" is a tar file."""
    import hashlib
    import tarfile

    tree = tmp_path / "tree"
    (tree / "man" / "man3").mkdir(parents=True)
    (tree / "man" / "man3" / "a.3").write_text("page")
    (tree / "man" / "man3" / "b.3").symlink_to("../man3/a.3")
    with tarfile.open(tmp_path / "x.deb", "w") as tar:
        tar.add(tree, arcname=".")
    data = (tmp_path / "x.deb").read_bytes()

    def client(command, cwd=None, **_):
        if command[0] == "apt-get":
            (cwd_path := type(tmp_path)(cwd)).joinpath("x.deb").write_bytes(data)
            assert cwd_path.is_dir() and command[-1] == "x=1.0"
        return subprocess.CompletedProcess(command, 0, stdout=data)

    monkeypatch.setattr(recipes.subprocess, "run", client)
    files, links = recipes.from_deb("x", "1.0", hashlib.sha256(data).hexdigest())
    assert files == {"man/man3/a.3": b"page"} and links == {"man/man3/b.3": "man/man3/a.3"}
    with pytest.raises(SystemExit, match=r"x 1\.0: SHA-256 is"):
        recipes.from_deb("x", "1.0", "0" * 64)
