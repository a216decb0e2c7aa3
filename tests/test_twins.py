"""The golden table: every rule on every front equals its float64 twin, states included.

The run has spikes, zeros, NaN and infinity in it. All its numbers are float32, so that
each front is handed the same ones.
"""

import copy
import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import reference
from fronts import FRONTS
from gradclip.rules import stages
from gradclip.torch import attach
from table import EVERYWHERE, ROWS, STATEFUL

SHAPES = [(3, 4), (5,), (), (2, 3, 2)]
STEPS = 300 if EVERYWHERE else 200
COMPILED = [name for name in ROWS if not ROWS[name].make().grows]
WIDE = ("numpy", "strict", "tensors", "torch", "compiled", "functional", "jax")
USUAL = STEPS if EVERYWHERE else 64
"""Steps for all but NumPy, which goes the whole way; of all that is bad, some come."""


def exactly(x):
    """Return float64 numbers that float32 holds as well."""
    return np.asarray(x, np.float32).astype(np.float64)


def steps(seed=0):
    """Yield the gradients of a run: noise, spikes, vanishing steps, zeros, NaN, inf."""
    rng = np.random.default_rng(seed)
    for step in range(STEPS):
        grads = [np.asarray(rng.normal(size=shape)) for shape in SHAPES]
        if step % 17 == 11:
            grads = [g * 300 for g in grads]
        if step % 23 == 5:
            grads[1] = grads[1] * 40
        if step % 31 == 7:
            grads = [g * 1e-9 for g in grads]
        if step % 47 == 19:
            grads = [g * 0 for g in grads]
        if step % 53 == 20:
            grads[2] = grads[2] * 0
        if step in (2, 60, 61, 140, 222):
            grads[0][1, 2] = np.nan
        if step in (30, 100, 251):
            grads[3][0, 0, 0] = -np.inf
        yield [exactly(g) for g in grads]


def params():
    rng = np.random.default_rng(7)
    weights = [exactly(rng.normal(size=shape)) for shape in SHAPES]
    weights[0][1] = 0.0
    return weights


def quietly(twin, grads, weights):
    with np.errstate(all="ignore"):
        return twin.step(grads, weights)


def finite(grads):
    return all(np.all(np.isfinite(g)) for g in grads)


def cell_norms(grads, stage):
    """Return the norms that a stage of a rule is said to measure."""
    over, p = ("all", np.inf) if stage.over == "element" else (stage.over, stage.p)
    norms = [reference.norm(c, p) for c in reference.cells(grads, over, stage.axis)[0]]
    return np.reshape(norms, () if over == "all" else -1)


class Step(NamedTuple):
    """What one step comes to, by the twin."""

    grads: list
    clipped: list
    norm: Any
    after: Any
    cut: Any
    limits: Any
    state: Any


@functools.cache
def golden(name):
    """Return what the twin of a rule makes of the run."""
    twin, parts = ROWS[name].twin(), stages(ROWS[name].make())
    found = []
    for grads in steps():
        clipped = quietly(twin, grads, params())
        if not finite(grads):
            clipped = [np.zeros_like(g) for g in grads]
        norm, after = cell_norms(grads, parts[0]), cell_norms(clipped, parts[-1])
        cut = (norm != after) & (len(parts) == 1) & np.any(after > 0)
        limits = getattr(twin, "limits", None)
        state = copy.deepcopy(getattr(twin, "state", dict)())
        found.append(Step(grads, clipped, norm, after, cut, limits, state))
    return found


@functools.cache
def states(name):
    """Return the states that NumPy goes through, which all others have to share."""
    front = FRONTS["numpy"](ROWS[name].make(), params())
    return [(front.clip(grads), front.state_dict())[1] for grads in steps()]


def tolerance(front):
    """Return the largest relative error for a front."""
    return 1e-9 if front in WIDE else 1e-6


class Pairs:
    """Numbers that ought to be equal; looked at once a run, since each look is slow."""

    def __init__(self):
        self.got, self.want, self.places = [], [], []

    def add(self, got, want, place):
        """Take copies of two arrays, and what they are."""
        got, want = np.array(got, float), np.array(want, float)
        assert got.shape == want.shape, f"{got.shape}, {want.shape}: {place}"
        self.got.append(got.ravel())
        self.want.append(want.ravel())
        self.places.append(place)

    def check(self, rtol):
        """Compare all of them, and name the first that are not equal."""
        got, want = np.concatenate(self.got), np.concatenate(self.want)
        good = np.isclose(got, want, rtol=rtol, atol=0, equal_nan=True)
        bad = np.repeat(self.places, list(map(len, self.got)))[~good]
        assert not len(bad), f"{bad[0]}: {got[~good][:9]}, not {want[~good][:9]}"


def compare_step(pairs, got, info, want, step):
    """Lay the gradients and the report of one step beside the twin's."""
    for a, b in zip(got, want.clipped, strict=True):
        pairs.add(a, b, f"gradients at step {step}")
    assert bool(info.finite) == finite(want.grads)
    if not info.finite:
        assert not info.kept
        return
    pairs.add(info.norm, want.norm, f"norm at step {step}")
    pairs.add(info.norm_after, want.after, f"norm_after at step {step}")
    # A rule without a memory shows its limit where it cuts; a norm of 0 tells nothing.
    told, limits = np.ravel(want.cut), np.ravel(want.after)
    if want.limits is not None:
        told, limits = np.ravel(want.norm) > 0, np.ravel(want.limits)
    if told.size == limits.size == np.size(info.limit):
        limit = np.ravel(info.limit)
        pairs.add(limit[told], limits[told], f"limit at step {step}")


def compare_state(pairs, got, want, step):
    """Lay two saved memories beside one another."""
    assert set(got) == set(want)
    for key in (key for key in want if not key.endswith(("in_a_row", "rest", "names"))):
        pairs.add(got[key], want[key], f"{key} at step {step}")


def follow(front, name, count=USUAL):
    """Take a rule through the run beside its twin and NumPy's states."""
    clipper, pairs = FRONTS[front](ROWS[name].make(), params()), Pairs()
    for step, want in enumerate(golden(name)[:count]):
        got, info = clipper.clip(want.grads)
        compare_step(pairs, got, info, want, step)
        if step % 10 == 9 or step == count - 1:
            compare_state(pairs, clipper.state_dict(), states(name)[step], step)
    pairs.check(tolerance(front))


@pytest.mark.parametrize("name", ROWS)
def test_numpy_equals_twin(name):
    follow("numpy", name, STEPS)


@pytest.mark.parametrize("name", ROWS)
def test_whatever_follows_the_array_api_equals_twin(name):
    # It checks every argument, which takes a while.
    follow("strict", name, STEPS if EVERYWHERE else 32)


ON_MLX = ["norm", "value", "agc", "percentile-tensor", "zscore-default", "ema"]


@pytest.mark.parametrize("name", ROWS if EVERYWHERE else ON_MLX)
def test_mlx_equals_twin(name):
    follow("mlx", name)


@pytest.mark.parametrize("name", ROWS)
def test_torch_equals_twin(name):
    follow("torch", name)


ONE_EACH = list({type(ROWS[name].make()): name for name in reversed(ROWS)}.values())


@pytest.mark.parametrize("name", ROWS if EVERYWHERE else ONE_EACH)
def test_a_default_device_moves_nothing_of_torch(name):
    follow("torch-elsewhere", name, 12)


@pytest.mark.parametrize("name", ROWS)
def test_tensors_without_parameters_equal_twin(name):
    follow("tensors", name)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("front", ["numpy-float32", "torch-float32"])
def test_float32_equals_twin(name, front):
    follow(front, name)


# array-api-compat caches the look-up of a namespace, of which Dynamo wants to be told.
CACHED = "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"


@pytest.mark.filterwarnings(CACHED)
@pytest.mark.parametrize("name", ONE_EACH)
def test_compiled_torch_equals_twin(name):
    follow("compiled", name)


# Without changes in place, as inductor has it: of all tensors, of parts, of a chain.
FUNCTIONAL = ["norm", "moment-tensor", "chain-skip"]


@pytest.mark.filterwarnings(CACHED)
@pytest.mark.parametrize("name", ROWS if EVERYWHERE else FUNCTIONAL)
def test_compiled_torch_without_changes_in_place_equals_twin(name):
    follow("functional", name)


INDUCED = ["agc", "zscore"]


@pytest.mark.filterwarnings(CACHED)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("name", COMPILED if EVERYWHERE else INDUCED)
def test_inductor_equals_twin(name):
    follow("inductor", name)


# A rule with a memory is compiled for the relay below, where JAX has the first steps.
@pytest.mark.parametrize(
    "name", COMPILED if EVERYWHERE else sorted({*COMPILED} - {*STATEFUL})
)
def test_jax_equals_twin(name):
    follow("jax", name)


@pytest.mark.parametrize(
    "name", COMPILED if EVERYWHERE else sorted({*COMPILED} & {*ONE_EACH})
)
def test_jax_float32_equals_twin(name):
    follow("jax-float32", name)


# Without jit, a step of JAX takes as long as a hundred of NumPy's.
@pytest.mark.parametrize("name", ["norm-unit", "value", "percentile-whole"])
def test_eager_jax_equals_twin(name):
    follow("jax-eager", name, count=6)


def cell_by_cell(saved):
    """Return what is saved for each cell; sorted, since a ring starts anywhere."""
    columns = np.reshape(saved, (-1, np.shape(saved)[-1] if np.ndim(saved) else 1)).T
    return [np.sort(column[np.isfinite(column)]) for column in columns]


@pytest.mark.parametrize("name", STATEFUL)
def test_states_equal_those_of_the_twin(name):
    compared, pairs = 0, Pairs()
    for step, (saved, want) in enumerate(zip(states(name), golden(name), strict=True)):
        for key, cells in want.state.items():
            # Where there are two groups, all tensors are in the second one.
            places = [key, f"0.{key}", f"0.1.{key}"]
            got = next(saved[place] for place in places if place in saved)
            if np.ndim(cells[0]) > 0 and np.ndim(got) == 1:
                got = got[:, None]
            for a, b in zip(cell_by_cell(got), itertools.cycle(cells)):
                pairs.add(a, np.sort(np.ravel(b)), f"{key} at step {step}")
            compared += 1
    pairs.check(1e-9)
    assert compared > STEPS // 2


ORDER = ["jax", "numpy", "torch", "jax", "torch", "numpy", "jax"]


def test_the_relay_goes_every_way():
    assert set(itertools.pairwise(ORDER)) == set(
        itertools.permutations(["numpy", "torch", "jax"], 2)
    )


def relay(name, jax, rtol):
    """Take a rule through the run, one framework after the other handing over."""
    rule, run = ROWS[name].make(), golden(name)
    fronts = {"numpy": "numpy", "torch": "torch"} | ({} if rule.grows else {"jax": jax})
    order = [front for front in ORDER if front in fronts]
    # Compiling again for each leg would take longer than the run.
    made = {key: FRONTS[front](rule, params()) for key, front in fronts.items()}
    legs = np.array_split(np.arange(STEPS), len(order))
    saved, pairs = None, Pairs()
    for front, leg in zip(order, legs, strict=True):
        if saved is not None:
            made[front].load_state_dict(saved)
        for step in leg:
            got, info = made[front].clip(run[step].grads)
            compare_step(pairs, got, info, run[step], step)
        saved = made[front].state_dict()
        compare_state(pairs, saved, states(name)[step], step)
    pairs.check(rtol)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_saved_by_one_framework_goes_on_in_another(name):
    relay(name, "jax", 1e-9)


@pytest.mark.parametrize("name", ["percentile-tensor", "zscore", "ema-tensor"])
def test_a_state_goes_to_float32_and_back(name):
    relay(name, "jax-float32", 1e-6)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("fused", [False, True])
def test_attach_equals_twin(name, fused):
    weights = params()
    leaves = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    twin_params = [w.copy() for w in weights]
    optimizer = torch.optim.SGD(leaves, lr=0.01, fused=fused)
    attach(optimizer, ROWS[name].make())
    twin = ROWS[name].twin()
    for grads in itertools.islice(steps(), USUAL):
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
