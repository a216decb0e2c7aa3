"""What would have given wrong numbers is refused, before anything is changed."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gradclip as gc
from gradclip.arrays import dotted, flatten
from gradclip.jax import as_optax
from gradclip.per_sample import clipped_sum
from gradclip.torch import Clipper


def one():
    return np.array([3.0, 4.0])


G, H = one(), one()
REPEATED = {
    "the same twice": ([G, G], [G, G]),
    "a view of it": ([G, G[:]], [G, G]),
    "two places for one": ([G, G], [H, one()]),
    "one place for two": ([G, one()], [H, H]),
}


@pytest.mark.parametrize("case", REPEATED)
def test_an_array_that_stands_in_two_places_is_not_written_to(case):
    grads, out = REPEATED[case]
    with pytest.raises(ValueError, match="one array stands in several places"):
        gc.clip(grads, gc.Norm(1.0), out=out)
    assert all(x.tolist() == [3.0, 4.0] for x in (*grads, *out))
    clipped, _ = gc.clip(grads, gc.Norm(1.0))
    np.testing.assert_allclose(np.linalg.norm(clipped), 1.0)


def test_a_read_only_place_is_refused_before_the_rule_learns():
    clipper = gc.Clipper(gc.ZScore())
    a, b = one(), one()
    b.flags.writeable = False
    before = {name: x.copy() for name, x in clipper.state_dict().items()}
    with pytest.raises(ValueError, match="read-only"):
        clipper.clip([a, one()], out=[a, b])
    assert a.tolist() == [3.0, 4.0]
    assert clipper.state_dict().keys() == before.keys()


def test_the_schedules_of_a_chain_are_asked_before_the_first_is_applied():
    rule = gc.chain(gc.Norm(1.0), gc.Norm(lambda step: -1.0))
    g = one()
    with pytest.raises(ValueError, match="Nothing was changed"):
        gc.Clipper(rule).clip(g, out=g)
    assert g.tolist() == [3.0, 4.0]
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.tensor([3.0, 4.0])
    with pytest.raises(ValueError, match="Nothing was changed"):
        Clipper([w], rule).clip_()
    assert w.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "rule", [gc.Skip(gc.Norm(1.0)), gc.chain(gc.Norm(1.0), gc.Normalize())]
)
def test_samples_take_one_rule_that_rescales(rule):
    with pytest.raises(ValueError, match="takes one rule"):
        clipped_sum(np.array([[3.0, 4.0], [0.3, 0.4]]), rule)


@pytest.mark.parametrize("limit", [1.0, 1e-3])
@pytest.mark.parametrize("make", [np.asarray, jnp.asarray, torch.from_numpy])
def test_half_precision_samples_have_their_whole_scale(limit, make):
    each = np.full((4, 300), 6e4, np.float16)
    total, _ = clipped_sum(make(each), gc.Norm(limit))
    want = 4 * limit / np.sqrt(300)
    np.testing.assert_allclose(np.asarray(total, np.float64), want, rtol=2e-3)


def test_what_is_carried_goes_by_name():
    clipper = gc.UClip(gc.Value(2.0))
    clipper.clip({"a": np.array([5.0]), "b": np.array([1.0])})
    clipped, _ = clipper.clip({"b": np.zeros(1), "a": np.zeros(1)})
    assert {name: float(x[0]) for name, x in clipped.items()} == {"b": 0.0, "a": 2.0}


@pytest.mark.parametrize(
    "make",
    [
        np.array,
        jnp.array,
        torch.tensor,
        partial(jnp.array, dtype=jnp.bfloat16),
        partial(torch.tensor, dtype=torch.bfloat16),
    ],
    ids=["NumPy", "JAX", "torch", "JAX bfloat16", "torch bfloat16"],
)
def test_what_is_carried_is_saved_by_name_for_any_library(make):
    clipper, other = gc.UClip(gc.Value(2.0)), gc.UClip(gc.Value(2.0))
    clipper.clip({"a": make([5.0]), "b": make([1.0])})
    saved = clipper.state_dict()
    assert all(type(x) is np.ndarray for x in saved.values())
    other.load_state_dict(saved)
    for zero in (make([0.0]), np.zeros(1)):
        clipped, _ = other.clip({"b": zero, "a": zero})
        assert clipped["a"].dtype == zero.dtype
        told = {name: float(x[0]) for name, x in clipped.items()}
        assert told == {"b": 0.0, "a": 2.0}
        other.load_state_dict(saved)


@pytest.mark.parametrize("grads", [np.zeros(3), [np.zeros(1), np.zeros(1)]])
def test_other_gradients_than_those_carried_are_refused(grads):
    clipper = gc.UClip(gc.Value(2.0))
    clipper.clip(np.array([5.0]))
    with pytest.raises(ValueError, match="UClip carries 1 arrays of shapes"):
        clipper.clip(grads)
    assert float(clipper.clip(np.zeros(1))[0][0]) == 2.0


def taught():
    clipper = gc.Clipper(gc.by_name({"a": gc.EMA(), "*": gc.ZScore()}))
    for i in range(3):
        clipper.clip({"a": one() + i, "b": one()})
    return clipper


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("step", -1, "has -1 for 'step'"),
        ("0.0.ema", np.array([np.nan, 0.0]), "NaN for '0.ema'"),
        ("0.1.mean", None, "lacks '1.mean'"),
        ("0.2.mean", np.zeros(2), "should not have '2.mean'"),
    ],
)
def test_a_damaged_state_is_refused_also_before_the_first_step(name, value, told):
    saved = taught().state_dict()
    damaged = {k: x for k, x in {**saved, name: value}.items() if x is not None}
    for clipper in (gc.Clipper(taught().rule), taught()):
        before = clipper.state_dict()
        with pytest.raises(ValueError, match=told):
            clipper.load_state_dict(damaged)
        assert clipper.state_dict().keys() == before.keys()
        clipper.load_state_dict(saved)
        assert clipper.state_dict()["0.1.count"].tolist() == [0, 3]


def test_what_masked_arrays_hide_would_count():
    hidden = np.ma.masked_array([3.0, 4.0, 100.0], mask=[0, 0, 1])
    with pytest.raises(TypeError, match=r"masked array.*filled\(0\)"):
        gc.clip(hidden, gc.Norm(1.0))
    clipped, _ = gc.clip(hidden.filled(0), gc.Norm(1.0))
    np.testing.assert_allclose(clipped, [0.6, 0.8, 0.0])


@pytest.mark.parametrize("make", [gc.ZScore, gc.EMA], ids=["max", "warmup"])
def test_a_limit_beside_another_is_a_number(make):
    name = "max_limit" if make is gc.ZScore else "warmup_limit"
    assert make(**{name: 2.0})
    with pytest.raises(TypeError, match="this limit is a number"):
        make(**{name: lambda step: 1.0})


@pytest.mark.parametrize("g", [3.0, np.nan])
@pytest.mark.parametrize("first", [gc.Skip(gc.Norm(1.0)), gc.Norm(1.0)])
def test_the_limit_of_the_stage_that_dropped_a_step_is_told_everywhere(first, g):
    """Where flags are not read, the stages behind it run as well."""
    rule = gc.chain(first, gc.Skip(gc.Norm(0.5)), gc.Norm(0.25))
    p = torch.nn.Parameter(torch.zeros(1))
    p.grad = torch.tensor([g])
    tx = as_optax(rule)
    _, state = jax.jit(tx.update)([jnp.array([g])], tx.init([jnp.zeros(1)]))
    infos = [
        gc.Clipper(rule).clip(np.array([g]))[1],
        gc.Clipper(rule).clip(jnp.array([g]))[1],
        Clipper([p], rule, doctor=()).clip_(),
        state.info,
    ]
    limit = 1.0 if np.isnan(g) or type(first) is gc.Skip else 0.5
    for info in infos:
        assert float(info.limit) == limit
        assert not info.kept


class Layer(NamedTuple):
    w: Any
    b: Any


def test_names_are_those_of_jax():
    tree = {"x": Layer(one(), [one()]), "it's": one(), "a.b": {0: one()}, "c]": one()}
    names = [dotted(where) for where, _ in flatten(tree)]
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    keystr = partial(jax.tree_util.keystr, simple=True, separator=".")
    assert sorted(names) == sorted(keystr(path) for path, _ in paths)
    rule = gc.by_name({"x.w": gc.Norm(1.0), "*": None})
    clipped, _ = gc.clip(tree, rule)
    assert clipped["x"].w.tolist() == pytest.approx([0.6, 0.8])
    assert clipped["x"].b[0].tolist() == [3.0, 4.0]
