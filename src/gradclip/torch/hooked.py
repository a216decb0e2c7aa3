"""A clipper that optimizers call: its hooks, and what becomes of them in a copy."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradclip.torch.clipper import Clipper
from gradclip.torch.frames import frames


class Hooked(Clipper):
    """A clipper that acts in the steps of optimizers."""

    _hooks: Sequence[Any] = ()
    _acted = False
    """Whether the step that is going on has had its clip, or its closure has it."""

    def _register(self) -> None:
        """Have the optimizers call this at every step."""
        raise NotImplementedError

    def _enter(
        self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
    ) -> tuple[Any, Any] | None:
        """Clip for a step, or have its closure do it."""
        raise NotImplementedError

    def _undo(self) -> None:
        """Put back what was changed for the duration of one step."""
        raise NotImplementedError

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
    ) -> tuple[Any, Any] | None:
        if not is_inside_a_step(optimizer):
            self._acted = False
        # An optimizer may make its gradients in the outer step, for the one inside.
        return None if self._acted else self._enter(optimizer, args, kwargs)

    def _after_step(
        self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
    ) -> None:
        if not is_inside_a_step(optimizer):
            self._undo()

    def detach(self) -> None:
        """Take the clipping out of the optimizers again."""
        # A step that was interrupted has left something changed.
        self._undo()
        self._doctor.unwatch()
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the hooks, which no optimizer takes into a copy."""
        return {**self.__dict__, "_hooks": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register the hooks again, unless they had been taken out."""
        self.__dict__.update(state)
        self._hooks = ()
        if state["_hooks"]:
            self._register()


def is_inside_a_step(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the step whose hook asks was called by one of the same optimizer.

    Torch puts hooks around the step of a class, and around that of its subclass, which
    may call the first: clipped in both, gradients would be clipped twice.
    """
    around = 0
    for kind in type(optimizer).__mro__:
        around += hasattr(kind.__dict__.get("step"), "hooked")
    if around < 2 or torch.compiler.is_compiling():
        return False
    _, _, step, *others = frames()
    outer = (frame for frame in others if frame.f_code is step.f_code)
    return any(frame.f_locals["args"][0] is optimizer for frame in outer)


def closure_of(args: Any, kwargs: Any) -> Callable[[], Any] | None:
    """Return the closure that a step was called with; the optimizer comes first."""
    found = args[1] if len(args) > 1 else kwargs.get("closure")
    # Others take a loss there, or a scaler.
    return found if callable(found) else None


def with_closure(args: Any, kwargs: Any, closure: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the arguments of a step with another closure in the place of theirs."""
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}


def only_prepares(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step is none of the training, but makes an empty state.

    Torch's distributed checkpoints take one with gradients of zeros and a rate of 0,
    for SGD without momentum at every checkpoint. Counted, it would be a step too many.
    """
    home = sys.modules.get("torch.distributed.checkpoint.state_dict")
    prepare = getattr(home, "_init_optim_state", None)
    if prepare is None or optimizer.state or torch.compiler.is_compiling():
        return False
    return any(frame.f_code is prepare.__code__ for frame in frames())
