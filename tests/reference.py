"""Slow float64 twins of the rules, transcribed from the papers; nothing is shared.

A twin takes the gradients of one step as a list of float64 arrays (and the parameters,
where the method asks for them) and returns the clipped ones. NaN and infinity follow
the default policy: the step is skipped, and what was not finite is not remembered.
One with a memory also tells its last `limits` and its `state()`, cell by cell.
"""

import copy
import math

import numpy as np


def norm(x, p=2.0):
    moduli = np.abs(np.concatenate([np.ravel(part) for part in x]))
    if moduli.size == 0:
        return 0.0
    if p == math.inf:
        return float(np.max(moduli))
    if not np.all(np.isfinite(moduli)):
        return float(np.sum(moduli))
    largest = float(np.max(moduli))
    if largest == 0:
        return 0.0
    return largest * math.fsum((moduli / largest) ** p) ** (1 / p)


def cells(grads, over, axis=0):
    """Split gradients into the arrays that share a norm, and say how to join them."""
    if over == "unit" and axis != 0:
        turned = [np.moveaxis(g, axis, 0) if g.ndim > 1 else g for g in grads]
        parts, join = cells(turned, over)
        return parts, lambda done: [
            np.moveaxis(g, 0, axis) if g.ndim > 1 else g for g in join(done)
        ]
    if over == "all":
        return [list(grads)], lambda parts: parts[0]
    if over == "tensor":
        return [[g] for g in grads], lambda parts: [part[0] for part in parts]
    if over == "unit":
        split = [list(g) if g.ndim > 1 else [g] for g in grads]
    else:
        split = [list(g.ravel()) for g in grads]

    def join(parts):
        flat, joined = iter(parts), []
        for g, rows in zip(grads, split, strict=True):
            taken = [next(flat)[0] for _ in rows]
            joined.append(np.array(taken).reshape(g.shape))
        return joined

    return [[np.asarray(row)] for rows in split for row in rows], join


def rescale(part, limit, p=2.0):
    """Algorithm 1 of Pascanu et al.: if the norm is above the limit, divide it away."""
    n = norm(part, p)
    return [g * (limit / n) for g in part] if n > limit else part


class Norm:
    def __init__(self, limit, over="all", p=2.0, axis=0):
        self.limit, self.over, self.p, self.axis = limit, over, p, axis

    def step(self, grads, params=None):
        parts, join = cells(grads, self.over, self.axis)
        return join([rescale(part, self.limit, self.p) for part in parts])


class Value:
    def __init__(self, limit):
        self.limit = limit

    def step(self, grads, params=None):
        return [
            np.where(np.abs(g) > self.limit, g / np.maximum(np.abs(g), 1e-300), 0)
            * self.limit
            + np.where(np.abs(g) > self.limit, 0, g)
            for g in grads
        ]


class Normalize:
    def __init__(self, length=1.0, over="all", eps=0.0):
        self.length, self.over, self.eps = length, over, eps

    def step(self, grads, params=None):
        parts, join = cells(grads, self.over)
        return join([self._one(part) for part in parts])

    def _one(self, part):
        n = norm(part)
        return part if n == 0 else [g * self.length / (n + self.eps) for g in part]


class Relative:
    def __init__(self, ratio=0.01, over="unit", eps=1e-3, axis=0):
        self.ratio, self.over, self.eps, self.axis = ratio, over, eps, axis

    def step(self, grads, params):
        parts, join = cells(grads, self.over, self.axis)
        weights, _ = cells(params, self.over, self.axis)
        return join(
            [
                rescale(part, self.ratio * max(norm(weight), self.eps))
                for part, weight in zip(parts, weights, strict=True)
            ]
        )


class Remembering:
    """A rule with a memory for each cell: 0 never enters it, nor a dropped step."""

    over = "all"

    def __init__(self):
        self.memories = {}

    def step(self, grads, params=None):
        parts, join = cells(grads, self.over)
        norms = [norm(part) for part in parts]
        if not all(map(math.isfinite, norms)):
            return grads
        clipped, self.limits = [], []
        for i, (part, n) in enumerate(zip(parts, norms, strict=True)):
            limit = math.inf
            if n > 0:
                memory = self.memories.setdefault(i, {"count": 0})
                part, limit = self.one(part, n, memory)
                memory["count"] += 1
            self.limits.append(limit)
            clipped.append(part)
        return join(clipped)

    def one(self, part, n, memory):
        if hasattr(self, "length"):
            length = self.length(n, memory)
            return [g / n * length for g in part], length
        limit = self.limit(n, memory)
        return rescale(part, limit), limit

    def state(self):
        """Return what is remembered under the names of the rule, a list per name."""
        cells = [self.remembered(self.memories[i]) for i in sorted(self.memories)]
        return {name: [cell[name] for cell in cells] for name in next(iter(cells), {})}

    def remembered(self, memory):
        return memory


class Percentile(Remembering):
    def __init__(self, q=10.0, window=1000, over="all"):
        super().__init__()
        self.q, self.window, self.over = q, window, over

    def limit(self, n, memory):
        past = memory.setdefault("norms", [])
        past.append(n)
        if self.window is not None:
            del past[: -self.window]
        return float(np.percentile(past, self.q))


class ZScore(Remembering):
    def __init__(
        self,
        z=2.5,
        decay=0.97,
        warmup=25,
        max_limit=None,
        over="all",
        mode="adaptive",
    ):
        super().__init__()
        self.z, self.decay, self.warmup = z, decay, warmup
        self.max_limit, self.over, self.mode = max_limit, over, mode

    def limit(self, n, memory):
        first = memory.setdefault("first", [])
        most = math.inf if self.max_limit is None else self.max_limit
        if len(first) < self.warmup:
            first.append(n)
            memory["mean"], memory["var"] = np.mean(first), np.var(first)
            return most
        mean, std = memory["mean"], math.sqrt(memory["var"])
        z = (n - mean) / std if std > 0 else math.inf * (n > mean)
        limit = mean + self.z * std
        if z > self.z and self.mode == "adaptive":
            limit = mean + self.z**2 * std / z
        if z > self.z and self.mode == "mean":
            limit = mean
        taken = min(n, limit)
        memory["mean"] = self.decay * mean + (1 - self.decay) * taken
        memory["var"] = (
            self.decay * std**2 + (1 - self.decay) * (taken - memory["mean"]) ** 2
        )
        return min(limit, most)

    def remembered(self, memory):
        std = math.sqrt(memory["var"])
        return {"mean": memory["mean"], "std": std, "count": memory["count"]}


class EMA(Remembering):
    def __init__(
        self, ratio=1.05, decay=0.98, warmup=100, over="tensor", warmup_limit=None
    ):
        super().__init__()
        self.ratio, self.decay, self.warmup = ratio, decay, warmup
        self.over, self.warmup_limit = over, warmup_limit

    def step(self, grads, params=None):
        norms = [norm(part) for part in cells(grads, self.over)[0]]
        total = norm([np.array(norms)])
        most = math.inf if self.warmup_limit is None else self.warmup_limit
        self.factor = most / total if total > 0 else math.inf
        return super().step(grads)

    def limit(self, n, memory):
        if memory["count"] < self.warmup:
            limit = n * self.factor
            memory["gamma"] = min(memory.get("gamma", math.inf), n, limit)
            return limit
        limit = self.ratio * memory["gamma"]
        memory["gamma"] *= self.decay
        memory["gamma"] += (1 - self.decay) * min(n, limit)
        return limit

    def remembered(self, memory):
        return {"ema": memory["gamma"], "count": memory["count"]}


class Deviation(Remembering):
    def __init__(self, z=6.0, window=128, warmup=64, over="all"):
        super().__init__()
        self.z, self.window, self.warmup, self.over = z, window, warmup, over

    def limit(self, n, memory):
        past = memory.setdefault("norms", [])
        limit = math.inf
        if len(past) >= self.warmup:
            limit = float(np.mean(past) + self.z * np.std(past, ddof=1))
        past.append(min(n, limit))
        del past[: -self.window]
        return limit


class Smooth:
    def __init__(self, limit, over="all", curve="ratio"):
        self.limit, self.over, self.curve = limit, over, curve

    def step(self, grads, params=None):
        parts, join = cells(grads, self.over)
        return join([self._one(part) for part in parts])

    def _one(self, part):
        n, c = norm(part), self.limit
        if n == 0:
            return part
        if self.curve == "tanh":
            return [g * math.tanh(n / c) * c / n for g in part]
        if self.curve == "root":
            return [g / math.sqrt(1 + n**2 / c**2) for g in part]
        return [g * c / (c + n) for g in part]


class RMS:
    def __init__(self, limit, over="tensor"):
        self.limit, self.over = limit, over

    def step(self, grads, params=None):
        parts, join = cells(grads, self.over)
        return join([self._one(part) for part in parts])

    def _one(self, part):
        """Divide by max(1, RMS / threshold), as optax does."""
        square = math.fsum(float(np.sum(np.abs(g) ** 2)) for g in part)
        rms = math.sqrt(square / sum(g.size for g in part))
        return [g / max(1.0, rms / self.limit) for g in part]


class Band:
    def __init__(self, low, high, over="element"):
        self.low, self.high, self.over = low, high, over

    def step(self, grads, params=None):
        parts, join = cells(grads, self.over)
        return join([self._one(part) for part in parts])

    def _one(self, part):
        n = norm(part)
        if n == 0 or self.low <= n <= self.high:
            return part
        return [g / n * (self.low if n < self.low else self.high) for g in part]


class MovingBand(Remembering):
    def __init__(self, low, high, decay=0.95, over="tensor", warmup=1):
        super().__init__()
        self.low, self.high, self.decay = low, high, decay
        self.over, self.warmup = over, warmup

    def length(self, n, memory):
        average = memory.get("average", n)
        effective = n
        if memory["count"] >= self.warmup:
            effective = max(self.low * average, min(n, self.high * average))
        memory["average"] = self.decay * average + (1 - self.decay) * effective
        return effective

    def remembered(self, memory):
        return {"ema": memory["average"], "count": memory["count"]}


class Quantile(Remembering):
    def __init__(self, q=50.0, rate=0.2, over="all", start=None):
        super().__init__()
        self.q, self.rate, self.over, self.start = q, rate, over, start

    def limit(self, n, memory):
        limit = memory.get("limit", self.start or n)
        unclipped = 1.0 if n <= limit else 0.0
        memory["limit"] = limit * math.exp(-self.rate * (unclipped - self.q / 100))
        return limit

    def remembered(self, memory):
        return {"limit": memory["limit"]}


class Stabilize(Remembering):
    def __init__(self, decay=0.7, square_decay=0.9, over="tensor", eps=0.0):
        super().__init__()
        self.decay, self.square_decay, self.over, self.eps = (
            decay,
            square_decay,
            over,
            eps,
        )

    def length(self, n, memory):
        t = memory["count"] + 1
        a, b = self.decay, self.square_decay
        memory["m"] = a * memory.get("m", 0.0) + (1 - a) * n
        memory["v"] = b * memory.get("v", 0.0) + (1 - b) * n**2
        first = memory["m"] / (1 - a**t)
        second = memory["v"] / (1 - b**t)
        return first / (math.sqrt(second) + self.eps)

    def remembered(self, memory):
        root = math.sqrt(memory["v"])
        return {"mean": memory["m"], "root": root, "count": memory["count"]}


class Inside:
    """A rule for the elements of each tensor, with a memory for each tensor."""

    def __init__(self):
        self.memories = {}

    def step(self, grads, params=None):
        if not all(np.all(np.isfinite(g)) for g in grads):
            return grads
        most, clipped = [], []
        for i, g in enumerate(grads):
            limit = np.zeros(())
            if np.any(g):
                g, limit = self.one(g, self.memories.setdefault(i, {}))
            most.append(np.max(np.where(g != 0, limit, 0.0)))
            clipped.append(g)
        self.limits = [max(most)]
        return clipped

    def state(self):
        """Return what is remembered of each tensor, column by column."""
        return {
            f"{name}.{i}": x
            for i, memory in self.memories.items()
            for name, x in self.told(memory).items()
        }


class Moment(Inside):
    def __init__(self, ratio=5000**0.5, decay=0.999, warmup=20, corrected=False):
        super().__init__()
        self.ratio, self.decay, self.warmup = ratio, decay, warmup
        self.corrected = corrected

    def one(self, g, memory):
        b, t = self.decay, memory.setdefault("t", 0)
        v = memory.setdefault("v", np.zeros_like(g))
        limit = self.ratio * np.sqrt(v)
        if t > 0 and (self.corrected or t < self.warmup):
            limit = limit / math.sqrt(1 - b**t)
        spike = (np.abs(g) > limit) & (v > 0)
        taken = np.where(spike, np.sign(g) * limit, g)
        late = (1 - b ** (t + 1)) * taken**2
        moved = np.where(v > 0, b * v + (1 - b) * taken**2, late)
        memory["v"], memory["t"] = np.where(g != 0, moved, v), t + 1
        if t < self.warmup:
            return g, np.full(g.shape, math.inf)
        return taken, np.where(v > 0, limit, math.inf)

    def told(self, memory):
        root = np.sqrt(memory["v"])
        columns = (
            root.reshape(-1, root.shape[-1]).T if root.ndim > 1 else [root.ravel()]
        )
        return {"root": list(columns), "count": [memory["t"]]}


class Peak(Inside):
    def __init__(self, decay=0.999):
        super().__init__()
        self.decay = decay

    def one(self, g, memory):
        top = np.max(np.abs(g))
        t = memory["t"] = memory.get("t", 0) + 1
        memory["m"] = self.decay * memory.get("m", 0.0) + (1 - self.decay) * top
        most = memory["m"] / (1 - self.decay**t)
        spike = np.abs(g) > most
        limits = np.where(spike, np.abs(g) / top * most, most)
        return np.where(spike, g / top * most, g), limits

    def told(self, memory):
        return {"mean": [memory["m"]], "count": [memory["t"]]}


class Spectral:
    """A rule for singular values, by the decomposition that LAPACK gives."""

    def __init__(self, change):
        self.change = change

    def step(self, grads, params=None):
        return [self.one(g) for g in grads]

    def one(self, g):
        if not np.all(np.isfinite(g)):
            return g
        matrix = g.reshape(g.shape[0] if g.ndim > 1 else 1, -1)
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        return (u @ np.diag(self.change(s)) @ vh).reshape(g.shape)


class Skip:
    def __init__(self, rule):
        self.rule = rule

    def step(self, grads, params=None):
        before = copy.deepcopy(self.rule)
        clipped = self.rule.step(grads, params)
        self.limits = getattr(self.rule, "limits", None)
        finite = [np.isfinite(g) for g in grads]
        moved = [
            np.any((a != b) & ok)
            for a, b, ok in zip(clipped, grads, finite, strict=True)
        ]
        if not any(moved):
            return grads
        self.rule = before
        return [np.zeros_like(g) for g in grads]

    def state(self):
        return getattr(self.rule, "state", dict)()


class Chain:
    def __init__(self, *rules):
        self.rules = rules

    def step(self, grads, params=None):
        before = copy.deepcopy(self.rules)
        for rule in self.rules:
            grads = rule.step(grads, params)
            self.limits = getattr(rule, "limits", None)
            if isinstance(rule, Skip) and not any(np.any(g) for g in grads):
                self.rules = before
        return grads

    def state(self):
        return {
            f"{i}.{name}": cells
            for i, rule in enumerate(self.rules)
            for name, cells in getattr(rule, "state", dict)().items()
        }
