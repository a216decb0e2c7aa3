"""What would have given wrong numbers is refused, before anything is changed."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gradclip as gc
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


@pytest.mark.parametrize("grads", [np.zeros(3), [np.zeros(1), np.zeros(1)]])
def test_other_gradients_than_those_carried_are_refused(grads):
    clipper = gc.UClip(gc.Value(2.0))
    clipper.clip(np.array([5.0]))
    with pytest.raises(ValueError, match="UClip carries 1 arrays of shapes"):
        clipper.clip(grads)
    assert float(clipper.clip(np.zeros(1))[0][0]) == 2.0
