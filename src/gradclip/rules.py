"""The rules: each decides the largest norm let through, and nothing else.

A rule is a frozen dataclass whose `update` is plain scalar text: NumPy, torch and JAX
run the same lines. It sees norms of any shape (one, or one per tensor or unit), keeps
its memory in a dictionary of arrays that the caller owns, and never touches gradients.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
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
    axis: int = 0

    scopes: ClassVar[tuple[Scope, ...]] = ("all", "tensor")
    stretches: ClassVar[bool] = False
    """Whether the scale may be above 1."""
    bends: ClassVar[bool] = False
    """Whether the limit of a cell grows with its norm, so that elements differ."""
    drops: ClassVar[bool] = False
    """Whether passing the limit drops the whole step."""
    by_place: ClassVar[bool] = False
    """Whether it matters which tensor a norm belongs to, also without a memory."""
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

    @property
    def grows(self) -> bool:
        """Whether the memory gets larger in time, which compiled code cannot do."""
        return False

    def bind(self, names: Sequence[str]) -> "Rule":
        """Return the rule for tensors of these names; most do not care."""
        return self

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


def _choose(rule: Rule, name: str, known: tuple[str, ...]) -> None:
    """Refuse a word that has no meaning here."""
    value = getattr(rule, name)
    if value not in known:
        words = ", ".join(map(repr, known))
        raise ValueError(
            f"{type(rule).__name__}({name}={value!r}): use one of {words}."
        )


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
        try:
            value = float(value)
        except TypeError:
            # Traced by jit, so that there is no number to check yet.
            return
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


def held(new: State, old: State, kept: Array, xp: Any) -> State:
    """Return the new memory, or the old one where the step was dropped."""
    return {
        name: xp.where(kept, x, _grown(old[name], x, xp)) for name, x in new.items()
    }


def _grown(old: Array, new: Array, xp: Any) -> Array:
    """Return an array with free places at its end, up to the size of another."""
    if old.shape == new.shape:
        return old
    return xp.concat([old, xp.full_like(new[old.shape[0] :], math.inf)])


def _remembered(norms: Array, count: Array, taken: Array, xp: Any) -> Array:
    """Return a ring of norms with new ones in the place of the oldest."""
    places = xp.cumulative_sum(xp.ones_like(norms), axis=0) - 1
    return xp.where(places == count % norms.shape[0], taken, norms)


def norm_of(norms: Array, xp: Any) -> Array:
    """Return the 2-norm of norms, of those that are finite, without overflow."""
    known = usable(norms, xp)
    largest = xp.max(xp.where(known, norms, 0.0))
    unit = xp.where(largest > 0, largest, 1.0)
    return unit * xp.sqrt(xp.sum(xp.where(known, norms / unit, 0.0) ** 2))


def beside(values: Sequence[Any], norm: Array, xp: Any) -> Array:
    """Return constants as an array on the device of the norms."""
    # A traced array has no device, and needs none.
    return xp.asarray(values, device=getattr(norm, "device", None))


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
            `"tensor"`, each `"unit"` (row of one axis) or each `"element"`.
        p: The order of the norm, above 0; `float("inf")` is the largest modulus.
        axis: The axis that counts the units: 0 in torch's layout, -1 in that of JAX
            and Keras. Vectors and scalars are one unit.

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
    axis: int = 0

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
        over: Only `"element"`; for a norm over more, see `Norm`.

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
        axis: As for `Norm`.

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
    axis: int = 0

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

    A unit $r$ is a row of the first axis, or of another: vectors and scalars are one
    unit. The paper leaves the final linear layer unclipped: hand over the other
    parameters.

    Args:
        ratio: $\lambda$, the largest gradient norm per parameter norm, above 0.
        over: `"unit"` (the paper) or `"tensor"`.
        eps: The norm that smaller parameters count for, above 0, so that weights that
            start at zero can still move.
        axis: As for `Norm`: 0 in torch's layout, -1 in that of JAX and Keras.

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
    axis: int = 0

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

    @property
    def grows(self) -> bool:
        """Without a window, every norm is kept."""
        return self.window is None

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
    Multiplying all gradients by a constant changes no scale.

    Args:
        z: How many standard deviations may pass, above 0.
        decay: How much of $\mu$ and $\sigma^2$ is kept at each step, in (0, 1].
        warmup: How many steps with a finite norm above 0 are watched first, at least 1;
            nothing but `max_limit` clips during them.
        max_limit: A fixed limit on top, above 0. (The paper's code uses 1.0.)
        over: `"all"` or each `"tensor"`.
        mode: The limit of a norm that stands out: `"adaptive"` is the one above,
            `"mean"` is $\mu$, and `"threshold"` is $\mu + z \sigma$ (which the paper's
            code calls percentile).

    Raises:
        ValueError: For a number outside its range, named in the message, or an unknown
            scope or mode.

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
    mode: Literal["adaptive", "mean", "threshold"] = "adaptive"

    def __post_init__(self) -> None:
        """Check every number."""
        super().__post_init__()
        _check(
            self, "z", ABOVE_ZERO, LARGEST, "the deviations let through are above 0."
        )
        _check(self, "decay", ABOVE_ZERO, 1.0, "the decay lies in (0, 1].")
        _check(self, "warmup", 1, sys.maxsize, "at least one step is watched first.")
        _choose(self, "mode", ("adaptive", "mean", "threshold"))
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

        limit = xp.where(warming, math.inf, self._limit(seen, mean, std))

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
        return limit, held(updated, state, known, xp)

    def _limit(self, seen: Measured, mean: Array, std: Array) -> Array:
        """Return the limit after the warm-up."""
        excess, spread = seen.norm - mean, self.z * std
        out = excess > spread
        if self.mode == "threshold":
            return mean + spread
        if self.mode == "mean":
            return seen.xp.where(out, mean, mean + spread)
        # mean + z² σ / z_t without a division by σ, which is 0 for constant norms.
        share = spread / seen.xp.where(out, excess, 1.0)
        return mean + seen.xp.where(out, spread * share, spread)


@dataclass(frozen=True)
class EMA(Rule):
    r"""Limit each norm to a multiple of its own moving average (AdaGC).

    $c_t = \rho \gamma_{t-1}$, and
    $\gamma_t = \beta \gamma_{t-1} + (1 - \beta) \min(\lVert g_t \rVert, c_t)$

    In the first `warmup` steps $\gamma$ is the smallest norm let through so far, and
    the gradients together are held to `warmup_limit`. Each tensor counts its own steps,
    and a norm that is 0, NaN or infinite is not one: a tensor without a gradient at
    first is not frozen by it.

    Args:
        ratio: $\rho$, how many times its average a norm may be, above 0.
        decay: $\beta$, how much of the average is kept at each step, in [0, 1].
        warmup: How many steps come before the average is used, at least 1.
        over: Each `"tensor"` (the paper) or `"all"`.
        warmup_limit: The largest global norm during the warm-up, in the unit of the
            gradient norm. (Ports of the method use 1.0.) None clips nothing then.

    Raises:
        ValueError: For a number outside its range, named in the message.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.EMA(warmup=2))
        >>> infos = [clipper.clip(np.array([n]))[1] for n in (3.0, 2.0, 50.0)]
        >>> [round(float(info.norm_after[0]), 3) for info in infos]
        [3.0, 2.0, 2.1]

    Reference:
        Wang et al.: AdaGC: improving training stability for large language model
        pretraining. arXiv 2502.11034, 2025.
    """

    ratio: float = 1.05
    decay: float = 0.98
    warmup: int = 100
    over: Scope = "tensor"
    warmup_limit: float | None = None

    def __post_init__(self) -> None:
        """Check every number."""
        super().__post_init__()
        _check(self, "ratio", ABOVE_ZERO, LARGEST, "the ratio is above 0.")
        _check(self, "decay", 0.0, 1.0, "the decay lies in [0, 1].")
        _check(self, "warmup", 1, sys.maxsize, "at least one step is watched first.")
        if self.warmup_limit is not None:
            _check_limit(self, "warmup_limit")

    @property
    def stateful(self) -> bool:
        """The moving average is remembered."""
        return True

    def init(self, norm: Array, xp: Any) -> State:
        """Return a memory of nothing."""
        return {"ema": xp.zeros_like(norm), "count": xp.zeros_like(norm)}

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit, and the average with the clipped norm taken in."""
        xp, n, ema, count = seen.xp, seen.norm, state["ema"], state["count"]
        warming = count < self.warmup
        limit = xp.where(warming, self._share(seen), self.ratio * ema)

        taken = xp.where(n > limit, limit, n)
        least = xp.where((count == 0) | (taken < ema), taken, ema)
        moved = ema + (1 - self.decay) * (taken - ema)
        updated = {"ema": xp.where(warming, least, moved), "count": count + 1}
        return limit, held(updated, state, usable(n, xp), xp)

    def _share(self, seen: Measured) -> Array:
        """Return what each norm may take of the global limit during the warm-up."""
        xp = seen.xp
        if self.warmup_limit is None:
            return xp.full_like(seen.norm, math.inf)
        total = norm_of(seen.norm, xp)
        return self.warmup_limit * (seen.norm / xp.where(total > 0, total, 1.0))


@dataclass(frozen=True)
class Deviation(Rule):
    r"""Limit each norm to the mean plus some deviations of the norms before it.

    $c_t = \mu + z \sigma$, with the mean and the sample deviation of the last $w$ norms

    `Skip(Deviation())` drops the steps that stand out, and their norms never widen the
    limit of the next ones.

    Args:
        z: How many standard deviations may pass, above 0.
        window: How many norms are remembered, at least 2; not those that are 0, NaN or
            infinite.
        warmup: How many norms are watched before any is clipped, from 2 to `window`.
        over: `"all"` or each `"tensor"`.

    Raises:
        ValueError: For a number outside its range, named in the message.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.Skip(gc.Deviation(z=6.0, window=4, warmup=2)))
        >>> norms = [1.0, 1.2, 90.0, 1.1]
        >>> [float(clipper.clip(np.array([n]))[1].norm_after) for n in norms]
        [1.0, 1.2, 0.0, 1.1]

    Reference:
        OLMo-core, `SkipStepOptimizer` (z = 6, 128 steps), github.com/allenai/OLMo-core.
    """

    z: float = 6.0
    window: int = 128
    warmup: int = 64
    over: Scope = "all"

    def __post_init__(self) -> None:
        """Check every number."""
        super().__post_init__()
        _check(
            self, "z", ABOVE_ZERO, LARGEST, "the deviations let through are above 0."
        )
        _check(self, "window", 2, sys.maxsize, "a deviation takes two norms or more.")
        _check(self, "warmup", 2, self.window, "it lies between 2 and the window.")

    @property
    def stateful(self) -> bool:
        """The past norms are remembered."""
        return True

    @property
    def kind(self) -> str:
        """The window decides what the memory looks like, too."""
        return f"Deviation(over={self.over!r}, window={self.window!r})"

    def init(self, norm: Array, xp: Any) -> State:
        """Return an empty memory; infinity marks a place that is still free."""
        places = xp.stack([norm] * self.window)
        return {
            "norms": xp.full_like(places, math.inf),
            "count": xp.zeros_like(norm),
        }

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit from the norms before, and the memory with the new ones."""
        xp, n, norms, count = seen.xp, seen.norm, state["norms"], state["count"]
        there, many = xp.isfinite(norms), xp.clip(count, None, float(self.window))
        # In units of the largest, so that the square of a norm of 1e200 is finite.
        largest = xp.max(xp.where(there, norms, 0.0), axis=0)
        unit = xp.where(largest > 0, largest, 1.0)
        parts = xp.where(there, norms / unit, 0.0)
        mean = xp.sum(parts, axis=0) / xp.clip(many, 1.0, None)
        squares = xp.sum(xp.where(there, parts - mean, 0.0) ** 2, axis=0)
        spread = self.z * xp.sqrt(squares / xp.clip(many - 1, 1.0, None))
        # Norms that are all alike must not stand out by the rounding of their mean.
        slack = 4 * float(xp.finfo(n.dtype).eps) * mean
        limit = xp.where(many < self.warmup, math.inf, unit * (mean + spread + slack))

        taken = xp.where(n > limit, limit, n)
        updated = {"norms": _remembered(norms, count, taken, xp), "count": count + 1}
        return limit, held(updated, state, usable(n, xp), xp)


@dataclass(frozen=True)
class Smooth(Rule):
    r"""Bend norms towards a limit that none of them reaches, instead of cutting them.

    $g \leftarrow g \cdot c / (c + \lVert g \rVert)$, or
    $g \leftarrow g \cdot c \tanh(\lVert g \rVert / c) / \lVert g \rVert$

    Every norm is made smaller, small ones by little: `info.limit` is the norm that this
    norm is brought to. There is no step at which it starts, so that the clip rate says
    nothing here.

    Args:
        limit: $c$, the bound of the norms afterwards, above 0 and finite: a number, a
            0-d array, or a function of the step that returns one.
        over: As for `Norm`.
        curve: `"ratio"` is the first of the equations, `"tanh"` the second.
        axis: As for `Norm`.

    Raises:
        ValueError: For a limit that is not above 0 and finite, an unknown scope or
            curve.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> for size in (0.1, 1.0, 1000.0):
        ...     _, info = gc.clip(np.array([size]), gc.Smooth(1.0))
        ...     print(round(float(info.norm_after), 4))
        0.0909
        0.5
        0.999

    Reference:
        Zhang, Jin, Fang, Wang: Improved analysis of clipping algorithms for non-convex
        optimization (whose code uses the ratio). arXiv 2010.02519, 2020.
    """

    limit: Limit
    over: Scope = "all"
    curve: Literal["ratio", "tanh"] = "ratio"
    axis: int = 0

    scopes = ("all", "tensor", "unit", "element")
    bends = True

    def __post_init__(self) -> None:
        """Check the limit, the scope and the curve."""
        super().__post_init__()
        _check_limit(self, "limit")
        if isinstance(self.limit, float | int):
            _check(self, "limit", ABOVE_ZERO, LARGEST, "the limit is finite here.")
        _choose(self, "curve", ("ratio", "tanh"))

    @property
    def stateful(self) -> bool:
        """A schedule needs the step, so that something has to count the steps."""
        return callable(self.limit)

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return what each norm is bent to."""
        xp, n, c = seen.xp, seen.norm, _beside(seen, self.limit)
        if self.curve == "tanh":
            return c * xp.tanh(n / c), state
        # c n / (c + n) without a sum or a product that could overflow.
        low, high = xp.where(n < c, n, c), xp.where(n < c, c, n)
        return low / (1 + low / high), state


@dataclass(frozen=True)
class Skip(Rule):
    r"""Drop the whole step when a rule's limit is passed, instead of rescaling it.

    $g \leftarrow g$ if $\lVert g \rVert \le c_t$, else no step

    The norm of a step that was dropped is kept out of the rule's memory, so that one
    spike does not hide the next. On NumPy and JAX the gradients become 0; with
    `gradclip.torch` parameters and optimizer state stay as they were, to the bit.

    Args:
        rule: The rule that gives the limit; with several norms one of them is enough.

    Raises:
        TypeError: If `rule` is not a rule.
        ValueError: For rules that are passed at every step (`Normalize`, `Smooth`), and
            for a chain: write `chain(a, Skip(b))`.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> grads, info = gc.clip(np.array([30.0, 40.0]), gc.Skip(gc.Norm(10.0)))
        >>> grads.tolist(), float(info.norm), float(info.scale), bool(info.kept)
        ([0.0, 0.0], 50.0, 0.0, False)

    Reference:
        OLMo-core, `SkipStepOptimizer`, github.com/allenai/OLMo-core.
    """

    rule: Rule

    drops = True

    def __post_init__(self) -> None:
        """Take over what the rule asks to be measured."""
        rule = self.rule
        if not isinstance(rule, Rule):
            raise TypeError(f"Skip({rule!r}): give a rule, as in Skip(Norm(10.0)).")
        if len(stages(rule)) > 1 or rule.stretches or rule.bends or rule.drops:
            raise ValueError(
                f"Skip({rule!r}): give one rule with a limit that most steps keep, as "
                "in chain(a, Skip(b))."
            )
        for name in ("over", "p", "axis", "needs_weight"):
            object.__setattr__(self, name, getattr(rule, name))

    @property
    def stateful(self) -> bool:
        """Whether the rule remembers anything."""
        return self.rule.stateful

    @property
    def kind(self) -> str:
        """The kind of the rule inside."""
        return f"Skip({self.rule.kind})"

    @property
    def grows(self) -> bool:
        """Whether the memory of the rule gets larger in time."""
        return self.rule.grows

    def init(self, norm: Array, xp: Any) -> State:
        """Return the memory of the rule."""
        return self.rule.init(norm, xp)

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit of the rule; a norm above it teaches it nothing."""
        limit, updated = self.rule.update(seen, state)
        passed = seen.xp.isfinite(seen.norm) & (seen.norm > limit)
        kept = ~seen.xp.any(passed)
        return limit, held(updated, state, kept, seen.xp)

    def __repr__(self) -> str:
        """Show the call that makes this rule."""
        return f"Skip({self.rule!r})"


@dataclass(frozen=True)
class Groups(Rule):
    """Other rules for other tensors, by name; made by `by_name`."""

    rules: tuple[tuple[str, Rule], ...]
    members: tuple[int, ...] = ()
    over: Scope = "tensor"

    by_place = True

    def __post_init__(self) -> None:
        """Refuse what cannot be decided from the norms of tensors."""
        for pattern, rule in self.rules:
            special = rule.stretches or rule.drops or len(stages(rule)) > 1
            if special or rule.over not in ("all", "tensor") or rule.p != 2:
                raise ValueError(
                    f"by_name({{{pattern!r}: {rule!r}}}): a group takes one rule over "
                    "'all' or each 'tensor' that limits 2-norms; hand such parameters "
                    "to a clipper of their own."
                )
        needs = any(rule.needs_weight for _, rule in self.rules)
        object.__setattr__(self, "needs_weight", needs)

    @property
    def stateful(self) -> bool:
        """Whether any of the rules remembers anything."""
        return any(rule.stateful for _, rule in self.rules)

    @property
    def grows(self) -> bool:
        """Whether the memory of any of the rules gets larger in time."""
        return any(rule.grows for _, rule in self.rules)

    @property
    def kind(self) -> str:
        """The patterns, and the kinds of their rules."""
        kinds = (f"{pattern!r}: {rule.kind}" for pattern, rule in self.rules)
        return f"by_name({{{', '.join(kinds)}}})"

    def bind(self, names: Sequence[str]) -> Rule:
        """Return the rule that knows which tensor is in which group."""
        return replace(self, members=tuple(map(self._group, names)))

    def _group(self, name: str) -> int:
        for i, (pattern, _) in enumerate(self.rules):
            if fnmatchcase(name, pattern):
                return i
        raise ValueError(
            f"by_name(): no pattern fits {name!r}; end with '*': None to leave the "
            "others as they are."
        )

    def init(self, norm: Array, xp: Any) -> State:
        """Return the memories of all rules, each with a place for every tensor."""
        return {
            f"{i}.{name}": x
            for i, (_, rule) in enumerate(self.rules)
            for name, x in rule.init(norm, xp).items()
        }

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit of each tensor: its own, or its share of the group's."""
        xp, updated = seen.xp, dict(state)
        limit = xp.full_like(seen.norm, math.inf)
        for i, (_, rule) in enumerate(self.rules):
            mine = beside([member == i for member in self.members], seen.norm, xp)
            norm = total = xp.where(mine, seen.norm, math.nan)
            if rule.over == "all":
                total = xp.where(mine, norm_of(norm, xp), math.nan)
            prefix = f"{i}."
            memory = {
                name.removeprefix(prefix): x
                for name, x in state.items()
                if name.startswith(prefix)
            }
            most, memory = rule.update(seen._replace(norm=total), memory)
            share = norm / xp.where(total > 0, total, 1.0)
            limit = xp.where(mine, xp.where(xp.isinf(most), most, most * share), limit)
            updated |= {prefix + name: x for name, x in memory.items()}
        return limit, updated

    def __repr__(self) -> str:
        """Show the call that makes this rule."""
        rules = (f"{pattern!r}: {rule!r}" for pattern, rule in self.rules)
        return f"by_name({{{', '.join(rules)}}})"


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

    @property
    def grows(self) -> bool:
        """Whether the memory of any of the rules gets larger in time."""
        return any(rule.grows for rule in self.rules)

    def bind(self, names: Sequence[str]) -> Rule:
        """Return the chain for tensors of these names."""
        return Chain(tuple(rule.bind(names) for rule in self.rules))

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


def by_name(rules: Mapping[str, Rule | None]) -> Rule:
    r"""Give each tensor the rule of the first pattern that fits its name.

    $g_k \leftarrow g_k \cdot \min(1, c_k / \lVert g_k \rVert)$ for each group $k$

    All norms are measured at once, whatever the number of groups, and `info` has one
    number per tensor: for a rule over `"all"` of its group, the tensor's share.

    Args:
        rules: From patterns, as for file names (`"embed.*"`), to rules over `"all"` of
            the group or each `"tensor"`; None leaves the group as it is. Names are
            those of torch parameters, or the keys of a dict of arrays joined by dots.

    Returns:
        One rule, to be used wherever a rule is.

    Raises:
        TypeError: If something handed over is not a rule.
        ValueError: For a rule that norms of tensors do not suffice for and, when
            gradients come, for a name that no pattern fits.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> rule = gc.by_name({"head": None, "*": gc.Norm(1.0)})
        >>> grads = {"body": np.array([3.0, 4.0]), "head": np.array([30.0])}
        >>> clipped, _ = gc.clip(grads, rule)
        >>> {name: g.round(4).tolist() for name, g in clipped.items()}
        {'body': [0.6, 0.8], 'head': [30.0]}
    """
    for pattern, rule in rules.items():
        if rule is not None and not isinstance(rule, Rule):
            raise TypeError(
                f"by_name({{{pattern!r}: {rule!r}}}): give a rule such as Norm(1.0), "
                "or None."
            )
    if not rules:
        raise ValueError("by_name({}): give at least one pattern, as in {'*': rule}.")
    free = Norm(math.inf)
    return Groups(tuple((name, rule or free) for name, rule in rules.items()))


def stages(rule: Rule) -> tuple[Rule, ...]:
    """Return the rules that a rule is made of, in the order they are applied."""
    return rule.rules if isinstance(rule, Chain) else (rule,)


AGC, AutoClip, ZClip, AdaGC = Relative, Percentile, ZScore, EMA
