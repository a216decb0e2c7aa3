"""Keras 3: an optimizer around an optimizer, as Keras's own `LossScaleOptimizer` is."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradclip.backends import Backend, backend_of
from gradclip.integrations import needed, rule_of
from gradclip.pipeline import Info, Policy, check_policy, run
from gradclip.rules import Rule, stages

keras: Any = needed("keras", "keras")
Wrapper = keras.optimizers.LossScaleOptimizer
BACKENDS = ("torch", "jax", "tensorflow")
TAKEN = (
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


@keras.saving.register_keras_serializable(package="gradclip")
class Clipped(keras.optimizers.Optimizer):  # type: ignore[misc]
    r"""Clip all gradients by a rule, then let the inner optimizer apply them.

    $g \leftarrow g \cdot \min(1, \text{limit}_t / \lVert g \rVert)$

    The memory of the rule consists of optimizer variables, so `model.save` keeps it.
    It works with the torch, JAX and TensorFlow backends. With mixed precision, Keras
    puts its `LossScaleOptimizer` around this one, and it belongs there.

    Args:
        inner_optimizer: A Keras optimizer that neither clips nor accumulates.
        rule: Any rule whose memory does not grow, or the text of its constructor.
        on_nonfinite: `"skip"` leaves the model and the inner optimizer as they are at
            a step with NaN or infinity, `"zero"` clears those elements, `"ignore"`
            applies them.
        name: As for every Keras optimizer.

    Raises:
        TypeError: For what is not a rule.
        ValueError: For a rule whose memory grows, an inner optimizer that clips too,
            scales or accumulates, and for other backends.

    Example:
        >>> import keras
        >>> from gradclip.keras import Clipped
        >>> optimizer = Clipped(keras.optimizers.SGD(0.1), "Norm(1.0)")
        >>> optimizer.rule.limit
        1.0
    """

    # These ask the inner optimizer, as they do in Keras's own.
    variables = Wrapper.variables
    learning_rate = Wrapper.learning_rate
    iterations = Wrapper.iterations
    finalize_variable_values = Wrapper.finalize_variable_values

    def __init__(
        self,
        inner_optimizer: Any,
        rule: Rule | str,
        on_nonfinite: Policy = "skip",
        name: str | None = None,
    ) -> None:
        """Check everything before the first step."""
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.rule, self.on_nonfinite = rule_of(rule), check_policy(on_nonfinite)
        _check(inner_optimizer, self.rule, on_nonfinite)

    @keras.src.utils.tracking.no_automatic_dependency_tracking  # type: ignore[untyped-decorator]
    def build(self, variables: Sequence[Any]) -> None:
        """Make the variables that the rule's memory and the report live in."""
        # TensorFlow builds inside of a traced function, where only NumPy has values.
        cells = {"tensor": np.zeros(len(variables))}
        memories = [
            stage.init(cells.get(stage.over, np.zeros(())), np)
            for stage in stages(self._bound(variables))
        ]
        self._memory = [
            {name: self._keep(name, x) for name, x in memory.items()}
            for memory in memories
        ]
        for name in ("step", "clipped", "skipped"):
            setattr(self, f"_{name}", self.add_variable((), dtype="int", name=name))
        self._norm = self.add_variable((), name="norm")
        self._limit = self.add_variable((), name="limit")
        self.inner_optimizer.build(variables)
        super().build(variables)

    def _bound(self, variables: Sequence[Any]) -> Rule:
        shapes = [tuple(v.shape) for v in variables]
        return self.rule.bind([v.path for v in variables], shapes)

    def _keep(self, name: str, value: Any) -> Any:
        def start(shape: Any, dtype: Any) -> Any:
            return keras.ops.convert_to_tensor(value, dtype)

        wide = keras.backend.standardize_dtype(verbs().wide)
        return self.add_variable(value.shape, start, dtype=wide, name=name)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Clip, and apply; a step that is dropped changes nothing but the counts."""
        variables = list(trainable_variables or self._trainable_variables)
        if not self.built:
            self.build(variables)
        pairs = [p for p in zip(grads, variables, strict=True) if p[0] is not None]
        grads, variables = (list(part) for part in zip(*pairs, strict=True))
        engine, read = verbs(), keras.ops.convert_to_tensor
        grads, info, states = run(
            engine,
            [engine.prepare(g, "") for g in grads],
            self._bound(variables),
            [{k: read(v) for k, v in memory.items()} for memory in self._memory],
            step=read(self._step),
            policy=self.on_nonfinite,
            weights=[read(v) for v in variables],
        )
        for kept, new in zip(self._memory, states, strict=True):
            for name, value in (new or {}).items():
                kept[name].assign(value)
        self._report(info)
        self._apply_if(info.kept, grads, variables)

    def _report(self, info: Info) -> None:
        """Keep the numbers of this step where saving and `metrics` find them."""
        self._step.assign_add(1)
        self._clipped.assign_add(keras.ops.cast(info.clipped, self._clipped.dtype))
        self._skipped.assign_add(keras.ops.cast(~info.kept, self._skipped.dtype))
        self._norm.assign(verbs().norm(info.norm, 2.0))
        self._limit.assign(verbs().norm(info.limit, 2.0))

    def _apply_if(self, kept: Any, grads: Any, variables: Any) -> None:
        """Let the inner optimizer apply the gradients, unless the step is dropped."""
        known = verbs().known(kept)
        if known is False:
            return
        held = [] if known else [*self.inner_optimizer.variables, *variables]
        before = [keras.ops.copy(v.value) for v in held]
        self.inner_optimizer.apply(grads, variables)
        for v, old in zip(held, before, strict=True):
            v.assign(keras.ops.where(kept, v.value, old))

    def metrics(self) -> dict[str, float]:
        """Return what a log shows: the latest norm and limit, and the clip rate."""
        steps = max(int(self._step), 1)
        return {
            "grad_norm": float(self._norm),
            "grad_limit": float(self._limit),
            "clip_rate": int(self._clipped) / steps,
        }

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` makes an equal optimizer from."""
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        return {
            "name": self.name,
            "inner_optimizer": inner,
            "rule": repr(self.rule),
            "on_nonfinite": self.on_nonfinite,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Make an optimizer from a config, without its variables."""
        inner = keras.saving.deserialize_keras_object(
            config["inner_optimizer"], custom_objects=custom_objects
        )
        return cls(**{**config, "inner_optimizer": inner})


def verbs() -> Backend:
    """Return the verbs for the tensors of the backend in use."""
    if keras.backend.backend() == "tensorflow":
        from gradclip.integrations.tensorflow import TensorFlow

        return TensorFlow()
    kinds = type(keras.ops.zeros(())).__mro__
    return next(filter(None, map(backend_of, kinds)))


def _check(inner: Any, rule: Rule, policy: Policy) -> None:
    """Refuse what would clip twice, or clip something else than whole gradients."""
    backend = keras.backend.backend()
    taken = [name for name in TAKEN if getattr(inner, name, None) is not None]
    problems = {
        f"Clipped works with the {', '.join(BACKENDS)} backends of Keras, not with "
        f"{backend!r}.": backend not in BACKENDS,
        "gradients have to be unscaled before a clip: use "
        "LossScaleOptimizer(Clipped(optimizer, rule)).": isinstance(inner, Wrapper),
        f"the inner optimizer has {', '.join(taken)} set; leave that out, since "
        "Clipped has to see whole gradients, and clip them alone.": bool(taken),
        "on_nonfinite='raise': use 'skip', 'zero' or 'ignore' here.": policy == "raise",
        f"{rule!r} remembers more norms at every step, and variables have one size; "
        "give it a window.": rule.grows,
    }
    for problem, there in problems.items():
        if there:
            raise ValueError(problem)
