"""Lightning: a callback that clips inside the step of each optimizer of a trainer."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gradclip.integrations import needed, rule_of
from gradclip.integrations.alone import check_alone
from gradclip.integrations.tracking import Tracked, one_for_each, resuming
from gradclip.rules import Rule
from gradclip.torch.doctor import CHECKS

if TYPE_CHECKING:
    from gradclip.history import History

needed("lightning", "lightning.pytorch", "pytorch_lightning")
# It goes by two names, and before 2.6 either trainer asks for a callback of its own.
NAMES = "lightning.pytorch", "pytorch_lightning"
FOUND = [import_module(name) for name in NAMES if find_spec(name.split(".")[0])]
Callback: Any = type("Callback", tuple(x.Callback for x in FOUND), {})


CLIPS = ("clip_grad_by_norm", "clip_grad_by_value")
"""Where a trainer's own clip ends up, if there is anything to clip to."""


class GradientClipping(Callback):  # type: ignore[misc]
    r"""Clip by a rule in automatic and manual optimization, with any precision.

    $g \leftarrow g \cdot \min(1, \text{limit}_t / \lVert g \rVert)$

    The memory of the rule is part of the checkpoints. `grad_norm`, `grad_limit` and
    `clip_rate` are logged with the trainer's own metrics; of several optimizers each
    has its own, as in `grad_norm/0`.

    Args:
        rule: Any rule, or the text of its constructor.
        history: Takes in every step; of several optimizers each needs one: a list.
        resume: Whether to go on from the memory in a checkpoint; without it the rule,
            which may be another one, begins anew.
        options: As for `gradclip.torch.attach`, such as `on_nonfinite`.

    Raises:
        TypeError: For what is not a rule.
        ValueError: When training starts, if the trainer clips too, if the strategy
            does not use the optimizers it is given, if histories are missing, or if a
            checkpoint has the memory of more or fewer optimizers; and at the step where
            a module calls `clip_gradients` by itself.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> import gradclip as gc
        >>> from gradclip.integrations.lightning import GradientClipping
        >>> trainer = Trainer(callbacks=[GradientClipping(gc.ZScore())], logger=False)
    """

    def __init__(
        self,
        rule: Rule | str,
        history: "History | list[History] | None" = None,
        resume: bool = True,
        **options: Any,
    ) -> None:
        """Keep the choice; the optimizers are made later."""
        self.rule, self.history, self.options = rule_of(rule), history, options
        self.resume = resume
        self.tracked: list[Tracked] = []
        self._saved: dict[str, Any] = {}
        self._for_test = False
        self._watched: tuple[Any, dict[str, Any]] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse to clip twice, or where the clip would do nothing."""
        if self._for_test:
            # A later fit does not go on from a checkpoint that was loaded for a test.
            self._saved, self._for_test = {}, False
        setting = "Trainer(gradient_clip_val={})", trainer.gradient_clip_val
        deepspeed = "DeepSpeed" in type(trainer.strategy).__name__
        check_alone(*setting, "leave it out", deepspeed)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to every optimizer, and go on from a checkpoint."""
        optimizers = trainer.optimizers
        histories = one_for_each(optimizers, self.history)
        saved = self._saved if self.resume else {}
        if saved and len(saved) != len(optimizers):
            raise ValueError(
                f"the checkpoint has the memory of {len(saved)} optimizers, and there "
                f"are {len(optimizers)} now; resume with those that were saved, or "
                "begin anew: GradientClipping(rule, resume=False)."
            )
        # One of several optimizers never holds the whole model, nor all the names.
        alone = len(optimizers) == 1
        checks = [c for c in CHECKS if alone or c not in ("unheld", "unmatched")]
        model = _outermost(trainer, pl_module)
        options = {"doctor": checks, "model": model, **self.options}
        self.teardown(trainer, pl_module, "fit")
        self.tracked = [
            Tracked(optimizer, self.rule, history=history, **options)
            for optimizer, history in zip(optimizers, histories, strict=True)
        ]
        with resuming(type(self).__name__):
            for key, state in saved.items():
                self.tracked[int(key)].load_state_dict(state)
        self._saved = {}
        self._watch(trainer.precision_plugin)

    def _watch(self, plugin: Any) -> None:
        """Refuse the trainer's own clip, also where a module calls it by itself."""
        own = vars(plugin)
        self._watched = plugin, {name: own[name] for name in CLIPS if name in own}
        own.update(dict.fromkeys(CLIPS, _refuse))

    def _look_away(self) -> None:
        """Give the trainer its own clip back."""
        if self._watched is not None:
            plugin, before = self._watched
            for name in CLIPS:
                vars(plugin).pop(name, None)
            vars(plugin).update(before)
            self._watched = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: Any) -> None:
        """Leave nothing behind, as no other hook follows: `teardown` does not."""
        self.teardown(trainer, pl_module, trainer.state.fn)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log at the trainer's logging steps; only then is a number waited for."""
        if not trainer._logger_connector.should_update_logs:
            return
        for i, tracked in enumerate(self.tracked):
            found = tracked.metrics(f"/{i}" if len(self.tracked) > 1 else "")
            pl_module.log_dict(found, on_step=True, on_epoch=False)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the clipping out of the optimizers again, and write the histories."""
        for tracked in self.tracked:
            tracked.detach()
        self._for_test = stage != "fit"
        self._look_away()

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of each optimizer's clipper."""
        if self._saved:
            # It was loaded, and no step has been trained with it.
            return dict(self._saved)
        return {str(i): tracked.state_dict() for i, tracked in enumerate(self.tracked)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved memory until the optimizers are there."""
        self._saved, self._for_test = dict(state_dict), False


def _outermost(trainer: Any, pl_module: Any) -> Any:
    """Return the module, or what FSDP's first version has put around it.

    That one alone knows over which processes the parameters are cut.
    """
    wrapped = trainer.strategy.model
    return wrapped if hasattr(wrapped, "clip_grad_norm_") else pl_module


def _refuse(_: Any, clip_val: Any, *others: Any, **more: Any) -> None:
    """Stand in for the trainer's own clip."""
    check_alone("clip_gradients(…, {})", clip_val, "leave it out", deepspeed=False)
