"""Keras 3: real fits on torch and, each in a process of its own, JAX and TensorFlow."""

import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from common import BATCH, RATE, RULE, STEPS, Data, Net, plain_norms

import gradclip as gc
from gradclip.keras import Clipped
from table import ROWS

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    halves = [tf.config.LogicalDeviceConfiguration() for _ in range(2)]
    tf.config.set_logical_device_configuration(cpu, halves)

    def test_replicas_are_refused():
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            model = compiled()
        with pytest.raises(ValueError, match="of its 2 replicas after a clip"):
            model.fit(np.ones((4, 6)), np.ones((4, 1)), verbose=0)


def network():
    net = Net().body
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(1)]
    )
    weights = [x.detach().numpy().copy() for x in net.parameters()]
    model.set_weights([w.T if w.ndim == 2 else w for w in weights])
    return model


def sgd():
    # Keras puts the rate into its velocity; without momentum it is torch's SGD.
    return keras.optimizers.SGD(RATE, momentum=0.5)


def fit(model, start=0, stop=STEPS):
    seen = []

    def note(batch, logs):
        if keras.backend.backend() == "jax":
            # JAX keeps the variables to itself until an epoch is over.
            model.jax_state_sync()
        seen.append(model.optimizer.metrics())

    data, rows = Data(), slice(start * BATCH, stop * BATCH)
    model.fit(
        data.x[rows].numpy(),
        data.y[rows].numpy(),
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=note)],
    )
    return np.array([[x["grad_norm"], x["grad_limit"]] for x in seen])


def compiled(rule=RULE, **options):
    model = network()
    model.compile(Clipped(sgd(), rule, **options), "mse")
    return model


def assert_same(found, expected):
    norm, limit = expected
    worst = np.abs(found[:, 0] / norm[-len(found) :] - 1).max()
    print(f"{len(found)} steps, norms agree to {worst:.1e}")
    np.testing.assert_allclose(found[:, 0], norm[-len(found) :], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], limit[-len(found) :], rtol=1e-5)


@pytest.mark.parametrize("rule", [RULE, gc.Percentile(window=8)], ids=repr)
def test_it_equals_plain_torch(rule, tmp_path):
    assert_same(fit(compiled(rule)), plain_norms(tmp_path / "plain.jsonl", rule))


# JAX has its own tests for all rules, and is slow where nothing is compiled.
NAMES = [name for name, row in ROWS.items() if not row.make().grows]
if keras.backend.backend() == "jax":
    NAMES = ["percentile-window", "moment-tensor"]


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_does_what_it_does_in_numpy(name):
    rule, draw = ROWS[name].make(), np.random.default_rng(0)
    optimizer, clipper = Clipped(keras.optimizers.SGD(1.0), rule), gc.Clipper(rule)
    shapes = [(3, 4), (5,)]
    variables = [keras.Variable(draw.normal(size=s), dtype="float32") for s in shapes]
    for step in range(12):
        size = 8 if step in (7, 11) else 1
        grads = [np.float32(size * draw.normal(size=s)) for s in shapes]
        before = [keras.ops.convert_to_numpy(v).copy() for v in variables]
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in grads], variables)
        expected, info = clipper.clip(grads, params=before)
        for v, old, clipped in zip(variables, before, expected, strict=True):
            moved = old - keras.ops.convert_to_numpy(v)
            np.testing.assert_allclose(moved, clipped, rtol=1e-4, atol=1e-5)
        numbers = optimizer.metrics()
        assert numbers["grad_norm"] == pytest.approx(info.to_dict()["norm"], rel=1e-5)
        assert numbers["grad_limit"] == pytest.approx(info.to_dict()["limit"], rel=1e-5)


def test_singular_values():
    draw, rule = np.random.default_rng(0), gc.Norm(0.5, over="singular")
    grad = np.float32(draw.normal(size=(4, 3)))
    v = keras.Variable(np.zeros((4, 3)), dtype="float32")
    tensor = keras.ops.convert_to_tensor(grad)
    Clipped(keras.optimizers.SGD(1.0), rule).apply([tensor], [v])
    expected = -gc.clip(grad, rule)[0]
    np.testing.assert_allclose(keras.ops.convert_to_numpy(v), expected, atol=1e-6)


def test_a_missing_gradient_keeps_its_place():
    rule = gc.by_name({"*": gc.EMA(warmup=2)})
    optimizer, clipper = Clipped(keras.optimizers.SGD(1.0), rule), gc.Clipper(rule)
    variables = [keras.Variable(np.zeros(3), dtype="float32") for _ in range(2)]
    for size in (1.0, 1.0, 2.0, 9.0):
        grads = [np.full(3, size, np.float32), np.zeros(3, np.float32)]
        optimizer.apply([keras.ops.convert_to_tensor(grads[0]), None], variables)
        _, info = clipper.clip(grads)
        numbers = optimizer.metrics()
        assert numbers["grad_norm"] == pytest.approx(info.to_dict()["norm"])
    assert numbers["clip_rate"] == 0.5
    assert not keras.ops.convert_to_numpy(variables[1]).any()
    # Those of the other variable alone, as where two losses take turns.
    optimizer.apply([keras.ops.ones((3,))], variables[1:])
    assert keras.ops.convert_to_numpy(variables[1]).tolist() == [-1.0] * 3


def test_a_gradient_that_is_a_new_value_is_left_alone():
    scale = keras.Variable(np.zeros(3), dtype="float32")
    scale.overwrite_with_gradient = True
    weight = keras.Variable(np.zeros(3), dtype="float32")
    optimizer = Clipped(keras.optimizers.SGD(1.0), gc.Norm(1.0))
    ones = keras.ops.ones((3,))
    optimizer.apply([7 * ones, 9 * ones], [scale, weight])
    assert keras.ops.convert_to_numpy(scale).tolist() == [7.0] * 3
    assert np.linalg.norm(keras.ops.convert_to_numpy(weight)) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision(kind):
    v = keras.Variable(np.zeros(2), dtype=kind)
    optimizer = Clipped(keras.optimizers.SGD(1.0), gc.Value(1.001))
    for _ in range(2):
        optimizer.apply([keras.ops.convert_to_tensor([3.0, 0.5], kind)], [v])
    # The limit is rounded to the type of the gradient, and not up.
    moved = keras.ops.convert_to_numpy(keras.ops.cast(v, "float32"))
    assert moved == pytest.approx([-2.0, -1.0], rel=0.01)
    assert abs(moved[0]) <= 2.002


def test_a_schedule_of_keras():
    limit = keras.optimizers.schedules.PolynomialDecay(2.0, STEPS, 1.0)
    found = fit(compiled(gc.Norm(limit)), stop=20)
    np.testing.assert_allclose(found[:, 1], 2 - np.arange(20) / STEPS, rtol=1e-6)


def test_groups_are_saved_by_the_paths_of_variables(tmp_path):
    rule = gc.by_name({"*/kernel": gc.ZScore(z=1.0, warmup=3), "*": None})
    whole, model = compiled(rule), compiled(rule)
    expected = fit(whole, stop=60)
    fit(model, stop=37)
    model.save(tmp_path / "half.keras")
    again = keras.saving.load_model(tmp_path / "half.keras")
    assert again.optimizer.rule == rule
    np.testing.assert_allclose(fit(again, 37, 60), expected[37:], rtol=1e-6)


def test_a_schedule_is_trained_with_but_not_loaded(tmp_path):
    model = compiled(gc.Norm(lambda step: 1.0 + 0.0 * step))
    fit(model, stop=3)
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="a schedule has no text"):
        keras.saving.load_model(tmp_path / "model.keras")
    keras.saving.load_model(tmp_path / "model.keras", compile=False)


def test_the_gradient_of_an_embedding():
    layers = [keras.layers.Embedding(6, 3), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((2,), dtype="int32"), *layers])
    model.compile(Clipped(keras.optimizers.SGD(1.0), gc.Norm(0.01)), "mse")
    before = model.get_weights()[0].copy()
    model.train_on_batch(np.array([[0, 1], [1, 5]]), np.ones((2, 6)))
    moved = model.get_weights()[0] - before
    assert model.optimizer.metrics()["grad_norm"] > 0.1
    assert np.linalg.norm(moved) == pytest.approx(0.01, rel=1e-4)
    assert np.flatnonzero(np.abs(moved).sum(1)).tolist() == [0, 1, 5]


@pytest.mark.parametrize(
    "rule", [RULE, gc.EMA(warmup=5), gc.Percentile(window=8)], ids=repr
)
def test_a_saved_model_goes_on(rule, tmp_path):
    whole = compiled(rule)
    expected = fit(whole)
    model = compiled(rule)
    fit(model, stop=37)
    model.save(tmp_path / "half.keras")
    again = keras.saving.load_model(tmp_path / "half.keras")
    assert again.optimizer.rule == rule
    np.testing.assert_allclose(fit(again, start=37), expected[37:], rtol=1e-6)
    assert again.optimizer.metrics() == whole.optimizer.metrics()


def test_the_config_makes_an_equal_optimizer():
    optimizer = Clipped(sgd(), gc.chain(gc.Value(1.0), gc.Norm(2.0)), "zero")
    config = keras.saving.serialize_keras_object(optimizer)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == optimizer.get_config()
    assert again.rule == optimizer.rule


def values(model):
    """Everything but what is only shown: the counts, the latest norm and limit."""
    kept = model.optimizer.memory
    shown = {id(v) for v in (kept.step, kept.skipped, kept.norm, kept.limit)}
    every = (*model.weights, *model.optimizer.variables)
    return [keras.ops.convert_to_numpy(v) for v in every if id(v) not in shown]


def test_a_step_that_is_not_finite_changes_nothing():
    model = compiled()
    fit(model, stop=20)
    before = [x.copy() for x in values(model)]
    data = Data().x[:BATCH].numpy() * np.nan
    model.train_on_batch(data, data[:, :1])
    assert int(model.optimizer.memory.skipped) == 1
    for a, b in zip(values(model), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_belongs_inside_of_loss_scaling():
    model = network()
    scaled = keras.optimizers.LossScaleOptimizer(Clipped(sgd(), gc.Norm(1.0)), 64.0)
    model.compile(scaled, "mse")
    data = Data()
    model.fit(data.x.numpy(), data.y.numpy(), batch_size=BATCH, verbose=0)
    assert 0 < scaled.inner_optimizer.metrics()["grad_norm"] < 1e3
    with pytest.raises(ValueError, match="unscaled before a clip"):
        Clipped(scaled, gc.Norm(1.0))


@pytest.mark.parametrize(
    "options",
    [{"clipnorm": 1.0}, {"global_clipnorm": 1.0}, {"gradient_accumulation_steps": 2}],
    ids=str,
)
def test_what_would_clip_twice_is_refused(options):
    message = re.escape(f"the inner optimizer has {next(iter(options))} set")
    with pytest.raises(ValueError, match=message):
        Clipped(keras.optimizers.SGD(0.1, **options), gc.Norm(1.0))


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras has none yet"
)
@pytest.mark.parametrize("by_function", [False, True])
def test_several_optimizers_in_one(by_function):
    variable = keras.Variable(np.zeros(2), dtype="float32")
    gradient = [keras.ops.convert_to_tensor([3.0, 4.0])]

    def several(**options):
        one = keras.optimizers.SGD(1.0, **options)
        chosen = (lambda _: one) if by_function else keras.optimizers.OptimizerMap(one)
        return keras.optimizers.MultiOptimizer(chosen)

    with pytest.raises(ValueError, match="the inner optimizer has global_clipnorm"):
        Clipped(several(global_clipnorm=0.1), gc.Norm(1.0)).apply(gradient, [variable])
    Clipped(several(), gc.Norm(1.0)).apply(gradient, [variable])
    moved = keras.ops.convert_to_numpy(variable)
    np.testing.assert_allclose(moved, [-0.6, -0.8], rtol=1e-6)


def test_what_is_excluded_from_decay_does_not_decay():
    decayed = []
    for clipped in (False, True):
        bias, kernel = (
            keras.Variable(np.ones(2), dtype="float32", name=name)
            for name in ("bias", "kernel")
        )
        optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
        if clipped:
            optimizer = Clipped(optimizer, gc.Norm(1.0))
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        optimizer.apply([keras.ops.zeros((2,))] * 2, [bias, kernel])
        decayed.append([keras.ops.convert_to_numpy(v) for v in (bias, kernel)])
    np.testing.assert_array_equal(decayed[0][0], [1, 1])
    assert np.all(decayed[0][1] < 1)
    np.testing.assert_array_equal(decayed[1], decayed[0])


def test_variables_of_another_model_are_refused_before_anything_is_counted():
    first, other = (
        keras.Variable(np.zeros(2), dtype="float32", name=name) for name in ("a", "b")
    )
    optimizer = Clipped(keras.optimizers.SGD(1.0), gc.Norm(1.0))
    optimizer.apply([keras.ops.ones((2,))], [first])
    with pytest.raises(ValueError, match=f"for other variables than {other.path}; "):
        optimizer.apply([keras.ops.ones((2,))], [other])
    assert int(optimizer.memory.step) == 1


def test_an_optimizer_is_taken_by_its_name_and_nothing_else_is():
    assert isinstance(Clipped("adam", RULE).inner_optimizer, keras.optimizers.Adam)
    with pytest.raises(ValueError, match="Could not interpret optimizer"):
        Clipped(keras.optimizers.Adam, RULE)


def test_an_optimizer_that_is_wrapped_already_is_refused():
    with pytest.raises(ValueError, match="clips too; use one Clipped, with chain"):
        Clipped(Clipped(sgd(), RULE), RULE)


def test_what_compiled_code_cannot_do_is_refused():
    with pytest.raises(ValueError, match="give it a window"):
        Clipped(sgd(), gc.Percentile(window=None))
    with pytest.raises(ValueError, match="which compiled code cannot"):
        Clipped(sgd(), gc.Norm(1.0), on_nonfinite="raise")


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="this is the process")
@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_the_same_on_another_backend(backend):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "default", Path(__file__)],
        env={**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
