"""The loss scale is taken out first; some steps overflow and are skipped."""

import torch

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-20)
for _ in range(30):
    optimizer.zero_grad()
    loss = 1e6 * model(torch.randn(8, 4)).square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
