"""Skipping: a step beyond the limit is dropped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradclip.rules.base import Array, Measured, Rule, Shape, State
from gradclip.rules.chaining import stages
from gradclip.rules.keeping import held


@dataclass(frozen=True)
class Skip(Rule):
    r"""Drop the whole step when a rule's limit is passed, instead of rescaling it.

    $g \leftarrow g$ if $\lVert g \rVert \le c_t$, else no step

    The norm of a step that was dropped is kept out of the rule's memory, so that one
    spike does not hide the next. On NumPy and JAX the gradients become 0; with
    `gradclip.torch` parameters and optimizer state stay as they were, to the bit.

    Args:
        rule: The rule that gives the limit; with several norms one of them is enough.

    Raises:
        TypeError: If `rule` is not a rule.
        ValueError: For rules whose limit is no reason to drop a step: those that act at
            every step (`Normalize`, `Smooth`), stretch (`Band`) or look inside tensors
            (`Moment`, `over="singular"`); and for a chain: write `chain(a, Skip(b))`.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> grads, info = gc.clip(np.array([30.0, 40.0]), gc.Skip(gc.Norm(10.0)))
        >>> grads.tolist(), float(info.norm), float(info.scale), bool(info.kept)
        ([0.0, 0.0], 50.0, 0.0, False)

    Reference:
        OLMo-core, `SkipStepOptimizer`, which looks at the loss as well,
        github.com/allenai/OLMo-core.
    """

    rule: Rule

    drops = True

    def __post_init__(self) -> None:
        """Take over what the rule asks to be measured."""
        rule = self.rule
        if not isinstance(rule, Rule):
            raise TypeError(f"Skip({rule!r}): give a rule, as in Skip(Norm(10.0)).")
        special = rule.stretches or rule.bends or rule.drops or rule.by_part
        if len(stages(rule)) > 1 or special:
            raise ValueError(
                f"Skip({rule!r}): give one rule with a limit that most steps keep, as "
                "in chain(a, Skip(b))."
            )
        for name in ("over", "p", "axis", "by_place", "needs_weight", "needs_shape"):
            object.__setattr__(self, name, getattr(rule, name))

    @property
    def stateful(self) -> bool:
        """Whether the rule remembers anything."""
        return self.rule.stateful

    @property
    def kind(self) -> str:
        """The kind of the rule inside."""
        return f"Skip({self.rule.kind})"

    @property
    def grows(self) -> bool:
        """Whether the memory of the rule gets larger in time."""
        return self.rule.grows

    def within(self) -> Sequence[Rule]:
        """Return the rules that say the limits: those of the rule inside."""
        return self.rule.within()

    def bind(self, names: Sequence[str], shapes: Sequence[Shape]) -> Rule:
        """Return the rule for tensors of these names and shapes."""
        return Skip(self.rule.bind(names, shapes))

    def companion(self, place: int, known: Sequence[int]) -> int | None:
        """Return the tensor that a new one shares the memory of the rule with."""
        return self.rule.companion(place, known)

    def remembers(self, norm: Array) -> Shape:
        """Return the shape that the memory of the rule ends in."""
        return self.rule.remembers(norm)

    def init(self, norm: Array, xp: Any) -> State:
        """Return the memory of the rule."""
        return self.rule.init(norm, xp)

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit of the rule; a norm above it teaches it nothing."""
        limit, updated = self.rule.update(seen, state)
        # What is not finite is for the policy to judge.
        passed = seen.xp.isfinite(seen.norm) & (seen.norm > limit)
        kept = ~seen.xp.any(passed)
        return limit, held(updated, state, kept, seen.xp)

    def __repr__(self) -> str:
        """Show the call that makes this rule."""
        return f"Skip({self.rule!r})"
