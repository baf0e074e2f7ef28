"""Sensitive neuron dropout: its scores against determinants, what each arm drops and when, and what is stored."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nbkit import hooks, models, papers, recipes, training
from nbkit.errors import LayerNotFound, NotFinite

send = papers.method("sensitive-neuron-dropout")
recipe = recipes.load("papers/sensitive-neuron-dropout/recipe.py")
SMALL = {"vocab": 32, "width": 8, "layers": 3, "heads": 2, "hidden": 12, "positions": 32}
LAYER = "model.layers.1"


NAME = "sensitive-neuron-dropout"


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    return models.build("tiny-llama", seed=0, **SMALL).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 32, (24, 10), generator=torch.Generator().manual_seed(0))


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# sensitivity


def test_a_coordinate_that_goes_0_1_0_has_four_ninths_and_a_still_one_0():
    V = send.sensitivity(torch.tensor([[[5.0, 0.0]], [[5.0, 1.0]], [[5.0, 0.0]]]))
    assert V[0] == 0 and V[1].item() == pytest.approx(4 / 9) and send.most(V, 50).tolist() == [1]


@pytest.mark.parametrize("seed", range(3))
def test_of_one_text_it_is_the_published_product(seed):
    e = drawn(5, 1, 12, seed=seed).double()
    published = np.abs(np.diff(e[:, 0], axis=0)).sum(0) * np.var(e[:, 0].numpy(), axis=0)
    np.testing.assert_allclose(send.sensitivity(e), published, rtol=1e-12)


def test_variance_runs_over_checkpoints_and_not_over_texts():
    e = drawn(1, 20, 6).expand(4, 20, 6)  # texts differ, checkpoints do not
    assert send.sensitivity(e).abs().max() < 1e-12
    moved = drawn(4, 20, 6)
    torch.testing.assert_close(send.sensitivity(moved), send.sensitivity(moved[:, torch.randperm(20)]))


@pytest.mark.parametrize(("K", "n"), [(20, 13), (5, 3), (50, 32), (99, 63)])
def test_the_top_k_percent_are_that_many_and_the_largest(K, n):
    V = drawn(64)
    found = send.most(V, K)
    rest = torch.ones(64, dtype=torch.bool)
    rest[found] = False
    assert len(found) == n and V[found].min() > V[rest].max()


# the score


def test_eigenscore_is_the_mean_logarithm_of_the_eigenvalues():
    Z = drawn(7, 5, 30).double()
    centred = Z - Z.mean(-1, keepdim=True)
    eigenvalues = np.linalg.eigvalsh((centred @ centred.mT).numpy() + 1e-3 * np.eye(5))
    np.testing.assert_allclose(send.eigenscore(Z), np.log(eigenvalues).mean(-1), rtol=1e-10)


def test_equal_answers_and_orthonormal_ones_have_the_scores_of_the_formulas():
    z = torch.tensor([1.0, 2.0, 6.0])  # centred square 14
    expected = (math.log(4 * 14 + 1e-3) + 3 * math.log(1e-3)) / 4
    assert send.eigenscore(z.expand(4, 3)).item() == pytest.approx(expected, abs=1e-6)
    basis = torch.linalg.qr(torch.cat([torch.ones(9, 1), drawn(9, 4)], 1).double()).Q[:, 1:].T
    assert abs(send.eigenscore(basis, 1e-12).item()) < 1e-10  # Sigma = I


def test_alpha_may_differ_from_matrix_to_matrix():
    Z, alpha = drawn(3, 4, 10), torch.tensor([0.1, 1.0, 10.0])
    one_by_one = [send.eigenscore(z, a).item() for z, a in zip(Z, alpha.tolist(), strict=True)]
    assert send.eigenscore(Z, alpha).tolist() == pytest.approx(one_by_one)
    assert send.ees(Z, alpha, probes=None).shape == (3,)


def test_no_eigenvalue_exceeds_the_bound():
    A = send.regularised(drawn(40, 10, 64))
    assert (torch.linalg.eigvalsh(A)[:, -1] <= send.bound(A) * (1 + 1e-12)).all()


def test_exact_traces_and_many_moments_give_the_determinant():
    Z = drawn(20, 10, 64)
    alpha = 0.02 * send.bound(send.regularised(Z))
    exact = send.eigenscore(Z, alpha)
    torch.testing.assert_close(send.ees(Z, alpha, M=400, probes=None), exact, rtol=1e-2, atol=0)
    errors = [(send.ees(Z, alpha, M=M, probes=None) - exact).abs().max() for M in (3, 10, 30, 100)]
    assert errors == sorted(errors, reverse=True)


def test_probes_are_right_on_average_and_leave_the_global_state_alone():
    Z = drawn(1, 10, 64)
    state = torch.random.get_rng_state()
    many = send.ees(Z.expand(2000, 10, 64), probes=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert abs(many.mean() - send.ees(Z, probes=None)[0]) < 4 * many.std() / 2000**0.5
    assert torch.equal(send.ees(Z, seed=3), send.ees(Z, seed=3)) and send.ees(Z, seed=3) != send.ees(
        Z, seed=4
    )


# texts as vectors


def test_an_embedding_is_half_the_mean_and_half_the_last_state(model, ids):
    with torch.no_grad():
        H = model(input_ids=ids, output_hidden_states=True).hidden_states[-2][:, 4:]
    torch.testing.assert_close(send.embed(model, ids, LAYER, start=4), (H.mean(1) + H[:, -1]) / 2)


def test_answers_are_embedded_without_their_prompt_and_under_the_mask(model, ids):
    Z = send.answers(model, ids[:3], LAYER, K_g=4, new=5, seed=1)
    assert Z.shape == (3, 4, 8) and torch.equal(Z, send.answers(model, ids[:3], LAYER, K_g=4, new=5, seed=1))
    with hooks.edit(model, {LAYER: [hooks.zero([2, 5])]}):
        masked = send.answers(model, ids[:3], LAYER, K_g=4, new=5, seed=1)
    assert not masked[..., [2, 5]].any() and masked[..., [0, 1, 3, 4, 6, 7]].all()


# training


def run(model, ids, arm, checkpoints=5, **options):
    settings = {"lr": 1e-2, "seed": 0, "K": 25, "checkpoints": checkpoints, "blocks": 1, "batch": 8} | options
    return list(send.continual(model, ids, ids[:4], LAYER, arm=arm, **settings))


def test_arms_part_after_c_checkpoints_and_drop_what_they_say(ids):
    found = {arm: run(models.build("tiny-llama", seed=0, **SMALL), ids, arm, blocks=2) for arm in send.ARMS}
    for arm, passes in found.items():
        for t in range(3):
            assert torch.equal(passes[t][1], found["normal"][t][1]) and not len(passes[t][2])
        assert arm == "normal" or not torch.equal(passes[3][1], found["normal"][3][1])
    history = torch.stack([e for _, e, _ in found["SenD"][:3]])
    assert torch.equal(found["SenD"][3][2], send.most(send.sensitivity(history), 25))
    assert len(found["random"][3][2]) == 2 and torch.equal(found["random"][3][2], found["random"][4][2])
    assert not len(found["dropout"][4][2])


def test_only_the_last_blocks_and_the_norm_are_trained(model, ids):
    before = training.state(model)
    run(model, ids, "SenD", checkpoints=1)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith(("model.layers.2.", "model.norm.")) for name in moved)


def test_the_embeddings_are_read_with_nothing_dropped(model, ids):
    *_, (_, e, indices) = run(model, ids, "SenD")
    assert len(indices) and e[:, indices].all()
    torch.testing.assert_close(e, send.embed(model, ids[:4], LAYER))


def test_ordinary_dropout_silences_a_share_and_keeps_the_mean():
    (edit,) = send.dropped("dropout", torch.tensor([]), 0.2, torch.Generator().manual_seed(0))
    net = torch.nn.Sequential(torch.nn.Identity())
    with hooks.edit(net, {"0": [edit]}):
        out = net(torch.ones(100, 1000))
    assert abs((out == 0).float().mean() - 0.2) < 0.01 and abs(out.mean() - 1) < 0.01
    assert send.dropped("normal", torch.tensor([]), 0.2, None) == []


# bad input


def test_bad_scores_are_refused():
    Z = drawn(2, 4, 8)
    for alpha in (0.0, -1.0, torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="alpha > 0"):
            send.eigenscore(Z, alpha)
    with pytest.raises(ValueError, match="two answers"):
        send.eigenscore(Z[:, :1])
    for settings in ({"M": 0}, {"probes": 0}):
        with pytest.raises(ValueError, match="a probe or more"):
            send.ees(Z, **settings)
    with pytest.raises(NotFinite):
        send.ees(Z * math.nan)


def test_bad_embeddings_and_shares_are_refused():
    with pytest.raises(ValueError, match="two checkpoints"):
        send.sensitivity(drawn(1, 4, 8))
    with pytest.raises(NotFinite):
        send.sensitivity(drawn(3, 4, 8) * math.inf)
    for K in (0, 100, -5, 150, 1):
        with pytest.raises(ValueError, match="K must"):
            send.most(drawn(8), K)


def test_bad_settings_leave_the_model_as_it_was(model, ids):
    before = training.state(model)
    for settings in (
        {"arm": "send"},
        {"arm": "SenD", "C": 1},
        {"arm": "SenD", "blocks": 0},
        {"arm": "SenD", "blocks": 4},
        {"arm": "SenD", "K": 0},
        {"arm": "SenD", "K": 100},
        {"arm": "SenD", "K": 5},  # not one of eight coordinates
    ):
        with pytest.raises(ValueError, match="need an arm|K must"):
            next(send.continual(model, ids, ids, LAYER, **({"lr": 1e-2, "seed": 0, "blocks": 1} | settings)))
    with pytest.raises(LayerNotFound):
        next(send.continual(model, ids, ids, "model.layers.9", arm="SenD", lr=1e-2, seed=0, blocks=1))
    for settings in ({"temperature": 0.0}, {"K_g": 1}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="K_g >= 2"):
            send.answers(model, ids, LAYER, **settings)
    with pytest.raises(ValueError, match="no token from 10"):
        send.embed(model, ids, LAYER, start=10)
    with pytest.raises(LayerNotFound):
        send.embed(model, ids, "model.layers.9")
    assert same(model, before) and all(p.requires_grad for p in model.parameters())


# what is stored


def test_four_runs_of_four_arms_have_nine_checkpoints():
    table = papers.results(NAME, "checkpoints")
    assert (table.groupby(["base", "order", "arm"]).size() == recipe.CHECKPOINTS + 1).all()
    assert len(table) == len(recipe.RUNS) * len(recipe.ARMS) * (recipe.CHECKPOINTS + 1)
    early = table[table["checkpoint"] <= recipe.C].groupby(["base", "order", "checkpoint"])["score"]
    assert (early.max() == early.min()).all()
    assert (table[table["checkpoint"] == recipe.C]["change"] == 0).all()


def test_the_summary_is_that_of_the_checkpoints():
    table = papers.results(NAME, "checkpoints").query(f"checkpoint > {recipe.C}")
    found = papers.results(NAME, "summary").set_index(["base", "order", "arm"])
    by = table.groupby(["base", "order", "arm"])
    np.testing.assert_allclose(found["spread"], by["score"].std(ddof=0).reindex(found.index), atol=1e-4)
    np.testing.assert_allclose(found["level, mask on"], by["masked"].mean().reindex(found.index), atol=1e-4)


def test_sampling_under_the_mask_is_the_arms_own_where_it_has_one():
    found = papers.results(NAME, "summary").set_index("arm")
    bare = found.loc[["normal", "dropout"]]
    np.testing.assert_allclose(bare["sampling, mask on"], bare["sampling"], atol=6e-4)
    own = found.loc[["SenD", "random"]]
    assert ((own["sampling, mask on"] - own["sampling"]).abs() > 6e-4).all()


def test_the_stored_sensitivities_are_those_of_the_stored_embeddings():
    stored, overlap = (
        papers.tensors(NAME),
        papers.results(NAME, "overlap"),
    )
    for V, first in zip(stored["V 0 0"], recipe.WINDOWS, strict=True):
        again = send.sensitivity(stored["normal"][first - 1 : first + 2].float())
        assert np.corrcoef(V, again)[0, 1] > 0.999
    sets = [set(send.most(V).tolist()) for V in stored["V 0 0"]]
    assert overlap.query("base == 0 and order == 0")["SEI 1-3 and 4-6"].item() == len(sets[0] & sets[1])


def test_every_rate_of_the_grid_and_every_mask_is_there():
    rates = papers.results(NAME, "rates")
    assert set(rates["lr"]) == set(recipe.RATES)
    masks = papers.results(NAME, "masks")
    assert (masks.groupby(["base", "order", "where"]).size() == 2 + recipe.DRAWS).all()
