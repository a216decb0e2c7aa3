"""What all rules share: what they see, what they remember, what they answer."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

Array: TypeAlias = Any
State: TypeAlias = dict[str, Array]
Shape: TypeAlias = tuple[int, ...]
Scope: TypeAlias = Literal["all", "tensor", "unit", "element", "singular"]


class Measured(NamedTuple):
    """What a rule gets to see at one step."""

    norm: Array
    """Norms before clipping, one per cell of the scope."""
    weight: Array | None
    """Norms of the parameters, cell for cell; only where `needs_weight`."""
    step: Any
    """How many steps came before."""
    xp: Any
    """The array namespace that the norms belong to."""
    units: Sequence[int] = ()
    """How many units each tensor has, 0 without a gradient; only over `"unit"`."""
    scheduled: Mapping[int, Any] = MappingProxyType({})
    """Limits at this step by the `id` of their schedule or array, if asked already."""
    absent: Array | None = None
    """Which cells have no gradient, whose norm is NaN; only over `"tensor"`."""
    top: Any = None
    """The largest modulus of the tensor that the elements belong to, 0-d.

    Where processes have parts of it, it is that of the whole.
    """


class Rule:
    r"""A rule: from norms and a memory to limits, and the memory for the next step.

    $c_t, s_{t+1} = \text{update}(\lVert g_t \rVert, s_t)$

    A rule of one's own is a frozen dataclass with an `update`, and with an `init` and
    `stateful = True` if it remembers anything.

    Raises:
        TypeError: For an axis that is no integer.
        ValueError: For a scope that is not among `scopes`.

    Example:
        >>> from dataclasses import dataclass
        >>> import gradclip as gc, numpy as np
        >>> @dataclass(frozen=True)
        ... class Half(gc.Rule):
        ...     def update(self, seen, state):
        ...         return seen.norm / 2, state
        >>> gc.clip(np.array([3.0, 4.0]), Half())[0].round(4).tolist()
        [1.5, 2.0]
    """

    over: Scope = "all"
    p: float = 2.0
    axis: int = 0

    scopes: ClassVar[tuple[Scope, ...]] = ("all", "tensor")
    stretches: ClassVar[bool] = False
    """Whether the scale may be above 1."""
    bends: ClassVar[bool] = False
    """Whether the limit of a cell grows with its norm, so that elements differ."""
    drops: ClassVar[bool] = False
    """Whether passing the limit drops the whole step."""
    by_place: ClassVar[bool] = False
    """Whether it matters which tensor a norm belongs to, also without a memory."""
    by_part: ClassVar[bool] = False
    """Whether it looks inside one tensor at a time, at elements or singular values."""
    borrows: ClassVar[bool] = False
    """Whether its memory is that of an optimizer, which only `attach` knows."""
    needs_weight: ClassVar[bool] = False
    needs_shape: ClassVar[bool] = False
    """Whether the shapes of the tensors matter, which norms alone do not tell."""

    def __post_init__(self) -> None:
        """Refuse a scope for which the method has no meaning."""
        if self.over not in self.scopes:
            known = ", ".join(repr(scope) for scope in self.scopes)
            raise ValueError(
                f"{type(self).__name__}(over={self.over!r}): the norm is taken over "
                f"one of {known}."
            )
        if not hasattr(self.axis, "__index__"):
            raise TypeError(
                f"{type(self).__name__}(axis={self.axis!r}): an axis is an integer."
            )
        # Over other scopes, the same rule looks at tensors as a whole.
        if self.over == "singular":
            object.__setattr__(self, "by_part", True)

    @property
    def stateful(self) -> bool:
        """Whether the rule remembers anything from one step to the next."""
        return False

    @property
    def kind(self) -> str:
        """What a saved memory has to match: the method and its scope."""
        return f"{type(self).__name__}(over={self.over!r})"

    @property
    def grows(self) -> bool:
        """Whether the memory gets larger in time, which compiled code cannot do."""
        return False

    def bind(self, names: Sequence[str], shapes: Sequence[Shape]) -> "Rule":
        """Return the rule for tensors of these names and shapes; most do not care.

        Args:
            names: The name of each tensor, in the order of the gradients.
            shapes: Their shapes; `()` where only norms are known.

        Returns:
            The rule itself, or one that knows more.
        """
        return self

    def within(self) -> "Sequence[Rule]":
        """Return the rules that say the limits: itself, unless it asks others."""
        return (self,)

    def most(self, seen: Measured) -> Array | float:
        """Return how large the scale may be.

        Args:
            seen: The norms, as in `update`.

        Returns:
            One number, or one for each norm; infinity for a rule that stretches.
        """
        return math.inf if self.stretches else 1.0

    def companion(self, place: int, known: Sequence[int]) -> int | None:
        """Return which known tensor a new one shares its memory with, if any.

        Args:
            place: The place of the new tensor among all of them.
            known: The places of those that something is remembered of.

        Returns:
            One of `known`, or None.
        """
        return None

    def remembers(self, norm: Array) -> Shape:
        """Return the shape that its memory ends in, for norms shaped like `norm`.

        Args:
            norm: The norms: 0-d over `"all"`, else one per tensor or unit.

        Returns:
            The last axes of each array of the memory.
        """
        return tuple(norm.shape)

    def init(self, norm: Array, xp: Any) -> State:
        """Return the memory before the first step, for norms shaped like `norm`.

        Args:
            norm: The norms of the first step; only their shape, type and device matter.
            xp: Their array namespace.

        Returns:
            Arrays by name; empty for a rule without memory.
        """
        return {}

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit for the norms seen, and the memory for the next step.

        Nothing is changed in place, and no number is read: `seen.xp.where` chooses.

        Args:
            seen: The norms of this step and what belongs to them; `seen.norm` is in the
                unit of the gradient norm, and may hold 0, NaN and infinity.
            state: The memory, as `init` or the step before returned it.

        Returns:
            The largest norm let through, in the shape of `seen.norm`, and the memory
            under the same names.
        """
        raise NotImplementedError
