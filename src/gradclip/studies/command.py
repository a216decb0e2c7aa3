"""What `gradclip study` does, once it is known that everything it needs is there."""

import json
from pathlib import Path

import typer
from rich.console import Console

from gradclip.studies.frame import Size, carry_out, load
from gradclip.studies.page import show, write_page
from gradclip.studies.progress import Progress


def perform(
    name: str | None,
    out: Path,
    size: Size,
    seeds: int | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Run a study if one is named, write the page if one is wanted."""
    try:
        if name is not None:
            one(name, out, size, seeds, as_json)
        if page is not None:
            write_page(out, page)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def one(name: str, out: Path, size: Size, seeds: int | None, as_json: bool) -> None:
    """Run a study and show what follows from it."""
    study, console = load(name), Console(stderr=as_json)
    with Progress(name, console) as progress:
        summary = carry_out(study, out, size, seeds, progress)
    if as_json:
        typer.echo(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    wide = None if console.is_terminal else 140
    show(summary, Console(width=wide))
    files = ", ".join(f"{name}.{kind}" for kind in ("json", "svg", "jsonl"))
    console.print(f"Written to {out}: {files}.", markup=False, highlight=False)
