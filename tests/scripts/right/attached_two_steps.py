"""Two steps with the same gradients, each of which clips them itself."""

import torch

import gradclip as gc
from gradclip.torch import attach

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
attach(optimizer, gc.Norm(100.0), doctor=())

for _ in range(10):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    optimizer.step()
