"""Hugging Face's Trainer and TRL's: real runs, compared with plain torch."""

import json
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import BATCH, RATE, RULE, STEPS, Data, Net, assert_same, plain_norms
from datasets import Dataset as Rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import gradclip as gc
from gradclip.integrations.transformers import GradientClippingCallback


class InOrder(Trainer):
    """The batches in their own order, and the optimizer of the other trainers."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def create_optimizer(self, *_):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=0.5)
        return self.optimizer


def trainer_for(out, callback, **options):
    arguments = {
        "max_grad_norm": 0,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    args = TrainingArguments(str(out), **(arguments | options))
    return InOrder(Net(), args, train_dataset=Data(), callbacks=[callback])


def test_it_equals_plain_torch(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    trainer_for(tmp_path / "out", GradientClippingCallback(RULE, history)).train()
    assert_same(history, plain_norms(tmp_path / "plain.jsonl"))


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("rule", [RULE, gc.Percentile(q=50.0)], ids=repr)
def test_a_resumed_run_goes_on(rule, restored, tmp_path):
    out = tmp_path / "out"
    saving = {"save_strategy": "steps", "save_steps": 37}
    trainer_for(out, GradientClippingCallback(rule), max_steps=37, **saving).train()
    path = tmp_path / "run.jsonl"
    again = trainer_for(
        out,
        GradientClippingCallback(rule, str(path)),
        restore_callback_states_from_checkpoint=restored,
    )
    again.train(resume_from_checkpoint=str(out / "checkpoint-37"))
    if restored:
        # Hugging Face replaced the callback by the saved one, which had no history.
        callback = again.callback_handler.callbacks[-1]
        assert callback.rule == rule
        assert int(callback.tracked.clipper.state_dict()["step"]) == STEPS
    else:
        history = gc.History.load(path)
        assert_same(history, plain_norms(tmp_path / "plain.jsonl", rule), STEPS - 37)


def test_another_rule_begins_anew_where_that_is_asked(tmp_path):
    out = tmp_path / "out"
    saving = {"save_strategy": "steps", "save_steps": 37}
    trainer_for(out, GradientClippingCallback(RULE), max_steps=37, **saving).train()
    half = str(out / "checkpoint-37")
    refused = trainer_for(out, GradientClippingCallback(gc.EMA()))
    with pytest.raises(ValueError, match=r"GradientClippingCallback\(rule, resume=F"):
        refused.train(resume_from_checkpoint=half)
    callback = GradientClippingCallback(gc.EMA(), resume=False)
    trainer_for(out, callback).train(resume_from_checkpoint=half)
    assert int(callback.tracked.clipper.state_dict()["step"]) == STEPS - 37
    assert callback.state()["args"].get("resume") is None


def test_it_logs(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": STEPS}
    callback = GradientClippingCallback(gc.Norm(1.0))
    trainer = trainer_for(tmp_path / "out", callback, **saving)
    trainer.train()
    saved = tmp_path / "out" / f"checkpoint-{STEPS}" / "trainer_state.json"
    logs = [x for x in json.loads(saved.read_text())["log_history"] if "loss" in x]
    norms, _ = plain_norms(tmp_path / "plain.jsonl", gc.Norm(1.0))
    assert [x["grad_norm"] for x in logs] == pytest.approx(norms[9::10], rel=1e-5)
    assert {x["grad_limit"] for x in logs} == {1.0}
    assert logs[-1]["clip_rate"] == pytest.approx((norms > 1).mean())


def test_accumulated_gradients_are_clipped_once(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    callback = GradientClippingCallback(gc.Norm(1.0), history)
    trainer_for(tmp_path / "out", callback, gradient_accumulation_steps=4).train()
    assert len(history) == STEPS / 4


def test_bfloat16_autocast(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    callback = GradientClippingCallback(gc.Norm(1.0), history)
    trainer_for(tmp_path / "out", callback, bf16=True).train()
    norms, _ = plain_norms(tmp_path / "plain.jsonl", gc.Norm(1.0))
    assert history.norm[:10] == pytest.approx(norms[:10], rel=0.05)


def test_a_step_that_is_not_finite_is_skipped(tmp_path):
    callback = GradientClippingCallback(gc.Norm(1.0))
    trainer = trainer_for(tmp_path / "out", callback)
    trainer.train_dataset.x[BATCH * 50] = torch.nan
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert int(callback.tracked.clipper.info.skipped) == 1


def test_clipping_twice_is_refused(tmp_path):
    message = re.escape("TrainingArguments(max_grad_norm=1.0) clips too; set")
    trainer = trainer_for(
        tmp_path / "out", GradientClippingCallback(RULE), max_grad_norm=1.0
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_options_that_json_cannot_hold_do_not_stop_a_checkpoint(tmp_path):
    out, saving = tmp_path / "out", {"save_strategy": "steps", "save_steps": 2}
    options = {
        "on_nonfinite": "zero",
        "doctor": {"rate"},
        "split_over": lambda n, p: None,
    }
    callback = GradientClippingCallback(gc.ZScore(), **options)
    trainer_for(out, callback, max_steps=2, **saving).train()
    again = trainer_for(
        out,
        GradientClippingCallback(gc.ZScore()),
        max_steps=4,
        restore_callback_states_from_checkpoint=True,
    )
    again.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    restored = again.callback_handler.callbacks[-1]
    assert restored.options == {"on_nonfinite": "zero"}
    assert int(restored.tracked.clipper.state_dict()["step"]) == 4


def test_two_callbacks_are_refused(tmp_path):
    trainer = trainer_for(tmp_path / "out", GradientClippingCallback(gc.Value(1.0)))
    trainer.add_callback(GradientClippingCallback(gc.Norm(1.0)))
    with pytest.raises(ValueError, match=re.escape("use one, with chain(a, b)")):
        trainer.train()


def test_a_memory_as_large_as_the_gradients_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("gradclip.integrations.tracking.LARGE", 40)
    callback, out = GradientClippingCallback(gc.Moment()), tmp_path / "out"
    with pytest.warns(UserWarning, match="as text in trainer_state"):
        trainer_for(out, callback, max_steps=1, save_strategy="steps").train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer_for(out, callback, max_steps=1).train()


def test_the_optimizer_is_left_as_it_was(tmp_path):
    trainer = trainer_for(tmp_path / "out", GradientClippingCallback(RULE), max_steps=2)
    trainer.train()
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def words():
    """Return a tokenizer that was made here, since nothing may be fetched."""
    known = {word: i for i, word in enumerate(("<pad>", "<eos>", "a", "b", "c", "d"))}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def test_trl_works_the_same(tmp_path):
    sizes = {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=6, **sizes))
    args = SFTConfig(
        str(tmp_path / "out"),
        max_grad_norm=0,
        max_steps=6,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    history = gc.History(tmp_path / "run.jsonl")
    callback = GradientClippingCallback(gc.Norm(0.1), history)
    rows = Rows.from_dict({"text": ["a b c d a", "b c d a", "c d", "d a b c"] * 12})
    trainer = SFTTrainer(
        model, args, train_dataset=rows, processing_class=words(), callbacks=[callback]
    )
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert [x["grad_norm"] for x in logs] == pytest.approx(history.norm, rel=1e-6)
    assert logs[-1]["clip_rate"] == 1.0


def limits_of(trainer, history):
    """Train once more, and return the limits of that training."""
    before = len(history)
    trainer.train()
    return history.limit[before:].tolist()


def test_a_second_training_begins_anew(tmp_path):
    """As the trials of a search do; the trainer hands back the states of the first."""
    history = gc.History(tmp_path / "run.jsonl")
    callback = GradientClippingCallback(gc.Percentile(), history)
    trainer = trainer_for(tmp_path / "out", callback, max_steps=20)
    trainer.model_init = lambda trial=None: Net()
    first, second = limits_of(trainer, history), limits_of(trainer, history)
    assert first == second
    assert int(callback.tracked.clipper.state_dict()["step"]) == 20
    assert len(history.runs) == 2


def test_one_callback_for_two_models_in_turn(tmp_path):
    callback = GradientClippingCallback(gc.EMA())
    trainer_for(tmp_path / "a", callback, max_steps=5).train()
    other = trainer_for(tmp_path / "b", callback, max_steps=5)
    other.model.body[2].bias = None
    other.train()
    assert len(callback.tracked.clipper.params) == 3


def test_a_restored_callback_keeps_its_history(tmp_path):
    out, path = tmp_path / "out", tmp_path / "run.jsonl"
    saving = {"save_strategy": "steps", "save_steps": 20}
    saving["restore_callback_states_from_checkpoint"] = True
    for stop in (20, 40):
        history = gc.History(path, run={"lr": RATE}, tensors_every=5)
        callback = GradientClippingCallback(RULE, history)
        trainer = trainer_for(out, callback, max_steps=stop, **saving)
        checkpoint = str(out / "checkpoint-20") if stop == 40 else None
        trainer.train(resume_from_checkpoint=checkpoint)
    record = gc.History.load(path).recorded
    assert record.step.tolist() == list(range(40))
    assert record.facts == {"lr": RATE}
    assert record.tensors.step.tolist() == list(range(0, 40, 5))


def test_the_path_of_a_history_may_be_a_path(tmp_path):
    callback = GradientClippingCallback(RULE, tmp_path / "run.jsonl")
    trainer_for(tmp_path / "out", callback, max_steps=5).train()
    assert len(gc.History.load(tmp_path / "run.jsonl")) == 5


@pytest.mark.parametrize("at", ["training", "resuming"])
def test_a_schedule_cannot_be_restored_and_says_so(tmp_path, at):
    callback = GradientClippingCallback(gc.Norm(lambda step: 1.0))
    restoring = {"restore_callback_states_from_checkpoint": True}
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}
    message = "Leave out restore_callback_states_from_checkpoint"
    if at == "training":
        trainer = trainer_for(tmp_path, callback, **saving, **restoring)
        with pytest.raises(ValueError, match=message):
            trainer.train()
        return
    trainer_for(tmp_path, callback, **saving).train()
    trainer = trainer_for(tmp_path, callback, **saving, **restoring)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_the_log_tells_the_limit_that_was_in_force(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": STEPS, "logging_steps": 1}
    history = gc.History(tmp_path / "run.jsonl")
    callback = GradientClippingCallback(gc.Norm(0.5), history)
    trainer_for(tmp_path / "out", callback, **saving).train()
    log = gc.History.load(tmp_path / "out" / f"checkpoint-{STEPS}")
    assert log.limit.tolist() == history.limit.tolist() == [0.5] * STEPS
    assert log.scale == pytest.approx(history.scale, rel=1e-5)
    assert gc.advise(log).in_force == 0.5


def test_a_checkpoint_holds_whatever_a_history_was_told(tmp_path):
    told = {"data": tmp_path, "rate": torch.tensor(0.5)}
    history = gc.History(tmp_path / "run.jsonl", run=told, flush_every=np.int64(10))
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}
    trainer_for(tmp_path, GradientClippingCallback(RULE, history), **saving).train()
    saved = json.loads((tmp_path / "checkpoint-5/trainer_state.json").read_text())
    kept = saved["stateful_callbacks"]["GradientClippingCallback"]["args"]["history"]
    assert kept["run"] == {"data": str(tmp_path), "rate": 0.5}
    assert kept["flush_every"] == 10


def test_deepspeed_that_accelerate_brings_in_is_refused():
    class DeepSpeedZeroOptimizer:
        pass

    wrapper = SimpleNamespace(optimizer=DeepSpeedZeroOptimizer())
    args = SimpleNamespace(max_grad_norm=0, deepspeed=None)
    callback = GradientClippingCallback(gc.Norm(1.0))
    with pytest.raises(ValueError, match=r"use gradclip\.integrations\.deepspeed"):
        callback.on_train_begin(args, None, None, optimizer=wrapper)
