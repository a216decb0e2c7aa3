"""Sums of clipped per-sample gradients are those of Opacus, before its noise."""

import importlib.metadata

import pytest
import torch
from opacus import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import (
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    DPPerLayerOptimizer,
)
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

import gradclip as gc
from gradclip.per_sample import clipped_sum
from gradclip.torch.ghost import PerSample

LIMITS = [0.3, 1.2, 1e3]
EACH = torch.nn.CrossEntropyLoss(reduction="none")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_version():
    assert importlib.metadata.version("opacus") == "1.6.0"


class Words(torch.nn.Module):
    """An embedding, a normalisation and linear layers, on sequences."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(7, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.inner = torch.nn.Linear(4, 5)
        self.outer = torch.nn.Linear(5, 3)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(self.norm(self.words(x)))).mean(1))


def batch():
    torch.manual_seed(1)
    return torch.randint(0, 7, (6, 9)), torch.randint(0, 3, (6,))


def per_sample():
    """Return the gradients of each sample, by `torch.func`."""
    model, (x, y) = Words().double(), batch()

    def one(params, x, y):
        out = torch.func.functional_call(model, params, (x[None],))
        return EACH(out, y[None])[0]

    params = {name: p.detach() for name, p in model.named_parameters()}
    return torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(params, x, y)


def without_noise(kind, model, limit, count):
    """Return an optimizer of Opacus that only clips."""
    return kind(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=limit,
        expected_batch_size=count,
        loss_reduction="sum",
    )


def by_opacus(kind, limit):
    """Return the sums of an optimizer of Opacus, by name."""
    model, (x, y) = GradSampleModule(Words().double(), loss_reduction="sum"), batch()
    optimizer = without_noise(kind, model, limit, len(x))
    EACH(model(x), y).sum().backward()
    optimizer.clip_and_accumulate()
    return {
        name.removeprefix("_module."): p.summed_grad
        for name, p in model.named_parameters()
    }


def same(got, want):
    # Opacus adds 1e-6 to each norm.
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-5)


def changed(info):
    return int((info.scale < 1).sum())


@pytest.mark.parametrize("limit", LIMITS)
def test_flat_clipping(limit):
    total, info = clipped_sum(per_sample(), gc.Norm(limit))
    same(total, by_opacus(DPOptimizer, limit))
    assert (changed(info) > 0) == (limit < 1e3)


@pytest.mark.parametrize("limit", LIMITS)
def test_clipping_per_layer(limit):
    grads = per_sample()
    total, info = clipped_sum(grads, gc.Norm(limit, over="tensor"))
    same(total, by_opacus(DPPerLayerOptimizer, [limit] * len(grads)))
    assert (changed(info) > 0) == (limit < 1.0)


@pytest.mark.parametrize("limit", LIMITS)
def test_ghosts(limit):
    ours, (x, y) = Words().double(), batch()
    with PerSample(ours) as samples:
        info = samples.backward(EACH(ours(x), y), gc.Norm(limit))

    theirs = GradSampleModuleFastGradientClipping(
        Words().double(), loss_reduction="sum", max_grad_norm=limit
    )
    optimizer = without_noise(DPOptimizerFastGradientClipping, theirs, limit, len(x))
    criterion = torch.nn.CrossEntropyLoss(reduction="sum")
    loss = DPLossFastGradientClipping(theirs, optimizer, criterion, "sum")
    loss(theirs(x), y).backward()
    seen = theirs.get_norm_sample()
    torch.testing.assert_close(info.norm, seen.double(), rtol=1e-9, atol=0)
    same(
        {name: p.grad for name, p in ours.named_parameters()},
        {
            name.removeprefix("_module."): p.grad
            for name, p in theirs.named_parameters()
        },
    )
