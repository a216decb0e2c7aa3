"""Numbers of the host on another device, without making the host wait for it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def sent(values: ArrayLike, device: torch.device) -> Tensor:
    """Return a vector of numbers on a device.

    A copy to CUDA makes the host wait; one that does not reads memory that may be gone
    when a graph is replayed. Numbers that are added to zeros go along with the call.
    """
    here = np.asarray(values)
    like = torch.from_numpy(here)
    if device.type == "cpu" or torch.compiler.is_compiling():
        return like.to(device)
    # Equal neighbours need one number: those of a mask, or of all rows of a tensor.
    starts = [0, *(np.flatnonzero(here[1:] != here[:-1]) + 1).tolist()]
    lengths = np.diff([*starts, len(here)]).tolist()
    found = torch.zeros(len(here), dtype=torch.float64, device=device)
    if len(here):
        torch._foreach_add_(found.split(lengths), here[starts].astype(float).tolist())
    return found.to(like.dtype)


class Sending:
    """An array namespace of torch whose `asarray` sends NumPy's arrays as `sent` does.

    Args:
        xp: The namespace that does all else.
    """

    def __init__(self, xp: Any) -> None:
        """Wrap a namespace."""
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        """Leave everything else to the namespace."""
        return getattr(self._xp, name)

    def asarray(self, x: Any, **options: Any) -> Any:
        """Return an array; one of NumPy is sent to the device that is named."""
        device = options.get("device")
        if isinstance(x, np.ndarray) and x.ndim == 1 and device is not None:
            return sent(x, device)
        return self._xp.asarray(x, **options)
