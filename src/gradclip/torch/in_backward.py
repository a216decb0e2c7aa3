"""Clipping where optimizers step during the backward pass, to free each gradient early.

When a gradient is stepped with, most others do not exist yet, and so the norm of all of
them is not known. It is taken to be that of the previous pass, or that of the gradients
which have come so far in this one, whichever is larger.
"""

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward

from gradclip.arguments import check_rule
from gradclip.backends.narrow import lacks_float64
from gradclip.decision import Info, clip_scale, decide
from gradclip.memory import as_array, check_mapping, damaged
from gradclip.pipeline import admit, ask_schedules
from gradclip.policy import NonFiniteError
from gradclip.rules import Measured, Rule, stages
from gradclip.torch.exact import at_hand, safe_norm, tensor_of
from gradclip.torch.frames import frames
from gradclip.torch.gradients import collect, drop, named_by_optimizers, params_of
from gradclip.torch.hooked import Hooked, only_prepares
from gradclip.torch.verbs import InPlace


class InBackward(Hooked):
    r"""A clipper that many optimizers call during `backward()`; made by `attach`.

    $g_i \leftarrow g_i \cdot \min(1, \text{limit} / n_i)$ with
    $n_i = \max(\lVert g^{t-1} \rVert, \lVert (g_1^t, …, g_i^t) \rVert)$
    """

    def __init__(
        self,
        optimizers: Iterable[torch.optim.Optimizer],
        rule: Rule,
        model: torch.nn.Module | None,
        **options: Any,
    ) -> None:
        """Refuse what cannot be known in time, and register the hooks."""
        _check_rule(rule)
        self.optimizers, self._module = list(optimizers), model
        super().__init__(named_by_optimizers(self.optimizers, model), rule, **options)
        if self.history is not None and self.history.tensors_every:
            raise ValueError(
                "in_backward=True has no step at which all parameters have gradients; "
                "record without tensors_every."
            )
        device = self.params[0].device
        if lacks_float64(device):
            raise ValueError(
                f"a device of kind {device.type!r} has no float64, so that norms have "
                "to go through the host; attach without in_backward=True."
            )
        self._previous = torch.zeros((), dtype=torch.float64, device=device)
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._register()

    def _register(self) -> None:
        """Have the optimizers call this at every step, and begin with no pass."""
        self._pass: _Pass | None = None
        self._number_parameters()
        self._hooks = [
            hook
            for o in self.optimizers
            for hook in (
                o.register_step_pre_hook(self._before_step),
                o.register_step_post_hook(self._after_step),
            )
        ]

    def _make_room(self) -> None:
        """Make the memory, and refuse parts of tensors, whose norms come too late."""
        super()._make_room()
        if self._layout is not None or self._verifier is not None:
            raise ValueError(
                "in_backward=True measures whole parameters of one process, and these "
                "are split over several; step after backward(), with attach(optimizer)."
            )

    def _number_parameters(self) -> None:
        self._index = {id(p): i for i, p in enumerate(self.params)}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the memory and the norm of the last pass, for any checkpoint."""
        return super().state_dict() | {"previous": self._previous.clone()}

    def load_state_dict(self, state: Any) -> None:
        """Go on from a saved memory, exactly.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If it was saved by another rule, or by a clipper that does not
                clip during backward, or is damaged; nothing is changed then.
        """
        check_mapping(state)
        if "previous" not in state:
            raise ValueError(
                "this state has no norm of the last pass; it was saved by a clipper "
                "without in_backward=True."
            )
        rest = {name: x for name, x in state.items() if name != "previous"}
        x = as_array("previous", state["previous"])
        previous = tensor_of(x).to(self._previous, copy=True)
        # NaN is above no limit, and infinity would leave nothing of any gradient.
        if previous.numel() != 1 or not 0 <= float(previous) < math.inf:
            raise damaged(f"it has {x} for 'previous', the norm of the last pass")
        super().load_state_dict(rest)
        self._previous = previous.reshape(())

    # After the pass they are gone, and nothing is left to clip (torchtitan#990).
    @torch.no_grad()
    def _enter(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Clip what this optimizer is about to use."""
        params = [p for p in params_of(optimizer) if p.grad is not None]
        if not params or only_prepares(optimizer):
            return
        self._acted = True
        # Of all parameters only when one is new: this is called for each of them.
        if not all(id(p) in self._index for p in params):
            self._take_up_new_parameters()
        if self._overflows(optimizer):
            # A loss scaler takes no step then, unless the optimizer is fused.
            self._hide(params)
            drop(params, False)
            return
        if self._pass is None:
            self._follow_wrapper()
        now = self._pass_with(params)
        # What a fused step divides by, when all is done.
        verbs = self._tools(getattr(optimizer, "grad_scale", None))
        leaves, norm = self._admitted(params, verbs)
        now.take(norm)
        scale = self._scale(now, norm)
        if verbs.known(scale == 1) is not True:
            verbs.multiply(leaves, scale, "all")
        if self._skipping:
            self._hide(params)
            drop(params, norm.isfinite())

    def _overflows(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether a loss scaler has found infinity, as far as the host knows."""
        found_inf = getattr(optimizer, "found_inf", None)
        waits = self.on_nonfinite == "raise"
        here = found_inf is not None and (waits or at_hand(found_inf))
        return here and bool(found_inf)

    def _hide(self, params: list[Tensor]) -> None:
        """Note gradients that the step may not see, to give them back after it."""
        self._hidden = [(p, p.grad) for p in params if p.grad is not None]

    def _take_up_new_parameters(self) -> None:
        """Follow `add_param_group`; what is remembered is that of all gradients."""
        held = chain.from_iterable(map(params_of, self.optimizers))
        if all(id(p) in self._index for p in held):
            return
        named = named_by_optimizers(self.optimizers, self._module)
        states = self._memory.states
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self._number_parameters()
        self._make_room()
        self._memory.states = states

    def _admitted(
        self, params: list[Tensor], verbs: InPlace
    ) -> tuple[list[Tensor], Tensor]:
        """Return gradients and their norm, after the policy for NaN."""
        leaves = collect(params).leaves
        names = [self.names[self._index[id(p)]] for p in params]
        norm = verbs.measure(leaves, "all", self._bound.p)
        # Before the policy, which may clear what was bad.
        if self._pass is not None:
            self._pass.clean &= norm.isfinite()
        policy = self.on_nonfinite
        try:
            return admit(verbs, leaves, self._bound, norm, policy, names.__getitem__)
        except NonFiniteError as error:
            done = len(self._pass.stepped) - len(params) if self._pass else 0
            stepped = f"{done} parameters were stepped before, in this backward pass"
            text = str(error).replace("nothing was changed", stepped)
            raise NonFiniteError(text if done else str(error)) from None

    def _scale(self, now: "_Pass", norm: Tensor) -> Tensor:
        """Return the factor for the latest gradients, by what is known so far."""
        asked = ask_schedules(self._tools(), self._bound, int(self._memory.step))
        seen = self._seen(now.estimate)._replace(scheduled=asked)
        # The memory stays as it is: it learns the norm of the pass at its end.
        limit = self._bound.update(seen, self._state())[0]
        scale = clip_scale(now.estimate, limit, seen.xp, self._bound.most(seen))
        scale = torch.where(norm.isfinite(), scale, 1.0)
        dropped = self._skipping & ~norm.isfinite()
        now.note(torch.where(dropped, 0.0, norm * scale), limit, scale)
        return scale

    def _undo(self) -> None:
        """Give back the gradients that were hidden from a step."""
        for p, grad in self._hidden:
            p.grad = grad
        self._hidden = []

    def _pass_with(self, params: list[Tensor]) -> "_Pass":
        """Return the pass that is going on, or begin one and have its end reported."""
        ids = set(map(id, params))
        if self._pass is None or self._pass.stepped & ids:
            # A pass that has such a step already was broken off by an error.
            now = _Pass(self._previous, self._bound.p)
            if _is_nested():
                raise RuntimeError(
                    "this backward pass runs inside of another, and its end is not "
                    "that of the step: with in_backward=True, call "
                    "checkpoint(…, use_reentrant=False)."
                )
            try:
                # DDP and FSDP wait in the same way for the end of a pass.
                engine = torch.autograd.Variable._execution_engine
                engine.queue_callback(lambda: self._end(now))
            except RuntimeError:
                raise RuntimeError(
                    "step() was called outside backward(): with in_backward=True each "
                    "optimizer steps in a hook of its parameters, which "
                    "register_post_accumulate_grad_hook registers. For a step after "
                    "backward() take attach(optimizer) without it."
                ) from None
            self._pass = now
        self._pass.stepped |= ids
        return self._pass

    @torch.no_grad()
    def _end(self, now: "_Pass") -> None:
        """Teach the rule the norm that is known at last, and report the pass."""
        if now is not self._pass:
            return
        self._pass, memory = None, self._memory
        info, state = decide(self._bound, self._seen(now.total), self._state())
        kept = info.finite if self._skipping else torch.ones_like(info.finite)
        if self.history is not None:
            self.history.record(memory.step, now.report(info, kept))
        memory.states = [state]
        memory.count((~kept).to(torch.int64))
        # NaN here would be NaN in the estimates of all passes to come.
        self._previous = torch.where(info.finite, now.total, self._previous)
        self._info = now.report(info, kept)._replace(skipped=memory.skipped)
        self._doctor.look_for_steps_beside_scaler(self._info, self.optimizers)
        self._in_a_row.copy_(memory.in_a_row, non_blocking=True)
        memory.check(int(self._in_a_row), self.max_consecutive_skips)

    def _tools(self, amplified: Tensor | None = None) -> InPlace:
        verbs = InPlace(amplified)
        verbs.deterministic = self.deterministic
        return verbs

    def _seen(self, norm: Tensor) -> Measured:
        return Measured(norm, None, int(self._memory.step), self._tools().xp)

    def _state(self) -> dict[str, Any]:
        return dict(self._memory.states[0] or {})


class _Pass:
    """One backward pass: which norms have come, and what was made of them."""

    def __init__(self, previous: Tensor, p: float) -> None:
        """Begin with the norm of the pass before."""
        zero = torch.zeros_like(previous)
        self.previous, self.p, self.stepped = previous, p, set[int]()
        self.total = self.so_far = self.after = zero
        self.limit, self.scale = zero + math.inf, zero + 1
        self.clean = zero == 0

    @property
    def estimate(self) -> Tensor:
        """What the norm of the whole pass is taken to be."""
        return torch.maximum(self.previous, self.so_far)

    def take(self, norm: Tensor) -> None:
        """Take in the norm of one more gradient."""
        self.total = self._joined(self.total, norm)
        # One bad gradient must not spoil the estimate for those behind it.
        more = self._joined(self.so_far, norm)
        self.so_far = torch.where(norm.isfinite(), more, self.so_far)

    def note(self, after: Tensor, limit: Tensor, scale: Tensor) -> None:
        """Take in its norm after the clip, and the limit and scale that it got."""
        self.after = self._joined(self.after, after)
        self.limit, self.scale = limit, torch.minimum(self.scale, scale)

    def report(self, info: Info, kept: Tensor) -> Info:
        """Return what was done: not what would be right, now that all is known."""
        return info._replace(
            # What was cleared should not pass unseen.
            finite=info.finite & self.clean,
            limit=self.limit,
            scale=self.scale,
            clipped=self.scale != 1,
            norm_after=self.after,
            kept=kept,
        )

    def _joined(self, a: Tensor, b: Tensor) -> Tensor:
        return safe_norm(torch.stack([a, b]), self.p)


def _check_rule(rule: Rule) -> None:
    """Refuse rules that need more than the norm of everything, or can drop a step."""
    first, *others = stages(check_rule(rule))
    if first.over != "all" and not others and not first.by_place:
        raise ValueError(
            f"{rule!r} needs no other gradient than the one at hand, so nothing has to "
            "come late: attach it to each optimizer by itself, "
            "[attach(o, rule) for o in optimizers]."
        )
    if others or first.over != "all" or first.drops:
        raise ValueError(
            f"{rule!r} cannot act during backward(), when other parameters have been "
            "stepped already; take one rule over 'all' that rescales."
        )


def _is_nested() -> bool:
    """Return whether a function of a backward pass has started the one at hand."""
    started = False
    for frame in frames():
        # First comes this pass, then a function of the one around it.
        started |= frame.f_code is _engine_run_backward.__code__
        if started and frame.f_code is BackwardCFunction.apply.__code__:
            return True
    return False
