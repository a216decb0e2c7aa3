"""What `gradclip study` does, once it is known that everything it needs is there."""

import json
from pathlib import Path

import typer
from rich.console import Console

from gradclip.studies import STUDIES
from gradclip.studies.frame import Size, Study, carry_out, load
from gradclip.studies.page import show, summaries, write_page
from gradclip.studies.progress import Progress


def perform(
    name: str | None,
    out: Path,
    full: bool,
    quick: bool,
    seeds: int | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Run a study if one is named, write the page if one is wanted."""
    if full and quick:
        raise typer.BadParameter("take one of them.", param_hint="'--full' / '--quick'")
    if name is not None and name not in STUDIES:
        known = ", ".join(STUDIES)
        raise typer.BadParameter(f"there is no study {name!r}; there are {known}.")
    if name is not None:
        size: Size = "full" if full else "quick" if quick else "usual"
        one(load(name), out, size, seeds, as_json)
    if page is not None:
        if not summaries(out):
            raise typer.BadParameter(
                f"{out} holds no study; run `gradclip study NAME --out {out}` first."
            )
        try:
            write_page(out, page)
        except LookupError as error:
            raise typer.BadParameter(f"{page}: {error.args[0]}.") from None


def one(study: Study, out: Path, size: Size, seeds: int | None, as_json: bool) -> None:
    """Run a study and show what follows from it."""
    console = Console(stderr=as_json)
    with Progress(study.name, console) as progress:
        summary = carry_out(study, out, size, seeds, progress)
    if as_json:
        typer.echo(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    # Where there is no terminal, rich takes 80 characters and breaks the cells.
    wide = None if console.is_terminal else 140
    show(summary, Console(width=wide))
    files = ", ".join(f"{study.name}.{kind}" for kind in ("json", "svg", "jsonl"))
    console.print(f"Written to {out}: {files}.", markup=False, highlight=False)
