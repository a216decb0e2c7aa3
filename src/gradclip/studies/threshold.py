"""Does `advise` put the limit where training goes best?

For each task and seed: train without clipping, ask `advise` for a limit from the norms
of that run, train again with it, and compare the loss at the end with those of a sweep.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gradclip as gc
from gradclip.characters import Network, Setup, library_text
from gradclip.characters import train as train_demo
from gradclip.studies.drawing import line
from gradclip.studies.frame import Claim, Findings, Size, Study, Tick, seen
from gradclip.studies.results import Cell, Results, Row
from gradclip.studies.tables import Table
from gradclip.torch import ClipWarning, attach

STEPS = {"characters": 600, "digits": 600, "outliers": 1500}
"""The tasks, and the steps of each."""
ADVISED = "advised"
CLOSE = 0.05
"""How far above the best of the sweep a loss may be."""
LAST = 100
"""The steps at the end whose loss counts."""
Steps = Iterator[tuple[float, float]]
"""The loss and the norm of each step."""

SETUP = """Each task is trained without clipping, `advise` is asked for a limit from the
norms and losses of that run, and the task is trained again with it; the loss, a mean
over the last 100 steps, is compared with the best of a sweep over twelve limits from
0.01 to 30, for the same seed. *characters* is the network of `gradclip demo`, *digits*
classifies scikit-learn's handwritten digits, and *outliers* fits a surface through
heavy-tailed noise; the last two by SGD with momentum 0.9, and with the loss on all
digits and without the noise. At most 5 % above the best was wanted. A single run for
each limit: where limits that clip next to nothing end 5 % apart, so may the advice."""


def cells(size: Size) -> list[Cell]:
    """Return each task with each limit, and with the advised one."""
    share, count = {"quick": (0.05, 2), "usual": (1, 12), "full": (1, 45)}[size]
    limits = np.geomspace(0.01, 30, count).round(4).tolist()
    return [
        {"task": task, "limit": limit, "steps": int(steps * share)}
        for task, steps in STEPS.items()
        for limit in [*limits, ADVISED]
    ]


def cost(cell: Cell) -> float:
    """Return the CPU seconds of a seed; advice takes two runs."""
    each = {"characters": 0.022, "digits": 0.003, "outliers": 0.0015}[cell["task"]]
    return each * cell["steps"] * (2 if cell["limit"] == ADVISED else 1)


def run(cell: Cell, seeds: Sequence[int], tick: Tick) -> Iterator[tuple[int, Row]]:
    """Train with one limit, or ask for one first."""
    for i, seed in enumerate(seeds):
        with warnings.catch_warnings():
            # A sweep has limits that clip every step.
            warnings.simplefilter("ignore", ClipWarning)
            row = measure(cell, seed)
        yield seed, row
        tick((i + 1) / len(seeds))


def measure(cell: Cell, seed: int) -> Row:
    """Return where the loss of one run ends."""
    if cell["limit"] == ADVISED:
        return ask(cell, seed)
    return {"loss": final_loss(train(cell, cell["limit"], seed))}


def ask(cell: Cell, seed: int) -> Row:
    """Train without clipping, ask for a limit, and train with it."""
    losses, norms = zip(*train(cell, math.inf, seed), strict=True)
    limit = gc.advise(gc.History.of(norms, loss=losses)).limit
    ends = final_loss(zip(losses, norms, strict=True))
    # Without advice nothing is clipped.
    advised = ends if limit is None else final_loss(train(cell, limit, seed))
    return {"loss": advised, "limit": limit, "unclipped": ends}


def final_loss(steps: Steps) -> float:
    """Return the mean over the last steps; infinity where there is none."""
    found = float(np.mean([loss for loss, _ in steps][-LAST:]))
    return found if math.isfinite(found) else math.inf


def train(cell: Cell, limit: float, seed: int) -> Steps:
    """Train a task with a limit."""
    tasks: dict[str, Callable[[float, int, int], Steps]] = {
        "characters": characters,
        "digits": digits,
        "outliers": outliers,
    }
    return tasks[cell["task"]](limit, seed, cell["steps"])


def characters(limit: float, seed: int, steps: int) -> Steps:
    """Train the network of `gradclip demo`: an LSTM over characters."""
    setup = Setup(seed=seed, steps=steps)
    torch.manual_seed(seed)
    network, text = Network(setup), library_text()
    for step in train_demo(gc.Norm(limit), network, text, setup):
        yield step.loss, step.norm


def digits(limit: float, seed: int, steps: int) -> Steps:
    """Classify scikit-learn's handwritten digits; the loss is that on all of them."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(64, 10))
    cost = nn.CrossEntropyLoss()
    for norm in descend(network, cost, (x, y), 0.1, limit, seed, steps):
        with torch.no_grad():
            yield cost(network(x), y).item(), norm


def outliers(limit: float, seed: int, steps: int) -> Steps:
    """Fit a surface to points with heavy-tailed noise; the loss is that without it."""
    rng = np.random.default_rng(1000 + seed)
    x = rng.normal(size=(4096, 8))
    clean = np.sin(x[:, 0]) + x[:, 1] * x[:, 2]
    noisy = clean + 0.2 * rng.standard_t(2, size=4096)
    inputs, truth, targets = (
        torch.tensor(part, dtype=torch.float32) for part in (x, clean, noisy)
    )
    torch.manual_seed(seed)
    layers = [nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1)]
    network = nn.Sequential(*layers, nn.Flatten(0))
    cost = nn.MSELoss()
    for norm in descend(network, cost, (inputs, targets), 0.003, limit, seed, steps):
        with torch.no_grad():
            yield cost(network(inputs), truth).item(), norm


def descend(
    network: nn.Module,
    cost: nn.Module,
    data: tuple[Tensor, Tensor],
    lr: float,
    limit: float,
    seed: int,
    steps: int,
) -> Iterator[float]:
    """Descend by stochastic gradients with momentum; yield the norm of each step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    clipper = attach(optimizer, gc.Norm(limit), network)
    order, (x, y) = torch.Generator().manual_seed(seed), data
    for _ in range(steps):
        chosen = torch.randint(len(x), (32,), generator=order)
        optimizer.zero_grad()
        cost(network(x[chosen]), y[chosen]).backward()
        optimizer.step()
        if clipper.info:
            yield float(clipper.info.norm)


def find(results: Results) -> Findings:
    """Compare the advised limit with the best of the sweep, seed by seed."""
    found = [
        outcome(results, task, i)
        for task in results.options("task")
        for i in range(len(results.seeds))
    ]
    columns = ["task", "seed", "loss unclipped", "best limit", "its loss"]
    columns += ["advised limit", "its loss", "off the best"]
    rows = [[*map(shown, entries), f"{off:+.1%}"] for *entries, off in found]
    table = Table("The advised limit against the best of the sweep", columns, rows)
    close = [off <= CLOSE for *_, off in found]
    misses = [f"{x[0]}, seed {x[1]} {x[-1]:+.1%}" for x in found if x[-1] > CLOSE]
    numbers = (
        f"at most {CLOSE:.0%} above the best limit of the sweep in {sum(close)} of "
        f"{len(close)} runs; the others: {'; '.join(misses) or 'none'}"
    )
    return Findings([table], [Claim("Advice from norms", seen(close), numbers)])


def outcome(results: Results, task: str, i: int) -> tuple[Any, ...]:
    """Return a row of the table, with how far the advice is off as a number."""
    limits = [x for x in results.options("limit") if x != ADVISED]
    losses = {x: results.values("loss", task=task, limit=x)[i] for x in limits}
    best = min(losses, key=lambda limit: losses[limit])
    ours, advised, unclipped = (
        results.values(name, task=task, limit=ADVISED)[i]
        for name in ("loss", "limit", "unclipped")
    )
    off = ours / losses[best] - 1
    seed = str(results.seeds[i])
    return task, seed, unclipped, best, losses[best], advised, ours, off


def shown(entry: Any) -> str:
    """Return what an entry of the table says."""
    return (
        "none" if entry is None else entry if isinstance(entry, str) else f"{entry:.4g}"
    )


def draw(results: Results, figure: Any) -> None:
    """Draw the loss over the limit for each seed, and where the advice ends."""
    limits = [x for x in results.options("limit") if x != ADVISED]
    tasks = results.options("task")
    for axes, task in zip(figure.subplots(1, len(tasks)), tasks, strict=True):
        swept = [results.values("loss", task=task, limit=x) for x in limits]
        asked = results.values("limit", task=task, limit=ADVISED)
        ends = results.values("loss", task=task, limit=ADVISED)
        for i, seed in enumerate(results.seeds):
            line(axes, limits, [losses[i] for losses in swept], i, f"seed {seed}")
            line(axes, [asked[i]], [ends[i]], i, markersize=11)
        axes.set(title=task, xscale="log", yscale="log", xlabel="limit")
    figure.axes[0].set_ylabel("loss at the end; large marks: advised")
    figure.axes[0].legend()


STUDY = Study(
    name="threshold",
    setup=SETUP,
    seeds=3,
    cells=cells,
    run=run,
    find=find,
    draw=draw,
    cost=cost,
    not_run=(
        "several runs for each limit and seed, which would tell noise from advice",
        "networks of the size that people ask about",
        "learning rates at which the unclipped run fails, where the norms of that run "
        "do not tell where the limit belongs",
    ),
)
