"""The clip comes before a step whose closure computes the gradients anew."""

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
x = torch.randn(8, 4)


def closure():
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss


for _ in range(20):
    closure()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step(closure)
