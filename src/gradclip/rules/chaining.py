"""Chains: one rule after the other, each measuring what the last one left."""

from collections.abc import Sequence
from dataclasses import dataclass

from gradclip.rules.base import Rule, Shape


@dataclass(frozen=True)
class Chain(Rule):
    """Several rules, one after the other; made by `chain`."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        """Take over what any of the rules has to be shown."""
        needs = any(rule.needs_weight for rule in self.rules)
        object.__setattr__(self, "needs_weight", needs)

    @property
    def stateful(self) -> bool:
        """Whether any of the rules remembers anything."""
        return any(rule.stateful for rule in self.rules)

    @property
    def kind(self) -> str:
        """The kinds of the rules, in order."""
        return f"chain({', '.join(rule.kind for rule in self.rules)})"

    @property
    def grows(self) -> bool:
        """Whether the memory of any of the rules gets larger in time."""
        return any(rule.grows for rule in self.rules)

    def bind(self, names: Sequence[str], shapes: Sequence[Shape]) -> Rule:
        """Return the chain for tensors of these names and shapes."""
        return Chain(tuple(rule.bind(names, shapes) for rule in self.rules))

    def __repr__(self) -> str:
        """Show the call that makes this chain."""
        return f"chain({', '.join(map(repr, self.rules))})"


def chain(*rules: Rule) -> Rule:
    r"""Apply one rule after the other, each measuring what the last one left.

    $g \leftarrow r_n(… r_2(r_1(g)))$

    Args:
        rules: One rule or more; chains among them are laid out flat.

    Returns:
        One rule, to be used wherever a rule is.

    Raises:
        TypeError: If something handed over is not a rule.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> rule = gc.chain(gc.Value(3.0), gc.Normalize())
        >>> gc.clip(np.array([30.0, 4.0]), rule)[0].round(4).tolist()
        [0.7071, 0.7071]
    """
    if not rules:
        raise TypeError("chain(): give at least one rule, as in chain(Norm(1.0)).")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(
                f"chain(): {rule!r} is not a rule; use one such as Norm(1.0)."
            )
    flat = [part for rule in rules for part in stages(rule)]
    return flat[0] if len(flat) == 1 else Chain(rules=tuple(flat))


def stages(rule: Rule) -> tuple[Rule, ...]:
    """Return the rules that a rule is made of, in the order they are applied."""
    return rule.rules if isinstance(rule, Chain) else (rule,)
