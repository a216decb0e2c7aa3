"""The functions of `torch.nn.utils`, with their signatures, made exact and safe."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gradclip.pipeline import Info, NonFiniteError, Policy, check_policy, run
from gradclip.rules import Limit, Norm, Rule, Value
from gradclip.torch.gradients import collect, named_parameters
from gradclip.torch.verbs import InPlace

_VERBS = InPlace()
Tensors = Tensor | Iterable[Tensor]


def clip_grad_norm_(
    parameters: Tensors,
    max_norm: Limit,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    on_nonfinite: Policy = "ignore",
) -> Tensor:
    r"""Clip the norm of all gradients together, in place.

    $g \leftarrow g \cdot \min(1, c / \lVert g \rVert_p)$

    Args:
        parameters: Parameters, or one parameter, whose `grad` is clipped.
        max_norm: $c$, the largest norm let through, above 0; infinity only measures.
            A 0-d tensor is not read by the host.
        norm_type: $p$, the order of the norm, above 0.
        error_if_nonfinite: The same as `on_nonfinite="raise"`.
        foreach: Accepted for compatibility; the fastest way is always taken.
        on_nonfinite: `"ignore"` leaves all gradients as they are when one is NaN or
            infinite, `"skip"` sets them to None so that the optimizer takes no step,
            `"zero"` clears the bad elements, `"raise"` raises.

    Returns:
        The norm before clipping, a 0-d tensor in float32 (float64 for float64).

    Raises:
        ValueError: For a limit or order that is not above 0, for no parameters and for
            no gradients.
        NonFiniteError: A `RuntimeError` too, where that was asked for.

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
    policy = "raise" if error_if_nonfinite else on_nonfinite
    rule = Norm(max_norm, p=float(norm_type))
    return _reported(*_clip_parameters(parameters, rule, policy))
