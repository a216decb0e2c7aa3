"""One backward pass, two optimizers, each with a clip of its own."""

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
first = torch.optim.SGD(model[0].parameters(), lr=0.1)
second = torch.optim.Adam(model[2].parameters())
for _ in range(20):
    first.zero_grad()
    second.zero_grad()
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model[0].parameters(), 0.1)
    first.step()
    torch.nn.utils.clip_grad_norm_(model[2].parameters(), 0.1)
    second.step()
