"""Every entry of deviations.py, seen on both sides: what they do, and what we do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import gradclip as gc
from deviations import DEVIATIONS, FROM_OPTAX
from gradclip.jax import as_optax
from gradclip.torch import clip_grad_norm_

theirs = torch.nn.utils.clip_grad_norm_


def parameter(*values, dtype=torch.float32):
    p = torch.nn.Parameter(torch.zeros(len(values), dtype=dtype))
    p.grad = torch.tensor(values, dtype=dtype)
    return p


def overflow():
    p = parameter(2e200, 0.0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="non-finite"):
        theirs([p], 1.0, error_if_nonfinite=True)
    assert float(clip_grad_norm_([p], math.inf, error_if_nonfinite=True)) == 2e200


def half():
    types = [f([parameter(3.0, 4.0, dtype=torch.float16)], 1.0) for f in FUNCTIONS]
    assert [x.dtype for x in types] == [torch.float16, torch.float32]


def padding():
    after = []
    for clip in FUNCTIONS:
        p = parameter(3e-6, 4e-6)
        clip([p], 1e-6)
        after.append(float(p.grad.norm()))
    assert after[0] < 0.9e-6
    assert after[1] == pytest.approx(1e-6, rel=1e-6)


def broken():
    left = []
    for clip in FUNCTIONS:
        p = parameter(math.nan, 4.0)
        clip([p], 1.0)
        left.append(float(p.grad[1]))
    assert math.isnan(left[0])
    assert left[1] == 4.0


def no_limit():
    p = parameter(3.0, 4.0)
    theirs([p], -1.0)
    assert float(p.grad[0]) == pytest.approx(-0.6)
    for limit in (-1.0, 0.0, math.nan):
        with pytest.raises(ValueError, match="the limit is above 0"):
            clip_grad_norm_([p], limit)


def nothing():
    for params in ([], [torch.nn.Parameter(torch.zeros(1))]):
        assert float(theirs(params, 1.0)) == 0
        with pytest.raises(ValueError, match=r"gradient|parameters"):
            clip_grad_norm_(params, 1.0)


def twice():
    norms = []
    for clip in FUNCTIONS:
        p = parameter(3.0, 4.0)
        norms.append(float(clip([p, p], 100.0)))
    assert norms == pytest.approx([5 * math.sqrt(2), 5])


def sparse():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.sparse_coo_tensor([[0]], [5.0], (3,), check_invariants=True)
    with pytest.raises(NotImplementedError):
        theirs([p], 1.0)
    assert float(clip_grad_norm_([p], 1.0)) == 5.0
    assert float(p.grad.to_dense()[0]) == pytest.approx(1.0)


FUNCTIONS = theirs, clip_grad_norm_
SEEN = {
    "finite float64 gradients of 2e200 with error_if_nonfinite": overflow,
    "half-precision gradients": half,
    "the scale": padding,
    "gradients with NaN or infinity": broken,
    "a limit that is negative, zero or NaN": no_limit,
    "no gradient, or no parameters": nothing,
    "a parameter listed twice": twice,
    "sparse gradients": sparse,
}


def updated(clip, g, params=None):
    found, _ = jax.jit(clip.update)(g, clip.init(g), params)
    return np.asarray(found, np.float64)


def both(limit, g):
    clips = optax.clip_by_global_norm(limit), as_optax(gc.Norm(limit))
    return [updated(clip, g) for clip in clips]


def one_by_one(clip, grads):
    """Return what each of many gradients becomes by itself."""
    state = clip.init(grads[0])
    change = jax.jit(lambda g: clip.update(g, state)[0])
    return np.array([change(g) for g in grads], np.float64)


def narrow_sums():
    g = jnp.full(4096, 1 / 3, jnp.bfloat16)
    true = np.linalg.norm(np.asarray(g, np.float64))
    assert optax.tree.norm(g).dtype == jnp.bfloat16
    clip = as_optax(gc.Norm(1.0))
    norm = clip.update(g, clip.init(g))[1].info.norm
    assert norm.dtype == jnp.float32
    assert float(norm) == pytest.approx(true, rel=1e-6)


def rounded_up():
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.normal(size=(50, 50)), jnp.float32)
    clips = optax.clip_by_global_norm(1.0), as_optax(gc.Norm(1.0))
    optaxs, ours = (np.linalg.norm(one_by_one(c, grads), axis=1) for c in clips)
    assert optaxs.max() > 1 >= ours.max()
    assert ours.min() > 1 - 5e-7


def dropped():
    for bad in (math.nan, math.inf):
        optaxs, ours = both(1.0, jnp.array([bad, 4.0]))
        assert np.isnan(optaxs).any()
        assert ours.tolist() == [0, 0]


def units_of(shape, optax_axes, our_axes):
    rng = np.random.default_rng(0)
    g, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    clips = optax.adaptive_grad_clip(0.1), as_optax(gc.AGC(0.1))
    for clip, axes in zip(clips, (optax_axes, our_axes), strict=True):
        scale = updated(clip, g, w) / np.asarray(g, np.float64)
        # Within a unit all elements have one factor.
        spread = scale.max(axis=axes) - scale.min(axis=axes)
        assert spread.max() < 1e-6
        assert scale.max() - scale.min() > 1e-3


SEEN_IN_OPTAX = {
    "norms": narrow_sums,
    "scale": rounded_up,
    "NaN and infinity": dropped,
    "kernels of three axes": lambda: units_of((3, 4, 5), 0, (1, 2)),
    "units": lambda: units_of((6, 5), 0, 1),
}


@pytest.mark.parametrize("case", DEVIATIONS)
def test_torch_answers_otherwise(case):
    SEEN[case]()


@pytest.mark.parametrize("case", FROM_OPTAX)
def test_optax_answers_otherwise(case):
    SEEN_IN_OPTAX[case]()
