"""The functions of torch.nn.utils are the witness; deviations.py says where not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import utils

from gradclip.torch import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)

SHAPES = [
    [(3,)],
    [(7, 5), (5,)],
    [(2, 3, 4), (), (1,), (6, 1)],
    [(33, 129), (4097,), (64, 64)],
    [(40, 700), (3, 2, 5, 5)],
]
ORDERS = [0.5, 1.0, 1.5, 2.0, 4.0, math.inf]


def pair(shapes, dtype, seed=0, size=1.0):
    """Return two sets of parameters with the same random gradients."""
    torch.manual_seed(seed)
    grads = [size * torch.randn(shape, dtype=torch.float64) for shape in shapes]
    sets = []
    for _ in range(2):
        sets.append([torch.zeros(shape, dtype=dtype) for shape in shapes])
        for p, g in zip(sets[-1], grads, strict=True):
            p.grad = g.to(dtype, copy=True)
    return sets


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e6])
def test_clip_grad_norm(shapes, p, dtype, limit):
    ours, theirs = pair(shapes, dtype)
    given = [t.grad.double().clone() for t in ours]
    norm = clip_grad_norm_(ours, limit, p)
    expected = utils.clip_grad_norm_(theirs, limit, p)
    # torch itself is some units off in float32; the exact norm is the better witness.
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0.0)
    exact = torch.linalg.vector_norm(torch.cat([g.flatten() for g in given]), p)
    torch.testing.assert_close(norm.double(), exact, rtol=1.2e-7, atol=0.0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_clip_grad_norm_in_half_precision(p, dtype):
    ours, theirs = pair(SHAPES[1], dtype)
    norm = clip_grad_norm_(ours, 0.5, p)
    expected = utils.clip_grad_norm_(theirs, 0.5, p)
    assert norm.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(norm, expected.float(), rtol=2 * eps, atol=0.0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=3 * eps, atol=eps / 100)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=6
    ),
    p=st.sampled_from(ORDERS),
    limit=st.floats(1e-3, 1e3),
    size=st.sampled_from([1e-2, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_clip_grad_norm_on_anything_finite(shapes, p, limit, size, seed):
    ours, theirs = pair(shapes, torch.float32, seed, size)
    norm = clip_grad_norm_(ours, limit, p)
    expected = utils.clip_grad_norm_(theirs, limit, p)
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0.0)
    # torch adds 1e-6 to the norm.
    rtol = 1e-5 + 1e-6 / max(float(norm), 1e-30)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_the_other_functions(shapes):
    ours, theirs = pair(shapes, torch.float32)
    grads = [t.grad for t in ours]
    for p in ORDERS:
        expected = utils.get_total_norm(grads, p)
        torch.testing.assert_close(
            get_total_norm(grads, p), expected, rtol=1e-5, atol=0
        )
    clip_grad_value_(ours, 0.25)
    utils.clip_grad_value_(theirs, 0.25)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.grad, b.grad)
    clip_grads_with_norm_(ours, 0.2, torch.tensor(0.9))
    utils.clip_grads_with_norm_(theirs, 0.2, torch.tensor(0.9))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=3e-6, atol=0)


def test_one_tensor_and_generators():
    for make in (lambda p: p[0], lambda p: iter(p), lambda p: tuple(p)):
        ours, theirs = pair([(4, 4)], torch.float32)
        norm = clip_grad_norm_(make(ours), 1.0)
        torch.testing.assert_close(norm, utils.clip_grad_norm_(theirs, 1.0))


def test_parameters_without_gradients_are_passed_over():
    ours, _ = pair([(2,), (3,)], torch.float32)
    ours[1].grad = None
    alone = float(ours[0].grad.norm())
    assert float(clip_grad_norm_(ours, 1e-3)) == pytest.approx(alone)
    assert ours[1].grad is None


def test_torch_raises_on_finite_float64_and_gradclip_does_not():
    grads = [torch.full((10,), 2e200, dtype=torch.float64)]
    with pytest.raises(RuntimeError):
        utils.get_total_norm(grads, error_if_nonfinite=True)
    norm = get_total_norm(grads, error_if_nonfinite=True)
    assert float(norm) == pytest.approx(math.sqrt(10) * 2e200, rel=1e-15)


def test_sparse_tensors_have_a_norm():
    indices, values = torch.tensor([[1, 1, 3]]), torch.tensor([[1.0], [2.0], [4.0]])
    sparse = torch.sparse_coo_tensor(indices, values, (5, 1))
    assert float(get_total_norm([sparse])) == 5.0
    assert float(get_total_norm(sparse, math.inf)) == 4.0
