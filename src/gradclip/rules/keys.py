"""The keys of a memory: one flat dictionary holds what several owners remember.

`1.mean` is the array `mean` of stage 1, or of group 1; `root.3` is the array `root` of
tensor 3, where a rule looks inside of tensors. Nothing else takes such keys apart.
"""

from collections.abc import Mapping

from gradclip.rules.base import Array, State


def prefix(owner: int) -> str:
    """Return what the keys of a stage or a group begin with."""
    return f"{owner}."


def owned(owner: int, state: Mapping[str, Array]) -> State:
    """Return a memory under the keys of a stage or a group."""
    return {prefix(owner) + name: x for name, x in state.items()}


def under(owner: int, saved: Mapping[str, Array]) -> State:
    """Return the memory that stands under the keys of a stage or a group."""
    return {
        key.removeprefix(prefix(owner)): x
        for key, x in saved.items()
        if key.startswith(prefix(owner))
    }


def placed(state: Mapping[str, Array], place: int | str) -> State:
    """Return the memory of one tensor under the keys of its place."""
    return {f"{name}.{place}": x for name, x in state.items()}


def by_place(state: Mapping[str, Array]) -> dict[str, State]:
    """Return the memory of each tensor, by the text of its place."""
    found: dict[str, State] = {}
    for key, x in state.items():
        name, place = name_and_place(key)
        found.setdefault(place, {})[name] = x
    return found


def name_and_place(key: str) -> tuple[str, str]:
    """Return the name of an array that belongs to one tensor, and its place."""
    name, _, place = key.rpartition(".")
    return name, place


def name_within(key: str) -> str:
    """Return the name of an array, also where it is one of a group's."""
    return key.rpartition(".")[2]
