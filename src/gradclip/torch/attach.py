"""Clipping inside `optimizer.step()`: one line, and the training loop stays as it is.

Optimizers call hooks before and after a step. A fused optimizer also divides gradients
by its attribute `grad_scale` while it reads them, which is made for loss scaling: there
the clip costs no pass over memory of its own.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import count
from operator import is_
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gradclip.backends.narrow import at_home
from gradclip.policy import NonFiniteError, Policy, may_drop
from gradclip.rules import Rule, State, stages
from gradclip.torch.doctor import CHECKS, unheld
from gradclip.torch.exact import at_hand, tensor_of
from gradclip.torch.gradients import Gradients, named_by_optimizers, params_of
from gradclip.torch.hooked import Hooked, closure_of, only_prepares, with_closure
from gradclip.torch.in_backward import InBackward
from gradclip.torch.late import take_over
from gradclip.torch.moments import check_keeper, lender_of
from gradclip.torch.placement import SplitOver
from gradclip.torch.verbs import InPlace
from gradclip.torch.verify import Verify
from gradclip.wording import listed

if TYPE_CHECKING:
    from gradclip.history import History

Optimizers: TypeAlias = (
    torch.optim.Optimizer
    | Iterable[torch.optim.Optimizer]
    | Mapping[Any, torch.optim.Optimizer]
)

_FLAGS = ("grad_scale", "found_inf")
_UNSET = object()


def attach(
    optimizer: Optimizers,
    rule: Rule,
    model: torch.nn.Module | None = None,
    on_nonfinite: Policy | None = None,
    max_consecutive_skips: int = 100,
    history: "History | None" = None,
    doctor: Collection[str] = CHECKS,
    split_over: SplitOver = None,
    deterministic: bool = False,
    verify: Verify = False,
    in_backward: bool = False,
) -> Hooked:
    r"""Clip the gradients of an optimizer inside its `step()`.

    $g \leftarrow g \cdot \min(1, \text{limit}_t / \lVert g \rVert)$, then the step.

    It works with loss scaling by `torch.amp.GradScaler` (with `split_over` by torch's
    `ShardedGradScaler`), with accumulated gradients and with closures, and takes up
    parameters that are added later. Where the loss overflows, a scaler calls `step()`
    of a fused optimizer only: such a step counts as skipped there, else as none.

    Args:
        optimizer: Any torch optimizer; with `in_backward` several, or a dictionary.
        rule: Any rule.
        model: Gives the parameters their names in messages; an optimizer made from
            `named_parameters()` has them already.
        on_nonfinite: As for `Clipper`; `"skip"` leaves parameters and optimizer state
            as they were, to the bit, and the gradients as they came.
        max_consecutive_skips: As for `Clipper`.
        history: As for `Clipper`.
        doctor: As for `Clipper`.
        split_over: As for `Clipper`.
        deterministic: As for `Clipper`.
        verify: As for `Clipper`; a step that is refused is not taken.
        in_backward: Whether the optimizers step in hooks during `backward()`, one for
            each parameter. The norm of all gradients is known too late then: the limit
            acts on that of the previous pass, or on that of the gradients so far,
            whichever is larger, and `info` is there when `backward()` returns.

    Returns:
        The clipper, with the latest `info`; `detach()` ends the clipping.

    Raises:
        TypeError: For what is not an optimizer, a rule, a module or a history.
        ValueError: For an unknown policy, and with `in_backward` for rules that need
            more than one norm of all gradients, or for split parameters.
        RuntimeError: With `in_backward`, by `step()` outside `backward()`, and where
            checkpoints are re-entrant, so that each is a pass of its own.
        VerifyError: As for `Clipper`, also by `step()`.

    Example:
        >>> import torch, gradclip
        >>> from gradclip.torch import attach
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> clipper = attach(optimizer, gradclip.Norm(1.0))
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> optimizer.step()
        >>> float(clipper.info.norm), bool(clipper.info.clipped)
        (5.0, True)
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"attach(model=…) takes a module for the names, not {type(model).__name__}."
        )
    options: dict[str, Any] = {
        "on_nonfinite": on_nonfinite,
        "max_consecutive_skips": max_consecutive_skips,
        "history": history,
        "doctor": doctor,
        "split_over": split_over,
        "deterministic": deterministic,
        "verify": verify,
    }
    if in_backward:
        return InBackward(_several(optimizer), rule, model, **options)
    return Attached(_one(optimizer), rule, model, **options)


def _one(optimizer: Any) -> torch.optim.Optimizer:
    """Return an optimizer, or say what to do with something else."""
    # Accelerate's wrapper is a subclass of Optimizer, and has no hooks of its own.
    if hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return optimizer
    inner = getattr(optimizer, "optimizer", None)
    if hasattr(inner, "register_step_pre_hook"):
        raise TypeError(
            f"attach() takes an optimizer, and {type(optimizer).__name__} is around "
            "one: attach to its .optimizer."
        )
    if isinstance(optimizer, list | tuple | Mapping):
        raise TypeError(
            f"attach() takes one optimizer, not {type(optimizer).__name__}: attach to "
            "each, [attach(o, rule) for o in optimizers]; for one norm over all of "
            "them use Clipper(params, rule) with all parameters, and where they step "
            "during backward() in_backward=True."
        )
    raise TypeError(
        f"attach() takes an optimizer, not {type(optimizer).__name__}; for "
        "parameters or a module use Clipper(params, rule), and for several optimizers "
        "that step during backward() in_backward=True."
    )


def _several(optimizers: Any) -> list[torch.optim.Optimizer]:
    """Return optimizers from a list, from a dictionary, or from one of them."""
    if isinstance(optimizers, Mapping):
        optimizers = optimizers.values()
    if hasattr(optimizers, "register_step_pre_hook"):
        optimizers = [optimizers]
    return [_one(optimizer) for optimizer in optimizers]


def has_clipper(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer clips already, as in a notebook cell run twice."""
    hooks = optimizer._optimizer_step_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), Attached) for hook in hooks)


class Attached(Hooked):
    """A clipper that an optimizer calls; made by `attach`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: Rule,
        model: torch.nn.Module | None,
        **options: Any,
    ) -> None:
        """Find the names and register the hooks; the options are those of `Clipper`."""
        self.optimizer, self._module = optimizer, model
        super().__init__(named_by_optimizers([optimizer], model), rule, **options)
        # Here the scale is known, and part of the step; and no step comes before its
        # own clip: parameters that have moved are those of sharpness-aware steps.
        self._doctor.checks -= {"scaled", "consumed"}
        self._doctor.unwatch()
        if model is not None and (names := unheld(model, self.params)):
            self._doctor.tell(
                "unheld",
                f"the optimizer does not hold {len(names)} trainable parameters of the "
                f"model, so they are not clipped: {listed(names, most=5)}.",
            )
        if has_clipper(optimizer):
            self._doctor.tell(
                "attached",
                "this optimizer has a clipper already, whose results this one would "
                "clip; detach() that one first, or use chain(a, b) for two rules.",
            )
        self._listed = params_of(optimizer)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._flags: dict[str, Any] | None = None
        self._before_closure: tuple[list[Tensor], Any] | None = None
        self._register()

    def _register(self) -> None:
        """Have the optimizer call this at every step."""
        after = self.optimizer.register_step_post_hook(self._after_step)
        self._hooks = (
            self.optimizer.register_step_pre_hook(self._before_step),
            after,
        )
        # The last one to change something for a step is the first to put it back.
        hooks: Any = self.optimizer._optimizer_step_post_hooks
        hooks.move_to_end(after.id, last=False)

    def _empty(self, stage: Rule) -> State:
        """Return the memory of a stage: nothing where it is the optimizer's."""
        if stage.borrows:
            check_keeper(self.optimizer, stage)
            return {}
        return super()._empty(stage)

    def _verbs(
        self, found: Gradients, amplified: Tensor | None = None, fused: bool = False
    ) -> InPlace:
        """Return the verbs for this step, and with them what the optimizer knows."""
        verbs = super()._verbs(found, amplified, fused)
        if any(stage.borrows for stage in stages(self.rule)):
            verbs.lender = lender_of(self.optimizer, self.params)
        return verbs

    def _enter(
        self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
    ) -> tuple[Any, Any] | None:
        self._undo()
        if only_prepares(optimizer):
            return None
        closure = closure_of(args, kwargs)
        if closure is None:
            self._clip_for_step()
            return None
        self._acted = True
        if isinstance(optimizer, torch.optim.LBFGS):
            # It evaluates many times and moves in between: only a copy can undo that.
            state = {p: copy.deepcopy(s) for p, s in optimizer.state.items()}
            self._before_closure = [p.detach().clone() for p in self.params], state
        return with_closure(args, kwargs, self._clipping(closure))

    def _clipping(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure with the clip behind its backward pass."""

        evaluations = count()

        def closure_then_clip() -> Any:
            loss = closure()
            try:
                self._clip_for_step()
            except NonFiniteError:
                self._go_back()
                # Whatever the caller does to the parameters now, stays.
                self._before_closure = None
                raise
            searches = next(evaluations) and self._before_closure is not None
            # A line search would take gradients that are hidden for those of a minimum.
            bad = searches and self._kept and bool(tensor_of(loss).isnan())
            return math.inf if bad else loss

        return closure_then_clip

    @torch.no_grad()
    def _clip_for_step(self) -> None:
        """Clip, or have the optimizer do it, or keep the gradients away from it."""
        # Flags of ours would be taken below for those of a loss scaler.
        self._restore_flags()
        self._take_up_new_parameters()
        self._verify_gradients()
        # With split parameters others wait for this process, gradients or not.
        if self._layout is None and all(p.grad is None for p in self.params):
            self._doctor.tell(
                "missing",
                f"step() was called while none of {len(self.params)} parameters has a "
                "gradient: was backward() called?",
            )
            return
        self._acted = True
        if self._layout is not None and self.split_over is not None:
            self._doctor.look_for_lone_scaler(self.optimizer)
        found = self._collect()
        scale, found_inf = (getattr(self.optimizer, flag, None) for flag in _FLAGS)
        if scale is not None:
            (scale,) = at_home([scale])
        policy = self._policy_under(found_inf)
        verbs = self._verbs(found, scale, self._fuses)
        info = self._run(found, verbs, policy)
        self._check_skips(found, verbs)
        kept = self._goes_ahead(verbs, info.kept, policy)
        if kept is False:
            self._keep_gradients()
        elif kept is None or verbs.amplified is not scale:
            self._set_flags(verbs.amplified, found_inf, None if kept else info.kept)

    def _policy_under(self, found_inf: Tensor | None) -> Policy:
        """Return the policy for this step, at which a scaler may have overflowed."""
        policy = self.on_nonfinite
        if found_inf is None or policy not in ("raise", "zero"):
            return policy
        # It finds its scale by overflowing, and skips such a step.
        asks = policy == "raise" or at_hand(found_inf)
        return "skip" if asks and bool(found_inf) else policy

    def _goes_ahead(self, verbs: InPlace, kept: Tensor, policy: Policy) -> bool | None:
        """Return whether the step is made; None where the fused step will see to it."""
        if not may_drop(self.rule, policy):
            return True
        known = verbs.known(kept)
        if known is None and not (verbs.fused and self._heeds_found_inf):
            # Only the host can stop such an optimizer, so here it has to wait.
            return bool(kept)
        return known

    @property
    def _fuses(self) -> bool:
        """Whether the optimizer divides by its `grad_scale` while it steps."""
        fused = bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))
        # Compiled code loses what a hook sets on an optimizer that it breaks off at.
        return fused and not torch.compiler.is_compiling()

    @property
    def _heeds_found_inf(self) -> bool:
        """Whether the fused step leaves everything alone when told to.

        Fused SGD keeps its parameters then, but moves the momentum, if it has one.
        """
        momenta = any(g.get("momentum") for g in self.optimizer.param_groups)
        return not (isinstance(self.optimizer, torch.optim.SGD) and momenta)

    def _take_up_new_parameters(self) -> None:
        """Follow `add_param_group`: new parameters get cells of their own."""
        listed = params_of(self.optimizer)
        # By identity, since `==` compares the elements of tensors.
        if len(listed) == len(self._listed) and all(map(is_, listed, self._listed)):
            return
        self._listed = listed
        named = named_by_optimizers([self.optimizer], self._module)
        old, places = self._memory.states, {id(p): i for i, p in enumerate(self.params)}
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self._make_room()
        pairs = [(i, places.get(id(p))) for i, p in enumerate(self.params)]
        kept = [(i, j) for i, j in pairs if j is not None]
        counts = len(self.params), len(places)
        take_over(self._bound, self._memory.states, old, kept, counts)

    def _keep_gradients(self) -> None:
        """Hide the gradients from this step; no optimizer moves without them."""
        self._kept = [(p, p.grad) for p in self.params if p.grad is not None]
        for p, _ in self._kept:
            p.grad = None

    def _set_flags(
        self, amplified: Tensor | None, found_inf: Tensor | None, kept: Tensor | None
    ) -> None:
        """Have the fused step divide by the amplification, or do nothing."""
        device = self.params[0].device
        bad = torch.zeros((), device=device) if kept is None else (~kept).float()
        self._flags = {flag: getattr(self.optimizer, flag, _UNSET) for flag in _FLAGS}
        # What was decided on the host has to be where the step is.
        if amplified is None:
            amplified = torch.ones((), device=device)
        scale = amplified.float().to(device)
        self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        self.optimizer.found_inf = (  # type: ignore[attr-defined]
            bad if found_inf is None else torch.maximum(bad, found_inf)
        )

    def _undo(self) -> None:
        """Put back what was changed for the duration of one step."""
        self._restore_flags()
        if self._kept:
            self._go_back()
        # After an interrupted step there may be new ones already, which do not mix.
        if all(p.grad is None for p, _ in self._kept):
            for p, grad in self._kept:
                p.grad = grad
        self._kept, self._before_closure = [], None

    @torch.no_grad()
    def _go_back(self) -> None:
        """Undo the moves between the evaluations of one step."""
        if self._before_closure is None:
            return
        params, state = self._before_closure
        for p, before in zip(self.params, params, strict=True):
            p.copy_(before)
        self.optimizer.state.clear()
        self.optimizer.state.update(state)

    def _restore_flags(self) -> None:
        for flag, before in (self._flags or {}).items():
            if before is _UNSET:
                delattr(self.optimizer, flag)
            else:
                setattr(self.optimizer, flag, before)
        self._flags = None
