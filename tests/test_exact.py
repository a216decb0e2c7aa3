"""Properties that hold to the bit, or to the last digits: no tolerance hides a bias."""

import numpy as np
import pytest

import gradclip as gc
from gradclip.rules import stages
from table import ROWS
from test_twins import finite, params, steps

UNITLESS = [n for n in ROWS if ROWS[n].scales and ROWS[n].scales(2.0) == ROWS[n].make()]
GLOBAL = [n for n in ROWS if all(s.over == "all" for s in stages(ROWS[n].make()))]


def scales(name, c):
    """Return the factors of a run whose loss was multiplied by a constant."""
    clipper = gc.Clipper(ROWS[name].make())
    given = [[c * g for g in grads] for grads in steps()]
    return [clipper.clip(grads, params=params())[1].scale for grads in given]


def test_the_adaptive_rules_have_no_unit():
    assert {"percentile", "zscore", "ema-tensor"} <= set(UNITLESS)


@pytest.mark.parametrize("name", UNITLESS)
def test_factors_do_not_change_with_the_loss(name):
    plain = np.array(scales(name, 1.0))
    assert np.min(plain, initial=1.0, where=plain > 0) < 0.03
    for exponent in (-40, -1, 12):
        np.testing.assert_array_equal(scales(name, 2.0**exponent), plain)
    for c in (1 / 3, 1e3, 7e11):
        np.testing.assert_allclose(scales(name, c), plain, rtol=1e-12)


def halves(grads):
    """Cut every tensor that has an axis in two along it."""
    flat = [np.reshape(g, -1) for g in grads]
    return [part for g in flat for part in (g[: len(g) // 3], g[len(g) // 3 :])]


@pytest.mark.parametrize("name", GLOBAL)
def test_a_tensor_cut_in_two_changes_nothing(name):
    whole, cut = gc.Clipper(ROWS[name].make()), gc.Clipper(ROWS[name].make())
    for step, grads in enumerate(steps()):
        want, info = whole.clip(grads)
        got, other = cut.clip(halves(grads))
        for a, b in zip(got, halves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, err_msg=f"step {step}")
        assert bool(info.kept) == bool(other.kept)
        if finite(grads):
            np.testing.assert_allclose(other.limit, info.limit, rtol=1e-12)


def drift(x, c):
    """Return the mean step of clipped SGD on (x - ξ)² / 2: ξ is 10 in a tenth, or 0."""
    rule = gc.Norm(c)
    steps = [float(gc.clip(np.array(x - xi), rule)[0]) for xi in (0.0, 10.0)]
    return 0.9 * steps[0] + 0.1 * steps[1]


@pytest.mark.parametrize("c", [0.5, 2.0, 5.0, 8.9])
def test_clipped_sgd_rests_at_a_ninth_of_the_limit(c):
    # Without a clip it rests at the optimum, 1.
    assert abs(drift(1.0, 1e3)) < 1e-15
    assert abs(drift(c / 9, c)) < 1e-15 * c
    assert drift(c / 9 - 0.01, c) < -0.008 < 0.008 < drift(c / 9 + 0.01, c)


@pytest.mark.parametrize("c", [0.5, 2.0, 5.0])
def test_carrying_removes_the_bias_exactly(c):
    # Where the draws of a tenth are spread evenly, so that nothing is left to chance.
    clipper, x, total = gc.UClip(gc.Norm(c)), 1.0, 0.0
    for step in range(1000):
        total += float(clipper.clip(np.array(x - 10.0 * (step % 10 == 9)))[0])
    left = float(clipper.carried[0])
    assert abs(total + left) < 1e-9
    assert abs(left) <= 10.0
