"""What a release says in several places, it says once."""

import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest
import tomllib
from packaging.requirements import Requirement

import gradclip
import gradclip.torch

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = CONFIG["project"]
README = (ROOT / "README.md").read_text("utf-8")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def floors():
    """Return the lowest version of each package that the metadata allow."""
    extras = PROJECT["optional-dependencies"].values()
    wanted = map(Requirement, chain(PROJECT["dependencies"], *extras))
    found = {}
    for requirement in wanted:
        if requirement.name != "gradclip":
            (bound,) = requirement.specifier
            assert bound.operator == ">=", requirement
            assert found.setdefault(requirement.name, bound.version) == bound.version
    return found


def test_the_readme_tells_the_floors_of_the_metadata():
    table = README.partition("| package, from version |")[2].partition("\n\n")[0]
    told = re.findall(r"`([a-z\d-]+)` (\d[\d.]*)", table)
    assert dict(told) == floors()
    python = re.search(r"Python (\d\.\d+) or later", README)[1]
    assert PROJECT["requires-python"] == f">={python}"


def to_files(page):
    """Return the links of a page that lead to files, beside those to the network."""
    links = re.findall(r"\]\(([^)]+)\)", page) + re.findall(
        r"^\[.+\]: (.+)$", page, re.M
    )
    return [link for link in links if not link.startswith("https://")]


def test_links_of_the_readme_lead_somewhere():
    files = to_files(README)
    assert files
    names = [file.partition("#")[0] for file in files]
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_page_of_an_index_has_no_link_to_a_file():
    hook = CONFIG["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    page = "".join((ROOT / x["path"]).read_text("utf-8") for x in hook["fragments"])
    for change in hook["substitutions"]:
        page = re.sub(change["pattern"], change["replacement"], page)
    assert to_files(page) == []
    assert "https://arxiv.org" in page
    assert "Choose a method, and what a message means" in page


def test_the_version_is_one():
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    version = PROJECT["version"]
    assert gradclip.__version__ == version
    assert re.search(r"^## (\S+)", changes, re.M)[1] == version
    assert re.search(r"^version: (.+)$", citation, re.M)[1] == version
    assert re.search(r"^license: (.+)$", citation, re.M)[1] == PROJECT["license"]


@pytest.mark.parametrize("module", [gradclip, gradclip.torch])
def test_a_star_brings_the_public_names_and_no_module(module):
    public = {x for x in vars(module) if not x.startswith("_")}
    modules = {x for x in public if isinstance(getattr(module, x), ModuleType)}
    # A function has the name of the file that it stands in.
    assert set(module.__all__) == public - modules


def test_the_metadata_name_every_front():
    for front in ("NumPy", "PyTorch", "JAX"):
        assert front in PROJECT["description"]
        assert front.lower() in PROJECT["keywords"]


def lint(*files):
    command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    return subprocess.run(
        [sys.executable, *command, *files], capture_output=True, text=True, check=False
    )


def test_workflows_fit_their_schema(tmp_path):
    done = lint(*WORKFLOWS)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(WORKFLOWS[0].read_text("utf-8").replace("runs-on:", "runs:"))
    assert lint(wrong).returncode != 0


@pytest.mark.parametrize("job", ["oldest", "newest", "wheel", "docs"])
def test_the_workflow_has_the_job(job):
    assert any(f"\n  {job}:\n" in path.read_text("utf-8") for path in WORKFLOWS)


def test_workflows_name_tests_that_exist():
    text = "".join(path.read_text("utf-8") for path in WORKFLOWS)
    named = set(re.findall(r"tests/\w+\.py", text))
    assert named
    assert all((ROOT / name).exists() for name in named)
