"""All files of this folder: what notebooks/03-neurons/06-configurable-bricks measures beforehand on SmolLM2.

- windows.safetensors: 32 windows of 48 tokens a group, each from a text of its own: functions of networkx 3.6.1
  (without docstrings), manual pages, news, and WordNet's entries for animals and for artefacts. Fold s holds
  windows 6s to 6s + 5 of every group back (four are evaluated) and scores neurons on the other 26.
- masking.csv: loss when of every token the lowest neurons of each layer are zeroed, by two indicators and at random.
- layers.csv, draws.csv, overlap.csv: functionality scores by layer, those of units with shuffled weights and of
  permuted labels; how the bricks overlap, with permuted labels too, and with themselves from other texts.
- damage.csv: loss of every group without each brick, without the resident neurons, random ones, and ones matched in
  magnitude over all texts ("matched") or over the brick's own ("matched own"; two of these on every group: "blind").

About nine minutes on one core; a run that was stopped goes on where it was (delete --work for a fresh start).
The functions are the notebook's method cells.
"""

from __future__ import annotations

import ast
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nbkit import datasets, forward, hooks, language, models, papers, runtime
from nbkit.recipes import Work, from_wheel, part_option, run, work_option, write_table, write_tensors

SLUG = "configurable-bricks"
NETWORKX = ("networkx", "3.6.1", "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762")
MODULES = """
asteroidal boundary bridges broadcasting chains chordal clique cluster communicability_alg core covering cuts
cycles d_separation dag distance_measures distance_regular dominance dominating efficiency_measures euler
graph_hashing graphical hierarchy hybrid link_prediction lowest_common_ancestors matching mis moral
node_classification non_randomness perfect_graph planar_drawing planarity polynomials reciprocity regular
richclub similarity simple_paths smallworld smetric sparsifiers structuralholes summarization swap threshold
time_dependent tournament triads vitality voronoi walks wiener
""".split()
N, LENGTH, HELD, FOLDS = 32, 48, 6, 3
EVALUATED = 4  # of the windows held, for the bricks; half of them for the indicators
SHARES, RANDOM_SHARES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9), (0.3, 0.6)
PERMUTED, MATCHED, RANDOM, BLIND = 40, 7, 2, 2
ENTRIES = 8  # of WordNet in a text


# --- windows


def functions(source: bytes) -> str:
    """The functions of a module without docstrings and comments, in one layout."""
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    for node in found:
        node.decorator_list = []
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef) and ast.get_docstring(inner) is not None:
                inner.body = inner.body[1:] or [ast.Pass()]
    return "\n\n".join(ast.unparse(node) for node in found)


def entries(topic: str, rng: np.random.Generator) -> list[str]:
    """Texts of some dictionary entries of one topic, no entry in two."""
    wordnet = datasets.load("wordnet")
    rows = rng.permutation([i for i, t in enumerate(wordnet.topics) if t == topic])
    lines = [f"{wordnet.words[i][0]}: {wordnet.definitions[i]}" for i in rows[: 2 * N * ENTRIES]]
    return ["; ".join(lines[i : i + ENTRIES]) for i in range(0, len(lines), ENTRIES)]


def texts() -> dict[str, list[str]]:
    rng = np.random.default_rng(0)
    code = from_wheel(*NETWORKX, *(f"networkx/algorithms/{name}.py" for name in MODULES))
    pages = [d.partition("DESCRIPTION\n")[2] for d in datasets.load("manpages").documents.values()]
    pages = [page[:4000] for page in pages if len(page) > 1000]
    return {
        "code": [functions(source) for source in code],
        "manual": [pages[i] for i in rng.permutation(len(pages))[: 2 * N]],
        "news": list(datasets.load("lee").texts),
        "animals": entries("noun.animal", rng),
        "artefacts": entries("noun.artifact", rng),
    }


def windows() -> list:
    """[5, 32, 48] tokens."""
    tokenizer, found = models.tokenizer("smollm2"), []
    generator = torch.Generator().manual_seed(0)
    for group in texts().values():
        ids, _ = language.token_windows(tokenizer, group, LENGTH, n=N, seed=0)
        found.append(ids[torch.randperm(N, generator=generator)].tolist())
    return found


@cache
def kit():
    runtime.deterministic(seed=0)
    return papers.method(SLUG), models.load("smollm2")


def split(ids: Tensor, fold: int) -> tuple[Tensor, Tensor]:
    """Row numbers in ids.flatten(0, 1) to evaluate on, [5, 6], and to score from, [5, 26]."""
    rows = torch.arange(ids.shape[0] * N).view(-1, N)
    held = torch.zeros(N, dtype=torch.bool)
    held[HELD * fold : HELD * (fold + 1)] = True
    return rows[:, held], rows[:, ~held]


# --- scores


def shuffled(weight: Tensor, seed: int) -> Tensor:
    """Each row's entries in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    return weight.gather(1, torch.rand(weight.shape, generator=generator).argsort(1))


@torch.no_grad()
def other_units(ids: Tensor) -> Tensor:
    """A [N, L, f] of as many units that read the same states through shuffled gate and up weights."""
    _, model = kit()
    mlps = [name.rpartition(".")[0] for name in language.mlp_hidden(model)]
    parts = ("gate_proj", "up_proj")
    weights = [
        [shuffled(model.get_submodule(f"{m}.{part}").weight, 2 * i + j) for j, part in enumerate(parts)]
        for i, m in enumerate(mlps)
    ]
    kept = []
    for part in ids.split(8):
        with hooks.record(model, [f"{m}.gate_proj" for m in mlps], at="input") as x:
            model(input_ids=part, logits_to_keep=1)
        a = [
            (torch.nn.functional.silu(s @ gate.T) * (s @ up.T)).abs().mean(1)
            for (gate, up), s in zip(weights, (x[f"{m}.gate_proj"][:, 1:] for m in mlps), strict=True)
        ]
        kept.append(torch.stack(a, 1))
    return torch.cat(kept)


def activations(folder: Path, ids: Tensor) -> dict[str, Tensor]:
    """``neurons`` and ``shuffled``: A [160, L, f]; kept in a file of the work folder."""
    path = folder / "activations.pt"
    if not path.is_file():
        method, model = kit()
        with forward.evaluating(model):
            real = method.activations(model, ids.flatten(0, 1), logits_to_keep=1)
            found = {"neurons": real, "shuffled": other_units(ids.flatten(0, 1))}
        torch.save(found, path)
    return torch.load(path)


def by_layer(fold: int, kind: str, scores: Tensor) -> list[dict]:
    """A row a group and layer of scores [F, L, f]: best, the best but five per mille, mean."""
    method, _ = kit()
    best = scores.sort(-1, descending=True).values
    return [
        {"fold": fold, "kind": kind, "group": name, "layer": layer, "best": round(row[0].item(), 4),
         "five per mille": round(row[round(0.005 * len(row))].item(), 4), "mean": round(row.mean().item(), 4)}
        for name, of in zip(method.GROUPS, best, strict=True) for layer, row in enumerate(of)
    ]  # fmt: skip


def scored(fold: int, ids: Tensor, A: dict[str, Tensor]) -> dict[str, list[dict]]:
    method, _ = kit()
    rows = split(ids, fold)[1]
    group = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
    real = method.func_scores(A["neurons"][rows.flatten()], group)
    layers = by_layer(fold, "neurons", real)
    other = method.func_scores(A["shuffled"][rows.flatten()], group)
    layers += by_layer(fold, "shuffled weights", other)
    draws, overlaps = [], pairs(fold, "bricks", 0, method.overlap(method.top(real)))
    overlaps += pairs(fold, "shuffled weights", 0, method.overlap(method.top(other)))
    place = method.places(A["neurons"][rows.flatten()].flatten(1).T.contiguous())
    generator = torch.Generator().manual_seed(fold)
    for draw in range(PERMUTED):
        label = group[torch.randperm(len(group), generator=generator)]
        null = torch.stack([method.average_precision(place, label == f) for f in range(len(rows))])
        null = null.unflatten(1, real.shape[1:])
        best = null.amax(-1)  # [F, L]
        for f, name in enumerate(method.GROUPS):
            draws.append({"fold": fold, "draw": draw, "label": name, "best": round(best[f].mean().item(), 4),
                          "over 0.8": round((best[f] > 0.8).double().mean().item(), 4),
                          "mean": round(null[f].mean().item(), 4)})  # fmt: skip
        if draw == 0:
            layers += by_layer(fold, "permuted labels", null)
        overlaps += pairs(fold, "permuted labels", draw, method.overlap(method.top(null)))
    groups = torch.arange(len(rows)).repeat_interleave(rows.shape[1] // 2)
    halves = [
        method.top(method.func_scores(A["neurons"][half.flatten()], groups)) for half in (rows[:, ::2], rows[:, 1::2])
    ]
    for f, name in enumerate(method.GROUPS):
        own = method.overlap(torch.stack([halves[0][f], halves[1][f]]))[0, 1].item()
        row = {"fold": fold, "kind": "halves", "draw": 0, "row": name, "column": name, "overlap": round(own, 4)}
        overlaps.append(row)
    return {"layers": layers, "draws": draws, "overlap": overlaps}


def pairs(fold: int, kind: str, draw: int, table: Tensor) -> list[dict]:
    """A row a pair of different bricks."""
    names = kit()[0].GROUPS
    return [
        {"fold": fold, "kind": kind, "draw": draw, "row": a, "column": b, "overlap": round(table[i, j].item(), 4)}
        for i, a in enumerate(names) for j, b in enumerate(names) if i < j
    ]  # fmt: skip


# --- masks


def losses(ids: Tensor) -> list[float]:
    """Mean loss in nats of each group, ids [F, n, T]."""
    _, model = kit()
    loss = language.nll(model, ids.flatten(0, 1), batch=10)
    return [round(x, 5) for x in loss.view(len(ids), -1).double().mean(1).tolist()]


def dense(fold: int, ids: Tensor) -> list[float]:
    return losses(ids.flatten(0, 1)[split(ids, fold)[0][:, :EVALUATED]])


def random_zeroed(share: float, seed: int):
    """A context: at every token and in every layer a share of the neurons is 0, drawn anew."""
    _, model = kit()
    generator = torch.Generator().manual_seed(seed)

    def cut(a: Tensor) -> Tensor:
        drawn = torch.rand(a.shape, generator=generator)
        return a.scatter(-1, drawn.topk(round(share * a.shape[-1]), dim=-1, largest=False).indices, 0.0)

    return hooks.edit(model, {name: hooks.replace(cut, at="input") for name in language.mlp_hidden(model)})


def masking(fold: int, ids: Tensor, shares: tuple[float, ...]) -> list[dict]:
    """A row an indicator, share and group, on two of the fold's windows a group."""
    method, model = kit()
    held = ids.flatten(0, 1)[split(ids, fold)[0][:, : EVALUATED // 2]]
    length, base, rows = method.lengths(model), losses(held), []
    for share in shares:
        contexts = {
            "activation": method.lowest_zeroed(model, share, torch.ones_like(length)),
            "output magnitude": method.lowest_zeroed(model, share, length),
        }
        if share in RANDOM_SHARES:
            contexts["random"] = random_zeroed(share, fold)
        for by, context in contexts.items():
            with context:
                found = losses(held)
            rows += [{"fold": fold, "by": by, "share": share, "group": g, "loss": a, "dense": b}
                     for g, a, b in zip(method.GROUPS, found, base, strict=True)]  # fmt: skip
    return rows


def bricks_of(fold: int, ids: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """FuncScores [F, L, f] and output magnitude by group [F, L, f], from the fold's windows to score from."""
    method, model = kit()
    rows = split(ids, fold)[1]
    group = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
    size = A[rows].mean(1) * method.lengths(model)
    return method.func_scores(A[rows.flatten()], group), size


def masks(kind: str, fold: int, scores: Tensor, size: Tensor, A: Tensor) -> list[tuple[str, int, Tensor]]:
    """(brick, draw, mask) of one kind."""
    method, _ = kit()
    own = method.top(scores)
    named = list(zip(method.GROUPS, own, strict=True))
    if kind == "brick":
        return [(name, 0, brick) for name, brick in named]
    if kind == "others":
        generator = torch.Generator().manual_seed(fold)
        random = [("random", d, method.top(torch.rand(own[0].shape, generator=generator))) for d in range(RANDOM)]
        return [("resident", 0, method.top(A.mean(0))), *random]
    of = {name: size.mean(0) if kind == "matched" else size[f] for f, name in enumerate(method.GROUPS)}
    seed, draws = 1000 * fold + (0 if kind == "matched" else 100), BLIND if kind == "blind" else MATCHED
    return [(name, d, method.matched(brick, of[name], seed + d)) for d in range(draws) for name, brick in named]


def damage(kind: str, fold: int, ids: Tensor, A: Tensor) -> list[dict]:
    """A row a mask and group; matched masks only on the group of the brick that they match.

    ``written``: of all that the neurons write for the group's windows (sum of magnitudes), the share removed."""
    method, model = kit()
    scored_from = split(ids, fold)[1]
    scores, size = bricks_of(fold, ids, A)
    held, rows = ids.flatten(0, 1)[split(ids, fold)[0][:, :EVALUATED]], []
    for name, draw, mask in masks(kind, fold, scores, size, A[scored_from.flatten()]):
        texts = [name] if kind.startswith("matched") else method.GROUPS
        at = [method.GROUPS.index(t) for t in texts]
        with method.removed(model, mask):
            found = losses(held[at])
        written = (size[at] * mask).sum((1, 2)) / size[at].sum((1, 2))
        what = {"fold": fold, "kind": kind, "brick": name, "draw": draw}
        for text, loss, share in zip(texts, found, written.tolist(), strict=True):
            rows.append(what | {"texts": text, "loss": loss, "written": round(share, 4)})
    return rows


def build(out: Path, work: Path, part: str = "all") -> list[Path]:
    kept, files = Work(work), []
    ids = torch.tensor(kept.once("windows", windows))
    write_tensors(out / "windows.safetensors", {"ids": ids.int()})
    files.append(out / "windows.safetensors")

    def table(name: str, rows: list[dict]) -> None:
        write_table(out / f"{name}.csv", pd.DataFrame(rows))
        files.append(out / f"{name}.csv")

    A = activations(work, ids)
    if part in ("all", "scores"):
        found = [kept.once(f"scores-{s}", partial(scored, s, ids, A)) for s in range(FOLDS)]
        for name in ("layers", "draws"):
            table(name, [row for one in found for row in one[name]])
        table("overlap", mean_of_draws([row for one in found for row in one["overlap"]]))
    if part in ("all", "masking"):
        found = [kept.once(f"masking-{s}-{i}", partial(masking, s, ids, SHARES[i : i + 3]))
                 for s in range(FOLDS) for i in (0, 3)]  # fmt: skip
        table("masking", [row for rows in found for row in rows])
    if part in ("all", "damage"):
        base = [kept.once(f"dense-{s}", partial(dense, s, ids)) for s in range(FOLDS)]
        rows = []
        for s in range(FOLDS):
            before = dict(zip(kit()[0].GROUPS, base[s], strict=True))
            for kind in ("brick", "others", "matched", "matched own", "blind"):
                found = kept.once(f"damage-{s}-{kind}", partial(damage, kind, s, ids, A["neurons"]))
                rows += [row | {"dense": before[row["texts"]]} for row in found]
        table("damage", rows)
    return files


def mean_of_draws(rows: list[dict]) -> list[dict]:
    """Of permuted labels only the mean over pairs, a row a draw."""
    table = pd.DataFrame(rows)
    null = table[table["kind"] == "permuted labels"].groupby(["fold", "kind", "draw"])["overlap"].mean().round(4)
    null = null.reset_index().assign(row="all", column="all")
    return pd.concat([table[table["kind"] != "permuted labels"], null])[table.columns].to_dict("records")


if __name__ == "__main__":
    run(build, __doc__, work=work_option(SLUG), part=part_option("scores", "masking", "damage"))
