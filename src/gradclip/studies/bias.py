"""Where clipping leads somewhere else: skewed noise, rare classes, tiny thresholds.

Koloskova, Hendrikx, Stich: Revisiting gradient clipping: stochastic bias and tight
convergence guarantees. arXiv 2305.01588, 2023.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gradclip as gc
from gradclip.per_sample import clipped_sum
from gradclip.studies.drawing import GREY, curve
from gradclip.studies.frame import Claim, Findings, Size, Study, Tick, concluded
from gradclip.studies.results import Cell, Results, Row
from gradclip.studies.statistics import includes, mean
from gradclip.studies.tables import Table, pivot

Floats = NDArray[np.float64]
Clip = Callable[[Floats], Floats]
"""Clips a matrix with a gradient for each seed in its rows."""

POINTS = np.array([10.0] + [0.0] * 9)
"""The optimum of the mean squared distance is their mean, 1."""
TWO_POINT = {
    "no clipping": gc.Norm(math.inf, over="tensor"),
    "Norm(5)": gc.Norm(5.0, over="tensor"),
    "Norm(2)": gc.Norm(2.0, over="tensor"),
    "Norm(0.5)": gc.Norm(0.5, over="tensor"),
    "UClip(Norm(2))": gc.Norm(2.0, over="tensor"),
    "Percentile(window=1000)": gc.Percentile(window=1000, over="tensor"),
    "ZScore()": gc.ZScore(over="tensor"),
    "EMA()": gc.EMA(over="tensor"),
    "Skip(Deviation())": gc.Skip(gc.Deviation(over="tensor")),
}
LIMITS = {
    "no clipping": math.inf,
    "limit 1": 1.0,
    "limit 0.1": 0.1,
    "limit 0.01": 0.01,
    "limit 0.001": 0.001,
}
RARE = 0.02

SETUP = """Three places where a clipped step points elsewhere on average. *Two points*:
(x − ξ)²/2 with ξ = 10 in one of ten draws and else 0, so that the optimum is 1; a limit
c moves it to c/9 exactly. *Rare class*: logistic regression where 2 % of the samples
are of one class, with gradients of one sample or of 32, and for comparison the exact
expectation of per-sample clipping. *Tiny limits*: softmax regression on scikit-learn's
digits for a fixed number of steps, with a learning rate of 0.5, and with one raised by
as much as the limit was lowered. See Koloskova, Hendrikx, Stich (arXiv 2305.01588)."""


def cells(size: Size) -> list[Cell]:
    """Return the three parts."""
    steps = {"quick": 40, "usual": 5_000, "full": 100_000}[size]
    points = [{"part": "points", "rule": rule, "steps": steps} for rule in TWO_POINT]
    rare = [
        {"part": "rare", "limit": limit, "batch": batch, "steps": 3 * steps}
        for limit in list(LIMITS)[:4]
        for batch in ("1", "32", "expectation")
    ]
    tiny = [
        {"part": "tiny", "limit": limit, "rate": rate, "steps": max(20, steps // 5)}
        for limit in LIMITS
        for rate in ("0.5", "raised")
    ]
    return points + rare + tiny


def cost(cell: Cell) -> float:
    """Return the CPU seconds of a seed."""
    drops = cell["part"] == "points" and TWO_POINT[cell["rule"]].drops
    each = {"points": 2.8e-5, "rare": 1.9e-5, "tiny": 3.3e-5}[cell["part"]]
    return (3.8e-4 if drops else each) * cell["steps"]


def run(cell: Cell, seeds: Sequence[int], tick: Tick) -> Iterator[tuple[int, Row]]:
    """Run all seeds side by side, each with a limit of its own."""
    part = {"points": two_points, "rare": rare_class, "tiny": tiny_limits}[cell["part"]]
    yield from zip(seeds, part(cell, seeds, tick), strict=True)


def by_row(rule: gc.Rule, rows: int, carries: bool = False) -> Clip:
    """Return what clips each row of a matrix, with a memory for each."""
    if rule.drops:
        return row_by_row(rule, rows)
    clipper = gc.UClip(rule) if carries else gc.Clipper(rule)

    def clip(grads: Floats) -> Floats:
        # In a list each row is a tensor, with a norm and a memory of its own.
        return np.stack(clipper.clip(list(grads))[0])

    return clip


def row_by_row(rule: gc.Rule, rows: int) -> Clip:
    """Return a clipper for each row, as one for all drops all rows or none."""
    clippers = [gc.Clipper(rule) for _ in range(rows)]

    def clip(grads: Floats) -> Floats:
        return np.stack([c.clip(g)[0] for c, g in zip(clippers, grads, strict=True)])

    return clip


def two_points(cell: Cell, seeds: Sequence[int], tick: Tick) -> Iterator[Row]:
    """Descend at a rate of 0.01, and average over the second half."""
    rule, steps = TWO_POINT[cell["rule"]], cell["steps"]
    clip = by_row(rule, len(seeds), carries=cell["rule"].startswith("UClip"))
    sources = [np.random.default_rng(seed) for seed in seeds]
    draws = np.stack([rng.choice(POINTS, steps) for rng in sources], axis=1)
    x, total = np.zeros((len(seeds), 1)), np.zeros((len(seeds), 1))
    for step, points in enumerate(draws):
        x = x - 0.01 * clip(x - points[:, None])
        if step >= steps // 2:
            total += x
        if step % 1000 == 0:
            tick(step / steps)
    exact = None if rule.stateful or "U" in cell["rule"] else fixed_point(rule)
    for mean_x in total[:, 0] / (steps - steps // 2):
        yield {"x": float(mean_x), "exact": exact}


def fixed_point(rule: gc.Rule) -> float:
    """Return where the expectation of the clipped gradient is 0."""
    x = 0.0
    for _ in range(2000):
        total, _ = clipped_sum(x - POINTS, rule)
        x -= 0.1 * float(total) / POINTS.size
    return x


def descend(
    w: Floats, gradient: Callable[[Floats], Floats], clip: Clip, rate: float, cell: Cell
) -> Floats:
    """Descend with a rate that falls to nothing; return where it ends."""
    steps = cell["steps"]
    for step in range(steps):
        w = w - rate * (1 - step / steps) * clip(gradient(w))
    return w


def rows_clip(limit: float) -> Clip:
    """Return what clips each row of a matrix to a limit."""
    rule = gc.Norm(limit, over="unit")
    return lambda grads: gc.clip(grads, rule)[0]


def samples(seed: int, count: int) -> tuple[Floats, Floats]:
    """Return two clouds that overlap, one of them rare; the last column is 1."""
    rng = np.random.default_rng(seed)
    y = (rng.random(count) < RARE).astype(np.float64)
    x = rng.normal(size=(count, 5)) + y[:, None]
    return np.concatenate([x, np.ones((count, 1))], axis=1), y


def sigmoid(x: Floats) -> Floats:
    """Return the probability of logits, without overflow."""
    half: Floats = 0.5 * (1 + np.tanh(x / 2))
    return half


def rare_class(cell: Cell, seeds: Sequence[int], tick: Tick) -> Iterator[Row]:
    """Train on 5000 samples; tell what is predicted for 20 000 others."""
    made = [samples(seed, 5000) for seed in seeds]
    x, y = np.stack([x for x, _ in made]), np.stack([y for _, y in made])
    limit, w = LIMITS[cell["limit"]], np.zeros((len(seeds), 6))
    if cell["batch"] == "expectation":
        w = expectation(w, x, y, limit, cell["steps"] // 30)
    else:
        batch = int(cell["batch"])
        # Other seeds than for the samples, so that the choice does not hang on them.
        rng = [np.random.default_rng(10_000 + seed) for seed in seeds]
        runs = np.arange(len(seeds))[:, None]

        def gradient(w: Floats) -> Floats:
            chosen = np.stack([r.integers(0, 5000, batch) for r in rng])
            xs, ys = x[runs, chosen], y[runs, chosen]
            off = sigmoid((xs @ w[:, :, None])[..., 0]) - ys
            return np.einsum("rb,rbd->rd", off, xs) / batch

        w = descend(w, gradient, rows_clip(limit), 0.1 * faster(limit), cell)
    for seed, weights in zip(seeds, w, strict=True):
        test, truth = samples(20_000 + seed, 20_000)
        p = sigmoid(test @ weights)
        found = float(np.mean(p[truth == 1] > 0.5))
        yield {"predicted": float(p.mean() / truth.mean()), "found": found}


def faster(limit: float) -> float:
    """Return how much a rate is raised to make up for a limit below 1."""
    return max(1.0, 1 / limit) if limit < 1 else 1.0


def expectation(w: Floats, x: Floats, y: Floats, limit: float, steps: int) -> Floats:
    """Descend along the mean of the gradients that were clipped one by one."""
    rule = gc.Norm(limit)
    rate = 2.0 * faster(limit)
    for row, xs, ys in zip(w, x, y, strict=True):
        for step in range(steps):
            off = sigmoid(xs @ row) - ys
            total, _ = clipped_sum(off[:, None] * xs, rule)
            row -= rate * (1 - step / steps) * total / len(xs)
    return w


def tiny_limits(cell: Cell, seeds: Sequence[int], tick: Tick) -> Iterator[Row]:
    """Train softmax regression on the digits; tell the loss on all of them."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = np.c_[images / 16, np.ones(len(images))], np.eye(10)[labels]
    limit = LIMITS[cell["limit"]]
    rate = 0.5 * (faster(limit) if cell["rate"] == "raised" else 1.0)
    rng = [np.random.default_rng(seed) for seed in seeds]

    def gradient(w: Floats) -> Floats:
        chosen = np.stack([r.integers(0, len(x), 32) for r in rng])
        xs = x[chosen]
        p = softmax(xs @ w.reshape(-1, 65, 10))
        g: Floats = xs.transpose(0, 2, 1) @ (p - y[chosen]) / 32
        return g.reshape(len(w), -1)

    w = descend(np.zeros((len(seeds), 650)), gradient, rows_clip(limit), rate, cell)
    for weights in w:
        p = softmax(x @ weights.reshape(65, 10))
        # A probability may be rounded to 0, and one infinite loss would be the mean.
        yield {"loss": float(-np.log(np.sum(p * y, axis=1) + 1e-300).mean())}


def softmax(x: Floats) -> Floats:
    """Return probabilities along the last axis."""
    # Less the largest, so that none overflows.
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    p: Floats = e / e.sum(axis=-1, keepdims=True)
    return p


def find(results: Results) -> Findings:
    """Tell how far from the optimum each part ends."""
    points, rare, tiny = (results.part(part=x) for x in ("points", "rare", "tiny"))
    tables = [
        points_table(points),
        pivot(
            rare,
            "Rare class: the mean predicted probability over the true share",
            "predicted",
            rows="limit",
            columns="batch",
            reference="no clipping",
        ),
        pivot(
            rare,
            "Rare class: the share of it that is found",
            "found",
            rows="limit",
            columns="batch",
            reference="no clipping",
            form=".1%",
        ),
        pivot(
            tiny,
            "Tiny limits: cross-entropy on all digits",
            "loss",
            rows="limit",
            columns="rate",
            reference="no clipping",
        ),
    ]
    return Findings(tables, [unbiased(points, rare)])


def points_table(points: Results) -> Table:
    """Return where each rule ends, beside the exact place."""
    rows = []
    for rule in points.options("rule"):
        exact = points.values("exact", rule=rule)[0]
        expected = "not computed" if exact is None else f"{exact:.4f}"
        rows.append([f"`{rule}`", expected, {**mean(points.values("x", rule=rule))}])
    columns = ["rule", "exact expectation", "mean of x"]
    return Table("Two points: where it ends; the optimum is 1", columns, rows, ".4f")


def unbiased(points: Results, rare: Results) -> Claim:
    """Return whether clipping left the optimum where it was."""
    ends = {rule: mean(points.values("x", rule=rule)) for rule in TWO_POINT}
    kept = {r: includes(e, 1.0) for r, e in ends.items() if r != "no clipping"}
    away = [f"`{r}` {ends[r]['value']:.3f}" for r, there in kept.items() if not there]
    where = "the ends are" if None in kept.values() else "outside the interval of"
    lowest = mean(rare.values("predicted", limit="limit 0.1", batch="1"))
    numbers = (
        f"the optimum of two points is 1, {where} {', '.join(away) or 'none'}; with "
        f"one sample a step and a limit of 0.1 a rare class is predicted at "
        f"{lowest['value']:.2f} times its share"
    )
    return concluded(
        "Clipping leaves the optimum in place", list(kept.values()), numbers
    )


def draw(results: Results, figure: Any) -> None:
    """Draw the exact places of two points, and the losses under tiny limits."""
    left, right = figure.subplots(1, 2)
    points, tiny = results.part(part="points"), results.part(part="tiny")
    limits = {"Norm(0.5)": 0.5, "Norm(2)": 2.0, "Norm(5)": 5.0}
    left.plot([0, 9], [0, 1], color=GREY, label="c/9, exact")
    found = [mean(points.values("x", rule=rule)) for rule in limits]
    curve(left, list(limits.values()), found, 0, "Norm(c)")
    carried = [mean(points.values("x", rule="UClip(Norm(2))"))]
    curve(left, [2.0], carried, 1, "UClip(Norm(2))")
    left.set(xlabel="limit c", ylabel="where two points lead; the optimum is 1")
    left.legend()
    places = [10 if math.isinf(x) else x for x in LIMITS.values()]
    for i, rate in enumerate(tiny.options("rate")):
        losses = [mean(tiny.values("loss", rate=rate, limit=x)) for x in LIMITS]
        curve(right, places, losses, i, f"rate {rate}")
    right.set(xscale="log", xlabel="limit (at the right end: none)", ylabel="loss")
    right.legend()


STUDY = Study(
    name="bias",
    setup=SETUP,
    seeds=10,
    cells=cells,
    run=run,
    find=find,
    draw=draw,
    cost=cost,
    not_run=(
        "deep networks on data with rare classes",
        "other ways to remove the bias than `UClip`, such as error feedback (Clip21)",
    ),
)
