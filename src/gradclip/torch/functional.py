"""The functions of `torch.nn.utils`, with their signatures, made exact and safe."""

import math
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from gradclip.arguments import without_memory
from gradclip.backends.narrow import at_home, bring_back
from gradclip.decision import clip_scale
from gradclip.pipeline import run
from gradclip.policy import NonFiniteError, Policy, check_policy
from gradclip.rules import Norm, Rule, Value
from gradclip.scalars import one_number
from gradclip.torch.dtensors import full_of, holds_dtensor, part_of
from gradclip.torch.exact import WIDE, at_hand, host_number, on_host, tensor_of
from gradclip.torch.gradients import (
    check_strided,
    check_types,
    collect,
    distinct,
    drop,
    tensors_only,
)
from gradclip.torch.layout import Layout
from gradclip.torch.placement import SplitOver, layout_of, refuse_pieces
from gradclip.torch.sharded import Sharded
from gradclip.torch.verbs import InPlace, OneNumber
from gradclip.torch.verify import Verify, verifier_for

Tensors = Tensor | Iterable[Tensor]
FLOAT32 = torch.finfo(torch.float32).max
# One for all threads: they keep nothing between calls.
_VERBS, _ONE = InPlace(), OneNumber()
_NUMBERS = (int, float)


def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    on_nonfinite: Policy = "ignore",
    split_over: SplitOver = None,
    verify: Verify = False,
) -> Tensor:
    r"""Clip the norm of all gradients together, in place.

    $g \leftarrow g \cdot \min(1, c / \lVert g \rVert_p)$

    Args:
        parameters: Parameters of any shape, or one parameter, whose `grad` is clipped.
        max_norm: $c$, the largest norm let through, in the unit of the gradient norm,
            above 0; infinity only measures. A 0-d tensor is not read by the host.
        norm_type: $p$, the order of the norm, above 0.
        error_if_nonfinite: The same as `on_nonfinite="raise"`.
        foreach: Accepted for compatibility; the fastest way is always taken.
        on_nonfinite: With NaN or infinity in a gradient, `"ignore"` leaves all of them
            as they are, `"skip"` sets them to None so that the optimizer takes no step,
            `"zero"` clears the bad elements and clips the rest, `"raise"` raises.
        split_over: As for `Clipper`; parameters have the names `"[0]"`, `"[1]"` and so
            on here. DTensors need nothing.
        verify: As for `Clipper`; here parameters are made known at every call.

    Returns:
        The norm before clipping, 0-d, in float32 (float64 for float64 gradients, and
        where float32 cannot hold it).

    Raises:
        TypeError: For what is not a tensor, and for a schedule as the limit, which
            needs a `Clipper`.
        ValueError: For a limit or order that is not above 0, for no parameters and for
            no gradients.
        NonFiniteError: A `RuntimeError`, where that was asked for.
        VerifyError: As for `Clipper`.

    Example:
        >>> import torch
        >>> from gradclip.torch import clip_grad_norm_
        >>> w = torch.zeros(2, requires_grad=True)
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([w], max_norm=1.0), w.grad
        (tensor(5.), tensor([0.6000, 0.8000]))

    Reference:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural
        networks. arXiv 1211.5063, 2013.
    """
    policy: Policy = "raise" if error_if_nonfinite else on_nonfinite
    # A number is checked once, and not at every step. Dynamo warns of any cache.
    plain = type(max_norm) in _NUMBERS and type(norm_type) in _NUMBERS
    kept = plain and not torch.compiler.is_compiling()
    rule, alone = (_kept_norm if kept else _norm)(max_norm, norm_type)
    return _clip_parameters(parameters, rule, alone, policy, split_over, verify)


def clip_grad_value_(
    parameters: Tensors,
    clip_value: float | Tensor,
    foreach: bool | None = None,
    *,
    on_nonfinite: Policy = "ignore",
    split_over: SplitOver = None,
    verify: Verify = False,
) -> None:
    r"""Clamp every element of the gradients, in place; complex ones by modulus.

    $g_i \leftarrow \max(-c, \min(c, g_i))$

    Args:
        parameters: Parameters of any shape, or one parameter, whose `grad` is clipped.
        clip_value: $c$, the largest modulus let through, in the unit of one element of
            the gradient, above 0.
        foreach: Accepted for compatibility.
        on_nonfinite: As for `clip_grad_norm_`; `"ignore"` clamps infinity too, and
            leaves NaN.
        split_over: As for `clip_grad_norm_`.
        verify: As for `clip_grad_norm_`.

    Raises:
        TypeError: For what is not a tensor, and for a schedule as the limit, which
            needs a `Clipper`.
        ValueError: For a limit that is not above 0, no parameters or no gradients.
        NonFiniteError: Where that was asked for.
        VerifyError: As for `Clipper`.

    Example:
        >>> import torch
        >>> from gradclip.torch import clip_grad_value_
        >>> w = torch.zeros(2, requires_grad=True)
        >>> w.grad = torch.tensor([-3.0, 0.5])
        >>> clip_grad_value_(w, 1.0)
        >>> w.grad
        tensor([-1.0000,  0.5000])
    """
    rule = Value(clip_value)
    _refuse_schedules(rule)
    alone = one_number(rule)
    _clip_parameters(parameters, rule, alone, on_nonfinite, split_over, verify)


@torch.no_grad()
def get_total_norm(
    tensors: Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    split_over: SplitOver = None,
) -> Tensor:
    r"""Return the norm of all tensors together.

    $\lVert (t_1, t_2, …) \rVert_p$

    Args:
        tensors: Tensors of any shape, or one tensor; the norm of none is 0.
        norm_type: $p$, the order of the norm, above 0.
        error_if_nonfinite: Whether NaN and infinity raise.
        foreach: Accepted for compatibility.
        split_over: As for `clip_grad_norm_`.

    Returns:
        The norm, 0-d, in float32 (float64 if there is a float64 tensor, and where
        float32 cannot hold it).

    Raises:
        TypeError: For what is not a tensor, and for integers.
        ValueError: For an order that is not above 0.
        NonFiniteError: A `RuntimeError`, where that was asked for.

    Example:
        >>> import torch
        >>> from gradclip.torch import get_total_norm
        >>> get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    rule = Norm(1.0, p=_order(norm_type))
    order, leaves = rule.p, tensors_only(tensors)
    if not leaves:
        if split_over is None or callable(split_over):
            return torch.tensor(0.0, device="cpu")
        # The others of the group wait for what this process has, also for nothing.
        leaves = [torch.zeros(0, device="cpu")]
    check_types({t.dtype for t in leaves})
    verbs, layout = _VERBS, _layout(leaves, split_over)
    leaves = at_home(list(map(_dense, leaves)))
    if layout is not None:
        verbs = Sharded(layout, rule, list(range(len(leaves))))
        leaves = [part_of(t) for t in leaves]
    norm = verbs.measure(leaves, "all", order)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise NonFiniteError(
            f"the norm of order {order} of {len(leaves)} tensors is {norm.item()}; "
            "look for NaN and infinity in them."
        )
    return _reported(norm, {t.dtype for t in leaves})


def _dense(t: Tensor) -> Tensor:
    """Return the values of a sparse tensor, which has no others than 0."""
    if t.layout == torch.sparse_coo:
        return t.coalesce().values()
    check_strided(t)
    return t


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensors,
    max_norm: float | Tensor,
    total_norm: Tensor | float,
    foreach: bool | None = None,
) -> None:
    r"""Scale gradients whose norm is known already, in place.

    $g \leftarrow g \cdot \min(1, c / n)$

    Args:
        parameters: Parameters of any shape, or one parameter, whose `grad` is scaled.
        max_norm: $c$, the largest norm let through, in the unit of the gradient norm,
            above 0.
        total_norm: $n$, their norm, a number at least 0 or a 0-d tensor, in the unit of
            the gradient norm; nothing is scaled if it is not finite.
        foreach: Accepted for compatibility.

    Raises:
        TypeError: For what is not a tensor, and for a schedule as the limit, which
            needs a `Clipper`.
        ValueError: For a limit that is not above 0, a norm below 0 or of several
            numbers, no parameters or no gradients.

    Example:
        >>> import torch
        >>> from gradclip.torch import clip_grads_with_norm_
        >>> w = torch.zeros(2, requires_grad=True)
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> clip_grads_with_norm_(w, max_norm=1.0, total_norm=torch.tensor(5.0))
        >>> w.grad
        tensor([0.6000, 0.8000])
    """
    rule = Norm(max_norm)
    _refuse_schedules(rule)
    (norm,) = at_home([full_of(tensor_of(total_norm))])
    norm = norm.double()
    # A number by a tensor would be its inverse times the number, which may overflow.
    limit = rule.limit
    if isinstance(limit, int | float):
        limit = norm.new_full((), limit)
    if norm.dim() or (on_host([norm]) and bool(norm < 0)):
        raise ValueError(
            f"total_norm={total_norm!r}: it is a number at least 0, or a 0-d tensor."
        )
    found = collect(distinct(parameters))
    scale = clip_scale(norm, limit, torch)
    if _VERBS.known(scale == 1) is not True:
        _VERBS.multiply(found.leaves, scale, "all")
        bring_back(found.leaves, found.origins)


@torch.no_grad()
def _clip_parameters(
    parameters: Tensors,
    rule: Rule,
    alone: bool,
    policy: Policy,
    split_over: SplitOver,
    verify: Verify,
) -> Tensor:
    """Clip the gradients of parameters, and return the norm as torch's functions do."""
    check_policy(policy)
    params = distinct(parameters)
    layout = _layout(params, split_over)
    verifier = None
    if verify:
        verifier = verifier_for(verify, _names(params), params, layout)
    if verifier is not None:
        found = collect(params, split=True)
        verifier.before(found.present, found.leaves)
    found = collect(params, split=layout is not None)
    if layout is not None:
        verbs: InPlace = Sharded(layout, rule, found.present)
    else:
        verbs = _ONE if alone and on_host(found.leaves) else _VERBS
    clip = partial(
        run,
        verbs,
        found.leaves,
        rule,
        [{}],
        policy=policy,
        name_of=lambda i: f"parameter [{found.present[i]}]",
    )
    with verbs.quiet():
        _, info, _ = clip() if verifier is None else verifier.compare(clip)
    bring_back(found.leaves, found.origins)
    if policy == "skip":
        drop(params, info.kept)
    return _reported(info.norm, found.dtypes)


def _norm(max_norm: Any, norm_type: Any) -> tuple[Norm, bool]:
    """Return the rule of torch's function, and whether it needs single numbers only."""
    rule = Norm(max_norm, p=_order(norm_type))
    _refuse_schedules(rule)
    return rule, one_number(rule)


_kept_norm = lru_cache(maxsize=64, typed=True)(_norm)


def _order(norm_type: Any) -> float:
    """Return the order of a norm, which torch also takes as a text."""
    try:
        return float(norm_type)
    except (TypeError, ValueError):
        raise ValueError(
            f"norm_type={norm_type!r}: it is a number above 0, or float('inf')."
        ) from None


def _refuse_schedules(rule: Rule) -> None:
    """Refuse a limit that changes with the step, at which these would always be 0."""
    without_memory(
        rule, "a function of one step", "Clipper(params, rule) and its clip_()"
    )


def _layout(tensors: list[Tensor], split_over: SplitOver) -> Layout | None:
    if split_over is None and not holds_dtensor(tensors):
        refuse_pieces(tensors)
        return None
    return layout_of(zip(_names(tensors), tensors, strict=True), split_over)


def _names(tensors: list[Tensor]) -> list[str]:
    return [f"[{i}]" for i in range(len(tensors))]


def _reported(norm: Any, dtypes: set[torch.dtype]) -> Tensor:
    """Return a norm in float32, in which those of half precision keep their digits.

    It stays in float64 for gradients of that type, and where float32 cannot hold it.
    """
    # In the type of the gradients, a split would change the norm (pytorch#194033).
    beyond = at_hand(norm) and FLOAT32 < float(norm) < math.inf
    narrow = dtypes.isdisjoint(WIDE) and not beyond
    dtype = torch.float32 if narrow else torch.float64
    if isinstance(norm, Tensor):
        return norm.to(dtype)
    return host_number(float(norm), dtype)
