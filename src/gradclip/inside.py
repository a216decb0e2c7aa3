"""Rules that look inside a tensor, at elements or singular values, one at a time."""

import math
from collections.abc import Callable, Sequence

from gradclip.backends import Backend, is_half
from gradclip.decision import Info, decide
from gradclip.rules import Array, Measured, Rule, State
from gradclip.rules.keys import by_place, placed


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
    # Some processes have fewer tensors: a question to all of them within the loop
    # would wait for ever (areal-project/AReaL#1139).
    memories, seen = by_place(state), seen._replace(xp=engine.here)
    # Of whole tensors that may be split: all processes ask for them at once, out here.
    tops = engine.tops(leaves) if stage.over == "element" else None
    for i, x in zip(engine.places(leaves), leaves, strict=True):
        parts, put = engine.inside(x, stage.over)
        now = seen._replace(norm=parts, top=None if tops is None else tops[i])
        if stage.borrows:
            rule, memory = engine.borrow(stage, i, parts)
            info, _ = decide(rule, now, memory)
        else:
            memory = memories.get(str(i), {})
            if memories:
                check_place(stage, memory, i)
                check_count(engine, stage, leaves, len(memories))
            check_shapes(stage, memory, parts)
            info, after = decide(stage, now, memory)
            # Decided in the widest type, and kept as narrow as it began.
            kept = {k: seen.xp.astype(after[k], x.dtype) for k, x in memory.items()}
            new |= placed(kept, i)
        results.append(put(info.scale) if going else x)
        if math.prod(parts.shape):
            infos.append(_extremes(info, parts, seen))
    return results, engine.agreed(_most_of(infos, stage, seen)), new


def empty_inside(engine: Backend, stage: Rule, leaves: Sequence[Array]) -> State:
    """Return the memory of the parts of tensors before the first step."""
    if not stage.stateful:
        return {}
    xp = engine.xp
    found: State = {}
    for i, leaf in zip(engine.places(leaves), leaves, strict=True):
        parts = engine.inside(leaf, stage.over)[0]
        if is_half(leaf, xp):
            # Half-precision gradients are not worth a memory in float64.
            parts = xp.astype(parts, xp.float32)
        found |= placed(stage.init(parts, xp), i)
    return found


def check_place(stage: Rule, memory: State, place: int) -> None:
    """Refuse a tensor that there was none of at the first step."""
    if stage.stateful and not memory:
        raise ValueError(
            f"{stage!r} remembers nothing of a gradient number {place + 1}; hand over "
            "the same gradients at every step."
        )


def check_count(
    engine: Backend, stage: Rule, leaves: Sequence[Array], known: int
) -> None:
    """Refuse fewer tensors than before, where their places do not tell which."""
    places = engine.places(leaves)
    if isinstance(places, range) and stage.stateful and len(places) < known:
        raise ValueError(
            f"{stage!r} remembers {known} tensors, but this step has {len(places)}; "
            "hand over the same gradients at every step, and zeros for what is missing."
        )


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
        # Singular values are known only here; the largest element was measured before.
        top("norm", xp.max, norm) if stage.over == "singular" else norm,
        top("limit", xp.max, zero),
        top("scale", xp.min, zero + 1),
        finite,
        clipped,
        top("norm_after", xp.max, zero),
        kept=xp.ones_like(clipped),
    )
