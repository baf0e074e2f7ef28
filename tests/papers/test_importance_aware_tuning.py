"""The method cells of the importance-aware-tuning notebook, used without the notebook."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nbkit import errors, papers, recipes

method = papers.method("importance-aware-tuning")
recipe = recipes.load("papers/importance-aware-tuning/recipe.py")
IDS = torch.randint(0, 40, (16, 12), generator=torch.Generator().manual_seed(0))


def llama(layers: int = 4, *, trained: bool = True, **options):
    """A random Llama with a LoRA; `trained` fills the B that begin at 0."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2
    )
    model = method.add_lora(LlamaForCausalLM(config), r=2, **options).eval()
    if trained:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
    return model


def adapters(model):
    """Copies of the adapters' weights, by layer."""
    return [
        [p.detach().clone() for m in layer for n, p in m.named_parameters() if "lora_" in n]
        for layer in method.responses(model)
    ]


def same(old, new) -> bool:
    return all(torch.equal(p, q) for p, q in zip(old, new, strict=True))


def test_a_new_lora_changes_nothing_and_every_block_has_its_seven_adapters():
    config = llama().get_base_model().config
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).eval()
    assert [len(layer) for layer in method.responses(llama())] == [7] * 4
    torch.testing.assert_close(llama(trained=False)(IDS).logits, plain(IDS).logits, rtol=0, atol=0)


def test_layers_come_in_the_order_of_their_numbers():
    model = llama(layers=12)
    blocks = model.get_base_model().model.layers
    for layer, block in zip(method.responses(model), blocks, strict=True):
        assert layer[0] is block.self_attn.q_proj


@pytest.mark.parametrize("beta", [0, 0.25, 1])
def test_beta_multiplies_the_response_of_the_chosen_layers(beta):
    model = llama()
    module = method.responses(model)[2][0]
    x = torch.randn(3, 16)
    base, whole = module.base_layer(x), module(x)
    with method.scaled(method.responses(model), [2], beta):
        torch.testing.assert_close(module(x), base + beta * (whole - base))
    assert torch.equal(module(x), whole)


def test_scales_come_back_after_an_error():
    model = llama()
    before = model(IDS).logits
    with pytest.raises(KeyError), method.scaled(method.responses(model), [0, 1], 0.25):
        raise KeyError
    assert torch.equal(model(IDS).logits, before)


def test_an_update_by_hand():
    """Rewards e^-1, e^-2, e^-3, of mean 0.1843; a quarter is p (1 - p) at a = 0."""
    sets = [torch.tensor(s) for s in ([0, 1], [0, 2], [1, 3])]
    found = method.updated(torch.zeros(4), sets, torch.tensor([1.0, 2.0, 3.0]), 10)
    torch.testing.assert_close(found, torch.tensor([0.3363, 0.1225, -0.1225, -0.3363]), rtol=0, atol=2e-4)
    scaled = method.updated(torch.zeros(4), sets, torch.tensor([1.0, 2.0, 3.0]), None)
    torch.testing.assert_close(scaled, found / 0.18434, rtol=1e-3, atol=0)


def test_with_mu_scaled_a_shift_of_all_losses_changes_nothing():
    sets = [torch.tensor(s) for s in ([0, 1], [0, 2], [1, 3])]
    losses = torch.tensor([1.0, 2.0, 3.0])
    near, far = (method.updated(torch.zeros(4), sets, losses + shift, None) for shift in (0, 5))
    torch.testing.assert_close(near, far)


def test_the_layer_that_helps_becomes_the_one_to_train():
    """One layer alone has a response, and damping it raises the loss."""
    sets = [torch.tensor(s) for s in ([0, 1], [1, 2], [2, 3])]
    losses = torch.tensor([3.0 if 2 in s else 2.0 for s in sets])
    a = method.updated(torch.zeros(4), sets, losses, 10)
    assert a.argmin() == 2 and (-a).sigmoid().argmax() == 2
    assert a[0] > 0


def test_beta_1_teaches_nothing_and_the_model_is_as_before():
    model = llama().train()
    layers = method.responses(model)
    before = model(IDS).logits
    settings = {"N_c": 3, "N_s": 2, "mu": 10, "generator": torch.Generator().manual_seed(0)}
    a, sets, losses = method.compare(model, layers, IDS, torch.zeros(4), beta=1, **settings)
    assert torch.equal(losses, losses[:1].expand(3)) and a.abs().max() < 1e-6
    a, _, _ = method.compare(model, layers, IDS, torch.zeros(4), beta=0, **settings)
    assert a.abs().max() > 1e-4
    assert model.training and torch.equal(model(IDS).logits, before)


def test_draws_follow_the_weights_and_never_repeat_a_layer():
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    n = 20_000
    ones = torch.cat([method.draw(weights, 1, generator) for _ in range(n)]).bincount(minlength=4) / n
    assert ((ones - weights).abs() < 4 * (weights * (1 - weights) / n).sqrt()).all()
    for _ in range(50):
        drawn = method.draw(weights, 3, generator)
        assert drawn.tolist() == sorted(set(drawn.tolist())) and len(drawn) == 3


def test_candidate_sets_differ():
    sets = method.candidates(torch.zeros(4), 6, 2, torch.Generator().manual_seed(0))
    assert sorted(map(tuple, (s.tolist() for s in sets))) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_all_layers_drawn_is_plain_lora_bit_for_bit():
    settings = {"lr": 0.01, "steps": 12, "seed": 0, "N_s": 2, "T_I": 4}
    one, other = llama(), llama()
    losses = [loss for *_, loss in method.tune(one, IDS, sampler="IST", N_u=4, **settings)]
    plain = [loss for *_, loss in method.tune(other, IDS, sampler="fixed", fixed=range(4), **settings)]
    assert losses == plain
    assert all(same(p, q) for p, q in zip(adapters(one), adapters(other), strict=True))


def test_only_the_drawn_layers_move_and_never_the_base():
    model = llama()
    base = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    old = adapters(model)
    run = method.tune(model, IDS, sampler="IST", N_u=1, N_s=2, T_I=3, lr=0.01, steps=9, seed=0)
    for _, chosen, _ in run:
        new = adapters(model)
        moved = [i for i in range(4) if not same(old[i], new[i])]
        assert moved == chosen and len(chosen) == 1
        old = new
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


def test_rst_keeps_a_at_0_and_a_changes_only_every_T_I():
    settings = {"lr": 0.01, "steps": 9, "seed": 0, "N_s": 2, "T_I": 3}
    assert all(not a.any() for a, *_ in method.tune(llama(), IDS, sampler="RST", **settings))
    scores = [a for a, *_ in method.tune(llama(), IDS, sampler="IST", mu=None, **settings)]
    changed = [i for i in range(1, 9) if not torch.equal(scores[i], scores[i - 1])]
    assert changed == [3, 6]


def test_left_out_is_the_rise_of_the_loss_where_one_layers_adapters_are_gone():
    model = llama()
    rises = recipe.left_out(method, model, IDS)
    before = torch.nn.functional.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    for module in method.responses(model)[1]:
        module.lora_B["default"].weight.data.zero_()
    after = torch.nn.functional.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert rises[1] == pytest.approx((after - before).item(), abs=2e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: method.add_lora(torch.nn.Sequential(torch.nn.Linear(2, 2)), r=0), "positive"),
        (lambda: method.responses(torch.nn.Linear(2, 2)), "numbered blocks"),
        (lambda: method.draw(torch.ones(3), 4, torch.Generator()), "4 of 3"),
        (lambda: method.candidates(torch.zeros(4), 1, 2, torch.Generator()), "N_c"),
        (lambda: method.candidates(torch.zeros(4), 7, 2, torch.Generator()), "7 different"),
        (lambda: method.updated(torch.zeros(4), [torch.tensor([0])], torch.ones(2)), "1 sets, 2 losses"),
        (lambda: next(method.tune(llama(), IDS, sampler="ist", lr=0.1, steps=1, seed=0)), "IST"),
        (lambda: next(method.tune(llama(), IDS, sampler="RST", lr=0.1, steps=1, seed=0, N_u=5, N_s=2)), "5 of 4"),
        (lambda: next(method.tune(llama(), IDS, sampler="RST", lr=0.1, steps=1, seed=0, batch=17)), "within"),
        (lambda: next(method.tune(llama(), IDS, sampler="fixed", lr=0.1, steps=1, seed=0, N_s=2)), "fixed with layers"),
        (lambda: next(method.tune(llama(), IDS, sampler="fixed", fixed=(0, 4), lr=0.1, steps=1, seed=0)), "4 layers"),
    ],
)
def test_bad_settings_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_beta_outside_0_to_1_and_a_loss_that_is_no_number_are_refused():
    model = llama()
    with pytest.raises(ValueError, match="beta"), method.scaled(method.responses(model), [0], 2):
        pass
    with pytest.raises(errors.NotFinite):
        method.updated(torch.zeros(4), [torch.tensor([0])] * 2, torch.tensor([1.0, float("nan")]))
