"""attach: every stock optimizer, loss scaling, accumulation, closures, and skipping."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import gradclip as gc
from gradclip.torch import Clipper, attach

# Muon takes matrices only, and SparseAdam sparse gradients: each has a test of its own.
ELSEWHERE = {"Optimizer", "SparseAdam", "LBFGS", "Muon"}
STOCK = sorted(
    name
    for name, kind in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(kind, torch.optim.Optimizer) and name not in ELSEWHERE
)
WITH_MOMENTUM = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "RMSprop": {"momentum": 0.9, "weight_decay": 0.1},
    "Rprop": {},
}
FUSED = ["SGD", "Adam", "AdamW", "Adagrad"]
CASES = [(name, {}) for name in STOCK] + [(name, {"fused": True}) for name in FUSED]
CASES += [(n, {"foreach": False}) for n in STOCK if n != "Adafactor"]
each_optimizer = pytest.mark.parametrize(("name", "options"), CASES, ids=str)


def network(bias=True):
    torch.manual_seed(0)
    layers = torch.nn.Linear(5, 4, bias=bias), torch.nn.Linear(4, 3, bias=bias)
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])


def build(name, net, options):
    kind = getattr(torch.optim, name)
    extra = WITH_MOMENTUM.get(name, {"weight_decay": 0.1})
    return kind(net.parameters(), lr=0.05, **extra, **options)


def batches(count=10, spike=6):
    generator = torch.Generator().manual_seed(1)
    for step in range(count):
        yield torch.randn(6, 5, generator=generator) * (100 if step == spike else 1)


def loss_of(net, x):
    return net(x).square().mean()


def same(a, b, **tolerance):
    for p, q in zip(a, b, strict=True):
        if tolerance:
            torch.testing.assert_close(p, q, **tolerance)
        else:
            assert torch.equal(p, q)


def snapshot(net, optimizer):
    return copy.deepcopy([*net.parameters()]), copy.deepcopy(optimizer.state_dict())


def assert_unchanged(net, optimizer, before):
    params, state = before
    same(net.parameters(), params)
    now = optimizer.state_dict()["state"]
    assert now.keys() == state["state"].keys()
    for key, entries in state["state"].items():
        assert now[key].keys() == entries.keys()
        for name, x in entries.items():
            y = now[key][name]
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


def run_both(nets, optimizers, clipper):
    """Train two networks alike, and clip the second by hand before its step."""
    for x in batches():
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(net, x).backward()
            if net is nets[1]:
                clipper.clip_()
            optimizer.step()


@each_optimizer
@pytest.mark.parametrize("limit", [0.1, 1e9])
def test_equals_clip_then_step(name, options, limit):
    nets = network(), network()
    ours, theirs = (build(name, net, options) for net in nets)
    attach(ours, gc.Norm(limit))
    clipper = Clipper(nets[1], gc.Norm(limit))
    run_both(nets, (ours, theirs), clipper)
    exact = {} if limit > 1 else {"rtol": 1e-6, "atol": 1e-6}
    same(nets[0].parameters(), nets[1].parameters(), **exact)


@each_optimizer
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_skip_changes_nothing(name, options, bad, first):
    net = network()
    optimizer = build(name, net, options)
    clipper = attach(optimizer, gc.Norm(1.0))
    for x in [] if first else batches(3):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        optimizer.step()
    before = snapshot(net, optimizer)
    loss_of(net, torch.ones(2, 5)).backward()
    net[0].weight.grad[1, 2] = bad
    grads = [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    assert_unchanged(net, optimizer, before)
    assert not clipper.info.finite
    assert clipper.info.skipped == 1
    for p, g in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)
    optimizer.zero_grad()
    loss_of(net, torch.ones(2, 5)).backward()
    optimizer.step()
    assert clipper.info.finite
    assert not torch.equal(net[0].weight, before[0][0])


def test_muon():
    nets = network(bias=False), network(bias=False)
    ours, theirs = (torch.optim.Muon(net.parameters(), lr=0.05) for net in nets)
    attach(ours, gc.Norm(0.1))
    clipper = Clipper(nets[1], gc.Norm(0.1))
    run_both(nets, (ours, theirs), clipper)
    same(nets[0].parameters(), nets[1].parameters(), rtol=1e-6, atol=1e-6)
    before = snapshot(nets[0], ours)
    nets[0][0].weight.grad[0, 0] = math.nan
    ours.step()
    assert_unchanged(nets[0], ours, before)


def test_sparse_adam():
    def table():
        torch.manual_seed(0)
        return torch.nn.Embedding(10, 4, sparse=True)

    tables = table(), table()
    ours, theirs = (torch.optim.SparseAdam(t.parameters(), lr=0.1) for t in tables)
    attached = attach(ours, gc.Norm(0.05))
    clipper = Clipper(tables[1], gc.Norm(0.05))
    for _ in range(4):
        for t, optimizer in zip(tables, (ours, theirs), strict=True):
            optimizer.zero_grad()
            t(torch.tensor([1, 3, 3, 7])).square().sum().backward()
            if optimizer is theirs:
                clipper.clip_()
            optimizer.step()
            assert t.weight.grad.is_sparse
    same(tables[0].parameters(), tables[1].parameters(), rtol=1e-6, atol=1e-6)
    assert attached.info.clipped


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_clips_after_each_evaluation(search):
    # Two clipped gradients differ by rounding, which it takes for a flat valley: only
    # small steps are stable.
    net = network()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.001, line_search_fn=search)
    clipper = attach(optimizer, gc.Norm(0.5))
    x, norms = next(iter(batches())), []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, x)
        loss.backward()
        return loss

    wrapped = clipper._clipping(closure)

    def watched():
        loss = wrapped()
        norms.append(
            float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]))
        )
        return loss

    first = float(closure().detach())
    clipper._clipping = lambda closure: watched
    last = [float(optimizer.step(closure).detach()) for _ in range(5)][-1]
    assert last < first
    assert max(norms) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("bad_call", [1, 3])
def test_lbfgs_skips_whole_steps(bad_call):
    net = network()
    optimizer = torch.optim.LBFGS(
        net.parameters(), lr=0.1, line_search_fn="strong_wolfe"
    )
    clipper = attach(optimizer, gc.Norm(10.0))
    calls, bad = [0], [False]
    x = next(iter(batches()))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, x)
        loss.backward()
        calls[0] += 1
        if bad[0] and calls[0] == bad_call:
            net[0].weight.grad[0, 0] = math.nan
        return loss

    optimizer.step(closure)
    before = snapshot(net, optimizer)
    calls[0], bad[0] = 0, True
    optimizer.step(closure)
    assert calls[0] >= bad_call
    assert_unchanged_lbfgs(net, optimizer, before)
    assert clipper.info.skipped >= 1


def assert_unchanged_lbfgs(net, optimizer, before):
    params, state = before
    same(net.parameters(), params)
    now = optimizer.state_dict()["state"][0]
    for name, x in state["state"][0].items():
        y = now[name]
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y)
        elif isinstance(x, list):
            assert len(x) == len(y)
        else:
            assert x == y, name


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("as_keyword", [False, True])
def test_closures(name, fused, as_keyword):
    nets = network(), network()
    ours, theirs = (build(name, net, {"fused": fused}) for net in nets)
    attach(ours, gc.Norm(0.1))
    clipper = Clipper(nets[1], gc.Norm(0.1))
    for x in batches(4):

        def closure(x=x):
            ours.zero_grad()
            loss = loss_of(nets[0], x)
            loss.backward()
            return loss

        loss = ours.step(closure=closure) if as_keyword else ours.step(closure)
        theirs.zero_grad()
        expected = loss_of(nets[1], x)
        expected.backward()
        clipper.clip_()
        theirs.step()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    same(nets[0].parameters(), nets[1].parameters(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("over", ["all", "tensor", "unit"])
def test_grad_scaler(fused, unscale, over):
    """Scaled by 2**16 and clipped inside step: the same as without a scaler."""
    nets = network(), network()
    ours, theirs = (build("AdamW", net, {"fused": fused}) for net in nets)
    clipper = attach(ours, gc.Norm(0.1, over=over))
    attach(theirs, gc.Norm(0.1, over=over))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step, x in enumerate(batches(8, spike=-1)):
        before = snapshot(nets[0], ours)
        ours.zero_grad()
        scaler.scale(loss_of(nets[0], x)).backward()
        if step == 3:
            nets[0][0].weight.grad[0, 0] = math.inf
        if unscale:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        assert not hasattr(ours, "grad_scale")
        if step == 3:
            assert_unchanged(nets[0], ours, before)
            continue
        theirs.zero_grad()
        loss_of(nets[1], x).backward()
        theirs.step()
        assert torch.all(clipper.info.norm < 100)
    assert scaler.get_scale() == 2.0**15
    same(nets[0].parameters(), nets[1].parameters(), rtol=1e-6, atol=1e-6)


def test_raise_leaves_overflow_to_the_scaler():
    net = network()
    optimizer = build("SGD", net, {"fused": True})
    attach(optimizer, gc.Norm(0.1), on_nonfinite="raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(loss_of(net, torch.ones(2, 5))).backward()
    net[0].weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("fused", [False, True])
def test_accumulation_clips_the_sum_once(fused):
    nets = network(), network()
    ours, theirs = (build("SGD", net, {"fused": fused}) for net in nets)
    clipper = attach(ours, gc.Norm(0.01))
    xs = list(batches(4))
    for x in xs:
        (loss_of(nets[0], x) / 4).backward()
    assert clipper.info is None
    ours.step()
    (sum(loss_of(nets[1], x) for x in xs) / 4).backward()
    Clipper(nets[1], gc.Norm(0.01)).clip_()
    theirs.step()
    same(nets[0].parameters(), nets[1].parameters(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "rule", [gc.Norm(math.inf), gc.Norm(1e9), gc.ZScore(), gc.Relative(1e9)]
)
def test_nothing_clipped_is_the_same_to_the_bit(fused, rule):
    nets = network(), network()
    ours, theirs = (build("AdamW", net, {"fused": fused}) for net in nets)
    attach(ours, rule)
    for x in batches(spike=-1):
        losses = []
        for net, optimizer in zip(nets, (ours, theirs), strict=True):
            optimizer.zero_grad()
            losses.append(loss_of(net, x))
            losses[-1].backward()
            optimizer.step()
        assert torch.equal(*losses)
    same(nets[0].parameters(), nets[1].parameters())


def test_detach():
    net = network()
    optimizer = build("SGD", net, {})
    clipper = attach(optimizer, gc.Norm(1e-6))
    clipper.detach()
    loss_of(net, torch.ones(2, 5)).backward()
    optimizer.step()
    assert clipper.info is None


def test_names_from_the_model_and_from_named_parameters():
    net = network()
    loss_of(net, torch.ones(2, 5)).backward()
    net[2].bias.grad[0] = math.nan
    for optimizer, model in (
        (torch.optim.SGD(net.parameters(), lr=0.1), net),
        (torch.optim.SGD(net.named_parameters(), lr=0.1), None),
    ):
        attach(optimizer, gc.Norm(1.0), model=model, on_nonfinite="raise")
        before = snapshot(net, optimizer)
        with pytest.raises(gc.NonFiniteError, match=r"2\.bias \(1 of 3 elements\)"):
            optimizer.step()
        assert_unchanged(net, optimizer, before)


def test_parameters_added_later_are_clipped_too():
    net, more = network(), torch.nn.Linear(3, 1)
    optimizer = build("SGD", net, {})
    clipper = attach(optimizer, gc.ZScore(over="tensor", warmup=2))
    for x in batches(3):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        optimizer.step()
    optimizer.add_param_group({"params": more.parameters()})
    for x in batches(3):
        optimizer.zero_grad()
        more(net(x)).sum().backward()
        optimizer.step()
    assert clipper.info.norm.shape == (6,)
    assert clipper.state_dict()["0.count"].tolist() == [6, 6, 6, 6, 3, 3]


def test_a_parameter_added_to_a_group_that_is_taken_together_has_its_memory():
    """A warm-up of its own left its part of the norm unclipped."""
    net, more = network(), torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    rule = gc.by_name({"0.bias": gc.Norm(1.0), "*": gc.ZScore(z=0.1, warmup=3)})
    clipper = attach(optimizer, rule, doctor=())
    for x in batches(5):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        optimizer.step()
    optimizer.add_param_group({"params": more.named_parameters()})
    optimizer.zero_grad()
    (1e4 * more(net(torch.ones(6, 5)))).sum().backward()
    optimizer.step()
    assert clipper.info.scale.max() < 1e-3
    assert clipper.state_dict()["0.1.count"][[0, 2, 3, 4, 5]].tolist() == [6] * 5


def test_missing_gradients_teach_nothing():
    net = network()
    clipper = Clipper(net, gc.ZScore(over="tensor", warmup=2))
    for x in batches(3):
        net.zero_grad()
        loss_of(net, x).backward()
        net[0].bias.grad = None
        info = clipper.clip_()
        assert info.finite
    assert clipper.state_dict()["0.count"].tolist() == [3, 0, 3, 3]


def test_too_many_skips_in_a_row():
    net = network()
    optimizer = build("SGD", net, {})
    options = {"max_consecutive_skips": 3, "doctor": ()}
    clipper = attach(optimizer, gc.Norm(1.0), net, **options)
    loss_of(net, torch.ones(2, 5)).backward()
    good = net[0].weight.grad[0, 0].clone()
    for value in (math.nan, math.nan, good, math.nan, math.nan):
        net[0].weight.grad[0, 0] = value
        optimizer.step()
    assert clipper.info.skipped == 4
    said = r"3 steps in a row were skipped, since step 3, .* 0\.weight \(1 of 20 elem"
    with pytest.raises(gc.NonFiniteError, match=said):
        optimizer.step()


def test_learning_rate_schedulers_and_isinstance_still_work():
    net = network()
    optimizer = build("SGD", net, {})
    attach(optimizer, gc.Norm(1.0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for x in batches(3):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        optimizer.step()
        scheduler.step()
    assert type(optimizer) is torch.optim.SGD
    assert scheduler.get_last_lr() == [pytest.approx(0.05 / 8)]


# Torch's own, where torch.compile is first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_names_are_those_without_wrappers(wrap):
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), wrap(torch.nn.Linear(1, 1)))
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert Clipper(model, gc.Norm(1.0)).names == names
    rule = gc.by_name({"1.*": None, "0.*": gc.Norm(1.0)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert attach(optimizer, rule, model).names == names


def through_pickle(things):
    return pickle.loads(pickle.dumps(things))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("attached", [True, False])
def test_a_copy_clips_as_the_original_does(duplicate, attached):
    net = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    clipper = attach(optimizer, gc.Norm(0.5))
    if not attached:
        clipper.detach()
    net, optimizer, clipper = duplicate((net, optimizer, clipper))
    before = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    net(torch.full((8, 4), 100.0)).sum().backward()
    optimizer.step()
    step = torch.nn.utils.parameters_to_vector(net.parameters()).detach() - before
    assert (float(step.norm()) < 0.6) == attached
    clipper.detach()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_that_only_makes_an_empty_state_is_not_counted(tmp_path, in_backward):
    net = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    history = gc.History(tmp_path / "run.jsonl")
    options = {"history": history, "in_backward": in_backward, "doctor": ()}
    clipper = attach(optimizer, gc.Norm(0.5), net, **options)
    if in_backward:
        net.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
        net.bias.requires_grad_(False)
    for _ in range(3):
        net(torch.randn(8, 4)).square().mean().backward()
        if not in_backward:
            optimizer.step()
        optimizer.zero_grad()
        get_optimizer_state_dict(net, optimizer)
    assert int(clipper.state_dict()["step"]) == 3
    assert len(history.norm) == 3
    assert (history.norm > 0).all()


def test_a_resumed_clipper_may_be_loaded_before_the_optimizer():
    def parts():
        net = torch.nn.Linear(4, 1)
        optimizer = torch.optim.Adam(net.parameters())
        return net, optimizer, attach(optimizer, gc.ZScore(warmup=2), doctor=())

    net, optimizer, clipper = parts()
    net(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    saved, state = clipper.state_dict(), get_optimizer_state_dict(net, optimizer)
    net, optimizer, clipper = parts()
    clipper.load_state_dict(saved)
    set_optimizer_state_dict(net, optimizer, state)
    assert {k: v.tolist() for k, v in clipper.state_dict().items()} == {
        k: v.tolist() for k, v in saved.items()
    }


@pytest.mark.parametrize(("size", "limit"), [(1e37, 1e-6), (1e30, 1.0)])
def test_a_factor_that_float32_cannot_hold_is_not_left_to_a_fused_step(size, limit):
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float32))
    optimizer = torch.optim.SGD([p], lr=1.0 / limit, fused=True)
    attach(optimizer, gc.Norm(limit), doctor=())
    p.grad = size * torch.tensor([3.0, 4.0])
    optimizer.step()
    want = torch.tensor([-0.6, -0.8])
    torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=0)


def test_a_report_that_is_read_while_another_thread_clips_is_not_kept(monkeypatch):
    from gradclip.torch import clipper as module

    p = torch.nn.Parameter(torch.zeros(2))
    attached = attach(torch.optim.SGD([p], lr=0.1), gc.Norm(1.0), doctor=())

    def step(size):
        p.grad = size * torch.tensor([3.0, 4.0])
        attached.optimizer.step()

    original = module.in_tensors

    def while_another_step_is_made(info):
        monkeypatch.setattr(module, "in_tensors", original)
        step(10.0)
        return original(info)

    step(1.0)
    monkeypatch.setattr(module, "in_tensors", while_another_step_is_made)
    assert float(attached.info.norm) == 5.0
    assert float(attached.info.norm) == 50.0
    assert attached.info is attached.info


class Outer(torch.optim.SGD):
    """An optimizer whose step is that of another, around which torch puts hooks too."""

    def step(self, closure=None):
        return super().step(closure)


# As soon as one was made anywhere, its class has hooks around its step.
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(
    "rule",
    [gc.Smooth(1.0), gc.Norm(lambda step: 1.0 / (1 + step)), gc.EMA()],
    ids=["bends", "follows a schedule", "remembers"],
)
def test_a_step_within_a_step_is_one(rule, closure, fused):
    nets = network(), network()
    kinds = Outer, torch.optim.SGD
    made = [
        kind(n.parameters(), lr=0.05, fused=fused)
        for n, kind in zip(nets, kinds, strict=True)
    ]
    clippers = [attach(optimizer, rule) for optimizer in made]
    for x in batches():
        for net, optimizer in zip(nets, made, strict=True):

            def evaluate(net=net, optimizer=optimizer, x=x):
                optimizer.zero_grad()
                loss = loss_of(net, x)
                loss.backward()
                return loss

            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
    same(nets[0].parameters(), nets[1].parameters(), rtol=0, atol=0)
    counts = [int(clipper.state_dict()["step"]) for clipper in clippers]
    assert counts == [10, 10]


def test_gradients_stay_hidden_until_the_outer_step_ends():
    class Decaying(Outer):
        def step(self, closure=None):
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                seen.append(p.grad)

    seen = []
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Decaying([p], lr=1.0)
    clipper = attach(optimizer, gc.Norm(1.0))
    p.grad = torch.tensor([math.nan, 1.0])
    optimizer.step()
    assert seen == [None]
    assert int(clipper.info.skipped) == 1
    assert p.grad is not None


@pytest.mark.filterwarnings("ignore:step\\(\\) was called while none")
def test_gradients_that_a_step_makes_for_the_one_inside_are_clipped():
    class Making(Outer):
        def step(self, closure=None):
            with torch.enable_grad():
                (p * torch.tensor([30.0, 40.0])).sum().backward()
            super().step(closure)

    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = Making([p], lr=1.0)
    clipper = attach(optimizer, gc.Norm(1.0))
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(p.detach(), torch.tensor([-1.2, -1.6]))
    assert int(clipper.state_dict()["step"]) == 2


def test_gradients_of_a_step_that_was_interrupted_do_not_mix_with_later_ones():
    p, q = (torch.nn.Parameter(torch.zeros(2)) for _ in "ab")
    optimizer = torch.optim.SGD([p, q], lr=1.0)
    attach(optimizer, gc.Norm(1e9))

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(interrupt)
    p.grad, q.grad = torch.tensor([math.nan, 1.0]), torch.tensor([100.0, 1.0])
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    hook.remove()
    optimizer.zero_grad()
    # The next pass has no use for the second one.
    p.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert p.tolist() == [-3.0, -4.0]
    assert q.tolist() == [0.0, 0.0]


def bad_from(evaluation, net, loss):
    """A closure whose gradients, and maybe whose loss, are NaN from a call on."""
    calls = []

    def evaluate():
        net.zero_grad()
        calls.append(loss_of(net, torch.ones(6, 5)))
        calls[-1].backward()
        if len(calls) > evaluation:
            net[0].weight.grad[0, 0] = math.nan
            return calls[-1] * (math.nan if loss else 1)
        return calls[-1]

    return evaluate


@pytest.mark.parametrize("options", [{"on_nonfinite": "raise"}, {}])
def test_lbfgs_is_where_it_was_when_an_evaluation_raises(options):
    net = network()
    before = copy.deepcopy(net.state_dict())
    search = {"line_search_fn": "strong_wolfe", "max_iter": 10}
    optimizer = torch.optim.LBFGS(net.parameters(), lr=1.0, **search)
    limits = {"max_consecutive_skips": 2}
    clipper = attach(optimizer, gc.Norm(1e9), **limits, **options)
    with pytest.raises(gc.NonFiniteError):
        optimizer.step(bad_from(1, net, loss=True))
    same(net.state_dict().values(), before.values(), rtol=0, atol=0)
    assert not optimizer.state
    # What is loaded then stays.
    with torch.no_grad():
        net[0].bias.fill_(7.0)
    clipper.detach()
    assert net[0].bias.tolist() == [7.0] * 4


@pytest.mark.parametrize("evaluation", [0, 1, 2, 5])
def test_a_line_search_survives_a_loss_of_nan(evaluation):
    net = network()
    before = copy.deepcopy(net.state_dict())
    search = {"line_search_fn": "strong_wolfe", "max_iter": 10}
    optimizer = torch.optim.LBFGS(net.parameters(), lr=1.0, **search)
    clipper = attach(optimizer, gc.Norm(1e9))
    loss = optimizer.step(bad_from(evaluation, net, loss=True))
    same(net.state_dict().values(), before.values(), rtol=0, atol=0)
    assert int(clipper.info.skipped) > 0
    assert bool(loss.isnan()) == (evaluation == 0)


@pytest.mark.parametrize("policy", ["skip", "zero", "ignore", "raise"])
def test_a_rule_learns_nothing_from_what_a_scaler_overflowed_at(policy):
    limits = {}
    for fused in (False, True):
        p, q = (torch.nn.Parameter(torch.zeros(4)) for _ in "ab")
        optimizer = torch.optim.SGD([p, q], lr=0.0, fused=fused)
        rule = gc.EMA(1.1, warmup=2, over="all")
        clipper = attach(optimizer, rule, on_nonfinite=policy)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        for step in range(12):
            optimizer.zero_grad()
            over = 4 <= step < 8
            loss = p.sum() * (0.01 if over else 3.0) + q.sum() * (
                math.inf if over else 4.0
            )
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        limits[fused] = float(clipper.info.limit)
    assert limits[True] == pytest.approx(limits[False])


def test_gradients_made_in_inference_mode_are_clipped():
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([p], lr=1.0)
        attach(optimizer, gc.Norm(1.0))
        for _ in range(2):
            p.grad = torch.tensor([3.0, 4.0])
            optimizer.step()
        torch.testing.assert_close(p, torch.tensor([-1.2, -1.6]))


class ByLoss(torch.optim.SGD):
    """An optimizer whose step takes the loss, as that of Polyak does."""

    def step(self, loss):
        super().step()
        return loss


def test_a_loss_is_no_closure():
    net = network()
    optimizer = ByLoss(net.parameters(), lr=1.0)
    clipper = attach(optimizer, gc.Norm(1e-3))
    loss = loss_of(net, next(batches()))
    loss.backward()
    assert optimizer.step(loss.detach()) == loss
    assert float(clipper.info.norm_after) == pytest.approx(1e-3)
