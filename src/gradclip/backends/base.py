"""The verbs that lists of gradients need, once in the array API."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from gradclip.decision import clip_scale
from gradclip.host import host_array
from gradclip.rules import Array, Rule, Scope, State

Scaling: TypeAlias = Callable[[Array], Array]
ROW = 512
"""Elements summed in float32 before float64 takes over."""
CHUNK = 1 << 18
"""Elements converted to float64 at a time: 2 MB, which stay in the cache."""


def is_half(x: Array, xp: Any) -> bool:
    """Return whether an array has half precision: float16 or bfloat16."""
    return float(xp.finfo(x.dtype).eps) > 1e-4


def check_arithmetic(dtype: Any, where: str = "") -> None:
    """Refuse floats of 8 bits or fewer: libraries store and convert them, no more."""
    if any(name in str(dtype) for name in ("float8_", "float6_", "float4_")):
        raise TypeError(
            f"gradients{where} has dtype {dtype}, which only stores numbers; clip in "
            "float32 or bfloat16, and convert what comes out."
        )


def inward(scale: Array, eps: float, xp: Any) -> Array:
    """Return the scale made smaller by what rounding its products may add.

    Without it the norm of bfloat16 gradients clipped to 1 is 1.0016. Half-precision
    products are off by half an `eps`, those of wider types by less than their sums.
    """
    # In float64 the norm itself is some units off, and not exact as for float32.
    wide = 2 * eps if eps > 1e-12 else 32 * eps
    margin = eps / 2 if eps > 1e-4 else wide
    return xp.where(scale == 1, scale, scale * (1 - margin))


def at_most(limit: Array, dtype: Any, xp: Any) -> Array:
    """Return a limit in the type of a gradient, rounded so that it is not raised."""
    bound = xp.astype(limit, dtype)
    raised = xp.astype(bound, limit.dtype) > limit
    # Not all libraries have it; the product is up to two units lower, never higher.
    if hasattr(xp, "nextafter"):
        below = xp.nextafter(bound, xp.zeros_like(bound))
    else:
        below = bound * (1 - float(xp.finfo(dtype).eps))
    return xp.where(raised, below, bound)


def described(x: Any) -> str:
    """Return the name of a type of arrays, for messages."""
    return f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}"


class Backend:
    """The verbs in the array API, for any library that follows it."""

    def __init__(self, xp: Any, wide: Any) -> None:
        """Keep the array namespace, and the type that norms are summed in."""
        self.xp, self.wide = xp, wide

    def is_complex(self, x: Array) -> bool:
        """Return whether the elements have a phase."""
        return bool(self.xp.isdtype(x.dtype, "complex floating"))

    def deciding(self, rule: Rule) -> "Backend":
        """Return the same verbs with quicker decisions, where a rule allows that."""
        return self

    def prepare(self, x: Array, where: str) -> Array:
        """Return `x` in a type that can hold clipped values."""
        check_arithmetic(x.dtype, where)
        if self.xp.isdtype(x.dtype, ("integral", "bool")):
            # In an integer array 0.4 would silently become 0.
            return self.xp.astype(x, self.xp.asarray(0.0).dtype)
        return x

    def moduli(self, x: Array) -> Array:
        """Return the moduli of all elements in the widest type."""
        xp = self.xp
        if self.is_complex(x):
            # A modulus may be beyond float32 where both parts are not.
            x = xp.astype(x, xp.result_type(x.dtype, self.wide))
        return xp.astype(xp.abs(x), self.wide)

    def row_norms(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of each row of a matrix, without over- or underflow."""
        xp, x = self.xp, self.moduli(x)
        if x.shape[1] == 0:
            return xp.sum(x, axis=1)
        largest = xp.max(x, axis=1)
        if math.isinf(p):
            return largest
        usable = xp.isfinite(largest) & (largest > 0)
        unit = xp.where(usable, largest, 1.0)
        sums = xp.sum((x / unit[:, None]) ** p, axis=1)
        # The root of 0 has no derivative, and who differentiates this would get NaN.
        sums = xp.where(usable, sums, 1.0)
        return xp.where(usable, unit * sums ** (1 / p), largest)

    def norm(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of all elements, as a 0-d array."""
        return self.row_norms(self.xp.reshape(x, (1, -1)), p)[0]

    def norms(self, leaves: Sequence[Array], p: float, apart: bool) -> Array:
        """Return the `p`-norms of arrays; if not `apart`, others with the same norm."""
        return self.xp.stack([self.norm(x, p) for x in leaves])

    def units(self, x: Array) -> int:
        """Return how many units a gradient has: rows; a vector or scalar is one."""
        return int(x.shape[0]) if x.ndim > 1 else 1

    def counts(self, leaves: Sequence[Array]) -> list[int]:
        """Return how many units each tensor has, 0 for one without a gradient."""
        return list(map(self.units, leaves))

    def unit_norms(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of each unit."""
        # Told, since -1 in a shape has no answer where there are no rows.
        size = math.prod(x.shape[1:]) if x.ndim > 1 else math.prod(x.shape)
        return self.row_norms(self.xp.reshape(x, (self.units(x), size)), p)

    def measure(self, leaves: Sequence[Array], over: Scope, p: float) -> Array:
        """Return the norms of the scope: 0-d for all and elements, else one a cell."""
        if over == "unit":
            return self.xp.concat([self.unit_norms(x, p) for x in leaves])
        order = math.inf if over == "element" else p
        norms = self.norms(leaves, order, apart=over == "tensor")
        return norms if over == "tensor" else self.norm(norms, order)

    def weigh(self, weights: Sequence[Array], over: Scope, p: float) -> Array:
        """Return the norms of parameters, cell for cell with those of gradients."""
        return self.measure(weights, over, p)

    def spread(self, scale: Array, leaves: Sequence[Array], over: Scope) -> list[Array]:
        """Return the scale of each gradient, shaped to be multiplied with it."""
        if over == "all":
            return [scale] * len(leaves)
        if over == "tensor":
            return [scale[i] for i in range(len(leaves))]
        parts, start = [], 0
        for x in leaves:
            stop = start + self.units(x)
            shape = (stop - start, *[1] * (x.ndim - 1)) if x.ndim > 1 else x.ndim * (1,)
            parts.append(self.xp.reshape(scale[start:stop], shape))
            start = stop
        return parts

    def multiply(
        self, leaves: Sequence[Array], scale: Array, over: Scope
    ) -> list[Array]:
        """Return the gradients times their scale, each in its own type."""
        scales = self.spread(scale, leaves, over)
        return [self.times(x, s) for x, s in zip(leaves, scales, strict=True)]

    def times(self, x: Array, scale: Array) -> Array:
        """Return one gradient times its scale, never longer than it should be."""
        scale = inward(scale, float(self.xp.finfo(x.dtype).eps), self.xp)
        return self.xp.astype(x * scale, x.dtype)

    def places(self, leaves: Sequence[Array]) -> Sequence[int]:
        """Return the place of each gradient among those that are remembered."""
        return range(len(leaves))

    def tops(self, leaves: Sequence[Array]) -> Array | Sequence[Array]:
        """Return the largest modulus of each tensor, by its place."""
        return self.measure(leaves, "tensor", math.inf) if leaves else ()

    def borrow(self, stage: Rule, place: int, parts: Array) -> tuple[Rule, State]:
        """Return rule and memory for a tensor, of a rule that reads an optimizer's."""
        return stage, stage.init(parts, self.xp)

    @property
    def here(self) -> Any:
        """The array namespace that speaks for this process alone."""
        return self.xp

    def agreed(self, info: Any) -> Any:
        """Return a report that is the same on all processes; here there is one."""
        return info

    def inside(self, x: Array, over: Scope) -> tuple[Array, Scaling]:
        """Return moduli or singular values of a tensor, and how to scale them."""
        xp = self.xp
        kind = xp.result_type(x.dtype, xp.asarray(0.0, dtype=self.wide).dtype)
        if over == "element" or 0 in x.shape:
            moduli = xp.abs(xp.astype(x, kind))
            return moduli, lambda scale: self.times(x, scale)
        flat = xp.reshape(x, (self.units(x), -1))
        # The decomposition of a matrix with NaN raises, or does not end.
        fine = xp.where(xp.all(xp.isfinite(flat)), flat, xp.zeros_like(flat))
        u, s, vh = xp.linalg.svd(xp.astype(fine, kind), full_matrices=False)
        eps = float(xp.finfo(x.dtype).eps)

        def put(scale: Array) -> Array:
            again = (u * (s * inward(scale, eps, xp))[None, :]) @ vh
            again = xp.astype(xp.reshape(again, x.shape), x.dtype)
            # A matrix that nothing is done to keeps every bit, and its NaN.
            return xp.where(xp.all(scale == 1), x, again)

        return s, put

    def clamp(self, leaves: Sequence[Array], limit: Array) -> list[Array]:
        """Return the gradients with every modulus at most `limit`."""
        return [self.clamped(x, limit) for x in leaves]

    def clamped(self, x: Array, limit: Array) -> Array:
        """Return one gradient with every modulus at most `limit`."""
        xp = self.xp
        if self.is_complex(x):
            return self.times(x, clip_scale(self.moduli(x), limit, xp))
        bound = at_most(limit, x.dtype, xp)
        return xp.clip(x, -bound, bound)

    def each(
        self, leaves: Sequence[Array], scale: Callable[[Array], Array]
    ) -> list[Array]:
        """Return every element times the scale for its modulus."""
        return [self.xp.astype(x * scale(self.moduli(x)), x.dtype) for x in leaves]

    def without_nonfinite(self, leaves: Sequence[Array]) -> list[Array]:
        """Return the gradients with 0 in the place of NaN and infinity."""
        xp = self.xp
        return [xp.where(xp.isfinite(x), x, xp.zeros_like(x)) for x in leaves]

    def discard(self, leaves: Sequence[Array], finite: Array) -> list[Array]:
        """Return the gradients, or zeros if the step is not `finite`."""
        return [self.xp.where(finite, x, self.xp.zeros_like(x)) for x in leaves]

    def count_nonfinite(self, x: Array) -> int:
        """Return how many elements are NaN or infinite."""
        return int(self.xp.sum(~self.xp.isfinite(x)))

    def gathered(self, findings: list[str]) -> list[str]:
        """Return what all processes have found; here there is only this one."""
        return findings

    def known(self, flag: Array) -> bool | None:
        """Return the flag as a Python bool, or None where reading it has a price."""
        return None

    def read(self, flag: Array) -> bool:
        """Return the flag as a Python bool, whatever it costs."""
        return bool(flag)

    def lasting(self, states: list[Any], info: Any = None) -> list[Any]:
        """Return a memory that may be kept when the step with this report is over."""
        return states

    def adopt(self, x: Array, norm: Array) -> Array:
        """Return an array of a memory, which another library may have saved."""
        foreign = isinstance(x, np.ndarray | np.generic) or hasattr(x, "detach")
        return self.xp.asarray(host_array(x)) if foreign else x

    def plain(self, x: Array) -> Any:
        """Return a number of a report as the library's users know it."""
        return x

    def number(self, x: Any) -> Any:
        """Return what a schedule said, so that it goes with norms."""
        return x

    def deliver(self, leaves: Sequence[Array], given: Sequence[Any]) -> list[Array]:
        """Return results that share no memory with what was given."""
        pairs = zip(leaves, given, strict=True)
        return [self.xp.asarray(x, copy=True) if x is y else x for x, y in pairs]

    def shaped_like(self, result: Array, given: Any) -> Any:
        """Return a result in the form that the gradient was handed over in."""
        return result

    def writing_to(self, given: Sequence[Array], out: Sequence[Any]) -> "Backend":
        """Return the same verbs with their results in the arrays of `out`."""
        raise TypeError("out= takes NumPy arrays; other libraries return new arrays.")
