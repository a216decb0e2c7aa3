"""From what people hand over to gradients: names, checks, odd layouts made plain."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradclip.backends import check_arithmetic
from gradclip.backends.narrow import at_home
from gradclip.torch.dtensors import USUAL, holds_dtensor, local_grad, local_of
from gradclip.torch.exact import at_hand

_REAL = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")

Params: TypeAlias = (
    torch.nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
)


def named_parameters(params: Params) -> list[tuple[str, Tensor]]:
    """Return each distinct parameter with a name, whatever form they come in.

    Args:
        params: A module, (name, parameter) pairs, parameters, or one parameter.

    Returns:
        Pairs of name and parameter. A parameter that is listed twice comes once.

    Raises:
        TypeError: For anything that is not a tensor.
        ValueError: If there are no parameters, as in a generator that was used up.
    """
    if isinstance(params, torch.nn.Module):
        named: Iterable[Any] = named_in(params)
    elif isinstance(params, Tensor):
        named = [("parameter", params)]
    elif isinstance(params, Mapping):
        named = _enumerated(params.items())
    else:
        named = _enumerated(params)
    found = {id(p): (name, p) for name, p in named}
    if not found:
        # Nothing would be clipped, and nothing said (pytorch#148259).
        used_up = isinstance(params, Iterator)
        raise ValueError(
            "there are no parameters to clip"
            + (": the generator was used up; pass list(...)." if used_up else ".")
        )
    return list(found.values())


def named_by_optimizers(
    optimizers: Iterable[torch.optim.Optimizer], model: torch.nn.Module | None
) -> list[tuple[str, Tensor]]:
    """Return the parameters of optimizers with the names that these or a model know."""
    named = {} if model is None else {id(p): n for n, p in named_in(model)}
    found: list[tuple[str, Tensor]] = []
    for group in (group for o in optimizers for group in o.param_groups):
        # Who appends a parameter to a group may leave its names as they were.
        names = group.get("param_names", [])[: len(group["params"])]
        for name, p in zip_longest(names, group["params"]):
            found.append((name or named.get(id(p)) or f"[{len(found)}]", p))
    return named_parameters(found)


def named_in(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a model with the names that they have without wrappers.

    Patterns such as `"head.*"` fit them so, also where the model is compiled, or is
    wrapped by DDP or FSDP or for activation checkpointing.
    """
    parallel = torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel
    if isinstance(model, parallel):
        model = model.module
    for name, p in model.named_parameters():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        yield name, p


def tensors_only(params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return tensors as a list, for the functions that do not take a module."""
    if isinstance(params, torch.nn.Module):
        raise TypeError(
            f"tensors are expected, not the module {type(params).__name__}; hand over "
            "module.parameters()."
        )
    tensors = [params] if isinstance(params, Tensor) else list(_several(params))
    if not tensors and isinstance(params, Iterator):
        raise ValueError(
            "the generator has no parameters left: it was used up; pass a list, or "
            "call module.parameters() again."
        )
    if not set(map(type, tensors)) <= USUAL:
        tensors = [p for _, p in _enumerated(tensors)]
    return tensors


def distinct(params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return each parameter once: one that is tied would be scaled twice."""
    tensors = tensors_only(params)
    if not tensors:
        raise ValueError("there are no parameters to clip.")
    if len(set(map(id, tensors))) == len(tensors):
        return tensors
    return list({id(t): t for t in tensors}.values())


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return all parameters that an optimizer holds, as they stand there."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _several(params: Any) -> Iterable[Any]:
    """Return what can be looked through, or say what is meant."""
    if not hasattr(params, "__iter__"):
        raise TypeError(
            f"{params!r} is {type(params).__name__}, not a parameter or a list of "
            "them; hand over model.parameters()."
        )
    return params


def _enumerated(params: Any) -> Iterator[tuple[str, Tensor]]:
    for i, item in enumerate(_several(params)):
        name, p = (
            item if isinstance(item, tuple) and len(item) == 2 else (f"[{i}]", item)
        )
        if isinstance(p, torch.nn.Module):
            raise TypeError(
                f"parameter {name!r} is the module {type(p).__name__}; hand over the "
                "module itself, or its parameters()."
            )
        if not isinstance(p, Tensor):
            raise TypeError(
                f"parameter {name!r} is {type(p).__name__}, not a torch tensor; for "
                "NumPy and JAX arrays use gradclip.clip."
            )
        yield str(name), p


@dataclass
class Gradients:
    """The gradients that there are, in a form that the verbs can change in place."""

    leaves: list[Tensor]
    """Plain strided tensors, without two elements in one place."""
    present: list[int]
    """Which parameters they belong to."""
    weights: list[Tensor]
    """Those parameters; where units count, cut to the rows of a sparse gradient."""
    dtypes: set[torch.dtype]
    """Their types: asked for once, since each pass over many takes time."""
    origins: list[Tensor]
    """What the leaves are copies of, on a device without float64; else themselves."""


def collect(
    params: list[Tensor],
    weights: bool = False,
    split: bool = False,
    units: bool = False,
) -> Gradients:
    """Return the gradients of parameters; sparse ones by their coalesced values.

    It is called where gradients are off: a mode within a mode takes 4 microseconds.
    Of a DTensor it is what this process has. Where parameters are `split`, other
    processes may have gradients, so that none here is no error.
    """
    grads = [p.grad for p in params]
    leaves = [g for g in grads if g is not None]
    present = list(range(len(params)))
    here = params
    if len(leaves) < len(params):
        present = [i for i, g in enumerate(grads) if g is not None]
        here = [params[i] for i in present]
    if not (leaves or split):
        raise ValueError(
            f"none of the {len(params)} parameters has a gradient; was backward() "
            f"called, and the optimizer not yet zeroed?{_replaced()}"
        )
    if split or holds_dtensor(leaves):
        leaves = [local_grad(p, g) for p, g in zip(here, leaves, strict=True)]
    dtypes = set(map(attrgetter("dtype"), leaves))
    check_types(dtypes)
    if not (whole := _all_plain(leaves, dtypes)):
        leaves = [plain(p, g) for p, g in zip(here, leaves, strict=True)]
    if not weights:
        return Gradients(at_home(leaves), present, [], dtypes, leaves)
    if not whole or holds_dtensor(here):
        here = [_weight(p, units) for p in here]
    return Gradients(at_home(leaves), present, at_home(list(here)), dtypes, leaves)


def _replaced() -> str:
    """Return what else may be behind missing gradients, on several processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ""
    return (
        " Or has something put other parameters in their place since, as fully_shard "
        "does? Then make the clipper behind it."
    )


def check_types(dtypes: set[torch.dtype]) -> None:
    """Refuse gradients that cannot hold what a clip makes of them."""
    for dtype in dtypes - _REAL:
        check_arithmetic(dtype)
        if not (dtype.is_floating_point or dtype.is_complex):
            raise TypeError(
                f"a gradient has dtype {dtype}, in which 0.4 would be 0; use .float()."
            )


def _all_plain(leaves: list[Tensor], dtypes: set[torch.dtype]) -> bool:
    """Return whether all gradients can be changed as they are; quick for many."""
    try:
        whole = all(map(Tensor.is_contiguous, leaves))
        # Compiled code cannot ask for lazy signs.
        asks = not (dtypes <= _REAL or torch.compiler.is_compiling())
        return whole and not (asks and any(map(Tensor.is_conj, leaves)))
    except RuntimeError:
        # Only a dense tensor can say, and a pass over the list for layouts costs more.
        return False


def plain(p: Tensor, g: Tensor) -> Tensor:
    """Return a gradient as a tensor that can be changed in place, kept in `p.grad`."""
    if g.layout == torch.sparse_coo:
        if not g.is_coalesced():
            # Duplicates have to be summed before anything but a product is taken.
            p.grad = g = g.coalesce()
        return g._values()
    check_strided(g)
    if not torch.compiler.is_compiling() and (g.is_conj() or g.is_neg()):
        # Of lazy signs, torch's functions for lists of tensors cannot change any.
        p.grad = g = g.resolve_conj().resolve_neg()
    if overlaps(g):
        # An expanded gradient has many elements in one place.
        p.grad = g = g.clone(memory_format=torch.contiguous_format)
    return g


def check_strided(g: Tensor) -> None:
    """Refuse other layouts than the usual one."""
    if g.layout != torch.strided:
        raise TypeError(
            f"a gradient of shape {tuple(g.shape)} has layout {g.layout}; gradients "
            "may be dense or sparse COO."
        )


def overlaps(t: Tensor) -> bool:
    """Return whether two elements of a tensor may lie in one place."""
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1) if size > 1 else 0
    return False


def _weight(p: Tensor, units: bool) -> Tensor:
    g = p.grad
    if units and g is not None and g.layout == torch.sparse_coo:
        return p.detach()[tuple(g.indices())]
    return local_of(p.detach())


def drop(params: Iterable[Tensor], finite: Any) -> None:
    """Take the gradients of a step that is not finite away from the optimizer.

    Without gradients no optimizer touches parameters or state. Where the flag would
    have to be waited for, they become 0 instead, as far as that protects.
    """
    if at_hand(finite):
        for p in params if not finite else ():
            p.grad = None
        return
    bad = ~finite
    for p in params:
        if p.grad is not None:
            local_of(p.grad).masked_fill_(bad, 0)
