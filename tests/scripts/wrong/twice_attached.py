"""A clip of torch's, and another of the same norm by the step itself."""

import torch

import gradclip as gc
from gradclip.torch import attach

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
attach(optimizer, gc.Norm(0.1))

for _ in range(20):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()  # clips, too
