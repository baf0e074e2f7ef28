"""Masks on a model: applied, taken off, held in training, rewound, stored; and what they save."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nbkit import sparsity as S
from nbkit.errors import LayerDidNotRun, LayerNotFound, NotFinite, NotFittedError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def net(device="cpu", seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(device)


def data(device="cpu"):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 1, 8, 8, generator=generator).to(device)
    return x, torch.randint(0, 3, (16,), generator=generator).to(device)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.cpu().numpy().tobytes() == b.cpu().numpy().tobytes()


def same_state(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[n], b[n]) for n in a)


def test_apply_zeroes_the_pruned_keeps_the_rest_to_the_bit_and_twice_is_once(device):
    model = net(device)
    before, masks = state(model), S.magnitude_mask(model, 0.6)
    assert masks.apply(model) is model
    once = state(model)
    for name in before:
        expected = before[name] if name not in masks else torch.where(masks[name].to(device), before[name], 0.0)
        assert same_bits(once[name], expected), name
    assert same_state(state(masks.apply(model)), once)


def test_remove_gives_back_the_dense_weights_even_after_training(device):
    model = net(device)
    before, masks = state(model), S.magnitude_mask(model, 0.6)
    masks.apply(model)
    masks.apply(model)
    with torch.no_grad():
        model.conv.weight.add_(1.0)
    masks.remove(model)
    assert same_state(state(model), before)
    with pytest.raises(NotFittedError, match="apply"):
        masks.remove(model)
    masks.apply(model, keep_original=False)
    with pytest.raises(NotFittedError):
        masks.remove(model)


def train(model, x, y, optimizer, steps=5, after=None):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if after:
            after()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_enforced_masks_hold_through_momentum_and_weight_decay(kind, device):
    model, (x, y) = net(device), data(device)
    make = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    }[kind]
    optimizer = make(model.parameters())
    train(model, x, y, optimizer)  # running means that would move a pruned weight even with no gradient
    masks = S.magnitude_mask(model, 0.5)

    def check():
        for name, mask in masks.items():
            parameter = dict(model.named_parameters())[name]
            pruned = ~mask.to(device)
            assert not parameter[pruned].any(), "exactly 0 after every step"
            assert not parameter.grad[pruned].any(), "no gradient"
            assert parameter.grad[~pruned].any()

    before = state(model)
    with masks.enforced(model):
        train(model, x, y, optimizer, after=check)
    assert not torch.equal(model.conv.weight, before["conv.weight"])
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert model.conv.weight.grad[~masks["conv.weight"].to(device)].any(), "the hooks are gone"
    optimizer.step()
    assert model.conv.weight[~masks["conv.weight"].to(device)].any()
    masks.post_step(model)
    assert not model.conv.weight[~masks["conv.weight"].to(device)].any()


def test_enforced_lets_go_after_an_exception(device):
    from torch.optim import optimizer as torch_optimizer

    model, hooks_before = net(device), len(torch_optimizer._global_optimizer_post_hooks)
    with pytest.raises(RuntimeError, match="stop"), S.magnitude_mask(model, 0.5).enforced(model):
        raise RuntimeError("stop")
    assert len(torch_optimizer._global_optimizer_post_hooks) == hooks_before
    assert not model.conv.weight._backward_hooks


def test_masks_of_ones_train_exactly_as_no_masks(device):
    plain, masked, (x, y) = net(device), net(device), data(device)
    train(plain, x, y, torch.optim.Adam(plain.parameters(), 1e-2))
    with S.magnitude_mask(masked, 0.0).enforced(masked):
        train(masked, x, y, torch.optim.Adam(masked.parameters(), 1e-2))
    assert same_state(state(plain), state(masked))


def test_rewind_is_initial_values_times_mask_bit_for_bit(device):
    model, (x, y) = net(device), data(device)
    initial = state(model)
    train(model, x, y, torch.optim.Adam(model.parameters(), 1e-2))
    masks = S.magnitude_mask(model, 0.7)
    masks.rewind(model, initial)
    for name, value in model.state_dict().items():
        expected = initial[name]
        if name in masks:
            expected = torch.where(masks[name].to(device), expected, torch.zeros_like(expected))
            assert torch.equal(value, initial[name] * masks[name].to(device))
        assert same_bits(value, expected), name


def test_rewind_refuses_a_state_that_does_not_fit_and_changes_nothing():
    model = net()
    masks, initial, before = S.magnitude_mask(model, 0.5), state(model), state(model)
    missing = {n: v + 1 for n, v in initial.items() if n != "norm.bias"}
    other = {n: v + 1 for n, v in initial.items()} | {"fc.bias": torch.zeros(7)}
    nan = {n: v + 1 for n, v in initial.items()} | {"fc.weight": torch.full((3, 4), torch.nan)}
    for bad, error, match in [
        (missing, ValueError, "norm.bias"), (initial | {"x": torch.ones(1)}, ValueError, "'x'"),
        (other, ValueError, r"'fc.bias' is \(3,\)"), (nan, NotFinite, "fc.weight"),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            masks.rewind(model, bad)
    assert same_state(state(model), before)


def test_masks_that_do_not_fit_are_refused_and_change_nothing():
    model = net()
    good = S.magnitude_mask(model, 0.5)
    before = state(model)
    shape = S.Masks({**good, "fc.weight": torch.zeros(3, 5, dtype=torch.bool)})
    name = S.Masks({**good, "fc.wieght": torch.zeros(3, 4, dtype=torch.bool)})
    for use in ("apply", "post_step"):
        with pytest.raises(ValueError, match=r"'fc.weight' has shape \(3, 5\), the weight \(3, 4\)"):
            getattr(shape, use)(model)
        with pytest.raises(LayerNotFound, match="did you mean 'fc.weight'"):
            getattr(name, use)(model)
    assert same_state(state(model), before)


def test_a_mask_is_binary():
    assert S.Masks({"w": torch.tensor([1.0, 0.0])})["w"].tolist() == [True, False]
    for bad in (torch.tensor([1.0, 0.5]), torch.tensor([0, 2]), torch.tensor([torch.nan, 1.0])):
        with pytest.raises(ValueError, match="not binary"):
            S.Masks({"w": bad})
    with pytest.raises(TypeError, match="must be a tensor"):
        S.Masks({"w": [True, False]})
    with pytest.raises(ValueError, match="at least one"):
        S.Masks({})


def test_masks_meet_compare_and_report():
    a = S.Masks({"w": torch.tensor([[True, True], [False, False]]), "v": torch.tensor([True])})
    b = S.Masks({"w": torch.tensor([[True, False], [True, False]]), "v": torch.tensor([True])})
    assert (a & b)["w"].tolist() == [[True, False], [False, False]]
    assert a == S.Masks(dict(a)) and a != b and a != "masks"
    assert a.sparsity == pytest.approx(2 / 5)
    report = a.report()
    assert report.loc["w"].to_dict() == {"shape": (2, 2), "weights": 4, "kept": 2, "density": 0.5}
    assert "sparsity 40.00%" in repr(a) and "50.00%" in a._repr_html_()
    with pytest.raises(KeyError, match="no mask of 'fc'; did you mean 'fc.weight'?"):
        S.Masks({"fc.weight": a["w"]})["fc"]
    with pytest.raises(ValueError, match="missing"):
        a & S.Masks({"w": a["w"]})
    with pytest.raises(ValueError, match="shapes"):
        a & S.Masks({"w": torch.ones(4), "v": torch.ones(1)})


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(0, 99))
def test_stored_masks_come_back_bit_for_bit(shapes, seed):
    import tempfile
    from pathlib import Path

    generator = torch.Generator().manual_seed(seed)
    masks = S.Masks({f"z{9 - i}.w": torch.rand(s, generator=generator) < 0.5 for i, s in enumerate(shapes)})
    with tempfile.TemporaryDirectory() as folder:
        path = masks.save(Path(folder) / "masks.safetensors")
        again = S.Masks.load(path)
        assert again == masks and list(again) == list(masks)
        assert [p.name for p in Path(folder).iterdir()] == ["masks.safetensors"], "no partial file is left"


def test_stored_masks_take_one_bit_a_weight_and_other_files_are_refused(tmp_path):
    masks = S.Masks({"w": torch.rand(800, 1000) < 0.5})
    assert masks.save(tmp_path / "m.safetensors").stat().st_size < 100_000 + 500
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no masks"):
        S.Masks.load(tmp_path / "other.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:50_000])
    with pytest.raises(ValueError, match="cannot be read"):
        S.Masks.load(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError):
        S.Masks.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no folder '.*runs'"):
        masks.save(tmp_path / "runs" / "m.safetensors")


def test_masks_travel_to_workers_without_the_weights():
    model = net()
    masks = S.magnitude_mask(model, 0.5)
    masks.apply(model)
    for twin in (pickle.loads(pickle.dumps(masks)), copy.deepcopy(masks)):
        assert twin == masks
        with pytest.raises(NotFittedError):
            twin.remove(model)


def test_multiply_adds_by_hand(device):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.Flatten(), nn.Linear(2 * 8 * 8, 5),
    ).to(device)  # fmt: skip
    x = torch.zeros(3, 2, 9, 9, device=device)
    masks = S.Masks({"1.weight": torch.arange(4 * 2 * 9).reshape(4, 2, 3, 3) < 10})
    table = S.flops(model, x, masks=masks)
    assert table["macs"].tolist() == [4 * 2 * 9 * 81, 4 * 2 * 9 * 16, 4 * 2 * 4 * 16, 128 * 5]
    assert table["macs_kept"].tolist() == [4 * 2 * 9 * 81, 10 * 16, 4 * 2 * 4 * 16, 128 * 5]
    assert table["positions"].tolist() == [81, 16, 16, 1]
    assert "kept" not in S.flops(model, x)


def test_multiply_adds_of_a_layer_over_tokens_and_one_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.idle = nn.Linear(6, 6), nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(self.fc(x))

    assert S.flops(Twice(), torch.zeros(4, 7, 6)).loc["fc"].to_dict() == {
        "type": "Linear", "weights": 36, "positions": 14, "macs": 504,
    }  # fmt: skip
    with pytest.raises(LayerDidNotRun, match="'idle'"):
        S.flops(Twice(), torch.zeros(4, 7, 6), masks=S.magnitude_mask(Twice(), 0.5))
    report = S.sparsity_report(Twice(), torch.zeros(4, 7, 6))
    assert report["macs"].tolist() == [504, 0, 504]
    with pytest.raises(NotFinite):
        S.flops(Twice(), torch.full((1, 7, 6), torch.nan))


def test_multiply_adds_of_attention_by_projection():
    class Across(nn.Module):
        def __init__(self):
            super().__init__()
            self.over = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
            self.within = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            others = x[:, :2, :6]
            return self.within(self.over(x, key=others, value=others)[0])

    model, x = Across(), torch.zeros(4, 5, 8)
    packed = torch.arange(24 * 8).view(24, 8) >= 8 * 8  # nothing of the queries
    masks = S.magnitude_mask(model, 0.5, "layer")
    table = S.flops(model, x, masks=S.Masks({**masks, "within.self_attn.in_proj_weight": packed}))
    assert table["macs"].to_dict() == {
        "over.q_proj": 64 * 5, "over.k_proj": 48 * 2, "over.v_proj": 48 * 2, "over.out_proj": 64 * 5,
        "within.self_attn.q_proj": 64 * 5, "within.self_attn.k_proj": 64 * 5, "within.self_attn.v_proj": 64 * 5,
        "within.self_attn.out_proj": 64 * 5, "within.linear1": 128 * 5, "within.linear2": 128 * 5,
    }  # fmt: skip
    kept = [64, 48, 48, 32, 0, 64, 64, 32, 64, 64]
    assert table["kept"].tolist() == kept
    report = S.sparsity_report(model, x)
    assert report["macs"].tolist() == [320, 320, 640, 640, 1920]


def test_the_report_counts_zeros_and_what_they_save():
    model = net()
    masks = S.magnitude_mask(model, 0.5)
    masks.apply(model)
    x, _ = data()
    report = S.sparsity_report(model, x)
    assert report.loc["total", ["weights", "nonzero"]].tolist() == [48, 24]
    assert report["nonzero"].iloc[:-1].tolist() == list(masks.kept().values())
    assert report.loc["total", "macs_kept"] == S.flops(model, x, masks=masks)["macs_kept"].sum()
    assert report.loc["total", "macs"] == 36 * 36 + 12
    assert "macs" not in S.sparsity_report(model)
    assert not model.conv._forward_hooks and model.training, "the model is as it was"
    assert np.isclose(report.loc["total", "density"], 0.5)


# --- masks that shrink, and masks of the same size


def shrinking(device, rounds=4):
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).to(device)
    masks = [S.Masks({name: torch.ones(w.shape, dtype=torch.bool) for name, w in S.prunable(net).items()})]
    for _ in range(rounds):
        masks.append(S.prune_surviving(masks[-1], S.magnitude(net), 0.3))
    return masks


def test_nested_masks_come_back_from_one_integer_a_weight(device):
    masks = shrinking(device)
    survived = S.rounds_survived(masks)
    assert {t.dtype for t in survived.values()} == {torch.uint8}
    assert [S.mask_of_round(survived, r) for r in range(5)] == masks


def test_masks_that_are_not_nested_have_no_such_count(device):
    dense, first, second, *_ = shrinking(device)
    with pytest.raises(ValueError, match="mask 2 keeps a weight that mask 1 had dropped"):
        S.rounds_survived([dense, second, first])
    with pytest.raises(ValueError, match="first mask must keep everything"):
        S.rounds_survived([first, second])
    with pytest.raises(ValueError, match="there are 1"):
        S.rounds_survived([dense])
    for r in (-1, 3):
        with pytest.raises(IndexError, match="rounds 0 to 2"):
            S.mask_of_round(S.rounds_survived([dense, first, second]), r)


def test_a_shuffled_mask_keeps_as_many_weights_of_every_layer_and_others(device):
    mask = shrinking(device)[-1]
    one, again, two = (mask.shuffled(seed) for seed in (0, 0, 1))
    assert one == again and one != two and one != mask
    assert one.kept() == two.kept() == mask.kept()
    places = torch.stack([mask.shuffled(seed)["0.weight"].float() for seed in range(400)]).mean(0)
    away = (places - mask["0.weight"].float().mean()).abs()
    assert away.max() < 0.12  # 5 standard deviations of a mean of 400
