"""PyTorch tensors in pure functions; in place, `gradclip.torch.verbs` has more."""

import numpy as np

from gradclip.backends.base import Backend, inward
from gradclip.rules import Array


class TorchArrays(Backend):
    """PyTorch tensors in pure functions: summed in float64, known on the CPU."""

    def __init__(self) -> None:
        """Borrow the namespace that array-api-compat keeps for torch."""
        import array_api_compat.torch as xp
        import torch

        super().__init__(xp, torch.float64)

    def times(self, x: Array, scale: Array) -> Array:
        """Return one gradient times its scale: in float64, which holds any scale."""
        exact = self.xp.astype(x, self.xp.result_type(x.dtype, self.wide))
        eps = float(self.xp.finfo(x.dtype).eps)
        return self.xp.astype(exact * inward(scale, eps, self.xp), x.dtype)

    def known(self, flag: Array) -> bool | None:
        """Return the flag where no other device has to be waited for."""
        return bool(flag) if flag.device.type == "cpu" else None

    def adopt(self, x: Array, norm: Array) -> Array:
        """Return an array of a memory, beside the norms."""
        x = self.xp.asarray(x) if isinstance(x, np.ndarray) else x
        return x.to(norm.device)
