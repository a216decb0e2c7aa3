"""`Moment(memory="optimizer")` reads what Adam keeps, and keeps nothing itself."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gradclip as gc
import gradclip.jax
from gradclip.torch import Clipper, attach
from published import AdamWClip

RULE = gc.Moment(3.0, warmup=1, corrected=True, memory="optimizer")
KEEPERS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam]
FUSED = [(kind, {}) for kind in KEEPERS] + [
    (kind, {way: True})
    for kind in (torch.optim.Adam, torch.optim.AdamW)
    for way in ("fused", "foreach", "amsgrad", "maximize")
]


def gradients(count, shape=(4, 3)):
    rng = np.random.default_rng(3)
    for step in range(count):
        g = torch.tensor(rng.normal(size=shape))
        g[0] *= 40 if step % 9 == 5 else 1
        yield g


def parameter(shape=(4, 3), dtype=torch.float64):
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(("kind", "options"), FUSED)
def test_it_clips_as_adamwclip_does(kind, options):
    p, peer, clipped = parameter(), AdamWClip(decay=0.99, warmup=1), 0
    optimizer = kind([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0, **options)
    clipper = attach(optimizer, RULE)
    for g in gradients(60):
        p.grad = g.clone()
        optimizer.step()
        want = peer([g])[0]
        torch.testing.assert_close(p.grad, want, rtol=1e-12, atol=0)
        assert bool(clipper.info.clipped) == (not torch.equal(want, g))
        clipped += int(clipper.info.clipped)
    assert clipped > 6
    assert not [name for name in clipper.state_dict() if "root" in name]


def test_groups_have_decays_of_their_own_and_may_come_later():
    a, b = parameter(), parameter((5,))
    optimizer = torch.optim.AdamW([a], lr=0.1, betas=(0.9, 0.9))
    attach(optimizer, RULE, doctor=())
    peers = [AdamWClip(decay=decay, warmup=1) for decay in (0.9, 0.99)]
    pairs = list(zip(gradients(30), gradients(30, (5,)), strict=True))
    for step, (g, h) in enumerate(pairs):
        if step == 10:
            optimizer.add_param_group({"params": [b], "betas": (0.9, 0.99)})
        a.grad, b.grad = (None if step % 4 == 3 else g.clone()), h.clone()
        optimizer.step()
        if a.grad is not None:
            torch.testing.assert_close(a.grad, peers[0]([g])[0], rtol=1e-12, atol=0)
        if step >= 10:
            torch.testing.assert_close(b.grad, peers[1]([h])[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_seen_through(fused):
    plain, scaled = (parameter(dtype=torch.float32) for _ in range(2))
    one, other = (
        torch.optim.AdamW([p], lr=0.1, eps=1.0, fused=fused) for p in (plain, scaled)
    )
    attach(one, RULE), attach(other, RULE)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for g in gradients(20):
        plain.grad = g.float()
        one.step()
        other.zero_grad()
        scaler.scale((scaled * g.float()).sum()).backward()
        scaler.step(other)
        scaler.update()
    torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-6)


def test_complex_numbers_and_half_precision():
    z = parameter((2,), torch.complex128)
    h = parameter((2,), torch.bfloat16)
    optimizer = torch.optim.AdamW([z, h], lr=0.1)
    attach(optimizer, RULE)
    for size in (1.0, 1.0, 100.0):
        z.grad = torch.full((2,), size * (0.6 + 0.8j), dtype=torch.complex128)
        h.grad = torch.full((2,), size, dtype=torch.bfloat16)
        optimizer.step()
    assert z.grad.abs().tolist() == pytest.approx([3.0, 3.0])
    assert h.grad.tolist() == pytest.approx([3.0, 3.0], rel=2e-2)


def test_a_broken_step_teaches_the_optimizer_nothing():
    p = parameter((2,))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    clipper = attach(optimizer, RULE)
    for bad in (1.0, float("nan"), float("inf"), 1.0):
        p.grad = torch.tensor([bad, 1.0], dtype=torch.float64)
        optimizer.step()
        assert bool(clipper.info.finite) == (bad == 1.0)
    assert float(optimizer.state[p]["step"]) == 2
    assert not clipper.info.clipped


def test_a_saved_run_goes_on():
    runs = [parameter(), parameter()]
    made = [torch.optim.AdamW([p], lr=0.1) for p in runs]
    clippers = [attach(made[0], RULE), None]
    for step, g in enumerate(gradients(30)):
        if step == 12:
            runs[1].data.copy_(runs[0])
            made[1].load_state_dict(copy.deepcopy(made[0].state_dict()))
            clippers[1] = attach(made[1], RULE)
            clippers[1].load_state_dict(clippers[0].state_dict())
        for p, optimizer in zip(runs, made, strict=True):
            p.grad = g.clone()
            if p is runs[0] or step >= 12:
                optimizer.step()
    assert torch.equal(*runs)


def test_where_there_is_no_such_memory_it_is_refused():
    p = parameter()
    others = [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adamax]
    for kind in others:
        with pytest.raises(ValueError, match=f"{kind.__name__} is none of them"):
            attach(kind([p], lr=0.1), RULE)
    with pytest.raises(ValueError, match="there is no optimizer here"):
        Clipper([p], RULE)
    with pytest.raises(ValueError, match="there is no optimizer here"):
        gc.Clipper(RULE).clip(np.ones(3))
    with pytest.raises(ValueError, match="there is no optimizer here"):
        gradclip.jax.as_optax(RULE).init(jnp.ones(3))
    with pytest.raises(ValueError, match="memory='adam'"):
        gc.Moment(memory="adam")
    optimizer = torch.optim.AdamW([p], lr=0.1)
    own = Clipper([p], gc.Moment(3.0)).state_dict()
    with pytest.raises(ValueError, match="the state belongs to"):
        attach(optimizer, RULE).load_state_dict(own)
