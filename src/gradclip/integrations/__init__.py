"""Adapters for trainers, one small file each; each imports its own package only."""

from typing import Any

from gradclip.arguments import check_rule
from gradclip.extras import needed as needed
from gradclip.rules import Rule
from gradclip.ruletext import rule_from


def shown(norm: Any, limit: Any, clipped: Any, steps: Any) -> dict[str, float]:
    """Return what every trainer logs, under the same names.

    Args:
        norm: The norm of the latest step.
        limit: Its limit.
        clipped: How many steps were clipped so far.
        steps: How many there were.
    """
    return {
        "grad_norm": float(norm),
        "grad_limit": float(limit),
        "clip_rate": int(clipped) / max(int(steps), 1),
    }


def rule_of(rule: Rule | str) -> Rule:
    """Return a rule that is given as such, or as the text of its constructor.

    Args:
        rule: The rule, or its text.

    Raises:
        TypeError: For what is neither.
        ValueError: For a text that makes no rule.
    """
    return rule_from(rule) if isinstance(rule, str) else check_rule(rule)
