"""An accelerator that is none: the rules of one, and real numbers in the host's memory.

Whatever would make the host wait for CUDA raises here, as it does there under
`torch.cuda.set_sync_debug_mode("error")`; tensors of two devices do not mix; and what a
graph has recorded runs again on the same memory. So what is said of accelerators can be
tested where there is none. It measures nothing.
"""

import contextlib

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map_only


class Hook(backend_registration._DummyPrivateUse1Hook):
    """What torch asks a kind of device: here it is none that it would choose itself."""

    def is_available(self):
        return False

    def has_primary_context(self, dev_id):
        return False


class Backend(backend_registration._DummyBackendModule):
    """What torch asks its module."""

    def is_initialized(self):
        return False

    def is_available(self):
        return False

    def device_count(self):
        return 0


backend_registration._setup_privateuseone_for_python_backend(
    "pretended", Backend(), Hook()
)
DEVICE = torch.device("pretended", 0)
aten = torch.ops.aten
SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
}
WIDE = torch.float64, torch.complex128


class WaitError(RuntimeError):
    """The host would have to wait for the device."""


class Far(torch.Tensor):
    """A tensor on the accelerator; its numbers are in `near`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )

    def __init__(self, near):
        self.near = near

    def __repr__(self):
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, call, types, args=(), kwargs=None):
        return Accelerator.now.run(call, args, kwargs or {})


def far(x):
    """Return a tensor with the same numbers on the accelerator."""
    return Far(x.detach().clone())


def near(x):
    """Return the numbers of a tensor, whatever that costs."""
    return x.near if isinstance(x, Far) else x


class Accelerator(TorchDispatchMode):
    """A context in which tensors can be on the accelerator.

    Args:
        float64: Whether it has that type; Apple's have not.
    """

    now = None

    def __init__(self, float64=True):
        super().__init__()
        self.float64 = float64
        self.calls = []
        self.graph = None
        self._may_wait = False

    def __enter__(self):
        Accelerator.now = self
        # Otherwise `torch.tensor(…, device=…)` would ask the device for memory itself.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        Accelerator.now = None
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    @contextlib.contextmanager
    def waiting(self):
        """Allow the host to wait."""
        self._may_wait = True
        try:
            yield
        finally:
            self._may_wait = False

    @contextlib.contextmanager
    def capture(self):
        """Record what is done on the accelerator; yield what does it again."""
        self.graph = calls = []

        def replay():
            for call, args, kwargs, results in calls:
                again = tree_leaves(call(*args, **kwargs))
                for result, new in zip(results, again, strict=True):
                    if isinstance(result, torch.Tensor) and new is not result:
                        result.copy_(new)

        try:
            yield replay
        finally:
            self.graph = None

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        return self.run(call, args, kwargs or {})

    def run(self, call, args, kwargs):
        """Do what is asked for on the numbers, if the accelerator would do it."""
        tensors = [
            x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        ]
        here = [x for x in tensors if isinstance(x, Far)]
        there = [x for x in tensors if not isinstance(x, Far)]
        asked = kwargs.get("device")
        on_device = bool(here) if asked is None else asked.type == DEVICE.type
        if not (here or on_device):
            return call(*args, **kwargs)
        self._check(call, args, kwargs, here, there)
        if asked is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        given, named = tree_map_only(Far, near, (args, kwargs))
        found = call(*given, **named)
        self.calls.append(call)
        if self.graph is not None:
            self.graph.append((call, given, named, tree_leaves(found)))
        if not on_device or (
            call is aten.copy_.default and not isinstance(args[0], Far)
        ):
            return args[0] if call is aten.copy_.default else found
        found = tree_map_only(torch.Tensor, self._made, found)
        return return_and_correct_aliasing(call, args, kwargs, found) if here else found

    def _made(self, x):
        if x.dtype in WIDE and not self.float64:
            raise TypeError(f"this accelerator has no {x.dtype}")
        return Far(x)

    def _check(self, call, args, kwargs, here, there):
        if call is aten.copy_.default:
            copied = isinstance(args[0], Far) != isinstance(args[1], Far)
            waits = copied and not (args[2:] and args[2])
        elif call is aten._to_copy.default:
            kind = kwargs["device"].type if kwargs.get("device") else None
            goes = kind is not None and (kind == DEVICE.type) != bool(here)
            waits = goes and not kwargs.get("non_blocking")
        elif here and any(x.dim() or "foreach" in call.name() for x in there):
            raise RuntimeError(f"{call}: tensors are on two devices")
        else:
            flags = call in INDEXING and any(
                x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None
            )
            reads = call is aten._local_scalar_dense.default or call in SIZED_BY_VALUES
            waits = bool(here) and (flags or reads)
        if waits and not self._may_wait:
            raise WaitError(f"{call} makes the host wait for the device")
