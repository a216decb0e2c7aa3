"""Which rules carry a run through spikes, with good thresholds and with bad ones."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradclip as gc
from gradclip.characters import CHARACTERS, library_text
from gradclip.studies.drawing import dots
from gradclip.studies.frame import Claim, Findings, Size, Study, Tick, concluded
from gradclip.studies.results import Cell, Results, Row
from gradclip.studies.statistics import Estimate, difference, mean, positive
from gradclip.studies.tables import pivot, text
from gradclip.torch import attach

NONE, FIXED = "no clipping", "Norm"
RULES: dict[str, Callable[[float], gc.Rule]] = {
    NONE: lambda f: gc.Norm(math.inf),
    FIXED: lambda f: gc.Norm(1.0 * f),
    "Norm, each tensor": lambda f: gc.Norm(0.5 * f, over="tensor"),
    "Value": lambda f: gc.Value(0.1 * f),
    "Smooth": lambda f: gc.Smooth(1.0 * f),
    "Normalize": lambda f: gc.Normalize(1.0 * f),
    "Relative": lambda f: gc.Relative(0.02 * f),
    "Percentile": lambda f: gc.Percentile(q=50.0),
    "ZScore": lambda f: gc.ZScore(z=2.5 * f),
    "EMA": lambda f: gc.EMA(ratio=1.05 * f),
    "Skip(Deviation)": lambda f: gc.Skip(gc.Deviation(z=6.0 * f)),
}
ADAPTIVE = ("Percentile", "ZScore", "EMA", "Skip(Deviation)")
SPIKES = ("none", "gradient", "data", "label")
THRESHOLDS = {"good": 1.0, "× 100": 100.0, "÷ 1000": 1e-3, "loss × 1000": 1.0}
OPTIMIZERS = ("SGD", "AdamW")
MODELS = {"mlp": 200, "transformer": 160}
"""The steps of each."""
LENGTH = 16
"""The characters that the transformer sees."""
FIRST, EVERY = 100, 25
"""The step of the first spike, and the steps between two."""

SETUP = """From step 100 on every 25th step is spoiled: all gradients × 10⁴
(*gradient*), inputs × 100 or random characters (*data*), or random labels (*label*).
The MLP (20-64-64-10, batch 64, 200 steps) learns the labels of another random network;
the transformer (one layer, width 32, two heads, 160 steps) the next character of
Python's library text. SGD has momentum 0.9. Good thresholds: `Norm(1)`, `Norm(0.5)` for
each tensor, `Value(0.1)`, `Smooth(1)`, `Normalize(1)`, `Relative(0.02)`,
`Percentile(50)`, `ZScore(2.5)`, `EMA(1.05)`, `Skip(Deviation(6))`; chosen before the
runs, and not tuned. Bad ones are 100 times that, or a thousandth; or the loss is
multiplied by 1000 and, with SGD, the learning rate divided by as much, so that nothing
changes but the unit of the gradients. Without clipping NaN goes into the weights, as it
does in torch."""


def cells(size: Size) -> list[Cell]:
    """Return all rules under all spikes; bad thresholds under gradient spikes."""
    share = {"quick": 0.02, "usual": 1.0, "full": 10.0}[size]
    places = [(model, spike, "good") for model in MODELS for spike in SPIKES]
    places += [("mlp", "gradient", bad) for bad in list(THRESHOLDS)[1:]]
    if size == "quick":
        kept = ("good", "loss × 1000")
        places = [x for x in places if x[1] == "gradient" and x[2] in kept]
    return [
        {
            "model": model,
            "optimizer": optimizer,
            "spike": spike,
            "threshold": threshold,
            "rule": rule,
            "steps": int(MODELS[model] * share),
        }
        for model, spike, threshold in places
        for optimizer in OPTIMIZERS
        for rule in RULES
        if has_threshold(rule, threshold)
        # The optimizer of transformers; the other one doubles the time.
        if model == "mlp" or optimizer == "AdamW" or size == "full"
    ]


def has_threshold(rule: str, threshold: str) -> bool:
    """Return whether a rule has a number that can be wrong in this way."""
    return threshold in ("good", "loss × 1000") or rule not in (NONE, "Percentile")


@dataclass(frozen=True)
class Task:
    """A network, and where its samples come from."""

    network: nn.Module
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    spoil: Callable[[Tensor, torch.Generator], Tensor]
    test: tuple[Tensor, Tensor]
    classes: int
    rates: dict[str, float]


def mlp(seed: int) -> Task:
    """Return the network that learns from another one."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 10))
    x = torch.randn(6000, 20)
    with torch.no_grad():
        y = teacher(x).argmax(1)
    layers = [nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(64, 10))

    def batch(source: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(0, 5000, (64,), generator=source)
        return x[chosen], y[chosen]

    rates = {"SGD": 0.05, "AdamW": 3e-3}
    return Task(network, batch, lambda x, _: 100 * x, (x[5000:], y[5000:]), 10, rates)


class Transformer(nn.Module):
    """One layer over characters."""

    def __init__(self, width: int = 32, length: int = LENGTH) -> None:
        """Make the layers, with weights from torch's random numbers."""
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.layer = nn.TransformerEncoderLayer(
            width, 2, 64, dropout=0.0, batch_first=True, norm_first=True
        )
        self.guess = nn.Linear(width, CHARACTERS)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask)

    def forward(self, text: Tensor) -> Tensor:
        """Return the logits of the next character at every place."""
        seen = self.layer(self.embed(text) + self.place, self.mask, is_causal=True)
        return self.guess(seen)


@functools.cache
def library() -> tuple[Tensor, Tensor]:
    """Return the text to learn and the text to be tested on."""
    text = library_text()
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def transformer(seed: int) -> Task:
    """Return the network that guesses characters."""
    torch.manual_seed(seed)
    learned, others = library()

    def excerpts(
        text: Tensor, count: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(text) - LENGTH, (count, 1), generator=source)
        found = text[starts + torch.arange(LENGTH + 1)].long()
        return found[:, :-1], found[:, 1:]

    def spoil(x: Tensor, source: torch.Generator) -> Tensor:
        return torch.randint(0, CHARACTERS, x.shape, generator=source)

    test = excerpts(others, 200, torch.Generator().manual_seed(seed))
    rates = {"SGD": 0.1, "AdamW": 3e-3}
    return Task(
        Transformer(),
        lambda source: excerpts(learned, 16, source),
        spoil,
        test,
        CHARACTERS,
        rates,
    )


def cost(cell: Cell) -> float:
    """Return the CPU seconds of a seed."""
    return {"mlp": 1.3e-3, "transformer": 3.1e-3}[cell["model"]] * cell["steps"]


def run(cell: Cell, seeds: Sequence[int], tick: Tick) -> Iterator[tuple[int, Row]]:
    """Train once for each seed; tell the accuracy on the test data."""
    for i, seed in enumerate(seeds):
        task = {"mlp": mlp, "transformer": transformer}[cell["model"]](seed)
        yield seed, train(task, cell, seed)
        tick((i + 1) / len(seeds))


def train(task: Task, cell: Cell, seed: int) -> Row:
    """Train under a rule, with spikes."""
    optimizer, factor = prepare(task, cell)
    rule = RULES[cell["rule"]](THRESHOLDS[cell["threshold"]])
    clipper = attach(
        optimizer,
        rule,
        task.network,
        # Without clipping, nothing else should keep NaN from the weights.
        on_nonfinite="ignore" if cell["rule"] == NONE else "skip",
        max_consecutive_skips=cell["steps"] + 1,
        doctor=(),
    )
    # Spikes draw from a source of their own: the samples are the same without.
    source, noise = (torch.Generator().manual_seed(k + seed) for k in (0, 1000))
    clipped = 0
    for step in range(cell["steps"]):
        spike = cell["spike"] if step >= FIRST and step % EVERY == 0 else "none"
        x, y = task.batch(source)
        if spike == "data":
            x = task.spoil(x, noise)
        if spike == "label":
            y = torch.randint(0, task.classes, y.shape, generator=noise)
        optimizer.zero_grad()
        (factor * cross_entropy(task.network(x), y)).backward()
        if spike == "gradient":
            for parameter in task.network.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1e4)
        optimizer.step()
        clipped += bool(clipper.info.clipped) if clipper.info else 0
    return tested(task) | {"clip_rate": clipped / cell["steps"]}


def prepare(task: Task, cell: Cell) -> tuple[torch.optim.Optimizer, float]:
    """Return the optimizer, and what the loss is multiplied by."""
    rate = task.rates[cell["optimizer"]]
    factor = 1000.0 if cell["threshold"] == "loss × 1000" else 1.0
    parameters = task.network.parameters()
    if cell["optimizer"] == "AdamW":
        return torch.optim.AdamW(parameters, lr=rate), factor
    # AdamW does not mind the unit of its gradients, and SGD does.
    return torch.optim.SGD(parameters, lr=rate / factor, momentum=0.9), factor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy over all samples and places."""
    return nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), y.flatten()
    )


@torch.no_grad()
def tested(task: Task) -> Row:
    """Return how well the network does on samples that it has not seen."""
    x, y = task.test
    logits = task.network(x)
    return {
        "accuracy": (logits.argmax(-1) == y).double().mean().item(),
        "loss": cross_entropy(logits, y).item(),
    }


def find(results: Results) -> Findings:
    """Compare the rules under spikes, then with bad thresholds."""
    tables = [
        pivot(
            results,
            f"{model}, {optimizer}: test accuracy, good thresholds",
            "accuracy",
            rows="rule",
            columns="spike",
            reference=FIXED,
            form=".1%",
            model=model,
            optimizer=optimizer,
            threshold="good",
        )
        for model in results.options("model")
        for optimizer in results.options("optimizer", model=model)
    ]
    tables += [
        pivot(
            results,
            f"mlp, {optimizer}, gradient spikes: test accuracy by threshold",
            "accuracy",
            rows="rule",
            columns="threshold",
            reference=FIXED,
            form=".1%",
            model="mlp",
            optimizer=optimizer,
            spike="gradient",
        )
        for optimizer in OPTIMIZERS
    ]
    wrong = [x for x in results.options("threshold") if x != "good"]
    claims = [steadier(results), *(adaptive(results, x) for x in wrong)]
    return Findings(tables, claims)


def apart(results: Results, rule: str, other: str, **where: Any) -> Estimate:
    """Return how much more accurate one rule is than another, seed by seed."""
    ours, theirs = (results.values("accuracy", rule=x, **where) for x in (rule, other))
    return difference(ours, theirs)


def steadier(results: Results) -> Claim:
    """Return whether a fixed limit helps against each kind of spike."""
    places = [
        {"model": model, "optimizer": optimizer, "spike": spike, "threshold": "good"}
        for model in results.options("model")
        for optimizer in results.options("optimizer", model=model)
        for spike in results.options("spike")
        if spike != "none"
    ]
    found = [apart(results, FIXED, NONE, **place) for place in places]
    said = "; ".join(
        f"{p['model']}, {p['optimizer']}, {p['spike']} {text({**e}, '+.1%')}"
        for p, e in zip(places, found, strict=True)
    )
    hits = [positive(e) for e in found]
    numbers = f"accuracy above that without clipping: {said}"
    return concluded("Steadier training under spikes", hits, numbers)


def adaptive(results: Results, threshold: str) -> Claim:
    """Return whether adaptive rules do better than a limit that is wrong alike."""
    where = {"model": "mlp", "spike": "gradient", "threshold": threshold}
    places = [
        {"optimizer": optimizer, "rule": rule}
        for optimizer in OPTIMIZERS
        for rule in ADAPTIVE
        if results.found(rule=rule, **where)
    ]
    found = [apart(results, other=FIXED, **place, **where) for place in places]
    said = "; ".join(
        f"{place['optimizer']}, {place['rule']} {text({**e}, '+.1%')}"
        for place, e in zip(places, found, strict=True)
    )
    numbers = f"accuracy above that of `{FIXED}`, under gradient spikes: {said}"
    claim = f"Adaptive rules forgive a wrong threshold ({threshold})"
    return concluded(claim, list(map(positive, found)), numbers)


def draw(results: Results, figure: Any) -> None:
    """Draw the accuracies under gradient spikes, by threshold."""
    names = [name for name in RULES if name != NONE]
    for axes, optimizer in zip(
        figure.subplots(1, 2, sharey=True), OPTIMIZERS, strict=True
    ):
        where = {"model": "mlp", "optimizer": optimizer, "spike": "gradient"}
        for i, threshold in enumerate(results.options("threshold", **where)):
            rules = [r for r in names if has_threshold(r, threshold)]
            found = {
                r: mean(
                    results.values("accuracy", rule=r, threshold=threshold, **where)
                )
                for r in rules
            }
            absent = mean([math.nan])
            dots(axes, names, [found.get(r, absent) for r in names], i, threshold)
        axes.set(title=optimizer, xlabel="test accuracy after gradient spikes")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    named = figure.axes[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside upper center", ncols=4)


STUDY = Study(
    name="spikes",
    setup=SETUP,
    seeds=5,
    cells=cells,
    run=run,
    find=find,
    draw=draw,
    cost=cost,
    not_run=(
        "spikes that arise by themselves, as in models of 60 million parameters",
        "bad thresholds for the transformer, and under data and label spikes",
        "in the usual size, the transformer with SGD",
        "`Percentile` with a threshold 100 times too large or 1000 times too small: it "
        "has none",
    ),
)
