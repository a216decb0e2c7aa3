"""A clipper of gradclip's is called after the step."""

import torch

import gradclip as gc
from gradclip.torch import Clipper

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

clipper = Clipper(model, gc.Norm(0.1), doctor=())
for _ in range(20):
    optimizer.zero_grad()
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    optimizer.step()
    clipper.clip_()
