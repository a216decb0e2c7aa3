"""The ways into gradclip under one interface, so that one test serves them all.

A front takes the gradients of a step as float64 NumPy arrays, and returns the clipped
ones as such (zeros where the step was dropped) and an `Info` of NumPy arrays.
"""

import functools

import array_api_strict
import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import torch

import gradclip as gc
import gradclip.jax
from gradclip.torch import Clipper


def reported(info):
    return gc.Info(*(np.asarray(x) for x in info))


class Arrays:
    """`gradclip.Clipper` on the arrays of any library."""

    def __init__(self, rule, weights, own):
        self.clipper, self.own = gc.Clipper(rule), own
        self.weights = [own(w) for w in weights]

    def clip(self, grads):
        given = [self.own(g) for g in grads]
        clipped, info = self.clipper.clip(given, params=self.weights)
        return [np.asarray(x) for x in clipped], reported(info)

    def state_dict(self):
        return self.clipper.state_dict()

    def load_state_dict(self, saved):
        self.clipper.load_state_dict(saved)


class Torch:
    """`gradclip.torch.Clipper` on parameters."""

    def __init__(self, rule, weights, dtype, backend=None):
        self.named = {f"w{i}": self.made(w, dtype) for i, w in enumerate(weights)}
        self.given = [torch.zeros_like(p) for p in self.named.values()]
        self.clipper = Clipper(self.named, rule)
        self.clip_, self.stance, self.once = self.clipper.clip_, "default", "default"
        if backend is not None:
            torch.compiler.reset()
            # Compiled code has arrays of one size; a memory that grows is cut out.
            self.clip_ = torch.compile(
                self.clipper.clip_, backend=backend, fullgraph=not rule.grows
            )
            self.once = "default" if rule.grows else "fail_on_recompile"

    def made(self, weight, dtype):
        """Return a parameter."""
        return torch.tensor(weight, dtype=dtype)

    def clip(self, grads):
        for p, held, g in zip(self.named.values(), self.given, grads, strict=True):
            held.copy_(torch.tensor(g))
            p.grad = held
        with torch.compiler.set_stance(self.stance):
            info = self.clip_()
        self.stance = self.once
        clipped = [
            np.zeros_like(g) if p.grad is None else p.grad.numpy()
            for p, g in zip(self.named.values(), grads, strict=True)
        ]
        return clipped, reported(info)

    def state_dict(self):
        return {name: x.numpy() for name, x in self.clipper.state_dict().items()}

    def load_state_dict(self, saved):
        self.clipper.load_state_dict(saved)


class Elsewhere(Torch):
    """The same where torch makes tensors on another device, if it is not told where."""

    def __init__(self, rule, weights, dtype):
        super().__init__(rule, weights, dtype)
        self.clip_ = self.clip_elsewhere

    def clip_elsewhere(self):
        with torch.device("meta"):
            return self.clipper.clip_()


class Jax:
    """`gradclip.jax.as_optax` under jit, with and without 64-bit floats."""

    def __init__(self, rule, weights, wide):
        self.rule, self.wide = rule, functools.partial(jax.enable_x64, wide)
        transform = gradclip.jax.as_optax(rule)
        self.update = jax.jit(transform.update)
        with self.wide():
            self.weights = self.own(weights)
            self.state = transform.init(self.weights)

    def own(self, arrays):
        return {f"w{i}": jnp.asarray(x, float) for i, x in enumerate(arrays)}

    def clip(self, grads):
        with self.wide():
            # As NumPy arrays: jit is quicker than `asarray` at taking them over.
            given = dict(zip(self.weights, grads, strict=True))
            clipped, self.state = self.update(given, self.state, self.weights)
        return [np.asarray(x) for x in clipped.values()], reported(self.state.info)

    def state_dict(self):
        return gradclip.jax.state_dict(self.rule, self.state, self.weights)

    def load_state_dict(self, saved):
        with self.wide():
            self.state = gradclip.jax.load_state_dict(
                self.rule, self.state, saved, self.weights
            )


FRONTS = {
    "numpy": functools.partial(Arrays, own=np.asarray),
    "numpy-float32": functools.partial(Arrays, own=np.float32),
    "tensors": functools.partial(Arrays, own=torch.tensor),
    "strict": functools.partial(Arrays, own=array_api_strict.asarray),
    "mlx": functools.partial(Arrays, own=lambda x: mx.array(np.float32(x))),
    "jax-eager": functools.partial(
        Arrays, own=functools.partial(jnp.asarray, dtype=float)
    ),
    "torch": functools.partial(Torch, dtype=torch.float64),
    "torch-float32": functools.partial(Torch, dtype=torch.float32),
    "torch-elsewhere": functools.partial(Elsewhere, dtype=torch.float32),
    # Whether the whole is taken as one graph shows with any backend.
    "compiled": functools.partial(Torch, dtype=torch.float64, backend="eager"),
    "functional": functools.partial(Torch, dtype=torch.float64, backend="aot_eager"),
    "inductor": functools.partial(Torch, dtype=torch.float32, backend="inductor"),
    "jax": functools.partial(Jax, wide=True),
    "jax-float32": functools.partial(Jax, wide=False),
}
