"""The temporal-order task of Pascanu, Mikolov, Bengio (1211.5063, 2013), figure 7.

The settings are those of the paper and of its authors' code (pascanur/trainingRNNs).
All seeds are trained side by side as the rows of one matrix, with gradients written
out by hand, and clipped row by row.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradclip.rules import Norm
from gradclip.studies.drawing import curve
from gradclip.studies.frame import Findings, Size, Study, Tick, concluded
from gradclip.studies.results import Cell, Results, Row
from gradclip.studies.statistics import above, geometric, share
from gradclip.studies.tables import Table, pivot, rates, text
from gradclip.torch import Clipper

SYMBOLS, CLASSES, HIDDEN, BATCH = 6, 4, 50, 20
RATE, SOLVED = 0.01, 0.01
"""The learning rate, and the share of errors below which the task counts as solved."""
LIMITS = {"clip at 1": 1.0, "no clipping": math.inf}
SHAPES = {
    "U": (SYMBOLS, HIDDEN),
    "W": (HIDDEN, HIDDEN),
    "b": (1, HIDDEN),
    "V": (HIDDEN, CLASSES),
    "c": (1, CLASSES),
}

SETUP = """A network of 50 tanh units reads T symbols; two of them, near T/10 and T/2,
are A or B, and all others distract. At the end it tells which of the four orders it
was. Batch 20, plain gradient descent at rate 0.01, clipping at a norm of 1, weights
"smart tanh" (15 inputs to each unit, spectral radius 0.95): Pascanu, Mikolov, Bengio
(arXiv 1211.5063) and their code. Solved means an error below 1 % on 10 000 fresh
sequences, looked for every 1000 updates; after 8000 updates with T = 20 and 24 000
with T = 50 (100 000 in the full size) it counts as not solved. A first trial of 16 000
at T = 50 had 4 of 10 seeds solved with clipping, and others on their way. Both arms
start from the same weights and see the same sequences."""


class Net(NamedTuple):
    """The weights of all runs, as views into one matrix with a row for each."""

    U: Tensor
    W: Tensor
    b: Tensor
    V: Tensor
    c: Tensor


def cells(size: Size) -> list[Cell]:
    """Return the lengths of the figure, then other rates at one length."""
    lengths, fewer, every, test, at = {
        "quick": ({10: 6, 12: 6}, 6, 3, 50, 10),
        "usual": ({20: 8_000, 50: 24_000}, 8_000, 1000, 10_000, 20),
        "full": (
            dict.fromkeys((20, 30, 50, 75, 100), 100_000),
            100_000,
            1000,
            10_000,
            50,
        ),
    }[size]
    others = [0.001, 0.003, 0.03, 0.1] if size == "full" else [0.03]
    main = [(T, RATE, updates, True) for T, updates in lengths.items()]
    main += [(at, lr, fewer, False) for lr in others]
    return [
        {"arm": arm, "T": T, "lr": lr, "updates": n, "main": is_main}
        | {"every": every, "test": test}
        for T, lr, n, is_main in main
        for arm in LIMITS
    ]


def views(flat: Tensor) -> Net:
    """Return the weights in a matrix of rows."""
    parts, at = [], 0
    for shape in SHAPES.values():
        size = math.prod(shape)
        parts.append(flat[:, at : at + size].unflatten(1, shape))
        at += size
    return Net(*parts)


def smart_tanh(seed: int) -> Tensor:
    """Return the weights of one run: sparse, with a spectral radius of 0.95."""
    rng = np.random.default_rng(seed)
    W = np.zeros((HIDDEN, HIDDEN))
    for row in W:
        row[rng.permutation(HIDDEN)[:15]] = rng.normal(0, 0.01, 15)
    W *= 0.95 / np.abs(np.linalg.eigvals(W)).max()
    made = {
        "U": rng.normal(0, 0.01, SHAPES["U"]),
        "W": W,
        "b": np.zeros(SHAPES["b"]),
        "V": rng.normal(0, 0.01, SHAPES["V"]),
        "c": np.zeros(SHAPES["c"]),
    }
    return torch.tensor(np.concatenate([x.ravel() for x in made.values()])).float()


def sequences(
    count: int, length: int, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return symbols [count, length], of which 0 and 1 matter, and the classes."""
    symbols = torch.randint(2, SYMBOLS, (count, length), generator=source)
    order = torch.randint(0, 2, (count, 2), generator=source)
    spread = max(1, length // 10)
    rows = torch.arange(count)
    for i, start in enumerate((length // 10, length // 2)):
        places = start + torch.randint(0, spread, (count,), generator=source)
        symbols[rows, places] = order[:, i]
    return symbols, order[:, 0] + 2 * order[:, 1]


def batch(length: int, sources: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Return symbols [length, runs, batch] and classes [runs, batch]."""
    made = [sequences(BATCH, length, source) for source in sources]
    return torch.stack([x.T for x, _ in made], 1), torch.stack([y for _, y in made])


class Passes:
    """Forwards and backwards through time for all runs, in memory that is kept."""

    def __init__(self, runs: int, length: int) -> None:
        """Take the memory: what is taken anew at each update costs half the time."""
        shape = (length, runs, BATCH, HIDDEN)
        self.length, self.offset = length, SYMBOLS * torch.arange(runs)[None, :, None]
        self.inputs, self.back = torch.empty(shape), torch.empty(shape)
        self.states = torch.zeros(length + 1, runs, BATCH, HIDDEN)
        self.rows = [
            torch.empty(runs, length, BATCH, size) for size in (HIDDEN, HIDDEN, SYMBOLS)
        ]
        self.slope = np.empty(shape[1:], np.float32)
        self.one_hot = torch.empty(length, runs, BATCH, SYMBOLS)

    def forward(self, net: Net, symbols: Tensor) -> Tensor:
        """Return the logits after symbols [length, runs, batch]."""
        rows = (net.U + net.b).flatten(0, 1)
        places = (symbols + self.offset).flatten()
        torch.index_select(rows, 0, places, out=self.inputs.view(-1, HIDDEN))
        # In the loops NumPy, whose tanh and small products take half of torch's time.
        W, states = net.W.contiguous().numpy(), self.states.numpy()
        for now, after, inputs in zip(
            states[:-1], states[1:], self.inputs.numpy(), strict=True
        ):
            np.matmul(now, W, out=after)
            np.add(after, inputs, out=after)
            np.tanh(after, out=after)
        return self.states[-1] @ net.V + net.c

    def backward(self, net: Net, into: Net, symbols: Tensor, error: Tensor) -> None:
        """Write the gradient that follows from that of the logits."""
        into.V.copy_(self.states[-1].transpose(1, 2) @ error)
        into.c.copy_(error.sum(1, keepdim=True))
        self.through_time((error @ net.V.transpose(1, 2)).numpy(), net.W)
        self.one_hot.zero_().scatter_(3, symbols[..., None], 1.0)
        before, back, one_hot = self.by_run()
        into.W.copy_(before.transpose(1, 2) @ back)
        into.U.copy_(one_hot.transpose(1, 2) @ back)
        # At every place there is one symbol.
        into.b.copy_(into.U.sum(1, keepdim=True))

    def through_time(self, delta: NDArray[Any], W: Tensor) -> None:
        """Go back from what the last states are told."""
        turned, slope = W.transpose(1, 2).contiguous().numpy(), self.slope
        states, back = self.states.numpy()[1:], self.back.numpy()
        for state, at in zip(states[::-1], back[::-1], strict=True):
            np.multiply(state, state, out=slope)
            np.subtract(1, slope, out=slope)
            np.multiply(delta, slope, out=at)
            np.matmul(at, turned, out=delta)

    def by_run(self) -> list[Tensor]:
        """Return what all places of a run have, in one matrix for each run."""
        found = (self.states[:-1], self.back, self.one_hot)
        for rows, x in zip(self.rows, found, strict=True):
            rows.copy_(x.transpose(0, 1))
        return [rows.flatten(1, 2) for rows in self.rows]

    def gradient(self, net: Net, into: Net, symbols: Tensor, classes: Tensor) -> None:
        """Write the gradient of the mean cross-entropy of each run."""
        truth = torch.nn.functional.one_hot(classes, CLASSES)
        # This is the gradient of cross-entropy in the logits.
        error = self.forward(net, symbols).softmax(2) - truth
        self.backward(net, into, symbols, error / BATCH)


def errors(flat: Tensor, count: int, length: int, source: torch.Generator) -> float:
    """Return the share of fresh sequences that one run gets wrong."""
    net = Net(*(x[0] for x in views(flat[None])))
    symbols, classes = sequences(count, length, source)
    inputs = net.U + net.b
    state = torch.zeros(count, HIDDEN)
    for t in range(length):
        state = torch.addmm(inputs[symbols[:, t]], state, net.W).tanh_()
    wrong: Tensor = (state @ net.V + net.c).argmax(1) != classes
    return wrong.double().mean().item()


def cost(cell: Cell) -> float:
    """Return the CPU seconds of a seed that does not solve the task."""
    return 1.1e-5 * cell["T"] * cell["updates"]


def run(cell: Cell, seeds: Sequence[int], tick: Tick) -> Iterator[tuple[int, Row]]:
    """Train all seeds side by side; a run that has solved the task ends there."""
    rows = {seed: Row(best=1.0, solved_at=None) for seed in seeds}
    flat = torch.stack([smart_tanh(seed) for seed in seeds])
    training = {s: torch.Generator().manual_seed(s) for s in seeds}
    # Apart, so that a test does not change what is trained on next.
    testing = {s: torch.Generator().manual_seed(1_000_000 + s) for s in seeds}
    going = list(seeds)
    for start in range(0, cell["updates"], cell["every"]):
        sources = [training[seed] for seed in going]
        largest = train(flat, cell, sources)
        done = start + cell["every"]
        tick(done / cell["updates"])
        kept = []
        for i, seed in enumerate(going):
            row = rows[seed]
            row["largest_norm"] = max(row.get("largest_norm", 0.0), float(largest[i]))
            row["error"] = tested(flat[i], cell, testing[seed])
            row["best"] = min(row["best"], row["error"])
            if row["error"] < SOLVED:
                row["solved_at"] = done
            else:
                kept.append(i)
        flat, going = flat[kept].clone(), [going[i] for i in kept]
        if not going:
            break
    for seed, row in rows.items():
        yield seed, row | {"solved": row["solved_at"] is not None}


def tested(flat: Tensor, cell: Cell, source: torch.Generator) -> float:
    """Return the error; all sequences are spent only where the first ones go well."""
    first = errors(flat, cell["test"] // 10, cell["T"], source)
    if first >= 2 * SOLVED:
        return first
    return errors(flat, cell["test"], cell["T"], source)


def train(flat: Tensor, cell: Cell, sources: Sequence[torch.Generator]) -> Tensor:
    """Make the updates between two tests; return the largest norm of each run."""
    parameter = torch.nn.Parameter(flat)
    parameter.grad = torch.zeros_like(flat)
    net, into = views(flat), views(parameter.grad)
    rule = Norm(LIMITS[cell["arm"]], over="unit")
    clipper = Clipper([("runs", parameter)], rule, on_nonfinite="ignore", doctor=())
    passes = Passes(len(flat), cell["T"])
    largest = torch.zeros(len(flat))
    with torch.no_grad():
        for _ in range(cell["every"]):
            passes.gradient(net, into, *batch(cell["T"], sources))
            largest = torch.maximum(largest, clipper.clip_().norm.flatten())
            flat.add_(parameter.grad, alpha=-cell["lr"])
    return largest


def find(results: Results) -> Findings:
    """Compare the shares that solved the task."""
    main = results.part(main=True)
    lengths = main.options("T")
    rated = at_rates(results)
    tables = [
        rates(main, "Runs that solve the task", "solved", rows="arm", columns="T"),
        pivot(main, "Best error", "best", rows="arm", columns="T", form=".1%"),
        pivot(
            main,
            "Largest norm, geometric mean",
            "largest_norm",
            rows="arm",
            columns="T",
            form=",.0f",
            estimate=geometric,
        ),
        rated,
    ]
    both = {
        T: [share(main.values("solved", arm=x, T=T)) for x in LIMITS] for T in lengths
    }
    apart = [above(*pair) for pair in both.values()]
    said = "; ".join(
        f"T = {T}: {text(ours, '.0%')} solve it with clipping, "
        f"{text(theirs, '.0%')} without"
        for T, (ours, theirs) in both.items()
    )
    claim = concluded("Steadier training of recurrent networks", apart, said)
    return Findings(tables, [claim])


def at_rates(results: Results) -> Table:
    """Return how many solve the task at each learning rate, in the updates all had."""
    (at,) = results.options("T", main=False)
    rated = results.part(T=at)
    limit = min(rated.options("updates"))
    return pivot(
        rated,
        f"Runs at T = {at} that solve the task within {limit:,} updates",
        "solved_at",
        rows="arm",
        columns="lr",
        form=".0%",
        estimate=lambda ats: share([x is not None and x <= limit for x in ats]),
    )


def draw(results: Results, figure: Any) -> None:
    """Draw the share of runs that solve the task over the length."""
    axes, main = figure.subplots(), results.part(main=True)
    lengths = main.options("T")
    for i, arm in enumerate(LIMITS):
        found = [share(main.values("solved", arm=arm, T=T)) for T in lengths]
        curve(axes, lengths, found, i, arm)
    axes.set(
        xlabel="length T", ylabel="share of runs that solve it", ylim=(-0.05, 1.05)
    )
    axes.legend()


STUDY = Study(
    name="temporal-order",
    setup=SETUP,
    seeds=10,
    cells=cells,
    run=run,
    find=find,
    draw=draw,
    cost=cost,
    not_run=(
        "the paper's 5 million updates: a run that would solve the task later counts "
        "as one that does not",
        "its regulariser (MSGD-CR), its other tasks, the other initialisations",
        "in the usual size, the lengths 30, 75 and 100",
    ),
)
