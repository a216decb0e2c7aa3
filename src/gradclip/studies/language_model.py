"""The classic recipe of an LSTM, over learning rates and rules."""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

import gradclip as gc
from gradclip.characters import CHARACTERS, Network, Setup, library_text, train
from gradclip.studies.drawing import GREY, curve
from gradclip.studies.frame import Claim, Findings, Size, Study, Tick, concluded
from gradclip.studies.results import Cell, Results, Row
from gradclip.studies.statistics import Estimate, difference, mean, positive
from gradclip.studies.tables import pivot, text

NONE, CLASSIC = "no clipping", "Norm(0.25)"
RULES: dict[str, gc.Rule] = {
    NONE: gc.Norm(math.inf),
    "Norm(1)": gc.Norm(1.0),
    CLASSIC: gc.Norm(0.25),
    "Norm(0.05)": gc.Norm(0.05),
    "Percentile(10)": gc.Percentile(q=10.0),
    "ZScore(max 1)": gc.ZScore(max_limit=1.0),
    "EMA(all)": gc.EMA(over="all"),
}
LIMITS = ("Norm(1)", CLASSIC, "Norm(0.05)")
RATES = (1.25, 5.0, 20.0, 80.0)
library = functools.cache(library_text)
GUESS = math.log(CHARACTERS)
"""The loss of a guess at random."""
LAST = 50
"""The steps at the end whose loss counts."""

SETUP = """The recipe of pytorch/examples' word language model (plain SGD, rate 20,
limit 0.25) for an LSTM that guesses the next character of Python's own library text:
two layers of 64 units, 8 excerpts of 32 characters a step, 200 steps. The loss is the
mean over the last 50 steps; hardly any excerpt has been seen before, as all steps
together read 1 % of the text. A guess at random has a loss of ln 128 = 4.85,
which counts for runs that end above it or are lost."""


def cells(size: Size) -> list[Cell]:
    """Return each rule at each learning rate."""
    small = {"layers": 2, "hidden": 64, "embedding": 32, "batch": 8, "length": 32}
    large = {"layers": 2, "hidden": 200, "embedding": 200, "batch": 20, "length": 35}
    shape = large if size == "full" else small
    steps = {"quick": 4, "usual": 200, "full": 3000}[size]
    return [
        {"rule": rule, "lr": lr, "steps": steps} | shape
        for lr in RATES
        for rule in RULES
    ]


def cost(cell: Cell) -> float:
    """Return the CPU seconds of a seed, by the weights times the characters."""
    weights = cell["layers"] * 8 * cell["hidden"] ** 2
    return 2.2e-10 * weights * cell["batch"] * cell["length"] * cell["steps"]


def run(cell: Cell, seeds: Sequence[int], tick: Tick) -> Iterator[tuple[int, Row]]:
    """Train once for each seed."""
    text = library()
    settings = {name: x for name, x in cell.items() if name != "rule"}
    for i, seed in enumerate(seeds):
        setup = Setup(seed=seed, **settings)
        torch.manual_seed(seed)
        steps = []
        # A run that is lost for a hundred steps ends with an error.
        with suppress(gc.NonFiniteError):
            for step in train(RULES[cell["rule"]], Network(setup), text, setup):
                steps.append(step)
        # Steps that were never made count as lost.
        losses = [step.loss for step in steps] + [math.nan] * (setup.steps - len(steps))
        yield (
            seed,
            {
                "raw_loss": (loss := float(np.mean(losses[-LAST:]))),
                "loss": loss if loss < GUESS else GUESS,
                "clip_rate": float(np.mean([step.scale < 1 for step in steps])),
                "largest_norm": float(np.max([step.norm for step in steps])),
            },
        )
        tick((i + 1) / len(seeds))


def find(results: Results) -> Findings:
    """Compare the losses at each learning rate, and at the best one."""
    tables = [
        pivot(
            results,
            "Loss at the end",
            "loss",
            rows="rule",
            columns="lr",
            reference=NONE,
            form=".3f",
        ),
        pivot(
            results,
            "Share of steps clipped",
            "clip_rate",
            rows="rule",
            columns="lr",
            form=".0%",
        ),
    ]
    return Findings(tables, [higher_rates(results), faster(results)])


def lower(results: Results, rule: str, rate: float, other: float) -> Estimate:
    """Return how much lower the loss is under a rule, seed by seed."""
    ours = results.values("loss", rule=rule, lr=rate)
    return difference(results.values("loss", rule=NONE, lr=other), ours)


def higher_rates(results: Results) -> Claim:
    """Return whether limits help at rates above the best one without clipping."""
    best = best_rate(results, NONE)
    places = [(rule, lr) for lr in RATES if lr > best for rule in LIMITS]
    found = [lower(results, rule, lr, lr) for rule, lr in places]
    said = "; ".join(
        f"rate {lr:g}, `{rule}` {text({**e}, '+.2f')}"
        for (rule, lr), e in zip(places, found, strict=True)
    )
    numbers = (
        f"without clipping rate {best:g} is the best of {len(RATES)}; above it, the "
        f"loss without less that with a limit: {said or 'no rate was tried'}"
    )
    claim = "Clipping lets you raise the learning rate"
    return concluded(claim, [positive(e) for e in found], numbers)


def best_rate(results: Results, rule: str) -> float:
    """Return the rate with the lowest mean loss."""
    return min(RATES, key=lambda lr: np.mean(results.values("loss", rule=rule, lr=lr)))


def faster(results: Results) -> Claim:
    """Return whether clipping is ahead when each side has its best rate."""
    ours, theirs = best_rate(results, CLASSIC), best_rate(results, NONE)
    e = lower(results, CLASSIC, ours, theirs)
    numbers = (
        f"each at its best of {len(RATES)} rates ({ours:g} with `{CLASSIC}`, "
        f"{theirs:g} without), the loss is lower with clipping by {text({**e}, '.3f')}"
    )
    return concluded("Faster convergence of an LSTM", [positive(e)], numbers)


def draw(results: Results, figure: Any) -> None:
    """Draw the loss over the learning rate."""
    axes = figure.subplots()
    for i, rule in enumerate(RULES):
        found = [mean(results.values("loss", rule=rule, lr=lr)) for lr in RATES]
        curve(axes, RATES, found, i, rule)
    axes.axhline(GUESS, color=GREY, linewidth=1, label="guess at random")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss at the end")
    axes.set_xticks(RATES, [f"{lr:g}" for lr in RATES])
    figure.legend(loc="outside right upper")


STUDY = Study(
    name="language-model",
    setup=SETUP,
    seeds=5,
    cells=cells,
    run=run,
    find=find,
    draw=draw,
    cost=cost,
    not_run=(
        "learning rates between the four, each of which may be better for either side",
        "words instead of characters, dropout, and the 40 epochs of the recipe",
        "the learning rate divided by four when the loss stops falling",
        "in the usual size, two layers of 200 units",
    ),
)
