"""How the incumbents do it, written from their published algorithms, to be timed."""

import numpy as np
import torch


class AutoClip:
    """The percentile of a list of all norms, one `.item()` per parameter."""

    def __init__(self, q=10.0):
        """Start with no norms."""
        self.q, self.past = q, []

    def __call__(self, params):
        """Measure, append, take the percentile, clip with torch."""
        total = 0.0
        for p in params:
            total += p.grad.data.norm(2).item() ** 2
        self.past.append(total**0.5)
        limit = np.percentile(self.past, self.q)
        torch.nn.utils.clip_grad_norm_(params, limit)


class ZClip:
    """Moving mean and variance in Python numbers, after a warm-up of 25 norms."""

    def __init__(self, z=2.5, decay=0.97, warmup=25):
        """Start with an empty buffer."""
        self.z, self.decay, self.warmup = z, decay, warmup
        self.buffer, self.mean, self.var = [], None, None

    def __call__(self, params):
        """Measure, decide, clip parameter by parameter, update."""
        norms = [p.grad.norm(2) for p in params]
        norm = torch.sqrt(sum(n.pow(2) for n in norms)).item()
        if self.mean is None:
            self.buffer.append(norm)
            if len(self.buffer) >= self.warmup:
                self.mean, self.var = np.mean(self.buffer), np.var(self.buffer)
            return
        std = self.var**0.5
        score = (norm - self.mean) / (std + 1e-6)
        limit = self.mean + self.z * std / (score / self.z) if score > self.z else norm
        if limit < norm:
            for p in params:
                p.grad.mul_(limit / (norm + 1e-6))
        self.mean = self.decay * self.mean + (1 - self.decay) * limit
        self.var = self.decay * self.var + (1 - self.decay) * (limit - self.mean) ** 2


def agc(params, ratio=0.01, eps=1e-3):
    """Clip each unit, tensor by tensor, as image models are trained."""
    for p in params:
        dims = tuple(range(1, p.ndim)) or None
        weight = torch.linalg.vector_norm(p.detach(), dim=dims, keepdim=p.ndim > 1)
        norm = torch.linalg.vector_norm(p.grad, dim=dims, keepdim=p.ndim > 1)
        most = weight.clamp(min=eps) * ratio
        clipped = p.grad * (most / norm.clamp(min=1e-6))
        p.grad.copy_(torch.where(norm < most, p.grad, clipped))


def per_tensor(params, limit):
    """Clip tensor by tensor, in a loop."""
    for p in params:
        torch.nn.utils.clip_grad_norm_([p], limit)


def numpy_clip(grads, limit):
    """Take the obvious route: a norm of norms, and a product."""
    norm = np.sqrt(sum(np.linalg.norm(g) ** 2 for g in grads))
    scale = min(1.0, limit / (norm + 1e-6))
    return [g * scale for g in grads]
