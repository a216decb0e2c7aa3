"""Clip a model that FSDP2 has split: torchrun --nproc-per-node 2 examples/fsdp2.py."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

import gradclip as gc
from gradclip.torch import attach


def main() -> None:
    """Train for five steps on the CPU, and print each norm once."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
    )
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    clipper = attach(optimizer, gc.Norm(1.0), model=model)  # the only line for clipping

    torch.manual_seed(dist.get_rank())
    for step in range(5):
        x = torch.randn(16, 8) * (100 if step == 3 else 1)
        optimizer.zero_grad()
        (model(x) + x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        if dist.get_rank() == 0:
            info = clipper.info
            print(f"step {step}: norm {float(info.norm):.4g}, scale {info.scale:.4g}")
    # Leave together: gloo may abort a process whose peer is gone already.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
