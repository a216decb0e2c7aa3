"""Misuse that would be silent gets one message, and proper use gets none."""

import warnings

import pytest
import torch

import gradclip as gc
from gradclip.torch import Clipper, ClipWarning, attach


def setting(rule=None, **options):
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    return net, optimizer, Clipper(net, rule or gc.Norm(1.0), **options)


def backward(net, factor=1.0):
    (factor * net(torch.randn(3, 4)).square().mean()).backward()


def test_proper_use_is_silent():
    net, optimizer, clipper = setting(gc.Norm(0.5))
    for _ in range(520):
        optimizer.zero_grad()
        backward(net, 1.0 + torch.rand(()).item() * 3)
        clipper.clip_()
        optimizer.step()
    for set_to_none in (True, False):
        optimizer.zero_grad(set_to_none=set_to_none)
        backward(net)
        backward(net)
        clipper.clip_()
        optimizer.step()


@pytest.mark.parametrize("last", [gc.Norm(1e-9, over="tensor"), gc.Norm(1e-9)])
def test_norms_and_limits_of_other_shapes_are_compared(last):
    net, _, clipper = setting(gc.chain(gc.Norm(1e9), last))
    backward(net)
    info = clipper.clip_()
    assert info.limit.dim() == (last.over == "tensor")
    # What is far above its limit is looked at once.
    assert "scaled" not in clipper._doctor.checks


def test_clipping_twice():
    net, _, clipper = setting()
    backward(net)
    clipper.clip_()
    with pytest.warns(ClipWarning, match="called twice, or before backward"):
        clipper.clip_()
    clipper.clip_()


def test_clipping_before_backward():
    net, optimizer, clipper = setting()
    backward(net)
    clipper.clip_()
    optimizer.step()
    with pytest.warns(ClipWarning, match="before backward"):
        clipper.clip_()


def test_clipping_after_the_step():
    net, optimizer, clipper = setting()
    backward(net)
    optimizer.step()
    with pytest.warns(
        ClipWarning, match=r"after the step.* as by SAM\. Clip before step"
    ):
        clipper.clip_()


def test_gradients_made_beside_the_parameters_are_no_misuse_where_the_step_clips():
    net, optimizer, _ = setting()
    clipper = attach(optimizer, gc.Norm(1e-3))
    backward(net)
    kept = [p.detach().clone() for p in net.parameters()]
    with torch.no_grad():
        torch._foreach_add_(list(net.parameters()), 0.1)
    net.zero_grad()
    backward(net)
    with torch.no_grad():
        torch._foreach_copy_(list(net.parameters()), kept)
    optimizer.step()
    assert clipper.info.clipped


@pytest.mark.parametrize("unscales", [False, True])
def test_gradients_that_are_still_scaled(unscales):
    net, optimizer, clipper = setting(gc.Norm(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(net(torch.ones(3, 4)).square().mean()).backward()
    if unscales:
        scaler.unscale_(optimizer)
        clipper.clip_()
    else:
        with pytest.warns(ClipWarning, match=r"GradScaler with scale 65536.*unscale_"):
            clipper.clip_()


def test_a_scaler_that_is_switched_off_is_none():
    net, _, clipper = setting(gc.Norm(0.5))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(net(torch.full((3, 4), 1e6)).square().mean()).backward()
    assert float(clipper.clip_().norm_after) == pytest.approx(0.5)
    assert "scaled" not in clipper._doctor.checks


def test_stepping_without_gradients():
    _, optimizer, _ = setting()
    attach(optimizer, gc.Norm(1.0))
    with pytest.warns(ClipWarning, match=r"none of 2 parameters.*backward"):
        optimizer.step()
    optimizer.step()


def test_a_second_clipper_in_one_optimizer():
    _, optimizer, _ = setting()
    first = attach(optimizer, gc.ZScore())
    with pytest.warns(ClipWarning, match=r"has a clipper already.*detach\(\)"):
        second = attach(optimizer, gc.ZScore())
    first.detach(), second.detach()
    attach(optimizer, gc.ZScore())
    with pytest.warns(ClipWarning, match="has a clipper already"):
        attach(optimizer, gc.Norm(1.0))
    attach(optimizer, gc.Value(1.0), doctor=())


def test_parameters_that_the_optimizer_does_not_hold():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    with pytest.warns(ClipWarning, match=r"2 trainable.*1\.weight, 1\.bias"):
        attach(optimizer, gc.Norm(1.0), model=net)


@pytest.mark.parametrize(
    ("limit", "message"),
    [(1e9, "none of 500 steps"), (1e-9, "100% of 500 steps")],
)
def test_a_limit_that_never_or_always_acts(limit, message):
    net, _, clipper = setting(gc.Norm(limit))
    for step in range(500):
        net.zero_grad()
        backward(net)
        if step < 499:
            clipper.clip_()
    with pytest.warns(ClipWarning, match=message):
        clipper.clip_()


@pytest.mark.parametrize(
    "rule", [gc.Norm(float("inf")), gc.Percentile(), gc.Normalize()]
)
def test_rules_without_a_fixed_limit_are_not_judged(rule):
    net, _, clipper = setting(rule)
    for _ in range(520):
        net.zero_grad()
        backward(net)
        clipper.clip_()


def test_every_check_has_a_switch():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net, optimizer, clipper = setting(doctor=())
        backward(net)
        optimizer.step()
        clipper.clip_()
        clipper.clip_()
    with pytest.raises(ValueError, match=r"doctor=\['typo'\].*unchanged, consumed"):
        setting(doctor=("typo",))


@pytest.mark.parametrize(
    ("rules", "model", "told"),
    [
        ({"haed.*": gc.Norm(1.0), "*": None}, True, "'haed.*'; they are weight, bias."),
        ({"weight": gc.Norm(1.0), "*": None}, False, "Hand over model="),
        ({"weight": gc.Norm(1.0), "head.*": None, "*": None}, True, None),
        ({"*": gc.Norm(1.0)}, False, None),
    ],
)
@pytest.mark.parametrize("wrap", [lambda rule: rule, gc.Skip])
def test_names_that_no_parameter_has_are_told(rules, model, told, wrap):
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(optimizer, wrap(gc.by_name(rules)), model=net if model else None)
        for _ in range(2):
            net(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    said = [str(w.message) for w in caught]
    assert len(said) == (told is not None)
    assert all(told in text for text in said)


def test_names_of_another_optimizer_of_the_model_are_none_too_many():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    rule = gc.by_name({"1.*": gc.Norm(1.0), "*": None})
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in net]
    for optimizer in optimizers:
        attach(optimizer, rule, model=net, doctor=("unmatched",))
    net(torch.ones(1, 2)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_names_are_looked_for_once_all_parameters_are_there():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    rule = gc.by_name({"1.*": gc.Norm(1.0), "*": None})
    optimizer = torch.optim.SGD(net[0].named_parameters(prefix="0"), lr=0.1)
    attach(optimizer, rule)
    optimizer.add_param_group({"params": net[1].named_parameters(prefix="1")})
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
