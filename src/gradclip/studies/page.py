"""The page of all studies in a folder, as Markdown, and the tables of one on screen."""

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gradclip.studies import STUDIES
from gradclip.studies.tables import NOISE, text

HEAD = f"""# The claims, tested

Small experiments that anyone can run again: `pip install "gradclip[study]"`, then
`gradclip study NAME --out DIR`. This page is written by `gradclip study --page` from
the files that the studies left, and not by hand. All seeds count, and no result is
picked.

Intervals hold 95 %: Student's *t* for means, Wilson's for shares. {NOISE} marks what is
within noise of the row named under its table: the interval of the differences, seed by
seed, includes 0. With this many marks, about one in twenty is there, or missing, by
chance.
"""


PLACE = re.compile(
    r"(?P<begin><!-- tables of (?P<study>[\w-]+) -->)\n.*?(?P<end><!-- end -->)", re.S
)
"""Where a page has the tables of a study."""


def summaries(folder: Path) -> list[dict[str, Any]]:
    """Return what the studies left in a folder, in the order of the list."""
    paths = (folder / f"{name}.json" for name in STUDIES)
    return [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]


def write_page(folder: Path, path: Path) -> None:
    """Write the page of all studies in a folder, or the tables that a page asks for.

    Raises:
        LookupError: If it asks for those of a study that is not there.
    """
    found = summaries(folder)
    if path.exists() and PLACE.search(page := path.read_text("utf-8")):
        # As a function: in a text, re.sub would read a backslash as its own.
        path.write_text(PLACE.sub(partial(tables, found), page), "utf-8")
        return
    where = Path(os.path.relpath(folder, path.parent))
    parts = [HEAD, claims(found)]
    parts += [section(summary, where.as_posix()) for summary in found]
    missing = [name for name in STUDIES if name not in {x["study"] for x in found}]
    if missing:
        parts.append(f"## Not run\n\nThe studies {', '.join(missing)}.\n")
    path.write_text("\n".join(parts), "utf-8")


def tables(found: list[dict[str, Any]], place: re.Match[str]) -> str:
    """Return the tables of one study, between the marks where they stand."""
    for summary in found:
        if summary["study"] == place["study"]:
            shown = "\n\n".join(map(markdown, summary["tables"]))
            return f"{place['begin']}\n\n{shown}\n\n{place['end']}"
    raise LookupError(
        f"{place['begin']} stands in it, and {place['study']} was not run"
    )


def claims(found: list[dict[str, Any]]) -> str:
    """Return the table of what was seen of each claim."""
    lines = ["## What holds", ""]
    lines += ["| claim | seen | numbers |", "|---|---|---|"]
    lines += [
        f"| {claim['claim']} | **{claim['verdict']}** | {claim['numbers']} "
        f"([{summary['study']}](#{summary['study']})) |"
        for summary in found
        for claim in summary["claims"]
    ]
    return "\n".join(lines) + "\n"


def section(summary: dict[str, Any], where: str) -> str:
    """Return what one study says."""
    name, run = summary["study"], summary["run"]
    seeds = f"{run['seeds']} seeds, " if run["seeds"] > 1 else ""
    lines = [f"## {name}", "", f"*{summary['question']}*", "", summary["setup"], ""]
    for table in summary["tables"]:
        lines += [markdown(table), ""]
    lines += [f"![{summary['question']}]({where}/{name}.svg)", ""]
    lines += ["Not run: " + "; ".join(summary["not_run"]) + ".", ""]
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    lines += [
        f"Size: {run['size']}; {seeds}{run['cells']} settings; "
        f"{run['cpu_minutes']:g} CPU minutes on a shared machine; Python "
        f"{run['python']}, {versions}. [Numbers]({where}/{name}.json), "
        f"[every run]({where}/{name}.jsonl).",
        "",
    ]
    return "\n".join(lines)


def markdown(table: dict[str, Any]) -> str:
    """Return a table in Markdown, with what it is above it."""
    lines = [f"**{table['title']}**", "", row(table["columns"])]
    lines += [row(["---"] + ["---:"] * (len(table["columns"]) - 1))]
    lines += [row(cells(table, entries)) for entries in table["rows"]]
    if table["reference"] is not None:
        lines += ["", f"{NOISE} within noise of `{table['reference']}`."]
    return "\n".join(lines)


def row(texts: list[str]) -> str:
    """Return one line of a table in Markdown."""
    return "| " + " | ".join(texts) + " |"


def cells(table: dict[str, Any], entries: list[Any]) -> list[str]:
    """Return the texts of a row."""
    return [text(entry, table["form"]) for entry in entries]


def show(summary: dict[str, Any], console: Console) -> None:
    """Print the tables and claims of a study."""
    for table in summary["tables"]:
        shown = Table(title=table["title"], title_justify="left")
        for i, name in enumerate(table["columns"]):
            shown.add_column(name, justify="right" if i else "left")
        for entries in table["rows"]:
            shown.add_row(*cells(table, entries))
        console.print(shown, markup=False)
        if table["reference"] is not None:
            console.print(f"{NOISE} within noise of {table['reference']}", markup=False)
    for claim in summary["claims"]:
        line = f"{claim['claim']}: {claim['verdict']}. {claim['numbers']}"
        console.print(line, markup=False, highlight=False)
    console.print("Not run: " + "; ".join(summary["not_run"]) + ".", markup=False)
