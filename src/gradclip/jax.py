"""The front for optax: a rule as a gradient transformation, its memory as a state.

Everything works under jit, vmap and scan: nothing is read, and a step that is to be
dropped becomes zeros.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gradclip.extras import needed as _needed

# ruff: noqa: E402 - what is missing is named before it is needed.
_needed("jax", "jax")
_needed("jax", "optax")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradclip.arguments import check_alike, check_rule
from gradclip.backends import Jax, NumPy, Shards
from gradclip.decision import Info
from gradclip.memory import Memory, check_remembered
from gradclip.pipeline import empty, run
from gradclip.policy import Policy, check_compiled, chosen
from gradclip.rules import Array, Rule, State, stages
from gradclip.tensor_order import places
from gradclip.wording import counted


class ClipState(NamedTuple):
    """The optimizer state of a clip; `optax.tree.get(state, "norm")` finds its info."""

    step: Array
    """How many steps were made."""
    memory: tuple[State, ...]
    """The memory of each stage of the rule; to derivatives it is a constant."""
    info: Info
    """What the last step did."""


def as_optax(
    rule: Rule,
    axis_name: str | Sequence[str] | None = None,
    on_nonfinite: Policy | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Return a rule as an optax transformation, to stand first in a chain.

    $g \leftarrow g \cdot \min(1, \text{limit}_t / \lVert g \rVert)$

    Arrays that are sharded under `jit` need nothing more, except that `Moment` and
    `over="singular"` do not take those on an explicit mesh. The latest `Info` is part
    of the state: `optax.tree.get(state, "norm")`, or `"info"` for all of it.

    Args:
        rule: Any rule, with or without memory.
        axis_name: Under `shard_map` or `pmap`, the axis along which the gradients are
            cut in pieces, or several; norms are summed over them. `shard_map` tells
            replicated gradients apart; `pmap` does not, nor does `shard_map` with
            `check_vma=False`. Averaged gradients, equal on all devices, need no axis.
        on_nonfinite: `"skip"` turns the gradients of a step with NaN or infinity into
            zeros, `"zero"` clears those elements and clips the rest, `"ignore"` leaves
            them. Where none is given, it is "skip", and "ignore" under a limit of
            infinity, which only records. Zeros still move an optimizer with momentum:
            to freeze its state as well, wrap it with `optax.apply_if_finite`. Compiled
            code raises nothing after many such steps: `info.skipped` counts them.

    Returns:
        A transformation whose state is a `ClipState`. Its `update` needs the parameters
        for `Relative` only.

    Raises:
        TypeError: For what is not a rule.
        ValueError: For the policy `"raise"`, a rule whose memory grows, or an axis for
            a rule that looks at whole rows or tensors.

    Example:
        >>> import gradclip as gc, gradclip.jax, jax.numpy as jnp, numpy as np, optax
        >>> optimizer = optax.chain(gradclip.jax.as_optax(gc.Norm(1.0)), optax.sgd(1.0))
        >>> params = jnp.zeros(2)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(jnp.array([3.0, 4.0]), state, params)
        >>> print(np.asarray(updates).round(4), optax.tree.get(state, "norm"))
        [-0.6 -0.8] 5.0
    """
    policy = chosen(on_nonfinite, check_rule(rule))
    _check(rule, axis_name, policy)
    engine = Jax() if axis_name is None else Shards(axis_name)

    def init(params: optax.Params) -> ClipState:
        # Shapes are all that is needed; zeros as large as the parameters are not.
        grads = jax.eval_shape(lambda: jax.tree.map(jnp.zeros_like, params))
        memory = _empty_memory(rule, params)
        # A state has to begin in the shapes that it keeps under jit and scan. They are
        # asked for without the axis, which has no name outside of shard_map.
        info, _ = jax.eval_shape(
            lambda g, p: _run(Jax(), rule, g, p, memory, 0, policy)[1:],
            grads,
            params,
        )
        return ClipState(jnp.zeros((), jnp.int32), memory, _empty_info(info))

    def update(
        updates: optax.Updates,
        state: ClipState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ClipState]:
        _check_state(rule, state, ["0"] if jax.tree.leaves(updates) else [])
        clipped, info, memory = _run(
            engine, rule, updates, params, state.memory, state.step, policy
        )
        info = info._replace(skipped=state.info.skipped + ~info.kept)
        # A constant to derivatives: that of the root of a deviation of 0 is infinite.
        lasting = jax.lax.stop_gradient(tuple(memory))
        return clipped, _settled(
            ClipState(optax.safe_increment(state.step), lasting, info)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def state_dict(rule: Rule, state: ClipState, params: Any = None) -> dict[str, Any]:
    """Return a state as NumPy arrays, as the clippers of all frameworks save theirs.

    Args:
        rule: The rule that the state belongs to.
        state: What `as_optax(rule)` keeps; not traced.
        params: The parameters, arranged like those of `init`, for a rule that remembers
            something of several tensors: JAX sorts the keys of a dictionary, others do
            not, and so it is saved with their names.

    Returns:
        A flat dictionary, for `load_state_dict` of this module or of any clipper.

    Raises:
        ValueError: If the parameters are needed, and not there.

    Example:
        >>> import gradclip as gc, gradclip.jax, jax.numpy as jnp
        >>> rule = gc.ZScore()
        >>> state = gradclip.jax.as_optax(rule).init(jnp.zeros(2))
        >>> sorted(gradclip.jax.state_dict(rule, state))[:4]
        ['0.count', '0.mean', '0.std', 'in_a_row']
    """
    memory = _memory(rule, state, params)
    memory.step, memory.skipped = int(state.step), int(state.info.skipped)
    return memory.state_dict(np.array)


def load_state_dict(
    rule: Rule,
    state: ClipState,
    saved: Mapping[str, Any],
    params: Any = None,
) -> ClipState:
    """Return a state that goes on from a saved memory.

    Args:
        rule: The rule that was saved.
        state: A state made by `as_optax(rule).init(params)`.
        saved: What `state_dict` returned, here or on a clipper.
        params: As for `state_dict`. What was saved under the same names goes to them,
            and by the order of the tensors where other names were saved.

    Returns:
        The state with the memory, the step and the count of skipped steps taken over.

    Raises:
        ValueError: If another rule was saved, or other parameters, or if they are
            needed, and not there.

    Example:
        >>> import gradclip as gc, gradclip.jax, jax.numpy as jnp, numpy as np
        >>> clipper = gc.Clipper(gc.ZScore())
        >>> _ = clipper.clip(np.array([3.0, 4.0]))
        >>> state = gradclip.jax.as_optax(clipper.rule).init(jnp.zeros(2))
        >>> saved = clipper.state_dict()
        >>> state = gradclip.jax.load_state_dict(clipper.rule, state, saved)
        >>> float(state.memory[0]["mean"])
        5.0
    """
    memory = _memory(rule, state, params)
    memory.load_state_dict(saved, jnp.asarray, blank=lambda: state.memory)
    # In the types that the state had: for others jit would compile again.
    loaded = jax.tree.map(
        lambda new, old: jnp.asarray(new, old.dtype),
        tuple(memory.states),
        state.memory,
    )
    skipped = jnp.asarray(memory.skipped, state.info.skipped.dtype)
    info = state.info._replace(skipped=skipped)
    return ClipState(jnp.asarray(memory.step, state.step.dtype), loaded, info)


def _check_state(rule: Rule, state: Any, places: Sequence[str] = ()) -> None:
    """Refuse what is no state of a clip, and that of another rule."""
    if not isinstance(state, ClipState):
        raise TypeError(
            f"this is the state {type(state).__name__}, and not that of a clip; of an "
            "optax.chain hand over the part that is a ClipState, state[0] where the "
            "clip stands first."
        )
    if len(state.memory) != len(stages(rule)):
        raise ValueError(
            f"the state has the memory of {counted(len(state.memory), 'stages')}, and "
            f"{rule!r} has {len(stages(rule))}; it belongs to another rule."
        )
    for stage, memory in zip(stages(rule), state.memory, strict=True):
        check_remembered(stage, memory, places=places)


def _memory(rule: Rule, state: ClipState, params: Any) -> Memory:
    _check_state(rule, state)
    many = max(map(places, stages(rule), state.memory), default=0) > 1
    # A single place cannot be mistaken for another, and needs no name.
    if params is None and many:
        raise ValueError(
            f"{rule!r} remembers something of each tensor; hand over params=…, whose "
            "names tell where it belongs."
        )
    memory = Memory(rule)
    memory.states = state.memory
    memory.names = () if params is None else _names(params)
    return memory


def _check(rule: Rule, axis_name: Any, policy: Policy) -> None:
    check_compiled(rule, policy)
    whole = [s for s in stages(rule) if s.over == "unit" or s.by_part or s.needs_shape]
    if axis_name is not None and whole:
        raise ValueError(
            f"{rule!r} looks at whole rows or tensors, which an axis may have cut; "
            "leave axis_name out and shard the arrays under jit."
        )


def _empty_memory(rule: Rule, params: Any) -> tuple[State, ...]:
    """Return the memory before the first step, for parameters like these."""
    engine, leaves = Jax(), jax.tree.leaves(params)
    parts = stages(rule.bind(_names(params), list(map(jnp.shape, leaves))))
    if any(part.by_part for part in parts):
        # Only these rules look at more than how many there are; and what is as large
        # as the parameters lies where they do.
        leaves = [engine.prepare(jnp.zeros_like(x), "") for x in leaves]
    # A window of a thousand places takes JAX a second to stack, and NumPy none.
    made = (empty(engine if p.by_part else NumPy(), p, leaves) for p in parts)
    return jax.tree.map(jnp.asarray, tuple(made))


def _empty_info(shapes: Info) -> Info:
    """Return what there is to say before the first step."""
    empty = Info(0.0, jnp.inf, 1.0, True, False, 0.0, 0, True)
    return Info(
        *(
            jnp.full(getattr(shape, "shape", ()), value, jnp.asarray(value).dtype)
            for shape, value in zip(shapes, empty, strict=True)
        )
    )


def _names(tree: Any) -> list[str]:
    """Return the paths to the leaves, joined by dots."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    if "flax.nnx" in sys.modules:
        # It has the array of each parameter as the value of a variable.
        value = jax.tree_util.GetAttrKey("value")
        paths = [(p[:-1] if p[-1:] == (value,) else p, x) for p, x in paths]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def _run(
    engine: Jax,
    rule: Rule,
    grads: Any,
    params: Any,
    memory: Any,
    step: Any,
    policy: Policy,
) -> tuple[Any, Info, list[Any]]:
    """Take a tree of gradients through the rule."""
    names, (given, tree) = _names(grads), jax.tree.flatten(grads)
    weighs = rule.needs_weight
    if weighs and params is None:
        raise ValueError(
            f"{rule!r} compares gradients with parameters; call "
            "update(updates, state, params)."
        )
    leaves, info, memory = run(
        engine,
        [
            engine.prepare(x, name and f"[{name!r}]")
            for x, name in zip(given, names, strict=True)
        ],
        rule.bind(names, [x.shape for x in given]),
        memory,
        step=step,
        policy=policy,
        weights=_beside(grads, params) if weighs else (),
    )
    return jax.tree.unflatten(tree, leaves), info, memory


def _beside(grads: Any, params: Any) -> list[Array]:
    """Return the parameters that have a gradient: where that is None, others are."""
    # JAX leaves None out of the leaves, and the parameters would move up by one.
    found, tree = jax.tree.flatten(grads, is_leaf=lambda x: x is None)
    arranged: Any = tree
    pairs = zip(found, arranged.flatten_up_to(params), strict=True)
    both = [(g, p) for g, p in pairs if g is not None]
    check_alike([g for g, _ in both], [p for _, p in both])
    return [p for _, p in both]


def _settled(state: ClipState) -> ClipState:
    """Return the state with types that stay: jit compiles again for a weak one."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), state)
