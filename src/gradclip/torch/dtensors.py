"""What a process has of a DTensor: one tensor that lies in parts on several processes.

Tensors of any other kind pass through unchanged, and `torch.distributed.tensor` is
imported only where there is a DTensor already.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

USUAL = frozenset({Tensor, torch.nn.Parameter})
"""The classes of almost all tensors, which a set tells from others in one pass."""


_REMEDY = (
    "Save a split memory with torch.distributed.checkpoint, or "
    "whole(clipper.state_dict())."
)


AT = "@"
"""In the names of a memory, comes before the number of the process it is of."""
_ALONE = (
    "Save it on each process, with torch.distributed.checkpoint or in a file of its "
    "own, and load it on the same number of processes."
)


def is_dtensor(t: Tensor) -> bool:
    """Return whether a tensor knows where its other parts are."""
    return holds_dtensor([t])


def holds_dtensor(tensors: Iterable[Tensor]) -> bool:
    """Return whether there is a DTensor among tensors; quick for many."""
    if torch.compiler.is_compiling():
        return False
    kinds = set(map(type, tensors)) - USUAL
    module = sys.modules.get("torch.distributed.tensor") if kinds else None
    return module is not None and any(issubclass(k, module.DTensor) for k in kinds)


def local_of(t: Tensor) -> Tensor:
    """Return what this process has of a tensor, in the same memory."""
    if not is_dtensor(t):
        return t
    local = t.to_local()  # type: ignore[attr-defined]
    # It may be an AsyncCollectiveTensor, whose numbers are still on their way.
    return local.wait() if hasattr(local, "wait") else local


def part_of(g: Tensor) -> Tensor:
    """Return what this process has of a gradient that has no parameter beside it."""
    return local_of(laid_out_as(g, g)) if is_dtensor(g) else g


def full_of(t: Tensor) -> Tensor:
    """Return a DTensor, such as a norm of torch's own function, as a plain tensor.

    Read as it is, it is the part of one process (pytorch#170862).
    """
    return t.full_tensor() if is_dtensor(t) else t  # type: ignore[attr-defined]


def laid_out_like(p: Tensor, local: Tensor) -> Tensor:
    """Return what belongs to the part of a parameter here, as one of all its parts."""
    if not is_dtensor(p) or local.shape != local_of(p).shape or not local.dim():
        return local
    from torch.distributed.tensor import DTensor

    where: Any = p
    # Torch would take all pieces for as large as this one, which they need not be.
    return DTensor.from_local(
        local,
        where.device_mesh,
        where.placements,
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )


def part_like(p: Tensor, x: Tensor) -> Tensor:
    """Return what this process needs of something saved for a parameter."""
    if is_dtensor(x) and is_dtensor(p):
        _check_coordinate(p, x)
    if is_dtensor(x) or not is_dtensor(p) or x.shape != p.shape:
        return local_of(x)
    from torch.distributed.tensor import DTensor, Replicate

    where: Any = p
    mesh, at = where.device_mesh, where.placements
    # Every process has loaded the whole, so that nothing has to be sent. (Before 2.7,
    # `distribute_tensor` sends that of the first process in any case.)
    whole = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local_of(whole.redistribute(placements=at))


def _check_coordinate(p: Any, x: Any) -> None:
    """Refuse the part of another process, as a file that one of them wrote has it."""
    here, there = p.device_mesh, x.device_mesh
    if there.size() == 1:
        return
    if here.shape != there.shape:
        raise ValueError(
            f"the state has parts of a mesh of {tuple(there.shape)} processes, and "
            f"these are {tuple(here.shape)}. {_REMEDY}"
        )
    at, came_from = here.get_coordinate(), there.get_coordinate()
    cut = [i for i, place in enumerate(x.placements) if not place.is_replicate()]
    if any(at[i] != came_from[i] for i in cut):
        raise ValueError(
            f"the state has the part of the process at {tuple(came_from)} of the mesh, "
            f"and this one is at {tuple(at)}: one process has written for all. "
            f"{_REMEDY}"
        )


def holds_pieces(names: Iterable[str]) -> bool:
    """Return whether there is something in a memory that is of one process alone."""
    return any(AT in name for name in names)


def check_tag(name: str, own: str) -> None:
    """Refuse the memory of another process's plain piece, which looks like our own."""
    there = name.partition(AT)[2]
    if there != own.removeprefix(AT):
        raise ValueError(
            f"the state has {name!r}, of process {there} (from 0), and this "
            f"one has {own.removeprefix(AT) or 'the whole'}: one process has "
            f"written for all, or there were more or fewer. {_ALONE}"
        )


def whole(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved memory without DTensors, for a file that one process writes.

    Args:
        state: What the `state_dict` of a clipper returned; all processes have to call
            this, since each one sends its parts.

    Returns:
        The same with plain tensors, as large as the parameters where a rule remembers
        elements; `load_state_dict` takes what it needs of them.

    Raises:
        ValueError: For elements of FSDP1's pieces, or of what `split_over` names, and
            for cells of tensors that it names: these cannot be put together.

    Example:
        >>> import torch, gradclip as gc
        >>> from gradclip.torch import Clipper, whole
        >>> clipper = Clipper([torch.ones(2)], gc.ZScore())
        >>> clipper.load_state_dict(whole(clipper.state_dict()))
    """
    if holds_pieces(state):
        raise ValueError(
            "whole() puts DTensors together, and this state has memories of plain "
            "pieces, or of the tensors of one stage, as FSDP1 and split_over have "
            f"them. {_ALONE}"
        )
    return {name: full_of(x) for name, x in state.items()}


def local_grad(p: Tensor, g: Tensor) -> Tensor:
    """Return what this process has of a gradient, laid out as its parameter is."""
    if is_dtensor(g) != is_dtensor(p):
        kinds = ("a DTensor", "a plain tensor")
        raise ValueError(
            f"a gradient of shape {tuple(g.shape)} is {kinds[not is_dtensor(g)]}, and "
            f"its parameter {kinds[not is_dtensor(p)]}: processes would clip by "
            "different norms. Assign p.grad in the form of p, as backward() does."
        )
    if not is_dtensor(g):
        return g
    laid_out = laid_out_as(p, g)
    if torch._debug_has_internal_overlap(local_of(laid_out)) == 1:
        laid_out = laid_out.clone(memory_format=torch.contiguous_format)
    # The optimizer has to step with the tensor that is clipped.
    if laid_out is not g:
        p.grad = laid_out
    return local_of(laid_out)


def laid_out_as(p: Any, g: Any) -> Any:
    """Return a gradient with the placements of its parameter; sums are carried out."""
    from torch.distributed.tensor import Replicate

    wanted = [Replicate() if x.is_partial() else x for x in p.placements]
    return g if list(g.placements) == wanted else g.redistribute(placements=wanted)
