"""The clipper for torch parameters: it knows their names and holds a rule's memory."""

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from gradclip.arguments import at_least, begin, check_rule
from gradclip.backends.narrow import at_home, bring_back, home
from gradclip.decision import Info
from gradclip.memory import COUNTERS, Memory, check_state
from gradclip.pipeline import empty, run, with_nonfinite
from gradclip.policy import Policy, chosen, may_drop
from gradclip.recorder import tell_ranks
from gradclip.rules import Rule, State, stages
from gradclip.rules.keys import name_and_place, prefix
from gradclip.scalars import one_number
from gradclip.tensor_order import has_places
from gradclip.torch.constants import Sending
from gradclip.torch.doctor import CHECKS, Doctor
from gradclip.torch.dtensors import (
    AT,
    check_tag,
    laid_out_like,
    local_of,
    part_like,
)
from gradclip.torch.exact import at_hand, on_host, tensor_of
from gradclip.torch.gradients import Gradients, Params, collect, drop, named_parameters
from gradclip.torch.graphs import captures, check_graph, stay
from gradclip.torch.placement import SplitOver, check_replaced, cut_since, layout_of
from gradclip.torch.sharded import Sharded
from gradclip.torch.verbs import InPlace, OneNumber, in_tensors
from gradclip.torch.verify import Verify, verifier_for

if TYPE_CHECKING:
    from gradclip.history import History

NO_GRADIENT = (
    "none of {} parameters has a gradient, on no process: was backward() called, and "
    "were the gradients synchronised?"
)


class Clipper:
    r"""Clip the gradients of a model in place, between `backward()` and `step()`.

    $g \leftarrow g \cdot \min(1, \text{limit}_t / \lVert g \rVert)$

    Args:
        params: A module, (name, parameter) pairs, parameters, or one parameter, of any
            shape. Those that a module gets later are not clipped; `attach` follows
            the optimizer.
        rule: Any rule.
        on_nonfinite: What NaN or infinity in a gradient leads to. `"skip"` sets all
            gradients to None, so that parameters and optimizer stay as they are;
            `"zero"` clears the bad elements and clips the rest; `"raise"` names the
            parameters; `"ignore"` leaves the gradients as they are. Where none is
            given, it is "skip", and "ignore" under a limit of infinity, which records.
        max_consecutive_skips: At which number of skipped steps in a row an error is
            raised, at least 1.
        history: Takes in every step, as `History("run.jsonl")` does.
        doctor: Which checks for misuse are made, of `"unchanged"`, `"consumed"`,
            `"scaled"`, `"alone"`, `"missing"`, `"unheld"`, `"unmatched"`, `"attached"`
            and `"rate"`. Each warns once.
        split_over: For parameters of which other processes have other parts, and that
            are no DTensors: a process group, whose members have different tensors, or
            a function of name and parameter that returns a group, `Pieces(group, dim)`
            for a slice of a tensor, several of these with the outermost last, or None.
        deterministic: Whether norms are summed in float64 and rounded to 24 bits before
            the limit is decided, so that any split of the same gradients over processes
            is clipped to the same bits. It takes more time.
        verify: Whether all processes compare gradients, norm, limit and scale at every
            step; a process group, where not all of them have this model. Each has to
            make the clipper then. It takes time; see the page on sharded models.

    Raises:
        TypeError: If the parameters are not tensors, `rule` is not a rule, or `history`
            no history.
        ValueError: If there are no parameters, for an unknown policy, and for fewer
            than one skip in a row.
        VerifyError: With `verify`, where processes do not clip the same model alike:
            it names the rank, the parameters and the likely cause.

    Example:
        >>> import torch
        >>> from gradclip import Norm
        >>> from gradclip.torch import Clipper
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> clipper = Clipper(model, Norm(1.0))
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> info = clipper.clip_()
        >>> float(info.norm), float(info.norm_after), model.weight.grad
        (5.0, 1.0, tensor([[0.6000, 0.8000]]))
    """

    _module: torch.nn.Module | None = None

    def __init__(
        self,
        params: Params,
        rule: Rule,
        on_nonfinite: Policy | None = None,
        max_consecutive_skips: int = 100,
        history: "History | None" = None,
        doctor: Collection[str] = CHECKS,
        split_over: SplitOver = None,
        deterministic: bool = False,
        verify: Verify = False,
    ) -> None:
        """Check everything before the first step."""
        check_rule(rule)
        self.on_nonfinite = chosen(on_nonfinite, rule)
        at_least(1, max_consecutive_skips=max_consecutive_skips)
        self.max_consecutive_skips = max_consecutive_skips
        self._info: Info | None = None
        self._made: tuple[Info, Info] | None = None
        named = named_parameters(params)
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.split_over, self.deterministic = split_over, deterministic
        self.verify = verify
        if isinstance(params, torch.nn.Module):
            self._module = params
        self._doctor = Doctor(doctor, self.params, rule)
        device = home(self.params[0].device)
        if device.type == "meta":
            raise ValueError(
                "the parameters are on the meta device, and have no values yet; make "
                "the clipper after to_empty() and the initialisation."
            )
        # Counts are arrays too: for numbers, a compiled step would be compiled again.
        self._memory = Memory(rule, torch.zeros((), dtype=torch.int64, device=device))
        # This one stays on the host, where schedules ask for it.
        self._memory.step = torch.zeros((), dtype=torch.int64, device="cpu")
        self._make_room()
        # Copied without waiting, and so read a few steps late on an accelerator.
        self._in_a_row = torch.zeros(
            (), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda"
        )
        self.history = history
        begin(history, rule)
        if self._verifier is not None:
            tell_ranks(history, self._verifier.ranks)

    @property
    def rule(self) -> Rule:
        """The rule, whose memory this is; for another one make another clipper."""
        return self._memory.rule

    @property
    def info(self) -> Info | None:
        """What the latest clip did, in tensors; None before the first."""
        found, made = self._info, self._made
        if found is None or isinstance(found.norm, Tensor):
            return found
        # Made when it is looked at: it takes as long as the norm of a small network.
        # Kept with what it is made from, since another thread may clip meanwhile.
        if made is None or made[0] is not found:
            made = self._made = found, in_tensors(found)
        return made[1]

    @torch.no_grad()
    def clip_(self) -> Info:
        """Clip the gradients that the parameters have now.

        Returns:
            What was done, also kept as `info`. Nothing is read from an accelerator.

        Raises:
            ValueError: If no parameter has a gradient.
            NonFiniteError: By policy, or after too many skipped steps in a row.
            VerifyError: With `verify`, before anything is changed, if gradients are at
                fault.
        """
        self._verify_gradients()
        found = self._collect()
        verbs = self._verbs(found)
        info = self._run(found, verbs, self.on_nonfinite)
        if self._skipping:
            drop(self.params, info.kept)
        self._check_skips(found, verbs)
        return cast(Info, self.info)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the memory as tensors, for any kind of checkpoint."""
        self._take_up_new_parameters()
        saved = self._memory.state_dict(lambda x: tensor_of(x).clone())
        found = self._for_parameters(saved, laid_out_like)
        # What is not alike on all would have the same name, and a checkpoint keep one.
        return {name + self._tag(name): x for name, x in found.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved memory, exactly.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If it was saved by another rule, for another number of
                parameters, for other pieces of them, or by another stage; nothing is
                changed then.
        """
        self._take_up_new_parameters()
        device = home(self.params[0].device)
        check_state(state)
        plainly = {name.partition(AT)[0]: x for name, x in state.items()}
        for name in state:
            if AT in name:
                check_tag(name, self._tag(name.partition(AT)[0]))
        here = self._for_parameters(plainly, part_like)
        self._memory.load_state_dict(
            here,
            lambda x: tensor_of(x).to(device).clone(),
            blank=lambda: list(map(self._empty, stages(self._bound))),
        )

    def _tag(self, name: str) -> str:
        """Return what is put behind a name in a memory that others have otherwise."""
        if self._layout is None:
            return ""
        if name.startswith(self._beginnings(lambda stage: stage.by_part)):
            place = int(name_and_place(name)[1])
            return self._layout.tag(place) if place < len(self.params) else ""
        # Stages and experts have other tensors in the cells.
        alike = name != "names" and not name.startswith(self._beginnings(has_places))
        return "" if alike else self._layout.tag_of_all

    def _beginnings(self, which: Callable[[Rule], bool]) -> tuple[str, ...]:
        """Return how the names of what some stages remember begin."""
        return tuple(prefix(i) for i, s in enumerate(stages(self.rule)) if which(s))

    def _for_parameters(
        self, saved: Mapping[str, Any], change: Callable[[Tensor, Any], Any]
    ) -> dict[str, Any]:
        """Return a memory with what belongs to the elements of split tensors changed.

        Such a part of it is saved as a DTensor, so that it can be split otherwise.
        """
        found = dict(saved)
        inside = self._beginnings(lambda stage: stage.by_part)
        for name in found if self._layout is not None else ():
            if name.startswith(inside):
                place = int(name_and_place(name)[1])
                found[name] = change(self.params[place], found[name])
        return found

    def __repr__(self) -> str:
        """Show the rule and how much it is applied to."""
        name = type(self).__name__
        return f"{name}({len(self.params)} parameters, {self.rule!r})"

    def _take_up_new_parameters(self) -> None:
        """Follow an optimizer, where one says which parameters there are."""

    def _make_room(self) -> None:
        """Make the memory for all parameters, so that it can be saved and loaded."""
        shapes = [tuple(p.shape) for p in self.params]
        self._bound = self.rule.bind(self.names, shapes)
        named = zip(self.names, self.params, strict=True)
        self._layout = layout_of(named, self.split_over, self._module)
        if self._layout is not None:
            self._layout.check(self._bound)
        self._verifier = verifier_for(
            self.verify, self.names, self.params, self._layout
        )
        others = self._layout is not None or self._verifier is not None
        single = one_number(self._bound) and not (others or self.deterministic)
        self._by_unit = any(stage.over == "unit" for stage in stages(self._bound))
        self._weighs = self._bound.needs_weight
        # For all steps: what rules count in a window is kept in it.
        self._one_number = OneNumber() if single else None
        self._memory.states = list(map(self._empty, stages(self._bound)))
        self._memory.names = self.names

    def _empty(self, stage: Rule) -> State:
        """Return the memory of a stage before the first step."""
        leaves = at_home([local_of(p.detach()) for p in self.params])
        return empty(InPlace(), stage, leaves, home(self.params[0].device))

    def _follow_wrapper(self) -> None:
        """Lay parameters out anew where FSDP has cut them after they were known."""
        if self._layout is not None or torch.compiler.is_compiling():
            return
        if self._info is None and self._module is not None:
            check_replaced(self.names, self.params, self._module)
        if not cut_since(self.names, self.params, self._module):
            return
        if done := int(self._memory.step):
            raise ValueError(
                "FSDP's first version has cut the parameters, and this clipper "
                f"remembers {done} steps with whole ones; make it behind "
                "FullyShardedDataParallel, and load its memory then."
            )
        self._make_room()

    def _verify_gradients(self) -> None:
        """Compare gradients with those of other processes, where that was asked."""
        self._follow_wrapper()
        if self._verifier is not None:
            # A process without gradients takes part like all others.
            found = collect(self.params, split=True)
            self._verifier.before(found.present, found.leaves)

    def _collect(self) -> Gradients:
        return collect(
            self.params,
            weights=self._weighs,
            split=self._layout is not None,
            units=self._by_unit,
        )

    def _verbs(
        self, found: Gradients, amplified: Tensor | None = None, fused: bool = False
    ) -> InPlace:
        """Return the verbs for this step; missing gradients matter to a memory."""
        if self._one_number is not None and on_host(found.leaves):
            self._one_number.amplified, self._one_number.fused = amplified, fused
            return self._one_number
        missing = len(found.present) < len(self.params)
        minds = self.rule.stateful or any(
            stage.by_place or stage.over == "tensor" for stage in stages(self.rule)
        )
        # Otherwise the norm of one tensor would meet what is remembered of another.
        cells = (len(self.params), found.present) if minds and missing else None
        verbs = InPlace(amplified, cells, fused)
        if self._layout is not None:
            verbs = Sharded(self._layout, self.rule, found.present, amplified, fused)
        if not (torch.compiler.is_compiling() or on_host(found.leaves)):
            verbs.xp = Sending(verbs.xp)
        verbs.deterministic = self.deterministic
        return verbs

    def _run(self, found: Gradients, verbs: InPlace, policy: Policy) -> Info:
        """Take the gradients through the rule and count the step."""
        memory, watched = self._memory, not torch.compiler.is_compiling()
        self._keep_numbers(verbs is self._one_number)
        captured = watched and captures(self.params[0])
        if captured:
            check_graph(self.rule)
        if watched and "unmatched" in self._doctor.checks:
            # Not before: parameters may have come since, and others may have clippers.
            whole = () if self._module is None else named_parameters(self._module)
            names = dict.fromkeys([*self.names, *(name for name, _ in whole)])
            self._doctor.look_for_names(self.rule, list(names))
        if watched and found.leaves:
            self._doctor.before(found.leaves)
        due = self.history is not None and self.history.wants_tensors()
        if self.history is not None and due:
            self._record_tensors(self.history, found, verbs)
        step = int(memory.step) if watched else memory.step
        info, states = self._clip(found, verbs, policy, step)
        before = memory.states, memory.skipped, memory.in_a_row
        memory.states = states
        kept = verbs.known(info.kept) if self._skipping else True
        if self.history is not None:
            # It was dropped before it was changed, and somebody will ask who it was.
            bad = kept is False and not info.finite
            if bad and not due and self.history.wants_tensors(bad):
                self._record_tensors(self.history, found, verbs)
            self.history.record(memory.step, info)
        memory.count((~info.kept).to(torch.int64) if kept is None else int(not kept))
        if captured:
            stay(memory, *before)
        if watched:
            self._look_back(found, info)
            if isinstance(memory.in_a_row, Tensor):
                self._in_a_row.copy_(memory.in_a_row, non_blocking=True)
        self._info = info._replace(skipped=memory.skipped)
        return self._info

    def _clip(
        self, found: Gradients, verbs: InPlace, policy: Policy, step: Any
    ) -> tuple[Info, list[State | None]]:
        """Take the gradients through the rule, and compare processes if asked to."""
        clip = partial(
            run,
            verbs,
            found.leaves,
            self._bound,
            self._memory.states,
            step=step,
            policy=policy,
            weights=found.weights,
            name_of=self._name_in(found),
            absent=verbs.absent(self.params[0].device),
        )
        with verbs.quiet():
            if self._verifier is None:
                _, info, states = clip()
            else:
                _, info, states = self._verifier.compare(clip, self._by_unit)
        bring_back(found.leaves, found.origins)
        return info, states

    def _look_back(self, found: Gradients, info: Info) -> None:
        """Let the doctor see what was done, or that there was nothing to do."""
        if found.leaves:
            self._doctor.after(found.leaves, info)
        # Gradients may all be elsewhere: only a norm of 0 says that there are none.
        elif at_hand(info.norm) and info.norm.numel() and not info.norm.any():
            self._doctor.tell("missing", NO_GRADIENT.format(len(self.params)))

    def _keep_numbers(self, single: bool) -> None:
        """Count and remember in single numbers, or in tensors again.

        Each operation on a tensor takes microseconds, but compiled code and graphs go
        on with nothing else.
        """
        memory = self._memory
        if single is isinstance(memory.step, int):
            return
        for name in COUNTERS:
            x = getattr(memory, name)
            # The step stays on the host, where schedules ask for it.
            device = "cpu" if name == "step" else home(self.params[0].device)
            setattr(memory, name, int(x) if single else torch.tensor(x, device=device))
        if not single:
            memory.states = [
                state and {name: as_tensor(x) for name, x in state.items()}
                for state in memory.states
            ]

    def _name_in(self, found: Gradients) -> Callable[[int], str]:
        """Return the names of gradients by their place among those that are there."""
        return lambda i: self.names[found.present[i]]

    def _check_skips(self, found: Gradients, verbs: InPlace) -> None:
        """Raise after too many skipped steps, and name what is bad in the latest.

        Not for all processes together: they may hear of the count in other steps.
        """
        if torch.compiler.is_compiling():
            return
        counted = self._memory.in_a_row
        row = counted if isinstance(counted, int) else int(self._in_a_row)
        bad = partial(with_nonfinite, verbs, found.leaves, self._name_in(found))
        self._memory.check(row, self.max_consecutive_skips, bad)

    def _record_tensors(
        self, history: "History", found: Gradients, verbs: InPlace
    ) -> None:
        """Hand over the norm of each parameter as it was before the clip."""
        every = (
            InPlace(verbs.amplified, (len(self.params), found.present))
            if self._layout is None
            else self._verbs(found, verbs.amplified)
        )
        # In a history, 0 is the norm of zeros, and not of what is missing.
        every.missing = math.nan
        norms = every.measure(found.leaves, "tensor", 2.0)
        history.record_tensors(self._memory.step, self.names, norms)

    @property
    def _skipping(self) -> bool:
        """Whether a step may have to be dropped."""
        return may_drop(self.rule, self.on_nonfinite)


def as_tensor(x: Any) -> Tensor:
    """Return a tensor as it is, and what is NumPy's as one, also in compiled code."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x))
