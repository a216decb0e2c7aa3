"""What all studies share: cells times seeds, and a file that a run goes on from.

A study is a list of cells, each a dictionary of settings, and a function that yields
the measurements of one cell, seed by seed. Each is a line of `NAME.jsonl` as soon as it
is there, and what stands there is not computed again. `NAME.json` and `NAME.svg` hold
what follows from it.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

import gradclip
from gradclip.studies import STUDIES
from gradclip.studies.progress import Progress, duration
from gradclip.studies.results import Cell, Results, Row, key
from gradclip.studies.tables import Table

Size: TypeAlias = Literal["quick", "usual", "full"]
Verdict: TypeAlias = Literal[
    "holds", "holds here but not there", "not seen", "not told"
]
Tick: TypeAlias = Callable[[float], object]
"""Told the share of a cell that is done."""


@dataclass(frozen=True)
class Claim:
    """One claim of the founding article, and what was seen of it."""

    claim: str
    verdict: Verdict
    numbers: str


def concluded(claim: str, hits: Sequence[bool | None], numbers: str) -> Claim:
    """Return a claim with its verdict, and why where there is none."""
    why = "one seed is too few to tell; " if None in hits else ""
    return Claim(claim, seen(hits), why + numbers)


def seen(hits: Sequence[bool | None]) -> Verdict:
    """Return the verdict over several places; None is one where it cannot be told."""
    if not hits or None in hits:
        return "not told"
    if all(hits):
        return "holds"
    return "holds here but not there" if any(hits) else "not seen"


@dataclass(frozen=True)
class Findings:
    """What follows from the rows of a study."""

    tables: list[Table]
    claims: list[Claim] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """What a study does; each of its files has one, called `STUDY`."""

    name: str
    setup: str
    """What is trained and measured, in a paragraph of Markdown."""
    seeds: int
    cells: Callable[[Size], list[Cell]]
    run: Callable[[Cell, Sequence[int], Tick], Iterator[tuple[int, Row]]]
    """Yields a seed and its measurements; may do all seeds together."""
    find: Callable[[Results], Findings]
    draw: Callable[[Results, Any], None]
    """Draws into a matplotlib figure."""
    not_run: tuple[str, ...]
    cost: Callable[[Cell], float]
    """About how many CPU seconds a seed of a cell takes, on one core."""
    seeded: bool = True
    """False where there is nothing random, so that one seed is all."""


def plain(x: Any) -> Any:
    """Return a measurement as strict JSON can hold it: NaN and infinity by names."""
    return json.loads(json.dumps(x), parse_constant=str)


def load(name: str) -> Study:
    """Return a study of the list."""
    module = import_module(f"gradclip.studies.{name.replace('-', '_')}")
    return module.STUDY


def carry_out(
    study: Study, out: Path, size: Size, seeds: int | None, progress: Progress
) -> dict[str, Any]:
    """Run what is not in the folder yet, and write what follows from all of it.

    Args:
        study: The study.
        out: A folder that exists.
        size: How much of it.
        seeds: How many, or None for the number of the study.
        progress: Is told how far the run is.

    Returns:
        What `NAME.json` holds.
    """
    chosen = range((seeds or study.seeds) if study.seeded else 1)
    results = Results(study.cells(size), chosen)
    path = out / f"{study.name}.jsonl"
    spent = read_rows(path, results)
    todo = [cell for cell in results.cells if results.missing(cell)]
    seconds = sum(study.cost(cell) * len(results.missing(cell)) for cell in todo)
    progress.start(len(results.cells), len(results.cells) - len(todo), seconds)
    # By lines, so that a run that is killed leaves whole ones.
    with path.open("a", encoding="utf-8", buffering=1) as file, one_thread():
        for cell in todo:
            for seed, row, seconds in timed(
                study, cell, results.missing(cell), progress
            ):
                line = {"cell": cell, "seed": seed, "row": plain(row), "cpu_s": seconds}
                file.write(json.dumps(line, allow_nan=False) + "\n")
                # As it would be read back: a resumed run finds the same.
                results.add(cell, seed, plain(row))
                spent += seconds
            progress.done(cell)
    return write_findings(study, results, out, size, spent)


def timed(
    study: Study, cell: Cell, seeds: Sequence[int], progress: Progress
) -> Iterator[tuple[int, Row, float]]:
    """Yield a seed, its measurements, and the CPU seconds that they took."""
    # A clock on the wall would count whatever else runs.
    start = time.process_time()
    for seed, row in study.run(cell, seeds, progress.within):
        now = time.process_time()
        yield seed, row, round(now - start, 3)
        start = now


def read_rows(path: Path, results: Results) -> float:
    """Take in what stands in a file; return the CPU seconds that it took.

    Settings that are not of this size are left where they are. A last line that was
    cut short is cut off, so that what follows is a line of its own.
    """
    if not path.exists():
        return 0.0
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        path.write_bytes(whole + b"\n" if whole else b"")
    known, spent = set(map(key, results.cells)), 0.0
    for entry in map(json.loads, filter(None, whole.decode().split("\n"))):
        if key(entry["cell"]) in known and entry["seed"] in results.seeds:
            results.add(entry["cell"], entry["seed"], entry["row"])
            spent += entry["cpu_s"]
    return spent


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, whose number would decide how it rounds."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # A run that is lost has tiny numbers in it, which cost ten times the time.
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)


def write_findings(
    study: Study, results: Results, out: Path, size: Size, spent: float
) -> dict[str, Any]:
    """Write the tables, the claims and the figure; return what the tables are in."""
    findings = study.find(results)
    summary = {
        "study": study.name,
        "question": STUDIES[study.name],
        "setup": study.setup,
        "run": facts(size, results, spent),
        "tables": [vars(table) for table in findings.tables],
        "claims": [vars(claim) for claim in findings.claims],
        "not_run": [*study.not_run, *larger(study, results)],
    }
    text = json.dumps(plain(summary), indent=1, allow_nan=False, ensure_ascii=False)
    (out / f"{study.name}.json").write_text(text + "\n", "utf-8")
    from gradclip.studies.drawing import save

    save(lambda figure: study.draw(results, figure), out / f"{study.name}.svg")
    # What is shown is what stands in the file.
    return json.loads(text)


def larger(study: Study, results: Results) -> list[str]:
    """Return what the full size would take, where this is not it."""
    cells = study.cells("full")
    if cells == results.cells:
        return []
    seconds = study.seeds * sum(map(study.cost, cells))
    return [f"the full size (`--full`), about {duration(seconds)} on one core"]


def facts(size: Size, results: Results, spent: float) -> dict[str, Any]:
    """Return what a run has to be repeated with."""
    names = ("torch", "numpy", "scikit-learn")
    return {
        "size": size,
        "seeds": len(results.seeds),
        "cells": len(results.cells),
        "cpu_minutes": round(spent / 60, 1),
        "python": platform.python_version(),
        "versions": {"gradclip": gradclip.__version__}
        | {name: metadata.version(name) for name in names},
    }
