"""The rules: each decides the largest norm let through, and nothing else.

A rule is a frozen dataclass whose `update` is plain scalar text: NumPy, torch and JAX
run the same lines. It sees norms of any shape (one, or one per tensor or unit), keeps
its memory in a dictionary of arrays that the caller owns, and never touches gradients.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

Array: TypeAlias = Any
State: TypeAlias = dict[str, Array]
Scope: TypeAlias = Literal["all", "tensor", "unit", "element"]
Limit: TypeAlias = float | Array | Callable[[Any], Any]


ABOVE_ZERO = math.ulp(0.0)
LARGEST = sys.float_info.max


class Measured(NamedTuple):
    """What a rule gets to see at one step."""

    norm: Array
    """Norms before clipping, one per cell of the scope."""
    weight: Array | None
    """Norms of the parameters, cell for cell; only where `needs_weight`."""
    step: Any
    """How many steps came before."""
    xp: Any
    """The array namespace that the norms belong to."""


class Rule:
    """What all rules share: a scope, an empty memory and the checks on both."""

    over: Scope = "all"
    p: float = 2.0

    scopes: ClassVar[tuple[Scope, ...]] = ("all", "tensor")
    stretches: ClassVar[bool] = False
    needs_weight: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a scope for which the method has no meaning."""
        if self.over not in self.scopes:
            known = ", ".join(repr(scope) for scope in self.scopes)
            raise ValueError(
                f"{type(self).__name__}(over={self.over!r}): the norm is taken over "
                f"one of {known}."
            )

    @property
    def stateful(self) -> bool:
        """Whether the rule remembers anything from one step to the next."""
        return False

    @property
    def kind(self) -> str:
        """What a saved memory has to match: the method and its scope."""
        return f"{type(self).__name__}(over={self.over!r})"

    def init(self, norm: Array, xp: Any) -> State:
        """Return the memory before the first step, for norms shaped like `norm`."""
        return {}

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit for the norms seen, and the memory for the next step."""
        raise NotImplementedError


def _check(rule: Rule, name: str, low: float, high: float, remedy: str) -> None:
    """Refuse what is not a number from `low` to `high`; an integer for integers."""
    value = getattr(rule, name)
    kinds = int if isinstance(low, int) else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ValueError(f"{type(rule).__name__}({name}={value!r}): {remedy}")


def _check_limit(rule: Rule, name: str) -> None:
    """Refuse a limit that is negative, zero or NaN; infinity only records."""
    value = getattr(rule, name)
    call = f"{type(rule).__name__}({name}={value!r})"
    if callable(value):
        return
    if hasattr(value, "shape"):
        if tuple(value.shape) != ():
            raise ValueError(
                f"{call}: the limit is one number; this array has shape "
                f"{tuple(value.shape)}."
            )
        # Reading a number off an accelerator would make the host wait for it.
        if "cpu" not in str(getattr(value, "device", "cpu")).lower():
            return
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{call}: the limit is a number, a 0-d array, or a function of the step."
        )
    if not value > 0:
        raise ValueError(
            f"{call}: the limit is above 0; use float('inf') to record norms without "
            "clipping."
        )


def usable(norm: Array, xp: Any) -> Array:
    """Return where a norm says something: one that is 0 or not finite does not.

    A memory of zeros (an expert without tokens so far) would freeze what comes next.
    """
    return xp.isfinite(norm) & (norm > 0)


def _beside(seen: Measured, limit: Limit) -> Array:
    """Return the limit at this step in the shape of the norms; ask a schedule here."""
    value = limit(seen.step) if callable(limit) else limit
    return seen.xp.zeros_like(seen.norm) + value


@dataclass(frozen=True)
class Norm(Rule):
    r"""Rescale so that the norm is at most a limit that you give.

    $g \leftarrow g \cdot \min(1, c / \lVert g \rVert_p)$

    Args:
        limit: The largest norm let through, in the unit of the gradient norm: a
            number, a 0-d array, or a function of the step that returns one.
            `float("inf")` records norms and never clips.
        over: What one norm is taken over: `"all"` gradients together, each
            `"tensor"`, each `"unit"` (row of the first axis) or each `"element"`.
        p: The order of the norm, above 0; `float("inf")` is the largest modulus.

    Raises:
        ValueError: For a limit or `p` that is not above 0, or an unknown scope.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> grads, info = gc.clip(np.array([3.0, 4.0]), gc.Norm(1.0))
        >>> grads.round(4).tolist(), float(info.norm)
        ([0.6, 0.8], 5.0)

    Reference:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural
        networks. arXiv 1211.5063, 2013.
    """

    limit: Limit
    over: Scope = "all"
    p: float = 2.0

    scopes = ("all", "tensor", "unit", "element")

    def __post_init__(self) -> None:
        """Check the scope, the limit and the order of the norm."""
        super().__post_init__()
        _check_limit(self, "limit")
        _check(self, "p", ABOVE_ZERO, math.inf, "the order of a norm is above 0.")

    @property
    def stateful(self) -> bool:
        """A schedule needs the step, so that something has to count the steps."""
        return callable(self.limit)

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit as it was given."""
        return _beside(seen, self.limit), state


@dataclass(frozen=True)
class Value(Rule):
    r"""Clamp each element to a limit: a complex one by its modulus, phase kept.

    $g_i \leftarrow \max(-c, \min(c, g_i))$

    Args:
        limit: The largest modulus let through: a number, a 0-d array, or a function
            of the step that returns one.

    Raises:
        ValueError: For a limit that is not above 0.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> grads, info = gc.clip(np.array([-3.0, 0.5]), gc.Value(1.0))
        >>> grads.tolist(), float(info.norm), float(info.scale)
        ([-1.0, 0.5], 3.0, 0.3333333333333333)

    Reference:
        Mikolov: Statistical language models based on neural networks. PhD thesis,
        Brno University of Technology, 2012.
    """

    limit: Limit
    over: Scope = "element"

    scopes = ("element",)
    p = math.inf

    def __post_init__(self) -> None:
        """Check the limit."""
        super().__post_init__()
        _check_limit(self, "limit")

    @property
    def stateful(self) -> bool:
        """A schedule needs the step, so that something has to count the steps."""
        return callable(self.limit)

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit as it was given."""
        return _beside(seen, self.limit), state


@dataclass(frozen=True)
class Normalize(Rule):
    r"""Rescale to a length, up as well as down; a zero gradient stays zero.

    $g \leftarrow g \cdot \ell / (\lVert g \rVert + \varepsilon)$

    Args:
        length: The norm afterwards, above 0 and finite.
        over: As for `Norm`; over each `"element"` it leaves the sign.
        eps: What the norm is padded with, at least 0. Small norms stay small.

    Raises:
        ValueError: For a length that is not above 0, or an `eps` below 0.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> grads, info = gc.clip(np.array([0.3, 0.4]), gc.Normalize())
        >>> grads.round(4).tolist(), float(info.scale)
        ([0.6, 0.8], 2.0)

    Reference:
        Cutkosky, Mehta: Momentum improves normalized SGD. arXiv 2002.03305, 2020.
    """

    length: float = 1.0
    over: Scope = "all"
    eps: float = 0.0

    scopes = ("all", "tensor", "unit", "element")
    stretches = True

    def __post_init__(self) -> None:
        """Check the length and the padding."""
        super().__post_init__()
        _check(self, "length", ABOVE_ZERO, LARGEST, "the length is above 0 and finite.")
        _check(self, "eps", 0.0, LARGEST, "eps is 0 or above, and finite.")

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the length that the norm is brought to."""
        norm = seen.xp.where(seen.norm > 0, seen.norm, 1.0)
        return self.length * (norm / (norm + self.eps)), state


@dataclass(frozen=True)
class Relative(Rule):
    r"""Keep each gradient below a fraction of the parameter that it belongs to (AGC).

    $g_r \leftarrow g_r \cdot \min(1, \lambda \max(\lVert w_r \rVert, \varepsilon)
    / \lVert g_r \rVert)$

    A unit $r$ is a row of the first axis; vectors and scalars are one unit. The paper
    leaves the final linear layer unclipped: hand over the other parameters.

    Args:
        ratio: $\lambda$, the largest gradient norm per parameter norm, above 0.
        over: `"unit"` (the paper) or `"tensor"`.
        eps: The norm that smaller parameters count for, above 0, so that weights that
            start at zero can still move.

    Raises:
        ValueError: For a ratio or `eps` that is not above 0, or another scope.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> weight = np.array([[3.0, 4.0], [0.0, 0.0]])
        >>> grads, _ = gc.clip(np.ones((2, 2)), gc.Relative(0.1), params=weight)
        >>> grads.round(5).tolist()
        [[0.35355, 0.35355], [7e-05, 7e-05]]

    Reference:
        Brock, De, Smith, Simonyan: High-performance large-scale image recognition
        without normalization. arXiv 2102.06171, 2021.
    """

    ratio: float = 0.01
    over: Scope = "unit"
    eps: float = 1e-3

    scopes = ("unit", "tensor")
    needs_weight = True

    def __post_init__(self) -> None:
        """Check the ratio and the floor."""
        super().__post_init__()
        _check(self, "ratio", ABOVE_ZERO, math.inf, "the ratio is above 0.")
        _check(self, "eps", ABOVE_ZERO, LARGEST, "eps is above 0, and finite.")

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the fraction of the parameter norms."""
        return self.ratio * seen.xp.clip(seen.weight, self.eps, None), state


@dataclass(frozen=True)
class Percentile(Rule):
    r"""Limit each norm to a percentile of those so far, its own included (AutoClip).

    $c_t = \operatorname{percentile}_q(\lVert g_{t-w+1} \rVert, …, \lVert g_t \rVert)$

    Args:
        q: The percentile, from 0 to 100, interpolated as `numpy.percentile` does.
        window: How many norms are remembered, at least 1; not those that are 0, NaN or
            infinite. None remembers all
            of them, as the paper does, for a sort that grows with the run.
        over: `"all"` or each `"tensor"`.

    Raises:
        ValueError: For a percentile outside 0…100 or a window below 1.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.Percentile(q=50))
        >>> [float(clipper.clip(np.array([n]))[1].limit) for n in (1.0, 3.0, 100.0)]
        [1.0, 2.0, 3.0]

    Reference:
        Seetharaman, Wichern, Pardo, Le Roux: AutoClip: adaptive gradient clipping for
        source separation networks. arXiv 2007.14469, 2020.
    """

    q: float = 10.0
    window: int | None = 1000
    over: Scope = "all"

    def __post_init__(self) -> None:
        """Check the percentile and the window."""
        super().__post_init__()
        _check(self, "q", 0.0, 100.0, "a percentile lies between 0 and 100.")
        if self.window is not None:
            _check(self, "window", 1, sys.maxsize, "at least one norm is remembered.")

    @property
    def stateful(self) -> bool:
        """The past norms are remembered."""
        return True

    @property
    def kind(self) -> str:
        """The window decides what the memory looks like, too."""
        return f"Percentile(over={self.over!r}, window={self.window!r})"

    def init(self, norm: Array, xp: Any) -> State:
        """Return an empty memory; infinity marks a place that is still free."""
        places = xp.stack([norm] * (256 if self.window is None else self.window))
        return {
            "norms": xp.full_like(places, math.inf),
            "count": xp.zeros_like(norm),
        }

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the percentile of the norms in memory with the new ones among them."""
        xp, known = seen.xp, usable(seen.norm, seen.xp)
        norms, count = state["norms"], state["count"]
        if self.window is None and seen.step >= norms.shape[0]:
            norms = xp.concat([norms, xp.full_like(norms, math.inf)])
        size = norms.shape[0]
        places = xp.cumulative_sum(xp.ones_like(norms), axis=0) - 1
        norms = xp.where((places == count % size) & known, seen.norm, norms)
        count = xp.where(known, count + 1, count)

        ordered = xp.sort(norms, axis=0)
        last = xp.clip(count, 1.0, float(size)) - 1
        position = last * (self.q / 100)
        low = xp.floor(position)

        def ranked(rank: Array) -> Array:
            return xp.sum(xp.where(places == rank, ordered, 0.0), axis=0)

        below, above = ranked(low), ranked(xp.where(low < last, low + 1, last))
        # Interpolating from infinity (nothing seen yet) would make NaN.
        step = xp.where(xp.isfinite(above), above, 0.0) - xp.where(
            xp.isfinite(below), below, 0.0
        )
        return below + step * (position - low), {"norms": norms, "count": count}


@dataclass(frozen=True)
class ZScore(Rule):
    r"""Pull a norm that stands out from its moving average back towards it (ZClip).

    With $z_t = (\lVert g_t \rVert - \mu) / \sigma$, a norm with $z_t > z$ gets the
    limit $\mu + z^2 \sigma / z_t$; the others pass. $\mu$ and $\sigma^2$ start from the
    first `warmup` norms and then follow the norms that were let through.

    Args:
        z: How many standard deviations may pass, above 0.
        decay: How much of $\mu$ and $\sigma^2$ is kept at each step, in (0, 1].
        warmup: How many steps with a finite norm above 0 are watched first, at least 1;
            nothing but `max_limit` clips during them.
        max_limit: A fixed limit on top, above 0. (The paper's code uses 1.0.)
        over: `"all"` or each `"tensor"`.

    Raises:
        ValueError: For a number outside its range, named in the message.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.ZScore(z=2.0, warmup=2))
        >>> norms = [1.0, 3.0, 2.5, 50.0]
        >>> [round(float(clipper.clip(np.array([n]))[1].norm_after), 3) for n in norms]
        [1.0, 3.0, 2.5, 2.096]

    Reference:
        Kumar, Owen, Roy Chowdhury, Güra: ZClip: adaptive spike mitigation for LLM
        pre-training. arXiv 2504.02507, 2025.
    """

    z: float = 2.5
    decay: float = 0.97
    warmup: int = 25
    max_limit: float | None = None
    over: Scope = "all"

    def __post_init__(self) -> None:
        """Check every number."""
        super().__post_init__()
        _check(
            self, "z", ABOVE_ZERO, LARGEST, "the deviations let through are above 0."
        )
        _check(self, "decay", ABOVE_ZERO, 1.0, "the decay lies in (0, 1].")
        _check(self, "warmup", 1, sys.maxsize, "at least one step is watched first.")
        if self.max_limit is not None:
            _check_limit(self, "max_limit")

    @property
    def stateful(self) -> bool:
        """The moving mean and variance are remembered."""
        return True

    def init(self, norm: Array, xp: Any) -> State:
        """Return a memory of nothing."""
        return {name: xp.zeros_like(norm) for name in ("mean", "std", "count")}

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit, and the statistics with the clipped norm taken in."""
        xp, n = seen.xp, seen.norm
        mean, std, count = state["mean"], state["std"], state["count"]
        known, warming = usable(n, xp), count < self.warmup

        excess, spread = n - mean, self.z * std
        # mean + z² σ / z_t without a division by σ, which is 0 for constant norms.
        share = spread / xp.where(excess > spread, excess, 1.0)
        limit = mean + xp.where(excess > spread, spread * share, spread)
        limit = xp.where(warming, math.inf, limit)

        taken = xp.where(n > limit, limit, n)
        new = xp.where(warming, 1 / (count + 1), 1 - self.decay)
        new_mean = mean + new * (taken - mean)
        after, before = xp.abs(taken - new_mean), xp.abs(taken - mean)
        # The sample variance while it is collected, the paper's moving one after that;
        # kept as its root, since the square of a norm of 1e200 is infinite.
        deviation = xp.sqrt(after) * xp.sqrt(xp.where(warming, before, after))
        updated = {
            "mean": new_mean,
            "std": xp.hypot(xp.sqrt(1 - new) * std, xp.sqrt(new) * deviation),
            "count": count + 1,
        }
        if self.max_limit is not None:
            limit = xp.clip(limit, None, self.max_limit)
        return limit, {
            name: xp.where(known, updated[name], state[name]) for name in state
        }


@dataclass(frozen=True)
class Chain(Rule):
    """Several rules, one after the other; made by `chain`."""

    rules: tuple[Rule, ...]

    @property
    def stateful(self) -> bool:
        """Whether any of the rules remembers anything."""
        return any(rule.stateful for rule in self.rules)

    @property
    def kind(self) -> str:
        """The kinds of the rules, in order."""
        return f"chain({', '.join(rule.kind for rule in self.rules)})"

    def __repr__(self) -> str:
        """Show the call that makes this chain."""
        return f"chain({', '.join(map(repr, self.rules))})"


def chain(*rules: Rule) -> Rule:
    r"""Apply one rule after the other, each measuring what the last one left.

    $g \leftarrow r_n(… r_2(r_1(g)))$

    Args:
        rules: One rule or more; chains among them are laid out flat.

    Returns:
        One rule, to be used wherever a rule is.

    Raises:
        TypeError: If something handed over is not a rule.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> rule = gc.chain(gc.Value(3.0), gc.Normalize())
        >>> gc.clip(np.array([30.0, 4.0]), rule)[0].round(4).tolist()
        [0.7071, 0.7071]
    """
    if not rules:
        raise TypeError("chain(): give at least one rule, as in chain(Norm(1.0)).")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(
                f"chain(): {rule!r} is not a rule; use one such as Norm(1.0)."
            )
    flat = [part for rule in rules for part in stages(rule)]
    return flat[0] if len(flat) == 1 else Chain(rules=tuple(flat))


def stages(rule: Rule) -> tuple[Rule, ...]:
    """Return the rules that a rule is made of, in the order they are applied."""
    return rule.rules if isinstance(rule, Chain) else (rule,)


AGC, AutoClip, ZClip = Relative, Percentile, ZScore
