"""The command line: it reads the options, and hands over to the module that acts.

`gradclip --help` has to be quick and to work without torch, so that whatever a command
needs is imported when the command runs.
"""

import importlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit(
        'The command line needs typer: pip install "gradclip[report]"'
    ) from None

import gradclip
from gradclip import commands
from gradclip.exits import FAILED, INTERRUPTED
from gradclip.extras import missing

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)


def main() -> None:
    """Run the program; what `gradclip` and `python -m gradclip` start."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal for ASCII alone shows a mark where there is a dash.
            stream.reconfigure(errors="replace")
    app(prog_name="gradclip")


def _version(asked: bool) -> None:
    """Print the version and end, if it was asked for."""
    if asked:
        typer.echo(f"gradclip {gradclip.__version__}")
        raise typer.Exit


def _possible(path: Path) -> Path:
    """Refuse a folder below a file at once: all else waits for torch to be there."""
    # Path.exists raises for a name that is too long, and os.path.exists says no.
    there = next(filter(os.path.exists, (path, *path.parents)), path)
    if os.path.exists(there) and not os.path.isdir(there):
        raise typer.BadParameter(f"cannot make the folder {path}: {there} is a file.")
    return path


Folder = Annotated[
    Path,
    typer.Option(
        file_okay=False, writable=True, callback=_possible, help="Folder for the files."
    ),
]


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    """Gradient clipping: measure a norm, choose a limit, rescale."""


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Steps of each run.")] = 600,
    out: Folder = Path("demo-out"),
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Weights and order of the text.")
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON, nothing else.")
    ] = False,
) -> None:
    """Train one network without clipping and under four rules, and compare.

    Example: gradclip demo --steps 200 --out DIR

    Ctrl-C ends it early and keeps what is done.
    """
    _require("demo", "demo", "torch", "matplotlib", "rich")
    from rich.console import Console

    from gradclip.characters import Setup
    from gradclip.demo import compare, show

    console = Console(stderr=as_json)
    comparison = compare(Setup(steps=steps, seed=seed), _folder(out), console)
    if as_json:
        typer.echo(json.dumps(comparison.summary(), indent=2))
    else:
        show(comparison, console)
    if comparison.interrupted:
        raise typer.Exit(INTERRUPTED)


# What stands behind the script is the script's, even if it looks like an option.
@app.command(context_settings={"allow_interspersed_args": False})
def doctor(
    script: Annotated[str, typer.Argument(help="A program that trains.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="What it is started with.")
    ] = None,
    module: Annotated[
        bool, typer.Option("--module", "-m", help="SCRIPT is one for python -m.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="End it after so many.")] = 50,
    as_json: commands.Json = False,
) -> None:
    """Run a training script for some steps, and tell what its clipping really did.

    Example: gradclip doctor --steps 20 train.py --lr 0.1

    What `python -m` starts: gradclip doctor -m project.train --lr 0.1

    Ends with 0 if all is well, 1 if the script fails or takes no step, 3 if a clip is
    out of place.
    """
    if not module and not os.path.isfile(script):
        raise typer.BadParameter(
            f"there is no file {script}; a module is named after -m.",
            param_hint="'SCRIPT'",
        )
    _require("doctor", "torch", "torch")
    from gradclip.checkup import check_up
    from gradclip.program import Program, output_apart

    json_to = output_apart() if as_json else None
    code = check_up(Program(script, module), arguments or [], steps, json_to)
    if code:
        raise typer.Exit(code)


@app.command()
def study(
    name: Annotated[str | None, typer.Argument(help="None lists them.")] = None,
    out: Folder = Path("study-out"),
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many; the study's own if not given.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="The size of the paper.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="See that it runs; the numbers say nothing.")
    ] = False,
    page: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="Write a page on --out, or only its marked tables."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON, nothing else.")
    ] = False,
) -> None:
    """Run an experiment behind the claims about clipping, or list them.

    Example: gradclip study smoothness --out DIR

    What is in the folder already is not computed again, also after Ctrl-C.
    """
    from gradclip.studies import listing

    if name is None and page is None:
        typer.echo(listing())
        return
    _require("study", "study", "rich", "torch", "matplotlib", "scipy", "sklearn")
    from gradclip.studies.command import perform

    try:
        perform(name, _folder(out), full, quick, seeds, page, as_json)
    except KeyboardInterrupt:
        typer.echo("Interrupted; the same command goes on from here.", err=True)
        raise typer.Exit(INTERRUPTED) from None


app.command()(commands.advise)
app.command()(commands.replay)
app.command()(commands.report)
app.command()(commands.watch)


def _require(command: str, extra: str, *modules: str) -> None:
    """Import what a command needs, or say how to install it."""
    try:
        for module in modules:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        typer.echo(missing(f"gradclip {command}", error.name, extra), err=True)
        raise typer.Exit(FAILED) from None


def _folder(path: Path) -> Path:
    """Make a folder, or say what is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(
            f"cannot make the folder {path}: {error.strerror}.", param_hint="'--out'"
        ) from None
    return path
