"""Slow float64 twins of the rules, transcribed from the papers; nothing is shared.

A twin takes the gradients of one step as a list of float64 arrays (and the parameters,
where the method asks for them) and returns the clipped ones. NaN and infinity follow
the default policy: the step is skipped, and what was not finite is not remembered.
"""

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


def cells(grads, over):
    """Split gradients into the arrays that share a norm, and say how to join them."""
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
    def __init__(self, limit, over="all", p=2.0):
        self.limit, self.over, self.p = limit, over, p

    def step(self, grads, params=None):
        parts, join = cells(grads, self.over)
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
    def __init__(self, ratio=0.01, over="unit", eps=1e-3):
        self.ratio, self.over, self.eps = ratio, over, eps

    def step(self, grads, params):
        parts, join = cells(grads, self.over)
        weights, _ = cells(params, self.over)
        return join(
            [
                rescale(part, self.ratio * max(norm(weight), self.eps))
                for part, weight in zip(parts, weights, strict=True)
            ]
        )


class Remembering:
    """A rule with a memory for each cell; 0 and what is not finite never enter it."""

    over = "all"

    def __init__(self):
        self.memories = {}

    def step(self, grads, params=None):
        parts, join = cells(grads, self.over)
        clipped = []
        for i, part in enumerate(parts):
            n = norm(part)
            limit = math.inf
            if math.isfinite(n) and n > 0:
                limit = self.limit(n, self.memories.setdefault(i, {}))
            clipped.append(rescale(part, limit) if math.isfinite(n) else part)
        return join(clipped)


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
    def __init__(self, z=2.5, decay=0.97, warmup=25, max_limit=None, over="all"):
        super().__init__()
        self.z, self.decay, self.warmup = z, decay, warmup
        self.max_limit, self.over = max_limit, over

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
        if z > self.z:
            limit = mean + self.z**2 * std / z
        taken = min(n, limit)
        memory["mean"] = self.decay * mean + (1 - self.decay) * taken
        memory["var"] = (
            self.decay * std**2 + (1 - self.decay) * (taken - memory["mean"]) ** 2
        )
        return min(limit, most)


class Chain:
    def __init__(self, *rules):
        self.rules = rules

    def step(self, grads, params=None):
        for rule in self.rules:
            grads = rule.step(grads, params)
        return grads
