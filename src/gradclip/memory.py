"""What a clipper remembers between steps, as a flat dictionary of arrays.

Flat, and arrays only, so that every checkpoint format can hold it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import partial
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from gradclip.host import host_array
from gradclip.policy import NonFiniteError
from gradclip.rules import Array, Rule, State, stages
from gradclip.rules.keys import (
    by_place,
    name_and_place,
    name_within,
    owned,
    placed,
    prefix,
    under,
)
from gradclip.tensor_order import has_places, in_order
from gradclip.wording import counted, listed

COUNTERS = ("step", "skipped", "in_a_row")
SIGNED = {"rest", "limit"}
"""What may be below 0: what a sum has lost, and a `Quantile` that has lost too much.

That one begins anew there.
"""


def check_tensors(
    rule: Rule,
    states: Sequence[State | None],
    before: Sequence[str],
    now: Sequence[str],
) -> None:
    """Refuse tensors of which some are gone and others new: by place they would mix."""
    same = set(before) & set(now)
    mixed = len(before) == len(now) and 0 < len(same) < len(set(now))
    both = zip(stages(rule), states, strict=True)
    if mixed and any(state and has_places(stage) for stage, state in both):
        gone = next(name for name in before if name not in same)
        new = ", ".join(sorted({*now} - same))
        raise ValueError(
            f"{rule!r} remembers {gone!r}, which is not among the tensors now, while "
            f"others are new: {new}. Hand over the same gradients at every step."
        )


class Memory:
    """The state of each stage of a rule, and the counts of steps."""

    def __init__(self, rule: Rule, zero: Any = 0) -> None:
        """Start with nothing seen; a state of None is made from the first norms.

        `zero` is where the counts start: an integer, or an array of one.
        """
        self.rule = rule
        self.states: Sequence[State | None] = [None] * len(stages(rule))
        self.names: Sequence[str] = ()
        # Three arrays, not one under three names: compiled code minds the difference.
        self.step, self.skipped, self.in_a_row = zero + 0, zero + 0, zero + 0

    def meet(self, names: Sequence[str]) -> None:
        """Put what is remembered of each tensor in the order of the tensors now."""
        if self.names != names:
            check_tensors(self.rule, self.states, self.names, names)
            self.states = in_order(self.rule, self.states, self.names, names)
            # Other tensors are refused elsewhere, and leave the names as they were.
            same = not self.names or sorted(self.names) == sorted(names)
            self.names = names if same else self.names

    def count(self, missed: Any) -> None:
        """Count one step; `missed` is 1 where it was skipped, else 0."""
        self.step = self.step + 1
        if type(missed) is int and missed == 0:
            # Almost always, and each operation on a tensor takes microseconds.
            self.in_a_row = self.in_a_row * 0
            return
        self.skipped = self.skipped + missed
        self.in_a_row = (self.in_a_row + 1) * missed

    def check(
        self, in_a_row: int, most: int, bad: Callable[[], Sequence[str]] = tuple
    ) -> None:
        """Raise after too many skipped steps in a row; `bad` names gradients of one."""
        if in_a_row < most:
            return
        found = listed(bad())
        # The host may have heard of a step late, and waits for the count here.
        skipped = int(self.in_a_row)
        raise NonFiniteError(
            f"{counted(skipped, 'steps')} in a row were skipped, since step "
            f"{int(self.step) - skipped}, and training stands still: "
            + (
                f"NaN or infinity in the gradients of {found}. Look at the loss and "
                "the parameters, and go back to a checkpoint from before; or"
                if found
                else "NaN or infinity in their gradients, or norms beyond the limit of "
                "a Skip. Look at the loss; or"
            )
            + " raise max_consecutive_skips."
        )

    def state_dict(self, asarray: Callable[[Any], Array]) -> dict[str, Array]:
        """Return everything as arrays made by `asarray`; states are copied."""
        saved = {"rule": asarray(coded([self.rule.kind]))}
        saved |= {
            name: asarray(np.asarray(int(getattr(self, name)))) for name in COUNTERS
        }
        # What is remembered of all tensors together fits under other names as well.
        if self.names and any(map(has_places, stages(self.rule))):
            saved["names"] = asarray(coded(self.names))
        for i, state in enumerate(self.states):
            saved |= {k: asarray(x) for k, x in owned(i, state or {}).items()}
        return saved

    def load_state_dict(
        self,
        saved: Mapping[str, Array],
        restore: Callable[[Array], Array],
        blank: Callable[[], Sequence[State | None]] | None = None,
    ) -> None:
        """Take over a saved memory, or leave this one as it was if it does not fit.

        One that was saved before the first step has no arrays: then it becomes what
        `blank` returns.
        """
        check_state(saved)
        self._check_kind(saved)
        counts = {name: _count(name, saved[name]) for name in COUNTERS}
        names = decoded(saved.get("names", ()), "names")
        parts = [
            {k: restore(as_array(k, x)) for k, x in under(i, saved).items()}
            for i in range(len(self.states))
        ]
        check_tensors(self.rule, parts, names, self.names or names)
        found = in_order(self.rule, parts, names, self.names or names)
        states = blank() if blank else [None] * len(self.states)
        if any(found) or counts["step"]:
            # A stage behind one that dropped all steps so far has met none.
            met = counts["skipped"] < counts["step"]
            states = [
                self._fitting(i, x or {}, states[i])
                if x or i == 0 or met
                else states[i]
                for i, x in enumerate(found)
            ]
            self.names = self.names or names
        self.states = states
        for name, count in counts.items():
            # Added to what is there, the count stays an array where it was one.
            setattr(self, name, getattr(self, name) * 0 + count)

    def _check_kind(self, saved: Mapping[str, Array]) -> None:
        """Refuse the state of another kind of clipper, and that of another rule."""
        prefixes = tuple(map(prefix, range(len(self.states))))
        others = saved.keys() - {"rule", "names", *COUNTERS}
        if foreign := sorted(x for x in others if not x.startswith(prefixes)):
            raise ValueError(
                f"the state has {foreign[0]!r}, which this clipper has no use for; it "
                "was saved by one of another kind."
            )
        kinds = decoded(saved["rule"], "rule")
        if len(kinds) != 1:
            raise damaged(f"it has {counted(len(kinds), 'names')} for 'rule'")
        if kinds[0] != self.rule.kind:
            raise ValueError(
                f"the state belongs to {kinds[0]}, but this clipper has "
                f"{self.rule.kind}; make the clipper with the rule that was saved, or "
                "leave the state out to begin anew."
            )

    def _fitting(self, i: int, found: State, blank: State | None) -> State | None:
        """Return the saved state of one stage, checked against the present one.

        It comes in the types of a blank one: a checkpoint may have been cast whole.
        """
        now, stage = self.states[i], stages(self.rule)[i]
        # Where nothing is known yet of any tensor, there is a first one at least.
        places, now = ("0",) if now is None else (), now or {}
        check_remembered(stage, found, now.keys(), places)
        for name, x in found.items():
            _check_array(stage, name, x, now.get(name))
        like = blank or {}
        typed = {k: _as(x, like[k]) if k in like else x for k, x in found.items()}
        return typed or self.states[i]


def check_mapping(saved: Any) -> None:
    """Refuse what has no names."""
    if not hasattr(saved, "keys"):
        raise ValueError(
            f"this is not the state of a clipper, but {type(saved).__name__}; hand "
            "over what state_dict() returned."
        )


def check_state(saved: Any) -> None:
    """Refuse what no clipper has saved."""
    check_mapping(saved)
    missing = [name for name in ("rule", *COUNTERS) if name not in saved]
    if missing:
        raise ValueError(
            f"this is not the state of a clipper: it has no {', '.join(missing)}."
        )


def check_remembered(
    stage: Rule,
    found: State,
    known: Set[str] = frozenset(),
    places: Collection[str] = (),
) -> None:
    """Refuse the memory of another rule, and one with something missing.

    `places` are tensors that there is something of for sure, in a memory of parts.
    """
    # Without a memory of its own yet, a rule is asked what an empty one would have.
    known = known or _remembered(stage, found, places)
    if apart := sorted(known ^ found.keys()):
        how = "lacks" if apart[0] in known else "should not have"
        raise ValueError(
            f"the state {how} {apart[0]!r} of {stage!r}; it is damaged, or it was "
            "saved with other parameters, or another rule."
        )


def coded(names: Sequence[str]) -> Array:
    """Return names as an array, which is all that a checkpoint has to hold."""
    return np.frombuffer("\n".join(names).encode(), dtype=np.uint8).copy()


def decoded(array: Array, name: str) -> list[str]:
    """Return the names in an array of any library, which was saved under a name."""
    try:
        text = bytes(int(c) for c in array).decode()
    except (TypeError, ValueError, OverflowError) as error:
        raise damaged(f"what it has for {name!r} is no text") from error
    return text.split("\n") if text else []


def damaged(what: str) -> ValueError:
    """Return the error for a state in which something cannot be."""
    return ValueError(
        f"the state is damaged: {what}; take an earlier one, or leave it out to begin "
        "anew."
    )


def as_array(name: str, x: Any) -> Array:
    """Return an array as it is, and numbers and lists, as JSON has them, as one."""
    try:
        found = x if hasattr(x, "dtype") else np.asarray(x)
    except ValueError as error:
        raise damaged(f"what it has for {name!r} is no array") from error
    # As objects, words and the like; bfloat16 is none of NumPy's own kinds.
    if isinstance(found, np.ndarray) and found.dtype.kind in "OSU":
        raise damaged(f"it has {x!r} for {name!r}, which are no numbers")
    return found


def _count(name: str, x: Any) -> int:
    """Return a count of steps; refuse what is none."""
    try:
        count, fits = int(x), float(x) == int(x) >= 0
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise damaged(f"it has {x} for {name!r}")
    return count


def _as(x: Array, like: Array) -> Array:
    """Return an array in the type of another one of its library."""
    return array_api_compat.array_namespace(x).astype(x, like.dtype)


def _remembered(stage: Rule, found: State, places: Collection[str]) -> set[str]:
    """Return the names in a memory; of parts, for those that are found at all."""
    if stage.borrows:
        return set()
    names = set(_empty(stage))
    if not stage.by_part:
        return names
    blank = dict.fromkeys(names)
    return {key for place in by_place(found) or places for key in placed(blank, place)}


def _check_array(stage: Rule, name: str, x: Array, now: Array | None) -> None:
    """Refuse an array of another size than the present one, or with odd numbers."""
    cells = partial(_cells, stage, name)
    if now is not None and cells(x) != cells(now):
        raise ValueError(
            f"the state has {tuple(x.shape)} for {name!r} of {stage!r}, but this "
            f"clipper needs {tuple(now.shape)}; it was saved with other parameters."
        )
    # That of parts has the shape of parameters, which are not known here.
    empty = x if stage.by_part else _empty(stage)[name]
    if not _has_form(stage, name, x, empty):
        raise damaged(
            f"it has {tuple(x.shape)} for {name!r} of {stage!r}, which begins with "
            f"{tuple(empty.shape)} for one tensor"
        )
    _check_numbers(stage, name, host_array(x))


def _check_numbers(stage: Rule, name: str, x: NDArray[Any]) -> None:
    """Refuse numbers that no rule takes in, and that it would never be rid of."""
    own = name_and_place(name)[0] if stage.by_part else name_within(name)
    odd = {"NaN": np.isnan(x)}
    rules = (stage, *stage.within())
    # Those of others may remember whatever they like.
    if all(type(rule).__module__.startswith("gradclip.") for rule in rules):
        # In a window, infinity marks a place that is still free.
        odd["infinity"] = np.isinf(x) & (own != "norms")
        odd["a number below 0"] = (x < 0) & (own not in SIGNED)
    for what, places in odd.items():
        if places.any():
            raise damaged(f"it has {what} for {name!r} of {stage!r}")


def _empty(stage: Rule) -> State:
    """Return the memory of a rule before the first step, for one tensor."""
    zero = np.zeros(() if stage.over == "all" else (1,))
    return stage.init(zero, array_api_compat.array_namespace(zero))


def _has_form(stage: Rule, name: str, x: Array, empty: Array) -> bool:
    """Return whether an array differs from an empty one by the number of cells only."""
    if stage.by_part or x.ndim != empty.ndim:
        return stage.by_part
    last = None if stage.over == "all" else -1
    rows, like = tuple(x.shape)[:last], empty.shape[:last]
    # A window that grows doubles when it is full.
    grown = _grows(stage, name) and rows[0] > 0 and rows[0] % like[0] == 0
    return grown or rows == like


def _cells(stage: Rule, name: str, x: Array) -> tuple[int, ...]:
    """Return what of the shape of a memory says how many cells there are."""
    if stage.by_part:
        return tuple(x.shape)
    # A window that has grown is longer, for the same parameters.
    return tuple(x.shape[1:] if _grows(stage, name) else x.shape[-1:])


def _grows(stage: Rule, name: str) -> bool:
    return stage.grows and name_within(name) == "norms"
