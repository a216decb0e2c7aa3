"""The clip of gradclip for Accelerate, which waits by itself."""

import torch
from accelerate import Accelerator

import gradclip as gc
from gradclip.integrations.accelerate import clip_
from gradclip.torch import Clipper

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(torch.randn(160, 4), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
clipper = Clipper(model, gc.Norm(0.1))
for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(batch).square().mean())
        clip_(accelerator, clipper)
        optimizer.step()
        optimizer.zero_grad()
