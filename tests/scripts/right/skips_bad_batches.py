"""A batch whose norm is not finite is left out."""

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

for i in range(25):
    optimizer.zero_grad()
    x = torch.randn(8, 4) * (float("inf") if i % 5 == 2 else 1)
    model(x).square().mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    if norm.isfinite():
        optimizer.step()
