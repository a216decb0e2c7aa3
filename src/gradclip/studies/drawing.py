"""Figures: what all of them have in common."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gradclip.colours import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY
from gradclip.studies.statistics import Estimate

GREY = "#7F7F7F"
COLOURS = (BLACK, BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
"""The last one is for lines that are no measurements."""
SHAPES = "osD^vPX<"


def save(draw: Callable[[Any], None], path: Path) -> None:
    """Draw into an SVG file that is the same for the same numbers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: Any = {
        # Without it, ids in the file are other ones each time.
        "svg.hashsalt": "gradclip",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(8, 4), layout="constrained")
        draw(figure)
        # On a dark page as well.
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


def line(
    axes: Any,
    xs: Sequence[float | None],
    ys: Sequence[float | None],
    i: int,
    name: str | None = None,
    **style: Any,
) -> None:
    """Draw numbers over numbers; those that are None are left out."""
    places = [[math.nan if x is None else x for x in numbers] for numbers in (xs, ys)]
    axes.plot(*places, label=name, **look(i), **style)


def look(i: int) -> dict[str, Any]:
    """Return the colour and the marker of a curve."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": SHAPES[i % len(SHAPES)]}


def curve(
    axes: Any, xs: Sequence[float], estimates: Sequence[Estimate], i: int, name: str
) -> None:
    """Draw estimates over numbers, each with its interval; those without are left out.

    The curves of a figure stand a little beside each other, so that none hides one.
    """
    shown = [
        (x, e) for x, e in zip(xs, estimates, strict=True) if e["value"] is not None
    ]
    if not shown:
        return
    axes.errorbar(
        [x * 1.012**i for x, _ in shown],
        [e["value"] for _, e in shown],
        yerr=[
            [e["value"] - low(e) for _, e in shown],
            [high(e) - e["value"] for _, e in shown],
        ],
        **look(i),
        markersize=5,
        linewidth=1.5,
        capsize=3,
        label=name,
    )


def dots(
    axes: Any, names: Sequence[str], estimates: Sequence[Estimate], i: int, name: str
) -> None:
    """Draw estimates with intervals beside names, from top to bottom."""
    places = [k + 0.12 * i for k, e in enumerate(estimates) if e["value"] is not None]
    shown = [e for e in estimates if e["value"] is not None]
    axes.errorbar(
        [e["value"] for e in shown],
        places,
        xerr=[
            [e["value"] - low(e) for e in shown],
            [high(e) - e["value"] for e in shown],
        ],
        **look(i),
        markersize=5,
        linestyle="none",
        capsize=2,
        label=name,
    )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def low(estimate: Estimate) -> Any:
    """Return the lower end, or the value where there is no interval."""
    return estimate["value"] if estimate["low"] is None else estimate["low"]


def high(estimate: Estimate) -> Any:
    """Return the upper end, or the value where there is no interval."""
    return estimate["value"] if estimate["high"] is None else estimate["high"]
