"""Lightning: real fits, compared with plain torch, also after a resume."""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from common import RULE, STEPS, Net, assert_same, batches, plain_norms, sgd
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision, Precision

import gradclip as gc
from gradclip.integrations.lightning import GradientClipping
from gradclip.integrations.tracking import Tracked

ELEMENTS = gc.Moment(2.0, warmup=5)
"""A rule with a memory as large as the network."""


def module_for(pl, optimizers=1, manual=False, make=sgd):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.automatic_optimization = not manual

        def training_step(self, batch, _):
            loss = self.net(**batch)["loss"]
            if not manual:
                return loss
            for optimizer in self.several():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.several():
                optimizer.step()
            return None

        def several(self):
            found = self.optimizers()
            return found if isinstance(found, list) else [found]

        def configure_optimizers(self):
            if optimizers == 1:
                return make(self)
            return [make(self.net.body[0]), make(self.net.body[2])]

    return Module()


class Killed(Callback):
    """The end of a run that nobody planned."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.at:
            raise RuntimeError("killed")


def fit(module, callbacks, pl=lightning.pytorch, ckpt_path=None, **options):
    data = options.pop("data", batches())
    options = {"logger": False, "enable_checkpointing": False} | options
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks if isinstance(callbacks, list) else [callbacks],
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("pl", [lightning.pytorch, pytorch_lightning])
def test_it_equals_plain_torch(pl, manual, tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    fit(module_for(pl, manual=manual), GradientClipping(RULE, history), pl)
    assert_same(history, plain_norms(tmp_path / "plain.jsonl"))


def in_two_processes(kind, folder):
    program = Path(__file__).with_name("sharded_program.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, program, folder, kind]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return gc.History.load(folder / "run.jsonl")


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_a_network_in_two_halves(kind, tmp_path):
    history = in_two_processes(kind, tmp_path)
    assert_same(history, plain_norms(tmp_path / "plain.jsonl"))


def test_each_half_goes_on_with_its_own_memory(tmp_path):
    history = in_two_processes("resumed", tmp_path)
    assert_same(history, plain_norms(tmp_path / "plain.jsonl", ELEMENTS), STEPS - 37)


def test_a_resumed_run_goes_on(tmp_path):
    saver = ModelCheckpoint(tmp_path, "half", every_n_train_steps=37, save_top_k=-1)
    callbacks = [GradientClipping(RULE), saver, Killed(at=50)]
    with pytest.raises(RuntimeError, match="killed"):
        fit(module_for(lightning.pytorch), callbacks, enable_checkpointing=True)
    history = gc.History(tmp_path / "run.jsonl")
    # Lightning counts on from the batch it was at, and begins with the first one.
    options = {"data": batches(start=37), "ckpt_path": tmp_path / "half.ckpt"}
    again = GradientClipping(RULE, history)
    fit(module_for(lightning.pytorch), again, **options)
    assert_same(history, plain_norms(tmp_path / "plain.jsonl"), STEPS - 37)
    assert history.step[0] == 37


def test_it_logs(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10)
    callback = GradientClipping(gc.Norm(1.0))
    fit(module_for(lightning.pytorch), callback, logger=logger, log_every_n_steps=10)
    found = gc.History.load(tmp_path / "lightning_logs/version_0/metrics.csv")
    norms, _ = plain_norms(tmp_path / "plain.jsonl", gc.Norm(1.0))
    assert found.norm.tolist() == pytest.approx(norms[9::10], rel=1e-5)
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert {"clip_rate", "grad_norm", "grad_limit"} <= set(
        text.splitlines()[0].split(",")
    )


def test_accumulated_gradients_are_clipped_once(tmp_path):
    history = gc.History(tmp_path / "run.jsonl")
    callback = GradientClipping(gc.Norm(1.0), history)
    fit(module_for(lightning.pytorch), callback, accumulate_grad_batches=4)
    assert len(history) == STEPS / 4


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling(manual, fused, tmp_path):
    def make(module):
        return torch.optim.SGD(module.parameters(), lr=0.05, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10**6)
    history = gc.History(tmp_path / "run.jsonl")
    module = module_for(lightning.pytorch, manual=manual, make=make)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module, GradientClipping(gc.Norm(1.0), history), plugins=[plugin])
    exact = gc.History(tmp_path / "exact.jsonl")
    module = module_for(lightning.pytorch, manual=manual, make=make)
    fit(module, GradientClipping(gc.Norm(1.0), exact))
    # In half precision, but not 256 times as large.
    assert history.norm[:20] == pytest.approx(exact.norm[:20], rel=0.02)


def test_several_optimizers(tmp_path):
    histories = [gc.History(tmp_path / f"{i}.jsonl") for i in range(2)]
    callback = GradientClipping(gc.Norm(1.0), histories)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10)
    module = module_for(lightning.pytorch, optimizers=2, manual=True)
    fit(module, callback, logger=logger, log_every_n_steps=10)
    assert [len(history) for history in histories] == [STEPS, STEPS]
    assert histories[0].norm[0] != histories[1].norm[0]
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert "grad_norm/0" in text
    assert "clip_rate/1" in text


def test_one_history_for_two_optimizers_is_refused(tmp_path):
    callback = GradientClipping(gc.Norm(1.0), gc.History(tmp_path / "run.jsonl"))
    with pytest.raises(ValueError, match="1 histories for 2 optimizers"):
        fit(module_for(lightning.pytorch, optimizers=2, manual=True), callback)


def test_clipping_twice_is_refused():
    message = re.escape("Trainer(gradient_clip_val=1.0) clips too; leave it out")
    with pytest.raises(ValueError, match=message):
        fit(
            module_for(lightning.pytorch),
            GradientClipping(RULE),
            gradient_clip_val=1.0,
        )


def test_a_second_fit_is_clipped_once():
    module, callback = module_for(lightning.pytorch), GradientClipping(gc.Norm(1.0))
    optimizer = sgd(module)
    module.configure_optimizers = lambda: optimizer
    for _ in range(2):
        trainer = fit(module, callback, max_steps=3)
        assert len(optimizer._optimizer_step_pre_hooks) == 0
        assert trainer.global_step == 3


def steps_in(checkpoint):
    saved = torch.load(checkpoint, weights_only=False)["callbacks"]["GradientClipping"]
    return {i: int(state["step"]) for i, state in saved.items()}


def test_a_checkpoint_that_was_loaded_for_a_test_is_not_gone_on_from(tmp_path):
    clipping, module = GradientClipping(RULE), module_for(lightning.pytorch)
    module.test_step = lambda *_: None
    first = fit(module, clipping)
    first.save_checkpoint(tmp_path / "first.ckpt")
    first.test(module, batches(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    fit(module_for(lightning.pytorch), clipping)
    assert [int(x.clipper.state_dict()["step"]) for x in clipping.tracked] == [STEPS]


@pytest.mark.parametrize("how", ["nothing left to train", "validation"])
def test_what_was_loaded_is_saved_again(tmp_path, how):
    module = module_for(lightning.pytorch)
    module.validation_step = lambda *_: None
    fit(module, GradientClipping(RULE)).save_checkpoint(tmp_path / "first.ckpt")
    if how == "validation":
        again = lightning.pytorch.Trainer(
            callbacks=[GradientClipping(RULE)], logger=False, accelerator="cpu"
        )
        again.validate(module, batches(), ckpt_path=tmp_path / "first.ckpt")
    else:
        options = {"ckpt_path": tmp_path / "first.ckpt"}
        again = fit(module, GradientClipping(RULE), **options)
    again.save_checkpoint(tmp_path / "second.ckpt")
    assert steps_in(tmp_path / "second.ckpt") == {"0": STEPS}


@pytest.mark.parametrize("manual", [False, True])
def test_a_module_that_clips_by_itself_is_refused(manual):
    module = module_for(lightning.pytorch, manual=manual)
    if manual:
        step = module.manual_backward
        module.manual_backward = lambda loss: (
            step(loss),
            module.clip_gradients(module.several()[0], gradient_clip_val=0.1),
        )
    else:
        module.configure_gradient_clipping = lambda optimizer, *_, **__: (
            module.clip_gradients(optimizer, gradient_clip_val=0.1)
        )
    with pytest.raises(ValueError, match=r"clip_gradients\(…, 0.1\) clips too"):
        fit(module, GradientClipping(RULE))


class Wordy(Precision):
    """A plugin whose methods have a signature of their own."""

    def clip_gradients(self, optimizer, value=0.0, kind=None):
        super().clip_gradients(optimizer, value)


def test_a_trainer_is_left_as_it_was():
    plugin = Wordy()
    calls = plugin.clip_grad_by_value = lambda *_: None
    callbacks = [GradientClipping(RULE), Killed(at=5)]
    with pytest.raises(RuntimeError, match="killed"):
        fit(module_for(lightning.pytorch), callbacks, plugins=[plugin])
    assert vars(plugin) == {"clip_grad_by_value": calls}
    fit(module_for(lightning.pytorch), [], plugins=[plugin], gradient_clip_val=1.0)


def test_a_run_that_failed_leaves_nothing_in_the_optimizer(tmp_path):
    module, path = module_for(lightning.pytorch), tmp_path / "run.jsonl"
    optimizer = sgd(module)
    module.configure_optimizers = lambda: optimizer
    history = gc.History(path)
    with pytest.raises(RuntimeError, match="killed"):
        fit(module, [GradientClipping(RULE, history), Killed(at=5)])
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert len(gc.History.load(path)) == 5


def test_a_test_that_failed_leaves_no_checkpoint_to_go_on_from(tmp_path):
    clipping, module = GradientClipping(RULE), module_for(lightning.pytorch)
    module.test_step = lambda *_: 1 / 0
    first = fit(module, clipping)
    first.save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(ZeroDivisionError):
        first.test(module, batches(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    fit(module_for(lightning.pytorch), clipping)
    assert [int(x.clipper.state_dict()["step"]) for x in clipping.tracked] == [STEPS]


def test_a_plugin_can_be_pickled_while_it_is_watched():
    class Sent(Callback):
        def on_train_batch_end(self, trainer, *_):
            pickle.loads(pickle.dumps(trainer.precision_plugin))

    fit(module_for(lightning.pytorch), [GradientClipping(RULE), Sent()])


def test_it_is_a_callback_of_both_packages_whichever_comes_first():
    program = (
        "from gradclip.integrations.lightning import GradientClipping\n"
        "import lightning.pytorch, pytorch_lightning\n"
        "for package in (lightning.pytorch, pytorch_lightning):\n"
        "    assert issubclass(GradientClipping, package.Callback)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def by_lbfgs(module):
    return torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=10)


def test_the_clip_rate_is_that_of_steps_and_not_of_evaluations():
    callback = GradientClipping(gc.Norm(1e-3))
    trainer = fit(module_for(lightning.pytorch, make=by_lbfgs), callback, max_steps=20)
    assert callback.tracked[0].clipper._memory.step > 2 * trainer.global_step
    assert callback.tracked[0].metrics()["clip_rate"] == 1.0


def test_a_copy_counts_as_the_original_does():
    net = Net()
    tracked = Tracked(sgd(net), gc.Norm(1e-3), doctor=())
    net, tracked = copy.deepcopy((net, tracked))
    for batch in list(batches())[:3]:
        net(**batch)["loss"].backward()
        tracked.clipper.optimizer.step()
    assert tracked.metrics()["clip_rate"] == 1.0
    tracked.detach()
    assert not copy.deepcopy(tracked).clipper._hooks


def test_a_checkpoint_of_more_optimizers_is_refused():
    callback = GradientClipping(gc.ZScore())
    fit(module_for(lightning.pytorch, optimizers=2, manual=True), callback)
    again = GradientClipping(gc.ZScore())
    again.load_state_dict(callback.state_dict())
    with pytest.raises(ValueError, match="memory of 2 optimizers, and there are 1"):
        fit(module_for(lightning.pytorch), again)


def test_another_rule_begins_anew_where_that_is_asked():
    callback = GradientClipping(gc.Norm(1.0))
    fit(module_for(lightning.pytorch), callback)
    for resume in (True, False):
        again = GradientClipping(gc.ZScore(), resume=resume)
        again.load_state_dict(callback.state_dict())
        if resume:
            with pytest.raises(ValueError, match=r"GradientClipping\(rule, resume=F"):
                fit(module_for(lightning.pytorch), again)
        else:
            fit(module_for(lightning.pytorch), again)
            assert int(again.tracked[0].clipper.state_dict()["step"]) == STEPS


def test_counts_of_earlier_checkpoints_are_those_of_the_clipper():
    tracked = [Tracked(sgd(Net()), gc.Norm(1.0), doctor=()) for _ in "ab"]
    state = tracked[0].state_dict()
    del state["counted"]
    tracked[1].load_state_dict(state | {"step": torch.tensor(7)})
    assert tracked[1].steps == 7
