"""One optimizer for each parameter, stepped during backward: what lateness costs."""

import contextlib
import copy
import math
import re
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gradclip as gc
from gradclip.torch import attach
from test_attach import batches, loss_of, network, same


def apart(net, kind=torch.optim.SGD, **options):
    """Give each parameter an optimizer that steps when its gradient has come."""
    options = {"lr": 0.05, **options}
    made = {p: kind([p], **options) for p in net.parameters()}

    def step(p):
        made[p].step()
        made[p].zero_grad()

    for p in made:
        p.register_post_accumulate_grad_hook(step)
    return made


def clipped(rule, net=None, **options):
    net = net or network()
    made = apart(net)
    return net, attach(made, rule, model=net, in_backward=True, doctor=(), **options)


def grad_norms(net, x):
    """Return the norm of each gradient, in the order in which they come."""
    loss = loss_of(net, x)
    found = torch.autograd.grad(loss, list(net.parameters()))
    return [float(torch.linalg.vector_norm(g.double())) for g in reversed(found)]


def test_the_norm_is_known_when_backward_returns():
    net, clipper = clipped(gc.Norm(math.inf))
    for x in batches():
        expected = math.hypot(*grad_norms(net, x))
        loss_of(net, x).backward()
        assert float(clipper.info.norm) == pytest.approx(expected, rel=1e-6)
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("attached", [True, False])
def test_a_copy_clips_as_the_original_does(attached):
    net = torch.nn.Linear(4, 1)
    optimizers = [torch.optim.SGD([p], lr=1.0) for p in net.parameters()]
    clipper = attach(optimizers, gc.Norm(0.5), in_backward=True, doctor=())
    if not attached:
        clipper.detach()
    net, optimizers, clipper = copy.deepcopy((net, optimizers, clipper))
    for p, optimizer in zip(net.parameters(), optimizers, strict=True):
        p.register_post_accumulate_grad_hook(lambda _, o=optimizer: o.step())
    before = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    net(torch.full((8, 4), 100.0)).sum().backward()
    step = torch.nn.utils.parameters_to_vector(net.parameters()).detach() - before
    # Each of the two is clipped by what has come until then.
    assert (float(step.norm()) < 0.8) == attached
    clipper.detach()
    assert not any(o._optimizer_step_pre_hooks for o in optimizers)


def test_nothing_changes_to_the_bit_where_nothing_is_clipped():
    net, alone = network(), network()
    apart(alone)
    clipped(gc.Norm(1e6), net)
    for x in batches():
        loss_of(net, x).backward()
        loss_of(alone, x).backward()
    same(net.parameters(), alone.parameters())


def test_a_steady_norm_is_clipped_as_if_it_were_known_in_time():
    """The same gradients again and again: from the second pass on nothing is late."""
    late, ordinary = network(), network()
    optimizer = torch.optim.SGD(ordinary.parameters(), lr=1e-5)
    attach(optimizer, gc.Norm(0.1), doctor=())
    made = apart(late, lr=1e-5)
    clipper = attach(made, gc.Norm(0.1), in_backward=True, doctor=())
    x = next(batches())
    for _ in range(5):
        before = [
            [p.detach().clone() for p in n.parameters()] for n in (late, ordinary)
        ]
        loss_of(late, x).backward()
        optimizer.zero_grad()
        loss_of(ordinary, x).backward()
        optimizer.step()
    moved = [
        torch.cat([(p - b).flatten() for p, b in zip(n.parameters(), old, strict=True)])
        for n, old in zip((late, ordinary), before, strict=True)
    ]
    torch.testing.assert_close(*moved, rtol=1e-3, atol=1e-9)
    assert float(clipper.info.norm_after) == pytest.approx(0.1, rel=1e-4)


def moves(run, net, spike):
    """Train with one loss a thousand times too large; return how far each step goes."""
    moved, norms = [], []
    for i, x in enumerate(batches(spike=99)):
        scale = 1000 if i == spike else 1
        norms.append([n * scale for n in grad_norms(net, x)])
        before = torch.cat([p.detach().flatten() for p in net.parameters()])
        run(loss_of(net, x) * scale)
        after = torch.cat([p.detach().flatten() for p in net.parameters()])
        moved.append(float((after - before).norm()) / 0.05)
    return moved, norms


def test_what_a_spike_costs_against_ordinary_clipping():
    limit, spike = 0.2, 6
    late, clipper = clipped(gc.Norm(limit))
    ours, norms = moves(lambda loss: loss.backward(), late, spike)
    ordinary = network()
    optimizer = torch.optim.SGD(ordinary.parameters(), lr=0.05)
    attach(optimizer, gc.Norm(limit), doctor=())

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    theirs, _ = moves(step, ordinary, spike)
    whole = math.hypot(*norms[spike])
    assert whole > 500 * limit
    assert theirs[spike] == pytest.approx(limit, rel=1e-3)
    # The spike: no tensor keeps more than the limit, and all together not much more.
    bound = limit * math.sqrt(1 + 2 * math.log(whole / norms[spike][0]))
    assert limit < ours[spike] <= bound * (1 + 1e-3) < 2.5 * limit
    # The step after it pays: it is scaled for a norm that is gone.
    assert theirs[spike + 1] == pytest.approx(limit, rel=1e-3)
    assert ours[spike + 1] < 0.01 * limit
    # Then all is as before.
    assert ours[spike + 2] == pytest.approx(limit, rel=0.5)
    assert bool(clipper.info.clipped)


@pytest.mark.parametrize("p", [1.0, 3.0, math.inf])
def test_other_orders_of_the_norm(p):
    net, clipper = clipped(gc.Norm(0.1, p=p))
    for x in batches():
        grads = torch.autograd.grad(loss_of(net, x), list(net.parameters()))
        flat = torch.cat([g.flatten().double() for g in grads])
        loss_of(net, x).backward()
        expected = float(torch.linalg.vector_norm(flat, p))
        assert float(clipper.info.norm) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "rule", [gc.Norm(0.1), gc.ZScore(1.0, warmup=2), gc.Percentile(30), gc.Normalize()]
)
def test_a_resumed_run_is_the_same_to_the_bit(rule):
    xs = list(batches(12, spike=5))
    whole, clipper = clipped(rule)
    for i, x in enumerate(xs):
        if i == 6:
            saved = {k: v.clone() for k, v in whole.state_dict().items()}
            memory = clipper.state_dict()
        loss_of(whole, x).backward()
    resumed, other = clipped(rule)
    resumed.load_state_dict(saved)
    other.load_state_dict(memory)
    for x in xs[6:]:
        loss_of(resumed, x).backward()
    same(whole.parameters(), resumed.parameters())
    for key, x in clipper.state_dict().items():
        assert torch.equal(x, other.state_dict()[key]), key
    assert int(other.state_dict()["step"]) == 12


def poison(net):
    """Make the gradient of the first layer's weight NaN; the others are fine."""
    return net[0].weight.register_hook(lambda g: g * math.nan)


def test_a_tensor_with_nan_takes_no_step():
    net, clipper = clipped(gc.ZScore(1.0, warmup=1))
    xs = list(batches(4, spike=9))
    loss_of(net, xs[0]).backward()
    before, memory = net[0].weight.detach().clone(), clipper.state_dict()
    hook = poison(net)
    loss_of(net, xs[1]).backward()
    hook.remove()
    assert torch.equal(net[0].weight, before)
    assert not bool(clipper.info.finite)
    assert not bool(clipper.info.kept)
    assert float(clipper.info.norm_after) > 0, "of those that were stepped"
    assert int(clipper.info.skipped) == 1
    now = clipper.state_dict()
    assert all(torch.equal(now[k], memory[k]) for k in memory if k[0] in "0p")
    loss_of(net, xs[2]).backward()
    assert bool(clipper.info.kept)
    assert not torch.equal(net[0].weight, before)


@pytest.mark.parametrize("policy", ["zero", "raise"])
def test_the_other_policies(policy):
    net, _ = clipped(gc.Norm(1.0), on_nonfinite=policy)
    before = [p.detach().clone() for p in net.parameters()]
    poison(net)
    if policy == "raise":
        with pytest.raises(gc.NonFiniteError, match=r"0\.weight \(20 of 20") as error:
            loss_of(net, next(batches())).backward()
        # The layers behind it were stepped before its gradient was there.
        assert not torch.equal(net[2].weight, before[2])
        assert re.search(r"\d parameters were stepped before", str(error.value))
        assert "nothing was changed" not in str(error.value)
        return
    loss_of(net, next(batches())).backward()
    assert torch.equal(net[0].weight, before[0])
    assert not torch.equal(net[2].weight, before[2])


def test_a_pass_that_was_broken_off_is_forgotten():
    net, clipper = clipped(gc.Norm(math.inf))
    x = next(batches())

    def fail(g):
        raise ArithmeticError

    hook = net[0].weight.register_hook(fail)
    with pytest.raises(ArithmeticError):
        loss_of(net, x).backward()
    hook.remove()
    expected = math.hypot(*grad_norms(net, x))
    loss_of(net, x).backward()
    assert float(clipper.info.norm) == pytest.approx(expected, rel=1e-6)
    assert int(clipper.state_dict()["step"]) == 1


def test_too_many_skipped_passes_are_an_error():
    net, _ = clipped(gc.Norm(1.0), max_consecutive_skips=2)
    poison(net)
    x = next(batches())
    loss_of(net, x).backward()
    with pytest.raises(
        gc.NonFiniteError, match="2 steps in a row were skipped, since step 0"
    ):
        loss_of(net, x).backward()


def test_it_is_recorded_and_ends(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    net, clipper = clipped(gc.Norm(0.1), history=history)
    for x in batches(3):
        loss_of(net, x).backward()
    assert history.step.tolist() == [0, 1, 2]
    assert history.norm[2] == pytest.approx(float(clipper.info.norm))
    assert history.scale[2] == pytest.approx(float(clipper.info.scale))
    clipper.detach()
    loss_of(net, x).backward()
    assert len(history) == 3


@pytest.mark.parametrize("over", ["tensor", "unit", "element"])
def test_other_scopes_are_not_late_and_need_no_option(over):
    rule = gc.Value(1e-3) if over == "element" else gc.Norm(1e-2, over=over)
    with pytest.raises(ValueError, match="nothing has to come late"):
        clipped(rule)
    net, ordinary = network(), network()
    for optimizer in apart(net).values():
        attach(optimizer, rule, doctor=())
    together = torch.optim.SGD(ordinary.parameters(), lr=0.05)
    attach(together, rule, doctor=())
    for x in batches():
        loss_of(net, x).backward()
        together.zero_grad()
        loss_of(ordinary, x).backward()
        together.step()
    same(net.parameters(), ordinary.parameters())


TOO_LATE = [
    gc.Skip(gc.Norm(1.0)),
    gc.chain(gc.Norm(1.0), gc.Value(1.0)),
    gc.by_name({"*": gc.Norm(1.0)}),
]


@pytest.mark.parametrize("rule", TOO_LATE)
def test_rules_that_come_too_late_are_refused(rule):
    with pytest.raises(ValueError, match="stepped already"):
        clipped(rule)


# Torch warns about parts of itself that it imports there.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_optimizers_that_torch_itself_puts_into_backward():
    from torch.distributed.optim import _apply_optimizer_in_backward

    net, (other, theirs) = network(), clipped(gc.Norm(0.1))
    _apply_optimizer_in_backward(torch.optim.SGD, net.parameters(), {"lr": 0.05})
    optimizers = [o for p in net.parameters() for o in p._in_backward_optimizers]
    ours = attach(optimizers, gc.Norm(0.1), in_backward=True, doctor=())
    for x in batches():
        loss_of(net, x).backward()
        loss_of(other, x).backward()
        assert torch.equal(ours.info.norm, theirs.info.norm)
    same(net.parameters(), other.parameters())


def test_misuse_is_said():
    net = network()
    made = apart(net)
    for several in (made, list(made.values())):
        with pytest.raises(TypeError, match=r"attach to each.*one norm.*Clipper\("):
            attach(several, gc.Norm(1.0))
    with pytest.raises(TypeError, match="in_backward=True"):
        attach(list(made.values()), gc.Norm(1.0))
    with pytest.raises(TypeError, match="not int"):
        attach([1], gc.Norm(1.0), in_backward=True)
    clipper = attach(made.values(), gc.Norm(1.0), in_backward=True)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    with pytest.raises(RuntimeError, match="outside backward"):
        made[net[0].weight].step()
    with pytest.raises(ValueError, match="no norm of the last pass"):
        clipper.load_state_dict({})


def test_what_was_cleared_does_not_pass_unseen():
    net, clipper = clipped(gc.Norm(1.0), on_nonfinite="zero")
    net[0].weight.register_hook(lambda g: g * math.nan)
    for x in batches(2):
        loss_of(net, x).backward()
    assert not clipper.info.finite
    assert clipper.info.kept
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_inside_of_another_is_refused(reentrant):
    net, clipper = clipped(gc.Norm(1.0))
    before = [p.detach().clone() for p in net.parameters()]
    x = next(iter(batches())).requires_grad_()
    expected = math.hypot(*grad_norms(net, x))
    loss = loss_of(partial(checkpoint, net, use_reentrant=reentrant), x)
    if not reentrant:
        loss.backward()
        assert float(clipper.info.norm) == pytest.approx(expected, rel=1e-6)
        return
    # One norm for each piece would be told, and clipped by.
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss.backward()
    same(net.parameters(), before)


def scaled(kind, fused, rule, overflow=None, **options):
    """Train with steps that a loss scaler takes in the hooks."""
    net = network()
    made = {p: kind([p], lr=0.05, fused=fused, **options) for p in net.parameters()}
    clipper = attach(made, rule, model=net, in_backward=True, on_nonfinite="raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    told = []

    def step(p):
        scaler.step(made[p])
        made[p].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(step) for p in made]
    for i, x in enumerate(batches(6)):
        scaler.scale(loss_of(net, x) * (math.inf if i == overflow else 1)).backward()
        scaler.update()
        told.append(clipper.info and float(clipper.info.norm))
    let_go(handles)
    return net, told


def let_go(handles):
    """Remove hooks, through which a loss scaler would live on for other tests."""
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("overflow", [None, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})],
    ids=["SGD", "AdamW"],
)
def test_a_fused_step_of_a_loss_scaler_is_that_of_any_other(kind, options, overflow):
    """It divides by the scale behind the clip."""
    net, told = scaled(kind, True, gc.Norm(0.1), overflow, **options)
    other, expected = scaled(kind, False, gc.Norm(0.1), overflow, **options)
    assert told == pytest.approx(expected, rel=1e-5)
    same(net.parameters(), other.parameters(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("through", [True, False])
def test_steps_beside_a_loss_scaler_are_told(through):
    net = network()
    made = {p: torch.optim.SGD([p], lr=0.05) for p in net.parameters()}
    attach(made, gc.Norm(1e-3), model=net, in_backward=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    handles = [
        p.register_post_accumulate_grad_hook(
            lambda _, o=optimizer: scaler.step(o) if through else o.step()
        )
        for p, optimizer in made.items()
    ]
    loss = scaler.scale(loss_of(net, next(batches())))
    said = r"GradScaler with scale.*scaler\.step\(optim"
    warned = pytest.warns(gc.torch.ClipWarning, match=said)
    with contextlib.nullcontext() if through else warned:
        loss.backward()
    let_go(handles)
