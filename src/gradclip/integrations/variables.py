"""A rule's memory in the variables of a Keras optimizer, so that saving keeps it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradclip.backends import Backend, NumPy, find_backend
from gradclip.decision import Info
from gradclip.integrations import needed, shown
from gradclip.pipeline import empty, run
from gradclip.policy import Policy
from gradclip.rules import Rule, State, stages
from gradclip.wording import listed

keras: Any = needed("keras", "keras")


class Variables:
    """What a rule remembers and has done, as variables of one optimizer."""

    def __init__(self, optimizer: Any, rule: Rule, trained: Sequence[Any]) -> None:
        """Make a variable for each number and array."""
        shapes = [tuple(v.shape) for v in trained]
        self.trained = list(trained)
        self.rule = rule.bind([v.path for v in trained], shapes)
        # TensorFlow builds inside of a traced function, where only NumPy has values.
        blank = [np.zeros(v.shape, numpy_type(v.dtype)) for v in trained]
        self.states = [
            {name: variable_of(optimizer, name, x) for name, x in state.items()}
            for state in (empty(NumPy(), stage, blank) for stage in stages(self.rule))
        ]
        self.step, self.clipped, self.skipped = (
            optimizer.add_variable((), dtype="int", name=name)
            for name in ("step", "clipped", "skipped")
        )
        self.norm, self.limit = (
            optimizer.add_variable((), name=name) for name in ("norm", "limit")
        )

    def clip(
        self, grads: Sequence[Any], variables: Sequence[Any], policy: Policy
    ) -> tuple[list[Any], Any]:
        """Return the gradients of some variables clipped, and whether to apply them."""
        pairs = list(zip(grads, variables, strict=True))
        given = {id(v): g for g, v in pairs if is_gradient(g, v)}
        self._check(variables)
        engine, read = verbs(), keras.ops.convert_to_tensor
        # One that is missing counts as zeros, since it has a place in the memory.
        whole = [given[id(v)] if id(v) in given else zeros(v) for v in self.trained]
        leaves, info, states = run(
            engine,
            [engine.prepare(g, "") for g in whole],
            self.rule,
            [{name: read(x) for name, x in state.items()} for state in self.states],
            # As a float, since a schedule multiplies it, and TensorFlow mixes no types.
            step=keras.ops.cast(self.step, floating(engine)),
            policy=policy,
            weights=[read(v) for v in self.trained],
        )
        self._keep(engine, info, states)
        clipped = {id(v): g for v, g in zip(self.trained, leaves, strict=True)}
        return [clipped[id(v)] if id(v) in given else g for g, v in pairs], info.kept

    def _check(self, variables: Sequence[Any]) -> None:
        """Refuse variables of another model, before anything is counted."""
        known = set(map(id, self.trained))
        if unknown := [v.path for v in variables if id(v) not in known]:
            raise ValueError(
                f"this optimizer was built for other variables than {listed(unknown)}; "
                "make one for each model."
            )

    def metrics(self) -> dict[str, float]:
        """Return what a log shows: the latest norm and limit, and the clip rate."""
        return shown(self.norm, self.limit, self.clipped, self.step)

    def _keep(
        self, engine: Backend, info: Info, states: Sequence[State | None]
    ) -> None:
        for kept, new in zip(self.states, states, strict=True):
            for name, value in (new or {}).items():
                kept[name].assign(value)
        self.step.assign_add(1)
        self.clipped.assign_add(keras.ops.cast(info.clipped, self.clipped.dtype))
        self.skipped.assign_add(keras.ops.cast(~info.kept, self.skipped.dtype))
        self.norm.assign(engine.norm(info.norm, 2.0))
        self.limit.assign(engine.norm(info.limit, 2.0))


def verbs() -> Backend:
    """Return the verbs for the tensors of the backend in use."""
    return find_backend([("", keras.ops.zeros(()))])


def floating(engine: Backend) -> str:
    """Return the widest type of numbers: JAX has float64 only where it is on."""
    return keras.backend.standardize_dtype(engine.wide)


def zeros(variable: Any) -> Any:
    """Return a gradient for a variable that has none."""
    return keras.ops.zeros(variable.shape, variable.dtype)


def is_gradient(gradient: Any, variable: Any) -> bool:
    """Return whether there is one; quantized layers hand over new values instead."""
    overwrites = getattr(variable, "overwrite_with_gradient", False)
    return gradient is not None and not overwrites


def numpy_type(dtype: str) -> str:
    """Return a type of NumPy that is as wide as one of Keras."""
    return "float16" if dtype == "bfloat16" else dtype


def variable_of(optimizer: Any, name: str, value: Any) -> Any:
    """Return a new variable of the optimizer that starts with a value."""

    def start(shape: Any, dtype: Any) -> Any:
        return keras.ops.convert_to_tensor(value, dtype)

    kind = min(value.dtype, np.dtype(floating(verbs()))).name
    return optimizer.add_variable(value.shape, start, dtype=kind, name=name)
