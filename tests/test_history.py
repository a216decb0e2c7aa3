"""A history survives what training runs go through: kills, full disks, restarts."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradclip as gc
from gradclip import recorder, watching
from gradclip.record import LogError
from gradclip.report import write_report
from gradclip.torch import Clipper, attach

ONES = torch.ones(1)


def lines(path):
    return path.read_text().splitlines()


def info_of(norm, limit=1.0):
    scale = min(1.0, limit / norm) if norm > 0 else 1.0
    return gc.Info(norm, limit, scale, math.isfinite(norm), scale < 1, norm)


def write(path, norms, first=0, **options):
    with gc.History(path, **options) as history:
        history.begin(gc.Norm(1.0))
        for i, norm in enumerate(norms):
            history.record(first + i, info_of(norm))
    return path


def test_what_was_recorded_is_what_is_read(tmp_path):
    path = write(tmp_path / "run.jsonl", [0.5, 2.0, math.inf], run={"lr": 0.1})
    history = gc.History.load(path)
    assert history.step.tolist() == [0, 1, 2]
    assert history.norm.tolist() == [0.5, 2.0, math.inf]
    assert history.limit.tolist() == [1.0, 1.0, 1.0]
    assert history.scale.tolist() == [1.0, 0.5, 0.0]
    assert len(history) == 3
    assert history.run == {"lr": 0.1}
    assert history.recorded.rule == repr(gc.Norm(1.0))


def test_a_history_that_is_written_can_be_read_meanwhile(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    assert len(history) == 0
    history.record(0, info_of(2.0))
    assert history.norm.tolist() == [2.0]
    history.record(1, info_of(3.0))
    assert history.norm.tolist() == [2.0, 3.0]


def test_every_line_is_json_that_other_tools_can_read(tmp_path):
    path = write(tmp_path / "run.jsonl", [math.nan, math.inf, 1.0])
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    head = json.loads(path.read_text().splitlines()[0])
    assert head == {"gradclip": 1, "rule": repr(gc.Norm(1.0)), "run": {}}


def test_the_header_is_json_that_other_tools_can_read(tmp_path):
    run = {"lr": math.nan, "betas": [0.9, math.inf], "more": {"least": -math.inf}}
    path = write(tmp_path / "run.jsonl", [1.0], run=run)
    head = json.loads(lines(path)[0], parse_constant=pytest.fail)
    told = {"lr": "NaN", "betas": [0.9, "Infinity"], "more": {"least": "-Infinity"}}
    assert head["run"] == told
    history = gc.History(path, run=run, flush_seconds=math.inf, flush_every=7)
    again = json.loads(json.dumps(history.arguments(), allow_nan=False))
    assert again["run"] == told
    assert gc.History(**again).arguments() == again


def test_a_file_that_others_write_is_told_once(tmp_path):
    path = tmp_path / "run.jsonl"
    histories = [gc.History(path), gc.History(path)]

    def write_in_turn():
        for step, history in product(range(5), histories):
            history.record(step, info_of(1.0))
            history.flush()

    with pytest.warns(RuntimeWarning, match="something else writes to it, too") as told:
        write_in_turn()
    assert len(told) == len(histories)


def test_going_on_in_a_file_that_was_closed_is_no_sharing(tmp_path):
    path = tmp_path / "run.jsonl"
    first, second = gc.History(path), gc.History(path)
    first.record(0, info_of(1.0))
    first.flush()
    for step in range(1, 4):
        second.record(step, info_of(1.0))
        second.flush()
    first.record(4, info_of(1.0))
    first.flush()


def test_a_line_of_ours_that_was_torn_is_nobody_elses(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    history = gc.History(path)

    def flushed(step):
        history.record(step, info_of(1.0))
        history.flush()

    def torn(place, text):
        with place.open("a") as file:
            file.write(text[:9])
        raise OSError(28, "No space left on device")

    def written_and_torn_in_turn():
        for step in range(1, 7):
            with monkeypatch.context() as full:
                full.setattr(recorder, "append", torn)
                flushed(step)
            flushed(step + 10)

    flushed(0)
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        written_and_torn_in_turn()
    assert len(gc.History.load(path).norm) == 7


def test_a_mark_before_the_header_does_not_cost_it(tmp_path):
    path = tmp_path / "run.jsonl"
    with gc.History(path) as history:
        clipper = gc.Clipper(gc.Value(0.5), history=history)
        clipper.clip(np.array([1.0]))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = gc.History.load(path)
    assert found.recorded.rule == repr(gc.Value(0.5))
    assert found.notes == ()


@pytest.mark.parametrize("how", ["moved", "emptied"])
def test_a_file_that_was_taken_away_begins_anew_with_all_it_needs(tmp_path, how):
    path = tmp_path / "run.jsonl"
    history = gc.History(path, tensors_every=1)
    history.begin(gc.Norm(1.0))
    for step in range(4):
        history.record_tensors(step, ("a", "b"), np.array([3.0, 4.0]))
        history.record(step, info_of(5.0))
        history.flush()
        if step == 1 and how == "moved":
            path.rename(tmp_path / "run.jsonl.1")
        elif step == 1:
            path.write_bytes(b"")
    found = gc.History.load(path)
    assert found.notes == ()
    assert found.step.tolist() == [2, 3]
    assert found.tensors.norm.tolist() == [[3.0, 4.0], [3.0, 4.0]]
    assert found.recorded.rule == repr(gc.Norm(1.0))


def clipped_by(history, rule, norms):
    clipper = gc.Clipper(rule, history=history)
    for norm in norms:
        clipper.clip([np.array([0.6 * norm]), np.array([0.8 * norm])])


def headers(path):
    return [json.loads(x)["rule"] for x in lines(path) if "gradclip" in json.loads(x)]


def test_another_rule_on_the_same_history_gets_a_header_and_a_run(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    rules = gc.Norm(1.0, over="tensor"), gc.Norm(2.0, over="tensor", p=1.0)
    clipped_by(history, rules[0], [5.0])
    clipped_by(history, rules[1], [5.0, 10.0])
    assert history.recorded.rule == repr(rules[1])
    assert headers(history.path) == [repr(rule) for rule in rules]
    runs = history.runs
    assert [run.recorded.rule for run in runs] == [repr(rule) for rule in rules]
    np.testing.assert_allclose(runs[0].norm, [5.0])
    np.testing.assert_allclose(runs[1].norm, [7.0, 14.0])


def test_a_step_under_another_rule_does_not_repeat_the_one_before(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    for limit in (1.0, 2.0):
        clipped_by(history, gc.Norm(limit), [5.0])
    assert history.limit.tolist() == [1.0, 2.0]
    assert history.recorded.run.tolist() == [0, 1]


def test_the_same_rule_again_needs_no_header(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    for _ in range(2):
        clipped_by(history, gc.Norm(1.0), [5.0, 6.0, 7.0])
    assert history.recorded.run.tolist() == [0, 0, 0, 1, 1, 1]
    assert headers(history.path) == [repr(gc.Norm(1.0))]


def test_norms_of_another_order_are_a_run_of_their_own(tmp_path):
    path = tmp_path / "run.jsonl"
    with gc.History(path) as history:
        for step in range(90):
            if step % 30 == 0:
                history.begin(gc.Norm(math.inf, p=1.0 + (step == 30)))
            history.record(step, info_of(1.0 + step / 100, math.inf))
    found = gc.History.load(path)
    assert [len(run) for run in found.runs] == [30, 30, 30]
    advice = gc.advise(found)
    assert advice.steps == 60
    assert advice.rule.p == 1.0
    assert any("1 of 3 runs hold other norms" in note for note in advice.notes)
    with pytest.raises(ValueError, match="the history holds those of order 2"):
        gc.replay(found, gc.Norm(1.0, p=1.0))
    assert len(gc.replay(found.runs[1], gc.Norm(1.0)).norm) == 30
    write_report([("run", found)], tmp_path / "page.html")


def linear():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def backward(model, factor=1.0):
    model.zero_grad()
    (model(torch.full((3, 4), factor)) ** 2).sum().backward()


@pytest.mark.parametrize("way", ["attach", "Clipper"])
def test_torch_records_what_it_did(tmp_path, way):
    model, optimizer = linear()
    history = gc.History(tmp_path / "run.jsonl", tensors_every=2)
    if way == "attach":
        clipper = attach(optimizer, gc.Norm(1.0), model, history=history)
        step = optimizer.step
    else:
        clipper = Clipper(model, gc.Norm(1.0), history=history)
        step = clipper.clip_
    told = []
    for i in range(5):
        backward(model)
        if i == 3:
            model.weight.grad[0, 0] = math.nan
        step()
        told.append(clipper.info)
    np.testing.assert_array_equal(history.norm, [float(x.norm) for x in told])
    np.testing.assert_array_equal(history.scale, [float(x.scale) for x in told])
    actions = [json.loads(x).get("action") for x in lines(history.path)]
    assert [x for x in actions if x][3] == "skip"
    assert history.tensors.names == ("weight", "bias")
    # The step that was dropped has them too.
    assert history.tensors.step.tolist() == [0, 2, 3, 4]
    whole = np.hypot(*history.tensors.norm.T)
    np.testing.assert_allclose(whole, history.norm[[0, 2, 3, 4]], rtol=1e-4)


def test_a_rule_over_each_tensor_records_the_norm_of_all(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    clipper = gc.Clipper(gc.Norm(1.0, over="tensor"), history=history)
    clipper.clip([np.array([3.0]), np.array([4.0])])
    assert history.norm.tolist() == [5.0]
    assert history.scale.tolist() == [0.25]


def test_a_resumed_clipper_goes_on_counting_its_steps(tmp_path):
    path = tmp_path / "run.jsonl"
    first = gc.Clipper(gc.ZScore(), history=gc.History(path))
    for norm in (1.0, 2.0, 3.0):
        first.clip(np.array([norm]))
        if norm == 2.0:
            saved = first.state_dict()
    first.history.close()
    second = gc.Clipper(gc.ZScore(), history=gc.History(path))
    second.load_state_dict(saved)
    second.clip(np.array([30.0]))
    second.history.close()
    history = gc.History.load(path)
    assert history.step.tolist() == [0, 1, 2]
    assert history.norm.tolist() == [1.0, 2.0, 30.0]
    assert any("resumed 1 time from" in note for note in history.notes)


@pytest.mark.parametrize(
    ("tries", "kept"),
    [
        ([(280, 285), (300, 400)], [*range(285), *range(300, 400)]),
        ([(280, 300), (290, 295), (300, 400)], [*range(295), *range(300, 400)]),
        ([(280, 290)] * 6 + [(280, 400)], range(400)),
    ],
)
def test_a_run_that_is_killed_again_and_again_is_one(tmp_path, tries, kept):
    path = write(tmp_path / "run.jsonl", [1.0] * 300)
    for i, (first, stop) in enumerate(tries):
        write(path, [2.0 + i] * (stop - first), first)
    history = gc.History.load(path)
    assert len(history.runs) == 1
    assert history.step.tolist() == list(kept)
    assert history.norm[280] >= 2.0
    assert history.norm[-1] == 1.0 + len(tries)
    (note,) = history.notes
    assert f"resumed {len(tries) - (tries[-1][0] == 300)} time" in note
    assert "two processes" not in note


@pytest.mark.parametrize(
    ("every", "told"), [(1, "2 jobs that took turns"), (30, "or two processes wrote")]
)
@pytest.mark.filterwarnings("ignore:.*grows between these steps")
def test_two_processes_on_one_file_are_told_apart_or_suspected(tmp_path, every, told):
    path = tmp_path / "run.jsonl"
    both = [gc.History(path, flush_every=every) for _ in range(2)]
    for history in both:
        history.begin(gc.Norm(1.0))
    for step in range(120):
        for i, history in enumerate(both):
            history.record(step, info_of(1.0 + i))
    for history in both:
        history.close()
    assert told in " ".join(gc.History.load(path).notes)


def test_reopening_goes_on_behind_the_earlier_steps(tmp_path):
    path = write(tmp_path / "run.jsonl", [1.0, 2.0])
    write(path, [3.0, 4.0], first=2)
    assert gc.History.load(path).norm.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_starting_afresh_makes_a_run_of_its_own(tmp_path):
    path = write(tmp_path / "run.jsonl", [1.0, 2.0])
    write(path, [5.0, 6.0, 7.0])
    runs = gc.History.load(path).runs
    assert [run.norm.tolist() for run in runs] == [[1.0, 2.0], [5.0, 6.0, 7.0]]


def test_a_file_torn_at_any_byte_loses_the_torn_line_only(tmp_path):
    data = write(tmp_path / "whole.jsonl", [1.0, 2.0, 3.0]).read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    torn = tmp_path / "torn.jsonl"
    for size in range(ends[1], len(data) + 1):
        torn.write_bytes(data[:size])
        # The last brace makes a line whole, with or without the end of it.
        whole = sum(end <= size for end in ends) - 1
        assert gc.History.load(torn).norm.tolist() == [1.0, 2.0, 3.0][:whole]


def test_reopening_a_torn_file_starts_a_new_line(tmp_path):
    data = write(tmp_path / "run.jsonl", [1.0, 2.0, 3.0]).read_bytes()
    for cut in range(1, 40):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(data[:-cut])
        write(path, [9.0], first=3)
        kept = [1.0, 2.0, 3.0, 9.0] if cut == 1 else [1.0, 2.0, 9.0]
        assert gc.History.load(path).norm.tolist() == kept


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_damage_gives_a_record_or_the_error_for_logs(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    path = write(folder / "run.jsonl", [1.0, 2.0, 3.0, 4.0])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(
            st.binary(max_size=4)
        )
    path.write_bytes(content)
    history = None
    with contextlib.suppress(LogError):
        history = gc.History.load(path, format="gradclip")
    if history:
        assert 0 < len(history) <= 8
        assert len(history) == history.step.size == history.limit.size


KILLED = """
import sys, numpy as np, gradclip as gc
history = gc.History(sys.argv[1], flush_every=7)
clipper = gc.Clipper(gc.Norm(1.0), history=history)
for step in range(10**9):
    clipper.clip(np.array([float(step)]))
    if (step + 1) % 7 == 0:
        print(step + 1, flush=True)
"""


def test_kill_9_loses_nothing_that_was_flushed(tmp_path):
    rng = np.random.default_rng(int(os.environ.get("GRADCLIP_KILLS", "0")))
    for attempt in range(int(os.environ.get("GRADCLIP_KILLS", "3"))):
        path = tmp_path / f"{attempt}.jsonl"
        command = [sys.executable, "-c", KILLED, str(path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        # What it still told before it died was flushed before it told so.
        told = child.stdout.read().splitlines(keepends=True)
        child.stdout.close()
        child.wait()
        flushed = int(told[-1]) if told and told[-1].endswith("\n") else 7
        norm = gc.History.load(path).norm
        assert norm.size >= flushed
        np.testing.assert_array_equal(norm, np.arange(norm.size))


def test_the_last_steps_are_written_when_the_program_ends(tmp_path):
    path = tmp_path / "run.jsonl"
    code = (
        "import numpy as np, gradclip as gc\n"
        f"clipper = gc.Clipper(gc.Norm(1.0), history=gc.History({str(path)!r}))\n"
        "clipper.clip(np.array([3.0]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert gc.History.load(path).norm.tolist() == [3.0]


def test_a_place_that_cannot_be_written_warns_once_and_training_goes_on(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    history = gc.History(blocked / "run.jsonl", flush_every=1)
    clipper = gc.Clipper(gc.Norm(1.0), history=history)
    with pytest.warns(RuntimeWarning, match=r"run\.jsonl.*the training goes on"):
        grads, _ = clipper.clip(np.array([2.0]))
    np.testing.assert_allclose(grads, [1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipper.clip(np.array([2.0]))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_warns_once(tmp_path):
    path = tmp_path / "run.jsonl"
    path.symlink_to("/dev/full")
    history = gc.History(path, flush_every=1)
    with pytest.warns(RuntimeWarning, match="No space left"):
        history.record(0, info_of(1.0))
    history.record(1, info_of(1.0))


def test_two_clippers_of_one_history_are_noticed_and_told_apart(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    pair = [gc.Clipper(gc.Norm(x), history=history) for x in (1.0, 1000.0)]
    for i in range(1, 9):
        for clipper, norm in zip(pair, (i, 100.0 * i), strict=True):
            clipper.clip(np.array([norm]))
    with pytest.warns(RuntimeWarning, match="two clippers.*a History of its own"):
        history.flush()
    norms = [*range(1, 9), *range(100, 900, 100)]
    assert gc.History.load(history.path).norm.tolist() == norms


def test_who_goes_back_again_and_again_is_one_clipper(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    clipper = gc.Clipper(gc.Norm(1.0), history=history)
    saved = clipper.state_dict()
    for _ in range(6):
        for i in range(3):
            clipper.clip(np.array([2.0 + i]))
        clipper.load_state_dict(saved)
    history.flush()
    assert gc.History.load(history.path).norm.tolist()[-3:] == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(("rank", "written"), [("0", True), ("1", False)])
def test_only_the_first_process_writes(tmp_path, monkeypatch, rank, written):
    monkeypatch.setenv("RANK", rank)
    path = write(tmp_path / "run.jsonl", [1.0])
    assert path.exists() == written


def test_steps_are_written_after_a_while_even_if_few(tmp_path):
    history = gc.History(tmp_path / "run.jsonl", flush_seconds=0.0)
    history.record(0, info_of(1.0))
    time.sleep(0.01)
    history.record(1, info_of(1.0))
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) >= 2


def test_numbers_stay_on_the_device_until_a_flush(tmp_path, monkeypatch):
    history = gc.History(tmp_path / "run.jsonl", flush_every=10)
    model, _ = linear()
    # A rule over tensors: one norm that is on the host is a number already.
    clipper = Clipper(model, gc.Norm(1.0, over="tensor"), history=history)
    backward(model)
    reads = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: reads.append(1) or t)
    clipper.clip_()
    assert not reads
    history.flush()
    assert 0 < len(reads) <= 7


def test_what_cannot_be_done_is_said(tmp_path):
    with pytest.raises(ValueError, match="flush_every=0"):
        gc.History(tmp_path / "run.jsonl", flush_every=0)
    with pytest.raises(TypeError, match="loaded, and takes no new steps"):
        gc.History.of([1.0]).record(0, info_of(1.0))
    later = tmp_path / "later.jsonl"
    later.write_text('{"gradclip": 2}\n{"step": 0, "norm": 1.0}\n')
    with pytest.raises(LogError, match=r"schema 2.*upgrade"):
        gc.History.load(later)


def test_each_norm_has_a_step():
    with pytest.raises(ValueError, match="step has 50 numbers, and norm 100"):
        gc.History.of(np.ones(100), step=range(50))


def test_facts_that_are_no_dictionary_are_none(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"gradclip": 1, "run": "x"}\n{"step": 0, "norm": 1}\n')
    assert gc.History.load(path).recorded.facts == {}


def test_a_folder_that_grows_is_shown_again(tmp_path):
    (tmp_path / "lr").mkdir()
    (tmp_path / "lr" / "events").write_text("more")
    before = watching._state(tmp_path)
    assert watching._state(tmp_path) == before
    (tmp_path / "lr" / "events").write_text("more and more")
    assert watching._state(tmp_path)[0] == before[0] + 9
    assert watching._state(tmp_path / "nothing") == (-1,)


def test_a_file_that_vanishes_while_it_is_looked_at_is_none(tmp_path, monkeypatch):
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    assert watching._state(tmp_path) != (-1,)
    monkeypatch.setattr(watching.Path, "exists", lambda path: True)
    assert watching._state(tmp_path) == (-1,)


def test_watch_says_which_log_of_a_folder_it_shows(tmp_path):
    for i, name in enumerate(["zscore", "norm"]):
        path = write(tmp_path / f"{name}.jsonl", [1.0 + i])
        os.utime(path, (100 + i, 100 + i))
    *_, last = watching._now(tmp_path, 100).renderables
    assert "Of this folder, norm.jsonl was read, the newest of 2" in last.plain


def test_what_is_waited_for_is_said(tmp_path):
    path = tmp_path / "out.log"
    path.write_text("starting\nstep 1 loss 2.0\n")
    (line,) = watching._now(path, 80).renderables
    assert "Waiting" in line.plain
    assert "no gradient norm in any line" in line.plain


def step_of(path, rule, *grads):
    """Return the line of a history for one step, and the report as numbers."""
    params = [torch.nn.Parameter(torch.zeros(len(g))) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.tensor(g) if g[0] is not None else None
    with gc.History(path) as history:
        info = Clipper(params, rule, history=history, doctor=()).clip_()
    return json.loads(lines(path)[-1]), info.to_dict()


def test_a_tensor_that_is_not_finite_is_no_tensor_without_a_gradient(tmp_path):
    rule = gc.ZScore(over="tensor")
    line, told = step_of(tmp_path / "bad.jsonl", rule, [math.nan], [4.0])
    assert line["norm"] == "NaN"
    assert line["action"] == "skip"
    assert math.isnan(told["norm"])
    line, told = step_of(tmp_path / "none.jsonl", rule, [None], [4.0])
    assert line["norm"] == told["norm"] == 4.0
    assert line["action"] == "pass"


@pytest.mark.parametrize(("p", "norm"), [(1.0, 11.0), (math.inf, 4.0), (2.0, 41**0.5)])
def test_norms_of_tensors_are_joined_in_their_own_order(tmp_path, p, norm):
    rule = gc.Norm(math.inf, over="tensor", p=p)
    line, _ = step_of(tmp_path / "run.jsonl", rule, [0.0, 4.0], [3.0, 4.0])
    assert line["norm"] == pytest.approx(norm)


def test_small_elements_that_are_stretched_count_as_clipped(tmp_path):
    band = gc.Band(0.1, 1.0)
    line, told = step_of(tmp_path / "run.jsonl", band, [0.5, 0.01])
    assert line["action"] == "clip"
    assert told["clipped"] == 1
    line, told = step_of(tmp_path / "all.jsonl", band, [0.5, 0.2])
    assert line["action"] == "pass"
    assert told["clipped"] == 0


@pytest.mark.parametrize("name", ["gradclip", "norm", "action", "names"])
def test_a_fact_does_not_take_a_name_of_the_history(tmp_path, name):
    path = write(tmp_path / "run.jsonl", [1.0])
    with gc.History(path) as history, pytest.raises(ValueError, match="for itself"):
        history.record(1, info_of(1.0), **{name: 2})
    assert gc.History.load(path).norm.tolist() == [1.0]


def test_a_report_without_gradients_has_numbers(tmp_path):
    none = np.zeros(0)
    told = gc.Info(none, none, none, True, False, none).to_dict()
    assert told["scale"] == 1.0
    assert math.isnan(told["norm"])


def test_counts_are_whole_numbers():
    assert gc.Clipper(gc.Norm(1.0), max_consecutive_skips=np.int64(5))
    with pytest.raises(ValueError, match=r"2.5: it is a whole number, at least 1"):
        gc.Clipper(gc.Norm(1.0), max_consecutive_skips=2.5)
    with pytest.raises(ValueError, match=r"flush_seconds=-0.5: it is a number"):
        gc.History("run.jsonl", flush_seconds=-0.5)


@pytest.mark.parametrize("front", ["arrays", "torch"])
def test_too_many_skips_are_reported_and_leave_no_gradients(front):
    bad = math.nan
    p = torch.nn.Parameter(torch.zeros(1))
    clipper = (
        Clipper([p], gc.Norm(1.0), max_consecutive_skips=2, doctor=())
        if front == "torch"
        else gc.Clipper(gc.Norm(1.0), max_consecutive_skips=2)
    )

    def step():
        p.grad = torch.tensor([bad])
        return clipper.clip_() if front == "torch" else clipper.clip(np.array([bad]))

    step()
    name = r"\[0\]" if front == "torch" else "gradients"
    said = rf"2 steps in a row were skipped, since step 0.* {name} \(1 of 1 elem"
    with pytest.raises(gc.NonFiniteError, match=said):
        step()
    assert int(clipper.info.skipped) == 2
    assert front == "arrays" or p.grad is None


@pytest.mark.parametrize("policy", ["skip", "zero", "ignore"])
@pytest.mark.parametrize("every", [0, 4])
def test_who_was_nan_is_recorded_where_the_step_is_dropped(tmp_path, policy, every):
    named = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.nn.Parameter(ONES)}
    history = gc.History(tmp_path / "run.jsonl", tensors_every=every)
    options = {"history": history, "doctor": ()}
    clipper = Clipper(named.items(), gc.Norm(1.0), policy, **options)
    for step in range(7):
        named["a"].grad = torch.tensor([3.0, math.inf if step in (2, 4) else 4.0])
        named["b"].grad = ONES.clone()
        clipper.clip_()
    if not every:
        assert history.tensors is None
        return
    found = history.tensors
    assert found.step.tolist() == ([0, 2, 4] if policy == "skip" else [0, 4])
    assert found.norm[0].tolist() == [5.0, 1.0]
    assert np.isinf(found.norm[-1]).tolist() == [True, False]


def test_a_run_is_waited_for_before_there_is_a_file(tmp_path, monkeypatch, capsys):
    def ended(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", ended)
    watching.follow(tmp_path / "run.jsonl", once=False, every=1.0)
    assert "Waiting for the first steps" in capsys.readouterr().out


def test_who_takes_a_step_back_to_try_it_again_is_one_clipper(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    clipper = gc.Clipper(gc.Norm(1.0), history=history)
    for i in range(30):
        saved = clipper.state_dict()
        clipper.clip(np.array([1.0 + i]))
        if i % 5 == 4:
            clipper.load_state_dict(saved)
            clipper.clip(np.array([100.0 + i]))
    history.flush()
    norm = gc.History.load(history.path).norm
    assert norm[4::5].tolist() == [104.0 + i for i in range(0, 30, 5)]


def test_a_group_without_one_of_its_gradients_is_replayed_as_it_was(tmp_path):
    history = gc.History(tmp_path / "run.jsonl", tensors_every=1)
    params = {name: torch.nn.Parameter(torch.zeros(2)) for name in "abc"}
    rule = gc.by_name({"[ab]": gc.Norm(1.0), "*": None})
    clipper = Clipper(list(params.items()), rule, history=history, doctor=())
    for step in range(4):
        for name, p in params.items():
            p.grad = None if (step, name) == (2, "b") else torch.tensor([3.0, 4.0])
        clipper.clip_()
    history.close()
    recorded = gc.History.load(tmp_path / "run.jsonl")
    assert recorded.scale[2] == pytest.approx(0.2)
    assert gc.replay(recorded, rule).scale.tolist() == pytest.approx(
        recorded.scale.tolist()
    )
