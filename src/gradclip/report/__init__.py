"""One HTML page about a run or several: self-contained, it opens offline."""

from collections.abc import Sequence
from pathlib import Path

from gradclip.history import History


def write_report(named: Sequence[tuple[str, History]], out: Path) -> None:
    """Write the page.

    Args:
        named: The histories, each with a name; several are compared.
        out: The file to write; its folder has to exist.

    Raises:
        ModuleNotFoundError: If plotly, jinja2 or tsdownsample is not installed.
        OSError: If the file cannot be written.
    """
    try:
        from gradclip.report.page import render
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"the report needs {missing.name}, which is not installed: "
            'pip install "gradclip[report]"',
            name=missing.name,
        ) from None
    out.write_text(render(named), "utf-8")
