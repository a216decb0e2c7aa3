"""Right on every finite input, harmless on the others, by whatever way in.

Each case runs through all the ways in, so that none of them has a weakness of its own.
"""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import gradclip as gc
from gradclip import backends
from gradclip.backends.short import adds_evenly, fits_short, short_total
from gradclip.torch import (
    Clipper,
    attach,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
    rows,
    verbs,
)
from gradclip.torch.exact import converted
from gradclip.torch.verbs import OneNumber

F32_ULP = 2.0**-23


def by_numpy(grads, rule, policy):
    arrays = [g.numpy() for g in grads]
    clipped, info = gc.clip(arrays, rule, on_nonfinite=policy)
    return [torch.as_tensor(x) for x in clipped], float(np.max(info.norm))


def by_pure_torch(grads, rule, policy):
    clipped, info = gc.clip(grads, rule, on_nonfinite=policy)
    return clipped, float(info.norm.max())


def with_gradients(grads):
    params = [torch.nn.Parameter(torch.zeros(g.shape, dtype=g.dtype)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    return params


def by_clipper(grads, rule, policy):
    params = with_gradients(grads)
    info = Clipper(params, rule, on_nonfinite=policy).clip_()
    return [p.grad for p in params], float(info.norm.max())


def by_function(grads, rule, policy):
    params = with_gradients(grads)
    policy = policy or "ignore"
    norm = clip_grad_norm_(params, rule.limit, rule.p, on_nonfinite=policy)
    return [p.grad for p in params], float(norm)


def by_attach(fused):
    def through(grads, rule, policy):
        """Read the clipped gradients off the step that was taken with lr 1."""
        params = with_gradients(grads)
        optimizer = torch.optim.SGD(params, lr=1.0, fused=fused)
        clipper = attach(optimizer, rule, on_nonfinite=policy)
        optimizer.step()
        norm = float(clipper.info.norm.max())
        if fused and grads[0].dtype in (torch.bfloat16, torch.float16):
            # Fused SGD does not move these on the CPU (pytorch#191763).
            return [p.grad for p in params], norm
        return [-p.detach() for p in params], norm

    return through


WAYS = {
    "clip-numpy": by_numpy,
    "clip-torch": by_pure_torch,
    "clip_": by_clipper,
    "clip_grad_norm_": by_function,
    "attach": by_attach(False),
    "attach-fused": by_attach(True),
}
every_way = pytest.mark.parametrize("way", WAYS)


def true_norm(grads, p=2.0):
    """The norm in float64, without a square that could overflow."""
    flat = torch.cat([g.detach().abs().double().flatten() for g in grads])
    largest = flat.max()
    if largest == 0:
        return 0.0
    return float(torch.linalg.vector_norm(flat / largest, p) * largest)


def lower_bound(dtype):
    return {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-6)


FINITE = {
    "huge": ([torch.full((1,), 1e20)] * 100, 1.0, 1e21),
    "tiny": ([torch.tensor([3e-30, 4e-30])], 1e-31, 5e-30),
    "huge-float64": (
        [torch.full((10,), 2e200, dtype=torch.float64)],
        1.0,
        2e200 * 10**0.5,
    ),
    "tiny-float64": ([torch.full((4,), 1e-200, dtype=torch.float64)], 1e-201, 2e-200),
    "float16": ([torch.tensor([6e4, 6e4]).half()], 1.0, 59_999.9 * 2**0.5),
    "small-norm": ([torch.tensor([3e-7, 4e-7])], 1e-7, 5e-7),
    "scalar": ([torch.tensor(3.0)], 1.0, 3.0),
    "largest": ([torch.tensor([3e38, 0.0])], 1e-5, 3e38),
    "subnormal": ([torch.tensor([1e-42, 0.0])], 1e-43, 1e-42),
}


@every_way
@pytest.mark.parametrize("case", FINITE)
def test_finite_gradients_give_the_right_norm(way, case):
    grads, limit, expected = FINITE[case]
    clipped, norm = WAYS[way](grads, gc.Norm(limit), "skip")
    assert norm == pytest.approx(true_norm(grads), rel=F32_ULP, abs=1e-45)
    assert norm == pytest.approx(expected, rel=1e-3)
    if case == "subnormal":
        # Half of the smallest float32 number is what its rounding may add.
        assert true_norm(clipped) == pytest.approx(limit, abs=1e-45)
        return
    after, dtype = true_norm(clipped), grads[0].dtype
    # A fused step computes in float32, also for the product with the learning rate.
    slack = F32_ULP if way.startswith("attach") else 0.0
    assert limit * (1 - lower_bound(dtype)) <= after <= limit * (1 + slack)
    for c, g in zip(clipped, grads, strict=True):
        ratio = c.double()[g != 0] / g.double()[g != 0]
        torch.testing.assert_close(
            ratio,
            ratio[:1].expand_as(ratio) if ratio.dim() else ratio,
            rtol=1e-3,
            atol=0,
        )


HALF_AND_WAY = [
    (dtype, way)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for way in WAYS
    if not (way == "clip-numpy" and dtype == torch.bfloat16)  # NumPy has no bfloat16
]


@pytest.mark.parametrize(("dtype", "way"), HALF_AND_WAY, ids=str)
@pytest.mark.parametrize("size", [10, 1000, 100_000])
def test_half_precision_bounds(way, dtype, size):
    torch.manual_seed(size)
    grads = [torch.randn(size).to(dtype), torch.randn(7, 3).to(dtype)]
    clipped, norm = WAYS[way](grads, gc.Norm(1.0), "skip")
    assert norm == pytest.approx(true_norm(grads), rel=F32_ULP)
    slack = F32_ULP if way.startswith("attach") else 0.0
    after = true_norm(clipped)
    assert 1 - lower_bound(dtype) <= after <= 1 + slack


def halves(count):
    """Values of float16 in float32: their sums lie in the middle more often."""
    return torch.rand(count).half().float()


MAKERS = {
    "normal": torch.randn,
    "uniform": torch.rand,
    "halves": halves,
    "constant": lambda count: torch.full((count,), 1 / 3),
}


@pytest.mark.parametrize("values", MAKERS)
@pytest.mark.parametrize("layout", ["flat", "matrix", "transposed", "sliced", "many"])
def test_large_tensors_within_one_ulp(values, layout):
    torch.manual_seed(0)
    count = 4_000_000
    x = MAKERS[values](count)
    grads = {
        "flat": [x],
        "matrix": [x.view(2000, 2000)],
        "transposed": [x.view(1000, 4000).t()],
        "sliced": [x.view(2000, 2000)[:, ::3]],
        "many": list(x.view(1000, 4000).unbind()),
    }[layout]
    exact = true_norm(grads)
    params = [torch.nn.Parameter(torch.empty(g.shape)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone(memory_format=torch.preserve_format)
    for over in ("all", "tensor"):
        norm = Clipper(params, gc.Norm(1e9, over=over)).clip_().norm
        _, info = gc.clip([g.numpy() for g in grads], gc.Norm(1e9, over=over))
        for norms in (norm, info.norm):
            got = float(np.linalg.norm(np.ravel(norms)))
            assert got == pytest.approx(exact, rel=F32_ULP / 2), over


@pytest.mark.parametrize("spikes", [1, 5, 60, 2000])
@pytest.mark.parametrize("size", [50_000, 1_000_000])
def test_spikes_do_not_swallow_their_neighbours(size, spikes):
    """In float32, 5000 squared plus 1 is 5000 squared, and a row has 511 others."""
    generator = torch.Generator().manual_seed(spikes)
    x = 1 + 0.1 * torch.rand(size, generator=generator)
    x[torch.randperm(size, generator=generator)[:spikes]] = 5e3
    exact = true_norm([x])
    param = torch.nn.Parameter(torch.empty(size))
    for over in ("all", "tensor"):
        param.grad = x.clone()
        norm = Clipper([param], gc.Norm(1e9, over=over), doctor=()).clip_().norm
        assert float(norm) == pytest.approx(exact, rel=F32_ULP), over
    _, info = gc.clip(x.numpy(), gc.Norm(1e9))
    assert float(info.norm) == pytest.approx(exact, rel=F32_ULP)


@pytest.mark.parametrize("size", [200, 5_000, 16_000, 300_000])
@pytest.mark.parametrize("over", ["all", "tensor", "unit"])
def test_float64_keeps_what_lies_beside_a_spike(over, size):
    """Added one by one, 300,000 of 1.5 beside 5e7 lose 4e-12 of their sum."""
    x = torch.full((2, size), 1.5, dtype=torch.float64)
    x[:, 0] = 5e7
    whole = [math.sqrt(25e14 + 2.25 * (size - 1))] * 2
    want = whole if over == "unit" else [math.hypot(*whole)]
    (param,) = with_gradients([x])
    norm = Clipper([param], gc.Norm(1e9, over=over), doctor=()).clip_().norm
    np.testing.assert_allclose(np.ravel(norm), want, rtol=1e-14)


@pytest.mark.parametrize("other", [0.0, 1e30])
def test_spikes_are_found_behind_zeros_and_overflows(other):
    x = 1 + 0.1 * torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    x[::20_000] = 5e3
    grads = [torch.full((50_000,), other), x]
    params = with_gradients(grads)
    norm = Clipper(params, gc.Norm(1e38, over="tensor"), doctor=()).clip_().norm
    for got, grad in zip(norm, grads, strict=True):
        assert float(got) == pytest.approx(true_norm([grad]), rel=F32_ULP)


def behind(heavy, light):
    """Return rows of random values, each with as many light rows behind it."""
    count = len(light) // len(heavy)
    pairs = zip(heavy.split(1), light.split(count), strict=False)
    return torch.cat([row for pair in pairs for row in pair]).reshape(-1)


def few_beside_many(value, spike, share, count=6):
    """Return constants, or spikes among them, beside a few rows of random values."""
    light = torch.full((4000, 512), value)
    light[:, 0] *= spike
    mass = float(light.double().square().sum()) * share / (1 - share)
    return behind(torch.randn(count, 512) * (mass / count / 512) ** 0.5, light)


def scattered(size, seed):
    """Return constants with a few to some thousand spikes of one size among them."""
    random = np.random.default_rng(seed)
    x = np.full(size, random.uniform(0.5, 2), np.float32)
    count = int(10 ** random.uniform(0, math.log10(size / 600)))
    spike = 10 ** random.uniform(0, 6)
    x[random.integers(0, size, count)] = spike
    return [torch.from_numpy(x)]


HIDDEN = {
    "3 spikes": lambda: scattered(1 << 21, 1842253510),
    "135 spikes": lambda: scattered(3 << 20, 1205809295),
    "420 spikes": lambda: scattered(1 << 22, 1790356564),
    "bfloat16": lambda: [
        *(2.5 * torch.randn(16, 16384)).unbind(),
        *torch.randn(200, 16384).bfloat16().float().unbind(),
    ],
    "constants": lambda: [
        *(2 * torch.randn(16, 16000)).unbind(),
        *torch.full((100, 16384), 1.0585).unbind(),
    ],
    "ragged": lambda: [torch.full((5000 + 7 * i,), 1 + i / 70) for i in range(66)],
    "one": lambda: [
        torch.cat([10 * torch.randn(20_000), torch.full((2_000_000,), 1.426125)])
    ],
    "rows": lambda: [few_beside_many(1.426125, 1, 0.15)],
    "spikes": lambda: [few_beside_many(1.3, 1000, 0.25)],
    "beside three": lambda: spiked(366),
    "in layers": lambda: [middle_of_constants(1.426125) for _ in range(32)],
    "swallowed": lambda: [swallowing(60_000, 64 * (i % 20 == 0)) for i in range(60)],
}


def swallowing(size, ones):
    """Return small elements, and some beside which float32 loses them."""
    x = torch.full((size,), 2.4e-4)
    x[:ones] = 1
    return x


def middle_of_constants(value, rows=20 * 2048):
    """Return random values between constants: in equal layers, at equal steps."""
    parts = [torch.full((rows,), value), torch.randn(rows), torch.full((rows,), value)]
    parts[1] *= value
    return torch.cat(parts)


def spiked(count):
    """Return constants, of which three tensors have an element that decides the sum."""
    x = torch.full((count, 16384), 1.526579739217653)
    x[:300:100, 7] = 1.5e4
    return list(x.unbind())


@pytest.mark.parametrize("case", HIDDEN)
def test_values_that_round_one_way_are_found_behind_others(case):
    """Random values of larger norm do not hide them from the probes."""
    torch.manual_seed(0)
    grads = HIDDEN[case]()
    params, exact = with_gradients(grads), true_norm(grads)
    for over in ("all", "tensor"):
        norm = Clipper(params, gc.Norm(1e9, over=over), doctor=()).clip_().norm
        _, info = gc.clip([g.numpy() for g in grads], gc.Norm(1e9, over=over))
        for norms in (norm, info.norm):
            got = float(np.linalg.norm(np.ravel(norms)))
            assert got == pytest.approx(exact, rel=F32_ULP / 2), over


@pytest.mark.parametrize("values", [*MAKERS, "bfloat16", "heavy"])
def test_what_float32_gets_wrong_is_taken_away(values):
    """Nothing has to be summed again in float64, which takes ten times as long."""
    generator = torch.Generator().manual_seed(0)
    count = 4_000_000
    x = {
        "bfloat16": lambda: torch.randn(count, generator=generator).bfloat16().float(),
        "heavy": lambda: (2 * torch.randn(count, generator=generator)).exp(),
        **{name: lambda make=make: make(count) for name, make in MAKERS.items()},
    }[values]()
    norm = rows.fast_total([x])
    assert norm is not None
    assert float(norm) == pytest.approx(true_norm([x]), rel=F32_ULP / 2)


def test_a_subnormal_norm_gives_no_warning():
    (w,) = with_gradients([torch.tensor([1e-320, 0.0], dtype=torch.float64)])
    assert float(clip_grad_norm_([w], 1.0)) == 1e-320
    assert float(w.grad[0]) == 1e-320


def test_a_block_may_be_shorter_than_a_row(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 1 << 15)
    monkeypatch.setattr(rows, "CHUNK", 1 << 6)
    monkeypatch.setattr(backends.rows, "CHUNK", 1 << 6)
    x = torch.rand(2 * rows.BLOCK + 5)
    assert float(get_total_norm([x])) == pytest.approx(true_norm([x]), rel=F32_ULP)


@pytest.mark.parametrize("over", ["all", "tensor"])
@pytest.mark.parametrize("often", [False, True])
def test_arrays_of_any_layout(monkeypatch, over, often):
    """Some go by rows, many at a time, or few; the others by copies in float64."""
    if often:
        monkeypatch.setattr(backends.rows, "CHUNK", 1 << 6)
    made = np.random.default_rng(0).standard_normal((60, 40_000), np.float32)
    shaped = made.reshape(60, 100, 20, 20)
    grads = [*made[:20], *shaped[20:30].transpose(0, 3, 1, 2), *made[30:40, ::2]]
    grads += [*made[40:50, :39_989], *made[50:].astype(">f4"), made[:2].T, made[0, :7]]
    grads += [made[0].astype(np.float16), np.float32(3) * np.ones(()), made[0, :0]]
    _, info = gc.clip(grads, gc.Norm(math.inf, over=over))
    each = [np.linalg.norm(g.astype(np.float64)) for g in grads]
    want = each if over == "tensor" else np.linalg.norm(each)
    np.testing.assert_allclose(info.norm, want, rtol=F32_ULP / 2)


KINDS = {
    "even": lambda x: x,
    "with a graph": lambda x: x.requires_grad_(),
    "lazily negative": torch._neg_view,
    "of a prime number": lambda x: x.flatten()[:39_989],
    "channels last": lambda x: x.view(10, 2, 40, 50).to(
        memory_format=torch.channels_last
    ),
    "not dense": lambda x: x.view(200, 200)[:, ::2],
}


@pytest.mark.parametrize("kind", KINDS)
def test_middle_tensors_that_numpy_may_not_see(kind):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(40_000, generator=generator) for _ in range(20)]
    grads = [KINDS[kind](x) for x in made]
    for group in (grads, [*grads, *made]):
        assert float(get_total_norm(group)) == pytest.approx(
            true_norm([g.resolve_neg() for g in group]), rel=F32_ULP
        )


@pytest.mark.parametrize("value", [1e-25, 3e19])
def test_middle_tensors_whose_squares_float32_cannot_hold(value):
    """NumPy would warn of it, and warnings are errors here."""
    grads = [torch.full((20_000,), value) for _ in range(50)]
    assert float(get_total_norm(grads)) == pytest.approx(1e3 * value, rel=F32_ULP)
    for over in ("all", "tensor"):
        _, info = gc.clip([g.numpy() for g in grads], gc.Norm(math.inf, over=over))
        got = np.linalg.norm(np.ravel(info.norm))
        assert got == pytest.approx(1e3 * value, rel=F32_ULP)


@pytest.mark.parametrize("extra", [0, 7], ids=["even", "ragged"])
def test_each_norm_beside_tensors_of_other_lengths(extra):
    """Rows of 512 cover some tensors, and leave a rest of others."""
    generator = torch.Generator().manual_seed(0)
    sizes = [512 * 40, 512 * 50 + extra, 512 * 70, 512 * 33 + 3 * extra]
    grads = [torch.rand(size, generator=generator) for size in sizes]
    clipper = Clipper(with_gradients(grads), gc.Norm(1e9, over="tensor"), doctor=())
    norms = clipper.clip_().norm.tolist()
    assert norms == pytest.approx([true_norm([g]) for g in grads], rel=F32_ULP / 2)


@every_way
def test_at_the_limit_nothing_changes(way):
    grads = [torch.tensor([3.0, 4.0])]
    clipped, _ = WAYS[way](grads, gc.Norm(5.0), "skip")
    assert torch.equal(clipped[0], grads[0])


BAD = [torch.tensor([1.0, math.nan, 2.0]), torch.tensor([math.inf, 3.0]), torch.ones(2)]


@every_way
def test_ignore_leaves_the_gradients(way):
    clipped, norm = WAYS[way](BAD[2:] + BAD[:2], gc.Norm(1.0), "ignore")
    assert not math.isfinite(norm)
    for c, g in zip(clipped, BAD[2:] + BAD[:2], strict=True):
        torch.testing.assert_close(c, g, rtol=0, atol=0, equal_nan=True)


@every_way
def test_zero_clears_the_bad_elements_and_clips_the_rest(way):
    clipped, norm = WAYS[way](BAD, gc.Norm(1.0), "zero")
    assert norm == pytest.approx(4.0)
    expected = [[0.25, 0, 0.5], [0, 0.75], [0.25, 0.25]]
    for c, want in zip(clipped, expected, strict=True):
        torch.testing.assert_close(c, torch.tensor(want), rtol=1e-5, atol=0)


@every_way
def test_raise_names_the_gradients_and_changes_nothing(way):
    grads = [g.clone() for g in BAD]
    with pytest.raises(
        gc.NonFiniteError, match=r"\[0\] \(1 of 3 elements\).*\[1\] \(1 of 2"
    ):
        WAYS[way](grads, gc.Norm(1.0), "raise")
    for c, g in zip(grads, BAD, strict=True):
        torch.testing.assert_close(c, g, rtol=0, atol=0, equal_nan=True)


@every_way
def test_skip(way):
    clipped, norm = WAYS[way](BAD, gc.Norm(1.0), "skip")
    assert not math.isfinite(norm)
    assert all(c is None or not c.any() for c in clipped)


@every_way
@pytest.mark.parametrize("policy", [None, "ignore"])
def test_an_infinite_limit_only_records(way, policy):
    grads = [torch.tensor([1.0, math.inf]), torch.tensor([2.0])]
    clipped, norm = WAYS[way](grads, gc.Norm(math.inf), policy)
    assert norm == math.inf
    for c, g in zip(clipped, grads, strict=True):
        assert torch.equal(c, g)


@every_way
def test_a_policy_that_is_given_holds_under_an_infinite_limit(way):
    skipped, _ = WAYS[way](BAD, gc.Norm(math.inf), "skip")
    assert all(c is None or not c.any() for c in skipped)
    cleared, _ = WAYS[way](BAD, gc.Norm(math.inf), "zero")
    for c, g in zip(cleared, BAD, strict=True):
        assert torch.equal(c, torch.where(g.isfinite(), g, 0))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("over", ["tensor", "unit"])
def test_sparse_gradients_are_compared_with_the_weights_of_their_scope(over):
    """Rows that were not used belong to their tensor, and are units of their own."""
    dense, sparse = (torch.nn.Parameter(torch.arange(10.0).view(5, 2)) for _ in "ab")
    dense.grad = torch.zeros(5, 2)
    dense.grad[[1, 3]] = 8.0
    sparse.grad = dense.grad.to_sparse(1)
    rule = gc.AGC(0.1, over=over)
    for p in (dense, sparse):
        Clipper([p], rule, doctor=()).clip_()
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)
    assert dense.grad.max() < 1


def test_sparse_gradients_stay_sparse():
    def grads():
        indices = torch.tensor([[1, 3, 1]])
        values = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
        p = torch.nn.Parameter(torch.zeros(5, 2))
        p.grad = torch.sparse_coo_tensor(indices, values, (5, 2))
        return p

    p = grads()
    assert float(clip_grad_norm_([p], 1.0)) == 5.0
    assert p.grad.is_sparse
    dense = p.grad.to_dense()
    torch.testing.assert_close(dense[1], torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(dense[3], torch.tensor([0.0, 0.8]))
    p = grads()
    p.grad = torch.sparse_coo_tensor(
        [[1, 1]], torch.tensor([[3.0, 0], [-2.0, 0]]), (5, 2)
    )
    clip_grad_value_([p], 1.5)
    torch.testing.assert_close(p.grad.to_dense()[1], torch.tensor([1.0, 0.0]))
    p = grads()
    info = Clipper([p], gc.Relative(0.5, eps=2.0)).clip_()
    assert info.norm.tolist() == [3.0, 4.0]
    torch.testing.assert_close(p.grad.to_dense()[3], torch.tensor([0.0, 1.0]))


def test_complex_gradients_by_modulus():
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    p.grad = torch.tensor([3 + 4j, 0.1j])
    clip_grad_value_([p], 1.0)
    torch.testing.assert_close(p.grad, torch.tensor([0.6 + 0.8j, 0.1j]))
    p.grad = torch.tensor([3 + 4j, 12j])
    assert float(clip_grad_norm_([p], 1.3)) == 13.0
    torch.testing.assert_close(p.grad, torch.tensor([0.3 + 0.4j, 1.2j]))
    clipped, _ = gc.clip(np.array([3 + 4j, 0.1j]), gc.Value(1.0))
    np.testing.assert_allclose(clipped, [0.6 + 0.8j, 0.1j], rtol=1e-12)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, math.inf])
@pytest.mark.parametrize("over", ["all", "tensor", "unit", "element"])
def test_odd_shapes(p, over):
    grads = [
        torch.tensor(2.0),
        torch.empty(0),
        torch.empty(0, 3),
        torch.empty(3, 0),
        torch.tensor(3.0).expand(2, 2),
        torch.ones(1, 1, 1),
        torch.ones(2, 3, dtype=torch.float64),
        torch.ones(2, dtype=torch.bfloat16),
    ]
    params = [torch.nn.Parameter(torch.zeros(g.shape, dtype=g.dtype)) for g in grads]
    for q, g in zip(params, grads, strict=True):
        q.grad = g
    info = Clipper(params, gc.Norm(0.5, over=over, p=p)).clip_()
    assert info.finite
    for q, g in zip(params, grads, strict=True):
        assert q.grad.shape == g.shape
        assert q.grad.dtype == g.dtype
    if over == "all":
        after = [q.grad for q in params if q.grad.numel()]
        assert true_norm(after, p) == pytest.approx(0.5, rel=1e-2)
    arrays = [g.float().numpy() for g in grads]
    clipped, _ = gc.clip(arrays, gc.Norm(0.5, over=over, p=p))
    for a, b in zip(clipped, arrays, strict=True):
        assert a.shape == b.shape


def test_gradients_of_a_graph_can_be_clipped():
    p = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
    p.grad = torch.autograd.grad(p.pow(3).sum(), p, create_graph=True)[0]
    assert p.grad.requires_grad
    clip_grad_norm_([p], 1.0)
    assert float(p.grad.detach().norm()) == pytest.approx(1.0)


@pytest.mark.parametrize("way", ["clip_", "attach", "attach-fused"])
def test_limits_may_be_tensors_and_schedules(way):
    grads = [torch.tensor([3.0, 4.0])]
    clipped, _ = WAYS[way](grads, gc.Norm(torch.tensor(0.5)), "skip")
    assert true_norm(clipped) == pytest.approx(0.5)
    clipped, _ = WAYS[way](grads, gc.Norm(lambda step: 0.25 * (step + 1)), "skip")
    assert true_norm(clipped) == pytest.approx(0.25)


@pytest.mark.parametrize("change", [clip_grad_norm_, clip_grad_value_])
def test_one_call_takes_no_schedule(change):
    """It would be asked for the limit of step 0 at every step."""
    (p,) = with_gradients([torch.tensor([3.0, 4.0])])
    change([p], torch.tensor(5.0))
    with pytest.raises(TypeError, match=r"depends on the steps before.*Clipper"):
        change([p], lambda step: 0.25)
    with pytest.raises(TypeError, match="depends on the steps before"):
        clip_grads_with_norm_([p], lambda step: 0.25, 5.0)
    assert p.grad.tolist() == [3.0, 4.0]


def test_a_schedule_follows_the_steps():
    clipper = gc.Clipper(gc.Value(lambda step: 1.0 / (1 + step)))
    limits = [float(clipper.clip(np.ones(2) * 9)[1].limit) for _ in range(3)]
    assert limits == [1.0, 0.5, 1 / 3]


@pytest.mark.parametrize("way", ["clip_", "attach", "attach-fused"])
@pytest.mark.parametrize("limit", [-1.0, 0.0, math.nan])
def test_a_schedule_is_held_to_what_a_limit_is(way, limit):
    grads = [torch.tensor([3.0, 4.0])]
    with pytest.raises(ValueError, match=rf"schedule.*limit {limit} at step 0"):
        WAYS[way](grads, gc.Norm(lambda step: limit), "skip")
    with pytest.raises(ValueError, match="Nothing was changed"):
        gc.Clipper(gc.Value(lambda step: limit)).clip(np.ones(2))


def test_a_schedule_gets_the_number_of_the_step():
    seen = []
    params = with_gradients([torch.tensor([3.0, 4.0])])
    clipper = Clipper(params, gc.Norm(lambda step: seen.append(step) or 1.0), doctor=())
    clipper.clip_()
    clipper.clip_()
    assert seen == [0, 1]
    assert all(type(step) is int for step in seen)


def test_moving_and_half_precision_limits_round_down():
    limit = 1.001
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        p = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        p.grad = torch.tensor([-9.0, 0.5, 9.0], dtype=dtype)
        clip_grad_value_([p], limit)
        assert float(p.grad.abs().max()) <= limit


def half_precision_norm(seed):
    """Return the norm of gradients that are converted on the way, and the exact one."""
    w = torch.zeros(4_000_000, dtype=torch.bfloat16, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    w.grad = torch.randn(w.shape, generator=generator).to(w.dtype)
    exact = torch.linalg.vector_norm(w.grad.double())
    return clip_grad_norm_([w], math.inf).item(), exact.item()


def test_threads_do_not_get_into_each_others_conversions():
    with ThreadPoolExecutor(4) as pool:
        for got, want in pool.map(half_precision_norm, range(32)):
            assert got == pytest.approx(want, rel=1e-7)


def test_threads_do_not_get_into_each_others_counts():
    """What is kept of arrays is kept for one clip: another may have more of them."""
    assert OneNumber().xp is not OneNumber().xp


FIRST_CLIP = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from gradclip.torch import clip_grad_norm_

def norm():
    w = torch.zeros(3000, dtype=torch.bfloat16, requires_grad=True)
    w.grad = torch.ones_like(w)
    return clip_grad_norm_([w], 1e9)

if MODE == "fake":
    try:
        with FakeTensorMode():
            norm()
    except Exception:
        pass
else:
    with torch.inference_mode():
        norm()
print(norm().item())
"""


@pytest.mark.parametrize("mode", ["fake", "inference"])
def test_a_mode_at_the_first_clip_does_not_stay(mode):
    code = f"MODE = {mode!r}" + FIRST_CLIP
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == str(np.float32(3000**0.5).item()), result.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_many_tiny_tensors_have_norms_of_their_own(dtype):
    sizes = [0, 1, 2, 300, 512, 7] * 200
    generator = torch.Generator().manual_seed(0)
    ws = [torch.zeros(n, dtype=dtype, requires_grad=True) for n in sizes]
    for w in ws:
        w.grad = torch.randn(w.shape, generator=generator, dtype=dtype) * 1e-30
    wide = torch.complex128 if dtype.is_complex else torch.float64
    want = [torch.linalg.vector_norm(w.grad.to(wide)).item() for w in ws]
    got = Clipper(ws, gc.Norm(1.0, over="tensor"), doctor=()).clip_().norm
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3), (1, 4, 2), (5, 1)])
@pytest.mark.parametrize("count", [3, 200])
def test_small_tensors_of_one_shape(shape, count):
    """They can be joined as they are, which leaves them with that many axes."""
    generator = torch.Generator().manual_seed(0)
    ws = with_gradients(torch.randn(count, *shape, generator=generator).unbind())
    want = [torch.linalg.vector_norm(w.grad.double()).item() for w in ws]
    got = Clipper(ws, gc.Norm(1e9, over="tensor"), doctor=()).clip_().norm
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)
    assert float(get_total_norm([w.grad for w in ws])) == pytest.approx(
        math.hypot(*want), rel=F32_ULP
    )


@pytest.mark.parametrize("size", [1.0, 1e36])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_tensors_are_scaled_like_small_ones(dtype, size):
    """Large ones of bfloat16 go through a copy, with a rest and a second factor too."""
    if dtype == torch.float16:
        size = min(size, 1e4)
    generator = torch.Generator().manual_seed(0)
    values = size * torch.randn(1300, 1001, generator=generator).clamp(-2, 2)
    limit = 1e-4 if size > 1 else 0.5
    rows_of = with_gradients(values.to(dtype).unbind())
    whole = with_gradients([values.to(dtype)])
    turned = with_gradients([values.to(dtype)])
    turned[0].grad = values.to(dtype).t().contiguous().t()
    for params in (rows_of, whole, turned):
        clip_grad_norm_(params, limit)
    want = torch.stack([p.grad for p in rows_of])
    assert torch.equal(whole[0].grad, want)
    assert torch.equal(turned[0].grad, want)
    assert not torch.equal(want, values.to(dtype))


def test_a_scale_on_a_device_meets_large_tensors_on_the_host():
    """Fake tensors stand in for the device, of a kind that no driver is asked for."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [
            torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device=device))
            for n, device in ((10, "mtia"), (1 << 18, "cpu"))
        ]
        for p in params:
            p.grad = torch.ones_like(p)
        norm = clip_grad_norm_(params, 1.0)
    assert norm.device.type == "mtia"


def test_tensors_within_tensors_are_scaled_each():
    parts = [torch.full((1 << 18,), x, dtype=torch.bfloat16) for x in (2.0, 6.0)]
    p = torch.nn.Parameter(TwoTensor(*(torch.zeros_like(x) for x in parts)))
    p.grad = TwoTensor(*parts)
    clip_grads_with_norm_([p], 1.0, 2.0)
    assert [x[0].item() for x in (p.grad.a, p.grad.b)] == pytest.approx(
        [1, 3], rel=0.01
    )


class Own(gc.rules.Rule):
    """A rule of somebody else, with a name of the array API that NumPy calls so too."""

    def update(self, seen, state):
        return seen.xp.clip(seen.norm, max=1.0), state


def test_rules_of_others_have_the_whole_array_api():
    (w,) = with_gradients([torch.tensor([3.0, 4.0])])
    assert float(Clipper([w], Own(), doctor=()).clip_().norm_after) == 1


def test_a_default_device_does_not_move_the_factor():
    (w,) = with_gradients([torch.tensor([3.0, 4.0])])
    optimizer = torch.optim.AdamW([w], fused=True)
    clipper = attach(optimizer, gc.Norm(1.0), doctor=())
    with torch.device("meta"):
        optimizer.step()
    assert bool(clipper.info.clipped)


def test_limits_inside_of_other_rules_may_be_tensors():
    (w,) = with_gradients([torch.tensor([3.0, 4.0])])
    rule = gc.Skip(gc.Norm(torch.tensor(10.0)))
    assert bool(Clipper([w], rule, doctor=()).clip_().kept)


@pytest.mark.parametrize("wide", [True, False])
def test_large_bfloat16_is_multiplied_alike_on_every_processor(wide, monkeypatch):
    """With AVX-512 it goes through the cache, which changes no bit."""
    monkeypatch.setattr(verbs, "WIDE_VECTORS", wide)
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(300_001, generator=generator).bfloat16()
    params = with_gradients([large.clone(), large[:100].clone()])
    info = Clipper(params, gc.Norm(1.0), doctor=()).clip_()
    (factor,) = verbs.factors(info.scale, torch.bfloat16)
    assert torch.equal(params[0].grad, large * factor)
    assert torch.equal(params[1].grad, large[:100] * factor)


def few_arrays():
    """Yield arrays that the cache holds, by what is odd about their rows."""
    rng = np.random.default_rng(0)
    for name, values in {
        "noise": rng.normal(size=300_000),
        "outer": np.outer(rng.normal(size=300), rng.normal(size=784)),
        "halves": torch.from_numpy(rng.normal(size=40_000)).bfloat16().float(),
        "constant": np.full(70_000, rng.uniform(1, 2)),
        "three": np.tile(rng.uniform(1, 2, 3), 30_100),
        "alike": np.tile(rng.normal(size=64), 1000),
        "spike": np.concatenate([[1e5], rng.normal(size=50_000)]),
        "heavy": rng.standard_t(1.1, size=60_000),
        "zeros": np.concatenate([rng.normal(size=9000), np.zeros(90_000)]),
        "uneven": rng.normal(size=(77, 91)),
    }.items():
        yield name, [np.asarray(values, np.float32), rng.normal(size=9).astype("f4")]


@pytest.mark.parametrize(("name", "arrays"), list(few_arrays()))
def test_a_few_arrays_are_within_a_unit(name, arrays):
    exact = math.sqrt(sum(float(np.sum(x.astype(np.longdouble) ** 2)) for x in arrays))
    short = short_total(arrays, [x.size for x in arrays])
    # Where rows are alike, or one of them is most of all, float64 has to tell.
    assert (short is None) == (name in ("constant", "alike", "spike", "heavy"))
    told = gc.clip(arrays, gc.Norm(math.inf))[1].norm
    params = with_gradients([torch.tensor(x) for x in arrays])
    for norm in (short or exact, told, clip_grad_norm_(params, math.inf).double()):
        # Half of the smallest unit, and in the last that of the report itself.
        assert float(norm) == pytest.approx(exact, rel=6.5e-8 if short else 6e-8)


@pytest.mark.parametrize("period", [1, 2, 3, 5, 8, 64, 128])
def test_no_short_row_is_off_by_a_unit(period):
    rng = np.random.default_rng(period)
    for draw in (rng.normal, partial(rng.uniform, 1, 2)):
        rows = np.tile(draw(size=(5000, period)), 128 // period + 1)[:, :128]
        rows = np.ascontiguousarray(rows, np.float32)
        exact = np.sum(rows.astype(np.longdouble) ** 2, axis=1)
        error = np.abs(np.sqrt(np.vecdot(rows, rows) / exact) - 1)
        assert float(error.max()) < 2**-23


def test_rows_that_are_added_one_by_one_are_not_trusted(monkeypatch):
    def one_by_one(a, b):
        return np.cumsum(a * b, axis=-1, dtype=np.float32)[..., -1]

    adds_evenly.cache_clear()
    assert adds_evenly()
    monkeypatch.setattr(np, "vecdot", one_by_one)
    adds_evenly.cache_clear()
    assert not fits_short([5000])
    adds_evenly.cache_clear()


@pytest.mark.parametrize("units", [1, 7, 8, 9, 40, 41])
def test_pieces_are_whole_units_of_one_length(monkeypatch, units):
    monkeypatch.setattr("gradclip.torch.exact.AT_ONCE", 100)
    flat = torch.arange(12.0 * units, dtype=torch.bfloat16)
    pieces = [x.clone() for x in converted(flat, torch.float32, 12)]
    assert torch.equal(torch.cat(pieces), flat.float())
    sizes = [len(x) // 12 for x in pieces]
    # Eight units fit into a piece; the last lacks less than one for each of them.
    assert max(sizes) <= 8
    assert len(sizes) == -(-units // 8)
    assert max(sizes) - min(sizes) < len(sizes)


def test_what_is_joined_is_little():
    assert fits_short([4096, 4096, 128 * 50])
    # Neither more small ones, nor what many large ones leave over.
    assert not fits_short([4096, 4096, 1])
    assert not fits_short([4096, *[128 * 50 + 127] * 60])
    assert fits_short([4096, *[128 * 50] * 60])


def test_rows_whose_squares_overflow_are_measured_again():
    x = np.full(5000, 1e30, np.float32)
    x[::2] = 3e29
    with np.errstate(all="ignore"):
        assert short_total([x], [x.size]) is None
    exact = float(np.linalg.norm(x.astype(np.longdouble)))
    assert float(gc.clip(x, gc.Norm(math.inf))[1].norm) == pytest.approx(exact)
    assert short_total([np.zeros(0, np.float32)], [0]) is None
