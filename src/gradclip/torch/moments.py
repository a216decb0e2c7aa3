"""The second moment that Adam keeps anyway, for a rule that has none of its own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradclip.rules import Rule, State
from gradclip.torch.dtensors import local_of

KEEPERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)


def check_keeper(optimizer: torch.optim.Optimizer, rule: Rule) -> None:
    """Refuse an optimizer whose memory is not known to be such a moment."""
    if not isinstance(optimizer, KEEPERS):
        raise ValueError(
            f"{rule!r} reads the second moment of torch's Adam, AdamW, NAdam or RAdam, "
            f"and {type(optimizer).__name__} is none of them; use memory='own', which "
            "takes up to twice the room of the gradients."
        )


def lender_of(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
) -> Callable[[Rule, int, Tensor], tuple[Rule, State]]:
    """Return what tells a rule the moment of a parameter as it is before this step."""
    groups = optimizer.param_groups
    decays = {p: float(group["betas"][1]) for group in groups for p in group["params"]}

    def lend(rule: Rule, place: int, parts: Tensor) -> tuple[Rule, State]:
        p = params[place]
        # Each group of parameters may have another decay than the rule.
        dated = replace(rule, decay=decays[p])  # type: ignore[type-var]
        return dated, _memory(optimizer.state.get(p), parts)

    return lend


def _memory(kept: Any, parts: Tensor) -> State:
    """Return the root of a moment, and of how many steps it is."""
    if not kept:
        return {"root": torch.zeros_like(parts), "count": parts.new_zeros(())}
    square = local_of(kept["exp_avg_sq"])
    if square.is_complex():
        # Adam takes the two parts of a complex number for numbers of their own.
        square = square.real + square.imag
    # An optimizer that is not fused counts on the host, and a copy makes that wait.
    step = kept["step"]
    there = isinstance(step, Tensor) and step.device == parts.device
    count = step.to(parts) if there else parts.new_full((), float(step))
    return {"root": square.to(parts).sqrt(), "count": count}
