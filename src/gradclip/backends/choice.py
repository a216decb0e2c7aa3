"""Which backend some arrays belong to; their library is loaded, since it made them."""

import functools
import sys
import types
from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np

from gradclip.backends.base import Backend, described
from gradclip.backends.jax import Jax
from gradclip.backends.numpy import NumPy
from gradclip.backends.torch import TorchArrays
from gradclip.rules import Array


def find_backend(leaves: Sequence[tuple[str, Any]]) -> Backend:
    """Return the one backend of all gradients; refuse other things, and mixtures."""
    found: dict[Any, tuple[str, Any, Backend]] = {}
    # For one call: a function with a cache makes Dynamo warn.
    known: dict[type, Backend | None] = {}
    for where, x in leaves:
        kind = type(x)
        if kind not in known:
            # Parameters and tracers are subclasses, so the type is asked, not its name.
            known[kind] = next(filter(None, map(backend_of, kind.__mro__)), None)
        backend = known[kind] or conforming(x)
        if backend is None:
            raise TypeError(
                f"gradients{where} is {type(x).__name__}, not an array; hand over "
                "NumPy, PyTorch, JAX or array-API arrays, or a list, tuple or dict of "
                "them; gradclip.jax.as_optax takes any tree that JAX knows."
            )
        found.setdefault(backend.xp, (where, x, backend))
    if len(found) > 1:
        (a, x, _), (b, y, _), *_ = found.values()
        raise TypeError(
            f"gradients{a} is {described(x)} but gradients{b} is {described(y)}; "
            "one call takes the arrays of one library."
        )
    return next(iter(found.values()))[2]


def backend_of(kind: type) -> Backend | None:
    """Return the backend for arrays of a type, or None for what is not an array."""
    if issubclass(kind, (np.ndarray, np.generic)):
        return NumPy()
    library = kind.__module__.partition(".")[0]
    # There are modules in torch, too, and these are no arrays.
    if library == "torch" and issubclass(kind, sys.modules["torch"].Tensor):
        return TorchArrays()
    if library in ("jax", "jaxlib"):
        return Jax()
    if library == "tensorflow":
        from gradclip.backends.tensorflow import TensorFlow

        return TensorFlow()
    return None


def conforming(x: Any) -> Backend | None:
    """Return the plain verbs, if a library without its own follows the array API."""
    if not array_api_compat.is_array_api_obj(x):
        return None
    xp = array_api_compat.array_namespace(x)
    xp = xp if hasattr(xp, "hypot") else completed(xp)
    return Backend(xp, xp.asarray(0.0).dtype)


@functools.cache
def completed(xp: Any) -> Any:
    """Return the namespace of MLX with what it lacks of the array API."""

    def hypot(a: Array, b: Array) -> Array:
        largest = xp.maximum(xp.abs(a), xp.abs(b))
        unit = xp.where(largest > 0, largest, 1.0)
        return unit * xp.sqrt((a / unit) ** 2 + (b / unit) ** 2)

    def asarray(values: Any, dtype: Any = None, device: Any = None) -> Array:
        return xp.asarray(values, dtype)

    def svd(x: Array, full_matrices: bool) -> tuple[Array, Array, Array]:
        # MLX has it for the CPU alone, which shares the memory of the GPU.
        u, s, vh = xp.linalg.svd(x, stream=xp.cpu)
        most = max(x.shape) if full_matrices else s.shape[0]
        return u[:, :most], s, vh[:most]

    linalg = types.SimpleNamespace(svd=svd)
    whole = types.ModuleType(xp.__name__)
    own = {"hypot": hypot, "asarray": asarray, "linalg": linalg}
    vars(whole).update({**vars(xp), **own})
    return whole
