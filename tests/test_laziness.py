"""`import gradclip` brings in numpy and array-api-compat, and nothing heavy."""

import subprocess
import sys

import pytest

HEAVY = ["torch", "jax", "rich", "typer", "matplotlib", "plotly", "jinja2", "scipy"]
PROOF = """
import sys
{first}
import gradclip
loaded = [name for name in {heavy!r} if name in sys.modules]
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""


def prove(first):
    code = PROOF.format(first=first, heavy=HEAVY)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_core_imports_no_framework():
    result = prove("")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["rich", "torch"])
def test_the_proof_can_fail(name):
    result = prove(f"import {name}")
    assert result.returncode == 1
    assert f"loaded: ['{name}'" in result.stderr


def test_using_the_numpy_front_loads_no_framework():
    use = (
        "import numpy, gradclip\n"
        "gradclip.clip(numpy.ones(3), gradclip.Norm(1.0))\n"
        "gradclip.Clipper(gradclip.ZScore()).clip([numpy.ones(3)])"
    )
    result = prove(use)
    assert result.returncode == 0, result.stderr
