"""`gradclip doctor`: what it says of scripts that clip in vain, and of proper ones."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks

from gradclip.checkup import Program, examine, findings, lines_of, to_text
from gradclip.torch import Clipper, observing

SCRIPTS = Path(__file__).with_name("scripts")
PROPER = sorted(path.stem for path in (SCRIPTS / "right").glob("*.py"))
WRONG = {
    "after_step": "used",
    "before_backward": "early",
    "on_zeros": "early",
    "on_the_last_steps": "used",
    "before_unscale": "scaled",
    "before_unscale_fused": "scaled",
    "logs_scaled_norms": "scaled",
    "exhausted_iterator": "exhausted",
    "each_micro_batch": "added",
    "raw_gradients": "raw",
    "raw_with_norm": "raw",
    "step_in_backward": "absent",
    "other_model": "absent",
    "outside_closure": "remade",
    "before_sync": "unsynced",
    "twice": "twice",
    "twice_attached": "twice",
    "twice_clipper": "twice",
    "clipper_after_step": "used",
    "clipper_before_unscale": "scaled",
}


def seen(name, steps=100):
    with warnings.catch_warnings():
        # Torch itself warns of some of these, once.
        warnings.simplefilter("ignore")
        return examine(Program(str(SCRIPTS / f"{name}.py")), [], steps)


@pytest.mark.parametrize("name", WRONG)
def test_misuse_is_told(name):
    ledger, _ = seen(f"wrong/{name}")
    assert [x["kind"] for x in findings(ledger)] == [WRONG[name]]
    text = (SCRIPTS / "wrong" / f"{name}.py").read_text().splitlines()
    place, line = findings(ledger)[0]["line"].split(":")
    assert place == f"{name}.py"
    assert "clip" in text[int(line) - 1]


def test_the_first_wrong_call_is_dated_where_no_optimizer_has_its_parameters():
    ledger, _ = seen("wrong/exhausted_iterator", 5)
    (found,) = findings(ledger)
    assert found["first"] == "after step 1 of SGD"


@pytest.mark.parametrize("name", PROPER)
def test_proper_use_is_silent(name):
    ledger, ended = seen(f"right/{name}")
    assert ended.error is None
    assert findings(ledger) == []
    assert min(s.steps for s in ledger.steppers if s.steps) >= 10


def test_every_wrong_script_is_listed():
    assert {path.stem for path in (SCRIPTS / "wrong").glob("*.py")} == set(WRONG)


def test_all_that_happened_is_told():
    ledger, ended = seen("right/norm_then_value", steps=7)
    text = to_text(Program("train.py"), ledger, ended)
    assert "train.py was ended after step 7; backward() was called 7 times." in text
    told = "SGD: 7 steps; 7 of them with gradients as a clip had left them (4 of its 4"
    assert told in text
    fired = r"7 calls, 7 of them clipped; norm [\d.]+ to [\d.]+, limit 0.1; 4 of 4"
    assert re.search(fired, text)
    assert "6 without a limit, to measure" in text
    assert text.endswith("Nothing was seen that needs mending.")


def test_that_no_clip_was_seen_is_told():
    text = to_text(Program("train.py"), *seen("right/no_clip", steps=7))
    assert "SGD: 7 steps" in text
    assert text.endswith(
        "No call that clips was seen; one written by hand is not noticed."
    )


def test_nothing_stays_behind():
    def functions():
        replaced = torch.autograd.backward, torch.nn.utils.clip_grad_norm_
        return *replaced, Clipper._run, torch.amp.GradScaler.unscale_, sys.path[:]

    before = functions()
    seen("right/loss_scaling", steps=3)
    assert functions() == before
    assert not _global_optimizer_post_hooks


def program(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "gradclip", "doctor", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def test_the_program_prints_json_and_nothing_else(tmp_path):
    script = tmp_path / "train.py"
    body = (SCRIPTS / "wrong" / "after_step.py").read_text()
    others = (
        "import atexit, os, sys\natexit.register(print, 'bye')\nos.system('echo hi')\n"
    )
    script.write_text(f"{others}{body}    print(sys.argv[1:])\n")
    done = program("--json", "--steps", "5", script, "--lr", "0.1")
    assert done.returncode == 3, done.stderr
    for printed in ("['--lr', '0.1']", "bye", "hi"):
        assert printed in done.stderr.splitlines()
    told = json.loads(done.stdout)
    assert told["optimizers"][0]["steps"] == 5
    assert told["clips"][0]["came_to"] == {"used": 4}
    assert told["findings"][0]["message"].startswith(
        "in 4 of 4 calls, first after step 1 of SGD: that step had used the gradients"
    )


@pytest.mark.parametrize("clip", ["clip_grad_norm_", "clip_grad_value_"])
def test_a_script_whose_gradients_become_nan_is_not_called_well(tmp_path, clip):
    script = tmp_path / "train.py"
    script.write_text(
        f"""import torch

p = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([p], lr=0.1)
for step in range(9):
    optimizer.zero_grad()
    (p.sum() * (float("nan") if step == 6 else 1.0)).backward()
    torch.nn.utils.{clip}([p], 5.0)
    optimizer.step()
"""
    )
    program = Program(str(script))
    ledger, ended = examine(program, [], 100)
    assert lines_of(ledger)[0].bad == [6]
    text = to_text(program, ledger, ended)
    assert "(1 NaN or infinite, first in call 7), limit 5;" in text
    assert "norms were NaN or infinite: a step with such gradients spoils" in text
    assert "needs mending" not in text


def test_a_script_that_fails_shows_its_own_traceback(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import torch\n\n1 / 0\n")
    done = program(script)
    assert done.returncode == 1
    assert "train.py failed with ZeroDivisionError" in done.stdout
    assert "No torch optimizer took a step in this process." in done.stdout
    lines = done.stderr.splitlines()
    assert lines[1] == f'  File "{script}", line 3, in <module>'


def test_a_script_that_fails_in_another_folder_shows_its_own_traceback(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import os\n\nos.mkdir('out')\nos.chdir('out')\n1 / 0\n")
    done = program("train.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "train.py failed with ZeroDivisionError" in done.stdout
    assert done.stderr.splitlines()[1] == f'  File "{script}", line 5, in <module>'


def test_a_script_that_is_no_program_shows_its_line_and_nothing_of_ours(tmp_path):
    (tmp_path / "train.py").write_text("x = (\n")
    done = program(tmp_path / "train.py")
    assert done.returncode == 1
    assert "train.py" in done.stderr
    assert "SyntaxError" in done.stderr
    assert "checkup.py" not in done.stderr


PACKAGE = {
    "__init__.py": "",
    "clipping.py": "import torch\n\n\ndef clip(params):\n"
    "    torch.nn.utils.clip_grad_norm_(params, 0.1)\n",
}
TRAINING = """
import sys

import torch

from {home}clipping import clip

net = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for _ in range(int(sys.argv[1])):
    optimizer.zero_grad()
    net(torch.ones(8, 4)).square().mean().backward()
    clip(net.parameters())
    optimizer.step()
"""


def written(folder, files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_a_module_is_run_as_python_would(tmp_path):
    written(tmp_path / "work", PACKAGE | {"train.py": TRAINING.format(home=".")})
    done = program("--steps", "3", "-m", "work.train", "9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "work.train was ended after step 3; backward() was called 3" in done.stdout
    assert "\nwork/clipping.py:5\n" in done.stdout


def test_a_module_that_is_not_there(tmp_path):
    done = program("-m", "work.train", cwd=tmp_path)
    assert done.returncode == 1
    assert "No module named 'work'" in done.stderr
    assert "gradclip" not in done.stderr
    assert "work.train failed with ImportError" in done.stdout


def test_a_module_that_is_no_program_shows_its_line_and_nothing_of_ours(tmp_path):
    (tmp_path / "train.py").write_text("x = (\n")
    done = program("-m", "train", cwd=tmp_path)
    assert done.returncode == 1
    assert "SyntaxError" in done.stderr
    assert "frozen" not in done.stderr
    assert "checkup.py" not in done.stderr


def test_a_script_that_is_not_there(tmp_path):
    done = program("train", cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no file train" in done.stderr


def test_packages_inside_the_folder_are_not_the_programs_own(tmp_path, monkeypatch):
    installed = tmp_path / ".venv"
    written(installed / "trainer", PACKAGE)
    monkeypatch.setattr(observing, "INSTALLED", installed)
    monkeypatch.syspath_prepend(installed)
    (tmp_path / "train.py").write_text(TRAINING.format(home="trainer."))
    ledger, ended = examine(Program(str(tmp_path / "train.py")), ["3"], 100)
    assert ended.error is None
    (line,) = lines_of(ledger)
    assert line.site == "trainer/clipping.py:5, from train.py:13"


def test_a_training_in_a_thread_ends_without_an_error(tmp_path):
    body = (SCRIPTS / "right" / "plain.py").read_text().replace("\n", "\n    ")
    script = f"def train():\n    {body}\n"
    script += (
        "import threading\nt = threading.Thread(target=train)\nt.start()\nt.join()\n"
    )
    (tmp_path / "train.py").write_text(script)
    done = program("--steps", "5", tmp_path / "train.py")
    assert "5 steps; 5 of them" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")
