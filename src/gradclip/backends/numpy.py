"""NumPy arrays: norms in cache-sized chunks, flags read at once."""

import math
from collections.abc import Sequence
from operator import is_, itemgetter
from typing import Any

import array_api_compat.numpy as xp_numpy
import numpy as np
from numpy.lib.array_utils import byte_bounds

from gradclip.backends.base import (
    CHUNK,
    ROW,
    Backend,
    at_most,
    described,
    inward,
)
from gradclip.backends.rows import PICKED, Rows, cut, row_squares, squares_apart
from gradclip.backends.short import fits_short, short_total
from gradclip.rules import Array, Rule, Scope
from gradclip.scalars import NUMBERS, Scalars, one_number


class NumPy(Backend):
    """NumPy: norms in cache-sized chunks, flags read at once, results in place."""

    def __init__(self, out: dict[int, Array] | None = None) -> None:
        """Sum in float64; `out` gives the place of a result by the id of its source."""
        super().__init__(xp_numpy, np.float64)
        self.out = out or {}

    def prepare(self, x: Array, where: str) -> Array:
        """Return `x` in a type that can hold clipped values."""
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(
                f"gradients{where} is a masked array, whose hidden elements would "
                "count; hand over x.filled(0)."
            )
        x = np.asarray(x)
        if x.dtype.kind not in "biufc":
            raise TypeError(
                f"gradients{where} has dtype {x.dtype}; clipping needs numbers, as in "
                "x.astype(float)."
            )
        return x.astype(np.float64) if x.dtype.kind in "biu" else x

    def deciding(self, rule: Rule) -> Backend:
        """Return the same verbs, in which a rule is quick about a single norm."""
        if one_number(rule):
            # What it keeps of arrays is not for threads.
            self.xp = Scalars()
        return self

    def measure(self, leaves: Sequence[Array], over: Scope, p: float) -> Array:
        """Return the norms of the scope; of a few arrays together by short rows."""
        if over == "all" and p == 2 and all(map(_is_plain, leaves)):
            sizes = [x.size for x in leaves]
            if fits_short(sizes) and (total := short_total(leaves, sizes)) is not None:
                return np.float64(total)
        return super().measure(leaves, over, p)

    def norms(self, leaves: Sequence[Array], p: float, apart: bool) -> Array:
        """Return the `p`-norms of arrays, large ones of float32 by rows if possible."""
        flats = [_flat(x) if p == 2 and _has_rows(x) else None for x in leaves]
        large = {i: flat for i, flat in enumerate(flats) if flat is not None}
        found = (_apart if apart else _together)(list(large.values()))
        known = dict(zip(large, found, strict=True))
        norms = map(known.get, range(len(leaves)))
        return np.asarray(
            [
                self.norm(x, p) if norm is None else norm
                for x, norm in zip(leaves, norms, strict=True)
            ]
        )

    def norm(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of all elements in float64, chunk by chunk."""
        # Memory order is fine: a norm does not depend on it, and nothing is copied.
        flat = x.ravel(order="K")
        if flat.size <= CHUNK:
            return self.chunk_norm(flat, p)
        chunks = range(0, flat.size, CHUNK)
        parts = [self.chunk_norm(flat[i : i + CHUNK], p) for i in chunks]
        return self.chunk_norm(np.asarray(parts), p)

    def chunk_norm(self, x: Array, p: float) -> Array:
        """Return the `p`-norm of a short vector."""
        if p == 2 and x.dtype.kind == "f":
            wide = x.astype(np.float64, copy=False)
            square = np.dot(wide, wide)
            # Outside, float64 itself may have over- or underflowed on the way.
            if 1e-280 < square < 1e300:
                return np.sqrt(square)
        return self.row_norms(x.reshape(1, -1), p)[0]

    def multiply(
        self, leaves: Sequence[Array], scale: Array, over: Scope
    ) -> list[Array]:
        """Return the gradients times their scale; one for all is rounded once."""
        if over != "all":
            return super().multiply(leaves, scale, over)
        factors = {dtype: _factor(scale, dtype) for dtype in {x.dtype for x in leaves}}
        return [self._product(x, factors[x.dtype]) for x in leaves]

    def times(self, x: Array, scale: Array) -> Array:
        """Return one gradient times its scale, in place where that was asked for."""
        return self._product(x, _factor(scale, x.dtype))

    def _product(self, x: Array, factor: Array) -> Array:
        out = self.out.get(id(x))
        if out is None:
            out = np.empty_like(x)
        return np.multiply(x, factor, out=out, casting="same_kind")

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
                    f"out has {described(target)} where the gradient has shape "
                    f"{x.shape} and dtype {x.dtype}; make it with np.empty_like."
                )
            if not target.flags.writeable:
                raise ValueError(
                    f"out has a read-only array of shape {x.shape}; hand over a copy."
                )
        if _share_memory(given, out):
            raise ValueError(
                "two of the gradients, or of out, share memory; hand over each once, "
                "or without out."
            )
        # Later stages are handed the results of earlier ones, and write there again.
        places = {id(x): target for x, target in zip(given, out, strict=True)}
        engine = NumPy(places | {id(target): target for target in out})
        engine.xp = self.xp
        return engine


def _share_memory(given: Sequence[Array], out: Sequence[Array]) -> bool:
    """Return whether arrays of two places have an element in common."""
    each = given if all(map(is_, given, out)) else [*given, *out]
    if len(set(map(id, each))) == len(each) and all(x.flags.owndata for x in each):
        # Each has memory of its own.
        return False
    places = [(i, x) for arrays in (given, out) for i, x in enumerate(arrays) if x.size]
    bounds = [(*byte_bounds(x), i, x) for i, x in places]
    beside: list[tuple[int, int, Array]] = []
    # Only those can share something that are still open where the next one begins.
    for begin, end, i, x in sorted(bounds, key=itemgetter(0)):
        beside = [(stop, j, y) for stop, j, y in beside if stop > begin]
        # A gradient may be the place of its own result.
        if any(i != j and np.shares_memory(x, y) for _, j, y in beside):
            return True
        beside.append((end, i, x))
    return False


def _factor(scale: Array, dtype: Any) -> Array:
    """Return what elements of a type are to be multiplied by."""
    eps = float(np.finfo(dtype).eps)
    scale = scale[()]  # An array of one number takes five times as long as it.
    xp = NUMBERS if isinstance(scale, float) else np
    scale = inward(scale, eps, xp)
    narrow = xp.all((scale > 1e-30) & (scale < 1e30))
    # float16 cannot hold the scale, and float32 not one for a norm of 1e38.
    return scale.astype(np.float32 if eps > 1e-12 and narrow else np.float64)


def _is_plain(x: Array) -> bool:
    """Return whether an array is one of float32 that lies in one piece."""
    return x.dtype == np.float32 and x.flags.c_contiguous


def _has_rows(x: Array) -> bool:
    """Return whether an array has enough rows of float32."""
    return x.dtype == np.float32 and x.size > PICKED * ROW // 2


def _flat(x: Array) -> Array | None:
    """Return all elements of an array as they lie; None where that takes a copy."""
    if x.flags.c_contiguous:
        return x.reshape(-1)
    axes = sorted(range(x.ndim), key=x.strides.__getitem__, reverse=True)
    dense = x.transpose(axes)
    return dense.reshape(-1) if dense.flags.c_contiguous else None


def _together(arrays: list[Array]) -> list[float | None]:
    """Return the 2-norm of all in the place of the first, or of each if in doubt."""
    rows = Rows(sum(x.size for x in arrays))
    for x in arrays:
        rows.add(cut(x, x.size, rows.width))
    if arrays and (total := rows.total()) is not None:
        return [total, *[0.0] * (len(arrays) - 1)]
    # One that is not finite should not send all others through float64.
    return _apart(arrays)


def _apart(arrays: list[Array]) -> list[float | None]:
    """Return the 2-norm of each; None where it is in doubt."""
    pieces = [cut(x, x.size, ROW) for x in arrays]
    with np.errstate(all="ignore"):
        found = squares_apart(pieces, row_squares)
    # Beyond these bounds float32 may have lost squares on the way.
    return [
        math.sqrt(square) if 1e-20 < square < math.inf and not doubt else None
        for square, doubt in found
    ]
