"""TensorFlow's tensors for Keras: its functions under the names of the array API.

Norms are float64, traced or not; a number is read only where the host has it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from gradclip.backends import Backend, inward
from gradclip.integrations import needed
from gradclip.rules import Array

tf: Any = needed("keras", "tensorflow")
ml_dtypes: Any = needed("keras", "ml_dtypes")


class Names:
    """What rules and verbs call; `tf.experimental.numpy` has most of it."""

    def __getattr__(self, name: str) -> Any:
        """Return the function of NumPy's name."""
        return getattr(tf.experimental.numpy, name)

    astype = staticmethod(tf.cast)
    nextafter = staticmethod(tf.math.nextafter)
    cumulative_sum = staticmethod(tf.cumsum)

    def asarray(self, x: Any, device: Any = None) -> Array:
        """Return a tensor, of float64 for Python's floats."""
        return tf.experimental.numpy.asarray(x)

    def concat(self, parts: Sequence[Array]) -> Array:
        """Return tensors one after the other."""
        return tf.concat(parts, axis=0)

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
        return super().prepare(tf.convert_to_tensor(x), where)

    def times(self, x: Array, scale: Array) -> Array:
        """Return one gradient times its scale: in float64, which holds any scale."""
        scale = inward(scale, float(self.xp.finfo(x.dtype).eps), self.xp)
        return tf.cast(tf.cast(x, self.wide) * scale, x.dtype)

    def clamped(self, x: Array, limit: Array) -> Array:
        """Return one gradient with every modulus at most `limit`."""
        bound = tf.cast(limit, x.dtype)
        below = tf.math.nextafter(bound, tf.zeros_like(bound))
        # Rounding the limit to the type of the gradient must not raise it.
        bound = tf.where(tf.cast(bound, limit.dtype) > limit, below, bound)
        return tf.clip_by_value(x, -bound, bound)

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
