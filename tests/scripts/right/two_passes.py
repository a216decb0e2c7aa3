"""Sharpness-aware: backward, move, backward again, clip, step."""

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

for _ in range(20):
    x = torch.randn(8, 4)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    with torch.no_grad():
        moves = [0.01 * p.grad for p in model.parameters()]
        torch._foreach_add_(list(model.parameters()), moves)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    with torch.no_grad():
        torch._foreach_sub_(list(model.parameters()), moves)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
