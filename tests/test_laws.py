"""The laws that every row of the rule table obeys, for whatever hypothesis comes up."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gradclip as gc
from gradclip.rules import stages
from gradclip.torch import Clipper, attach
from table import ROWS, STATEFUL, STATELESS

settings.register_profile("laws", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("laws")

SHAPES = [(2, 3), (4,), ()]
SIZES = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)


def array(shape, elements=SIZES):
    return hnp.arrays(np.float64, shape, elements=elements)


gradients = st.tuples(*[array(shape) for shape in SHAPES]).map(list)
weights = [
    np.full(shape, 0.5) + np.arange(math.prod(shape)).reshape(shape) for shape in SHAPES
]
each_rule = pytest.mark.parametrize("name", ROWS)


@functools.cache
def trained(name):
    """Return a clipper whose memory, if it has one, has seen some steps."""
    clipper = gc.Clipper(ROWS[name].make())
    rng = np.random.default_rng(0)
    if clipper.rule.stateful:
        for _ in range(10):
            clipper.clip(
                [np.asarray(rng.normal(size=s)) for s in SHAPES], params=weights
            )
    return clipper


def warmed(name):
    """Return a copy of it, for one example alone."""
    return copy.deepcopy(trained(name))


def units(g, axis):
    return np.moveaxis(g, axis, 0) if g.ndim > 1 else [g]


def cell_norms(rule, grads):
    last = stages(rule)[-1]
    flat = [np.ravel(g) for g in grads]
    cells = [np.concatenate(flat)]
    if last.over == "element":
        return np.array([np.max(np.abs(cells[0]))])
    if last.over == "tensor":
        cells = flat
    if last.over == "unit":
        cells = [row for g in grads for row in units(g, last.axis)]
    return np.array([np.linalg.norm(np.ravel(c), ord=last.p) for c in cells])


def assert_same(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        if tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            np.testing.assert_array_equal(x, y)


@each_rule
@given(grads=gradients)
def test_bound(name, grads):
    clipper = warmed(name)
    clipped, info = clipper.clip(grads, params=weights)
    limit = np.atleast_1d(info.limit)
    assert np.all(cell_norms(clipper.rule, clipped) <= limit * (1 + 1e-9))


@each_rule
@given(grads=gradients)
def test_identity_below_the_limit(name, grads):
    clipped, info = warmed(name).clip(grads, params=weights)
    if not info.clipped:
        assert_same(clipped, grads)


@each_rule
@given(grads=gradients)
def test_direction(name, grads):
    clipper = warmed(name)
    clipped, info = clipper.clip(grads, params=weights)
    if not info.kept:
        assert ROWS[name].drops
        assert not any(np.any(c) for c in clipped)
        return
    for c, g in zip(clipped, grads, strict=True):
        assert np.all(np.sign(c) == np.sign(g))
        if ROWS[name].keeps_direction:
            rows, axis = [(c, g)], clipper.rule.axis
            if clipper.rule.over == "unit":
                rows = zip(units(c, axis), units(g, axis), strict=True)
            for a, b in rows:
                a, b = np.ravel(a), np.ravel(b)
                parallel = np.linalg.norm(a) * np.linalg.norm(b)
                assert a @ b >= parallel * (1 - 1e-9)


@pytest.mark.parametrize("name", STATELESS)
@given(grads=gradients)
def test_stateless_rules_are_idempotent(name, grads):
    rule = ROWS[name].make()
    once, _ = gc.clip(grads, rule, params=weights)
    twice, _ = gc.clip(once, rule, params=weights)
    if not ROWS[name].projects:
        # Every pass makes it a little shorter: such a rule bounds, it does not project.
        assert np.all(cell_norms(rule, twice) <= cell_norms(rule, once) * (1 + 1e-12))
        return
    tolerance = {"rtol": 1e-12} if rule.stretches else {}
    assert_same(twice, once, **tolerance)


@pytest.mark.parametrize("name", [n for n in ROWS if ROWS[n].scales])
@given(grads=gradients, power=st.integers(-8, 8))
def test_scale_equivariance(name, grads, power):
    c = 2.0**power
    row = ROWS[name]
    base, scaled = gc.Clipper(row.scales(1.0)), gc.Clipper(row.scales(c))
    rng = np.random.default_rng(1)
    for step in range(8):
        now = grads if step == 7 else [np.asarray(rng.normal(size=s)) for s in SHAPES]
        a, _ = base.clip(now, params=weights)
        b, _ = scaled.clip([c * g for g in now], params=weights)
        assert_same([c * g for g in a], b, rtol=1e-12)


@each_rule
@given(grads=gradients)
def test_order_of_tensors(name, grads):
    if name.endswith("-tensor") and name in STATEFUL:
        forward, backward = gc.Clipper(ROWS[name].make()), gc.Clipper(ROWS[name].make())
    else:
        forward, backward = warmed(name), warmed(name)
    a, _ = forward.clip(grads, params=weights)
    b, _ = backward.clip(grads[::-1], params=weights[::-1])
    assert_same(a, b[::-1], rtol=1e-12)


@pytest.mark.parametrize("name", STATEFUL)
@given(
    norms=st.lists(
        st.sampled_from(
            [0.0, 1e-300, 1.0, 3.0, 1e20, 1e300, math.nan, math.inf, -math.inf]
        ),
        min_size=5,
        max_size=40,
    )
)
def test_memory_stays_finite(name, norms):
    clipper = gc.Clipper(ROWS[name].make())
    for n in norms:
        clipper.clip([np.array([n, 0.0]), np.array(1.0)])
    for key, x in clipper.state_dict().items():
        free = np.isinf(x) & (x > 0) if key.endswith("norms") else False
        assert np.all(np.isfinite(x) | free), (key, x)
    _, info = clipper.clip([np.array([1.0, 0.0]), np.array(1.0)])
    assert ROWS[name].drops or np.all(np.asarray(info.scale) > 0)


@each_rule
@given(grads=gradients)
def test_backends_agree(name, grads):
    a, info_a = warmed(name).clip(grads, params=weights)
    clipper = gc.Clipper(ROWS[name].make())
    clipper.load_state_dict(warmed(name).state_dict())
    for state in clipper._memory.states:
        for key in state or {}:
            state[key] = torch.tensor(state[key])
    tensors = [torch.tensor(g) for g in grads]
    b, info_b = clipper.clip(tensors, params=[torch.tensor(w) for w in weights])
    assert_same(a, [x.numpy() for x in b], rtol=1e-12)
    np.testing.assert_allclose(info_a.norm, info_b.norm.numpy(), rtol=1e-12)
    assert bool(info_a.clipped) == bool(info_b.clipped)


@each_rule
def test_resume_equals_uninterrupted(name):
    rng = np.random.default_rng(3)
    run = [[np.asarray(rng.normal(size=s) * 3) for s in SHAPES] for _ in range(60)]
    whole = gc.Clipper(ROWS[name].make())
    expected = [whole.clip(grads, params=weights)[0] for grads in run]
    for cut in (0, 1, 29):
        first = gc.Clipper(ROWS[name].make())
        for grads in run[:cut]:
            first.clip(grads, params=weights)
        second = gc.Clipper(ROWS[name].make())
        second.load_state_dict(first.state_dict())
        for grads, want in zip(run[cut:], expected[cut:], strict=True):
            assert_same(second.clip(grads, params=weights)[0], want)


@each_rule
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("fused", [False, True])
def test_attach_equals_clip_then_step(name, optimizer, fused):
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
        )

    ours, theirs = model(), model()
    make = getattr(torch.optim, optimizer)
    a = make(ours.parameters(), lr=0.05, fused=fused)
    b = make(theirs.parameters(), lr=0.05, fused=fused)
    attach(a, ROWS[name].make())
    clipper = Clipper(theirs, ROWS[name].make())
    torch.manual_seed(1)
    for step in range(12):
        x = torch.randn(3, 5) * (50 if step == 8 else 1)
        for net, opt in ((ours, a), (theirs, b)):
            opt.zero_grad()
            net(x).square().sum().backward()
            if net is theirs:
                clipper.clip_()
            opt.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
