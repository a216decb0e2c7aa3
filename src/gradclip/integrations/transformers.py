"""Hugging Face's Trainer: a callback that clips inside the optimizer's step."""

import warnings
from typing import Any

import torch

from gradclip.history import History
from gradclip.integrations import needed, rule_of
from gradclip.integrations.tracking import Tracked, check_alone
from gradclip.rules import Rule

LARGE = 10**6
"""How many numbers may be text in a trainer's state without a word about it."""

Base: Any = needed("transformers", "transformers.trainer_callback")


class GradientClippingCallback(Base.TrainerCallback, Base.ExportableState):  # type: ignore[misc]
    r"""Clip by a rule in a `Trainer` whose own clip is off: `max_grad_norm=0`.

    $g \leftarrow g \cdot \min(1, \text{limit}_t / \lVert g \rVert)$

    The memory of the rule is saved with each checkpoint, in `trainer_state.json`, and
    `train(resume_from_checkpoint=…)` goes on from it. `grad_norm`, `grad_limit` and
    `clip_rate` are added to the logs.

    Args:
        rule: Any rule, or the text of its constructor.
        history: Takes in every step; a history, or the path of one.
        options: As for `gradclip.torch.attach`, such as `on_nonfinite`. Of these, a
            checkpoint keeps numbers and texts.

    Raises:
        TypeError: For what is not a rule.
        ValueError: When training starts, if the trainer clips too, uses DeepSpeed, or
            has two of these callbacks.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from gradclip.integrations.transformers import GradientClippingCallback
        >>> args = TrainingArguments("out", max_grad_norm=0)  # doctest: +SKIP
        >>> callback = GradientClippingCallback("ZScore()")
        >>> trainer = Trainer(model, args, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self, rule: Rule | str, history: History | str | None = None, **options: Any
    ) -> None:
        """Keep the choice; the optimizer is made later."""
        self.rule, self.options = rule_of(rule), options
        self.history = History(history) if isinstance(history, str) else history
        self.tracked: Tracked | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Attach to the optimizer, and go on from a checkpoint."""
        setting = "TrainingArguments(max_grad_norm={})", args.max_grad_norm
        check_alone(*setting, "set max_grad_norm=0", bool(args.deepspeed))
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        if isinstance(saved, list):
            raise ValueError(
                f"{len(saved)} callbacks clip the same gradients; use one, with "
                "chain(a, b) for two rules."
            )
        # Accelerate's wrapper steps through the optimizer inside, and has no hooks.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        options = {"model": kwargs.get("model"), "history": self.history}
        self.on_train_end(args, state, control)
        self.tracked = Tracked(optimizer, self.rule, **options, **self.options)
        if memory := saved.get("attributes", {}).get("memory"):
            self.memory = memory
        if args.save_strategy != "no":
            _check_size(self.rule, self.tracked)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add to the logs of a training step; the trainer's history has a copy."""
        if self.tracked and logs and "loss" in logs:
            found = self.tracked.metrics()
            logs.update(found)
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the clipping out of the optimizer again, and write the history."""
        if self.tracked:
            self.tracked.detach()

    @property
    def memory(self) -> dict[str, Any]:
        """What the clipper remembers, as JSON can hold it."""
        state = self.tracked.state_dict() if self.tracked else {}
        return {name: x.tolist() for name, x in state.items()}

    @memory.setter
    def memory(self, saved: dict[str, Any]) -> None:
        if self.tracked:
            # JSON has lost the types, and float32 would round a memory in float64.
            kinds = {name: x.dtype for name, x in self.tracked.state_dict().items()}
            tensors = {k: torch.tensor(x, dtype=kinds[k]) for k, x in saved.items()}
            self.tracked.load_state_dict(tensors)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, and what a restored callback is made from."""
        path = str(self.history.path) if self.history else None
        # JSON cannot hold a process group, a function or a set.
        plain = {k: x for k, x in self.options.items() if isinstance(x, int | str)}
        args = {"rule": repr(self.rule), "history": path, **plain}
        return {"args": args, "attributes": {"memory": self.memory}}


def _check_size(rule: Rule, tracked: Tracked) -> None:
    """Warn of a memory as large as the gradients, which JSON is not made for."""
    size = sum(x.numel() for x in tracked.state_dict().values())
    if size > LARGE:
        warnings.warn(
            f"{rule!r} remembers {size} numbers, and each checkpoint will have them as "
            "text in trainer_state.json; use a rule over norms, or set "
            "save_strategy='no' and save callback.tracked.state_dict() by yourself.",
            stacklevel=2,
        )
