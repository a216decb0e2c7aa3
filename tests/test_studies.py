"""The studies: small ones from end to end, their intervals, and what is exact."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

import gradclip as gc
from gradclip.cli import app
from gradclip.studies import STUDIES, bias, smoothness
from gradclip.studies import generalisation as general
from gradclip.studies import temporal_order as temporal
from gradclip.studies.frame import concluded, larger, load, plain, read_rows, seen
from gradclip.studies.page import write_page
from gradclip.studies.progress import duration
from gradclip.studies.results import Results
from gradclip.studies.statistics import (
    above,
    geometric,
    includes,
    mean,
    negative,
    positive,
    share,
    within_noise,
)
from gradclip.studies.tables import text

DOCS = Path(__file__).parent.parent / "docs"
WRITTEN = sorted(path.stem for path in (DOCS / "studies").glob("*.json"))
NO_INTERVALS = {"smoothness", "threshold"}


def program(*arguments):
    return CliRunner().invoke(app, ["study", *map(str, arguments)])


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def no_tick(share):
    pass


@pytest.mark.parametrize("name", STUDIES)
def test_a_tiny_size_runs_and_more_seeds_are_added(name, tmp_path):
    first = program(name, "--quick", "--seeds", 1, "--out", tmp_path)
    assert first.exit_code == 0, first.output
    assert "Not run:" in first.output
    before = lines(tmp_path / f"{name}.jsonl")
    result = program(name, "--quick", "--seeds", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = lines(tmp_path / f"{name}.jsonl")
    assert rows[: len(before)] == before
    study = load(name)
    seeds = {0, 1} if study.seeded else {0}
    found = {(json.dumps(row["cell"]), row["seed"]) for row in rows}
    wanted = {(json.dumps(c), s) for c in study.cells("quick") for s in seeds}
    assert found == wanted
    assert len(rows) == len(wanted)
    summary = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
    assert summary["run"]["size"] == "quick"
    assert all(claim["numbers"] for claim in summary["claims"])
    for table in summary["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
    ElementTree.parse(tmp_path / f"{name}.svg")


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    command = ("study", "bias", "--quick", "--seeds", "2", "--out", str(tmp_path))
    path = tmp_path / "bias.jsonl"
    with subprocess.Popen([sys.executable, "-m", "gradclip", *command]) as process:
        while not path.exists() or path.read_bytes().count(b"\n") < 6:
            assert process.poll() is None, "it was too quick to be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    kept = path.read_text("utf-8")
    # As if it had been killed within a line.
    path.write_text(kept + kept.splitlines()[0][:40], "utf-8")
    result = program(*command[1:])
    assert result.exit_code == 0, result.output
    assert path.read_text("utf-8").startswith(kept)
    rows = lines(path)
    assert len(rows) == 2 * len(load("bias").cells("quick"))
    assert len({(json.dumps(row["cell"]), row["seed"]) for row in rows}) == len(rows)


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(cell, seeds, tick):
        raise KeyboardInterrupt

    study = load("smoothness")
    monkeypatch.setitem(vars(study), "run", interrupted)
    result = program("smoothness", "--quick", "--out", tmp_path)
    assert result.exit_code == 130
    assert "the same command goes on" in result.output


def test_the_list_names_every_study():
    result = program()
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == list(STUDIES)


def test_a_study_that_does_not_exist_is_told(tmp_path):
    result = program("alchemy", "--out", tmp_path)
    assert result.exit_code == 2
    assert "temporal-order" in result.output


def test_a_page_about_nothing_is_refused(tmp_path):
    result = program("--page", tmp_path / "page.md", "--out", tmp_path)
    assert result.exit_code == 2
    assert not (tmp_path / "page.md").exists()


def test_a_page_with_marks_gets_the_tables_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- tables of bias -->\nold\n<!-- end -->\nAfter.\n")
    shutil.copy(DOCS / "studies" / "bias.json", tmp_path)
    result = program("--page", page, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    text = page.read_text("utf-8")
    assert text.startswith("Before.\n<!-- tables of bias -->\n\n**Two points")
    assert text.endswith("\n\n<!-- end -->\nAfter.\n")
    assert "old" not in text


def test_marks_of_a_study_that_was_not_run_are_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- tables of spikes -->\n<!-- end -->\n")
    shutil.copy(DOCS / "studies" / "bias.json", tmp_path)
    result = program("--page", page, "--out", tmp_path)
    assert result.exit_code == 2
    assert "spikes was not run" in " ".join(result.output.split())


def test_what_is_missing_is_named_with_its_remedy():
    without = (
        "import sys; sys.modules['sklearn'] = None; "
        "from gradclip.cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", without, "study", "bias"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr == (
        "gradclip study needs sklearn, which is not installed: "
        'pip install "gradclip[study]"\n'
    )


def test_the_interval_of_a_mean_is_that_of_scipy():
    x = [1.0, 4.0, 2.0, 8.0, 5.0]
    low, high = stats.t.interval(0.95, 4, loc=np.mean(x), scale=stats.sem(x))
    found = mean(x)
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-12)


def test_the_interval_of_a_mean_holds_it_in_19_of_20_cases():
    rng = np.random.default_rng(0)
    found = [mean(rng.normal(3.0, 2.0, 5).tolist()) for _ in range(2000)]
    held = sum(e["low"] <= 3 <= e["high"] for e in found)
    assert stats.binomtest(held, 2000, 0.95).pvalue > 0.001


@pytest.mark.parametrize(("hits", "seeds"), [(0, 10), (3, 10), (10, 10), (4, 5)])
def test_the_interval_of_a_share_is_wilsons(hits, seeds):
    z = stats.norm.ppf(0.975)
    centre = (hits + z**2 / 2) / (seeds + z**2)
    width = z / (seeds + z**2) * math.sqrt(hits * (seeds - hits) / seeds + z**2 / 4)
    found = share([True] * hits + [False] * (seeds - hits))
    ends = (max(0, centre - width), min(1, centre + width))
    assert (found["low"], found["high"]) == pytest.approx(ends, abs=1e-12)


def test_noise_is_judged_by_the_differences():
    rng = np.random.default_rng(1)
    seeds = rng.normal(size=8)
    assert within_noise(seeds, seeds + 0.1 * rng.normal(size=8)) is True
    # Far apart from seed to seed, but always by the same amount.
    assert within_noise(100 * seeds + 1, 100 * seeds) is False
    assert within_noise([1.0], [2.0]) is None
    assert within_noise([1.0, math.nan], [1.0, 1.0]) is None


def test_runs_that_are_lost_are_counted_and_not_averaged():
    found = mean([1.0, math.inf, 2.0])
    assert text({**found}, ".2f") == "1 of 3 not finite"
    assert not above(found, mean([0.0, 0.1]))
    assert plain({"x": [math.nan, -math.inf]}) == {"x": ["NaN", "-Infinity"]}


def test_the_geometric_mean_is_that_of_scipy():
    x = [1.0, 30.0, 4.0, 900.0]
    found = geometric(x)
    assert found["value"] == pytest.approx(stats.gmean(x))
    low, high = stats.t.interval(0.95, 3, np.mean(np.log(x)), stats.sem(np.log(x)))
    assert (found["low"], found["high"]) == pytest.approx(
        (math.exp(low), math.exp(high))
    )


def test_verdicts():
    assert seen([True, True]) == "holds"
    assert seen([True, False]) == "holds here but not there"
    assert seen([False]) == "not seen"
    assert seen([True, None]) == "not told"
    assert seen([]) == "not told"


def test_a_verdict_of_one_seed_is_none_and_says_why():
    assert vars(concluded("Better", [None], "+1%")) == {
        "claim": "Better",
        "verdict": "not told",
        "numbers": "one seed is too few to tell; +1%",
    }
    assert concluded("Better", [True], "+1%").numbers == "+1%"


def test_of_one_seed_nothing_is_told():
    one, some = mean([2.0]), mean([2.0, 2.1, 2.2])
    for told in (positive, negative, lambda e: includes(e, 2.1)):
        assert told(one) is None
    assert above(one, some) is None
    assert above(share([True]), share([False])) is None
    assert (positive(some), negative(some)) == (True, False)
    assert (includes(some, 2.1), includes(some, 3.0)) == (True, False)


# The two others count runs, and have no intervals.
@pytest.mark.parametrize("name", [x for x in WRITTEN if x not in NO_INTERVALS])
def test_one_seed_is_too_few_for_the_verdicts_of_a_study(name):
    study = load(name)
    results = Results(study.cells("usual"), [0])
    read_rows(DOCS / "studies" / f"{name}.jsonl", results)
    assert results.complete
    claims = study.find(results).claims
    assert {claim.verdict for claim in claims} == {"not told"}
    assert all(x.numbers.startswith("one seed is too few to tell; ") for x in claims)
    assert not any("interval" in claim.numbers for claim in claims)


@pytest.mark.parametrize(
    ("function", "start", "steps"),
    [("x⁴", 1, 93), ("x⁴", 10, 9951), ("eˣ + e⁻ˣ", 5, 100), ("eˣ + e⁻ˣ", 10, 6073)],
)
def test_the_best_fixed_step_is_counted_exactly(function, start, steps):
    slope = smoothness.SLOPES[function]
    found, _ = smoothness.descend(slope, start, math.inf, 20_000, no_tick)
    assert found == steps


def test_the_counts_of_the_first_trial_are_exact():
    study = load("smoothness")
    cells = [cell for cell in study.cells("quick") if "rate" in cell]
    counts = [dict(study.run(cell, [0], no_tick))[0]["steps"] for cell in cells]
    assert counts == [64, 74, 127, 83, 5, 5, 5]


def test_the_limits_of_the_first_trial_are_the_best_of_three():
    limits = (1.0, 3.0, 10.0)
    for start, fewest in ((1, 64), (10, 74), (100, 127)):
        slope, rates = smoothness.SLOPES["x⁴"], np.array([0.3])
        found = [
            smoothness.descend(slope, start, limit, 200, no_tick, rates)[0]
            for limit in limits
        ]
        assert min(x for x in found if x) == fewest


@pytest.mark.parametrize("function", smoothness.SLOPES)
@pytest.mark.parametrize("limit", [math.inf, 1.0, 10.0])
def test_the_count_is_that_of_a_plain_loop(function, limit):
    slope = smoothness.SLOPES[function]
    found, rate = smoothness.descend(slope, 10, limit, 20_000, no_tick)
    x, steps = 10.0, 0
    while abs(g := float(slope(x))) > 1e-3:
        x -= rate * max(-limit, min(limit, g))
        steps += 1
    assert found == steps


@pytest.mark.parametrize("c", [0.5, 2.0, 5.0, 9.0])
def test_two_points_end_at_a_ninth_of_the_limit(c):
    assert bias.fixed_point(gc.Norm(c)) == pytest.approx(c / 9, rel=1e-12)


def test_two_points_end_at_their_mean_without_clipping():
    assert bias.fixed_point(gc.Norm(math.inf)) == pytest.approx(1, rel=1e-12)


def test_a_row_that_is_dropped_leaves_the_others():
    clip = bias.by_row(gc.Skip(gc.Norm(2.0, over="tensor")), 3)
    rows = np.array([[1.0], [5.0], [2.0]])
    assert clip(rows).tolist() == [[1.0], [0.0], [2.0]]


@pytest.mark.parametrize("rule", bias.TWO_POINT)
def test_two_points_of_all_seeds_are_those_of_each_alone(rule):
    cell = {"part": "points", "rule": rule, "steps": 200}
    first, second, *_ = bias.two_points(cell, range(10), no_tick)
    assert [first] == list(bias.two_points(cell, [0], no_tick))
    assert [second] == list(bias.two_points(cell, [1], no_tick))


def test_the_gradient_through_time_is_that_of_autograd():
    flat = torch.stack(
        [1.5 * temporal.smart_tanh(s) for s in range(2)]
    ).requires_grad_()
    sources = [torch.Generator().manual_seed(s) for s in range(2)]
    symbols, classes = temporal.batch(12, sources)
    net = temporal.views(flat)
    state = torch.zeros(2, temporal.BATCH, temporal.HIDDEN)
    for t in range(12):
        one_hot = torch.nn.functional.one_hot(symbols[t], temporal.SYMBOLS).float()
        state = torch.tanh(one_hot @ net.U + net.b + state @ net.W)
    logits = (state @ net.V + net.c).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, classes.flatten(), reduction="sum")
    (loss / temporal.BATCH).backward()
    found = torch.zeros_like(flat)
    passes = temporal.Passes(2, 12)
    fixed = temporal.views(flat.detach())
    passes.gradient(fixed, temporal.views(found), symbols, classes)
    torch.testing.assert_close(found, flat.grad, rtol=1e-4, atol=1e-7)


def test_the_weights_are_sparse_with_a_spectral_radius():
    net = temporal.views(temporal.smart_tanh(3)[None])
    W = net.W[0].double().numpy()
    assert ((W != 0).sum(axis=1) == 15).all()
    assert np.abs(np.linalg.eigvals(W)).max() == pytest.approx(0.95, rel=1e-5)


def test_the_symbols_that_count_stand_where_the_paper_has_them():
    symbols, classes = temporal.sequences(500, 50, torch.Generator().manual_seed(0))
    relevant = symbols < 2
    assert (relevant.sum(1) == 2).all()
    places = relevant.nonzero()[:, 1].view(-1, 2)
    assert (places.amin(0).tolist(), places.amax(0).tolist()) == ([5, 25], [9, 29])
    order = symbols[relevant].view(-1, 2)
    assert (order[:, 0] + 2 * order[:, 1] == classes).all()


def test_seeds_side_by_side_are_the_seeds_alone():
    cell = {"data": "wine", "method": "dropout + clipping", "steps": 20}
    both = dict(general.run(cell, [0, 1], no_tick))
    alone = dict(general.run(cell, [1], no_tick))
    assert alone[1]["loss"] == pytest.approx(both[1]["loss"], rel=1e-4)
    assert alone[1]["chosen"] == both[1]["chosen"]


def test_wrong_labels_are_wrong_in_training_only():
    right = general.load_data("digits", [0])
    wrong = general.load_data("digits, 20 % wrong", [0])
    assert (right.train[1] != wrong.train[1]).sum() == 40
    for part in ("valid", "test"):
        assert torch.equal(getattr(right, part)[1], getattr(wrong, part)[1])


@pytest.mark.parametrize("name", WRITTEN)
def test_the_findings_follow_from_the_runs(name):
    study = load(name)
    summary = json.loads((DOCS / "studies" / f"{name}.json").read_text("utf-8"))
    run = summary["run"]
    results = Results(study.cells(run["size"]), range(run["seeds"]))
    read_rows(DOCS / "studies" / f"{name}.jsonl", results)
    assert results.complete
    assert summary["setup"] == study.setup
    assert summary["not_run"] == [*study.not_run, *larger(study, results)]
    findings = study.find(results)
    assert plain([vars(x) for x in findings.claims]) == summary["claims"]
    tables = plain([vars(x) for x in findings.tables])
    assert json.dumps(rounded(tables)) == json.dumps(rounded(summary["tables"]))


@pytest.mark.parametrize("name", WRITTEN)
def test_the_time_that_is_announced_is_that_of_the_runs(name):
    runs, cost = lines(DOCS / "studies" / f"{name}.jsonl"), load(name).cost
    took = sum(row["cpu_s"] for row in runs)
    assert took / 2 < sum(cost(row["cell"]) for row in runs) < 2 * took


def test_how_long_it_takes_is_said_before(tmp_path):
    result = program("bias", "--quick", "--seeds", 1, "--out", tmp_path)
    assert result.output.startswith("bias  about 1 s on one core")
    again = program("bias", "--quick", "--seeds", 1, "--out", tmp_path)
    assert again.output.startswith("bias  31 of 31 are there already")
    assert "bias  about" not in again.output
    assert [duration(x) for x in (0.2, 80, 600, 7200)] == [
        "1 s",
        "80 s",
        "10 min",
        "2.0 h",
    ]


def rounded(x):
    """Return numbers without their last digits, which depend on the machine."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.9g}") if isinstance(x, float) else x


@pytest.mark.parametrize("name", ["studies.md", "advice.md"])
def test_pages_are_what_the_studies_left(name, tmp_path):
    page = tmp_path / "docs" / name
    (tmp_path / "docs").mkdir()
    if name != "studies.md":
        shutil.copy(DOCS / name, page)
    (tmp_path / "docs" / "studies").symlink_to(DOCS / "studies")
    write_page(tmp_path / "docs" / "studies", page)
    assert page.read_text("utf-8") == (DOCS / name).read_text("utf-8")
