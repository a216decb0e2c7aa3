"""Advice: right where the data are clear, and silent where they are not."""

import json
import math
import re
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import gradclip as gc
from gradclip.advice.evidence import (
    dead_from,
    level_change,
    lost_from,
    quantile_intervals,
    relapsed_from,
    spike_scores,
    tail_index,
    transient_length,
)
from gradclip.advice.judging import regime
from gradclip.advice.spikes import find_spikes
from gradclip.cli import app
from gradclip.readers.assemble import in_order
from gradclip.report import write_report
from gradclip.ruletext import call, known, recorded_rule, rule_from
from table import ROWS


def norms(size=2000, seed=0, sigma=0.3):
    return np.random.default_rng(seed).lognormal(sigma=sigma, size=size)


def advise(norm, **more):
    return gc.advise(gc.History.of(norm, **more))


def test_a_plain_run_gets_the_90th_percentile_and_says_how_sure():
    norm = norms()
    advice = advise(norm)
    assert advice.limit == pytest.approx(np.quantile(norm, 0.9), rel=0.05)
    assert advice.clip_rate(advice.limit) <= 0.1
    assert advice.regime == "insurance"
    assert advice.rule == gc.Norm(advice.limit)
    assert advice.code == f"attach(optimizer, Norm({advice.limit}))"
    assert advice.confidence == "high"
    assert advise(norm[:400]).confidence == "medium"
    assert advise(norm[:40]).confidence == "low"


def test_the_clip_rate_is_the_share_of_norms_above_the_limit():
    norm = norms()
    advice = advise(norm)
    for limit in (0.5, 1.0, 2.0, 1e9):
        assert advice.clip_rate(limit) == np.mean(norm > limit)


def test_numbers_below_zero_are_no_norms():
    advice = advise(np.log(norms()))
    assert advice.limit is None
    assert "are below 0, such as -" in advice.reasons[0]
    skipped = norms()
    skipped[::10] = -1
    advice, without = advise(skipped), advise(np.delete(norms(), slice(None, None, 10)))
    assert advice.limit == without.limit
    assert advice.clip_rate(1.0) == without.clip_rate(1.0)
    assert any("200 of 2000 norms are -1" in note for note in advice.notes)


def test_spikes_are_found_where_they_were_put():
    norm = norms()
    places = [17, 500, 501, 1234, 1999]
    norm[places] *= 40
    assert [spike.step for spike in advise(norm).spikes] == places
    assert advise(norms(sigma=0.1)).spikes == ()


@pytest.mark.parametrize("at", [1500, 1510, 1525, 1540])
@pytest.mark.parametrize("factor", [0.01, 0.1, 0.5, 10, 100])
def test_ordinary_norms_beside_a_step_of_the_level_are_no_spikes(at, factor):
    for seed in range(4):
        norm = norms(3000, seed, sigma=0.2)
        norm[at:] *= factor
        assert find_spikes(gc.History.of(norm).recorded) == ()
        norm[[at - 30, at - 2, at + 60]] *= 40 * max(factor, 1)
        spikes = find_spikes(gc.History.of(norm).recorded)
        assert [spike.step for spike in spikes] == [at - 30, at - 2, at + 60]


@pytest.mark.parametrize("at", [1500, 1513, 1525, 1537])
def test_each_step_of_a_burst_is_a_spike(at):
    norm = norms(3000)
    norm[at : at + 24] *= 30
    spikes = find_spikes(gc.History.of(norm).recorded)
    assert [spike.step for spike in spikes] == list(range(at, at + 24))


def test_a_spike_names_the_parameters_that_carried_it(tmp_path):
    history = gc.History(tmp_path / "run.jsonl", tensors_every=1)
    history.begin(gc.Norm(1.0))
    for step, norm in enumerate(norms(300)):
        parts = np.array([norm, 90.0 if step == 200 else 0.1])
        history.record_tensors(step, ("quiet", "loud"), parts)
        whole = float(np.hypot(*parts))
        history.record(step, gc.Info(whole, 1.0, 1 / whole, True, True, 1.0))
    (spike,) = gc.advise(history).spikes
    assert spike.step == 200
    assert spike.tensors[0][0] == "loud"


def test_a_few_infinities_are_spikes_and_a_whole_run_of_them_is_broken():
    norm = norms()
    norm[[100, 700, 900]] = math.inf
    advice = advise(norm)
    assert advice.nonfinite == 3
    assert [spike.step for spike in advice.spikes] == [100, 700, 900]
    assert advice.limit is not None
    broken = advise(np.full(500, math.inf))
    assert broken.limit is None
    assert "the run is broken" in broken.reasons[0]


def test_an_infinity_among_steps_without_a_signal_is_a_spike():
    norm = np.zeros(500)
    norm[::5] = norms(100)
    norm[7] = math.inf
    assert [spike.step for spike in advise(norm).spikes] == [7]


def test_the_warm_up_is_set_apart():
    norm = norms()
    norm[:60] *= 20
    advice = advise(norm)
    assert advice.warmup == 60
    assert advice.limit == pytest.approx(np.quantile(norm[60:], 0.9), rel=0.05)
    assert any("60 norms" in note for note in advice.notes)


def levels(*parts, sigma=0.1):
    """Return norms at one level after the other, from pairs of level and length."""
    level = np.concatenate([np.full(length, height) for height, length in parts])
    return level * norms(level.size, sigma=sigma)


def test_a_run_that_grows_has_no_warm_up_and_drifts():
    advice = advise(np.linspace(2, 20, 3000) * norms(3000, sigma=0.1))
    assert advice.warmup == 0
    assert advice.drift > 3
    assert advice.rule == gc.Percentile(q=90.0, window=100)
    assert not any("level of the norms" in note for note in advice.notes)


@pytest.mark.parametrize(
    ("parts", "step"),
    [([(1, 1000), (2, 1000)], 1000), ([(1, 700), (8, 700), (1, 600)], 700)],
)
def test_another_level_in_the_middle_is_no_warm_up_and_is_named(parts, step):
    norm = levels(*parts)
    advice = advise(norm, step=10 * np.arange(norm.size))
    assert advice.warmup == 0
    assert advice.confidence in ("medium", "low")
    (note,) = (note for note in advice.notes if "level of the norms" in note)
    assert f"changes at step {10 * step} (median {np.median(norm[:step]):.3g} " in note
    assert advise(levels((1, 2000))).confidence == "high"


def test_a_warm_up_is_found_before_a_larger_change():
    advice = advise(levels((3, 100), (1, 900), (4, 1000)))
    assert advice.warmup == 100
    assert any("changes at step 1000" in note for note in advice.notes)


def test_what_a_warm_up_ends_with_is_no_change_in_the_middle():
    norm = levels((9, 30), (0.5, 30), (1, 1140))
    advice = advise(norm)
    assert advice.warmup == 30
    assert level_change(norm[30:]) == 30
    assert not any("level of the norms" in note for note in advice.notes)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_noise_is_no_phase_and_no_change(sigma):
    logs = [norms(500, seed, sigma) for seed in range(300)]
    assert np.mean([transient_length(norm) > 0 for norm in logs]) <= 0.05
    assert np.mean([level_change(norm) > 0 for norm in logs]) <= 0.05


def remembering(seed, stays, size=2000):
    """Return norms whose logarithms keep a part of their deviation at each step."""
    fresh = np.random.default_rng(seed).normal(size=size) * math.sqrt(1 - stays**2)
    return np.exp(0.4 * np.array(list(accumulate(fresh, lambda x, e: stays * x + e))))


@pytest.mark.parametrize("stays", [0.6, 0.8, 0.95])
def test_noise_that_remembers_is_no_phase_and_hides_none(stays):
    logs = [remembering(seed, stays) for seed in range(100)]
    assert np.mean([transient_length(norm) > 0 for norm in logs]) <= 0.05
    assert np.mean([level_change(norm) > 0 for norm in logs]) <= 0.05
    for norm in logs:
        norm[:200] *= 4
    found = [150 < transient_length(norm) < 250 for norm in logs]
    assert np.mean(found) >= 0.95


def test_a_few_norms_are_no_phase():
    assert transient_length(levels((20, 10), (1, 990))) == 10
    assert transient_length(levels((20, 3), (1, 297))) == 0
    assert transient_length(levels((1e7, 1), (1, 99))) == 0


def test_norms_after_clipping_get_no_advice():
    norm = np.minimum(norms(), 1.0) * (1 - 1e-6 * np.arange(2000) % 1e-6)
    advice = advise(norm)
    assert advice.limit is None
    assert advice.rule is None
    assert advice.code == ""
    assert "norms after clipping" in advice.reasons[0]


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (norms(5), "5 usable norms are too few"),
        ([], "0 usable norms are too few"),
        (np.full(100, 2.5), "every norm is 2.5"),
        (np.full(100, math.nan), "100 of 100 norms are 0, NaN or infinite"),
    ],
)
def test_what_says_nothing_gets_no_advice(norm, reason):
    advice = advise(norm)
    assert advice.limit is None
    assert advice.confidence == "none"
    assert reason in advice.reasons[0]


def test_zeros_do_not_drag_the_quantiles_down():
    norm = norms()
    norm[::7] = 0.0
    advice = advise(norm)
    assert advice.zeros == 286
    assert advice.quantiles[0.05][0] > 0.5
    assert any("exactly 0" in note for note in advice.notes)


def test_drift_asks_for_a_rule_that_follows():
    norm = norms() * np.geomspace(1, 100, 2000)
    advice = advise(norm)
    assert advice.drift > 10
    assert advice.rule == gc.Percentile(q=90.0, window=100)
    assert advice.code == "attach(optimizer, Percentile(90.0, window=100))"


@pytest.mark.parametrize("factor", [1 / 30, 10.0, 30.0])
def test_what_follows_is_told_with_its_own_clip_rate(factor):
    history = gc.History.of(norms() * np.geomspace(1, factor, 2000))
    advice = gc.advise(history)
    rate = gc.replay(history, advice.rule).clip_rate
    assert rate == advice.rate == advice.to_dict()["clip_rate"] < 0.2
    assert advice.regime == ("insurance" if rate <= 0.1 else "in between")
    text = str(advice)
    assert f"Replayed over the last 2000 norms, it clips {rate:.1%}:" in text
    assert "stays the exception" not in text


def test_norms_of_another_order_that_drift_have_no_rule_that_follows(tmp_path):
    path = tmp_path / "run.jsonl"
    with gc.History(path) as history:
        clipper = gc.Clipper(gc.Norm(math.inf, p=1.0), history=history)
        for norm in norms(400) * np.geomspace(1, 30, 400):
            clipper.clip(np.array([norm]))
    advice = gc.advise(gc.History.load(path))
    assert isinstance(advice.rule, gc.Norm)
    assert advice.rule.p == 1.0
    assert any("no fixed limit fits" in reason for reason in advice.reasons)


@pytest.mark.parametrize(
    "rule",
    [
        gc.Normalize(1.6),
        gc.chain(gc.Norm(5.0), gc.Normalize(1.6)),
        gc.Skip(gc.Norm(1.6)),
        gc.chain(gc.Norm(math.inf), gc.Value(1.6)),
    ],
)
def test_a_limit_that_does_something_else_is_none_in_force(tmp_path, rule):
    path = tmp_path / "run.jsonl"
    with gc.History(path) as history:
        clipper = gc.Clipper(rule, history=history)
        for norm in norms(400):
            clipper.clip(np.full(100, norm / 10))
    advice = gc.advise(gc.History.load(path))
    assert math.isnan(advice.in_force)
    assert not any("nothing to change" in reason for reason in advice.reasons)
    stretches = isinstance(rule, gc.Normalize) or "Normalize" in repr(rule)
    assert any("on 100% of its steps" in x for x in advice.reasons) == stretches


def test_only_norms_make_sure():
    norm = np.zeros(1000)
    norm[::25] = norms(40)
    assert advise(norm).confidence == advise(norms(40)).confidence == "low"


def test_a_run_clipped_at_every_step_is_told_about_the_learning_rate():
    advice = advise(norms() * 10, limit=1.0)
    assert any("the learning rate is the lever" in reason for reason in advice.reasons)


def test_a_limit_that_changed_is_not_taken_for_one():
    limit = np.linspace(1.5, 2.5, 2000)
    advice = advise(norms(), limit=limit)
    assert math.isnan(advice.in_force)
    assert not any("nothing to change" in reason for reason in advice.reasons)
    assert any("the run was clipped on" in reason for reason in advice.reasons)


def test_a_limit_that_never_acted_is_no_insurance():
    advice = advise(norms(), limit=100.0)
    assert advice.limit == pytest.approx(1.5)
    assert "the limit in force, 100, never acted." in advice.reasons
    assert "insurance" not in " ".join(advice.reasons)
    rarely = advise(np.r_[norms(), 200.0], limit=100.0).reasons
    assert any("at 100 on less than 0.1% of its steps" in reason for reason in rarely)


@pytest.mark.parametrize(
    ("clipped", "told"),
    [(1003, "on 10% of its steps, which is insurance"), (1040, "on 10.4% of its")],
)
def test_a_regime_is_that_of_the_share_that_is_told(clipped, told):
    norm = np.r_[norms(10_000 - clipped) / 100, 10 * norms(clipped, seed=1)]
    norm = np.random.default_rng(2).permutation(norm)
    assert np.mean(norm > 1) == clipped / 10_000
    reasons = advise(norm, limit=1.0).reasons
    assert any(told in reason for reason in reasons)
    assert any("in between" in reason for reason in reasons) == (clipped > 1003)
    assert regime(clipped / 10_000) == ("in between" if clipped > 1003 else "insurance")


def recorded_by(tmp_path, rule):
    with gc.History(tmp_path / "run.jsonl") as history:
        clipper = gc.Clipper(rule, history=history)
        for norm in norms(300):
            clipper.clip(np.array([norm, norm]))
    return gc.advise(history)


def test_advice_is_about_the_norm_that_was_measured(tmp_path):
    advice = recorded_by(tmp_path, gc.Norm(math.inf, p=1.0))
    assert advice.rule == gc.Norm(advice.limit, p=1.0)
    assert advice.code.endswith(", p=1.0))")


def test_largest_moduli_are_no_norms(tmp_path):
    advice = recorded_by(tmp_path, gc.Value(0.5))
    assert advice.limit is None
    assert "each element" in advice.reasons[0]


def test_a_limit_that_already_fits_is_kept():
    advice = advise(norms(), limit=2.0)
    assert advice.limit == 2.0
    assert "nothing to change" in advice.reasons[0]


def test_a_sparse_log_is_noticed():
    advice = advise(norms(), step=np.arange(2000) * 100)
    assert any("every 100th step" in note for note in advice.notes)


def test_a_run_that_was_lost_is_judged_by_what_came_before():
    norm = np.concatenate([[0.4, 0.3, 0.5], norms(500) * 50])
    loss = np.concatenate([[4.8, 4.0, 4.5], np.full(500, 12.0)])
    advice = advise(norm, loss=loss)
    assert advice.lost
    assert advice.limit == 0.4
    assert advice.confidence == "low"


def test_a_lucky_first_loss_is_no_sign_of_a_lost_run():
    loss = np.linspace(2, 1, 2000)
    loss[0] = 0.6
    assert advise(norms(), loss=loss).limit == advise(norms()).limit


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_missing_loss_does_not_hide_or_move_the_end(at):
    norm = np.concatenate([[0.4, 0.3, 0.5, 0.4, 0.4], norms(500) * 50])
    loss = np.concatenate([[4.8, 4.4, 4.3, 4.2, 4.1], np.full(500, 12.0)])
    loss[at] = np.nan
    advice = advise(norm, loss=loss)
    assert advice.lost
    assert advice.limit == 0.4
    assert "the 5 norms before" in advice.reasons[0]


def test_a_loss_that_begins_near_0_may_rise_in_a_sound_run():
    norm, loss = norms(500), np.linspace(0.001, 0.03, 500) * norms(500, seed=1)
    advice = advise(norm, loss=loss)
    assert not advice.lost
    assert advice.limit == advise(norm).limit
    assert advice.confidence == "low"


def test_two_norms_before_the_loss_rose_are_too_few():
    norm = np.concatenate([[0.4, 0.3], norms(500) * 50])
    loss = np.concatenate([[4.8, 4.0], np.full(500, 12.0)])
    advice = advise(norm, loss=loss)
    assert advice.limit is None
    assert advice.confidence == "none"
    assert "of the 2 norms before the median says nothing" in advice.reasons[0]


def test_no_usable_norm_before_the_loss_rose_is_none_to_go_by():
    norm = np.concatenate([[math.nan, math.inf, -1], norms(500) * 50])
    loss = np.concatenate([[4.8, 4.0, 4.5], np.full(500, 12.0)])
    advice = advise(norm, loss=loss)
    assert advice.lost
    assert advice.limit is None
    assert "no norm before that is usable" in advice.reasons[0]


def test_steps_without_a_signal_have_broken_no_run():
    norm = np.concatenate([[0.0, 0.0], norms(500)])
    loss = np.concatenate([[0.0, 0.001], np.linspace(0.002, 0.03, 500)])
    advice = advise(norm, loss=loss)
    assert not advice.lost
    assert advice.limit == advise(norm).limit


def test_a_loss_that_became_nan_is_a_lost_run_whatever_the_norms():
    loss = np.linspace(2, 1, 2000)
    loss[1500:] = np.nan
    advice = advise(norms(), loss=loss)
    assert advice.lost
    assert advice.confidence == "low"


def falling(size, start=10.8, low=3.0):
    """Return a loss that falls as that of a language model does."""
    return low + (start - low) * np.exp(-np.arange(size) / (size / 20))


def jumped(level, norm_factor=3.0, size=2000, at=1400, start=10.8, noise=0.02):
    """Return norms and losses of a run whose loss jumps from 3 to a level for good."""
    loss, norm = falling(size, start), norms(size)
    loss[at:], norm[at:] = level, norm[at:] * norm_factor
    return norm, loss * norms(size, seed=1, sigma=noise)


@pytest.mark.parametrize("level", [4.8, 5.5, 7.2, 10.9, 16.5])
@pytest.mark.parametrize("norm_factor", [0.03, 3.0, math.nan])
def test_a_run_that_is_lost_below_where_it_began_is_lost(level, norm_factor):
    norm, loss = jumped(level, norm_factor)
    norm[1399] = 2 * norm[:1399].max()
    advice = advise(norm, loss=loss)
    assert advice.lost
    assert advice.confidence == "low"
    assert advice.limit == pytest.approx(1.0, abs=0.1)
    (reason,) = advice.reasons
    assert re.search(r"the median of the 1(399|400|401) norms before", reason)


@pytest.mark.parametrize(
    ("lost", "change"),
    [
        (False, {"level": 4.35}),
        (True, {"level": 4.65}),
        (False, {"start": 4.35}),
        (True, {"start": 4.65}),
        (False, {"norm_factor": 1.9}),
        (True, {"norm_factor": 2.1}),
        (False, {"norm_factor": 1 / 1.9}),
        (True, {"norm_factor": 1 / 2.1}),
        (False, {"start": 3 + 2.5 / 0.14}),
        (True, {"start": 3 + 2.5 / 0.16}),
    ],
)
def test_a_loss_that_had_fallen_is_lost_by_half_a_third_2_and_15_percent(lost, change):
    kept = {"level": 5.5, "noise": 0.001} | change
    norm, loss = jumped(**kept)
    norm = np.where(np.arange(2000) < 1400, 1.0, kept.get("norm_factor", 3.0))
    norm *= norms(sigma=0.02)
    assert advise(norm, loss=loss).lost == lost


@pytest.mark.parametrize("noise", [0.05, 0.15, 0.3])
@pytest.mark.parametrize("size", [300, 2000])
def test_a_noisy_loss_that_had_fallen_is_lost_where_it_jumps(noise, size):
    for seed in range(5):
        norm, loss = jumped(7.2, size=size, at=int(0.7 * size), noise=0.001)
        loss *= norms(size, seed, sigma=noise)
        assert abs(relapsed_from(loss) - int(0.7 * size)) <= 3
        assert advise(norm, loss=loss).lost


@pytest.mark.parametrize(("share", "lost"), [(0.02, True), (0.08, True), (0.4, False)])
def test_a_loss_that_rises_slowly_is_not_lost(share, lost):
    up = np.clip((np.arange(2000) / 2000 - 0.4) / share, 0, 1)
    loss = falling(2000) * 2.5**up * norms(sigma=0.02)
    assert (relapsed_from(loss) < 2000) == lost


def healthy_losses(rng, size=1000):
    """Return losses of runs that train, each with what its norms follow of it."""
    at = np.arange(size) / size
    loss = falling(size)
    noisy = [loss * rng.lognormal(sigma=sigma, size=size) for sigma in (0.05, 0.3)]
    heavy = loss * (1 + 0.1 * np.abs(rng.standard_t(2, size)))
    stays = loss * np.exp(0.3 * noise_that_stays(rng, size, 0.98))
    cycle = 0.5 + 0.5 * np.cos(np.pi * (at / rng.uniform(0.1, 0.4) % 1))
    restarts = loss * (1 + 0.3 * cycle)
    fitted = 0.03 + 2.2 * np.exp(-at * 15) + 0.2 * cycle
    epochs = np.choose((3 * at).astype(int), [2.0, 1.2, 0.6])
    value = 0.5 + 9 * np.exp(-at * 20) + 5 * np.clip((at - 0.3) / 0.5, 0, 1)
    data = np.where(at > rng.uniform(0.5, 0.8), 2.0, 1.0) * loss
    spike = loss + np.where((at > 0.8) & (at < 0.85), 5, 0)
    yield from ((x, 0.0) for x in (*noisy, heavy, data))
    yield from ((x, 0.5) for x in (stays, restarts, fitted, epochs, value, spike))
    yield 0.02 * rng.standard_normal(size), 0.0


def test_losses_of_runs_that_train_are_not_lost():
    rng = np.random.default_rng(0)
    for _ in range(5):
        for kind, (loss, follows) in enumerate(healthy_losses(rng)):
            noise = rng.lognormal(sigma=0.05, size=loss.size)
            norm = np.abs(loss) ** follows * rng.lognormal(sigma=0.3, size=loss.size)
            assert not advise(norm, loss=loss * noise).lost, kind


def test_noise_that_remembers_is_seldom_a_loss_that_jumps():
    rng, found = np.random.default_rng(0), 0
    for _ in range(200):
        loss = falling(1000) * np.exp(0.3 * noise_that_stays(rng, 1000, 0.98))
        found += relapsed_from(loss) < 1000
    assert found <= 8


@pytest.mark.parametrize("loss", [0.0, 1e308, 5e-324, math.inf, math.nan])
def test_a_loss_at_the_end_of_the_numbers_has_no_relapse(loss):
    assert relapsed_from(np.full(200, loss)) == 200
    loss = np.concatenate([[1e308], np.full(250, 1e-300), np.full(100, 1e308)])
    assert relapsed_from(loss) == 251
    loss[7] = 0.0
    assert relapsed_from(loss) == loss.size


@pytest.mark.parametrize(
    ("size", "dead", "norm_at_the_end", "loss_at_the_end", "how"),
    [
        (1000, 450, math.nan, 0.0, "no norm is finite"),
        (3000, 100, math.nan, math.nan, "no norm is finite"),
        (3000, 10, math.inf, 1.0, "no norm is finite"),
        (3000, 1200, 0.0, 0.0, "norm and loss are 0"),
        (3000, 1800, 0.0, 0.0, "norm and loss are 0"),
    ],
)
def test_a_run_that_died_is_lost_from_there(
    size, dead, norm_at_the_end, loss_at_the_end, how
):
    norm, loss = norms(size), np.linspace(3, 1, size)
    norm[-dead:], loss[-dead:] = norm_at_the_end, loss_at_the_end
    norm[size // 5], norm[-dead - 1] = math.inf, 2 * norm[:-dead].max()
    advice, good = advise(norm, loss=loss), size - dead
    assert advice.lost
    assert advice.confidence == "low"
    assert advice.limit == pytest.approx(1.0, abs=0.1)
    (reason,) = advice.reasons
    assert reason.startswith(f"from step {good} to the end {how}, so that")
    assert f"the median of the {good - 1} norms before" in reason
    assert [spike.step for spike in advice.spikes if spike.score == math.inf] == [
        size // 5
    ]
    assert not any("without a signal" in note for note in advice.notes)


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_a_run_that_died_without_a_sign_is_told_to_look_elsewhere(end):
    # A root of 0 in the loss, say: the same step would be lost under any limit.
    norm = norms(500)
    norm[-100:] = end
    advice = advise(norm)
    (reason,) = advice.reasons
    assert advice.lost
    assert advice.confidence == "low"
    assert "the norms did not grow before it: a limit may not prevent" in reason
    assert "on_nonfinite='raise'" in reason
    assert 0.05 < np.mean(norm[:400] > advice.limit) < 0.1
    norm[397] = 2 * norm[:400].max()
    assert "Run again with it" in advise(norm).reasons[0]


def test_a_run_that_died_in_zeros_and_nan_is_lost_from_the_first():
    norm, loss = norms(500), np.linspace(3, 1, 500)
    norm[-12:], loss[-12:] = 0.0, 0.0
    norm[-12:-6] = math.nan
    (reason,) = advise(norm, loss=loss).reasons
    assert reason.startswith("from step 488 to the end norms are not finite, or 0 with")
    norm[:488] = math.inf
    assert "500 of 500 norms" in advise(norm, loss=loss).reasons[0]


def test_nine_bad_norms_at_the_end_or_more_before_it_are_spikes():
    norm = norms()
    norm[-9:] = math.nan
    assert len(advise(norm).spikes) == 9
    assert not advise(norm).lost
    norm[-20:-1] = math.nan
    norm[-1] = 1.0
    assert len(advise(norm).spikes) == 19
    assert not advise(norm).lost


@pytest.mark.parametrize(("last", "lost"), [(12, False), (60, True)])
def test_steps_without_a_signal_at_the_end_are_a_death_only_if_many(last, lost):
    norm, loss = norms(1000), np.full(1000, 0.1)
    silent = np.random.default_rng(3).random(1000) < 0.6
    silent[-last:] = True
    norm[silent], loss[silent] = 0.0, 0.0
    assert advise(norm, loss=loss).lost == lost


@pytest.mark.parametrize("last", [9, 10, 12, 13])
def test_more_than_three_times_as_many_in_a_row_is_a_death(last):
    norm = np.ones(100)
    norm[20:24], norm[100 - last :] = 0.0, 0.0
    assert dead_from(norm, norm.copy()) == (100 if last < 13 else 87)
    assert dead_from(norm, np.ones(100)) == 100


def test_each_run_in_a_log_may_die_and_none_of_that_is_a_spike():
    norm = norms(1000)
    norm[480:500], norm[990:] = math.nan, math.nan
    advice = runs_of(norm, [*range(500), *range(500)])
    assert advice.spikes == ()
    assert not advice.lost


def test_a_loss_that_rose_before_the_norms_ended_is_told_as_that():
    norm, loss = norms(1000), np.full(1000, 2.0)
    loss[600:], norm[700:] = 9.0, math.nan
    advice = advise(norm, loss=loss)
    assert "the loss rose for good at step 600, so that" in advice.reasons[0]
    assert advice.spikes == ()


def test_a_run_that_died_at_once_has_nothing_to_go_by():
    norm, loss = np.zeros(500), np.zeros(500)
    norm[:2], loss[:2] = 1.0, 2.0
    (reason,) = advise(norm, loss=loss).reasons
    assert reason.startswith("from step 2 to the end norm and loss are 0, and of the 2")


def test_a_run_that_did_not_learn_lowers_the_confidence():
    advice = advise(norms(), loss=np.full(2000, 2.3))
    assert advice.confidence == "low"
    assert any("the loss ended no lower than it began" in note for note in advice.notes)
    assert advise(norms(), loss=np.linspace(2.3, 1, 2000)).confidence == "high"


@pytest.mark.parametrize(("end", "still"), [(2.97, True), (2.91, False), (7.2, True)])
def test_a_loss_is_said_to_stand_still_in_medians_of_tenths(end, still):
    loss = np.concatenate([np.full(50, 10.8), np.full(950, 3.0), np.full(1000, end)])
    loss[50:200] = 3.0
    advice = advise(norms(), loss=loss)
    assert not advice.lost
    assert (advice.confidence == "low") == still
    told = f"(the median of its first tenth is 3, of its last {end:g})"
    assert any(told in note for note in advice.notes) == still


def test_a_lost_run_is_not_told_that_it_learns_nothing():
    norm = norms() * np.where(np.arange(2000) < 500, 1, 30)
    loss = np.where(np.arange(2000) < 500, 3.0, 9.0)
    advice = advise(norm, loss=loss)
    assert advice.lost
    assert not any("does not learn" in note for note in advice.notes)


def runs_of(norm, step):
    record, _ = in_order(gc.History.of(norm, step=step).recorded)
    return gc.advise(gc.History.from_record(record, None))


def two_runs(factor):
    norm = np.concatenate([norms(500), norms(300, seed=1) * factor])
    return runs_of(norm, [*range(500), *range(300)])


def test_runs_that_are_alike_count_together_and_others_do_not():
    assert two_runs(1.0).steps == 800
    other = two_runs(100.0)
    assert other.steps == 300
    assert any("the newest, number 2 of 2" in note for note in other.notes)


def test_advice_is_the_same_every_time_and_is_json():
    norm = norms()
    norm[5] = math.nan
    one, other = advise(norm), advise(norm)
    assert str(one) == str(other)
    told = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert told["limit"] == one.limit
    assert told["rule"] == f"Norm({one.limit})"
    assert told["spikes"][0]["norm"] is None


def test_the_smallest_of_norms_where_numpy_raises_everything():
    norms = np.append(np.linspace(1, 2, 300), 1e-310)
    with np.errstate(all="raise"):
        assert gc.advise(gc.History.of(norms)).limit > 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.floats(width=32) | st.sampled_from([0.0, math.inf, math.nan]), max_size=80
    )
)
def test_any_norms_get_advice_or_a_reason(values):
    advice = advise(np.abs(values))
    assert (advice.limit is None) == (advice.confidence == "none")
    assert advice.limit is None or advice.limit > 0
    assert advice.reasons
    json.dumps(advice.to_dict(), allow_nan=False)
    assert str(advice)


def test_intervals_hold_the_true_quantile_as_often_as_they_say():
    truth = np.exp(0.3 * 1.2815515)
    held = 0
    for seed in range(100):
        _, low, high = quantile_intervals(norms(600, seed), [0.9])[0]
        held += low <= truth <= high
    assert held >= 88


def noise_that_stays(rng, size, stays):
    """Return noise of which a share stays from one step to the next."""
    logs = rng.normal(size=size)
    logs[1:] *= math.sqrt(1 - stays**2)
    return np.array(list(accumulate(logs, lambda x, new: stays * x + new)))


def test_intervals_are_wider_where_steps_resemble_each_other():
    rng, held = np.random.default_rng(0), 0
    truth = np.exp(0.3 * 1.2815515)
    for _ in range(100):
        norm = np.exp(0.3 * noise_that_stays(rng, 2000, 0.9))
        _, low, high = quantile_intervals(norm, [0.9])[0]
        held += low <= truth <= high
    assert held >= 85


@pytest.mark.parametrize("sigma", [0.3, 0.5, 0.8])
def test_a_loss_that_is_only_noisy_is_no_lost_run(sigma):
    rng = np.random.default_rng(0)
    loss = 3 * rng.lognormal(sigma=sigma, size=(200, 1000))
    assert sum(lost_from(x) < 1000 for x in loss) <= 8


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_a_noisy_loss_that_rose_for_good_is_a_lost_run(sigma):
    rng = np.random.default_rng(0)
    mean = np.concatenate([np.linspace(3, 1.5, 700), np.full(300, 12.0)])
    loss = mean * rng.lognormal(sigma=sigma, size=(50, 1000))
    assert all(690 <= lost_from(x) <= 710 for x in loss)


def test_a_run_that_broke_into_noise_is_a_lost_run():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sound = np.linspace(3, 2, 300) * rng.lognormal(sigma=0.02, size=300)
        loss = np.r_[sound, 15 * rng.lognormal(sigma=2.0, size=700)]
        assert 300 <= lost_from(loss) < 400
    assert lost_from(np.array([1e-300, 1e300] * 100)) <= 200


def test_a_few_blocks_give_wide_intervals():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        norm = np.exp(0.3 * noise_that_stays(rng, 2000, 0.98))
        _, low, high = quantile_intervals(norm, [0.5])[0]
        held += low <= 1 <= high
    assert held >= 175


def test_intervals_of_numbers_far_apart_are_found_without_a_warning():
    norm = np.tile([1e-300, 1e300], 200)
    ((_, low, high),) = quantile_intervals(norm, [0.9])
    assert 0 < low <= high


def test_short_logs_whose_noise_remembers_show_no_levels():
    rng, told = np.random.default_rng(0), 0
    for _ in range(100):
        norm = np.exp(2 * noise_that_stays(rng, 100, 0.9))
        told += level_change(norm) > 0
    assert told <= 10


def test_a_long_log_that_ends_without_norms_is_replayed_on_those_before():
    norm = norms(12_000) * np.geomspace(1, 30, 12_000)
    norm[-10_001:] = math.nan
    advice = advise(norm)
    assert advice.followed is None or 0 <= advice.rate <= 1
    assert "nan%" not in str(advice)
    norm = norms(30_000) * np.geomspace(1, 30, 30_000)
    norm[-10_001:] = -1.0
    advice = advise(norm)
    assert advice.followed.norm.size == 10_000
    assert 0 < advice.rate < 0.2


@pytest.mark.parametrize(
    ("alpha", "told"), [(1.2, "heavy, as"), (2.0, "heavy or not"), (5.0, "not heavy")]
)
def test_a_tail_is_called_heavy_where_that_is_sure(alpha, told):
    norm = np.random.default_rng(1).pareto(alpha, 2000) + 1
    assert f"), {told}" in str(advise(norm))


def test_the_tail_index_is_that_of_the_distribution():
    rng = np.random.default_rng(0)
    for alpha in (1.0, 2.0, 4.0):
        assert tail_index(rng.pareto(alpha, 50_000) + 1) == pytest.approx(
            alpha, rel=0.1
        )


def test_numbers_of_any_size_stand_apart_in_the_text():
    for line in str(advise(norms(300) * 3e5)).splitlines():
        assert not re.search(r"e\+\d\d\d", line)
    table = str(advise(norms(300))).splitlines()
    heading, row = (next(x for x in table if word in x) for word in ("norm ", " 5%"))
    assert heading.index("norm") == row.index("0.6")
    assert heading.index("95 %") == row.index("0.5")


def test_norms_without_a_tail_have_no_index():
    assert "no tail: the largest norms are alike" in str(
        advise(np.tile([1.0, 2.0], 200))
    )


def test_scores_do_not_depend_on_the_unit():
    norm = norms(500)
    np.testing.assert_allclose(
        spike_scores(1e-20 * norm), spike_scores(norm), atol=1e-9
    )


REPLAYABLE = [
    name
    for name, row in ROWS.items()
    if {getattr(s, "over", "all") for s in gc.rules.stages(row.make())} == {"all"}
    and not any(s.needs_weight or s.needs_shape for s in gc.rules.stages(row.make()))
]


@pytest.mark.parametrize("name", REPLAYABLE)
def test_a_replay_is_what_the_clipper_does_to_gradients_of_these_norms(name):
    norm = norms(300)
    norm[[50, 51, 120]] *= 30
    norm[200], norm[201] = math.nan, 0.0
    clipper = gc.Clipper(ROWS[name].make())
    infos = [clipper.clip(np.array([x]))[1] for x in norm]
    again = gc.replay(gc.History.of(norm), ROWS[name].make())
    known_steps = np.isfinite(norm)
    expected = [[x.limit, x.scale] for x in infos]
    got = np.stack([again.limit, again.scale], axis=1)
    np.testing.assert_allclose(
        got[known_steps], np.array(expected, float)[known_steps], rtol=1e-9
    )
    assert again.clip_rate == np.mean(again.scale < 1)


def test_a_replay_over_tensors_uses_their_norms(tmp_path):
    history = gc.History(tmp_path / "run.jsonl", tensors_every=1)
    history.begin(gc.Norm(1.0))
    parts = np.array([[1.0, 9.0], [3.0, 0.5]])
    for step, part in enumerate(parts):
        history.record_tensors(step, ("a", "b"), part)
        history.record(
            step, gc.Info(float(np.hypot(*part)), 1.0, 1.0, True, False, 1.0)
        )
    again = gc.replay(history, gc.Norm(2.0, over="tensor"))
    np.testing.assert_allclose(again.scale, [2 / 9, 2 / 3])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (gc.Relative(), "compares gradients with parameters"),
        (gc.Value(1.0), "looks at each element"),
        (gc.Norm(1.0, over="tensor"), "tensors_every=1"),
    ],
)
def test_what_norms_cannot_tell_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        gc.replay(gc.History.of([1.0, 2.0]), rule)


@pytest.mark.parametrize("name", ROWS)
def test_every_rule_is_made_from_its_own_text(name):
    rule = ROWS[name].make()
    assert rule_from(repr(rule)) == rule


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "Norm(__import__('os'))",
        "Norm(limit=open('x'))",
        "Norm(1.0).limit",
        "lambda: 1",
        "Norm(*[1.0])",
        "by_name({**{}})",
        "Norm(**{'limit': 1.0})",
        "by_name({'*': open('x')})",
        "Norm(1.0",
        "1.0",
        "Unknown(1.0)",
        "Norm(bogus=1)",
        "",
        "(" * 500,
    ],
)
def test_other_text_is_refused_and_never_run(text):
    with pytest.raises(ValueError, match=r"rule|only rules"):
        rule_from(text)


@pytest.mark.parametrize("given", ["run.jsonl", [1.0, 2.0]])
def test_what_is_no_history_is_refused_in_a_sentence(given):
    for ask in (gc.advise, lambda x: gc.replay(x, gc.Norm(1.0))):
        with pytest.raises(TypeError, match=r"use History\.load\(path\) for a file"):
            ask(given)


@pytest.mark.parametrize("name", ["step", "limit", "scale", "loss"])
def test_numbers_of_another_length_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} has 1 numbers, and norm 2"):
        gc.History.of([1.0, 2.0], **{name: [3.0]})


@pytest.mark.parametrize("rule", [gc.Norm(1.0), gc.ZScore()])
@pytest.mark.parametrize("steps", [500, 2500])
def test_progress_is_told_of_every_step(rule, steps):
    told = []
    gc.replay(gc.History.of(np.ones(steps)), rule, progress=told.append)
    assert sum(told) == steps


def test_known_rules_are_those_of_the_library():
    assert {"Norm", "ZScore", "ZClip", "chain", "AutoClip", "AGC"} <= set(known())


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "run.jsonl"
    rows = [{"step": i, "grad_norm": x} for i, x in enumerate(norms(300))]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_advise(log, tmp_path):
    result = run("advise", log)
    assert result.exit_code == 0
    assert "attach(optimizer, Norm(" in result.stdout
    (told,) = json.loads(run("advise", log, "--json").stdout)
    assert told["code"] == gc.advise(gc.History.load(log)).code
    assert told["format"] == "JSON lines"
    short = tmp_path / "short.csv"
    short.write_text("step,grad_norm\n1,2.0\n2,3.0\n")
    assert run("advise", short).exit_code == 3


def test_commands_say_in_one_line_what_is_wrong(tmp_path):
    result = run("advise", tmp_path / "missing.log")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "there is no such file" in result.stderr


def test_a_log_that_is_missing_takes_nothing_from_the_others(log, tmp_path):
    words = ("advise", tmp_path / "missing.log", log)
    result = run(*words)
    assert result.exit_code == 1
    assert "there is no such file" in result.stderr
    assert "attach(optimizer, Norm(" in result.stdout
    (told,) = json.loads(run(*words, "--json").stdout)
    assert told["log"] == str(log)


def test_a_replay_says_that_other_networks_are_in_the_log(tmp_path):
    path = tmp_path / "out.log"
    text = "step {i} actor/grad_norm: 1.{i} critic/grad_norm: 2.0"
    path.write_text("\n".join(text.format(i=i) for i in range(30)))
    words = ("replay", path, "--rule", "Norm(1.0)")
    assert "critic/grad_norm belongs to other networks" in run(*words).stdout
    told = json.loads(run(*words, "--json").stdout)
    assert told["column"] == "actor/grad_norm"
    assert "critic/grad_norm" in told["notes"][0]


def test_the_command_replay(log):
    words = ("replay", log, "--rule", "ZScore(z=2.0)", "--rule", "Norm(1.0)")
    result = run(*words)
    assert result.exit_code == 0
    assert "A replay takes the norms as they were" in result.stdout
    rows = json.loads(run(*words, "--json").stdout)["rules"]
    assert [row["rule"] for row in rows] == ["ZScore(2.0)", "Norm(1.0)"]
    assert rows[1]["clip_rate"] == np.mean(norms(300) > 1.0)
    assert run("replay", log, "--rule", "open('x')").exit_code == 2


def test_ordinary_norms_at_the_step_of_a_spike_are_none(tmp_path):
    path = tmp_path / "run.jsonl"
    rows = [{"step": i, "grad_norm": x} for i, x in enumerate(norms(100, sigma=0.1))]
    again = [row | {"grad_norm": 3 * row["grad_norm"]} for row in rows]
    rows[40]["grad_norm"] = 50.0
    path.write_text("\n".join(map(json.dumps, rows + again)))
    # It lets nothing of the spike through, and all of what is beside it.
    words = ("replay", path, "--rule", "Skip(Norm(5.0))", "--json")
    (row,) = json.loads(run(*words).stdout)["rules"]
    assert row["largest_passed_at_spikes"] == 0.0


def test_the_command_watch(log):
    result = run("watch", log, "--once")
    assert result.exit_code == 0
    assert "step 299" in result.stdout
    assert "█" in result.stdout


@pytest.mark.parametrize("rule", ["AGC()", "Value(1.0)", "Norm(1.0, over='tensor')"])
def test_a_rule_that_norms_cannot_try_is_a_wrong_option(log, rule):
    result = run("replay", log, "--rule", rule)
    assert result.exit_code == 2
    assert "Invalid value for --rule" in result.stderr
    assert run("replay", log.parent / "none", "--rule", rule).exit_code == 1


@pytest.mark.parametrize("command", ["advise", "demo", "replay", "report", "watch"])
def test_every_command_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: gradclip {command}" in result.stdout


def recorded(path, rule, rows, steps=None):
    """Return a history of norms of tensors under a rule."""
    names = tuple("abc"[: len(rows[0])])
    history = gc.History(path, tensors_every=1)
    history.begin(rule)
    for i, row in enumerate(rows):
        step = i if steps is None else steps[i]
        history.record_tensors(step, names, np.array(row))
        whole = float(np.sqrt(np.nansum(np.square(row))))
        history.record(step, gc.Info(whole, 1.0, 1.0, np.isfinite(whole), False, whole))
    return history


def test_a_replay_over_tensors_tells_what_would_have_passed(tmp_path):
    history = recorded(tmp_path / "run.jsonl", gc.Norm(1.0), [[10.0, 0.9], [0.5, 0.5]])
    for rule in (gc.Norm(1.0, over="tensor"), gc.EMA(warmup_limit=1.0)):
        again = gc.replay(history, rule)
        grads = [
            {"a": np.array([x]), "b": np.array([y])}
            for x, y in ((10.0, 0.9), (0.5, 0.5))
        ]
        clipper = gc.Clipper(rule)
        infos = [clipper.clip(g)[1].to_dict() for g in grads]
        for name in ("norm_after", "limit", "scale"):
            got = getattr(again, name)
            np.testing.assert_allclose(got, [info[name] for info in infos], rtol=1e-9)


def test_a_schedule_is_asked_at_the_recorded_steps():
    asked = []
    history = gc.History.of([1.0, 2.0, 3.0], step=[0, 1000, 2000])
    gc.replay(history, gc.Norm(lambda step: asked.append(step) or 1.5))
    assert asked == [0, 1000, 2000]


def test_a_replay_does_not_mix_norms_of_other_orders(tmp_path):
    history = recorded(tmp_path / "run.jsonl", gc.Norm(math.inf), [[1.0], [2.0]])
    with pytest.raises(
        ValueError, match="order 1, and the history holds those of order 2"
    ):
        gc.replay(history, gc.Norm(2.0, p=1.0))
    ones = recorded(tmp_path / "ones.jsonl", gc.Norm(math.inf, p=1.0), [[1.0], [4.0]])
    assert gc.replay(ones, gc.Norm(2.0, p=1.0)).scale.tolist() == [1.0, 0.5]


def test_a_history_of_another_order_has_a_page(tmp_path):
    rows = [[x] for x in norms(60)]
    history = recorded(tmp_path / "run.jsonl", gc.Norm(math.inf, p=1.0), rows)
    assert gc.advise(history).rule.p == 1.0
    write_report([("run", history)], tmp_path / "page.html")
    assert "p=1.0" in (tmp_path / "page.html").read_text("utf-8")


def test_a_spike_is_not_carried_by_what_has_no_gradient(tmp_path):
    rows = [[x, 0.1, math.nan] for x in norms(300)]
    rows[100][0] = 90.0
    rows[200][0] = math.inf
    rows[250][1] = math.nan
    history = recorded(tmp_path / "run.jsonl", gc.Norm(1.0), rows)
    record = replace(history.recorded, norm=history.recorded.norm.copy())
    record.norm[250] = math.nan
    spikes = {s.step: s.tensors for s in find_spikes(record)}
    assert [name for name, _ in spikes[100]] == ["a", "b"]
    assert [name for name, _ in spikes[200]] == ["a", "b"]
    assert [name for name, _ in spikes[250]] == ["b", "a"]


@pytest.mark.parametrize(
    ("rule", "behind"),
    [
        (gc.Value(lambda step: 1.0), gc.Value(1.0)),
        (gc.Norm(np.array(0.5), over="tensor"), gc.Norm(1.0, over="tensor")),
        (gc.Norm(lambda step: 1.0, p=1.0), gc.Norm(1.0, p=1.0)),
        (
            gc.chain(gc.Value(lambda s: 1.0), gc.Norm(2.0)),
            gc.chain(gc.Value(1.0), gc.Norm(2.0)),
        ),
    ],
)
def test_what_a_history_measured_is_known_also_without_its_limit(rule, behind):
    assert recorded_rule(repr(rule)) == behind


def test_elements_under_a_schedule_are_no_norms(tmp_path):
    rule = gc.Value(lambda step: 1.0)
    history = recorded(tmp_path / "run.jsonl", rule, [[x] for x in norms(60)])
    assert "looks at each element" in gc.advise(history).reasons[0]


def test_runs_that_are_too_short_are_said_not_to_count():
    step = [*range(100), *range(8)]
    advice = runs_of(norms(108), step)
    assert any("1 of 2 runs have fewer than 20" in note for note in advice.notes)
    assert not any("are alike" in note for note in advice.notes)


def test_the_call_of_groups_is_one():
    rule = gc.by_name({"a*": gc.Norm(2.0), "b": None, "*": gc.Skip(gc.Norm(1.0)).rule})
    assert rule_from(call(rule)) == rule
    told = "by_name({'a*': Norm(2.0), 'b': Norm(inf, over='tensor'), '*': Norm(1.0)})"
    assert call(rule) == told


def test_a_key_that_is_no_text_is_no_traceback(log):
    result = run("replay", log, "--rule", "by_name({{}: Norm(1.0)})")
    assert result.exit_code == 2


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.2])
@pytest.mark.parametrize("lost", [400, 600, 900])
def test_a_run_that_is_lost_late_is_dated_by_more_than_one_noisy_loss(noise, lost):
    for seed in range(5):
        generator = np.random.default_rng(seed)
        good = np.arange(1000) < lost
        loss = np.where(good, 1 + 4 * np.exp(-np.arange(1000) / 150), 20.0)
        loss *= generator.lognormal(sigma=noise, size=1000)
        norm = np.where(good, 1.0, 30.0) * generator.lognormal(sigma=0.2, size=1000)
        assert abs(lost_from(loss) - lost) <= 2
        advice = gc.advise(gc.History.of(norm, loss=loss))
        assert advice.lost
        assert 0.9 < advice.limit < 1.2
        assert f"the median of the {lost_from(loss)} norms before" in advice.reasons[0]


def test_a_loss_that_creeps_up_before_it_jumps_is_lost_at_the_jump():
    loss = np.concatenate([np.linspace(2.0, 2.005, 500), np.full(500, 9.0)])
    assert lost_from(loss) == 500


def test_a_slow_rise_begins_where_the_loss_leaves_its_start():
    rise = np.linspace(5.6, 12.0, 100)
    loss = np.concatenate([np.full(20, 5.0), rise, np.full(100, 12.0)])
    assert lost_from(loss) == 20


def test_a_loss_that_becomes_nan_is_lost_there_and_not_at_a_gap():
    loss = np.linspace(5.0, 1.0, 100)
    loss[[10, 11, 50]], loss[60:] = np.nan, np.nan
    assert lost_from(loss) == 60


def test_a_limit_is_not_rounded_past_norms_that_hardly_differ():
    norm = np.random.default_rng(0).normal(1.01, 0.003, size=2000)
    advice = gc.advise(gc.History.of(norm))
    assert np.quantile(norm, 0.9) <= advice.limit <= np.quantile(norm, 0.95)
    assert advice.clip_rate(advice.limit) >= 0.05


def test_a_replay_refuses_what_it_cannot_tell():
    norms = np.full(30, -1.5)
    with pytest.raises(
        ValueError, match=r"30 of 30 numbers are below 0, such as -1\.5"
    ):
        gc.replay(gc.History.of(norms), gc.Norm(1.0))
    # A step without a norm is written as -1 by some loggers.
    gc.replay(gc.History.of([1.0, -1.0, 2.0]), gc.Norm(1.0))
    both = gc.chain(gc.Norm(1.0, over="tensor"), gc.Norm(1.0))
    with pytest.raises(
        ValueError, match="at all gradients and at each tensor, in turn"
    ):
        gc.replay(gc.History.of([1.0, 2.0]), both)
