"""Use a wheel where nothing else is: outside the tree, in an environment of its own.

First with the core alone, which must not ask for a framework; then as the README does.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from pages import blocks, version  # noqa: E402

CORE = """
import importlib.util, sys, time
start = time.perf_counter()
import numpy
middle = time.perf_counter()
import gradclip as gc
end = time.perf_counter()
assert importlib.util.find_spec("torch") is None, "torch is here: this proves nothing"
assert "site-packages" in gc.__file__, gc.__file__
grads, info = gc.clip(numpy.array([3.0, 4.0]), gc.Norm(1.0))
assert grads.round(6).tolist() == [0.6, 0.8] and info.norm == 5.0, (grads, info)
print(f"import gradclip: {end - middle:.3f} s, beside numpy's {middle - start:.3f} s")
"""

PAGE = (
    "from importlib.metadata import metadata; print(metadata('gradclip').get_payload())"
)


def run(*command: str | Path) -> str:
    """Run a command that has to succeed; return what it printed."""
    clean = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, check=True, env=clean, stdout=subprocess.PIPE, text=True
    ).stdout


def first_example() -> tuple[str, str]:
    """Return the README's first program, with gradclip, and what it prints."""
    found = blocks(ROOT / "README.md")
    program = next(text for info, text in found if info == ["diff"])
    printed = next(text for info, text in found if info == ["text", "after"])
    return version(program, "-"), printed


def main(wheel: Path) -> None:
    """Install the wheel step by step, and use each step."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run(sys.executable, "-m", "venv", "env")
        python = Path(folder, "env", "bin", "python")
        pins = ROOT / "constraints.txt"
        install = [python, "-m", "pip", "install", "--quiet", "-c", pins]
        run(*install, wheel)
        print(run(python, "-c", CORE), end="")
        run(*install, f"{wheel}[torch,report]")
        program, printed = first_example()
        Path("example.py").write_text(program, "utf-8")
        assert run(python, "example.py") == printed, "the README's first example"
        page = run(python, "-c", PAGE)
        assert "# gradclip" in page, "the wheel has no README"
        assert "](docs/" not in page, "the README links to files"
        commands = run(Path(folder, "env", "bin", "gradclip"), "--help")
        assert "advise" in commands, commands
        print(f"{wheel.name}: the core, the README's first example, gradclip --help")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
