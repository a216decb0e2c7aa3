"""The clip for optax against optax's own, both under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradclip as gc
from benchmarks.shapes import GPT2
from benchmarks.timing import alternate
from gradclip.jax import as_optax

TARGET = "<= 1.05"
SETS = {"gpt2": GPT2, "50 of 512x512": [(512, 512)] * 50}


def compiled(transform, grads):
    """Return a call that clips and waits, compiled before it is timed."""
    update = jax.jit(transform.update)
    state = transform.init(grads)

    def call():
        return jax.block_until_ready(update(grads, state, grads))

    call()
    return call


def rows(rounds):
    """Time Norm where nothing is clipped, and where everything is, against optax."""
    rng = np.random.default_rng(0)
    for name, shapes in SETS.items():
        grads = [jnp.asarray(1e-3 * rng.standard_normal(s, np.float32)) for s in shapes]
        for kind, limit in (("free", 1e9), ("cut", 1e-3)):
            sides = {
                "optax": compiled(optax.clip_by_global_norm(limit), grads),
                "ours": compiled(as_optax(gc.Norm(limit)), grads),
            }
            times = alternate(sides, rounds)
            ratio = times["ours"] / times["optax"]
            yield f"as_optax {kind}: {name}", times, ratio, None, TARGET
