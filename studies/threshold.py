"""Does `advise` put the limit where training goes best?

For each task and seed: train without clipping, ask `advise` for a limit from the norms
of that run, train again with it, and compare the final loss with those of a sweep over
twelve limits. `python studies/threshold.py` writes `threshold.json` and prints the
table of docs/advice.md; it takes about 20 minutes on two cores.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradclip import Norm, advise
from gradclip.demo import Network, Setup, library_text
from gradclip.demo import train as train_demo
from gradclip.history import History
from gradclip.torch import attach

LIMITS = np.geomspace(0.01, 30, 12).round(4).tolist()
SEEDS = (0, 1, 2)
Steps = Iterator[tuple[float, float]]


def characters(limit: float, seed: int) -> Steps:
    """Train the network of `gradclip demo`: an LSTM over characters."""
    setup = Setup(seed=seed)
    torch.manual_seed(seed)
    network, text = Network(setup), library_text()
    for step in train_demo(Norm(limit), network, text, setup):
        yield step.loss, step.norm


def digits(limit: float, seed: int) -> Steps:
    """Classify scikit-learn's handwritten digits; the loss is that on all of them."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(64, 10))
    cost = nn.CrossEntropyLoss()
    for norm in descend(network, cost, x, y, 0.1, limit, seed, 600):
        with torch.no_grad():
            yield cost(network(x), y).item(), norm


def outliers(limit: float, seed: int) -> Steps:
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
    for norm in descend(network, cost, inputs, targets, 0.003, limit, seed, 1500):
        with torch.no_grad():
            yield cost(network(inputs), truth).item(), norm


def descend(
    network: nn.Module,
    cost: nn.Module,
    x: Tensor,
    y: Tensor,
    lr: float,
    limit: float,
    seed: int,
    steps: int,
) -> Iterator[float]:
    """Descend by stochastic gradients with momentum; yield the norm of each step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    clipper = attach(optimizer, Norm(limit), network)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (32,), generator=order)
        optimizer.zero_grad()
        cost(network(x[chosen]), y[chosen]).backward()
        optimizer.step()
        assert clipper.info is not None
        yield float(clipper.info.norm)


TASKS: dict[str, Callable[[float, int], Steps]] = {
    "characters": characters,
    "digits": digits,
    "outliers": outliers,
}


def final_loss(losses: list[float]) -> float:
    """Return the mean over the last 100 steps; infinity where there is none."""
    mean = float(np.mean(losses[-100:]))
    return mean if math.isfinite(mean) else math.inf


def one_run(job: tuple[str, float, int]) -> tuple[tuple[str, float, int], float]:
    """Train one task with one limit and seed; return where the loss ended."""
    torch.set_num_threads(1)
    task, limit, seed = job
    return job, final_loss([loss for loss, _ in TASKS[task](limit, seed)])


def one_advice(job: tuple[str, int]) -> dict[str, Any]:
    """Train without clipping, ask for a limit, and train with it."""
    torch.set_num_threads(1)
    task, seed = job
    losses, norms = zip(*TASKS[task](math.inf, seed), strict=True)
    advice = advise(History.of(norms, loss=losses))
    _, advised = one_run((task, advice.limit, seed))
    return {
        "task": task,
        "seed": seed,
        "unclipped": final_loss(list(losses)),
        "limit": advice.limit,
        "advised": advised,
    }


def main() -> None:
    """Run the sweep and the advice, and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    options.add_argument("--sweep", type=Path, default=Path("threshold.json"))
    options.add_argument("--again", action="store_true", help="only ask again")
    chosen = options.parse_args()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        if not chosen.again:
            jobs = list(product(chosen.tasks, LIMITS, SEEDS))
            swept = [[*job, loss] for job, loss in pool.map(one_run, jobs)]
            chosen.sweep.write_text(json.dumps(swept) + "\n")
        swept = json.loads(chosen.sweep.read_text())
        for row in pool.map(one_advice, product(chosen.tasks, SEEDS)):
            print(line(row, swept))


def line(row: dict[str, Any], swept: list[list[Any]]) -> str:
    """Return one row of the table: how far the advice is from the best of the sweep."""
    losses = {x[1]: x[3] for x in swept if x[0] == row["task"] and x[2] == row["seed"]}
    best = min(losses, key=lambda limit: losses[limit])
    over = row["advised"] / losses[best] - 1
    numbers = (row["unclipped"], best, losses[best], row["limit"], row["advised"])
    cells = " | ".join(f"{x:.4g}" for x in numbers)
    return f"| {row['task']} | {row['seed']} | {cells} | {over:+.1%} |"


if __name__ == "__main__":
    main()
