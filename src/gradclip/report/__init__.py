"""One HTML page about a run or several: self-contained, it opens offline."""

import os
from collections.abc import Sequence
from pathlib import Path

from gradclip.extras import missing
from gradclip.history import History


def write_report(
    named: Sequence[tuple[str, History]], out: str | os.PathLike[str]
) -> None:
    """Write the page.

    Args:
        named: The histories, each with a name; several are compared.
        out: The file to write; it and its folder are made.

    Raises:
        ModuleNotFoundError: If plotly, jinja2 or tsdownsample is not installed.
        OSError: If the file cannot be written.
        ValueError: If the page would replace one of the logs.
    """
    out = Path(out)
    for name, history in named:
        if history.path and out.exists() and out.samefile(history.path):
            raise ValueError(f"{out}: the page would replace the log {name}.")
    try:
        from gradclip.report.page import render
    except ModuleNotFoundError as error:
        message = missing("the report", error.name, "report")
        raise ModuleNotFoundError(message, name=error.name) from None
    # A name may hold bytes that are no text; whole, or a page would be left empty.
    page = render(named).encode("utf-8", "replace")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(page)
