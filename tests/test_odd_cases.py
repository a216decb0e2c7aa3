"""What happens beneath a clipper: other parameters, other processes, odd numbers."""

import collections
import copy
import dataclasses
import gc as garbage
import math
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gradclip as gc
import gradclip.jax
from gradclip import advise
from gradclip.jax import as_optax
from gradclip.per_sample import clipped_sum
from gradclip.ruletext import rule_from
from gradclip.torch import (
    Clipper,
    attach,
    clip_grad_norm_,
    clip_grads_with_norm_,
    get_total_norm,
)


def parameter(*numbers):
    p = torch.nn.Parameter(torch.zeros(len(numbers)))
    p.grad = torch.tensor(numbers)
    return p


def test_a_parameter_in_the_place_of_another_is_clipped():
    a, b = parameter(3.0, 4.0), parameter(1.0)
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    clipper = attach(optimizer, gc.Norm(1.0))
    optimizer.step()
    new = parameter(30.0, 40.0)
    optimizer.param_groups[0]["params"] = [new]
    b.grad.zero_()
    optimizer.step()
    assert float(clipper.info.norm) == 50.0
    assert float(new.detach().norm()) == pytest.approx(1.0)


def test_the_memory_of_a_parameter_goes_with_it():
    a, b = parameter(1.0), parameter(100.0)
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    clipper = attach(optimizer, gc.EMA(warmup=1))
    optimizer.step()
    c = parameter(7.0)
    optimizer.param_groups[0]["params"].append(c)
    a.grad, b.grad = torch.tensor([1.0]), torch.tensor([100.0])
    optimizer.step()
    assert clipper.info.norm.tolist() == [1.0, 7.0, 100.0]
    assert not bool(clipper.info.clipped)
    del optimizer.param_groups[1]
    optimizer.step()
    assert clipper.info.norm.tolist() == [1.0, 7.0]
    assert clipper.state_dict()["0.ema"].tolist() == [1.0, 7.0]


def test_a_memory_that_has_grown_takes_up_new_parameters():
    a = parameter(1.0)
    optimizer = torch.optim.SGD([a], lr=0.0)
    clipper = attach(optimizer, gc.Percentile(window=None, over="tensor"), doctor=())
    for _ in range(300):
        optimizer.step()
    optimizer.add_param_group({"params": [parameter(2.0)]})
    optimizer.step()
    assert clipper.state_dict()["0.count"].tolist() == [301, 1]


def test_a_memory_that_has_grown_can_be_loaded():
    a = parameter(1.0)
    clipper = Clipper([a], gc.Percentile(window=None), doctor=())
    for _ in range(300):
        clipper.clip_()
    saved = clipper.state_dict()
    other = Clipper([a], gc.Percentile(window=None), doctor=())
    other.load_state_dict(saved)
    for key, x in other.state_dict().items():
        assert torch.equal(x, saved[key])


@pytest.mark.parametrize("policy", ["raise", "zero"])
@pytest.mark.parametrize("rule", [gc.EMA(warmup=1), gc.Stabilize()])
def test_a_missing_gradient_is_no_bad_one(rule, policy):
    a, b = parameter(1.0), parameter(2.0)
    clipper = Clipper([a, b], rule, on_nonfinite=policy, doctor=())
    clipper.clip_()
    b.grad = None
    clipper.clip_()
    b.grad = torch.tensor([float("nan")])
    if policy == "raise":
        with pytest.raises(gc.NonFiniteError, match=r"\[1\] \(1 of 1 elements\)"):
            clipper.clip_()
    else:
        clipper.clip_()
        assert float(b.grad) == 0.0


@pytest.mark.parametrize("fused", [False, True])
def test_two_clippers_leave_nothing_behind(fused):
    p = parameter(30.0, 40.0)
    optimizer = torch.optim.SGD([p], lr=1.0, fused=fused)
    both = [attach(optimizer, gc.Norm(limit), doctor=()) for limit in (1.0, 0.5)]
    optimizer.step()
    assert float(p.detach().norm()) == pytest.approx(0.5)
    for clipper in both:
        clipper.detach()
    p.grad = torch.tensor([30.0, 40.0])
    p.data.zero_()
    optimizer.step()
    assert p.tolist() == [-30.0, -40.0]


def test_what_is_around_an_optimizer_is_refused_by_name():
    class Around(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    inner = torch.optim.SGD([parameter(1.0)], lr=1.0)
    with pytest.raises(TypeError, match=r"Around is around one: attach to its"):
        attach(Around(inner), gc.Norm(1.0))


@pytest.mark.parametrize("shape", [(20, 10), (2, 2), (), (3, 4, 5)])
@pytest.mark.parametrize("over", ["all", "tensor", "unit"])
def test_complex_tensors_of_any_shape(shape, over):
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.complex64))
    p.grad = torch.randn(shape, dtype=torch.complex64)
    want = float(torch.linalg.vector_norm(p.grad.to(torch.complex128)))
    norm = Clipper([p], gc.Norm(1e9, over=over)).clip_().norm
    assert float(torch.linalg.vector_norm(norm)) == pytest.approx(want)
    assert float(get_total_norm([p.grad])) == pytest.approx(want)


def test_a_gradient_that_is_conjugated_lazily():
    w = torch.nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))
    (torch.randn(2, 3, dtype=torch.complex64) @ w.mH).abs().square().sum().backward()
    assert w.grad.is_conj()
    want = w.grad.resolve_conj() / torch.linalg.vector_norm(w.grad)
    clip_grad_norm_([w], 1.0)
    torch.testing.assert_close(w.grad, want)


def test_patterns_fit_the_names_inside_of_data_parallel():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    rule = gc.by_name({"1.*": None, "*": gc.Norm(1.0)})
    clipper = Clipper(torch.nn.DataParallel(net), rule)
    assert clipper.names == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_bad_element_that_was_cleared_is_not_carried_on():
    clipper = gc.UClip(gc.Value(1.0), on_nonfinite="zero")
    clipper.clip(np.array([np.nan, 2.0]))
    clipped, _ = clipper.clip(np.array([0.5, 0.0]))
    assert clipped.tolist() == [0.5, 1.0]


def test_a_history_that_ends_before_the_program_is_written(tmp_path):
    path = tmp_path / "run.jsonl"
    clipper = gc.Clipper(gc.Norm(1.0), history=gc.History(path))
    for _ in range(7):
        clipper.clip(np.ones(2))
    del clipper
    garbage.collect()
    assert len(gc.History.load(path)) == 7


def test_dictionaries_are_matched_by_their_keys():
    grads = {"b": np.ones(2), "a": np.ones(2)}
    params = {"a": np.full(2, 1e-3), "b": np.full(2, 1e3)}
    clipped, _ = gc.clip(grads, gc.Relative(0.01), params=params)
    assert clipped["b"].tolist() == [1.0, 1.0]
    assert float(np.linalg.norm(clipped["a"])) < 1e-4
    out = {"a": np.empty(2), "b": np.empty(2)}
    gc.clip({"b": np.ones(2), "a": np.zeros(2)}, gc.Norm(9.0), out=out)
    assert out["b"].tolist() == [1.0, 1.0]
    assert out["a"].tolist() == [0.0, 0.0]


def test_numbers_of_numpy_are_arguments_like_others():
    rule = gc.ZScore(z=np.float32(2.5), warmup=np.int64(7), max_limit=np.float64(2.0))
    assert rule_from(repr(rule)) == rule == gc.ZScore(2.5, warmup=7, max_limit=2.0)
    assert repr(gc.Norm(np.float64(1.5))) == repr(gc.Norm(1.5))


def test_a_comma_may_be_a_decimal_sign(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("step;loss;grad_norm;norm\n0;2,0;1,5;9,0\n1;1,234;1,125;9,0\n")
    assert gc.History.load(path).norm.tolist() == [1.5, 1.125]


STARTED = """
import multiprocessing, sys
import numpy as np
import gradclip as gc

def record(history):
    clipper = gc.Clipper(gc.Norm(1.0), history=history)
    for _ in range(3):
        clipper.clip(np.ones(2))
    history.flush()

if __name__ == "__main__":
    history = gc.History(sys.argv[2])
    context = multiprocessing.get_context(sys.argv[1])
    process = context.Process(target=record, args=(history,))
    process.start()
    process.join()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_history_goes_with_a_process_that_is_started(tmp_path, method):
    program, path = tmp_path / "program.py", tmp_path / "run.jsonl"
    program.write_text(STARTED)
    subprocess.run([sys.executable, program, method, path], check=True)
    assert len(gc.History.load(path)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tiniest_row_is_stretched_without_overflow(dtype):
    p = torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    p.grad = torch.tensor([[3.0, 4.0], [1e-40, 0.0]], dtype=dtype)
    info = Clipper(p, gc.Normalize(over="unit")).clip_()
    torch.testing.assert_close(p.grad[0], torch.tensor([0.6, 0.8], dtype=dtype))
    torch.testing.assert_close(
        p.grad[1], torch.tensor([1.0, 0.0], dtype=dtype), rtol=1e-4, atol=0
    )
    assert bool(info.finite)


def test_a_modulus_beyond_float32_is_finite_in_complex64():
    clipped, info = gc.clip(np.array([3e38 + 3e38j], np.complex64), gc.Norm(1.0))
    assert float(info.norm) == pytest.approx(3e38 * 2**0.5)
    assert abs(clipped[0]) == pytest.approx(1.0)


def test_limits_of_tensors_are_not_advised_as_one_that_was_in_force(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    clipper = gc.Clipper(gc.Norm(1.3, over="tensor"), history=history)
    rng = np.random.default_rng(0)
    for _ in range(200):
        clipper.clip([rng.normal(size=4) for _ in range(50)])
    history.flush()
    said = str(gc.advise(gc.History.load(history.path)))
    assert "in force" not in said
    assert "clipped at" not in said


def test_a_fact_that_is_no_number_is_refused_at_once(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    _, info = gc.clip(np.ones(2), gc.Norm(1.0))
    history.record(0, info, loss=None)
    with pytest.raises(TypeError, match=r"record\(lr=\[0.1, 0.2\]\): a line holds"):
        history.record(1, info, lr=[0.1, 0.2])
    history.record(1, info, lr=np.float32(0.1), loss=torch.tensor(2.0))
    assert history.step.tolist() == [0, 1]


def test_each_run_of_a_file_is_replayed_from_an_empty_memory(tmp_path):
    path = tmp_path / "run.jsonl"
    for size in (1.0, 100.0):
        clipper = gc.Clipper(gc.Norm(1e9), history=gc.History(path))
        for i in range(60):
            clipper.clip(np.array([size * (1 + 0.1 * (i % 3))]))
        clipper.history.flush()
    both = gc.History.load(path)
    again = gc.replay(both, gc.ZScore(warmup=10))
    alone = [gc.replay(run, gc.ZScore(warmup=10)) for run in both.runs]
    assert again.scale.tolist() == [x for run in alone for x in run.scale.tolist()]


def test_a_rule_that_counts_elements_does_so_in_backward():
    net = torch.nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    clipper = attach([optimizer], gc.RMS(1.0, over="all"), in_backward=True)
    net.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(1, 10)).sum().backward()
    assert float(clipper.info.limit) == pytest.approx(10.0)


@pytest.mark.parametrize("curve", ["ratio", "tanh", "root"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_smooth_limit_that_is_infinite_leaves_the_norm(curve, size):
    clipper = gc.Clipper(gc.Smooth(lambda step: math.inf, curve=curve))
    clipped, info = clipper.clip(np.float32([3.0, 4.0]) * np.float32(size))
    np.testing.assert_allclose(clipped, np.float32([3.0, 4.0]) * np.float32(size))
    assert bool(info.finite)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_a_norm_far_below_a_smooth_limit_is_kept(kind):
    grads = np.array([3.0, 4.0], kind) * np.array(1e-25, kind)
    clipped, _ = gc.clip(grads, gc.Smooth(1e20, curve="tanh"))
    np.testing.assert_allclose(clipped, grads, rtol=1e-6)


MEMORIES = [
    gc.EMA(warmup=1),
    gc.SPAM(ratio=2.0, warmup=1),
    gc.Percentile(over="tensor"),
]


@pytest.mark.parametrize("rule", MEMORIES, ids=lambda rule: type(rule).__name__)
def test_memories_follow_the_names_of_their_tensors(rule):
    def grads(small, large):
        return {"b": np.full(2, small), "a": np.full(3, large)}

    steps = [grads(1.0, 100.0), grads(1.1, 90.0), grads(5.0, 500.0)]
    straight, turning = gc.Clipper(rule), gc.Clipper(rule)
    for i, step in enumerate(steps):
        want, _ = straight.clip(step)
        turned = dict(reversed(step.items())) if i % 2 else step
        got, _ = turning.clip(turned)
        assert list(got) == list(turned)
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("rule", MEMORIES, ids=lambda rule: type(rule).__name__)
def test_a_memory_finds_its_tensors_in_another_library(rule):
    first = {"b": np.full(2, 1.0), "a": np.full(3, 100.0)}
    second = {"b": np.full(2, 5.0), "a": np.full(3, 500.0)}
    clipper = gc.Clipper(rule)
    clipper.clip(first)
    saved = clipper.state_dict()
    params = {name: jnp.zeros(x.shape) for name, x in first.items()}
    transform = gradclip.jax.as_optax(rule)
    state = gradclip.jax.load_state_dict(rule, transform.init(params), saved, params)
    back = gc.Clipper(rule)
    back.load_state_dict(gradclip.jax.state_dict(rule, state, params))
    named = {n: torch.nn.Parameter(torch.zeros(x.shape)) for n, x in params.items()}
    of_torch = Clipper(named, rule, doctor=())
    of_torch.load_state_dict(saved)
    for name, p in named.items():
        p.grad = torch.tensor(second[name], dtype=torch.float32)
    of_torch.clip_()
    of_jax, _ = transform.update({n: jnp.asarray(x) for n, x in second.items()}, state)
    want, again = clipper.clip(second)[0], back.clip(second)[0]
    for name in want:
        np.testing.assert_allclose(of_jax[name], want[name], rtol=1e-5)
        np.testing.assert_allclose(again[name], want[name], rtol=1e-5)
        np.testing.assert_allclose(named[name].grad, want[name], rtol=1e-5)


def test_a_memory_of_several_tensors_is_not_saved_without_their_names():
    state = gradclip.jax.as_optax(gc.EMA()).init({"a": jnp.zeros(1), "b": jnp.zeros(1)})
    with pytest.raises(ValueError, match="hand over params="):
        gradclip.jax.state_dict(gc.EMA(), state)


def test_a_gradient_that_is_none_does_not_shift_the_others():
    params = {"a": jnp.ones(2), "b": 100 * jnp.ones(2), "c": "no array"}
    transform = gradclip.jax.as_optax(gc.Relative(0.1, over="tensor"))
    state = transform.init({"b": params["b"]})
    grads = {"a": None, "b": jnp.array([30.0, 40.0]), "c": None}
    updates, _ = transform.update(grads, state, params)
    weight = 100 * math.sqrt(2)
    np.testing.assert_allclose(updates["b"], grads["b"] * 0.1 * weight / 50, rtol=1e-5)
    assert updates["a"] is None


def test_gradients_may_be_any_kind_of_dictionary():
    grads = collections.defaultdict(list, x=np.array([3.0, 4.0]))
    clipped, _ = gc.clip(grads, gc.Norm(1.0))
    assert type(clipped) is collections.defaultdict
    assert clipped["x"].round(4).tolist() == [0.6, 0.8]


def test_a_memory_saved_before_the_first_step_is_an_empty_one():
    saved = gc.Clipper(gc.ZScore()).state_dict()
    used = gc.Clipper(gc.ZScore())
    used.clip(np.ones(2))
    used.load_state_dict(saved)
    assert "0.mean" not in used.state_dict()
    p = parameter(3.0, 4.0)
    of_torch = Clipper([p], gc.ZScore(), doctor=())
    of_torch.clip_()
    of_torch.load_state_dict(saved)
    assert of_torch.state_dict()["0.mean"] == of_torch.state_dict()["step"] == 0
    state = gradclip.jax.as_optax(gc.ZScore()).init(jnp.zeros(2))
    state = gradclip.jax.load_state_dict(gc.ZScore(), state, saved)
    assert float(state.memory[0]["mean"]) == 0.0


@pytest.mark.parametrize("shapes", [[(2, 3), (2,)], [(3, 3)], [(3,)]])
def test_a_memory_of_other_elements_is_refused(shapes):
    rule = gc.SPAM(ratio=2.0, warmup=1)
    other, clipper = gc.Clipper(rule), gc.Clipper(rule)
    other.clip([np.ones(shape) for shape in shapes])
    clipper.clip([np.ones((2, 3))])
    before = clipper.state_dict()
    with pytest.raises(ValueError, match="it was saved with other parameters"):
        clipper.load_state_dict(other.state_dict())
    for name, x in clipper.state_dict().items():
        np.testing.assert_array_equal(x, before[name])


def test_one_more_gradient_for_a_memory_of_elements_is_refused():
    clipper = gc.Clipper(gc.SPAM(ratio=2.0, warmup=1))
    clipper.clip([np.ones(2)])
    with pytest.raises(ValueError, match="nothing of a gradient number 2"):
        clipper.clip([np.ones(2), np.ones(3)])


def test_a_band_may_begin_at_zero():
    for rule in (gc.Band(0.0, 1.0, over="all"), gc.MovingBand(np.float32(0), 2.0)):
        assert rule.low == 0.0
        assert type(rule.low) is float
    clipper = gc.Clipper(gc.Band(lambda step: 0.0, 1.0, over="all"))
    clipped, _ = clipper.clip(np.array([0.3, 0.4]))
    assert clipped.tolist() == [0.3, 0.4]
    with pytest.raises(ValueError, match="between 0 and high"):
        gc.Band(np.float32(2.0), 1.0)


def test_what_cannot_be_an_argument_is_refused_where_it_is_given():
    for make in (
        lambda: gc.Quantile(start=math.inf),
        lambda: gc.Quantile(rate=1000.0),
        lambda: rule_from("by_name(1)"),
        lambda: rule_from("Norm(1.0, over='unit', axis='q')"),
    ):
        with pytest.raises(ValueError, match=r"start|rate|by_name|axis"):
            make()


@pytest.mark.parametrize(
    "rule", [gc.Percentile(window=10), gc.Deviation(window=10, warmup=2)]
)
def test_a_ring_in_float32_turns_after_many_million_steps(rule):
    p = parameter(3.0, 4.0)
    clipper = Clipper([p], rule, doctor=())
    saved = clipper.state_dict()
    saved["step"] += 1
    saved["0.count"] = torch.tensor(2.0**23, dtype=torch.float32)
    saved["0.norms"] = saved["0.norms"].float()
    clipper.load_state_dict(saved)
    clipper._memory.states = [
        {name: x.float() for name, x in state.items()}
        for state in clipper._memory.states
    ]
    for _ in range(12):
        clipper.clip_()
        p.grad = torch.tensor([3.0, 4.0])
    state = clipper.state_dict()
    assert bool(state["0.norms"].isfinite().all())
    assert 2**22 - 10 <= float(state["0.count"]) < 2**22 + 30


def test_an_empty_column_is_no_scale(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,grad_norm,limit,scale\n0,1.0,2.0,\n1,3.0,2.0,\n")
    history = gc.History.load(path)
    assert history.norm.tolist() == [1.0, 3.0]
    assert np.isnan(history.scale).all()


@pytest.mark.parametrize("fact", [1j, np.complex128(1), np.array("text"), [1.0]])
def test_a_fact_that_no_line_can_hold_is_refused(tmp_path, fact):
    history = gc.History(tmp_path / "run.jsonl")
    _, info = gc.clip(np.ones(2), gc.Norm(1.0))
    with pytest.raises(TypeError, match="a line holds"):
        history.record(0, info, loss=fact)


def test_facts_about_a_run_that_no_header_can_hold_are_refused(tmp_path):
    facts = {}
    facts["itself"] = facts
    with pytest.raises(TypeError, match="the header is JSON"):
        gc.History(tmp_path / "run.jsonl", run=facts)


def test_a_state_is_loaded_after_a_group_was_added():
    def trained():
        a, b = parameter(1.0), parameter(100.0)
        optimizer = torch.optim.SGD([a], lr=1.0)
        clipper = attach(optimizer, gc.EMA(warmup=1))
        optimizer.add_param_group({"params": [b]})
        return optimizer, clipper

    optimizer, clipper = trained()
    optimizer.step()
    _, other = trained()
    other.load_state_dict(clipper.state_dict())
    assert other.state_dict()["0.ema"].tolist() == [1.0, 100.0]


def test_a_group_that_is_added_is_clipped_in_backward():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizers = [torch.optim.SGD([a], lr=1.0)]
    clipper = attach(optimizers, gc.Norm(1.0), in_backward=True, doctor=())
    optimizers[0].add_param_group({"params": [b]})

    def step(p):
        if a.grad is not None and b.grad is not None:
            optimizers[0].step()
            a.grad = b.grad = None

    for p in (a, b):
        p.register_post_accumulate_grad_hook(step)
    (3 * a + 4 * b).sum().backward()
    assert float(clipper.info.norm) == 5.0
    assert [a.item(), b.item()] == pytest.approx([-0.6, -0.8])
    assert len(clipper.params) == 2


def test_tensors_are_not_promised_to_be_recorded_in_backward(tmp_path):
    history = gc.History(tmp_path / "run.jsonl", tensors_every=1)
    optimizer = torch.optim.SGD([parameter(1.0)], lr=1.0)
    with pytest.raises(ValueError, match="without tensors_every"):
        attach(optimizer, gc.Norm(1.0), in_backward=True, history=history)


def test_a_clipper_can_be_copied_and_sent_after_it_has_clipped(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    p = parameter(3.0, 4.0)
    clipper = Clipper([p], gc.ZScore(), history=history)
    clipper.clip_()
    for other in (copy.deepcopy(clipper), pickle.loads(pickle.dumps(clipper))):
        assert float(other.state_dict()["0.mean"]) == 5.0
        other.history.close()
    history.close()
    assert gc.History.load(tmp_path / "run.jsonl").step.tolist() == [0]


def test_a_parameter_beside_the_names_of_its_group_gets_a_number():
    a, b = parameter(1.0), parameter(2.0)
    optimizer = torch.optim.SGD([("a", a)], lr=1.0)
    optimizer.param_groups[0]["params"].append(b)
    assert attach(optimizer, gc.Norm(1.0)).names == ["a", "[1]"]


def test_a_lost_run_is_no_reason_to_trust_what_was_recorded():
    steps = 400
    norm = np.random.default_rng(0).lognormal(size=steps)
    loss = np.where(np.arange(steps) < 60, 2.0 - 0.01 * np.arange(steps), 9.0)
    record = gc.History.of(norm, loss=loss).recorded
    assert "broken model" in advise(gc.History.from_record(record, None)).reasons[0]
    elements = dataclasses.replace(record, rule="Value(1.0)")
    assert advise(gc.History.from_record(elements, None)).limit is None
    largest = dataclasses.replace(record, rule="Norm(inf, p=inf)")
    assert advise(gc.History.from_record(largest, None)).rule.p == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_elements_that_were_cleared_are_told(bad):
    grads = np.array([bad, 2.0])
    clipped, info = gc.clip(grads, gc.Norm(1.0), on_nonfinite="zero")
    assert clipped.tolist() == pytest.approx([0.0, 1.0])
    assert not bool(info.finite)
    assert bool(info.kept)
    p, idle = parameter(bad, 2.0), torch.nn.Parameter(torch.zeros(1))
    clipper = Clipper([p, idle], gc.EMA(), on_nonfinite="zero", doctor=())
    assert [bool(x) for x in (clipper.clip_().finite, clipper.info.kept)] == [False, 1]
    p.grad = torch.tensor([1.0, 2.0])
    assert bool(clipper.clip_().finite)
    transform = gradclip.jax.as_optax(gc.Norm(1.0), on_nonfinite="zero")
    _, state = transform.update(jnp.asarray(grads), transform.init(jnp.zeros(2)))
    assert not bool(state.info.finite)
    assert bool(state.info.kept)


def test_tensors_of_a_branch_that_was_replaced_are_left_out(tmp_path):
    history = gc.History(tmp_path / "run.jsonl", tensors_every=1)
    p = parameter(1.0)
    clipper = Clipper([p], gc.EMA(), history=history, doctor=())
    saved = None
    for i in range(8):
        p.grad = torch.tensor([1.0 + i])
        saved = clipper.state_dict() if i == 3 else saved
        clipper.clip_()
    clipper.load_state_dict(saved)
    for i in range(2):
        p.grad = torch.tensor([10.0 + i])
        clipper.clip_()
    history.close()
    again = gc.History.load(tmp_path / "run.jsonl")
    assert again.tensors.step.tolist() == again.step.tolist() == [0, 1, 2, 3, 4]
    assert again.tensors.norm[:, 0].tolist() == [1.0, 2.0, 3.0, 10.0, 11.0]
    assert gc.replay(again, gc.EMA()).scale.size == 5


LIMITS = {
    "torch": (torch.tensor, lambda x: x.fill_(-1.0)),
    "numpy": (np.array, lambda x: x.fill(-1.0)),
}


@pytest.mark.parametrize("library", LIMITS)
def test_a_limit_in_an_array_is_looked_at_at_every_step(library):
    make, spoil = LIMITS[library]
    limit, w = make(1.0), parameter(3.0, 4.0)
    optimizer = torch.optim.SGD([w], lr=1.0)
    attach(optimizer, gc.Norm(limit))
    arrays = gc.Clipper(gc.Norm(limit))
    spoil(limit)
    with pytest.raises(ValueError, match=r"has the limit -1\.0 at step 0.*Nothing was"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"has the limit -1\.0 at step 0.*Nothing was"):
        arrays.clip(np.array([3.0, 4.0]))
    assert w.tolist() == [0, 0]
    assert w.grad.tolist() == [3, 4]


@pytest.mark.parametrize("limit", [np.array(1.0), torch.tensor(1.0), jnp.array(1.0)])
@pytest.mark.parametrize("own", [np.array, torch.tensor, jnp.array])
def test_a_limit_may_be_of_another_library(own, limit):
    clipped, _ = gc.clip(own([3.0, 4.0]), gc.Norm(limit))
    assert type(clipped) is type(own([1.0]))
    np.testing.assert_allclose(clipped, [0.6, 0.8], rtol=1e-6)


def test_a_schedule_over_singular_values():
    clipper = gc.Clipper(gc.Norm(lambda step: 1 / (1 + step), over="singular"))
    limits = [clipper.clip(np.eye(2) * 3)[0][0, 0] for _ in range(3)]
    np.testing.assert_allclose(limits, [1, 1 / 2, 1 / 3], rtol=1e-6)


def test_only_limits_may_be_arrays():
    with pytest.raises(TypeError, match=r"plain number.*limits may be arrays"):
        gc.Relative(jnp.array(0.5))


class Doubling(gc.rules.Rule):
    """A rule of one's own that remembers each unit."""

    scopes = ("all", "tensor", "unit")

    def __init__(self):
        object.__setattr__(self, "over", "unit")

    @property
    def stateful(self):
        return True

    def init(self, norm, xp):
        return {"last": xp.zeros_like(norm)}

    def update(self, seen, state):
        last = state["last"]
        limit = seen.xp.where(last > 0, 2 * last, math.inf)
        return limit, {"last": seen.xp.where(seen.norm < limit, seen.norm, limit)}


def test_a_rule_of_ones_own_may_remember_units():
    steps = np.array([[[1.0, 2.0], [3.0, 4.0]], [[30.0, 40.0], [3.0, 4.0]]])
    arrays, w = gc.Clipper(Doubling()), torch.nn.Parameter(torch.zeros(2, 2).double())
    clipper = Clipper([w], Doubling())
    transform = gradclip.jax.as_optax(Doubling())
    state = transform.init(jnp.zeros((2, 2)))
    for grad in steps:
        want, _ = arrays.clip(grad)
        w.grad = torch.tensor(grad)
        clipper.clip_()
        got, state = transform.update(jnp.array(grad), state)
        np.testing.assert_allclose(w.grad, want)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.linalg.norm(want[0]) == pytest.approx(2 * math.sqrt(5))


class Fading(Doubling):
    """A rule of one's own that bends elements by the largest one of the last step."""

    scopes = ("element",)
    bends = True

    def __init__(self):
        object.__setattr__(self, "over", "element")

    def update(self, seen, state):
        last = seen.xp.where(state["last"] > 0, state["last"], math.inf)
        return seen.norm / (1 + seen.norm / last), {"last": seen.norm}


def test_a_rule_of_ones_own_may_remember_what_bends_its_elements():
    arrays, w = gc.Clipper(Fading()), torch.nn.Parameter(torch.zeros(2).double())
    clipper, transform = Clipper([w], Fading()), gradclip.jax.as_optax(Fading())
    state = transform.init(jnp.zeros(2))
    for grad, want in (([1.0, -3.0], [1.0, -3.0]), ([3.0, -1.0], [1.5, -0.75])):
        w.grad = torch.tensor(grad).double()
        clipper.clip_()
        updates, state = transform.update(jnp.array(grad), state)
        for got in (arrays.clip(np.array(grad))[0], w.grad, updates):
            np.testing.assert_allclose(got, want, rtol=1e-6)


def test_what_u_clip_carries_waits_for_a_bad_element():
    clipper = gc.UClip(gc.Value(1.0), on_nonfinite="zero")
    given = [2.5, 0.0], [math.nan, 1.0], [0.0, 0.0], [0.0, 0.0]
    told = [clipper.clip(np.array(g))[0].tolist() for g in given]
    assert told == [[1, 0], [0, 1], [1, 0], [0.5, 0]]


def test_a_group_with_nan_is_left_where_nan_is_ignored():
    bad = {"a": np.array([3.0, math.nan]), "b": np.array([30.0])}
    for rule in (gc.Norm(0.5), gc.by_name({"*": gc.Norm(0.5)})):
        clipped, info = gc.clip(bad, rule, on_nonfinite="ignore")
        assert clipped["b"].tolist() == [30.0]
        assert not info.finite
    clipper = gc.Clipper(gc.by_name({"*": gc.EMA(1.0, over="all")}), "ignore")
    clipper.clip({"a": np.array([3.0, 4.0]), "b": np.array([0.0])})
    clipper.clip(bad)
    assert clipper.state_dict()["0.0.ema"].tolist() == [5.0, 5.0]


def test_a_missing_gradient_is_no_bad_one_in_a_group():
    a, b = parameter(3.0, 4.0), parameter(1.0)
    b.grad = None
    rule = gc.by_name({"*": gc.EMA(0.5, warmup=1, over="all")})
    clipper = Clipper([a, b], rule, "ignore", doctor=())
    clipper.clip_()
    clipper.clip_()
    assert float(a.grad.norm()) == pytest.approx(2.5)


@pytest.mark.parametrize("clip", [clip_grad_norm_, lambda p, c: attach_once(p, c)])
def test_strided_gradients_take_no_call_for_each_element(clip, monkeypatch):
    """Two views of larger tensors; one call for each element takes a minute."""
    flat, wide = torch.nn.Parameter(torch.zeros(600_000)), torch.zeros(50257, 32)
    wide = torch.nn.Parameter(wide)
    flat.grad, wide.grad = torch.ones(1_200_000)[::2], torch.ones(50257, 80)[:, :32]
    calls, exact = [], torch.Tensor.aminmax
    monkeypatch.setattr(
        torch.Tensor, "aminmax", lambda *a, **k: calls.append(1) or exact(*a, **k)
    )
    norm = clip([flat, wide], 1.0)
    assert float(norm) == pytest.approx(math.sqrt(600_000 + 50257 * 32), rel=1e-7)
    assert len(calls) < 100
    total = flat.grad.double().square().sum() + wide.grad.double().square().sum()
    assert total == pytest.approx(1.0, rel=1e-6)


def attach_once(params, limit):
    """Clip within a step, and return the norm."""
    optimizer = torch.optim.SGD(params, lr=0.0)
    clipper = attach(optimizer, gc.Norm(limit), doctor=())
    optimizer.step()
    return clipper.info.norm


def test_gradients_whose_elements_overlap_are_clipped_once():
    w = torch.nn.Parameter(torch.zeros(2, 3))
    w.grad = torch.arange(1.0, 7.0).as_strided((2, 3), (1, 1))
    clip_grad_norm_([w], 1.0)
    assert float(w.grad.norm()) == pytest.approx(1.0)


def test_a_norm_beyond_float32_is_told():
    w = parameter(3e38, 3e38, 3e38)
    norm = get_total_norm([w.grad])
    assert norm.dtype == torch.float64
    assert float(norm) == pytest.approx(math.sqrt(3) * 3e38)
    clip_grads_with_norm_([w], 1.0, norm)
    assert float(w.grad.norm()) == pytest.approx(1.0)
    w.grad = torch.full((3,), 3e38)
    assert float(clip_grad_norm_([w], 1.0)) == pytest.approx(math.sqrt(3) * 3e38)
    w.grad = torch.full((3,), math.inf)
    assert clip_grad_norm_([w], 1.0).dtype == torch.float32


def test_a_norm_below_the_inverse_of_float64_clips():
    w = torch.nn.Parameter(torch.zeros(1).double())
    w.grad = torch.tensor([1.7e-310]).double()
    clip_grads_with_norm_([w], 1e-311, torch.tensor(1.7e-310).double())
    assert float(w.grad) == pytest.approx(1e-311, rel=1e-6)


def test_an_infinite_element_that_is_clipped_is_told():
    for info, clipped in (
        gc.clip(np.array([3.0, math.inf]), gc.Value(1.0), on_nonfinite="ignore")[::-1],
        (by_parameter([3.0, math.inf])),
    ):
        assert np.asarray(clipped).tolist() == [1.0, 1.0]
        assert (bool(info.clipped), float(info.scale)) == (True, 0.0)
        assert float(info.norm_after) == 1.0
        assert not info.finite


def by_parameter(numbers):
    """Clip elements in place, whatever is in them."""
    w = parameter(*numbers)
    return Clipper([w], gc.Value(1.0), "ignore", doctor=()).clip_(), w.grad


def test_a_detached_clipper_leaves_nothing_of_a_step_that_was_interrupted():
    w = parameter(3.0, 4.0)
    optimizer = torch.optim.SGD([w], lr=1.0, fused=True)
    clipper = attach(optimizer, gc.Norm(1e-3))

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    hook.remove()
    clipper.detach()
    optimizer.step()
    assert w.tolist() == [-3.0, -4.0]


def test_no_hook_outlives_its_clipper():
    w = parameter(3.0, 4.0)
    for _ in range(3):
        Clipper([w], gc.Norm(1.0))
        attach(torch.optim.SGD([w], lr=1.0), gc.Norm(1.0)).detach()
    garbage.collect()
    assert len(w._post_accumulate_grad_hooks or ()) == 0


def test_a_warning_names_the_line_that_is_at_fault():
    w = parameter(3.0, 4.0)
    clipper = Clipper([w], gc.Norm(1.0))
    clipper.clip_()
    with pytest.warns(gc.torch.ClipWarning, match="called twice") as caught:
        clipper.clip_()
    assert caught[0].filename == __file__
    optimizer = torch.optim.SGD([w], lr=1.0)
    attach(optimizer, gc.Norm(1.0))
    optimizer.step()
    with pytest.warns(gc.torch.ClipWarning, match="called twice") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


def test_norms_of_tensors_have_a_place_for_those_without_a_gradient():
    a, b = parameter(3.0, 4.0), parameter(1.0)
    a.grad = None
    norms = Clipper([a, b], gc.Norm(0.5, over="tensor")).clip_().norm
    np.testing.assert_array_equal(norms, [math.nan, 1.0])
    assert b.grad.tolist() == pytest.approx([0.5])


def test_memory_that_is_shared_within_a_call_is_refused():
    given = np.array([3.0, 4.0, 5.0, 6.0])
    a, b = given[:2], given[2:]
    with pytest.raises(ValueError, match="share memory"):
        gc.clip([a, b], gc.Norm(1.0), out=[b, a])
    assert given.tolist() == [3, 4, 5, 6]
    pairs = given[::2], given[1::2]
    gc.clip(list(pairs), gc.Norm(1.0), out=list(pairs))
    assert np.linalg.norm(given) == pytest.approx(1.0)


def test_the_derivative_of_a_clip_is_there_for_tensors_of_zeros():
    t = torch.tensor([3.0, 4.0], requires_grad=True)
    u = torch.zeros(2, requires_grad=True)
    sum(x.sum() for x in gc.clip([t, u], gc.Norm(1.0))[0]).backward()
    np.testing.assert_allclose(u.grad, [0.2, 0.2], rtol=1e-6)


STRETCHING = [
    gc.Normalize(),
    gc.Normalize(over="tensor"),
    gc.Normalize(over="element"),
    gc.Band(1.0, 2.0),
    gc.Stabilize(),
]


@pytest.mark.parametrize("rule", STRETCHING, ids=repr)
@pytest.mark.parametrize("make", [np.array, torch.tensor, jnp.array])
def test_what_is_almost_nothing_is_stretched_to_something_finite(rule, make):
    tiny = 2e-38 if make is jnp.array else 3e-310
    g = (
        make([tiny, 0.0])
        if make is not torch.tensor
        else torch.tensor([tiny, 0.0]).double()
    )
    clipped, info = gc.Clipper(rule).clip(g)
    assert np.isfinite(np.asarray(clipped)).all()
    assert bool(info.finite)


@pytest.mark.parametrize("over", ["all", "tensor", "unit", "element"])
@pytest.mark.parametrize("limit", [-0.2, math.nan])
def test_a_limit_that_compiled_code_cannot_refuse_lets_nothing_through(limit, over):
    clip = as_optax(gc.Norm(lambda step: jnp.float32(limit), over=over))
    grads = jnp.array([[3.0, 4.0], [0.3, 0.4]])
    clipped, state = jax.jit(clip.update)(grads, clip.init(grads))
    assert np.array_equal(np.asarray(clipped), np.zeros((2, 2)))
    assert not np.isnan(np.asarray(state.info.norm_after)).any()


def test_a_limit_for_samples_that_has_become_negative_is_refused():
    limit = np.array(1.0)
    rule = gc.Norm(limit)
    limit[...] = -1.0
    with pytest.raises(ValueError, match="a limit is above 0"):
        clipped_sum(np.array([[3.0, 4.0]]), rule)


@pytest.mark.parametrize("make", [np.array, torch.tensor, jnp.array])
def test_parameters_that_are_nan_make_no_gradient_nan(make):
    weights = make([[1.0, 2.0], [math.nan, 1.0]])
    clipped, info = gc.clip(make([[1.0, 1.0], [1.0, 1.0]]), gc.AGC(0.1), params=weights)
    assert np.isfinite(np.asarray(clipped)).all()
    assert bool(info.finite)


DERIVED = [
    gc.Norm(1.0),
    gc.Norm(1.0, over="tensor"),
    gc.Norm(1.0, over="unit"),
    gc.Norm(1.0, p=3.0),
    gc.Smooth(1.0),
    gc.Normalize(),
    gc.RMS(0.1),
]


@pytest.mark.parametrize(
    ("rule", "scale"),
    [*((rule, 1.0) for rule in DERIVED), (DERIVED[0], 0.0), (DERIVED[2], 0.0)],
    ids=str,
)
def test_the_derivative_in_jax_is_that_of_torch_where_something_is_zero(rule, scale):
    x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32) * np.float32(scale)
    t = torch.tensor(x, requires_grad=True)
    gc.clip(t, rule)[0].sum().backward()
    derive = jax.grad(lambda g: gc.clip(g, rule)[0].sum())
    # Without jit, which knows the numbers: once, since each operation is compiled.
    eager = scale == 0 and rule is DERIVED[0]
    found = (derive if eager else jax.jit(derive))(jnp.array(x))
    np.testing.assert_allclose(found, t.grad, rtol=1e-5, atol=1e-6)
    # Where both ways are computed, and one of them is chosen.
    both = jax.jit(jax.vmap(derive))(jnp.array([x]))
    np.testing.assert_allclose(both[0], t.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rule", [gc.ZScore(), gc.EMA(), gc.Deviation(), gc.Moment(), gc.Peak()], ids=repr
)
def test_a_derivative_goes_through_steps_that_only_remember(rule):
    def loss(a):
        w, clip = jnp.array([1.0, 2.0]), as_optax(rule)
        state = clip.init(w)
        for _ in range(3):
            update, state = clip.update(a * w, state)
            w = w - 0.1 * update
        return (w**2).sum()

    # Nothing is clipped in the warm-up: (1 - 0.1 a) ** 6 times 5.
    found = float(jax.jit(jax.grad(loss))(1.5))
    assert found == pytest.approx(-5 * 6 * 0.1 * (1 - 0.15) ** 5, rel=1e-4)


@pytest.mark.parametrize("kind", [gc.Clipper, gc.UClip])
@pytest.mark.parametrize("rule", [gc.EMA(warmup=1), gc.ZScore(), gc.Percentile()])
def test_a_memory_keeps_no_graph(kind, rule):
    clipper, w = kind(rule), torch.ones(2, requires_grad=True)
    for k in range(3):
        (g,) = torch.autograd.grad((w**3).sum() * 3**k, w, create_graph=True)
        clipper.clip([g])[0][0].square().sum().backward()
    assert w.grad is not None


@pytest.mark.parametrize(
    "rule",
    [
        gc.Value(1.0),
        gc.Norm(1.0, over="element"),
        gc.Band(0.1, 1.0),
        gc.Normalize(over="element"),
        gc.chain(gc.Norm(1.0), gc.Value(1.0)),
        gc.chain(gc.Value(1.0), gc.Normalize(over="element")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_skipped_step_is_told_alike_by_all(rule, bad):
    told = [
        gc.clip(make([bad, 3.0]), rule)[1]
        for make in (np.array, torch.tensor, jnp.array)
    ]
    assert {(bool(i.clipped), float(i.scale), bool(i.kept)) for i in told} == {
        (False, 1.0, False)
    }


def test_sparse_tensors_stay_sparse():
    places = torch.tensor([[0, 0, 2]])
    given = torch.sparse_coo_tensor(places, torch.tensor([1.0, 2.0, 4.0]), (4,))
    clipped, info = gc.clip([given, torch.zeros(2)], gc.Norm(1.0))
    assert clipped[0].is_sparse
    np.testing.assert_allclose(clipped[0].to_dense(), [0.6, 0, 0.8, 0], rtol=1e-6)
    assert float(info.norm) == 5.0
    assert given.to_dense().tolist() == [3, 0, 4, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: clipped_sum([x], gc.Norm(1.0)),
        lambda x: gc.UClip(gc.Norm(1.0)).clip([x]),
    ],
)
def test_sparse_tensors_are_refused_where_each_element_has_its_place(call):
    x = torch.sparse_coo_tensor([[0, 2], [0, 1]], torch.tensor([3.0, 4.0]), (3, 2))
    with pytest.raises(TypeError, match=r"gradients\[0\] of shape \(3, 2\) is sparse"):
        call(x)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(
    "call",
    [
        lambda x: gc.clip(x, gc.Norm(1.0)),
        lambda x: get_total_norm([x]),
    ],
)
def test_other_layouts_are_refused_by_name(call):
    with pytest.raises(TypeError, match=r"layout .*sparse_csr; gradients may"):
        call(torch.eye(3).to_sparse_csr())


def test_a_module_among_gradients_is_no_array():
    with pytest.raises(TypeError, match=r"gradients\[0\] is Linear, not an array"):
        gc.clip([torch.nn.Linear(1, 1)], gc.Norm(1.0))


def test_a_default_device_is_not_that_of_the_counts():
    w = parameter(3.0, 4.0)
    with torch.device("meta"):
        clipper = Clipper([w], gc.Norm(1.0), doctor=())
        clipper.clip_()
        norm = clip_grad_norm_([w], 0.5)
        clip_grads_with_norm_([w], 0.25, 0.5)
        clip_grads_with_norm_([w], 0.125, torch.tensor(0.25, device="cpu"))
        saved = clipper.state_dict()
        clipper.load_state_dict(saved)
    assert float(norm) == pytest.approx(1.0)
    assert float(w.grad.norm()) == pytest.approx(0.125)
    assert int(saved["step"]) == 1


def test_compiled_code_may_have_a_limit_in_a_tensor():
    w, limit = parameter(3.0, 4.0), torch.tensor(0.5)
    step = torch.compile(
        lambda: clip_grad_norm_([w], limit), fullgraph=True, backend="eager"
    )
    assert float(step()) == 5.0
    assert float(w.grad.norm()) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "clip",
    [
        lambda grads: gc.clip(grads, gc.Norm(1.0)),
        lambda grads: gc.UClip(gc.Norm(1.0)).clip(grads),
        lambda grads: clipped_sum(grads, gc.Norm(1.0)),
    ],
)
def test_what_holds_no_gradients_is_refused_everywhere(clip):
    with pytest.raises(ValueError, match="no gradients in here; was backward"):
        clip({})
    with pytest.raises(TypeError, match="not the module Linear"):
        clip(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"like a generator; hand over list"):
        clip(x for x in [np.ones(2)])


@pytest.mark.parametrize("rule", [gc.ZScore(warmup=2), gc.Moment(0.5, warmup=1)])
def test_one_clipper_takes_the_libraries_in_turn(rule):
    turns, alone = gc.Clipper(rule), gc.Clipper(rule)
    for i, convert in enumerate([np.asarray, torch.tensor, jnp.asarray] * 3):
        grads = [3.0, 4.0 + i % 4]
        clipped, info = turns.clip(convert(grads))
        expected, known = alone.clip(np.asarray(grads))
        np.testing.assert_allclose(np.asarray(clipped), expected, rtol=1e-6)
        assert bool(info.clipped) == bool(known.clipped)


@pytest.mark.parametrize(
    "rule",
    [gc.Norm(0.5), gc.Norm(0.5, over="tensor"), gc.Value(0.5), gc.Normalize()],
    ids=repr,
)
@pytest.mark.parametrize("derived", [False, True])
def test_torch_maps_a_clip_over_many(rule, derived):
    def clip(x):
        return gc.clip(x, rule)[0]

    call = torch.func.grad(lambda x: clip(x).square().sum()) if derived else clip
    many = torch.tensor([[3.0, 4.0], [0.1, 0.2], [-6.0, 8.0]])
    alone = torch.stack([call(x) for x in many])
    torch.testing.assert_close(torch.func.vmap(call)(many), alone)


def test_u_clip_names_what_it_carries_nothing_for():
    clipper = gc.UClip(gc.Norm(0.5))
    clipper.clip({"a": np.ones(3)})
    with pytest.raises(ValueError, match=r"cut off of 'a', and nothing for 'b'"):
        clipper.clip({"b": np.ones(3)})
