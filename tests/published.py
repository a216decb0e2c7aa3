"""What published clippers do, written down as little as it takes to see them fail.

In our words, after reading the code named with each; it is the state at that version,
which may have been mended since. One takes the gradients of a step as a list of tensors
and returns what is left of them. `make test-published` runs the same defects on those
packages that can be installed.
"""

import math
import statistics

import numpy as np
import torch


def torch_clip(grads, limit):
    """Clip with the installed `torch.nn.utils.clip_grad_norm_`."""
    params = [torch.zeros_like(g, requires_grad=True) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(params, limit)
    return [p.grad for p in params]


def norm_of(grads):
    return float(torch.stack([g.norm() for g in grads]).norm())


class AutoClip:
    """pseeth/autoclip 7de6a2f: a percentile of all norms, the present one included."""

    def __init__(self, q=10.0):
        self.q, self.past = q, []

    def __call__(self, grads):
        self.past.append(sum(g.norm().item() ** 2 for g in grads) ** 0.5)
        return torch_clip(grads, float(np.percentile(self.past, self.q)))


class AutoClipOfTensorFlow(AutoClip):
    """pseeth/autoclip 7de6a2f for TensorFlow: the global limit for each tensor."""

    def __call__(self, grads):
        self.past.append(norm_of(grads))
        limit = float(np.percentile(self.past, self.q))
        return [torch_clip([g], limit)[0] for g in grads]


class QuantileClip:
    """HesitantlyHuman, autoclip 0.2.1: a quantile of the norms before, NaN and all."""

    def __init__(self, q=0.9):
        self.q, self.past = q, []

    def limit(self):
        return float(torch.quantile(torch.tensor(self.past), self.q))

    def __call__(self, grads):
        limit = self.limit() if self.past else math.inf
        self.past.append(norm_of(grads))
        return torch_clip(grads, limit)


class StandardClip(QuantileClip):
    """HesitantlyHuman, autoclip 0.2.1: deviations without a mean, from one norm on."""

    def limit(self):
        # What torch gives, with a warning, for one norm.
        return 2.0 * statistics.stdev(self.past) if len(self.past) > 1 else math.nan


class ZClip:
    """bluorion-com/ZClip 584ce4f, zclip 1.0.0: whatever norm comes is learnt."""

    def __init__(self, max_norm=1.0, z=2.5, alpha=0.97, warmup=25):
        self.max_norm, self.z, self.alpha, self.warmup = max_norm, z, alpha, warmup
        self.first, self.mean, self.var = [], None, None

    def __call__(self, grads):
        kind = grads[0].dtype
        n = float(torch.stack([g.to(kind).norm() for g in grads]).norm())
        most = math.inf if self.max_norm is None else self.max_norm
        if self.mean is None:
            self.first.append(n)
            if len(self.first) == self.warmup:
                self.mean, self.var = np.mean(self.first), np.var(self.first)
            return torch_clip(grads, most)
        std = self.var**0.5
        score = (n - self.mean) / (std + 1e-6)
        limit = self.mean + self.z**2 * std / score if score > self.z else n
        self.mean = self.alpha * self.mean + (1 - self.alpha) * limit
        spread = (limit - self.mean) ** 2
        self.var = self.alpha * self.var + (1 - self.alpha) * spread
        limit = min(limit, most)
        return [g * (limit / (n + 1e-6)) if n > limit else g for g in grads]


class SkipStep:
    """allenai/OLMo-core fa6c501: factor 0 for outliers, which stay in the window."""

    def __init__(self, sigma=6, window=128):
        self.sigma, self.window, self.past = sigma, window, []

    def __call__(self, grads):
        n, past = norm_of(grads), torch.tensor(self.past)
        self.past = [*self.past, n][-self.window :]
        if len(past) < self.window // 2:
            return grads
        std, mean = torch.std_mean(past)
        return [g * float(n - mean <= self.sigma * std) for g in grads]


class Spam:
    """TianjinYellow/SPAM-Optimizer e8185fb: bounds by its own second moment.

    With `copies`, kozistr/pytorch_optimizer 7a076d2, which writes to a copy.
    """

    def __init__(self, theta=5000.0, beta=0.999, grace=20, copies=False):
        self.theta, self.beta, self.grace, self.copies = theta, beta, grace, copies
        self.step, self.v = 0, None

    def __call__(self, grads):
        self.step += 1
        self.v = self.v or [torch.zeros_like(g) for g in grads]
        grads = [g.clone() for g in grads]
        for g, v in zip(grads, self.v, strict=True):
            bound = (self.theta * v).sqrt()
            high = g.abs() > bound
            if self.step >= self.grace and self.copies:
                g[high].sign_().mul_(bound[high])
            elif self.step >= self.grace:
                g[high] = g[high].sign() * bound[high]
            v.lerp_(g * g, 1 - self.beta)
        return grads


class AdamWClip:
    """AdamWClip 0.1.4, without its warm-up: deviations of what was let through."""

    def __init__(self, deviations=3.0, decay=0.999, warmup=0, least=1e-10):
        self.deviations, self.decay, self.warmup = deviations, decay, warmup
        self.least, self.step, self.v = least, 0, None

    def __call__(self, grads):
        self.step += 1
        self.v = self.v or [torch.zeros_like(g) for g in grads]
        grads = [g.clone() for g in grads]
        weight = 1 - self.decay ** (self.step - 1) or 1.0
        for g, v in zip(grads, self.v, strict=True):
            if self.step > self.warmup:
                bound = (self.deviations * (v / weight).sqrt()).clamp(min=self.least)
                g.copy_(torch.minimum(torch.maximum(g, -bound), bound))
            v.mul_(self.decay).addcmul_(g, g, value=1 - self.decay)
        return grads


class StableSpam:
    """TianjinYellow/StableSPAM, AdaGN: the norm is set from moving moments of it."""

    def __init__(self, gamma1=0.7, gamma2=0.9):
        self.gamma1, self.gamma2, self.step = gamma1, gamma2, 0
        self.m = self.v = 0.0

    def __call__(self, grads):
        n = norm_of(grads)
        self.step += 1
        self.m = self.gamma1 * self.m + (1 - self.gamma1) * n
        self.v = self.gamma2 * self.v + (1 - self.gamma2) * n * n
        m = self.m / (1 - self.gamma1**self.step)
        v = self.v / (1 - self.gamma2**self.step)
        return [g / n * m / (v**0.5 + 1e-8) for g in grads]


class AdaGC:
    """pytorch_optimizer 4.1.0: the smallest norm of the warm-up, if it is 0 as well.

    With `squared`, an earlier one, which divides by the square of the global norm.
    """

    def __init__(self, warmup=100, squared=False):
        self.warmup, self.power, self.step = warmup, 2 if squared else 1, 0
        self.gamma = None

    def __call__(self, grads):
        self.step += 1
        if self.gamma is None or self.step < self.warmup:
            scale = min(1.0, 1.0 / (norm_of(grads) ** self.power + 1e-8))
            clipped = [g * scale for g in grads]
            norms = [float(g.norm()) for g in clipped]
            self.gamma = [*map(min, self.gamma or norms, norms)]
            return clipped
        clipped = []
        for i, g in enumerate(grads):
            limit = 1.05 * max(self.gamma[i], 1e-8)
            clipped.append(g * min(1.0, limit / max(float(g.norm()), 1e-8)))
            self.gamma[i] += 0.02 * (float(clipped[-1].norm()) - self.gamma[i])
        return clipped


class MedianClip:
    """smartclip 0.1.1: median + 3 deviations of all norms so far, after 100 of them."""

    def __init__(self):
        self.past = []

    def __call__(self, grads):
        self.past.append(norm_of(grads))
        if len(self.past) <= 100:
            return grads
        spread = 3 * statistics.stdev(self.past)
        return torch_clip(grads, statistics.median(self.past) + spread)


class Moments:
    """The statistics that a drytorch criterion keeps."""

    mean, var = 0.0, 1.0


class HistClipper:
    """drytorch 0.1.0rc11: learns norms before the clip, by one default criterion."""

    shared = Moments()

    def __init__(self, z=2.5, alpha=0.97, warmup=20):
        self.z, self.alpha, self.warmup, self.first = z, alpha, warmup, []

    def __call__(self, grads):
        n, own = norm_of(grads), self.shared
        if len(self.first) < self.warmup:
            self.first.append(n)
            if len(self.first) == self.warmup:
                own.mean, own.var = np.mean(self.first), np.var(self.first, ddof=1)
            return torch_clip(grads, 1.0)
        score = abs(n - own.mean) / (own.var**0.5 + 1e-8)
        limit = own.mean + self.z**2 / max(score, 1e-8) * own.var**0.5
        own.var += (1 - self.alpha) * ((n - own.mean) ** 2 - own.var)
        own.mean += (1 - self.alpha) * (n - own.mean)
        return torch_clip(grads, limit) if score > self.z else grads


def agc_of_composer(grads, weights, ratio=0.01):
    """mosaicml/composer: no floor for the norm of a weight."""
    clipped = []
    for g, w in zip(grads, weights, strict=True):
        most, n = ratio * w.norm(dim=1, keepdim=True), g.norm(dim=1, keepdim=True)
        clipped.append(torch.where(n > most, g * (most / n).nan_to_num(nan=1.0), g))
    return clipped


def agc_of_nfnets(grads, weights, ratio=0.01, eps=1e-3):
    """vballoli/nfnets-pytorch: a unit of a linear layer is a column."""
    clipped = []
    for g, w in zip(grads, weights, strict=True):
        most = ratio * w.norm(dim=0, keepdim=True).clamp(min=eps)
        n = g.norm(dim=0, keepdim=True).clamp(min=1e-6)
        clipped.append(torch.where(n > most, g * (most / n), g))
    return clipped


def synced(grads, limit=1.0):
    """kozistr/pytorch_optimizer 7a076d2, `clip_grad_norm(sync=True)`: not held to 1."""
    return [g * (limit / (norm_of(grads) + 1e-6)) for g in grads]


def block_rms(grads, most=1.0):
    """kozistr/pytorch_optimizer 7a076d2, Adafactor: the smaller of the two divides."""
    rms = [float(g.square().mean().sqrt()) for g in grads]
    return [g / min(most, r) for g, r in zip(grads, rms, strict=True)]
