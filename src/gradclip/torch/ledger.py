"""A ledger of gradients: in which state each event left them, and what came of a clip.

Nothing is guessed. A gradient is the same as before if it is the same tensor at the
same version, and a clip has had an effect if a step finds its gradients so.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gradclip.torch.doctor import version_of
from gradclip.torch.gradients import params_of

EFFECTIVE, INSIDE, MEASURES = "effective", "inside", "measures"


class Trace(NamedTuple):
    """A gradient as an event left it."""

    # Weak, so that the memory of gradients is freed when the program frees it.
    grad: "weakref.ref[Tensor]"
    version: int | None

    def holds(self, p: Tensor) -> bool:
        """Return whether the gradient is still the same, and unchanged."""
        grad = gradient(p)
        return self.grad() is grad is not None and self.version == version_of(grad)


@dataclass(eq=False)
class Clip:
    """One call that clips: where it is, what it met, and what came of it."""

    site: str
    call: str
    after: str
    """The latest step before it: of the optimizer of its parameters, or else of any."""
    given: int
    """How many tensors were handed over."""
    present: int
    """How many of them have a gradient."""
    limit: float = math.inf
    norm: float = math.nan
    clipped: bool = False
    measures: bool = False
    """Whether it has no limit, and is there for the norm."""
    kind: str = ""
    """What it does, so that another of its kind is one too many."""
    verdict: str = ""
    detail: str = ""

    def __post_init__(self) -> None:
        """Take the name of the function, without the library, for what it does."""
        self.kind = self.kind or self.call.rpartition(".")[2]

    def judge(self, verdict: str, detail: str = "") -> None:
        """Say what came of it; the first that is said stays."""
        if not self.verdict:
            self.verdict, self.detail = verdict, detail


@dataclass
class Stepper:
    """An optimizer, and what its steps were made with."""

    name: str
    params: int
    steps: int = 0
    clipped_for: int = 0
    """How many steps used gradients that had been clipped."""
    covered: int = 0
    """The largest number of its parameters that were clipped for one step."""
    reached: set[int] = field(default_factory=set)
    """The parameters that have been clipped for the step at hand."""

    @property
    def latest(self) -> str:
        """The latest step in words, if there was one."""
        return f"step {self.steps} of {self.name}" if self.steps else ""


class Ledger:
    """Take in events, in their order, and judge each clip by what follows it."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.clips: list[Clip] = []
        self.backwards = 0
        self._steppers: weakref.WeakKeyDictionary[Any, Stepper] = (
            weakref.WeakKeyDictionary()
        )
        self.steppers: list[Stepper] = []
        # The clips whose work lies in a gradient, the step that used it, its holder.
        self._left: Any = WeakTensorKeyDictionary()
        self._used: Any = WeakTensorKeyDictionary()
        self._holder: Any = WeakTensorKeyDictionary()
        self._latest = ""
        self._in_vain: list[tuple[Clip, list[Tensor]]] = []
        self._standing: list[tuple[Tensor, Any, bool]] = []

    def knows(self, optimizer: Any) -> Stepper:
        """Take in an optimizer and the parameters it has now."""
        params = params_of(optimizer)
        if optimizer not in self._steppers:
            name = type(optimizer).__name__
            alike = Counter(type(o).__name__ for o in self._steppers)[name]
            stepper = Stepper(f"{name} #{alike + 1}" if alike else name, 0)
            self._steppers[optimizer] = stepper
            self.steppers.append(stepper)
        stepper = self._steppers[optimizer]
        stepper.params = len(params)
        for p in params:
            self._holder[p] = stepper
        return stepper

    def before_clip(
        self, site: str, call: str, given: Sequence[Tensor], consumed: bool
    ) -> tuple[Clip, list[Tensor]]:
        """Note a clip, and what can be said of the gradients it meets.

        Args:
            site: Where it is called.
            call: What is called.
            given: The tensors that were handed over.
            consumed: Whether they came from an iterator.

        Returns:
            The clip, and those tensors whose gradients no step has used yet.
        """
        present = [p for p in given if gradient(p) is not None]
        for p in given:
            # What has changed since is no longer the work of the clips before.
            if p in self._left and not self._left[p][1].holds(p):
                del self._left[p]
        steppers = [s for p in given if (s := self._holder.get(p))]
        after = steppers[0].latest if steppers else self._latest
        clip = Clip(site, call, after, len(given), len(present))
        self.clips.append(clip)
        fresh = [p for p in present if not self._was_used(p)]
        if consumed and not given:
            clip.judge("exhausted")
        elif not present:
            self._judge_absent(clip, given)
        elif not fresh:
            clip.judge("used", self._used[present[0]][0])
        return clip, fresh

    def after_clip(self, clip: Clip, given: Sequence[Tensor], fresh: Any) -> None:
        """Note in which state a clip leaves the gradients."""
        if clip.measures and clip.verdict != "exhausted":
            # What only measures may come at any time, as long as it is given something.
            clip.verdict = MEASURES
        self._look_for_twin(clip, fresh)
        kept = {id(p) for p in fresh}
        for p in given:
            if id(p) in kept:
                before = self._clips_on(p) if p in self._left else ()
                self._left[p] = ((*before, clip), trace(p))
            elif p in self._used and gradient(p) is not None:
                # A clip that comes too late makes no new gradient of an old one.
                self._used[p] = (self._used[p][0], trace(p))

    def inside_step(self, clip: Clip, given: Sequence[Tensor], fresh: Any) -> None:
        """Note a clip that a step makes itself: in its place, if it is the only one."""
        # It cannot come too late, and gradients that another step has used are its own.
        clip.verdict = ""
        if not clip.measures:
            self._look_for_twin(clip, fresh)
        clip.judge(INSIDE)
        for p in given:
            if gradient(p) is not None and p in self._holder:
                self._holder[p].reached.add(id(p))

    def before_backward(self) -> None:
        """Note which clipped gradients wait for a step."""
        self._standing = [
            (p, entry, bool(gradient(p).any()))
            for p, entry in self._left.items()
            if entry[1].holds(p)
        ]

    def after_backward(self) -> None:
        """Look for gradients that were added to after a clip, or made only now."""
        self.backwards += 1
        for p, entry, whole in self._standing:
            clips, left = entry
            if self._left.get(p) is entry and not left.holds(p):
                # Zeros that are added to had been cleared: the clip came early.
                for clip in clips:
                    if whole or clip.norm == 0:
                        clip.judge("added" if whole else "early")
                del self._left[p]
        self._standing = []
        waiting = []
        for clip, params in self._in_vain:
            if any(gradient(p) is not None for p in params):
                clip.judge("early")
            else:
                waiting.append((clip, params))
        self._in_vain = waiting

    def divides(self, optimizer: Any, factor: float, act: Callable[[], Any]) -> Any:
        """Note that a loss scale is taken out of the gradients of an optimizer."""
        standing = self._standing_in(optimizer)
        for _, (clips, _) in standing:
            for clip in clips:
                # A norm that is only logged is just as wrong.
                clip.verdict = "" if clip.verdict == MEASURES else clip.verdict
                clip.judge("scaled", f"{factor:g}")
        result = act()
        for p, (clips, _) in standing:
            if gradient(p) is not None:
                self._left[p] = (clips, trace(p))
        return result

    def reduces(self, tensor: Tensor) -> None:
        """Note that a tensor is reduced over processes."""
        for p, (clips, left) in list(self._left.items()):
            if left.holds(p) and same_memory(gradient(p), tensor):
                for clip in clips:
                    clip.judge("unsynced")

    def before_step(
        self, optimizer: Any, closure: Callable[[], Any] | None
    ) -> Callable[[], Any] | None:
        """Note a step, whose gradients may come from a closure.

        Returns:
            What to call instead of the closure.
        """
        self.knows(optimizer).reached = set()
        if getattr(optimizer, "grad_scale", None) is not None:
            # A fused optimizer divides while it reads.
            self.divides(optimizer, float(optimizer.grad_scale), lambda: None)
        if closure is None:
            self._consume(optimizer)
            return None
        waiting = self._standing_in(optimizer)

        def watched() -> Any:
            loss = closure()
            self._look_for_remade(waiting)
            self._consume(optimizer)
            return loss

        return watched

    def after_step(self, optimizer: Any) -> int:
        """Note which gradients are used now; return the number of the step."""
        stepper = self._steppers[optimizer]
        stepper.steps += 1
        self._latest = stepper.latest
        stepper.clipped_for += bool(stepper.reached)
        stepper.covered = max(stepper.covered, len(stepper.reached))
        for p in params_of(optimizer):
            self._left.pop(p, None)
            if gradient(p) is not None:
                self._used[p] = (stepper.latest, trace(p))
        return stepper.steps

    def _consume(self, optimizer: Any) -> None:
        """Say of the clips whose gradients a step now finds that they had an effect."""
        stepper = self._steppers[optimizer]
        for p, (clips, _) in self._standing_in(optimizer):
            stepper.reached.add(id(p))
            for clip in clips:
                clip.judge(EFFECTIVE)

    def _standing_in(self, optimizer: Any) -> list[tuple[Tensor, Any]]:
        """Return the parameters whose gradients are as a clip left them."""
        entries = [(p, self._left.get(p)) for p in params_of(optimizer)]
        return [(p, entry) for p, entry in entries if entry and entry[1].holds(p)]

    def _was_used(self, p: Tensor) -> bool:
        return p in self._used and self._used[p][1].holds(p)

    def _clips_on(self, p: Tensor) -> tuple[Clip, ...]:
        return self._left[p][0]

    def _judge_absent(self, clip: Clip, given: Sequence[Tensor]) -> None:
        """Tell gradients that were handed over from parameters that have none."""
        grads = {id(gradient(p)) for p in self._holder if gradient(p) is not None}
        if given and all(id(t) in grads for t in given):
            clip.judge("raw")
        else:
            self._in_vain.append((clip, list(given)))

    def _look_for_twin(self, clip: Clip, fresh: Sequence[Tensor]) -> None:
        """Look for an earlier clip of the same kind on the same gradients."""
        if clip.verdict or not all(p in self._left for p in fresh):
            return
        twins = {c for p in fresh for c in self._clips_on(p) if not c.measures}
        for twin in twins:
            alike = twin.kind == clip.kind and twin.present == clip.present
            if alike and all(twin in self._clips_on(p) for p in fresh):
                clip.judge("twice", twin.site)

    def _look_for_remade(self, waiting: Iterable[tuple[Tensor, Any]]) -> None:
        """Look for clips whose gradients the closure has made anew."""
        for p, entry in waiting:
            if self._left.get(p) is entry and not entry[1].holds(p):
                for clip in entry[0]:
                    clip.judge("remade")


def gradient(p: Tensor) -> Any:
    """Return the gradient of a tensor that can have one."""
    # Torch warns where `grad` of any other tensor is read.
    return p.grad if p.is_leaf or p.retains_grad else None


def trace(p: Tensor) -> Trace:
    """Return the gradient as it is now."""
    grad = gradient(p)
    return Trace(weakref.ref(grad), version_of(grad))


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are one, as `p.grad` and `p.grad.data` are."""
    if type(a) is not Tensor or type(b) is not Tensor:
        return a is b
    return a.layout == b.layout == torch.strided and a.data_ptr() == b.data_ptr()
