"""Clip a Flax NNX model: pip install gradclip[jax] flax, then run this file."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import gradclip as gc
from gradclip.jax import as_optax


class Net(nnx.Module):
    """Two layers, as small as a network gets."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Make the layers."""
        self.inner = nnx.Linear(8, 32, rngs=rngs)
        self.outer = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return one number for each sample."""
        return self.outer(nnx.tanh(self.inner(x)))


@nnx.jit
def step(model: Net, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    """Take one step; the clip is part of the optimizer, and compiled with it."""
    grads = nnx.grad(lambda net: jnp.mean((net(x) - y) ** 2))(model)
    optimizer.update(model, grads)


def main() -> None:
    """Train for 40 steps with a bad batch at 30, and print what the clip did there."""
    model = Net(nnx.Rngs(0))
    clip = as_optax(gc.ZScore(z=2.5, warmup=10))  # the only line for clipping
    optimizer = nnx.Optimizer(model, optax.chain(clip, optax.adam(1e-2)), wrt=nnx.Param)
    for i in range(40):
        x = jax.random.normal(jax.random.key(i), (16, 8))
        y = x.sum(axis=1, keepdims=True) * (100 if i == 30 else 1)
        step(model, optimizer, x, y)
        info = optax.tree.get(nnx.as_pure(optimizer.opt_state), "info")
        if i in (0, 29, 30, 31):
            facts = f"norm {float(info.norm):.3g}, scale {float(info.scale):.3g}"
            print(f"step {i}: {facts}, clipped {bool(info.clipped)}")


if __name__ == "__main__":
    main()
