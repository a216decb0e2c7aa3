"""A clipper of gradclip's is called before the loss scale is taken out."""

import torch

import gradclip as gc
from gradclip.torch import Clipper

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

clipper = Clipper(model, gc.ZScore(), doctor=())
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
for _ in range(20):
    optimizer.zero_grad()
    loss = model(torch.randn(8, 4)).square().mean()
    scaler.scale(loss).backward()
    clipper.clip_()
    scaler.step(optimizer)
    scaler.update()
