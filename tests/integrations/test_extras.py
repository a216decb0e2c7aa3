"""Each extra brings its own trainer only, and a missing one is named with its cure."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gradclip.integrations

TRAINERS = {"lightning", "transformers", "accelerate", "deepspeed", "keras"}
# Hugging Face's Trainer cannot be imported without Accelerate.
BROUGHT = {name: {name} for name in TRAINERS}
BROUGHT["transformers"] = {"transformers", "accelerate"}


def brought(name, extras=(), seen=None):
    """Return everything that installing a distribution installs."""
    seen = set() if seen is None else seen
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        return seen
    for line in map(Requirement, lines):
        wanted = extras or [""]
        if line.marker and not any(line.marker.evaluate({"extra": e}) for e in wanted):
            continue
        key = (canonicalize_name(line.name), tuple(sorted(line.extras)))
        if key not in seen:
            seen.add(key)
            brought(line.name, line.extras, seen)
    return seen


@pytest.mark.parametrize("extra", sorted(TRAINERS))
def test_an_extra_brings_nothing_of_the_others(extra):
    found = {name for name, _ in brought("gradclip", [extra])} & TRAINERS
    assert found == BROUGHT[extra]


@pytest.mark.parametrize("extra", sorted(TRAINERS))
def test_a_missing_package_is_named_with_its_install_line(extra):
    hide = {extra, "pytorch_lightning"}
    program = f"import sys; sys.modules.update(dict.fromkeys({hide!r}))\n"
    program += f"import gradclip.integrations.{extra}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    message = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert re.search(rf'pip install "gradclip\[{extra}\]"$', message), message


@pytest.mark.parametrize("extra", sorted(TRAINERS))
def test_an_adapter_names_no_other_trainer(extra):
    source = Path(gradclip.integrations.__file__).with_name(f"{extra}.py").read_text()
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", source, re.M))
    imported |= set(re.findall(r'needed\("\w+", "(\w+)', source))
    assert imported & TRAINERS <= {extra}
    assert extra in imported


@pytest.mark.parametrize(
    ("module", "hidden", "extra"),
    [
        ("gradclip.torch", "torch", "torch"),
        ("gradclip.jax", "jax", "jax"),
        ("gradclip.jax", "optax", "jax"),
        ("gradclip.integrations.transformers", "torch", "torch"),
        ("gradclip.integrations.accelerate", "torch", "torch"),
    ],
)
def test_a_missing_framework_is_named_with_its_install_line(module, hidden, extra):
    program = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name.partition('.')[0] == {hidden!r}:\n"
        f"            raise ModuleNotFoundError('none', name={hidden!r})\n"
        "sys.meta_path.insert(0, Hidden())\n"
        f"import {module}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    message = done.stderr.splitlines()[-1]
    assert message.endswith(f'pip install "gradclip[{extra}]"'), done.stderr[-900:]
