"""A clipper of gradclip's, and its own version of torch's function."""

import torch

import gradclip as gc
from gradclip.torch import Clipper, clip_grad_value_

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

clipper = Clipper(model, gc.EMA(warmup=2))
for _ in range(20):
    optimizer.zero_grad()
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    clipper.clip_()
    clip_grad_value_(model.parameters(), 0.1)
    optimizer.step()
