"""Clips that are recorded in a CUDA graph, which repeats them on the same memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradclip.memory import Memory
from gradclip.rules import Rule, State


def captures(p: Tensor) -> bool:
    """Return whether a CUDA graph is being recorded."""
    return p.is_cuda and torch.cuda.is_current_stream_capturing()


def check_graph(rule: Rule) -> None:
    """Refuse, inside of a CUDA graph, rules whose memory has no fixed size."""
    if rule.grows:
        raise ValueError(
            f"{rule!r} remembers more at every step, and a CUDA graph repeats the same "
            "work on the same memory; give it a window."
        )


def stay(memory: Memory, states: Sequence[State | None], *counts: Tensor) -> None:
    """Put what is remembered now where it was before: a graph reads it from there."""
    # Not the step: the host counts it, and does nothing in a replay.
    now = memory.skipped, memory.in_a_row
    pairs = list(zip(counts, now, strict=True))
    for old, new in zip(states, memory.states, strict=True):
        pairs += [(x, (new or {})[name]) for name, x in (old or {}).items()]
    for before, after in pairs:
        before.copy_(after)
    memory.states = states
    memory.skipped, memory.in_a_row = counts
