"""Activations are computed again inside backward, in a backward of its own."""

import torch
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

for _ in range(20):
    optimizer.zero_grad()
    x = torch.randn(8, 4, requires_grad=True)
    checkpoint(model, x, use_reentrant=True).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
