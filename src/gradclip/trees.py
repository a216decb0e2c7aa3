"""Gradients as people hold them: an array, or lists, tuples and dicts to any depth."""

import copy
import re
from collections.abc import Iterator
from typing import Any, TypeVar

Grads = TypeVar("Grads")
# repr() chooses between two signs for the quotes of a key; numbers have none.
PLACE = re.compile(r"""\[(?:'(.*?)'|"(.*?)"|(.*?))\](?=[\[.]|$)|\.(\w+)""")


def named_leaves(grads: Any) -> list[tuple[str, Any]]:
    """Return the arrays among gradients with the path to each, or say what is wrong."""
    if hasattr(grads, "parameters") and callable(grads.parameters):
        raise TypeError(
            f"gradients are expected, not the module {type(grads).__name__}; use "
            "gradclip.torch.Clipper(module, rule).clip_() after backward()."
        )
    if isinstance(grads, Iterator):
        raise TypeError(
            f"nothing can be returned that is arranged like a {type(grads).__name__}; "
            "hand over list(gradients)."
        )
    named = list(flatten(grads))
    if not named:
        raise ValueError("there are no gradients in here; was backward() run?")
    return named


def flatten(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested lists, tuples and dicts with the path to each."""
    if isinstance(tree, dict):
        for key, part in tree.items():
            yield from flatten(part, f"{where}[{key!r}]")
    elif isinstance(tree, (list, tuple)):
        # As in the paths of JAX, since a memory has to find its tensors there.
        fields = [f".{name}" for name in getattr(tree, "_fields", ())]
        for i, part in enumerate(tree):
            yield from flatten(part, where + (fields[i] if fields else f"[{i}]"))
    else:
        yield where, tree


def arranged(tree: Any, like: Any) -> Any:
    """Return a tree whose dictionaries have the order of those of another."""
    if isinstance(tree, dict) and isinstance(like, dict):
        if others := tree.keys() ^ like.keys():
            raise ValueError(
                f"clip(): {min(map(repr, others))} is a key of the gradients, or of "
                "what is arranged like them, and not of both."
            )
        return {key: arranged(tree[key], part) for key, part in like.items()}
    both = isinstance(tree, (list, tuple)) and isinstance(like, (list, tuple))
    # Another length is left to whoever refuses it with the shapes of both sides.
    if both and len(tree) == len(like):
        return [arranged(a, b) for a, b in zip(tree, like, strict=True)]
    return tree


def dotted(where: str) -> str:
    """Return the path to a leaf as a name: `['a'][0].w` is `a.0.w`, as in JAX."""
    if (place := where[1:-1]).isdecimal():
        return place
    return ".".join(map("".join, PLACE.findall(where)))


def rebuild(tree: Any, leaves: Iterator[Any]) -> Any:
    """Return the leaves arranged as in `tree`."""
    if isinstance(tree, dict):
        # A copy, since the class may ask for more than pairs, as defaultdict does.
        new = copy.copy(tree)
        new.update((key, rebuild(part, leaves)) for key, part in tree.items())
        return new
    if isinstance(tree, (list, tuple)):
        parts = [rebuild(part, leaves) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return next(leaves)
