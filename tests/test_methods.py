"""What the papers promise, and what the published code gets wrong, method by method."""

import functools
import math

import jax
import numpy as np
import optax
import pytest
import torch

import gradclip as gc
import gradclip.backends
import gradclip.jax
from gradclip.torch import Clipper, attach
from table import ROWS, STATEFUL


def limits(rule, norms):
    clipper = gc.Clipper(rule)
    return [float(np.ravel(clipper.clip(np.array([n]))[1].limit)[0]) for n in norms]


def scales(rule, norms):
    clipper = gc.Clipper(rule)
    return [float(np.ravel(clipper.clip(np.array([n]))[1].scale)[0]) for n in norms]


def noise(count, seed=0):
    return np.random.default_rng(seed).lognormal(sigma=0.2, size=count)


# What published code does when a run is not clean; each was seen by running it.
DEFECTS = {
    "one NaN": ("pseeth/autoclip: every later gradient is NaN", math.nan),
    "one inf": ("allenai/OLMo-core fa6c501: the next 128 steps are skipped", math.inf),
    "one zero": ("pytorch_optimizer 4.1.0, AdaGC: the tensor is frozen", 0.0),
}


@functools.cache
def run_without_defects(name):
    """Return the gradients of some steps, and what a rule makes of them."""
    clipper, found = gc.Clipper(ROWS[name].make()), []
    for n in noise(60):
        grads = [np.array([n, 0.5 * n]), np.array(0.3 * n)]
        found.append((grads, clipper.clip(grads)[0]))
    return found


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("when", [0, 3, 40])
def test_one_bad_step_changes_nothing_afterwards(name, defect, when):
    bad, hit = DEFECTS[defect][1], gc.Clipper(ROWS[name].make())
    for step, (grads, clean) in enumerate(run_without_defects(name)):
        if step == when:
            hit.clip([np.array([bad, 0.0]), np.array(bad)])
        clipped, _ = hit.clip(grads)
        for x, y in zip(clean, clipped, strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_rule_without_the_guard_fails_that_test():
    class Naive(gc.ZScore):
        def update(self, seen, state):
            limit, _ = super().update(seen, state)
            return limit, {k: 0.9 * x + 0.1 * seen.norm for k, x in state.items()}

    clipper = gc.Clipper(Naive(), on_nonfinite="ignore")
    clipper.clip(np.array([math.nan]))
    assert np.isnan(clipper.state_dict()["0.mean"])


@pytest.mark.parametrize("name", ["ema-tensor", "zscore-tensor", "percentile-tensor"])
def test_a_tensor_seen_late_learns_like_the_others(name):
    # TianjinYellow/SPAM-Optimizer e8185fb freezes what first moves after step 20.
    clipper = gc.Clipper(ROWS[name].make())
    for n in noise(40):
        clipper.clip([np.array([n]), np.array([0.0])])
    for n in noise(200, seed=1):
        _, info = clipper.clip([np.array([n]), np.array([n])])
    assert info.scale[1] > 0.3


@pytest.mark.parametrize("name", STATEFUL)
def test_a_spike_while_warming_up_is_forgotten(name):
    rule = ROWS[name].make()
    norms = noise(400)
    norms[2] = 1e6
    clipper = gc.Clipper(rule)
    for n in norms:
        clipper.clip([np.array([n, 0.0]), np.array(n)])
    _, info = clipper.clip([np.array([1e6, 0.0]), np.array(1e6)])
    assert np.all(np.asarray(info.norm_after) < 2e4)


def test_spikes_that_were_dropped_do_not_hide_the_next():
    # OLMo-core keeps them in its window, and lets 400x, 300x and 100x pass afterwards.
    clipper = gc.Clipper(gc.Skip(gc.Deviation()))
    norms = 1 + 0.1 * np.random.default_rng(0).normal(size=400)
    norms[[200, 250, 290, 330]] *= [1000, 400, 300, 100]
    kept = [bool(clipper.clip(np.array([n]))[1].kept) for n in norms]
    assert [i for i, k in enumerate(kept) if not k] == [200, 250, 290, 330]


def test_skip_deviation_is_the_rule_of_olmo_core():
    norms = list(noise(300))
    norms[180] = 40.0
    for got, t in zip(limits(gc.Skip(gc.Deviation()), norms), range(300), strict=True):
        past = [n for i, n in enumerate(norms[:t]) if i != 180][-128:]
        if len(past) >= 64:
            want = np.mean(past) + 6 * np.std(past, ddof=1)
            np.testing.assert_allclose(got, want, rtol=1e-12)
        else:
            assert got == math.inf


def test_norms_that_are_all_alike_are_never_dropped():
    clipper = gc.Clipper(gc.Skip(gc.Deviation(window=9, warmup=2)))
    assert all(clipper.clip(np.array([0.1]))[1].kept for _ in range(50))


@pytest.mark.parametrize("c", [1e-12, 1e-3, 3.0, 1e12])
@pytest.mark.parametrize("name", ["Percentile", "ZScore", "EMA", "Deviation"])
def test_a_loss_times_a_constant_changes_no_factor(name, c):
    norms = noise(150)
    norms[70::25] *= 30
    rule = getattr(gc, name)
    got, want = scales(rule(), c * norms), scales(rule(), norms)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert min(want) < 1


def test_percentile_clips_its_share():
    below = np.mean(np.array(scales(gc.AutoClip(q=10, window=None), noise(3000))) < 1)
    assert 0.88 < below < 0.92
    assert min(scales(gc.AutoClip(q=100), noise(100))) == 1
    norms = noise(100)
    floor = limits(gc.AutoClip(q=0, window=None), norms)
    np.testing.assert_array_equal(floor, np.minimum.accumulate(norms))


@pytest.mark.parametrize("q", [10.0, 50.0, 90.0])
def test_quantile_settles_where_its_share_passes(q):
    below = np.array(scales(gc.Quantile(q, rate=0.05), noise(4000)))[500:] == 1
    assert np.mean(below) == pytest.approx(q / 100, abs=0.02)


def test_quantile_moves_by_its_rate_whatever_the_spike():
    got = limits(gc.Quantile(50.0, rate=0.2), [1.0, 0.5, 1e30, 1.0])
    np.testing.assert_allclose(got, np.exp([0.0, -0.1, -0.2, -0.1]))


def test_bands_of_module_groups_hold_from_both_sides():
    band = gc.AGGC(0.5, 2.0, over="all")
    rule = gc.by_name({"*.q": band, "*.k": band, "*": None})
    clipper, size = gc.Clipper(rule), np.array([3.0, 4.0])
    for spike in (1.0, 1.0, 100.0):
        grads = {"0.q": size, "1.q": spike * size, "0.k": 1e-6 * size, "1.v": size}
        if spike == 1.0:
            grads["0.k"] = size
        clipped, info = clipper.clip(grads)
    together = np.concatenate([clipped["0.q"], clipped["1.q"]])
    assert np.linalg.norm(together) == pytest.approx(2 * 50**0.5)
    assert np.linalg.norm(clipped["0.k"]) == pytest.approx(2.5)
    np.testing.assert_array_equal(clipped["1.v"], size)
    assert info.scale[2] == pytest.approx(0.5e6)


def test_ema_warms_up_under_one_limit_for_all_tensors():
    clipper = gc.Clipper(gc.AdaGC(warmup=2, warmup_limit=1.0))
    clipped, info = clipper.clip([np.array([3.0]), np.array([4.0])])
    np.testing.assert_allclose([clipped[0][0], clipped[1][0]], [0.6, 0.8], rtol=1e-14)
    clipped, info = clipper.clip([np.array([0.3]), np.array([0.4])])
    assert not info.clipped
    _, info = clipper.clip([np.array([30.0]), np.array([0.1])])
    np.testing.assert_allclose(info.limit, [1.05 * 0.3, 1.05 * 0.4], rtol=1e-14)


def carried(clipper):
    return lambda g: float(clipper.clip(np.array(g))[0])


def sgd(clipped, steps=60_000, lr=1e-3):
    """Return where SGD on (x - ξ)² / 2 settles; ξ is 10 in a tenth of draws, else 0."""
    rng, x, tail = np.random.default_rng(0), 1.0, []
    for xi in 10.0 * (rng.random(steps) < 0.1):
        x -= lr * clipped(x - xi)
        tail.append(x)
    return np.mean(tail[steps // 4 :])


@pytest.mark.parametrize("c", [0.5, 2.0, 5.0])
def test_clipped_sgd_is_biased_by_as_much_as_theory_says(c):
    # The optimum is 1; a draw of 10 counts for c only, which balances at c / 9.
    assert sgd(lambda g: math.copysign(min(abs(g), c), g)) == pytest.approx(
        c / 9, abs=0.03
    )


def test_what_is_carried_over_removes_the_bias():
    plain = sgd(lambda g: g, 10_000, lr=3e-3)
    assert plain == pytest.approx(1.0, abs=0.15)
    assert sgd(carried(gc.UClip(gc.Norm(2.0))), 10_000, lr=3e-3) == pytest.approx(
        plain, abs=0.03
    )


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_nothing_is_lost_by_carrying(make):
    rng = np.random.default_rng(0)
    run = [{"a": rng.normal(size=3) * 5, "b": rng.normal(size=2)} for _ in range(20)]
    clipper = gc.UClip(gc.Norm(2.0))
    kept = [clipper.clip({k: make(g) for k, g in grads.items()})[0] for grads in run]
    for i, name in enumerate("ab"):
        total = sum(np.asarray(k[name]) for k in kept) + np.asarray(clipper.carried[i])
        np.testing.assert_allclose(total, sum(g[name] for g in run), rtol=1e-12)


def test_carrying_survives_a_bad_step_and_a_checkpoint():
    first, second = gc.UClip(gc.Value(1.0)), gc.UClip(gc.Value(1.0))
    grads = np.array([4.0, -0.5])
    first.clip(grads, out=grads)
    first.clip(np.array([math.nan, 1.0]))
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        a, _ = first.clip(np.zeros(2))
        b, _ = second.clip(np.zeros(2))
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, [1.0, 0.0])


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("carried.0", None, "'carried.0' is missing among 1"),
        ("carried.1", None, "1 arrays for 2 names"),
        ("carried.7", np.zeros(1), "'carried.2' is missing among 3"),
        ("carried.0", np.array([np.nan, 0.0]), "NaN or infinity for 'carried.0'"),
        ("carried.1", np.array([np.inf]), "NaN or infinity for 'carried.1'"),
        ("carried.0", [1.0, "x"], "which are no numbers"),
        ("carried.0", np.zeros(3), r"has \(3,\) .* 'a', but this .* \(2,\)"),
        ("carried_names", np.array([255], np.uint8), "'carried_names' is no text"),
        ("carried_names", np.zeros(0, np.uint8), "2 arrays for 0 names"),
        ("rule", np.zeros(0, np.uint8), "0 names for 'rule'"),
    ],
)
def test_a_damaged_state_of_what_is_carried_changes_nothing(name, value, told):
    grads = {"a": np.array([4.0, -3.0]), "b": np.array([2.0])}
    first, second = gc.UClip(gc.Value(1.0)), gc.UClip(gc.Value(1.0))
    for _ in range(3):
        first.clip(grads)
    second.clip(grads)
    before = second.state_dict()
    damaged = {**first.state_dict(), name: value}
    damaged = {k: x for k, x in damaged.items() if x is not None}
    with pytest.raises(ValueError, match=told):
        second.load_state_dict(damaged)
    for key, x in second.state_dict().items():
        np.testing.assert_array_equal(x, before[key])
    with pytest.raises(ValueError, match="but NoneType"):
        second.load_state_dict(None)


def test_what_is_carried_is_copied_and_may_come_from_json():
    first, second = gc.UClip(gc.Value(1.0)), gc.UClip(gc.Value(1.0))
    first.clip([np.array([4.0, -3.0]), np.array(2.0)])
    saved = first.state_dict()
    second.load_state_dict(saved)
    saved["carried.0"][...] = 99.0
    assert second.state_dict()["carried.0"].tolist() == [3.0, -2.0]
    lists = {k: x.tolist() for k, x in first.state_dict().items()}
    second.load_state_dict(lists)
    # Earlier versions saved no names.
    third = gc.UClip(gc.Value(1.0))
    third.load_state_dict({k: x for k, x in lists.items() if k != "carried_names"})
    for clipper in (first, second, third):
        clipped, _ = clipper.clip([np.zeros(2), np.array(0.0)])
        assert [x.tolist() for x in clipped] == [[1.0, -1.0], 1.0]


def test_smooth_is_the_limit_of_neither_too_much_nor_too_little():
    sizes = np.logspace(-300, 300, 61)
    for curve, bent in (("ratio", lambda n: n / (1 + n)), ("tanh", np.tanh)):
        rule = gc.Smooth(1.0, curve=curve)
        after = [gc.clip(np.array([n]), rule)[1].norm_after for n in sizes]
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(after, [min(bent(n), 1.0) for n in sizes], 1e-12)


def test_normalize_with_padding_is_automatic_clipping():
    for n in (1e-4, 1.0, 1e4):
        _, info = gc.clip(np.array([n]), gc.Normalize(eps=0.01))
        np.testing.assert_allclose(info.scale, 1 / (n + 0.01), rtol=1e-14)


@pytest.mark.parametrize("mode", ["adaptive", "mean", "threshold"])
def test_modes_of_zscore(mode):
    clipper = gc.Clipper(gc.ZScore(z=2.0, warmup=4, mode=mode))
    for n in (1.0, 3.0, 1.0, 3.0):
        clipper.clip(np.array([n]))
    _, info = clipper.clip(np.array([10.0]))
    want = {"adaptive": 2 + 4 * 1 / 8, "mean": 2.0, "threshold": 2 + 2 * 1}[mode]
    np.testing.assert_allclose(info.limit, want, rtol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_a_dropped_step_leaves_torch_as_it_was_to_the_bit(make, fused):
    more = {"momentum": 0.9} if make is torch.optim.SGD else {}
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = make([p], lr=0.1, fused=fused, **more)
    clipper = attach(optimizer, gc.Skip(gc.Norm(1.0)))
    p.grad = torch.tensor([0.1, 0.2, 0.3])
    optimizer.step()
    before = p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    assert torch.equal(p, before[0])
    assert all(torch.equal(v, before[1][k]) for k, v in optimizer.state[p].items())
    assert torch.equal(p.grad, torch.tensor([1.0, 2.0, 3.0]))
    assert not clipper.info.kept
    assert bool(clipper.info.finite)
    assert (int(clipper.info.skipped), float(clipper.info.scale)) == (1, 0.0)
    assert float(clipper.info.norm_after) == 0


@pytest.mark.parametrize(
    "inner",
    [
        gc.RMS(1.0),
        gc.by_name({"a": gc.Norm(2.0), "*": None}),
        gc.by_name({"a": gc.AGC(1.0), "*": gc.ZScore(warmup=1)}),
        gc.Norm(lambda step: 2.0),
    ],
)
def test_a_step_is_dropped_by_rules_that_know_names_and_shapes(inner):
    clipper = gc.Clipper(gc.Skip(inner))
    weights = {"a": np.ones(4), "b": np.ones(2)}
    for size, kept in ((0.1, True), (9.0, False), (0.1, True)):
        grads = {"a": np.full(4, size), "b": np.full(2, 0.5)}
        clipped, info = clipper.clip(grads, params=weights)
        assert bool(info.kept) == kept
        assert np.any(clipped["b"]) == kept


def test_a_clipper_drops_gradients_beyond_the_limit():
    p = torch.nn.Parameter(torch.ones(2))
    clipper = Clipper([p], gc.Skip(gc.Norm(1.0)), max_consecutive_skips=3)
    for _ in range(2):
        p.grad = torch.tensor([3.0, 4.0])
        clipper.clip_()
        assert p.grad is None
    p.grad = torch.tensor([3.0, 4.0])
    with pytest.raises(gc.NonFiniteError, match=r"since step 0, .* limit of a Skip"):
        clipper.clip_()


@pytest.mark.parametrize(
    "rule", [gc.Normalize(), gc.Smooth(1.0), gc.Skip(gc.Norm(1.0))]
)
def test_what_skip_refuses(rule):
    with pytest.raises(ValueError, match=r"chain\(a, Skip\(b\)\)"):
        gc.Skip(rule)
    with pytest.raises(TypeError, match="give a rule"):
        gc.Skip(1.0)


GROUPS = gc.by_name(
    {"embed.*": gc.Norm(0.1), "head": None, "*": gc.Norm(1.0, over="tensor")}
)


def named():
    rng = np.random.default_rng(0)
    return {
        "embed": [rng.normal(size=(4, 3)), rng.normal(size=4)],
        "head": rng.normal(size=7),
        "body": {"w": rng.normal(size=(3, 3)), "b": rng.normal(size=3)},
    }


def test_groups_by_name():
    grads = named()
    clipped, info = gc.clip(grads, GROUPS)
    want, _ = gc.clip(grads["embed"], gc.Norm(0.1))
    for a, b in zip(clipped["embed"], want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    np.testing.assert_array_equal(clipped["head"], grads["head"])
    for name, g in grads["body"].items():
        want, _ = gc.clip(g, gc.Norm(1.0))
        np.testing.assert_allclose(clipped["body"][name], want, rtol=1e-12)
    assert info.norm.shape == (5,)


def test_groups_of_torch_parameters_some_without_a_gradient():
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Linear(3, 3), "head": torch.nn.Linear(3, 2)}
    )
    rule = gc.by_name({"*.bias": None, "embed.*": gc.Norm(0.5), "*": gc.Norm(1.0)})
    clipper = Clipper(model, rule)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    model["head"].weight.grad = None
    clipper.clip_()
    assert float(model["embed"].weight.grad.norm()) == pytest.approx(0.5)
    assert torch.equal(model["embed"].bias.grad, torch.full((3,), 3.0))


def test_groups_measure_once(monkeypatch):
    calls = []
    engine = type(gc.backends.find_backend([("", np.ones(1))]))
    measure = engine.measure
    monkeypatch.setattr(
        engine, "measure", lambda *args: (calls.append(args[2]), measure(*args))[1]
    )
    gc.clip(named(), GROUPS)
    assert calls == ["tensor"]


MIXED = gc.by_name(
    {
        "embed.*": gc.AGC(0.1),
        "head": gc.Normalize(2.0),
        "body.w": gc.Norm(0.3, over="unit"),
        "*": gc.RMS(0.01),
    }
)


def test_groups_of_rows_tensors_and_lengths_are_measured_once(monkeypatch):
    calls = []
    engine = type(gc.backends.find_backend([("", np.ones(1))]))
    measure = engine.measure
    monkeypatch.setattr(
        engine, "measure", lambda *args: (calls.append(args[2]), measure(*args))[1]
    )
    grads, weights = named(), named()
    clipped, info = gc.clip(grads, MIXED, params=weights)
    assert calls.count("unit") == len(calls) == 2, "gradients once, parameters once"
    want, _ = gc.clip(grads["embed"], gc.AGC(0.1), params=weights["embed"])
    for a, b in zip(clipped["embed"], want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert np.linalg.norm(clipped["head"]) == pytest.approx(2.0)
    rows = np.linalg.norm(clipped["body"]["w"], axis=1)
    np.testing.assert_allclose(rows, 0.3, rtol=1e-12)
    assert np.sqrt(np.mean(clipped["body"]["b"] ** 2)) == pytest.approx(0.01)
    assert info.norm.shape == (4 + 1 + 1 + 3 + 1,)


def test_a_row_rule_beside_a_memory_when_gradients_come_and_go():
    rule = gc.by_name({"0.*": gc.Norm(0.5, over="unit"), "*": gc.EMA(warmup=2)})
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    clipper, alone = Clipper(model, rule), gc.Clipper(gc.EMA(warmup=2))
    rng = np.random.default_rng(0)
    for step in range(12):
        grads = {n: rng.normal(size=p.shape) for n, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.grad = torch.tensor(grads[name], dtype=torch.float32)
        if step % 3 == 1:
            model[0].weight.grad = model[1].bias.grad = None
            grads["1.bias"] = np.zeros(2)
        info = clipper.clip_()
        want, _ = alone.clip([grads["1.weight"], grads["1.bias"]])
        np.testing.assert_allclose(model[1].weight.grad, want[0], rtol=1e-5)
        if model[1].bias.grad is not None:
            np.testing.assert_allclose(model[1].bias.grad, want[1], rtol=1e-5)
            rows = torch.linalg.vector_norm(model[0].weight.grad, dim=1)
            assert torch.all(rows <= 0.5)
        assert info.finite


def test_a_replay_knows_the_groups(tmp_path):
    rule = gc.by_name({"a": gc.Norm(1.0), "*": None})
    clipper = gc.Clipper(rule, history=gc.History(tmp_path / "run.jsonl"))
    history = gc.History(tmp_path / "tensors.jsonl", tensors_every=1)
    history.begin(rule)
    for step, norms in enumerate([[2.0, 9.0], [0.5, 3.0]]):
        history.record_tensors(step, ("a", "b"), np.array(norms))
        _, info = clipper.clip({"a": np.array(norms[0]), "b": np.array(norms[1])})
        history.record(step, info)
    np.testing.assert_allclose(gc.replay(history, rule).scale, [0.5, 1.0])
    with pytest.raises(ValueError, match="shapes"):
        gc.replay(history, gc.RMS(1.0))


def test_block_rms_is_that_of_optax():
    grads = named()
    clipped, _ = gc.clip(grads, gc.RMS(0.3))
    want, _ = optax.clip_by_block_rms(0.3).update(grads, optax.EmptyState())
    for a, b in zip(jax.tree.leaves(clipped), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    total = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
    clipped, info = gc.clip(grads, gc.RMS(0.3, over="all"))
    assert info.limit == pytest.approx(0.3 * total.size**0.5)
    after = np.concatenate([np.ravel(g) for g in jax.tree.leaves(clipped)])
    assert np.sqrt(np.mean(after**2)) == pytest.approx(0.3)


def test_what_groups_refuse():
    with pytest.raises(ValueError, match="no pattern fits 'b'"):
        gc.clip({"a": np.ones(1), "b": np.ones(1)}, gc.by_name({"a": None}))
    chained = gc.chain(gc.Norm(1.0), gc.Normalize())
    for rule in (gc.Value(1.0), gc.Norm(1.0, p=1), gc.Skip(gc.Norm(1.0)), chained):
        with pytest.raises(ValueError, match="a clipper of their own"):
            gc.by_name({"*": rule})
    with pytest.raises(ValueError, match="give them one axis"):
        gc.by_name({"a": gc.AGC(), "*": gc.AGC(axis=-1)})
    with pytest.raises(TypeError, match="or None"):
        gc.by_name({"*": 1.0})
    with pytest.raises(ValueError, match="at least one pattern"):
        gc.by_name({})


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_units_lie_along_any_axis(axis):
    g = np.random.default_rng(0).normal(size=(3, 4, 5))
    clipped, _ = gc.clip(g, gc.Norm(0.5, over="unit", axis=axis))
    others = tuple(i for i in range(3) if i != axis % 3)
    norms = np.sqrt((clipped**2).sum(others))
    np.testing.assert_allclose(norms, 0.5, rtol=1e-12)
    model = torch.nn.Parameter(torch.zeros(3, 4, 5, dtype=torch.float64))
    model.grad = torch.tensor(g)
    Clipper([model], gc.Norm(0.5, over="unit", axis=axis)).clip_()
    np.testing.assert_allclose(model.grad.numpy(), clipped, rtol=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [
        optax.cosine_decay_schedule(1.0, 8),
        optax.linear_schedule(1.0, 0.5, 8),
        lambda step: 1 / (1 + step),
    ],
)
def test_schedules_of_any_library_on_all_fronts(schedule):
    want = [float(schedule(step)) for step in range(6)]
    rule = gc.Norm(schedule)
    assert limits(rule, [9.0] * 6) == want
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper, transform = attach(optimizer, rule), gradclip.jax.as_optax(rule)
    state = transform.init(np.zeros(2))
    for limit in want:
        weight.grad = torch.tensor([3.0, 4.0])
        optimizer.step()
        _, state = jax.jit(transform.update)(np.full(2, 9.0), state)
        assert [float(clipper.info.limit), float(state.info.limit)] == [
            pytest.approx(limit, rel=1e-6)
        ] * 2


def test_schedules_are_any_function_of_the_step():
    rules = [gc.Norm(lambda step: 1.0 / (1 + step)), gc.Smooth(lambda step: 2.0 + step)]
    assert limits(rules[0], [9.0] * 4) == [1.0, 0.5, 1 / 3, 0.25]
    assert limits(rules[1], [2.0, 3.0]) == [1.0, 1.5]
    for rule in (
        gc.Band(0.1, lambda s: 1.0 - s),
        gc.by_name({"*": gc.RMS(lambda s: -s)}),
    ):
        with pytest.raises(ValueError, match="a limit is above 0"):
            limits(rule, [3.0, 3.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: gc.EMA(ratio=0.0),
        lambda: gc.EMA(decay=1.5),
        lambda: gc.EMA(warmup=0),
        lambda: gc.EMA(warmup_limit=-1.0),
        lambda: gc.EMA(over="unit"),
        lambda: gc.Deviation(z=-1.0),
        lambda: gc.Deviation(window=1),
        lambda: gc.Deviation(window=10, warmup=11),
        lambda: gc.Smooth(math.inf),
        lambda: gc.Smooth(0.0),
        lambda: gc.Smooth(1.0, curve="arctan"),
        lambda: gc.ZScore(mode="median"),
        lambda: gc.RMS(-1.0),
        lambda: gc.RMS(1.0, over="element"),
        lambda: gc.Band(2.0, 1.0),
        lambda: gc.Band(-0.1, 1.0),
        lambda: gc.Band(0.1, 1.0, over="singular"),
        lambda: gc.MovingBand(1.2, 1.1),
        lambda: gc.MovingBand(0.5, 2.0, decay=1.5),
        lambda: gc.MovingBand(0.5, 2.0, warmup=0),
        lambda: gc.Quantile(q=101.0),
        lambda: gc.Quantile(rate=0.0),
        lambda: gc.Quantile(start=-1.0),
        lambda: gc.Stabilize(decay=1.0),
        lambda: gc.Stabilize(eps=-1.0),
        lambda: gc.Moment(ratio=0.0),
        lambda: gc.Moment(decay=1.0),
        lambda: gc.Moment(warmup=0),
        lambda: gc.Peak(decay=0.0),
    ],
)
def test_numbers_outside_their_range_are_named(make):
    with pytest.raises(ValueError, match=r"\w+\(\w+="):
        make()


def test_a_group_within_its_band_keeps_every_bit():
    """The share of a tensor in a limit that is the norm itself is its own norm."""
    rng = np.random.default_rng(0)
    clipper = gc.Clipper(gc.by_name({"*": gc.MovingBand(0.1, 100.0, over="all")}))
    for _ in range(200):
        grads = {"a": rng.normal(size=5), "b": rng.normal(size=7)}
        clipped, info = clipper.clip(grads)
        assert not np.any(info.clipped)
        for name, g in grads.items():
            np.testing.assert_array_equal(clipped[name], g)
