"""measure → decide → apply, written once for every front.

A front hands over gradients and the verbs for them; the rule decides; the policy for
NaN and infinity lives here and nowhere else.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from gradclip.backends import Backend
from gradclip.decision import Info, clip_scale, decide, lawful
from gradclip.inside import empty_inside, look_inside
from gradclip.policy import NonFiniteError, Policy, may_drop
from gradclip.rules import Array, Measured, Rule, State, held, stages
from gradclip.rules.limits import ask_schedule, read_if_foreign
from gradclip.rules.parts import constants
from gradclip.wording import listed


def run(
    engine: Backend,
    leaves: list[Array],
    rule: Rule,
    states: Sequence[State | None],
    *,
    step: Any = 0,
    policy: Policy,
    weights: Sequence[Array] = (),
    name_of: Callable[[int], str] = str,
    absent: Array | None = None,
) -> tuple[list[Array], Info, list[State | None]]:
    """Take gradients through a rule; return them, what was done, and the new states.

    Nothing is changed before the first norm is known to be usable, or the policy has
    said what to do about it. Where reading that would make the host wait, both ways
    are computed and the flag chooses.
    """
    infos: list[Info] = []
    old: list[State] = []
    new: list[State] = []
    skips = policy == "skip"
    # Of all stages, before the first of them changes anything.
    asked = [ask_schedules(engine, stage, step) for stage in stages(rule)]
    for i, stage in enumerate(stages(rule)):
        given = parts = units_first(leaves, stage, engine.xp)
        norm = engine.measure(parts, stage.over, stage.p)
        missing = None
        # Only over tensors has a missing gradient a cell of its own, whose norm is NaN.
        if absent is not None and stage.over == "tensor":
            missing = engine.adopt(absent, norm)
        if i == 0:
            first = without_absent(norm, missing, engine)
            parts, norm = admit(engine, parts, rule, norm, policy, name_of, missing)
        counts = engine.counts(parts) if stage.over == "unit" else ()
        weight = weigh(engine, weights, stage)
        seen = Measured(norm, weight, step, engine.xp, counts, asked[i], missing)
        old.append(memory_of(engine, stage, states[i], parts, norm))
        parts, info, state = decide_stage(engine, parts, stage, seen, old[i], skips)
        infos.append(info)
        new.append(state)
        # On a device nobody knows yet, and the later stages run in vain.
        if engine.known(info.kept) is False:
            break
        # Skip takes all or nothing, and what looks inside has multiplied already.
        if not (stage.drops or stage.by_part):
            parts, infos[-1] = apply(engine, parts, stage, info, seen, old[i])
        if parts is not given:
            leaves = units_first(parts, stage, engine.xp, back=True)
    total = summary(infos, engine.xp)
    if policy == "zero":
        # What was cleared is no longer in the norm, and should not pass unseen.
        total = total._replace(finite=all_finite(first, engine))
    if may_drop(rule, policy) and not engine.known(total.kept):
        leaves, total = dropped(engine, leaves, total)
        # A dropped step teaches nothing, also where another norm has dropped it.
        new = [held(a, b, total.kept, engine.xp) for a, b in zip(new, old, strict=True)]
    # Stages behind the one that dropped the step keep the memory that they had.
    return leaves, total, [*new, *states[len(new) :]]


def ask_schedules(engine: Backend, stage: Rule, step: Any) -> dict[int, Any]:
    """Ask all schedules once, and look at limits in arrays, which may have changed.

    What is no limit is refused where it can be seen.
    """
    names = ("limit", "low", "high")
    found = [(rule, name) for rule in stage.within() for name in names]
    values: dict[int, Any] = {}
    for rule, name in found:
        given = getattr(rule, name, None)
        # Almost all are numbers, or there is none.
        if given is None or type(given) is float:
            continue
        if callable(given):
            value = engine.number(ask_schedule(given, step, engine.xp.asarray(0.0)))
        elif hasattr(given, "shape"):
            value = read_if_foreign(given, engine.xp.asarray(0.0))
        else:
            continue
        fits = value >= 0 if name == "low" else value > 0
        if engine.known(engine.xp.asarray(fits)) is False:
            least = "at least" if name == "low" else "above"
            raise ValueError(
                f"{rule!r} has the {name} {float(value)} at step {step}; a limit is "
                f"{least} 0. Nothing was changed."
            )
        values[id(given)] = value
    return values


def decide_stage(
    engine: Backend,
    leaves: list[Array],
    stage: Rule,
    seen: Measured,
    state: State,
    skips: bool,
) -> tuple[list[Array], Info, State]:
    """Return what one stage decides; what looks inside of tensors multiplies, too."""
    if stage.by_part:
        # Torch changes gradients in place, and those of a dropped step must stay.
        going = not skips or engine.known(all_finite(seen.norm, engine)) is not False
        leaves, info, state = look_inside(engine, leaves, stage, seen, state, going)
    else:
        info, state = decide(stage, seen, state)
    if skips:
        info = info._replace(kept=info.kept & info.finite)
    return leaves, info, state


def units_first(
    leaves: list[Array], stage: Rule, xp: Any, back: bool = False
) -> list[Array]:
    """Return the gradients with the axis of their units first, or put it back."""
    if stage.over != "unit" or stage.axis == 0:
        return leaves
    axes = (0, stage.axis) if back else (stage.axis, 0)
    for x in leaves:
        if x.ndim > 1 and not -x.ndim <= stage.axis < x.ndim:
            raise ValueError(
                f"{stage!r}: a gradient of shape {tuple(x.shape)} has no such axis; "
                "give it a clipper of its own, or a rule over each 'tensor'."
            )
    return [xp.moveaxis(x, *axes) if x.ndim > 1 else x for x in leaves]


def weigh(engine: Backend, weights: Sequence[Array], stage: Rule) -> Array | None:
    """Return the norms of the parameters, for a rule that asks for them."""
    if not stage.needs_weight:
        return None
    return engine.weigh(units_first(list(weights), stage, engine.xp), stage.over, 2.0)


def dropped(
    engine: Backend, leaves: list[Array], info: Info
) -> tuple[list[Array], Info]:
    """Return what is left of a step that was dropped, unless it was kept after all."""
    after = engine.xp.where(info.kept, info.norm_after, 0.0)
    return engine.discard(leaves, info.kept), info._replace(norm_after=after)


def memory_of(
    engine: Backend,
    stage: Rule,
    state: State | None,
    leaves: Sequence[Array],
    norm: Array,
) -> State:
    """Return the memory of a stage: what was kept, or an empty one."""
    if not stage.by_part:
        return fitting(stage, state, norm, engine)
    if state is None:
        return empty_inside(engine, stage, leaves)
    return {name: engine.adopt(x, norm) for name, x in state.items()}


def empty(
    engine: Backend, stage: Rule, leaves: Sequence[Array], device: Any = None
) -> State:
    """Return the memory of a stage before the first step, for gradients like these."""
    if stage.by_part:
        return empty_inside(engine, stage, leaves)
    shape: tuple[int, ...] = (len(leaves),) if stage.over == "tensor" else ()
    if stage.over == "unit":
        # Of arrays that are only described as well; axes are checked by the clip.
        sizes = [x.shape[stage.axis :][:1] if x.ndim > 1 else () for x in leaves]
        shape = (sum(size[0] if size else 1 for size in sizes),)
    norm = engine.xp.zeros(shape, dtype=engine.wide, device=device)
    return stage.init(norm, engine.xp)


def fitting(rule: Rule, state: State | None, norm: Array, engine: Backend) -> State:
    """Return the state for norms of this shape: a new one, or the one at hand."""
    if state is None:
        return rule.init(norm, engine.xp)
    if not state:
        return {}
    state = {name: engine.adopt(x, norm) for name, x in state.items()}
    shape = rule.remembers(norm)
    for x in state.values():
        # A window has an axis of its own before that of the norms.
        if tuple(x.shape)[x.ndim - len(shape) :] != shape:
            raise ValueError(
                f"{rule!r} remembers {x.shape[-1]} tensors, but this step has "
                f"{shape[-1]}; hand over the same gradients at every step."
            )
    return state


def admit(
    engine: Backend,
    leaves: list[Array],
    rule: Rule,
    norm: Array,
    policy: Policy,
    name_of: Callable[[int], str],
    absent: Array | None = None,
) -> tuple[list[Array], Array]:
    """Return gradients and their norm after the policies that act before a clip."""
    present = without_absent(norm, absent, engine)
    # Where nobody may look, clearing goes ahead: without a bad element nothing changes.
    if policy not in ("raise", "zero") or engine.known(all_finite(present, engine)):
        return leaves, norm
    if policy == "raise":
        if not engine.read(all_finite(present, engine)):
            raise NonFiniteError(describe_nonfinite(engine, leaves, name_of))
    else:
        first = stages(rule)[0]
        leaves = engine.without_nonfinite(leaves)
        # Measured anew, since a norm of NaN says nothing about the other elements.
        norm = engine.measure(leaves, first.over, first.p)
    return leaves, norm


def without_absent(norm: Array, absent: Array | None, engine: Backend) -> Array:
    """Return the norms with 0 for missing gradients, whose NaN is no bad one."""
    return norm if absent is None else engine.xp.where(absent, 0.0, norm)


def all_finite(norm: Array, engine: Backend) -> Array:
    """Return the flag that every norm is finite."""
    return engine.xp.all(engine.xp.isfinite(norm))


def describe_nonfinite(
    engine: Backend, leaves: Sequence[Array], name_of: Callable[[int], str]
) -> str:
    """Return a message that names the gradients with NaN or infinity in them."""
    bad = listed(engine.gathered(with_nonfinite(engine, leaves, name_of)))
    return (
        "NaN or infinity in the gradients of "
        f"{bad or 'no single tensor: the norm itself is too large'}; nothing was "
        "changed. Look at the loss and the inputs of this step, or choose "
        "on_nonfinite='skip' or 'zero'."
    )


def with_nonfinite(
    engine: Backend, leaves: Sequence[Array], name_of: Callable[[int], str]
) -> list[str]:
    """Return the names of gradients with NaN or infinity in them, and in how many."""
    counts = [(i, engine.count_nonfinite(x), x) for i, x in enumerate(leaves)]
    return [
        f"{name_of(i)} ({count} of {math.prod(x.shape)} elements)"
        for i, count, x in counts
        if count
    ]


def apply(
    engine: Backend,
    leaves: list[Array],
    stage: Rule,
    info: Info,
    seen: Measured,
    state: State,
) -> tuple[list[Array], Info]:
    """Multiply by the scale, unless it is known that nothing is to be done."""
    if stage.over == "element":
        if stage.stretches or stage.bends:
            return scale_elements(engine, leaves, stage, info, seen, state)
        return clamp_elements(engine, leaves, info, seen.norm)
    # A scale of 1 changes no bit, but takes a pass over all gradients, as torch's clip
    # does at every step (transformers#41431).
    idle = engine.known(info.clipped) is False
    leaves = leaves if idle else engine.multiply(leaves, info.scale, stage.over)
    return leaves, info


def clamp_elements(
    engine: Backend, leaves: list[Array], info: Info, largest: Array
) -> tuple[list[Array], Info]:
    """Cut every element to one limit, also beside one that is not finite."""
    if engine.known(largest <= info.limit) is True:
        return leaves, info
    # The scale of an infinite norm is 1, yet its element is cut to the limit.
    infinite = engine.xp.isinf(largest) & (largest > info.limit) & info.kept
    info = info._replace(
        clipped=info.clipped | infinite,
        scale=engine.xp.where(infinite, 0.0, info.scale),
        norm_after=engine.xp.where(infinite, info.limit, info.norm_after),
    )
    return engine.clamp(leaves, info.limit), info


def scale_elements(
    engine: Backend,
    leaves: list[Array],
    stage: Rule,
    info: Info,
    seen: Measured,
    state: State,
) -> tuple[list[Array], Info]:
    """Multiply every element by a scale of its own, which the rule is asked for."""
    moved = [info.clipped]

    def scale(norm: Array) -> Array:
        now = seen._replace(norm=norm)
        # With the memory from before this step, as for the largest element.
        limit, _ = stage.update(now, state)
        limit = lawful(limit, norm, seen.xp)
        found = clip_scale(norm, limit, seen.xp, stage.most(now))
        # Small elements may be stretched where the largest is left alone.
        moved.append(engine.here.any(found != 1))
        return found

    leaves = engine.each(leaves, scale)
    # Each process has seen its own elements, and all have to report the same.
    clipped = engine.here.any(engine.here.stack(moved)) & info.kept
    return leaves, engine.agreed(info._replace(clipped=clipped))


def _least(scale: Array, xp: Any) -> Array:
    """Return the smallest scale; 1 of no gradients, as a masked optimizer may have.

    Where processes have parts, each of them asks, also one without gradients.
    """
    if scale.ndim == 0:
        return scale
    # A minimum over nothing raises; infinity is the least only beside no scale.
    least = xp.min(xp.concat([scale, constants([math.inf], scale, xp)]))
    return xp.where(xp.isinf(least), 1.0, least)


def summary(infos: Sequence[Info], xp: Any) -> Info:
    """Return one report for all stages: the first norm, the last limit.

    That is the one that dropped the step, as on the host, where none comes after it.
    """
    if len(infos) == 1:
        return infos[0]
    first, last = infos[0], infos[-1]
    scale, clipped, kept = _least(first.scale, xp), first.clipped, first.kept
    limit = first.limit
    for info in infos[1:]:
        # Limits of other scopes have other shapes, between which no flag can choose.
        alike = info.limit.shape == limit.shape
        limit = xp.where(kept, info.limit, limit) if alike else info.limit
        scale, clipped = scale * _least(info.scale, xp), clipped | info.clipped
        kept = kept & info.kept
    return first._replace(
        limit=limit,
        scale=scale,
        clipped=clipped,
        norm_after=last.norm_after,
        kept=kept,
    )
