"""The page: what it says is gathered here, how it looks is in the files beside."""

import json
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, select_autoescape
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from gradclip.advice import Advice, advise
from gradclip.advice.comparing import comparable
from gradclip.advice.evidence import share_above
from gradclip.advice.judging import FOLLOWING
from gradclip.advice.replaying import PLAINLY, replay_end
from gradclip.history import History
from gradclip.policy import only_records
from gradclip.record import Floats, Record, is_norm, kind_of
from gradclip.report import figures
from gradclip.rules import Norm, Percentile, Rule, ZScore, usable
from gradclip.ruletext import call, recorded_rule
from gradclip.wording import sentence

SPIKES = 50
FEW = 5000
"""Norms that are all handed to the page; of more, it gets some, and the largest."""
SOME, LARGEST = 1000, 500


def render(named: Sequence[tuple[str, History]]) -> str:
    """Return the page as text.

    Args:
        named: The histories, each with a name.

    Returns:
        HTML that needs nothing from anywhere.
    """
    runs = [_run(name, history) for name, history in named]
    records = [(name, history.recorded) for name, history in named]
    data = {
        "norms": figures.norm_figure(records),
        "runs": [run.pop("data") for run in runs],
    }
    environment = Environment(autoescape=select_autoescape(default=True))
    environment.filters["sentence"] = sentence
    return environment.from_string(_file("page.html.j2")).render(
        runs=runs,
        unmarked=list(figures.unmarked(records)),
        data=Markup(_embedded(data)),
        plotly=Markup(get_plotlyjs()),
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        plainly=PLAINLY,
    )


def _file(name: str) -> str:
    return files("gradclip.report").joinpath(name).read_text("utf-8")


def _embedded(data: Any) -> str:
    """Return JSON that cannot end the script element that it stands in."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def _run(name: str, history: History) -> dict[str, Any]:
    """Return what the page says about one run, with its figures under `data`."""
    # The same steps that the advice is about, or the page would contradict itself.
    record, advice = comparable(history.recorded)[0], advise(history)
    return {
        "name": name,
        "format": record.format,
        "column": record.column,
        "steps": advice.steps,
        "rule": record.rule,
        "did": "recorded under" if _only_recorded(record) else "clipped by",
        "advice": advice,
        "limit": _limit(advice),
        "median": f"{_median(record):.4g}",
        "spikes": sorted(advice.spikes, key=lambda spike: -spike.size)[:SPIKES],
        "rules": _side_by_side(record, advice),
        "heat": record.tensors is not None,
        "data": _data(record, advice),
    }


def _only_recorded(record: Record) -> bool:
    # A rule whose text cannot be read may have had limits.
    unlimited = bool(np.all(np.isposinf(record.limit)))
    return unlimited and only_records(recorded_rule(record.rule))


def _limit(advice: Advice) -> str:
    if advice.followed:
        return "follows the norms"
    return f"{advice.limit:g}" if advice.limit else "none"


def _median(record: Record) -> float:
    norm = record.norm[usable(record.norm)]
    return float(np.median(norm)) if norm.size else float("nan")


def _data(record: Record, advice: Advice) -> dict[str, Any]:
    norm = np.sort(record.norm[usable(record.norm)])
    tensors = record.tensors
    p, _ = kind_of(record.rule)
    return {
        "histogram": figures.histogram(norm),
        "curve": figures.clip_curve(record.norm),
        "heat": figures.heat_map(tensors) if tensors and tensors.step.size else None,
        **_rates(norm, norm.size / max(int(is_norm(record.norm).sum()), 1)),
        "limit": advice.limit,
        "order": "" if p == 2 else f", p={p!r}",
    }


def _rates(ordered: Floats, share: float) -> dict[str, Any]:
    """Return norms and the clip rate of a limit at each, for the slider.

    From the row `whole` on, no norm between two of them is left out.
    """
    rows, whole = np.arange(ordered.size), 0
    if ordered.size > FEW:
        # In the tail a few steps are all there are, and most limits lie there.
        tail = ordered.size - LARGEST
        rows = np.append(np.linspace(0, tail - 1, SOME).astype(np.int64), rows[tail:])
        whole = SOME - 1
    norms = ordered[rows]
    above = share * np.asarray(share_above(ordered, norms))
    return {
        "norms": norms.tolist(),
        "above": above.tolist(),
        "whole": whole,
        "share": share,
    }


def _side_by_side(record: Record, advice: Advice) -> list[dict[str, str]]:
    """Return a row for each rule: what it would have done on these norms."""
    p, _ = kind_of(record.rule)
    limits = [advice.limit, 2 * advice.limit] if advice.limit else []
    # These are made for 2-norms, and a replay refuses them for others.
    following = [Percentile(), FOLLOWING, ZScore()] if p == 2 else []
    rules: list[Rule] = [*(Norm(limit, p=p) for limit in limits), *following]
    return [_row(rule, record) for rule in rules]


def _row(rule: Rule, record: Record) -> dict[str, str]:
    again = replay_end(record, rule)
    limits = again.limit[np.isfinite(again.limit)]
    passed = again.norm_after[np.isfinite(again.norm_after)]
    shorter = again.norm.size < record.norm.size
    return {
        "rule": call(rule),
        "clip_rate": "–" if math.isnan(again.clipped) else f"{again.clipped:.1%}",
        "limit": f"{np.median(limits):.4g}" if limits.size else "–",
        "largest": f"{passed.max():.4g}" if passed.size else "–",
        "over": f"the last {again.norm.size:,} usable norms"
        if shorter
        else "all steps",
    }
