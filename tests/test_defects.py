"""What published clippers get wrong, as one table: gradclip passes, and they fail."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import gradclip as gc
import published
from published import norm_of, torch_clip


def noise(count, seed=0):
    return list(np.random.default_rng(seed).lognormal(sigma=0.2, size=count))


def after(step, norms):
    """Return what is left of gradients with these norms, one after the other."""
    unit = torch.tensor([0.6, 0.0, -0.8])
    return [norm_of(step([n * unit])) for n in norms]


def norms_stay_alive(bad, before, later):
    def healthy(make):
        left = after(make(), [*noise(before), bad, *noise(later, 1)])
        return all(0 < n < math.inf for n in left[before + 1 :])

    return healthy


def spike_is_cut(spike, *before):
    def healthy(make):
        return after(make(), [*before, spike])[-1] < 50

    return healthy


def all_spikes_are_dropped(make):
    norms = noise(400)
    spikes = {200: 1000, 250: 400, 290: 300, 330: 100}
    for at, size in spikes.items():
        norms[at] *= size
    left = after(make(), norms)
    return all(left[at] == 0 for at in spikes) and np.count_nonzero(left) == 396


def bad_step_comes_out_finite(bad):
    def healthy(make):
        return math.isfinite(after(make(), [*noise(70), bad])[-1])

    return healthy


def second_tensor_moves_with_the_first(silent):
    def healthy(make):
        step, moved = make(), torch.zeros(2)
        for t, n in enumerate(noise(400)):
            one = torch.tensor([n])
            a, b = step([one, one * 0 if t < silent else one])
            moved += torch.tensor([abs(float(a)), abs(float(b))])
        return float(moved[1]) > 0.3 * float(moved[0])

    return healthy


def comes_to(grads, limit, rtol=1e-3):
    def healthy(make):
        left = [x.double() for x in make()(grads)]
        return limit * (1 - rtol) <= norm_of(left) <= limit * (1 + 1e-9)

    return healthy


def comes_out_finite(grads):
    def healthy(make):
        return all(bool(x.isfinite().all()) for x in make()(grads))

    return healthy


def direction_is_kept(make):
    step, grads = make(), [torch.tensor([3.0]), torch.tensor([0.1])]
    for _ in range(20):
        a, b = step(grads)
        step([g / 4 for g in grads])
    return math.isclose(float(a / b), 30.0, rel_tol=1e-5)


def small_ones_stay_small(make):
    return after(make(), [*noise(50), 1e-6])[-1] < 1.1e-6


def clippers_share_nothing(make):
    alone, one, other = make(), make(), make()
    left = []
    for n in noise(60):
        left.append(after(one, [n])[0])
        after(other, [1000 * n])
    return left == after(alone, noise(60))


def half_precision_beside_single(make):
    step, grads = make(), [torch.zeros(2).half(), torch.tensor([7e4, 0.0])]
    return all(norm_of([g.float() for g in step(grads)]) > 0 for _ in range(40))


def first_ones_are_whole(make):
    return after(make(), [1.0] * 30) == pytest.approx([1.0] * 30, rel=1e-6)


def rms_of(make):
    small, large = make()([torch.full((4,), 0.5), torch.full((9,), 10.0)])
    return torch.equal(small, torch.full((4,), 0.5)) and large.max() < 3.4


def zero_weights_can_move(make):
    return norm_of(make()([torch.ones(2, 3)])) > 0


def rows_are_units(make):
    grads = torch.tensor([[9.0, 9.0, 9.0], [1e-4, 1e-4, 1e-4]])
    return torch.equal(make()([grads])[0][1], grads[1])


def ours(rule, weights=None):
    """Return a maker of a gradclip clipper; of a function for a rule without memory."""

    def make():
        clipper = gc.Clipper(rule)
        return lambda grads: clipper.clip(grads, params=weights)[0]

    return make


def optax_clip(grads, limit=1.0):
    """Clip with the installed `optax.clip_by_global_norm`."""
    transform = optax.clip_by_global_norm(limit)
    given = [jnp.asarray(g.numpy()) for g in grads]
    clipped, _ = jax.jit(transform.update)(given, transform.init(given))
    return [torch.tensor(np.asarray(x)) for x in clipped]


@dataclass(frozen=True)
class Defect:
    """What has to be healthy: gradclip's rule is, and what was published is not."""

    theirs: Callable[[], Any]
    ours: Callable[[], Any]
    healthy: Callable[[Any], bool]


def by_torch(limit):
    return lambda: lambda grads: torch_clip(grads, limit)


PLAIN, ZEROS = gc.Norm(1.0), [torch.zeros(2, 3)]
SOME = [torch.arange(1.0, 7.0).reshape(2, 3)]
NAN, INF = math.nan, math.inf
DEFECTS = {
    "pseeth/autoclip 7de6a2f: NaN for ever after one": Defect(
        published.AutoClip, ours(gc.AutoClip()), norms_stay_alive(NAN, 20, 30)
    ),
    "pseeth/autoclip 7de6a2f, TensorFlow: a global limit for each tensor": Defect(
        published.AutoClipOfTensorFlow, ours(gc.AutoClip()), direction_is_kept
    ),
    "autoclip 0.2.1, QuantileClip: NaN for ever after one": Defect(
        published.QuantileClip, ours(gc.Percentile(90)), norms_stay_alive(NAN, 20, 30)
    ),
    "autoclip 0.2.1, StandardClip: NaN from the second step on": Defect(
        published.StandardClip, ours(gc.Deviation(2.0)), norms_stay_alive(1.0, 0, 30)
    ),
    "zclip 1.0.0: after one NaN no spike is cut": Defect(
        lambda: published.ZClip(None),
        ours(gc.ZClip()),
        spike_is_cut(2.2e6, *noise(30), NAN, *noise(19, 1)),
    ),
    "zclip 1.0.0: after one inf no spike is cut": Defect(
        lambda: published.ZClip(None),
        ours(gc.ZClip()),
        spike_is_cut(2.2e6, *noise(30), INF, *noise(19, 1)),
    ),
    "zclip 1.0.0: a norm in the type of the first parameter": Defect(
        published.ZClip, ours(gc.ZClip(max_limit=1.0)), half_precision_beside_single
    ),
    "OLMo-core fa6c501: 128 steps are skipped after a NaN": Defect(
        published.SkipStep,
        ours(gc.Skip(gc.Deviation())),
        norms_stay_alive(NAN, 200, 128),
    ),
    "OLMo-core fa6c501: 128 steps are skipped after an inf": Defect(
        published.SkipStep,
        ours(gc.Skip(gc.Deviation())),
        norms_stay_alive(INF, 200, 128),
    ),
    "OLMo-core fa6c501: a spike hides the next": Defect(
        published.SkipStep, ours(gc.Skip(gc.Deviation())), all_spikes_are_dropped
    ),
    "OLMo-core fa6c501: NaN times 0 is NaN": Defect(
        published.SkipStep,
        ours(gc.Skip(gc.Deviation())),
        bad_step_comes_out_finite(NAN),
    ),
    "SPAM-Optimizer e8185fb: what moves late never does": Defect(
        published.Spam, ours(gc.EMA()), second_tensor_moves_with_the_first(40)
    ),
    "pytorch_optimizer 7a076d2, SPAM: the spike is cut in a copy": Defect(
        lambda: published.Spam(copies=True),
        ours(gc.EMA(warmup=20)),
        spike_is_cut(1e6, *noise(30)),
    ),
    "AdamWClip 0.1.4: from the first step on, nothing is let through": Defect(
        published.AdamWClip,
        ours(gc.Moment(3.0, warmup=1, corrected=True)),
        first_ones_are_whole,
    ),
    "pytorch_optimizer 4.1.0, AdaGC: one zero gradient freezes a tensor": Defect(
        published.AdaGC, ours(gc.EMA()), second_tensor_moves_with_the_first(1)
    ),
    "pytorch_optimizer, AdaGC: divided by the squared norm": Defect(
        lambda: published.AdaGC(squared=True),
        ours(gc.EMA(warmup_limit=1.0)),
        comes_to([torch.tensor([3.0, 4.0])], 1.0),
    ),
    "pytorch_optimizer 7a076d2: small gradients are made larger": Defect(
        lambda: published.synced, ours(PLAIN), small_ones_stay_small
    ),
    "pytorch_optimizer 7a076d2, Adafactor: the bound is the wrong way round": Defect(
        lambda: published.block_rms,
        ours(gc.by_name({"0": gc.Norm(2.0), "1": gc.Norm(10.0)})),
        rms_of,
    ),
    "StableSPAM: small gradients are made larger": Defect(
        published.StableSpam, ours(gc.ZClip()), small_ones_stay_small
    ),
    "smartclip 0.1.1: a spike of the warm-up is never forgotten": Defect(
        published.MedianClip,
        ours(gc.AutoClip(95)),
        spike_is_cut(1e3, *noise(2), 1e6, *noise(397, 1)),
    ),
    "drytorch 0.1.0rc11: a spike is learnt as it came": Defect(
        published.HistClipper,
        ours(gc.ZClip()),
        spike_is_cut(1e3, *noise(50), 1e6, *noise(100, 1)),
    ),
    "drytorch 0.1.0rc11: two clippers share their statistics": Defect(
        published.HistClipper, ours(gc.ZClip()), clippers_share_nothing
    ),
    "composer, AGC: a weight of zeros never trains": Defect(
        lambda: lambda grads: published.agc_of_composer(grads, ZEROS),
        ours(gc.AGC(), ZEROS),
        zero_weights_can_move,
    ),
    "nfnets-pytorch, AGC: columns are taken for units": Defect(
        lambda: lambda grads: published.agc_of_nfnets(grads, SOME),
        ours(gc.AGC(), SOME),
        rows_are_units,
    ),
    "torch: finite gradients of 1e20 become 0": Defect(
        by_torch(1.0), ours(PLAIN), comes_to([torch.full((4,), 1e20)], 1.0)
    ),
    "torch: one inf makes a NaN": Defect(
        by_torch(1.0), ours(PLAIN), comes_out_finite([torch.tensor([INF, 1.0, 2.0])])
    ),
    "torch: bfloat16 ends above the limit": Defect(
        by_torch(1.0),
        ours(PLAIN),
        comes_to([torch.tensor([3.0, 4.0]).bfloat16()], 1.0, rtol=0.01),
    ),
    "torch: small norms are clipped too far": Defect(
        by_torch(1e-7), ours(gc.Norm(1e-7)), comes_to([torch.tensor([2e-7])], 1e-7)
    ),
    "optax: finite float16 gradients become 0": Defect(
        lambda: optax_clip,
        ours(PLAIN),
        comes_to([torch.tensor([300.0, 400.0]).half()], 1.0, rtol=0.01),
    ),
    "optax: finite gradients of 1e20 become 0": Defect(
        lambda: optax_clip, ours(PLAIN), comes_to([torch.full((4,), 1e20)], 1.0)
    ),
    "optax: one inf makes a NaN": Defect(
        lambda: optax_clip,
        ours(PLAIN),
        comes_out_finite([torch.tensor([INF, 1.0, 2.0])]),
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_gradclip_is_healthy(name):
    defect = DEFECTS[name]
    assert defect.healthy(defect.ours)


@pytest.mark.parametrize("name", DEFECTS)
def test_what_was_published_is_not(name):
    defect = DEFECTS[name]
    with np.errstate(all="ignore"):
        assert not defect.healthy(defect.theirs)
