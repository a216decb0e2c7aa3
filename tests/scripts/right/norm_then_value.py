"""Two kinds of clip, one after the other, and a norm that is only logged."""

import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

for _ in range(20):
    optimizer.zero_grad(set_to_none=False)
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    norm = clip_grad_norm_(model.parameters(), float("inf"))
    clip_grad_norm_(model.parameters(), 0.1)
    clip_grad_value_(model.parameters(), 0.05)
    optimizer.step()
    clip_grad_norm_(model.parameters(), float("inf"))
