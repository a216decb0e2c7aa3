"""Checks that turn a clip without effect into a message, once, and cost no waiting."""

import gc
import warnings
import weakref
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from gradclip.decision import Info
from gradclip.policy import only_records
from gradclip.rules import Norm, Rule, Skip, Value, stages
from gradclip.rules.groups import Groups
from gradclip.torch.exact import at_hand, tensor_of
from gradclip.torch.frames import frames

CHECKS = (
    "unchanged",
    "consumed",
    "scaled",
    "alone",
    "missing",
    "unheld",
    "unmatched",
    "attached",
    "rate",
)
STEPS = 500
"""How many steps a clip rate is watched before anything is said about it."""
SCALED = 100
"""How many times the limit a norm has to be before loss scalers are looked for."""
DELAY = 10
"""How many steps later a number copied off an accelerator is there for sure."""


class ClipWarning(UserWarning):
    """Clipping as it is called here has no effect, or not the one that is meant."""


def version_of(t: Tensor) -> int | None:
    """Return how often a tensor was changed; in inference mode nobody counts."""
    return None if t.is_inference() else t._version


class Doctor:
    """Watch a clipper for misuse; each check speaks once.

    Args:
        checks: Which of `CHECKS` are made.
        params: The parameters that are clipped.
        rule: The rule that clips them.
    """

    def __init__(
        self, checks: Collection[str], params: Sequence[Tensor], rule: Rule
    ) -> None:
        """Refuse unknown checks, and watch when one gradient is made."""
        listed = isinstance(checks, Collection) and not isinstance(checks, str)
        given = [checks] if isinstance(checks, str) else checks
        unknown = sorted(set(checks) - set(CHECKS), key=repr) if listed else given
        if unknown or not listed:
            raise ValueError(
                f"doctor={unknown!r}: it is a collection of checks, which are "
                f"{', '.join(CHECKS)}; an empty tuple turns all of them off."
            )
        self.checks = set(checks)
        self.rule = rule
        self._seen: list[tuple[weakref.ref[Tensor], int | None]] = []
        self._steps = 0
        self._clipped: Any = 0
        self._rate = torch.zeros((), device="cpu", pin_memory=params[0].is_cuda)
        self._witness = next((p for p in params if p.requires_grad and p.is_leaf), None)
        self._made_at: int | None = None
        self._unwatch: weakref.finalize[Any, Doctor] | None = None
        if "consumed" in self.checks and self._witness is not None:
            self._watch(self._witness)

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but weak references, which cannot be copied or sent."""
        return {**self.__dict__, "_seen": [], "_unwatch": None}

    def before(self, leaves: Sequence[Tensor]) -> None:
        """Look at the gradients that are about to be clipped."""
        if "unchanged" in self.checks and self._unchanged(leaves):
            self.tell(
                "unchanged",
                "the gradients are the same as at the last clip: it was called twice, "
                "or before backward(). Clip once, after backward() and before step().",
            )
        witness = self._witness
        if "consumed" in self.checks and witness is not None:
            made_at, self._made_at = self._made_at, None
            if made_at is not None and made_at != version_of(witness):
                self.tell(
                    "consumed",
                    "the parameters have changed since these gradients were made: the "
                    "clip comes after the step that used them, or they were moved and "
                    "put back, as by SAM. Clip before step().",
                )

    def after(self, leaves: Sequence[Tensor], info: Info) -> None:
        """Look at what the clip did."""
        if "unchanged" in self.checks:
            # Two are enough, and all of them would take a pass over the list.
            ends = leaves[0], leaves[-1]
            self._seen = [(weakref.ref(t), version_of(t)) for t in ends]
        if "scaled" in self.checks and at_hand(info.norm):
            self._look_for_scaler(info)
        if "rate" in self.checks and self._steps <= STEPS + DELAY:
            self._watch_rate(info)

    def tell(self, check: str, message: str) -> None:
        """Warn, and never again about the same thing."""
        if check in self.checks:
            self.checks.discard(check)
            text = f"{message} (This check is {check!r}; doctor= chooses the checks.)"
            warnings.warn(text, ClipWarning, stacklevel=_users_level())

    def look_for_names(self, rule: Rule, names: Sequence[str]) -> None:
        """See whether a rule by names has found any, as by misspelt ones it has not."""
        inner = [s.rule if isinstance(s, Skip) else s for s in stages(rule)]
        remedy = " Hand over model=, for their names." if names[:1] == ["[0]"] else ""
        for groups in (r for r in inner if isinstance(r, Groups)):
            named = [pattern for pattern, _ in groups.rules if pattern != "*"]
            if named and not any(fnmatchcase(x, p) for x in names for p in named):
                self.tell(
                    "unmatched",
                    f"no parameter fits {', '.join(map(repr, named))}; they are "
                    f"{', '.join(names[:5])}.{remedy}",
                )
        self.checks.discard("unmatched")

    def _unchanged(self, leaves: Sequence[Tensor]) -> bool:
        """Return whether the first and the last gradient are those of the last clip."""
        ends = leaves[0], leaves[-1]
        return bool(self._seen) and all(
            ref() is t and version is not None and version == version_of(t)
            for (ref, version), t in zip(self._seen, ends, strict=True)
        )

    def _watch(self, witness: Tensor) -> None:
        """Note the version of a parameter whenever it receives a gradient."""
        # The hook lives as long as the parameter, and the doctor should not.
        self_ref = weakref.ref(self)

        def note(p: Tensor) -> None:
            doctor = self_ref()
            if doctor is not None and not torch.compiler.is_compiling():
                doctor._made_at = version_of(p)

        hook = witness.register_post_accumulate_grad_hook(note)
        self._unwatch = weakref.finalize(self, hook.remove)
        self._unwatch.atexit = False

    def unwatch(self) -> None:
        """Take the hook off the parameter, as happens when the doctor is gone."""
        if self._unwatch is not None:
            self._unwatch()

    def _look_for_scaler(self, info: Info) -> None:
        """Ask for loss scalers, once, when a norm is very far above the limit."""
        if not _far_above(info):
            return
        for scaler in _scalers():
            stages_ = [s["stage"].name for s in scaler._per_optimizer_states.values()]
            if "UNSCALED" not in stages_:
                self.tell(
                    "scaled",
                    f"the norm is {float(info.norm.max()):.3g}, and a GradScaler with "
                    f"scale {scaler.get_scale():g} is in use whose gradients are not "
                    "unscaled: call scaler.unscale_(optimizer) before the clip, or use "
                    "attach(), which knows.",
                )
        self.checks.discard("scaled")

    def look_for_steps_beside_scaler(
        self, info: Info, optimizers: Sequence[Any]
    ) -> None:
        """Ask, once, for a loss scaler that takes no step of a clip in backward."""
        asks = "scaled" in self.checks and at_hand(info.norm)
        if not (asks and _far_above(info)):
            return
        scalers = _scalers()
        taken = {place for s in scalers for place in s._per_optimizer_states}
        if scalers and taken.isdisjoint(map(id, optimizers)):
            self.tell(
                "scaled",
                f"the norm is {float(info.norm):.3g}, and a GradScaler with scale "
                f"{scalers[0].get_scale():g} is in use that takes none of these steps: "
                "call scaler.step(optimizer) in the hooks, not optimizer.step().",
            )
        self.checks.discard("scaled")

    def look_for_lone_scaler(self, optimizer: Any) -> None:
        """Ask, once, for a loss scaler that skips steps on one process of several."""
        if "alone" not in self.checks:
            return
        if any(id(optimizer) in x._per_optimizer_states for x in _scalers()):
            self.tell(
                "alone",
                "GradScaler skips a step on the process that overflowed, and only "
                "there, so that the others get the norm of its next step. Use "
                "torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler("
                "process_group=…), which asks all of them.",
            )
        self.checks.discard("alone")

    def _watch_rate(self, info: Info) -> None:
        """Count clipped steps; say so if all the counting was for one answer."""
        fixed = all(isinstance(s, Norm | Value) for s in stages(self.rule))
        if not fixed or only_records(self.rule):
            self.checks.discard("rate")
            return
        self._steps += 1
        self._clipped = self._clipped + info.clipped
        if self._steps == STEPS:
            self._rate.copy_(tensor_of(self._clipped / STEPS), non_blocking=True)
        if self._steps == STEPS + (0 if at_hand(info.norm) else DELAY):
            self._judge_rate(float(self._rate))

    def _judge_rate(self, rate: float) -> None:
        advice = (
            "Look at the norms before choosing a limit: Norm(float('inf')) records "
            "them, and the quantiles of some hundred steps show where spikes begin."
        )
        if rate == 0:
            self.tell("rate", f"none of {STEPS} steps was clipped. {advice}")
        if rate > 0.5:
            self.tell(
                "rate",
                f"{rate:.0%} of {STEPS} steps were clipped: the limit sets the step "
                f"size now, and the learning rate means something else. {advice}",
            )
        self.checks.discard("rate")


def _scalers() -> list[Any]:
    """Return torch's own loss scalers that are in use."""
    kinds = torch.amp.GradScaler, torch.cuda.amp.GradScaler
    # There may be millions of objects: a call for each would take a second.
    found = [x for x in gc.get_objects() if type(x) in kinds]
    # One that is switched off, as for a run without amp, has no states at all.
    return [x for x in found if x.is_enabled() and x._scale is not None]


def _far_above(info: Info) -> bool:
    """Return whether a norm is so far above its limit as no gradient makes it."""
    if info.norm.ndim == info.limit.ndim == 0:
        # This is asked at every step, and of single numbers Python is quicker.
        return bool(info.finite) and info.norm.item() > SCALED * info.limit.item()
    return bool(((info.norm > SCALED * info.limit) & info.finite).any())


def _users_level() -> int:
    """Return how far up the code of the user is: one warning counts once for a line."""
    for level, frame in enumerate(frames()):
        if not frame.f_globals["__name__"].startswith(("gradclip.", "torch.")):
            return level
    return 1


def unheld(model: torch.nn.Module, params: Sequence[Tensor]) -> list[str]:
    """Return the names of trainable parameters that an optimizer does not hold."""
    held = {id(p) for p in params}
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and id(p) not in held]
