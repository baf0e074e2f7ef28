"""The kit's look: colours, sizes, and one colour a method throughout a notebook."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Colours that stay apart for colour-blind readers (Okabe and Ito 2008), the pale yellow left out.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SEQUENTIAL = "viridis"
_GREYS = ("#888888", "#bbbbbb", "#555555")
DIVERGING = "RdBu_r"  # red above zero, blue below, white at zero

_STYLE = {
    "figure.figsize": (8, 3.6),
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # else every drawing looks for ticks above each axes, one by one
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "image.cmap": SEQUENTIAL,
    "image.interpolation": "nearest",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
}


def style() -> None:
    """Set matplotlib's defaults for a notebook: the palette, sizes readable at notebook width, modest PNG files.

    Changes ``matplotlib.rcParams`` for the whole process (``matplotlib.rcdefaults()`` undoes it), and silences two
    warnings about layouts: seaborn's grids lay themselves out, and networkx fills a figure without one.
    """
    import matplotlib

    for said in ("The figure layout has changed to tight", "There are no gridspecs with layoutgrids"):
        warnings.filterwarnings("ignore", said, UserWarning)

    matplotlib.rcParams.update(_STYLE)
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=PALETTE)
    if "ipykernel" in sys.modules:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        # without the version that drew it, a picture is the same file on another machine
        set_matplotlib_formats("png", bbox_inches="tight", metadata={"Software": None})
        _describe_figures()


def description(figure: Figure) -> str:
    """What a figure's titles say, for a reader who cannot see it; its axes' labels where it has no title.

    >>> description(figure)
    'Random tickets lose 5 points; the winning one none'
    """
    axes = figure.get_axes()
    above = [figure.get_suptitle(), *(ax.get_title(loc) for ax in axes for loc in ("left", "center", "right"))]
    labels = [f"{ax.get_ylabel() or 'y'} against {ax.get_xlabel() or 'x'}" for ax in axes if ax.axison]
    texts = [" ".join(text.split()) for text in above] if any(above) else labels
    return "; ".join(dict.fromkeys(filter(None, texts)))


def _describe_figures() -> None:
    """From now on a figure shown by a cell carries its description in the output's metadata.

    nbconvert's classic template reads it from there; JupyterLab does with nbkit/notebooks/labextension.
    """
    from IPython import get_ipython
    from matplotlib.figure import Figure

    png = get_ipython().display_formatter.formatters["image/png"]
    draw = png.lookup_by_type(Figure)

    def described(figure):
        alt = description(figure)
        return draw(figure), {"alt": alt} if alt else None

    png.for_type(Figure, described)


def colours(names: Iterable[str], *, grey: Iterable[str] = ()) -> dict[str, str]:
    """One colour a name, to be kept through all figures of a notebook: seaborn's ``palette=``.

    Args:
        names: what is told apart, in order of importance (repeats are dropped); seven colours, then an error.
        grey: of these names, the ones that only serve as a reference (chance, the dense model): shades of grey.

    Raises: ValueError (more names than colours), TypeError (one text in place of a list).

    >>> colours(["magnitude", "random"], grey=["random"])
    {'magnitude': '#0072B2', 'random': '#888888'}
    """
    if isinstance(names, str) or isinstance(grey, str):
        raise TypeError("names and grey are lists of names, not one text")
    names, grey = list(dict.fromkeys(names)), list(dict.fromkeys(grey))
    told_apart = [name for name in names if name not in grey]
    if len(told_apart) > len(PALETTE) or len(grey) > len(_GREYS):
        raise ValueError(
            f"{len(told_apart)} names in colour and {len(grey)} in grey; at most {len(PALETTE)} and {len(_GREYS)} "
            "stay apart: draw fewer in one figure, or tell some by line style"
        )
    chosen = dict(zip(told_apart, PALETTE, strict=False)) | dict(zip(grey, _GREYS, strict=False))
    return {name: chosen[name] for name in [*names, *(g for g in grey if g not in names)]}
