"""DeepSpeed's ZeRO on the CPU: real runs, compared with plain torch."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import STEPS, assert_same, plain_norms

import gradclip as gc
from gradclip.integrations.deepspeed import attach

PROGRAM = Path(__file__).with_name("deepspeed_program.py")


def alone():
    """Return the environment of a process that is the only one of its group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, **one, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def train(stage, path, checkpoint, start=0, stop=STEPS):
    arguments = map(str, (stage, path, checkpoint, start, stop))
    done = subprocess.run(
        [sys.executable, PROGRAM, *arguments],
        env=alone(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_equals_plain_torch(stage, tmp_path):
    train(stage, tmp_path / "run.jsonl", tmp_path / "out")
    history = gc.History.load(tmp_path / "run.jsonl")
    assert_same(history, plain_norms(tmp_path / "plain.jsonl"))


def test_a_resumed_run_goes_on(tmp_path):
    train(2, tmp_path / "first.jsonl", tmp_path / "out", stop=37)
    train(2, tmp_path / "run.jsonl", tmp_path / "out", start=37)
    history = gc.History.load(tmp_path / "run.jsonl")
    assert_same(history, plain_norms(tmp_path / "plain.jsonl"), STEPS - 37)


def engine(clip=0.0, stage=2, **verbs):
    return SimpleNamespace(
        gradient_clipping=lambda: clip,
        zero_optimization_stage=lambda: stage,
        optimizer=SimpleNamespace(**(verbs or {"unscale_and_clip_grads": print})),
    )


def lacking(setting):
    settings = {"dtype": torch.bfloat16, setting: False}
    return engine(unscale_and_clip_grads=print, **settings)


def offloading(attribute):
    return engine(stage=3, unscale_and_clip_grads=print, **{attribute: True})


@pytest.mark.parametrize(
    ("engine", "rule", "message"),
    [
        (engine(clip=1.0), gc.Norm(1.0), '"gradient_clipping": 0'),
        (engine(stage=0), gc.Norm(1.0), "use gradclip.torch.attach(optimizer, rule)"),
        (engine(stage=1, step=print), gc.Norm(1.0), 'leave "grad_accum_dtype" out'),
        (lacking("compute_grad_norm"), gc.Norm(1.0), "no norm to clip by; leave it"),
        (offloading("superoffload_cpu_optimizer"), gc.Norm(1.0), "during backward()"),
        (offloading("zenflow"), gc.Norm(1.0), "in a way of its own at stage 3"),
        (lacking("check_grad_overflow"), gc.Norm(1.0), "makes steps of NaN"),
        (engine(), gc.Value(1.0), "one number per step"),
        (engine(), gc.EMA(), "one number per step"),
        (engine(), gc.Normalize(), "one number per step"),
        (engine(), gc.Skip(gc.Norm(1.0)), "one number per step"),
    ],
)
def test_what_cannot_be_done_is_refused(engine, rule, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attach(engine, rule)


def test_an_engine_has_one_clipper_and_its_own_limit_back():
    seen, going = [], engine()
    going.global_steps = 0
    own = going.optimizer = SimpleNamespace(loss_scale=1.0, clip_grad=0.0)
    own.unscale_and_clip_grads = lambda group, norm: seen.append(own.clip_grad)
    clipper = attach(going, gc.Norm(0.5))
    with pytest.raises(ValueError, match="this engine has a clipper already"):
        attach(going, gc.Norm(0.1))
    own.unscale_and_clip_grads([], 3.0)
    # A checkpoint of the engine would keep what is set behind the step.
    assert seen == [0.5]
    assert own.clip_grad == 0
    clipper.detach()
    attach(going, gc.Norm(0.1))
    clipper.detach()
    going.global_steps = 1
    own.unscale_and_clip_grads([], 3.0)
    assert seen == [0.5, pytest.approx(0.1)]


def test_the_step_after_a_loaded_one_is_decided():
    """The engine goes back to the number of a step that was decided before."""
    going = engine()
    going.global_steps = 5
    going.optimizer = SimpleNamespace(
        loss_scale=1.0, unscale_and_clip_grads=lambda group, norm: None
    )
    clipper = attach(going, gc.Percentile(50.0))
    going.optimizer.unscale_and_clip_grads([], 1.0)
    saved = clipper.state_dict()
    going.optimizer.unscale_and_clip_grads([], 1.0)
    assert int(clipper.state_dict()["step"]) == 1  # another group of the same step
    clipper.load_state_dict(saved)
    going.optimizer.unscale_and_clip_grads([], 3.0)
    assert int(clipper.state_dict()["step"]) == 2
    assert float(clipper.info.norm) == 3.0
