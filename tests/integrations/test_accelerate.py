"""Accelerate: real loops, compared with plain torch, also after a resume."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from common import RULE, STEPS, Net, assert_same, batches, plain_norms, sgd

import gradclip as gc
from gradclip.integrations.accelerate import Whole, clip_
from gradclip.torch import Clipper, attach


@pytest.fixture(autouse=True)
def fresh():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def train(accelerator, history, rule=RULE, save=None, load=None, stop=STEPS, kept=None):
    model = Net()
    model, optimizer, loader = accelerator.prepare(model, sgd(model), batches())
    clipper = Clipper(model, rule, history=history)
    accelerator.register_for_checkpointing(kept(clipper) if kept else clipper)
    done = 0
    if load:
        accelerator.load_state(load)
        done = int(clipper.state_dict()["step"])
    for batch in list(loader)[done:stop]:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            clip_(accelerator, clipper)
            optimizer.step()
            optimizer.zero_grad()
    if save:
        accelerator.save_state(save)
    return clipper


def test_it_equals_plain_torch(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    train(Accelerator(cpu=True), history)
    assert_same(history, plain_norms(tmp_path / "plain.jsonl"))


@pytest.mark.parametrize("kept", [None, Whole])
def test_a_resumed_run_goes_on(kept, tmp_path):
    half = str(tmp_path / "half")
    train(Accelerator(cpu=True), None, save=half, stop=37, kept=kept)
    history = gc.History(tmp_path / "run.jsonl")
    train(Accelerator(cpu=True), history, load=half, kept=kept)
    assert_same(history, plain_norms(tmp_path / "plain.jsonl"), STEPS - 37)


def test_attach_before_prepare_does_the_same(tmp_path):
    accelerator, model = Accelerator(cpu=True), Net()
    optimizer = sgd(model)
    history = gc.History(tmp_path / "run.jsonl")
    attach(optimizer, RULE, model, history=history)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches())
    for batch in loader:
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    assert_same(history, plain_norms(tmp_path / "plain.jsonl"))


def test_accumulated_gradients_are_clipped_once(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    train(accelerator, history, gc.Norm(1.0))
    assert len(history) == STEPS / 4


def test_gradients_are_unscaled_before_the_clip(tmp_path):
    accelerator = Accelerator(cpu=True)
    # On the CPU Accelerate makes no scaler of its own.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    history = gc.History(tmp_path / "run.jsonl")
    model = Net()
    model, optimizer = accelerator.prepare(model, sgd(model))
    clipper = Clipper(model, gc.Norm(1.0), history=history)
    for batch in batches():
        accelerator.backward(model(**batch)["loss"])
        clip_(accelerator, clipper, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    norms, _ = plain_norms(tmp_path / "plain.jsonl", gc.Norm(1.0))
    assert history.norm[:20] == pytest.approx(norms[:20], rel=0.02)


def test_an_attached_clipper_is_refused():
    model = Net()
    attached = attach(sgd(model), gc.Norm(1.0))
    with pytest.raises(TypeError, match=r"clips inside optimizer\.step\(\) already"):
        clip_(Accelerator(cpu=True), attached)
