"""DeepSpeed's ZeRO: the rule sets the engine's clip value when the norm is known.

DeepSpeed keeps the gradients in pieces of its own, and divides them by loss scale and
clip in one pass. It takes one number for that, which is all that is changed here.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradclip.arrays import Clipper
from gradclip.integrations import needed, rule_of
from gradclip.rules import Array, Rule, stages

if TYPE_CHECKING:
    from gradclip.history import History

needed("deepspeed", "deepspeed")


def attach(
    engine: Any, rule: Rule | str, history: "History | None" = None
) -> "EngineClipper":
    r"""Clip inside of `engine.step()` of a ZeRO engine, at stage 1, 2 or 3.

    $g \leftarrow g \cdot \min(1, \text{limit}_t / (\lVert g \rVert + 10^{-6}))$

    DeepSpeed skips steps with NaN or infinity by itself, and the rule never sees them.

    Args:
        engine: What `deepspeed.initialize` returned, with `"gradient_clipping": 0` in
            its config; left out, DeepSpeed clips to 1.
        rule: A rule with one norm over all parameters, or the text of its constructor.
        history: Takes in every step.

    Returns:
        The clipper, with the latest `info`; hand its `state_dict()` to
        `engine.save_checkpoint(…, client_state=…)`.

    Raises:
        TypeError: For what is not a rule.
        ValueError: If DeepSpeed clips too, or has a clipper already; for a rule that
            needs more than one scale per step, an engine whose optimizer is torch's
            own or steps before there is a norm (SuperOffload), and one that is told to
            compute no norm or to let NaN pass.

    Example:
        >>> clipper = attach(engine, gc.ZScore())  # doctest: +SKIP
        >>> state = {"gradclip": clipper.state_dict()}  # doctest: +SKIP
        >>> engine.save_checkpoint("out", client_state=state)  # doctest: +SKIP
    """
    rule = rule_of(rule)
    _check(engine, rule)
    return EngineClipper(engine, rule, history)


class EngineClipper(Clipper):
    """A clipper that an engine's optimizer asks; made by `attach`."""

    def __init__(self, engine: Any, rule: Rule, history: "History | None") -> None:
        """Step in where the optimizer unscales and clips."""
        super().__init__(rule, "ignore", history=history)
        self._engine, self._decided_at, self._limit = engine, -1, 0.0
        self._original = engine.optimizer.unscale_and_clip_grads
        engine.optimizer.unscale_and_clip_grads = self._unscale_and_clip

    def _unscale_and_clip(self, group: Any, total_norm: Any) -> Any:
        # It is called for each group of parameters, with the norm over all of them.
        if self._decided_at != self._engine.global_steps:
            self._decided_at = self._engine.global_steps
            # DeepSpeed hands over the norm of gradients that are still scaled.
            self._decide(float(total_norm) / float(self._engine.optimizer.loss_scale))
        optimizer = self._engine.optimizer
        # Only now: checkpoints of ZeRO 1 and 2 keep it, and it comes before the config.
        optimizer.clip_grad = self._limit
        try:
            return self._original(group, total_norm)
        finally:
            optimizer.clip_grad = 0.0

    def _decide(self, norm: float) -> None:
        # A norm that is not finite comes as -1 here.
        _, info = self.clip(np.array([norm if norm >= 0 else math.nan]))
        scale = float(info.scale)
        self._limit = float(info.limit) if scale == 1 else norm * scale

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Go on from a saved memory, exactly, with the next step of the engine."""
        super().load_state_dict(state)
        # The engine may have gone back to the step that was decided last.
        self._decided_at = -1

    def detach(self) -> None:
        """Step aside; the engine then does not clip."""
        if _clipper_of(self._engine) is self:
            self._engine.optimizer.unscale_and_clip_grads = self._original


def _clipper_of(engine: Any) -> Any:
    """Return the clipper of an engine, or whatever else unscales for it."""
    return getattr(engine.optimizer.unscale_and_clip_grads, "__self__", None)


def _check(engine: Any, rule: Rule) -> None:
    """Refuse to clip twice, and what one number per step cannot say."""
    if engine.gradient_clipping():
        raise ValueError(
            f"DeepSpeed clips to {engine.gradient_clipping()} too; put "
            '"gradient_clipping": 0 in its config.'
        )
    if engine.zero_optimization_stage() not in (1, 2, 3):
        raise ValueError(
            "this engine has no ZeRO stage: in float32 it steps with torch's own "
            "optimizer, so use gradclip.torch.attach(optimizer, rule); in half "
            'precision put "zero_optimization": {"stage": 1} in its config.'
        )
    if not hasattr(engine.optimizer, "unscale_and_clip_grads"):
        raise ValueError(
            f"{type(engine.optimizer).__name__} clips where nothing can step in: in "
            'the config leave "grad_accum_dtype" out of "data_types", or take ZeRO '
            "stage 2."
        )
    _check_offload(engine.optimizer, engine.zero_optimization_stage())
    if isinstance(_clipper_of(engine), EngineClipper):
        raise ValueError(
            "this engine has a clipper already; detach() that one first, or use "
            "chain(a, b) for two rules."
        )
    _check_norms(engine.optimizer)
    if any(s.over != "all" or s.p != 2 or s.stretches or s.drops for s in stages(rule)):
        raise ValueError(
            f"{rule!r}: DeepSpeed clips by one number per step, from the 2-norm over "
            "all parameters; use a rule with over='all' that neither stretches nor "
            "skips."
        )


def _check_offload(optimizer: Any, stage: int) -> None:
    """Refuse what steps during the backward pass, or replaces what is stepped into."""
    if hasattr(optimizer, "superoffload_cpu_optimizer"):
        raise ValueError(
            "SuperOffload makes steps during backward(), before the norm of all "
            'gradients is known; leave "super_offload" out of "offload_optimizer".'
        )
    if stage == 3 and getattr(optimizer, "zenflow", False):
        raise ValueError(
            "ZenFlow clips in a way of its own at stage 3, where nothing can step in; "
            'leave "zenflow" out of "zero_optimization".'
        )


def _check_norms(optimizer: Any) -> None:
    """Refuse settings without which there is no norm, or NaN goes into the weights."""
    if getattr(optimizer, "compute_grad_norm", True) is False:
        raise ValueError(
            'with "compute_grad_norm": false there is no norm to clip by; leave it out '
            'of "zero_optimization".'
        )
    # In float32 it is False by itself, and DeepSpeed looks at the norm.
    unseen = getattr(optimizer, "check_grad_overflow", True) is False
    if unseen and optimizer.dtype == torch.bfloat16:
        raise ValueError(
            'with "check_grad_overflow": false DeepSpeed makes steps of NaN and '
            'infinity, which no clip can mend; leave it out of "bf16".'
        )
