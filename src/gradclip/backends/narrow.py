"""Devices without float64, as Apple's: what is to be clipped goes through the host."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def lacks_float64(device: torch.device) -> bool:
    """Return whether norms cannot be taken on a device."""
    if device.type in ("cpu", "cuda", "meta") or torch.compiler.is_compiling():
        return False
    return _tried(device.type)


@functools.cache
def _tried(kind: str) -> bool:
    """Return whether float64 is refused by a kind of device; asked once."""
    try:
        torch.zeros((), dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):
        return True
    return False


def home(device: torch.device) -> torch.device:
    """Return where the memory of a clipper for tensors on a device lies."""
    return torch.device("cpu") if lacks_float64(device) else device


def at_home(tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors, or copies on the host where their device has no float64."""
    # Of many, the first is asked: a pass over all of them takes longer.
    if not tensors or tensors[0].is_cpu or not lacks_float64(tensors[0].device):
        return tensors
    return [t.cpu() for t in tensors]


def bring_back(leaves: Sequence[Tensor], origins: Sequence[Tensor]) -> None:
    """Copy what was clipped at home to where it came from."""
    if leaves is not origins:
        for leaf, origin in zip(leaves, origins, strict=True):
            origin.copy_(leaf)
