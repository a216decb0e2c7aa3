"""A character LSTM that learns the source text of Python's own standard library.

The demonstration and some studies train it: it needs no download, and its gradients
explode at the learning rate of the setup.
"""

import copy
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradclip.rules import Rule
from gradclip.torch import attach

CHARACTERS = 128
"""The network knows ASCII; any other character counts as a question mark."""


@dataclass(frozen=True)
class Setup:
    """What all arms have in common."""

    steps: int = 600
    seed: int = 0
    lr: float = 10.0
    layers: int = 2
    hidden: int = 128
    embedding: int = 64
    batch: int = 16
    length: int = 64

    def facts(self) -> dict[str, Any]:
        """Return what a run has to be repeated with; the text is that of Python."""
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        return asdict(self) | versions


class Step(NamedTuple):
    """What one step of a run did."""

    loss: float
    norm: float
    limit: float
    scale: float


class Network(nn.Module):
    """Characters in, a guess at each next character out."""

    def __init__(self, setup: Setup) -> None:
        """Make the layers, with weights from torch's random numbers."""
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, setup.embedding)
        self.lstm = nn.LSTM(
            setup.embedding, setup.hidden, setup.layers, batch_first=True
        )
        self.guess = nn.Linear(setup.hidden, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        """Return the logits of the next character at every place."""
        return self.guess(self.lstm(self.embed(text))[0])


def library_text() -> Tensor:
    """Return the source text of Python's standard library, without its packages."""
    # A folder lists its files in any order, and the text should be the same.
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not files:
        raise FileNotFoundError(
            "This Python comes without the source files of its standard library, "
            "which the demonstration reads; use one that has them."
        )
    texts = (path.read_text("utf-8", errors="replace") for path in files)
    ascii_text = bytearray("".join(texts).encode("ascii", "replace"))
    return torch.frombuffer(ascii_text, dtype=torch.uint8)


def batches(text: Tensor, setup: Setup) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random excerpts, each with the same excerpt one character on."""
    order = torch.Generator().manual_seed(setup.seed)
    window = torch.arange(setup.length + 1)
    size = (setup.batch, 1)
    for _ in range(setup.steps):
        starts = torch.randint(len(text) - setup.length, size, generator=order)
        excerpts = text[starts + window].long()
        yield excerpts[:, :-1], excerpts[:, 1:]


def train(rule: Rule, network: Network, text: Tensor, setup: Setup) -> Iterator[Step]:
    """Train a copy of a network under a rule, and yield each step that is done."""
    network = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=setup.lr)
    clipper = attach(optimizer, rule, network)
    for before, after in batches(text, setup):
        optimizer.zero_grad()
        guess = network(before).flatten(0, 1)
        loss = nn.functional.cross_entropy(guess, after.flatten())
        loss.backward()
        optimizer.step()
        if info := clipper.info:
            yield Step(loss.item(), *map(float, (info.norm, info.limit, info.scale)))
