"""PyTorch tensors in pure functions; in place, `gradclip.torch.verbs` has more."""

from collections.abc import Sequence
from typing import Any

from gradclip.backends.base import Backend, inward
from gradclip.host import host_array
from gradclip.rules import Array


class TorchArrays(Backend):
    """PyTorch tensors in pure functions: summed in float64, known on the CPU."""

    def __init__(self) -> None:
        """Borrow the namespace that array-api-compat keeps for torch."""
        import array_api_compat.torch as xp
        import torch

        super().__init__(xp, torch.float64)

    def prepare(self, x: Array, where: str) -> Array:
        """Return `x` in a type that can hold clipped values; of a sparse one, these."""
        name = str(x.layout).removeprefix("torch.")
        if name not in ("strided", "sparse_coo"):
            raise TypeError(
                f"gradients{where} has layout {name}; gradients may be dense or sparse "
                "COO."
            )
        # It imports torch, which may not be there until a tensor is.
        from gradclip.backends.narrow import home

        values = x if name == "strided" else x.coalesce().values()
        return super().prepare(values.to(home(x.device)), where)

    def shaped_like(self, result: Array, given: Any) -> Any:
        """Return a result where the gradient was; as a sparse tensor, if it was one."""
        result = result.to(given.device)
        if not given.is_sparse:
            return result
        import torch

        places, shape = given.coalesce().indices(), given.shape
        return torch.sparse_coo_tensor(places, result, shape, is_coalesced=True)

    def deliver(self, leaves: Sequence[Array], given: Sequence[Any]) -> list[Array]:
        """Return results that share no memory with what was given."""
        # Torch warns where `asarray` copies what requires a gradient.
        pairs = zip(leaves, given, strict=True)
        return [x.clone() if x is y else x for x, y in pairs]

    def times(self, x: Array, scale: Array) -> Array:
        """Return one gradient times its scale: in float64, which holds any scale."""
        exact = self.xp.astype(x, self.xp.result_type(x.dtype, self.wide))
        eps = float(self.xp.finfo(x.dtype).eps)
        return self.xp.astype(exact * inward(scale, eps, self.xp), x.dtype)

    def known(self, flag: Array) -> bool | None:
        """Return the flag where no other device has to be waited for."""
        import torch

        here = flag.device.type == "cpu" and not torch.compiler.is_compiling()
        return bool(flag) if here and not _is_mapped(flag) else None

    def lasting(self, states: list[Any], info: Any = None) -> list[Any]:
        """Return the memory without the graph of gradients that have derivatives."""
        return [
            state and {name: _apart(x) for name, x in state.items()} for state in states
        ]

    def adopt(self, x: Array, norm: Array) -> Array:
        """Return an array of a memory, beside the norms."""
        # A copy, since arrays of JAX cannot be written to, of which torch warns.
        x = x if hasattr(x, "detach") else self.xp.asarray(host_array(x).copy())
        return x.to(norm.device)


def _apart(x: Any) -> Any:
    return x.detach() if hasattr(x, "detach") else x


def _is_mapped(x: Any) -> bool:
    """Return whether `vmap` has put a value for each of its calls there."""
    from torch._C import _functorch as functorch

    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        # Within a gradient that is mapped.
        x = functorch.get_unwrapped(x)
    return False
