"""What the adapters for torch trainers share: an attached clipper that is counted."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gradclip.extras import needed

# ruff: noqa: E402 - a trainer may be there without it.
needed("torch", "torch")

import torch
from torch import Tensor

from gradclip.integrations import shown
from gradclip.rules import Rule
from gradclip.torch import attach, whole
from gradclip.torch.dtensors import holds_dtensor, holds_pieces

LARGE = 10**6
"""How many numbers may be written as text without a word about it."""


class Tracked:
    """A clipper inside an optimizer's step, and how many of its steps were clipped.

    Args:
        optimizer: A torch optimizer.
        rule: Any rule.
        options: As for `attach`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, rule: Rule, **options: Any
    ) -> None:
        """Attach, and count behind every step."""
        self.clipper = attach(optimizer, rule, **options)
        self.clipped: Any = torch.zeros((), dtype=torch.int64)
        self.steps = 0
        self._counted: Any = None
        self._register()

    def _register(self) -> None:
        after: Any = self.clipper.optimizer.register_step_post_hook  # type: ignore[attr-defined]
        self._hook: Any = after(self._count)

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the hook, which no optimizer takes into a copy."""
        return {**self.__dict__, "_hook": self._hook is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register the hook again, unless it had been taken out."""
        self.__dict__.update(state, _hook=None)
        if state["_hook"]:
            self._register()

    def _count(self, *_: Any) -> None:
        info = self.clipper.info
        # A step without gradients leaves the report of the one before.
        if info is not None and info is not self._counted:
            self.clipped = self.clipped.to(info.clipped.device) + info.clipped
            # Not those of the clipper: LBFGS has it clip several times in a step.
            self.steps += 1
            self._counted = info

    def metrics(self, suffix: str = "") -> dict[str, float]:
        """Return what a log shows: the latest norm and limit, and the clip rate.

        Args:
            suffix: Put behind each name.
        """
        info = self.clipper.info
        if info is None:
            return {}
        numbers = info.to_dict()
        found = shown(numbers["norm"], numbers["limit"], self.clipped, self.steps)
        return {name + suffix: x for name, x in found.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the memory of the clipper, and the counts, for one file of all."""
        counts = {"clipped": self.clipped.clone(), "counted": torch.tensor(self.steps)}
        return whole(self.clipper.state_dict()) | counts

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved memory, exactly.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If it belongs to another rule or other parameters.
        """
        own = ("clipped", "counted")
        memory = {name: x for name, x in state.items() if name not in own}
        self.clipper.load_state_dict(memory)
        self.clipped = torch.as_tensor(state["clipped"])
        # Earlier checkpoints have the steps of the clipper only.
        self.steps = int(state.get("counted", state["step"]))

    def as_json(self) -> dict[str, Any]:
        """Return the memory as JSON can hold it."""
        return {name: x.tolist() for name, x in self.state_dict().items()}

    def load_json(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `as_json` returned.

        Args:
            saved: The memory, as JSON gave it back.

        Raises:
            ValueError: If it belongs to another rule or other parameters.
        """
        # JSON has lost the types, and float32 would round a memory in float64.
        kinds = {name: x.dtype for name, x in self.state_dict().items()}
        tensors = {k: torch.tensor(x, dtype=kinds.get(k)) for k, x in saved.items()}
        self.load_state_dict(tensors)

    def check_unsplit(self, remedy: str) -> None:
        """Refuse a memory of which each process has a part, where one writes for all.

        Args:
            remedy: What to do instead.

        Raises:
            ValueError: If there is a DTensor in the memory, or a part that only this
                process has.
        """
        memory = self.clipper.state_dict()
        if holds_pieces(memory) or holds_dtensor(memory.values()):
            self.detach()
            raise ValueError(
                f"{self.clipper.rule!r} remembers what differs between processes, and "
                "the trainer has one process write checkpoints by itself; use a rule "
                f"over norms that all have, or {remedy}."
            )

    def warn_if_large(self, place: str, remedy: str) -> None:
        """Warn of a memory as large as the gradients, which JSON is not made for.

        Args:
            place: The file that it would be written to.
            remedy: What to do instead.
        """
        size = sum(x.numel() for x in self.clipper.state_dict().values())
        if size > LARGE:
            warnings.warn(
                f"{self.clipper.rule!r} remembers {size} numbers, and each checkpoint "
                f"has them as text in {place}; use a rule over norms, or {remedy}.",
                stacklevel=2,
            )

    def detach(self) -> None:
        """Take everything out of the optimizer again, and write the history."""
        self.clipper.detach()
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        if self.clipper.history is not None:
            self.clipper.history.flush()


@contextmanager
def resuming(callback: str) -> Iterator[None]:
    """Say how to begin anew, where a saved memory does not fit.

    Args:
        callback: The name of the callback that takes `resume=False`.

    Raises:
        ValueError: The one that was raised inside, with these words.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{error} To go on with another rule and an empty memory: "
            f"{callback}(rule, resume=False)."
        ) from None


def one_for_each(
    optimizers: Sequence[torch.optim.Optimizer], history: Any
) -> list[Any]:
    """Return a history for each optimizer, or None for each.

    Args:
        optimizers: The optimizers.
        history: A history, a list of them, or None.

    Raises:
        ValueError: If there are not as many histories as optimizers.
    """
    if history is None:
        return [None] * len(optimizers)
    histories = history if isinstance(history, list) else [history]
    if len(histories) != len(optimizers):
        raise ValueError(
            f"{len(histories)} histories for {len(optimizers)} optimizers; hand over a "
            "list with one for each."
        )
    return histories
