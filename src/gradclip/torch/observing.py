"""Watch a program train: clips, backward passes, loss scaling, reductions, steps.

The functions are replaced where programs look them up, for as long as a `with` lasts,
and do what they always did.
"""

import functools
import inspect
import math
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import gradclip.torch
import gradclip.torch.functional
from gradclip.decision import Info
from gradclip.policy import only_records
from gradclip.rules import Norm, Rule, Value
from gradclip.torch.attach import Attached
from gradclip.torch.clipper import Clipper
from gradclip.torch.dtensors import full_of
from gradclip.torch.frames import frames
from gradclip.torch.functional import get_total_norm
from gradclip.torch.hooked import closure_of, with_closure
from gradclip.torch.ledger import Ledger, gradient

CLIPS = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_")
HOMES = {
    "torch.nn.utils": (torch.nn.utils, torch.nn.utils.clip_grad),
    "gradclip.torch": (gradclip.torch, gradclip.torch.functional),
}
INSTALLED = Path(sysconfig.get_path("purelib"))
LIBRARY = Path(inspect.__file__).parent
TORCH, OURS = Path(torch.__file__).parent, Path(gradclip.__file__).parent


class Enough(BaseException):
    """As many steps as were asked for have been seen; no program catches it."""


@contextmanager
def observing(ledger: Ledger, steps: int, folder: Path) -> Iterator[None]:
    """Enter into a ledger what happens inside of the `with`.

    Args:
        ledger: Takes in the events.
        steps: After so many steps of one optimizer, `Enough` is raised.
        folder: Where the program that is watched lies.
    """
    watch = _Watch(ledger, steps, folder)
    with ExitStack() as stack:
        for home, modules in HOMES.items():
            for name in CLIPS:
                for module in modules:
                    noted = functools.partial(watch.clipping, f"{home}.{name}")
                    if hasattr(module, name):
                        stack.enter_context(replaced(module, name, noted))
        others: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
            (Clipper, "_run", watch.running),
            (torch.autograd, "backward", watch.going_back),
            (torch.amp.GradScaler, "unscale_", watch.unscaling),
            (torch.distributed, "all_reduce", watch.reducing),
            (torch.optim.Optimizer, "add_param_group", watch.holding),
            (threading, "excepthook", watch.failing),
        )
        for owner, name, make in others:
            if hasattr(owner, name):
                stack.enter_context(replaced(owner, name, make))
        before = register_optimizer_step_pre_hook(watch.before_step)
        stack.callback(before.remove)
        after = register_optimizer_step_post_hook(watch.after_step)
        stack.callback(after.remove)
        yield


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute by what `make` makes of it, and put it back."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))
    try:
        yield
    finally:
        setattr(owner, name, original)


class _Watch:
    """The replacements and hooks; each enters one kind of event."""

    def __init__(self, ledger: Ledger, steps: int, folder: Path) -> None:
        self.ledger, self.steps, self.folder = ledger, steps, folder
        self._depth = 0

    def clipping(self, call: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of torch's, or of ours by the same name, that is noted."""
        signature = inspect.signature(original)

        def clip(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            tensors, limit, *others = bound.arguments.values()
            once = hasattr(tensors, "__next__")
            given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            note, fresh = self.ledger.before_clip(self._site(), call, given, once)
            # The norm is handed over, or returned, or has to be taken before the clip.
            norm = _largest(given) if call.endswith("value_") else [*others, None][0]
            name = next(iter(bound.arguments))
            # Torch warns of an empty generator, and not of an empty list.
            bound.arguments[name] = (p for p in given) if once else given
            result = original(*bound.args, **bound.kwargs)
            note.limit = _number(limit)
            note.norm = _number(norm if result is None else result)
            note.clipped, note.measures = note.norm > note.limit, note.limit == math.inf
            self.ledger.after_clip(note, given, fresh)
            return result

        return clip

    def running(self, original: Callable[..., Info]) -> Callable[..., Info]:
        """Return the place where clippers act, noted."""

        def run(clipper: Clipper, *args: Any) -> Info:
            inside = isinstance(clipper, Attached)
            call = f"{'attach' if inside else 'Clipper'}({clipper.rule!r})"
            place = self._site(), call, clipper.params, False
            note, fresh = self.ledger.before_clip(*place)
            info = original(clipper, *args)
            numbers = info.to_dict()
            note.limit, note.norm = numbers["limit"], numbers["norm"]
            note.clipped = bool(numbers["clipped"])
            note.measures = only_records(clipper.rule)
            note.kind = _kind(clipper.rule) or note.kind
            if inside:
                self.ledger.inside_step(note, clipper.params, fresh)
            else:
                self.ledger.after_clip(note, clipper.params, fresh)
            return info

        return run

    def going_back(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return `torch.autograd.backward`, noted; checkpointing calls it in itself."""

        def backward(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return original(*args, **kwargs)
            self._depth += 1
            try:
                self.ledger.before_backward()
                result = original(*args, **kwargs)
                self.ledger.after_backward()
            finally:
                self._depth -= 1
            return result

        return backward

    def unscaling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return `GradScaler.unscale_`, noted."""

        def unscale_(scaler: Any, optimizer: Any) -> Any:
            def act() -> Any:
                return original(scaler, optimizer)

            if scaler.is_enabled() and scaler.get_scale() != 1:
                return self.ledger.divides(optimizer, scaler.get_scale(), act)
            return act()

        return unscale_

    def reducing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return `torch.distributed.all_reduce`, noted."""

        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.ledger.reduces(tensor)
            return original(tensor, *args, **kwargs)

        return all_reduce

    def failing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return what threads tell their errors to, silent at the end that we made."""

        def excepthook(args: Any) -> None:
            if not issubclass(args.exc_type, Enough):
                original(args)

        return excepthook

    def holding(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return `Optimizer.add_param_group`, noted; a new optimizer calls it too."""

        def add_param_group(optimizer: Any, group: Any) -> Any:
            result = original(optimizer, group)
            self.ledger.knows(optimizer)
            return result

        return add_param_group

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Note a step that begins, and put something around its closure."""
        watched = self.ledger.before_step(optimizer, closure_of(args, kwargs))
        return None if watched is None else with_closure(args, kwargs, watched)

    def after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Note a step that is done, and end the program if it was the last."""
        if self.ledger.after_step(optimizer) >= self.steps:
            raise Enough

    def _site(self) -> str:
        """Return the line that calls, and the line of the program behind it."""
        lines = list(_lines_outside())
        called = lines[0] if lines else (Path("?"), 0)
        own = next((x for x in lines if self._own(x[0])), called)
        site = self._place(*called)
        return site if own == called else f"{site}, from {self._place(*own)}"

    def _own(self, path: Path) -> bool:
        # An environment often lies in the folder of what is trained with it.
        return self.folder in path.parents and INSTALLED not in path.parents

    def _place(self, path: Path, line: int) -> str:
        for root in (INSTALLED, self.folder):
            if root in path.parents:
                return f"{path.relative_to(root)}:{line}"
        return f"{path}:{line}"


def _lines_outside() -> Iterator[tuple[Path, int]]:
    """Yield the lines that led here, the innermost first, outside of torch and us."""
    for frame in frames():
        path = Path(frame.f_code.co_filename)
        if not _between(path):
            yield path, frame.f_lineno


def _between(path: Path) -> bool:
    """Return whether a frame only stands between a call and the line that makes it."""
    # Frozen modules have a name in angle brackets for a path.
    if not path.is_absolute() or OURS in path.parents or TORCH in path.parents:
        return True
    # Packages may be installed inside of the folder of the standard library.
    return LIBRARY in path.parents and INSTALLED not in path.parents


def _kind(rule: Rule) -> str:
    """Return which function of torch's does what a rule does, or nothing."""
    if isinstance(rule, Norm) and rule.over == "all":
        return "clip_grad_norm_"
    return "clip_grad_value_" if isinstance(rule, Value) else ""


def _largest(given: list[torch.Tensor]) -> Any:
    """Return the largest modulus in the gradients."""
    return get_total_norm(
        [g for p in given if (g := gradient(p)) is not None], math.inf
    )


def _number(value: Any) -> float:
    """Return a number; the norm of a sharded model lies in pieces."""
    return float(full_of(value) if isinstance(value, torch.Tensor) else value)
