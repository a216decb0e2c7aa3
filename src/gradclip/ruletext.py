"""A rule from the text of its constructor, never evaluated, and the text of a rule."""

import ast
import math
import re
from contextlib import suppress
from dataclasses import fields
from typing import Any

from gradclip import rules
from gradclip.rules import Norm, Rule, stages
from gradclip.rules.groups import Groups

OPAQUE = re.compile(r"<(?:[^<>]|<[^<>]*>)*>|\b(?:tensor|[aA]rray)\([^()]*\)")
"""A function, or an array, as `repr` shows it."""
PLAIN = {"inf": math.inf, "None": None, "True": True, "False": False}


def rule_from(text: str) -> Rule:
    """Return the rule that a constructor's text describes.

    Args:
        text: Such as `ZScore(z=2.5)`, `chain(Norm(1.0), Normalize())` or
            `by_name({'head': None, '*': Norm(1.0)})`; a leading `gc.` or `gradclip.`
            is fine.

    Returns:
        The rule.

    Raises:
        ValueError: For anything but constructors of rules with plain numbers and texts.

    Example:
        >>> rule = rule_from("Norm(1.5, over='tensor')")
        >>> rule.limit, rule.over
        (1.5, 'tensor')
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    # On a text with many brackets, signs or dots the parser ends in any of these.
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(
            f"the rule {text!r} is no call; write it as in ZScore(z=2.5), with numbers "
            "and texts only: a schedule has no text."
        ) from None
    rule = _value(tree.body, text)
    if not isinstance(rule, Rule):
        raise ValueError(f"{text!r} is no rule; write one as in ZScore(z=2.5).")
    return rule


def call(rule: Any) -> str:
    """Return the shortest call that makes a rule.

    Example:
        >>> from gradclip import Norm
        >>> call(Norm(limit=1.0, p=1.0))
        'Norm(1.0, p=1.0)'
    """
    if len(stages(rule)) > 1:
        return f"chain({', '.join(map(call, stages(rule)))})"
    if isinstance(rule, Groups):
        groups = (f"{pattern!r}: {call(part)}" for pattern, part in rule.rules)
        return f"by_name({{{', '.join(groups)}}})"
    given = {f.name: getattr(rule, f.name) for f in fields(rule)}
    changed = [f for f in fields(rule) if f.init and given[f.name] != f.default]
    first = fields(rule)[0].name

    def value(x: Any) -> str:
        return call(x) if isinstance(x, Rule) else repr(x)

    parts = [
        value(given[f.name]) if f.name == first else f"{f.name}={given[f.name]!r}"
        for f in changed
    ]
    return f"{type(rule).__name__}({', '.join(parts)})"


def recorded_rule(text: str) -> Rule:
    """Return the rule that a history names; a limit without a text is any number.

    Foreign logs name none, and hold 2-norms of all gradients.
    """
    # As it is first: a text within the rule may look like a function or an array.
    for readable in (text, OPAQUE.sub("1.0", text)):
        with suppress(ValueError):
            return rule_from(readable)
    return Norm(math.inf)


def known() -> dict[str, Any]:
    """Return the constructors by name: every rule, its aliases and what joins them."""
    makers = {
        name: maker
        for name, maker in vars(rules).items()
        if isinstance(maker, type) and issubclass(maker, Rule) and maker is not Rule
    }
    return {**makers, "chain": rules.chain, "by_name": rules.by_name}


def _value(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(
            op=ast.USub(), operand=ast.Constant(value=int() | float() as x)
        ):
            return -x
        case ast.Attribute(value=ast.Name(id="math"), attr="inf"):
            return math.inf
        case ast.Name(id=name) if name in PLAIN:
            return PLAIN[name]
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            if all(isinstance(k, ast.Constant) for k in keys):
                return {_value(k, text): _value(x, text) for k, x in pairs if k}
        case ast.Call():
            return _called(node, text)
    raise ValueError(
        f"{ast.unparse(node)!r} in the rule {text!r}: only rules, numbers and texts."
    )


def _called(node: ast.Call, text: str) -> Any:
    name = ast.unparse(node.func).removeprefix("gradclip.").removeprefix("gc.")
    given = [_value(x, text) for x in node.args]
    if name == "float" and given in (["inf"], ["infinity"]):
        return math.inf
    if name not in known():
        raise ValueError(
            f"there is no rule {name!r}; there are {', '.join(sorted(known()))}."
        )
    named = {x.arg: _value(x.value, text) for x in node.keywords if x.arg}
    if len(named) < len(node.keywords):
        raise ValueError(f"** in the rule {text!r}: name each argument.")
    try:
        return known()[name](*given, **named)
    except TypeError as error:
        raise ValueError(f"the rule {text!r}: {str(error).rstrip('.')}.") from None
