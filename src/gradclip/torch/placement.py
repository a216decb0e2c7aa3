"""Which process groups hold parts of which parameters.

Parameters say so themselves where they are DTensors or FSDP has cut them; of plain
tensors the caller says it with `split_over`.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gradclip.torch.dtensors import holds_dtensor, is_dtensor
from gradclip.torch.gradients import named_in
from gradclip.torch.layout import Group, Layout, Way

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Pieces:
    r"""Says that a plain tensor is a piece of one tensor, cut along a dimension.

    $\lVert t \rVert_p^p = \sum_r \lVert t_r \rVert_p^p$ over the ranks $r$ of a group.

    A bare process group says that its members hold different tensors. For the norm of
    all gradients that is the same, but only pieces have norms of tensors and rows that
    are put together.

    Args:
        group: The processes that hold the pieces.
        dim: The dimension that was cut, at least 0; None for tensors that were laid
            flat before.

    Example:
        >>> from gradclip.torch import Clipper, Pieces
        >>> def split_over(name, p):
        ...     return Pieces(tp_group, dim=1) if name.endswith("proj.weight") else None
    """

    group: "ProcessGroup"
    dim: int | None = 0


Split: TypeAlias = "ProcessGroup | Pieces | Sequence[ProcessGroup | Pieces] | None"
SplitOver: TypeAlias = "ProcessGroup | Callable[[str, Tensor], Split] | None"
Part: TypeAlias = tuple["ProcessGroup", Way, int]


def layout_of(
    named: Iterable[tuple[str, Tensor]],
    split_over: SplitOver = None,
    module: torch.nn.Module | None = None,
) -> Layout | None:
    """Return how parameters are split over processes; None where none is."""
    pairs = list(named)
    params = [p for _, p in pairs]
    flat = _flattened(module)
    _check_whole(pairs, flat)
    if split_over is None and not any(flat.values()) and not holds_dtensor(params):
        return None
    outside = "return None for it" if callable(split_over) else "hand over None"
    groups: dict[str, Group] = {}
    ways: list[dict[str, Way]] = []
    for name, p in pairs:
        asked = split_over(name, p) if callable(split_over) else split_over
        parts = [
            *_on_mesh(name, p, asked),
            *flat.get(id(p), ()),
            *_as_asked(asked, name, outside),
        ]
        ways.append({})
        for handle, way, level in parts:
            if handle.size() > 1:
                ways[-1][handle.group_name] = way
                _note(groups, handle, level)
    # From the inside out: an outer group adds up what the inner ones have joined.
    ordered = dict(sorted(groups.items(), key=lambda item: item[1].level))
    return Layout(params, ways, ordered)


def _note(groups: dict[str, Group], handle: "ProcessGroup", level: int) -> None:
    """Note a group in the place that its outermost use asks for."""
    group = groups.setdefault(handle.group_name, Group(handle, level))
    group.level = max(group.level, level)


def _on_mesh(name: str, p: Tensor, asked: Any) -> list[Part]:
    """Return the groups of the mesh that a DTensor lies on."""
    if not is_dtensor(p):
        return []
    mesh = p.device_mesh  # type: ignore[attr-defined]
    if mesh.get_coordinate() is None and not asked:
        raise ValueError(
            f"parameter {name!r} lies on a mesh without this process, so that its norm "
            "is not known here; name the group of all processes with split_over, or "
            "take a clipper for the parameters of each mesh."
        )
    if mesh.get_coordinate() is None:
        return []
    placements = p.placements  # type: ignore[attr-defined]
    return [(mesh.get_group(i), _placed(x), 0) for i, x in enumerate(placements)]


def _placed(placement: Any) -> Way:
    # Partial sums are carried out before anything is measured.
    if placement.is_replicate() or placement.is_partial():
        return Way("copy")
    return Way("piece", placement.dim)


def _as_asked(asked: Any, name: str, outside: str) -> list[Part]:
    """Return the groups that a caller named, the outermost last."""
    if asked is None:
        return []
    parts = list(asked) if isinstance(asked, tuple | list) else [asked]
    found: list[Part] = []
    for level, part in enumerate(parts, 1):
        handle = part.group if isinstance(part, Pieces) else part
        check_group(
            handle,
            f"split_over for {name!r} is",
            outside=outside,
            takes="a process group, Pieces(group, dim), several of them, or None",
        )
        piece = isinstance(part, Pieces)
        found.append((handle, Way("piece", part.dim) if piece else Way("other"), level))
    return found


def check_group(handle: Any, given: str, *, outside: str, takes: str) -> None:
    """Refuse what is no process group, and one without this process."""
    if hasattr(handle, "group_name"):
        return
    # For those outside of it, new_group() returns a number.
    member = getattr(torch.distributed, "GroupMember", None)
    if member is not None and handle == member.NON_GROUP_MEMBER:
        raise ValueError(
            f"{given} a group that this process is not a member of; {outside} here."
        )
    mesh = "; of a mesh, take mesh.get_group()" if hasattr(handle, "get_group") else ""
    raise TypeError(f"{given} {type(handle).__name__}; it takes {takes}{mesh}.")


def _flattened(module: torch.nn.Module | None) -> dict[int, list[Part]]:
    """Return the groups of parameters that FSDP1 has laid flat and cut."""
    # Whoever has wrapped a model has imported it, and no one else should have to.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if module is None or fsdp is None:
        return {}
    found: dict[int, list[Part]] = {}
    for unit in fsdp.FullyShardedDataParallel.fsdp_modules(module):
        handle = unit._handle
        # A wrapper whose parameters all belong to wrappers inside of it has none.
        if handle is None:
            continue
        flat, part = handle.flat_param, (unit.process_group, Way("piece"), 0)
        # With use_orig_params=True an optimizer holds the latter, else the former.
        for p in (flat, *(flat._params or ())):
            # Whole ones (NO_SHARD) would be counted by each process (pytorch#88955).
            found[id(p)] = [part] if handle.uses_sharded_strategy else []
    return found


def _check_whole(named: list[tuple[str, Tensor]], known: Mapping[int, Any]) -> None:
    """Refuse parameters that FSDP1 has cut, if it is not known over which group.

    Each process would have a norm and a factor of its own (pytorch#88621).
    """
    lost = [
        name
        for name, p in named
        if getattr(p, "_fsdp_flattened", False) and id(p) not in known
    ]
    if lost:
        raise ValueError(
            f"FSDP's first version has laid flat and cut {len(lost)} parameters, such "
            f"as {lost[0]}, and their norms would be those of pieces; hand over the "
            "model that FullyShardedDataParallel returned: Clipper(model, rule), or "
            "attach(optimizer, rule, model=model)."
        )


def cut_since(
    names: Sequence[str], params: Sequence[Tensor], module: torch.nn.Module | None
) -> bool:
    """Return whether whole parameters have become pieces, of which nothing was told.

    Asked at every step: FSDP1 cuts parameters in place, and they stay the same objects.
    """
    # Where processes cannot meet nothing is cut, and asking all parameters takes time.
    loaded = "torch.distributed.fsdp" in sys.modules
    if not (loaded and torch.distributed.is_initialized()):
        return False
    if not any(getattr(p, "_fsdp_flattened", False) for p in params):
        return False
    flat = _flattened(module)
    _check_whole(list(zip(names, params, strict=True)), flat)
    return any(handle.size() > 1 for p in params for handle, *_ in flat.get(id(p), ()))


def check_replaced(
    names: Sequence[str], params: Sequence[Tensor], module: torch.nn.Module
) -> None:
    """Refuse parameters for which a module has DTensors by now: they get no gradients.

    Those that have stayed would be clipped by a norm of their own.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    known = dict(zip(names, params, strict=True))
    now = [(n, p) for n, p in named_in(module) if is_dtensor(p)]
    if lost := [name for name, p in now if known.get(name, p) is not p]:
        raise ValueError(
            f"the model has DTensors in the place of {len(lost)} parameters of this "
            f"clipper, such as {lost[0]}, as fully_shard makes them; make the clipper "
            "behind it."
        )


def refuse_pieces(tensors: Sequence[Tensor]) -> None:
    """Refuse what FSDP1 has cut, where there is no module that knows its groups."""
    if torch.compiler.is_compiling() or "torch.distributed.fsdp" not in sys.modules:
        return
    _check_whole([(f"[{i}]", t) for i, t in enumerate(tensors)], {})
