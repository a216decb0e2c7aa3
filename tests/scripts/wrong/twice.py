"""The gradients are clipped by a helper, and clipped again."""

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def train_step(loss):
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


for _ in range(20):
    train_step(model(torch.randn(8, 4)).square().mean())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
