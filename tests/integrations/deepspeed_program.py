"""Train with a ZeRO stage and print the norms; a process of its own for each run."""

import sys

import deepspeed
import deepspeed.comm.torch
import torch
from common import BATCH, RULE, Net, batches, sgd

import gradclip as gc
from gradclip.integrations.deepspeed import attach

stage, path, checkpoint, start, stop = sys.argv[1:]
torch.set_num_threads(1)
# It would compile an extension for the CPU, which takes minutes.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
deepspeed.init_distributed("gloo")
model = Net()
config = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_clipping": 0,
    "zero_optimization": {"stage": int(stage)},
    "zero_allow_untested_optimizer": True,
}
engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
clipper = attach(engine, RULE, gc.History(path))
if int(start):
    _, client = engine.load_checkpoint(checkpoint)
    clipper.load_state_dict(client["gradclip"])
for i, batch in enumerate(batches()):
    if int(start) <= i < int(stop):
        engine.backward(engine(**batch)["loss"])
        engine.step()
        assert abs(float(engine.get_global_grad_norm()) / clipper.info.norm - 1) < 1e-6
clipper.history.flush()
# Otherwise an engine that loads this would clip by it, whatever its config says.
assert engine.optimizer.clip_grad == 0
state = {"gradclip": clipper.state_dict()}
engine.save_checkpoint(checkpoint, client_state=state)
