"""DistributedDataParallel, which reduces the gradients of the last micro-batch."""

import torch
import torch.distributed as dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(20):
    optimizer.zero_grad()
    with model.no_sync():
        model(torch.randn(8, 4)).square().mean().backward()
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    dist.all_reduce(norm)
    optimizer.step()
dist.destroy_process_group()
