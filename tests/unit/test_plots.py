"""Figures: what they draw is what they were given, and what cannot be drawn is refused by name."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from nbkit import plots
from nbkit.errors import NotFinite


@pytest.fixture
def fig():
    figure = Figure(figsize=(4, 3), dpi=50)
    FigureCanvasAgg(figure)
    return figure


@pytest.fixture
def ax(fig):
    return fig.subplots()


def drawn(ax):
    """Everything on the figure is rendered once: an artist that cannot be drawn fails here."""
    ax.figure.canvas.draw()
    return ax


def test_style_sets_the_palette_and_keeps_what_it_does_not_name():
    with matplotlib.rc_context():
        matplotlib.rcParams["lines.markersize"] = 17
        plots.style()
        cycle = [entry["color"] for entry in matplotlib.rcParams["axes.prop_cycle"]]
        assert cycle == list(plots.PALETTE)
        assert matplotlib.rcParams["figure.dpi"] == 100
        assert matplotlib.rcParams["lines.markersize"] == 17


# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0, on linear RGB
COLOUR_BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


def nearest_pair(colours, seen):
    """The smallest CIELAB distance between two of the colours, as seen with the given eyes."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    rgb = np.array([to_rgb(colour) for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.array(seen).T, 0, 1)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    lab = rgb2lab(rgb)
    return min(deltaE_ciede2000(lab[i], lab[j]) for i in range(len(lab)) for j in range(i))


@pytest.mark.parametrize("eyes", COLOUR_BLIND)
def test_the_palette_stays_apart_for_colour_blind_eyes(eyes):
    usual = [f"C{i}" for i in range(len(plots.PALETTE))]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        assert nearest_pair(plots.PALETTE, COLOUR_BLIND[eyes]) > nearest_pair(usual, COLOUR_BLIND[eyes])
    assert nearest_pair(plots.PALETTE, COLOUR_BLIND[eyes]) > 10


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3), (3, 6, 8), (1, 6, 8), (6, 8, 1)])
def test_an_image_may_have_its_channels_first_or_last(ax, device, shape):
    values = torch.rand(shape, device=device, requires_grad=True)
    assert drawn(plots.show_image(ax, values, "a title")) is ax
    shown = ax.images[0].get_array()
    assert shown.shape[:2] == (6, 8)
    flat = values.detach().cpu().numpy().squeeze()
    assert np.allclose(np.sort(shown.ravel()), np.sort(flat.ravel()))
    assert ax.get_title() == "a title"


def test_bytes_and_normalised_inputs_are_brought_to_zero_one(ax):
    plots.show_image(ax, np.array([[0, 51, 255]], dtype=np.uint8))
    assert np.allclose(ax.images[-1].get_array(), [[0, 0.2, 1]])
    plots.show_image(ax, np.array([[-2.0, 0.0, 2.0]]))
    assert np.allclose(ax.images[-1].get_array(), [[0, 0.5, 1]])
    plots.show_image(ax, np.full((2, 2), 7.0))
    assert np.allclose(ax.images[-1].get_array(), 0)


def test_limits_are_symmetric_where_values_have_two_signs(ax, fig):
    plots.heatmap(ax, torch.tensor([[-1.0, 3.0]], dtype=torch.bfloat16))
    image = ax.images[0]
    assert image.get_clim() == (-3, 3)
    assert image.get_cmap().name == plots.DIVERGING
    assert np.allclose(image.get_cmap()(0.5)[:3], 1, atol=0.05)  # zero is white


@pytest.mark.parametrize(
    ("values", "choice", "limits"),
    [
        ([[1.0, 3.0]], {}, (0, 3)),
        ([[1.0, 3.0]], {"diverging": True}, (-3, 3)),
        ([[1.0, 3.0]], {"limit": 5.0}, (0, 5)),
        ([[-1.0, 3.0]], {"limit": 5.0}, (-5, 5)),
        ([[-3.0, -1.0]], {}, (-3, -1)),
        ([[-3.0, 1.0]], {"diverging": False}, (-3, 1)),
        ([[0.0, 0.0]], {}, (0, 1)),
    ],
)
def test_colour_limits(ax, values, choice, limits):
    plots.heatmap(ax, values, **choice)
    assert drawn(ax).images[0].get_clim() == limits


def test_a_heatmap_labels_its_axes_and_its_colours(ax, fig):
    plots.heatmap(ax, np.eye(3), "found", label="weight", xlabel="unit", ylabel="token")
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("found", "unit", "token")
    assert fig.axes[1].get_ylabel() == "weight"


def test_an_overlay_is_opaque_where_the_map_is_strong_and_clear_where_it_is_zero(ax):
    heat = torch.zeros(4, 4)
    heat[0, 0] = 2.0
    drawn(plots.overlay(ax, torch.rand(3, 32, 32), heat, alpha=0.6))
    rgba = ax.images[1].get_array()
    assert rgba.shape == (32, 32, 4)
    assert rgba[0, 0, 3] == pytest.approx(0.6)
    assert rgba[-1, -1, 3] == 0
    grey = ax.images[0].get_array()
    assert grey.shape == (32, 32)


def test_a_signed_overlay_shows_both_signs(ax):
    plots.overlay(ax, np.zeros((10, 10)), [[-1.0, 1.0]], alpha=1.0)
    rgba = ax.images[1].get_array()
    assert rgba[5, 0, 3] == rgba[5, -1, 3] == 1.0
    assert rgba[5, 0, 2] > rgba[5, 0, 0]  # blue below zero
    assert rgba[5, -1, 0] > rgba[5, -1, 2]  # red above


@pytest.mark.parametrize("heat", [[[-2.0, -1.0, 0.0]], [[-3.0, -1.5]], [[0.0, 0.0]]])
def test_an_overlay_of_nothing_positive_is_opaque_where_it_is_lowest(ax, heat):
    plots.overlay(ax, np.zeros((1, len(heat[0]))), heat, alpha=1.0)
    opacity = ax.images[1].get_array()[0, :, 3].tolist()
    assert opacity == pytest.approx(np.abs(heat[0]) / (np.abs(heat).max() or 1))


def test_a_gallery_has_one_axes_a_picture(fig):
    axes = plots.gallery(fig, [np.eye(4)] * 5, [f"n {i}" for i in range(5)], columns=3)
    assert [ax.get_title() for ax in axes] == ["n 0", "n 1", "n 2", "n 3", "n 4"]
    assert len(fig.axes) == 5


def test_layer_density_lists_layers_from_the_top_in_percent(ax):
    drawn(plots.layer_density(ax, {"conv1": 0.5, "head": torch.tensor(0.012)}))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["conv1", "head"]
    assert [text.get_text() for text in ax.texts] == ["50 %", "1.2 %"]
    assert ax.yaxis_inverted()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda ax: plots.show_image(ax, np.zeros((2, 5, 7))), ValueError, r"\(2, 5, 7\).*\[3, H, W\]"),
        (lambda ax: plots.show_image(ax, np.zeros((0, 3))), ValueError, "image is empty"),
        (lambda ax: plots.show_image(ax, [[np.nan, 1.0]]), NotFinite, "image holds 1 NaN"),
        (lambda ax: plots.heatmap(ax, np.zeros(3)), ValueError, r"values has shape \(3,\); it must have 2 axes"),
        (lambda ax: plots.heatmap(ax, [["a"]]), ValueError, "values must hold numbers"),
        (lambda ax: plots.heatmap(ax, np.eye(2), limit=0), ValueError, "limit must be positive, not 0"),
        (lambda ax: plots.overlay(ax, np.eye(2), np.zeros((1, 2, 2))), ValueError, "heat has shape"),
        (lambda ax: plots.overlay(ax, np.eye(2), np.eye(2), alpha=0), ValueError, r"alpha must lie in \(0, 1\]"),
        (lambda ax: plots.gallery(ax.figure, []), ValueError, "at least one picture"),
        (lambda ax: plots.gallery(ax.figure, [np.eye(2)], ["a", "b"]), ValueError, "1 pictures but 2 titles"),
        (lambda ax: plots.gallery(ax.figure, [np.eye(2)], columns=0), ValueError, "columns"),
        (lambda ax: plots.layer_density(ax, {"conv1": 1.5}), ValueError, "'conv1' keeps a share of 1.5"),
        (lambda ax: plots.layer_density(ax, {}), ValueError, "no layers"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(ax, call, error, message):
    with pytest.raises(error, match=message):
        call(ax)


def test_contributions_lead_from_the_base_to_the_total(ax):
    plots.contributions(ax, {"a": 1.0, "b": -3.0, "c": 0.5}, base=10.0, xlabel="y")
    labels = [label.get_text() for label in ax.get_yticklabels()]
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    assert labels == ["c   +0.5", "a   +1", "b   -3"]
    assert bars == [(10.0, 0.5), (10.5, 1.0), (11.5, -3.0)]
    drawn(ax)


def test_contributions_join_the_smallest_parts(ax):
    plots.contributions(ax, {"a": 1.0, "b": -3.0, "c": 0.5, "d": 0.25}, base=0.0, xlabel="y", most=3)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["2 more   +0.75", "a   +1", "b   -3"]
    assert [bar.get_width() for bar in ax.patches] == [0.75, 1.0, -3.0]


@pytest.mark.parametrize(
    ("parts", "options", "error"),
    [({}, {}, ValueError), ({"a": 1.0}, {"most": 0}, ValueError), ({"a": float("nan")}, {}, NotFinite),
     ({"a": 1.0}, {"base": float("inf")}, NotFinite)],
)  # fmt: skip
def test_contributions_refuse_what_cannot_be_drawn(ax, parts, options, error):
    with pytest.raises(error):
        plots.contributions(ax, parts, **{"base": 0.0, "xlabel": "y", **options})


# --- measured tables


@pytest.fixture
def table():
    rows = [(method, seed, value + seed) for method, value in (("ours", 3.0), ("rival", 1.0)) for seed in range(3)]
    return pd.DataFrame(rows, columns=["method", "seed", "accuracy"])


def test_means_are_bars_with_every_seed_as_a_point_in_the_methods_colour(ax, table):
    palette = plots.colours(["rival", "ours"])
    drawn(plots.means(ax, table, x="method", y="accuracy", palette=palette, reference=2.0))
    assert [bar.get_height() for bar in ax.patches] == [4.0, 2.0]
    assert [to_hex(bar.get_facecolor()).upper() for bar in ax.patches] == [palette["ours"], palette["rival"]]
    points = np.concatenate([dots.get_offsets()[:, 1] for dots in ax.collections])
    assert sorted(points) == sorted(table.accuracy)
    assert ax.get_legend().get_texts()[0].get_text() == "chance"


def test_means_lie_down_where_x_holds_the_numbers_and_draw_the_same_twice(fig, table):
    left, right = fig.subplots(1, 2)
    before = np.random.get_state()[1].copy()
    for ax in (left, right):
        plots.means(ax, table, x="accuracy", y="method", order=["rival", "ours"])
    assert [bar.get_width() for bar in left.patches] == [2.0, 4.0]
    first, second = (np.concatenate([dots.get_offsets() for dots in ax.collections]) for ax in (left, right))
    assert np.array_equal(first, second)
    assert np.array_equal(np.random.get_state()[1], before)


def test_means_side_by_side_by_hue(ax, table):
    both = pd.concat([table.assign(budget="short"), table.assign(budget="long", accuracy=table.accuracy + 1)])
    drawn(plots.means(ax, both, x="method", y="accuracy", hue="budget"))
    assert sorted(bar.get_height() for bar in ax.patches if bar.get_height()) == [2.0, 3.0, 4.0, 5.0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["short", "long"]


def test_means_refuse_what_they_cannot_draw(ax, table):
    with pytest.raises(KeyError, match="no column 'acuracy'.*accuracy"):
        plots.means(ax, table, x="method", y="acuracy")
    with pytest.raises(NotFinite, match="1 NaN"):
        plots.means(ax, table.assign(accuracy=[np.nan, 1, 1, 1, 1, 1]), x="method", y="accuracy")
    with pytest.raises(ValueError, match="neither"):
        plots.means(ax, table.assign(accuracy="high"), x="method", y="accuracy")
    with pytest.raises(ValueError, match="empty"):
        plots.means(ax, table.iloc[:0], x="method", y="accuracy")


def test_colours_stay_with_their_names_and_references_are_grey():
    palette = plots.colours(["a", "b", "chance", "a"], grey=["chance"])
    assert list(palette) == ["a", "b", "chance"]
    assert [palette["a"], palette["b"]] == list(plots.PALETTE[:2])
    assert len(set(to_rgb(palette["chance"]))) == 1
    with pytest.raises(ValueError, match="8 names in colour"):
        plots.colours("abcdefgh"[i] for i in range(8))
    with pytest.raises(TypeError, match="not one text"):
        plots.colours("ours")


def test_percent_and_logarithmic_ticks_read_as_numbers(ax):
    ax.plot([1, 300], [0.2, 0.8])
    plots.percent(ax)
    plots.log_ticks(ax, "x")
    drawn(ax)
    low, high = ax.get_xlim()
    shown = [t.get_text() for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert shown == ["1", "2", "5", "10", "20", "50", "100", "200"]
    assert "40%" in [text.get_text() for text in ax.get_yticklabels()]
    with pytest.raises(ValueError, match="'z'"):
        plots.percent(ax, "z")


def test_thousands_are_short_on_a_wide_logarithmic_axis(ax):
    ax.plot([1, 2e6], [0, 1])
    drawn(plots.log_ticks(ax))
    assert {"1", "1k", "1M"} <= {text.get_text() for text in ax.get_xticklabels()}


def test_one_legend_names_the_lines_of_all_panels_once(fig):
    for ax, labels in zip(fig.subplots(1, 2), (["a", "b"], ["b", "c"]), strict=True):
        for label in labels:
            ax.plot([0, 1], label=label)
        ax.legend()
    found = plots.legend(fig)
    assert [text.get_text() for text in found.get_texts()] == ["a", "b", "c"]
    assert all(ax.get_legend() is None for ax in fig.axes)
    with pytest.raises(ValueError, match="nothing to name|anything to name"):
        plots.legend(Figure())


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_direct_labels_stand_at_the_ends_of_seaborns_lines_and_apart(ax, table, scale):
    import seaborn as sns

    long = pd.concat([table.assign(size=size, accuracy=table.accuracy / 100 + size) for size in (1, 10)])
    sns.lineplot(long, x="size", y="accuracy", hue="method", palette=plots.colours(["ours", "rival"]), ax=ax)
    ax.set_xscale(scale)
    drawn(plots.direct_labels(ax))
    texts = {text.get_text(): text for text in ax.texts}
    assert set(texts) == {"ours", "rival"} and ax.get_legend() is None
    boxes = [text.get_window_extent() for text in texts.values()]
    assert not boxes[0].overlaps(boxes[1])
    end = ax.transData.transform((10, 10))[0]
    assert all(end < box.x0 < end + 30 and box.x1 < ax.bbox.x1 + 2 for box in boxes)
    assert texts["ours"].get_position()[1] > texts["rival"].get_position()[1]


def test_figures_that_lay_themselves_out_do_not_warn(recwarn):
    import matplotlib.pyplot as plt
    import networkx
    import seaborn

    plots.style()
    table = pd.DataFrame({"x": [0, 1, 0, 1], "y": [0, 1, 1, 2], "part": list("aabb")})
    seaborn.relplot(table, x="x", y="y", col="part", height=2)
    plt.gcf().canvas.draw()
    plt.figure()
    networkx.draw(networkx.path_graph(3))
    plt.gcf().canvas.draw()
    plt.close("all")
    assert [str(w.message) for w in recwarn if "layout" in str(w.message)] == []


def test_a_figure_is_described_by_its_titles_and_without_them_by_its_axes(fig):
    left, right = fig.subplots(1, 2)
    left.set(xlabel="sparsity", ylabel="accuracy")
    right.axis("off")
    assert plots.description(fig) == "accuracy against sparsity"
    left.set_title("Random masks lose\n5 points", loc="left")
    right.set_title("and these do not")
    assert plots.description(fig) == "Random masks lose 5 points; and these do not"
    fig.suptitle("Both")
    assert plots.description(fig) == "Both; Random masks lose 5 points; and these do not"
