"""The method cells of the multifaceted-visualization notebook, used without the notebook."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.restoration import denoise_tv_bregman
from torch import nn
from torch.nn import functional as F

from nbkit import datasets, models, papers, recipes
from nbkit.errors import NotFinite

SLUG = "multifaceted-visualization"
method = papers.method(SLUG)
recipe = recipes.load(f"papers/{SLUG}/recipe.py")
NO_TV = [(8, np.inf, 0.0, 0.0)] * 200


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(n: int = 3) -> tuple[nn.Module, torch.Tensor]:
    """The shipped network in double precision, and means of ten images as starts."""
    net = models.load_checkpoint(papers.folder(SLUG) / "net.safetensors")[0].double().requires_grad_(False)
    x = datasets.load("fashion-mnist").x_train[: 10 * n].double()
    return net, x.view(n, 10, 1, 28, 28).mean(1)


def one_by_one(net: nn.Module, x0: torch.Tensor, unit: int, steps: list, room: int = 2) -> torch.Tensor:
    """The same steps as a plain torch loop: image after image, nothing batched, values of 0 to 255."""
    images = []
    for seed, start in enumerate(x0):
        canvas = F.pad(255 * start, [room] * 4)
        draws = torch.randn(len(steps), 2, generator=generator(seed))
        for (size, weight, margin, window), z in zip(steps, draws, strict=True):
            i, j = (room + 2 * room * window * z).clamp(0, 2 * room).int().tolist()
            x = canvas[None, :, i : i + start.shape[1], j : j + start.shape[2]].clone().requires_grad_()
            (g,) = torch.autograd.grad(net(x / 255)[0, unit], x)
            edge = round(margin * x.shape[3])
            if edge:
                mask = torch.zeros_like(g)
                mask[:, :, edge:-edge, edge:-edge] = 1
                g = g * mask
            x = (x.detach() + size * g / g.abs().mean()).clamp(0, 255)
            x = denoise_tv_bregman(x[0, 0].numpy(), weight=weight, max_num_iter=100, eps=1e-3)
            canvas[0, i : i + start.shape[1], j : j + start.shape[2]] = torch.from_numpy(x)
        images.append(canvas[:, room:-room, room:-room] / 255)
    return torch.stack(images)


def test_facets_together_are_facets_one_by_one_in_a_plain_loop():
    net, x0 = case()
    steps = method.schedule(40)
    images, trace = method.synthesise(net, x0, 0, steps=steps)
    torch.testing.assert_close(images, one_by_one(net, x0, 0, steps), rtol=0, atol=1e-9)
    assert trace.shape == (40, 3) and (trace[-1] > trace[0]).all()
    again = method.synthesise(net, x0[1:2], 0, steps=steps, seeds=[1])[0]
    torch.testing.assert_close(again[0], images[1], rtol=0, atol=1e-9)


def test_an_image_has_its_jitter_from_its_seed_alone():
    net, x0 = case(2)
    images = method.synthesise(net, x0[[0, 0]], 0, steps=method.schedule(40), seeds=[5, 5])[0]
    assert torch.equal(images[0], images[1])
    images = method.synthesise(net, x0[[0, 0]], 0, steps=method.schedule(40), seeds=[5, 6])[0]
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("seed", range(3))
def test_of_a_linear_unit_the_optimum_is_one_where_its_weight_is_positive(seed):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    w = torch.randn(16, generator=generator(seed))
    w += 0.3 * w.sign()  # none so small that 200 steps do not reach the end
    linear[1].weight = nn.Parameter(torch.stack([-w, w]))
    best = method.synthesise(linear, torch.rand(2, 1, 4, 4, generator=generator(seed)), 1, steps=NO_TV)[0]
    assert torch.equal(best.flatten(1), (w > 0).float().expand(2, -1))
    assert linear[1].weight.grad is None


def test_of_two_facets_a_start_reaches_the_one_it_is_near_and_the_middle_reaches_both():
    class Larger(nn.Module):
        def forward(self, x):
            return x.mean((1, 2)).amax(1, keepdim=True)  # the brighter column

    near = torch.full((3, 1, 2, 2), 0.5)
    near[0, ..., 0] = near[1, ..., 1] = 0.6
    best = method.synthesise(Larger(), near, 0, steps=NO_TV)[0]
    assert best[:, 0, 0].tolist() == [[1, 0.5], [0.5, 1], [1, 1]]


def test_one_facet_of_all_images_is_the_global_mean():
    x = torch.rand(40, 1, 6, 6, generator=generator())
    groups = method.facets(np.random.default_rng(0).normal(size=(40, 2)), 1, 40)[1]
    assert torch.equal(method.mean_images(x, groups)[0], x.mean(0))


def test_members_are_the_nearest_of_their_own_cluster():
    points = np.random.default_rng(1).normal(size=(60, 2)) + np.repeat([[0, 0], [9, 0], [0, 9]], 20, axis=0)
    labels, members = method.facets(points, 3, 4)
    for cluster, own in enumerate(members):
        assert (labels[own] == cluster).all() and len(own) == 4
        far = np.linalg.norm(points - points[labels == cluster].mean(0), axis=1)
        others = np.setdiff1d(np.flatnonzero(labels == cluster), own)
        assert far[own].max() <= far[others].min()
    assert sum(map(len, method.facets(points, 3, 99)[1])) == 60


def test_the_map_keeps_groups_apart_and_depends_on_the_seed_alone():
    codes = torch.randn(90, 60, generator=generator()) + 9 * torch.eye(60)[torch.arange(90) % 3]
    points = method.embed(codes)
    assert points.shape == (90, 2) and np.array_equal(points, method.embed(codes))
    labels = method.facets(points, 3)[0]
    assert all(len(set(labels[c::3])) == 1 for c in range(3)) and len(set(labels)) == 3


def test_a_step_does_not_depend_on_the_scale_of_the_unit():
    net, x0 = case(2)
    step, high = method.ascend(net, x0, 0, 1, 0.4, 0.2)
    again, higher = method.ascend(net, x0, lambda out: 8 * out[:, 0], 1, 0.4, 0.2)
    assert torch.equal(step, again) and torch.equal(8 * high, higher)


def test_a_margin_leaves_the_border_alone():
    net, x0 = case(1)
    moved = method.ascend(net, x0, 0, 1, np.inf, 0.2)[0] != x0
    assert moved[..., 6:-6, 6:-6].any()
    moved[..., 6:-6, 6:-6] = False
    assert not moved.any()


def test_denoising_keeps_a_constant_scales_with_the_range_and_treats_images_apart():
    assert torch.equal(method.denoise(torch.full((1, 1, 9, 9), 0.25), 0.4), torch.full((1, 1, 9, 9), 0.25))
    x = torch.rand(3, 2, 12, 12, generator=generator()).double()
    smooth = method.denoise(x, 0.1)
    bytes_ = denoise_tv_bregman(255 * x[2, 1].numpy(), weight=0.1, max_num_iter=100, eps=1e-3) / 255
    assert np.allclose(smooth[2, 1], bytes_, atol=1e-12)
    assert torch.equal(method.denoise(x[1:2], 0.1), smooth[1:2])
    rough = [method.denoise(x, w).diff(dim=3).abs().mean() for w in (0.01, 0.1, 1.0)]
    assert rough[0] < rough[1] < rough[2] < x.diff(dim=3).abs().mean()
    assert method.denoise(x, np.inf) is x


def test_the_schedule_and_the_slips_of_the_public_code():
    full, coded = method.schedule(370), method.schedule(370, coded=True)
    assert len(full) == len(coded) == 370 and len(method.schedule(7)) == 7
    assert {weight for _, weight, _, _ in full[:190]} == {0.4} and full[189][0] == pytest.approx(2, abs=0.01)
    assert {step for step, _, _, _ in coded[:190]} == {1}
    for i in (0, 100, 189):
        assert coded[i][1] == pytest.approx(0.4 - (0.4 - 0.4 * i) / 190)
    assert method.schedule(370, strength=0.3)[7][1] == pytest.approx(0.12)


def test_the_judge_names_and_measures():
    judge = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    real = torch.rand(6, 1, 2, 2, generator=generator())
    named, far = recipe.judged(judge, real[:2] + 0.5, recipe.features(judge, real))
    assert torch.equal(named, judge(real[:2] + 0.5).argmax(1))
    torch.testing.assert_close(far, torch.cdist((real[:2] + 0.5).flatten(1), real.flatten(1)).amin(1))
    assert recipe.judged(judge, real, recipe.features(judge, real))[1].max() < 1e-3


def test_bad_input_raises_and_changes_nothing():
    net, x0 = case(2)
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    start, steps = x0.clone(), method.schedule(2)
    points = np.zeros((9, 2))
    dead = nn.Sequential(nn.Flatten(), nn.Linear(784, 3), nn.ReLU()).double()
    nn.init.constant_(dead[1].bias, -99)

    def run(images=x0, unit=0, model=net, **other):
        return method.synthesise(model, images, unit, **{"steps": steps} | other)

    for call, error, words in (
        (lambda: method.embed(torch.rand(3, 5)), ValueError, "N >= 4"),
        (lambda: method.embed(torch.rand(9, 5), pca=0), ValueError, "pca"),
        (lambda: method.embed(torch.full((9, 5), float("nan"))), NotFinite, "codes"),
        (lambda: method.facets(points, 10), ValueError, "k in 1 to 9"),
        (lambda: method.facets(points, 0), ValueError, "k in 1"),
        (lambda: method.facets(points, 2, 0), ValueError, "m >= 1"),
        (lambda: method.mean_images(x0, []), ValueError, "every group"),
        (lambda: method.mean_images(x0, [np.array([], int)]), ValueError, "every group"),
        (lambda: method.mean_images(x0 * float("nan"), [[0]]), NotFinite, "x"),
        (lambda: method.denoise(x0, 0), ValueError, "positive"),
        (lambda: method.denoise(x0, float("nan")), ValueError, "positive"),
        (lambda: method.schedule(0), ValueError, "iterations"),
        (lambda: method.schedule(9, strength=0), ValueError, "strength"),
        (lambda: run(x0[0]), ValueError, "x0 must be"),
        (lambda: run(x0 + 1), ValueError, "0 to 1"),
        (lambda: run(x0 * float("nan")), NotFinite, "x0"),
        (lambda: run(unit=3), IndexError, "classes 0 to 2"),
        (lambda: run(steps=[]), ValueError, "needs steps"),
        (lambda: run(seeds=[1]), ValueError, "a seed a start"),
        (lambda: run(room=-1), ValueError, "room"),
        (lambda: run(model=dead), ValueError, "no gradient"),
    ):
        with pytest.raises(error, match=words):
            call()
    run()
    assert torch.equal(x0, start) and net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_in_the_stored_table_every_kind_has_five_pictures_of_every_network_and_unit():
    table = papers.results(SLUG)
    runs = table.groupby(["kind", "strength", "coded"], dropna=False).size()
    assert (runs == 6).all()
    assert table["named"].astype(str).str.zfill(5).str.len().eq(5).all()
    assert table["coverage"].between(0, 5).all() and (table.query("unit == 'footwear'")["coverage"] <= 3).all()
