"""The verbs that lists of gradients need, for each array library; none is imported.

A library is recognised by the arrays that it made, so it is loaded already. The verbs
are written once in the array API; a backend overrides what its library does better.
"""

import functools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from gradclip.rules import Array, Rule, Scope, State

Scaling: TypeAlias = Callable[[Array], Array]

ROW = 512
"""Elements summed in float32 before float64 takes over."""
CHUNK = 1 << 18
"""Elements converted to float64 at a time: 2 MB, which stay in the cache."""


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
    if hasattr(xp, "nextafter"):
        below = xp.nextafter(bound, xp.zeros_like(bound))
    else:
        below = bound * (1 - float(xp.finfo(dtype).eps))
    return xp.where(raised, below, bound)


class Backend:
    """The verbs in the array API, for any library that follows it."""

    def __init__(self, xp: Any, wide: Any) -> None:
        """Keep the array namespace, and the type that norms are summed in."""
        self.xp, self.wide = xp, wide

    def is_complex(self, x: Array) -> bool:
        """Return whether the elements have a phase."""
        return bool(self.xp.isdtype(x.dtype, "complex floating"))

    def prepare(self, x: Array, where: str) -> Array:
        """Return `x` in a type that can hold clipped values."""
        if self.xp.isdtype(x.dtype, ("integral", "bool")):
            # In an integer array 0.4 would silently become 0.
            return self.xp.astype(x, self.xp.asarray(0.0).dtype)
        return x

    def row_norms(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of each row of a matrix, without over- or underflow."""
        xp = self.xp
        x = xp.astype(xp.abs(x), self.wide)
        if x.shape[1] == 0:
            return xp.sum(x, axis=1)
        largest = xp.max(x, axis=1)
        if math.isinf(p):
            return largest
        usable = xp.isfinite(largest) & (largest > 0)
        unit = xp.where(usable, largest, 1.0)
        sums = xp.sum((x / unit[:, None]) ** p, axis=1)
        return xp.where(usable, unit * sums ** (1 / p), largest)

    def norm(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of all elements, as a 0-d array."""
        return self.row_norms(self.xp.reshape(x, (1, -1)), p)[0]

    def units(self, x: Array) -> int:
        """Return how many units a gradient has: rows; a vector or scalar is one."""
        return int(x.shape[0]) if x.ndim > 1 else 1

    def counts(self, leaves: Sequence[Array]) -> list[int]:
        """Return how many units each tensor has, 0 for one without a gradient."""
        return list(map(self.units, leaves))

    def unit_norms(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of each unit."""
        size = math.prod(x.shape[1:]) if x.ndim > 1 else math.prod(x.shape)
        return self.row_norms(self.xp.reshape(x, (self.units(x), size)), p)

    def measure(self, leaves: Sequence[Array], over: Scope, p: float) -> Array:
        """Return the norms of the scope: 0-d for all and elements, else one a cell."""
        if over == "unit":
            return self.xp.concat([self.unit_norms(x, p) for x in leaves])
        order = math.inf if over == "element" else p
        norms = self.xp.stack([self.norm(x, order) for x in leaves])
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
        """Return a rule with the memory that is not its own; here there is no other."""
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
            return xp.where(xp.all(scale == 1), x, again)

        return s, put

    def clamp(self, leaves: Sequence[Array], limit: Array) -> list[Array]:
        """Return the gradients with every modulus at most `limit`."""
        return [self.clamped(x, limit) for x in leaves]

    def clamped(self, x: Array, limit: Array) -> Array:
        """Return one gradient with every modulus at most `limit`."""
        xp = self.xp
        if self.is_complex(x):
            modulus = xp.abs(x)
            over = modulus > limit
            return self.times(x, xp.where(over, limit / xp.where(over, modulus, 1), 1))
        bound = at_most(limit, x.dtype, xp)
        return xp.clip(x, -bound, bound)

    def each(
        self, leaves: Sequence[Array], scale: Callable[[Array], Array]
    ) -> list[Array]:
        """Return every element times the scale for its modulus."""
        return [
            self.xp.astype(
                x * scale(self.xp.astype(self.xp.abs(x), self.wide)), x.dtype
            )
            for x in leaves
        ]

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

    def lasting(self, states: list[Any]) -> list[Any]:
        """Return a memory that may be kept when the step is over."""
        return states

    def adopt(self, x: Array, norm: Array) -> Array:
        """Return an array of a memory, which another library may have saved."""
        return self.xp.asarray(x) if isinstance(x, np.ndarray) else x

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

    def writing_to(self, given: Sequence[Array], out: Sequence[Any]) -> "Backend":
        """Return the same verbs with their results in the arrays of `out`."""
        raise TypeError("out= takes NumPy arrays; other libraries return new arrays.")


class NumPy(Backend):
    """NumPy: norms in cache-sized chunks, flags read at once, results in place."""

    def __init__(self, out: dict[int, Array] | None = None) -> None:
        """Sum in float64; `out` gives the place of a result by the id of its source."""
        super().__init__(array_api_compat.array_namespace(np.empty(0)), np.float64)
        self.out = out or {}

    def prepare(self, x: Array, where: str) -> Array:
        """Return `x` in a type that can hold clipped values."""
        if x.dtype.kind not in "biufc":
            raise TypeError(
                f"gradients{where} has dtype {x.dtype}; clipping needs numbers, as in "
                "x.astype(float)."
            )
        return x.astype(np.float64) if x.dtype.kind in "biu" else np.asarray(x)

    def norm(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of all elements, chunk by chunk."""
        # Memory order is fine: a norm does not depend on it, and nothing is copied.
        flat = x.ravel(order="K")
        if p == 2 and flat.dtype == np.float32:
            square = self.square_by_rows(flat)
            # Outside, squares of float32 may have over- or underflowed on the way.
            if 1e-20 < square < math.inf:
                return np.sqrt(square)
        if flat.size <= CHUNK:
            return self.chunk_norm(flat, p)
        chunks = range(0, flat.size, CHUNK)
        parts = [self.chunk_norm(flat[i : i + CHUNK], p) for i in chunks]
        return self.chunk_norm(np.asarray(parts), p)

    def square_by_rows(self, x: Array) -> Array:
        """Return the sum of squares: of short rows in float32, of those in float64."""
        size = x.size // ROW * ROW
        rows, rest = x[:size].reshape(-1, ROW), x[size:].astype(np.float64)
        squares = np.vecdot(rows, rows).astype(np.float64)
        if squares.size:
            # One huge element swallows small ones in float32; it is in the largest row.
            top = np.argmax(squares)
            largest = rows[top].astype(np.float64)
            squares[top] = np.dot(largest, largest)
        return np.sum(squares) + np.dot(rest, rest)

    def chunk_norm(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of a short vector."""
        if p == 2 and x.dtype.kind == "f":
            wide = x.astype(np.float64, copy=False)
            square = np.dot(wide, wide)
            # Outside, float64 itself may have over- or underflowed on the way.
            if 1e-280 < square < 1e300:
                return np.sqrt(square)
        return self.row_norms(x.reshape(1, -1), p)[0]

    def times(self, x: Array, scale: Array) -> Array:
        """Return one gradient times its scale, in place where that was asked for."""
        eps = np.finfo(x.dtype).eps
        scale = inward(scale, float(eps), np)
        # float16 cannot hold the scale, and float32 not one for a norm of 1e38.
        narrow = np.min(scale, initial=1.0) > 1e-30
        kind = np.float32 if eps > 1e-12 and narrow else np.float64
        out = self.out.get(id(x), np.empty_like(x))
        return np.multiply(x, scale.astype(kind), out=out, casting="same_kind")

    def clamped(self, x: Array, limit: Array) -> Array:
        """Return one gradient with every modulus at most `limit`."""
        if self.is_complex(x):
            return super().clamped(x, limit)
        bound = at_most(np.asarray(limit), x.dtype, self.xp)
        return np.clip(x, -bound, bound, out=self.out.get(id(x)))

    def known(self, flag: Array) -> bool | None:
        """Return the flag: it is on the host already."""
        return bool(flag)

    def adopt(self, x: Array, norm: Array) -> Array:
        """Return an array of a memory: its own, or one of a library on the host."""
        return np.asarray(x)

    def plain(self, x: Array) -> Any:
        """Return a 0-d array as a scalar, which prints better."""
        return x[()] if isinstance(x, np.ndarray) else x

    def deliver(self, leaves: Sequence[Array], given: Sequence[Any]) -> list[Array]:
        """Return results that share no memory with what was given, or fill `out`."""
        if not self.out:
            return super().deliver(leaves, given)
        for x, y in zip(leaves, given, strict=True):
            if (target := self.out[id(y)]) is not x:
                target[...] = x
        return [self.out[id(y)] for y in given]

    def writing_to(self, given: Sequence[Array], out: Sequence[Any]) -> "Backend":
        """Return the same verbs with their results in the arrays of `out`."""
        if len(given) != len(out):
            raise ValueError(
                f"out has {len(out)} arrays for {len(given)} gradients; arrange it "
                "like the gradients."
            )
        for x, target in zip(given, out, strict=True):
            if not isinstance(target, np.ndarray) or (target.shape, target.dtype) != (
                x.shape,
                x.dtype,
            ):
                raise ValueError(
                    f"out has {_described(target)} where the gradient has shape "
                    f"{x.shape} and dtype {x.dtype}; make it with np.empty_like."
                )
        places = {id(x): target for x, target in zip(given, out, strict=True)}
        return NumPy(places | {id(target): target for target in out})


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


class Jax(Backend):
    """JAX arrays, traced or not: nothing is read, sums are as wide as JAX allows.

    Norms hold from 1e-38 to 3e38 in float32; smaller numbers are 0 to XLA.
    """

    def __init__(self) -> None:
        """Borrow the namespace of a library that is loaded already."""
        import jax

        super().__init__(jax.numpy, None)
        self.jax = jax

    @property
    def wide(self) -> Any:
        """The widest float that is switched on, now."""
        return self.xp.asarray(0.0).dtype

    @wide.setter
    def wide(self, value: Any) -> None:
        """Leave it to JAX."""

    def row_norms(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of each row, in one pass where squares stay in range."""
        if p != 2 or 0 in x.shape:
            return self.scaled_norms(x, p)
        squares = self.xp.sum(self.squared(x), axis=1)
        return self.root(squares, lambda: self.scaled_norms(x, p))

    def squared(self, x: Array) -> Array:
        """Return the squares of the moduli, which may be out of range."""
        return self.xp.square(self.xp.abs(x).astype(self.wide))

    def root(self, squares: Array, safely: Callable[[], Array]) -> Array:
        """Return the roots of sums of squares, or what is computed `safely` instead."""
        xp = self.xp
        least = float(xp.finfo(self.wide).tiny) ** 0.5
        usable = xp.all(xp.isfinite(squares) & (squares > least))
        return self.jax.lax.cond(usable, lambda: xp.sqrt(squares), safely)

    def scaled_norms(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of each row, whatever its size."""
        xp, wide = self.xp, self.xp.finfo(self.wide)
        x = xp.abs(x).astype(self.wide)
        if x.shape[1] == 0:
            return xp.sum(x, axis=1)
        # A maximum over devices may lose a NaN, as sharded arrays show; a sum does not.
        finite = xp.isfinite(x)
        largest = xp.max(xp.where(finite, x, 0.0), axis=1)
        if math.isinf(p):
            return largest + xp.sum(xp.where(finite, 0.0, x), axis=1)
        largest = xp.where(largest > 0, largest, 1.0)
        # Divided by the largest, 3e38 would be multiplied by 1 / 3e38, which is 0 here.
        exponent = xp.clip(xp.frexp(largest)[1], int(wide.minexp), -int(wide.minexp))
        unit = xp.ldexp(xp.ones_like(largest), -exponent)
        top = largest * unit
        sums = xp.sum((x * unit[:, None] / top[:, None]) ** p, axis=1)
        return largest * sums ** (1 / p)

    def measure(self, leaves: Sequence[Array], over: Scope, p: float) -> Array:
        """Return the norms of the scope; a masked optimizer may have no gradients."""
        if not leaves:
            return self.xp.zeros(() if over in ("all", "element") else 0, self.wide)
        if over in ("unit", "element") or p != 2:
            return super().measure(leaves, over, p)
        # One choice for all gradients: one for each would take XLA longer than sums.
        squares = self.xp.stack([self.xp.sum(self.squared(x)) for x in leaves])
        squares = squares if over == "tensor" else self.xp.sum(squares)
        return self.root(squares, lambda: self.safe_measure(leaves, over, p))

    def safe_measure(self, leaves: Sequence[Array], over: Scope, p: float) -> Array:
        """Return the norms of gradients and of all of them, whatever their size."""
        flat = [self.xp.reshape(x, (1, -1)) for x in leaves]
        norms = self.xp.concat([self.scaled_norms(x, p) for x in flat])
        return norms if over == "tensor" else self.scaled_norms(norms[None], p)[0]

    def lasting(self, states: list[Any]) -> list[Any]:
        """Return the memory, unless it has no value outside of the traced function."""
        if any(map(self.traced, self.jax.tree.leaves(states))):
            raise TypeError(
                "a Clipper cannot keep its memory under jit, vmap or scan; use "
                "gradclip.jax.as_optax(rule), whose state is handed in and out."
            )
        return states

    def traced(self, x: Array) -> bool:
        """Return whether an array stands for values that come later."""
        return isinstance(x, self.jax.core.Tracer)

    def read(self, flag: Array) -> bool:
        """Return the flag, unless it has no value yet."""
        if self.traced(flag):
            raise TypeError(
                "on_nonfinite='raise' has to look at the gradients, which jit, vmap "
                "and scan cannot; use 'skip', 'zero' or 'ignore', and read info.finite."
            )
        return bool(flag)

    def deliver(self, leaves: Sequence[Array], given: Sequence[Any]) -> list[Array]:
        """Return the results: nobody can write to them."""
        return list(leaves)


class Shards(Jax):
    """JAX arrays that are pieces of larger ones, inside `shard_map` or `pmap`."""

    def __init__(self, axis: str) -> None:
        """Keep the name of the axis that the pieces lie along."""
        super().__init__()
        self.axis = axis

    def measure(self, leaves: Sequence[Array], over: Scope, p: float) -> Array:
        """Return the norms of whole gradients, the same on all devices."""
        if not leaves:
            return super().measure(leaves, over, p)
        order = math.inf if over == "element" else p
        norms = [self.norm(x, order) for x in leaves]
        if cut := self.cut(leaves):
            pieces = self.xp.stack([norms[i] for i in cut])
            for i, whole in zip(cut, self.joined(pieces, order), strict=True):
                norms[i] = whole
        total = self.xp.stack(norms)
        return total if over == "tensor" else self.norm(total, order)

    def cut(self, leaves: Sequence[Array]) -> list[int]:
        """Return which gradients differ along the axis: all, where JAX cannot tell."""
        everywhere = range(len(leaves))
        if not self.varies(self.jax.lax.axis_index(self.axis)):
            return list(everywhere)
        return [i for i in everywhere if self.varies(leaves[i])]

    def varies(self, x: Array) -> bool:
        """Return whether the type of an array says that it differs along the axis."""
        kind = self.jax.typeof(x)
        kind = getattr(kind, "manual_axis_type", kind)
        return self.axis in getattr(kind, "varying", getattr(kind, "vma", ()))

    def joined(self, norms: Array, p: float) -> Array:
        """Return the norms of vectors whose pieces have these norms."""
        xp, lax = self.xp, self.jax.lax
        finite = xp.isfinite(norms)
        largest = lax.pmax(xp.where(finite, norms, 0.0), self.axis)
        # A maximum over devices may lose a NaN, a sum does not.
        if math.isinf(p):
            return largest + lax.psum(xp.where(finite, 0.0, norms), self.axis)
        unit = xp.where(largest > 0, largest, 1.0)
        return unit * lax.psum((norms / unit) ** p, self.axis) ** (1 / p)


@functools.cache
def backend_of(kind: type) -> Backend | None:
    """Return the backend for arrays of a type, or None for what is not an array."""
    if issubclass(kind, np.ndarray | np.generic):
        return NumPy()
    library = kind.__module__.partition(".")[0]
    if library == "torch":
        return TorchArrays()
    if library in ("jax", "jaxlib"):
        return Jax()
    if library == "tensorflow":
        from gradclip.tensorflow import TensorFlow

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

    whole = types.ModuleType(xp.__name__)
    vars(whole).update({**vars(xp), "hypot": hypot, "asarray": asarray})
    return whole


def find_backend(leaves: Sequence[tuple[str, Any]]) -> Backend:
    """Return the one backend of all gradients; refuse other things, and mixtures."""
    found: dict[Any, tuple[str, Any, Backend]] = {}
    for where, x in leaves:
        # Parameters and tracers are subclasses, so the type is asked, not its name.
        known = next(filter(None, map(backend_of, type(x).__mro__)), None)
        backend = known or conforming(x)
        if backend is None:
            raise TypeError(
                f"gradients{where} is {type(x).__name__}, not an array; hand over "
                "NumPy, PyTorch, JAX or array-API arrays, or a list, tuple or dict of "
                "them."
            )
        found.setdefault(backend.xp, (where, x, backend))
    if len(found) > 1:
        (a, x, _), (b, y, _), *_ = found.values()
        raise TypeError(
            f"gradients{a} is {_described(x)} but gradients{b} is {_described(y)}; "
            "one call takes the arrays of one library."
        )
    return next(iter(found.values()))[2]


def on_host(x: Any) -> NDArray[Any]:
    """Return an array of any library as one of NumPy's, which may share its memory."""
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)


def _described(x: Any) -> str:
    return f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}"
