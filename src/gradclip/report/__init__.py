"""One HTML page about a run or several: self-contained, it opens offline."""

from collections.abc import Sequence
from pathlib import Path

from gradclip.history import History


def write_report(named: Sequence[tuple[str, History]], out: str | Path) -> None:
    """Write the page.

    Args:
        named: The histories, each with a name; several are compared.
        out: The file to write; its folder has to exist.

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
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"the report needs {missing.name}, which is not installed: "
            'pip install "gradclip[report]"',
            name=missing.name,
        ) from None
    out.write_text(render(named), "utf-8")
