"""TensorFlow's tensors: its functions under the names of the array API, and the verbs.

Norms are float64, traced or not; a number is read only where the host has it.
"""

import importlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from gradclip.backends.base import Backend, inward
from gradclip.rules import Array

tf: Any = importlib.import_module("tensorflow")
ml_dtypes: Any = importlib.import_module("ml_dtypes")


def svd(x: Array, full_matrices: bool) -> tuple[Array, Array, Array]:
    """Return the decomposition of a matrix in NumPy's order."""
    s, u, v = tf.linalg.svd(x, full_matrices=full_matrices)
    return u, s, tf.linalg.adjoint(v)


class Names:
    """What rules and verbs call; `tf.experimental.numpy` has most of it."""

    def __getattr__(self, name: str) -> Any:
        """Return the function of NumPy's name."""
        return getattr(tf.experimental.numpy, name)

    astype = staticmethod(tf.cast)
    cumulative_sum = staticmethod(tf.cumsum)
    linalg = SimpleNamespace(svd=svd)

    def asarray(self, x: Any, dtype: Any = None, device: Any = None) -> Array:
        """Return a tensor, of float64 for Python's floats."""
        return tf.experimental.numpy.asarray(x, dtype)

    def concat(self, parts: Sequence[Array]) -> Array:
        """Return tensors one after the other."""
        return tf.concat(parts, axis=0)

    def nextafter(self, x: Array, y: Array) -> Array:
        """Return the next number towards 0; TensorFlow has it for wide types only."""
        if x.dtype.size > 2:
            return tf.math.nextafter(x, y)
        return x * (1 - float(self.finfo(x.dtype).eps))

    def finfo(self, dtype: Any) -> Any:
        """Return the limits of a type, also of bfloat16."""
        return ml_dtypes.finfo(dtype.as_numpy_dtype)

    def isdtype(self, dtype: Any, kind: Any) -> bool:
        """Return whether a type is complex, or a whole number."""
        kinds = (kind,) if isinstance(kind, str) else kind
        whole = dtype.is_integer or dtype.is_bool
        return dtype.is_complex if "complex floating" in kinds else whole


class TensorFlow(Backend):
    """The verbs for TensorFlow's tensors."""

    def __init__(self) -> None:
        """Sum in float64."""
        super().__init__(Names(), tf.float64)

    def prepare(self, x: Array, where: str) -> Array:
        """Return a tensor also for the slices that an embedding's gradient is."""
        # The slices may hold a row twice, which only the whole tensor adds up.
        return super().prepare(tf.convert_to_tensor(x), where)

    def times(self, x: Array, scale: Array) -> Array:
        """Return one gradient times its scale: in float64, which holds any scale."""
        scale = inward(scale, float(self.xp.finfo(x.dtype).eps), self.xp)
        return tf.cast(tf.cast(x, self.wide) * scale, x.dtype)

    def each(
        self, leaves: Sequence[Array], scale: Callable[[Array], Array]
    ) -> list[Array]:
        """Return every element times the scale for its modulus."""
        wide = [tf.cast(x, self.wide) for x in leaves]
        return [
            tf.cast(x * scale(tf.abs(x)), y.dtype)
            for x, y in zip(wide, leaves, strict=True)
        ]

    def known(self, flag: Array) -> bool | None:
        """Return the flag where it has a value, and on the host."""
        eager = tf.executing_eagerly() and "CPU" in flag.device
        return bool(flag) if eager else None

    def number(self, x: Any) -> Array:
        """Return what a schedule said in the type of norms: types do not mix."""
        return tf.cast(x, self.wide)

    def deliver(self, leaves: Sequence[Array], given: Sequence[Any]) -> list[Array]:
        """Return the results: nobody can write to them."""
        return list(leaves)
