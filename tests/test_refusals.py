"""What would have given wrong numbers is refused, before anything is changed."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gradclip as gc
from gradclip.jax import as_optax, state_dict
from gradclip.jax import load_state_dict as load_jax
from gradclip.per_sample import clipped_sum
from gradclip.torch import (
    Clipper,
    attach,
    clip_grad_norm_,
    clip_grad_value_,
    get_total_norm,
)
from gradclip.torch.ghost import PerSample
from gradclip.trees import dotted, flatten


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
    with pytest.raises(ValueError, match="share memory; hand over each once"):
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
        ("step", np.array(np.nan), "damaged: it has nan for 'step'"),
        ("step", np.zeros(2), "damaged: it has .* for 'step'"),
        ("step", 2.5, "has 2.5 for 'step'"),
        ("skipped", "abc", "damaged: it has abc for 'skipped'"),
        ("rule", np.array([255, 254], np.uint8), "'rule' is no text"),
        ("rule", np.array(7), "'rule' is no text"),
        ("rule", np.zeros(0, np.uint8), "has 0 names for 'rule'"),
        ("rule", np.frombuffer(b"a\nb", np.uint8), "has 2 names for 'rule'"),
        ("names", np.array([-1]), "'names' is no text"),
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


def steps_of(rule):
    clipper = gc.Clipper(rule)
    for i in range(3):
        clipper.clip([one() + i, one()])
    return clipper.state_dict()


ZSCORE, EMA = gc.ZScore(), gc.EMA(over="all")
WINDOW = gc.Percentile(window=8)


@pytest.mark.parametrize(
    ("rule", "name", "value", "told"),
    [
        (ZSCORE, "0.mean", np.inf, "infinity for 'mean'"),
        (ZSCORE, "0.mean", -1.0, "a number below 0 for 'mean'"),
        (ZSCORE, "0.std", -1.0, "a number below 0 for 'std'"),
        (ZSCORE, "0.count", -1.0, "a number below 0 for 'count'"),
        (ZSCORE, "0.mean", np.zeros(2), r"has \(2,\) for 'mean'"),
        (ZSCORE, "0.mean", "x", "has 'x' for 'mean'"),
        (ZSCORE, "0.mean", [[1.0], []], "'mean' is no array"),
        (gc.ZScore(over="tensor"), "0.mean", 1.0, r"has \(\) for 'mean'"),
        (EMA, "0.rest", np.inf, "infinity for 'rest'"),
        (gc.Quantile(), "0.limit", np.inf, "infinity for 'limit'"),
        (gc.SPAM(), "0.root.1", -one(), "a number below 0 for 'root.1'"),
        (gc.by_name({"*": ZSCORE}), "0.0.std", -one(), "below 0 for '0.std'"),
        (WINDOW, "0.norms", np.ones(3), r"\(3,\) for 'norms'.*\(8,\)"),
        (WINDOW, "0.norms", -np.ones(8), "a number below 0 for 'norms'"),
        (gc.Deviation(window=8, warmup=2), "0.norms", np.ones(3), r"\(3,\)"),
        (gc.Skip(WINDOW), "0.norms", np.ones((8, 1)), r"\(8, 1\)"),
        (gc.Percentile(window=None), "0.norms", np.ones(0), r"\(0,\)"),
        (gc.Percentile(window=None), "0.norms", np.ones(300), r"\(300,\)"),
        (
            gc.Percentile(window=8, over="tensor"),
            "0.norms",
            np.ones((3, 2)),
            r"\(3, 2\) for 'norms'",
        ),
    ],
)
def test_numbers_that_no_memory_holds_are_refused(rule, name, value, told):
    saved, arrays = steps_of(rule), [jnp.ones(2)] * 2
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    used = gc.Clipper(rule)
    fronts = [used.load_state_dict, Clipper(params, rule).load_state_dict]
    if not rule.grows:
        state = as_optax(rule).init(arrays)
        fronts.append(lambda saved: load_jax(rule, state, saved, arrays))
    for load in fronts:
        load(saved)
        with pytest.raises(ValueError, match=f"{told}|saved with other parameters"):
            load({**saved, name: value})
    # On a front that knows no sizes yet, it is told as it is.
    with pytest.raises(ValueError, match=f"damaged: .*{told}"):
        gc.Clipper(rule).load_state_dict({**saved, name: value})


@pytest.mark.parametrize(
    ("rule", "name", "value"),
    [
        (EMA, "0.rest", -1e-17),
        (gc.Quantile(), "0.limit", -1e-17),
        (WINDOW, "0.norms", np.full(8, np.inf)),
        (gc.Percentile(window=None), "0.norms", np.ones(1024)),
    ],
)
def test_numbers_that_a_memory_may_hold_are_loaded(rule, name, value):
    clipper = gc.Clipper(rule)
    clipper.load_state_dict({**steps_of(rule), name: np.asarray(value)})
    np.testing.assert_array_equal(clipper.state_dict()[name], value)


def test_a_rule_of_ones_own_may_remember_anything():
    clipper, other = gc.Clipper(Log()), gc.Clipper(Log())
    clipper.clip(one() / 100)
    other.load_state_dict(clipper.state_dict())
    assert other.state_dict()["0.mean"] < 0
    assert np.isinf(other.state_dict()["0.least"])


class Log(gc.Rule):
    """A rule of one's own with numbers that no rule of ours has in a memory."""

    stateful = True

    def init(self, norm, xp):
        return {"mean": xp.zeros_like(norm), "least": xp.full_like(norm, math.inf)}

    def update(self, seen, state):
        return seen.norm, {"mean": seen.xp.log(seen.norm), "least": state["least"]}


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, torch.tensor(-1.0), torch.ones(2), "x", None]
)
def test_a_damaged_norm_of_the_last_pass_is_refused(value):
    p = torch.nn.Parameter(torch.ones(1))
    optimizers = [torch.optim.SGD([p], lr=0.1)]
    clipper = attach(optimizers, gc.Norm(1.0), in_backward=True)
    saved = clipper.state_dict()
    with pytest.raises(ValueError, match=r"damaged: it has .* for 'previous'"):
        clipper.load_state_dict({**saved, "step": 7, "previous": value})
    now = clipper.state_dict()
    assert float(now["previous"]) == int(now["step"]) == 0
    saved["previous"] += 3.0
    clipper.load_state_dict(saved)
    saved["previous"] += 4.0
    assert float(clipper.state_dict()["previous"]) == 3.0
    with pytest.raises(ValueError, match="but NoneType"):
        clipper.load_state_dict(None)


@pytest.mark.parametrize("state", [None, [1, 2], 3])
def test_what_is_no_state_is_refused(state):
    p = torch.nn.Parameter(torch.ones(1))
    for clipper in (gc.Clipper(gc.ZScore()), Clipper([p], gc.ZScore())):
        with pytest.raises(ValueError, match="not the state of a clipper, but"):
            clipper.load_state_dict(state)


@pytest.mark.parametrize(
    "rule",
    [gc.chain(gc.ZScore(), gc.EMA()), gc.chain(gc.ZScore(), gc.SPAM()), gc.SPAM()],
)
@pytest.mark.parametrize("front", ["arrays", "torch"])
def test_a_state_that_has_lost_a_stage_is_refused(rule, front):
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    into, first = gc.Clipper(rule), gc.Clipper(rule)
    if front == "torch":
        into = Clipper([p], rule, doctor=())
    first.clip([one()])
    last = f"{len(rule.kind.split(', ')) - 1}."
    saved = {k: x for k, x in first.state_dict().items() if not k.startswith(last)}
    with pytest.raises(ValueError, match=r"lacks 'count.*it is damaged"):
        into.load_state_dict(saved)


def test_a_stage_behind_one_that_dropped_all_steps_has_nothing_to_lose():
    rule = gc.chain(gc.Skip(gc.Norm(1.0)), gc.EMA(), gc.SPAM())
    first, second = gc.Clipper(rule), gc.Clipper(rule)
    first.clip([one()])
    second.load_state_dict(first.state_dict())
    for clipper in (first, second):
        clipper.clip([one() / 10])
    again = gc.Clipper(rule)
    again.load_state_dict(second.state_dict())
    assert again.state_dict().keys() == first.state_dict().keys()
    with pytest.raises(ValueError, match="lacks 'count' of EMA"):
        again.load_state_dict(
            {k: x for k, x in second.state_dict().items() if not k.startswith("1.")}
        )


def test_the_state_of_another_rule_may_be_left_out():
    clipper = gc.Clipper(gc.ZScore())
    with pytest.raises(ValueError, match=r"belongs to chain.*leave the state out"):
        clipper.load_state_dict(gc.Clipper(gc.chain(*[gc.EMA()] * 2)).state_dict())


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


@pytest.mark.parametrize("value", [3, 3.0])
def test_integers_lose_nothing_of_what_is_carried(value):
    clipper = gc.UClip(gc.Value(0.4))
    grads = [np.array([value]), *[np.array([type(value)(0)])] * 9]
    assert sum(float(clipper.clip(g)[0][0]) for g in grads) == pytest.approx(3.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: np.array(x, np.float16),
        lambda x: torch.tensor(x, dtype=torch.float16),
        lambda x: jnp.array(x, jnp.float16),
    ],
)
def test_what_is_carried_may_be_more_than_half_precision_holds(make):
    clipper, passed = gc.UClip(gc.Norm(1.0)), 0.0
    for _ in range(8):
        clipped, info = clipper.clip(make([10_000.0]))
        assert bool(info.finite)
        assert 0.999 < float(clipped[0]) <= 1
        passed += float(clipped[0])
    assert str(clipped.dtype).endswith("float16")
    carried = float(clipper.carried[0][0])
    assert carried + passed == pytest.approx(80_000, rel=1e-6)
    _, info = clipper.clip(make([math.inf]))
    assert not bool(info.kept)
    assert float(clipper.carried[0][0]) == carried


def test_names_that_collide_carry_each_their_own():
    clipper = gc.UClip(gc.Value(1.0))
    clipper.clip({"a.b": np.array([5.0]), "a": {"b": np.zeros(1)}})
    clipped, _ = clipper.clip({"a.b": np.zeros(1), "a": {"b": np.zeros(1)}})
    assert (clipped["a.b"].tolist(), clipped["a"]["b"].tolist()) == ([1.0], [0.0])


def test_carrying_refuses_what_is_no_array_in_a_sentence():
    with pytest.raises(TypeError, match="is NoneType, not an array"):
        gc.UClip(gc.Value(1.0)).clip({"a": None})


def test_states_of_another_kind_of_clipper_are_refused():
    plain, carrying = gc.Clipper(gc.Value(1.0)), gc.UClip(gc.Value(1.0))
    p = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="nothing that was carried over"):
        carrying.load_state_dict(plain.state_dict())
    for clipper in (plain, Clipper([p], gc.Value(1.0))):
        with pytest.raises(ValueError, match=r"'carried_names'.*another kind"):
            clipper.load_state_dict(carrying.state_dict())


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_a_modulus_beyond_float32_is_clipped_to_its_limit(make):
    dtype = np.complex64 if make is np.array else torch.complex64
    for rule in (gc.Value(1.0), gc.Smooth(1.0, over="element")):
        clipped, info = gc.clip(make([3e38 + 3e38j], dtype=dtype), rule)
        assert abs(complex(clipped[0])) == pytest.approx(1.0, rel=1e-6)
        assert float(info.norm_after) == pytest.approx(1.0, rel=1e-6)
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    p.grad = torch.tensor([3e38 + 3e38j])
    clip_grad_value_([p], 1.0)
    assert abs(complex(p.grad[0])) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("rule", [gc.Moment(), gc.Peak()])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_damaged_memory_of_elements_is_refused(rule, fresh):
    clipper = gc.Clipper(rule)
    clipper.clip([one(), one()])
    saved = clipper.state_dict()
    into = gc.Clipper(rule) if fresh else clipper
    name = next(x for x in saved if x.startswith("0.") and x.endswith(".1"))
    with pytest.raises(ValueError, match="NaN"):
        into.load_state_dict({**saved, name: np.full_like(saved[name], np.nan)})
    lost = {k: x for k, x in saved.items() if k != name}
    with pytest.raises(ValueError, match="lacks"):
        into.load_state_dict(lost)
    into.load_state_dict(saved)


@pytest.mark.parametrize(
    ("grads", "params"), [(np, torch), (torch, np), (jnp, np), (np, jnp)]
)
def test_parameters_of_another_library_are_refused(grads, params):
    with pytest.raises(TypeError, match="one call takes the arrays of one library"):
        gc.clip([grads.ones(2)], gc.AGC(), params=[params.ones(2)])


def test_parameters_of_other_shapes_are_refused_in_jax():
    clip, g = as_optax(gc.AGC(0.1)), jnp.ones((3, 2))
    with pytest.raises(
        ValueError, match=r"have shapes \[\(2, 3\)\], but the gradients"
    ):
        clip.update(g, clip.init(g), g.T)


def test_parameters_under_other_keys_are_refused():
    grads, rule = {"a": one(), "b": one()}, gc.Relative(0.1, over="tensor")
    with pytest.raises(ValueError, match="'a' is a key of the gradients"):
        gc.clip(grads, rule, params={"b": one(), "c": one()})
    with pytest.raises(ValueError, match="'c' is a key"):
        gc.clip(grads, gc.Norm(1.0), out={"a": one(), "b": one(), "c": one()})


def test_groups_within_groups_are_refused():
    inner = gc.by_name({"a1": gc.Norm(1.0), "*": None})
    with pytest.raises(ValueError, match="a group takes one rule"):
        gc.by_name({"a*": inner, "*": None})


def test_a_new_parameter_shares_the_memory_of_a_group_that_is_skipped_by():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([a], lr=0.1)
    rule = gc.Skip(gc.by_name({"*": gc.ZScore(warmup=2, z=3.0)}))
    clipper = attach(optimizer, rule, doctor=())
    for x in (1.0, 1.1, 0.9, 1.0):
        a.grad = torch.tensor([x])
        optimizer.step()
    optimizer.add_param_group({"params": [b]})
    a.grad, b.grad = torch.tensor([1.0]), torch.tensor([50.0])
    optimizer.step()
    assert clipper.info.limit.max() < 2
    assert b.item() == 0


def test_a_band_takes_arrays_and_is_the_right_way_up():
    assert gc.Band(np.array(0.0), 1.0).low == 0
    for low, high in (
        (2.0, np.array(1.0)),
        (np.array(2.0), 1.0),
        (np.array(-1.0), 1.0),
    ):
        with pytest.raises(ValueError, match="it lies between 0 and high"):
            gc.Band(low, high)


@pytest.mark.parametrize("start", [lambda step: 1.0, np.inf, 0.0])
def test_the_first_limit_of_a_quantile_is_a_number(start):
    with pytest.raises(ValueError, match="a finite number above 0"):
        gc.Quantile(start=start)
    with pytest.raises(TypeError, match="this is a plain number"):
        gc.Quantile(start=np.array(1.0))


@pytest.mark.parametrize("with_steps", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        gc.chain(gc.Skip(gc.Norm(1.0)), gc.ZScore()),
        gc.chain(gc.ZScore(), gc.by_name({"*": gc.EMA()})),
    ],
)
def test_a_stage_that_has_met_no_step_yet_is_saved_and_loaded(rule, with_steps):
    first, into = gc.Clipper(rule), gc.Clipper(rule)
    first.clip([one() * np.nan])
    if with_steps:
        into.clip([one() / 100])
    into.load_state_dict(first.state_dict())
    for g in (one() / 100, one() / 90):
        expected, got = first.clip([g]), into.clip([g])
        assert expected[0][0].tolist() == got[0][0].tolist()
    assert {k: x.tolist() for k, x in first.state_dict().items()} == {
        k: x.tolist() for k, x in into.state_dict().items()
    }


def test_a_memory_that_is_lent_is_not_looked_for_in_a_checkpoint():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([p])
    rule = gc.chain(gc.Moment(memory="optimizer"), gc.ZScore())
    clipper = attach(optimizer, rule, doctor=())
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
    clipper.load_state_dict(clipper.state_dict())
    assert int(clipper.state_dict()["1.count"]) == 3


@pytest.mark.parametrize(
    "rule", [gc.Moment(3.0, warmup=1, corrected=True), gc.Peak(), gc.EMA(warmup=1)]
)
@pytest.mark.parametrize("left", [("b",), ("b", "c")])
def test_a_memory_is_not_taken_over_by_another_tensor(rule, left):
    first = {"a": np.full(2, 0.01), "b": np.ones(2)}
    clipper = gc.Clipper(rule)
    clipper.clip(first)
    before = clipper.state_dict()
    with pytest.raises(ValueError, match=r"[hH]and over the same gradients"):
        clipper.clip({name: np.ones(2) for name in left})
    after = clipper.state_dict()
    assert all(np.array_equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("rule", [gc.Moment(3.0, warmup=1), gc.Peak()])
def test_a_memory_is_not_taken_over_by_another_leaf(rule):
    both = {"a": jnp.full(2, 0.01), "b": jnp.ones(2)}
    clip = as_optax(rule)
    _, state = clip.update(both, clip.init(both))
    with pytest.raises(ValueError, match="remembers 2 tensors, but this step has 1"):
        clip.update(both | {"a": None}, state)


@pytest.mark.parametrize(
    "rule", [gc.EMA(warmup=1), gc.Moment(3.0, warmup=1), gc.Skip(gc.EMA())], ids=repr
)
def test_a_saved_memory_is_not_taken_over_by_another_tensor(rule):
    def clipper(*names):
        params = [(name, torch.nn.Parameter(torch.ones(2))) for name in names]
        for _, p in params:
            p.grad = torch.ones(2)
        return Clipper(params, rule, doctor=())

    first, second = clipper("a", "b"), clipper("c", "a")
    first.clip_()
    with pytest.raises(ValueError, match="remembers 'b', which is not among the"):
        second.load_state_dict(first.state_dict())
    # All of them under other names are taken by their order, as before.
    clipper("x.a", "x.b").load_state_dict(first.state_dict())


def test_tensors_of_which_nothing_is_remembered_may_change():
    clipper = gc.Clipper(gc.Norm(lambda step: 1.0, over="tensor"))
    for names in ("ab", "ac", "a", "de"):
        clipper.clip({name: np.ones(2) for name in names})


@dataclass(frozen=True)
class Plain(gc.Rule):
    """A rule of one's own whose limit is a number."""

    limit: float = 1.0

    def update(self, seen, state):
        return self.limit, state


@pytest.mark.parametrize("make", [np.array, torch.tensor, jnp.array])
def test_a_rule_of_ones_own_may_say_a_number(make):
    clipped, _ = gc.clip([make([3.0, 4.0])], Plain())
    np.testing.assert_allclose(np.asarray(clipped[0]), [0.6, 0.8], rtol=1e-6)


def test_parameters_may_be_numbers_in_jax():
    clip = as_optax(gc.Norm(1.0))
    clipped, _ = clip.update({"w": jnp.array(3.0)}, clip.init({"w": 1.0}))
    assert float(clipped["w"]) == pytest.approx(1.0)


def test_a_memory_of_elements_takes_no_sparse_tensor():
    x = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(TypeError, match="is sparse, and here each element"):
        gc.Clipper(gc.Moment(3.0)).clip(x)


def test_a_clipper_under_jit_is_refused_and_loses_no_step(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    clipper = gc.Clipper(gc.Norm(1.0), history=history)
    clipper.clip(jnp.ones(2))
    with pytest.raises(TypeError, match=r"use gradclip\.jax\.as_optax"):
        jax.jit(lambda g: clipper.clip(g)[0])(jnp.ones(2))
    clipper.clip(jnp.ones(2))
    assert history.step.tolist() == [0, 1]


def test_the_state_of_a_chain_is_no_state_of_a_clip():
    with pytest.raises(TypeError, match="hand over the part that is a ClipState"):
        state_dict(gc.Norm(1.0), (1, 2))


@pytest.mark.parametrize(
    "clipper", [gc.Clipper(gc.Norm(10.0)), Clipper([torch.ones(2)], gc.Norm(10.0))]
)
def test_the_rule_of_a_clipper_is_not_exchanged(clipper):
    with pytest.raises(AttributeError):
        clipper.rule = gc.Norm(1.0)
    assert clipper.rule == gc.Norm(10.0)


def test_no_number_of_skips_may_be_too_many():
    assert gc.Clipper(gc.Norm(1.0), max_consecutive_skips=math.inf)


@pytest.mark.parametrize(
    "grads",
    [
        jnp.array([3.0, 4.0], jnp.float8_e4m3fn),
        torch.tensor([3.0, 4.0]).to(torch.float8_e5m2),
    ],
    ids=["jax", "torch"],
)
@pytest.mark.parametrize("rule", [gc.Norm(1.0), gc.Value(1.0)])
def test_floats_of_eight_bits_are_refused_with_what_to_do(grads, rule):
    with pytest.raises(TypeError, match="only stores numbers; clip in float32"):
        gc.clip(grads, rule)


def test_a_parameter_of_eight_bits_leaves_the_others_as_they_were():
    wide = torch.nn.Parameter(torch.zeros(2))
    narrow = torch.nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn))
    for p in (wide, narrow):
        p.grad = torch.tensor([3.0, 4.0]).to(p.dtype)
    with pytest.raises(TypeError, match="only stores numbers"):
        clip_grad_value_([wide, narrow], 1.0)
    assert wide.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("call", [clip_grad_value_, clip_grad_norm_])
def test_integer_gradients_are_refused_before_others_change(call):
    wide, whole = (torch.ones(2, dtype=d) for d in (torch.float32, torch.int64))
    for p in (wide, whole):
        p.grad = p * 5
    with pytest.raises(TypeError, match=r"torch\.int64, in which 0\.4 would be 0"):
        call([wide, whole], 1.0)
    assert wide.grad.tolist() == [5.0, 5.0]


@pytest.mark.parametrize("doctor", [None, False, "rate", ["rat"]])
def test_no_list_of_checks_is_refused(doctor):
    with pytest.raises(ValueError, match="an empty tuple turns all of them off"):
        Clipper([torch.ones(2)], gc.Norm(1.0), doctor=doctor)


def test_batch_norm_mixes_samples():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="batch norm mixes samples"):
        PerSample(model).__enter__()
    model.eval()
    with PerSample(model) as samples:
        samples.backward(model(torch.randn(3, 2)).sum(1), gc.Norm(1.0))


def test_the_norm_of_integers_is_refused_as_by_torch():
    with pytest.raises(TypeError, match="in which 0"):
        get_total_norm([torch.tensor([3, 4])])


def test_torchs_functions_have_a_policy_of_their_own():
    p = torch.ones(2)
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="on_nonfinite=None"):
        clip_grad_norm_(p, 1.0, on_nonfinite=None)
