"""The front for arrays: pure functions that return new gradients."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gradclip.arguments import (
    at_least,
    begin,
    check_alike,
    check_rule,
    without_memory,
)
from gradclip.backends import Backend, find_backend
from gradclip.decision import Info
from gradclip.host import host_array
from gradclip.memory import Memory
from gradclip.pipeline import run, with_nonfinite
from gradclip.policy import Policy, chosen
from gradclip.rules import Array, Rule, stages
from gradclip.trees import Grads, arranged, dotted, flatten, named_leaves, rebuild

if TYPE_CHECKING:
    from gradclip.history import History


def clip(
    grads: Grads,
    rule: Rule,
    *,
    params: Any = None,
    on_nonfinite: Policy | None = None,
    out: Any = None,
) -> tuple[Grads, Info]:
    r"""Clip gradients by a rule, and return new ones with what was done.

    $g \leftarrow g \cdot \min(1, \text{limit} / \lVert g \rVert)$

    Args:
        grads: An array of any shape, or a list, tuple or dict of arrays: of NumPy,
            PyTorch, JAX, or another library that follows the array API. Integer arrays
            come back as floats.
        rule: A rule without memory, such as `Norm(1.0)`.
        params: The parameters, arranged like `grads`; only `Relative` asks for them.
        on_nonfinite: What NaN or infinity leads to: `"skip"` returns zeros, `"zero"`
            clears those elements and clips the rest, `"raise"` raises, `"ignore"`
            returns them as they came. Where none is given, it is "skip", and "ignore"
            under a limit of infinity, which only records.
        out: NumPy arrays arranged like `grads` that take the result; may be `grads`.

    Returns:
        The clipped gradients, arranged like `grads`, and an `Info`.

    Raises:
        TypeError: For a rule with memory, for what is not an array, for a mixture of
            libraries, and for `out` with other arrays than NumPy's.
        ValueError: For an empty list, an unknown policy, and for parameters or places
            in `out` that do not fit, are read-only or share memory.
        NonFiniteError: For NaN or infinity, where the policy is `"raise"`.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> grads, info = gc.clip(np.array([1.0, 2, 3, 4, 5]), gc.Norm(3.0))
        >>> grads.round(4).tolist()
        [0.4045, 0.809, 1.2136, 1.6181, 2.0226]
        >>> round(float(info.norm), 4), round(float(info.scale), 5), info.norm_after
        (7.4162, 0.40452, np.float64(3.0))

    Reference:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural
        networks. arXiv 1211.5063, 2013.
    """
    without_memory(
        check_rule(rule),
        "clip()",
        "clipper = Clipper(rule), then grads, info = clipper.clip(grads)",
    )
    return _clip(grads, Memory(rule), params, chosen(on_nonfinite, rule), out)


class Clipper:
    r"""Hold the memory of a rule, and clip with it step after step.

    $c_t, s_{t+1} = \text{rule}(\lVert g_t \rVert, s_t)$

    Args:
        rule: Any rule.
        on_nonfinite: As for `clip`; no norm that is not finite enters the memory.
        max_consecutive_skips: At which number of skipped steps in a row an error is
            raised, at least 1.
        history: Takes in every step, as `History("run.jsonl")` does.

    Raises:
        TypeError: If `rule` is not a rule, or `history` no history.
        ValueError: For an unknown policy, and for fewer than one skip in a row.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.ZScore(warmup=3))
        >>> norms = [1.0, 1.2, 0.9, 1.1, 40.0]
        >>> infos = [clipper.clip(np.array([n]))[1] for n in norms]
        >>> [bool(info.clipped) for info in infos]
        [False, False, False, False, True]
    """

    def __init__(
        self,
        rule: Rule,
        on_nonfinite: Policy | None = None,
        max_consecutive_skips: int = 100,
        history: "History | None" = None,
    ) -> None:
        """Check the rule and the policy; the memory is made at the first step."""
        check_rule(rule)
        self.on_nonfinite = chosen(on_nonfinite, rule)
        at_least(1, max_consecutive_skips=max_consecutive_skips)
        self.max_consecutive_skips = max_consecutive_skips
        self.info: Info | None = None
        self._memory = Memory(rule)
        self.history = history
        begin(history, rule)

    @property
    def rule(self) -> Rule:
        """The rule, whose memory this is; for another one make another clipper."""
        return self._memory.rule

    def clip(
        self, grads: Grads, *, params: Any = None, out: Any = None
    ) -> tuple[Grads, Info]:
        """Clip the gradients of one step, and take their norm into the memory.

        Args:
            grads: As for the function `clip`, arranged alike at every step.
            params: As for the function `clip`.
            out: As for the function `clip`.

        Returns:
            The clipped gradients and an `Info`, which is also kept as `info`.

        Raises:
            ValueError: If the number of gradients is not that of the memory.
            NonFiniteError: By policy, or after too many skipped steps in a row.
        """
        clipped, info = _clip(
            grads, self._memory, params, self.on_nonfinite, out, counts=True
        )
        if self.history is not None:
            # Before it is counted, so that the first step is number 0.
            self.history.record(self._memory.step, info)
        missed = int(not bool(info.kept))
        self._memory.count(missed)
        # Before the check, so that who catches its error finds the report.
        self.info = info._replace(skipped=self._memory.skipped)
        self._memory.check(
            self._memory.in_a_row, self.max_consecutive_skips, partial(_bad, grads)
        )
        return clipped, self.info

    def state_dict(self) -> dict[str, Array]:
        """Return the memory as NumPy arrays, for any kind of checkpoint."""
        return self._memory.state_dict(lambda x: host_array(x).copy())

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Go on from a saved memory, exactly.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If it was saved by another rule; nothing is changed then.
        """
        self._memory.load_state_dict(state, lambda x: host_array(x).copy())


def _clip(
    grads: Grads,
    memory: Memory,
    params: Any,
    policy: Policy,
    out: Any,
    counts: bool = False,
) -> tuple[Grads, Info]:
    named = named_leaves(grads)
    engine = find_backend(named)
    given = [engine.prepare(x, where) for where, x in named]
    if memory.rule.stateful and any(stage.by_part for stage in stages(memory.rule)):
        check_dense(given, named)
    names, shapes = [dotted(where) for where, _ in named], [x.shape for x in given]
    rule = memory.rule.bind(names, shapes)
    engine = engine.deciding(rule)
    memory.meet(names)
    weights = _weights(rule, grads, named, params, engine)
    if out is not None:
        engine = engine.writing_to(given, [x for _, x in flatten(arranged(out, grads))])
    # Rules count with infinity and NaN on purpose, and NumPy would warn of it.
    with np.errstate(all="ignore"):
        leaves, info, states = run(
            engine,
            given,
            rule,
            memory.states,
            step=memory.step,
            policy=policy,
            weights=weights,
            name_of=lambda i: f"gradients{named[i][0]}",
        )
    # Only now: a step that was refused has left the memory as it was.
    memory.states = engine.lasting(states, info if counts else None)
    pairs = zip(engine.deliver(leaves, given), named, strict=True)
    results = [engine.shaped_like(result, x) for result, (_, x) in pairs]
    return rebuild(grads, iter(results)), Info(*map(engine.plain, info))


def _bad(grads: Grads) -> list[str]:
    """Return which gradients have NaN or infinity in them."""
    named = named_leaves(grads)
    engine = find_backend(named)
    leaves = [engine.prepare(x, where) for where, x in named]
    return with_nonfinite(engine, leaves, lambda i: f"gradients{named[i][0]}")


def dense(engine: Backend, named: Sequence[tuple[str, Any]]) -> list[Array]:
    """Return arrays ready to be clipped, where each element has to keep its place."""
    leaves = [engine.prepare(x, where) for where, x in named]
    check_dense(leaves, named)
    return leaves


def check_dense(leaves: Sequence[Array], named: Sequence[tuple[str, Any]]) -> None:
    """Refuse sparse tensors, of which a clip needs no more than the values."""
    for x, (where, given) in zip(leaves, named, strict=True):
        if tuple(x.shape) != tuple(given.shape):
            raise TypeError(
                f"gradients{where} of shape {tuple(given.shape)} is sparse, and here "
                "each element needs its place; hand over x.to_dense()."
            )


def _weights(
    rule: Rule,
    grads: Grads,
    named: Sequence[tuple[str, Any]],
    params: Any,
    engine: Backend,
) -> list[Array]:
    if not rule.needs_weight:
        return []
    if params is None:
        raise ValueError(
            f"{rule!r} compares gradients with parameters; add params=… arranged like "
            "the gradients."
        )
    weights = list(flatten(arranged(params, grads)))
    check_alike([x for _, x in named], [x for _, x in weights])
    # Those of another library are refused, as among the gradients.
    find_backend([*named, *((f" or parameters{where}", x) for where, x in weights)])
    return [engine.prepare(x, where) for where, x in weights]
