"""Groups: each tensor has the rule of the first pattern that fits its name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from gradclip.rules.base import Array, Measured, Rule, Scope, State
from gradclip.rules.chaining import stages
from gradclip.rules.norm import Norm
from gradclip.rules.parts import norm_of


@dataclass(frozen=True)
class Groups(Rule):
    """Other rules for other tensors, by name; made by `by_name`."""

    rules: tuple[tuple[str, Rule], ...]
    members: tuple[int, ...] = ()
    over: Scope = "tensor"

    by_place = True

    def __post_init__(self) -> None:
        """Refuse what cannot be decided from the norms of tensors."""
        for pattern, rule in self.rules:
            special = rule.stretches or rule.drops or len(stages(rule)) > 1
            if special or rule.over not in ("all", "tensor") or rule.p != 2:
                raise ValueError(
                    f"by_name({{{pattern!r}: {rule!r}}}): a group takes one rule over "
                    "'all' or each 'tensor' that limits 2-norms; hand such parameters "
                    "to a clipper of their own."
                )
        needs = any(rule.needs_weight for _, rule in self.rules)
        object.__setattr__(self, "needs_weight", needs)

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

    def bind(self, names: Sequence[str]) -> Rule:
        """Return the rule that knows which tensor is in which group."""
        return replace(self, members=tuple(map(self._group, names)))

    def _group(self, name: str) -> int:
        for i, (pattern, _) in enumerate(self.rules):
            if fnmatchcase(name, pattern):
                return i
        raise ValueError(
            f"by_name(): no pattern fits {name!r}; end with '*': None to leave the "
            "others as they are."
        )

    def init(self, norm: Array, xp: Any) -> State:
        """Return the memories of all rules, each with a place for every tensor."""
        return {
            f"{i}.{name}": x
            for i, (_, rule) in enumerate(self.rules)
            for name, x in rule.init(norm, xp).items()
        }

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit of each tensor: its own, or its share of the group's."""
        xp, updated = seen.xp, dict(state)
        limit = xp.full_like(seen.norm, math.inf)
        for i, (_, rule) in enumerate(self.rules):
            mine = _on_device([member == i for member in self.members], seen.norm, xp)
            norm = total = xp.where(mine, seen.norm, math.nan)
            if rule.over == "all":
                total = xp.where(mine, norm_of(norm, xp), math.nan)
            prefix = f"{i}."
            memory = {
                name.removeprefix(prefix): x
                for name, x in state.items()
                if name.startswith(prefix)
            }
            most, memory = rule.update(seen._replace(norm=total), memory)
            share = norm / xp.where(total > 0, total, 1.0)
            limit = xp.where(mine, xp.where(xp.isinf(most), most, most * share), limit)
            updated |= {prefix + name: x for name, x in memory.items()}
        return limit, updated

    def __repr__(self) -> str:
        """Show the call that makes this rule."""
        rules = (f"{pattern!r}: {rule!r}" for pattern, rule in self.rules)
        return f"by_name({{{', '.join(rules)}}})"


def by_name(rules: Mapping[str, Rule | None]) -> Rule:
    r"""Give each tensor the rule of the first pattern that fits its name.

    $g_k \leftarrow g_k \cdot \min(1, c_k / \lVert g_k \rVert)$ for each group $k$

    All norms are measured at once, whatever the number of groups, and `info` has one
    number per tensor: for a rule over `"all"` of its group, the tensor's share.

    Args:
        rules: From patterns, as for file names (`"embed.*"`), to rules over `"all"` of
            the group or each `"tensor"`; None leaves the group as it is. Names are
            those of torch parameters, or the keys of a dict of arrays joined by dots.

    Returns:
        One rule, to be used wherever a rule is.

    Raises:
        TypeError: If something handed over is not a rule.
        ValueError: For a rule that norms of tensors do not suffice for and, when
            gradients come, for a name that no pattern fits.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> rule = gc.by_name({"head": None, "*": gc.Norm(1.0)})
        >>> grads = {"body": np.array([3.0, 4.0]), "head": np.array([30.0])}
        >>> clipped, _ = gc.clip(grads, rule)
        >>> {name: g.round(4).tolist() for name, g in clipped.items()}
        {'body': [0.6, 0.8], 'head': [30.0]}
    """
    for pattern, rule in rules.items():
        if rule is not None and not isinstance(rule, Rule):
            raise TypeError(
                f"by_name({{{pattern!r}: {rule!r}}}): give a rule such as Norm(1.0), "
                "or None."
            )
    if not rules:
        raise ValueError("by_name({}): give at least one pattern, as in {'*': rule}.")
    free = Norm(math.inf)
    return Groups(tuple((name, rule or free) for name, rule in rules.items()))


def _on_device(values: Sequence[Any], norm: Array, xp: Any) -> Array:
    """Return constants as an array on the device of the norms."""
    # A traced array has no device, and needs none.
    return xp.asarray(values, device=getattr(norm, "device", None))
