"""Two functions whose curvature grows with their slope, as in the (L0, L1) condition.

Zhang, He, Sra, Jadbabaie: Why gradient clipping accelerates training: a theoretical
justification for adaptivity. arXiv 1905.11881, 2019.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradclip.decision import clip_scale
from gradclip.studies.drawing import line
from gradclip.studies.frame import Claim, Findings, Size, Study, Tick, seen
from gradclip.studies.results import Cell, Results, Row
from gradclip.studies.tables import Table

Floats = NDArray[np.float64]

SLOPES = {
    "x⁴": lambda x: 4 * x**3,
    "eˣ + e⁻ˣ": lambda x: np.exp(x) - np.exp(-x),
}
STARTS = {"x⁴": (1, 10, 100), "eˣ + e⁻ˣ": (5, 10, 15)}
LIMITS = (math.inf, 1.0, 10.0, 100.0)
RATES = 10 ** (-0.5 + np.arange(-24, 8) / 3)
"""The fixed steps tried, three to a decade."""
TRIAL = (
    ("x⁴", 1, 3.0, 0.3),
    ("x⁴", 10, 3.0, 0.3),
    ("x⁴", 100, 10.0, 0.3),
    ("eˣ + e⁻ˣ", 5, math.inf, 10 ** (-4 / 3)),
    ("eˣ + e⁻ˣ", 5, 1.0, 1.0),
    ("eˣ + e⁻ˣ", 10, 2.0, 1.0),
    ("eˣ + e⁻ˣ", 15, 3.0, 1.0),
)
"""Limits and step sizes that take as many steps as a first trial."""
ENOUGH = 1e-3
"""The slope that ends a descent."""
PATIENCE: dict[Size, int] = {"quick": 20_000, "usual": 1_200_000, "full": 1_200_000}

SETUP = """Gradient descent on x⁴ and on eˣ + e⁻ˣ, in float64 and without noise, until
the slope is at most 10⁻³. For each limit the best of 32 step sizes counts, three to a
decade around 10^−0.5; the limits were chosen beforehand, and all are shown. These are
the toys behind Zhang et al. (arXiv 1905.11881): where curvature grows with the slope, a
fixed step has to suit the steepest place, and is tiny everywhere else.

A first trial, of which only the counts were kept, had 93 and 9951 steps without
clipping from 1 and 10 on x⁴, 6073 and 608 592 from 10 and 15 on eˣ + e⁻ˣ, as here, and
83 from 5, where the three to a decade have 100; with clipping 64, 74 and 127 on x⁴, and
5 from each start on eˣ + e⁻ˣ. The second table has single pairs of a step size and a
limit that take just as many. Those of x⁴ are the best of the limits 1, 3 and 10 at a
step size of 0.3. Those of 5 are five equal steps that land on the optimum by luck, and
other pairs have them too. No grid was found whose best are all six: not among the
products of 55 step sizes with 52 limits, for clipping, a bound on the length of the
step, and three smooth forms of either."""


def cells(size: Size) -> list[Cell]:
    """Return each function, start and limit."""
    n = PATIENCE[size]
    swept = [
        {"function": name, "start": start, "limit": limit_name(limit), "patience": n}
        for name, starts in STARTS.items()
        for start in starts
        for limit in LIMITS
    ]
    single = [
        {"function": name, "start": start, "limit": limit_name(limit), "patience": n}
        | {"rate": rate}
        for name, start, limit, rate in TRIAL
    ]
    return swept + single


def limit_name(limit: float) -> str:
    """Return how a limit is called in the tables."""
    return "no clipping" if math.isinf(limit) else f"limit {limit:g}"


def cost(cell: Cell) -> float:
    """Return the CPU seconds: without clipping a million steps may be needed."""
    return 1.2e-6 * cell["patience"] if cell["limit"] == "no clipping" else 0.0


def run(cell: Cell, seeds: Sequence[int], tick: Tick) -> Iterator[tuple[int, Row]]:
    """Descend with all step sizes side by side, until the first one is there."""
    limit = float(cell["limit"].replace("no clipping", "limit inf").split()[1])
    slope, rates = SLOPES[cell["function"]], np.array(cell.get("rate", RATES), ndmin=1)
    steps, rate = descend(slope, cell["start"], limit, cell["patience"], tick, rates)
    for seed in seeds:
        yield seed, {"steps": steps, "rate": rate}


def descend(
    slope: Any,
    start: float,
    limit: float,
    patience: int,
    tick: Tick,
    rates: Floats = RATES,
) -> tuple[int | None, float | None]:
    """Return the fewest steps to a flat place, and the step size that does it."""
    x = np.full(rates.shape, float(start))
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(patience + 1):
            g = slope(x)
            there = np.abs(g) <= ENOUGH
            if there.any():
                return step, float(rates[there][-1])
            finite = np.isfinite(g)
            # A rate that has diverged never comes back.
            if not finite.all():
                x, g, rates = x[finite], g[finite], rates[finite]
            x = x - rates * clipped(g, limit)
            if step % 10_000 == 0:
                tick(step / patience)
    return None, None


def clipped(g: Floats, limit: float) -> Floats:
    """Clip each number, by the library's own formula."""
    if math.isinf(limit):
        return g
    scale: Floats = g * clip_scale(np.abs(g), limit, np)
    return scale


def find(results: Results) -> Findings:
    """Count the steps."""
    swept = results.part(rate=None)
    rows, ratios = [], []
    limits = swept.options("limit")
    for function, start in ((f, x) for f, xs in STARTS.items() for x in xs):
        where = {"function": function, "start": start}
        counts = [swept.values("steps", limit=x, **where)[0] for x in limits]
        patience = swept.found(**where)[0]["patience"]
        rows.append([f"{function} from {start}", *(said(n, patience) for n in counts)])
        # One that never got there took longer than was waited for.
        slowest = max(n or patience for n in counts[1:])
        ratios.append((counts[0] or patience) / slowest)
    table = Table("Fewest steps to a slope of 10⁻³", ["function", *limits], rows)
    faster, slower = [r > 1 for r in ratios], [r < 1 for r in ratios]
    numbers = (
        f"the best fixed step needs {min(ratios):.2g} to {max(ratios):,.0f} times the "
        f"steps of the slowest of three limits; clipping is faster with every limit in "
        f"{sum(faster)} of {len(ratios)} starts, and slower in {sum(slower)}"
    )
    claim = Claim("Faster convergence, where curvature grows", seen(faster), numbers)
    return Findings([table, trial(results)], [claim])


def trial(results: Results) -> Table:
    """Return the steps that single pairs of a step size and a limit take."""
    rows = []
    for cell in results.cells:
        if "rate" in cell:
            steps = said(results.values("steps", **cell)[0], cell["patience"])
            name = f"{cell['function']} from {cell['start']}"
            rows.append([name, cell["limit"], f"{cell['rate']:.3g}", steps])
    columns = ["function", "limit", "step size", "steps"]
    return Table("Single step sizes, with the counts of the first trial", columns, rows)


def said(steps: int | None, patience: int) -> Any:
    """Return a count, or how far it did not go."""
    return f"none in {patience:,}" if steps is None else steps


def draw(results: Results, figure: Any) -> None:
    """Draw the steps over the starts."""
    swept = results.part(rate=None)
    for axes, function in zip(figure.subplots(1, 2, sharey=True), STARTS, strict=True):
        starts = STARTS[function]
        for i, limit in enumerate(swept.options("limit")):
            where = {"function": function, "limit": limit}
            steps = [swept.values("steps", start=x, **where)[0] for x in starts]
            line(axes, starts, steps, i, limit)
        axes.set(title=function, xlabel="start", yscale="log")
        axes.set_xscale("log" if function == "x⁴" else "linear")
    figure.axes[0].set_ylabel("steps to a slope of 10⁻³")
    figure.axes[0].legend()


STUDY = Study(
    name="smoothness",
    setup=SETUP,
    seeds=1,
    seeded=False,
    cells=cells,
    run=run,
    find=find,
    draw=draw,
    cost=cost,
    not_run=(
        "the paper's language model and ResNet, for want of time and a GPU",
        "step sizes between the three of each decade: some land on the optimum by luck",
    ),
)
