"""The page, looked at with a real browser: offline, in both colours, by keyboard."""

import gzip
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import gradclip as gc
from gradclip.cli import app
from gradclip.report import write_report
from gradclip.report.figures import heat_map, norm_figure, thinned

NASTY = "<script>alert(1)</script>"


def norms(size, seed=0):
    return np.random.default_rng(seed).lognormal(sigma=0.3, size=size)


@pytest.fixture
def history(tmp_path):
    path = tmp_path / "run.jsonl"
    history = gc.History(path, tensors_every=1)
    history.begin(gc.Norm(1.0))
    for step, norm in enumerate(norms(400)):
        parts = np.array([norm, 40.0 if step == 300 else 0.2])
        history.record_tensors(step, (NASTY, "layer.weight"), parts)
        whole = float(np.hypot(*parts))
        scale = min(1.0, 1 / whole)
        history.record(step, gc.Info(whole, 1.0, scale, True, scale < 1, 1.0))
    history.close()
    return gc.History.load(path)


@pytest.fixture
def page(tmp_path, history):
    out = tmp_path / "report.html"
    other = gc.History.of(norms(300, seed=1))
    write_report([("run.jsonl", history), (f"b{NASTY}", other)], out)
    return out


def test_a_single_step_spike_in_a_million_is_drawn():
    norm = norms(1_000_000)
    norm[123_457] = 50.0
    norm[7] = 1e-6
    rows = thinned(norm)
    assert rows.size < 5000
    assert {7, 123_457} <= set(rows.tolist())


def test_infinite_norms_do_not_hide_the_others():
    norm = norms(50_000)
    norm[::1000] = np.inf
    norm[33_333] = 50.0
    assert 33_333 in thinned(norm)


def test_the_page_stands_alone_and_names_stay_text(page):
    text = page.read_text("utf-8")
    assert NASTY not in text
    assert "&lt;script&gt;alert(1)" in text
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert not re.search(r"(?:src|href)=[\"']https?:", own)
    assert page.stat().st_size < 8e6


def drawn(norm, limit):
    """Return the lines and marks of a run by their names."""
    record = gc.History.of(norm, limit=limit).recorded
    return {line["name"]: line for line in norm_figure([("run", record)])["data"]}


def test_steps_without_a_finite_norm_are_marked_at_the_edge():
    norm = norms(20_000)
    norm[[7, 12_345]] = np.nan, np.inf
    found = drawn(norm, 2.0)
    marks = found["run: NaN or infinite"]
    assert marks["x"] == [7, 12_345]
    assert marks["y"] == pytest.approx([norm[np.isfinite(norm)].max()] * 2, rel=1e-4)
    assert not {7, 12_345} & set(found["run: clipped"]["x"])
    found = drawn(np.full(5000, np.nan), 2.0)
    assert len(found["run: NaN or infinite"]["x"]) == 1000


def test_that_clipped_steps_are_not_marked_is_told(tmp_path):
    norm = norms(1000)
    limit = np.quantile(norm, 0.11)
    assert "run: clipped" not in drawn(norm, limit)
    _, text = page_of(gc.History.of(norm, limit=limit), tmp_path)
    assert "run: clipped on 89% of the steps; not marked." in text
    assert "run: clipped" in drawn(norm, 2.0)
    _, text = page_of(gc.History.of(norm, limit=2.0), tmp_path)
    assert "not marked" not in text


@pytest.mark.parametrize(
    ("rule", "did"),
    [(gc.Norm(np.inf), "recorded under"), (gc.Norm(5.0), "clipped by")],
)
def test_a_run_that_was_only_recorded_is_not_called_clipped(tmp_path, rule, did):
    record = gc.History.of(norms(100), limit=rule.limit).recorded
    history = gc.History.from_record(replace(record, rule=repr(rule)), None)
    _, text = page_of(history, tmp_path)
    assert f"; {did} Norm(limit=" in text


def test_reasons_and_notes_begin_with_a_capital(tmp_path):
    record = gc.History.of(norms(100)).recorded.also("the log is odd.")
    _, text = page_of(gc.History.from_record(record, None), tmp_path)
    assert "<li>The log is odd.</li>" in text
    assert not re.search("<li>[a-z]", text)


def test_a_spike_is_carried_by_what_has_a_norm(tmp_path):
    path = tmp_path / "run.jsonl"
    with gc.History(path, tensors_every=1) as history:
        for step, norm in enumerate(norms(400)):
            whole = 40.0 if step == 300 else float(norm)
            history.record_tensors(step, ("body", "head"), np.array([0.0, whole]))
            history.record(step, gc.Info(whole, np.inf, 1.0, True, False, whole))
    _, text = page_of(gc.History.load(path), tmp_path)
    assert "<td>head (40)</td>" in text
    assert "body (" not in text


def test_the_heat_map_keeps_single_steps():
    norm = np.full((5000, 3), 0.1)
    norm[1234, 1] = 100.0
    tensors = gc.record.Tensors(
        ("a", "b", "c"), np.arange(5000), norm, np.zeros(5000, int)
    )
    (cells,) = heat_map(tensors)["data"]
    assert np.max(cells["z"][1]) == pytest.approx(2.0)
    assert np.max(cells["z"][0]) == pytest.approx(-1.0)


def test_the_command_report(tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [{"step": i, "grad_norm": x} for i, x in enumerate(norms(100))]
    log.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(log), "-o", str(out)])
    assert result.exit_code == 0
    assert "Recommended" in out.read_text("utf-8")


def opened(browser, path, **options):
    """Open a page without a network; return it with what went wrong so far."""
    context = browser.new_context(offline=True, **options)
    tab = context.new_page()
    wrong = []
    tab.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: wrong.append("dialog") or dialog.dismiss())
    tab.on("request", lambda r: r.url.startswith("http") and wrong.append(r.url))
    tab.goto(path.as_uri())
    tab.wait_for_selector("#norms .main-svg")
    return tab, wrong


def test_the_page_in_a_browser(browser, page):
    tab, wrong = opened(browser, page)
    assert wrong == []
    assert tab.locator(".main-svg").count() >= 7
    assert tab.get_by_text(NASTY).count() >= 1
    slider, code = tab.locator("#slider-0"), tab.locator("#code-0")
    advice = tab.locator("#run-0 .lead code").inner_text()
    first = code.inner_text()
    assert first.startswith("attach(optimizer, Norm(")
    told, recommended = (float(re.findall(r"[\d.]+", x)[0]) for x in (first, advice))
    assert told == pytest.approx(recommended, rel=0.01)
    slider.focus()
    for _ in range(200):
        tab.keyboard.press("ArrowRight")
    assert code.inner_text() != first
    rate = float(tab.locator("#rate-0").inner_text().split("clips ")[1].split(" %")[0])
    limit = float(re.findall(r"[\d.]+", code.inner_text())[0])
    norm = gc.History.load(page.parent / "run.jsonl").norm
    assert rate == pytest.approx(100 * np.mean(norm > limit), abs=0.5)
    assert wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_both_colours(browser, page, scheme):
    size = {"width": 390, "height": 844}
    tab, wrong = opened(browser, page, viewport=size, color_scheme=scheme)
    width = tab.evaluate("document.documentElement.scrollWidth")
    assert width <= size["width"]
    colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 24, 27)")
    if folder := os.environ.get("GRADCLIP_SCREENSHOTS"):
        tab.screenshot(path=f"{folder}/phone-{scheme}.png", full_page=True)
    assert wrong == []


def test_a_page_does_not_replace_the_log(tmp_path):
    log = tmp_path / "run.csv"
    log.write_text("step,grad_norm\n" + "".join(f"{i},{1 + i}\n" for i in range(50)))
    before = log.read_bytes()
    with pytest.raises(ValueError, match="would replace the log"):
        write_report([("run", gc.History.load(log))], log)
    assert log.read_bytes() == before
    write_report([("run", gc.History.load(log))], str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").stat().st_size > 1000


def page_of(history, tmp_path):
    """Return the data of a page, and its text."""
    out = tmp_path / "page.html"
    write_report([("run", history)], out)
    text = out.read_text("utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text)
    return json.loads(found[1])["runs"][0], text


def test_a_page_without_a_recommendation_offers_no_limit(tmp_path):
    run, text = page_of(gc.History.of(np.full(100, np.inf)), tmp_path)
    assert run["limit"] is None
    assert "No recommendation" in text
    assert 'id="slider-0"' not in text
    assert "Norm(1" not in text


def of_order(p):
    """Return a history that says which norms it holds."""
    record = replace(gc.History.of(norms(300)).recorded, rule=repr(gc.Norm(1.0, p=p)))
    return gc.History.from_record(record, None)


@pytest.mark.parametrize(("p", "order"), [(2.0, ""), (1.0, ", p=1.0")])
def test_the_page_knows_the_order_of_the_norm(tmp_path, p, order):
    run, _ = page_of(of_order(p), tmp_path)
    assert run["order"] == order


def test_the_slider_writes_the_norm_that_is_recommended(browser, tmp_path):
    page_of(of_order(1.0), tmp_path)
    tab, wrong = opened(browser, tmp_path / "page.html")
    code = tab.locator("#code-0").inner_text()
    assert code == tab.locator("#run-0 .lead code").inner_text()
    assert code.endswith(", p=1.0))")
    assert wrong == []


def long_run():
    """Return many norms with a few far out, and a limit among those."""
    norm = norms(20_000)
    norm[::1000] = np.geomspace(20, 500, 20)
    return norm, 60.0


def test_a_page_holds_every_norm_of_the_tail(tmp_path):
    norm, limit = long_run()
    norm[5] = 0
    run, _ = page_of(gc.History.of(norm), tmp_path)
    assert len(run["norms"]) == len(run["above"]) < 2000
    assert run["norms"][run["whole"] + 1 :] == np.sort(norm)[-500:].tolist()
    at = np.searchsorted(run["norms"], limit, side="right") - 1
    assert at >= run["whole"]
    assert run["above"][at] == pytest.approx(np.mean(norm > limit))
    shares = [np.mean(norm > x) for x in run["norms"]]
    assert run["above"] == pytest.approx(shares)


def test_the_slider_of_a_long_run_is_that_of_its_norms(browser, tmp_path):
    norm, limit = long_run()
    page_of(gc.History.of(norm), tmp_path)
    tab, wrong = opened(browser, tmp_path / "page.html")
    for x, within in ((limit, 1e-12), (450.0, 1e-12), (1.8, 1e-3), (0.1, 0), (600, 0)):
        rate = tab.evaluate("limit => rateAbove(data.runs[0], limit)", x)
        assert rate == pytest.approx(np.mean(norm > x), abs=within)
    assert wrong == []


def test_a_page_is_about_the_steps_that_the_advice_is_about(tmp_path):
    rng = np.random.default_rng(0)
    norm = np.concatenate([rng.lognormal(3, 0.3, 400), rng.lognormal(0, 0.3, 400)])
    norm[450:650] = 0
    path = tmp_path / "log.csv"
    rows = zip([*range(400), *range(400)], norm, strict=True)
    path.write_text("step,grad_norm\n" + "".join(f"{s},{n}\n" for s, n in rows))
    history = gc.History.load(path)
    run, text = page_of(history, tmp_path)
    advice = gc.advise(history)
    assert max(run["norms"]) < 10
    above = run["share"] * np.mean(np.array(run["norms"]) > advice.limit)
    assert above == np.mean(norm[400:] > advice.limit)
    assert f"<td>{above:.1%}</td>" in text


def test_a_page_counts_the_norms_that_the_advice_counts(tmp_path):
    norm = np.concatenate([np.full(100, np.nan), norms(400)])
    norm[[0, 150]] = -1, 0
    history = gc.History.of(norm, limit=np.inf)
    run, text = page_of(history, tmp_path)
    advice = gc.advise(history)
    rate = advice.clip_rate(advice.limit)
    assert rate == np.mean(norm[100:] > advice.limit)
    slider = run["share"] * np.mean(np.array(run["norms"]) > advice.limit)
    assert slider == pytest.approx(rate)
    (curve,) = run["curve"]["data"]
    at = np.searchsorted(curve["x"], advice.limit)
    assert curve["y"][at] <= 100 * rate <= curve["y"][at - 1]
    assert curve["y"][0] == pytest.approx(100 * 399 / 400, rel=1e-4)
    assert f"</code></td><td>{rate:.1%}</td>" in text
    assert f"clips {rate:.1%} of the finite norms" in str(advice)


def test_a_page_has_the_count_of_the_steps_that_it_is_about(tmp_path):
    norm = np.concatenate([norms(100), 50 * norms(100)])
    record = replace(gc.History.of(norm).recorded, run=np.repeat([0, 1], 100))
    _, text = page_of(gc.History.from_record(record, None), tmp_path)
    assert "<td>100</td>" in text
    assert "<td>200</td>" not in text


@pytest.mark.parametrize("name", ["log.csv.gz", "-"])
def test_a_page_about_what_is_read_from_a_copy_is_written_again(tmp_path, name):
    text = "step,grad_norm\n" + "".join(f"{i},{1 + i}\n" for i in range(50))
    log, out = tmp_path / "log.csv.gz", tmp_path / "page.html"
    log.write_bytes(gzip.compress(text.encode()))
    source = name if name == "-" else str(log)
    for _ in range(2):
        written = CliRunner().invoke(
            app, ["report", source, "-o", str(out)], input=text
        )
        assert written.exit_code == 0, written.stderr
    written = CliRunner().invoke(app, ["report", source, "-o", str(log)], input=text)
    assert (written.exit_code == 1) == (name != "-")
    assert name == "-" or "would replace the log" in written.stderr


def test_a_run_without_tensors_beside_one_that_has_them(tmp_path, history):
    record = history.recorded
    none = replace(record.tensors.of_run(9), names=record.tensors.names)
    run, _ = page_of(
        gc.History.from_record(replace(record, tensors=none), None), tmp_path
    )
    assert run["heat"] is None


def test_a_page_is_written_whole_whatever_the_name_and_the_folder(tmp_path):
    out = tmp_path / "new" / "page.html"
    write_report([("a\udcff.csv", gc.History.of(np.full(50, 2.0)))], out)
    assert "a?.csv" in out.read_text("utf-8")
