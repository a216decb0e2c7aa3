"""The clip comes after each micro-batch, not once for their sum."""

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

for i in range(80):
    loss = model(torch.randn(8, 4)).square().mean() / 4
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    if i % 4 == 3:
        optimizer.step()
        optimizer.zero_grad()
