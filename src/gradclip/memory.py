"""What a clipper remembers between steps, as a flat dictionary of arrays.

Flat, and arrays only, so that every checkpoint format can hold it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from gradclip.policy import NonFiniteError
from gradclip.rules import Array, Rule, State, stages

COUNTERS = ("step", "skipped", "in_a_row")


def at_least(least: int, **named: float) -> None:
    """Refuse numbers below the least one that has a meaning."""
    for name, value in named.items():
        if not isinstance(value, (int, float)) or not value >= least:
            raise ValueError(f"{name}={value!r}: it is a number, at least {least}.")


class Memory:
    """The state of each stage of a rule, and the counts of steps."""

    def __init__(self, rule: Rule, zero: Any = 0) -> None:
        """Start with nothing seen; a state of None is made from the first norms.

        `zero` is where the counts start: an integer, or an array of one.
        """
        self.rule = rule
        self.states: Sequence[State | None] = [None] * len(stages(rule))
        # Three arrays, not one under three names: compiled code minds the difference.
        self.step, self.skipped, self.in_a_row = zero + 0, zero + 0, zero + 0

    def count(self, missed: Any) -> None:
        """Count one step; `missed` is 1 where it was skipped, else 0."""
        self.step = self.step + 1
        self.skipped = self.skipped + missed
        self.in_a_row = (self.in_a_row + 1) * missed

    def check(self, in_a_row: int, most: int) -> None:
        """Raise after too many skipped steps in a row."""
        if in_a_row >= most:
            raise NonFiniteError(
                f"{in_a_row} steps in a row had NaN or infinity in their gradients, or "
                "were beyond the limit of a Skip, and were skipped; training stands "
                "still. Look at the loss, or raise max_consecutive_skips."
            )

    def state_dict(self, asarray: Callable[[Any], Array]) -> dict[str, Array]:
        """Return everything as arrays made by `asarray`; states are copied."""
        kind = np.frombuffer(self.rule.kind.encode(), dtype=np.uint8).copy()
        saved = {"rule": asarray(kind)}
        saved |= {
            name: asarray(np.asarray(int(getattr(self, name)))) for name in COUNTERS
        }
        for i, state in enumerate(self.states):
            saved |= {f"{i}.{name}": asarray(x) for name, x in (state or {}).items()}
        return saved

    def load_state_dict(
        self, saved: Mapping[str, Array], restore: Callable[[Array], Array]
    ) -> None:
        """Take over a saved memory, or leave this one as it was if it does not fit."""
        missing = [name for name in ("rule", *COUNTERS) if name not in saved]
        if missing:
            raise ValueError(
                f"this is not the state of a clipper: it has no {', '.join(missing)}."
            )
        kind = bytes(int(c) for c in saved["rule"]).decode()
        if kind != self.rule.kind:
            raise ValueError(
                f"the state belongs to {kind}, but this clipper has {self.rule.kind}; "
                "make the clipper with the rule that was saved."
            )
        states = [self._stage(i, saved, restore) for i in range(len(self.states))]
        self.states = states
        for name in COUNTERS:
            # Added to what is there, the count stays an array where it was one.
            now = getattr(self, name)
            setattr(self, name, now * 0 + int(saved[name]))

    def _stage(
        self, i: int, saved: Mapping[str, Array], restore: Callable[[Array], Array]
    ) -> State | None:
        """Return the saved state of one stage, checked against the present one."""
        prefix, stage = f"{i}.", stages(self.rule)[i]
        found = {
            name.removeprefix(prefix): restore(x)
            for name, x in saved.items()
            if name.startswith(prefix)
        }
        for name, x in (self.states[i] or {}).items():
            cells = partial(_cells, stage, name)
            if name not in found or cells(found[name]) != cells(x):
                size = tuple(found[name].shape) if name in found else "nothing"
                raise ValueError(
                    f"the state has {size} for {name!r} of {stage!r}, "
                    f"but this clipper needs {tuple(x.shape)}; it was saved with other "
                    "parameters."
                )
        return found or self.states[i]


def _cells(stage: Rule, name: str, x: Array) -> tuple[int, ...]:
    """Return what of the shape of a memory says how many cells there are."""
    # A window that has grown is longer, for the same parameters.
    grows = stage.grows and name.rpartition(".")[2] == "norms"
    return tuple(x.shape[1:] if grows else x.shape[-1:])
