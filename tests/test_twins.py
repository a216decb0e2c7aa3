"""Every rule equals its float64 twin, on NumPy and torch, through spikes and NaNs."""

import numpy as np
import pytest
import torch

import gradclip as gc
from gradclip.torch import Clipper, attach
from table import ROWS

SHAPES = [(3, 4), (5,), (), (2, 3, 2)]
STEPS = 200


def steps(seed=0):
    """Yield the gradients of a run: noise, spikes, vanishing steps, NaN, infinity."""
    rng = np.random.default_rng(seed)
    for step in range(STEPS):
        grads = [np.asarray(rng.normal(size=shape)) for shape in SHAPES]
        if step % 17 == 11:
            grads = [g * 300 for g in grads]
        if step % 23 == 5:
            grads[1] = grads[1] * 40
        if step % 31 == 7:
            grads = [g * 1e-9 for g in grads]
        if step in (2, 60, 61, 140):
            grads[0][1, 2] = np.nan
        if step in (30, 100):
            grads[3][0, 0, 0] = -np.inf
        yield grads


def params():
    rng = np.random.default_rng(7)
    weights = [np.asarray(rng.normal(size=shape)) for shape in SHAPES]
    weights[0][1] = 0.0
    return weights


def quietly(twin, grads, weights):
    with np.errstate(all="ignore"):
        return twin.step(grads, weights)


def finite(grads):
    return all(np.all(np.isfinite(g)) for g in grads)


@pytest.mark.parametrize("name", ROWS)
def test_numpy_equals_twin(name):
    clipper, twin = gc.Clipper(ROWS[name].make()), ROWS[name].twin()
    weights = params()
    for step, grads in enumerate(steps()):
        expected = quietly(twin, grads, weights)
        clipped, info = clipper.clip(grads, params=weights)
        assert bool(info.finite) == finite(grads)
        for got, want in zip(clipped, expected, strict=True):
            wanted = want if finite(grads) else np.zeros_like(want)
            np.testing.assert_allclose(got, wanted, rtol=1e-9, err_msg=f"step {step}")


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torch_equals_twin(name, dtype):
    rtol = 1e-9 if dtype == torch.float64 else 2e-5
    weights = params()
    named = {f"w{i}": torch.tensor(w, dtype=dtype) for i, w in enumerate(weights)}
    clipper, twin = Clipper(named, ROWS[name].make()), ROWS[name].twin()
    for step, grads in enumerate(steps()):
        expected = quietly(twin, grads, weights)
        for p, g in zip(named.values(), grads, strict=True):
            p.grad = torch.tensor(g, dtype=dtype)
        info = clipper.clip_()
        assert bool(info.finite) == finite(grads)
        for p, want in zip(named.values(), expected, strict=True):
            if not finite(grads):
                assert p.grad is None
                continue
            if not bool(info.kept):
                assert p.grad is None
                assert not np.any(want)
                continue
            np.testing.assert_allclose(
                p.grad.numpy(), want, rtol=rtol, atol=1e-12, err_msg=f"step {step}"
            )


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("fused", [False, True])
def test_attach_equals_twin(name, fused):
    weights = params()
    leaves = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    twin_params = [w.copy() for w in weights]
    optimizer = torch.optim.SGD(leaves, lr=0.01, fused=fused)
    attach(optimizer, ROWS[name].make())
    twin = ROWS[name].twin()
    for grads in steps():
        expected = quietly(twin, grads, twin_params)
        if finite(grads):
            twin_params = [
                w - 0.01 * g for w, g in zip(twin_params, expected, strict=True)
            ]
        for p, g in zip(leaves, grads, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    for p, want in zip(leaves, twin_params, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=1e-6, atol=1e-9)
