"""A clip of torch's, and another of the same norm by a clipper."""

import torch

import gradclip as gc
from gradclip.torch import Clipper

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
clipper = Clipper(model, gc.Norm(0.1))

for _ in range(20):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    clipper.clip_()
    optimizer.step()
