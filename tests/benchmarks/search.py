"""Rows of the notebooks on search and proof: an archive of elites, bounds of many domains at once."""

from __future__ import annotations

from tests.benchmarks.rows import Row, row


@row("MAP-Elites archive, 40 x 40 cells, 20,000 arm poses in batches of 200", "pyribs", target=1.0)
def _():
    import numpy as np
    from ribs.archives import GridArchive

    from nbkit import papers, recipes

    method = papers.method("map-elites")
    domain = recipes.load("papers/map-elites/recipe.py").planar()
    run = method.search(domain, method.MapElites(domain, (40, 40)), 20_000, seed=0)
    batches = [slice(k, k + 200) for k in range(0, 20_000, 200)]

    def ours():
        archive = method.Archive((40, 40), domain.low, domain.high)
        for batch in batches:
            archive.insert(run.performance[batch], run.features[batch])
        return np.where(archive.elites >= 0, archive.performance, 0), run.genomes[archive.elites]

    def theirs():
        archive = GridArchive(solution_dim=12, dims=(40, 40), ranges=[(-1, 1), (-1, 1)], epsilon=0)
        for batch in batches:
            archive.add(run.genomes[batch], run.performance[batch], run.features[batch])
        found = archive.data(["index", "objective", "solution"], return_type="dict")
        performance, genomes = np.zeros(1600), run.genomes[np.full(1600, -1)]
        performance[found["index"]] = found["objective"]
        genomes[found["index"]] = found["solution"]
        return performance, genomes

    return Row(ours=ours, theirs=theirs, value=lambda result: np.column_stack(result))


@row("branch and bound, 30 questions, 8 splits: 510 domains", "one question at a time (10 of 30, times 3)", target=0.3)
def _():
    import torch

    from nbkit import papers, recipes

    method = papers.method("branch-and-bound-verification")
    _, net, asked, _, rate = recipes.load("papers/branch-and-bound-verification/recipe.py").stored("tanh")

    def proved(asked):
        return method.branch(net, asked, method.start(net, asked, steps=10, lr=rate), 8, lr=rate)[0][-1]

    def one_by_one():
        return torch.cat([proved({name: part[i : i + 1] for name, part in asked.items()}) for i in range(10)])

    return Row(ours=lambda: proved(asked), theirs=one_by_one, same_part=lambda bounds: bounds[:10], part=3, repeats=3)
