"""The demonstration trains what it says it trains, and shows what came out."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from gradclip import Norm
from gradclip.characters import Network, Setup, Step, library_text, train
from gradclip.demo import ARMS, Comparison, Run, alike, compare, draw, label, show

SHORT = Setup(steps=64)
TINY = Setup(steps=6, layers=1, hidden=8, embedding=4, batch=2, length=8)
PNG = b"\x89PNG\r\n\x1a\n"


def losses(setup, rule=ARMS["norm-1"]):
    torch.manual_seed(setup.seed)
    network = Network(setup)
    return [step.loss for step in train(rule, network, library_text(), setup)]


def read_strictly(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = path.read_text("utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def numbers(path, key):
    return np.array([float(entry[key]) for entry in read_strictly(path)[1:]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A comparison that is just long enough for the difference to show."""
    out = tmp_path_factory.mktemp("demo")
    console = Console(file=io.StringIO())
    compare(SHORT, out, console)
    return out


def test_clipped_runs_end_lower_than_the_unclipped_one(folder):
    ends = {name: numbers(folder / f"{name}.jsonl", "loss")[-8:] for name in ARMS}
    unclipped = ends.pop("unclipped").mean()
    assert {name for name, end in ends.items() if end.mean() < unclipped} == set(ends)


def test_all_arms_start_from_the_same_weights_and_text(folder):
    starts = {numbers(folder / f"{name}.jsonl", "loss")[0] for name in ARMS}
    assert len(starts) == 1


@pytest.mark.parametrize("name", ARMS)
def test_recorded_steps_follow_the_formula(folder, name):
    header, *steps = read_strictly(folder / f"{name}.jsonl")
    assert header["gradclip"] == 1
    assert header["rule"] == repr(ARMS[name])
    assert header["run"] == SHORT.facts()
    assert [step["step"] for step in steps] == list(range(SHORT.steps))
    norm, limit, scale = (
        numbers(folder / f"{name}.jsonl", key) for key in ("norm", "limit", "scale")
    )
    np.testing.assert_allclose(scale, np.minimum(1, limit / norm), rtol=1e-12)


def test_the_summary_repeats_the_recorded_steps(folder):
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["interrupted"] is False
    assert list(summary["arms"]) == list(ARMS)
    for name, arm in summary["arms"].items():
        loss, norm, scale = (
            numbers(folder / f"{name}.jsonl", key) for key in ("loss", "norm", "scale")
        )
        smooth = np.convolve(loss, np.ones(8) / 8, "valid")
        assert arm["final_loss"] == pytest.approx(smooth[-1])
        assert arm["best_loss"] == pytest.approx(smooth.min())
        assert arm["median_norm"] == np.median(norm)
        assert arm["largest_norm"] == norm.max()
        assert arm["clip_rate"] == np.mean(scale < 1)


def test_the_picture_is_a_picture(folder):
    picture = (folder / "demo.png").read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) > 20_000


def test_the_seed_decides_every_number():
    first = losses(TINY)
    assert first == losses(TINY)
    assert first != losses(Setup(**{**vars(TINY), "seed": 1}))


def test_runs_side_by_side_are_the_runs_alone(tmp_path):
    comparison = compare(TINY, tmp_path, Console(file=io.StringIO()))
    for run in comparison.runs:
        assert run.loss.tolist() == losses(TINY, run.rule)


def test_a_second_comparison_replaces_the_files_of_the_first(tmp_path):
    for setup in (TINY, Setup(**{**vars(TINY), "steps": 3})):
        compare(setup, tmp_path, Console(file=io.StringIO()))
    assert len(read_strictly(tmp_path / "norm-1.jsonl")) == 1 + 3


def test_a_terminal_gets_bars_and_a_file_gets_lines(tmp_path):
    terminal = io.StringIO()
    lines = io.StringIO()
    console = Console(file=terminal, force_terminal=True, force_interactive=True)
    compare(TINY, tmp_path, console)
    compare(TINY, tmp_path, Console(file=lines, force_terminal=False))
    assert "\x1b[" in terminal.getvalue()
    assert "6/6" in terminal.getvalue()
    assert "\x1b" not in lines.getvalue()
    assert lines.getvalue().count("\n") == len(ARMS) * TINY.steps


@pytest.mark.parametrize("name", ARMS)
def test_labels_are_calls_without_the_defaults(name):
    call, _, remark = label(ARMS[name]).partition(", no clip")
    namespace = {type(rule).__name__: type(rule) for rule in ARMS.values()}
    assert eval(call, {**namespace, "inf": math.inf}) == ARMS[name]
    assert remark == ""


def diverged(tmp_path):
    run = Run("unclipped", TINY, tmp_path)
    run.add(Step(2.0, 3.0, math.inf, 1.0))
    run.add(Step(math.inf, math.inf, math.inf, 1.0))
    run.add(Step(math.nan, math.nan, math.inf, 1.0))
    run.close()
    return run


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    _, *steps = read_strictly(diverged(tmp_path).path)
    assert [step["loss"] for step in steps] == [2.0, "Infinity", "NaN"]
    assert steps[0]["limit"] == "Infinity"


def test_a_run_that_diverged_is_shown_as_it_is(tmp_path):
    run = diverged(tmp_path)
    text = io.StringIO()
    show(Comparison(TINY, tmp_path, [run], False), Console(file=text, width=80))
    draw([run], tmp_path / "demo.png")
    assert "without at a loss of nan" in text.getvalue()
    assert "with clipping" not in text.getvalue()
    assert run.summary()["final_loss"] == "NaN"
    assert run.summary()["best_loss"] == 2.0


def test_the_last_lines_name_the_numbers_and_the_files(tmp_path):
    comparison = compare(TINY, tmp_path, Console(file=io.StringIO()))
    text = io.StringIO()
    show(comparison, Console(file=text, width=80))
    ends = [run.loss[-1] for run in comparison.runs]
    without, low, high = ends[0], min(ends[1:]), max(ends[1:])
    with_clipping = f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"
    assert (
        f"After 6 of 6 steps at learning rate 10: with clipping at a loss of "
        f"{with_clipping}, without at a loss of {without:.3f}."
    ) in text.getvalue()
    for path in tmp_path.iterdir():
        assert path.name in text.getvalue()
    last = text.getvalue().splitlines()[-1]
    assert last == f"A page of them all: gradclip report {tmp_path}/*.jsonl"


def recorded(tmp_path, name, clipped):
    run = Run(name, TINY, tmp_path)
    for scale in np.where(clipped, 0.5, 1.0):
        run.add(Step(2.0, 3.0, 1.0, float(scale)))
    run.close()
    return run


def test_a_rule_that_decides_as_another_is_named(tmp_path):
    clipped = np.arange(100) < 10
    norm = recorded(tmp_path, "norm-1", clipped)
    (line,) = alike([norm, recorded(tmp_path, "zscore", np.arange(100) < 12)])
    assert "clip in 2 steps of 100" in line
    assert list(alike([norm, recorded(tmp_path, "zscore", ~clipped)])) == []
    assert list(alike([norm])) == []


def test_an_arm_that_fails_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setitem(ARMS, "norm-1", Norm(lambda step: [1.0, 1.0][step]))
    with pytest.raises(IndexError):
        compare(TINY, tmp_path, Console(file=io.StringIO()))


def test_a_python_without_sources_is_told_apart(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="without the source files"):
        library_text()


def test_text_of_any_encoding_is_read(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_bytes("# é\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes("# é\n".encode())
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert bytes(library_text().tolist()) == b"# ?\n# ?\n"
