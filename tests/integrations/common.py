"""One network, one rule, the same batches: what every trainer is given."""

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

import gradclip as gc
from gradclip.torch import attach

STEPS, BATCH, RATE = 100, 4, 0.02
RULE = gc.ZScore(z=2.0, warmup=10)


class Data(Dataset):
    """Rows of a linear problem; some batches are far too large."""

    def __init__(self):
        draw = torch.Generator().manual_seed(3)
        self.x = torch.randn(STEPS * BATCH, 6, generator=draw)
        for step in range(17, STEPS, 13):
            self.x[step * BATCH : (step + 1) * BATCH] *= 8
        self.y = self.x.sum(1, keepdim=True)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


class Net(torch.nn.Module):
    """The network, in the form that Hugging Face's Trainer wants."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(
            torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)
        )

    def forward(self, x, labels=None):
        out = self.body(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


def batches(start=0):
    rows = [*range(start * BATCH, STEPS * BATCH), *range(start * BATCH)]
    return DataLoader(Subset(Data(), rows), batch_size=BATCH)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.5)


def plain_norms(path, rule=RULE):
    """Return the norms of plain torch with `attach`: what all others must match."""
    model = Net()
    optimizer = sgd(model)
    with gc.History(path) as history:
        attach(optimizer, rule, model, history=history)
        for batch in batches():
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            optimizer.step()
    assert len(history) == STEPS
    assert 0 < (history.scale < 1).sum() < STEPS
    return history.norm, history.limit


def assert_same(history, expected, steps=STEPS):
    """Norms and limits agree to 1e-5, relative; the printed figure is the worst."""
    norm, limit = expected
    assert len(history) == steps
    worst = np.abs(history.norm / norm[-steps:] - 1).max()
    print(f"{steps} steps, norms agree to {worst:.1e}")
    np.testing.assert_allclose(history.norm, norm[-steps:], rtol=1e-5)
    np.testing.assert_allclose(history.limit, limit[-steps:], rtol=1e-5)
