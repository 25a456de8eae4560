"""Line charts as inline SVG, drawn by matplotlib in the colours of the page that holds them."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Real
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

Series = tuple[Real[np.ndarray, " N"] | Sequence[float], Real[np.ndarray, " N"] | Sequence[float]]

# Middle tones: legible on white and on near-black.
PALETTE = ("#4477ee", "#ee7733", "#22a06b", "#c44fa5", "#b8860b", "#1f9fc4", "#d9484f", "#8a63e8")

# Axes and labels are drawn in this colour, which no series has, and then take the colour of the page's text.
INK = "#010203"

WIDTH_INCHES, HEIGHT_INCHES, FONT_POINTS = 4.8, 2.5, 8


def series_colour(index: int) -> str:
    """CSS colour of the series with this position."""
    return PALETTE[index % len(PALETTE)]


def line_chart(curves: Mapping[str, Series], *, log: bool, identity: str) -> str:
    """One `<svg>` element with a line per series, the steps along x; its only text is on the axes.

    Args:
      curves: name -> (steps [N], values [N]). Values that are not finite leave gaps; with `log`, so do values <= 0.
      log: logarithmic y axis.
      identity: distinguishes the ids of this chart from those of other charts on the page.

    Raises:
      ValueError: steps and values of a series differ in length.
    """
    with rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": identity,
            "font.family": "sans-serif",
            "font.size": FONT_POINTS,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    ):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        axes = figure.add_subplot()
        for index, (name, (steps, values)) in enumerate(curves.items()):
            x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
            if x.shape != y.shape:
                raise ValueError(f"curve {name!r}: {x.size} steps but {y.size} values")
            y = np.where(np.isfinite(y) & ((y > 0) | (not log)), y, np.nan)
            # A lone point makes no line.
            marker = "o" if np.isfinite(y).sum() == 1 else ""
            axes.plot(x, y, color=series_colour(index), linewidth=1.4, marker=marker, markersize=3.5)
        if log:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("step")
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_alpha(0.4)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
