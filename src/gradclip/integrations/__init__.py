"""Adapters for trainers, one small file each; each imports its own package only."""

import importlib
from typing import Any

from gradclip.arrays import check_rule
from gradclip.rules import Rule
from gradclip.ruletext import rule_from


def needed(extra: str, *packages: str) -> Any:
    """Import the first of some packages that is installed, or say how to get it.

    Args:
        extra: The extra of gradclip that brings the package.
        packages: The modules that would do, best first.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: If none is installed; the message has the install line.
    """
    for package in packages:
        try:
            return importlib.import_module(package)
        except ModuleNotFoundError as error:
            # Something inside of an installed package is missing: not ours to explain.
            if error.name is None or not f"{package}.".startswith(f"{error.name}."):
                raise
    raise ModuleNotFoundError(
        f"this integration needs {' or '.join(packages)}, which is not installed: "
        f"pip install 'gradclip[{extra}]'",
        name=packages[0],
    )


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
