"""U-Clip: what a clip cuts off is added to the next gradient, so none of it is lost."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradclip.arrays import Clipper, dense
from gradclip.backends import Backend, find_backend, is_half
from gradclip.decision import Info
from gradclip.host import host_array
from gradclip.memory import as_array, check_mapping, coded, damaged, decoded
from gradclip.rules import Array
from gradclip.trees import Grads, dotted, flatten, named_leaves, rebuild


class UClip(Clipper):
    r"""Clip with a memory of what was cut off, which removes the bias of clipping.

    $u_t = \operatorname{clip}(g_t + \Delta_t)$, and
    $\Delta_{t+1} = g_t + \Delta_t - u_t$

    The memory is as large as the gradients, and in float32 for those in half precision.
    A step that is dropped leaves it as it was.

    Args:
        rule: Any rule that cuts something off.
        on_nonfinite: As for `Clipper`.
        max_consecutive_skips: As for `Clipper`.
        history: As for `Clipper`.

    Raises:
        TypeError: If `rule` is not a rule, or `history` no history.
        ValueError: For an unknown policy, and for fewer than one skip in a row.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.UClip(gc.Value(1.0))
        >>> [float(clipper.clip(np.array(g))[0]) for g in (2.5, 0.0, 0.0, 0.0)]
        [1.0, 1.0, 0.5, 0.0]

    Reference:
        Elesedy, Hutter: U-Clip: on-average unbiased stochastic gradient clipping.
        arXiv 2302.02971, 2023.
    """

    carried: list[Array] | None = None
    _names: list[str] | None = None

    def clip(
        self, grads: Grads, *, params: Any = None, out: Any = None
    ) -> tuple[Grads, Info]:
        """Clip the gradients together with what was cut off so far.

        Args:
            grads: As for `Clipper.clip`.
            params: As for `Clipper.clip`.
            out: As for `Clipper.clip`.

        Returns:
            The clipped gradients and an `Info` about the sum that was clipped.

        Raises:
            TypeError: For a sparse tensor.
            ValueError: For other gradients than those that something is carried for;
                nothing is changed then.
        """
        named = named_leaves(grads)
        engine = find_backend(named)
        near = dense(engine, named)
        # Copies, since `out` may be the gradients themselves.
        given = [_wide(x + 0, engine.xp) for x in near]
        names = [dotted(where) for where, _ in named]
        # Where keys have dots in them, two tensors may come to one name.
        if len(set(names)) < len(names):
            names = [where for where, _ in named]
        carried = self._carried_for(names, given, engine)
        total = [x + d for x, d in zip(given, carried, strict=True)]
        pairs = zip(total, near, strict=True)
        narrow = (_as_before(x, g, engine.xp) for x, g in pairs)
        clipped, info = super().clip(rebuild(grads, narrow), params=params, out=out)
        if bool(info.kept & (info.finite | (self.on_nonfinite == "zero"))):
            after = [x for _, x in flatten(clipped)]
            rest = [x - u for x, u in zip(total, after, strict=True)]
            self._carry(rest, carried, engine)
            self._names = names
        return clipped, info

    def _carry(self, rest: list[Array], carried: list[Array], engine: Backend) -> None:
        """Keep what was cut off for the next step."""
        # With on_nonfinite="zero" an element may be NaN: what it had has to wait.
        xp = engine.xp
        left = [
            xp.where(xp.isfinite(now), now, before)
            for now, before in zip(rest, carried, strict=True)
        ]
        (lasting,) = engine.lasting([dict(enumerate(left))])
        self.carried = list(lasting.values())

    def _carried_for(
        self, names: list[str], given: list[Array], engine: Backend
    ) -> list[Array]:
        """Return what is carried for these gradients, in their order and types."""
        if self.carried is None:
            return [engine.xp.zeros_like(x) for x in given]
        # One array alone has no name, as what earlier versions saved.
        known = dict(zip(self._names or names, self.carried, strict=False))
        missing = [repr(name) for name in names if name not in known]
        if missing and len(self.carried) == len(names):
            raise ValueError(
                f"UClip carries what was cut off of {', '.join(map(repr, known))}, and "
                f"nothing for {', '.join(missing)}; hand over the same gradients at "
                "every step."
            )
        shapes = [tuple(known[name].shape) for name in names if name in known]
        now = [tuple(x.shape) for x in given]
        if len(self.carried) != len(names) or shapes != now:
            raise ValueError(
                f"UClip carries {len(self.carried)} arrays of shapes "
                f"{[tuple(d.shape) for d in self.carried]}, and the gradients have the "
                f"shapes {now}; hand over the same gradients at every step."
            )
        pairs = zip(names, given, strict=True)
        return [
            engine.xp.astype(engine.adopt(known[name], x), x.dtype) for name, x in pairs
        ]

    def state_dict(self) -> dict[str, Array]:
        """Return the memory of the rule, and what is carried, as NumPy arrays."""
        saved = super().state_dict()
        for i, d in enumerate(self.carried or []):
            saved[f"carried.{i}"] = host_array(d).copy()
        return saved | {"carried_names": coded(self._names or ())}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Go on from a saved memory, exactly.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If it was saved by another rule, or by a clipper that carries
                nothing, or if it is damaged; nothing is changed then.
        """
        check_mapping(state)
        own = {name: x for name, x in state.items() if name.startswith("carried")}
        if not own:
            raise ValueError(
                "this state has nothing that was carried over; it was saved by a "
                "Clipper, and not by a UClip."
            )
        carried, names = _carried_in(own)
        self._check_shapes(carried, names)
        # This one may refuse, too, and nothing has changed until then.
        super().load_state_dict({k: x for k, x in state.items() if k not in own})
        self.carried, self._names = carried or None, names or None

    def _check_shapes(self, carried: list[Array], names: list[str]) -> None:
        """Refuse what was carried for gradients of other shapes than those here."""
        now = dict(zip(self._names or (), self.carried or (), strict=False))
        for name, x in zip(names, carried, strict=False):
            if name in now and tuple(now[name].shape) != x.shape:
                raise ValueError(
                    f"the state has {x.shape} for what is carried of {name!r}, but "
                    f"this clipper carries {tuple(now[name].shape)}; it was saved with "
                    "other gradients."
                )


def _carried_in(own: Mapping[str, Array]) -> tuple[list[NDArray[Any]], list[str]]:
    """Return copies of what was carried, and the names of the gradients if any."""
    names = decoded(own.get("carried_names", ()), "carried_names")
    arrays = {name: x for name, x in own.items() if name != "carried_names"}
    order = [f"carried.{i}" for i in range(len(arrays))]
    if gone := [name for name in order if name not in arrays]:
        raise damaged(f"{gone[0]!r} is missing among {len(arrays)} carried arrays")
    # One array alone has no name, and earlier versions saved none.
    nameless = not names and (len(arrays) == 1 or "carried_names" not in own)
    if len(names) != len(arrays) and not nameless:
        raise damaged(f"it carries {len(arrays)} arrays for {len(names)} names")
    carried = [host_array(as_array(name, arrays[name])).copy() for name in order]
    for name, x in zip(order, carried, strict=True):
        # Its NaN would be in each gradient to come, and every step be dropped.
        if not np.isfinite(x).all():
            raise damaged(f"it has NaN or infinity for {name!r}")
    return carried, names


def _wide(x: Array, xp: Any) -> Array:
    """Return an array in a type that what is carried does not overflow."""
    return xp.astype(x, xp.float32) if is_half(x, xp) else x


def _as_before(x: Array, like: Array, xp: Any) -> Array:
    """Return a sum in the type of a gradient; what that cannot hold stays carried."""
    if x.dtype == like.dtype:
        return x
    most = float(xp.finfo(like.dtype).max)
    # A gradient that is not finite has to show.
    return xp.astype(
        xp.where(xp.isfinite(like), xp.clip(x, -most, most), x), like.dtype
    )
