"""What the pages say is run: code blocks with their output, and every docstring.

A `python` block followed by a `text` block has to print it. A `diff` block is two
programs, without and with the change; `text before` and `text after` are their output.
Blocks of one page share their names.
"""

import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import warnings
from pathlib import Path

import pytest

import gradclip as gc
import gradclip.torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
# They need the trainers, and are run by tests/integrations.
ELSEWHERE = ("docs/trainers.md", "gradclip.integrations", "gradclip.keras")
PAGES = [page for page in PAGES if not str(page).endswith(ELSEWHERE)]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)
SHOWN_ONLY = {"mermaid", "bash", "json", "yaml", "toml", "html", "tree"}


def blocks(page):
    return [(info.split(), text) for info, text in BLOCK.findall(page.read_text())]


def output_of(program, names):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "page", "exec"), names)
    return out.getvalue()


def version(diff, dropped):
    lines = [line for line in diff.splitlines() if not line.startswith(dropped)]
    return "\n".join(line[1:] for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed = {"__name__": "page"}, {}
    for info, text in blocks(page):
        kind, *rest = info or [""]
        if kind == "python":
            printed = {"": output_of(text, names)}
        elif kind == "diff":
            printed = {
                "before": output_of(version(text, "+"), dict(names)),
                "after": output_of(version(text, "-"), dict(names)),
            }
        elif kind == "text":
            assert printed[rest[0] if rest else ""] == text
        else:
            assert kind in SHOWN_ONLY, f"a block of kind {kind!r} is not run"


def test_a_wrong_output_would_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n```text\n3\n```\n")
    (_, program), (_, text) = blocks(page)
    assert output_of(program, {}) != text


def test_an_own_rule_is_short():
    (_, rule), *_ = blocks(ROOT / "docs" / "own-rule.md")
    assert "class Growth(Rule)" in rule
    assert len(rule.splitlines()) <= 40


def modules():
    for found in pkgutil.walk_packages(gradclip.__path__, "gradclip."):
        if not found.name.endswith("__main__") and not found.name.startswith(ELSEWHERE):
            yield found.name


@pytest.mark.parametrize("name", ["gradclip", *modules()])
def test_docstrings(name):
    with warnings.catch_warnings():
        module = importlib.import_module(name)
        result = doctest.testmod(module)
    assert result.failed == 0


def public():
    """Return what people call: not the types of what they get back."""
    passive = (Exception, gc.Info)
    found = {}
    for module in (gc, gradclip.torch):
        for thing in vars(module).values():
            is_passive = inspect.isclass(thing) and issubclass(thing, passive)
            own = getattr(thing, "__module__", "").startswith("gradclip")
            if own and callable(thing) and not is_passive and thing is not gc.Rule:
                found[f"{thing.__module__}.{thing.__name__}"] = thing
    return found


@pytest.mark.parametrize("name", public())
def test_public_docstrings_are_whole(name):
    thing = public()[name]
    doc = inspect.getdoc(thing)
    assert doc.splitlines()[0].endswith("."), "the first line is a sentence"
    assert "Example:" in doc
    assert ">>>" in doc
    assert "$" in doc, "the equation"
    documented = set(re.findall(r"^    (\w+): ", doc.partition("Args:")[2], re.M))
    assert set(inspect.signature(thing).parameters) <= documented
