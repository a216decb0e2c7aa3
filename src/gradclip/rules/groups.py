"""Groups: each tensor has the rule of the first pattern that fits its name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from gradclip.rules.base import Array, Measured, Rule, Scope, Shape, State
from gradclip.rules.chaining import stages
from gradclip.rules.keys import owned, under
from gradclip.rules.norm import Norm
from gradclip.rules.parts import constants, norm_of, share


@dataclass(frozen=True)
class Groups(Rule):
    """Other rules for other tensors, by name; made by `by_name`."""

    rules: tuple[tuple[str, Rule], ...]
    members: tuple[int, ...] = ()
    over: Scope = field(default="tensor", init=False)

    by_place = True

    def __post_init__(self) -> None:
        """Refuse what cannot be decided from one kind of norms, and find out which."""
        for pattern, rule in self.rules:
            if rule.over not in ("all", "tensor", "unit") or not _fits(rule):
                raise ValueError(
                    f"by_name({{{pattern!r}: {rule!r}}}): a group takes one rule over "
                    "'all', each 'tensor' or each 'unit' that limits 2-norms; hand "
                    "such parameters to a clipper of their own."
                )
        axes = {rule.axis for _, rule in self.rules if rule.over == "unit"}
        if len(axes) > 1:
            raise ValueError(
                f"by_name(): the groups count units along the axes {sorted(axes)}; "
                "give them one axis, or a clipper each."
            )
        object.__setattr__(self, "over", "unit" if axes else "tensor")
        object.__setattr__(self, "axis", max(axes, default=0))
        for flag in ("needs_weight", "needs_shape", "stretches"):
            object.__setattr__(self, flag, any(getattr(r, flag) for r in self.within()))

    @property
    def stateful(self) -> bool:
        """Whether any of the rules remembers anything."""
        return any(rule.stateful for _, rule in self.rules)

    @property
    def grows(self) -> bool:
        """Whether the memory of any of the rules gets larger in time."""
        return any(rule.grows for _, rule in self.rules)

    @property
    def kind(self) -> str:
        """The patterns, and the kinds of their rules."""
        kinds = (f"{pattern!r}: {rule.kind}" for pattern, rule in self.rules)
        return f"by_name({{{', '.join(kinds)}}})"

    def within(self) -> Sequence[Rule]:
        """Return the rules that say the limits: those of the groups."""
        return [rule for _, rule in self.rules]

    def bind(self, names: Sequence[str], shapes: Sequence[Shape]) -> Rule:
        """Return the rule that knows which tensor is in which group."""
        members = tuple(map(self._group, names))
        bound = []
        for i, (pattern, rule) in enumerate(self.rules):
            # To a rule over all of its group, the others are empty.
            mine = [s if members[k] == i else (0,) for k, s in enumerate(shapes)]
            bound.append((pattern, rule.bind(names, mine)))
        return Groups(tuple(bound), members)

    def _group(self, name: str) -> int:
        for i, (pattern, _) in enumerate(self.rules):
            if fnmatchcase(name, pattern):
                return i
        raise ValueError(
            f"by_name(): no pattern fits {name!r}; end with '*': None to leave the "
            "others as they are."
        )

    def companion(self, place: int, known: Sequence[int]) -> int | None:
        """Return a tensor of the same group, where the group is taken together."""
        group = self.members[place]
        if self.rules[group][1].over != "all":
            return None
        return next((k for k in known if self.members[k] == group), None)

    def remembers(self, norm: Array) -> Shape:
        """Return the shape of the memory: a place for each tensor, not each unit."""
        return (len(self.members),) if self.over == "unit" else tuple(norm.shape)

    def init(self, norm: Array, xp: Any) -> State:
        """Return the memories of all rules, each with a place for every tensor."""
        if self.over == "unit":
            # Zeros like the norms; a view would have one place for all of them.
            norm = xp.broadcast_to(0 * xp.sum(norm), (len(self.members),)) + 0
        memories = [owned(i, r.init(norm, xp)) for i, (_, r) in enumerate(self.rules)]
        return {key: x for memory in memories for key, x in memory.items()}

    def most(self, seen: Measured) -> Array | float:
        """Return how large the scale of each cell may be: that of its own rule."""
        if not self.stretches:
            return 1.0
        most = [math.inf if rule.stretches else 1.0 for _, rule in self.rules]
        # Taken at once: compiled code cannot look a place up by a number of its own.
        return constants(np.asarray(most)[self._places(seen)], seen.norm, seen.xp)

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit of each cell: its own, or its share of a larger one's."""
        if not self.members:
            # A masked optimizer may have no gradients.
            return seen.norm, state
        if self.over == "tensor":
            return self._by_tensor(seen, state)
        norm = _joined(seen, seen.norm)
        weight = None if seen.weight is None else _joined(seen, seen.weight)
        absent = constants([count == 0 for count in seen.units], seen.norm, seen.xp)
        whole = seen._replace(norm=norm, weight=weight, absent=absent)
        limit, updated = self._by_tensor(whole, state)
        return self._by_unit(seen, norm, limit), updated

    def _by_tensor(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limits of tensors, infinite for those with rules over units."""
        xp, updated = seen.xp, dict(state)
        limit = xp.full_like(seen.norm, math.inf)
        for i, (_, rule) in enumerate(self.rules):
            if rule.over == "unit":
                continue
            mine = constants([member == i for member in self.members], seen.norm, xp)
            norm = total = xp.where(mine, seen.norm, math.nan)
            if rule.over == "all":
                here = mine if seen.absent is None else mine & ~seen.absent
                # Without the bad one, the others would be held by a part of their norm.
                broken = xp.any(here & ~xp.isfinite(seen.norm))
                total = xp.where(mine & ~broken, norm_of(norm, xp), math.nan)
            memory = under(i, state)
            most, memory = rule.update(seen._replace(norm=total), memory)
            limit = xp.where(mine, share(most, norm, total, xp), limit)
            updated |= owned(i, memory)
        return limit, updated

    def _by_unit(self, seen: Measured, norm: Array, limit: Array) -> Array:
        """Return the limits of units, from those of tensors where the rule is such."""
        xp, places = seen.xp, self._places(seen)
        tensor = constants(_tensor_of(seen), seen.norm, xp)
        norm, limit = xp.take(norm, tensor, axis=0), xp.take(limit, tensor, axis=0)
        limit = share(limit, seen.norm, norm, xp)
        for i, (_, rule) in enumerate(self.rules):
            if rule.over == "unit":
                own, _ = rule.update(seen, {})
                limit = xp.where(constants(places == i, seen.norm, xp), own, limit)
        return limit

    def _places(self, seen: Measured) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Return the group of each cell."""
        members = np.asarray(self.members)
        return members if self.over == "tensor" else members[_tensor_of(seen)]

    def __repr__(self) -> str:
        """Show the call that makes this rule."""
        rules = (f"{pattern!r}: {rule!r}" for pattern, rule in self.rules)
        return f"by_name({{{', '.join(rules)}}})"


def by_name(rules: Mapping[str, Rule | None]) -> Rule:
    r"""Give each tensor the rule of the first pattern that fits its name.

    $g_k \leftarrow g_k \cdot \min(1, c_k / \lVert g_k \rVert)$ for each group $k$

    All norms are measured at once, whatever the number of groups, and `info` has one
    number per tensor: for a rule over `"all"` of its group, the tensor's share. With a
    rule over units among them, it has one number per unit of every tensor.

    Args:
        rules: From patterns, as for file names (`"embed.*"`), to rules over `"all"` of
            the group, each `"tensor"` or each `"unit"`; None leaves the group as it is.
            Names are those of torch parameters, or the keys of a dict of arrays joined
            by dots.

    Returns:
        One rule, to be used wherever a rule is.

    Raises:
        TypeError: If something handed over is not a rule.
        ValueError: For a rule that needs another kind of norms and, when gradients
            come, for a name that no pattern fits.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> rule = gc.by_name({"head": None, "*": gc.Norm(1.0)})
        >>> grads = {"body": np.array([3.0, 4.0]), "head": np.array([30.0])}
        >>> clipped, _ = gc.clip(grads, rule)
        >>> {name: g.round(4).tolist() for name, g in clipped.items()}
        {'body': [0.6, 0.8], 'head': [30.0]}
    """
    if not isinstance(rules, Mapping):
        raise TypeError(f"by_name({rules!r}): give a dictionary such as {{'*': rule}}.")
    for pattern, rule in rules.items():
        if rule is not None and not isinstance(rule, Rule):
            raise TypeError(
                f"by_name({{{pattern!r}: {rule!r}}}): give a rule such as Norm(1.0), "
                "or None."
            )
    if not rules:
        raise ValueError("by_name({}): give at least one pattern, as in {'*': rule}.")
    free = Norm(math.inf, over="tensor")
    return Groups(tuple((name, rule or free) for name, rule in rules.items()))


def _fits(rule: Rule) -> bool:
    """Return whether a rule gives one limit to 2-norms, rescales, and has no groups."""
    plain = len(stages(rule)) == 1 and not isinstance(rule, Groups)
    return rule.p == 2 and not rule.drops and plain


def _tensor_of(seen: Measured) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return which tensor each unit is of."""
    return np.repeat(np.arange(len(seen.units)), seen.units)


def _joined(seen: Measured, norms: Array) -> Array:
    """Return the norm of each tensor from those of its units; NaN for none."""
    xp, ends = seen.xp, list(accumulate(seen.units, initial=0))
    none = xp.reshape(xp.sum(norms) * math.nan, (1,))
    # `norm_of` leaves out what is not finite, which has to show in its tensor.
    known = xp.where(xp.isfinite(norms), xp.zeros_like(norms), math.nan)
    parts = [
        xp.reshape(norm_of(norms[a:b], xp) + xp.sum(known[a:b]), (1,))
        if a < b
        else none
        for a, b in pairwise(ends)
    ]
    return xp.concat(parts)
