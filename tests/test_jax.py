"""JAX: pure functions and optax, traced and not, equal to the twins and to optax."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradclip as gc
import gradclip.jax
from gradclip.backends import Jax
from gradclip.jax import as_optax
from table import EVERYWHERE, ROWS, STATELESS
from test_twins import ONE_EACH, golden, params, steps

GROWING = [name for name in ROWS if ROWS[name].make().grows]


def tree(arrays):
    return {f"w{i}": jnp.asarray(x, dtype=float) for i, x in enumerate(arrays)}


def assert_close(got, want, rtol=1e-6, atol=0.0, **more):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, **more)


@pytest.mark.parametrize("name", GROWING)
def test_a_memory_that_grows_is_refused(name):
    with pytest.raises(ValueError, match="give it a window"):
        as_optax(ROWS[name].make())


FOUR_DEVICES = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"


def in_process(code, **environment):
    """Run code in a process of its own, where JAX reads its settings anew."""
    here = Path(__file__).parent
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=here,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


# Each is compiled for some seconds: all of them in `make golden`.
@pytest.mark.parametrize(
    "name", [n for n in STATELESS if EVERYWHERE or n in ONE_EACH or n == "norm-unit"]
)
def test_jit_and_vmap_of_the_pure_function(name):
    rule, weights = ROWS[name].make(), tree(params())
    # The second one has NaN in it.
    many = golden(name)[1:3]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *(tree(step.grads) for step in many))

    def clip(grads):
        return gc.clip(grads, rule, params=weights)

    together, infos = jax.jit(jax.vmap(clip))(batch)
    for i, want in enumerate(many):
        one = jax.tree.map(lambda x, i=i: x[i], together)
        assert_close(one, tree(want.clipped), atol=1e-12)
        assert_close(infos.norm[i], want.norm)


@pytest.mark.parametrize(
    ("dtype", "values", "norm"),
    [
        (jnp.float32, [3.0, 4.0], 5.0),
        (jnp.float32, [1e20] * 4, 2e20),
        (jnp.float32, [1.5e38, 1.5e38], 1.5e38 * 2**0.5),
        (jnp.float32, [3e-30] * 4, 6e-30),
        (jnp.float32, [3e-37, 4e-37], 5e-37),
        (jnp.float32, [1e-30, 1e20], 1e20),
        (jnp.float16, [300.0, 400.0], 500.0),
        (jnp.float16, [6e4] * 4, 1.2e5),
        (jnp.bfloat16, [3.0, 4.0], 5.0),
        (jnp.complex64, [3e20j, 4e20], 5e20),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_finite_gradients_have_a_finite_norm(dtype, values, norm, compiled):
    def clip(grads):
        return gc.clip(grads, gc.Norm(norm / 10))

    grads = jnp.array(values, dtype)
    out, info = (jax.jit(clip) if compiled else clip)(grads)
    half = jnp.finfo(dtype).eps > 1e-4
    exact = np.linalg.norm(np.asarray(grads, complex))
    np.testing.assert_allclose(info.norm, exact, rtol=1e-6)
    after = np.linalg.norm(np.asarray(out, complex))
    limit = float(info.limit)
    assert limit * (1 - (0.01 if half else 1e-6)) <= after <= limit * (1 + 1e-12)
    assert out.dtype == dtype


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, float("inf")])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e37])
def test_norms_of_any_order_and_size(p, size):
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32) * size
    _, info = gc.clip(jnp.asarray(x, jnp.float32), gc.Norm(1.0, p=p))
    exact = np.linalg.norm(x.astype(np.float64).ravel(), ord=p)
    np.testing.assert_allclose(float(info.norm), exact, rtol=1e-6)


def test_nothing_is_clipped_below_the_limit_to_the_bit():
    x = jnp.asarray(np.random.default_rng(0).normal(size=100), jnp.float32)
    out, _ = jax.jit(lambda g: gc.clip(g, gc.Norm(1e6)))(x)
    assert np.array_equal(out, x)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_policies_without_a_branch(value):
    grads = {"a": jnp.array([3.0, value]), "b": jnp.array([4.0])}

    def clip(policy):
        run = jax.jit(lambda g: gc.clip(g, gc.Norm(1.0), on_nonfinite=policy))
        out, info = run(grads)
        assert not info.finite or policy == "zero"
        return np.concatenate([out["a"], out["b"]])

    assert clip("skip").tolist() == [0, 0, 0]
    np.testing.assert_allclose(clip("zero"), [0.6, 0, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(clip("ignore"), [3, value, 4])


def test_raise_reads_gradients_or_says_that_it_cannot():
    bad = {"a": jnp.array([1.0, np.nan])}

    def clip(grads):
        return gc.clip(grads, gc.Norm(1.0), on_nonfinite="raise")[0]

    with pytest.raises(gc.NonFiniteError, match=r"\['a'\] \(1 of 2 elements\)"):
        clip(bad)
    assert_close(clip({"a": jnp.array([0.6, 0.8])}), {"a": jnp.array([0.6, 0.8])})
    with pytest.raises(TypeError, match="jit, vmap and scan cannot"):
        jax.jit(clip)(bad)
    with pytest.raises(ValueError, match="which compiled code cannot"):
        as_optax(gc.Norm(1.0), on_nonfinite="raise")


def test_a_clipper_under_jit_names_the_function_that_can():
    clipper = gc.Clipper(gc.ZScore())
    with pytest.raises(TypeError, match="as_optax"):
        jax.jit(lambda g: clipper.clip(g)[0])(jnp.ones(3))
    clipper.clip(jnp.ones(3))


ORDINARY = [
    tree(g) for g in [[np.full((3, 4), 0.2), np.arange(5.0)], [np.ones((2, 2)) * 9]]
]


@pytest.mark.parametrize("grads", ORDINARY)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (gc.Norm(1.0), optax.clip_by_global_norm(1.0)),
        (gc.Norm(1e3), optax.clip_by_global_norm(1e3)),
        (gc.Value(0.5), optax.clip(0.5)),
        (gc.Relative(0.1, eps=1e-3, axis=-1), optax.adaptive_grad_clip(0.1)),
    ],
)
def test_equal_to_optax(ours, theirs, grads):
    weights = jax.tree.map(lambda x: jnp.cos(1 + x), grads)
    for transform in (as_optax(ours), as_optax(gc.chain(ours, gc.Norm(1e9)))):
        a, _ = transform.update(grads, transform.init(weights), weights)
        b, _ = theirs.update(grads, theirs.init(weights), weights)
        assert_close(a, b, rtol=1e-6)


@pytest.mark.parametrize("policy", ["skip", "ignore"])
def test_ordinary_gradients_cost_no_more_than_with_optax(policy, monkeypatch):
    # XLA counts both branches; the other one is for gradients whose squares overflow.
    monkeypatch.setattr(Jax, "root", lambda self, squares, safely: jnp.sqrt(squares))
    grads = [jnp.ones((256, 256)), jnp.ones(256), jnp.ones((64, 3, 3))]

    def cost(transform):
        lowered = jax.jit(transform.update).lower(grads, transform.init(grads), grads)
        return lowered.compile().cost_analysis()

    ours = cost(as_optax(gc.Norm(1.0), on_nonfinite=policy))
    theirs = cost(optax.clip_by_global_norm(1.0))
    for what in ("flops", "bytes accessed"):
        assert ours[what] <= 1.01 * theirs[what], what


def test_what_optax_does_otherwise():
    for grads in (
        jnp.array([300, 400], jnp.float16),
        jnp.array([1e20, 1e20], jnp.float32),
    ):
        theirs = optax.clip_by_global_norm(1.0)
        lost, _ = theirs.update(grads, theirs.init(grads))
        assert not np.any(lost)
        ours, _ = as_optax(gc.Norm(1.0)).update(
            grads, as_optax(gc.Norm(1.0)).init(grads)
        )
        assert 0.99 < np.linalg.norm(np.asarray(ours, float)) <= 1


def loss(weights, x):
    return jnp.sum(jnp.square(x @ weights["w"] + weights["b"]))


WEIGHTS = {"w": jnp.full((3, 2), 0.5, jnp.float32), "b": jnp.zeros(2)}
BATCHES = jnp.asarray(np.random.default_rng(0).normal(size=(12, 4, 3)))


def train(optimizer, steps=12, weights=None):
    weights = WEIGHTS if weights is None else weights
    state = optimizer.init(weights)

    @jax.jit
    def step(weights, state, x):
        grads = jax.grad(loss)(weights, x)
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    for x in BATCHES[:steps]:
        weights, state = step(weights, state, x)
    assert step._cache_size() == 1
    return weights, state


CLIP, RULE = optax.clip_by_global_norm(0.5), gc.Norm(0.5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda clip: optax.chain(clip, optax.adam(0.1)),
        lambda clip: optax.chain(
            optax.masked(clip, {"w": True, "b": False}), optax.sgd(0.1)
        ),
        lambda clip: optax.multi_transform(
            {"a": optax.chain(clip, optax.sgd(0.1)), "z": optax.set_to_zero()},
            {"w": "a", "b": "z"},
        ),
        lambda clip: optax.partition(
            {"a": optax.chain(clip, optax.adam(0.1)), "z": optax.sgd(0.1)},
            {"w": "a", "b": "z"},
        ),
        lambda clip: optax.MultiSteps(optax.chain(clip, optax.sgd(0.1)), 3),
        lambda clip: optax.apply_if_finite(optax.chain(clip, optax.adam(0.1)), 3),
    ],
    ids=[
        *("chain", "masked", "multi_transform", "partition"),
        *("MultiSteps", "apply_if_finite"),
    ],
)
def test_optax_wrappers(wrap):
    ours, state = train(wrap(as_optax(RULE)))
    theirs, _ = train(wrap(CLIP))
    assert_close(ours, theirs, rtol=1e-5)
    assert float(optax.tree.get(state, "norm")) > 0


@pytest.mark.parametrize("name", ["ZScore", "EMA", "Percentile"])
@pytest.mark.parametrize("transform", ["chain", "masked", "MultiSteps"])
def test_rules_with_memory_inside_wrappers(name, transform):
    wrap = {
        "chain": lambda clip: optax.chain(clip, optax.sgd(0.01)),
        "masked": lambda clip: optax.chain(
            optax.masked(clip, {"w": True, "b": False}), optax.sgd(0.01)
        ),
        "MultiSteps": lambda clip: optax.MultiSteps(
            optax.chain(clip, optax.sgd(0.01)), 2
        ),
    }[transform]
    _, state = train(wrap(as_optax(getattr(gc, name)())))
    made = 6 if transform == "MultiSteps" else 12
    assert int(optax.tree.get(state, "step")) == made


def test_inject_hyperparams():
    @optax.inject_hyperparams
    def make(limit):
        return optax.chain(as_optax(gc.Norm(limit)), optax.sgd(0.1))

    ours, state = train(make(limit=0.5))
    theirs, _ = train(optax.chain(CLIP, optax.sgd(0.1)))
    assert_close(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, "limit", filtering=is_info), 0.5)
    schedule = optax.linear_schedule(1.0, 0.1, 9)
    _, state = train(make(limit=schedule))
    np.testing.assert_allclose(
        optax.tree.get(state, "limit", filtering=is_info), schedule(11)
    )


def is_info(path, value):
    return "info" in jax.tree_util.keystr(tuple(path)) or "Info" in str(path)


def test_optax_schedules_are_limits():
    schedule = optax.cosine_decay_schedule(1.0, 10)
    transform = as_optax(gc.Norm(schedule))
    state = transform.init(WEIGHTS)
    for step in range(4):
        _, state = transform.update(WEIGHTS, state)
        np.testing.assert_allclose(state.info.limit, schedule(step), rtol=1e-6)


@pytest.mark.parametrize("rule", [gc.Percentile(), gc.Deviation(over="tensor")])
def test_an_empty_window_is_not_stacked_place_by_place(rule):
    # One operation with a thousand inputs took `init` a second to compile.
    made = jax.make_jaxpr(as_optax(rule).init)(tree(params()))
    assert all(len(step.invars) < 10 for step in made.eqns)
    (memory,) = as_optax(rule).init(tree(params())).memory
    assert len(memory["norms"]) == rule.window
    assert jnp.all(memory["norms"] == jnp.inf)


@pytest.mark.parametrize("name", ["zscore", "ema-limited-tensor", "percentile-window"])
def test_scan_equals_a_loop_and_buffers_may_be_donated(name):
    transform = as_optax(ROWS[name].make())
    weights = tree(params())
    run = [tree(g) for g in list(steps())[:20]]

    def body(state, grads):
        clipped, state = transform.update(grads, state, weights)
        return state, clipped

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *run)
    last, scanned = jax.lax.scan(body, transform.init(weights), stacked)
    donating = jax.jit(transform.update, donate_argnums=1)
    state = jax.tree.map(jnp.copy, transform.init(weights))
    for i, grads in enumerate(run):
        clipped, state = donating(grads, state, weights)
        assert_close(clipped, jax.tree.map(lambda x, i=i: x[i], scanned), atol=1e-12)
    assert_close(state.memory, last.memory)


def test_many_models_at_once():
    transform = as_optax(gc.ZScore(warmup=2))
    update, many = jax.jit(transform.update), jax.jit(jax.vmap(transform.update))
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3, 4)))
    states = jax.vmap(transform.init)(grads[0])
    alone = [transform.init(x) for x in grads[0]]
    for x in grads:
        out, states = many(x, states)
        for i in range(3):
            one, alone[i] = update(x[i], alone[i])
            assert_close(out[i], one)


def test_a_state_of_another_rule_is_refused():
    state = as_optax(gc.EMA()).init(jnp.zeros(2))
    saved = gradclip.jax.state_dict(gc.EMA(), state)
    other = as_optax(gc.ZScore()).init(jnp.zeros(2))
    with pytest.raises(ValueError, match="belongs to EMA"):
        gradclip.jax.load_state_dict(gc.ZScore(), other, saved)


@pytest.mark.parametrize(
    ("had", "has", "told"),
    [
        (gc.EMA(), gc.ZScore(), "should not have 'ema' of ZScore"),
        (gc.ZScore(), gc.Norm(1.0), "should not have 'count' of Norm"),
        (gc.Norm(1.0), gc.Peak(), "lacks 'count.0' of Peak"),
        (gc.Norm(1.0), gc.chain(gc.Norm(1.0), gc.EMA()), "memory of 1 stage, and"),
    ],
)
def test_a_step_with_the_state_of_another_rule_is_refused(had, has, told):
    state = as_optax(had).init(jnp.zeros(2))
    with pytest.raises(ValueError, match=told):
        jax.jit(as_optax(has).update)(jnp.ones(2), state)


def test_steps_are_counted_up_to_the_largest_number_and_no_further():
    transform = as_optax(gc.Norm(1.0))
    most = np.iinfo(np.int32).max
    state = transform.init(jnp.zeros(2))._replace(step=jnp.int32(most - 1))
    for _ in range(2):
        _, state = transform.update(jnp.ones(2), state)
    assert int(state.step) == most


def test_a_dropped_step_is_zeros_and_counted():
    transform = as_optax(gc.Skip(gc.Norm(1.0)))
    state = transform.init(jnp.zeros(2))
    for grads, kept in (([0.3, 0.4], True), ([3.0, 4.0], False), ([np.nan, 0], False)):
        out, state = jax.jit(transform.update)(jnp.array(grads), state)
        assert bool(state.info.kept) == kept
        assert np.any(out) == kept
    assert int(state.info.skipped) == 2


def test_missing_parameters_are_asked_for():
    transform = as_optax(gc.AGC())
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)"):
        transform.update(WEIGHTS, transform.init(WEIGHTS))
    with pytest.raises(ValueError, match="whole rows"):
        as_optax(gc.AGC(), axis_name="data")


SHARDED = """
import functools, jax, jax.numpy as jnp, numpy as np
import gradclip as gc
from gradclip.jax import as_optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(jax.devices(), ("d",))
rng = np.random.default_rng(0)
whole = {"cut": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
         "same": jnp.asarray(rng.normal(size=5), jnp.float32)}
specs = {"cut": P("d"), "same": P()}
places = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
grads = jax.device_put(whole, places)
broken = whole | {"cut": whole["cut"].at[7, 1].set(jnp.nan)}

def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-6)

def facts(grads, state):
    return grads, state.info.norm, state.info.clipped, state.memory

rules = [gc.Norm(1.0), gc.Norm(1.0, p=3.0), gc.Norm(0.5, over="tensor"),
         gc.chain(gc.Value(0.5), gc.ZScore(warmup=1))]
for rule in rules:
    plain, cut = as_optax(rule), as_optax(rule, axis_name="d")
    start, alone = plain.init(whole), jax.jit(plain.update)
    step = jax.jit(jax.shard_map(
        cut.update, mesh=mesh, in_specs=(specs, P()), out_specs=(specs, P())))
    each = jax.pmap(cut.update, axis_name="d", in_axes=(0, None))
    for given in (whole, broken):
        want, ended = alone(given, start)
        got, state = alone(jax.device_put(given, places), start)
        close(facts(got, state), facts(want, ended))
        got, state = step(given, start)
        close(facts(got, state), facts(want, ended))

        pieces = {"cut": given["cut"].reshape(4, 2, 3)}
        one = {"cut": given["cut"]}
        want, ended = alone(one, plain.init(one))
        got, state = each(pieces, plain.init(one))
        close(got["cut"].reshape(8, 3), want["cut"])
        for x in np.asarray(state.info.norm):
            close(x, ended.info.norm)

grid = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
specs = {"cut": P("a", None), "same": P(), "both": P("a", "b")}
whole = whole | {"both": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)}
for rule in (gc.Norm(1.0), gc.Norm(0.5, over="tensor"), gc.Band(0.1, 9.0)):
    plain, cut = as_optax(rule), as_optax(rule, axis_name=("a", "b"))
    start = plain.init(whole)
    step = jax.jit(jax.shard_map(
        cut.update, mesh=grid, in_specs=(specs, P()), out_specs=(specs, P())))
    close(facts(*step(whole, start)), facts(*jax.jit(plain.update)(whole, start)))
print(len(jax.devices()), "devices,", len(rules), "rules")
"""


def test_sharded_gradients_equal_whole_ones():
    result = in_process(SHARDED, XLA_FLAGS=FOUR_DEVICES)
    assert result.stdout.strip() == "4 devices, 4 rules", result.stderr[-3000:]


EXPLICIT = """
import jax, jax.numpy as jnp, numpy as np
import gradclip as gc
from gradclip.jax import as_optax
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((4,), ("d",))
jax.set_mesh(mesh)
rng = np.random.default_rng(0)
specs = {"rows": P("d", None), "columns": P(None, "d"), "bias": P("d"), "one": P()}
shapes = {"rows": (8, 4), "columns": (4, 8), "bias": (4,), "one": ()}
rules = [gc.Norm(1.0), gc.Norm(1.0, p=3.0), gc.Norm(0.5, over="tensor"), gc.Value(0.5),
         gc.Normalize(), gc.ZScore(), gc.EMA(), gc.Norm(0.5, over="unit"), gc.AGC(),
         gc.Norm(0.5, over="unit", axis=-1), gc.RMS(0.1)]
for size in (1.0, 1e30):
    whole = {name: np.asarray(size * rng.normal(size=shape), np.float32)
             for name, shape in shapes.items()}
    grads = {name: jax.device_put(jnp.asarray(x), NamedSharding(mesh, specs[name]))
             for name, x in whole.items()}
    # Where squares overflow, norms go another way; rules see only what comes of it.
    for rule in rules if size == 1 else (gc.Norm(1.0), gc.Norm(0.5, over="unit")):
        update = as_optax(rule)
        got, _ = jax.jit(update.update)(grads, update.init(grads), grads)
        want, _ = gc.Clipper(rule).clip(whole, params=whole)
        for name in whole:
            np.testing.assert_allclose(np.asarray(got[name]), want[name], rtol=1e-5)
            assert got[name].sharding.spec == specs[name], (rule, name)
print(len(jax.devices()), "devices,", len(rules), "rules")
"""


def test_arrays_on_an_explicit_mesh_stay_where_they_lie():
    result = in_process(EXPLICIT, XLA_FLAGS=FOUR_DEVICES)
    assert result.stdout.strip() == "4 devices, 11 rules", result.stderr[-3000:]


BY_NAME = gc.by_name({"a": gc.Norm(0.5), "*": gc.Norm(1.0)})


@pytest.mark.parametrize(
    "rule",
    [
        gc.Norm(1.0),
        BY_NAME,
        gc.RMS(0.1),
        gc.chain(gc.Norm(1.0, over="tensor"), gc.Value(1.0)),
    ],
    ids=repr,
)
def test_results_are_bound_to_no_device(rule):
    # Who makes the first step without jit would not get its state onto a mesh later.
    grads = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    transform = as_optax(rule)
    clipped, state = transform.update(grads, transform.init(grads))
    made = jax.tree.leaves((clipped, state, *gc.clip(grads, rule)))
    assert not any(x.committed for x in made if isinstance(x, jax.Array))


def test_parameters_of_nnx_are_called_as_anybody_would():
    from flax import nnx

    grads = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    grads = jax.tree.map(jnp.ones_like, grads)
    transform = as_optax(gc.by_name({"*bias": gc.Norm(0.1), "*kernel": None}))
    clipped, _ = transform.update(grads, transform.init(grads))
    assert float(jnp.linalg.norm(clipped["bias"].get_value())) == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [jax.random.key(0), np.zeros(2, jax.dtypes.float0)])
def test_what_has_no_norm_is_named(bad):
    with pytest.raises(TypeError, match=r"gradients\['k'\] is .* there is no norm"):
        as_optax(gc.Norm(1.0)).update({"k": bad}, as_optax(gc.Norm(1.0)).init({}))
    if isinstance(bad, jax.Array):
        with pytest.raises(TypeError, match=r"gradients\['k'\] is .* there is no norm"):
            gc.clip({"a": jnp.ones(2), "k": bad}, gc.Norm(1.0))


def test_the_flax_example():
    path = Path(__file__).parent.parent / "examples" / "flax_nnx.py"
    code = f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')"
    result = in_process(code)
    clipped = [line.rpartition(" ")[2] for line in result.stdout.splitlines()]
    assert clipped == ["False", "False", "True", "False"], result.stderr[-3000:]


@pytest.mark.parametrize(
    "rule",
    [
        gc.EMA(warmup_limit=1.0),
        gc.chain(gc.Norm(1.0), gc.EMA()),
        gc.by_name({"*": gc.EMA(warmup_limit=1.0)}),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_a_mask_may_leave_no_gradients(rule, jit):
    """A crash in the reduction over no norms."""
    tx = gradclip.jax.as_optax(rule)
    state = tx.init({})
    update = jax.jit(tx.update) if jit else tx.update
    for _ in range(2):
        updates, state = update({}, state, {})
    assert updates == {}
    assert int(state.step) == 2


@pytest.mark.parametrize("size", [1e-30, 1e-19, 1e19, 1e30])
def test_stabilize_takes_norms_of_any_size_under_jit(size):
    """Left to itself, XLA makes two of its divisions one, and their product is lost."""
    transform, clipper = (
        gradclip.jax.as_optax(gc.Stabilize()),
        gc.Clipper(gc.Stabilize()),
    )
    state, update = transform.init(jnp.zeros(2)), jax.jit(transform.update)
    for k in range(1, 4):
        grads = np.float32([3 * k * size, 4 * size])
        got, state = update(jnp.asarray(grads), state)
        want, _ = clipper.clip(grads.astype(float))
    np.testing.assert_allclose(got, want, rtol=1e-6)
