"""Steps with a clip in them compile whole; `test_twins.py` compiles every rule."""

import math

import pytest
import torch

from gradclip.torch import clip_grad_norm_, clip_grad_value_


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
