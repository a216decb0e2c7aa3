"""Bad input is refused before anything is changed, with the value and the remedy."""

import math

import numpy as np
import pytest
import torch

import gradclip as gc
from gradclip.torch import (
    Clipper,
    attach,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)

RULES = {
    "limit=-1.0.*above 0": lambda: gc.Norm(-1.0),
    "limit=0.*above 0": lambda: gc.Norm(0),
    "limit=nan.*above 0": lambda: gc.Norm(math.nan),
    "limit=array.*above 0": lambda: gc.Norm(np.array(-2.0)),
    "limit=tensor.*above 0": lambda: gc.Norm(torch.tensor(-2.0)),
    r"one number.*\(3,\)": lambda: gc.Norm(np.ones(3)),
    "Value.*limit=-0.5": lambda: gc.Value(-0.5),
    "over='layer'.*'all', 'tensor', 'unit', 'element'": lambda: gc.Norm(
        1.0, over="layer"
    ),
    "over='unit'.*one of 'all', 'tensor'": lambda: gc.Percentile(over="unit"),
    "over='all'.*'unit', 'tensor'": lambda: gc.Relative(over="all"),
    "p=0.*above 0": lambda: gc.Norm(1.0, p=0.0),
    "length=inf.*finite": lambda: gc.Normalize(math.inf),
    "eps=-1.0.*0 or above": lambda: gc.Normalize(eps=-1.0),
    "ratio=0.*above 0": lambda: gc.Relative(0.0),
    "q=101.*between 0 and 100": lambda: gc.Percentile(101),
    "q=-1.*between 0 and 100": lambda: gc.Percentile(q=-1),
    "q=nan": lambda: gc.Percentile(q=math.nan),
    "window=0.*at least one": lambda: gc.Percentile(window=0),
    "window=2.5.*at least one": lambda: gc.Percentile(window=2.5),
    "z=-1.*above 0": lambda: gc.ZScore(-1.0),
    r"decay=1.5.*\(0, 1\]": lambda: gc.ZScore(decay=1.5),
    "warmup=0.*at least one": lambda: gc.ZScore(warmup=0),
    "max_limit=-1.0.*above 0": lambda: gc.ZScore(max_limit=-1.0),
}


@pytest.mark.parametrize("message", RULES)
def test_rules_check_their_numbers(message):
    with pytest.raises(ValueError, match=message):
        RULES[message]()


def test_infinity_records_without_clipping():
    grads = [np.array([1e30, 2.0]), np.array(np.inf)]
    same, info = gc.clip(grads, gc.Norm(math.inf))
    assert math.isinf(info.norm)
    assert not info.clipped
    for a, b in zip(same, grads, strict=True):
        np.testing.assert_array_equal(a, b)


def schedule(limit):
    """Return a clipper whose limit turns into something else at its fourth step."""
    clipper = gc.Clipper(gc.Norm(lambda step: 1.0 if step < 3 else limit))
    for _ in range(3):
        clipper.clip(np.ones(2))
    return clipper


def param():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    return p


ARRAYS = {
    "not a rule.*Norm": lambda: gc.clip(np.ones(2), 1.0),
    "Percentile.*depends on the steps.*Clipper": lambda: gc.clip(
        np.ones(2), gc.Percentile()
    ),
    "function.*depends on the steps.*Clipper": lambda: gc.clip(
        np.ones(2), gc.Norm(lambda step: 1.0)
    ),
    "is str, not an array": lambda: gc.clip(["a"], gc.Norm(1.0)),
    r"\['b'\].*is float, not an array": lambda: gc.clip(
        {"a": np.ones(2), "b": 1.0}, gc.Norm(1.0)
    ),
    "numpy.ndarray but.*torch.Tensor.*one library": lambda: gc.clip(
        [np.ones(2), torch.ones(2)], gc.Norm(1.0)
    ),
    "not the module Linear.*Clipper": lambda: gc.clip(
        torch.nn.Linear(1, 1), gc.Norm(1.0)
    ),
    r"arranged like a list_iterator.*list\(gradients": lambda: gc.clip(
        iter([np.ones(2)]), gc.Norm(1.0)
    ),
    "dtype <U1": lambda: gc.clip(np.array(["a"]), gc.Norm(1.0)),
    "dtype object": lambda: gc.clip(np.array([None]), gc.Norm(1.0)),
    "schedule.*gives '1' at step 3": lambda: schedule("1").clip(np.ones(2)),
    "schedule.*gives None at step 3": lambda: schedule(None).clip(np.ones(2)),
    r"gives array\(\[1., 1.\]\) at step 3; a limit is a number": lambda: schedule(
        np.ones(2)
    ).clip(np.ones(2)),
    "None is NoneType, not a parameter": lambda: clip_grad_norm_(None, 1.0),
    "0.5 is float, not a parameter": lambda: Clipper(0.5, gc.Norm(1.0)),
    "parameter 'w' is ndarray, not a torch tensor": lambda: Clipper(
        {"w": np.ones(2)}, gc.Norm(1.0)
    ),
    "not a rule; use one such as": lambda: gc.chain(gc.Norm(1.0), 3),
    "at least one rule": lambda: gc.chain(),
}


@pytest.mark.parametrize("message", ARRAYS)
def test_arrays_of_the_wrong_kind(message):
    with pytest.raises(TypeError, match=message):
        ARRAYS[message]()


VALUES = {
    "no gradients in here.*backward": lambda: gc.clip([], gc.Norm(1.0)),
    "params=": lambda: gc.clip(np.ones(2), gc.Relative()),
    "arrange": lambda: gc.clip(np.ones(2), gc.Relative(), params=np.ones(3)),
    "on_nonfinite='drop'.*'skip', 'zero', 'raise', 'ignore'": lambda: gc.clip(
        np.ones(2), gc.Norm(1.0), on_nonfinite="drop"
    ),
    "out has 1 arrays for 2": lambda: gc.clip(
        [np.ones(2), np.ones(2)], gc.Norm(1.0), out=[np.ones(2)]
    ),
    "np.empty_like": lambda: gc.clip(
        np.ones(2), gc.Norm(1.0), out=np.ones(2, np.int64)
    ),
    r"shape \(2, 3\) has no such axis": lambda: gc.clip(
        np.ones((2, 3)), gc.Norm(1.0, over="unit", axis=2)
    ),
    "norm_type='fro': it is a number": lambda: clip_grad_norm_(param(), 1.0, "fro"),
    "norm_type=None: it is a number": lambda: get_total_norm([], None),
}


@pytest.mark.parametrize("message", VALUES)
def test_arrays_with_wrong_values(message):
    with pytest.raises(ValueError, match=message):
        VALUES[message]()


def test_integers_are_promoted_and_never_truncated():
    for dtype in (np.int64, np.int8, np.uint8, bool):
        grads, info = gc.clip(np.array([1, 0, 1], dtype), gc.Norm(0.5))
        assert grads.dtype == np.float64
        assert np.linalg.norm(grads) == pytest.approx(0.5)
        assert info.norm == pytest.approx(math.sqrt(2))
    with pytest.raises(ValueError, match="dtype float64"):
        gc.clip(np.array([1, 2]), gc.Norm(0.5), out=np.array([1, 2]))
    grads, _ = gc.clip(torch.tensor([3, 4]), gc.Norm(1.0))
    torch.testing.assert_close(grads, torch.tensor([0.6, 0.8]))


def test_changing_the_number_of_gradients():
    clipper = gc.Clipper(gc.ZScore(over="tensor"))
    clipper.clip([np.ones(2), np.ones(2)])
    with pytest.raises(ValueError, match="remembers 2 tensors, but this step has 1"):
        clipper.clip([np.ones(2)])


def parameter(grad=(3.0, 4.0)):
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = None if grad is None else torch.tensor(grad)
    return p


@pytest.mark.parametrize("limit", [-1.0, 0.0, math.nan])
def test_functions_refuse_the_limit_before_anything_changes(limit):
    p = parameter()
    for call in (
        lambda: clip_grad_norm_([p], limit),
        lambda: clip_grad_value_([p], limit),
        lambda: clip_grads_with_norm_([p], limit, torch.tensor(5.0)),
    ):
        with pytest.raises(ValueError, match="above 0"):
            call()
    assert p.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("norm", [-5.0, torch.tensor([5.0, 5.0])])
def test_a_norm_that_is_none_is_refused(norm):
    p = parameter()
    with pytest.raises(ValueError, match="total_norm="):
        clip_grads_with_norm_([p], 1.0, norm)
    assert p.grad.tolist() == [3.0, 4.0]


def test_functions_refuse_what_is_not_a_tensor():
    module = torch.nn.Linear(2, 2)
    for call in (
        lambda: clip_grad_norm_(module, 1.0),
        lambda: get_total_norm(module),
        lambda: clip_grads_with_norm_(module, 1.0, 1.0),
    ):
        with pytest.raises(
            TypeError, match=r"not the module Linear.*module.parameters"
        ):
            call()
    with pytest.raises(
        TypeError, match=r"is ndarray, not a torch tensor.*gradclip.clip"
    ):
        clip_grad_norm_([np.ones(2)], 1.0)
    with pytest.raises(TypeError, match="is the module Linear"):
        Clipper([module], gc.Norm(1.0))
    with pytest.raises(ValueError, match="order of a norm is above 0"):
        clip_grad_norm_([parameter()], 1.0, norm_type=-2)


def test_nothing_to_clip():
    with pytest.raises(
        ValueError, match=r"none of the 1 parameters has a gradient.*backward"
    ):
        clip_grad_norm_([parameter(None)], 1.0)
    with pytest.raises(ValueError, match="was backward"):
        Clipper(torch.nn.Linear(2, 2), gc.Norm(1.0)).clip_()
    with pytest.raises(ValueError, match="no parameters to clip"):
        Clipper([], gc.Norm(1.0))
    used = iter([parameter()])
    list(used)
    with pytest.raises(ValueError, match="used up"):
        clip_grad_norm_(used, 1.0)
    with pytest.raises(ValueError, match="used up"):
        Clipper(used, gc.Norm(1.0))


def test_the_same_parameter_twice_is_one_parameter():
    p = parameter()
    assert float(clip_grad_norm_([p, p], 1.0)) == 5.0
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))
    tied = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert (
        len(Clipper([*tied[0].parameters(), *tied[1].parameters()], gc.Norm(1)).params)
        == 3
    )


def test_attach_and_clipper_refuse_the_wrong_things():
    p = parameter()
    optimizer = torch.optim.SGD([p], lr=0.1)
    with pytest.raises(TypeError, match=r"takes an optimizer, not Linear"):
        attach(torch.nn.Linear(1, 1), gc.Norm(1.0))
    with pytest.raises(TypeError, match="takes a module for the names, not Tensor"):
        attach(optimizer, gc.Norm(1.0), model=torch.zeros(2))
    with pytest.raises(TypeError, match="not a rule"):
        attach(optimizer, 1.0)
    with pytest.raises(ValueError, match="on_nonfinite='never'"):
        attach(optimizer, gc.Norm(1.0), on_nonfinite="never")
    with pytest.raises(TypeError, match=r"history='run\.jsonl' is str; use history="):
        attach(optimizer, gc.Norm(1.0), history="run.jsonl")
    with pytest.raises(TypeError, match="use history=gradclip"):
        gc.Clipper(gc.Norm(1.0), history="run.jsonl")
    with pytest.raises(ValueError, match=r"doctor=\['rate'\]: it is a collection"):
        attach(optimizer, gc.Norm(1.0), doctor="rate")
    assert not optimizer._optimizer_step_pre_hooks


def test_a_state_of_another_rule_or_size_is_refused():
    p = [parameter(), parameter()]
    clipper = Clipper(p, gc.ZScore(over="tensor"))
    saved = clipper.state_dict()
    with pytest.raises(ValueError, match=r"belongs to ZScore.*has Percentile"):
        Clipper(p, gc.Percentile()).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"\(2,\).*needs \(1,\)"):
        Clipper(p[:1], gc.ZScore(over="tensor")).load_state_dict(saved)
    with pytest.raises(ValueError, match="not the state of a clipper"):
        clipper.load_state_dict({"weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"window=10.*window=20"):
        gc.Clipper(gc.Percentile(window=20)).load_state_dict(
            gc.Clipper(gc.Percentile(window=10)).state_dict()
        )
