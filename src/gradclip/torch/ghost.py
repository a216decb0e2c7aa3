"""Per-sample clipping without per-sample gradients: two backward passes, ghost norms.

The gradient of a linear layer is a sum of outer products, whose norm needs the factors
only. The first pass finds the norms, the second one weighs the losses.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradclip.backends import TorchArrays
from gradclip.decision import Info
from gradclip.per_sample import check_per_sample, decide_samples
from gradclip.rules import Rule

TURNS = {"TBackward", "ToCopyBackward", "TransposeBackward", "PermuteBackward"}
"""What a layer does to its weight before it uses it."""

UNSEEN = (
    ", or in a call that was not seen: compiled code shows none, and is to be left out "
    "here; or the layer was called before it was watched, or was unfrozen since"
)
"""What else it may be where a layer was not called."""

FORMED = (
    "use gradclip.per_sample.clipped_sum, with gradients from torch.func.vmap, or from "
    "one sample after another where vmap cannot go, as through nn.GRU"
)
"""What does without ghosts."""


class _Call(NamedTuple):
    """One call of a layer."""

    inputs: Tensor
    source: Any
    """The node that has made them, if there is one."""
    edge: GradientEdge
    """Where the gradient of the output arrives."""


class PerSample:
    r"""Fill `grad` with the sum of clipped per-sample gradients, in O(batch) memory.

    $\sum_i s_i \nabla \ell_i = \nabla \sum_i s_i \ell_i$, with
    $s_i = \min(1, c / \lVert \nabla \ell_i \rVert)$

    Linear and embedding layers need no per-sample gradients; those of other layers are
    formed for one layer at a time. Samples must not influence each other (no batch
    norm), each layer may be called once, with one tensor, and its parameters used by
    nothing else. Positions are such inputs too: `torch.arange(n).expand(batch, n)`.
    A hook on a parameter itself is handed the clipped sum, and is in no norm.

    Args:
        model: The module; its inputs have the samples along their first axis. The first
            `backward()` takes one more pass, to see that they have.

    Raises:
        ValueError: For parameters that several layers share, and for embeddings with
            `scale_grad_by_freq`.

    Example:
        >>> import torch, gradclip as gc
        >>> from gradclip.torch.ghost import PerSample
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> with PerSample(model) as samples:
        ...     losses = model(torch.tensor([[3.0, 4.0], [0.3, 0.4]])).squeeze(1)
        ...     info = samples.backward(losses, gc.Norm(1.0))
        >>> model.weight.grad, info.norm.round(decimals=4)
        (tensor([[0.9000, 1.2000]]), tensor([5.0000, 0.5000], dtype=torch.float64))

    Reference:
        Li, Tramèr, Liang, Hashimoto: Large language models can be strong differentially
        private learners. arXiv 2110.05679, 2021.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at the layers that own parameters."""
        self._model = model
        self._layers = _owners(model)
        self._calls: dict[nn.Module, _Call] = {}
        self._given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._hooks: list[Any] = []
        self._apart = False

    def __enter__(self) -> "PerSample":
        """Watch the layers."""
        self._watch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the layers and of what they saw."""
        self._look_away()
        self._calls, self._given = {}, {}

    def _watch(self) -> None:
        norms = nn.modules.batchnorm._BatchNorm
        if any(m.training for m in self._model.modules() if isinstance(m, norms)):
            raise _refusal("batch norm mixes samples, unless it is in eval()")
        # What was frozen may be trained by now.
        self._layers = _owners(self._model)
        self._calls, self._given = {}, {}
        for layer in self._layers:
            self._hook_into(layer)

    def _hook_into(self, layer: nn.Module) -> None:
        # Formulas are those of the layer alone, inside of the hooks that others put
        # around it; to form gradients is to call it again with all of them.
        alone = is_ghost(layer)
        saw = layer.register_forward_hook(self._saw, prepend=alone, with_kwargs=True)
        self._hooks.append(saw)
        if not alone:
            self._hooks.append(
                layer.register_forward_pre_hook(
                    self._takes, prepend=True, with_kwargs=True
                )
            )

    def _look_away(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _takes(
        self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        self._given[layer] = inputs, named

    def _saw(
        self,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        named: dict[str, Any],
        output: Any,
    ) -> None:
        if layer in self._calls:
            raise _refusal(f"{layer} is called twice")
        inputs, named = self._given.pop(layer, (inputs, named))
        # What comes by name would be missing where the layer is called again.
        given = [*map(_kind, inputs), *(f"{k}={_kind(x)}" for k, x in named.items())]
        if given != ["Tensor"] or not torch.is_tensor(output):
            raise _refusal(
                f"{layer} is called with ({', '.join(given)}) and returns "
                f"{_kind(output)}, in place of one tensor for one, without a name"
            )
        if not output.requires_grad:
            raise _refusal(
                f"{layer} is called where no graph is kept, as under no_grad() or in a "
                "checkpoint with use_reentrant=True",
                "call it outside of the `with`, or with use_reentrant=False",
            )
        (x,) = inputs
        # Where its gradient arrives, even if it is changed in place behind the layer.
        self._calls[layer] = _Call(x.detach(), x.grad_fn, get_gradient_edge(output))

    def backward(self, losses: Tensor, rule: Rule) -> Info:
        """Add the clipped gradients to `grad`, as `backward()` would.

        Args:
            losses: One loss per sample.
            rule: A rule over `"all"` without memory, such as `Norm(1.0)`.

        Returns:
            What was done, with one norm per sample. Where `info.finite` is not true,
            the sum is not finite either.

        Raises:
            TypeError: For a rule with memory.
            ValueError: For another scope, losses that were averaged already, a
                parameter that something else than its layer uses, a layer that was
                called with another number of samples, or samples that meet.
        """
        check_per_sample(rule)
        if rule.over != "all" or rule.p != 2 or losses.dim() != 1:
            raise ValueError(
                f"PerSample.backward(): {rule!r} and losses of shape "
                f"{tuple(losses.shape)}; it takes a rule over 'all' for 2-norms, and "
                "one loss per sample, as from reduction='none'."
            )
        if not self._hooks:
            raise _refusal("backward() was called outside of its `with`")
        self._check_uses(losses)
        engine = TorchArrays()
        # Forming gradients calls some of the layers again.
        self._look_away()
        try:
            info = decide_samples(engine, self._norms(losses), rule)
            (losses * info.scale.to(losses.dtype)).sum().backward()
        finally:
            self._watch()
        return info

    def _check_uses(self, losses: Tensor) -> None:
        """Refuse parameters that more than a watched call of their layer uses."""
        uses = _uses(losses.grad_fn)
        # Anew, for those that came to be trained since the layers were watched.
        for layer, params in _owners(self._model).items():
            inside: Counter[int] = Counter()
            if layer in self._calls:
                call = self._calls[layer]
                inside = _uses(call.edge.node, call.source)
            if any(uses[id(p)] > inside[id(p)] for p in params):
                raise _refusal(
                    f"a parameter of {layer} is used beside the layer, as tied weights "
                    f"are{'' if layer in self._calls else UNSEEN}"
                )

    def _norms(self, losses: Tensor) -> Tensor:
        """Return the norm of the gradient of each sample."""
        layers = list(self._calls)
        for layer in layers:
            if (count := len(self._calls[layer].inputs)) != len(losses):
                raise ValueError(
                    f"PerSample: {layer} was called with {count} samples, and there "
                    f"are {len(losses)} losses; samples lie along the first axis of "
                    "everything that goes into a layer."
                )
        edges = [self._calls[layer].edge for layer in layers]
        # Samples do not meet, so that each row of these is from one loss alone.
        grads = _at(edges, losses)
        if len(losses) > 1 and not self._apart:
            self._check_rows(losses, grads)
        with torch.no_grad():
            squares = [losses.new_zeros(len(losses), dtype=torch.float64)]
            squares += [
                squared_norms(layer, self._calls[layer].inputs, grad).double()
                for layer, grad in zip(layers, grads, strict=True)
                if grad is not None
            ]
        return torch.stack(squares).sum(0).sqrt()

    def _check_rows(self, losses: Tensor, grads: Sequence[Tensor | None]) -> None:
        """Refuse rows that are not those of samples, once: it takes one more pass.

        That of a sample is weighed as its loss is.
        """
        # Halves are exact, and in this order no distance between samples keeps them.
        halved = [0.5 ** (i.bit_count() % 2) for i in range(len(losses))]
        weights = losses.new_tensor(halved)
        weighed = _at([call.edge for call in self._calls.values()], losses * weights)
        for layer, plain, new in zip(self._calls, grads, weighed, strict=True):
            if plain is None or new is None or plain.shape[:1] != losses.shape:
                continue
            expected = _row_norms(plain) * weights
            # Far more than rounding, also in half precision.
            if ((_row_norms(new) - expected).abs() > 0.05 * expected.max()).any():
                raise _refusal(
                    f"samples meet behind {layer}, or do not lie along the first axis "
                    "of what goes into it",
                    "give positions as torch.arange(n).expand(batch, n), and sequences "
                    "with the batch first",
                )
        self._apart = True


def _at(edges: list[GradientEdge], losses: Tensor) -> Sequence[Tensor | None]:
    total = losses.sum()
    return torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True)


def _row_norms(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).abs().double().square().sum(1).sqrt()


def _owners(model: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """Return the layers that own parameters, and those of these that are trained."""
    layers = {
        layer: [p for p in layer.parameters(recurse=False) if p.requires_grad]
        for layer in model.modules()
    }
    layers = {layer: owned for layer, owned in layers.items() if owned}
    owned = [id(p) for params in layers.values() for p in params]
    if len(set(owned)) < len(owned):
        raise _refusal("some layers share a parameter")
    if any(getattr(layer, "scale_grad_by_freq", False) for layer in layers):
        raise _refusal("scale_grad_by_freq mixes samples")
    for layer, params in layers.items():
        if any(p.is_complex() for p in params):
            raise _refusal(f"{layer} has complex parameters, which it does not measure")
    return layers


def squared_norms(layer: nn.Module, inputs: Tensor, grad: Tensor) -> Tensor:
    """Return the squared norms of the gradients of one layer, for each sample."""
    return (GHOSTS[type(layer)] if is_ghost(layer) else _formed)(layer, inputs, grad)


def is_ghost(layer: nn.Module) -> bool:
    """Return whether a layer is measured without its gradients.

    Pruning and weight_norm make a weight out of parameters with other names.
    """
    names = {name for name, _ in layer.named_parameters(recurse=False)}
    return type(layer) in GHOSTS and names <= {"weight", "bias"}


def _refusal(reason: str, remedy: str = FORMED) -> ValueError:
    return ValueError(f"PerSample: {reason}, so that norms would be wrong; {remedy}.")


def _kind(x: Any) -> str:
    return "Tensor" if torch.is_tensor(x) else type(x).__name__


def _uses(end: Any, start: Any = None) -> Counter[int]:
    """Return how many operations before `end` each leaf goes into, by its id.

    With `start`, what lies before that is left out.
    """
    uses: Counter[int] = Counter()
    seen, waiting = {start}, [end]
    while waiting:
        if (node := waiting.pop()) is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            waiting.append(following)
            # To turn a weight is no use of it; what takes the turned one is.
            leaf = _leaf_behind(following)
            if leaf is not None and _leaf_behind(node) is None:
                uses[id(leaf)] += 1
    return uses


def _leaf_behind(node: Any) -> Tensor | None:
    """Return a leaf, also where it was turned or converted, which several may share."""
    while type(node).__name__.rstrip("0") in TURNS:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _linear(layer: nn.Linear, inputs: Tensor, grad: Tensor) -> Tensor:
    a, g = (
        x.double().flatten(1, -2) if x.dim() > 2 else x.double()[:, None]
        for x in (inputs, grad)
    )
    total = a.new_zeros(len(a))
    if layer.weight.requires_grad:
        # Products of all pairs of positions, unless the gradient itself is smaller.
        if a.shape[1] ** 2 <= layer.weight.numel():
            total = total + ((a @ a.mT) * (g @ g.mT)).sum((1, 2))
        else:
            total = total + (g.mT @ a).square().sum((1, 2))
    if layer.bias is not None and layer.bias.requires_grad:
        total = total + g.sum(1).square().sum(1)
    return total


def _embedding(layer: nn.Embedding, inputs: Tensor, grad: Tensor) -> Tensor:
    rows, g = inputs[:, None].flatten(1), grad.double()[:, None].flatten(1, -2)
    # All places of a token add up to one row of the gradient.
    same = rows[:, :, None] == rows[:, None, :]
    if layer.padding_idx is not None:
        same &= (rows != layer.padding_idx)[:, :, None]
    return ((g @ g.mT) * same).sum((1, 2))


def _formed(layer: nn.Module, inputs: Tensor, grad: Tensor) -> Tensor:
    params = {n: p for n, p in layer.named_parameters(recurse=False) if p.requires_grad}
    fixed = {n: p.detach() for n, p in params.items()}

    def one(x: Tensor, g: Tensor) -> dict[str, Tensor]:
        def output(own: dict[str, Tensor]) -> Tensor:
            # `vmap` takes the axis of samples away, which layers expect.
            return torch.func.functional_call(layer, own, (x[None],))[0]

        return torch.func.vjp(output, fixed)[1](g)[0]

    # A weight that is made at each call would stay there, with the samples in it.
    before = [(m, dict(m.__dict__)) for m in layer.modules()]
    try:
        each = torch.func.vmap(one)(inputs, grad)
    except RuntimeError as error:
        # Dropout draws anew, and running statistics are those of the batch.
        reason = str(error).strip().partition("\n")[0]
        raise _refusal(
            f"{layer} cannot be called for one sample at a time ({reason})",
            "put its parameters into a module that does nothing but use them, or the "
            "layer into eval()",
        ) from error
    finally:
        for m, attributes in before:
            m.__dict__.update(attributes)
    return torch.stack(
        [x.double().flatten(1).square().sum(1) for x in each.values()]
    ).sum(0)


GHOSTS: dict[type, Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
}
"""What measures without forming gradients."""
