"""The commands that read histories: advise, replay, report and watch.

Exit codes: 0 done · 1 a log cannot be read or a package is missing · 2 wrong options ·
3 the log does not support a recommendation.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from gradclip.exits import FAILED, REFUSED
from gradclip.history import History
from gradclip.rules import Rule

Logs = Annotated[list[Path], typer.Argument(help="Histories or training logs.")]
Log = Annotated[Path, typer.Argument(help="A history or a training log.")]


def _known_format(value: str | None) -> str | None:
    """Refuse an unknown format as a wrong option, before a log is looked at."""
    from gradclip.readers import FORMATS

    if value is not None and value not in FORMATS:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(FORMATS)}.")
    return value


Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        callback=_known_format,
        help="What the log is, if the guess is wrong.",
    ),
]
ColumnName = Annotated[
    str | None, typer.Option("--column", help="The column with the norm.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")]


def advise(
    logs: Logs, format: Format = None, column: ColumnName = None, as_json: Json = False
) -> None:
    """Tell where the threshold belongs.

    Example: gradclip advise trainer_state.json

    Ends with 0 if there is a recommendation, 1 if a log cannot be read, 3 if a log
    does not support one.
    """
    from gradclip.advice import advise as advise_on

    entries, failed = [], False
    for path in logs:
        # One log that cannot be read takes nothing from the others.
        with noted_errors() as failures:
            for name, history in networks(path, format, column):
                advice = advise_on(history)
                entries.append({"log": name, **how_read(history), **advice.to_dict()})
                if not as_json:
                    typer.echo(f"{name}: {read_as(history)}\n{advice}\n")
        failed = failed or bool(failures)
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
    if failed:
        raise typer.Exit(FAILED)
    if any(entry["limit"] is None for entry in entries):
        raise typer.Exit(REFUSED)


def replay(
    log: Log,
    rule: Annotated[
        list[str], typer.Option("--rule", help="As in 'ZScore(z=2.5)'; repeat it.")
    ],
    format: Format = None,
    column: ColumnName = None,
    as_json: Json = False,
) -> None:
    """Tell what other rules would have done on the norms of a run.

    Example: gradclip replay run.jsonl --rule "ZScore(z=2.5)" --rule "Norm(1.0)"
    """
    from gradclip.advice.replaying import PLAINLY
    from gradclip.wording import sentence

    with plain_errors():
        history = History.load(log, format=format, column=column)
        rows = replay_rows(history, [_rule(text) for text in rule])
    notes = list(history.recorded.notes)
    if as_json:
        whole = {"log": str(log), **how_read(history), "rules": rows, "notes": notes}
        typer.echo(json.dumps(whole, indent=2))
        return
    typer.echo(f"{log}: {read_as(history)}")
    _table(rows)
    typer.echo(PLAINLY)
    for note in notes:
        typer.echo(f"  - {sentence(note)}")


def replay_rows(history: History, rules: list[Rule]) -> list[dict[str, Any]]:
    """Return a row for each rule: clip rate, limits, the largest norm let through."""
    from gradclip.advice.evidence import SPIKE
    from gradclip.advice.replaying import replay as replay_on
    from gradclip.advice.spikes import row_scores
    from gradclip.ruletext import call

    # By their rows, since another run may have ordinary norms at the same steps.
    at = row_scores(history.recorded) > SPIKE
    rows = []
    with progress(len(rules) * len(history), "replaying") as advance:
        for rule in rules:
            with refused_rules():
                again = replay_on(history, rule, advance)
            limits = again.limit[np.isfinite(again.limit)]
            passed = again.norm_after[at & np.isfinite(again.norm)]
            rows.append(
                {
                    "rule": call(rule),
                    "clip_rate": again.clip_rate,
                    "median_limit": _median(limits),
                    "smallest_scale": float(np.nanmin(again.scale, initial=np.inf)),
                    "largest_passed_at_spikes": float(passed.max())
                    if passed.size
                    else None,
                }
            )
    return rows


def _median(numbers: Any) -> float | None:
    return float(np.median(numbers)) if numbers.size else None


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in rows[0]:
        table.add_column(
            name.replace("_", " "), justify="left" if name == "rule" else "right"
        )
    for row in rows:
        cells = (
            f"{x:.1%}"
            if name == "clip_rate"
            else x
            if isinstance(x, str)
            else "–"
            if x is None
            else f"{x:.4g}"
            for name, x in row.items()
        )
        table.add_row(*cells)
    # Where there is no terminal, rich takes 80 characters and shortens the cells.
    Console(width=None if sys.stdout.isatty() else 110).print(table, markup=False)


def report(
    logs: Logs,
    out: Annotated[Path, typer.Option("-o", "--out", help="The page to write.")] = Path(
        "report.html"
    ),
    format: Format = None,
    column: ColumnName = None,
) -> None:
    """Write one HTML page about one run or several; it opens offline.

    Example: gradclip report run.jsonl -o report.html
    """
    with plain_errors():
        from gradclip.report import write_report

        named = [
            (name, history)
            for path in logs
            for name, history in networks(path, format, column)
        ]
        write_report(named, out)
    typer.echo(f"Written to {out}, {out.stat().st_size / 1e6:.1f} MB.")


def watch(
    log: Log,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    every: Annotated[
        float, typer.Option("--every", min=0.1, help="Seconds between looks.")
    ] = 1.0,
) -> None:
    """Follow a run in the terminal while it trains; Ctrl-C ends it.

    Example: gradclip watch run.jsonl
    """
    from gradclip.readers.plain import flows_away
    from gradclip.watching import follow

    if flows_away(log) and not once:
        raise typer.BadParameter(
            f"{log}: what comes through a pipe is gone once it is read, and cannot be "
            "followed. Write it to a file, as with 'tee run.log', and watch that file; "
            "--once shows what has come.",
            param_hint="log",
        )
    with plain_errors():
        follow(log, once, every)


def networks(
    path: Path, format: str | None, column: str | None
) -> Iterator[tuple[str, History]]:
    """Yield the history of each network in a log, with a name for it."""
    from gradclip.readers.plain import plain_file

    # Copied once for all networks: a pipe cannot be read a second time.
    with plain_file(path) as file:

        def loaded(column: str | None) -> History:
            history = History.load(file, format=format, column=column)
            # What is read may be a copy, which is gone when the history is used.
            history.path = path if path.exists() else None
            return history

        history = loaded(column)
        others = history.recorded.networks
        yield f"{path} · {history.recorded.column}" if others else str(path), history
        for name in others:
            yield f"{path} · {name}", loaded(name)


def how_read(history: History) -> dict[str, Any]:
    """Return what a log was taken for."""
    record = history.recorded
    return {"format": record.format, "column": record.column}


def read_as(history: History) -> str:
    """Return what a log was taken for, as a sentence."""
    record = history.recorded
    runs = np.unique(record.run).size
    several = f", {runs} runs" if runs > 1 else ""
    what = f"{record.format}, column {record.column}"
    return f"read as {what}, {len(history)} norms{several}"


def _rule(text: str) -> Rule:
    from gradclip.ruletext import rule_from

    with refused_rules():
        return rule_from(text)


@contextmanager
def refused_rules() -> Iterator[None]:
    """Turn what is wrong with a rule, or with it on a log, into a wrong option."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--rule") from None


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what can go wrong with a file into one line and exit code 1."""
    with noted_errors() as failures:
        yield
    if failures:
        raise typer.Exit(FAILED)


@contextmanager
def noted_errors() -> Iterator[list[str]]:
    """Tell in one line what went wrong with a file, and yield a list of that."""
    failures: list[str] = []
    try:
        yield failures
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `head` has.
        raise
    except (OSError, ValueError, ModuleNotFoundError) as error:
        # Errors of packages may have several lines, and a log gets one.
        failures.append(" ".join(str(error).split()))
        typer.echo(failures[0], err=True)


@contextmanager
def progress(total: int, what: str) -> Iterator[Any]:
    """Show a bar on a terminal for what takes more than a moment."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    # So few steps are done before a bar could be read.
    quick = total < 20_000 or not console.is_terminal
    with Progress(console=console, transient=True, disable=quick) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
