"""Steps with a clip in them compile whole; `test_twins.py` compiles every rule."""

import math

import pytest
import torch

import gradclip as gc
from gradclip.torch import Clipper, attach, clip_grad_norm_, clip_grad_value_


def parameters(seed=0, size=3.0):
    torch.manual_seed(seed)
    params = [torch.zeros(3, 4), torch.zeros(5), torch.zeros(())]
    for p in params:
        p.grad = size * torch.randn(p.shape)
    return params


def compiled(step):
    torch.compiler.reset()
    return torch.compile(step, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_clip_grad_norm_compiles_whole(p):
    def step(params):
        norm = clip_grad_norm_(params, 1.0, p)
        for q in params:
            q.sub_(0.1 * q.grad)
        return norm

    fast = compiled(step)
    ours, theirs = parameters(), parameters()
    for seed in range(3):
        for params in (ours, theirs):
            for q, new in zip(params, parameters(seed), strict=True):
                q.grad.copy_(new.grad)
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            norm = fast(ours)
        torch.testing.assert_close(norm, step(theirs), rtol=1e-6, atol=0)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_clip_grad_value_compiles_whole():
    fast = compiled(lambda params: clip_grad_value_(params, 0.5))
    params = parameters()
    fast(params)
    assert max(float(p.grad.abs().max()) for p in params) == 0.5


@pytest.mark.parametrize("attached", [False, True])
def test_a_compiled_module_is_taken_like_any_other(attached):
    # It says that it has a length, and then has none.
    net = torch.compile(torch.nn.Linear(2, 1, bias=False), backend="eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    rule = gc.by_name({"weight": gc.Norm(1.0)})
    clipper = attach(optimizer, rule, net) if attached else Clipper(net, rule)
    net(torch.tensor([[3.0, 4.0]])).sum().backward()
    (optimizer.step if attached else clipper.clip_)()
    assert float(clipper.info.norm.sum()) == 5


# array-api-compat caches the look-up of a namespace, of which Dynamo wants to be told.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")
@pytest.mark.parametrize("rule", [gc.Percentile(window=5), gc.ZScore(warmup=3)])
def test_a_memory_goes_on_between_compiled_and_other_steps(rule):
    # Steps that are not compiled count in numbers, and compiled ones in tensors.
    torch.compiler.reset()
    clippers = [Clipper(parameters(), rule, doctor=()) for _ in range(2)]
    fast = torch.compile(clippers[0].clip_, backend="aot_eager")
    for i in range(16):
        plain = clippers[0].clip_ if i % 8 < 4 else fast
        infos = []
        for clipper, clip in zip(clippers, (plain, clippers[1].clip_), strict=True):
            for p, new in zip(
                clipper.params, parameters(i, 1 + 9 * (i % 5 == 4)), strict=True
            ):
                p.grad = new.grad
            infos.append(clip())
        for a, b in zip(*infos, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    one, two = (clipper.state_dict() for clipper in clippers)
    assert int(one["step"]) == 16
    for name, x in two.items():
        torch.testing.assert_close(one[name], x, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "options", "bad"),
    [
        (torch.optim.SGD, {"fused": True}, False),
        (torch.optim.AdamW, {"fused": True}, True),
        (torch.optim.AdamW, {}, True),
    ],
)
def test_a_compiled_step_clips_as_another_one(kind, options, bad):
    torch.compiler.reset()
    sides = []
    for compiles in (False, True):
        params = parameters()
        optimizer = kind(params, lr=0.1, **options)
        attached = attach(optimizer, gc.Norm(0.1), doctor=())
        step = optimizer.step
        if compiles:
            step = torch.compile(lambda call=step: call(), backend="aot_eager")
        for i in range(4):
            for p, new in zip(params, parameters(i), strict=True):
                p.grad = new.grad * (math.nan if bad and i == 2 else 1)
            step()
        sides.append((params, attached.info))
    for a, b in zip(*(params for params, _ in sides), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert int(sides[0][1].skipped) == int(sides[1][1].skipped) == bad
