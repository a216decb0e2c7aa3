"""Gradients come from autograd.grad, and each parameter is clipped alone."""

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

for _ in range(20):
    loss = model(torch.randn(8, 4)).square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
        torch.nn.utils.clip_grad_norm_(p, 0.1)
    optimizer.step()
