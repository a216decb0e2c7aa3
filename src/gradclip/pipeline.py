"""measure → decide → apply, written once for every front.

A front hands over gradients and the verbs for them; the rule decides; the policy for
NaN and infinity lives here and nowhere else.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from gradclip.backends import Backend
from gradclip.rules import (
    Array,
    Measured,
    Norm,
    Rule,
    State,
    Value,
    held,
    stages,
    usable,
)
from gradclip.rules.limits import asked

Policy: TypeAlias = Literal["skip", "zero", "raise", "ignore"]
POLICIES = ("skip", "zero", "raise", "ignore")


class NonFiniteError(RuntimeError, FloatingPointError):
    """Gradients hold NaN or infinity, and the caller asked to be told."""


class Info(NamedTuple):
    """What one clipping did; the type of the numbers is that of the gradients' library.

    `norm`, `limit`, `scale` and `norm_after` are 0-d for `over="all"` and for
    elements (there the largest modulus counts), else one per tensor or unit.
    """

    norm: Any
    """The norm before clipping."""
    limit: Any
    """The largest norm let through at this step."""
    scale: Any
    """The factor applied, 1 where nothing was."""
    finite: Any
    """Whether the gradients came without NaN and infinity."""
    clipped: Any
    """Whether anything was clipped."""
    norm_after: Any
    """The norm after clipping; 0 where the step was skipped."""
    skipped: Any = 0
    """How many steps were skipped so far, this one included."""
    kept: Any = True
    """Whether the step goes ahead: not where a policy or `Skip` drops it."""

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        r"""Return the report as plain numbers, as loggers take them.

        Several cells become one number: $\lVert (n_1, n_2, …) \rVert_2$ for norms and
        limits, as in a history, and the smallest scale; a flag is 1 or 0.

        Args:
            prefix: Put before each name.

        Returns:
            `norm`, `limit`, `scale`, `norm_after`, `clipped`, `finite` and `kept`, and
            `skipped`, the count of skipped steps. The host waits for an accelerator.

        Example:
            >>> import gradclip as gc, numpy as np
            >>> _, info = gc.clip(np.array([6.0, 8.0]), gc.Norm(5.0))
            >>> numbers = info.to_dict(prefix="grad/")
            >>> numbers["grad/norm"], numbers["grad/scale"], numbers["grad/clipped"]
            (10.0, 0.5, 1.0)
        """
        from gradclip.recorder import to_numpy, whole

        host = {name: to_numpy([x])[0] for name, x in self._asdict().items()}
        lengths = ("norm", "limit", "norm_after")
        return {
            prefix + name: whole(x) if name in lengths else float(x.min())
            for name, x in host.items()
        }


def clip_scale(norm: Array, limit: Array, xp: Any, most: Array | float = 1.0) -> Array:
    """Return `min(1, limit / norm)`; 1 for a norm that is 0 or not finite.

    `most` takes the place of the 1 in it for rules that may stretch.
    """
    known = usable(norm, xp)
    ratio = limit / xp.where(known, norm, 1.0)
    return xp.where(known, xp.clip(ratio, None, most), 1.0)


def decide(
    rule: Rule, seen: Measured, state: State, absent: Array | None = None
) -> tuple[Info, State]:
    """Ask a rule for the limit; return what follows from it, and the new state.

    `absent` marks cells without a gradient at this step: their norm is NaN, which
    teaches the rule nothing, and does not make the step non-finite.
    """
    xp = seen.xp
    limit, state = rule.update(seen, state)
    scale = clip_scale(seen.norm, limit, xp, rule.most(seen))
    finite = seen.norm < math.inf
    after = xp.where(finite & (scale != 1), limit, seen.norm)
    whole = xp.all(finite if absent is None else finite | absent)
    clipped = xp.any(scale != 1)
    kept = ~clipped if rule.drops else xp.ones_like(clipped)
    if rule.drops:
        scale = xp.where(kept, scale, 0.0)
    return Info(seen.norm, limit, scale, whole, clipped, after, kept=kept), state


def only_records(rule: Rule) -> bool:
    """Return whether a rule never clips, so that nothing may be touched."""
    return (
        isinstance(rule, Norm | Value)
        and isinstance(rule.limit, float)
        and math.isinf(rule.limit)
    )


def may_drop(rule: Rule, policy: Policy) -> bool:
    """Return whether a step can be dropped: by the policy, or by `Skip`."""
    if policy == "skip" and not only_records(rule):
        return True
    return any(stage.drops for stage in stages(rule))


def check_policy(policy: Policy) -> Policy:
    """Return the policy for NaN and infinity, or say which there are."""
    if policy not in POLICIES:
        known = ", ".join(map(repr, POLICIES))
        raise ValueError(f"on_nonfinite={policy!r}: use one of {known}.")
    return policy


def check_compiled(rule: Rule, policy: Policy) -> None:
    """Refuse what compiled code cannot do, and code whose memory has one size."""
    if check_policy(policy) == "raise":
        raise ValueError(
            "on_nonfinite='raise' has to look at the gradients, which compiled code "
            "cannot; use 'skip', 'zero' or 'ignore', and read what was done afterwards."
        )
    if rule.grows:
        raise ValueError(
            f"{rule!r} remembers more norms at every step, and compiled code has "
            "arrays of one size; give it a window."
        )


def run(
    engine: Backend,
    leaves: list[Array],
    rule: Rule,
    states: Sequence[State | None],
    *,
    step: Any = 0,
    policy: Policy = "skip",
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
    skips = policy == "skip" and not only_records(rule)
    for i, stage in enumerate(stages(rule)):
        given = parts = turned(leaves, stage, engine.xp)
        norm = engine.measure(parts, stage.over, stage.p)
        if i == 0:
            parts, norm = admit(engine, parts, rule, norm, policy, name_of)
        told = scheduled(engine, stage, step)
        counts = engine.counts(parts) if stage.over == "unit" else ()
        weight = weigh(engine, weights, stage)
        seen = Measured(norm, weight, step, engine.xp, counts, told)
        old.append(recalled(engine, stage, states[i], parts, norm))
        if stage.by_part:
            going = not skips or engine.known(all_finite(norm, engine)) is not False
            parts, info, state = look_inside(engine, parts, stage, seen, old[i], going)
        else:
            missing = absent if stage.over == "tensor" else None
            info, state = decide(stage, seen, old[i], missing)
        if skips:
            info = info._replace(kept=info.kept & info.finite)
        infos.append(info)
        new.append(state)
        if engine.known(info.kept) is False:
            break
        if not (stage.drops or stage.by_part):
            parts = apply(engine, parts, stage, info, seen)
        if parts is not given:
            leaves = turned(parts, stage, engine.xp, back=True)
    total = summary(infos, engine.xp)
    if may_drop(rule, policy) and not engine.known(total.kept):
        leaves, total = dropped(engine, leaves, total)
        # A dropped step teaches nothing, also where another norm has dropped it.
        new = [held(a, b, total.kept, engine.xp) for a, b in zip(new, old, strict=True)]
    return leaves, total, [*new, *states[len(new) :]]


def scheduled(engine: Backend, stage: Rule, step: Any) -> dict[int, Any]:
    """Ask all schedules once; refuse what they say where it can be seen."""
    inner = getattr(stage, "rule", stage)
    rules = [inner, *(rule for _, rule in getattr(inner, "rules", ()))]
    found = [(rule, name) for rule in rules for name in ("limit", "low", "high")]
    told: dict[int, Any] = {}
    for rule, name in found:
        schedule = getattr(rule, name, None)
        if not callable(schedule):
            continue
        value = engine.number(asked(schedule, step, engine.xp.asarray(0.0)))
        if engine.known(engine.xp.asarray(value > 0)) is False:
            raise ValueError(
                f"the schedule of {rule!r} gives the {name} {float(value)} at step "
                f"{step}; a limit is above 0. Nothing was changed."
            )
        told[id(schedule)] = value
    return told


def turned(
    leaves: list[Array], stage: Rule, xp: Any, back: bool = False
) -> list[Array]:
    """Return the gradients with the axis of their units first, or put it back."""
    if stage.over != "unit" or stage.axis == 0:
        return leaves
    axes = (0, stage.axis) if back else (stage.axis, 0)
    return [xp.moveaxis(x, *axes) if x.ndim > 1 else x for x in leaves]


def weigh(engine: Backend, weights: Sequence[Array], stage: Rule) -> Array | None:
    """Return the norms of the parameters, for a rule that asks for them."""
    if not stage.needs_weight:
        return None
    return engine.weigh(turned(list(weights), stage, engine.xp), stage.over, 2.0)


def dropped(
    engine: Backend, leaves: list[Array], info: Info
) -> tuple[list[Array], Info]:
    """Return what is left of a step that was dropped, unless it was kept after all."""
    after = engine.xp.where(info.kept, info.norm_after, 0.0)
    return engine.discard(leaves, info.kept), info._replace(norm_after=after)


def look_inside(
    engine: Backend,
    leaves: list[Array],
    stage: Rule,
    seen: Measured,
    state: State,
    going: bool,
) -> tuple[list[Array], Info, State]:
    """Decide for the parts of one tensor at a time; change them where it is `going`."""
    results, infos, new = [], [], dict(state)
    memories, seen = _by_tensor(state), seen._replace(xp=engine.here)
    tops = engine.tops(leaves) if stage.over == "element" else None
    for i, x in zip(engine.places(leaves), leaves, strict=True):
        parts, put = engine.inside(x, stage.over)
        now = seen._replace(norm=parts, top=None if tops is None else tops[i])
        if stage.borrows:
            rule, memory = engine.borrow(stage, i, parts)
            info, _ = decide(rule, now, memory)
        else:
            memory = memories.get(str(i), {})
            check_shapes(stage, memory, parts)
            info, after = decide(stage, now, memory)
            kept = {k: seen.xp.astype(after[k], x.dtype) for k, x in memory.items()}
            new |= {f"{name}.{i}": part for name, part in kept.items()}
        results.append(put(info.scale) if going else x)
        if math.prod(parts.shape):
            infos.append(_extremes(info, parts, seen))
    return results, engine.agreed(_most_of(infos, stage, seen)), new


def check_shapes(stage: Rule, memory: State, parts: Array) -> None:
    """Refuse a tensor that is not the one remembered."""
    for kept in memory.values():
        if kept.ndim and tuple(kept.shape) != tuple(parts.shape):
            raise ValueError(
                f"{stage!r} remembers the elements of a gradient of shape "
                f"{tuple(kept.shape)}, but this one has {tuple(parts.shape)}; hand "
                "over the same gradients at every step, and no sparse ones."
            )


def _extremes(info: Info, parts: Array, seen: Measured) -> Info:
    """Return the largest numbers of one tensor, and the smallest scale."""
    xp = seen.xp
    # A coordinate that was never seen has no limit, but nothing to limit either.
    limit = xp.max(xp.where(parts > 0, info.limit, 0.0))
    return info._replace(
        norm=xp.max(parts),
        limit=limit,
        scale=xp.min(info.scale),
        norm_after=xp.max(info.norm_after),
    )


def _most_of(infos: Sequence[Info], stage: Rule, seen: Measured) -> Info:
    """Return one report for all tensors, in the type of the norms."""
    xp, norm = seen.xp, seen.norm

    def top(name: str, choose: Callable[[Array], Array], none: Array) -> Array:
        found = [xp.astype(getattr(info, name), norm.dtype) for info in infos]
        return choose(xp.stack(found)) if found else none

    finite, zero = xp.all(xp.isfinite(norm)), xp.zeros_like(norm)
    cut = [info.clipped for info in infos]
    clipped = xp.any(xp.stack(cut)) if cut else xp.zeros_like(finite)
    return Info(
        top("norm", xp.max, norm) if stage.over == "singular" else norm,
        top("limit", xp.max, zero),
        top("scale", xp.min, zero + 1),
        finite,
        clipped,
        top("norm_after", xp.max, zero),
        kept=xp.ones_like(clipped),
    )


def _by_tensor(state: State) -> dict[str, State]:
    """Return what is remembered of each tensor, by its place."""
    found: dict[str, State] = {}
    for key, x in state.items():
        name, _, place = key.rpartition(".")
        found.setdefault(place, {})[name] = x
    return found


def recalled(
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
    shape = (len(leaves),) if stage.over == "tensor" else ()
    norm = engine.xp.zeros(shape, dtype=engine.wide, device=device)
    return stage.init(norm, engine.xp)


def empty_inside(engine: Backend, stage: Rule, leaves: Sequence[Array]) -> State:
    """Return the memory of the parts of tensors before the first step."""
    if not stage.stateful:
        return {}
    xp = engine.xp
    found: State = {}
    for i, leaf in zip(engine.places(leaves), leaves, strict=True):
        parts = engine.inside(leaf, stage.over)[0]
        if xp.finfo(leaf.dtype).eps > 1e-4:
            # Half-precision gradients are not worth a memory in float64.
            parts = xp.astype(parts, xp.float32)
        found |= {f"{name}.{i}": x for name, x in stage.init(parts, xp).items()}
    return found


def fitting(rule: Rule, state: State | None, norm: Array, engine: Backend) -> State:
    """Return the state for norms of this shape: a new one, or the one at hand."""
    if state is None:
        return rule.init(norm, engine.xp)
    state = {name: engine.adopt(x, norm) for name, x in state.items()}
    shape = rule.remembers(norm)
    for x in state.values():
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
) -> tuple[list[Array], Array]:
    """Return gradients and their norm after the policies that act before a clip."""
    if policy not in ("raise", "zero") or engine.known(all_finite(norm, engine)):
        return leaves, norm
    if policy == "raise":
        if not engine.read(all_finite(norm, engine)):
            raise NonFiniteError(describe_nonfinite(engine, leaves, name_of))
    elif not only_records(rule):
        first = stages(rule)[0]
        leaves = engine.without_nonfinite(leaves)
        norm = engine.measure(leaves, first.over, first.p)
    return leaves, norm


def all_finite(norm: Array, engine: Backend) -> Array:
    """Return the flag that every norm is finite."""
    return engine.xp.all(engine.xp.isfinite(norm))


def describe_nonfinite(
    engine: Backend, leaves: Sequence[Array], name_of: Callable[[int], str]
) -> str:
    """Return a message that names the gradients with NaN or infinity in them."""
    counts = [(i, engine.count_nonfinite(x), x) for i, x in enumerate(leaves)]
    bad = engine.gathered(
        [
            f"{name_of(i)} ({count} of {math.prod(x.shape)} elements)"
            for i, count, x in counts
            if count
        ]
    )
    shown = ", ".join(bad[:10]) + (
        f" and {len(bad) - 10} more" if len(bad) > 10 else ""
    )
    return (
        f"NaN or infinity in the gradients of {shown or 'no single tensor: the norm'}"
        f"{'' if bad else ' itself is too large'}; nothing was changed. Look at the "
        "loss and the inputs of this step, or choose on_nonfinite='skip' or 'zero'."
    )


def apply(
    engine: Backend, leaves: list[Array], stage: Rule, info: Info, seen: Measured
) -> list[Array]:
    """Multiply by the scale, unless it is known that nothing is to be done."""
    if stage.over != "element":
        idle = engine.known(info.clipped) is False
        return leaves if idle else engine.multiply(leaves, info.scale, stage.over)
    if not (stage.stretches or stage.bends):
        # Elements are clipped one by one, also beside one that is not finite.
        idle = engine.known(seen.norm <= info.limit) is True
        return leaves if idle else engine.clamp(leaves, info.limit)

    def scale(norm: Array) -> Array:
        now = seen._replace(norm=norm)
        limit, _ = stage.update(now, {})
        return clip_scale(norm, limit, seen.xp, stage.most(now))

    return engine.each(leaves, scale)


def summary(infos: Sequence[Info], xp: Any) -> Info:
    """Return one report for all stages: the first norm, the last limit."""
    if len(infos) == 1:
        return infos[0]
    first, last = infos[0], infos[-1]
    scale, clipped, kept = xp.min(first.scale), first.clipped, first.kept
    for info in infos[1:]:
        scale, clipped = scale * xp.min(info.scale), clipped | info.clipped
        kept = kept & info.kept
    return first._replace(
        limit=last.limit,
        scale=scale,
        clipped=clipped,
        norm_after=last.norm_after,
        kept=kept,
    )
