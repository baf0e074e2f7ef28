"""Figures: the kit's look, pictures with heat maps, and what seaborn lacks for measured tables.

Every function draws on the axes it is given and returns them, so it works in a cell and in an explorer alike. Measured
results are tidy tables, a row a seed and setting; seaborn draws them in the kit's style:

>>> style()                                                        # once, in a notebook's first cell
>>> palette = colours(table["method"].unique())                    # one colour a method, in every figure
>>> sns.lineplot(table, x="sparsity", y="accuracy", hue="method", palette=palette, errorbar=RANGE, marker="o")
>>> means(ax, table, x="method", y="accuracy", palette=palette)    # bars, and every seed as a point
>>> overlay(ax, photo, grad_cam_map)

Arrays may be torch tensors (on any device, with or without gradient) or anything NumPy reads.
"""

from nbkit.plots._parts import contributions, layer_density
from nbkit.plots._pictures import gallery, heatmap, overlay, show_image
from nbkit.plots._style import DIVERGING, PALETTE, SEQUENTIAL, colours, description, style
from nbkit.plots._tables import RANGE, direct_labels, legend, log_ticks, means, percent

__all__ = [
    "DIVERGING", "PALETTE", "RANGE", "SEQUENTIAL", "colours", "contributions", "description", "direct_labels",
    "gallery", "heatmap", "layer_density", "legend", "log_ticks", "means", "overlay", "percent", "show_image", "style",
]  # fmt: skip
