"""Per-sample clipping: the sum of gradients that were clipped one sample at a time.

This is the sum of DP-SGD, without its noise and without its accounting, which stay with
libraries made for them.
"""

import math
from typing import Any

from gradclip.arguments import check_rule
from gradclip.arrays import dense
from gradclip.backends import Backend, find_backend, inward, is_half
from gradclip.decision import Info, decide
from gradclip.pipeline import ask_schedules
from gradclip.rules import Array, Measured, Rule, stages
from gradclip.trees import Grads, named_leaves, rebuild


def clipped_sum(grads: Grads, rule: Rule) -> tuple[Grads, Info]:
    r"""Clip the gradient of each sample by a rule, and add them up.

    $g \leftarrow \sum_i g_i \cdot \min(1, c / \lVert g_i \rVert)$

    Args:
        grads: Arrays with the samples along their first axis, from `jax.vmap(jax.grad)`
            or `torch.func.vmap(torch.func.grad)`; or a list, tuple or dict of them.
        rule: `Norm(c)` is flat clipping, `Norm(c / K**0.5, over="tensor")` is per layer
            for K arrays, and `Normalize(eps=0.01)` is AUTO-S.

    Returns:
        The sums, arranged like `grads`, and an `Info` with one norm per sample; over
        each `"tensor"` it has a row per array. A sample whose gradient is not finite
        adds nothing; `info.finite` tells.

    Raises:
        TypeError: For a rule with memory, and for what is not an array, or is a
            sparse one.
        ValueError: For another scope, or arrays with other numbers of samples.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> from gradclip.per_sample import clipped_sum
        >>> grads = np.array([[3.0, 4.0], [0.3, 0.4]])
        >>> total, info = clipped_sum(grads, gc.Norm(1.0))
        >>> total.round(4).tolist(), info.norm.tolist()
        ([0.9, 1.2], [5.0, 0.5])

    Reference:
        Abadi et al.: Deep learning with differential privacy. arXiv 1607.00133, 2016.
        Bu, Wang, Zha, Karypis: Automatic clipping: differentially private deep learning
        made easier and stronger. arXiv 2206.07136, 2022.
    """
    check_per_sample(rule)
    named = named_leaves(grads)
    engine = find_backend(named)
    leaves = dense(engine, named)
    if len({tuple(x.shape)[:1] for x in leaves}) != 1 or leaves[0].ndim == 0:
        shapes = ", ".join(str(tuple(x.shape)) for x in leaves)
        raise ValueError(
            f"clipped_sum(): the arrays have shapes {shapes}; their first axis has to "
            "be that of the samples, of one length."
        )
    info = decide_samples(engine, sample_norms(engine, leaves, rule), rule)
    rows = engine.spread(info.scale, leaves, "tensor" if info.scale.ndim > 1 else "all")
    fine = engine.xp.isfinite(info.norm)
    # Over tensors, a sample that is bad in one of them is bad.
    whole = engine.xp.all(fine, axis=0) if fine.ndim > 1 else fine
    sums = [_sum(engine, x, row, whole) for x, row in zip(leaves, rows, strict=True)]
    return rebuild(grads, iter(sums)), info


def check_per_sample(rule: Rule) -> None:
    """Refuse rules that need more than the norms of one sample."""
    if check_rule(rule).stateful:
        raise TypeError(f"{rule!r} remembers steps; per-sample rules have no memory.")
    plain = len(stages(rule)) == 1 and not (rule.drops or rule.by_place)
    if rule.over not in ("all", "tensor") or rule.needs_weight or not plain:
        raise ValueError(
            f"{rule!r}: per-sample clipping takes one rule over 'all' or each "
            "'tensor' that rescales, such as Norm(1.0)."
        )


def sample_norms(engine: Backend, leaves: list[Array], rule: Rule) -> Array:
    """Return the norm of each sample, in a row for each array or over all of them."""
    xp = engine.xp
    norms = xp.stack([engine.row_norms(_flat(x, xp), rule.p) for x in leaves])
    if rule.over == "tensor":
        return norms
    return engine.row_norms(xp.permute_dims(norms, (1, 0)), rule.p)


def _flat(x: Array, xp: Any) -> Array:
    """Return a row for each sample, also where there are none, as in random batches."""
    return xp.reshape(x, (x.shape[0], math.prod(x.shape[1:])))


def decide_samples(engine: Backend, norms: Array, rule: Rule) -> Info:
    """Return what a rule makes of the norms of samples."""
    asked = ask_schedules(engine, rule, 0)
    info, _ = decide(rule, Measured(norms, None, 0, engine.xp, scheduled=asked), {})
    return info


def _sum(engine: Backend, x: Array, scale: Array, kept: Array) -> Any:
    """Return the sum of the rows of an array, each times its scale."""
    xp = engine.xp
    scale = inward(scale, float(xp.finfo(x.dtype).eps), xp)
    flat = _flat(x, xp)
    # Cleared, not scaled: 0 times NaN is NaN.
    if engine.known(xp.all(kept)) is not True:
        flat = xp.where(kept[:, None], flat, xp.zeros_like(flat))
    # Half precision cannot hold a small scale, nor add up many samples.
    wide = xp.float32 if is_half(x, xp) else x.dtype
    total = xp.astype(xp.astype(scale, wide) @ xp.astype(flat, wide), x.dtype)
    return xp.reshape(total, tuple(x.shape)[1:])
