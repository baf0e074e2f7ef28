"""The rows of ``make bench`` beside other libraries: the same computation by the kit and by what else one would use."""

from __future__ import annotations

import functools

from tests.benchmarks.rows import Row, row, seconds

VIT_LAYERS = [f"encoder.layer.{i}.mlp.activation_fn" for i in range(12)]
OCCLUDED_AT_ONCE = 8


@functools.cache
def efficientnet():
    """EfficientNet-Lite0 and one real photo, ``[1, 3, 224, 224]``."""
    from nbkit import datasets, models

    photo = datasets.load("photos")["chelsea"]
    return models.load("efficientnet-lite0"), models.transform("efficientnet-lite0")([photo])


@functools.cache
def vit():
    """The DINOv2-based ViT-S/14 (12 blocks, 1,536 hidden units each) and 8 pictures ``[8, 3, 112, 112]``."""
    from nbkit import datasets, models

    pictures = datasets.load("fashion-mnist").x_test[:8]
    return models.load("dinov2-small"), models.transform("dinov2-small", size=112, resize=112)(pictures)


@functools.cache
def classifying_vit():
    """The same backbone with a linear head on its class token, fitted for Fashion-MNIST."""
    import torch
    from torch import nn

    from nbkit import papers, recipes

    head = recipes.load("papers/neuron-path/recipe.py").ClassTokenProbe(384, 10)
    fitted = papers.tensors("neuron-path", "dinov2-probe")
    head.load_state_dict({name: fitted[name] for name in ("weight", "bias")})
    backbone, pictures = vit()
    with torch.no_grad():
        return nn.Sequential(backbone, head).eval(), pictures


@row("integrated gradients, EfficientNet-Lite0, 50 steps, 10 rows a batch", "captum", target=1.0)
def _():
    from captum.attr import IntegratedGradients

    from nbkit import attribution

    net, photo = efficientnet()
    reference = IntegratedGradients(net)
    return Row(
        ours=lambda: attribution.integrated_gradients(net, photo, 281, steps=50, batch=10),
        theirs=lambda: reference.attribute(photo, target=281, n_steps=50, internal_batch_size=10).detach().float(),
        repeats=4,
    )


@row("Grad-CAM, EfficientNet-Lite0, last convolution, 1 photo", "captum", target=1.0)
def _():
    from captum.attr import LayerGradCam

    from nbkit import attribution, hooks

    net, photo = efficientnet()
    reference = LayerGradCam(net, hooks.get_layer(net, "_conv_head"))
    return Row(
        ours=lambda: attribution.grad_cam(net, photo, 281, layer="_conv_head", relu=False),
        theirs=lambda: reference.attribute(photo, target=281).detach()[:, 0],
        value=lambda maps: maps.reshape(maps.shape[0], *maps.shape[-2:]),
        repeats=15,
    )


def _occlusion(at_once: int) -> Row:
    from captum.attr import Occlusion

    from nbkit import attribution

    net, photo = efficientnet()
    reference = Occlusion(net)
    windows = {"sliding_window_shapes": (3, 32, 32), "strides": (3, 32, 32)}
    return Row(
        ours=lambda: attribution.occlusion(net, photo, 281, window=32, batch=OCCLUDED_AT_ONCE),
        theirs=lambda: reference.attribute(photo, target=281, perturbations_per_eval=at_once, **windows).detach(),
        repeats=4,
    )


@row(f"occlusion, EfficientNet-Lite0, 49 windows of 32, {OCCLUDED_AT_ONCE} at once", "captum", target=1.0)
def _():
    return _occlusion(OCCLUDED_AT_ONCE)


@row("occlusion, the same, captum at its best of 1, 4, 8, 16 at once", "captum", target=0.7)
def _():
    tried = {at_once: _occlusion(at_once) for at_once in (1, 4, 8, 16)}
    return tried[min(tried, key=lambda at_once: seconds(tried[at_once].theirs))]


@row("input gradients of 1,536 hidden units, ViT-S, 1 picture of 112", "captum, 1 unit in 16 (times 16)", target=0.1)
def _():
    import torch
    from captum.attr import NeuronGradient

    from nbkit import hooks, neurons

    net, pictures = vit()
    layer = VIT_LAYERS[4]
    reference = NeuronGradient(net, hooks.get_layer(net, layer))
    units = range(0, 1536, 16)
    return Row(
        ours=lambda: neurons.input_gradients(net, pictures[:1], layer=layer)[0],
        theirs=lambda: torch.cat([reference.attribute(pictures[:1], neuron_selector=(0, j)) for j in units]),
        same_part=lambda gradients: gradients[::16],
        part=16,
        repeats=4,
    )


@row("neuron path, ViT-S, 12 layers, 20 steps, 1 picture of 112", "every step recomputed", target=1 / 1.5)
def _():
    import torch

    from nbkit import neurons

    net, pictures = classifying_vit()
    layers = [f"0.{name}" for name in VIT_LAYERS]
    find = functools.partial(neurons.neuron_path, net, pictures[:1], 8, layers, steps=20)
    return Row(
        ours=find,
        theirs=lambda: find(reuse=False),
        # a unit's number is compared as it stands: another unit is another path
        value=lambda found: torch.cat([found.path.flatten().double(), found.joint.double()]),
        repeats=4,
    )


@row("record 12 MLP layers, ViT-S, 8 pictures of 112", "the plain forward", target=1.05)
def _():
    import torch

    from nbkit import hooks

    net, pictures = vit()

    def recorded():
        with torch.no_grad(), hooks.record(net, VIT_LAYERS):
            return net(pictures).last_hidden_state

    def plain():
        with torch.no_grad():
            return net(pictures).last_hidden_state

    return Row(ours=recorded, theirs=plain, repeats=15)


def _permutation(net, x, y, n_repeats: int) -> Row:
    import numpy as np
    import torch
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.inspection import permutation_importance

    from nbkit import importance

    class Wrapped(ClassifierMixin, BaseEstimator):
        classes_ = np.arange(10)

        def fit(self, X, y):
            return self

        def predict(self, X):
            with torch.no_grad():
                return net(torch.from_numpy(np.ascontiguousarray(X))).argmax(1).numpy()

    table, labels = x.numpy(), y.numpy()
    return Row(
        ours=lambda: importance.permutation(net, x, y, scoring="accuracy", n_repeats=n_repeats, seed=0).values,
        theirs=lambda: permutation_importance(
            Wrapped(), table, labels, scoring="accuracy", n_repeats=n_repeats, random_state=0
        ).importances,
        repeats=4,
    )


@row("permutation importance, MLP 64-100-100-10, 1,797 rows, 5 repeats", "scikit-learn", target=1 / 3)
def _():
    from nbkit import datasets, models, training

    digits = datasets.load("digits")
    net = models.build("lenet-300-100", seed=0, inputs=64, hidden=(100, 100))
    x = digits.x.flatten(1)
    training.fit(net, (x, digits.y), steps=300, seed=0)
    return _permutation(net.eval(), x, digits.y, 5)


@row("permutation importance, LeNet-300-100 on MNIST, 1,000 rows, 1 repeat", "scikit-learn", target=1 / 3)
def _():
    from nbkit import datasets, models, training

    mnist = datasets.load("mnist")
    net = models.build("lenet-300-100", seed=0)
    training.fit(net, (mnist.x_train, mnist.y_train), steps=200, seed=0)
    return _permutation(net.eval(), mnist.x_test[:1000].flatten(1), mnist.y_test[:1000], 1)


@row("global magnitude mask, 21 M weights", "torch.nn.utils.prune", target=1.0, memory_target=1.0)
def _():
    import torch
    from torch import nn
    from torch.nn.utils import prune

    from nbkit import sparsity

    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(20)))

    def sharing(layer: nn.Linear) -> nn.Linear:
        """A module with the same weight, for torch's pruning to rearrange."""
        shell = nn.Linear(1, 1, bias=False)
        shell.weight = layer.weight
        return shell

    def summary(kept):
        """Number, sum and smallest of the kept magnitudes; which of several equal ones falls is each side's choice."""
        sizes = torch.cat([layer.weight.detach()[mask.bool()] for layer, mask in zip(net, kept, strict=True)]).abs()
        return torch.stack([torch.tensor(1.0 * len(sizes)), sizes.double().sum(), sizes.min()]).double()

    def theirs():
        layers = [(sharing(layer), "weight") for layer in net]
        prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.9)
        return [layer.weight_mask for layer, _ in layers]

    return Row(
        ours=lambda: list(sparsity.magnitude_mask(net, 0.9).values()),
        theirs=theirs,
        value=summary,
        repeats=4,
    )


@functools.cache
def stepped():
    """Breast tumours [569, 30] in steps of 1/64, which float32 holds as well as thresholds between them, and labels."""
    from nbkit import datasets

    table = datasets.load("breast-cancer")
    return (64 * table.X).round() / 64, table.y


@row("Shapley values, random forest of 100 trees, 200 rows of 30 features", "shap.TreeExplainer")
def _():
    import shap
    from sklearn.ensemble import RandomForestClassifier

    from nbkit import shapley

    X, y = stepped()
    forest = RandomForestClassifier(100, random_state=0).fit(X[:300], y[:300])
    rows, background = X[300:500], X[:50]
    reference = shap.TreeExplainer(forest, background.to_numpy())
    return Row(
        ours=lambda: shapley.explain(forest, rows, background=background, method="tree").values,
        theirs=lambda: reference.shap_values(rows.to_numpy(), check_additivity=False)[..., 1],
        repeats=4,
    )


@row("half the channels of EfficientNet-Lite0 (residual): grouped, cut, run", "torch-pruning", target=1.0)
def _():
    import copy

    import torch
    import torch_pruning

    from nbkit import forward, sparsity

    net, photo = efficientnet()
    photo = photo[..., :96, :96]

    def size(group):
        """The sum of |w| of each channel over the convolutions that make it."""
        total = torch.zeros(len(group[0].idxs))
        for dep, idxs in group:
            layer = dep.target.module
            if isinstance(layer, torch.nn.Conv2d) and dep.handler.__name__ == "prune_out_channels":
                total += layer.weight.detach().abs().flatten(1).sum(1)[idxs]
        return total

    def theirs():
        other = copy.deepcopy(net)
        settings = {"pruning_ratio": 0.5, "ignored_layers": [other._fc], "importance": size}
        torch_pruning.pruner.BasePruner(other, [photo], **settings).step()
        return other

    def outputs(model):
        with torch.no_grad(), forward.evaluating(model):
            return model(photo)

    return Row(ours=lambda: sparsity.structured(net, 0.5, example=photo), theirs=theirs, value=outputs, repeats=7)


@row("ablation of the 64 channels of a middle layer, 64 pictures", "a loop of hooks", target=0.6)
def _():
    import torch

    from nbkit import datasets, models, neurons

    net, x = models.load("vgg-small", seed=0).eval(), datasets.load("fashion-mnist").x_test[:64]
    layer = net.get_submodule("conv4")

    def silenced(channel):
        def hook(module, args, output):
            output = output.clone()
            output[:, channel] = 0
            return output

        handle = layer.register_forward_hook(hook)
        try:
            return net(x)[:, 0]
        finally:
            handle.remove()

    def theirs():
        with torch.no_grad():
            return torch.stack([silenced(channel) for channel in range(layer.out_channels)], 1) - net(x)[:, :1]

    return Row(ours=lambda: neurons.ablation_effect(net, x, 0, layer="conv4"), theirs=theirs, repeats=3)


@functools.cache
def tumours():
    """Breast tumours: a standardised table [569, 30] with labels, and the split at row 300."""
    from nbkit import datasets

    table = datasets.load("breast-cancer")
    return (table.X - table.X.mean()) / table.X.std(), table.y


@row("permutation Shapley values, MLP, 20 rows of 30 features, 50 background rows", "shap", target=1.0)
def _():
    import shap
    from sklearn.neural_network import MLPClassifier

    from nbkit import shapley

    X, y = tumours()
    net = MLPClassifier((64,), max_iter=200, random_state=0).fit(X.to_numpy(), y)
    rows, background = X.to_numpy()[:20], X.to_numpy()[100:150]
    masker = shap.maskers.Independent(background, max_samples=50)

    def theirs():
        explainer = shap.explainers.PermutationExplainer(lambda v: net.predict_proba(v)[:, 1], masker, seed=0)
        return explainer(rows, max_evals=10 * (2 * 30 + 1), silent=True).values

    return Row(
        ours=lambda: shapley.explain(net, rows, background, method="permutation", n_samples=10, seed=0).values,
        theirs=theirs,
        repeats=4,
    )


@row("interventional tree values, gradient booster, 200 rows, 50 background rows", "shap.TreeExplainer", target=1.0)
def _():
    import shap
    from sklearn.ensemble import GradientBoostingRegressor

    from nbkit import shapley

    X, y = stepped()
    booster = GradientBoostingRegressor(random_state=0).fit(X[:300], y[:300])
    rows, background = X[300:500], X[:50]
    return Row(
        ours=lambda: shapley.explain(booster, rows, background, method="tree").values,
        theirs=lambda: shap.TreeExplainer(booster, background.to_numpy()).shap_values(
            rows.to_numpy(), check_additivity=False
        ),
    )


@row("permutation importance, random forest of 100 trees, 269 rows of 30 features", "scikit-learn", target=1.0)
def _():
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.inspection import permutation_importance

    from nbkit import importance

    X, y = tumours()
    forest = RandomForestClassifier(100, random_state=0).fit(X[:300], y[:300])
    held = X[300:], y[300:]
    return Row(
        ours=lambda: importance.permutation(forest, *held, n_repeats=5, seed=0).values,
        theirs=lambda: permutation_importance(forest, *held, n_repeats=5, random_state=0).importances,
        repeats=4,
    )


@functools.cache
def language_mlp():
    """An MLP of SmolLM2 (576 wide, 1,536 hidden units), its sliced copy and a copy without the other units' columns."""
    import copy

    import torch

    from nbkit import models, papers

    whole = models.load("smollm2").model.layers[15].mlp
    core = torch.randperm(1536, generator=torch.Generator().manual_seed(0))[:614].sort().values  # 40 %
    masked = copy.deepcopy(whole).requires_grad_(False)
    masked.down_proj.weight[:, ~torch.isin(torch.arange(1536), core)] = 0
    return papers.method("coreinfer").sliced(whole, core), masked


def _sliced(texts: int, tokens: int):
    """One set for all tokens of a text. Texts have sets of their own: the whole MLP takes them all in one product."""
    import torch

    sliced, whole = language_mlp()
    x = torch.randn(texts, tokens, 576, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def many(run, calls=20):
        return [run() for _ in range(calls)][-1]

    return Row(
        ours=lambda: many(lambda: torch.stack([sliced(text) for text in x])),
        theirs=lambda: many(lambda: whole(x)),
        repeats=15,
    )


@row("MLP sliced to 40 % (coreinfer), SmolLM2, 1 token, 20 times", "the whole MLP")
def _():
    return _sliced(1, 1)


@row("MLP sliced to 40 %, 256 tokens of one text, 20 times", "the whole MLP")
def _():
    return _sliced(1, 256)


@row("MLP sliced to 40 %, 1 token of each of 2 texts, 20 times", "the whole MLP, both at once")
def _():
    return _sliced(2, 1)


@row("MLP sliced to 40 %, 1 token of each of 16 texts, 20 times", "the whole MLP, all at once")
def _():
    return _sliced(16, 1)


@row("concept deletion and insertion, 10 concepts, codes of 200 pictures at once", "a loop over pictures", target=1.0)
def _():
    import torch

    from nbkit import concepts, datasets, models, papers

    net, fashion = models.load("small-cnn", seed=0), datasets.load("fashion-mnist")
    maps = net[:10](fashion.x_test[:200]).detach()
    found = concepts.factorize(maps[:50], 10, method="nmf")
    codes, head = found.encode(maps), concepts.head_on_codes(net[10:], found)
    gains = papers.method("holistic-concepts").Gains(head)
    phi = torch.rand(200, 10, generator=torch.Generator().manual_seed(0))

    def ours():
        x = {"gain": torch.ones(200, 10), "codes": codes}
        how = {"steps": 10, "probability": False, "wrt": "gain"}
        return [curve(gains, x, phi, 0, **how).scores for curve in papers.method("holistic-concepts").CURVES]

    @torch.no_grad()
    def theirs():
        curves = torch.empty(2, 200, 11)
        for i, (code, order) in enumerate(zip(codes, phi.argsort(1, descending=True), strict=True)):
            ways = torch.ones(11, 10), torch.zeros(11, 10)
            for step, concept in enumerate(order, 1):
                ways[0][step:, concept] = 0
                ways[1][step:, concept] = 1
            for kind, way in enumerate(ways):
                curves[kind, i] = head(way[..., None, None] * code)[:, 0]
        return curves

    return Row(ours=ours, theirs=theirs, value=lambda curves: torch.stack(list(curves)), repeats=5)


@row("feature visualisation, 40 steps from 5 starts at once", "a plain torch loop, start by start", target=1.0)
def _():
    from nbkit import datasets, models, papers
    from tests.papers.test_multifaceted_visualization import one_by_one

    method = papers.method("multifaceted-visualization")
    net = models.load("small-cnn", seed=0).double().requires_grad_(False)
    starts = datasets.load("fashion-mnist").x_test[:50].view(5, 10, 1, 28, 28).mean(1).double()
    steps = method.schedule(40)
    return Row(
        ours=lambda: method.synthesise(net, starts, 0, steps=steps)[0],
        theirs=lambda: one_by_one(net, starts, 0, steps),
        repeats=5,
    )


@functools.cache
def photographs():
    """The ViT-S/14 on 4 photographs of 224 pixels, ``[4, 3, 224, 224]``: 256 patches and a class token each."""
    from nbkit import datasets, models

    photos = [datasets.load("photos")[name] for name in ("chelsea", "astronaut", "coffee", "rocket")]
    return models.load("dinov2-small"), models.transform("dinov2-small")(photos)


def tokens_by_block(keep: float) -> list[int]:
    """What enters each of 12 blocks where equal shares of the patches go before blocks 3, 6, 9; ``keep`` on average."""
    from scipy.optimize import brentq

    share = brentq(lambda r: (1 + r + r**2 + r**3) / 4 - keep, 0, 1)
    return [1 + round(256 * share ** (block // 3)) for block in range(12)]


def macs_left(keep: float) -> float:
    from nbkit import sparsity

    narrowed, whole = (
        sparsity.transformer_macs(tokens, width=384, hidden=1536).sum()
        for tokens in (tokens_by_block(keep), [257] * 12)
    )
    return narrowed / whole


def _narrowed(keep: float):
    import torch

    from nbkit import hooks

    net, photos = photographs()
    tokens = tokens_by_block(keep)

    def norms(k):
        """The k - 1 patches of the largest states, and the class token."""

        def choose(hidden):
            patches = 1 + hidden[:, 1:].norm(dim=-1).topk(k - 1).indices
            return torch.cat([torch.zeros_like(patches[:, :1]), patches], 1)

        return choose

    @torch.no_grad()
    def theirs():
        return net(photos).last_hidden_state

    def ours():
        with hooks.narrow(net, {f"encoder.layer.{block}": norms(tokens[block]) for block in (3, 6, 9)}):
            return theirs()

    # what comes out differs by design; that both give a class token is what is compared
    return Row(ours=ours, theirs=theirs, value=lambda states: torch.tensor(states[:, 0].shape), repeats=7)


for _keep in (0.9, 0.7, 0.5):

    @row(f"ViT-S/14 narrowed to {_keep:.0%} of its tokens, {macs_left(_keep):.0%} of the multiply-adds", "all tokens")
    def _(keep=_keep):
        return _narrowed(keep)


@row("SmolLM2 with LoRA (peft, rank 8 on all seven products) merged, 256 tokens", "the adapters beside it", target=1.0)
def _():
    import torch
    from peft import LoraConfig, get_peft_model

    from nbkit import models

    torch.manual_seed(0)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=linears, init_lora_weights=False)
    beside, merged = (get_peft_model(models.load("smollm2"), config).eval() for _ in range(2))
    merged.load_state_dict(beside.state_dict())
    merged = merged.merge_and_unload()
    ids = torch.arange(2, 258)[None]

    @torch.no_grad()
    def logits(net):
        return net(input_ids=ids).logits

    return Row(ours=lambda: logits(merged), theirs=lambda: logits(beside), repeats=5)


@row("gradient norms of 300 digits, lenet-conv", "a backward pass an example", target=0.7)
def _():
    import torch
    import torch.nn.functional as F

    from nbkit import datasets, models, training

    net = models.build("lenet-conv", seed=0)
    digits = datasets.load("mnist")
    x, y = digits.x_test[:300], digits.y_test[:300]

    def one_by_one():
        norms = []
        for i in range(len(y)):
            loss = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            norms.append(sum(g.square().sum() for g in gradients).sqrt())
        return torch.stack(norms)

    return Row(ours=lambda: training.gradient_norms(net, x, y), theirs=one_by_one)
