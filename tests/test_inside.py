"""Rules that look inside tensors: at elements, with a memory, and singular values."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
import torch

import gradclip as gc
import gradclip.jax
import reference
from gradclip.torch import Clipper, attach
from gradclip.torch.layout import Group, Layout, Way
from test_twins import SHAPES, finite, quietly, steps

RNG = np.random.default_rng(0)
REMEMBERING = [gc.SPAM(warmup=2), gc.AdaClip(0.9)]


def test_an_element_seen_late_is_not_frozen():
    # TianjinYellow/SPAM-Optimizer e8185fb clips it to the square root of 0, for good.
    for rule in (gc.SPAM(), gc.Moment(3.0, warmup=1, corrected=True)):
        clipper = gc.Clipper(rule)
        for _ in range(60):
            clipper.clip(np.array([1.0, 0.0]))
        for _ in range(5):
            clipped, _ = clipper.clip(np.array([1.0, 1.0]))
            np.testing.assert_array_equal(clipped, [1.0, 1.0])


def test_the_first_gradients_are_whole():
    # AdamWClip 0.1.4 as it comes clips the first to 1e-10, and the 30th to 6e-7.
    clipper = gc.Clipper(gc.Moment(3.0, warmup=1, corrected=True))
    for _ in range(30):
        _, info = clipper.clip(np.ones(3))
        assert not info.clipped


@pytest.mark.parametrize("c", [1e-12, 3.0, 1e12])
@pytest.mark.parametrize("rule", [gc.SPAM(ratio=3.0), gc.AdaClip(), gc.AdaGN()])
def test_a_loss_times_a_constant_moves_elements_alike(rule, c):
    steps = RNG.normal(size=(60, 5))
    steps[40::7] *= 30
    one, other = gc.Clipper(rule), gc.Clipper(rule)
    unit = 1.0 if isinstance(rule, gc.AdaGN) else c
    for g in steps:
        got, want = other.clip(c * g)[0], one.clip(g)[0]
        np.testing.assert_allclose(got, unit * want, rtol=1e-12)


@pytest.mark.parametrize("rule", REMEMBERING)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_gradients_that_come_and_go(rule, fused, optimizer):
    a, b = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    made = optimizer([a, b], lr=0.1, fused=fused)
    attached, alone = attach(made, rule), gc.Clipper(rule)
    for step in range(12):
        grads = RNG.normal(size=(2, 3)).astype(np.float32) * (40 if step == 9 else 1)
        if step % 3 == 1:
            grads[0] = 0
        a.grad = None if step % 3 == 1 else torch.tensor(grads[0])
        b.grad = torch.tensor(grads[1])
        made.step()
        want, info = alone.clip(list(grads))
        np.testing.assert_allclose(b.grad, want[1], rtol=1e-6)
        assert attached.info.norm_after == pytest.approx(info.norm_after, rel=1e-6)


@pytest.mark.parametrize("rule", [*REMEMBERING, gc.Norm(0.5, over="singular")])
def test_a_loss_scale_is_seen_through(rule):
    plain, scaled = (torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(2))
    one = torch.optim.SGD([plain], lr=0.1)
    other = torch.optim.SGD([scaled], lr=0.1)
    attach(one, rule), attach(other, rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(8):
        x = torch.tensor(RNG.normal(size=(4, 3)), dtype=torch.float32)
        for p, made in ((plain, one), (scaled, other)):
            made.zero_grad()
            loss = (p * x).sum() * (50 if step == 6 else 1)
            (scaler.scale(loss) if made is other else loss).backward()
        one.step()
        scaler.step(other)
        scaler.update()
    torch.testing.assert_close(plain, scaled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_a_memory_in_single(dtype):
    p = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    clipper = Clipper([p], gc.Moment(2.0, warmup=1, corrected=True))
    for g in ([1.0, 2.0, 3.0], [60000.0, 2.0, 3.0]):
        p.grad = torch.tensor(g, dtype=dtype)
        clipper.clip_()
    assert p.grad.tolist() == [pytest.approx(2.0, rel=1e-2), 2.0, 3.0]
    assert clipper.state_dict()["0.root.0"].dtype == torch.float32


def test_a_memory_of_elements_moves_between_libraries():
    rule = gc.SPAM(ratio=2.0, warmup=1)
    first, grads = gc.Clipper(rule), RNG.normal(size=(4, 3))
    for g in grads[:3]:
        first.clip(g)
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    clipper, state = Clipper([weight], rule), gradclip.jax.as_optax(rule)
    clipper.load_state_dict(first.state_dict())
    weight.grad = torch.tensor(grads[3])
    loaded = gradclip.jax.load_state_dict(
        rule, state.init(jnp.zeros(3)), first.state_dict()
    )
    updates, _ = state.update(jnp.array(grads[3]), loaded)
    clipper.clip_()
    want, _ = first.clip(grads[3])
    np.testing.assert_allclose(weight.grad, want, rtol=1e-12)
    np.testing.assert_allclose(updates, want, rtol=1e-5)


def test_other_shapes_are_refused_before_anything_changes():
    clipper = gc.Clipper(gc.SPAM())
    clipper.clip(np.ones(3))
    before = clipper.state_dict()
    with pytest.raises(ValueError, match="no sparse ones"):
        clipper.clip(np.ones(4))
    for name, x in clipper.state_dict().items():
        np.testing.assert_array_equal(x, before[name])
    for rule in (gc.SPAM(), gc.Norm(1.0, over="singular")):
        with pytest.raises(ValueError, match="chain"):
            gc.Skip(rule)
        with pytest.raises(ValueError, match="an axis may have cut"):
            gradclip.jax.as_optax(rule, axis_name="data")
        with pytest.raises(ValueError, match="looks at each"):
            gc.replay(gc.History.of([1.0]), rule)
    handle = SimpleNamespace(size=lambda: 2)
    groups, params = {"g": Group(handle, 0)}, [torch.ones(1), torch.ones(2)]
    split = Layout(params, [{"g": Way("piece", 0)}, {}], groups)
    with pytest.raises(ValueError, match="whole tensors"):
        split.check(gc.Norm(1.0, over="singular"))
    with pytest.raises(ValueError, match="counts elements"):
        split.check(gc.RMS(1.0))
    # A tensor that no group has a part of is whole, and so is its size.
    Layout(params, [{}, {}], groups).check(gc.RMS(1.0))


SPECTRAL = {
    "hard": (gc.Norm(0.8, over="singular"), lambda s: np.minimum(s, 0.8)),
    "smooth": (
        gc.Smooth(1.0, over="singular", curve="root"),
        lambda s: s / np.sqrt(1 + s**2),
    ),
}


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("front", ["numpy", "torch", "attach", "jax", "mlx"])
def test_spectral_rules_equal_their_twins(name, front):
    rule, change = SPECTRAL[name]
    twin, clip = reference.Spectral(change), MAKERS[front](rule)
    for step, grads in enumerate(itertools.islice(steps(), 80)):
        want = quietly(twin, grads, None)
        if not finite(grads):
            want = [np.zeros_like(g) for g in grads]
        rtol = 1e-4 if front in ("jax", "mlx") else 1e-9
        for got, expected in zip(clip(grads), want, strict=True):
            # An element comes from several: rounding is that of the largest.
            size = max(np.max(np.abs(expected)), np.finfo(float).tiny)
            assert np.max(np.abs(got - expected)) <= rtol * size, f"step {step}"


def on_numpy(rule):
    return lambda grads: gc.clip(grads, rule)[0]


def on_torch(rule):
    params = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    clipper = Clipper(params, rule)

    def clip(grads):
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g)
        clipper.clip_()
        return [np.zeros(p.shape) if p.grad is None else p.grad.numpy() for p in params]

    return clip


def on_attach(rule):
    params = [torch.nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in SHAPES]
    optimizer = torch.optim.SGD(params, lr=1.0, fused=True)
    attach(optimizer, rule)

    def clip(grads):
        for p, g in zip(params, grads, strict=True):
            p.data.zero_()
            p.grad = torch.tensor(g)
        optimizer.step()
        return [-p.detach().numpy() for p in params]

    return clip


def on_jax(rule):
    transform = gradclip.jax.as_optax(rule)
    update, state = jax.jit(transform.update), transform.init(SHAPED)
    return lambda grads: update([jnp.asarray(g, jnp.float32) for g in grads], state)[0]


def on_mlx(rule):
    def clip(grads):
        given = [mx.array(g.astype(np.float32)) for g in grads]
        return [np.array(x, np.float64) for x in gc.clip(given, rule)[0]]

    return clip


SHAPED = [jnp.zeros(shape) for shape in SHAPES]
MAKERS = {"numpy": on_numpy, "torch": on_torch, "attach": on_attach}
MAKERS |= {"jax": on_jax, "mlx": on_mlx}


def newton_schulz(x, c, steps=40):
    """SPECTRA's own way: (I + X Xᵀ / c²)^(-1/2) X by a coupled iteration."""
    a = np.eye(len(x)) + x @ x.T / c**2
    top = np.linalg.norm(a)
    y, z = a / top, np.eye(len(x))
    for _ in range(steps):
        t = 0.5 * (3 * np.eye(len(x)) - z @ y)
        y, z = y @ t, t @ z
    return z / np.sqrt(top) @ x


def test_smooth_spectral_clipping_is_that_of_spectra():
    rule = gc.Smooth(0.7, over="singular", curve="root")
    for shape in [(4, 6), (6, 4), (5, 5)]:
        g = RNG.normal(size=shape) * 3
        np.testing.assert_allclose(
            gc.clip(g, rule)[0], newton_schulz(g, 0.7), rtol=1e-9, atol=1e-9
        )


def matrices():
    g = np.outer([3.0, 4.0], [0.6, 0.8]) + 0.1 * np.outer([4.0, -3.0], [0.8, -0.6])
    return {"weight": g, "bias": np.array([3.0, 4.0])}


def test_singular_values_are_cut_and_the_others_stay():
    clipped, info = gc.clip(matrices(), gc.Norm(1.0, over="singular"))
    values = np.linalg.svd(clipped["weight"], compute_uv=False)
    np.testing.assert_allclose(values, [1.0, 0.5], rtol=1e-12)
    np.testing.assert_allclose(clipped["bias"], [0.6, 0.8], rtol=1e-12)
    assert (info.norm, info.limit) == (pytest.approx(5.0), 1.0)
    untouched, info = gc.clip(matrices(), gc.Norm(5.1, over="singular"))
    np.testing.assert_array_equal(untouched["weight"], matrices()["weight"])
    assert not info.clipped


@pytest.mark.parametrize(
    "rule",
    [
        *REMEMBERING,
        gc.Norm(1.0, over="singular"),
        gc.RMS(0.5),
        gc.by_name({"x": gc.Norm(1.0, over="unit"), "*": gc.Quantile()}),
    ],
)
def test_tensors_without_elements_are_nothing(rule):
    weights = [torch.zeros(0, 3), torch.zeros(2, 2)]
    for p in weights:
        p.grad = torch.ones_like(p)
    info = Clipper(weights, rule, doctor=()).clip_()
    grads = [np.zeros((0, 3)), np.ones((2, 2))]
    clipped, other = gc.Clipper(rule).clip(grads)
    np.testing.assert_allclose(clipped[1], weights[1].grad, rtol=1e-6)
    np.testing.assert_allclose(info.norm, other.norm)
    transform = gradclip.jax.as_optax(rule)
    for some in (grads, []):
        state = transform.init([jnp.zeros(g.shape) for g in some])
        updates, _ = jax.jit(transform.update)(some, state)
        for got, want in zip(updates, clipped, strict=False):
            np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_is_never_decomposed(bad):
    rule, grads = gc.Norm(1.0, over="singular"), matrices()
    grads["weight"][0, 0] = bad
    for policy, kept in (("skip", 0.0), ("ignore", grads["weight"][1, 1])):
        clipped, info = gc.clip(grads, rule, on_nonfinite=policy)
        assert not info.finite
        assert clipped["weight"][1, 1] == kept
    clipped, _ = gc.clip(grads, rule, on_nonfinite="zero")
    assert np.linalg.norm(clipped["weight"], ord=2) <= 1
    compiled = jax.jit(lambda g: gc.clip(g, rule))
    clipped, info = compiled(jax.tree.map(jnp.asarray, grads))
    assert not info.finite
    assert not np.any(clipped["weight"])


def test_a_spike_of_a_million_ends_at_the_limit_in_single_precision():
    g = torch.tensor(1e6 * RNG.normal(size=(8, 8)), dtype=torch.float32)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    weight.grad = g
    Clipper([weight], gc.Norm(1.0, over="singular")).clip_()
    top = torch.linalg.matrix_norm(weight.grad.double(), ord=2)
    assert 1 - 1e-5 < float(top) <= 1
