"""The catalogue tells the truth about the folder of notebooks, and a notebook's method imports as a module."""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
import re
import sys
import traceback

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nbkit import _paths, papers, recipes
from nbkit.errors import UnknownName

CHAPTER_SIZES = {
    "01-saliency": 5, "02-concepts": 5, "03-neurons": 9, "04-features": 5, "05-data": 4, "06-pruning": 11,
    "07-lean-transformers": 12, "08-ranking": 10, "09-representations": 6, "10-neuroscience": 12,
    "11-segmentation": 3, "12-search-and-proof": 6,
}  # fmt: skip


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty notebooks folder, and a function that puts a paper's notebook made of method cells into it."""
    monkeypatch.setattr(_paths, "notebooks_dir", lambda: tmp_path)

    def write(slug, *cells, tags=("method",)):
        path = tmp_path / papers.get(slug).file
        path.parent.mkdir(exist_ok=True)
        book = new_notebook(cells=[new_markdown_cell("# A title"), new_code_cell("model = load_everything()")])
        book.cells += [new_code_cell(source, metadata={"tags": list(tags)}) for source in cells]
        nbformat.write(book, path)
        return path

    yield write
    for name in [name for name in sys.modules if name.startswith("nbkit.papers.methods.")]:
        del sys.modules[name]


def test_the_catalogue_holds_every_paper_once_in_reading_order():
    table = papers.catalogue()
    assert len(table) == 88
    assert table["slug"].is_unique
    assert table["title"].is_unique
    assert table["arxiv"].is_unique
    assert dict(table.groupby("chapter").size()) == CHAPTER_SIZES
    assert list(table["chapter"]) == sorted(table["chapter"])
    for _, rows in table.groupby("chapter"):
        assert list(rows["order"]) == list(range(1, len(rows) + 1))


def test_every_entry_is_complete():
    for slug in papers.catalogue()["slug"]:
        paper = papers.get(slug)
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
        assert paper.title == paper.title.strip() != ""
        assert all(name == name.strip() != "" for name in paper.authors)
        assert "et al." not in paper.authors[:-1]
        assert paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
        assert 1990 < paper.year < 2100
        assert paper.arxiv is None or paper.year >= 2000 + int(paper.arxiv[:2]) or slug == "lexrank"  # arXived late


def test_a_known_entry_reads_as_its_title_page_does():
    paper = papers.get("neuron-path")
    assert paper.title == "Discovering Influential Neuron Path in Vision Transformers"
    assert (paper.year, paper.arxiv, paper.venue) == (2025, "2503.09046", "ICLR 2025")
    assert (paper.chapter, paper.order, paper.file) == ("03-neurons", 1, "03-neurons/01-neuron-path.ipynb")
    assert paper.byline == "Yifan Wang et al."
    assert "2503.09046" in paper._repr_html_()


def test_what_is_not_known_is_none_in_the_table_and_so_false():
    table = papers.catalogue().set_index("slug")
    unknown = [(s, c) for s in table.index for c in ("arxiv", "venue") if getattr(papers.get(s), c) is None]
    assert unknown
    assert all(table.loc[slug, column] is None for slug, column in unknown)


def test_a_notebook_counts_as_written_when_it_is_on_disk(shelf):
    assert set(papers.catalogue()["notebook"]) == {"planned"}
    path = shelf("grad-cam", "x = 1")
    assert papers.get("grad-cam").path == path
    assert papers.catalogue().set_index("slug")["notebook"]["grad-cam"] == "01-saliency/01-grad-cam.ipynb"


def test_an_unknown_slug_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'neuron-path'"):
        papers.get("neuron-paths")
    with pytest.raises(UnknownName, match="did you mean 'craft'"):
        papers.method("CRAFT")
    with pytest.raises(KeyError):
        papers.bibtex(["craft", "carft"])
    with pytest.raises(UnknownName):
        papers.method("no-such-paper")


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("grad-cam", "grad-cam"),
        ("gradcam", "grad-cam"),
        ("GRAD CAM", "grad-cam"),
        ("influential neuron", "neuron-path"),
        ("Köllőd", "eegnet-family"),
        ("kollod", "eegnet-family"),
        ("2211.10154", "craft"),
        ("frankle 2019 rewinding", None),
        ("lotery ticket", "lottery-ticket"),
        ("attention heads pruning", "heads-and-mlp-pruning"),
    ],
)
def test_search_finds_by_any_field_and_puts_the_best_first(text, first):
    found = list(papers.search(text)["slug"])
    assert found[:1] == ([first] if first else [])


def test_search_with_no_text_gives_all_and_with_nonsense_gives_none():
    assert list(papers.search("  ")["slug"]) == list(papers.catalogue()["slug"])
    with pytest.raises(TypeError, match="not NoneType"):
        papers.search(None)
    empty = papers.search("qqqqxxxx")
    assert len(empty) == 0
    assert list(empty.columns) == list(papers.catalogue().columns)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A data folder in which grad-cam keeps two tables and tensors, and a function that writes its facts."""
    folder = tmp_path / "papers" / "grad-cam"
    folder.mkdir(parents=True)
    monkeypatch.setattr(_paths, "data_dir", lambda: tmp_path)
    (folder / "results.csv").write_text("seed,accuracy\n0,0.5\n1,0.75\n")
    recipes.write_bytes(folder / "wide.csv.gz", b"seed,accuracy\n0,0.25\n")
    kept = {"path": torch.tensor([[3, 1]]), "weight": torch.ones(2, dtype=torch.float16)}
    recipes.write_tensors(folder / "tensors.safetensors", kept)
    (folder / "recipe.py").write_text("")
    files = dict.fromkeys(("results.csv", "wide.csv.gz", "tensors.safetensors"), "what")
    facts = {"recipe": "python a recipe", "minutes": 10, "source": "here", "licence": "Apache-2.0"}

    def write(files=files, **changes):
        lines = [f"{k} = {json.dumps(v)}" for k, v in (facts | changes).items() if v is not None]
        listed = [f"{json.dumps(k)} = {json.dumps(v)}" for k, v in files.items()]
        (folder / "facts.toml").write_text("\n".join([*lines, "[files]", *listed]))
        return files

    return write


def test_a_papers_tables_and_tensors_by_name(stored):
    assert papers.results("grad-cam").accuracy.tolist() == [0.5, 0.75]
    assert papers.results("grad-cam", "wide").accuracy.tolist() == [0.25]
    found = papers.tensors("grad-cam")
    assert {name: t.dtype for name, t in found.items()} == {"path": torch.int64, "weight": torch.float16}
    assert found["path"].tolist() == [[3, 1]]
    assert (papers.folder("grad-cam") / "results.csv").is_file()


def test_data_that_is_not_there_is_named(stored):
    with pytest.raises(UnknownName, match="'grad-cam' has no table 'result'; did you mean 'results'"):
        papers.results("grad-cam", "result")
    with pytest.raises(UnknownName, match="'grad-cam' has no tensors 'wide'; there is 'tensors'"):
        papers.tensors("grad-cam", "wide")
    for call in (papers.results, papers.tensors, papers.facts, papers.folder):
        with pytest.raises(UnknownName, match="did you mean 'grad-cam'"):
            call("gradcam")
        with pytest.raises(FileNotFoundError, match="'craft' keeps no data: there is no folder data/papers/craft"):
            call("craft")


def test_facts_are_read_and_what_they_lack_is_named(stored):
    with pytest.raises(FileNotFoundError, match="no data/papers/grad-cam/facts.toml; it holds recipe, minutes"):
        papers.facts("grad-cam")
    files = stored()
    facts = papers.facts("grad-cam")
    assert (facts.slug, facts.minutes, facts.licence, dict(facts.files)) == ("grad-cam", 10, "Apache-2.0", files)
    assert papers.unlisted("grad-cam") == []
    stored(source=None, minutes=None)
    with pytest.raises(ValueError, match="facts.toml lacks minutes, source; it holds recipe, minutes, source, licence"):
        papers.facts("grad-cam")
    for changes, message in (
        ({"minutes": "ten"}, "minutes is 'ten'"),
        ({"licenc": "MIT"}, "holds 'licenc', which nothing reads; did you mean 'licence'"),
        ({"files": {"results.csv": ""}}, "does not say what results.csv holds"),
    ):
        stored(**changes)
        with pytest.raises(ValueError, match=message):
            papers.facts("grad-cam")
    (papers.folder("grad-cam") / "facts.toml").write_text("recipe = ")
    with pytest.raises(ValueError, match="is not TOML"):
        papers.facts("grad-cam")


def test_a_file_that_is_not_listed_or_not_there_is_named(stored):
    stored(files={"results.csv": "what", "tensors.safetensors": "what", "gone.csv": "what"})
    assert papers.unlisted("grad-cam") == ["gone.csv", "wide.csv.gz"]


KEPT = sorted(path.name for path in (_paths.data_dir() / "papers").iterdir() if path.is_dir())


@pytest.mark.parametrize("slug", KEPT)
def test_a_paper_lists_its_files_and_keeps_them_small(slug):
    assert papers.get(slug).path, f"{slug} has data and no notebook"
    assert papers.unlisted(slug) == [], f"data/papers/{slug}/facts.toml and the folder disagree"
    assert papers.facts(slug).recipe == f"python data/papers/{slug}/recipe.py"
    size = sum(path.stat().st_size for path in papers.folder(slug).iterdir() if path.is_file())
    assert size <= 400_000, f"data/papers/{slug} has {size / 1000:.0f} KB; a paper has 400"


def test_bibtex_of_every_paper_is_balanced_and_keyed_by_slug():
    text = papers.bibtex(papers.catalogue()["slug"])
    assert text.count("@misc{") == 88
    assert text.count("{") == text.count("}")
    assert "et al." not in text
    assert "Yifan Wang and others}" in text
    assert r"Processing \& Management" in text
    assert papers.bibtex("craft").startswith("@misc{craft,\n")


def test_method_imports_the_tagged_cells_and_nothing_else(shelf):
    shelf("craft", "import math\n\nRANKS = (5, 10)", "def area(r):\n    return math.pi * r**2")
    craft = papers.method("craft")
    assert craft.__name__ == "nbkit.papers.methods.craft"
    assert craft.area(1) == pytest.approx(3.14159, abs=1e-5)
    assert craft.RANKS == (5, 10)
    assert not hasattr(craft, "model")
    assert papers.method("craft") is craft
    assert importlib.import_module("nbkit.papers.methods.craft") is craft


def test_functions_and_classes_of_a_method_pickle_and_show_their_source(shelf):
    shelf("neuron-path", "class Path:\n    '''One unit a layer.'''", "def find(x):\n    return x")
    module = papers.method("neuron-path")
    assert pickle.loads(pickle.dumps(module.find)) is module.find
    assert inspect.getsource(module.find).strip() == "def find(x):\n    return x"
    assert "One unit a layer." in inspect.getsource(module.Path)


def test_a_traceback_through_a_method_shows_the_cell(shelf):
    shelf("craft", "import math", "def broken(x):\n    y = x + 1\n    return math.sqrt(-y)")
    with pytest.raises(ValueError, match="math domain|nonnegative") as error:
        papers.method("craft").broken(1)
    shown = "".join(traceback.format_exception(error.value))
    assert 'File "02-concepts/01-craft.ipynb, cell 4", line 3, in broken' in shown
    assert "return math.sqrt(-y)" in shown


def test_a_future_import_holds_for_the_cells_below(shelf):
    shelf("craft", "from __future__ import annotations", "def f(x: NotDefinedAnywhere): ...")
    assert papers.method("craft").f.__annotations__ == {"x": "NotDefinedAnywhere"}


def test_reload_reads_an_edited_notebook(shelf):
    shelf("craft", "STEPS = 1")
    module = papers.method("craft")
    shelf("craft", "STEPS = 2")
    assert importlib.reload(module).STEPS == 2


def test_a_planned_paper_says_so(shelf):
    with pytest.raises(FileNotFoundError, match="'craft' is planned: its notebook 02-concepts/01-craft.ipynb"):
        papers.method("craft")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nbkit.papers.methods.craft")


def test_a_notebook_without_tagged_cells_says_so(shelf):
    shelf("craft", "x = 1", tags=())
    with pytest.raises(ValueError, match="no cell tagged 'method'"):
        papers.method("craft")


def test_a_cell_that_would_run_something_is_refused_and_leaves_no_module(shelf):
    shelf("craft", "import os", "def f(): ...\nprint(f())")
    with pytest.raises(ValueError, match="01-craft.ipynb, cell 4, line 2: a statement that runs on import"):
        papers.method("craft")
    assert "nbkit.papers.methods.craft" not in sys.modules


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nfrom torch import nn",
        "def f(x):\n    print(x)",
        "class Net:\n    width = 3",
        "'''A text.'''\nSTEPS = 20\nLOW, HIGH = 0.0, 1.0\nNAMES: tuple[str, ...] = tuple(['a', 'b'])",
        "RULES = {'zero': zero, 'double': lambda x: torch.add(x, x)}",
        "@dataclass(frozen=True)\nclass Row:\n    name: str",
    ],
)
def test_definitions_and_constants_are_import_safe(source):
    assert papers.unsafe_statements(source) == []


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "model = models.load('minilm')",
        "for i in range(3):\n    pass",
        "x[0] = 1",
        "if True:\n    import os",
        "%matplotlib inline",
        "with open('f') as f:\n    pass",
        "x = 1\nx += 1",
    ],
)
def test_what_runs_on_import_is_not_import_safe(source):
    assert papers.unsafe_statements(source)


def test_a_syntax_error_is_reported_on_its_line_and_a_part_of_a_word_is_found():
    assert papers.unsafe_statements("a = 1\nb = 2\nc = = 3") == [(3, "not plain Python: invalid syntax")]
    assert "global-magnitude-pruning" in set(papers.search("tude")["slug"])  # magni-tude
    assert "global-magnitude-pruning" not in set(papers.search("de")["slug"])  # two letters begin a word or nothing
