"""Clipping beside L1, L2 and dropout, on the data that comes with scikit-learn.

For each method all strengths and seeds are trained side by side, as the rows of one
matrix; the strength is chosen on validation data, and the test data is looked at once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradclip.rules import Norm
from gradclip.studies.drawing import GREY, dots
from gradclip.studies.frame import Claim, Findings, Size, Study, Tick, concluded
from gradclip.studies.results import Cell, Results, Row
from gradclip.studies.statistics import Estimate, difference, negative, positive
from gradclip.studies.tables import pivot, text
from gradclip.torch import attach

HIDDEN, BATCH = 64, 32
RATES = (0.03, 0.1, 0.3)
STRENGTHS: dict[str, tuple[float, ...]] = {
    "L1": (1e-4, 1e-3, 3e-3),
    "L2": (1e-3, 1e-2, 3e-2),
    "dropout": (0.1, 0.3, 0.5),
    "clipping": (0.1, 0.3, 1.0),
}
METHODS = (
    "none",
    "clipping",
    "L1",
    "L2",
    "dropout",
    "L1 + clipping",
    "L2 + clipping",
    "dropout + clipping",
)
TRAINED = {"digits": 200, "digits, 20 % wrong": 200, "cancer": 100, "wine": 40}
"""The data, and the size of the training and of the validation set."""

SETUP = """A network of 64 ReLU units, SGD with momentum 0.9, 200 steps of 32 samples
on 200 of scikit-learn's digits (and on the same with 20 % of the training labels
wrong), on 100 samples of its breast cancer data and on 40 of its wine data: few enough
to overfit. As many samples again choose the learning rate (0.03, 0.1, 0.3) and the
strength, by their cross-entropy; each method has three strengths (L1 10⁻⁴, 10⁻³,
3·10⁻³; L2 10⁻³, 10⁻², 3·10⁻²; dropout 0.1, 0.3, 0.5; limit 0.1, 0.3, 1), a combination
nine. All others are test data. A seed decides the split, the weights and the batches,
the same for each method."""


@dataclass(frozen=True)
class Data:
    """Inputs and labels of all seeds, [seeds, samples, …], in three parts."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


@dataclass(frozen=True)
class Strengths:
    """What applies to each row: rows go through the strengths, then through seeds."""

    l1: Tensor
    l2: Tensor
    dropout: Tensor


def cells(size: Size) -> list[Cell]:
    """Return each data set and method."""
    steps = {"quick": 3, "usual": 200, "full": 4000}[size]
    names = ["wine"] if size == "quick" else list(TRAINED)
    return [
        {"data": name, "method": method, "steps": steps}
        for name in names
        for method in METHODS
    ]


def cost(cell: Cell) -> float:
    """Return the CPU seconds of a seed, with all its rates, limits and strengths."""
    limits = 3 if "clipping" in cell["method"] else 1
    strengths = 1 if cell["method"] in ("none", "clipping") else 2
    return 1.2e-4 * limits * strengths * len(RATES) * cell["steps"]


def run(cell: Cell, seeds: Sequence[int], tick: Tick) -> Iterator[tuple[int, Row]]:
    """Train with every rate, limit and strength; tell the test results of the best."""
    data = load_data(cell["data"], seeds)
    clips = STRENGTHS["clipping"] if "clipping" in cell["method"] else (math.inf,)
    plans = [(rate, clip) for rate in RATES for clip in clips]
    measured: list[Row] = []
    for i, (rate, clip) in enumerate(plans):
        tick(i / len(plans))
        other = cell["method"].removesuffix("clipping").removesuffix(" + ")
        strengths = STRENGTHS.get(other, (0.0,))
        flat = train(data, seeds, spread(other, seeds), rate, clip, cell["steps"])
        for j, strength in enumerate(strengths):
            rows = flat[j * len(seeds) : (j + 1) * len(seeds)]
            chosen = {"rate": rate, "limit": clip, "strength": strength}
            measured.append({"chosen": chosen, **measure(rows, data)})
    for i, seed in enumerate(seeds):
        best = min(measured, key=lambda found: comparable(found["valid"][i]))
        numbers = {name: best[name][i] for name in ("accuracy", "loss", "gap")}
        yield seed, {**numbers, "chosen": best["chosen"]}


def comparable(loss: float) -> float:
    """Return a loss that can be compared: NaN is the worst."""
    return loss if math.isfinite(loss) else math.inf


def spread(other: str, seeds: Sequence[int]) -> Strengths:
    """Return the strengths of a method for all rows."""
    values = torch.tensor(STRENGTHS.get(other, (0.0,))).repeat_interleave(len(seeds))
    none = torch.zeros_like(values)
    return Strengths(
        l1=values if other == "L1" else none,
        l2=values if other == "L2" else none,
        dropout=values if other == "dropout" else none,
    )


def load_data(name: str, seeds: Sequence[int]) -> Data:
    """Split a data set anew for each seed, and scale it by its training part."""
    from sklearn import datasets

    kind = name.partition(",")[0]
    loader = {"cancer": "breast_cancer"}.get(kind, kind)
    inputs, labels = getattr(datasets, f"load_{loader}")(return_X_y=True)
    size = TRAINED[name]
    parts = [split(inputs, labels, size, seed, "wrong" in name) for seed in seeds]
    train, valid, test = (
        (torch.stack([p[i][0] for p in parts]), torch.stack([p[i][1] for p in parts]))
        for i in range(3)
    )
    return Data(train, valid, test, int(labels.max()) + 1)


def split(
    inputs: NDArray[Any], labels: NDArray[Any], size: int, seed: int, wrong: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return the three parts for one seed; the wrong labels are in the first."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(inputs))
    x, y = inputs[order].astype(np.float64), labels[order].copy()
    if wrong:
        chosen = rng.permutation(size)[: size // 5]
        # Moved on by at least one class, so that no label is right by chance.
        y[chosen] = (y[chosen] + rng.integers(1, y.max() + 1, len(chosen))) % (
            y.max() + 1
        )
    # Pixels at the edge are 0 throughout, and have no deviation.
    x = (x - x[:size].mean(0)) / (x[:size].std(0) + 0.1 * x[:size].std())
    tensors = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    cuts = (slice(size), slice(size, 2 * size), slice(2 * size, None))
    return [(tensors[0][cut], tensors[1][cut]) for cut in cuts]


def initial(width: int, classes: int, seed: int) -> Tensor:
    """Return the weights of one run in torch's own way, as one vector."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, classes))
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def forward(flat: Tensor, x: Tensor, classes: int, mask: Tensor | None) -> Tensor:
    """Return the logits of each row's network for the samples of its row."""
    rows, width = len(flat), x.shape[2]
    sizes = [HIDDEN * width, HIDDEN, classes * HIDDEN, classes]
    first, b, second, c = flat.split(sizes, dim=1)
    hidden = x @ first.view(rows, HIDDEN, width).transpose(1, 2) + b[:, None]
    hidden = hidden.relu()
    if mask is not None:
        hidden = hidden * mask
    return hidden @ second.view(rows, classes, HIDDEN).transpose(1, 2) + c[:, None]


def train(
    data: Data,
    seeds: Sequence[int],
    strengths: Strengths,
    rate: float,
    limit: float,
    steps: int,
) -> Tensor:
    """Train a network for each strength and seed; return their weights in rows."""
    x, y = data.train
    times = len(strengths.l1) // len(seeds)
    start = torch.stack([initial(x.shape[2], data.classes, seed) for seed in seeds])
    flat = nn.Parameter(start.repeat(times, 1))
    optimizer = torch.optim.SGD([flat], lr=rate, momentum=0.9)
    # A row is a network, with a norm of its own; one that is lost stops no other.
    attach(optimizer, Norm(limit, over="unit"), on_nonfinite="ignore", doctor=())
    batches = [torch.Generator().manual_seed(seed) for seed in seeds]
    # Drawn apart, so that batches are the same with dropout and without.
    drops = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    places = torch.arange(len(seeds))[:, None]
    for _ in range(steps):
        chosen = torch.stack(
            [torch.randint(0, x.shape[1], (BATCH,), generator=g) for g in batches]
        )
        xs = x[places, chosen].repeat(times, 1, 1)
        ys = y[places, chosen].repeat(times, 1)
        mask = dropped(strengths.dropout, drops)
        logits = forward(flat, xs, data.classes, mask)
        # Times their number, as the mean would make each row's gradient smaller.
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ys.flatten()) * len(ys)
        optimizer.zero_grad()
        (loss + penalty(flat, strengths)).backward()
        optimizer.step()
    return flat.detach()


def dropped(shares: Tensor, sources: Sequence[torch.Generator]) -> Tensor | None:
    """Return what hidden units are multiplied by."""
    if not shares.any():
        return None
    times = len(shares) // len(sources)
    random = [torch.rand(times, BATCH, HIDDEN, generator=g) for g in sources]
    kept = 1 - shares[:, None, None]
    return (torch.stack(random, 1).flatten(0, 1) < kept) / kept


def penalty(flat: Tensor, strengths: Strengths) -> Tensor:
    """Return the L1 and L2 penalties of all rows; biases are few, and included."""
    l1 = strengths.l1 @ flat.abs().sum(1) if strengths.l1.any() else 0
    l2 = strengths.l2 @ flat.square().sum(1) / 2 if strengths.l2.any() else 0
    return torch.as_tensor(l1 + l2)


def measure(flat: Tensor, data: Data) -> Row:
    """Return what the networks of all seeds do, in lists with a number for each."""
    _, trained = judged(flat, data.train, data.classes)
    valid, _ = judged(flat, data.valid, data.classes)
    loss, accuracy = judged(flat, data.test, data.classes)
    gap = (trained - accuracy).tolist()
    return {
        "valid": valid.tolist(),
        "loss": loss.tolist(),
        "accuracy": accuracy.tolist(),
        "gap": gap,
    }


def judged(
    flat: Tensor, part: tuple[Tensor, Tensor], classes: int
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the accuracy of each row on its samples."""
    x, y = part
    logits = forward(flat, x, classes, None)
    each = nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    return each.mean(1), (logits.argmax(2) == y).double().mean(1)


def find(results: Results) -> Findings:
    """Compare the methods on each data set."""
    tables = [
        pivot(
            results,
            title,
            measure,
            rows="method",
            columns="data",
            reference="none",
            form=form,
        )
        for title, measure, form in (
            ("Test accuracy", "accuracy", ".1%"),
            ("Test cross-entropy", "loss", ".3f"),
            ("Accuracy on the training data above that on the test data", "gap", ".1%"),
        )
    ]
    claims = [
        against(results, "clipping", "none", "Better generalisation than no clipping"),
        *(
            against(results, f"{x} + clipping", x, f"Clipping adds to {x}")
            for x in ("L1", "L2", "dropout")
        ),
        *(
            against(results, "clipping", x, f"Clipping generalises better than {x}")
            for x in ("L1", "L2", "dropout")
        ),
    ]
    return Findings(tables, claims)


def against(results: Results, method: str, other: str, claim: str) -> Claim:
    """Return whether a method has the better accuracy, and where."""
    names = results.options("data")
    apart = {name: gain(results, name, method, other) for name in names}
    better = [positive(e) for e in apart.values()]
    worse = [n for n, e in apart.items() if negative(e)]
    said = "; ".join(f"{name} {text({**e}, '+.1%')}" for name, e in apart.items())
    tail = f"; worse on {', '.join(worse)}" if worse else ""
    return concluded(claim, better, f"difference in accuracy: {said}{tail}")


def gain(results: Results, data: str, method: str, other: str) -> Estimate:
    """Return the difference in accuracy, seed by seed."""
    ours, theirs = (
        results.values("accuracy", data=data, method=x) for x in (method, other)
    )
    return difference(ours, theirs)


def draw(results: Results, figure: Any) -> None:
    """Draw how much each method changes the accuracy."""
    axes, names = figure.subplots(), [x for x in METHODS if x != "none"]
    for i, data in enumerate(results.options("data")):
        found = [gain(results, data, method, "none") for method in names]
        dots(axes, names, found, i, data)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_xlabel("test accuracy above that without any")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:+.1%}")
    figure.legend(loc="outside upper center", ncols=4)


STUDY = Study(
    name="generalisation",
    setup=SETUP,
    seeds=10,
    cells=cells,
    run=run,
    find=find,
    draw=draw,
    cost=cost,
    not_run=(
        "images, text and networks of the size that papers use",
        "early stopping, data augmentation, batch normalisation",
        "adaptive rules, which have no threshold to choose",
    ),
)
