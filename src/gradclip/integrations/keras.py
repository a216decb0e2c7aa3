"""Keras 3: an optimizer around an optimizer, as Keras's own `LossScaleOptimizer` is."""

from collections.abc import Sequence
from typing import Any

from gradclip.integrations import needed, rule_of
from gradclip.integrations.alone import check_inner, check_replicas
from gradclip.integrations.variables import Variables, verbs
from gradclip.policy import Policy, check_compiled, chosen, may_drop
from gradclip.rules import Rule

keras: Any = needed("keras", "keras")
Wrapper = keras.optimizers.LossScaleOptimizer


@keras.saving.register_keras_serializable(package="gradclip")
class Clipped(keras.optimizers.Optimizer):  # type: ignore[misc]
    r"""Clip all gradients by a rule, then let the inner optimizer apply them.

    $g \leftarrow g \cdot \min(1, \text{limit}_t / \lVert g \rVert)$

    The memory of the rule consists of optimizer variables, so `model.save` keeps it.
    `load_model` makes the rule again from its text; a schedule and a rule of your own
    have none: load with `compile=False` then. Names for `by_name` are the paths of the
    variables, such as `sequential/dense/kernel`. With mixed precision, Keras puts its
    `LossScaleOptimizer` around this one, and it belongs there.

    Args:
        inner_optimizer: A Keras optimizer that neither clips nor accumulates, or the
            name of one.
        rule: Any rule whose memory does not grow, or the text of its constructor.
        on_nonfinite: `"skip"` leaves the model and the inner optimizer as they are at
            a step with NaN or infinity, `"zero"` clears those elements, `"ignore"`
            applies them. Where none is given, it is "skip", and "ignore" under a limit
            of infinity, which only records.
        name: As for every Keras optimizer.

    Raises:
        TypeError: For what is not a rule.
        ValueError: For a rule whose memory grows, an inner optimizer that clips too,
            scales or accumulates, what is no optimizer, and under `tf.distribute` with
            several replicas.

    Example:
        >>> import keras
        >>> from gradclip.keras import Clipped
        >>> optimizer = Clipped(keras.optimizers.SGD(0.1), "Norm(1.0)")
        >>> optimizer.rule.limit
        1.0
    """

    # Keras's own wrapper has these, and they ask the inner optimizer.
    variables = Wrapper.variables
    learning_rate = Wrapper.learning_rate
    iterations = Wrapper.iterations
    finalize_variable_values = Wrapper.finalize_variable_values
    from_config = vars(Wrapper)["from_config"]

    def __init__(
        self,
        inner_optimizer: Any,
        rule: Rule | str,
        on_nonfinite: Policy | None = None,
        name: str | None = None,
    ) -> None:
        """Check everything before the first step."""
        # Keras wants a rate here, and asks the inner optimizer for it.
        super().__init__(learning_rate=0.0, name=name)
        # By name as well, as compile() takes it.
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        self.inner_optimizer = inner_optimizer
        self.rule = rule_of(rule)
        self.on_nonfinite = chosen(on_nonfinite, self.rule)
        check_compiled(self.rule, self.on_nonfinite)
        check_inner(inner_optimizer, Wrapper, Clipped)

    def build(self, variables: Sequence[Any]) -> None:
        """Make the variables that the rule's memory and the report live in."""
        check_replicas(keras.backend.backend())
        self.memory = Variables(self, self.rule, variables)
        self.inner_optimizer.build(variables)
        # A MultiOptimizer may ask a function, and knows its optimizers only now.
        check_inner(self.inner_optimizer, Wrapper, Clipped)
        super().build(variables)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Clip, and apply; a step that is dropped changes nothing but the counts."""
        variables = list(trainable_variables or self._trainable_variables)
        if not self.built:
            self.build(variables)
        if variables:
            grads, kept = self.memory.clip(grads, variables, self.on_nonfinite)
            self._apply_if(kept, grads, variables)

    def _apply_if(self, kept: Any, grads: Any, variables: Any) -> None:
        """Let the inner optimizer apply the gradients, unless the step is dropped."""
        sure = verbs().known(kept) if may_drop(self.rule, self.on_nonfinite) else True
        if sure is False:
            return
        # Where the host does not know yet, the step is made and may be taken back.
        held = [] if sure else [*self.inner_optimizer.variables, *variables]
        before = [keras.ops.copy(v.value) for v in held]
        self.inner_optimizer.apply(grads, variables)
        for v, old in zip(held, before, strict=True):
            v.assign(keras.ops.where(kept, v.value, old))

    def exclude_from_weight_decay(self, *args: Any, **kwargs: Any) -> None:
        """Exclude variables from the decay, which is the inner optimizer's."""
        self.inner_optimizer.exclude_from_weight_decay(*args, **kwargs)

    def metrics(self) -> dict[str, float]:
        """Return what a log shows: the latest norm and limit, and the clip rate."""
        return self.memory.metrics() if self.built else {}

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` makes an equal optimizer from."""
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        return {
            "name": self.name,
            "inner_optimizer": inner,
            "rule": repr(self.rule),
            "on_nonfinite": self.on_nonfinite,
        }
