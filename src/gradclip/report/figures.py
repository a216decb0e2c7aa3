"""The figures of the page, as plain data for Plotly; names are made harmless here."""

import html
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tsdownsample import MinMaxLTTBDownsampler

from gradclip.advice.evidence import share_above
from gradclip.colours import BLUE, GREEN, ORANGE, PURPLE, RED, SKY
from gradclip.record import Floats, Record, Tensors, is_norm
from gradclip.rules import usable

COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
DASHES = ("solid", "dot", "dashdot", "longdash")
POINTS = 4000
COLUMNS, ROWS = 400, 60
MARKS = 1000
"""Marks on steps that are not finite, of which a run may have any number."""

Figure = dict[str, Any]


def safe(text: str) -> str:
    """Return a name as Plotly shows it as it is: it reads a little HTML in labels."""
    return html.escape(text, quote=False)


def thinned(values: Floats, points: int = POINTS) -> Any:
    """Return which of many values to draw, so that every extreme is among them."""
    if values.size <= points:
        return np.arange(values.size)
    finite = usable(values)
    # One infinity would hide all other extremes from the downsampler.
    logs = np.log(
        np.where(finite, values, np.median(values[finite] if finite.any() else 1))
    )
    # In logarithms, as it is drawn: a spike has to stand out from a falling curve.
    kept = MinMaxLTTBDownsampler().downsample(logs, n_out=points)
    extremes = [int(np.argmax(logs)), int(np.argmin(logs))]
    return np.union1d(np.asarray(kept, np.int64), extremes)


def digits(values: Any) -> list[float | None]:
    """Return numbers with the digits that a figure needs; None for a gap."""
    return [float(f"{x:.5g}") if np.isfinite(x) else None for x in np.asarray(values)]


def norm_figure(named: Sequence[tuple[str, Record]]) -> Figure:
    """Return the norm of each run over its steps, with limits and marks on steps."""
    traces: list[Figure] = []
    for i, (name, record) in enumerate(named):
        colour = COLOURS[i % len(COLOURS)]
        rows = thinned(record.norm)
        # What has the colour of another line is drawn in another way.
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        line = {"color": colour, "width": 1, "dash": dash}
        traces.append(
            _line(f"{name}: norm", record.step[rows], record.norm[rows], line)
        )
        limit = record.limit[rows]
        if np.isfinite(limit).any():
            dashed = {"color": colour, "width": 2, "dash": "dash"}
            traces.append(_line(f"{name}: limit", record.step[rows], limit, dashed))
        traces.extend(_marked(name, record, rows, colour))
    axes = {
        "xaxis": {"title": "step"},
        "yaxis": {"title": "gradient norm", "type": "log"},
    }
    return {"data": traces, "layout": axes}


def _line(name: str, x: Any, y: Any, line: Figure) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": safe(name),
        "x": x.tolist(),
        "y": digits(np.where(y > 0, y, np.nan)),
        "line": line,
    }


def _marked(name: str, record: Record, rows: Any, colour: str) -> Iterator[Figure]:
    """Yield marks on clipped steps, and on those without a finite norm."""
    clipped = rows[_is_clipped(record, rows)]
    if clipped.size and not _hidden(record, rows):
        step, norm = record.step[clipped], record.norm[clipped]
        yield _marks(f"{name}: clipped", step, norm, colour, "triangle-up")
    bad = np.flatnonzero(~np.isfinite(record.norm))
    if bad.size:
        step = record.step[bad[:: -(-bad.size // MARKS)]]
        # Where they stand is no norm of theirs, and so it is not told.
        edge = np.full(step.size, _largest(record.norm))
        marks = _marks(f"{name}: NaN or infinite", step, edge, colour, "x")
        yield marks | {"hoverinfo": "x+name"}


def _is_clipped(record: Record, rows: Any) -> Any:
    return (record.scale[rows] < 1) & np.isfinite(record.norm[rows])


def _hidden(record: Record, rows: Any) -> bool:
    """Return whether marks on the clipped steps would hide the curve below them."""
    return bool(_is_clipped(record, rows).sum() >= max(rows.size / 2, 1))


def unmarked(named: Sequence[tuple[str, Record]]) -> Iterator[str]:
    """Yield a line for each run whose clipped steps have no marks."""
    for name, record in named:
        if _hidden(record, thinned(record.norm)):
            rate = np.mean(record.scale[~np.isnan(record.scale)] < 1)
            yield f"{name}: clipped on {rate:.0%} of the steps; not marked."


def _largest(norm: Floats) -> float:
    """Return the largest finite norm, and 1 where no norm can be drawn."""
    largest = np.max(norm[np.isfinite(norm)], initial=0)
    return float(largest) if largest > 0 else 1.0


def _marks(name: str, step: Any, norm: Any, colour: str, symbol: str) -> Figure:
    marks = {"color": colour, "size": 5, "symbol": symbol}
    return {**_line(name, step, norm, {}), "mode": "markers", "marker": marks}


def histogram(norm: Floats) -> Figure:
    """Return how the norms are spread, on a logarithmic axis."""
    logs = np.log10(norm[usable(norm)])
    counts, edges = np.histogram(logs, bins=60, range=None if logs.size else (0, 1))
    bars = {
        "type": "bar",
        "name": "steps",
        "x": digits(10 ** ((edges[1:] + edges[:-1]) / 2)),
        "y": counts.tolist(),
        "width": digits(np.diff(10**edges)),
        "marker": {"color": COLOURS[0]},
    }
    axes = {
        "xaxis": {"title": "gradient norm", "type": "log"},
        "yaxis": {"title": "steps"},
    }
    return {"data": [bars], "layout": {**axes, "showlegend": False}}


def clip_curve(norm: Floats) -> Figure:
    """Return the clip rate at any limit."""
    above = norm[usable(norm)]
    if not above.size:
        return {"data": [], "layout": {}}
    limits = np.geomspace(above.min() * 0.9, above.max() * 1.1, 400)
    rates = 100 * np.asarray(share_above(np.sort(norm[is_norm(norm)]), limits))
    line = {"color": COLOURS[0], "width": 2}
    axes = {
        "xaxis": {"title": "limit", "type": "log"},
        "yaxis": {"title": "finite norms clipped in %", "range": [-2, 102]},
        "showlegend": False,
    }
    curve = {**_line("clip rate", limits, rates, line), "y": digits(rates)}
    return {"data": [curve], "layout": axes}


def heat_map(tensors: Tensors) -> Figure:
    """Return the norm of each parameter over the steps; the largest ones if many."""
    norm = np.where(usable(tensors.norm), tensors.norm, np.nan)
    peak = np.nanmax(np.where(np.isnan(norm), 0, norm), axis=0)
    shown = np.sort(np.argsort(-peak, kind="stable")[:ROWS])
    parts = np.array_split(
        np.arange(tensors.step.size), min(COLUMNS, tensors.step.size)
    )
    filled = np.where(np.isnan(norm), 0, norm)
    largest = np.array([filled[part].max(axis=0)[shown] for part in parts]).T
    with np.errstate(divide="ignore"):
        logs = np.log10(largest)
    cells = {
        "type": "heatmap",
        "x": [int(tensors.step[part[0]]) for part in parts],
        "y": [safe(tensors.names[i]) for i in shown],
        "z": [digits(row) for row in logs],
        "colorscale": "Cividis",
        "colorbar": {"title": {"text": "log₁₀ norm"}},
    }
    layout = {
        "xaxis": {"title": "step"},
        "yaxis": {"automargin": True, "type": "category"},
        "height": 200 + 16 * len(shown),
    }
    return {"data": [cells], "layout": layout}
