"""What happens to a step with NaN or infinity, and to one that a rule drops."""

import math
from typing import Literal, TypeAlias

from gradclip.rules import RMS, Norm, Rule, Value, stages

Policy: TypeAlias = Literal["skip", "zero", "raise", "ignore"]
POLICIES = ("skip", "zero", "raise", "ignore")


# Torch raises a RuntimeError here, and loops that were written for it catch that.
class NonFiniteError(RuntimeError, FloatingPointError):
    """Gradients hold NaN or infinity, and the caller asked to be told."""


def only_records(rule: Rule) -> bool:
    """Return whether a rule never clips."""
    # A schedule or an array may be infinite at this step and not at the next.
    return (
        isinstance(rule, Norm | RMS | Value)
        and isinstance(rule.limit, float)
        and math.isinf(rule.limit)
    )


def may_drop(rule: Rule, policy: Policy) -> bool:
    """Return whether a step can be dropped: by the policy, or by `Skip`."""
    return policy == "skip" or any(stage.drops for stage in stages(rule))


def chosen(policy: Policy | None, rule: Rule) -> Policy:
    """Return the policy for NaN and infinity, also where none is given."""
    if policy is None:
        # Who only records wants the run as it would have been, NaN and all.
        return "ignore" if only_records(rule) else "skip"
    return check_policy(policy)


def check_policy(policy: Policy) -> Policy:
    """Return the policy for NaN and infinity, or say which there are."""
    if policy not in POLICIES:
        known = ", ".join(map(repr, POLICIES))
        raise ValueError(f"on_nonfinite={policy!r}: use one of {known}.")
    return policy


def check_compiled(rule: Rule, policy: Policy) -> None:
    """Refuse what compiled code cannot do, and code whose memory has one size."""
    if policy == "raise":
        raise ValueError(
            "on_nonfinite='raise' has to look at the gradients, which compiled code "
            "cannot; use 'skip', 'zero' or 'ignore', and read what was done afterwards."
        )
    if rule.grows:
        raise ValueError(
            f"{rule!r} remembers more norms at every step, and compiled code has "
            "arrays of one size; give it a window."
        )
