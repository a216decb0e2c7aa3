"""One head is trained at a time; the loop clips every part, also the idle one."""

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
heads = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2))
optimizer = torch.optim.SGD([*model.parameters(), *heads.parameters()], lr=0.1)
for i in range(20):
    optimizer.zero_grad()
    heads[i % 2](model(torch.randn(8, 4))).square().mean().backward()
    for part in (model, *heads):
        torch.nn.utils.clip_grad_norm_(part.parameters(), 0.1)
    optimizer.step()
