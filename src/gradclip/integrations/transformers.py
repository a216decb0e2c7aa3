"""Hugging Face's Trainer: a callback that clips inside the optimizer's step."""

import os
from typing import Any

from gradclip.history import History
from gradclip.integrations import needed, rule_of
from gradclip.integrations.alone import check_alone
from gradclip.integrations.tracking import Tracked, resuming
from gradclip.rules import Rule

Base: Any = needed("transformers", "transformers.trainer_callback")


class GradientClippingCallback(Base.TrainerCallback, Base.ExportableState):  # type: ignore[misc]
    r"""Clip by a rule in a `Trainer` whose own clip is off: `max_grad_norm=0`.

    $g \leftarrow g \cdot \min(1, \text{limit}_t / \lVert g \rVert)$

    The memory of the rule is saved with each checkpoint, in `trainer_state.json`, and
    `train(resume_from_checkpoint=…)` goes on from it. `grad_norm`, `grad_limit` and
    `clip_rate` are added to the logs.

    Args:
        rule: Any rule, or the text of its constructor.
        history: Takes in every step; a history, the path of one, or a dictionary of
            what makes one.
        resume: Whether to go on from the memory in a checkpoint; without it the rule,
            which may be another one, begins anew. Checkpoints do not keep this.
        options: As for `gradclip.torch.attach`, such as `on_nonfinite`. Of these, a
            checkpoint keeps numbers and texts.

    Raises:
        TypeError: For what is not a rule.
        ValueError: When training starts, if the trainer clips too, uses DeepSpeed, has
            two of these callbacks, is to restore one whose rule has no text, or to save
            a rule's memory of the elements of split parameters.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from gradclip.integrations.transformers import GradientClippingCallback
        >>> args = TrainingArguments("out", max_grad_norm=0)  # doctest: +SKIP
        >>> callback = GradientClippingCallback("ZScore()")
        >>> trainer = Trainer(model, args, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        rule: Rule | str,
        history: History | str | os.PathLike[str] | dict[str, Any] | None = None,
        resume: bool = True,
        **options: Any,
    ) -> None:
        """Keep the choice; the optimizer is made later."""
        self.rule, self.options, self.resume = _readable(rule), options, resume
        if isinstance(history, dict):
            history = History(**history)
        elif isinstance(history, str | os.PathLike):
            history = History(history)
        self.history = history
        self.tracked: Tracked | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Attach to the optimizer, and go on from a checkpoint."""
        setting = "TrainingArguments(max_grad_norm={})", args.max_grad_norm
        # Accelerate may have brought DeepSpeed in, and then the arguments know nothing.
        steps = "DeepSpeed" in type(getattr(optimizer, "optimizer", None)).__name__
        check_alone(*setting, "set max_grad_norm=0", bool(args.deepspeed) or steps)
        if getattr(args, "restore_callback_states_from_checkpoint", False):
            _readable(repr(self.rule))
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
        # Without a checkpoint, the trainer hands back what an earlier run left here.
        memory = saved.get("attributes", {}).get("memory")
        if memory and state.global_step and self.resume:
            with resuming(type(self).__name__):
                self.memory = memory
        if args.save_strategy != "no":
            own = (
                "set save_strategy='no' and save callback.tracked.state_dict() yourself"
            )
            self.tracked.check_unsplit(own)
            self.tracked.warn_if_large("trainer_state.json", own)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add to the logs of a training step; the trainer's history has a copy."""
        # Logs of an evaluation, and the last one of a training, have no such loss.
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
        return self.tracked.as_json() if self.tracked else {}

    @memory.setter
    def memory(self, saved: dict[str, Any]) -> None:
        if self.tracked:
            self.tracked.load_json(saved)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, and what a restored callback is made from."""
        history = self.history.arguments() if self.history else None
        # JSON cannot hold a process group, a function or a set.
        plain = {k: x for k, x in self.options.items() if isinstance(x, int | str)}
        args = {"rule": repr(self.rule), "history": history, **plain}
        return {"args": args, "attributes": {"memory": self.memory}}


def _readable(rule: Rule | str) -> Rule:
    """Return a rule; say what to do where a checkpoint has kept no text of it."""
    try:
        return rule_of(rule)
    except ValueError as error:
        if "<" not in str(rule):
            raise
        raise ValueError(
            f"{error} Leave out restore_callback_states_from_checkpoint: the callback "
            "that is handed over gets its memory back without it."
        ) from None
