"""What is promised on accelerators, on one that is pretended (see `accelerator`)."""

import itertools
import math

import numpy as np
import pytest
import torch

import gradclip as gc
from accelerator import DEVICE, Accelerator, Far, WaitError, far, near
from fronts import FRONTS, Torch, reported
from gradclip.backends import narrow as narrowed
from gradclip.torch import (
    Clipper,
    attach,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    clipper,
    layout,
)
from gradclip.torch import get_total_norm as total_norm
from gradclip.torch.constants import sent
from gradclip.torch.sharded import Sharded
from gradclip.torch.verbs import InPlace
from table import ROWS
from test_twins import ONE_EACH, Pairs, compare_state, steps
from test_twins import params as weights

STEPS = 8
IN_GRAPHS = [name for name in ONE_EACH if not ROWS[name].make().grows]


class Accelerated(Torch):
    """The clipper on an accelerator, which the host never waits for."""

    def __init__(self, rule, weights):
        self.device = Accelerator()
        with self.device:
            super().__init__(rule, weights, torch.float64)

    def made(self, weight, dtype):
        return far(torch.tensor(weight, dtype=dtype))

    def clip(self, grads):
        for p, held, g in zip(self.named.values(), self.given, grads, strict=True):
            held.near.copy_(torch.tensor(g))
            p.grad = held
        with self.device:
            info = self.step()
        # Where the host knows that a step is dropped, nothing is left of it.
        clipped = [
            np.zeros_like(g) if p.grad is None else p.grad.near.numpy()
            for p, g in zip(self.named.values(), grads, strict=True)
        ]
        return clipped, reported(map(near, info))

    def step(self):
        """Clip once."""
        return self.clip_()

    def state_dict(self):
        with self.device, self.device.waiting():
            saved = self.clipper.state_dict()
        return {name: near(x).numpy() for name, x in saved.items()}


class Graphed(Accelerated):
    """The same in a graph, which is recorded at the second step."""

    def __init__(self, rule, weights):
        super().__init__(rule, weights)
        self.steps = 0

    def step(self):
        self.steps += 1
        if self.steps == 1:
            self.clip_()
        elif self.steps == 2:
            with self.device.capture() as self.replay:
                self.clip_()
        else:
            self.replay()
        return self.clipper.info

    def state_dict(self):
        # The host counts the steps, and has nothing to do in those that are replayed.
        return super().state_dict() | {"step": np.array(self.steps)}


def follow(front, name, host=FRONTS["torch"]):
    """Take a rule through the first steps of the run, beside a clipper on the host."""
    here, there = (make(ROWS[name].make(), weights()) for make in (host, front))
    pairs = Pairs()
    for step, grads in enumerate(itertools.islice(steps(), STEPS)):
        (want, info), (got, told) = here.clip(grads), there.clip(grads)
        for a, b in zip(got, want, strict=True):
            pairs.add(a, b, f"gradients at step {step}")
        # The host stops at a step that is dropped, and an accelerator goes on.
        known = gc.Info._fields if info.kept else ("norm", "finite", "kept", "skipped")
        for field in known:
            pairs.add(getattr(told, field), getattr(info, field), f"{field} at {step}")
    compare_state(pairs, there.state_dict(), here.state_dict(), STEPS)
    pairs.check(1e-9)


@pytest.fixture
def device():
    with Accelerator() as device:
        yield device


@pytest.fixture
def _graphs(monkeypatch):
    """Say that a graph is being recorded, where it is."""
    monkeypatch.setattr(
        clipper,
        "captures",
        lambda p: isinstance(p, Far) and Accelerator.now.graph is not None,
    )


@pytest.mark.parametrize("name", ROWS)
def test_no_rule_makes_the_host_wait(name):
    follow(Accelerated, name)


@pytest.mark.usefixtures("_graphs")
@pytest.mark.parametrize("name", IN_GRAPHS)
def test_every_rule_remembers_inside_of_a_graph(name):
    follow(Graphed, name)


def parameters(shapes=((3, 4), (5,), ()), dtype=torch.float32):
    """Return parameters with gradients on the accelerator, and the same on the host."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in shapes:
        values, grad = torch.randn(2, *shape, generator=generator).to(dtype).unbind()
        pair = [torch.nn.Parameter(make(values)) for make in (far, torch.clone)]
        for p, make in zip(pair, (far, torch.clone), strict=True):
            p.grad = make(grad)
        found.append(pair)
    return map(list, zip(*found, strict=True))


def same(there, here, **tolerances):
    """Compare tensors on the accelerator with those on the host."""
    for a, b in zip(there, here, strict=True):
        torch.testing.assert_close(near(a), b, **tolerances)


FUNCTIONS = {
    "norm": lambda ps: clip_grad_norm_(ps, 0.5),
    "norm-p1": lambda ps: clip_grad_norm_(ps, 0.5, norm_type=1.0),
    "value": lambda ps: clip_grad_value_(ps, 0.5),
    "total": lambda ps: total_norm([p.grad for p in ps]),
    "known": lambda ps: clip_grads_with_norm_(ps, 0.5, ps[0].grad.abs().sum()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_functions_do_not_make_the_host_wait(device, name, dtype):
    there, here = parameters(dtype=dtype)
    got, want = FUNCTIONS[name](there), FUNCTIONS[name](here)
    if want is not None:
        same([got], [want])
    same([p.grad for p in there], [p.grad for p in here])


@pytest.mark.parametrize(
    ("kind", "options", "policy"),
    [
        (torch.optim.AdamW, {"fused": True}, "skip"),
        (torch.optim.SGD, {"fused": True}, "skip"),
        (torch.optim.SGD, {"fused": True, "momentum": 0.9}, "ignore"),
        (torch.optim.AdamW, {"foreach": True}, "ignore"),
        (torch.optim.AdamW, {"foreach": True}, "zero"),
    ],
)
@pytest.mark.parametrize("rule", [gc.Norm(0.5), gc.EMA(warmup=2), gc.Percentile(50)])
def test_a_step_does_not_make_the_host_wait(device, kind, options, policy, rule):
    sides = []
    for params in parameters():
        optimizer = kind(params, lr=0.1, **options)
        attach(optimizer, rule, on_nonfinite=policy)
        sides.append((params, optimizer, [p.grad.clone() for p in params]))
    for step in range(4):
        for params, optimizer, grads in sides:
            for p, g in zip(params, grads, strict=True):
                p.grad = g * 2**step
            optimizer.step()
    same(sides[0][0], sides[1][0])


@pytest.mark.parametrize("rule", [gc.ZScore(warmup=2), gc.Percentile(50, window=5)])
def test_a_memory_moves_to_the_accelerator_with_the_parameters(device, rule):
    # On the host it is held in numbers, which no accelerator takes.
    sides = []
    for _ in range(2):
        optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
        sides.append((optimizer, attach(optimizer, rule, on_nonfinite="ignore")))
    group = sides[0][0].param_groups[0]
    for step in range(8):
        if step == 4:
            group["params"] = [far(group["params"][0].detach()).requires_grad_()]
        for optimizer, _ in sides:
            (p,) = optimizer.param_groups[0]["params"]
            g = torch.full((3,), 1.5 ** (step % 3))
            p.grad = far(g) if isinstance(p, Far) else g
            with device.waiting():
                optimizer.step()
    there, here = (optimizer.param_groups[0]["params"] for optimizer, _ in sides)
    assert isinstance(there[0], Far)
    same(there, here)
    with device.waiting():
        one, two = (attached.state_dict() for _, attached in sides)
    for name, x in two.items():
        torch.testing.assert_close(near(one[name]), x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_step_leaves_out_what_is_not_finite(device, kind):
    params, _ = parameters()
    optimizer = kind(params, lr=0.1, weight_decay=0.1, fused=True)
    attached = attach(optimizer, gc.Norm(0.5))
    optimizer.step()
    before = [near(p).clone() for p in params]
    params[0].grad = far(torch.full((3, 4), torch.nan))
    optimizer.step()
    same(params, before, rtol=0, atol=0)
    assert near(attached.info.skipped) == 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.SGD, {"fused": True, "momentum": 0.9}),
    ],
)
def test_only_the_host_can_stop_other_optimizers(device, kind, options):
    """They would move without gradients, too: the docs say that this step waits."""
    params, _ = parameters()
    optimizer = kind(params, lr=0.1, **options)
    attach(optimizer, gc.Norm(0.5), doctor=())
    with pytest.raises(WaitError):
        optimizer.step()
    with device.waiting():
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"deterministic": True}])
def test_a_history_of_each_tensor_does_not_make_the_host_wait(
    device, tmp_path, options
):
    histories = []
    for side, params in zip(("there", "here"), parameters(), strict=True):
        params[1].grad = None
        history = gc.History(tmp_path / side, tensors_every=1)
        made = clipper.Clipper(params, gc.Norm(0.5), history=history, **options)
        for _ in range(3):
            made.clip_()
            for p in params:
                if p.grad is not None:
                    p.grad = p.grad * 2
        with device.waiting():
            history.close()
        histories.append(gc.History.load(tmp_path / side))
    there, here = histories
    np.testing.assert_allclose(there.norm, here.norm, rtol=1e-6)
    np.testing.assert_allclose(there.tensors.norm, here.tensors.norm, rtol=1e-6)


@pytest.mark.parametrize("rule", [gc.Norm(0.5), gc.ZScore(), gc.Norm(math.inf)])
def test_the_calls_do_not_grow_with_the_tensors(device, rule):
    """Each takes the host some microseconds: norms and products are those of lists.

    To clear what is not finite takes one for each.
    """
    counts = []
    for count in (10, 100):
        params, _ = parameters([(3,)] * count)
        made = clipper.Clipper(params, rule, on_nonfinite="ignore")
        device.calls.clear()
        made.clip_()
        counts.append(len(device.calls))
    assert counts[0] == counts[1]


@pytest.mark.usefixtures("_graphs")
def test_no_graph_has_a_memory_that_grows(device):
    params, _ = parameters()
    made = clipper.Clipper(params, gc.Percentile(50, window=None))
    made.clip_()
    before = near(params[0].grad).clone()
    with (
        device.capture(),
        pytest.raises(ValueError, match=r"window=None.*give it a window"),
    ):
        made.clip_()
    same([params[0].grad], [before], rtol=0, atol=0)


def test_two_devices_do_not_mix(device):
    """What the other tests count on: such a mistake would be seen."""
    with pytest.raises(RuntimeError, match="two devices"):
        torch.add(far(torch.ones(3)), torch.ones(3))
    for wait in (
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x[[0, 1]],
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.copy_(torch.zeros(3)),
    ):
        with pytest.raises(WaitError):
            wait(far(torch.ones(3)))


class Alike(layout.Group):
    """A group of two processes that have the same pieces."""

    def __init__(self):
        self.level, self.size = 0, 2

    def gather(self, row):
        return torch.stack([row, row])


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("over", ["all", "tensor", "unit"])
def test_norms_of_pieces_do_not_make_the_host_wait(device, over, missing):
    there, _ = parameters([(4, 3), (5, 2)])
    ways = [{"line": layout.Way("piece", 1)}] * 2
    whole = layout.Layout(there, ways, {"line": Alike()})
    present = [0] if missing else [0, 1]
    grads = [there[i].grad for i in present]
    verbs = Sharded(whole, gc.Norm(1.0, over=over), present)
    got = near(verbs.measure(grads, over, 2.0))
    twice = [torch.cat([near(g), near(g)], dim=1).double() for g in grads]
    want = InPlace(cells=(2, present)).measure(twice, over, 2.0)
    torch.testing.assert_close(got, want.nan_to_num(0))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "rule",
    [
        gc.by_name({"[[]0]": gc.Norm(0.5), "*": gc.Norm(0.1)}),
        gc.chain(gc.Norm(0.1, over="tensor"), gc.Norm(0.1)),
        gc.EMA(1.05, warmup=1),
    ],
)
def test_rules_over_pieces_do_not_make_the_host_wait(rule):
    there, _ = parameters([(4, 3), (5, 2)])
    clipper = Clipper(there, rule)
    ways = [{"line": layout.Way("piece", 1)}] * 2
    clipper._layout = layout.Layout(there, ways, {"line": Alike()})
    for _ in range(3):
        info = clipper.clip_()
    assert bool(near(info.kept))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("way", ["foreach", "fused"])
def test_the_moment_of_an_optimizer_does_not_make_the_host_wait(way):
    there, here = parameters([(4, 3)])
    rule, grad = gc.Moment(0.5, warmup=1, memory="optimizer"), near(there[0].grad) + 0
    for params in (there, here):
        optimizer = torch.optim.AdamW(params, **{way: True})
        # To skip, a step that is not fused has to wait.
        attach(optimizer, rule, on_nonfinite="ignore", doctor=())
        for step in range(3):
            near(params[0].grad).copy_(grad * (9 if step == 2 else 1))
            optimizer.step()
    same(there, here, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "values", [[True, False, False], [3, 3, 7], [0.5, math.inf], [1 << 40]]
)
def test_constants_are_the_same_on_the_accelerator(device, values):
    got = sent(values, DEVICE)
    assert isinstance(got, Far)
    assert got.near.tolist() == values
    assert got.dtype == torch.tensor(np.array(values)).dtype


class Narrow(Accelerated):
    """The clipper on an accelerator without float64, through the host."""

    def __init__(self, rule, weights):
        self.device = Accelerator(float64=False)
        with self.device, self.device.waiting():
            Torch.__init__(self, rule, weights, torch.float32)

    def step(self):
        with self.device.waiting():
            return self.clip_()


@pytest.fixture
def narrow():
    narrowed._tried.cache_clear()
    with Accelerator(float64=False) as device, device.waiting():
        yield device
    narrowed._tried.cache_clear()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ONE_EACH)
def test_every_rule_clips_where_there_is_no_float64(name):
    """As on the host in float32: `Far` refuses to make any float64."""
    follow(Narrow, name, FRONTS["torch-float32"])


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_functions_clip_where_there_is_no_float64(name):
    there, here = parameters()
    got, want = FUNCTIONS[name](there), FUNCTIONS[name](here)
    if want is not None:
        same([got], [want])
    same([p.grad for p in there], [p.grad for p in here])


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
def test_a_step_clips_where_there_is_no_float64(options):
    sides = list(parameters())
    for side in sides:
        optimizer = torch.optim.AdamW(side, lr=0.1, **options)
        attach(optimizer, gc.Norm(0.5))
        optimizer.step()
        side[0].grad = side[0].grad * torch.nan
        optimizer.step()
    same(*sides)


@pytest.mark.usefixtures("narrow")
def test_arrays_are_clipped_where_there_is_no_float64():
    (there, *_), (here, *_) = parameters()
    got, info = gc.clip({"w": there.grad}, gc.Norm(0.5))
    want, _ = gc.clip({"w": here.grad}, gc.Norm(0.5))
    assert isinstance(got["w"], Far)
    assert bool(info.clipped)
    same([got["w"]], [want["w"]])


@pytest.mark.usefixtures("narrow")
def test_backward_is_no_place_for_the_host():
    params, _ = parameters()
    with pytest.raises(ValueError, match=r"has no float64.*without in_backward"):
        attach(torch.optim.SGD(params), gc.Norm(0.5), in_backward=True)


@pytest.mark.usefixtures("_graphs")
@pytest.mark.parametrize("rule", [gc.Norm(0.5), gc.EMA(warmup=2, over="all")])
def test_a_fused_step_inside_of_a_graph(device, rule):
    there, here = parameters()
    optimizers = [torch.optim.AdamW(ps, lr=0.1, fused=True) for ps in (there, here)]
    clippers = [attach(optimizer, rule, doctor=()) for optimizer in optimizers]
    given = [p.grad.clone() for p in here]
    for step, size in enumerate([1.0, 2.0, 0.5, math.nan, 40.0, 1.0]):
        for p, q, g in zip(there, here, given, strict=True):
            p.grad.near.copy_(g * size)
            q.grad = g * size
        optimizers[1].step()
        if step == 1:
            with device.capture() as replay:
                optimizers[0].step()
        elif step > 1:
            replay()
        else:
            optimizers[0].step()
        same(there, here)
        assert near(clippers[0].info.skipped) == clippers[1].info.skipped
