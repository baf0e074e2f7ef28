"""Pickers, explorers and their self-check, without a kernel: ipywidgets then talks to nobody, and draws at once."""

from __future__ import annotations

import base64
import gc
import io

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from nbkit import _png, widgets
from nbkit.errors import LayerNotFound, NotFinite, UnknownName
from nbkit.widgets import _controls, _explorer, _frames

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(autouse=True)
def no_explorers_left():
    yield
    for explorer in list(_explorer.alive):
        explorer.close()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 20, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(20, 5),
    )  # fmt: skip


class Recorder:
    """A render function that draws its values and remembers how it was called."""

    __name__ = "recorder"

    def __init__(self, draw=None):
        self.calls, self.figures, self.draw = [], [], draw

    def __call__(self, fig, **values):
        self.calls.append(values)
        self.figures.append(fig)
        if self.draw:
            self.draw(**values)
        fig.text(0.01, 0.01, "\n".join(f"{k}={v!r}" for k, v in values.items()), size=5)


def small(render, **controls):
    return widgets.explore(render, figsize=(4, 1), dpi=50, **controls)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


# pickers


def test_layer_picker_offers_layers_with_neurons_by_dotted_name(model):
    picker = widgets.LayerPicker(model)
    assert [value for _, value in picker.options] == ["0", "2", "7"]
    assert (picker.value, picker.neurons) == ("0", 8)
    picker.value = "7"
    assert picker.neurons == 5


def test_layer_picker_with_an_example_offers_every_leaf_that_ran(model, device):
    picker = widgets.LayerPicker(model.to(device), example=torch.zeros(1, 3, 12, 12, device=device))
    assert [value for _, value in picker.options] == ["0", "1", "2", "3", "4", "7"]
    assert picker.layers.set_index("name").loc["1", "output_shape"] == (8, 10, 10)


def test_layer_picker_takes_types_names_and_patterns(model):
    def names(**choice):
        return [value for _, value in widgets.LayerPicker(model, **choice).options]

    assert names(types=nn.Conv2d) == names(types="Conv2d") == ["0", "2"]
    assert names(types=[nn.Conv2d, "Linear"]) == ["0", "2", "7"]
    assert names(only=["7", "0"]) == ["7", "0"]
    assert names(only="[02]") == ["0", "2"]
    assert widgets.LayerPicker(model, value="2").value == "2"


def test_layer_picker_says_what_is_wrong(model):
    with pytest.raises(TypeError, match="must be a torch.nn.Module, not int"):
        widgets.LayerPicker(3)
    with pytest.raises(LayerNotFound, match="no layer 'conv1'"):
        widgets.LayerPicker(model, only="conv1")
    with pytest.raises(LayerNotFound, match="no layer '99'"):
        widgets.LayerPicker(model, value="99")
    with pytest.raises(ValueError, match="'1' is in the model but not on offer; on offer are 0, 2, 7"):
        widgets.LayerPicker(model, value="1")
    with pytest.raises(ValueError, match="no layer to pick from with types='LSTM'"):
        widgets.LayerPicker(model, types="LSTM")


def test_neuron_picker_follows_the_picked_layer_and_stays_valid(model):
    layer = widgets.LayerPicker(model, value="2")
    neuron = widgets.NeuronPicker(layer, value=19)
    assert (neuron.min, neuron.max) == (0, 19)
    layer.value = "0"
    assert (neuron.max, neuron.value) == (7, 7)
    layer.value = "2"
    assert (neuron.max, neuron.value) == (19, 7)


def test_neuron_picker_takes_a_model_and_a_layer(model):
    assert widgets.NeuronPicker(model, "2").max == 19
    assert widgets.NeuronPicker(model, "1", example=torch.zeros(1, 3, 12, 12)).max == 7
    with pytest.raises(LayerNotFound):
        widgets.NeuronPicker(model, "conv")
    with pytest.raises(ValueError, match="number of neurons of 1 is not known; give an example"):
        widgets.NeuronPicker(model, "1")
    with pytest.raises(ValueError, match="neuron 8 is out of range; '0' has neurons 0 to 7"):
        widgets.NeuronPicker(model, "0", value=8)
    with pytest.raises(TypeError, match="needs a layer"):
        widgets.NeuronPicker(model)


@pytest.mark.parametrize("bad", [{"max": 1.0}, {"min": -0.1}, {"value": 0.97}, {"step": 0}, {"value": float("nan")}])
def test_sparsity_slider_stays_below_one(bad):
    assert widgets.SparsitySlider(value=0.9, max=0.99, step=0.01).value == 0.9
    with pytest.raises(ValueError):
        widgets.SparsitySlider(**bad)


# controls


def test_each_kind_of_value_becomes_its_control():
    fixed = object()
    render = Recorder()
    explorer = small(
        render, whole=(1, 5), stepped=(0, 10, 5), real=(0.0, 1.0, 0.25, 0.5), menu=["a", "b"],
        named={"one": 1, "two": 2}, tick=True, text="hello", widget=ipywidgets.IntText(7), fixed=fixed, number=3,
    )  # fmt: skip
    kinds = {name: type(control) for name, control in explorer.controls.items()}
    assert kinds == {
        "whole": ipywidgets.IntSlider, "stepped": ipywidgets.IntSlider, "real": ipywidgets.FloatSlider,
        "menu": ipywidgets.ToggleButtons, "named": ipywidgets.ToggleButtons, "tick": ipywidgets.Checkbox,
        "text": ipywidgets.Text, "widget": ipywidgets.IntText,
    }  # fmt: skip
    assert explorer.values == {
        "whole": 1, "stepped": 0, "real": 0.5, "menu": "a", "named": 1, "tick": True, "text": "hello", "widget": 7,
        "fixed": fixed, "number": 3,
    }  # fmt: skip
    assert render.calls == [explorer.values]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (range(5), ipywidgets.ToggleButtons),
        (range(6), ipywidgets.Dropdown),
        (["a short one", "another"], ipywidgets.ToggleButtons),
        (["a label of a layer that is long", "another label that is as long", "and a third"], ipywidgets.Dropdown),
    ],
)
def test_a_few_short_options_are_buttons_and_more_are_a_menu(options, kind):
    explorer = small(Recorder(), menu=options)
    assert type(explorer.controls["menu"]) is kind
    explorer.set(menu=list(options)[1])
    assert explorer.values == {"menu": list(options)[1]}
    with pytest.raises(ValueError, match="cannot take"):
        explorer.set(menu="nothing of the kind")


def test_controls_are_labelled_in_words():
    slider = widgets.SparsitySlider
    explorer = small(Recorder(), edge_strength=(0, 1), sparsity=slider(), keep_top=slider())
    assert [c.description for c in explorer.controls.values()] == ["edge strength", "sparsity", "keep top"]


def test_controls_start_where_initial_says():
    explorer = small(
        Recorder(), initial={"a": 3, "b": "two", "c": "y"},
        a=(0, 5), b={"one": np.zeros(3), "two": np.ones(3)}, c=["x", "y"],
    )  # fmt: skip
    assert (explorer.values["a"], explorer.values["b"].sum(), explorer.values["c"]) == (3, 3, "y")


@pytest.mark.parametrize(
    ("control", "error", "message"),
    [
        ((5, 1), ValueError, "min < max"),
        ((0, 1, 0), ValueError, "step > 0"),
        ((0, 1, 0.1, 2), ValueError, "min <= value <= max"),
        ((0, float("inf")), NotFinite, "infinite"),
        (("a", "b"), TypeError, "write a list for a menu"),
        ((1,), TypeError, "a tuple is a slider"),
        ([], ValueError, "nothing to choose from"),
        (ipywidgets.Output(), TypeError, "has no value"),
    ],
)
def test_a_control_that_cannot_be_made_is_an_error_naming_it(control, error, message):
    with pytest.raises(error, match=f"control 'knob'.*{message}"):
        small(Recorder(), knob=control)
    assert not _explorer.alive


def test_explore_checks_names_before_it_draws():
    def render(fig, sparsity):
        raise AssertionError("must not be called")

    with pytest.raises(TypeError, match=r"render\(fig, sparsity\) cannot be called as render\(fig, sparsty\)"):
        small(render, sparsty=(0, 1))
    with pytest.raises(UnknownName, match="did you mean 'sparsity'"):
        small(render, sparsity=(0, 1), initial={"sparsty": 1})
    with pytest.raises(ValueError, match="at least one control"):
        small(lambda fig: None)
    with pytest.raises(TypeError, match="render must be a function"):
        small("render", sparsity=(0, 1))


# frames


def test_a_moved_control_changes_the_frame_and_reuses_the_figure():
    render = Recorder()
    explorer = small(render, a=(0, 5))
    first = explorer.frame
    explorer.controls["a"].value = 3
    assert explorer.frame != first
    assert explorer.frame.startswith(b"\x89PNG")
    assert [call["a"] for call in render.calls] == [0, 3]
    assert render.figures[0] is render.figures[1]
    assert pixels(explorer.frame).shape == (50, 200, 3)


def test_a_frame_depends_on_its_values_alone():
    def render(fig, a):
        if a == 1:
            fig.set_layout_engine("constrained")
            fig.set_size_inches(3, 3)
            fig.set_facecolor("black")
            fig.subplots(2, 2)
        else:
            fig.subplots().plot([0, a])

    explorer = small(render, a=(0, 2), cache_bytes=0)
    first = explorer.frame
    explorer.set(a=1)
    assert pixels(explorer.frame).shape == (150, 150, 3)
    assert explorer.set(a=0).frame == first


def test_frames_are_kept_and_not_drawn_twice():
    render = Recorder()
    explorer = small(render, a=(0, 5), b=["x", "y"])
    for a in (1, 2, 1, 2, 0):
        explorer.set(a=a)
    assert len(render.calls) == 3
    assert len(explorer.timings) == 3
    explorer.refresh()
    assert len(render.calls) == 4


def test_the_kept_frames_stay_within_their_bound_and_the_oldest_go_first():
    cache = _frames.FrameCache(max_bytes=25)
    for a in (1, 2):
        cache.put({"a": a}, bytes(10))
    cache.get({"a": 1})
    cache.put({"a": 3}, bytes(10))
    assert [cache.get({"a": a}) is not None for a in (1, 2, 3)] == [True, False, True]
    cache.put({"a": 4}, bytes(26))
    assert (len(cache), cache.bytes) == (0, 0)


def test_frames_of_values_that_compare_equal_are_told_apart():
    cache = _frames.FrameCache(max_bytes=100)
    values = [1, 1.0, True, "1", (1,), np.ones(2), np.ones(2), torch.ones(2), None]
    for i, value in enumerate(values):
        cache.put({"a": value}, bytes([i]))
    assert [cache.get({"a": value}) for value in values] == [bytes([i]) for i in range(len(values))]


def test_float_steps_do_not_add_up_to_new_values():
    render = Recorder()
    explorer = small(render, a=(0.0, 1.0, 0.1))
    explorer.controls["a"].value = 0.3
    explorer.controls["a"].value = 0.1 + 0.2
    assert [call["a"] for call in render.calls] == [0.0, 0.3]


@pytest.mark.parametrize("values", [[1e-12, 1 / 3], {"a": 1e-12, "b": 1 / 3}])
def test_render_gets_the_very_values_of_a_menu(values):
    render = Recorder()
    small(render, eps=values).controls["eps"].index = 1
    assert [call["eps"] for call in render.calls] == [1e-12, 1 / 3]


def test_a_slider_is_as_exact_as_its_steps():
    rate = ipywidgets.FloatLogSlider(1e-12, min=-12, max=0)
    explorer = small(Recorder(), rate=rate, tiny=(0.0, 1e-12, 1e-13), large=(0.0, 1e6, 0.1))
    explorer.controls["tiny"].value, explorer.controls["large"].value = 3 * 1e-13, 1e5 + 0.1 + 0.2
    assert explorer.values == {"rate": 1e-12, "tiny": 3e-13, "large": 100000.3}


def test_a_figure_with_subfigures_is_left_empty_too():
    def render(fig, a):
        for half in fig.subfigures(1, 2):
            half.subplots().plot([0, a])

    explorer = small(render, a=(0, 5))
    assert explorer.error is None and not explorer._canvas.figure.subfigs
    assert explorer.set(a=1).error is None


def test_pyplot_is_left_alone():
    mine = plt.figure()
    explorer = small(Recorder(lambda a: plt.plot([a]) and plt.figure()), a=(0, 3))
    explorer.set(a=2)
    assert explorer.error is None
    assert plt.get_fignums() == [mine.number]
    plt.close(mine)


def test_drawing_through_pyplot_is_an_error_that_says_so():
    explorer = small(lambda fig, a: plt.plot([a]), a=(0, 3))
    assert "drew nothing on its figure" in str(explorer.error)
    assert not plt.get_fignums()


def test_a_big_picture_is_stored_small_and_looks_the_same():
    x, y = np.meshgrid(np.linspace(0, 1, 800), np.linspace(0, 1, 400))
    noise = np.random.default_rng(0).normal(0, 6, (400, 800, 1))
    photo = np.stack([x, y, 1 - x], -1) * 200 + 25 + noise
    png = _frames.encode(photo.clip(0, 255).astype(np.uint8))
    small_png = _png.compact(png)
    assert len(small_png) < len(png) / 2
    assert np.abs(pixels(small_png).astype(int) - pixels(png)).mean() < 8
    lines = _frames.encode(np.where(x > 0.5, 255, 0).astype(np.uint8)[..., None].repeat(3, -1))
    assert np.array_equal(pixels(_png.compact(lines)), pixels(lines))


def test_tick_labels_that_grow_get_the_room_they_need():
    canvas = _frames.Canvas((4, 2), 50)

    def draw(fig, top):
        fig.subplots().set(ylim=(0, top), ylabel="height")

    for top in (1, 2, 80_000, 1):
        canvas.draw(draw, {"top": top})
    assert len(canvas._margins) == 2
    narrow, wide = (m["left"] for m in canvas._margins.values())
    assert wide > narrow + 0.04


def test_margins_given_to_the_grid_are_kept_and_none_are_computed():
    canvas, drawn = _frames.Canvas((4, 2), 50), []

    def draw(fig):
        drawn.append(fig.subplots(gridspec_kw={"left": 0.3, "right": 0.8, "bottom": 0.2, "top": 0.9}))
        drawn.append(fig.add_axes((0.85, 0.2, 0.1, 0.7)))

    canvas.draw(draw, {})
    assert not canvas._margins
    assert np.allclose(drawn[0].get_position().extents, (0.3, 0.2, 0.8, 0.9))


def test_ticks_left_to_matplotlib_are_few_and_chosen_ones_are_kept():
    canvas, drawn = _frames.Canvas((8, 3), 50), []

    def draw(fig):
        left, right = fig.subplots(1, 2)
        left.set(xlim=(0, 9), ylim=(0, 0.9))
        right.set(xlim=(0, 9), xticks=range(10))
        drawn.extend([left, right])

    canvas.draw(draw, {})
    left, right = drawn
    assert [x for x in left.get_xticks() if x <= 9] == [0, 2, 4, 6, 8] and 3 <= len(left.get_yticks()) <= 7
    assert len(right.get_xticks()) == 10


def test_frames_leave_no_garbage_behind():
    explorer = small(lambda fig, a: fig.subplots().plot([a]), a=(0, 100), cache_bytes=0)
    for a in (1, 2, 3):
        explorer.set(a=a)
    gc.collect()
    before = len(gc.get_objects())
    for a in range(4, 14):
        explorer.set(a=a)
    assert gc.isenabled()
    assert len(gc.get_objects()) - before < 2000  # one frame makes several thousand


# exceptions


def boom(a, **_):
    if a == 2:
        raise ValueError("a must not be <two>, it breaks $x_i$")


def test_an_exception_is_shown_in_place_and_the_next_good_value_recovers():
    explorer = small(Recorder(boom), a=(0, 5))
    good = explorer.frame
    explorer.controls["a"].value = 2
    assert isinstance(explorer.error, ValueError)
    assert explorer.frame != good
    message = explorer.widget.children[-1]
    assert "ValueError" in message.value
    assert "a must not be &lt;two&gt;" in message.value
    assert "in boom" in message.value
    assert "nbkit/widgets" not in message.value
    explorer.controls["a"].value = 0
    assert explorer.error is None
    assert explorer.frame == good
    assert message.value == ""


def test_an_exception_in_the_first_frame_does_not_stop_the_cell():
    explorer = small(Recorder(boom), a=(2, 5))
    assert isinstance(explorer.error, ValueError)
    assert pixels(explorer.frame).shape == (50, 200, 3)
    explorer.controls["a"].value = 3
    assert explorer.error is None


def test_a_frame_that_failed_is_tried_again():
    broken = [True]

    def flaky(a):
        if broken[0]:
            raise RuntimeError("not yet")

    explorer = small(Recorder(flaky), a=(0, 5))
    broken[0] = False
    assert explorer.error is not None
    assert explorer.set(a=1).set(a=0).error is None


def test_after_an_interrupt_the_picture_is_drawn_anew():
    def interrupted(a):
        if len(render.calls) == 2:
            raise KeyboardInterrupt

    render = Recorder(interrupted)
    explorer = small(render, a=(0, 5))
    first = explorer.frame
    with pytest.raises(KeyboardInterrupt):
        explorer.set(a=1)
    assert explorer.frame != first
    assert [call["a"] for call in render.calls] == [0, 1, 1]


def test_the_message_is_fit_for_any_size_and_text():
    canvas = _frames.Canvas((2, 1), 50)
    png = _frames.error_picture(canvas, "render raised ValueError", "$\\frac{ " * 300 + "\n" * 50, None)
    assert pixels(png).shape == (50, 100, 3)


# one output, two pictures


def test_the_output_carries_the_live_widget_and_the_picture_of_the_current_frame():
    explorer = small(Recorder(), a=(0, 5), fixed=3)
    explorer.set(a=4)
    data, metadata = explorer._repr_mimebundle_()
    assert data[WIDGET_VIEW]["model_id"] == explorer.widget.model_id
    assert base64.b64decode(data["image/png"]) == explorer.frame
    assert data["text/plain"] == "explore(recorder, a=..., fixed=...) at a=4"
    assert metadata["image/png"] == {"alt": "recorder at a=4", "controls": ["a"]}


def test_a_closed_explorer_is_still_a_picture():
    explorer = small(Recorder(), a=(0, 5))
    explorer.close()
    data, _ = explorer._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/png"}


# moves that come faster than frames


class FakeLoop:
    """An event loop that runs what was put off when it is told to."""

    def __init__(self):
        self.waiting = []

    def is_running(self):
        return True

    def call_soon_threadsafe(self, fn, *args):
        fn(*args)

    def call_later(self, delay, fn):
        assert 0 < delay < 0.05
        self.waiting.append(fn)

    def run(self):
        waiting, self.waiting = self.waiting, []
        for fn in waiting:
            fn()


@pytest.fixture
def loop(monkeypatch):
    loop = FakeLoop()
    monkeypatch.setattr(_explorer, "_running_loop", lambda: loop)
    return loop


def test_a_drag_draws_the_latest_value_once(loop):
    render = Recorder()
    explorer = small(render, a=(0, 100))
    for a in range(1, 101):
        explorer.controls["a"].value = a
    assert len(loop.waiting) == 1
    assert [call["a"] for call in render.calls] == [0]
    loop.run()
    assert [call["a"] for call in render.calls] == [0, 100]
    explorer.controls["a"].value = 7
    loop.run()
    assert render.calls[-1] == {"a": 7}


def test_a_move_during_a_frame_is_drawn_after_it(loop):
    explorer = None

    def meanwhile(a):
        if a == 1:
            explorer.controls["a"].value = 2

    render = Recorder(meanwhile)
    explorer = small(render, a=(0, 100))
    explorer.controls["a"].value = 1
    loop.run()
    loop.run()
    assert [call["a"] for call in render.calls] == [0, 1, 2]


def test_what_a_cell_reads_is_up_to_date(loop):
    explorer = small(Recorder(boom), a=(0, 100))
    first = explorer.frame
    explorer.controls["a"].value = 2
    assert isinstance(explorer.error, ValueError)
    explorer.controls["a"].value = 3
    assert explorer.frame != first
    assert explorer.set(a=0).frame == first


# moving controls from code


def test_set_moves_several_controls_and_draws_once(model):
    render = Recorder()
    layer = widgets.LayerPicker(model)
    explorer = small(render, layer=layer, neuron=widgets.NeuronPicker(layer))
    explorer.set(layer="2", neuron=15)
    assert render.calls == [{"layer": "0", "neuron": 0}, {"layer": "2", "neuron": 15}]


def test_set_says_what_a_control_cannot_take():
    rate = ipywidgets.FloatLogSlider(1, min=-2, max=2)
    explorer = small(Recorder(), a=(0, 5), kind=["magnitude", "taylor"], rate=rate)
    with pytest.raises(UnknownName, match="no control 'kin'; did you mean 'kind'"):
        explorer.set(kin="taylor")
    with pytest.raises(ValueError, match="control 'a' goes from 0 to 5, not to 6"):
        explorer.set(a=6)
    with pytest.raises(ValueError, match="control 'kind' cannot take 'tailor'; did you mean 'taylor'"):
        explorer.set(kind="tailor")
    assert explorer.set(rate=100.0).values == {"a": 0, "kind": "magnitude", "rate": 100.0}


@pytest.mark.parametrize(("name", "value"), [("whole", 3.7), ("whole", "3"), ("real", "0.5"), ("span", (1, 20))])
def test_what_a_control_would_change_it_cannot_take(name, value):
    def controls():
        return {"whole": (0, 10), "real": (0.0, 1.0), "span": ipywidgets.IntRangeSlider(value=(2, 5), max=10)}

    explorer = small(Recorder(), **controls())
    before = explorer.values
    with pytest.raises(ValueError, match=f"control '{name}' cannot take"):
        explorer.set(**{name: value})
    assert explorer.values == before
    with pytest.raises(ValueError, match=f"control '{name}' cannot take"):
        small(Recorder(), initial={name: value}, **controls())
    assert explorer.set(whole=3.0, real=1, span=[1, 3]).values == {"whole": 3, "real": 1.0, "span": (1, 3)}


def test_a_picker_may_steer_two_explorers(model):
    layer = widgets.LayerPicker(model)
    one, two = Recorder(), Recorder()
    small(one, layer=layer), small(two, layer=layer)
    layer.value = "7"
    assert one.calls[-1] == two.calls[-1] == {"layer": "7"}


@pytest.mark.parametrize(
    "options",
    [[1, True, 0, False, "1"], [np.zeros(3), np.zeros(3), np.ones(1)], [torch.zeros(2), torch.zeros(2)], [len, max]],
)
def test_a_menu_may_hold_anything(options):
    render = Recorder()
    explorer = small(render, a={f"option {i}": option for i, option in enumerate(options)})
    for i, option in enumerate(options):
        assert explorer.set(a=f"option {i}").values["a"] is option
        assert render.calls[-1]["a"] is option
        assert explorer.set(a=option).values["a"] is option


@pytest.mark.parametrize("row", [np.array([1, 2]), pd.Index([1, 2]), {1: "a", 2: "b"}.keys(), range(1, 3)])
def test_a_row_of_values_is_a_menu(row):
    assert small(Recorder(), a=row).set(a=2).values == {"a": 2}


def test_a_neuron_out_of_range_is_never_drawn(model):
    layer = widgets.LayerPicker(model, value="2")
    neuron, render = widgets.NeuronPicker(layer, value=19), Recorder()
    small(render, layer=layer, neuron=neuron)
    layer.value = "0"
    assert [tuple(call.values()) for call in render.calls if call["layer"] == "0"] == [("0", 7)]


def test_new_options_are_followed():
    render = Recorder()
    menu = ipywidgets.Dropdown(options=["a", "b"])
    explorer = small(render, word=menu)
    menu.options = ["c", "d"]
    assert explorer.values == render.calls[-1] == {"word": "c"}


def test_a_closed_explorer_no_longer_follows_its_controls(model):
    render = Recorder()
    layer = widgets.LayerPicker(model)
    explorer = small(render, layer=layer)
    explorer.close()
    explorer.close()  # a second time does nothing
    layer.value = "7"
    assert len(render.calls) == 1
    assert explorer not in _explorer.alive


def test_running_a_cell_again_closes_the_explorers_of_its_last_run(monkeypatch):
    runs = iter([("cell-1", "run-1"), ("cell-1", "run-1"), ("cell-2", "run-2"), ("cell-1", "run-3")])
    monkeypatch.setattr(_explorer, "_current_cell", lambda: next(runs))
    first, second, other, again = (small(Recorder(), a=(0, 5)) for _ in range(4))
    assert _explorer.alive == [other, again]


# the self-check


def test_selfcheck_exercises_every_control_and_leaves_them_as_they_were(model, capsys):
    layer = widgets.LayerPicker(model)
    neuron = widgets.NeuronPicker(layer)
    render = Recorder()
    explorer = small(
        render, neuron=neuron, layer=layer, sparsity=widgets.SparsitySlider(), tick=False, word="cat",
        kind={"a": np.zeros(2), "b": np.ones(3)}, span=ipywidgets.IntRangeSlider(value=(2, 4), min=0, max=10),
        several=ipywidgets.SelectMultiple(options=["u", "v"], value=["u"]), rate=ipywidgets.FloatLogSlider(1.0),
        count=ipywidgets.IntText(3), ends=ipywidgets.SelectionRangeSlider(options="abc", index=(0, 1)), fixed=1,
    )  # fmt: skip
    other = small(Recorder(), a=(0, 9))
    explorer.set(layer="2", neuron=18, tick=True)
    before = explorer.frame
    widgets.selfcheck()
    widgets.selfcheck()
    line = "selfcheck: 2 explorers, 12 controls, every control answers\n"
    assert capsys.readouterr().out == 2 * line
    assert explorer.frame == before
    assert (layer.value, neuron.value, other.values) == ("2", 18, {"a": 0})
    seen = {name: {repr(call[name]) for call in render.calls} for name in render.calls[0]}
    assert seen["layer"] == {"'0'", "'2'", "'7'"}
    assert seen["sparsity"] >= {"0.0", "0.5", "0.95"}
    assert seen["tick"] == {"True", "False"}


def test_selfcheck_names_a_dead_control():
    def render(fig, used, unused):
        fig.text(0.1, 0.5, used)

    small(render, used=["a", "b"], unused=(0, 3))
    with pytest.raises(AssertionError, match="render: control 'unused' never changes the picture") as caught:
        widgets.selfcheck()
    assert "'used'" not in str(caught.value)


def test_a_control_that_answers_only_beside_another_value_is_not_dead(capsys):
    def render(fig, method, sparsity):
        fig.text(0.1, 0.5, "dense" if method == "none" else f"{method} {sparsity}")

    explorer = small(render, method=["none", "magnitude"], sparsity=(0.0, 0.9))
    widgets.selfcheck()
    assert explorer.values == {"method": "none", "sparsity": 0.0}


def test_selfcheck_fails_where_render_does_at_any_value():
    explorer = small(Recorder(boom), a=[0, 1, 2, 3])
    with pytest.raises(AssertionError, match=r"recorder raised ValueError at a=2: a must not be"):
        widgets.selfcheck()
    assert explorer.values == {"a": 0}
    explorer.close()
    small(Recorder(boom), a=(2, 5))
    with pytest.raises(AssertionError, match="raised ValueError at a=2"):
        widgets.selfcheck()


def test_selfcheck_fails_where_a_picture_changes_by_itself():
    rng = np.random.default_rng()
    small(lambda fig, a: fig.text(0.1, 0.5, f"{a} {rng.random()}"), a=(0, 5))
    with pytest.raises(AssertionError, match="draws another picture for the same values"):
        widgets.selfcheck()


def test_selfcheck_with_nothing_to_check_fails():
    with pytest.raises(AssertionError, match="no explorer"):
        widgets.selfcheck()


def test_selfcheck_asks_for_examples_of_a_control_it_does_not_know(capsys):
    day = small(Recorder(), day=ipywidgets.DatePicker())
    with pytest.raises(AssertionError, match="control 'day': a DatePicker cannot be exercised; set its .examples"):
        widgets.selfcheck()
    day.close()
    tint = ipywidgets.ColorPicker(value="#ff0000")
    small(Recorder(), tint=tint)
    with pytest.raises(AssertionError, match="control 'tint': a ColorPicker cannot be exercised; set its .examples"):
        widgets.selfcheck()
    tint.examples = ["#00ff00", "#0000ff"]
    widgets.selfcheck()
    assert capsys.readouterr().out == "selfcheck: 1 explorer, 1 control, every control answers\n"
    assert tint.value == "#ff0000"


def test_the_states_a_slider_is_tried_in_are_its_ends_and_its_middle():
    assert _controls.samples(ipywidgets.IntSlider(min=2, max=10)) == [("value", 2), ("value", 6), ("value", 10)]
    logarithmic = ipywidgets.FloatLogSlider(min=-4, max=0, base=10, step=1)
    assert [v for _, v in _controls.samples(logarithmic)] == pytest.approx([1e-4, 1e-2, 1])
