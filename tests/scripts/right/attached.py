"""gradclip's attach, with accumulation and loss scaling."""

import torch

import gradclip as gc
from gradclip.torch import attach

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

clipper = attach(optimizer, gc.ZScore(), model)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
for i in range(40):
    loss = model(torch.randn(8, 4)).square().mean() / 2
    scaler.scale(loss).backward()
    if i % 2:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
