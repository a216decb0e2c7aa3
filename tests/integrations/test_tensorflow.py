"""TensorFlow's tensors in `gc.clip` and `gc.Clipper`, eager and traced."""

import numpy as np
import pytest
import tensorflow as tf

import gradclip as gc
from table import ROWS


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_every_rule_does_what_it_does_in_numpy(name):
    rule, draw = ROWS[name].make(), np.random.default_rng(0)
    here, there = gc.Clipper(rule), gc.Clipper(rule)
    shapes = [(3, 4), (5,)]
    weights = [np.float32(draw.normal(size=s)) for s in shapes]
    tensors = [tf.constant(w) for w in weights]
    for step in range(12):
        size = 8 if step in (7, 11) else 1
        grads = [np.float32(size * draw.normal(size=s)) for s in shapes]
        clipped, info = here.clip([tf.constant(g) for g in grads], params=tensors)
        expected, told = there.clip(grads, params=weights)
        assert_close(clipped, expected)
        assert info.to_dict() == pytest.approx(told.to_dict(), rel=1e-5)
    # What one has saved, the other goes on from.
    there.load_state_dict(here.state_dict())


def test_a_loop_with_a_tape(tmp_path):
    v = tf.Variable([3.0, 4.0])
    with gc.History(tmp_path / "run.jsonl") as history:
        clipper = gc.Clipper(gc.Norm(1.0), history=history)
        for _ in range(3):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(v * v)
            (grad,), _ = clipper.clip(tape.gradient(loss, [v]))
            v.assign_sub(grad)
    assert history.norm.tolist() == pytest.approx([10.0, 8.0, 6.0])


def test_a_traced_function():
    @tf.function
    def clipped(grads):
        return gc.clip(grads, gc.Norm(1.0))[0]

    grads = {"a": tf.constant([3.0, 0.0]), "b": tf.constant([[0.0, 4.0]])}
    assert_close(clipped(grads).values(), [[0.6, 0.0], [[0.0, 0.8]]])
    bad = {"a": tf.constant([np.nan, 0.0]), "b": tf.constant([[0.0, 4.0]])}
    assert_close(clipped(bad).values(), [[0.0, 0.0], [[0.0, 0.0]]])
