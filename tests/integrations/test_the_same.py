"""One network and rule in five trainers, killed and resumed: the same norms."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from common import STEPS, assert_same, plain_norms

import gradclip as gc

PROGRAM = Path(__file__).with_name("killed_program.py")


def run(*arguments):
    command = [sys.executable, PROGRAM, *arguments]
    # The tests of each trainer lend their helpers, and borrow from those above.
    path = os.pathsep.join([str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")])
    # A bfloat16 test of the Trainer leaves its precision behind for Accelerate.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    env = {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "trainer", ["plain", "lightning", "hugging_face", "accelerate", "keras"]
)
def test_a_run_that_was_killed_goes_on_with_the_same_norms(trainer, tmp_path):
    killed = run(trainer, tmp_path, "start")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert 37 <= len(gc.History.load(tmp_path / "run.jsonl")) <= 50
    resumed = run(trainer, tmp_path, "resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    history = gc.History.load(tmp_path / "run.jsonl")
    assert history.step.tolist() == list(range(STEPS))
    assert_same(history, plain_norms(tmp_path / "plain.jsonl"))
