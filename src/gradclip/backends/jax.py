"""JAX arrays, traced or not, whole or in pieces on several devices."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from gradclip.backends.base import Backend
from gradclip.rules import Array, Scope


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

    def prepare(self, x: Any, where: str) -> Array:
        """Return `x` in a type that can hold clipped values."""
        kind, dtypes = getattr(x, "dtype", None), self.jax.dtypes
        key = kind is not None and dtypes.issubdtype(kind, dtypes.extended)
        if kind is None or kind == dtypes.float0 or key:
            raise TypeError(
                f"gradients{where} is {kind or type(x).__name__}, of which there is no "
                "norm; hand over arrays of numbers, and None in the place of others."
            )
        return super().prepare(x, where)

    def row_norms(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of each row of a matrix, without over- or underflow."""
        return self.norms_over((1,), x, p)

    def norm(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of all elements, as a 0-d array."""
        return self.norms_over(tuple(range(x.ndim)), x, p)

    def unit_norms(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of each unit."""
        if x.ndim < 2:
            return self.norm(x, p)[None]
        return self.everywhere(self.norms_over(tuple(range(1, x.ndim)), x, p))

    def everywhere(self, norms: Array) -> Array:
        """Return the norms of units on all devices of an explicit mesh.

        Those of tensors that lie in other ways could not be joined.
        """
        sharding = getattr(self.jax.typeof(norms), "sharding", None)
        if sharding is None or not any(sharding.spec):
            return norms
        spec = self.jax.sharding.PartitionSpec
        return self.jax.sharding.reshard(norms, spec())

    def norms_over(self, axes: tuple[int, ...], x: Array, p: float) -> Array:
        """Return `p`-norms along axes, in one pass where squares stay in range.

        Nothing is reshaped: arrays on an explicit mesh would have to be gathered.
        """
        if p != 2 or 0 in x.shape:
            return self.scaled_norms(axes, x, p)
        squares = self.xp.sum(self.squared(x), axis=axes)
        return self.root(squares, lambda: self.scaled_norms(axes, x, p))

    def squared(self, x: Array) -> Array:
        """Return the squares of the moduli, which may be out of range."""
        return self.xp.square(self.xp.abs(x).astype(self.wide))

    def root(self, squares: Array, safely: Callable[[], Array]) -> Array:
        """Return the roots of sums of squares, or what is computed `safely` instead."""
        xp = self.xp
        # Squares that XLA flushes to 0 do not show in a sum above this.
        least = float(xp.finfo(self.wide).tiny) ** 0.5
        usable = xp.all(xp.isfinite(squares) & (squares > least))
        # Where both are computed, as under vmap, the root of 0 has no derivative.
        known = xp.where(usable, squares, 1.0)
        return self.jax.lax.cond(usable, lambda: xp.sqrt(known), safely)

    def scaled_norms(self, axes: tuple[int, ...], x: Array, p: float) -> Array:
        """Return `p`-norms along axes, whatever their size."""
        xp, wide = self.xp, self.xp.finfo(self.wide)
        x = xp.abs(x).astype(self.wide)
        if 0 in x.shape:
            return xp.sum(x, axis=axes)
        # A maximum over devices may lose a NaN, as sharded arrays show; a sum does not.
        finite = xp.isfinite(x)
        largest = xp.max(xp.where(finite, x, 0.0), axis=axes, keepdims=True)
        if math.isinf(p):
            bad = xp.sum(xp.where(finite, 0.0, x), axis=axes)
            return xp.squeeze(largest, axes) + bad
        largest = xp.where(largest > 0, largest, 1.0)
        # Divided by the largest, 3e38 would be multiplied by 1 / 3e38, which is 0 here.
        exponent = xp.clip(xp.frexp(largest)[1], int(wide.minexp), -int(wide.minexp))
        unit = xp.ldexp(xp.ones_like(largest), -exponent)
        top = largest * unit
        sums = xp.sum((x * unit / top) ** p, axis=axes)
        return xp.squeeze(largest, axes) * self.rooted(sums, p)

    def rooted(self, sums: Array, p: float) -> Array:
        """Return `p`-th roots, of 0 with a derivative of 0 in place of infinity."""
        zero = sums == 0
        return self.xp.where(zero, 0.0, self.xp.where(zero, 1.0, sums) ** (1 / p))

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
        every = [tuple(range(x.ndim)) for x in leaves]
        norms = self.xp.stack(
            [
                self.scaled_norms(axes, x, p)
                for axes, x in zip(every, leaves, strict=True)
            ]
        )
        return norms if over == "tensor" else self.scaled_norms((0,), norms, p)

    def lasting(self, states: list[Any], info: Any = None) -> list[Any]:
        """Return the memory, unless it has no value outside of the traced function."""
        if any(map(self.traced, self.jax.tree.leaves((states, info)))):
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

    def __init__(self, axes: str | Sequence[str]) -> None:
        """Keep the names of the axes that the pieces lie along."""
        super().__init__()
        self.axes = (axes,) if isinstance(axes, str) else tuple(axes)

    def measure(self, leaves: Sequence[Array], over: Scope, p: float) -> Array:
        """Return the norms of whole gradients, the same on all devices."""
        if not leaves:
            return super().measure(leaves, over, p)
        order = math.inf if over == "element" else p
        norms = [self.norm(x, order) for x in leaves]
        alike: dict[tuple[str, ...], list[int]] = {}
        for i, x in enumerate(leaves):
            alike.setdefault(self.cut_along(x), []).append(i)
        for axes, places in alike.items():
            found = self.xp.stack([norms[i] for i in places])
            for axis in axes:
                found = self.joined(found, order, axis)
            for i, whole in zip(places, found, strict=True):
                norms[i] = whole
        total = self.xp.stack(norms)
        return total if over == "tensor" else self.norm(total, order)

    def agreed(self, info: Any) -> Any:
        """Return a report whose flag is that of all devices."""
        clipped = info.clipped
        for axis in self.cut_along(clipped):
            clipped = self.jax.lax.pmax(clipped.astype("int32"), axis) > 0
        return info._replace(clipped=clipped)

    def cut_along(self, x: Array) -> tuple[str, ...]:
        """Return the axes along which an array differs: all, where JAX cannot tell."""
        index = self.jax.lax.axis_index
        # An index differs along its axis: if its type does not say so, no type does.
        return tuple(
            axis
            for axis in self.axes
            if self.varies(x, axis) or not self.varies(index(axis), axis)
        )

    def varies(self, x: Array, axis: str) -> bool:
        """Return whether the type of an array says that it differs along an axis."""
        kind = self.jax.typeof(x)
        # What was `vma` of a type has moved in later releases of JAX.
        kind = getattr(kind, "manual_axis_type", kind)
        return axis in getattr(kind, "varying", getattr(kind, "vma", ()))

    def joined(self, norms: Array, p: float, axis: str) -> Array:
        """Return the norms of vectors whose pieces have these norms."""
        xp, lax = self.xp, self.jax.lax
        finite = xp.isfinite(norms)
        largest = lax.pmax(xp.where(finite, norms, 0.0), axis)
        # A maximum over devices may lose a NaN, a sum does not.
        if math.isinf(p):
            return largest + lax.psum(xp.where(finite, 0.0, norms), axis)
        unit = xp.where(largest > 0, largest, 1.0)
        return unit * self.rooted(lax.psum((norms / unit) ** p, axis), p)
