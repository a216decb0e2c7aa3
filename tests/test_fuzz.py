"""Random gradients against an exact oracle; `make fuzz` runs 21,000 of them.

The oracle sums squares of float64 numbers with math.fsum, after scaling by a power of
two, and takes the root with mpmath, which does not overflow.
"""

import json
import math
import os
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradclip as gc
from gradclip.torch import Clipper

EXAMPLES = int(os.environ.get("GRADCLIP_FUZZ_EXAMPLES", "200"))
REPORT = os.environ.get("GRADCLIP_FUZZ_REPORT")
RANGES = {
    torch.float16: (-24, 15),
    torch.bfloat16: (-133, 127),
    torch.float32: (-149, 127),
    torch.float64: (-1000, 1000),
}
# Unit in the last place of float32, in which norms are promised; float64 keeps its own.
PROMISED = dict.fromkeys(RANGES, 2.0**-23) | {torch.float64: 2.0**-48}
WORST: dict[str, float] = {}
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 200,
    suppress_health_check=list(HealthCheck),
)


def exact_norm(x):
    """Return the 2-norm of numbers that float64 holds, as an mpmath number."""
    values = np.abs(x[x != 0])
    if values.size == 0:
        return mpmath.mpf(0)
    _, exponent = math.frexp(float(values.max()))
    scaled = np.ldexp(values, -exponent)
    return mpmath.ldexp(mpmath.sqrt(math.fsum(scaled * scaled)), exponent)


@st.composite
def tensors(draw):
    """Draw tensors of one type: shapes, sizes, strides and magnitudes at random."""
    dtype = draw(st.sampled_from(list(RANGES)))
    low, high = RANGES[dtype]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grads = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 70), min_size=0, max_size=3))
        centre = draw(st.integers(low, high))
        spread = draw(st.sampled_from([0, 1, 40]))
        exponents = np.clip(centre + spread * rng.normal(size=shape), low, high - 1)
        kind = draw(st.sampled_from(["random", "constant", "sparse"]))
        mantissa = 1.5 if kind == "constant" else rng.uniform(-2, 2, size=shape)
        x = np.ldexp(mantissa, exponents.astype(int))
        x = x * (rng.uniform(size=shape) < 0.1) if kind == "sparse" else x
        t = torch.tensor(np.asarray(x)).to(dtype)
        layout = draw(st.sampled_from(["plain", "transposed", "strided"]))
        if layout == "transposed" and t.dim() > 1:
            t = t.transpose(0, -1)
        elif layout == "strided" and t.dim() > 0:
            t = t[::2]
        grads.append(t)
    return grads


def flat(grads):
    return np.concatenate([g.double().numpy().ravel() for g in grads])


def note(name, error):
    WORST[name] = max(WORST.get(name, 0.0), error)
    if REPORT:
        Path(REPORT).write_text(json.dumps(WORST, indent=2, sort_keys=True))


@fuzz
@given(grads=tensors())
def test_norms_are_exact(grads):
    dtype, expected = grads[0].dtype, exact_norm(flat(grads))
    if expected > mpmath.mpf(1.7e308):
        return
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone(memory_format=torch.preserve_format)
    norms = {
        "torch": Clipper(params, gc.Norm(math.inf)).clip_().norm,
        "pure torch": gc.clip(grads, gc.Norm(math.inf))[1].norm,
    }
    if dtype != torch.bfloat16:
        arrays = [g.numpy() for g in grads]
        norms["NumPy"] = gc.clip(arrays, gc.Norm(math.inf))[1].norm
    for name, norm in norms.items():
        compare(name, dtype, norm, expected)
    each = Clipper(params, gc.Norm(math.inf, over="tensor")).clip_().norm
    for g, norm in zip(grads, each, strict=True):
        compare("each on torch", dtype, norm, exact_norm(flat([g])))


def compare(name, dtype, norm, expected):
    """Note how far a norm is off, and hold it to what is promised."""
    got = mpmath.mpf(float(norm))
    # The smallest float64 numbers have no relative precision left.
    if expected and expected < mpmath.mpf(2) ** -1000:
        return
    error = float(abs(got / expected - 1)) if expected else float(got)
    note(f"{name} {str(dtype).removeprefix('torch.')}", error)
    assert error <= PROMISED[dtype], name


@fuzz
@given(grads=tensors(), below=st.integers(1, 30))
def test_clipped_norms_are_at_most_the_limit(grads, below):
    dtype, norm = grads[0].dtype, exact_norm(flat(grads))
    limit = float(mpmath.ldexp(norm, -below)) if norm < mpmath.mpf(1.7e308) else 0.0
    info = torch.finfo(dtype)
    smallest = float(info.smallest_normal) * 2**12 * math.sqrt(flat(grads).size or 1)
    if not smallest < limit < float(info.max):
        return
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone(memory_format=torch.preserve_format)
    Clipper(params, gc.Norm(limit), doctor=()).clip_()
    after = exact_norm(flat([p.grad for p in params]))
    assert after <= mpmath.mpf(limit)
    slack = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-6)
    assert after >= mpmath.mpf(limit) * (1 - slack)


@fuzz
@given(
    grads=tensors(),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    place=st.integers(0, 2**31),
    policy=st.sampled_from(["skip", "zero", "ignore", "raise"]),
)
def test_one_bad_element_anywhere(grads, bad, place, policy):
    sizes = [g.numel() for g in grads]
    if not sum(sizes):
        return
    which = max(range(len(grads)), key=lambda i: sizes[i])
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone(memory_format=torch.contiguous_format)
    params[which].grad.view(-1)[place % sizes[which]] = bad
    before = [p.grad.clone() for p in params]
    clipper = Clipper(params, gc.Norm(1.0), on_nonfinite=policy)
    if policy == "raise":
        with pytest.raises(gc.NonFiniteError, match=rf"\[{which}\] \(1 of"):
            clipper.clip_()
    else:
        assert not bool(clipper.clip_().finite)
    for p, g in zip(params, before, strict=True):
        if policy == "skip":
            assert p.grad is None
        elif policy == "zero":
            assert torch.isfinite(p.grad).all()
            assert not ((p.grad != 0) & (g == 0)).any()
        else:
            torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)
