"""Attention and its rollout: by hand, and on a transformers model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nbkit.attribution import attention_probabilities, attention_rollout
from nbkit.errors import LayerDidNotRun, LayerNotFound


class Attends(nn.Module):
    """Two layers whose attention is given, so that the rollout can be worked out by hand."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second, self.spare = nn.Identity(), nn.Identity(), nn.Identity()
        self.register_buffer("a", torch.tensor(first))
        self.register_buffer("b", torch.tensor(second))

    def forward(self, x):
        x = self.first(self.a.expand(len(x), -1, -1, -1))[:, 0] @ x
        return (self.second((x, self.b.expand(len(x), -1, -1, -1)))[1][:, 0] @ x).mean(1)


FIRST = [[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]  # mean over heads: [[.5, .5], [.5, .5]]
SECOND = [[[0.0, 1.0], [1.0, 0.0]]]


def test_by_hand(device):
    net, x = Attends(FIRST, SECOND).to(device), torch.randn(3, 2, 4, device=device)
    # (A + I) / 2 of each layer: [[.75, .25], [.25, .75]] and [[.5, .5], [.5, .5]]
    rollout = attention_rollout(net, x, layers=["first", "second"])
    assert rollout.shape == (3, 2, 2) and rollout.device.type == "cpu"
    assert rollout[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert attention_rollout(net, x, layers=["first"])[0].tolist() == [[0.75, 0.25], [0.25, 0.75]]
    without = attention_rollout(net, x, layers=["first", "second"], residual=0.0)
    assert without[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert attention_rollout(net, x, layers="second", residual=0.0, token=1)[0].tolist() == [1, 0]
    strongest = attention_rollout(net, x, layers="first", heads="max", residual=0.0)
    assert strongest[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]  # rows [1, 1] and [.5, .5], each made to sum to one


def test_probabilities_are_what_was_attended_in_the_order_asked_for():
    net, x = Attends(FIRST, SECOND), torch.randn(3, 2, 4)
    second, first = attention_probabilities(net, x, layers=["second", "first"])
    assert first.shape == (3, 2, 2, 2) and second.shape == (3, 1, 2, 2)
    assert first[1].tolist() == FIRST and second[2].tolist() == SECOND
    with pytest.raises(ValueError, match="no square attention"):
        attention_probabilities(nn.Sequential(nn.Linear(4, 4)), x, layers="0")


def test_in_inference_mode_both_give_ordinary_tensors():
    net, x = Attends(FIRST, SECOND), torch.randn(3, 2, 4)
    with torch.inference_mode():
        assert not attention_rollout(net, x, layers=["first", "second"]).is_inference()
        assert not attention_probabilities(net, x, layers="first")[0].is_inference()


def test_the_later_layer_multiplies_from_the_left():
    net, x = Attends([[[1.0, 0.0], [1.0, 0.0]]], SECOND), torch.randn(1, 2, 4)
    first = torch.tensor([[1.0, 0], [0.5, 0.5]])
    second = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    torch.testing.assert_close(attention_rollout(net, x, layers=["first", "second"])[0], second @ first)


def test_rows_sum_to_one_and_targets_do_not_matter():
    torch.manual_seed(0)
    net = Attends(torch.randn(4, 6, 6).softmax(-1).tolist(), torch.randn(2, 6, 6).softmax(-1).tolist())
    x = torch.randn(2, 6, 3)
    rollout = attention_rollout(net, x, 1, layers=["first", "second"])
    torch.testing.assert_close(rollout.sum(-1), torch.ones(2, 6))
    assert torch.equal(rollout, attention_rollout(net, x, layers=["first", "second"]))
    assert torch.equal(rollout[:, -1], attention_rollout(net, x, layers=["first", "second"], token=-1))


def test_a_transformers_model_is_asked_for_its_attentions(device):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    net = transformers.ViTForImageClassification(config).to(device)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16, device=device)}
    net.set_attn_implementation("sdpa")
    rollout = attention_rollout(net, inputs, token=0)
    assert net.config._attn_implementation == "sdpa"  # back to what it was
    net.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = net.eval()(**inputs, output_attentions=True).attentions
    expected = torch.eye(17, device=device).expand(2, 17, 17)
    for a in attentions:
        expected = (0.5 * a.mean(1) + 0.5 * torch.eye(17, device=device)) @ expected
    assert rollout.shape == (2, 17)
    torch.testing.assert_close(rollout, expected[:, 0].cpu())
    named = [n for n, m in net.named_modules() if type(m).__name__ == "ViTAttention"]
    assert len(named) == 3
    torch.testing.assert_close(attention_rollout(net, inputs, layers=named, token=0), rollout)


@pytest.mark.parametrize("attentions", [None, (), (torch.ones(1, 1, 2, 2), None)])
def test_a_model_that_is_asked_for_attentions_and_returns_none_is_refused(attentions):
    class Asked(nn.Module):
        def forward(self, x, output_attentions=False):
            return SimpleNamespace(logits=x, attentions=attentions)

    with pytest.raises(ValueError, match="Asked returned no attentions; name the attention layers"):
        attention_rollout(Asked(), torch.randn(1, 2, 4))


def test_what_is_no_attention_is_refused():
    net, x = Attends(FIRST, SECOND), torch.randn(1, 2, 4)
    with pytest.raises(ValueError, match="name its attention layers"):
        attention_rollout(nn.Linear(4, 4), x)
    with pytest.raises(ValueError, match="no square attention"):
        attention_rollout(nn.Sequential(nn.Linear(4, 4)), x, layers="0")
    with pytest.raises(LayerNotFound):
        attention_rollout(net, x, layers="third")
    with pytest.raises(LayerDidNotRun):
        attention_rollout(net, x, layers=["first", "spare"])
    with pytest.raises(IndexError, match="tokens 0 to 1"):
        attention_rollout(net, x, layers="first", token=2)
    with pytest.raises(ValueError, match="residual"):
        attention_rollout(net, x, layers="first", residual=1.0)
    with pytest.raises(ValueError, match="heads"):
        attention_rollout(net, x, layers="first", heads="sum")
