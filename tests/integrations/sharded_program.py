"""Train by Lightning on two processes, each of which holds half of the network.

`sharded_program.py FOLDER fsdp1|fsdp2`, started by torchrun.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from common import RULE, Net, sgd
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from test_lightning import fit, module_for
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
        # Lightning has drawn the weights anew.
        for p, whole in zip(self.net.parameters(), Net().parameters(), strict=True):
            assert isinstance(p, DTensor)
            p.copy_(distribute_tensor(whole, p.device_mesh, p.placements))

    def training_step(self, batch, _):
        return self.net(**batch)["loss"]

    def configure_optimizers(self):
        return sgd(self)


if sys.argv[2] == "fsdp1":
    module = module_for(pl)
    strategy = FSDPOnCPU(process_group_backend="gloo")
else:
    module = Sharded()
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    strategy = ModelParallelStrategy(**sizes, process_group_backend="gloo")
# Both see all batches, so that the mean of their gradients is the gradient.
options = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
# The first process writes it.
with gc.History(Path(sys.argv[1]) / "run.jsonl") as history:
    clipping = GradientClipping(RULE, history)
    fit(module, clipping, **options)
assert clipping.tracked[0].clipper.names[0] == "net.body.0.weight"
