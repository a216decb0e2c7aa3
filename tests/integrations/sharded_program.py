"""Train by Lightning on two processes, each of which holds half of the network.

`sharded_program.py FOLDER fsdp1|fsdp2|resumed`, started by torchrun.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from common import RULE, Net, batches, sgd
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from test_lightning import ELEMENTS, fit, module_for
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import gradclip as gc
from gradclip.integrations.lightning import GradientClipping


class FSDPOnCPU(FSDPStrategy):
    """Lightning refuses its own class without a GPU, and names no device to torch."""

    def _setup_model(self, model):
        device = torch.device("cpu")
        return FullyShardedDataParallel(model, device_id=device, **self.kwargs)


class Sharded(pl.LightningModule):
    def configure_model(self):
        self.net = Net()
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    @torch.no_grad()
    def on_fit_start(self):
        if self.trainer.ckpt_path:
            return
        # Lightning has drawn the weights anew.
        for p, whole in zip(self.net.parameters(), Net().parameters(), strict=True):
            assert isinstance(p, DTensor)
            p.copy_(distribute_tensor(whole, p.device_mesh, p.placements))

    def training_step(self, batch, _):
        return self.net(**batch)["loss"]

    def configure_optimizers(self):
        return sgd(self)


def make_strategy():
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    return ModelParallelStrategy(**sizes, process_group_backend="gloo")


if sys.argv[2] == "fsdp1":
    module = module_for(pl)
    strategy = FSDPOnCPU(process_group_backend="gloo")
else:
    module, strategy = Sharded(), make_strategy()
# Both see all batches, so that the mean of their gradients is the gradient.
options = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
folder, rule = Path(sys.argv[1]), RULE
if sys.argv[2] == "resumed":
    # Each process remembers its own elements, and one writes the checkpoint.
    rule = ELEMENTS
    saver = ModelCheckpoint(folder, "half", every_n_train_steps=37, save_top_k=-1)
    first = options | {"enable_checkpointing": True, "max_steps": 37}
    fit(module, [GradientClipping(rule), saver], **first)
    module, options["strategy"] = Sharded(), make_strategy()
    options |= {"data": batches(start=37), "ckpt_path": folder / "half.ckpt"}
# The first process writes it.
with gc.History(folder / "run.jsonl") as history:
    clipping = GradientClipping(rule, history)
    fit(module, clipping, **options)
assert clipping.tracked[0].clipper.names[0] == "net.body.0.weight"
