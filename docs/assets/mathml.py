"""Set equations when the site is built, as MathML: no script, and no network."""

import html
import re

from latex2mathml.converter import convert

SPAN = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.S
)


def on_page_content(content: str, **_: object) -> str:
    """Replace the equations of a page, in their TeX form, by MathML."""
    return SPAN.sub(_equation, content)


def _equation(found: re.Match[str]) -> str:
    display = "block" if found["tag"] == "div" else "inline"
    return convert(html.unescape(found["tex"]), display=display)
