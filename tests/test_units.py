"""Docstrings name the unit, the range and the shape of what goes in and comes out.

What they say of ranges is tried: a number outside of one is refused.
"""

import inspect
import math
import re

import pytest
import torch

import gradclip as gc
from test_docs import public

UNIT = re.compile(
    r"unit of|deviations|how many|number of|percentile|per parameter norm|multiple"
    r"|how much of|order of|seconds|axis|dimension|factor",
    re.I,
)
RANGE = re.compile(
    r"above (?P<above>0)|at least (?P<least>\d|`low`)|(?P<open>[\[(])(?P<low>\d), "
    r"(?P<high>\d)(?P<close>[\])])|(?P<word>from|between) (?P<from>\d+) (?:to|and) "
    r"(?P<to>\w+|`\w+`)|0 in torch's layout"
)
SHAPE = re.compile(
    r"0-d|any shape|arranged like|along their first axis|one per|for each"
)
ARRAYS = re.compile(r"Tensor|Grads|Array|Info")
NAMED = {"params", "out"}
"""Arguments that are arrays, though their types do not tell."""


def arguments(thing):
    """Return the text of each argument, as the docstring has it."""
    part = inspect.getdoc(thing).partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n      +.*)*)", part, re.M)
    return {name: " ".join(text.split()) for name, text in found}


def written(name, thing, seen=()):
    """Return the text of an argument, or that of the one it points to."""
    text = arguments(thing)[name]
    other = re.match(r"As for `(\w+)`", text)
    if not other or not (target := pointed(other[1], thing)):
        return text
    assert target not in seen, f"{name} of {thing} points in a circle"
    return written(name, target, (*seen, target)) + text[other.end() :]


def pointed(name, thing):
    """Return what a name means in a docstring: its neighbours come first."""
    found = [x for x in public().values() if x.__name__ == name]
    near = [
        x
        for x in found
        if x.__module__.split(".")[:2] == thing.__module__.split(".")[:2]
    ]
    return (near or found or [None])[0]


def parameters():
    for name, thing in public().items():
        for argument, of in inspect.signature(thing).parameters.items():
            yield pytest.param(thing, argument, of, id=f"{name}-{argument}")


def values(of):
    """Return the type of an argument, without the functions that it may be."""
    return re.sub(r"Callable\[\[.*?\], .*?\]", "", str(of.annotation))


def is_number(of):
    return bool({"int", "float"} & set(re.findall(r"\w+", values(of))))


@pytest.mark.parametrize(("thing", "argument", "of"), list(parameters()))
def test_arguments_name_their_unit_or_shape(thing, argument, of):
    text = written(argument, thing)
    if is_number(of):
        assert UNIT.search(text), f"no unit: {text}"
        assert RANGE.search(text), f"no range: {text}"
    elif argument in NAMED or ARRAYS.search(values(of)):
        assert SHAPE.search(text), f"no shape: {text}"


def comes_back(thing):
    """Return whether a function returns arrays."""
    returns = str(inspect.signature(thing).return_annotation)
    return not inspect.isclass(thing) and bool(ARRAYS.search(returns))


@pytest.mark.parametrize("name", [n for n, x in public().items() if comes_back(x)])
def test_what_comes_back_has_a_shape(name):
    doc = inspect.getdoc(public()[name])
    text = doc.partition("Returns:\n")[2].partition("\n\n")[0]
    assert SHAPE.search(text), f"no shape: {text}"


WHOLE = {"rule": gc.Norm(1.0), "limit": 1.0, "low": 0.5, "high": 2.0, "path": "x.jsonl"}
"""What makes a whole call, beside the argument that is tried."""


def made(thing, **given):
    needed = {
        name: WHOLE[name]
        for name, of in inspect.signature(thing).parameters.items()
        if of.default is of.empty
    }
    return thing(**needed | given)


def tried():
    """Yield the arguments whose range is told, for what can be made without a model."""
    for name, thing in public().items():
        if inspect.isclass(thing) and set(WHOLE) >= {
            n
            for n, of in inspect.signature(thing).parameters.items()
            if of.default is of.empty
        }:
            for argument, of in inspect.signature(thing).parameters.items():
                if is_number(of) and "layout" not in written(argument, thing):
                    yield pytest.param(thing, argument, id=f"{name}-{argument}")


def beyond(text, is_whole):
    """Return numbers outside of the range in a text."""
    step, found = (1 if is_whole else 0.25), RANGE.search(text)
    if found["above"]:
        numbers = [0, -step]
    elif found["least"]:
        least = 0.5 if found["least"] == "`low`" else int(found["least"])
        numbers = [least - step]
    elif found["word"]:
        low, high = int(found["from"]), found["to"]
        numbers = [low - step, *([int(high) + step] if high.isdigit() else [])]
        if found["word"] == "between":
            numbers += [low, int(high)]
    else:
        low, high = int(found["low"]), int(found["high"])
        numbers = [low - step, high + step]
        numbers += [low] if found["open"] == "(" else []
        numbers += [high] if found["close"] == ")" else []
    return [*numbers, *([math.inf] if "finite" in text else []), math.nan]


@pytest.mark.parametrize(("thing", "argument"), list(tried()))
def test_numbers_outside_the_range_are_refused(thing, argument):
    of = inspect.signature(thing).parameters[argument]
    is_whole = "float" not in str(of.annotation)
    told = inspect.getdoc(thing).partition("Raises:")[2]
    for number in [*beyond(written(argument, thing), is_whole), "1"]:
        with pytest.raises((ValueError, TypeError)) as refused:
            made(thing, **{argument: number})
        assert argument in str(refused.value), number
        assert refused.type.__name__ in told, f"{number!r}: not told"


def test_a_docstring_without_units_would_fail():
    def clip(limit: float) -> torch.Tensor:
        """Clip.

        Args:
            limit: The largest number.

        Returns:
            What is left.
        """

    (of,) = inspect.signature(clip).parameters.values()
    text = arguments(clip)["limit"]
    assert is_number(of)
    assert not UNIT.search(text)
    assert not RANGE.search(text)
    assert comes_back(clip)
    assert not SHAPE.search(inspect.getdoc(clip))
