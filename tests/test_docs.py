"""What the pages say is run: code blocks with their output, and every docstring.

A `python` block followed by a `text` block has to print it. A `diff` block is two
programs, without and with the change; `text before` and `text after` are their output.
Blocks of one page share their names. A `console` block is a session with the command
line.
"""

import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import shlex
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

import gradclip as gc
import gradclip.jax
import gradclip.torch
from gradclip.cli import app
from gradclip.per_sample import clipped_sum
from gradclip.torch.ghost import PerSample
from pages import blocks, version

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
# They need what only tests/integrations has, and are run there.
ELSEWHERE = (
    "docs/trainers.md",
    "gradclip.integrations",
    "gradclip.keras",
    "gradclip.backends.tensorflow",
)
PAGES = [page for page in PAGES if not str(page).endswith(ELSEWHERE)]
SHOWN_ONLY = {"mermaid", "bash", "json", "yaml", "toml", "html", "tree"}


def output_of(program, names):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "page", "exec"), names)
    return out.getvalue()


def session(text):
    """Return what a terminal of 88 columns shows for the commands in a text."""
    shown = []
    for line in text.splitlines():
        if line.startswith("$ "):
            program, *arguments = shlex.split(line[2:])
            assert program == "gradclip", f"{line!r} is not run"
            result = CliRunner().invoke(
                app, arguments, prog_name=program, env={"COLUMNS": "88"}
            )
            shown += [line, *map(str.rstrip, result.output.splitlines())]
    return "\n".join(shown) + "\n"


# A page that lists rules attaches each of them to the one optimizer of its opening.
@pytest.mark.filterwarnings("ignore:this optimizer has a clipper already")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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
        elif kind == "console":
            assert session(text) == text
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


def offered(module):
    """Return what a module offers: of a package, also what it takes from within."""
    found = {}
    for name, thing in vars(module).items():
        of = getattr(thing, "__module__", None) or ""
        within = hasattr(module, "__path__") and of.startswith("gradclip")
        if callable(thing) and name[0] != "_" and (within or of == module.__name__):
            found[f"{of}.{thing.__name__}"] = thing
    return found


def public():
    """Return what people call: not the types of what they get back."""
    passive = (Exception, gc.Info, gradclip.jax.ClipState)
    found = {x.__name__: x for x in (clipped_sum, PerSample)}
    for module in (gc, gradclip.torch, gradclip.jax):
        for name, thing in offered(module).items():
            is_passive = inspect.isclass(thing) and issubclass(thing, passive)
            if not is_passive and thing is not gc.Rule:
                found[name] = thing
    return found


def is_rule(thing):
    return inspect.isclass(thing) and issubclass(thing, gc.Rule)


NO_EQUATION = {
    "gradclip.jax.state_dict",
    "gradclip.jax.load_state_dict",
    "gradclip.torch.dtensors.whole",
}
REFUSES_NOTHING = {
    "gradclip.advice.advising.advise",
    "gradclip.jax.state_dict",
    "gradclip.torch.dtensors.whole",
    "gradclip.torch.placement.Pieces",
}


@pytest.mark.parametrize("name", public())
def test_public_docstrings_are_whole(name):
    thing = public()[name]
    doc = inspect.getdoc(thing)
    assert doc.splitlines()[0].endswith("."), "the first line is a sentence"
    assert "Example:" in doc
    assert ">>>" in doc
    assert "$" in doc or name in NO_EQUATION, "the equation"
    documented = set(re.findall(r"^    (\w+): ", doc.partition("Args:")[2], re.M))
    assert set(inspect.signature(thing).parameters) <= documented
    assert "Raises:" in doc or name in REFUSES_NOTHING, "what is refused"
    returns = inspect.signature(thing).return_annotation
    assert inspect.isclass(thing) or returns in (None, "None") or "Returns:" in doc


@pytest.mark.parametrize("name", [n for n, x in public().items() if is_rule(x)])
def test_every_rule_names_its_source(name):
    source = inspect.getdoc(public()[name]).partition("Reference:")[2]
    assert re.search(r"arXiv \d{4}\.\d{4,5}, \d{4}|thesis|github\.com", source)
